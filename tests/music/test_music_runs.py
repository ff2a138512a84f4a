"""System `music`: captions and sounds through frozen networks, batches, sampling; and all of it by the
commands that a user types.
"""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import call, finish, options, start

import audio
import config as configs
import evaluator
import sample
import system
import train
from base import Prompt
from config import UserError
from music import clap, latents
from music.bench import REFERENCE_STEPS, sample_as_reference
from music.data import MusicBatches, MusicCorpus, caption_encoders, collate_captions
from music.system import Music
from pretrained import text_encoder
from tracking import checkpoint, logger

CPU = torch.device("cpu")
MUSIC = {
    "system": "music",
    "corpus": "pieces",
    "sentences": 8,
    "mel.sample_rate": 16000,
    "mel.hop": 160,
    "mel.n_mels": 64,
    "mel.centred": "true",
    "text_encoder": "scratch",
    "model.width": 32,
    "layers": 2,
    "heads": 2,
    "size": "own",
    "double_blocks": 1,
    "vector_encoder": "pooled",
    "autoencoder": "patches",
    "patch_frames": 16,
    "patch_mels": 32,
    "crop_seconds": 1.28,
    "euler_steps": 2,
    "batch_size": 4,
    "warmup": 1,
    "log_interval": 1,
    "eval_interval": 0,
    "limit": 3,
    "device": "cpu",
    "dtype": "fp32",
    "muon_lr": 5e-4,
    "wandb": "disabled",
    "predict": "x",
    "cfg_scale": 2,
    "vocoder": "griffinlim",
}


@pytest.fixture(scope="module")
def knobs(tmp_path_factory) -> dict:
    """The knobs of a tiny system on a few synthesised pieces, prepared."""
    knobs = MUSIC | {"data_dir": tmp_path_factory.mktemp("pieces")}
    call(system, "prepare", *options(knobs))
    return knobs


@pytest.fixture(scope="module")
def run(knobs, tmp_path_factory):
    """The folder of a run of four steps, sampled at the end."""
    folder = tmp_path_factory.mktemp("music")
    call(
        train,
        *options(
            knobs | {"out_dir": folder, "steps": 4, "save_interval": 2, "val_interval": 4, "eval_interval": 4}
        ),
    )
    return folder


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    """A random ClapModel with a tokenizer of bytes, on disk as the published one is."""
    folder = tmp_path_factory.mktemp("clap")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's bytes
    letters = [chr(b) if b in printable else chr(256 + b - sum(p < b for p in printable)) for b in range(256)]
    vocabulary = {letter: n for n, letter in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    text = {
        "vocab_size": 260,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 90,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    sound = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "window_size": 4,
    }
    torch.manual_seed(0)
    transformers.ClapModel(
        transformers.ClapConfig(text_config=text, audio_config=sound, projection_dim=8)
    ).save_pretrained(folder)
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ldm_folder(tmp_path_factory):
    """A random AutoencoderKL and SpeechT5HifiGan, as AudioLDM2's in all but their size."""
    import diffusers

    folder = tmp_path_factory.mktemp("audioldm2")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=8,
        scaling_factor=0.4110932946205139,
    ).save_pretrained(folder / "vae")
    shape = transformers.SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=16000,
        upsample_initial_channel=64,
        upsample_rates=[5, 4, 2, 2, 2],
        normalize_before=False,
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    )
    transformers.SpeechT5HifiGan(shape).save_pretrained(folder / "vocoder")
    return folder


@pytest.fixture(scope="module")
def frozen(knobs, t5_folder, clap_folder, ldm_folder) -> dict:
    """The knobs of the published way: T5, CLAP, AudioLDM2's VAE and vocoder, all caches prepared."""
    knobs = knobs | {
        "text_encoder": t5_folder,
        "vector_encoder": clap_folder,
        "autoencoder": ldm_folder,
        "vocoder": "own",
        "text_width": 32,
        "vector_width": 24,
        "crops": 2,
        "predict": "v",
    }
    call(system, "prepare", *options(knobs))
    return knobs


def build(knobs: dict) -> tuple[configs.Config, MusicCorpus, Music]:
    config = system.config_from_command_line(options(knobs))
    corpus = system.open_corpus(config)
    return config, corpus, awake(system.build(config, *corpus.statistics))


@torch.no_grad()
def awake(network: Music) -> Music:
    """What starts at 0 gets numbers, so that texts and times have an effect before any training."""
    generator = torch.Generator().manual_seed(0)
    for p in network.transformer.parameters():
        if not p.any():
            p.normal_(std=0.3, generator=generator)
    return network.eval()


