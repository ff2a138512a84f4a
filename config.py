"""Every knob of nanoaudio: frozen dataclasses, a strict YAML file on top, `--key value` overrides on top of that.

A YAML holds only what differs from the defaults below. Unknown keys and wrong types are errors that name the nearest
key. Here is the whole list of knobs; a test fails on one that nothing reads.
"""

import dataclasses
import difflib
import sys
import typing
from dataclasses import dataclass, field

import yaml


class UserError(Exception):
    """Something the user can mend: entry points print it as one line and exit with code 2."""


@dataclass(frozen=True)
class Mel:
    """Log-mel as BigVGAN's `22khz_80band_fmax8k_256x` models read it; packed into every shard and checked against it."""
    sample_rate: int = 22050         # Hz
    n_fft: int = 1024                # samples
    hop: int = 256                   # samples a frame: 86.13 frames a second
    n_mels: int = 80
    fmin: float = 0.0                # Hz
    fmax: float = 8000.0             # Hz


@dataclass(frozen=True)
class Picture:
    """A clip as an RGB picture of its magnitude spectrogram, top-left on a canvas: sonic-plantain's, for system `spectrogram`."""
    sample_rate: int = 16000         # Hz
    n_fft: int = 1024                # samples: rows are its frequencies, 0 Hz the first
    hop: int = 256                   # samples a frame
    seconds: float = 5.0             # of a clip; shorter ones end in silence
    canvas_height: int = 768         # pixels; 512 leaves out the highest of 513 frequencies
    canvas_width: int = 768          # pixels; 320 x 512 is 640 tokens, 768 x 768 is 2304
    stretch: int = 1                 # columns a frame: 2 survives the VAE better
    reference: str = "peak"          # 0 dB is: peak (the clip's own, as sonic-plantain) | fixed (a sine of full scale)


@dataclass(frozen=True)
class Data:
    corpus: str = "ljspeech"         # ljspeech | librispeech | demo (spoken by espeak-ng on the spot)
    data_dir: str = "data/ljspeech"  # packed shards, or a folder in the corpus's published layout, which is packed on first use
    download: bool = False           # fetch LJSpeech-1.1 or LibriSpeech train-clean-100 when data_dir does not exist
    align: str = ""                  # Whisper that cuts long clips between words, for pictures; "" = leave out what is too long
    grammar: str = "matrix"          # demo: matrix (60 words, one pattern) | open (500 words and more, many patterns)
    voice: str = "en-us"             # demo: of espeak-ng
    sentences: int = 4000            # demo: training sentences to speak
    overfit: int = 0                 # train, validate and sample on this many clips only; 0 = the corpus's own split
    max_seconds: float = 20.0        # longer clips are left out
    silence_prob: float = 0.0        # chance that silence is appended to a training clip
    max_silence_sec: float = 0.0
    pad_multiple: int = 16           # frames: batches are padded to a multiple, so torch.compile meets few shapes
    workers: int = 2                 # batches collated ahead, and processes that pack


@dataclass(frozen=True)
class Model:
    text_encoder: str = "google/byt5-small"  # T5/ByT5 hub id or folder, frozen | scratch: a small one, trained along
    text_layers: int = 2             # convolutional layers between the encoder and the decoder
    width: int = 1024
    layers: int = 8
    heads: int = 8
    frame_stack: int = 1             # mel frames in one token
    alignment: str = "learned"       # learned (durations of bytes, by gradient) | uniform | none (byte index, as the seed)
    upsample_text: bool = True       # add each frame's text to the input


