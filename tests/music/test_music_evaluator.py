"""The evaluator on music: captions are not normalised as spoken text is."""

from conftest import ROOT
from test_evaluator import CPU

import evaluator
import system


def test_captions_of_music_stay_as_they_were_typed(tmp_path):
    (tmp_path / "prompts.txt").write_text("120 bpm, 3/4 time\n")
    config = system.load_config(
        f"{ROOT}/configs/music_demo.yaml", [f"--eval.prompts={tmp_path / 'prompts.txt'}"]
    )
    assert evaluator.Evaluator(config, None, CPU).prompts == ["120 bpm, 3/4 time"]
