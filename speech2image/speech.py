"""Speech encoders of stage 1, the augmentation of speech, and the contrastive loss.

An encoder turns waves (B, N) of mean 0 and deviation 1 into frames (B, T, W). All that is random is drawn
outside of the networks, in `augment` and `draw_spans`. Source: SpeechCLIP (arXiv 2210.00705).
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor

import audio
from config import Mel
from model import timestep_embedding
from pretrained import frozen
from pretrained.asr import HOP, RATE


class HubertEncoder(nn.Module):
    """A frozen HuBERT: the learned softmax-weighted sum of its layers, each normalised."""

    def __init__(self, name: str):
        super().__init__()
        cpu = torch.device("cpu")
        hubert = frozen.load_frozen(transformers.HubertModel, name, "", "align.speech", cpu)
        settings = hubert.config
        settings.output_hidden_states = True
        self.hubert = frozen.Frozen(hubert, cuda_dtype=torch.bfloat16)
        self.width = settings.hidden_size
        layers = settings.num_hidden_layers + 1
        self.weights = nn.Parameter(torch.zeros(layers))

    def forward(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """wave, wave_mask (B, N), hidden (B, 2, K, 2): see `spec_augment` -> (B, T, W), its mask (B, T)."""
        hubert = self.hubert.module
        sample_mask = wave_mask.long()
        wave = wave.to(hubert.dtype)
        output = self.hubert(wave, sample_mask)
        layers = output.hidden_states  # (B, T, W) each
        frames = layers[0].shape[1]
        mask = hubert._get_feature_vector_attention_mask(frames, sample_mask)
        mask = mask.bool()
        weights = self.weights.softmax(0)
        h = 0
        for weight, layer in zip(weights, layers):
            normalised = F.layer_norm(layer.float(), layer.shape[-1:])
            h = h + weight * normalised
        h = spec_augment(h, mask, hidden)
        return h, mask


class MelEncoder(nn.Module):
    """A small trained encoder in HuBERT's place: log-mels and two strided convolutions.

    In each clip every band has mean 0, and all bands together deviation 1.
    """

    mel = Mel(sample_rate=RATE, n_fft=512, hop=HOP, n_mels=40)
    floor = 1e-3  # in a wave of deviation 1: what is below is silence

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList()
        for channels in (self.mel.n_mels, width):
            conv = nn.Conv1d(channels, width, 5, stride=2, padding=2)
            self.convs.append(conv)

    def forward(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `HubertEncoder`, at 12.5 frames a second."""
        x = self.log_mel(wave)
        samples = wave_mask.sum(1)
        n_fft = self.mel.n_fft
        frames = (samples - n_fft) // HOP + 1
        positions = torch.arange(x.shape[1], device=x.device)
        mask = positions < frames.unsqueeze(1)  # (B, T)
        x = normalize_mel(x, mask, frames)
        x = spec_augment(x, mask, hidden)
        x = x.transpose(1, 2)  # (B, M, T)
        for conv in self.convs:
            mask = mask[:, ::2]
            x = F.gelu(conv(x))
            x = x * mask.unsqueeze(1)
        x = x.transpose(1, 2)  # (B, T / 4, W)
        positions = positions[: x.shape[1]]
        x = x + timestep_embedding(positions, self.width)
        return x, mask

    def log_mel(self, wave: Tensor) -> Tensor:
        """(B, N) -> (B, T, M), natural log, float32."""
        device = wave.device
        n_fft = self.mel.n_fft
        hann = audio.hann_window(n_fft).to(device)
        filters = audio.mel_filters(self.mel).to(device)
        with torch.autocast(device.type, enabled=False):
            stft = torch.stft(wave, n_fft, HOP, window=hann, center=False, return_complex=True)
            mel = filters @ stft.abs()
            log_mel = mel.clamp_min(self.floor).log()
        return log_mel.transpose(1, 2)


