"""Train any system: `python train.py --config configs/demo.yaml [--key value ...]`, or under torchrun, one process a GPU.

All that is random was drawn into the batch from (seed, step, row): interrupted and resumed is, on a CPU, bit for bit
uninterrupted, and two ranks are one process with the double batch. SIGTERM, SIGINT or a file STOP in out_dir end the run
with a checkpoint; the same command goes on from it.
"""

import datetime
import math
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config as configs
import data
import evaluator
import metric
import optim
import system
from config import Config, UserError
from device import move, pick_device


FIRST_UPDATES = 10                   # after which a run says how long it will take


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{system.describe_knobs(sys.argv[1:])}")
        return
    wanted = system.config_from_command_line(sys.argv[1:])
    rank, world, device = start_ranks(wanted)
    config = system.settle_precision(wanted, device, world)
    out, t = Path(config.out_dir), config.train
    corpus = system.open_corpus(config)
    network = move(system.build(config, *corpus.statistics), device)
    batches = system.open_batches(config, corpus, network, rank, world)
    model = torch.compile(network) if t.compile else network
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizers = optim.make_optimizers(network, t.muon_lr, t.lr, t.weight_decay)
    average = system.Average(network, t.ema)
    start, seconds = system.resume(config, network, average, optimizers)
    if rank == 0:
        system.record_run(wanted, t.dtype, network, device, world)
        writer = metric.Writer(out, configs.to_dict(config), config.wandb, config.wandb_project, config.wandb_url, start)
    judge = evaluator.Evaluator(config, corpus, device, rank, world) if t.eval_interval else None
    stop = catch_signals()

    def save(step: int) -> None:
        if rank == 0:
            state = {"config": configs.to_dict(wanted), "step": step, "seconds": seconds, "model": system.weights(network),
                     "ema": average.mean, "optimizers": [o.state_dict() for o in optimizers]}
            system.save_checkpoint(out / "checkpoints" / f"step_{step:07d}.pt", state, t.keep)

    micro_steps = range(start * t.grad_accum, t.steps * t.grad_accum)
    stream = data.prefetch(lambda i: batches.train(i // t.grad_accum, i % t.grad_accum), micro_steps, config.data.workers)
    step, last_step, clock = start, start >= t.steps or 0 < t.max_minutes <= seconds / 60, time.perf_counter()
    logged, frames = start, 0
    while not last_step:
        # One update: the gradient of grad_accum micro-batches, synchronised once
        sums = {}
        for micro in range(t.grad_accum):
            batch = {name: value.to(device, non_blocking=device.type == "cuda") for name, value in next(stream).items()}
            unsynchronised = world > 1 and micro < t.grad_accum - 1
            with model.no_sync() if unsynchronised else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=t.dtype == "bf16"):
                    losses = model(batch)
                (losses["loss"] / t.grad_accum).backward()
            for name, value in losses.items():
                if value.dim() == 0:
                    sums[name] = sums.get(name, 0) + value.detach() / t.grad_accum
            frames += batch["frames"].sum()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), t.grad_clip or math.inf)
        done = progress(config, step, seconds + time.perf_counter() - clock, device, world)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate(config, step, done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(step)
        step += 1
        last_step = step >= t.steps or done >= 1

        # What is due: only these steps wait for the device
        due = {name: every > 0 and (last_step or step % every == 0) for name, every in
               (("log", t.log_interval), ("val", t.val_interval), ("eval", t.eval_interval), ("save", t.save_interval))}
        due["log"] = due["log"] or step == start + FIRST_UPDATES
        if not any(due.values()) and not (world == 1 and stop.is_set()):
            continue
        stopping = agree(stop.is_set() or (out / "STOP").exists(), device, world)
        values = metric_values(sums | {"grad_norm": norm}, frames, device, world)
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"step {step}: the loss or its gradient is not finite; the last good checkpoint is "
                            f"{system.newest_checkpoint(config.out_dir) or 'none yet'}; try a lower --muon_lr and --lr")
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        values |= {"perf/step_ms": 1000 * elapsed / (step - logged), "perf/frames_per_sec": values.pop("frames") / elapsed,
                   "perf/train_minutes": seconds / 60, "train/lr": optimizers[-1].param_groups[0]["lr"]}
        logged, frames = step, 0
        if rank == 0:
            writer.log(step, values)
            print(progress_line(config, step, done, seconds, values), flush=True)
            if step == start + FIRST_UPDATES:
                print(forecast(config, step, values["perf/step_ms"] / 1000), flush=True)
        if due["save"] or stopping:
            save(step)
        if stopping:
            last_step = True
        elif due["val"] or due["eval"]:
            with average:
                found = evaluator.validate(network, batches, config, device, world) if due["val"] else {}
                found |= judge.run(network, step) if due["eval"] else {}
            if rank == 0:
                writer.log(step, found)
                evaluator.show(found)
                if due["eval"]:
                    evaluator.log_media(writer, out, step)
        clock = time.perf_counter()                    # what was not training does not count
    stream.close()
    if rank == 0:
        (out / "STOP").unlink(missing_ok=True)
        writer.close()
        print("made:", *sorted(out.glob("sample.*")), metric.write_report(out), flush=True)
    if world > 1:
        dist.barrier()                                 # no rank leaves while rank 0 still writes
        dist.destroy_process_group()
    if rank == 0 and config.expect and step >= t.steps:
        lines, met = metric.compare_expected(config.expect, metric.read_lines(out / "metrics.jsonl"))
        print(*lines, sep="\n", flush=True)
        sys.exit(0 if met else 1)


