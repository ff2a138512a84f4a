"""Every knob of nanoaudio: frozen dataclasses, a strict YAML file on top, `--key value` overrides on top of that.

A YAML holds only what differs from the defaults below. Unknown keys and wrong types are errors that name the nearest
key. Here is the whole list of knobs; a test fails on one that nothing reads.
"""

import dataclasses
import difflib
import re
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
    centred: bool = False            # frame m stands at sample m hop, and no 1e-9 beside the magnitude: as AudioLDM2, for music


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
    corpus: str = "ljspeech"         # ljspeech | librispeech | demo (spoken on the spot); music (recordings with
                                     # captions: a JSON list, or a folder with a table) | pieces (played on the spot); pictures and speech:
                                     # shapes (drawn and described on the spot) | flickr8k (and its audio captions) | s2igan (CUB-200 or
                                     # Oxford-102 with spoken captions, as S2IGAN lays them out) | listed (see assets/spoken_pictures.py)
    data_dir: str = "data/ljspeech"  # packed shards, or a folder in the corpus's published layout, which is packed on first use
    download: bool = False           # fetch LJSpeech-1.1 or LibriSpeech train-clean-100 when data_dir does not exist
    align: str = ""                  # Whisper that cuts long clips between words, for pictures; "" = leave out what is too long
    grammar: str = "matrix"          # demo: matrix (60 words, one pattern) | ljspeech (2,000 of LJSpeech's own sentences)
    voice: str = "en_US-joe-medium"  # demo: a voice of Piper's, or the .onnx file of one, maybe with @1.2, higher by that |
                                     # espeak:en-us, espeak:en-us+m3, ...: of espeak-ng
    langs: tuple = ("en",)           # of spoken descriptions of pictures, drawn equally often: [en, ar]
    sentences: int = 900             # demo: training sentences to speak; pieces: how many to play
    overfit: int = 0                 # train, validate and sample on this many clips only; 0 = the corpus's own split
    max_seconds: float = 20.0        # longer clips are left out
    silence_prob: float = 0.0        # chance that silence is appended to a training clip
    max_silence_sec: float = 0.0
    pad_multiple: int = 16           # frames: batches are padded to a multiple, so torch.compile meets few shapes
    workers: int = 2                 # batches collated ahead, and processes that pack


@dataclass(frozen=True)
class Model:
    text_encoder: str = "google/byt5-small"  # T5/ByT5 hub id or folder, frozen | scratch: a small one, trained along
    text: str = "bytes"              # what text_encoder scratch reads: bytes | phonemes (by espeak-ng, in its ASCII notation)
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
class Size:
    """FluxMusic's network: its width, blocks of two streams and of one, how many of a head's numbers turn by nothing, time, frequency."""
    width: int
    double: int
    single: int
    axes: tuple[int, int, int]
    heads: int = 16
    channels: int = 32               # of a token
    bands: int = 8                   # tokens of one time: 64 mel bins / 4 (VAE) / 2
    text_width: int = 4096           # of T5-XXL
    vector_width: int = 768          # of CLAP's text tower


SIZES = {"small": Size(512, 8, 16, (8, 12, 12)),                 # 142,333,984 parameters
         "base": Size(768, 12, 24, (16, 16, 16)),                # 473,971,232
         "large": Size(1024, 12, 24, (16, 24, 24)),              # 840,628,256
         "giant": Size(1408, 16, 32, (16, 36, 36)),              # 2,109,904,928, the paper's
         "giant_full": Size(1408, 12, 24, (16, 36, 36))}         # 1,586,238,752, published as Giant-Full, trained for longer


@dataclass(frozen=True)
class Music:
    """FluxMusic, for system `music`, which also reads model.text_encoder: google/t5-v1_1-xxl, or scratch."""
    size: str = "small"              # small | base | large | giant | giant_full, as published | own: of model.width, heads, layers
    double_blocks: int = 2           # own: of model.layers, how many have a stream for the text and one for the music
    weights: str = ""                # a published checkpoint to start from; "" = random weights
    vector_encoder: str = "laion/larger_clap_music"  # hub id or folder of a ClapModel: a text's vector | pooled: the mean of its features
    text_width: int = 4096           # own: numbers a token of model.text_encoder, if that is not scratch
    vector_width: int = 768          # own: numbers of a vector, if it is not pooled
    caption_tokens: int = 256        # of a text; more are cut off
    text_padding: str = "masked"     # masked: nobody attends to it | last: the last token's features to the end, for published weights
    joint_dropout: float = 1.0       # of captions that are dropped, the share that lose features and vector together; FluxMusic: 0
    autoencoder: str = "cvssp/audioldm2"     # hub id or folder with AudioLDM2's vae/ and vocoder/ | patches: the log-mel as it is
    patch_frames: int = 8            # patches: mel frames of a token
    patch_mels: int = 8              # patches: mel bins of a token
    crops: int = 8                   # of each piece, whose latents are cached; patches: any, drawn anew each time
    crop_seconds: float = 10.24      # of music in one go; longer pieces are made of overlapping stretches


