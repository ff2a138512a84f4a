"""The demo from an empty folder to speech that is understood; minutes long: `./run.sh test -m slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe, bound", [("demo", 0.10), ("demo_overfit64", 0.05)])
def test_the_demo_says_sentences_that_are_understood(recipe, bound, tmp_path):
    folders = ["--data_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out")]
    command = ["./run.sh", "--gpus", "0", "--config", f"configs/{recipe}.yaml", *folders]
    environment = {**os.environ, "VENV": sys.prefix}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1500)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "eval/wer" in row][-1]
    assert found["eval/wer_vocoded"] <= 0.05 and found["eval/wer"] <= bound
    assert (tmp_path / "out" / "sample.wav").stat().st_size > 20_000
