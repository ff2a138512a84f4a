"""The table of systems: how one is found, configured, built, loaded with its weights.

`python system.py prepare --config FILE [--key value ...]` makes what a config's training needs: a packed
corpus, caches; `python system.py export --ckpt RUN --out FOLDER` writes what other software loads.
"""

import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import config as configs
from base import Batches, Corpus, System
from config import Config, UnknownKey, UserError, expand_path
from corpora import shards
from device import compiler_fault, hardware_name, move, pick_device, pick_dtype
from entry import Parser, run_main
from pretrained import asr
from tracking import checkpoint

# A line a system: its name in a recipe, and its class. Looked up when it is asked for, so that text-to-speech
# does not import what others need, and that a system is deleted with its folder and its line.
SYSTEMS = {
    "tts": "tts:TextToSpeech",
    "spectrogram": "klein.system:Spectrogram",
    "music": "music.system:Music",
    "speech_align": "speech2image.align:SpeechAlign",
    "speech_image": "speech2image.image:SpeechImage",
}


def find(name: object, where: str = "") -> type[System]:
    """The class of a system; raises UserError for one that there is not. where: what says so, as a file."""
    if not isinstance(name, str) or name not in SYSTEMS:
        close = configs.nearest(name, list(SYSTEMS)) if isinstance(name, str) else ""
        fault = f"system must be one of {', '.join(SYSTEMS)}, got {configs.QUOTED.repr(name)}{close}"
        raise UserError(f"{where}: {fault}" if where else fault)
    return pkgutil.resolve_name(SYSTEMS[name])


def reader_of(corpus: str) -> tuple[type[Config], Callable]:
    """Whose corpus it is, for `python data.py`: the config and the reader of the first system that has it."""
    known = []
    for name in SYSTEMS:
        system = find(name)
        if corpus in system.readers:
            return system.config_class, system.readers[corpus]
        known += system.readers
    raise UserError(f"{corpus}: no such corpus; there are {', '.join(known)}")


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
    cls = find(name, where).config_class
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


def owners_of(name: str) -> list[str]:
    """The systems that have a section or a knob of this name, full or bare."""
    wanted = name.replace("-", "_")
    owners = []
    for system in SYSTEMS:
        names = set()
        for key in configs.keys(find(system).config_class):
            names |= {key, *key.split(".")}
        if wanted in names:
            owners.append(system)
    return owners


def describe_knobs(words: Sequence[str]) -> str:
    """The knobs of the system of a command line and the values that it gives them: the text of `--help`."""
    config = config_from_command_line([word for word in words if word not in ("-h", "--help")])
    return (
        f"Knobs of system {config.system}: --key value, or the bare key where it is unique, --lr 1e-3.\n"
        f"[In brackets: the value that this command line gives.]\n\n{configs.describe(config)}"
    )


# Building


def build(config: Config, *statistics: float) -> System:
    """The network of `config.system`, its weights drawn from `config.seed`; statistics: its corpus's."""
    torch.manual_seed(config.seed)
    return find(config.system)(config, *statistics)


def begin(config: Config, *statistics: float) -> System:
    """The network of a run: as `build`; a new run begins with the weights of `train.init`, if given."""
    network = build(config, *statistics)
    path = find_init(config)
    if path:
        checkpoint.begin_with(network, checkpoint.weights_of(path, config), path)
    return network


def find_init(config: Config) -> Path | None:
    """The checkpoint of `train.init`; none is asked for where the run has one of its own."""
    if not config.train.init or checkpoint.newest_checkpoint(config.out_dir):
        return None
    return find_checkpoint(config.train.init)


def open_corpus(config: Config) -> Corpus:
    """The packed corpus of `config.data.data_dir`; raises UserError where it is missing or does not fit."""
    return find(config.system).corpus_class(config)


def open_batches(config: Config, corpus: Corpus, network: System, rank: int, world: int) -> Batches:
    return network.batches_class(config, corpus, network.tokenizer, rank, world)


def fetch(config: Config) -> None:
    """Load once what is published and will be needed; raises UserError where it cannot be had.

    Of a recogniser that cannot be had a line says what listens instead.
    """
    system = find(config.system)
    system.fetch(config)
    if system.speaks and config.train.eval_interval:
        asr.load(config.eval.recogniser, torch.device("cpu"))


def prepare(config: Config) -> None:
    """Make what the config's training needs and does not find, one process at a time.

    A line says what listens in place of a recogniser that cannot be had.
    """
    folder = Path(config.data.data_dir).absolute()
    lock = f".{folder.name}.lock"  # beside the folder: that may be still to be fetched
    with shards.alone(folder.with_name(lock), Path("data", lock), quiet=False):
        fetch(config)
        find(config.system).prepare(config)


def load(path: str, device: torch.device, words: Sequence[str] = ()) -> tuple[Config, System, int]:
    """A trained system, ready to sample, with its averaged weights.

    returns: its config, the network, its step.
    path: a checkpoint, or the folder of a run, of which the newest is taken.
    words: of a command line, what to change of its config: ["--klein.base", "elsewhere"].
    """
    path = find_checkpoint(path)
    config, state = read_checkpoint(path, device, words)
    return config, restore(config, state, path, device), state["step"]