@dataclass(frozen=True)
class Klein:
    """FLUX.2 Klein, for system `spectrogram`."""
    base: str = "black-forest-labs/FLUX.2-klein-base-4B"   # hub id or folder of a Flux2KleinPipeline | scratch: random weights of the
                                     # size of model.width, heads, layers
    vae: str = "own"                 # own: the pipeline's | patches: 16 x 16 pixels are a token as they are, nothing is lost
    tune: str = "lora"               # lora | full: every weight of the transformer
    rank: int = 256                  # of the LoRA on all attention projections of the transformer
    alpha: float = 256.0             # the LoRA's output is scaled by alpha / rank
    text_rank: int = 0               # of a LoRA on the text encoder's layers that are read; 0 = frozen, its features cached
    text_tokens: int = 512           # Klein attends to the padding too, so this is part of the model
    double_layers: int = 5           # scratch: of model.layers, how many have a stream for the text and one for the picture
    prompt: str = 'Generate a magnitude spectrogram of speech reading: "{text}"'
    checkpointing: bool = False      # compute activations again in the backward pass instead of keeping them


@dataclass(frozen=True)
class Flow:
    predict: str = "x"               # x | v: what the network puts out; the loss is in v either way; published Kleins put out v
    min_t: float = 0.05              # predicting x: v = (x_t - x) / max(t, min_t)
    timestep_logit_mean: float = 0.0
    timestep_logit_std: float = 1.0
    timestep_uniform: float = 0.1    # share of times drawn uniformly, so that both ends are trained
    timestep_shift: float = 1.0      # SD3's time shift of what was drawn: above 1 trains more near the noise, as large pictures want
    text_condition_dropout: float = 0.1
    duration_weight: float = 0.1


@dataclass(frozen=True)
class Sample:
    euler_steps: int = 50            # one network call each (guided: one call on a double batch)
    cfg_scale: float = 2.0           # 1 = no guidance
    cfg_from: float = 0.0            # guidance acts where cfg_from <= t <= cfg_to
    cfg_to: float = 1.0
    sway: float = 0.0                # F5's sway coefficient in [-1, 1]: negative spends more steps near the noise
    shift: float = 1.0               # SD3's time shift: t' = shift t / (1 + (shift - 1) t); Klein's own comes on top
    vocoder: str = "griffinlim"      # griffinlim | BigVGAN hub id or folder


@dataclass(frozen=True)
class Train:
    steps: int = 200_000
    batch_size: int = 16             # clips a rank and micro-step
    grad_accum: int = 1
    max_minutes: float = 0.0         # end, with the schedule's decay inside, after this much training; 0 = no limit
    muon_lr: float = 0.02            # hidden matrices
    lr: float = 3e-4                 # everything else, by AdamW
    weight_decay: float = 0.01
    schedule: str = "cosine"         # cosine | trapezoid
    warmup: int = 1000               # steps
    decay: float = 0.3               # trapezoid: share of the run in which the rate falls to zero
    grad_clip: float = 1.0           # 0 = off
    ema: float = 0.999               # 0 = off
    dtype: str = "bf16"              # bf16 (autocast) | fp32
    compile: bool = False
    log_interval: int = 10           # steps, as the others; the last step is always one of them
    val_interval: int = 1000
    eval_interval: int = 5000        # sampling and word error rate; 0 = never, as for val_interval
    save_interval: int = 1000
    keep: int = 2                    # checkpoints kept


@dataclass(frozen=True)
class Eval:
    limit: int = 64                  # prompts
    prompts: str = ""                # a text file, a sentence a line; empty = the validation clips
    split: str = "val"               # clips for validation and prompts: val | test
    recogniser: str = "base.en"      # Whisper name or .pt file; one that cannot be had falls back to assets/
    true_durations: bool = False     # sample at the reference's length instead of the predicted one
    sample_batch: int = 16           # prompts sampled together on a rank


@dataclass(frozen=True)
class Config:
    system: str = "tts"
    out_dir: str = "out/tts"
    seed: int = 1337
    device: str = "auto"             # auto | cpu | cuda
    wandb: str = "offline"           # offline | online | disabled
    wandb_url: str = ""              # a W&B server of your own
    wandb_project: str = "nanoaudio"
    mel: Mel = field(default_factory=Mel)
    picture: Picture = field(default_factory=Picture)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    klein: Klein = field(default_factory=Klein)
    flow: Flow = field(default_factory=Flow)
    sample: Sample = field(default_factory=Sample)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)


