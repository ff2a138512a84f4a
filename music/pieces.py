"""Demo music: pieces whose key, tempo and timbre are known, and their captions.

Everything in a piece that its caption leaves open is drawn from a seed; pitches are counted as MIDI counts
them, times in beats. `python -m music.pieces` measures pieces of known caption and makes music/pieces.json
again, with which analysis.py compares sounds.
"""

import functools
import itertools
import json
import math
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from corpora import prepare, shards
from music import analysis
from music.analysis import KEYS, ROOTS, TEMPI, TIMBRES
from pretrained.asr import RATE

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones above the root
CAPTIONS = ("A {tempo} {timbre} in {key}.", "{key}, {tempo}, {timbre}.", "{timbre}, {key}, {tempo}.")
# Degrees of the scale, each for two beats; most are the tonic
CHORDS = ((0, 3, 0, 4), (0, 4, 0, 3), (0, 3, 4, 0), (0, 5, 3, 0))
VIBRATO_HZ = 5.5


class Sound(NamedTuple):
    """An instrument, by additive synthesis."""

    harmonics: tuple[float, ...]  # amplitudes
    attack: float  # seconds
    decay: float = 0.0  # 1/s
    decay_more: float = 0.0  # 1/s, for each further harmonic
    vibrato: float = 0.0  # depth: share of the frequency


SOUNDS = {
    "flute": Sound((1.0, 0.2, 0.06), attack=0.05, vibrato=0.004),
    "violin": Sound(tuple(1 / n for n in range(1, 13)), attack=0.05, vibrato=0.006),
    "trumpet": Sound((0.4, 0.7, 1.0, 1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2), attack=0.02),
    "marimba": Sound((1.0, 0.0, 0.0, 0.2), attack=0.004, decay=3.0, decay_more=1.5),
    "banjo": Sound(tuple(n**-0.4 for n in range(1, 13)), attack=0.002, decay=4.0, decay_more=0.3),
}


def prepare_pieces(config: Config) -> None:
    """Play and pack data.sentences pieces to train on, of music.crop_seconds each, and those held out."""
    settings = config.data
    seconds = config.music.crop_seconds
    play = functools.partial(play_piece, seconds, config.mel.sample_rate, config.mel.hop)
    corpus = {"name": "pieces", "seconds": seconds}
    clips = list_pieces(settings.sentences)
    shards.pack(Path(settings.data_dir), corpus, clips, [], config.packed_format(), play, settings.workers)


def play_piece(seconds: float, sample_rate: int, hop: int, clip: shards.Clip) -> np.ndarray:
    """A clip as rows (T, hop) of its wave."""
    wave = compose(clip.text, clip.id, seconds, sample_rate)
    return prepare.wave_to_frames(wave, hop)


def list_pieces(count: int) -> list[shards.Clip]:
    """Clips of `count` pieces to train on, and of 64 to validate and 64 to test on, in other combinations."""
    clips = []
    for split, size in (("train", count), ("val", 64), ("test", 64)):
        clips += [draw_piece(split, number) for number in range(size)]
    return clips


def draw_piece(split: str, number: int) -> shards.Clip:
    """The clip of a piece of random key, tempo and timbre, among those that its split may have."""
    rng = random.Random(f"{split} {number}")
    tempi = list(TEMPI)
    while True:
        key = rng.choice(KEYS)
        tempo = rng.choice(tempi)
        timbre = rng.choice(TIMBRES)
        if is_held_out(key, tempo, timbre) == (split != "train"):
            break
    caption = rng.choice(CAPTIONS).format(key=key, tempo=tempo, timbre=timbre)
    mode = key.split()[1]
    return shards.Clip(f"{split}-{number:05d}", caption, split, None, group=f"{timbre} {tempo} {mode}")


def is_held_out(key: str, tempo: str, timbre: str) -> bool:
    """32 of the 210 combinations of key, tempo and timbre are never trained on."""
    combination = f"{key} {tempo} {timbre}"
    return zlib.crc32(combination.encode()) % 10 == 0


def compose(caption: str, seed: str, seconds: float, sample_rate: int) -> Tensor:
    """Play what the caption of a piece asks for: a wave (N,) with peak 0.5. The rest is drawn by the seed."""
    asked = analysis.parse_caption(caption)
    key, mode = asked["key"].split()
    root = ROOTS[key]
    scale = SCALES[mode]
    sound = SOUNDS[asked["timbre"]]
    beat = 60 / TEMPI[asked["tempo"]]  # seconds
    beats = math.ceil(seconds / beat)
    rng = random.Random(seed)
    chords = rng.choice(CHORDS)
    first_step = rng.randrange(7, 12)
    lengths = (1, 1, 2) if asked["tempo"] == "fast" else (1, 1, 1, 2, 0.5)

    chorus = accompaniment(root, scale, chords, beats)
    tune = melody(root, scale, chords, beats, first_step, lengths, rng)
    samples = int((seconds + 4) * sample_rate)
    wave = torch.zeros(samples)
    for note in itertools.chain(chorus, tune):
        phase = rng.random()
        duration = note.length * beat
        tone = synthesize_note(sound, note.pitch, duration, sample_rate, phase)
        start = int(note.start * beat * sample_rate)
        stop = start + len(tone)
        wave[start:stop] += note.loudness * tone
    samples = int(seconds * sample_rate)
    wave = wave[:samples]
    peak = wave.abs().max()
    return 0.5 * wave / peak


