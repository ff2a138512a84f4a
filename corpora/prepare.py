"""Packing: a corpus as published, or as spoken by corpora/demo.py, becomes shards of log-mels or waves, once.

A reader takes a config and lists the corpus that it names: what it is, its clips with the paths of their
recordings, and what is wrong with those left out. Systems bring readers of their own.
"""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

import audio
from config import Config, Mel, UserError, expand_path, load
from corpora import demo, shards, speech
from corpora.shards import Clip
from entry import Parser

Reader = Callable[[Config], tuple[dict, list[Clip], list[str]]]  # -> description, clips, what is left out
FolderReader = Callable[[Path], tuple[list[Clip], list[str]]]  # as of a corpus that nothing else describes
Cut = Callable[[Config, list[Clip], Path], list[Clip]]  # config, clips, folder to pack into -> shorter clips

SHORTEST_SEC = 0.1  # shorter recordings are not packed
LONGEST_SEC = 60.0  # nor are longer ones as log-mels; data.max_seconds decides which packed clips are used


def published(read: FolderReader, resample: bool = True) -> Reader:
    """The reader of a corpus in a folder, which is downloaded first where data.download says so.

    read: folder -> clips, what is wrong with those left out.
    resample: whether recordings at another sample rate are converted, not skipped.
    """

    def read_published(config: Config) -> tuple[dict, list[Clip], list[str]]:
        root = Path(config.data.data_dir)
        if config.data.download and not root.exists():
            speech.download(config.data.corpus, root)
        clips, skipped = read(root)
        return {"name": config.data.corpus, "resample": resample}, clips, skipped

    return read_published


READERS = {
    "ljspeech": published(speech.read_ljspeech, resample=False),
    "librispeech": published(speech.read_librispeech),
    "demo": demo.read_demo,
}


def prepare_recordings(
    config: Config, format: dict, readers: dict[str, Reader] = READERS, cut: Cut | None = None
) -> None:
    """Pack data.corpus, unless that is done. cut: splits clips that are too long; may write to the folder."""
    root = Path(config.data.data_dir)
    out = shards.packed_dir(config, format)
    is_packed = out == root or (out.exists() and not root.exists())  # the recordings may be gone by now
    if is_packed and config.data.corpus != "demo":  # of the demo, packing tells whether it is the same one
        return
    corpus, clips, skipped = readers[config.data.corpus](config)
    if cut:
        clips = cut(config, clips, out)
    read = functools.partial(read_clip, out, corpus, format)
    shards.pack(out, corpus, clips, skipped, format, read, config.data.workers)


def read_clip(out: Path, corpus: dict, format: dict, clip: Clip) -> np.ndarray | None:
    """A clip as log-mels (T, M), float16, or as a wave (T, hop), int16; None for one that is too long.

    raises UserError for a recording that is too short or unusable.
    """
    rate = format["sample_rate"]
    is_mel = "n_mels" in format
    longest = format.get("seconds", LONGEST_SEC if is_mel else math.inf)
    if "voice" in corpus:
        wave = demo.speak(clip.text, rate, corpus["voice"])
        if clip.wav:
            shards.make_folder(out / "wavs")
            audio.save_wav(out / clip.wav, wave, rate)
    else:
        wave = read_recording(clip, rate, corpus["resample"] or "seconds" in format)
    start = round(clip.start * rate)
    stop = round(clip.stop * rate) or None
    wave = wave[start:stop]
    if len(wave) < SHORTEST_SEC * rate:
        raise UserError(f"{len(wave) / rate:.2f} s is below {SHORTEST_SEC} s")
    if len(wave) > longest * rate + 1:  # + 1: a cut is rounded
        return None
    if is_mel:
        log_mel = audio.log_mel(wave, Mel(**format))
        return log_mel.numpy().astype(np.float16)
    return wave_to_frames(wave, format["hop"])


def wave_to_frames(wave: torch.Tensor, hop: int) -> np.ndarray:
    """A wave (N,) as int16 rows (T, hop), the last one filled up with 0."""
    samples = (wave.clamp(-1, 1) * 32767).round().short().numpy()
    padding = -len(samples) % hop
    return np.pad(samples, (0, padding)).reshape(-1, hop)


def read_recording(clip: Clip, sample_rate: int, resample: bool) -> torch.Tensor:
    """A clip's whole recording (N,); raises UserError: missing, damaged, silent, or at another rate."""
    if not Path(clip.wav).is_file():
        raise UserError(f"{clip.wav} is missing")
    wave = audio.load_wav(clip.wav, sample_rate)
    info = soundfile.info(clip.wav, verbose=True)
    if is_truncated(info, len(wave) / sample_rate):
        raise UserError(f"{clip.wav} is truncated")
    if info.samplerate != sample_rate and not resample:
        raise UserError(
            f"{clip.wav} has {info.samplerate} Hz instead of {sample_rate}; "
            "`python data.py ljspeech --resample` converts"
        )
    if not wave.isfinite().all() or wave.abs().max() < 1e-4:  # that is 3 steps of int16
        raise UserError(f"{clip.wav} is silent, or not numbers")
    return wave


# libsndfile reads what is left of a truncated file and only mentions it
PROMISED_BYTES = re.compile(r"(?:data|riff|SSND|Data Size) *: (\d+) \(should be")  # of wav, w64, aiff, au


def is_truncated(info, seconds: float) -> bool:
    """Whether a file holds less than its header says. info: soundfile's; seconds: what could be read.

    Bytes close below 2^31 or 2^32 are those of no file: so writes who pipes, and cannot know its length; of
    a flac, libsndfile makes 2^63 samples of that.
    """
    promised = PROMISED_BYTES.search(info.extra_info)
    if promised:
        return -int(promised[1]) % 2**31 > 4096
    is_known = info.frames < 2**62
    return is_known and seconds < info.frames / info.samplerate - 0.001


def main(reader_of: Callable[[str], tuple[type[Config], Reader]]) -> None:
    """The command line of `python data.py`. reader_of: the config and the reader of a corpus, by its name."""
    about = "Pack a corpus."
    knobs = "--key value for any knob of its config."
    parser = Parser(allow_abbrev=False, description=about, epilog=knobs)
    add = parser.add_argument
    add("corpus", help="ljspeech, librispeech, demo, music, or another that a system reads")
    add("--out", required=True, type=expand_path, help="where the shards go")
    root_help = "the corpus as published: a folder; music: that of a table, or a JSON list"
    add("--root", "--json", default="", help=root_help)
    add("--download", action="store_true", help="fetch it into --root if that is missing")
    add("--shard", default="0/1", help="i/n: make every n-th shard only; n machines share --out")
    resample_help = "convert recordings at another sample rate, instead of skipping them"
    add("--resample", action="store_true", help=resample_help)
    add("--strict", action="store_true", help="refuse what would be skipped")
    options, rest = parser.parse_known_args()
    match = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {options.shard}: expected i/n with i below n, as 0/4")
    overrides = [f"--corpus={options.corpus}", f"--data_dir={options.root or options.out}"]
    if options.download:
        overrides.append("--download=true")
    config_class, read_corpus = reader_of(options.corpus)
    config = load(config_class, "", overrides + rest)
    corpus, clips, skipped = read_corpus(config)
    if options.resample:
        corpus["resample"] = True
    out = options.out
    format = config.packed_format()
    read = functools.partial(read_clip, out, corpus, format)
    share = int(match[1]), int(match[2])
    shards.pack(out, corpus, clips, skipped, format, read, config.data.workers, options.strict, share)
