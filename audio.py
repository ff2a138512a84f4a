"""Sound in and out: wav files, log-mel, Griffin-Lim.

A wave is a float32 tensor (N,) in [-1, 1]. A log-mel is (T, M), natural log, T = N // hop, frame m centred on
sample (m + 1/2) hop: exactly what NVIDIA's BigVGAN is trained on (meldataset.py, mel_spectrogram with
center=False); with Mel.centred on sample m hop: exactly what AudioLDM2's VAE and vocoder are trained on.
`python audio.py encode|decode|roundtrip` is the picture codec of klein/picture.py.
"""

import functools
import io
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional

from config import Mel, UserError, WriteError
from entry import run_main

LOG_FLOOR = 1e-5  # magnitudes below are clamped: silence is ln 1e-5 = -11.51
LOUDEST = 4.0  # 12 dB above full scale: samples beyond are no float's
HEADER_BYTES = 4096  # of a wav, within which its samples begin
BLOCK = 2**18  # samples of all channels that are read at once
RATES = (1000, 1_000_000)  # Hz: what lies outside is no rate but damage, and would be resampled to gigabytes
MOST_TAPS = 2**22  # of a resampling filter in all its phases, about
UNKNOWN_LENGTH = b"\xff" * 4  # with which libsndfile reads to the end of the file


def load_wav(path: str, sample_rate: int) -> torch.Tensor:
    """A mono wave (N,) at `sample_rate` of any file libsndfile reads: channels mixed, resampled.

    raises UserError for what cannot be read, for a file without a sample, and for one that is not in [-1, 1].
    """
    try:
        samples, rate = read_samples(path)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not a readable sound file ({reason})") from e
    if not len(samples):
        raise UserError(f"{path}: there is not a single sample in it")
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"{path}: a sample rate of {rate} Hz is none of a sound; its header is damaged")
    check_scale(samples, path)
    wave = mix_channels(samples)
    return resample(wave, rate, sample_rate)


class Stream(soundfile.SoundFile):
    """A sound that is read from its beginning to its end, whatever its header says of its length."""

    def seekable(self) -> bool:
        return False


def read_samples(path: str) -> tuple[torch.Tensor, int]:
    """All samples (N, C) of a sound file, and its rate in Hz; raises what libsndfile does."""
    blocks = []
    with Stream(open_sound(path)) as sound:
        length = math.ceil(BLOCK / sound.channels)
        while not blocks or len(blocks[-1]) == length:
            block = sound.read(length, dtype="float32", always_2d=True)
            blocks.append(torch.from_numpy(block))
    return torch.cat(blocks), sound.samplerate


def open_sound(path: str) -> str | io.BytesIO:
    """What libsndfile is to read: the file, or a copy of a wav whose header does not know its length.

    What is written to a pipe keeps the length of its beginning. Where that is 0, libsndfile reads nothing.
    """
    path = str(path)
    if not os.path.isfile(path):  # nor a pipe: it can be read only once
        return path
    with open(path, "rb") as f:
        header = f.read(HEADER_BYTES)
    start = header.find(b"data") + 4
    stop = start + 4
    whole = int.from_bytes(header[4:8], "little") + 8  # as the header has it: right where 0 samples are meant
    is_wav = header[:4] == b"RIFF"
    if not is_wav or header[start:stop] != bytes(4) or whole == os.path.getsize(path):
        return path
    content = Path(path).read_bytes()
    return io.BytesIO(content[:start] + UNKNOWN_LENGTH + content[stop:])


def check_scale(samples: torch.Tensor, path: str) -> None:
    """raises UserError for a float wav with the numbers of integers; what peaks a little above 1 passes."""
    peak = samples.abs().max().item()
    if LOUDEST < peak < math.inf:
        raise UserError(
            f"{path}: peaks at {peak:g}, not below 1: divide its samples, by 32768 if they are int16's"
        )


def mix_channels(samples: torch.Tensor) -> torch.Tensor:
    """Channels (N, C) -> their mean (N,); where they cancel, as by a cable soldered wrongly, the loudest.

    The sum of channels that have nothing in common has the power of them all: cancelled is 7 dB below.
    """
    powers = samples.square().mean(0)  # (C,)
    sum_power = samples.sum(1).square().mean()
    if sum_power < 0.2 * powers.sum():
        return samples[:, powers.argmax()]
    return samples.mean(1)


