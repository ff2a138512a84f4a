"""What a system is, the table of systems, and how one is built, saved and loaded. `python system.py prepare --config FILE
[--key value ...]` makes what a config's training needs: a packed corpus, caches; `export` writes what other software loads.

A checkpoint holds plain tensors and values: model (what is frozen left out), EMA, optimizers, step, config. It is written to a
temporary file and renamed, so there is never half of one, and read with `weights_only`, so it can run no code.
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
from config import Config, Sample, UserError, run_main
from device import hardware, move, pick_device, pick_dtype


class Artifact(Protocol):
    """What a system made: a wave (N,) at `sample_rate` Hz, on the CPU, and pictures of it."""
    wave: torch.Tensor
    sample_rate: int

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`; returns what they are and their names: {"picture": "000.png", "attention": ...}.

        picture is always one of them; the report also shows attention and confidence.
        """


class Corpus(Protocol):
    """The clips of a packed corpus, as `system` reads them."""
    folder: Path                               # where it is packed; floors measured on it are kept there
    plan: str                                  # digest of what was packed and how
    statistics: tuple[float, ...]              # what the network is built with beside the config, as (mean, std), or ()

    def clips(self, split: str) -> list[data.Clip]:
        """Those of train | val | test, always in the same order."""

    def recording(self, clip: data.Clip) -> tuple[torch.Tensor, int] | None:
        """The sound as it was recorded, a wave (N,), and its rate in Hz, the same for all clips; None where there is none."""


class Batches(Protocol):
    """Batches as dicts of CPU tensors, in which everything random is drawn; t (B,) and frames (B,) are always among them."""

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        """This rank's part of a micro-batch: a function of (config.seed, step, micro, rank)."""

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """This rank's share of the clips validated on, the same every time."""


class System(Protocol):
    """What the loop, the evaluator and the sampler ask of a network (an nn.Module), and all that they know about it.

    A parameter that is not to be trained has requires_grad False from the start; it is in no checkpoint.
    """
    tokenizer: Callable                        # handed on to its batches
    makes: tuple[str, ...]                     # the endings of what it makes: wav, png
    speaks: bool                               # whether what it makes is speech, of which a recogniser tells how much is understood
    listens: bool                              # whether its prompts are speech, not texts
    longest: int                               # characters that it takes in one go
    frame_rate: float                          # Hz: `frames` of a clip or batch in a second

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A deterministic function of the batch and the weights.

        returns: loss and other scalars, each a mean over the batch, to log; flow_loss_per_clip (B,), if given, is binned by t.
        """

    def sample(self, prompts: Sequence[model.Prompt], settings: Sample) -> list[Artifact]:
        """One of each prompt, made as one batch; raises UserError for a prompt that it cannot make."""

    def reference(self, corpus: Corpus, clip: data.Clip) -> Artifact:
        """The recorded clip through everything but the generative network: what the best network could make."""

    def score(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, float]:
        """What was made beside the clip whose text it was made from, by keys in metric.SCORES: distances, and matches that are 0 or 1."""

    def features(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, np.ndarray]:
        """Arrays from which evaluator.figures computes figures of a whole set; `features = None` in a system that has none."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon trains; AdamW has the others. Either may have none."""

    def load_adapter(self, name: str) -> None:
        """Put a published LoRA, a hub id or a folder, on top of the weights; raises UserError where that cannot be."""

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what other software loads, with the facts about it; raises UserError where nobody else does."""


@dataclass(frozen=True)
class Parts:
    """What a system is made of."""
    network: Callable[..., nn.Module]          # (config, *corpus.statistics) -> System
    corpus: Callable[[Config], Corpus]
    batches: Callable[..., Batches]            # (config, corpus, tokenizer, rank, world)
    prepare: Callable[[Config], None]          # makes what training needs and does not find


SYSTEMS = {
    "tts": Parts(model.TextToSpeech, model.Corpus, model.SpeechBatches, model.prepare),
    "spectrogram": Parts(spectrogram.Spectrogram, data.Waves, spectrogram.PictureBatches, spectrogram.prepare),
    "music": Parts(music.Music, music.Corpus, music.MusicBatches, music.prepare),
    "speech_align": Parts(speech2image.SpeechAlign, speech2image.Corpus, speech2image.AlignBatches, speech2image.prepare_align),
    "speech_image": Parts(speech2image.SpeechImage, speech2image.Corpus, speech2image.ImageBatches, speech2image.prepare_image),
}


def build(config: Config, *statistics: float) -> nn.Module:
    """The network of `config.system` with fresh weights drawn from `config.seed`; statistics: its corpus's."""
    torch.manual_seed(config.seed)
    return SYSTEMS[config.system].network(config, *statistics)


def open_corpus(config: Config):
    """The packed corpus of `config.data.data_dir`; raises UserError where it is missing or does not fit the config."""
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


