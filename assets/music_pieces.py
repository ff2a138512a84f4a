"""Pieces of music of which key, tempo and timbre are known, and their captions: `python assets/music_pieces.py --config FILE [--key value]`
packs data.corpus pieces, as `python system.py prepare` does; `python assets/music_pieces.py learn` writes music_pieces.json, by which
recogniser.hear tells one timbre and mode from another.
"""

import functools
import itertools
import json
import math
import random
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import recogniser
from config import run_main
from system import config_from_command_line
from recogniser import KEYS, RATE, ROOTS, TEMPI, TIMBRES

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}              # semitones above the root
CAPTIONS = ("A {tempo} {timbre} in {key}.", "{key}, {tempo}, {timbre}.", "{timbre}, {key}, {tempo}.")
CHORDS = ((0, 3, 0, 4), (0, 4, 0, 3), (0, 3, 4, 0), (0, 5, 3, 0))      # two beats each, by degree of the scale: most are the tonic


class Sound(NamedTuple):
    """An instrument: how loud its harmonics are, how fast they come (s) and go (1/s, and more for each harmonic), its vibrato."""
    harmonics: tuple[float, ...]
    attack: float
    decay: float
    decay_more: float
    vibrato: float


SOUNDS = {"flute": Sound((1.0, 0.2, 0.06), 0.05, 0.0, 0.0, 0.004),
          "violin": Sound(tuple(1 / n for n in range(1, 13)), 0.05, 0.0, 0.0, 0.006),
          "trumpet": Sound((0.4, 0.7, 1.0, 1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2), 0.02, 0.0, 0.0, 0.0),
          "marimba": Sound((1.0, 0.0, 0.0, 0.2), 0.004, 3.0, 1.5, 0.0),
          "banjo": Sound(tuple(n ** -0.4 for n in range(1, 13)), 0.002, 4.0, 0.3, 0.0)}


def pieces(count: int) -> list[data.Clip]:
    """Clips of `count` pieces to train on, and of 64 to validate and 64 to test on, of whose combinations training has none."""
    return [piece(split, n) for split, size in (("train", count), ("val", 64), ("test", 64)) for n in range(size)]


def piece(split: str, number: int) -> data.Clip:
    rng = random.Random(f"{split} {number}")
    while True:
        way = {"key": rng.choice(KEYS), "tempo": rng.choice(list(TEMPI)), "timbre": rng.choice(TIMBRES)}
        if is_held_out(way) == (split != "train"):
            group = f"{way['timbre']} {way['tempo']} {way['key'].split()[1]}"
            return data.Clip(f"{split}-{number:05d}", rng.choice(CAPTIONS).format(**way), split, None, group=group)


def is_held_out(way: dict[str, str]) -> bool:
    """32 of the 210 combinations of key, tempo and timbre are never trained on."""
    return zlib.crc32(" ".join(way.values()).encode()) % 10 == 0


