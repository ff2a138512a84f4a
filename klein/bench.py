"""What training FLUX.2 Klein costs, counted without its weights; our LoRA's step against peft's, measured.

python tests/bench_klein.py plan [--json]
    operations and memory at the published sizes; nothing is allocated, no GPU is needed
python tests/bench_klein.py lora [--width 512 --layers 6 --batch 2 --rank 64 --repeats 15 --dtype fp32]
    both in one process, in turns
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from klein import pipeline
from klein.lora import add_attention_lora, attention_layers, lora_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CANVASES = ((768, 768), (512, 320))  # height, width
TEXT_TOKENS = (512, 128)
BATCH = 4
RANK = 256
TEXT_RANK = 32


def plan(options: argparse.Namespace) -> None:
    """Operations of a sample and of a training step, and its memory, for each canvas and length of text."""
    result = {"parameters": count_parameters(), "text encoder": {}, "vae": {}, "transformer": {}}
    for text_tokens in TEXT_TOKENS:
        result["text encoder"][f"{text_tokens} text tokens"] = text_cost(text_tokens)
    for height, width in CANVASES:
        result["vae"][f"{height} x {width}"] = vae_cost(height, width)
    with flash_attention():
        for height, width in CANVASES:
            tokens = height // 16 * (width // 16)
            for text_tokens in TEXT_TOKENS:
                name = f"{height} x {width}, {text_tokens} text tokens"
                result["transformer"][name] = transformer_cost(tokens, text_tokens)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_plan(result)


def print_plan(result: dict) -> None:
    print("\nparameters")
    for name, count in result.pop("parameters").items():
        print(f"  {name:<36}{count:>16,}")
    for part, rows in result.items():
        print(f"\n{part}")
        for name, costs in rows.items():
            print(f"  {name:<36}")
            for key, value in costs.items():
                print(f"    {key:<60}{value:>10.2f}")


def count_parameters() -> dict[str, int]:
    network = transformer()
    encoder = text_encoder()
    counts = {
        "transformer": parameters_of(network),
        "text encoder, layers that are read": parameters_of(encoder),
        "VAE": parameters_of(autoencoder()),
    }
    with_lora(network)
    with_lora(encoder, TEXT_RANK)
    counts[f"LoRA, rank {RANK}"] = lora_parameters_of(network)
    counts[f"text LoRA, rank {TEXT_RANK}"] = lora_parameters_of(encoder)
    return counts


def parameters_of(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def lora_parameters_of(network: torch.nn.Module) -> int:
    layers = lora_layers(network).values()
    return sum(lora.A.numel() + lora.B.numel() for lora in layers)


def text_cost(tokens: int) -> dict[str, float]:
    # fake: transformers does not look into the mask of tensors without data; math: can be counted
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        encoder = text_encoder("cpu").requires_grad_(False)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        forward = count_tflop(lambda: encoder(ids, None))
        with_lora(encoder, TEXT_RANK)
        step = count_tflop(lambda: encoder(ids, None).sum().backward())
        return {
            "TFLOP, forward, a sample": forward,
            f"TFLOP, a training step of {BATCH}, with its own LoRA": BATCH * step,
        }


def vae_cost(height: int, width: int) -> dict[str, float]:
    with torch.no_grad():
        vae = autoencoder()
        picture = torch.empty(1, 3, height, width, device="meta")
        latents = torch.empty(1, 32, height // 8, width // 8, device="meta")
        return {
            "TFLOP, encode, a picture": count_tflop(lambda: vae.encode(picture)),
            "TFLOP, decode, a picture": count_tflop(lambda: vae.decode(latents)),
        }


def transformer_cost(tokens: int, text_tokens: int) -> dict[str, float]:
    operations = transformer_operations(tokens, text_tokens)
    memory = transformer_memory(tokens, text_tokens)
    return operations | {f"GB, batch {BATCH}: {name}": value for name, value in memory.items()}


def transformer_operations(tokens: int, text_tokens: int) -> dict[str, float]:
    """TFLOP without and with LoRA, and of a training step without and with checkpointing."""
    network = transformer().requires_grad_(False)

    def forward() -> torch.Tensor:
        return run_transformer(network, 1, tokens, text_tokens, "meta")

    def forward_backward() -> None:
        loss = forward().float().square().mean()
        loss.backward()

    frozen = count_tflop(forward)
    with_lora(network)
    wrapped = count_tflop(forward)
    step = count_tflop(forward_backward)
    network.enable_gradient_checkpointing()
    checkpointed_step = count_tflop(forward_backward)
    return {
        "TFLOP, forward, a sample": frozen,
        f"TFLOP, forward, of which LoRA of rank {RANK} adds": wrapped - frozen,
        f"TFLOP, a training step of {BATCH}, without checkpointing": BATCH * step,
        f"TFLOP, a training step of {BATCH}, with checkpointing": BATCH * checkpointed_step,
    }


def transformer_memory(tokens: int, text_tokens: int) -> dict[str, float]:
    """GB of a training step of BATCH."""
    network = transformer()
    weights = 2 * parameters_of(network) / 1e9
    adapter = 16 * lora_parameters_of(with_lora(network)) / 1e9
    kept, block = activations(tokens, text_tokens, False)
    kept_checkpointed, _ = activations(tokens, text_tokens, True)
    return {
        "weights, bf16": weights,
        "LoRA, fp32: weight, gradient, two moments": adapter,
        "activations kept, without checkpointing": kept,
        "activations kept, with checkpointing": kept_checkpointed,
        "activations of the block being recomputed": block,
        "sum, without checkpointing": weights + adapter + kept,
        "sum, with checkpointing": weights + adapter + kept_checkpointed + block,
    }


def activations(tokens: int, text_tokens: int, checkpointing: bool) -> tuple[float, float]:
    """GB that a forward pass on a GPU under bf16 autocast keeps for backward, and the most by one block.

    Fake tensors, as if they were on a GPU; counted by storage, as many views share one; parameters do not
    count. Gradients in flight, the allocator's reserve and the CUDA context come on top.
    """
    with FakeTensorMode(), gpu_autocast():
        network = transformer("cuda", torch.bfloat16).requires_grad_(False)
        with_lora(network)
        if checkpointing:
            network.enable_gradient_checkpointing()
        parameters = {p.untyped_storage()._cdata for p in network.parameters()}
        kept = {}
        before_blocks = []  # GB kept when a block starts and when it ends
        after_blocks = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage  # kept alive, so that its address is not used again
            return tensor

        for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
            block.register_forward_pre_hook(lambda *_: before_blocks.append(gigabytes(kept)))
            block.register_forward_hook(lambda *_: after_blocks.append(gigabytes(kept)))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run_transformer(network, BATCH, tokens, text_tokens, "cuda")
            output.float().square().mean()
        per_block = [after - before for before, after in zip(before_blocks, after_blocks)]
        return gigabytes(kept), max(per_block)


def gigabytes(storages: dict) -> float:
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


def count_tflop(run) -> float:
    """Operations of `run` in 10^12, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def run_transformer(network, batch: int, tokens: int, text_tokens: int, device: str) -> torch.Tensor:
    """The network, once, on pictures of `tokens` tokens."""
    with torch.device(device):
        x = torch.empty(batch, tokens, 128)
        t = torch.empty(batch)
        text = torch.empty(batch, text_tokens, 7680)
        ids = torch.empty(tokens, 4)
        text_ids = torch.empty(text_tokens, 4)
    return network(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=text,
        img_ids=ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]