# What captions and sounds become


def test_clap_reads_with_the_weights_that_were_saved(clap_folder):
    saved = transformers.ClapModel.from_pretrained(clap_folder)
    loaded = clap.load_clap("music.vector_encoder", str(clap_folder), CPU)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    words = loaded.tokenize("a calm piano")
    torch.testing.assert_close(
        loaded.text_hidden("a calm piano"), saved.eval().text_model(**words).pooler_output
    )
    _, report = transformers.ClapTextModel.from_pretrained(clap_folder, output_loading_info=True)
    # FluxMusic's way: nothing of the tower is found
    assert len(report["missing_keys"]) > 20


def test_t5_reads_with_the_weights_that_were_saved(t5_folder, frozen):
    saved = transformers.T5EncoderModel.from_pretrained(t5_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    config = system.config_from_command_line(options(frozen))
    ids = torch.tensor(text_encoder.tokenize(tokenizer, ["a calm piano"]))
    torch.testing.assert_close(
        caption_encoders(config, CPU)["features"]("a calm piano"), saved.eval()(ids).last_hidden_state[0]
    )


def test_training_finds_cached_what_sampling_reads(frozen):
    config, corpus, network = build(frozen)
    cached = MusicBatches(config, corpus, None).cached
    encoders = caption_encoders(config, CPU)
    for text in ("", corpus.clips("train")[0].text):
        for name in ("features", "vectors"):
            # float16 on disk
            torch.testing.assert_close(cached[name](text).float(), encoders[name](text), rtol=1e-3, atol=1e-3)
    assert len(cached["features"]("")) == 1  # unpadded: the end of the text only


def test_a_caption_beyond_the_limit_is_cut(frozen):
    config, corpus, network = build(frozen | {"caption_tokens": 8})
    encoders = caption_encoders(config, CPU)
    batch = collate_captions(["word " * 99, "a"], ["a", "a"], config, None, encoders)
    text = network.condition(batch)[0]
    assert text.shape == (2, 8, 32)


def test_padding_is_masked_or_the_last_feature_again(frozen):
    config, corpus, network = build(frozen)
    batch = collate_captions(["a", "a longer one"], ["a", "b"], config, None, caption_encoders(config, CPU))
    text, vector, mask = network.condition(batch)
    assert mask.sum(1).tolist() == [2, 13] and not text[0, 2:].any()
    network.config = replace(config, music=replace(config.music, text_padding="last", caption_tokens=20))
    last, vector = network.condition(batch)
    assert (
        last.shape == (2, 20, 32)
        and torch.equal(last[0, :2], text[0, :2])
        and torch.equal(last[0, 1:], last[0, 1].expand(19, -1))
    )


def test_latents_are_drawn_from_the_vae_s_distribution(frozen, ldm_folder):
    import diffusers

    config, corpus, _ = build(frozen)
    vae = diffusers.AutoencoderKL.from_pretrained(ldm_folder, subfolder="vae")
    clip = corpus.clips("train")[0]
    codec = latents.Codec(config, 0.0, 1.0, CPU)
    mean, deviation = codec.encode_crop(corpus.wave(clip), np.random.default_rng(0))
    log_mel = audio.log_mel(
        latents.random_crop(corpus.wave(clip), 20480, np.random.default_rng(0)), config.mel
    )
    with torch.no_grad():
        found = vae.encode(log_mel[None, None]).latent_dist
    torch.testing.assert_close(mean, latents.to_tokens(0.4110932946205139 * found.mean)[0])
    torch.testing.assert_close(deviation, latents.to_tokens(0.4110932946205139 * found.std)[0])
    batches = MusicBatches(config, corpus, None)
    assert batches.cached["latents"](clip).shape == (2 * codec.crop_tokens, 64) and mean.shape == (
        codec.crop_tokens,
        32,
    )
    crops = [batches.random_crop(clip, np.random.default_rng(n)) for n in range(4)]
    x = torch.stack([batches.row(clip, np.random.default_rng(n))["x"] for n in range(400)])
    middle = torch.stack([mean for mean, _ in crops]).mean()
    assert abs(x.mean() - middle) < 0.1 and x.std(0).min() > 0.5 * min(
        deviation.min() for _, deviation in crops
    )


def test_ten_seconds_are_1024_tokens_of_32_numbers_and_come_back(frozen):
    config = system.config_from_command_line(options(frozen | {"crop_seconds": 10.24}))
    codec = latents.Codec(config, 0.0, 1.0, CPU)
    mean, deviation = codec.encode_crop(torch.randn(20 * 16000), np.random.default_rng(0))
    assert mean.shape == deviation.shape == (1024, 32) and (
        codec.crop_tokens,
        codec.crop_frames,
        codec.bands,
    ) == (
        1024,
        1024,
        8,
    )
    assert codec.decode(mean).shape == (1024, 64)


def test_the_stand_in_loses_nothing(knobs):
    config, corpus, network = build(knobs)
    found = []
    for clip in corpus.clips("train"):
        log_mel = audio.log_mel(
            latents.random_crop(corpus.wave(clip), 20480, np.random.default_rng(0)), config.mel
        )
        tokens, deviation = network.codec.encode_crop(corpus.wave(clip), np.random.default_rng(0))
        torch.testing.assert_close(network.codec.decode(tokens), log_mel)
        assert not deviation.any()
        found.append(tokens)
    assert torch.stack(found).mean().abs() < 0.1 and 0.9 < torch.stack(found).std() < 1.1


@pytest.mark.parametrize("joint", [1.0, 0.0])
def test_captions_are_dropped_together_or_each_by_itself(frozen, joint):
    config, corpus, _ = build(frozen | {"joint_dropout": joint, "text_condition_dropout": 0.3})
    batches = MusicBatches(config, corpus, None)
    clip = corpus.clips("train")[0]
    rows = [batches.row(clip, np.random.default_rng(n)) for n in range(600)]
    lost = np.array([[row["text"] == "", row["vector_text"] == ""] for row in rows])
    both = lost.all(1).mean()
    assert np.allclose(lost.mean(0), 0.3, atol=0.06) and abs(both - (0.3 if joint else 0.09)) < 0.05
    assert not joint or (lost[:, 0] == lost[:, 1]).all()
    validated = [batches.row(clip, np.random.default_rng(n), t=0.5) for n in range(20)]
    assert all(row["text"] == clip.text for row in validated)


# The loss, and sampling


def test_the_loss_is_the_squared_error_of_the_velocity(frozen):
    config, corpus, network = build(frozen)
    batch = MusicBatches(config, corpus, None).train(0)
    x = batch["x"]
    noise = batch["noise"]
    t = batch["t"][:, None, None]
    with torch.no_grad():
        v = network.transformer((1 - t) * x + t * noise, batch["t"], *network.condition(batch))
        torch.testing.assert_close(network(batch)["loss"], (v - (noise - x)).square().mean())


def test_masked_padding_never_reaches_a_sample(knobs):
    _, _, network = build(knobs)
    alone = network.sample([Prompt("a flute", seed=3)], network.config.sample)[0]
    beside = network.sample(
        [Prompt("a much longer caption " * 4, seed=1), Prompt("a flute", seed=3)], network.config.sample
    )[1]
    torch.testing.assert_close(alone.log_mel, beside.log_mel, rtol=0, atol=1e-4)


def test_guidance_away_from_the_prompt_itself_changes_nothing(knobs):
    _, _, network = build(knobs)
    settings = replace(network.config.sample, cfg_scale=7.0)

    def sample_flute(**changes) -> torch.Tensor:
        return network.sample([Prompt("a flute")], replace(settings, **changes))[0].log_mel

    plain = sample_flute(cfg_scale=1.0)
    guided = sample_flute(negative="a flute")
    away = sample_flute(negative="low quality")
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-4)
    assert (plain - away).abs().max() > 1e-2


