"""How good a system is: validation loss on fixed noise; samples, transcribed and scored.

`python evaluator.py --ckpt out/demo` repeats the evaluation of training; any knob of the checkpoint's config
goes on top: `--split test --limit 500 --recogniser medium.en`, `--prompts FILE`, `--euler_steps 50`. It
writes into eval/step_* of the run that --ckpt points to, or of --out_dir. All ranks take their share of the
clips and gather at the end.
Reference scores, the floors, are of recordings through all but the network.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import audio
import config as configs
import metric
import system
from base import Batches, Corpus, Output, Prompt, System
from config import DEVICES, Config, Sample, UserError
from device import pick_device
from entry import Interrupted, Parser, run_main, stop
from flow import check_finite
from metric import Score
from pretrained import asr
from text import normalize
from tracking import checkpoint, logger, reference_scores

N_SHOWN = 8  # samples that get pictures and a place in W&B and the report
N_T_BINS = 10  # of t, for the validation loss
T_BIN_KEY = re.compile(r"_t\d$")  # a loss in one of them
SPEECH_RATE = 16000  # Hz, of speech that is a prompt
LEFT_OUT = {  # what is said of each count
    "eval/no_words": "texts without words, left out of the word error rate",
    "eval/hallucinated": "transcripts that the recogniser made up, taken for nothing heard",
}
KNOBS = "--key value for any knob of the config changes what the checkpoint says; train.py --help lists them"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0], epilog=KNOBS, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint, or the folder of a run")
    snr_help = "dB, inf for none: systems that listen, under white noise at each"
    add("--snr", type=float, nargs="+", default=[], help=snr_help)
    add("--device", default="auto", choices=DEVICES)
    options, knobs = parse_with_knobs(parser)
    device = pick_device(options.device)
    path = system.find_checkpoint(options.ckpt)
    config, state = system.read_checkpoint(path, device, knobs)
    if options.snr and not system.find(config.system).listens:
        raise UserError(f"--snr is for systems that listen; {config.system} does not")
    corpus = None if config.eval.prompts else system.open_corpus(config)
    evaluator = Evaluator(config, corpus, device)
    network = system.restore(config, state, path, device)
    for snr in options.snr or [math.inf]:
        evaluator.snr = snr
        if options.snr:
            print(f"speech at {snr:g} dB over white noise")
        found = evaluator.run(network, state["step"])
        print_scores(found, network.scores)
        print(json.dumps(found))


def parse_with_knobs(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command line, and what is left of it: knobs of the config.

    raises UserError for --steps: the knob of that name is training's.
    """
    options, knobs = parser.parse_known_args()
    if "steps" in configs.parse_overrides(knobs):
        raise UserError("--steps are those of training; those of sampling are --euler_steps")
    return options, knobs


