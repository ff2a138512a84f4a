"""Other people's networks: text encoders, vocoders, the parts of FLUX.2 Klein, each behind one small call, frozen by one wrapper.

A network comes from a local folder or from the Hugging Face hub, by one name. What is wrong with either is a UserError,
and without a network the answer comes at once. BigVGAN is written out below: layout and equations as in
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
def load_frozen(kind: type, name: str, part: str, knob: str, device: torch.device) -> nn.Module:
    """A network of transformers or diffusers from a folder or the hub, frozen, float32, kept; part: its subfolder, or ""."""
    try:
        module, report = kind.from_pretrained(name, subfolder=part, local_files_only=klein_is_away(name), output_loading_info=True)
    except Exception as e:                                   # each library below has its own for a missing or damaged file
        raise UserError(f"{knob} {name}: its {part or 'weights'} cannot be loaded by {kind.__name__} ({brief(e)}); give a folder") from e
    if missing := report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(f"{knob} {name}: its {part or 'weights'} lacks {min(map(str, missing))}: not a {kind.__name__}")
    return Frozen(module.float()).to(device).module


class Frozen(nn.Module):
    """A network that stays as it came: no gradient, always in eval mode, in nobody's parameters, state_dict or checkpoint.

    The wrapped network is not registered as a submodule, so whatever a parent does to its own (train, requires_grad_,
    apply, load_state_dict) passes it by; only .to() reaches it.
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

    def _apply(self, fn, recurse=True):                      # what .to(), .cuda() and .float() come down to
        self.module._apply(fn, recurse)
        if any(parameter.is_cuda for parameter in self.module.parameters()):
            self.module.to(self.cuda_dtype)
        return super()._apply(fn, recurse)


# Text encoders

def load_text_encoder(name: str) -> tuple[nn.Module, typing.Callable, int]:
    """A text encoder, on the CPU: encoder(ids (B, S), mask (B, S) bool) -> (B, S, width) float32.

    name: hub id or folder of a T5 or ByT5, frozen, bf16 once moved to a GPU | scratch: a small ByT5, random and to be trained.
    returns encoder, its tokenizer (see `tokenize`), width.
    """
    if name == "scratch":
        config = transformers.T5Config(vocab_size=384, d_model=192, d_kv=32, d_ff=512, num_layers=2, num_heads=6,
                                       feed_forward_proj="gated-gelu", dropout_rate=0.0)
        return TextEncoder(transformers.T5EncoderModel(config)), transformers.ByT5Tokenizer(), config.d_model
    remedy = "give --text_encoder the folder of a T5 or ByT5, or scratch to train a small one along"
    offline = not Path(name).is_dir() and hub_is_away()
    try:
        t5, report = transformers.T5EncoderModel.from_pretrained(name, dtype=torch.float32, local_files_only=offline,
                                                                 output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except Exception as e:                                   # each of the libraries below has its own for a missing or damaged file
        raise UserError(f"text encoder {name}: cannot be loaded ({brief(e)}); {remedy}") from e
    if report["missing_keys"]:
        raise UserError(f"text encoder {name}: its weights lack {min(report['missing_keys'])}; {remedy}")
    if tokenizer.unk_token_id in tokenize(tokenizer, ["the"])[0]:      # without files, AutoTokenizer makes up an empty vocabulary
        raise UserError(f"text encoder {name}: it has no tokenizer of its own; {remedy}")
    return Frozen(TextEncoder(t5), cuda_dtype=torch.bfloat16), tokenizer, t5.config.d_model


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, EOS appended: "" -> [eos]. Text that looks like a special token, "</s>", is text."""
    return [tokenizer(text, split_special_tokens=True).input_ids for text in texts]


class PhonemeTokenizer:
    """A byte tokenizer on the phonemes of a text, in espeak-ng's ASCII notation, instead of its letters: how words sound is not to be learned."""

    def __init__(self, tokenizer: typing.Callable):
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options):
        return self.tokenizer(voice.phonemes(text), **options)


class TextEncoder(nn.Module):
    """A T5 encoder, called by position; padding (mask False) is not attended to, its own outputs mean nothing."""

    def __init__(self, t5: nn.Module):
        super().__init__()
        self.stack = t5.encoder                              # t5 itself holds the embedding under two names

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.stack(input_ids=ids, attention_mask=mask).last_hidden_state.float()


