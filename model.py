"""Text to speech: text encoder, alignment, mel flow Transformer. System `tts`.

text (B, S, D) has one vector a byte; x (B, T, M) is a normalised log-mel; N tokens, `patch_size` frames each.
When each byte is spoken is learned without an aligner: every byte has a predicted duration, and its place in
time is the sum of those before it. The flow loss trains the durations, because each token is given the text
blurred around its own time by a Gaussian, which is differentiable (as in EATS, arXiv 2006.03575, and
Non-Attentive Tacotron). The sum of the durations predicts the length of the speech.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import audio
import data
import flow
import metric
import pretrained
from config import Config, Mel, Sample, UserError
from corpora import voice


@dataclass
class Prompt:
    """What to generate."""

    text: str
    seconds: float = 0.0  # length of the speech; 0 = predicted
    seed: int = 0  # of the initial noise
    speech: Tensor | None = None  # (N,) at 16 kHz, for a system that is prompted with speech


@dataclass
class Artifact:
    """Generated speech, on the CPU; or a recording after the vocoder."""

    letters: str  # whose bytes were attended to: the text or its phonemes
    wave: Tensor  # (N,)
    sample_rate: int  # Hz
    log_mel: Tensor  # (T, M)
    mel: Mel
    attention: Tensor | None = None  # cross-attention of tokens to bytes (N, S); a recording has none

    def draw(self, stem: Path) -> dict[str, str]:
        """Write its pictures beside `stem`; returns {kind: file name}."""
        names = {"picture": f"{stem.name}.png"}
        picture = stem.with_name(names["picture"])
        metric.spectrogram_png(self.log_mel.numpy(), picture, self.mel)
        if self.attention is not None:
            names["attention"] = f"{stem.name}.attention.png"
            picture = stem.with_name(names["attention"])
            seconds = len(self.wave) / self.sample_rate
            metric.attention_png(self.attention.numpy(), self.letters, picture, seconds)
        return names


class TextToSpeech(nn.Module):
    """`forward` returns the losses of a batch, `sample` speech."""

    makes = ("wav",)
    speaks = True
    listens = False
    features = None
    longest = 200  # characters spoken in one go: about 13 seconds, the longest that training has seen
    SECONDS_PER_BYTE = 0.065  # of LJSpeech, 5.6 frames: the predicted durations before training

    def __init__(self, config: Config, mean: float = 0.0, std: float = 1.0):
        """mean, std: of the training set's log-mels; saved in checkpoints."""
        super().__init__()
        self.config = config
        self.frame_rate = config.mel.sample_rate / config.mel.hop  # Hz
        m = config.model
        text_encoder, tokenizer, text_width = pretrained.load_text_encoder(m.text_encoder)
        if m.text == "phonemes":
            tokenizer = pretrained.PhonemeTokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        mean_duration = self.SECONDS_PER_BYTE * self.frame_rate  # frames
        self.text = TextNet(text_width, m.width, m.text_layers, mean_duration)
        self.decoder = MelFlow(
            n_mels=config.mel.n_mels,
            patch_size=m.frame_stack,
            width=m.width,
            layers=m.layers,
            heads=m.heads,
            upsample_text=m.upsample_text,
        )
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `SpeechBatches`, in which everything random is already drawn.

        returns: loss, flow_loss, duration_loss, scalars; flow_loss_per_clip (B,).
        """
        x = batch["x"]  # (B, T, M)
        noise = batch["noise"]  # (B, T, M)
        t = batch["t"]  # (B,)
        frames = batch["frames"]  # (B,)
        x_mask = batch["x_mask"]  # (B, T)
        text_mask = batch["text_mask"]  # (B, S)
        flow_config = self.config.flow

        # text to one vector and one duration a byte; a frozen encoder's features come cached, in the batch
        features = batch.get("features")  # (B, S, E)
        if features is None:
            features = self.text_encoder(batch["ids"], text_mask)
        text, durations = self.text(features, text_mask)  # (B, S, D), (B, S)

        # durations, stretched to the length of the clip, to the time at which each byte is spoken
        token_centres = self.align(durations, text_mask, frames)  # (B, S)

        # the point at t on the straight path from data to noise, and the velocity predicted there
        x_t = flow.interpolate(x, noise, t)  # (B, T, M)
        output = self.decoder(x_t, t, text, token_centres, x_mask, text_mask)
        v = flow.velocity(output.float(), x_t, t, flow_config.predict, flow_config.min_t)
        flow_loss = flow.loss(v, x, noise, x_mask)  # (B,)

        # the sum of the durations is to predict the length of the clip, if its text was not dropped
        predicted_frames = durations.sum(1)  # (B,)
        length_error = (predicted_frames.log() - frames.log()).square()
        duration_loss = (length_error * ~batch["text_dropped"]).mean()

        return {
            "loss": flow_loss.mean() + flow_config.duration_weight * duration_loss,
            "flow_loss": flow_loss.mean(),
            "duration_loss": duration_loss,
            "flow_loss_per_clip": flow_loss.detach(),
        }

    def align(
        self,
        durations: Tensor,  # (B, S) in frames
        text_mask: Tensor,  # (B, S)
        frames: Tensor,  # (B,)
    ) -> Tensor:
        """returns: when each byte is spoken, (B, S) in tokens: its duration stretched to fill the clip."""
        alignment = self.config.model.alignment
        if alignment == "none":
            numbers = torch.arange(durations.shape[1], device=durations.device)
            return numbers.expand_as(durations).float()
        if alignment == "uniform":
            durations = text_mask.float()
        tokens = frames / self.config.model.frame_stack  # (B,)
        stretch = tokens / durations.sum(1)  # (B,)
        durations = durations * stretch[:, None]
        return durations.cumsum(1) - durations / 2

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Speak the prompts as one batch; a prompt's noise depends on its own seed alone."""
        log_mels, attention = self.sample_log_mels(prompts, settings)
        outputs = []
        for prompt, log_mel, weights in zip(prompts, log_mels, attention):
            outputs.append(self.artifact(prompt.text, log_mel, weights))
        return outputs

    def sample_log_mels(
        self, prompts: Sequence[Prompt], settings: Sample
    ) -> tuple[list[Tensor], list[Tensor]]:
        """returns: log-mels (T, M), natural log, and cross-attention (N, S), one a prompt, on the CPU."""
        device = self.mean.device

        # text: 2 B rows, the prompts, and for guidance as many empty texts
        texts = [prompt.text for prompt in prompts]
        texts += [""] * len(prompts)
        text, durations, text_mask = self.encode_texts(texts)

        # length: as asked for, or the sum of the durations; when each byte is spoken
        frames = self.choose_frames(prompts, durations)
        row_frames = torch.tensor(frames + frames, device=device)  # (2 B,)
        token_centres = self.align(durations, text_mask, row_frames)

        # noise to log-mels
        noise, x_mask = self.draw_noise(prompts, frames)  # (B, T, M), (B, T)
        condition = {
            "text": text,
            "token_centres": token_centres,
            "x_mask": torch.cat([x_mask, x_mask]),
            "text_mask": text_mask,
        }
        x = self.integrate(noise, condition, settings)  # (B, T, M)
        log_mels = audio.denormalise(x, self.mean, self.std).float().cpu()
        attention = self.attention_halfway(x, noise, condition).float().cpu()  # (B, N, S)

        # without the padding
        tokens = [math.ceil(n / self.config.model.frame_stack) for n in frames]
        bytes_ = text_mask.sum(1).tolist()
        log_mels = [row[:n] for row, n in zip(log_mels, frames)]
        attention = [row[:n, :s] for row, n, s in zip(attention, tokens, bytes_)]
        return log_mels, attention

    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """returns: text (B, S, D), durations (B, S) in frames, text_mask (B, S)."""
        device = self.mean.device
        ids = pretrained.tokenize(self.tokenizer, texts)
        rows = [torch.tensor(row) for row in ids]
        padded, text_mask = data.pad(rows, 1)
        text_mask = text_mask.to(device)
        features = self.text_encoder(padded.to(device), text_mask)
        text, durations = self.text(features, text_mask)
        return text, durations, text_mask

    def choose_frames(self, prompts: Sequence[Prompt], durations: Tensor) -> list[int]:
        """The length of each prompt's speech, in frames: as asked for, or else predicted."""
        shortest = self.config.model.frame_stack
        longest = int(self.config.data.max_seconds * self.frame_rate)
        predicted = durations.sum(1).tolist()
        frames = []
        for row, prompt in enumerate(prompts):
            wanted = prompt.seconds * self.frame_rate
            wanted = round(wanted or predicted[row])
            wanted = max(wanted, shortest)
            frames.append(min(wanted, longest))
        return frames

    def draw_noise(self, prompts: Sequence[Prompt], frames: list[int]) -> tuple[Tensor, Tensor]:
        """returns: noise (B, T, M), each row by its prompt's seed, 0 in the padding, and x_mask (B, T)."""
        n_mels = self.config.mel.n_mels
        rows = []
        for prompt, n in zip(prompts, frames):
            generator = torch.Generator()
            generator.manual_seed(prompt.seed)
            rows.append(torch.randn(n, n_mels, generator=generator))
        noise, x_mask = data.pad(rows, self.config.model.frame_stack)
        return noise.to(self.mean.device), x_mask.to(self.mean.device)

    def integrate(
        self,
        noise: Tensor,  # (B, T, M)
        condition: dict[str, Tensor],  # arguments of `MelFlow.forward`, 2 B rows, the conditional ones first
        settings: Sample,
    ) -> Tensor:
        """x (B, T, M), by Euler's method with guidance."""
        c = self.config.flow

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            # all 2 B rows, or, where guidance is off, the B conditional ones
            given = first_rows(condition, len(x_t))
            output = self.decoder(x_t, t, **given)
            v = flow.velocity(output.float(), x_t, t, c.predict, c.min_t)
            return v * given["x_mask"][:, :, None]

        timesteps = flow.times(settings.euler_steps, settings.sway, settings.shift)
        return flow.euler(velocity, noise, timesteps, settings.cfg_scale, settings.cfg_from, settings.cfg_to)

    def attention_halfway(
        self,
        x: Tensor,  # (B, T, M)
        noise: Tensor,  # (B, T, M)
        condition: dict[str, Tensor],  # as in `integrate`
    ) -> Tensor:
        """Cross-attention (B, N, S) of the conditional rows, looked at halfway, at t = 0.5."""
        t = torch.full((len(x),), 0.5, device=x.device)
        x_t = flow.interpolate(x, noise, t)
        given = first_rows(condition, len(x))
        return self.decoder.attention(x_t, t, **given)

    def artifact(self, text: str, log_mel: Tensor, attention: Tensor | None = None) -> Artifact:
        letters = text
        if self.config.model.text == "phonemes":
            letters = voice.phonemes(text)
        mel = self.config.mel
        wave = self.vocoder(log_mel)
        return Artifact(letters, wave, mel.sample_rate, log_mel, mel, attention)

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The recorded clip's log-mel, and what the vocoder makes of it."""
        return self.artifact(clip.text, corpus.log_mel(clip))

    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        """made: generated from the clip's text."""
        generated = made.log_mel.numpy()
        recorded = corpus.log_mel(clip).numpy()
        return {"mcd": metric.mel_cepstral_distortion(generated, recorded)}

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system tts takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        raise UserError(f"{folder}: no other software loads system tts; its checkpoint is all there is")

    @functools.cached_property
    def vocoder(self) -> Callable[[Tensor], Tensor]:
        """log-mel (T, M), natural log -> wave (T * hop,). Cached, not a registered submodule: not saved."""
        name = self.config.sample.vocoder
        device = self.mean.device
        return pretrained.load_vocoder(name, self.config.mel, device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: linear layers from hidden to hidden, not inputs, outputs, time and tables."""
        stacks = [self.decoder.blocks, self.text.blocks]
        if self.config.model.text_encoder == "scratch":
            stacks.append(self.text_encoder)
        matrices = []
        for stack in stacks:
            matrices += [layer.weight for layer in stack.modules() if isinstance(layer, nn.Linear)]
        return matrices


def first_rows(condition: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] for name, value in condition.items()}


class MelFlow(nn.Module):
    """The Transformer that predicts x or v from x_t.

    Self-attention over time, cross-attention to the text, AdaLN by time (DiT, arXiv 2212.09748).
    """

    def __init__(
        self,
        n_mels: int,
        patch_size: int,  # frames a token
        width: int,
        layers: int,
        heads: int,
        upsample_text: bool,  # add to each token the text at its time, beside cross-attention
    ):
        super().__init__()
        self.patch_size = patch_size
        self.head_width = width // heads
        self.in_proj = nn.Linear(patch_size * n_mels, width)
        self.text_proj = nn.Linear(width, width) if upsample_text else None
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        # one for all blocks, to which each adds a table of its own (PixArt, arXiv 2310.00426)
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.out_proj = zero(nn.Linear(width, patch_size * n_mels))

    def forward(
        self,
        x_t: Tensor,  # (B, T, M)
        t: Tensor,  # (B,)
        text: Tensor,  # (B, S, D)
        token_centres: Tensor,  # (B, S), when each byte is spoken, in tokens
        x_mask: Tensor,  # (B, T)
        text_mask: Tensor,  # (B, S)
    ) -> Tensor:
        """returns: x or v (B, T, M), as `flow.velocity` is told."""
        h, context = self.embed(x_t, t, text, token_centres, x_mask, text_mask)
        for block in self.blocks:
            h = block(h, text, context)
        patches = self.out_proj(norm(h))  # (B, N, patch_size M)
        return rearrange(patches, "b n (k m) -> b (n k) m", k=self.patch_size)

    def attention(self, x_t, t, text, token_centres, x_mask, text_mask) -> Tensor:
        """Cross-attention weights (B, N, S), the mean over heads and layers; arguments as `forward`."""
        h, context = self.embed(x_t, t, text, token_centres, x_mask, text_mask)
        mean = 0
        for block in self.blocks:
            weights = block.cross_weights(h, text, context)
            mean = mean + weights / len(self.blocks)
            h = block(h, text, context)
        return mean

    def embed(self, x_t, t, text, token_centres, x_mask, text_mask) -> tuple[Tensor, "Context"]:
        """Input of the first block (B, N, D), and what all blocks share; arguments as `forward`."""
        # frames to tokens
        patches = rearrange(x_t, "b (n k) m -> b n (k m)", k=self.patch_size)
        token_mask = x_mask[:, :: self.patch_size]  # (B, N)
        h = self.in_proj(patches)  # (B, N, D)

        # the text at each token's time
        numbers = torch.arange(patches.shape[1], device=x_t.device)
        positions = numbers.float() + 0.5  # (N,) in tokens
        if self.text_proj is not None:
            spoken = upsample(text, token_centres, positions, token_mask, text_mask)  # (B, N, D)
            h = h + self.text_proj(spoken)

        # time to the six vectors of AdaLN
        time = sinusoids(1000 * t, 256)
        time = self.time_mlp(time.to(h.dtype))  # (B, D)
        modulation = self.modulation(time)
        modulation = modulation.unsqueeze(1)  # (B, 1, 6 D)

        # tokens and bytes on one axis of time
        half = self.head_width // 2
        context = Context(
            modulation=modulation.chunk(6, -1),
            token_rope=rotation(positions[None], half),
            text_rope=rotation(token_centres.detach(), half),
            token_mask=token_mask[:, None, None],
            text_mask=text_mask[:, None, None],
        )
        return h, context


Rope = tuple[Tensor, Tensor]  # cosines and sines (B, 1, N, half of a head's width)


@dataclass
class Context:
    """What every block is given beside its input and the text."""

    modulation: tuple[Tensor, ...]  # six (B, 1, D): shift, scale, gate of self-attention, then of the MLP
    token_rope: Rope
    text_rope: Rope
    token_mask: Tensor  # (B, 1, 1, N)
    text_mask: Tensor  # (B, 1, 1, S)


class Block(nn.Module):
    """DiT's block with cross-attention; its shifts, scales and gates are shared ones plus its own `table`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.mlp = MLP(width)
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        x: Tensor,  # (B, N, D)
        text: Tensor,  # (B, S, D)
        context: Context,
    ) -> Tensor:
        """returns: (B, N, D)."""
        # self-attention
        x = self.look_around(x, context)

        # cross-attention
        x = x + self.cross_attention(
            norm(x),
            source=text,
            x_rope=context.token_rope,
            source_rope=context.text_rope,
            mask=context.text_mask,
        )

        # MLP
        shift_mlp = context.modulation[3] + self.table[3]  # (B, 1, D)
        scale_mlp = context.modulation[4] + self.table[4]
        gate_mlp = context.modulation[5] + self.table[5]
        h = norm(x) * (1 + scale_mlp) + shift_mlp
        return x + (1 + gate_mlp) * self.mlp(h)

    def look_around(self, x: Tensor, context: Context) -> Tensor:
        """Self-attention over the tokens."""
        shift_msa = context.modulation[0] + self.table[0]  # (B, 1, D)
        scale_msa = context.modulation[1] + self.table[1]
        gate_msa = context.modulation[2] + self.table[2]
        h = norm(x) * (1 + scale_msa) + shift_msa
        rope = context.token_rope
        h = self.self_attention(h, h, rope, rope, context.token_mask)
        return x + (1 + gate_msa) * h

    def cross_weights(self, x: Tensor, text: Tensor, context: Context) -> Tensor:
        """The weights (B, N, S) of the cross-attention, the mean over heads; arguments as `forward`."""
        x = self.look_around(x, context)
        q, k, _ = self.cross_attention.project(
            norm(x),
            source=text,
            x_rope=context.token_rope,
            source_rope=context.text_rope,
        )
        root = math.sqrt(q.shape[-1])
        scores = q @ k.transpose(-1, -2) / root  # (B, H, N, S)
        scores = scores.masked_fill(~context.text_mask, -math.inf)
        weights = scores.softmax(-1)
        return weights.mean(1)


