"""Stage 2 of pictures from speech: the Transformer on codes, its batches, codebooks, the classifier, and
whole runs on drawn shapes.
"""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import transformers
from conftest import ROOT, call, options
from PIL import Image

import config
import evaluator
import system
import train
from base import Prompt
from speech2image import align, diffusion, image, vision
from speech2image.batches import ImageBatches
from speech2image.codes import DiffusersVQ, codes_file, encode_pictures, load_autoencoder, read_codes
from speech2image.data import SpokenImageCorpus, save_tensors
from speech2image.model import Block, TokenConv2d

TINY = {
    "system": "speech_image",
    "corpus": "listed",
    "max_seconds": 8,
    "vq": "scratch",
    "vq_steps": 30,
    "picture_size": 32,
    "grid": 8,
    "kept": 64,
    "judge": True,
    "conv_ratio": 1,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "batch_size": 4,
    "euler_steps": 3,
    "warmup": 1,
    "limit": 4,
    "require_r1": 0,
    "device": "cpu",
    "dtype": "fp32",
    "wandb": "disabled",
    "workers": 1,
    "eval_interval": 0,
    "log_interval": 1,
    "muon_lr": 5e-4,
}
MODES = ("adaln", "sta", "concat", "cross")


@pytest.fixture(scope="module")
def clip_tower(tmp_path_factory):
    """A tiny random image tower of CLIP, saved as published ones are."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    transformers.CLIPVisionModelWithProjection(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shapes(clip_tower, tmp_path_factory):
    """The knobs of a prepared corpus: two pictures of each of eight kinds, described by noise, above a stage
    1 that has learned nothing.
    """
    root, lines = tmp_path_factory.mktemp("shapes"), []
    for n in range(24):
        label = "-".join(
            names[n >> k & 1]
            for k, names in enumerate((("red", "blue"), ("square", "bar"), ("left", "right")))
        )
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[8 : 24 if n & 2 else 14, 18 * (n >> 2 & 1) :][:, :14] = (
            (30, 30, 220) if n & 1 else (220, 30, 30)
        )
        Image.fromarray(picture + np.uint8(n)).save(root / f"{n}.png")
        soundfile.write(root / f"{n}.wav", speech(n).numpy(), 16000)
        split = "train" if n < 16 else "val"
        lines.append(
            {
                "picture": f"{n}.png",
                "wav": f"{n}.wav",
                "text": label,
                "split": split,
                "voice": "",
                "label": label,
            }
        )
    (root / "captions-en.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage1 = system.load_config(
        "",
        options(
            {
                "system": "speech_align",
                "speech": "scratch",
                "image": clip_tower,
                "width": 32,
                "layers": 1,
                "heads": 2,
            }
        ),
    )
    torch.manual_seed(0)
    network = wake(align.SpeechAlign(stage1))
    (root / "stage1" / "checkpoints").mkdir(parents=True)
    torch.save(
        {"config": config.to_dict(stage1), "model": network.state_dict(), "ema": {}, "step": 1},
        root / "stage1" / "checkpoints" / "step_0000001.pt",
    )
    knobs = TINY | {"data_dir": root, "stage1": root / "stage1", "image": clip_tower}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        image.SpeechImage.prepare(system.load_config("", options(knobs)))
        yield knobs


@pytest.fixture(scope="module")
def corpus(shapes):
    return SpokenImageCorpus(system.load_config("", options(shapes)))


@pytest.fixture(scope="module")
def vqmodel(tmp_path_factory):
    """A tiny random VQModel, saved as published ones are: 4 x 4 pixels a code, 40 codes."""
    from diffusers import VQModel

    folder = tmp_path_factory.mktemp("vq")
    torch.manual_seed(0)
    VQModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=40,
        vq_embed_dim=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vqvae")
    return folder


def build(knobs: dict) -> image.SpeechImage:
    return system.build(system.load_config("", options(knobs)))


def wake(network: torch.nn.Module) -> torch.nn.Module:
    """With no weight at zero, so that everything that is connected can be seen."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def speech(seed: int = 0, seconds: float = 1.0) -> torch.Tensor:
    return torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(seed)) * 0.1


# The Transformer


def test_stas_configuration_has_its_number_of_parameters():
    """493.1 M that live; the published network drags 24.9 M along that its forward pass never reads."""
    c = system.load_config(str(ROOT / "configs" / "speech_image.yaml"))
    with torch.device("meta"):
        network = image.build_transformer(c, 1024)
    assert (
        c.codes.condition == "sta" and round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 493.1
    )


def test_sta_needs_an_embedding_twice_as_wide_as_the_network():
    with pytest.raises(config.UserError, match="model.width 32"):
        image.build_transformer(system.load_config("", options(TINY | {"condition": "sta"})), 256)


