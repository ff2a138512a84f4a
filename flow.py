"""Both ways from noise to data: rectified flow for numbers, mask-and-replace diffusion for codes.

In this order: rectified flow; diffusion on codes and the Transformer that predicts them; the autoencoders
and codebooks that turn pictures into codes; the networks that look at pictures.
t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t noise, v = noise - x (Liu et al. 2022; so FLUX and SD3).
A network predicts v, or x, from which v follows; the loss is in v either way. Sampling goes from t = 1 to 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import audio
import pretrained
from config import Config, UserError
from device import widest_float


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x, noise (B, ...), t (B,) -> x_t (B, ...)."""
    t = expand(t, x)
    return (1 - t) * x + t * noise


def velocity(output: Tensor, x_t: Tensor, t: Tensor, predict: str, min_t: float) -> Tensor:
    """The network's output as a velocity.

    predict: "v", or "x": v = (x_t - x) / t. Clean data lies on a low-dimensional manifold and passes a narrow
    network; noise, which v contains, does not (Li, He 2025, arXiv 2511.13720). min_t bounds the division near
    the data.
    """
    if predict == "v":
        return output
    t = expand(t, x_t)
    return (x_t - output) / t.clamp_min(min_t)


def loss(v: Tensor, x: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Squared error of v (B, T, C), averaged over each clip's own valid frames, mask (B, T) -> (B,).

    A mean per clip, not per frame, so that ranks and micro-batches of any length average to the loss of the
    whole batch.
    """
    target = noise - x
    error = (v - target).square().mean(-1)  # (B, T)
    error = error * mask
    return error.sum(1) / mask.sum(1)


def sample_time(
    rng: np.random.Generator, mean: float, std: float, uniform: float, shift: float = 1.0
) -> float:
    """A training time: logit-normal (SD3), or, with probability `uniform`, uniform: so both ends are seen.

    It is then shifted by `shift_time`.
    """
    if rng.random() < uniform:
        t = rng.random()
    else:
        t = 1 / (1 + math.exp(-rng.normal(mean, std)))
    return shift_time(t, shift)


def shift_time(t, shift: float):
    """SD3's time shift a: t' = a t / (1 + (a - 1) t); above 1 it moves times towards the noise.

    source: arXiv 2403.03206, eq. 23
    """
    return shift * t / (1 + (shift - 1) * t)


def times(steps: int, sway: float = 0.0, shift: float = 1.0) -> Tensor:
    """The timesteps that sampling visits, (steps + 1,) from 1 to 0.

    sway: F5-TTS's coefficient s in [-1, 1]; negative bends the steps towards the noise (arXiv 2410.06885).
    shift: as in `shift_time`: above 1 spends more steps near the noise.
    """
    progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    bend = torch.cos(math.pi / 2 * progress) - 1 + progress
    progress = progress + sway * bend
    return shift_time(1 - progress, shift).float()


def euler(
    network: Callable,
    noise: Tensor,
    grid: Tensor,
    cfg_scale: float = 1.0,
    cfg_from: float = 0.0,
    cfg_to: float = 1.0,
) -> Tensor:
    """Integrate dx/dt = v along `grid` from noise (B, ...) to data, with classifier-free guidance.

    network(x_t, t) -> v. While cfg_from <= t <= cfg_to it is given 2 B rows, of which it must treat the
    second half as unconditional, else B conditional ones: guidance costs one call on a double batch, and
    nothing outside its interval (Ho, Salimans 2022).
    """
    x = noise
    timesteps = grid.tolist()
    for t, t_next in zip(timesteps[:-1], timesteps[1:]):
        guided = cfg_scale != 1 and cfg_from <= t <= cfg_to
        x_t = torch.cat([x, x]) if guided else x
        v = network(x_t, torch.full((len(x_t),), t, device=x.device))
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + cfg_scale * (conditional - unconditional)
        x = x + (t_next - t) * v
    return x


def overlapping(network: Callable, window: int) -> Callable:
    """A network of `window` tokens as one of 2, 3, 4, ... half windows, x_t (B, N, C), t (B,) -> v (B, N, C).

    It runs on windows that overlap by half; where two meet, v is the mean of theirs, faded from one to the
    other, at every step: so all of it becomes one piece (MultiDiffusion, arXiv 2302.08113).
    """

    def whole(x_t: Tensor, t: Tensor) -> Tensor:
        length = x_t.shape[1]
        middle = window / 2
        position = torch.arange(window, device=x_t.device) + 0.5
        fade = middle - (position - middle).abs()  # up, and down again
        fade = fade[:, None]  # (window, 1)
        v = torch.zeros_like(x_t)
        weight = x_t.new_zeros(length, 1)
        for start in range(0, length - window + 1, window // 2):
            part = slice(start, start + window)
            x_part = x_t[:, part]
            v[:, part] += fade * network(x_part, t)
            weight[part] += fade
        return v / weight

    return whole


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) with as many trailing ones as `like` has dimensions."""
    ones = [1] * (like.dim() - 1)
    return t.view(-1, *ones)


# Diffusion on codes x (B, N), 0 ... K - 1, in whole steps t = 0 ... T; at T almost all are MASK, code K.
# Source: VQ-Diffusion (arXiv 2111.14822), whose alpha_bar, beta_bar and gamma_bar are meant by these names.


class MaskReplace(nn.Module):
    """Mask-and-replace diffusion: at each step a code stays, is replaced by a random one, or by MASK.

    What is MASK stays MASK. The network predicts p0 = p(x_0 | x_t), (B, N, K); all else is in closed form,
    without the process's (K + 1)^2 matrices.
    """

    def __init__(self, codes: int, steps: int, mask_share: float):
        """codes: K. steps: T. mask_share: gamma_bar_T, the share of MASK at T; the rest is random codes.

        source: the schedules of microsoft/VQ-Diffusion, linear in t: alpha_bar from 0.99999 to 0.000009,
        gamma_bar from 0.000009 to gamma_bar_T
        """
        super().__init__()
        self.codes = codes
        self.steps = steps
        progress = torch.linspace(0, 1, steps, dtype=torch.float64)
        alpha_bar = 0.99999 + progress * (9e-6 - 0.99999)
        gamma_bar = 9e-6 + progress * (mask_share - 9e-6)
        # All (T + 1,), for t = 0 ... T: the probability that a code is untouched, is MASK, was replaced
        alpha_bar = torch.cat([progress.new_ones(1), alpha_bar])
        gamma_bar = torch.cat([progress.new_zeros(1), gamma_bar])
        k_beta_bar = 1 - alpha_bar - gamma_bar  # near 0 at the start
        self.register_buffer("kept", alpha_bar, persistent=False)
        self.register_buffer("masked", gamma_bar, persistent=False)
        self.register_buffer("k_beta_bar", k_beta_bar, persistent=False)

    def corrupt(self, x: Tensor, t: Tensor, u: Tensor, other: Tensor) -> Tensor:
        """x_t ~ q(x_t | x), (B, N), by what was drawn: u (B, N) uniform in [0, 1), other (B, N) random codes.

        t (B,): 0 ... T.
        """
        t = t[:, None]
        alpha_bar = self.kept[t]  # (B, 1)
        gamma_bar = self.masked[t]
        replaced = torch.where(u < 1 - alpha_bar, other, x)
        return torch.where(u < gamma_bar, self.codes, replaced)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,) -> alpha_bar_t, gamma_bar_t and K beta_bar_t, each (B, 1, 1)."""
        t = t[:, None, None]
        alpha_bar = self.kept[t]
        gamma_bar = self.masked[t]
        k_beta_bar = self.k_beta_bar[t]
        return alpha_bar, gamma_bar, k_beta_bar

    def posterior(self, p0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """p(x_s | x_t) where x_0 ~ p0 (B, N, K): (B, N, K + 1). t, s (B,): 0 <= s < t, neighbours or not.

        The sum over x_0 of q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) p0(x_0); it is normalised as it stands.
        """
        alpha_bar_t, gamma_bar_t, k_beta_bar_t = self.schedule(t)
        alpha_bar_s, gamma_bar_s, k_beta_bar_s = self.schedule(s)
        # The step from s to t. K beta is 1 - alpha - gamma, in a form without cancellation, for float32.
        alpha = alpha_bar_t / alpha_bar_s
        gamma = (gamma_bar_t - gamma_bar_s) / (1 - gamma_bar_s)
        numerator = alpha_bar_s * k_beta_bar_t - alpha_bar_t * k_beta_bar_s
        denominator = alpha_bar_s * (alpha_bar_s + k_beta_bar_s)
        k_beta = numerator / denominator
        codes = self.codes
        beta = k_beta / codes
        beta_bar_t = k_beta_bar_t / codes
        beta_bar_s = k_beta_bar_s / codes
        mask_to_code = gamma / gamma_bar_t
        mask_to_mask = gamma_bar_s / gamma_bar_t

        dtype = p0.dtype
        alpha = alpha.to(dtype)
        beta = beta.to(dtype)
        alpha_bar_t = alpha_bar_t.to(dtype)
        beta_bar_t = beta_bar_t.to(dtype)
        alpha_bar_s = alpha_bar_s.to(dtype)
        beta_bar_s = beta_bar_s.to(dtype)
        mask_to_code = mask_to_code.to(dtype)
        mask_to_mask = mask_to_mask.to(dtype)

        # Where x_t is a code: q(x_t | x_s) times the sum over x_0
        all_codes = torch.arange(codes, device=x_t.device)
        is_x_t = all_codes == x_t[..., None]  # (B, N, K)
        q_t = alpha_bar_t * is_x_t + beta_bar_t  # q(x_t | x_0)
        ratio = p0 / q_t
        ratio_sum = ratio.sum(-1, keepdim=True)
        sum_over_x_0 = alpha_bar_s * ratio + beta_bar_s * ratio_sum
        q_step = alpha * is_x_t + beta  # q(x_t | x_s)
        from_code = q_step * sum_over_x_0

        # Where x_t is MASK
        p_s = alpha_bar_s * p0 + beta_bar_s
        from_mask = mask_to_code * p_s
        is_mask = x_t == codes
        is_mask = is_mask[..., None]  # (B, N, 1)
        p_codes = torch.where(is_mask, from_mask, from_code)
        p_mask = is_mask * mask_to_mask
        return torch.cat([p_codes, p_mask], -1)

    def divergence(self, p0: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)) of each token, (B, N), nats.

        At t = 1 that is -log p0(x).
        """
        s = t - 1
        one_hot = F.one_hot(x, self.codes)
        q = self.posterior(one_hot.to(p0.dtype), x_t, t, s)
        p = self.posterior(p0, x_t, t, s)
        q_log_q = torch.xlogy(q, q)
        q_log_p = torch.xlogy(q, p.clamp_min(1e-30))
        return (q_log_q - q_log_p).sum(-1)

    def sample(
        self,
        network: Callable,
        u: Tensor,
        cfg_scale: float = 1.0,
        cfg_from: float = 0.0,
        cfg_to: float = 1.0,
        truncation: float = 1.0,
    ) -> Tensor:
        """Codes (B, N), a function of the uniform numbers u (strides + 1, B, N) alone.

        network(x_t, t) -> logits of p0 (rows, N, K), with as many rows as in `flow.euler`; guidance is on
        their log softmax.
        truncation: see `truncate`; 1 keeps all codes.
        """
        count, batch, tokens = u.shape
        timesteps = torch.linspace(self.steps, 0, count, device=u.device)
        timesteps = timesteps.round().long()
        gamma_bar = self.masked[-1].item()
        beta_bar = (1 - gamma_bar) / self.codes
        p = torch.full((self.codes + 1,), beta_bar, device=u.device)
        p[-1] = gamma_bar
        x = pick(p.expand(batch, tokens, -1), u[0])
        for n in range(1, count):
            t = timesteps[n - 1]
            s = timesteps[n]
            time = t / self.steps
            guided = cfg_scale != 1 and cfg_from <= time <= cfg_to
            x_t = torch.cat([x, x]) if guided else x
            rows = len(x_t)
            logits = network(x_t, t.expand(rows))
            log_p = logits.float().log_softmax(-1)
            if guided:
                conditional, unconditional = log_p.chunk(2)
                log_p = unconditional + cfg_scale * (conditional - unconditional)
                log_p = log_p.log_softmax(-1)
            p0 = truncate(log_p.exp(), truncation)
            t = t.expand(batch)
            s = s.expand(batch)
            p = self.posterior(p0, x, t, s)
            x = pick(p, u[n])
        return x


