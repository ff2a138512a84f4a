"""FluxMusic's Transformer against diffusers' Flux, its published sizes, and what its loader takes and
refuses.
"""

import argparse
import dataclasses
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import config as configs
import flow
import parallel
from config import UserError
from music.bench import call_diffusers, diffusers_flux, example_inputs, randomize
from music.config import SIZES, MusicConfig, Size
from music.latents import Codec, to_latents, to_tokens
from music.model import MMDiT, load_published, read_published
from music.system import Music, choose_size, multidiffusion

PARAMETERS = {
    "small": 142_333_984,
    "base": 473_971_232,
    "large": 840_628_256,
    "giant": 2_109_904_928,
    "giant_full": 1_586_238_752,
}
TENSORS = {"small": 336, "base": 496, "large": 496, "giant": 656, "giant_full": 496}
SHORT = dataclasses.replace(SIZES["small"], depth=1, depth_single_blocks=1)


def on_meta(name: str) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(SIZES[name])


@pytest.fixture(scope="module")
def network() -> MMDiT:
    """Blocks of small, one of each kind, every weight of them with an effect."""
    torch.manual_seed(0)
    return randomize(MMDiT(SHORT))


# The network


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_as_many_parameters_as_published(name):
    network = on_meta(name)
    assert (
        sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
        and len(network.state_dict()) == TENSORS[name]
    )
    assert sum(SIZES[name].axes_dim) == SIZES[name].width // SIZES[name].heads


