"""Captioned recordings: what is packed of them, and what is refused, in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import test_data
import torch

import audio
import system
from config import UserError
from corpora import shards
from music.data import MusicCorpus, read_music


def write_music(root: Path) -> list[dict]:
    """Four sounds below `root`: 3 s, 8 kHz, stereo, one of 0.4 s; entries of a JSON list of them."""
    (root / "sounds").mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for n, (rate, seconds, channels) in enumerate(
        ((44100, 3.0, 1), (8000, 12.0, 1), (16000, 5.0, 2), (16000, 0.4, 1))
    ):
        soundfile.write(
            root / f"sounds/s{n}.flac", 0.3 * rng.uniform(-1, 1, (int(rate * seconds), channels)), rate
        )
        entries.append({"wav": f"sounds/s{n}.flac", "label": f"noise, {n}"})
    return entries


def pack_music(path: Path, out: Path) -> MusicCorpus:
    """What `python data.py music` makes, opened."""
    done = test_data.run_cli("music", "--json", path, "--out", out, "--workers", "1")
    assert done.returncode == 0, done.stderr
    words = [
        "--system=music",
        "--corpus=music",
        f"--data_dir={out}",
        "--mel.sample_rate=16000",
        "--mel.hop=160",
        "--n_mels=64",
        "--autoencoder=patches",
        "--size=own",
        "--vocoder=griffinlim",
    ]
    return MusicCorpus(system.load_config("", words))


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_music_is_packed_whole_and_mono_at_the_rate_of_the_mel(tmp_path, kind):
    entries = write_music(tmp_path / "raw")
    path = tmp_path / "raw" / "clips.json"
    path.write_text(json.dumps(entries))
    if kind == "csv":
        path = path.parent
        (path / "list.csv").write_text(
            "caption,file,rate\n" + "".join(f'"{e["label"]}",{e["wav"]},1\n' for e in entries)
        )
    corpus = pack_music(path, tmp_path / "out")
    clips = sorted(corpus.clips("train") + corpus.clips("val"), key=lambda clip: clip.id)
    assert [clip.text for clip in clips] == [e["label"] for e in entries]
    assert [len(corpus.clips(split)) for split in shards.SPLITS] == [3, 1, 0]
    for clip, entry in zip(clips, entries):
        wave, rate = corpus.recording(clip)
        expected = audio.load_wav(tmp_path / "raw" / entry["wav"], 16000)
        assert rate == 16000 and 0 <= len(wave) - len(expected) < 160
        torch.testing.assert_close(wave[: len(expected)], expected, rtol=0, atol=2e-5)
    left, right = soundfile.read(tmp_path / "raw/sounds/s2.flac", dtype="float32")[0].T
    torch.testing.assert_close(corpus.wave(clips[2]), torch.from_numpy(left + right) / 2, rtol=0, atol=2e-5)


def test_a_missing_recording_is_an_error_and_what_is_no_music_is_named(tmp_path):
    entries = write_music(tmp_path)
    path = tmp_path / "clips.json"
    soundfile.write(tmp_path / "sounds/silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "sounds/faint.wav", np.full(16000, 2e-5), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "sounds/short.wav", np.full(800, 0.1), 16000)
    more = [{"wav": f"sounds/{name}.wav", "label": name} for name in ("silent", "faint", "short")]
    path.write_text(json.dumps([*entries, *more, {"wav": "sounds/s0.flac", "label": " "}]))
    skipped = test_data.index_of(pack_music(path, tmp_path / "out").folder)["skipped"]
    for where, reason in (
        ("s0.flac", "empty caption"),
        ("silent.wav", "silent"),
        ("faint.wav", "silent"),
        ("short", "0.05 s is below"),
    ):
        assert sum(where in line and reason in line for line in skipped) == 1, where
    assert len(skipped) == 4
    (tmp_path / "sounds/s3.flac").unlink()
    done = test_data.run_cli("music", "--json", path, "--out", tmp_path / "other")
    assert (
        done.returncode == 2
        and "s3.flac is missing, as 1 of 8 recordings" in done.stderr
        and not (tmp_path / "other").exists()
    )


def test_a_recording_of_a_name_that_no_file_can_have_is_missing(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"wav": "a" * 300, "label": "a"}]))
    with pytest.raises(UserError, match="aaa is missing"):
        read_music(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"a": 1}',
        "[1]",
        '[{"wav": "a.wav"}]',
        '[{"wav": "a.wav", "label": 3}]',
        '[{"wav": 3, "label": "a"}]',
        '[{"wav": "a.wav", "label": "a", "split": "dev"}]',
        "[" * 100_000,
    ],
)
def test_a_list_of_another_form_is_an_error(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="x.json: missing, or not"):
        read_music(tmp_path / "x.json")


@pytest.mark.parametrize(
    "words, message",
    [
        (["music", "--json", "nowhere.json", "--out", "x"], "nowhere.json: missing, or not"),
        (["music", "--root", ".", "--out", "x"], "captions.csv: missing, or not"),
    ],
    ids=str,
)
def test_a_user_error_is_one_line_and_exit_code_2(words, message, tmp_path):
    done = test_data.run_cli(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