CHOICES = {"system": ("tts", "spectrogram"), "device": ("auto", "cpu", "cuda"), "wandb": ("offline", "online", "disabled"),
           "picture.reference": ("peak", "fixed"), "klein.vae": ("own", "patches"), "klein.tune": ("lora", "full"),
           "data.corpus": ("ljspeech", "librispeech", "demo"), "data.grammar": ("matrix", "open"),
           "model.alignment": ("learned", "uniform", "none"), "flow.predict": ("x", "v"),
           "train.schedule": ("cosine", "trapezoid"), "train.dtype": ("bf16", "fp32"), "eval.split": ("val", "test")}
MAY_BE_ZERO = {"seed", "mel.fmin", "data.overfit", "data.workers", "data.silence_prob", "data.max_silence_sec", "flow.timestep_uniform",
               "flow.text_condition_dropout", "flow.duration_weight", "model.text_layers", "klein.text_rank", "sample.cfg_scale",
               "sample.cfg_from", "train.max_minutes", "train.weight_decay", "train.warmup", "train.decay", "train.grad_clip",
               "train.ema", "train.muon_lr", "train.lr", "train.val_interval", "train.eval_interval"}
MAY_BE_NEGATIVE = {"flow.timestep_logit_mean", "sample.sway"}


def load(path: str = "", overrides: list[str] = ()) -> Config:
    """The defaults, then the YAML file `path`, then overrides as typed: ["--batch_size", "32", "--train.lr=1e-3"].

    A leaf's bare name is enough while it is unique; `-` and `_` are the same.
    raises UserError for an unknown key, a wrong type, a bad choice or combination.
    """
    return overridden(from_dict(read_yaml(path) if path else {}, where=path), overrides)


def overridden(config: Config, words: list[str]) -> Config:
    """A copy of `config` with words of a command line on top, as `load`."""
    for key, text in parse_overrides(words).items():
        config = override(config, find_key(key).split("."), text, f"--{key}")
    check(config)
    return config


def from_command_line(words: list[str]) -> Config:
    """`--config PATH` and overrides, in any order, as `load`."""
    overrides = parse_overrides(words)
    path = overrides.pop("config", "")
    return load(path, [f"--{key}={value}" for key, value in overrides.items()])


def from_dict(values: dict, where: str = "config") -> Config:
    """Build and check a Config from nested plain values, as in a YAML file or a checkpoint."""
    config = build(Config, values, "", where)
    check(config)
    return config


def to_dict(config: Config) -> dict:
    return dataclasses.asdict(config)


def read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.load(f, StrictLoader)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(e).split())})") from e
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values or {}


class StrictLoader(yaml.SafeLoader):
    """YAML as everywhere, but a key that stands twice is an error: PyYAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice")
        return super().construct_mapping(node, deep)


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """["--a", "1", "--b=2"] -> {"a": "1", "b": "2"}."""
    found, rest = {}, list(arguments)
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


def keys(cls=Config, prefix: str = "") -> list[str]:
    """Every knob by its full name: ["system", ..., "train.lr", ...]."""
    names = []
    for f in dataclasses.fields(cls):
        names += keys(f.type, f"{prefix}{f.name}.") if dataclasses.is_dataclass(f.type) else [prefix + f.name]
    return names


def find_key(name: str) -> str:
    """The full name of a knob from its full or bare name."""
    wanted = name.replace("-", "_")
    if wanted in keys():
        return wanted
    matches = [k for k in keys() if k.split(".")[-1] == wanted]
    if len(matches) > 1:
        raise UserError(f"--{name} is ambiguous: {' or '.join('--' + k for k in matches)}")
    if not matches:
        raise UserError(f"--{name}: unknown key{nearest(wanted, [*keys(), *(k.split('.')[-1] for k in keys())])}")
    return matches[0]


def nearest(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def override(config, path: list[str], text: str, where: str):
    """A copy of `config` with the leaf at `path` set to a word of the command line, read as its type asks."""
    kind = {f.name: f.type for f in dataclasses.fields(config)}[path[0]]
    if len(path) > 1:
        return dataclasses.replace(config, **{path[0]: override(getattr(config, path[0]), path[1:], text, where)})
    try:
        value = text if kind is str else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return dataclasses.replace(config, **{path[0]: convert(kind, value, path[0], where)})


def build(cls, values: dict, prefix: str, where: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        name = prefix + str(key)
        if key not in fields:
            raise UserError(f"{where}: unknown key {name}{nearest(name, keys() + list(fields))}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name} is a section, got {value!r}")
            built[key] = build(kind, value, name + ".", where)
        else:
            built[key] = convert(kind, value, name, where)
    return cls(**built)


def convert(kind, value, name: str, where: str):
    """`value` as `kind`, without guessing: only int -> float, and "1e-3" -> float because PyYAML reads that as a string."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    return value


