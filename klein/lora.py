"""LoRA: a trained low-rank update beside a frozen linear layer, mergeable and removable.

A layer is known by its full path below the network that it is in. Source: arXiv 2106.09685.
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRA(nn.Module):
    """A frozen linear layer W and a low-rank update: W x + alpha / r B A x.

    A and B are kept in fp32 and compute in the precision of x or of autocast.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        """base: (in, out). A (r, in) is random; B (out, r) is zero-initialised, so the update starts at 0."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha = float(alpha)
        self.scale = alpha / rank
        self.unmerged_weight = None  # W, on the CPU, while the update is merged into it
        device = base.weight.device
        A = torch.randn(rank, base.in_features, device=device) / rank
        B = torch.zeros(base.out_features, rank, device=device)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        y = self.base(x)  # (..., out)
        if self.unmerged_weight is not None:
            return y  # merged: the update is in W
        A = self.A.to(x.dtype)
        h = F.linear(x, A)  # (..., r)
        B = self.B.to(h.dtype)
        # addmm, so that autograd keeps no second (..., out)
        updated = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T, alpha=self.scale)
        return updated.view_as(y)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to W: the same outputs without its cost. A copy of W is kept on the CPU."""
        if self.unmerged_weight is None:
            W = self.base.weight
            self.unmerged_weight = W.detach().cpu().clone()
            update = self.scale * self.B @ self.A  # (out, in)
            W += update.to(W.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W, bit for bit."""
        if self.unmerged_weight is not None:
            self.base.weight.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    @property
    def weight(self) -> torch.Tensor:
        """The frozen layer's, for code that takes this for an nn.Linear."""
        return self.base.weight


def add_lora(root: nn.Module, ranks: dict[str, int], alpha: float) -> None:
    """Wrap the linear layers inside `root` at the full paths in `ranks`, each with its rank.

    A layer that is wrapped is wrapped anew.
    """
    for path, rank in ranks.items():
        layer = root.get_submodule(path)
        if isinstance(layer, LoRA):
            layer = layer.base
        root.set_submodule(path, LoRA(layer, rank, alpha))


def add_attention_lora(root: nn.Module, rank: int, alpha: float) -> None:
    """Wrap all attention projections of `root`."""
    ranks = dict.fromkeys(attention_layers(root), rank)
    add_lora(root, ranks, alpha)


def remove_lora(root: nn.Module) -> None:
    """Put the frozen layers back, unmerged."""
    for path, lora in lora_layers(root).items():
        lora.unmerge()
        root.set_submodule(path, lora.base)


def lora_layers(root: nn.Module) -> dict[str, LoRA]:
    """The wrapped layers by their full paths."""
    return {path: module for path, module in root.named_modules() if isinstance(module, LoRA)}


def attention_layers(root: nn.Module) -> list[str]:
    """Full paths of all attention projections.

    root: a transformer: 8 in a double block, 2 in a single one, whose QKV and MLP inputs are one matrix; or a
    KleinTextEncoder: layers 0 to 26.
    """
    paths = []
    for path, module in root.named_modules():
        if type(module) is nn.Linear and re.search(r"\.(self_)?attn\.", path):
            paths.append(path)
    return paths
