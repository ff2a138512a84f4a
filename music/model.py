"""The network of FluxMusic: an MMDiT that predicts v of music, as tokens, beside the tokens of a caption.

A caption conditions it twice: its hidden states take part in every attention, as a sequence; its vector is
added to the time embedding and modulates every block. Names are those of the published checkpoints, whose
layout this is: `img` is music, `txt` the caption. Order: network, blocks, helpers, published checkpoints.
Source: FluxMusic (arXiv 2409.00587), layout of feizc/FluxMusic@126bdce; double blocks of SD3 (arXiv
2403.03206), single blocks of FLUX.1, modulation of DiT (arXiv 2212.09748).
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from config import UserError
from device import widest_float
from model import timestep_embedding, zero_init
from music.config import SIZES, Size
from pretrained import frozen

EPS = 1e-6


class MMDiT(nn.Module):
    """Two streams, music and text, which attend to each other; then both as one sequence."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        width = size.width
        heads = size.heads
        self.img_in = nn.Linear(size.channels, width)
        self.txt_in = nn.Linear(size.text_width, width)
        self.time_in = mlp_embedder(256, width)
        self.vector_in = mlp_embedder(size.vector_width, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(size.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(size.depth_single_blocks))
        self.final_layer = FinalLayer(width, size.channels)

    def forward(
        self,
        x_t: Tensor,  # (B, N, C)
        t: Tensor,  # (B,)
        text: Tensor,  # (B, S, text_width)
        vector: Tensor,  # (B, vector_width)
        text_mask: Tensor | None = None,  # (B, S); None: all is text
    ) -> Tensor:
        """returns: v (B, N, C)."""
        img = self.img_in(x_t)  # (B, N, D)
        txt = self.txt_in(text)  # (B, S, D)
        img_tokens = img.shape[1]
        txt_tokens = txt.shape[1]
        time = timestep_embedding(1000 * t, 256).to(img.dtype)
        condition = self.time_in(time) + self.vector_in(vector)  # (B, D)
        freqs_cis = rope(txt_tokens, img_tokens, self.size, img.device)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (0, img_tokens), value=True)  # (B, S + N)
            mask = mask[:, None, None]

        for block in self.double_blocks:
            img, txt = block(img, txt, condition, freqs_cis, mask)
        joint = torch.cat([txt, img], 1)  # (B, S + N, D)
        for block in self.single_blocks:
            joint = block(joint, condition, freqs_cis, mask)
        img = joint[:, txt_tokens:]
        return self.final_layer(img, condition)  # (B, N, C)


# Blocks


class DoubleBlock(nn.Module):
    """Music and text attend to each other in one attention; each has its own weights for everything."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img_mod = Modulation(width, 2)
        self.txt_mod = Modulation(width, 2)
        self.img_attn = StreamAttention(width, heads)
        self.txt_attn = StreamAttention(width, heads)
        self.img_mlp = mlp(width)
        self.txt_mlp = mlp(width)

    def forward(
        self,
        img: Tensor,  # (B, N, D)
        txt: Tensor,  # (B, S, D)
        condition: Tensor,  # (B, D)
        freqs_cis: Tensor,  # (S + N, 1, D / H / 2)
        mask: Tensor | None,  # (B, 1, 1, S + N)
    ) -> tuple[Tensor, Tensor]:
        """returns: img, txt."""
        img_mod1, img_mod2 = self.img_mod(condition)
        txt_mod1, txt_mod2 = self.txt_mod(condition)
        img_mod1_shift, img_mod1_scale, img_mod1_gate = img_mod1
        img_mod2_shift, img_mod2_scale, img_mod2_gate = img_mod2
        txt_mod1_shift, txt_mod1_scale, txt_mod1_gate = txt_mod1
        txt_mod2_shift, txt_mod2_scale, txt_mod2_gate = txt_mod2

        # attention of both to both
        txt_modulated = modulate(txt, txt_mod1_shift, txt_mod1_scale)
        img_modulated = modulate(img, img_mod1_shift, img_mod1_scale)
        txt_q, txt_k, txt_v = self.txt_attn(txt_modulated)
        img_q, img_k, img_v = self.img_attn(img_modulated)
        q = torch.cat([txt_q, img_q], 1)  # (B, S + N, H, D / H)
        k = torch.cat([txt_k, img_k], 1)
        v = torch.cat([txt_v, img_v], 1)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], 1)

        # the music by itself
        img = torch.addcmul(img, img_mod1_gate, self.img_attn.proj(img_attended))
        img_modulated = modulate(img, img_mod2_shift, img_mod2_scale)
        img = torch.addcmul(img, img_mod2_gate, self.img_mlp(img_modulated))

        # the text by itself
        txt = torch.addcmul(txt, txt_mod1_gate, self.txt_attn.proj(txt_attended))
        txt_modulated = modulate(txt, txt_mod2_shift, txt_mod2_scale)
        txt = torch.addcmul(txt, txt_mod2_gate, self.txt_mlp(txt_modulated))
        return img, txt


class StreamAttention(nn.Module):
    """The weights that one of two streams has in their joint attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> q, k, v (B, N, H, D / H); `proj` is applied after the joint attention."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.norm(q, k, v)


