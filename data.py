"""Corpora: packed once into shards (`python data.py ljspeech | demo | prepare`), then read in batches.

A packed folder holds mel_*.npy (float16 log-mels (T, M) of some 512 clips after one another, memory-mapped), clips_*.jsonl (a
header, a line a clip) and, last, index.json. A file is whole or absent: written under another name, flushed, renamed.
What is random in a batch comes from (seed, step, row of the global batch) and from nothing else.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import re
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import yaml
from tqdm import tqdm

import audio
import flow
import pretrained
from config import Config, Mel, UserError, from_command_line, run_main

FORMAT = 1                                       # of a packed folder
SHARD = 512                                      # clips in one
SHORTEST_SEC, LONGEST_SEC = 0.1, 60.0            # what is packed; data.max_seconds decides what is read
SPLITS = ("train", "val", "test")
ORDER, TRAIN, VALIDATION = range(3)              # what a random stream is for
ASSETS = Path(__file__).parent / "assets"
PREPARE = "run `python data.py prepare --config ...`"
LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"


class Clip(NamedTuple):
    id: str
    text: str
    split: str
    wav: str | None              # the recording, where there is one to listen to
    frames: int = 0              # the rest is known when it is packed
    shard: int = 0
    offset: int = 0              # frames before it in its shard
    number: int = 0              # clips before it in the corpus


class Corpus:
    """A packed corpus: `mean` and `std` of its training log-mels, `hash` of its content, its clips."""

    def __init__(self, config: Config):
        """raises UserError for a folder that is missing, damaged, or packed with another mel than config.mel."""
        self.folder = packed_dir(config)
        index = read_index(self.folder, config.mel)
        self.mean, self.std, self.hash = index["mean"], index["std"], index["hash"]
        shards = [read_shard(self.folder, n, index["plan"]) for n in range(index["shards"])]
        if None in shards:
            raise UserError(f"{self.folder}: shard {shards.index(None)} is missing or damaged; pack again, which makes it anew: {PREPARE}")
        self.mels, clips = [mels for _, _, mels in shards], sum((found for _, found, _ in shards), [])
        clips = [clip._replace(number=n, wav=clip.wav and str(self.folder / clip.wav)) for n, clip in enumerate(clips)]
        limit = config.data.max_seconds * config.mel.sample_rate / config.mel.hop
        self.splits = {split: [c for c in clips if c.split == split and c.frames <= limit] for split in SPLITS}
        if config.data.overfit:
            self.splits = dict.fromkeys(SPLITS, sum(self.splits.values(), [])[:config.data.overfit])

    def clips(self, split: str) -> list[Clip]:
        """The clips of train | val | test in the corpus's order; with data.overfit, every split is its first clips."""
        return self.splits[split]

    def log_mel(self, clip: Clip) -> torch.Tensor:
        """(T, M), natural log, float32."""
        return torch.from_numpy(self.mels[clip.shard][clip.offset:clip.offset + clip.frames].astype(np.float32))


