"""Speech to picture without a text in between: both in one embedding space, then pictures generated from it.

Stage 1, system `speech_align`; stage 2, system `speech_image`; then corpus, batches, and the files they need.
A wave is (N,) at 16 kHz, a picture (3, H, W) in [0, 1], an embedding (D,) of length 1; x (B, N) are codes, 0
to K - 1, of a square grid, row by row. Sources: Speak the Art (arXiv 2601.00827), whose stage 1 is SpeechCLIP
(arXiv 2210.00705) and whose stage 2 is VQ-Diffusion for ImageNet (arXiv 2111.14822), see flow.py.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imsave
from torch import Tensor

import data
from base import System
from config import Config, UserError
from corpora import pictures, shards
from pretrained import asr, frozen
from speech2image import retrieval
from tracking.checkpoint import newest_checkpoint

# Pictures, and files of tensors


def resize_and_crop(pictures: Tensor, size: int) -> Tensor:
    """Pictures (..., 3, H, W), the shorter side scaled to `size`, then cropped to the middle, size x size."""
    *batch, channels, height, width = pictures.shape
    shorter = min(height, width)
    if shorter != size:
        flat = pictures.reshape(-1, channels, height, width)
        height = max(size, round(height * size / shorter))
        width = max(size, round(width * size / shorter))
        shape = (height, width)
        flat = F.interpolate(flat, shape, mode="bicubic", antialias=True)
        flat = flat.clamp(0, 1)
        pictures = flat.view(*batch, channels, height, width)
    top = (height - size) // 2
    left = (width - size) // 2
    rows = slice(top, top + size)
    columns = slice(left, left + size)
    return pictures[..., rows, columns]


@functools.lru_cache(maxsize=2000)
def read_picture(path: str) -> Tensor:
    """(3, H, W) in [0, 1]. raises UserError for what is no picture."""
    return pictures.read_picture(path)[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that prepare wrote."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(
            f"{path}: missing, or damaged and to be deleted; run `python system.py prepare --config ...`"
        ) from e


def load_weights_frozen(network: nn.Module, path: Path) -> frozen.Frozen:
    """The network with the weights of a file, frozen."""
    network.load_state_dict(read_tensors(path))
    return frozen.Frozen(network)


RATE = asr.RATE  # Hz
HOP = asr.HOP  # samples a frame, 50 a second


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

    corpus_class: type["SpokenImageCorpus"]
    makes = ("png",)
    listens = True
    longest = 0
    frame_rate = RATE / HOP

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @functools.cached_property
    def corpus(self) -> "SpokenImageCorpus":
        """Whose training pictures are searched: opened on first use, not registered as a submodule."""
        return SpokenImageCorpus(self.config)

    def features(
        self, output: PictureOutput, corpus: "SpokenImageCorpus", clip: shards.Clip
    ) -> dict[str, np.ndarray]:
        """For retrieval: embeddings of speech and image (D,), numbers of picture and label, the group."""
        return {
            "speech": output.embedding.numpy(),
            "image": corpus.embedding(clip).numpy(),
            "picture": np.array(corpus.number(clip)),
            "label": np.array(corpus.label(clip)),
            "group": np.array(clip.group),
        }

    def summarize(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """Retrieval among the pictures; see `retrieval.retrieval`."""
        if folder:
            queries = features.get("generated", features["speech"])
            retrieval.draw_embedding_space(queries, features["image"], folder / "summary.png")
        return retrieval.retrieval(features, "speech")


# Corpus and batches


class SpokenImageCorpus(data.ShardedCorpus):
    """Spoken descriptions of pictures; all languages are trained on equally often.

    The id of a clip is LABEL:PICTURE#NUMBER.
    """

    statistics = ()

    def __init__(self, config: Config):
        d = config.data
        longest = d.max_seconds * RATE / HOP
        super().__init__(config, corpus_format(config), longest)
        self.config = config
        clips = set()
        for split in shards.SPLITS:
            clips.update(self.clips(split))
        self.all_clips = sorted(clips, key=lambda clip: clip.number)
        train = self.clips("train")
        train = balance_languages(train, d.langs)
        self.splits = self.splits | {"train": train}
        self.labels = {}  # by path of the picture
        for clip in self.all_clips:
            label, path = parse_clip_id(clip)
            self.labels[path] = label or path
        self.names = list(self.labels)
        self.numbers = number_values(self.names)
        self.kinds = number_values(self.labels.values())

    def number(self, clip: shards.Clip) -> int:
        """Of its picture, in `names`."""
        _, path = parse_clip_id(clip)
        return self.numbers[path]

    def label(self, clip: shards.Clip) -> int:
        """The number of its label: the same for pictures that are equally right."""
        _, path = parse_clip_id(clip)
        return self.kinds[self.labels[path]]

    def gallery(self, split: str) -> list[int]:
        """The numbers of a split's pictures."""
        clips = self.clips(split)
        numbers = {self.number(clip) for clip in clips}
        return sorted(numbers)

    def picture(self, number: int, size: int = 0) -> Tensor:
        """(3, size, size), see `flow.resized`; size 0: (3, H, W), as it is."""
        folder = self.config.data.data_dir
        path = Path(folder, self.names[number])
        picture = read_picture(str(path))
        if size:
            return resize_and_crop(picture, size)
        return picture

    def embedding(self, clip: shards.Clip) -> Tensor:
        """The image embedding (D,) of its picture."""
        number = self.number(clip)
        return self.embeddings(number)[0]

    @functools.cached_property
    def embeddings(self) -> Callable[[int], Tensor]:
        """From the number of a picture to its image embedding (1, D)."""
        path = image_embeddings_file(self)
        return shards.open_features(path, shards.PREPARE_HINT)

    @functools.cached_property
    def trained(self) -> Tensor:
        """The image embeddings (n, D) of the training pictures."""
        gallery = self.gallery("train")
        rows = [self.embeddings(n) for n in gallery]
        return torch.cat(rows)

    def nearest(self, embedding: Tensor, count: int = 5) -> Tensor:
        """The training pictures nearest to an embedding (D,), best first: (count, 3, S, S).

        S: the shorter side of the best one.
        """
        embedding = embedding.float().cpu()
        similarity = self.trained @ embedding
        count = min(count, len(similarity))
        best = similarity.topk(count).indices
        gallery = self.gallery("train")
        numbers = [gallery[n] for n in best.tolist()]
        best_picture = self.picture(numbers[0])
        size = min(best_picture.shape[1:])
        pictures = [self.picture(n, size) for n in numbers]
        return torch.stack(pictures)


