"""Drawn shapes: the pictures of data.corpus shapes, their descriptions, and a rule that reads the pictures.

In this order: the rule, the drawing, the words. A combination (c, s, p) numbers a colour, a shape and a place
of ATTRIBUTES; shapes.yaml has their words, colours and centres. Lengths are in pixels of a picture of
SIDE x SIDE, whatever size it has. Nothing here is trained: the rule is derived from how shapes are drawn.
"""

import functools
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
import yaml
from matplotlib.image import imsave
from torch import Tensor
from tqdm import tqdm

import audio
from corpora import shards
from corpora.voice import speak_espeak
from speech2image.data import RATE

ASSET = Path(__file__).with_name("shapes.yaml")
SHAPES = yaml.safe_load(ASSET.read_text(encoding="utf-8"))
ATTRIBUTES = list(SHAPES["attributes"].values())  # colours, shapes, places
COMBINATIONS = list(np.ndindex(*map(len, ATTRIBUTES)))  # 120 of them
HELD_OUT = {
    (c, (c + p) % 4, p)  # 20 never trained on, but all their pairs are
    for c, _, p in COMBINATIONS
    if (c + 2 * p) % 3
}
TRAINED_ON = [combination for combination in COMBINATIONS if combination not in HELD_OUT]
PICTURES_PER_COMBINATION = 12  # to train on; one each to validate and to test on

SIDE = 32
FINE = 4  # points a pixel, across and down
POINTS = (np.arange(SIDE * FINE) + 0.5) / FINE  # where they are
RADIUS = (5.0, 6.5)  # the least and the greatest of a drawn shape
JITTER = 1.5  # the most that a centre is moved, across and down
BRIGHTEST_BACKGROUND = 0.15
TINT = 0.05  # the most that a colour varies

CORE = 0.02  # share of a picture that surely is object: the smallest one covers 4 %
EDGE = 2 / 3  # of the contrast: blur fills the corners of a cross to less than that
LEAST_CONTRAST = 0.4  # of object and background, a distance in RGB; it is drawn 0.55 or more
LEAST_OVERLAP = 0.6  # with a drawn shape; a circle's with a square of its area is 0.83
GROUND_MARGIN = 0.1  # by how much a background may be brighter than any drawn
RADIUS_MARGIN = 0.5  # by how much a radius may be beyond those drawn

# The rule


class Attributes(NamedTuple):
    """Names from ATTRIBUTES; None for an attribute that is like none of the drawn ones."""

    colour: str | None
    shape: str | None
    place: str | None


NOTHING = Attributes(None, None, None)


def attribute_matches(picture: Tensor, label: str) -> dict[str, float]:
    """Whether the rule sees in a picture (3, H, W) what a label such as red-circle-left says.

    returns: 1 or 0 for each part and for all at once, by keys of image.SCORES.
    """
    seen = read_attributes(picture)
    wanted = Attributes(*label.split("-"))
    matches = {"all_rule": float(seen == wanted)}
    for name, a, b in zip(Attributes._fields, seen, wanted):
        matches[f"{name}_rule"] = float(a == b)
    return matches


def read_attributes(picture: Tensor) -> Attributes:
    """What a picture (3, H, W) in [0, 1] shows.

    The background is each channel's median. The object is what differs from it by more than two thirds as
    much as its core does, the 2 % of the picture that differ most. Its colour is the drawn one nearest to
    the core's median, its place the drawn one nearest to its centroid, its shape the one that overlaps it
    most when it is drawn with its centroid and area. A colour or a place that lies between two is none of
    them. Nothing is seen where there is no object, where it is not clear, or not alone.
    """
    grid = (len(POINTS), len(POINTS))
    picture = picture.float().cpu()
    fine = F.interpolate(picture[None], grid, mode="bicubic", antialias=True)
    points = fine[0].flatten(1).T  # (n, 3)
    background = points.median(0).values
    distance = (points - background).norm(dim=1)
    core_size = round(CORE * len(points))
    core = distance.topk(core_size).indices
    contrast = distance[core].median()
    if background.max() > BRIGHTEST_BACKGROUND + GROUND_MARGIN:
        return NOTHING
    if contrast < LEAST_CONTRAST:
        return NOTHING

    mask = distance > EDGE * contrast
    mask = mask.view(grid).numpy()
    colours, shapes, places = ATTRIBUTES
    overlaps = [intersection_over_union(mask, shape) for shape in range(len(shapes))]
    best = int(np.argmax(overlaps))
    if overlaps[best] < LEAST_OVERLAP:
        return NOTHING
    rgb = points[core].median(0).values.numpy()
    centre = centroid(mask)
    colour = nearest_name(rgb, SHAPES["rgb"], colours)
    place = nearest_name(centre, SHAPES["centres"], places)
    return Attributes(colour, shapes[best], place)


def intersection_over_union(mask: np.ndarray, shape: int) -> float:
    """Intersection over union of a mask, bool at every point, and a shape drawn with its centroid and area.

    The shape is drawn no smaller and no larger than in the corpus, within RADIUS_MARGIN.
    """
    unit_area, unit_centroid = unit_area_and_centroid(shape)
    smallest = RADIUS[0] - RADIUS_MARGIN
    largest = RADIUS[1] + RADIUS_MARGIN
    radius = np.sqrt(mask.mean() / unit_area)
    radius = np.clip(radius, smallest, largest)
    x, y = centroid(mask) - radius * unit_centroid
    drawn = shape_mask(shape, x, y, radius)
    intersection = (mask & drawn).sum()
    union = (mask | drawn).sum()
    return intersection / union


