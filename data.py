"""Corpora: read as published, packed once into shards, then read in batches; and caches of what frozen networks make of them.

A packed folder holds rows_*.npy (float16 log-mels, or int16 waves in rows of `hop` samples, of some hundred clips after one another,
memory-mapped), clips_*.jsonl (a header, a line a clip) and, last, index.json. A file is whole or absent: written under another name,
flushed, renamed. What is random in a batch comes from (seed, step, row of the global batch) and from nothing else.
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

FORMAT, SHARD = 2, 512                           # of a packed folder; clips in one shard of it
SPOKEN_SHARD = 32                                # of what is spoken on the spot: that processes share it evenly
SHORTEST_SEC, LONGEST_SEC = 0.1, 60.0            # what is packed; data.max_seconds decides what is read
SPLITS = ("train", "val", "test")
ORDER, TRAIN, VALIDATION = range(3)              # what a random stream of batches is for
ASSETS = Path(__file__).parent / "assets"
PREPARE = "run `python system.py prepare --config ...`"
ARCHIVES = {"ljspeech": ("https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2", "LJSpeech-1.1"),      # and the folder in it
            "librispeech": ("https://www.openslr.org/resources/12/train-clean-100.tar.gz", "LibriSpeech")}


class Clip(NamedTuple):
    id: str
    text: str
    split: str
    wav: str | None              # the recording, where there is one to listen to
    start: float = 0.0           # of the clip in it, seconds
    stop: float = 0.0            # 0 = its end
    frames: int = 0              # rows; this and what follows is known when it is packed
    shard: int = 0
    offset: int = 0              # rows before it in its shard
    number: int = 0              # clips before it in the corpus
    group: str = ""              # what figures are also told by: a language and a voice, "en f3"


class Packed:
    """A packed corpus: its clips, the rows of each, and the mean and deviation of all numbers that are trained on."""
    def __init__(self, config: Config, form: dict, longest: float):
        """longest: clips of more rows are left out. raises UserError for a folder that is missing, damaged, or packed in another form."""
        self.folder = packed_dir(config, form)
        index = read_index(self.folder, form)
        self.mean, self.std, self.rate = index["mean"], index["std"], form["sample_rate"]
        self.plan = index["plan"]
        shards = [read_shard(self.folder, n, index["plan"]) for n in range(index["shards"])]
        if None in shards:
            raise UserError(f"{self.folder}: shard {shards.index(None)} is missing or damaged; pack again, which makes it anew: {PREPARE}")
        self.shards, clips = [rows for _, _, rows in shards], sum((found for _, found, _ in shards), [])
        clips = [clip._replace(number=n, wav=clip.wav and str(self.folder / clip.wav)) for n, clip in enumerate(clips)]
        self.splits = {split: [c for c in clips if c.split == split and c.frames <= longest] for split in SPLITS}
        if config.data.overfit:
            self.splits = dict.fromkeys(SPLITS, sum(self.splits.values(), [])[:config.data.overfit])

    def clips(self, split: str) -> list[Clip]:
        """The clips of train | val | test in the corpus's order; with data.overfit, every split is its first clips."""
        return self.splits[split]

    def rows(self, clip: Clip) -> torch.Tensor:
        """(T, M) float32."""
        return torch.from_numpy(self.shards[clip.shard][clip.offset:clip.offset + clip.frames].astype(np.float32))

    def wave(self, clip: Clip) -> torch.Tensor:
        """(N,) float32 at `rate` Hz, where the rows are samples."""
        return self.rows(clip).flatten() / 32767

    def recording(self, clip: Clip) -> tuple[torch.Tensor, int]:
        return self.wave(clip), self.rate


class Waves(Packed):
    """Speech as waves of at most picture.seconds; `statistics`: none, pictures are in [0, 1] as they are."""
    statistics = ()

    def __init__(self, config: Config):
        seconds = min(config.data.max_seconds, config.picture.seconds)
        super().__init__(config, wave_form(config.picture), math.ceil(seconds * config.picture.sample_rate / config.picture.hop))
        self.longest = int(seconds * self.rate)                # samples

    def wave(self, clip: Clip) -> torch.Tensor:
        return super().wave(clip)[:self.longest]


