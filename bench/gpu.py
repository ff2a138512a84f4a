"""What a card makes of the recipes, in Markdown: `python -m bench.gpu [--minutes 8] [--only NAMES]`.

A step of each case is the loop's own: its batches, its networks with random weights, its optimizers and
average, for 200 updates or until the case's share of the time is over. Rows are printed as they come, and are
in the file that --out names. Without CUDA everything is tiny (--tiny), unless --full asks for the real sizes.
python -m bench.gpu --only seed,ours --full --gradient_only --batch 2
    the layout of nanoAudioDiffusion beside ours, in turns, on a CPU too
Peaks: NVIDIA's data sheets, bf16 without sparsity.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluator
import optim
import parallel
import system
import train
from base import Prompt, System
from bench import loader
from config import Config
from device import move, nvidia_smi, pick_device, pick_dtype, worker_count
from entry import run_main
from pretrained import asr
from tracking import checkpoint

# TFLOP/s by a part of the card's name; the first that fits counts
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}
WARM_UP = 10  # updates that do not count: torch.compile meets the first shapes
WINDOW = 10  # updates between two waits for the device, as between two lines of the log
COLUMNS = (
    "case",
    "ms a step",
    "useful frames/s",
    "padding",
    "TFLOP a step",
    "MFU",
    "peak GB",
    "graphs",
    "breaks",
    "recompiles after the first steps",
    "waits for the loader",
    "steps",
    "note",
)
PARTS = ("evaluation", "seconds", "note")


@dataclass
class Case:
    """A recipe as it is to be measured."""

    name: str
    recipe: str
    knobs: dict = field(default_factory=dict)
    compile: bool = True  # on CUDA
    cudnn: bool = True  # attention may take cuDNN's kernels
    stacked: bool = True  # our Muon; else torch.optim.Muon, matrix by matrix


KLEIN = {"base": "scratch", "width": 3072, "heads": 24, "layers": 25, "text_tokens": 512}
SMALL_CANVAS = {"canvas_height": 512, "canvas_width": 320}
CASES = (
    Case("ljspeech, 64 clips", "ljspeech", {"global_batch": 64}),
    Case("ljspeech, 8 clips", "ljspeech", {"global_batch": 8}),
    Case("64 clips, eager", "ljspeech", {"global_batch": 64}, compile=False),
    Case("8 clips, eager", "ljspeech", {"global_batch": 8}, compile=False),
    Case("64 clips, no cuDNN attention", "ljspeech", {"global_batch": 64}, cudnn=False),
    Case("8 clips, no cuDNN attention", "ljspeech", {"global_batch": 8}, cudnn=False),
    Case("64 clips, Muon not stacked", "ljspeech", {"global_batch": 64}, stacked=False),
    Case("8 clips, Muon not stacked", "ljspeech", {"global_batch": 8}, stacked=False),
    Case("Klein LoRA, 512 x 320", "spectrogram", KLEIN | SMALL_CANVAS, compile=False),
    Case("Klein LoRA, 768 x 768", "spectrogram", KLEIN, compile=False),
    Case("FluxMusic small", "music_small", {"global_batch": 16}, compile=False),
    Case("FluxMusic giant", "music_giant", {"global_batch": 8, "grad_accum": 1}, compile=False),
)
SIDES = (
    Case("seed", "ljspeech_seed", compile=False),  # its own had no effect
    Case("ours", "ljspeech"),
)
# The same cases where they are only to run
TINY = {
    "ljspeech": {"width": 32, "layers": 1, "heads": 2, "text_layers": 1, "global_batch": 4, "euler_steps": 2},
    "spectrogram": {"width": 64, "layers": 2, "heads": 2, "double_layers": 1, "rank": 4, "text_tokens": 8}
    | {"canvas_height": 32, "canvas_width": 64, "n_fft": 64, "hop": 32, "seconds": 0.1, "global_batch": 2},
    "music": {"size": "own", "width": 64, "layers": 2, "heads": 2, "double_blocks": 1}
    | {"autoencoder": "patches", "vocoder": "griffinlim", "crop_seconds": 1.28, "global_batch": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="in all")
    add("--steps", type=int, default=200, help="updates of a case at most")
    add("--only", default="", help="parts of names, with commas: 64 clips,FluxMusic,evaluation,seed,ours")
    add("--out", type=Path, default=Path("bench.md"))
    add("--batch", type=int, default=0, help="clips of a step, instead of each case's own")
    add("--clips", type=int, default=2048, help="of the synthetic corpus, 0.4 MB each")
    add("--tiny", action="store_true", help="everything small: whether it runs")
    add("--full", action="store_true", help="the real sizes, without CUDA too")
    add("--gradient_only", action="store_true", help="no optimizer: its operations take minutes on a CPU")
    options = parser.parse_args()
    device = pick_device("auto")
    options.tiny |= device.type == "cpu" and not options.full
    if options.tiny:
        options.steps = min(options.steps, 3)
        options.clips = min(options.clips, 24)
    with tempfile.TemporaryDirectory() as folder:
        Bench(options, device, Path(folder)).run()


class Bench:
    """The cases one after another, each in its share of the time."""

    def __init__(self, options: argparse.Namespace, device: torch.device, folder: Path):
        self.options = options
        self.device = device
        self.folder = folder
        self.end = time.perf_counter() + 60 * options.minutes
        self.out = open(options.out, "w", encoding="utf-8")  # noqa: SIM115
        self.text_encoder = save_text_encoder(folder / "byt5", options.tiny)

    def run(self) -> None:
        self.write(describe_machine(self.device, self.options))
        cases = [case for case in CASES if self.wanted(case.name)]
        sides = [case for case in SIDES if self.wanted(case.name)]
        parts = len(cases) + bool(sides) + self.wanted("evaluation")
        self.write_head(COLUMNS)
        for case in cases:
            found = self.guarded(case.name, functools.partial(self.measure, [case], parts))
            self.write_row(COLUMNS, found[0])
            parts -= 1
        if sides:
            names = " and ".join(case.name for case in sides)
            for row in self.guarded(names, functools.partial(self.measure, sides, parts)):
                self.write_row(COLUMNS, row)
        if self.wanted("evaluation"):
            self.write("")
            self.write_head(PARTS)
            for row in self.guarded("evaluation", self.evaluate):
                self.write_row(PARTS, row)
        self.out.close()

    def wanted(self, name: str) -> bool:
        """Sides are only measured where they are asked for."""
        if not self.options.only:
            return name not in [case.name for case in SIDES]
        return any(part in name for part in self.options.only.split(","))

    def guarded(self, name: str, run: Callable[[], list[dict]]) -> list[dict]:
        """The rows that `run` returns; one that says why where it fails."""
        failed = {"case": name, "evaluation": name}
        if time.perf_counter() > self.end - 2:
            return [failed | {"note": "no time left"}]
        try:
            return run()
        except torch.OutOfMemoryError:
            note = "out of memory"
        except Exception as e:
            note = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        finally:
            clean_up(self.device)
        return [failed | {"note": note.replace("|", "/")[:160]}]

    def measure(self, cases: list[Case], parts: int) -> list[dict]:
        """A row for each of `cases`, measured in turns. parts: among how many the time left is shared."""
        end = time.perf_counter() + (self.end - time.perf_counter()) / parts
        device = self.device
        window = WINDOW if device.type == "cuda" else 1
        trainings = [Training(case, self.configure(case), self) for case in cases]
        for training in trainings:
            training.warm_up(end)
        rounds = max(1, self.options.steps // window)
        for _ in range(rounds):
            for training in trainings:
                training.run(window)
                if self.device.type == "cpu" and self.options.full:  # a step takes minutes
                    print(f"{training.case.name}: {training.times[-1]:.0f} ms", file=sys.stderr, flush=True)
            if time.perf_counter() > end:
                break
        return [training.row() for training in trainings]

    def configure(self, case: Case) -> Config:
        """The recipe's config, with what the case changes, on a corpus of this bench."""
        path = Path(__file__).parents[1] / "configs" / f"{case.recipe}.yaml"
        knobs = dict(case.knobs)
        name = system.named_values(str(path), {})["system"]
        if name == "tts":
            knobs |= {
                "text_encoder": self.text_encoder,
                "data_dir": self.folder / "corpus",
                "download": False,
            }
        if self.options.tiny:
            knobs |= TINY["ljspeech" if name == "tts" else name]
        if self.options.batch:
            knobs["global_batch"] = self.options.batch
        knobs |= {"compile": case.compile and self.device.type == "cuda", "dtype": pick_dtype(self.device)}
        config = system.load_config(str(path), [f"--{key}={value}" for key, value in knobs.items()])
        return system.settle_batch(config, world=1)

    def evaluate(self) -> list[dict]:
        """The parts of an evaluation of eval.limit prompts by the main recipe."""
        config = self.configure(CASES[0])
        batches = open_batches(config, self)
        network = move(system.build(config, *batches.corpus.statistics), self.device)
        clips = batches.corpus.clips("train")[: 2 if self.options.tiny else config.eval.limit]
        prompts = [
            Prompt(clip.text, seconds=clip.frames / network.frame_rate, seed=n)
            for n, clip in enumerate(clips)
        ]
        size = config.eval.sample_batch
        settings = config.sample
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        recogniser = asr.load("tiny.en", self.device, quiet=True)

        def sample() -> list:
            return sum((network.sample(part, settings) for part in parts), [])

        network.sample(prompts[:1], settings)  # the first call loads the vocoder
        rows = []
        outputs = timed(rows, f"sampling, vocoder, {settings.euler_steps} steps", sample, self.device)
        timed(rows, "vocoder", lambda: [network.reference(batches.corpus, c) for c in clips], self.device)
        timed(rows, "scores", lambda: score_all(network, outputs, batches.corpus, clips), self.device)
        timed(
            rows,
            "validation",
            lambda: evaluator.validate(network, batches, config, self.device, 1),
            self.device,
        )
        if recogniser:
            waves = [output.wave for output in outputs]
            rate = outputs[0].sample_rate
            timed(rows, "Whisper tiny.en", lambda: recogniser.transcribe(waves, rate), self.device)
        for row in rows:
            row["note"] = f"{len(clips)} clips"
        return rows

    def write_head(self, columns: tuple[str, ...]) -> None:
        self.write("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")

    def write_row(self, columns: tuple[str, ...], row: dict) -> None:
        self.write("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")

    def write(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.out, flush=True)


