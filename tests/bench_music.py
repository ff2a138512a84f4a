"""Our FluxMusic against diffusers' Flux of the same size and weights: seconds of a forward pass and of a training step, in turns;
and our way of sampling against FluxMusic's own: seconds of a piece, and whether what is made still matches its caption.

python tests/bench_music.py [network --size small --batch 1 --tokens 1024 --text_tokens 256 --repeats 5 --threads 1 --dtype fp32]
python tests/bench_music.py sampling [--size small --caption_tokens 40 --steps 25 --ckpt out/music_demo --prompts 64]
"""

import argparse
import json
import re
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config as configs
import music
import system
from model import Prompt

NAMES = {"img_in": "x_embedder", "txt_in": "context_embedder", "time_in": "time_text_embed.timestep_embedder",
         "vector_in": "time_text_embed.text_embedder", "in_layer": "linear_1", "out_layer": "linear_2",
         "double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks",
         "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
         "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
         "img_attn.norm.key_norm.scale": "attn.norm_k.weight", "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
         "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
         "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2", "linear2": "proj_out", "modulation.lin": "norm.linear",
         "norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight", "final_layer.linear": "proj_out",
         "final_layer.adaLN_modulation.1": "norm_out.linear", "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
         "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
         "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
LONGEST_FIRST = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(NAMES, key=len, reverse=True)))


def theirs(size: music.Size, network: music.MMDiT) -> FluxTransformer2DModel:
    """diffusers' transformer with the weights of ours."""
    flux = FluxTransformer2DModel(patch_size=1, in_channels=size.channels, num_layers=size.double, num_single_layers=size.single,
                                  attention_head_dim=size.width // size.heads, num_attention_heads=size.heads,
                                  joint_attention_dim=size.text_width, pooled_projection_dim=size.vector_width, guidance_embeds=False,
                                  axes_dims_rope=size.axes)
    flux.load_state_dict(renamed(network.state_dict(), size.width))
    return flux


