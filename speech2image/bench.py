"""Speech to pictures measured on its own corpora, one table a command.

python -m speech2image.bench digits --root DIR [--speakers george lucas --stages 1 --out out/digits]
    Real spoken digits (FSDD: labels.csv, recordings/) and MNIST's pictures (t10k-*), one speaker left out:
    R@1 of stage 1 among pictures that nothing was trained on; with --stages 2 also how often the generated
    picture is the digit said, by a classifier trained on MNIST.
python -m speech2image.bench ablation [--steps 400 --out out/ablation --modes adaln sta --key value ...]
    Stage 2 of the demo, prepared before, for each way of conditioning it: pictures in which all is right;
    nats a code.
"""

import argparse
import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import metric
from config import expand_path, parse_overrides
from tracking import logger

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURES = 4  # drawn with each recording to train on, so that a digit is not a few pictures
ALIGN = {
    "corpus": "listed",
    "max_seconds": 8,
    "hidden_share": 0.2,
    "width": 128,
    "layers": 3,
    "heads": 4,
    "steps": 400,
    "batch_size": 64,
    "eval_interval": 400,
    "val_interval": 0,
    "limit": 150,
}
# codes.condition, codes.condition_scale
MODES = {
    "AdaLN, a learned projection": ("adaln", 0),
    "STA as published, raw halves of length 1": ("sta", 1),
    "STA, variance 1": ("sta", 0),
    "concatenation, one more token": ("concat", 0),
    "cross-attention to four tokens": ("cross", 0),
}


def digits(root: Path, out: Path, speakers: list[str], stages: int) -> list[dict]:
    """A row of figures for each speaker held out."""
    with open(root / "labels.csv", newline="", encoding="utf-8") as f:
        recordings = list(csv.DictReader(f))
    pixels = read_idx(root / "t10k-images-idx3-ubyte.gz", header=16)
    pictures = pixels.reshape(-1, 28, 28)
    labels = read_idx(root / "t10k-labels-idx1-ubyte.gz", header=8)
    if not speakers:
        speakers = sorted({line["speaker"] for line in recordings})

    rows = []
    for speaker in speakers:
        folder = out.resolve() / speaker
        corpus = folder / "corpus"
        write_corpus(corpus, root, recordings, pictures, labels, speaker)
        common = {"data_dir": corpus, "device": "cpu", "wandb": "disabled", "dtype": "fp32"}
        row = {"speaker": speaker}
        row |= train_recipe("speech_align_demo", folder / "align", common | ALIGN)
        if stages == 2:
            options = common | {"corpus": "listed", "stage1": folder / "align", "limit": 150}
            scores = train_recipe("speech_image_demo", folder / "image", options)
            row |= {f"generated {key}": value for key, value in scores.items()}
        rows.append(row)
    return rows


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of one of MNIST's files. header: bytes to skip."""
    with gzip.open(path) as f:
        return np.frombuffer(f.read(), np.uint8, offset=header)