class SingleBlock(nn.Module):
    """Text and music as one sequence; attention and MLP in parallel, with shared matrices (ViT-22B)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 7 * width)  # q, k, v, and 4 D of the MLP
        self.linear2 = nn.Linear(5 * width, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 1)

    def forward(self, x: Tensor, condition: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, S + N, D), condition (B, D) -> (B, S + N, D)."""
        mod_shift, mod_scale, mod_gate = self.modulation(condition)[0]
        width = x.shape[-1]
        projected = self.linear1(modulate(x, mod_shift, mod_scale))
        q, k, v, hidden = projected.split([width, width, width, 4 * width], -1)
        q, k, v = self.norm(q, k, v)  # (B, S + N, H, D / H)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        hidden = F.gelu(hidden, approximate="tanh")  # (B, S + N, 4 D)
        update = self.linear2(torch.cat([attended, hidden], -1))
        return torch.addcmul(x, mod_gate, update)


class FinalLayer(nn.Module):
    """AdaLN, then the projection to tokens; both zero-initialised, so an untrained network returns 0."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = zero_init(nn.Linear(width, channels))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_init(nn.Linear(width, 2 * width)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) -> (B, N, C)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


class Modulation(nn.Module):
    """Shift, scale and gate of each of a block's branches, from the condition.

    Zero-initialised, so the block starts as the identity.
    """

    def __init__(self, width: int, branches: int):
        super().__init__()
        self.branches = branches
        self.lin = zero_init(nn.Linear(width, 3 * branches * width))

    def forward(self, condition: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """condition (B, D) -> for each branch shift, scale, gate (B, 1, D)."""
        vectors = self.lin(F.silu(condition))[:, None]  # (B, 1, 3 branches D)
        return [branch.chunk(3, -1) for branch in vectors.chunk(self.branches, -1)]


class QKNorm(nn.Module):
    """RMSNorm of q and k in each head."""

    def __init__(self, head_width: int):
        super().__init__()
        self.head_shape = (-1, head_width)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, N, D) -> (B, N, H, D / H)."""
        q = q.unflatten(-1, self.head_shape)
        k = k.unflatten(-1, self.head_shape)
        v = v.unflatten(-1, self.head_shape)
        return self.query_norm(q), self.key_norm(k), v


