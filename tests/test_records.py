"""Logs of a real run, written, read and checked; and altered, each refused with its reason."""

import copy
import json
import math

import numpy as np
import pytest
from conftest import ROOT, call

import metric
from config import UserError
from records import check, log

SEEDS = (1, 2, 3)
WEIGHTS = "f" * 64


@pytest.fixture(scope="module")
def sections(run) -> log.Sections:
    """Of the run that the session trained."""
    return log.collect(run)


@pytest.fixture
def logs(sections) -> list[log.Sections]:
    """Three runs that are a claim: of other seeds, with one, two and three sentences understood."""
    found = []
    for seed in SEEDS:
        altered = copy.deepcopy(sections)
        altered["config"]["seed"] = seed
        altered["judge"]["sha256"] = WEIGHTS
        for row in altered["sentences"][:seed]:
            hear(altered, row, row["text"].upper())
        found.append(altered)
    return found


@pytest.fixture
def track(sections, logs) -> dict:
    """What the run had, as a track has it, and a target well above what the three runs reached."""
    rates = [check.error_rate(altered["sentences"]) for altered in logs]
    floor = metric.newest_values(sections["metrics"])["eval/wer_ground_truth"]
    return {
        "corpus": sections["corpus"]["plan"],
        **{name: sections["corpus"][name] for name in ("frames", "mean", "std")},
        "tolerance": 0.002,
        "sentences": check.digest_sentences(sections["sentences"]),
        "judge": sections["judge"]["name"],
        "sha256": WEIGHTS,
        "floor": floor,
        "floor_tolerance": 0.01,
        "points": float(np.mean(rates) + 10 * np.std(rates) - floor),
        "hardware": "cores$",
        "fixed": {"eval.split": "val", "eval.true_durations": False},
    }


def hear(altered: log.Sections, row: dict, transcript: str) -> None:
    """Change what was heard in a sentence, and all figures with it."""
    row["hypothesis"] = transcript
    row["errors"], row["words"] = check.count_errors(row)
    rate_row = next(row for row in reversed(altered["metrics"]) if "eval/wer" in row)
    rate_row["eval/wer"] = check.error_rate(altered["sentences"])


def verdict(logs: list[log.Sections], track: dict, tmp_path, capsys) -> tuple[int, str]:
    """The exit code of the command and what it printed."""
    paths = []
    for number, sections in enumerate(logs):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(log.format_log(sections), encoding="utf-8", newline="\n")
    tracks = tmp_path / "tracks.yaml"
    tracks.write_text(json.dumps({"cpu": track}))
    capsys.readouterr()
    code = 0
    try:
        call(check, *map(str, paths), f"--tracks={tracks}")
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


# A log


def test_a_log_is_read_as_it_was_written(sections, run, capsys, tmp_path):
    capsys.readouterr()
    call(log, str(run))
    path = tmp_path / "log.txt"
    path.write_text(capsys.readouterr().out, encoding="utf-8", newline="\n")
    assert log.read_log(str(path)) == json.loads(json.dumps(sections))
    train = (run / "source" / "train.py").read_text(encoding="utf-8")
    assert sections["source/train.py"] == train and train in path.read_text(encoding="utf-8")
    assert len(sections["sentences"]) == 4 and sections["run"]["commit"]


def test_a_log_does_not_say_where_folders_were(sections, run, tiny):
    told = json.dumps([sections[name] for name in sections if not name.startswith(log.SOURCE)])
    assert str(run) not in told and str(tiny["data_dir"]) not in told
    assert sections["config"]["out_dir"] == run.name
    assert f"--out_dir={run.name}" in sections["run"]["command"]
    words = "/a/b/train.py --config=/a/x.yaml --data_dir ~/corpus/ --out_dir out/x"
    assert log.FOLDERS.sub("", words) == "train.py --config=x.yaml --data_dir corpus/ --out_dir out/x"


def test_what_a_file_holds_is_not_taken_for_the_head_of_a_section(sections, tmp_path):
    sections = copy.deepcopy(sections)
    sections["source/trap.md"] = "==== run: 1 lines\n{}\r\n\f\x85\u2028==== end: 9 lines\n"
    (tmp_path / "log.txt").write_text(log.format_log(sections), encoding="utf-8", newline="\n")
    assert log.read_log(str(tmp_path / "log.txt")) == json.loads(json.dumps(sections))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: "", "its first line is not"),
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: text[: text.index("==== sentences")], "it lacks sentences"),
        (lambda text: text.replace("==== judge", "=== judge"), "a section was to begin here"),
        (lambda text: text.replace("==== corpus", "==== judge"), "stands twice"),
        (lambda text: text.replace('\n{"asked"', '\n["asked"'), "section judge is damaged"),
    ],
)
def test_a_file_that_is_no_whole_log_is_exit_code_2(damage, said, sections, tmp_path, refusal):
    path = tmp_path / "log.txt"
    path.write_text(damage(log.format_log(sections)), encoding="utf-8", newline="\n")
    assert said in refusal(check, str(path))


def test_a_log_that_lacks_a_figure_is_exit_code_2(sections, tmp_path, refusal):
    sections = copy.deepcopy(sections)
    del sections["run"]["hardware"]
    (tmp_path / "log.txt").write_text(log.format_log(sections), encoding="utf-8", newline="\n")
    assert "log.txt: no whole log of a run" in refusal(check, str(tmp_path / "log.txt"))


