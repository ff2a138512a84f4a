"""Pieces and what is measured of them: their key, tempo and timbre are those of their captions, whatever the
loudness, the rate or a vocoder does to the sound.
"""

import collections
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import audio
import config as configs
import system
from config import UserError
from corpora import shards
from music import analysis, pieces
from music.data import MusicCorpus, prepare_music

DEMO = system.load_config(str(ROOT / "configs" / "music_demo.yaml"))


@pytest.fixture(scope="module")
def played() -> list[tuple[shards.Clip, torch.Tensor]]:
    """The 64 pieces that the demo validates on, and their waves."""
    clips = [clip for clip in pieces.list_pieces(0) if clip.split == "val"]
    return [(clip, pieces.compose(clip.text, clip.id, 5.12, 16000)) for clip in clips]


def share_matched(pairs: list[tuple[shards.Clip, torch.Tensor]], sample_rate: int = 16000) -> float:
    found = [
        analysis.caption_match(analysis.measure(wave, sample_rate), clip.text)["all_match"]
        for clip, wave in pairs
    ]
    return sum(found) / len(found)


def test_a_piece_measures_as_its_caption_says_and_as_no_other(played):
    assert share_matched(played) >= 0.97
    shifted = zip([clip for clip, _ in played[1:] + played[:1]], [wave for _, wave in played])
    assert share_matched(list(shifted)) <= 0.1  # chance is 1 of 210


def test_it_does_so_through_the_demos_log_mel_and_griffin_lim(played):
    rebuilt = [
        (clip, audio.griffin_lim(audio.log_mel(wave, DEMO.mel), DEMO.mel)) for clip, wave in played[:32]
    ]
    assert share_matched(rebuilt) >= 0.96


def test_neither_loudness_nor_rate_nor_a_little_noise_matters(played):
    noise = torch.randn(81920, generator=torch.Generator().manual_seed(0))
    for rate, change in (
        (16000, lambda wave: 0.01 * wave),
        (22050, lambda wave: audio.resample(wave, 16000, 22050)),
        (16000, lambda wave: wave + 1e-3 * noise),
    ):
        assert share_matched([(clip, change(wave)) for clip, wave in played[:24]], rate) >= 0.95


def test_the_measure_of_one_attribute_does_not_depend_on_the_others():
    """Every timbre at every tempo, in one key; every key, in one timbre."""
    ways = list(itertools.product(["D minor"], analysis.TEMPI, analysis.TIMBRES))
    ways += [(key, "medium", "violin") for key in analysis.KEYS]
    pairs = []
    for key, tempo, timbre in ways:
        caption = pieces.CAPTIONS[0].format(key=key, tempo=tempo, timbre=timbre)
        pairs.append((shards.Clip("", caption, "", None), pieces.compose(caption, "x", 5.12, 16000)))
    assert share_matched(pairs) >= 0.96


def test_a_piece_is_a_function_of_its_caption_and_seed(played):
    clip, wave = played[0]
    assert torch.equal(pieces.compose(clip.text, clip.id, 5.12, 16000), wave)
    other = pieces.compose(clip.text, "other", 5.12, 16000)
    assert (
        len(wave) == len(other) == 81920
        and wave.abs().max() == other.abs().max() == 0.5
        and not torch.allclose(wave, other, atol=0.1)
    )


def test_training_has_no_combination_that_validation_and_test_have():
    clips = pieces.list_pieces(500)
    ways = {split: set() for split in shards.SPLITS}
    for clip in clips:
        attributes = analysis.parse_caption(clip.text)
        ways[clip.split].add(tuple(attributes.values()))
    assert (
        not ways["train"] & (ways["val"] | ways["test"])
        and len(ways["val"]) >= 20
        and all(map(all, set.union(*ways.values())))
    )
    assert collections.Counter(clip.split for clip in clips) == {"train": 500, "val": 64, "test": 64}
    assert (
        pieces.list_pieces(500)[:50] == pieces.list_pieces(50)[:50]
        and pieces.list_pieces(50)[50:] == clips[500:]
    )
    for n, values in enumerate((analysis.KEYS, analysis.TEMPI, analysis.TIMBRES)):
        assert {way[n] for way in ways["train"]} == set(values)


@pytest.mark.parametrize(
    "caption",
    ["", "A fast flute.", "ambient, choir", "A slow, fast flute in C major.", "A slow flute in C majority."],
)
def test_other_captions_ask_for_nothing(caption):
    assert (
        analysis.parse_caption(caption)
        == {}
        == analysis.caption_match({"key": "C major", "tempo": "slow", "timbre": "flute"}, caption)
    )


def test_silence_a_click_and_noise_measure_as_something_or_nothing():
    caption = "A slow flute in C major."
    for wave in (
        torch.zeros(0),
        torch.zeros(81920),
        F.one_hot(torch.tensor(9), 81920).float(),
        torch.rand(81920),
        torch.ones(81920),
    ):
        assert set(analysis.caption_match(analysis.measure(wave, 16000), caption)) == {
            "key_match",
            "tempo_match",
            "timbre_match",
            "all_match",
        }
    assert analysis.caption_match(analysis.measure(torch.zeros(81920), 16000), caption)["all_match"] == 0


def test_pieces_are_packed_as_they_are_played(tmp_path):
    config = configs.overridden(
        DEMO, [f"--data_dir={tmp_path}", "--sentences=4", "--crop_seconds=1.28", "--workers=1"]
    )
    prepare_music(config)
    corpus = MusicCorpus(config)
    assert [len(corpus.clips(split)) for split in shards.SPLITS] == [4, 64, 64]
    log_mels = []
    for clip in corpus.clips("train"):
        expected = pieces.compose(clip.text, clip.id, 1.28, 16000)
        wave, rate = corpus.recording(clip)
        assert rate == 16000 and clip.group.split()[0] in clip.text
        torch.testing.assert_close(wave[: len(expected)], expected, rtol=0, atol=2e-5)
        log_mels.append(audio.log_mel(0.5 * wave / wave.abs().max(), config.mel))
    x = torch.cat(log_mels)
    assert corpus.statistics == pytest.approx((x.mean().item(), x.std().item()), rel=1e-5)
    prepare_music(config)  # once packed, nothing is played again
    with pytest.raises(UserError, match="already holds another corpus"):
        prepare_music(configs.overridden(config, ["--sentences=5"]))