class Evaluator:
    """Holds the prompts and, for a system that speaks, a recogniser; `run` samples and scores a network."""

    def __init__(
        self, config: Config, corpus: Corpus | None, device: torch.device, rank: int = 0, world: int = 1
    ):
        """corpus: None only where eval.prompts names a file. raises UserError for a split without clips."""
        self.config = config
        self.corpus = corpus
        self.device = device
        self.rank = rank
        self.world = world
        self.snr = math.inf  # dB: of the speech that a system is prompted with
        network_class = system.find(config.system)
        self.scores = network_class.scores
        self.clips = []
        options = config.eval
        if options.prompts:
            if network_class.listens:
                raise UserError(
                    f"eval.prompts {options.prompts}: system {config.system} listens; "
                    "it is evaluated on its corpus's speech"
                )
            texts = read_prompts(options.prompts)[: options.limit]
            self.texts = [normalize(text) for text in texts] if network_class.speaks else texts
        else:
            self.clips = corpus.clips(options.split)[: options.limit]
            if not self.clips:
                wanted = f"{options.split} clip of at most data.max_seconds {config.data.max_seconds}"
                raise UserError(f"{corpus.folder}: has no {wanted}; choose another --split")
            self.texts = [clip.text for clip in self.clips]
        self.recogniser = self.load_recogniser() if network_class.speaks else None
        self.seconds = Counter()  # of the parts of an evaluation
        self.reference_scores = {}
        self.reference_outputs = {}  # of the clips that are shown, by their numbers

    def run(self, network: System, step: int) -> dict[str, float | str]:
        """Sample every prompt, transcribe and score; returns metrics on rank 0, {} on the others.

        perf/eval_*_sec are of rank 0's share: what generating, vocoding, transcribing, scoring took.
        raises Interrupted, on all ranks, where a signal comes to one.
        """
        self.seconds.clear()
        if not self.reference_scores:
            with self.timed("reference"):
                self.reference_scores = self.find_reference_scores(network)
        folder = Path(self.config.out_dir, "eval", f"step_{step:07d}")
        checkpoint.make_folder(folder)
        invented = self.recogniser.invented if self.recogniser else 0
        rows, features = interruptible(lambda: self.sample_share(network, folder), self.world)
        if self.recogniser:
            invented = sum(all_gather([self.recogniser.invented - invented], self.world))
        rows = gather_numbered(rows, self.world)
        features = gather_numbered(features, self.world)
        if self.rank != 0:
            return {}
        rows = write_rows(folder / "samples.jsonl", rows)
        for ending, kind in (("wav", "audio"), ("png", "picture")):
            if ending in network.output_kinds:
                shutil.copy(folder / rows[0][kind], Path(self.config.out_dir, f"sample.{ending}"))
        found = {}
        if self.recogniser:
            found |= metric.word_error_scores(rows)
            found["hallucinated"] = invented
            found["recogniser"] = self.recogniser.name
        found |= metric.mean_scores(rows, self.scores)
        if features:
            found |= network.summarize(stack_features(features), folder)
        found |= metric.match_rates_by_group(rows, self.scores)
        found = {f"eval/{key}": value for key, value in found.items()}
        return found | self.reference_scores | self.seconds

    def sample_share(self, network: System, folder: Path) -> tuple[list[dict], list[dict]]:
        """Sample, transcribe and write this rank's prompts, longest first in batches of sample_batch.

        returns: a row for each, and its features, if it has any.
        """
        rows = []
        features = []
        share = list(range(self.rank, len(self.texts), self.world))
        share.sort(key=lambda number: -len(self.texts[number]))
        silent = None if self.rank == 0 else True  # None: where there is no terminal
        bar = tqdm(total=len(share), desc="sampling", unit="prompt", disable=silent, leave=False)
        size = self.config.eval.sample_batch
        vocoded = network.vocode_sec
        for start in range(0, len(share), size):
            numbers = share[start : start + size]
            prompts = [self.prompt(network, number) for number in numbers]
            with self.timed("sample"):
                outputs = sample(network, prompts, self.config.sample)
            transcripts = [None] * len(outputs)
            if self.recogniser:
                waves = [output.wave for output in outputs]
                with self.timed("transcribe"):
                    transcripts = self.recogniser.transcribe(waves, outputs[0].sample_rate)
            with self.timed("score"):
                for number, output, transcript in zip(numbers, outputs, transcripts):
                    rows.append(self.row(network, number, output, transcript, folder))
                    features += self.features(network, number, output)
            bar.update(len(numbers))
        bar.close()
        vocoding = network.vocode_sec - vocoded
        self.seconds["perf/eval_vocode_sec"] = vocoding
        self.seconds["perf/eval_sample_sec"] -= vocoding
        return rows, features

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what the block takes to perf/eval_<part>_sec."""
        start = time.perf_counter()
        yield
        self.seconds[f"perf/eval_{part}_sec"] += time.perf_counter() - start

    def prompt(self, network: System, number: int) -> Prompt:
        prompt = Prompt(self.texts[number], seed=number)
        if self.config.eval.true_durations and self.clips:
            prompt.seconds = self.clips[number].frames / network.frame_rate
        if network.listens:
            wave, rate = self.corpus.recording(self.clips[number])
            prompt.speech = add_noise(audio.resample(wave, rate, SPEECH_RATE), self.snr, seed=number)
        return prompt

    def row(self, network: System, number: int, output: Output, transcript: str | None, folder: Path) -> dict:
        """Write a sample, its pictures and its reference if shown; returns its line of samples.jsonl."""
        text = self.texts[number]
        stem = f"{number:03d}"
        row = {"number": number, "id": f"prompt-{number}", "text": text}
        if transcript is not None:
            errors, words = count_word_errors(text, transcript)
            row |= {"hypothesis": transcript, "errors": errors if words else None, "words": words}
        if self.clips:
            clip = self.clips[number]
            row |= {"id": clip.id, "group": clip.group}
            row |= self.score(network, number, output)
        row |= {"audio": f"{stem}.wav", "reference_audio": None}
        row |= {"picture": None, "reference_picture": None}
        audio.save_wav(folder / row["audio"], output.wave, output.sample_rate)
        if number < N_SHOWN:
            row |= output.draw(folder / stem)
            if self.clips:
                row |= self.write_reference(network, number, folder)
        return row

    def score(self, network: System, number: int, output: Output) -> dict[str, float]:
        """Of an output beside its clip; matches also beside another clip, as a control."""
        scores = network.score(output, self.corpus, self.clips[number])
        matches = {key for key, score in self.scores.items() if score.is_match}
        if not matches & scores.keys():
            return scores
        n_clips = len(self.clips)
        other = (number + max(1, n_clips // 2)) % n_clips
        shuffled = network.score(output, self.corpus, self.clips[other])
        return scores | {f"{key}_shuffled": shuffled[key] for key in shuffled if key in matches}

    def features(self, network: System, number: int, output: Output) -> list[dict]:
        """The features of an output beside its clip, with its number, as a list of one; [] without any."""
        if not self.clips:
            return []
        found = network.features(output, self.corpus, self.clips[number])
        return [{"number": number, **found}] if found else []

    def write_reference(self, network: System, number: int, folder: Path) -> dict[str, str]:
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

    def reference(self, network: System, number: int) -> Output:
        """A clip through all but the generative network; cached if shown: training does not change it."""
        if number in self.reference_outputs:
            return self.reference_outputs[number]
        output = network.reference(self.corpus, self.clips[number])
        if number < N_SHOWN:
            self.reference_outputs[number] = output
        return output

    def load_recogniser(self) -> asr.Recogniser | asr.PocketSphinx | None:
        """The first rank of a machine downloads it for the others; raises UserError where they differ."""
        is_first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        name = self.config.eval.recogniser
        if not is_first:
            dist.barrier()
        loaded = asr.load(name, self.device, quiet=self.rank != 0)
        if is_first and self.world > 1:
            dist.barrier()
        listening = all_gather([loaded.identity if loaded else ["nobody"]], self.world)
        listeners = " or ".join(sorted({identity[0] for identity in listening}))
        if any(identity[0] != listening[0][0] for identity in listening):
            raise UserError(
                f"eval.recogniser {name} cannot be had on every machine: there listens {listeners}"
            )
        if any(identity != listening[0] for identity in listening):
            raise UserError(f"eval.recogniser {name}: {listeners} is not the same on every machine")
        return loaded

    def find_reference_scores(self, network: System) -> dict[str, float]:
        """The reference scores; a recogniser's are stored beside the corpus."""
        if not self.recogniser or not self.clips:
            return self.measure_reference_scores(network)
        folder = self.corpus.folder
        basis = reference_scores.find_basis(
            self.config, self.corpus.fingerprint, self.clips, self.recogniser.identity
        )
        stored = reference_scores.read(folder, basis) if self.rank == 0 else None
        stored = all_gather([stored], self.world)[0]
        if stored is not None:
            return stored
        scores = self.measure_reference_scores(network)
        if self.rank == 0:
            reference_scores.store(folder, basis, scores)
        return scores

    def measure_reference_scores(self, network: System) -> dict[str, float]:
        """What nothing can be expected to be better than.

        The recogniser's error rate on the recordings, and on what all but the generative network leaves of
        them ("vocoded"); and the scores of the latter, where they are not 0 by their nature.
        """
        share = interruptible(lambda: self.reference_share(network), self.world)
        heard_recordings, heard_vocoded, rows, features = share
        scores = {}
        if self.recogniser:
            scores |= self.reference_error_rate("ground_truth", heard_recordings)
            scores |= self.reference_error_rate("vocoded", heard_vocoded)
        for key, value in metric.mean_scores(all_gather(rows, self.world), self.scores).items():
            if value > 1e-3:
                scores[f"eval/{key}_vocoded"] = value
        features = gather_numbered(features, self.world)
        if features:
            for key, value in network.summarize(stack_features(features), None).items():
                if key in self.scores and self.scores[key].of_outputs:
                    scores[f"eval/{key}_vocoded"] = value
        return scores

    def reference_share(self, network: System) -> tuple[list, list, list[dict], list[dict]]:
        """Of this rank's clips: word errors in the recordings and through the vocoder, scores, features."""
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
            features += self.features(network, number, output)
        return self.hear(recordings), self.hear(vocoded), rows, features

    def hear(self, sounds: dict[int, tuple[Tensor, int]]) -> list[tuple[int, int]]:
        """Word errors and words of each sound; sounds: waves (N,), rates in Hz by the clips' numbers."""
        if not sounds or not self.recogniser:
            return []
        waves, rates = zip(*sounds.values())
        transcripts = self.recogniser.transcribe(list(waves), rates[0])
        texts = [self.texts[number] for number in sounds]
        return list(map(count_word_errors, texts, transcripts))

    def reference_error_rate(self, name: str, counts: list[tuple[int, int]]) -> dict[str, float]:
        """eval/wer_<name>, the error rate on sounds whose texts have words; {} where there are none.

        counts: word errors and words of this rank's share.
        """
        counts = [count for count in all_gather(counts, self.world) if count[1]]
        if not counts:
            return {}
        errors, words = zip(*counts)
        return {f"eval/wer_{name}": sum(errors) / sum(words)}


