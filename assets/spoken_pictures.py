"""Corpora of spoken pictures: `python assets/spoken_pictures.py --config FILE [--key value]`.

It packs the speech of config.data, trains the image tower where align.image is scratch, embeds the pictures.
`python system.py prepare` runs it when any of these is missing. data.corpus:
  shapes     drawn, and spoken by espeak-ng, on the spot
  flickr8k   with its audio captions, as published, wherever below data_dir
  s2igan     CUB-200 or Oxford-102 with spoken captions, as S2IGAN publishes them, wherever below data_dir
  listed     one's own: lines of data_dir/captions-en.jsonl with the keys picture, wav, text, split, voice and
             label; paths are below data_dir; pictures of the same label, if it is not "", are equally right
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
from torch import Tensor
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

PICTURES = 12  # of a combination, to train on; one each to validate and to test on
KNOWN = [combination for combination in COMBINATIONS if combination not in NEW]


def list_shapes(root: Path, language: str, count: int) -> list[dict]:
    """Make `count` descriptions to train on, and each combination twice to validate and twice to test on.

    Voices of validation and test are never trained on.
    """
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    (root / "wavs" / language).mkdir(parents=True, exist_ok=True)
    held_out = 2 * len(COMBINATIONS)
    plan = [("train", n) for n in range(count)]
    plan += [("val", n) for n in range(held_out)]
    plan += [("test", n) for n in range(held_out)]
    captions = []
    for split, n in tqdm(plan, desc=f"shapes {language}", disable=None):
        caption = make_shape(root, language, split, n)
        captions.append(caption)

    def order(caption: dict[str, str]) -> int:
        """A random one, so that the first few are of all kinds."""
        return zlib.crc32(caption["wav"].encode())

    return sorted(captions, key=order)


def make_shape(root: Path, language: str, split: str, n: int) -> dict[str, str]:
    """Draw a picture, speak its description, and return the line of captions that says so."""
    rng = random.Random(f"{language} {split} {n}")
    voices = SHAPES["voices"][split]
    if split == "train":
        turn, k = divmod(n, len(KNOWN))
        combination = KNOWN[k]
        number = turn % PICTURES
        voice = rng.choice(voices)
    else:
        turn, k = divmod(n, len(COMBINATIONS))
        combination = COMBINATIONS[k]
        number = split
        voice = voices[turn]
    words = [names[k] for names, k in zip(KINDS, combination)]
    label = "-".join(words)
    picture = f"pictures/{label}-{number}.png"
    wav = f"wavs/{language}/{split}-{n:05d}.wav"
    text = describe(language, combination, rng)
    if not (root / picture).exists():
        seed = zlib.crc32(picture.encode())
        pixels = draw(combination, seed)
        with data.replacing(root / picture) as part:
            imsave(part, pixels, format="png")
    espeak_voice = f"{SHAPES[language]['voice']}+{voice}"
    rate = rng.randint(130, 190)
    pitch = rng.randint(30, 70)
    wave = espeak(text, RATE, espeak_voice, rate, pitch)
    audio.save_wav(root / wav, wave, RATE)
    novelty = "new" if combination in NEW else "known"
    return {
        "picture": picture,
        "wav": wav,
        "text": text,
        "split": split,
        "voice": f"{voice} {novelty}",
        "label": label,
    }


def list_flickr8k(root: Path, language: str) -> list[dict]:
    """Flickr8k.token.txt, Flickr_8k.*Images.txt, the pictures, flickr_audio/{wav2capt.txt, wavs}.

    Arabic is in flickr_audio_ar, in the same form.
    """
    splits = {}
    for split, part in zip(data.SPLITS, ("train", "dev", "test")):
        listing = find(root, f"Flickr_8k.{part}Images.txt")
        for (name,) in lines(listing):
            splits[name] = split
    texts = {}
    for fields in lines(find(root, "Flickr8k.token.txt"), "\t"):
        texts[fields[0]] = fields[-1]
    pictures = {}
    for path in root.rglob("*.jpg"):
        pictures[path.name] = path.relative_to(root).as_posix()

    folder = "flickr_audio" if language == "en" else f"flickr_audio_{language}"
    listing = find(root, f"{folder}/wav2capt.txt")
    wavs = listing.parent.relative_to(root) / "wavs"
    captions = []
    for wav, name, number in lines(listing):
        if name not in splits or name not in pictures:
            print(f"skipped {wav}: its picture {name} is missing, or in no split", flush=True)
            continue
        text = texts.get(name + number, "")
        path = (wavs / wav).as_posix()
        caption = {
            "picture": pictures[name],
            "wav": path,
            "text": text,
            "split": splits[name],
            "voice": "",
            "label": "",
        }
        captions.append(caption)
    return captions


def list_s2igan(root: Path, language: str) -> list[dict]:
    """{train,test}/filenames.pickle, */images/NAME.jpg, */audio/NAME/*, */text/NAME.txt if it is there.

    Arabic is in */audio_arabic. The test's classes are not trained on; every 20th training picture validates.
    """
    images = find(root, "*/images")
    captions = []
    for split in ("train", "test"):
        names = read_names(find(root, f"{split}/filenames.pickle"), images)
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
        caption = {
            "picture": picture.as_posix(),
            "wav": path,
            "text": text,
            "split": split,
            "voice": "",
            "label": "",
        }
        captions.append(caption)
    return captions


def lines(path: Path, separator: str | None = None) -> list[list[str]]:
    """The fields of each line of a text that is not empty."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.split(separator) for line in text.splitlines() if line.strip()]


