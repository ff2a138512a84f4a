"""Checkpoints: save, load, resume; and the record of a run.

A checkpoint holds plain tensors and values: model (what is frozen left out), EMA, optimizers, step, config.
It is written to a temporary file and renamed, so there is never half of one, and read with `weights_only`,
so it can run no code.
"""

import datetime
import filecmp
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
import torch.nn as nn
import yaml

import config as configs
from config import DAMAGE, Config, UserError
from corpora.shards import atomic_write
from device import hardware_name
from entry import OUT_OF_MEMORY
from optim import EMA

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONTENT = {"config": dict, "model": dict, "ema": dict, "step": int}  # of a checkpoint, at least
ROOT = Path(__file__).resolve().parents[1]
SOURCE = "*.py */*.py */*.json */*.yaml */*.md assets/* pyproject.toml requirements.lock".split()
LEFTOVER = re.compile(r"(step_\d+|.+\.\d+)\.part")  # what a process was writing when it was killed
NOT_SOURCE = ("tests", "docs", "out", "data", ".venv")  # folders of the root


def save_checkpoint(path: Path, state: dict, keep: int) -> None:
    """Write atomically, then remove all but the newest `keep` checkpoints of the folder.

    raises UserError where there is no room or no right to write; then nothing has changed.
    """
    try:
        with atomic_write(path) as part, open(part, "wb") as f:
            write(state, f)
        for old in find_checkpoints(path.parent)[:-keep]:
            old.unlink()
    except (UserError, OSError) as e:
        raise UserError(f"{e}; {last_good(path.parents[1])}") from e


def write(state: dict, f: BinaryIO) -> None:
    try:
        torch.save(state, f)
    except RuntimeError as e:  # of a write that failed torch says that it stands at a wrong place
        raise e.__context__ or e from None


def newest_checkpoint(out_dir: str | Path) -> Path | None:
    found = find_checkpoints(Path(out_dir, "checkpoints"))
    return found[-1] if found else None


def last_good(out_dir: str | Path) -> str:
    """The end of a message about a run that cannot go on."""
    return f"the last good checkpoint is {newest_checkpoint(out_dir) or 'none yet'}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Those that a run wrote, by their steps; what others put beside them, as step_best.pt, is theirs."""
    by_step = {}
    for path in folder.glob("step_*.pt"):
        step = path.stem.removeprefix("step_")
        if step.isdecimal() and path.name == file_name(int(step)):
            by_step[int(step)] = path
    return [by_step[step] for step in sorted(by_step)]


def file_name(step: int) -> str:
    return f"step_{step:07d}.pt"


def load_checkpoint(path: Path) -> dict:
    """The checkpoint at `path`, on the CPU.

    raises UserError for a file that is missing, truncated, a pickle, or something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about a pickle, which is refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such checkpoint") from e
    except Exception as e:  # garbage fails in every way there is
        message = f"{path}: not a readable checkpoint; it is truncated, or was not written by nanoaudio"
        raise UserError(message) from e
    if not isinstance(state, dict):
        state = {}
    for key, kind in CONTENT.items():
        if not isinstance(state.get(key), kind):
            raise UserError(
                f"{path}: not a nanoaudio checkpoint: it lacks {key}, or that is no {kind.__name__}"
            )
    return state


def resume(
    config: Config, network: nn.Module, ema: EMA, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load the newest checkpoint of config.out_dir, if any; returns its step and the seconds trained."""
    path = newest_checkpoint(config.out_dir)
    if path is None:
        return 0, 0.0
    state = load_checkpoint(path)
    corpus = statistics(network)
    load_weights(network, state["model"], str(path))
    check_weights(ema.shadow, state["ema"], str(path))
    for name, value in ema.shadow.items():
        value.copy_(state["ema"][name])
    configs.from_checkpoint(type(config), state["config"], str(path))  # its values are what they must be
    check_unchanged(config, state["config"], str(path))
    try:
        with warnings.catch_warnings(action="ignore"):  # about what is refused
            load_optimizers(optimizers, state["optimizers"])
        seconds = float(state["seconds"])
    except (RuntimeError, *DAMAGE) as e:
        if OUT_OF_MEMORY.search(str(e)):
            raise
        fault = f"{path}: damaged beside its weights ({e!r})"
        raise UserError(f"{fault}; move it away, then the one before it is resumed from") from e
    check_statistics(corpus, statistics(network), config.data.data_dir, str(path))
    print(f"resumed from {path}", flush=True)
    return state["step"], seconds


