"""Klein with our LoRA against diffusers' pipeline, its published objective and peft; adapters as files; what
is trained and what is not.

A tiny pipeline of the real classes, every weight of it shaken, is written by the system's own export and read
by diffusers.
"""

import copy
import json
import math
from collections import Counter
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file

import config as configs
import flow
import optim
from base import Prompt
from config import UserError
from klein import adapter, bench, pipeline
from klein.config import SpectrogramConfig
from klein.lora import LoRA, add_lora, attention_layers, lora_layers, remove_lora
from klein.system import Spectrogram
from tracking import checkpoint

TINY = {
    "system": "spectrogram",
    "model": {"width": 32, "layers": 3, "heads": 2},
    "flow": {"predict": "v"},
    "train": {"dtype": "fp32"},
    "picture": {"n_fft": 128, "hop": 64, "seconds": 0.15, "canvas_height": 64, "canvas_width": 48},
}
KLEIN = {
    "base": "scratch",
    "vae": "own",
    "text_tokens": 48,
    "rank": 4,
    "alpha": 8.0,
    "double_layers": 1,
    "prompt": "{text}",
}
PROMPTS = [Prompt("see", seed=1), Prompt("hear him", seed=2)]
# 4 steps on this canvas: no time differs from diffusers' in its last bit, and
SETTINGS = configs.FlowSample(euler_steps=4, cfg_scale=4.0)
# the embedding of a time multiplies such a
# difference by 1000


def make(dtype="fp32", **klein) -> Spectrogram:
    torch.manual_seed(0)
    return Spectrogram(
        configs.from_dict(SpectrogramConfig, TINY | {"klein": KLEIN | klein, "train": {"dtype": dtype}})
    )


def shake(network, seed=3):
    """Updates of a size that is seen in the picture: both B, which starts at 0, and A."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for root in [network.transformer] + [network.trained_text_encoder] * (
            network.trained_text_encoder is not None
        ):
            for lora in lora_layers(root).values():
                lora.A.copy_(torch.randn(lora.A.shape, generator=generator) / 4)
                lora.B.copy_(torch.randn(lora.B.shape, generator=generator) / 8)
    return network


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A Flux2KleinPipeline on disk."""
    network = make(tune="full")
    # it starts at zero, and would paint grey
    torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    network.export(tmp_path_factory.mktemp("base"), {})
    return str(tmp_path_factory.getbasetemp() / "base0")


@pytest.fixture
def pipe(base):
    pytest.importorskip("peft")  # by which diffusers loads adapters
    pipe = Flux2KleinPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def network(base) -> Spectrogram:
    return shake(make(base=base, text_rank=2))


@pytest.fixture
def folder(network, tmp_path) -> Path:
    """The adapter of `network`, exported."""
    network.export(tmp_path / "adapter", {"step": "7"})
    return tmp_path / "adapter"


def paint(network):
    with torch.inference_mode():
        return network.generate_pictures(PROMPTS, SETTINGS)


def paint_in_diffusers(pipe):
    """The same noise, prompts and settings, in the words of Flux2KleinPipeline."""
    noise = torch.stack(
        [torch.randn(12, 16, generator=torch.Generator().manual_seed(prompt.seed)) for prompt in PROMPTS]
    )
    return pipe(
        prompt=[prompt.text for prompt in PROMPTS],
        height=64,
        width=48,
        num_inference_steps=SETTINGS.euler_steps,
        guidance_scale=SETTINGS.cfg_scale,
        latents=noise.mT.reshape(2, 16, 4, 3),
        max_sequence_length=KLEIN["text_tokens"],
        output_type="pt",
    ).images


def batch_of(size=3, seed=5, **more):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, size, 12, 16, generator=generator)
    return {
        "x": x,
        "noise": noise,
        "t": torch.rand(size, generator=generator),
        "x_mask": torch.ones(size, 12, dtype=torch.bool),
        "text": torch.randn(size, 48, 96, generator=generator),
    } | more