def save_wav(path: str, wave: torch.Tensor, sample_rate: int) -> None:
    """Write a wave (N,) as 16-bit PCM, clipped to [-1, 1]. raises WriteError where it cannot be written."""
    wave = wave.detach().float().cpu()
    samples = wave.clamp(-1, 1).numpy()
    try:
        soundfile.write(str(path), samples, sample_rate, subtype="PCM_16")
    except (soundfile.LibsndfileError, OSError) as e:
        raise WriteError(f"{path}: cannot be written ({e})") from e


def resample(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """A wave (N,) at `rate` Hz -> the same sound at `new_rate` Hz.

    Two rates that have nothing in common, as 44099 and 16000, would need a filter for each of 16,000 phases,
    gigabytes in all: their ratio is rounded, by a millionth.
    """
    if rate == new_rate:
        return wave
    ratio = Fraction(rate, new_rate)
    if ratio.denominator * ratio.numerator > MOST_TAPS:
        ratio = ratio.limit_denominator(1000)
    return torchaudio.functional.resample(wave, ratio.numerator, ratio.denominator)


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
    return griffin_lim_batch([x], mel, iterations, momentum)[0]


def griffin_lim_batch(
    log_mels: list[torch.Tensor], mel: Mel, iterations: int = 32, momentum: float = 0.99
) -> list[torch.Tensor]:
    """log-mels (T, M), on CUDA or else taken to the CPU -> waves (T * hop,), on the CPU.

    No iteration goes back to the magnitudes that were guessed from the log-mel: each takes those of its own
    wave and moves them towards the log-mel. So harmonics appear that the filters had blurred.
    """
    lengths = [len(x) for x in log_mels]
    together = torch.cat(log_mels).float()
    if not together.is_cuda:
        together = together.cpu()
    magnitudes = invert_mel(together, mel).split(lengths, 1)  # (n_fft / 2 + 1, T) each
    targets = together.exp().T
    targets = targets.split(lengths, 1)  # (M, T) each
    long = [n for n, length in enumerate(lengths) if length > 1]
    found = [torch.zeros(length * mel.hop) for length in lengths]
    waves = []
    if long:
        chosen = [magnitudes[n] for n in long]
        target = [targets[n] for n in long]
        target = stack_padded(target)
        fit = functools.partial(fit_mel, target=target, mel=mel)
        waves = reconstruct_phases(chosen, mel.n_fft, mel.hop, iterations, momentum, fit)
    # frame m of a log-mel is centred on (m + 1/2) hop, unless centred, here it is on m hop
    start = 0 if mel.centred else mel.hop // 2
    for n, wave in zip(long, waves):
        found[n] = F.pad(wave.cpu(), (start, mel.hop - start))
    return found


def reconstruct_phase(
    magnitudes: torch.Tensor, n_fft: int, hop: int, iterations: int, momentum: float = 0.99
) -> torch.Tensor:
    """magnitudes (n_fft / 2 + 1, T), T > 1 -> wave ((T - 1) * hop,), frame m centred on sample m hop."""
    return reconstruct_phases([magnitudes], n_fft, hop, iterations, momentum)[0]


def reconstruct_phases(
    magnitudes: list[torch.Tensor],
    n_fft: int,
    hop: int,
    iterations: int,
    momentum: float = 0.99,
    fit: Callable[[torch.Tensor], torch.Tensor] | None = None,
    start: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """As `reconstruct_phase` of each, as one batch: what they are padded with is heard in none.

    Phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013).
    fit: makes the next magnitudes (B, n_fft / 2 + 1, T) of those of the wave; None: they stay as given.
    start: makes the first phases, in radians, of the magnitudes and the hop; None: `advance_phases`.
    """
    device = magnitudes[0].device
    hann = hann_window(n_fft).to(device)
    frames = [clip.shape[1] for clip in magnitudes]
    length = (max(frames) - 1) * hop
    ends = end_factors(frames, n_fft, hop).to(device)  # (B, N)
    wanted = stack_padded(magnitudes)  # (B, n_fft / 2 + 1, T)
    angles = (start or advance_phases)(wanted, hop)
    phase = torch.polar(torch.ones_like(wanted), angles)
    previous = torch.zeros((), device=device)
    for _ in range(iterations):
        waves = ends * torch.istft(wanted * phase, n_fft, hop, window=hann, length=length)
        rebuilt = torch.stft(waves, n_fft, hop, window=hann, pad_mode="constant", return_complex=True)
        change = rebuilt - previous
        accelerated = rebuilt + momentum * change
        norm = accelerated.abs().clamp_min(1e-9)
        phase = accelerated / norm
        previous = rebuilt
        if fit:
            wanted = fit(rebuilt.abs())
    waves = ends * torch.istft(wanted * phase, n_fft, hop, window=hann, length=length)
    return [wave[: (n - 1) * hop] for wave, n in zip(waves, frames)]


def stack_padded(clips: list[torch.Tensor]) -> torch.Tensor:
    """(rows, T) each -> (B, rows, the longest T), 0 behind the shorter ones."""
    longest = max(clip.shape[1] for clip in clips)
    padded = []
    for clip in clips:
        missing = longest - clip.shape[1]
        padded.append(F.pad(clip, (0, missing)))
    return torch.stack(padded)


def advance_phases(magnitudes: torch.Tensor, hop: int) -> torch.Tensor:
    """A first guess of the phases, in radians, of magnitudes (B, n_fft / 2 + 1, T).

    From frame to frame each bin turns at the frequency of its nearest peak, as in single pass spectrogram
    inversion (Beauregard et al. 2015). There it goes on from the peak's phase, here from its own, which
    needs no loop over frames.
    """
    count = magnitudes.shape[1]
    n_fft = 2 * (count - 1)
    bins = torch.arange(count, device=magnitudes.device)
    bins = bins[:, None]
    logs = magnitudes.clamp_min(1e-9).log()
    rise = logs.diff(dim=1)
    up = rise[:, :-1]
    down = rise[:, 1:]
    is_peak = (up >= 0) & (down < 0)
    shift = (up + down) / (up - down) / 2  # to the top of the parabola through three bins
    shift = torch.where(is_peak, shift, 0)
    edges = (0, 0, 1, 1)
    is_peak = F.pad(is_peak, edges)
    place = bins + F.pad(shift, edges)
    below = torch.where(is_peak, bins, -count)
    below = below.cummax(1).values
    above = torch.where(is_peak, bins, 2 * count)
    above = above.flip(1).cummin(1).values.flip(1)
    is_below = bins - below <= above - bins
    nearest = torch.where(is_below, below, above)
    nearest = nearest.clamp(0, count - 1)
    turns = place.gather(1, nearest) * hop / n_fft  # in the time of a hop
    phases = (turns % 1).cumsum(2)
    # torch.stft counts phases from a frame's beginning: about its centre, neighbours are half a turn apart
    phases = phases + bins / 2
    return 2 * math.pi * (phases % 1)


def end_factors(frames: list[int], n_fft: int, hop: int) -> torch.Tensor:
    """(B, N): what makes of the waves of a padded batch, by torch.istft, those of each clip alone.

    It divides by the windows of all frames, those of the padding included, and goes on after a clip's end.
    """
    longest = max(frames)
    lengths = torch.tensor(frames)[:, None]
    is_frame = torch.arange(longest) < lengths  # (B, T)
    window = hann_window(n_fft).square()
    own = F.conv_transpose1d(is_frame[:, None].float(), window[None, None], stride=hop)[:, 0]
    own = own[:, n_fft // 2 :][:, : (longest - 1) * hop]  # (B, N)
    of_all = own[frames.index(longest)]
    is_sound = torch.arange(own.shape[1]) < (lengths - 1) * hop
    return torch.where(is_sound, of_all / own, 0)


def invert_mel(x: torch.Tensor, mel: Mel, iterations: int = 30) -> torch.Tensor:
    """log-mel (T, M) -> magnitudes (n_fft / 2 + 1, T), never negative.

    Multiplicative updates sound and measure better than the pseudo-inverse, which rings into negative bins.
    """
    target = x.exp().T  # (M, T)
    filters = mel_filters(mel).to(x)  # (M, n_fft / 2 + 1)
    areas = filters.sum(1, keepdim=True)
    magnitudes = filters.T @ (target / areas)
    for _ in range(iterations):
        magnitudes = fit_mel(magnitudes, target, mel)
    return magnitudes


def fit_mel(magnitudes: torch.Tensor, target: torch.Tensor, mel: Mel) -> torch.Tensor:
    """Magnitudes (..., n_fft / 2 + 1, T), a step nearer to those that have the mel (..., M, T); 0 stays 0.

    For Kullback and Leibler's divergence (Lee, Seung 2001), to which quiet bands count more than to squares.
    """
    dtype = magnitudes.dtype
    if magnitudes.is_cuda:  # training lets float32 products be of TF32's 11 bits there
        magnitudes = magnitudes.double()
    target = target.to(magnitudes)
    filters = mel_filters(mel).to(magnitudes)  # (M, n_fft / 2 + 1)
    weights = filters.sum(0).clamp_min(1e-12)
    reached = filters @ magnitudes
    ratios = target / reached.clamp_min(1e-12)
    sums = filters.T @ ratios
    factors = sums / weights[:, None]
    fitted = magnitudes * factors
    return fitted.to(dtype)


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
