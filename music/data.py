"""Captioned music: its batches, caches of what frozen networks make of captions and crops, its corpora.

A batch holds random crops of pieces as tokens; each of a caption's two conditions is dropped by chance.
"""

import csv
import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import audio
import data
from config import DAMAGE, Config, UserError
from corpora import shards, speech
from corpora.prepare import prepare_recordings, published
from corpora.shards import SPLITS, Clip
from data import Batches
from device import preparing_device
from music.clap import load_clap
from music.latents import Codec, load_vocoder
from music.pieces import prepare_pieces
from pretrained import text_encoder


class MusicCorpus(data.ShardedCorpus):
    """Music as waves of any length."""

    def __init__(self, config: Config):
        super().__init__(config, config.packed_format(), math.inf)
        self.mel = config.mel

    @functools.cached_property
    def statistics(self) -> tuple[float, float]:
        """Mean and deviation of log-mels: of at most 256 training pieces, with the peak of each at 0.5."""
        clips = self.clips("train")
        stride = math.ceil(len(clips) / 256)
        minute = 60 * self.rate
        log_mels = []
        for clip in clips[::stride]:
            wave = self.wave(clip)[:minute]
            wave = 0.5 * wave / wave.abs().max().clamp_min(1e-9)
            log_mels.append(audio.log_mel(wave, self.mel))  # (T, M)
        x = torch.cat(log_mels).double()
        return x.mean().item(), x.std().item()


# Batches


