"""Typed settings: model presets, the training schedule, and the checks that keep impossible values out.

Every setting is a field of a frozen dataclass. A value that cannot work raises :class:`ConfigError`, which names
the key, the value and what would be right; the same errors come from Python, YAML files and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import ConfigError as ConfigError
from .checks import closest as closest
from .checks import from_mapping as from_mapping
from .checks import from_yaml as from_yaml
from .checks import require as require
from .checks import to_mapping as to_mapping


@dataclass(frozen=True)
class ImageConfig:
    """MobileNetV3-Large (Howard et al. 2019).

    Attributes:
        width: channel multiplier of every stage.
        image_size: side of the square input, in pixels.
        bn_momentum: share of each batch in the running statistics of BatchNorm. torchvision's 0.01 is right for
            long runs; a run of a few hundred steps needs 0.1.
        head: widths of fully connected layers after pooling; empty uses the pooled features themselves.
        pretrained: start from ImageNet weights where they can be had (width 1.0 only).
    """

    width: float = 1.0
    image_size: int = 224
    bn_momentum: float = 0.01
    head: tuple[int, ...] = ()
    pretrained: bool = False

    def __post_init__(self) -> None:
        require(0.1 <= self.width <= 4, "image.width", self.width, "choose a multiplier between 0.1 and 4")
        require(
            self.image_size >= 32,
            "image.image_size",
            self.image_size,
            "the five stride-2 stages need 32 pixels or more",
        )
        require(0 < self.bn_momentum <= 1, "image.bn_momentum", self.bn_momentum, "choose a share in (0, 1]")
        require(all(w > 0 for w in self.head), "image.head", self.head, "layer widths are positive")
        require(not (self.pretrained and self.width != 1.0), "image.pretrained", self.pretrained,
                f"ImageNet weights exist for width 1.0, not {self.width}")  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Lite Transformer with Long-Short Range Attention (Wu et al. 2020).

    Attributes:
        width: channels d of the residual stream; half goes to attention, half to LightConv.
        heads: heads of the attention half, and of LightConv's shared kernels.
        kernels: LightConv kernel size of each block; its length is the number of blocks.
        feed_forward: hidden width of each feed-forward layer; the paper's "flattened" form uses d.
        context_length: longest caption, in tokens.
        vocab_size: 49,408 is CLIP's byte-pair vocabulary.
        embedding_rank: rank r of a factorised token embedding (vocab x r times r x d); None stores vocab x d.
        dropout: probability applied to each residual branch.
    """

    width: int = 512
    heads: int = 8
    kernels: tuple[int, ...] = (3, 7, 15, 15, 15, 15)
    feed_forward: int = 512
    context_length: int = 32
    vocab_size: int = 49408
    embedding_rank: int | None = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.width > 0 and self.width % 2 == 0,
            "text.width",
            self.width,
            "LSRA splits it in two, so it must be even",
        )
        require(self.heads > 0 and (self.width // 2) % self.heads == 0, "text.heads", self.heads,
                f"heads must divide half the width, {self.width // 2}")  # fmt: skip
        require(len(self.kernels) > 0, "text.kernels", self.kernels, "name one kernel size per block")
        require(all(k > 0 and k % 2 == 1 for k in self.kernels), "text.kernels", self.kernels,
                "kernel sizes are odd, so that each has a centre")  # fmt: skip
        require(self.feed_forward > 0, "text.feed_forward", self.feed_forward, "use a positive width")
        require(self.context_length >= 3, "text.context_length", self.context_length, "start, one token and end need 3")
        require(self.vocab_size > 2, "text.vocab_size", self.vocab_size, "use 49408 for CLIP's vocabulary")
        require(self.embedding_rank is None or 0 < self.embedding_rank <= self.width, "text.embedding_rank",
                self.embedding_rank, f"choose 1 to {self.width}, or null for a full embedding")  # fmt: skip
        require(0 <= self.dropout < 1, "text.dropout", self.dropout, "choose a probability in [0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """A student: both encoders and the width of the shared embedding."""

    name: str = "custom"
    embed_dim: int = 512
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        require(self.embed_dim > 0, "embed_dim", self.embed_dim, "use 256 or 512")


MOBILE_TEXT = TextConfig(width=512, heads=8, kernels=(3, 7, 15, 15, 31, 31), feed_forward=512, embedding_rank=128)
PRESETS: dict[str, ModelConfig] = {
    "course": ModelConfig(
        "course", 256, ImageConfig(width=0.5, image_size=64, bn_momentum=0.1),
        TextConfig(width=128, heads=4, kernels=(3, 7, 15, 15), feed_forward=128, context_length=32, embedding_rank=24)),
    "mobile-256": ModelConfig("mobile-256", 256, ImageConfig(pretrained=True), MOBILE_TEXT),
    "mobile-512": ModelConfig("mobile-512", 512, ImageConfig(pretrained=True), MOBILE_TEXT),
    "klmobile": ModelConfig(
        "klmobile", 2048, ImageConfig(head=(1280, 1280)),
        TextConfig(width=512, heads=8, kernels=(15,) * 2 + (31,) * 4 + (63,) * 6, feed_forward=1024,
                   context_length=77, embedding_rank=None)),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The model preset called ``name``; an unknown name raises :class:`ConfigError` with the nearest ones."""
    require(name in PRESETS, "preset", name, closest(name, PRESETS))
    return PRESETS[name]


@dataclass(frozen=True)
class DistillConfig:
    """Which loss terms there are, when each begins, and how they are balanced (DESIGN: three phases).

    The term weights are priors: 0 switches a term off, and the balancer multiplies them.

    Attributes:
        task: the student's own loss on its pairs.
        original_weight, feature_weight, response_weight, similarity_weight, icl_weight: priors of the terms. Until
            the image encoder has come near the teacher, any other term that pulls as hard only slows it down.
        feature_source: distil the final embedding, or the encoders' penultimate features.
        feature_form: "cosine" is 1 - cos; "mse" is the mean squared error summed over dimensions.
        aligner: "mlp" (Linear, ReLU, Dropout 0.1, Linear), "identity", which needs equal widths, or "auto":
            identity where the widths agree, so that what is distilled is what inference uses.
        phases: start of phase 2 (feature), start of phase 3 (response), end of the temperature's descent; all
            fractions of the run (at most 1) or all steps (above 1), in order.
        ramp: a term that becomes active rises over this many steps (or this fraction of the run).
        max_temperature, min_temperature: of the response term, before phase 2 and from ``phases[2]`` on.
        balancers: strategies in order; the next one takes over when validation stops improving.
        adaptation_rate: exponential smoothing of the balancer's weights, per update.
        gradient_check_frequency: steps between updates of the balancer.
        plateau_patience: evaluations without improvement before the next balancer takes over.
    """

    task: Literal["info_nce", "siglip", "jsd"] = "info_nce"
    original_weight: float = 1.0
    feature_weight: float = 20.0
    response_weight: float = 1.0
    similarity_weight: float = 0.0
    icl_weight: float = 0.0
    feature_source: Literal["embedding", "penultimate"] = "embedding"
    feature_form: Literal["cosine", "mse"] = "cosine"
    aligner: Literal["auto", "mlp", "identity"] = "auto"
    phases: tuple[float, float, float] = (0.05, 0.5, 0.9)
    ramp: float = 0.05
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
        for key in ("original_weight", "feature_weight", "response_weight", "similarity_weight", "icl_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "weights are 0 (off) or positive")
        require(
            self.original_weight > 0,
            "original_weight",
            self.original_weight,
            "phase 1 has no other term; use a positive weight",
        )
        fractions, steps = all(0 <= p <= 1 for p in self.phases), all(p == 0 or p > 1 for p in self.phases)
        require(
            fractions or steps, "phases", self.phases, "give three fractions in [0, 1] or three step numbers above 1"
        )
        require(list(self.phases) == sorted(self.phases), "phases", self.phases, "the bounds must be in rising order")
        require(self.ramp >= 0, "ramp", self.ramp, "use 0 or more")
        require(self.max_temperature >= self.min_temperature > 0, "min_temperature", self.min_temperature,
                f"choose a positive value, at most max_temperature={self.max_temperature}")  # fmt: skip
        require(
            len(self.balancers) > 0, "balancers", self.balancers, "name at least one strategy, for example ('fixed',)"
        )
        require(0 < self.adaptation_rate <= 1, "adaptation_rate", self.adaptation_rate, "choose a share in (0, 1]")
        require(
            self.gradient_check_frequency >= 1,
            "gradient_check_frequency",
            self.gradient_check_frequency,
            "use 1 or more",
        )
        require(self.plateau_patience >= 1, "plateau_patience", self.plateau_patience, "use 1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the loop. ``precision`` and ``accelerator`` are Lightning Fabric's own names.

    A step takes ``accumulate_grad_batches`` batches of ``batch_size`` pairs, over all processes together; whatever
    their number, each pair sees all others of the step. Checkpoints are written at the end of each epoch, and within
    one when the last is ``checkpoint_minutes`` old.

    ``clip_grad_norm`` guards against explosions: a healthy norm is 1 or 2 here, and a bound that cuts into it slows
    the image encoder down.
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
    progress: bool = True

    def __post_init__(self) -> None:
        for key in ("max_epochs", "batch_size", "accumulate_grad_batches", "validate_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "use 1 or more")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "in-batch negatives need at least 2 pairs")
        for key in ("learning_rate", "clip_grad_norm", "checkpoint_minutes"):
            require(getattr(self, key) > 0, key, getattr(self, key), "use a positive number")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "use 0 or more")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "choose a fraction of the run in [0, 1)")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "choose a decay in (0, 1), or null",
        )
