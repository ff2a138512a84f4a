"""TODO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from config import Mel, Sample
from corpora import shards
from tracking import plot


@dataclass
class Prompt:
    """What to generate."""

    text: str
    seconds: float = 0.0  # length of the speech; 0 = predicted
    seed: int = 0  # of the initial noise
    speech: Tensor | None = None  # (N,) at 16 kHz, for a system that is prompted with speech


@dataclass
class MelOutput:
    """Generated speech, on the CPU; or a recording after the vocoder."""

    letters: str  # whose bytes were attended to: the text or its phonemes
    wave: Tensor  # (N,)
    sample_rate: int  # Hz
    log_mel: Tensor  # (T, M)
    mel: Mel
    attention: Tensor | None = None  # cross-attention of tokens to bytes (N, S); a recording has none

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`; returns {kind: file name}."""
        names = {"picture": f"{stem.name}.png"}
        picture = stem.with_name(names["picture"])
        plot.save_spectrogram_png(self.log_mel.numpy(), picture, self.mel)
        if self.attention is not None:
            names["attention"] = f"{stem.name}.attention.png"
            picture = stem.with_name(names["attention"])
            seconds = len(self.wave) / self.sample_rate
            plot.save_attention_png(self.attention.numpy(), self.letters, picture, seconds)
        return names


class Output(Protocol):
    """What a system made: a wave (N,) at `sample_rate` Hz, on the CPU, and pictures of it."""

    wave: torch.Tensor
    sample_rate: int

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`.

        returns: their names by kind, {"picture": "000.png", "attention": ...}; there is always a picture, and
        the report also shows attention and confidence.
        """


class Corpus(Protocol):
    """The clips of a packed corpus, as `system` reads them."""

    folder: Path  # where it is packed; floors measured on it are kept there
    plan: str  # digest of what was packed and how
    statistics: tuple[float, ...]  # what the network is built with beside the config, as (mean, std), or ()

    def clips(self, split: str) -> list[shards.Clip]:
        """Those of train | val | test, always in the same order."""

    def recording(self, clip: shards.Clip) -> tuple[torch.Tensor, int] | None:
        """The sound as recorded, a wave (N,), and its rate in Hz, equal for all clips; None without one."""


class Batches(Protocol):
    """Dicts of CPU tensors, in which all that is random is drawn; t (B,) and frames (B,) are in each."""

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        """This rank's part of a micro-batch: a function of (config.seed, step, micro, rank)."""

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """This rank's share of the clips validated on, the same every time."""


class System(Protocol):
    """What the loop, the evaluator and the sampler ask of a network (an nn.Module), and all they know of it.

    A parameter that is not to be trained has requires_grad False from the start; it is in no checkpoint.
    """

    tokenizer: Callable  # handed on to its batches
    makes: tuple[str, ...]  # the endings of what it makes: wav, png
    speaks: bool  # whether it makes speech, of which a recogniser tells how much is understood
    listens: bool  # whether its prompts are speech, not texts
    longest: int  # characters that it takes in one go
    frame_rate: float  # Hz: `frames` of a clip or batch in a second

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A deterministic function of the batch and the weights.

        returns: loss and other scalars to log, each a mean over the batch; flow_loss_per_clip (B,), if given,
        is binned by t.
        """

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Output]:
        """One of each prompt, made as one batch; raises UserError for a prompt that it cannot make."""

    def reference(self, corpus: Corpus, clip: shards.Clip) -> Output:
        """The recorded clip through all but the generative network: what the best network could make."""

    def score(self, made: Output, corpus: Corpus, clip: shards.Clip) -> dict[str, float]:
        """What was made beside the clip whose text it was made from: distances, and matches that are 0 or 1.

        returns: by keys in metric.SCORES.
        """

    def features(self, made: Output, corpus: Corpus, clip: shards.Clip) -> dict[str, np.ndarray]:
        """Arrays from which evaluator.figures computes figures of a whole set; None in a system without."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon trains; AdamW has the others. Either may have none."""

    def load_adapter(self, name: str) -> None:
        """Put a published LoRA, a hub id or folder, on top of the weights.

        raises UserError if that cannot be.
        """

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what other software loads, with facts about it; raises UserError where there is none such."""