def interruptible(work: Callable, world: int):
    """What `work` makes of this rank's share; raises Interrupted on all ranks where a signal comes to one.

    work: talks to no other rank.
    """
    done = stop.run(work)
    if any(all_gather([stop.asked], world)):
        raise Interrupted
    return done


def sample(network: System, prompts: list[Prompt], settings: Sample) -> list[Output]:
    """The network's outputs of the prompts; raises UserError where a wave or a picture is not finite."""
    outputs = network.sample(prompts, settings)
    for prompt, output in zip(prompts, outputs):
        for name, value in vars(output).items():
            if torch.is_tensor(value):
                check_finite(value, f"{prompt.text!r}: the {name} that was sampled")
    return outputs


@torch.no_grad()
def validate(
    network: System, batches: Batches, config: Config, device: torch.device, world: int
) -> dict[str, float]:
    """The losses on the validation clips at fixed noise and stratified t: smooth, comparable between steps.

    returns: the mean of every scalar but `loss`; where each clip's loss is known, also its mean in bins of t.
    """
    losses = interruptible(lambda: validation_share(network, batches, config, device), world)
    sums = Counter()
    counts = Counter()
    for name, total, count in all_gather(losses, world):
        sums[name] += total
        counts[name] += count
    bins = sorted(filter(T_BIN_KEY.search, sums))
    names = [name for name in sums if name not in bins]
    return {f"val/{name}": sums[name] / counts[name] for name in names + bins}


