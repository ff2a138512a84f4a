"""The report: one HTML page that shows all of a run.

It is made from the files in the run's folder alone: metrics.jsonl, run.json, config.yaml, and
eval/step_*/samples.jsonl with the wavs and pngs that it names; any of them may be missing.
`python metric.py OUT_DIR` writes OUT_DIR/report.html again.
"""

import base64
import json
import re
import sys
from pathlib import Path

import jinja2
import numpy as np

import metric
from config import UserError, expand_path
from metric import Score
from tracking import checkpoint, logger, plot
from tracking.plot import BLUE, GREY, ORANGE, Chart, Line

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"


def write_report(out_dir: str, shown: int = 8) -> Path:
    """Write <out_dir>/report.html: one page, with sounds and pictures of `shown` samples in it.

    The template says how it looks; the functions that it calls are put into `content`.
    """
    out = Path(out_dir)
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the out_dir of a run")
    try:
        run = json.loads(logger.read_text(out / "run.json") or "{}")
    except ValueError as e:
        raise UserError(f"{out / 'run.json'}: not JSON ({e}); fix or delete it") from e
    config = logger.read_text(out / "config.yaml")
    system = re.search(r"^system:\s*(\S+)", config, re.MULTILINE)
    metrics = [row for row in logger.read_lines(out / "metrics.jsonl") if "step" in row]
    newest = metric.newest_values(metrics)
    scores = read_scores(run, newest)
    origin = {"command": run.get("command"), "commit": run.get("commit")} | (run.get("versions") or {})
    content = {
        "title": f"{system[1] if system else 'nanoaudio'} · {out.resolve().name}",
        "facts": headline(metrics, run),
        "newest": newest,
        "scores": scores,
        "charts": all_charts(metrics, scores),
        "origin": {name: value for name, value in origin.items() if value},
        "config": config,
        **newest_evaluation(out, shown, scores),
    }
    functions = [metric.format_percent, metric.format_score]
    functions += [wer_notes, score_notes, describe_scores, align_transcript, data_uri]
    content |= {function.__name__: function for function in functions}
    template = TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    checkpoint.write_text(out / "report.html", template.render(content))
    return out / "report.html"


def read_scores(run: dict, newest: dict) -> dict[str, Score]:
    """How the scores of a run are shown, as its run.json says; those of an older one by their keys."""
    if "scores" in run:
        return {key: Score(**fields) for key, fields in run["scores"].items()}
    scores = {}
    for name, value in newest.items():
        _, evaluated, key = name.partition("eval/")
        compared = key.endswith(("_vocoded", "_shuffled")) or "/" in key
        if evaluated and not compared and not key.startswith("wer") and not isinstance(value, str):
            scores[key] = Score(key.replace("_", " "))
    return scores


def newest_evaluation(out: Path, shown: int, scores: dict[str, Score]) -> dict:
    """The newest evaluation of a run, as the template shows it: `shown` samples, and a table of all."""
    folders = {}
    for path in out.glob("eval/step_*/samples.jsonl"):
        number = path.parent.name.removeprefix("step_")
        if number.isdecimal():  # others, as step_best, are not the run's
            folders[int(number)] = path.parent
    if not folders:
        return {}
    step = max(folders)
    folder = folders[step]
    entries = logger.read_lines(folder / "samples.jsonl")
    known = metric.newest_values(entries)
    return {
        "step": step,
        "folder": folder,
        "samples": entries[:shown],
        "summaries": sorted(folder.glob("summary*.png")),
        "worst_first": worst_first(entries),
        "known": known,
        "measured": [key for key in scores if key in known],
    }


def headline(metrics: list[dict], run: dict) -> list[str]:
    """Length, size, hardware and start of a run: what is known of them."""
    steps = metrics[-1]["step"] if metrics else None
    minutes = metric.newest_values(metrics).get("perf/train_minutes")
    size = run.get("parameters")
    if isinstance(size, int):
        size = f"{size / 1e6:,.1f} M parameters"
    facts = [
        f"{steps:,} steps" if metrics else "",
        f"{minutes:,.1f} minutes of training" if minutes else "",
        size,
        run.get("hardware"),
        run.get("started"),
    ]
    return [str(fact) for fact in facts if fact]


