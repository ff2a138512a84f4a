"""Stage 1 of pictures from speech: the contrast, both front ends, corpora as published and drawn on the spot,
batches, what is found.
"""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import transformers
from conftest import call, options
from PIL import Image

import config
import evaluator
import sample
import system
import train as train_module
from base import Prompt
from corpora import shards
from speech2image import align, image, retrieval, vision
from speech2image.batches import AlignBatches
from speech2image.data import SpokenImageCorpus, parse_clip_id, resize_and_crop
from speech2image.speech import info_nce, spec_augment
from speech2image.stage import PictureOutput

RATE = 16000
SHAPES = {
    "system": "speech_align",
    "corpus": "shapes",
    "sentences": 24,
    "max_seconds": 8,
    "speech": "scratch",
    "image": "scratch",
    "width": 32,
    "layers": 1,
    "heads": 2,
    "batch_size": 8,
    "limit": 8,
    "device": "cpu",
    "dtype": "fp32",
    "wandb": "disabled",
    "workers": 1,
    "pad_multiple": 8,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The knobs of a prepared corpus of shapes: 24 descriptions to train on."""
    root = tmp_path_factory.mktemp("shapes")
    knobs = SHAPES | {"data_dir": root / "shapes"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        align.SpeechAlign.prepare(system.load_config("", options(knobs)))
        yield knobs


@pytest.fixture(scope="module")
def corpus(shapes):
    return SpokenImageCorpus(system.load_config("", options(shapes)))


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A tiny random HuBERT of the large ones' kind, saved as published ones are."""
    folder = tmp_path_factory.mktemp("hubert")
    torch.manual_seed(0)
    shape = transformers.HubertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    transformers.HubertModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_tower(tmp_path_factory):
    """A tiny random image tower of CLIP, saved as published ones are."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    transformers.CLIPVisionModelWithProjection(shape).save_pretrained(folder)
    return folder


def network(knobs: dict) -> align.SpeechAlign:
    """With random weights, also where training starts at 0."""
    torch.manual_seed(0)
    made = align.SpeechAlign(system.load_config("", options(knobs)))
    torch.nn.init.normal_(made.proj.weight)
    return made


def speech(seconds: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed)) * 0.1


# The contrast


def test_contrast_of_what_is_all_alike_is_log_b():
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert abs(info_nce(same, same, torch.arange(6), torch.tensor(14.0)).item() - math.log(6)) < 1e-6


def test_contrast_at_initialisation_is_log_b(corpus, shapes):
    batch = AlignBatches(system.load_config("", options(shapes | {"batch_size": 24})), corpus, None).train(0)
    assert len(batch["label"].unique()) == 24
    assert (
        abs(align.SpeechAlign(system.load_config("", options(shapes)))(batch)["loss"].item() - math.log(24))
        < 1e-5
    )


def test_contrast_equals_its_definition_and_masks_what_means_the_same():
    torch.manual_seed(0)
    s, v, label, scale = (
        F.normalize(torch.randn(5, 8), dim=-1),
        F.normalize(torch.randn(5, 8), dim=-1),
        torch.tensor([0, 1, 0, 2, 1]),
        5.0,
    )
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or label[j] != label[i]]
        for a, b in ((s, v), (v, s)):
            total += (
                math.log(sum(math.exp(scale * (a[i] @ b[j]).item()) for j in others))
                - scale * (a[i] @ b[i]).item()
            )
    assert abs(info_nce(s, v, label, torch.tensor(scale)).item() - total / 10) < 1e-5


def rank_of_two(rank: int, port: int, knobs: dict, batch: dict, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(network(knobs))
    half = {key: value.chunk(2)[rank] for key, value in batch.items()}
    loss = model(half)["loss"]
    loss.backward()
    torch.save(
        {"loss": loss.detach()} | {name: p.grad for name, p in model.module.named_parameters()},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradient_of_one_with_the_double_batch(corpus, shapes, tmp_path):
    batch, free = (
        AlignBatches(system.load_config("", options(shapes)), corpus, None).train(0),
        29400 + hash(str(tmp_path)) % 500,
    )
    torch.multiprocessing.spawn(rank_of_two, (free, shapes, batch, str(tmp_path)), nprocs=2)
    alone = network(shapes)
    loss = alone(batch)["loss"]
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(found["loss"], loss, atol=1e-6)
        for name, p in alone.named_parameters():
            assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-6), name


# The network


def test_padding_never_reaches_an_embedding(shapes, hubert):
    short, long = speech(0.5), speech(1.3, seed=1)
    for knobs in (shapes, shapes | {"speech": hubert}):
        found = network(knobs).eval()
        assert torch.allclose(found.embed_speech([short])[0], found.embed_speech([short, long])[0], atol=2e-5)
        assert (found.embed_speech([short])[0] - found.embed_speech([long])[0]).abs().max() > 1e-3


def test_hubert_is_the_one_that_was_saved_frozen_and_its_layers_are_averaged_at_first(shapes, hubert):
    found, wave = network(shapes | {"speech": hubert}), speech(0.7)[None]
    whole = torch.ones_like(wave, dtype=torch.bool)
    reference = transformers.HubertModel.from_pretrained(hubert).eval()
    with torch.no_grad():
        layers = reference(wave, output_hidden_states=True).hidden_states
    expected = torch.stack([F.layer_norm(layer, layer.shape[-1:]) for layer in layers]).mean(0)
    h, mask = found.train().front(wave, whole, torch.zeros(1, 2, 0, 2))
    assert len(layers) == 4 and mask.all() and torch.allclose(h, expected, atol=1e-5)
    assert not any("hubert" in name for name in found.state_dict())
    found.embed_speech([wave[0]])
    loss = found.encode(wave, whole, torch.zeros(1, 2, 0, 2))[0, 0]
    loss.backward()
    assert found.front.weights.grad.abs().sum() > 0 and all(
        p.grad is None for p in found.front.hubert.module.parameters()
    )


def test_hidden_stretches_of_time_and_channels_are_as_drawn():
    torch.manual_seed(0)
    h, mask = torch.randn(2, 10, 8), torch.arange(10) < torch.tensor([[10], [5]])
    hidden = torch.tensor([[[[0.2, 0.5]], [[0.0, 0.25]]], [[[0.2, 0.6]], [[0.5, 0.5]]]])
    found = spec_augment(h, mask, hidden)
    expected = h.clone()
    # shares of 10 and of 5 frames; nothing of the second's channels
    expected[0, 2:5], expected[0, :, :2], expected[1, 1:3] = 0, 0, 0
    assert torch.equal(found, expected)


def test_clip_sees_as_its_own_processor_prepares(clip_tower):
    tower = vision.ClipImageEncoder(str(clip_tower)).eval()
    reference = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_tower).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prepared = (
        torch.from_numpy(pixels) / 255 - torch.tensor(transformers.image_utils.OPENAI_CLIP_MEAN)
    ) / torch.tensor(transformers.image_utils.OPENAI_CLIP_STD)
    with torch.no_grad():
        expected = F.normalize(reference(prepared.permute(2, 0, 1)[None]).image_embeds, dim=-1)
        found = tower(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_width_of_the_space_follows_the_image_tower(shapes, clip_tower):
    assert network(shapes).embed_speech([speech(0.5)]).shape == (1, 256)
    assert network(shapes | {"image": clip_tower}).embed_speech([speech(0.5)]).shape == (1, 24)


def test_what_is_no_hubert_and_no_clip_is_refused_in_one_line(shapes, clip_tower, tmp_path):
    for knobs in ({"speech": tmp_path}, {"speech": clip_tower}, {"image": tmp_path}):
        with pytest.raises(config.UserError, match="align|no such file"):
            network(shapes | knobs)


def test_a_picture_is_scaled_and_cut_to_its_middle():
    picture = torch.zeros(3, 20, 40)
    picture[:, :, 10:30] = 1
    assert resize_and_crop(picture, 20).shape == (3, 20, 20) and resize_and_crop(picture, 20).min() == 1
    assert resize_and_crop(picture, 10).shape == (3, 10, 10)
    assert resize_and_crop(torch.rand(2, 3, 7, 5), 16).shape == (2, 3, 16, 16)


# Figures


def test_retrieval_is_what_counting_gives():
    rng = np.random.default_rng(0)
    s, v = rng.standard_normal((12, 4)), rng.standard_normal((6, 4))
    picture = np.repeat(np.arange(6), 2)
    label, group = picture // 2, np.array(["en f3", "ar f3"] * 6)
    found = retrieval.retrieval(
        {"speech": s, "image": v[picture], "picture": picture, "label": label, "group": group}, "speech"
    )
    for k in (1, 5):
        hits = [any(label[2 * j] == label[i] for j in np.argsort(-v @ s[i])[:k]) for i in range(12)]
        back = [any(label[i] == label[2 * j] for i in np.argsort(-s @ v[j])[:k]) for j in range(6)]
        assert found[f"recall_{k}"] == np.mean(hits) and found[f"recall_back_{k}"] == np.mean(back)
        if k == 1:
            assert (
                found["recall_1/en"] == np.mean(hits[::2])
                and found["recall_1/ar"] == np.mean(hits[1::2])
                and "recall_1/f3" not in found
            )
            assert found["language_gap"] == pytest.approx(
                1
                - min(np.mean(hits[::2]), np.mean(hits[1::2])) / max(np.mean(hits[::2]), np.mean(hits[1::2]))
            )
    assert found["cos_matched"] == pytest.approx((s * v[picture]).sum(1).mean())


def test_speech_that_is_its_picture_is_found_and_leaves_no_gap(tmp_path):
    v = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    numbers = np.arange(8)
    found = retrieval.retrieval(
        {"speech": v, "image": v, "picture": numbers, "label": numbers, "group": np.array(["en"] * 8)},
        "speech",
    )
    assert (
        found["recall_1"] == found["recall_back_1"] == 1
        and found["modality_gap"] == 0
        and abs(found["cos_unmatched"]) < 1e-9
    )
    retrieval.draw_embedding_space(v, v, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").stat().st_size > 1000


def spoken() -> dict[str, np.ndarray]:
    """Features of eight descriptions, two of each of four pictures, as far apart as can be.

    The last one is taken for another's.
    """
    numbers = np.arange(8) // 2
    space = np.eye(8)[:4]
    speech = space[numbers]
    speech[-1] = space[0]
    groups = np.array(["en f3", "ar m3"] * 4)
    return {"speech": speech, "image": space[numbers], "picture": numbers, "label": numbers, "group": groups}


def test_retrieval_counts_right_pictures_by_language_and_voice_and_each_picture_once(shapes, tmp_path):
    found = network(shapes).summarize(spoken(), tmp_path)
    assert found["recall_1"] == 7 / 8 and found["recall_10"] == 1
    assert found["recall_1/en"] == found["recall_1/f3"] == 1
    assert found["recall_1/ar"] == found["recall_1/m3"] == 3 / 4
    assert found["language_gap"] == 1 / 4 and found["recall_back_1"] == 1
    # 1 of 8 * 3 unmatched pairs is alike
    assert found["cos_matched"] == 7 / 8 and found["cos_unmatched"] == pytest.approx(1 / 24)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_generated_pictures_are_found_again_beside_the_speech_they_came_from(shapes):
    knobs = {key: value for key, value in shapes.items() if key not in ("speech", "pad_multiple")}
    generating = image.SpeechImage(system.load_config("", options(knobs | {"system": "speech_image"})))
    features = spoken()
    features |= {"generated": features["image"], "chance": np.full(8, 1 / 120)}
    found = generating.summarize(features, None)
    assert found["recall_made_1"] == 1 and found["chance"] == pytest.approx(1 / 120)
    of_speech = retrieval.retrieval(features, "speech")
    of_generated = retrieval.retrieval(features, "generated")
    assert of_speech != of_generated
    again = {f"recall_made_{k}": of_generated[f"recall_{k}"] for k in (1, 5, 10)}
    assert found == of_speech | {"chance": found["chance"]} | again


# Corpora


def test_shapes_hold_voices_and_combinations_back(corpus):
    train, val, test = map(corpus.clips, shards.SPLITS)
    voices = [{clip.group.split()[1] for clip in clips} for clips in (train, val, test)]
    assert not voices[0] & voices[1] and not voices[0] & voices[2] and not voices[1] & voices[2]
    label = {clip: corpus.labels[parse_clip_id(clip)[1]] for clip in corpus.all_clips}
    assert len({label[clip] for clip in val}) == len({label[clip] for clip in test}) == 120
    new = {label[clip] for clip in val if clip.group.endswith("new")}
    assert len(new) == 20 and not new & {label[clip] for clip in train}
    pairs = [
        {(i, j, *(name.split("-")[k] for k in (i, j))) for name in names for i in range(3) for j in range(i)}
        for names in (new, {label[clip] for clip in val if clip.group.endswith("known")})
    ]
    # each pair of a new combination's attributes is known
    assert pairs[0] <= pairs[1]
    assert all(corpus.read_picture(corpus.picture_number(clip)).shape == (3, 32, 32) for clip in val[:3])


def test_a_batch_holds_no_text_and_is_a_function_of_its_step(corpus, shapes):
    c = system.load_config("", options(shapes))
    batches = AlignBatches(c, corpus, None)
    first, again, later = batches.train(3), AlignBatches(c, corpus, None).train(3), batches.train(4)
    assert set(first) == {"wave", "wave_mask", "hidden", "image", "label", "frames", "t"}
    assert not [name for name, value in first.items() if value.dtype == torch.float64]  # Metal has none
    assert all(torch.equal(first[key], again[key]) for key in first) and not torch.equal(
        first["label"], later["label"]
    )
    half = system.load_config("", options(shapes | {"batch_size": 4}))
    halves = [AlignBatches(half, corpus, None, rank, 2).train(3) for rank in range(2)]
    assert torch.equal(torch.cat([half["hidden"] for half in halves]), first["hidden"])
    assert torch.equal(torch.cat([half["image"] for half in halves]), first["image"])


def test_validation_is_whole_and_the_same_for_any_number_of_ranks(corpus, shapes):
    c = system.load_config("", options(shapes | {"global_batch": 50, "batch_size": 0}))
    whole = AlignBatches(system.settle_batch(c, 1), corpus, None).validation()
    half = system.settle_batch(c, 2)
    shared = [AlignBatches(half, corpus, None, rank, 2).validation() for rank in range(2)]
    assert sum(len(batch["t"]) for batch in whole) == 240 and not any(
        batch["hidden"].any() for batch in whole
    )
    assert [batch["label"].tolist() for batch in whole[::2]] == [
        batch["label"].tolist() for batch in shared[0]
    ]
    assert [batch["label"].tolist() for batch in whole[1::2]] == [
        batch["label"].tolist() for batch in shared[1]
    ]


def write_own(root, lines: list[dict]) -> None:
    """A list of one's own, a recording and a picture for each line that has none yet."""
    for n, line in enumerate(lines):
        (root / line["picture"]).parent.mkdir(parents=True, exist_ok=True)
        if not (root / line["picture"]).exists():
            Image.fromarray(np.full((8, 12, 3), 9 * n % 255, np.uint8)).save(root / line["picture"])
        if not (root / line["wav"]).exists():
            soundfile.write(root / line["wav"], speech(0.4, seed=n).numpy(), RATE)
    for language in {line["lang"] for line in lines}:
        (root / f"captions-{language}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines if line["lang"] == language)
        )


def own_line(n: int, lang: str = "en", split: str = "train") -> dict:
    return {
        "picture": f"{n}.png",
        "wav": f"{lang}{n}.wav",
        "text": f"number {n}",
        "split": split,
        "voice": "",
        "label": "",
        "lang": lang,
    }


def test_every_language_is_drawn_equally_often(shapes, clip_tower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_own(
        tmp_path,
        [own_line(n) for n in range(12)]
        + [own_line(n, "ar") for n in range(3)]
        + [own_line(20, split="val")],
    )
    c = system.load_config(
        "",
        options(
            shapes | {"corpus": "listed", "data_dir": tmp_path, "langs": "[en, ar]", "image": clip_tower}
        ),
    )
    align.SpeechAlign.prepare(c)
    corpus = SpokenImageCorpus(c)
    drawn = [clip.group for clip in corpus.clips("train")]
    assert drawn.count("en") == drawn.count("ar") == 12
    batches, seen = AlignBatches(c, corpus, None), []
    for step in range(3):  # an epoch
        seen += batches.train(step)["label"].tolist()
    # once in English, four times in Arabic
    assert len(seen) == 24 and all(seen.count(label) == 5 for label in range(3))


def test_bad_pictures_and_bad_speech_are_left_out_by_name(shapes, clip_tower, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "5.png").write_text("no picture")
    soundfile.write(tmp_path / "en6.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "en7.wav", speech(0.05).numpy(), RATE)
    soundfile.write(tmp_path / "en8.wav", speech(61).numpy(), RATE)
    soundfile.write(tmp_path / "en9.wav", speech(1, seed=3).view(-1, 2).repeat(1, 1).numpy(), 8000)
    write_own(tmp_path, [own_line(n) for n in range(12)] + [own_line(12, split="val")])
    c = system.load_config(
        "", options(shapes | {"corpus": "listed", "data_dir": tmp_path, "image": clip_tower})
    )
    align.SpeechAlign.prepare(c)
    printed, clips = capfd.readouterr().out, {clip.text: clip for clip in SpokenImageCorpus(c).clips("train")}
    assert all(f"skipped :{n}.png" in printed for n in (5, 6, 7)) and "1 too long" in printed
    assert sorted(clips) == sorted(f"number {n}" for n in range(12) if n not in (5, 6, 7, 8))
    # 8 kHz stereo: half as many samples a channel, at twice the rate
    assert clips["number 9"].frames == 50
    write_own(tmp_path, [own_line(n) for n in range(11)] + [own_line(12, split="val")])
    for lines, fault in (
        (None, "another corpus"),
        ('{"picture": "1.png"}\n', "line 1"),
        (
            '{"picture": "", "wav": "", "text": 5, "split": "train", "voice": "", "label": ""}\n',
            "a text as text",
        ),
        ("no list", "damaged"),
    ):
        if lines:
            (tmp_path / "captions-en.jsonl").write_text(lines)
        with pytest.raises(config.UserError, match=fault):
            align.SpeechAlign.prepare(c)


def test_flickr8k_is_read_as_published(shapes, clip_tower, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "flickr"
    for folder in ("Flicker8k_Dataset", "Flickr8k_text", "flickr_audio/wavs"):
        (root / folder).mkdir(parents=True)
    pictures, listing, tokens = ["1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg"], [], []
    for number, name in enumerate(pictures):
        Image.fromarray(np.full((20, 30, 3), 50 * number, np.uint8)).save(root / "Flicker8k_Dataset" / name)
        for n in range(2):
            wav = f"{name[:-4]}_{n}.wav"
            soundfile.write(root / "flickr_audio/wavs" / wav, speech(0.5, seed=n).numpy(), RATE)
            listing.append(f"{wav} {name} #{n}")
            tokens.append(f"{name}#{n}\tCaption {n} of {name} .")
    (root / "flickr_audio/wav2capt.txt").write_text("\n".join([*listing, "9_x_0.wav 9_x.jpg #0"]))
    (root / "Flickr8k_text/Flickr8k.token.txt").write_text("\n".join(tokens))
    for part, names in (("train", pictures[:2]), ("dev", pictures[2:3]), ("test", pictures[3:])):
        (root / f"Flickr8k_text/Flickr_8k.{part}Images.txt").write_text("\n".join(names) + "\n")
    c = system.load_config(
        "", options(shapes | {"corpus": "flickr8k", "data_dir": root, "image": clip_tower})
    )
    align.SpeechAlign.prepare(c)
    corpus = SpokenImageCorpus(c)
    assert [len(corpus.clips(split)) for split in shards.SPLITS] == [4, 2, 2]
    clip = corpus.clips("val")[1]
    assert (
        clip.text == "Caption 1 of 3_c.jpg ."
        and corpus.picture_paths[corpus.picture_number(clip)] == "Flicker8k_Dataset/3_c.jpg"
    )
    assert (
        corpus.label_number(clip)
        == corpus.label_number(corpus.clips("val")[0])
        != corpus.label_number(corpus.clips("test")[0])
    )
    assert corpus.read_picture(corpus.picture_number(clip), 16).shape == (3, 16, 16) and corpus.wave(
        clip
    ).shape == (8000,)


def test_s2igan_is_read_as_published_and_its_pickles_are_not_run(
    shapes, clip_tower, tmp_path, monkeypatch, capfd
):
    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    monkeypatch.chdir(tmp_path)
    root, names = (
        tmp_path / "birds",
        {"train": [f"001.Black/Black_{n:04d}_{n}" for n in range(40)], "test": ["151.Red/Red_0001_9"]},
    )
    for split, keys in names.items():
        (root / split).mkdir(parents=True)
        (root / split / "filenames.pickle").write_bytes(pickle.dumps([*keys, Bomb()]))
        for key in keys:
            for folder in (root / "CUB_200_2011/images" / key).parent, root / "CUB_200_2011/audio" / key:
                folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / f"CUB_200_2011/images/{key}.jpg")
            soundfile.write(root / f"CUB_200_2011/audio/{key}/0.wav", speech(0.2).numpy(), RATE)
    c = system.load_config("", options(shapes | {"corpus": "s2igan", "data_dir": root, "image": clip_tower}))
    align.SpeechAlign.prepare(c)
    corpus = SpokenImageCorpus(c)
    counts = [len(corpus.clips(split)) for split in shards.SPLITS]
    assert counts == [38, 2, 1] and corpus.clips("test")[0].text == "Red_0001_9"
    assert "executed" not in capfd.readouterr().out


# What is found


def test_the_rule_sees_in_every_picture_of_the_corpus_what_its_label_says(corpus, shapes):
    made = image.SpeechImage(
        system.load_config(
            "",
            options(
                {key: value for key, value in shapes.items() if key not in ("speech", "pad_multiple")}
                | {"system": "speech_image"}
            ),
        )
    )
    clips = corpus.clips("val") + corpus.clips("test")
    nothing = torch.zeros(0)
    found = []
    for clip, other in zip(clips, clips[1:] + clips[:1]):
        own = PictureOutput(nothing, RATE, corpus.read_picture(corpus.picture_number(clip)), nothing, nothing)
        found.append(made.score(own, corpus, clip))
        same = corpus.label_number(clip) == corpus.label_number(other)
        assert made.score(own, corpus, other)["all_rule"] == same
    right = dict.fromkeys(("all_rule", "colour_rule", "shape_rule", "place_rule"), 1)
    assert all(scores == right for scores in found)  # and no classifier was asked for
    assert found[0].keys() <= made.scores.keys()


def test_a_tenth_of_a_second_and_a_minute_are_heard(shapes):
    assert network(shapes).embed_speech([speech(0.1), speech(60)]).isfinite().all()


def test_a_picture_of_training_is_found_and_drawn_with_its_neighbours(corpus, shapes, tmp_path):
    found = network(shapes).eval()
    clip = corpus.clips("val")[0]
    (made,) = found.sample([Prompt("", speech=corpus.wave(clip))], found.config.sample)
    similarity = (
        torch.stack([corpus.image_embedding_by_number(n)[0] for n in corpus.gallery("train")])
        @ made.embedding
    )
    nearest = corpus.gallery("train")[similarity.argmax()]
    assert torch.equal(made.picture, corpus.read_picture(nearest)) and made.nearest.shape == (4, 3, 32, 32)
    assert set(made.draw(tmp_path / "000")) == {"picture", "nearest"} and Image.open(
        tmp_path / "000.nearest.png"
    ).size == (128, 32)
    own = found.reference(corpus, clip)
    features = evaluator.stack_features([found.features(own, corpus, clip)])
    assert found.summarize(features, None)["recall_1"] == 1


def test_the_image_tower_made_here_tells_the_shapes_apart(corpus):
    pictures = torch.stack([corpus.read_picture(n) for n in corpus.gallery("train")])
    tower = vision.load_image_encoder(corpus)
    cached = torch.cat([corpus.image_embedding_by_number(n) for n in corpus.gallery("train")])
    assert torch.allclose(tower(pictures), cached, atol=2e-3) and torch.allclose(
        cached.norm(dim=1), torch.ones(len(cached)), atol=1e-3
    )
    assert (cached @ cached.T - 2 * torch.eye(len(cached))).max() < 0.9


# Runs


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """The folder of a run of four steps, saved every two and evaluated at the end."""
    folder = tmp_path_factory.mktemp("align")
    call(
        train_module,
        *options(
            shapes
            | {"steps": 4, "save_interval": 2, "val_interval": 4, "eval_interval": 4, "out_dir": folder}
        ),
    )
    return folder


def test_a_run_that_is_resumed_ends_bit_for_bit_as_one_that_was_not(run, shapes, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints/step_0000002.pt", tmp_path / "checkpoints")
    call(
        train_module,
        *options(
            shapes
            | {"steps": 4, "save_interval": 2, "val_interval": 4, "eval_interval": 0, "out_dir": tmp_path}
        ),
    )
    once, twice = (
        torch.load(folder / "checkpoints/step_0000004.pt", weights_only=True) for folder in (run, tmp_path)
    )
    assert all(torch.equal(once["model"][name], twice["model"][name]) for name in once["model"])
    assert all(torch.equal(once["ema"][name], twice["ema"][name]) for name in once["ema"])


def test_a_run_reports_retrieval_and_a_map_of_the_space(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in lines for key, value in line.items()}
    assert {
        "eval/recall_1",
        "eval/recall_10",
        "eval/recall_back_5",
        "eval/cos_matched",
        "eval/modality_gap",
    } <= last.keys()
    assert (run / "eval/step_0000004/summary.png").exists() and "R@1 speech to picture" in (
        run / "report.html"
    ).read_text()


def test_a_sound_file_of_any_rate_finds_a_picture_and_silence_is_refused(
    run, refusal, tmp_path, monkeypatch, shapes
):
    monkeypatch.chdir(shapes["data_dir"].parent)
    soundfile.write(tmp_path / "a.wav", speech(1).view(-1, 2).numpy(), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    call(
        sample,
        f"--ckpt={run}",
        f"--speech={tmp_path / 'a.wav'}",
        f"--out={tmp_path / 'a.png'}",
        "--device=cpu",
    )
    assert Image.open(tmp_path / "a.png").size == (32, 32) and (tmp_path / "a.nearest.png").exists()
    silent, out = f"--speech={tmp_path / 'silent.wav'}", f"--out={tmp_path / 'b.png'}"
    assert "silent" in refusal(sample, f"--ckpt={run}", silent, out, "--device=cpu")
    assert not (tmp_path / "b.png").exists()


def test_a_trained_stage_is_loaded_with_its_averaged_weights_and_what_is_none_is_refused(run, tmp_path):
    state = torch.load(run / "checkpoints/step_0000004.pt", weights_only=True)
    found = align.load_stage1(str(run), torch.device("cpu"))
    assert torch.equal(found.proj.weight, state["ema"]["proj.weight"]) and not torch.equal(
        found.proj.weight, state["model"]["proj.weight"]
    )
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    for path in (tmp_path, tmp_path / "garbage.pt", tmp_path / "nothing"):
        with pytest.raises(config.UserError, match="train that first"):
            align.load_stage1(str(path), torch.device("cpu"))
