"""What music is evaluated with: captions as they were typed, and figures of whole sets."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluator
import system
from music.system import Music


def test_captions_of_music_stay_as_they_were_typed(tmp_path):
    (tmp_path / "prompts.txt").write_text("120 bpm, 3/4 time\n")
    recipe = str(ROOT / "configs" / "music_demo.yaml")
    config = system.load_config(recipe, [f"--eval.prompts={tmp_path / 'prompts.txt'}"])
    assert evaluator.Evaluator(config, None, torch.device("cpu")).texts == ["120 bpm, 3/4 time"]


def test_sounds_are_compared_as_sets_and_each_with_its_caption():
    sounds = np.random.default_rng(0).normal(size=(16, 4))
    captions = sounds / np.square(sounds).sum(1, keepdims=True)  # of cosine 1 with their sounds
    found = Music.summarize(None, {"generated": sounds, "real": sounds, "text": captions}, None)
    assert found["fad"] == pytest.approx(0, abs=1e-6) and found["kad"] < 0.1
    assert found["clap"] == pytest.approx(1)
    assert found.keys() == {"fad", "kad", "clap"} <= Music.scores.keys()


def test_without_clap_there_is_the_chance_of_a_guess():
    assert Music.summarize(None, {"chance": np.array([0.25, 0.75])}, None) == {"chance": 0.5}