def write_corpus(
    folder: Path,
    root: Path,
    recordings: list[dict],
    pictures: np.ndarray,
    labels: np.ndarray,
    held_out: str,
) -> None:
    """A list of spoken pictures; the last 2,000 of the 10,000 are the held-out speaker's."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    unused = {}  # numbers of the pictures of a digit in a split
    for digit in range(10):
        numbers = np.flatnonzero(labels == digit)
        unused["train", digit] = iter(numbers[numbers < 8000])
        unused["val", digit] = iter(numbers[numbers >= 8000])

    lines = []
    for recording in recordings:
        split = "val" if recording["speaker"] == held_out else "train"
        digit = int(recording["digit"])
        wav = root / "recordings" / recording["file"]
        for _ in range(PICTURES if split == "train" else 1):
            number = next(unused[split, digit])
            picture = f"pictures/{number:05d}.png"
            padded = np.pad(pictures[number], 2)
            Image.fromarray(padded).save(folder / picture)
            line = {
                "picture": picture,
                "wav": str(wav.resolve()),
                "text": WORDS[digit],
                "split": split,
                "voice": recording["speaker"],
                "label": WORDS[digit],
            }
            lines.append(json.dumps(line) + "\n")
    (folder / "captions-en.jsonl").write_text("".join(lines), encoding="utf-8")


def train_recipe(recipe: str, out: Path, options: dict, prepares: bool = True) -> dict[str, float]:
    """Train a recipe with options on top, in `out`; returns the newest value of all that it logged."""
    out.mkdir(parents=True, exist_ok=True)
    words = [f"--config={ROOT / 'configs' / recipe}.yaml"]
    words += [f"--{key}={value}" for key, value in options.items()]
    words += [f"--out_dir={out}", "--expect={}"]  # here a low figure is a result
    prepare = ["system.py", "prepare"]
    for script, *command in [prepare] * prepares + [["train.py"]]:
        line = [sys.executable, ROOT / script, *command, *words]
        subprocess.run(line, check=True, stdout=sys.stderr)
    values = metric.newest_values(logger.read_lines(out / "metrics.jsonl"))
    return {key.removeprefix("eval/"): value for key, value in values.items()}


def ablation(steps: int, out: Path, modes: list[str], knobs: list[str]) -> list[dict]:
    """A row of figures of stage 2 for each way of conditioning it on the speech, trained anew."""
    common = parse_overrides(knobs)
    common |= {"train.steps": steps, "eval_interval": steps, "val_interval": steps}
    rows = []
    for name, (mode, scale) in MODES.items():
        if modes and mode not in modes:
            continue
        options = common | {"condition": mode, "condition_scale": scale}
        values = train_recipe("speech_image_demo", out / f"{mode}_{scale}", options, prepares=False)
        rows.append({"condition": name} | values)
    return rows


def print_table(rows: list[dict], columns: list[str], mean: bool = True) -> None:
    """Print a table in Markdown, and the mean of its rows."""
    columns = [column for column in columns if column in rows[0]]
    if mean and len(rows) > 1:
        means = {columns[0]: "mean"}
        for column in columns[1:]:
            means[column] = float(np.mean([row[column] for row in rows]))
        rows = [*rows, means]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in rows:
        cells = []
        for column in columns:
            value = row[column]
            cells.append(value if isinstance(value, str) else f"{value:.3f}")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("digits")
    command.add_argument("--root", type=expand_path, required=True, help="labels.csv, recordings/, t10k-*.gz")
    command.add_argument("--out", type=expand_path, default=Path("out/digits"))
    command.add_argument("--speakers", nargs="*", default=[], help="to hold out; default: each in turn")
    command.add_argument("--stages", type=int, default=2, choices=(1, 2))
    command = commands.add_parser("ablation")
    command.add_argument("--steps", type=int, default=400)
    command.add_argument("--out", type=expand_path, default=Path("out/ablation"))
    command.add_argument("--modes", nargs="*", default=[], help="of codes.condition; default: all")
    options, knobs = parser.parse_known_args()

    if options.command == "ablation":
        rows = ablation(options.steps, options.out, options.modes, knobs)
        shares = ["all_match", "all_match/known", "all_match/new", "all_match_shuffled"]
        print_table(rows, ["condition", *shares, "val/flow_loss", "perf/train_minutes"], mean=False)
        return
    if knobs:
        parser.error(f"unknown: {' '.join(knobs)}")
    rows = digits(options.root, options.out, options.speakers, options.stages)
    stage1 = ["recall_1", "recall_5", "recall_back_1", "cos_matched", "cos_unmatched"]
    stage2 = [f"generated {key}" for key in ("all_match", "all_match_shuffled", "all_match_vocoded")]
    print_table(rows, ["speaker", *stage1, *stage2])


if __name__ == "__main__":
    main()
