"""Kills, full disks and folders that go away, at random moments: what is lost.

`python tests/torture.py [--kills 100] [--only NAME ...]` prints a row of docs/reliability.md for each of
TRIALS, and ends with 1 where anything was lost. A job is a tiny text-to-speech run in fp32 on the CPU that
saves every step, validates and samples; or the packing of a tiny corpus; or caching features of its texts.

An uninterrupted job shows what its end is to be, and how long its life. Then one is started again and again,
and meets its fate at a moment drawn uniformly from that life, until it ends; its folder must then be that of
the uninterrupted one, bit for bit, but for what tells the time. Jobs are forks of an interpreter that has
imported what takes long. So is torchrun; its two ranks are not, and die between first update and end.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from conftest import ROOT, TINY, options, save_random_t5, save_random_whisper, without_times

sys.path.insert(0, str(ROOT))

import torch

from config import UserError
from tracking import checkpoint, logger

STEPS = 12
RUN = TINY | {
    "width": 16,
    "layers": 1,
    "overfit": 8,
    "steps": STEPS,
    "save_interval": 1,
    "keep": 3,
    "val_interval": 4,
    "eval_interval": STEPS,
    "limit": 1,
}
DEMO = ["data.py", "demo", "--voice=espeak:en-us", "--sentences=24", "--workers=1"]
RECORDINGS = 1300  # three shards
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
PATIENCE = 100  # seconds, after which what has not ended hangs
DISK = 64  # MB, of the disk that is filled up
UNSHARED = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


# Jobs, and by what two of their folders are compared


@dataclass
class Job:
    """What is started until it has made its folder."""

    words: list[str]  # the command, without its folder
    knob: str  # that names the folder: --out_dir
    fingerprint: Callable[[Path], dict]
    given: Path | None = None  # what is in the folder before the first start
    launcher: tuple[str, ...] = ()  # TORCHRUN

    def lay(self, folder: Path) -> None:
        """The folder as it is before the first start."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.given:
            shutil.copytree(self.given, folder)

    def command(self, folder: Path) -> list[str]:
        return [*self.launcher, *self.words, f"--{self.knob}={folder}"]


def of_run(folder: Path) -> dict:
    """What a run has left: digests of files, of a checkpoint's tensors, and the lines of its metrics."""
    found = of_files(folder)
    for path in folder.glob("checkpoints/*.pt"):
        state = checkpoint.load_checkpoint(path)
        parts = [state[part] for part in ("step", "model", "ema", "optimizers")]
        found[str(path.relative_to(folder))] = digest_of_tensors(parts)
    for name in ("run.json", "report.html"):  # which tell the time
        found[name] = (folder / name).is_file()
    rows = []
    for row in logger.read_lines(folder / "metrics.jsonl"):
        if without_times(row).keys() > {"step"}:
            rows.append(without_times(row))
    return found | {"metrics.jsonl": rows}


def of_files(folder: Path) -> dict:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def digest_of_tensors(state) -> str:
    """SHA-256 of nested dicts and lists, bit for bit."""
    if torch.is_tensor(state):
        return hashlib.sha256(state.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        state = sorted(state.items(), key=str)
    if isinstance(state, (list, tuple)):
        state = [digest_of_tensors(part) for part in state]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def difference(wanted: dict, found: dict) -> str:
    """Names in which two fingerprints differ; "" where there are none."""
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


# Processes


class Process:
    """A job that was started, in a group of its own; what it says is in `out` and `err`."""

    def __init__(self, job: Job, folder: Path, nursery: "Nursery"):
        self.nursery = nursery
        self.hung = False
        self.out = nursery.place / "out"
        self.err = nursery.place / "err"
        self.pid = nursery.start(job.command(folder), self.out, self.err)

    def wait(self) -> int:
        """Its exit code: that of a kill is -9, also of the one that ends what hangs."""
        alarm = threading.Timer(PATIENCE, self.end)
        alarm.start()
        code = self.nursery.wait()
        alarm.cancel()
        return code

    def end(self) -> None:
        self.hung = True
        os.kill(self.pid, signal.SIGKILL)

    def ranks(self) -> dict[int, int]:
        """The processes that torchrun has started, by their ranks."""
        found = {}
        for pid in self.children():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                    if line.startswith("RANK="):
                        found[int(line.removeprefix("RANK="))] = pid
        return found

    def children(self) -> list[int]:
        with contextlib.suppress(OSError):
            return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))
        return []

    def said(self) -> str:
        """The end of what it said on stderr, in one line."""
        return " / ".join(self.err.read_text().splitlines()[-6:])

    def await_update(self) -> None:
        """Until it says that an update is done, or ends."""
        while not are_gone([self.pid]) and "step " not in self.out.read_text():
            time.sleep(0.02)


