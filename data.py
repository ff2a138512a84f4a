"""Corpora: read as published, packed into shards, served in batches; and caches of frozen networks' features.

A packed folder holds rows_*.npy (memory-mapped, some hundred clips one after another: float16 log-mels, or
int16 waves in frames of `hop` samples), clips_*.jsonl (a header, then a line per clip) and, written last,
index.json. A file is complete or absent: it is written under another name, flushed, then renamed.
Everything random in a batch depends on (seed, step, row of the global batch) and on nothing else.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import audio
from config import Config, Mel, TTSConfig, UserError, load, run_main
from klein_config import Picture
from music_config import MusicConfig
from corpora import demo, voice
from text import normalize

FORMAT = 2  # version of the packed folder's file format
SHARD = 512  # clips per shard
SPOKEN_SHARD = 32  # clips per shard of the demo, whose clips are synthesised: small, to share the work evenly
SHORTEST_SEC = 0.1  # shorter recordings are not packed
LONGEST_SEC = 60.0  # nor are longer ones, except music; data.max_seconds decides which packed clips are used
SPLITS = ("train", "val", "test")
ORDER, TRAIN, VALIDATION = range(3)  # which random stream of the batches: part of its seed
ASSETS = Path(__file__).parent / "assets"
PREPARE = "run `python system.py prepare --config ...`"
ARCHIVES = {  # URL, and the folder inside the archive
    "ljspeech": ("https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2", "LJSpeech-1.1"),
    "librispeech": ("https://www.openslr.org/resources/12/train-clean-100.tar.gz", "LibriSpeech"),
}


class Clip(NamedTuple):
    id: str
    text: str
    split: str
    wav: str | None  # path of the recording; None where none was kept
    start: float = 0.0  # of the clip within the recording, seconds
    stop: float = 0.0  # seconds; 0 = end of the recording
    frames: int = 0  # number of rows; this and the fields below are known once the clip is packed
    shard: int = 0
    offset: int = 0  # rows before it in its shard
    number: int = 0  # clips before it in the corpus
    group: str = ""  # scores are also reported per group: a language and a voice, "en f3"


class Packed:
    """A packed corpus: its clips, the frames of each, and mean and deviation over the training clips."""

    def __init__(self, config: Config, format: dict, longest: float):
        """longest: clips with more frames are left out.

        raises UserError for a folder that is missing, damaged, or packed in another format.
        """
        self.folder = packed_dir(config, format)
        index = read_index(self.folder, format)
        self.mean = index["mean"]
        self.std = index["std"]
        self.plan = index["plan"]
        self.rate = format["sample_rate"]
        self.shards = []
        clips = []
        for n in range(index["shards"]):
            shard = read_shard(self.folder, n, self.plan)
            if shard is None:
                raise UserError(
                    f"{self.folder}: shard {n} is missing or damaged; "
                    f"pack again, which makes it anew: {PREPARE}"
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

    def rows(self, clip: Clip) -> torch.Tensor:
        """(T, M) float32."""
        frames = self.shards[clip.shard]
        frames = frames[clip.offset : clip.offset + clip.frames]
        return torch.from_numpy(frames.astype(np.float32))

    def wave(self, clip: Clip) -> torch.Tensor:
        """(N,) float32 at `rate` Hz, where the frames are samples."""
        return self.rows(clip).flatten() / 32767

    def recording(self, clip: Clip) -> tuple[torch.Tensor, int]:
        return self.wave(clip), self.rate


class Waves(Packed):
    """Speech as waves of at most picture.seconds; `statistics` is empty: pictures are in [0, 1] already."""

    statistics = ()

    def __init__(self, config: Config):
        p = config.picture
        seconds = min(config.data.max_seconds, p.seconds)
        super().__init__(config, wave_form(p), longest=math.ceil(seconds * p.sample_rate / p.hop))
        self.max_samples = int(seconds * self.rate)

    def wave(self, clip: Clip) -> torch.Tensor:
        return super().wave(clip)[: self.max_samples]


def schedule(lengths: np.ndarray, step: int, batch_size: int, seed: int) -> np.ndarray:
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


def golden(number: int) -> float:
    """A time in (0, 1) for each validation clip: always the same, and any few of them spread evenly."""
    time = number * (math.sqrt(5) - 1) / 2 % 1
    return min(max(time, 0.001), 0.999)


def pad(rows: list[torch.Tensor], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def cache_rows(
    path: Path,
    lengths: list[int],
    width: int | None,
    encode: Callable[[list[int]], Iterable[np.ndarray]],
    batch_size: int,
    what: str,
) -> None:
    """Write the features that `encode` computes of items 0, 1, ... to `path`, unless that is done.

    What was interrupted is continued. Features are kept as float16.
    path: .npy, named by everything its content depends on. lengths: rows of each item. width: of a row; None:
    as `encode` makes them.
    encode: the numbers of `batch_size` items of similar length -> their rows (length, width).
    what: for the progress bar and errors.
    """
    if path.exists():
        return
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    sorted_lengths = [lengths[n] for n in order]
    stops = np.cumsum(sorted_lengths)  # where each item ends in the file
    starts = stops - sorted_lengths
    unfinished = path.with_suffix(".unfinished")
    progress = path.with_suffix(".done")  # how many items are written
    try:
        target = open_unfinished(unfinished, sum(lengths), width)
        done = int(progress.read_text()) if target is not None and progress.exists() else 0
        for first in tqdm(range(done, len(order), batch_size), desc=what, disable=None):
            items = order[first : first + batch_size]
            last = first + len(items) - 1
            features = list(encode(items))
            for n, rows in zip(items, features, strict=True):
                check_features(rows, lengths[n], width, f"{what}: item {n}")
            if first == 0:
                target = create_unfinished(unfinished, (int(stops[-1]), features[0].shape[1]), what)
            target[starts[first] : stops[last]] = np.concatenate(features)
            target.flush()
            with replacing(progress) as part:
                part.write_text(str(last + 1))
        spans = np.stack([starts, stops], 1)[np.argsort(order)]
        with replacing(path.with_suffix(".spans.npy")) as part, open(part, "wb") as f:
            np.save(f, spans)
        os.replace(unfinished, path)
        progress.unlink()
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e})") from e


def open_unfinished(path: Path, length: int, width: int | None) -> np.ndarray | None:
    """The interrupted cache, to be continued; None: none there, or cut short, or of another shape."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        rows = np.load(path, mmap_mode="r+")
        if rows.shape == (length, width or rows.shape[1]):
            return rows
    return None


