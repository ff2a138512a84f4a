"""The picture codec: sound as an RGB picture of its magnitude spectrogram, and back; and its commands.

A picture is (3, H, W) in [0, 1], as sonic-plantain paints it: row 0 is 0 Hz, frame m is centred on sample
m hop, T = N // hop + 1; [-80, 0] dB run along seven edges of the RGB cube. p: a Picture, the parameters.
"""

import itertools
import json
import math
import os
import tempfile
from dataclasses import asdict, fields, replace
from os.path import expanduser
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

import audio
from config import DAMAGE, UserError, from_dict
from corpora.pictures import read_picture
from entry import Parser
from klein.config import Picture

FLOOR_DB = -80.0  # black; quieter is black too
COLORMAP = (  # corners of the RGB cube in the order of the colour map
    (0, 0, 0),  # black
    (0, 0, 1),  # blue
    (0, 1, 1),  # cyan
    (0, 1, 0),  # green
    (1, 1, 0),  # yellow
    (1, 0, 0),  # red
    (1, 0, 1),  # magenta
    (1, 1, 1),  # white
)
LOUDEST_PEAK = 1e9  # a magnitude that no sound reaches, and with which float32 still counts
PNG_CHUNK = "nanoaudio"  # tEXt chunk of a PNG: the Picture and other facts, as JSON


def encode(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N), padded or cut to p.seconds -> picture (..., 3, H, W), black where nothing is."""
    samples = int(p.seconds * p.sample_rate)
    wave = F.pad(wave, (0, samples - wave.shape[-1]))
    db = spectrogram_db(wave, p)
    db = db[..., : p.canvas_height, :]  # (..., bins, T)
    db = db.repeat_interleave(p.stretch, -1)  # (..., bins, columns)
    position = 1 - db / FLOOR_DB
    picture = apply_colormap(position).movedim(-1, -3)  # (..., 3, bins, columns)
    height, width = picture.shape[-2:]
    right = p.canvas_width - width
    below = p.canvas_height - height
    return F.pad(picture, (0, right, 0, below))


def decode(picture: torch.Tensor, p: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    """picture (..., 3, H, W) -> dB (..., bins, T) in [-80, 0], and its distance to the colour map.

    A distance of 0 is a sure reading, 0.71 a mere guess. bins: n_fft / 2 + 1, or H where the canvas is lower.
    A frame is the mean of its columns: measured better than one of them.
    """
    bins = min(p.canvas_height, p.n_fft // 2 + 1)
    columns = frame_count(p) * p.stretch
    painted = picture[..., :bins, :columns]  # (..., 3, bins, columns)
    rgb = painted.float().movedim(-3, -1)
    position, distance = invert_colormap(rgb)  # (..., bins, columns)
    by_frame = (-1, p.stretch)
    position = position.unflatten(-1, by_frame).mean(-1)  # (..., bins, T)
    distance = distance.unflatten(-1, by_frame).mean(-1)
    db = FLOOR_DB * (1 - position)
    return db, distance


def apply_colormap(position: torch.Tensor) -> torch.Tensor:
    """position (...) in [0, 1] on the colour map -> RGB (..., 3)."""
    rgb = [torch.zeros_like(position) for _ in range(3)]
    for edge, (start, end) in enumerate(itertools.pairwise(COLORMAP)):
        channel = changing_channel(start, end)
        along = (7 * position - edge).clamp(0, 1)
        direction = end[channel] - start[channel]
        change = direction * along
        rgb[channel] = rgb[channel] + change
    return torch.stack(rgb, -1)


def invert_colormap(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB (..., 3), clamped to [0, 1] -> position (...) of the map's nearest colour, and its distance."""
    rgb = rgb.clamp(0, 1).unbind(-1)
    to_zero = [channel.square() for channel in rgb]
    to_one = [(1 - channel).square() for channel in rgb]
    position = torch.zeros_like(rgb[0])
    smallest = torch.full_like(rgb[0], torch.inf)  # squared distance
    for edge, (start, end) in enumerate(itertools.pairwise(COLORMAP)):
        channel = changing_channel(start, end)
        distance = 0
        for other in range(3):
            if other != channel:
                squares = to_one if start[other] else to_zero
                distance = distance + squares[other]
        along = rgb[channel]
        if not end[channel]:
            along = 1 - along
        is_nearer = distance < smallest
        position = torch.where(is_nearer, edge + along, position)
        smallest = torch.minimum(distance, smallest)
    return position / 7, smallest.sqrt()


