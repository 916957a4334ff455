"""One training loop for everything: the base student, distillation, the plain CLIP and the teacher.

A batch flows one way: pairs -> tensors (+ cached teacher embeddings) -> model -> named loss terms -> schedule and
balancer -> one scalar -> step. Lightning Fabric moves it to the device and the precision asked for, and joins the
processes that torchrun has started.
"""

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
from tqdm.auto import tqdm

from mclip.checkpoints import RunState, run_identity
from mclip.config import ConfigError, TrainConfig, require
from mclip.evaluate import keep_freed_memory
from mclip.objectives import Contrastive
from mclip.pairs import Batch, BatchSource
from mclip.steps import Record, Stepper, TrainError

GO_ON, SAVE, STOP = range(3)  # what a process may wish after a step, from the weakest


@dataclass
class TrainResult:
    """What a run leaves."""

    model: nn.Module
    log: list[Record]  # one record a step, and one a validation
    seconds: float
    steps: int

    def validations(self) -> list[Record]:
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

    Several processes share each batch, and each one's BatchNorm sees its own part. Ctrl-C lets the step end and writes
    a checkpoint. With ``resume`` the run goes on from the newest checkpoint in ``out_dir``. ConfigError if that
    has other settings; TrainError for a term that is not finite.

    Args:
        model: anything whose ``forward(images, tokens)`` returns open_clip's dict of features and scale.
        validate: from the model to metrics in percent; higher ``r1`` is better. It drives balancer and early stopping.
        on_record: called with each record of the log, for live curves.
    """
    keep_freed_memory()
    fabric, begun = make_fabric(config), time.perf_counter()
    per_epoch = len(batches) // config.accumulate_grad_batches
    remedy = f"an epoch has only {len(batches)} batches"
    require(per_epoch > 0, "accumulate_grad_batches", config.accumulate_grad_batches, remedy)
    remedy = f"each of the {fabric.world_size} processes needs a pair of every batch"
    require(config.batch_size >= fabric.world_size, "batch_size", config.batch_size, remedy)
    total = per_epoch * config.max_epochs
    identity = run_identity(model, batches, config, objective.config)
    stepper = Stepper(fabric, model, objective, config, total)
    average = stepper.parts.get("average")
    run = RunState(Path(out_dir), identity, stepper.parts, fabric.is_global_zero, on_record)
    run.begin(resume)
    begun -= run.seconds
    steps = fabric.all_gather(torch.tensor(run.step, device=fabric.device)).reshape(-1).tolist()
    remedy = f"its processes would go on from the steps {steps}; give a folder that all machines share"
    require(len(set(steps)) == 1, "out_dir", str(out_dir), remedy)

    hidden, pairs = not (config.progress and fabric.is_global_zero), config.batch_size * config.accumulate_grad_batches
    bar = tqdm(desc="training", total=total, initial=run.step, unit=" pairs", unit_scale=pairs, disable=hidden)
    with bar, interruptible() as interrupts:
        for pieces in pieces_of_steps(fabric, batches, config, run, per_epoch):
            rate = learning_rate(run.step, total, config)
            try:
                record = stepper.take(pieces, run.step, rate)
            except TrainError as error:
                remedy = f"start in another folder with a lower learning_rate than {config.learning_rate}"
                raise TrainError(f"{error}; {remedy}.") from None
            if average:
                average.update(model, run.step + 1)
            run.record({**record, "epoch": run.step // per_epoch, "lr": rate})
            run.step += 1
            bar.set_postfix(loss=f"{record['loss']:.3f}", phase=record["phase"], refresh=False)
            bar.update()

            last, (epochs, rest) = run.step == total, divmod(run.step, per_epoch)
            if validate and rest == 0 and (last or epochs % config.validate_every == 0):
                metrics = validate(average.module if average else model) if fabric.is_global_zero else None
                metrics = fabric.broadcast(metrics)
                run.best, run.stale = (metrics["r1"], 0) if metrics["r1"] > run.best else (run.best, run.stale + 1)
                switched = stepper.balancer.observe(metrics["r1"])
                run.record({"step": run.step, "epoch": epochs - 1, "validation": metrics, "switched": switched})
            patience = config.early_stopping_patience
            run.finished = last or (rest == 0 and patience is not None and run.stale >= patience)

            # Each process may be interrupted, and has a clock of its own, so they must agree on what to do.
            due = run.writes and time.monotonic() - run.saved > 60 * config.checkpoint_minutes
            wish = STOP if interrupts else SAVE if due else GO_ON
            wish = int(fabric.all_reduce(wish, reduce_op="max"))
            if rest == 0 or wish != GO_ON:
                run.seconds = time.perf_counter() - begun
                run.save()
            if wish == STOP and not run.finished:
                raise KeyboardInterrupt

    if average:
        model.load_state_dict(average.module.state_dict())
    return TrainResult(model.eval(), run.log, time.perf_counter() - begun, run.step)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0, per step (Loshchilov & Hutter 2017): a function of the step alone."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_fabric(config: TrainConfig) -> Fabric:
    """One process, or as many as torchrun has started, on as many machines."""
    devices, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    machines = {"devices": devices, "num_nodes": nodes, "strategy": "ddp" if devices * nodes > 1 else "auto"}
    try:
        fabric = Fabric(accelerator=config.accelerator, precision=config.precision, **machines)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"accelerator={config.accelerator!r} cannot be used ({error}); auto always can.") from error
    fabric.launch()
    return fabric


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
