"""Text to music: FluxMusic, a rectified-flow Transformer over the latents of a mel spectrogram. System `music`.

A latent (B, 8, T, F) of AudioLDM2's VAE is cut into patches of 2 x 2: N = T / 2 * F / 2 tokens of C = 32 numbers, all bands of one
time before the next; without the VAE, patches of the normalised log-mel are the tokens. A text comes twice: as the sequence of
T5-XXL's features, which takes part in every attention, and as CLAP's vector, which with the time modulates every block.
Source: FluxMusic (Fei et al. 2024, arXiv 2409.00587), layout of feizc/FluxMusic@126bdce; blocks of SD3 (arXiv 2403.03206) and FLUX.1.
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
    """Losses out of `forward`, music out of `sample`. Frozen networks are no part of it: they are loaded, once, when they are needed."""

    makes, speaks, listens = ("wav",), False, False
    longest = 1000                             # characters of a caption

    def __init__(self, config: Config, mean: float = 0.0, std: float = 1.0):
        """mean, std: of the training set's log-mels, for the patches that stand in for a VAE."""
        super().__init__()
        self.config, self.frame_rate, weights = config, config.mel.sample_rate / config.mel.hop, config.music.weights
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        trained = config.model.text_encoder == "scratch"
        self.trained_text_encoder, self.tokenizer, width = pretrained.load_text_encoder("scratch") if trained else (None, None, 0)
        size = choose_size(config, self.codec, width)
        self.transformer = load_published(Path(weights)) if weights else MMDiT(size)
        if self.transformer.size != size:
            raise UserError(f"{weights}: not of music.size {config.music.size}, its width is {self.transformer.size.width}")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `MusicBatches`. returns: loss, flow_loss, scalars; flow_loss_per_clip (B,)."""
        x, noise, t = batch["x"], batch["noise"], batch["t"]
        v = self.velocity(flow.interpolate(x, noise, t), t, *self.condition(batch))
        flow_loss = flow.loss(v, x, noise, x.new_ones(x.shape[:2]))
        return {"loss": flow_loss.mean(), "flow_loss": flow_loss.mean(), "flow_loss_per_clip": flow_loss.detach()}

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        """x_t (B, N, C), t (B,), what `condition` returns -> v (B, N, C), float32."""
        return flow.velocity(self.transformer(x_t, t, *condition).float(), x_t, t, self.config.flow.predict, self.config.flow.min_t)

    def condition(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the transformer is given of texts: features (B, S, D), vectors (B, V), and mask (B, S) unless all is attended to."""
        mask, size = batch["text_mask"], self.transformer.size
        text = batch["text"] if "text" in batch else self.trained_text_encoder(batch["ids"], mask)
        vector = batch["vector"] if "vector" in batch else (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if (text.shape[-1], vector.shape[-1]) != (size.text_width, size.vector_width):
            raise UserError(f"model.text_encoder and music.vector_encoder give {text.shape[-1]} and {vector.shape[-1]} numbers, "
                            f"music.size {self.config.music.size} takes {size.text_width} and {size.vector_width}")
        if self.config.music.text_padding == "masked":
            return text, vector, mask
        places = torch.arange(self.config.music.caption_tokens, device=mask.device).minimum(mask.sum(1, keepdim=True) - 1)
        return text.gather(1, places[..., None].expand(-1, -1, text.shape[-1])), vector

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """A piece of each prompt; those of one length are one batch. A prompt's noise depends on its own seed alone."""
        frames, made = [round((prompt.seconds or self.config.music.crop_seconds) * self.frame_rate) for prompt in prompts], {}
        for length in sorted(set(frames)):
            alike = [n for n, other in enumerate(frames) if other == length]
            x = self.sample_tokens([prompts[n] for n in alike], length, settings)
            made |= {n: self.artifact(prompts[n].text, tokens, length) for n, tokens in zip(alike, x)}
        return [made[n] for n in range(len(prompts))]

    def sample_tokens(self, prompts: Sequence[Prompt], frames: int, settings: Sample) -> torch.Tensor:
        """Tokens (B, N, C) of at least as many mel frames. Beyond a crop's they are made of stretches that overlap: `flow.overlapping`."""
        codec, device = self.codec, self.mean.device
        shape = max(2, math.ceil(2 * frames / codec.frames)) * codec.tokens // 2, self.transformer.size.channels
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed)) for prompt in prompts]).to(device)
        texts = [prompt.text for prompt in prompts] + [settings.negative] * len(prompts)
        batch = collate_texts(texts, texts, self.config, self.tokenizer, readers(self.config, device))
        grid = flow.times(settings.euler_steps, settings.sway, settings.shift)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.train.dtype == "bf16"):
            condition = self.condition({name: value.to(device) for name, value in batch.items()})
            network = flow.overlapping(lambda x_t, t: self.velocity(x_t, t, *(part[:len(x_t)] for part in condition)), codec.tokens)
            return flow.euler(network, noise, grid, settings.cfg_scale, settings.cfg_from, settings.cfg_to)

    @property
    def codec(self) -> "Codec":
        return Codec(self.config, self.mean.item(), self.std.item(), self.mean.device)

    def artifact(self, text: str, tokens: torch.Tensor, frames: int) -> Artifact:
        """tokens (N, C) -> what is heard in the first mel frames of them."""
        c, log_mel = self.config, self.codec.decode(tokens)[:frames]
        if c.sample.vocoder == "own":
            name, device = c.music.autoencoder, log_mel.device
            vocoder = pretrained.load_frozen(transformers.SpeechT5HifiGan, name, "vocoder", "music.autoencoder", device)
            wave = vocoder(log_mel)[:frames * c.mel.hop].cpu()           # it makes 32 samples more
        else:
            wave = audio.griffin_lim(log_mel, c.mel)
        return Artifact(text, wave, c.mel.sample_rate, log_mel.cpu(), c.mel)

    def reference(self, corpus: Corpus, clip: data.Clip) -> Artifact:
        """A crop of a recorded piece, always the same one, encoded, decoded and heard again."""
        mean, _ = self.codec.hear(corpus.wave(clip), np.random.default_rng(clip.number))
        return self.artifact(clip.text, mean.to(self.mean.device), self.codec.frames)

    def score(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, float]:
        """Whether key, tempo and timbre, as they are heard, are those of the caption, 0 or 1; {} where it does not name them."""
        return recogniser.match(recogniser.hear(made.wave, made.sample_rate), clip.text)

    def features(self, made: Artifact, corpus: Corpus, clip: data.Clip) -> dict[str, np.ndarray]:
        """Where eval.features, a ClapModel, places the sample, the recorded piece and the caption, (D,) each; without one: chance."""
        if not self.config.eval.features:
            return {"chance": np.array(recogniser.CHANCE)} if recogniser.asked_for(clip.text) else {}
        clap, rate = recogniser.load_clap("eval.features", self.config.eval.features, self.mean.device), made.sample_rate
        real = audio.draw_crop(corpus.wave(clip), self.codec.frames * self.config.mel.hop, np.random.default_rng(clip.number))
        return {"made": clap.listen(made.wave, rate), "real": clap.listen(real, rate), "text": clap.place(clip.text)}

    def summary(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """fad, kad: Fréchet and kernel distance of samples to recordings; clap: mean cosine of samples and captions."""
        if not features:
            return {}
        made, real, text = features["made"], features["real"], features["text"]
        clap = (made * text).sum(1).mean()
        return {"fad": metric.frechet_distance(made, real), "kad": metric.kernel_distance(made, real), "clap": float(clap)}

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices but their modulations, which like inputs and outputs stay with AdamW."""
        stacks = [self.transformer.double_blocks, self.transformer.single_blocks, *([self.trained_text_encoder] if self.tokenizer else [])]
        return [layer.weight for stack in stacks for name, layer in stack.named_modules()
                if isinstance(layer, nn.Linear) and not name.endswith(".lin")]

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system music takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write music.pt, which FluxMusic's own programs load, and music.weights."""
        if self.config.music.size == "own":
            raise UserError(f"{folder}: no other software loads a network of music.size own; its checkpoint is all there is")
        with data.replacing(folder / "music.pt") as part:
            torch.save({"ema": self.transformer.state_dict(), "args": argparse.Namespace(version=self.config.music.size, **facts)}, part)


# Batches

class MusicBatches(Batches):
    """x, noise (B, N, C); t (B,); frames (B,): of a crop; number (B,) of the clip; text_mask (B, S) with text (B, S, D), cached
    features, or ids (B, S) where the text encoder is trained; vector (B, V), unless it is pooled from the features. S: a multiple of 8.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.read = {}
        for name, (path, items) in caches(config, corpus).items():
            rows, numbers = data.open_rows(path, data.PREPARE), {item: n for n, item in enumerate(items)}
            self.read[name] = lambda item, rows=rows, numbers=numbers: rows(numbers[item])
        self.codec = Codec(config, *corpus.statistics, torch.device("cpu"))
        if tokenizer:
            pretrained.tokenize(tokenizer, [""])               # its first call sets its options, which is not for several threads

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept, as for validation."""
        f, together = self.config.flow, rng.random() < self.config.music.joint_dropout
        lost = (rng.random(2) < f.text_condition_dropout) & (t is None)
        mean, deviation = self.crop(clip, rng)
        x = mean + deviation * torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32))
        noise = torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32))
        return {"x": x, "noise": noise, "t": self.draw_time(rng) if t is None else t, "number": clip.number, "frames": self.codec.frames,
                "text": "" if lost[0] else clip.text, "vector_text": "" if lost[0 if together else 1] else clip.text}

    def crop(self, clip: data.Clip, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation (N, C) of a random crop's tokens: of any, or of one of those that are cached."""
        if "latents" in self.read:
            tokens = self.read["latents"](clip).unflatten(0, (self.config.music.crops, -1))
            return tokens[rng.integers(len(tokens))].chunk(2, -1)
        return self.codec.hear(self.corpus.wave(clip), rng)

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "number")}
        batch |= {key: torch.stack([row[key] for row in rows]) for key in ("x", "noise")}
        texts, vector_texts = ([row[key] for row in rows] for key in ("text", "vector_text"))
        return batch | collate_texts(texts, vector_texts, self.config, self.tokenizer, self.read)


