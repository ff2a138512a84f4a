"""fuzz.py: that it sees a bad end; a few inputs of each kind; and, in minutes, ten thousand in all."""

import sys
from collections import Counter

import fuzz
import pytest
import torch

from config import UserError


def speak_twice() -> None:
    print("error: one line\nand another", file=sys.stderr)
    sys.exit(2)


def need_memory() -> None:
    torch.zeros(fuzz.MEMORY)  # four times as much, in bytes


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")


@pytest.mark.parametrize(
    "entry",
    [speak_twice, pytest.param(need_memory, marks=on_linux), lambda: sys.exit(1), lambda: 1 / 0],
)
def test_it_sees_an_entry_point_that_ends_badly(entry):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        fuzz.ends_well(entry)


def refuse() -> None:
    raise UserError("two\nlines")


def test_it_tells_what_is_accepted_from_what_is_refused():
    assert fuzz.ends_well(lambda: None) and not fuzz.ends_well(refuse)


def test_it_sees_what_is_written_outside_the_folder_that_was_named(tmp_path):
    place = fuzz.Place(tmp_path)
    place.clear()
    before = place.files()
    (place.out / "x.png").touch()
    assert place.files() == before
    (place.here / "x.png").touch()
    assert place.files() != before


# adapters: tests/klein/test_klein.py; checkpoints: tests/test_system.py: there, what they need is loaded
@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind not in ("adapter", "checkpoint")])
def test_a_few_odd_inputs_of_each_kind_end_well(kind):
    counts = Counter()
    fuzz.try_kind(kind, 25, counts)
    assert counts["accepted"] and counts["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_ten_thousand_odd_inputs_end_well(kind):
    fuzz.try_kind(kind, 10_000 // len(fuzz.KINDS), Counter())