def gradients(network, batch):
    network.zero_grad()
    network(batch)["loss"].backward()
    return {
        path: (lora.A.grad.clone(), lora.B.grad.clone())
        for path, lora in lora_layers(network.transformer).items()
    }


def same(made, wanted, rtol, atol):
    assert made.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(
            made[path], wanted[path], rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}"
        )


# Against diffusers' pipeline


def test_a_pipeline_that_was_tuned_in_full_paints_in_diffusers_what_it_painted_here(base, pipe):
    plain = make(base=base)
    torch.testing.assert_close(paint_in_diffusers(pipe), paint(plain), rtol=0, atol=1e-5)
    assert paint(plain).std() > 0.05


@pytest.mark.parametrize("file", [adapter.LORA_WEIGHTS, "comfyui.safetensors"])
def test_an_exported_adapter_paints_in_diffusers_what_the_network_paints_fused_and_unfused(
    network, folder, pipe, file
):
    plain, painted = paint_in_diffusers(pipe), paint(network)
    pipe.load_lora_weights(folder, weight_name=file)
    transformer_alone = paint_in_diffusers(pipe)
    pipe.text_encoder.load_adapter(str(folder / "text_encoder"))
    torch.testing.assert_close(paint_in_diffusers(pipe), painted, rtol=0, atol=1e-5)
    # both are seen
    assert (plain - transformer_alone).abs().mean() > 0.02 and (
        transformer_alone - painted
    ).abs().mean() > 0.02
    pipe.fuse_lora()
    torch.testing.assert_close(paint_in_diffusers(pipe), painted, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pipe.text_encoder.disable_adapters()
    torch.testing.assert_close(paint_in_diffusers(pipe), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [12, 640, 2304])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_grid_of_times_is_diffusers_schedulers(base, tokens, steps):
    scheduler, mu = (
        FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler"),
        compute_empirical_mu(tokens, steps),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(flow.timesteps(steps, 0.0, math.exp(mu)), scheduler.sigmas, rtol=0, atol=6e-8)


def test_an_adapter_without_its_settings_paints_something_else_so_alpha_matters(network, folder, pipe):
    tensors = load_file(folder / adapter.LORA_WEIGHTS)
    save_file(tensors, folder / "bare.safetensors")
    pipe.load_lora_weights(folder, weight_name="bare.safetensors")
    pipe.text_encoder.load_adapter(str(folder / "text_encoder"))
    assert (paint_in_diffusers(pipe) - paint(network)).abs().mean() > 0.02


def test_layers_of_different_ranks_and_alphas_paint_the_same_in_diffusers(network, tmp_path, pipe):
    for n, path in enumerate(lora_layers(network.transformer)):
        add_lora(network.transformer, {path: 2 + n % 3}, alpha=1.0 + n)
    shake(network).export(tmp_path, {})
    pipe.load_lora_weights(tmp_path, weight_name=adapter.LORA_WEIGHTS)
    pipe.text_encoder.load_adapter(str(tmp_path / "text_encoder"))
    torch.testing.assert_close(paint_in_diffusers(pipe), paint(network), rtol=0, atol=1e-5)


def test_a_fresh_lora_paints_exactly_what_the_base_paints(base):
    wrapped, plain = make(base=base, text_rank=2), make(base=base)
    remove_lora(plain.transformer)
    assert torch.equal(paint(wrapped), paint(plain)) and not lora_layers(plain.transformer)


def test_merging_changes_nothing_that_is_painted_and_unmerging_restores_every_bit(network):
    before, painted = copy.deepcopy(network.state_dict()), paint(network)
    layers = [*lora_layers(network.transformer).values(), *lora_layers(network.trained_text_encoder).values()]
    for lora in layers * 2:  # twice is once
        lora.merge()
    torch.testing.assert_close(paint(network), painted, rtol=0, atol=1e-5)
    assert all(not torch.equal(lora.base.weight, lora.unmerged_weight) for lora in layers)
    for lora in layers * 2:
        lora.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(paint(network), painted)


def test_the_model_cards_code_runs_as_it_stands(folder, base, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = (
        code.replace('.to("cuda")', "")
        .replace("bfloat16", "float32")
        .replace("num_inference_steps=50", "num_inference_steps=1")
    )
    monkeypatch.chdir(folder)
    exec(code, {})
    assert (
        (folder / "picture.png").stat().st_size > 100
        and "max_sequence_length=48" in card
        and "step: 7" in card
    )


# Adapters as files


def lay_out(network, layout):
    """Tensors and header of a file: the LoRA of `network` as others write it."""
    a, b = {
        "lora.down/up": (".lora.down.weight", ".lora.up.weight"),
        "kohya": (".lora_down.weight", ".lora_up.weight"),
    }.get(layout, (".lora_A.weight", ".lora_B.weight"))
    prefix = layout if layout.endswith(".") else "transformer."
    tensors, header = {}, {}
    for path, lora in lora_layers(network.transformer).items():
        tensors |= {
            prefix + path + a: lora.A.detach(),
            prefix + path + b: lora.B.detach() * (1 if layout in ("kohya", "metadata") else 2),
        }
        if layout == "kohya":
            tensors[prefix + path + ".alpha"] = torch.tensor(8.0)
    if layout == "metadata":
        header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    return tensors, header


@pytest.mark.parametrize(
    "layout", ["transformer.", "diffusion_model.", "base_model.model.", "lora.down/up", "kohya", "metadata"]
)
def test_every_layout_of_an_adapter_is_the_same_update(network, base, tmp_path, layout):
    tensors, header = lay_out(network, layout)
    save_file(tensors, tmp_path / adapter.LORA_WEIGHTS, header)
    other, batch = make(base=base), batch_of()
    other.load_adapter(str(tmp_path / adapter.LORA_WEIGHTS))
    torch.testing.assert_close(other(batch)["loss"], network(batch)["loss"], rtol=1e-6, atol=0)
    by_folder = make(base=base, rank=1)
    by_folder.load_adapter(str(tmp_path))  # of another rank than the config's
    assert torch.equal(by_folder(batch)["loss"], other(batch)["loss"])


PUBLISHED = {  # Black Forest Labs' names of layers, and diffusers'; of a fused one the first of three
    "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_q",
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.add_q_proj",
    "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.1.linear2": "single_transformer_blocks.1.attn.to_out",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}


def publish(network, prefix, a=".lora_A.weight", b=".lora_B.weight", alpha=0.0, own_ranks=False):
    """A file of random layers by the published names; own_ranks: Q, K and V have two of the six each."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, path in PUBLISHED.items():
        rows, columns = network.transformer.get_submodule(path).weight.shape
        parts = [torch.randn(rows, 6, generator=generator) / 8 for _ in range(3 if "qkv" in name else 1)]
        B = torch.cat(parts)
        if own_ranks and "qkv" in name:
            B = torch.block_diag(*(part[:, :2] for part in parts))
        layer = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        tensors |= {layer + a: torch.randn(6, columns, generator=generator) / 8, layer + b: B}
        if alpha:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def updates(network):
    return {path: lora.scale * lora.B @ lora.A for path, lora in lora_layers(network.transformer).items()}


KOHYA = {"prefix": "lora_unet_", "a": ".lora_down.weight", "b": ".lora_up.weight"}
LAYOUTS = {
    "ai-toolkit": {"prefix": "diffusion_model."},
    "peft": {"prefix": "base_model.model."},
    "kohya": KOHYA,
    "kohya, alpha": KOHYA | {"alpha": 2.0},
    "kohya, Q, K and V of their own": KOHYA | {"alpha": 9.0, "own_ranks": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_names_and_fused_layers_are_read_and_paint_as_in_diffusers(base, pipe, tmp_path, layout):
    from peft.tuners.lora import LoraLayer

    network = make(base=base)
    plain = paint(network)
    save_file(publish(network, **LAYOUTS[layout]), tmp_path / "any name.safetensors")
    network.load_adapter(str(tmp_path))
    pipe.load_lora_weights(tmp_path, adapter_name="other")
    wanted = {}
    for path, module in pipe.transformer.named_modules():
        if isinstance(module, LoraLayer):
            wanted[path] = module.get_delta_weight("other")
    assert len(wanted) == len(PUBLISHED) + 4
    same(updates(network), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(paint_in_diffusers(pipe), paint(network), rtol=0, atol=1e-5)
    assert (paint(network) - plain).abs().mean() > 0.02


@pytest.mark.parametrize(
    "layout",
    [
        {"prefix": ""},
        {"prefix": "transformer."},
        {"prefix": "diffusion_model.", "a": ".lora_A.default.weight", "b": ".lora_B.default.weight"},
        {"prefix": "diffusion_model.", "a": ".lora_down.weight", "b": ".lora_up.weight", "alpha": 6.0},
    ],
    ids=["no prefix", "diffusers' prefix", "an adapter's name", "kohya's endings"],
)
def test_prefix_and_endings_of_published_names_do_not_matter(base, tmp_path, layout):
    network, other = make(base=base), make(base=base)
    save_file(publish(network, "diffusion_model."), tmp_path / "a.safetensors")
    network.load_adapter(str(tmp_path / "a.safetensors"))
    save_file(publish(other, **layout), tmp_path / "b.safetensors")
    other.load_adapter(str(tmp_path / "b.safetensors"))
    same(updates(other), updates(network), rtol=0, atol=0)


def test_of_several_adapters_in_a_folder_the_usual_name_is_taken_or_the_choice_is_asked_for(
    network, folder, base
):
    (folder / "optimizer.safetensors").write_bytes(b"")
    other = make(base=base)
    other.load_adapter(str(folder))
    assert torch.equal(paint(other), paint(network))
    (folder / adapter.LORA_WEIGHTS).rename(folder / "mine.safetensors")
    unchanged_by_refusal(other, folder, "give one of its files: comfyui.safetensors, mine.safetensors")
    (folder / "comfyui.safetensors").unlink()
    other.load_adapter(str(folder))
    assert torch.equal(paint(other), paint(network))


def test_an_exported_adapter_loads_with_its_text_encoder_and_paints_bit_for_bit_the_same(
    network, folder, base
):
    for name in (folder, folder / adapter.LORA_WEIGHTS):
        other = make(base=base)  # has no LoRA on the text encoder until then
        other.load_adapter(str(name))
        assert torch.equal(paint(other), paint(network))


def test_export_load_and_export_gives_the_same_files_bit_for_bit(network, folder, base, tmp_path):
    other = make(base=base, rank=3, alpha=7.0)
    other.load_adapter(str(folder))
    other.export(tmp_path / "again", {"step": "7"})
    files = [path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix != ".md"]
    assert len(files) == 4
    for file in files:
        written, again = folder / file, tmp_path / "again" / file
        if file.suffix == ".json":
            assert again.read_bytes() == written.read_bytes()
        # safetensors keeps the words of its header in any order
        else:
            (tensors, header), (tensors_again, header_again) = (
                adapter.read_safetensors(path) for path in (written, again)
            )
            assert header_again == header and tensors_again.keys() == tensors.keys() and len(tensors) > 20
            assert all(torch.equal(tensors_again[key], tensors[key]) for key in tensors)


def test_an_adapter_takes_the_place_of_all_that_was_there(network, folder, base, tmp_path):
    plain = make(base=base, text_rank=2)
    plain.export(tmp_path / "plain", {})
    (tmp_path / "plain" / "text_encoder" / "adapter_config.json").unlink()
    # of the transformer alone: the text encoder is as it came
    network.load_adapter(str(tmp_path / "plain"))
    assert not lora_layers(network.trained_text_encoder) and torch.equal(paint(network), paint(plain))
    network.load_adapter(str(folder))
    assert torch.equal(paint(network), paint(shake(plain)))


def add_peft(network, **settings):
    """diffusers' transformer with peft's adapter on the layers of our LoRA, with the same A and B."""
    peft = pytest.importorskip("peft")
    layers = lora_layers(network.transformer)
    transformer = Flux2Transformer2DModel.from_pretrained(network.config.klein.base, subfolder="transformer")
    transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(layers), **settings))
    modules = dict(transformer.named_modules())
    with torch.no_grad():
        for path, lora in layers.items():
            modules[path].lora_A["default"].weight.copy_(lora.A)
            modules[path].lora_B["default"].weight.copy_(lora.B)
    return transformer


def velocity(transformer, network, batch):
    """The raw transformer, as diffusers' training script calls it."""
    t = batch["t"][:, None, None]
    noisy = (1 - t) * batch["x"] + t * batch["noise"]
    latents = noisy.mT.reshape(len(noisy), 16, 4, 3)
    image_ids, text_ids = (
        Flux2KleinPipeline._prepare_latent_ids(latents),
        Flux2KleinPipeline._prepare_text_ids(batch["text"]),
    )
    return transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(latents),
        timestep=batch["t"] * 1000 / 1000,
        guidance=None,
        encoder_hidden_states=batch["text"],
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_out": 3, "transformer_blocks.0.attn.to_q": 5}}],
    ids=["plain", "rslora", "alphas of their own"],
)
@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_an_adapter_that_peft_or_diffusers_wrote_gives_equal_outputs(
    network, base, tmp_path, writer, settings
):
    transformer = add_peft(network, **settings)
    if writer == "peft":
        import peft

        plain = Flux2Transformer2DModel.from_pretrained(base, subfolder="transformer")
        config = transformer.peft_config["default"]
        model = peft.get_peft_model(plain, config)
        peft.set_peft_model_state_dict(
            model,
            {
                f"base_model.model.{key}": value
                for key, value in peft.get_peft_model_state_dict(transformer).items()
            },
        )
        model.save_pretrained(tmp_path)
    else:
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict

        Flux2KleinPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
        )
    other, batch = make(base=base), batch_of()
    other.load_adapter(str(tmp_path))
    with torch.no_grad():
        t = batch["t"][:, None, None]
        made = other.velocity((1 - t) * batch["x"] + t * batch["noise"], batch["t"], batch["text"])
        torch.testing.assert_close(made, velocity(transformer, other, batch), rtol=0, atol=1e-5)


def without(tensors, key):
    return {name: value for name, value in tensors.items() if name != key}


def renamed(tensors, old, new):
    return {key.replace(old, new): value.clone() for key, value in tensors.items() if key.startswith(FIRST)}


FIRST = "transformer.transformer_blocks.0.attn.to_q"
DAMAGES = {
    "no ending": (lambda t: t | {f"{FIRST}.weight": torch.zeros(32, 32)}, "no tensor of an adapter"),
    "two adapters": (
        lambda t: t | {f"{FIRST}.lora_A.two.weight": torch.zeros(4, 32)},
        "under another name too",
    ),
    "kohya's name of nothing": (
        lambda t: t | renamed(t, "transformer.transformer_blocks.0.attn.to_q", "lora_unet_to_q"),
        "no linear layer lora_unet_to_q",
    ),
    "a block that nobody has": (
        lambda t: t | renamed(t, "transformer_blocks.0.attn.to_q", "double_blocks.999999999.img_attn.qkv"),
        "another network",
    ),
    "nan": (
        lambda t: t | {f"{FIRST}.lora_B.weight": torch.full((32, 4), math.nan)},
        rf"{adapter.LORA_WEIGHTS}: {FIRST}.lora_B.weight is not finite",
    ),
    "infinity in half precision": (
        lambda t: t | {f"{FIRST}.lora_A.weight": torch.full((4, 32), 1e9).half()},
        rf"{adapter.LORA_WEIGHTS}: {FIRST}.lora_A.weight is not finite",
    ),
    "an alpha of nan": (
        lambda t: t | {f"{FIRST}.alpha": torch.tensor(math.nan)},
        rf"{adapter.LORA_WEIGHTS}: {FIRST}.alpha is not finite",
    ),
    "complex numbers": (
        lambda t: t | {f"{FIRST}.lora_B.weight": torch.zeros(32, 4, dtype=torch.complex64)},
        "complex numbers",
    ),
    "B missing": (lambda t: without(t, f"{FIRST}.lora_B.weight"), "half an adapter"),
    "A missing": (lambda t: without(t, f"{FIRST}.lora_A.weight"), "half an adapter"),
    "A and B of different ranks": (
        lambda t: t | {f"{FIRST}.lora_A.weight": torch.zeros(3, 32)},
        "do not fit",
    ),
    "no rank": (
        lambda t: (
            t | {f"{FIRST}.lora_A.weight": torch.zeros(0, 32), f"{FIRST}.lora_B.weight": torch.zeros(32, 0)}
        ),
        "do not fit",
    ),
    "another size": (lambda t: t | {f"{FIRST}.lora_B.weight": torch.zeros(64, 4)}, "another size"),
    "another network": (lambda t: t | renamed(t, "blocks.0", "blocks.7"), "another network"),
    "no layer": (lambda t: t | renamed(t, "to_q", "norm_q"), "no linear layer"),
    "a bias": (lambda t: t | {f"{FIRST}.lora_B.bias": torch.zeros(32)}, "no tensor of an adapter"),
    "magnitudes of DoRA": (
        lambda t: t | {f"{FIRST}.lora_magnitude_vector": torch.zeros(32)},
        "no tensor of an adapter",
    ),
    "empty": (lambda t: {}, "no adapter"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_no_adapter_of_this_network_is_refused_and_changes_nothing(network, folder, what):
    damage, message = DAMAGES[what]
    save_file(damage(load_file(folder / adapter.LORA_WEIGHTS)), folder / adapter.LORA_WEIGHTS)
    unchanged_by_refusal(network, folder, message)


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", "not a safetensors file"),
        ("text", "not a safetensors file"),
        ("settings", "settings"),
        ("settings of a thousand brackets", "settings"),
        ("an alpha beyond all floats", "alpha"),
        ("an alpha of nan", "alpha"),
        ("missing", "no such file"),
        ("text encoder of another size", "another size"),
        ("text encoder's settings", "settings"),
        ("text encoder's weights", "no such file"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(network, folder, what, message):
    weights, text = folder / adapter.LORA_WEIGHTS, folder / "text_encoder"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1")
    elif what == "settings":
        save_file(load_file(weights), weights, {"lora_adapter_metadata": "[1]"})
    elif what == "settings of a thousand brackets":
        save_file(load_file(weights), weights, {"lora_adapter_metadata": "[" * 100_000})
    elif what == "an alpha beyond all floats":
        save_file(
            load_file(weights),
            weights,
            {"lora_adapter_metadata": f'{{"transformer.lora_alpha": 1{"0" * 400}}}'},
        )
    elif what == "an alpha of nan":
        save_file(load_file(weights), weights, {"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'})
    elif what == "missing":
        weights.unlink()
        (folder / "comfyui.safetensors").unlink()
    elif what == "text encoder of another size":
        tensors = load_file(text / adapter.PEFT_WEIGHTS)
        key = next(key for key in tensors if "lora_B" in key)
        save_file(tensors | {key: torch.zeros(7, 2)}, text / adapter.PEFT_WEIGHTS)
    elif what == "text encoder's settings":
        (text / "adapter_config.json").write_text("{")
    elif what == "text encoder's weights":
        (text / adapter.PEFT_WEIGHTS).unlink()
    unchanged_by_refusal(network, folder, message)


def unchanged_by_refusal(network, folder, message):
    before = copy.deepcopy(shake(network, seed=9).state_dict())  # not what the file holds
    with pytest.raises(UserError, match=message) as refusal:
        network.load_adapter(str(folder))
    after = network.state_dict()
    assert (
        "\n" not in str(refusal.value)
        and before.keys() == after.keys()
        and all(torch.equal(after[key], before[key]) for key in before)
    )


# Training


def test_the_loss_is_diffusers_published_objective(network):
    batch = batch_of()
    transformer = add_peft(network)
    expected = F.mse_loss(velocity(transformer, network, batch), batch["noise"] - batch["x"])
    made = network(batch)
    torch.testing.assert_close(made["loss"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(made["flow_loss_per_clip"].mean(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_and_b_are_pefts(network, base, checkpointing):
    batch, transformer = batch_of(), add_peft(network)
    F.mse_loss(velocity(transformer, network, batch), batch["noise"] - batch["x"]).backward()
    modules = dict(transformer.named_modules())
    expected = {
        path: (modules[path].lora_A["default"].weight.grad, modules[path].lora_B["default"].weight.grad)
        for path in lora_layers(network.transformer)
    }
    made = gradients(shake(make(base=base, checkpointing=checkpointing)), batch)
    same(made, expected, rtol=1e-4, atol=1e-5)
    assert len(made) == 8 + 2 * 2 and min(a.abs().max() for pair in expected.values() for a in pair) > 1e-4


def test_checkpointing_changes_no_bit_of_the_gradient(base):
    batch = batch_of()
    same(
        gradients(shake(make(base=base, checkpointing=True)), batch),
        gradients(shake(make(base=base)), batch),
        rtol=0,
        atol=0,
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(network):
    batch = batch_of(4)
    whole = gradients(network, batch)
    network.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (network({key: value[half] for key, value in batch.items()})["loss"] / 2).backward()
    same(
        {path: (lora.A.grad, lora.B.grad) for path, lora in lora_layers(network.transformer).items()},
        whole,
        rtol=1e-4,
        atol=1e-6,
    )


def test_tokens_that_are_masked_do_not_reach_the_loss(network):
    batch = batch_of()
    batch["x_mask"][:, 8:] = False
    expected = F.mse_loss(
        velocity(add_peft(network), network, batch)[:, :8], (batch["noise"] - batch["x"])[:, :8]
    )
    torch.testing.assert_close(network(batch)["loss"], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_gradients_are_close(network):
    batch = batch_of()
    expected = gradients(network, batch)
    network.zero_grad()
    torch.compile(network)(batch)["loss"].backward()
    same(
        {path: (lora.A.grad, lora.B.grad) for path, lora in lora_layers(network.transformer).items()},
        expected,
        rtol=1e-3,
        atol=1e-5,
    )


def test_under_bf16_lora_gradients_and_adam_stay_fp32_and_steps_too_small_for_bf16_arrive(base):
    network = shake(make(base=base, text_rank=2, dtype="bf16"))
    optimizers = optim.make_optimizers(network, 0.02, 3e-4, 0.01)
    before = {name: value.clone() for name, value in checkpoint.trained_weights(network).items()}
    ids, mask = pipeline.tokenize_prompts(network.tokenizer, ["see", "hear him"], 48)
    batch = batch_of(2, ids=ids, text_mask=mask)
    del batch["text"]
    for group in optimizers[0].param_groups:
        # next to 0.25, less than a hundredth of bf16's last bit
        group["lr"] = 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(batch)["loss"]
    loss.backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert loss.dtype == torch.float32 and {p.grad.dtype for p in trained.values()} == {torch.float32}
    optimizers[0].step()
    states = [value for state in optimizers[0].state.values() for value in state.values()]
    assert len(optimizers) == 1 and {value.dtype for value in states} == {torch.float32} == {
        p.dtype for p in trained.values()
    }
    assert all((p != before[name]).float().mean() > 0.9 for name, p in trained.items())
    assert {p.dtype for name, p in network.named_parameters() if name not in trained} == {torch.bfloat16}


def test_training_changes_no_bit_of_the_base_in_memory_or_on_disk(network, base):
    files = {path: path.read_bytes() for path in Path(base).rglob("*.*")}
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
    optimizer = optim.make_optimizers(network, 0.02, 3e-4, 0.01)[0]
    for seed in range(3):
        optimizer.zero_grad()
        network(batch_of(seed=seed))["loss"].backward()
        optimizer.step()
    assert len(frozen) > 300 and all(
        torch.equal(p, frozen[name]) for name, p in network.named_parameters() if name in frozen
    )
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_lora_overfits_one_batch(base):
    network, batch = make(base=base, rank=16), batch_of(2)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(network(batch)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_checkpoint_holds_the_lora_and_nothing_of_the_base(network, tmp_path):
    kept = checkpoint.trained_weights(network)
    assert {name.rpartition(".")[2] for name in kept} == {"A", "B"} and len(kept) == 2 * (12 + 4 * 27)
    assert set(kept) == {name for name, p in network.named_parameters() if p.requires_grad}
    paint(network)  # loads VAE and encoder, which must not appear
    assert checkpoint.trained_weights(network).keys() == kept.keys()


def test_the_text_encoders_lora_covers_the_layers_that_are_read_and_each_gets_gradient(base):
    network = shake(make(base=base, text_rank=2))
    ids, mask = pipeline.tokenize_prompts(network.tokenizer, ["see", "hear him"], 48)
    batch = batch_of(2, ids=ids, text_mask=mask)
    del batch["text"]
    network(batch)["loss"].backward()
    layers = lora_layers(network.trained_text_encoder)
    wanted = {f"model.layers.{n}.self_attn.{name}_proj" for n in range(27) for name in "qkvo"}
    assert set(layers) == wanted and all(
        p.grad.abs().max() > 0 for lora in layers.values() for p in (lora.A, lora.B)
    )


# The layer


def test_the_layer_is_wx_plus_scaled_bax_in_any_number_of_dimensions():
    base = torch.nn.Linear(5, 7)
    lora = LoRA(base, 3, alpha=6.0)
    torch.nn.init.normal_(lora.B)
    for shape in ((4, 5), (2, 4, 5), (2, 1, 4, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(lora(x), x @ (base.weight + 2 * lora.B @ lora.A).T + base.bias)
    assert lora.weight is base.weight and not base.weight.requires_grad


def test_klein_4b_has_the_published_sizes():
    transformer, text = bench.transformer(), bench.text_encoder()
    assert sum(p.numel() for p in transformer.parameters()) == 3_875_544_576
    add_lora(transformer, dict.fromkeys(attention_layers(transformer), 256), 256.0)
    add_lora(text, dict.fromkeys(attention_layers(text), 32), 32.0)
    assert len(lora_layers(transformer)) == 80 and len(lora_layers(text)) == 4 * 27
    assert sum(lora.A.numel() + lora.B.numel() for lora in lora_layers(transformer).values()) == 298_844_160
    assert sum(lora.A.numel() + lora.B.numel() for lora in lora_layers(text).values()) == 17_694_720


def test_a_few_odd_adapters_end_well():
    counts = Counter()
    fuzz.try_kind("adapter", 25, counts)
    assert counts["accepted"] and counts["refused"]
