"""Corpora of spoken pictures, for systems speech_align and speech_image: `python assets/spoken_pictures.py --config FILE [--key value]`
packs the speech of config.data, and makes the image tower where align.image is scratch. `python system.py prepare` does it where it is due.

data.corpus: shapes, drawn and spoken by espeak-ng on the spot | flickr8k, with its audio captions | s2igan, CUB-200 or Oxford-102 with
spoken captions: as published, wherever below data_dir | listed: one's own, a line of data_dir/captions-en.jsonl each: picture and wav
below data_dir, text, split, voice, and label: what pictures that are as right as this one have in common, "" where there are none.
"""

import functools
import json
import pickletools
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imsave
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import audio
import data
import flow
import pretrained
import recogniser
import speech2image
from config import Config, UserError, run_main
from system import config_from_command_line
from corpora.voice import espeak
from shapes import COMBINATIONS, KINDS, NEW, SHAPES, describe, draw
from speech2image import HOP, RATE

PICTURES = 12                        # of a combination, to train on; one each validates and tests


def list_shapes(root: Path, language: str, count: int) -> list[dict]:
    """`count` descriptions to train on, and each combination twice, by voices that training never hears, to validate and to test."""
    known, found = [c for c in COMBINATIONS if c not in NEW], []
    plan = [("train", n, known[n % len(known)]) for n in range(count)]
    plan += [(split, n, COMBINATIONS[n % len(COMBINATIONS)]) for split in ("val", "test") for n in range(2 * len(COMBINATIONS))]
    for folder in ("pictures", f"wavs/{language}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, n, combination in tqdm(plan, desc=f"shapes {language}", disable=None):
        rng, voices = random.Random(f"{language} {split} {n}"), SHAPES["voices"][split]
        voice = rng.choice(voices) if split == "train" else voices[n // len(COMBINATIONS)]
        label = "-".join(names[k] for names, k in zip(KINDS, combination))
        number = n // len(known) % PICTURES if split == "train" else split
        picture, wav, text = f"pictures/{label}-{number}.png", f"wavs/{language}/{split}-{n:05d}.wav", describe(language, combination, rng)
        if not (root / picture).exists():
            with data.replacing(root / picture) as part:
                imsave(part, draw(combination, zlib.crc32(picture.encode())), format="png")
        wave = espeak(text, 16000, f"{SHAPES[language]['voice']}+{voice}", rate=rng.randint(130, 190), pitch=rng.randint(30, 70))
        audio.save_wav(root / wav, wave, 16000)
        found.append({"picture": picture, "wav": wav, "text": text, "split": split,
                      "voice": f"{voice} {'new' if combination in NEW else 'known'}", "label": label})
    return sorted(found, key=lambda line: zlib.crc32(line["wav"].encode()))      # so that the first few are of all kinds


def list_flickr8k(root: Path, language: str) -> list[dict]:
    """Flickr8k.token.txt, Flickr_8k.*Images.txt, the pictures, flickr_audio/{wav2capt.txt, wavs}; Arabic in flickr_audio_ar, as English."""
    splits = {name: split for split, part in zip(data.SPLITS, ("train", "dev", "test"))
              for name, in lines(find(root, f"Flickr_8k.{part}Images.txt"))}
    texts = {fields[0]: fields[-1] for fields in lines(find(root, "Flickr8k.token.txt"), "\t")}
    pictures = {path.name: path.relative_to(root).as_posix() for path in root.rglob("*.jpg")}
    listing, found = find(root, f"{'flickr_audio' if language == 'en' else f'flickr_audio_{language}'}/wav2capt.txt"), []
    for wav, name, number in lines(listing):
        if name in splits and name in pictures:
            found.append({"picture": pictures[name], "wav": (listing.parent / "wavs" / wav).relative_to(root).as_posix(),
                          "text": texts.get(name + number, ""), "split": splits[name], "voice": "", "label": ""})
        else:
            print(f"skipped {wav}: its picture {name} is missing, or in no split", flush=True)
    return found


def list_s2igan(root: Path, language: str) -> list[dict]:
    """{train,test}/filenames.pickle, */images/NAME.jpg, */audio/NAME/* (audio_arabic), */text/NAME.txt if it is there.

    The test's classes are not trained on; every 20th training picture validates.
    """
    images, found = find(root, "*/images"), []
    for split in ("train", "test"):
        pickled = pickletools.genops(find(root, f"{split}/filenames.pickle").read_bytes())       # read off it: nothing in it is run
        names = sorted({word for _, word, _ in pickled if isinstance(word, str) and (images / f"{word}.jpg").is_file()})
        for number, name in enumerate(names, 1):
            text, folder = images.parent / "text" / f"{name}.txt", images.parent / ("audio" if language == "en" else "audio_arabic") / name
            texts = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
            wavs = sorted(path for path in folder.glob("*") if path.suffix in (".wav", ".mp3", ".flac"))
            if not wavs:
                print(f"skipped {name}: no sound in {folder}", flush=True)
            validates = split == "train" and number % 20 == 0
            found += [{"picture": (images / f"{name}.jpg").relative_to(root).as_posix(), "wav": wav.relative_to(root).as_posix(),
                       "text": texts[n] if n < len(texts) else Path(name).name, "split": "val" if validates else split, "voice": "",
                       "label": ""} for n, wav in enumerate(wavs)]
    return found


def lines(path: Path, separator: str | None = None) -> list[list[str]]:
    return [line.split(separator) for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def find(root: Path, pattern: str) -> Path:
    found = next(iter(sorted(root.rglob(pattern))), None)
    if found is None:
        raise UserError(f"{root}: has no {pattern} below it; it must hold the corpus as it is published")
    return found


def list_own(root: Path, language: str) -> list[dict]:
    path = root / f"captions-{language}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: no list of spoken pictures, or a damaged one ({pretrained.brief(e)}); see {__file__}") from e


def read_clip(root: Path, clip: data.Clip) -> np.ndarray | None:
    """A recording as int16 (T, HOP), its end filled up with 0, once its picture is known to be one; None for one that is too long."""
    flow.read_picture(str(root / speech2image.picture_of(clip)[1]))
    wave = data.read_recording(clip, RATE, resample=True)
    if len(wave) < data.SHORTEST_SEC * RATE:
        raise UserError(f"{len(wave) / RATE:.2f} s is below {data.SHORTEST_SEC} s")
    if len(wave) > data.LONGEST_SEC * RATE:
        return None
    return (F.pad(wave, (0, -len(wave) % HOP)).clamp(-1, 1) * 32767).round().view(-1, HOP).numpy().astype(np.int16)


def pack(config: Config) -> None:
    d, root, form, clips = config.data, Path(config.data.data_dir), speech2image.form(config), []
    for language in d.langs:
        if d.corpus == "shapes":
            found = list_shapes(root, language, d.sentences)
        else:
            found = {"flickr8k": list_flickr8k, "s2igan": list_s2igan, "listed": list_own}[d.corpus](root, language)
        for n, line in enumerate(found):
            try:
                name, group = f"{line['label']}:{line['picture']}#{language}{n}", f"{language} {line['voice']}".strip()
                clips.append(data.Clip(name, line["text"], line["split"], str(root.resolve() / line["wav"]), group=group))
            except (KeyError, TypeError) as e:
                raise UserError(f"{root}: line {n + 1} of its captions lacks {e}; see {__file__}") from e
            if line["split"] not in data.SPLITS or ":" in line["label"]:
                raise UserError(f"{root}: line {n + 1} of its captions: split must be one of {', '.join(data.SPLITS)}, and : in no label")
    data.pack(data.packed_dir(config, form), {"name": d.corpus}, clips, [], form, functools.partial(read_clip, root), d.workers)


def train_tower(corpus: speech2image.Corpus, steps: int = 300) -> flow.SmallTower:
    """Contrast of training pictures with the words of their descriptions, a bag of them through a small network."""
    torch.manual_seed(0)
    clips, rng, tower = corpus.clips("train"), np.random.default_rng(0), flow.SmallTower()
    bags = ["".join(c if c.isalnum() else " " for c in clip.text.lower()).split() for clip in clips]
    numbers = {word: n for n, word in enumerate(sorted(set().union(*bags)), 1)}
    reader = nn.Sequential(nn.EmbeddingBag(len(numbers) + 1, 256, mode="sum", padding_idx=0), nn.GELU(), nn.Linear(256, tower.width))
    optimizer = torch.optim.AdamW([*tower.parameters(), *reader.parameters()], lr=1e-3)
    for _ in tqdm(range(steps), desc="image tower", disable=None):
        chosen = rng.integers(len(clips), size=min(128, len(clips)))
        words, _ = data.pad([torch.tensor([numbers[word] for word in bags[n]], dtype=torch.long) for n in chosen], 1)
        seen = tower(torch.stack([corpus.picture(corpus.number(clips[n]), tower.size) for n in chosen]))
        labels = torch.tensor([corpus.label(clips[n]) for n in chosen])
        loss = recogniser.info_nce(seen, F.normalize(reader(words), dim=-1), labels, torch.tensor(1 / 0.07))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"image tower: {steps} steps, contrast loss {loss.item():.3f}", flush=True)
    return tower


def main() -> None:
    config = config_from_command_line(sys.argv[1:])
    pack(config)
    corpus, device = speech2image.Corpus(config), "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    if config.align.image == "scratch" and not (path := speech2image.tower_file(corpus)).exists():
        with data.replacing(path) as part:
            safetensors.torch.save_file(train_tower(corpus).state_dict(), part)
    tower = speech2image.load_tower(corpus).to(device)

    def encode(numbers: list[int]) -> np.ndarray:
        return tower(torch.stack([corpus.picture(n, tower.module.size) for n in numbers]).to(device)).float().cpu().numpy()[:, None]

    what = f"pictures by {config.align.image}"
    data.cache_rows(speech2image.embeddings_file(corpus), [1] * len(corpus.names), None, encode, 32, what)


if __name__ == "__main__":
    run_main(main)
