"""Speech recognition: Whisper or PocketSphinx, neither of them trained on the voice that it judges.

`load` returns one of them. A wave is (N,) float32. openai-whisper takes a second to import, with numba: what
needs it waits for it.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import audio
from config import UserError

RATE = 16_000  # Hz: Whisper, PocketSphinx and HuBERT take it
HOP = 320  # samples a frame of HuBERT: 50 a second


def load(name: str, device: torch.device, quiet: bool = False) -> "Recogniser | PocketSphinx | None":
    """A Whisper model by name ("base.en") or .pt file, or "pocketsphinx".

    A model that cannot be downloaded is replaced by tiny.en from the package index, or by None if that is
    missing too. One line says so, unless `quiet`. raises UserError as whisper_weights.load.
    """
    if name == "pocketsphinx":
        return PocketSphinx()
    if device.type == "mps":
        device = torch.device("cpu")  # Whisper has a sparse buffer, which Metal does not support
    from pretrained import whisper_weights

    model, source, why = whisper_weights.load_any(name, device, "eval.recogniser")
    if why and not quiet:
        print(f"recogniser: {why}", flush=True)
    return Recogniser(model, source) if model else None


class Recogniser:
    """A Whisper model, kept loaded: `transcribe` takes waves in batches, at temperature 0, in English."""

    def __init__(self, model: nn.Module, source: str):
        """model: a whisper.model.Whisper; source: its published name, or the .pt file of its weights."""
        self.model = model
        self.invented = 0  # texts so far that Whisper made up, and that are left out
        self.name = source
        weights = source
        if source.endswith(".pt"):
            self.name = Path(source).stem
            content = Path(source).read_bytes()
            weights = hashlib.sha256(content).hexdigest()
        # Everything that its texts depend on: caches of them are named by it
        device = model.device.type
        self.identity = [self.name, weights, device, version("openai-whisper")]

    def transcribe(self, waves: list[Tensor], sample_rate: int, batch_size: int = 16) -> list[str]:
        """waves: (N,) at `sample_rate` Hz; longer ones than 30 s are heard in pieces.

        returns the texts, not normalised; "" where nothing was said, or Whisper made it up.
        """
        from pretrained import whisper_weights

        cut = []
        for wave in waves:
            wave = audio.resample(wave, sample_rate, RATE)
            cut.append(whisper_weights.cut_at_pauses(wave))
        pieces = sum(cut, [])
        heard = []
        for start in range(0, len(pieces), batch_size):
            heard += whisper_weights.transcribe(self.model, pieces[start : start + batch_size])
        self.invented += heard.count(None)
        texts = []
        for parts in cut:
            texts.append(" ".join(filter(None, heard[: len(parts)])))
            heard = heard[len(parts) :]
        return texts


def normalize_transcript(text: str) -> str:
    """As whisper_weights.normalize_transcript."""
    from pretrained import whisper_weights

    return whisper_weights.normalize_transcript(text)


class PocketSphinx:
    """CMU's small recogniser with its wheel's English model: weak, but offline and of open vocabulary."""

    name = "pocketsphinx"
    invented = 0

    def __init__(self):
        try:
            import pocketsphinx  # an extra: pip install pocketsphinx
        except ImportError as e:
            message = "eval.recogniser pocketsphinx is not installed: pip install pocketsphinx"
            raise UserError(message) from e
        self.decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
        self.identity = [self.name, version("pocketsphinx")]

    def transcribe(self, waves: list[Tensor], sample_rate: int) -> list[str]:
        """As Recogniser.transcribe; each wave is scaled to the same peak."""
        texts = []
        for wave in waves:
            wave = audio.resample(wave, sample_rate, RATE)
            peak = wave.abs().max().clamp_min(1e-5)
            pcm = (wave / peak * 29000).short().numpy()
            self.decoder.start_utt()
            self.decoder.process_raw(pcm.tobytes(), full_utt=True)
            self.decoder.end_utt()
            hypothesis = self.decoder.hyp()
            texts.append(hypothesis.hypstr if hypothesis else "")
        return texts
