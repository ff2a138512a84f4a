"""Rectified flow, written once for every system.

t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t noise, v = noise - x (Liu et al. 2022; FLUX, SD3 and FluxMusic agree).
A network puts out v, or x, from which v follows; the loss is in v either way. Sampling walks t from 1 to 0.
"""

import math
from collections.abc import Callable

import numpy as np
import torch


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


def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) with as many trailing ones as `like` has dimensions."""
    return t.view(-1, *[1] * (like.dim() - 1))
