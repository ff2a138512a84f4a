"""Packed corpora: their file format, and caches of what frozen networks make of them.

A packed folder holds rows_*.npy (memory-mapped, some hundred clips one after another: float16 log-mels, or
int16 waves in frames of `hop` samples), clips_*.jsonl (a header, then a line per clip) and, written last,
index.json. A file is complete or absent: it is written under another name, flushed, then renamed.
"""

import collections
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from tqdm import tqdm

from config import Config, UserError, WriteError
from corpora.espeak import VoiceError
from device import worker_count

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT_VERSION = 2  # of the packed folder's file format
CLIPS_PER_SHARD = 512
DEMO_CLIPS_PER_SHARD = 32  # few, to share the work evenly: its clips are synthesised
MADE = ("demo", "pieces")  # corpora that are made in data.data_dir, not read from it

SPLITS = ("train", "val", "test")

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PREPARE_HINT = "run `python system.py prepare --config ...`"


class Clip(NamedTuple):
    id: str
    text: str
    split: str  # train | val | test
    wav: str | None = None  # path of the recording; None where none was kept
    start: float = 0.0  # of the clip within the recording, seconds
    stop: float = 0.0  # seconds; 0 = end of the recording
    frames: int = 0  # this and the fields below are known once the clip is packed
    shard: int = 0
    offset: int = 0  # frames before it in its shard
    number: int = 0  # clips before it in the corpus
    group: str = ""  # scores are also reported per group: a language and a voice, "en f3"


