"""One optimiser step in which every pair sees every other, however the batch is cut into pieces.

Contrastive and distillation terms compare each pair with all others, so their gradient is not the mean of the
gradients of parts. A step therefore embeds every piece first, joins the embeddings of all pieces and processes,
computes the loss on the whole, and sends its gradient at the embeddings back through the encoders piece by piece
(Gao et al. 2021, GradCache). One piece on one process is the usual step; more cost a second forward pass, and the
memory of one piece. Only BatchNorm still sees a piece alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from mclip.balancing import Balancer, Schedule
from mclip.config import TrainConfig
from mclip.objectives import Contrastive, Output
from mclip.pairs import Batch

Record = dict[str, Any]


class TrainError(RuntimeError):
    """A run that cannot go on; the message names the step, the term and what to change."""


@dataclass
class Stepper:
    """All that an optimiser step needs; ``model`` and ``optimizer`` as Fabric has set them up."""

    fabric: Fabric
    model: nn.Module
    objective: Contrastive
    balancer: Balancer
    optimizer: Any
    schedule: Schedule
    config: TrainConfig

    def take(self, group: list[Batch], step: int) -> Record:
        """One step over the pairs of ``group`` on all processes; the record of its terms, weights and temperature.

        Raises: TrainError: a term or the gradient is not finite.
        """
        self.model.train()
        pieces = len(group)
        with torch.no_grad() if pieces > 1 else nullcontext():
            outputs = [self._embed(group, number, step, first_pass=pieces > 1) for number in range(pieces)]
        joined, batch, own_rows = self._join(outputs, group)
        leaves = {key: value.detach().requires_grad_() for key, value in joined.items()}
        active, temperature = self.schedule.active(step), self.schedule.temperature(step)
        self._seed(step)  # every process draws the same dropout of the aligners, for the same loss
        with self.fabric.autocast():
            terms = self.objective(leaves, batch, active, temperature)
            loss, weights = self.balancer.combine(terms, active, step, self.objective.student_tensors(leaves))
        values = {name: term.item() for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainError(f"step {step}: the term {name!r} is {value}; {self._remedy()}")
        heads = [p for module in (self.objective, self.balancer) for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [*leaves.values(), *heads], allow_unused=True)
        at_leaves = dict(zip(leaves, found, strict=False))
        self._pull_back(group, outputs, at_leaves, own_rows, step, list(zip(heads, found[len(leaves) :], strict=True)))
        norm = self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=self.config.clip_grad_norm, error_if_nonfinite=False
        )
        if not torch.isfinite(norm):
            raise TrainError(f"step {step}: the gradient of {' + '.join(active)} is not finite; {self._remedy()}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step,
            "phase": self.schedule.phase(step),
            "temperature": temperature,
            "loss": loss.item(),
            "terms": values,
            "weights": weights,
            "strategy": self.balancer.strategy,
        }

    def _embed(self, group: list[Batch], number: int, step: int, first_pass: bool = False) -> Output:
        self._seed(step, 1 + self.fabric.global_rank, number)  # the second pass repeats the first one's dropout
        with statistics_at_rest(self.model) if first_pass else nullcontext():
            return self.model(group[number].images, group[number].tokens)

    def _seed(self, *place: int) -> None:
        """Randomness as a function of seed and step alone: a resumed run needs no random state."""
        state = np.random.SeedSequence([self.config.seed, *place]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def _join(self, outputs: list[Output], group: list[Batch]) -> tuple[Output, Batch, slice]:
        """Outputs and teacher's rows of all pieces and processes; the rows that are this process's own."""
        keys = [key for key, value in outputs[0].items() if value.ndim]
        local = {key: torch.cat([output[key].detach() for output in outputs]) for key in keys}
        sides = {
            key: torch.cat([getattr(batch, key) for batch in group])
            for key in ("index", "teacher_image", "teacher_text")
            if getattr(group[0], key) is not None
        }
        counts = self._gather_counts(len(local[keys[0]]))
        start = sum(counts[: self.fabric.global_rank])
        joined = {key: self._gather(value, counts) for key, value in local.items()}
        scalars = {key: value.detach() for key, value in outputs[0].items() if not value.ndim}
        batch = replace(group[0], **{key: self._gather(value, counts) for key, value in sides.items()})
        return joined | scalars, batch, slice(start, start + counts[self.fabric.global_rank])

    def _gather_counts(self, count: int) -> list[int]:
        if self.fabric.world_size == 1:
            return [count]
        return self.fabric.all_gather(torch.tensor(count, device=self.fabric.device)).tolist()

    def _gather(self, local: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes in order of rank; a process may hold fewer than another."""
        if self.fabric.world_size == 1:
            return local
        padded = local.new_zeros(max(counts), *local.shape[1:])
        padded[: len(local)] = local
        return torch.cat([rows[:n] for rows, n in zip(self.fabric.all_gather(padded), counts, strict=True)])

    def _pull_back(
        self,
        group: list[Batch],
        outputs: list[Output],
        gradients: dict[str, Tensor | None],
        own_rows: slice,
        step: int,
        heads: list[tuple[nn.Parameter, Tensor | None]],
    ) -> None:
        """Backward through the encoders, from the loss's gradients at what they returned."""
        world, start = self.fabric.world_size, own_rows.start
        for number in range(len(group)):
            last = number == len(group) - 1
            with self.fabric.no_backward_sync(self.model) if world > 1 and not last else nullcontext():
                output = outputs[0] if len(group) == 1 else self._embed(group, number, step)
                pulls = []
                for key, value in output.items():
                    gradient = gradients[key]
                    if value.ndim:
                        rows = slice(start, start + len(value))
                        # DDP divides by the number of processes, each of which holds its own pairs alone.
                        gradient = torch.zeros_like(value) if gradient is None else gradient[rows] * world
                    elif gradient is None or not last:
                        gradient = torch.zeros_like(value)
                    pulls.append((value * gradient.to(value.dtype)).sum())
                start += len(output["image_features"])
                if last:
                    pulls += [(head * gradient).sum() for head, gradient in heads if gradient is not None]
                self.fabric.backward(torch.stack(pulls).sum())

    def _remedy(self) -> str:
        return f"lower learning_rate={self.config.learning_rate}."


@contextmanager
def statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch but keeps its running statistics, which the second pass will move."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked
