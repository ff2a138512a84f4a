"""What training FLUX.2 Klein costs, counted without its weights; our LoRA's step against peft's, measured.

python -m klein.bench plan
    operations and memory at the published sizes, as JSON; nothing is allocated, no GPU is needed
python -m klein.bench lora [--width 512 --layers 6 --batch 2 --rank 64 --repeats 15 --dtype fp32]
    both in one process, in turns
"""

import argparse
import itertools
import json
import statistics
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from klein import pipeline
from klein.lora import add_attention_lora, attention_layers, lora_layers

CANVASES = ((768, 768), (512, 320))  # height, width
TEXT_TOKENS = (512, 128)
BATCH = 4
RANK = 256
TEXT_RANK = 32


def plan(options: argparse.Namespace) -> None:
    """Print operations of a sample and of a step, and a step's memory, for each canvas and length of text."""
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
                operations = transformer_operations(tokens, text_tokens)
                result["transformer"][name] = operations | transformer_memory(tokens, text_tokens)
    print(json.dumps(result, indent=1))


def count_parameters() -> dict[str, int]:
    network = transformer()
    encoder = text_encoder()
    counts = {
        "transformer": parameters_of(network),
        "text encoder, layers that are read": parameters_of(encoder),
        "VAE": parameters_of(autoencoder()),
    }
    add_attention_lora(network, RANK, RANK)
    add_attention_lora(encoder, TEXT_RANK, TEXT_RANK)
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
        add_attention_lora(encoder, TEXT_RANK, TEXT_RANK)
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


def transformer_operations(tokens: int, text_tokens: int) -> dict[str, float]:
    """TFLOP without and with LoRA, and of a training step without and with checkpointing."""
    network = transformer().requires_grad_(False)
    inputs = example_inputs(1, tokens, text_tokens, 7680, "meta")

    def forward() -> torch.Tensor:
        return network(**inputs, return_dict=False)[0]

    def forward_backward() -> None:
        loss = forward().float().square().mean()
        loss.backward()

    frozen = count_tflop(forward)
    add_attention_lora(network, RANK, RANK)
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
    network = transformer()
    weights = 2 * parameters_of(network) / 1e9
    add_attention_lora(network, RANK, RANK)
    adapter = 16 * lora_parameters_of(network) / 1e9
    kept, block = activations(tokens, text_tokens, False)
    kept_checkpointed, _ = activations(tokens, text_tokens, True)
    return {
        "GB, weights, bf16": weights,
        "GB, LoRA, fp32: weight, gradient, two moments": adapter,
        f"GB, activations kept of {BATCH}, without checkpointing": kept,
        f"GB, activations kept of {BATCH}, with checkpointing": kept_checkpointed,
        f"GB, activations of {BATCH} in the block being recomputed": block,
        "GB, sum, without checkpointing": weights + adapter + kept,
        "GB, sum, with checkpointing": weights + adapter + kept_checkpointed + block,
    }


def activations(tokens: int, text_tokens: int, checkpointing: bool) -> tuple[float, float]:
    """GB that a forward pass on a GPU under bf16 autocast keeps for backward, and the most by one block.

    Fake tensors, as if they were on a GPU; counted by storage, as many views share one; parameters do not
    count. Gradients in flight, the allocator's reserve and the CUDA context come on top.
    """
    with FakeTensorMode(), gpu_autocast():
        network = transformer("cuda", torch.bfloat16).requires_grad_(False)
        add_attention_lora(network, RANK, RANK)
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
            inputs = example_inputs(BATCH, tokens, text_tokens, 7680, "cuda")
            output = network(**inputs, return_dict=False)[0]
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


def example_inputs(
    batch: int, tokens: int, text_tokens: int, text_width: int, device: str
) -> dict[str, torch.Tensor]:
    """Arguments of the transformer, for pictures of `tokens` tokens."""
    with torch.device(device):
        return {
            "hidden_states": torch.rand(batch, tokens, 128),
            "encoder_hidden_states": torch.rand(batch, text_tokens, text_width),
            "timestep": torch.rand(batch),
            "img_ids": torch.zeros(tokens, 4),
            "txt_ids": torch.zeros(text_tokens, 4),
        }


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


# Our LoRA against peft's


def compare_with_peft(options: argparse.Namespace) -> None:
    """Print seconds and peak memory of a step, forward, backward and AdamW, of both, in turns."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    ours, theirs = wrapped_pair(options, device, dtype)
    inputs = example_inputs(options.batch, options.tokens, options.text_tokens, 768, device)
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
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_bytes(step, device) / 1e6 for name, step in steps.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["peft"])]
    on_cpu = f"cpu, {torch.get_num_threads()} threads"
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else on_cpu,
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


def peak_bytes(step, device: str) -> int:
    """Bytes that a step has allocated at most, above those that were allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = itertools.accumulate(change for _, change in changes)
    return max(0, *held)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("plan").set_defaults(run=plan)
    command = commands.add_parser("lora")
    sizes = {"width": 512, "layers": 6, "batch": 2, "tokens": 128, "text_tokens": 64, "rank": 64}
    sizes["repeats"] = 15
    for name, default in sizes.items():
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(run=compare_with_peft)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
