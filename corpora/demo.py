"""What the demo says, and how: sentences made by a grammar, or LJSpeech's own.

Both lie in assets/: demo_grammar.yaml and ljspeech_sentences.txt. What is held out is never trained on.
"""

import functools
import random
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from config import UserError
from corpora import voice

ASSETS = Path(__file__).resolve().parents[1] / "assets"
HELD_OUT = 64  # sentences to validate on, and as many to test on


class Sentence(NamedTuple):
    id: str
    text: str
    split: str  # train | val | test


def speak(text: str, sample_rate: int, name: str) -> torch.Tensor:
    """A sentence in the voice of that name: a wave (N,) with at most 50 ms of silence at either end."""
    wave = voice.say(text, sample_rate, name)
    loud = (wave.abs() > 0.01).nonzero()
    if not len(loud):
        raise UserError(f"{text!r}: nothing to be said")
    margin = sample_rate // 20
    start = max(0, loud[0].item() - margin)
    return wave[start : loud[-1].item() + margin + 1]


def demo_sentences(grammar: str, count: int) -> list[Sentence]:
    """`count` sentences to train on, then 64 to validate and 64 to test on; more begin with the same ones.

    grammar: matrix | ljspeech. raises UserError where there are not so many.
    """
    if grammar == "ljspeech":
        return ljspeech_sentences(count)
    texts = distinct_sentences(grammar, count, held_out=False)
    texts += distinct_sentences(grammar, 2 * HELD_OUT, held_out=True)
    splits = ["train"] * count + ["val"] * HELD_OUT + ["test"] * HELD_OUT
    names = [f"{grammar}-{n:05d}" for n in range(len(texts))]
    return [Sentence(*fields) for fields in zip(names, texts, splits, strict=True)]


def ljspeech_sentences(count: int) -> list[Sentence]:
    """The first `count` of LJSpeech's to train on, then all that validate and test."""
    found = {"train": [], "val": [], "test": []}
    for line in (ASSETS / "ljspeech_sentences.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            split, name, text = line.split("|")
            found[split].append(Sentence(name, text, split))
    if count > len(found["train"]):
        raise UserError(f"data.sentences {count}: of LJSpeech's there are {len(found['train'])} here")
    return found["train"][:count] + found["val"] + found["test"]


def distinct_sentences(grammar: str, count: int, held_out: bool) -> list[str]:
    """The first `count` different sentences of a grammar that are held out, or that are not.

    raises UserError where the grammar makes fewer.
    """
    rng = random.Random(f"{grammar} {held_out}")
    found = {}  # in the order made: a longer list begins with a shorter one
    for _ in range(100 * count + 10_000):
        sentence = make_sentence(grammar, rng)
        if is_held_out(sentence) == held_out:
            found[sentence] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"data.sentences {count}: the grammar {grammar} does not make that many")


@functools.cache
def load_grammar(name: str) -> dict[str, list[str]]:
    """{"patterns": [...], slot: [words...]} of a grammar in assets/demo_grammar.yaml."""
    grammars = yaml.safe_load((ASSETS / "demo_grammar.yaml").read_text(encoding="utf-8"))
    words = {}
    for slot, value in grammars[name].items():
        words[slot] = value if isinstance(value, list) else value.split()
    return words


def make_sentence(name: str, rng: random.Random) -> str:
    """A sentence of a grammar: a pattern with a word drawn for each slot."""
    grammar = load_grammar(name)
    pattern = rng.choice(grammar["patterns"])
    sentence = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(grammar[slot[1]]), pattern)
    return sentence[0].upper() + sentence[1:]


def is_held_out(sentence: str) -> bool:
    """Every tenth sentence is never trained on: a property of the text alone."""
    return zlib.crc32(sentence.encode()) % 10 == 0
