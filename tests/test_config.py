"""config.py: what it accepts, what it refuses and in which words, and the recipes in configs/."""

import dataclasses
from pathlib import Path

import pytest

import config
from config import UserError

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def load_text(tmp_path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(str(path), list(overrides))


def refusal(call, *arguments) -> str:
    """The message of the UserError that the call raises: always one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_and_no_override_gives_the_defaults():
    assert config.load() == config.Config()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    loaded = load_text(tmp_path, "train:\n  lr: 1e-4\n  steps: 7\n", "--lr", "0.5")
    assert (loaded.train.lr, loaded.train.steps, loaded.train.batch_size) == (0.5, 7, config.Train.batch_size)


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    message = refusal(load_text, tmp_path, "sample:\n  cfg_scal: 3\n")
    assert "recipe.yaml" in message and "did you mean sample.cfg_scale?" in message
    assert "did you mean batch_size?" in refusal(config.load, "", ["--batchsize", "3"])
    assert "did you mean train.steps?" in refusal(config.load, "", ["--train.step", "3"])
    assert "did you mean" not in refusal(config.load, "", ["--qqqqqqqq", "3"])


@pytest.mark.parametrize("word", ["--batch_size", "--batch-size", "--train.batch_size", "--train.batch-size"])
def test_a_bare_name_is_enough_and_dashes_are_underscores(word):
    assert config.load("", [word, "3"]).train.batch_size == 3
    assert config.load("", [f"{word}=3"]).train.batch_size == 3


def test_every_knob_is_found_by_its_full_name():
    assert len(set(config.keys())) == len(config.keys()) > 50
    assert all(config.find_key(name) == name for name in config.keys())


def test_a_bare_name_of_two_knobs_is_refused(monkeypatch):
    monkeypatch.setattr(config, "keys", lambda: ["mel.rate", "train.rate"])
    assert refusal(config.find_key, "rate") == "--rate is ambiguous: --mel.rate or --train.rate"


@pytest.mark.parametrize("text, kind", [
    ("train: {lr: fast}", "float"), ("train: {steps: 1.5}", "int"), ("train: {steps: 1e6}", "int"), ("train: {steps: true}", "int"),
    ("train: {steps: '7'}", "int"), ("train: {compile: 1}", "bool"), ("train: {compile: 'true'}", "bool"), ("train: {lr: true}", "float"),
    ("data: {data_dir: [a]}", "str"), ("data: {data_dir: }", "str"), ("train: {lr: }", "float")])
def test_a_wrong_type_is_refused(tmp_path, text, kind):
    message = refusal(load_text, tmp_path, text)
    assert "recipe.yaml" in message and f"must be {kind}" in message


def test_phonemes_are_for_a_text_encoder_that_is_trained_along():
    assert config.load("", ["--model.text=phonemes", "--text_encoder=scratch"]).model.text == "phonemes"
    for words in (["--model.text=phonemes"], ["--model.text=phonemes", "--text_encoder=scratch", "--system=music"]):
        assert "model.text phonemes: only system tts" in refusal(config.load, "", words)


@pytest.mark.parametrize("text, complaint", [
    ("expect: {eval/wer: 0.1}", "a bound is at most or at least, and a number"), ("expect: {eval/wer: below 0.1}", "a bound is at most"),
    ("expect: {eval/wer: at most a}", "a bound is at most"), ("expect: 0.1", "expect must be a table, {eval/wer: at most 0.1}")])
def test_an_expectation_is_a_figure_and_a_bound(tmp_path, text, complaint):
    assert load_text(tmp_path, "expect: {eval/wer: at most 0.1, eval/mcd: at least 3}").expect == {"eval/wer": "at most 0.1", "eval/mcd": "at least 3"}
    assert complaint in refusal(load_text, tmp_path, text)


def test_a_section_must_be_a_section(tmp_path):
    assert "train is a section" in refusal(load_text, tmp_path, "train: 3")


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_numbers_are_read_however_they_are_written(tmp_path, number):
    assert load_text(tmp_path, f"train: {{lr: {number}}}").train.lr == config.load("", ["--lr", number]).train.lr == 0.001


def test_a_whole_number_is_a_float_where_one_is_due():
    loaded = config.load("", ["--cfg_scale", "3"])
    assert loaded.sample.cfg_scale == 3.0 and type(loaded.sample.cfg_scale) is float


def test_quotes_around_a_value_change_nothing(tmp_path):
    assert load_text(tmp_path, 'train:\n  dtype: "fp32"\n') == load_text(tmp_path, "train:\n  dtype: fp32\n")
    assert load_text(tmp_path, 'train:\n  dtype: "bf16"\n').train.dtype == "bf16"


@pytest.mark.parametrize("word, complaint", [
    ("nan", "finite"), (".nan", "finite"), ("inf", "finite"), ("-.inf", "finite"), ("-1", "negative")])
def test_numbers_out_of_bounds_are_refused(word, complaint):
    assert complaint in refusal(config.load, "", ["--lr", word])


def test_zero_is_refused_where_it_means_nothing():
    assert "batch_size must be positive" in refusal(config.load, "", ["--batch_size", "0"])
    assert config.load("", ["--warmup", "0"]).train.warmup == 0


def test_a_choice_is_refused_with_the_nearest_one():
    assert refusal(config.load, "", ["--schedule", "cosin"]).endswith("did you mean cosine?")


@pytest.mark.parametrize("overrides", [
    ["--width", "100"], ["--frame_stack", "3"], ["--silence_prob", "2"], ["--ema", "1"], ["--cfg_from", "0.5", "--cfg_to", "0.4"],
    ["--sway", "-1.5"], ["--fmax", "20000"], ["--hop", "2048"]])
def test_combinations_that_cannot_work_are_refused(overrides):
    refusal(config.load, "", overrides)


@pytest.mark.parametrize("overrides, complaint", [
    (["steps", "3"], "'steps': expected --key value"), (["--steps"], "--steps: its value is missing"), (["--", "3"], "unknown key")])
def test_a_malformed_command_line_is_refused(overrides, complaint):
    assert complaint in refusal(config.load, "", overrides)


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = str(tmp_path / "absent.yaml")
    assert refusal(config.load, path).startswith(f"{path}: cannot be read")
    assert refusal(config.load, str(tmp_path)).startswith(f"{tmp_path}: cannot be read")


@pytest.mark.parametrize("text", ["train: [", "a: b: c", "train:\n\tlr: 1\n", "- a\n- b\n", "words\n", "\x00"])
def test_broken_yaml_is_refused_by_name(tmp_path, text):
    assert "recipe.yaml: " in refusal(load_text, tmp_path, text)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_text(tmp_path, "# nothing\n") == config.Config()


def test_a_config_survives_being_stored_in_a_checkpoint():
    changed = config.load("", ["--lr", "0.5", "--out_dir", "out/x", "--compile", "true"])
    assert config.from_dict(config.to_dict(changed)) == changed
    assert "unknown key train.old" in refusal(config.from_dict, {"train": {"old": 1}}, "a checkpoint")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().seed = 2


def test_an_error_of_the_user_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        config.run_main(lambda: config.load("", ["--lr", "fast"]))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_opens_with_a_comment(path):
    config.load(str(path))
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_only_what_differs_from_the_defaults(path):
    loaded, default = flat(config.to_dict(config.load(str(path)))), flat(config.to_dict(config.Config()))
    said = flat(config.read_yaml(str(path)))
    assert not [key for key in said if loaded[key] == default.get(key)]


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
