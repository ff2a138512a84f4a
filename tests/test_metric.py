"""Scores and the record of a run: scores agree with brute force and known cases, nothing is logged twice, the
report is one page that needs nothing else.

W&B is the real client, offline.
"""

import html.parser
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

import audio
import metric
from config import Mel, UserError
from corpora import voice
from metric import Score
from tracking import logger, plot, report

RATE = Mel().sample_rate
NASTY = 'Say <script>alert("&")</script> twice'


def writer(out: Path, resume_step: int = 0, mode: str = "disabled", url: str = "") -> logger.MetricsLogger:
    return logger.MetricsLogger(str(out), {"seed": 1, "mel": {"hop": 256}}, mode, "test", url, resume_step)


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path):
    log = writer(tmp_path)
    log.log(
        1,
        {
            "train/loss": math.nan,
            "eval/wer": np.float32(0.5),
            "eval/recogniser": "base.en",
            "count": 3,
            "worst": math.inf,
        },
    )
    assert logged(tmp_path) == [
        {
            "step": 1,
            "train/loss": None,
            "eval/wer": 0.5,
            "eval/recogniser": "base.en",
            "count": 3,
            "worst": None,
        }
    ]
    log.close()


def test_a_log_whose_folder_is_moved_away_or_replaced_is_not_written_to(tmp_path):
    out = tmp_path / "out"
    log = writer(out)
    out.rename(tmp_path / "away")
    with pytest.raises(UserError, match="out/metrics.jsonl: cannot be written .No such file or directory"):
        log.log(1, {"train/loss": 1})
    log = writer(out)
    out.rename(tmp_path / "away too")
    writer(out).close()
    for ending in (lambda: log.log(1, {"train/loss": 1}), log.close):
        with pytest.raises(UserError, match="out/metrics.jsonl: was replaced while the run wrote to it"):
            ending()
    assert not logged(out) and not logged(tmp_path / "away too")


def test_resume_repeats_no_step_and_passes_over_a_torn_line(tmp_path):
    first = writer(tmp_path)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "train/lo')
    second = writer(tmp_path, resume_step=20)
    assert [row["step"] for row in logged(tmp_path)] == [10, 20]
    second.log(30, {"train/loss": 31})
    second.close()
    assert [(row["step"], row["train/loss"]) for row in logged(tmp_path)] == [(10, 10), (20, 20), (30, 31)]


def test_a_run_from_the_start_begins_its_log_anew(tmp_path):
    for _ in range(2):
        log = writer(tmp_path)
        log.log(1, {"train/loss": 1})
        log.close()
    assert len(logged(tmp_path)) == 1


def test_wandb_runs_offline_in_silence_and_a_resumed_run_keeps_its_id(tmp_path, capfd):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE // 10), RATE)
    plot.save_spectrogram_png(np.zeros((8, 80)), tmp_path / "a.png", Mel())
    first = writer(tmp_path, mode="offline")
    first.log(1, {"train/loss": 1.0, "eval/recogniser": "base.en", "bad": math.nan})
    first.log_files(1, "eval/audio", [tmp_path / "a.wav"])
    first.log_files(1, "eval/picture", [tmp_path / "a.png"])
    first.close()
    identity = (tmp_path / "wandb_id").read_text().strip()
    # W&B names a run's folder by the second in which it began
    time.sleep(1.1)
    second = writer(tmp_path, resume_step=1, mode="offline")
    second.log(2, {"train/loss": 0.5})
    second.close()
    assert (tmp_path / "wandb_id").read_text().strip() == identity
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(runs) == 2
    for folder in runs:
        written = folder / f"run-{identity}.wandb"
        for _ in range(100):  # a process of W&B's own writes it, on a busy machine after `close`
            if written.stat().st_size > 100:
                break
            time.sleep(0.1)
        assert written.stat().st_size > 100
    assert {path.suffix for path in (runs[0] / "files" / "media").rglob("*.*")} == {".wav", ".png"}
    assert capfd.readouterr() == ("", "")


