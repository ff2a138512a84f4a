"""How fast the loader feeds a device: the counts that do not hang on a machine, and that its bench runs."""

import re

import pytest
from conftest import ROOT, call

import system
from bench import loader

RECIPE = f"{ROOT}/configs/ljspeech.yaml"


@pytest.mark.parametrize(
    "batch, fine, coarse",
    [(64, (44, 142, "3.3 %"), (23, 57, "4.6 %")), (8, (46, 243, "2.8 %"), (24, 83, "4.1 %"))],
)
def test_three_epochs_of_the_main_recipe_meet_few_shapes(batch, fine, coarse):
    """Their number, of T and of (T, S), and the share of padding, beside those of the defaults."""
    words = [f"--global_batch={batch}"]
    config = system.settle_batch(system.load_config(RECIPE, words), world=1)
    assert tuple(loader.shape_figures(config).values()) == coarse
    words += ["--pad_multiple=16", "--text_multiple=8"]
    config = system.settle_batch(system.load_config(RECIPE, words), world=1)
    assert tuple(loader.shape_figures(config).values()) == fine


def test_the_bench_writes_its_corpus_and_tells_what_a_step_copies(capsys):
    call(loader, f"--config={RECIPE}", "--clips=48", "--steps=2", "--rounds=1", "--global_batch=8")
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^\| (.+) \| ([\d,.]+).* \|$", printed, re.MULTILINE))
    assert len(found) == 9 and float(found["MB a step"]) > 1
    assert all(float(found[name].replace(",", "")) > 0 for name in found if name.startswith("frames"))