def wer_notes(newest: dict) -> list[str]:
    """How sure the word error rate is, and whose it is."""
    notes = []
    if "eval/wer_low" in newest:
        low = metric.format_percent(newest["eval/wer_low"])
        high = metric.format_percent(newest.get("eval/wer_high"))
        notes.append(f"95 % interval {low} to {high}")
    if "eval/recogniser" in newest:
        notes.append(f"transcribed by {newest['eval/recogniser']}")
    return notes


def score_notes(newest: dict, key: str, score: Score) -> list[str]:
    """What a score is, and what it is to be compared with."""
    notes = [score.note]
    for name, value in metric.reference_values(newest, key):
        notes.append(f"{name}: {metric.format_score(score, value)}")
    return notes


def describe_scores(entry: dict, scores: dict[str, Score]) -> list[str]:
    """What the scores of a line of samples.jsonl say, in words."""
    said = []
    errors = entry.get("errors")
    if errors == 0:
        said.append("every word right")
    elif errors is not None:
        plural = "" if errors == 1 else "s"
        said.append(f"{errors} error{plural} in {entry.get('words')} words")
    missed = []
    values = []
    for key, score in scores.items():
        value = entry.get(key)
        if value is not None and not score.is_match:
            values.append(f"{score.title} {metric.format_score(score, value)}")
        elif value is not None and value < 1:
            missed.append(key.removesuffix("_match").replace("_", " by "))
    if missed:
        said.append(f"not as asked for: {', '.join(missed)}")
    return said + values


def worst_first(entries: list[dict]) -> list[dict]:
    """Lines of samples.jsonl by their word error rate, then by whether all is as asked for."""

    def goodness(entry: dict) -> tuple[float, float]:
        errors = entry.get("errors") or 0
        words = entry.get("words") or 0
        return -errors / max(words, 1), entry.get("all_match") or 0

    return sorted(entries, key=goodness)


def align_transcript(text: str, transcript: str, errors: int | None) -> list[tuple[str, str]]:
    """A transcript beside the text, in pieces (kind, words).

    kind: "right", "wrong" (in the transcript only) or "missing" (in the text only). Case and punctuation do
    not count. errors: as counted; where it is 0, all is right.
    """

    def plain(word: str) -> str:
        return re.sub(r"[\W_]", "", word.casefold())

    said = [word for word in text.split() if plain(word)]
    heard = [word for word in transcript.split() if plain(word)]
    if errors == 0 or not said:
        return [("right", transcript)]
    import jiwer

    reference = " ".join(map(plain, said))
    hypothesis = " ".join(map(plain, heard))
    pieces = []
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        text_words = " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx])
        transcript_words = " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("right", transcript_words))
        if chunk.type in ("delete", "substitute"):
            pieces.append(("missing", text_words))
        if chunk.type in ("insert", "substitute"):
            pieces.append(("wrong", transcript_words))
    return pieces


def data_uri(folder: Path, name: str | None) -> str:
    """A wav or png of a folder inside a URI; "" where there is none."""
    path = folder / (name or "")
    if not path.is_file():
        return ""
    media_type = {".wav": "audio/wav", ".png": "image/png"}[path.suffix]
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{media_type};base64,{content}"


def all_charts(metrics: list[dict], scores: dict[str, Score]) -> list[Chart]:
    """Losses, word error rate with its floors, loss by t, scores, throughput: those that the run logged."""
    newest = metric.newest_values(metrics)
    has_flow = "train/flow_loss" in newest or "val/flow_loss" in newest
    loss = ("Flow loss", "flow_loss") if has_flow else ("Loss", "loss")
    charts = [
        loss_chart(metrics, *loss),
        loss_chart(metrics, "Duration loss", "duration_loss"),
        word_error_chart(metrics, newest),
        loss_by_t_chart(metrics),
        *[score_chart(metrics, newest, key, score) for key, score in scores.items()],
        throughput_chart(metrics),
    ]
    return [drawn for drawn in charts if drawn]


