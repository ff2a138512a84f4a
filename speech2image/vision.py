"""Networks that look at pictures (B, 3, H, W) in [0, 1]: image encoders, the classifier, FID's network.

Those for drawn shapes are small, and trained here by `prepare`: the same every time.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import data
from config import UserError
from corpora import shards
from pretrained import frozen
from speech2image import speech
from speech2image.data import SpokenImageCorpus, image_encoder_file, load_weights_frozen, resize_and_crop


class ClipImageEncoder(nn.Module):
    """A CLIPVisionModelWithProjection: pictures (B, 3, H, W) -> embeddings (B, D) of length 1."""

    def __init__(self, name: str):
        """name: a folder or hub id."""
        super().__init__()
        model = transformers.CLIPVisionModelWithProjection
        self.clip = frozen.load_frozen(model, name, "", "align.image", torch.device("cpu"))
        self.size = self.clip.config.image_size
        mean = torch.tensor(OPENAI_CLIP_MEAN)
        std = torch.tensor(OPENAI_CLIP_STD)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = resize_and_crop(pictures, self.size)
        x = (x - self.mean) / self.std
        out = self.clip(x)
        return F.normalize(out.image_embeds.float(), dim=-1)


class SmallImageEncoder(nn.Sequential):
    """CLIP's stand-in, for pictures as small as 32 x 32."""

    size = 32
    width = 256

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, self.width),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        x = 2 * resize_and_crop(pictures, self.size) - 1
        embeddings = super().forward(x)
        return F.normalize(embeddings, dim=-1)


class AttributeClassifier(nn.Module):
    """A classifier of what a picture shows, by the attributes of its label: colour, shape and place.

    It sees 32 x 32 pixels.
    """

    def __init__(self, sizes: Sequence[int]):
        """sizes: the number of values of each attribute."""
        super().__init__()
        self.sizes = list(sizes)
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 96, 3, padding=1),
            nn.SiLU(),
        )
        self.out = nn.Linear(96 * 17, sum(sizes))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> logits (B, n) for each attribute's n values, from pooled features.

        Pooled by their maximum over the picture, and by their mean in each cell of a 4 x 4 grid.
        """
        x = 2 * resize_and_crop(pictures, 32) - 1
        h = self.body(x)  # (B, 96, 8, 8)
        anywhere = h.amax((2, 3))
        in_cells = F.adaptive_avg_pool2d(h, 4).flatten(1)
        logits = self.out(torch.cat([anywhere, in_cells], 1))
        return logits.split(self.sizes, -1)


def label_attributes(labels: Sequence[str]) -> list[list[str]]:
    """The values that each attribute of a label may have: colours, shapes and places of red-circle-left."""
    split = [label.split("-") for label in labels]
    try:
        columns = list(zip(*split, strict=True))
    except ValueError as e:
        raise UserError("codes.judge: the labels have not all as many parts; leave it out") from e
    return [sorted(set(values)) for values in columns]


def load_fid_network(name: str, device: torch.device) -> Callable:
    """The network that FID and IS are measured by.

    name: inception-2015-12-05.pt, the TorchScript file of the published figures | a CLIP, whose features give
    a distance of another kind, and which has no classes.
    returns: pictures (B, 3, H, W) in [0, 1] -> features for FID, (B, F), and class probabilities for IS,
    (B, C)
    """
    if not name.endswith(".pt"):
        clip = frozen.Frozen(ClipImageEncoder(name)).to(device)

        def clip_features(pictures: Tensor) -> tuple[Tensor, Tensor]:
            no_classes = pictures.new_zeros(len(pictures), 0)
            return clip(pictures), no_classes

        return clip_features
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as e:
        reason = frozen.one_line(e)
        raise UserError(f"eval.features {name}: not a TorchScript file ({reason})") from e

    def inception(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (255 * pictures).round().to(torch.uint8)
        features = network(pixels, return_features=True)
        classes = network(pixels, no_output_bias=True)
        return features, classes

    return inception


def image_encoder_width(name: str) -> int:
    """D, the width of an image encoder's embeddings, which the speech's follows."""
    if name == "scratch":
        return SmallImageEncoder.width
    folder = frozen.find_file(name, "config.json").parent
    return transformers.CLIPVisionConfig.from_pretrained(folder).projection_dim


def load_image_encoder(corpus: SpokenImageCorpus) -> frozen.Frozen:
    """The image encoder of config.align.image: pictures (B, 3, H, W) -> (B, D)."""
    image = corpus.config.align.image
    if image == "scratch":
        return load_weights_frozen(SmallImageEncoder(), image_encoder_file(corpus))
    return frozen.Frozen(ClipImageEncoder(image))


# Training


def train_attribute_classifier(corpus: SpokenImageCorpus, steps: int, batch: int = 32) -> AttributeClassifier:
    """A classifier of the training pictures' labels.

    The pictures are moved by up to a pixel, noisy, and every other time blurred, as generated ones may be.
    """
    rng = np.random.default_rng(0)
    attributes = label_attributes(corpus.label_numbers)
    pictures = training_pictures(corpus, 32)
    numbers = corpus.gallery("train")[: len(pictures)]
    targets = attribute_targets(corpus, attributes, numbers)

    def loss(network: AttributeClassifier, step: int) -> Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        x = augment_picture(pictures[chosen], step % 2 == 1, rng)
        total = 0
        for logits, target in zip(network(x), targets[chosen].T):
            total = total + F.cross_entropy(logits, target)
        return total

    sizes = [len(values) for values in attributes]
    make = functools.partial(AttributeClassifier, sizes)
    return train_network(make, loss, steps, 5e-3, "classifier")


def attribute_targets(corpus: SpokenImageCorpus, attributes: list[list[str]], numbers: list[int]) -> Tensor:
    """The class of each attribute of the pictures of these numbers, (n, attributes)."""
    targets = []
    for n in numbers:
        label = corpus.labels[corpus.picture_paths[n]]
        target = []
        for values, value in zip(attributes, label.split("-")):
            target.append(values.index(value))
        targets.append(target)
    return torch.tensor(targets)


def augment_picture(x: Tensor, blur: bool, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, H, W), all moved alike by up to a pixel, with noise. blur: by a mean of 3 x 3."""
    move = rng.integers(-1, 2, 2)
    move = tuple(move.tolist())
    x = x.roll(move, (2, 3))
    if blur:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = F.avg_pool2d(padded, 3, 1)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    noise = torch.from_numpy(noise)
    return x + 0.025 * noise


