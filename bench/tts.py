"""Designs of text-to-speech, ranked by word error rate: `python -m bench.tts ladder [--rungs ours,seed]`.

A rung is a design: what differs from the recipe, by a name, in bench/rungs.yaml. Each rung and seed is a
training of its own, `train.py` in OUT/<rung>/seed_<n>, of as many updates (--steps) or minutes of training
(--minutes) as the others. Its evaluations, every --every updates at predicted lengths, are its curve; at its
end `evaluator.py` says the same sentences at the recordings' lengths, into OUT/<rung>/seed_<n>/true_lengths.
The same command goes on with what was stopped and leaves out what is complete. Further --key value are knobs
of all rungs. `python -m bench.tts table OUT` prints the table of what is there; OUT/ladder.jsonl has a rung a
line, with its runs and their curves, [updates, seconds of training, word error rate] of each evaluation.
"""

import argparse
import json
import operator
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

import config as configs
import metric
import system
from config import Config, UserError, expand_path
from device import usable_cores
from entry import Parser, run_main, stop
from tracking import checkpoint, logger

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (0.5, 0.25, 0.15)  # word error rates; how soon each is reached
FOREVER = 1_000_000  # updates, where minutes end a training
# Knobs that may differ between a run and the command that goes on with it
PLACES = ("out_dir", "device", "wandb", "wandb_url", "wandb_project", "data.data_dir", "data.workers")
FLOORS = {"wer_ground_truth": "recordings", "wer_vocoded": "vocoded"}  # of word error rates
COLUMNS = (
    "rung",
    "seeds",
    "WER, predicted lengths",
    "WER, true lengths",
    "MCD, dB",
    "length error",
    *[f"to {100 * target:.0f} %" for target in TARGETS],
    "updates",
    "minutes",
    "updates/s",
    "what it is",
)


class Point(NamedTuple):
    """An evaluation."""

    updates: int
    seconds: float  # of training
    wer: float


class Reached(NamedTuple):
    """When a word error rate was reached."""

    updates: float
    seconds: float
    at_most: bool  # the first evaluation was already there: maybe sooner


@dataclass
class Run:
    """A training of the ladder."""

    rung: str
    seed: int
    folder: Path
    words: list[str]  # of train.py
    config: Config  # that they mean

    @property
    def name(self) -> str:
        return f"{self.rung}/{self.folder.name}"

    @property
    def complete(self) -> bool:
        """Whether it was trained to its end, and evaluated there."""
        rows = by_step(self.folder)
        if not rows or "perf/eval_sample_sec" not in rows[-1]:
            return False
        train = self.config.train
        minutes = metric.newest_values(rows).get("perf/train_minutes", 0)
        return rows[-1]["step"] >= train.steps or 0 < train.max_minutes <= minutes


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ladder = commands.add_parser("ladder", help="train what is not trained yet", allow_abbrev=False)
    add = ladder.add_argument
    add("--config", default=ROOT / "configs" / "demo_long.yaml", help="the recipe")
    add("--designs", default=ROOT / "bench" / "rungs.yaml", help="the rungs, as bench/rungs.yaml")
    add("--rungs", default="", help="names, with commas; all where there is none")
    add("--seeds", default="1337,1338,1339", help="with commas")
    add("--minutes", type=float, default=0, help="of training, evaluation not counted; 0: --steps count")
    add("--every", type=int, default=0, help="updates between evaluations; 0: as the recipe says")
    add("--jobs", type=int, default=1, help="trainings at a time, which share the cores")
    add("--out", type=expand_path, default=Path("out/ladder"), help="a folder for all runs")
    table = commands.add_parser("table", help="of what is there, training nothing", allow_abbrev=False)
    table.add_argument("out", type=expand_path, help="the folder of a ladder")
    options, knobs = parser.parse_known_args()
    faults = []
    if options.command == "ladder":
        faults = climb(plan(options, knobs), options.jobs)
    elif knobs:
        raise UserError(f"{knobs[0]}: table takes a folder and nothing else")
    print(write_table(options.out), flush=True)
    if faults:
        raise UserError(f"{len(faults)} of the runs failed: {'; '.join(faults)}")


# What is to be trained