def packed_dir(config: Config, format: dict) -> Path:
    """data.data_dir itself where it is packed or will be synthesised; else a folder named by its content."""
    root = Path(config.data.data_dir)
    if config.data.corpus in MADE or (root / "index.json").exists():
        return root
    content = [str(root.resolve()), format, config.data.align]
    return Path("data/packed", f"{root.resolve().stem}-{digest(content)[:8]}")


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

    corpus: its description.
    skipped: lines about what could not become a clip.
    format: of the frames; who opens the folder must ask for the same.
    read: a clip's frames (T, M); None: it is too long, which is counted; an error: it is skipped, by name.
    workers: processes; 0: see `device.worker_count`.
    strict: no index where anything was skipped.
    share: (i, n), every n-th shard from the i-th.
    """
    skipped = skipped + [f"{clip.id!a}: not Unicode" for clip in clips if not is_unicode(clip)]
    clips = [clip for clip in clips if is_unicode(clip)]
    # what the clips are, not where their recordings lie
    contents = [[clip.id, clip.text, clip.split, clip.start, clip.stop] for clip in clips]
    fingerprint = digest([FORMAT_VERSION, corpus, format, contents])
    has_index = (out / "index.json").exists()
    if has_index:
        index = read_index(out, format)
        if index["plan"] != fingerprint:
            raise UserError(
                f"{out}: already holds another corpus ({index['corpus']}, or other clips); "
                "delete it, or choose another folder"
            )
    size = DEMO_CLIPS_PER_SHARD if corpus["name"] == "demo" else CLIPS_PER_SHARD
    parts = [clips[start : start + size] for start in range(0, len(clips), size)]
    missing = [n for n in range(share[0], len(parts), share[1]) if read_shard(out, n, fingerprint) is None]
    if has_index and not missing and not strict:
        return
    missing_clips = sum(len(parts[n]) for n in missing)
    for line in skipped:
        print(f"skipped {line}")
    print(f"packing {missing_clips} clips into {out}/", flush=True)
    with atomic_write(out / "plan") as part:  # fails before any work where the folder cannot be written to
        part.write_text(fingerprint)
    write = functools.partial(pack_shard, out, fingerprint, read)
    run_workers(write, missing, [parts[n] for n in missing], worker_count(workers), out)
    shards = [read_shard(out, n, fingerprint) for n in range(len(parts))]
    if None in shards:
        print(f"{out}: other shares are still to be made", flush=True)
    else:
        write_index(out, corpus, fingerprint, format, shards, skipped, strict)


def run_workers(
    write: Callable, numbers: list[int], parts: list[list[Clip]], workers: int, out: Path
) -> None:
    """write(number, clips) for each part, in processes, under a progress bar of clips."""
    processes = max(1, min(workers, len(numbers)))
    with (
        ProcessPoolExecutor(processes, initializer=start_worker) as pool,
        tqdm(total=sum(map(len, parts)), unit="clip", disable=None) as bar,
    ):
        try:
            for count in pool.map(write, numbers, parts):
                bar.update(count)
        except BrokenProcessPool as e:
            killed = "a process that packed was killed, maybe for want of memory"
            raise UserError(f"{out}: {killed}; pack again, which goes on, with fewer --workers") from e


def start_worker() -> None:
    """One thread, and no life without the process that packs: one that is killed cannot end its workers."""
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def is_unicode(clip: Clip) -> bool:
    """Whether its id and text can be written: JSON can say half of a letter, a file can have any name."""
    try:
        f"{clip.id}{clip.text}".encode()
    except UnicodeEncodeError:
        return False
    return True


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
        except (VoiceError, WriteError):
            raise
        except Exception as e:  # one that nobody foresaw must not take the other clips along
            reason = str(e) if isinstance(e, UserError) else " ".join(repr(e).split())
            skipped.append(f"{clip.id}: {reason}")
            print(f"skipped {clip.id}: {reason}", flush=True)
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
    with atomic_write(rows_file) as part, open(part, "wb") as f:
        np.save(f, np.concatenate(arrays) if arrays else np.zeros((0, 1), np.float16))
    lines = [header]
    lines += [clip._asdict() for clip in packed]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with atomic_write(clips_file) as part:
        part.write_text(text, encoding="utf-8")
    return len(clips)


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
        "format": FORMAT_VERSION,
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
    remove_leftovers(out, "*.part")
    with atomic_write(out / "index.json") as part:
        part.write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
    found = ", ".join(f"{n} {split}" for split, n in counts.items())
    counted = f"{len(skipped)} skipped, {too_long} too long"
    print(f"{out}: {found} clips; {counted}; plan {fingerprint}", flush=True)


def read_index(folder: Path, format: dict) -> dict:
    """index.json of a packed folder; raises UserError where it is missing, damaged, or of another format."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        found = {"format": index["format"], **(index.get("form") or {})}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{folder}: no packed corpus there, or a damaged index.json, to be deleted; {PREPARE_HINT}"
        ) from e
    wanted = {"format": FORMAT_VERSION, **format}
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


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """The files of a shard: its frames, its clips."""
    return folder / f"rows_{shard:05d}.npy", folder / f"clips_{shard:05d}.jsonl"


# Caches of features: an array (T, D) for each of many items


def cache_features(
    path: Path,
    lengths: list[int],
    width: int | None,
    encode: Callable[[list[int]], Iterable[np.ndarray]],
    batch_size: int,
    what: str,
) -> None:
    """Write the features that `encode` computes of items 0, 1, ... to `path`, unless that is done.

    What was interrupted is continued. Features are kept as float16.
    path: .npy, named by everything its content depends on.
    lengths: rows of each item.
    width: of a row; None: as `encode` makes them.
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
                progress.unlink(missing_ok=True)  # of another file, or it would vouch for this one's zeros
                target = create_unfinished(unfinished, (int(stops[-1]), features[0].shape[1]), what)
            write_rows(unfinished, target, starts[first], np.concatenate(features))
            with atomic_write(progress) as part:
                part.write_text(str(last + 1))
        spans = np.stack([starts, stops], 1)[np.argsort(order)]
        with atomic_write(path.with_suffix(".spans.npy")) as part, open(part, "wb") as f:
            np.save(f, spans)
        remove_leftovers(path.parent, f"{path.stem}.*.part")
        progress.unlink()
        os.replace(unfinished, path)
    except OSError as e:
        raise WriteError(f"{path}: cannot be written ({e})") from e


def open_unfinished(path: Path, length: int, width: int | None) -> np.ndarray | None:
    """The interrupted cache, to be continued; None: none there, or cut short, or of another shape."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        rows = np.load(path, mmap_mode="r")
        if rows.shape == (length, width or rows.shape[1]):
            return rows
    return None


