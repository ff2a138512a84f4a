"""What every system's config has, that of text-to-speech, and the loader, which knows no system.

A config is a frozen pydantic dataclass of sections; a further system subclasses what stands here. Bounds and
choices stand at the field, what must fit together in a `check_...` method of the smallest class that has it.
The comment above or beside a field is its help: `python train.py --config FILE --help`. A YAML holds only
what differs from the defaults; unknown keys and wrong types are errors that name the nearest key.
A knob costs two edits, the field and its use; a test fails on one that nothing reads.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import re
import reprlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass


class UserError(Exception):
    """Something the user can fix: entry points print it as one line and exit with code 2."""


class WriteError(UserError):
    """What cannot be written, for want of room or of the right: no fault of what was to be written."""


class UnknownKey(UserError):
    """A key that a config does not have. name: its full one, or, where it was typed, what was typed."""

    def __init__(self, where: str, name: str, hint: str):
        self.where = where
        self.name = name
        super().__init__(f"{where}: unknown key {name}{hint}" if where else f"--{name}: unknown key{hint}")


# What Python's and PyYAML's readers raise, besides errors of their own, of a text that is damaged on purpose
DAMAGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
QUOTED = reprlib.Repr()  # of a value in an error: eight aliases of YAML may be a billion entries
QUOTED.maxlevel = 2
QUOTED.maxstring = QUOTED.maxother = QUOTED.maxlong = 200


def require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
section = functools.partial(dataclass, frozen=True, config=STRICT)  # the decorator of every section

# Types of fields

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # a share of something, or a probability
Count = Annotated[int, Field(gt=0)]
Whole = Annotated[int, Field(ge=0)]  # where 0 means something: off, none, all
Device = Literal["auto", "cpu", "cuda", "mps"]
DEVICES = get_args(Device)


def expand_path(typed: str) -> Path:
    """A path of the command line."""
    return Path(os.path.expanduser(typed))


def as_text(value: object) -> object:
    """A number as it is written; ~/x, which a shell leaves alone behind a =, in the home folder."""
    if type(value) in (int, float):
        return str(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(as_text)]
MOVABLE = "movable"  # marks a field that may change when a run goes on: a place, or what changes no result
Place = Annotated[Text, MOVABLE]  # a hub id, folder or file

BOUND = re.compile(r"(at most|at least) +(\d*\.?\d+)")


def check_bounds(expect: object) -> object:
    """Figures and their bounds, {"eval/wer": "at most 0.1"}."""
    if not isinstance(expect, dict):
        return expect
    bounds = {}
    for figure, bound in expect.items():
        bounds[str(figure)] = bound
        require(
            isinstance(bound, str) and BOUND.fullmatch(bound) is not None,
            f"expect: a bound is at most or at least, and a number: at most 0.1; got {QUOTED.repr(bound)}",
        )
    return bounds


Bounds = Annotated[dict[str, str], BeforeValidator(check_bounds)]

# Sections of every system, or of several


@section
class Mel:
    """Log-mels as BigVGAN's `22khz_80band_fmax8k_256x` reads them; every packed corpus must have the same."""

    sample_rate: Count = 22050  # Hz
    n_fft: Count = 1024  # samples
    hop: Count = 256  # samples a frame: 86.13 frames a second
    n_mels: Count = 80  # bins
    fmin: NonNegative = 0.0  # Hz
    fmax: Positive = 8000.0  # Hz
    # frame m stands at sample m hop, and no 1e-9 beside the magnitude: as AudioLDM2
    centred: bool = False

    @model_validator(mode="after")
    def check_mel(self):
        highest = self.sample_rate / 2
        message = f"mel.fmax {self.fmax} must lie between mel.fmin and half of mel.sample_rate"
        require(self.fmin < self.fmax <= highest, message)
        require(self.hop <= self.n_fft, f"mel.hop {self.hop} is above mel.n_fft {self.n_fft}")
        return self


