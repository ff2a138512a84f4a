"""Checkpoints: save, load, resume; and the record of a run.

A checkpoint holds plain tensors and values: model (what is frozen left out), EMA, optimizers, step, config.
It is written to a temporary file and renamed, so there is never half of one, by a thread, from a copy, while
training goes on; and read with `weights_only`, so it can run no code.
"""

import atexit
import datetime
import filecmp
import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
import torch.nn as nn
import yaml

import config as configs
from config import DAMAGE, Config, Train, UserError
from corpora.shards import atomic_write, make_folder
from device import hardware_name
from entry import OUT_OF_MEMORY
from optim import EMA
from parallel import like, optimizer_state

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONTENT = {"config": dict, "model": dict, "ema": dict, "step": int}  # of a checkpoint, at least
ROOT = Path(__file__).resolve().parents[1]
SOURCE = "*.py */*.py */*.json */*.yaml */*.md assets/* pyproject.toml requirements.lock".split()
LEFTOVER = re.compile(r"(step_\d+|.+\.\d+)\.part")  # what a process was writing when it was killed
NOT_SOURCE = ("tests", "docs", "out", "data", ".venv")  # folders of the root


class Saver:
    """Writes checkpoints one at a time in a thread: training waits for a copy of the state, not for the disk.

    A write that failed is raised by the next call of any method; where none comes any more, because something
    else ended the run, it is printed at the exit, which waits for the thread.
    """

    def __init__(self):
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.write: Future | None = None  # the newest, until its end was seen
        self.memory: dict[tuple, torch.Tensor] = {}  # of the copy
        self.waited_ms = 0.0  # by training, for the newest
        atexit.register(self.print_error)

    def save(self, path: Path, state: dict, keep: int) -> dict[str, float]:
        """Begin to write a copy of `state`; what is trained may change when this returns.

        returns: perf/* of the write before this one, if its end had not been seen.
        """
        start = time.perf_counter()
        finished = self.finish()
        state = copy_to_host(state, self.memory)
        self.waited_ms = 1000 * (time.perf_counter() - start)
        self.write = self.thread.submit(timed_save, path, state, keep)
        return finished

    def finished(self) -> dict[str, float]:
        """perf/* of a write that has ended, once: what training waited, what it took; else {}."""
        if self.write is None or not self.write.done():
            return {}
        write = self.write
        self.write = None
        return {"perf/save_ms": self.waited_ms, "perf/save_write_sec": write.result()}

    def finish(self) -> dict[str, float]:
        """As `finished`, once nothing is being written any more."""
        wait([self.write] if self.write else [])
        return self.finished()

    def print_error(self) -> None:
        error = self.write and self.write.exception()
        if error:
            print(f"error: {error}", file=sys.stderr)


def copy_to_host(state, memory: dict[tuple, torch.Tensor], place: tuple = ()):
    """A copy of nested dicts and lists, their tensors on the CPU.

    memory: the tensors that are copied to, by their places in the state; those that lack are made, pinned
    where they come from a GPU. New memory costs a CPU more than the copy, hence it is kept.
    """
    if isinstance(state, dict):
        return {key: copy_to_host(value, memory, (*place, key)) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_to_host(value, memory, (*place, n)) for n, value in enumerate(state)]
    if not torch.is_tensor(state):
        return state
    if place not in memory:
        memory[place] = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
    return memory[place].copy_(state)


