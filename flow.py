"""Both ways from noise to data, written once for every system: rectified flow for numbers, mask-and-replace for codes.

Top-down: the flow; the process on codes, the Transformer that predicts them; codebooks, which make codes of pictures; who looks at these.
t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t noise, v = noise - x (Liu et al. 2022; FLUX, SD3 and FluxMusic agree).
A network puts out v, or x, from which v follows; the loss is in v either way. Sampling walks t from 1 to 0.
Codes 0 ... K - 1 take whole steps t = 0 ... T; at T next to all are MASK, which is code K (VQ-Diffusion, arXiv 2111.14822).
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

import audio
import pretrained
from config import Config, UserError
from device import widest_float


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x, noise (B, ...), t (B,) -> x_t (B, ...)."""
    t = expand(t, x)
    return (1 - t) * x + t * noise


def velocity(output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, predict: str, min_t: float) -> torch.Tensor:
    """What the network put out, as a velocity.

    predict: "v", or "x": v = (x_t - x) / t. Clean data lies on a low-dimensional manifold and passes a narrow network; noise,
    which v contains, does not (Li, He 2025, arXiv 2511.13720). min_t bounds the division near the data.
    """
    return output if predict == "v" else (x_t - output) / expand(t, x_t).clamp_min(min_t)


def loss(v: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error of v (B, T, C), averaged over each clip's own valid frames, mask (B, T) -> (B,).

    A mean per clip, not per frame, so that ranks and micro-batches of any length average to the loss of the whole batch.
    """
    error = (v - (noise - x)).square().mean(-1) * mask
    return error.sum(1) / mask.sum(1)


def sample_time(rng: np.random.Generator, mean: float, std: float, uniform: float, shift: float = 1.0) -> float:
    """A training time: logit-normal (SD3), or, with probability `uniform`, uniform, so that both ends are seen; then shifted."""
    t = rng.random() if rng.random() < uniform else 1 / (1 + math.exp(-rng.normal(mean, std)))
    return shift_time(t, shift)


def shift_time(t, shift: float):
    """SD3's time shift a: t' = a t / (1 + (a - 1) t); above 1 it moves times towards the noise (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def times(steps: int, sway: float = 0.0, shift: float = 1.0) -> torch.Tensor:
    """The grid that sampling walks, (steps + 1,) from 1 to 0.

    sway: F5-TTS's coefficient s in [-1, 1]; negative bends the steps towards the noise (arXiv 2410.06885).
    shift: as `shift_time`: above 1 spends more steps near the noise.
    """
    progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    progress = progress + sway * (torch.cos(math.pi / 2 * progress) - 1 + progress)
    return shift_time(1 - progress, shift).float()


def euler(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, grid: torch.Tensor,
          cfg_scale: float = 1.0, cfg_from: float = 0.0, cfg_to: float = 1.0) -> torch.Tensor:
    """Integrate dx/dt = v along `grid` from noise (B, ...) to data, with classifier-free guidance (Ho, Salimans 2022).

    network(x_t, t) -> v. While cfg_from <= t <= cfg_to it is given 2 B rows, of which it must treat the second half as
    unconditional, else B conditional ones: guidance costs one call on a double batch, and nothing outside its interval.
    """
    x = noise
    for t, t_next in zip(grid[:-1].tolist(), grid[1:].tolist()):
        guided = cfg_scale != 1 and cfg_from <= t <= cfg_to
        x_t = torch.cat([x, x]) if guided else x
        v = network(x_t, torch.full((len(x_t),), t, device=x.device))
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + cfg_scale * (conditional - unconditional)
        x = x + (t_next - t) * v
    return x


def overlapping(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], window: int) -> Callable:
    """A network of `window` tokens as one of 2, 3, 4, ... halves of a window, x_t (B, N, C), t (B,) -> v (B, N, C).

    It sees stretches that overlap by half; where two meet, v is the mean of theirs, faded from one to the other, at every step: so
    all of it becomes one piece (MultiDiffusion, arXiv 2302.08113).
    """
    def whole(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        fade = window / 2 - (torch.arange(window, device=x_t.device)[:, None] + 0.5 - window / 2).abs()        # up, and down again
        v, weight = torch.zeros_like(x_t), x_t.new_zeros(x_t.shape[1], 1)
        for start in range(0, x_t.shape[1] - window + 1, window // 2):
            v[:, start:start + window] += fade * network(x_t[:, start:start + window], t)
            weight[start:start + window] += fade
        return v / weight

    return whole


def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) with as many trailing ones as `like` has dimensions."""
    return t.view(-1, *[1] * (like.dim() - 1))


# The process on codes

class MaskReplace(nn.Module):
    """The process on codes x (B, N): step by step a code stays, becomes any other, or MASK, which it then remains.

    The network predicts p0 = p(x_0 | x_t), (B, N, K); all else about the process is in closed form, without its (K + 1)^2 matrices.
    """

    def __init__(self, codes: int, steps: int, mask_share: float):
        """codes: K. steps: T. mask_share: gamma_T, how many codes are MASK at T; the others there are random codes.

        source: the schedules of microsoft/VQ-Diffusion, linear in t from 0.99999 kept to 0.000009, and from 0.000009 masked to gamma_T.
        """
        super().__init__()
        self.codes, self.steps = codes, steps
        part = torch.linspace(0, 1, steps, dtype=torch.float64)
        kept, masked = 0.99999 + part * (9e-6 - 0.99999), 9e-6 + part * (mask_share - 9e-6)
        self.register_buffer("kept", torch.cat([part.new_ones(1), kept]), persistent=False)          # (T + 1,): not touched since 0
        self.register_buffer("masked", torch.cat([part.new_zeros(1), masked]), persistent=False)     # (T + 1,)
        self.register_buffer("redrawn", 1 - self.kept - self.masked, persistent=False)       # (T + 1,); near 0 at the start

    def corrupt(self, x: torch.Tensor, t: torch.Tensor, u: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """x_t ~ q(x_t | x), (B, N), by what was drawn: u (B, N) uniform in [0, 1), other (B, N) random codes. t (B,): 0 ... T."""
        masked, kept = self.masked[t][:, None], self.kept[t][:, None]
        return torch.where(u < masked, self.codes, torch.where(u < 1 - kept, other, x))

    def posterior(self, p0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """p(x_s | x_t) where x_0 ~ p0 (B, N, K): (B, N, K + 1). t, s (B,): 0 <= s < t, neighbours or not.

        The sum over x_0 of q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) p0(x_0), which is normalised as it stands.
        """
        kept_t, masked_t, redrawn_t = (table[t][:, None, None] for table in (self.kept, self.masked, self.redrawn))
        kept_s, masked_s, redrawn_s = (table[s][:, None, None] for table in (self.kept, self.masked, self.redrawn))
        keep = kept_t / kept_s                                                           # from s to t
        mask = (masked_t - masked_s) / (1 - masked_s)
        redrawn = (kept_s * redrawn_t - kept_t * redrawn_s) / (kept_s * (kept_s + redrawn_s))       # 1 - keep - mask, also in float32
        swap, swap_t, swap_s = redrawn / self.codes, redrawn_t / self.codes, redrawn_s / self.codes
        keep, swap, swap_t, kept_t, swap_s, kept_s = (c.to(p0.dtype) for c in (keep, swap, swap_t, kept_t, swap_s, kept_s))
        same = torch.arange(self.codes, device=x_t.device) == x_t[..., None]             # (B, N, K)
        ratio = p0 / (kept_t * same + swap_t)                                            # p0 / q(x_t | x_0)
        shown = (keep * same + swap) * (kept_s * ratio + swap_s * ratio.sum(-1, keepdim=True))
        hidden = (mask / masked_t).to(p0.dtype) * (kept_s * p0 + swap_s)
        is_mask = (x_t == self.codes)[..., None]
        still = is_mask * (masked_s / masked_t).to(p0.dtype)
        return torch.cat([torch.where(is_mask, hidden, shown), still], -1)

    def divergence(self, p0: torch.Tensor, x: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)) of each token, (B, N), nats; at t = 1 that is -log p0(x)."""
        truth = F.one_hot(x, self.codes).to(p0.dtype)
        q, p = (self.posterior(each, x_t, t, t - 1) for each in (truth, p0))
        return (torch.xlogy(q, q) - torch.xlogy(q, p.clamp_min(1e-30))).sum(-1)

    def sample(self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], u: torch.Tensor, cfg_scale: float = 1.0,
               cfg_from: float = 0.0, cfg_to: float = 1.0, truncation: float = 1.0) -> torch.Tensor:
        """Codes (B, N) by the uniform numbers u (steps + 1, B, N) alone: T is walked in that many strides.

        network(x_t, t) -> logits of p0 (rows, N, K), with as many rows as in `euler`; guidance is on their logarithms.
        truncation: of each p0 only the likeliest codes that make this share of it are kept.
        """
        grid = torch.linspace(self.steps, 0, len(u), device=u.device).round().long()
        start = torch.full((self.codes + 1,), (1 - self.masked[-1].item()) / self.codes, device=u.device)
        start[-1] = self.masked[-1]
        x = pick(start.expand(*u.shape[1:], -1), u[0])
        for t, s, now in zip(grid[:-1], grid[1:], u[1:]):
            guided = cfg_scale != 1 and cfg_from <= t / self.steps <= cfg_to
            x_t = torch.cat([x, x]) if guided else x
            log_p = network(x_t, t.expand(len(x_t))).float().log_softmax(-1)
            if guided:
                conditional, unconditional = log_p.chunk(2)
                log_p = (unconditional + cfg_scale * (conditional - unconditional)).log_softmax(-1)
            x = pick(self.posterior(truncate(log_p.exp(), truncation), x, t.expand(len(x)), s.expand(len(x))), now)
        return x


