"""Speech to pictures measured on its own corpora, one table a command.

python tests/bench_speech2image.py digits --root DIR [--speakers george lucas --stages 1 --out out/digits]
    Real spoken digits (FSDD: labels.csv, recordings/) and MNIST's pictures (t10k-*): leave one speaker out, R@1 of stage 1 among pictures
    that nothing was trained on, and, with --stages 2, how often the picture made is the digit said, by a judge trained on MNIST.
python tests/bench_speech2image.py ablation [--steps 400 --out out/ablation --modes adaln sta --key value ...]
    What stage 2 of the demo, prepared before, makes of each way of conditioning it: pictures in which all is right; nats a code.
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

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURES = 4                         # drawn with each recording to train on, so that a digit is not a few pictures
ALIGN = {"corpus": "listed", "max_seconds": 8, "hidden_share": 0.2, "width": 128, "layers": 3, "heads": 4, "steps": 400, "batch_size": 64,
         "eval_interval": 400, "val_interval": 0, "limit": 150}
MODES = {"AdaLN, a learned projection": ("adaln", 0), "STA as published, raw halves of length 1": ("sta", 1), "STA, variance 1": ("sta", 0),
         "concatenation, one more token": ("concat", 0), "cross-attention to four tokens": ("cross", 0)}


def digits(root: Path, out: Path, speakers: list[str], stages: int) -> list[dict]:
    """A row of figures for each speaker held out."""
    with open(root / "labels.csv", newline="", encoding="utf-8") as f:
        recordings = list(csv.DictReader(f))
    with gzip.open(root / "t10k-images-idx3-ubyte.gz") as images, gzip.open(root / "t10k-labels-idx1-ubyte.gz") as labels:
        pictures = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        kinds = np.frombuffer(labels.read(), np.uint8, offset=8)
    rows = []
    for speaker in speakers or sorted({line["speaker"] for line in recordings}):
        folder = out.resolve() / speaker
        write_corpus(folder / "corpus", root, recordings, pictures, kinds, speaker)
        common = {"data_dir": folder / "corpus", "device": "cpu", "wandb": "disabled", "dtype": "fp32"}
        found = {"speaker": speaker} | run("speech_align_demo", folder / "align", common | ALIGN)
        if stages == 2:
            made = {"corpus": "listed", "stage1": folder / "align", "limit": 150}
            found |= {f"made {key}": value for key, value in run("speech_image_demo", folder / "image", common | made).items()}
        rows.append(found)
    return rows


def write_corpus(folder: Path, root: Path, recordings: list[dict], pictures: np.ndarray, kinds: np.ndarray, held_out: str) -> None:
    """A list of spoken pictures; the last 2,000 of MNIST's 10,000 test pictures are for the speaker held out."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    waiting = {split: {digit: iter(np.flatnonzero(kinds[part] == digit) + part.start) for digit in range(10)}
               for split, part in (("train", slice(0, 8000)), ("val", slice(8000, 10000)))}
    lines = []
    for line in recordings:
        split, digit = "val" if line["speaker"] == held_out else "train", int(line["digit"])
        for _ in range(PICTURES if split == "train" else 1):
            number = next(waiting[split][digit])
            Image.fromarray(np.pad(pictures[number], 2)).save(folder / f"pictures/{number:05d}.png")
            lines.append({"picture": f"pictures/{number:05d}.png", "wav": str((root / "recordings" / line["file"]).resolve()),
                          "text": WORDS[digit], "split": split, "voice": line["speaker"], "label": WORDS[digit]})
    (folder / "captions-en.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run(recipe: str, out: Path, knobs: dict) -> dict[str, float]:
    """Prepare and train a recipe with knobs on top, from the folder `out`; returns the figures of its last evaluation."""
    out.mkdir(parents=True, exist_ok=True)
    words = [f"--config={ROOT / 'configs' / recipe}.yaml", *(f"--{key}={value}" for key, value in knobs.items()), f"--out_dir={out}"]
    for script in (["system.py", "prepare"], ["train.py"]):
        subprocess.run([sys.executable, ROOT / script[0], *script[1:], *words], cwd=out.parent, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if any(key.startswith("eval/") for key in line)][-1]
    return {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}


def ablation(steps: int, out: Path, modes: list[str], knobs: list[str]) -> list[dict]:
    """A row of figures of stage 2 for each way of conditioning it on the speech, trained anew."""
    rows = []
    for name, (mode, scale) in MODES.items():
        if modes and mode not in modes:
            continue
        words = ["--config", ROOT / "configs" / "speech_image_demo.yaml", *knobs, "--out_dir", out / f"{mode}_{scale}", "--condition", mode,
                 "--condition_scale", scale, "--train.steps", steps, "--eval_interval", steps, "--val_interval", steps]
        subprocess.run([sys.executable, *map(str, [ROOT / "train.py", *words])], check=True, stdout=sys.stderr)
        lines = (out / f"{mode}_{scale}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows.append({"condition": name} | {key.removeprefix("eval/"): value for line in lines for key, value in json.loads(line).items()})
    return rows


def show(rows: list[dict], columns: list[str], mean: bool = True) -> None:
    """Print a table in Markdown, and the mean of its rows."""
    columns = [column for column in columns if column in rows[0]]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    means = {columns[0]: "mean"} | {column: float(np.mean([row[column] for row in rows])) for column in columns[1:]}
    for row in [*rows, *([means] if mean and len(rows) > 1 else [])]:
        print("| " + " | ".join(row[column] if isinstance(row[column], str) else f"{row[column]:.3f}" for column in columns) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("digits")
    command.add_argument("--root", type=Path, required=True, help="labels.csv, recordings/, t10k-*.gz")
    command.add_argument("--out", type=Path, default=Path("out/digits"))
    command.add_argument("--speakers", nargs="*", default=[], help="to hold out; default: each in turn")
    command.add_argument("--stages", type=int, default=2, choices=(1, 2))
    command = commands.add_parser("ablation")
    command.add_argument("--steps", type=int, default=400)
    command.add_argument("--out", type=Path, default=Path("out/ablation"))
    command.add_argument("--modes", nargs="*", default=[], help="of codes.condition; default: all")
    o, knobs = parser.parse_known_args()
    if o.command == "ablation":
        shares = ["all_match", "all_match/known", "all_match/new", "all_match_shuffled"]
        return show(ablation(o.steps, o.out, o.modes, knobs), ["condition", *shares, "val/flow_loss", "perf/train_minutes"], mean=False)
    if knobs:
        parser.error(f"unknown: {' '.join(knobs)}")
    show(digits(o.root, o.out, o.speakers, o.stages),
         ["speaker", "recall_1", "recall_5", "recall_back_1", "cos_matched", "cos_unmatched", "made all_match", "made all_match_shuffled",
          "made all_match_vocoded"])


if __name__ == "__main__":
    main()