def test_guidance_in_one_call_and_unpadded_text_give_what_the_slow_procedure_gives(knobs):
    _, _, network = build(knobs)
    prompts = [Prompt("a flute", seed=1), Prompt("a trumpet")]
    settings = replace(network.config.sample, euler_steps=REFERENCE_STEPS)
    with torch.no_grad():
        ours = network.sample_tokens(prompts, 128, settings)
        reference = sample_as_reference(network, prompts)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seconds, tokens", [(0.5, 1), (1.28, 1), (1.4, 1.5), (3.0, 2.5)])
def test_any_length_is_made(knobs, seconds, tokens):
    _, _, network = build(knobs)
    short, long = network.sample(
        [Prompt("a flute", seed=1), Prompt("a flute", seconds, seed=2)], network.config.sample
    )
    assert (
        len(long.wave) == 16000 * seconds and len(long.log_mel) == 100 * seconds and len(short.log_mel) == 128
    )
    assert (
        len(network.sample_tokens([Prompt("a flute")], round(100 * seconds), network.config.sample)[0])
        == tokens * network.codec.crop_tokens
    )


def test_the_vocoder_of_the_published_way_ends_where_the_crop_ends(frozen):
    _, corpus, network = build(frozen)
    made = network.sample([Prompt("a flute")], network.config.sample)[0]
    assert len(made.wave) == 20480 and made.log_mel.shape == (128, 64)
    assert len(network.reference(corpus, corpus.clips("val")[0]).wave) == 20480


