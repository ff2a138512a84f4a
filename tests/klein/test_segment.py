"""When words are spoken, on bursts of noise whose times are known; and cutting against brute force."""

import dataclasses
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
import whisper

import audio
import system
from config import UserError
from corpora import demo, shards, voice
from klein import segment

# Words in time


def speak_with_pauses(
    words: list[str], pauses: list[float]
) -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """Words as bursts of noise of 0.2 to 0.5 s at 16 kHz, `pauses[n]` seconds of faint noise before word n;
    the wave, and the truth.
    """
    rng, parts, truth = torch.Generator().manual_seed(0), [], []
    for word, pause in zip(words, pauses):
        parts.append(1e-3 * torch.randn(round(pause * 16000), generator=rng))
        start = sum(map(len, parts)) / 16000
        parts.append(
            0.2 * torch.randn(int(16000 * (0.2 + 0.3 * torch.rand(1, generator=rng).item())), generator=rng)
        )
        truth.append((word, start, sum(map(len, parts)) / 16000))
    return torch.cat(parts), truth


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_pause_is_found_in_the_sound_whichever_word_it_was_given_to(side):
    rng = random.Random(1)
    wave, truth = speak_with_pauses(list("abcdefgh"), [0.3, 0, 0.2, 0.5, 0, 0.08, 0.3, 0])
    starts = [
        start if n == 0 or side == "after" else truth[n - 1][2] for n, (_, start, _) in enumerate(truth)
    ]
    found = segment.refine_boundaries(
        list("abcdefgh"), [start + rng.uniform(-0.03, 0.03) for start in starts], wave
    )
    for (word, start, stop), (true_word, true_start, true_stop) in zip(found, truth, strict=True):
        assert (
            word == true_word
            and start == pytest.approx(true_start, abs=0.04)
            and stop == pytest.approx(true_stop, abs=0.04)
        )


def test_times_are_in_order_whatever_the_attention_said():
    wave, _ = speak_with_pauses(list("abcd"), [0.1] * 4)
    for starts in ([0.5, 0.1, 9.0, 0.0], [0.0] * 4, [9.0] * 4):
        times = [
            time
            for _, start, stop in segment.refine_boundaries(list("abcd"), starts, wave)
            for time in (start, stop)
        ]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= len(wave) / 16000 + 0.01


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
        wave, rest = voice.speak_espeak(text, 16000), voice.speak_espeak(text.rsplit(" ", 1)[0], 16000)
        found = segment.align_text(tiny_en.model, text, wave, 16000)
        assert [word for word, _, _ in found] == text.split()
        errors.append(abs(found[-1][1] - len(rest) / 16000))
    assert sorted(errors)[2] < 0.1


def test_what_whisper_cannot_take_in_is_an_error(random_whisper):
    model = whisper.load_model(str(random_whisper), device="cpu")
    for text, seconds in (("", 1), ("too long", 31), ("so many words " * 40, 1)):
        with pytest.raises(UserError, match="cannot align"):
            segment.align_text(model, text, torch.rand(16000 * seconds), 16000)


def random_words(rng: random.Random, count: int) -> list[tuple[str, float, float]]:
    words, now = [], rng.random()
    for n in range(count):
        stop = now + rng.uniform(0.05, 0.7)
        words.append((f"w{n}", now, stop))
        now = stop + rng.choice((0, 0, rng.uniform(0.02, 0.8)))
    return words


@pytest.mark.parametrize("seed", range(40))
def test_cutting_loses_no_word_and_doubles_none_and_no_piece_is_too_long_or_too_short(seed):
    rng = random.Random(seed)
    words, seconds = random_words(rng, rng.randint(1, 60)), rng.uniform(2.5, 6)
    pieces = segment.segment(words, seconds)
    assert pieces or words[-1][2] - words[0][1] < 1
    assert " ".join(text for text, _, _ in pieces).split() == [word for word, _, _ in words] * bool(pieces)
    assert all(1 <= stop - start <= seconds for _, start, stop in pieces)
    assert all(stop <= start for (_, _, stop), (_, start, _) in zip(pieces, pieces[1:]))
    times = {word: (start, stop) for word, start, stop in words}
    for text, start, stop in pieces:  # never inside a word
        first, last = text.split()[0], text.split()[-1]
        assert start <= times[first][0] and times[last][1] <= stop


