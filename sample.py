"""Use a trained system: `python sample.py --ckpt out/demo --text "Anna bought two hats." --out x.wav`.

Several --text, or a --prompt_file with one a line, are generated in one batch. A long text is split into
sentences, whose speech is joined again; the pictures stay one a sentence: x.png, x.2.png, x.3.png. A system
that listens is prompted with `--speech a.wav --out a.png`. Any knob of the config goes on top of what the
checkpoint says: `--euler_steps 50 --cfg_scale 2`. A published LoRA goes on top of a checkpoint, or of the
pretrained network of `--config configs/spectrogram.yaml --lora someone/their-lora`.
"""

import argparse
import re
import unicodedata
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import audio
import evaluator
import system
from base import Output, Prompt, System
from config import DEVICES, Config, UserError
from device import move, pick_device
from entry import Parser, run_main
from text import normalize

LONGEST_TEXT = 5000  # characters in one text
PAUSE_SEC = 0.15  # between the sentences of a long text
SHORTEST_SEC = 0.2  # of speech that is a prompt


def main() -> None:
    options, knobs = parse_options()
    texts = list(options.text)
    if options.prompt_file:
        texts += evaluator.read_prompts(options.prompt_file)
    if bool(texts) == bool(options.speech):
        choices = "give --text or --prompt_file, or --speech for a system that listens"
        raise UserError(f"nothing to make, or too much: {choices}")
    texts = [check_text(text) for text in texts]
    check_output(Path(options.out or "sample.wav"))
    config, network = open_network(options, knobs)
    if network.listens and texts:
        raise UserError(f"system {config.system} listens: give --speech a.wav")
    if not network.listens and not texts:
        raise UserError(f"system {config.system} reads: give --text")
    out = Path(options.out) if options.out else free_name(network.output_kinds[0])
    if out.suffix[1:] not in network.output_kinds:
        raise UserError(f"--out {out}: its name must end in .{network.output_kinds[0]}")
    check_numbers(options, config.data.max_seconds)
    files = make_prompts(options, config, network, texts)
    prompts = sum(files, [])
    outputs = []
    size = config.eval.sample_batch
    for start in tqdm(range(0, len(prompts), size), unit="batch", disable=None, leave=False):
        outputs += evaluator.sample(network, prompts[start : start + size], config.sample)
    for number, file in enumerate(files):
        path = out if len(files) == 1 else out.with_stem(f"{out.stem}-{number}")
        write(path, outputs[: len(file)], network.output_kinds, options.png)
        outputs = outputs[len(file) :]


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and what is left of it: knobs of the config."""
    parser = Parser(description=__doc__.splitlines()[0], epilog=evaluator.KNOBS, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", default="", help="a checkpoint, or the folder of a run")
    add("--config", default="", help="instead of --ckpt: a recipe, for its network as it is before training")
    add("--lora", default="", type=expanduser, help="a published LoRA to put on top: a folder, or a hub id")
    add("--text", action="append", default=[], help="may be given several times")
    add("--prompt_file", default="", type=expanduser, help="a text file, a prompt a line")
    speech_help = "a sound file, for a system that listens; may be given several times"
    add("--speech", action="append", default=[], type=expanduser, help=speech_help)
    out_help = (
        "default: sample.wav, or sample.png, or, where that is there already, sample_2.wav, ...; "
        "several become sample-0.wav, sample-1.wav, ..."
    )
    add("--out", default="", type=expanduser, help=out_help)
    add("--seeds", type=int, default=1, help="samples of each prompt: with --seed, the one after it, ...")
    add("--seconds", type=float, default=0.0, help="length of each text; default: predicted")
    add("--seed", type=int, default=0)
    add("--png", action="store_true", help="write pictures beside each wav")
    add("--device", default="auto", choices=DEVICES)
    return evaluator.parse_with_knobs(parser)


def check_numbers(options: argparse.Namespace, longest: float) -> None:
    """raises UserError for numbers that are out of bounds; longest: seconds of an output."""
    seconds_valid = 0 <= options.seconds <= longest
    seed_valid = 0 <= options.seed < 2**63
    seeds_valid = 1 <= options.seeds <= 1000
    if not (seconds_valid and seed_valid and seeds_valid):
        raise UserError(
            f"--seconds goes from 0 to {longest}, --seed from 0 to 2^63 - 1, --seeds from 1 to 1000"
        )


def make_prompts(
    options: argparse.Namespace, config: Config, network: System, texts: list[str]
) -> list[list[Prompt]]:
    """The prompts of each file to write: the sentences of a text, or a recording; once for each seed."""
    files = []
    for text in texts:
        sentences = [text]
        if network.speaks:
            sentences = split_text(normalize(text), network.max_characters)
        characters = sum(map(len, sentences))
        prompts = []
        for sentence in sentences:
            seconds = options.seconds * len(sentence) / characters
            prompts.append(Prompt(sentence, seconds))
        files.append(prompts)
    for path in options.speech:
        speech = read_speech(path, config.data.max_seconds)
        prompt = Prompt(Path(path).stem, speech=speech)
        files.append([prompt])
    seeded = []
    for prompts in files:
        for seed in range(options.seed, options.seed + options.seeds):
            seeded.append([replace(prompt, seed=seed) for prompt in prompts])
    return seeded


def open_network(options: argparse.Namespace, knobs: list[str]) -> tuple[Config, System]:
    """The network of --ckpt or --config, with `knobs` on top, ready to sample, with the adapter of --lora."""
    if bool(options.ckpt) == bool(options.config):
        raise UserError(
            "give --ckpt, a checkpoint or the folder of a run, or --config, a recipe: one of the two"
        )
    device = pick_device(options.device)
    if options.ckpt:
        config, network, _ = system.load(options.ckpt, device, knobs)
    else:
        config = system.load_config(options.config, knobs)
        network = move(system.build(config), device).eval()
    if options.lora:
        network.load_adapter(options.lora)
    return config, network


def write(path: Path, outputs: list[Output], output_kinds: tuple[str, ...], pictures: bool) -> None:
    """The outputs of one file as one wav, with pauses between, where there is sound.

    pictures: draw those of each output too; where there is no sound they are drawn anyway.
    """
    if "wav" in output_kinds:
        rate = outputs[0].sample_rate
        pause = torch.zeros(int(PAUSE_SEC * rate))
        parts = []
        for output in outputs:
            parts += [output.wave, pause]
        wave = torch.cat(parts[:-1])
        wav = path.with_suffix(".wav")
        audio.save_wav(wav, wave, rate)
        print(f"{wav}  {len(wave) / rate:.2f} s")
    if not pictures and "png" not in output_kinds:
        return
    for number, output in enumerate(outputs, 1):
        stem = path.stem if number == 1 else f"{path.stem}.{number}"
        names = output.draw(path.with_name(stem))
        paths = [str(path.with_name(name)) for name in names.values()]
        print(", ".join(paths))


def read_speech(path: str, longest: float) -> Tensor:
    """A prompt (N,) at 16 kHz from any sound file; raises UserError if silent, too short or too long."""
    rate = evaluator.SPEECH_RATE
    wave = audio.load_wav(path, rate)
    seconds = len(wave) / rate
    if not SHORTEST_SEC * rate <= len(wave) <= longest * rate:
        bounds = f"it must have {SHORTEST_SEC} to {longest} s, data.max_seconds"
        raise UserError(f"{path}: {seconds:.2f} s of speech; {bounds}")
    if not wave.isfinite().all() or wave.abs().max() < 1e-4:
        raise UserError(f"{path}: silent, or not numbers; there is nothing to see in it")
    return wave


def check_output(path: Path) -> None:
    """raises UserError for what cannot be written, before any work is done."""
    if path.suffix not in (".wav", ".png"):
        raise UserError(f"--out {path}: its name must end in .wav, or .png for a picture")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {path}: its folder cannot be made ({e.strerror})") from e


def free_name(suffix: str) -> Path:
    """sample.wav, sample_2.wav, ...: the first name under which nothing is here yet, not a picture either."""
    stem = "sample"
    number = 1
    while any(Path().glob(f"{stem}[.-]*")):
        number += 1
        stem = f"sample_{number}"
    return Path(f"{stem}.{suffix}")


def check_text(text: str) -> str:
    """The text without superfluous blanks; raises UserError for one that cannot be spoken."""
    text = " ".join(text.split())
    for character in text:
        if not is_speakable(character):
            raise UserError(f"text {shorten(text)!r}: {character!r} cannot be spoken; leave it out")
    if not has_word(text):
        raise UserError(f"text {text!r}: there is nothing to say in it")
    if len(text) > LONGEST_TEXT:
        raise UserError(
            f"text {shorten(text)!r}: {len(text)} characters are more than {LONGEST_TEXT}; "
            "use --prompt_file with a paragraph a line"
        )
    return text


def is_speakable(character: str) -> bool:
    """Not a control character, nor, from U+2000 on, a symbol such as an emoji, or what is no character."""
    category = unicodedata.category(character)
    if ord(character) < 0x2000:
        return category != "Cc"
    return category not in ("Cc", "So", "Sk", "Cs", "Co", "Cn", "Cf")


def split_text(text: str, longest: int) -> list[str]:
    """Its sentences; one of more than `longest` characters is cut at commas, then between words.

    raises UserError for a word that is longer.
    """
    sentences = re.split(r"(?<=[.!?…])(?<!\b[A-Za-z]\.)\s+(?=[^a-z])", text)  # not after p.m., U.S., J.
    pieces = join_wordless(sentences)
    pieces = cut_long(pieces, longest, r"(?<=[,;:])\s+")
    pieces = cut_long(pieces, longest, r"\s+")
    for piece in pieces:
        if len(piece) > longest:
            raise UserError(f"text {shorten(piece)!r}: a word of {len(piece)} characters cannot be spoken")
    return pieces


def cut_long(pieces: list[str], longest: int, boundary: str) -> list[str]:
    """The pieces, those of more than `longest` characters cut at the boundary, a regular expression."""
    found = []
    for piece in pieces:
        if len(piece) > longest:
            parts = re.split(boundary, piece)
            found += join_short(parts, longest)
        else:
            found.append(piece)
    return found


def join_wordless(parts: list[str]) -> list[str]:
    """Parts without a letter or digit ("...") joined to the one before them, or after."""
    joined = []
    for part in parts:
        if joined and not (has_word(part) and has_word(joined[-1])):
            joined[-1] += " " + part
        else:
            joined.append(part)
    return joined


def has_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def join_short(parts: list[str], longest: int) -> list[str]:
    """Neighbours joined again while they fit, so that no piece is shorter than it must be."""
    joined = parts[:1]
    for part in parts[1:]:
        if len(joined[-1]) + 1 + len(part) <= longest:
            joined[-1] += " " + part
        else:
            joined.append(part)
    return joined


def shorten(text: str) -> str:
    return text if len(text) <= 30 else text[:27] + "..."


if __name__ == "__main__":
    run_main(main)
