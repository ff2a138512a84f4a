"""Train any system: `python train.py --config FILE [--key value ...]`; under torchrun, one process a GPU.

Everything random is drawn into the batch from (seed, step, row). So on a CPU a run that was interrupted and
resumed is bit for bit the uninterrupted one, and two ranks are one process with the double batch.
SIGTERM, SIGINT, SIGHUP or a file STOP in out_dir end the run with a checkpoint, from which the same command
goes on. One training at a time writes into an out_dir.
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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import config as configs
import data
import evaluator
import metric
import optim
import system
from config import Config, UserError
from device import move, pick_device
from entry import run_main
from tracking import checkpoint, logger, report

FORECAST_AFTER = 10  # after which a run says how long it will take


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{system.describe_knobs(sys.argv[1:])}")
        return
    requested = system.config_from_command_line(sys.argv[1:])
    rank, world, device = start_ranks(requested)
    config = system.settle_precision(requested, device, world)
    train = config.train
    out = Path(config.out_dir)
    corpus = system.open_corpus(config)
    network = move(system.build(config, *corpus.statistics), device)
    batches = system.open_batches(config, corpus, network, rank, world)
    model = torch.compile(network) if train.compile else network
    if world > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids)
    optimizers = optim.make_optimizers(network, train.muon_lr, train.lr, train.weight_decay)
    ema = optim.EMA(network, train.ema)
    lock = checkpoint.lock(requested.out_dir) if rank == 0 else None
    start, seconds = checkpoint.resume(config, network, ema, optimizers)
    if rank == 0:
        checkpoint.record_run(requested, train.dtype, network, device, world)
        writer = logger.MetricsLogger(
            out, configs.to_dict(config), config.wandb, config.wandb_project, config.wandb_url, start
        )
    evaluation = evaluator.Evaluator(config, corpus, device, rank, world) if train.eval_interval else None
    stop = catch_signals()

    def evaluate(step: int, val_due: bool, eval_due: bool) -> None:
        values = {}
        with ema:
            if val_due:
                values |= evaluator.validate(network, batches, config, device, world)
            if eval_due:
                values |= evaluation.run(network, step)
        if rank == 0:
            writer.log(step, values)
            evaluator.print_scores(values, network.scores)
            if eval_due:
                evaluator.log_media(writer, out, step)

    micro_steps = range(start * train.grad_accum, train.steps * train.grad_accum)
    stream = data.prefetch(
        lambda i: batches.train(*divmod(i, train.grad_accum)), micro_steps, config.data.workers
    )
    step = start
    last_step = step >= train.steps or 0 < train.max_minutes <= seconds / 60
    # A run that was ended between a checkpoint and what was due beside it owes that
    logged = writer.resumed if rank == 0 and start > 0 else {"val", "eval"}
    val_due = is_due(train.val_interval, step, last_step) and "val" not in logged
    eval_due = is_due(train.eval_interval, step, last_step) and "eval" not in logged
    val_due = any_rank(val_due, device, world)
    eval_due = any_rank(eval_due, device, world)
    if val_due or eval_due:
        evaluate(step, val_due, eval_due)
    clock = time.perf_counter()
    frames = 0  # since `logged_step`
    logged_step = start
    while not last_step:
        # One update: the gradient of grad_accum micro-batches, synchronised once
        sums = {}
        for micro in range(train.grad_accum):
            batch = to_device(next(stream), device)
            last_micro = micro == train.grad_accum - 1
            with nullcontext() if world == 1 or last_micro else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=train.dtype == "bf16"):
                    losses = model(batch)
                loss = losses["loss"] / train.grad_accum
                loss.backward()
            for name, value in losses.items():
                if value.dim() == 0:
                    sums[name] = sums.get(name, 0) + value.detach() / train.grad_accum
            frames += batch["frames"].sum()
        max_norm = train.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        now = seconds + time.perf_counter() - clock
        done = fraction_done(config, step, now, device, world)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(config, step, done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        step += 1
        last_step = step >= train.steps or done >= 1

        # What is due: only these steps wait for the device
        first_updates_end = step == start + FORECAST_AFTER
        log_due = is_due(train.log_interval, step, last_step) or first_updates_end
        val_due = is_due(train.val_interval, step, last_step)
        eval_due = is_due(train.eval_interval, step, last_step)
        save_due = is_due(train.save_interval, step, last_step)
        stop_due = world == 1 and stop.is_set()  # several ranks stop only where all of them ask
        if not (log_due or val_due or eval_due or save_due or stop_due):
            continue
        stopping = any_rank(stop.is_set() or (out / "STOP").exists(), device, world)
        values = reduce_metrics(sums | {"grad_norm": grad_norm}, frames, device, world)
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"step {step}: the loss or its gradient is not finite; "
                f"{checkpoint.last_good(out)}; try a lower --muon_lr and --lr"
            )
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        values["perf/step_ms"] = 1000 * elapsed / (step - logged_step)
        values["perf/frames_per_sec"] = values.pop("frames") / elapsed
        values["perf/train_minutes"] = seconds / 60
        values["train/lr"] = optimizers[-1].param_groups[0]["lr"]
        logged_step = step
        frames = 0
        if rank == 0:
            writer.log(step, values)
            print(progress_line(config, step, done, seconds, values), flush=True)
            if first_updates_end:
                print(forecast(config, step, values["perf/step_ms"] / 1000), flush=True)
        if rank == 0 and (save_due or stopping):
            state = {
                "config": configs.to_dict(requested),
                "step": step,
                "seconds": seconds,
                "model": checkpoint.trained_weights(network),
                "ema": ema.shadow,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            path = out / "checkpoints" / checkpoint.file_name(step)
            checkpoint.save_checkpoint(path, state, train.keep)
        if stopping:
            last_step = True
        elif val_due or eval_due:
            evaluate(step, val_due, eval_due)
        clock = time.perf_counter()  # saving and evaluating do not count as training
    stream.close()
    if rank == 0:
        (out / "STOP").unlink(missing_ok=True)
        writer.close()
        print("made:", *sorted(out.glob("sample.*")), report.write_report(out), flush=True)
        lock.close()
    if world > 1:
        dist.barrier()  # no rank leaves while rank 0 still writes
        dist.destroy_process_group()
    if rank == 0 and config.expect and step >= train.steps:
        logged = logger.read_lines(out / "metrics.jsonl")
        lines, met = metric.compare_expected(config.expect, logged, network.scores)
        print(*lines, sep="\n", flush=True)
        sys.exit(0 if met else 1)


def start_ranks(config: Config) -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks, its device: from torchrun's environment, or alone."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    return rank, world, device


def catch_signals() -> threading.Event:
    """An event that SIGTERM, SIGINT and SIGHUP set; a second SIGINT ends at once.

    A terminal that is closed may send SIGHUP twice; under nohup it stays ignored.
    """
    stop = threading.Event()

    def handle(number: int, _frame) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    if signal.getsignal(hangup) != signal.SIG_IGN:
        signal.signal(hangup, handle)
    return stop


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    moved = {}
    for name, value in batch.items():
        moved[name] = value.to(device, non_blocking=device.type == "cuda")
    return moved


def is_due(interval: int, step: int, last_step: bool) -> bool:
    """Whether what is done every `interval` steps, 0 = never, is due; at the last step it is."""
    return interval > 0 and (last_step or step % interval == 0)


def fraction_done(config: Config, step: int, seconds: float, device: torch.device, world: int) -> float:
    """The fraction of the run that is done: by steps, or by the clock if max_minutes is set and is ahead."""
    train = config.train
    done = (step + 1) / train.steps
    if train.max_minutes == 0:
        return done
    by_clock = seconds / 60 / train.max_minutes
    done = torch.tensor(max(done, by_clock), device=device)
    if world > 1:
        dist.all_reduce(done, dist.ReduceOp.MAX)  # the ranks' clocks differ, their learning rates must not
    return min(1.0, done.item())


def lr_scale(config: Config, step: int, done: float) -> float:
    """The learning rate as a fraction of its peak."""
    train = config.train
    warm = min(1.0, (step + 1) / (train.warmup + 1))
    if train.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * done))
    return warm * min(1.0, (1 - done) / max(train.decay, 1e-9))


def any_rank(flag: bool, device: torch.device, world: int) -> bool:
    """Whether the flag is set on any rank."""
    if world == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.item() > 0


def reduce_metrics(
    scalars: dict[str, Tensor], frames: Tensor, device: torch.device, world: int
) -> dict[str, float]:
    """Scalars averaged and frames summed over the ranks, with one reduction and one wait for the device."""
    values = [value.float().reshape(()) for value in scalars.values()]
    stacked = torch.stack([*values, frames.float()])
    if world > 1:
        dist.all_reduce(stacked)
        stacked[:-1] /= world
    *means, total_frames = stacked.tolist()
    found = {}
    for name, mean in zip(scalars, means):
        found[f"train/{name}"] = mean
    found["frames"] = total_frames
    return found


def forecast(config: Config, step: int, step_seconds: float) -> str:
    """How long the rest will take, from the seconds of one update."""
    train = config.train
    steps = train.steps - step
    minutes = steps * step_seconds / 60
    if train.max_minutes:
        minutes = min(minutes, train.max_minutes)
    return (
        f"an update takes {step_seconds:.2f} s: about {minutes:.0f} more minutes of training "
        f"for the {steps} to go, evaluation not counted"
    )


def progress_line(config: Config, step: int, done: float, seconds: float, values: dict[str, float]) -> str:
    losses = []
    for name, value in values.items():
        if name.endswith("loss"):
            losses.append(f"{name.removeprefix('train/')} {value:.4f}")
    left = round(seconds * (1 - done) / done)
    parts = [
        f"step {step}/{config.train.steps} ({100 * done:.0f} %)",
        *losses,
        f"{values['perf/step_ms']:.0f} ms/step",
        f"{values['perf/frames_per_sec'] / 1000:.1f}k frames/s",
        f"ETA {datetime.timedelta(seconds=left)}",
    ]
    return "  ".join(parts)


if __name__ == "__main__":
    run_main(main)
