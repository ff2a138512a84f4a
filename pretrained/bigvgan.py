"""Vocoders: Griffin-Lim, or BigVGAN (Lee et al. 2023), written out here; both by one name.

Layout and equations as in NVIDIA/BigVGAN@7d2b454 (v2.4, MIT), so that its published weights load key for key.
Log-mels are (T, M), natural log; waves are (T * hop,).
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import audio
from config import Mel, UserError
from pretrained import frozen
from pretrained.frozen import Frozen

ACTIVATION_REACH = 6  # samples to either side: 12 taps up and 12 down, at twice the rate


def load_vocoder(
    name: str, mel: Mel, device: torch.device | str
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A vocoder: log-mels (T, M), natural log -> waves (T * hop,) in [-1, 1], float32 on the CPU.

    On a GPU they are one batch; on a CPU, whose caches do not hold one, each is made alone.
    name: griffinlim | hub id or folder of a BigVGAN, which must have been trained on `mel`.
    """
    if name == "griffinlim":
        network = functools.partial(audio.griffin_lim_batch, mel=mel)
    else:
        generator = Frozen(load_bigvgan(name, mel)).to(device)
        network = generator.module.batch
    device_type = torch.device(device).type

    def vocode(log_mels: Sequence[Tensor]) -> list[Tensor]:
        log_mels = [log_mel.to(device, torch.float32) for log_mel in log_mels]
        batches = [log_mels] if device_type == "cuda" else [[log_mel] for log_mel in log_mels]
        waves = []
        # no autocast: in bf16 the phase of Snake's sine is noise
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            for batch in batches:
                waves += [wave.cpu().clamp(-1, 1) for wave in network(batch)]
        return waves

    return vocode