def test_a_server_that_is_no_address_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="--wandb offline"):
        writer(tmp_path, mode="online", url="nowhere")


def test_importing_metric_is_light():
    heavy = ("torch", "wandb", "matplotlib", "jiwer")
    code = f"import sys, metric; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


@pytest.mark.parametrize(
    "reference, hypothesis, counts",
    [
        ("a b c d", "a b c d", (0, 4)),
        ("a b c d", "a x c", (2, 4)),
        ("a b", "a b c d e", (3, 2)),
        ("a b", "", (2, 2)),
        ("", "a b", (2, 0)),
        ("", "", (0, 0)),
    ],
)
def test_word_errors_of_known_cases(reference, hypothesis, counts):
    assert metric.word_errors(reference, hypothesis) == counts


def test_corpus_word_error_rate_weighs_words_and_not_sentences():
    assert metric.word_error_rate([("a b c d e f g h i", "a b c d e f g h i"), ("a", "b")]) == pytest.approx(
        0.1
    )
    assert math.isnan(metric.word_error_rate([("", "a")]))


def test_texts_without_words_are_left_out_of_the_rate_and_counted():
    spoken = [{"errors": 1, "words": 4}, {"errors": 0, "words": 6}]
    silent = {"errors": None, "words": 0}
    found = metric.word_error_scores([spoken[0], silent, spoken[1], silent])
    assert found == metric.word_error_scores(spoken) | {"no_words": 2} and found["wer"] == 0.1
    assert metric.word_error_scores([silent]) == {"no_words": 1}
    assert metric.word_error_rate([("a b", "a"), ("", "a b c")]) == 0.5


def test_bootstrap_interval_covers_the_true_rate_about_95_times_in_100():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        words = rng.integers(5, 20, 100)
        low, high = metric.bootstrap_interval(
            list(rng.binomial(words, 0.1)), list(words), draws=300, seed=trial
        )
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_interval_is_reproducible_and_closed_for_equal_sentences():
    assert metric.bootstrap_interval([1, 0, 2], [4, 4, 4]) == metric.bootstrap_interval([1, 0, 2], [4, 4, 4])
    assert metric.bootstrap_interval([1, 1], [4, 4]) == (0.25, 0.25)
    assert all(map(math.isnan, metric.bootstrap_interval([], [])))


def slow_warped_mean(distance: np.ndarray) -> float:
    """By definition: the cheapest path by a table over all cells."""
    best = {(-1, -1): (0.0, 0)}
    for i in range(distance.shape[0]):
        for j in range(distance.shape[1]):
            before = [best[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in best]
            cost, length = min(before, key=lambda pair: pair[0])
            best[i, j] = (cost + distance[i, j], length + 1)
    cost, length = best[distance.shape[0] - 1, distance.shape[1] - 1]
    return cost / length


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 9), (12, 6), (10, 10)])
def test_warping_over_anti_diagonals_equals_the_table(shape):
    distance = np.random.default_rng(sum(shape)).random(shape)
    assert metric.dtw_mean_distance(distance) == pytest.approx(slow_warped_mean(distance))


def test_distortion_of_a_cosine_added_to_the_log_mel_is_its_rms_in_decibels():
    clip = np.tile(np.random.default_rng(0).normal(size=80), (30, 1))
    ripple = 0.7 * np.cos(np.pi / 80 * 5 * (np.arange(80) + 0.5))
    rms = np.sqrt((ripple**2).mean()) * 20 / math.log(10)
    assert metric.mel_cepstral_distortion(clip, clip + ripple) == pytest.approx(rms)
    # level is left out
    assert metric.mel_cepstral_distortion(clip, clip + 3) == pytest.approx(0, abs=1e-5)


