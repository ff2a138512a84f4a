"""How good a system is: validation loss on fixed noise, and sampled speech that a recogniser must understand.

All ranks take their share of the clips and gather at the end. `python evaluator.py --ckpt out/demo --limit 64` does after
training what the loop does in it. Everything lands in <out_dir>/eval/step_*: wavs, pictures, wer.jsonl.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import audio
import metric
import recogniser
import system
from config import Config, UserError, run_main
from model import Prompt

SHOWN = 8                            # samples that get pictures and a place in W&B and the report
BINS = 10                            # of t, for the validation loss
IN_BIN = re.compile(r"_t\d$")        # a loss in one of them


class Evaluator:
    """Prompts, references and the recogniser, resident; `run` samples and scores a network."""

    def __init__(self, config: Config, corpus, device: torch.device, rank: int = 0, world: int = 1):
        self.config, self.corpus, self.device, self.rank, self.world = config, corpus, device, rank, world
        self.prompts = read_prompts(config.eval.prompts)[:config.eval.limit] if config.eval.prompts else []
        self.clips = [] if self.prompts else corpus.clips(config.eval.split)[:config.eval.limit]
        if rank != 0:
            dist.barrier()                                     # rank 0 downloads it, the others find it
        self.recogniser = recogniser.load(config.eval.recogniser, device)
        if world > 1 and rank == 0:
            dist.barrier()
        self.floors, self.references = {}, {}

    def run(self, network, step: int) -> dict[str, float | str]:
        """Sample every prompt with `network`, transcribe, score; returns metrics on rank 0, {} on the others."""
        self.floors = self.floors or self.measure_floors(network)
        folder = Path(self.config.out_dir, "eval", f"step_{step:07d}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.sample_share(network, folder)
        rows = sorted(gather(rows, self.world), key=lambda row: row["number"])
        if self.rank != 0:
            return {}
        keys = dict.fromkeys(key for row in rows for key in row)
        rows = [dict.fromkeys(keys) | row for row in rows]     # every line has the same keys
        with open(folder / "wer.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name in [row[kind] for row in rows[:1] for kind in (("audio", "picture") if network.paints else ("audio",))]:
            shutil.copy(folder / name, Path(self.config.out_dir, f"sample{Path(name).suffix}"))
        errors, words = [r["errors"] for r in rows], [r["words"] for r in rows]
        low, high = metric.bootstrap_interval(errors, words)
        found = {"eval/wer": sum(errors) / max(1, sum(words)), "eval/wer_low": low, "eval/wer_high": high, **self.floors,
                 "eval/recogniser": self.recogniser.name}
        return found | {f"eval/{key}": value for key, value in mean_scores(rows).items()}

    def sample_share(self, network, folder: Path) -> list[dict]:
        """This rank's prompts, longest first in batches of sample_batch: sampled, written, transcribed; a row each."""
        e, rows = self.config.eval, []
        texts = self.prompts or [clip.text for clip in self.clips]
        mine = sorted(range(self.rank, len(texts), self.world), key=lambda n: -len(texts[n]))
        bar = tqdm(total=len(mine), desc="speaking", unit="prompt", disable=None if self.rank == 0 else True, leave=False)
        for start in range(0, len(mine), e.sample_batch):
            numbers = mine[start:start + e.sample_batch]
            made = network.sample([self.prompt(network, n, texts[n]) for n in numbers], self.config.sample)
            heard = self.recogniser.transcribe([a.wave for a in made], made[0].sample_rate)
            rows += [self.row(network, n, texts[n], a, h, folder) for n, a, h in zip(numbers, made, heard)]
            bar.update(len(numbers))
        bar.close()
        return rows

    def prompt(self, network, number: int, text: str) -> Prompt:
        true_length = self.config.eval.true_durations and self.clips
        return Prompt(text, self.clips[number].frames / network.frame_rate if true_length else 0.0, seed=number)

    def row(self, network, number: int, text: str, made, heard: str, folder: Path) -> dict:
        """Write one sample, and for the first ones the pictures and the reference; returns its line of wer.jsonl."""
        errors, words = metric.word_errors(recogniser.normalise(text), recogniser.normalise(heard))
        row = {"number": number, "id": self.clips[number].id if self.clips else f"prompt-{number}", "text": text, "hypothesis": heard,
               "errors": errors, "words": words, **(network.score(made, self.corpus, self.clips[number]) if self.clips else {}),
               "audio": f"{number:03d}.wav", "reference_audio": None, "picture": None, "reference_picture": None}
        audio.save_wav(folder / row["audio"], made.wave, made.sample_rate)
        if number < SHOWN:
            row |= made.draw(folder / f"{number:03d}")
        if number < SHOWN and self.clips:
            drawn = self.reference(network, number).draw(folder / f"{number:03d}.ref")
            row |= {f"reference_{kind}": name for kind, name in drawn.items()}
            recording = self.corpus.recording(self.clips[number])
            if recording is not None:
                row["reference_audio"] = f"{number:03d}.ref.wav"
                audio.save_wav(folder / row["reference_audio"], *recording)
        return row

    def reference(self, network, number: int):
        """A clip through all but the generative network, which training does not change: those that are shown are kept."""
        if number not in self.references:
            made = network.reference(self.corpus, self.clips[number])
            if number >= SHOWN:
                return made
            self.references[number] = made
        return self.references[number]

    def measure_floors(self, network) -> dict[str, float]:
        """What no voice can be expected to be better than: the recogniser's error rate on the recordings, and on what is left of them
        after all but the generative network ("vocoded"), and the scores of the latter, where they are not 0 by their nature."""
        mine = range(self.rank, len(self.clips), self.world)
        recordings = {n: found for n in mine if (found := self.corpus.recording(self.clips[n])) is not None}
        vocoded, scores, floors = {}, [], {}
        for n in recordings:
            made = self.reference(network, n)
            vocoded[n] = made.wave, made.sample_rate
            scores.append(network.score(made, self.corpus, self.clips[n]))
        for name, sounds in (("ground_truth", recordings), ("vocoded", vocoded)):
            heard = self.recogniser.transcribe([wave for wave, _ in sounds.values()], next(iter(sounds.values()))[1]) if sounds else []
            counts = gather([metric.word_errors(recogniser.normalise(self.clips[n].text), recogniser.normalise(h))
                             for n, h in zip(sounds, heard)], self.world)
            if counts:
                floors[f"eval/wer_{name}"] = sum(e for e, _ in counts) / max(1, sum(w for _, w in counts))
        means = mean_scores(gather(scores, self.world))
        return floors | {f"eval/{key}_vocoded": value for key, value in means.items() if value > 1e-3}