def normalize_mel(x: Tensor, mask: Tensor, frames: Tensor) -> Tensor:
    """x (B, T, M) with mean 0 in each band and deviation 1 in each clip.

    mask (B, T): valid frames, the others become 0; frames (B,): how many are valid.
    """
    valid = mask.unsqueeze(2)
    count = frames.view(-1, 1, 1)
    x_valid = x * valid
    total = x_valid.sum(1, keepdim=True)  # (B, 1, M)
    mean = total / count
    x = (x - mean) * valid
    squares = x.square()
    energy = squares.sum((1, 2), keepdim=True)
    count = count * x.shape[2]
    deviation = (energy / count).sqrt()
    return x / deviation.clamp_min(0.1)


def spec_augment(h: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
    """SpecAugment (arXiv 1904.08779): h (B, T, W) with spans of its time and of its channels set to 0.

    mask (B, T): valid frames. hidden (B, 2, K, 2): start and stop, as shares, of K spans of time, then of
    channels.
    """
    time_spans, channel_spans = hidden.unbind(1)
    _, length, width = h.shape
    frames = mask.sum(1)
    channels = torch.full_like(frames, width)
    in_time = in_spans(time_spans, frames, length)
    in_time = in_time.unsqueeze(2)  # (B, T, 1)
    in_channels = in_spans(channel_spans, channels, width)
    in_channels = in_channels.unsqueeze(1)  # (B, 1, W)
    h = h.masked_fill(in_time, 0)
    return h.masked_fill(in_channels, 0)


def in_spans(spans: Tensor, size: Tensor, length: int) -> Tensor:
    """Whether positions lie in spans (B, K, 2), start and stop as shares of size (B,): (B, length)."""
    positions = torch.arange(length, device=size.device)
    share = positions / size.unsqueeze(1)
    share = share.unsqueeze(1)  # (B, 1, L)
    start, stop = spans.unsqueeze(2).unbind(3)  # (B, K, 1)
    inside = (share >= start) & (share < stop)
    return inside.any(1)


def normalize_waveform(wave: Tensor) -> Tensor:
    """Mean 0, deviation 1, as HuBERT's own feature extractor."""
    centred = wave - wave.mean()
    deviation = wave.std(correction=0)
    return centred / deviation.clamp_min(1e-4)


def info_nce(speech: Tensor, image: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of the pairs speech (B, D), image (B, D), a scalar; scale (): 1 / temperature.

    Pairs with the same label (B,) are not negatives of each other.
    """
    device = label.device
    target = torch.arange(len(label), device=device)
    own = target.unsqueeze(1) == target
    same_label = label.unsqueeze(1) == label
    excluded = same_label & ~own
    speech = scale * speech
    logits = speech @ image.T  # (B, B)
    logits = logits.masked_fill(excluded, -math.inf)
    speech_to_image = F.cross_entropy(logits, target)
    image_to_speech = F.cross_entropy(logits.T, target)
    loss = speech_to_image + image_to_speech
    return loss / 2


def augment(
    wave: Tensor,
    crop_sec: float,
    gain_db: float,  # the most that it is made louder or softer
    noise_prob: float,
    min_snr_db: float,
    rng: np.random.Generator,
) -> Tensor:
    """A wave (N,) cropped at random, under a gain that changes, with a chance under white noise."""
    longest = int(crop_sec * RATE)
    samples = len(wave)
    surplus = max(0, samples - longest)
    start = rng.integers(surplus + 1)
    stop = start + longest
    wave = wave[start:stop]
    samples = len(wave)

    first_db, last_db = rng.uniform(-gain_db, gain_db, 2)
    level_db = torch.linspace(first_db, last_db, samples)
    gain = 10 ** (level_db / 20)
    wave = wave * gain

    if rng.random() < noise_prob:
        noise = rng.standard_normal(samples, dtype=np.float32)
        noise = torch.from_numpy(noise)
        snr_db = min_snr_db + 30 * rng.random()
        rms = wave.square().mean().sqrt()
        noise = noise * rms
        level = 10 ** (-snr_db / 20)
        wave = wave + noise * level
    return wave


def draw_spans(count: int, longest: float, rng: np.random.Generator) -> Tensor:
    """(2, K, 2) for `spec_augment`: `count` spans each of time and of channels; longest: of one, a share."""
    shape = (2, count)
    lengths = longest * rng.random(shape)
    starts = rng.random(shape) * (1 - lengths)
    stops = starts + lengths
    spans = np.stack([starts, stops], -1)
    return torch.from_numpy(spans).float()