def find(root: Path, pattern: str) -> Path:
    """The first path of that pattern below root. raises UserError where there is none."""
    paths = sorted(root.rglob(pattern))
    if not paths:
        raise UserError(f"{root}: has no {pattern} below it; it must hold the corpus as it is published")
    return paths[0]


def list_own(root: Path, language: str) -> list[dict]:
    """The lines of captions-en.jsonl, or of another language's."""
    path = root / f"captions-{language}.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        reason = pretrained.brief(e)
        raise UserError(
            f"{path}: no list of spoken pictures, or a damaged one ({reason}); see {__file__}"
        ) from e


def read_clip(root: Path, clip: data.Clip) -> np.ndarray | None:
    """A recording as int16 (T, HOP), its end padded with 0; None for one that is too long.

    raises UserError for one that is too short, and where the picture cannot be read
    """
    picture = speech2image.picture_of(clip)[1]
    flow.read_picture(str(root / picture))
    wave = data.read_recording(clip, RATE, resample=True)
    if len(wave) < data.SHORTEST_SEC * RATE:
        seconds = len(wave) / RATE
        raise UserError(f"{seconds:.2f} s is below {data.SHORTEST_SEC} s")
    if len(wave) > data.LONGEST_SEC * RATE:
        return None
    padding = -len(wave) % HOP
    wave = F.pad(wave, (0, padding))
    pcm = (wave.clamp(-1, 1) * 32767).round()
    frames = pcm.view(-1, HOP).numpy()
    return frames.astype(np.int16)


def pack(config: Config) -> None:
    """Pack the speech of config.data.corpus, in all its languages."""
    d = config.data
    root = Path(d.data_dir)
    clips = []
    for language in d.langs:
        if d.corpus == "shapes":
            captions = list_shapes(root, language, d.sentences)
        elif d.corpus == "flickr8k":
            captions = list_flickr8k(root, language)
        elif d.corpus == "s2igan":
            captions = list_s2igan(root, language)
        else:
            captions = list_own(root, language)
        for n, caption in enumerate(captions):
            clip = to_clip(root, language, n, caption)
            clips.append(clip)
    form = speech2image.form(config)
    folder = data.packed_dir(config, form)
    read = functools.partial(read_clip, root)
    data.pack(folder, {"name": d.corpus}, clips, [], form, read, d.workers)


