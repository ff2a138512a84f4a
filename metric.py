"""Scores, and what a run leaves behind: metrics.jsonl, a W&B run, and one HTML page that shows all of it.

In this order: scores (pure functions of words and arrays), the log, pictures, the report. The report is made
from the files in a run's folder alone: metrics.jsonl, run.json, config.yaml, and eval/step_*/samples.jsonl
with the wavs and pngs that it names; any of them may be missing. `python metric.py OUT_DIR` writes
OUT_DIR/report.html again.
"""

import base64
import contextlib
import io
import json
import math
import os
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from config import BOUND, Mel, UserError, run_main

PAGE = Path(__file__).parent / "assets" / "report.html"
# Legible on white and on black; INK stands for the text colour of the page around a chart
BLUE = "#3d7fd9"
ORANGE = "#d97b29"
GREY = "#7d7d7d"
INK = "#010203"


# Scores


class Score(NamedTuple):
    """How the report shows a score: the mean over the samples, or one figure of the whole set."""

    title: str
    unit: str = ""
    note: str = ""
    match: bool = False  # 1 where a sample is as its prompt asks, else 0: at chance beside another prompt


def recall_scores(name: str, title: str) -> dict[str, Score]:
    """Recall among the first 1, 5 and 10, by keys: {"recall_1": Score("R@1 speech to picture", ...), ...}."""
    return {
        f"{name}_{k}": Score(f"R@{k} {title}", "%", f"the right one is among the first {k}")
        for k in (1, 5, 10)
    }


SCORES = {
    "mcd": Score(
        "mel-cepstral distortion", "dB", "of log-mels, time-warped: a scale of its own; 0 is the recording"
    ),
    "lsd": Score("log-spectral distance", "dB", "of the magnitudes at equal loudness; 0 is the recording"),
    "path_distance": Score(
        "distance to the colour path", "", "mean over a picture, whose colours go from 0 to 1"
    ),
    "all_match": Score("everything as asked for", "%", "all that the prompt says, at once", match=True),
    "all_rule": Score("everything, by rule", "%", "the same, by a rule that has learned nothing", match=True),
    "key_match": Score("key as asked for", "%", match=True),
    "tempo_match": Score("tempo as asked for", "%", match=True),
    "timbre_match": Score("timbre as asked for", "%", match=True),
    "colour_match": Score("colour as asked for", "%", match=True),
    "colour_rule": Score("colour, by rule", "%", match=True),
    "shape_match": Score("shape as asked for", "%", match=True),
    "shape_rule": Score("shape, by rule", "%", match=True),
    "place_match": Score("place as asked for", "%", match=True),
    "place_rule": Score("place, by rule", "%", match=True),
    "chance": Score("chance", "%", "that a guess has everything as asked for"),
    "fad": Score("Fréchet audio distance", "", "of the sets' features; 0 is the recordings"),
    "kad": Score("kernel audio distance", "", "of the sets' features, times 100; 0 is the recordings"),
    "clap": Score("CLAP score", "", "mean cosine similarity of sound and prompt"),
    "fid": Score("Fréchet inception distance", "", "of the sets' features; 0 is the real pictures"),
    "inception_score": Score("inception score", "", "1 where all pictures are alike"),
    **recall_scores("recall", "speech to picture"),
    **recall_scores("recall_back", "picture to speech"),
    **recall_scores("recall_made", "generated to real"),
    "cos_matched": Score("mean cosine similarity, matched pairs"),
    "cos_unmatched": Score("mean cosine similarity, unmatched pairs"),
    "modality_gap": Score("modality gap", "", "distance of the mean speech and the mean picture"),
    "language_gap": Score("gap between languages", "%", "best to worst, relative"),
}


