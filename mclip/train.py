"""One training loop for everything: the base student, distillation, the plain CLIP and the teacher.

A batch flows one way: pairs -> tensors (+ cached teacher embeddings) -> model -> named loss terms -> schedule and
balancer -> one scalar -> step. Lightning Fabric moves it to the device and the precision asked for.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from .balancing import Schedule, make_balancer
from .checkpoints import Checkpoints, run_identity
from .config import DistillConfig, TrainConfig, require
from .data import Batch, BatchSource
from .objectives import Contrastive

Record = dict[str, Any]


class TrainError(RuntimeError):
    """A run that cannot go on; the message names the step, the term and the last good checkpoint."""


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


class _Step(nn.Module):
    """Model, objective and balancer as one module, so that precision and devices apply to all of a step."""

    def __init__(self, model: nn.Module, objective: Contrastive, distill: DistillConfig) -> None:
        super().__init__()
        self.model, self.objective, self.balancer = model, objective, make_balancer(distill)

    def forward(
        self, batch: Batch, active: dict[str, float], temperature: float, step: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        output = self.model(batch.images, batch.tokens)
        terms = self.objective(output, batch, active, temperature)
        loss, weights = self.balancer.combine(terms, active, step, self.objective.student_tensors(output))
        return loss, terms, weights


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0, per step (Loshchilov & Hutter 2017): a function of the step alone."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98 as CLIP); norms, biases, temperatures and balances are not decayed."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: on a CPU about a quarter of the time of the usual form, which a small model feels in every step.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


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

    Args:
        model: anything whose ``forward(images, tokens)`` returns open_clip's dict of features and scale.
        validate: from the model to metrics in percent; higher ``r1`` is better. Called every
            ``validate_every`` epochs; it drives the balancers and early stopping.
        resume: go on from the newest checkpoint in ``out_dir``; a finished run is returned at once.
        on_record: called with each record of the log, for live curves.

    Raises:
        TrainError: a term is not finite. ConfigError: the checkpoint has other settings. OSError: no writing there.
    """
    distill = objective.config
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    seed_everything(config.seed, verbose=False)
    step_module = _Step(model.to(memory_format=torch.channels_last), objective, distill)
    optimizer = make_optimizer(step_module, config)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        if config.ema_decay
        else None
    )
    runner, fabric_optimizer = fabric.setup(step_module, optimizer)
    per_epoch = len(batches) // config.accumulate_grad_batches
    require(
        per_epoch > 0,
        "accumulate_grad_batches",
        config.accumulate_grad_batches,
        f"an epoch has only {len(batches)} batches",
    )
    total = per_epoch * config.max_epochs
    schedule = Schedule(distill, total)
    store = Checkpoints(out_dir, run_identity(model, batches, config, distill))
    parts = {"step_module": step_module, "optimizer": optimizer} | ({"average": average} if average else {})
    state = {"epoch": 0, "best": -math.inf, "stale": 0, "finished": False}
    log = store.restore(parts, state) if resume else store.clear()
    start = time.perf_counter()
    step = state["epoch"] * per_epoch
    bar = tqdm(total=total, initial=step, desc="training", unit="step", disable=not config.progress, mininterval=0.5)

    def write(record: Record) -> None:
        log.append(record)
        store.log(record)
        if on_record is not None:
            on_record(record)

    while not state["finished"]:
        clock, seen = time.perf_counter(), 0
        for group in _groups(fabric, batches, state["epoch"], config.accumulate_grad_batches, per_epoch):
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(step, total, config)
            record = _step(fabric, runner, fabric_optimizer, group, schedule, step, config, store)
            if average:
                average.update_parameters(model)
            seen += sum(len(batch.images) for batch in group)
            write({**record, "epoch": state["epoch"], "lr": optimizer.param_groups[0]["lr"]})
            bar.set_postfix(
                loss=f"{record['loss']:.3f}",
                phase=record["phase"],
                pairs_per_s=f"{seen / (time.perf_counter() - clock):.0f}",
            )
            bar.update()
            step += 1
        state["epoch"] += 1
        last = state["epoch"] == config.max_epochs
        if validate is not None and (last or state["epoch"] % config.validate_every == 0):
            _observe(write, validate(average.module if average else model), step, step_module, state)
        patience = config.early_stopping_patience
        state["finished"] = last or (patience is not None and state["stale"] >= patience)
        if state["finished"] or state["epoch"] % config.checkpoint_every == 0:
            store.save(parts, state)
    bar.close()
    if average:
        model.load_state_dict(average.module.state_dict())
    return TrainResult(model.eval(), log, time.perf_counter() - start, step, state["epoch"] < config.max_epochs)


def _groups(fabric: Fabric, batches: BatchSource, epoch: int, size: int, count: int) -> Iterator[list[Batch]]:
    """The epoch's batches on the device, ``size`` for each optimiser step."""
    stream = batches.epoch(epoch)
    for _ in range(count):
        moved = [next(stream) for _ in range(size)]
        yield [
            Batch(**{key: value if value is None else fabric.to_device(value) for key, value in vars(b).items()})
            for b in moved
        ]


def _step(
    fabric: Fabric,
    runner: nn.Module,
    optimizer: Any,
    group: list[Batch],
    schedule: Schedule,
    step: int,
    config: TrainConfig,
    store: Checkpoints,
) -> Record:
    """One optimiser step over a group of batches; the record of its terms, weights and temperature."""
    runner.train()
    active, temperature = schedule.active(step), schedule.temperature(step)
    sums: dict[str, float] = dict.fromkeys(active, 0.0)
    total = 0.0
    for batch in group:
        loss, terms, weights = runner(batch, active, temperature, step)
        values = {name: term.item() for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainError(
                    f"step {step}: the term {name!r} is {value}; lower learning_rate={config.learning_rate}. "
                    f"{store.describe_last()}"
                )
            sums[name] += value / len(group)
        fabric.backward(loss / len(group))
        total += loss.item() / len(group)
    norm = fabric.clip_gradients(runner, optimizer, max_norm=config.clip_grad_norm, error_if_nonfinite=False)
    if not torch.isfinite(norm):
        raise TrainError(
            f"step {step}: the gradient of {' + '.join(active)} is not finite; lower "
            f"learning_rate={config.learning_rate}. {store.describe_last()}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step,
        "phase": schedule.phase(step),
        "temperature": temperature,
        "loss": total,
        "terms": sums,
        "weights": weights,
        "strategy": runner.balancer.strategy,
    }


def _observe(
    write: Callable[[Record], None], metrics: dict[str, float], step: int, module: _Step, state: dict[str, Any]
) -> None:
    """Log an evaluation, and tell the balancer and early stopping of it."""
    improved = metrics["r1"] > state["best"]
    state["stale"] = 0 if improved else state["stale"] + 1
    state["best"] = max(state["best"], metrics["r1"])
    switched = module.balancer.observe(metrics["r1"])
    write({"step": step, "epoch": state["epoch"] - 1, "validation": metrics, "switched": switched})


def read_log(path: str | Path) -> list[Record]:
    """The records of a JSON-lines log."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
