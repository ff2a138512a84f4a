"""Checkpoints that cannot be trusted, names what is wrong; saving that is whole or absent; the average of the
weights; and a small system of another kind, which loop, evaluator, sampler and report take as it is.
"""

import concurrent.futures
import errno
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fuzz
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TINY, call, finish, options, start, without_times
from toy.system import Toy, Whistles, WordBatches

import config as configs
import device as device_module
import entry
import evaluator
import optim
import sample as sample_module
import system as system_module
import train as train_module
from base import Batches, Corpus, System
from config import UserError
from metric import Score
from system import SYSTEMS, build, find, load, load_config, settle_precision
from tracking import checkpoint, logger, plot

CPU = torch.device("cpu")
SHAPE = {"model": {"text_encoder": "scratch", "width": 16, "layers": 1, "heads": 2, "frame_stack": 2}}


def needs(name: str):
    """A mark for what is tested of a further system: skipped where that was deleted."""
    return pytest.mark.skipif(name not in SYSTEMS, reason=f"no system {name}")


def refused(path) -> str:
    """What is said about a checkpoint that cannot be loaded, which begins with its name, in one line."""
    with pytest.raises(UserError) as e:
        load(str(path), CPU, {})
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    return str(e.value).removeprefix(f"{path}: ")


@pytest.fixture
def good(run, tmp_path):
    """A copy of a trained checkpoint, to be spoiled."""
    return shutil.copy(checkpoint.newest_checkpoint(run), tmp_path / "x.pt")


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(good, left):
    whole = good.read_bytes()
    good.write_bytes(whole[: int(left * len(whole))])
    assert "truncated" in refused(good)