@contextmanager
def flash_attention():
    """Attention by the kernel that a GPU takes, for fake tensors too: no (S, S) matrix is kept."""
    original = F.scaled_dot_product_attention

    def flash(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        q = query.to(torch.bfloat16)
        k = key.to(torch.bfloat16)
        v = value.to(torch.bfloat16)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        output = kernel(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return output.to(query.dtype)

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def transformer(device: str = "meta", dtype: torch.dtype = torch.float32) -> Flux2Transformer2DModel:
    """Of FLUX.2 Klein 4B, the published size."""
    with torch.device(device), default_dtype(dtype):
        return Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=7680,
            in_channels=128,
            guidance_embeds=False,
        )


def text_encoder(device: str = "meta") -> pipeline.KleinTextEncoder:
    """Qwen3 4B up to the last layer that is read."""
    config = transformers.Qwen3Config(
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        qwen = transformers.Qwen3ForCausalLM(config)
        return pipeline.KleinTextEncoder(qwen)


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


def with_lora(network: torch.nn.Module, rank: int = RANK) -> torch.nn.Module:
    add_attention_lora(network, rank, rank)
    return network


# Our LoRA against peft's


def compare_with_peft(options: argparse.Namespace) -> None:
    """Seconds and peak memory of a step, forward, backward and AdamW, of both, in turns."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    ours, theirs = wrapped_pair(options, device, dtype)
    inputs = example_inputs(options, device)
    steps = {
        "ours": make_step(ours, inputs, device, dtype),
        "peft": make_step(theirs, inputs, device, dtype),
    }
    losses = {name: step() for name, step in steps.items()}
    for step in steps.values():
        step()
    seconds = {"ours": [], "peft": []}
    for n in range(options.repeats):
        order = ("ours", "peft") if n % 2 else ("peft", "ours")
        for name in order:
            seconds[name].append(time_step(steps[name], device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_bytes(step, device) / 1e6 for name, step in steps.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["peft"])]
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"cpu, {torch.get_num_threads()} threads"
    result = {
        "device": machine,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "loss of the first step": losses,
        "median seconds": medians,
        "peak MB above what stays": peaks,
        "median seconds, ours / peft": medians["ours"] / medians["peft"],
        "peak MB above what stays, ours / peft": peaks["ours"] / peaks["peft"],
        "median of the ratios of neighbours": statistics.median(ratios),
    }
    print(json.dumps(result, indent=1))


def wrapped_pair(options: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple:
    """The same network twice, with our LoRA and with peft's, on the same layers, with the same A and B."""
    import peft

    with default_dtype(dtype):
        ours = small_transformer(options).to(device)
        theirs = small_transformer(options).to(device)
    theirs.load_state_dict(ours.state_dict())
    rank = options.rank
    paths = attention_layers(ours)
    theirs.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths))
    add_attention_lora(ours, rank, 2 * rank)
    ours.requires_grad_(False)
    with torch.no_grad():
        for path, layer in lora_layers(ours).items():
            peft_layer = theirs.get_submodule(path)
            copy_matrix(peft_layer.lora_A["default"], layer.A)
            copy_matrix(peft_layer.lora_B["default"], layer.B)
    return ours, theirs