def mean_scores(rows: list[dict]) -> dict[str, float]:
    """The mean of each of metric.SCORES over the rows that have it."""
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in metric.SCORES}
    return {key: sum(found) / len(found) for key, found in values.items() if found}


@torch.no_grad()
def validate(network, batches, config: Config, device: torch.device, world: int) -> dict[str, float]:
    """The losses on the validation clips at fixed noise and stratified t: smooth, comparable between steps.

    returns: the mean of every scalar but `loss`; where the loss of each clip is known, also its mean in each bin of t.
    """
    sums = {}                                                  # name: summed values, and of how many clips
    for batch in batches.validation():
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.dtype == "bf16"):
            losses = network(batch)
        per_clip, clips = losses.pop("flow_loss_per_clip", torch.zeros(0)), len(batch["t"])
        bins = (batch["t"] * BINS).long().clamp(max=BINS - 1).tolist()
        found = [(name, value.item() * clips, clips) for name, value in losses.items() if value.dim() == 0 and name != "loss"]
        found += [(f"flow_loss_t{b}", value, 1) for b, value in zip(bins, per_clip.tolist())]
        for name, value, count in found:
            total, counted = sums.get(name, (0, 0))
            sums[name] = total + value, counted + count
    merged = {}
    for name, (value, count) in gather(list(sums.items()), world):
        total, counted = merged.get(name, (0, 0))
        merged[name] = total + value, counted + count
    in_order = sorted(merged.items(), key=lambda item: item[0] if IN_BIN.search(item[0]) else "")      # the bins come last
    return {f"val/{name}": total / count for name, (total, count) in in_order}