# Vocoders

def load_vocoder(name: str, mel: Mel, device: torch.device | str) -> typing.Callable[[torch.Tensor], torch.Tensor]:
    """A vocoder: log-mel (T, M), natural log -> wave (T * hop,) in [-1, 1], float32 on the CPU.

    name: griffinlim | hub id or folder of a BigVGAN, which must have been trained on `mel`.
    """
    if name == "griffinlim":
        network = functools.partial(audio.griffin_lim, mel=mel)
    else:
        network = Frozen(load_bigvgan(name, mel)).to(device)

    def vocode(log_mel: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):          # the sine of a bf16 phase is noise
            return network(log_mel.to(device, torch.float32)).cpu().clamp(-1, 1)

    return vocode


def load_bigvgan(name: str, mel: Mel) -> nn.Module:
    """The generator from {config.json, bigvgan_generator.pt} in a folder or hub repository, its weight norm folded away."""
    path = find_file(name, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        check_bigvgan(config, mel, path)
        generator = BigVGAN(config)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path}: does not describe a BigVGAN ({brief(e)})") from e
    path = find_file(name, "bigvgan_generator.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["generator"]
        generator.load_state_dict(fold_weight_norm(state))
    except Exception as e:                                   # a damaged file makes torch.load raise nearly anything
        raise UserError(f"{path}: not the weights of this BigVGAN, or damaged ({brief(e)}); fetch it again") from e
    return generator


def check_bigvgan(config: dict, mel: Mel, path: Path) -> None:
    """Refuse a BigVGAN for another mel than ours, or of a kind that was never published."""
    nyquist = config["sampling_rate"] / 2
    found = {**config, "fmax": nyquist if config["fmax"] is None else config["fmax"], "resblock": str(config["resblock"])}
    wanted = {"sampling_rate": mel.sample_rate, "hop_size": mel.hop, "n_fft": mel.n_fft, "win_size": mel.n_fft,
              "num_mels": mel.n_mels, "fmin": mel.fmin, "fmax": mel.fmax}
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{path}: this BigVGAN was trained with {key} {found[key]}, our mel has {value}; take another, or griffinlim")
    known = {"resblock": ("1", "2"), "activation": ("snake", "snakebeta"), "snake_logscale": (True,)}
    for key, values in known.items():
        if found[key] not in values:
            raise UserError(f"{path}: {key} {found[key]!r} is not supported, only {' and '.join(map(repr, values))}")
    if math.prod(config["upsample_rates"]) != mel.hop:
        raise UserError(f"{path}: upsample_rates {config['upsample_rates']} do not multiply to hop_size {mel.hop}")


def fold_weight_norm(state: dict) -> dict:
    """Each pair weight_g, weight_v as the one weight = g v / |v| that it stands for, the norm over all axes but the first."""
    folded = dict(state)
    for key in [k for k in state if k.endswith("weight_v") and k[:-1] + "g" in state]:
        direction, length = folded.pop(key), folded.pop(key[:-1] + "g")
        folded[key[:-2]] = direction * (length / direction.norm(dim=(1, 2), keepdim=True))
    return folded


class BigVGAN(nn.Module):
    """The generator (Lee et al. 2023): log-mel (..., T, M) -> wave (..., T * hop).

    config: the published config.json. Submodules are named, and nested, as its checkpoints have them.
    """

    def __init__(self, config: dict):
        super().__init__()
        rates, width = config["upsample_rates"], config["upsample_initial_channel"]
        kernels, dilations = config["resblock_kernel_sizes"], config["resblock_dilation_sizes"]
        block, beta = (AMPBlock1, AMPBlock2)[str(config["resblock"]) == "2"], config["activation"] == "snakebeta"
        self.conv_pre = conv(config["num_mels"], width, 7)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(rates, config["upsample_kernel_sizes"], strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.Sequential(up))
            width //= 2
            self.resblocks.extend(block(width, k, d, beta) for k, d in zip(kernels, dilations, strict=True))
        self.activation_post = Activation(width, beta)
        self.conv_post = conv(width, 1, 7, bias=config.get("use_bias_at_final", True))
        self.tanh = config.get("use_tanh_at_final", True)

    def forward(self, log_mel: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(log_mel.transpose(-1, -2))                             # (..., C, T)
        parallel = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(x)                                                            # half the channels, `rate` times the samples
            x = sum(block(x) for block in self.resblocks[i * parallel:(i + 1) * parallel]) / parallel
        x = self.conv_post(self.activation_post(x)).squeeze(-2)                  # (..., T * hop)
        return x.tanh() if self.tanh else x.clamp(-1, 1)


class AMPBlock1(nn.Module):
    """Residual pairs of a dilated and a plain convolution, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs1 = nn.ModuleList(conv(width, width, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(conv(width, width, kernel) for _ in dilations)
        self.activations = nn.ModuleList(Activation(width, beta) for _ in range(2 * len(dilations)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, self.activations[::2], self.activations[1::2]):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class AMPBlock2(nn.Module):
    """Residual dilated convolutions, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs = nn.ModuleList(conv(width, width, kernel, d) for d in dilations)
        self.activations = nn.ModuleList(Activation(width, beta) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, act in zip(self.convs, self.activations):
            x = x + convolution(act(x))
        return x


class Activation(nn.Module):
    """A snake at twice the rate: what it adds above the Nyquist frequency is filtered off instead of folded back."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.act = Snake(width, beta)
        self.upsample = LowPass()
        self.downsample = nn.ModuleDict({"lowpass": LowPass()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[-2]
        up, down = (lowpass.filter.expand(channels, -1, -1) for lowpass in (self.upsample, self.downsample["lowpass"]))
        x = F.pad(x, (5, 5), mode="replicate")                                   # 15 below: these, twice, and a delay of 5
        x = self.act(2 * F.conv_transpose1d(x, up, stride=2, padding=15, groups=channels))       # (..., C, 2 T)
        return F.conv1d(F.pad(x, (5, 6), mode="replicate"), down, stride=2, groups=channels)     # (..., C, T)


class Snake(nn.Module):
    """x + sin(a x)^2 / b by channel, a and b kept as logarithms; plain snake has b = a (Ziyin et al. 2020)."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width)) if beta else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frequency = self.alpha.exp()[:, None]
        height = frequency if self.beta is None else self.beta.exp()[:, None]
        return x + torch.sin(frequency * x).square() / (height + 1e-9)


class LowPass(nn.Module):
    """12 taps of a Kaiser-windowed sinc that cut at a quarter of the sampling rate; their sum is 1."""

    def __init__(self):
        super().__init__()
        attenuation = 2.285 * 5 * math.pi * 1.2 + 7.95       # dB, of 6 taps a side and a transition of 0.3 (Kaiser 1974): 51.0
        window = torch.kaiser_window(12, periodic=False, beta=0.1102 * (attenuation - 8.7))
        taps = window * torch.sinc((torch.arange(12) - 5.5) / 2)
        self.register_buffer("filter", (taps / taps.sum())[None, None])


def conv(channels: int, out_channels: int, kernel: int, dilation: int = 1, bias: bool = True) -> nn.Conv1d:
    """A convolution that keeps the length."""
    return nn.Conv1d(channels, out_channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2, bias=bias)


# FLUX.2 Klein: the parts of a diffusers Flux2KleinPipeline, each by itself, because training never needs all of them at once

KLEIN_TAPS = (9, 18, 27)             # hidden states of the text encoder that the transformer reads; what is above is never computed
KLEIN_REMEDY = "give --klein.base the folder of a Flux2KleinPipeline"
KLEIN_CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""            # what Qwen3's own template comes down to for one message


def load_klein(config: Config, part: str) -> nn.Module:
    """One network of the pipeline config.klein.base, on the CPU.

    part: transformer (frozen bf16 or fp32 as train.dtype says, fp32 where it is tuned in full) | text_encoder (a KleinText, as
    train.dtype says) | vae (a KleinVAE, or Patches; fp32, since latents are made once).
    """
    import diffusers                                         # seconds to import: only what needs it waits for it
    k, half = config.klein, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    if part == "vae" and k.vae == "patches":
        return Patches()
    if k.base == "scratch":
        module = scratch_klein(config, part)
        return module if part == "transformer" else KleinText(module) if part == "text_encoder" else KleinVAE(module)
    kinds = {"transformer": diffusers.Flux2Transformer2DModel, "text_encoder": transformers.Qwen3ForCausalLM,
             "vae": diffusers.AutoencoderKLFlux2}
    try:
        dtype = torch.float32 if part == "vae" or part == "transformer" and k.tune == "full" else half
        with warnings.catch_warnings(action="ignore"):       # diffusers' own, about the hub's client
            module, report = kinds[part].from_pretrained(k.base, subfolder=part, dtype=dtype, local_files_only=klein_is_away(k.base),
                                                         output_loading_info=True)
    except Exception as e:                                   # each library below has its own for a missing or damaged file
        raise UserError(f"klein.base {k.base}: its {part} cannot be loaded ({brief(e)}); {KLEIN_REMEDY}") from e
    if report["missing_keys"] or report["mismatched_keys"]:
        raise UserError(f"klein.base {k.base}: its {part} lacks {min(map(str, report['missing_keys'] or report['mismatched_keys']))}")
    return module if part == "transformer" else KleinText(module) if part == "text_encoder" else KleinVAE(module)


def load_frozen_klein(config: Config, part: str, device: torch.device) -> Frozen:
    """As `load_klein`, frozen, on the device, in the precision that it was loaded in."""
    module = load_klein(config, part)
    return Frozen(module, cuda_dtype=next(module.parameters(), torch.empty(0)).dtype).to(device)


def load_klein_tokenizer(base: str):
    """The tokenizer of the pipeline `base`; of scratch, a byte-level one with Qwen3's special tokens and chat template."""
    if base == "scratch":
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(b) if b in printable else chr(256 + b - sum(p < b for p in printable)) for b in range(256)]   # GPT-2's bytes
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
        tokenizer = transformers.Qwen2Tokenizer(vocab={letter: n for n, letter in enumerate(letters + special)}, merges=[],
                                                eos_token="<|im_end|>", extra_special_tokens=special[1:], padding_side="right")
        tokenizer.chat_template = KLEIN_CHAT
        return tokenizer
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, subfolder="tokenizer", local_files_only=klein_is_away(base))
        tokenize_prompts(tokenizer, [""], 512)               # needs a template for chats, and padding
        if tokenizer.decode(tokenizer("speech").input_ids) != "speech":      # without files, AutoTokenizer makes up an empty vocabulary
            raise ValueError("it has no vocabulary")
    except Exception as e:
        raise UserError(f"klein.base {base}: its tokenizer cannot be loaded ({brief(e)}); {KLEIN_REMEDY}") from e
    return tokenizer


def save_klein(config: Config, transformer: nn.Module, folder: Path) -> None:
    """A whole pipeline around a tuned transformer, as diffusers' Flux2KleinPipeline.from_pretrained and `klein.base` load it."""
    import diffusers
    k, parts = config.klein, {}
    if k.base == "scratch":
        parts = {"text_encoder": scratch_klein(config, "text_encoder"), "tokenizer": load_klein_tokenizer(k.base),
                 "vae": scratch_klein(config, "vae") if k.vae == "own" else None}
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)      # without it mu is ignored
        pipeline = diffusers.Flux2KleinPipeline(transformer=transformer, is_distilled=False, **parts)
    else:
        pipeline = diffusers.Flux2KleinPipeline.from_pretrained(k.base, transformer=transformer, local_files_only=klein_is_away(k.base))
    pipeline.save_pretrained(folder)


