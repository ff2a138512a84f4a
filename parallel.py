"""Training on several ranks: DDP, or FSDP2, which shards weights, gradients and optimizer states over them.

Sharded, a parameter is a DTensor, of which every rank holds some rows. A block's weights are gathered when
the block is called, and dropped after it; so all ranks must call the same blocks, except within `whole`.
Checkpoints hold whole tensors either way.
Source: torch.distributed.fsdp.fully_shard (FSDP2), whose imports take seconds: they stand where it is used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from config import Train, UserError

# Of an optimizer: a rate changed on the command line holds, and how torch computes is the device's
OPTIONS = ("peak_lr", "foreach", "fused")


def wrap(
    network: nn.Module, train: Train, device: torch.device, world: int, backend: str | Callable = "inductor"
) -> nn.Module:
    """What the loop calls to train the network, which is itself sharded here if train.shard says so.

    Optimizers and averages are made afterwards: it gets other parameters. backend: torch.compile's.
    """
    if train.shard and world > 1:
        return shard(network, train.compile, device, world)
    model = torch.compile(network, backend=backend) if train.compile else network
    if world == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    size = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    return DistributedDataParallel(
        model, device_ids=device_ids, bucket_cap_mb=bucket_mb(size), gradient_as_bucket_view=True
    )


def bucket_mb(size: int) -> float:
    """How much of `size` bytes of gradients the ranks reduce at once: a third, and no less than 200 MB.

    A compiled network is cut where a bucket ends: few are left; while one is reduced, the next is computed.
    """
    return max(200, size / 3 / 2**20)


def mark_lengths(batch: dict[str, Tensor], varying: Sequence[str]) -> None:
    """Tell torch.compile whose axis 1 will be another in the next batch, so that it compiles only once."""
    for name in varying:
        if name in batch:
            torch._dynamo.maybe_mark_dynamic(batch[name], 1)


def shard(network: nn.Module, compiled: bool, device: torch.device, world: int) -> nn.Module:
    """Shard it in place, in parts: each of its blocks, and the rest. raises UserError where FSDP2 cannot."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, p in network.named_parameters():
        if p.dim() == 0:
            raise UserError(f"train.shard: {name} is a single number, which FSDP2 cannot shard; leave it out")
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks(network):
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of its outermost ModuleLists: a Transformer's blocks."""
    found = []
    for child in module.children():
        found += child if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def accumulate(model: nn.Module, last_micro: bool) -> AbstractContextManager:
    """Where a micro-batch's forward and backward run: DDP reduces the gradients in the last one only.

    FSDP2 reduces them in each, as what is not reduced is whole, and would be as large as the weights.
    """
    if last_micro or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def clip_grad_norm(network: nn.Module, max_norm: float) -> Tensor:
    """torch's clip_grad_norm_; returns the norm over all ranks."""
    params = list(network.parameters())
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach(params))
    return norm.full_tensor() if is_sharded(norm) else norm


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """A block in which every rank has all weights, and calls what it likes of the network; not to train."""
    parts = [module for module in network.modules() if hasattr(module, "unshard")]
    if not parts:
        yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # not to compile for every shape that is sampled
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not network, recurse=False)


# Sharded tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def foreach(params: list[Tensor]) -> bool | None:
    """torch's option of that name: by default it would take sharded parameters one after the other."""
    return True if is_sharded(params[0]) else None


def own_rows(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves, or, of sharded ones, the rows that this rank holds, in the same memory."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def reshard(part: Tensor, held: int, wanted: int, shape: torch.Size, mesh) -> Tensor:
    """This rank's part along one dimension of a tensor of `shape` (n, R, C) -> its part along another."""
    from torch.distributed.tensor import DTensor, Shard

    _, rows, columns = shape
    stride = (rows * columns, columns, 1)
    tensor = DTensor.from_local(part, mesh, [Shard(held)], shape=shape, stride=stride)
    return tensor.redistribute(placements=[Shard(wanted)]).to_local()


# Checkpoints


def gather(state: dict) -> dict:
    """Nested dicts and lists with whole tensors on rank 0's CPU for what is sharded; all ranks call it."""

    def to_first_rank(value: object) -> object:
        if not is_sharded(value):
            return value
        full = value.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None

    return tree_map(to_first_rank, state)


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, as another of its shape is laid out: this rank's rows of it if that is sharded."""
    if not is_sharded(own) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def optimizer_state(saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A saved state_dict as `optimizer` is to load it: laid out as its parameters are, with its OPTIONS."""
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    state = {}
    for number, values in saved["state"].items():
        state[number] = {name: like(value, params[number]) for name, value in values.items()}
    groups = []
    for group, own in zip(saved["param_groups"], optimizer.param_groups):
        groups.append(group | {key: own[key] for key in OPTIONS if key in own})
    return {"state": state, "param_groups": groups}
