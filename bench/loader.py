"""The way from packed shards to the device, without a network: `python -m bench.loader [--key value ...]`.

Frames a second of `data.SpeechBatches`, by the clock and, so that other work beside does not count, by the
CPU's; megabytes that a step copies; how much of a batch is padding, and how many shapes three epochs meet.
A corpus of LJSpeech's lengths is written on the spot: noise instead of speech, random bytes instead of words.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import transformers

import data
import system
from config import Config
from corpora import shards
from corpora.shards import Clip
from entry import run_main

CLIPS = 12_500  # of LJSpeech, to train on
FRAME_RATE = 22050 / 256  # Hz
POOL = np.random.default_rng(0).standard_normal((1000, 1472), np.float32).astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--config", default="configs/ljspeech.yaml", help="a recipe of text-to-speech")
    add("--clips", type=int, default=1024, help="to write: 0.4 MB each")
    add("--steps", type=int, default=16, help="batches of a round")
    add("--rounds", type=int, default=3, help="of each number of threads: the median counts")
    add("--threads", type=int, nargs="+", default=[1, 2])
    options, knobs = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [*knobs, f"--data_dir={folder}", "--download=false"]
        config = system.settle_batch(system.load_config(options.config, words), world=1)
        batches = open_batches(config, options.clips)
        print("| | |\n|---|---|")
        for name, figure in shape_figures(config).items():
            print(f"| {name} | {figure} |", flush=True)
        for name, figure in batch_figures(batches, options.steps).items():
            print(f"| {name} | {figure} |", flush=True)
        for threads in options.threads:
            rounds = [measure(batches, options.steps, threads) for _ in range(options.rounds)]
            by_clock, by_cpu = np.median(rounds, axis=0)
            print(f"| frames/s, threads: {threads} | {by_clock:,.0f} |")
            print(f"| frames a second of CPU, threads: {threads} | {by_cpu:,.0f} |", flush=True)


def ljspeech_lengths(count: int = CLIPS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames and bytes of clips as LJSpeech's, (count,) each.

    1.1 to 10.1 s, 6.6 s on average; 5.6 frames a byte with a deviation of 11 %, as in its first 64 clips.
    """
    rng = np.random.default_rng(seed)
    seconds = 1.1 + 9 * rng.beta(3.2, 2.0, count)
    frames = np.round(seconds * FRAME_RATE).astype(int)
    frames_a_byte = 5.6 * np.exp(0.11 * rng.standard_normal(count))
    return frames, np.ceil(frames / frames_a_byte).astype(int)


def shapes(config: Config, epochs: int = 3) -> np.ndarray:
    """T, S and valid frames of every batch of some epochs of LJSpeech, without silence and dropped texts.

    (steps, 3)
    """
    frames, bytes_ = ljspeech_lengths()
    found = []
    for epoch in range(epochs):
        clips = data.bucketed_epoch(frames, epoch, config.train.batch_size, config.seed)
        longest = frames[clips].max(1)
        longest_text = bytes_[clips].max(1) + 1  # the end
        padded = round_up(longest, config.data.pad_multiple)
        padded_text = round_up(longest_text, config.data.text_multiple)
        valid = frames[clips].sum(1)
        of_epoch = np.stack([padded, padded_text, valid], axis=1)
        found.append(of_epoch)
    return np.concatenate(found)


def round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return -(-lengths // multiple) * multiple


def shape_figures(config: Config) -> dict[str, int | str]:
    """Of three epochs: what attention has to plan for, and what that costs."""
    found = shapes(config)
    lengths, _, valid = found.T
    padding = 1 - valid.sum() / lengths.sum() / config.train.batch_size
    return {
        "shapes: T": len(np.unique(lengths)),
        "shapes: T with S": len(np.unique(found[:, :2], axis=0)),
        "padding, of lengths alone": f"{100 * padding:.1f} %",
    }


def batch_figures(batches: data.SpeechBatches, steps: int) -> dict[str, str]:
    """Of some batches as they are made, silence included."""
    size = 0
    valid = 0
    computed = 0
    for step in range(steps):
        batch = batches.train(step)
        size += sum(value.nbytes for value in batch.values())
        valid += batch["frames"].sum().item()
        computed += batch["x_mask"].numel()
    return {
        "MB a step": f"{size / steps / 1e6:.1f}",
        "padding, with the silence that is appended": f"{100 - 100 * valid / computed:.1f} %",
    }


def measure(batches: data.SpeechBatches, steps: int, threads: int) -> tuple[float, float]:
    """Valid frames a second, by the clock and by the time of the CPU."""
    frames = 0
    clock = time.perf_counter()
    cpu = time.process_time()
    for batch in data.prefetch(batches.train, range(steps), threads):
        frames += batch["frames"].sum().item()
    by_clock = frames / (time.perf_counter() - clock)
    by_cpu = frames / (time.process_time() - cpu)
    return by_clock, by_cpu


def open_batches(config: Config, count: int) -> data.SpeechBatches:
    """Batches of a corpus that is written into data.data_dir."""
    rng = np.random.default_rng(1)
    clips = []
    for frames, bytes_ in zip(*ljspeech_lengths(count)):
        letters = rng.integers(97, 123, bytes_, dtype=np.uint8)
        text = letters.tobytes().decode()
        name = f"clip-{len(clips)}"
        split = "train" if clips else "val"
        seconds = frames / FRAME_RATE
        clips.append(Clip(name, text, split, stop=seconds))
    folder = Path(config.data.data_dir)
    shards.pack(folder, {"name": "noise"}, clips, [], config.packed_format(), random_frames, 1)
    corpus = data.Corpus(config)
    if config.model.text_encoder != "scratch":
        path, texts = data.text_features_file(config, corpus)
        lengths = [len(text) + 1 for text in texts]

        def encode(numbers: list[int]) -> list[np.ndarray]:
            return [POOL[: lengths[n]] for n in numbers]

        shards.cache_features(path, lengths, None, encode, 32, "features")
    return data.SpeechBatches(config, corpus, transformers.ByT5Tokenizer())


def random_frames(clip: Clip) -> np.ndarray:
    frames = round(clip.stop * FRAME_RATE)
    return POOL[:frames, :80]


if __name__ == "__main__":
    run_main(main)
