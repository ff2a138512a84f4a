"""The two demos to their end: a small Klein tuned in full, then a LoRA on it. Slow."""

import subprocess
import sys

import pytest
import test_demo
from test_demo import ROOT


@pytest.mark.slow
def test_a_small_klein_paints_what_is_understood_and_its_lora_a_second_voice(tmp_path):
    painted = test_demo.run("spectrogram_demo", tmp_path / "full")
    assert painted["eval/wer"] <= 0.05 and painted["eval/lsd"] <= 6
    words = ["export", "--ckpt", tmp_path / "full" / "out", "--out", tmp_path / "klein"]
    subprocess.run([sys.executable, ROOT / "system.py", *words], check=True)
    adapted = test_demo.run("spectrogram_demo_lora", tmp_path / "lora", "--base", str(tmp_path / "klein"))
    # 16 without the LoRA, 2 the recordings themselves
    assert adapted["eval/wer"] <= 0.15 and adapted["eval/lsd"] <= 10
