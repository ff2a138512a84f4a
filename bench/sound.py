"""What is lost from log-mel to wave where no vocoder's weights are: `python -m bench.sound --data_dir DIR`.

Each way makes waves of the log-mels of a packed corpus's recordings, those of the validation split that were
kept, and is compared with them in one Markdown table. STOI and ESTOI: intelligibility, 1 at best (Taal et al.
2011; Jensen, Taal 2016). PESQ: quality by ITU-T P.862.2, wide band, 4.64 at best. Distance: of log-mels, root
mean square over a frame's bins. WER: by eval.recogniser. CPU: seconds a second of sound. pystoi and pesq
are of the extra `dev`.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

import audio
import data
import metric
import system
from config import Config, Mel, UserError
from entry import run_main
from pretrained import asr

PESQ_RATE = 16000  # Hz: of wide band
COLUMNS = ("way", "STOI", "ESTOI", "PESQ", "distance, dB", "WER", "CPU")


@dataclass(frozen=True)
class Way:
    """Griffin-Lim as audio.py has it, or with a part replaced."""

    name: str
    iterations: int = 32
    start: str = "advanced"  # phases: those of STARTS
    inverse: str = "updates"  # first magnitudes: those of INVERSES
    fit: bool = True  # magnitudes follow the wave, else they stay the first ones
    momentum: float = 0.99


WAYS = (
    Way("griffinlim: 32 iterations"),
    Way("0 iterations", 0),
    Way("8 iterations", 8),
    Way("16 iterations", 16),
    Way("60 iterations", 60),
    Way("100 iterations", 100),
    Way("no momentum", momentum=0),
    Way("pseudo-inverse at first", inverse="pseudo"),
    Way("phases from 0", start="zero"),
    Way("phases from chance", start="random"),
    Way("magnitudes stay", fit=False),
    Way("magnitudes stay, phases from 0", start="zero", fit=False),
    Way("magnitudes stay, phases from chance: 0 iterations", 0, "random", fit=False),
    Way("magnitudes stay, phases from chance: 8 iterations", 8, "random", fit=False),
    Way("magnitudes stay, phases from chance: 32 iterations", 32, "random", fit=False),
    Way("magnitudes stay, phases from chance: 60 iterations", 60, "random", fit=False),
    Way("magnitudes stay, phases from chance: 100 iterations", 100, "random", fit=False),
    Way("magnitudes stay, phases from chance, pseudo-inverse", 32, "random", "pseudo", fit=False),
)
REFERENCE = "torchaudio's GriffinLim: 32 iterations"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/demo.yaml", help="a recipe of text-to-speech")
    add("--clips", type=int, default=64, help="recordings, at most")
    add("--heard", type=int, default=16, help="of these by the recogniser")
    add("--noise", type=float, default=0, help="its deviation on log-mels: no network's are exact")
    add("--only", default="", help="parts of the ways' names, with commas")
    options, knobs = parser.parse_known_args()
    config = system.load_config(options.config, knobs)
    Bench(config, options).run()


class Bench:
    """Recordings, their log-mels, and the judges."""

    def __init__(self, config: Config, options: argparse.Namespace):
        self.mel = config.mel
        self.parts = [part.strip() for part in options.only.split(",")]
        import_judges()
        corpus = data.Corpus(config)
        self.clips = []
        self.recordings = []
        for clip in corpus.clips(config.eval.split):
            recording = corpus.recording(clip)
            if recording and len(self.clips) < options.clips:
                self.clips.append(clip)
                self.recordings.append(recording[0])
        if not self.clips:
            raise UserError(
                f"{corpus.folder}: no recording of eval.split {config.eval.split} was kept; "
                "choose another split, or another data.data_dir"
            )
        self.seconds = sum(map(len, self.recordings)) / self.mel.sample_rate
        generator = torch.Generator().manual_seed(0)
        self.log_mels = []
        for recording in self.recordings:
            log_mel = audio.log_mel(recording, self.mel)
            noise = torch.randn(log_mel.shape, generator=generator)
            self.log_mels.append(log_mel + options.noise * noise)
        self.heard = min(options.heard, len(self.clips))
        self.recogniser = None
        if self.heard:
            self.recogniser = asr.load(config.eval.recogniser, torch.device("cpu"))

    def run(self) -> None:
        print(f"{len(self.clips)} recordings, {self.seconds:.0f} s; WER of {self.heard} of them\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        self.print_row("the recordings", self.recordings, 0)
        for way in WAYS:
            self.measure(way.name, functools.partial(vocode, way, mel=self.mel))
        self.measure(REFERENCE, functools.partial(vocode_by_torchaudio, mel=self.mel))

    def measure(self, name: str, vocode: Callable[[Tensor], Tensor]) -> None:
        if not any(part in name for part in self.parts):
            return
        start = time.process_time()
        waves = [vocode(log_mel) for log_mel in self.log_mels]
        self.print_row(name, waves, time.process_time() - start)

    def print_row(self, name: str, waves: list[Tensor], cpu_sec: float) -> None:
        scores = [compare(*pair, self.mel) for pair in zip(self.recordings, waves)]
        stoi, estoi, pesq, distance = np.nanmean(scores, axis=0)
        wer = metric.format_percent(self.word_error_rate(waves))
        cpu = f"{cpu_sec / self.seconds:.3f}"
        cells = [name, f"{stoi:.3f}", f"{estoi:.3f}", f"{pesq:.2f}", f"{distance:.2f}", wer, cpu]
        print(f"| {' | '.join(cells)} |", flush=True)

    def word_error_rate(self, waves: list[Tensor]) -> float | None:
        if not self.recogniser:
            return None
        heard = self.recogniser.transcribe(waves[: self.heard], self.mel.sample_rate)
        pairs = []
        for clip, text in zip(self.clips, heard):
            pairs.append((asr.normalize_transcript(clip.text), asr.normalize_transcript(text)))
        return metric.word_error_rate(pairs)


def import_judges() -> None:
    """raises UserError where one is not installed."""
    try:
        import pesq  # noqa: F401, an extra
        import pystoi  # noqa: F401
    except ImportError as e:
        raise UserError(f"bench.sound: {e.name} is not installed: pip install pystoi pesq") from e


def compare(recording: Tensor, wave: Tensor, mel: Mel) -> tuple[float, float, float, float]:
    """STOI, ESTOI, PESQ, which is NaN where it finds no speech, and the distance in dB."""
    import pesq
    import pystoi

    length = min(len(recording), len(wave))
    sounds = [recording[:length], wave[:length].clamp(-1, 1)]
    log_mels = [audio.log_mel(sound, mel) for sound in sounds]
    squares = (log_mels[0] - log_mels[1]).square()
    distance = squares.mean(1).sqrt().mean().item() * 20 / math.log(10)
    pair = [audio.resample(sound, mel.sample_rate, PESQ_RATE).numpy() for sound in sounds]
    stoi = pystoi.stoi(*pair, PESQ_RATE)
    estoi = pystoi.stoi(*pair, PESQ_RATE, extended=True)
    quality = pesq.pesq(PESQ_RATE, *pair, "wb", on_error=pesq.PesqError.RETURN_VALUES)
    return stoi, estoi, quality if quality > 0 else math.nan, distance


# The ways


def vocode(way: Way, log_mel: Tensor, mel: Mel) -> Tensor:
    """log-mel (T, M) -> wave (T * hop,)."""
    magnitudes = INVERSES[way.inverse](log_mel, mel)
    fit = functools.partial(audio.fit_mel, target=log_mel.exp().T, mel=mel) if way.fit else None
    start = STARTS[way.start]
    waves = audio.reconstruct_phases(
        [magnitudes], mel.n_fft, mel.hop, way.iterations, way.momentum, fit, start
    )
    return put_in_place(waves[0], mel)


def vocode_by_torchaudio(log_mel: Tensor, mel: Mel) -> Tensor:
    """As `vocode`, from the same first magnitudes."""
    griffin_lim = torchaudio.transforms.GriffinLim(mel.n_fft, hop_length=mel.hop, power=1)
    wave = griffin_lim(audio.invert_mel(log_mel, mel))
    return put_in_place(wave, mel)


def put_in_place(wave: Tensor, mel: Mel) -> Tensor:
    """((T - 1) * hop,), frame m centred on m hop -> (T * hop,), where log-mels have it."""
    start = 0 if mel.centred else mel.hop // 2
    return F.pad(wave, (start, mel.hop - start))


def pseudo_inverse(log_mel: Tensor, mel: Mel) -> Tensor:
    """Magnitudes (n_fft / 2 + 1, T): the smallest that have the log-mel, what is negative made 0."""
    inverse = torch.linalg.pinv(audio.mel_filters(mel))
    return (inverse @ log_mel.exp().T).clamp_min(0)


def zero_phases(magnitudes: Tensor, hop: int) -> Tensor:
    """Each frame symmetric about its centre, (B, n_fft / 2 + 1, T)."""
    bins = torch.arange(magnitudes.shape[1])[:, None]
    return math.pi * bins.expand_as(magnitudes)


def random_phases(magnitudes: Tensor, hop: int) -> Tensor:
    noise = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0))
    return 2 * math.pi * noise


INVERSES = {"updates": audio.invert_mel, "pseudo": pseudo_inverse}
STARTS = {"advanced": audio.advance_phases, "zero": zero_phases, "random": random_phases}

if __name__ == "__main__":
    run_main(main)