@pytest.fixture
def first_of_eight():
    """This process as the first of eight ranks, of which it never hears."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_of_giant_each_of_eight_ranks_holds_an_eighth_block_by_block(first_of_eight):
    network = parallel.shard(on_meta("giant"), False, torch.device("cpu"), 8)
    held = sum(p.to_local().numel() for p in network.parameters())
    assert PARAMETERS["giant"] / 8 <= held < 1.001 * PARAMETERS["giant"] / 8
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    assert len(parts) == 1 + SIZES["giant"].depth + SIZES["giant"].depth_single_blocks


@pytest.mark.parametrize("name", SIZES)
def test_blocks_of_every_size_are_those_of_diffusers(name):
    equal_to_diffusers(
        dataclasses.replace(SIZES[name], depth=1, depth_single_blocks=1), tokens=24, text_tokens=5
    )


def test_the_whole_of_small_is_that_of_diffusers():
    equal_to_diffusers(SIZES["small"], tokens=64, text_tokens=16)


def test_ten_seconds_and_a_full_text_are_those_of_diffusers():
    equal_to_diffusers(SHORT, tokens=1024, text_tokens=256)


@torch.no_grad()
def equal_to_diffusers(size: Size, tokens: int, text_tokens: int) -> None:
    torch.manual_seed(0)
    network = randomize(MMDiT(size))
    inputs = example_inputs(2, tokens, text_tokens)
    v = network(*inputs)
    assert v.std() > 0.5
    torch.testing.assert_close(v, call_diffusers(diffusers_flux(size, network), *inputs), rtol=0, atol=1e-5)


def test_gradients_are_those_of_diffusers():
    torch.manual_seed(0)
    network = randomize(MMDiT(SHORT))
    flux = diffusers_flux(SHORT, network)
    inputs = [part.requires_grad_() for part in example_inputs(batch=2, tokens=16, text_tokens=4)]
    ours = torch.autograd.grad(network(*inputs).square().mean(), inputs)
    others = torch.autograd.grad(call_diffusers(flux, *inputs).square().mean(), inputs)
    for own, other in zip(ours, others):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_every_parameter(network):
    x_t, t, text, vector = example_inputs(batch=2, tokens=16, text_tokens=4)
    network.zero_grad()
    v = network(x_t, t, text, vector)
    mask = torch.ones(x_t.shape[:2], dtype=torch.bool)
    flow.loss(v, torch.zeros_like(x_t), x_t, mask).mean().backward()
    assert not [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]


def test_an_untrained_network_returns_zero_and_learns():
    torch.manual_seed(0)
    network = MMDiT(SHORT)
    inputs = example_inputs(batch=1, tokens=16, text_tokens=4)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    losses = []
    assert not network(*inputs).any()
    for _ in range(20):
        losses.append((network(*inputs) - inputs[0]).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@torch.no_grad()
def test_all_of_the_text_is_attended_to_padding_too_and_has_no_order(network):
    x_t, t, text, vector = example_inputs(batch=1, tokens=16, text_tokens=6)
    v = network(x_t, t, text, vector)
    torch.testing.assert_close(network(x_t, t, text.flip(1), vector), v, rtol=0, atol=1e-5)
    text[:, -1] = 0
    assert (network(x_t, t, text, vector) - v).abs().max() > 1e-2


@torch.no_grad()
def test_time_and_frequency_of_a_token_matter(network):
    x_t, t, text, vector = example_inputs(batch=1, tokens=32, text_tokens=2)
    v = network(x_t, t, text, vector)
    # all times backwards; another order of bands and times
    for shape in ((4, 8), (2, 16)):
        order = torch.arange(32).view(shape).flip(0).flatten()
        assert (network(x_t[:, order], t, text, vector) - v[:, order]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(network):
    x_t, t, text, vector = example_inputs(batch=3, tokens=16, text_tokens=4)
    together = network(x_t, t, text, vector)
    for n in range(3):
        one = slice(n, n + 1)
        torch.testing.assert_close(
            together[one], network(x_t[one], t[one], text[one], vector[one]), rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_bf16_autocast_stays_near_float32(network):
    inputs = example_inputs(batch=1, tokens=16, text_tokens=4)
    v = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(*inputs).float() - v).square().mean().sqrt() < 0.05 * v.std()


def test_tokens_are_patches_channel_first_all_bands_of_a_time_before_the_next():
    latents = torch.arange(2 * 8 * 6 * 16).float().view(2, 8, 6, 16)
    tokens = to_tokens(latents)
    assert tokens.shape == (2, 24, 32) and torch.equal(to_latents(tokens, bands=8), latents)
    assert torch.equal(tokens[1, 2 * 8 + 3], latents[1, :, 4:6, 6:8].flatten())


# Published checkpoints


def published(name: str, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """Tensors of a published size, each a row of its own repeated, which makes a small file."""
    g = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (key, torch.randn(p.shape[-1:], generator=g).expand(p.shape))
        for key, p in on_meta(name).state_dict().items()
    )


def write(path: Path, ema, **others) -> Path:
    """A checkpoint as FluxMusic's training writes it: averaged weights, the optimizer, the options."""
    torch.save(
        {
            "ema": ema,
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(version="small", resume=None),
            **others,
        },
        path,
    )
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_published(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_published_checkpoint_loads_its_averaged_weights_key_for_key(tmp_path):
    ema = published("small")
    network = load_published(write(tmp_path / "small.pt", ema, model=published("small", seed=1)))
    assert network.size == SIZES["small"] and all(
        p.requires_grad and p.dtype == torch.float32 for p in network.parameters()
    )
    for key, value in network.state_dict().items():
        assert torch.equal(value, ema[key])


def test_half_precision_weights_load_as_float32(tmp_path):
    network = load_published(
        write(tmp_path / "small.pt", {key: value.half() for key, value in published("small").items()})
    )
    assert network.img_in.weight.dtype == torch.float32


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_read_off_the_tensors(name, tmp_path):
    assert load_published(write(tmp_path / "x.pt", published(name))).size == SIZES[name]


def test_tensors_of_no_published_size_are_refused(tmp_path):
    ema = {key: value for key, value in published("small").items() if not key.startswith("single_blocks.3.")}
    line = refused(write(tmp_path / "x.pt", ema))
    assert (
        "width 512 with 8 double_blocks and 15 single_blocks" in line
        and "small, base, large, giant, giant_full" in line
    )


@pytest.mark.parametrize(
    "key", ["img_in.bias", "final_layer.linear.bias", "double_blocks.3.txt_attn.norm.key_norm.scale"]
)
def test_a_missing_tensor_is_named(key, tmp_path):
    ema = published("small")
    del ema[key]
    line = refused(write(tmp_path / "x.pt", ema))
    assert key in line and ("missing" in line or "width 0" in line)


def test_a_foreign_tensor_is_named(tmp_path):
    line = refused(
        write(tmp_path / "x.pt", published("small") | {"guidance_in.in_layer.weight": torch.zeros(512, 256)})
    )
    assert "guidance_in.in_layer.weight has shape (512, 256), FluxMusic's (no such tensor)" in line


def test_a_tensor_of_another_shape_is_named(tmp_path):
    line = refused(write(tmp_path / "x.pt", published("small") | {"txt_in.weight": torch.zeros(512, 1024)}))
    assert "txt_in.weight has shape (512, 1024)" in line and "(512, 4096)" in line


@pytest.mark.parametrize(
    "value", [3, "weights", torch.zeros(512, dtype=torch.int8)], ids=["number", "text", "integers"]
)
def test_what_is_no_tensor_of_real_numbers_is_named(value, tmp_path):
    assert "img_in.bias" in refused(write(tmp_path / "x.pt", published("small") | {"img_in.bias": value}))


@pytest.mark.parametrize("content", [{"model": {}}, {"ema": None}, [], argparse.Namespace(ema={})], ids=str)
def test_a_file_without_averaged_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert "lacks ema" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(kept, tmp_path):
    whole = write(tmp_path / "whole.pt", published("small")).read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: int(kept * len(whole))])
    assert "not a readable checkpoint, or truncated" in refused(tmp_path / "x.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "x.pt")


class Malicious:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_checkpoint_is_never_run(protocol, tmp_path):
    mark = tmp_path / "ran"
    torch.save(
        {"ema": published("small"), "args": Malicious(mark)}, tmp_path / "x.pt", pickle_protocol=protocol
    )
    refused(tmp_path / "x.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"ema": Malicious(mark)}, protocol))
    refused(tmp_path / "bare.pt")
    assert not mark.exists()


def test_code_in_a_checkpoint_is_named(tmp_path):
    torch.save({"ema": published("small"), "args": print}, tmp_path / "x.pt")
    assert "print" in refused(tmp_path / "x.pt")


def test_the_allow_list_ends_with_the_reading(tmp_path):
    read_published(write(tmp_path / "x.pt", published("small")))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# Published weights in the system

PUBLISHED = {
    "system": "music",
    "flow": {"predict": "v"},
    "mel": {"sample_rate": 16000, "hop": 160, "n_mels": 64, "centred": True},
}


def test_a_run_starts_from_published_weights_and_is_exported_as_they_came(tmp_path):
    file = write(tmp_path / "small.pt", published("small"))
    config = configs.from_dict(MusicConfig, PUBLISHED | {"music": {"weights": str(file)}})
    network = Music(config)
    network.export(tmp_path, {"step": "0"})
    again = load_published(tmp_path / "music.pt")
    for key, value in load_published(file).state_dict().items():
        assert torch.equal(network.transformer.state_dict()[key], value) and torch.equal(
            again.state_dict()[key], value
        )


def test_published_weights_of_another_size_are_refused(tmp_path):
    file = write(tmp_path / "small.pt", published("small"))
    with pytest.raises(UserError, match="not of music.size base, its width is 512"):
        Music(configs.from_dict(MusicConfig, PUBLISHED | {"music": {"weights": str(file), "size": "base"}}))


@pytest.mark.parametrize("width, heads", [(32, 2), (48, 2), (96, 3), (192, 3), (256, 4), (70, 1)])
def test_an_own_size_turns_all_of_a_head_in_pairs(width, heads):
    config = configs.from_dict(
        MusicConfig,
        {
            "system": "music",
            "model": {"width": width, "heads": heads, "text_encoder": "scratch", "layers": 3},
            "mel": PUBLISHED["mel"],
            "music": {"size": "own", "autoencoder": "patches", "vector_encoder": "pooled"},
            "sample": {"vocoder": "griffinlim"},
        },
    )
    size = choose_size(config, Codec(config, 0.0, 1.0, torch.device("cpu")), text_width=192)
    assert (
        sum(size.axes_dim) == width // heads
        and not any(axis % 2 for axis in size.axes_dim)
        and min(size.axes_dim) > 0
    )
    assert (
        size.depth,
        size.depth_single_blocks,
        size.channels,
        size.bands,
        size.text_width,
        size.vector_width,
    ) == (
        2,
        1,
        64,
        8,
        192,
        192,
    )


@torch.no_grad()
def test_masked_text_is_no_text(network):
    x_t, t, text, vector = example_inputs(batch=2, tokens=16, text_tokens=6)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    v = network(x_t, t, text, vector, mask)
    torch.testing.assert_close(v[:1], network(x_t[:1], t[:1], text[:1, :4], vector[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(v[1:], network(x_t[1:], t[1:], text[1:], vector[1:]), rtol=0, atol=1e-5)


# Longer than a crop


def test_one_window_is_the_network_itself():
    x_t = torch.randn(2, 8, 3)
    whole = multidiffusion(lambda x, t: x.cumsum(1), 8)
    torch.testing.assert_close(whole(x_t, torch.rand(2)), x_t.cumsum(1))


@pytest.mark.parametrize("halves", [2, 3, 4, 7])
def test_overlapping_windows_cover_everything_and_agree_where_the_network_knows_no_place(halves):
    x_t = torch.randn(2, 4 * halves, 3)
    t = torch.rand(2)
    whole = multidiffusion(lambda x, t: t[:, None, None] * x.sin(), 8)
    torch.testing.assert_close(whole(x_t, t), t[:, None, None] * x_t.sin())


def test_one_window_fades_into_the_next():
    starts = iter([0.0, 1.0])
    whole = multidiffusion(lambda x, t: torch.full_like(x, next(starts)), 8)
    v = whole(torch.zeros(1, 12, 1), torch.zeros(1))[0, :, 0]
    assert (
        not v[:4].any()
        and (v[8:] == 1).all()
        and (v[4:8].diff() > 0).all()
        and abs(v[4:8].mean() - 0.5) < 1e-6
    )