@pytest.mark.parametrize("seed", range(10))
def test_cutting_is_the_cheapest_of_all_ways(seed):
    rng = random.Random(seed)
    words, seconds = random_words(rng, 9), 2.5
    pieces = segment.segment(words, seconds)

    def price(cuts: tuple[int, ...]) -> float:
        return sum(1 / (words[n][1] - words[n - 1][2] + 0.02) for n in cuts)

    def fits(cuts: tuple[int, ...]) -> bool:
        edges = [0, *cuts, 9]
        for a, b in zip(edges, edges[1:]):
            before = (words[a - 1][2] + words[a][1]) / 2 if a else 0
            after = (words[b - 1][2] + words[b][1]) / 2 if b < 9 else math.inf
            if not 1 <= min(words[b - 1][2] + 0.2, after) - max(words[a][1] - 0.2, before, 0) <= seconds:
                return False
        return True

    ways = [cuts for count in range(9) for cuts in itertools.combinations(range(1, 9), count) if fits(cuts)]
    sizes = [len(text.split()) for text, _, _ in pieces]
    assert bool(pieces) == bool(ways)
    assert not ways or price(tuple(itertools.accumulate(sizes[:-1]))) == pytest.approx(min(map(price, ways)))


def test_a_word_longer_than_a_piece_may_be_cannot_be_cut():
    assert (
        segment.segment([("a", 0.0, 1.0), ("b", 1.0, 7.0), ("c", 7.0, 8.5)], 5.0)
        == []
        == segment.segment([], 5.0)
    )


def test_long_recordings_are_cut_between_words_once(tiny_en, tmp_path):
    """Longer than 2.5 s: cut by Whisper; shorter or damaged: left as they are. Nothing is timed again."""
    texts = demo.distinct_sentences("matrix", 3, held_out=True)
    clips = [shards.Clip(f"c{n}", text, "train", str(tmp_path / f"c{n}.wav")) for n, text in enumerate(texts)]
    for clip in clips[:2]:
        audio.save_wav(
            clip.wav, voice.speak_espeak(clip.text, 22050, rate=80 if clip.id == "c0" else 240), 22050
        )
    Path(clips[2].wav).write_text("no sound")
    words = ["--system=spectrogram", "--align=tiny.en", "--picture.seconds=2.5", "--device=cpu"]
    config = system.load_config("", words)
    found = segment.segment_clips(config, clips, tmp_path)
    assert [clip.id for clip in found[-2:]] == ["c1", "c2"] and len(found) > 3
    pieces = found[:-2]
    assert [clip.id for clip in pieces] == [f"c0_{n}" for n in range(len(pieces))] and {
        clip.wav for clip in pieces
    } == {clips[0].wav}
    assert [word.lower().strip(".") for clip in pieces for word in clip.text.split()] == texts[
        0
    ].lower().strip(".").split()
    assert all(
        1 <= clip.stop - clip.start <= 2.5 and clip.text[0].isupper() and clip.text[-1] == "."
        for clip in pieces
    )
    (tmp_path / "c0.wav").unlink()
    assert segment.segment_clips(config, clips, tmp_path) == found  # from words.json
    changed = [clips[0]._replace(text="Another text."), *clips[1:]]
    assert segment.segment_clips(config, changed, tmp_path)[0] == changed[0]
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, align=""))
    assert segment.segment_clips(whole, clips, tmp_path) == clips


def test_what_aligns_is_the_one_that_is_named_or_none(no_hub, tmp_path):
    for name, fault in (
        ("bse.en", "data.align 'bse.en' is neither a .pt file nor one of"),
        (f"{tmp_path}/x.pt", "data.align .*no such"),
        ("base.en", "base.en cannot be downloaded"),
    ):
        config = system.load_config("", ["--system", "spectrogram", f"--align={name}"])
        with pytest.raises(UserError, match=fault):
            segment.segment_clips(config, [shards.Clip("a", "a", "train", str(tmp_path / "a.wav"))], tmp_path)
