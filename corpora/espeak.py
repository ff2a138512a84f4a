"""espeak-ng by ctypes: how a text is spoken in one of its many voices, and its phonemes.

The wheel `espeakng-loader` carries the library and its voices (GPL-3.0, used as a library of its own). A
voice is a language, maybe with a variant: en-us, en-us+m3. The library keeps one global voice: all calls
take turns. Functions and constants are those of its speak_lib.h.
"""

import ctypes
import functools
import os
import threading
from pathlib import Path

import numpy as np
import torch

from audio import resample
from config import UserError

RATE = 1  # of its parameters
PITCH = 3
RANGE = 4
UTF8 = 1
SYNCHRONOUS = 2
DONT_EXIT = 0x8000  # where it cannot start, but return
LONGEST_PATH = 120  # of its voices' folder, bytes: its buffers have 160, with a voice's name
LOCK = threading.Lock()


class VoiceError(UserError):
    """A voice that cannot speak at all: no fault of the sentence, so the next one would fail as well."""


def speak(
    text: str, sample_rate: int, voice: str = "en-us", rate: int = 160, pitch: int = 50, pitch_range: int = 50
) -> torch.Tensor:
    """Speak `text`: a wave (N,) in about 4 ms a sentence, its length a few samples different each time.

    rate: words a minute. pitch, pitch_range: 0 to 100.
    raises VoiceError for a voice that espeak-ng does not have.
    """
    with LOCK:
        library, native_rate, chunks = load_library()
        chunks.clear()
        library.espeak_SetParameter(RATE, rate, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        library.espeak_SetParameter(RANGE, pitch_range, 0)
        choose_voice(voice)
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        library.espeak_Synth(data, size, 0, 0, 0, UTF8, None, None)
        pcm = np.frombuffer(b"".join(chunks), np.int16)
    wave = torch.from_numpy(pcm / np.float32(32768))
    return resample(wave, native_rate, sample_rate)


@functools.lru_cache(maxsize=100_000)
def phonemes(text: str, language: str = "en-us") -> str:
    """The phonemes of a text in espeak-ng's ASCII notation: "A boat." -> "a#b'oUt.".

    Clauses are joined by a comma; the mark at the end stays.
    raises VoiceError for a language that espeak-ng does not have.
    """
    with LOCK:
        library, _, _ = load_library()
        choose_voice(language)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest = ctypes.c_char_p(text.encode())
        ascii_notation = 0
        clauses = []
        while rest.value:  # each call reads a clause, and moves `rest` behind it
            clause = library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, ascii_notation)
            clauses.append(clause.decode())
    joined = ", ".join(filter(None, clauses))
    mark = text.rstrip()[-1:]
    return joined + mark if mark in (".", "?", "!") else joined


def check_voice(voice: str) -> None:
    """raises VoiceError for a voice that espeak-ng does not have."""
    with LOCK:
        choose_voice(voice)


def choose_voice(voice: str) -> None:
    """Make `voice` the one that speaks, under the lock.

    espeak-ng refuses an unknown language, but silently leaves out an unknown variant.
    """
    language, plus, variant = voice.partition("+")
    variants = voice_variants()
    if plus and variant not in variants:
        raise VoiceError(f"espeak-ng has no variant {variant!r} as in {voice!r}: try m1 to m8, f1 to f5")
    library, _, _ = load_library()
    is_variant = language.removeprefix("!v/") in variants
    if is_variant or library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise VoiceError(f"espeak-ng has no voice {voice!r}: a language and maybe a variant, as en-us+m3")


@functools.cache
def voice_variants() -> set[str]:
    import espeakng_loader

    folder = Path(espeakng_loader.get_data_path(), "voices", "!v")
    return {path.name for path in folder.iterdir()}


@functools.cache
def load_library() -> tuple[ctypes.CDLL, int, list[bytes]]:
    """The library, its rate in Hz, and the list that its callback appends PCM to."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks = []
    path = short_path(espeakng_loader.get_data_path())
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(path), DONT_EXIT)
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


@functools.cache
def short_path(folder: str) -> str:
    """A name of a folder with voices that espeak-ng can hold: of a longer one, that of its open descriptor.

    raises VoiceError where there is none.
    """
    if len(os.fsencode(folder)) <= LONGEST_PATH:
        return folder
    if not Path("/proc/self/fd").is_dir():
        raise VoiceError(
            f"{folder}: espeak-ng reads no path of more than {LONGEST_PATH} characters; "
            "install it in a folder with a shorter one"
        )
    descriptor = os.open(folder, os.O_RDONLY)  # stays open: the voices are read when they are asked for
    return f"/proc/self/fd/{descriptor}"
