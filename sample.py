"""Use a trained system: `python sample.py --ckpt out/demo --text "Anna bought two green baskets." --out x.wav`.

Several --text, or --prompt_file with one a line, are made in one batch. A long text is split at its sentences, and joined again;
its pictures stay one a sentence: x.png, x.2.png, x.3.png. A system that listens is prompted with `--speech a.wav --out a.png`.
A published LoRA goes on a checkpoint, or on the pretrained network of `--config configs/spectrogram.yaml --lora someone/their-lora`.
"""

import argparse
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import audio
import evaluator
import system
from config import DEVICES, Config, UserError, run_main
from device import move, pick_device
from model import Prompt
from text import normalize

LONGEST_TEXT = 5000                  # characters in one text
PAUSE_SEC = 0.15                     # between the sentences of a long text
SPEECH_RATE, SHORTEST_SEC = 16000, 0.2           # Hz and seconds, of speech that is a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="--key value for any knob of config.py changes what the checkpoint says, as --klein.base DIR")
    parser.add_argument("--ckpt", default="", help="a checkpoint, or the folder of a run")
    parser.add_argument("--config", default="", help="instead of --ckpt: a recipe, for its network as it is before training")
    parser.add_argument("--lora", default="", help="a published LoRA to put on top: a folder, or a hub id")
    parser.add_argument("--text", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt_file", default="", help="a text file, a prompt a line")
    parser.add_argument("--speech", action="append", default=[], help="a sound file, for a system that listens; may be given several times")
    parser.add_argument("--out", default="", help="default: sample.wav, or sample.png; several become sample-0.wav, sample-1.wav, ...")
    parser.add_argument("--seeds", type=int, default=1, help="samples of each prompt: with --seed, the one after it, ...")
    parser.add_argument("--steps", type=int, help="of sampling; default: as trained")
    parser.add_argument("--cfg_scale", type=float, help="guidance, 1 = none; default: as trained")
    parser.add_argument("--seconds", type=float, default=0.0, help="length of each text; default: predicted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocoder", default="", help="griffinlim | BigVGAN id or folder; default: as trained")
    parser.add_argument("--png", action="store_true", help="write pictures beside each wav")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    options, knobs = parser.parse_known_args()
    texts = options.text + (evaluator.read_prompts(options.prompt_file) if options.prompt_file else [])
    if bool(texts) == bool(options.speech):
        raise UserError("nothing to make, or too much: give --text or --prompt_file, or --speech for a system that listens")
    texts = [check_text(text) for text in texts]
    check_output(Path(options.out or "sample.wav"))
    config, network = open_network(options, knobs)
    if network.listens == bool(texts):
        raise UserError(f"system {config.system} {'listens: give --speech a.wav' if texts else 'reads: give --text'}")
    out = Path(options.out or f"sample.{network.makes[0]}")
    if out.suffix[1:] not in network.makes:
        raise UserError(f"--out {out}: its name must end in .{network.makes[0]}")
    if not 0 <= options.seconds <= config.data.max_seconds or not 0 <= options.seed < 2 ** 63 or not 1 <= options.seeds <= 1000:
        raise UserError(f"--seconds goes from 0 to {config.data.max_seconds}, --seed from 0 to 2^63 - 1, --seeds from 1 to 1000")
    wanted = [[Prompt(sentence, options.seconds * len(sentence) / sum(map(len, parts))) for sentence in parts]
              for parts in (split_text(normalize(text), network.longest) if network.speaks else [text] for text in texts)]
    wanted += [[Prompt(Path(path).stem, speech=read_speech(path, config.data.max_seconds))] for path in options.speech]
    wanted = [[replace(prompt, seed=options.seed + n) for prompt in parts] for parts in wanted for n in range(options.seeds)]
    prompts, made = sum(wanted, []), []
    for start in tqdm(range(0, len(prompts), config.eval.sample_batch), unit="batch", disable=None, leave=False):
        made += network.sample(prompts[start:start + config.eval.sample_batch], config.sample)
    for number, parts in enumerate(wanted):
        pieces, made = made[:len(parts)], made[len(parts):]
        write(out if len(wanted) == 1 else out.with_stem(f"{out.stem}-{number}"), pieces, network.makes, options.png)


def open_network(options: argparse.Namespace, knobs: list[str]) -> tuple[Config, torch.nn.Module]:
    """The network of --ckpt or --config, with `knobs` on top, ready to sample, with the adapter of --lora."""
    if bool(options.ckpt) == bool(options.config):
        raise UserError("give --ckpt, a checkpoint or the folder of a run, or --config, a recipe: one of the two")
    device = pick_device(options.device)
    given = {"euler_steps": options.steps, "cfg_scale": options.cfg_scale, "vocoder": options.vocoder or None}
    knobs = [f"--sample.{name}={value}" for name, value in given.items() if value is not None] + knobs
    if options.ckpt:
        config, network, _ = system.load(options.ckpt, device, {}, words=knobs)
    else:
        config = system.load_config(options.config, knobs)
        network = move(system.build(config), device).eval()
    if options.lora:
        network.load_adapter(options.lora)
    return config, network


def write(path: Path, pieces: list, makes: tuple[str, ...], pictures: bool) -> None:
    """The pieces of one prompt as one wav, with a pause between, if sound is made; the pictures of each, if they are, or asked for."""
    if "wav" in makes:
        rate = pieces[0].sample_rate
        pause = torch.zeros(int(PAUSE_SEC * rate))
        wave = torch.cat([part for piece in pieces for part in (piece.wave, pause)][:-1])
        audio.save_wav(path.with_suffix(".wav"), wave, rate)
        print(f"{path.with_suffix('.wav')}  {len(wave) / rate:.2f} s")
    for number, piece in enumerate(pieces if pictures or "png" in makes else [], 1):
        drawn = piece.draw(path.with_name(path.stem if number == 1 else f"{path.stem}.{number}"))
        print(", ".join(str(path.with_name(name)) for name in drawn.values()))


def read_speech(path: str, longest: float) -> torch.Tensor:
    """A prompt (N,) at 16 kHz from any sound file; raises UserError for one that says nothing, or is too short or long."""
    wave = audio.load_wav(path, SPEECH_RATE)
    if not SHORTEST_SEC * SPEECH_RATE <= len(wave) <= longest * SPEECH_RATE:
        raise UserError(f"{path}: {len(wave) / SPEECH_RATE:.2f} s of speech; it must have {SHORTEST_SEC} to {longest} s, data.max_seconds")
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


def check_text(text: str) -> str:
    """The text without superfluous blanks; raises UserError for one that cannot be spoken."""
    text = " ".join(text.split())
    kinds = ((c, unicodedata.category(c)) for c in text)
    unspeakable = [c for c, kind in kinds if kind == "Cc" or ord(c) >= 0x2000 and kind in ("So", "Sk", "Cs", "Co", "Cn", "Cf")]
    if unspeakable:
        raise UserError(f"text {shorten(text)!r}: {unspeakable[0]!r} cannot be spoken; leave it out")
    if not any(c.isalnum() for c in text):
        raise UserError(f"text {text!r}: there is nothing to say in it")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"text {shorten(text)!r}: {len(text)} characters are more than {LONGEST_TEXT}; "
                        "use --prompt_file with a paragraph a line")
    return text


def split_text(text: str, longest: int) -> list[str]:
    """Its sentences; one of more than `longest` characters is cut at commas, then between words.

    raises UserError for a word that is longer.
    """
    pieces = re.split(r"(?<=[.!?…])(?<!\b[A-Za-z]\.)\s+(?=[^a-z])", text)          # not after p.m., U.S., J.
    pieces = join_wordless(pieces)
    for boundary in (r"(?<=[,;:])\s+", r"\s+"):
        pieces = [part for piece in pieces
                  for part in (join_short(re.split(boundary, piece), longest) if len(piece) > longest else [piece])]
    for piece in pieces:
        if len(piece) > longest:
            raise UserError(f"text {shorten(piece)!r}: a word of {len(piece)} characters cannot be spoken")
    return pieces


def join_wordless(parts: list[str]) -> list[str]:
    """Parts without a letter or digit ("...") joined to the one before them, or after."""
    joined = []
    for part in parts:
        if joined and not (any(map(str.isalnum, part)) and any(map(str.isalnum, joined[-1]))):
            joined[-1] += " " + part
        else:
            joined.append(part)
    return joined


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
