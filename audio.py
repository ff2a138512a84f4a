"""Sound in and out: wav files, log-mel, Griffin-Lim.

A wave is a float32 tensor (N,) in [-1, 1]. A log-mel is (T, M), natural log, T = N // hop, frame m centred on
sample (m + 1/2) hop: exactly what NVIDIA's BigVGAN is trained on (meldataset.py, mel_spectrogram with
center=False); with Mel.centred on sample m hop: exactly what AudioLDM2's VAE and vocoder are trained on.
`python audio.py encode|decode|roundtrip` is the picture codec of klein/picture.py.
"""

import functools
import math

import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional

from config import Mel, UserError, run_main

LOG_FLOOR = 1e-5  # magnitudes below are clamped: silence is ln 1e-5 = -11.51


def load_wav(path: str, sample_rate: int) -> torch.Tensor:
    """A mono wave (N,) at `sample_rate` of any file libsndfile reads: channels averaged, resampled."""
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path}: not a readable sound file ({reason})") from e
    wave = torch.from_numpy(samples).mean(1)
    return resample(wave, rate, sample_rate)


def save_wav(path: str, wave: torch.Tensor, sample_rate: int) -> None:
    """Write a wave (N,) as 16-bit PCM, clipped to [-1, 1]. raises UserError where it cannot be written."""
    wave = wave.detach().float().cpu()
    samples = wave.clamp(-1, 1).numpy()
    try:
        soundfile.write(str(path), samples, sample_rate, subtype="PCM_16")
    except (soundfile.LibsndfileError, OSError) as e:
        raise UserError(f"{path}: cannot be written ({e})") from e


def resample(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """A wave (N,) at `rate` Hz -> the same sound at `new_rate` Hz."""
    if rate == new_rate:
        return wave
    return torchaudio.functional.resample(wave, rate, new_rate)


def log_mel(wave: torch.Tensor, mel: Mel) -> torch.Tensor:
    """wave (N,) -> log-mel (N // hop, M); a wave shorter than one hop is padded to one frame."""
    length = max(1, len(wave) // mel.hop)
    overlap = mel.n_fft if mel.centred else mel.n_fft - mel.hop
    pad = overlap // 2
    missing = max(0, pad + 1 - len(wave))  # reflection needs more samples than it mirrors
    wave = F.pad(wave, (0, missing))
    wave = F.pad(wave[None], (pad, pad), mode="reflect")[0]
    hann = hann_window(mel.n_fft)
    spectrum = torch.stft(wave, mel.n_fft, mel.hop, window=hann, center=False, return_complex=True)
    spectrum = spectrum[:, :length]
    parts = torch.view_as_real(spectrum)  # (n_fft / 2 + 1, T, 2)
    power = parts.square().sum(-1)
    if not mel.centred:  # as BigVGAN
        power = power + 1e-9
    magnitudes = power.sqrt()
    filters = mel_filters(mel)
    mel_magnitudes = filters @ magnitudes  # (M, T)
    log_mels = mel_magnitudes.clamp_min(LOG_FLOOR).log()
    return log_mels.T.contiguous()


def normalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Log-mel to what the network sees: zero mean, unit deviation over the training set."""
    return (x - mean) / std


def denormalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return x * std + mean


def griffin_lim(x: torch.Tensor, mel: Mel, iterations: int = 32, momentum: float = 0.99) -> torch.Tensor:
    """log-mel (T, M) -> wave (T * hop,)."""
    magnitudes = invert_mel(x.float().cpu(), mel)  # (n_fft / 2 + 1, T)
    length = magnitudes.shape[1]
    if length < 2:
        return torch.zeros(length * mel.hop)
    wave = reconstruct_phase(magnitudes, mel.n_fft, mel.hop, iterations, momentum)
    if mel.centred:
        return F.pad(wave, (0, mel.hop))
    start = mel.hop // 2  # frame m of the log-mel is centred on (m + 1/2) hop, here it is on m hop
    return F.pad(wave, (start, mel.hop - start))


def reconstruct_phase(
    magnitudes: torch.Tensor, n_fft: int, hop: int, iterations: int, momentum: float = 0.99
) -> torch.Tensor:
    """magnitudes (n_fft / 2 + 1, T) -> wave ((T - 1) * hop,), frame m centred on sample m hop, T at least 2.

    Phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013), from a fixed random start.
    """
    device = magnitudes.device
    hann = hann_window(n_fft).to(device)
    length = (magnitudes.shape[1] - 1) * hop
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(magnitudes.shape, generator=generator).to(device)
    ones = torch.ones_like(noise)
    phase = torch.polar(ones, 2 * math.pi * noise)
    previous = torch.zeros((), device=device)
    for _ in range(iterations):
        wave = torch.istft(magnitudes * phase, n_fft, hop, window=hann, length=length)
        rebuilt = torch.stft(wave, n_fft, hop, window=hann, pad_mode="constant", return_complex=True)
        change = rebuilt - previous
        accelerated = rebuilt + momentum * change
        norm = accelerated.abs().clamp_min(1e-9)
        phase = accelerated / norm
        previous = rebuilt
    return torch.istft(magnitudes * phase, n_fft, hop, window=hann, length=length)


def invert_mel(x: torch.Tensor, mel: Mel, iterations: int = 30) -> torch.Tensor:
    """log-mel (T, M) -> magnitudes (n_fft / 2 + 1, T), never negative.

    Multiplicative updates (Lee, Seung 2001) sound and measure better than the pseudo-inverse, which rings
    into negative bins.
    """
    filters = mel_filters(mel)  # (M, n_fft / 2 + 1)
    target = x.exp().T  # (M, T)
    areas = filters.sum(1, keepdim=True)
    magnitudes = filters.T @ (target / areas)
    wanted = filters.T @ target
    for _ in range(iterations):
        reached = filters.T @ (filters @ magnitudes)
        magnitudes = magnitudes * wanted / reached.clamp_min(1e-12)
    return magnitudes


@functools.cache
def hann_window(n_fft: int) -> torch.Tensor:
    return torch.hann_window(n_fft)


@functools.cache
def mel_filters(mel: Mel) -> torch.Tensor:
    """(M, n_fft / 2 + 1) triangles on Slaney's scale, each of unit area, as librosa and BigVGAN."""
    bins = mel.n_fft // 2 + 1
    filters = torchaudio.functional.melscale_fbanks(
        bins, mel.fmin, mel.fmax, mel.n_mels, mel.sample_rate, norm="slaney", mel_scale="slaney"
    )
    return filters.T.contiguous()


if __name__ == "__main__":
    import system

    run_main(system.find("spectrogram").commands)  # encode, decode, roundtrip: the picture codec is its own
