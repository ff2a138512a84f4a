"""The table of systems, and how one is built, saved and loaded.

`python system.py prepare --config FILE [--key value ...]` makes what a config's training needs: a packed
corpus, caches; `export` writes what other software loads. A checkpoint holds plain tensors and values: model
(what is frozen left out), EMA, optimizers, step, config. It is written to a temporary file and renamed, so
there is never half of one, and read with `weights_only`, so it can run no code.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import yaml

import config as configs
import data
import model
import music
import spectrogram
import speech2image
from config import Config, Sample, TTSConfig, UnknownKey, UserError, run_main
from device import hardware, move, pick_device, pick_dtype
from klein_config import SpectrogramConfig
from music_config import MusicConfig
from speech2image_config import SpeechAlignConfig, SpeechImageConfig


class Artifact(Protocol):
    """What a system made: a wave (N,) at `sample_rate` Hz, on the CPU, and pictures of it."""

    wave: torch.Tensor
    sample_rate: int

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`.

        returns: their names by kind, {"picture": "000.png", "attention": ...}; there is always a picture, and
        the report also shows attention and confidence.
        """


class Corpus(Protocol):
    """The clips of a packed corpus, as `system` reads them."""

    folder: Path  # where it is packed; floors measured on it are kept there
    plan: str  # digest of what was packed and how
    statistics: tuple[float, ...]  # what the network is built with beside the config, as (mean, std), or ()

    def clips(self, split: str) -> list[data.Clip]:
        """Those of train | val | test, always in the same order."""

    def recording(self, clip: data.Clip) -> tuple[torch.Tensor, int] | None:
        """The sound as recorded, a wave (N,), and its rate in Hz, equal for all clips; None without one."""


class Batches(Protocol):
    """Dicts of CPU tensors, in which all that is random is drawn; t (B,) and frames (B,) are in each."""

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        """This rank's part of a micro-batch: a function of (config.seed, step, micro, rank)."""

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """This rank's share of the clips validated on, the same every time."""


