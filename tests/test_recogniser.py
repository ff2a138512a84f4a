"""What listens: the tiny Whisper that is shipped hears words, not a grammar; what cannot be loaded is said in one line."""

import csv
import pickle
import random
from pathlib import Path

import pytest
import torch
import whisper

import audio
import data
import metric
import recogniser
from config import Mel, UserError

CPU, MEL = torch.device("cpu"), Mel()


@pytest.fixture(scope="module")
def listener():
    return recogniser.load(str(recogniser.TINY), CPU)


def wer(listener, texts: list[str], vocoded: bool) -> float:
    waves = [audio.espeak(text, MEL.sample_rate) for text in texts]
    if vocoded:
        waves = [audio.griffin_lim(audio.log_mel(wave, MEL), MEL) for wave in waves]
    heard = listener.transcribe(waves, MEL.sample_rate)
    return metric.word_error_rate([(recogniser.normalise(t), recogniser.normalise(h)) for t, h in zip(texts, heard, strict=True)])


def test_what_is_shipped_is_small_and_a_whisper_of_its_own_format():
    assert recogniser.TINY.stat().st_size <= 8e6
    model = whisper.load_model(str(recogniser.TINY), device="cpu")
    assert (model.dims.n_vocab, model.dims.n_audio_ctx, model.is_multilingual) == (51864, 1500, False)


@pytest.mark.parametrize("vocoded", [False, True], ids=["spoken", "vocoded"])
def test_sentences_that_nobody_trained_on_are_understood(listener, vocoded):
    assert wer(listener, data.distinct_sentences("matrix", 16, held_out=True), vocoded) <= 0.05


def test_words_in_random_order_are_heard_as_they_are(listener):
    """Whoever knows a grammar and does not listen would have almost every word wrong here."""
    rng = random.Random("test salad")
    assert wer(listener, [recogniser.salad(rng) for _ in range(16)], vocoded=False) <= 0.10


def test_silence_and_a_click_are_survived(listener):
    assert len(listener.transcribe([torch.zeros(22050), torch.ones(1)], 22050)) == 2 and listener.transcribe([], 22050) == []


def test_a_batch_is_heard_as_each_alone(listener):
    waves = [audio.espeak(text, MEL.sample_rate) for text in data.distinct_sentences("matrix", 3, held_out=True)]
    assert listener.transcribe(waves, 22050) == [listener.transcribe([wave], 22050)[0] for wave in waves]


# Names and files

def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="'bse.en' is neither.*base.en"):
        recogniser.load("bse.en", CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/x.pt: no such file"):
        recogniser.load(str(tmp_path / "x.pt"), CPU)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "truncated", "torch"])
def test_a_file_that_is_no_whisper_checkpoint_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save([1, 2], path)
    path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps({"dims": {}}), "torch": path.read_bytes(),
                      "truncated": recogniser.TINY.read_bytes()[:100_000]}[content])
    with pytest.raises(UserError, match=f"^{path}: not a Whisper checkpoint") as e:
        recogniser.load(str(path), CPU)
    assert "\n" not in str(e.value)


def test_a_model_that_cannot_be_downloaded_is_replaced_with_one_line(monkeypatch, tmp_path, capsys):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                 # nobody listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))                # where openai-whisper keeps what it has
    assert recogniser.load("base.en", CPU).name == "whisper-demo"
    line, = capsys.readouterr().out.splitlines()
    assert "base.en cannot be downloaded" in line and "whisper-demo.pt listens instead" in line


# Real voices

def test_pocketsphinx_hears_a_real_recording(recordings):
    pytest.importorskip("pocketsphinx")
    name, _, text = next(csv.reader(open(recordings / "metadata.csv", encoding="utf-8"), delimiter="|", quoting=csv.QUOTE_NONE))
    listener = recogniser.load("pocketsphinx", CPU)
    wave = audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050)
    heard, silence = listener.transcribe([wave, torch.zeros(22050)], 22050)
    assert metric.word_error_rate([(recogniser.normalise(text), recogniser.normalise(heard))]) < 0.6
    assert listener.name == "pocketsphinx" and isinstance(silence, str)
