"""Corpora of spoken pictures, read as they are published, and their speech packed.

data.corpus is one of these:
shapes     drawn, and spoken by espeak-ng, on the spot
flickr8k   with its audio captions, as published, wherever below data_dir
s2igan     CUB-200 or Oxford-102 with spoken captions, as S2IGAN publishes them, wherever below data_dir
listed     one's own: lines of data_dir/captions-en.jsonl with the keys picture, wav, text, split, voice and
           label; paths are below data_dir; pictures of the same label, if it is not "", are equally right
"""

import functools
import json
import pickletools
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from config import DAMAGE, Config, UserError
from corpora import prepare, shards
from pretrained import frozen
from speech2image.data import HOP, RATE, corpus_format, parse_clip_id, read_picture
from speech2image.shapes import list_shapes

LINE = ("picture", "wav", "text", "split", "voice", "label")  # texts in a line of captions-en.jsonl


def list_flickr8k(root: Path, language: str) -> list[dict]:
    """Flickr8k.token.txt, Flickr_8k.*Images.txt, the pictures, flickr_audio/{wav2capt.txt, wavs}.

    Arabic is in flickr_audio_ar, in the same form.
    """
    splits = {}
    for split, part in zip(shards.SPLITS, ("train", "dev", "test")):
        listing = find_one(root, f"Flickr_8k.{part}Images.txt")
        for (name,) in read_fields(listing):
            splits[name] = split
    texts = {}
    for fields in read_fields(find_one(root, "Flickr8k.token.txt"), "\t"):
        texts[fields[0]] = fields[-1]
    pictures = {}
    for path in root.rglob("*.jpg"):
        pictures[path.name] = path.relative_to(root).as_posix()

    folder = "flickr_audio" if language == "en" else f"flickr_audio_{language}"
    listing = find_one(root, f"{folder}/wav2capt.txt")
    wavs = listing.parent.relative_to(root) / "wavs"
    captions = []
    for wav, name, number in read_fields(listing):
        if name not in splits or name not in pictures:
            print(f"skipped {wav}: its picture {name} is missing, or in no split", flush=True)
            continue
        text = texts.get(name + number, "")
        path = (wavs / wav).as_posix()
        captions.append(caption(pictures[name], path, text, splits[name]))
    return captions


def list_s2igan(root: Path, language: str) -> list[dict]:
    """{train,test}/filenames.pickle, */images/NAME.jpg, */audio/NAME/*, */text/NAME.txt if it is there.

    Arabic is in */audio_arabic. The test's classes are not trained on; every 20th training picture validates.
    """
    images = find_one(root, "*/images")
    captions = []
    for split in ("train", "test"):
        names = read_names(find_one(root, f"{split}/filenames.pickle"), images)
        for number, name in enumerate(names, 1):
            validates = split == "train" and number % 20 == 0
            own_split = "val" if validates else split
            captions += list_recordings(root, images, name, language, own_split)
    return captions


def read_names(path: Path, images: Path) -> list[str]:
    """The names of pictures in a pickle, sorted.

    It is scanned for strings, not loaded: no code in it runs.
    """
    names = set()
    for _, word, _ in pickletools.genops(path.read_bytes()):
        if isinstance(word, str) and (images / f"{word}.jpg").is_file():
            names.add(word)
    return sorted(names)


def list_recordings(root: Path, images: Path, name: str, language: str, split: str) -> list[dict]:
    """A caption for each recording of a picture of S2IGAN's."""
    audio_folder = "audio" if language == "en" else "audio_arabic"
    folder = images.parent / audio_folder / name
    wavs = [path for path in folder.glob("*") if path.suffix in (".wav", ".mp3", ".flac")]
    if not wavs:
        print(f"skipped {name}: no sound in {folder}", flush=True)
    texts = []
    path = images.parent / "text" / f"{name}.txt"
    if path.is_file():
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    picture = (images / f"{name}.jpg").relative_to(root)
    captions = []
    for n, wav in enumerate(sorted(wavs)):
        text = texts[n] if n < len(texts) else Path(name).name
        path = wav.relative_to(root).as_posix()
        captions.append(caption(picture.as_posix(), path, text, split))
    return captions