@section
class Data:
    corpus: str = ""  # what is in data_dir
    data_dir: Text = ""  # packed shards, or a folder as published, which is packed on first use
    sentences: Count = 900  # of a corpus made on the spot: how many to make for training
    # train, validate and sample on this many clips only; 0 = the corpus's own split
    overfit: Whole = 0
    max_seconds: Positive = 20.0  # longer clips are left out
    # batches collated ahead, and processes that pack; 0 = as many as there are cores for
    workers: Whole = 0

    download: ClassVar[bool] = False  # read by all systems, knobs of those only that make them fields
    align: ClassVar[str] = ""
    bucketed: ClassVar[bool] = True


@section
class SpeechData(Data):
    corpus: Literal["ljspeech", "librispeech", "demo"] = "ljspeech"  # demo: spoken on the spot
    # packed shards, or a folder as published, which is packed on first use
    data_dir: Text = "data/ljspeech"
    # fetch LJSpeech-1.1 or LibriSpeech train-clean-100 when data_dir does not exist
    download: bool = False
    # demo: matrix (60 words, one pattern) | ljspeech (2,000 of LJSpeech's own sentences)
    grammar: Literal["matrix", "ljspeech"] = "matrix"
    # demo: a voice of Piper's, or the .onnx file of one, maybe with @1.2, higher by that |
    # espeak:en-us, espeak:en-us+m3, ...: of espeak-ng
    voice: Text = "en_US-joe-medium"


@section
class Model:
    """A Transformer."""

    width: Count = 1024
    layers: Count = 8
    heads: Count = 8

    @model_validator(mode="after")
    def check_heads(self):
        message = f"model.width {self.width} must be a multiple of twice model.heads {self.heads}"
        require(self.width % (2 * self.heads) == 0, message)
        return self


@section
class Flow:
    predict: Literal["x", "v"] = "x"  # what the network puts out; the loss is in v either way
    min_t: Positive = 0.05  # predicting x: v = (x_t - x) / max(t, min_t)
    timestep_logit_mean: float = 0.0  # of training times, logit-normal: above 0, more near the noise
    timestep_logit_std: Positive = 1.0
    timestep_uniform: Share = 0.1  # share of times drawn uniformly, so that both ends are trained
    # SD3's time shift of what was drawn: above 1 trains more near the noise
    timestep_shift: Positive = 1.0
    text_condition_dropout: Share = 0.1  # of training texts, which the network must do without


@section
class Sample:
    euler_steps: Count = 50  # one network call each (guided: one call on a double batch)
    cfg_scale: NonNegative = 2.0  # 1 = no guidance
    cfg_from: NonNegative = 0.0  # guidance acts where cfg_from <= t <= cfg_to
    cfg_to: Positive = 1.0

    @model_validator(mode="after")
    def check_guidance(self):
        message = f"sample.cfg_from {self.cfg_from} is above sample.cfg_to {self.cfg_to}"
        require(self.cfg_from <= self.cfg_to, message)
        return self


@section
class FlowSample(Sample):
    # F5's sway coefficient: negative spends more steps near the noise
    sway: Annotated[float, Field(ge=-1, le=1)] = 0.0
    # SD3's time shift, t' = shift t / (1 + (shift - 1) t): above 1 spends more steps near the noise
    shift: Positive = 1.0


@section
class Train:
    steps: Count = 200_000  # updates
    init: Text = ""  # a checkpoint, or the folder of a run, whose weights a new run begins with
    # clips an update, over all ranks and micro-steps: the same on any number of GPUs
    global_batch: Count = 16
    # clips a rank and micro-step, whatever that makes of global_batch; 0 = its share of it
    batch_size: Whole = 0
    # micro-steps an update: more of them take less memory
    grad_accum: Count = 1
    # end, with the schedule's decay inside, after this much training; 0 = no limit
    max_minutes: NonNegative = 0.0
    muon_lr: NonNegative = 0.02  # hidden matrices; 0 = AdamW trains them too
    lr: NonNegative = 3e-4  # everything else, by AdamW
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "trapezoid"] = "cosine"  # of the learning rates
    warmup: Whole = 1000  # steps
    decay: Share = 0.3  # trapezoid: share of the run in which the rate falls to zero
    grad_clip: NonNegative = 1.0  # of the gradient's norm; 0 = off
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999  # decay of the weights' moving average; 0 = off
    # auto: bf16 (autocast) where the hardware is faster with it
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # by torch.compile, which takes minutes at the start
    # weights, gradients and optimizer states over the ranks (FSDP2), for what does not fit; false: DDP
    shard: bool = False
    log_interval: Count = 10  # steps, as the others; the last step is always one of them
    val_interval: Whole = 1000  # validation loss; 0 = never
    eval_interval: Whole = 5000  # sampling and word error rate; 0 = never
    save_interval: Count = 1000  # checkpoints
    keep: Count = 2  # checkpoints: older ones are deleted


