"""The demo of music from an empty folder; minutes long: `./run.sh test -m slow -n 0`."""

import pytest
import test_demo


@pytest.mark.slow
def test_music_is_in_the_key_the_tempo_and_the_timbre_of_its_caption(tmp_path):
    found = test_demo.run("music_demo", tmp_path)
    assert (
        found["eval/all_match_vocoded"] >= 0.95
        and found["eval/all_match"] >= 0.8
        and found["eval/all_match_shuffled"] <= 0.05
    )
