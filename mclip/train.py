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
from mclip.checkpoints import Checkpoints, run_identity
from mclip.config import TrainConfig, require
from mclip.objectives import Contrastive
from mclip.pairs import Batch, BatchSource
from mclip.steps import Record, Stepper, TrainError


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


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0, per step (Loshchilov & Hutter 2017): a function of the step alone."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(modules: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98 as CLIP); norms, biases, temperatures and balances are not decayed."""
    decayed = [p for p in modules.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in modules.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: on a CPU about a quarter of the time of the usual form, which a small model feels in every step.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def make_fabric(config: TrainConfig) -> Fabric:
    """One process, or as many as torchrun has started, on as many machines."""
    devices, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=config.precision
    )
    fabric.launch()
    return fabric


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
        validate: from the model to metrics in percent; higher ``r1`` is better. Called every
            ``validate_every`` epochs; it drives the balancers and early stopping.
        resume: go on from the newest checkpoint in ``out_dir``; a finished run is returned at once.
        on_record: called with each record of the log, for live curves.

    Raises:
        TrainError: a term is not finite. ConfigError: the checkpoint has other settings. OSError: no writing there.
    """
    keep_freed_memory()
    fabric, distill = make_fabric(config), objective.config
    modules = nn.ModuleDict({"model": model, "objective": objective, "balancer": make_balancer(distill)})
    modules.to(fabric.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(modules, config)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        if config.ema_decay
        else None
    )
    per_epoch = len(batches) // config.accumulate_grad_batches
    remedy = f"an epoch has only {len(batches)} batches"
    require(per_epoch > 0, "accumulate_grad_batches", config.accumulate_grad_batches, remedy)
    remedy = f"each of the {fabric.world_size} processes needs a pair of every batch"
    require(config.batch_size >= fabric.world_size, "batch_size", config.batch_size, remedy)
    total = per_epoch * config.max_epochs
    parts = {"modules": modules, "optimizer": optimizer} | ({"average": average} if average else {})
    identity = run_identity(model, batches, config, distill)
    run = Checkpoints(out_dir, identity, parts, fabric.is_global_zero, on_record)
    run.begin(resume)
    fabric.barrier()
    stepper = Stepper(
        fabric,
        fabric.setup_module(model),
        objective,
        modules["balancer"],
        fabric.setup_optimizers(optimizer),
        Schedule(distill, total),
        config,
    )
    start, state = time.perf_counter(), run.state
    hidden = not (config.progress and fabric.is_global_zero)
    bar = tqdm(total=total, initial=state["step"], desc="training", unit="step", disable=hidden, mininterval=0.5)
    with bar, interruptible(fabric) as interrupted:
        while not state["finished"]:
            for group in _groups(fabric, batches, state["step"], config.accumulate_grad_batches, per_epoch):
                _train_step(stepper, group, run, total, per_epoch, bar)
                if average:
                    average.update_parameters(model)
                if state["step"] % per_epoch and (
                    run.minutes_since_save() > config.checkpoint_minutes or interrupted()
                ):
                    run.save()
                    _leave_if(interrupted)
            last = state["step"] == total
            if validate is not None and (last or state["step"] // per_epoch % config.validate_every == 0):
                metrics = validate(average.module if average else model) if fabric.is_global_zero else None
                _observe(run, fabric.broadcast(metrics), modules["balancer"], per_epoch)
            patience = config.early_stopping_patience
            state["finished"] = last or (patience is not None and state["stale"] >= patience)
            run.save()
            if not state["finished"]:
                _leave_if(interrupted)
    if average:
        model.load_state_dict(average.module.state_dict())
    return TrainResult(model.eval(), run.log, time.perf_counter() - start, state["step"], state["step"] < total)


def _train_step(stepper: Stepper, group: list[Batch], run: Checkpoints, total: int, per_epoch: int, bar: tqdm) -> None:
    config, step = stepper.config, run.state["step"]
    rate = learning_rate(step, total, config)
    for parameters in stepper.optimizer.param_groups:
        parameters["lr"] = rate
    clock = time.perf_counter()
    try:
        record = stepper.take(group, step)
    except TrainError as error:
        raise TrainError(f"{error} {run.describe_last()}") from None
    pace = config.batch_size * len(group) / (time.perf_counter() - clock)
    run.record({**record, "epoch": step // per_epoch, "lr": rate})
    bar.set_postfix(loss=f"{record['loss']:.3f}", phase=record["phase"], pairs_per_s=f"{pace:.0f}")
    bar.update()
    run.state["step"] += 1


def _groups(fabric: Fabric, batches: BatchSource, step: int, size: int, per_epoch: int) -> Iterator[list[Batch]]:
    """What is left of the epoch at ``step``: this process's part of ``size`` batches for each optimiser step."""
    epoch, done = divmod(step, per_epoch)
    stream = batches.epoch(epoch, done * size, fabric.global_rank, fabric.world_size)
    for _ in range(done, per_epoch):
        moved = [next(stream) for _ in range(size)]
        yield [batch.to(fabric.to_device) for batch in moved]


def _observe(run: Checkpoints, metrics: dict[str, float], balancer: Balancer, per_epoch: int) -> None:
    """Log an evaluation, and tell the balancer and early stopping of it."""
    state = run.state
    state["stale"] = 0 if metrics["r1"] > state["best"] else state["stale"] + 1
    state["best"] = max(state["best"], metrics["r1"])
    switched = balancer.observe(metrics["r1"])
    epoch = state["step"] // per_epoch - 1
    run.record({"step": state["step"], "epoch": epoch, "validation": metrics, "switched": switched})


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


@contextmanager
def interruptible(fabric: Fabric) -> Iterator[Callable[[], bool]]:
    """While it lasts, the first Ctrl-C or SIGTERM is only noted, for the step to end; the second stops at once.

    Yields a function that tells, on all processes alike, whether one was noted on any.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    def interrupted() -> bool:
        if fabric.world_size == 1:
            return bool(noted)
        return bool(fabric.all_reduce(torch.tensor(float(len(noted)), device=fabric.device), reduce_op="sum") > 0)

    main = threading.current_thread() is threading.main_thread()  # elsewhere Python has no signals
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_if(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise KeyboardInterrupt


def read_log(path: str | Path) -> list[Record]:
    """The records of a JSON-lines log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