def test_distortion_forgives_tempo_and_nothing_else():
    clips = [
        audio.log_mel(voice.speak_espeak(text, RATE), Mel()).numpy()
        for text in ("The quick brown fox jumps.", "My voice is my passport.")
    ]
    positions = np.linspace(0, len(clips[0]) - 1, int(1.3 * len(clips[0])))
    stretched = np.stack([np.interp(positions, np.arange(len(clips[0])), band) for band in clips[0].T], 1)
    assert metric.mel_cepstral_distortion(clips[0], clips[0]) == pytest.approx(0, abs=1e-5)
    same, other = (metric.mel_cepstral_distortion(clips[0], b) for b in (stretched, clips[1]))
    assert 0 < same < other / 4
    assert metric.mel_cepstral_distortion(clips[1], clips[0]) == pytest.approx(other)
    assert math.isnan(metric.mel_cepstral_distortion(clips[0], clips[1][:0]))


def lines_run(function, *arguments) -> int:
    """How many lines of Python a call runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_distortion_in_python_grows_with_the_frames_and_not_with_their_square():
    a, b = np.random.default_rng(0).normal(size=(2, 300, 80))
    short = lines_run(metric.mel_cepstral_distortion, a[:150], b[:150])
    long = lines_run(metric.mel_cepstral_distortion, a, b)
    assert long < 2.1 * short


def test_the_khz_axis_is_that_of_the_mel_filters():
    """Rows of a picture are equally spaced on the scale, and a filter's centre of mass lies on its row."""
    filters, mel = audio.mel_filters(Mel()).numpy(), Mel()
    hz = filters @ np.linspace(0, RATE / 2, filters.shape[1]) / filters.sum(1)
    rows = np.array([plot.slaney_mel(f) for f in hz]) / plot.slaney_mel(mel.fmax) * (mel.n_mels + 1) - 1
    assert np.abs(rows - np.arange(mel.n_mels)).max() < 0.25


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: tags, their attributes, the text in between."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a short run of 10 prompts leaves, two evaluations and an older one's table."""
    out = tmp_path_factory.mktemp("run")
    log = writer(out)
    for step in range(10, 2001, 10):
        values = {
            "train/loss": 1 + 10 / step,
            "train/flow_loss": 10 / step,
            "train/duration_loss": 1 / step,
            "perf/frames_per_sec": 40000.0,
            "perf/step_ms": 100.0,
            "perf/train_minutes": step / 600,
        }
        if step % 500 == 0:
            values |= {
                "val/flow_loss": 11 / step,
                "val/duration_loss": math.nan,
                **{f"val/flow_loss_t{i}": i / step for i in range(1, 10)},
            }
        if step % 1000 == 0:
            values |= {
                "eval/wer": 0.1234,
                "eval/wer_low": 0.1,
                "eval/wer_high": 0.2,
                "eval/wer_ground_truth": 0.02,
                "eval/recogniser": "base.en",
                "eval/mcd": 5.4321,
            }
        log.log(step, values)
    log.close()
    (out / "run.json").write_text(
        json.dumps(
            {
                "command": "python train.py --note '<b>'",
                "commit": "abc123",
                "hardware": "1 x H200",
                "started": "2026-01-02",
                "parameters": 4_400_000,
                "versions": {"torch": "2.11.0"},
                "scores": {"mcd": Score("mel-cepstral distortion", "dB")._asdict()},
            }
        )
    )
    (out / "config.yaml").write_text("# <i>\nsystem: tts\nout_dir: http://example.org\n")
    (out / "eval/step_0001000").mkdir(parents=True)
    (out / "eval/step_0001000/samples.jsonl").write_text('{"id": "old", "text": "an older evaluation"}\n')
    folder = out / "eval/step_0002000"
    folder.mkdir()
    rows = []
    for i in range(10):
        rows.append(
            {
                "id": f"clip-{i}",
                "text": "One two three.",
                "hypothesis": "one two three",
                "errors": 0,
                "words": 3,
                "mcd": 5.0,
                "audio": f"{i:03d}.wav",
                "reference_audio": f"{i:03d}.ref.wav",
                "picture": f"{i:03d}.png",
                "reference_picture": None,
                "attention": f"{i:03d}.attention.png",
            }
        )
        for name in ("audio", "reference_audio"):
            soundfile.write(folder / rows[-1][name], np.sin(np.arange(2000) / 9), RATE)
        plot.save_spectrogram_png(
            np.random.default_rng(i).normal(-5, 2, (8, 80)), folder / rows[-1]["picture"], Mel()
        )
        plot.save_attention_png(np.eye(14), "One two three.", folder / rows[-1]["attention"], seconds=1.5)
    rows[1] |= {"text": NASTY, "hypothesis": "say <Script> thrice", "errors": 2, "words": 3}
    rows[2] |= {"audio": "gone.wav", "hypothesis": None, "errors": None, "words": None, "mcd": None}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": "torn')
    return out


