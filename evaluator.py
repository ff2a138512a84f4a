"""How good a system is: validation loss on fixed noise; samples, transcribed and scored.

All ranks take their share of the clips and gather at the end. The same evaluation as in training:
`python evaluator.py --ckpt out/demo --limit 64`; `--snr inf 20 10 5 0` repeats it under noise. It writes into
<out_dir>/eval/step_*. Reference scores, the floors, are of recordings through all but the network.
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
import metric
import system
from base import Prompt
from config import DEVICES, Config, UserError, run_main
from corpora import shards
from device import pick_device
from metric import Score
from pretrained import asr
from text import normalize
from tracking import logger

N_SHOWN = 8  # samples that get pictures and a place in W&B and the report
N_T_BINS = 10  # of t, for the validation loss
T_BIN_KEY = re.compile(r"_t\d$")  # a loss in one of them
# how reference scores are measured: raise it, and those that are stored are measured again
REFERENCE_SCORES_VERSION = 1


class Evaluator:
    """Holds the prompts and, for a system that speaks, a recogniser; `run` samples and scores a network."""

    def __init__(self, config: Config, corpus, device: torch.device, rank: int = 0, world: int = 1):
        self.config = config
        self.corpus = corpus
        self.device = device
        self.rank = rank
        self.world = world
        self.snr = math.inf  # dB: of the speech that a system is prompted with
        self.prompts = []
        self.clips = []
        network_class = system.find(config.system)
        options = config.eval
        if options.prompts:
            self.prompts = read_prompts(options.prompts)[: options.limit]
        else:
            self.clips = corpus.clips(options.split)[: options.limit]
        if network_class.speaks:
            self.prompts = [normalize(prompt) for prompt in self.prompts]
        if network_class.listens and self.prompts:
            raise UserError(
                f"eval.prompts {options.prompts}: system {config.system} listens; "
                "it is evaluated on its corpus's speech"
            )
        self.score_table = network_class.scores
        self.recogniser = self.load_recogniser() if network_class.speaks else None
        self.reference_scores = {}
        self.reference_outputs = {}  # of the clips that are shown, by their numbers

    def run(self, network, step: int) -> dict[str, float | str]:
        """Sample every prompt, transcribe and score; returns metrics on rank 0, {} on the others."""
        if not self.reference_scores:
            self.reference_scores = self.find_floors(network)
        folder = Path(self.config.out_dir, "eval", f"step_{step:07d}")
        folder.mkdir(parents=True, exist_ok=True)
        rows, features = self.sample_share(network, folder)
        rows = gather_numbered(rows, self.world)
        features = gather_numbered(features, self.world)
        if self.rank != 0:
            return {}
        rows = write_rows(folder / "samples.jsonl", rows)
        for ending, kind in (("wav", "audio"), ("png", "picture")):
            if ending in network.makes:
                shutil.copy(folder / rows[0][kind], Path(self.config.out_dir, f"sample.{ending}"))
        metrics = {}
        if self.recogniser:
            metrics |= word_error_rate_with_interval(rows)
            metrics["eval/recogniser"] = self.recogniser.name
        metrics |= self.reference_scores
        found = mean_scores(rows, self.score_table)
        if features:
            found |= network.summarize(stack_features(features), folder)
        metrics |= {f"eval/{key}": value for key, value in found.items()}
        return metrics | match_rates_by_group(rows, self.score_table)

    def sample_share(self, network, folder: Path) -> tuple[list[dict], list[dict]]:
        """Sample, transcribe and write this rank's prompts, longest first in batches of sample_batch.

        returns: a row for each, and its features, if it has any.
        """
        rows = []
        features = []
        texts = self.prompts or [clip.text for clip in self.clips]
        share = list(range(self.rank, len(texts), self.world))
        share.sort(key=lambda number: -len(texts[number]))
        silent = None if self.rank == 0 else True  # None: where there is no terminal
        bar = tqdm(total=len(share), desc="sampling", unit="prompt", disable=silent, leave=False)
        size = self.config.eval.sample_batch
        for start in range(0, len(share), size):
            numbers = share[start : start + size]
            prompts = [self.prompt(network, number, texts[number]) for number in numbers]
            outputs = network.sample(prompts, self.config.sample)
            transcripts = self.transcribe(outputs)
            for number, output, transcript in zip(numbers, outputs, transcripts):
                row = self.row(network, number, texts[number], output, transcript, folder)
                rows.append(row)
                if self.clips:
                    found = network.features(output, self.corpus, self.clips[number])
                    features += [{"number": number, **found}] if found else []
            bar.update(len(numbers))
        bar.close()
        return rows, features

    def transcribe(self, outputs: list) -> list[str | None]:
        if self.recogniser is None:
            return [None] * len(outputs)
        waves = [output.wave for output in outputs]
        return self.recogniser.transcribe(waves, outputs[0].sample_rate)

    def prompt(self, network, number: int, text: str) -> Prompt:
        seconds = 0.0
        if self.config.eval.true_durations and self.clips:
            seconds = self.clips[number].frames / network.frame_rate
        speech = self.speech(number) if network.listens else None
        return Prompt(text, seconds, seed=number, speech=speech)

    def speech(self, number: int) -> torch.Tensor:
        """The speech of a clip, (N,) at 16 kHz, `snr` dB above white noise."""
        wave, rate = self.corpus.recording(self.clips[number])
        return add_noise(audio.resample(wave, rate, 16000), self.snr, seed=number)

    def row(self, network, number: int, text: str, output, transcript: str | None, folder: Path) -> dict:
        """Write a sample, its pictures and its reference if shown; returns its line of samples.jsonl."""
        row = {"number": number, "id": f"prompt-{number}", "text": text}
        if self.clips:
            row["id"] = self.clips[number].id
        if transcript is not None:
            errors, words = count_word_errors(text, transcript)
            row |= {"hypothesis": transcript, "errors": errors, "words": words}
        if self.clips:
            row["group"] = self.clips[number].group
            row |= self.scores(network, number, output)
        stem = f"{number:03d}"
        row |= {"audio": f"{stem}.wav", "reference_audio": None}
        row |= {"picture": None, "reference_picture": None}
        audio.save_wav(folder / row["audio"], output.wave, output.sample_rate)
        if number < N_SHOWN:
            row |= output.draw(folder / stem)
            if self.clips:
                row |= self.write_reference(network, number, folder)
        return row

    def scores(self, network, number: int, output) -> dict[str, float]:
        """Of an output beside its clip; matches also beside another clip, as a control."""
        scores = network.score(output, self.corpus, self.clips[number])
        matches = {key for key, score in self.score_table.items() if score.is_match}
        if not matches & scores.keys():
            return scores
        n_clips = len(self.clips)
        other = (number + max(1, n_clips // 2)) % n_clips
        shuffled = network.score(output, self.corpus, self.clips[other])
        return scores | {f"{key}_shuffled": shuffled[key] for key in shuffled if key in matches}

    def write_reference(self, network, number: int, folder: Path) -> dict[str, str]:
        """Write a clip's pictures, and its recording unless that is the prompt; returns the names by kind."""
        pictures = self.reference(network, number).draw(folder / f"{number:03d}.ref")
        names = {f"reference_{kind}": name for kind, name in pictures.items()}
        if network.listens:
            return names
        recording = self.corpus.recording(self.clips[number])
        if recording is not None:
            names["reference_audio"] = f"{number:03d}.ref.wav"
            audio.save_wav(folder / names["reference_audio"], *recording)
        return names

    def reference(self, network, number: int):
        """A clip through all but the generative network; cached if shown: training does not change it."""
        if number in self.reference_outputs:
            return self.reference_outputs[number]
        output = network.reference(self.corpus, self.clips[number])
        if number < N_SHOWN:
            self.reference_outputs[number] = output
        return output

    def load_recogniser(self):
        """The first rank of a machine downloads it for the others; raises UserError where names differ."""
        is_first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        name = self.config.eval.recogniser
        if not is_first:
            dist.barrier()
        loaded = asr.load(name, self.device, quiet=self.rank != 0)
        if is_first and self.world > 1:
            dist.barrier()
        names = set(all_gather([loaded.name if loaded else "nobody"], self.world))
        if len(names) > 1:
            listeners = " or ".join(sorted(names))
            raise UserError(
                f"eval.recogniser {name} cannot be had on every machine: there listens {listeners}"
            )
        return loaded

    def find_floors(self, network) -> dict[str, float]:
        """The reference scores; a recogniser's are stored beside the corpus, with all that they depend on."""
        if not self.recogniser or not self.clips:
            return self.measure_reference_scores(network)
        basis = self.basis_of_floors()
        path = self.corpus.folder / f"floors_{shards.digest(basis)[:8]}.json"
        stored = read_reference_scores(path, basis) if self.rank == 0 else None
        stored = all_gather([stored], self.world)[0]
        if stored is not None:
            return stored
        scores = self.measure_reference_scores(network)
        if self.rank == 0:
            content = json.dumps({"basis": basis, "floors": scores}, indent=1)
            # Where the folder cannot be written to, they are measured again next time
            with contextlib.suppress(UserError, OSError), shards.atomic_write(path) as part:
                part.write_text(content, encoding="utf-8")
        return scores

    def basis_of_floors(self) -> dict:
        """All that reference scores depend on: the recogniser, the clips, and what a reference is made by."""
        c = self.config
        settings = c.reference_settings()
        clips = [[clip.id, clip.text, clip.frames] for clip in self.clips]
        return {
            "version": REFERENCE_SCORES_VERSION,
            "recogniser": self.recogniser.identity,
            "system": c.system,
            "settings": settings,
            "files": [list_files(value) for value in settings.values() if isinstance(value, str)],
            "corpus": self.corpus.plan,
            "clips": shards.digest(clips),
            "recordings": sum(bool(clip.wav) and Path(clip.wav).exists() for clip in self.clips),
        }

    def measure_reference_scores(self, network) -> dict[str, float]:
        """What nothing can be expected to be better than.

        The recogniser's error rate on the recordings, and on what all but the generative network leaves of
        them ("vocoded"); and the scores of the latter, where they are not 0 by their nature.
        """
        recordings = {}
        vocoded = {}
        rows = []
        features = []
        for number in range(self.rank, len(self.clips), self.world):
            clip = self.clips[number]
            recording = self.corpus.recording(clip)
            if recording is None:
                continue
            output = self.reference(network, number)
            recordings[number] = recording
            vocoded[number] = (output.wave, output.sample_rate)
            rows.append(network.score(output, self.corpus, clip))
            found = network.features(output, self.corpus, clip)
            features += [{"number": number, **found}] if found else []
        scores = {}
        if self.recogniser:
            scores |= self.reference_error_rate("ground_truth", recordings)
            scores |= self.reference_error_rate("vocoded", vocoded)
        for key, value in mean_scores(all_gather(rows, self.world), self.score_table).items():
            if value > 1e-3:
                scores[f"eval/{key}_vocoded"] = value
        features = gather_numbered(features, self.world)
        if features:
            for key, value in network.summarize(stack_features(features), None).items():
                if key in self.score_table and self.score_table[key].of_outputs:
                    scores[f"eval/{key}_vocoded"] = value
        return scores

    def reference_error_rate(
        self, name: str, sounds: dict[int, tuple[torch.Tensor, int]]
    ) -> dict[str, float]:
        """eval/wer_<name>, the error rate on sounds; {} where there are none.

        sounds: waves (N,) and rates in Hz by the clips' numbers.
        """
        counts = []
        if sounds:
            waves, rates = zip(*sounds.values())
            transcripts = self.recogniser.transcribe(list(waves), rates[0])
            texts = [self.clips[number].text for number in sounds]
            counts = list(map(count_word_errors, texts, transcripts))
        counts = all_gather(counts, self.world)
        if not counts:
            return {}
        errors, words = zip(*counts)
        return {f"eval/wer_{name}": sum(errors) / max(1, sum(words))}


