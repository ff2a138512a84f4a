"""Text to music: FluxMusic, a rectified-flow Transformer over latents of a mel spectrogram. System `music`.

A latent (B, 8, T, F) of AudioLDM2's VAE is cut into patches of 2 x 2: N = T / 2 * F / 2 tokens of C = 32
numbers, all bands of one time before the next. Without the VAE, tokens are patches of the normalised log-mel.
A caption conditions the network twice: T5-XXL's hidden states take part in every attention, as a sequence;
CLAP's vector is added to the time embedding and modulates every block.
Source: FluxMusic (Fei et al. 2024, arXiv 2409.00587), layout of feizc/FluxMusic@126bdce; blocks of SD3
(arXiv 2403.03206) and FLUX.1.
"""

import argparse
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor

import audio
import data
import flow
import metric
import pretrained
import recogniser
from config import Config, Sample, UserError
from music_config import SIZES, Size
from device import widest_float
from model import Artifact, Batches, Prompt, sinusoids, zero

Corpus = recogniser.Pieces


class Music(nn.Module):
    """Losses out of `forward`, music out of `sample`.

    Frozen networks are loaded once, when they are needed; they are not submodules.
    """

    makes = ("wav",)
    speaks = False
    listens = False
    longest = 1000  # characters of a caption

    def __init__(self, config: Config, mean: float = 0.0, std: float = 1.0):
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
            encoder, self.tokenizer, text_width = pretrained.load_text_encoder("scratch")
            self.trained_text_encoder = encoder

        size = choose_size(config, self.codec, text_width)
        weights = config.music.weights
        self.transformer = load_published(Path(weights)) if weights else MMDiT(size)
        found = self.transformer.size
        if found != size:
            name = config.music.size
            raise UserError(f"{weights}: not of music.size {name}, its width is {found.width}")

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `MusicBatches`. returns: loss, flow_loss, scalars; flow_loss_per_clip (B,)."""
        x = batch["x"]  # (B, N, C)
        noise = batch["noise"]  # (B, N, C)
        t = batch["t"]  # (B,)
        x_t = flow.interpolate(x, noise, t)
        condition = self.condition(batch)
        v = self.velocity(x_t, t, *condition)
        valid = x.new_ones(x.shape[:2])  # (B, N)
        flow_loss = flow.loss(v, x, noise, valid)  # (B,)
        loss = flow_loss.mean()
        return {"loss": loss, "flow_loss": loss, "flow_loss_per_clip": flow_loss.detach()}

    def velocity(self, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """x_t (B, N, C), t (B,), what `condition` returns -> v (B, N, C), float32."""
        output = self.transformer(x_t, t, *condition)
        predict = self.config.flow.predict
        min_t = self.config.flow.min_t
        return flow.velocity(output.float(), x_t, t, predict, min_t)

    def condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the transformer is given of captions: text (B, S, D), vector (B, V), mask (B, S).

        The mask is left out where all of the text is attended to.
        """
        mask = batch["text_mask"]
        if "text" in batch:
            text = batch["text"]
        else:
            text = self.trained_text_encoder(batch["ids"], mask)
        if "vector" in batch:
            vector = batch["vector"]
        else:
            vector = masked_mean(text, mask)

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
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """A piece for each prompt, its noise by its own seed alone; prompts of one length are one batch."""
        lengths = []
        for prompt in prompts:
            seconds = prompt.seconds or self.config.music.crop_seconds
            frames = round(seconds * self.frame_rate)
            lengths.append(frames)

        outputs = {}
        for frames in sorted(set(lengths)):
            numbers = [n for n, length in enumerate(lengths) if length == frames]
            batch = [prompts[n] for n in numbers]
            tokens = self.sample_tokens(batch, frames, settings)
            for n, prompt, x in zip(numbers, batch, tokens):
                outputs[n] = self.artifact(prompt.text, x, frames)
        return [outputs[n] for n in range(len(prompts))]

    def sample_tokens(self, prompts: Sequence[Prompt], frames: int, settings: Sample) -> Tensor:
        """Tokens (B, N, C) of at least `frames` mel frames; beyond one crop: `flow.overlapping`."""
        codec = self.codec
        half_crops = math.ceil(2 * frames / codec.frames)
        half_crops = max(2, half_crops)
        noise = self.draw_noise(prompts, half_crops * codec.tokens // 2)
        texts = [prompt.text for prompt in prompts]
        texts += [settings.negative] * len(prompts)  # the unconditional half of guidance
        encoders = readers(self.config, self.mean.device)
        batch = collate_texts(texts, texts, self.config, self.tokenizer, encoders)
        batch = {name: value.to(self.mean.device) for name, value in batch.items()}
        grid = flow.times(settings.euler_steps, settings.sway, settings.shift)

        def crop_velocity(x_t: Tensor, t: Tensor) -> Tensor:
            rows = [part[: len(x_t)] for part in condition]  # without guidance the first half
            return self.velocity(x_t, t, *rows)

        with self.autocast():
            condition = self.condition(batch)
            network = flow.overlapping(crop_velocity, codec.tokens)
            guidance = (settings.cfg_scale, settings.cfg_from, settings.cfg_to)
            return flow.euler(network, noise, grid, *guidance)

    def draw_noise(self, prompts: Sequence[Prompt], tokens: int) -> Tensor:
        """(B, N, C), each row from its prompt's seed."""
        shape = (tokens, self.transformer.size.channels)
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(prompt.seed)
            row = torch.randn(shape, generator=generator)
            rows.append(row)
        return torch.stack(rows).to(self.mean.device)

    def autocast(self) -> torch.autocast:
        device = self.mean.device.type
        enabled = self.config.train.dtype == "bf16"
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    @property
    def codec(self) -> "Codec":
        return Codec(self.config, self.mean.item(), self.std.item(), self.mean.device)

    def artifact(self, text: str, tokens: Tensor, frames: int) -> Artifact:
        """tokens (N, C) -> the first `frames` mel frames of them, as sound."""
        mel = self.config.mel
        log_mel = self.codec.decode(tokens)[:frames]
        if self.config.sample.vocoder == "own":
            vocoder = pretrained.load_frozen(
                transformers.SpeechT5HifiGan,
                self.config.music.autoencoder,
                "vocoder",
                "music.autoencoder",
                log_mel.device,
            )
            samples = frames * mel.hop
            wave = vocoder(log_mel)[:samples].cpu()  # it returns 32 more
        else:
            wave = audio.griffin_lim(log_mel, mel)
        return Artifact(text, wave, mel.sample_rate, log_mel.cpu(), mel)

    def reference(self, corpus: Corpus, clip: data.Clip) -> Artifact:
        """A crop of a recorded piece, always the same one, encoded, decoded and vocoded."""
        wave = corpus.wave(clip)
        rng = np.random.default_rng(clip.number)
        mean, _ = self.codec.hear(wave, rng)
        tokens = mean.to(self.mean.device)
        return self.artifact(clip.text, tokens, self.codec.frames)

    def score(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, float]:
        """Whether key, tempo and timbre are the caption's, 1 or 0; {} where it does not name them."""
        measured = recogniser.hear(made.wave, made.sample_rate)
        return recogniser.match(measured, clip.text)

    def features(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, np.ndarray]:
        """Embeddings (D,) of sample, recording and caption by the ClapModel eval.features, or chance."""
        name = self.config.eval.features
        device = self.mean.device
        if not name:
            known = recogniser.asked_for(clip.text)
            return {"chance": np.array(recogniser.CHANCE)} if known else {}
        wave = corpus.wave(clip)
        rng = np.random.default_rng(clip.number)
        length = self.codec.frames * self.config.mel.hop
        real = audio.draw_crop(wave, length, rng)
        rate = made.sample_rate
        clap = recogniser.load_clap("eval.features", name, device)
        return {
            "made": clap.listen(made.wave, rate),
            "real": clap.listen(real, rate),
            "text": clap.place(clip.text),
        }

    def summary(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """fad, kad: Fréchet and kernel distance to recordings; clap: mean cosine of sample and caption."""
        if not features:
            return {}
        made = features["made"]
        real = features["real"]
        cosines = (made * features["text"]).sum(1)
        return {
            "fad": metric.frechet_distance(made, real),
            "kad": metric.kernel_distance(made, real),
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

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system music takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write music.pt, which FluxMusic's own programs load, and music.weights."""
        size = self.config.music.size
        if size == "own":
            reason = "no other software loads a network of music.size own; its checkpoint is all there is"
            raise UserError(f"{folder}: {reason}")
        options = argparse.Namespace(version=size, **facts)
        state = {"ema": self.transformer.state_dict(), "args": options}
        with data.replacing(folder / "music.pt") as part:
            torch.save(state, part)


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


# Batches


class MusicBatches(Batches):
    """x, noise (B, N, C); t (B,); frames (B,): of a crop; number (B,): of the clip; text_mask (B, S).

    Beside them text (B, S, D), cached features, or ids (B, S) where the text encoder is trained; and vector
    (B, V), unless it is pooled from the features. S is a multiple of 8.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.read = {}
        for name, (path, items) in caches(config, corpus).items():
            self.read[name] = open_cache(path, items)
        self.codec = Codec(config, *corpus.statistics, torch.device("cpu"))
        if tokenizer:
            pretrained.tokenize(tokenizer, [""])  # the first call mutates the tokenizer: not thread-safe

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the caption is kept, as for validation."""
        together = rng.random() < self.config.music.joint_dropout
        dropped = rng.random(2) < self.config.flow.text_condition_dropout
        drop_text = t is None and dropped[0]
        drop_vector = t is None and dropped[0 if together else 1]

        mean, std = self.crop(clip, rng)
        x = mean + std * normal_like(mean, rng)
        noise = normal_like(mean, rng)
        if t is None:
            t = self.draw_time(rng)
        return {
            "x": x,
            "noise": noise,
            "t": t,
            "number": clip.number,
            "frames": self.codec.frames,
            "text": "" if drop_text else clip.text,
            "vector_text": "" if drop_vector else clip.text,
        }

    def crop(self, clip: data.Clip, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C) of the tokens of a random crop; with a VAE, of a cached one."""
        if "latents" not in self.read:
            wave = self.corpus.wave(clip)
            return self.codec.hear(wave, rng)
        latents = self.read["latents"](clip)
        crops = latents.unflatten(0, (self.config.music.crops, -1))  # (crops, N, 2 C)
        chosen = rng.integers(len(crops))
        return crops[chosen].chunk(2, -1)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = {}
        for key in ("t", "frames", "number"):
            values = [row[key] for row in rows]
            batch[key] = torch.tensor(values)
        for key in ("x", "noise"):
            values = [row[key] for row in rows]
            batch[key] = torch.stack(values)
        texts = [row["text"] for row in rows]
        vector_texts = [row["vector_text"] for row in rows]
        texts = collate_texts(texts, vector_texts, self.config, self.tokenizer, self.read)
        return batch | texts


def normal_like(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Standard normal noise of the shape of x, float32."""
    noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
    return torch.from_numpy(noise)


def collate_texts(
    texts: list[str], vector_texts: list[str], config: Config, tokenizer, encoders: dict[str, Callable]
) -> dict[str, Tensor]:
    """A batch's entries of captions: text or ids, text_mask, vector. encoders: as `readers` returns."""
    if "features" in encoders:
        name = "text"
        rows = [encoders["features"](text) for text in texts]
    else:
        name = "ids"
        tokens = pretrained.tokenize(tokenizer, texts)
        rows = [torch.tensor(ids) for ids in tokens]
    rows = [row[: config.music.caption_tokens] for row in rows]
    padded, mask = data.pad(rows, 8)
    batch = {name: padded, "text_mask": mask}
    if "vectors" in encoders:
        vectors = [encoders["vectors"](text) for text in vector_texts]
        batch["vector"] = torch.cat(vectors)  # (B, V)
    return batch


# Caches, and what fills them


def prepare(config: Config) -> None:
    """Make what training needs and does not find: packed pieces, and caches of their captions and crops."""
    recogniser.prepare_music(config)
    corpus = Corpus(config)
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if on_cuda else "cpu")
    codec = Codec(config, *corpus.statistics, device)
    encoders = readers(config, device)
    encoders["latents"] = functools.partial(encode_crops, config, corpus, codec)

    for name, (path, items) in caches(config, corpus).items():
        if path.exists():
            continue
        lengths = [1] * len(items)
        if name == "latents":
            lengths = [config.music.crops * codec.tokens] * len(items)
        elif name == "features":
            _, tokenizer, _ = load_t5(config.model.text_encoder)
            tokens = pretrained.tokenize(tokenizer, items)
            lengths = [len(ids) for ids in tokens]
        fill_cache(path, items, lengths, encoders[name], name)


def encode_crops(config: Config, corpus: Corpus, codec: "Codec", clip: data.Clip) -> Tensor:
    """music.crops random crops of a piece: mean and standard deviation of their tokens, (crops * N, 2 C)."""
    wave = corpus.wave(clip)
    rng = np.random.default_rng((config.seed, clip.number))
    crops = []
    for _ in range(config.music.crops):
        mean, std = codec.hear(wave, rng)
        crop = torch.cat([mean, std], -1)
        crops.append(crop)
    return torch.cat(crops)


def fill_cache(path: Path, items: list, lengths: list[int], encode: Callable, name: str) -> None:
    """Write what `encode` makes of each item, as many rows as `lengths` says; name: for the progress bar."""

    def encode_batch(numbers: list[int]) -> list[np.ndarray]:
        arrays = []
        for n in numbers:
            rows = encode(items[n])
            arrays.append(rows.numpy())
        return arrays

    data.cache_rows(path, lengths, None, encode_batch, 8, name)


def open_cache(path: Path, items: list) -> Callable:
    """What `fill_cache` wrote: a function from an item to its rows (S, D), float32."""
    rows = data.open_rows(path, data.PREPARE)
    numbers = {item: n for n, item in enumerate(items)}

    def read(item) -> Tensor:
        return rows(numbers[item])

    return read


def caches(config: Config, corpus: Corpus) -> dict[str, tuple[Path, list]]:
    """The caches that training reads: features and vectors of captions, latents of clips.

    returns for each its file, named by a digest of all that its content depends on, and its items.
    """
    clips = set()
    for split in data.SPLITS:
        clips.update(corpus.clips(split))
    clips = sorted(clips, key=lambda clip: clip.number)
    texts = sorted({"", *(clip.text for clip in clips)})
    contents = {}
    if config.model.text_encoder != "scratch":
        contents["features"] = [config.model.text_encoder, texts]
    if config.music.vector_encoder != "pooled":
        contents["vectors"] = [config.music.vector_encoder, texts]
    if config.music.autoencoder != "patches":
        contents["latents"] = [
            config.music.autoencoder,
            config.music.crops,
            config.music.crop_seconds,
            config.seed,
            asdict(config.mel),
            [clip.number for clip in clips],
        ]

    found = {}
    for name, content in contents.items():
        digest = data.digest(content)[:8]
        path = corpus.folder / f"{name}_{digest}.npy"
        found[name] = (path, clips if name == "latents" else texts)
    return found


load_t5 = functools.cache(pretrained.load_text_encoder)


def readers(config: Config, device: torch.device) -> dict[str, Callable[[str], Tensor]]:
    """Frozen caption encoders, the same for caches and for sampling.

    returns: features (S, D) of a caption by T5, unpadded, and vectors (1, V) by CLAP, on the CPU; neither
    where it is trained or pooled. A network is loaded at its first call.
    """

    def features(text: str) -> Tensor:
        encoder, tokenizer, _ = load_t5(config.model.text_encoder)
        ids = pretrained.tokenize(tokenizer, [text])
        ids = torch.tensor(ids, device=device)  # (1, S)
        mask = torch.ones_like(ids, dtype=torch.bool)
        encoder = encoder.to(device)
        return encoder(ids, mask)[0].cpu()

    def vectors(text: str) -> Tensor:
        name = config.music.vector_encoder
        clap = recogniser.load_clap("music.vector_encoder", name, device)
        return clap.read(text)

    encoders = {}
    if config.model.text_encoder != "scratch":
        encoders["features"] = features
    if config.music.vector_encoder != "pooled":
        encoders["vectors"] = vectors
    return encoders


# Latents


class Codec:
    """Log-mels (T, M) to tokens (N, C) and back, by AudioLDM2's VAE or, losslessly, as patches."""

    def __init__(self, config: Config, mean: float, std: float, device: torch.device):
        """mean, std: of the training set's log-mels, by which patches are normalised."""
        self.mel = config.mel
        self.mean = mean
        self.std = std
        self.device = device
        options = config.music
        if options.autoencoder == "patches":
            self.vae_name = ""
            token_frames = options.patch_frames
            token_mels = options.patch_mels
            self.patch = (token_frames, token_mels)
            self.channels = token_frames * token_mels
        else:
            self.vae_name = options.autoencoder
            token_frames = 8  # the VAE's factor 4, in patches of 2
            token_mels = 8
            self.patch = (2, 2)
            self.channels = 32  # the latent's 8 x 2 x 2
        frames = options.crop_seconds * self.mel.sample_rate / self.mel.hop
        self.frames = round(frames)  # of a crop
        self.bands = self.mel.n_mels // token_mels  # tokens of one time
        self.tokens = self.frames // token_frames * self.bands  # of a crop

    @property
    def vae(self) -> nn.Module:
        import diffusers  # seconds to import

        kind = diffusers.AutoencoderKL
        return pretrained.load_frozen(kind, self.vae_name, "vae", "music.autoencoder", self.device)

    def hear(self, wave: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random crop of a piece (N,) -> mean and standard deviation of its tokens, (N, C) on the CPU."""
        samples = self.frames * self.mel.hop
        crop = audio.draw_crop(wave, samples, rng)
        log_mel = audio.log_mel(crop, self.mel)  # (T, M)
        if not self.vae_name:
            x = audio.normalise(log_mel, self.mean, self.std)
            tokens = to_tokens(x[None, None], self.patch)
            return tokens[0], torch.zeros_like(tokens[0])
        log_mel = log_mel.to(self.device)
        with torch.no_grad():
            latents = self.vae.encode(log_mel[None, None]).latent_dist
        scale = self.vae.config.scaling_factor
        mean = to_tokens(latents.mean * scale)
        std = to_tokens(latents.std * scale)
        return mean[0].cpu(), std[0].cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (N, C) -> log-mel (T, M)."""
        latents = to_latents(tokens[None], self.bands, self.patch)
        if not self.vae_name:
            return audio.denormalise(latents[0, 0], self.mean, self.std)
        latents = latents / self.vae.config.scaling_factor
        log_mel = self.vae.decode(latents).sample
        return log_mel[0, 0]


def to_tokens(latents: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """(B, channels, T, F) -> (B, N, C), each token a patch of times and bands."""
    i, j = patch
    return rearrange(latents, "b c (t i) (f j) -> b (t f) (c i j)", i=i, j=j)


def to_latents(tokens: Tensor, bands: int, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """(B, N, C) -> (B, channels, T, F). bands: tokens of one time."""
    i, j = patch
    return rearrange(tokens, "b (t f) (c i j) -> b c (t i) (f j)", f=bands, i=i, j=j)


# The network

EPS = 1e-6


def choose_size(config: Config, codec: "Codec", text_width: int) -> Size:
    """The published size, or the config's own. text_width: of a text encoder that is trained along, or 0."""
    options = config.music
    if options.size != "own":
        return SIZES[options.size]
    width = config.model.width
    heads = config.model.heads
    double = options.double_blocks
    single = config.model.layers - double
    head_width = width // heads
    rotated = 3 * head_width // 16 * 2  # numbers of a head that turn with time; as many with frequency
    axes = (head_width - 2 * rotated, rotated, rotated)
    text_width = text_width or options.text_width
    vector_width = options.vector_width
    if options.vector_encoder == "pooled":
        vector_width = text_width
    token = (codec.channels, codec.bands)
    return Size(width, double, single, axes, heads, *token, text_width, vector_width)


class MMDiT(nn.Module):
    """The network that predicts v. Parameter names are the published checkpoints', where `img` is music."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        width = size.width
        heads = size.heads
        self.img_in = nn.Linear(size.channels, width)
        self.txt_in = nn.Linear(size.text_width, width)
        self.time_in = embedder(256, width)
        self.vector_in = embedder(size.vector_width, width)
        self.double_blocks = nn.ModuleList()
        for _ in range(size.double):
            self.double_blocks.append(DoubleBlock(width, heads))
        self.single_blocks = nn.ModuleList()
        for _ in range(size.single):
            self.single_blocks.append(SingleBlock(width, heads))
        self.final_layer = FinalLayer(width, size.channels)

    def forward(
        self, x_t: Tensor, t: Tensor, text: Tensor, vector: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """x_t (B, N, C), t (B,), text (B, S, text_width), vector (B, vector_width) -> v (B, N, C).

        text_mask (B, S): None = all is text.
        """
        music = self.img_in(x_t)  # (B, N, D)
        text = self.txt_in(text)  # (B, S, D)
        tokens = music.shape[1]
        text_tokens = text.shape[1]
        time = sinusoids(1000 * t, 256).to(music.dtype)
        condition = self.time_in(time) + self.vector_in(vector)  # (B, D)
        freqs_cis = rotation(text_tokens, tokens, self.size, music.device)
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask, (0, tokens), value=True)  # (B, S + N)
            mask = mask[:, None, None]

        for block in self.double_blocks:
            music, text = block(music, text, condition, freqs_cis, mask)
        joint = torch.cat([text, music], 1)  # (B, S + N, D)
        for block in self.single_blocks:
            joint = block(joint, condition, freqs_cis, mask)
        music = joint[:, text_tokens:]
        return self.final_layer(music, condition)  # (B, N, C)


class DoubleBlock(nn.Module):
    """Music and text attend to each other in one attention; each has its own weights for everything."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.txt_mod = Modulation(width, 6)
        self.img_attn = StreamAttention(width, heads)
        self.txt_attn = StreamAttention(width, heads)
        self.img_mlp = mlp(width)
        self.txt_mlp = mlp(width)

    def forward(
        self, music: Tensor, text: Tensor, condition: Tensor, freqs_cis: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """music (B, N, D), text (B, S, D), condition (B, D) -> music and text."""
        music_shift, music_scale, *music_rest = self.img_mod(condition)
        text_shift, text_scale, *text_rest = self.txt_mod(condition)
        text_q, text_k, text_v = self.txt_attn(text, text_shift, text_scale)
        music_q, music_k, music_v = self.img_attn(music, music_shift, music_scale)

        q = torch.cat([text_q, music_q], 1)  # (B, S + N, H, D / H)
        k = torch.cat([text_k, music_k], 1)
        v = torch.cat([text_v, music_v], 1)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        lengths = [text.shape[1], music.shape[1]]
        attended_text, attended_music = attended.split(lengths, 1)

        music_update = self.img_attn.proj(attended_music)
        music = residual(music, music_update, self.img_mlp, *music_rest)
        text_update = self.txt_attn.proj(attended_text)
        text = residual(text, text_update, self.txt_mlp, *text_rest)
        return music, text


class StreamAttention(nn.Module):
    """The weights that one of two streams has in their joint attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D), shift, scale (B, 1, D) -> q, k, v (B, N, H, D / H)."""
        qkv = self.qkv(modulate(x, shift, scale))
        q, k, v = qkv.chunk(3, -1)
        return self.norm(q, k, v)


class SingleBlock(nn.Module):
    """Text and music as one sequence; attention and MLP in parallel, with shared matrices (ViT-22B)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 7 * width)
        self.linear2 = nn.Linear(5 * width, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, S + N, D), condition (B, D) -> (B, S + N, D)."""
        shift, scale, gate = self.modulation(condition)
        width = x.shape[-1]
        widths = [width, width, width, 4 * width]
        projected = self.linear1(modulate(x, shift, scale))
        q, k, v, hidden = projected.split(widths, -1)
        q, k, v = self.norm(q, k, v)  # (B, S + N, H, D / H)
        attended = attend(q, k, v, freqs_cis, mask)  # (B, S + N, D)
        hidden = F.gelu(hidden, approximate="tanh")  # (B, S + N, 4 D)
        hidden = torch.cat([attended, hidden], -1)
        update = self.linear2(hidden)
        return torch.addcmul(x, gate, update)


class FinalLayer(nn.Module):
    """AdaLN, then the projection to tokens; both zero-initialised, so an untrained network returns 0."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = zero(nn.Linear(width, channels))
        modulation = zero(nn.Linear(width, 2 * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, music: Tensor, condition: Tensor) -> Tensor:
        """music (B, N, D), condition (B, D) -> (B, N, C)."""
        modulation = self.adaLN_modulation(condition)  # (B, 2 D)
        shift, scale = modulation[:, None].chunk(2, -1)
        music = modulate(music, shift, scale)
        return self.linear(music)


class QKNorm(nn.Module):
    """RMSNorm of q and k in each head."""

    def __init__(self, head_width: int):
        super().__init__()
        self.head_shape = (-1, head_width)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, N, D) -> (B, N, H, D / H)."""
        q = q.unflatten(-1, self.head_shape)
        k = k.unflatten(-1, self.head_shape)
        v = v.unflatten(-1, self.head_shape)
        return self.query_norm(q), self.key_norm(k), v


class RMSNorm(nn.Module):
    """x (..., width) with unit mean square, times a learned scale; in float32, whatever the rest is in."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = self.scale.float()
        return F.rms_norm(x, scale.shape, scale, EPS)


class Modulation(nn.Module):
    """The condition (B, D) -> `count` vectors (B, 1, D): shift, scale, gate of each branch.

    Zero-initialised, so the block starts as the identity.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.lin = zero(nn.Linear(width, count * width))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        width = condition.shape[-1]
        vectors = self.lin(F.silu(condition))  # (B, count D)
        return vectors[:, None].split(width, -1)


def embedder(width: int, out_width: int) -> nn.Sequential:
    """Two matrices around a SiLU, (B, width) -> (B, out_width)."""
    layers = OrderedDict()
    layers["in_layer"] = nn.Linear(width, out_width)
    layers["silu"] = nn.SiLU()
    layers["out_layer"] = nn.Linear(out_width, out_width)
    return nn.Sequential(layers)


def mlp(width: int) -> nn.Sequential:
    """(B, N, D) -> (B, N, D)."""
    first = nn.Linear(width, 4 * width)
    last = nn.Linear(4 * width, width)
    return nn.Sequential(first, nn.GELU("tanh"), last)


def residual(
    x: Tensor,
    attended: Tensor,
    mlp: nn.Module,
    attn_gate: Tensor,
    mlp_shift: Tensor,
    mlp_scale: Tensor,
    mlp_gate: Tensor,
) -> Tensor:
    """What a stream does after attention: x, attended (B, N, D), the others (B, 1, D) -> (B, N, D)."""
    x = torch.addcmul(x, attn_gate, attended)
    modulated = modulate(x, mlp_shift, mlp_scale)
    update = mlp(modulated)
    return torch.addcmul(x, mlp_gate, update)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then AdaLN's."""
    width = x.shape[-1:]
    normalised = F.layer_norm(x, width, eps=EPS)
    return torch.addcmul(shift, normalised, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v (B, N, H, D / H) -> (B, N, D). freqs_cis (N, 1, D / H / 2), complex: `rotation`; mask: of k."""
    q = rotate(q, freqs_cis).to(v.dtype)
    k = rotate(k, freqs_cis).to(v.dtype)
    q = q.transpose(1, 2)  # views: in memory the heads stay within a token, and nothing is copied
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (B, N, H, d) as complex numbers.

    `model.rotate` pairs the halves of a head.
    """
    pairs = x.unflatten(-1, (-1, 2))
    numbers = torch.view_as_complex(pairs)
    turned = torch.view_as_real(numbers * freqs_cis)
    return turned.flatten(-2)


def rotation(text_tokens: int, tokens: int, size: Size, device: torch.device) -> Tensor:
    """Rotary embeddings e^(i angle), (S + N, 1, D / H / 2), by position along none, time, frequency.

    All positions of the text are 0, 0, 0.
    """
    none = torch.arange(1, device=device)
    times = torch.arange(tokens // size.bands, device=device)
    bands = torch.arange(size.bands, device=device)
    positions = torch.cartesian_prod(none, times, bands)  # (N, 3)
    positions = F.pad(positions, (0, 0, text_tokens, 0))  # (S + N, 3)
    dtype = widest_float(device)
    angles = []
    for position, width in zip(positions.unbind(1), size.axes):
        pairs = torch.arange(0, width, 2, dtype=dtype, device=device)
        frequencies = 10000 ** (-pairs / width)
        angles.append(torch.outer(position, frequencies))
    angles = torch.cat(angles, 1)  # (S + N, D / H / 2)
    lengths = torch.ones_like(angles)
    freqs_cis = torch.polar(lengths, angles)
    return freqs_cis[:, None].to(torch.complex64)


# Published checkpoints


def load_published(path: Path) -> MMDiT:
    """The network of a checkpoint of FluxMusic, its averaged weights, float32, on the CPU.

    raises UserError for a file that is damaged, has code in it, or other tensors than exactly those of a
    published size.
    """
    tensors = read_published(path)
    size = published_size(tensors, path)
    with torch.device("meta"):
        network = MMDiT(size)
    wanted = shapes(network.state_dict())
    found = shapes(tensors)
    for name in sorted(wanted.keys() | found.keys()):
        wrong = found.get(name, "(none: it is missing)")
        right = wanted.get(name, "(no such tensor)")
        if wrong != right:
            raise UserError(f"{path}: {name} has shape {wrong}, FluxMusic's {right}")
    network.load_state_dict(tensors, assign=True)
    return network.float()


def published_size(tensors: dict[str, Tensor], path: Path) -> Size:
    """The published size that has the width and the numbers of blocks of the tensors."""
    width = 0
    if "img_in.bias" in tensors:
        width = tensors["img_in.bias"].numel()
    double = count_blocks(tensors, "double_blocks.")
    single = count_blocks(tensors, "single_blocks.")
    for size in SIZES.values():
        if (size.width, size.double, size.single) == (width, double, single):
            return size
    raise UserError(
        f"{path}: by img_in.bias of width {width} with {double} double_blocks and {single} single_blocks "
        f"it is none of {', '.join(SIZES)}"
    )


def count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    numbers = set()
    for name in tensors:
        if name.startswith(prefix):
            numbers.add(name.split(".")[1])
    return len(numbers)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_published(path: Path) -> dict[str, Tensor]:
    """The averaged weights by name, memory-mapped: the optimizer's state beside them is never read.

    None of the file's code runs.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of its training
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            state = None
            if not code:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # garbage fails in every way there is
        reason = pretrained.brief(e)
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({reason}); fetch it again") from e
    if code:
        raise UserError(
            f"{path}: refused, it asks for {min(code)} to be run; a checkpoint holds tensors and options only"
        )

    ema = None
    if isinstance(state, dict):
        ema = state.get("ema")
    if not isinstance(ema, dict):
        raise UserError(f"{path}: lacks ema, the averaged weights; not a checkpoint of FluxMusic")
    for name, value in ema.items():
        real = isinstance(value, Tensor) and value.is_floating_point()
        if not isinstance(name, str) or not real:
            raise UserError(
                f"{path}: ema {name!r} is no tensor of real numbers; not a checkpoint of FluxMusic"
            )
    return ema
