"""Pictures as codes: autoencoders, and the codes of a corpus that system speech_image trains on.

An autoencoder has `encode`, pictures (B, 3, H, W) in [0, 1] to vectors (B, N, d), whose codes are the nearest
rows of its `book` (K', d), and `decode`, such vectors back to pictures. Of its K' codes K are used.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from config import UserError
from pretrained import frozen
from speech2image import vision
from speech2image.config import Codes
from speech2image.data import SpokenImageCorpus, cache_path, load_weights_frozen, read_tensors


class PictureDecoder(nn.Module):
    """Codes to pictures, by the used codes of an autoencoder's codebook."""

    def __init__(self, autoencoder: nn.Module, kept: Tensor):
        """kept (K,): rows of the autoencoder's codebook that codes 0 ... K - 1 stand for."""
        super().__init__()
        self.autoencoder = autoencoder
        used = autoencoder.book[kept]
        self.register_buffer("codebook", used.detach().clone())

    def decode(self, codes: Tensor) -> Tensor:
        """(B, N) -> (B, 3, H, W) in [0, 1]."""
        vectors = self.codebook[codes]
        pictures = self.autoencoder.decode(vectors)
        return pictures.clamp(0, 1)


class FSQAutoencoder(nn.Module):
    """64 codes, each for 4 x 4 pixels, by finite scalar quantisation: three numbers of four levels.

    source: arXiv 2309.15505
    """

    def __init__(self, width: int = 16):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        halve = functools.partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        self.encoder = nn.Sequential(
            halve(3, width),
            nn.SiLU(),
            halve(width, 2 * width),
            nn.SiLU(),
            conv(2 * width, 4 * width),
            nn.SiLU(),
            nn.Conv2d(4 * width, 3, 1),
            nn.Tanh(),
        )
        self.decoder = nn.Sequential(
            conv(3, 4 * width),
            nn.SiLU(),
            conv(4 * width, 8 * width),
            nn.PixelShuffle(2),
            nn.SiLU(),
            conv(2 * width, 4 * width),
            nn.PixelShuffle(2),
            nn.SiLU(),
            conv(width, 3),
        )
        levels = torch.linspace(-1, 1, 4)
        self.register_buffer("book", torch.cartesian_prod(levels, levels, levels))

    def encode(self, pictures: Tensor) -> Tensor:
        latents = self.encoder(pictures)  # (B, d, h, w)
        return latents.flatten(2).transpose(1, 2)

    def decode(self, vectors: Tensor) -> Tensor:
        side = math.isqrt(vectors.shape[1])
        latents = rearrange(vectors, "b (h w) d -> b d h w", h=side)
        return self.decoder(latents)


class DiffusersVQ(nn.Module):
    """A VQModel of diffusers."""

    def __init__(self, name: str):
        """name: a folder or hub id; the model may be in its vqvae/. raises UserError where there is none."""
        super().__init__()
        from diffusers import VQModel  # seconds to import

        is_alone = Path(name, "config.json").is_file()
        folder = "" if is_alone else "vqvae"
        self.vq = frozen.load_frozen(VQModel, name, folder, "codes.vq", torch.device("cpu"))
        codebook = self.vq.quantize.embedding.weight
        self.register_buffer("book", codebook.detach())

    def encode(self, pictures: Tensor) -> Tensor:
        latents = self.vq.encode(2 * pictures - 1).latents  # (B, d, h, w)
        return latents.flatten(2).transpose(1, 2)

    def decode(self, vectors: Tensor) -> Tensor:
        side = math.isqrt(vectors.shape[1])
        latents = rearrange(vectors, "b (h w) d -> b d h w", h=side).contiguous()
        h = self.vq.post_quant_conv(latents)
        if self.vq.config.norm_type == "spatial":
            pictures = self.vq.decoder(h, latents)
        else:
            pictures = self.vq.decoder(h)
        return (pictures + 1) / 2


def nearest_codes(vectors: Tensor, book: Tensor) -> Tensor:
    """The row numbers (n,) in book (K, d) of the codes nearest to vectors (n, d)."""
    distances = torch.cdist(vectors.float(), book.float())
    return distances.argmin(-1)


# The codes of a corpus


def codes_file(corpus: SpokenImageCorpus) -> Path:
    """The pictures' codes; beside it, `vq_file`, the autoencoder that was trained for them."""
    c = corpus.config.codes
    content = [c.vq, c.vq_steps, c.picture_size, c.grid, c.kept]
    return cache_path(corpus, "codes.safetensors", content)


