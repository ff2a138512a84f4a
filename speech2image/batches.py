"""Batches of both stages, in which everything random is drawn; and the check that stage 1 is good enough.

B clips of N samples at 16 kHz. t (B,) and frames (B,) are always among them: `data.Batches`.
"""

import collections

import numpy as np
import torch
from torch import Tensor

import data
import metric
from config import Config, UserError
from corpora import shards
from data import Batches
from speech2image.codes import read_codes
from speech2image.data import HOP, SpokenImageCorpus, speech_embeddings_file
from speech2image.speech import augment, draw_spans, normalize_waveform


class AlignBatches(Batches):
    """Waves beside the image embeddings of their pictures.

    wave (B, N): of mean 0 and deviation 1; 0 where wave_mask (B, N) is False
    hidden (B, 2, K, 2): see `speech.spec_augment`
    image (B, D)
    label (B,): pictures of the same one are equally right

    Clips of all lengths are mixed, so that a description cannot be told from others by its length.
    """

    def __init__(self, config: Config, corpus: SpokenImageCorpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.lengths = np.ones_like(self.lengths)

    def validation(self) -> list[dict[str, Tensor]]:
        """Ranks share out whole batches, as large as training's of all ranks.

        So a clip has the same negatives for any number of ranks.
        """
        clips = self.corpus.clips(self.config.eval.split)
        size = self.config.train.batch_size * self.world
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
            wave = augment(wave, a.crop_sec, a.gain_db, a.noise_prob, a.min_snr_db, rng)
            hidden = draw_spans(a.hidden_spans, a.hidden_share, rng)
        return {
            "wave": normalize_waveform(wave),
            "hidden": hidden,
            "image": self.corpus.image_embedding(clip),
            "label": self.corpus.label_number(clip),
            "frames": clip.frames,
            "t": 0.0,
        }

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = stack(rows, ("t", "frames", "label"), ("hidden", "image"))
        waves = [row["wave"] for row in rows]
        samples = self.config.data.pad_multiple * HOP
        batch["wave"], batch["wave_mask"] = data.pad(waves, samples)
        return batch


class ImageBatches(AlignBatches):
    """Codes of pictures, and stage 1's embedding of their descriptions.

    x (B, N): the codes
    u, other (B, N): for `MaskAndReplaceDiffusion.q_sample`
    t (B,): uniform in [0, 1)
    embedding (B, D): of the speech; dropped (B,): rows that do without it
    new_update (): in training, whether this is the first micro-batch of its step

    A description is trained on with any training picture of its label, all languages equally often.
    """

    def __init__(self, config: Config, corpus: SpokenImageCorpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        check_stage1(corpus)
        self.codes, _ = read_codes(corpus)
        path = speech_embeddings_file(corpus)
        self.embeddings = shards.open_features(path, shards.PREPARE_HINT)
        by_label = collections.defaultdict(set)
        for clip in corpus.clips("train"):
            label = corpus.label_number(clip)
            by_label[label].add(corpus.picture_number(clip))
        # the numbers of the training pictures of each label
        self.pictures_by_label = {label: sorted(numbers) for label, numbers in by_label.items()}

    def train(self, step: int, micro: int = 0) -> dict[str, Tensor]:
        batch = super().train(step, micro)
        batch["new_update"] = torch.tensor(micro == 0)
        return batch

    validation = Batches.validation  # single clips are shared out, their times spread evenly

    def row(self, clip: shards.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it.

        t: given, as for validation, the clip keeps its own picture and its embedding.
        """
        dropped = False
        number = self.corpus.picture_number(clip)
        if t is None:
            dropped = rng.random() < self.config.flow.text_condition_dropout
            label = self.corpus.label_number(clip)
            number = rng.choice(self.pictures_by_label[label])
            t = rng.random()
        x = self.codes[number]
        u = rng.random(len(x), dtype=np.float32)
        other = rng.integers(self.config.codes.kept, size=len(x))
        return {
            "x": x,
            "u": torch.from_numpy(u),
            "other": torch.from_numpy(other),
            "t": t,
            "dropped": dropped,
            "frames": clip.frames,
            "embedding": self.embeddings(clip.number)[0].float(),
        }

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        return stack(rows, ("t", "frames", "dropped"), ("x", "u", "other", "embedding"))


def stack(rows: list[dict], numbers: tuple[str, ...], tensors: tuple[str, ...]) -> dict[str, Tensor]:
    """Rows as a batch: (B,) of each key of `numbers`, (B, ...) of each of `tensors`."""
    batch = {}
    for key in numbers:
        batch[key] = torch.tensor([row[key] for row in rows])
    for key in tensors:
        batch[key] = torch.stack([row[key] for row in rows])
    return batch


def check_stage1(corpus: SpokenImageCorpus) -> None:
    """raises UserError if stage 1 did not learn to find the pictures validated on.

    What it cannot tell apart, stage 2 cannot either.
    """
    c = corpus.config.codes
    path = speech_embeddings_file(corpus)
    speech_of = shards.open_features(path, shards.PREPARE_HINT)
    numbers = []
    labels = []
    speech = []
    for clip in corpus.clips(corpus.config.eval.split):
        numbers.append(corpus.picture_number(clip))
        labels.append(corpus.label_number(clip))
        speech.append(speech_of(clip.number))
    labels = np.array(labels)
    gallery, first = np.unique(numbers, return_index=True)
    pictures = [corpus.image_embedding_by_number(n) for n in gallery]
    similarity = torch.cat(speech).float() @ torch.cat(pictures).T
    gallery_labels = labels[first]
    right = labels[:, None] == gallery_labels
    recall = metric.recall_at_k(similarity.numpy(), right, 1)
    if recall < c.require_r1:
        percent = 100 * recall
        found = f"it finds {percent:.1f} % of the pictures (R@1)"
        needed = f"less than require_r1 {c.require_r1}"
        raise UserError(f"{c.stage1}: {found}, {needed}; train it longer")
