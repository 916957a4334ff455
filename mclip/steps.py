"""One optimiser step in which every pair sees every other, however the batch is cut into pieces.

The terms compare each pair with all others, so their gradient is not the mean of the gradients of parts. A step
therefore joins the embeddings of all pieces and processes, and takes one loss over all of them. Of several pieces no
activations are kept: each is embedded again when the gradient comes back to it. That costs a second forward pass and
needs the memory of one piece, as in GradCache (Gao et al. 2021). Only BatchNorm still sees a piece alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mclip.balancing import Balancer, Schedule, gradient_norms
from mclip.config import TrainConfig
from mclip.objectives import Contrastive, Output
from mclip.pairs import Batch

Record = dict[str, Any]


class TrainError(RuntimeError):
    """A run that cannot go on; the message names the step and the term."""


class Student(nn.Module):
    """A model that embeds one piece; with ``again``, once more in the backward pass in place of keeping activations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Callable[[], Tensor], tokens: Tensor, seed: int, again: bool) -> Output:
        """The model's outputs for a piece, with the dropout that ``seed`` draws. Pixels are made ready when needed."""

        def embed(tokens: Tensor) -> Output:
            torch.manual_seed(seed)
            return self.model(images(), tokens)

        if not again:
            return embed(tokens)
        contexts = {"context_fn": lambda: (statistics_at_rest(self.model), nullcontext())}
        return checkpoint(embed, tokens, use_reentrant=False, preserve_rng_state=False, **contexts)


class Stepper:
    """Takes the optimiser steps of a run, and holds all that changes with them.

    ``parts`` are the weights and states, by the name that they have in a checkpoint.
    """

    def __init__(
        self, fabric: Fabric, model: nn.Module, objective: Contrastive, config: TrainConfig, total_steps: int
    ) -> None:
        self.fabric, self.objective, self.config = fabric, objective, config
        self.schedule, self.balancer = Schedule(objective.config, total_steps), Balancer(objective.config)
        modules = nn.ModuleDict({"model": model, "objective": objective, "balancer": self.balancer})
        modules.to(fabric.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(modules, config)
        self.parts = {"modules": modules, "optimizer": optimizer}
        if config.ema_decay:  # without a warm-up a short run's average would keep its random start
            self.parts["average"] = ModelEmaV3(model, config.ema_decay, use_warmup=True)
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-bit floats
        if self.scaler:
            self.parts["scaler"] = self.scaler
        self.student, self.optimizer = fabric.setup_module(Student(model)), fabric.setup_optimizers(optimizer)

    def take(self, pieces: list[Batch], step: int, rate: float) -> Record:
        """Take one step at the learning rate ``rate`` over the pairs of all ``pieces``, on all processes.

        Returns the record of its terms, weights and temperature, and of some steps the gradient norms of the terms at
        the embeddings (``pulls``). TrainError if a term or the gradient is not finite.
        """
        self.student.train()
        outputs = []
        for number, piece in enumerate(pieces):
            seed = self._seed(step, 1 + self.fabric.global_rank, number)
            outputs.append(self.student(lambda piece=piece: piece.images, piece.tokens, seed, len(pieces) > 1))
        output, batch = self._join(outputs, pieces)
        loss, record = self._loss(output, batch, step)
        self.fabric.backward(loss)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        bound = {"max_norm": self.config.clip_grad_norm, "error_if_nonfinite": False}
        if not self.fabric.clip_gradients(self.student, self.optimizer, **bound).isfinite():
            # Without a scale above 1 it is not the scale that has made the gradient too large.
            if self.scaler is None or self.scaler.get_scale() <= 1:
                raise TrainError(f"step {step}: the gradient of {' + '.join(record['terms'])} is not finite")
            record["skipped"] = True  # by the scaler, which lowers its scale for the next step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return record

    def _seed(self, *place: int) -> int:
        """A seed that is a function of the run's seed and the place alone: a resumed run needs no random state."""
        return int(np.random.SeedSequence([self.config.seed, *place]).generate_state(1, np.uint64)[0])

    def _join(self, outputs: list[Output], pieces: list[Batch]) -> tuple[Output, Batch]:
        """Outputs and teacher's rows of all pieces and processes. Scalars, such as the scale, are equal in all."""
        own = torch.tensor(sum(len(piece.tokens) for piece in pieces), device=self.fabric.device)
        counts = self.fabric.all_gather(own).reshape(-1).tolist()  # a process may hold fewer rows than another
        embeddings = [key for key, value in outputs[0].items() if value.ndim]
        names = ("index", "teacher_image", "teacher_text", "paired")
        sides = [name for name in names if getattr(pieces[0], name) is not None]
        output = {key: self._gather([output[key] for output in outputs], counts) for key in embeddings}
        batch = {key: self._gather([getattr(piece, key) for piece in pieces], counts) for key in sides}
        return outputs[0] | output, replace(pieces[0], **batch)

    def _gather(self, parts: list[Tensor], counts: list[int]) -> Tensor:
        """The rows of all parts and processes, in order of rank. Gradients flow to this process's own rows."""
        local = torch.cat(parts)
        if self.fabric.world_size == 1:
            return local
        padded = local.new_zeros(max(counts), *local.shape[1:])
        padded[: len(local)] = local.detach()
        rows = [part[:count] for part, count in zip(self.fabric.all_gather(padded), counts, strict=True)]
        if local.requires_grad:
            # DDP divides by the number of processes, each of which has the gradient of its own rows alone.
            local.register_hook(lambda gradient: gradient * self.fabric.world_size)
        rows[self.fabric.global_rank] = local
        return torch.cat(rows)

    def _loss(self, output: Output, batch: Batch, step: int) -> tuple[Tensor, Record]:
        """The scalar to minimise, and the record of what it is made of."""
        active, temperature = self.schedule.active(step), self.schedule.temperature(step)
        torch.manual_seed(self._seed(step))  # the same dropout of the aligners, and so the same loss, on all processes
        with self.fabric.autocast():
            terms = self.objective(output, batch, active, temperature)
            tensors = self.objective.student_tensors(output)
            loss, weights = self.balancer.combine(terms, active, step, tensors)
        values = {name: term.item() for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainError(f"step {step}: the term {name!r} is {value}")
        record = {"step": step, "phase": self.schedule.phase(step), "temperature": temperature, "loss": loss.item()}
        record |= {"terms": values, "weights": weights, "strategy": self.balancer.strategy}
        if step % self.objective.config.gradient_check_frequency == 0:
            record["pulls"] = gradient_norms(terms, tensors)
        # DDP waits for a gradient of every output, used or not.
        unused = sum(value.sum() for value in output.values()) if self.fabric.world_size > 1 else 0
        return loss + 0 * unused, record


def make_optimizer(modules: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.98 as CLIP); norms, biases, temperatures and balances are not decayed."""
    decayed = [p for p in modules.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in modules.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The fused form takes about a quarter of the time on a CPU, but with a scaler Fabric refuses to clip for it.
    fused = config.precision != "16-mixed"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)


@contextmanager
def statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch but keeps its running statistics, which the second pass will move."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
