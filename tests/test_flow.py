"""The flow's identities: what must hold whatever the network."""

import numpy as np
import pytest
import torch

import flow
from config import UserError


def test_exact_velocity_integrates_back_to_the_data():
    torch.manual_seed(0)
    x, noise = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    for steps, sway, shift in ((1, 0, 1), (7, -1, 1), (20, 0.5, 3)):
        made = flow.sample_euler(lambda x_t, t: noise - x, noise, flow.timesteps(steps, sway, shift))
        assert torch.allclose(made, x, atol=1e-5)


def test_predicting_x_gives_the_same_velocity_as_predicting_v():
    x, noise, t = torch.randn(4, 6, 5), torch.randn(4, 6, 5), torch.tensor([0.06, 0.3, 0.7, 1.0])
    x_t = flow.interpolate(x, noise, t)
    assert torch.allclose(flow.velocity(x, x_t, t, "x", 0.05), noise - x, atol=1e-4)
    assert flow.velocity(noise - x, x_t, t, "v", 0.05).equal(noise - x)


def test_a_network_that_knows_x_needs_one_step():
    x, noise = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    made = flow.sample_euler(lambda x_t, t: flow.velocity(x, x_t, t, "x", 0.05), noise, flow.timesteps(1))
    assert torch.allclose(made, x, atol=1e-6)


def test_guidance_extrapolates_and_only_inside_its_interval():
    noise, calls = torch.zeros(2, 3), []

    def network(x_t, t):
        calls.append(len(x_t))
        v = torch.full_like(x_t, -1.0)
        if len(x_t) == 4:
            v[2:] = 0.0  # unconditional rows stand still
        return v

    made = flow.sample_euler(network, noise, flow.timesteps(10), cfg_scale=3.0, cfg_from=0.35, cfg_to=0.75)
    assert calls == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]
    assert torch.allclose(made, torch.full((2, 3), 0.6 + 0.4 * 3.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_was_sampled_and_is_not_finite_is_an_error(bad):
    with pytest.raises(UserError, match="not finite"):
        flow.sample_euler(lambda x_t, t: bad * x_t, torch.ones(2, 3), flow.timesteps(4))


def test_scale_one_is_no_guidance():
    calls = []
    flow.sample_euler(
        lambda x_t, t: calls.append(len(x_t)) or x_t, torch.zeros(2, 3), flow.timesteps(4), cfg_scale=1.0
    )
    assert calls == [2] * 4


def test_loss_is_a_mean_per_clip_that_padding_never_enters():
    v, x, noise = torch.randn(2, 8, 5), torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    wild = v.clone()
    wild[1, 3:] = 1e6
    assert flow.loss(v, x, noise, mask).equal(flow.loss(wild, x, noise, mask))
    assert torch.allclose(flow.loss(v, x, noise, mask)[1], (v - noise + x)[1, :3].square().mean())


def test_errors_of_x_count_as_at_min_t_where_t_is_smaller():
    t, error = torch.tensor([0.1, 0.25, 0.5, 0.9]), 0.3
    # an error of x is one of v, 1 / t as large
    losses = (error / t).square() * flow.loss_weight(t, 0.5)
    assert torch.allclose(losses, (error / t.clamp_min(0.5)).square())
    assert torch.equal(flow.loss_weight(t, 0.0), torch.ones(4))


@pytest.mark.parametrize("sway, shift", [(0, 1), (-1, 1), (1, 1), (0, 3), (-0.5, 0.5)])
def test_the_grid_falls_from_one_to_zero(sway, shift):
    grid = flow.timesteps(16, sway, shift)
    assert grid[0] == 1 and grid[-1].abs() < 1e-6 and (grid.diff() < 0).all()


def test_negative_sway_and_a_shift_spend_steps_near_the_noise():
    middle = flow.timesteps(10)[5]
    assert flow.timesteps(10, sway=-1)[5] > middle and flow.timesteps(10, shift=3)[5] > middle


def test_times_are_logit_normal_with_a_uniform_share():
    rng = np.random.default_rng(0)
    t = np.array([flow.sample_time(rng, 0.5, 0.8, 0.0) for _ in range(20000)])
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 0.8) < 0.02
    mixed = np.array([flow.sample_time(rng, 0.5, 0.8, 0.5) for _ in range(20000)])
    assert abs((mixed < 0.02).mean() - 0.5 * 0.02) < 0.004