def train_network(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    peak: float,
    what: str,
) -> nn.Module:
    """make() trained by AdamW on loss(network, step), with a learning rate from `peak` down to 0.

    It is the same network every time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak)
    for step in tqdm(range(steps), desc=what, disable=None):
        warmup = min(1, (step + 1) / 50)
        decay = 1 - step / steps
        optimizer.param_groups[0]["lr"] = peak * warmup * decay
        value = loss(network, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    print(f"{what}: {steps} steps, loss {value.item():.4f}", flush=True)
    return network.eval()


def training_pictures(corpus: SpokenImageCorpus, size: int) -> Tensor:
    """The first 10,000 training pictures, (n, 3, size, size)."""
    numbers = corpus.gallery("train")[:10_000]
    pictures = [corpus.read_picture(n, size) for n in numbers]
    return torch.stack(pictures)


def train_image_encoder(corpus: SpokenImageCorpus, steps: int = 300) -> SmallImageEncoder:
    """An image encoder trained to match pictures with their descriptions, read as bags of words."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clips = corpus.clips("train")
    bags, vocabulary_size = bags_of_words(clips)
    image_encoder = SmallImageEncoder()
    text_encoder = nn.Sequential(
        nn.EmbeddingBag(vocabulary_size + 1, 256, mode="sum", padding_idx=0),
        nn.GELU(),
        nn.Linear(256, image_encoder.width),
    )
    both = nn.ModuleList([image_encoder, text_encoder])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3)
    scale = torch.tensor(1 / 0.07)
    batch = min(128, len(clips))
    for _ in tqdm(range(steps), desc="image encoder", disable=None):
        pictures = []
        texts = []
        labels = []
        for n in rng.integers(len(clips), size=batch):
            number = corpus.picture_number(clips[n])
            pictures.append(corpus.read_picture(number, image_encoder.size))
            texts.append(bags[n])
            labels.append(corpus.label_number(clips[n]))
        words, _ = data.pad(texts, 1)
        text = F.normalize(text_encoder(words), dim=-1)
        image = image_encoder(torch.stack(pictures))
        loss = speech.info_nce(image, text, torch.tensor(labels), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"image encoder: {steps} steps, contrast loss {loss.item():.3f}", flush=True)
    return image_encoder


def bags_of_words(clips: list[shards.Clip]) -> tuple[list[Tensor], int]:
    """The words of each clip's text as numbers (n,) from 1 on, and the number of different words."""
    texts = []
    for clip in clips:
        letters = [c if c.isalnum() else " " for c in clip.text.lower()]
        texts.append("".join(letters).split())
    vocabulary = sorted(set().union(*texts))
    numbers = {word: n for n, word in enumerate(vocabulary, 1)}
    bags = []
    for words in texts:
        bags.append(torch.tensor([numbers[word] for word in words], dtype=torch.long))
    return bags, len(vocabulary)