def copy_matrix(linear: torch.nn.Linear, parameter: torch.nn.Parameter) -> None:
    """Set both to the same random values, in fp32 as ours are: else the comparison is not fair."""
    linear.to(torch.float32)
    linear.weight.normal_(0, 0.02)
    parameter.copy_(linear.weight)
    parameter.requires_grad_(True)


def small_transformer(options: argparse.Namespace) -> Flux2Transformer2DModel:
    """A Klein of --width and --layers, two of them double."""
    head_dim = options.width // 8
    network = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=options.layers - 2,
        attention_head_dim=head_dim,
        num_attention_heads=8,
        joint_attention_dim=768,
        axes_dims_rope=(head_dim // 4,) * 4,
        guidance_embeds=False,
    )
    return network.requires_grad_(False)


def example_inputs(options: argparse.Namespace, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = options.batch
    x = torch.rand(batch, options.tokens, 128, generator=generator)
    text = torch.rand(batch, options.text_tokens, 768, generator=generator)
    t = torch.rand(batch, generator=generator)
    return {
        "hidden_states": x.to(device),
        "encoder_hidden_states": text.to(device),
        "timestep": t.to(device),
        "img_ids": torch.zeros(options.tokens, 4, device=device),
        "txt_ids": torch.zeros(options.text_tokens, 4, device=device),
    }


def make_step(network: torch.nn.Module, inputs: dict, device: str, dtype: torch.dtype):
    """A function that makes one training step and returns its loss."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    half = dtype == torch.bfloat16

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            output = network(**inputs, return_dict=False)[0]
            loss = output.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the GPU

    return step


def time_step(step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step, device: str) -> int:
    """Bytes that a step has allocated at most, above those that were allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("plan")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=plan)
    command = commands.add_parser("lora")
    for name, default in (
        ("width", 512),
        ("layers", 6),
        ("batch", 2),
        ("tokens", 128),
        ("text_tokens", 64),
        ("rank", 64),
        ("repeats", 15),
    ):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(run=compare_with_peft)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
