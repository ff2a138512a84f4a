"""The demo corpus: sentences made by a grammar, or LJSpeech's own, and how they are spoken.

Both lie in assets/: demo_grammar.yaml and ljspeech_sentences.txt. What is held out is never trained on.
"""

import functools
import random
import re
import zlib

import torch
import yaml

from config import Config, UserError
from corpora import voice
from corpora.shards import ASSETS, SPLITS, Clip

HELD_OUT = 64  # sentences to validate on, and as many to test on


def read_demo(config: Config) -> tuple[dict, list[Clip], list[str]]:
    """A description of the demo, its clips, and [], as corpora/prepare.py wants them.

    Recordings of the first 64 and of all held-out ones are kept, to listen to.
    """
    settings = config.data
    speaker = voice.find_voice(settings.voice)  # maybe not the one asked for: the description says which
    corpus = {
        "name": "demo",
        "grammar": settings.grammar,
        "sentences": settings.sentences,
        "voice": speaker.name,
        "weights": speaker.sha256[:12],
    }
    clips = []
    for n, clip in enumerate(demo_sentences(settings.grammar, settings.sentences)):
        is_kept = n < 64 or clip.split != "train"
        clips.append(clip._replace(wav=f"wavs/{clip.id}.wav") if is_kept else clip)
    return corpus, clips, []


def speak(text: str, sample_rate: int, name: str) -> torch.Tensor:
    """A sentence in the voice of that name: a wave (N,) with at most 50 ms of silence at either end."""
    wave = voice.synthesize(text, sample_rate, name)
    is_loud = wave.abs() > 0.01
    loud = is_loud.nonzero().flatten()
    if not len(loud):
        raise UserError(f"{text!r}: nothing to be said")
    margin = sample_rate // 20
    first = loud[0].item()
    last = loud[-1].item()
    start = max(0, first - margin)
    return wave[start : last + margin + 1]


def demo_sentences(grammar: str, count: int) -> list[Clip]:
    """`count` sentences to train on, then 64 to validate and 64 to test on; more begin with the same ones.

    grammar: matrix | ljspeech. raises UserError where there are not so many.
    """
    if grammar == "ljspeech":
        return ljspeech_sentences(count)
    texts = distinct_sentences(grammar, count, held_out=False)
    texts += distinct_sentences(grammar, 2 * HELD_OUT, held_out=True)
    splits = ["train"] * count + ["val"] * HELD_OUT + ["test"] * HELD_OUT
    numbered = enumerate(zip(texts, splits, strict=True))
    return [Clip(f"{grammar}-{n:05d}", text, split) for n, (text, split) in numbered]


def ljspeech_sentences(count: int) -> list[Clip]:
    """The first `count` of LJSpeech's to train on, then all to validate on, and all to test on."""
    lines = (ASSETS / "ljspeech_sentences.txt").read_text(encoding="utf-8").splitlines()
    splits = {split: [] for split in SPLITS}
    for line in lines:
        if not line.startswith("#"):
            split, name, text = line.split("|")
            splits[split].append(Clip(name, text, split))
    train = splits["train"]
    if count > len(train):
        raise UserError(f"data.sentences {count}: of LJSpeech's there are {len(train)} here")
    return train[:count] + splits["val"] + splits["test"]


def distinct_sentences(grammar: str, count: int, held_out: bool) -> list[str]:
    """The first `count` different sentences of a grammar that are held out, or that are not.

    raises UserError where the grammar makes fewer.
    """
    rng = random.Random(f"{grammar} {held_out}")
    found = {}  # in order: a longer list begins with a shorter one
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
    text = (ASSETS / "demo_grammar.yaml").read_text(encoding="utf-8")
    grammars = yaml.safe_load(text)
    words = {}
    for slot, value in grammars[name].items():
        words[slot] = value if isinstance(value, list) else value.split()
    return words


def make_sentence(name: str, rng: random.Random) -> str:
    """A sentence of a grammar: a pattern with a word drawn for each slot."""
    grammar = load_grammar(name)
    pattern = rng.choice(grammar["patterns"])

    def fill(slot: re.Match) -> str:
        words = grammar[slot[1]]
        return rng.choice(words)

    sentence = re.sub(r"\{(\w+)\}", fill, pattern)
    return sentence[0].upper() + sentence[1:]


def is_held_out(sentence: str) -> bool:
    """Every tenth sentence is never trained on: a property of the text alone."""
    return zlib.crc32(sentence.encode()) % 10 == 0