def create_unfinished(path: Path, shape: tuple[int, int], what: str) -> np.ndarray:
    """A new cache to write to, its size told; raises UserError where the disk has no room for it."""
    needed = 2 * shape[0] * shape[1]  # bytes
    free = shutil.disk_usage(path.parent).free
    sizes = f"{what} need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left"
    if needed > free:
        raise UserError(f"{path.with_suffix('.npy')}: {sizes}; make room, or take another data.data_dir")
    print(f"{path.parent}/: {sizes}", flush=True)
    return np.lib.format.open_memmap(path, "w+", "<f2", shape)


def write_rows(path: Path, target: np.memmap, first: int, rows: np.ndarray) -> None:
    """Write rows (n, D) to the file of `target`, from row `first` on, and to the disk.

    Not through the map: where the disk is full, that ends the process by a signal.
    """
    with open(path, "rb+") as f:
        f.seek(target.offset + int(first) * target.strides[0])
        f.write(rows.astype(target.dtype).tobytes())
        f.flush()
        os.fsync(f.fileno())


def check_features(rows: np.ndarray, length: int, width: int | None, what: str) -> None:
    """raises UserError for rows of another shape, or with numbers that float16 does not have."""
    fits_float16 = (np.abs(rows) < 65504).all()
    if rows.shape != (length, width or rows.shape[1]) or not fits_float16:
        raise UserError(f"{what} is {rows.shape} instead of {length, width}, or too large for float16")


def open_features(path: Path, hint: str) -> Callable[[int], torch.Tensor]:
    """As `map_features`, of copies in memory."""
    rows = map_features(path, hint)
    return lambda number: torch.from_numpy(rows(number).copy())


def map_features(path: Path, hint: str) -> Callable[[int], np.ndarray]:
    """Open a feature cache: a function from an item's number to its rows (S, D), float16, to be read only.

    raises UserError, which ends with `hint`, where it is missing or damaged.
    """
    try:
        spans = np.load(path.with_suffix(".spans.npy"))
        values = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: missing, or damaged and to be deleted; {hint}") from e

    def rows(number: int) -> np.ndarray:
        start, stop = spans[number]
        return values[start:stop]

    return rows


# Files


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` if the block succeeds: nobody sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise WriteError(f"{path}: cannot be written ({e})") from e
    finally:
        with contextlib.suppress(OSError):  # of a disk that is read-only by now
            part.unlink()


@contextlib.contextmanager
def alone(*paths: Path, quiet: bool = True) -> Iterator[None]:
    """A block in which one process at a time is, of all machines that share the disk; others wait.

    The lock is the kernel's, which takes it away however its holder ends; the file stays.
    paths: of the lock; the first that can be opened. Where none can be, nobody waits.
    quiet: whether to wait without a line that says so.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                path.parent.mkdir(exist_ok=True)
                held = stack.enter_context(path.open("a"))
                take_lock(held, path, quiet)
                break
            except OSError:  # a folder of somebody else, a file system without locks
                continue
        yield


def take_lock(held: TextIO, path: Path, quiet: bool) -> None:
    """Of an open file, as soon as nobody else has it."""
    if not fcntl:
        return
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not quiet:
            print(f"{path}: another process is at work there; waiting for its end", flush=True)
        fcntl.lockf(held, fcntl.LOCK_EX)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WriteError(f"{folder}: cannot be made ({e.strerror})") from e


def remove_leftovers(folder: Path, pattern: str) -> None:
    """What processes that were killed left half written."""
    for leftover in folder.glob(pattern):
        leftover.unlink(missing_ok=True)


def digest(values) -> str:
    """SHA-256 of values as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
