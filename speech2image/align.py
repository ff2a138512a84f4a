"""System `speech_align`, stage 1: speech and pictures in one embedding space, and what its training needs.

An embedding (D,) has length 1: the dot product of two is their cosine similarity. Source: SpeechCLIP (arXiv
2210.00705), as Speak the Art (arXiv 2601.00827) has it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from base import Prompt
from config import Config, Sample, UserError, from_checkpoint
from corpora import shards
from device import preparing_device
from model import zero_init
from speech2image import corpora, retrieval, vision
from speech2image.batches import AlignBatches
from speech2image.config import SpeechAlignConfig
from speech2image.data import (
    HOP,
    RATE,
    SpokenImageCorpus,
    corpus_format,
    find_checkpoint,
    image_embeddings_file,
    image_encoder_file,
    save_tensors,
)
from speech2image.speech import HubertEncoder, MelEncoder, info_nce, normalize_waveform
from speech2image.stage import PictureOutput, Stage
from tracking import checkpoint


class SpeechAlign(Stage):
    """`forward` returns the contrastive loss, `sample` the training pictures nearest to what is said."""

    config_class = SpeechAlignConfig
    batches_class = AlignBatches
    varying = ("wave", "wave_mask")
    scores = retrieval.SCORES

    @staticmethod
    def fetch(config: Config) -> None:
        """HuBERT and CLIP."""
        if config.align.speech != "scratch":
            HubertEncoder(config.align.speech)
        if config.align.image != "scratch":
            vision.ClipImageEncoder(config.align.image)

    @staticmethod
    def prepare(config: Config) -> None:
        """Make what is missing: the packed corpus, the image embeddings of its pictures."""
        if not is_prepared(config):
            prepare_pictures(config)

    def __init__(self, config: Config):
        super().__init__(config)
        m = config.model
        a = config.align
        if a.speech == "scratch":
            self.front = MelEncoder(m.width)
        else:
            self.front = HubertEncoder(a.speech)
        width = self.front.width
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, m.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, m.layers, enable_nested_tensor=False)
        # Zero-initialised, so all similarities are 0 and the loss starts at log B
        image_width = vision.image_encoder_width(a.image)
        self.proj = zero_init(nn.Linear(width, image_width))
        log_scale = torch.tensor(-math.log(a.temperature))
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """returns: loss, contrast_loss, of the clips of all ranks; temperature; scalars."""
        speech = self.encode(batch["wave"], batch["wave_mask"], batch["hidden"])
        image = batch["image"]
        label = batch["label"]
        # Negatives from all ranks, but each validation batch is compared with itself alone
        if torch.is_grad_enabled() and dist.is_initialized():
            speech = gather_ranks(speech)
            image = gather_ranks(image)
            label = gather_ranks(label)
        log_scale = self.log_scale.clamp(max=math.log(100))
        scale = log_scale.exp()
        loss = info_nce(speech, image, label, scale)
        temperature = (-self.log_scale).exp()
        return {"loss": loss, "contrast_loss": loss, "temperature": temperature.detach()}

    def encode(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> Tensor:
        """wave, wave_mask (B, N), hidden (B, 2, K, 2): see `speech.spec_augment` -> (B, D), float32."""
        h, mask = self.front(wave, wave_mask, hidden)  # (B, T, W), (B, T)
        cls = self.cls.expand(len(h), -1, -1)
        cls = cls.to(h.dtype)
        h = torch.cat([cls, h], 1)
        mask = F.pad(mask, (1, 0), value=True)
        h = self.encoder(h, src_key_padding_mask=~mask)
        cls = h[:, 0]
        embedding = self.proj(cls).float()
        # Of length 1; 0 as long as proj is 0
        energy = embedding.square().sum(-1, keepdim=True)
        return embedding * (energy + 1e-6).rsqrt()

    @torch.inference_mode()
    def embed_speech(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (N,) -> (B, D), on the CPU."""
        device = self.proj.weight.device
        waves = [normalize_waveform(wave) for wave in waves]
        multiple = self.config.data.pad_multiple * HOP
        wave, mask = data.pad(waves, multiple)
        wave = wave.to(device)
        mask = mask.to(device)
        hidden = torch.zeros(len(waves), 2, 0, 2, device=device)
        return self.encode(wave, mask, hidden).cpu()

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[PictureOutput]:
        """The nearest training pictures."""
        waves = [prompt.speech for prompt in prompts]
        outputs = []
        embeddings = self.embed_speech(waves)
        for wave, embedding in zip(waves, embeddings):
            found = self.corpus.nearest_pictures(embedding)
            outputs.append(PictureOutput(wave, RATE, found[0], found[1:], embedding))
        return outputs

    def reference(self, corpus: SpokenImageCorpus, clip: shards.Clip) -> PictureOutput:
        """The clip's own picture, as if its speech had found it."""
        embedding = corpus.image_embedding(clip)
        picture = corpus.read_picture(corpus.picture_number(clip))
        nearest = corpus.nearest_pictures(embedding)
        return PictureOutput(corpus.wave(clip), RATE, picture, nearest, embedding)


def gather_ranks(rows: Tensor) -> Tensor:
    """(B, ...) of each rank -> (B of all ranks, ...), with gradients."""
    gathered = dist.nn.functional.all_gather(rows)
    return torch.cat(gathered)


def load_stage1(path: str, device: torch.device) -> SpeechAlign:
    """A trained stage 1, frozen, with its EMA weights; path: a checkpoint, or a run, for its newest one."""
    try:
        state = checkpoint.load_checkpoint(find_checkpoint(Path(path)))
    except UserError as e:
        hint = "train that first, and name its out_dir"
        raise UserError(f"{path}: holds no checkpoint of system speech_align; {hint}") from e
    config = from_checkpoint(SpeechAlignConfig, state["config"], path)
    network = SpeechAlign(config)
    checkpoint.load_weights(network, {**state["model"], **state["ema"]}, path)
    return network.to(device).eval().requires_grad_(False)


# What training needs, and where it is kept


def is_prepared(config: Config) -> bool:
    """Whether stage 1 has its files. No, where the recordings are: they may have changed since packing."""
    d = config.data
    root = Path(d.data_dir)
    folder = shards.packed_dir(config, corpus_format(config))
    if d.corpus != "shapes" and root.exists() and folder != root:
        return False
    if not (folder / "index.json").exists():
        return False
    corpus = SpokenImageCorpus(config)
    return image_embeddings_file(corpus).exists()


def prepare_pictures(config: Config) -> None:
    """Pack the speech, train the image encoder where align.image is scratch, embed the pictures."""
    corpora.pack_spoken_pictures(config)
    corpus = SpokenImageCorpus(config)
    device = preparing_device(config.device)
    path = image_encoder_file(corpus)
    image = config.align.image
    if image == "scratch" and not path.exists():
        save_tensors(path, vision.train_image_encoder(corpus).state_dict())
    image_encoder = vision.load_image_encoder(corpus).to(device)

    def encode(numbers: list[int]) -> np.ndarray:
        size = image_encoder.module.size
        pictures = [corpus.read_picture(n, size) for n in numbers]
        pictures = torch.stack(pictures).to(device)
        embeddings = image_encoder(pictures).float().cpu()  # (n, D)
        return embeddings.numpy()[:, None]

    path = image_embeddings_file(corpus)
    lengths = [1] * len(corpus.picture_paths)
    shards.cache_features(path, lengths, None, encode, 32, f"pictures by {image}")