def klein_is_away(base: str) -> bool:
    return not Path(base).is_dir() and hub_is_away()


def tokenize_prompts(tokenizer, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, length) and mask, the prompts in Qwen3's chat form, padded on the right as Klein was trained.

    raises UserError for a prompt that does not fit.
    """
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                                           enable_thinking=False) for prompt in prompts]
    found = tokenizer(chats).input_ids           # padded here, not by the tokenizer: that would change its state, under other threads' feet
    for prompt, ids in zip(prompts, found):
        if len(ids) > length:
            raise UserError(f"prompt {prompt[:40]!r}... has {len(ids)} tokens, klein.text_tokens is {length}: shorten it")
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in found])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in found])


class KleinText(nn.Module):
    """Qwen3 up to the last layer that Klein reads: 27 of 36, bit for bit the same features for 32 % fewer operations."""

    def __init__(self, qwen: nn.Module):
        super().__init__()
        self.model = qwen.model
        self.model.layers = self.model.layers[:KLEIN_TAPS[-1]]
        self.model.norm = nn.Identity()                      # or the last tap would be normalised
        self.model.config.num_hidden_layers = KLEIN_TAPS[-1]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask (B, S) -> (B, S, 3 D)."""
        states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[tap] for tap in KLEIN_TAPS], -1)


