"""config.py and the classes of all systems: what is accepted, what is refused and in which words; the
recipes.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import entry
import system
from config import TTSConfig, UserError

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CLASSES = {name: system.find(name).config_class for name in system.SYSTEMS}


def needs(name: str):
    """A mark for what is tested of a further system: skipped where that was deleted."""
    return pytest.mark.skipif(name not in CLASSES, reason=f"no system {name}")


def load_text(tmp_path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return system.load_config(str(path), list(overrides))


def load_words(*words: str) -> config.Config:
    return system.load_config("", list(words))


def refusal(call, *arguments) -> str:
    """The message of the UserError that the call raises: always one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Defaults, files, words


def test_no_file_and_no_override_gives_text_to_speech():
    assert system.load_config() == TTSConfig()


@pytest.mark.parametrize("name", CLASSES)
def test_the_system_picks_the_class(name, tmp_path):
    assert (
        type(load_words("--system", name)) is type(load_text(tmp_path, f"system: {name}\n")) is CLASSES[name]
    )


def test_a_system_that_there_is_not_is_refused_with_the_nearest_one(tmp_path):
    assert refusal(load_words, "--system=tss").endswith("got 'tss'; did you mean tts?")
    assert "system must be one of tts, " in refusal(load_text, tmp_path, "system: [tts]\n")


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_pass_every_check_and_a_section_is_its_class_default(name):
    cls = CLASSES[name]
    assert config.from_dict(cls, config.to_dict(cls())) == cls()
    for f in dataclasses.fields(cls):
        value = getattr(cls(), f.name)
        if dataclasses.is_dataclass(value):
            assert value == type(value)() and f.type is type(value), (
                "else a file that gives one key of it loses the others"
            )


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    loaded = load_text(tmp_path, "train:\n  lr: 1e-4\n  steps: 7\n", "--lr", "0.5")
    train = loaded.train
    assert (train.lr, train.steps, train.global_batch) == (0.5, 7, config.Train.global_batch)


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    message = refusal(load_text, tmp_path, "sample:\n  cfg_scal: 3\n")
    assert "recipe.yaml" in message and "did you mean sample.cfg_scale?" in message
    assert "did you mean batch_size?" in refusal(load_words, "--batchsize", "3")
    assert "did you mean train.steps?" in refusal(load_words, "--train.step", "3")
    assert "did you mean" not in refusal(load_words, "--qqqqqqqq", "3")


def test_a_key_of_another_system_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(system.SYSTEMS, "toy", "toy.system:Toy")
    assert refusal(load_words, "--hertz=3") == "--hertz: system tts has no such key; toy has"
    assert refusal(load_text, tmp_path, "hertz: 3\n").endswith(
        "recipe.yaml: hertz: system tts has no such key; toy has"
    )
    said = refusal(load_words, "--model.text=phonemes", "--system=toy")
    assert said == "--model.text: system toy has no such key; tts has"


@needs("spectrogram")
@needs("music")
@needs("speech_image")
def test_a_section_of_another_system_is_refused_with_those_that_have_it(tmp_path):
    assert refusal(load_words, "--music.size=small") == "--music.size: system tts has no such key; music has"
    said = refusal(load_words, "--system=music", "--canvas-width=16")
    assert said == "--canvas-width: system music has no such key; spectrogram has"
    said = refusal(load_text, tmp_path, "sample: {truncation: 1}\n")
    assert said.endswith("recipe.yaml: sample.truncation: system tts has no such key; speech_image has")
    said = refusal(load_text, tmp_path, "codes: {kept: 3}\n")
    assert said.endswith("codes: system tts has no such key; speech_image has")
    assert refusal(load_words, "--vocoder=own", "--system=speech_align").endswith("tts, music have")


@pytest.mark.parametrize("word", ["--batch_size", "--batch-size", "--train.batch_size", "--train.batch-size"])
def test_a_bare_name_is_enough_and_dashes_are_underscores(word):
    assert load_words(word, "3").train.batch_size == 3
    assert load_words(f"{word}=3").train.batch_size == 3


@pytest.mark.parametrize("name", CLASSES)
def test_every_knob_is_found_by_its_full_name(name):
    keys = config.keys(CLASSES[name])
    assert len(set(keys)) == len(keys) > 40
    assert all(config.find_key(CLASSES[name], key) == key for key in keys)


def test_a_bare_name_of_two_knobs_is_refused():
    @config.section
    class Rates(config.Config):
        mel: config.Mel = config.Mel()
        picture: config.Mel = config.Mel()

    assert refusal(config.find_key, Rates, "hop") == "--hop is ambiguous: --mel.hop or --picture.hop"


# Types, bounds, choices


