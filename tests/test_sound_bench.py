"""The bench of what is lost without a vocoder's weights: on two recordings that espeak-ng makes."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import call

import audio
from bench import sound
from config import Mel
from corpora import shards
from corpora.shards import Clip

MEL = Mel()
TEXT = "Julia ordered thirty purple umbrellas."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, spoken):
    """Packed, to validate on: a sentence, and its first half."""
    folder = tmp_path_factory.mktemp("packed")
    waves = {"train": spoken, "whole": spoken, "half": spoken[: len(spoken) // 2]}
    clips = []
    for name, wave in waves.items():
        path = str(folder / f"{name}.wav")
        audio.save_wav(path, wave, MEL.sample_rate)
        split = "train" if name == "train" else "val"
        clips.append(Clip(name, TEXT, split, path))
    shards.pack(folder, {"name": "halves"}, clips, [], dataclasses.asdict(MEL), read, 1)
    return folder


def read(clip: Clip) -> np.ndarray:
    wave = audio.load_wav(clip.wav, MEL.sample_rate)
    return audio.log_mel(wave, MEL).numpy().astype(np.float16)


def test_what_is_measured_as_griffinlim_is_what_the_product_does(spoken):
    log_mel = audio.log_mel(spoken, MEL)
    way = next(way for way in sound.WAYS if "griffinlim" in way.name)
    assert torch.equal(sound.vocode(way, log_mel, MEL), audio.griffin_lim(log_mel, MEL))


def test_the_table_puts_each_way_beside_the_recordings(corpus, random_whisper, capsys):
    """And ours is nearer to them than the way with both of its parts replaced, and that than chance."""
    for judge in ("pystoi", "pesq"):
        pytest.importorskip(judge)
    words = (f"--data_dir={corpus}", f"--recogniser={random_whisper}", "--heard=1")
    call(sound, *words, "--only=griffinlim,from chance: 0,from chance: 32,torchaudio")
    text = capsys.readouterr().out
    assert text.startswith("2 recordings, ") and "WER of 1 of them" in text
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(sound.COLUMNS):
            found[cells[0]] = dict(zip(sound.COLUMNS, cells))
    for way, row in found.items():
        found[way] = row["ESTOI"], row["PESQ"], row["distance, dB"]
    assert found["the recordings"] == ("1.000", "4.64", "0.00")
    ours = found["griffinlim: 32 iterations"]
    former = found["magnitudes stay, phases from chance: 32 iterations"]
    chance = found["magnitudes stay, phases from chance: 0 iterations"]
    for n, better in enumerate((1, 1, -1)):
        assert better * float(ours[n]) > better * float(former[n]) > better * float(chance[n])
    assert sound.REFERENCE in found and len(found) == 7  # with the head and the line below it


def test_a_corpus_without_recordings_and_a_missing_judge_are_said_in_a_line(corpus, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    assert "pesq is not installed: pip install pystoi pesq" in refusal(sound, f"--data_dir={corpus}")
    monkeypatch.setattr(sound, "import_judges", lambda: None)
    no_recording = refusal(sound, f"--data_dir={corpus}", "--split=test")
    assert "no recording of eval.split test" in no_recording
