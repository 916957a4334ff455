"""When each loss term takes part, at which temperature, and how much it weighs.

:class:`Schedule` answers the first two from the step alone, :class:`Balancer` the third from the terms themselves. Both
know terms by name: "original" is the student's own loss; "feature", "similarity", "response" and "icl" have a teacher.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mclip.config import DistillConfig, Strategy, require

Terms = Mapping[str, Tensor]  # scalar losses by name
Factors = Mapping[str, float]  # weights, ramps or sizes by name
BEGINS_WITH = {
    "original": "original",
    "feature": "feature",
    "similarity": "feature",
    "response": "response",
    "icl": "response",
}
"""All terms, and the one with which each begins."""
STRATEGIES = get_args(Strategy)
# A measured size counts as at least this share of the largest: factors differ by 1/FLOOR at the most.
FLOOR = 1e-3
# Log-variances are kept in this range: a loss near 0 would otherwise send its weight to infinity.
LOG_VARIANCE_RANGE = (math.log(FLOOR), -math.log(FLOOR))


def _priors(config: DistillConfig) -> dict[str, float]:
    """The prior weight of each term that is switched on."""
    weights = {name: getattr(config, f"{name}_weight") for name in BEGINS_WITH}
    return {name: weight for name, weight in weights.items() if weight > 0}


class Schedule:
    """Phases, ramps and temperature of a run of ``total_steps`` steps: functions of the step, which counts from 0."""

    def __init__(self, config: DistillConfig, total_steps: int) -> None:
        require(total_steps >= 1, "total_steps", total_steps, "a run has at least one step")
        # Fractions of the run up to 1, and numbers of steps above.
        bounds = [round(b * total_steps if b <= 1 else b) for b in (*config.phases, config.ramp)]
        self.phase_starts, self.descent_end, self.ramp = (0, *bounds[:2]), bounds[2], bounds[3]
        self.max_temperature, self.min_temperature = config.max_temperature, config.min_temperature
        self.phases = {name: 1 + config.order.index(BEGINS_WITH[name]) for name in _priors(config)}
        self.term_starts = {name: self.phase_starts[phase - 1] for name, phase in self.phases.items()}
        if late := " and ".join(name for name, start in self.term_starts.items() if start >= total_steps):
            message = f"phases={config.phases}: {late} would never start in a run of {total_steps} steps"
            warnings.warn(message, stacklevel=2)

    def phase(self, step: int) -> int:
        """The phase of ``step`` (1, 2 or 3), by the terms that take part: without a teacher always 1."""
        return max(self.phases[name] for name in self.active(step))

    def temperature(self, step: int) -> float:
        """The response term's T: max until phase 2, then linear to min at ``phases[2]``, then constant."""
        if step >= self.descent_end:
            return self.min_temperature
        start = self.phase_starts[1]
        share = max(0, step - start) / max(1, self.descent_end - start)
        return self.max_temperature + share * (self.min_temperature - self.max_temperature)

    def active(self, step: int) -> dict[str, float]:
        """The terms that take part in ``step``, each with its ramp factor, up to 1, which phase 1 has at once."""
        age = {name: step - start + 1 for name, start in self.term_starts.items() if step >= start}
        ramps = {name: min(1.0, n / max(1, self.ramp)) for name, n in age.items()}
        return {name: 1.0 if self.phases[name] == 1 else ramp for name, ramp in ramps.items()}


def gradient_norms(terms: Terms, embeddings: Sequence[Tensor]) -> dict[str, float]:
    """The gradient norm of each scalar term with respect to all ``embeddings`` together; no encoder is run backward."""
    inputs, norms = [embedding for embedding in embeddings if embedding.requires_grad], []
    for name, term in terms.items():
        usable = inputs if term.requires_grad else []
        gradients = torch.autograd.grad(term, usable, retain_graph=True, allow_unused=True) if usable else ()
        parts = [gradient.float().norm() for gradient in gradients if gradient is not None]
        if not parts:
            raise ValueError(f"{name!r} has no gradient at the embeddings: pass all that it is computed from")
        norms.append(torch.stack(parts).norm())
    return dict(zip(terms, torch.stack(norms).tolist(), strict=True))


