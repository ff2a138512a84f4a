"""Train any system: `python train.py --config FILE [--key value ...]`; by launch.py on several GPUs.

Everything random is drawn into the batch from (seed, step, row). So on a CPU a run that was interrupted and
resumed is bit for bit the uninterrupted one, and two ranks are one process with the double batch.
SIGTERM, SIGINT, SIGHUP or a file STOP in out_dir end the run with a checkpoint, from which the same command
goes on. One training at a time writes into an out_dir.
"""

import datetime
import math
import operator
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import config as configs
import data
import evaluator
import metric
import optim
import parallel
import system
from base import System
from config import Config, UserError
from device import move, pick_device, worker_count
from entry import Interrupted, run_main, stop
from tracking import checkpoint, logger, report

FORECAST_AFTER = 10  # after which a run says how long it will take


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(f"{__doc__}\n{system.describe_knobs(sys.argv[1:])}")
        return
    requested = system.config_from_command_line(sys.argv[1:])
    rank, world, device = start_ranks(requested)
    config = system.settle(requested, device, world)
    train = config.train
    out = Path(config.out_dir)
    corpus = system.open_corpus(config)
    network = move(system.begin(config, *corpus.statistics), device)
    batches = system.open_batches(config, corpus, network, rank, world)
    model = parallel.wrap(network, train, device, world)
    optimizers = optim.make_optimizers(network, train.muon_lr, train.lr, train.weight_decay, train.compile)
    ema = optim.EMA(network, train.ema)
    lock = checkpoint.lock(requested.out_dir) if rank == 0 else None
    start, seconds = checkpoint.resume(config, network, ema, optimizers)
    check_agreement(config, {"step": start, "corpus": corpus.fingerprint}, world)
    if rank == 0:
        checkpoint.record_run(requested, train, network, device, world)
        writer = logger.MetricsLogger(
            out, configs.to_dict(config), config.wandb, config.wandb_project, config.wandb_url, start
        )
    saver = checkpoint.Saver()
    evaluation = evaluator.Evaluator(config, corpus, device, rank, world) if train.eval_interval else None
    stop.catch_signals()

    def evaluate(step: int, val_due: bool, eval_due: bool) -> bool:
        """Returns whether a signal has cut it short."""
        values = {}
        interrupted = False
        try:
            with ema, parallel.whole(network):
                if val_due:
                    values |= evaluator.validate(network, batches, config, device, world)
                if eval_due:
                    values |= evaluation.run(network, step)
        except Interrupted:
            interrupted = True
        if rank == 0:
            writer.log(step, values)
            evaluator.print_scores(values, network.scores)
            if interrupted:
                print(f"evaluation cut short; python evaluator.py --ckpt {out} repeats it", flush=True)
            elif eval_due:
                evaluator.log_media(writer, out, step)
        return interrupted

    micro_steps = range(start * train.grad_accum, train.steps * train.grad_accum)
    stream = data.prefetch(
        lambda i: pinned(batches.train(*divmod(i, train.grad_accum)), device),
        micro_steps,
        worker_count(config.data.workers),
    )
    step = start
    last_step = step >= train.steps or 0 < train.max_minutes <= seconds / 60
    # A run that was ended between a checkpoint and what was due beside it owes that
    logged = writer.resumed if rank == 0 and start > 0 else {"val", "eval"}
    val_due = is_due(train.val_interval, step, last_step) and "val" not in logged
    eval_due = is_due(train.eval_interval, step, last_step) and "eval" not in logged
    val_due = any_rank(val_due, device, world)
    eval_due = any_rank(eval_due, device, world)
    interrupted = (val_due or eval_due) and evaluate(step, val_due, eval_due)
    clock = time.perf_counter()
    frames = 0  # since `logged_step`
    logged_step = start
    while not last_step:
        sums, clip_frames = accumulate_gradient(model, network, stream, config, device)
        frames += clip_frames
        now = seconds + time.perf_counter() - clock
        done = fraction_done(config, step, now, device, world)
        grad_norm = apply_gradient(network, optimizers, ema, config, step, lr_scale(config, step, done))
        step += 1
        last_step = step >= train.steps or done >= 1

        # What is due: only these steps wait for the device
        first_updates_end = step == start + FORECAST_AFTER
        log_due = is_due(train.log_interval, step, last_step) or first_updates_end
        val_due = is_due(train.val_interval, step, last_step)
        eval_due = is_due(train.eval_interval, step, last_step)
        save_due = is_due(train.save_interval, step, last_step)
        # several ranks stop only where all of them ask
        stop_due = interrupted or (world == 1 and stop.asked)
        if not (log_due or val_due or eval_due or save_due or stop_due):
            continue
        stopping = any_rank(stop.asked or (out / "STOP").exists(), device, world)
        values = reduce_metrics(sums | {"grad_norm": grad_norm}, frames, device, world)
        if not all(map(math.isfinite, values.values())):
            saver.finish()  # it may be the last good one
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
            writer.log(step, values | saver.finished())
            print(progress_line(config, step, done, seconds, values), flush=True)
            if first_updates_end:
                print(forecast(config, step, values["perf/step_ms"] / 1000), flush=True)
        if save_due or stopping:
            state = {
                "config": configs.to_dict(requested),
                "step": step,
                "seconds": seconds,
                "model": checkpoint.trained_weights(network),
                "ema": ema.shadow,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            state = parallel.gather(state)
            path = out / "checkpoints" / checkpoint.file_name(step)
            if rank == 0:
                writer.log(step, saver.save(path, state, train.keep))
        if stopping:
            last_step = True
        elif val_due or eval_due:
            interrupted = evaluate(step, val_due, eval_due)
        clock = time.perf_counter()  # saving and evaluating do not count as training
    stream.close()
    if rank == 0:
        writer.log(step, saver.finish())
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
    """This process's rank, the number of ranks, its device: as launch.py or torchrun says, or alone."""
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


def check_agreement(config: Config, facts: dict[str, object], world: int) -> None:
    """raises UserError, on all ranks, where a fact, the source or a knob differs between them.

    Machines without a shared disk may keep their corpus and their runs at different places.
    """
    if world == 1:
        return
    facts = {**facts, "source": checkpoint.source_digest()[:10]}
    for key in configs.keys(type(config)):
        if key not in ("out_dir", "data.data_dir"):
            facts[key] = operator.attrgetter(key)(config)
    found = evaluator.all_gather([facts], world)
    for rank, others in enumerate(found):
        for name, value in others.items():
            if value != found[0][name]:
                fault = f"{name} is {value} on rank {rank}, {found[0][name]} on rank 0"
                raise UserError(f"{fault}: all need the same command, source, corpus and checkpoints")


def pinned(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """In memory that a GPU copies from by itself, while the network computes; on other devices as it is."""
    if device.type != "cuda":
        return batch
    return {name: value.pin_memory() for name, value in batch.items()}


# An update, in two halves; neither waits for the device


def accumulate_gradient(
    model: nn.Module, network: System, stream: Iterator, config: Config, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of the next grad_accum micro-batches of `stream`, synchronised once.

    model: `network` as DDP and torch.compile have wrapped it.
    returns: the means of the losses, by name; the frames of the clips, their sum.
    """
    train = config.train
    sums = {}
    frames = 0
    for micro in range(train.grad_accum):
        batch = to_device(next(stream), device)
        if train.compile:
            parallel.mark_lengths(batch, network.varying)
        last_micro = micro == train.grad_accum - 1
        with parallel.accumulate(model, last_micro):
            with torch.autocast(device.type, torch.bfloat16, enabled=train.dtype == "bf16"):
                losses = model(batch)
            loss = losses["loss"] / train.grad_accum
            loss.backward()
        for name, value in losses.items():
            if value.dim() == 0:
                sums[name] = sums.get(name, 0) + value.detach() / train.grad_accum
        frames += batch["frames"].sum()
    return sums, frames


def apply_gradient(
    network: System,
    optimizers: Sequence[torch.optim.Optimizer],
    ema: optim.EMA,
    config: Config,
    step: int,
    scale: float,
) -> Tensor:
    """Clip the gradient, change the weights by it, and their average; returns its norm before that.

    scale: of the learning rates, as `lr_scale`.
    """
    max_norm = config.train.grad_clip or math.inf
    grad_norm = parallel.clip_grad_norm(network, max_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ema.update(step)
    return grad_norm


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
    done = max(done, seconds / 60 / train.max_minutes)
    if world > 1:  # the ranks' clocks differ, their learning rates must not
        latest = torch.tensor(done, device=device)
        dist.all_reduce(latest, dist.ReduceOp.MAX)
        done = latest.item()
    return min(1.0, done)


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