@dataclass(frozen=True)
class Align:
    """Speech and pictures in one space, for system `speech_align`: SpeechCLIP's parallel branch, as Speak the Art has it.

    It also reads model.layers (1 in the paper) and heads (8), and, where speech is scratch, model.width.
    """
    speech: str = "facebook/hubert-large-ll60k"            # hub id or folder of a HubertModel, frozen | scratch: log-mels, trained along
    image: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"   # hub id or folder of a CLIPVisionModelWithProjection, frozen | scratch: a
                                     # small one, made by prepare, that learns to tell pictures by the words of their descriptions
    temperature: float = 0.07        # at the start: it is trained
    crop_sec: float = 6.4            # of a description, at random, when it is trained on
    noise_prob: float = 0.5          # chance that a description is trained on under white noise
    min_snr_db: float = 5.0          # the loudest of it; the softest is 30 dB above
    gain_db: float = 6.0             # how much louder or softer, at most, a description is than it came, before the noise
    hidden_spans: int = 2            # stretches of time, and of channels, that are hidden in training
    hidden_share: float = 0.1        # of the whole, the longest of them


@dataclass(frozen=True)
class Codes:
    """Pictures as codes, and the diffusion that makes them, for system `speech_image`, which also reads model.width, layers and heads."""
    stage1: str = "out/speech_align" # a run of system speech_align, or a checkpoint of it: its embedding of the speech is the condition
    require_r1: float = 0.35         # R@1 below which stage 1 did not learn, and stage 2 is not begun
    vq: str = "amused/amused-256"    # hub id or folder of a diffusers VQModel | scratch: a small one of 64 codes, made by prepare
    vq_steps: int = 1200             # in which prepare trains that one; the judge takes a third of them
    picture_size: int = 256          # pixels
    grid: int = 16                   # codes in a row and in a column
    kept: int = 974                  # codes of the codebook, the most used; 974 is what ImageNet's 16,384 shrink to
    judge: bool = False              # prepare trains a small judge of what pictures show, by the parts of labels like red-circle-left
    condition: str = "adaln"         # adaln: learned projection to scale and shift | sta: its halves are these, as published | concat: a
                                     # token | cross: attention to four
    condition_scale: float = 0.0     # of the embedding, which has length 1, as published; 0: the root of its width, so variance 1
    conv_ratio: int = 4              # how much wider a block is between its two convolutions
    diffusion_steps: int = 100
    mask_share: float = 0.99999      # gamma_T: codes that are MASK at the last step; the others are random ones
    auxiliary_weight: float = 1.0e-3 # of the cross-entropy beside the bound


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
    vocoder: str = "griffinlim"      # griffinlim | BigVGAN hub id or folder | own: that of music.autoencoder
    truncation: float = 0.86         # speech_image: of each code's distribution, the likeliest part that is drawn from; guidance wants 1
    negative: str = ""               # music: the text that guidance steers away from; "" is what training gives dropped captions


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
    dtype: str = "auto"              # auto: bf16 where the hardware is faster with it, else fp32 | bf16 (autocast) | fp32
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
    recogniser: str = "base.en"      # Whisper name | .pt file | pocketsphinx; without a hub, tiny.en
    features: str = ""               # music: hub id or folder of a ClapModel, as laion/larger_clap_music, for FAD, KAD and CLAP score
    true_durations: bool = False     # sample at the reference's length instead of the predicted one
    sample_batch: int = 16           # prompts sampled together on a rank


@dataclass(frozen=True)
class Config:
    system: str = "tts"
    out_dir: str = "out/tts"
    seed: int = 1337
    device: str = "auto"             # auto (cuda where there are GPUs) | cpu | cuda | mps
    wandb: str = "offline"           # offline | online | disabled
    wandb_url: str = ""              # a W&B server of your own
    wandb_project: str = "nanoaudio"
    expect: dict = field(default_factory=dict)   # what the last evaluation is to find, as {eval/wer: at most 0.1}; missed is exit code 1
    mel: Mel = field(default_factory=Mel)
    picture: Picture = field(default_factory=Picture)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    klein: Klein = field(default_factory=Klein)
    music: Music = field(default_factory=Music)
    align: Align = field(default_factory=Align)
    codes: Codes = field(default_factory=Codes)
    flow: Flow = field(default_factory=Flow)
    sample: Sample = field(default_factory=Sample)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)


CHOICES = {"system": ("tts", "spectrogram", "music", "speech_align", "speech_image"), "device": ("auto", "cpu", "cuda", "mps"),
           "wandb": ("offline", "online", "disabled"),
           "codes.condition": ("adaln", "sta", "concat", "cross"),
           "music.size": (*SIZES, "own"), "music.text_padding": ("masked", "last"),
           "picture.reference": ("peak", "fixed"), "klein.vae": ("own", "patches"), "klein.tune": ("lora", "full"),
           "data.corpus": ("ljspeech", "librispeech", "music", "demo", "pieces", "shapes", "flickr8k", "s2igan", "listed"),
           "data.grammar": ("matrix", "ljspeech"),
           "model.text": ("bytes", "phonemes"), "model.alignment": ("learned", "uniform", "none"), "flow.predict": ("x", "v"),
           "train.schedule": ("cosine", "trapezoid"), "train.dtype": ("auto", "bf16", "fp32"), "eval.split": ("val", "test")}
