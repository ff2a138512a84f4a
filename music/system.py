"""Text to music: FluxMusic, a rectified-flow Transformer over latents of a mel spectrogram. System `music`.

The loss, sampling of any length, scores. A caption conditions the network twice: T5-XXL's hidden states take
part in every attention, as a sequence; CLAP's vector modulates every block (model.py). What the network works
on stands in latents.py, how samples are judged in analysis.py.
Source: FluxMusic (Fei et al. 2024, arXiv 2409.00587), layout of feizc/FluxMusic@126bdce.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import audio
import flow
import metric
from base import MelOutput, Prompt, System
from config import UserError
from corpora.shards import Clip, atomic_write
from metric import Score
from music import analysis
from music.clap import load_clap
from music.config import SIZES, MusicConfig, MusicSample, Size
from music.data import (
    READERS,
    MusicBatches,
    MusicCorpus,
    caption_encoders,
    collate_captions,
    fetch,
    prepare,
)
from music.latents import Codec, load_vocoder, random_crop
from music.model import MMDiT, load_published
from pretrained import text_encoder


class Music(System):
    """Losses out of `forward`, music out of `sample`.

    Frozen networks are cached when they are first needed, not registered as submodules: not saved.
    """

    config_class = MusicConfig
    corpus_class = MusicCorpus
    batches_class = MusicBatches
    max_characters = 1000  # characters of a caption
    scores = {
        "all_match": Score(
            "everything as asked for", "%", "all that the prompt says, at once", is_match=True
        ),
        "key_match": Score("key as asked for", "%", is_match=True),
        "tempo_match": Score("tempo as asked for", "%", is_match=True),
        "timbre_match": Score("timbre as asked for", "%", is_match=True),
        "chance": Score("chance", "%", "that a guess has everything as asked for"),
        "fad": Score(
            "Fréchet audio distance", "", "of the sets' features; 0 is the recordings", of_outputs=True
        ),
        "kad": Score(
            "kernel audio distance",
            "",
            "of the sets' features, times 100; 0 is the recordings",
            of_outputs=True,
        ),
        "clap": Score("CLAP score", "", "mean cosine similarity of sound and prompt", of_outputs=True),
    }
    readers = READERS
    fetch = staticmethod(fetch)
    prepare = staticmethod(prepare)
    varying = ("text", "ids", "text_mask")

    def __init__(self, config: MusicConfig, mean: float = 0.0, std: float = 1.0):
        """mean, std: of the training set's log-mels, for the patches that stand in for a VAE."""
        super().__init__()
        self.config = config
        self.frame_rate = config.mel.sample_rate / config.mel.hop
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        self.trained_text_encoder = None
        self.tokenizer = None
        text_width = 0
        if config.model.text_encoder == "scratch":
            loaded = text_encoder.load_text_encoder("scratch")
            self.trained_text_encoder, self.tokenizer, text_width = loaded

        size = choose_size(config, self.codec, text_width)
        weights = config.music.weights
        self.transformer = load_published(Path(weights)) if weights else MMDiT(size)
        if self.transformer.size != size:
            width = self.transformer.size.width
            raise UserError(f"{weights}: not of music.size {config.music.size}, its width is {width}")

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `MusicBatches`. returns: loss, flow_loss, scalars; flow_loss_per_clip (B,)."""
        x = batch["x"]  # (B, N, C)
        noise = batch["noise"]  # (B, N, C)
        t = batch["t"]  # (B,)
        x_t = flow.interpolate(x, noise, t)
        v = self.velocity(x_t, t, *self.condition(batch))
        flow_loss = flow.loss(v, x, noise, mask=x.new_ones(x.shape[:2]))  # (B,)
        loss = flow_loss.mean()
        return {"loss": loss, "flow_loss": loss, "flow_loss_per_clip": flow_loss.detach()}

    def velocity(self, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """x_t (B, N, C), t (B,), what `condition` returns -> v (B, N, C), float32."""
        output = self.transformer(x_t, t, *condition)
        options = self.config.flow
        return flow.velocity(output.float(), x_t, t, options.predict, options.min_t)

    def condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the transformer is given of captions: text (B, S, D), vector (B, V), mask (B, S).

        The mask is left out where all of the text is attended to.
        """
        mask = batch["text_mask"]
        text = batch["text"] if "text" in batch else self.trained_text_encoder(batch["ids"], mask)
        vector = batch["vector"] if "vector" in batch else masked_mean(text, mask)
        size = self.transformer.size
        text_width = text.shape[-1]
        vector_width = vector.shape[-1]
        if (text_width, vector_width) != (size.text_width, size.vector_width):
            raise UserError(
                f"model.text_encoder and music.vector_encoder give {text_width} and {vector_width} numbers, "
                f"music.size {self.config.music.size} takes {size.text_width} and {size.vector_width}"
            )
        if self.config.music.text_padding == "masked":
            return text, vector, mask
        length = self.config.music.caption_tokens
        return repeat_last(text, mask, length), vector

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: MusicSample) -> list[MelOutput]:
        """A piece for each prompt, its noise by its own seed alone; prompts of one length are one batch."""
        lengths = []
        for prompt in prompts:
            seconds = prompt.seconds or self.config.music.crop_seconds
            lengths.append(round(seconds * self.frame_rate))

        outputs = {}
        for frames in sorted(set(lengths)):
            numbers = [n for n, length in enumerate(lengths) if length == frames]
            batch = [prompts[n] for n in numbers]
            tokens = self.sample_tokens(batch, frames, settings)
            for n, prompt, x in zip(numbers, batch, tokens):
                outputs[n] = self.make_output(prompt.text, x, frames)
        return [outputs[n] for n in range(len(prompts))]

    def sample_tokens(self, prompts: Sequence[Prompt], frames: int, settings: MusicSample) -> Tensor:
        """Tokens (B, N, C) of at least `frames` mel frames; beyond one crop by `multidiffusion`."""
        codec = self.codec
        half_crops = max(2, math.ceil(2 * frames / codec.crop_frames))
        noise = self.draw_noise(prompts, half_crops * codec.crop_tokens // 2)
        texts = [prompt.text for prompt in prompts]
        texts += [settings.negative] * len(prompts)  # for the unconditional half of guidance
        encoders = caption_encoders(self.config, self.mean.device)
        batch = collate_captions(texts, texts, self.config, self.tokenizer, encoders)
        batch = {name: value.to(self.mean.device) for name, value in batch.items()}
        grid = flow.timesteps(settings.euler_steps, settings.sway, settings.shift)

        def crop_velocity(x_t: Tensor, t: Tensor) -> Tensor:
            rows = [part[: len(x_t)] for part in condition]  # without guidance the first half
            return self.velocity(x_t, t, *rows)

        with self.autocast():
            condition = self.condition(batch)
            network = multidiffusion(crop_velocity, codec.crop_tokens)
            guidance = (settings.cfg_scale, settings.cfg_from, settings.cfg_to)
            return flow.sample_euler(network, noise, grid, *guidance)

    def draw_noise(self, prompts: Sequence[Prompt], tokens: int) -> Tensor:
        """(B, N, C), each row from its prompt's seed."""
        shape = (tokens, self.transformer.size.channels)
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(self.mean.device)

    def autocast(self) -> torch.autocast:
        enabled = self.config.train.dtype == "bf16"
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=enabled)

    @property
    def codec(self) -> Codec:
        return Codec(self.config, self.mean.item(), self.std.item(), self.mean.device)

    def make_output(self, text: str, tokens: Tensor, frames: int) -> MelOutput:
        """tokens (N, C) -> the first `frames` mel frames of them, as sound."""
        mel = self.config.mel
        log_mel = self.codec.decode(tokens)[:frames]
        if self.config.sample.vocoder == "own":
            vocoder = load_vocoder(self.config, log_mel.device)
            wave = vocoder(log_mel)[: frames * mel.hop].cpu()  # it returns 32 more
        else:
            wave = audio.griffin_lim(log_mel, mel)
        return MelOutput(text, wave, mel.sample_rate, log_mel.cpu(), mel)

    def reference(self, corpus: MusicCorpus, clip: Clip) -> MelOutput:
        """A crop of a recorded piece, always the same one, encoded, decoded and vocoded."""
        rng = np.random.default_rng(clip.number)
        tokens, _ = self.codec.encode_crop(corpus.wave(clip), rng)
        return self.make_output(clip.text, tokens.to(self.mean.device), self.codec.crop_frames)

    def score(self, output: MelOutput, corpus: MusicCorpus, clip: Clip) -> dict[str, float]:
        """Whether key, tempo and timbre are the caption's, 1 or 0; {} where it does not name them."""
        measured = analysis.measure(output.wave, output.sample_rate)
        return analysis.caption_match(measured, clip.text)

    def features(self, output: MelOutput, corpus: MusicCorpus, clip: Clip) -> dict[str, np.ndarray]:
        """Embeddings (D,) of sample, recording and caption by the ClapModel eval.features, or chance."""
        name = self.config.eval.features
        if not name:
            known = analysis.parse_caption(clip.text)
            return {"chance": np.array(analysis.GUESS_RATE)} if known else {}
        rng = np.random.default_rng(clip.number)
        samples = self.codec.crop_frames * self.config.mel.hop
        real = random_crop(corpus.wave(clip), samples, rng)
        rate = output.sample_rate
        clap = load_clap("eval.features", name, self.mean.device)
        return {
            "generated": clap.embed_audio(output.wave, rate),
            "real": clap.embed_audio(real, rate),
            "text": clap.embed_text(clip.text),
        }

    def summarize(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """fad, kad: Fréchet and kernel distance to recordings; clap: mean cosine of sample and caption."""
        if "real" not in features:
            return {"chance": float(features["chance"].mean())}
        generated = features["generated"]
        real = features["real"]
        cosines = (generated * features["text"]).sum(1)
        return {
            "fad": metric.frechet_distance(generated, real),
            "kad": metric.kernel_distance(generated, real),
            "clap": float(cosines.mean()),
        }

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices. AdamW trains modulations, inputs and outputs."""
        stacks = [self.transformer.double_blocks, self.transformer.single_blocks]
        if self.trained_text_encoder is not None:
            stacks.append(self.trained_text_encoder)
        matrices = []
        for stack in stacks:
            for name, layer in stack.named_modules():
                if isinstance(layer, nn.Linear) and not name.endswith(".lin"):
                    matrices.append(layer.weight)
        return matrices

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write music.pt, which FluxMusic's own programs load, and music.weights."""
        size = self.config.music.size
        if size == "own":
            reason = "no other software loads a network of music.size own; its checkpoint is all there is"
            raise UserError(f"{folder}: {reason}")
        options = argparse.Namespace(version=size, **facts)
        state = {"ema": self.transformer.state_dict(), "args": options}
        with atomic_write(folder / "music.pt") as part:
            torch.save(state, part)


def choose_size(config: MusicConfig, codec: Codec, text_width: int) -> Size:
    """The published size, or the config's own. text_width: of a text encoder that is trained along, or 0."""
    options = config.music
    if options.size != "own":
        return SIZES[options.size]
    heads = config.model.heads
    head_width = config.model.width // heads
    rotated = 3 * head_width // 16 * 2  # numbers of a head that turn with time; as many with frequency
    text_width = text_width or options.text_width
    pooled = options.vector_encoder == "pooled"
    return Size(
        width=config.model.width,
        depth=options.double_blocks,
        depth_single_blocks=config.model.layers - options.double_blocks,
        axes_dim=(head_width - 2 * rotated, rotated, rotated),
        heads=heads,
        channels=codec.channels,
        bands=codec.bands,
        text_width=text_width,
        vector_width=text_width if pooled else options.vector_width,
    )


def masked_mean(text: Tensor, mask: Tensor) -> Tensor:
    """text (B, S, D), mask (B, S) -> the mean (B, D) of the valid tokens."""
    count = mask.sum(1, keepdim=True)
    return (text * mask[..., None]).sum(1) / count


def repeat_last(text: Tensor, mask: Tensor, length: int) -> Tensor:
    """text (B, S, D) -> (B, length, D): instead of padding, the features of the last valid token again."""
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    positions = torch.arange(length, device=mask.device)
    positions = positions.minimum(last)  # (B, length)
    return torch.take_along_dim(text, positions[..., None], 1)


def multidiffusion(network: Callable, window: int) -> Callable:
    """A network of `window` tokens as one of 2, 3, 4, ... half windows, x_t (B, N, C), t (B,) -> v (B, N, C).

    It runs on windows that overlap by half; where two meet, v is the mean of theirs, faded from one to the
    other, at every step: so all of it becomes one piece (MultiDiffusion, arXiv 2302.08113).
    """

    def whole(x_t: Tensor, t: Tensor) -> Tensor:
        length = x_t.shape[1]
        middle = window / 2
        position = torch.arange(window, device=x_t.device)[:, None] + 0.5  # (window, 1)
        fade = middle - (position - middle).abs()  # up, and down again
        v = torch.zeros_like(x_t)
        weight = x_t.new_zeros(length, 1)
        for start in range(0, length - window + 1, window // 2):
            part = slice(start, start + window)
            v[:, part] += fade * network(x_t[:, part], t)
            weight[part] += fade
        return v / weight

    return whole
