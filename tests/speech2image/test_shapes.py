"""The rule that reads drawn shapes: right on all that the corpus draws, also when that is blurred and noisy,
and blind to the rest."""

import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from speech2image.shapes import (
    ATTRIBUTES,
    BRIGHTEST_BACKGROUND,
    COMBINATIONS,
    HELD_OUT,
    JITTER,
    NOTHING,
    RADIUS,
    SHAPES,
    attribute_matches,
    draw_picture,
    read_attributes,
    shape_mask,
)

ALL = COMBINATIONS
TRAINED = [c for c in ALL if c not in HELD_OUT]
GRID = torch.from_numpy(np.stack(np.meshgrid(*[np.arange(32) + 0.5] * 2)))  # x and y of every pixel


def named(combination: tuple[int, int, int]) -> tuple[str, ...]:
    return tuple(names[n] for names, n in zip(ATTRIBUTES, combination))


def label(combination: tuple[int, int, int]) -> str:
    return "-".join(named(combination))


def drawn(combination: tuple[int, int, int], number: int | str = "val") -> torch.Tensor:
    """The picture of that number in the corpus, (3, 32, 32), in 8 bits as it is saved."""
    seed = zlib.crc32(f"pictures/{label(combination)}-{number}.png".encode())
    return eight_bits(torch.from_numpy(draw_picture(combination, seed)).float().permute(2, 0, 1))


def eight_bits(picture: torch.Tensor) -> torch.Tensor:
    return (255 * picture.clamp(0, 1)).floor() / 255