def validation_share(
    network: System, batches: Batches, config: Config, device: torch.device
) -> list[tuple[str, float, int]]:
    """As `summed_losses`, of all batches of this rank."""
    is_bf16 = config.train.dtype == "bf16"
    losses = []
    for batch in batches.validation():
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            found = network(batch)
        losses += summed_losses(found, batch["t"])
    return losses


def summed_losses(losses: dict[str, Tensor], t: Tensor) -> list[tuple[str, float, int]]:
    """The losses of a batch as (name, sum over clips, number of clips).

    Each scalar for all clips; the flow loss of each clip in its bin of t (B,).
    """
    n_clips = len(t)
    found = []
    for name, loss in losses.items():
        if loss.dim() == 0 and name != "loss":
            found.append((name, loss.item() * n_clips, n_clips))
    bins = (t * N_T_BINS).long().clamp(max=N_T_BINS - 1)
    per_clip = losses.get("flow_loss_per_clip", torch.zeros(0))
    for i, loss in zip(bins.tolist(), per_clip.tolist()):
        found.append((f"flow_loss_t{i}", loss, 1))
    return found


def print_scores(found: dict, scores: dict[str, Score]) -> None:
    """Print what an evaluation or a validation found, a line each."""
    losses = []
    for key, value in found.items():
        if key.startswith("val/") and not T_BIN_KEY.search(key):
            name = key.removeprefix("val/").replace("_", " ")
            losses.append(f"{name} {value:.4f}")
    if losses:
        print(f"  validation: {'  '.join(losses)}", flush=True)
    if "eval/wer" in found:
        print(f"  {describe_error_rate(found)}", flush=True)
    for key, said in LEFT_OUT.items():
        if found.get(key):
            print(f"  {said}: {found[key]}", flush=True)
    for key, score in scores.items():
        value = found.get(f"eval/{key}")
        if value is None:
            continue
        values = [f"{score.title} {metric.format_score(score, value)}"]
        for name, other in metric.reference_values(found, key):
            values.append(f"{name} {metric.format_score(score, other)}")
        print(f"  {'  '.join(values)}", flush=True)