def schedule(lengths: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """Which clips make the global batch of a step: indices (batch,), shortest first; a pure function. An epoch shows every clip once:
    sorted by length, give or take 2 %, so that neighbours need little padding and still differ from epoch to epoch, cut into
    batches, and these shuffled. What the last batch lacks is filled up with clips shown again.
    """
    steps = math.ceil(len(lengths) / batch)
    epoch, position = divmod(step, steps)
    rng = np.random.default_rng((seed, ORDER, epoch))
    clips = np.resize(rng.permutation(len(lengths)), steps * batch)
    blurred = lengths[clips] * rng.uniform(0.98, 1.02, len(clips))
    chosen = clips[np.argsort(blurred)].reshape(steps, batch)[rng.permutation(steps)[position]]
    return chosen[np.argsort(lengths[chosen], kind="stable")]


def prefetch(make: Callable, steps: Iterable[int], workers: int) -> Iterator:
    """make(step) for each of `steps`, in order, computed ahead by `workers` threads; 0: only when asked for."""
    ahead = collections.deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for step in steps:
            ahead.append(pool.submit(make, step))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        yield from (made.result() for made in ahead)


def golden(number: int) -> float:
    """A time in (0, 1) for each validation clip: the same every time, and any few of them spread evenly."""
    return min(max(number * (math.sqrt(5) - 1) / 2 % 1, 0.001), 0.999)


def pad(rows: list[torch.Tensor], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors (N, ...) -> (B, N', ...) filled up with 0, N' a multiple, and the mask (B, N') of what is valid."""
    size = math.ceil(max(map(len, rows)) / multiple) * multiple
    padded = rows[0].new_zeros(len(rows), size, *rows[0].shape[1:])
    for target, row in zip(padded, rows):
        target[:len(row)] = row
    return padded, torch.arange(size) < torch.tensor([[len(row)] for row in rows])


def cache_rows(path: Path, lengths: list[int], width: int | None, encode: Callable[[list[int]], Iterable[np.ndarray]],
               batch: int, what: str) -> None:
    """Write what `encode` makes of items 0, 1, ... to `path`, unless that is done; what was interrupted is taken up again.

    path: .npy, to be named by all that its content depends on. lengths: rows of each item. width: of a row, None = as encode makes them.
    encode: the numbers of `batch` items, alike in length -> their rows (length, width), kept as float16. what: for the progress bar.
    """
    if path.exists():
        return
    order, target = sorted(range(len(lengths)), key=lambda n: lengths[n]), None
    stops, unfinished, progress = np.cumsum([lengths[n] for n in order]), path.with_suffix(".unfinished"), path.with_suffix(".done")
    try:
        with contextlib.suppress(OSError, ValueError, EOFError):       # cut short, or of something else: made anew
            found = np.load(unfinished, mmap_mode="r+")
            target = found if found.shape == (stops[-1], width or found.shape[1]) else None
        done = int(progress.read_text()) if target is not None and progress.exists() else 0
        for first in tqdm(range(done, len(order), batch), desc=what, disable=None):
            items = order[first:first + batch]
            for n, rows in zip(items, found := list(encode(items)), strict=True):
                if rows.shape != (lengths[n], width or rows.shape[1]) or not (np.abs(rows) < 65504).all():
                    raise UserError(f"{what}: item {n} is {rows.shape} instead of {lengths[n], width}, or too large for float16")
            if not done and first == 0:
                shape = int(stops[-1]), found[0].shape[1]
                if (need := 2 * shape[0] * shape[1]) > (free := shutil.disk_usage(path.parent).free):
                    raise UserError(f"{path}: {what} need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
                target = np.lib.format.open_memmap(unfinished, "w+", "<f2", shape)
            target[stops[first] - lengths[order[first]]:stops[first + len(items) - 1]] = np.concatenate(found)
            target.flush()
            with replacing(progress) as part:
                part.write_text(str(first + len(items)))
        with replacing(path.with_suffix(".spans.npy")) as part, open(part, "wb") as f:
            np.save(f, np.stack([stops - [lengths[n] for n in order], stops], 1)[np.argsort(order)])
        os.replace(unfinished, path)
        progress.unlink()
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e})") from e


def open_rows(path: Path, remedy: str) -> Callable[[int], torch.Tensor]:
    """What `cache_rows` wrote: a function from an item's number to its rows (S, D), float32; UserError, with the remedy, without it."""
    try:
        spans, values = np.load(path.with_suffix(".spans.npy")), np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: missing, or damaged and to be deleted; {remedy}") from e
    return lambda n: torch.from_numpy(values[slice(*spans[n])].astype(np.float32))


def prepare_speech(config: Config, form: dict, cut: Callable[[Config, list[Clip], Path], list[Clip]]) -> None:
    """Pack data.corpus, unless that was done. cut: makes shorter clips of what is too long, and may keep notes in the folder."""
    d, root, out = config.data, Path(config.data.data_dir), packed_dir(config, form)
    if d.corpus != "demo" and (out == root or out.exists() and not root.exists()):
        return                                                 # there are no recordings, or none any more
    corpus, clips, skipped = read_corpus(config)
    pack(out, corpus, cut(config, clips, out), skipped, form, functools.partial(read_speech, out, corpus, form), d.workers)


def packed_dir(config: Config, form: dict) -> Path:
    """data.data_dir itself where it is packed, or to be spoken; else a folder named by what is packed there and how."""
    root = Path(config.data.data_dir)
    if config.data.corpus in ("demo", "pieces") or (root / "index.json").exists():
        return root
    return Path("data/packed", f"{root.resolve().stem}-{digest([str(root.resolve()), form, config.data.align])[:8]}")


def wave_form(picture: Picture) -> dict:
    return {"sample_rate": picture.sample_rate, "hop": picture.hop, "seconds": picture.seconds}


def read_corpus(config: Config) -> tuple[dict, list[Clip], list[str]]:
    """What data.corpus is, its clips, not packed yet, and what is wrong with others; fetched first where data.download says so."""
    d, root = config.data, Path(config.data.data_dir)
    if d.corpus == "demo":
        speaker = voice.find_voice(d.voice)        # maybe not the one that was asked for: the corpus says which
        corpus = {"name": "demo", "grammar": d.grammar, "sentences": d.sentences}
        corpus |= {"voice": speaker.name, "weights": speaker.sha256[:12]}
        return corpus, demo_clips(d.grammar, d.sentences), []
    if d.download and not root.exists():
        download(d.corpus, root)
    read = {"ljspeech": read_metadata, "librispeech": read_librispeech, "music": read_music}
    return {"name": d.corpus, "resample": d.corpus != "ljspeech"}, *read[d.corpus](root)


def read_speech(out: Path, corpus: dict, form: dict, clip: Clip) -> np.ndarray | None:
    """A clip as log-mels (T, M), float16, or as a wave, see `wave_rows`; None for one that is too long."""
    rate, hop, longest = form["sample_rate"], form["hop"], form.get("seconds", math.inf if corpus["name"] == "music" else LONGEST_SEC)
    if corpus["name"] == "demo":
        wave = demo.speak(clip.text, rate, corpus["voice"])
        if clip.wav:
            (out / "wavs").mkdir(exist_ok=True)
            audio.save_wav(out / clip.wav, wave, rate)
    else:
        wave = read_recording(clip, rate, corpus["resample"] or "seconds" in form)
    wave = wave[round(clip.start * rate):round(clip.stop * rate) or None]
    if len(wave) < SHORTEST_SEC * rate:
        raise UserError(f"{len(wave) / rate:.2f} s is below {SHORTEST_SEC} s")
    if len(wave) > longest * rate + 1:                         # + 1: a cut is rounded
        return None
    if "n_mels" in form:
        return audio.log_mel(wave, Mel(**form)).numpy().astype(np.float16)
    return wave_rows(wave, hop)


def wave_rows(wave: torch.Tensor, hop: int) -> np.ndarray:
    """A wave (N,) as rows (T, hop), int16, the last one filled up with 0."""
    return np.pad((wave.clamp(-1, 1) * 32767).round().short().numpy(), (0, -len(wave) % hop)).reshape(-1, hop)


def demo_clips(grammar: str, sentences: int) -> list[Clip]:
    """What the demo says. Of the first 64 to train on and of all held out, recordings are kept to hear beside samples."""
    said = demo.demo_sentences(grammar, sentences)
    kept = [n < 64 or sentence.split != "train" for n, sentence in enumerate(said)]
    return [Clip(*sentence, f"wavs/{sentence.id}.wav" if keep else None) for sentence, keep in zip(said, kept, strict=True)]


def pack(out: Path, corpus: dict, clips: list[Clip], skipped: list[str], form: dict, read: Callable[[Clip], np.ndarray],
         workers: int, strict: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Make the shards of a share (i, n: every n-th from the i-th on) that are missing, and the index when no shard is any more.

    corpus: what this is. form: what the rows are; a reader must want the same. skipped: what is no clip, and why. strict: then no index.
    read: a clip's rows (T, M); None: it is too long, which is counted; a UserError: it is skipped, by name.
    """
    plan = digest([FORMAT, corpus, form, [[*clip[:3], *clip[4:6]] for clip in clips]])         # wherever the recordings lie
    done = (out / "index.json").exists()
    if done and (index := read_index(out, form))["plan"] != plan:
        raise UserError(f"{out}: already holds another corpus ({index['corpus']}, or other clips); delete it, or choose another folder")
    size = SPOKEN_SHARD if corpus["name"] == "demo" else SHARD
    parts = [clips[start:start + size] for start in range(0, len(clips), size)]
    undone = [n for n in range(len(parts))[share[0]::share[1]] if not read_shard(out, n, plan)]
    if done and not undone and not strict:
        return
    print("".join(f"skipped {line}\n" for line in skipped) + f"packing {sum(len(parts[n]) for n in undone)} clips into {out}/", flush=True)
    with replacing(out / "plan") as part:                      # before any work: whether this folder can be written to
        part.write_text(plan)
    make = functools.partial(pack_shard, out, plan, read)
    with (ProcessPoolExecutor(max(1, min(workers, len(undone))), initializer=torch.set_num_threads, initargs=(1,)) as pool,
          tqdm(total=sum(len(parts[n]) for n in undone), unit="clip", disable=None) as bar):
        for count in pool.map(make, undone, [parts[n] for n in undone]):
            bar.update(count)
    found = [read_shard(out, n, plan) for n in range(len(parts))]
    if None in found:
        print(f"{out}: other shares are still to be made", flush=True)
    else:
        write_index(out, corpus, plan, form, found, skipped, strict)


def pack_shard(out: Path, plan: str, read: Callable, shard: int, clips: list[Clip]) -> int:
    """Write one shard, its clips last; returns how many there are, those included that are skipped."""
    packed, rows, skipped, too_long, sums, offset = [], [], [], 0, np.zeros(3), 0
    for clip in clips:
        try:
            x = read(clip)
        except voice.VoiceError:
            raise
        except UserError as e:
            skipped.append(f"{clip.id}: {e}")
            print(f"skipped {skipped[-1]}", flush=True)
            continue
        too_long += x is None
        if x is None:
            continue
        packed.append(clip._replace(frames=len(x), shard=shard, offset=offset))
        rows.append(x)
        offset += len(x)
        if clip.split == "train":
            sums += x.sum(dtype=np.float64), np.square(x, dtype=np.float64).sum(), x.size
    x = np.concatenate(rows) if rows else np.zeros((0, 1), np.float16)
    header = {"plan": plan, "clips": len(packed), "frames": len(x), "sums": sums.tolist(), "skipped": skipped, "too_long": too_long}
    with replacing(out / f"rows_{shard:05d}.npy") as part, open(part, "wb") as f:
        np.save(f, x)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *(clip._asdict() for clip in packed))]
    with replacing(out / f"clips_{shard:05d}.jsonl") as part:
        part.write_text("".join(lines), encoding="utf-8")
    return len(clips)


def write_index(out: Path, corpus: dict, plan: str, form: dict, shards: list[tuple], skipped: list[str], strict: bool) -> None:
    """Sum up all shards; raises UserError when too little is left, or, if `strict`, anything was skipped."""
    headers, clips = [header for header, _, _ in shards], sum((found for _, found, _ in shards), [])
    skipped = skipped + sum((header["skipped"] for header in headers), [])
    counts, too_long = {split: sum(clip.split == split for clip in clips) for split in SPLITS}, sum(h["too_long"] for h in headers)
    if strict and (skipped or too_long) or len(skipped) > len(clips) or not counts["train"]:
        for n in [n for n, header in enumerate(headers) if header["skipped"] or header["too_long"]]:
            (out / f"clips_{n:05d}.jsonl").unlink()    # the next run tries again
        raise UserError(f"{out}: not a corpus yet: {counts}; {too_long} clips are too long (data.align cuts them for pictures), "
                        f"{len(skipped)} clips had to be skipped. {'; '.join(skipped[:1])}")
    mean, square, _ = np.sum([header["sums"] for header in headers], 0) / sum(header["sums"][2] for header in headers)
    index = {"format": FORMAT, "corpus": corpus, "clips": counts, "mean": float(mean), "std": math.sqrt(square - mean ** 2),
             "form": form, "shards": len(shards), "plan": plan, "skipped": skipped, "too_long": too_long}
    with replacing(out / "index.json") as part:
        part.write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
    for leftover in out.glob("*.part"):          # of processes that were killed
        leftover.unlink(missing_ok=True)
    found = ", ".join(f"{n} {split}" for split, n in counts.items())
    print(f"{out}: {found} clips; {len(skipped)} skipped, {too_long} too long", flush=True)


def read_index(folder: Path, form: dict) -> dict:
    """index.json of a packed folder; raises UserError when it is missing, damaged, or of another form."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        found = {"format": index["format"], **(index.get("form") or {})}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: no packed corpus there, or a damaged index.json, to be deleted; {PREPARE}") from e
    for key, value in {"format": FORMAT, **form}.items():
        if found.get(key) != value:
            raise UserError(f"{folder}: packed with {key} {found.get(key)}, but {value} is wanted; delete it, or choose another folder")
    return index


def read_shard(folder: Path, shard: int, plan: str) -> tuple[dict, list[Clip], np.ndarray] | None:
    """A shard's header, its clips, and their rows (frames, M), memory-mapped; None when it is not whole, or of another plan."""
    try:
        header, *lines = map(json.loads, (folder / f"clips_{shard:05d}.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
        clips, rows = [Clip(**line) for line in lines], np.load(folder / f"rows_{shard:05d}.npy", mmap_mode="r")
        whole = (header["plan"], header["clips"], header["frames"]) == (plan, len(clips), len(rows))
        return (header, clips, rows) if whole else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to that becomes `path` when the block ends well, so that nobody ever sees half a file; its folder is made."""
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
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_metadata(root: Path) -> tuple[list[Clip], list[str]]:
    """The lines of metadata.csv (id|transcript|normalised) as clips of wavs/<id>.wav, in the published split; what is wrong with others."""
    path = root / "metadata.csv"
    if not path.is_file():
        raise UserError(f"{path}: missing; --download (data.download) fetches LJSpeech-1.1 where there is no {root}")
    texts, skipped = read_transcripts([path], "|", 3)
    published = dict(line.split()[::-1] for line in (ASSETS / "ljspeech_split.txt").read_text().splitlines() if not line.startswith("#"))
    return validate_on_some(root, [Clip(name, text, published.get(name, "train"), str(folder / "wavs" / f"{name}.wav"))
                                   for name, (text, folder) in texts.items()]), skipped


def read_librispeech(root: Path) -> tuple[list[Clip], list[str]]:
    """The utterances below `root`, by <speaker>/<chapter>/<speaker>-<chapter>.trans.txt; what is wrong with others. Transcripts are
    capitals without marks: they become what people type, "A capital first and a mark last.", because prompts will be so.
    2 % of the speakers validate, 2 % test: no voice, room or book that is known from training makes a validation loss look good.
    """
    texts, skipped = read_transcripts(sorted(root.rglob("*.trans.txt")), " ", 2)
    if not texts:
        raise UserError(f"{root}: no <speaker>/<chapter>/*.trans.txt below it; --download (data.download) fetches it where it is missing")
    speakers = sorted({name.split("-")[0] for name in texts}, key=lambda speaker: zlib.crc32(speaker.encode()))
    held_out = round(len(speakers) / 50)
    splits = dict.fromkeys(speakers[:held_out], "val") | dict.fromkeys(speakers[held_out:2 * held_out], "test")
    return validate_on_some(root, [
        Clip(name, re.sub(r"\bi\b", "I", text.capitalize()) + ".", splits.get(name.split("-")[0], "train"), str(folder / f"{name}.flac"))
        for name, (text, folder) in texts.items()]), skipped


def read_music(path: Path) -> tuple[list[Clip], list[str]]:
    """The recordings and captions of a JSON list, [{"wav", "label"}], or of a folder's table *.csv, by its columns file and caption;
    paths are relative to it. And what is wrong with others. raises UserError for a recording that is missing: nobody trains on silence.
    """
    table = path if path.suffix == ".json" else min(path.glob("*.csv"), default=path / "captions.csv")
    wav, label = ("wav", "label") if table.suffix == ".json" else ("file", "caption")
    try:
        with open(table, encoding="utf-8-sig", newline="") as f:
            entries = [*(csv.DictReader(f) if label == "caption" else json.load(f))]
        clips = [Clip(f"{n:05d}-{Path(e[wav]).stem}", e[label].strip(), SPLITS[SPLITS.index(e.get("split") or "train")],
                      str(table.parent.resolve() / e[wav])) for n, e in enumerate(entries)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as e:
        raise UserError(f'{table}: missing, or not [{{"wav": ..., "label": ...}}, ...], or no table of file and caption ({e!r})') from e
    if missing := [clip.wav for clip in clips if not Path(clip.wav).is_file()]:
        raise UserError(f"{missing[0]} is missing, as {len(missing)} of {len(clips)} recordings in {table}: fetch them, or strike them out")
    return validate_on_some(path, [c for c in clips if c.text]), [f"{c.wav}: empty caption" for c in clips if not c.text]


def read_transcripts(paths: list[Path], separator: str, columns: int) -> tuple[dict[str, tuple[str, Path]], list[str]]:
    """{name: (its text, the folder)} of the lines of a name and its texts; and what is wrong with other lines. Of three columns the last
    counts, in words, as it is; where it is empty or not there, the second one, as people type it, is normalised."""
    texts, skipped = {}, []
    for path in paths:
        for number, line in enumerate(path.read_bytes().decode("utf-8-sig", errors="replace").split("\n"), 1):
            fields = [field.strip() for field in line.split(separator, columns - 1 if separator == " " else -1)]
            name = fields[0]
            text = "".join(fields[columns - 1:columns]) or normalize("".join(fields[1:2]))
            faults = {"not UTF-8": "\ufffd" in line, f"{len(fields)} fields, not {columns}": len(fields) not in (2, columns),
                      "empty text": not text,
                      "no file name": not name or Path(name).name != name or not name.isprintable(), "duplicate id": name in texts}
            if fault := next((fault for fault, found in faults.items() if found and line.strip()), ""):
                skipped.append(f"{path} line {number} ({name[:40]}): {fault}")
            elif line.strip():
                texts[name] = text, path.parent.resolve()
    return texts, skipped


def validate_on_some(root: Path, clips: list[Clip]) -> list[Clip]:
    """The clips; where none of them validates, every 20th of those to train on does."""
    train = [n for n, clip in enumerate(clips) if clip.split == "train"]
    if len({"train", "val"} & {clip.split for clip in clips}) == 2 or not train:
        return clips
    print(f"{root}: the corpus's own split validates on none of these clips; every 20th validates instead", flush=True)
    held_out = set(train[19::20] or train[-1:])
    return [clip._replace(split="val") if n in held_out else clip for n, clip in enumerate(clips)]


def read_recording(clip: Clip, sample_rate: int, resample: bool) -> torch.Tensor:
    """raises UserError for a recording that is missing, damaged, or at another rate."""
    if not Path(clip.wav).is_file():
        raise UserError(f"{clip.wav} is missing")
    wave, info = audio.load_wav(clip.wav, sample_rate), soundfile.info(clip.wav, verbose=True)
    if re.search(r"data : \d+ \(should be", info.extra_info) or len(wave) < int(info.frames / info.samplerate * sample_rate):
        raise UserError(f"{clip.wav} is truncated")              # libsndfile reads what is left and only mentions the rest
    if info.samplerate != sample_rate and not resample:
        raise UserError(f"{clip.wav} has {info.samplerate} Hz instead of {sample_rate}; `python data.py ljspeech --resample` converts")
    if not wave.isfinite().all() or wave.abs().max() < 1e-4:           # int16 would have 3 steps of it
        raise UserError(f"{clip.wav} is silent, or not numbers")
    return wave


def download(corpus: str, root: Path) -> None:
    """Fetch and unpack the archive of ljspeech | librispeech so that the folder in it is `root`."""
    (url, folder), archive, unpacked = ARCHIVES[corpus], root.with_name(f"{root.name}.archive.part"), root.with_name(f"{root.name}.part")
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
        raise UserError(f"{url}: cannot be had ({e}); fetch and unpack it by other means, and name its folder") from e


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Pack a corpus.", epilog="--key value for any knob of config.py.")
    parser.add_argument("corpus", choices=("ljspeech", "librispeech", "music", "demo"))
    parser.add_argument("--out", required=True, help="where the shards go")
    parser.add_argument("--root", "--json", default="", help="the corpus as published: a folder; music: that of a table, or a JSON list")
    parser.add_argument("--download", action="store_true", help="fetch it into --root if that is missing")
    parser.add_argument("--shard", default="0/1", help="i/n: make every n-th shard only; n machines share --out")
    parser.add_argument("--resample", action="store_true", help="recordings at another sample rate, instead of skipping them")
    parser.add_argument("--strict", action="store_true", help="refuse what would be skipped")
    o, rest = parser.parse_known_args()
    if not (share := re.fullmatch(r"(\d+)/(\d+)", o.shard)) or int(share[1]) >= int(share[2]):
        raise UserError(f"--shard {o.shard}: expected i/n with i below n, as 0/4")
    usual = o.corpus == "music"
    words = [f"--corpus={o.corpus}", f"--data_dir={o.root or o.out}", *(["--download=true"] if o.download else []), *rest]
    config = load(MusicConfig if usual else TTSConfig, "", words)
    (corpus, clips, skipped), out, mel = read_corpus(config), Path(o.out), asdict(config.mel)
    form, corpus = {key: mel[key] for key in ("sample_rate", "hop")} if usual else mel, corpus | ({"resample": True} if o.resample else {})
    read = functools.partial(read_speech, out, corpus, form)
    pack(out, corpus, clips, skipped, form, read, config.data.workers, o.strict, (int(share[1]), int(share[2])))


if __name__ == "__main__":
    run_main(main)