def test_a_grid_convolution_is_the_convolution_of_the_picture():
    torch.manual_seed(0)
    ours, theirs, x = TokenConv2d(3, 5), torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 16, 3)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.view(5, 3, 3, 3))
        theirs.bias.copy_(ours.bias)
    assert torch.allclose(
        ours(x), theirs(x.transpose(1, 2).view(2, 3, 4, 4)).flatten(2).transpose(1, 2), atol=1e-6
    )


def test_stas_block_is_the_published_one():
    """The embedding's halves scale and shift the LayerNorm before the convolutions, nothing else; the step
    that before attention.
    """
    torch.manual_seed(0)
    block = wake(Block(32, 2, 2, 100, "sta", 64))
    x, t, s = torch.randn(3, 16, 32), torch.tensor([1, 7, 100]), torch.randn(3, 64)
    attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
        attention.in_proj_bias.copy_(torch.cat([block.q.bias, block.k.bias, block.v.bias]))
        attention.out_proj.load_state_dict(block.out.state_dict())
        scale, shift = block.by_time_out(F.silu(block.by_time.weight[t - 1])).split(32, -1)
        h = torch.nn.LayerNorm(32, elementwise_affine=False)(x) * (1 + scale[:, None]) + shift[:, None]
        wanted = x + attention(h, h, h, need_weights=False)[0]
        h = torch.nn.LayerNorm(32, elementwise_affine=False)(wanted) * (1 + s[:, None, :32]) + s[:, None, 32:]
        h = block.up(h)
        wanted = wanted + block.down(h * torch.sigmoid(1.702 * h))
        assert torch.allclose(block(x, t, s), wanted, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_condition_is_heard_in_every_token_and_one_that_is_dropped_is_not(mode):
    c = system.load_config("", options(TINY | {"condition": mode, "condition_scale": 1.0}))
    network, x = (
        wake(image.build_transformer(c, 64)),
        torch.randint(65, (2, 64), generator=torch.Generator().manual_seed(0)),
    )
    one, other, t = torch.randn(2, 64), torch.randn(2, 64), torch.tensor([3, 90])

    def made(embedding: torch.Tensor, dropped: bool) -> torch.Tensor:
        return network(x, t, network.embed_condition(embedding, torch.tensor([dropped] * 2)))

    assert ((made(one, False) - made(other, False)).abs().amax(-1) > 1e-4).all()
    assert made(one, True).equal(made(other, True))


@pytest.mark.parametrize("mode", ["adaln", pytest.param("sta", marks=pytest.mark.slow)])
def test_eight_grids_are_overfitted_and_found_by_their_conditions(mode):
    """With a neighbour's condition the neighbour's grid comes."""
    torch.manual_seed(0)
    c = system.load_config("", options(TINY | {"condition": mode, "width": 64, "kept": 32}))
    process, network = diffusion.MaskAndReplaceDiffusion(32, 100, 0.99999), image.build_transformer(c, 128)
    grids, conditions = torch.randint(32, (8, 64)), F.normalize(torch.randn(8, 128), dim=-1)
    hidden = [
        layer.weight
        for block in network.blocks
        for name, layer in block.named_children()
        if isinstance(layer, torch.nn.Linear) and not name.startswith("by_")
    ]
    rest = [p for p in network.parameters() if all(p is not weight for weight in hidden)]
    optimizers = [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]
    for _ in range(100):
        rows, t = torch.randint(8, (16,)), torch.randint(1, 101, (16,))
        x_t = process.q_sample(grids[rows], t, torch.rand(16, 64), torch.randint(32, (16, 64)))
        logits = network(x_t, t, network.embed_condition(conditions[rows], torch.zeros(16, dtype=torch.bool)))
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), grids[rows].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()

    @torch.no_grad()
    def made(order: torch.Tensor) -> torch.Tensor:
        condition = network.embed_condition(conditions[order], torch.zeros(8, dtype=torch.bool))
        return process.sample(lambda x_t, t: network(x_t, t, condition), torch.rand(11, 8, 64))

    order = torch.arange(8)
    assert (made(order) == grids).float().mean() > 0.98
    assert (made(order.roll(1)) == grids).float().mean() < 0.15


# The system


def test_the_loss_begins_at_the_logarithm_of_the_codes(shapes, corpus):
    network = build(shapes)
    found = network(ImageBatches(network.config, corpus, None).train(0))
    assert abs(found["code_loss"].item() - math.log(64)) < 1e-4
    assert found["flow_loss_per_clip"].shape == (4,)


