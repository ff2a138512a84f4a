"""Published networks: text encoders, vocoders, the parts of FLUX.2 Klein, loaded by name and frozen.

A network comes from a local folder or from the Hugging Face hub, by one name. What is wrong with either is a
UserError, and offline it is raised at once. BigVGAN is written out below: layout and equations as in
NVIDIA/BigVGAN@7d2b454 (v2.4, MIT), so that its published weights load key for key.
"""

import functools
import json
import math
import typing
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from einops import rearrange

import audio
from config import Config, Mel, UserError
from corpora import voice


@functools.cache
def load_frozen(kind: type, name: str, part: str, option: str, device: torch.device) -> nn.Module:
    """A network of transformers or diffusers from a folder or the hub, frozen, float32; loaded once.

    part: its subfolder, or "". option: the option of the config that named it, for errors.
    """
    what = f"{option} {name}: its {part or 'weights'}"
    offline = klein_is_away(name)
    try:
        network, report = kind.from_pretrained(
            name, subfolder=part, local_files_only=offline, output_loading_info=True
        )
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"{what} cannot be loaded by {kind.__name__} ({brief(e)}); give a folder") from e
    missing = first_missing(report)
    if missing:
        raise UserError(f"{what} lacks {missing}: not a {kind.__name__}")
    frozen = Frozen(network.float()).to(device)
    return frozen.module


def first_missing(report: dict) -> str:
    """The first weight, by name, that from_pretrained did not find or that has another shape; "" if none."""
    keys = report["missing_keys"] or report["mismatched_keys"]
    return min(map(str, keys), default="")


