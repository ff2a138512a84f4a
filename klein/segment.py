"""Long recordings cut between words: Whisper says between which words the pauses lie, the sound says where.

Times are in seconds. What was timed is kept, so that interrupted work goes on where it stopped.
"""

import contextlib
import itertools
import json
import math
from pathlib import Path

import soundfile
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
from device import preparing_device
from pretrained.whisper_weights import RATE, load

Word = tuple[str, float, float]  # word, start, stop; seconds


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
        pieces = segment(known[clip.id]["words"], config.picture.seconds)
        for n, (text, start, stop) in enumerate(pieces):
            text = as_sentence(text)
            shorter.append(clip._replace(id=f"{clip.id}_{n}", text=text, start=start, stop=stop))
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
    device = preparing_device(config.device)
    model = load(config.data.align, device, "data.align")
    progress = tqdm(clips, desc="words", unit="clip", disable=None)
    for number, clip in enumerate(progress, 1):
        timed = align_words(model, clip, config.picture.seconds)
        known[clip.id] = {**timed, "text": clip.text}
        if number == len(clips) or number % 1000 == 0:
            with shards.atomic_write(path) as part:
                part.write_text(json.dumps(known), encoding="utf-8")


def align_words(model: Whisper, clip: shards.Clip, longest: float) -> dict:
    """{"seconds": of the recording, "words": as `align_text`}.

    No words if it is no longer than `longest`, or cannot be aligned.
    """
    timed = {"seconds": 0.0, "words": []}
    # What is wrong with the clip is reported when it is packed
    with contextlib.suppress(UserError, soundfile.LibsndfileError):
        info = soundfile.info(clip.wav)
        timed["seconds"] = info.duration
        if info.duration > longest:
            wave = audio.load_wav(clip.wav, info.samplerate)
            timed["words"] = align_text(model, clip.text, wave, info.samplerate)
    return timed


def align_text(model: Whisper, text: str, wave: Tensor, sample_rate: int) -> list[Word]:
    """When each word of `text` is spoken in a wave (N,), in order; words without a pause between them touch.

    Whisper's cross-attention to the known text, aligned by dynamic time warping (whisper.timing), tells
    between which words each pause lies; where the pause begins and ends is then measured on the wave.
    raises UserError for what exceeds Whisper's 30 s or its text context, and for no words.
    """
    tokenizer = get_tokenizer(model.is_multilingual, language="en", task="transcribe")
    words = text.split()
    tokens = [tokenizer.encode(f" {word}") for word in words]
    text_tokens = list(itertools.chain(*tokens))
    wave = audio.resample(wave, sample_rate, RATE)
    too_many = len(text_tokens) + 4 > model.dims.n_text_ctx
    if len(wave) > N_SAMPLES or too_many or not words:
        raise UserError(f"cannot align {len(words)} words in {len(wave) / RATE:.1f} s")
    mel = log_mel_spectrogram(pad_or_trim(wave), model.dims.n_mels)
    frames = len(wave) // HOP_LENGTH
    timings = find_alignment(model, tokenizer, text_tokens, mel.to(model.device), frames)
    return refine_boundaries(words, word_starts(tokens, timings), wave)


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
        starts.append(start_of_token.get(position, 0.0))
        position += len(word_tokens)
    return starts


def refine_boundaries(words: list[str], starts: list[float], wave: Tensor) -> list[Word]:
    """Move each pause in a wave (N,) at 16 kHz to the nearest of the rough starts of words, seconds.

    A pause has 50 ms or more. It may lie half its length away from a start, and 50 ms at least, because
    Whisper counts a pause to the word before it or to the word after it. A start without a pause stays.
    """
    silences, length = find_silences(wave)
    begin = 0.0
    end = length
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
            nearest = distances.index(min(distances))
            before, after = pauses[nearest]
            is_near = distances[nearest] <= max(0.05, seconds / 2)
            if is_near and seconds > after - before:
                pauses[nearest] = (first, last)
    times = itertools.accumulate(
        [begin, *itertools.chain(*pauses), end], max
    )  # in order, whatever attention said
    times = [min(time, end) for time in times]
    return list(zip(words, times[::2], times[1::2]))


def find_silences(wave: Tensor) -> tuple[list[tuple[float, float]], float]:
    """Stretches (start, stop) of a wave (N,) at 16 kHz that are 26 dB below its loud parts; its length."""
    frame = RATE // 100  # 10 ms
    frames = F.pad(wave, (0, -len(wave) % frame)).reshape(-1, frame)
    power = frames.square().mean(1)
    is_quiet = power < power.quantile(0.95) * 10**-2.6
    silences = []
    start = 0
    for quiet, run in itertools.groupby(is_quiet.tolist()):
        stop = start + len(list(run))
        if quiet:
            silences.append((start / 100, stop / 100))
        start = stop
    return silences, start / 100


def segment(words: list[Word], seconds: float) -> list[Word]:
    """[(text, start, stop)]: all words, in order, in pieces of 1 s to `seconds`; [] if that is impossible.

    The cuts have the least sum of 1 / (pause + 20 ms): few cuts, in long pauses. A piece keeps up to 200 ms
    of the silence around it, never more than half of a pause.
    """
    middles = [0.0]  # of the pauses before and after each word
    costs = [0.0]  # of a cut before each word
    for before, after in itertools.pairwise(words):
        middles.append((before[2] + after[1]) / 2)
        pause = max(0, after[1] - before[2])
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
    if math.isinf(best[-1][0]):
        return []
    pieces = []
    end = len(words)
    while end:
        _, first = best[end]
        text = " ".join(word for word, _, _ in words[first:end])
        pieces.append((text, starts[first], stops[end - 1]))
        end = first
    return pieces[::-1]


def as_sentence(text: str) -> str:
    """Words as a prompt has them: a capital first, a full stop last."""
    stop = "." if text[-1:].isalnum() else ""
    return text[:1].upper() + text[1:] + stop