class Attention(nn.Module):
    """Multi-head attention; queries and keys are normalised (QK-norm), then rotated by position (RoPE)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = zero(nn.Linear(width, width, bias=False))

    def forward(
        self,
        x: Tensor,  # (B, N, D), attends to
        source: Tensor,  # (B, S, D)
        x_rope: Rope,
        source_rope: Rope,
        mask: Tensor,  # (B, 1, 1, S)
    ) -> Tensor:
        """returns: (B, N, D)."""
        q, k, v = self.project(x, source, x_rope, source_rope)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
        h = rearrange(h, "b h n d -> b n (h d)")
        return self.out(h)

    def project(self, x, source, x_rope, source_rope) -> tuple[Tensor, Tensor, Tensor]:
        """returns: queries (B, H, N, D / H), keys and values (B, H, S, D / H); arguments as `forward`."""
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(source))
        v = self.split_heads(self.v(source))
        q = rotate(norm(q), x_rope)
        k = rotate(norm(k), source_rope)
        return q, k, v

    def split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class TextNet(nn.Module):
    """Convolutions over bytes: the text encoder's features to what the decoder reads, and to durations."""

    def __init__(
        self,
        text_width: int,  # of the features
        width: int,
        layers: int,
        mean_duration: float,  # frames: every byte's duration before training
    ):
        super().__init__()
        self.proj = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(layers))
        self.log_duration = zero(nn.Linear(width, 1))
        nn.init.constant_(self.log_duration.bias, math.log(mean_duration))

    def forward(
        self,
        features: Tensor,  # (B, S, E)
        mask: Tensor,  # (B, S)
    ) -> tuple[Tensor, Tensor]:
        """returns: text (B, S, D), durations (B, S) in frames, 0 in the padding."""
        x = self.proj(features)  # (B, S, D)
        for block in self.blocks:
            x = block(x, mask)
        x = norm(x)
        log_duration = self.log_duration(x).squeeze(-1)  # (B, S)
        log_duration = log_duration.float().clamp(-4, 6)
        return x, log_duration.exp() * mask