def collate_texts(texts: list[str], vector_texts: list[str], config: Config, tokenizer, read: dict[str, Callable]) -> dict:
    """A batch's entries of texts. read: as `readers`."""
    rows = map(read["features"], texts) if "features" in read else map(torch.tensor, pretrained.tokenize(tokenizer, texts))
    text, mask = data.pad([row[:config.music.caption_tokens] for row in rows], 8)
    vectors = {"vector": torch.cat([read["vectors"](text) for text in vector_texts])} if "vectors" in read else {}
    return {"text" if "features" in read else "ids": text, "text_mask": mask} | vectors


# Caches, and what fills them

def prepare(config: Config) -> None:
    """Make whatever training needs and does not find: packed pieces, and what frozen networks make of their captions and crops."""
    recogniser.prepare_music(config)
    corpus, device = Corpus(config), torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    codec = Codec(config, *corpus.statistics, device)

    def latents(clip: data.Clip) -> torch.Tensor:
        wave, rng = corpus.wave(clip), np.random.default_rng((config.seed, clip.number))
        return torch.cat([torch.cat(codec.hear(wave, rng), -1) for _ in range(config.music.crops)])      # (crops * N, 2 C)

    make = {"latents": latents, **readers(config, device)}
    for name, (path, items) in caches(config, corpus).items():
        if not path.exists():
            lengths = [config.music.crops * codec.tokens if name == "latents" else 1] * len(items)
            if name == "features":
                lengths = [len(ids) for ids in pretrained.tokenize(load_t5(config.model.text_encoder)[1], items)]
            data.cache_rows(path, lengths, None, lambda batch: [make[name](items[n]).numpy() for n in batch], 8, name)


