"""Text to speech: text encoder, alignment, mel flow Transformer. System `tts`.

text (B, S, D) has a vector a byte; x (B, T, M) is a normalised log-mel; `frame_stack` frames make one of N tokens.
Where a byte is spoken is learned without an aligner: every byte has a duration, its position is the sum of those before it,
and the flow loss itself moves the durations, because the text that a frame is given is a blur around that position
(differentiable, as in EATS, arXiv 2006.03575, and Non-Attentive Tacotron). Their sum predicts the length of the speech.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import audio
import data
import flow
import metric
import pretrained
from config import Config, Mel, Sample, UserError
from corpora import voice


@dataclass
class Prompt:
    """What to make: a text; the length in seconds, or 0 to predict it; the seed of its noise; or the speech to see, (N,) at 16 kHz."""

    text: str
    seconds: float = 0.0
    seed: int = 0
    speech: torch.Tensor | None = None


@dataclass
class Artifact:
    """What was made of a text: a wave (N,) at `sample_rate` Hz, its log-mel (T, M), and where it attended, (N, S) over bytes.

    letters: what these bytes are, the text or its phonemes.
    """

    letters: str
    wave: torch.Tensor
    sample_rate: int
    log_mel: torch.Tensor
    mel: Mel
    attention: torch.Tensor | None = None  # a recording has none

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`; returns their kinds and names."""
        names = {"picture": f"{stem.name}.png"}
        metric.spectrogram_png(self.log_mel.numpy(), stem.with_name(names["picture"]), self.mel)
        if self.attention is not None:
            names["attention"] = f"{stem.name}.attention.png"
            seconds = len(self.wave) / self.sample_rate
            metric.attention_png(
                self.attention.numpy(), self.letters, stem.with_name(names["attention"]), seconds
            )
        return names