def load_optimizers(optimizers: list[torch.optim.Optimizer], states: list[dict]) -> None:
    """Load the optimizers of a checkpoint; raises whatever goes wrong with one that is damaged."""
    for optimizer, saved in zip(optimizers, states, strict=True):
        for state in saved["state"].values():
            for name, value in state.items():
                if not torch.is_tensor(value) or value.is_complex():
                    raise ValueError(f"{name} holds no real numbers")
        peaks = [group["peak_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["peak_lr"] = peak  # a rate changed on the command line holds
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if value.dim() and value.shape != p.shape:
                    raise ValueError(f"{name} is not of its weight's shape")


def trained_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a network: its state_dict without frozen parameters."""
    frozen = set()
    for name, p in network.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            frozen.add(name)
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def check_unchanged(config: Config, saved: dict, where: str) -> None:
    """raises UserError where the weights would fit, and mean something else: another alpha, another picture.

    saved: the config that they were trained with; what it does not have, an older tree's, is as it is now.
    """
    for key in configs.fixed_keys(type(config)):
        section, knob = key.split(".")
        values = getattr(config, section)
        saved_values = saved.get(section, {})
        now = getattr(values, knob)
        then = saved_values.get(knob, now)
        if then != now:
            fault = f"{where}: was trained with {key} {then!r}"
            raise UserError(f"{fault}, not {now!r}; choose another out_dir")


def statistics(network: nn.Module) -> dict[str, float]:
    """Of the corpus that a network was built for, where it has them; batches are normalised by its own."""
    return {name: value.item() for name, value in network.named_buffers() if name in ("mean", "std")}


def check_statistics(now: dict[str, float], then: dict[str, float], data_dir: str, where: str) -> None:
    """raises UserError where what is trained on would not be on the scale of what is sampled."""
    for name, value in then.items():
        if not math.isclose(value, now[name], rel_tol=1e-4, abs_tol=1e-4):
            fault = f"{where}: was trained on a corpus of {name} {value:.4f}"
            raise UserError(f"{fault}, that in {data_dir} has {now[name]:.4f}; choose another out_dir")


def load_weights(network: nn.Module, found: dict[str, torch.Tensor], where: str) -> None:
    """Load the weights `found`; raises UserError as `check_weights`."""
    check_weights(trained_weights(network), found, where)
    network.load_state_dict(found, strict=False)  # what is frozen stays as it was built


def check_weights(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """raises UserError, naming the first difference, where `found` has other keys or shapes than `own`."""
    differing = sorted(own.keys() ^ found.keys(), key=str)
    if differing:
        name = differing[0]
        fault = "missing" if name in own else "not part of this model"
        raise UserError(f"{where}: {name} is {fault}; was it trained with another config?")
    for name, value in own.items():
        weight = found[name]
        if not torch.is_tensor(weight) or weight.is_floating_point() != value.is_floating_point():
            raise UserError(f"{where}: {name} is damaged: it holds no weights")
        expected = tuple(value.shape)
        shape = tuple(weight.shape)
        message = f"{where}: {name} has shape {shape}, this model has {expected}"
        if shape != expected:
            raise UserError(message)


# One training a folder


def lock(out_dir: str) -> TextIO:
    """Make the folder of a run, and keep other trainings out of it while the file that this returns is open.

    The lock is the kernel's, which takes it away however this process ends; the file stays. What processes
    that were killed left half written is removed.
    raises UserError where another training is at work.
    """
    out = Path(out_dir)
    checkpoints = out / "checkpoints"
    make_folder(checkpoints)
    path = out / ".lock"
    try:
        held = path.open("a")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); choose another out_dir") from e
    try:
        if fcntl:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        message = f"{out}: another training is at work there; let it end, or choose another out_dir"
        raise UserError(message) from e
    except OSError:
        print(f"{out}: on a file system without locks; start no second training there", flush=True)
    for path in [*out.glob("*.part"), *checkpoints.glob("*.part")]:
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    return held


# The record of a run


def record_run(config: Config, dtype: str, network: nn.Module, device: torch.device, world: int) -> None:
    """Print what is about to run, and keep what repeating it takes: config.yaml, run.json and the source."""
    out = Path(config.out_dir)
    copy_source(out / "source")
    values = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    write_text(out / "config.yaml", values)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    run = {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "hardware": hardware_name(device, world),
        "dtype": dtype,
        "parameters": parameters,
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()},
    }
    if frozen:
        run["frozen_parameters"] = frozen
    # how the report shows them
    run["scores"] = {key: score._asdict() for key, score in network.scores.items()}
    for name in ("torch", "transformers", "openai-whisper", "numpy"):
        run["versions"][name] = version(name)
    write_text(out / "run.json", json.dumps(run, indent=1))
    beside = f" beside {frozen / 1e6:.1f} M frozen ones" if frozen else ""
    print(
        f"{config.system}: {parameters / 1e6:.1f} M trained parameters{beside} "
        f"in {dtype} on {hardware_name(device, world)}, into {out}/",
        flush=True,
    )


def copy_source(folder: Path) -> None:
    """All of the source, so that a run can be repeated: every Python file and the data that they read."""
    for pattern in SOURCE:
        for source in ROOT.glob(pattern):
            path = source.relative_to(ROOT)
            if path.parts[0] not in NOT_SOURCE:
                copy(source, folder / path)


def copy(source: Path, target: Path) -> None:
    """The content of a file, unless that is there; not that the file may be read-only."""
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        with atomic_write(target) as part:
            shutil.copyfile(source, part)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e


def commit() -> str:
    """What the source is, as git calls it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