def test_validation_is_the_bound_at_even_steps_and_leaves_no_trace(shapes, corpus):
    network = build(shapes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batches = ImageBatches(network.config, corpus, None)
    with torch.no_grad():
        first, again = ([network(batch)["loss"] for batch in batches.validation()] for _ in range(2))
    assert first == again and all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_a_batch_has_codes_and_embeddings_alone_and_training_wakes_none_of_the_frozen_networks(
    shapes, corpus
):
    network = build(shapes)
    batch = ImageBatches(network.config, corpus, None).train(3)
    network(batch)["loss"].backward()
    assert batch.keys() == {"x", "u", "other", "t", "embedding", "dropped", "frames", "new_update"}
    assert not {"stage1", "autoencoder", "image_encoder", "classifier", "corpus"} & network.__dict__.keys()
    assert all(p.grad is not None for p in network.parameters())


def test_a_description_is_trained_on_with_pictures_of_its_label_and_validated_on_its_own(shapes, corpus):
    batches = ImageBatches(system.load_config("", options(shapes)), corpus, None)
    clip = corpus.clips("train")[0]
    alike = {tuple(batches.codes[n].tolist()) for n in batches.pictures_by_label[corpus.label_number(clip)]}
    rows = [batches.row(clip, np.random.default_rng(n)) for n in range(8)]
    assert all(tuple(row["x"].tolist()) in alike for row in rows)
    assert batches.row(clip, np.random.default_rng(0), 0.5)["x"].equal(
        batches.codes[corpus.picture_number(clip)]
    )


def test_micro_batches_make_the_gradient_and_the_important_times_of_the_whole(shapes, corpus):
    def trained(size: int, parts: int) -> image.SpeechImage:
        network = build(shapes | {"batch_size": size, "grad_accum": parts})
        batches = ImageBatches(network.config, corpus, None)
        for step in range(2):
            for micro in range(parts):
                (network(batches.train(step, micro))["loss"] / parts).backward()
        return network

    whole, parts = trained(8, 1), trained(2, 4)
    assert (
        whole.times.pending.allclose(parts.times.pending)
        and whole.times.hits.equal(parts.times.hits)
        and whole.times.hits.sum() == 8
    )
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * a.grad.abs().max() + 1e-6), name