def caches(config: Config, corpus: Corpus) -> dict[str, tuple[Path, list]]:
    """What training reads: features and vectors of captions, latents of clips; each a file, named by what is in it, and its items."""
    u, found = config.music, {}
    clips = sorted({clip for split in data.SPLITS for clip in corpus.clips(split)}, key=lambda clip: clip.number)
    texts = sorted({"", *(clip.text for clip in clips)})
    if config.model.text_encoder != "scratch":
        found["features"] = [config.model.text_encoder, texts], texts
    if u.vector_encoder != "pooled":
        found["vectors"] = [u.vector_encoder, texts], texts
    if u.autoencoder != "patches":
        numbers = [clip.number for clip in clips]
        found["latents"] = [u.autoencoder, u.crops, u.crop_seconds, config.seed, asdict(config.mel), numbers], clips
    return {name: (corpus.folder / f"{name}_{data.digest(content)[:8]}.npy", items) for name, (content, items) in found.items()}


load_t5 = functools.cache(pretrained.load_text_encoder)


def readers(config: Config, device: torch.device) -> dict[str, Callable[[str], torch.Tensor]]:
    """How captions are read, for caches as for sampling: features (S, D) of a text by T5, unpadded, vectors (1, V) by CLAP, on the CPU.

    What is trained, or pooled, is not among them; a network is loaded when it is first needed.
    """
    def features(text: str) -> torch.Tensor:
        encoder, tokenizer, _ = load_t5(config.model.text_encoder)
        ids = torch.tensor(pretrained.tokenize(tokenizer, [text]), device=device)
        return encoder.to(device)(ids, torch.ones_like(ids, dtype=torch.bool))[0].cpu()

    def vectors(text: str) -> torch.Tensor:
        return recogniser.load_clap("music.vector_encoder", config.music.vector_encoder, device).read(text)

    found = {"features": features} if config.model.text_encoder != "scratch" else {}
    return found | ({"vectors": vectors} if config.music.vector_encoder != "pooled" else {})