def create_unfinished(path: Path, shape: tuple[int, int], what: str) -> np.ndarray:
    """A new cache to write to; raises UserError where the disk has no room for it."""
    needed = 2 * shape[0] * shape[1]  # bytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.with_suffix('.npy')}: {what} need {needed / 1e9:.1f} GB, "
            f"the disk has {free / 1e9:.1f} GB left"
        )
    return np.lib.format.open_memmap(path, "w+", "<f2", shape)


def check_features(rows: np.ndarray, length: int, width: int | None, what: str) -> None:
    """raises UserError for rows of another shape, or with numbers that float16 does not have."""
    fits_float16 = (np.abs(rows) < 65504).all()
    if rows.shape != (length, width or rows.shape[1]) or not fits_float16:
        raise UserError(f"{what} is {rows.shape} instead of {length, width}, or too large for float16")


def open_rows(path: Path, remedy: str) -> Callable[[int], torch.Tensor]:
    """Open a feature cache: a function from an item's number to its rows (S, D), float32.

    raises UserError, which ends with `remedy`, where it is missing or damaged.
    """
    try:
        spans = np.load(path.with_suffix(".spans.npy"))
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: missing, or damaged and to be deleted; {remedy}") from e

    def rows(number: int) -> torch.Tensor:
        start, stop = spans[number]
        return torch.from_numpy(values[start:stop].astype(np.float32))

    return rows