@pytest.mark.parametrize(
    "text, kind",
    [
        ("train: {lr: fast}", "float"),
        ("train: {steps: 1.5}", "int"),
        ("train: {steps: 1e6}", "int"),
        ("train: {steps: true}", "int"),
        ("train: {steps: '7'}", "int"),
        ("train: {steps: yes}", "int"),
        ("train: {compile: 1}", "bool"),
        ("train: {compile: 'true'}", "bool"),
        ("train: {lr: true}", "float"),
        ("data: {data_dir: [a]}", "str"),
        ("data: {data_dir: }", "str"),
        ("train: {lr: }", "float"),
    ],
)
def test_a_wrong_type_is_refused(tmp_path, text, kind):
    message = refusal(load_text, tmp_path, text)
    assert "recipe.yaml" in message and f"must be {kind}" in message


def test_phonemes_are_for_a_text_encoder_that_is_trained_along():
    assert load_words("--model.text=phonemes", "--text_encoder=scratch").model.text == "phonemes"
    assert "model.text phonemes: only model.text_encoder scratch" in refusal(
        load_words, "--model.text=phonemes"
    )


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("expect: {eval/wer: 0.1}", "a bound is at most or at least, and a number"),
        ("expect: {eval/wer: below 0.1}", "a bound is at most"),
        ("expect: {eval/wer: at most a}", "a bound is at most"),
        ("expect: 0.1", "expect must be a table, {eval/wer: at most 0.1}"),
    ],
)
def test_an_expectation_is_a_figure_and_a_bound(tmp_path, text, complaint):
    assert load_text(tmp_path, "expect: {eval/wer: at most 0.1, eval/mcd: at least 3}").expect == {
        "eval/wer": "at most 0.1",
        "eval/mcd": "at least 3",
    }
    assert complaint in refusal(load_text, tmp_path, text)


def test_a_section_must_be_a_section(tmp_path):
    assert "train is a section" in refusal(load_text, tmp_path, "train: 3")
    assert load_text(tmp_path, "train:\n") == TTSConfig()


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", ".001", "1E-3", "+1e-3"])
def test_numbers_are_read_however_they_are_written(tmp_path, number):
    assert (
        load_text(tmp_path, f"train: {{lr: {number}}}").train.lr
        == load_words("--lr", number).train.lr
        == 0.001
    )


def test_a_whole_number_is_a_float_where_one_is_due():
    loaded = load_words("--cfg_scale", "3")
    assert loaded.sample.cfg_scale == 3.0 and type(loaded.sample.cfg_scale) is float


@needs("speech_align")
def test_a_list_is_read_where_one_is_due_and_its_words_are_a_choice(tmp_path):
    assert load_text(tmp_path, "system: speech_align\ndata: {langs: [en, ar]}").data.langs == ("en", "ar")
    for words in ("[]", "en", "[fr]", "[1]"):
        assert "data.langs must be a list of en and ar" in refusal(
            load_words, "--system=speech_align", f"--langs={words}"
        )


def test_quotes_around_a_value_change_nothing(tmp_path):
    assert load_text(tmp_path, 'train:\n  dtype: "fp32"\n') == load_text(tmp_path, "train:\n  dtype: fp32\n")
    assert load_text(tmp_path, 'train:\n  dtype: "bf16"\n').train.dtype == "bf16"


def test_a_tilde_is_the_home_folder_in_every_text_of_a_yaml_and_of_a_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    config = load_text(tmp_path, "out_dir: ~/run\ndata:\n  data_dir: ~/corpus\n  voice: ~/v.onnx@1.2\n")
    assert (config.out_dir, config.data.data_dir) == ("/home/anna/run", "/home/anna/corpus")
    assert config.data.voice == "/home/anna/v.onnx@1.2"
    assert load_words("--prompts=~/p.txt").eval.prompts == "/home/anna/p.txt"
    assert load_words("--out_dir=a~b/~").out_dir == "a~b/~"


def test_a_tilde_is_the_home_folder_in_the_name_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("out_dir: here\n")
    assert system.config_from_command_line(["--config=~/x.yaml"]).out_dir == "here"


def test_a_number_is_a_name_where_one_is_due(tmp_path):
    assert load_text(tmp_path, "out_dir: 7\n").out_dir == load_words("--out_dir=7").out_dir == "7"


@pytest.mark.parametrize(
    "word, complaint",
    [("nan", "finite"), (".nan", "finite"), ("inf", "finite"), ("-.inf", "finite"), ("-1", "negative")],
)
def test_numbers_out_of_bounds_are_refused(word, complaint):
    assert complaint in refusal(load_words, "--lr", word)


def test_zero_is_refused_where_it_means_nothing():
    assert "global_batch must be positive" in refusal(load_words, "--global_batch", "0")
    assert load_words("--warmup", "0").train.warmup == 0