def compose(caption: str, seed: str, seconds: float, sample_rate: int) -> torch.Tensor:
    """Play what the caption of a piece asks for: a wave (N,) with peak 0.5.

    A chord on every beat, a bass that stays on the tonic, and a melody that wanders along the scale, begins every fourth beat on the
    tonic and every other one in the chord. What it plays, within that, depends on the seed.
    """
    asked, rng = recogniser.asked_for(caption), random.Random(seed)
    key, mode = asked["key"].split()
    root, scale, beat, sound = ROOTS[key], SCALES[mode], 60 / TEMPI[asked["tempo"]], SOUNDS[asked["timbre"]]
    chords, step, beats = rng.choice(CHORDS), rng.randrange(7, 12), math.ceil(seconds / beat)
    lengths = (1, 1, 2) if asked["tempo"] == "fast" else (1, 1, 1, 2, 0.5)
    wave = torch.zeros(int((seconds + 4) * sample_rate))

    def add(pitch: int, at: float, length: float, loudness: float) -> None:
        note = loudness * play(sound, pitch, length * beat, sample_rate, rng.random())
        first = int(at * beat * sample_rate)
        wave[first:first + len(note)] += note

    for now in range(beats):
        for third in (0, 2, 4):
            add(60 + (root + scale[(chords[now // 2 % 4] + third) % 7]) % 12, now, 0.85, 0.25 if now % 2 else 0.35)
        if now % 2 == 0:
            add(48 + root, now, 1.85, 0.5)
    now = 0.0
    while now < beats:
        length, degree = rng.choice(lengths), chords[int(now) // 2 % 4]
        for part in range(2 if length == 0.5 else 1):
            fits = [s for s in range(3, 14) if (s - degree) % 7 in ((0,) if now % 4 == 0 else (0, 2, 4))]
            wanted = step + rng.choice((-2, -1, 1, 2))
            step = step + rng.choice((-1, 1)) if part else min(fits, key=lambda s: abs(s - wanted))
            add(60 + root + scale[step % 7] + step // 7 * 12, now, 0.9 * length, 0.8)
            now += length
    wave = wave[:int(seconds * sample_rate)]
    return 0.5 * wave / wave.abs().max()


def play(sound: Sound, pitch: int, seconds: float, sample_rate: int, phase: float) -> torch.Tensor:
    """A note, and 50 ms in which it ends; pitch: as MIDI counts semitones. phase: of the vibrato, in turns."""
    end = 0.05
    t = torch.arange(int((seconds + end) * sample_rate)) / sample_rate
    turns = 440 * 2 ** ((pitch - 69) / 12) * (t + sound.vibrato / (2 * math.pi * 5.5) * torch.sin(2 * math.pi * (5.5 * t + phase)))
    wave = sum(share * torch.sin(2 * math.pi * n * turns) * torch.exp(-(sound.decay + sound.decay_more * (n - 1)) * t)
               for n, share in enumerate(sound.harmonics, 1) if share and n * 440 * 2 ** ((pitch - 69) / 12) < 0.45 * sample_rate)
    envelope = (t / sound.attack).clamp(max=1) * ((seconds + end - t) / end).clamp(0, 1)
    return wave * envelope / math.hypot(*sound.harmonics)


def play_piece(seconds: float, sample_rate: int, hop: int, clip: data.Clip) -> np.ndarray:
    return data.wave_rows(compose(clip.text, clip.id, seconds, sample_rate), hop)


def learn() -> None:
    """Write what 90 pieces sound like that nobody is asked for: the chroma of each mode in C, the texture of each timbre, its precision."""
    chromas, textures = {mode: [] for mode in SCALES}, {timbre: [] for timbre in TIMBRES}
    for n, (timbre, mode, speed, _) in enumerate(itertools.product(TIMBRES, SCALES, TEMPI, range(3))):
        root = list(ROOTS)[n % len(ROOTS)]
        wave = compose(CAPTIONS[0].format(tempo=speed, timbre=timbre, key=f"{root} {mode}"), f"known {n}", 5.12, RATE)
        chromas[mode].append(recogniser.chroma(wave).roll(-ROOTS[root]))
        textures[timbre].append(recogniser.texture(wave))
    centres = torch.stack([torch.stack(rows).mean(0) for rows in textures.values()])
    spread = torch.cat([torch.stack(rows) - centre for rows, centre in zip(textures.values(), centres)])
    found = {mode: torch.stack(rows).mean(0) for mode, rows in chromas.items()}
    found |= {"centres": centres, "precision": torch.linalg.inv(spread.T @ spread / len(spread) + 0.1 * torch.eye(spread.shape[1]))}
    with data.replacing(data.ASSETS / "music_pieces.json") as part:
        part.write_text(json.dumps({name: rows.double().round(decimals=5).tolist() for name, rows in found.items()}) + "\n")


def main() -> None:
    if sys.argv[1:] == ["learn"]:
        learn()
        return
    config = config_from_command_line(sys.argv[1:])
    d, mel, seconds = config.data, config.mel, config.music.crop_seconds
    read = functools.partial(play_piece, seconds, mel.sample_rate, mel.hop)
    data.pack(Path(d.data_dir), {"name": "pieces", "seconds": seconds}, pieces(d.sentences), [], recogniser.piece_form(mel), read, d.workers)


if __name__ == "__main__":
    run_main(main)
