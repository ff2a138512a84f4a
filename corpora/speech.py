"""Corpora of speech as they are published: LJSpeech, LibriSpeech; fetched, read, split."""

import os
import re
import tarfile
import zlib
from pathlib import Path

import torch

from config import UserError
from corpora.shards import ASSETS, SPLITS, Clip
from text import normalize

ARCHIVES = {  # URL, and the folder inside the archive
    "ljspeech": ("https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2", "LJSpeech-1.1"),
    "librispeech": ("https://www.openslr.org/resources/12/train-clean-100.tar.gz", "LibriSpeech"),
}
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".WAV")  # of recordings, the usual one first


def read_ljspeech(root: Path) -> tuple[list[Clip], list[str]]:
    """The lines of LJSpeech's metadata.csv (id|transcript|normalised) as clips of wavs/<id>.wav.

    Lines of id|transcript will do, tabs in place of |, and paths in place of ids, as wavs/<id>.wav or
    <speaker>/<id>.flac. The split is that of split.txt beside it, lines of `val <id>` or `test <id>`; without
    that file it is the published one.
    returns: the clips, and what is wrong with other lines.
    """
    path = root / "metadata.csv"
    if not path.is_file():
        raise UserError(
            f"{path}: missing; --download (data.download) fetches LJSpeech-1.1 where there is no {root}"
        )
    texts, skipped = read_transcripts([path], find_separator(path), 3)
    own_split = root / "split.txt"
    splits = read_split(own_split if own_split.is_file() else ASSETS / "ljspeech_split.txt")
    missing = splits.keys() - texts.keys()
    if own_split.is_file() and missing:
        raise UserError(f"{own_split}: {min(missing)} is in no line of {path}")
    clips = []
    for name, (text, folder) in texts.items():
        wav = find_recording(folder, name)
        clips.append(Clip(name, text, splits.get(name, "train"), str(wav)))
    return ensure_validation_split(root, clips), skipped


def read_split(path: Path) -> dict[str, str]:
    """{id: val | test} of a file of lines `val <id>`; raises UserError for another line."""
    splits = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        split, _, name = line.strip().partition(" ")
        if split not in SPLITS or not name.strip():
            raise UserError(f"{path}: expected `val <id>` or `test <id>`, got {line!r}")
        splits[name.strip()] = split
    return splits


def find_separator(table: Path) -> str:
    """| as LJSpeech has it; a tab where every line has one, and none a |."""
    lines = [line for line in table.read_bytes().split(b"\n") if line.strip()]
    is_tabbed = all(b"\t" in line and b"|" not in line for line in lines)
    return "\t" if lines and is_tabbed else "|"


def find_recording(folder: Path, name: str) -> Path:
    """The recording of an id, in wavs/ or beside the table; where there is none, the name it should have."""
    for place in (folder / "wavs", folder):
        for suffix in SUFFIXES:
            path = place / f"{name}{suffix}"
            if os.path.isfile(path):  # False for a name that no file can have
                return path
    return folder / "wavs" / f"{name}.wav"


def read_librispeech(root: Path) -> tuple[list[Clip], list[str]]:
    """The utterances below `root`, by <speaker>/<chapter>/<speaker>-<chapter>.trans.txt.

    Transcripts are capitals without punctuation; they become "A capital first and a full stop last.", because
    prompts are typed so. 2 % of the speakers validate, 2 % test: no voice, room or book that is known from
    training makes a validation loss look good.
    returns: the clips, and what is wrong with other lines.
    """
    texts, skipped = read_transcripts(sorted(root.rglob("*.trans.txt")), " ", 2)
    if not texts:
        raise UserError(
            f"{root}: no <speaker>/<chapter>/*.trans.txt below it; "
            "--download (data.download) fetches it where it is missing"
        )
    speakers = {name.split("-")[0] for name in texts}
    shuffled = sorted(speakers, key=lambda speaker: zlib.crc32(speaker.encode()))
    held_out = round(len(speakers) / 50)
    validation = shuffled[:held_out]
    test = shuffled[held_out : 2 * held_out]
    splits = dict.fromkeys(validation, "val") | dict.fromkeys(test, "test")
    clips = []
    for name, (text, folder) in texts.items():
        sentence = re.sub(r"\bi\b", "I", text.capitalize()) + "."
        split = splits.get(name.split("-")[0], "train")
        clips.append(Clip(name, sentence, split, str(folder / f"{name}.flac")))
    return ensure_validation_split(root, clips), skipped