def test_a_share_above_1_is_refused():
    assert (
        refusal(load_words, "--silence_prob=2")
        == "--silence_prob: data.silence_prob must be at most 1, got 2"
    )


def test_a_choice_is_refused_with_the_nearest_one():
    assert refusal(load_words, "--schedule", "cosin").endswith("did you mean cosine?")
    assert refusal(load_words, "--corpus", "libri").endswith("did you mean librispeech?")


@pytest.mark.parametrize(
    "overrides",
    [
        ["--width", "100"],
        ["--frame_stack", "3"],
        ["--conv_kernel", "4"],
        ["--cross_attention", "false", "--upsample_text", "false"],
        ["--tempo_jitter", "1"],
        ["--silence_prob", "2"],
        ["--ema", "1"],
        ["--cfg_from", "0.5", "--cfg_to", "0.4"],
        ["--sway", "-1.5"],
        ["--fmax", "20000"],
        ["--hop", "2048"],
        pytest.param(["--system=spectrogram", "--canvas_width=304"], marks=needs("spectrogram")),
        pytest.param(["--system=spectrogram", "--canvas_height=700"], marks=needs("spectrogram")),
        pytest.param(["--system=spectrogram", "--hop=513"], marks=needs("spectrogram")),
        pytest.param(["--system=spectrogram", "--prompt=hm"], marks=needs("spectrogram")),
        pytest.param(
            ["--system=spectrogram", "--base=scratch", "--double_layers=8"], marks=needs("spectrogram")
        ),
        pytest.param(["--system=music", "--mel.hop=128"], marks=needs("music")),
        pytest.param(["--system=music", "--crop_seconds=1.3"], marks=needs("music")),
        pytest.param(["--system=music", "--vocoder=mine"], marks=needs("music")),
        pytest.param(["--system=music", "--autoencoder=patches"], marks=needs("music")),
        pytest.param(["--system=music", "--weights=x.pt", "--predict=x"], marks=needs("music")),
        pytest.param(["--system=speech_image", "--kept=32768"], marks=needs("speech_image")),
        pytest.param(["--system=speech_image", "--mask_share=1"], marks=needs("speech_image")),
        pytest.param(["--system=speech_image", "--truncation=1.1"], marks=needs("speech_image")),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides):
    refusal(load_words, *overrides)


# What a user may type


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["steps", "3"], "'steps': expected --key value"),
        (["--steps"], "--steps: its value is missing"),
        (["--", "3"], "unknown key"),
    ],
)
def test_a_malformed_command_line_is_refused(overrides, complaint):
    assert complaint in refusal(load_words, *overrides)


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = str(tmp_path / "absent.yaml")
    assert refusal(system.load_config, path).startswith(f"{path}: cannot be read")
    assert refusal(system.load_config, str(tmp_path)).startswith(f"{tmp_path}: cannot be read")


@pytest.mark.parametrize(
    "text",
    ["train: [", "a: b: c", "train:\n\tlr: 1\n", "- a\n- b\n", "words\n", "\x00", "train: {lr: 1, lr: 2}"]
    # what PyYAML fails on with errors of Python's own
    + ["[" * 500, "seed: 2001-99-99", "seed: 0b_", "seed: !!map [a]", f"seed: {'9' * 5000}"],
    ids=lambda text: ascii(text)[:20],
)
def test_broken_yaml_is_refused_by_name(tmp_path, text):
    assert "recipe.yaml: " in refusal(load_text, tmp_path, text)


@pytest.mark.parametrize("word", ["[" * 500, "2001-99-99", "9" * 5000], ids=lambda word: word[:10])
def test_a_word_that_yaml_fails_on_is_refused_as_the_text_that_it_is(word):
    assert "--seed: seed must be int" in refusal(load_words, "--seed", word)


@pytest.mark.parametrize("key", ["seed", "train", "system", "expect"])
def test_a_few_words_that_mean_a_billion_entries_are_refused_in_a_few_words(tmp_path, key):
    lines = ["- &a0 [x, x]"]
    for n in range(1, 30):
        lines.append(f"- &a{n} [*a{n - 1}, *a{n - 1}]")
    entries = "".join(f"    {line}\n" for line in lines)
    opening = "expect:\n  x:\n" if key == "expect" else f"{key}:\n"
    said = refusal(load_text, tmp_path, opening + entries)
    assert key in said and len(said) < 1000


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_text(tmp_path, "# nothing\n") == TTSConfig()


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TTSConfig().seed = 2


def test_an_error_of_the_user_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        entry.run_main(lambda: load_words("--lr", "fast"))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1


