"""The log of a run, one text file that holds all of it: `python records/log.py OUT_DIR > LOG`.

First the whole source, then what ran where (run, config), on what (corpus), who listened (judge), the metrics
with the seconds of training, and every held-out sentence with what was heard in it. A section is a line
`==== NAME: N lines` and these N lines, so nothing in a file can be taken for the head of another. Those named
source/PATH are text, the others a JSON object a line.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as configs
import metric
import system
from config import Config, UserError, expand_path
from entry import run_main
from pretrained import whisper_weights
from tracking import checkpoint, logger

TITLE = "nanoaudio, the log of a run, format 1"
HEAD = re.compile(r"==== (.+): (\d+) lines")
FOLDERS = re.compile(r"(?<![^\s=])~?/(?:\S*/)?(?=[^\s/])")  # of an absolute path, but for its last part
SOURCE = "source/"  # what the names of files begin with
SINGLE = ("run", "config", "corpus", "judge")  # sections of one line
SECTIONS = (*SINGLE, "metrics", "sentences")

Sections = dict[str, str | dict | list[dict]]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: python records/log.py OUT_DIR > LOG")
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(format_log(collect(expand_path(sys.argv[1]))))


# Of a run's folder


def collect(out: Path) -> Sections:
    """All that a log holds of a run; raises UserError for one unfinished, or whose corpus is gone."""
    rows = logger.read_lines(out / "metrics.jsonl")
    newest = metric.newest_values(rows)
    step = newest.get("step", 0)
    if "eval/wer" not in newest or "perf/train_minutes" not in newest:
        raise UserError(f"{out}: no finished run there: it has trained and been evaluated for word errors")
    samples = out / "eval" / f"step_{step:07d}" / "samples.jsonl"
    if not samples.exists():
        raise UserError(f"{samples}: missing: the run was not evaluated at its last step, {step}")
    values = configs.read_yaml(str(out / "config.yaml"))
    config = system.from_values(values, str(out / "config.yaml"))
    # of paths that say where folders are on a machine, the last part
    run = json.loads(logger.read_text(out / "run.json"))
    run["command"] = FOLDERS.sub("", run["command"])
    knobs = configs.to_dict(config)
    knobs["out_dir"] = Path(config.out_dir).name
    knobs["data"]["data_dir"] = Path(config.data.data_dir).name
    return read_source(out / "source") | {
        "run": run,
        "config": knobs,
        "corpus": describe_corpus(config, out),
        "judge": describe_judge(config, newest),
        "metrics": rows,
        "sentences": logger.read_lines(samples),
    }


def read_source(folder: Path) -> Sections:
    """The files that the run was made with, as source/PATH."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[SOURCE + name] = read_text(path)
    if not found:
        raise UserError(f"{folder}: the run's copy of its source is missing")
    return found


def read_text(path: Path) -> str:
    """Of what is no text, as weights, its SHA-256."""
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"no text; SHA-256 {hashlib.sha256(content).hexdigest()}"


def describe_corpus(config: Config, out: Path) -> dict:
    """What the run was trained on; raises UserError where data.data_dir holds something else by now.

    plan: SHA-256 of what was to be packed: the texts, the splits, the voice's weights, the form of the
    log-mels. What they sound like is pinned by the length and the statistics of the training set.
    """
    corpus = system.open_corpus(config)
    path = system.find_checkpoint(str(out))
    weights = checkpoint.load_checkpoint(path)["model"]
    trained = {name: weights[name].item() for name in ("mean", "std")}
    now = {"mean": corpus.mean, "std": corpus.std}
    checkpoint.check_statistics(now, trained, config.data.data_dir, str(path))
    frames = sum(clip.frames for clip in corpus.clips("train"))
    return {"plan": corpus.fingerprint, "frames": frames, **now}


def describe_judge(config: Config, newest: dict) -> dict:
    """Who counted the words: by which name it was asked for, and the tiny.en that is installed."""
    path = whisper_weights.find_package()
    return {
        "asked": config.eval.recogniser,
        "name": newest["eval/recogniser"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path else None,
        "openai-whisper": version("openai-whisper"),
    }


# The file


def format_log(sections: Sections) -> str:
    """The text of a log; `parse` reads it."""
    parts = [f"{TITLE}\n"]
    for name, content in sections.items():
        if not name.startswith(SOURCE):
            rows = content if isinstance(content, list) else [content]
            content = "\n".join(json.dumps(row) for row in rows)
        count = content.count("\n") + 1
        parts.append(f"==== {name}: {count} lines\n{content}\n")
    return "".join(parts)


def read_log(path: str) -> Sections:
    """raises UserError for a file that is no log, or is cut short or damaged."""
    try:
        text = expand_path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a readable text file ({e})") from e
    lines = text.split("\n")
    if lines[0] != TITLE:
        raise UserError(f"{path}: no log of a run: its first line is not {TITLE!r}")
    sections = {}
    number = 1
    while number < len(lines) - 1:
        head = HEAD.fullmatch(lines[number])
        if not head:
            raise UserError(f"{path}: line {number + 1}: damaged: a section was to begin here")
        first = number + 1
        number = first + int(head[2])
        if number > len(lines) - 1 or head[1] in sections:
            raise UserError(f"{path}: section {head[1]} is cut short, or stands twice")
        sections[head[1]] = parse(path, head[1], lines[first:number])
    missing = [name for name in SECTIONS if name not in sections]
    if missing:
        raise UserError(f"{path}: no whole log of a run: it lacks {', '.join(missing)}")
    return sections


def parse(path: str, name: str, lines: list[str]) -> str | dict | list[dict]:
    """The content of a section."""
    if name.startswith(SOURCE):
        return "\n".join(lines)
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as e:
        raise UserError(f"{path}: section {name} is damaged: {e}") from e
    if not all(isinstance(row, dict) for row in rows) or (name in SINGLE and len(rows) != 1):
        raise UserError(f"{path}: section {name} is damaged: it holds something else")
    return rows[0] if name in SINGLE else rows


if __name__ == "__main__":
    run_main(main)
