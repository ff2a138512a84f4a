"""TODO."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_data
import torch
from test_data import MEL

import audio
import config as configs
import system
from config import UserError
from corpora import prepare, shards, speech
from klein.config import Picture
from klein.data import WaveCorpus, wave_format


def test_what_is_wrong_in_librispeech_is_named(tmp_path):
    test_data.write_librispeech(tmp_path, 3, utterances=8)
    folder = tmp_path / "LibriSpeech/train-clean-100/100/7"
    transcript, flac = folder / "100-7.trans.txt", [folder / f"100-7-{n:04d}.flac" for n in range(8)]
    lines = transcript.read_bytes().splitlines()
    transcript.write_bytes(
        b"\n".join([b"100-7-0000", lines[1], lines[1], *lines[3:7], b"100-7-0007 CAF\xc9", b"../x TEXT"])
        + b"\n"
    )
    flac[3].write_bytes(flac[3].read_bytes()[:3000])
    flac[4].write_bytes(b"fLaC, not really")
    flac[5].unlink()
    config = system.load_config("", ["--corpus", "librispeech", "--data_dir", str(tmp_path)])
    corpus, clips, skipped = prepare.read_corpus(config)
    form = wave_format(config.picture)
    shards.pack(
        tmp_path / "out",
        corpus,
        clips,
        skipped,
        form,
        functools.partial(prepare.read_clip, tmp_path, corpus, form),
        workers=1,
    )
    expected = {
        "line 1 (100-7-0000)": "1 fields, not 2",
        "line 3 (100-7-0001)": "duplicate id",
        "line 8 (100-7-0007)": "not UTF-8",
        "line 9 (../x)": "no file name",
        "100-7-0003": "",
        "100-7-0004": "not a readable sound file",
        "100-7-0005": "is missing",
    }
    found = test_data.index_of(tmp_path / "out")
    for where, reason in expected.items():
        assert sum(where in line and reason in line for line in found["skipped"]) == 1, where
    # nobody wrote a line for 100-7-0002
    assert len(found["skipped"]) == len(expected) and sum(found["clips"].values()) == 18
    with pytest.raises(UserError, match="no <speaker>/<chapter>.*--download"):
        speech.read_librispeech(tmp_path / "out")


# Waves for pictures


def waves_config(folder: Path, *overrides: str) -> configs.Config:
    return system.load_config(
        "", ["--system", "spectrogram", "--corpus", "librispeech", "--data_dir", str(folder), *overrides]
    )


def as_they_are(_: configs.Config, clips: list[shards.Clip], __: Path) -> list[shards.Clip]:
    return clips


def test_waves_are_the_recordings_at_the_pictures_rate_and_what_is_too_long_is_counted(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    test_data.write_librispeech(tmp_path / "raw", 4, rate=22050)
    config = waves_config(tmp_path / "raw", "--picture.seconds", "0.7")
    clips, _ = speech.read_librispeech(tmp_path / "raw")
    expected = {clip.id: audio.load_wav(clip.wav, 16000) for clip in clips}
    prepare.prepare_speech(config, wave_format(config.picture), as_they_are)
    corpus = WaveCorpus(config)
    found = {clip.id: corpus.wave(clip) for clip in corpus.clips("train") + corpus.clips("val")}
    assert set(found) == {name for name, wave in expected.items() if len(wave) <= 0.7 * 16000} and 0 < len(
        found
    ) < len(clips)
    for name, wave in found.items():
        n, padding = len(expected[name]), wave[len(expected[name]) :]
        torch.testing.assert_close(wave[:n], expected[name].clamp(-1, 1), rtol=0, atol=2e-5)
        assert len(padding) < config.picture.hop and not padding.any() and len(wave) <= 0.7 * 16000
    printed, index = capfd.readouterr().out, test_data.index_of(corpus.folder)
    assert f"0 skipped, {len(clips) - len(found)} too long" in printed and index["too_long"] == len(
        clips
    ) - len(found)
    assert not index["skipped"] and len(printed.splitlines()) == 4  # reading, twice; packing; done
    wave, rate = corpus.recording(corpus.clips("val")[0])
    assert (
        rate == 16000 and torch.equal(wave, corpus.wave(corpus.clips("val")[0])) and corpus.statistics == ()
    )
    shutil.rmtree(tmp_path / "raw")  # once packed, the recordings may go
    prepare.prepare_speech(config, wave_format(config.picture), as_they_are)


def test_learning_by_heart_needs_no_clip_to_validate_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_data.write_metadata(tmp_path / "raw", test_data.write_recordings(tmp_path / "raw", 8))
    # the one that validates is too long
    audio.save_wav(tmp_path / "raw/wavs/c0007.wav", torch.rand(50000), MEL.sample_rate)
    config = waves_config(tmp_path / "raw", "--corpus=ljspeech", "--picture.seconds=1.5", "--overfit=3")
    prepare.prepare_speech(config, wave_format(config.picture), as_they_are)
    assert [len(WaveCorpus(config).clips(split)) for split in shards.SPLITS] == [3, 3, 3]
    nothing = waves_config(tmp_path / "raw", "--corpus=ljspeech", "--picture.seconds=0.2")
    with pytest.raises(UserError, match="8 clips are too long .data.align cuts them"):
        prepare.prepare_speech(nothing, wave_format(nothing.picture), as_they_are)


def test_a_clip_is_its_part_of_the_recording(tmp_path):
    test_data.write_librispeech(tmp_path, 2)
    clips, corpus = speech.read_librispeech(tmp_path)[0], {"name": "librispeech", "resample": True}
    form = wave_format(Picture())
    whole, part = (
        prepare.read_clip(tmp_path, corpus, form, clips[0]._replace(start=a, stop=b)).ravel()
        for a, b in ((0, 0), (0.1, 0.3))
    )
    assert np.array_equal(part[:3200], whole[1600:4800]) and not part[3200:].any()
