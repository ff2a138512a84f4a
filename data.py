"""A packed corpus in length-bucketed batches, in which everything random is drawn.

Everything random in a batch depends on (seed, step, row of the global batch) and on nothing else, and batch
order is a function of the step. So resume is bitwise, and two ranks are one process with the double batch.
`python data.py CORPUS --out FOLDER` packs a corpus: corpora/prepare.py.
"""

import collections
import functools
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
            self.shards.append(np.asarray(frames))  # a slice of np.memmap takes longer than of an array
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

    def packed_frames(self, clip: Clip) -> np.ndarray:
        """(T, M) as packed, float16, or int16 of waves: mapped from disk, to be read only."""
        return self.shards[clip.shard][clip.offset : clip.offset + clip.frames]

    def frames(self, clip: Clip) -> Tensor:
        """(T, M) float32."""
        return torch.from_numpy(self.packed_frames(clip).astype(np.float32))

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
    """The clips of a corpus as batches, dicts of CPU tensors; what is stored as float16 stays that.

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

    x (B, T, M) float16: the log-mel as it is packed, not normalised; 0 behind the clip
    noise (B, T, M): 0 where x_mask (B, T) is False, behind the clip and the silence appended to it
    T is a multiple of data.pad_multiple
    t (B,)
    ids (B, S) int64, text_mask (B, S): S is a multiple of data.text_multiple
    features (B, S, E) float16: of the ids, only where the text encoder is frozen
    text_dropped (B,): rows that have the ids of "" instead of their text
    frames (B,): length of the clip, without the silence appended to it
    tempo (B,): what the clip was stretched by, to that length
    number (B,): of the clip
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.features = None
        if config.model.text_encoder != "scratch" and config.data.cache_text:
            self.features = open_text_features(config, corpus)
        self.token_ids = functools.cache(self.tokenize)
        self.tokenize("")  # the first call sets the tokenizer's options: not thread-safe

    def tokenize(self, text: str) -> np.ndarray:
        """(S,) int64."""
        ids = text_encoder.tokenize(self.tokenizer, [text])[0]
        return np.array(ids)

    def row(self, clip: Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and what is drawn for it, but for the noise: that is drawn from `rng`, last, in `collate`.

        t: for validation, where the text is kept and no silence appended; None = drawn.
        """
        dropped = False
        silence = 0  # frames
        tempo = 1.0
        if t is None:
            dropped = rng.random() < self.config.flow.text_condition_dropout
            silence = self.draw_silence(rng)
            t = self.sample_time(rng)
            tempo = self.draw_tempo(rng)
        frames = round(tempo * clip.frames)
        return {
            "clip": clip,
            "rng": rng,
            "length": frames + silence,
            "t": t,
            "frames": frames,
            "tempo": frames / clip.frames,
            "number": clip.number,
            "text_dropped": dropped,
            "text": "" if dropped else clip.text,
        }

    def draw_silence(self, rng: np.random.Generator) -> int:
        """With a chance of silence_prob, up to max_silence_sec, in frames."""
        c = self.config.data
        mel = self.config.mel
        chosen = rng.random() < c.silence_prob
        seconds = chosen * rng.random() * c.max_silence_sec
        return int(seconds * mel.sample_rate / mel.hop)

    def draw_tempo(self, rng: np.random.Generator) -> float:
        """What a clip's length is multiplied by."""
        jitter = self.config.data.tempo_jitter
        if jitter == 0:
            return 1.0
        return rng.uniform(1 - jitter, 1 + jitter)

    def collate(self, rows: list[dict]) -> Batch:
        """Fills arrays of the whole batch row by row: NumPy lets other threads go on while it does."""
        batch = {}
        for key in ("t", "frames", "tempo", "number", "text_dropped"):
            values = [row[key] for row in rows]
            batch[key] = torch.tensor(values)

        lengths = [row["length"] for row in rows]
        batch["x_mask"] = length_mask(lengths, self.config.data.pad_multiple)
        shape = (*batch["x_mask"].shape, self.config.mel.n_mels)
        x = np.zeros(shape, np.float16)
        noise = np.zeros(shape, np.float32)
        for n, row in enumerate(rows):
            x[n, : row["frames"]] = stretch(self.corpus.packed_frames(row["clip"]), row["frames"])
            # drawn last, so that padding changes nothing
            row["rng"].standard_normal(dtype=np.float32, out=noise[n, : row["length"]])
        batch["x"] = torch.from_numpy(x)
        batch["noise"] = torch.from_numpy(noise)

        multiple = self.config.data.text_multiple
        texts = [row["text"] for row in rows]
        ids = [self.token_ids(text) for text in texts]
        batch["ids"], batch["text_mask"] = pad(ids, multiple)
        if self.features:
            features = [self.features(text) for text in texts]
            batch["features"], _ = pad(features, multiple)
        return batch


