"""Discrete diffusion on codes x (B, N), 0 ... K - 1: mask-and-replace, and which of its steps are trained.

Steps are whole, t = 0 ... T; at t = 0 x is data, at T almost all of it is MASK, which is code K. Source:
VQ-Diffusion (arXiv 2111.14822), whose alpha_bar, beta_bar and gamma_bar are meant by these names.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from device import widest_float
from flow import check_finite


class MaskAndReplaceDiffusion(nn.Module):
    """Mask-and-replace diffusion: at each step a code stays, is replaced by a random one, or by MASK.

    What is MASK stays MASK. The network predicts p0 = p(x_0 | x_t), (B, N, K); all else is in closed form,
    without the process's (K + 1)^2 matrices.
    """

    def __init__(self, num_codes: int, num_steps: int, mask_share: float):
        """num_codes: K; num_steps: T; mask_share: gamma_bar_T, of MASK at T, where the rest is random codes.

        source: the schedules of microsoft/VQ-Diffusion, linear in t: alpha_bar from 0.99999 to 0.000009,
        gamma_bar from 0.000009 to gamma_bar_T
        """
        super().__init__()
        self.num_codes = num_codes
        self.num_steps = num_steps
        progress = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        alpha_bar = 0.99999 + progress * (9e-6 - 0.99999)
        gamma_bar = 9e-6 + progress * (mask_share - 9e-6)
        # All (T + 1,), for t = 0 ... T: the probability that a code is untouched, is MASK, was replaced
        alpha_bar = torch.cat([progress.new_ones(1), alpha_bar])
        gamma_bar = torch.cat([progress.new_zeros(1), gamma_bar])
        k_beta_bar = 1 - alpha_bar - gamma_bar  # near 0 at the start
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("gamma_bar", gamma_bar, persistent=False)
        self.register_buffer("k_beta_bar", k_beta_bar, persistent=False)

    def q_sample(self, x: Tensor, t: Tensor, u: Tensor, other: Tensor) -> Tensor:
        """x_t ~ q(x_t | x), (B, N), by what was drawn: u (B, N) uniform in [0, 1), other (B, N) random codes.

        t (B,): 0 ... T.
        """
        t = t[:, None]
        alpha_bar = self.alpha_bar[t]  # (B, 1)
        gamma_bar = self.gamma_bar[t]
        replaced = torch.where(u < 1 - alpha_bar, other, x)
        return torch.where(u < gamma_bar, self.num_codes, replaced)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,) -> alpha_bar_t, gamma_bar_t and K beta_bar_t, each (B, 1, 1)."""
        t = t[:, None, None]
        alpha_bar = self.alpha_bar[t]
        gamma_bar = self.gamma_bar[t]
        k_beta_bar = self.k_beta_bar[t]
        return alpha_bar, gamma_bar, k_beta_bar

    def q_posterior(self, p0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
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
        codes = self.num_codes
        beta = k_beta / codes
        beta_bar_t = k_beta_bar_t / codes
        beta_bar_s = k_beta_bar_s / codes
        mask_to_code = gamma / gamma_bar_t
        mask_to_mask = gamma_bar_s / gamma_bar_t

        # From the schedule's precision to the network's
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

    def kl(self, p0: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)) of each token, (B, N), nats.

        At t = 1 that is -log p0(x).
        """
        s = t - 1
        one_hot = F.one_hot(x, self.num_codes)
        q = self.q_posterior(one_hot.to(p0.dtype), x_t, t, s)
        p = self.q_posterior(p0, x_t, t, s)
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

        network(x_t, t) -> logits of p0 (rows, N, K), with as many rows as in `flow.sample_euler`;
        guidance is on their log softmax.
        truncation: see `truncate`; 1 keeps all codes.
        """
        count, batch, tokens = u.shape
        timesteps = torch.linspace(self.num_steps, 0, count, device=u.device)
        timesteps = timesteps.round().long()
        gamma_bar = self.gamma_bar[-1].item()
        beta_bar = (1 - gamma_bar) / self.num_codes
        p = torch.full((self.num_codes + 1,), beta_bar, device=u.device)
        p[-1] = gamma_bar
        x = sample_categorical(p.expand(batch, tokens, -1), u[0])
        for n in range(1, count):
            t = timesteps[n - 1]
            s = timesteps[n]
            time = t / self.num_steps
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
            p = self.q_posterior(p0, x, t, s)
            x = sample_categorical(p, u[n])
        check_finite(p, "what was sampled")
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


def sample_categorical(p: Tensor, u: Tensor) -> Tensor:
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


class LossSecondMomentResampler(nn.Module):
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
        # this update's hits, and sums of squares
        self.register_buffer("pending", torch.stack([zeros, zeros]))

    def sample(self, u: Tensor, new_update: Tensor) -> tuple[Tensor, Tensor]:
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
        index = sample_categorical(rows, u)
        return index + 1, p[index].float()

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        """t, loss (B,): the loss at each step, from all ranks."""
        ones = torch.ones_like(loss)
        new = torch.stack([ones, loss.square()])  # (2, B)
        new = new.to(self.pending.dtype)
        sums = torch.zeros_like(self.pending)
        sums.index_add_(1, t - 1, new)
        if dist.is_initialized():
            dist.all_reduce(sums)
        self.pending.add_(sums)