MAY_BE_ZERO = {"seed", "mel.fmin", "data.overfit", "data.workers", "data.silence_prob", "data.max_silence_sec", "flow.timestep_uniform",
               "flow.text_condition_dropout", "flow.duration_weight", "model.text_layers", "klein.text_rank", "music.joint_dropout",
               "align.noise_prob", "align.min_snr_db", "align.gain_db", "align.hidden_spans", "align.hidden_share",
               "codes.require_r1", "codes.condition_scale", "codes.auxiliary_weight",
               "sample.cfg_scale", "sample.cfg_from", "train.max_minutes", "train.weight_decay", "train.warmup", "train.decay",
               "train.grad_clip", "train.ema", "train.muon_lr", "train.lr", "train.val_interval", "train.eval_interval"}
KINDS = {tuple: "a list, [a, b]", dict: "a table, {eval/wer: at most 0.1}"}
BOUND = re.compile(r"(at most|at least) +(\d*\.?\d+)")                # of `expect`
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
    if kind is tuple and isinstance(value, list):
        return tuple(map(str, value))
    if kind is dict and isinstance(value, dict):
        return {str(key): str(bound) for key, bound in value.items()}
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {name} must be {KINDS.get(kind, kind.__name__)}, got {value!r}")
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
        (m.text == "bytes" or config.system == "tts" and m.text_encoder == "scratch",
         f"model.text {m.text}: only system tts with model.text_encoder scratch, which is trained along, reads them"),
        (d.pad_multiple % m.frame_stack == 0, f"data.pad_multiple {d.pad_multiple} is no multiple of model.frame_stack {m.frame_stack}"),
        (max(d.silence_prob, f.timestep_uniform, f.text_condition_dropout, config.music.joint_dropout, t.decay, config.align.noise_prob,
             config.align.hidden_share) <= 1, "a probability or share is above 1"),
        (config.codes.mask_share <= 0.99999, f"codes.mask_share {config.codes.mask_share} must be at most 0.99999, as published"),
        (config.codes.kept < 2 ** 15, f"codes.kept {config.codes.kept} must be below 32768"),
        (s.truncation <= 1, f"sample.truncation {s.truncation} must be at most 1"),
        (bool(d.langs) and {*d.langs} <= {"en", "ar"}, f"data.langs must be a list of en and ar, got {[*d.langs]}"),
        (all(BOUND.fullmatch(bound) for bound in config.expect.values()),
         f"expect: a bound is at most or at least, and a number: at most 0.1; got {[*config.expect.values()]}"),
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
        (config.system in ("tts", "music") or s.vocoder == "griffinlim",
         f"sample.vocoder {s.vocoder}: system {config.system} has griffinlim only"),
        (config.system == "tts" or not config.eval.true_durations, f"eval.true_durations: system {config.system} predicts no lengths"),
        (k.prompt.count("{text}") == 1, f"klein.prompt {k.prompt!r} must have {{text}} in it, once"),
    ]
    for holds, message in rules + (music_rules(config) if config.system == "music" else []):
        if not holds:
            raise UserError(message)


def music_rules(config: Config) -> list[tuple[bool, str]]:
    """Combinations of system `music`: whether each holds, and what to say if not."""
    u, mel, vocoder = config.music, config.mel, config.sample.vocoder
    own, frames = u.autoencoder != "patches", u.crop_seconds * mel.sample_rate / mel.hop
    token = 8 if own else u.patch_frames                     # mel frames: the VAE makes one of 4, a token has 2 of these
    return [
        (abs(frames - round(frames)) < 1e-6 and round(frames) % (2 * token) == 0,
         f"music.crop_seconds {u.crop_seconds} are {frames:.6g} mel frames, not a multiple of two tokens' {2 * token}"),
        (own or mel.n_mels % u.patch_mels == 0, f"mel.n_mels {mel.n_mels} is no multiple of music.patch_mels {u.patch_mels}"),
        (vocoder == "griffinlim" or own and vocoder == "own",
         f"sample.vocoder {vocoder}: system music has griffinlim, and own where music.autoencoder is a folder or hub id"),
        (u.size != "own" or u.double_blocks < config.model.layers,
         f"music.double_blocks {u.double_blocks} must be below model.layers {config.model.layers}"),
        (not u.weights or u.size != "own" and config.flow.predict == "v",
         "music.weights: a published network puts out v and has a size: give --flow.predict v and --music.size small, base, ..."),
        (not own or mel == Mel(16000, 1024, 160, 64, 0.0, 8000.0, True), "music.autoencoder: AudioLDM2's VAE wants mel.sample_rate 16000, "
         "n_fft 1024, hop 160, n_mels 64, fmin 0, fmax 8000, centred true"),
        (u.size == "own" or own, f"music.size {u.size} takes AudioLDM2's latents: give music.autoencoder, or music.size own"),
    ]


def run_main(main: typing.Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
