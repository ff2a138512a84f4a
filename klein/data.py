"""Speech as waves, and batches of cached latents and text features: the same draws as every system's batches.

Caches are named by a digest of all that they depend on; prepare.py makes them.
"""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from config import Config
from corpora import shards
from corpora.shards import Clip
from data import Batches, ShardedCorpus
from klein import pipeline
from klein.config import Picture
from klein.picture import frame_count


class WaveCorpus(ShardedCorpus):
    """Speech as waves of at most picture.seconds; `statistics` is empty: pictures are in [0, 1] already."""

    statistics = ()

    def __init__(self, config: Config):
        p = config.picture
        seconds = min(config.data.max_seconds, p.seconds)
        super().__init__(config, wave_format(p), longest=math.ceil(seconds * p.sample_rate / p.hop))
        self.max_samples = int(seconds * self.rate)

    def wave(self, clip: Clip) -> torch.Tensor:
        return super().wave(clip)[: self.max_samples]


def wave_format(picture: Picture) -> dict:
    return {"sample_rate": picture.sample_rate, "hop": picture.hop, "seconds": picture.seconds}


# Batches


class PictureBatches(Batches):
    """Batches of cached latents and text features.

    x (B, N, C) float16; noise (B, N, C); x_mask (B, N): tokens that show the spectrogram, not the rest of
    the canvas; t (B,); frames (B,); number (B,) of the clip; text (B, S, D) float16, the cached features,
    or, where the text encoder is trained, ids, text_mask (B, S).
    """

    def __init__(self, config: Config, corpus: WaveCorpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.latents = shards.open_features(latents_file(config, corpus), shards.PREPARE_HINT)
        self.clip_index = {clip.number: n for n, clip in enumerate(all_clips(corpus))}
        features_path, prompts = features_file(config, corpus)
        self.prompt_index = {prompt: n for n, prompt in enumerate(prompts)}
        self.features = None
        if not config.klein.text_rank:
            self.features = shards.open_features(features_path, shards.PREPARE_HINT)
        self.x_mask = token_mask(config.picture)

    def row(self, clip: shards.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept, as for validation."""
        x = self.latents(self.clip_index[clip.number])  # (N, C)
        prompt = format_prompt(self.config, clip.text)
        if t is None:
            if rng.random() < self.config.flow.text_condition_dropout:
                prompt = ""
            t = self.sample_time(rng)
        noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
        return {
            "x": x,
            "noise": torch.from_numpy(noise),
            "t": t,
            "frames": clip.frames,
            "number": clip.number,
            "prompt": prompt,
        }

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for key in ("t", "frames", "number"):
            batch[key] = torch.tensor([row[key] for row in rows])  # (B,)
        for key in ("x", "noise"):
            batch[key] = torch.stack([row[key] for row in rows])  # (B, N, C)
        batch["x_mask"] = self.x_mask.expand(len(rows), -1)  # (B, N)
        prompts = [row["prompt"] for row in rows]
        if self.features:
            features = [self.features(self.prompt_index[prompt]) for prompt in prompts]
            batch["text"] = torch.stack(features)  # (B, S, D)
        else:
            length = self.config.klein.text_tokens
            tokens = pipeline.tokenize_prompts(self.tokenizer, prompts, length)
            batch["ids"], batch["text_mask"] = tokens  # (B, S) both
        return batch


def token_mask(p: Picture) -> torch.Tensor:
    """(N,): which tokens of the canvas show any of the spectrogram."""
    bins = p.n_fft // 2 + 1
    row_mask = torch.arange(0, p.canvas_height, 16) < bins  # (H / 16,)
    column_mask = torch.arange(0, p.canvas_width, 16) < frame_count(p) * p.stretch  # (W / 16,)
    return (row_mask[:, None] & column_mask).flatten()


def format_prompt(config: Config, text: str) -> str:
    return config.klein.prompt.replace("{text}", text)


def all_clips(corpus: WaveCorpus) -> list[shards.Clip]:
    """The clips of all splits, each once, by number."""
    clips = set()
    for split in shards.SPLITS:
        clips.update(corpus.clips(split))
    return sorted(clips, key=lambda clip: clip.number)


def latents_file(config: Config, corpus: WaveCorpus) -> Path:
    """The cache of the clips' latents, named by a digest of all that it depends on."""
    k = config.klein
    numbers = [clip.number for clip in all_clips(corpus)]
    digest = shards.digest([k.base, k.vae, asdict(config.picture), numbers])
    return corpus.folder / f"latents_{digest[:8]}.npy"


def features_file(config: Config, corpus: WaveCorpus) -> tuple[Path, list]:
    """The cache of the text encoder's features, and the prompts in it."""
    k = config.klein
    read = {format_prompt(config, clip.text) for clip in all_clips(corpus)}
    prompts = sorted({"", *read})
    digest = shards.digest([k.base, k.text_tokens, prompts])
    return corpus.folder / f"features_{digest[:8]}.npy", prompts
