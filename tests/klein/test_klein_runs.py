"""System `spectrogram` by the commands that a user types: prepare, train, stop and go on, two ranks,
evaluate, sample, export.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import call, finish, options, start

import sample
import system
import train
from base import Prompt
from klein import picture as picture_module
from klein import pipeline
from klein.data import token_mask
from klein.picture import load_png
from klein.system import Spectrogram
from tracking import logger
from tracking.checkpoint import load_checkpoint, newest_checkpoint

KLEIN = {
    "system": "spectrogram",
    "corpus": "demo",
    "voice": "espeak:en-us",
    "sentences": 6,
    "overfit": 6,
    "picture.sample_rate": 8000,
    "picture.n_fft": 256,
    "picture.hop": 128,
    "picture.seconds": 2.5,
    "canvas_height": 128,
    "canvas_width": 160,
    "base": "scratch",
    "rank": 4,
    "alpha": 4,
    "text_tokens": 64,
    "double_layers": 1,
    "prompt": "{text}",
    "model.width": 32,
    "layers": 3,
    "heads": 2,
    "predict": "v",
    "euler_steps": 2,
    "cfg_scale": 2,
    "batch_size": 2,
    "warmup": 1,
    "lr": 1e-2,
    "log_interval": 1,
    "limit": 3,
    "save_interval": 2,
    "eval_interval": 0,
    "device": "cpu",
    "dtype": "fp32",
    "wandb": "disabled",
}


@pytest.fixture(scope="module")
def knobs(random_whisper, tmp_path_factory) -> dict:
    """The knobs of a tiny Klein, its corpus and caches prepared."""
    knobs = KLEIN | {"recogniser": random_whisper, "data_dir": tmp_path_factory.mktemp("waves")}
    said = finish(start("system.py", "prepare", *options(knobs)))
    assert "the ceiling, 6 clips through picture, VAE and Griffin-Lim" in said
    return knobs


@pytest.fixture(scope="module")
def painted(knobs, tmp_path_factory) -> Path:
    """The folder of a run of four steps, sampled at the end."""
    folder = tmp_path_factory.mktemp("painted")
    finish(
        start(
            "train.py",
            *options(knobs | {"out_dir": folder, "steps": 4, "val_interval": 4, "eval_interval": 4}),
        )
    )
    return folder


def checkpoint(folder: Path) -> dict:
    return load_checkpoint(newest_checkpoint(folder))


def test_a_run_leaves_pictures_sound_scores_and_a_report(painted):
    rows = logger.read_lines(painted / "eval" / "step_0000004" / "samples.jsonl")
    assert len(rows) == 3 and all(row["lsd"] > 0 and row["path_distance"] > 0 for row in rows)
    for name in ("000.png", "000.wav", "000.confidence.png", "000.ref.png", "000.ref.wav"):
        assert (painted / "eval" / "step_0000004" / name).is_file()
    picture, form, facts = load_png(painted / "eval" / "step_0000004" / "000.png")
    assert picture.shape == (3, 128, 160) and form.n_fft == 256 and facts["text"] == rows[0]["text"]
    last = [row for row in logger.read_lines(painted / "metrics.jsonl") if "eval/lsd" in row][-1]
    assert {"eval/wer", "eval/wer_vocoded", "eval/lsd_vocoded", "eval/path_distance"} <= last.keys()
    report = (painted / "report.html").read_text()
    assert "log-spectral distance" in report and "distance to the colour path" in report


def test_a_checkpoint_of_a_lora_holds_the_adapters_only(painted):
    state = checkpoint(painted)
    assert state["model"] and all(key.endswith((".A", ".B")) for key in [*state["model"], *state["ema"]])
    assert json.loads((painted / "run.json").read_text())["frozen_parameters"] > 0


def test_resumed_is_bit_for_bit_uninterrupted(knobs, painted, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(painted / "checkpoints" / "step_0000002.pt", tmp_path / "checkpoints")
    call(train, *options(knobs | {"out_dir": tmp_path, "steps": 4}))
    once, twice = checkpoint(painted), checkpoint(tmp_path)
    for part in ("model", "ema"):
        assert all(torch.equal(value, twice[part][key]) for key, value in once[part].items())
    states = [
        [value for state in c["optimizers"][0]["state"].values() for value in state.values()]
        for c in (once, twice)
    ]
    assert all(map(torch.equal, *states))


def test_a_run_does_not_go_on_with_another_alpha(refusal, knobs, painted):
    assert "klein.alpha 4.0, not 32.0" in refusal(
        train, *options(knobs | {"out_dir": painted, "steps": 5, "alpha": 32})
    )


@pytest.mark.slow  # text-to-speech and music do it in every run of the tests
def test_two_ranks_are_one_process_with_the_double_batch(knobs, tmp_path):
    shared = knobs | {"steps": 3, "save_interval": 3}
    finish(start("train.py", *options(shared | {"out_dir": tmp_path / "two"}), ranks=2))
    call(train, *options(shared | {"out_dir": tmp_path / "one", "batch_size": 4}))
    two, one = checkpoint(tmp_path / "two"), checkpoint(tmp_path / "one")
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, rtol=0, atol=1e-5), key


def test_an_exported_lora_on_its_base_paints_what_the_checkpoint_paints(knobs, painted, tmp_path):
    call(system, "export", f"--ckpt={painted}", f"--out={tmp_path / 'lora'}")
    config = tmp_path / "config.yaml"
    shutil.copy(painted / "config.yaml", config)
    common = ["--text=Anna bought two green baskets.", "--seed=3", "--device=cpu"]
    call(sample, f"--ckpt={painted}", f"--out={tmp_path / 'a.wav'}", *common)
    call(sample, f"--config={config}", f"--lora={tmp_path / 'lora'}", f"--out={tmp_path / 'b.wav'}", *common)
    call(sample, f"--config={config}", f"--out={tmp_path / 'base.wav'}", *common)
    a, b, base = (load_png(tmp_path / f"{name}.png")[0] for name in ("a", "b", "base"))
    assert torch.equal(a, b) and not torch.equal(a, base)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_painted_picture_is_heard_the_same_by_the_codec(painted, tmp_path):
    call(sample, f"--ckpt={painted}", "--text=Anna bought two green baskets.", f"--out={tmp_path / 'a.wav'}")
    call(picture_module, "decode", str(tmp_path / "a.png"), str(tmp_path / "b.wav"))
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_klein_tuned_in_full_is_the_base_of_a_lora_that_leaves_it_as_it_is(refusal, knobs, tmp_path):
    full = knobs | {"tune": "full", "out_dir": tmp_path / "full", "steps": 2, "vae": "patches"}
    call(system, "prepare", *options(full))
    call(train, *options(full))
    call(system, "export", f"--ckpt={tmp_path / 'full'}", f"--out={tmp_path / 'klein'}")
    before = {path: path.read_bytes() for path in (tmp_path / "klein").rglob("*") if path.is_file()}
    lora = full | {"tune": "lora", "base": tmp_path / "klein", "out_dir": tmp_path / "lora"}
    call(system, "prepare", *options(lora))
    call(train, *options(lora))
    assert before and all(path.read_bytes() == content for path, content in before.items())
    (tmp_path / "klein").rename(tmp_path / "moved")
    words = [f"--ckpt={tmp_path / 'lora'}", "--text=Anna", f"--out={tmp_path / 'x.wav'}"]
    assert "klein.base" in refusal(sample, *words) and "unknown key" in refusal(sample, *words, "--bse=x")
    call(sample, *words, f"--klein.base={tmp_path / 'moved'}")
    (tmp_path / "moved").rename(tmp_path / "klein")
    _, tuned, _ = system.load(str(tmp_path / "full"), torch.device("cpu"))
    _, adapted, _ = system.load(str(tmp_path / "lora"), torch.device("cpu"))
    trained = dict(tuned.transformer.named_parameters())
    for key, value in adapted.transformer.named_parameters():
        if not key.endswith((".A", ".B")):
            assert torch.equal(value, trained[key.replace(".base.", ".")]), key


def test_the_text_encoder_is_trained_along_without_cached_features(knobs, tmp_path):
    call(train, *options(knobs | {"out_dir": tmp_path, "text_rank": 2, "steps": 2}))
    weights = checkpoint(tmp_path)["model"]
    moved = {
        key: value
        for key, value in weights.items()
        if key.startswith("trained_text_encoder") and key.endswith(".B")
    }
    assert len(moved) == 27 * 4 and all(value.any() for value in moved.values())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"base": "/nowhere/klein"}, "/nowhere/klein"),
        ({"text_tokens": 30}, "klein.text_tokens"),
        ({"vocoder": "some/bigvgan"}, "vocoder: system spectrogram has no such key"),
        ({"canvas_width": 144}, "picture.canvas_width"),
        ({"prompt": "no text"}, "klein.prompt"),
        ({"true_durations": "true"}, "true_durations: system spectrogram has no such key"),
        ({"max_seconds": 0.2}, "data.max_seconds"),
    ],
)
def test_what_does_not_fit_is_one_line(refusal, knobs, tmp_path, changes, said):
    assert said in refusal(system, "prepare", *options(knobs | {"data_dir": tmp_path} | changes))


def test_training_without_its_caches_says_what_makes_them(refusal, knobs, tmp_path):
    assert "system.py prepare" in refusal(
        train, *options(knobs | {"out_dir": tmp_path, "vae": "patches", "canvas_height": 112})
    )


def test_prompts_are_tokenised_alike_by_many_threads():
    tokenizer = pipeline.load_klein_tokenizer("scratch")
    wanted = {
        text: pipeline.tokenize_prompts(tokenizer, [text], 64)
        for text in ("", "Anna", "Anna bought two green baskets.")
    }
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda text: (text, pipeline.tokenize_prompts(tokenizer, [text], 64)), list(wanted) * 300
        )
    assert all(
        torch.equal(ids, wanted[text][0]) and torch.equal(mask, wanted[text][1])
        for text, (ids, mask) in found
    )


def test_a_frozen_part_stays_in_the_precision_it_was_loaded_in(knobs):
    config = system.config_from_command_line(options(knobs | {"dtype": "bf16", "tune": "full"}))
    for part in ("text_encoder", "vae"):
        frozen = pipeline.load_frozen_klein(config, part, torch.device("cpu"))
        assert frozen.cuda_dtype == next(frozen.module.parameters()).dtype


def test_the_canvas_beyond_the_spectrogram_is_painted_black(knobs):
    config = system.config_from_command_line(
        options(knobs | {"vae": "patches", "canvas_height": 192, "canvas_width": 192})
    )
    inside = token_mask(config.picture).view(12, 12).repeat_interleave(16, 0).repeat_interleave(16, 1)
    picture = Spectrogram(config).generate_pictures([Prompt("Anna")], config.sample)[0]
    assert not inside.all() and picture[:, ~inside].max() < 1e-5 and picture[:, inside].max() > 0.1


def test_a_length_in_seconds_is_refused(refusal, painted, tmp_path):
    words = (
        f"--ckpt={painted}",
        "--text=Anna bought two green baskets.",
        "--seconds=1",
        f"--out={tmp_path / 'a.wav'}",
    )
    assert "leave it out" in refusal(sample, *words)
