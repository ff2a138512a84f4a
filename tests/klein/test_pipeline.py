"""The parts of a FLUX.2 Klein pipeline against diffusers' own, and what is said of one that is damaged.

A tiny Flux2KleinPipeline of the real classes stands for the published one.
"""

import dataclasses
import shutil

import diffusers
import pytest
import safetensors.torch
import torch

import config as configs
from config import UserError
from klein import pipeline
from klein.config import SpectrogramConfig
from pretrained import frozen

KLEIN = {
    "system": "spectrogram",
    "klein": {"base": "scratch", "text_tokens": 48, "double_layers": 1},
    "train": {"dtype": "fp32"},
    "model": {"width": 32, "layers": 3, "heads": 2},
}


def klein(base="scratch", **more):
    return configs.from_dict(
        SpectrogramConfig, KLEIN | {"klein": KLEIN["klein"] | {"base": str(base)} | more}
    )


@pytest.fixture(scope="module")
def klein_folder(tmp_path_factory):
    """A tiny Flux2KleinPipeline on disk."""
    folder = tmp_path_factory.mktemp("klein")
    pipeline.save_klein(klein(), pipeline.load_klein(klein(), "transformer"), folder)
    return folder


@pytest.fixture
def pipe(klein_folder):
    return diffusers.Flux2KleinPipeline.from_pretrained(klein_folder)


PROMPTS = ["see", "Hear, him: 'ärger' <|im_end|>?", ""]


@pytest.mark.parametrize("from_folder", [False, True])
def test_klein_text_is_the_pipelines_own_encoding_bit_for_bit(klein_folder, pipe, from_folder):
    config = klein(klein_folder) if from_folder else klein()
    encoder, tokenizer = (
        pipeline.load_klein(config, "text_encoder"),
        pipeline.load_klein_tokenizer(config.klein.base),
    )
    ids, mask = pipeline.tokenize_prompts(tokenizer, PROMPTS, 48)
    with torch.no_grad():
        expected = pipe._get_qwen3_prompt_embeds(
            pipe.text_encoder, pipe.tokenizer, PROMPTS, max_sequence_length=48
        )
        assert torch.equal(encoder(ids, mask), expected)
    assert (
        expected.std() > 0.01
        and mask.dtype == torch.bool
        and not mask.all()
        and len(encoder.model.layers) == 27
    )


def test_a_prompt_that_does_not_fit_is_refused_not_cut():
    tokenizer = pipeline.load_klein_tokenizer("scratch")
    long = "x" * (
        48
        - len(
            tokenizer(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": ""}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            ).input_ids
        )
    )
    assert pipeline.tokenize_prompts(tokenizer, [long], 48)[1].all()
    with pytest.raises(UserError, match="49 tokens, klein.text_tokens is 48"):
        pipeline.tokenize_prompts(tokenizer, ["fits", long + "x"], 48)


def test_klein_vae_encodes_and_decodes_as_the_pipeline(klein_folder, pipe):
    vae, pictures = pipeline.load_klein(klein(klein_folder), "vae"), torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        # (B, 4 C, H / 16, W / 16)
        latents = pipe._encode_vae_image(2 * pictures - 1, None)
        tokens = pipe._pack_latents(latents)
        torch.testing.assert_close(vae.encode(pictures), tokens, rtol=0, atol=1e-6)
        bn, noise = pipe.vae.bn, torch.randn_like(latents)
        raw = (
            noise * (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()[:, None, None]
            + bn.running_mean[:, None, None]
        )
        expected = pipe.image_processor.postprocess(
            pipe.vae.decode(pipe._unpatchify_latents(raw)).sample, output_type="pt"
        )
        torch.testing.assert_close(vae.decode(pipe._pack_latents(noise), 64, 48), expected, rtol=0, atol=1e-5)
    # normalisation does something
    assert bn.running_mean.abs().max() > 0.1 and expected.std() > 0.02


def test_patches_lose_nothing():
    vae, pictures = pipeline.load_klein(klein(vae="patches"), "vae"), torch.rand(2, 3, 64, 48)
    tokens = vae.encode(pictures)
    assert tokens.shape == (2, 12, 768) and tokens.min() < -0.99 < 0.99 < tokens.max()
    torch.testing.assert_close(vae.decode(tokens, 64, 48), pictures, rtol=0, atol=1e-6)


def test_a_pipeline_on_disk_gives_each_part_in_the_precision_that_training_wants(klein_folder):
    half = dataclasses.replace(klein(klein_folder), train=configs.Train(dtype="bf16"))
    full = dataclasses.replace(half, klein=dataclasses.replace(half.klein, tune="full"))
    for part in ("transformer", "text_encoder", "vae"):
        saved, scratch = (
            pipeline.load_klein(klein(klein_folder), part).state_dict(),
            pipeline.load_klein(klein(), part).state_dict(),
        )
        assert saved.keys() == scratch.keys() and all(torch.equal(saved[key], scratch[key]) for key in saved)
        wanted = torch.float32 if part == "vae" else torch.bfloat16
        assert {p.dtype for p in pipeline.load_klein(half, part).parameters()} == {wanted}
    assert {p.dtype for p in pipeline.load_klein(full, "transformer").parameters()} == {torch.float32}


def damage_klein(folder, part, what):
    weights = next((folder / part).glob("*.safetensors"))
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no weights":
        weights.unlink()
    elif what == "broken config":
        (folder / part / "config.json").write_text("{")
    else:
        tensors = safetensors.torch.load_file(weights)
        key = next(key for key in tensors if what in key)
        safetensors.torch.save_file(
            {name: value for name, value in tensors.items() if name != key}, weights, {"format": "pt"}
        )


@pytest.mark.parametrize(
    "part, what",
    [
        ("transformer", "to_q.weight"),
        ("transformer", "truncated"),
        ("transformer", "broken config"),
        ("text_encoder", "q_proj.weight"),
        ("text_encoder", "no weights"),
        ("text_encoder", "truncated"),
        ("vae", "bn.running_mean"),
        ("vae", "truncated"),
    ],
)
def test_a_damaged_part_of_a_pipeline_is_refused_in_one_line(klein_folder, tmp_path, part, what):
    shutil.copytree(klein_folder, tmp_path, dirs_exist_ok=True)
    damage_klein(tmp_path, part, what)
    with pytest.raises(UserError) as refusal:
        pipeline.load_klein(klein(tmp_path), part)
    assert (
        str(tmp_path) in str(refusal.value) and part in str(refusal.value) and "\n" not in str(refusal.value)
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer"])
def test_what_is_no_pipeline_is_refused_in_one_line(tmp_path, part, monkeypatch):
    monkeypatch.setattr(frozen, "hub_unreachable", lambda: True)
    for base in (tmp_path, "nobody/no-such-klein"):
        with pytest.raises(UserError, match="Flux2KleinPipeline") as refusal:
            pipeline.load_klein_tokenizer(str(base)) if part == "tokenizer" else pipeline.load_klein(
                klein(base), part
            )
        assert str(base) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "files", ["tokenizer*.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_tokenizer_that_lacks_a_file_is_refused(klein_folder, tmp_path, files):
    shutil.copytree(klein_folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "tokenizer").glob(files):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        pipeline.load_klein_tokenizer(str(tmp_path))