class TextToSpeech(nn.Module):
    """Losses out of `forward`, speech out of `sample`."""

    makes, speaks, listens, features = ("wav",), True, False, None
    longest = 200  # characters spoken in one go: about 13 seconds, what training has seen

    def __init__(self, config: Config, mean: float = 0.0, std: float = 1.0):
        """mean, std: of the training set's log-mels; kept in the checkpoint."""
        super().__init__()
        self.config, self.frame_rate = config, config.mel.sample_rate / config.mel.hop
        m = config.model
        self.text_encoder, self.tokenizer, text_width = pretrained.load_text_encoder(m.text_encoder)
        if m.text == "phonemes":
            self.tokenizer = pretrained.PhonemeTokenizer(self.tokenizer)
        self.text = TextNet(
            text_width, m.width, m.text_layers, seconds_a_byte=0.065, frame_rate=self.frame_rate
        )
        self.decoder = MelFlow(config.mel.n_mels, m.frame_stack, m.width, m.layers, m.heads, m.upsample_text)
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `Batches`, in which everything random is already drawn.

        returns: loss, flow_loss, duration_loss, scalars; flow_loss_per_clip (B,).
        """
        x, noise, t, x_mask, f = batch["x"], batch["noise"], batch["t"], batch["x_mask"], self.config.flow
        features = (
            batch["features"] if "features" in batch else self.text_encoder(batch["ids"], batch["text_mask"])
        )
        text, durations = self.text(features, batch["text_mask"])
        centres = self.align(durations, batch["text_mask"], batch["frames"])
        x_t = flow.interpolate(x, noise, t)
        output = self.decoder(x_t, t, text, centres, x_mask, batch["text_mask"])
        v = flow.velocity(output.float(), x_t, t, f.predict, f.min_t)
        flow_loss = flow.loss(v, x, noise, x_mask)
        length_error = (durations.sum(1).log() - batch["frames"].log()).square() * ~batch["text_dropped"]
        duration_loss = length_error.mean()
        return {
            "loss": flow_loss.mean() + f.duration_weight * duration_loss,
            "flow_loss": flow_loss.mean(),
            "duration_loss": duration_loss,
            "flow_loss_per_clip": flow_loss.detach(),
        }

    def align(self, durations: torch.Tensor, text_mask: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Where each byte is spoken: centres (B, S) in tokens, from durations (B, S) stretched to the clip's length."""
        if self.config.model.alignment == "none":
            return torch.arange(durations.shape[1], device=durations.device).expand_as(durations).float()
        if self.config.model.alignment == "uniform":
            durations = text_mask.float()
        durations = durations * (frames / self.config.model.frame_stack / durations.sum(1))[:, None]
        return durations.cumsum(1) - durations / 2

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Speak the prompts as one batch; a prompt's noise depends on its own seed alone."""
        log_mels, attention = self.sample_log_mels(prompts, settings)
        return [self.artifact(prompt.text, x, a) for prompt, x, a in zip(prompts, log_mels, attention)]

    def sample_log_mels(
        self, prompts: Sequence[Prompt], settings: Sample
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """returns: log-mels (T, M), natural log, and cross-attention (N, S), one of each a prompt, on the CPU."""
        c, count = self.config, len(prompts)
        condition, frames, bytes_ = self.condition(prompts)
        x_mask, noise = condition[2], torch.zeros(count, condition[2].shape[1], c.mel.n_mels)
        for row, (prompt, n) in enumerate(zip(prompts, frames)):
            noise[row, :n] = torch.randn(
                n, c.mel.n_mels, generator=torch.Generator().manual_seed(prompt.seed)
            )
        noise = noise.to(x_mask.device)

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            rows = len(x_t)  # the conditional rows come first, so B of 2 B rows leave guidance out
            output = self.decoder(x_t, t, *(part[:rows] for part in condition))
            return (
                flow.velocity(output.float(), x_t, t, c.flow.predict, c.flow.min_t) * x_mask[:rows, :, None]
            )

        grid = flow.times(settings.euler_steps, settings.sway, settings.shift)
        x = flow.euler(network, noise, grid, settings.cfg_scale, settings.cfg_from, settings.cfg_to)
        t = torch.full((count,), 0.5, device=x.device)  # where to look at the attention: halfway
        weights = (
            self.decoder.attention(flow.interpolate(x, noise, t), t, *(part[:count] for part in condition))
            .float()
            .cpu()
        )
        log_mels = audio.denormalise(x, self.mean, self.std).float().cpu()
        tokens = [math.ceil(n / c.model.frame_stack) for n in frames]
        return [m[:n] for m, n in zip(log_mels, frames)], [
            w[:n, :s] for w, n, s in zip(weights, tokens, bytes_)
        ]

    def condition(self, prompts: Sequence[Prompt]) -> tuple[tuple[torch.Tensor, ...], list[int], list[int]]:
        """What the decoder is given beside x_t and t for 2 B rows, the prompts and then the empty text for guidance.

        returns: (text, centres, x_mask, text_mask), the B lengths in frames, the B lengths in bytes.
        """
        c, device = self.config, self.mean.device
        ids = pretrained.tokenize(self.tokenizer, [prompt.text for prompt in prompts] + [""] * len(prompts))
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(device)
        text_mask = torch.arange(padded.shape[1], device=device) < torch.tensor(
            [[len(row)] for row in ids], device=device
        )
        text, durations = self.text(self.text_encoder(padded, text_mask), text_mask)
        rate, predicted = self.frame_rate, durations.sum(1).tolist()
        longest = int(c.data.max_seconds * rate)
        frames = [
            min(max(round(p.seconds * rate or n), c.model.frame_stack), longest)
            for p, n in zip(prompts, predicted)
        ]
        both = torch.tensor(frames * 2, device=device)
        padded_frames = math.ceil(max(frames) / c.model.frame_stack) * c.model.frame_stack
        x_mask = torch.arange(padded_frames, device=device) < both[:, None]
        return (
            (text, self.align(durations, text_mask, both), x_mask, text_mask),
            frames,
            [len(row) for row in ids[: len(prompts)]],
        )

    def artifact(self, text: str, log_mel: torch.Tensor, attention: torch.Tensor | None = None) -> Artifact:
        letters = voice.phonemes(text) if self.config.model.text == "phonemes" else text
        return Artifact(
            letters, self.vocode(log_mel), self.config.mel.sample_rate, log_mel, self.config.mel, attention
        )

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The recorded clip's log-mel, and what the vocoder makes of it."""
        return self.artifact(clip.text, corpus.log_mel(clip))

    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        return {"mcd": metric.mel_cepstral_distortion(made.log_mel.numpy(), corpus.log_mel(clip).numpy())}

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system tts takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        raise UserError(f"{folder}: no other software loads system tts; its checkpoint is all there is")

    def vocode(self, log_mel: torch.Tensor) -> torch.Tensor:
        """log-mel (T, M), natural log -> wave (T * hop,), by the vocoder of the config."""
        return self.vocoder(log_mel)

    @functools.cached_property
    def vocoder(self):
        """Resident after its first use; held beside the module, not in it, so checkpoints know nothing of it."""
        return pretrained.load_vocoder(self.config.sample.vocoder, self.config.mel, self.mean.device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon orthogonalises: linear layers from hidden to hidden; inputs, outputs, time and tables stay with AdamW."""
        stacks = [
            self.decoder.blocks,
            self.text.blocks,
            *([self.text_encoder] if self.config.model.text_encoder == "scratch" else []),
        ]
        return [layer.weight for stack in stacks for layer in stack.modules() if isinstance(layer, nn.Linear)]


class TextNet(nn.Module):
    """Encoder features to what the decoder reads: a projection, convolutions that see neighbouring bytes, a duration a byte."""

    def __init__(self, text_width: int, width: int, layers: int, seconds_a_byte: float, frame_rate: float):
        """seconds_a_byte, frame_rate (Hz): the durations before anything is learned; LJSpeech has 0.065 s, 5.6 frames a byte."""
        super().__init__()
        self.proj = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(layers))
        self.log_duration = zero(nn.Linear(width, 1))
        nn.init.constant_(self.log_duration.bias, math.log(seconds_a_byte * frame_rate))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features (B, S, E), mask (B, S) -> text (B, S, D), durations (B, S) in frames, 0 where there is no text."""
        x = self.proj(features)  # (B, S, D)
        for block in self.blocks:
            x = block(x, mask)
        x = norm(x)
        log_duration = self.log_duration(x).squeeze(-1).float().clamp(-4, 6)  # (B, S)
        return x, log_duration.exp() * mask


class ConvBlock(nn.Module):
    """Depthwise convolution over bytes, then an MLP at each (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int, kernel: int = 7):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.conv((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)  # (B, S, D)
        return x + self.mlp(norm(h))


class MelFlow(nn.Module):
    """The Transformer that predicts x or v from x_t: self-attention over time, cross-attention to the text, AdaLN by time."""

    def __init__(
        self, n_mels: int, frame_stack: int, width: int, layers: int, heads: int, upsample_text: bool
    ):
        super().__init__()
        self.frame_stack, self.head_width = frame_stack, width // heads
        self.in_proj = nn.Linear(frame_stack * n_mels, width)
        self.text_proj = nn.Linear(width, width) if upsample_text else None
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = zero(
            nn.Linear(width, 6 * width)
        )  # one for all blocks, each adds a table of its own (PixArt)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.out_proj = zero(nn.Linear(width, frame_stack * n_mels))

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        centres: torch.Tensor,
        x_mask: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """x_t (B, T, M), t (B,), text (B, S, D), centres (B, S) in tokens, x_mask (B, T), text_mask (B, S) -> (B, T, M)."""
        h, context = self.embed(x_t, t, text, centres, x_mask, text_mask)
        for block in self.blocks:
            h = block(h, text, context)
        return rearrange(self.out_proj(norm(h)), "b n (k m) -> b (n k) m", k=self.frame_stack)

    def attention(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        centres: torch.Tensor,
        x_mask: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-attention weights (B, N, S), the mean over heads and layers; arguments as `forward`."""
        h, context = self.embed(x_t, t, text, centres, x_mask, text_mask)
        weights = 0
        for block in self.blocks:
            weights = weights + block.cross_weights(h, text, context) / len(self.blocks)
            h = block(h, text, context)
        return weights

    def embed(self, x_t, t, text, centres, x_mask, text_mask) -> tuple[torch.Tensor, "Context"]:
        """Tokens (B, N, D) at the first block's door, and what all blocks share."""
        tokens = rearrange(x_t, "b (n k) m -> b n (k m)", k=self.frame_stack)
        token_mask = x_mask[:, :: self.frame_stack]  # (B, N)
        positions = torch.arange(tokens.shape[1], device=x_t.device).float() + 0.5  # (N,) in tokens
        h = self.in_proj(tokens)  # (B, N, D)
        if self.text_proj is not None:
            h = h + self.text_proj(upsample(text, centres, positions, token_mask, text_mask))
        half = self.head_width // 2
        context = Context(
            self.modulation(self.time_mlp(sinusoids(1000 * t, 256).to(h.dtype))).unsqueeze(1).chunk(6, -1),
            rotation(positions[None], half),
            rotation(centres.detach(), half),
            token_mask[:, None, None],
            text_mask[:, None, None],
        )
        return h, context


@dataclass
class Context:
    """What every block is given: six AdaLN vectors (B, 1, D), rotations of tokens and bytes, masks (B, 1, 1, N or S)."""

    modulation: tuple[torch.Tensor, ...]
    token_rotation: tuple[torch.Tensor, torch.Tensor]
    text_rotation: tuple[torch.Tensor, torch.Tensor]
    token_mask: torch.Tensor
    text_mask: torch.Tensor


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attention, self.cross_attention, self.mlp = (
            Attention(width, heads),
            Attention(width, heads),
            MLP(width),
        )
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: torch.Tensor, text: torch.Tensor, context: Context) -> torch.Tensor:
        """x (B, N, D), text (B, S, D) -> (B, N, D)."""
        x = self.look_around(x, context)
        x = x + self.cross_attention(
            norm(x), text, context.token_rotation, context.text_rotation, context.text_mask
        )
        shift, scale, gate = (m + row for m, row in zip(context.modulation[3:], self.table[3:]))
        return x + (1 + gate) * self.mlp(norm(x) * (1 + scale) + shift)

    def look_around(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Self-attention over the tokens."""
        shift, scale, gate = (m + row for m, row in zip(context.modulation[:3], self.table[:3]))
        h = norm(x) * (1 + scale) + shift
        return x + (1 + gate) * self.self_attention(
            h, h, context.token_rotation, context.token_rotation, context.token_mask
        )

    def cross_weights(self, x: torch.Tensor, text: torch.Tensor, context: Context) -> torch.Tensor:
        """The weights (B, N, S) of the cross-attention, for looking at; the mean over heads."""
        x = norm(self.look_around(x, context))
        q, k, _ = self.cross_attention.project(x, text, context.token_rotation, context.text_rotation)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~context.text_mask, -math.inf)
        return scores.softmax(-1).mean(1)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys, rotated by their positions (QK-norm, RoPE)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = zero(nn.Linear(width, width, bias=False))

    def forward(self, x, source, x_rotation, source_rotation, mask) -> torch.Tensor:
        """x (B, N, D) attends to source (B, S, D) where mask (B, 1, 1, S)."""
        q, k, v = self.project(x, source, x_rotation, source_rotation)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))

    def project(
        self, x, source, x_rotation, source_rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (
            rearrange(f(s), "b n (h d) -> b h n d", h=self.heads)
            for f, s in ((self.q, x), (self.k, source), (self.v, source))
        )
        return rotate(norm(q), x_rotation), rotate(norm(k), source_rotation), v


class MLP(nn.Module):
    """Two matrices around a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = zero(nn.Linear(4 * width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).square())


def upsample(
    text: torch.Tensor,
    centres: torch.Tensor,
    positions: torch.Tensor,
    token_mask: torch.Tensor,
    text_mask: torch.Tensor,
) -> torch.Tensor:
    """text (B, S, D) at its centres (B, S) -> (B, N, D) at positions (N,), blurred over half the mean duration of a byte."""
    blur = 0.5 * token_mask.sum(1) / text_mask.sum(1)  # (B,) in tokens
    distance = (positions[None, :, None] - centres[:, None]) / blur[:, None, None]  # (B, N, S)
    weights = (-0.5 * distance.square()).masked_fill(~text_mask[:, None], -math.inf).softmax(-1)
    return weights.to(text.dtype) @ text


def sinusoids(t: torch.Tensor, width: int) -> torch.Tensor:
    """t (B,) -> (B, width): cosines and sines of geometrically spaced frequencies from 1 to 1/10000."""
    angles = t.float()[:, None] * torch.exp(
        -math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2)
    )
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotation(positions: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, N), whole or not -> cosines and sines (B, 1, N, half) of rotary embeddings (Su et al. 2021)."""
    angles = positions.float()[:, None, :, None] * torch.exp(
        -math.log(10000) * torch.arange(half, device=positions.device) / half
    )
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate pairs (i, i + half) of x (B, H, N, 2 half)."""
    cos, sin = (c.to(x.dtype) for c in cos_sin)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without weights: what follows has its own."""
    return F.rms_norm(x, x.shape[-1:])


def zero(linear: nn.Linear) -> nn.Linear:
    """A layer that starts by saying nothing, so that a residual block starts as the identity."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Corpus(data.Packed):
    """Speech as log-mels, which `statistics` normalise."""

    def __init__(self, config: Config):
        super().__init__(
            config, asdict(config.mel), config.data.max_seconds * config.mel.sample_rate / config.mel.hop
        )
        self.statistics = self.mean, self.std

    def log_mel(self, clip: data.Clip) -> torch.Tensor:
        """(T, M), natural log, float32."""
        return self.rows(clip)

    def recording(self, clip: data.Clip) -> tuple[torch.Tensor, int] | None:
        """The sound as recorded, (N,), and its rate in Hz; None where it was not kept."""
        return (
            (audio.load_wav(clip.wav, self.rate), self.rate) if clip.wav and Path(clip.wav).exists() else None
        )


class Batches:
    """The clips of a corpus as batches, dicts of CPU tensors; a subclass says by `row` and `collate` what is in them."""

    def __init__(self, config: Config, corpus: data.Packed, tokenizer, rank: int = 0, world: int = 1):
        """raises UserError for a split without clips."""
        self.config, self.corpus, self.tokenizer, self.rank, self.world = (
            config,
            corpus,
            tokenizer,
            rank,
            world,
        )
        for split in ("train", config.eval.split):
            if not corpus.clips(split):
                raise UserError(
                    f"{corpus.folder}: has no {split} clip of at most data.max_seconds {config.data.max_seconds}"
                )
        self.lengths = np.array([clip.frames for clip in corpus.clips("train")])

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        """This rank's part of micro-batch `micro`; those of all ranks and micro-batches are the step's global batch."""
        c, size, clips = self.config, self.config.train.batch_size, self.corpus.clips("train")
        order = data.schedule(self.lengths, step, size * self.world * c.train.grad_accum, c.seed)
        rows = np.arange(size) + (micro * self.world + self.rank) * size
        return self.collate(
            [self.row(clips[order[n]], np.random.default_rng((c.seed, data.TRAIN, step, n))) for n in rows]
        )

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """This rank's share of the split that is validated on: whole clips, the same noise and times, evenly spread, every time."""
        c, clips = self.config, self.corpus.clips(self.config.eval.split)
        order = sorted(range(len(clips)), key=lambda n: clips[n].frames)[self.rank :: self.world]
        times = {n: flow.shift_time(data.golden(n), c.flow.timestep_shift) for n in order}
        rows = [
            self.row(clips[n], np.random.default_rng((c.seed, data.VALIDATION, n)), times[n]) for n in order
        ]
        return [
            self.collate(rows[start : start + c.train.batch_size])
            for start in range(0, len(rows), c.train.batch_size)
        ]

    def draw_time(self, rng: np.random.Generator) -> float:
        f = self.config.flow
        return flow.sample_time(
            rng, f.timestep_logit_mean, f.timestep_logit_std, f.timestep_uniform, f.timestep_shift
        )


class SpeechBatches(Batches):
    """x, noise (B, T, M), 0 where x_mask (B, T) is False; t (B,); ids (B, S) int64, text_mask (B, S); text_dropped (B,): rows that
    carry the tokens of "" instead of their text; frames (B,): the clip's length without the silence appended to it; number (B,):
    of the clip. With a frozen text encoder also its features (B, S, D). T is a multiple of data.pad_multiple, S of 8.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.features = open_features(config, corpus) if config.model.text_encoder != "scratch" else None
        pretrained.tokenize(
            tokenizer, [""]
        )  # its first call sets a tokenizer's options, which is not for several threads

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept and no silence appended, as for validation."""
        d, f, mel, x = self.config.data, self.config.flow, self.config.mel, self.corpus.log_mel(clip)
        dropped = t is None and rng.random() < f.text_condition_dropout
        if t is None:
            silence = int(
                (rng.random() < d.silence_prob) * rng.random() * d.max_silence_sec * mel.sample_rate / mel.hop
            )
            x = torch.cat([x, torch.full((silence, mel.n_mels), math.log(audio.LOG_FLOOR))])
            t = self.draw_time(rng)
        noise = torch.from_numpy(
            rng.standard_normal(tuple(x.shape), dtype=np.float32)
        )  # the last draw: padding changes nothing
        return {
            "x": audio.normalise(x, self.corpus.mean, self.corpus.std),
            "noise": noise,
            "t": t,
            "frames": clip.frames,
            "number": clip.number,
            "text_dropped": dropped,
            "text": "" if dropped else clip.text,
        }

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {
            key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "number", "text_dropped")
        }
        batch["x"], batch["x_mask"] = data.pad([row["x"] for row in rows], self.config.data.pad_multiple)
        batch["noise"], _ = data.pad([row["noise"] for row in rows], self.config.data.pad_multiple)
        tokens = pretrained.tokenize(self.tokenizer, [row["text"] for row in rows])
        batch["ids"], batch["text_mask"] = data.pad([torch.tensor(ids) for ids in tokens], 8)
        if self.features:
            batch["features"], _ = data.pad([self.features(row["text"]) for row in rows], 8)
        return batch


