"""Optimizers: Muon for hidden matrices, of our own, and AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum U S V^T by about
U V^T, computed by five Newton-Schulz iterations. Matrices of one shape are one batch here: bf16 on CUDA,
float32 on a CPU, where bf16 products are 30 times slower if the instructions are missing. Each rank
orthogonalises its share of every batch, and one all-gather spreads the results; of sharded matrices the rows
are gathered before, and the results' rows spread. On CUDA the iterations can be compiled, and AdamW is fused.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from parallel import foreach, is_sharded, own_rows, reshard

# of the quintic: steep at 0, singular values end in about [0.7, 1.2]
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7  # a matrix of a smaller norm is not normalised: zeros remain zeros


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: torch.optim.Muon's update, without what that loses in bf16."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        compile: bool = False,
    ):
        """params: matrices, all on one device; raises ValueError for any other shape.

        compile: the iterations, once a shape; what they compute is the same to rounding.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for p in self.param_groups[0]["params"]:
            if p.dim() != 2:
                raise ValueError(f"Muon trains matrices, not a parameter of shape {tuple(p.shape)}")
        self.iterate = torch.compile(newton_schulz, dynamic=False) if compile else newton_schulz

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        grads = own_rows([p.grad for p in params])
        buffers = own_rows([self.momentum_buffer(p) for p in params])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        if is_sharded(params[0]):
            updates = orthogonalize_sharded(ahead, params, self.iterate)
        else:
            updates = orthogonalize_all(ahead, self.iterate)
        scales = [tall_scale(*p.shape) for p in params]
        weights = own_rows(params)
        torch._foreach_mul_(updates, scales)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr)

    def momentum_buffer(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def tall_scale(rows: int, columns: int) -> float:
    """A tall matrix's update is larger: outputs change as much as by a square one (Jordan et al. 2024)."""
    ratio = max(1, rows / columns)
    return math.sqrt(ratio)


def orthogonalize_all(matrices: list[Tensor], iterate: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Each of `matrices` (R, C) orthogonalised; all ranks hold the same ones, and each does its share.

    iterate: `newton_schulz`, perhaps compiled.
    """
    rank, world = rank_and_world()
    groups = group_by_shape(matrices)

    shares = []
    for shape, numbers in groups.items():
        size = math.ceil(len(numbers) / world)  # of every rank's share; the last one is filled up with zeros
        start = rank * size
        share = [wide(matrices[number]) for number in numbers[start : start + size]]
        missing = size - len(share)
        share += [matrices[0].new_zeros(shape)] * missing
        batch = torch.stack(share)
        shares.append(iterate(batch))
    if world > 1:
        shares = gather_shares(shares, world)

    found = list(matrices)
    for numbers, batch in zip(groups.values(), shares):
        batch = batch.to(matrices[0].dtype)
        for number, orthogonal in zip(numbers, batch):
            tall = not is_wide(matrices[number])
            found[number] = orthogonal.mT if tall else orthogonal
    return found


def orthogonalize_sharded(
    rows: list[Tensor], params: list[nn.Parameter], iterate: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """As `orthogonalize_all`, where every rank holds some rows of each matrix; returns those of the results.

    One all-to-all brings each rank whole matrices, its share of a shape; another brings rows back.
    """
    groups = {}
    for number, p in enumerate(params):
        groups.setdefault(p.shape, []).append(number)
    mesh = params[0].device_mesh
    found = list(rows)
    for shape, numbers in groups.items():
        whole = torch.Size([len(numbers), *shape])
        batch = torch.stack([rows[number] for number in numbers])  # (n, some of R, C)
        batch = reshard(batch, 1, 0, whole, mesh)  # (some of n, R, C)
        tall = shape[0] > shape[1]
        orthogonal = iterate(batch.mT).mT if tall else iterate(batch)
        orthogonal = reshard(orthogonal.contiguous(), 0, 1, whole, mesh)
        for number, part in zip(numbers, orthogonal.to(batch.dtype)):
            found[number] = part
    return found


def rank_and_world() -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def group_by_shape(matrices: list[Tensor]) -> dict[tuple[int, int], list[int]]:
    """{(short side, long side): the numbers of its matrices}."""
    groups = {}
    for number, matrix in enumerate(matrices):
        shape = tuple(sorted(matrix.shape))
        groups.setdefault(shape, []).append(number)
    return groups


def gather_shares(shares: list[Tensor], world: int) -> list[Tensor]:
    """Every rank's batches (n, R, C), joined to batches (world n, R, C) on each, in one all-gather."""
    flat = torch.cat([batch.flatten() for batch in shares])
    gathered = flat.new_empty(world * len(flat))
    dist.all_gather_into_tensor(gathered, flat)
    gathered = gathered.view(world, -1)
    sizes = [batch.numel() for batch in shares]
    joined = []
    for batch, part in zip(shares, gathered.split(sizes, dim=1)):
        joined.append(part.reshape(-1, *batch.shape[1:]))
    return joined


def newton_schulz(batch: Tensor) -> Tensor:
    """Wide matrices (n, R, C), R <= C, all singular values brought near 1; bf16 on CUDA, else float32."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = batch.to(torch.bfloat16 if batch.is_cuda else torch.float32)
    norms = x.norm(dim=(1, 2), keepdim=True)
    x = x / norms.clamp_min(EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (n, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    return x


def is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, so that the products of its rows are the smaller square."""
    return matrix if is_wide(matrix) else matrix.mT


def make_optimizers(
    network: nn.Module, muon_lr: float, lr: float, weight_decay: float, compile: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for network.hidden_matrices(), AdamW for the other trained parameters; each only where it has any.

    muon_lr: 0 = AdamW trains them all.
    compile: where launches are what a step costs: on CUDA.
    A group's `peak_lr` is the rate that its schedule scales.
    """
    hidden = network.hidden_matrices() if muon_lr else []
    hidden_ids = {id(p) for p in hidden}
    trained = [p for p in network.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in hidden_ids]
    optimizers = []
    if hidden:
        compile = compile and hidden[0].is_cuda
        optimizers.append(Muon(hidden, muon_lr, weight_decay, compile=compile))
    if rest:
        how = {"fused": True} if rest[0].is_cuda else {"foreach": foreach(rest)}
        adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, **how)
        optimizers.append(adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class EMA:
    """An exponential moving average of the trainable weights; `with average:` evaluates with it."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.params = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The decay grows to its value over the first steps, so that the random start is soon forgotten."""
        decay = min(self.decay, (step + 1) / (step + 10))
        means = list(self.shadow.values())
        torch._foreach_lerp_(means, list(self.params.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for name, p in self.params.items():
            kept = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_error) -> None:
        self.swap()
