"""A device that is not there: its tensors say `fake:0` and hold their numbers on the CPU.

Operations on tensors of both devices raise, as on CUDA; there, 0-dim host tensors, copies and indices on the
host are allowed. What would make the host wait for a device is listed in `WAITS`, with the line that asked.
`with FakeDevice():` around all that uses it. It is torch's backend for user's own devices, and stays
registered: for a process of its own. torch cannot name it by `torch.autocast` in bf16: fp32 only.

`python tests/fake_device.py FILE` trains, evaluates and samples every system on it, and writes what it saw.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

TESTS = Path(__file__).resolve().parent
WAITS: list[str] = []
# they give numbers, or shapes that depend on numbers
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"_to_copy", "copy_"}


class DeviceModule:
    """What torch asks of the module torch.fake."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = synchronize = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` are its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="fake:0",
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def __reduce_ex__(self, protocol):  # a file holds numbers
        return self.held.detach().__reduce_ex__(protocol)

    def tolist(self):
        WAITS.append(f"tolist, {caller()}")
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert fake:0 device type tensor to numpy. Use Tensor.cpu() first")


class FakeDevice(TorchDispatchMode):
    """Makes and computes its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def install() -> torch.device:
    """Tell torch of the device, for the rest of the process."""
    if torch._C._get_privateuse1_backend_name() != "fake":
        _setup_privateuseone_for_python_backend("fake", DeviceModule())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="fake") is a copy
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch.autograd.set_multithreading_enabled(False)
    return torch.device("fake", 0)


def compute(func, args: tuple, kwargs: dict):
    """An operation of aten on its numbers; raises RuntimeError where the devices are mixed."""
    name = func.overloadpacket.__name__
    target = kwargs.get("device")
    makes = target is not None and torch.device(target).type == "fake"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if not ours and not makes:
        return func(*args, **kwargs)
    leaves_device = name == "_to_copy" and target is not None and not makes
    check_devices(name, args, tensors)
    if waits(name, args, leaves_device):
        WAITS.append(f"{name}, {caller()}")
    if name == "_fused_sdp_choice":
        return 0  # attention by its parts
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if makes:
        kwargs["device"] = torch.device("cpu")
    found = func(*args, **kwargs)
    if makes and name == "_to_copy" and found is args[0]:
        found = found.clone()
    if leaves_device or (name == "copy_" and not isinstance(tensors[0], OnDevice)):
        return found
    written = {id(tensor.held): tensor for tensor in ours}  # in place: the same tensor again

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return written[id(leaf)] if id(leaf) in written else OnDevice(leaf)

    return tree_map(wrap, found)


def check_devices(name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """raises RuntimeError where a tensor of the host stands among those of the device, as CUDA would."""
    if name in COPYING:
        return
    host = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    bad = [tensor for tensor in host if tensor.dim() > 0]
    if name in INDEXING and isinstance(args[0], OnDevice):
        bad = [tensor for tensor in bad if tensor.dtype not in (torch.long, torch.int, torch.bool)]
    in_place = name.endswith("_") and isinstance(args[0], torch.Tensor) and not isinstance(args[0], OnDevice)
    if bad or in_place:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} at {caller()} has "
            f"{[tuple(tensor.shape) for tensor in host]} on the CPU"
        )


def waits(name: str, args: tuple, leaves_device: bool) -> bool:
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype == torch.bool or not isinstance(index, OnDevice) for index in indices)
    if name == "copy_":
        return isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)
    if name == "repeat_interleave":
        return True
    return leaves_device or name in WAITING


def caller() -> str:
    """The line of the product that asked; else of whoever did."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(TESTS.parent) and path.name != "fake_device.py" and ".venv" not in path.parts:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


# Every system, by the commands of a user, on the recordings that are computed for first_losses.py


def main() -> None:
    import first_losses

    torch.inference_mode = torch.no_grad  # before it decorates anything: such tensors cannot be wrapped
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = train_all(Path(folder), first_losses)
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


