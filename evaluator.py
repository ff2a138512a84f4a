"""How good a system is: validation loss on fixed noise, and samples: heard by a recogniser, looked at by the system's own judges.

All ranks take their share of the clips and gather at the end. `python evaluator.py --ckpt out/demo --limit 64` does after
training what the loop does in it; `--snr inf 20 10 5 0` repeats it under noise. All of it lands in <out_dir>/eval/step_*.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import audio
import data
import metric
import recogniser
import system
from config import DEVICES, Config, UserError, run_main
from device import pick_device
from model import Prompt
from text import normalize

SHOWN = 8                            # samples that get pictures and a place in W&B and the report
BINS = 10                            # of t, for the validation loss
FLOORS = 1                           # how floors are measured: raised, those that are kept are measured again
OF_MADE = re.compile(r"eval/(fad|kad|clap|fid|inception_score|recall_made)")      # figures that depend on what was made
IN_BIN = re.compile(r"_t\d$")        # a loss in one of them


class Evaluator:
    """Prompts, references and, for a system that speaks, the recogniser, resident; `run` samples and scores a network."""

    def __init__(self, config: Config, corpus, device: torch.device, rank: int = 0, world: int = 1):
        self.config, self.corpus, self.device, self.rank, self.world = config, corpus, device, rank, world
        parts = system.SYSTEMS[config.system].network
        self.prompts = read_prompts(config.eval.prompts)[:config.eval.limit] if config.eval.prompts else []
        if parts.speaks:
            self.prompts = [normalize(prompt) for prompt in self.prompts]
        self.clips = [] if self.prompts else corpus.clips(config.eval.split)[:config.eval.limit]
        if parts.listens and self.prompts:
            raise UserError(f"eval.prompts {config.eval.prompts}: system {config.system} listens; it is evaluated on its corpus's speech")
        self.recogniser = self.load_recogniser() if parts.speaks else None
        self.floors, self.references, self.snr = {}, {}, math.inf

    def run(self, network, step: int) -> dict[str, float | str]:
        """Sample every prompt with `network`, score, and let the recogniser hear them; returns metrics on rank 0, {} on the others."""
        self.floors = self.floors or self.find_floors(network)
        folder = Path(self.config.out_dir, "eval", f"step_{step:07d}")
        folder.mkdir(parents=True, exist_ok=True)
        rows, features = self.sample_share(network, folder)
        rows, features = (sorted(gather(part, self.world), key=lambda item: item["number"]) for part in (rows, features))
        if self.rank != 0:
            return {}
        keys = dict.fromkeys(key for row in rows for key in row)
        rows = [dict.fromkeys(keys) | row for row in rows]     # every line has the same keys
        with open(folder / "samples.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for ending, kind in (("wav", "audio"), ("png", "picture")):
            if ending in network.makes:
                shutil.copy(folder / rows[0][kind], Path(self.config.out_dir, f"sample.{ending}"))
        found = error_rate(rows) | {"eval/recogniser": self.recogniser.name} if self.recogniser else {}
        found |= {**self.floors, **{f"eval/{key}": value for key, value in mean_scores(rows).items()}, **by_group(rows)}
        return found | (figures(features, folder) if features else {})

    def sample_share(self, network, folder: Path) -> tuple[list[dict], list[dict]]:
        """This rank's prompts, longest first in batches of sample_batch: sampled, written, heard; a row each, and its features, if any."""
        e, rows, features = self.config.eval, [], []
        texts = self.prompts or [clip.text for clip in self.clips]
        mine = sorted(range(self.rank, len(texts), self.world), key=lambda n: -len(texts[n]))
        bar = tqdm(total=len(mine), desc="sampling", unit="prompt", disable=None if self.rank == 0 else True, leave=False)
        for start in range(0, len(mine), e.sample_batch):
            numbers = mine[start:start + e.sample_batch]
            made = network.sample([self.prompt(network, n, texts[n]) for n in numbers], self.config.sample)
            heard = self.recogniser.transcribe([a.wave for a in made], made[0].sample_rate) if self.recogniser else [None] * len(made)
            rows += [self.row(network, n, texts[n], a, h, folder) for n, a, h in zip(numbers, made, heard)]
            if network.features and self.clips:
                features += [{"number": n, **network.features(a, self.corpus, self.clips[n])} for n, a in zip(numbers, made)]
            bar.update(len(numbers))
        bar.close()
        return rows, features

    def prompt(self, network, number: int, text: str) -> Prompt:
        true_length = self.config.eval.true_durations and self.clips
        seconds = self.clips[number].frames / network.frame_rate if true_length else 0.0
        return Prompt(text, seconds, seed=number, speech=self.speech(number) if network.listens else None)

    def speech(self, number: int) -> torch.Tensor:
        """What a clip says, (N,) at 16 kHz, with white noise `snr` dB below it, if any."""
        wave, rate = self.corpus.recording(self.clips[number])
        return add_noise(audio.resample(wave, rate, 16000), self.snr, seed=number)

    def row(self, network, number: int, text: str, made, heard: str | None, folder: Path) -> dict:
        """Write one sample, and for the first ones the pictures and the reference; returns its line of samples.jsonl."""
        row = {"number": number, "id": self.clips[number].id if self.clips else f"prompt-{number}", "text": text}
        if heard is not None:
            errors, words = metric.word_errors(recogniser.normalise(text), recogniser.normalise(heard))
            row |= {"hypothesis": heard, "errors": errors, "words": words}
        if self.clips:
            row |= {"group": self.clips[number].group, **network.score(made, self.corpus, self.clips[number])}
        if any(score.match for key, score in metric.SCORES.items() if key in row):
            other = self.clips[(number + max(1, len(self.clips) // 2)) % len(self.clips)]
            row |= {f"{key}_shuffled": value for key, value in network.score(made, self.corpus, other).items() if metric.SCORES[key].match}
        row |= {"audio": f"{number:03d}.wav", "reference_audio": None, "picture": None, "reference_picture": None}
        audio.save_wav(folder / row["audio"], made.wave, made.sample_rate)
        if number < SHOWN:
            row |= made.draw(folder / f"{number:03d}")
        if number < SHOWN and self.clips:
            drawn = self.reference(network, number).draw(folder / f"{number:03d}.ref")
            row |= {f"reference_{kind}": name for kind, name in drawn.items()}
            recording = None if network.listens else self.corpus.recording(self.clips[number])     # else it is the prompt
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

    def load_recogniser(self):
        """The first rank of a machine downloads it, the others find it; UserError where they do not agree."""
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not first:
            dist.barrier()
        found = recogniser.load(self.config.eval.recogniser, self.device, quiet=self.rank != 0)
        if first and self.world > 1:
            dist.barrier()
        names = set(gather([found.name if found else "nobody"], self.world))
        if len(names) > 1:
            raise UserError(f"eval.recogniser {self.config.eval.recogniser} cannot be had on every machine: "
                            f"there listens {' or '.join(sorted(names))}")
        return found

    def find_floors(self, network) -> dict[str, float]:
        """`measure_floors`; those of a recogniser are kept beside the corpus, by all that they depend on."""
        if not self.recogniser or not self.clips:
            return self.measure_floors(network)
        basis = self.basis_of_floors()
        path = self.corpus.folder / f"floors_{data.digest(basis)[:8]}.json"
        kept, = gather([read_floors(path, basis)] if self.rank == 0 else [], self.world)
        if kept is not None:
            return kept
        floors = self.measure_floors(network)
        if self.rank == 0:
            # a folder that cannot be written to: measured again next time
            content = json.dumps({"basis": basis, "floors": floors}, indent=1)
            with contextlib.suppress(UserError, OSError), data.replacing(path) as part:
                part.write_text(content, encoding="utf-8")
        return floors

    def basis_of_floors(self) -> dict:
        """All that floors depend on: who listens, to which clips, and what a reference is made by."""
        c = self.config
        settings = c.reference_settings()
        clips = [[clip.id, clip.text, clip.frames] for clip in self.clips]
        return {
            "version": FLOORS,
            "recogniser": self.recogniser.identity,
            "system": c.system,
            "settings": settings,
            "files": [files_of(value) for value in settings.values() if isinstance(value, str)],
            "corpus": self.corpus.plan,
            "clips": data.digest(clips),
            "recordings": sum(bool(clip.wav) and Path(clip.wav).exists() for clip in self.clips),
        }

    def measure_floors(self, network) -> dict[str, float]:
        """What nothing can be expected to be better than: the recogniser's error rate on the recordings, and on what is left of them
        after all but the generative network ("vocoded"), and the scores of the latter, where they are not 0 by their nature."""
        mine = range(self.rank, len(self.clips), self.world)
        recordings = {n: found for n in mine if (found := self.corpus.recording(self.clips[n])) is not None}
        vocoded, scores, features, floors = {}, [], [], {}
        for n in recordings:
            made = self.reference(network, n)
            vocoded[n] = made.wave, made.sample_rate
            scores.append(network.score(made, self.corpus, self.clips[n]))
            features += [{"number": n, **network.features(made, self.corpus, self.clips[n])}] if network.features else []
        for name, sounds in (("ground_truth", recordings), ("vocoded", vocoded)) if self.recogniser else ():
            heard = self.recogniser.transcribe([wave for wave, _ in sounds.values()], next(iter(sounds.values()))[1]) if sounds else []
            counts = gather([metric.word_errors(recogniser.normalise(self.clips[n].text), recogniser.normalise(h))
                             for n, h in zip(sounds, heard)], self.world)
            if counts:
                floors[f"eval/wer_{name}"] = sum(e for e, _ in counts) / max(1, sum(w for _, w in counts))
        floors |= {f"eval/{key}_vocoded": value for key, value in mean_scores(gather(scores, self.world)).items() if value > 1e-3}
        features = sorted(gather(features, self.world), key=lambda item: item["number"])
        of_sets = figures(features) if features else {}        # those that tell of what was made, not of how it was asked for
        return floors | {f"{key}_vocoded": value for key, value in of_sets.items() if OF_MADE.match(key)}


def read_floors(path: Path, basis: dict) -> dict[str, float] | None:
    """Floors that were kept; None where there are none, or none of this basis."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["floors"] if kept["basis"] == basis else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def files_of(folder: str) -> list[list]:
    """Names, sizes and times of a folder's files: none changes unnoticed; [] for a hub id."""
    found = [(path.name, path.stat()) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def error_rate(rows: list[dict]) -> dict[str, float]:
    errors, words = [row["errors"] for row in rows], [row["words"] for row in rows]
    low, high = metric.bootstrap_interval(errors, words)
    return {"eval/wer": sum(errors) / max(1, sum(words)), "eval/wer_low": low, "eval/wer_high": high}


def mean_scores(rows: list[dict]) -> dict[str, float]:
    """The mean of each of metric.SCORES, and of its shuffled control, over the rows that have it."""
    names = [name for key in metric.SCORES for name in (key, f"{key}_shuffled")]
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def by_group(rows: list[dict]) -> dict[str, float]:
    """How often all was as asked for, by the words of the clips' groups, if there are several: eval/all_match/en.

    The same by rule where there is one: eval/all_rule/en.
    """
    rows = [row for row in rows if row.get("group")]
    words = sorted({word for row in rows for word in row["group"].split()})
    found = {}
    for word in words if len(words) > 1 else []:
        scores = mean_scores([row for row in rows if word in row["group"].split()])
        found |= {f"eval/{key}/{word}": scores[key] for key in ("all_match", "all_rule") if key in scores}
    return found


def figures(features: list[dict], folder: Path | None = None) -> dict[str, float]:
    """Figures of a whole set from what `System.features` gave for each sample. folder: where pictures of them go, if there are to be any.

    speech, image, picture, label, group: retrieval, with image in the space of speech. made in that space: the same for pictures made.
    made, real, text: distances of sounds as CLAP has them. seen, seen_real, shares: those of pictures as Inception has them.
    """
    f = {key: np.stack([item[key] for item in features]) for key in features[0] if key != "number"}
    found = {"chance": float(f["chance"].mean())} if "chance" in f else {}
    if "image" in f:
        found |= retrieval(f, "speech")
        found |= {f"recall_made_{k}": value for k in (1, 5, 10) if "made" in f for value in [retrieval(f, "made")[f"recall_{k}"]]}
    if "real" in f:
        found |= {"fad": metric.frechet_distance(f["made"], f["real"]), "kad": metric.kernel_distance(f["made"], f["real"]),
                  "clap": float((f["made"] * f["text"]).sum(1).mean())}
    if "seen" in f:
        found["fid"] = metric.frechet_distance(f["seen"], f["seen_real"])
        found |= {"inception_score": metric.inception_score(f["shares"])} if f["shares"].size else {}
    if folder and "image" in f:
        draw_space(f["made" if "made" in f else "speech"], f["image"], folder / "summary.png")
    return {f"eval/{key}": value for key, value in found.items()}


def retrieval(f: dict[str, np.ndarray], kind: str) -> dict[str, float]:
    """Figures of f[kind] (n, D) among the pictures f["image"] (n, D), by keys of metric.SCORES; f["picture"] (n,) is in the gallery once.

    A picture is right where it has the query's f["label"] (n,). f["group"] (n,): words by which R@1 is also told, the language first.
    """
    query, image, label, group = f[kind], f["image"], f["label"], f["group"]
    first = np.unique(f["picture"], return_index=True)[1]
    similarity, right = query @ image[first].T, label[:, None] == label[first]
    found = {f"recall_{k}": metric.recall_at(similarity, right, k) for k in (1, 5, 10)}
    found |= {f"recall_back_{k}": metric.recall_at(similarity.T, right.T, k) for k in (1, 5, 10)}
    gap = query.mean(0) - image[first].mean(0)
    found |= {"cos_matched": float((query * image).sum(1).mean()), "modality_gap": float(np.linalg.norm(gap))}
    found |= {"cos_unmatched": float(similarity[~right].mean())} if not right.all() else {}
    words = [words.split() for words in group.tolist()]
    rows = {word: np.array([word in own for own in words]) for word in sorted(set(sum(words, [])))}
    found |= {f"recall_1/{word}": metric.recall_at(similarity[own], right[own], 1) for word, own in rows.items() if not own.all()}
    languages = [found[f"recall_1/{word}"] for word in {own[0] for own in words if own} if f"recall_1/{word}" in found]
    return found | ({"language_gap": 1 - min(languages) / max(languages)} if len(languages) > 1 and max(languages) > 0 else {})


def draw_space(queries: np.ndarray, pictures: np.ndarray, path: Path) -> None:
    """What is asked with and the pictures, (n, D) each, along the two directions in which they differ most, pairs joined by a line."""
    both = np.concatenate([queries, pictures]).astype(np.float64)
    flat = (both - both.mean(0)) @ np.linalg.svd(both - both.mean(0), full_matrices=False)[2][:2].T
    asked, seen = np.split(flat, 2)
    axes = metric.picture_axes(4.6, 4.2, "", "")
    axes.plot(*np.stack([asked, seen], 1).transpose(2, 1, 0), color=metric.GREY, alpha=0.25, linewidth=0.5)
    for points, colour, name in ((seen, metric.BLUE, "recorded pictures"), (asked, metric.ORANGE, "speech, or what was made of it")):
        axes.scatter(*points.T, s=9, color=colour, label=name)
    axes.legend(frameon=False, labelcolor=metric.GREY, fontsize=8)
    axes.figure.savefig(path, transparent=True)


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
    if "eval/wer" in found:
        floors = [f"{what} {100 * found[key]:.1f} %" for what, key in
                  (("recordings", "eval/wer_ground_truth"), ("vocoded", "eval/wer_vocoded")) if key in found]
        print(f"  word error rate {100 * found['eval/wer']:.1f} % [{100 * found['eval/wer_low']:.1f}, {100 * found['eval/wer_high']:.1f}]"
              f"  by {found['eval/recogniser']}  floors: {', '.join(floors) or 'none'}", flush=True)
    for key in metric.SCORES:
        if f"eval/{key}" in found:
            beside = "".join(f"  {name} {metric.with_unit(key, value)}" for name, value in metric.compared_with([found], key))
            print(f"  {metric.SCORES[key].title} {metric.with_unit(key, found[f'eval/{key}'])}{beside}", flush=True)


def log_media(writer: metric.Writer, out_dir: str, step: int) -> None:
    """Hand the first samples to W&B, to hear and to look at."""
    folder = Path(out_dir, "eval", f"step_{step:07d}")
    for name, ending in (("audio", "wav"), ("picture", "png"), ("attention", "attention.png"), ("confidence", "confidence.png"),
                         ("nearest", "nearest.png")):
        if paths := sorted(folder.glob(f"00[0-{SHOWN - 1}].{ending}")):
            writer.media(step, f"eval/{name}", paths)
    if paths := sorted(folder.glob("summary*.png")):
        writer.media(step, "eval/summary", paths)


def add_noise(wave: torch.Tensor, snr: float, seed: int) -> torch.Tensor:
    """A wave (N,) and white noise `snr` dB below its mean power."""
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(seed))
    return wave + noise * wave.square().mean().sqrt() * 10 ** (-snr / 20)


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
    parser.add_argument("--recogniser", default="", help="Whisper, .pt file, pocketsphinx; default: as trained")
    parser.add_argument("--true_durations", action="store_true", help="sample at the references' lengths")
    parser.add_argument("--data_dir", default="", help="where the corpus is now, if it moved")
    parser.add_argument("--steps", type=int, default=0, help="Euler steps; default: as trained")
    parser.add_argument("--cfg_scale", type=float, default=-1.0, help="guidance; default: as trained")
    parser.add_argument("--vocoder", default="", help="griffinlim | BigVGAN id or folder; default: as trained")
    parser.add_argument("--snr", type=float, nargs="+", default=[], help="dB, inf for none: systems that listen, under white noise at each")
    parser.add_argument("--out_dir", default="", help="default: the run's")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    o, knobs = parser.parse_known_args()
    listener = {"recogniser": o.recogniser} if o.recogniser else {}
    if o.true_durations:
        listener["true_durations"] = True
    changes = {"eval": {"prompts": o.prompts, "split": o.split, "limit": o.limit} | listener,
               "sample": {name: value for name, value, given in (("euler_steps", o.steps, o.steps > 0), ("vocoder", o.vocoder, o.vocoder),
                                                                 ("cfg_scale", o.cfg_scale, o.cfg_scale >= 0)) if given}}
    if o.data_dir:
        changes["data"] = {"data_dir": o.data_dir}
    device = pick_device(o.device)
    config, network, step = system.load(o.ckpt, device, changes, o.out_dir, knobs)
    if o.snr and not network.listens:
        raise UserError(f"--snr is for systems that listen; {config.system} does not")
    judge = Evaluator(config, None if o.prompts else system.open_corpus(config), device)
    for judge.snr in o.snr or [math.inf]:
        if o.snr:
            print(f"speech at {judge.snr:g} dB over white noise")
        found = judge.run(network, step)
        show(found)
        print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
