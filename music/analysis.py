"""Key, tempo and timbre of any sound, measured, and whether they are those of a piece's caption.

No network listens: key by chroma, tempo by the periodicity of onsets, timbre by Fisher's linear discriminant
on a spectrum's bands; templates of the first and last are measured on other pieces (music/pieces.json).
All work on waves at 16 kHz.
"""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import audio
from pretrained.asr import RATE

TEMPLATES = Path(__file__).with_name("pieces.json")  # made by `python -m music.pieces`
ROOTS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}  # semitones above C
TEMPI = {"slow": 72, "medium": 108, "fast": 162}  # beats a minute: none is twice another
TIMBRES = ("flute", "violin", "trumpet", "marimba", "banjo")
MODES = ("major", "minor")
KEYS = [f"{root} {mode}" for root, mode in itertools.product(ROOTS, MODES)]
GUESS_RATE = 1 / (len(KEYS) * len(TEMPI) * len(TIMBRES))  # that a guess matches all of a caption


def parse_caption(caption: str) -> dict[str, str]:
    """{"key": "D minor", "tempo": "slow", "timbre": "flute"} of the caption of a piece; {} for any other."""
    vocabulary = {"key": KEYS, "tempo": TEMPI, "timbre": TIMBRES}
    attributes = {}
    for name, words in vocabulary.items():
        named = [word for word in words if re.search(rf"\b{word}\b", caption)]
        if len(named) != 1:
            return {}
        attributes[name] = named[0]
    return attributes


def caption_match(measured: dict[str, str], caption: str) -> dict[str, float]:
    """1 or 0 for each of key, tempo and timbre, and for all of them; {} if the caption is not of a piece."""
    attributes = parse_caption(caption)
    if not attributes:
        return {}
    matches = {}
    for name, wanted in attributes.items():
        matches[f"{name}_match"] = float(measured[name] == wanted)
    matches["all_match"] = min(matches.values())
    return matches


def measure(wave: Tensor, sample_rate: int) -> dict[str, str]:
    """The key, tempo and timbre of any wave (N,): {"key": "D minor", "tempo": "slow", "timbre": "flute"}.

    key: whose mean chroma, over known pieces, is most similar. tempo: at which onsets repeat most strongly.
    timbre: nearest by Fisher's linear discriminant on `timbre_features`. All are "" for silence and below a
    second.
    """
    wave = audio.resample(wave.float().cpu(), sample_rate, RATE)
    too_short = len(wave) < RATE
    if too_short or not wave.any():
        return {"key": "", "tempo": "", "timbre": ""}
    known = reference_features()
    notes = chroma(wave)
    similarity = {}
    for key in KEYS:
        root, mode = key.split()
        profile = known[mode].roll(ROOTS[root])
        similarity[key] = (notes * profile).sum().item()
    key = max(KEYS, key=similarity.get)
    offset = timbre_features(wave) - known["centres"]  # (timbres, 11)
    distance = (offset @ known["precision"]) * offset
    timbre = TIMBRES[distance.sum(1).argmin()]
    return {"key": key, "tempo": estimate_tempo(wave), "timbre": timbre}


@functools.cache
def reference_features() -> dict[str, Tensor]:
    """Means over pieces of known caption, from music/pieces.json: chroma by mode, timbre features."""
    statistics = json.loads(TEMPLATES.read_text())
    return {name: torch.tensor(values) for name, values in statistics.items()}


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
    notes = torch.zeros(12).index_add(0, note.long() % 12, loudness)
    return notes / notes.norm().clamp_min(1e-9)


def estimate_tempo(wave: Tensor) -> str:
    """The tempo that is strongest in the onset envelope, the growth of the log-spectrum."""
    hop = 160
    magnitude, _ = spectrum(wave, 1024, hop)
    log_magnitude = (magnitude + 0.01).log()
    onsets = F.relu(log_magnitude.diff(dim=1)).mean(0)  # (T,)
    onsets = onsets - onsets.mean()
    seconds = torch.arange(len(onsets)) * hop / RATE
    strength = {}
    for name, beats in TEMPI.items():
        radians_per_second = -2 * math.pi * beats / 60
        phase = radians_per_second * seconds
        component = torch.polar(onsets, phase).sum()
        strength[name] = component.abs().item()
    return max(strength, key=strength.get)


BANDS = (100, 350, 700, 1100, 1600, 2200, 3000, 4000)  # edges, Hz


def timbre_features(wave: Tensor) -> Tensor:
    """(11,): log-energy of seven bands relative to their mean, quantiles of the loudness change in 100 ms."""
    magnitude, hz = spectrum(wave, 1024, 160)
    powers = []
    for low, high in itertools.pairwise(BANDS):
        in_band = (hz >= low) & (hz < high)
        powers.append(magnitude[in_band].square().mean(0))
    power = torch.stack(powers)  # (7, T)
    floor = 1e-6 * power.mean()
    bands = (power.mean(1) + floor).log()
    bands = bands - bands.mean()
    total = power.sum(0)
    smooth = F.avg_pool1d(total[None], 8, 2)[0]  # 50 a second
    floor = 0.03 * total.mean().sqrt()
    loudness = smooth.sqrt() + floor
    change = (loudness[5:] / loudness[:-5]).log()
    shares = torch.tensor([0.1, 0.3, 0.5, 0.9])
    quantiles = 4 * change.quantile(shares)
    return torch.cat([bands, quantiles])


def spectrum(wave: Tensor, n_fft: int, hop: int) -> tuple[Tensor, Tensor]:
    """Magnitudes (n_fft / 2 + 1, T) of a wave at 16 kHz, and the frequencies of the rows, Hz."""
    hann = audio.hann_window(n_fft)
    stft = torch.stft(wave, n_fft, hop, window=hann, pad_mode="constant", return_complex=True)
    hz = torch.arange(n_fft // 2 + 1) * RATE / n_fft
    return stft.abs(), hz
