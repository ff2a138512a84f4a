"""The Transformer on codes that stage 2 samples with: it predicts p(x_0 | x_t) of x_t on a square grid.

Modulation takes DiT's order: shift, then scale. Zero-initialised, so each block starts as the identity, and
all codes as equally likely. Source: VQ-Diffusion (arXiv 2111.14822); condition sta: Speak the Art (arXiv
2601.00827).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from model import zero_init


class CodeTransformer(nn.Module):
    """The Transformer that predicts p(x_0 | x_t) from codes, the step, and one embedding of the picture."""

    def __init__(
        self,
        num_codes: int,  # K; MASK is one more
        grid: int,  # codes in a row and in a column
        width: int,
        layers: int,
        heads: int,
        conv_ratio: int,  # how much wider a block is between its two convolutions
        num_steps: int,  # T
        condition_mode: str,  # see `Block`
        condition_width: int,
        condition_scale: float,  # of the embedding, whose length is 1
    ):
        super().__init__()
        self.condition_scale = condition_scale
        self.embedding = nn.Embedding(num_codes + 1, width)
        rows = torch.randn(grid, 1, width)
        columns = torch.randn(1, grid, width)
        self.rows = nn.Parameter(0.02 * rows)
        self.columns = nn.Parameter(0.02 * columns)
        self.null = nn.Parameter(torch.zeros(condition_width))
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            self.blocks.append(Block(width, heads, conv_ratio, num_steps, condition_mode, condition_width))
        self.out = zero_init(nn.Linear(width, num_codes))

    def embed_condition(self, embedding: Tensor, dropped: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1, scaled for the blocks. Where dropped (B,): the null embedding."""
        scaled = self.condition_scale * embedding
        return torch.where(dropped[:, None], self.null, scaled)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x_t (B, N), t (B,) from 1 to T, condition (B, D) -> logits (B, N, K)."""
        position = (self.rows + self.columns).flatten(0, 1)  # (N, W)
        h = self.embedding(x_t) + position  # (B, N, W)
        for block in self.blocks:
            h = block(h, t, condition)
        return self.out(layer_norm(h))


class Block(nn.Module):
    """Self-attention, then two 3 x 3 convolutions on the grid, each after a modulated LayerNorm.

    The step modulates the one before attention. What the condition does is set by condition_mode:
      sta     the embedding's halves are scale and shift before the convolutions; nothing is learned
      adaln   learned projections to both scales and both shifts
      concat  one more token for self-attention to attend to
      cross   cross-attention to four tokens projected from it
    """

    def __init__(
        self,
        width: int,
        heads: int,
        conv_ratio: int,
        num_steps: int,
        condition_mode: str,  # sta | adaln | concat | cross
        condition_width: int,
    ):
        super().__init__()
        inner = conv_ratio * width
        self.heads = heads
        self.condition_mode = condition_mode
        self.by_time = nn.Embedding(num_steps, width)
        self.by_time_out = nn.Linear(width, 2 * width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = zero_init(nn.Linear(width, width))
        self.up = TokenConv2d(width, inner)
        self.down = zero_init(TokenConv2d(inner, width))
        if self.condition_mode == "adaln":
            self.by_condition = zero_init(nn.Linear(condition_width, 4 * width))
        elif self.condition_mode == "concat":
            self.by_condition = nn.Linear(condition_width, width)
        elif self.condition_mode == "cross":
            self.by_condition = nn.Linear(condition_width, 4 * width)
            self.cross_q = nn.Linear(width, width)
            self.cross_k = nn.Linear(width, width)
            self.cross_v = nn.Linear(width, width)
            self.cross_out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, W), t (B,), condition (B, D) -> (B, N, W)."""
        time = self.by_time(t - 1)
        time = F.silu(time)
        modulation = self.by_time_out(time)[:, None]  # (B, 1, 2 W)
        attn_scale, attn_shift = modulation.chunk(2, -1)
        conv_scale = 0
        conv_shift = 0
        if self.condition_mode == "sta":
            conv_scale, conv_shift = condition[:, None].chunk(2, -1)
        elif self.condition_mode == "adaln":
            modulation = self.by_condition(condition)[:, None]
            scale, shift, conv_scale, conv_shift = modulation.chunk(4, -1)
            attn_scale = attn_scale + scale
            attn_shift = attn_shift + shift

        h = modulate(x, attn_shift, attn_scale)
        context = h
        if self.condition_mode == "concat":
            token = self.by_condition(condition)[:, None]  # (B, 1, W)
            context = torch.cat([token, h], 1)
        q = self.q(h)
        k = self.k(context)
        v = self.v(context)
        h = multi_head_attention(q, k, v, self.heads)
        x = x + self.out(h)
        if self.condition_mode == "cross":
            x = x + self.cross_attention(x, condition)

        h = modulate(x, conv_shift, conv_scale)
        h = self.up(h)
        h = h * torch.sigmoid(1.702 * h)  # VQ-Diffusion's GELU2
        return x + self.down(h)

    def cross_attention(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.by_condition(condition)
        tokens = rearrange(tokens, "b (m w) -> b m w", m=4)
        q = self.cross_q(layer_norm(x))
        k = self.cross_k(tokens)
        v = self.cross_v(tokens)
        h = multi_head_attention(q, k, v, self.heads)
        return self.cross_out(h)


class TokenConv2d(nn.Linear):
    """A 3 x 3 convolution of tokens (B, N, C) on their square grid.

    Its weight is a matrix, (out, 9 in), so that Muon trains it too.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(9 * channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        kernel = self.weight.unflatten(1, (-1, 3, 3))
        grid = rearrange(x, "b (h w) c -> b c h w", h=side)
        grid = F.conv2d(grid, kernel, self.bias, padding=1)
        return rearrange(grid, "b c h w -> b (h w) c")


def modulate(x: Tensor, shift: Tensor | float, scale: Tensor | float) -> Tensor:
    """LayerNorm without weights, then AdaLN's shift and scale, (B, 1, W) or numbers."""
    x = layer_norm(x)
    return x * (1 + scale) + shift


def layer_norm(x: Tensor) -> Tensor:
    """Without weights."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,))


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of several heads: q (B, N, W), k, v (B, M, W) -> (B, N, W)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=heads)
    v = rearrange(v, "b n (h d) -> b h n d", h=heads)
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h n d -> b n (h d)")