class Bomb:
    """What a malicious pickle is: loading it calls something, here the making of a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path):
    path, trace = tmp_path / "x.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    assert "not written by nanoaudio" in refused(path)
    torch.save({"config": Bomb(trace), "model": {}, "step": 1}, path)
    assert "not written by nanoaudio" in refused(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02.", b"]e.", b"0", bytes(range(256))], ids=repr)
def test_a_file_of_anything_else_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert "not a readable checkpoint" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "state", [[1, 2], torch.zeros(3), {"model": {}}, {"config": {}, "model": {}, "step": 1}], ids=repr
)
def test_a_torch_file_of_something_else_is_named(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    assert "not a nanoaudio checkpoint" in refused(tmp_path / "x.pt")


def test_a_missing_checkpoint_and_a_folder_without_any_are_named(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "x.pt")
    assert "holds no checkpoints" in refused(tmp_path)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda state: state["config"]["model"].update(depth=3), "unknown key model.depth"),
        (lambda state: state["config"]["model"].update(width=16), "has shape"),
        (lambda state: state["config"]["model"].update(layers=1), "not part of this model"),
        (lambda state: state["config"]["model"].update(layers=3), "is missing"),
        (lambda state: state["config"]["model"].update(width="wide"), "must be int"),
        (lambda state: state.update(step="1"), "lacks step"),
        (lambda state: state.update(config=[]), "lacks config"),
        (
            lambda state: state["model"].update({1: torch.zeros(1), "x": torch.zeros(1)}),
            "not part of this model",
        ),
        (lambda state: state["ema"].update({min(state["ema"]): "x"}), "holds no weights"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_named_with_the_first_difference(
    good, change, complaint
):
    state = checkpoint.load_checkpoint(good)
    change(state)
    torch.save(state, good)
    assert complaint in refused(good)


def test_a_folder_is_its_newest_checkpoint_and_speaks_with_the_average(run):
    config, network, step = load(str(run), CPU, ["--euler_steps=7", "--out_dir=elsewhere"])
    state = checkpoint.load_checkpoint(run / "checkpoints" / "step_0000006.pt")
    assert (config.sample.euler_steps, config.out_dir, step, network.training) == (7, "elsewhere", 6, False)
    for name, p in network.named_parameters():
        assert torch.equal(p, state["ema"][name])
    assert not torch.equal(state["ema"]["decoder.out_proj.weight"], state["model"]["decoder.out_proj.weight"])


def test_a_run_is_not_resumed_with_another_shape(run):
    config = configs.from_dict(configs.TTSConfig, {**SHAPE, "out_dir": str(run)})
    network = build(config)
    with pytest.raises(UserError, match=f"{run}.*step_0000006.pt: .*trained with another config"):
        checkpoint.resume(config, network, optim.EMA(network, 0.9), [])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("optimizers"),
        lambda state: state["optimizers"].pop(),
        lambda state: state["optimizers"][0].update(state=3),
        lambda state: state["optimizers"][0]["param_groups"][0].update(params=[torch.zeros(0)]),
        lambda state: state["optimizers"][0]["state"][0].update(momentum_buffer=torch.zeros(3, 2)),
        lambda state: state["optimizers"][0]["state"][0].update(momentum_buffer="x"),
        lambda state: state["optimizers"][0]["state"][0].update(momentum_buffer=torch.zeros(2) * 1j),
        lambda state: state.update(seconds="long"),
    ],
)
def test_a_run_whose_checkpoint_is_damaged_beside_its_weights_is_not_resumed(run, tmp_path, change):
    state = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(run))
    change(state)
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "step_0000006.pt")
    config, network, _ = load(str(run), CPU, [f"--out_dir={tmp_path}"])
    optimizers = optim.make_optimizers(network, 0.1, 0.1, 0.1)
    with pytest.raises(UserError, match="step_0000006.pt: damaged beside its weights .*; move it away"):
        checkpoint.resume(config, network, optim.EMA(network, 0.9), optimizers)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("tts", "mel.hop", "128"),
        ("tts", "flow.predict", "v"),
        ("tts", "data.corpus", "librispeech"),
        ("tts", "data.voice", "espeak:en-us"),
        pytest.param("spectrogram", "klein.alpha", "1.0", marks=needs("spectrogram")),
        pytest.param("music", "music.text_padding", "last", marks=needs("music")),
        pytest.param("speech_align", "align.temperature", "1.0", marks=needs("speech_align")),
        pytest.param("speech_image", "codes.condition_scale", "2.0", marks=needs("speech_image")),
    ],
)
def test_a_run_is_not_resumed_where_its_weights_would_mean_something_else(name, key, value):
    then = configs.to_dict(load_config("", [f"--system={name}"]))
    now = load_config("", [f"--system={name}", f"--{key}={value}"])
    with pytest.raises(UserError, match=f"x.pt: was trained with {key}.*choose another out_dir"):
        checkpoint.check_unchanged(now, then, "x.pt")


def test_weights_to_begin_with_leave_a_network_the_statistics_of_its_own_corpus(run):
    config = load_config(str(run / "config.yaml"), ["--corpus=librispeech"])
    network = build(config, -3.0, 2.0)
    path = checkpoint.newest_checkpoint(run)
    checkpoint.begin_with(network, checkpoint.weights_of(path, config), path)
    assert checkpoint.statistics(network) == {"mean": -3.0, "std": 2.0}
    state = checkpoint.load_checkpoint(path)
    assert torch.equal(network.decoder.out_proj.weight, state["ema"]["decoder.out_proj.weight"])


def test_a_run_is_not_resumed_with_values_of_another_kind_in_its_config(run, tmp_path):
    state = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(run))
    state["config"]["model"]["text_layers"] = torch.zeros(0)
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "step_0000006.pt")
    config, network, _ = load(str(run), CPU, [f"--out_dir={tmp_path}"])
    with pytest.raises(UserError, match="step_0000006.pt: model.text_layers must be int"):
        checkpoint.resume(config, network, optim.EMA(network, 0.9), [])


@pytest.mark.parametrize(
    "name, key, value",
    [
        pytest.param("spectrogram", "klein.base", "/elsewhere", marks=needs("spectrogram")),
        pytest.param("spectrogram", "klein.checkpointing", "true", marks=needs("spectrogram")),
        pytest.param("speech_image", "codes.stage1", "/elsewhere", marks=needs("speech_image")),
        pytest.param("speech_image", "codes.require_r1", "0", marks=needs("speech_image")),
        pytest.param("music", "music.autoencoder", "/elsewhere", marks=needs("music")),
        ("tts", "train.lr", "1"),
    ],
)
def test_what_a_network_was_made_from_may_have_moved_when_it_is_resumed(name, key, value):
    then = configs.to_dict(load_config("", [f"--system={name}"]))
    checkpoint.check_unchanged(load_config("", [f"--system={name}", f"--{key}={value}"]), then, "x.pt")


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_fixed_is_what_there_is_and_says_what_the_weights_mean(name):
    cls = find(name).config_class
    fixed = configs.fixed_keys(cls)
    assert all(any(key == wanted or key.startswith(f"{wanted}.") for key in fixed) for wanted in cls.fixed)
    assert {"model.width", "data.corpus"} <= set(fixed)
    assert {key for key in fixed if key.startswith("data.")} <= {"data.corpus", "data.voice"}
    assert not {key.split(".")[0] for key in fixed} & {"sample", "train", "eval"}


def test_a_few_odd_checkpoints_end_well():
    counts = Counter()
    fuzz.try_kind("checkpoint", 25, counts)
    assert counts["accepted"] and counts["refused"]


def test_a_rate_changed_on_the_command_line_holds_after_resuming(run):
    config, network, _ = load(str(run), CPU, ["--muon_lr=0.5", "--lr=0.25"])
    optimizers = optim.make_optimizers(
        network, config.train.muon_lr, config.train.lr, config.train.weight_decay
    )
    assert checkpoint.resume(config, network, optim.EMA(network, 0.9), optimizers)[0] == 6
    assert [group["peak_lr"] for o in optimizers for group in o.param_groups] == [0.5, 0.25]
    assert all(o.state for o in optimizers)


# What the machine decides


@pytest.mark.parametrize("world, accum, share", [(1, 1, 64), (2, 1, 32), (4, 2, 8), (8, 1, 8)])
def test_the_clips_of_an_update_are_shared_out_by_ranks_and_micro_steps(world, accum, share):
    asked = load_config("", ["--global_batch=64", f"--grad_accum={accum}"])
    train = system_module.settle_batch(asked, world).train
    assert (train.batch_size, train.global_batch) == (share, 64)
    assert "64 clips an update" in checkpoint.describe_batch(asked.train, train, world)


def test_a_batch_of_a_process_that_is_asked_for_stays_and_the_start_says_what_all_take():
    asked = load_config("", ["--global_batch=64", "--batch_size=16", "--grad_accum=2"])
    train = system_module.settle_batch(asked, 8).train
    assert (train.batch_size, train.global_batch) == (16, 256)
    said = checkpoint.describe_batch(asked.train, train, 8)
    assert said.startswith("256 clips an update: 8 ranks x 2 micro-steps x 16 (") and said.endswith(" 64)")


@pytest.mark.parametrize(
    "world, accum, nearest", [(6, 1, 66), (5, 1, 65), (8, 3, 72), (3, 1, 63), (200, 1, 200)]
)
def test_a_world_that_cannot_share_a_batch_equally_is_told_the_nearest_that_it_can(
    world, accum, nearest, tmp_path, refusal
):
    """Before anything is prepared."""
    words = [f"--data_dir={tmp_path / 'data'}", "--global_batch=64", f"--grad_accum={accum}"]
    said = refusal(system_module, "prepare", f"--ranks={world}", "--config=configs/demo.yaml", *words)
    assert f"global_batch 64 cannot be shared out equally by {world} ranks x {accum} micro-steps" in said
    assert said.endswith(f"--global_batch {nearest}") and not (tmp_path / "data").exists()
    assert system_module.settle_batch(load_config("", [f"--global_batch={nearest}", words[2]]), world)


RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_the_gpus_that_its_head_names(path):
    gpus = re.search(r"--gpus (\d)", path.read_text(encoding="utf-8"))
    config = load_config(str(path))
    for world in {1, int(gpus[1]) or 1}:
        assert system_module.settle_batch(config, world).train.global_batch == config.train.global_batch
    assert config.train.batch_size == 0, "of a process: another recipe on other machines"


# What is published


@pytest.mark.parametrize(
    "name, knob, words",
    [
        ("tts", "vocoder", ["--text_encoder=scratch"]),
        ("tts", "text_encoder", []),
        pytest.param("spectrogram", "base", [], marks=needs("spectrogram")),
        pytest.param("music", "text_encoder", [], marks=needs("music")),
        pytest.param("music", "vector_encoder", ["--text_encoder=scratch"], marks=needs("music")),
        pytest.param(
            "music",
            "autoencoder",
            ["--text_encoder=scratch", "--vector_encoder=pooled", "--size=own"],
            marks=needs("music"),
        ),
        pytest.param("speech_align", "speech", [], marks=needs("speech_align")),
        pytest.param("speech_align", "image", ["--speech=scratch"], marks=needs("speech_align")),
        pytest.param("speech_image", "stage1", [], marks=needs("speech_image")),
    ],
)
def test_what_cannot_be_had_is_named_before_anything_is_made(name, knob, words, tmp_path, refusal):
    """Not by all ranks at once, at the first evaluation."""
    data = tmp_path / "data"
    said = refusal(
        system_module,
        "prepare",
        f"--system={name}",
        f"--data_dir={data}",
        "--device=cpu",
        *words,
        f"--{knob}={tmp_path / 'nowhere'}",
    )
    assert f"{tmp_path / 'nowhere'}" in said and not data.exists()


def test_who_listens_instead_of_a_recogniser_that_cannot_be_had_is_said_when_a_run_is_prepared(
    tiny, tmp_path, capsys, no_hub, no_package
):
    knobs = tiny | {"out_dir": tmp_path, "recogniser": "base.en"}
    call(system_module, "prepare", *options(knobs | {"eval_interval": 1}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recogniser: ")]
    assert len(said) == 1 and "Whisper base.en cannot be downloaded" in said[0]
    call(system_module, "prepare", *options(knobs))  # without evaluations nobody listens
    assert "recogniser" not in capsys.readouterr().out


# Precision


def settled(out_dir, **train) -> str:
    config = configs.from_dict(configs.TTSConfig, {"out_dir": str(out_dir), "train": train})
    return settle_precision(config, CPU, world=1).train.dtype


def test_precision_is_bf16_only_on_a_cpu_that_has_it_and_is_faster_with_it(tmp_path, monkeypatch):
    assert settled(tmp_path, dtype="bf16") == "bf16" and settled(tmp_path, dtype="fp32") == "fp32"
    has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    slow, fast = 2.0, 1.0
    for bf16, fp32, expected in (
        (fast, slow, "bf16" if has_it else "fp32"),
        (slow, fast, "fp32"),
        (fast, fast, "fp32"),
    ):
        monkeypatch.setattr(device_module, "time_matmul", {torch.bfloat16: bf16, torch.float32: fp32}.get)
        assert settled(tmp_path) == expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(device_module, "time_matmul", {torch.bfloat16: fast, torch.float32: slow}.get)
    assert settled(tmp_path) == "fp32"


def test_a_run_that_goes_on_keeps_its_precision_whatever_is_measured_now(run, tmp_path, monkeypatch):
    again = shutil.copytree(run, tmp_path / "run")
    facts = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(facts | {"dtype": "bf16"}))
    monkeypatch.setattr(system_module, "pick_dtype", lambda device: "fp32")
    assert settled(again) == "bf16"
    (again / "run.json").write_text(json.dumps(facts | {"dtype": "bf16", "hardware": "8 x another"}))
    assert settled(again) == "fp32"  # elsewhere it is chosen anew
    for path in (again / "checkpoints").iterdir():
        path.unlink()
    (again / "run.json").write_text(json.dumps(facts | {"dtype": "bf16"}))
    assert settled(again) == "fp32"  # there is nothing to go on from


def test_a_matrix_product_is_measured_in_either_precision():
    assert device_module.time_matmul(torch.float32) > 0 and device_module.time_matmul(torch.bfloat16) > 0


def test_a_save_that_fails_leaves_the_older_checkpoint_whole(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save_checkpoint(
        folder / "step_0000001.pt", {"config": {}, "model": {}, "ema": {}, "step": 1}, keep=1
    )
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.save_checkpoint(
            folder / "step_0000002.pt", {"model": torch.zeros(1000), "step": lambda: 2}, keep=1
        )
    assert checkpoint.newest_checkpoint(tmp_path) == folder / "step_0000001.pt"
    assert checkpoint.load_checkpoint(folder / "step_0000001.pt")["step"] == 1


def whole(value: float) -> dict:
    """What can be saved and loaded, with a tensor in each place that a state has them."""
    tensors = {"weight": torch.full((1000,), value)}
    optimizers = [{"state": {0: {"momentum": tensors["weight"].clone()}}, "betas": (0.9, 0.95)}]
    return {"config": {}, "step": 1, "model": tensors, "ema": tensors, "optimizers": optimizers}


@pytest.fixture
def held_up(monkeypatch):
    """An event without which no checkpoint is written: a disk that takes its time."""
    may_write = threading.Event()
    save = checkpoint.save_checkpoint

    def late(*arguments):
        assert may_write.wait(60)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)
    yield may_write
    may_write.set()


def test_what_is_saved_is_as_it_was_when_save_returned_whatever_training_does_to_it_then(tmp_path, held_up):
    saver = checkpoint.Saver()
    state = whole(1.0)
    saver.save(tmp_path / checkpoint.file_name(1), state, 1)
    assert not saver.finished() and not any(tmp_path.iterdir())  # training goes on before it is written
    for tensor in (state["model"]["weight"], state["optimizers"][0]["state"][0]["momentum"]):
        tensor.zero_()
    held_up.set()
    measured = saver.finish()
    assert measured.keys() == {"perf/save_ms", "perf/save_write_sec"} and min(measured.values()) > 0
    found = checkpoint.load_checkpoint(tmp_path / checkpoint.file_name(1))
    assert torch.equal(found["model"]["weight"], torch.ones(1000))
    assert torch.equal(found["optimizers"][0]["state"][0]["momentum"], torch.ones(1000))
    assert found["optimizers"][0]["betas"] == (0.9, 0.95) and saver.finish() == {}


def test_one_checkpoint_is_written_at_a_time(tmp_path, held_up):
    saver = checkpoint.Saver()
    saver.save(tmp_path / checkpoint.file_name(1), whole(1.0), 9)
    threading.Timer(0.2, held_up.set).start()
    saver.save(tmp_path / checkpoint.file_name(2), whole(2.0), 9)
    assert checkpoint.load_checkpoint(tmp_path / checkpoint.file_name(1))
    saver.finish()
    assert len(checkpoint.find_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("call", ["save", "finished", "finish"])
def test_a_write_that_failed_is_raised_by_whatever_is_called_next_and_once(tmp_path, call):
    (tmp_path / "checkpoints").touch()  # a file where the folder should be
    saver = checkpoint.Saver()
    words = (tmp_path / "checkpoints" / checkpoint.file_name(1), whole(1.0), 1)
    saver.save(*words)
    concurrent.futures.wait([saver.write])
    with pytest.raises(UserError, match="step_0000001.pt: cannot be written .*; the last good .* none yet"):
        getattr(saver, call)(*words if call == "save" else ())
    assert saver.finish() == {}


def test_what_something_else_ended_still_writes_its_checkpoint_or_says_why_not(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from tracking import checkpoint\n"
        "state = {'config': {}, 'model': {'w': torch.ones(3_000_000)}, 'ema': {}, 'step': 1}\n"
        "for folder in sys.argv[1:]: checkpoint.Saver().save(Path(folder, 'step_0000001.pt'), state, 1)\n"
        "sys.exit('out of memory')"
    )
    (tmp_path / "file").touch()
    words = [sys.executable, "-c", code, str(tmp_path / "folder"), str(tmp_path / "file" / "folder")]
    ended = subprocess.run(words, cwd=checkpoint.ROOT, capture_output=True, text=True)
    told = r"out of memory\nerror: .*step_0000001.pt: cannot be written .*\n"
    assert ended.returncode == 1 and re.fullmatch(told, ended.stderr), ended.stderr
    assert checkpoint.load_checkpoint(tmp_path / "folder" / "step_0000001.pt")["model"]["w"].all()


def test_a_log_that_finds_no_room_names_the_last_good_checkpoint(tmp_path):
    writer = logger.MetricsLogger(str(tmp_path), {}, "disabled", "", "", 0)
    writer.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot be written .No space left on device.; .* none yet"):
        writer.log(1, {"train/loss": 1.0})


def test_a_source_that_is_read_only_is_copied_again_by_the_next_start(tmp_path, monkeypatch):
    source = tmp_path / "tree" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    source.chmod(0o444)
    monkeypatch.setattr(checkpoint, "ROOT", source.parent)
    copy = tmp_path / "source" / "a.py"
    checkpoint.copy_source(copy.parent)
    assert copy.read_text() == "1" and copy.stat().st_mode & 0o200
    copy.chmod(0o444)  # as copies were once
    source.unlink()
    source.write_text("2")
    checkpoint.copy_source(copy.parent)
    assert copy.read_text() == "2"


def test_without_git_or_its_history_the_source_is_named_by_a_digest_that_every_copy_has(
    tmp_path, monkeypatch
):
    checkpoint.copy_source(tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no git
    name = checkpoint.commit()
    assert re.fullmatch("source sha256:[0-9a-f]{10}", name)
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "copy")
    assert checkpoint.commit() == name
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "copy")  # no history
    assert checkpoint.commit() == name
    (tmp_path / "copy" / "train.py").write_text("# changed")
    assert checkpoint.commit() != name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_no_room_and_no_right_are_one_line_wherever_they_are_met(number, capsys):
    def fail():
        raise OSError(number, os.strerror(number), "x.png")

    with pytest.raises(SystemExit) as end:
        entry.run_main(fail)
    told = f"error: x.png: cannot be read or written ({os.strerror(number)})\n"
    assert end.value.code == 2 and capsys.readouterr().err == told


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 6):
        checkpoint.save_checkpoint(tmp_path / "checkpoints" / f"step_{step:07d}.pt", {"step": step}, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_0000004.pt",
        "step_0000005.pt",
    ]


def test_only_what_a_run_wrote_is_pruned_and_resumed_from_and_that_by_number(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    others = {"step_best.pt", "step_4.pt", "step_00000099.pt", "step_0000099 (copy).pt", "step_²³.pt"}
    for name in others:
        (folder / name).touch()
    assert checkpoint.newest_checkpoint(tmp_path) is None
    for step in (9_999_998, 9_999_999, 10_000_000):
        checkpoint.save_checkpoint(folder / checkpoint.file_name(step), {"step": step}, keep=2)
    assert checkpoint.newest_checkpoint(tmp_path) == folder / "step_10000000.pt"
    kept = {"step_9999999.pt", "step_10000000.pt"}
    assert {path.name for path in folder.iterdir()} == others | kept


def test_weights_are_drawn_from_the_seed():
    one, same, other = (
        system_module.build(
            configs.from_dict(configs.TTSConfig, {**SHAPE, "seed": seed})
        ).decoder.in_proj.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


# The average


@pytest.fixture
def layer():
    return torch.nn.Linear(1, 1, bias=False)


def test_the_average_forgets_its_start_soon_and_then_decays(layer):
    layer.weight.data.fill_(0.0)
    average, expected = optim.EMA(layer, 0.9), 0.0
    layer.weight.data.fill_(1.0)
    for step in range(200):
        average.update(step)
        decay = min(0.9, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay)
        if step == 0:
            assert expected == pytest.approx(0.9)
    assert average.shadow["weight"].item() == pytest.approx(expected) and expected > 0.999
    layer.weight.data.fill_(0.0)
    average.update(200)
    assert average.shadow["weight"].item() == pytest.approx(0.9, abs=1e-3)


def test_without_decay_the_average_is_the_weights(layer):
    average = optim.EMA(layer, 0.0)
    layer.weight.data.fill_(3.0)
    average.update(0)
    assert average.shadow["weight"].item() == 3.0


def test_the_average_is_borrowed_and_given_back_bit_for_bit(layer):
    average = optim.EMA(layer, 0.9)
    layer.weight.data.add_(1 / 3)
    average.update(0)
    live, mean = layer.weight.clone(), average.shadow["weight"].clone()
    with pytest.raises(ZeroDivisionError), average:
        assert torch.equal(layer.weight, mean) and not torch.equal(layer.weight, live)
        raise ZeroDivisionError
    assert torch.equal(layer.weight, live) and torch.equal(average.shadow["weight"], mean)


def test_a_frozen_parameter_is_not_averaged():
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False))
    assert list(optim.EMA(layers, 0.9).shadow) == ["0.weight", "0.bias"]


# Optimizers and devices


def test_every_trained_parameter_has_exactly_one_optimizer():
    config = configs.from_dict(configs.TTSConfig, SHAPE)
    network = system_module.build(config)
    given = [
        id(p)
        for o in optim.make_optimizers(network, 0.02, 3e-4, 0.01)
        for group in o.param_groups
        for p in group["params"]
    ]
    assert sorted(given) == sorted(id(p) for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("alignment", ["mas", "learned", "uniform", "none"])
@pytest.mark.parametrize("upsample_text", ["true", "false"])
def test_every_trained_parameter_gets_a_gradient(tiny, alignment, upsample_text):
    """With one that gets none, several ranks cannot train: DistributedDataParallel waits for it."""
    config = system_module.load_config(
        "", options(tiny | {"alignment": alignment, "upsample_text": upsample_text})
    )
    corpus = system_module.open_corpus(config)
    network = system_module.build(config, *corpus.statistics)
    network(system_module.open_batches(config, corpus, network, 0, 1).train(0))["loss"].backward()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_in_words():
    with pytest.raises(UserError, match="--device cpu"):
        device_module.pick_device("cuda")
    assert device_module.pick_device("auto") == CPU


# Another system: tests/toy/system.py, which has no more than it must, no Muon, no recogniser


@pytest.fixture
def toy(monkeypatch, tmp_path) -> dict:
    """The knobs of a run of it, once it stands in the table as any does."""
    monkeypatch.setitem(SYSTEMS, "toy", "toy.system:Toy")
    folders = {"out_dir": tmp_path / "run", "data_dir": tmp_path / "corpus"}
    steps = {"steps": 200, "warmup": 0, "lr": 0.05, "val_interval": 100, "eval_interval": 200}
    return folders | steps | {"system": "toy", "device": "cpu", "dtype": "fp32", "wandb": "disabled"}


def test_a_system_in_a_file_is_prepared_trained_scored_sampled_and_reported(toy, tmp_path, refusal):
    assert "made by `python system.py prepare`" in refusal(train_module, *options(toy))
    call(system_module, "prepare", *options(toy))
    call(train_module, *options(toy))
    run = tmp_path / "run"
    found = metrics(run)
    assert found["val/pitch_loss"] < 0.01 and found["eval/pitch_error"] < 5
    assert "Pitch error, Hz" in (run / "report.html").read_text()
    wav = tmp_path / "x.wav"
    call(sample_module, f"--ckpt={run}", "--text=la la", f"--out={wav}", "--png")
    wave, rate = soundfile.read(wav)
    assert abs(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave) - 200) < 5
    assert wav.with_suffix(".png").exists()


def test_what_a_system_does_not_have_is_refused_in_words(toy, tmp_path, refusal):
    call(system_module, "prepare", *options(toy))
    call(train_module, *options(toy | {"steps": 1, "eval_interval": 0}))
    weights = f"--ckpt={tmp_path / 'run'}"
    said = refusal(sample_module, weights, "--text=la", "--lora=x", f"--out={tmp_path / 'x.wav'}")
    assert said == "error: --lora x: system toy takes no LoRA; leave it out"
    said = refusal(system_module, "export", weights, f"--out={tmp_path / 'new'}")
    assert "no other software loads system toy" in said


def metrics(run: Path) -> dict:
    """The newest value of each."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    return found