def rank_of_two(rank: int, port: int, knobs: dict, halves: list[dict], path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    network = image.SpeechImage(system.load_config("", options(knobs)))
    network.load_state_dict(torch.load(f"{path}/start.pt"))
    model = torch.nn.parallel.DistributedDataParallel(network)
    model(halves[rank])["loss"].backward()
    if rank == 1:  # what rank 0 has, it may have had before the reduction
        torch.save(
            {"grads": {n: p.grad for n, p in network.named_parameters()}, "pending": network.times.pending},
            f"{path}/rank.pt",
        )
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one_process_with_the_double_batch(shapes, corpus, tmp_path):
    network = wake(build(shapes))
    torch.save(network.state_dict(), tmp_path / "start.pt")
    halves = [ImageBatches(network.config, corpus, None, rank, 2).train(0) for rank in range(2)]
    torch.multiprocessing.spawn(
        rank_of_two, (29000 + np.random.default_rng().integers(2000), shapes, halves, str(tmp_path)), nprocs=2
    )
    double = dataclasses.replace(
        network.config, train=dataclasses.replace(network.config.train, batch_size=8)
    )
    network(ImageBatches(double, corpus, None).train(0))["loss"].backward()
    found = torch.load(tmp_path / "rank.pt")
    assert found["pending"].allclose(network.times.pending) and found["pending"][0].sum() == 8
    for name, p in network.named_parameters():
        assert torch.allclose(found["grads"][name], p.grad, atol=1e-4 * p.grad.abs().max() + 1e-6), name


def test_resumed_is_bit_for_bit_uninterrupted(shapes, tmp_path):
    knobs = shapes | {"steps": 4, "save_interval": 2}
    call(train, *options(knobs | {"out_dir": tmp_path / "whole"}))
    (tmp_path / "parts" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "step_0000002.pt", tmp_path / "parts" / "checkpoints")
    call(train, *options(knobs | {"out_dir": tmp_path / "parts"}))
    whole, parts = (
        torch.load(tmp_path / run / "checkpoints" / "step_0000004.pt", weights_only=True)
        for run in ("whole", "parts")
    )
    assert whole["model"]["times.hits"].sum() == 12  # those of the last step are pending
    for part in ("model", "ema"):
        assert all(value.equal(parts[part][name]) for name, value in whole[part].items()), part


def test_a_picture_depends_on_its_own_speech_and_seed(shapes):
    network = wake(build(shapes)).eval()
    prompts = [
        Prompt("", seed=seed, speech=speech(voice)) for seed, voice in ((1, 0), (2, 0), (1, 0), (1, 5))
    ]
    together, alone = (
        network.sample(prompts, network.config.sample),
        network.sample(prompts[:1], network.config.sample),
    )
    assert torch.allclose(together[0].picture, alone[0].picture, atol=1e-5) and together[0].picture.equal(
        together[2].picture
    )
    assert not together[0].picture.equal(together[1].picture)
    assert together[0].picture.shape == (3, 32, 32) and together[0].nearest.shape[1:] == (3, 32, 32)


def test_what_is_made_is_judged_and_summed_up_in_known_scores(shapes, corpus, tmp_path):
    network, clips = build(shapes), corpus.clips("val")[:6]
    made = [network.reference(corpus, clip) for clip in clips]
    matches = {"colour_match", "shape_match", "place_match", "all_match"}
    assert all(set(network.score(a, corpus, clip)) == matches for a, clip in zip(made, clips))
    features = evaluator.stack_features([network.features(a, corpus, clip) for a, clip in zip(made, clips)])
    found = network.summarize(features, tmp_path)
    assert matches | found.keys() <= network.scores.keys() and found["chance"] == 1 / 8
    assert {"recall_1", "recall_made_1"} <= found.keys() and (tmp_path / "summary.png").exists()


class Inception(torch.nn.Module):
    """The signature of the published inception-2015-12-05.pt."""

    def forward(
        self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        pixels = img.float().mean((2, 3))
        return pixels if return_features else pixels.softmax(-1)


def test_fid_is_of_what_a_torchscript_file_sees_and_zero_for_the_real_pictures(shapes, corpus, tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    network, clips = build(shapes | {"eval.features": tmp_path / "inception.pt"}), corpus.clips("val")[:6]
    made = [
        dataclasses.replace(
            network.reference(corpus, clip), picture=corpus.read_picture(corpus.picture_number(clip))
        )
        for clip in clips
    ]
    features = evaluator.stack_features([network.features(a, corpus, clip) for a, clip in zip(made, clips)])
    found = network.summarize(features, None)
    assert abs(found["fid"]) < 1e-3 and found["inception_score"] >= 1
    with pytest.raises(config.UserError, match="TorchScript"):
        vision.load_fid_network(str(ROOT / "nowhere.pt"), torch.device("cpu"))


# What it stands on


def test_a_stage_1_that_did_not_learn_is_refused(shapes, corpus):
    c = system.load_config("", options(shapes | {"require_r1": 0.99}))
    for begin in (lambda: image.SpeechImage.prepare(c), lambda: ImageBatches(c, SpokenImageCorpus(c), None)):
        with pytest.raises(config.UserError, match=r"R@1.*0.99"):
            begin()


def test_a_stage_1_that_is_not_there_is_named(shapes, corpus):
    with pytest.raises(config.UserError, match="nowhere"):
        image.SpeechImage.prepare(system.load_config("", options(shapes | {"stage1": "nowhere"})))


def test_a_published_codebook_is_pruned_to_the_codes_in_use(shapes, corpus, vqmodel):
    """A kept code decodes as diffusers decodes it; another becomes the kept one that is nearest to it."""
    from diffusers import VQModel

    c, theirs = (
        system.load_config("", options(shapes | {"vq": vqmodel, "kept": 9})),
        VQModel.from_pretrained(vqmodel, subfolder="vqvae").eval(),
    )
    corpus = SpokenImageCorpus(c)
    save_tensors(codes_file(corpus), encode_pictures(corpus, load_autoencoder(corpus)))
    codes, kept = read_codes(corpus)
    number = corpus.gallery("train")[0]
    with torch.no_grad():
        latents = theirs.encode(2 * corpus.read_picture(number)[None] - 1).latents
        ids, book = theirs.quantize(latents)[2][2].flatten(), theirs.quantize.embedding.weight
        wanted = torch.cdist(book[ids], book[kept]).argmin(-1)
        picture = theirs.decode(
            theirs.quantize.get_codebook_entry(kept[codes[number]], (1, 8, 8, 4)), force_not_quantize=True
        ).sample
    assert codes.shape == (len(corpus.picture_paths), 64) and len(kept) == 9 and codes.max() < 9
    assert codes[number].equal(wanted)
    made = system.build(c).autoencoder.module.decode(codes[number][None])
    assert torch.allclose(made, ((picture + 1) / 2).clamp(0, 1), atol=1e-5)


def test_a_codebook_that_does_not_fit_or_cannot_be_had_is_refused(shapes, corpus):
    c = system.load_config("", options(shapes | {"kept": 65}))
    with pytest.raises(config.UserError, match="64 codes"):
        encode_pictures(SpokenImageCorpus(c), load_autoencoder(corpus))
    with pytest.raises(config.UserError, match="codes.vq nowhere"):
        DiffusersVQ("nowhere")


def test_a_stage_1_of_another_image_tower_is_refused(shapes, clip_tower, tmp_path):
    transformers.CLIPVisionModelWithProjection.from_pretrained(clip_tower).save_pretrained(tmp_path)
    with pytest.raises(config.UserError, match="was trained against"):
        image.SpeechImage.prepare(system.load_config("", options(shapes | {"image": tmp_path})))