def test_figures_of_a_set_come_from_clap(knobs, clap_folder, tmp_path):
    _, corpus, network = build(knobs | {"eval.features": clap_folder})
    clips = corpus.clips("val")[:12]
    found = [network.features(network.reference(corpus, clip), corpus, clip) for clip in clips]
    stacked = {name: np.stack([row[name] for row in found]) for name in found[0]}
    assert np.allclose(np.linalg.norm(stacked["generated"], axis=1), 1, atol=1e-4)
    same = network.summarize(stacked | {"generated": stacked["real"]}, tmp_path)
    other = network.summarize(stacked | {"generated": -stacked["real"]}, tmp_path)
    assert same["fad"] < 1e-3 < other["fad"] and same["kad"] < other["kad"] and -1 <= same["clap"] <= 1


def test_without_a_clap_the_figure_of_a_set_is_chance_and_of_captions_of_no_piece_there_is_none(
    knobs, tmp_path
):
    _, corpus, network = build(knobs)
    clip = corpus.clips("val")[0]
    output = network.reference(corpus, clip)
    found = network.features(output, corpus, clip)
    stacked = {name: np.stack([value, value]) for name, value in found.items()}
    assert network.summarize(stacked, tmp_path) == {"chance": 1 / 210}
    assert network.features(output, corpus, clip._replace(text="ambient, choir")) == {}


def test_muon_trains_the_blocks_matrices_and_no_modulation(knobs):
    _, _, network = build(knobs)
    names = {id(p): name for name, p in network.named_parameters()}
    hidden = {names[id(p)] for p in network.hidden_matrices()}
    assert hidden and all(
        ".lin." not in name and "_in." not in name and "final" not in name for name in hidden
    )
    assert {
        "transformer.double_blocks.0.img_attn.qkv.weight",
        "transformer.single_blocks.0.linear1.weight",
    } <= hidden


# By command


def test_a_run_leaves_sound_matches_with_their_control_and_a_report(run):
    rows = logger.read_lines(run / "eval" / "step_0000004" / "samples.jsonl")
    assert len(rows) == 3 and all(
        row["all_match"] in (0, 1) and row["all_match_shuffled"] in (0, 1) for row in rows
    )
    for name in ("000.png", "000.wav", "000.ref.png", "000.ref.wav"):
        assert (run / "eval" / "step_0000004" / name).is_file()
    last = [row for row in logger.read_lines(run / "metrics.jsonl") if "eval/all_match" in row][-1]
    assert {
        "eval/key_match",
        "eval/tempo_match",
        "eval/timbre_match",
        "eval/all_match_vocoded",
    } <= last.keys() and "eval/wer" not in last
    assert (run / "report.html").is_file() and audio.load_wav(str(run / "sample.wav"), 16000).any()


def newest_state(folder) -> dict:
    return checkpoint.load_checkpoint(checkpoint.newest_checkpoint(folder))


def test_resumed_is_bit_for_bit_uninterrupted(run, knobs, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "step_0000002.pt", tmp_path / "checkpoints")
    call(train, *options(knobs | {"out_dir": tmp_path, "steps": 4}))
    once = newest_state(run)
    twice = newest_state(tmp_path)
    for part in ("model", "ema"):
        assert once[part].keys() == twice[part].keys() and all(
            torch.equal(value, twice[part][key]) for key, value in once[part].items()
        )