# One with more: a frozen base under a trained adapter, two pictures, a recogniser's word error rate


@configs.section
class HummerConfig(configs.TTSConfig):
    system: Literal["hummer"] = "hummer"


@dataclass
class Hum:
    wave: torch.Tensor
    sample_rate: int = 16000

    def draw(self, stem: Path) -> dict[str, str]:
        names = {"picture": f"{stem.name}.png", "confidence": f"{stem.name}.confidence.png"}
        for name in names.values():
            plot.save_attention_png(np.eye(3), "hum", stem.with_name(name))
        return names


class Hums(Whistles):
    def __init__(self, config):
        self.folder = Path(config.out_dir)
        self.seconds = 0.5

    def recording(self, clip):
        return hum(self.seconds), 16000


class Rounds(WordBatches):
    def __init__(self, config, corpus, tokenizer, rank, world):
        self.seed = config.seed

    def train(self, step, micro=0):
        return self.draw(step, 4)

    def validation(self):
        return [self.draw(1000, 3), self.draw(1001, 2)]

    def draw(self, step, rows):
        rng = np.random.default_rng((self.seed, step))
        x = torch.from_numpy(rng.standard_normal((rows, 8), dtype=np.float32))
        return {"x": x, "t": torch.rand(rows), "frames": torch.full((rows,), 50)}


