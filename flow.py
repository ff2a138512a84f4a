"""Rectified flow: the path from noise to data, the velocity along it, its loss; times; Euler with guidance.

t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t noise, v = noise - x (Liu et al. 2022; so FLUX and SD3).
A network predicts v, or x, from which v follows; the loss is in v either way. Sampling goes from t = 1 to 0.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from config import UserError


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x, noise (B, ...), t (B,) -> x_t (B, ...)."""
    t = expand_dims(t, x)
    return (1 - t) * x + t * noise


def velocity(output: Tensor, x_t: Tensor, t: Tensor, predict: str, min_t: float) -> Tensor:
    """The network's output as a velocity.

    predict: "v", or "x": v = (x_t - x) / t. Clean data lies on a low-dimensional manifold and passes a narrow
    network; noise, which v contains, does not (Li, He 2025, arXiv 2511.13720). min_t bounds the division near
    the data.
    """
    if predict == "v":
        return output
    t = expand_dims(t, x_t)
    return (x_t - output) / t.clamp_min(min_t)


def loss(v: Tensor, x: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Squared error of v (B, T, C), averaged over each clip's own valid frames, mask (B, T) -> (B,).

    A mean per clip, not per frame, so that ranks and micro-batches of any length average to the loss of the
    whole batch.
    """
    target = noise - x
    error = (v - target).square().mean(-1)  # (B, T)
    return masked_mean(error, mask)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """The mean of error (B, N) where mask (B, N) is True, one a row: (B,)."""
    return (error * mask).sum(1) / mask.sum(1)


def loss_weight(t: Tensor, min_t: float) -> Tensor:
    """What the loss of v at t (B,) is multiplied by, so that errors of x count 1 / max(t, min_t)^2."""
    if min_t == 0:
        return torch.ones_like(t)
    return (t / min_t).clamp_max(1).square()


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


def timesteps(steps: int, sway: float = 0.0, shift: float = 1.0) -> Tensor:
    """The timesteps that sampling visits, (steps + 1,) from 1 to 0.

    sway: F5-TTS's coefficient s in [-1, 1]; negative bends the steps towards the noise (arXiv 2410.06885).
    shift: as in `shift_time`: above 1 spends more steps near the noise.
    """
    progress = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    bend = torch.cos(math.pi / 2 * progress) - 1 + progress
    progress = progress + sway * bend
    return shift_time(1 - progress, shift).float()


def sample_euler(
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
    nothing outside its interval (Ho, Salimans 2022). raises UserError where that is not finite.
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
    check_finite(x, "what was sampled")
    return x


def check_finite(x: Tensor, what: str) -> None:
    """raises UserError where `x` has a number that is none, of which silence or black would be made."""
    if not x.isfinite().all():
        raise UserError(
            f"{what} is not finite (nan or infinity): the weights, or the adapter's, are damaged; take others"
        )


def expand_dims(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) with as many trailing ones as `like` has dimensions."""
    ones = [1] * (like.dim() - 1)
    return t.view(-1, *ones)