def prepare_speech(
    config: Config, format: dict, cut: Callable[[Config, list[Clip], Path], list[Clip]]
) -> None:
    """Pack data.corpus, unless that is done. cut: splits clips that are too long; may write to the folder."""
    root = Path(config.data.data_dir)
    out = packed_dir(config, format)
    is_packed = out == root or (out.exists() and not root.exists())  # the recordings may be gone by now
    if config.data.corpus != "demo" and is_packed:
        return
    corpus, clips, skipped = read_corpus(config)
    clips = cut(config, clips, out)
    read = functools.partial(read_speech, out, corpus, format)
    pack(out, corpus, clips, skipped, format, read, config.data.workers)


def packed_dir(config: Config, format: dict) -> Path:
    """data.data_dir itself where it is packed or will be synthesised; else a folder named by its content."""
    root = Path(config.data.data_dir)
    if config.data.corpus in ("demo", "pieces") or (root / "index.json").exists():
        return root
    content = [str(root.resolve()), format, config.data.align]
    return Path("data/packed", f"{root.resolve().stem}-{digest(content)[:8]}")


def wave_form(picture: Picture) -> dict:
    return {"sample_rate": picture.sample_rate, "hop": picture.hop, "seconds": picture.seconds}


def read_corpus(config: Config) -> tuple[dict, list[Clip], list[str]]:
    """A description of data.corpus, its clips, not packed yet, and what is wrong with those left out.

    It is downloaded first where data.download says so.
    """
    settings = config.data
    root = Path(settings.data_dir)
    if settings.corpus == "demo":
        speaker = voice.find_voice(settings.voice)  # maybe not the one asked for: the description says which
        corpus = {"name": "demo", "grammar": settings.grammar, "sentences": settings.sentences}
        corpus |= {"voice": speaker.name, "weights": speaker.sha256[:12]}
        return corpus, demo_clips(settings.grammar, settings.sentences), []
    if settings.download and not root.exists():
        download(settings.corpus, root)
    readers = {"ljspeech": read_metadata, "librispeech": read_librispeech, "music": read_music}
    clips, skipped = readers[settings.corpus](root)
    return {"name": settings.corpus, "resample": settings.corpus != "ljspeech"}, clips, skipped


def read_speech(out: Path, corpus: dict, format: dict, clip: Clip) -> np.ndarray | None:
    """A clip as log-mels (T, M), float16, or as a wave (T, hop), int16; None for one that is too long.

    raises UserError for a recording that is too short or unusable.
    """
    rate = format["sample_rate"]
    longest = format.get("seconds", math.inf if corpus["name"] == "music" else LONGEST_SEC)
    if corpus["name"] == "demo":
        wave = demo.speak(clip.text, rate, corpus["voice"])
        if clip.wav:
            (out / "wavs").mkdir(exist_ok=True)
            audio.save_wav(out / clip.wav, wave, rate)
    else:
        wave = read_recording(clip, rate, corpus["resample"] or "seconds" in format)
    start = round(clip.start * rate)
    stop = round(clip.stop * rate) or None
    wave = wave[start:stop]
    if len(wave) < SHORTEST_SEC * rate:
        raise UserError(f"{len(wave) / rate:.2f} s is below {SHORTEST_SEC} s")
    if len(wave) > longest * rate + 1:  # + 1: a cut is rounded
        return None
    if "n_mels" in format:
        log_mel = audio.log_mel(wave, Mel(**format))
        return log_mel.numpy().astype(np.float16)
    return wave_rows(wave, format["hop"])


def wave_rows(wave: torch.Tensor, hop: int) -> np.ndarray:
    """A wave (N,) as int16 rows (T, hop), the last one filled up with 0."""
    samples = (wave.clamp(-1, 1) * 32767).round().short().numpy()
    padding = -len(samples) % hop
    return np.pad(samples, (0, padding)).reshape(-1, hop)


def demo_clips(grammar: str, sentences: int) -> list[Clip]:
    """The demo's clips. Recordings of the first 64 and of all held-out ones are kept, to listen to."""
    clips = []
    for n, sentence in enumerate(demo.demo_sentences(grammar, sentences)):
        is_kept = n < 64 or sentence.split != "train"
        wav = f"wavs/{sentence.id}.wav" if is_kept else None
        clips.append(Clip(*sentence, wav))
    return clips


