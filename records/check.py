"""Whether logs of runs are a record: `python records/check.py LOG...`, the rules are in records/README.md.

Nothing that a log claims of its own errors is believed: they are counted again from its transcripts, by
Whisper's normaliser. Exit code 0: the claim holds; 1: it does not, with every reason, a line each; 2: a file
that is no log.
"""

import hashlib
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as configs
import metric
from config import DAMAGE, UserError
from entry import Parser, run_main
from pretrained.whisper_weights import normalize_transcript
from records.log import SOURCE, Sections, read_log

TRACKS = Path(__file__).with_name("tracks.yaml")
RUNS = 3  # at least
SURE = 0.01  # the p-value is below
# What may differ between the runs of a record: places, and what changes no figure
FREE = ("seed", "out_dir", "device", "wandb", "wandb_url", "wandb_project", "data.data_dir", "data.workers")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("logs", nargs="+", help="written by records/log.py, of runs that differ in their seed alone")
    add("--track", default="cpu", help="a name in the file of tracks")
    add("--tracks", default=TRACKS, help="that file")
    options = parser.parse_args()
    track = read_track(options.tracks, options.track)
    logs = {path: read_log(path) for path in options.logs}
    faults = list_faults(logs, track)
    lines, unproven = weigh(logs, track["floor"] + track["points"])
    print(*lines, sep="\n")
    for fault in faults + unproven:
        print(f"refused: {fault}")
    if faults or unproven:
        sys.exit(1)
    print("the claim holds")


def read_track(path: str | Path, name: str) -> dict:
    tracks = configs.read_yaml(str(path))
    if name not in tracks:
        raise UserError(f"--track {name}: {path} has {', '.join(tracks)}")
    return tracks[name]


# Of a log


def list_faults(logs: dict[str, Sections], track: dict) -> list[str]:
    """Why logs, by their paths, are no claim in a track at all.

    raises UserError for a log that lacks what every log has.
    """
    faults = []
    for path, log in logs.items():
        try:
            found = corpus_faults(log, track) + judge_faults(log, track) + sentence_faults(log, track)
            read_clock(log)
        except DAMAGE as e:
            raise UserError(f"{path}: no whole log of a run ({e!r})") from e
        faults += [f"{path}: {fault}" for fault in found]
    first = next(iter(logs))
    for path in list(logs)[1:]:
        fault = difference(logs[first], logs[path])
        if fault:
            faults.append(f"{path}: {fault} differs from {first}")
    seeds = [log["config"]["seed"] for log in logs.values()]
    if len(set(seeds)) < max(RUNS, len(seeds)):
        said = ", ".join(map(str, seeds))
        faults.append(f"at least {RUNS} runs, each of another seed, are a claim; these have the seeds {said}")
    return faults


def corpus_faults(log: Sections, track: dict) -> list[str]:
    """What the run was trained on, and where."""
    faults = []
    corpus = log["corpus"]
    if corpus["plan"] != track["corpus"]:
        faults.append(f"trained on corpus {corpus['plan'][:12]}, the track's is {track['corpus'][:12]}")
    for name in ("frames", "mean", "std"):
        if not math.isclose(corpus[name], track[name], rel_tol=track["tolerance"]):
            faults.append(f"the corpus has {name} {corpus[name]:g}, the track's has {track[name]:g}")
    hardware = log["run"]["hardware"]
    if not re.search(track["hardware"], hardware):
        faults.append(f"ran on {hardware}, the track is for {track['hardware']}")
    return faults


def judge_faults(log: Sections, track: dict) -> list[str]:
    """Who counted, how, and beside which floor."""
    faults = []
    judge = log["judge"]
    if judge["name"] != track["judge"] or judge["sha256"] != track["sha256"]:
        heard = f"{judge['name']}, SHA-256 {str(judge['sha256'])[:12]}"
        faults.append(f"judged by {heard}, not by {track['judge']}, {track['sha256'][:12]}")
    knobs = flat(log["config"])
    for key, value in track["fixed"].items():
        if knobs.get(key) != value:
            faults.append(f"{key} is {knobs.get(key)!r}, in this track {value!r}")
    newest = metric.newest_values(log["metrics"])
    floor = newest.get("eval/wer_ground_truth", math.nan)
    if not math.isclose(floor, track["floor"], abs_tol=track["floor_tolerance"]):
        found = metric.format_percent(floor)
        faults.append(f"the floor was {found}, the track's is {metric.format_percent(track['floor'])}")
    return faults


