"""Text to music: FluxMusic, a rectified-flow Transformer over the latents of a mel spectrogram; the network and its published weights.

A latent (B, 8, T, F) of AudioLDM2's VAE is cut into patches of 2 x 2: N = T / 2 * F / 2 tokens of C = 32 numbers, all bands of one
time before the next. A text comes twice: as the sequence of T5-XXL's features, which takes part in every attention, and as CLAP's
vector, which with the time modulates every block. Nothing is masked: the published networks attend to the text's padding too.
Source: FluxMusic (Fei et al. 2024, arXiv 2409.00587), layout of feizc/FluxMusic@126bdce; blocks of SD3 (arXiv 2403.03206) and FLUX.1.
"""

import argparse
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import pretrained
from config import UserError
from model import sinusoids, zero

CHANNELS, TEXT_WIDTH, VECTOR_WIDTH = 32, 4096, 768       # of a token, of T5-XXL, of CLAP's text tower
BANDS = 8                            # patches over frequency: 64 mel bins / 4 (VAE) / 2
HEADS = 16
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Width D, double- and single-stream blocks, and how many of a head's D / 16 numbers turn with each axis: none, time, frequency."""
    width: int
    double: int
    single: int
    axes: tuple[int, int, int]


SIZES = {"small": Size(512, 8, 16, (8, 12, 12)),                 # 142,333,984 parameters
         "base": Size(768, 12, 24, (16, 16, 16)),                # 473,971,232
         "large": Size(1024, 12, 24, (16, 24, 24)),              # 840,628,256
         "giant": Size(1408, 16, 32, (16, 36, 36)),              # 2,109,904,928, the paper's
         "giant_full": Size(1408, 12, 24, (16, 36, 36))}         # 1,586,238,752, published as Giant-Full, trained for longer


