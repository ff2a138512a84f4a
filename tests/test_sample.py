"""Speaking: one text or many, long texts, seeds, and one line for whatever cannot be spoken."""

import pickle
import random

import pytest
import soundfile
import torch
from conftest import call, finish, options, start

import evaluator
import sample
from text import normalize
from tracking import checkpoint
from tts import TextToSpeech

LONG = (
    "Dr. Watson met Mr. J. R. Smith at half past nine. Had he slept? No! The U.S. ambassador, who had come "
    "by an earlier train, waited in the hall with a very long letter that nobody was going to read; it spoke "
    "of hats, of baskets, of the weather in the north and of the weather in the south, and of nothing else "
    "at all, as such letters often do when they are long… So it was."
)
LONGEST = TextToSpeech.max_characters


@pytest.fixture
def speak(run, tmp_path):
    """A function that runs sample.py on the trained run; returns the wavs made, by name."""

    def spoken(*words: str, **knobs) -> dict:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        call(sample, f"--ckpt={run}", f"--out={folder / 'x.wav'}", *words, *options(knobs))
        return {path.stem: soundfile.read(path) for path in sorted(folder.glob("*.wav"))}

    return spoken


def split(typed: str) -> list[str]:
    """As `sample.main` does."""
    return sample.split_text(normalize(typed), LONGEST)


def seconds(sound) -> float:
    return len(sound[0]) / sound[1]


def test_one_text_is_one_wav_and_its_pictures_where_asked(run, tmp_path):
    wav = tmp_path / "new" / "x.wav"
    out = finish(
        start(
            "sample.py",
            f"--ckpt={run}",
            "--text",
            "Anna bought two green baskets.",
            "--out",
            str(wav),
            "--png",
        )
    )
    wave, rate = soundfile.read(wav)
    assert (
        out
        == f"{wav}  {len(wave) / rate:.2f} s\n{wav.with_suffix('.png')}, {wav.with_name('x.attention.png')}\n"
    )
    assert rate == 22050 and 1 < len(wave) / rate < 4 and wave.std() > 1e-3
    assert {path.name for path in wav.parent.iterdir()} == {"x.wav", "x.png", "x.attention.png"}
    assert wav.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_tilde_is_the_home_folder_in_every_path_that_is_typed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "prompts.txt").write_text("A hat.\n")
    call(sample, "--ckpt=~/run", "--prompt_file=~/prompts.txt", "--out=~/new/x.wav")
    assert (tmp_path / "new/x.wav").exists() and not (tmp_path / "~").exists()