class Training:
    """A network with all that its updates need, as train.main has them; `run` makes some and times them."""

    def __init__(self, case: Case, config: Config, bench: Bench):
        self.case = case
        self.config = config
        self.device = bench.device
        self.update_weights = not bench.options.gradient_only
        self.network, self.feed = open_training(config, bench)
        torch.backends.cuda.enable_cudnn_sdp(case.cudnn)
        torch._dynamo.reset()
        counters.clear()
        t = config.train
        self.model = parallel.wrap(self.network, t, self.device, world=1)
        self.optimizers = optim.make_optimizers(self.network, t.muon_lr, t.lr, t.weight_decay, t.compile)
        if not case.stacked:
            self.optimizers[0] = muon_of_torch(self.network, self.optimizers[0])
        self.ema = optim.EMA(self.network, t.ema)
        self.step = 0
        self.times = []  # ms an update
        self.tflop_a_token = self.count_operations()

    def count_operations(self) -> float:
        """Of forward and backward, what is computed again included, in 10^12 a token, padding counted too."""
        with FlopCounterMode(display=False) as counter:
            train.accumulate_gradient(self.network, self.network, self.feed, self.config, self.device)
        self.network.zero_grad(set_to_none=True)
        return counter.get_total_flops() / 1e12 / self.feed.tokens

    def warm_up(self, end: float) -> None:
        """Updates that do not count, until `end` at most."""
        if self.device.type == "cuda":
            for _ in range(WARM_UP):
                self.run(1)
                if time.perf_counter() > end:
                    break
            torch.cuda.reset_peak_memory_stats()
        self.first_frames = counters["frames"]["total"]
        self.times = []
        self.step = 0
        self.feed.reset()

    def run(self, updates: int) -> None:
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        wait(self.device)
        start = clock()
        for _ in range(updates):
            train.accumulate_gradient(self.model, self.network, self.feed, self.config, self.device)
            if self.update_weights:
                train.apply_gradient(self.network, self.optimizers, self.ema, self.config, self.step, 1.0)
            else:
                self.network.zero_grad(set_to_none=True)
            self.step += 1
        wait(self.device)
        self.times.append(1000 * (clock() - start) / updates)

    def row(self) -> dict:
        median = statistics.median(self.times)  # ms
        seconds = sum(self.times) / len(self.times) * self.step / 1000
        feed = self.feed
        tflop = self.tflop_a_token * feed.tokens / self.step
        peak = peak_tflops(self.device)
        on_gpu = self.device.type == "cuda"
        return {
            "case": self.case.name,
            "ms a step": f"{median:.1f}",
            "useful frames/s": f"{1000 * feed.frames / self.step / median:,.0f}",
            "padding": f"{100 * feed.padding:.1f} %",
            "TFLOP a step": f"{tflop:.4g}",
            "MFU": f"{100 * tflop / (median / 1000) / peak:.1f} %" if peak else "",
            "peak GB": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if on_gpu else "",
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "recompiles after the first steps": counters["frames"]["total"] - self.first_frames,
            "waits for the loader": f"{100 * feed.seconds / seconds:.1f} %",
            "steps": self.step,
            "note": "" if self.update_weights else "without the optimizers' step",
        }