class Codec:
    """Between log-mels (T, M) and tokens (N, C): by AudioLDM2's VAE, or, for patches, as they are, normalised: nothing is lost."""

    def __init__(self, config: Config, mean: float, std: float, device: torch.device):
        u, self.mel, self.mean, self.std, self.device = config.music, config.mel, mean, std, device
        self.vae_name = "" if u.autoencoder == "patches" else u.autoencoder
        self.patch = (2, 2) if self.vae_name else (u.patch_frames, u.patch_mels)
        self.channels, (frames_a_token, mels) = (32, (8, 8)) if self.vae_name else (u.patch_frames * u.patch_mels, self.patch)
        self.frames, self.bands = round(u.crop_seconds * config.mel.sample_rate / config.mel.hop), config.mel.n_mels // mels
        self.tokens = self.frames // frames_a_token * self.bands         # both of a crop

    @property
    def vae(self) -> nn.Module:
        import diffusers                                     # seconds to import
        return pretrained.load_frozen(diffusers.AutoencoderKL, self.vae_name, "vae", "music.autoencoder", self.device)

    def hear(self, wave: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A random crop of a piece (N,) -> the mean of each of its tokens' numbers, and its deviation, (N, C) on the CPU."""
        log_mel = audio.log_mel(audio.draw_crop(wave, self.frames * self.mel.hop, rng), self.mel)
        if not self.vae_name:
            x = to_tokens(audio.normalise(log_mel, self.mean, self.std)[None, None], self.patch)[0]
            return x, torch.zeros_like(x)
        with torch.no_grad():
            found, scale = self.vae.encode(log_mel[None, None].to(self.device)).latent_dist, self.vae.config.scaling_factor
        return to_tokens(found.mean * scale)[0].cpu(), to_tokens(found.std * scale)[0].cpu()

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (N, C) -> log-mel (T, M)."""
        latents = to_latents(tokens[None], self.bands, self.patch)
        if not self.vae_name:
            return audio.denormalise(latents[0, 0], self.mean, self.std)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample[0, 0]


# The network

EPS = 1e-6


def choose_size(config: Config, codec: "Codec", text_width: int) -> Size:
    """The published size, or the config's own. text_width: of a text encoder that is trained along, or 0."""
    u, m, head = config.music, config.model, config.model.width // config.model.heads
    if u.size != "own":
        return SIZES[u.size]
    text_width, turned = text_width or u.text_width, 3 * head // 16 * 2     # numbers of a head that turn with time; as many with frequency
    return Size(m.width, u.double_blocks, m.layers - u.double_blocks, (head - 2 * turned, turned, turned), m.heads, codec.channels,
                codec.bands, text_width, text_width if u.vector_encoder == "pooled" else u.vector_width)


class MMDiT(nn.Module):
    """The Transformer that predicts v, its parameters named as in the published checkpoints, where the music is `img`."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.img_in = nn.Linear(size.channels, size.width)
        self.txt_in = nn.Linear(size.text_width, size.width)
        self.time_in = embedder(256, size.width)
        self.vector_in = embedder(size.vector_width, size.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(size.width, size.heads) for _ in range(size.double))
        self.single_blocks = nn.ModuleList(SingleBlock(size.width, size.heads) for _ in range(size.single))
        self.final_layer = nn.ModuleDict({"linear": zero(nn.Linear(size.width, size.channels)),
                                          "adaLN_modulation": nn.Sequential(nn.SiLU(), zero(nn.Linear(size.width, 2 * size.width)))})

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor, vector: torch.Tensor,
                text_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x_t (B, N, C), t (B,), text (B, S, text_width), vector (B, vector_width) -> v (B, N, C). text_mask (B, S): None = all is text."""
        music, text = self.img_in(x_t), self.txt_in(text)                                # (B, N, D), (B, S, D)
        condition = self.time_in(sinusoids(1000 * t, 256).to(music.dtype)) + self.vector_in(vector)     # (B, D)
        turn = rotation(text.shape[1], music.shape[1], self.size, music.device)
        mask = None if text_mask is None else F.pad(text_mask, (0, music.shape[1]), value=True)[:, None, None]       # (B, 1, 1, S + N)
        for block in self.double_blocks:
            music, text = block(music, text, condition, turn, mask)
        h = torch.cat([text, music], 1)                                                  # (B, S + N, D)
        for block in self.single_blocks:
            h = block(h, condition, turn, mask)
        last = self.final_layer["adaLN_modulation"](condition)[:, None].chunk(2, -1)
        return self.final_layer["linear"](modulate(h[:, text.shape[1]:], *last))         # (B, N, C)


class DoubleBlock(nn.Module):
    """Music and text meet in one attention; all else each has for itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = (nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "norm": QKNorm(width // heads),
                                                       "proj": nn.Linear(width, width)}) for _ in range(2))
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)) for _ in range(2))

    def forward(self, music: torch.Tensor, text: torch.Tensor, condition: torch.Tensor, turn: torch.Tensor,
                mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """music (B, N, D), text (B, S, D), condition (B, D) -> the same shapes."""
        of_music, of_text = self.img_mod(condition), self.txt_mod(condition)
        streams = (own["norm"](*own["qkv"](modulate(x, *shift_scale)).chunk(3, -1)) for own, x, shift_scale in
                   ((self.txt_attn, text, of_text[:2]), (self.img_attn, music, of_music[:2])))
        q, k, v = (torch.cat(pair, 1) for pair in zip(*streams))                         # (B, S + N, H, D / H)
        heard = attend(q, k, v, turn, mask).split([text.shape[1], music.shape[1]], 1)
        return (residual(music, self.img_attn["proj"](heard[1]), self.img_mlp, of_music[2:]),
                residual(text, self.txt_attn["proj"](heard[0]), self.txt_mlp, of_text[2:]))


class SingleBlock(nn.Module):
    """Text and music as one sequence; attention and MLP side by side, between two matrices that they share (ViT-22B)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x (B, S + N, D), condition (B, D) -> (B, S + N, D)."""
        shift, scale, gate = self.modulation(condition)
        q, k, v, hidden = self.linear1(modulate(x, shift, scale)).split([x.shape[-1] * n for n in (1, 1, 1, 4)], -1)
        heard = attend(*self.norm(q, k, v), turn, mask)                                        # (B, S + N, D)
        return torch.addcmul(x, gate, self.linear2(torch.cat([heard, F.gelu(hidden, approximate="tanh")], -1)))


class QKNorm(nn.Module):
    """q and k with unit mean square in each head, times a learned scale; in float32, whatever the rest is in."""

    def __init__(self, head_width: int):
        super().__init__()
        self.query_norm, self.key_norm = (nn.ParameterDict({"scale": torch.ones(head_width)}) for _ in range(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v (B, N, D) -> (B, N, H, D / H)."""
        width = len(self.query_norm["scale"])
        q, k, v = (rearrange(part, "b n (h d) -> b n h d", d=width) for part in (q, k, v))
        q, k = (F.rms_norm(part.float(), (width,), norm["scale"].float(), EPS) for part, norm in ((q, self.query_norm), (k, self.key_norm)))
        return q, k, v


class Modulation(nn.Module):
    """The condition (B, D) -> `count` vectors (B, 1, D): shift, scale, gate of each branch; all 0 at first, the block the identity."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.lin = zero(nn.Linear(width, count * width))

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(condition))[:, None].split(condition.shape[-1], -1)


def embedder(width: int, out_width: int) -> nn.Sequential:
    """Two matrices around a SiLU, (B, width) -> (B, out_width)."""
    return nn.Sequential(OrderedDict(in_layer=nn.Linear(width, out_width), silu=nn.SiLU(), out_layer=nn.Linear(out_width, out_width)))


def residual(x: torch.Tensor, heard: torch.Tensor, mlp: nn.Module, modulation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What a stream does after attention: x (B, N, D), heard (B, N, D), modulation: gate; shift, scale, gate of the MLP."""
    x = torch.addcmul(x, modulation[0], heard)
    return torch.addcmul(x, modulation[3], mlp(modulate(x, *modulation[1:3])))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights, then AdaLN's."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q, k, v (B, N, H, D / H) -> (B, N, D). turn (N, 1, D / H / 2), complex: by which q and k turn; mask: of k."""
    q, k = rotate(q, turn).to(v.dtype), rotate(k, turn).to(v.dtype)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))           # a view: in memory heads stay within a token, and nothing is copied
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2 i, 2 i + 1) of x (B, N, H, d) as complex numbers, in one pass; `model.rotate` pairs the halves of a head."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def rotation(text_tokens: int, tokens: int, size: Size, device: torch.device) -> torch.Tensor:
    """Rotary embeddings e^(i angle) (S + N, 1, D / H / 2) by position along none, time, frequency; the text's is 0, 0, 0."""
    one, times, bands = (torch.arange(n, device=device) for n in (1, tokens // size.bands, size.bands))
    positions = F.pad(torch.cartesian_prod(one, times, bands), (0, 0, text_tokens, 0)).unbind(1)
    frequencies = [10000 ** (-torch.arange(0, width, 2, dtype=widest_float(device), device=device) / width) for width in size.axes]
    angles = torch.cat([torch.outer(position, f) for position, f in zip(positions, frequencies)], 1)
    return torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex64)


def to_tokens(latents: torch.Tensor, patch: tuple[int, int] = (2, 2)) -> torch.Tensor:
    """(B, channels, T, F) -> (B, N, C), each a patch of times and bands."""
    return rearrange(latents, "b c (t i) (f j) -> b (t f) (c i j)", i=patch[0], j=patch[1])


def to_latents(tokens: torch.Tensor, bands: int, patch: tuple[int, int] = (2, 2)) -> torch.Tensor:
    """(B, N, C) -> (B, channels, T, F); bands: tokens of one time."""
    return rearrange(tokens, "b (t f) (c i j) -> b c (t i) (f j)", f=bands, i=patch[0], j=patch[1])


# Published checkpoints

def load_published(path: Path) -> MMDiT:
    """The network of a checkpoint of FluxMusic, its averaged weights, float32 on the CPU; the size is read off the tensors.

    raises UserError for a file that is damaged, has code in it, or other tensors than exactly those of a published size.
    """
    tensors = read_published(path)
    counts = [len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}_blocks.")}) for kind in ("double", "single")]
    width = tensors["img_in.bias"].numel() if "img_in.bias" in tensors else 0
    sizes = [size for size in SIZES.values() if [size.width, size.double, size.single] == [width, *counts]]
    if not sizes:
        raise UserError(f"{path}: by img_in.bias of width {width} with {counts[0]} double_blocks and {counts[1]} single_blocks it is none "
                        f"of {', '.join(SIZES)}")
    with torch.device("meta"):
        network = MMDiT(sizes[0])
    own, found = ({name: tuple(value.shape) for name, value in state.items()} for state in (network.state_dict(), tensors))
    for name in sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
        raise UserError(f"{path}: {name} has shape {found.get(name, '(none: it is missing)')}, FluxMusic's "
                        f"{own.get(name, '(no such tensor)')}")
    network.load_state_dict(tensors, assign=True)
    return network.float()


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights by name, mapped from the file: the optimizer's state beside them is never read. None of its code runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):             # the options of its training, which nobody reads here
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            state = None if code else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                                   # garbage fails in every way there is
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({pretrained.brief(e)}); fetch it again") from e
    if code:
        raise UserError(f"{path}: refused, it asks for {min(code)} to be run; a checkpoint holds tensors and options only")
    ema = state.get("ema") if isinstance(state, dict) else None
    if not isinstance(ema, dict):
        raise UserError(f"{path}: lacks ema, the averaged weights; not a checkpoint of FluxMusic")
    for name, value in ema.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"{path}: ema {name!r} is no tensor of real numbers; not a checkpoint of FluxMusic")
    return ema
