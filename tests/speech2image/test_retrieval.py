"""Retrieval and figures of whole sets of pictures: a right picture is counted, and each picture once."""

import numpy as np
import pytest

from speech2image import retrieval
from speech2image.image import SpeechImage


def descriptions(**more) -> dict[str, np.ndarray]:
    """Features of eight descriptions, two of each of four pictures, as far apart as can be; the last one is
    heard as another's.
    """
    space = np.eye(8)[:4]
    picture = np.arange(8) // 2
    speech = space[picture]
    speech[-1] = space[0]
    group = np.array(["en f3", "ar m3"] * 4)
    features = {
        "speech": speech,
        "image": space[picture],
        "picture": picture,
        "label": picture,
        "group": group,
    }
    return features | more


@pytest.fixture
def network() -> SpeechImage:
    """One that only summarizes: without weights."""
    return SpeechImage.__new__(SpeechImage)


def test_retrieval_counts_right_pictures_by_language_and_voice_and_each_picture_once():
    found = retrieval.retrieval(descriptions(), "speech")
    assert found["recall_1"] == 7 / 8 and found["recall_10"] == 1
    assert found["recall_1/en"] == found["recall_1/f3"] == 1
    assert found["recall_1/ar"] == found["recall_1/m3"] == 3 / 4
    assert found["language_gap"] == 1 / 4 and found["recall_back_1"] == 1
    # 1 of 8 * 3 strangers is heard
    assert found["cos_matched"] == 7 / 8 and found["cos_unmatched"] == pytest.approx(1 / 24)


def test_pictures_that_were_generated_are_found_again(network):
    image = descriptions()["image"]
    features = descriptions(generated=image, chance=np.full(8, 1 / 120))
    found = network.summarize(features, None)
    assert found["recall_made_1"] == 1 and found["chance"] == pytest.approx(1 / 120)
    of_speech = retrieval.retrieval(features, "speech")
    of_generated = retrieval.retrieval(features, "generated")
    assert of_speech != of_generated
    expected = of_speech | {"chance": found["chance"]}
    for k in (1, 5, 10):
        expected[f"recall_made_{k}"] = of_generated[f"recall_{k}"]
    assert found == expected
    assert {key.split("/")[0] for key in found} <= SpeechImage.scores.keys()


def test_pictures_are_compared_as_sets_where_a_network_sees_them(network):
    seen = np.random.default_rng(0).normal(size=(8, 3))
    image = descriptions()["image"]
    found = network.summarize(
        descriptions(generated=image, seen=seen, seen_real=seen, shares=np.eye(8)), None
    )
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["inception_score"] == pytest.approx(8)
    without_classes = descriptions(generated=image, seen=seen, seen_real=seen, shares=np.zeros((8, 0)))
    assert "inception_score" not in network.summarize(without_classes, None)


def test_the_space_is_drawn_where_there_is_a_folder(network, tmp_path):
    network.summarize(descriptions(generated=descriptions()["image"]), tmp_path)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_the_rule_stands_right_beside_that_of_the_judge():
    keys = list(SpeechImage.scores)
    for of in ("all", "colour", "shape", "place"):
        assert keys.index(f"{of}_rule") == keys.index(f"{of}_match") + 1
        assert SpeechImage.scores[f"{of}_rule"].is_match
