"""Several ranks, really started, of which one fails, or is asked to stop, or has another corpus.

`./run.sh test -m slow -n 0 tests/test_ranks.py` tries a fault in every phase, and two machines: network
namespaces with a link between them, which is cut.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, finish, options, start
from test_train import assert_close, checkpoint

# train.py, in which one rank fails in one phase as it is told to
FAULT = f"""
import errno, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
phase, kind, rank = sys.argv[1:4]
del sys.argv[1:4]
import evaluator, train
from entry import run_main
from tracking import checkpoint, report
places = {{
    "preparing": (train.system, "open_corpus"),
    "resuming": (checkpoint, "resume"),
    "training": (train, "reduce_metrics"),
    "saving": (checkpoint, "write"),
    "sampling": (evaluator, "sample"),
    "scoring": (evaluator, "count_word_errors"),
    "reporting": (report, "write_report"),
}}
def fail(*_, **__):
    if kind == "exception":
        raise RuntimeError("boom")
    if kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "x.wav")
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == rank:
    setattr(*places[phase], fail)
run_main(train.main)
"""
SAID = {
    "exception": "RuntimeError: boom",
    "full": "No space left on device",
    "kill": "was ended by SIGKILL, as the kernel does where memory runs out",
}
EVALUATED = {"steps": 4, "save_interval": 2, "eval_interval": 4, "val_interval": 0}


def launch(*words) -> subprocess.Popen:
    return start("launch.py", "--ranks=2", *map(str, words))


def end_of_fault(tiny: dict, folder: Path, phase: str, kind: str, rank: int) -> tuple[int, list[str]]:
    """The exit code of two ranks, one of which fails, and their lines on stderr but for its traceback."""
    script = folder / "fault.py"
    script.write_text(FAULT)
    knobs = options(tiny | EVALUATED | {"out_dir": folder / "out"})
    process = launch(script, phase, kind, rank, *knobs)
    _, err = process.communicate(timeout=600)
    return process.returncode, re.findall(r"^error: .*", err, re.MULTILINE)


def test_one_rank_that_fails_ends_all_with_its_line_and_exit_code_2_and_the_checkpoint_stays(tiny, tmp_path):
    code, said = end_of_fault(tiny, tmp_path, "sampling", "exception", 1)
    assert (code, said) == (2, ["error: rank 1: RuntimeError: boom"])
    assert checkpoint(tmp_path / "out")["step"] == 4


def test_a_signal_in_an_evaluation_cuts_it_short_on_all_ranks_and_the_run_ends_well_with_a_checkpoint(
    tiny, tmp_path
):
    """Its 64 prompts of 3,000 steps each would take an hour."""
    long = {"limit": 64, "euler_steps": 3000, "sample_batch": 1}
    process = launch(
        ROOT / "train.py",
        *options(tiny | long | {"out_dir": tmp_path, "steps": 9, "eval_interval": 2, "val_interval": 0}),
    )
    while not (tmp_path / "eval").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err == ""
    assert "evaluation cut short" in out and "made:" in out
    assert checkpoint(tmp_path)["step"] == 3 and not list(tmp_path.glob("eval/*/samples.jsonl"))


AGREE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import config, system, train
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
said = []
for own, facts in (
    (["--out_dir={folder}/%d" % rank, "--data_dir={folder}/%d" % rank], {{"step": 4}}),
    ([], {{"step": 4 * (1 - rank)}}),
    ([], {{"corpus": "ab"[rank]}}),
    (["--lr=%d" % rank], {{}}),
):
    knobs = system.load_config("", own)
    try:
        train.check_agreement(knobs, facts, 2)
        said.append("agreed")
    except config.UserError as e:
        said.append(str(e).split(":")[0])
open(f"{folder}/{{rank}}.txt", "w").write("\\n".join(said))
torch.distributed.destroy_process_group()
"""