@functools.cache
def unit_area_and_centroid(shape: int) -> tuple[float, np.ndarray]:
    """Of a shape of radius 1: its share of the picture, and its centroid (x, y) relative to its centre."""
    middle = SIDE / 2
    radius = RADIUS[1]
    drawn = shape_mask(shape, middle, middle, radius)
    area = drawn.mean() / radius**2
    offset = centroid(drawn) - middle
    return area, offset / radius


def centroid(mask: np.ndarray) -> np.ndarray:
    """(x, y) of a mask."""
    columns = mask.sum(0)
    rows = mask.sum(1)
    sums = np.array([columns @ POINTS, rows @ POINTS])
    return sums / mask.sum()


def nearest_name(value: np.ndarray, known: list, names: list[str]) -> str | None:
    """The name of the known value (n, D) nearest to a value (D,).

    returns: None where it is farther away than half of the way between the two known ones that are closest.
    """
    known = np.array(known, float)
    differences = known[:, None] - known
    between = np.linalg.norm(differences, axis=-1)  # (n, n)
    closest = between[between > 0].min()
    distance = np.linalg.norm(known - value, axis=-1)
    best = int(distance.argmin())
    if distance[best] < closest / 2:
        return names[best]
    return None


# The drawing


def draw_picture(combination: tuple[int, int, int], seed: int) -> np.ndarray:
    """(32, 32, 3) in [0, 1]; place, size, tint and background vary a little."""
    c, s, p = combination
    rng = np.random.default_rng(seed)
    jitter = rng.uniform(-JITTER, JITTER, 2)
    x, y = SHAPES["centres"][p] + jitter
    radius = rng.uniform(*RADIUS)
    points = shape_mask(s, x, y, radius)
    pixels = points.reshape(SIDE, FINE, SIDE, FINE)
    coverage = pixels.mean((1, 3))
    coverage = coverage[..., None]  # (32, 32, 1)
    background = rng.uniform(0, BRIGHTEST_BACKGROUND, 3)
    tint = rng.uniform(-TINT, TINT, 3)
    colour = SHAPES["rgb"][c] + tint
    picture = background * (1 - coverage) + colour * coverage
    return picture.clip(0, 1)


def shape_mask(shape: int, x: float, y: float, radius: float) -> np.ndarray:
    """Which points are inside a shape around (x, y): (128, 128) bool."""
    across = abs(POINTS - x) / radius  # (128,)
    down = (POINTS - y) / radius
    down = down[:, None]  # (128, 1)
    name = ATTRIBUTES[1][shape]
    if name == "circle":
        return across**2 + down**2 < 1
    if name == "triangle":
        slanted = across < 0.55 * (down + 1)
        return slanted & (down < 0.8)
    farther = np.maximum(across, abs(down))
    if name == "square":
        return farther < 0.85
    nearer = np.minimum(across, abs(down))
    return (nearer < 0.3) & (farther < 1)  # a cross


# The words


def describe(language: str, combination: tuple[int, int, int], rng: random.Random) -> str:
    """A sentence that says a combination, in one of the language's patterns."""
    c, s, p = combination
    words = SHAPES[language]
    colours = words["colours"]
    if language == "ar" and ATTRIBUTES[1][s] == "circle":  # its noun is feminine, and so is the colour
        colours = words["colours_feminine"]
    shape = words["shapes"][s]
    place = words["places"][p]
    pattern = rng.choice(words["patterns"])
    return pattern.format(colour=colours[c], shape=shape, place=place)


def list_shapes(root: Path, language: str, count: int) -> list[dict]:
    """Make `count` descriptions to train on, and each combination twice to validate and twice to test on.

    Voices of validation and test are never trained on.
    """
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    (root / "wavs" / language).mkdir(parents=True, exist_ok=True)
    held_out = 2 * len(COMBINATIONS)
    plan = [("train", n) for n in range(count)]
    plan += [("val", n) for n in range(held_out)]
    plan += [("test", n) for n in range(held_out)]
    captions = [make_shape(root, language, *part) for part in tqdm(plan, f"shapes {language}", disable=None)]

    def order(caption: dict[str, str]) -> int:
        """A random one, so that the first few are of all kinds."""
        return zlib.crc32(caption["wav"].encode())

    return sorted(captions, key=order)


def make_shape(root: Path, language: str, split: str, n: int) -> dict[str, str]:
    """Draw a picture, speak its description, and return the line of captions that says so."""
    rng = random.Random(f"{language} {split} {n}")
    voices = SHAPES["voices"][split]
    if split == "train":
        turn, k = divmod(n, len(TRAINED_ON))
        combination = TRAINED_ON[k]
        number = turn % PICTURES_PER_COMBINATION
        voice = rng.choice(voices)
    else:
        turn, k = divmod(n, len(COMBINATIONS))
        combination = COMBINATIONS[k]
        number = split
        voice = voices[turn]
    words = [names[k] for names, k in zip(ATTRIBUTES, combination)]
    label = "-".join(words)
    picture = f"pictures/{label}-{number}.png"
    wav = f"wavs/{language}/{split}-{n:05d}.wav"
    text = describe(language, combination, rng)
    if not (root / picture).exists():
        seed = zlib.crc32(picture.encode())
        pixels = draw_picture(combination, seed)
        with shards.atomic_write(root / picture) as part:
            imsave(part, pixels, format="png")
    espeak_voice = f"{SHAPES[language]['voice']}+{voice}"
    rate = rng.randint(130, 190)
    pitch = rng.randint(30, 70)
    wave = speak_espeak(text, RATE, espeak_voice, rate, pitch)
    audio.save_wav(root / wav, wave, RATE)
    novelty = "new" if combination in HELD_OUT else "known"
    return {
        "picture": picture,
        "wav": wav,
        "text": text,
        "split": split,
        "voice": f"{voice} {novelty}",
        "label": label,
    }
