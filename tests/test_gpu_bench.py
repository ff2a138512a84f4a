"""The bench of a card runs, small, without one."""

from conftest import ROOT, call

import system
from bench import gpu, loader


def table(text: str) -> dict[str, dict[str, str]]:
    """The rows of its tables by their first cell."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("case", "evaluation"):
            columns = cells
        elif line.startswith("| "):
            found[cells[0]] = dict(zip(columns, cells))
    return found


def test_every_case_has_a_row_and_an_evaluation_its_parts(tmp_path, capsys):
    call(gpu, "--tiny", "--steps=2", f"--out={tmp_path / 'bench.md'}")
    text = (tmp_path / "bench.md").read_text()
    assert text == capsys.readouterr().out
    rows = table(text)
    for case in gpu.CASES:
        row = rows[case.name]
        if (ROOT / "configs" / f"{case.recipe}.yaml").exists():
            assert row["steps"] == "2" and float(row["ms a step"]) > 0, row["note"]
        else:  # a system that was deleted
            assert row["note"]
    assert {"vocoder", "scores", "validation"} <= rows.keys()


def test_the_seed_s_layout_and_ours_take_turns(tmp_path):
    call(gpu, "--tiny", "--steps=2", "--only=seed,ours", f"--out={tmp_path / 'bench.md'}")
    rows = table((tmp_path / "bench.md").read_text())
    assert rows["seed"]["steps"] == rows["ours"]["steps"] == "2"
    shares = {name: float(row["padding"].removesuffix(" %")) for name, row in rows.items()}
    assert shares["seed"] > shares["ours"]


def test_what_fails_is_a_row_that_says_why(tmp_path, monkeypatch):
    broken = gpu.Case("broken", "ljspeech", {"frame_stack": 7})
    monkeypatch.setattr(gpu, "CASES", (broken,))
    call(gpu, "--only=broken", f"--out={tmp_path / 'bench.md'}")
    note = table((tmp_path / "bench.md").read_text())["broken"]["note"]
    assert note.startswith("UserError") and "frame_stack 7" in note


def test_a_text_encoder_that_runs_in_every_step_leaves_no_features_in_the_batches(tmp_path):
    words = [f"--data_dir={tmp_path}", "--download=false", "--batch_size=2"]
    for recipe, cached in (("ljspeech", True), ("ljspeech_seed", False)):
        config = system.load_config(str(ROOT / "configs" / f"{recipe}.yaml"), words)
        assert ("features" in loader.open_batches(config, 6).train(0)) == cached
