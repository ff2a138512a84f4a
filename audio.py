"""Sound in and out: wav files, log-mel, sound as a picture and back, Griffin-Lim.

A wave is a float32 tensor (N,) in [-1, 1]; a log-mel is (T, M), natural log, frame m centred on sample (m + 1/2) hop,
T = N // hop: exactly what NVIDIA's BigVGAN is trained on (meldataset.py, mel_spectrogram with center=False); with Mel.centred on
sample m hop: exactly what AudioLDM2's VAE and vocoder are trained on.
A picture is (3, H, W) in [0, 1], as sonic-plantain paints them: row 0 is 0 Hz, frame m is centred on sample m hop, T = N // hop + 1, and
[-80, 0] dB is a walk along seven edges of the RGB cube. `python audio.py encode a.wav a.png`, `decode a.png a.wav`, `roundtrip a.wav`.
"""

import argparse
import functools
import itertools
import json
import math
import os
import tempfile
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional
from PIL import Image, PngImagePlugin

from config import Mel, UserError, from_dict, run_main
from klein_config import Picture

LOG_FLOOR = 1e-5                     # magnitudes below are clamped: silence is ln 1e-5 = -11.51


def load_wav(path: str, sample_rate: int) -> torch.Tensor:
    """A mono wave (N,) at `sample_rate` from any file libsndfile reads; channels are averaged, other rates resampled."""
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError) as e:
        raise UserError(f"{path}: not a readable sound file ({str(e).splitlines()[0]})") from e
    return resample(torch.from_numpy(samples).mean(1), rate, sample_rate)


