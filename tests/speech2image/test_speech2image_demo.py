"""The recipes of both stages on drawn shapes, run as a user runs them."""

import pytest
import test_demo


@pytest.mark.slow
def test_pictures_show_what_voices_say_that_were_never_heard(tmp_path):
    found = test_demo.run("speech_align_demo", tmp_path / "stage1")
    assert found["eval/recall_1"] >= 0.9 and found["eval/recall_1/new"] >= 0.8
    made = test_demo.run(
        "speech_image_demo", tmp_path / "stage2", "--stage1", str(tmp_path / "stage1" / "out")
    )
    for by in ("match", "rule"):
        assert made[f"eval/all_{by}"] >= 0.88 and made[f"eval/all_{by}/new"] >= 0.75
        assert made[f"eval/all_{by}_shuffled"] <= 0.05
    assert made["eval/all_rule_vocoded"] >= 0.97


@pytest.mark.slow
def test_arabic_finds_its_pictures_about_as_well_as_english(tmp_path):
    assert test_demo.run("speech_align_demo_ar", tmp_path)["eval/language_gap"] <= 0.05
