"""Training as users see it: ranks, interruption, evaluation, divergence, compilation, and what a run leaves
behind.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, THREE_STEPS, call, finish, options, start, without_times

import config as configs
import parallel
import sample
import system
import train
from tracking import logger
from tracking.checkpoint import load_checkpoint, newest_checkpoint

STEPS = 18  # of the run that is interrupted: seconds, enough to hit its middle


def checkpoint(folder: Path) -> dict:
    return load_checkpoint(newest_checkpoint(folder))


def rows(folder: Path, key: str) -> list:
    """The values of a metric, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def flat(state, name: str = "") -> dict[str, object]:
    """Nested dicts and lists as one dict: {"/model/mean": tensor, ...}."""
    if not isinstance(state, (dict, list, tuple)):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{name}/{key}").items()}


def assert_identical(a: dict, b: dict, parts=("step", "model", "ema", "optimizers")) -> None:
    """Bit for bit."""
    a, b = (
        {path: leaf for part in parts for path, leaf in flat(state[part], part).items()} for state in (a, b)
    )
    assert a.keys() == b.keys()
    different = [
        path
        for path in a
        if not (torch.equal(a[path], b[path]) if torch.is_tensor(a[path]) else a[path] == b[path])
    ]
    assert not different


def assert_close(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    """Weights, their average, and the optimizers' momenta, which are the gradients."""
    a, b = ({path: leaf for path, leaf in flat(state).items() if torch.is_tensor(leaf)} for state in (a, b))
    assert a.keys() == b.keys() and len(a) > 100
    assert max((a[path] - b[path]).abs().max().item() for path in a) < tolerance


@pytest.fixture
def little_room():
    """A block in which no file grows beyond 100 kB, as if the disk were full then."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited()


# Ranks


def test_the_same_command_on_two_ranks_trains_as_on_one_process(two_ranks, double_batch):
    assert_close(checkpoint(two_ranks), checkpoint(double_batch))
    assert rows(two_ranks, "train/grad_norm") == pytest.approx(
        rows(double_batch, "train/grad_norm"), rel=1e-5
    )
    assert rows(two_ranks, "train/loss") == pytest.approx(rows(double_batch, "train/loss"), rel=1e-5)


def test_accumulated_micro_batches_train_as_the_double_batch(tiny, double_batch, tmp_path):
    call(
        train,
        *options(
            tiny | THREE_STEPS | {"out_dir": tmp_path, "grad_accum": 2, "val_interval": 0, "eval_interval": 0}
        ),
    )
    assert_close(checkpoint(tmp_path), checkpoint(double_batch))
    assert rows(tmp_path, "train/grad_norm") == pytest.approx(rows(double_batch, "train/grad_norm"), rel=1e-5)


def test_a_start_says_how_many_clips_an_update_takes_and_a_checkpoint_keeps_what_was_asked_for(
    tiny, tmp_path, capsys
):
    knobs = tiny | {"out_dir": tmp_path, "steps": 1, "val_interval": 0, "global_batch": 6, "grad_accum": 3}
    call(train, *options(knobs | {"batch_size": 0}))
    assert "6 clips an update: 3 micro-steps x 2, into " in capsys.readouterr().out
    asked = checkpoint(tmp_path)["config"]["train"]
    assert (asked["global_batch"], asked["batch_size"]) == (6, 0)
    assert system.load_config(str(tmp_path / "config.yaml")).train.batch_size == 0


@pytest.fixture(scope="module")
def gone_on(tiny, double_batch, tmp_path_factory) -> tuple[Path, Path]:
    """The run of `double_batch`, three steps on: by one process, and by two ranks that share its weights."""
    knobs = tiny | THREE_STEPS | {"steps": 6, "eval_interval": 6, "ema": 0.99}
    alone = shutil.copytree(double_batch, tmp_path_factory.mktemp("alone") / "run")
    shared = shutil.copytree(double_batch, tmp_path_factory.mktemp("shared") / "run")
    call(train, *options(knobs | {"out_dir": alone, "batch_size": 8}))
    finish(start("train.py", *options(knobs | {"out_dir": shared, "shard": "true"}), ranks=2))
    return alone, shared


def test_two_ranks_that_share_the_weights_train_and_evaluate_as_one_process(gone_on):
    alone, shared = gone_on
    assert_close(checkpoint(shared), checkpoint(alone))
    for key in ("train/loss", "train/grad_norm", "val/flow_loss", "eval/wer"):
        assert rows(shared, key)[3:] == pytest.approx(rows(alone, key)[3:], rel=1e-5)
    assert len(rows(shared, "train/loss")) == 6 and len(rows(shared, "eval/wer")) == 2


def test_what_ranks_that_share_the_weights_saved_goes_on_without_them(gone_on, tiny):
    ends = []
    for folder in gone_on:
        state = flat(checkpoint(folder))
        assert {type(value) for value in state.values()} <= {torch.Tensor, int, float, str, bool, type(None)}
        knobs = tiny | {"out_dir": folder, "batch_size": 8, "steps": 7, "val_interval": 0}
        call(train, *options(knobs))
        ends.append(checkpoint(folder))
    assert ends[1]["step"] == 7 and not ends[1]["config"]["train"]["shard"]
    assert_close(*ends)


# Interruption


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory) -> tuple[Path, int, int]:
    """A run that got SIGTERM in its middle and was then started again: its folder, its first exit code, the
    step it stood at.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    command = options(
        tiny | {"out_dir": folder, "steps": STEPS, "val_interval": 3, "dtype": "bf16", "wandb": "offline"}
    )
    process = start("train.py", *command)
    next(line for line in process.stdout if line.startswith("step 3/"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    stood_at = checkpoint(folder)["step"]
    assert f"resumed from {newest_checkpoint(folder)}" in finish(start("train.py", *command))
    return folder, process.returncode, stood_at


def test_sigterm_ends_a_run_well_with_a_checkpoint_of_where_it_stands(interrupted):
    _, code, stood_at = interrupted
    assert code == 0 and 3 <= stood_at < STEPS


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(interrupted, tiny, tmp_path):
    call(train, *options(tiny | {"out_dir": tmp_path, "steps": STEPS, "val_interval": 0, "dtype": "bf16"}))
    assert_identical(checkpoint(interrupted[0]), checkpoint(tmp_path))
    assert rows(interrupted[0], "train/loss") == rows(tmp_path, "train/loss")


def test_a_resumed_run_is_the_same_run_to_wandb(interrupted):
    folders = list((interrupted[0] / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.split("-")[-1] for folder in folders}) == 1
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def test_a_new_run_begins_with_the_averaged_weights_of_another_on_its_own_corpus(
    run, tiny, tmp_path, capsys, refusal
):
    begun = tiny | {"init": run, "out_dir": tmp_path, "steps": 1, "lr": 0, "muon_lr": 0, "eval_interval": 0}
    call(train, *options(begun))
    assert f"begins with the weights of {newest_checkpoint(run)}" in capsys.readouterr().out
    weights = checkpoint(tmp_path)["model"]
    trained, expected = checkpoint(run)["model"], checkpoint(run)["ema"]
    assert expected and all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not torch.equal(weights["decoder.out_proj.weight"], trained["decoder.out_proj.weight"])

    # it goes on with its own, wherever the other's are by now
    call(train, *options(begun | {"init": tmp_path / "gone", "steps": 2, "lr": 1}))
    assert "begins with" not in capsys.readouterr().out
    for words, fault in (({"init": tmp_path / "gone"}, "gone"), ({"text": "phonemes"}, "model.text 'bytes'")):
        words = options(begun | {"out_dir": tmp_path / "other"} | words)
        assert fault in refusal(train, *words)
        assert fault in refusal(system, "prepare", *words, f"--data_dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_a_stop_file_ends_a_run_with_a_checkpoint_and_is_removed(tiny, tmp_path):
    (tmp_path / "STOP").touch()
    call(train, *options(tiny | {"out_dir": tmp_path, "steps": 3, "val_interval": 0}))
    assert checkpoint(tmp_path)["step"] == 1 and not (tmp_path / "STOP").exists()


def test_a_finished_run_started_again_changes_nothing_it_made(run, tiny, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    made = {
        path: path.read_bytes()
        for path in [*again.glob("checkpoints/*"), *again.glob("eval/*/*"), again / "metrics.jsonl"]
    }
    call(train, *options(tiny | {"out_dir": again, "steps": 6, "val_interval": 3, "eval_interval": 6}))
    assert made == {
        path: path.read_bytes()
        for path in [*again.glob("checkpoints/*"), *again.glob("eval/*/*"), again / "metrics.jsonl"]
    }


def test_a_run_ends_by_the_clock_with_its_decay_inside_and_is_then_finished(tiny, tmp_path):
    command = options(tiny | {"out_dir": tmp_path, "steps": 10_000, "max_minutes": 0.01, "val_interval": 0})
    call(train, *command)
    ended = checkpoint(tmp_path)
    assert 1 < ended["step"] < 100 and 0.6 <= ended["seconds"] < 10 and rows(tmp_path, "train/lr")[-1] == 0
    call(train, *command)
    assert_identical(checkpoint(tmp_path), ended)


def test_a_terminal_that_is_closed_ends_a_run_well_though_it_says_so_twice_and_cannot_be_printed_to(
    tiny, tmp_path
):
    terminal, screen = os.openpty()
    command = options(tiny | {"out_dir": tmp_path, "steps": 1000, "val_interval": 0})
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *command],
        stdout=screen,
        stderr=screen,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    os.close(screen)
    said = b""
    while b"step 3/" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=600) == 0 and 3 <= checkpoint(tmp_path)["step"] < 1000


def test_a_reader_of_the_log_that_goes_away_changes_nothing(tiny, tmp_path):
    process = start("train.py", *options(tiny | {"out_dir": tmp_path, "steps": 3, "val_interval": 0}))
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait(timeout=600) == 0
    assert checkpoint(tmp_path)["step"] == 3


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_gone_however_it_ended(
    tiny, tmp_path, refusal
):
    code = "import sys, train; f = train.checkpoint.lock(sys.argv[1]); print(f.name, flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout.readline()
    command = options(tiny | {"out_dir": tmp_path, "steps": 1, "val_interval": 0})
    assert f"{tmp_path}: another training is at work there" in refusal(train, *command)
    assert {path.name for path in tmp_path.rglob("*")} == {".lock", "checkpoints"}
    first.kill()
    first.communicate()
    call(train, *command)
    assert checkpoint(tmp_path)["step"] == 1


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_in_one_line_and_leaves_nothing(
    tiny, tmp_path, refusal, little_room
):
    command = tiny | {"out_dir": tmp_path, "val_interval": 0}
    call(train, *options(command | {"steps": 2}))
    with little_room:
        line = refusal(train, *options(command | {"steps": 3}))
    good = f"{tmp_path}/checkpoints/step_0000002.pt"
    assert "step_0000003.pt: cannot be written" in line
    assert line.endswith(f"; the last good checkpoint is {good}")
    assert list((tmp_path / "checkpoints").iterdir()) == [Path(good)] and not list(tmp_path.glob("*.part"))


def test_what_killed_processes_left_half_written_goes_at_the_next_start(run, tiny, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    leftovers = ("checkpoints/step_0000007.part", "checkpoints/step_0000007.pt.77.part", "run.json.77.part")
    for name in (*leftovers, "source/train.py.77.part", "song.part"):
        (again / name).touch()
    call(train, *options(tiny | {"out_dir": again, "steps": 6, "val_interval": 3, "eval_interval": 6}))
    assert [path.name for path in again.rglob("*.part")] == ["song.part"]


def test_a_run_that_was_killed_while_it_evaluated_does_so_when_it_is_started_again(run, tiny, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    log = again / "metrics.jsonl"
    whole = logger.read_lines(log)
    (evaluated,) = [line for line in whole if "eval/wer" in line]
    assert "val/flow_loss" in evaluated
    log.write_text("".join(json.dumps(line) + "\n" for line in whole if line != evaluated))
    shutil.rmtree(again / "eval")
    command = options(tiny | {"out_dir": again, "steps": 6, "val_interval": 3, "eval_interval": 6})
    for _ in range(2):
        call(train, *command)
        lines = [line for line in map(without_times, logger.read_lines(log)) if len(line) > 1]
        assert lines == [line for line in map(without_times, whole) if len(line) > 1]
    assert (again / "eval/step_0000006/000.wav").read_bytes() == (again / "sample.wav").read_bytes()


def test_a_run_goes_on_with_its_corpus_wherever_that_is_and_not_with_one_of_another_loudness(
    run, tiny, tmp_path, refusal
):
    again = shutil.copytree(run, tmp_path / "again")
    moved = shutil.copytree(tiny["data_dir"], tmp_path / "moved")
    command = options(tiny | {"out_dir": again, "steps": 7, "val_interval": 0, "data_dir": moved})
    index = json.loads((moved / "index.json").read_text())
    quiet = index | {"mean": index["mean"] - 3.8}  # 33 dB
    (moved / "index.json").write_text(json.dumps(quiet))
    line = refusal(train, *command)
    assert "step_0000006.pt: was trained on a corpus of mean" in line and f"that in {moved} has" in line
    (moved / "index.json").write_text(json.dumps(index))
    call(train, *command)
    assert checkpoint(again)["step"] == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take a user id that nobody has")
def test_a_user_id_without_a_name_and_a_home_trains(tiny, tmp_path):
    nameless = "import os, runpy, sys; os.setresuid(54321, 0, 0); del sys.argv[0]; "
    nameless += "runpy.run_path(sys.argv[0], run_name='__main__')"
    named = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "TORCHINDUCTOR_CACHE_DIR")
    knobs = tiny | {"out_dir": tmp_path, "steps": 1, "val_interval": 0, "wandb": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", nameless, "train.py", *options(knobs)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in named},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path)["step"] == 1 and not (ROOT / "~").exists()


# The course of training


def test_evaluating_changes_nothing_about_training(tiny, tmp_path):
    for name, every in (("never", 0), ("always", 1)):
        call(
            train,
            *options(
                tiny
                | {
                    "out_dir": tmp_path / name,
                    "steps": 3,
                    "val_interval": every,
                    "eval_interval": every,
                    "limit": 2,
                }
            ),
        )
    assert len(rows(tmp_path / "always", "eval/wer")) == 3 and not rows(tmp_path / "never", "val/flow_loss")
    assert_identical(checkpoint(tmp_path / "never"), checkpoint(tmp_path / "always"))


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tiny, tmp_path, refusal):
    command = tiny | {"out_dir": tmp_path, "val_interval": 0}
    call(train, *options(command | {"steps": 2}))
    line = refusal(train, *options(command | {"steps": 9, "lr": 1e30, "muon_lr": 1e30}))
    assert "step 4" in line and f"{tmp_path}/checkpoints/step_0000002.pt" in line
    _, network, step = system.load(tmp_path, torch.device("cpu"))
    assert step == 2 and all(value.isfinite().all() for value in network.state_dict().values())


def test_the_rate_warms_up_and_falls_to_zero():
    steps, warmup = 1000, 100
    for schedule, halfway in (("cosine", 0.5), ("trapezoid", 1.0)):
        config = system.load_config(
            "", options({"schedule": schedule, "steps": steps, "warmup": warmup, "decay": 0.2})
        )
        rates = [
            train.lr_scale(config, step, train.fraction_done(config, step, 0.0, torch.device("cpu"), 1))
            for step in range(steps)
        ]
        rising = rates[:warmup] if schedule == "trapezoid" else rates[: warmup // 2]
        assert rising == sorted(rising) and 0 < rates[0] < 0.02
        assert rates[steps // 2 - 1] == pytest.approx(halfway) and rates[-1] == pytest.approx(0, abs=1e-9)
        assert rates[9 * steps // 10 - 1] == pytest.approx(
            0.5 if schedule == "trapezoid" else (1 - math.cos(math.pi / 10)) / 2
        )


def test_progress_is_by_steps_or_by_the_clock_whichever_is_ahead():
    config = system.load_config("", options({"steps": 100, "max_minutes": 2}))
    assert train.fraction_done(config, 9, 6.0, torch.device("cpu"), 1) == pytest.approx(0.1)
    assert train.fraction_done(config, 9, 60.0, torch.device("cpu"), 1) == pytest.approx(0.5)
    assert train.fraction_done(config, 9, 1e9, torch.device("cpu"), 1) == 1


def test_after_ten_updates_a_run_says_how_long_it_will_take(tiny, tmp_path, capsys):
    call(train, *options(tiny | {"out_dir": tmp_path, "steps": 12, "val_interval": 0, "log_interval": 12}))
    said = [line for line in capsys.readouterr().out.splitlines() if "minutes of training" in line]
    assert len(said) == 1 and "for the 2 to go" in said[0]


@pytest.mark.parametrize(
    "bound, code, verdict",
    [("at most 99", 0, "met, "), ("at most 0.0001", 1, "missed, "), ("at least 99", 1, "missed, ")],
)
def test_a_recipe_knows_its_figure_and_says_whether_it_is_met(
    run, tiny, tmp_path, capsys, bound, code, verdict
):
    done = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        call(train, *options(tiny | {"out_dir": done, "steps": 6, "expect": f"{{eval/mcd: {bound}}}"}))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert (
        end.value.code == code
        and last_line.startswith(f"expected eval/mcd {bound[:7]}")
        and verdict in last_line
    )


def test_what_was_not_measured_is_neither_met_nor_missed(run, tiny, tmp_path, capsys):
    done = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        call(train, *options(tiny | {"out_dir": done, "steps": 6, "expect": "{eval/wer/en: at least 0.9}"}))
    assert (
        end.value.code == 0
        and capsys.readouterr().out.splitlines()[-1] == "expected eval/wer/en at least 90.0 %: not measured"
    )


# Compiled


def test_a_recipe_goes_on_uncompiled_where_there_is_no_compiler_and_says_so_before_it_prepares(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("CXX", str(tmp_path / "g++-99"))
    torch._dynamo.utils.counters.clear()
    knobs = tiny | {"out_dir": tmp_path / "run", "steps": 1, "val_interval": 0, "compile": "true"}
    for module, words in ((system, ["prepare"]), (train, [])):
        call(module, *words, *options(knobs))
        lines = capsys.readouterr().out.splitlines()
        said = [line for line in lines if line.startswith("train.compile: ")]
        assert len(said) == 1 and said[0] == lines[0] and said[0].endswith("; going on uncompiled")
    assert not torch._dynamo.utils.counters["stats"]
    assert checkpoint(tmp_path / "run")["config"]["train"]["compile"] is True


def test_the_network_is_compiled_at_the_first_update_alone_whatever_lengths_follow(tiny, tmp_path):
    config = system.load_config("", options(tiny | {"out_dir": tmp_path, "layers": 1, "frame_stack": 1}))
    corpus = system.open_corpus(config)
    network = system.build(config, *corpus.statistics)
    batches = system.open_batches(config, corpus, network, 0, 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = dataclasses.replace(config.train, compile=True)
    model = parallel.wrap(network, compiled, torch.device("cpu"), 1, backend)
    shapes = set()
    for step in range(5):
        batch = batches.train(step)
        parallel.mark_lengths(batch, network.varying)
        model(batch)["loss"].backward()
        shapes.add((batch["x"].shape[1], batch["ids"].shape[1]))
    assert len(shapes) > 2 and len(graphs) == 1


def rank_of_two(rank: int, port: int, path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank == 1:  # it alone has no compiler
        os.environ["CXX"] = str(path / "g++-99")
    asked = system.load_config("", ["--compile=true"])
    settled = system.settle_compile(asked, torch.device("cpu"), 2)
    (path / f"{rank}.json").write_text(json.dumps(settled.train.compile))
    dist.destroy_process_group()


def test_ranks_compile_all_or_none(tmp_path, unused_port):
    torch.multiprocessing.spawn(rank_of_two, (unused_port, tmp_path), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [False, False]


@pytest.mark.parametrize("size_mb", [1, 150, 644, 8400])  # 644: configs/ljspeech.yaml, 8400: music_giant.yaml
def test_gradients_are_reduced_in_few_buckets_each_of_which_is_a_graph(size_mb):
    """The first of them is closed at 1 MB."""
    assert parallel.bucket_mb(size_mb * 2**20) >= 200
    assert 1 + math.ceil(size_mb / parallel.bucket_mb(size_mb * 2**20)) <= 4


# What is left behind


def test_a_run_leaves_all_that_tells_of_it(run):
    seen = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert seen >= {
        "step",
        "train/loss",
        "train/flow_loss",
        "train/duration_loss",
        "train/grad_norm",
        "train/lr",
        "val/flow_loss",
        "perf/frames_per_sec",
        "perf/step_ms",
        "perf/save_ms",
        "perf/save_write_sec",
        *(f"perf/eval_{part}_sec" for part in ("reference", "sample", "vocode", "transcribe", "score")),
        "eval/wer",
        "eval/wer_low",
        "eval/wer_high",
        "eval/wer_ground_truth",
        "eval/wer_vocoded",
        "eval/recogniser",
        "eval/mcd",
    }
    assert (
        len(rows(run, "train/loss")) == 6
        and len(rows(run, "val/flow_loss")) == 2
        and len(rows(run, "eval/wer")) == 1
    )
    assert "<audio" in (run / "report.html").read_text() and (run / "sample.wav").stat().st_size > 1000
    assert system.load_config(str(run / "config.yaml")) == configs.from_dict(
        configs.TTSConfig, checkpoint(run)["config"]
    )
    assert torch.__version__.startswith(json.loads((run / "run.json").read_text())["versions"]["torch"])


def test_a_run_keeps_its_whole_source_and_runs_from_it(run):
    source = run / "source"
    kept = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    ours = ("*.py", "*/*.py", "assets/*", "configs/*", "*/*.json", "*/*.yaml")
    expected = {path.relative_to(ROOT): path for pattern in ours for path in ROOT.glob(pattern)}
    for path, original in expected.items():
        if path.parts[0] not in ("tests", "out", "data"):
            assert kept[path] == original.read_bytes(), path
    assert not any(path.parts[0] in ("tests", "out", "data") for path in kept)
    command = [sys.executable, str(source / "train.py"), "--config", str(run / "config.yaml"), "--help"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and f"[{run}]" in " ".join(done.stdout.split()), done.stderr


def test_checkpoints_are_pruned_to_the_newest(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_0000004.pt",
        "step_0000006.pt",
    ]


@pytest.fixture(scope="module")
def frozen(tiny, t5_folder, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the knobs of a run on the features of a frozen T5; every batch is the same four clips in
    the same shape.
    """
    folder = tmp_path_factory.mktemp("frozen")
    knobs = tiny | {
        "out_dir": folder,
        "text_encoder": t5_folder,
        "text_layers": 0,
        "layers": 1,
        "steps": 3,
        "val_interval": 0,
        "overfit": 4,
        "pad_multiple": 512,
        "text_condition_dropout": 0,
    }
    call(system, "prepare", *options(knobs))
    call(train, *options(knobs))
    return folder, knobs


def test_a_checkpoint_has_no_frozen_weights_and_speaks_without_them(frozen, tmp_path):
    names = flat(checkpoint(frozen[0])).keys()
    assert "/model/decoder.in_proj.weight" in names and not [
        name for name in names if "text_encoder." in name
    ]
    call(sample, f"--ckpt={frozen[0]}", "--text=Hello.", f"--out={tmp_path / 'x.wav'}")
    assert (tmp_path / "x.wav").exists()


@pytest.mark.slow  # a minute; that it is one graph, whatever lengths follow, is tested in every run
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++"))
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="no C++ compiler, or no Python headers",
)
def test_compiling_compiles_and_gives_the_same_losses_and_checkpoint_keys(frozen, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call(train, *options(frozen[1] | {"out_dir": tmp_path, "compile": "true"}))
    compiled = torch._dynamo.utils.counters["stats"]
    # the whole network, in one piece, once
    assert compiled["unique_graphs"] == 1 and compiled["calls_captured"] > 100
    assert not torch._dynamo.utils.counters["graph_break"]
    assert rows(tmp_path, "train/loss") == pytest.approx(rows(frozen[0], "train/loss"), rel=1e-4)
    assert checkpoint(tmp_path)["model"].keys() == checkpoint(frozen[0])["model"].keys()
