"""Scores: pure functions of words and arrays, and how their values are written for reading.

Source of each at its function. Systems declare which of them they have: `base.System.scores`.
`python metric.py OUT_DIR` writes the report of a run again (tracking/report.py).
"""

import math
from typing import NamedTuple

import numpy as np

from config import BOUND, run_main


class Score(NamedTuple):
    """How a score is shown: the mean over the samples, or one figure of the whole set. Systems declare theirs."""

    title: str
    unit: str = ""
    note: str = ""
    is_match: bool = False  # 1 where a sample is as its prompt asks, else 0: at chance beside another prompt
    of_outputs: bool = False  # a figure of the set that references have too: what is best possible


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
    return dtw_mean_distance(10 / math.log(10) * distance)


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


def recall_at_k(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of the rows of similarity (n, m) whose k greatest include a right one; right (n, m) bool."""
    best_right = np.where(right, similarity, -np.inf).max(1, keepdims=True)  # (n, 1)
    n_above = (similarity > best_right).sum(1)
    return float((n_above < k).mean())


def dtw_mean_distance(distance: np.ndarray) -> float:
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


if __name__ == "__main__":
    from tracking import report

    run_main(report.main)