def pack(
    out: Path,
    corpus: dict,
    clips: list[Clip],
    skipped: list[str],
    format: dict,
    read: Callable[[Clip], np.ndarray | None],
    workers: int,
    strict: bool = False,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write the missing shards of a share, and the index once no shard of any share is missing.

    corpus: its description. skipped: lines about what could not become a clip. format: of the frames; a
    reader must ask for the same. read: a clip's frames (T, M); None: it is too long, which is counted;
    UserError: it is skipped, by name. strict: no index where anything was skipped. share: (i, n), every n-th
    shard from the i-th.
    """
    # what the clips are, not where their recordings lie
    contents = [[clip.id, clip.text, clip.split, clip.start, clip.stop] for clip in clips]
    fingerprint = digest([FORMAT, corpus, format, contents])
    has_index = (out / "index.json").exists()
    if has_index:
        index = read_index(out, format)
        if index["plan"] != fingerprint:
            raise UserError(
                f"{out}: already holds another corpus ({index['corpus']}, or other clips); "
                "delete it, or choose another folder"
            )
    size = SPOKEN_SHARD if corpus["name"] == "demo" else SHARD
    parts = [clips[start : start + size] for start in range(0, len(clips), size)]
    missing = [n for n in range(share[0], len(parts), share[1]) if read_shard(out, n, fingerprint) is None]
    if has_index and not missing and not strict:
        return
    missing_clips = sum(len(parts[n]) for n in missing)
    for line in skipped:
        print(f"skipped {line}")
    print(f"packing {missing_clips} clips into {out}/", flush=True)
    with replacing(out / "plan") as part:  # fails before any work where the folder cannot be written to
        part.write_text(fingerprint)
    write = functools.partial(pack_shard, out, fingerprint, read)
    processes = max(1, min(workers, len(missing)))
    with (
        ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=missing_clips, unit="clip", disable=None) as bar,
    ):
        for count in pool.map(write, missing, [parts[n] for n in missing]):
            bar.update(count)
    shards = [read_shard(out, n, fingerprint) for n in range(len(parts))]
    if None in shards:
        print(f"{out}: other shares are still to be made", flush=True)
    else:
        write_index(out, corpus, fingerprint, format, shards, skipped, strict)


def pack_shard(out: Path, fingerprint: str, read: Callable, shard: int, clips: list[Clip]) -> int:
    """Write one shard, its list of clips last; returns len(clips), those included that were skipped."""
    packed = []
    arrays = []
    skipped = []
    too_long = 0
    offset = 0
    sums = np.zeros(3)  # over training clips: of the values, of their squares, and how many they are
    for clip in clips:
        try:
            frames = read(clip)
        except voice.VoiceError:
            raise
        except UserError as e:
            skipped.append(f"{clip.id}: {e}")
            print(f"skipped {clip.id}: {e}", flush=True)
            continue
        if frames is None:
            too_long += 1
            continue
        packed.append(clip._replace(frames=len(frames), shard=shard, offset=offset))
        arrays.append(frames)
        offset += len(frames)
        if clip.split == "train":
            squares = np.square(frames, dtype=np.float64)
            sums += frames.sum(dtype=np.float64), squares.sum(), frames.size
    header = {"plan": fingerprint, "clips": len(packed), "frames": offset, "sums": sums.tolist()}
    header |= {"skipped": skipped, "too_long": too_long}
    rows_file, clips_file = shard_files(out, shard)
    with replacing(rows_file) as part, open(part, "wb") as f:
        np.save(f, np.concatenate(arrays) if arrays else np.zeros((0, 1), np.float16))
    lines = [header]
    lines += [clip._asdict() for clip in packed]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with replacing(clips_file) as part:
        part.write_text(text, encoding="utf-8")
    return len(clips)


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """The files of a shard: its frames, its clips."""
    return folder / f"rows_{shard:05d}.npy", folder / f"clips_{shard:05d}.jsonl"


def write_index(
    out: Path,
    corpus: dict,
    fingerprint: str,
    format: dict,
    shards: list[tuple],
    skipped: list[str],
    strict: bool,
) -> None:
    """Sum up all shards; raises UserError for too few clips, and, if `strict`, for any that was skipped."""
    headers = [header for header, _, _ in shards]
    clips = sum((shard_clips for _, shard_clips, _ in shards), [])
    skipped = skipped + sum((header["skipped"] for header in headers), [])
    too_long = sum(header["too_long"] for header in headers)
    by_split = collections.Counter(clip.split for clip in clips)
    counts = {split: by_split[split] for split in SPLITS}
    is_refused = strict and (skipped or too_long)
    if is_refused or len(skipped) > len(clips) or not counts["train"]:
        for n, header in enumerate(headers):
            if header["skipped"] or header["too_long"]:
                _, clips_file = shard_files(out, n)
                clips_file.unlink()  # the next run tries again
        raise UserError(
            f"{out}: not a corpus yet: {counts}; "
            f"{too_long} clips are too long (data.align cuts them for pictures), "
            f"{len(skipped)} clips had to be skipped. {'; '.join(skipped[:1])}"
        )
    total, total_squares, count = np.sum([header["sums"] for header in headers], 0)
    mean = total / count
    index = {
        "format": FORMAT,
        "corpus": corpus,
        "clips": counts,
        "mean": float(mean),
        "std": math.sqrt(total_squares / count - mean**2),
        "form": format,
        "shards": len(shards),
        "plan": fingerprint,
        "skipped": skipped,
        "too_long": too_long,
    }
    with replacing(out / "index.json") as part:
        part.write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
    for leftover in out.glob("*.part"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    found = ", ".join(f"{n} {split}" for split, n in counts.items())
    print(f"{out}: {found} clips; {len(skipped)} skipped, {too_long} too long", flush=True)


def read_index(folder: Path, format: dict) -> dict:
    """index.json of a packed folder; raises UserError where it is missing, damaged, or of another format."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        found = {"format": index["format"], **(index.get("form") or {})}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{folder}: no packed corpus there, or a damaged index.json, to be deleted; {PREPARE}"
        ) from e
    wanted = {"format": FORMAT, **format}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: packed with {key} {found.get(key)}, but {value} is wanted; "
                "delete it, or choose another folder"
            )
    return index