def to_clip(root: Path, language: str, n: int, caption: dict) -> data.Clip:
    """A line of captions, number n of its language, as a clip.

    raises UserError where a key is missing, or a value is not possible
    """
    where = f"{root}: line {n + 1} of its captions"
    try:
        label = caption["label"]
        picture = caption["picture"]
        group = f"{language} {caption['voice']}"
        text = caption["text"]
        split = caption["split"]
        wav = root.resolve() / caption["wav"]
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} lacks {e}; see {__file__}") from e
    if split not in data.SPLITS or ":" in label:
        splits = ", ".join(data.SPLITS)
        raise UserError(f"{where}: split must be one of {splits}, and : in no label")
    name = f"{label}:{picture}#{language}{n}"
    return data.Clip(name, text, split, str(wav), group=group.strip())


def train_tower(corpus: speech2image.Corpus, steps: int = 300) -> flow.SmallTower:
    """An image tower trained to match pictures with their descriptions, read as bags of words."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clips = corpus.clips("train")
    bags, vocabulary_size = bags_of_words(clips)
    tower = flow.SmallTower()
    text_encoder = nn.Sequential(
        nn.EmbeddingBag(vocabulary_size + 1, 256, mode="sum", padding_idx=0),
        nn.GELU(),
        nn.Linear(256, tower.width),
    )
    both = nn.ModuleList([tower, text_encoder])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3)
    scale = torch.tensor(1 / 0.07)
    batch = min(128, len(clips))
    for _ in tqdm(range(steps), desc="image tower", disable=None):
        pictures = []
        texts = []
        labels = []
        for n in rng.integers(len(clips), size=batch):
            number = corpus.number(clips[n])
            pictures.append(corpus.picture(number, tower.size))
            texts.append(bags[n])
            labels.append(corpus.label(clips[n]))
        words, _ = data.pad(texts, 1)
        text = F.normalize(text_encoder(words), dim=-1)
        image = tower(torch.stack(pictures))
        loss = recogniser.info_nce(image, text, torch.tensor(labels), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"image tower: {steps} steps, contrast loss {loss.item():.3f}", flush=True)
    return tower


def bags_of_words(clips: list[data.Clip]) -> tuple[list[Tensor], int]:
    """The words of each clip's text as numbers (n,) from 1 on, and the number of different words."""
    texts = []
    for clip in clips:
        letters = [c if c.isalnum() else " " for c in clip.text.lower()]
        words = "".join(letters).split()
        texts.append(words)
    vocabulary = sorted(set().union(*texts))
    numbers = {word: n for n, word in enumerate(vocabulary, 1)}
    bags = []
    for words in texts:
        bag = [numbers[word] for word in words]
        bags.append(torch.tensor(bag, dtype=torch.long))
    return bags, len(vocabulary)


def main() -> None:
    config = config_from_command_line(sys.argv[1:])
    pack(config)
    corpus = speech2image.Corpus(config)
    use_cuda = torch.cuda.is_available() and config.device != "cpu"
    device = "cuda" if use_cuda else "cpu"
    path = speech2image.tower_file(corpus)
    image = config.align.image
    if image == "scratch" and not path.exists():
        tower = train_tower(corpus)
        with data.replacing(path) as part:
            safetensors.torch.save_file(tower.state_dict(), part)
    tower = speech2image.load_tower(corpus).to(device)

    def encode(numbers: list[int]) -> np.ndarray:
        size = tower.module.size
        pictures = [corpus.picture(n, size) for n in numbers]
        pictures = torch.stack(pictures).to(device)
        embeddings = tower(pictures).float().cpu()  # (n, D)
        return embeddings.numpy()[:, None]

    path = speech2image.embeddings_file(corpus)
    lengths = [1] * len(corpus.names)
    data.cache_rows(path, lengths, None, encode, 32, f"pictures by {image}")


if __name__ == "__main__":
    run_main(main)
