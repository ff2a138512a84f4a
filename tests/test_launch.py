"""launch.py with small scripts in the place of a training: how ranks and machines start and end together.

Two machines are two launchers here, that meet at an address of the loopback.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

RECORD = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
record = [os.environ[name] for name in names] + sys.argv[2:]
open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w").write(json.dumps(record))
"""
# Rank 1 ends as it is told to, as soon as all are at work; the others would go on for an hour
ENDS = """
import os, signal, sys, time
folder, how, world = sys.argv[1:]
rank = os.environ["RANK"]
open(f"{folder}/{rank}.pid", "w").write(str(os.getpid()))
deadline = time.monotonic() + 100
while len([name for name in os.listdir(folder) if name.endswith(".pid")]) < int(world):
    assert time.monotonic() < deadline
    time.sleep(0.05)
if rank == "1":
    if how.isdigit():
        print("the line of rank 1", file=sys.stderr, flush=True)
        os._exit(int(how))
    os.kill(os.getpid(), getattr(signal, how))
time.sleep(3600)
"""
STOPS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
os.write(1, b"ready\\n")  # in one piece, whatever else is written to that pipe
time.sleep(3600)
"""


def launch(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *words],
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Its exit code and what it said on stderr, in lines."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err.splitlines()


def are_gone(folder: Path) -> bool:
    """Whether none of the processes that left their number there is alive."""
    for path in folder.glob("*.pid"):
        stat = Path("/proc", path.read_text(), "stat")
        if stat.exists() and stat.read_text().split()[2] != "Z":
            return False
    return True


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def two_machines(unused_port):
    """A function that starts a command on both, with so many ranks on each.

    second: options that the second has instead.
    """

    def start(ranks: int, *command: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
        machines = []
        for node in range(2):
            words = ["--nodes=2", f"--node_rank={node}", f"--master=127.0.0.2:{unused_port}"]
            own = second if node and second else (f"--ranks={ranks}",)
            machines.append(launch(*words, *own, *command))
        return machines

    return start


def test_ranks_get_what_torch_reads_and_all_that_end_well_is_exit_code_0(script, tmp_path):
    assert end(launch("--ranks", "2", script(RECORD), str(tmp_path), "--lr", "1")) == (0, [])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"] and first[6:] == ["--lr", "1"]
    assert second[:2] == ["1", "1"] and second[2:] == first[2:]


@pytest.mark.parametrize(
    "how, code, said",
    [
        ("2", 2, "the line of rank 1"),
        ("1", 1, "the line of rank 1"),
        ("SIGKILL", 2, "error: rank 1 was ended by SIGKILL, as the kernel does where memory runs out"),
        ("SIGSEGV", 2, "error: rank 1 was ended by SIGSEGV"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_only_its_line_is_said(script, tmp_path, how, code, said):
    assert end(launch("--ranks", "3", script(ENDS), str(tmp_path), how, "3")) == (code, [said])
    assert are_gone(tmp_path)


def test_a_signal_is_passed_on_and_ranks_that_end_well_by_it_are_exit_code_0(script):
    process = launch("--ranks", "2", script(STOPS))
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, [])


def test_ranks_on_two_machines_are_numbered_through_and_meet_at_one_port(script, tmp_path, two_machines):
    assert [end(machine) for machine in two_machines(2, script(RECORD), str(tmp_path))] == [(0, [])] * 2
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [record[:4] for record in records] == [
        ["0", "0", "4", "2"],
        ["1", "1", "4", "2"],
        ["2", "0", "4", "2"],
        ["3", "1", "4", "2"],
    ]
    assert len({(record[4], record[5]) for record in records}) == 1


@pytest.mark.parametrize("how", ["2", "SIGKILL"])
def test_a_rank_that_fails_ends_those_of_the_other_machine_too(script, tmp_path, two_machines, how):
    first, second = (end(machine) for machine in two_machines(1, script(ENDS), str(tmp_path), how, "2"))
    assert first == (2, ["error: machine 1 ended with exit code 2; its own output says why"])
    assert second[0] == 2 and len(second[1]) == 1 and "rank 1" in second[1][0]
    assert are_gone(tmp_path)


def test_a_machine_that_is_gone_ends_the_other(script, tmp_path, two_machines):
    first, second = two_machines(1, script(ENDS), str(tmp_path), "SIGSTOP", "2")
    pid = tmp_path / "1.pid"
    while not pid.exists() or not pid.read_text():
        time.sleep(0.1)
    second.kill()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    code, said = end(first)
    assert code == 2 and len(said) == 1 and "machine 1 is" in said[0]
    end(second)


def test_machines_that_were_started_differently_are_refused(script, tmp_path, two_machines):
    first, second = two_machines(1, script(RECORD), str(tmp_path), second=("--ranks=2",))
    for machine, fault in ((first, "other --nodes or --gpus"), (second, "has refused this machine")):
        code, said = end(machine)
        assert code == 2 and len(said) == 1 and fault in said[0]
    assert not list(tmp_path.glob("*.json"))