def read_transcripts(
    paths: list[Path], separator: str, columns: int
) -> tuple[dict[str, tuple[str, Path]], list[str]]:
    """{name: (text, folder)} of lines of a name and its transcripts; and what is wrong with other lines.

    Of three columns the last, in words, is taken as it is; where it is empty or missing, the second, as
    people type it, is normalised. raises UserError where the last cannot be the second in words.
    """
    texts = {}
    skipped = []
    typed_characters = 0  # where both are given
    spelled_characters = 0
    splits = columns - 1 if separator == " " else -1
    for path in paths:
        folder = path.parent.resolve()
        lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.split(separator, splits)]
            fields[0] = to_id(fields[0], folder)
            name = fields[0]
            spelled_out = "".join(fields[columns - 1 : columns])
            text = spelled_out or normalize("".join(fields[1:2]))
            fault = find_fault(line, fields, columns, text)
            if not fault and name in texts:
                fault = "duplicate id"
            if fault:
                skipped.append(f"{path} line {number} ({name[:40]}): {fault}")
            else:
                texts[name] = text, folder
                if spelled_out:
                    typed_characters += len(fields[1])
                    spelled_characters += len(spelled_out)
    if spelled_characters < typed_characters / 2:  # a speaker, a language, a duration
        raise UserError(
            f"{paths[0]}: its last column is too short to be the transcript in words; "
            "leave it out, or empty: id|transcript"
        )
    return texts, skipped


def to_id(name: str, folder: Path) -> str:
    """The id in the first column of a table in `folder`, where others have a path: wavs/a0.wav -> a0."""
    name = name.replace("\\", "/").removeprefix(f"{folder}/")
    name = name.removeprefix("./").removeprefix("wavs/")
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix in SUFFIXES else name


def find_fault(line: str, fields: list[str], columns: int, text: str) -> str:
    """What is wrong with a line of transcripts; "" where nothing is."""
    name = fields[0]
    if "\ufffd" in line:
        return "not UTF-8"
    if len(fields) not in (2, columns):
        return f"{len(fields)} fields, not {columns}"
    if not text:
        return "empty text"
    is_below = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not name or not is_below or not name.isprintable():
        return "no file name below its folder"
    return ""


def ensure_validation_split(root: Path, clips: list[Clip]) -> list[Clip]:
    """The clips; where none of them validates, every 20th training clip does."""
    train = [n for n, clip in enumerate(clips) if clip.split == "train"]
    if not train or any(clip.split == "val" for clip in clips):
        return clips
    reason = "the corpus's own split validates on none of these clips"
    print(f"{root}: {reason}; every 20th validates instead", flush=True)
    clips = list(clips)
    for n in train[19::20] or train[-1:]:
        clips[n] = clips[n]._replace(split="val")
    return clips


def download(corpus: str, root: Path) -> None:
    """Fetch and unpack the archive of ljspeech | librispeech so that the folder inside it becomes `root`."""
    url, folder = ARCHIVES[corpus]
    archive = root.with_name(f"{root.name}.archive.part")
    unpacked = root.with_name(f"{root.name}.part")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(archive))
        print(f"unpacking {archive}", flush=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / folder).rename(root)
        unpacked.rmdir()
        archive.unlink()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        raise UserError(
            f"{url}: cannot be had ({e}); fetch and unpack it by other means, and name its folder"
        ) from e