def test_ranks_that_differ_in_checkpoint_corpus_or_knobs_are_refused_on_all_and_places_may_differ(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE.format(root=str(ROOT), folder=tmp_path))
    finish(launch(tmp_path / "agree.py"))
    said = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert (
        said[0]
        == said[1]
        == [
            "agreed",
            "step is 0 on rank 1, 4 on rank 0",
            "corpus is b on rank 1, a on rank 0",
            "train.lr is 1.0 on rank 1, 0.0 on rank 0",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize(
    "phase", ["preparing", "resuming", "training", "saving", "sampling", "scoring", "reporting"]
)
def test_a_fault_in_any_phase_ends_all(tiny, tmp_path, phase, kind):
    """Saving and reporting are rank 0's alone."""
    rank = 0 if phase in ("saving", "reporting") else 1
    code, said = end_of_fault(tiny, tmp_path, phase, kind, rank)
    assert code == 2 and len(said) == 1 and f"rank {rank}" in said[0] and SAID[kind] in said[0]
    good = phase in ("sampling", "scoring", "reporting")
    names = [path.name for path in (tmp_path / "out").glob("checkpoints/*.pt")]
    assert names == ([] if not good else names) and len(names) == 2 * good


# Two machines


TOGETHER = """
set -e
mount -t tmpfs none /run
ip link set lo up
ip netns add second
ip link add left type veth peer name right netns second
ip addr add 10.77.0.1/24 dev left
ip link set left up
ip -n second addr add 10.77.0.2/24 dev right
ip -n second link set lo up
ip -n second link set right up
exec "$@"
"""
NAMESPACES = ["unshare", "-rnm", "bash", "-c", TOGETHER, "-"]


@pytest.fixture
def venv(tmp_path) -> str:
    """This interpreter's packages in the place of an environment that run.sh has finished."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    files = [(ROOT / name).read_text().rstrip("\n") for name in ("pyproject.toml", "requirements.lock")]
    (folder / "installed").write_text("\n".join(files))
    return str(folder)


# Inside: start a machine on each side of the link, cut it for some seconds or for good, write how they ended
DRIVER = """
import json, os, subprocess, sys, time
run, folder, seconds, *words = sys.argv[1:]
inside = ["nsenter", "--net=/run/netns/second"]
machines = []
for node, (place, link) in enumerate((([], "left"), (inside, "right"))):
    together = ["--gpus=0", "--nodes=2", f"--node_rank={node}", "--master=10.77.0.1"]
    machines.append(subprocess.Popen(
        [*place, "bash", run, *together, *words],
        env={**os.environ, "GLOO_SOCKET_IFNAME": link},
        text=True,
        stdout=subprocess.PIPE if node == 0 else None,
        stderr=open(f"{folder}/{node}.err", "w"),
    ))
for line in machines[0].stdout:
    if line.startswith("step 2/"):
        break
subprocess.run(["ip", "-n", "second", "link", "set", "right", "down"], check=True)
cut = time.monotonic()
if int(seconds):
    time.sleep(int(seconds))
    subprocess.run(["ip", "-n", "second", "link", "set", "right", "up"], check=True)
machines[0].stdout.read()
codes = [machine.wait() for machine in machines]
json.dump(codes + [time.monotonic() - cut], open(f"{folder}/ended.json", "w"))
"""


@pytest.fixture
def two_machines(tiny, tmp_path, venv, monkeypatch):
    """A function that trains on two, whose link is cut after two steps, for `seconds` or (0) for good.

    returns their exit codes, the seconds from the cut to the end, and what they said on stderr.
    """
    if not shutil.which("unshare") or subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces may be made here")
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.setenv("VENV", venv)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def run(seconds: int, knobs: dict) -> tuple[list[int], float, list[str]]:
        driver = [sys.executable, tmp_path / "driver.py", ROOT / "run.sh", tmp_path, str(seconds)]
        words = [f"--config={tmp_path / 'empty.yaml'}", *options(knobs)]
        (tmp_path / "empty.yaml").write_text("system: tts\n")
        subprocess.run([*NAMESPACES, *map(str, driver), *words], check=True, timeout=900)
        *codes, took = json.loads((tmp_path / "ended.json").read_text())
        return codes, took, [(tmp_path / f"{node}.err").read_text() for node in range(2)]

    return run


@pytest.mark.slow
def test_two_machines_train_as_one_process_and_a_link_cut_for_ten_seconds_changes_nothing(
    tiny, tmp_path, two_machines
):
    knobs = {key: value for key, value in tiny.items() if key != "device"}
    knobs |= {"steps": 4, "grad_accum": 16, "val_interval": 0}
    codes, took, said = two_machines(10, knobs | {"out_dir": tmp_path / "two"})
    assert codes == [0, 0] and took > 10 and "error" not in "".join(said), said
    finish(start("train.py", *options(tiny | knobs | {"out_dir": tmp_path / "one", "batch_size": 8})))
    assert_close(checkpoint(tmp_path / "two"), checkpoint(tmp_path / "one"))


@pytest.mark.slow
def test_a_link_cut_for_good_ends_both_machines_within_a_minute_and_the_checkpoint_stays(
    tiny, tmp_path, two_machines
):
    knobs = {key: value for key, value in tiny.items() if key != "device"}
    knobs |= {"steps": 1000, "grad_accum": 16, "val_interval": 0, "save_interval": 1}
    codes, took, said = two_machines(0, knobs | {"out_dir": tmp_path / "two"})
    assert codes == [2, 2] and took < 60
    for node, lines in enumerate(said):
        found = re.findall("^error: .*", lines, re.MULTILINE)
        assert len(found) == 1 and f"machine {1 - node}: nothing heard for 4" in found[0]
    assert checkpoint(tmp_path / "two")["step"] >= 2