@pytest.fixture(scope="module")
def page(run_folder) -> Page:
    return Page(report.write_report(run_folder).read_text())


def test_the_report_loads_nothing_and_runs_nothing(page):
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "poster", "data", "srcset", "action"):
                assert value.startswith(("data:", "#")), (tag, name, value[:80])
            assert "http" not in (value or "") or value.startswith("data:"), (tag, name, value[:80])
    assert not page.count("script") and page.count("link") == 1 and not page.open


def test_the_style_refers_to_nothing_outside():
    assert "url(" not in report.TEMPLATE.read_text() and "@import" not in report.TEMPLATE.read_text()


def test_the_first_eight_samples_can_be_heard_and_seen(page):
    assert page.count("audio") == 8 * 2 - 1  # one file is missing
    assert page.count("img") == 8 * 2
    assert page.count("article") == 8
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_headline_tells_the_error_rate_its_interval_and_floors(page):
    for words in (
        "12.3 %",
        "10.0 % to 20.0 %",
        "base.en",
        "2.0 %",
        "5.43 dB",
        "2,000 steps",
        "3.3 minutes",
        "4.4 M",
        "1 x H200",
    ):
        assert words in page.text
    assert "through all but the network" not in page.text  # was not measured


def test_text_of_prompts_config_and_command_is_escaped(page):
    for words in (NASTY, "<Script>", "--note '<b>'", "# <i>", "abc123", "2.11.0"):
        assert words in page.text


def test_errors_are_marked_where_they_were_counted(page):
    assert page.count("mark") > 1 and page.count("del") > 1
    assert report.align_transcript("One two three.", "one TWO four", 1) == [
        ("right", "one TWO"),
        ("missing", "three."),
        ("wrong", "four"),
    ]
    assert report.align_transcript("One & two", "one two too", 1) == [("right", "one two"), ("wrong", "too")]
    assert report.align_transcript("Twenty", "20", 0) == [("right", "20")]  # equal once normalised


def test_all_sentences_of_the_newest_evaluation_are_listed_the_worst_first(page):
    assert page.count("tr") == 1 + 10
    assert "an older evaluation" not in page.text
    table = page.text[page.text.index("10 samples") :]
    assert table.index("clip-1") < table.index("clip-0") < table.index("clip-9")


def test_every_curve_that_was_logged_is_drawn(page):
    titles = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert [title.split(":")[0] for title in titles] == [
        "Flow loss",
        "Duration loss",
        "Word error rate, %",
        "Validation loss by t",
        "Mel-cepstral distortion, dB",
        "Throughput, frames/s",
    ]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "train/loss": 0.5}],
        [{"step": 5, "eval/wer": 1.5}],
        [{"step": 5, "val/flow_loss": None}],
    ],
)
def test_what_is_missing_leaves_its_section_out(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report.write_report(tmp_path).read_text())
    assert page.count("svg") == sum(len(row) == 2 and None not in row.values() for row in rows)
    assert not page.count("article") and not page.count("details") and not page.count("audio")


