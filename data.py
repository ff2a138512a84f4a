"""A packed corpus in length-bucketed batches, in which everything random is drawn.

Everything random in a batch depends on (seed, step, row of the global batch) and on nothing else, and batch
order is a function of the step. So resume is bitwise, and two ranks are one process with the double batch.
`python data.py CORPUS --out FOLDER` packs a corpus: corpora/prepare.py.
"""

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import audio
import flow
from config import Config, UserError
from corpora import prepare, shards
from corpora.shards import PREPARE_HINT, SPLITS, Clip
from entry import run_main
from pretrained import text_encoder

ORDER, TRAIN, VALIDATION = range(3)  # which random stream of the batches: part of its seed

Batch = dict[str, Tensor]


class ShardedCorpus:
    """A packed corpus: its clips, the frames of each, and mean and deviation over the training clips."""

    def __init__(self, config: Config, format: dict, longest: float):
        """longest: clips with more frames are left out.

        raises UserError for a folder that is missing, damaged, or packed in another format.
        """
        self.folder = shards.packed_dir(config, format)
        index = shards.read_index(self.folder, format)
        self.mean = index["mean"]
        self.std = index["std"]
        self.fingerprint = index["plan"]
        self.rate = format["sample_rate"]
        self.shards = []
        clips = []
        for n in range(index["shards"]):
            shard = shards.read_shard(self.folder, n, self.fingerprint)
            if shard is None:
                raise UserError(
                    f"{self.folder}: shard {n} is missing or damaged; "
                    f"pack again, which makes it anew: {PREPARE_HINT}"
                )
            _, shard_clips, frames = shard
            self.shards.append(frames)
            clips += shard_clips
        self.splits = {split: [] for split in SPLITS}
        for number, clip in enumerate(clips):
            if clip.frames <= longest:
                wav = clip.wav and str(self.folder / clip.wav)
                self.splits[clip.split].append(clip._replace(number=number, wav=wav))
        if config.data.overfit:
            clips = sum(self.splits.values(), [])
            self.splits = dict.fromkeys(SPLITS, clips[: config.data.overfit])

    def clips(self, split: str) -> list[Clip]:
        """The clips of train | val | test in the corpus's order; data.overfit: the first of all clips."""
        return self.splits[split]

    def frames(self, clip: Clip) -> Tensor:
        """(T, M) float32."""
        frames = self.shards[clip.shard][clip.offset : clip.offset + clip.frames]
        return torch.from_numpy(frames.astype(np.float32))

    def wave(self, clip: Clip) -> Tensor:
        """(N,) float32 at `rate` Hz, where the frames are samples."""
        return self.frames(clip).flatten() / 32767

    def recording(self, clip: Clip) -> tuple[Tensor, int]:
        return self.wave(clip), self.rate


class Corpus(ShardedCorpus):
    """Speech as log-mels, normalised by `statistics`, the mean and standard deviation of the training set."""

    def __init__(self, config: Config):
        mel = config.mel
        samples = config.data.max_seconds * mel.sample_rate
        longest = samples / mel.hop  # frames
        super().__init__(config, config.packed_format(), longest)
        self.statistics = (self.mean, self.std)

    def log_mel(self, clip: Clip) -> Tensor:
        """(T, M), natural log, float32."""
        return self.frames(clip)

    def recording(self, clip: Clip) -> tuple[Tensor, int] | None:
        """The original recording, (N,), and its rate in Hz; None where it was not kept."""
        if not clip.wav or not Path(clip.wav).exists():
            return None
        wave = audio.load_wav(clip.wav, self.rate)
        return wave, self.rate