def load_bigvgan(name: str, mel: Mel) -> nn.Module:
    """The generator from config.json and bigvgan_generator.pt in a folder or hub repository."""
    path = frozen.find_file(name, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        check_bigvgan(config, mel, path)
        generator = BigVGAN(config)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path}: does not describe a BigVGAN ({frozen.one_line(e)})") from e
    path = frozen.find_file(name, "bigvgan_generator.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = fold_weight_norm(checkpoint["generator"])
        generator.load_state_dict(state)
    except Exception as e:  # a damaged file makes torch.load raise nearly anything
        raise UserError(
            f"{path}: not the weights of this BigVGAN, or damaged ({frozen.one_line(e)}); fetch it again"
        ) from e
    return generator


def check_bigvgan(config: dict, mel: Mel, path: Path) -> None:
    """raises UserError for a BigVGAN trained on another mel than ours, or of an unpublished kind."""
    fmax = config["fmax"]
    if fmax is None:
        fmax = config["sampling_rate"] / 2
    config = {**config, "fmax": fmax, "resblock": str(config["resblock"])}
    required = {
        "sampling_rate": mel.sample_rate,
        "hop_size": mel.hop,
        "n_fft": mel.n_fft,
        "win_size": mel.n_fft,
        "num_mels": mel.n_mels,
        "fmin": mel.fmin,
        "fmax": mel.fmax,
    }
    for key, value in required.items():
        if config[key] != value:
            raise UserError(
                f"{path}: this BigVGAN was trained with {key} {config[key]}, our mel has {value}; "
                "take another, or griffinlim"
            )
    supported = {"resblock": ("1", "2"), "activation": ("snake", "snakebeta"), "snake_logscale": (True,)}
    for key, values in supported.items():
        if config[key] not in values:
            known = " and ".join(map(repr, values))
            raise UserError(f"{path}: {key} {config[key]!r} is not supported, only {known}")
    rates = config["upsample_rates"]
    if math.prod(rates) != mel.hop:
        raise UserError(f"{path}: upsample_rates {rates} do not multiply to hop_size {mel.hop}")


def fold_weight_norm(state: dict) -> dict:
    """Replace each pair weight_g, weight_v by the weight g v / |v|, the norm over all axes but the first."""
    folded = dict(state)
    for key, direction in state.items():
        length_key = key[:-1] + "g"
        if key.endswith("weight_v") and length_key in state:
            del folded[key]
            length = folded.pop(length_key)
            norm = direction.norm(dim=(1, 2), keepdim=True)
            folded[key.removesuffix("_v")] = direction * (length / norm)
    return folded


class BigVGAN(nn.Module):
    """The generator (Lee et al. 2023): log-mel (..., T, M) -> wave (..., T * hop).

    config: the published config.json. Submodules are named, and nested, as in its checkpoints.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["upsample_initial_channel"]
        rates = config["upsample_rates"]
        up_kernels = config["upsample_kernel_sizes"]
        kernels = config["resblock_kernel_sizes"]
        dilations = config["resblock_dilation_sizes"]
        block = AMPBlock2 if str(config["resblock"]) == "2" else AMPBlock1
        beta = config["activation"] == "snakebeta"
        self.parallel_blocks = len(kernels)
        self.conv_pre = same_conv1d(config["num_mels"], width, 7)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, up_kernel in zip(rates, up_kernels, strict=True):
            next_width = width // 2
            padding = (up_kernel - rate) // 2
            up = nn.ConvTranspose1d(width, next_width, up_kernel, rate, padding=padding)
            self.ups.append(nn.Sequential(up))
            width = next_width
            for kernel, block_dilations in zip(kernels, dilations, strict=True):
                self.resblocks.append(block(width, kernel, block_dilations, beta))
        self.activation_post = Activation(width, beta)
        bias = config.get("use_bias_at_final", True)
        self.conv_post = same_conv1d(width, 1, 7, bias=bias)
        self.tanh = config.get("use_tanh_at_final", True)
        self.hop = math.prod(rates)
        self.reach = find_reach(config)

    def forward(self, log_mel: Tensor) -> Tensor:
        x = log_mel.transpose(-1, -2)  # (..., M, T)
        x = self.conv_pre(x)  # (..., C, T)
        for i, up in enumerate(self.ups):
            x = up(x)  # half the channels, `rate` times the samples
            first = i * self.parallel_blocks
            blocks = self.resblocks[first : first + self.parallel_blocks]
            outputs = [block(x) for block in blocks]
            x = sum(outputs) / self.parallel_blocks
        x = self.activation_post(x)
        x = self.conv_post(x)  # (..., 1, T * hop)
        x = x.squeeze(-2)
        return x.tanh() if self.tanh else x.clamp(-1, 1)

    def batch(self, log_mels: list[Tensor]) -> list[Tensor]:
        """Log-mels (T, M) -> waves (T * hop,), each as `forward` makes it alone.

        What a batch is padded with is heard in the last `reach` frames of a clip: these are made again, from
        its last frames, which end where the clip does.
        """
        lengths = [len(log_mel) for log_mel in log_mels]
        if len(set(lengths)) == 1:
            return list(self(torch.stack(log_mels)))
        if min(lengths) < 2 * self.reach:
            return [self(log_mel) for log_mel in log_mels]
        heads = self(pad_sequence(log_mels, batch_first=True))
        tails = self(torch.stack([log_mel[-2 * self.reach :] for log_mel in log_mels]))
        after = self.reach * self.hop
        waves = []
        for head, tail, length in zip(heads, tails, lengths):
            before = (length - self.reach) * self.hop
            waves.append(torch.cat([head[:before], tail[after:]]))
        return waves


def find_reach(config: dict) -> int:
    """How many frames before and after its own a sample of BigVGAN depends on, at most."""
    reach = 3.0  # conv_pre
    rate = 1  # samples a frame
    pairs = str(config["resblock"]) != "2"
    settings = zip(config["upsample_rates"], config["upsample_kernel_sizes"])
    for up, up_kernel in settings:
        reach += (up_kernel / 2 / up + 1) / rate
        rate *= up
        farthest = 0
        for kernel, dilations in zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"]):
            half = kernel // 2
            steps = half * sum(dilations) + ACTIVATION_REACH * len(dilations)
            if pairs:  # a plain convolution after each dilated one, an activation before it
                steps += (half + ACTIVATION_REACH) * len(dilations)
            farthest = max(farthest, steps)
        reach += farthest / rate
    reach += (ACTIVATION_REACH + 3) / rate  # activation_post, conv_post
    return math.ceil(reach)


class AMPBlock1(nn.Module):
    """Residual pairs of a dilated and a plain convolution, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs1 = nn.ModuleList(same_conv1d(width, width, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(same_conv1d(width, width, kernel) for _ in dilations)
        self.activations = nn.ModuleList(Activation(width, beta) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        first_acts = self.activations[::2]
        second_acts = self.activations[1::2]
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, first_acts, second_acts):
            h = act1(x)
            h = conv1(h)
            h = act2(h)
            x = x + conv2(h)
        return x


class AMPBlock2(nn.Module):
    """Residual dilated convolutions, a periodic activation before each."""

    def __init__(self, width: int, kernel: int, dilations: list[int], beta: bool):
        super().__init__()
        self.convs = nn.ModuleList(same_conv1d(width, width, kernel, d) for d in dilations)
        self.activations = nn.ModuleList(Activation(width, beta) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.convs, self.activations):
            h = act(x)
            x = x + conv(h)
        return x


class Activation(nn.Module):
    """Snake at twice the sampling rate: what lies above the Nyquist frequency is filtered, not aliased."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.act = Snake(width, beta)
        self.upsample = LowPassFilter()
        self.downsample = nn.ModuleDict({"lowpass": LowPassFilter()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample.upsample(x)  # (..., C, 2 T)
        x = self.act(x)
        return self.downsample["lowpass"].downsample(x)  # (..., C, T)


class Snake(nn.Module):
    """x + sin(a x)^2 / b by channel, a and b as logarithms; plain snake has b = a (Ziyin et al. 2020)."""

    def __init__(self, width: int, beta: bool):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.alpha.exp()[:, None]  # (C, 1)
        b = a if self.beta is None else self.beta.exp()[:, None]
        sine = torch.sin(a * x)
        return x + sine.square() / (b + 1e-9)


class LowPassFilter(nn.Module):
    """12 taps of a Kaiser-windowed sinc that cut at a quarter of the sampling rate; their sum is 1."""

    def __init__(self):
        super().__init__()
        # dB, 6 taps a side, transition 0.3 (Kaiser 1974): 51.0
        attenuation = 2.285 * 5 * math.pi * 1.2 + 7.95
        beta = 0.1102 * (attenuation - 8.7)
        window = torch.kaiser_window(12, periodic=False, beta=beta)
        time = (torch.arange(12) - 5.5) / 2
        taps = window * torch.sinc(time)
        taps = taps / taps.sum()
        self.register_buffer("filter", taps[None, None])

    def upsample(self, x: Tensor) -> Tensor:
        """x (..., C, T) -> (..., C, 2 T)."""
        channels = x.shape[-2]
        kernels = self.filter.expand(channels, -1, -1)
        x = F.pad(x, (5, 5), mode="replicate")
        # padding 15: the 5 samples above, twice, and the filter's delay of 5
        x = F.conv_transpose1d(x, kernels, stride=2, padding=15, groups=channels)
        return 2 * x

    def downsample(self, x: Tensor) -> Tensor:
        """x (..., C, 2 T) -> (..., C, T)."""
        channels = x.shape[-2]
        kernels = self.filter.expand(channels, -1, -1)
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, kernels, stride=2, groups=channels)


def same_conv1d(
    channels: int, out_channels: int, kernel: int, dilation: int = 1, bias: bool = True
) -> nn.Conv1d:
    """A convolution that keeps the length."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, out_channels, kernel, dilation=dilation, padding=padding, bias=bias)