def test_two_ranks_are_one_process_with_the_double_batch(knobs, tmp_path):
    finish(start("train.py", *options(knobs | {"out_dir": tmp_path / "two", "steps": 3}), ranks=2))
    call(train, *options(knobs | {"out_dir": tmp_path / "one", "steps": 3, "batch_size": 8}))
    two = newest_state(tmp_path / "two")["model"]
    one = newest_state(tmp_path / "one")["model"]
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow  # text-to-speech does it in every run of the tests
def test_two_ranks_that_share_the_weights_are_one_process_with_all_their_micro_batches(knobs, tmp_path):
    shared = knobs | {"steps": 3, "val_interval": 3, "eval_interval": 3}
    ranks = shared | {"out_dir": tmp_path / "two", "shard": "true", "batch_size": 2, "grad_accum": 2}
    finish(start("train.py", *options(ranks), ranks=2))
    call(train, *options(shared | {"out_dir": tmp_path / "one", "batch_size": 8}))
    two = newest_state(tmp_path / "two")
    one = newest_state(tmp_path / "one")
    for part in ("model", "ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5, msg=f"{part} {key}")
    for ours, theirs in zip(two["optimizers"], one["optimizers"], strict=True):
        for number, values in theirs["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(ours["state"][number][key], value, rtol=0, atol=1e-5)
    for key in ("val/flow_loss", "train/grad_norm", "eval/chance"):
        found, expected = (
            [row[key] for row in logger.read_lines(tmp_path / name / "metrics.jsonl") if key in row]
            for name in ("two", "one")
        )
        assert found == pytest.approx(expected, rel=1e-5)


def test_pieces_are_sampled_by_command(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("A slow melody in C major on a flute.\nNobody's tune\n")
    words = (
        f"--ckpt={run}",
        f"--prompt_file={tmp_path / 'prompts.txt'}",
        "--euler_steps=3",
        "--cfg_scale=7",
        "--negative=low quality, gentle",
    )
    call(sample, *words, f"--out={tmp_path / 'a.wav'}", "--seconds=2")
    waves = [audio.load_wav(str(tmp_path / f"a-{n}.wav"), 16000) for n in range(2)]
    assert [len(wave) for wave in waves] == [32000, 32000] and not torch.equal(*waves)


def test_a_caption_of_two_sentences_is_one_piece(run, tmp_path):
    call(
        sample,
        f"--ckpt={run}",
        "--text=A slow melody. On a flute.",
        "--euler_steps=1",
        f"--out={tmp_path / 'a.wav'}",
        "--seconds=2",
    )
    assert len(audio.load_wav(str(tmp_path / "a.wav"), 16000)) == 32000


def test_the_evaluator_says_the_same_again(run, capsys):
    call(evaluator, f"--ckpt={run}", "--limit=3", f"--out_dir={run}")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    logged = [row for row in logger.read_lines(run / "metrics.jsonl") if "eval/all_match" in row][-1]
    assert math.isclose(found["eval/tempo_match"], logged["eval/tempo_match"])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vector_encoder": "/nowhere/clap"}, "/nowhere/clap"),
        ({"autoencoder": "/nowhere/ldm"}, "/nowhere/ldm"),
        ({"text_encoder": "/nowhere/t5"}, "/nowhere/t5"),
        ({"crop_seconds": 1.3}, "music.crop_seconds"),
        ({"patch_mels": 20}, "music.patch_mels"),
        ({"vocoder": "own"}, "sample.vocoder"),
        ({"double_blocks": 2}, "music.double_blocks"),
        ({"size": "tiny"}, "music.size"),
        ({"autoencoder": "x", "mel.n_mels": 80}, "n_mels 64"),
        ({"size": "small"}, "music.size small"),
        ({"weights": "x.pt"}, "music.weights"),
        ({"joint_dropout": 2}, "must be at most 1"),
    ],
)
def test_what_does_not_fit_is_one_line(refusal, knobs, changes, said):
    assert said in refusal(system, "prepare", *options(knobs | changes))


def test_features_of_another_width_are_refused(frozen, refusal, tmp_path):
    line = refusal(train, *options(frozen | {"text_width": 48, "out_dir": tmp_path, "steps": 1}))
    assert "32 and 24 numbers" in line and "48 and 24" in line


def test_training_without_its_caches_says_what_makes_them(refusal, frozen, tmp_path):
    assert "system.py prepare" in refusal(train, *options(frozen | {"crops": 3, "out_dir": tmp_path}))


def test_an_own_network_is_exported_for_nobody(refusal, run, tmp_path):
    assert "its checkpoint is all there is" in refusal(system, "export", f"--ckpt={run}", f"--out={tmp_path}")


def test_a_lora_is_refused(refusal, run, tmp_path):
    assert "no LoRA" in refusal(
        sample, f"--ckpt={run}", "--lora=x/y", "--text=a flute", f"--out={tmp_path / 'a.wav'}"
    )


def test_a_clap_without_its_weights_is_refused(clap_folder, tmp_path):
    for file in clap_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tower = transformers.ClapTextConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1)
    transformers.ClapTextModel(tower).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a ClapModel|cannot be loaded"):
        clap.load_clap("eval.features", str(tmp_path), CPU)
