"""FluxMusic measured: our network beside diffusers', our way of sampling beside FluxMusic's own.

python -m music.bench [network --size small --batch 1 --tokens 1024 --text_tokens 256 --repeats 5]
    [--threads 1 --dtype fp32]: seconds of a forward pass and of a training step, in turns with those of
    diffusers' Flux of the same size and weights.
python -m music.bench sampling [--size small --caption_tokens 40 --steps 25 --ckpt out/music_demo]
    [--prompts 64]: seconds of a piece, and whether samples still match their captions.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import system
from base import Prompt
from corpora.shards import Clip
from music.config import SIZES, MusicSample, Size
from music.data import MusicCorpus, collate_captions
from music.model import MMDiT
from music.system import Music


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("what", nargs="?", choices=("network", "sampling"), default="network")
    add("--size", choices=SIZES, default="small")
    numbers = {"batch": 1, "tokens": 1024, "text_tokens": 256, "caption_tokens": 40, "steps": 0}
    numbers |= {"prompts": 64, "repeats": 5, "threads": 1}
    for name, number in numbers.items():
        add(f"--{name}", type=int, default=number)
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    what = "sampling: a run, whose samples by each procedure are scored by their captions"
    add("--ckpt", default="", help=what)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {options.threads} threads"
    bench = bench_network if options.what == "network" else bench_sampling
    figures = {"device": machine, **vars(options), **bench(options, device)}
    print(json.dumps(figures, indent=1))


def bench_network(options: argparse.Namespace, device: str) -> dict:
    """Forward, and forward and backward, beside diffusers."""
    size = SIZES[options.size]
    network = randomize(MMDiT(size)).to(device)
    flux = diffusers_flux(size, network).to(device)
    inputs = example_inputs(options.batch, options.tokens, options.text_tokens)
    inputs = [part.to(device) for part in inputs]
    modules = {"ours": network, "diffusers": flux}

    def call(name: str) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bf16"):
            v = network(*inputs) if name == "ours" else call_diffusers(flux, *inputs)
            return v.float()

    @torch.no_grad()
    def forward(name: str) -> Tensor:
        return call(name)

    def step(name: str) -> None:
        modules[name].zero_grad()
        loss = call(name).square().mean()
        loss.backward()

    ours = forward("ours")
    difference = ours - forward("diffusers")
    return {
        "largest difference": difference.abs().max().item(),
        "deviation of the output": ours.std().item(),
        "forward": time_in_turns(forward, options.repeats, device),
        "forward and backward": time_in_turns(step, options.repeats, device),
    }


# Sampling: FluxMusic takes 50 Euler steps of two forward passes each, captions padded to 256 tokens

REFERENCE_STEPS = 50
REFERENCE_TOKENS = 256


def bench_sampling(options: argparse.Namespace, device: str) -> dict:
    """A step of both procedures in turns at a published size; with --ckpt both in full, with scores."""
    steps = options.steps or MusicSample().euler_steps
    size = SIZES[options.size]
    network = MMDiT(size).to(device)
    inputs = example_inputs(2 * options.batch, options.tokens, REFERENCE_TOKENS, size)
    inputs = [part.to(device) for part in inputs]
    x_t, t, text, vector = inputs
    short = text[:, : options.caption_tokens]
    mask = torch.ones(short.shape[:2], dtype=torch.bool, device=device)
    conditional = [part[: options.batch] for part in inputs]
    unconditional = [part[options.batch :] for part in inputs]

    @torch.no_grad()
    def step(name: str) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bf16"):
            if name == "ours":
                network(x_t, t, short, vector, mask)
            else:
                network(*conditional)
                network(*unconditional)

    times = time_in_turns(step, options.repeats, device, ("ours", "reference"))
    times["ours, steps"] = steps
    times["reference, steps"] = REFERENCE_STEPS
    times["times faster"] = REFERENCE_STEPS * times["reference"] / (steps * times["ours"])
    result = {f"{options.size}, a step": times}
    if options.ckpt:
        result["checkpoint"] = compare(options, device)
    return result


def compare(options: argparse.Namespace, device: str) -> dict:
    """Seconds and scores of the same captions and seeds by both procedures, at the same guidance."""
    words = [f"--euler_steps={options.steps}"] if options.steps else []
    config, network, _ = system.load(options.ckpt, torch.device(device), words)
    corpus = system.open_corpus(config)
    clips = corpus.clips("test")[: options.prompts]

    def ours(prompts: list[Prompt]) -> Tensor:
        return network.sample_tokens(prompts, network.codec.crop_frames, config.sample)

    def reference(prompts: list[Prompt]) -> Tensor:
        return sample_as_reference(network, prompts)

    scores = {}
    for name, sample in (("ours", ours), ("reference", reference)):
        scores[name] = score_samples(network, corpus, clips, sample)
    ratio = scores["reference"]["seconds"] / scores["ours"]["seconds"]
    return scores | {"times faster": ratio}


def score_samples(
    network: Music, corpus: MusicCorpus, clips: Sequence[Clip], sample: Callable
) -> dict[str, float]:
    """Seconds that the samples of the clips' captions take, and their mean scores."""
    size = network.config.eval.sample_batch
    prompts = [Prompt(clip.text, seed=n) for n, clip in enumerate(clips)]
    tokens = []
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        with torch.inference_mode():
            tokens += sample(batch)
    seconds = time.perf_counter() - start

    scores = []
    for clip, x in zip(clips, tokens):
        output = network.make_output(clip.text, x, network.codec.crop_frames)
        scores.append(network.score(output, corpus, clip))
    figures = {"seconds": seconds}
    for key in scores[0]:
        figures[key] = statistics.mean(score[key] for score in scores)
    return figures


