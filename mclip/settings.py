"""Typed settings of a run: loss terms, phases and balancers; optimiser and loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import require


@dataclass(frozen=True)
class DistillConfig:
    """Loss terms, the phases in which they begin, and how they are balanced.

    The weights of the terms are priors: 0 switches a term off, and the balancer multiplies them. Until the image
    encoder has come near the teacher, any other term that pulls as hard as "feature" only slows it down.

    Attributes:
        task: the student's own loss on its pairs.
        original_weight: prior of that loss.
        feature_weight: prior of the distance from the teacher's embeddings.
        img_distill_weight: share of the pictures in "feature".
        txt_distill_weight: share of the captions in "feature".
        response_weight: prior of the divergence from the teacher's softened similarities.
        similarity_weight: prior of the squared difference of the cosine matrices.
        icl_weight: prior of the interactive contrastive term.
        feature_source: distil the final embedding, or the encoders' penultimate features.
        feature_form: "cosine" is 1 - cos; "mse" is the mean squared error summed over dimensions.
        aligner: "mlp" (Linear, ReLU, Dropout 0.1, Linear), "identity", which needs equal widths, or "auto":
            identity where the widths agree, so that what is distilled is what inference uses.
        online_teacher: embed each batch anew while training, in place of cached targets; slower, but every crop is new.
        phases: start of phase 2 (feature), start of phase 3 (response), end of the temperature's descent; all
            fractions of the run (at most 1) or all steps (above 1), in order.
        ramp: a term that becomes active rises over this many steps (or this fraction of the run).
        max_temperature: of the response term, before phase 2.
        min_temperature: of the response term, from the last of the phases' bounds on.
        balancers: strategies in order; the next one takes over when validation stops improving.
        adaptation_rate: exponential smoothing of the balancer's weights, per update.
        gradient_check_frequency: steps between updates of the balancer.
        plateau_patience: evaluations without improvement before the next balancer takes over.
    """

    task: Literal["info_nce", "siglip", "jsd"] = "info_nce"
    original_weight: float = 1.0
    feature_weight: float = 20.0
    img_distill_weight: float = 1.0
    txt_distill_weight: float = 1.0
    response_weight: float = 1.0
    similarity_weight: float = 0.0
    icl_weight: float = 0.0
    feature_source: Literal["embedding", "penultimate"] = "embedding"
    feature_form: Literal["cosine", "mse"] = "cosine"
    aligner: Literal["auto", "mlp", "identity"] = "auto"
    online_teacher: bool = False
    phases: tuple[float, float, float] = (0.02, 0.5, 0.9)
    ramp: float = 0.02
    max_temperature: float = 8.0
    min_temperature: float = 4.0
    balancers: tuple[Literal["fixed", "magnitude", "gradient_norm", "uncertainty"], ...] = (
        "gradient_norm",
        "magnitude",
    )
    adaptation_rate: float = 0.1
    gradient_check_frequency: int = 10
    plateau_patience: int = 3

    def __post_init__(self) -> None:
        def check(key: str, good: bool, remedy: str) -> None:
            require(good, key, getattr(self, key), remedy)

        for key in ("original", "feature", "img_distill", "txt_distill", "response", "similarity", "icl"):
            check(f"{key}_weight", getattr(self, f"{key}_weight") >= 0, "weights are 0 (off) or positive")
        check("original_weight", self.original_weight > 0, "phase 1 has no other term; use a positive weight")
        both = self.img_distill_weight + self.txt_distill_weight
        check("img_distill_weight", both > 0, "one of img_distill_weight and txt_distill_weight must be positive; "
              "feature_weight=0 switches the term off")  # fmt: skip
        fractions, steps = all(0 <= p <= 1 for p in self.phases), all(p == 0 or p > 1 for p in self.phases)
        check("phases", fractions or steps, "give three fractions in [0, 1] or three step numbers above 1")
        check("phases", list(self.phases) == sorted(self.phases), "the bounds must be in rising order")
        check("ramp", self.ramp >= 0, "use 0 or more")
        cooling = self.max_temperature >= self.min_temperature > 0
        check("min_temperature", cooling, f"choose a positive value, at most max_temperature={self.max_temperature}")
        check("balancers", len(self.balancers) > 0, "name at least one strategy, for example ('fixed',)")
        check("adaptation_rate", 0 < self.adaptation_rate <= 1, "choose a share in (0, 1]")
        for key in ("gradient_check_frequency", "plateau_patience"):
            check(key, getattr(self, key) >= 1, "use 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the loop.

    A step takes ``accumulate_grad_batches`` batches of ``batch_size`` pairs, over all processes together; whatever
    their number, each pair sees all others of the step.

    Attributes:
        max_epochs: passes over the pictures.
        batch_size: pairs that are embedded together, over all processes.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW, on matrices.
        warmup: share of the run in which the learning rate rises.
        clip_grad_norm: bound of the gradient's norm, against explosions: a healthy norm is 1 or 2 here, and a bound
            that cuts into it slows the image encoder down.
        accumulate_grad_batches: batches of one step, with all their pairs as in-batch negatives.
        ema_decay: keep a moving average of the weights with this decay, and use it.
        early_stopping_patience: evaluations without improvement before training stops.
        validate_every: epochs between evaluations.
        checkpoint_minutes: minutes between checkpoints within an epoch; its end always writes one.
        seed: of weights, order, captions and dropout.
        accelerator: Lightning Fabric's name: auto, cpu, gpu.
        precision: Lightning Fabric's name: 32-true, bf16-mixed, 16-mixed.
        crop_scale: random crops of the pictures keep at least this share of the area; 1 shows the whole picture.
        views: different crops of a picture in the whole run, taken in turns; 0: a new one in each epoch. Whole
            pictures have none.
        progress: show a progress bar.
    """

    max_epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip_grad_norm: float = 10.0
    accumulate_grad_batches: int = 1
    ema_decay: float | None = None
    early_stopping_patience: int | None = None
    validate_every: int = 1
    checkpoint_minutes: float = 10.0
    seed: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"
    crop_scale: float = 1.0
    views: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        def check(key: str, good: bool, remedy: str) -> None:
            require(good, key, getattr(self, key), remedy)

        for key in ("max_epochs", "batch_size", "accumulate_grad_batches", "validate_every"):
            check(key, getattr(self, key) >= 1, "use 1 or more")
        check("batch_size", self.batch_size >= 2, "in-batch negatives need at least 2 pairs")
        for key in ("learning_rate", "clip_grad_norm", "checkpoint_minutes"):
            check(key, getattr(self, key) > 0, "use a positive number")
        check("weight_decay", self.weight_decay >= 0, "use 0 or more")
        check("crop_scale", 0 < self.crop_scale <= 1, "choose a share of the area in (0, 1]")
        check("views", self.views >= 0, "use 0 or more")
        check("warmup", 0 <= self.warmup < 1, "choose a fraction of the run in [0, 1)")
        check("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "choose a decay in (0, 1), or null")