class System(Protocol):
    """What the loop, the evaluator and the sampler ask of a network (an nn.Module), and all they know of it.

    A parameter that is not to be trained has requires_grad False from the start; it is in no checkpoint.
    """

    tokenizer: Callable  # handed on to its batches
    makes: tuple[str, ...]  # the endings of what it makes: wav, png
    speaks: bool  # whether it makes speech, of which a recogniser tells how much is understood
    listens: bool  # whether its prompts are speech, not texts
    longest: int  # characters that it takes in one go
    frame_rate: float  # Hz: `frames` of a clip or batch in a second

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A deterministic function of the batch and the weights.

        returns: loss and other scalars to log, each a mean over the batch; flow_loss_per_clip (B,), if given,
        is binned by t.
        """

    def sample(self, prompts: Sequence[model.Prompt], settings: Sample) -> list[Artifact]:
        """One of each prompt, made as one batch; raises UserError for a prompt that it cannot make."""

    def reference(self, corpus: Corpus, clip: data.Clip) -> Artifact:
        """The recorded clip through all but the generative network: what the best network could make."""

    def score(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, float]:
        """What was made beside the clip whose text it was made from: distances, and matches that are 0 or 1.

        returns: by keys in metric.SCORES.
        """

    def features(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, np.ndarray]:
        """Arrays from which evaluator.figures computes figures of a whole set; None in a system without."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon trains; AdamW has the others. Either may have none."""

    def load_adapter(self, name: str) -> None:
        """Put a published LoRA, a hub id or folder, on top of the weights.

        raises UserError if that cannot be.
        """

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what other software loads, with facts about it; raises UserError where there is none such."""


@dataclass(frozen=True)
class Parts:
    """What a system is made of."""

    config: type[Config]
    network: Callable[..., nn.Module]  # (config, *corpus.statistics) -> System
    corpus: Callable[[Config], Corpus]
    batches: Callable[..., Batches]  # (config, corpus, tokenizer, rank, world)
    prepare: Callable[[Config], None]  # makes what training needs and does not find


SYSTEMS = {
    "tts": Parts(TTSConfig, model.TextToSpeech, model.Corpus, model.SpeechBatches, model.prepare),
    "spectrogram": Parts(
        SpectrogramConfig,
        spectrogram.Spectrogram,
        data.Waves,
        spectrogram.PictureBatches,
        spectrogram.prepare,
    ),
    "music": Parts(MusicConfig, music.Music, music.Corpus, music.MusicBatches, music.prepare),
    "speech_align": Parts(
        SpeechAlignConfig,
        speech2image.SpeechAlign,
        speech2image.Corpus,
        speech2image.AlignBatches,
        speech2image.prepare_align,
    ),
    "speech_image": Parts(
        SpeechImageConfig,
        speech2image.SpeechImage,
        speech2image.Corpus,
        speech2image.ImageBatches,
        speech2image.prepare_image,
    ),
}


# Configs: only here is it known which class a system's is


def load_config(path: str = "", overrides: Sequence[str] = ()) -> Config:
    """As config.load, by the class of the system that the file or an override names; tts where none does."""
    values = named_values(path, configs.parse_overrides(overrides))
    return from_values(values, path, overrides)


def named_values(path: str, overrides: dict[str, str]) -> dict:
    """What a YAML file says, and always its system: that of the overrides comes first."""
    values = configs.read_yaml(path) if path else {}
    name = overrides.get("system") or values.get("system") or "tts"
    return {**values, "system": name}


def config_from_command_line(words: Sequence[str]) -> Config:
    """`--config PATH` and overrides, in any order, as `load_config`."""
    overrides = configs.parse_overrides(words)
    path = overrides.pop("config", "")
    return load_config(path, [f"--{key}={value}" for key, value in overrides.items()])


def from_values(values: dict, where: str, overrides: Sequence[str] = ()) -> Config:
    """The config of the system that plain values name, with overrides on top."""
    name = values["system"]
    cls = config_class(name, where)
    try:
        config = configs.from_dict(cls, values, where)
        return configs.overridden(config, overrides)
    except UnknownKey as e:
        owners = owners_of(e.name)
        if not owners:
            raise
        asked = f"{e.where}: {e.name}" if e.where else f"--{e.name}"
        have = "has" if len(owners) == 1 else "have"
        fault = f"{asked}: system {name} has no such key"
        raise UserError(f"{fault}; {', '.join(owners)} {have}") from e


def config_class(name: object, where: str = "") -> type[Config]:
    """raises UserError for a system that there is not."""
    if not isinstance(name, str) or name not in SYSTEMS:
        close = configs.nearest(str(name), list(SYSTEMS))
        fault = f"system must be one of {', '.join(SYSTEMS)}, got {name!r}{close}"
        raise UserError(f"{where}: {fault}" if where else fault)
    return SYSTEMS[name].config


def owners_of(name: str) -> list[str]:
    """The systems that have a section or a knob of this name, full or bare."""
    wanted = name.replace("-", "_")
    owners = []
    for system, parts in SYSTEMS.items():
        names = set()
        for key in configs.keys(parts.config):
            names |= {key, *key.split(".")}
        if wanted in names:
            owners.append(system)
    return owners


def describe_knobs(words: Sequence[str]) -> str:
    """The knobs of the system of a command line: the text of `--help`."""
    asked = [word for word in words if word not in ("-h", "--help")]
    given = configs.parse_overrides(asked)
    values = named_values(given.get("config", ""), given)
    return configs.describe(config_class(values["system"]))


# Building


def build(config: Config, *statistics: float) -> nn.Module:
    """The network of `config.system`, its weights drawn from `config.seed`; statistics: its corpus's."""
    torch.manual_seed(config.seed)
    return SYSTEMS[config.system].network(config, *statistics)


def open_corpus(config: Config):
    """The packed corpus of `config.data.data_dir`; raises UserError where it is missing or does not fit."""
    return SYSTEMS[config.system].corpus(config)


def open_batches(config: Config, corpus, network: nn.Module, rank: int, world: int):
    return SYSTEMS[config.system].batches(config, corpus, network.tokenizer, rank, world)


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
        means = list(self.mean.values())
        torch._foreach_lerp_(means, list(self.live.values()), 1 - decay)

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


# Checkpoints


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
        with warnings.catch_warnings(action="ignore"):  # about a pickle, which is refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such checkpoint") from e
    except Exception as e:  # garbage fails in every way there is
        message = f"{path}: not a readable checkpoint; it is truncated, or was not written by nanoaudio"
        raise UserError(message) from e
    if not isinstance(state, dict) or not {"config", "model", "ema", "step"} <= state.keys():
        raise UserError(f"{path}: not a nanoaudio checkpoint: it lacks config, model, ema or step")
    return state


