"""Optimizers: Muon for hidden matrices, of our own, and AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum U S V^T by about U V^T, found by five
Newton-Schulz iterations. Here matrices of one shape are one batch, float32 on a CPU (bf16 matrix products are 30 times slower where the
instructions are missing) and bf16 on CUDA; each rank orthogonalises its share of every batch, one all-gather spreads the results.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)         # of the quintic: steep at 0, singular values end in about [0.7, 1.2]
ITERATIONS = 5
EPS = 1e-7                                       # below this norm a matrix stays as it is: zeros remain zeros


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, orthogonalised; the same update as torch.optim.Muon to what its bf16 allows."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        """params: matrices, all on one device. raises ValueError for one that is none."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon trains matrices, not a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        grads = [p.grad for p in params]
        buffers = [self.momentum_buffer(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        updates = orthogonalize_all(ahead)
        torch._foreach_mul_(updates, [math.sqrt(max(1, p.shape[0] / p.shape[1])) for p in params])
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr)

    def momentum_buffer(self, p: nn.Parameter) -> torch.Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def orthogonalize_all(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each of `matrices` (R, C) orthogonalised. Under several ranks, which must all hold the same ones, each does its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = {}                                 # (short side, long side): the numbers of its matrices
    for number, matrix in enumerate(matrices):
        batches.setdefault(tuple(sorted(matrix.shape)), []).append(number)

    shares = []
    for shape, numbers in batches.items():
        size = math.ceil(len(numbers) / world)   # of every rank's share; what the last one lacks is filled up with zeros
        mine = [wide(matrices[n]) for n in numbers[rank * size:(rank + 1) * size]]
        mine += [matrices[0].new_zeros(shape)] * (size - len(mine))
        shares.append(orthogonalize(torch.stack(mine)))
    if world > 1:
        shares = gather_shares(shares, world)

    found = list(matrices)
    for numbers, batch in zip(batches.values(), shares):
        for n, orthogonal in zip(numbers, batch.to(matrices[0].dtype).unbind()):
            found[n] = orthogonal if is_wide(matrices[n]) else orthogonal.mT
    return found


def gather_shares(shares: list[torch.Tensor], world: int) -> list[torch.Tensor]:
    """Every rank's batches (n, R, C), joined to batches (world n, R, C) on each, in one all-gather."""
    own = torch.cat([batch.flatten() for batch in shares])
    every = own.new_empty(world * len(own))
    dist.all_gather_into_tensor(every, own)
    parts = every.view(world, -1).split([batch.numel() for batch in shares], dim=1)
    return [part.reshape(-1, *batch.shape[1:]) for part, batch in zip(parts, shares)]


def orthogonalize(batch: torch.Tensor) -> torch.Tensor:
    """A batch of wide matrices (n, R, C), R <= C, with all singular values brought near 1; bf16 on CUDA, else float32."""
    a, b, c = COEFFICIENTS
    x = batch.to(torch.bfloat16 if batch.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT                                                                  # (n, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)                    # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)                                      # a X + (b G + c G^2) X
    return x


def is_wide(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def wide(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or its transpose, so that the products of its rows are the smaller square."""
    return matrix if is_wide(matrix) else matrix.mT


def make_optimizers(network: nn.Module, muon_lr: float, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for network.hidden_matrices(), AdamW for the other trained parameters; each only where it has any.

    Every group keeps its own peak rate in `peak_lr`.
    """
    hidden = network.hidden_matrices()
    is_hidden = {id(p) for p in hidden}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in is_hidden]
    made = []
    if hidden:
        made.append(Muon(hidden, muon_lr, weight_decay))
    if rest:
        made.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return made
