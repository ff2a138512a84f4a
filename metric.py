"""Scores: pure functions of words and arrays, and how their values are written for reading.

Source of each at its function. Systems declare which of them they have: `base.System.scores`.
`python metric.py OUT_DIR` writes the report of a run again (tracking/report.py).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from config import BOUND
from entry import run_main


class Score(NamedTuple):
    """How a score, the mean over the samples or one figure of the whole set, is shown."""

    title: str
    unit: str = ""
    note: str = ""
    is_match: bool = False  # 1 where a sample is as its prompt asks, else 0: at chance beside another prompt
    of_outputs: bool = False  # a figure of the set that references have too: what is best possible


# Of the rows of an evaluation, the lines of samples.jsonl


def word_error_scores(rows: list[dict]) -> dict[str, float]:
    """The word error rate and its 95 % interval; rows whose text has no words are counted instead."""
    spoken = [row for row in rows if row["words"]]
    scores = {"no_words": len(rows) - len(spoken)}
    if spoken:
        errors = [row["errors"] for row in spoken]
        words = [row["words"] for row in spoken]
        scores["wer"] = sum(errors) / sum(words)
        low, high = bootstrap_interval(errors, words)
        scores["wer_low"] = low
        scores["wer_high"] = high
    return scores


def mean_scores(rows: list[dict], scores: dict[str, Score]) -> dict[str, float]:
    """The mean of each score, and of its shuffled control, over the rows that have it."""
    means = {}
    for score in scores:
        for key in (score, f"{score}_shuffled"):
            values = [row[key] for row in rows if row.get(key) is not None]
            if values:
                means[key] = sum(values) / len(values)
    return means


def match_rates_by_group(rows: list[dict], scores: dict[str, Score]) -> dict[str, float]:
    """How often all was as asked for, by the words of the clips' groups, if there are several.

    all_match/en is that of the clips with the word en in their group; all_rule/en is the same by the rule.
    """
    rows_of = {}
    for row in rows:
        group = row.get("group") or ""
        for word in set(group.split()):
            rows_of.setdefault(word, []).append(row)
    if len(rows_of) < 2:
        return {}
    rates = {}
    for word in sorted(rows_of):
        means = mean_scores(rows_of[word], scores)
        for key in ("all_match", "all_rule"):
            if key in means:
                rates[f"{key}/{word}"] = means[key]
    return rates


# Of a run, for reading


def compare_expected(
    expected: dict[str, str], metrics: list[dict], scores: dict[str, Score]
) -> tuple[list[str], bool]:
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
        line = f"expected {name} {side} {format_metric(name, bound, scores)}:"
        value = newest.get(name)
        if value is None:
            lines.append(f"{line} not measured")
            continue
        distance = format_metric(name, abs(value - bound), scores)
        met = value <= bound if side == "at most" else value >= bound
        if not met:
            none_missed = False
        verdict = "met" if met else "missed"
        lines.append(f"{line} {verdict}, {format_metric(name, value, scores)}, by {distance}")
    return lines, none_missed


def format_metric(name: str, value: float, scores: dict[str, Score]) -> str:
    """A value of the metric eval/<score>, for reading."""
    key = name.removeprefix("eval/").split("/")[0]
    if key.startswith("wer"):
        return format_percent(value)
    if key in scores:
        return format_score(scores[key], value)
    return f"{value:.4g}"


def format_score(score: Score, value: float | None) -> str:
    """A value for reading, "5.43 dB"; "" for None."""
    if value is None:
        return ""
    return format_percent(value) if score.unit == "%" else f"{value:.3g} {score.unit}".strip()


def format_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def newest_values(metrics: list[dict]) -> dict:
    """The newest value of every metric that was ever measured."""
    newest = {}
    for row in metrics:
        newest |= {name: value for name, value in row.items() if value is not None}
    return newest


def reference_values(values: dict, key: str) -> list[tuple[str, float]]:
    """What the score values["eval/<key>"] is to be compared with, as (name, value).

    That of the recordings through all but the network ("at best"), that against another sample's prompt, and
    that of each language and voice.
    """
    metric = f"eval/{key}"
    at_best = values.get(f"{metric}_vocoded")
    shuffled = values.get(f"{metric}_shuffled")
    found = [("at best", at_best), ("shuffled prompts", shuffled)]
    for name, value in values.items():
        if name.startswith(f"{metric}/"):
            group = name.removeprefix(f"{metric}/")
            found.append((group, value))
    return [(name, value) for name, value in found if value is not None]


# Of words


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Word errors of a hypothesis; both texts are already normalised, either may be empty.

    returns: substitutions + deletions + insertions, and the number of words in the reference.
    """
    import jiwer

    found = jiwer.process_words(reference, hypothesis)
    errors = found.substitutions + found.deletions + found.insertions
    words = found.references[0]
    return errors, len(words)


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Corpus WER of (reference, hypothesis) pairs: all errors over all words, not a mean of ratios.

    Pairs whose reference has no words are left out. NaN without words.
    """
    total_errors = 0
    total_words = 0
    for reference, hypothesis in pairs:
        errors, words = word_errors(reference, hypothesis)
        if words:
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
    drawn = rng.integers(n, size=(draws, n))
    drawn_errors = np.array(errors)[drawn]  # (draws, n)
    drawn_words = np.array(words)[drawn]
    n_words = drawn_words.sum(1)
    rates = drawn_errors.sum(1) / np.maximum(n_words, 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


# Of a sound beside another


def mel_cepstral_distortion(log_mel_a: ndarray, log_mel_b: ndarray, order: int = 13) -> float:
    """Distance in dB of the spectral envelopes of two log-mels (T, M), (S, M), time-warped.

    Our cepstra are not WORLD's or SPTK's: compare it with itself only, never with published figures. Scaled
    as the classical formula, 10 / ln 10 sqrt(2 sum d^2) (Kubichek 1993; Sakoe, Chiba 1978).
    """
    a = cepstra(log_mel_a, order)
    b = cepstra(log_mel_b, order)
    squares = squared_distances(a, b)  # (T, S)
    distance = np.sqrt(2 * squares)
    in_db = 10 / math.log(10) * distance
    return dtw_mean_distance(in_db)


def cepstra(log_mel: ndarray, order: int) -> ndarray:
    """c1 to c_order (T, order) of a log-mel (T, M), by the DCT-II."""
    n_mels = log_mel.shape[1]
    bins = np.arange(n_mels) + 0.5
    orders = np.arange(1, order + 1)
    step = np.pi / n_mels
    angles = step * np.outer(bins, orders)
    dct = np.cos(angles) * 2 / n_mels  # (M, order)
    return log_mel.astype(float) @ dct


def dtw_mean_distance(distance: ndarray) -> float:
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
        cheapest = np.minimum(from_above, from_left)
        cheapest = np.minimum(cheapest, from_both)
        steps = np.where(cheapest == from_above, length[above], length[here])
        steps = np.where(cheapest == from_both, length_before[above], steps)
        cost_before = cost
        length_before = length
        cost = np.full(rows + 1, np.inf)
        cost[here] = cheapest + flipped.diagonal(columns - 1 - d)
        length = np.zeros(rows + 1)
        length[here] = steps + 1
    return float(cost[rows] / length[rows])


# Of sets


def frechet_distance(a: ndarray, b: ndarray) -> float:
    """Distance of two sets of features (n, D), (m, D) taken as Gaussians.

    |mean - mean|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances (Heusel et al. 2017).
    """
    mean_a, covariance_a = gaussian(a)
    mean_b, covariance_b = gaussian(b)
    # Real and from 0 on, for they are of a product of two positive semi-definite matrices
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b)
    roots = np.sqrt(eigenvalues.real.clip(0))
    mean_term = np.square(mean_a - mean_b).sum()
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(mean_term + traces - 2 * roots.sum())


def gaussian(features: ndarray) -> tuple[ndarray, ndarray]:
    """Mean (D,) and covariance (D, D) of features (n, D)."""
    features = features.astype(float)
    width = features.shape[1]
    covariance = np.cov(features, rowvar=False)
    covariance = covariance.reshape(width, width)  # a number where D is 1
    return features.mean(0), covariance


def kernel_distance(a: ndarray, b: ndarray) -> float:
    """KAD: 100 times the unbiased squared MMD of features (n, D) to real ones (m, D).

    The kernel is Gaussian, as wide as the median distance between two real ones (Chung et al. 2025, arXiv
    2502.15602). Below 0 by chance where the two sets are alike.
    """
    pairs = np.triu_indices(len(b), 1)
    between_real = squared_distances(b, b)[pairs]
    width = 2 * np.median(between_real)
    within = mean_kernel_within(a, width) + mean_kernel_within(b, width)
    between = gaussian_kernel(a, b, width).mean()
    return float(100 * (within - 2 * between))


def mean_kernel_within(features: ndarray, width: float) -> float:
    """Over all pairs of two different rows of features (n, D)."""
    n = len(features)
    total = gaussian_kernel(features, features, width).sum()
    return (total - n) / (n * (n - 1))


def gaussian_kernel(a: ndarray, b: ndarray, width: float) -> ndarray:
    distances = squared_distances(a, b)
    return np.exp(-distances / width)


def squared_distances(a: ndarray, b: ndarray) -> ndarray:
    """Squared Euclidean distances (n, m) of rows (n, D) and (m, D)."""
    a = a.astype(float)
    b = b.astype(float)
    norms_a = np.square(a).sum(1)[:, None]  # (n, 1)
    norms_b = np.square(b).sum(1)  # (m,)
    products = 2 * a @ b.T
    squares = norms_a + norms_b - products
    return squares.clip(0)  # rounding leaves some below 0


def inception_score(shares: ndarray) -> float:
    """exp of the mean KL divergence of class probabilities (n, K) from their mean: 1 to K.

    Salimans et al. 2016.
    """
    shares = shares.astype(float).clip(1e-16)
    mean_shares = shares.mean(0)
    log_ratios = np.log(shares) - np.log(mean_shares)
    divergences = (shares * log_ratios).sum(1)  # (n,)
    return float(np.exp(divergences.mean()))


def recall_at_k(similarity: ndarray, right: ndarray, k: int) -> float:
    """Share of the rows of similarity (n, m) whose k greatest include a right one; right (n, m) bool."""
    of_right = np.where(right, similarity, -np.inf)
    best_right = of_right.max(1, keepdims=True)  # (n, 1)
    n_above = (similarity > best_right).sum(1)
    found = n_above < k
    return float(found.mean())


if __name__ == "__main__":
    from tracking import report

    run_main(report.main)