def timed_save(path: Path, state: dict, keep: int) -> float:
    """returns: the seconds that it took."""
    start = time.perf_counter()
    save_checkpoint(path, state, keep)
    return time.perf_counter() - start


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
        value.copy_(like(state["ema"][name], value))
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
        optimizer.load_state_dict(optimizer_state(saved, optimizer))
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

    saved: the config that they were trained with.
    """
    for key, then, now in list_changes(config, saved):
        raise UserError(f"{where}: was trained with {key} {then!r}, not {now!r}; choose another out_dir")


def list_changes(config: Config, saved: dict) -> list[tuple[str, object, object]]:
    """Fixed keys that differ, as (name, saved value, value now); what an older tree did not save does not."""
    changes = []
    for key in configs.fixed_keys(type(config)):
        section, knob = key.split(".")
        values = getattr(config, section)
        saved_values = saved.get(section, {})
        now = getattr(values, knob)
        then = saved_values.get(knob, now)
        if then != now:
            changes.append((key, then, now))
    return changes


def begin_with(network: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load what `weights_of` found in `path` into a new network.

    The statistics of the log-mels stay those of the network's own corpus.
    raises UserError as `check_weights`.
    """
    own = trained_weights(network)
    kept = {name: own[name] for name in statistics(network)}
    load_weights(network, weights | kept, str(path))
    print(f"begins with the weights of {path}", flush=True)


def weights_of(path: Path, config: Config) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint, for a run to begin with, whatever corpus they were trained on.

    raises UserError where `config` would have them mean something else.
    """
    state = load_checkpoint(path)
    configs.from_checkpoint(type(config), state["config"], str(path))  # its values are what they must be
    for key, then, now in list_changes(config, state["config"]):
        if not key.startswith("data."):
            raise UserError(f"train.init {path}: was trained with {key} {then!r}, not {now!r}")
    return {**state["model"], **state["ema"]}


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
    own = trained_weights(network)
    check_weights(own, found, where)
    found = {name: like(value, own[name]) for name, value in found.items()}
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
    for path in out.rglob("*.part"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    return held


# The record of a run


def record_run(config: Config, train: Train, network: nn.Module, device: torch.device, world: int) -> None:
    """Print what is about to run, and keep what repeating it takes: config.yaml, run.json and the source.

    config: as it was asked for. train: what that came to on this machine.
    """
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
        "dtype": train.dtype,
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
        f"in {train.dtype} on {hardware_name(device, world)}, {describe_batch(config.train, train, world)}, "
        f"into {out}/",
        flush=True,
    )


def describe_batch(asked: Train, train: Train, world: int) -> str:
    """64 clips an update: 8 ranks x 8. asked, train: before and after each rank's share was settled."""
    shares = []
    if world > 1:
        shares.append(f"{world} ranks x ")
    if train.grad_accum > 1:
        shares.append(f"{train.grad_accum} micro-steps x ")
    said = f"{train.global_batch} clips an update"
    if shares:
        said += f": {''.join(shares)}{train.batch_size}"
    if train.global_batch != asked.global_batch:
        said += f" (train.batch_size, not train.global_batch {asked.global_batch})"
    return said


def copy_source(folder: Path) -> None:
    for path in source_files():
        copy(ROOT / path, folder / path)


def source_files() -> list[Path]:
    """All of the source, so that a run can be repeated: every Python file and the data that they read.

    returns paths inside the root, sorted.
    """
    found = set()
    for pattern in SOURCE:
        for path in ROOT.glob(pattern):
            path = path.relative_to(ROOT)
            if path.parts[0] not in NOT_SOURCE:
                found.add(path)
    return sorted(found)


def source_digest() -> str:
    """SHA-256 of the source, the same in every copy of it."""
    content = hashlib.sha256()
    for path in source_files():
        content.update(f"{path.as_posix()} {(ROOT / path).stat().st_size}\n".encode())
        content.update((ROOT / path).read_bytes())
    return content.hexdigest()


def copy(source: Path, target: Path) -> None:
    """The content of a file, unless that is there; not that the file may be read-only."""
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        with atomic_write(target) as part:
            shutil.copyfile(source, part)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def commit() -> str:
    """What the source is, as git calls it; where there is no git, or no history, by its digest."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        name = found.stdout.strip()
    except OSError:  # git is not installed
        name = ""
    return name or f"source sha256:{source_digest()[:10]}"