def open_features(config: Config, corpus: Corpus) -> Callable[[str], torch.Tensor]:
    """What the frozen text encoder made of "" and of every text of a corpus: a function from text to (S, D) float32."""
    path, texts = features_file(config, corpus)
    rows, numbers = data.open_rows(path, data.PREPARE), {text: n for n, text in enumerate(texts)}
    return lambda text: rows(numbers[text])


def features_file(config: Config, corpus: Corpus) -> tuple[Path, list[str]]:
    """The cache, named by what is in it, and the texts in it."""
    texts = sorted({"", *(clip.text for split in data.SPLITS for clip in corpus.clips(split))})
    return corpus.folder / f"features_{data.digest([config.model.text_encoder, texts])[:8]}.npy", texts


def prepare(config: Config) -> None:
    """Make whatever a config's training needs and does not find: the packed corpus, and the features of its texts."""
    data.prepare_speech(config, asdict(config.mel), lambda _, clips, __: clips)
    corpus = Corpus(config)
    path, texts = features_file(config, corpus)
    if config.model.text_encoder == "scratch" or path.exists():
        return
    encoder, tokenizer, width = pretrained.load_text_encoder(config.model.text_encoder)
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    encoder, tokens = encoder.to(device), [torch.tensor(ids) for ids in pretrained.tokenize(tokenizer, texts)]

    def encode(items: list[int]) -> list[np.ndarray]:
        ids, mask = data.pad([tokens[n] for n in items], 8)
        return [
            found[: len(tokens[n])]
            for n, found in zip(items, encoder(ids.to(device), mask.to(device)).float().cpu().numpy())
        ]

    data.cache_rows(
        path, list(map(len, tokens)), width, encode, 32, f"features of {config.model.text_encoder}"
    )