class ConvBlock(nn.Module):
    """Depthwise convolution over bytes, then an MLP at each byte (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int, kernel: int = 7):
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv1d(width, width, kernel, padding=padding, groups=width)
        self.mlp = MLP(width)

    def forward(
        self,
        x: Tensor,  # (B, S, D)
        mask: Tensor,  # (B, S)
    ) -> Tensor:
        """returns: (B, S, D)."""
        h = x * mask[..., None]
        h = h.transpose(1, 2)  # (B, D, S)
        h = self.conv(h)
        h = h.transpose(1, 2)
        return x + self.mlp(norm(h))


class MLP(nn.Module):
    """Two matrices around a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = zero(nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = F.relu(h).square()
        return self.down(h)


def upsample(
    text: Tensor,  # (B, S, D)
    token_centres: Tensor,  # (B, S), when each byte is spoken, in tokens
    positions: Tensor,  # (N,) in tokens
    token_mask: Tensor,  # (B, N)
    text_mask: Tensor,  # (B, S)
) -> Tensor:
    """Gaussian upsampling, as in EATS: the text at positions, (B, N, D).

    sigma: half the mean duration of a byte in the clip.
    """
    tokens = token_mask.sum(1)  # (B,)
    sigma = 0.5 * tokens / text_mask.sum(1)  # (B,) in tokens
    distance = positions[None, :, None] - token_centres[:, None]  # (B, N, S)
    distance = distance / sigma[:, None, None]
    scores = -0.5 * distance.square()
    scores = scores.masked_fill(~text_mask[:, None], -math.inf)
    weights = scores.softmax(-1)
    return weights.to(text.dtype) @ text


def sinusoids(t: Tensor, width: int) -> Tensor:
    """t (B,) -> (B, width): cosines, then sines."""
    rates = frequencies(width // 2, t.device)
    angles = t.float()[:, None] * rates  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def frequencies(count: int, device: torch.device) -> Tensor:
    """(count,), geometrically spaced from 1 to 1/10000."""
    numbers = torch.arange(count, device=device)
    exponents = -math.log(10000) * numbers / count
    return exponents.exp()


def rotation(positions: Tensor, half: int) -> Rope:
    """Rotary embeddings (Su et al. 2021) of positions (B, N), whole numbers or not."""
    rates = frequencies(half, positions.device)
    positions = positions.float()[:, None, :, None]
    angles = positions * rates  # (B, 1, N, half)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + half) of x (B, H, N, 2 half)."""
    cos, sin = rope
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    a, b = x.chunk(2, -1)
    rotated_a = a * cos - b * sin
    rotated_b = a * sin + b * cos
    return torch.cat([rotated_a, rotated_b], -1)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights: the layer that follows has its own."""
    return F.rms_norm(x, x.shape[-1:])


def zero(linear: nn.Linear) -> nn.Linear:
    """Zero-initialise a layer: the last one of a residual block, so that the block starts as the identity."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Corpus(data.Packed):
    """Speech as log-mels, normalised by `statistics`, the mean and standard deviation of the training set."""

    def __init__(self, config: Config):
        mel = config.mel
        samples = config.data.max_seconds * mel.sample_rate
        longest = samples / mel.hop  # frames
        super().__init__(config, asdict(mel), longest)
        self.statistics = (self.mean, self.std)

    def log_mel(self, clip: data.Clip) -> Tensor:
        """(T, M), natural log, float32."""
        return self.rows(clip)

    def recording(self, clip: data.Clip) -> tuple[Tensor, int] | None:
        """The original recording, (N,), and its rate in Hz; None where it was not kept."""
        if not clip.wav or not Path(clip.wav).exists():
            return None
        wave = audio.load_wav(clip.wav, self.rate)
        return wave, self.rate


Batch = dict[str, Tensor]


class Batches:
    """The clips of a corpus as batches, dicts of CPU tensors.

    A subclass has `row(clip, rng, t=None)`, a clip and all that is drawn for it, and `collate(rows)`.
    """

    def __init__(self, config: Config, corpus: data.Packed, tokenizer, rank: int = 0, world: int = 1):
        """raises UserError for a split without clips."""
        self.config = config
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.rank = rank
        self.world = world
        for split in ("train", config.eval.split):
            if not corpus.clips(split):
                limit = f"data.max_seconds {config.data.max_seconds}"
                raise UserError(f"{corpus.folder}: has no {split} clip of at most {limit}")
        lengths = [clip.frames for clip in corpus.clips("train")]
        self.lengths = np.array(lengths)

    def train(self, step: int, micro: int = 0) -> Batch:
        """This rank's part of a micro-batch; those of all ranks and micro-batches are the global batch."""
        size = self.config.train.batch_size
        seed = self.config.seed
        clips = self.corpus.clips("train")
        global_size = size * self.world * self.config.train.grad_accum
        order = data.schedule(self.lengths, step, global_size, seed)
        share = micro * self.world + self.rank
        rows = []
        for n in range(share * size, share * size + size):
            clip = clips[order[n]]
            rng = np.random.default_rng((seed, data.TRAIN, step, n))
            row = self.row(clip, rng)
            rows.append(row)
        return self.collate(rows)

    def validation(self) -> list[Batch]:
        """This rank's share of the validation split: whole clips, t evenly spread, the same every time."""
        seed = self.config.seed
        shift = self.config.flow.timestep_shift
        clips = self.corpus.clips(self.config.eval.split)
        numbers = range(len(clips))
        by_length = sorted(numbers, key=lambda n: clips[n].frames)
        rows = []
        for n in by_length[self.rank :: self.world]:
            rng = np.random.default_rng((seed, data.VALIDATION, n))
            t = data.golden(n)
            t = flow.shift_time(t, shift)
            row = self.row(clips[n], rng, t)
            rows.append(row)
        size = self.config.train.batch_size
        batches = []
        for start in range(0, len(rows), size):
            batch = self.collate(rows[start : start + size])
            batches.append(batch)
        return batches

    def draw_time(self, rng: np.random.Generator) -> float:
        """A training time t."""
        c = self.config.flow
        return flow.sample_time(
            rng, c.timestep_logit_mean, c.timestep_logit_std, c.timestep_uniform, c.timestep_shift
        )


class SpeechBatches(Batches):
    """Log-mels and the ids of their texts.

    x, noise (B, T, M): 0 where x_mask (B, T) is False; T is a multiple of data.pad_multiple
    t (B,)
    ids (B, S) int64, text_mask (B, S): S is a multiple of 8
    features (B, S, E): of the ids, only where the text encoder is frozen
    text_dropped (B,): rows that have the ids of "" instead of their text
    frames (B,): length of the clip, without the silence appended to it
    number (B,): of the clip
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.features = None
        if config.model.text_encoder != "scratch":
            self.features = open_features(config, corpus)
        # the first call sets the tokenizer's options: not thread-safe
        pretrained.tokenize(tokenizer, [""])

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it.

        t: for validation, where the text is kept and no silence appended; None = drawn.
        """
        x = self.corpus.log_mel(clip)
        dropped = False
        if t is None:
            dropped = rng.random() < self.config.flow.text_condition_dropout
            x = self.append_silence(x, rng)
            t = self.draw_time(rng)
        # drawn last, so that padding changes nothing
        noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
        return {
            "x": audio.normalise(x, self.corpus.mean, self.corpus.std),
            "noise": torch.from_numpy(noise),
            "t": t,
            "frames": clip.frames,
            "number": clip.number,
            "text_dropped": dropped,
            "text": "" if dropped else clip.text,
        }

    def append_silence(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """With a chance of silence_prob, append up to max_silence_sec to the log-mel (T, M)."""
        c = self.config.data
        mel = self.config.mel
        chosen = rng.random() < c.silence_prob
        seconds = chosen * rng.random() * c.max_silence_sec
        frames = int(seconds * mel.sample_rate / mel.hop)
        floor = math.log(audio.LOG_FLOOR)
        silence = torch.full((frames, mel.n_mels), floor)
        return torch.cat([x, silence])

    def collate(self, rows: list[dict]) -> Batch:
        batch = {}
        for key in ("t", "frames", "number", "text_dropped"):
            values = [row[key] for row in rows]
            batch[key] = torch.tensor(values)

        multiple = self.config.data.pad_multiple
        x = [row["x"] for row in rows]
        noise = [row["noise"] for row in rows]
        batch["x"], batch["x_mask"] = data.pad(x, multiple)
        batch["noise"], _ = data.pad(noise, multiple)

        texts = [row["text"] for row in rows]
        ids = pretrained.tokenize(self.tokenizer, texts)
        ids = [torch.tensor(row) for row in ids]
        batch["ids"], batch["text_mask"] = data.pad(ids, 8)
        if self.features:
            features = [self.features(text) for text in texts]
            batch["features"], _ = data.pad(features, 8)
        return batch


def open_features(config: Config, corpus: Corpus) -> Callable[[str], Tensor]:
    """The frozen text encoder's cached features: a function from a text of the corpus, or "", to (S, E)."""
    path, texts = features_file(config, corpus)
    read = data.open_rows(path, data.PREPARE)
    numbers = {text: number for number, text in enumerate(texts)}

    def features(text: str) -> Tensor:
        return read(numbers[text])

    return features


def features_file(config: Config, corpus: Corpus) -> tuple[Path, list[str]]:
    """The cache, named by a digest of what is in it, and the texts in it."""
    texts = {""}
    for split in data.SPLITS:
        texts |= {clip.text for clip in corpus.clips(split)}
    texts = sorted(texts)
    digest = data.digest([config.model.text_encoder, texts])
    name = f"features_{digest[:8]}.npy"
    return corpus.folder / name, texts


def prepare(config: Config) -> None:
    """Make what a config's training needs and does not find: the packed corpus, the features of its texts."""
    form = asdict(config.mel)
    data.prepare_speech(config, form, cut=lambda _, clips, __: clips)  # clips that are too long stay whole
    corpus = Corpus(config)
    path, texts = features_file(config, corpus)
    name = config.model.text_encoder
    if name == "scratch" or path.exists():
        return
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    device = "cuda" if on_gpu else "cpu"
    encoder, tokenizer, width = pretrained.load_text_encoder(name)
    encoder = encoder.to(device)
    ids = pretrained.tokenize(tokenizer, texts)
    ids = [torch.tensor(row) for row in ids]
    lengths = [len(row) for row in ids]

    def encode(numbers: list[int]) -> list[np.ndarray]:
        """The features (S, E) of these texts."""
        padded, mask = data.pad([ids[n] for n in numbers], 8)
        features = encoder(padded.to(device), mask.to(device))
        features = features.float().cpu().numpy()
        found = []
        for row, n in zip(features, numbers):
            found.append(row[: lengths[n]])
        return found

    data.cache_rows(path, lengths, width, encode, 32, f"features of {name}")