class Batches:
    """The clips of a corpus as batches, dicts of CPU tensors.

    A subclass has `row(clip, rng, t=None)`, a clip and all that is drawn for it, and `collate(rows)`.
    """

    def __init__(self, config: Config, corpus: ShardedCorpus, tokenizer, rank: int = 0, world: int = 1):
        """raises UserError for a split without clips."""
        self.config = config
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.rank = rank
        self.world = world
        for split in ("train", config.eval.split):
            if not corpus.clips(split):
                limit = f"data.max_seconds {config.data.max_seconds}"
                raise UserError(f"{corpus.folder}: has no {split} clip of at most {limit}")
        lengths = [clip.frames for clip in corpus.clips("train")]
        self.lengths = np.array(lengths) if config.data.bucketed else np.ones(len(lengths))

    def train(self, step: int, micro: int = 0) -> Batch:
        """This rank's part of a micro-batch; those of all ranks and micro-batches are the global batch."""
        size = self.config.train.batch_size
        seed = self.config.seed
        clips = self.corpus.clips("train")
        global_size = size * self.world * self.config.train.grad_accum
        order = length_bucketed_batch(self.lengths, step, global_size, seed)
        share = micro * self.world + self.rank
        first = share * size
        rows = []
        for n in range(first, first + size):
            clip = clips[order[n]]
            rng = np.random.default_rng((seed, TRAIN, step, n))
            row = self.row(clip, rng)
            rows.append(row)
        return self.collate(rows)

    def validation(self) -> list[Batch]:
        """This rank's share of the validation split: whole clips, t evenly spread, the same every time."""
        seed = self.config.seed
        shift = self.config.flow.timestep_shift
        clips = self.corpus.clips(self.config.eval.split)
        numbers = range(len(clips))
        by_length = sorted(numbers, key=lambda n: clips[n].frames)
        rows = []
        for n in by_length[self.rank :: self.world]:
            rng = np.random.default_rng((seed, VALIDATION, n))
            t = low_discrepancy_time(n)
            t = flow.shift_time(t, shift)
            row = self.row(clips[n], rng, t)
            rows.append(row)
        size = self.config.train.batch_size
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def sample_time(self, rng: np.random.Generator) -> float:
        """A training time t."""
        c = self.config.flow
        return flow.sample_time(
            rng, c.timestep_logit_mean, c.timestep_logit_std, c.timestep_uniform, c.timestep_shift
        )