class Feed:
    """Batches as the loop takes them; counts what it takes, and how long it waited for them."""

    def __init__(self, stream: Iterator[dict]):
        self.stream = stream
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.frames = 0
        self.tokens = 0  # computed: the padding is in them
        self.valid = 0

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict:
        start = time.perf_counter()
        batch = next(self.stream)
        self.seconds += time.perf_counter() - start
        self.frames += batch["frames"].sum().item()
        self.tokens += batch["x"].shape[:2].numel()
        self.valid += batch["valid"]
        del batch["valid"]
        return batch

    @property
    def padding(self) -> float:
        """The share of the tokens."""
        return 1 - self.valid / self.tokens


def open_training(config: Config, bench: Bench) -> tuple[System, Feed]:
    """A network with random weights on the device, and its batches."""
    device = bench.device
    if config.system == "tts":
        batches = open_batches(config, bench)
        network = move(system.build(config, *batches.corpus.statistics), device)
        workers = worker_count(config.data.workers)
        endless = data.prefetch(
            lambda step: train.pinned(batches.train(step), device), itertools.count(), workers
        )
        return network, Feed(map(with_valid, endless))
    with torch.device(device):
        network = system.build(config)
    batch = FIXED_BATCHES[config.system](network, config)
    if config.train.dtype == "bf16":
        for p in network.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()  # as the published one is loaded
    return move(network, device), Feed(map(with_valid, itertools.repeat(batch)))