def sentence_faults(log: Sections, track: dict) -> list[str]:
    """Which sentences were said, and whether their errors were counted right."""
    faults = []
    rows = log["sentences"]
    if digest_sentences(rows) != track["sentences"]:
        faults.append("other sentences than the track's were said, or in another order")
    for row in rows:
        errors, words = count_errors(row)
        if words and (errors, words) != (row["errors"], row["words"]):
            counted = f"{errors} errors in {words} words"
            faults.append(f"{row['id']}: {counted}, the log says {row['errors']} in {row['words']}")
    claimed = metric.newest_values(log["metrics"]).get("eval/wer", math.nan)
    rate = error_rate(rows)
    if not math.isclose(claimed, rate, abs_tol=1e-9):
        said = f"the metrics {metric.format_percent(claimed)}"
        faults.append(f"the transcripts have a word error rate of {metric.format_percent(rate)}, {said}")
    return faults


def digest_sentences(rows: list[dict]) -> str:
    """SHA-256 of the ids and texts, in their order."""
    texts = [[row["id"], row["text"]] for row in rows]
    content = json.dumps(texts)
    return hashlib.sha256(content.encode()).hexdigest()


def count_errors(row: dict) -> tuple[int, int]:
    """Of a line of samples.jsonl: word errors of what was heard, words of the text."""
    text = normalize_transcript(row["text"])
    heard = normalize_transcript(row["hypothesis"])
    return metric.word_errors(text, heard)


def error_rate(rows: list[dict]) -> float:
    """As counted here."""
    pairs = []
    for row in rows:
        text = normalize_transcript(row["text"])
        heard = normalize_transcript(row["hypothesis"])
        pairs.append((text, heard))
    return metric.word_error_rate(pairs)


def difference(a: Sections, b: Sections) -> str:
    """The first thing in which two runs differ that must not; "" where there is none."""
    names = a.keys() | b.keys()
    for name in sorted(names):
        is_source = name.startswith(SOURCE)
        if is_source and a.get(name) != b.get(name):
            return name
    knobs = flat(a["config"])
    others = flat(b["config"])
    for key in sorted(knobs.keys() | others.keys()):
        if key not in FREE and knobs.get(key) != others.get(key):
            return f"{key} {others.get(key)!r}"
    return ""


def flat(config: dict) -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, of a config as a log has it."""
    found = {}
    for name, value in config.items():
        if not isinstance(value, dict):
            found[name] = value
            continue
        for key, entry in value.items():
            found[f"{name}.{key}"] = entry
    return found


# Of all


def weigh(logs: dict[str, Sections], target: float) -> tuple[list[str], list[str]]:
    """What the runs have reached, in lines, and why that is no proof, if it is none."""
    rates = [error_rate(log["sentences"]) for log in logs.values()]
    clocks = [read_clock(log) for log in logs.values()]
    p = p_value(rates, target)
    origins = {describe_origin(log["run"]) for log in logs.values()}
    listed = ", ".join(map(metric.format_percent, rates))
    seconds = [clock.seconds for clock in clocks]
    updates = [clock.updates for clock in clocks]
    lines = [
        f"{len(logs)} runs on {' or '.join(sorted(origins))}",
        f"word error rate {metric.format_percent(statistics.mean(rates))} ({listed}), "
        f"target {metric.format_percent(target)}: p = {p:.4f}",
        f"clock {statistics.mean(seconds):,.0f} s of training ({format_list(seconds)}), "
        f"{statistics.mean(updates):,.0f} updates ({format_list(updates)})",
    ]
    if p < SURE:
        return lines, []
    return lines, [f"that the mean is at most the target has p = {p:.4f}, to be below {SURE:g}"]


class Clock(NamedTuple):
    """How long a run trained."""

    seconds: float
    updates: int


def read_clock(log: Sections) -> Clock:
    newest = metric.newest_values(log["metrics"])
    return Clock(60 * newest["perf/train_minutes"], newest["step"])


def describe_origin(run: dict) -> str:
    return f"{run['hardware']}, commit {run['commit']}"


def format_list(values: list[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


def p_value(rates: list[float], target: float) -> float:
    """Of Student's one-sided t-test: how likely rates as low are if their true mean is the target."""
    n = len(rates)
    if n < 2:
        return math.nan
    below = target - statistics.mean(rates)
    error = statistics.stdev(rates) / math.sqrt(n)
    if error == 0:
        return 0.0 if below > 0 else 1.0
    return upper_tail(below / error, n - 1)


def upper_tail(t: float, freedom: int) -> float:
    """The probability that Student's t with so many degrees of freedom is above t.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    within = math.sin(angle) * total  # the probability of [-t, t]
    if is_odd:
        within = (angle + within) * 2 / math.pi
    return (1 - within) / 2


if __name__ == "__main__":
    run_main(main)