def check(config: Config) -> None:
    """Bounds, choices and combinations."""
    for name in keys():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}{nearest(value, CHOICES[name])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value or abs(value) == float("inf"):
                raise UserError(f"{name} must be finite, got {value}")
            if value < 0 and name not in MAY_BE_NEGATIVE:
                raise UserError(f"{name} must not be negative, got {value}")
            if value == 0 and name not in MAY_BE_ZERO | MAY_BE_NEGATIVE:
                raise UserError(f"{name} must be positive, got {value}")
    m, d, f, s, t, p, k = config.model, config.data, config.flow, config.sample, config.train, config.picture, config.klein
    rules = [
        (m.width % (2 * m.heads) == 0, f"model.width {m.width} must be a multiple of twice model.heads {m.heads}"),
        (d.pad_multiple % m.frame_stack == 0, f"data.pad_multiple {d.pad_multiple} is no multiple of model.frame_stack {m.frame_stack}"),
        (max(d.silence_prob, f.timestep_uniform, f.text_condition_dropout, t.decay) <= 1, "a probability or share is above 1"),
        (0 <= t.ema < 1, f"train.ema {t.ema} must be below 1"),
        (s.cfg_from <= s.cfg_to, f"sample.cfg_from {s.cfg_from} is above sample.cfg_to {s.cfg_to}"),
        (-1 <= s.sway <= 1, f"sample.sway {s.sway} must be in [-1, 1]"),
        (config.mel.fmin < config.mel.fmax <= config.mel.sample_rate / 2,
         f"mel.fmax {config.mel.fmax} must lie between mel.fmin and half of mel.sample_rate"),
        (config.mel.hop <= config.mel.n_fft, f"mel.hop {config.mel.hop} is above mel.n_fft {config.mel.n_fft}"),
        (p.hop <= p.n_fft / 2, f"picture.hop {p.hop} is above half of picture.n_fft {p.n_fft}: no phase fits such a spectrogram"),
        (p.canvas_height % 16 == p.canvas_width % 16 == 0,
         f"picture.canvas_height {p.canvas_height} and picture.canvas_width {p.canvas_width} must be multiples of 16"),
        ((int(p.seconds * p.sample_rate) // p.hop + 1) * p.stretch <= p.canvas_width,
         f"picture.canvas_width {p.canvas_width} is too narrow for picture.seconds {p.seconds} at hop {p.hop} and stretch {p.stretch}"),
        (k.double_layers < m.layers or config.system != "spectrogram" or k.base != "scratch",
         f"klein.double_layers {k.double_layers} must be below model.layers {m.layers}"),
        (config.system == "tts" or s.vocoder == "griffinlim", f"sample.vocoder {s.vocoder}: system {config.system} has griffinlim only"),
        (config.system == "tts" or not config.eval.true_durations, f"eval.true_durations: system {config.system} predicts no lengths"),
        (k.prompt.count("{text}") == 1, f"klein.prompt {k.prompt!r} must have {{text}} in it, once"),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def run_main(main: typing.Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