class Batches:
    """Batches of a corpus as dicts of CPU tensors:

    x, noise (B, T, M), 0 where x_mask (B, T) is False; t (B,); ids (B, S) int64, text_mask (B, S); text_dropped (B,): rows that
    carry the tokens of "" instead of their text; frames (B,): the clip's length without the silence appended to it; number (B,):
    of the clip. With a frozen text encoder also its features (B, S, D). T is a multiple of data.pad_multiple, S of 8.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        self.config, self.corpus, self.tokenizer, self.rank, self.world = config, corpus, tokenizer, rank, world
        for split in ("train", config.eval.split):
            if not corpus.clips(split):
                raise UserError(f"{corpus.folder}: has no {split} clip of at most data.max_seconds {config.data.max_seconds}")
        self.lengths = np.array([clip.frames for clip in corpus.clips("train")])
        self.features = open_features(config, corpus) if config.model.text_encoder != "scratch" else None
        pretrained.tokenize(tokenizer, [""])     # its first call sets a tokenizer's options, which is not for several threads

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        """This rank's part of micro-batch `micro`; those of all ranks and micro-batches are the step's global batch."""
        c, size, clips = self.config, self.config.train.batch_size, self.corpus.clips("train")
        order = schedule(self.lengths, step, size * self.world * c.train.grad_accum, c.seed)
        rows = np.arange(size) + (micro * self.world + self.rank) * size
        return self.collate([self.row(clips[order[n]], np.random.default_rng((c.seed, TRAIN, step, n))) for n in rows])

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """This rank's share of the split that is validated on: whole clips, the same noise and times, evenly spread, every time."""
        c, clips, golden = self.config, self.corpus.clips(self.config.eval.split), (math.sqrt(5) - 1) / 2
        order = sorted(range(len(clips)), key=lambda n: clips[n].frames)[self.rank::self.world]
        rows = [self.row(clips[n], np.random.default_rng((c.seed, VALIDATION, n)), min(max(n * golden % 1, 0.001), 0.999)) for n in order]
        return [self.collate(rows[start:start + c.train.batch_size]) for start in range(0, len(rows), c.train.batch_size)]

    def row(self, clip: Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept and no silence appended, as for validation."""
        d, f, mel, x = self.config.data, self.config.flow, self.config.mel, self.corpus.log_mel(clip)
        dropped = t is None and rng.random() < f.text_condition_dropout
        if t is None:
            silence = int((rng.random() < d.silence_prob) * rng.random() * d.max_silence_sec * mel.sample_rate / mel.hop)
            x = torch.cat([x, torch.full((silence, mel.n_mels), math.log(audio.LOG_FLOOR))])
            t = flow.sample_time(rng, f.timestep_logit_mean, f.timestep_logit_std, f.timestep_uniform)
        noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))    # the last draw: padding changes nothing
        return {"x": audio.normalise(x, self.corpus.mean, self.corpus.std), "noise": noise, "t": t, "frames": clip.frames,
                "number": clip.number, "text_dropped": dropped, "text": "" if dropped else clip.text}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "number", "text_dropped")}
        batch["x"], batch["x_mask"] = pad([row["x"] for row in rows], self.config.data.pad_multiple)
        batch["noise"], _ = pad([row["noise"] for row in rows], self.config.data.pad_multiple)
        tokens = pretrained.tokenize(self.tokenizer, [row["text"] for row in rows])
        batch["ids"], batch["text_mask"] = pad([torch.tensor(ids) for ids in tokens], 8)
        if self.features:
            batch["features"], _ = pad([self.features(row["text"]) for row in rows], 8)
        return batch


def schedule(lengths: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """Which clips make the global batch of a step: indices (batch,), shortest first; a pure function.

    An epoch shows every clip once: sorted by length, give or take 2 %, so that neighbours need little padding and still differ from
    epoch to epoch, cut into batches, and these shuffled. What the last batch lacks is filled up with clips shown again.
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
        while ahead:
            yield ahead.popleft().result()


def pad(rows: list[torch.Tensor], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors (N, ...) -> (B, N', ...) filled up with 0, N' a multiple, and the mask (B, N') of what is valid."""
    size = math.ceil(max(map(len, rows)) / multiple) * multiple
    padded = rows[0].new_zeros(len(rows), size, *rows[0].shape[1:])
    for target, row in zip(padded, rows):
        target[:len(row)] = row
    return padded, torch.arange(size) < torch.tensor([[len(row)] for row in rows])


def open_features(config: Config, corpus: Corpus) -> Callable[[str], torch.Tensor]:
    """What the frozen text encoder made of "" and of every text of a corpus: a function from text to (S, D) float32."""
    path, texts = features_file(config, corpus)
    try:
        offsets, values = np.load(path.with_suffix(".offsets.npy")), np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: features of {config.model.text_encoder}, missing, or damaged and to be deleted; {PREPARE}") from e
    spans = {text: slice(*offsets[n:n + 2]) for n, text in enumerate(texts)}
    return lambda text: torch.from_numpy(values[spans[text]].astype(np.float32))


def cache_features(config: Config, corpus: Corpus) -> None:
    """Run the frozen text encoder over all texts, on the GPU if there is one, unless that was done before."""
    path, texts = features_file(config, corpus)
    if path.with_suffix(".offsets.npy").exists():
        return
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    encoder, tokenizer, width = pretrained.load_text_encoder(config.model.text_encoder)
    encoder, tokens = encoder.to(device), [torch.tensor(ids) for ids in pretrained.tokenize(tokenizer, texts)]
    offsets, order = np.cumsum([0, *map(len, tokens)]), sorted(range(len(texts)), key=lambda n: len(tokens[n]))
    with replacing(path) as part:
        values = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=(int(offsets[-1]), width))
        for start in tqdm(range(0, len(texts), 32), desc=f"features of {config.model.text_encoder}", unit="batch", disable=None):
            ids, mask = pad([tokens[n] for n in order[start:start + 32]], 8)
            for n, found in zip(order[start:], encoder(ids.to(device), mask.to(device)).half().cpu().numpy()):
                values[offsets[n]:offsets[n + 1]] = found[:len(tokens[n])]
    with replacing(path.with_suffix(".offsets.npy")) as part, open(part, "wb") as f:
        np.save(f, offsets)


def features_file(config: Config, corpus: Corpus) -> tuple[Path, list[str]]:
    """The cache, named by what is in it, and the texts in it."""
    texts = sorted({"", *(clip.text for split in SPLITS for clip in corpus.clips(split))})
    return corpus.folder / f"features_{digest([config.model.text_encoder, texts])[:8]}.npy", texts


def prepare(config: Config) -> None:
    """Make whatever a config's training needs and does not find: the corpus, packed, and the features of its texts."""
    d, root = config.data, Path(config.data.data_dir)
    if d.corpus == "demo":
        pack_demo(root, d.grammar, d.sentences, config.mel, d.workers)
    elif (folder := packed_dir(config)) != root and (root.exists() or not folder.exists()):
        pack_ljspeech(root, folder, config.mel, d.workers, d.download)
    corpus = Corpus(config)
    if config.model.text_encoder != "scratch":
        cache_features(config, corpus)


def packed_dir(config: Config) -> Path:
    """data.data_dir, or where prepare packs it to when that is a folder in LJSpeech's layout."""
    root = Path(config.data.data_dir)
    if config.data.corpus == "demo" or (root / "index.json").exists():
        return root
    return Path("data/packed", f"{root.resolve().name}-{digest([str(root.resolve()), asdict(config.mel)])[:8]}")


def pack_ljspeech(root: Path, out: Path, mel: Mel, workers: int, download: bool = False, resample: bool = False,
                  strict: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Pack a folder in LJSpeech's layout: metadata.csv (id|transcript|normalised, of which the last is the text), wavs/<id>.wav."""
    if download and not root.exists():
        download_ljspeech(root)
    clips, skipped = read_metadata(root)
    read = functools.partial(read_recording, mel=mel, resample=resample)
    pack(out, {"name": "ljspeech", "resample": resample}, clips, skipped, mel, read, workers, strict, share)


def pack_demo(out: Path, grammar: str, sentences: int, mel: Mel, workers: int) -> None:
    """Speak `sentences` sentences to train on, and 64 to validate and 64 to test on that training never has."""
    texts = distinct_sentences(grammar, sentences, held_out=False) + distinct_sentences(grammar, 128, held_out=True)
    splits = ["train"] * sentences + ["val"] * 64 + ["test"] * 64
    names = [f"{grammar}-{n:05d}" for n in range(len(texts))]
    wavs = [f"wavs/{name}.wav" if n < 64 or n >= sentences else None for n, name in enumerate(names)]     # to hear beside samples
    corpus, read = {"name": "demo", "grammar": grammar, "sentences": sentences}, functools.partial(speak, out=out, mel=mel)
    pack(out, corpus, list(map(Clip, names, texts, splits, wavs)), [], mel, read, workers)


def pack(out: Path, corpus: dict, clips: list[Clip], skipped: list[str], mel: Mel, read: Callable[[Clip], torch.Tensor],
         workers: int, strict: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Make the shards of a share (i, n: every n-th from the i-th on) that are missing, and the index when no shard is any more.

    corpus: what this is. skipped: what is no clip, and why. read: a clip's wave, or a UserError to skip it. strict: no index then.
    """
    plan = digest([FORMAT, corpus, asdict(mel), [[clip.id, clip.text, clip.split] for clip in clips]])
    done = (out / "index.json").exists()
    if done and (index := read_index(out, mel))["plan"] != plan:
        raise UserError(f"{out}: already holds another corpus ({index['corpus']}, or other clips); delete it, or choose another folder")
    parts = [clips[start:start + SHARD] for start in range(0, len(clips), SHARD)]
    undone = [n for n in range(len(parts))[share[0]::share[1]] if not read_shard(out, n, plan)]
    if done and not undone and not strict:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be made ({e.strerror})") from e
    print("".join(f"skipped {line}\n" for line in skipped) + f"packing {sum(len(parts[n]) for n in undone)} clips into {out}/", flush=True)
    make = functools.partial(pack_shard, out, plan, mel, read)
    with (ProcessPoolExecutor(max(1, min(workers, len(undone))), initializer=torch.set_num_threads, initargs=(1,)) as pool,
          tqdm(total=sum(len(parts[n]) for n in undone), unit="clip", disable=None) as bar):
        for count in pool.map(make, undone, [parts[n] for n in undone]):
            bar.update(count)
    found = [read_shard(out, n, plan) for n in range(len(parts))]
    if None in found:
        print(f"{out}: other shares are still to be made", flush=True)
    else:
        write_index(out, corpus, plan, mel, found, skipped, strict)


def pack_shard(out: Path, plan: str, mel: Mel, read: Callable, shard: int, clips: list[Clip]) -> int:
    """Write one shard, its clips last; returns how many there are, those included that are named and skipped."""
    packed, mels, skipped, sums, offset = [], [np.zeros((0, mel.n_mels), np.float16)], [], np.zeros(3), 0
    for clip in clips:
        try:
            wave = read(clip)
            if not SHORTEST_SEC <= len(wave) / mel.sample_rate <= LONGEST_SEC:
                raise UserError(f"{len(wave) / mel.sample_rate:.2f} s is not between {SHORTEST_SEC} and {LONGEST_SEC}")
        except UserError as e:
            skipped.append(f"{clip.id}: {e}")
            print(f"skipped {skipped[-1]}", flush=True)
            continue
        x = audio.log_mel(wave, mel).numpy().astype(np.float16)
        packed.append(clip._replace(frames=len(x), shard=shard, offset=offset))
        mels.append(x)
        offset += len(x)
        if clip.split == "train":
            sums += x.sum(dtype=np.float64), np.square(x, dtype=np.float64).sum(), x.size
    x = np.concatenate(mels)
    content = digest([hashlib.sha256(x).hexdigest(), [clip._replace(wav=None) for clip in packed]])      # wherever the recordings lie
    header = {"plan": plan, "hash": content, "clips": len(packed), "frames": len(x), "sums": sums.tolist(), "skipped": skipped}
    with replacing(out / f"mel_{shard:05d}.npy") as part, open(part, "wb") as f:
        np.save(f, x)
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *(clip._asdict() for clip in packed))]
    with replacing(out / f"clips_{shard:05d}.jsonl") as part:
        part.write_text("".join(lines), encoding="utf-8")
    return len(clips)


def write_index(out: Path, corpus: dict, plan: str, mel: Mel, shards: list[tuple], skipped: list[str], strict: bool) -> None:
    """Sum up all shards; raises UserError when too little is left, or, if `strict`, anything was skipped."""
    headers, clips = [header for header, _, _ in shards], sum((found for _, found, _ in shards), [])
    skipped = skipped + sum((header["skipped"] for header in headers), [])
    counts = {split: sum(clip.split == split for clip in clips) for split in SPLITS}
    if strict and skipped or len(skipped) > len(clips) or not counts["train"] or not counts["val"]:
        for n in [n for n, header in enumerate(headers) if header["skipped"]]:
            (out / f"clips_{n:05d}.jsonl").unlink()    # the next run tries again
        raise UserError(f"{out}: not a corpus yet: {counts}, and {len(skipped)} clips had to be skipped. {'; '.join(skipped[:1])}")
    mean, square, _ = np.sum([header["sums"] for header in headers], 0) / sum(header["sums"][2] for header in headers)
    index = {"format": FORMAT, "corpus": corpus, "clips": counts, "mean": float(mean), "std": math.sqrt(square - mean ** 2),
             "mel": asdict(mel), "shards": len(shards), "plan": plan, "hash": digest([h["hash"] for h in headers]), "skipped": skipped}
    with replacing(out / "index.json") as part:
        part.write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
    for leftover in out.glob("*.part"):          # of processes that were killed
        leftover.unlink(missing_ok=True)
    print(f"{out}: {', '.join(f'{n} {split}' for split, n in counts.items())} clips; {len(skipped)} skipped", flush=True)


def read_index(folder: Path, mel: Mel) -> dict:
    """index.json of a packed folder; raises UserError when it is missing, damaged, or not for `mel`."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        found = {"format": index["format"], **index["mel"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: no packed corpus there, or a damaged index.json, to be deleted; {PREPARE}") from e
    for key, value in {"format": FORMAT, **asdict(mel)}.items():
        if found.get(key) != value:
            raise UserError(f"{folder}: packed with {key} {found.get(key)}, but {value} is wanted; delete it, or choose another folder")
    return index


def read_shard(folder: Path, shard: int, plan: str) -> tuple[dict, list[Clip], np.ndarray] | None:
    """A shard's header, its clips, and their log-mels (frames, M), memory-mapped; None when it is not whole, or of another plan."""
    try:
        header, *lines = map(json.loads, (folder / f"clips_{shard:05d}.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
        clips, mels = [Clip(**line) for line in lines], np.load(folder / f"mel_{shard:05d}.npy", mmap_mode="r")
        whole = (header["plan"], header["clips"], header["frames"]) == (plan, len(clips), len(mels))
        return (header, clips, mels) if whole else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to that becomes `path` when the block ends well, so that nobody ever sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
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
    """The lines of metadata.csv that name a clip and its text, each with its split; and what is wrong with the others."""
    path, texts, skipped = root / "metadata.csv", {}, []
    if not path.is_file():
        raise UserError(f"{path}: missing; --download (in a config: data.download true) fetches LJSpeech-1.1 where there is no {root}")
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig", errors="replace").split("\n"), 1):
        fields = [field.strip() for field in line.split("|")]
        name, text = fields[0], fields[-1] or "".join(fields[1:2])
        faults = {"not UTF-8": "\ufffd" in line, f"{len(fields)} fields instead of 3": len(fields) != 3, "empty text": not text,
                  "no file name": not name or Path(name).name != name or not name.isprintable(), "duplicate id": name in texts}
        if any(faults.values()) and line.strip():
            skipped.append(f"{path} line {number} ({name[:40]}): {next(fault for fault, found in faults.items() if found)}")
        elif line.strip():
            texts[name] = text
    published = dict(line.split()[::-1] for line in (ASSETS / "ljspeech_split.txt").read_text().splitlines() if not line.startswith("#"))
    train = [name for name in texts if name not in published]
    if not any(published.get(name) == "val" for name in texts):
        published |= dict.fromkeys(train[19::20] or train[-1:], "val")
        print(f"{path}: none of LJSpeech's validation clips; every 20th clip validates instead", flush=True)
    wavs = root.resolve() / "wavs"
    return [Clip(name, text, published.get(name, "train"), str(wavs / f"{name}.wav")) for name, text in texts.items()], skipped


def read_recording(clip: Clip, mel: Mel, resample: bool) -> torch.Tensor:
    """raises UserError for a recording that is missing, damaged, or at another rate."""
    if not Path(clip.wav).is_file():
        raise UserError(f"{clip.wav} is missing")
    wave, info = audio.load_wav(clip.wav, mel.sample_rate), soundfile.info(clip.wav, verbose=True)
    if re.search(r"data : \d+ \(should be", info.extra_info):    # libsndfile reads what is left and only mentions the rest
        raise UserError(f"{clip.wav} is truncated")
    if info.samplerate != mel.sample_rate and not resample:
        raise UserError(f"{clip.wav} has {info.samplerate} Hz instead of {mel.sample_rate}; `python data.py ljspeech --resample` converts")
    if not wave.isfinite().all() or not wave.any():
        raise UserError(f"{clip.wav} is silent, or not numbers")
    return wave


def download_ljspeech(root: Path) -> None:
    """Fetch and unpack LJSpeech-1.1 so that it is `root`."""
    archive, unpacked = root.with_name(f"{root.name}.tar.bz2.part"), root.with_name(f"{root.name}.part")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(desc=LJSPEECH_URL, unit="B", unit_scale=True, disable=None) as bar:
            urllib.request.urlretrieve(LJSPEECH_URL, archive, lambda n, block, size: bar.update(block) if n else bar.reset(size))
        print(f"unpacking {archive}", flush=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / "LJSpeech-1.1").rename(root)
        unpacked.rmdir()
        archive.unlink()
    except (OSError, EOFError, tarfile.TarError) as e:
        raise UserError(f"{LJSPEECH_URL}: cannot be had ({e}); fetch and unpack it by other means, and name its folder") from e


def speak(clip: Clip, out: Path, mel: Mel) -> torch.Tensor:
    """A sentence by espeak-ng, with at most 50 ms of silence before and after it."""
    wave = audio.espeak(clip.text, mel.sample_rate, voice="en-us", rate=160, pitch=50)
    loud, margin = (wave.abs() > 0.01).nonzero(), mel.sample_rate // 20
    wave = wave[max(0, loud[0].item() - margin):loud[-1].item() + margin + 1]
    if clip.wav:
        (out / "wavs").mkdir(exist_ok=True)
        audio.save_wav(out / clip.wav, wave, mel.sample_rate)
    return wave


def distinct_sentences(grammar: str, count: int, held_out: bool) -> list[str]:
    rng, found = random.Random(f"{grammar} {held_out}"), {}    # in the order made: a longer list begins with a shorter one
    for _ in range(100 * count + 10_000):
        sentence = make_sentence(grammar, rng)
        if is_held_out(sentence) == held_out:
            found[sentence] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"data.sentences {count}: the grammar {grammar} does not make that many")


@functools.cache
def load_grammar(name: str) -> dict[str, list[str]]:
    """{"patterns": [...], slot: [words...]} of `matrix` or `open` in assets/demo_grammar.yaml."""
    grammar = yaml.safe_load((ASSETS / "demo_grammar.yaml").read_text())[name]
    return {slot: v if isinstance(v, list) else v.split("|") if "|" in v else v.split() for slot, v in grammar.items()}


def make_sentence(name: str, rng: random.Random) -> str:
    """A sentence of a grammar: a pattern with a word drawn for each slot."""
    grammar = load_grammar(name)
    sentence = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(grammar[slot[1]]), rng.choice(grammar["patterns"]))
    return sentence[0].upper() + sentence[1:]


def is_held_out(sentence: str) -> bool:
    """Every tenth sentence is never trained on, neither by a voice nor by the recogniser: a property of the text alone."""
    return zlib.crc32(sentence.encode()) % 10 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a corpus, or prepare all that a config needs.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    lj = commands.add_parser("ljspeech", help="pack a folder in LJSpeech's layout", allow_abbrev=False)
    lj.add_argument("--root", required=True, type=Path, help="the folder: metadata.csv, wavs/")
    lj.add_argument("--download", action="store_true", help="fetch LJSpeech-1.1 into --root if that is missing")
    lj.add_argument("--shard", default="0/1", help="i/n: make every n-th shard only; n machines share --out")
    lj.add_argument("--resample", action="store_true", help="recordings at another sample rate, instead of skipping them")
    lj.add_argument("--strict", action="store_true", help="refuse what would be skipped")
    demo = commands.add_parser("demo", help="speak sentences with espeak-ng", allow_abbrev=False)
    demo.add_argument("--grammar", default="matrix", choices=("matrix", "open"))
    demo.add_argument("--sentences", type=int, default=4000, help="to train on")
    for command in (lj, demo):
        command.add_argument("--out", required=True, type=Path)
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    commands.add_parser("prepare", help="--config FILE [--key value ...]: make all that it needs to train", allow_abbrev=False)
    o, rest = parser.parse_known_args()
    if o.command == "prepare":
        prepare(from_command_line(rest))
    elif rest:
        raise UserError(f"{rest[0]}: unknown option; see `python data.py {o.command} --help`")
    elif o.command == "demo":
        pack_demo(o.out, o.grammar, o.sentences, Mel(), o.workers)
    elif not (share := re.fullmatch(r"(\d+)/(\d+)", o.shard)) or int(share[1]) >= int(share[2]):
        raise UserError(f"--shard {o.shard}: expected i/n with i below n, as 0/4")
    else:
        pack_ljspeech(o.root, o.out, Mel(), o.workers, o.download, o.resample, o.strict, (int(share[1]), int(share[2])))


if __name__ == "__main__":
    run_main(main)