@section
class Eval:
    limit: Count = 64  # prompts
    prompts: Text = ""  # a text file, a sentence a line; empty = the validation clips
    split: Literal["val", "test"] = "val"  # clips for validation and prompts
    sample_batch: Count = 16  # prompts sampled together on a rank

    true_durations: ClassVar[bool] = False  # read by all systems, a knob of those that predict lengths


@section
class SpeechEval(Eval):
    recogniser: Text = "base.en"  # Whisper name | .pt file | pocketsphinx; without a hub, tiny.en


@section
class Config:
    """What every system has. A system's own class says which it is, and what the weights mean."""

    system: str = ""
    out_dir: Text = ""  # of the run: checkpoints, metrics, samples
    seed: Whole = 1337  # of the weights, the noise, and the order of the clips
    device: Device = "auto"  # auto: cuda where there are GPUs, else cpu
    wandb: Literal["offline", "online", "disabled"] = "offline"  # Weights & Biases
    wandb_url: Text = ""  # a W&B server of your own
    wandb_project: Text = "nanoaudio"
    # what the last evaluation is to find, as {eval/wer: at most 0.1}; missed is exit code 1
    expect: Bounds = field(default_factory=dict)
    data: Data = Data()
    train: Train = Train()
    eval: Eval = Eval()

    sample: ClassVar[Sample | None] = None  # a section of those that have something to set when they sample
    # Sections and keys that give the weights their meaning: a run goes on with the same ones only, except for
    # fields that are MOVABLE.
    fixed: ClassVar[tuple[str, ...]] = ("data.corpus", "model")

    def reference_settings(self) -> dict:
        """What a recording depends on that passes through all but the generative network; folders as str."""
        return {}


# Text-to-speech


@section
class TTSData(SpeechData):
    silence_prob: Share = 0.0  # chance that silence is appended to a training clip
    max_silence_sec: NonNegative = 0.0
    # training clips are spoken up to this share faster or slower, each time anew
    tempo_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bucketed: bool = True  # clips of a batch are about as long as each other; false: any clips
    cache_text: bool = True  # the frozen text encoder's features are made once; false: in every step
    # frames: batches are padded to a multiple, so torch.compile and cuDNN meet few shapes
    pad_multiple: Count = 16
    text_multiple: Count = 8  # as pad_multiple, of bytes


@section
class TTSModel(Model):
    # T5/ByT5 hub id or folder, frozen | scratch: a small one, trained along
    text_encoder: Text = "google/byt5-small"
    # what text_encoder scratch reads; phonemes: by espeak-ng, in ASCII
    text: Literal["bytes", "phonemes"] = "bytes"
    text_layers: Whole = 2  # convolutional layers between the encoder and the decoder
    frame_stack: Count = 1  # mel frames in one token
    # when each byte is spoken: mas, found in the recording by monotonic alignment search, and predicted |
    # learned by gradient | uniform | none: byte index, as the seed
    alignment: Literal["mas", "learned", "uniform", "none"] = "mas"
    upsample_text: bool = True  # add each frame's text to the input
    cross_attention: bool = True  # of tokens to bytes, in each block
    conv_kernel: Whole = 0  # tokens, odd: a depthwise convolution over time in each block; 0 = none

    @model_validator(mode="after")
    def check_text(self):
        require(
            self.text == "bytes" or self.text_encoder == "scratch",
            f"model.text {self.text}: only model.text_encoder scratch, which is trained along, reads them",
        )
        require(
            self.conv_kernel % 2 == 1 or self.conv_kernel == 0,
            f"model.conv_kernel {self.conv_kernel} must be odd, or 0 for none",
        )
        require(
            self.cross_attention or self.upsample_text,
            "model.cross_attention and model.upsample_text are both false: nothing tells what to say",
        )
        return self