class MMDiT(nn.Module):
    """The Transformer that predicts v: blocks of two streams, whose weights are their own, then blocks of one.

    Submodules are named, and nested, as the published checkpoints have them: there the music is `img`.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.img_in = nn.Linear(CHANNELS, size.width)
        self.txt_in = nn.Linear(TEXT_WIDTH, size.width)
        self.time_in = embedder(256, size.width)
        self.vector_in = embedder(VECTOR_WIDTH, size.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(size.width) for _ in range(size.double))
        self.single_blocks = nn.ModuleList(SingleBlock(size.width) for _ in range(size.single))
        self.final_layer = FinalLayer(size.width)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """x_t (B, N, C), t (B,), text (B, S, TEXT_WIDTH), vector (B, VECTOR_WIDTH) -> v (B, N, C)."""
        music, text = self.img_in(x_t), self.txt_in(text)                                # (B, N, D), (B, S, D)
        condition = self.time_in(sinusoids(1000 * t, 256).to(music.dtype)) + self.vector_in(vector)     # (B, D)
        turn = rotation(text.shape[1], music.shape[1], self.size.axes, music.device)
        for block in self.double_blocks:
            music, text = block(music, text, condition, turn)
        h = torch.cat([text, music], 1)                                                  # (B, S + N, D)
        for block in self.single_blocks:
            h = block(h, condition, turn)
        return self.final_layer(h[:, text.shape[1]:], condition)                         # (B, N, C)


class DoubleBlock(nn.Module):
    """Music and text meet in one attention; all else each has for itself."""

    def __init__(self, width: int):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = Projections(width), Projections(width)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)) for _ in range(2))

    def forward(self, music: torch.Tensor, text: torch.Tensor, condition: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """music (B, N, D), text (B, S, D), condition (B, D) -> the same shapes."""
        of_music, of_text = self.img_mod(condition), self.txt_mod(condition)
        streams = self.txt_attn(modulate(text, *of_text[:2])), self.img_attn(modulate(music, *of_music[:2]))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*streams))                         # (B, S + N, H, D / H)
        heard = attend(q, k, v, turn).split([text.shape[1], music.shape[1]], 1)
        return (residual(music, self.img_attn.proj(heard[1]), self.img_mlp, of_music[2:]),
                residual(text, self.txt_attn.proj(heard[0]), self.txt_mlp, of_text[2:]))


class SingleBlock(nn.Module):
    """Text and music as one sequence; attention and MLP side by side, between two matrices that they share (ViT-22B)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)
        self.norm = QKNorm(width // HEADS)
        self.modulation = Modulation(width, 3)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """x (B, S + N, D), condition (B, D) -> (B, S + N, D)."""
        shift, scale, gate = self.modulation(condition)
        q, k, v, hidden = self.linear1(modulate(x, shift, scale)).split([x.shape[-1] * n for n in (1, 1, 1, 4)], -1)
        heard = attend(*self.norm(q, k, v), turn)                                        # (B, S + N, D)
        return torch.addcmul(x, gate, self.linear2(torch.cat([heard, F.gelu(hidden, approximate="tanh")], -1)))


class Projections(nn.Module):
    """One stream's way into the attention of both, and, `proj`, out of it."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = QKNorm(width // HEADS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (B, N, D) -> q, k, v (B, N, H, D / H)."""
        return self.norm(*self.qkv(x).chunk(3, -1))


class QKNorm(nn.Module):
    """q and k with unit mean square in each head, times a learned scale; in float32, whatever the rest is in."""

    def __init__(self, head_width: int):
        super().__init__()
        self.query_norm, self.key_norm = (nn.ParameterDict({"scale": torch.ones(head_width)}) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v (B, N, D) -> (B, N, H, D / H)."""
        q, k, v = (rearrange(part, "b n (h d) -> b n h d", h=HEADS) for part in (q, k, v))
        q, k = (F.rms_norm(part.float(), part.shape[-1:], norm["scale"].float(), EPS)
                for part, norm in ((q, self.query_norm), (k, self.key_norm)))
        return q, k, v


class Modulation(nn.Module):
    """The condition (B, D) -> `count` vectors (B, 1, D): shift, scale, gate of each branch; all 0 at first, the block the identity."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.lin, self.count = zero(nn.Linear(width, count * width)), count

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(condition))[:, None].chunk(self.count, -1)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> v (B, N, C), 0 at first."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = zero(nn.Linear(width, CHANNELS))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(width, 2 * width)))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(condition)[:, None].chunk(2, -1)))


def embedder(width: int, out_width: int) -> nn.Sequential:
    """Two matrices around a SiLU, (B, width) -> (B, out_width)."""
    return nn.Sequential(OrderedDict(in_layer=nn.Linear(width, out_width), silu=nn.SiLU(), out_layer=nn.Linear(out_width, out_width)))


def residual(x: torch.Tensor, heard: torch.Tensor, mlp: nn.Module, modulation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What a stream does after attention: x (B, N, D), heard (B, N, D), modulation: gate; shift, scale, gate of the MLP."""
    x = torch.addcmul(x, modulation[0], heard)
    return torch.addcmul(x, modulation[3], mlp(modulate(x, *modulation[1:3])))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights, then AdaLN's."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """q, k, v (B, N, H, D / H), of which q and k turn with their positions, turn (N, 1, D / H / 2) complex -> (B, N, D)."""
    q, k = rotate(q, turn).to(v.dtype), rotate(k, turn).to(v.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))           # a view: in memory heads stay within a token, and nothing is copied
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (B, N, H, d) as complex numbers, in one pass; `model.rotate` pairs the halves of a head."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def rotation(text_tokens: int, tokens: int, axes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Rotary embeddings e^(i angle) (S + N, 1, D / H / 2) by position along none, time, frequency, each with its part of a head.

    All of the text is at 0, 0, 0, where the music's first token is too.
    """
    one, times, bands = (torch.arange(n, device=device) for n in (1, tokens // BANDS, BANDS))
    positions = F.pad(torch.cartesian_prod(one, times, bands), (0, 0, text_tokens, 0)).unbind(1)
    frequencies = [10000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width) for width in axes]
    angles = torch.cat([torch.outer(position, f) for position, f in zip(positions, frequencies)], 1)
    return torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex64)


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """(B, 8, T, F) -> (B, N, C)."""
    return rearrange(latents, "b c (t i) (f j) -> b (t f) (c i j)", i=2, j=2)


def to_latents(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, 8, T, F)."""
    return rearrange(tokens, "b (t f) (c i j) -> b c (t i) (f j)", f=BANDS, i=2, j=2)


# Published checkpoints

def load_published(path: Path) -> MMDiT:
    """The network of a checkpoint of FluxMusic, its averaged weights, float32 on the CPU; the size is read off the tensors.

    raises UserError for a file that is damaged, has code in it, or other tensors than exactly those of a published size.
    """
    tensors = read_published(path)
    with torch.device("meta"):
        network = MMDiT(find_size(tensors, path))
    own = network.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"{path}: {name!r} is {'missing' if name in own else 'not part of FluxMusic'}; fetch the checkpoint again")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, FluxMusic has {tuple(value.shape)}")
    network.to_empty(device="cpu").load_state_dict(tensors)
    return network


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights by name, mapped from the file: the optimizer's state beside them is never read. None of its code runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):             # the options of its training, which nobody reads here
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            state = None if code else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                                   # garbage fails in every way there is
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({pretrained.brief(e)}); fetch it again") from e
    if code:
        raise UserError(f"{path}: refused, it asks for {min(code)} to be run; a checkpoint holds tensors and options only")
    if not isinstance(state, dict) or not isinstance(state.get("ema"), dict):
        raise UserError(f"{path}: lacks ema, the averaged weights; not a checkpoint of FluxMusic")
    for name, value in state["ema"].items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"{path}: ema {name!r} is no tensor of real numbers; not a checkpoint of FluxMusic")
    return state["ema"]


def find_size(tensors: dict[str, torch.Tensor], path: Path) -> Size:
    """The published size of that width and those numbers of blocks."""
    if "img_in.bias" not in tensors:
        raise UserError(f"{path}: 'img_in.bias' is missing; not a checkpoint of FluxMusic")
    double, single = (len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}_blocks.")}) for kind in ("double", "single"))
    width = tensors["img_in.bias"].numel()
    for size in SIZES.values():
        if (size.width, size.double, size.single) == (width, double, single):
            return size
    raise UserError(f"{path}: by img_in.bias of width {width} with {double} double_blocks and {single} single_blocks it is none of "
                    f"{', '.join(SIZES)}")
