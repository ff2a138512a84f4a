"""TODO."""

import contextlib
import itertools
import json
import math
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from whisper.audio import HOP_LENGTH, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.model import Whisper
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

import audio
from config import Config, UserError
from corpora import shards
from pretrained.asr import RATE, Recogniser
from pretrained.whisper_weights import load

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
    return refine_boundaries(words, starts, wave)


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


def refine_boundaries(words: list[str], starts: list[float], wave: Tensor) -> list[Word]:
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


def segment_clips(config: Config, clips: list[shards.Clip], folder: Path) -> list[shards.Clip]:
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
        pieces = segment(words, config.picture.seconds)
        for n, (text, start, stop) in enumerate(pieces):
            text = as_sentence(text)
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


def time_clips(config: Config, clips: list[shards.Clip], known: dict, path: Path) -> None:
    """Add the words of clips to `known`, and write that to `path` after every 1,000 clips and at the end."""
    name = config.data.align
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.device != "cpu":
        device = torch.device("cuda")
    model = load(name, device, "data.align")
    recogniser = Recogniser(model, name)
    longest = config.picture.seconds
    progress = tqdm(clips, desc="words", unit="clip", disable=None)
    for number, clip in enumerate(progress, 1):
        timed = align_words(recogniser, clip, longest)
        timed["text"] = clip.text
        known[clip.id] = timed
        is_last = number == len(clips)
        if is_last or number % 1000 == 0:
            content = json.dumps(known)
            with shards.atomic_write(path) as part:
                part.write_text(content, encoding="utf-8")


def align_words(recogniser: Recogniser, clip: shards.Clip, longest: float) -> dict:
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
            timed["words"] = align_text(recogniser.model, clip.text, wave, rate)
    return timed


def segment(words: list[Word], seconds: float) -> list[Word]:
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


def as_sentence(text: str) -> str:
    """Words as a prompt has them: a capital first, a full stop last."""
    capitalised = text[:1].upper() + text[1:]
    if text[-1:].isalnum():
        return capitalised + "."
    return capitalised
