"""Discrete diffusion on codes: closed forms beside products of matrices, and the sampling of steps."""

import pytest
import torch

import device
from config import UserError
from speech2image import diffusion

CASES = [(6, 12, 0.99999), (6, 12, 0.9), (3, 5, 0.5)]  # K, T, gamma_T


def matrices(process: diffusion.MaskAndReplaceDiffusion) -> torch.Tensor:
    """q(x_t | x_{t-1}) for t = 1 ... T, (T, K + 1, K + 1), rows from, columns to, made from the cumulative
    schedule alone.
    """
    k, kept, masked = process.num_codes, process.alpha_bar, process.gamma_bar
    made = []
    for t in range(1, process.num_steps + 1):
        keep, mask = kept[t] / kept[t - 1], 1 - (1 - masked[t]) / (1 - masked[t - 1])
        q = torch.eye(k + 1, dtype=torch.float64)
        q[:k, :k] = keep * torch.eye(k, dtype=torch.float64) + (1 - keep - mask) / k
        q[:k, k] = mask
        made.append(q)
    return torch.stack(made)


def brute_force(
    process: diffusion.MaskAndReplaceDiffusion, p0: torch.Tensor, x_t: int, t: int, s: int
) -> torch.Tensor:
    """p(x_s | x_t) (K + 1,) by Bayes, from products of matrices."""
    steps = matrices(process)
    to_s = torch.linalg.multi_dot(
        [torch.eye(process.num_codes + 1, dtype=torch.float64)] * 2 + list(steps[:s])
    )
    onward = torch.linalg.multi_dot(
        [torch.eye(process.num_codes + 1, dtype=torch.float64)] * 2 + list(steps[s:t])
    )
    joint = to_s[:-1] * onward[:, x_t]  # (K, K + 1): x_0, x_s
    return p0.double() @ (joint / joint.sum(1, keepdim=True))