def resume(
    config: Config, network: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load the newest checkpoint of config.out_dir, if any; returns its step and the seconds trained."""
    path = newest_checkpoint(config.out_dir)
    if path is None:
        return 0, 0.0
    state = load_checkpoint(path)
    load_weights(network, state["model"], str(path))
    check_unchanged(config, state["config"], str(path))
    for name, value in average.mean.items():
        value.copy_(state["ema"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        peaks = [group["peak_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["peak_lr"] = peak  # a rate changed on the command line holds
    print(f"resumed from {path}", flush=True)
    return state["step"], state["seconds"]


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
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


def load_weights(network: nn.Module, found: dict[str, torch.Tensor], where: str) -> None:
    """Load `weights`, with exact key and shape equality; raises UserError naming the first difference."""
    own = weights(network)
    differing = sorted(own.keys() ^ found.keys())
    if differing:
        name = differing[0]
        fault = "missing" if name in own else "not part of this model"
        raise UserError(f"{where}: {name} is {fault}; was it trained with another config?")
    for name, value in own.items():
        expected = tuple(value.shape)
        shape = tuple(found[name].shape)
        message = f"{where}: {name} has shape {shape}, this model has {expected}"
        if shape != expected:
            raise UserError(message)
    network.load_state_dict(found, strict=False)  # what is frozen stays as it was built


def load(
    path: str,
    device: torch.device,
    overrides: dict[str, dict],
    out_dir: str = "",
    words: Sequence[str] = (),
) -> tuple[Config, nn.Module, int]:
    """A trained system, ready to sample, with its averaged weights.

    returns: its config, the network, its step.
    path: a checkpoint, or the folder of a run, of which the newest is taken.
    overrides, out_dir: sections of the config to change, {"sample": {"vocoder": ...}}, and its out_dir.
    words: of a command line, ["--klein.base", "elsewhere"], on top.
    """
    if Path(path).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: holds no checkpoints/step_*.pt")
        path = newest
    state = load_checkpoint(Path(path))
    cls = config_class(state["config"].get("system"), str(path))
    values = configs.without_former(cls, state["config"])
    if out_dir:
        values["out_dir"] = out_dir
    for section, changes in overrides.items():
        if changes:
            values[section] = {**values.get(section, {}), **changes}
    config = from_values(values, str(path), words)
    config = settle_precision(config, device, world=1)
    network = build(config)
    load_weights(network, {**state["model"], **state["ema"]}, str(path))
    return config, move(network, device).eval(), state["step"]


# The record of a run


def record_run(config: Config, dtype: str, network: nn.Module, device: torch.device, world: int) -> None:
    """Print what is about to run, and keep what repeating it takes: config.yaml, run.json and the source."""
    out = Path(config.out_dir)
    here = Path(__file__).parent
    make_folder(out / "source" / "corpora")
    for source in (*here.glob("*.py"), *here.glob("corpora/*.py")):
        shutil.copy(source, out / "source" / source.relative_to(here))
    values = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    (out / "config.yaml").write_text(values)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    run = {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "hardware": hardware(device, world),
        "dtype": dtype,
        "parameters": parameters,
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()},
    }
    if frozen:
        run["frozen_parameters"] = frozen
    for name in ("torch", "transformers", "openai-whisper", "numpy"):
        run["versions"][name] = version(name)
    (out / "run.json").write_text(json.dumps(run, indent=1))
    beside = f" beside {frozen / 1e6:.1f} M frozen ones" if frozen else ""
    print(
        f"{config.system}: {parameters / 1e6:.1f} M trained parameters{beside} "
        f"in {dtype} on {hardware(device, world)}, into {out}/",
        flush=True,
    )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e


def commit() -> str:
    """What the source is, as git calls it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def settle_precision(config: Config, device: torch.device, world: int) -> Config:
    """The config with train.dtype auto made bf16 or fp32, the same on all ranks.

    A run that goes on keeps what it began with.
    """
    if config.train.dtype != "auto":
        return config
    dtype = [recorded_dtype(config.out_dir, hardware(device, world)) or pick_dtype(device)]
    if world > 1:
        dist.broadcast_object_list(dtype)  # what was measured may differ between ranks
    return replace(config, train=replace(config.train, dtype=dtype[0]))


def recorded_dtype(out_dir: str, here: str) -> str:
    """What a run that has a checkpoint was computed in, if on the hardware that is `here`; else ""."""
    try:
        run = json.loads(Path(out_dir, "run.json").read_text())
        known = newest_checkpoint(out_dir) and run["hardware"] == here
        return run["dtype"] if known else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Before and after training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    about_prepare = "--config FILE [--key value ...]: make all that it needs to train"
    commands.add_parser("prepare", help=about_prepare, allow_abbrev=False)
    about_export = "write a trained system as other software loads it"
    export = commands.add_parser("export", help=about_export, allow_abbrev=False)
    export.add_argument("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    export.add_argument("--out", required=True, type=Path, help="a folder")
    o, rest = parser.parse_known_args()
    if o.command == "prepare":
        config = config_from_command_line(rest)
        pick_device(config.device)  # what training will refuse is refused before anything is made
        SYSTEMS[config.system].prepare(config)
    else:
        config, network, step = load(o.ckpt, torch.device("cpu"), {}, words=rest)
        make_folder(o.out)
        facts = {"step": str(step), "commit": commit(), "corpus": config.data.corpus}
        network.export(o.out, facts)
        files = [path for path in o.out.rglob("*") if path.is_file()]
        print("made:", *sorted(files))


if __name__ == "__main__":
    run_main(main)