def show(found: dict) -> None:
    """Print what was found."""
    losses = [f"{key[4:].replace('_', ' ')} {value:.4f}" for key, value in found.items()
              if key.startswith("val/") and not IN_BIN.search(key)]
    if losses:
        print(f"  validation: {'  '.join(losses)}", flush=True)
    if "eval/wer" not in found:
        return
    floors = [f"{what} {100 * found[key]:.1f} %" for what, key in (("recordings", "eval/wer_ground_truth"), ("vocoded", "eval/wer_vocoded"))
              if key in found]
    print(f"  word error rate {100 * found['eval/wer']:.1f} % [{100 * found['eval/wer_low']:.1f}, {100 * found['eval/wer_high']:.1f}]"
          f"  by {found['eval/recogniser']}  floors: {', '.join(floors) or 'none'}", flush=True)
    for key in metric.SCORES:
        if f"eval/{key}" in found:
            floor = f"  floor: vocoded {found[f'eval/{key}_vocoded']:.3g}" if f"eval/{key}_vocoded" in found else ""
            print(f"  {metric.SCORES[key].title} {metric.with_unit(key, found[f'eval/{key}'])}{floor}", flush=True)


def log_media(writer: metric.Writer, out_dir: str, step: int) -> None:
    """Hand the first samples to W&B, to hear and to look at."""
    folder = Path(out_dir, "eval", f"step_{step:07d}")
    for name, ending in (("audio", "wav"), ("spectrogram", "png"), ("attention", "attention.png"), ("confidence", "confidence.png")):
        if paths := sorted(folder.glob(f"00[0-{SHOWN - 1}].{ending}")):
            writer.media(step, f"eval/{name}", paths)


def gather(share: list, world: int) -> list:
    """The lists of all ranks as one, on every rank."""
    if world == 1:
        return share
    shares = [None] * world
    dist.all_gather_object(shares, share)
    return [item for part in shares for item in part]


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty; raises UserError when it is missing or has none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a readable text file of prompts, one a line") from e
    if not any(lines):
        raise UserError(f"{path}: has no prompt")
    return [line for line in lines if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="--key value for any knob of config.py changes what the checkpoint says, as --klein.base DIR")
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    parser.add_argument("--prompts", default="", help="a text file, a sentence a line; default: the validation clips")
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--recogniser", default="base.en", help="Whisper name, .pt file, or pocketsphinx")
    parser.add_argument("--true_durations", action="store_true", help="sample at the references' lengths")
    parser.add_argument("--data_dir", default="", help="where the corpus is now, if it moved")
    parser.add_argument("--steps", type=int, default=0, help="Euler steps; default: as trained")
    parser.add_argument("--cfg_scale", type=float, default=-1.0, help="guidance; default: as trained")
    parser.add_argument("--vocoder", default="", help="griffinlim | BigVGAN id or folder; default: as trained")
    parser.add_argument("--out_dir", default="", help="default: the run's")
    parser.add_argument("--device", default="auto")
    o, knobs = parser.parse_known_args()
    changes = {"eval": {"prompts": o.prompts, "split": o.split, "limit": o.limit, "recogniser": o.recogniser,
                        "true_durations": o.true_durations},
               "sample": {name: value for name, value, given in (("euler_steps", o.steps, o.steps > 0), ("vocoder", o.vocoder, o.vocoder),
                                                                 ("cfg_scale", o.cfg_scale, o.cfg_scale >= 0)) if given}}
    if o.data_dir:
        changes["data"] = {"data_dir": o.data_dir}
    device = system.pick_device(o.device)
    config, network, step = system.load(o.ckpt, device, changes, o.out_dir, knobs)
    judge = Evaluator(config, None if o.prompts else system.open_corpus(config), device)
    found = judge.run(network, step)
    show(found)
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