def caption(picture: str, wav: str, text: str, split: str) -> dict[str, str]:
    """As a line of captions-en.jsonl; picture, wav: paths below data_dir."""
    return {"picture": picture, "wav": wav, "text": text, "split": split, "voice": "", "label": ""}


def read_fields(path: Path, separator: str | None = None) -> list[list[str]]:
    """The fields of each line of a text that is not empty."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.split(separator) for line in text.splitlines() if line.strip()]


def find_one(root: Path, pattern: str) -> Path:
    """The first path of that pattern below root. raises UserError where there is none."""
    paths = sorted(root.rglob(pattern))
    if not paths:
        raise UserError(f"{root}: has no {pattern} below it; it must hold the corpus as it is published")
    return paths[0]


def list_own_corpus(root: Path, language: str) -> list[dict]:
    """The lines of captions-en.jsonl, or of another language's."""
    path = root / f"captions-{language}.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, *DAMAGE) as e:
        reason = frozen.one_line(e)
        raise UserError(
            f"{path}: no list of spoken pictures, or a damaged one ({reason}); see {__file__}"
        ) from e


def read_clip(root: Path, clip: shards.Clip) -> np.ndarray | None:
    """A recording as int16 (T, HOP), its end padded with 0; None for one that is too long.

    raises UserError for one that is too short, and where the picture cannot be read
    """
    picture = parse_clip_id(clip)[1]
    read_picture(str(root / picture))
    wave = prepare.read_recording(clip, RATE, resample=True)
    if len(wave) < prepare.SHORTEST_SEC * RATE:
        seconds = len(wave) / RATE
        raise UserError(f"{seconds:.2f} s is below {prepare.SHORTEST_SEC} s")
    if len(wave) > prepare.LONGEST_SEC * RATE:
        return None
    padding = -len(wave) % HOP
    wave = F.pad(wave, (0, padding))
    pcm = (wave.clamp(-1, 1) * 32767).round()
    frames = pcm.view(-1, HOP).numpy()
    return frames.astype(np.int16)


def pack_spoken_pictures(config: Config) -> None:
    """Pack the speech of config.data.corpus, in all its languages."""
    d = config.data
    root = Path(d.data_dir)
    clips = []
    for language in d.langs:
        if d.corpus == "shapes":
            lines = list_shapes(root, language, d.sentences)
        elif d.corpus == "flickr8k":
            lines = list_flickr8k(root, language)
        elif d.corpus == "s2igan":
            lines = list_s2igan(root, language)
        else:
            lines = list_own_corpus(root, language)
        clips += [to_clip(root, language, n, line) for n, line in enumerate(lines)]
    packed = corpus_format(config)
    folder = shards.packed_dir(config, packed)
    read = functools.partial(read_clip, root)
    shards.pack(folder, {"name": d.corpus}, clips, [], packed, read, d.workers)


def to_clip(root: Path, language: str, n: int, line: dict) -> shards.Clip:
    """A line of captions, number n of its language, as a clip.

    raises UserError where a key is missing, or a value is not possible
    """
    where = f"{root}: line {n + 1} of its captions"
    try:
        for key in LINE:
            if not isinstance(line[key], str):
                raise TypeError(f"a text as {key}")
        label = line["label"]
        picture = line["picture"]
        group = f"{language} {line['voice']}"
        text = line["text"]
        split = line["split"]
        wav = root.resolve() / line["wav"]
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} lacks {e}; see {__file__}") from e
    if split not in shards.SPLITS or ":" in label:
        splits = ", ".join(shards.SPLITS)
        raise UserError(f"{where}: split must be one of {splits}, and : in no label")
    name = f"{label}:{picture}#{language}{n}"
    return shards.Clip(name, text, split, str(wav), group=group.strip())