def sample_as_reference(network: Music, prompts: list[Prompt]) -> Tensor:
    """Tokens (B, N, C) by FluxMusic's procedure.

    The padding is masked where the network was trained so, which costs the same.
    """
    device = network.mean.device
    count = len(prompts)
    cfg_scale = network.config.sample.cfg_scale
    texts = [prompt.text for prompt in prompts]
    texts += [""] * count
    empty = [""] * 2 * count
    batch = collate_captions(texts, empty, network.config, network.tokenizer, {})
    for name, value in batch.items():
        padding = REFERENCE_TOKENS - value.shape[1]
        batch[name] = F.pad(value, (0, padding)).to(device)
    x = network.draw_noise(prompts, network.codec.crop_tokens)
    with network.autocast():
        condition = network.condition(batch)
        conditional = [part[:count] for part in condition]
        unconditional = [part[count:] for part in condition]
        for n in range(REFERENCE_STEPS):
            t = torch.full((count,), 1 - n / REFERENCE_STEPS, device=device)
            v = network.velocity(x, t, *conditional)
            v_without = network.velocity(x, t, *unconditional)
            guided = v_without + cfg_scale * (v - v_without)
            x = x - guided / REFERENCE_STEPS
    return x


def time_in_turns(
    run: Callable[[str], object],
    repeats: int,
    device: str,
    names: tuple[str, str] = ("ours", "diffusers"),
) -> dict[str, float]:
    """Median seconds of both, and the median ratio of neighbours, after one round that does not count.

    Who is first alternates. On a CPU these are seconds of all threads: other load on the machine adds little.
    """
    on_cuda = device == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    times = {name: [] for name in names}
    for n in range(repeats + 1):
        order = names if n % 2 else reversed(names)
        for name in order:
            start = clock()
            run(name)
            if on_cuda:
                torch.cuda.synchronize()
            times[name].append(clock() - start)

    first, second = names
    ratios = [a / b for a, b in zip(times[first][1:], times[second][1:])]
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return {**medians, f"{first} / {second}": statistics.median(ratios)}


# diffusers' Flux, with our weights

# Our parts of parameter names, which are FluxMusic's, and diffusers'
NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "in_layer": "linear_1",
    "out_layer": "linear_2",
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# What is one matrix in ours and several in diffusers'
SPLIT_NAMES = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
WORDS = [rf"\b{re.escape(name)}\b" for name in sorted(NAMES, key=len, reverse=True)]
LONGEST_FIRST = re.compile("|".join(WORDS))


def diffusers_flux(size: Size, network: MMDiT) -> FluxTransformer2DModel:
    """diffusers' transformer with the weights of ours."""
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=size.channels,
        num_layers=size.depth,
        num_single_layers=size.depth_single_blocks,
        attention_head_dim=size.width // size.heads,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        pooled_projection_dim=size.vector_width,
        guidance_embeds=False,
        axes_dims_rope=size.axes_dim,
    )
    flux.load_state_dict(diffusers_names(network.state_dict(), size.width))
    return flux


def diffusers_names(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """FluxMusic's tensors as diffusers names them, with q, k, v apart, and scale before shift at the end."""
    renamed = {}
    for key, value in state.items():
        if "adaLN" in key:
            shift, scale = value.chunk(2)
            value = torch.cat([scale, shift])
        for part_key, part in split_matrix(key, value, width):
            new_key = LONGEST_FIRST.sub(lambda match: NAMES[match[0]], part_key)
            renamed[new_key] = part
    return renamed


def split_matrix(key: str, value: Tensor, width: int) -> list[tuple[str, Tensor]]:
    """A weight or bias, or the several that diffusers has instead, with their keys."""
    for name, parts in SPLIT_NAMES.items():
        if f".{name}." in key:
            keys = [key.replace(name, part) for part in parts]
            values = value.tensor_split([width, 2 * width, 3 * width])  # the last is the MLP's, or empty
            return list(zip(keys, values))
    return [(key, value)]


def call_diffusers(flux: FluxTransformer2DModel, x_t, t, text, vector, bands: int = 8) -> Tensor:
    device = x_t.device
    none = torch.arange(1)
    times = torch.arange(x_t.shape[1] // bands)
    positions = torch.cartesian_prod(none, times, torch.arange(bands))
    output = flux(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=text,
        pooled_projections=vector,
        img_ids=positions.float().to(device),
        txt_ids=torch.zeros(text.shape[1], 3, device=device),
        return_dict=False,
    )
    return output[0]


# Inputs and weights to compare with


def example_inputs(
    batch: int, tokens: int, text_tokens: int, size: Size = SIZES["small"], seed: int = 1
) -> tuple[Tensor, ...]:
    """x_t, t, text, vector."""
    rng = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, tokens, size.channels, generator=rng)
    t = torch.rand(batch, generator=rng)
    text = torch.randn(batch, text_tokens, size.text_width, generator=rng) / 5
    vector = torch.randn(batch, size.vector_width, generator=rng)
    return x_t, t, text, vector


@torch.no_grad()
def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers for parameters that start at 0, without which no block would count, and at 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        is_scale = name.endswith("scale")
        if not is_scale and p.any():
            continue
        noise = torch.randn(p.shape, generator=generator)
        if is_scale:
            p.copy_(1 + 0.2 * noise)
        elif p.dim() == 2:
            p.copy_(noise * p.shape[-1] ** -0.5)
        else:
            p.copy_(noise * 0.1)
    return network


if __name__ == "__main__":
    main()
