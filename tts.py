"""Text to speech, system `tts`: its losses, its sampling, and what it prepares; the networks are in model.py.

text (B, S, D) has one vector a byte; x (B, T, M) is a normalised log-mel; model.frame_stack frames are one of
N tokens. When each byte is spoken is found in the recording: each byte has a mean log-mel, and of all ways to
say one byte after the other the likeliest is taken (monotonic alignment search: Glow-TTS, arXiv 2005.11129).
Durations so found teach those that are predicted, by which bytes are placed in sampling. The means, each for
as long as its byte lasts, are a prior, to which the network predicts the difference (Grad-TTS, Matcha-TTS).
With `model.alignment: learned` the flow loss itself moves the durations, because each token is given the text
blurred around its own time by a Gaussian, which is differentiable (EATS, arXiv 2006.03575).
"""

import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import audio
import data
import flow
import metric
from base import MelOutput, Prompt, System
from config import Config, Sample, TTSConfig
from corpora import shards, voice
from corpora.prepare import READERS, prepare_recordings
from data import Corpus
from metric import Score
from model import MelPrior, MelTransformer, TextEncoder
from pretrained import bigvgan
from pretrained.text_encoder import PhonemeTokenizer, load_text_encoder, tokenize


class TextToSpeech(System):
    """`forward` returns the losses of a batch, `sample` speech."""

    config_class = TTSConfig
    corpus_class = data.Corpus
    batches_class = data.SpeechBatches
    readers = READERS
    speaks = True
    varying = ("x", "noise", "x_mask", "ids", "text_mask", "features")
    scores = {
        "mcd": Score(
            "mel-cepstral distortion",
            "dB",
            "of log-mels, time-warped: a scale of its own; 0 is the recording",
        ),
        "length_error": Score("error of the length", "%", "the predicted length beside the recording's"),
    }
    max_characters = 200  # characters spoken in one go: about 13 seconds, the longest that training has seen
    SECONDS_PER_BYTE = 0.065  # of LJSpeech, 5.6 frames: the predicted durations before training

    def __init__(self, config: Config, mean: float = 0.0, std: float = 1.0):
        """mean, std: of the training set's log-mels; saved in checkpoints."""
        super().__init__()
        self.config = config
        self.frame_rate = config.mel.sample_rate / config.mel.hop  # Hz
        m = config.model
        text_encoder, tokenizer, text_width = load_text_encoder(m.text_encoder)
        if m.text == "phonemes":
            tokenizer = PhonemeTokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        mean_duration = self.SECONDS_PER_BYTE * self.frame_rate  # frames
        pooled = m.alignment == "none"
        self.text = TextEncoder(text_width, m.width, m.text_layers, mean_duration, pooled)
        has_prior = m.alignment == "mas"
        self.prior = MelPrior(m.width, config.mel.n_mels) if has_prior else None
        self.decoder = MelTransformer(
            n_mels=config.mel.n_mels,
            patch_size=m.frame_stack,
            width=m.width,
            layers=m.layers,
            heads=m.heads,
            upsample_text=m.upsample_text,
            cross_attention=m.cross_attention,
            conv_kernel=m.conv_kernel,
            prior=has_prior,
        )
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `SpeechBatches`, in which everything random is already drawn.

        returns: scalars: loss, flow_loss, duration_loss, prior_loss with a prior; flow_loss_per_clip (B,).
        """
        noise = batch["noise"]  # (B, T, M)
        t = batch["t"]  # (B,)
        frames = batch["frames"]  # (B,)
        x_mask = batch["x_mask"]  # (B, T)
        x = self.normalise(batch["x"], frames, x_mask)  # (B, T, M)
        text_mask = batch["text_mask"]  # (B, S)
        flow_config = self.config.flow

        # text to one vector and one duration a byte; a frozen encoder's features come cached, in the batch
        if "features" in batch:
            features = batch["features"].float()  # (B, S, E)
        else:
            features = self.text_encoder(batch["ids"], text_mask)
        text, durations = self.text(features, text_mask)  # (B, S, D), (B, S)
        durations = durations * batch["tempo"][:, None]

        # when each byte is spoken: as is found in the recording, or else as predicted
        spoken = durations
        prior = None
        losses = {}
        if self.prior is not None:
            spoken = self.prior.search(text, text_mask, x, frames)
            prior = self.prior(text, spoken, text_mask, x.shape[1])  # (B, T, M)
            losses["prior_loss"] = flow.masked_mean((x - prior).square().mean(2), x_mask)  # (B,)
            losses["duration_loss"] = flow.masked_mean(log_error(durations, spoken), text_mask)

        # the point at t on the straight path from data to noise, and the velocity predicted there
        condition = {
            "text": text,
            "token_centres": self.align(spoken, text_mask, frames),  # (B, S)
            "x_mask": x_mask,
            "text_mask": text_mask,
            "prior": prior,
        }
        x_t = flow.interpolate(x, noise, t)  # (B, T, M)
        v = self.velocity(x_t, t, condition)
        flow_loss = flow.loss(v, x, noise, x_mask)  # (B,)

        # the sum of the durations is to predict the length of the clip
        length_error = log_error(durations.sum(1), frames)
        losses["duration_loss"] = losses.get("duration_loss", 0) + length_error

        # a text that was dropped teaches nothing but the flow
        for name, loss in losses.items():
            losses[name] = (loss * ~batch["text_dropped"]).mean()
        weighted = flow_loss * flow.loss_weight(t, flow_config.loss_min_t)
        total = weighted.mean() + flow_config.duration_weight * losses["duration_loss"]
        if self.prior is not None:
            total = total + flow_config.prior_weight * losses["prior_loss"]
        return {
            "loss": total,
            "flow_loss": flow_loss.mean(),
            **losses,
            "flow_loss_per_clip": flow_loss.detach(),
        }

    def velocity(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor | None]) -> Tensor:
        """v (B, T, M) at x_t (B, T, M), t (B,); condition: the other arguments of `MelTransformer.forward`.

        Where x is predicted, what the network puts out is the difference to the prior.
        """
        c = self.config.flow
        output = self.decoder(x_t, t, **condition).float()
        if condition["prior"] is not None and c.predict == "x":
            output = output + condition["prior"]
        return flow.velocity(output, x_t, t, c.predict, c.min_t)

    def normalise(
        self,
        log_mel: Tensor,  # (B, T, M)
        frames: Tensor,  # (B,): where the clip ends
        x_mask: Tensor,  # (B, T): and where the silence after it does
    ) -> Tensor:
        """Packed log-mels as the network sees them, (B, T, M) float32: with silence, then 0."""
        positions = torch.arange(log_mel.shape[1], device=log_mel.device)
        behind_clip = positions >= frames[:, None]  # (B, T)
        silence = math.log(audio.LOG_FLOOR)
        x = log_mel.float().masked_fill(behind_clip[:, :, None], silence)
        x = audio.normalise(x, self.mean, self.std)
        return x.masked_fill(~x_mask[:, :, None], 0)

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
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[MelOutput]:
        """Speak the prompts as one batch; a prompt's noise depends on its own seed alone."""
        log_mels, attention = self.sample_log_mels(prompts, settings)
        start = time.perf_counter()
        waves = self.vocoder(log_mels)
        self.vocode_sec += time.perf_counter() - start
        outputs = []
        for prompt, wave, log_mel, weights in zip(prompts, waves, log_mels, attention):
            outputs.append(self.to_output(prompt.text, wave, log_mel, weights))
        return outputs

    def sample_log_mels(
        self, prompts: Sequence[Prompt], settings: Sample
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """returns: log-mels (T, M), natural log, and cross-attention (N, S) if there is any; on the CPU."""
        device = self.mean.device

        # text: 2 B rows, the prompts, and for guidance as many empty texts
        texts = [prompt.text for prompt in prompts]
        texts += [""] * len(prompts)
        text, durations, text_mask = self.encode_texts(texts)

        # length: as asked for, or the sum of the durations; when each byte is spoken
        frames = self.choose_frames(prompts, durations, settings.speed)
        row_frames = torch.tensor(frames + frames, device=device)  # (2 B,)

        # noise to log-mels
        noise, x_mask = self.draw_noise(prompts, frames)  # (B, T, M), (B, T)
        prior = None
        if self.prior is not None:
            stretch = row_frames / durations.sum(1)  # (2 B,)
            prior = self.prior(text, durations * stretch[:, None], text_mask, noise.shape[1])
        condition = {
            "text": text,
            "token_centres": self.align(durations, text_mask, row_frames),
            "x_mask": torch.cat([x_mask, x_mask]),
            "text_mask": text_mask,
            "prior": prior,
        }
        x = self.integrate(noise, condition, settings)  # (B, T, M)
        log_mels = audio.denormalise(x, self.mean, self.std).float().cpu()
        log_mels = [row[:n] for row, n in zip(log_mels, frames)]
        if not self.config.model.cross_attention:
            return log_mels, [None] * len(log_mels)
        attention = self.attention_halfway(x, noise, condition).float().cpu()  # (B, N, S)
        tokens = [math.ceil(n / self.config.model.frame_stack) for n in frames]
        bytes_ = text_mask.sum(1).tolist()
        attention = [row[:n, :s] for row, n, s in zip(attention, tokens, bytes_)]
        return log_mels, attention

    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """returns: text (B, S, D), durations (B, S) in frames, text_mask (B, S)."""
        device = self.mean.device
        ids = tokenize(self.tokenizer, texts)
        rows = [torch.tensor(row) for row in ids]
        padded, text_mask = data.pad(rows, 1)
        text_mask = text_mask.to(device)
        features = self.text_encoder(padded.to(device), text_mask)
        text, durations = self.text(features, text_mask)
        return text, durations, text_mask

    def choose_frames(self, prompts: Sequence[Prompt], durations: Tensor, speed: float) -> list[int]:
        """The length of each prompt's speech, in frames: as asked for, or else predicted, at that speed."""
        shortest = self.config.model.frame_stack
        longest = int(self.config.data.max_seconds * self.frame_rate)
        predicted = durations.sum(1)
        flow.check_finite(predicted, "the length that was predicted")
        predicted = predicted.tolist()
        frames = []
        for row, prompt in enumerate(prompts):
            wanted = prompt.seconds * self.frame_rate
            wanted = round(wanted or predicted[row] / speed)
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
        condition: dict[str, Tensor | None],  # as in `velocity`, 2 B rows, the conditional ones first
        settings: Sample,
    ) -> Tensor:
        """x (B, T, M), by Euler's method with guidance."""

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            # all 2 B rows, or, where guidance is off, the B conditional ones
            given = first_rows(condition, len(x_t))
            return self.velocity(x_t, t, given) * given["x_mask"][:, :, None]

        timesteps = flow.timesteps(settings.euler_steps, settings.sway, settings.shift)
        return flow.sample_euler(
            velocity, noise, timesteps, settings.cfg_scale, settings.cfg_from, settings.cfg_to
        )

    def attention_halfway(
        self,
        x: Tensor,  # (B, T, M)
        noise: Tensor,  # (B, T, M)
        condition: dict[str, Tensor | None],  # as in `integrate`
    ) -> Tensor:
        """Cross-attention (B, N, S) of the conditional rows, looked at halfway, at t = 0.5."""
        t = torch.full((len(x),), 0.5, device=x.device)
        x_t = flow.interpolate(x, noise, t)
        given = first_rows(condition, len(x))
        return self.decoder.attention(x_t, t, **given)

    def to_output(
        self, text: str, wave: Tensor, log_mel: Tensor, attention: Tensor | None = None
    ) -> MelOutput:
        symbols = text
        if self.config.model.text == "phonemes":
            symbols = voice.phonemes(text)
        mel = self.config.mel
        return MelOutput(symbols, wave, mel.sample_rate, log_mel, mel, attention)

    def reference(self, corpus: Corpus, clip: shards.Clip) -> MelOutput:
        """The recorded clip's log-mel, and what the vocoder makes of it."""
        log_mel = corpus.log_mel(clip)
        wave = self.vocoder([log_mel])[0]
        return self.to_output(clip.text, wave, log_mel)

    def score(self, output: MelOutput, corpus: Corpus, clip: shards.Clip) -> dict[str, float]:
        """output: generated from the clip's text."""
        generated = output.log_mel.numpy()
        recorded = corpus.log_mel(clip).numpy()
        return {
            "mcd": metric.mel_cepstral_distortion(generated, recorded),
            "length_error": abs(len(generated) / len(recorded) - 1),
        }

    @functools.cached_property
    def vocoder(self) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """log-mels (T, M), natural log -> waves (T * hop,). Cached, not a registered submodule: not saved."""
        name = self.config.sample.vocoder
        device = self.mean.device
        return bigvgan.load_vocoder(name, self.config.mel, device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: linear layers from hidden to hidden, not inputs, outputs, time and tables."""
        stacks = [self.decoder.blocks, self.text.blocks]
        if self.config.model.text_encoder == "scratch":
            stacks.append(self.text_encoder)
        matrices = []
        for stack in stacks:
            matrices += [layer.weight for layer in stack.modules() if isinstance(layer, nn.Linear)]
        return matrices

    @staticmethod
    def fetch(config: Config) -> None:
        """The text encoder, and the vocoder."""
        if config.model.text_encoder != "scratch":
            load_text_encoder(config.model.text_encoder)
        if config.train.eval_interval:
            bigvgan.load_vocoder(config.sample.vocoder, config.mel, "cpu")

    @staticmethod
    def prepare(config: Config) -> None:
        """Make what training needs and does not find: the packed corpus, the features of its texts."""
        prepare_recordings(config, config.packed_format())
        corpus = Corpus(config)
        path, texts = data.text_features_file(config, corpus)
        name = config.model.text_encoder
        if name == "scratch" or not config.data.cache_text or path.exists():
            return
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        device = "cuda" if on_gpu else "cpu"
        encoder, tokenizer, width = load_text_encoder(name)
        encoder = encoder.to(device)
        ids = tokenize(tokenizer, texts)
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

        shards.cache_features(path, lengths, width, encode, 32, f"features of {name}")


def log_error(predicted: Tensor, found: Tensor) -> Tensor:
    """Squared difference of the logarithms of durations in frames; 0, as padding has it, counts as 0.01."""
    return (predicted.clamp_min(0.01).log() - found.clamp_min(0.01).log()).square()


def first_rows(condition: dict[str, Tensor | None], rows: int) -> dict[str, Tensor | None]:
    return {name: value if value is None else value[:rows] for name, value in condition.items()}
