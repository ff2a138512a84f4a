"""Muon: what it computes, against an SVD and torch's own; that ranks share the work; how few operations a
step is.
"""

import multiprocessing
import os
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import optim

SHAPES = [(96, 96)] * 6 + [(384, 96)] * 3 + [(96, 384)] * 2 + [(24, 40)]
VIEWS = {
    "view",
    "t",
    "transpose",
    "unbind",
    "detach",
    "expand",
    "_unsafe_view",
    "alias",
    "select",
    "split",
    "slice",
    "split_with_sizes",
}


def matrices(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=generator) for shape in SHAPES]


def orthogonalized(some: list[torch.Tensor]) -> list[torch.Tensor]:
    return optim.orthogonalize_all(some, optim.newton_schulz)


def trained(kind: type, steps: int, laid_out=lambda whole: whole, **options) -> list[torch.Tensor]:
    """Weights of all SHAPES after some steps on random gradients, the same for any optimizer."""
    params = [nn.Parameter(laid_out(m)) for m in matrices(scale=0.02)]
    optimizer = kind(params, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = laid_out(torch.randn(*p.shape, generator=generator))
        optimizer.step()
    return [p.detach() for p in params]


def test_singular_vectors_stay_and_each_singular_value_goes_through_the_polynomial():
    a, b, c = optim.NEWTON_SCHULZ_COEFFICIENTS
    for matrix, found in zip(matrices(scale=3.0), orthogonalized(matrices(scale=3.0)), strict=True):
        u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = values / values.norm()
        for _ in range(optim.NEWTON_SCHULZ_STEPS):
            values = a * values + b * values**3 + c * values**5
        assert (u @ values.diag() @ vt - found).abs().max() < 1e-4
        assert 0.7 < values.median() < 1.2


def test_it_does_not_depend_on_the_scale_and_zeros_stay_zeros():
    for small, large in zip(orthogonalized(matrices(1e-4)), orthogonalized(matrices(1e4)), strict=True):
        assert (small - large).abs().max() < 1e-5
    assert not orthogonalized([torch.zeros(4, 8)])[0].any()


def test_a_step_is_torch_muons_to_what_its_bf16_allows():
    options = {"lr": 0.02, "weight_decay": 0.01, "momentum": 0.95}
    pairs = zip(
        trained(optim.Muon, 5, **options),
        trained(torch.optim.Muon, 5, **options),
        matrices(0.02),
        strict=True,
    )
    for ours, theirs, start in pairs:
        moved = (theirs - start).norm()
        # bf16 has 8 bits: each product is off by up to 0.4 %
        assert (ours - theirs).norm() < 0.01 * moved


def test_weights_decay_by_the_rate_times_the_decay():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    optim.Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p.detach(), torch.full((4, 4), 0.95))


def test_a_parameter_without_a_gradient_is_left_alone():
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.eye(4)
    optim.Muon([still, moved], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still.detach(), torch.ones(4, 4)) and not torch.equal(moved.detach(), still.detach())


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="not a parameter of shape"):
        optim.Muon([nn.Parameter(torch.ones(3))], lr=0.1)


class Operations(TorchDispatchMode):
    """Counts what would be launched on a device; views are not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


MAIN_RECIPE = [(8, 8)] * 64 + [(32, 8)] * 10 + [(8, 32)] * 10  # its 84 matrices, a 128th as wide


def operations(kind: type) -> int:
    """Of one step on the matrices of the main recipe's network, made small."""
    params = [nn.Parameter(torch.randn(*shape)) for shape in MAIN_RECIPE]
    optimizer = kind(params, lr=0.02)
    with Operations() as counted:
        for _ in range(2):
            counted.count = 0  # the first step also makes the buffers
            for p in params:
                p.grad = torch.ones_like(p)
            counted.count = 0
            optimizer.step()
    return counted.count


def test_a_step_takes_a_twentieth_of_torchs_operations():
    assert operations(optim.Muon) * 20 <= operations(torch.optim.Muon)


@pytest.fixture
def one_of_eight_ranks():
    """This process as one of eight, which hear nothing of each other."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def multiplications() -> int:
    """Floating-point operations in the matrix products of one step of the main recipe, made small."""
    with FlopCounterMode(display=False) as counter:
        orthogonalized([torch.ones(shape) for shape in MAIN_RECIPE])
    return counter.get_total_flops()


def of_all_matrices() -> int:
    """The same on paper: five times R x R, twice, and R x C, from R x C."""
    total = 0
    for shape in MAIN_RECIPE:
        r, c = sorted(shape)
        total += optim.NEWTON_SCHULZ_STEPS * (2 * r * r * c + 2 * r**3 + 2 * r * r * c)
    return total


def test_one_process_multiplies_each_matrix_once():
    assert multiplications() == of_all_matrices()


def test_of_eight_ranks_each_multiplies_an_eighth_and_at_most_an_eighth_of_that_beside(one_of_eight_ranks):
    assert of_all_matrices() / 8 <= multiplications() < 1.125 * of_all_matrices() / 8


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_compiled_step_is_the_step_to_rounding():
    options = {"lr": 0.02, "weight_decay": 0.01}
    pairs = zip(
        trained(optim.Muon, 2, compile=True, **options), trained(optim.Muon, 2, **options), strict=True
    )
    for compiled, expected in pairs:
        torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


def share_of_a_rank(rank: int, world: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    counts = []
    own = optim.newton_schulz

    def counting(batch: torch.Tensor) -> torch.Tensor:
        counts.append(len(batch))
        return own(batch)

    optim.newton_schulz = counting
    options = {"lr": 0.02, "weight_decay": 0.01}
    weights = trained(optim.Muon, 3, **options)
    results.put((rank, sum(counts), [w.numpy() for w in weights]))
    counts.clear()
    mesh = init_device_mesh("cpu", (world,))
    weights = trained(optim.Muon, 3, lambda whole: distribute_tensor(whole, mesh, [Shard(0)]), **options)
    results.put((rank, sum(counts), [w.full_tensor().numpy() for w in weights]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_end_with_the_weights_of_one_process(world, unused_port):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=share_of_a_rank, args=(rank, world, unused_port, results))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    found = [results.get(timeout=120) for _ in range(2 * world)]  # every rank's, not sharded and sharded
    for process in ranks:
        process.join()
    expected = trained(optim.Muon, 3, lr=0.02, weight_decay=0.01)
    for _, matrices_done, weights in found:
        # in three steps; each of the four sizes may be filled up by one
        assert matrices_done < 3 * (len(SHAPES) / world + 4)
        assert all(abs(torch.from_numpy(w) - e).max() < 1e-6 for w, e in zip(weights, expected, strict=True))