def plan(options: argparse.Namespace, knobs: list[str]) -> list[Run]:
    """The runs that a command line asks for, all of the first seed first, and what they train on.

    raises UserError for what any of them would refuse, before the first of them begins.
    """
    rungs = read_rungs(options.designs)
    names = options.rungs.split(",") if options.rungs else list(rungs)
    for name in names:
        if name not in rungs:
            raise UserError(f"--rungs {name}: not in {options.designs}{configs.nearest(name, list(rungs))}")
    knobs = knobs + length_knobs(options, knobs)
    runs = []
    for seed in read_seeds(options.seeds):
        for name in names:
            runs.append(plan_run(options, knobs, name, rungs[name], seed))
    for run in runs[: len(names)]:
        system.prepare(run.config)
        described = yaml.safe_dump(rungs[run.rung], sort_keys=False)
        checkpoint.make_folder(run.folder)
        checkpoint.write_text(run.folder.parent / "rung.yaml", described)
    return runs


def read_rungs(path: str | Path) -> dict[str, dict]:
    """{"bytes": {"what": "bytes, not phonemes", "text": "bytes"}}."""
    rungs = configs.read_yaml(str(path))
    for name, rung in rungs.items():
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise UserError(f"{path}: {name!r} is no name for a rung: letters, digits, _ . + -")
        if not isinstance(rung, dict) or not isinstance(rung.get("what"), str):
            raise UserError(f"{path}: rung {name} needs a line `what:`, and `knob: value` for what differs")
    if not rungs:
        raise UserError(f"{path}: has no rung")
    return rungs


def length_knobs(options: argparse.Namespace, knobs: list[str]) -> list[str]:
    """--minutes and --every as knobs; minutes alone end a training where no --steps are given."""
    words = []
    if options.minutes:
        words.append(f"--max_minutes={options.minutes}")
        if not {"steps", "train.steps"} & configs.parse_overrides(knobs).keys():
            words.append(f"--steps={FOREVER}")
    if options.every:
        words.append(f"--eval_interval={options.every}")
    return words


def read_seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {text}: expected whole numbers with commas, as 1337,1338")
    return [int(seed) for seed in seeds]


def plan_run(options: argparse.Namespace, knobs: list[str], name: str, rung: dict, seed: int) -> Run:
    """A rung's knobs come after those of all rungs."""
    own = [f"--{key}={configs.describe_value(value)}" for key, value in rung.items() if key != "what"]
    folder = options.out / name / f"seed_{seed}"
    words = [*knobs, *own, f"--out_dir={folder}", f"--seed={seed}"]
    try:
        config = system.load_config(str(options.config), words)
    except UserError as e:
        raise UserError(f"rung {name}: {e}") from e
    if not config.train.eval_interval:
        raise UserError(f"rung {name}: is never evaluated; give --every")
    run = Run(name, seed, folder, [f"--config={options.config}", *words], config)
    check_unchanged(run)
    return run


def check_unchanged(run: Run) -> None:
    """raises UserError where the run's folder holds a training with other knobs."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    saved = configs.read_yaml(str(path))
    for key in configs.keys(type(run.config)):
        now = operator.attrgetter(key)(run.config)
        section, _, knob = key.rpartition(".")
        values = saved.get(section, {}) if section else saved
        then = values.get(knob, now)
        if key not in PLACES and then != now:
            raise UserError(
                f"{run.folder}: was trained with {key} {then!r}, not {now!r}; choose another --out"
            )


# Training


def climb(runs: list[Run], jobs: int) -> list[str]:
    """Train and evaluate what is not complete, `jobs` at a time; returns a line for each run that failed."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1")
    climber = Climber(jobs)
    stop.catch_signals(climber.terminate)
    with ThreadPoolExecutor(jobs) as pool:
        faults = list(pool.map(climber.climb, runs))
    return [fault for fault in faults if fault]