@section
class TTSFlow(Flow):
    # the loss of v at smaller t counts (t / loss_min_t)^2, so that of x no more than at loss_min_t; 0 = fully
    loss_min_t: Share = 0.5
    duration_weight: NonNegative = 0.1  # of the durations' loss
    prior_weight: NonNegative = 0.3  # of the loss of the prior, each byte's mean log-mel, by which mas aligns


@section
class TTSSample(FlowSample):
    speed: Positive = 1.0  # of the speech, where its length is predicted: 1.2 is a fifth faster
    vocoder: Text = "griffinlim"  # griffinlim | BigVGAN hub id or folder


@section
class TTSEval(SpeechEval):
    true_durations: bool = False  # sample at the reference's length instead of the predicted one


@section
class TTSConfig(Config):
    system: Literal["tts"] = "tts"
    out_dir: Text = "out/tts"
    mel: Mel = Mel()
    data: TTSData = TTSData()
    model: TTSModel = TTSModel()
    flow: TTSFlow = TTSFlow()
    sample: TTSSample = TTSSample()
    train: Train = Train()
    eval: TTSEval = TTSEval()

    fixed: ClassVar[tuple[str, ...]] = (
        "mel",
        "data.corpus",
        "data.voice",
        "model",
        "flow.predict",
        "flow.min_t",
    )

    @model_validator(mode="after")
    def check_padding(self):
        padding = self.data.pad_multiple
        stack = self.model.frame_stack
        require(
            padding % stack == 0, f"data.pad_multiple {padding} is no multiple of model.frame_stack {stack}"
        )
        return self

    def packed_format(self) -> dict:
        """Of packed clips: log-mels."""
        return dataclasses.asdict(self.mel)

    def reference_settings(self) -> dict:
        return {"mel": dataclasses.asdict(self.mel), "vocoder": self.sample.vocoder}


# Loading


def load(cls: type[Config], path: str = "", overrides: Sequence[str] = ()) -> Config:
    """The defaults, then the YAML file `path`, then overrides as typed: ["--batch_size", "32", "--lr=1e-3"].

    A knob's bare name is enough while it is unique; `-` and `_` are the same.
    raises UserError for an unknown key, a wrong type, a bad choice or combination.
    """
    values = read_yaml(path) if path else {}
    return overridden(from_dict(cls, values, where=path), overrides)


def overridden(config: Config, words: Sequence[str]) -> Config:
    """A copy of `config` with words of a command line on top, as `load`."""
    cls = type(config)
    values = to_dict(config)
    typed = {}
    for key, text in parse_overrides(words).items():
        name = find_key(cls, key)
        typed[name] = f"--{key}"
        section, _, knob = name.rpartition(".")
        changed = values[section] if section else values
        changed[knob] = parse(hint_of(cls, name), text)

    def where(name: str) -> str:
        return typed.get(name, "config")

    return build(cls, values, where)


def from_dict(cls: type, values: dict, where: str = "config"):
    """Build and check a config, or a section of one, from plain values, as in a YAML file."""
    return build(cls, values, lambda _: where)


def to_dict(config: Config) -> dict:
    return dataclasses.asdict(config)


# What checkpoints of the trees up to November 2026 hold for every system, whether it reads that or not.
FORMER_SECTIONS = {"mel", "picture", "klein", "music", "align", "codes", "flow", "sample"}
FORMER_KEYS = {
    "align": {
        "speech",
        "temperature",
        "crop_sec",
        "noise_prob",
        "min_snr_db",
        "gain_db",
        "hidden_spans",
        "hidden_share",
    },
    "data": {
        "download",
        "align",
        "grammar",
        "voice",
        "langs",
        "silence_prob",
        "max_silence_sec",
        "pad_multiple",
    },
    "model": {"text_encoder", "text", "text_layers", "frame_stack", "alignment", "upsample_text"},
    "flow": {
        "predict",
        "min_t",
        "timestep_logit_mean",
        "timestep_logit_std",
        "timestep_uniform",
        "timestep_shift",
        "duration_weight",
    },
    "sample": {"sway", "shift", "vocoder", "truncation", "negative"},
    "eval": {"recogniser", "features", "true_durations"},
}