def truncate(p: torch.Tensor, share: float) -> torch.Tensor:
    """p (..., K) on the fewest codes that together have at least `share` of it, made to sum to 1."""
    if share >= 1:
        return p
    ordered, order = p.sort(-1, descending=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < share)    # the first is always kept
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def pick(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """p (..., K), uniform u (...) in [0, 1) -> a category (...), by the inverse of the distribution: one number, one draw."""
    wide = widest_float(p.device)
    below = p.to(wide).cumsum(-1)
    found = (below <= u.to(wide)[..., None] * below[..., -1:]).sum(-1)
    return found.clamp_max(p.shape[-1] - 1)                    # in float32 u times the sum may be the sum


class ImportantTimes(nn.Module):
    """Steps t drawn in proportion to sqrt(E[loss_t^2]), which makes the bound's gradient quieter (arXiv 2102.09672, section 3.3).

    What it has seen are buffers, part of a checkpoint, the same on all ranks, and changed between updates of the weights only:
    so a resumed run, two ranks and accumulated micro-batches all draw what one long run of one process draws.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.register_buffer("hits", torch.zeros(steps, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(steps, dtype=torch.float64))         # mean of squared losses
        self.register_buffer("pending", torch.zeros(2, steps, dtype=torch.float64))      # this update's hits, and sums of squares

    def draw(self, u: torch.Tensor, new_update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u (B,) uniform in [0, 1) -> t (B,) from 1 to T, and how likely each was, (B,). new_update (), bool: weights have changed."""
        hits, sums = self.pending * new_update
        mean = sums / hits.clamp_min(1)
        self.squares.copy_(torch.where(hits > 0, torch.where(self.hits > 0, 0.9 * self.squares + 0.1 * mean, mean), self.squares))
        self.hits.add_(hits)
        self.pending.mul_(~new_update)
        p = torch.where((self.hits > 10).all(), self.squares.sqrt() + 1e-4, 1.0)         # uniform until all are known
        p = p / p.sum()
        t = pick(p.expand(len(u), -1), u)
        return t + 1, p[t].float()

    @torch.no_grad()
    def learn(self, t: torch.Tensor, loss: torch.Tensor) -> None:
        """t, loss (B,): what each step's loss was, on all ranks."""
        seen = torch.stack([torch.ones_like(loss), loss.square()])
        found = torch.zeros_like(self.pending).index_add_(1, t - 1, seen.to(self.pending.dtype))
        if dist.is_initialized():
            dist.all_reduce(found)
        self.pending.add_(found)


# The Transformer on codes

class Denoiser(nn.Module):
    """The Transformer that predicts p(x_0 | x_t) from codes, the step, and one vector that describes the picture."""

    def __init__(self, config: Config, condition_width: int):
        """raises UserError for codes.condition sta where the vector is not twice as wide as the network."""
        super().__init__()
        c, m = config.codes, config.model
        if c.condition == "sta" and condition_width != 2 * m.width:
            raise UserError(f"codes.condition sta: model.width {m.width} must be half of the embeddings' {condition_width}; or take adaln")
        self.scale = c.condition_scale or math.sqrt(condition_width)
        self.embedding = nn.Embedding(c.kept + 1, m.width)
        self.rows, self.columns = (nn.Parameter(0.02 * torch.randn(*shape, m.width)) for shape in ((c.grid, 1), (1, c.grid)))
        self.null = nn.Parameter(torch.zeros(condition_width))
        self.blocks = nn.ModuleList(CodeBlock(config, condition_width) for _ in range(m.layers))
        self.out = zeroed(nn.Linear(m.width, c.kept))

    def condition(self, embedding: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of length 1 as the blocks want them; a learned vector instead where dropped (B,)."""
        return torch.where(dropped[:, None], self.null, self.scale * embedding)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x_t (B, N), t (B,) from 1 to T, condition (B, D) -> logits (B, N, K)."""
        h = self.embedding(x_t) + (self.rows + self.columns).flatten(0, 1)               # (B, N, W)
        for block in self.blocks:
            h = block(h, t, condition)
        return self.out(F.layer_norm(h, h.shape[-1:]))


class CodeBlock(nn.Module):
    """Self-attention, then two 3 x 3 convolutions on the grid, each after a LayerNorm that is modulated.

    By the step, before attention; by the condition as codes.condition says: sta: halves of the embedding are scale and shift before the
    convolutions, nothing is learned; adaln: learned projections to both scales and shifts; concat: one more token to attend to;
    cross: attention of its own to four tokens made of it.
    """

    def __init__(self, config: Config, condition_width: int):
        super().__init__()
        c, width, self.heads, self.mode = config.codes, config.model.width, config.model.heads, config.codes.condition
        self.by_time = nn.Embedding(c.diffusion_steps, width)
        self.by_time_out = nn.Linear(width, 2 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = zeroed(nn.Linear(width, width))
        self.up, self.down = GridConv(width, c.conv_ratio * width), zeroed(GridConv(c.conv_ratio * width, width))
        if self.mode == "adaln":
            self.by_condition = zeroed(nn.Linear(condition_width, 4 * width))
        if self.mode in ("concat", "cross"):
            self.by_condition = nn.Linear(condition_width, width if self.mode == "concat" else 4 * width)
        if self.mode == "cross":
            self.cross_q, self.cross_k, self.cross_v = (nn.Linear(width, width) for _ in range(3))
            self.cross_out = zeroed(nn.Linear(width, width))

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x (B, N, W), t (B,), condition (B, D) -> (B, N, W)."""
        scale, shift = self.by_time_out(F.silu(self.by_time(t - 1)))[:, None].chunk(2, -1)             # (B, 1, W)
        grid_scale, grid_shift = condition[:, None].chunk(2, -1) if self.mode == "sta" else (0, 0)
        if self.mode == "adaln":
            more_scale, more_shift, grid_scale, grid_shift = self.by_condition(condition)[:, None].chunk(4, -1)
            scale, shift = scale + more_scale, shift + more_shift
        h = modulate(x, scale, shift)
        tokens = self.by_condition(condition).unflatten(-1, (-1, x.shape[-1])) if self.mode in ("concat", "cross") else h[:, :0]
        seen = torch.cat([tokens, h], 1) if self.mode == "concat" else h
        x = x + self.out(attend(self.q(h), self.k(seen), self.v(seen), self.heads))
        if self.mode == "cross":
            x = x + self.cross_out(attend(self.cross_q(modulate(x, 0, 0)), self.cross_k(tokens), self.cross_v(tokens), self.heads))
        h = self.up(modulate(x, grid_scale, grid_shift))
        return x + self.down(h * torch.sigmoid(1.702 * h))                                         # VQ-Diffusion's GELU2


class GridConv(nn.Linear):
    """A 3 x 3 convolution of tokens (B, N, C) on their square grid; its weight is a matrix, (out, 9 in), so that Muon trains it too."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(9 * channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = rearrange(x, "b (h w) c -> b c h w", h=math.isqrt(x.shape[1]))
        return rearrange(F.conv2d(grid, self.weight.view(len(self.weight), -1, 3, 3), self.bias, padding=1), "b c h w -> b (h w) c")


def modulate(x: torch.Tensor, scale, shift) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=heads) for part in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def zeroed(linear: nn.Linear) -> nn.Linear:
    """A layer that starts by saying nothing."""
    linear.load_state_dict({name: torch.zeros_like(value) for name, value in linear.state_dict().items()})
    return linear


# Codebooks

class Codebook(nn.Module):
    """Codes to pictures."""

    def __init__(self, autoencoder: nn.Module, kept: torch.Tensor):
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("book", autoencoder.book[kept].detach().clone())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, 3, H, W) in [0, 1]."""
        return self.autoencoder.pictures(self.book[codes]).clamp(0, 1)


class SmallVQ(nn.Module):
    """64 codes, each for 4 x 4 pixels, by finite scalar quantisation (arXiv 2309.15505): three numbers of four levels.

    Pictures (B, 3, H, W) in [0, 1] become features (B, N, d), whose nearest rows of book (K', d) are their codes, and these pictures again.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        w, act, conv = width, nn.SiLU(), functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        half, double = functools.partial(nn.Conv2d, kernel_size=4, stride=2, padding=1), nn.PixelShuffle(2)
        self.encoder = nn.Sequential(half(3, w), act, half(w, 2 * w), act, conv(2 * w, 4 * w), act, nn.Conv2d(4 * w, 3, 1), nn.Tanh())
        self.decoder = nn.Sequential(conv(3, 4 * w), act, conv(4 * w, 8 * w), double, act, conv(2 * w, 4 * w), double, act, conv(w, 3))
        self.register_buffer("book", torch.cartesian_prod(*[torch.linspace(-1, 1, 4)] * 3))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.encoder(pictures).flatten(2).transpose(1, 2)

    def pictures(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.decoder(rearrange(vectors, "b (h w) d -> b d h w", h=math.isqrt(vectors.shape[1])))


class PublishedVQ(nn.Module):
    """A VQModel of diffusers; name: a folder or hub id, in whose vqvae/ it lies. Methods as SmallVQ's."""

    def __init__(self, name: str):
        """raises UserError for one that cannot be had."""
        super().__init__()
        from diffusers import VQModel          # seconds to import
        part = "" if Path(name, "config.json").is_file() else "vqvae"
        self.vq = pretrained.load_frozen(VQModel, name, part, "codes.vq", torch.device("cpu"))
        self.register_buffer("book", self.vq.quantize.embedding.weight.detach())

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.vq.encode(2 * pictures - 1).latents.flatten(2).transpose(1, 2)

    def pictures(self, vectors: torch.Tensor) -> torch.Tensor:
        vectors = rearrange(vectors, "b (h w) d -> b d h w", h=math.isqrt(vectors.shape[1])).contiguous()
        spatial = vectors if self.vq.config.norm_type == "spatial" else None
        return (self.vq.decoder(self.vq.post_quant_conv(vectors), spatial) + 1) / 2


def nearest(vectors: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Numbers (n,) of the rows of book (K, d) nearest to vectors (n, d)."""
    return torch.cdist(vectors.float(), book.float()).argmin(-1)


# Who looks at pictures (B, 3, H, W) in [0, 1]

class ClipTower(nn.Module):
    """A CLIPVisionModelWithProjection."""

    def __init__(self, name: str):
        super().__init__()
        self.clip = pretrained.load_frozen(transformers.CLIPVisionModelWithProjection, name, "", "align.image", torch.device("cpu"))
        self.size = self.clip.config.image_size
        scale = torch.tensor([transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD])
        self.register_buffer("scale", scale[:, :, None, None], persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.clip((resized(pictures, self.size) - self.scale[0]) / self.scale[1]).image_embeds.float(), dim=-1)


class SmallTower(nn.Sequential):
    """CLIP's stand-in, for pictures as small as 32 x 32."""

    size, width = 32, 256

    def __init__(self):
        convs = [layer for a, b in ((3, 32), (32, 64), (64, 128)) for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU())]
        super().__init__(*convs, nn.Flatten(), nn.Linear(128 * 4 * 4, self.width))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(2 * resized(pictures, self.size) - 1), dim=-1)


class Judge(nn.Module):
    """What a picture shows, by the parts of its label, as colour, shape and place; it sees 32 x 32 pixels."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__()
        self.sizes = list(sizes)
        act = nn.SiLU()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), act, nn.Conv2d(32, 64, 3, 2, 1), act, nn.Conv2d(64, 96, 3, 1, 1), act)
        self.out = nn.Linear(96 * 17, sum(sizes))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, H, W) -> scores (B, n) of each part's n names: by what is anywhere, and by what is where."""
        h = self.body(2 * resized(pictures, 32) - 1)
        return self.out(torch.cat([h.amax((2, 3)), F.adaptive_avg_pool2d(h, 4).flatten(1)], 1)).split(self.sizes, -1)


def label_parts(labels: Sequence[str]) -> list[list[str]]:
    """The names that each part of a label may have: colours, shapes and places of red-circle-left."""
    try:
        return [sorted(set(names)) for names in zip(*(label.split("-") for label in labels), strict=True)]
    except ValueError as e:
        raise UserError("codes.judge: the labels have not all as many parts; leave it out") from e


def load_inception(name: str, device: torch.device) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Pictures (B, 3, H, W) in [0, 1] -> what FID is of, (B, F), and the shares of classes (B, C) that IS is of.

    name: inception-2015-12-05.pt, the TorchScript file of the published figures | a CLIP, for a distance of another kind, and no classes.
    """
    if not name.endswith(".pt"):
        clip = pretrained.Frozen(ClipTower(name)).to(device)
        return lambda pictures: (clip(pictures), pictures.new_zeros(len(pictures), 0))
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"eval.features {name}: not a TorchScript file ({pretrained.brief(e)})") from e

    def look(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return network(pixels, return_features=True), network(pixels, no_output_bias=True)

    return lambda pictures: look((255 * pictures).round().to(torch.uint8))


def resized(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """The middle (..., 3, size, size) of pictures (..., 3, H, W), whose shorter side is scaled to `size`."""
    height, width = pictures.shape[-2:]
    if min(height, width) != size:
        scaled = [max(size, round(side * size / min(height, width))) for side in (height, width)]
        flat = F.interpolate(pictures.reshape(-1, 3, height, width), scaled, mode="bicubic", antialias=True).clamp(0, 1)
        pictures = flat.view(*pictures.shape[:-2], *scaled)
    top, left = ((side - size) // 2 for side in pictures.shape[-2:])
    return pictures[..., top:top + size, left:left + size]


def tower_width(name: str) -> int:
    """D of an image tower, which the speech's follows."""
    if name == "scratch":
        return SmallTower.width
    return transformers.CLIPVisionConfig.from_pretrained(pretrained.find_file(name, "config.json").parent).projection_dim


@functools.lru_cache(maxsize=2000)
def read_picture(path: str) -> torch.Tensor:
    """(3, H, W) in [0, 1]; raises UserError for what is no picture."""
    return audio.load_png(path)[0]


def read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: missing, or damaged and to be deleted; run `python system.py prepare --config ...`") from e


def restored(network: nn.Module, path: Path) -> pretrained.Frozen:
    network.load_state_dict(read(path))
    return pretrained.Frozen(network)