def read_shard(folder: Path, shard: int, fingerprint: str) -> tuple[dict, list[Clip], np.ndarray] | None:
    """A shard's header, clips and frames (T, M), memory-mapped; None: incomplete, or other fingerprint."""
    rows_file, clips_file = shard_files(folder, shard)
    try:
        text = clips_file.read_text(encoding="utf-8")
        lines = text.split("\n")[:-1]
        entries = [json.loads(line) for line in lines]
        header = entries[0]
        clips = [Clip(**entry) for entry in entries[1:]]
        frames = np.load(rows_file, mmap_mode="r")
        is_wanted = header["plan"] == fingerprint
        is_complete = header["clips"] == len(clips) and header["frames"] == len(frames)
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None
    return (header, clips, frames) if is_wanted and is_complete else None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` if the block succeeds: nobody sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e})") from e
    finally:
        part.unlink(missing_ok=True)


def digest(values) -> str:
    """SHA-256 of values as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_metadata(root: Path) -> tuple[list[Clip], list[str]]:
    """The lines of LJSpeech's metadata.csv (id|transcript|normalised) as clips of wavs/<id>.wav.

    The split is the published one. returns: the clips, and what is wrong with other lines.
    """
    path = root / "metadata.csv"
    if not path.is_file():
        raise UserError(
            f"{path}: missing; --download (data.download) fetches LJSpeech-1.1 where there is no {root}"
        )
    texts, skipped = read_transcripts([path], "|", 3)
    splits = {}
    for line in (ASSETS / "ljspeech_split.txt").read_text().splitlines():
        if not line.startswith("#"):
            split, name = line.split()
            splits[name] = split
    clips = []
    for name, (text, folder) in texts.items():
        wav = folder / "wavs" / f"{name}.wav"
        clips.append(Clip(name, text, splits.get(name, "train"), str(wav)))
    return validate_on_some(root, clips), skipped


def read_librispeech(root: Path) -> tuple[list[Clip], list[str]]:
    """The utterances below `root`, by <speaker>/<chapter>/<speaker>-<chapter>.trans.txt.

    Transcripts are capitals without punctuation; they become "A capital first and a full stop last.", because
    prompts are typed so. 2 % of the speakers validate, 2 % test: no voice, room or book that is known from
    training makes a validation loss look good.
    returns: the clips, and what is wrong with other lines.
    """
    texts, skipped = read_transcripts(sorted(root.rglob("*.trans.txt")), " ", 2)
    if not texts:
        raise UserError(
            f"{root}: no <speaker>/<chapter>/*.trans.txt below it; "
            "--download (data.download) fetches it where it is missing"
        )
    speakers = {name.split("-")[0] for name in texts}
    shuffled = sorted(speakers, key=lambda speaker: zlib.crc32(speaker.encode()))
    held_out = round(len(speakers) / 50)
    validation = shuffled[:held_out]
    test = shuffled[held_out : 2 * held_out]
    splits = dict.fromkeys(validation, "val") | dict.fromkeys(test, "test")
    clips = []
    for name, (text, folder) in texts.items():
        sentence = re.sub(r"\bi\b", "I", text.capitalize()) + "."
        split = splits.get(name.split("-")[0], "train")
        clips.append(Clip(name, sentence, split, str(folder / f"{name}.flac")))
    return validate_on_some(root, clips), skipped


def read_music(path: Path) -> tuple[list[Clip], list[str]]:
    """The recordings and captions of a JSON list, [{"wav", "label"}], or of a folder's *.csv (file, caption).

    Paths are relative to the list or table.
    returns: the clips, and those without a caption.
    raises UserError for a recording that is missing: nobody trains on silence.
    """
    table = path if path.suffix == ".json" else min(path.glob("*.csv"), default=path / "captions.csv")
    try:
        clips = read_captions(table)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as e:
        raise UserError(
            f'{table}: missing, or not [{{"wav": ..., "label": ...}}, ...], '
            f"or no table of file and caption ({e!r})"
        ) from e
    missing = [clip.wav for clip in clips if not Path(clip.wav).is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, as {len(missing)} of {len(clips)} recordings in {table}: "
            "fetch them, or strike them out"
        )
    captioned = [clip for clip in clips if clip.text]
    skipped = [f"{clip.wav}: empty caption" for clip in clips if not clip.text]
    return validate_on_some(path, captioned), skipped


def read_captions(table: Path) -> list[Clip]:
    """The entries of a JSON list or CSV table as clips; raises what goes wrong while one reads it."""
    is_json = table.suffix == ".json"
    wav_key = "wav" if is_json else "file"
    caption_key = "label" if is_json else "caption"
    with open(table, encoding="utf-8-sig", newline="") as f:
        entries = json.load(f) if is_json else list(csv.DictReader(f))
    folder = table.parent.resolve()
    clips = []
    for n, entry in enumerate(entries):
        wav = Path(entry[wav_key])
        split = entry.get("split") or "train"
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {SPLITS}")
        clips.append(Clip(f"{n:05d}-{wav.stem}", entry[caption_key].strip(), split, str(folder / wav)))
    return clips


def read_transcripts(
    paths: list[Path], separator: str, columns: int
) -> tuple[dict[str, tuple[str, Path]], list[str]]:
    """{name: (text, folder)} of lines of a name and its transcripts; and what is wrong with other lines.

    Of three columns the last, in words, is taken as it is; where it is empty or missing, the second, as
    people type it, is normalised.
    """
    texts = {}
    skipped = []
    splits = columns - 1 if separator == " " else -1
    for path in paths:
        lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.split(separator, splits)]
            name = fields[0]
            spelled_out = "".join(fields[columns - 1 : columns])
            text = spelled_out or normalize("".join(fields[1:2]))
            fault = find_fault(line, fields, columns, text)
            if not fault and name in texts:
                fault = "duplicate id"
            if fault:
                skipped.append(f"{path} line {number} ({name[:40]}): {fault}")
            else:
                texts[name] = text, path.parent.resolve()
    return texts, skipped


def find_fault(line: str, fields: list[str], columns: int, text: str) -> str:
    """What is wrong with a line of transcripts; "" where nothing is."""
    name = fields[0]
    if "\ufffd" in line:
        return "not UTF-8"
    if len(fields) not in (2, columns):
        return f"{len(fields)} fields, not {columns}"
    if not text:
        return "empty text"
    if not name or Path(name).name != name or not name.isprintable():
        return "no file name"
    return ""


def validate_on_some(root: Path, clips: list[Clip]) -> list[Clip]:
    """The clips; where none of them validates, every 20th training clip does."""
    train = [n for n, clip in enumerate(clips) if clip.split == "train"]
    if not train or any(clip.split == "val" for clip in clips):
        return clips
    reason = "the corpus's own split validates on none of these clips"
    print(f"{root}: {reason}; every 20th validates instead", flush=True)
    clips = list(clips)
    for n in train[19::20] or train[-1:]:
        clips[n] = clips[n]._replace(split="val")
    return clips


def read_recording(clip: Clip, sample_rate: int, resample: bool) -> torch.Tensor:
    """A clip's whole recording (N,); raises UserError: missing, damaged, silent, or at another rate."""
    if not Path(clip.wav).is_file():
        raise UserError(f"{clip.wav} is missing")
    wave = audio.load_wav(clip.wav, sample_rate)
    info = soundfile.info(clip.wav, verbose=True)
    # libsndfile reads what is left of a truncated file and only mentions it
    is_short = len(wave) < int(info.frames / info.samplerate * sample_rate)
    if is_short or re.search(r"data : \d+ \(should be", info.extra_info):
        raise UserError(f"{clip.wav} is truncated")
    if info.samplerate != sample_rate and not resample:
        raise UserError(
            f"{clip.wav} has {info.samplerate} Hz instead of {sample_rate}; "
            "`python data.py ljspeech --resample` converts"
        )
    if not wave.isfinite().all() or wave.abs().max() < 1e-4:  # that is 3 steps of int16
        raise UserError(f"{clip.wav} is silent, or not numbers")
    return wave


def download(corpus: str, root: Path) -> None:
    """Fetch and unpack the archive of ljspeech | librispeech so that the folder inside it becomes `root`."""
    url, folder = ARCHIVES[corpus]
    archive = root.with_name(f"{root.name}.archive.part")
    unpacked = root.with_name(f"{root.name}.part")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(archive))
        print(f"unpacking {archive}", flush=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / folder).rename(root)
        unpacked.rmdir()
        archive.unlink()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        raise UserError(
            f"{url}: cannot be had ({e}); fetch and unpack it by other means, and name its folder"
        ) from e


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Pack a corpus.", epilog="--key value for any knob of config.py."
    )
    parser.add_argument("corpus", choices=("ljspeech", "librispeech", "music", "demo"))
    parser.add_argument("--out", required=True, help="where the shards go")
    parser.add_argument(
        "--root",
        "--json",
        default="",
        help="the corpus as published: a folder; music: that of a table, or a JSON list",
    )
    parser.add_argument("--download", action="store_true", help="fetch it into --root if that is missing")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: make every n-th shard only; n machines share --out"
    )
    parser.add_argument(
        "--resample", action="store_true", help="recordings at another sample rate, instead of skipping them"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what would be skipped")
    options, rest = parser.parse_known_args()
    match = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {options.shard}: expected i/n with i below n, as 0/4")
    overrides = [f"--corpus={options.corpus}", f"--data_dir={options.root or options.out}"]
    if options.download:
        overrides.append("--download=true")
    is_music = options.corpus == "music"
    config = load(MusicConfig if is_music else TTSConfig, "", overrides + rest)
    corpus, clips, skipped = read_corpus(config)
    format = asdict(config.mel)
    if is_music:  # waves
        format = {key: format[key] for key in ("sample_rate", "hop")}
    if options.resample:
        corpus["resample"] = True
    out = Path(options.out)
    read = functools.partial(read_speech, out, corpus, format)
    share = int(match[1]), int(match[2])
    pack(out, corpus, clips, skipped, format, read, config.data.workers, options.strict, share)


if __name__ == "__main__":
    run_main(main)