def vq_file(corpus: SpokenImageCorpus) -> Path:
    c = corpus.config.codes
    return cache_path(corpus, "vq.safetensors", [c.vq_steps, c.picture_size])


def read_codes(corpus: SpokenImageCorpus) -> tuple[Tensor, Tensor]:
    """The codes (n, N) of all pictures, and which codes of the codebook they number, (K,)."""
    path = codes_file(corpus)
    tensors = read_tensors(path)
    codes = tensors["codes"].long()
    kept = tensors["kept"].long()
    return codes, kept


def load_autoencoder(corpus: SpokenImageCorpus) -> nn.Module:
    """That of codes.vq, frozen."""
    vq = corpus.config.codes.vq
    if vq == "scratch":
        return load_weights_frozen(FSQAutoencoder(), vq_file(corpus)).module
    return frozen.Frozen(DiffusersVQ(vq)).module


@torch.no_grad()
def encode_pictures(corpus: SpokenImageCorpus, autoencoder: nn.Module) -> dict[str, Tensor]:
    """codes (n, N) of all pictures, as numbers of the used codes; kept (K,): their rows in the codebook.

    The used codes are the K most frequent in training; any other is replaced by the nearest of them. Most of
    a large codebook is not in use: of ImageNet's 16,384 codes 974 are.
    """
    c = corpus.config.codes
    codebook = autoencoder.book  # (K', d)
    numbers = range(len(corpus.picture_paths))
    codes = []
    for n in tqdm(numbers, desc="codes", unit="picture", disable=None):
        picture = corpus.read_picture(n, c.picture_size)
        picture = picture.to(codebook.device)
        vectors = autoencoder.encode(picture[None])  # (1, N, d)
        indices = nearest_codes(vectors[0], codebook)
        codes.append(indices.cpu())
    codes = torch.stack(codes)
    check_size(c, codes.shape[1], len(codebook))

    trained_on = corpus.gallery("train")
    count = codes[trained_on].flatten().bincount(minlength=len(codebook))
    most_frequent = count.argsort(descending=True, stable=True)[: c.kept]
    kept = most_frequent.sort().values
    print_usage(count, kept)
    to_used = nearest_codes(codebook, codebook[kept])  # (K',)
    codes = to_used.cpu()[codes]
    return {"codes": codes.to(torch.int16), "kept": kept.to(torch.int32)}


def check_size(c: Codes, tokens: int, codebook_size: int) -> None:
    """raises UserError for an autoencoder that makes another number of tokens, or has too few codes"""
    if tokens != c.grid**2 or codebook_size < c.kept:
        raise UserError(
            f"codes.vq {c.vq}: makes {tokens} of {codebook_size} codes of a picture of "
            f"{c.picture_size} pixels; codes.grid {c.grid} and codes.kept {c.kept} do not fit"
        )


def print_usage(count: Tensor, kept: Tensor) -> None:
    """count (K',): how often training uses each code. kept (K,): the codes that stay."""
    total = count.sum()
    share = count[count > 0] / total
    entropy = -(share * share.log()).sum()
    perplexity = entropy.exp()
    percent = 100 * (count[kept].sum() / total)
    print(
        f"codes: training uses {len(share)} of {len(count)}, perplexity {perplexity:.0f}; "
        f"the {len(kept)} kept make {percent:.2f} %"
    )


def train_vq(pictures: Tensor, steps: int, batch: int = 16) -> FSQAutoencoder:
    """An autoencoder of pictures (n, 3, H, W).

    The first fifth of the steps is without rounding. Pixels that differ from their picture's background, its
    median, count five times.
    """
    rng = np.random.default_rng(0)
    background = pictures.flatten(2).median(2).values  # (n, 3)
    difference = pictures - background[:, :, None, None]
    is_object = difference.abs().amax(1, keepdim=True) > 0.1
    weights = 1 + 4 * is_object.float()  # (n, 1, H, W)

    def loss(network: FSQAutoencoder, step: int) -> Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        x = pictures[chosen]
        vectors = network.encode(x)  # (B, N, d)
        if step > steps / 5:
            vectors = round_to_codes(vectors, network.book)
        error = network.decode(vectors) - x
        error = error.square() + 0.1 * error.abs()
        return (weights[chosen] * error).mean()

    return vision.train_network(FSQAutoencoder, loss, steps, 3e-3, "vq")


def round_to_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Each vector (B, N, d) replaced by its nearest code; gradients pass unchanged (straight-through)."""
    codes = nearest_codes(vectors.flatten(0, 1), codebook)
    rounded = codebook[codes].view_as(vectors)
    return vectors + (rounded - vectors).detach()