class Climber:
    """Runs the trainings as processes, which end with this one."""

    def __init__(self, jobs: int):
        self.environment = dict(os.environ)
        if jobs > 1:
            threads = max(1, usable_cores() // jobs)
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.processes = []

    def terminate(self) -> None:
        for process in self.processes:
            process.terminate()

    def climb(self, run: Run) -> str:
        """Train and evaluate; returns what went wrong, or ""."""
        fault = ""
        if not run.complete:
            say(f"{run.name}: {' '.join(run.words)}")
            fault = self.run(run, "train.py", *run.words)
        if run.complete and not true_length_rows(run.folder):
            words = [f"--ckpt={run.folder}", f"--out_dir={true_lengths(run.folder)}"]
            fault = self.run(run, "evaluator.py", *words, "--true_durations=true")
        found = read_run(run.folder)
        if found and not stop.asked:
            say(f"{run.name}: word error rate {metric.format_percent(found['wer'])}{fault and ', ' + fault}")
        return fault and f"{run.name}: {fault}"

    def run(self, run: Run, script: str, *words: str) -> str:
        """Run a script of the root, its output into the run's folder; its last line where it fails."""
        if stop.asked:
            return ""
        path = run.folder / "output.txt"
        with path.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *words],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self.processes.append(process)
            if stop.asked:  # in between
                process.terminate()
            code = process.wait()
        missed_figure = code == 1 and run.complete  # of `expect`
        if code == 0 or missed_figure or stop.asked:
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return said[-1] if said else f"{script} ended with exit code {code}"


def say(line: str) -> None:
    """To stderr: the table alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


# What is there


def by_step(folder: Path) -> list[dict]:
    """The lines of a run's log, those of a step as one."""
    rows = {}
    for row in logger.read_lines(folder / "metrics.jsonl"):
        step = row.get("step", 0)
        rows[step] = rows.get(step, {}) | row
    return [rows[step] for step in sorted(rows)]


def true_lengths(folder: Path) -> Path:
    """Where a run's sentences at the recordings' lengths are."""
    return folder / "true_lengths"


def evaluation(folder: Path, step: int) -> Path:
    return folder / "eval" / f"step_{step:07d}"


def true_length_rows(folder: Path) -> list[dict]:
    """The lines of samples.jsonl at the recordings' lengths, of a run's last step; maybe []."""
    rows = by_step(folder)
    if not rows:
        return []
    found = evaluation(true_lengths(folder), rows[-1]["step"])
    return logger.read_lines(found / "samples.jsonl")


def read_run(folder: Path) -> dict | None:
    """What a run has found so far, as in ladder.jsonl; None where no word error rate was measured yet."""
    rows = by_step(folder)
    curve = read_curve(rows)
    if not curve:
        return None
    found = {"seed": int(folder.name.removeprefix("seed_"))}
    found |= {key: getattr(curve[-1], key) for key in Point._fields}
    newest = metric.newest_values(rows)
    for key in ("wer_low", "wer_high", "mcd", "length_error", *FLOORS, "recogniser"):
        found[key] = newest.get(f"eval/{key}")
    rows = true_length_rows(folder)
    scores = {}
    if rows:
        scores = metric.word_error_scores(rows) | metric.mean_scores(rows, {"mcd": None})
    for key in ("wer", "wer_low", "wer_high", "mcd"):
        found[f"true_{key}"] = scores.get(key)
    found["reached"] = {f"{target:g}": reach(curve, target) for target in TARGETS}
    found["updates_per_sec"] = curve[-1].updates / curve[-1].seconds
    described = json.loads(logger.read_text(folder / "run.json") or "{}")
    for key in ("commit", "hardware", "dtype", "parameters", "started"):
        found[key] = described.get(key)
    return found | {"curve": curve}


def read_curve(rows: list[dict]) -> list[Point]:
    """The evaluations of a run in which words were counted."""
    curve = []
    seconds = 0.0
    for row in rows:
        seconds = 60 * row.get("perf/train_minutes", seconds / 60)
        if row.get("eval/wer") is not None and seconds:
            curve.append(Point(row["step"], seconds, row["eval/wer"]))
    return curve


def reach(curve: list[Point], target: float) -> Reached | None:
    """When a curve is first at `target` or below: on the straight line between two evaluations."""
    before = None
    for point in curve:
        if point.wer <= target:
            if before is None:
                return Reached(point.updates, point.seconds, at_most=True)
            share = (before.wer - target) / (before.wer - point.wer)
            updates = before.updates + share * (point.updates - before.updates)
            seconds = before.seconds + share * (point.seconds - before.seconds)
            return Reached(updates, seconds, at_most=False)
        before = point
    return None