def train_all(root: Path, first_losses) -> dict[str, dict]:
    """{system: what `train_one` saw}; and operations: what `try_operations` did."""
    from conftest import save_random_whisper

    import system

    speech = {
        "corpus": "ljspeech",
        "data_dir": first_losses.write_speech(root / "speech"),
        "recogniser": save_random_whisper(root / "whisper.pt"),
        "overfit": 2,
    }
    music = {"corpus": "music", "data_dir": first_losses.write_music(root / "music")}
    tower = first_losses.write_tower(root / "tower")
    pictures = {
        "corpus": "listed",
        "data_dir": first_losses.write_pictures(root / "pictures"),
        "image": tower,
    }
    codes = {"stage1": root / "speech_align", "require_r1": 0, "vq_steps": 3}
    small = {"width": 64, "layers": 2, "heads": 2}
    few_steps = {"euler_steps": 2}
    recipes = {
        "tts": ("demo", speech | few_steps),
        "spectrogram": ("spectrogram_demo", speech | few_steps | {"tune": "lora"}),
        "music": ("music_demo", music | few_steps),
        "speech_align": ("speech_align_demo", pictures),
        "speech_image": ("speech_image_demo", pictures | codes | few_steps),
    }
    device = install()
    found = {"operations": try_operations(device)}
    for name, (recipe, knobs) in recipes.items():
        if name not in system.SYSTEMS:  # it was deleted
            continue
        with FakeDevice():
            found[name] = train_one(
                recipe, knobs | {"out_dir": root / name}, device, first_losses.FEW | small
            )
    return found


def try_operations(device: torch.device) -> dict[str, str]:
    """{what is done: the error, or how many waits}."""
    with FakeDevice():
        x = torch.arange(6.0).view(2, 3).to(device)
        tries = {
            "a host tensor added": lambda: x + torch.ones(3),
            "a host tensor multiplied from the left": lambda: torch.ones(2, 2) @ x,
            "a host tensor's index on the device": lambda: torch.ones(3)[torch.tensor([0], device=device)],
            "a host number added": lambda: x + torch.tensor(1.0),
            "numpy": lambda: x.numpy(),
            "a sum": lambda: x.sum() + x.mean(),
            "item": lambda: x.sum().item(),
            "bool": lambda: bool(x.isfinite().all()),
            "cpu": lambda: x.cpu(),
            "tolist": lambda: x.tolist(),
            "nonzero": lambda: x.nonzero(),
            "mask": lambda: x[x > 1],
            "copy to the host": lambda: torch.ones(2, 3).copy_(x),
            "copy to the device": lambda: torch.ones(2, 3).to(device),
        }
        found = {}
        for name, run in tries.items():
            before = len(WAITS)
            try:
                run()
                found[name] = f"{len(WAITS) - before} waits"
            except (RuntimeError, TypeError) as e:
                found[name] = str(e)
        return found


def train_one(recipe: str, knobs: dict, device: torch.device, few: dict) -> dict:
    """Three updates, a validation, an evaluation of two prompts.

    returns: waits, the lines that wait within the updates; all_waits, how many there are in the whole run;
    error, a traceback or ""; metrics, the last ones.
    """
    import pytest
    from conftest import call, options

    import system
    import train
    from tracking import logger

    words = [f"--config={TESTS.parent / 'configs' / recipe}.yaml"]
    more = {"eval_interval": 3, "limit": 2, "log_interval": 100}
    more |= {"batch_size": 2, "max_minutes": 1000}
    words += options(few | more | knobs)
    seen = []
    before_all = len(WAITS)

    def counted(part):
        def run(*arguments):
            before = len(WAITS)
            result = part(*arguments)
            seen.extend(WAITS[before:])
            return result

        return run

    error = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "pick_device", lambda _: device)
        patch.setattr(torch, "load", load_to(device))
        for part in ("accumulate_gradient", "fraction_done", "apply_gradient"):
            patch.setattr(train, part, counted(getattr(train, part)))
        try:
            call(system, "prepare", *words)
            call(train, *words)
        except SystemExit:
            pass  # how a run ends that has something to expect
        except Exception:
            error = traceback.format_exc()
    lines = logger.read_lines(Path(knobs["out_dir"], "metrics.jsonl"))
    metrics = {key: value for line in lines for key, value in line.items()}
    return {"waits": seen, "all_waits": len(WAITS) - before_all, "error": error, "metrics": metrics}


def load_to(device: torch.device):
    """torch.load, which has the storages of torch's own devices only."""
    load = torch.load

    def run(file, map_location=None, **options):
        held = load(file, map_location="cpu", **options)
        if map_location is None or torch.device(map_location) != device:
            return held
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, held)

    return run


if __name__ == "__main__":
    main()