class Hummer(Toy):
    """Hums a second for every prompt, as loud as the adapter's first weight."""

    config_class = HummerConfig
    corpus_class = Hums
    batches_class = Rounds
    output_kinds = ("wav", "png")
    speaks = True
    max_characters = 30
    scores = {
        "lsd": Score("log-spectral distance", "dB"),
        "path_distance": Score("distance to the colour path"),
    }

    def __init__(self, config):
        System.__init__(self)
        self.config = config
        self.base = torch.nn.Linear(8, 8).requires_grad_(False)
        self.adapter = torch.nn.Linear(8, 8, bias=False)
        self.register_buffer("scale", torch.ones(()))

    @staticmethod
    def prepare(config):
        Path(config.out_dir, "prepared").touch()

    def forward(self, batch):
        error = self.base(batch["x"]) + self.scale * self.adapter(batch["x"]) - batch["x"]
        return {"loss": error.square().mean(), "error": error.square().mean(), "offset": error.mean()}

    def sample(self, prompts, settings):
        return [Hum(self.adapter.weight[0, 0].item() * hum(1.0)) for _ in prompts]

    def reference(self, corpus, clip):
        return Hum(corpus.recording(clip)[0] / 2)

    def score(self, output, corpus, clip):
        recorded = corpus.recording(clip)[0]
        return {"lsd": abs(output.wave.std() - recorded.std()).item(), "path_distance": 0.25}

    def load_adapter(self, name):
        if not Path(name).is_file():
            raise UserError(f"--lora {name}: no such file")
        self.adapter.weight.data.fill_(float(Path(name).read_text()))


