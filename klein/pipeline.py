"""The parts of a FLUX.2 Klein pipeline, each loaded alone, since training never needs all at once.

A part is published, loaded from klein.base, or small, random and always the same: klein.base scratch.
"""

import warnings
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from einops import rearrange

from config import Config, UserError
from pretrained import frozen
from pretrained.frozen import Frozen

# the text encoder's hidden states that the transformer reads; later layers are not run
OUTPUT_LAYERS = (9, 18, 27)
KLEIN_HINT = "give --klein.base the folder of a Flux2KleinPipeline"
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""  # what Qwen3's own template comes down to for one message


def load_klein(config: Config, part: str) -> nn.Module:
    """One network of the pipeline config.klein.base, on the CPU.

    part: transformer (frozen bf16 or fp32 as train.dtype says, fp32 where it is tuned in full) | text_encoder
    (a KleinTextEncoder, as train.dtype says) | vae (a KleinVAE or PixelPatches, fp32: latents are made once).
    """
    if part == "vae" and config.klein.vae == "patches":
        return PixelPatches()
    if config.klein.base == "scratch":
        network = scratch_klein(config, part)
    else:
        network = load_published_klein(config, part)
    if part == "text_encoder":
        return KleinTextEncoder(network)
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
        offline = frozen.local_files_only(k.base)
        with warnings.catch_warnings(action="ignore"):  # diffusers' own, about the hub's client
            network, report = kinds[part].from_pretrained(
                k.base, subfolder=part, dtype=dtype, local_files_only=offline, output_loading_info=True
            )
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"{what} cannot be loaded ({frozen.one_line(e)}); {KLEIN_HINT}") from e
    missing = frozen.first_missing(report)
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
        offline = frozen.local_files_only(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            base, subfolder="tokenizer", local_files_only=offline
        )
        tokenize_prompts(tokenizer, [""], 512)  # needs a template for chats, and padding
        if (
            tokenizer.decode(tokenizer("speech").input_ids) != "speech"
        ):  # without files, AutoTokenizer makes up an empty vocabulary
            raise ValueError("it has no vocabulary")
    except Exception as e:
        raise UserError(
            f"klein.base {base}: its tokenizer cannot be loaded ({frozen.one_line(e)}); {KLEIN_HINT}"
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
    tokenizer.chat_template = CHAT_TEMPLATE
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
        offline = frozen.local_files_only(k.base)
        pipeline = diffusers.Flux2KleinPipeline.from_pretrained(
            k.base, transformer=transformer, local_files_only=offline
        )
    pipeline.save_pretrained(folder)


def tokenize_prompts(tokenizer, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, length) and mask, the prompts in Qwen3's chat form, padded on the right as Klein was trained.

    raises UserError for a prompt that does not fit.
    """
    chats = []
    for prompt in prompts:
        message = {"role": "user", "content": prompt}
        chat = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, enable_thinking=False
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
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
        lengths.append(len(ids))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]  # (B, length)
    return torch.tensor(rows), mask


class KleinTextEncoder(nn.Module):
    """Qwen3 up to the last layer that Klein reads, 27 of 36: the same features, 32 % fewer operations."""

    def __init__(self, qwen: nn.Module):
        super().__init__()
        self.model = qwen.model
        self.model.layers = self.model.layers[: OUTPUT_LAYERS[-1]]
        self.model.norm = nn.Identity()  # or the last hidden state would be normalised
        self.model.config.num_hidden_layers = OUTPUT_LAYERS[-1]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask (B, S) -> (B, S, 3 D)."""
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat([output.hidden_states[layer] for layer in OUTPUT_LAYERS], -1)


class KleinVAE(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] <-> normalised latents, as tokens (B, H / 16 * W / 16, 4 C)."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = (2 * pictures - 1).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()  # (B, C, H / 8, W / 8)
        tokens = rearrange(latents, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)
        return (tokens - self.mean) / self.std

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        tokens = tokens.float() * self.std + self.mean
        rows = height // 16
        latents = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=rows, w=width // 16, i=2, j=2)
        pixels = self.vae.decode(latents.to(self.vae.dtype)).sample.float()  # (B, 3, H, W)
        return (pixels / 2 + 0.5).clamp(0, 1)

    @property
    def mean(self) -> torch.Tensor:
        """(4 C,), of the latents, which the VAE keeps in a batch norm."""
        return self.vae.bn.running_mean.float()

    @property
    def std(self) -> torch.Tensor:
        return (self.vae.bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()


class PixelPatches(nn.Module):
    """Instead of KleinVAE: 16 x 16 pixels in [-1, 1] are a token of 768 numbers; nothing is lost."""

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return rearrange(2 * pictures - 1, "b c (h i) (w j) -> b (h w) (c i j)", i=16, j=16)

    def decode(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        rows = height // 16
        pixels = rearrange(tokens, "b (h w) (c i j) -> b c (h i) (w j)", h=rows, w=width // 16, i=16, j=16)
        return (pixels / 2 + 0.5).clamp(0, 1)


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
            return widen_gates(network)
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
def widen_gates(transformer: nn.Module) -> nn.Module:
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
