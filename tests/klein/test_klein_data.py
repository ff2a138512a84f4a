"""Waves for pictures: packed from recordings at the picture's rate, whole or in part."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_data
import test_demo_corpus
import torch
from test_data import MEL

import audio
import config as configs
import data
import system
from config import UserError
from corpora import demo, prepare, shards, speech
from klein.config import Picture
from klein.data import WaveCorpus, wave_format


def waves_config(folder: Path, *overrides: str) -> configs.Config:
    return system.load_config(
        "", ["--system", "spectrogram", "--corpus", "librispeech", "--data_dir", str(folder), *overrides]
    )


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
    config = waves_config(tmp_path)
    corpus, clips, skipped = prepare.READERS["librispeech"](config)
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


def test_waves_are_the_recordings_at_the_pictures_rate_and_what_is_too_long_is_counted(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    test_data.write_librispeech(tmp_path / "raw", 4, rate=22050)
    config = waves_config(tmp_path / "raw", "--picture.seconds", "0.7")
    clips, _ = speech.read_librispeech(tmp_path / "raw")
    expected = {clip.id: audio.load_wav(clip.wav, 16000) for clip in clips}
    prepare.prepare_recordings(config, wave_format(config.picture))
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
    prepare.prepare_recordings(config, wave_format(config.picture))


def test_overfitting_needs_no_clip_to_validate_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_data.write_metadata(tmp_path / "raw", test_data.write_recordings(tmp_path / "raw", 8))
    # the one that validates is too long
    audio.save_wav(tmp_path / "raw/wavs/c0007.wav", torch.rand(50000), MEL.sample_rate)
    config = waves_config(tmp_path / "raw", "--corpus=ljspeech", "--picture.seconds=1.5", "--overfit=3")
    prepare.prepare_recordings(config, wave_format(config.picture))
    assert [len(WaveCorpus(config).clips(split)) for split in shards.SPLITS] == [3, 3, 3]
    nothing = waves_config(tmp_path / "raw", "--corpus=ljspeech", "--picture.seconds=0.2")
    with pytest.raises(UserError, match="8 clips are too long .data.align cuts them"):
        prepare.prepare_recordings(nothing, wave_format(nothing.picture))


def test_a_clip_is_its_part_of_the_recording(tmp_path):
    test_data.write_librispeech(tmp_path, 2)
    clips, corpus = speech.read_librispeech(tmp_path)[0], {"name": "librispeech", "resample": True}
    form = wave_format(Picture())
    whole, part = (
        prepare.read_clip(tmp_path, corpus, form, clips[0]._replace(start=a, stop=b)).ravel()
        for a, b in ((0, 0), (0.1, 0.3))
    )
    assert np.array_equal(part[:3200], whole[1600:4800]) and not part[3200:].any()


def test_the_demo_speaks_with_another_voice_into_waves(tmp_path):
    made = {}
    for name in ("espeak:en-us", "espeak:en-us+m3"):
        config = system.load_config(
            "",
            [
                "--system=spectrogram",
                "--corpus=demo",
                f"--data_dir={tmp_path / name}",
                "--sentences=3",
                f"--voice={name}",
            ],
        )
        prepare.prepare_recordings(config, wave_format(config.picture))
        made[name] = WaveCorpus(config)
    clips = [corpus.clips("train")[0] for corpus in made.values()]
    assert clips[0].text == clips[1].text == demo.distinct_sentences("matrix", 1, held_out=False)[0]
    a, b = (corpus.wave(corpus.clips("train")[0]) for corpus in made.values())
    assert len(a) / 16000 == pytest.approx(len(b) / 16000, abs=0.5) and (
        len(a) != len(b) or not torch.allclose(a, b, atol=0.1)
    )
    with pytest.raises(UserError, match="packed with n_fft None, but 1024 is wanted"):
        data.Corpus(test_demo_corpus.config_for(tmp_path / "espeak:en-us", "--mel.sample_rate=16000"))