def hum(seconds: float) -> torch.Tensor:
    return torch.sin(torch.arange(int(seconds * 16000)) / 20)


@pytest.fixture
def hummer(monkeypatch, random_whisper, tmp_path) -> dict:
    """The knobs of a run of it."""
    monkeypatch.setitem(SYSTEMS, "hummer", f"{__name__}:Hummer")
    return TINY | {
        "system": "hummer",
        "out_dir": tmp_path,
        "steps": 2,
        "val_interval": 2,
        "eval_interval": 2,
        "limit": 3,
        "recogniser": random_whisper,
    }


@pytest.fixture
def hummed(hummer, tmp_path) -> Path:
    call(train_module, *options(hummer))
    return tmp_path


def test_prepare_is_the_systems_own(hummer, tmp_path, refusal):
    call(system_module, "prepare", *options(hummer))
    assert (tmp_path / "prepared").exists()
    assert "unknown key" in refusal(system_module, "prepare", "--sytem=tts")


def test_of_two_prepares_at_once_the_second_waits_until_the_first_is_gone_however_it_ended(tmp_path):
    code = "import sys; from pathlib import Path; from corpora.shards import alone\n"
    code += "with alone(Path(sys.argv[1])): print('alone', flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path / ".corpus.lock")]
    first = subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline()
    knobs = TINY | {"data_dir": tmp_path / "corpus", "sentences": 1, "workers": 1}
    second = start("system.py", "prepare", *options(knobs))
    assert "waiting for its end" in second.stdout.readline()
    assert not (tmp_path / "corpus").exists()
    first.kill()
    first.communicate()
    assert "64 val" in finish(second)