def loss_chart(metrics: list[dict], title: str, key: str) -> Chart | None:
    training = Line("training", BLUE, series(metrics, f"train/{key}"))
    validation = Line("validation", ORANGE, series(metrics, f"val/{key}"))
    return plot.draw_chart(title, "training is smoothed", [training, validation])


def word_error_chart(metrics: list[dict], newest: dict) -> Chart | None:
    rates = series(metrics, "eval/wer", 100)
    low = series(metrics, "eval/wer_low", 100)
    high = series(metrics, "eval/wer_high", 100)
    lines = [
        Line("generated", BLUE, rates),
        constant_line("vocoded", ORANGE, rates, newest.get("eval/wer_vocoded"), 100),
        constant_line("recordings", GREY, rates, newest.get("eval/wer_ground_truth"), 100),
    ]
    return plot.draw_chart("Word error rate, %", "shaded: 95 % interval", lines, zero=True, band=(low, high))


def loss_by_t_chart(metrics: list[dict]) -> Chart | None:
    """The validation loss in each of ten bins of t, as first and as last measured."""
    centres = np.arange(10) / 10 + 0.05
    lines = []
    for row in metrics:
        losses = [row.get(f"val/flow_loss_t{i}") for i in range(10)]
        losses = np.array(losses, float)  # None becomes NaN
        if np.isnan(losses).all():
            continue
        colour = BLUE if lines else GREY
        points = np.stack([centres, losses])
        line = Line(f"step {row['step']:,}", colour, points)
        lines = [*lines[:1], line]
    return plot.draw_chart("Validation loss by t", "0 is data, 1 is noise", lines, zero=True, x_label="t")


def score_chart(metrics: list[dict], newest: dict, key: str, score: Score) -> Chart | None:
    """A score beside the first two that it is to be compared with."""
    title = score.title.capitalize()
    if score.unit:
        title += f", {score.unit}"
    scale = 100 if score.unit == "%" else 1
    values = series(metrics, f"eval/{key}", scale)
    lines = [Line("generated", BLUE, values)]
    colours = (ORANGE, GREY)
    for colour, (name, value) in zip(colours, metric.reference_values(newest, key)):
        line = constant_line(name, colour, values, value, scale)
        lines.append(line)
    return plot.draw_chart(title, "", lines, zero=True)


def throughput_chart(metrics: list[dict]) -> Chart | None:
    speed = Line("smoothed", BLUE, series(metrics, "perf/frames_per_sec"))
    step_ms = series(metrics, "perf/step_ms")[1]
    pace = f"{np.median(step_ms):,.0f} ms a step, the median" if step_ms.size else ""
    return plot.draw_chart("Throughput, frames/s", pace, [speed], zero=True)


def constant_line(name: str, colour: str, over: np.ndarray, value: float | None, scale: float) -> Line:
    """A line at `scale` times a value, at the steps of the line `over` (2, n); empty if there is no value."""
    if value is None:
        return Line(name, colour, np.zeros((2, 0)))
    steps = over[0]
    heights = np.full_like(steps, scale * value)
    return Line(name, colour, np.stack([steps, heights]))


def series(metrics: list[dict], key: str, scale: float = 1) -> np.ndarray:
    """(2, n): the steps and `scale` times the values of the rows that have a number under `key`."""
    points = []
    for row in metrics:
        if isinstance(row.get(key), (int, float)):
            points.append((row["step"], scale * row[key]))
    return np.array(points, float).reshape(-1, 2).T


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python metric.py OUT_DIR")
    print(write_report(expand_path(sys.argv[1])))