def describe_error_rate(found: dict) -> str:
    rate = metric.format_percent(found["eval/wer"])
    low = 100 * found["eval/wer_low"]
    high = 100 * found["eval/wer_high"]
    name = found["eval/recogniser"]
    floors = []
    for floor, key in (("recordings", "eval/wer_ground_truth"), ("vocoded", "eval/wer_vocoded")):
        if key in found:
            floors.append(f"{floor} {metric.format_percent(found[key])}")
    listed = ", ".join(floors) or "none"
    return f"word error rate {rate} [{low:.1f}, {high:.1f}]  by {name}  floors: {listed}"


def log_media(writer: logger.MetricsLogger, out_dir: str, step: int) -> None:
    """Hand the first samples to W&B, to listen to and to look at."""
    folder = Path(out_dir, "eval", f"step_{step:07d}")
    shown = f"00[0-{N_SHOWN - 1}]"
    patterns = {"audio": f"{shown}.wav", "picture": f"{shown}.png", "summary": "summary*.png"}
    for kind in ("attention", "confidence", "nearest"):
        patterns[kind] = f"{shown}.{kind}.png"
    for name, pattern in patterns.items():
        paths = sorted(folder.glob(pattern))
        if paths:
            writer.log_files(step, f"eval/{name}", paths)


def count_word_errors(text: str, transcript: str) -> tuple[int, int]:
    """Word errors of a transcript and words of the text, both normalised first."""
    return metric.word_errors(asr.normalize_transcript(text), asr.normalize_transcript(transcript))


def write_rows(path: Path, rows: list[dict]) -> list[dict]:
    """Write a JSON object a line, all with the same keys, null where a row has none; returns these rows."""
    keys = {}
    for row in rows:
        keys |= dict.fromkeys(row)
    rows = [keys | row for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return rows


def stack_features(features: list[dict]) -> dict[str, np.ndarray]:
    """Features of outputs as one array (n, ...) of each kind."""
    stacked = {}
    for kind in features[0].keys() - {"number"}:
        stacked[kind] = np.stack([found[kind] for found in features])
    return stacked


def add_noise(wave: Tensor, snr: float, seed: int) -> Tensor:
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


if __name__ == "__main__":
    run_main(main)