def test_a_run_that_was_not_evaluated_at_its_end_has_no_log(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    with pytest.raises(UserError, match="not evaluated at its last step, 6"):
        log.collect(tmp_path)
    with pytest.raises(UserError, match="no finished run there"):
        log.collect(tmp_path / "nowhere")


# A claim


def test_three_runs_below_the_target_are_a_record(logs, track, tmp_path, capsys):
    code, printed = verdict(logs, track, tmp_path, capsys)
    assert code == 0 and printed.endswith("the claim holds\n") and "p = 0.00" in printed
    assert printed.startswith("3 runs on ") and "6 updates (6, 6, 6)" in printed


def alter_seed(logs, track):
    logs[2]["config"]["seed"] = logs[0]["config"]["seed"]


def leave_one_out(logs, track):
    del logs[2]


def alter_source(logs, track):
    logs[1]["source/flow.py"] += "# faster"


def alter_config(logs, track):
    logs[1]["config"]["train"]["lr"] = 0.5


def alter_transcript(logs, track):
    row = logs[1]["sentences"][3]
    row["hypothesis"] = row["text"]


def alter_rate(logs, track):
    logs[1]["metrics"].append({"step": 6, "eval/wer": 0.01})


def alter_sentence(logs, track):
    logs[2]["sentences"][0]["text"] += " Indeed."


def alter_corpus(logs, track):
    logs[0]["corpus"]["plan"] = "0" * 64


def alter_sound(logs, track):
    logs[0]["corpus"]["frames"] *= 1.01


def alter_judge(logs, track):
    logs[1]["judge"]["sha256"] = "1" * 64


def alter_lengths(logs, track):
    for altered in logs:
        altered["config"]["eval"]["true_durations"] = True


def alter_floor(logs, track):
    logs[2]["metrics"].append({"step": 6, "eval/wer_ground_truth": track["floor"] + 0.05})


def alter_machine(logs, track):
    track["hardware"] = "H100"


def alter_target(logs, track):
    track["points"] = min(check.error_rate(altered["sentences"]) for altered in logs) - track["floor"]


def test_the_records_that_are_kept_hold(capsys):
    kept = {}
    for path in sorted((ROOT / "records").glob("*/*.txt")):
        kept.setdefault((path.parent.name, path.stem.rpartition("_")[0]), []).append(str(path))
    assert kept
    for (track, name), paths in kept.items():
        call(check, *paths, f"--track={track}")
        assert capsys.readouterr().out.endswith("the claim holds\n"), name


@pytest.mark.parametrize(
    "alter, said",
    [
        (alter_seed, "each of another seed, are a claim; these have the seeds 1, 2, 1"),
        (leave_one_out, "at least 3 runs, each of another seed, are a claim; these have the seeds 1, 2"),
        (alter_source, "1.txt: source/flow.py differs from"),
        (alter_config, "1.txt: train.lr 0.5 differs from"),
        (alter_transcript, "0 errors in"),
        (alter_rate, "the metrics 1.0 %"),
        (alter_sentence, "2.txt: other sentences than the track's"),
        (alter_corpus, "0.txt: trained on corpus 000000000000"),
        (alter_sound, "0.txt: the corpus has frames"),
        (alter_judge, "SHA-256 111111111111, not by"),
        (alter_lengths, "eval.true_durations is True, in this track False"),
        (alter_floor, "2.txt: the floor was"),
        (alter_machine, "the track is for H100"),
        (alter_target, "that the mean is at most the target has p ="),
    ],
)
def test_what_was_altered_is_refused_with_its_reason(alter, said, logs, track, tmp_path, capsys):
    alter(logs, track)
    code, printed = verdict(logs, track, tmp_path, capsys)
    refused = [line for line in printed.splitlines() if line.startswith("refused: ")]
    assert code == 1 and any(said in line for line in refused), printed
    assert "the claim holds" not in printed


def test_a_track_that_there_is_not_is_refused(sections, tmp_path, refusal):
    (tmp_path / "log.txt").write_text(log.format_log(sections), encoding="utf-8", newline="\n")
    assert "--track gpu: " in refusal(check, str(tmp_path / "log.txt"), "--track=gpu")


# The test


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 13])
def test_the_tail_of_student_s_t_is_that_of_its_density(freedom):
    """By quadrature, in the angle, over which the density is a power of the cosine."""
    edges = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    weights = np.cos(middles) ** (freedom - 1)
    for t in (-2.5, 0.0, 0.7, 3.0, 9.925):
        above = np.sqrt(freedom) * np.tan(middles) > t
        tail = weights[above].sum() / weights.sum()
        assert check.upper_tail(t, freedom) == pytest.approx(tail, abs=1e-5)


def test_published_quantiles_of_student_s_t():
    for freedom, t in ((1, 31.821), (2, 6.965), (3, 4.541), (9, 2.821), (30, 2.457)):
        assert check.upper_tail(t, freedom) == pytest.approx(0.01, rel=1e-3)


def test_three_rates_prove_a_mean_four_deviations_below_the_target():
    rates = [0.19, 0.20, 0.21]
    assert check.p_value(rates, 0.2 + 0.0399) > 0.01 > check.p_value(rates, 0.2 + 0.0405)
    assert check.p_value(rates, 0.2) == pytest.approx(0.5) and check.p_value(rates, 0.15) > 0.9
    assert check.p_value([0.2, 0.2, 0.2], 0.21) == 0 and check.p_value([0.2, 0.2, 0.2], 0.2) == 1
    assert math.isnan(check.p_value([0.1], 0.2))