def test_an_evaluation_that_has_a_name_for_a_number_is_not_the_runs(tmp_path):
    for name, text in (("step_0000002", "Ours."), ("step_best", "Theirs.")):
        (tmp_path / "eval" / name).mkdir(parents=True)
        (tmp_path / "eval" / name / "samples.jsonl").write_text(json.dumps({"text": text}) + "\n")
    page = report.write_report(tmp_path).read_text()
    assert "Ours." in page and "Theirs." not in page


def test_pictures_of_odd_sizes_and_letters_are_drawn(tmp_path):
    plot.save_spectrogram_png(np.zeros((1, 40)), tmp_path / "a.png", Mel(n_mels=40, fmax=11025.0))
    plot.save_attention_png(np.zeros((3, 9)), "$ä\n$é", tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_rebuilds_a_report_and_names_a_folder_that_is_not_there(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "metric.py", *arguments], capture_output=True, text=True, env=os.environ
        )

    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert run(tmp_path).stdout.strip() == str(tmp_path / "report.html")
    wrong = run(tmp_path / "nowhere")
    assert wrong.returncode == 2 and "nowhere" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


# Figures of whole sets


def test_frechet_distance_of_two_gaussians_is_its_closed_form_and_of_a_set_to_itself_zero():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20_000, 3)), rng.normal(0, 1, (20_000, 3)) * [1, 2, 3] + [1, 0, 0]
    assert metric.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # |mean|^2 + sum (1 - s)^2
    assert metric.frechet_distance(a, b) == pytest.approx(1 + 1**2 + 2**2, rel=0.05)


def test_kernel_distance_equals_its_sums_and_is_about_zero_for_equal_distributions():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (7, 4)), rng.normal(3, 1, (7, 4))
    width = np.median([np.square(b[i] - b[j]).sum() for i in range(7) for j in range(i)])

    def mean(x, y, same):
        return np.mean(
            [
                np.exp(-np.square(p - q).sum() / 2 / width)
                for i, p in enumerate(x)
                for j, q in enumerate(y)
                if not same or i != j
            ]
        )

    assert metric.kernel_distance(a, b) == pytest.approx(
        100 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))
    )
    big = rng.normal(0, 1, (2, 400, 4))
    assert abs(metric.kernel_distance(*big)) < 0.5 < 20 < metric.kernel_distance(a, c)


def test_inception_score_is_the_number_of_classes_at_best_and_one_at_worst():
    assert metric.inception_score(np.eye(10)) == pytest.approx(10)
    assert metric.inception_score(np.full((8, 10), 0.1)) == pytest.approx(1)


def test_recall_counts_a_row_whose_best_right_one_is_among_the_first():
    similarity = np.array([[0.9, 0.1, 0.2, 0.3], [0.5, 0.4, 0.1, 0.0], [0.1, 0.2, 0.3, 0.05]])
    # ranks 0, 1 (the better of two), 3
    right = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], bool)
    assert [metric.recall_at_k(similarity, right, k) for k in (1, 2, 3, 4)] == pytest.approx(
        [1 / 3, 2 / 3, 2 / 3, 1]
    )


# Matches, and how scores are shown

MATCHES = {
    "all_match": Score("everything as asked for", "%", is_match=True),
    "all_rule": Score("everything, by rule", "%", is_match=True),
    "colour_match": Score("colour as asked for", "%", is_match=True),
    "shape_match": Score("shape as asked for", "%", is_match=True),
    "shape_rule": Score("shape, by rule", "%", is_match=True),
}


def test_a_score_is_averaged_over_the_samples_that_have_it_and_its_control_beside_it():
    rows = [
        {"all_match": 1.0, "all_match_shuffled": 0.0},
        {"all_match": 0.0, "text": "a"},
        {"all_match": None},
    ]
    assert metric.mean_scores(rows, MATCHES) == {"all_match": 0.5, "all_match_shuffled": 0}
    assert metric.mean_scores([], MATCHES) == {}


