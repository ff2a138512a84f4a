"""What a system is, the table of systems, and how one is built, saved and loaded.

A checkpoint holds plain tensors and values: model (frozen networks left out), EMA, optimizers, step, config. It is written to a
temporary file and renamed, so there is never half of one, and read with `weights_only`, so it can run no code.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import torch.nn as nn
import yaml

import config as configs
import data
import model
from config import Config, Sample, UserError


class System(Protocol):
    """What the loop and the sampler ask of a network, and all that they know about it."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """returns: `loss` and other scalars to log; a deterministic function of the batch and the weights."""

    def sample(self, prompts: Sequence[model.Prompt], settings: Sample) -> list[model.Artifact]: ...

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon trains; AdamW has the others."""


@dataclass(frozen=True)
class Parts:
    """What a system is made of: its network, its packed corpus, and the batches drawn from that."""
    network: type
    corpus: type
    batches: type


SYSTEMS = {
    "tts": Parts(model.TextToSpeech, data.Corpus, data.Batches),
}


def build(config: Config, mean: float = 0.0, std: float = 1.0) -> nn.Module:
    """The network of `config.system` with fresh weights drawn from `config.seed`; mean, std: what its corpus is normalised by."""
    torch.manual_seed(config.seed)
    return SYSTEMS[config.system].network(config, mean, std)


def open_corpus(config: Config):
    """The packed corpus of `config.data.data_dir`; raises UserError where it is missing or does not fit the config."""
    return SYSTEMS[config.system].corpus(config)


def open_batches(config: Config, corpus, network: nn.Module, rank: int, world: int):
    return SYSTEMS[config.system].batches(config, corpus, network.tokenizer, rank, world)


def optimizers(network: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (Jordan et al. 2024), AdamW for the rest; each group keeps its own peak rate in `peak_lr`."""
    t = config.train
    hidden = network.hidden_matrices()
    names = {id(p) for p in hidden}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in names]
    made = [torch.optim.Muon(hidden, lr=t.muon_lr, weight_decay=t.weight_decay, momentum=0.95),
            torch.optim.AdamW(rest, lr=t.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return made


class Average:
    """An exponential moving average of the trainable weights; `with average:` evaluates with it."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The decay grows to its value over the first steps, so that the random start is soon forgotten."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for name, p in self.live.items():
            kept = p.detach().clone()
            p.copy_(self.mean[name])
            self.mean[name].copy_(kept)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_error) -> None:
        self.swap()


def save_checkpoint(path: Path, state: dict, keep: int) -> None:
    """Write atomically, then remove all but the newest `keep` checkpoints of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    for old in sorted(path.parent.glob("step_*.pt"))[:-keep]:
        old.unlink()


def newest_checkpoint(out_dir: str) -> Path | None:
    return max(Path(out_dir, "checkpoints").glob("step_*.pt"), default=None)


def load_checkpoint(path: Path) -> dict:
    """The checkpoint at `path`, on the CPU.

    raises UserError for a file that is missing, truncated, a pickle, or something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):         # about a pickle, which is refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such checkpoint") from e
    except Exception as e:                                     # garbage fails in every way there is
        raise UserError(f"{path}: not a readable checkpoint; it is truncated, or was not written by nanoaudio") from e
    if not isinstance(state, dict) or not {"config", "model", "ema", "step"} <= state.keys():
        raise UserError(f"{path}: not a nanoaudio checkpoint: it lacks config, model, ema or step")
    return state


def resume(out_dir: str, network: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load the newest checkpoint of `out_dir`, if there is one; returns its step and the seconds trained."""
    path = newest_checkpoint(out_dir)
    if path is None:
        return 0, 0.0
    state = load_checkpoint(path)
    load_weights(network, state["model"], str(path))
    for name, value in average.mean.items():
        value.copy_(state["ema"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        peaks = [group["peak_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["peak_lr"] = peak                            # a rate changed on the command line holds
    print(f"resumed from {path}", flush=True)
    return state["step"], state["seconds"]


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Load with exact key and shape equality; raises UserError naming the first difference."""
    own = network.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        raise UserError(f"{where}: {name} is {'missing' if name in own else 'not part of this model'}; was it trained with another config?")
    for name, value in own.items():
        if value.shape != weights[name].shape:
            raise UserError(f"{where}: {name} has shape {tuple(weights[name].shape)}, this model has {tuple(value.shape)}")
    network.load_state_dict(weights)


def load(path: str, device: torch.device, overrides: dict[str, dict], out_dir: str = "") -> tuple[Config, nn.Module, int]:
    """A trained system, ready to sample, with its averaged weights; returns its config, the network and its step.

    path: a checkpoint, or the folder of a run, of which the newest is taken.
    overrides, out_dir: sections of the config to change, {"sample": {"vocoder": ...}}, and its out_dir.
    """
    if Path(path).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: holds no checkpoints/step_*.pt")
        path = newest
    state = load_checkpoint(Path(path))
    values = {**state["config"], **({"out_dir": out_dir} if out_dir else {})}
    for section, changes in overrides.items():
        values = {**values, section: {**values.get(section, {}), **changes}}
    config = configs.from_dict(values, where=str(path))
    network = build(config)
    load_weights(network, {**state["model"], **state["ema"]}, str(path))
    return config, network.to(device).eval(), state["step"]


def record_run(config: Config, network: nn.Module, device: torch.device, world: int) -> None:
    """Print what is about to run, and keep what it takes to run it again: config.yaml, run.json and the source."""
    out, here = Path(config.out_dir), Path(__file__).parent
    (out / "source").mkdir(parents=True, exist_ok=True)
    for source in here.glob("*.py"):
        shutil.copy(source, out / "source")
    (out / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(config), sort_keys=False))
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=here, capture_output=True, text=True)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    on_gpu = device.type == "cuda"
    hardware = f"{world} x {torch.cuda.get_device_name(device)}" if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    libraries = {name: version(name) for name in ("torch", "transformers", "openai-whisper", "numpy")}
    run = {"command": " ".join(sys.argv), "commit": git.stdout.strip() or "unknown", "hardware": hardware, "parameters": parameters,
           "started": datetime.datetime.now().isoformat(timespec="seconds"),
           "versions": {"python": platform.python_version(), **libraries}}
    (out / "run.json").write_text(json.dumps(run, indent=1))
    print(f"{config.system}: {parameters / 1e6:.1f} M trained parameters on {hardware}, into {out}/", flush=True)


def pick_device(wanted: str) -> torch.device:
    """auto | cpu | cuda -> the device; auto is CUDA where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no usable CUDA GPU; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
