"""The corpus of both stages, the files that prepare keeps beside it, and pictures from disk.

A wave is (N,) at 16 kHz, a picture (3, H, W) in [0, 1], an embedding (D,) of length 1. The pictures of a
corpus, and their labels, are numbered in the order in which its clips first name them.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from config import Config, UserError
from corpora import pictures, shards
from pretrained import asr, frozen
from tracking.checkpoint import newest_checkpoint

RATE = asr.RATE  # Hz
HOP = asr.HOP  # samples a frame, 50 a second


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
        train = balance_languages(self.clips("train"), d.langs)
        self.splits = self.splits | {"train": train}
        self.labels = {}  # by path of the picture
        for clip in self.all_clips:
            label, path = parse_clip_id(clip)
            self.labels[path] = label or path
        self.picture_paths = list(self.labels)
        self.picture_numbers = number_values(self.picture_paths)
        self.label_numbers = number_values(self.labels.values())

    def picture_number(self, clip: shards.Clip) -> int:
        """Of its picture, in `picture_paths`."""
        _, path = parse_clip_id(clip)
        return self.picture_numbers[path]

    def label_number(self, clip: shards.Clip) -> int:
        """The number of its label: the same for pictures that are equally right."""
        _, path = parse_clip_id(clip)
        return self.label_numbers[self.labels[path]]

    def gallery(self, split: str) -> list[int]:
        """The numbers of a split's pictures."""
        clips = self.clips(split)
        numbers = {self.picture_number(clip) for clip in clips}
        return sorted(numbers)

    def read_picture(self, number: int, size: int = 0) -> Tensor:
        """(3, size, size), see `resize_and_crop`; size 0: (3, H, W), as it is."""
        folder = self.config.data.data_dir
        path = Path(folder, self.picture_paths[number])
        picture = read_picture(str(path))
        if size:
            return resize_and_crop(picture, size)
        return picture

    def image_embedding(self, clip: shards.Clip) -> Tensor:
        """The image embedding (D,) of its picture."""
        number = self.picture_number(clip)
        return self.image_embedding_by_number(number)[0]

    @functools.cached_property
    def image_embedding_by_number(self) -> Callable[[int], Tensor]:
        """From the number of a picture to its image embedding (1, D)."""
        path = image_embeddings_file(self)
        rows = shards.open_features(path, shards.PREPARE_HINT)
        return lambda number: rows(number).float()

    @functools.cached_property
    def train_embeddings(self) -> Tensor:
        """The image embeddings (n, D) of the training pictures."""
        gallery = self.gallery("train")
        rows = [self.image_embedding_by_number(n) for n in gallery]
        return torch.cat(rows)

    def nearest_pictures(self, embedding: Tensor, count: int = 5) -> Tensor:
        """The training pictures nearest to an embedding (D,), best first: (count, 3, S, S).

        S: the shorter side of the best one.
        """
        embedding = embedding.float().cpu()
        similarity = self.train_embeddings @ embedding
        count = min(count, len(similarity))
        best = similarity.topk(count).indices
        gallery = self.gallery("train")
        numbers = [gallery[n] for n in best.tolist()]
        best_picture = self.read_picture(numbers[0])
        size = min(best_picture.shape[1:])
        pictures = [self.read_picture(n, size) for n in numbers]
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


# Files beside the corpus


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


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    on_cpu = {}
    for name, value in tensors.items():
        on_cpu[name] = value.contiguous().cpu()
    with shards.atomic_write(path) as part:
        safetensors.torch.save_file(on_cpu, part)
