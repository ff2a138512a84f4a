"""The ladder of designs: two rungs are trained, evaluated at both lengths and ranked, by the command; its
interpolation, its means, and what it refuses.
"""

import json
import re
from types import SimpleNamespace

import pytest
import soundfile
from conftest import ROOT, call, options

import system
from bench import tts
from bench.tts import Point, reach

RUNGS = """\
wide:
  what: a network that is wider
  width: 32
narrow:
  what: the recipe as it is
"""
CURVE = [Point(100, 50.0, 0.9), Point(200, 100.0, 0.4), Point(300, 150.0, 0.5), Point(400, 210.0, 0.2)]


@pytest.fixture(scope="module")
def ladder(tiny, tmp_path_factory) -> SimpleNamespace:
    """A ladder of two rungs, a seed each: its folder and the words of its command."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "rungs.yaml").write_text(RUNGS)
    (folder / "recipe.yaml").write_text("system: tts\n")
    knobs = tiny | {"width": 16, "layers": 1, "steps": 2, "limit": 2, "out": folder / "out", "every": 2}
    knobs |= {"config": folder / "recipe.yaml", "designs": folder / "rungs.yaml", "seeds": 7, "jobs": 2}
    words = ["ladder", *options(knobs)]
    call(tts, *words)
    return SimpleNamespace(out=folder / "out", words=words)


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of a table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head = next(row for row in rows if row[0] == "rung")
    return {row[0]: dict(zip(head, row)) for row in rows[rows.index(head) + 2 :]}


# The ladder


def test_two_rungs_are_trained_evaluated_at_both_lengths_and_ranked(ladder):
    rows = table((ladder.out / "ladder.md").read_text())
    assert rows.keys() == {"wide", "narrow"} and rows["wide"]["what it is"] == "a network that is wider"
    for row in rows.values():
        assert row["seeds"] == "1" and row["updates"] == "2" and row["MCD, dB"] and row["updates/s"]
        assert "[" in row["WER, predicted lengths"] and "[" in row["WER, true lengths"]
        assert row["length error"].endswith(" %")
    lines = [json.loads(line) for line in (ladder.out / "ladder.jsonl").read_text().splitlines()]
    assert [rung["wer"] for rung in lines] == sorted(rung["wer"] for rung in lines)
    parameters = {}
    for rung in lines:
        (run,) = rung["runs"]
        assert run["curve"] == [[2, run["seconds"], run["wer"]]] and run["seconds"] > 0
        folder = ladder.out / rung["rung"] / "seed_7"
        assert run["length_error"] == pytest.approx(length_error(folder), rel=1e-6)
        parameters[rung["rung"]] = run["parameters"]
    assert parameters["wide"] > parameters["narrow"]


def length_error(folder) -> float:
    """By the corpus's lengths instead of the sounds."""
    config, _ = system.read_checkpoint(system.find_checkpoint(str(folder)), "cpu")
    frames = {clip.id: clip.frames for clip in system.open_corpus(config).clips("val")}
    errors = []
    for line in (folder / "eval" / "step_0000002" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        sound = folder / "eval" / "step_0000002" / row["audio"]
        predicted = soundfile.info(sound).frames / config.mel.hop
        errors.append(abs(predicted / frames[row["id"]] - 1))
    return sum(errors) / len(errors)


def test_the_same_command_again_and_the_table_train_nothing(ladder, capsys):
    written = {path: path.stat().st_mtime_ns for path in ladder.out.rglob("output.txt")}
    capsys.readouterr()
    call(tts, *ladder.words)
    again = capsys.readouterr().out
    call(tts, "table", str(ladder.out))
    printed = capsys.readouterr().out
    assert printed == (ladder.out / "ladder.md").read_text() and again.endswith(printed)
    assert len(written) == 2 and written == {path: path.stat().st_mtime_ns for path in written}


def test_a_run_is_not_gone_on_with_by_other_knobs(ladder, refusal):
    said = refusal(tts, *ladder.words, "--lr=0.5")
    assert "seed_7: was trained with train.lr 0.0003, not 0.5; choose another --out" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--rungs=narow"], "--rungs narow: not in .*rungs.yaml; did you mean narrow"),
        (["--lrr=1"], "rung wide: --lrr: unknown key; did you mean lr"),
        (["--frame_stack=3"], "rung wide: data.pad_multiple 16 is no multiple of model.frame_stack 3"),
        (["--seeds=a"], "--seeds a: expected whole numbers"),
        (["--jobs=0"], "--jobs 0: at least 1"),
        (["--every=0"], "rung wide: is never evaluated; give --every"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_any_is_trained(words, said, ladder, refusal, tmp_path):
    words = [*ladder.words, f"--out={tmp_path / 'out'}", *words]
    assert re.search(said, refusal(tts, *words))
    assert not list(tmp_path.rglob("checkpoints"))


def test_of_what_fails_the_last_line_is_told(tmp_path):
    run = tts.Run("a", 1, tmp_path, [], system.load_config())
    fault = tts.Climber(jobs=2).run(run, "launch.py", "--ranks=x")
    assert fault.startswith("error: argument --ranks: invalid int value: 'x'")
    assert fault in (tmp_path / "output.txt").read_text()


# The designs


def test_every_rung_is_a_config_of_its_own():
    """None is a second name for the recipe, which is `ours`."""
    rungs = tts.read_rungs(ROOT / "bench" / "rungs.yaml")
    found = {}
    for name, rung in rungs.items():
        words = [f"--{key}={value}" for key, value in rung.items() if key != "what"]
        found[name] = system.load_config(str(ROOT / "configs" / "demo_long.yaml"), words)
    recipe = system.load_config(str(ROOT / "configs" / "demo_long.yaml"))
    assert [name for name, config in found.items() if config == recipe] == ["ours"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("a/b:\n  what: x\n", "'a/b' is no name for a rung"),
        ("a:\n  width: 3\n", "rung a needs a line `what:`"),
        ("a: x\n", "rung a needs a line `what:`"),
        ("", "has no rung"),
    ],
)
def test_a_table_of_rungs_that_is_none_is_refused(text, said, tmp_path):
    path = tmp_path / "rungs.yaml"
    path.write_text(text)
    with pytest.raises(tts.UserError, match=said):
        tts.read_rungs(path)


# Figures


def test_a_target_is_reached_on_the_straight_line_to_the_first_evaluation_below_it():
    assert reach(CURVE, 0.5) == (180.0, 90.0, False)
    assert reach(CURVE, 0.4) == (200.0, 100.0, False)
    assert reach(CURVE, 0.3) == pytest.approx((366.67, 190, False), rel=1e-4)


def test_a_target_that_the_first_evaluation_meets_was_reached_then_at_the_latest():
    assert reach(CURVE, 0.95) == (100, 50.0, True)


def test_a_target_that_no_evaluation_meets_is_not_reached():
    assert reach(CURVE, 0.15) is None and reach([], 0.15) is None


def test_a_mean_of_reached_targets_is_of_all_seeds_or_none():
    early, late = ({"reached": {"0.5": reach(CURVE[n:], 0.5)}} for n in (0, 1))
    never = {"reached": {"0.5": None}}
    assert tts.format_reached([early, early], "0.5") == "180, 90 s"
    assert tts.format_reached([early, late], "0.5") == "at most 190, 95 s"
    assert tts.format_reached([early, never], "0.5") == "1 of 2"
    assert tts.format_reached([never], "0.5") == "-"


def test_several_seeds_have_a_deviation_and_one_has_an_interval():
    runs = [{"wer": 0.2, "wer_low": 0.15, "wer_high": 0.26}, {"wer": 0.3}, {"wer": 0.25}]
    assert tts.format_rate(runs[:1], "wer") == "20.0 % [15.0, 26.0]"
    assert tts.format_rate(runs, "wer") == "25.0 % ± 5.0"
    assert tts.format_rate([{}], "wer") == ""


def test_minutes_alone_end_a_training_unless_steps_are_given():
    asked = SimpleNamespace(minutes=2.5, every=0)
    assert tts.length_knobs(asked, []) == ["--max_minutes=2.5", f"--steps={tts.FOREVER}"]
    assert tts.length_knobs(asked, ["--train.steps", "9"]) == ["--max_minutes=2.5"]