# The table


def write_table(out: Path) -> str:
    """The table of a ladder's folder, best first; also written there, with ladder.jsonl beside it."""
    rungs = []
    for folder in sorted(out.glob("*/")):
        runs = [read_run(path) for path in sorted(folder.glob("seed_*"))]
        runs = [run for run in runs if run]
        if runs:
            described = yaml.safe_load(logger.read_text(folder / "rung.yaml")) or {}
            rungs.append({"rung": folder.name, **described, "wer": mean(runs, "wer"), "runs": runs})
    if not rungs:
        raise UserError(f"{out}: no run of a ladder with a word error rate there yet")
    rungs.sort(key=lambda rung: rung["wer"])
    lines = [json.dumps(rung, ensure_ascii=False, default=str) + "\n" for rung in rungs]
    checkpoint.write_text(out / "ladder.jsonl", "".join(lines))
    table = [describe_ladder(rungs), ""]
    table += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    table += [format_row(rung) for rung in rungs]
    text = "\n".join(table)
    checkpoint.write_text(out / "ladder.md", text + "\n")
    return text


def describe_ladder(rungs: list[dict]) -> str:
    """Who listened to what, on which machine; what the figures are."""
    runs = sum((rung["runs"] for rung in rungs), [])
    floors = []
    for key, name in FLOORS.items():
        values = {metric.format_percent(run[key]) for run in runs}
        floors.append(f"{name} {' or '.join(sorted(values))}")
    origins = []
    for key in ("recogniser", "hardware", "commit"):
        origins.append(" or ".join(sorted({str(run[key]) for run in runs})))
    return (
        f"Word error rates by {origins[0]} ({', '.join(floors)}), on {origins[1]}; commit {origins[2]}. "
        "Of several seeds the mean ± standard deviation, of one the 95 % interval over its sentences; "
        "to 50 %: updates and seconds of training, between evaluations on a straight line."
    )


def format_row(rung: dict) -> str:
    """A row of the table."""
    runs = rung["runs"]
    cells = [
        rung["rung"],
        str(len(runs)),
        format_rate(runs, "wer"),
        format_rate(runs, "true_wer"),
        format_mean(runs, "mcd", "{:.2f}"),
        format_mean(runs, "length_error", "{:.1%}").replace("%", " %"),
        *[format_reached(runs, f"{target:g}") for target in TARGETS],
        format_mean(runs, "updates", "{:,.0f}"),
        f"{mean(runs, 'seconds') / 60:.1f}",
        format_mean(runs, "updates_per_sec", "{:.2f}"),
        rung.get("what", ""),
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def values(runs: Iterable[dict], key: str) -> list[float]:
    """Of the runs that have it."""
    return [run[key] for run in runs if run.get(key) is not None]


def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(values(runs, key))


def format_mean(runs: list[dict], key: str, form: str) -> str:
    return form.format(mean(runs, key)) if values(runs, key) else ""


def format_rate(runs: list[dict], key: str) -> str:
    """A word error rate: of several runs with their deviation, of one with its interval."""
    rates = values(runs, key)
    if not rates:
        return ""
    said = f"{100 * statistics.mean(rates):.1f} %"
    if len(rates) > 1:
        return f"{said} ± {100 * statistics.stdev(rates):.1f}"
    low = 100 * values(runs, f"{key}_low")[0]
    high = 100 * values(runs, f"{key}_high")[0]
    return f"{said} [{low:.1f}, {high:.1f}]"


def format_reached(runs: list[dict], target: str) -> str:
    """The mean over the runs, where all have reached it; else how many have."""
    reached = [run["reached"][target] for run in runs if run["reached"][target]]
    if len(reached) < len(runs):
        return f"{len(reached)} of {len(runs)}" if reached else "-"
    updates = statistics.mean(found.updates for found in reached)
    seconds = statistics.mean(found.seconds for found in reached)
    bound = "at most " if any(found.at_most for found in reached) else ""
    return f"{bound}{updates:,.0f}, {seconds:,.0f} s"


if __name__ == "__main__":
    run_main(main)