def find_checkpoint(path: str) -> Path:
    """A checkpoint as it is named, or the newest in the folder of a run."""
    path = os.path.expanduser(path)
    if not Path(path).is_dir():
        return Path(path)
    newest = checkpoint.newest_checkpoint(path)
    if newest is None:
        raise UserError(f"{path}: holds no checkpoints/step_*.pt")
    return newest


def read_checkpoint(path: Path, device: torch.device, words: Sequence[str] = ()) -> tuple[Config, dict]:
    """A trained system whose network is not built yet: its config, as for `load`, and what is in the file.

    Its out_dir is the folder of the run that the checkpoint lies in now, unless `words` name another.
    """
    state = checkpoint.load_checkpoint(path)
    cls = find(state["config"].get("system"), str(path)).config_class
    values = configs.without_former(cls, state["config"])
    folder = path.absolute().parent
    values["out_dir"] = str(folder.parent if folder.name == "checkpoints" else folder)
    config = from_values(values, str(path), words)
    return settle_precision(settle_batch(config, world=1), device, world=1), state


def restore(config: Config, state: dict, path: Path, device: torch.device) -> System:
    """The network of what `read_checkpoint` found in the file `path`, with its averaged weights."""
    network = build(config)
    checkpoint.load_weights(network, {**state["model"], **state["ema"]}, str(path))
    return move(network, device).eval()


def settle(config: Config, device: torch.device, world: int) -> Config:
    """The config with all that it leaves to the machine, the same on all ranks; see the following."""
    config = settle_batch(config, world)
    config = settle_compile(config, device, world)
    return settle_precision(config, device, world)


def settle_batch(config: Config, world: int) -> Config:
    """The config with train.batch_size what a rank takes in a micro-step, train.global_batch what all take.

    raises UserError where the clips of an update cannot be shared out equally.
    """
    train = config.train
    shares = world * train.grad_accum
    batch_size = train.batch_size or train.global_batch // shares
    total = batch_size * shares
    if not train.batch_size and total != train.global_batch:
        nearest = max(1, round(train.global_batch / shares)) * shares
        raise UserError(
            f"train.global_batch {train.global_batch} cannot be shared out equally by {world} ranks x "
            f"{train.grad_accum} micro-steps (--grad_accum); the nearest that can is --global_batch {nearest}"
        )
    return replace(config, train=replace(train, batch_size=batch_size, global_batch=total))


def settle_compile(config: Config, device: torch.device, world: int) -> Config:
    """The config with train.compile off, and one line about it, where a rank lacks what that takes."""
    if not config.train.compile:
        return config
    fault = compiler_fault(device)
    faults = [fault] * world
    if world > 1:
        dist.all_gather_object(faults, fault)
    lack = max(faults)
    if not lack:
        return config
    if world == 1 or dist.get_rank() == 0:
        print(f"train.compile: {lack}; going on uncompiled", flush=True)
    return replace(config, train=replace(config.train, compile=False))


def settle_precision(config: Config, device: torch.device, world: int) -> Config:
    """The config with train.dtype auto made bf16 or fp32, the same on all ranks.

    A run that goes on keeps what it began with.
    """
    if config.train.dtype != "auto":
        return config
    dtype = [recorded_dtype(config.out_dir, hardware_name(device, world)) or pick_dtype(device)]
    if world > 1:
        dist.broadcast_object_list(dtype)  # what was measured may differ between ranks
    return replace(config, train=replace(config.train, dtype=dtype[0]))


def recorded_dtype(out_dir: str, here: str) -> str:
    """What a run that has a checkpoint was computed in, if on the hardware that is `here`; else ""."""
    try:
        run = json.loads(Path(out_dir, "run.json").read_text())
        known = checkpoint.newest_checkpoint(out_dir) and run["hardware"] == here
        return run["dtype"] if known else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def main() -> None:
    parser = Parser(description="Before and after training.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    about_prepare = "--config FILE [--key value ...]: make all that it needs to train"
    preparing = commands.add_parser("prepare", help=about_prepare, allow_abbrev=False)
    preparing.add_argument("--ranks", type=int, default=1, help="how many will train, on all machines")
    about_export = "write a trained system as other software loads it"
    export = commands.add_parser("export", help=about_export, allow_abbrev=False)
    export.add_argument("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    export.add_argument("--out", required=True, type=expand_path, help="a folder")
    o, rest = parser.parse_known_args()
    if o.command == "prepare":
        config = config_from_command_line(rest)
        # what training will refuse, or lack, is said before anything is made
        device = pick_device(config.device)
        settle_batch(config, o.ranks)
        settle_compile(config, device, world=1)
        path = find_init(config)
        if path:
            checkpoint.weights_of(path, config)
        prepare(config)
    else:
        config, network, step = load(o.ckpt, torch.device("cpu"), rest)
        checkpoint.make_folder(o.out)
        facts = {"step": str(step), "commit": checkpoint.commit(), "corpus": config.data.corpus}
        network.export(o.out, facts)
        files = [path for path in o.out.rglob("*") if path.is_file()]
        print("made:", *sorted(files))


if __name__ == "__main__":
    run_main(main)
