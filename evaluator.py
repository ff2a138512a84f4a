"""How good a system is: validation loss on fixed noise, and sampled speech that a recogniser must understand.

All ranks take their share of the clips and gather at the end. `python evaluator.py --ckpt out/demo --limit 64` does after
training what the loop does in it. Everything lands in <out_dir>/eval/step_*: wavs, pictures, wer.jsonl.
"""

import argparse
import json
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
        self.floors = {}

    def run(self, network, step: int) -> dict[str, float | str]:
        """Sample every prompt with `network`, transcribe, score; returns metrics on rank 0, {} on the others."""
        self.floors = self.floors or self.measure_floors(network)
        folder = Path(self.config.out_dir, "eval", f"step_{step:07d}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.sample_share(network, folder)
        rows = sorted(gather(rows, self.world), key=lambda row: row["number"])
        if self.rank != 0:
            return {}
        with open(folder / "wer.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if rows:
            shutil.copy(folder / rows[0]["audio"], Path(self.config.out_dir, "sample.wav"))
        errors, words = [r["errors"] for r in rows], [r["words"] for r in rows]
        low, high = metric.bootstrap_interval(errors, words)
        found = {"eval/wer": sum(errors) / max(1, sum(words)), "eval/wer_low": low, "eval/wer_high": high, **self.floors,
                 "eval/recogniser": self.recogniser.name}
        distortions = [r["mcd"] for r in rows if r["mcd"] is not None]
        if distortions:
            found["eval/mcd"] = sum(distortions) / len(distortions)
        return found

    def sample_share(self, network, folder: Path) -> list[dict]:
        """This rank's prompts, longest first in batches of sample_batch: sampled, written, transcribed; a row each."""
        e, rows = self.config.eval, []
        texts = self.prompts or [clip.text for clip in self.clips]
        mine = sorted(range(self.rank, len(texts), self.world), key=lambda n: -len(texts[n]))
        bar = tqdm(total=len(mine), desc="speaking", unit="prompt", disable=None if self.rank == 0 else True, leave=False)
        for start in range(0, len(mine), e.sample_batch):
            numbers = mine[start:start + e.sample_batch]
            made = network.sample([self.prompt(n, texts[n]) for n in numbers], self.config.sample)
            heard = self.recogniser.transcribe([a.wave for a in made], made[0].sample_rate)
            rows += [self.row(n, texts[n], a, h, folder) for n, a, h in zip(numbers, made, heard)]
            bar.update(len(numbers))
        bar.close()
        return rows

    def prompt(self, number: int, text: str) -> Prompt:
        true_length = self.config.eval.true_durations and self.clips
        seconds = self.clips[number].frames * self.config.mel.hop / self.config.mel.sample_rate if true_length else 0.0
        return Prompt(text, seconds, seed=number)

    def row(self, number: int, text: str, made, heard: str, folder: Path) -> dict:
        """Write one sample, and for the first ones its pictures and its reference; returns its line of wer.jsonl."""
        errors, words = metric.word_errors(recogniser.normalise(text), recogniser.normalise(heard))
        row = {"number": number, "id": self.clips[number].id if self.clips else f"prompt-{number}", "text": text, "hypothesis": heard,
               "errors": errors, "words": words, "mcd": None, "audio": f"{number:03d}.wav",
               "reference_audio": None, "picture": None, "reference_picture": None, "attention": None}
        audio.save_wav(folder / row["audio"], made.wave, made.sample_rate)
        reference = self.corpus.log_mel(self.clips[number]) if self.clips else None
        if reference is not None:
            row["mcd"] = metric.mel_cepstral_distortion(made.log_mel.numpy(), reference.numpy())
        if number < SHOWN:
            row["picture"], row["attention"] = f"{number:03d}.png", f"{number:03d}.attention.png"
            metric.spectrogram_png(made.log_mel.numpy(), folder / row["picture"], self.config.mel)
            metric.attention_png(made.attention.numpy(), text, folder / row["attention"], len(made.wave) / made.sample_rate)
            if reference is not None:
                row["reference_picture"] = f"{number:03d}.ref.png"
                metric.spectrogram_png(reference.numpy(), folder / row["reference_picture"], self.config.mel)
            if reference is not None and self.clips[number].wav:
                row["reference_audio"] = f"{number:03d}.ref.wav"
                audio.save_wav(folder / row["reference_audio"], audio.load_wav(self.clips[number].wav, made.sample_rate), made.sample_rate)
        return row

    def measure_floors(self, network) -> dict[str, float]:
        """The recogniser's own error rate on the references, as recorded and after the vocoder: no voice can be better."""
        mine, counts = self.clips[self.rank::self.world], {"eval/wer_ground_truth": [], "eval/wer_vocoded": []}
        mine = [clip for clip in mine if clip.wav and Path(clip.wav).exists()]
        rate = self.config.mel.sample_rate
        for name, waves in (("eval/wer_ground_truth", [audio.load_wav(clip.wav, rate) for clip in mine]),
                            ("eval/wer_vocoded", [network.vocode(self.corpus.log_mel(clip)) for clip in mine])):
            heard = self.recogniser.transcribe(waves, rate)
            counts[name] = [metric.word_errors(recogniser.normalise(c.text), recogniser.normalise(h)) for c, h in zip(mine, heard)]
        totals = {name: gather(pairs, self.world) for name, pairs in counts.items()}
        return {name: sum(e for e, _ in pairs) / max(1, sum(w for _, w in pairs)) for name, pairs in totals.items() if pairs}


@torch.no_grad()
def validate(network, batches, config: Config, device: torch.device, world: int) -> dict[str, float]:
    """The loss on the validation clips at fixed noise and stratified t: smooth, comparable between steps, binned by t."""
    sums = torch.zeros(2, BINS + 1, dtype=torch.float64)       # summed losses and their counts: a bin of t each, then durations
    for batch in batches.validation():
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.dtype == "bf16"):
            losses = network(batch)
        bins = (batch["t"] * BINS).long().clamp(max=BINS - 1).cpu()
        sums[0].index_add_(0, bins, losses["flow_loss_per_clip"].double().cpu())
        sums[1].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))
        sums[0, BINS] += losses["duration_loss"].double().cpu() * len(bins)
        sums[1, BINS] += len(bins)
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    means = (sums[0] / sums[1]).tolist()
    by_t = {f"val/flow_loss_t{b}": means[b] for b in range(BINS) if sums[1, b] > 0}
    return {"val/flow_loss": (sums[0, :BINS].sum() / sums[1, :BINS].sum()).item(), "val/duration_loss": means[BINS], **by_t}