def test_several_texts_and_a_prompt_file_are_numbered_and_each_is_as_alone(speak, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffTwo hats.\n\nA much longer sentence about twenty hats.\n")
    made = speak("--text=Hello.", f"--prompt_file={tmp_path / 'prompts.txt'}")
    assert list(made) == ["x-0", "x-1", "x-2"] and seconds(made["x-0"]) < seconds(made["x-1"]) < seconds(
        made["x-2"]
    )
    alone = speak("--text=Two hats.")["x"][0]
    assert len(alone) == len(made["x-1"][0]) and abs(alone - made["x-1"][0]).max() < 0.02


def test_without_a_name_nothing_that_is_there_is_overwritten(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.wav").write_text("mine")
    (tmp_path / "sample_2.attention.png").touch()
    for _ in range(2):
        call(sample, f"--ckpt={run}", "--text=Hello.")
    made = ["sample.wav", "sample_2.attention.png", "sample_3.wav", "sample_4.wav"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert (tmp_path / "sample.wav").read_text() == "mine"


def test_a_seed_is_a_wave(speak):
    one, same, other = (speak("--text=Hello there.", seed=seed)["x"][0] for seed in (5, 5, 6))
    assert (one == same).all() and (one != other).any()


def test_steps_and_guidance_are_heard(speak):
    plain = speak("--text=Hello there.")["x"][0]
    finer = speak("--text=Hello there.", euler_steps=5)["x"][0]
    guided = speak("--text=Hello there.", cfg_scale=1.0)["x"][0]
    assert (plain != finer).any() and (plain != guided).any()


def test_the_length_is_what_was_asked_for(speak):
    assert seconds(speak("--text=Hello there.", seconds=1.5)["x"]) == pytest.approx(1.5, abs=0.02)


def test_a_long_text_is_its_sentences_with_pauses_between(speak):
    texts = split(LONG)
    whole, parts = speak(f"--text={LONG}")["x"], speak(*(f"--text={sentence}" for sentence in texts))
    assert len(parts) == len(texts) == 6
    assert seconds(whole) == pytest.approx(
        sum(map(seconds, parts.values())) + (len(texts) - 1) * sample.PAUSE_SEC, abs=0.01
    )
    asked = seconds(speak(f"--text={LONG}", seconds=6)["x"])
    assert asked == pytest.approx(6 + (len(texts) - 1) * sample.PAUSE_SEC, abs=0.1)


# Splitting


def test_sentences_end_at_their_marks_but_not_after_abbreviations_and_numbers():
    assert split("Go! Why? Yes.") == ["Go!", "Why?", "Yes."]
    assert split("Dr. Jones met J. K. Poe at No. 5. He left.") == [
        "Doctor Jones met J. K. Poe at Number five.",
        "He left.",
    ]
    assert split("It rose by 3.5 per cent.") == ["It rose by three point five per cent."]
    assert split("At 3 p.m. Prof. Li of the U.S. Army spoke. 5 left, e.g. Mrs. Poe.") == [
        "At three p.m. Professor Li of the U.S. Army spoke.",
        "Five left, for example Missus Poe.",
    ]


def test_no_piece_is_longer_than_can_be_spoken_however_short_it_was_typed():
    parts = split("$1,234,567.89 & " * 40 + "10.")
    assert len(parts) > 20 and max(map(len, parts)) <= LONGEST


def test_what_is_typed_in_figures_is_spoken_as_its_words(speak):
    typed = speak("--text=It's 3 p.m. & 20°C.")["x"][0]
    words = speak("--text=It's three p.m. and twenty degrees Celsius.")["x"][0]
    assert (typed == words).all()


def test_a_sentence_that_is_too_long_is_cut_at_commas_first_and_then_between_words():
    phrase = "and so he went on and on"
    commas = split(", ".join([phrase] * 12) + ".")
    assert all(part[-1] in ",." for part in commas) and max(map(len, commas)) <= LONGEST
    words = split(" ".join([phrase] * 12) + ".")
    assert len(words) == 2 and len(words[0]) > LONGEST - len("went ")


def test_splitting_loses_no_word():
    rng = random.Random(0)
    for _ in range(200):
        words = ["".join(rng.choices("abcdeABC", k=rng.randint(1, 12))) for _ in range(rng.randint(1, 150))]
        typed = " ".join(word + rng.choice(["", "", "", ",", ".", "!", "?", "…", ";"]) for word in words)
        parts = sample.split_text(typed, LONGEST)
        assert " ".join(parts) == typed and all(0 < len(part) <= LONGEST for part in parts)


# Bad input


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "nothing to say"),
        (" \n ", "nothing to say"),
        ("?! ...", "nothing to say"),
        ("😀", "cannot be spoken"),
        ("A smile 😀 here.", "'😀'"),
        ("👩‍🚀", "cannot be spoken"),
        ("Hello\x07.", "cannot be spoken"),
        ("\udce4", "cannot be spoken"),
        ("word " * 2000, "9999 characters"),
        ("x" * 300, "a word of 300 characters"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_what_cannot_be_spoken_is_said_in_one_line(run, refusal, text, complaint):
    line = refusal(sample, f"--ckpt={run}", f"--text={text}")
    assert complaint in line and len(line) < 200


def test_one_bad_text_of_several_stops_before_anything_is_spoken(run, refusal, tmp_path):
    refusal(sample, f"--ckpt={run}", "--text=Hello.", "--text=😀", f"--out={tmp_path / 'x.wav'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, knob",
    [
        ("--euler_steps=0", "sample.euler_steps"),
        ("--cfg_scale=nan", "sample.cfg_scale"),
        ("--cfg_scale=-1", "sample.cfg_scale"),
    ],
)
def test_settings_are_checked_as_in_a_config(run, refusal, words, knob):
    assert knob in refusal(sample, f"--ckpt={run}", "--text=Hello.", words)


def test_steps_of_training_are_refused_where_those_of_sampling_are_meant(run, refusal):
    for words in (["--steps=5"], ["--steps", "5"]):
        assert "--euler_steps" in refusal(sample, f"--ckpt={run}", "--text=Hello.", *words)
    assert "--euler_steps" in refusal(sample, "--config=configs/demo.yaml", "--text=Hello.", "--steps=5")


@pytest.mark.parametrize("words", [["--seeds=x"], ["--device=tpu"], ["--text"]])
def test_an_option_of_another_kind_is_refused_in_one_line(refusal, words):
    assert f"argument {words[0].split('=')[0]}: " in refusal(sample, *words)


def test_no_text_at_all_is_an_error(run, refusal):
    assert "--text or --prompt_file" in refusal(sample, f"--ckpt={run}")


def test_a_checkpoint_or_a_recipe_is_needed_and_not_both(run, refusal):
    for words in ((), (f"--ckpt={run}", f"--config={run / 'config.yaml'}")):
        assert "one of the two" in refusal(sample, "--text=Hello.", *words)


def test_a_lora_for_a_system_that_takes_none_is_an_error(run, refusal):
    assert "--lora someone/lora" in refusal(sample, f"--ckpt={run}", "--text=Hello.", "--lora=someone/lora")


def test_a_checkpoint_that_is_none_is_an_error(refusal, run, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x04N.")
    assert f"{tmp_path / 'x.pt'}: not a" in refusal(sample, f"--ckpt={tmp_path / 'x.pt'}", "--text=Hello.")
    assert f"{tmp_path / 'y.pt'}: no such checkpoint" in refusal(
        sample, f"--ckpt={tmp_path / 'y.pt'}", "--text=Hello."
    )
    assert "nobody/no-such-vocoder" in refusal(
        sample, f"--ckpt={run}", "--text=Hello.", "--vocoder=nobody/no-such-vocoder"
    )


@pytest.mark.parametrize("part", ["text.", "decoder."])
def test_weights_that_are_no_numbers_are_an_error_and_nothing_is_written(run, refusal, tmp_path, part):
    state = torch.load(checkpoint.newest_checkpoint(run), weights_only=True)
    for name, weight in state["ema"].items():
        if name.startswith(part):
            weight.fill_(torch.nan)
    torch.save(state, tmp_path / "x.pt")
    said = refusal(sample, f"--ckpt={tmp_path / 'x.pt'}", "--text=Hello.", f"--out={tmp_path / 'x.wav'}")
    assert "not finite" in said and not (tmp_path / "x.wav").exists()
    assert "not finite" in refusal(evaluator, f"--ckpt={tmp_path / 'x.pt'}", f"--out_dir={tmp_path}")


@pytest.mark.parametrize("out", ["x.txt", "x", "x.mp3", "taken/x.wav"])
def test_an_output_that_cannot_be_written_is_an_error(run, refusal, tmp_path, out):
    (tmp_path / "taken").touch()
    assert str(tmp_path / out) in refusal(sample, f"--ckpt={run}", "--text=Hello.", f"--out={tmp_path / out}")


def test_real_processes_end_with_code_2_and_one_line(run, tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"model": [1, 2]}))
    for process in (
        start("sample.py", f"--ckpt={run}", "--text=😀"),
        start("sample.py", f"--ckpt={tmp_path / 'x.pt'}", "--text=Hello."),
    ):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (
            err
        )