@pytest.mark.parametrize("codes, steps, mask_share", CASES)
def test_the_posterior_is_that_of_the_matrices_for_neighbours_and_for_strides(codes, steps, mask_share):
    process, worst = diffusion.MaskAndReplaceDiffusion(codes, steps, mask_share), 0.0
    p0 = torch.randn(1, codes + 1, codes, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    x_t = torch.arange(codes + 1)[None]  # every code once, and MASK
    for t, s in ((1, 0), (2, 1), (steps, steps - 1), (steps, 0), (steps // 2 + 1, 1), (steps - 1, 2)):
        found = process.q_posterior(p0, x_t, torch.tensor([t]), torch.tensor([s]))[0]
        wanted = torch.stack([brute_force(process, p0[0, n], n, t, s) for n in range(codes + 1)])
        worst = max(worst, (found - wanted).abs().max().item())
    assert worst < 1e-5


def test_the_posterior_is_that_of_diffusers_scheduler():
    from diffusers import VQDiffusionScheduler

    codes, steps = 7, 100
    process, generator = (
        diffusion.MaskAndReplaceDiffusion(codes, steps, 0.99999),
        torch.Generator().manual_seed(1),
    )
    theirs = VQDiffusionScheduler(num_vec_classes=codes + 1, num_train_timesteps=steps)
    p0 = torch.randn(2, 16, codes, generator=generator).softmax(-1)
    x_t = torch.randint(codes + 1, (2, 16), generator=generator)
    for t in (1, 2, 50, 99):
        log_p0 = p0.log().transpose(1, 2)  # theirs is (B, K, N), and counts steps from 0
        wanted = theirs.q_posterior(log_p0, x_t, torch.tensor([t])).exp().transpose(1, 2)
        found = process.q_posterior(p0, x_t, torch.tensor([t + 1] * 2), torch.tensor([t] * 2))
        assert torch.allclose(found, wanted, atol=3e-5), t


@pytest.mark.parametrize("codes, steps, mask_share", CASES)
def test_corrupted_codes_are_spread_as_the_products_of_the_matrices_say(codes, steps, mask_share):
    process, generator, n = (
        diffusion.MaskAndReplaceDiffusion(codes, steps, mask_share),
        torch.Generator().manual_seed(2),
        200_000,
    )
    u, other = torch.rand(1, n, generator=generator), torch.randint(codes, (1, n), generator=generator)
    product = torch.eye(codes + 1, dtype=torch.float64)
    for t, step in enumerate(matrices(process), 1):
        product = product @ step
        x_t = process.q_sample(torch.full((1, n), 1), torch.tensor([t]), u, other)
        assert torch.allclose(torch.bincount(x_t[0], minlength=codes + 1) / n, product[1].float(), atol=5e-3)
    assert process.q_sample(torch.ones(1, n, dtype=torch.long), torch.tensor([0]), u, other).eq(1).all()


def test_the_last_term_of_the_bound_is_the_likelihood_and_a_perfect_prediction_costs_nothing():
    process, generator = diffusion.MaskAndReplaceDiffusion(5, 20, 0.9), torch.Generator().manual_seed(3)
    x = torch.randint(5, (4, 9), generator=generator)
    p0 = torch.randn(4, 9, 5, generator=generator).softmax(-1)
    x_t = torch.randint(6, (4, 9), generator=generator)
    first = process.kl(p0, x, x_t, torch.ones(4, dtype=torch.long))
    assert torch.allclose(first, -p0.gather(-1, x[..., None])[..., 0].log(), atol=1e-5)
    sure = torch.nn.functional.one_hot(x, 5).float()
    later = torch.tensor([2, 7, 19, 20])
    assert process.kl(sure, x, x_t, later).abs().max() < 1e-5
    assert process.kl(p0, x, x_t, later).min() > -1e-5


def test_who_knows_the_codes_reaches_them_with_any_stride_guidance_and_truncation():
    x = torch.randint(5, (3, 8), generator=torch.Generator().manual_seed(4))
    for share, steps, cfg_scale, truncation in (
        (0.99999, 1, 1.0, 1.0),
        (0.9, 7, 3.0, 0.5),
        (0.9, 20, 1.0, 0.86),
    ):
        process = diffusion.MaskAndReplaceDiffusion(5, 20, share)
        u = torch.rand(steps + 1, 3, 8, generator=torch.Generator().manual_seed(5))

        def network(x_t, t):
            known = 50.0 * torch.nn.functional.one_hot(x, 5)
            return torch.cat([known, torch.zeros_like(known)]) if len(x_t) == 6 else known

        assert process.sample(network, u, cfg_scale, truncation=truncation).equal(x)


def test_sampling_with_the_true_p0_gives_the_true_distribution():
    """x_0 is 0 or 3 with 0.3 and 0.7, tokens alone: p(x_0 | x_t) by Bayes, and walked in strides, must bring
    these shares back.
    """
    process, n = diffusion.MaskAndReplaceDiffusion(4, 10, 0.9), 40_000
    prior = torch.tensor([0.3, 0.0, 0.0, 0.7])
    products = [torch.eye(5, dtype=torch.float64)]
    for step in matrices(process):
        products.append(products[-1] @ step)

    def network(x_t, t):
        likely = products[int(t[0])][:4].T.float()[x_t]  # (B, N, K): q(x_t | x_0)
        return (likely * prior).log()

    for steps in (10, 3):
        u = torch.rand(steps + 1, 1, n, generator=torch.Generator().manual_seed(6))
        made = process.sample(network, u)
        assert torch.allclose(torch.bincount(made[0], minlength=4) / n, prior, atol=0.01)


def test_codes_of_probabilities_that_are_no_numbers_are_an_error():
    process = diffusion.MaskAndReplaceDiffusion(4, 10, 0.9)
    with pytest.raises(UserError, match="not finite"):
        process.sample(lambda x_t, t: torch.full((1, 8, 4), torch.nan), torch.rand(4, 1, 8))


def test_on_metal_the_posterior_stands_float32():
    """Metal has nothing wider, and the posterior hangs on small differences."""
    metal = torch.device("mps")
    assert device.widest_float(metal) == torch.float32
    wide = diffusion.MaskAndReplaceDiffusion(16, 100, 0.9)
    narrow = diffusion.MaskAndReplaceDiffusion(16, 100, 0.9).to(device.widest_float(metal))
    t = torch.arange(1, 101)
    p0 = torch.rand(100, 5, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    x_t = torch.arange(500).reshape(100, 5) % 17
    for s in (t - 1, t // 2):
        found = narrow.q_posterior(p0, x_t, t, s)
        torch.testing.assert_close(found, wide.q_posterior(p0, x_t, t, s), rtol=2e-5, atol=1e-9)


def test_truncation_keeps_the_smallest_set_that_has_the_share():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for share, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.86, 3), (0.99, 4), (1.0, 4)):
        found = diffusion.truncate(p, share)
        assert (found > 0).sum() == kept and torch.allclose(found, p * (found > 0) / p[:kept].sum())


def test_a_pick_is_never_a_category_without_probability():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert diffusion.sample_categorical(
        p.expand(5, -1), torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-24])
    ).tolist() == [1, 1, 3, 3, 3]


def test_important_times_follow_the_losses_and_are_uniform_before():
    times, u = (
        diffusion.LossSecondMomentResampler(4),
        torch.rand(4000, generator=torch.Generator().manual_seed(7)),
    )
    t, p = times.sample(u, torch.tensor(True))
    assert t.min() == 1 and t.max() == 4 and p.eq(0.25).all()
    for _ in range(12):
        times.update(torch.arange(1, 5), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        times.sample(u, torch.tensor(True))
    t, p = times.sample(u, torch.tensor(True))
    assert torch.allclose(
        torch.bincount(t, minlength=5)[1:] / len(u), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02
    )
    assert torch.allclose(p, t / 10.0, atol=1e-3)


def test_important_times_change_between_updates_only_and_micro_batches_make_one():
    whole, parts, u = (
        diffusion.LossSecondMomentResampler(3),
        diffusion.LossSecondMomentResampler(3),
        torch.rand(6, generator=torch.Generator().manual_seed(8)),
    )
    loss = torch.arange(6.0) + 1
    for _ in range(20):
        t, _ = whole.sample(u, torch.tensor(True))
        whole.update(t, loss)
        for micro, (u_micro, loss_micro) in enumerate(zip(u.split(2), loss.split(2))):
            t_micro, _ = parts.sample(u_micro, torch.tensor(micro == 0))
            assert t_micro.equal(t[2 * micro : 2 * micro + 2])
            parts.update(t_micro, loss_micro)
    assert whole.hits.sum() == 19 * 6 and whole.squares.allclose(parts.squares)
