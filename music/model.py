"""TODO."""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from config import Config, UserError
from device import widest_float
from model import timestep_embedding, zero_init
from music.config import SIZES, Size
from music.latents import Codec
from pretrained import frozen

# The network

EPS = 1e-6


def choose_size(config: Config, codec: "Codec", text_width: int) -> Size:
    """The published size, or the config's own. text_width: of a text encoder that is trained along, or 0."""
    options = config.music
    if options.size != "own":
        return SIZES[options.size]
    width = config.model.width
    heads = config.model.heads
    double = options.double_blocks
    single = config.model.layers - double
    head_width = width // heads
    rotated = 3 * head_width // 16 * 2  # numbers of a head that turn with time; as many with frequency
    axes = (head_width - 2 * rotated, rotated, rotated)
    text_width = text_width or options.text_width
    vector_width = options.vector_width
    if options.vector_encoder == "pooled":
        vector_width = text_width
    token = (codec.channels, codec.bands)
    return Size(width, double, single, axes, heads, *token, text_width, vector_width)


class MMDiT(nn.Module):
    """The network that predicts v. Parameter names are the published checkpoints', where `img` is music."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        width = size.width
        heads = size.heads
        self.img_in = nn.Linear(size.channels, width)
        self.txt_in = nn.Linear(size.text_width, width)
        self.time_in = mlp_embedder(256, width)
        self.vector_in = mlp_embedder(size.vector_width, width)
        self.double_blocks = nn.ModuleList()
        for _ in range(size.double):
            self.double_blocks.append(DoubleBlock(width, heads))
        self.single_blocks = nn.ModuleList()
        for _ in range(size.single):
            self.single_blocks.append(SingleBlock(width, heads))
        self.final_layer = FinalLayer(width, size.channels)

    def forward(
        self, x_t: Tensor, t: Tensor, text: Tensor, vector: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """x_t (B, N, C), t (B,), text (B, S, text_width), vector (B, vector_width) -> v (B, N, C).

        text_mask (B, S): None = all is text.
        """
        music = self.img_in(x_t)  # (B, N, D)
        text = self.txt_in(text)  # (B, S, D)
        tokens = music.shape[1]
        text_tokens = text.shape[1]
        time = timestep_embedding(1000 * t, 256).to(music.dtype)
        condition = self.time_in(time) + self.vector_in(vector)  # (B, D)
        freqs_cis = rope(text_tokens, tokens, self.size, music.device)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (0, tokens), value=True)  # (B, S + N)
            mask = mask[:, None, None]

        for block in self.double_blocks:
            music, text = block(music, text, condition, freqs_cis, mask)
        joint = torch.cat([text, music], 1)  # (B, S + N, D)
        for block in self.single_blocks:
            joint = block(joint, condition, freqs_cis, mask)
        music = joint[:, text_tokens:]
        return self.final_layer(music, condition)  # (B, N, C)


class DoubleBlock(nn.Module):
    """Music and text attend to each other in one attention; each has its own weights for everything."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.txt_mod = Modulation(width, 6)
        self.img_attn = StreamAttention(width, heads)
        self.txt_attn = StreamAttention(width, heads)
        self.img_mlp = mlp(width)
        self.txt_mlp = mlp(width)

    def forward(
        self, music: Tensor, text: Tensor, condition: Tensor, freqs_cis: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """music (B, N, D), text (B, S, D), condition (B, D) -> music and text."""
        music_shift, music_scale, *music_rest = self.img_mod(condition)
        text_shift, text_scale, *text_rest = self.txt_mod(condition)
        text_q, text_k, text_v = self.txt_attn(text, text_shift, text_scale)
        music_q, music_k, music_v = self.img_attn(music, music_shift, music_scale)

        q = torch.cat([text_q, music_q], 1)  # (B, S + N, H, D / H)
        k = torch.cat([text_k, music_k], 1)
        v = torch.cat([text_v, music_v], 1)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        lengths = [text.shape[1], music.shape[1]]
        attended_text, attended_music = attended.split(lengths, 1)

        music_update = self.img_attn.proj(attended_music)
        music = gated_residual(music, music_update, self.img_mlp, *music_rest)
        text_update = self.txt_attn.proj(attended_text)
        text = gated_residual(text, text_update, self.txt_mlp, *text_rest)
        return music, text


class StreamAttention(nn.Module):
    """The weights that one of two streams has in their joint attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D), shift, scale (B, 1, D) -> q, k, v (B, N, H, D / H)."""
        qkv = self.qkv(modulate(x, shift, scale))
        q, k, v = qkv.chunk(3, -1)
        return self.norm(q, k, v)


class SingleBlock(nn.Module):
    """Text and music as one sequence; attention and MLP in parallel, with shared matrices (ViT-22B)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 7 * width)
        self.linear2 = nn.Linear(5 * width, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, S + N, D), condition (B, D) -> (B, S + N, D)."""
        shift, scale, gate = self.modulation(condition)
        width = x.shape[-1]
        widths = [width, width, width, 4 * width]
        projected = self.linear1(modulate(x, shift, scale))
        q, k, v, hidden = projected.split(widths, -1)
        q, k, v = self.norm(q, k, v)  # (B, S + N, H, D / H)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        hidden = F.gelu(hidden, approximate="tanh")  # (B, S + N, 4 D)
        hidden = torch.cat([attended, hidden], -1)
        update = self.linear2(hidden)
        return torch.addcmul(x, gate, update)


class FinalLayer(nn.Module):
    """AdaLN, then the projection to tokens; both zero-initialised, so an untrained network returns 0."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = zero_init(nn.Linear(width, channels))
        modulation = zero_init(nn.Linear(width, 2 * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, music: Tensor, condition: Tensor) -> Tensor:
        """music (B, N, D), condition (B, D) -> (B, N, C)."""
        modulation = self.adaLN_modulation(condition)  # (B, 2 D)
        shift, scale = modulation[:, None].chunk(2, -1)
        music = modulate(music, shift, scale)
        return self.linear(music)


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
        x = x.float()
        scale = self.scale.float()
        return F.rms_norm(x, scale.shape, scale, EPS)


class Modulation(nn.Module):
    """The condition (B, D) -> `count` vectors (B, 1, D): shift, scale, gate of each branch.

    Zero-initialised, so the block starts as the identity.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.lin = zero_init(nn.Linear(width, count * width))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        width = condition.shape[-1]
        vectors = self.lin(F.silu(condition))  # (B, count D)
        return vectors[:, None].split(width, -1)


def mlp_embedder(width: int, out_width: int) -> nn.Sequential:
    """Two matrices around a SiLU, (B, width) -> (B, out_width)."""
    layers = OrderedDict()
    layers["in_layer"] = nn.Linear(width, out_width)
    layers["silu"] = nn.SiLU()
    layers["out_layer"] = nn.Linear(out_width, out_width)
    return nn.Sequential(layers)


def mlp(width: int) -> nn.Sequential:
    """(B, N, D) -> (B, N, D)."""
    first = nn.Linear(width, 4 * width)
    last = nn.Linear(4 * width, width)
    return nn.Sequential(first, nn.GELU("tanh"), last)


def gated_residual(
    x: Tensor,
    attended: Tensor,
    mlp: nn.Module,
    attn_gate: Tensor,
    mlp_shift: Tensor,
    mlp_scale: Tensor,
    mlp_gate: Tensor,
) -> Tensor:
    """What a stream does after attention: x, attended (B, N, D), the others (B, 1, D) -> (B, N, D)."""
    x = torch.addcmul(x, attn_gate, attended)
    modulated = modulate(x, mlp_shift, mlp_scale)
    update = mlp(modulated)
    return torch.addcmul(x, mlp_gate, update)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then AdaLN's."""
    width = x.shape[-1:]
    normalised = F.layer_norm(x, width, eps=EPS)
    return torch.addcmul(shift, normalised, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v (B, N, H, D / H) -> (B, N, D). freqs_cis (N, 1, D / H / 2), complex: `rotation`; mask: of k."""
    q = apply_rope(q, freqs_cis).to(v.dtype)
    k = apply_rope(k, freqs_cis).to(v.dtype)
    q = q.transpose(1, 2)  # views: in memory the heads stay within a token, and nothing is copied
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (B, N, H, d) as complex numbers.

    `model.rotate` pairs the halves of a head.
    """
    pairs = x.unflatten(-1, (-1, 2))
    numbers = torch.view_as_complex(pairs)
    turned = torch.view_as_real(numbers * freqs_cis)
    return turned.flatten(-2)


def rope(text_tokens: int, tokens: int, size: Size, device: torch.device) -> Tensor:
    """Rotary embeddings e^(i angle), (S + N, 1, D / H / 2), by position along none, time, frequency.

    All positions of the text are 0, 0, 0.
    """
    none = torch.arange(1, device=device)
    times = torch.arange(tokens // size.bands, device=device)
    bands = torch.arange(size.bands, device=device)
    positions = torch.cartesian_prod(none, times, bands)  # (N, 3)
    positions = F.pad(positions, (0, 0, text_tokens, 0))  # (S + N, 3)
    dtype = widest_float(device)
    angles = []
    for position, width in zip(positions.unbind(1), size.axes):
        pairs = torch.arange(0, width, 2, dtype=dtype, device=device)
        frequencies = 10000 ** (-pairs / width)
        angles.append(torch.outer(position, frequencies))
    angles = torch.cat(angles, 1)  # (S + N, D / H / 2)
    lengths = torch.ones_like(angles)
    freqs_cis = torch.polar(lengths, angles)
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
    wanted = shapes(network.state_dict())
    found = shapes(tensors)
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
        if (size.width, size.double, size.single) == (width, double, single):
            return size
    raise UserError(
        f"{path}: by img_in.bias of width {width} with {double} double_blocks and {single} single_blocks "
        f"it is none of {', '.join(SIZES)}"
    )


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    numbers = set()
    for name in tensors:
        if name.startswith(prefix):
            numbers.add(name.split(".")[1])
    return len(numbers)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_published(path: Path) -> dict[str, Tensor]:
    """The averaged weights by name, memory-mapped: the optimizer's state beside them is never read.

    None of the file's code runs.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of its training
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            state = None
            if not code:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # garbage fails in every way there is
        reason = frozen.one_line(e)
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({reason}); fetch it again") from e
    if code:
        raise UserError(
            f"{path}: refused, it asks for {min(code)} to be run; a checkpoint holds tensors and options only"
        )

    ema = None
    if isinstance(state, dict):
        ema = state.get("ema")
    if not isinstance(ema, dict):
        raise UserError(f"{path}: lacks ema, the averaged weights; not a checkpoint of FluxMusic")
    for name, value in ema.items():
        real = isinstance(value, Tensor) and value.is_floating_point()
        if not isinstance(name, str) or not real:
            raise UserError(
                f"{path}: ema {name!r} is no tensor of real numbers; not a checkpoint of FluxMusic"
            )
    return ema
