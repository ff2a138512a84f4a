"""When words are spoken: found by Whisper's attention, and measured on sounds of which it is known."""

import pytest
import torch

from config import UserError
from corpora import demo, espeak
from klein import segment
from pretrained import asr

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
        wave = espeak.speak(phrase, 16000, rate=140)
        loud = (wave.abs() > 0.01).nonzero()
        start = sum(map(len, parts))
        parts += [wave[loud[0] : loud[-1] + 1], pause]
        truth.append((start / 16000, sum(map(len, parts[:-1])) / 16000))
    words = iter(segment.align_text(tiny_en.model, " ".join(phrases), torch.cat(parts), 16000))
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
        wave, rest = espeak.speak(text, 16000), espeak.speak(text.rsplit(" ", 1)[0], 16000)
        found = segment.align_text(tiny_en.model, text, wave, 16000)
        assert [word for word, _, _ in found] == text.split()
        errors.append(abs(found[-1][1] - len(rest) / 16000))
    assert sorted(errors)[2] < 0.1


def test_what_whisper_cannot_take_in_is_an_error(random_whisper):
    listener = asr.load(str(random_whisper), torch.device("cpu"))
    for text, seconds in (("", 1), ("too long", 31), ("so many words " * 40, 1)):
        with pytest.raises(UserError, match="cannot align"):
            segment.align_text(listener.model, text, torch.rand(16000 * seconds), 16000)