def test_matches_are_also_told_by_the_words_of_their_groups_by_the_judge_and_by_the_rule():
    rows = [
        {"group": "en new", "all_match": 1.0, "all_rule": 0.0},
        {"group": "en known", "all_match": 1.0, "all_rule": 1.0},
        {"group": "ar known", "all_match": 0.0, "all_rule": 1.0},
        {"group": "", "all_match": 0.0, "all_rule": 0.0},
    ]
    judged = {"all_match/ar": 0, "all_match/en": 1, "all_match/known": 0.5, "all_match/new": 1}
    ruled = {"all_rule/ar": 1, "all_rule/en": 0.5, "all_rule/known": 1, "all_rule/new": 0}
    assert metric.match_rates_by_group(rows, MATCHES) == judged | ruled
    without_rule = [{key: row[key] for key in ("group", "all_match")} for row in rows]
    assert metric.match_rates_by_group(without_rule, MATCHES) == judged
    for few in ([], [{"group": "en", "all_match": 1.0}], [{"mcd": 3.0}]):
        assert metric.match_rates_by_group(few, MATCHES) == {}


def report_of(out: Path, values: dict, scores: dict[str, Score]) -> str:
    """The report of a run of one line, whose run.json declares the scores."""
    log = writer(out)
    log.log(1, values)
    log.close()
    declared = {key: score._asdict() for key, score in scores.items()}
    (out / "run.json").write_text(json.dumps({"scores": declared}))
    return report.write_report(out).read_text()


def test_a_match_is_shown_in_percent_beside_its_controls_and_its_groups(tmp_path):
    values = {
        "eval/all_match": 0.875,
        "eval/all_match_vocoded": 0.99,
        "eval/all_match_shuffled": 0.01,
        "eval/all_match/en": 0.9,
        "eval/all_rule": 0.625,
        "eval/all_rule_vocoded": 0.98,
        "eval/all_rule_shuffled": 0.02,
        "eval/all_rule/new": 0.5,
    }
    page = report_of(tmp_path, values, MATCHES)
    assert "87.5 %" in page and "at best: 99.0 %; shuffled prompts: 1.0 %; en: 90.0 %" in page
    assert "62.5 %" in page and "at best: 98.0 %; shuffled prompts: 2.0 %; new: 50.0 %" in page


def test_a_run_that_declares_no_scores_has_them_under_their_keys(tmp_path):
    """As those of trees up to November 2026: their run.json says nothing of scores."""
    log = writer(tmp_path)
    values = {"eval/recall_1": 0.5, "eval/recall_1/en": 0.75, "eval/recall_1_vocoded": 0.9, "eval/wer": 0.1}
    log.log(1, {"eval/recogniser": "base.en", "train/loss": 1.0} | values)
    log.close()
    folder = tmp_path / "eval/step_0000001"
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text('{"id": "a", "text": "Hats.", "recall_1": 0.25}\n')
    (tmp_path / "run.json").write_text('{"hardware": "1 x H200"}')
    page = Page(report.write_report(tmp_path).read_text())
    assert "recall 10.5at best: 0.9; en: 0.75" in page.text and "recall 1 0.25" in page.text
    titles = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert titles == ["Loss: training is smoothed", "Word error rate, %: shaded: 95 % interval", "Recall 1: "]


def test_a_sample_says_what_is_wrong_in_it_and_by_whom():
    entry = {
        "id": "a",
        "text": "",
        "all_match": 0.0,
        "colour_match": 0.0,
        "shape_match": 1.0,
        "all_rule": 0.0,
        "shape_rule": 0.0,
    }
    said = report.describe_scores(entry, MATCHES)
    assert said == ["not as asked for: all, all by rule, colour, shape by rule"]