def are_gone(processes: list[int]) -> bool:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return False
    return True


class Nursery:
    """An interpreter that has imported what takes long, and forks: a child runs a script as python does."""

    def __init__(self, place: Path):
        self.place = place
        words = [sys.executable, __file__, "--nursery"]
        self.process = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdout.readline()

    def start(self, words: list[str], out: Path, err: Path) -> int:
        """The id of the child; one at a time."""
        print(json.dumps([words, str(out), str(err)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def be_nursery() -> None:
    """The other side of Nursery: a child leaves the loop, and ends as any interpreter does."""
    import runpy

    import torch.distributed.run  # noqa: F401

    import evaluator  # noqa: F401
    import train  # noqa: F401
    from pretrained import text_encoder
    from tracking import plot

    text_encoder.load_text_encoder("scratch")
    plot.draw_chart("imports what draws", "", [plot.Line("", plot.BLUE, np.ones((2, 2)))])
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        words, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            for number, path in enumerate((os.devnull, out, err)):
                opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(opened, number)
                os.close(opened)
            sys.argv = words
            if words[0].endswith(".py"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            return
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


# Trials: a job, its fate, and what came of it


@dataclass
class Trial:
    """A fate meets a process, waits for its end, and says whether it has to be started again."""

    about: str
    job: Job
    fate: Callable[["Trial", Process], bool]
    times: int
    seconds: float  # after which it has been tried often enough
    rng: random.Random
    nursery: Nursery
    place: Path  # where its folders are
    met: int = 0
    ended: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.place / "made"

    def start(self) -> Process:
        return Process(self.job, self.folder, self.nursery)

    def wait(self, process: Process) -> int:
        code = process.wait()
        if process.hung:
            self.note(f"hung, and said at last: {process.said()}")
        return code

    def note(self, fault: str) -> None:
        self.lost.append(f"at {self.met + 1}: {fault}")
        print(f"{self.about}: {self.lost[-1]}", file=sys.stderr, flush=True)

    def row(self) -> str:
        lost = "; ".join(self.lost) or "nothing"
        return f"| {self.about} | {self.met}, {self.ended} ends compared | {lost} |"

    def run(self) -> None:
        wanted, life = self.uninterrupted()
        until = time.monotonic() + self.seconds
        while self.met < self.times and len(self.lost) < 10:
            self.job.lay(self.folder)
            while self.has_to_start_again(life):
                if time.monotonic() > until:
                    self.times = self.met
            self.ended += 1
            differing = difference(wanted, self.job.fingerprint(self.folder))
            if differing:
                self.note(f"at its end these are not as uninterrupted: {differing}")
            if time.monotonic() > until:
                break

    def uninterrupted(self) -> tuple[dict, float]:
        """The fingerprint of its end, and the seconds in which its fate can meet it."""
        self.job.lay(self.folder)
        process = self.start()
        if self.job.launcher:
            process.await_update()
        begin = time.monotonic()
        code = process.wait()
        life = time.monotonic() - begin
        if code:
            raise RuntimeError(process.said())
        return self.job.fingerprint(self.folder), life

    def has_to_start_again(self, life: float) -> bool:
        """Start it once, and let its fate meet it unless it has had enough."""
        process = self.start()
        if self.met == self.times:
            self.must_end_well(process)
            return False
        if self.job.launcher:
            process.await_update()
        time.sleep(self.rng.uniform(0, life))
        return self.fate(self, process)

    def must_end_well(self, process: Process) -> None:
        if self.wait(process):
            self.note(f"did not start again: {process.said()}")

    def check_refusal(self, process: Process, code: int) -> None:
        """What cannot go on ends with one line and exit code 2."""
        lines = process.err.read_text().splitlines()
        errors = [line for line in lines if "rror" in line or line.startswith((" ", "Traceback"))]
        is_one_line = len(errors) == 1 and errors[0] == lines[-1] and errors[0].startswith("error: ")
        if code not in (0, 2) or (code == 2) != is_one_line or (code == 0 and errors):
            self.note(f"ended with {code}: {process.said()}")


def kill(trial: Trial, process: Process) -> bool:
    """SIGKILL of the process, or of one that it has started to pack."""
    workers = process.children()
    started = [process.pid, *workers]
    victim = trial.rng.choice(started)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    code = trial.wait(process)
    if victim != process.pid:
        trial.check_refusal(process, code)
    elif code not in (0, -signal.SIGKILL):
        trial.note(f"ended with {code}: {process.said()}")
    check_what_is_left(trial, started)
    trial.met += code != 0
    return code != 0


def kill_a_rank(trial: Trial, process: Process) -> bool:
    """SIGKILL of either rank; torchrun then ends the other."""
    ranks = process.ranks()
    for victim in trial.rng.sample(sorted(ranks.values()), k=min(1, len(ranks))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    code = trial.wait(process)
    check_what_is_left(trial, list(ranks.values()))
    trial.met += code != 0
    return code != 0


def check_what_is_left(trial: Trial, started: list[int]) -> None:
    """No process, and checkpoints that load."""
    until = time.monotonic() + PATIENCE
    while not are_gone(started) and time.monotonic() < until:
        time.sleep(0.02)
    if not are_gone(started):
        trial.note(f"of the processes {started} one lives on")
    found = checkpoint.find_checkpoints(trial.folder / "checkpoints")
    for path in found:
        try:
            checkpoint.load_checkpoint(path)
        except UserError as e:
            trial.note(str(e))
    if len(found) > RUN["keep"] + 1:
        trial.note(f"{len(found)} checkpoints")


def fill_the_disk(trial: Trial, process: Process) -> bool:
    """No room from now on; nor for the next start; then there is room again."""
    fill(trial.place)
    code = trial.wait(process)
    trial.check_refusal(process, code)
    if code:
        fill(trial.place)
        again = trial.start()
        trial.check_refusal(again, trial.wait(again))
    (trial.place / "ballast").unlink()
    trial.met += code != 0
    return code != 0


def fill(disk: Path) -> None:
    """A file that takes all the room that there is."""
    with open(disk / "ballast", "ab") as f:
        free = 1
        while free:
            free = shutil.disk_usage(disk).free
            with contextlib.suppress(OSError):
                os.posix_fallocate(f.fileno(), f.tell(), free)
            f.seek(0, os.SEEK_END)


def take_the_folder_away(trial: Trial, process: Process) -> bool:
    """Moved, and back once the process has ended; or removed for good, by what people type."""
    aside = trial.place / "aside"
    is_moved = trial.rng.random() < 0.5 and trial.folder.exists()
    if is_moved:
        trial.folder.rename(aside)
    else:
        subprocess.run(["rm", "-rf", str(trial.folder)], stderr=subprocess.DEVNULL)
    trial.check_refusal(process, trial.wait(process))
    trial.job.lay(trial.folder)
    if is_moved:
        aside.rename(trial.folder)
    trial.met += 1
    trial.must_end_well(trial.start())
    return False


# The command


def make_jobs(nursery: Nursery) -> dict[str, Job]:
    """What they need is made on the spot."""
    place = nursery.place
    corpus = place / "corpus"
    knobs = RUN | {"data_dir": corpus, "recogniser": save_random_whisper(place / "random.pt")}
    caching = TINY | {"text_encoder": save_random_t5(place / "t5")}
    run = Job(["train.py", *options(knobs)], "out_dir", of_run)
    # a first run, so that the recogniser's errors in the recordings are known to all others
    for job, folder in ((Job(DEMO, "out", of_files), corpus), (run, place / "first")):
        process = Process(job, folder, nursery)
        if process.wait():
            raise RuntimeError(process.said())
    packing = ["data.py", "ljspeech", f"--root={write_recordings(place / 'recordings')}", "--workers=2"]
    return {
        "run": run,
        "ranks": Job([str(ROOT / "train.py"), *run.words[1:]], "out_dir", of_run, launcher=TORCHRUN),
        "packing": Job(packing, "out", of_files),
        "caching": Job(["system.py", "prepare", *options(caching)], "data_dir", of_files, given=corpus),
    }


def write_recordings(root: Path) -> Path:
    """Noises in LJSpeech's layout: what espeak-ng says of a text is a little different each time."""
    (root / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for n in range(RECORDINGS):
        soundfile.write(root / "wavs" / f"LJ001-{n:04d}.wav", 0.1 * rng.standard_normal(4410), 22050)
        lines.append(f"LJ001-{n:04d}|One.|One.\n")
    (root / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return root


TRIALS = {
    "one_process": ("SIGKILL of a run of one process", "run", kill),
    "two_ranks": ("SIGKILL of either of two ranks under torchrun", "ranks", kill_a_rank),
    "packing": ("SIGKILL of packing, or of one of its workers", "packing", kill),
    "caching": ("SIGKILL of caching text features", "caching", kill),
    "removed": ("out_dir of a run moved or removed", "run", take_the_folder_away),
    "full_run": ("disk full in a run", "run", fill_the_disk),
    "full_packing": ("disk full while packing", "packing", fill_the_disk),
    "full_caching": ("disk full while caching", "caching", fill_the_disk),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=100, help="how often each fate is met")
    add("--minutes", type=float, default=60, help="for each, after which it is met no more")
    add("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    add("--seed", type=int, default=0)
    add("--unshared", action="store_true", help=argparse.SUPPRESS)  # may mount disks: nobody else sees them
    add("--nursery", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.nursery:
        return be_nursery()
    if not o.unshared and any("full" in name for name in o.only):
        may_mount = subprocess.run([*UNSHARED, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
        if may_mount.returncode == 0:
            os.execvp(UNSHARED[0], [*UNSHARED, sys.executable, *sys.argv, "--unshared"])
        print("no disk can be mounted here: none is filled up", file=sys.stderr)
        o.only = [name for name in o.only if "full" not in name]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # prints what is known by then, and tidies up
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill does not ask how fast a disk is
    lost = []
    with tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        nursery = Nursery(place)
        jobs = make_jobs(nursery)
        print("| what was tried | how many times | lost |\n|---|---|---|", flush=True)
        for name in o.only:
            about, job, fate = TRIALS[name]
            disk = place / name
            disk.mkdir()
            if "full" in name:
                subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(disk)], check=True
                )
            rng = random.Random(f"{name} {o.seed}")
            trial = Trial(about, jobs[job], fate, o.kills, 60 * o.minutes, rng, nursery, disk)
            try:
                trial.run()
            finally:
                print(trial.row(), flush=True)
            lost += trial.lost
            if "full" in name:
                subprocess.run(["umount", str(disk)], check=True)
        nursery.close()
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