def show(found: dict) -> None:
    """Print what was found."""
    if "val/flow_loss" in found:
        print(f"  validation: flow loss {found['val/flow_loss']:.4f}  duration loss {found['val/duration_loss']:.4f}", flush=True)
    if "eval/wer" not in found:
        return
    floors = [f"{what} {100 * found[key]:.1f} %" for what, key in (("recordings", "eval/wer_ground_truth"), ("vocoded", "eval/wer_vocoded"))
              if key in found]
    print(f"  word error rate {100 * found['eval/wer']:.1f} % [{100 * found['eval/wer_low']:.1f}, {100 * found['eval/wer_high']:.1f}]"
          f"  by {found['eval/recogniser']}  floors: {', '.join(floors) or 'none'}", flush=True)


def log_media(writer: metric.Writer, out_dir: str, step: int) -> None:
    """Hand the first samples to W&B, to hear and to look at."""
    folder = Path(out_dir, "eval", f"step_{step:07d}")
    writer.media(step, "eval/audio", sorted(folder.glob("00[0-7].wav")))
    writer.media(step, "eval/spectrogram", sorted(folder.glob("00[0-7].png")))
    writer.media(step, "eval/attention", sorted(folder.glob("00[0-7].attention.png")))


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    o = parser.parse_args()
    changes = {"eval": {"prompts": o.prompts, "split": o.split, "limit": o.limit, "recogniser": o.recogniser,
                        "true_durations": o.true_durations},
               "sample": {name: value for name, value, given in (("euler_steps", o.steps, o.steps > 0), ("vocoder", o.vocoder, o.vocoder),
                                                                 ("cfg_scale", o.cfg_scale, o.cfg_scale >= 0)) if given}}
    if o.data_dir:
        changes["data"] = {"data_dir": o.data_dir}
    device = system.pick_device(o.device)
    config, network, step = system.load(o.ckpt, device, changes, o.out_dir)
    judge = Evaluator(config, None if o.prompts else system.open_corpus(config), device)
    found = judge.run(network, step)
    show(found)
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