def open_text_features(config: Config, corpus: Corpus) -> Callable[[str], np.ndarray]:
    """The frozen text encoder's cached features: from a text of the corpus, or "", to (S, E) float16."""
    path, texts = text_features_file(config, corpus)
    read = shards.map_features(path, PREPARE_HINT)
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
    """The clips of the global batch of a step: indices (batch_size,), shortest first; a pure function."""
    steps = math.ceil(len(lengths) / batch_size)  # per epoch
    epoch, position = divmod(step, steps)
    chosen = bucketed_epoch(lengths, epoch, batch_size, seed)[position]
    by_length = np.argsort(lengths[chosen], kind="stable")
    return chosen[by_length]


def bucketed_epoch(lengths: np.ndarray, epoch: int, batch_size: int, seed: int) -> np.ndarray:
    """The clips of all batches of an epoch: indices (steps, batch_size).

    An epoch shows every clip once: sorted by length, with 2 % of jitter, so that neighbours need little
    padding and still differ from epoch to epoch, cut into batches, and these shuffled. The last batch is
    filled up with clips that are shown again.
    """
    count = len(lengths)
    steps = math.ceil(count / batch_size)
    rng = np.random.default_rng((seed, ORDER, epoch))
    clips = rng.permutation(count)
    clips = np.resize(clips, steps * batch_size)
    jitter = rng.uniform(0.98, 1.02, len(clips))
    order = np.argsort(lengths[clips] * jitter)
    batches = clips[order].reshape(steps, batch_size)
    batch_order = rng.permutation(steps)
    return batches[batch_order]


def low_discrepancy_time(number: int) -> float:
    """A time in (0, 1) for each validation clip: always the same, and any few of them spread evenly."""
    time = number * (math.sqrt(5) - 1) / 2 % 1
    return min(max(time, 0.001), 0.999)


def pad(rows: list[Tensor] | list[np.ndarray], multiple: int) -> tuple[Tensor, Tensor]:
    """Rows (N, ...) on the CPU -> (B, N', ...) filled up with 0, N' a multiple; and the mask (B, N')."""
    arrays = [np.asarray(row) for row in rows]
    mask = length_mask([len(array) for array in arrays], multiple)
    padded = np.zeros((*mask.shape, *arrays[0].shape[1:]), arrays[0].dtype)  # (B, N', ...)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return torch.from_numpy(padded), mask


def stretch(frames: np.ndarray, length: int) -> np.ndarray:
    """Log-mels (T, M) at another tempo and the same pitch: (length, M), between neighbours linearly."""
    if length == len(frames):
        return frames
    last = len(frames) - 1
    middles = np.arange(length) + 0.5
    places = middles * len(frames) / length - 0.5
    places = places.clip(0, last)
    before = places.astype(int)
    after = np.minimum(before + 1, last)
    share = places - before
    share = share.astype(np.float32)[:, None]
    return frames[before] * (1 - share) + frames[after] * share


def length_mask(lengths: list[int], multiple: int) -> Tensor:
    """(B, N'), True where a row of that length is; N' is the longest, rounded up to a multiple."""
    size = math.ceil(max(lengths) / multiple) * multiple
    return torch.arange(size) < torch.tensor(lengths)[:, None]


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
