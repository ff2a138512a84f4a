"""TODO."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from base import Prompt
from config import Config, Sample, UserError, from_checkpoint
from corpora import shards
from data import Batches
from model import zero_init
from speech2image import corpora, retrieval, vision
from speech2image.config import SpeechAlignConfig
from speech2image.data import (
    HOP,
    RATE,
    PictureOutput,
    SpokenImageCorpus,
    Stage,
    corpus_format,
    find_checkpoint,
    image_embeddings_file,
    image_encoder_file,
    stack_numbers,
    stack_tensors,
)
from speech2image.speech import HubertEncoder, MelEncoder, augment, draw_spans, info_nce, normalize_waveform

# Stage 1: speech and pictures in one embedding space


class SpeechAlign(Stage):
    """`forward` returns the contrastive loss, `sample` the training pictures nearest to what is said."""

    config_class = SpeechAlignConfig
    corpus_class = SpokenImageCorpus
    scores = retrieval.SCORES

    @staticmethod
    def prepare(config: Config) -> None:
        prepare_align(config)

    def __init__(self, config: Config):
        super().__init__(config)
        m = config.model
        a = config.align
        if a.speech == "scratch":
            self.front = MelEncoder(m.width)
        else:
            self.front = HubertEncoder(a.speech)
        width = self.front.width
        cls = torch.randn(1, 1, width)
        self.cls = nn.Parameter(cls)
        layer = nn.TransformerEncoderLayer(
            width, m.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, m.layers, enable_nested_tensor=False)
        # Zero-initialised, so all similarities are 0 and the loss starts at log B
        image_width = vision.image_encoder_width(a.image)
        proj = nn.Linear(width, image_width)
        self.proj = zero_init(proj)
        log_scale = torch.tensor(-math.log(a.temperature))
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """returns: loss, contrast_loss, of the clips of all ranks; temperature; scalars."""
        speech = self.embed(batch["wave"], batch["wave_mask"], batch["hidden"])
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

    def embed(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> Tensor:
        """wave (B, N), wave_mask (B, N), hidden (B, 2, K, 2), see recogniser.hide -> (B, D), float32."""
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
    def listen(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (N,) -> (B, D), on the CPU."""
        device = self.proj.weight.device
        waves = [normalize_waveform(wave) for wave in waves]
        multiple = self.config.data.pad_multiple * HOP
        wave, mask = data.pad(waves, multiple)
        wave = wave.to(device)
        mask = mask.to(device)
        hidden = torch.zeros(len(waves), 2, 0, 2, device=device)
        return self.embed(wave, mask, hidden).cpu()

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[PictureOutput]:
        """The nearest training pictures."""
        waves = [prompt.speech for prompt in prompts]
        outputs = []
        embeddings = self.listen(waves)
        for wave, embedding in zip(waves, embeddings):
            found = self.corpus.nearest(embedding)
            picture = found[0]
            output = PictureOutput(wave, RATE, picture, found[1:], embedding)
            outputs.append(output)
        return outputs

    def reference(self, corpus: "SpokenImageCorpus", clip: shards.Clip) -> PictureOutput:
        """The clip's own picture, as if its speech had found it."""
        wave = corpus.wave(clip)
        embedding = corpus.embedding(clip)
        number = corpus.number(clip)
        picture = corpus.picture(number)
        nearest = corpus.nearest(embedding)
        return PictureOutput(wave, RATE, picture, nearest, embedding)


def gather_ranks(rows: Tensor) -> Tensor:
    """(B, ...) of each rank -> (B of all ranks, ...), with gradients."""
    gathered = dist.nn.functional.all_gather(rows)
    return torch.cat(gathered)


def load_align(path: str, device: torch.device) -> SpeechAlign:
    """A trained stage 1, frozen, with its EMA weights; path: a checkpoint, or a run, for its newest one."""
    try:
        state = torch.load(find_checkpoint(Path(path)), map_location="cpu", weights_only=True)
        config = from_checkpoint(SpeechAlignConfig, state["config"], path)
        network = SpeechAlign(config)
        network.load_state_dict({**state["model"], **state["ema"]})
    except UserError:
        raise
    except Exception as e:  # a damaged file raises almost anything
        hint = "train that first, and name its out_dir"
        raise UserError(f"{path}: holds no checkpoint of system speech_align; {hint}") from e
    network = network.to(device)
    return network.eval().requires_grad_(False)


class AlignBatches(Batches):
    """wave (B, N), standardised, 0 where wave_mask (B, N) is False; hidden (B, 2, K, 2), see recogniser.hide;
    image (B, D), label, frames, t (B,).

    Clips of all lengths are mixed, so that a description cannot be told from others by its length.
    """

    def __init__(self, config: Config, corpus: SpokenImageCorpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.lengths = np.ones_like(self.lengths)

    def validation(self) -> list[dict[str, Tensor]]:
        """Ranks share out whole batches, so a clip has the same negatives for any number of ranks."""
        clips = self.corpus.clips(self.config.eval.split)
        size = self.config.train.batch_size
        starts = range(0, len(clips), size)
        batches = []
        for start in starts[self.rank :: self.world]:
            chosen = clips[start : start + size]
            rows = [self.row(clip, None) for clip in chosen]
            batches.append(self.collate(rows))
        return batches

    def row(self, clip: shards.Clip, rng: np.random.Generator | None) -> dict:
        """A clip and what is drawn for it; without rng it is not augmented."""
        a = self.config.align
        wave = self.corpus.wave(clip)
        hidden = torch.zeros(2, a.hidden_spans, 2)
        if rng is not None:
            wave = augment(wave, a, rng)
            hidden = draw_spans(a.hidden_spans, a.hidden_share, rng)
        return {
            "wave": normalize_waveform(wave),
            "hidden": hidden,
            "image": self.corpus.embedding(clip),
            "label": self.corpus.label(clip),
            "frames": clip.frames,
            "t": 0.0,
        }

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = stack_numbers(rows, ("t", "frames", "label"))
        batch |= stack_tensors(rows, ("hidden", "image"))
        waves = [row["wave"] for row in rows]
        samples = self.config.data.pad_multiple * HOP
        batch["wave"], batch["wave_mask"] = data.pad(waves, samples)
        return batch


SpeechAlign.batches_class = AlignBatches


# What training needs, and where it is kept


def prepare_align(config: Config) -> None:
    """Make what training needs and does not find: the packed corpus, the image embeddings of its pictures."""
    if not is_prepared(config):
        prepare_pictures(config)


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
    use_cuda = torch.cuda.is_available() and config.device != "cpu"
    device = "cuda" if use_cuda else "cpu"
    path = image_encoder_file(corpus)
    image = config.align.image
    if image == "scratch" and not path.exists():
        tower = vision.train_image_encoder(corpus)
        with shards.atomic_write(path) as part:
            safetensors.torch.save_file(tower.state_dict(), part)
    tower = vision.load_image_encoder(corpus).to(device)

    def encode(numbers: list[int]) -> np.ndarray:
        size = tower.module.size
        pictures = [corpus.picture(n, size) for n in numbers]
        pictures = torch.stack(pictures).to(device)
        embeddings = tower(pictures).float().cpu()  # (n, D)
        return embeddings.numpy()[:, None]

    path = image_embeddings_file(corpus)
    lengths = [1] * len(corpus.names)
    shards.cache_features(path, lengths, None, encode, 32, f"pictures by {image}")