def resume(config: Config, network: nn.Module, average: Average, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load the newest checkpoint of config.out_dir, if there is one; returns its step and the seconds trained."""
    path = newest_checkpoint(config.out_dir)
    if path is None:
        return 0, 0.0
    state = load_checkpoint(path)
    load_weights(network, state["model"], str(path))
    check_unchanged(configs.to_dict(config), state["config"], str(path))
    for name, value in average.mean.items():
        value.copy_(state["ema"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        peaks = [group["peak_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["peak_lr"] = peak                            # a rate changed on the command line holds
    print(f"resumed from {path}", flush=True)
    return state["step"], state["seconds"]


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a network: its state_dict without frozen parameters."""
    frozen = {name for name, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


MAY_MOVE = ("base", "checkpointing", "weights", "autoencoder", "vector_encoder", "stage1", "vq", "require_r1")       # or change no result


def check_unchanged(config: dict, saved: dict, where: str) -> None:
    """raises UserError where the weights would fit, and mean something else: another alpha, another picture."""
    sections = ("mel", "picture", "model", "klein", "music", "align", "codes")
    for section, keys in {**{name: config[name] for name in sections}, "flow": ("predict", "min_t")}.items():
        for key in keys:
            now, then = config[section][key], saved.get(section, {}).get(key, config[section][key])
            if now != then and key not in MAY_MOVE:
                raise UserError(f"{where}: was trained with {section}.{key} {then!r}, not {now!r}; choose another out_dir")


def load_weights(network: nn.Module, found: dict[str, torch.Tensor], where: str) -> None:
    """Load `weights`, with exact key and shape equality; raises UserError naming the first difference."""
    own = weights(network)
    for name in sorted(own.keys() ^ found.keys()):
        raise UserError(f"{where}: {name} is {'missing' if name in own else 'not part of this model'}; was it trained with another config?")
    for name, value in own.items():
        if value.shape != found[name].shape:
            raise UserError(f"{where}: {name} has shape {tuple(found[name].shape)}, this model has {tuple(value.shape)}")
    network.load_state_dict(found, strict=False)               # what is frozen stays as it was built


def load(path: str, device: torch.device, overrides: dict[str, dict], out_dir: str = "",
         words: Sequence[str] = ()) -> tuple[Config, nn.Module, int]:
    """A trained system, ready to sample, with its averaged weights; returns its config, the network and its step.

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
    values = {**state["config"], **({"out_dir": out_dir} if out_dir else {})}
    for section, changes in overrides.items():
        values = {**values, section: {**values.get(section, {}), **changes}}
    config = configs.overridden(configs.from_dict(values, where=str(path)), list(words))
    config = settle_precision(config, device, world=1)
    network = build(config)
    load_weights(network, {**state["model"], **state["ema"]}, str(path))
    return config, move(network, device).eval(), state["step"]


def record_run(config: Config, dtype: str, network: nn.Module, device: torch.device, world: int) -> None:
    """Print what is about to run, and keep what it takes to run it again: config.yaml, run.json and the source."""
    out, here = Path(config.out_dir), Path(__file__).parent
    make_folder(out / "source" / "corpora")
    for source in (*here.glob("*.py"), *here.glob("corpora/*.py")):
        shutil.copy(source, out / "source" / source.relative_to(here))
    (out / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(config), sort_keys=False))
    parameters, frozen = (sum(p.numel() for p in network.parameters() if p.requires_grad == trained) for trained in (True, False))
    libraries = {name: version(name) for name in ("torch", "transformers", "openai-whisper", "numpy")}
    run = {"command": " ".join(sys.argv), "commit": commit(), "hardware": hardware(device, world),
           "dtype": dtype, "parameters": parameters,
           **({"frozen_parameters": frozen} if frozen else {}), "started": datetime.datetime.now().isoformat(timespec="seconds"),
           "versions": {"python": platform.python_version(), **libraries}}
    (out / "run.json").write_text(json.dumps(run, indent=1))
    beside = f" beside {frozen / 1e6:.1f} M frozen ones" if frozen else ""
    print(f"{config.system}: {parameters / 1e6:.1f} M trained parameters{beside} in {dtype} on {hardware(device, world)}, into {out}/", flush=True)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e


def commit() -> str:
    """What the source is, as git calls it."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def settle_precision(config: Config, device: torch.device, world: int) -> Config:
    """The config with train.dtype auto made bf16 or fp32, the same on all ranks; a run that goes on keeps what it began with."""
    if config.train.dtype != "auto":
        return config
    dtype = [recorded_dtype(config.out_dir, hardware(device, world)) or pick_dtype(device)]
    if world > 1:
        dist.broadcast_object_list(dtype)                      # what was measured may differ between ranks
    return replace(config, train=replace(config.train, dtype=dtype[0]))


def recorded_dtype(out_dir: str, here: str) -> str:
    """What a run that has a checkpoint was computed in, if on the hardware that is `here`; "" where there is none."""
    try:
        run = json.loads(Path(out_dir, "run.json").read_text())
        known = newest_checkpoint(out_dir) and run["hardware"] == here
        return run["dtype"] if known else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Before and after training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="--config FILE [--key value ...]: make all that it needs to train", allow_abbrev=False)
    export = commands.add_parser("export", help="write a trained system as other software loads it", allow_abbrev=False)
    export.add_argument("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    export.add_argument("--out", required=True, type=Path, help="a folder")
    o, rest = parser.parse_known_args()
    if o.command == "prepare":
        config = configs.from_command_line(rest)
        pick_device(config.device)             # what training will refuse is refused before anything is made
        SYSTEMS[config.system].prepare(config)
    else:
        config, network, step = load(o.ckpt, torch.device("cpu"), {}, words=rest)
        make_folder(o.out)
        network.export(o.out, {"step": str(step), "commit": commit(), "corpus": config.data.corpus})
        print("made:", *sorted(path for path in o.out.rglob("*") if path.is_file()))


if __name__ == "__main__":
    run_main(main)
