"""Published networks: loaded by name, and frozen.

A network comes from a local folder or from the Hugging Face hub, by one name. What is wrong with either is a
UserError, and offline it is raised at once.
"""

import functools
from pathlib import Path

import huggingface_hub
import torch
import torch.nn as nn

from config import UserError


@functools.cache
def load_frozen(kind: type, name: str, part: str, option: str, device: torch.device) -> nn.Module:
    """A network of transformers or diffusers from a folder or the hub, frozen, float32; loaded once.

    part: its subfolder, or "". option: the option of the config that named it, for errors.
    """
    what = f"{option} {name}: its {part or 'weights'}"
    offline = local_files_only(name)
    try:
        network, report = kind.from_pretrained(
            name, subfolder=part, local_files_only=offline, output_loading_info=True
        )
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"{what} cannot be loaded by {kind.__name__} ({one_line(e)}); give a folder") from e
    missing = first_missing(report)
    if missing:
        raise UserError(f"{what} lacks {missing}: not a {kind.__name__}")
    frozen = Frozen(network.float()).to(device)
    return frozen.module


def first_missing(report: dict) -> str:
    """The first weight, by name, that from_pretrained did not find or that has another shape; "" if none."""
    keys = report["missing_keys"] or report["mismatched_keys"]
    return min(map(str, keys), default="")


class Frozen(nn.Module):
    """A network that stays as it was loaded: no gradient, always in eval mode.

    The wrapped network is not registered as a submodule, so it is in no parent's parameters, state_dict or
    checkpoint, and a parent's train, requires_grad_, apply, load_state_dict do not reach it; only .to() does.
    cuda_dtype: what the weights become on a GPU.
    """

    def __init__(self, module: nn.Module, cuda_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.__dict__["module"] = module.eval().requires_grad_(False)
        self.cuda_dtype = cuda_dtype
        self.eval()

    def forward(self, *inputs):
        with torch.no_grad():
            return self.module(*inputs)

    def train(self, mode: bool = True):
        return super().train(False)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda() and .float() come down to
        self.module._apply(fn, recurse)
        if any(parameter.is_cuda for parameter in self.module.parameters()):
            self.module.to(self.cuda_dtype)
        return super()._apply(fn, recurse)


def local_files_only(base: str) -> bool:
    """Whether only local files can be had of a network of this name: it is no folder, and the hub is away."""
    return not Path(base).is_dir() and hub_unreachable()


def find_file(name: str, filename: str) -> Path:
    """`filename` in the folder `name`, or in the hub repository of that name, cached if the hub is away."""
    if Path(name).is_dir():
        path = Path(name, filename)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, local_files_only=hub_unreachable()))
    except Exception as e:  # the hub's client changed its HTTP library, and its errors, before
        raise UserError(
            f"{name}: neither a folder nor to be had from the hub ({one_line(e)}); "
            f"give a folder with {filename}"
        ) from e


@functools.cache
def hub_unreachable() -> bool:
    """Whether only cached files can be had; heeds HF_HUB_OFFLINE.

    Asked once, without the 25 s of retries that a download would make.
    """
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        return True
    return False


def one_line(error: Exception) -> str:
    """The kind and the first sentence of a library's error, on one line."""
    text = " ".join(str(error).split())
    sentence = text.split(". ")[0][:200]
    return f"{type(error).__name__}: {sentence}".removesuffix(": ")
