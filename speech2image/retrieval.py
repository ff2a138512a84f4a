"""Retrieval: how well speech finds its picture among all, and a picture of the space that both are in."""

from pathlib import Path

import numpy as np

import metric
from metric import Score
from tracking import plot


def recall_scores(name: str, title: str, of_outputs: bool = False) -> dict[str, Score]:
    """Recall among the first 1, 5 and 10, by keys: {"recall_1": Score("R@1 speech to picture", ...), ...}."""
    scores = {}
    for k in (1, 5, 10):
        note = f"the right one is among the first {k}"
        scores[f"{name}_{k}"] = Score(f"R@{k} {title}", "%", note, of_outputs=of_outputs)
    return scores


SCORES = {
    **recall_scores("recall", "speech to picture"),
    **recall_scores("recall_back", "picture to speech"),
    "cos_matched": Score("mean cosine similarity, matched pairs"),
    "cos_unmatched": Score("mean cosine similarity, unmatched pairs"),
    "modality_gap": Score("modality gap", "", "distance of the mean speech and the mean picture"),
    "language_gap": Score("gap between languages", "%", "best to worst, relative"),
}


def retrieval(f: dict[str, np.ndarray], kind: str) -> dict[str, float]:
    """Scores of the queries f[kind] (n, D) among the pictures f["image"] (n, D), by keys of SCORES.

    f["picture"] (n,): the picture's number; each is in the gallery once.
    f["label"] (n,): a picture is right for a query that has its label.
    f["group"] (n,): words by which R@1 is also told, the language first.
    """
    query = f[kind]
    image = f["image"]
    label = f["label"]
    _, first = np.unique(f["picture"], return_index=True)
    gallery = image[first]  # (m, D)
    similarity = query @ gallery.T  # (n, m)
    right = np.equal.outer(label, label[first])
    scores = {}
    for k in (1, 5, 10):
        scores[f"recall_{k}"] = metric.recall_at_k(similarity, right, k)
        scores[f"recall_back_{k}"] = metric.recall_at_k(similarity.T, right.T, k)
    matched = (query * image).sum(1)
    unmatched = similarity[~right]
    gap = query.mean(0) - gallery.mean(0)
    scores["cos_matched"] = float(matched.mean())
    if unmatched.size:
        scores["cos_unmatched"] = float(unmatched.mean())
    scores["modality_gap"] = float(np.linalg.norm(gap))
    scores |= recall_by_group(similarity, right, f["group"])
    return scores


def recall_by_group(similarity: np.ndarray, right: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """R@1 by each word that some, not all, of the queries' groups have; the gap between languages."""
    queries_of = {}
    languages = set()
    for query, group in enumerate(groups.tolist()):
        words = group.split()
        languages.update(words[:1])
        for word in words:
            queries_of.setdefault(word, []).append(query)
    recalls = {}
    for word in sorted(queries_of):
        queries = queries_of[word]
        if len(queries) < len(groups):
            recalls[word] = metric.recall_at_k(similarity[queries], right[queries], 1)
    scores = {f"recall_1/{word}": recall for word, recall in recalls.items()}
    compared = languages & recalls.keys()
    if len(compared) > 1:
        best = max(recalls[language] for language in compared)
        worst = min(recalls[language] for language in compared)
        if best > 0:
            scores["language_gap"] = 1 - worst / best
    return scores


def draw_embedding_space(queries: np.ndarray, pictures: np.ndarray, path: Path) -> None:
    """Draw queries and pictures, (n, D) each, along the two directions in which they differ most.

    A line joins each pair.
    """
    both = np.concatenate([queries, pictures])
    both = both.astype(float)
    centred = both - both.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    points = directions[:2] @ centred.T  # (2, 2 n)
    n = len(queries)
    asked = points[:, :n]
    shown = points[:, n:]
    axes = plot.picture_axes(4.6, 4.2, "", "")
    x, y = np.stack([asked, shown], 1)  # (2, n) each
    axes.plot(x, y, color=plot.GREY, alpha=0.25, linewidth=0.5)
    axes.scatter(*shown, s=9, color=plot.BLUE, label="recorded pictures")
    axes.scatter(*asked, s=9, color=plot.ORANGE, label="speech, or what was generated from it")
    axes.legend(frameon=False, labelcolor=plot.GREY, fontsize=8)
    axes.figure.savefig(path, transparent=True)