def without_former(cls: type[Config], values: dict) -> dict:
    """A checkpoint's config without the above, as far as its system's class does not have it any more."""
    sections = fields_of(cls)
    kept = {}
    for section, value in values.items():
        if section not in sections and section in FORMER_SECTIONS:
            continue
        if section in FORMER_KEYS and isinstance(value, dict):
            present = fields_of(sections[section])
            gone = FORMER_KEYS[section] - present.keys()
            value = {key: entry for key, entry in value.items() if key not in gone}
        kept[section] = value
    return kept


def from_checkpoint(cls: type[Config], values: dict, where: str) -> Config:
    """The config of a checkpoint, of an older tree maybe; raises UserError for what no tree ever had."""
    return from_dict(cls, without_former(cls, values), where)


# YAML and command line


class StrictLoader(yaml.SafeLoader):
    """YAML, but 1e-3 is a number, and a key that stands twice an error: PyYAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice")
        return super().construct_mapping(node, deep)


NUMBER = re.compile(r"([-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(inf|nan))$")  # that PyYAML takes for text
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789in"))


def read_yaml(path: str) -> dict:
    path = os.path.expanduser(path)
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.load(f, StrictLoader)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, *DAMAGE) as e:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(e).split())})") from e
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values or {}


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """["--a", "1", "--b=2"] -> {"a": "1", "b": "2"}."""
    found = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key}: its value is missing")
            value = rest.pop(0)
        found[key] = value
    return found


def parse(hint, text: str):
    """A word of the command line as a value for a field: as it stands where that wants text, else as YAML."""
    kind = plain(hint)
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, *DAMAGE):
        return text


# Keys


@functools.cache
def fields_of(cls: type) -> dict[str, object]:
    """The annotations of a class's fields, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def plain(hint):
    """The type in an annotation: int of Count."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every knob by its full name: ["system", ..., "train.lr", ...]."""
    names = []
    for name, hint in fields_of(cls).items():
        is_section = dataclasses.is_dataclass(hint)
        names += keys(hint, f"{prefix}{name}.") if is_section else [prefix + name]
    return names


def hint_of(cls: type, name: str):
    """The annotation of a knob by its full name."""
    section, _, knob = name.rpartition(".")
    owner = fields_of(cls)[section] if section else cls
    return fields_of(owner)[knob]


def fixed_keys(cls: type[Config]) -> list[str]:
    """Those that a run cannot change when it goes on, by their full names; see `Config.fixed`."""
    found = []
    for key in keys(cls):
        section = key.split(".")[0]
        if key in cls.fixed or section in cls.fixed:
            marks = getattr(hint_of(cls, key), "__metadata__", ())
            if MOVABLE not in marks:
                found.append(key)
    return found


def find_key(cls: type, name: str) -> str:
    """The full name of a knob from its full or bare name."""
    wanted = name.replace("-", "_")
    by_bare_name = {}
    for key in keys(cls):
        if key == wanted:
            return key
        bare = key.split(".")[-1]
        by_bare_name.setdefault(bare, []).append(key)
    matches = by_bare_name.get(wanted, [])
    if not matches:
        raise UnknownKey("", name, nearest(wanted, [*keys(cls), *by_bare_name]))
    if len(matches) > 1:
        typed = [f"--{key}" for key in matches]
        raise UserError(f"--{name} is ambiguous: {' or '.join(typed)}")
    return matches[0]


def nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# Building, and what is said of a wrong value


def build(cls: type, values: dict, where: Callable[[str], str], prefix: str = ""):
    """`cls` from nested plain values. where: what a complaint opens with, by the key's full name."""
    hints = fields_of(cls)
    built = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        hint = hints.get(key)
        if hint is None:
            known = keys(cls, prefix) + list(hints)
            raise UnknownKey(where(name), name, nearest(name, known))
        if dataclasses.is_dataclass(hint):
            entries = {} if value is None else value
            if not isinstance(entries, dict):
                raise UserError(f"{where(name)}: {name} is a section, got {QUOTED.repr(value)}")
            value = build(hint, entries, where, f"{name}.")
        built[key] = value
    return construct(cls, built, where, prefix)