class MusicBatches(Batches):
    """x, noise (B, N, C); t (B,); frames (B,): of a crop; number (B,): of the clip; text_mask (B, S).

    Beside them text (B, S, D), cached features, or ids (B, S) where the text encoder is trained; and vector
    (B, V), unless it is pooled from the features. S is a multiple of 8; what is cached is float16.
    """

    def __init__(self, config: Config, corpus: MusicCorpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.cached = {}
        for name, (path, items) in cache_files(config, corpus).items():
            self.cached[name] = open_cache(path, items)
        self.codec = Codec(config, *corpus.statistics, torch.device("cpu"))
        if tokenizer:
            text_encoder.tokenize(tokenizer, [""])  # the first call mutates the tokenizer: not thread-safe

    def row(self, clip: Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the caption is kept, as for validation."""
        together = rng.random() < self.config.music.joint_dropout
        dropped = rng.random(2) < self.config.flow.text_condition_dropout
        drop_text = t is None and dropped[0]
        drop_vector = t is None and dropped[0 if together else 1]

        mean, std = self.random_crop(clip, rng)
        x = mean + std * normal_like(mean, rng)
        noise = normal_like(mean, rng)
        if t is None:
            t = self.sample_time(rng)
        return {
            "x": x,
            "noise": noise,
            "t": t,
            "number": clip.number,
            "frames": self.codec.crop_frames,
            "text": "" if drop_text else clip.text,
            "vector_text": "" if drop_vector else clip.text,
        }

    def random_crop(self, clip: Clip, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C) of the tokens of a random crop; with a VAE, of a cached one."""
        if "latents" not in self.cached:
            return self.codec.encode_crop(self.corpus.wave(clip), rng)
        latents = self.cached["latents"](clip).float()
        crops = latents.unflatten(0, (self.config.music.crops, -1))  # (crops, N, 2 C)
        chosen = rng.integers(len(crops))
        return crops[chosen].chunk(2, -1)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = {}
        for key in ("t", "frames", "number"):
            batch[key] = torch.tensor([row[key] for row in rows])
        for key in ("x", "noise"):
            batch[key] = torch.stack([row[key] for row in rows])
        texts = [row["text"] for row in rows]
        vector_texts = [row["vector_text"] for row in rows]
        return batch | collate_captions(texts, vector_texts, self.config, self.tokenizer, self.cached)


def normal_like(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Standard normal noise of the shape of x, float32."""
    noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
    return torch.from_numpy(noise)


def collate_captions(
    texts: list[str], vector_texts: list[str], config: Config, tokenizer, encoders: dict[str, Callable]
) -> dict[str, Tensor]:
    """A batch's entries of captions: text or ids, text_mask, vector.

    encoders: as `caption_encoders` returns, or caches of what they make.
    """
    if "features" in encoders:
        name = "text"
        rows = [encoders["features"](text) for text in texts]
    else:
        name = "ids"
        rows = [torch.tensor(ids) for ids in text_encoder.tokenize(tokenizer, texts)]
    rows = [row[: config.music.caption_tokens] for row in rows]
    padded, mask = data.pad(rows, 8)
    batch = {name: padded, "text_mask": mask}
    if "vectors" in encoders:
        vectors = [encoders["vectors"](text) for text in vector_texts]
        batch["vector"] = torch.cat(vectors)  # (B, V)
    return batch


# Caches, and what fills them


def fetch(config: Config) -> None:
    """The caption encoders, the VAE; for evaluations the vocoder, and the CLAP that judges."""
    device = preparing_device(config.device)
    for encode in caption_encoders(config, device).values():
        encode("")
    if config.music.autoencoder != "patches":
        _ = Codec(config, 0.0, 1.0, device).vae
    if not config.train.eval_interval:
        return
    if config.sample.vocoder == "own":
        load_vocoder(config, device)
    if config.eval.features:
        load_clap("eval.features", config.eval.features, device)


def prepare(config: Config) -> None:
    """Make what training needs and does not find: packed pieces, and caches of their captions and crops."""
    prepare_music(config)
    corpus = MusicCorpus(config)
    device = preparing_device(config.device)
    codec = Codec(config, *corpus.statistics, device)
    encoders = caption_encoders(config, device)
    encoders["latents"] = functools.partial(encode_crops, config, corpus, codec)

    for name, (path, items) in cache_files(config, corpus).items():
        if path.exists():
            continue
        lengths = [1] * len(items)
        if name == "latents":
            lengths = [config.music.crops * codec.crop_tokens] * len(items)
        elif name == "features":
            _, tokenizer, _ = load_t5(config.model.text_encoder)
            lengths = [len(ids) for ids in text_encoder.tokenize(tokenizer, items)]
        fill_cache(path, items, lengths, encoders[name], name)


def encode_crops(config: Config, corpus: MusicCorpus, codec: Codec, clip: Clip) -> Tensor:
    """music.crops random crops of a piece: mean and standard deviation of their tokens, (crops * N, 2 C)."""
    wave = corpus.wave(clip)
    rng = np.random.default_rng((config.seed, clip.number))
    crops = []
    for _ in range(config.music.crops):
        mean, std = codec.encode_crop(wave, rng)
        crops.append(torch.cat([mean, std], -1))
    return torch.cat(crops)


def cache_files(config: Config, corpus: MusicCorpus) -> dict[str, tuple[Path, list]]:
    """The caches that training reads: features and vectors of captions, latents of clips.

    returns for each its file, named by a digest of all that its content depends on, and its items.
    """
    clips = set()
    for split in SPLITS:
        clips.update(corpus.clips(split))
    clips = sorted(clips, key=lambda clip: clip.number)
    texts = sorted({"", *(clip.text for clip in clips)})
    options = config.music
    contents = {}
    if config.model.text_encoder != "scratch":
        contents["features"] = [config.model.text_encoder, texts]
    if options.vector_encoder != "pooled":
        contents["vectors"] = [options.vector_encoder, texts]
    if options.autoencoder != "patches":
        crops = [options.autoencoder, options.crops, options.crop_seconds, config.seed, asdict(config.mel)]
        contents["latents"] = [*crops, [clip.number for clip in clips]]

    files = {}
    for name, content in contents.items():
        path = corpus.folder / f"{name}_{shards.digest(content)[:8]}.npy"
        files[name] = (path, clips if name == "latents" else texts)
    return files


def fill_cache(path: Path, items: list, lengths: list[int], encode: Callable, name: str) -> None:
    """Write what `encode` makes of each item, as many rows as `lengths` says; name: for the progress bar."""

    def encode_batch(numbers: list[int]) -> list[np.ndarray]:
        return [encode(items[n]).numpy() for n in numbers]

    shards.cache_features(path, lengths, None, encode_batch, 8, name)


def open_cache(path: Path, items: list) -> Callable:
    """What `fill_cache` wrote: a function from an item to its rows (S, D), float16."""
    rows = shards.open_features(path, shards.PREPARE_HINT)
    numbers = {item: n for n, item in enumerate(items)}
    return lambda item: rows(numbers[item])


def caption_encoders(config: Config, device: torch.device) -> dict[str, Callable[[str], Tensor]]:
    """Frozen caption encoders, the same for caches and for sampling.

    returns: features (S, D) of a caption by T5, unpadded, and vectors (1, V) by CLAP, on the CPU; neither
    where it is trained or pooled. A network is loaded at its first call.
    """

    def features(text: str) -> Tensor:
        encoder, tokenizer, _ = load_t5(config.model.text_encoder)
        ids = torch.tensor(text_encoder.tokenize(tokenizer, [text]), device=device)  # (1, S)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return encoder.to(device)(ids, mask)[0].cpu()

    def vectors(text: str) -> Tensor:
        return load_clap("music.vector_encoder", config.music.vector_encoder, device).text_hidden(text)

    encoders = {}
    if config.model.text_encoder != "scratch":
        encoders["features"] = features
    if config.music.vector_encoder != "pooled":
        encoders["vectors"] = vectors
    return encoders


load_t5 = functools.cache(text_encoder.load_text_encoder)  # loaded once

# Corpora


def prepare_music(config: Config) -> None:
    """Pack data.corpus, unless that was done: `music` as recorded, or `pieces`, which are generated here."""
    if config.data.corpus == "pieces":
        prepare_pieces(config)
    else:
        prepare_recordings(config, config.packed_format(), READERS)


def read_music(path: Path) -> tuple[list[Clip], list[str]]:
    """The recordings and captions of a JSON list, [{"wav", "label"}], or of a folder's *.csv (file, caption).

    Paths are relative to the list or table.
    returns: the clips, and those without a caption.
    raises UserError for a recording that is missing: nobody trains on silence.
    """
    table = path if path.suffix == ".json" else min(path.glob("*.csv"), default=path / "captions.csv")
    try:
        clips = read_captions(table)
    except (OSError, csv.Error, *DAMAGE) as e:
        raise UserError(
            f'{table}: missing, or not [{{"wav": ..., "label": ...}}, ...], '
            f"or no table of file and caption ({e!r})"
        ) from e
    missing = [clip.wav for clip in clips if not os.path.isfile(clip.wav)]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, as {len(missing)} of {len(clips)} recordings in {table}: "
            "fetch them, or strike them out"
        )
    captioned = [clip for clip in clips if clip.text]
    skipped = [f"{clip.wav}: empty caption" for clip in clips if not clip.text]
    return speech.ensure_validation_split(path, captioned), skipped


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


READERS = {"music": published(read_music)}
