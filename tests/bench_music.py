"""Our FluxMusic against diffusers' Flux of the same size and weights: seconds of a forward pass and of a training step, in turns.

python tests/bench_music.py [--size small --batch 1 --tokens 1024 --text_tokens 256 --repeats 5 --threads 1 --dtype fp32]
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
from diffusers import FluxTransformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import music

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
    flux = FluxTransformer2DModel(patch_size=1, in_channels=music.CHANNELS, num_layers=size.double, num_single_layers=size.single,
                                  attention_head_dim=size.width // music.HEADS, num_attention_heads=music.HEADS,
                                  joint_attention_dim=music.TEXT_WIDTH, pooled_projection_dim=music.VECTOR_WIDTH, guidance_embeds=False,
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


def call_theirs(flux: FluxTransformer2DModel, x_t, t, text, vector) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(x_t.shape[1] // music.BANDS), torch.arange(music.BANDS))
    return flux(hidden_states=x_t, timestep=t, encoder_hidden_states=text, pooled_projections=vector, img_ids=ids.float().to(x_t.device),
                txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device), return_dict=False)[0]


def example(batch: int, tokens: int, text_tokens: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """x_t, t, text, vector."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, music.CHANNELS, generator=g), torch.rand(batch, generator=g),
            torch.randn(batch, text_tokens, music.TEXT_WIDTH, generator=g) / 5, torch.randn(batch, music.VECTOR_WIDTH, generator=g))


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
    parser.add_argument("--size", choices=music.SIZES, default="small")
    for name, default in (("batch", 1), ("tokens", 1024), ("text_tokens", 256), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, size = "cuda" if torch.cuda.is_available() else "cpu", music.SIZES[options.size]
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

    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    difference = (forward("ours") - forward("diffusers")).abs().max().item()
    result = {"device": machine, **vars(options), "largest difference": difference, "deviation of the output": forward("ours").std().item(),
              "forward": in_turns(forward, options.repeats, device), "forward and backward": in_turns(step, options.repeats, device)}
    print(json.dumps(result, indent=1))


def in_turns(run, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of both, and the median of the ratios of neighbours, after one round that does not count; who is first alternates.

    On a CPU these are seconds of all threads, to which what else the machine does adds little.
    """
    times, clock = {"ours": [], "diffusers": []}, time.perf_counter if device == "cuda" else time.process_time
    for n in range(repeats + 1):
        for name in list(times)[::1 if n % 2 else -1]:
            start = clock()
            run(name)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    ratios = [ours / other for ours, other in zip(times["ours"][1:], times["diffusers"][1:])]
    return {**{name: statistics.median(found[1:]) for name, found in times.items()}, "ours / diffusers": statistics.median(ratios)}


if __name__ == "__main__":
    main()