def truncate(p: Tensor, share: float) -> Tensor:
    """p (..., K) on the fewest codes that together have at least `share` of it, made to sum to 1."""
    if share >= 1:
        return p
    p, order = p.sort(-1, descending=True)
    before = p.cumsum(-1) - p
    p = p * (before < share)  # the first is always kept
    p = p / p.sum(-1, keepdim=True)
    unsorted = torch.zeros_like(p)
    return unsorted.scatter(-1, order, p)


def pick(p: Tensor, u: Tensor) -> Tensor:
    """p (..., K), uniform u (...) in [0, 1) -> a category (...), by inverting the cumulative distribution.

    So a draw is a function of one number.
    """
    wide = widest_float(p.device)
    u = u.to(wide)
    p = p.to(wide)
    cumulative = p.cumsum(-1)
    total = cumulative[..., -1:]
    threshold = u[..., None] * total
    category = (cumulative <= threshold).sum(-1)
    last = p.shape[-1] - 1
    return category.clamp_max(last)  # in float32 the threshold may be the total


class ImportantTimes(nn.Module):
    """Steps t drawn in proportion to sqrt(E[loss_t^2]), which lowers the variance of the bound's gradient.

    Its statistics are buffers, part of a checkpoint, the same on all ranks, and changed between updates of
    the weights only: so a resumed run, two ranks and accumulated micro-batches all draw what one long run of
    one process draws.

    source: arXiv 2102.09672, section 3.3
    """

    def __init__(self, steps: int):
        super().__init__()
        zeros = torch.zeros(steps, dtype=torch.float64)
        self.register_buffer("hits", zeros)
        self.register_buffer("squares", zeros.clone())  # running mean of squared losses
        self.register_buffer(
            "pending", torch.stack([zeros, zeros])
        )  # this update's hits, and sums of squares

    def draw(self, u: Tensor, new_update: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) uniform in [0, 1) -> t (B,) from 1 to T, and the probability of each, (B,).

        new_update (), bool: the weights have changed since the last call.
        """
        hits, square_sums = self.pending * new_update
        mean = square_sums / hits.clamp_min(1)
        average = 0.9 * self.squares + 0.1 * mean
        average = torch.where(self.hits > 0, average, mean)
        average = torch.where(hits > 0, average, self.squares)
        self.squares.copy_(average)
        self.hits.add_(hits)
        self.pending.mul_(~new_update)
        known = (self.hits > 10).all()
        weights = self.squares.sqrt() + 1e-4
        weights = torch.where(known, weights, 1.0)  # uniform until all are known
        p = weights / weights.sum()
        rows = p.expand(len(u), -1)
        index = pick(rows, u)
        return index + 1, p[index].float()

    @torch.no_grad()
    def learn(self, t: Tensor, loss: Tensor) -> None:
        """t, loss (B,): the loss at each step, from all ranks."""
        ones = torch.ones_like(loss)
        new = torch.stack([ones, loss.square()])  # (2, B)
        new = new.to(self.pending.dtype)
        sums = torch.zeros_like(self.pending)
        sums.index_add_(1, t - 1, new)
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.pending.add_(sums)


# The Transformer on codes


class Denoiser(nn.Module):
    """The Transformer that predicts p(x_0 | x_t) from codes, the step, and one embedding of the picture."""

    def __init__(self, config: Config, condition_width: int):
        """raises UserError for codes.condition sta where the embedding is not twice as wide as the network"""
        super().__init__()
        c = config.codes
        width = config.model.width
        if c.condition == "sta" and condition_width != 2 * width:
            raise UserError(
                f"codes.condition sta: model.width {width} must be half of the embeddings' "
                f"{condition_width}; or take adaln"
            )
        self.condition_scale = c.condition_scale or math.sqrt(condition_width)
        self.embedding = nn.Embedding(c.kept + 1, width)
        rows = torch.randn(c.grid, 1, width)
        columns = torch.randn(1, c.grid, width)
        self.rows = nn.Parameter(0.02 * rows)
        self.columns = nn.Parameter(0.02 * columns)
        self.null = nn.Parameter(torch.zeros(condition_width))
        self.blocks = nn.ModuleList()
        for _ in range(config.model.layers):
            block = CodeBlock(config, condition_width)
            self.blocks.append(block)
        self.out = zeroed(nn.Linear(width, c.kept))

    def condition(self, embedding: Tensor, dropped: Tensor) -> Tensor:
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


class CodeBlock(nn.Module):
    """Self-attention, then two 3 x 3 convolutions on the grid, each after a modulated LayerNorm.

    The step modulates the one before attention. What the condition does is set by codes.condition:
      sta     the embedding's halves are scale and shift before the convolutions; nothing is learned
      adaln   learned projections to both scales and both shifts
      concat  one more token for self-attention to attend to
      cross   cross-attention to four tokens projected from it
    """

    def __init__(self, config: Config, condition_width: int):
        super().__init__()
        c = config.codes
        width = config.model.width
        inner = c.conv_ratio * width
        self.heads = config.model.heads
        self.mode = c.condition
        self.by_time = nn.Embedding(c.diffusion_steps, width)
        self.by_time_out = nn.Linear(width, 2 * width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = zeroed(nn.Linear(width, width))
        self.up = GridConv(width, inner)
        self.down = zeroed(GridConv(inner, width))
        if self.mode == "adaln":
            self.by_condition = zeroed(nn.Linear(condition_width, 4 * width))
        elif self.mode == "concat":
            self.by_condition = nn.Linear(condition_width, width)
        elif self.mode == "cross":
            self.by_condition = nn.Linear(condition_width, 4 * width)
            self.cross_q = nn.Linear(width, width)
            self.cross_k = nn.Linear(width, width)
            self.cross_v = nn.Linear(width, width)
            self.cross_out = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, W), t (B,), condition (B, D) -> (B, N, W)."""
        time = self.by_time(t - 1)
        time = F.silu(time)
        modulation = self.by_time_out(time)[:, None]  # (B, 1, 2 W)
        attn_scale, attn_shift = modulation.chunk(2, -1)
        conv_scale = 0
        conv_shift = 0
        if self.mode == "sta":
            conv_scale, conv_shift = condition[:, None].chunk(2, -1)
        elif self.mode == "adaln":
            modulation = self.by_condition(condition)[:, None]
            scale, shift, conv_scale, conv_shift = modulation.chunk(4, -1)
            attn_scale = attn_scale + scale
            attn_shift = attn_shift + shift

        h = modulate(x, attn_scale, attn_shift)
        context = h
        if self.mode == "concat":
            token = self.by_condition(condition)[:, None]  # (B, 1, W)
            context = torch.cat([token, h], 1)
        q = self.q(h)
        k = self.k(context)
        v = self.v(context)
        h = attend(q, k, v, self.heads)
        x = x + self.out(h)
        if self.mode == "cross":
            x = x + self.cross_attention(x, condition)

        h = modulate(x, conv_scale, conv_shift)
        h = self.up(h)
        h = h * torch.sigmoid(1.702 * h)  # VQ-Diffusion's GELU2
        return x + self.down(h)

    def cross_attention(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens = self.by_condition(condition)
        tokens = rearrange(tokens, "b (m w) -> b m w", m=4)
        q = self.cross_q(layer_norm(x))
        k = self.cross_k(tokens)
        v = self.cross_v(tokens)
        h = attend(q, k, v, self.heads)
        return self.cross_out(h)


class GridConv(nn.Linear):
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


def modulate(x: Tensor, scale, shift) -> Tensor:
    """Scale and shift: (B, 1, W), or numbers."""
    x = layer_norm(x)
    return x * (1 + scale) + shift


def layer_norm(x: Tensor) -> Tensor:
    """Without weights."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of several heads: q (B, N, W), k, v (B, M, W) -> (B, N, W)."""
    q = rearrange(q, "b n (h d) -> b h n d", h=heads)
    k = rearrange(k, "b n (h d) -> b h n d", h=heads)
    v = rearrange(v, "b n (h d) -> b h n d", h=heads)
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h n d -> b n (h d)")


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The layer, zero-initialised: its output starts at 0."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


# Autoencoders of pictures and their codebooks


class Codebook(nn.Module):
    """Codes to pictures, by the used codes of an autoencoder's codebook."""

    def __init__(self, autoencoder: nn.Module, kept: Tensor):
        """kept (K,): rows of the autoencoder's codebook that codes 0 ... K - 1 stand for."""
        super().__init__()
        self.autoencoder = autoencoder
        used = autoencoder.book[kept]
        self.register_buffer("book", used.detach().clone())

    def decode(self, codes: Tensor) -> Tensor:
        """(B, N) -> (B, 3, H, W) in [0, 1]."""
        vectors = self.book[codes]
        pictures = self.autoencoder.decode(vectors)
        return pictures.clamp(0, 1)


class SmallVQ(nn.Module):
    """64 codes, each for 4 x 4 pixels, by finite scalar quantisation: three numbers of four levels.

    `encode` turns pictures (B, 3, H, W) in [0, 1] into vectors (B, N, d), whose codes are the nearest rows of
    book (K', d); `decode` turns such vectors back into pictures.

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


class PublishedVQ(nn.Module):
    """A VQModel of diffusers, with SmallVQ's methods."""

    def __init__(self, name: str):
        """name: a folder or hub id; the model may be in its vqvae/. raises UserError where there is none."""
        super().__init__()
        from diffusers import VQModel  # seconds to import

        is_alone = Path(name, "config.json").is_file()
        folder = "" if is_alone else "vqvae"
        self.vq = pretrained.load_frozen(VQModel, name, folder, "codes.vq", torch.device("cpu"))
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


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """The row numbers (n,) in book (K, d) of the codes nearest to vectors (n, d)."""
    distances = torch.cdist(vectors.float(), book.float())
    return distances.argmin(-1)


# Networks that look at pictures (B, 3, H, W) in [0, 1]


class ClipTower(nn.Module):
    """A CLIPVisionModelWithProjection: pictures (B, 3, H, W) -> embeddings (B, D) of length 1."""

    def __init__(self, name: str):
        """name: a folder or hub id."""
        super().__init__()
        model = transformers.CLIPVisionModelWithProjection
        self.clip = pretrained.load_frozen(model, name, "", "align.image", torch.device("cpu"))
        self.size = self.clip.config.image_size
        mean = torch.tensor(OPENAI_CLIP_MEAN)
        std = torch.tensor(OPENAI_CLIP_STD)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = resized(pictures, self.size)
        x = (x - self.mean) / self.std
        out = self.clip(x)
        return F.normalize(out.image_embeds.float(), dim=-1)


class SmallTower(nn.Sequential):
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
        x = 2 * resized(pictures, self.size) - 1
        embeddings = super().forward(x)
        return F.normalize(embeddings, dim=-1)


class Judge(nn.Module):
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
        x = 2 * resized(pictures, 32) - 1
        h = self.body(x)  # (B, 96, 8, 8)
        anywhere = h.amax((2, 3))
        in_cells = F.adaptive_avg_pool2d(h, 4).flatten(1)
        logits = self.out(torch.cat([anywhere, in_cells], 1))
        return logits.split(self.sizes, -1)


def label_parts(labels: Sequence[str]) -> list[list[str]]:
    """The values that each attribute of a label may have: colours, shapes and places of red-circle-left."""
    split = [label.split("-") for label in labels]
    try:
        columns = list(zip(*split, strict=True))
    except ValueError as e:
        raise UserError("codes.judge: the labels have not all as many parts; leave it out") from e
    return [sorted(set(values)) for values in columns]


def load_inception(name: str, device: torch.device) -> Callable:
    """The network that FID and IS are measured by.

    name: inception-2015-12-05.pt, the TorchScript file of the published figures | a CLIP, whose features give
    a distance of another kind, and which has no classes.
    returns: pictures (B, 3, H, W) in [0, 1] -> features for FID, (B, F), and class probabilities for IS,
    (B, C)
    """
    if not name.endswith(".pt"):
        clip = pretrained.Frozen(ClipTower(name)).to(device)

        def clip_features(pictures: Tensor) -> tuple[Tensor, Tensor]:
            no_classes = pictures.new_zeros(len(pictures), 0)
            return clip(pictures), no_classes

        return clip_features
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as e:
        reason = pretrained.brief(e)
        raise UserError(f"eval.features {name}: not a TorchScript file ({reason})") from e

    def inception(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (255 * pictures).round().to(torch.uint8)
        features = network(pixels, return_features=True)
        classes = network(pixels, no_output_bias=True)
        return features, classes

    return inception


def tower_width(name: str) -> int:
    """D, the width of an image tower's embeddings, which the speech's follows."""
    if name == "scratch":
        return SmallTower.width
    folder = pretrained.find_file(name, "config.json").parent
    return transformers.CLIPVisionConfig.from_pretrained(folder).projection_dim


# Pictures, and files of tensors


def resized(pictures: Tensor, size: int) -> Tensor:
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
    return audio.load_png(path)[0]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that prepare wrote."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(
            f"{path}: missing, or damaged and to be deleted; run `python system.py prepare --config ...`"
        ) from e


def restored(network: nn.Module, path: Path) -> pretrained.Frozen:
    """The network with the weights of a file, frozen."""
    network.load_state_dict(read(path))
    return pretrained.Frozen(network)