def test_an_error_is_one_line_whatever_is_quoted_in_it(capsys):
    def fail() -> None:
        raise UserError("a file\nof two\x1b[2J lines\u2028" + "x" * 10**6)

    with pytest.raises(SystemExit):
        entry.run_main(fail)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("x\n") and len(said) < 1100
    assert said.startswith("error: a file\\nof two\\x1b[2J lines\\u2028xxx")


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: bytes(2**50)])
def test_too_little_memory_is_one_line_and_exit_code_2(capsys, fail):
    with pytest.raises(SystemExit) as caught:
        entry.run_main(fail)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: not enough memory") and said.count("\n") == 1


@pytest.mark.parametrize("name", CLASSES)
def test_help_lists_every_knob_with_its_comment_and_default(name):
    said = system.describe_knobs(["--help", "--system", name])
    assert [key for key in config.keys(CLASSES[name]) if f"  --{key} " not in said] == []
    assert "clips a rank and micro-step" in said and "cosine | trapezoid [cosine]" in said
    assert max(map(len, said.splitlines())) <= 110
    assert ("pad_multiple" in said) == (name in ("tts", "speech_align"))


def test_help_shows_the_values_that_a_command_line_gives():
    said = system.describe_knobs(["--config", str(ROOT / "configs" / "demo.yaml"), "--help", "--lr=0.5"])
    recipe = system.load_config(str(ROOT / "configs" / "demo.yaml"))
    assert f"[{recipe.out_dir}]" in said and f"[{recipe.train.steps}]  updates" in said
    assert "float, at least 0 [0.5]  everything else, by AdamW" in said
    assert '  --wandb_url                     text [""]  a W&B server' in said


def test_help_tells_what_stands_above_a_field_beside_it_and_above_that_of_its_base():
    assert config.comments(TTSConfig)["out_dir"] == "of the run: checkpoints, metrics, samples"
    assert config.comments(config.Mel)["centred"].startswith("frame m stands")
    assert config.comments(TTSConfig)["data"] == ""


# Checkpoints


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_survives_being_stored_in_a_checkpoint(name):
    changed = load_words("--system", name, "--lr", "0.5", "--out_dir", "out/x", "--compile", "true")
    stored = config.to_dict(changed)
    assert config.from_checkpoint(CLASSES[name], stored, "x.pt") == changed
    assert config.from_dict(CLASSES[name], json.loads(json.dumps(stored))) == changed
    stored["train"]["old"] = 1
    assert refusal(config.from_checkpoint, CLASSES[name], stored, "x.pt").startswith(
        "x.pt: unknown key train.old; did you mean"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_that_holds_all_systems_sections_loads_as_its_own_alone(name):
    """As all did up to November 2026: the sections and keys of every system, whichever it was."""
    former = json.loads((ROOT / "tests" / "former_config.json").read_text())
    train = config.Train(batch_size=16)  # a rank's, whatever all made together: so it goes on
    data = config.TTSData(workers=2)
    model = config.TTSModel(alignment="learned")  # whose network it is
    loaded = config.from_checkpoint(TTSConfig, former, "x.pt")
    assert loaded == TTSConfig(data=data, model=model, train=train)
    for key, value in config.to_dict(CLASSES[name]()).items():
        former[key] = {**former[key], **value} if isinstance(value, dict) else value
    assert config.from_checkpoint(CLASSES[name], former, "x.pt") == CLASSES[name]()
    assert "unknown key" in refusal(config.from_dict, CLASSES[name], former, "x.pt")
    for key in ("karaoke", "eval.karaoke"):
        section, _, knob = key.rpartition(".")
        damaged = {**former, section: {**former[section], knob: 1}} if section else {**former, key: 1}
        assert f"x.pt: unknown key {key}" in refusal(config.from_checkpoint, CLASSES[name], damaged, "x.pt")


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_opens_with_a_comment(path):
    system.load_config(str(path))
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_only_what_differs_from_the_defaults(path):
    recipe = system.load_config(str(path))
    loaded, default = flat(config.to_dict(recipe)), flat(config.to_dict(type(recipe)()))
    said = flat(config.read_yaml(str(path)))
    assert not [key for key in said if loaded[key] == default.get(key) and key != "system"]


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


# Running


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_letter_that_the_output_lacks_ends_nothing_here_or_in_a_process_that_packs(encoding):
    code = "import subprocess, sys, entry; entry.run_main(lambda: (print('Ωµ', flush=True), {}))"
    inner = """subprocess.run([sys.executable, "-c", "print('Ωµ')"], check=True)"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(inner)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
        capture_output=True,
    )
    printed = "Ωµ".encode(encoding, "backslashreplace")
    assert done.returncode == 0 and done.stdout.split() == [printed, printed]
