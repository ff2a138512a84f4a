"""What both stages have in common: what they return for a spoken prompt, and the figures of retrieval.

A wave is (N,) at 16 kHz, a picture (3, H, W) in [0, 1], an embedding (D,) of length 1.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave
from torch import Tensor

from base import System
from config import Config
from corpora import shards
from speech2image import retrieval
from speech2image.data import HOP, RATE, SpokenImageCorpus


@dataclass
class PictureOutput:
    """What was found or generated for a spoken prompt."""

    wave: Tensor  # (N,), the prompt
    sample_rate: int
    picture: Tensor  # (3, H, W)
    nearest: Tensor  # (K, 3, S, S), the training pictures nearest to the prompt
    embedding: Tensor  # (D,), of the prompt

    def draw(self, stem: Path) -> dict[str, str]:
        """Write the picture, and the nearest ones in a row; returns file names by kind."""
        row = torch.cat(list(self.nearest), -1)
        names = {"picture": f"{stem.name}.png", "nearest": f"{stem.name}.nearest.png"}
        for kind, picture in (("picture", self.picture), ("nearest", row)):
            pixels = picture.float().cpu().clamp(0, 1)
            pixels = pixels.permute(1, 2, 0).contiguous()
            imsave(stem.with_name(names[kind]), pixels.numpy())
        return names


class Stage(System):
    """What both systems have in common."""

    corpus_class = SpokenImageCorpus
    output_kinds = ("png",)
    listens = True
    max_characters = 0
    frame_rate = RATE / HOP

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @functools.cached_property
    def corpus(self) -> SpokenImageCorpus:
        """Whose training pictures are searched: opened on first use, not registered as a submodule."""
        return SpokenImageCorpus(self.config)

    def features(
        self, output: PictureOutput, corpus: SpokenImageCorpus, clip: shards.Clip
    ) -> dict[str, np.ndarray]:
        """For retrieval: embeddings of speech and image (D,), numbers of picture and label, the group."""
        return {
            "speech": output.embedding.numpy(),
            "image": corpus.image_embedding(clip).numpy(),
            "picture": np.array(corpus.picture_number(clip)),
            "label": np.array(corpus.label_number(clip)),
            "group": np.array(clip.group),
        }

    def summarize(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """Retrieval among the pictures; see `retrieval.retrieval`."""
        if folder:
            queries = features.get("generated", features["speech"])
            retrieval.draw_embedding_space(queries, features["image"], folder / "summary.png")
        return retrieval.retrieval(features, "speech")
