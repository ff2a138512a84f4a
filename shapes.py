"""Drawn shapes: how the pictures of data.corpus shapes are drawn and described, and a rule that reads them again.

Top-down: the rule, the drawing, the words. A combination (c, s, p) numbers a colour, a shape and a place of KINDS, whose words, colours
and centres are in assets/shapes.yaml. Lengths are in pixels of a picture of SIDE x SIDE, whatever size it has. Nothing here learns:
the rule knows how shapes are drawn, and has never seen a picture that was made of them.
"""

import functools
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml

SHAPES = yaml.safe_load(Path(__file__).with_name("assets").joinpath("shapes.yaml").read_text(encoding="utf-8"))
KINDS = list(SHAPES["attributes"].values())                    # colours, shapes, places
COMBINATIONS = list(np.ndindex(*map(len, KINDS)))              # 120 of them
NEW = {(c, (c + p) % 4, p) for c, _, p in COMBINATIONS if (c + 2 * p) % 3}     # 20 never trained on, but all their pairs are

SIDE = 32
FINE = 4                             # points a pixel, across and down
POINTS = (np.arange(SIDE * FINE) + 0.5) / FINE                 # where they are
RADIUS = (5.0, 6.5)                  # between which sizes are drawn
JITTER = 1.5                         # by how much a centre varies, across and down
GROUND = 0.15                        # the brightest background
TINT = 0.05                          # by how much a colour varies

CORE = 0.02                          # share of a picture that surely is object: the smallest one covers 4 %
LEAST_CONTRAST = 0.4                 # distance of object and background in RGB; those drawn are 0.55 or more apart
LEAST_OVERLAP = 0.6                  # with a drawn shape; between a circle and a square of its size it is 0.83
GROUND_MARGIN = 0.1                  # by how much a background may be brighter than those drawn
RADIUS_MARGIN = 0.5                  # by how much a radius may be beyond those drawn


# The rule

class Seen(NamedTuple):
    """Names from KINDS; None for what is like nothing that is drawn."""
    colour: str | None
    shape: str | None
    place: str | None


NOTHING = Seen(None, None, None)


def matches(picture: torch.Tensor, label: str) -> dict[str, float]:
    """Scores, keys of metric.SCORES: 1 where the rule sees in a picture (3, H, W) what its label says, as red-circle-left, else 0."""
    seen = look(picture)
    wanted = Seen(*label.split("-"))
    return {"all_rule": float(seen == wanted),
            "colour_rule": float(seen.colour == wanted.colour),
            "shape_rule": float(seen.shape == wanted.shape),
            "place_rule": float(seen.place == wanted.place)}


def look(picture: torch.Tensor) -> Seen:
    """What a picture (3, H, W) in [0, 1] shows.

    The background is each channel's median. The object is what differs from it by more than half as much as its core does, the
    farthest 2 % of the picture. Its colour is the drawn one nearest to the core's median, its place the drawn one nearest to its
    centroid, its shape the one that overlaps it most when drawn with its centroid and its area. A colour or a place that is nearer to
    the middle between two than to one is none of them. Without an object that is clear, and alone, nothing is seen.
    """
    grid = (SIDE * FINE, SIDE * FINE)
    fine = F.interpolate(picture[None].float().cpu(), grid, mode="bicubic", antialias=True)
    points = fine[0].flatten(1).T                                                  # (points, 3)
    ground = points.median(0).values
    distance = (points - ground).norm(dim=1)
    core = distance.topk(round(CORE * len(distance))).indices
    contrast = distance[core].median()
    if ground.max() > GROUND + GROUND_MARGIN or contrast < LEAST_CONTRAST:
        return NOTHING

    mask = (distance > contrast / 2).view(grid).numpy()
    overlaps = [overlap(mask, shape) for shape in range(len(KINDS[1]))]
    if max(overlaps) < LEAST_OVERLAP:
        return NOTHING
    colour = nearest(points[core].median(0).values.numpy(), SHAPES["rgb"])
    place = nearest(centroid(mask), SHAPES["centres"])
    return Seen(None if colour is None else KINDS[0][colour],
                KINDS[1][int(np.argmax(overlaps))],
                None if place is None else KINDS[2][place])


def overlap(mask: np.ndarray, shape: int) -> float:
    """Intersection over union of a mask, bool at every point, and a shape of its area and centroid, no larger or smaller than any drawn."""
    unit_area, unit_centre = measured(shape)
    radius = np.clip(np.sqrt(mask.mean() / unit_area), RADIUS[0] - RADIUS_MARGIN, RADIUS[1] + RADIUS_MARGIN)
    x, y = centroid(mask) - radius * unit_centre
    drawn = inside(shape, x, y, radius)
    return (mask & drawn).sum() / (mask | drawn).sum()


@functools.cache
def measured(shape: int) -> tuple[float, np.ndarray]:
    """Of a shape of radius 1: its share of the picture, and its centroid (x, y) from its centre."""
    radius = RADIUS[1]
    drawn = inside(shape, SIDE / 2, SIDE / 2, radius)
    return drawn.mean() / radius ** 2, (centroid(drawn) - SIDE / 2) / radius


def centroid(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the points of a mask."""
    return np.array([mask.sum(0) @ POINTS, mask.sum(1) @ POINTS]) / mask.sum()


def nearest(value: np.ndarray, known: list) -> int | None:
    """Which of the known (n, D) is nearest to a value (D,), if that is nearer than half of the way between any two of them."""
    known = np.array(known, float)
    apart = np.linalg.norm(known[:, None] - known, axis=-1)
    distance = np.linalg.norm(known - value, axis=-1)
    best = int(distance.argmin())
    return best if distance[best] < apart[apart > 0].min() / 2 else None


# The drawing

def draw(combination: tuple[int, int, int], seed: int) -> np.ndarray:
    """(32, 32, 3) in [0, 1]; place, size, tint and background vary a little."""
    c, s, p = combination
    rng = np.random.default_rng(seed)
    x, y = SHAPES["centres"][p] + rng.uniform(-JITTER, JITTER, 2)
    radius = rng.uniform(*RADIUS)
    share = inside(s, x, y, radius).reshape(SIDE, FINE, SIDE, FINE).mean((1, 3))[..., None]
    ground = rng.uniform(0, GROUND, 3)
    colour = SHAPES["rgb"][c] + rng.uniform(-TINT, TINT, 3)
    return (ground * (1 - share) + colour * share).clip(0, 1)


def inside(shape: int, x: float, y: float, radius: float) -> np.ndarray:
    """Which points are inside a shape around (x, y), (128, 128) bool, FINE x FINE of them a pixel."""
    u = (POINTS - x) / radius
    v = (POINTS[:, None] - y) / radius
    if shape == 0:                                             # circle
        return u ** 2 + v ** 2 < 1
    if shape == 1:                                             # square
        return np.maximum(abs(u), abs(v)) < 0.85
    if shape == 2:                                             # triangle
        return (abs(u) < 0.55 * (v + 1)) & (v < 0.8)
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)     # cross


# The words

def describe(language: str, combination: tuple[int, int, int], rng: random.Random) -> str:
    """A sentence that says a combination, in one of the language's patterns."""
    words = SHAPES[language]
    c, s, p = combination
    feminine = language == "ar" and s == 0
    colours = words["colours_feminine"] if feminine else words["colours"]
    return rng.choice(words["patterns"]).format(colour=colours[c], shape=words["shapes"][s], place=words["places"][p])
