"""Sound in and out: wav files, log-mel, Griffin-Lim, and espeak-ng for corpora made on the spot.

A wave is a float32 tensor (N,) in [-1, 1]; a log-mel is (T, M), natural log, frame m centred on sample (m + 1/2) hop,
T = N // hop: exactly what NVIDIA's BigVGAN is trained on (meldataset.py, mel_spectrogram with center=False).
"""

import ctypes
import functools
import math
import threading

import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional

from config import Mel, UserError

LOG_FLOOR = 1e-5                     # magnitudes below are clamped: silence is ln 1e-5 = -11.51


def load_wav(path: str, sample_rate: int) -> torch.Tensor:
    """A mono wave (N,) at `sample_rate` from any file libsndfile reads; channels are averaged, other rates resampled."""
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as e:
        raise UserError(f"{path}: not a readable sound file ({str(e).splitlines()[0]})") from e
    return resample(torch.from_numpy(samples).mean(1), rate, sample_rate)


def save_wav(path: str, wave: torch.Tensor, sample_rate: int) -> None:
    """Write a wave (N,) as 16-bit PCM; what lies outside [-1, 1] is clipped."""
    soundfile.write(str(path), wave.detach().float().cpu().clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")


def resample(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """A wave (N,) at `rate` Hz -> the same sound at `new_rate` Hz."""
    return wave if rate == new_rate else torchaudio.functional.resample(wave, rate, new_rate)


def log_mel(wave: torch.Tensor, mel: Mel) -> torch.Tensor:
    """wave (N,) -> log-mel (N // hop, M); a wave shorter than one hop is padded to one frame."""
    pad = (mel.n_fft - mel.hop) // 2
    wave = F.pad(wave, (0, max(0, pad + 1 - len(wave))))     # reflection needs more samples than it mirrors
    wave = F.pad(wave[None], (pad, pad), mode="reflect")[0]
    spectrum = torch.stft(wave, mel.n_fft, mel.hop, window=window(mel.n_fft), center=False, return_complex=True)
    magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()            # (n_fft / 2 + 1, T)
    return (mel_filters(mel) @ magnitude).clamp_min(LOG_FLOOR).log().T.contiguous()


def normalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Log-mel to what the network sees: zero mean, unit deviation over the training set."""
    return (x - mean) / std


def denormalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return x * std + mean


def griffin_lim(x: torch.Tensor, mel: Mel, iterations: int = 32, momentum: float = 0.99) -> torch.Tensor:
    """log-mel (T, M) -> wave (T * hop,): phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013), from a fixed start."""
    magnitude = invert_mel(x.float().cpu(), mel)                                         # (n_fft / 2 + 1, T)
    if magnitude.shape[1] < 2:
        return torch.zeros(magnitude.shape[1] * mel.hop)
    hann, length = window(mel.n_fft), (magnitude.shape[1] - 1) * mel.hop
    noise = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    phase, previous = torch.polar(torch.ones_like(noise), 2 * math.pi * noise), torch.zeros(())
    for _ in range(iterations):
        wave = torch.istft(magnitude * phase, mel.n_fft, mel.hop, window=hann, length=length)
        rebuilt = torch.stft(wave, mel.n_fft, mel.hop, window=hann, pad_mode="constant", return_complex=True)
        ahead = rebuilt + momentum * (rebuilt - previous)
        phase, previous = ahead / ahead.abs().clamp_min(1e-9), rebuilt
    wave = torch.istft(magnitude * phase, mel.n_fft, mel.hop, window=hann, length=length)
    return F.pad(wave, (mel.hop // 2, mel.hop - mel.hop // 2))     # istft centres frame m on m hop, log_mel on (m + 1/2) hop


def invert_mel(x: torch.Tensor, mel: Mel, iterations: int = 30) -> torch.Tensor:
    """log-mel (T, M) -> magnitude (n_fft / 2 + 1, T), never negative, by multiplicative updates (Lee, Seung 2001).

    Heard and measured better than the pseudo-inverse, which rings into negative bins.
    """
    filters, target = mel_filters(mel), x.exp().T                                        # (M, bins), (M, T)
    magnitude = filters.T @ (target / filters.sum(1, keepdim=True))
    back = filters.T @ target
    for _ in range(iterations):
        magnitude = magnitude * back / (filters.T @ (filters @ magnitude)).clamp_min(1e-12)
    return magnitude


@functools.cache
def window(n_fft: int) -> torch.Tensor:
    return torch.hann_window(n_fft)


@functools.cache
def mel_filters(mel: Mel) -> torch.Tensor:
    """(M, n_fft / 2 + 1) triangles on Slaney's scale, each of unit area, as librosa and BigVGAN."""
    return torchaudio.functional.melscale_fbanks(mel.n_fft // 2 + 1, mel.fmin, mel.fmax, mel.n_mels, mel.sample_rate,
                                                 norm="slaney", mel_scale="slaney").T.contiguous()


# espeak-ng by ctypes: the wheel `espeakng-loader` carries the library and its voices; constants from espeak-ng's speak_lib.h.
ESPEAK_RATE, ESPEAK_PITCH, ESPEAK_RANGE = 1, 3, 4
ESPEAK_LOCK = threading.Lock()                                 # the library keeps one global voice


def espeak(text: str, sample_rate: int, voice: str = "en-us", rate: int = 160, pitch: int = 50, pitch_range: int = 50) -> torch.Tensor:
    """Speak `text` with espeak-ng: a wave (N,) in about 4 ms a sentence; lengths vary by a few samples from call to call.

    rate: words a minute. pitch, pitch_range: 0 to 100.
    raises UserError for a voice that espeak-ng does not have.
    """
    with ESPEAK_LOCK:
        library, native_rate, chunks = espeak_library()
        chunks.clear()
        for parameter, value in ((ESPEAK_RATE, rate), (ESPEAK_PITCH, pitch), (ESPEAK_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}")
        data = text.encode()
        utf8 = 1
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, utf8, None, None)
        pcm = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.int16) if chunks else torch.zeros(0, dtype=torch.int16)
    return resample(pcm.float() / 32768, native_rate, sample_rate)


@functools.cache
def espeak_library() -> tuple[ctypes.CDLL, int, list[bytes]]:
    """The loaded library, its rate in Hz, and the list that its callback appends PCM to."""
    import espeakng_loader
    library, chunks = ctypes.CDLL(espeakng_loader.get_library_path()), []
    synchronous = 2
    rate = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise UserError("espeak-ng did not start: reinstall espeakng-loader")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, _events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(receive)
    library.receive = receive                                  # the C side holds no reference: keep the callback alive here
    return library, rate, chunks