def count_word_errors(text: str, transcript: str) -> tuple[int, int]:
    """Word errors of a transcript and words of the text, both normalised first."""
    return metric.word_errors(asr.normalise(text), asr.normalise(transcript))


def write_rows(path: Path, rows: list[dict]) -> list[dict]:
    """Write a JSON object a line, all with the same keys, null where a row has none; returns these rows."""
    keys = {}
    for row in rows:
        keys |= dict.fromkeys(row)
    rows = [keys | row for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return rows


def read_reference_scores(path: Path, basis: dict) -> dict[str, float] | None:
    """Stored reference scores; None where there are none, or none of this basis."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["floors"] if stored["basis"] == basis else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def list_files(folder: str) -> list[list]:
    """Names, sizes and times of a folder's files, so that none changes unnoticed; [] for a hub id."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found


def word_error_rate_with_interval(rows: list[dict]) -> dict[str, float]:
    """The word error rate of rows of samples.jsonl and its 95 % interval."""
    errors = [row["errors"] for row in rows]
    words = [row["words"] for row in rows]
    low, high = metric.bootstrap_interval(errors, words)
    rate = sum(errors) / max(1, sum(words))
    return {"eval/wer": rate, "eval/wer_low": low, "eval/wer_high": high}


def stack_features(features: list[dict]) -> dict[str, np.ndarray]:
    """Features of outputs as one array (n, ...) of each kind."""
    kinds = features[0].keys() - {"number"}
    return {kind: np.stack([found[kind] for found in features]) for kind in kinds}


def mean_scores(rows: list[dict], scores: dict[str, Score]) -> dict[str, float]:
    """The mean of each score, and of its shuffled control, over the rows that have it."""
    means = {}
    for score in scores:
        for key in (score, f"{score}_shuffled"):
            values = [row[key] for row in rows if row.get(key) is not None]
            if values:
                means[key] = sum(values) / len(values)
    return means


def match_rates_by_group(rows: list[dict], scores: dict[str, Score]) -> dict[str, float]:
    """How often all was as asked for, by the words of the clips' groups, if there are several.

    eval/all_match/en is that of the clips with the word en in their group.
    The same by rule where there is one: eval/all_rule/en.
    """
    words = set()
    for row in rows:
        words |= set((row.get("group") or "").split())
    if len(words) < 2:
        return {}
    found = {}
    for word in sorted(words):
        of_group = [row for row in rows if word in (row.get("group") or "").split()]
        means = mean_scores(of_group, scores)
        for key in ("all_match", "all_rule"):
            if key in means:
                found[f"eval/{key}/{word}"] = means[key]
    return found


@torch.no_grad()
def validate(network, batches, config: Config, device: torch.device, world: int) -> dict[str, float]:
    """The losses on the validation clips at fixed noise and stratified t: smooth, comparable between steps.

    returns: the mean of every scalar but `loss`; where each clip's loss is known, also its mean in bins of t.
    """
    is_bf16 = config.train.dtype == "bf16"
    sums = {}
    for batch in batches.validation():
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            losses = network(batch)
        add_losses(sums, losses, batch["t"])
    of_ranks = all_gather(list(sums.items()), world)
    merged = {}
    for name, (total, count) in of_ranks:
        add_to(merged, name, total, count)
    means = {}
    for name in sorted(merged, key=lambda name: name if T_BIN_KEY.search(name) else ""):  # the bins come last
        total, count = merged[name]
        means[f"val/{name}"] = total / count
    return means


def add_losses(sums: dict, losses: dict[str, torch.Tensor], t: torch.Tensor) -> None:
    """Add the losses of a batch to the sums: each scalar, and each clip's flow loss to its bin of t (B,)."""
    per_clip = losses.pop("flow_loss_per_clip", torch.zeros(0))
    n_clips = len(t)
    for name, loss in losses.items():
        if loss.dim() == 0 and name != "loss":
            total = loss.item() * n_clips
            add_to(sums, name, total, n_clips)
    bins = t * N_T_BINS
    bins = bins.long().clamp(max=N_T_BINS - 1)
    for i, loss in zip(bins.tolist(), per_clip.tolist()):
        add_to(sums, f"flow_loss_t{i}", loss, 1)


def add_to(sums: dict[str, tuple[float, int]], name: str, value: float, count: int) -> None:
    """Add to the sum under a name, and to the number of clips in it."""
    total, n_clips = sums.get(name, (0, 0))
    sums[name] = (total + value, n_clips + count)


def print_scores(found: dict, scores: dict[str, Score]) -> None:
    """Print what was found."""
    losses = []
    for key, value in found.items():
        if key.startswith("val/") and not T_BIN_KEY.search(key):
            name = key.removeprefix("val/").replace("_", " ")
            losses.append(f"{name} {value:.4f}")
    if losses:
        print(f"  validation: {'  '.join(losses)}", flush=True)
    if "eval/wer" in found:
        show_error_rate(found)
    for key, score in scores.items():
        value = found.get(f"eval/{key}")
        if value is None:
            continue
        values = [f"{score.title} {metric.format_score(score, value)}"]
        for name, other in metric.reference_values(found, key):
            values.append(f"{name} {metric.format_score(score, other)}")
        print(f"  {'  '.join(values)}", flush=True)


def show_error_rate(found: dict) -> None:
    rate = metric.format_percent(found["eval/wer"])
    low = 100 * found["eval/wer_low"]
    high = 100 * found["eval/wer_high"]
    name = found["eval/recogniser"]
    floors = []
    if "eval/wer_ground_truth" in found:
        recordings = metric.format_percent(found["eval/wer_ground_truth"])
        floors.append(f"recordings {recordings}")
    if "eval/wer_vocoded" in found:
        vocoded = metric.format_percent(found["eval/wer_vocoded"])
        floors.append(f"vocoded {vocoded}")
    listed = ", ".join(floors) or "none"
    print(f"  word error rate {rate} [{low:.1f}, {high:.1f}]  by {name}  floors: {listed}", flush=True)


def log_media(writer: logger.MetricsLogger, out_dir: str, step: int) -> None:
    """Hand the first samples to W&B, to listen to and to look at."""
    folder = Path(out_dir, "eval", f"step_{step:07d}")
    shown = f"00[0-{N_SHOWN - 1}]"
    patterns = {
        "audio": f"{shown}.wav",
        "picture": f"{shown}.png",
        "attention": f"{shown}.attention.png",
        "confidence": f"{shown}.confidence.png",
        "nearest": f"{shown}.nearest.png",
        "summary": "summary*.png",
    }
    for name, pattern in patterns.items():
        paths = sorted(folder.glob(pattern))
        if paths:
            writer.media(step, f"eval/{name}", paths)


def add_noise(wave: torch.Tensor, snr: float, seed: int) -> torch.Tensor:
    """A wave (N,) and white noise `snr` dB below its mean power."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(wave.shape, generator=generator)
    return wave + noise * wave.square().mean().sqrt() * 10 ** (-snr / 20)


def all_gather(share: list, world: int) -> list:
    """The lists of all ranks as one, on every rank."""
    if world == 1:
        return share
    shares = [None] * world
    dist.all_gather_object(shares, share)
    return sum(shares, [])


def gather_numbered(share: list[dict], world: int) -> list[dict]:
    """The rows of all ranks in the order of their numbers, on every rank."""
    return sorted(all_gather(share, world), key=lambda row: row["number"])


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty; raises UserError when it is missing or has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a readable text file of prompts, one a line") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: has no prompt")
    return prompts


def read_command_line() -> tuple[argparse.Namespace, list[str]]:
    """The options, and the rest: options of config.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="--key value for any option of config.py changes what the checkpoint says: --klein.base DIR",
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    add("--prompts", default="", help="a text file, a sentence a line; default: the validation clips")
    add("--split", default="val", choices=("val", "test"))
    add("--limit", type=int, default=64)
    add("--recogniser", default="", help="Whisper, .pt file, pocketsphinx; default: as trained")
    add("--true_durations", action="store_true", help="sample at the references' lengths")
    add("--data_dir", default="", help="where the corpus is now, if it moved")
    add("--steps", type=int, default=0, help="Euler steps; default: as trained")
    add("--cfg_scale", type=float, default=-1.0, help="guidance; default: as trained")
    add("--vocoder", default="", help="griffinlim | BigVGAN id or folder; default: as trained")
    snr_help = "dB, inf for none: systems that listen, under white noise at each"
    add("--snr", type=float, nargs="+", default=[], help=snr_help)
    add("--out_dir", default="", help="default: the run's")
    add("--device", default="auto", choices=DEVICES)
    return parser.parse_known_args()


def changes_to_config(options: argparse.Namespace) -> dict[str, dict]:
    """What the options change of a checkpoint's config, by section."""
    sections = {"eval": {}, "sample": {}, "data": {}}
    for name in ("prompts", "split", "limit"):
        sections["eval"][name] = getattr(options, name)
    if options.true_durations:
        sections["eval"]["true_durations"] = True
    if options.recogniser:
        sections["eval"]["recogniser"] = options.recogniser
    if options.steps > 0:
        sections["sample"]["euler_steps"] = options.steps
    if options.vocoder:
        sections["sample"]["vocoder"] = options.vocoder
    if options.cfg_scale >= 0:
        sections["sample"]["cfg_scale"] = options.cfg_scale
    if options.data_dir:
        sections["data"]["data_dir"] = options.data_dir
    return sections


def main() -> None:
    options, words = read_command_line()
    device = pick_device(options.device)
    changes = changes_to_config(options)
    config, network, step = system.load(options.ckpt, device, changes, options.out_dir, words)
    if options.snr and not network.listens:
        raise UserError(f"--snr is for systems that listen; {config.system} does not")
    corpus = None if options.prompts else system.open_corpus(config)
    evaluator = Evaluator(config, corpus, device)
    for snr in options.snr or [math.inf]:
        evaluator.snr = snr
        if options.snr:
            print(f"speech at {snr:g} dB over white noise")
        found = evaluator.run(network, step)
        print_scores(found, network.scores)
        print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