def open_batches(config: Config, bench: Bench) -> data.SpeechBatches:
    """Of the synthetic corpus, which is written once."""
    with contextlib.redirect_stdout(sys.stderr):  # the table alone goes to stdout
        return loader.open_batches(config, bench.options.clips)


def with_valid(batch: dict) -> dict:
    """A batch and how many of its tokens are no padding, counted where it is still on the host."""
    mask = batch.get("x_mask")
    valid = batch["x"].shape[:2].numel() if mask is None else mask.sum().item()
    return {**batch, "valid": valid}


def picture_batch(network: System, config: Config) -> dict[str, torch.Tensor]:
    """Of system spectrogram."""
    rows = config.train.batch_size
    shape = network.transformer.config
    x = torch.randn(rows, len(network.picture_ids), shape.in_channels)
    frames = round(config.picture.seconds * network.frame_rate)
    return {
        "x": x,
        "noise": torch.randn_like(x),
        "t": torch.rand(rows),
        "text": torch.randn(rows, len(network.text_ids), shape.joint_attention_dim),
        "x_mask": torch.ones(x.shape[:2], dtype=torch.bool),
        "frames": torch.full((rows,), frames),
    }


def music_batch(network: System, config: Config) -> dict[str, torch.Tensor]:
    """Of system music: captions of 40 tokens."""
    rows = config.train.batch_size
    size = network.transformer.size
    x = torch.randn(rows, network.codec.crop_tokens, size.channels)
    return {
        "x": x,
        "noise": torch.randn_like(x),
        "t": torch.rand(rows),
        "text": torch.randn(rows, 40, size.text_width),
        "text_mask": torch.ones(rows, 40, dtype=torch.bool),
        "vector": torch.randn(rows, size.vector_width),
        "frames": torch.full((rows,), network.codec.crop_frames),
    }


FIXED_BATCHES = {"spectrogram": picture_batch, "music": music_batch}


def muon_of_torch(network: System, ours: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """torch.optim.Muon on the same matrices, one after another."""
    group = ours.param_groups[0]
    theirs = torch.optim.Muon(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
    theirs.param_groups[0]["peak_lr"] = group["lr"]
    return theirs


def save_text_encoder(folder: Path, tiny: bool) -> Path:
    """A random encoder of ByT5-small's size."""
    shape = transformers.T5Config(
        vocab_size=384,
        d_model=1472,
        d_kv=64,
        d_ff=16 if tiny else 3584,
        num_layers=1 if tiny else 12,
        num_heads=1 if tiny else 6,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(shape).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


def score_all(network: System, outputs: list, corpus: data.Corpus, clips: list) -> None:
    for output, clip in zip(outputs, clips):
        network.score(output, corpus, clip)


def timed(rows: list[dict], name: str, run: Callable, device: torch.device):
    """What `run` returns; its seconds become a row."""
    wait(device)
    start = time.perf_counter()
    found = run()
    wait(device)
    rows.append({"evaluation": name, "seconds": f"{time.perf_counter() - start:.2f}"})
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean_up(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.backends.cuda.enable_cudnn_sdp(True)


def peak_tflops(device: torch.device) -> float:
    """0 where it is not known."""
    if device.type != "cuda":
        return 0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0)


def describe_machine(device: torch.device, options: argparse.Namespace) -> str:
    card = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
        card = f"{torch.cuda.get_device_name(device)}, driver {driver[0] if driver else '?'}"
    size = "tiny sizes, which tell nothing of speed" if options.tiny else "real sizes"
    today = time.strftime("%Y-%m-%d")
    return f"{card}; torch {torch.__version__}; commit {checkpoint.commit()}; {today}; {size}\n"


if __name__ == "__main__":
    run_main(main)