def start_ranks(config: Config) -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks, its device; as torchrun says, or alone."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return rank, world, device


def catch_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second SIGINT ends at once."""
    stop = threading.Event()

    def ask(number: int, _frame) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    return stop


def progress(config: Config, step: int, seconds: float, device: torch.device, world: int) -> float:
    """How much of the run is over, 0 to 1: by steps, or by the clock when max_minutes is set and comes first."""
    done = (step + 1) / config.train.steps
    if config.train.max_minutes == 0:
        return done
    done = torch.tensor(max(done, seconds / 60 / config.train.max_minutes), device=device)
    if world > 1:
        dist.all_reduce(done, dist.ReduceOp.MAX)       # the ranks' clocks differ, their rates must not
    return min(1.0, done.item())


def rate(config: Config, step: int, done: float) -> float:
    """The learning rate as a share of its peak."""
    t = config.train
    warm = min(1.0, (step + 1) / (t.warmup + 1))
    if t.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * done))
    return warm * min(1.0, (1 - done) / max(t.decay, 1e-9))


def agree(flag: bool, device: torch.device, world: int) -> bool:
    """Whether any rank says so."""
    if world == 1:
        return flag
    said = torch.tensor(float(flag), device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.item() > 0


def metric_values(scalars: dict[str, torch.Tensor], frames: torch.Tensor, device: torch.device, world: int) -> dict[str, float]:
    """Scalars averaged and frames summed over the ranks, in one reduction and one wait for the device."""
    stacked = torch.stack([*(v.float().reshape(()) for v in scalars.values()), frames.float()])
    if world > 1:
        dist.all_reduce(stacked)
        stacked[:-1] /= world
    *means, frames = stacked.tolist()
    return {f"train/{name}": value for name, value in zip(scalars, means)} | {"frames": frames}


def forecast(config: Config, step: int, seconds: float) -> str:
    """How long the rest will take, from the seconds of one update."""
    t = config.train
    left = (t.steps - step) * seconds / 60
    if t.max_minutes:
        left = min(left, t.max_minutes)
    return f"an update takes {seconds:.2f} s: about {left:.0f} more minutes of training for the {t.steps - step} to go, evaluation not counted"


def progress_line(config: Config, step: int, done: float, seconds: float, values: dict[str, float]) -> str:
    left = datetime.timedelta(seconds=round(seconds * (1 - done) / done))
    losses = "  ".join(f"{name.removeprefix('train/')} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
    return (f"step {step}/{config.train.steps} ({100 * done:.0f} %)  {losses}  {values['perf/step_ms']:.0f} ms/step  "
            f"{values['perf/frames_per_sec'] / 1000:.1f}k frames/s  ETA {left}")


if __name__ == "__main__":
    configs.run_main(main)