class RMSNorm(nn.Module):
    """x (..., width) with unit mean square, times a learned scale; in float32, whatever the rest is in."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), EPS)


def mlp_embedder(width: int, out_width: int) -> nn.Sequential:
    """Two matrices around a SiLU, (B, width) -> (B, out_width)."""
    layers = OrderedDict()
    layers["in_layer"] = nn.Linear(width, out_width)
    layers["silu"] = nn.SiLU()
    layers["out_layer"] = nn.Linear(out_width, out_width)
    return nn.Sequential(layers)


def mlp(width: int) -> nn.Sequential:
    """Two matrices around a GELU, (B, N, D) -> (B, N, D)."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then AdaLN's: x (B, N, D), shift, scale (B, 1, D), in DiT's order."""
    normalised = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift, normalised, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with rotary embeddings, q, k, v (B, N, H, D / H) -> (B, N, D).

    freqs_cis: of `rope`. mask (B, 1, 1, N): which keys are attended to; None = all.
    """
    q = apply_rope(q, freqs_cis).to(v.dtype)
    k = apply_rope(k, freqs_cis).to(v.dtype)
    q = q.transpose(1, 2)  # views: in memory the heads stay within a token, and nothing is copied
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (B, N, H, d) as complex numbers.

    `model.apply_rope` pairs the halves of a head.
    """
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * freqs_cis).flatten(-2)


def rope(txt_tokens: int, img_tokens: int, size: Size, device: torch.device) -> Tensor:
    """Rotary embeddings e^(i angle), (S + N, 1, D / H / 2), complex: by nothing, time and frequency.

    All positions of the text are 0, 0, 0.
    """
    none = torch.arange(1, device=device)
    times = torch.arange(img_tokens // size.bands, device=device)
    bands = torch.arange(size.bands, device=device)
    positions = torch.cartesian_prod(none, times, bands)  # (N, 3)
    positions = F.pad(positions, (0, 0, txt_tokens, 0))  # (S + N, 3)
    dtype = widest_float(device)
    angles = []
    for position, width in zip(positions.unbind(1), size.axes_dim):
        pairs = torch.arange(0, width, 2, dtype=dtype, device=device)
        frequencies = 10000 ** (-pairs / width)
        angles.append(torch.outer(position, frequencies))
    angles = torch.cat(angles, 1)  # (S + N, D / H / 2)
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    return freqs_cis[:, None].to(torch.complex64)


# Published checkpoints


def load_published(path: Path) -> MMDiT:
    """The network of a checkpoint of FluxMusic, its averaged weights, float32, on the CPU.

    raises UserError for a file that is damaged, has code in it, or other tensors than exactly those of a
    published size.
    """
    tensors = read_published(path)
    size = published_size(tensors, path)
    with torch.device("meta"):
        network = MMDiT(size)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        wrong = found.get(name, "(none: it is missing)")
        right = wanted.get(name, "(no such tensor)")
        if wrong != right:
            raise UserError(f"{path}: {name} has shape {wrong}, FluxMusic's {right}")
    network.load_state_dict(tensors, assign=True)
    return network.float()


def published_size(tensors: dict[str, Tensor], path: Path) -> Size:
    """The published size that has the width and the numbers of blocks of the tensors."""
    width = 0
    if "img_in.bias" in tensors:
        width = tensors["img_in.bias"].numel()
    double = count_blocks(tensors, "double_blocks.")
    single = count_blocks(tensors, "single_blocks.")
    for size in SIZES.values():
        if (size.width, size.depth, size.depth_single_blocks) == (width, double, single):
            return size
    raise UserError(
        f"{path}: by img_in.bias of width {width} with {double} double_blocks and {single} single_blocks "
        f"it is none of {', '.join(SIZES)}"
    )


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})


def read_published(path: Path) -> dict[str, Tensor]:
    """The averaged weights by name, memory-mapped: the optimizer's state beside them is never read.

    None of the file's code runs.
    """
    state = None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of its training
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not code:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # garbage fails in every way there is
        reason = frozen.one_line(e)
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({reason}); fetch it again") from e
    if code:
        raise UserError(
            f"{path}: refused, it asks for {min(code)} to be run; a checkpoint holds tensors and options only"
        )

    ema = state.get("ema") if isinstance(state, dict) else None
    if not isinstance(ema, dict):
        raise UserError(f"{path}: lacks ema, the averaged weights; not a checkpoint of FluxMusic")
    for name, value in ema.items():
        real = isinstance(value, Tensor) and value.is_floating_point()
        if not isinstance(name, str) or not real:
            raise UserError(
                f"{path}: ema {name!r} is no tensor of real numbers; not a checkpoint of FluxMusic"
            )
    return ema