def compare_expected(expected: dict[str, str], metrics: list[dict]) -> tuple[list[str], bool]:
    """A recipe's `expect`, {"eval/wer": "at most 0.1"}, beside the newest values.

    returns: a line for each, and whether none was missed. What was not measured, for want of a recogniser
    say, is neither met nor missed; its line says so.
    """
    newest = newest_values(metrics)
    lines = []
    none_missed = True
    for name, wanted in expected.items():
        side, number = BOUND.fullmatch(wanted).groups()
        bound = float(number)
        line = f"expected {name} {side} {as_shown(name, bound)}:"
        value = newest.get(name)
        if value is None:
            lines.append(f"{line} not measured")
            continue
        distance = as_shown(name, abs(value - bound))
        met = value <= bound if side == "at most" else value >= bound
        if not met:
            none_missed = False
        verdict = "met" if met else "missed"
        lines.append(f"{line} {verdict}, {as_shown(name, value)}, by {distance}")
    return lines, none_missed


def as_shown(name: str, value: float) -> str:
    """A value of the metric eval/<score>, for reading."""
    key = name.removeprefix("eval/").split("/")[0]
    if key.startswith("wer"):
        return percent(value)
    if key in SCORES:
        return with_unit(key, value)
    return f"{value:.4g}"


def with_unit(key: str, value: float | None) -> str:
    """A value of SCORES for reading, "5.43 dB"; "" for None."""
    if value is None:
        return ""
    unit = SCORES[key].unit
    return percent(value) if unit == "%" else f"{value:.3g} {unit}".strip()


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def newest_values(metrics: list[dict]) -> dict:
    """The newest value of every metric that was ever measured."""
    newest = {}
    for row in metrics:
        newest |= {name: value for name, value in row.items() if value is not None}
    return newest


def compared_with(values: dict, key: str) -> list[tuple[str, float]]:
    """What the score values["eval/<key>"] is to be compared with, as (name, value).

    That of the recordings through all but the network ("at best"), that against another sample's prompt, and
    that of each language and voice.
    """
    names = {f"eval/{key}_vocoded": "at best", f"eval/{key}_shuffled": "shuffled prompts"}
    for name in values:
        if name.startswith(f"eval/{key}/"):
            names[name] = name.split("/")[2]
    return [(shown, values[name]) for name, shown in names.items() if name in values]


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Word errors of a hypothesis; both texts are already normalised, either may be empty.

    returns: substitutions + deletions + insertions, and the number of words in the reference.
    """
    import jiwer

    alignment = jiwer.process_words(reference, hypothesis)
    errors = alignment.substitutions + alignment.deletions + alignment.insertions
    return errors, len(alignment.references[0])


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Corpus WER of (reference, hypothesis) pairs: all errors over all words, not a mean of ratios.

    NaN without words.
    """
    total_errors = 0
    total_words = 0
    for reference, hypothesis in pairs:
        errors, words = word_errors(reference, hypothesis)
        total_errors += errors
        total_words += words
    return total_errors / total_words if total_words else math.nan