class SpeechBatches(Batches):
    """Log-mels and the ids of their texts.

    x, noise (B, T, M): 0 where x_mask (B, T) is False; T is a multiple of data.pad_multiple
    t (B,)
    ids (B, S) int64, text_mask (B, S): S is a multiple of 8
    features (B, S, E): of the ids, only where the text encoder is frozen
    text_dropped (B,): rows that have the ids of "" instead of their text
    frames (B,): length of the clip, without the silence appended to it
    number (B,): of the clip
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.features = None
        if config.model.text_encoder != "scratch" and config.data.cache_text:
            self.features = open_text_features(config, corpus)
        # the first call sets the tokenizer's options: not thread-safe
        text_encoder.tokenize(tokenizer, [""])

    def row(self, clip: Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it.

        t: for validation, where the text is kept and no silence appended; None = drawn.
        """
        x = self.corpus.log_mel(clip)
        dropped = False
        if t is None:
            dropped = rng.random() < self.config.flow.text_condition_dropout
            x = self.append_silence(x, rng)
            t = self.sample_time(rng)
        # drawn last, so that padding changes nothing
        noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
        return {
            "x": audio.normalise(x, self.corpus.mean, self.corpus.std),
            "noise": torch.from_numpy(noise),
            "t": t,
            "frames": clip.frames,
            "number": clip.number,
            "text_dropped": dropped,
            "text": "" if dropped else clip.text,
        }

    def append_silence(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """With a chance of silence_prob, append up to max_silence_sec to the log-mel (T, M)."""
        c = self.config.data
        mel = self.config.mel
        chosen = rng.random() < c.silence_prob
        seconds = chosen * rng.random() * c.max_silence_sec
        frames = int(seconds * mel.sample_rate / mel.hop)
        floor = math.log(audio.LOG_FLOOR)
        silence = torch.full((frames, mel.n_mels), floor)
        return torch.cat([x, silence])

    def collate(self, rows: list[dict]) -> Batch:
        batch = {}
        for key in ("t", "frames", "number", "text_dropped"):
            values = [row[key] for row in rows]
            batch[key] = torch.tensor(values)

        multiple = self.config.data.pad_multiple
        x = [row["x"] for row in rows]
        noise = [row["noise"] for row in rows]
        batch["x"], batch["x_mask"] = pad(x, multiple)
        batch["noise"], _ = pad(noise, multiple)

        texts = [row["text"] for row in rows]
        ids = text_encoder.tokenize(self.tokenizer, texts)
        ids = [torch.tensor(row) for row in ids]
        batch["ids"], batch["text_mask"] = pad(ids, 8)
        if self.features:
            features = [self.features(text) for text in texts]
            batch["features"], _ = pad(features, 8)
        return batch


def open_text_features(config: Config, corpus: Corpus) -> Callable[[str], Tensor]:
    """The frozen text encoder's cached features: a function from a text of the corpus, or "", to (S, E)."""
    path, texts = text_features_file(config, corpus)
    read = shards.open_features(path, PREPARE_HINT)
    numbers = {text: number for number, text in enumerate(texts)}
    return lambda text: read(numbers[text])


def text_features_file(config: Config, corpus: Corpus) -> tuple[Path, list[str]]:
    """The cache, named by a digest of what is in it, and the texts in it."""
    texts = {""}
    for split in SPLITS:
        texts |= {clip.text for clip in corpus.clips(split)}
    texts = sorted(texts)
    digest = shards.digest([config.model.text_encoder, texts])
    name = f"features_{digest[:8]}.npy"
    return corpus.folder / name, texts


def length_bucketed_batch(lengths: np.ndarray, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The clips of the global batch of a step: indices (batch_size,), shortest first; a pure function.

    An epoch shows every clip once: sorted by length, with 2 % of jitter, so that neighbours need little
    padding and still differ from epoch to epoch, cut into batches, and these shuffled. The last batch is
    filled up with clips that are shown again.
    """
    count = len(lengths)
    steps = math.ceil(count / batch_size)  # per epoch
    epoch, position = divmod(step, steps)
    rng = np.random.default_rng((seed, ORDER, epoch))
    clips = rng.permutation(count)
    clips = np.resize(clips, steps * batch_size)
    jitter = rng.uniform(0.98, 1.02, len(clips))
    order = np.argsort(lengths[clips] * jitter)
    batches = clips[order].reshape(steps, batch_size)
    batch_order = rng.permutation(steps)
    chosen = batches[batch_order[position]]
    by_length = np.argsort(lengths[chosen], kind="stable")
    return chosen[by_length]


def low_discrepancy_time(number: int) -> float:
    """A time in (0, 1) for each validation clip: always the same, and any few of them spread evenly."""
    time = number * (math.sqrt(5) - 1) / 2 % 1
    return min(max(time, 0.001), 0.999)


def pad(rows: list[Tensor], multiple: int) -> tuple[Tensor, Tensor]:
    """Tensors (N, ...) -> (B, N', ...) filled up with 0, N' a multiple; and the mask (B, N')."""
    count = len(rows)
    longest = max(len(row) for row in rows)
    size = math.ceil(longest / multiple) * multiple
    width = rows[0].shape[1:]
    padded = rows[0].new_zeros(count, size, *width)  # (B, N', ...)
    mask = torch.zeros(count, size, dtype=torch.bool)  # (B, N')
    for n, row in enumerate(rows):
        length = len(row)
        padded[n, :length] = row
        mask[n, :length] = True
    return padded, mask


def prefetch(make: Callable, steps: Iterable[int], workers: int) -> Iterator:
    """make(step) for each of `steps`, in order, computed ahead by `workers` threads; 0: only on demand."""
    futures = collections.deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for step in steps:
            futures.append(pool.submit(make, step))
            if len(futures) > workers:
                yield futures.popleft().result()
        for future in futures:
            yield future.result()


if __name__ == "__main__":
    import system

    run_main(lambda: prepare.main(system.reader_of))
