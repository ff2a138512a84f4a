"""What the network works on: random crops of pieces, as latents of AudioLDM2's VAE, as tokens.

A latent (B, channels, T, F) of a log-mel (T, M) is cut into patches of 2 x 2: N = T / 2 * F / 2 tokens of C
numbers, channel first, all bands of one time before the next. Without the VAE, tokens are patches of the
normalised log-mel itself.
Source: patches as in FluxMusic (arXiv 2409.00587); the VAE of AudioLDM2 (arXiv 2308.05734).
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor

import audio
from config import Config
from pretrained import frozen


class Codec:
    """Log-mels (T, M) to tokens (N, C) and back, by AudioLDM2's VAE or, losslessly, as patches."""

    def __init__(self, config: Config, mean: float, std: float, device: torch.device):
        """mean, std: of the training set's log-mels, by which patches are normalised."""
        self.mel = config.mel
        self.mean = mean
        self.std = std
        self.device = device
        options = config.music
        self.vae_name = ""
        token_frames = options.patch_frames
        token_mels = options.patch_mels
        self.patch = (token_frames, token_mels)
        self.channels = token_frames * token_mels
        if options.autoencoder != "patches":
            self.vae_name = options.autoencoder
            token_frames = 8  # the VAE's factor 4, in patches of 2
            token_mels = 8
            self.patch = (2, 2)
            self.channels = 32  # the latent's 8 x 2 x 2
        frames = options.crop_seconds * self.mel.sample_rate / self.mel.hop
        self.crop_frames = round(frames)
        self.bands = self.mel.n_mels // token_mels  # tokens of one time
        self.crop_tokens = self.crop_frames // token_frames * self.bands

    @property
    def vae(self) -> nn.Module:
        import diffusers  # seconds to import

        kind = diffusers.AutoencoderKL
        return frozen.load_frozen(kind, self.vae_name, "vae", "music.autoencoder", self.device)

    def encode_crop(self, wave: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random crop of a piece (N,) -> mean and standard deviation of its tokens, (N, C) on the CPU."""
        crop = random_crop(wave, self.crop_frames * self.mel.hop, rng)
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


def load_vocoder(config: Config, device: torch.device) -> nn.Module:
    """AudioLDM2's, frozen: log-mel (T, M) -> wave."""
    kind = transformers.SpeechT5HifiGan
    return frozen.load_frozen(kind, config.music.autoencoder, "vocoder", "music.autoencoder", device)


def random_crop(wave: Tensor, samples: int, rng: np.random.Generator) -> Tensor:
    """A random crop (samples,) of a piece (N,): zero mean, peak 0.5, padded with silence; never a silent one.

    Of eight random starts the first is taken whose crop comes within 40 dB of the piece's peak; without one,
    the crop is around the peak.
    """
    level = (wave - wave.mean()).abs()
    peak = level.max()
    last = max(0, len(wave) - samples)
    centred = level.argmax().item() - samples // 2
    start = min(last, max(0, centred))
    candidates = rng.integers(0, last + 1, 8)
    for candidate in candidates.tolist():
        stretch = level[candidate : candidate + samples]
        if stretch.max() > 0.01 * peak:
            start = candidate
            break
    crop = wave[start : start + samples]
    crop = crop - crop.mean()
    crop = 0.5 * crop / crop.abs().max().clamp_min(1e-9)
    return F.pad(crop, (0, samples - len(crop)))


def to_tokens(latents: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """(B, channels, T, F) -> (B, N, C), each token a patch of times and bands."""
    i, j = patch
    return rearrange(latents, "b c (t i) (f j) -> b (t f) (c i j)", i=i, j=j)


def to_latents(tokens: Tensor, bands: int, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """(B, N, C) -> (B, channels, T, F). bands: tokens of one time."""
    i, j = patch
    return rearrange(tokens, "b (t f) (c i j) -> b c (t i) (f j)", f=bands, i=i, j=j)