def construct(cls: type, values: dict, where: Callable[[str], str], prefix: str):
    """As `build`, its sections built already."""
    try:
        return cls(**values)
    except ValidationError as e:
        error = e.errors()[0]
        key = error["loc"][0]
        hint = fields_of(cls)[key]
        name = f"{prefix}{key}"
        fault = describe_fault(error, hint, values[key])
        message = f"{where(name)}: {name} {fault}"
        raise UserError(message) from e


def describe_fault(error: dict, hint, value) -> str:
    """What is wrong with a value, of which pydantic says `error`."""
    rule = describe_rule(error["type"], error.get("ctx", {}), hint)
    close = ""
    if get_origin(hint) is Literal and isinstance(value, str):
        close = nearest(value, get_args(hint))
    return f"must {rule}, got {QUOTED.repr(value)}{close}"


def describe_rule(kind: str, bounds: dict, hint) -> str:
    """What a value must, where it broke a rule. kind, bounds: what pydantic says of that."""
    of_type = plain(hint)
    choices = get_args(of_type)
    if get_origin(of_type) is Literal:
        return f"be one of {', '.join(choices)}"
    if get_origin(of_type) is tuple:
        return f"be a list of {' and '.join(get_args(choices[0]))}"
    if get_origin(of_type) is dict:
        return "be a table, {eval/wer: at most 0.1}"
    if kind == "finite_number":
        return "be finite"
    if kind == "greater_than":
        return "be positive"
    if kind == "greater_than_equal":
        return f"be at least {bounds['ge']:g}" if bounds["ge"] else "not be negative"
    if kind == "less_than_equal":
        return f"be at most {bounds['le']:g}"
    if kind == "less_than":
        return f"be below {bounds['lt']:g}"
    return f"be {of_type.__name__}"


# Help


def describe(config: Config) -> str:
    """Every knob of a config's system, with its value there, [in brackets]; a paragraph a section."""
    own = []
    paragraphs = []
    in_order = [*type(config).__annotations__, *fields_of(type(config))]
    for name in dict.fromkeys(in_order):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            knobs = [describe_knob(value, knob, f"{name}.") for knob in fields_of(type(value))]
            paragraphs.append("\n".join([name, *knobs]))
        elif name in fields_of(type(config)):
            own.append(describe_knob(config, name))
    return "\n\n".join(["\n".join(own), *paragraphs])


def describe_knob(owner: object, name: str, prefix: str = "") -> str:
    """Two columns: its full name; what it takes, [its value in `owner`, a section], its comment."""
    kind = describe_kind(fields_of(type(owner))[name])
    value = describe_value(getattr(owner, name))
    comment = comments(type(owner))[name]
    return textwrap.fill(
        f"{kind} [{value}]  {comment}".strip(),
        width=110,
        initial_indent=f"  --{prefix}{name}".ljust(34),
        subsequent_indent=" " * 34,
        break_on_hyphens=False,
    )


def describe_value(value: object) -> str:
    """As it may be typed."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, dict):
        entries = [f"{key}: {entry}" for key, entry in value.items()]
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


NAMES = {str: "text", bool: "true | false"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def describe_kind(hint) -> str:
    """cosine | trapezoid; float, at least 0, at most 1; str."""
    kind = plain(hint)
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {describe_kind(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "table"
    words = [NAMES.get(kind, kind.__name__)]
    for mark in getattr(hint, "__metadata__", ()):
        for bound in getattr(mark, "metadata", ()):
            for name, value in dataclasses.asdict(bound).items():
                words.append(f"{BOUNDS[name]} {value:g}")
    return ", ".join(words)


FIELD = re.compile(r"    (\w+): ")


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comment of each field in the source, above or beside it; that of a base class where it has none."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        comment = ""
        for line in inspect.getsource(base).splitlines():
            field_name = FIELD.match(line)
            if line.startswith("    # "):
                comment += line.strip()[1:]
            elif field_name:
                name = field_name[1]
                comment += line.partition("  #")[2]
                found[name] = comment.strip() or found.get(name, "")
                comment = ""
            else:
                comment = ""
    return found