def save_wav(path: str, wave: torch.Tensor, sample_rate: int) -> None:
    """Write a wave (N,) as 16-bit PCM; what lies outside [-1, 1] is clipped. raises UserError where it cannot be written."""
    try:
        soundfile.write(str(path), wave.detach().float().cpu().clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")
    except (soundfile.LibsndfileError, OSError) as e:
        raise UserError(f"{path}: cannot be written ({e})") from e


def resample(wave: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """A wave (N,) at `rate` Hz -> the same sound at `new_rate` Hz."""
    return wave if rate == new_rate else torchaudio.functional.resample(wave, rate, new_rate)


def log_mel(wave: torch.Tensor, mel: Mel) -> torch.Tensor:
    """wave (N,) -> log-mel (N // hop, M); a wave shorter than one hop is padded to one frame."""
    pad, frames = mel.n_fft // 2 if mel.centred else (mel.n_fft - mel.hop) // 2, max(1, len(wave) // mel.hop)
    wave = F.pad(wave, (0, max(0, pad + 1 - len(wave))))     # reflection needs more samples than it mirrors
    wave = F.pad(wave[None], (pad, pad), mode="reflect")[0]
    spectrum = torch.stft(wave, mel.n_fft, mel.hop, window=window(mel.n_fft), center=False, return_complex=True)
    power = torch.view_as_real(spectrum[:, :frames]).square().sum(-1)                    # (n_fft / 2 + 1, T)
    magnitude = (power if mel.centred else power + 1e-9).sqrt()
    return (mel_filters(mel) @ magnitude).clamp_min(LOG_FLOOR).log().T.contiguous()


def draw_crop(wave: torch.Tensor, samples: int, rng: np.random.Generator) -> torch.Tensor:
    """A random stretch (samples,) of a piece (N,): no mean, peak 0.5, silence after its end; never one that is silent.

    Of eight places the first is taken that comes within 40 dB of the piece's peak, or else the peak's own.
    """
    level, last = (wave - wave.mean()).abs(), max(0, len(wave) - samples)
    starts = [*rng.integers(0, last + 1, 8).tolist(), min(last, max(0, level.argmax().item() - samples // 2))]
    start = next(start for start in starts if start == starts[-1] or level[start:start + samples].max() > 0.01 * level.max())
    crop = wave[start:start + samples] - wave[start:start + samples].mean()
    return F.pad(0.5 * crop / crop.abs().max().clamp_min(1e-9), (0, samples - len(crop)))


def normalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Log-mel to what the network sees: zero mean, unit deviation over the training set."""
    return (x - mean) / std


def denormalise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return x * std + mean


def griffin_lim(x: torch.Tensor, mel: Mel, iterations: int = 32, momentum: float = 0.99) -> torch.Tensor:
    """log-mel (T, M) -> wave (T * hop,)."""
    magnitude = invert_mel(x.float().cpu(), mel)                                         # (n_fft / 2 + 1, T)
    if magnitude.shape[1] < 2:
        return torch.zeros(magnitude.shape[1] * mel.hop)
    wave = find_phase(magnitude, mel.n_fft, mel.hop, iterations, momentum)
    start = 0 if mel.centred else mel.hop // 2                     # find_phase centres frame m on m hop, log_mel on (m + 1/2) hop
    return F.pad(wave, (start, mel.hop - start))


def find_phase(magnitude: torch.Tensor, n_fft: int, hop: int, iterations: int, momentum: float = 0.99) -> torch.Tensor:
    """magnitude (n_fft / 2 + 1, T) -> wave ((T - 1) * hop,), frame m centred on sample m hop, T at least 2.

    Phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013), from a fixed start.
    """
    hann, length = window(n_fft).to(magnitude.device), (magnitude.shape[1] - 1) * hop
    noise = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)).to(magnitude.device)
    phase, previous = torch.polar(torch.ones_like(noise), 2 * math.pi * noise), torch.zeros((), device=magnitude.device)
    for _ in range(iterations):
        wave = torch.istft(magnitude * phase, n_fft, hop, window=hann, length=length)
        rebuilt = torch.stft(wave, n_fft, hop, window=hann, pad_mode="constant", return_complex=True)
        ahead = rebuilt + momentum * (rebuilt - previous)
        phase, previous = ahead / ahead.abs().clamp_min(1e-9), rebuilt
    return torch.istft(magnitude * phase, n_fft, hop, window=hann, length=length)


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


# Sound as a picture

FLOOR_DB = -80.0                     # black; quieter is painted black too
PATH = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1))    # black blue cyan green yellow red ...
CHUNK = "nanoaudio"                  # tEXt chunk of a PNG: the Picture and other facts, as JSON


def paint(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N), ended by silence or cut to p.seconds -> picture (..., 3, H, W) in [0, 1], black where nothing is."""
    db = levels(F.pad(wave, (0, int(p.seconds * p.sample_rate) - wave.shape[-1])), p)[..., :p.canvas_height, :]
    picture = colour(1 - db.repeat_interleave(p.stretch, -1) / FLOOR_DB).movedim(-1, -3)
    return F.pad(picture, (0, p.canvas_width - picture.shape[-1], 0, p.canvas_height - picture.shape[-2]))


def unpaint(picture: torch.Tensor, p: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    """picture (..., 3, H, W) -> dB (..., bins, T) in [-80, 0], and how far off the path each colour was: 0 is sure, 0.71 a mere guess.

    bins: n_fft / 2 + 1, or H where the canvas is lower. A frame is the mean of its columns: measured better than one of them.
    """
    bins = min(p.canvas_height, p.n_fft // 2 + 1)
    u, distance = nearest(picture[..., :bins, :frames(p) * p.stretch].float().movedim(-3, -1))
    u, distance = (x.unflatten(-1, (-1, p.stretch)).mean(-1) for x in (u, distance))
    return FLOOR_DB * (1 - u), distance


def colour(u: torch.Tensor) -> torch.Tensor:
    """u (...) in [0, 1], the share of the path that is walked -> RGB (..., 3)."""
    rgb = [torch.zeros_like(u) for _ in range(3)]
    for edge, (start, end) in enumerate(itertools.pairwise(PATH)):
        channel = moving(start, end)
        rgb[channel] = rgb[channel] + (end[channel] - start[channel]) * (7 * u - edge).clamp(0, 1)
    return torch.stack(rgb, -1)


def nearest(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB (..., 3), clamped to [0, 1] -> u (...) of the nearest point of the path and the Euclidean distance to it (...)."""
    rgb = rgb.clamp(0, 1).unbind(-1)
    squares = [(x.square(), (1 - x).square()) for x in rgb]        # of each channel's distance to 0 and to 1
    u, best = torch.zeros_like(rgb[0]), torch.full_like(rgb[0], torch.inf)
    for edge, (start, end) in enumerate(itertools.pairwise(PATH)):
        channel = moving(start, end)
        apart = sum(squares[c][start[c]] for c in range(3) if c != channel)
        along = rgb[channel] if end[channel] else 1 - rgb[channel]
        u, best = torch.where(apart < best, edge + along, u), torch.minimum(apart, best)
    return u / 7, best.sqrt()


def moving(start: tuple, end: tuple) -> int:
    """The one channel in which two neighbouring corners differ: the path is a Gray code."""
    return [a != b for a, b in zip(start, end, strict=True)].index(True)


def frames(p: Picture) -> int:
    """Frames of p.seconds."""
    return int(p.seconds * p.sample_rate) // p.hop + 1


def magnitude(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N) -> (..., n_fft / 2 + 1, T), T = N // hop + 1, frame m centred on sample m hop, silence beyond both ends."""
    hann = window(p.n_fft).to(wave.device)
    return torch.stft(wave, p.n_fft, p.hop, window=hann, pad_mode="constant", return_complex=True).abs()


def zero_db(magnitude: torch.Tensor, p: Picture) -> torch.Tensor:
    """The magnitude (..., 1, 1) that is 0 dB: the clip's own peak, or that of a sine of full scale, which a Hann window makes n_fft / 4."""
    peak = magnitude.amax((-2, -1), keepdim=True).clamp_min(1e-9)
    return peak if p.reference == "peak" else torch.full_like(peak, p.n_fft / 4)


def levels(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N) -> dB (..., n_fft / 2 + 1, T) in [-80, 0]: what `paint` paints."""
    x = magnitude(wave, p)
    return decibels(x, zero_db(x, p))


def decibels(magnitude: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (20 * (magnitude / zero).clamp_min(1e-9).log10()).clamp(FLOOR_DB, 0)


def side_by_side(made: torch.Tensor, wave: torch.Tensor, p: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    """Two waves (N,) as dB (bins, T) below the second's 0 dB, the first at the gain that brings it nearest: a peak knows no loudness."""
    x, y = magnitude(made, p), magnitude(wave, p)
    length = min(x.shape[1], y.shape[1])
    x, y = x[:, :length], y[:, :length]
    gain = (x * y).sum() / x.square().sum().clamp_min(1e-9)
    return decibels(gain * x, zero_db(y, p)), decibels(y, zero_db(y, p))


def log_spectral_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over frames of the RMS over bins of the difference of two dB (bins, T); the longer one's end is left out."""
    length = min(a.shape[1], b.shape[1])
    return (a[:, :length] - b[:, :length]).square().mean(0).sqrt().mean().item()


def listen(level: torch.Tensor, p: Picture, peak: float = 0.0, iterations: int = 60) -> torch.Tensor:
    """dB (bins, T) -> wave ((T - 1) * hop,), phase by Griffin-Lim.

    A frame that is all black is silence, and so are the rows that a low canvas left out. Black among colours sounds as -80 dB: were it
    nothing, PocketSphinx would miss 5 (peak) to 10 (fixed) more words of 100.
    peak: the magnitude of 0 dB; 0 where it is not known: with p.reference "peak" the wave then peaks at 0.9.
    """
    x = 10 ** (level.float() / 20) * (level.amax(0) > FLOOR_DB)
    x = F.pad(x, (0, 0, 0, p.n_fft // 2 + 1 - x.shape[0]))
    if x.shape[1] < 2:
        return level.new_zeros(0)
    known = peak or (p.n_fft / 4 if p.reference == "fixed" else 0.0)
    wave = find_phase(x * (known or 1.0), p.n_fft, p.hop, iterations)
    return wave if known else 0.9 * wave / wave.abs().max().clamp_min(1e-9)


def save_png(path: str, picture: torch.Tensor, p: Picture, **facts) -> None:
    """Write a picture (3, H, W) as 8-bit PNG with its parameters inside.

    facts: JSON values that go along; `peak`, the magnitude of 0 dB, gives `listen` the loudness back.
    raises UserError where it cannot be written.
    """
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    chunks, part = PngImagePlugin.PngInfo(), Path(f"{path}.{os.getpid()}.part")
    chunks.add_text(CHUNK, json.dumps({"picture": asdict(p)} | facts))
    try:
        Image.fromarray(pixels).save(part, "png", pnginfo=chunks)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e


def load_png(path: str) -> tuple[torch.Tensor, Picture | None, dict]:
    """A picture (3, H, W) in [0, 1], its parameters, None where the file has none, and the facts of `save_png`.

    raises UserError for a file that is no picture, or another one than its parameters say.
    """
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), \
                Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            chunk, pixels = image.info.get(CHUNK, ""), image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise UserError(f"{path}: not a readable picture ({' '.join(str(e).split())})") from e
    picture = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(pixels.height, pixels.width, 3).permute(2, 0, 1) / 255
    if not chunk:
        return picture, None, {}
    try:
        facts = json.loads(chunk)
        p = from_dict(Picture, facts.pop("picture"), CHUNK)
        p.check()
        facts["peak"] = float(facts.get("peak", 0.0))
    except (UserError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as e:
        raise UserError(f"{path}: the parameters in it are damaged ({e})") from e
    if (p.canvas_height, p.canvas_width) != picture.shape[1:] or not 0 <= facts["peak"] < math.inf:
        raise UserError(f"{path}: not as it was painted ({p.canvas_width} x {p.canvas_height} pixels): do not scale or cut such a picture")
    return picture, p, facts


# Commands

def main() -> None:
    parser = argparse.ArgumentParser(description="Sound as a picture, and back.")
    parser.add_argument("command", choices=("encode", "decode", "roundtrip"), help="wav to PNG | PNG to wav | what both together lose")
    parser.add_argument("source", help="a sound file; decode: a PNG")
    parser.add_argument("target", nargs="?", default="", help="default: beside the source; roundtrip: the rebuilt wav, written where given")
    for f in fields(Picture):
        default = "that of the sound" if f.name == "seconds" else f.default
        parser.add_argument(f"--{f.name}", type=type(f.default), help=f"default: {default}; decode: as painted")
    parser.add_argument("--recogniser", default="", help="roundtrip: Whisper name or .pt file that listens before and after")
    parser.add_argument("--text", default="", help="roundtrip: what is said; default: what the recogniser hears in the source")
    options = parser.parse_args()
    kind = ".png" if options.command == "encode" else ".wav"
    target = Path(options.target or Path(options.source).with_suffix(kind))
    if target.suffix != kind:
        raise UserError(f"{target}: its name must end in {kind}")
    given = {f.name: getattr(options, f.name) for f in fields(Picture) if getattr(options, f.name) is not None}
    if options.command == "encode":
        encode(options.source, target, given)
    elif options.command == "decode":
        decode(options.source, target, given)
    else:
        roundtrip(options.source, target if options.target else None, given, options.recogniser, options.text)


def encode(source: str, target: Path, given: dict) -> None:
    wave, p = read(source, given)
    save_png(target, paint(wave, p), p, peak=zero_db(magnitude(wave, p), p).item())
    bins, kept = p.n_fft // 2 + 1, min(p.n_fft // 2 + 1, p.canvas_height)
    print(f"{target}  {frames(p)} frames, {kept} of {bins} frequencies, on {p.canvas_width} x {p.canvas_height} pixels")


def decode(source: str, target: Path, given: dict) -> None:
    picture, found, facts = load_png(source)
    p = from_dict(Picture, asdict(found or Picture()) | given, "options")
    picture = F.pad(picture, (0, -picture.shape[2] % 16, 0, -picture.shape[1] % 16))
    p = replace(p, canvas_height=picture.shape[1], canvas_width=picture.shape[2])
    if not (found or "seconds" in given):
        longest = seconds((p.canvas_width // p.stretch - 1) * p.hop, p.sample_rate)
        p = from_dict(Picture, asdict(p) | {"seconds": min(p.seconds, longest)}, "options")
    p.check()
    level, distance = unpaint(picture, p)
    wave = listen(level, p, facts.get("peak", 0.0))
    save_wav(target, wave, p.sample_rate)
    print(f"{target}  {len(wave) / p.sample_rate:.2f} s, mean distance to the path {distance.mean():.4f}")


def roundtrip(source: str, target: Path | None, given: dict, recogniser: str, text: str) -> None:
    """Print what a sound loses on its way through an 8-bit PNG and Griffin-Lim."""
    wave, p = read(source, given)
    with tempfile.TemporaryDirectory() as folder:
        save_png(f"{folder}/x.png", paint(wave, p), p, peak=zero_db(magnitude(wave, p), p).item())
        picture, _, facts = load_png(f"{folder}/x.png")
    level, distance = unpaint(picture, p)
    error = level - levels(wave, p)[:len(level)]
    rebuilt = listen(level, p, facts["peak"])
    before, after = magnitude(wave, p), magnitude(rebuilt, p)
    print(f"picture      {error.square().mean().sqrt():.4f} dB RMSE, {error.abs().max():.4f} dB at most, "
          f"mean distance to the path {distance.mean():.4f}")
    print(f"Griffin-Lim  {(before - after).norm() / before.norm():.4f} spectral convergence, "
          f"{log_spectral_distance(*side_by_side(rebuilt, wave, p)):.2f} dB log-spectral distance")
    if target:
        save_wav(target, rebuilt, p.sample_rate)
    if recogniser:
        compare_hearing(wave, rebuilt, p.sample_rate, recogniser, text)


def compare_hearing(wave: torch.Tensor, rebuilt: torch.Tensor, sample_rate: int, name: str, text: str) -> None:
    """Print what Whisper `name`, or the one in its place, hears in both, 30 s at a time, and the WER."""
    import jiwer

    import whisper_weights                             # seconds to import
    model, _, why = whisper_weights.load_any(name, torch.device("cpu"), "--recogniser")
    if why:
        print(f"recogniser   {why}")
    if not model:
        return
    heard = []
    for sound in (wave, rebuilt):
        pieces = resample(sound, sample_rate, whisper_weights.RATE).split(whisper_weights.WINDOW)
        heard.append(" ".join(text.strip() for text in whisper_weights.transcribe(model, list(pieces))))
    print(f"heard before {heard[0]!r}\nheard after  {heard[1]!r}")
    before, after = map(whisper_weights.normalise, heard)
    said = whisper_weights.normalise(text) or before
    print(f"WER          {100 * jiwer.wer(said, after):.1f} %" if said else "WER          none: nothing was heard before")


def read(source: str, given: dict) -> tuple[torch.Tensor, Picture]:
    """The wave, cut to --seconds, and a Picture as long as it, on a canvas as wide as it needs."""
    p = from_dict(Picture, given, "options")
    replace(p, canvas_width=2 ** 40).check()           # before anything is divided by: the width follows from the rest
    wave = load_wav(source, p.sample_rate)
    if "seconds" in given:
        wave = wave[:int(p.seconds * p.sample_rate)]
    if len(wave) < p.hop:
        raise UserError(f"{source}: {len(wave)} samples are less than a frame of {p.hop}")
    p = replace(p, seconds=seconds(len(wave), p.sample_rate))
    p = replace(p, canvas_width=max(p.canvas_width, math.ceil(frames(p) * p.stretch / 16) * 16))
    p.check()
    if p.canvas_height * p.canvas_width > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{source}: {p.canvas_width} x {p.canvas_height} pixels are more than programs open; give less --seconds")
    return wave, p


def seconds(samples: int, sample_rate: int) -> float:
    """The duration that int(seconds * sample_rate) makes `samples` again."""
    return math.nextafter(samples / sample_rate, math.inf)


if __name__ == "__main__":
    run_main(main)
