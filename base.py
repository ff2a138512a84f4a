"""The contract: what the loop, the evaluator and the sampler ask of a system, and all they know about one.

A system is a network with its losses and its sampling, and beside it the config, the corpus and the batches
that it is used with. tts.py has the one that the root is about; every other is a folder. system.py has the
table of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from config import Config, Mel, Sample, UserError
from corpora.shards import Clip
from metric import Score
from tracking import plot


@dataclass
class Prompt:
    """What to generate."""

    text: str
    seconds: float = 0.0  # length of the output; 0 = predicted
    seed: int = 0  # of the initial noise
    speech: Tensor | None = None  # (N,) at 16 kHz, for a system that is prompted with speech


class Output(Protocol):
    """What a system made of a prompt: a wave (N,) at `sample_rate` Hz, on the CPU, and pictures of it."""

    wave: Tensor
    sample_rate: int

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`.

        returns: their file names by kind, {"picture": "000.png", "attention": ...}; a picture always,
        and the report also shows attention and confidence.
        """


@dataclass
class MelOutput:
    """Generated speech, on the CPU; or a recording after the vocoder."""

    symbols: str  # whose bytes were attended to: the text or its phonemes
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
            plot.save_attention_png(self.attention.numpy(), self.symbols, picture, seconds)
        return names


class Corpus(Protocol):
    """The clips of a packed corpus, as a system reads them."""

    folder: Path  # where it is packed; reference scores measured on it are kept there
    fingerprint: str  # digest of what was packed and how
    statistics: tuple[float, ...]  # what the network is built with beside the config, as (mean, std), or ()

    def clips(self, split: str) -> list[Clip]:
        """Those of train | val | test, always in the same order."""

    def recording(self, clip: Clip) -> tuple[Tensor, int] | None:
        """The sound as recorded, a wave (N,), and its rate in Hz, equal for all clips; None without one."""


class Batches(Protocol):
    """Dicts of CPU tensors, in which all that is random is drawn; t (B,) and frames (B,) are in each."""

    def train(self, step: int, micro: int = 0) -> dict[str, Tensor]:
        """This rank's part of a micro-batch: a function of (config.seed, step, micro, rank)."""

    def validation(self) -> list[dict[str, Tensor]]:
        """This rank's share of the clips validated on, the same every time."""


class System(nn.Module):
    """A network that trains and samples. What a subclass does not say holds as it stands here.

    A parameter that is not to be trained has requires_grad False from the start; it is in no checkpoint.
    """

    config_class = Config
    corpus_class: type[Corpus]  # (config) -> Corpus; raises UserError where it is missing or does not fit
    batches_class: type[Batches]  # (config, corpus, tokenizer, rank, world) -> Batches

    readers: dict[str, Callable] = {}  # corpora that `python data.py` packs for it; see corpora/prepare.py
    output_kinds = ("wav",)  # file endings of its outputs, the main one first: wav, png
    speaks = False  # its outputs are speech, whose words a recogniser counts
    listens = False  # its prompts are speech, not texts
    max_characters = 5000  # characters that it takes in one go
    varying: tuple[str, ...] = ()  # tensors of a batch whose axis 1 is as long as its longest clip or text
    scores: dict[str, Score] = {}  # what `score` and `summarize` may return, in the order of the report

    config: Config
    tokenizer = None  # handed on to its batches
    frame_rate: float  # Hz: frames of a clip or a batch in a second

    @staticmethod
    def commands() -> None:
        """Its own command line, where it has one."""

    @staticmethod
    def fetch(config: Config) -> None:
        """Load each published network that training or an evaluation will load, and let it go.

        So what cannot be had is known before anything is made, and no hub is asked by all ranks at once.
        """

    @staticmethod
    def prepare(config: Config) -> None:
        """Make whatever training needs and does not find: a packed corpus, cached features."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A deterministic function of the batch and the weights.

        returns: loss and other scalars, each a mean over the batch, to log; flow_loss_per_clip (B,), if
        given, is binned by t.
        """

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Output]:
        """One output a prompt, made as one batch; raises UserError for a prompt that it cannot make."""

    def reference(self, corpus: Corpus, clip: Clip) -> Output:
        """The recorded clip through all but the generative network: what the best one could make."""

    def score(self, output: Output, corpus: Corpus, clip: Clip) -> dict[str, float]:
        """An output beside the clip whose text it was made from: distances, and matches that are 0 or 1.

        returns: by keys of `scores`.
        """
        return {}

    def features(self, output: Output, corpus: Corpus, clip: Clip) -> dict[str, np.ndarray]:
        """Arrays from which `summarize` computes figures of a whole set; {} where there are none."""
        return {}

    def summarize(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """Figures of a set, from the stacked `features` of its outputs; pictures of it go into `folder`.

        returns: by keys of `scores`.
        """
        return {}

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon trains; AdamW has the others. Either may have none."""
        return []

    def load_adapter(self, name: str) -> None:
        """Put a published LoRA, a hub id or a folder, on top of the weights."""
        raise UserError(f"--lora {name}: system {self.config.system} takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what other software loads, with the facts about it."""
        raise UserError(
            f"{folder}: no other software loads system {self.config.system}; its checkpoint is all there is"
        )
