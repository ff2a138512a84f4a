"""The demos from an empty folder to what is as asked for; minutes long: `./run.sh test -m slow -n 0`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(recipe: str, folder: Path, *words: str) -> dict:
    """What a recipe's last evaluation found, run as a user runs it, in folders of its own."""
    folders = ["--data_dir", str(folder / "data"), "--out_dir", str(folder / "out")]
    command = ["./run.sh", "--gpus", "0", "--config", f"configs/{recipe}.yaml", *folders, *words]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "VENV": sys.prefix}, check=True, timeout=2400)
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(path.stat().st_size > 1000 for path in (folder / "out").glob("sample.*"))
    return [row for row in rows if any(key.startswith("eval/") for key in row)][-1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "demo_overfit64"])
def test_the_demo_says_sentences_that_real_whisper_understands(recipe, tmp_path):
    found = run(recipe, tmp_path)  # an expectation that is missed is exit code 1
    assert found["eval/recogniser"] == "tiny.en" and found["eval/wer_vocoded"] <= 0.05
    assert found["eval/wer"] <= found["eval/wer_vocoded"] + 0.1