class KleinVAE(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] <-> normalised latents as the transformer's tokens (B, H / 16 * W / 16, 4 C)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode((2 * pictures - 1).to(self.vae.device, self.vae.dtype)).latent_dist.mode().float()
        tokens = rearrange(latents, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)
        return (tokens - self.vae.bn.running_mean.float()) / self.deviation()

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        tokens = tokens.float() * self.deviation() + self.vae.bn.running_mean.float()
        latents = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=height // 16, w=width // 16, i=2, j=2)
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def deviation(self) -> torch.Tensor:
        return (self.vae.bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()


class Patches(nn.Module):
    """In KleinVAE's place: 16 x 16 pixels in [-1, 1] are a token of 768 numbers as they are. Nothing is learned, nothing is lost."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return rearrange(2 * pictures - 1, "b c (h i) (w j) -> b (h w) (c i j)", i=16, j=16)

    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        pictures = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=height // 16, w=width // 16, i=16, j=16)
        return (pictures / 2 + 0.5).clamp(0, 1)


def scratch_klein(config: Config, part: str) -> nn.Module:
    """A small random Klein of the real classes, always the same for the same config: for demos and tests."""
    import diffusers
    m, head, latents = config.model, config.model.width // config.model.heads, 4
    rotated = head // 8 * 2                                  # numbers of a head for each of the four position axes, even
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if part == "transformer":
            return wake(diffusers.Flux2Transformer2DModel(
                in_channels=768 if config.klein.vae == "patches" else 4 * latents, num_layers=config.klein.double_layers,
                num_single_layers=m.layers - config.klein.double_layers, attention_head_dim=head, num_attention_heads=m.heads,
                joint_attention_dim=3 * 32, axes_dims_rope=(head - 3 * rotated, rotated, rotated, rotated), guidance_embeds=False))
        if part == "text_encoder":
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
                vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
                head_dim=16, tie_word_embeddings=True, max_position_embeddings=2048))
        vae = diffusers.AutoencoderKLFlux2(block_out_channels=(4, 8, 8, 8), latent_channels=latents, norm_num_groups=4, layers_per_block=1)
        vae.bn.running_mean.normal_()                        # not 0 and 1, which would hide a forgotten normalisation
        vae.bn.running_var.uniform_(0.5, 2)
        return vae


@torch.no_grad()
def wake(transformer: nn.Module) -> nn.Module:
    """Gates of deviation 1, where diffusers' start at 0.03: what a block does shows in what comes out, and a test on it can fail."""
    time = transformer.time_guidance_embed
    time.timestep_embedder.linear_2.weight /= time(torch.linspace(0, 1000, 64), None).std()
    both = transformer.double_stream_modulation_img, transformer.double_stream_modulation_txt
    for modulation in (*both, transformer.single_stream_modulation):
        vectors = modulation.linear.weight.unflatten(0, (-1, 3, transformer.inner_dim))        # shift, scale, gate of each branch
        vectors.zero_()
        vectors[:, 2].normal_(std=1 / (0.6 * transformer.inner_dim ** 0.5))                    # 0.6: what SiLU leaves of deviation 1
    transformer.norm_out.linear.weight.zero_()
    transformer.context_embedder.weight *= 20                  # a random Qwen3's features have deviation 0.05
    return transformer


# Where the files are

def find_file(name: str, filename: str) -> Path:
    """`filename` in the folder `name`, or else in the hub repository of that name (from the local cache when the hub is away)."""
    if Path(name).is_dir():
        path = Path(name, filename)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(name, filename, local_files_only=hub_is_away()))
    except Exception as e:                                   # the hub's client changed its HTTP library, and its errors, before
        raise UserError(f"{name}: neither a folder nor to be had from the hub ({brief(e)}); give a folder with {filename}") from e


@functools.cache
def hub_is_away() -> bool:
    """Whether only cached files can be had: asked once, without the 25 s of retries that a download would make; heeds HF_HUB_OFFLINE."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        return True
    return False


def brief(error: Exception) -> str:
    """The kind and the first sentence of a library's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:200]}".removesuffix(": ")