def test_a_checkpoint_holds_what_is_trained_and_the_rest_is_as_built(hummed):
    state = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(hummed))
    assert state["model"].keys() == {"adapter.weight", "scale"} and state["ema"].keys() == {"adapter.weight"}
    config, network, step = system_module.load(str(hummed), CPU, {})
    assert step == 2 and torch.equal(network.base.weight, system_module.build(config).base.weight)
    assert torch.equal(network.adapter.weight, state["ema"]["adapter.weight"])
    state["model"]["base.weight"] = network.base.weight
    torch.save(state, hummed / "x.pt")
    assert "base.weight is not part of this model" in refused(hummed / "x.pt")


def test_without_hidden_matrices_adamw_has_all_and_its_rate_is_logged(hummed):
    assert len(checkpoint.load_checkpoint(checkpoint.newest_checkpoint(hummed))["optimizers"]) == 1
    first = json.loads((hummed / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/lr"] == pytest.approx(
        3e-4 * train_module.lr_scale(system_module.load_config(str(hummed / "config.yaml")), 0, 0.5)
    )


def test_of_hidden_matrices_alone_muon_has_all():
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.hidden_matrices = lambda: [layer.weight]
    assert [type(o) for o in optim.make_optimizers(layer, 0.02, 3e-4, 0.01)] == [optim.Muon]


def test_a_run_says_how_many_parameters_are_frozen(hummer, tmp_path, capsys):
    call(train_module, *options(hummer | {"steps": 1, "eval_interval": 0}))
    assert "trained parameters beside 0.0 M frozen ones" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert (recorded["parameters"], recorded["frozen_parameters"]) == (64, 72)


def test_another_system_resumes(hummer, hummed, capsys):
    call(train_module, *options(hummer | {"steps": 3}))
    assert (
        "resumed from" in capsys.readouterr().out
        and checkpoint.newest_checkpoint(hummed).name == "step_0000003.pt"
    )


def test_another_system_is_evaluated_by_its_own_losses_and_scores(hummed, capsys):
    found = {
        key: value
        for line in (hummed / "metrics.jsonl").read_text().splitlines()
        for key, value in json.loads(line).items()
    }
    assert {key for key in found if key.startswith("val/")} == {"val/error", "val/offset"}
    config, network, _ = system_module.load(str(hummed), CPU, {})
    x = torch.cat([batch["x"] for batch in Rounds(config, None, None, 0, 1).validation()])
    # of clips, not of batches
    assert found["val/error"] == pytest.approx(network({"x": x})["error"].item())
    loud, quiet = hum(0.5).std().item(), abs(network.adapter.weight[0, 0].item()) * hum(1.0).std().item()
    assert found["eval/lsd"] == pytest.approx(abs(quiet - loud)) and found[
        "eval/lsd_vocoded"
    ] == pytest.approx(loud / 2)
    assert (
        found["eval/path_distance"] == found["eval/path_distance_vocoded"] == 0.25 and "eval/mcd" not in found
    )
    call(evaluator, f"--ckpt={hummed}", "--limit=3")
    out = capsys.readouterr().out
    again = json.loads(out.splitlines()[-1])
    assert again.keys() <= found.keys() and without_times(found | again) == without_times(found)
    assert (
        f"log-spectral distance {found['eval/lsd']:.3g} dB  at best {found['eval/lsd_vocoded']:.3g} dB" in out
    )


def test_another_systems_pictures_are_kept_and_reported(hummed):
    folder = hummed / "eval" / "step_0000002"
    row = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert {
        row[key]
        for key in ("picture", "confidence", "reference_picture", "reference_confidence", "reference_audio")
    } == {"000.png", "000.confidence.png", "000.ref.png", "000.ref.confidence.png", "000.ref.wav"}
    assert (hummed / "sample.png").read_bytes() == (folder / "000.png").read_bytes()
    page = (hummed / "report.html").read_text()
    assert page.count("<img") == 3 * 4 and page.count("<audio") == 3 * 2
    for words in (
        "Log-spectral distance, dB",
        "Distance to the colour path",
        "reference confidence",
        "log-spectral distance",
    ):
        assert words in page
    assert "cepstral" not in page


def test_another_system_is_sampled_with_its_pictures_and_adapters(hummed, tmp_path, refusal):
    (tmp_path / "loud").write_text("0.5")
    (tmp_path / "mute").write_text("0")
    said = f"--text={'One two three. ' * 3}", f"--out={tmp_path / 'new' / 'x.wav'}"
    for weights in ((f"--ckpt={hummed}",), (f"--config={hummed / 'config.yaml'}",)):
        peaks = []
        for lora in ("loud", "mute"):
            call(sample_module, *weights, *said, f"--lora={tmp_path / lora}")
            peaks.append(abs(soundfile.read(tmp_path / "new" / "x.wav")[0]).max())
        assert peaks == pytest.approx([0.5, 0], abs=1e-3)
        assert f"{tmp_path}/none: no such" in refusal(
            sample_module, *weights, *said, f"--lora={tmp_path / 'none'}"
        )
    pictures = {"x.png", "x.confidence.png", "x.2.png", "x.2.confidence.png", "x.3.png", "x.3.confidence.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"x.wav", *pictures}


# The contract


def public(cls: type) -> dict:
    """What a class itself defines, but for private names."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def parameters(function) -> list[str]:
    return [*inspect.signature(function).parameters]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_overrides_what_base_system_has_with_the_same_signatures(name):
    cls = system_module.find(name)
    assert issubclass(cls, System)
    for method, expected in public(System).items():
        made = getattr(cls, method)
        assert callable(made) == callable(expected), method
        if inspect.isroutine(made):
            assert parameters(made) == parameters(getattr(System, method)), method
    for method in ("forward", "sample", "reference"):  # which have no default
        assert getattr(cls, method) is not getattr(System, method), method


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_corpus_and_its_batches_have_the_methods_of_the_protocol(name):
    cls = system_module.find(name)
    for protocol, made in ((Corpus, cls.corpus_class), (Batches, cls.batches_class)):
        for method, expected in public(protocol).items():
            assert parameters(getattr(made, method)) == parameters(expected), method
