"""What training FLUX.2 Klein costs, counted without its weights; and our LoRA's step against peft's, measured.

python tests/bench_klein.py plan [--json]     operations and memory at the published sizes: nothing is allocated, no GPU is needed
python tests/bench_klein.py lora [--width 512 --layers 6 --batch 2 --rank 64 --repeats 15 --dtype fp32]     both in one process, in turns
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrained
import spectrogram

CANVASES = ((768, 768), (512, 320))      # height, width
TEXT_TOKENS = (512, 128)
BATCH, RANK, TEXT_RANK = 4, 256, 32


def plan(options: argparse.Namespace) -> None:
    """Operations of a sample and of a training step, and what the step keeps in memory, for every canvas and length of text."""
    found = {"parameters": count_parameters(), "text encoder": {f"{s} text tokens": text_cost(s) for s in TEXT_TOKENS},
             "vae": {f"{h} x {w}": vae_cost(h, w) for h, w in CANVASES}}
    with flash_attention():
        found["transformer"] = {f"{h} x {w}, {s} text tokens": transformer_cost(h // 16 * (w // 16), s)
                                for h, w in CANVASES for s in TEXT_TOKENS}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for part, rows in found.items():
        print(f"\n{part}")
        for name, row in rows.items():
            print(f"  {name:<36}" + (f"{row:>16,}" if part == "parameters" else ""))
            if part != "parameters":
                for key, value in row.items():
                    print(f"    {key:<60}{value:>10.2f}")


def count_parameters() -> dict[str, int]:
    network, encoder, vae = transformer(), text_encoder(), autoencoder()
    sizes = {"transformer": network, "text encoder, layers that are read": encoder, "VAE": vae}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in sizes.items()}
    for name, root, layers, rank in (("LoRA", network, spectrogram.attention_layers(network), RANK),
                                     ("text LoRA", encoder, spectrogram.attention_layers(encoder), TEXT_RANK)):
        spectrogram.add_lora(root, dict.fromkeys(layers, rank), rank)
        counts[f"{name}, rank {rank}"] = sum(lora.A.numel() + lora.B.numel() for lora in spectrogram.loras(root).values())
    return counts


def text_cost(tokens: int) -> dict[str, float]:
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):     # tensors without data into whose mask transformers does not look; countable
        encoder, ids = text_encoder("cpu").requires_grad_(False), torch.zeros(1, tokens, dtype=torch.long)
        cost = {"TFLOP, forward, a sample": tera(lambda: encoder(ids, None))}
        spectrogram.add_lora(encoder, dict.fromkeys(spectrogram.attention_layers(encoder), TEXT_RANK), TEXT_RANK)
        cost[f"TFLOP, a training step of {BATCH}, with its own LoRA"] = BATCH * tera(lambda: encoder(ids, None).sum().backward())
        return cost


def vae_cost(height: int, width: int) -> dict[str, float]:
    with torch.no_grad():
        vae, picture = autoencoder(), torch.empty(1, 3, height, width, device="meta")
        return {"TFLOP, encode, a picture": tera(lambda: vae.encode(picture)),
                "TFLOP, decode, a picture": tera(lambda: vae.decode(torch.empty(1, 32, height // 8, width // 8, device="meta")))}


def transformer_cost(tokens: int, text_tokens: int) -> dict[str, float]:
    network = transformer().requires_grad_(False)
    frozen = tera(lambda: call(network, 1, tokens, text_tokens, "meta"))
    cost = {"TFLOP, forward, a sample": frozen}
    wrap(network)
    cost[f"TFLOP, forward, of which LoRA of rank {RANK} adds"] = tera(lambda: call(network, 1, tokens, text_tokens, "meta")) - frozen
    memory = {"weights, bf16": 2 * sum(p.numel() for p in transformer().parameters()) / 1e9,
              "LoRA, fp32: weight, gradient, two moments": 16 * sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e9}
    for checkpointing in (False, True):
        with_it = "with" if checkpointing else "without"
        if checkpointing:
            network.enable_gradient_checkpointing()
        step = tera(lambda: call(network, 1, tokens, text_tokens, "meta").float().square().mean().backward())
        cost[f"TFLOP, a training step of {BATCH}, {with_it} checkpointing"] = BATCH * step
    kept, block = activations(tokens, text_tokens, False)
    memory["activations kept, without checkpointing"] = kept
    memory["activations kept, with checkpointing"] = activations(tokens, text_tokens, True)[0]
    memory["activations of the block being recomputed"] = block
    base = memory["weights, bf16"] + memory["LoRA, fp32: weight, gradient, two moments"]
    memory["sum, without checkpointing"] = base + kept
    memory["sum, with checkpointing"] = base + memory["activations kept, with checkpointing"] + block
    return cost | {f"GB, batch {BATCH}: {name}": value for name, value in memory.items()}


def activations(tokens: int, text_tokens: int, checkpointing: bool) -> tuple[float, float]:
    """GB that a forward pass on a GPU under bf16 autocast keeps for the backward pass, and of these the most that one block keeps.

    Tensors without data, as if they were on a GPU; counted by storage, as many views share one; parameters do not count. Gradients in
    flight, the allocator's reserve and the CUDA context come on top.
    """
    with FakeTensorMode(), gpu_autocast():
        network = wrap(transformer("cuda", torch.bfloat16).requires_grad_(False))
        if checkpointing:
            network.enable_gradient_checkpointing()
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}
        kept, marks = {}, []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage               # held, so that no other can come to lie at its address
            return tensor

        for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
            for register in (block.register_forward_pre_hook, block.register_forward_hook):
                register(lambda *_: marks.append(size(kept)))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(network, BATCH, tokens, text_tokens, "cuda")
            output.float().square().mean()
        return size(kept), max(stop - start for start, stop in zip(marks[::2], marks[1::2]))


def size(storages: dict) -> float:
    return sum(storage.nbytes() for storage in storages.values()) / 1e9


@contextmanager
def gpu_autocast():
    """torch.autocast("cuda", bfloat16), which torch itself turns off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def tera(run) -> float:
    """Operations of `run` in 10^12, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def call(network, batch: int, tokens: int, text_tokens: int, device: str) -> torch.Tensor:
    """The network, once, on pictures of `tokens` tokens."""
    x, text, t, ids, text_ids = (torch.empty(*shape, device=device) for shape in (
        (batch, tokens, 128), (batch, text_tokens, 7680), (batch,), (tokens, 4), (text_tokens, 4)))
    return network(hidden_states=x, timestep=t, encoder_hidden_states=text, img_ids=ids, txt_ids=text_ids, return_dict=False)[0]


@contextmanager
def flash_attention():
    """Attention by the kernel that a GPU takes, also for tensors without data: no matrix of all pairs is kept."""
    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        half = [part.to(torch.bfloat16) for part in (query, key, value)]
        return torch.ops.aten._scaled_dot_product_flash_attention(*half, dropout_p, is_causal, scale=scale)[0].to(query.dtype)

    torchs, F.scaled_dot_product_attention = F.scaled_dot_product_attention, flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torchs


def transformer(device: str = "meta", dtype: torch.dtype = torch.float32) -> Flux2Transformer2DModel:
    """Of FLUX.2 Klein 4B, the published size."""
    with torch.device(device), default_dtype(dtype):
        return Flux2Transformer2DModel(num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
                                       joint_attention_dim=7680, in_channels=128, guidance_embeds=False)


def text_encoder(device: str = "meta") -> pretrained.KleinText:
    """Qwen3 4B up to the last layer that is read."""
    with torch.device(device):
        return pretrained.KleinText(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=9728,
            vocab_size=151936, tie_word_embeddings=True)))


def autoencoder() -> AutoencoderKLFlux2:
    with torch.device("meta"):
        return AutoencoderKLFlux2()


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def wrap(network: torch.nn.Module, rank: int = RANK) -> torch.nn.Module:
    spectrogram.add_lora(network, dict.fromkeys(spectrogram.attention_layers(network), rank), rank)
    return network


# Our LoRA against peft's

def lora(options: argparse.Namespace) -> None:
    """Seconds and peak memory of a step, forward, backward and AdamW, of both, in turns."""
    import peft
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    with default_dtype(dtype):
        ours, theirs = small(options).to(device), small(options).to(device)
    theirs.load_state_dict(ours.state_dict())
    paths = spectrogram.attention_layers(ours)
    theirs.add_adapter(peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=paths))
    spectrogram.add_lora(ours, dict.fromkeys(paths, options.rank), 2 * options.rank)
    ours.requires_grad_(False)
    for module in spectrogram.loras(ours).values():
        module.A.requires_grad_(), module.B.requires_grad_()
    with torch.no_grad():
        modules = dict(theirs.named_modules())
        for path, module in spectrogram.loras(ours).items():
            for parameter, name in ((module.A, "lora_A"), (module.B, "lora_B")):
                other = getattr(modules[path], name)["default"]
                other.to(torch.float32)                      # fp32 as ours, or they would not be compared
                other.weight.normal_(0, 0.02)
                parameter.copy_(other.weight)
    inputs = example(options, device)
    steps = {name: stepper(network, inputs, device, dtype) for name, network in (("ours", ours), ("peft", theirs))}
    losses = {name: step() for name, step in steps.items()}
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for n in range(options.repeats):
        for name in list(steps)[::1 if n % 2 else -1]:
            times[name].append(clock(steps[name], device))
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    result = {"device": machine, "dtype": options.dtype, "repeats": options.repeats, "loss of the first step": losses,
              "median seconds": {name: statistics.median(found) for name, found in times.items()},
              "peak MB above what stays": {name: peak(step, device) / 1e6 for name, step in steps.items()}}
    for key in ("median seconds", "peak MB above what stays"):
        result[f"{key}, ours / peft"] = result[key]["ours"] / result[key]["peft"]
    result["median of the ratios of neighbours"] = statistics.median(a / b for a, b in zip(times["ours"], times["peft"]))
    print(json.dumps(result, indent=1))


def small(options: argparse.Namespace) -> Flux2Transformer2DModel:
    """A Klein of --width and --layers, two of them double."""
    head = options.width // 8
    network = Flux2Transformer2DModel(in_channels=128, num_layers=2, num_single_layers=options.layers - 2, attention_head_dim=head,
                                      num_attention_heads=8, joint_attention_dim=768, axes_dims_rope=(head // 4,) * 4,
                                      guidance_embeds=False)
    return network.requires_grad_(False)


def example(options: argparse.Namespace, device: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (options.batch, options.tokens, 128), "encoder_hidden_states": (options.batch, options.text_tokens, 768),
              "timestep": (options.batch,)}
    inputs = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {"img_ids": torch.zeros(options.tokens, 4), "txt_ids": torch.zeros(options.text_tokens, 4)}
    return {name: value.to(device) for name, value in inputs.items()}


def stepper(network, inputs: dict, device: str, dtype: torch.dtype):
    """A function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
            loss = network(**inputs, return_dict=False)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()                                   # waits for the GPU

    return step


def clock(step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(step, device: str) -> int:
    """Bytes that a step has allocated at most, above those that were allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("plan")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=plan)
    command = commands.add_parser("lora")
    for name, default in (("width", 512), ("layers", 6), ("batch", 2), ("tokens", 128), ("text_tokens", 64), ("rank", 64), ("repeats", 15)):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(run=lora)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