def bootstrap_interval(
    errors: list[int], words: list[int], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(words), by drawing utterances with replacement.

    NaN without utterances.
    """
    n = len(errors)
    if n == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    utterances = rng.integers(n, size=(draws, n))
    n_errors = np.array(errors)[utterances].sum(1)  # (draws,)
    n_words = np.array(words)[utterances].sum(1)
    rates = n_errors / np.maximum(n_words, 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def mel_cepstral_distortion(log_mel_a: np.ndarray, log_mel_b: np.ndarray, order: int = 13) -> float:
    """Distance in dB of the spectral envelopes of two log-mels (T, M), (S, M), time-warped.

    Our cepstra are not WORLD's or SPTK's: compare it with itself only, never with published figures. Scaled
    as the classical formula, 10 / ln 10 sqrt(2 sum d^2) (Kubichek 1993; Sakoe, Chiba 1978).
    """
    a = cepstra(log_mel_a, order)
    b = cepstra(log_mel_b, order)
    distance = np.sqrt(2 * squared_distances(a, b))  # (T, S)
    return warped_mean(10 / math.log(10) * distance)


def cepstra(log_mel: np.ndarray, order: int) -> np.ndarray:
    """c1 to c_order (T, order) of a log-mel (T, M), by the DCT-II."""
    n_mels = log_mel.shape[1]
    bins = np.arange(n_mels) + 0.5
    orders = np.arange(1, order + 1)
    angles = np.pi / n_mels * np.outer(bins, orders)
    dct = np.cos(angles) * 2 / n_mels  # (M, order)
    return log_mel.astype(float) @ dct


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (n, m) of rows (n, D) and (m, D)."""
    a = a.astype(float)
    b = b.astype(float)
    norms_a = np.square(a).sum(1)[:, None]  # (n, 1)
    norms_b = np.square(b).sum(1)  # (m,)
    squares = norms_a + norms_b - 2 * a @ b.T
    return squares.clip(0)  # rounding leaves some below 0


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two sets of features (n, D), (m, D) taken as Gaussians.

    |mean - mean|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances (Heusel et al. 2017).
    """
    mean_a, covariance_a = gaussian(a)
    mean_b, covariance_b = gaussian(b)
    # Real and from 0 on, for they are of a product of two positive semi-definite matrices
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real.clip(0)
    mean_term = np.square(mean_a - mean_b).sum()
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(mean_term + traces - 2 * np.sqrt(eigenvalues).sum())


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (n, D)."""
    features = features.astype(float)
    covariance = np.cov(features, rowvar=False)
    return features.mean(0), covariance.reshape(features.shape[1], -1)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KAD: 100 times the unbiased squared MMD of features (n, D) to real ones (m, D).

    The kernel is Gaussian, as wide as the median distance between two real ones (Chung et al. 2025, arXiv
    2502.15602). Below 0 by chance where the two sets are alike.
    """
    pairs = np.triu_indices(len(b), 1)
    width = 2 * np.median(squared_distances(b, b)[pairs])
    within = mean_kernel_within(a, width) + mean_kernel_within(b, width)
    between = gaussian_kernel(a, b, width).mean()
    return float(100 * (within - 2 * between))


def mean_kernel_within(features: np.ndarray, width: float) -> float:
    """Over all pairs of two different rows of features (n, D)."""
    n = len(features)
    total = gaussian_kernel(features, features, width).sum()
    return (total - n) / (n * (n - 1))


def gaussian_kernel(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-squared_distances(a, b) / width)


def inception_score(shares: np.ndarray) -> float:
    """exp of the mean KL divergence of class probabilities (n, K) from their mean: 1 to K.

    Salimans et al. 2016.
    """
    shares = shares.astype(float).clip(1e-16)
    log_ratios = np.log(shares) - np.log(shares.mean(0))
    divergences = (shares * log_ratios).sum(1)  # (n,)
    return float(np.exp(divergences.mean()))


def recall_at(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of the rows of similarity (n, m) whose k greatest include a right one; right (n, m) bool."""
    best_right = np.where(right, similarity, -np.inf).max(1, keepdims=True)  # (n, 1)
    n_above = (similarity > best_right).sum(1)
    return float((n_above < k).mean())


def warped_mean(distance: np.ndarray) -> float:
    """Mean of distance (T, S) along the cheapest monotonic path between its corners; NaN if a side is empty.

    Anti-diagonal by anti-diagonal, for the cells of one depend only on those of the two before it.
    """
    rows, columns = distance.shape
    if rows == 0 or columns == 0:
        return math.nan
    flipped = distance[:, ::-1]  # its diagonals are the anti-diagonals
    # At index row + 1, for the last anti-diagonal and the one before: cost and cells of the cheapest path
    cost = np.full(rows + 1, np.inf)
    cost_before = np.full(rows + 1, np.inf)
    length = np.zeros(rows + 1)
    length_before = np.zeros(rows + 1)
    cost_before[0] = 0
    for d in range(rows + columns - 1):
        low = max(0, d - columns + 1)
        high = min(rows, d + 1)
        here = slice(low + 1, high + 1)
        above = slice(low, high)
        from_both = cost_before[above]
        from_above = cost[above]
        from_left = cost[here]
        cheapest = np.minimum(from_both, np.minimum(from_above, from_left))
        steps = np.where(cheapest == from_above, length[above], length[here])
        steps = np.where(cheapest == from_both, length_before[above], steps)
        cost_before = cost
        length_before = length
        cost = np.full(rows + 1, np.inf)
        cost[here] = cheapest + flipped.diagonal(columns - 1 - d)
        length = np.zeros(rows + 1)
        length[here] = steps + 1
    return float(cost[rows] / length[rows])


# The log


class Writer:
    """One JSON line a call in <out_dir>/metrics.jsonl, and the same to W&B."""

    def __init__(self, out_dir: str, config: dict, wandb_mode: str, project: str, url: str, resume_step: int):
        """wandb_mode: offline (files in <out_dir>/wandb) | online | disabled.

        url: of a W&B server of one's own, or "".
        resume_step: later lines are dropped and the W&B run goes on; 0 begins both anew.
        """
        out = Path(out_dir)
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        rows = read_lines(path) if resume_step > 0 else []
        lines = [json.dumps(row) + "\n" for row in rows if row.get("step", 0) <= resume_step]
        write_atomically(path, "".join(lines))
        self.file = path.open("a", encoding="utf-8")  # noqa: SIM115  (open for as long as the run lasts)
        self.run = None
        if wandb_mode != "disabled":
            self.run = start_wandb(out, config, wandb_mode, project, url, resume_step > 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: numbers, or strings such as a recogniser's name; NaN and infinity are null in the file."""
        logged = {}
        row = {"step": step}
        for key, value in values.items():
            if not isinstance(value, (str, int)):
                value = float(value)
            logged[key] = value
            is_finite = not isinstance(value, float) or math.isfinite(value)
            row[key] = value if is_finite else None
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.run:
            self.run.log(logged, step=step)

    def media(self, step: int, name: str, paths: list[Path]) -> None:
        """Hand wavs and pngs to W&B; on disk they already are."""
        if not self.run:
            return
        import wandb

        kinds = {".wav": wandb.Audio, ".png": wandb.Image}
        files = [kinds[Path(path).suffix](str(path)) for path in paths]
        self.run.log({name: files}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.run:
            self.run.finish()


def start_wandb(out: Path, config: dict, mode: str, project: str, url: str, resumed: bool):
    """A silent W&B run; its id is kept in <out>/wandb_id, so that a resumed run is the same run there."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it calls home even when offline
    import wandb

    known_id = read_text(out / "wandb_id").strip() if resumed else ""
    server = {"base_url": url} if url else {}
    try:
        run = wandb.init(
            project=project,
            dir=str(out),
            config=config,
            mode=mode,
            id=known_id or None,
            resume="allow",
            settings=wandb.Settings(console="off", **server),
        )
    except (wandb.errors.Error, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"W&B did not start ({reason}): fix it, or --wandb offline") from e
    write_atomically(out / "wandb_id", run.id + "\n")
    return run


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> list[dict]:
    """JSON objects, one a line; a line that a crash has torn is passed over."""
    rows = []
    for line in read_text(path).split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


# Pictures


def spectrogram_png(log_mel: np.ndarray, path: str, mel: Mel) -> None:
    """Draw log_mel (T, M), natural log, in the same colours for every clip.

    Seconds across, kHz up on the mel scale.
    """
    n_frames, n_mels = log_mel.shape
    seconds = n_frames * mel.hop / mel.sample_rate
    axes = picture_axes(4.6, 1.9, "s", "kHz")
    extent = (0, seconds, 0, n_mels)
    quietest = math.log(1e-5)
    show_matrix(axes, log_mel.T, extent, "magma", quietest, 2)
    rows = rows_of_khz(mel, n_mels)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.figure.savefig(path, transparent=True)


def rows_of_khz(mel: Mel, n_mels: int) -> dict[str, float]:
    """At which rows of a picture with n_mels rows round frequencies are."""
    lowest = slaney_mel(mel.fmin)
    highest = slaney_mel(mel.fmax)
    rows = {}
    for khz in ("0.5", "1", "2", "4", "6", "10", "16"):
        hz = 1000 * float(khz)
        height = (slaney_mel(hz) - lowest) / (highest - lowest)
        row = height * (n_mels + 1) - 0.5
        if 0 <= row <= n_mels:
            rows[khz] = row
    return rows


def attention_png(weights: np.ndarray, text: str, path: str, seconds: float = 0) -> None:
    """Draw weights (frames, bytes): which byte of `text` each frame looks at.

    Bytes across, time up, in seconds where the length is given.
    """
    from matplotlib.colors import LinearSegmentedColormap

    n_frames, n_bytes = weights.shape
    left = -0.5
    right = n_bytes - 0.5
    top = seconds or n_frames
    ink = LinearSegmentedColormap.from_list("ink", [BLUE + "00", BLUE + "ff"])
    strongest = np.median(weights.max(1))
    axes = picture_axes(9.2, 1.9, "", "s" if seconds else "frames")
    show_matrix(axes, weights, (left, right, 0, top), ink, 0, strongest)
    labels = byte_labels(text) + [""] * n_bytes  # an end token has no letter
    labels = labels[:n_bytes]
    font_size = min(8, 880 / n_bytes)
    axes.set_xticks(range(n_bytes), labels, fontsize=font_size, parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.figure.savefig(path, transparent=True)


def byte_labels(text: str) -> list[str]:
    """A label for each byte of a text: a character at its first byte, nothing at the others."""
    labels = []
    for character in text:
        labels.append(character if character.isprintable() else "")
        n_more = len(character.encode()) - 1
        labels += [""] * n_more
    return labels


def show_matrix(axes, matrix: np.ndarray, extent: tuple, colours, low: float, high: float) -> None:
    """A matrix as a picture, its first row at the bottom. extent: left, right, bottom, top."""
    matrix = np.asarray(matrix, np.float32)
    axes.imshow(matrix, colours, extent=extent, vmin=low, vmax=high, origin="lower", aspect="auto")


def slaney_mel(hz: float) -> float:
    """Slaney's mel scale, as audio.mel_filters: linear to 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def picture_axes(width: float, height: float, x_label: str, y_label: str):
    """Axes on a bare Agg canvas, without pyplot's global state; grey labels, legible on any background."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label, color=GREY, fontsize=8, loc="right", labelpad=0)
    axes.set_ylabel(y_label, color=GREY, fontsize=8)
    return axes


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    colour: str
    points: np.ndarray  # (2, n): x and y


class Chart(NamedTuple):
    """A chart as the report shows it; svg is an <svg> element."""

    title: str
    note: str
    svg: str


def chart(
    title: str,
    note: str,
    lines: list[Line],
    zero: bool = False,
    band: tuple[np.ndarray, ...] = (),
    x_label: str = "step",
) -> Chart | None:
    """Draw lines, the long ones smoothed over their faint raw selves; returns None where no line has a point.

    zero: the axis begins at zero; else it is logarithmic where the values span enough for that.
    band: two lines (2, n), the space between which is shaded.
    """
    lines = [line for line in lines if line.points.size]
    if not lines:
        return None
    axes = picture_axes(5.2, 2.7, x_label, "")
    drawn = [draw_line(axes, line, x_label == "step") for line in lines]
    if band and band[0].shape == band[1].shape:
        x, low = band[0]
        high = band[1][1]
        axes.fill_between(x, low, high, color=lines[0].colour, alpha=0.2, linewidth=0)
    style_axes(axes, np.concatenate(drawn), zero)
    return Chart(title, note, inline_svg(axes, f"{title}: {note}"))


def draw_line(axes, line: Line, with_last_value: bool) -> np.ndarray:
    """Draw a line of a chart; returns its y (n,). A long one is smoothed and drawn by about 500 points."""
    x, y = line.points
    n = x.size
    some = slice(None, None, n // 500 + 1)
    marker = "o"
    if n > 100:
        axes.plot(x[some], y[some], color=line.colour, alpha=0.25, linewidth=0.8)
        y = smoothed(y, n // 40)
        marker = ""
    label = line.name
    if with_last_value:
        label += f" {short_number(y[-1])}"
    axes.plot(x[some], y[some], color=line.colour, label=label, marker=marker, markersize=3)
    return y


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of y (n,) over `width` points around each, of fewer at the ends."""
    box = np.ones(width)
    counts = np.convolve(np.ones(y.size), box, "same")
    return np.convolve(y, box, "same") / counts


def style_axes(axes, values: np.ndarray, zero: bool) -> None:
    """Scale, ticks, grid and legend of a chart with these y values."""
    low = np.nanmin(values)
    high = np.nanmax(values)
    if zero:
        axes.set_ylim(0)
    elif 0 < low < high / 4:
        axes.set_yscale("log", subs=(2, 5))
        axes.set_ylim(0.9 * low, 1.1 * high)
    axes.xaxis.set_major_formatter(short_number)
    axes.yaxis.set_major_formatter(short_number)
    axes.yaxis.set_minor_formatter(short_number)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", which="both", color=GREY, alpha=0.25, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def short_number(value: float, position: int | None = None) -> str:
    """A number on a chart, 12k for 12,000; `position` is what matplotlib hands to a formatter."""
    return f"{value / 1000:.4g}k" if value >= 1000 else f"{value:.4g}"


def inline_svg(axes, label: str) -> str:
    """The axes as an <svg> element that takes font and text colour from the page around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        axes.figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = svg.split("<svg", 1)[1].split(">", 1)[1]
    useless = r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\""
    svg = re.sub(useless, "", svg, flags=re.DOTALL)
    # The ids of all charts are in one page: only those that are referred to stay
    ids = re.findall(r' id="([\w.-]+)"', svg)
    used_ids = re.findall(r"#([\w.-]+)", svg)
    for name in set(ids) - set(used_ids):
        svg = svg.replace(f' id="{name}"', "")
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return f'<svg role="img" aria-label="{escape(label)}" {view_box}>{svg}'


# The report


def write_report(out_dir: str, shown: int = 8) -> Path:
    """Write <out_dir>/report.html: one page, with sounds and pictures of `shown` samples in it.

    The template says how it looks; the functions that it calls are put into `content`.
    """
    out = Path(out_dir)
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the out_dir of a run")
    try:
        run = json.loads(read_text(out / "run.json") or "{}")
    except ValueError as e:
        raise UserError(f"{out / 'run.json'}: not JSON ({e}); fix or delete it") from e
    config = read_text(out / "config.yaml")
    system = re.search(r"^system:\s*(\S+)", config, re.MULTILINE)
    metrics = [row for row in read_lines(out / "metrics.jsonl") if "step" in row]
    origin = {"command": run.get("command"), "commit": run.get("commit")} | (run.get("versions") or {})
    content = {
        "title": f"{system[1] if system else 'nanoaudio'} · {out.resolve().name}",
        "facts": headline(metrics, run),
        "newest": newest_values(metrics),
        "charts": all_charts(metrics),
        "origin": {name: value for name, value in origin.items() if value},
        "config": config,
        **newest_evaluation(out, shown),
    }
    content |= {"SCORES": SCORES, "percent": percent, "with_unit": with_unit}
    content |= {"wer_notes": wer_notes, "score_notes": score_notes, "remarks": remarks}
    content |= {"compared": compared, "data_uri": data_uri}
    template = PAGE.read_text(encoding="utf-8")
    template = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_atomically(out / "report.html", template.render(content))
    return out / "report.html"


def newest_evaluation(out: Path, shown: int) -> dict:
    """The newest evaluation of a run, as the template shows it: `shown` samples, and a table of all."""
    folders = {}
    for path in out.glob("eval/step_*/samples.jsonl"):
        folders[int(path.parent.name.removeprefix("step_"))] = path.parent
    if not folders:
        return {}
    step = max(folders)
    folder = folders[step]
    entries = read_lines(folder / "samples.jsonl")
    known = newest_values(entries)
    return {
        "step": step,
        "folder": folder,
        "samples": entries[:shown],
        "summaries": sorted(folder.glob("summary*.png")),
        "worst_first": worst_first(entries),
        "known": known,
        "measured": [key for key in SCORES if key in known],
    }


def headline(metrics: list[dict], run: dict) -> list[str]:
    """Length, size, hardware and start of a run: what is known of them."""
    steps = metrics[-1]["step"] if metrics else None
    minutes = newest_values(metrics).get("perf/train_minutes")
    size = run.get("parameters")
    if isinstance(size, int):
        size = f"{size / 1e6:,.1f} M parameters"
    facts = [
        f"{steps:,} steps" if metrics else "",
        f"{minutes:,.1f} minutes of training" if minutes else "",
        size,
        run.get("hardware"),
        run.get("started"),
    ]
    return [str(fact) for fact in facts if fact]


def wer_notes(newest: dict) -> list[str]:
    """How sure the word error rate is, and whose it is."""
    notes = []
    if "eval/wer_low" in newest:
        low = percent(newest["eval/wer_low"])
        high = percent(newest.get("eval/wer_high"))
        notes.append(f"95 % interval {low} to {high}")
    if "eval/recogniser" in newest:
        notes.append(f"transcribed by {newest['eval/recogniser']}")
    return notes


def score_notes(newest: dict, key: str) -> list[str]:
    """What a score is, and what it is to be compared with."""
    notes = [f"{name}: {with_unit(key, value)}" for name, value in compared_with(newest, key)]
    return [SCORES[key].note, *notes]


def remarks(entry: dict) -> list[str]:
    """What the scores of a line of samples.jsonl say, in words."""
    said = []
    errors = entry.get("errors")
    if errors == 0:
        said.append("every word right")
    elif errors is not None:
        plural = "" if errors == 1 else "s"
        said.append(f"{errors} error{plural} in {entry.get('words')} words")
    missed = []
    values = []
    for key, score in SCORES.items():
        value = entry.get(key)
        if value is not None and not score.match:
            values.append(f"{score.title} {with_unit(key, value)}")
        elif value is not None and value < 1:
            missed.append(key.removesuffix("_match").replace("_", " by "))
    if missed:
        said.append(f"not as asked for: {', '.join(missed)}")
    return said + values


def worst_first(entries: list[dict]) -> list[dict]:
    """Lines of samples.jsonl by their word error rate, then by whether all is as asked for."""

    def goodness(entry: dict) -> tuple[float, float]:
        errors = entry.get("errors") or 0
        words = entry.get("words") or 0
        return -errors / max(words, 1), entry.get("all_match") or 0

    return sorted(entries, key=goodness)


def compared(text: str, transcript: str, errors: int | None) -> list[tuple[str, str]]:
    """A transcript beside the text, in pieces (kind, words).

    kind: "right", "wrong" (in the transcript only) or "missing" (in the text only). Case and punctuation do
    not count. errors: as counted; where it is 0, all is right.
    """

    def plain(word: str) -> str:
        return re.sub(r"[\W_]", "", word.casefold())

    said = [word for word in text.split() if plain(word)]
    heard = [word for word in transcript.split() if plain(word)]
    if errors == 0 or not said:
        return [("right", transcript)]
    import jiwer

    reference = " ".join(map(plain, said))
    hypothesis = " ".join(map(plain, heard))
    pieces = []
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        text_words = " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx])
        transcript_words = " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("right", transcript_words))
        if chunk.type in ("delete", "substitute"):
            pieces.append(("missing", text_words))
        if chunk.type in ("insert", "substitute"):
            pieces.append(("wrong", transcript_words))
    return pieces


def data_uri(folder: Path, name: str | None) -> str:
    """A wav or png of a folder inside a URI; "" where there is none."""
    path = folder / (name or "")
    if not path.is_file():
        return ""
    media_type = {".wav": "audio/wav", ".png": "image/png"}[path.suffix]
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{media_type};base64,{content}"


def all_charts(metrics: list[dict]) -> list[Chart]:
    """Losses, word error rate with its floors, loss by t, scores, throughput: those that the run logged."""
    newest = newest_values(metrics)
    has_flow = "train/flow_loss" in newest or "val/flow_loss" in newest
    loss = ("Flow loss", "flow_loss") if has_flow else ("Loss", "loss")
    charts = [
        loss_chart(metrics, *loss),
        loss_chart(metrics, "Duration loss", "duration_loss"),
        word_error_chart(metrics, newest),
        loss_by_t_chart(metrics),
        *[score_chart(metrics, newest, key) for key in SCORES],
        throughput_chart(metrics),
    ]
    return [drawn for drawn in charts if drawn]


def loss_chart(metrics: list[dict], title: str, key: str) -> Chart | None:
    training = Line("training", BLUE, series(metrics, f"train/{key}"))
    validation = Line("validation", ORANGE, series(metrics, f"val/{key}"))
    return chart(title, "training is smoothed", [training, validation])


def word_error_chart(metrics: list[dict], newest: dict) -> Chart | None:
    rates = series(metrics, "eval/wer", 100)
    low = series(metrics, "eval/wer_low", 100)
    high = series(metrics, "eval/wer_high", 100)
    lines = [
        Line("generated", BLUE, rates),
        level("vocoded", ORANGE, rates, newest.get("eval/wer_vocoded"), 100),
        level("recordings", GREY, rates, newest.get("eval/wer_ground_truth"), 100),
    ]
    return chart("Word error rate, %", "shaded: 95 % interval", lines, zero=True, band=(low, high))


def loss_by_t_chart(metrics: list[dict]) -> Chart | None:
    """The validation loss in each of ten bins of t, as first and as last measured."""
    centres = np.arange(10) / 10 + 0.05
    lines = []
    for row in metrics:
        losses = [row.get(f"val/flow_loss_t{i}") for i in range(10)]
        losses = np.array(losses, float)  # None becomes NaN
        if np.isnan(losses).all():
            continue
        colour = BLUE if lines else GREY
        points = np.stack([centres, losses])
        line = Line(f"step {row['step']:,}", colour, points)
        lines = [*lines[:1], line]
    return chart("Validation loss by t", "0 is data, 1 is noise", lines, zero=True, x_label="t")


def score_chart(metrics: list[dict], newest: dict, key: str) -> Chart | None:
    """A score beside the first two that it is to be compared with."""
    score = SCORES[key]
    title = score.title.capitalize()
    if score.unit:
        title += f", {score.unit}"
    scale = 100 if score.unit == "%" else 1
    values = series(metrics, f"eval/{key}", scale)
    lines = [Line("generated", BLUE, values)]
    colours = (ORANGE, GREY)
    for colour, (name, value) in zip(colours, compared_with(newest, key)):
        line = level(name, colour, values, value, scale)
        lines.append(line)
    return chart(title, "", lines, zero=True)


def throughput_chart(metrics: list[dict]) -> Chart | None:
    speed = Line("smoothed", BLUE, series(metrics, "perf/frames_per_sec"))
    step_ms = series(metrics, "perf/step_ms")[1]
    pace = f"{np.median(step_ms):,.0f} ms a step, the median" if step_ms.size else ""
    return chart("Throughput, frames/s", pace, [speed], zero=True)


def level(name: str, colour: str, over: np.ndarray, value: float | None, scale: float) -> Line:
    """A line at `scale` times a value, at the steps of the line `over` (2, n); empty if there is no value."""
    if value is None:
        return Line(name, colour, np.zeros((2, 0)))
    steps = over[0]
    heights = np.full_like(steps, scale * value)
    return Line(name, colour, np.stack([steps, heights]))


def series(metrics: list[dict], key: str, scale: float = 1) -> np.ndarray:
    """(2, n): the steps and `scale` times the values of the rows that have a number under `key`."""
    points = []
    for row in metrics:
        if isinstance(row.get(key), (int, float)):
            points.append((row["step"], scale * row[key]))
    return np.array(points, float).reshape(-1, 2).T


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python metric.py OUT_DIR")
    print(write_report(sys.argv[1]))


if __name__ == "__main__":
    run_main(main)