def renamed(state: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """FluxMusic's tensors under diffusers' names, which has q, k, v apart, and scale before shift at the end."""
    found = {}
    for key, value in state.items():
        if "adaLN" in key:
            value = torch.cat(value.chunk(2)[::-1])
        names = [NAMES[name] for name in LONGEST_FIRST.findall(key)]
        split = next((name for name in names if isinstance(name, tuple)), None)
        if split is None:
            found[LONGEST_FIRST.sub(lambda match: NAMES[match[0]], key)] = value
            continue
        sizes = [width] * 3 + [len(value) - 3 * width] * (len(split) - 3)
        for own, part in zip(split, value.split(sizes)):
            found[LONGEST_FIRST.sub(lambda match: own if isinstance(NAMES[match[0]], tuple) else NAMES[match[0]], key)] = part
    return found


def call_theirs(flux: FluxTransformer2DModel, x_t, t, text, vector, bands: int = 8) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(x_t.shape[1] // bands), torch.arange(bands))
    return flux(hidden_states=x_t, timestep=t, encoder_hidden_states=text, pooled_projections=vector, img_ids=ids.float().to(x_t.device),
                txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device), return_dict=False)[0]


def example(batch: int, tokens: int, text_tokens: int, size: music.Size = music.SIZES["small"], seed: int = 1) -> tuple[torch.Tensor, ...]:
    """x_t, t, text, vector."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, size.channels, generator=g), torch.rand(batch, generator=g),
            torch.randn(batch, text_tokens, size.text_width, generator=g) / 5, torch.randn(batch, size.vector_width, generator=g))


@torch.no_grad()
def shake(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Numbers for what starts at 0, or no block would be heard, and for what starts at 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if name.endswith("scale"):
            p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
        elif not p.any():
            p.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.1))
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("network", "sampling"), default="network")
    parser.add_argument("--size", choices=music.SIZES, default="small")
    for name, default in (("batch", 1), ("tokens", 1024), ("text_tokens", 256), ("repeats", 5), ("threads", 1), ("caption_tokens", 40),
                          ("steps", 0), ("prompts", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ckpt", default="", help="sampling: a run, whose samples of each procedure are judged by their captions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    bench = {"network": bench_network, "sampling": bench_sampling}[options.what]
    print(json.dumps({"device": machine, **vars(options), **bench(options, device)}, indent=1))


def bench_network(options: argparse.Namespace, device: str) -> dict:
    """Forward, and forward and backward, beside diffusers."""
    size = music.SIZES[options.size]
    network = shake(music.MMDiT(size)).to(device)
    flux = theirs(size, network).to(device)
    inputs = [part.to(device) for part in example(options.batch, options.tokens, options.text_tokens)]
    calls = {"ours": (network, lambda: network(*inputs)), "diffusers": (flux, lambda: call_theirs(flux, *inputs))}
    autocast = torch.autocast(device, torch.bfloat16) if options.dtype == "bf16" else nullcontext()

    def forward(name: str) -> torch.Tensor:
        with torch.no_grad(), autocast:
            return calls[name][1]().float()

    def step(name: str) -> None:
        calls[name][0].zero_grad()
        with autocast:
            loss = calls[name][1]().float().square().mean()
        loss.backward()

    difference = (forward("ours") - forward("diffusers")).abs().max().item()
    return {"largest difference": difference, "deviation of the output": forward("ours").std().item(),
            "forward": in_turns(forward, options.repeats, device), "forward and backward": in_turns(step, options.repeats, device)}


# Sampling: FluxMusic's procedure is 50 Euler steps of two forward passes one after the other, each caption padded to 256 tokens

REFERENCE_STEPS, REFERENCE_TOKENS = 50, 256


def bench_sampling(options: argparse.Namespace, device: str) -> dict:
    """A step of both procedures in turns at a published size; and with --ckpt both in full, how long they take and what they make."""
    ours = system.load_config(str(ROOT / "configs" / f"music_{options.size}.yaml")).sample
    steps, size = options.steps or ours.euler_steps, music.SIZES[options.size]
    network = music.MMDiT(size).to(device)
    x_t, t, text, vector = (part.to(device) for part in example(2 * options.batch, options.tokens, REFERENCE_TOKENS, size))
    short = text[:, :options.caption_tokens]
    autocast = torch.autocast(device, torch.bfloat16) if options.dtype == "bf16" else nullcontext()
    mask = torch.ones(short.shape[:2], dtype=torch.bool, device=device)

    @torch.no_grad()
    def step(name: str) -> None:
        with autocast:
            if name == "ours":
                network(x_t, t, short, vector, mask)
            else:
                for half in (slice(options.batch), slice(options.batch, None)):
                    network(x_t[half], t[half], text[half], vector[half])

    found = in_turns(step, options.repeats, device, ("ours", "reference"))
    found |= {"ours, steps": steps, "reference, steps": REFERENCE_STEPS,
              "times faster": REFERENCE_STEPS * found["reference"] / (steps * found["ours"])}
    return {f"{options.size}, a step": found} | ({"checkpoint": compare(options, device)} if options.ckpt else {})


def compare(options: argparse.Namespace, device: str) -> dict:
    """Seconds and matches of the same captions and seeds by both procedures, with the checkpoint's guidance."""
    words = [f"--euler_steps={options.steps}"] if options.steps else []
    config, network, _ = system.load(options.ckpt, torch.device(device), {}, words=words)
    corpus = system.open_corpus(config)
    clips, found = corpus.clips("test")[:options.prompts], {}
    prompts = [Prompt(clip.text, seed=n) for n, clip in enumerate(clips)]
    for name, sample in (("ours", lambda some: network.sample_tokens(some, network.codec.frames, config.sample)),
                         ("reference", lambda some: sample_as_reference(network, some))):
        start, tokens = time.perf_counter(), []
        for first in range(0, len(prompts), config.eval.sample_batch):
            with torch.inference_mode():
                tokens += sample(prompts[first:first + config.eval.sample_batch])
        seconds = time.perf_counter() - start
        scores = [network.score(network.artifact(clip.text, x, network.codec.frames), corpus, clip) for clip, x in zip(clips, tokens)]
        found[name] = {"seconds": seconds, **{key: statistics.mean(score[key] for score in scores) for key in scores[0]}}
    return found | {"times faster": found["reference"]["seconds"] / found["ours"]["seconds"]}


def sample_as_reference(network: music.Music, prompts: list[Prompt]) -> torch.Tensor:
    """Tokens (B, N, C) by FluxMusic's procedure; the padding is masked where the network was trained so, which costs the same."""
    c, device, count = network.config, network.mean.device, len(prompts)
    batch = music.collate_texts([prompt.text for prompt in prompts] + [""] * count, [""] * 2 * count, c, network.tokenizer, {})
    batch = {name: F.pad(value, (0, REFERENCE_TOKENS - value.shape[1])).to(device) for name, value in batch.items()}
    shape = network.codec.tokens, network.transformer.size.channels
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed)) for prompt in prompts]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=c.train.dtype == "bf16"):
        condition = network.condition(batch)
        for n in range(REFERENCE_STEPS):
            t = torch.full((count,), 1 - n / REFERENCE_STEPS, device=device)
            v, v_without = (network.velocity(x, t, *(part[half] for part in condition)) for half in (slice(count), slice(count, None)))
            x = x - (v_without + c.sample.cfg_scale * (v - v_without)) / REFERENCE_STEPS
    return x


def in_turns(run, repeats: int, device: str, names: tuple[str, str] = ("ours", "diffusers")) -> dict[str, float]:
    """Median seconds of both, and the median of the ratios of neighbours, after one round that does not count; who is first alternates.

    On a CPU these are seconds of all threads, to which what else the machine does adds little.
    """
    times, clock = {name: [] for name in names}, time.perf_counter if device == "cuda" else time.process_time
    for n in range(repeats + 1):
        for name in list(times)[::1 if n % 2 else -1]:
            start = clock()
            run(name)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    ratios = [ours / other for ours, other in zip(*(found[1:] for found in times.values()))]
    return {**{name: statistics.median(found[1:]) for name, found in times.items()}, " / ".join(names): statistics.median(ratios)}


if __name__ == "__main__":
    main()