def number_values(values: Iterable[str]) -> dict[str, int]:
    """The distinct values, numbered in the order in which they come first."""
    distinct = dict.fromkeys(values)
    return {value: n for n, value in enumerate(distinct)}


def balance_languages(clips: list[shards.Clip], languages: Sequence[str]) -> list[shards.Clip]:
    """As many clips of each language, one language after the other: those of the rarer ones are repeated."""
    by_language = []
    for language in languages:
        spoken = [clip for clip in clips if clip.group.startswith(language)]
        by_language.append(spoken)
    most = max(map(len, by_language), default=0)
    balanced = []
    for spoken in by_language:
        repeated = itertools.cycle(spoken)
        balanced += itertools.islice(repeated, most)
    return balanced


def stack_numbers(rows: list[dict], keys: Sequence[str]) -> dict[str, Tensor]:
    """(B,) of each key."""
    batch = {}
    for key in keys:
        batch[key] = torch.tensor([row[key] for row in rows])
    return batch


def stack_tensors(rows: list[dict], keys: Sequence[str]) -> dict[str, Tensor]:
    """(B, ...) of each key."""
    batch = {}
    for key in keys:
        batch[key] = torch.stack([row[key] for row in rows])
    return batch


def corpus_format(config: Config) -> dict:
    """What is packed, and how."""
    d = config.data
    packed = {"sample_rate": RATE, "hop": HOP, "corpus": d.corpus, "langs": list(d.langs)}
    if d.corpus == "shapes":
        packed["sentences"] = d.sentences
    return packed


def parse_clip_id(clip: shards.Clip) -> tuple[str, str]:
    """Its label, which may be "", and its picture's path below data_dir."""
    picture = clip.id.rpartition("#")[0]
    label, _, path = picture.partition(":")
    return label, path


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run's folder, or the file itself."""
    return newest_checkpoint(str(path)) or path


def cache_path(corpus: SpokenImageCorpus, name: str, content: list) -> Path:
    """A file beside the corpus, named by all that its content depends on."""
    stem, _, suffix = name.partition(".")
    labels = list(corpus.labels.items())
    digest = shards.digest([labels, *content])
    name = f"{stem}_{digest[:8]}.{suffix}"
    return corpus.folder / name


def image_embeddings_file(corpus: SpokenImageCorpus) -> Path:
    """The image embeddings of the pictures; of a scratch encoder, by the texts too that it is trained on."""
    image = corpus.config.align.image
    texts = []
    if image == "scratch":
        texts = [clip.text for clip in corpus.clips("train")]
    return cache_path(corpus, "pictures.npy", [image, texts])


def image_encoder_file(corpus: SpokenImageCorpus) -> Path:
    return image_embeddings_file(corpus).with_suffix(".safetensors")


def speech_embeddings_file(corpus: SpokenImageCorpus) -> Path:
    """Stage 1's embeddings of all speech, by its weights and the image encoder it was trained against."""
    c = corpus.config
    path = Path(c.codes.stage1)
    try:
        checkpoint = find_checkpoint(path).read_bytes()
    except OSError as e:
        hint = "no checkpoint of system speech_align there; train that first"
        raise UserError(f"codes.stage1 {path}: {hint}") from e
    weights = hashlib.sha256(checkpoint).hexdigest()
    clips = [clip.id for clip in corpus.all_clips]
    return cache_path(corpus, "speech.npy", [weights, c.align.image, clips])


def classifier_file(corpus: SpokenImageCorpus) -> Path:
    return cache_path(corpus, "judge.safetensors", [])