class Frozen(nn.Module):
    """A network that stays as it was loaded: no gradient, always in eval mode.

    The wrapped network is not registered as a submodule, so it is in no parent's parameters, state_dict or
    checkpoint, and a parent's train, requires_grad_, apply, load_state_dict do not reach it; only .to() does.
    cuda_dtype: what the weights become on a GPU.
    """

    def __init__(self, module: nn.Module, cuda_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.__dict__["module"] = module.eval().requires_grad_(False)
        self.cuda_dtype = cuda_dtype
        self.eval()

    def forward(self, *inputs):
        with torch.no_grad():
            return self.module(*inputs)

    def train(self, mode: bool = True):
        return super().train(False)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda() and .float() come down to
        self.module._apply(fn, recurse)
        if any(parameter.is_cuda for parameter in self.module.parameters()):
            self.module.to(self.cuda_dtype)
        return super()._apply(fn, recurse)


# Text encoders


def load_text_encoder(name: str) -> tuple[nn.Module, typing.Callable, int]:
    """A text encoder, on the CPU: encoder(ids (B, S), mask (B, S) bool) -> (B, S, width) float32.

    name: hub id or folder of a T5 or ByT5, frozen, bf16 once moved to a GPU | scratch: a small ByT5, random
    and to be trained.
    returns: encoder, its tokenizer (see `tokenize`), width.
    """
    if name == "scratch":
        return scratch_text_encoder()
    hint = "give --text_encoder the folder of a T5 or ByT5, or scratch to train a small one along"
    offline = klein_is_away(name)
    try:
        t5, report = transformers.T5EncoderModel.from_pretrained(
            name, dtype=torch.float32, local_files_only=offline, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"text encoder {name}: cannot be loaded ({brief(e)}); {hint}") from e
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise UserError(f"text encoder {name}: its weights lack {missing}; {hint}")
    ids = tokenize(tokenizer, ["the"])[0]
    if tokenizer.unk_token_id in ids:  # without files, AutoTokenizer makes up an empty vocabulary
        raise UserError(f"text encoder {name}: it has no tokenizer of its own; {hint}")
    encoder = Frozen(TextEncoder(t5), cuda_dtype=torch.bfloat16)
    return encoder, tokenizer, t5.config.d_model


def scratch_text_encoder() -> tuple[nn.Module, typing.Callable, int]:
    """What `load_text_encoder` returns, for a small random ByT5."""
    config = transformers.T5Config(
        vocab_size=384,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = TextEncoder(transformers.T5EncoderModel(config))
    return encoder, transformers.ByT5Tokenizer(), config.d_model


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, EOS appended: "" -> [eos]. Text that looks like a special token, "</s>", is text."""
    return [tokenizer(text, split_special_tokens=True).input_ids for text in texts]


class PhonemeTokenizer:
    """A byte tokenizer of a text's phonemes, in espeak-ng's ASCII notation, instead of its letters.

    So pronunciation need not be learned.
    """

    def __init__(self, tokenizer: typing.Callable):
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options):
        return self.tokenizer(voice.phonemes(text), **options)


class TextEncoder(nn.Module):
    """A T5 encoder, called by position; padding (mask False) is not attended to and encodes nothing."""

    def __init__(self, t5: nn.Module):
        super().__init__()
        self.stack = t5.encoder  # t5 itself holds the embedding under two names

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output = self.stack(input_ids=ids, attention_mask=mask)
        return output.last_hidden_state.float()  # (B, S, D)


# Vocoders


def load_vocoder(
    name: str, mel: Mel, device: torch.device | str
) -> typing.Callable[[torch.Tensor], torch.Tensor]:
    """A vocoder: log-mel (T, M), natural log -> wave (T * hop,) in [-1, 1], float32 on the CPU.

    name: griffinlim | hub id or folder of a BigVGAN, which must have been trained on `mel`.
    """
    if name == "griffinlim":
        network = functools.partial(audio.griffin_lim, mel=mel)
    else:
        network = Frozen(load_bigvgan(name, mel)).to(device)
    device_type = torch.device(device).type

    def vocode(log_mel: torch.Tensor) -> torch.Tensor:
        # no autocast: in bf16 the phase of Snake's sine is noise
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            log_mel = log_mel.to(device, torch.float32)
            return network(log_mel).cpu().clamp(-1, 1)

    return vocode


def load_bigvgan(name: str, mel: Mel) -> nn.Module:
    """The generator from config.json and bigvgan_generator.pt in a folder or hub repository."""
    path = find_file(name, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        check_bigvgan(config, mel, path)
        generator = BigVGAN(config)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path}: does not describe a BigVGAN ({brief(e)})") from e
    path = find_file(name, "bigvgan_generator.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = fold_weight_norm(checkpoint["generator"])
        generator.load_state_dict(state)
    except Exception as e:  # a damaged file makes torch.load raise nearly anything
        raise UserError(
            f"{path}: not the weights of this BigVGAN, or damaged ({brief(e)}); fetch it again"
        ) from e
    return generator


def check_bigvgan(config: dict, mel: Mel, path: Path) -> None:
    """raises UserError for a BigVGAN trained on another mel than ours, or of an unpublished kind."""
    fmax = config["fmax"]
    if fmax is None:
        fmax = config["sampling_rate"] / 2
    config = {**config, "fmax": fmax, "resblock": str(config["resblock"])}
    required = {
        "sampling_rate": mel.sample_rate,
        "hop_size": mel.hop,
        "n_fft": mel.n_fft,
        "win_size": mel.n_fft,
        "num_mels": mel.n_mels,
        "fmin": mel.fmin,
        "fmax": mel.fmax,
    }
    for key, value in required.items():
        if config[key] != value:
            raise UserError(
                f"{path}: this BigVGAN was trained with {key} {config[key]}, our mel has {value}; "
                "take another, or griffinlim"
            )
    supported = {"resblock": ("1", "2"), "activation": ("snake", "snakebeta"), "snake_logscale": (True,)}
    for key, values in supported.items():
        if config[key] not in values:
            known = " and ".join(map(repr, values))
            raise UserError(f"{path}: {key} {config[key]!r} is not supported, only {known}")
    rates = config["upsample_rates"]
    if math.prod(rates) != mel.hop:
        raise UserError(f"{path}: upsample_rates {rates} do not multiply to hop_size {mel.hop}")


def fold_weight_norm(state: dict) -> dict:
    """Replace each pair weight_g, weight_v by the weight g v / |v|, the norm over all axes but the first."""
    folded = dict(state)
    for key, direction in state.items():
        length_key = key[:-1] + "g"
        if key.endswith("weight_v") and length_key in state:
            del folded[key]
            length = folded.pop(length_key)
            norm = direction.norm(dim=(1, 2), keepdim=True)
            folded[key.removesuffix("_v")] = direction * (length / norm)
    return folded


class BigVGAN(nn.Module):
    """The generator (Lee et al. 2023): log-mel (..., T, M) -> wave (..., T * hop).

    config: the published config.json. Submodules are named, and nested, as in its checkpoints.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["upsample_initial_channel"]
        rates = config["upsample_rates"]
        up_kernels = config["upsample_kernel_sizes"]
        kernels = config["resblock_kernel_sizes"]
        dilations = config["resblock_dilation_sizes"]
        block = AMPBlock2 if str(config["resblock"]) == "2" else AMPBlock1
        beta = config["activation"] == "snakebeta"
        self.parallel_blocks = len(kernels)
        self.conv_pre = conv(config["num_mels"], width, 7)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, up_kernel in zip(rates, up_kernels, strict=True):
            next_width = width // 2
            padding = (up_kernel - rate) // 2
            up = nn.ConvTranspose1d(width, next_width, up_kernel, rate, padding=padding)
            self.ups.append(nn.Sequential(up))
            width = next_width
            for kernel, block_dilations in zip(kernels, dilations, strict=True):
                self.resblocks.append(block(width, kernel, block_dilations, beta))
        self.activation_post = Activation(width, beta)
        bias = config.get("use_bias_at_final", True)
        self.conv_post = conv(width, 1, 7, bias=bias)
        self.tanh = config.get("use_tanh_at_final", True)

    def forward(self, log_mel: torch.Tensor) -> torch.Tensor:
        x = log_mel.transpose(-1, -2)  # (..., M, T)
        x = self.conv_pre(x)  # (..., C, T)
        for i, up in enumerate(self.ups):
            x = up(x)  # half the channels, `rate` times the samples
            first = i * self.parallel_blocks
            blocks = self.resblocks[first : first + self.parallel_blocks]
            outputs = [block(x) for block in blocks]
            x = sum(outputs) / self.parallel_blocks
        x = self.activation_post(x)
        x = self.conv_post(x)  # (..., 1, T * hop)
        x = x.squeeze(-2)
        if self.tanh:
            return x.tanh()
        return x.clamp(-1, 1)


class AMPBlock1(nn.Module):
    """Residual pairs of a dilated and a plain convolution, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs1 = nn.ModuleList()
        self.convs2 = nn.ModuleList()
        self.activations = nn.ModuleList()
        for dilation in dilations:
            self.convs1.append(conv(width, width, kernel, dilation))
        for _ in dilations:
            self.convs2.append(conv(width, width, kernel))
        for _ in range(2 * len(dilations)):
            self.activations.append(Activation(width, beta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first_acts = self.activations[::2]
        second_acts = self.activations[1::2]
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, first_acts, second_acts):
            h = act1(x)
            h = conv1(h)
            h = act2(h)
            x = x + conv2(h)
        return x


class AMPBlock2(nn.Module):
    """Residual dilated convolutions, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs = nn.ModuleList()
        self.activations = nn.ModuleList()
        for dilation in dilations:
            self.convs.append(conv(width, width, kernel, dilation))
            self.activations.append(Activation(width, beta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, activation in zip(self.convs, self.activations):
            h = activation(x)
            x = x + convolution(h)
        return x


class Activation(nn.Module):
    """Snake at twice the sampling rate: what lies above the Nyquist frequency is filtered, not aliased."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.act = Snake(width, beta)
        self.upsample = LowPass()
        self.downsample = nn.ModuleDict({"lowpass": LowPass()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.upsample.upsample(x)  # (..., C, 2 T)
        x = self.act(x)
        return self.downsample["lowpass"].downsample(x)  # (..., C, T)


class Snake(nn.Module):
    """x + sin(a x)^2 / b by channel, a and b as logarithms; plain snake has b = a (Ziyin et al. 2020)."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = None
        if beta:
            self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.alpha.exp()[:, None]  # (C, 1)
        b = a
        if self.beta is not None:
            b = self.beta.exp()[:, None]
        sine = torch.sin(a * x)
        return x + sine.square() / (b + 1e-9)


class LowPass(nn.Module):
    """12 taps of a Kaiser-windowed sinc that cut at a quarter of the sampling rate; their sum is 1."""

    def __init__(self):
        super().__init__()
        attenuation = (
            2.285 * 5 * math.pi * 1.2 + 7.95
        )  # dB, 6 taps a side, transition 0.3 (Kaiser 1974): 51.0
        beta = 0.1102 * (attenuation - 8.7)
        window = torch.kaiser_window(12, periodic=False, beta=beta)
        time = (torch.arange(12) - 5.5) / 2
        taps = torch.sinc(time)
        taps = window * taps
        taps = taps / taps.sum()
        self.register_buffer("filter", taps[None, None])

    def upsample(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C, T) -> (..., C, 2 T)."""
        channels = x.shape[-2]
        kernels = self.filter.expand(channels, -1, -1)
        x = F.pad(x, (5, 5), mode="replicate")
        # padding 15: the 5 samples above, twice, and the filter's delay of 5
        x = F.conv_transpose1d(x, kernels, stride=2, padding=15, groups=channels)
        return 2 * x

    def downsample(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C, 2 T) -> (..., C, T)."""
        channels = x.shape[-2]
        kernels = self.filter.expand(channels, -1, -1)
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, kernels, stride=2, groups=channels)


def conv(channels: int, out_channels: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv1d:
    """A convolution that keeps the length."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, out_channels, kernel, dilation=dilation, padding=padding, bias=bias)


# FLUX.2 Klein: the parts of a diffusers Flux2KleinPipeline, each alone: training never needs all at once

# the text encoder's hidden states that the transformer reads; later layers are not run
KLEIN_TAPS = (9, 18, 27)
KLEIN_REMEDY = "give --klein.base the folder of a Flux2KleinPipeline"
KLEIN_CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""  # what Qwen3's own template comes down to for one message


def load_klein(config: Config, part: str) -> nn.Module:
    """One network of the pipeline config.klein.base, on the CPU.

    part: transformer (frozen bf16 or fp32 as train.dtype says, fp32 where it is tuned in full) | text_encoder
    (a KleinText, as train.dtype says) | vae (a KleinVAE, or Patches; fp32, since latents are made once).
    """
    if part == "vae" and config.klein.vae == "patches":
        return Patches()
    if config.klein.base == "scratch":
        network = scratch_klein(config, part)
    else:
        network = load_published_klein(config, part)
    if part == "text_encoder":
        return KleinText(network)
    if part == "vae":
        return KleinVAE(network)
    return network


def load_published_klein(config: Config, part: str) -> nn.Module:
    """diffusers' or transformers' network in the subfolder `part` of the pipeline config.klein.base."""
    import diffusers  # seconds to import: only what needs it waits for it

    k = config.klein
    kinds = {
        "transformer": diffusers.Flux2Transformer2DModel,
        "text_encoder": transformers.Qwen3ForCausalLM,
        "vae": diffusers.AutoencoderKLFlux2,
    }
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    if part == "vae" or (part == "transformer" and k.tune == "full"):
        dtype = torch.float32
    what = f"klein.base {k.base}: its {part}"
    try:
        offline = klein_is_away(k.base)
        with warnings.catch_warnings(action="ignore"):  # diffusers' own, about the hub's client
            network, report = kinds[part].from_pretrained(
                k.base, subfolder=part, dtype=dtype, local_files_only=offline, output_loading_info=True
            )
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"{what} cannot be loaded ({brief(e)}); {KLEIN_REMEDY}") from e
    missing = first_missing(report)
    if missing:
        raise UserError(f"{what} lacks {missing}")
    return network


def load_frozen_klein(config: Config, part: str, device: torch.device) -> Frozen:
    """As `load_klein`, frozen, on the device, in the precision that it was loaded in."""
    network = load_klein(config, part)
    parameter = next(network.parameters(), torch.empty(0))
    return Frozen(network, cuda_dtype=parameter.dtype).to(device)


def load_klein_tokenizer(base: str):
    """The tokenizer of the pipeline `base`; scratch: byte-level, with Qwen3's special tokens and template."""
    if base == "scratch":
        return scratch_klein_tokenizer()
    try:
        offline = klein_is_away(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            base, subfolder="tokenizer", local_files_only=offline
        )
        tokenize_prompts(tokenizer, [""], 512)  # needs a template for chats, and padding
        ids = tokenizer("speech").input_ids
        if tokenizer.decode(ids) != "speech":  # without files, AutoTokenizer makes up an empty vocabulary
            raise ValueError("it has no vocabulary")
    except Exception as e:
        raise UserError(
            f"klein.base {base}: its tokenizer cannot be loaded ({brief(e)}); {KLEIN_REMEDY}"
        ) from e
    return tokenizer


def scratch_klein_tokenizer() -> transformers.Qwen2Tokenizer:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # GPT-2's characters for bytes

    characters = bytes_to_unicode()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokens = [characters[byte] for byte in range(256)] + special
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: n for n, token in enumerate(tokens)},
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens=special[1:],
        padding_side="right",
    )
    tokenizer.chat_template = KLEIN_CHAT
    return tokenizer


def save_klein(config: Config, transformer: nn.Module, folder: Path) -> None:
    """A pipeline around a tuned transformer, for Flux2KleinPipeline.from_pretrained and `klein.base`."""
    import diffusers

    k = config.klein
    if k.base == "scratch":
        vae = scratch_klein(config, "vae") if k.vae == "own" else None
        # without dynamic shifting the scheduler ignores mu
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        pipeline = diffusers.Flux2KleinPipeline(
            transformer=transformer,
            text_encoder=scratch_klein(config, "text_encoder"),
            tokenizer=load_klein_tokenizer(k.base),
            vae=vae,
            scheduler=scheduler,
            is_distilled=False,
        )
    else:
        offline = klein_is_away(k.base)
        pipeline = diffusers.Flux2KleinPipeline.from_pretrained(
            k.base, transformer=transformer, local_files_only=offline
        )
    pipeline.save_pretrained(folder)


def klein_is_away(base: str) -> bool:
    """Whether only local files can be had of a network of this name: it is no folder, and the hub is away."""
    return not Path(base).is_dir() and hub_is_away()


def tokenize_prompts(tokenizer, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, length) and mask, the prompts in Qwen3's chat form, padded on the right as Klein was trained.

    raises UserError for a prompt that does not fit.
    """
    chats = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        chats.append(chat)
    rows = []
    lengths = []
    # padded here: padding by the tokenizer is not thread-safe, it mutates the tokenizer
    for prompt, ids in zip(prompts, tokenizer(chats).input_ids):
        if len(ids) > length:
            raise UserError(
                f"prompt {prompt[:40]!r}... has {len(ids)} tokens, klein.text_tokens is {length}: shorten it"
            )
        padding = [tokenizer.pad_token_id] * (length - len(ids))
        rows.append(ids + padding)
        lengths.append(len(ids))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]  # (B, length)
    return torch.tensor(rows), mask


class KleinText(nn.Module):
    """Qwen3 up to the last layer that Klein reads, 27 of 36: the same features, 32 % fewer operations."""

    def __init__(self, qwen: nn.Module):
        super().__init__()
        depth = KLEIN_TAPS[-1]
        self.model = qwen.model
        self.model.layers = self.model.layers[:depth]
        self.model.norm = nn.Identity()  # or the last hidden state would be normalised
        self.model.config.num_hidden_layers = depth

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask (B, S) -> (B, S, 3 D)."""
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = output.hidden_states
        features = [states[layer] for layer in KLEIN_TAPS]
        return torch.cat(features, -1)


class KleinVAE(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] <-> normalised latents, as tokens (B, H / 16 * W / 16, 4 C)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = 2 * pictures - 1
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mode().float()  # (B, C, H / 8, W / 8)
        tokens = rearrange(latents, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)
        return (tokens - self.mean) / self.std

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        tokens = tokens.float() * self.std + self.mean
        rows = height // 16
        columns = width // 16
        latents = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=rows, w=columns, i=2, j=2)
        latents = latents.to(self.vae.dtype)
        pixels = self.vae.decode(latents).sample.float()  # (B, 3, H, W)
        return (pixels / 2 + 0.5).clamp(0, 1)

    @property
    def mean(self) -> torch.Tensor:
        """(4 C,), of the latents, which the VAE keeps in a batch norm."""
        return self.vae.bn.running_mean.float()

    @property
    def std(self) -> torch.Tensor:
        variance = self.vae.bn.running_var.float()
        return (variance + self.vae.config.batch_norm_eps).sqrt()


class Patches(nn.Module):
    """Instead of KleinVAE: 16 x 16 pixels in [-1, 1] are a token of 768 numbers; nothing is lost."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = 2 * pictures - 1
        return rearrange(pixels, "b c (h i) (w j) -> b (h w) (c i j)", i=16, j=16)

    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        rows = height // 16
        columns = width // 16
        pixels = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=rows, w=columns, i=16, j=16)
        pictures = pixels / 2 + 0.5
        return pictures.clamp(0, 1)


def scratch_klein(config: Config, part: str) -> nn.Module:
    """A small random Klein of the real classes, always the same for the same config: for demos and tests."""
    import diffusers

    m = config.model
    k = config.klein
    text_width = 32
    latent_channels = 4
    head_dim = m.width // m.heads
    axis_dim = head_dim // 8 * 2  # numbers of a head that RoPE gives to each of four position axes, even
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if part == "transformer":
            network = diffusers.Flux2Transformer2DModel(
                in_channels=768 if k.vae == "patches" else 4 * latent_channels,
                num_layers=k.double_layers,
                num_single_layers=m.layers - k.double_layers,
                attention_head_dim=head_dim,
                num_attention_heads=m.heads,
                joint_attention_dim=3 * text_width,
                axes_dims_rope=(head_dim - 3 * axis_dim, axis_dim, axis_dim, axis_dim),
                guidance_embeds=False,
            )
            return wake(network)
        if part == "text_encoder":
            qwen = transformers.Qwen3Config(
                vocab_size=261,
                hidden_size=text_width,
                intermediate_size=64,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                tie_word_embeddings=True,
                max_position_embeddings=2048,
            )
            return transformers.Qwen3ForCausalLM(qwen)
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 8, 8, 8),
            latent_channels=latent_channels,
            norm_num_groups=4,
            layers_per_block=1,
        )
        vae.bn.running_mean.normal_()  # not 0 and 1, which would hide a forgotten normalisation
        vae.bn.running_var.uniform_(0.5, 2)
        return vae


@torch.no_grad()
def wake(transformer: nn.Module) -> nn.Module:
    """Initialise gates with std 1, not diffusers' 0.03: then every block visibly changes the output."""
    time = transformer.time_guidance_embed
    features = time(torch.linspace(0, 1000, 64), None)
    time.timestep_embedder.linear_2.weight /= features.std()
    for modulation in (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ):
        # (branches, 3, D, D): shift, scale and gate of each branch
        weight = modulation.linear.weight.unflatten(0, (-1, 3, transformer.inner_dim))
        weight.zero_()
        std = 1 / (0.6 * transformer.inner_dim**0.5)  # 0.6: the RMS of SiLU of a standard normal
        weight[:, 2].normal_(std=std)
    transformer.norm_out.linear.weight.zero_()
    transformer.context_embedder.weight *= 20  # a random Qwen3's features have std 0.05
    return transformer


# Where the files are


def find_file(name: str, filename: str) -> Path:
    """`filename` in the folder `name`, or in the hub repository of that name, cached if the hub is away."""
    if Path(name).is_dir():
        path = Path(name, filename)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, local_files_only=hub_is_away()))
    except Exception as e:  # the hub's client changed its HTTP library, and its errors, before
        raise UserError(
            f"{name}: neither a folder nor to be had from the hub ({brief(e)}); give a folder with {filename}"
        ) from e


@functools.cache
def hub_is_away() -> bool:
    """Whether only cached files can be had; heeds HF_HUB_OFFLINE.

    Asked once, without the 25 s of retries that a download would make.
    """
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        return True
    return False


def brief(error: Exception) -> str:
    """The kind and the first sentence of a library's error, on one line."""
    text = " ".join(str(error).split())
    sentence = text.split(". ")[0][:200]
    return f"{type(error).__name__}: {sentence}".removesuffix(": ")