def resized(picture: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def blurred(picture: torch.Tensor) -> torch.Tensor:
    """By the mean of 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]


def noisy(picture: torch.Tensor, std: float, seed: int = 0) -> torch.Tensor:
    return picture + std * torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


def disc(x: float, y: float, radius: float) -> torch.Tensor:
    """Which pixels are in it, (32, 32)."""
    return (GRID - torch.tensor([x, y])[:, None, None]).norm(dim=0) < radius


def painted(mask: torch.Tensor, colour: tuple[float, float, float], ground: float = 0.1) -> torch.Tensor:
    """(3, H, W): a colour where the mask (H, W) is True."""
    return torch.where(mask, torch.tensor(colour)[:, None, None], ground)


def share_right(pictures: list[torch.Tensor], combinations: list[tuple[int, int, int]]) -> float:
    right = [read_attributes(picture) == named(c) for picture, c in zip(pictures, combinations, strict=True)]
    return sum(right) / len(right)


# What is drawn


def test_the_rule_is_right_on_every_picture_of_the_corpus():
    plan = [(c, number) for c in TRAINED for number in range(12)]
    plan += [(c, split) for c in ALL for split in ("val", "test")]
    assert len(plan) == 1440
    assert share_right([drawn(*picture) for picture in plan], [c for c, _ in plan]) == 1


@pytest.mark.parametrize("size", (16, 64, 256))
def test_the_rule_is_right_on_a_picture_of_any_size(size):
    assert share_right([resized(drawn(c), size) for c in ALL], ALL) == 1


@pytest.mark.parametrize("std", (0.025, 0.05, 0.1))
def test_noise_and_eight_bits_leave_the_rule_right(std):
    assert share_right([eight_bits(noisy(drawn(c), std, seed=n)) for n, c in enumerate(ALL)], ALL) >= 0.99


def test_blur_with_noise_and_eight_bits_leaves_the_rule_right():
    found = [eight_bits(noisy(blurred(drawn(c)), 0.05, seed=n)) for n, c in enumerate(ALL)]
    assert share_right(found, ALL) >= 0.99


def test_the_rule_is_right_at_the_ends_of_what_is_drawn():
    """The smallest and the largest, the farthest from their places, the brightest ground."""
    for radius in RADIUS:
        for side in (-JITTER, JITTER):
            for c, s, p in ALL:
                x, y = np.array(SHAPES["centres"][p]) + side
                mask = torch.from_numpy(shape_mask(s, x, y, radius))
                picture = painted(mask, SHAPES["rgb"][c], BRIGHTEST_BACKGROUND)
                assert read_attributes(resized(picture, 32)) == named((c, s, p))


# What is not as asked for


@pytest.mark.parametrize("part, name", list(enumerate(("colour", "shape", "place"))))
def test_each_single_attribute_that_is_wrong_is_found_out_and_no_other_is(part, name):
    expected = {"all_rule": 0, "colour_rule": 1, "shape_rule": 1, "place_rule": 1, f"{name}_rule": 0}
    for combination in ALL:
        changed = list(combination)
        changed[part] = (changed[part] + 1) % len(ATTRIBUTES[part])
        assert attribute_matches(drawn(tuple(changed)), label(combination)) == expected


def test_pictures_of_other_prompts_match_by_chance_alone():
    order = np.random.default_rng(0).permutation(len(ALL) * 12) % len(ALL)
    seen = [read_attributes(drawn(c)) for c in ALL]
    pairs = [(seen[n % len(ALL)], named(ALL[other])) for n, other in enumerate(order)]
    for part, names in enumerate(ATTRIBUTES):
        assert np.mean([a[part] == b[part] for a, b in pairs]) == pytest.approx(1 / len(names), abs=0.04)
    assert np.mean([a == b for a, b in pairs]) == pytest.approx(1 / 120, abs=0.01)


def test_a_colour_between_two_and_a_place_between_two_are_none():
    red, purple = torch.tensor(SHAPES["rgb"])[[0, 4]]
    assert read_attributes(painted(disc(16, 16, 6), tuple((red + purple) / 2))) == (None, "circle", "middle")
    assert read_attributes(painted(disc(12, 16, 6), tuple(red))) == ("red", "circle", None)
    assert read_attributes(painted(disc(8, 8, 6), tuple(red))) == ("red", "circle", None)
    assert read_attributes(painted(disc(16, 16, 6), tuple(red))) == ("red", "circle", "middle")


# Where there is nothing to see


def test_nothing_is_seen_in_what_is_empty_or_noise():
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(20, 3, 32, 32, generator=random)
    dark = BRIGHTEST_BACKGROUND * uniform
    normal = 0.1 + 0.3 * torch.randn(20, 3, 32, 32, generator=random)
    specks = (torch.rand(20, 1, 32, 32, generator=random) > 0.97).float().expand(-1, 3, -1, -1)
    blocks = F.interpolate((torch.rand(20, 3, 8, 8, generator=random) > 0.8).float(), (32, 32))
    plain = torch.stack([torch.full((3, 32, 32), value) for value in (0.0, 0.1, 0.5, 1.0)])
    for pictures in (plain, uniform, dark, normal.clamp(0, 1), specks, blocks):
        assert all(read_attributes(picture) == NOTHING for picture in pictures)
        scores = [attribute_matches(picture, "red-circle-middle") for picture in pictures]
        assert not any(any(found.values()) for found in scores)


def test_nothing_is_seen_where_the_object_is_not_one_that_is_drawn():
    red = (0.9, 0.15, 0.15)
    middle = disc(16, 16, 6)
    refused = {
        "too large": disc(16, 16, 11),
        "too small": disc(16, 16, 2.5),
        "two": disc(8, 16, 5) | disc(24, 16, 5),
        "a ring": disc(16, 16, 7) & ~disc(16, 16, 5),
        "a stripe": (GRID[1] - 16).abs() < 2,
        "a half": GRID[0] < 14,
    }
    for name, mask in refused.items():
        assert read_attributes(painted(mask, red)) == NOTHING, name
    assert read_attributes(painted(middle, red, ground=0.5)) == NOTHING
    assert read_attributes(1 - painted(middle, red)) == NOTHING
    assert read_attributes(painted(middle, (0.3, 0.2, 0.2))) == NOTHING