class Note(NamedTuple):
    pitch: int  # as MIDI counts semitones
    start: float  # beats
    length: float  # beats
    loudness: float


def accompaniment(root: int, scale: tuple, chords: tuple, beats: int) -> Iterator[Note]:
    """A chord on every beat, and on every other a bass that stays on the tonic."""
    for beat in range(beats):
        degree = chords[beat // 2 % 4]
        on_even = beat % 2 == 0
        loudness = 0.35 if on_even else 0.25
        for third in (0, 2, 4):
            step = (degree + third) % 7
            semitones = root + scale[step]
            yield Note(60 + semitones % 12, beat, 0.85, loudness)
        if on_even:
            yield Note(48 + root, beat, 1.85, 0.5)


def melody(
    root: int, scale: tuple, chords: tuple, beats: int, step: int, lengths: tuple, rng: random.Random
) -> Iterator[Note]:
    """A tune that wanders along the scale.

    Every fourth beat begins on the root of the chord, every other one in the chord. Half beats come in pairs.
    step: of the scale, at which it starts. lengths: of its notes, in beats.
    """
    beat = 0.0
    while beat < beats:
        length = rng.choice(lengths)
        degree = chords[int(beat) // 2 % 4]
        for half in range(2 if length == 0.5 else 1):
            wanted = step + rng.choice((-2, -1, 1, 2))
            if half:
                step += rng.choice((-1, 1))
            elif beat % 4 == 0:
                step = nearest_step(wanted, degree, (0,))
            else:
                step = nearest_step(wanted, degree, (0, 2, 4))
            pitch = 60 + root + scale[step % 7] + step // 7 * 12
            yield Note(pitch, beat, 0.9 * length, 0.8)
            beat += length


def nearest_step(wanted: int, degree: int, intervals: tuple) -> int:
    """The step of the scale nearest to `wanted` that is one of the intervals above the degree."""
    steps = []
    for step in range(3, 14):
        if (step - degree) % 7 in intervals:
            steps.append(step)
    return min(steps, key=lambda step: abs(step - wanted))


def synthesize_note(sound: Sound, pitch: int, seconds: float, sample_rate: int, phase: float) -> Tensor:
    """A note (N,) of MIDI pitch `pitch`, and 50 ms in which it ends. phase: of the vibrato, in turns."""
    release = 0.05
    total = seconds + release
    samples = int(total * sample_rate)
    t = torch.arange(samples) / sample_rate
    octaves = (pitch - 69) / 12  # above A4, which has 440 Hz
    frequency = 440 * 2**octaves
    depth = sound.vibrato / (math.tau * VIBRATO_HZ)  # seconds
    vibrato_turns = VIBRATO_HZ * t + phase
    delay = depth * torch.sin(math.tau * vibrato_turns)
    turns = frequency * (t + delay)

    wave = torch.zeros_like(t)
    for n, amplitude in enumerate(sound.harmonics, 1):
        fits = n * frequency < 0.45 * sample_rate
        if amplitude and fits:
            decay = sound.decay + sound.decay_more * (n - 1)
            tone = amplitude * torch.sin(math.tau * n * turns)
            wave += tone * torch.exp(-decay * t)

    attack = t / sound.attack
    fade = (total - t) / release
    envelope = attack.clamp(max=1) * fade.clamp(0, 1)
    loudness = math.hypot(*sound.harmonics)
    return wave * envelope / loudness


def measure_templates() -> None:
    """Write music/pieces.json, measured on 90 pieces that are in no corpus.

    It holds the mean chroma of each mode in C, the mean timbre features of each timbre, and their precision.
    """
    chromas = {mode: [] for mode in SCALES}
    features = {timbre: [] for timbre in TIMBRES}
    roots = itertools.cycle(ROOTS)
    ways = itertools.product(TIMBRES, SCALES, TEMPI, range(3))
    for n, (timbre, mode, tempo, _) in enumerate(ways):
        root = next(roots)
        key = f"{root} {mode}"
        caption = CAPTIONS[0].format(tempo=tempo, timbre=timbre, key=key)
        wave = compose(caption, f"known {n}", 5.12, RATE)
        chroma = analysis.chroma(wave)
        chromas[mode].append(chroma.roll(-ROOTS[root]))
        features[timbre].append(analysis.timbre_features(wave))

    templates = {mode: torch.stack(rows).mean(0) for mode, rows in chromas.items()}  # (12,)
    rows = [torch.stack(of_timbre) for of_timbre in features.values()]
    rows = torch.stack(rows)  # (timbres, 18, 11)
    centres = rows.mean(1)  # (timbres, 11)
    deviations = (rows - centres[:, None]).flatten(0, 1)  # (90, 11)
    covariance = deviations.T @ deviations / len(deviations)
    regularised = covariance + 0.1 * torch.eye(len(covariance))
    templates["centres"] = centres
    templates["precision"] = torch.linalg.inv(regularised)
    values = {}
    for name, template in templates.items():
        rounded = template.double().round(decimals=5)
        values[name] = rounded.tolist()
    with shards.atomic_write(analysis.TEMPLATES) as part:
        part.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    measure_templates()