def changing_channel(start: tuple, end: tuple) -> int:
    """The one channel in which two neighbouring corners differ: they are ordered as a Gray code."""
    differs = [a != b for a, b in zip(start, end, strict=True)]
    return differs.index(True)


def frame_count(p: Picture) -> int:
    """Frames of p.seconds."""
    samples = int(p.seconds * p.sample_rate)
    return samples // p.hop + 1


def magnitude_spectrogram(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N) -> (..., n_fft / 2 + 1, T), T = N // hop + 1, frame m centred on sample m hop."""
    hann = audio.hann_window(p.n_fft).to(wave.device)
    spectrum = torch.stft(wave, p.n_fft, p.hop, window=hann, pad_mode="constant", return_complex=True)
    return spectrum.abs()


def reference_magnitude(magnitudes: torch.Tensor, p: Picture) -> torch.Tensor:
    """The magnitude (..., 1, 1) that is 0 dB: the clip's own peak, or that of a sine of full scale.

    A Hann window makes the latter n_fft / 4.
    """
    peak = magnitudes.amax((-2, -1), keepdim=True).clamp_min(1e-9)
    if p.reference == "peak":
        return peak
    return torch.full_like(peak, p.n_fft / 4)


def spectrogram_db(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    """wave (N,) or (B, N) -> dB (..., n_fft / 2 + 1, T) in [-80, 0]: what a picture shows."""
    spectrogram = magnitude_spectrogram(wave, p)
    return to_decibels(spectrogram, reference_magnitude(spectrogram, p))


def to_decibels(magnitudes: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    ratio = (magnitudes / reference).clamp_min(1e-9)
    return (20 * ratio.log10()).clamp(FLOOR_DB, 0)


def at_matched_gain(
    generated: torch.Tensor, wave: torch.Tensor, p: Picture
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two waves (N,) as dB (bins, T) relative to the second's 0 dB, the first at the gain that fits it best.

    The gain is free because each picture is normalised by its own peak.
    """
    x = magnitude_spectrogram(generated, p)
    y = magnitude_spectrogram(wave, p)
    length = min(x.shape[1], y.shape[1])
    x = x[:, :length]
    y = y[:, :length]
    overlap = (x * y).sum()
    energy = x.square().sum().clamp_min(1e-9)
    gain = overlap / energy
    reference = reference_magnitude(y, p)
    return to_decibels(gain * x, reference), to_decibels(y, reference)


def log_spectral_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over frames of the RMS over bins of the difference of two dB (bins, T); the longer one is cut."""
    length = min(a.shape[1], b.shape[1])
    difference = a[:, :length] - b[:, :length]
    rms = difference.square().mean(0).sqrt()  # (T,)
    return rms.mean().item()


def reconstruct_wave(db: torch.Tensor, p: Picture, peak: float = 0.0, iterations: int = 60) -> torch.Tensor:
    """dB (bins, T) -> wave ((T - 1) * hop,), phase by Griffin-Lim.

    A frame that is all black is silence, and so are the bins that a low canvas left out. Black among colours
    sounds as -80 dB: with silence there, PocketSphinx would miss 5 (peak) to 10 (fixed) more words of 100.
    peak: the magnitude of 0 dB; 0 where it is not known: with p.reference "peak" the wave then peaks at 0.9.
    """
    is_audible = db.amax(0) > FLOOR_DB  # (T,)
    spectrogram = 10 ** (db.float() / 20)
    spectrogram = spectrogram * is_audible
    missing_bins = p.n_fft // 2 + 1 - len(spectrogram)
    spectrogram = F.pad(spectrogram, (0, 0, 0, missing_bins))
    if spectrogram.shape[1] < 2:
        return db.new_zeros(0)
    if not peak and p.reference == "fixed":
        peak = p.n_fft / 4
    if peak:
        return audio.reconstruct_phase(spectrogram * peak, p.n_fft, p.hop, iterations)
    wave = audio.reconstruct_phase(spectrogram, p.n_fft, p.hop, iterations)
    wave_peak = wave.abs().max().clamp_min(1e-9)
    return 0.9 * wave / wave_peak


def save_png(path: str, picture: torch.Tensor, p: Picture, **facts) -> None:
    """Write a picture (3, H, W) as 8-bit PNG with its parameters inside.

    facts: JSON values stored with it; `peak`, the magnitude of 0 dB, lets the decoder restore the loudness.
    raises UserError where it cannot be written.
    """
    picture = picture.detach().float().cpu()
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(1, 2, 0).contiguous()  # (H, W, 3)
    image = Image.fromarray(pixels.numpy())
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PNG_CHUNK, json.dumps({"picture": asdict(p)} | facts))
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        image.save(part, "png", pnginfo=chunks)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e


def load_png(path: str) -> tuple[torch.Tensor, Picture | None, dict]:
    """A picture (3, H, W) in [0, 1], its parameters, None where the file has none, and the facts beside them.

    raises UserError for a file that is no picture, or another one than its parameters say.
    """
    picture, info = read_picture(path)
    chunk = info.get(PNG_CHUNK, "")
    if not chunk:
        return picture, None, {}
    try:
        facts = json.loads(chunk)
        p = from_dict(Picture, facts.pop("picture"), PNG_CHUNK)
        p.check()
        facts["peak"] = float(facts.get("peak", 0.0))
    except (UserError, *DAMAGE) as e:
        raise UserError(f"{path}: the parameters in it are damaged ({e})") from e
    is_peak = 0 <= facts["peak"] <= LOUDEST_PEAK
    if not is_peak or (p.canvas_height, p.canvas_width) != picture.shape[1:]:
        raise UserError(
            f"{path}: not as it was painted ({canvas_size(p)}): do not scale or cut such a picture"
        )
    return picture, p, facts


def canvas_size(p: Picture) -> str:
    return f"{p.canvas_width} x {p.canvas_height} pixels"


# Commands


def main() -> None:
    parser = Parser(description="Sound as a picture, and back.")
    add = parser.add_argument
    kinds = "wav to PNG | PNG to wav | what both together lose"
    add("command", choices=("encode", "decode", "roundtrip"), help=kinds)
    add("source", type=expanduser, help="a sound file; decode: a PNG")
    about_target = "default: beside the source, X.png, X.decoded.wav; roundtrip: the rebuilt wav, where given"
    add("target", nargs="?", default="", type=expanduser, help=about_target)
    for field in fields(Picture):
        default = "that of the sound" if field.name == "seconds" else field.default
        add(f"--{field.name}", type=type(field.default), help=f"default: {default}; decode: as painted")
    about_recogniser = "roundtrip: Whisper name or .pt file that transcribes before and after"
    add("--recogniser", default="", type=expanduser, help=about_recogniser)
    about_text = "roundtrip: what is said; default: the recogniser's transcript of the source"
    add("--text", default="", help=about_text)
    options = parser.parse_args()
    suffix = ".png" if options.command == "encode" else ".wav"
    target = Path(options.target) if options.target else None
    if target and target.suffix != suffix:
        raise UserError(f"{target}: its name must end in {suffix}")
    given = {}
    for field in fields(Picture):
        value = getattr(options, field.name)
        if value is not None:
            given[field.name] = value
    if options.command == "encode":
        encode_file(options.source, target, given)
    elif options.command == "decode":
        decode_file(options.source, target, given)
    else:
        roundtrip_file(options.source, target, given, options.recogniser, options.text)


def save_spectrogram_png(path: str | Path, wave: torch.Tensor, p: Picture) -> None:
    """Write the picture of a wave as PNG, and in it the magnitude that is 0 dB."""
    reference = reference_magnitude(magnitude_spectrogram(wave, p), p)
    save_png(path, encode(wave, p), p, peak=reference.item())


def default_target(source: str, suffix: str) -> Path:
    """A new file beside the source; raises UserError where it is there: only what is named is overwritten."""
    target = Path(source).with_suffix(suffix)
    if target.exists():
        raise UserError(f"{target}: there already; name a target after {source}, this one to overwrite it")
    return target


def encode_file(source: str, target: Path | None, given: dict) -> None:
    wave, p = read_source(source, given)
    target = target or default_target(source, ".png")
    save_spectrogram_png(target, wave, p)
    bins = p.n_fft // 2 + 1
    kept = min(bins, p.canvas_height)
    print(f"{target}  {frame_count(p)} frames, {kept} of {bins} frequencies, on {canvas_size(p)}")


def decode_file(source: str, target: Path | None, given: dict) -> None:
    picture, stored, facts = load_png(source)
    target = target or default_target(source, ".decoded.wav")
    p = from_dict(Picture, asdict(stored or Picture()) | given, "options")
    _, height, width = picture.shape
    right = -width % 16
    below = -height % 16
    picture = F.pad(picture, (0, right, 0, below))
    p = replace(p, canvas_height=height + below, canvas_width=width + right)
    if not stored and "seconds" not in given:  # they follow from the width
        painted_frames = p.canvas_width // p.stretch
        samples = (painted_frames - 1) * p.hop
        longest = exact_duration_sec(samples, p.sample_rate)
        p = from_dict(Picture, asdict(p) | {"seconds": min(p.seconds, longest)}, "options")
    p.check()
    db, distance = decode(picture, p)
    wave = reconstruct_wave(db, p, facts.get("peak", 0.0))
    audio.save_wav(target, wave, p.sample_rate)
    seconds = len(wave) / p.sample_rate
    print(f"{target}  {seconds:.2f} s, mean distance to the path {distance.mean():.4f}")


def roundtrip_file(source: str, target: Path | None, given: dict, recogniser: str, text: str) -> None:
    """Print what a sound loses on its way through an 8-bit PNG and Griffin-Lim."""
    wave, p = read_source(source, given)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.png"
        save_spectrogram_png(path, wave, p)
        picture, _, facts = load_png(path)
    db, distance = decode(picture, p)
    error = db - spectrogram_db(wave, p)[: len(db)]
    rmse = error.square().mean().sqrt()
    largest = error.abs().max()
    print(
        f"picture      {rmse:.4f} dB RMSE, {largest:.4f} dB at most, "
        f"mean distance to the path {distance.mean():.4f}"
    )
    rebuilt = reconstruct_wave(db, p, facts["peak"])
    before = magnitude_spectrogram(wave, p)
    after = magnitude_spectrogram(rebuilt, p)
    convergence = (before - after).norm() / before.norm()
    lsd = log_spectral_distance(*at_matched_gain(rebuilt, wave, p))
    print(f"Griffin-Lim  {convergence:.4f} spectral convergence, {lsd:.2f} dB log-spectral distance")
    if target:
        audio.save_wav(target, rebuilt, p.sample_rate)
    if recogniser:
        compare_transcripts(wave, rebuilt, p.sample_rate, recogniser, text)


def compare_transcripts(
    wave: torch.Tensor, rebuilt: torch.Tensor, sample_rate: int, name: str, text: str
) -> None:
    """Print what Whisper `name`, or its replacement, transcribes of both, and the WER."""
    import jiwer  # takes seconds, as the next does

    from pretrained.whisper_weights import RATE, cut_at_pauses, load_any, normalize_transcript, transcribe

    model, _, why = load_any(name, torch.device("cpu"), "--recogniser")
    if why:
        print(f"recogniser   {why}")
    if not model:
        return
    transcripts = []
    for sound in (wave, rebuilt):
        sound = audio.resample(sound, sample_rate, RATE)
        parts = transcribe(model, cut_at_pauses(sound))
        transcripts.append(" ".join(filter(None, parts)))
    before, after = transcripts
    print(f"heard before {before!r}\nheard after  {after!r}")
    said = normalize_transcript(text) or normalize_transcript(before)
    if said:
        wer = jiwer.wer(said, normalize_transcript(after))
        print(f"WER          {100 * wer:.1f} %")
    else:
        print("WER          none: nothing was heard before")


def read_source(source: str, given: dict) -> tuple[torch.Tensor, Picture]:
    """The wave, cut to --seconds, and a Picture as long as it, on a canvas as wide as it needs."""
    p = from_dict(Picture, given, "options")
    replace(p, canvas_width=2**40).check()  # before anything is divided by; the width follows from the rest
    wave = audio.load_wav(source, p.sample_rate)
    if "seconds" in given:
        samples = int(p.seconds * p.sample_rate)
        wave = wave[:samples]
    if len(wave) < p.hop:
        raise UserError(f"{source}: {len(wave)} samples are less than a frame of {p.hop}")
    p = replace(p, seconds=exact_duration_sec(len(wave), p.sample_rate))
    columns = frame_count(p) * p.stretch
    needed_width = math.ceil(columns / 16) * 16
    p = replace(p, canvas_width=max(needed_width, p.canvas_width))
    p.check()
    if p.canvas_width * p.canvas_height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{source}: {canvas_size(p)} are more than programs open; give less --seconds")
    return wave, p


def exact_duration_sec(samples: int, sample_rate: int) -> float:
    """The duration for which int(seconds * sample_rate) is `samples` again."""
    return math.nextafter(samples / sample_rate, math.inf)