class Balancer(nn.Module):
    """Weighs the active terms, by a strategy that changes when validation stops improving.

    weight_i = n * prior_i * ramp_i * factor_i / sum_j(prior_j * ramp_j * factor_j) over the n active terms: positive,
    with sum n, and 1 for a term alone. The strategies differ in the factor:

    * fixed: 1.
    * magnitude: mean(|L|) / |L_i|, so that terms are equally large.
    * gradient_norm: mean(norm) / norm_i, so that terms pull equally hard at the embeddings (Chen et al. 2018).
    * uncertainty: exp(-s_i), where s_i is a learned log-variance (Kendall et al. 2018).

    Measured factors are averaged over time in logarithms, with ``adaptation_rate``, at every
    ``gradient_check_frequency``-th step. Prior and ramp stay outside of the average, and a new term enters at the
    geometric mean of the factors. So neither a ramp that begins near 0 nor a late start can hold a term down.
    """

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config, self.strategies, self.priors = config, config.balancers, _priors(config)
        learned = self.priors if "uncertainty" in self.strategies else ()
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in learned})
        self.log_factors: dict[str, float] = {}
        self.index, self.best, self.stale = 0, -math.inf, 0

    @property
    def strategy(self) -> str:
        return self.strategies[self.index]

    def combine(self, terms: Terms, active: Factors, step: int, embeddings: Sequence[Tensor]) -> tuple[Tensor, Factors]:
        """The scalar, sum w_i L_i or Kendall's sum, and the weights w_i; arguments and errors as in :meth:`weights`."""
        weights = self.weights(terms, active, step, embeddings)
        if self.strategy == "uncertainty" and len(active) > 1:
            parts = []  # Kendall's form, which trains the s_i
            for name, ramp in active.items():
                s = self.log_variances[name]
                parts.append(self.priors[name] * ramp * ((-s).exp() * terms[name] + s / 2))
        else:
            parts = [weight * terms[name] for name, weight in weights.items()]
        return torch.stack(parts).sum(), weights

    def weights(self, terms: Terms, active: Factors, step: int, embeddings: Sequence[Tensor]) -> Factors:
        """The weight of each active term; updates the averages if ``step`` is one that measures.

        ``terms`` are scalar losses with their graph, ``active`` is from :meth:`Schedule.active`, and ``embeddings`` are
        the student's tensors that the terms are computed from. ValueError for an active term that was not delivered.
        """
        if missing := sorted(active.keys() - terms.keys()):
            raise ValueError(f"term {missing[0]!r} is active, but the objective delivered only {sorted(terms)}")
        if len(active) == 1:
            return dict.fromkeys(active, 1.0)
        for name in active:
            self.log_factors.setdefault(name, 0.0)  # the geometric mean, since _update keeps the mean at 0
        if self.strategy == "uncertainty":
            with torch.no_grad():
                learned = [self.log_variances[name].clamp_(*LOG_VARIANCE_RANGE) for name in active]
            logs = dict(zip(active, (-torch.stack(learned)).tolist(), strict=True))
        else:
            if step % self.config.gradient_check_frequency == 0:
                self._update({name: terms[name] for name in active}, embeddings)
            logs = self.log_factors
        raw = {name: self.priors[name] * ramp * math.exp(logs[name]) for name, ramp in active.items()}
        return {name: len(raw) * value / sum(raw.values()) for name, value in raw.items()}

    def observe(self, metric: float) -> bool:
        """Count one evaluation, by a metric where higher is better; True if the next strategy takes over, in turns."""
        self.best, self.stale = (metric, 0) if metric > self.best else (self.best, self.stale + 1)
        if self.stale < self.config.plateau_patience or len(self.strategies) == 1:
            return False
        self.index, self.stale = (self.index + 1) % len(self.strategies), 0
        return True

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict()`` holds beside the log-variances."""
        return {name: deepcopy(getattr(self, name)) for name in ("index", "best", "stale", "log_factors")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        vars(self).update(deepcopy(state))

    def _update(self, terms: Terms, embeddings: Sequence[Tensor]) -> None:
        """Move each log factor towards minus the logarithm of its term's size, keeping their mean."""
        sizes = dict.fromkeys(terms, 1.0)
        if self.strategy == "gradient_norm":
            sizes = gradient_norms(terms, embeddings)
        elif self.strategy == "magnitude":
            sizes = {name: abs(term.item()) for name, term in terms.items()}
        # A size that is 0 or not finite leaves the factor of its term alone.
        sizes = {name: size for name, size in sizes.items() if math.isfinite(size) and size > 0}
        floor = FLOOR * max(sizes.values(), default=0.0)
        logs = {name: -math.log(max(size, floor)) for name, size in sizes.items()}
        shift = sum(self.log_factors[name] - log for name, log in logs.items()) / max(1, len(logs))
        for name, log in logs.items():
            self.log_factors[name] += self.config.adaptation_rate * (log + shift - self.log_factors[name])
