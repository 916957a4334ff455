"""One training loop for everything: the base student, distillation, the plain CLIP and the teacher.

A batch flows one way: pairs -> tensors (+ cached teacher embeddings) -> model -> named loss terms -> schedule and
balancer -> one scalar -> step. Lightning Fabric moves it to the device and the precision asked for, and joins the
processes that torchrun has started.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from mclip.balancing import Balancer, Schedule, make_balancer
from mclip.checkpoints import RunState, run_identity
from mclip.config import TrainConfig, require
from mclip.objectives import Contrastive
from mclip.pairs import Batch, BatchSource
from mclip.steps import Record, Stepper, Student, TrainError, gradient_scaler

GO_ON, SAVE, STOP = range(3)  # what a process may ask for after a step


@dataclass
class TrainResult:
    """What a run leaves: the trained model, its log (one record a step, and one a validation), and seconds."""

    model: nn.Module
    log: list[Record]
    seconds: float
    steps: int
    stopped_early: bool

    def validations(self) -> list[Record]:
        """The records of the evaluations."""
        return [record for record in self.log if "validation" in record]


def train(
    model: nn.Module,
    batches: BatchSource,
    config: TrainConfig,
    *,
    objective: Contrastive,
    out_dir: str | Path,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = True,
    on_record: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Train ``model`` on ``batches`` with the terms of ``objective``; write log and checkpoints to ``out_dir``.

    Several processes share each batch: the run is the same, whatever their number. Ctrl-C lets the step end and
    writes a checkpoint.

    Args:
        model: anything whose ``forward(images, tokens)`` returns open_clip's dict of features and scale.
        validate: from the model to metrics in percent; higher ``r1`` is better. Called every ``validate_every`` epochs.
            It drives the balancer and early stopping.
        resume: go on from the newest checkpoint in ``out_dir``; a finished run is returned at once.
        on_record: called with each record of the log, for live curves.

    Raises:
        TrainError: a term is not finite. ConfigError: the checkpoint has other settings. OSError: no writing there.
    """
    keep_freed_memory()
    fabric, begun = make_fabric(config), time.perf_counter()
    per_epoch = steps_per_epoch(batches, config, fabric.world_size)
    total, pairs_per_step = per_epoch * config.max_epochs, config.batch_size * config.accumulate_grad_batches
    modules = nn.ModuleDict({"model": model, "objective": objective, "balancer": make_balancer(objective.config)})
    modules.to(fabric.device, memory_format=torch.channels_last)
    optimizer, average = make_optimizer(modules, config), make_average(model, config)
    parts = {"modules": modules, "optimizer": optimizer, "average": average, "scaler": gradient_scaler(fabric)}
    run = RunState(
        out_dir, run_identity(model, batches, config, objective.config), parts, fabric.is_global_zero, on_record
    )
    run.begin(resume)
    fabric.barrier()
    stepper = Stepper(
        fabric,
        fabric.setup_module(Student(model)),
        objective,
        modules["balancer"],
        fabric.setup_optimizers(optimizer),
        Schedule(objective.config, total),
        config,
    )

    hidden = not (config.progress and fabric.is_global_zero)
    bar = tqdm(desc="training", total=total, initial=run.step, unit=" pairs", unit_scale=pairs_per_step, disable=hidden)
    with bar, interruptible() as interrupts:
        for pieces in pieces_of_steps(fabric, batches, config, run, per_epoch):
            rate = learning_rate(run.step, total, config)
            try:
                record = stepper.take(pieces, run.step, rate)
            except TrainError as error:
                raise TrainError(f"{error} {run.last_checkpoint()}") from None
            run.record({**record, "epoch": run.step // per_epoch, "lr": rate})
            run.step += 1
            bar.set_postfix(loss=f"{record['loss']:.3f}", phase=record["phase"], refresh=False)
            bar.update()
            if average:
                average.update_parameters(model)

            epoch, rest = divmod(run.step, per_epoch)
            if rest == 0:
                last = run.step == total
                if validate and (last or epoch % config.validate_every == 0):
                    metrics = validate(average.module if average else model) if fabric.is_global_zero else None
                    record_validation(run, modules["balancer"], fabric.broadcast(metrics), epoch - 1)
                patience = config.early_stopping_patience
                run.finished = last or (patience is not None and run.stale >= patience)
            wish = STOP if interrupts else SAVE if run.due(config.checkpoint_minutes) else GO_ON
            wish = strongest(fabric, wish)
            if rest == 0 or wish != GO_ON:
                run.save()
            if wish == STOP and not run.finished:
                raise KeyboardInterrupt

    if average:
        model.load_state_dict(average.module.state_dict())
    return TrainResult(model.eval(), run.log, time.perf_counter() - begun, run.step, run.step < total)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0, per step (Loshchilov & Hutter 2017): a function of the step alone."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_fabric(config: TrainConfig) -> Fabric:
    """One process, or as many as torchrun has started, on as many machines."""
    devices, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=config.precision
    )
    fabric.launch()
    return fabric


def make_optimizer(modules: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98 as CLIP); norms, biases, temperatures and balances are not decayed."""
    decayed = [p for p in modules.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in modules.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The fused form takes about a quarter of the time on a CPU, which a small model feels in every step. With a
    # gradient scaler it would unscale the gradient itself, after the clipping.
    fused = config.precision != "16-mixed"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)


def make_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The moving average of the weights, if the configuration asks for one."""
    if config.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)


def steps_per_epoch(batches: BatchSource, config: TrainConfig, processes: int) -> int:
    """Optimiser steps of an epoch; ConfigError if it has none, or if batches are too small for the processes."""
    steps, remedy = len(batches) // config.accumulate_grad_batches, f"an epoch has only {len(batches)} batches"
    require(steps > 0, "accumulate_grad_batches", config.accumulate_grad_batches, remedy)
    remedy = f"each of the {processes} processes needs a pair of every batch"
    require(config.batch_size >= processes, "batch_size", config.batch_size, remedy)
    return steps


def pieces_of_steps(
    fabric: Fabric, batches: BatchSource, config: TrainConfig, run: RunState, per_epoch: int
) -> Iterator[list[Batch]]:
    """This process's part of the batches of each optimiser step, from ``run.step`` on, until the run is finished."""
    while not run.finished:
        epoch, done = divmod(run.step, per_epoch)
        start = done * config.accumulate_grad_batches
        stream = batches.epoch(epoch, start, fabric.global_rank, fabric.world_size)
        for _ in range(done, per_epoch):
            yield [next(stream).to(fabric.to_device) for _ in range(config.accumulate_grad_batches)]


def record_validation(run: RunState, balancer: Balancer, metrics: dict[str, float], epoch: int) -> None:
    """Log a validation, and tell the balancer and early stopping of it."""
    run.observe(metrics["r1"])
    switched = balancer.observe(metrics["r1"])
    run.record({"step": run.step, "epoch": epoch, "validation": metrics, "switched": switched})


def strongest(fabric: Fabric, wish: int) -> int:
    """The strongest wish of all processes, the same on all: each may be interrupted, and has a clock of its own."""
    if fabric.world_size == 1:
        return wish
    return int(fabric.all_reduce(torch.tensor(wish, device=fabric.device), reduce_op="max"))


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """While it lasts, the first Ctrl-C or SIGTERM is only noted in the list; the second stops at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    main = threading.current_thread() is threading.main_thread()  # elsewhere Python has no signals
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed, for the next step, in place of giving it back to the system.

    The largest activations would otherwise be mapped anew, page by page, in every step: at 224 pixels that takes as
    long as the arithmetic. Elsewhere than on Linux with glibc, and on a GPU, it changes nothing.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        allocator.mallopt(mmap_max, 0)
        allocator.mallopt(trim_threshold, 2**31 - 1)


def read_log(path: str | Path) -> list[Record]:
    """The records of a JSON-lines log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
