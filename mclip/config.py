"""Every setting of the course: the student's presets, training, distillation and profiles, and how they are checked.

A setting that cannot work raises :class:`ConfigError`, whether it comes from Python, a YAML file or the command line.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml

SHIPPED = "scenes"  # the name of the teacher that ships with the course, which learned from drawn scenes
Term = Literal["original", "feature", "response"]
Strategy = Literal["fixed", "magnitude", "gradient_norm", "uncertainty"]
Config = TypeVar("Config")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and what would be right."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise :class:`ConfigError` naming ``key``, ``value`` and ``remedy`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r} cannot work: {remedy}{'' if remedy.endswith('?') else '.'}")


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the names nearest to ``name``, for error messages."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known names: {', '.join(known)}"


def from_mapping(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Build the dataclass ``kind`` from ``values``; unknown keys and wrong types raise :class:`ConfigError`."""
    require(isinstance(values, Mapping), prefix.rstrip(".: ") or kind.__name__, values, "give a mapping of settings")
    hints = {key: hint for key, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}
    for key, value in values.items():
        require(key in hints, f"{prefix}{key}", value, f"no such setting of {kind.__name__}; {closest(key, hints)}")
    return kind(**{key: _typed(value, hints[key], prefix + key) for key, value in values.items()})


def _typed(value: Any, expected: Any, key: str) -> Any:
    """``value`` as ``expected`` (int is a float, a list is a tuple, a mapping is a dataclass), or ConfigError."""
    origin, arguments = get_origin(expected), get_args(expected)
    if is_dataclass(expected):
        return from_mapping(cast(type, expected), value, key + ".")
    if origin is Literal:
        require(value in arguments, key, value, closest(value, map(str, arguments)))
        return value
    if origin is types.UnionType:  # of one type and None
        return None if value is None else _typed(value, arguments[0], key)
    if origin is tuple:
        require(isinstance(value, list | tuple), key, value, "give a list")
        inner = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        require(len(inner) == len(value), key, value, f"give exactly {len(inner)} values")
        return tuple(_typed(v, t, key) for v, t in zip(value, inner, strict=True))
    if expected is float and type(value) is int:
        return float(value)
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if expected is float and isinstance(value, str) else ""
    remedy = f"expected {expected.__name__}, got {type(value).__name__}{hint}"
    require(type(value) is expected, key, value, remedy)  # not isinstance: a bool is no int here
    return value


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A sentence for each setting in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} was {old!r} and is now {new!r}"]


class Settings:
    """What all dataclasses of settings share: checks of fields, called from ``__post_init__``."""

    PREFIX: ClassVar[str] = ""

    def check(self, key: str, good: bool, remedy: str) -> None:
        """ConfigError, naming the field ``key``, its value and ``remedy``, unless ``good``."""
        require(good, self.PREFIX + key, getattr(self, key), remedy)

    def choices(self) -> None:
        """ConfigError for the first field whose type lists its values, and that has another."""
        for key, hint in get_type_hints(type(self)).items():
            if "Literal" in str(hint):
                _typed(getattr(self, key), hint, self.PREFIX + key)

    def at_least(self, bound: float, *keys: str) -> None:
        """ConfigError for the first of the fields ``keys`` that is below ``bound``."""
        for key in keys:
            self.check(key, getattr(self, key) >= bound, f"use {bound} or more")


@dataclass(frozen=True)
class ImageConfig(Settings):
    """MobileNetV3-Large (Howard et al. 2019)."""

    PREFIX = "image."
    width: float = 1.0  # channel multiplier of every stage
    image_size: int = 224  # side of the square input, in pixels
    bn_momentum: float = 0.01  # share of a batch in BatchNorm's running statistics; a run of 500 steps needs 0.1
    head: tuple[int, ...] = ()  # widths of fully connected layers after pooling; empty uses the pooled features
    pretrained: bool = False  # training starts from ImageNet weights, which exist for width 1.0

    def __post_init__(self) -> None:
        self.check("width", 0.1 <= self.width <= 4, "choose a multiplier between 0.1 and 4")
        self.check("image_size", self.image_size >= 32, "the five stride-2 stages need 32 pixels or more")
        self.check("bn_momentum", 0 < self.bn_momentum <= 1, "choose a share in (0, 1]")
        self.check("head", all(w > 0 for w in self.head), "layer widths are positive")
        available = not self.pretrained or self.width == 1.0
        self.check("pretrained", available, f"ImageNet weights exist for width 1.0, not {self.width}")


@dataclass(frozen=True)
class TextConfig(Settings):
    """Lite Transformer with Long-Short Range Attention (Wu et al. 2020)."""

    PREFIX = "text."
    width: int = 512  # channels d of the residual stream; half goes to attention, half to LightConv
    heads: int = 8  # of the attention half, and of LightConv's shared kernels
    kernels: tuple[int, ...] = (3, 7, 15, 15, 15, 15)  # LightConv kernel size of each block
    feed_forward: int = 512  # hidden width of each feed-forward layer; the paper's "flattened" form uses d
    context_length: int = 32  # longest caption, in tokens
    vocab_size: int = 49408  # of CLIP's byte-pair vocabulary
    embedding_rank: int | None = 128  # rank r of a factorised embedding (vocab x r times r x d); None stores vocab x d
    dropout: float = 0.0  # probability applied to each residual branch

    def __post_init__(self) -> None:
        half, rank = self.width // 2, self.embedding_rank
        self.check("width", half > 0 and self.width % 2 == 0, "LSRA splits it in two, so it must be even")
        self.check("heads", self.heads > 0 and half % self.heads == 0, f"heads must divide half the width, {half}")
        odd = len(self.kernels) > 0 and all(k > 0 and k % 2 == 1 for k in self.kernels)
        self.check("kernels", odd, "name one odd kernel size per block, so that each has a centre")
        self.at_least(1, "feed_forward")
        self.at_least(3, "context_length")  # start, one token and end
        self.at_least(49408, "vocab_size")  # the tokenizer's
        remedy = f"choose 1 to {self.width}, or null for a full embedding"
        self.check("embedding_rank", rank is None or 0 < rank <= self.width, remedy)
        self.check("dropout", 0 <= self.dropout < 1, "choose a probability in [0, 1)")


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A student: both encoders and the width of the shared embedding."""

    name: str = "custom"
    embed_dim: int = 512
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        self.at_least(1, "embed_dim")


_STORED = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
PRESETS = {
    name: from_mapping(ModelConfig, {"name": name, **each}, f"{name}.") for name, each in _STORED["presets"].items()
}


@dataclass(frozen=True)
class DistillConfig(Settings):
    """Loss terms, the phases in which they begin, and how they are balanced.

    The weights of the terms are priors: 0 switches a term off, and the balancer multiplies them. In ``order``,
    similarity begins with feature, and icl with response.
    """

    task: Literal["info_nce", "siglip", "jsd"] = "info_nce"  # the student's own loss on its pairs
    original_weight: float = 1.0  # prior of that loss
    feature_weight: float = 1.0  # prior of the distance from the teacher's embeddings
    img_distill_weight: float = 1.0  # share of the pictures in "feature"
    txt_distill_weight: float = 1.0  # share of the captions in "feature"
    response_weight: float = 1.0  # prior of the divergence from the teacher's softened similarities
    similarity_weight: float = 0.0  # prior of the squared difference of the cosine matrices
    icl_weight: float = 1.0  # prior of the interactive contrastive term
    feature_source: Literal["embedding", "penultimate"] = "embedding"  # what "feature" and "icl" align with the teacher
    feature_form: Literal["cosine", "mse"] = "cosine"  # 1 - cos, or the squared error summed over dimensions
    aligner: Literal["auto", "mlp", "identity"] = "auto"  # auto: identity; cached targets of another width are fitted
    online_teacher: bool = False  # embed each batch anew, in place of cached targets: slower, but every crop is new
    order: tuple[Term, Term, Term] = ("feature", "response", "original")  # the term that begins in each phase
    phases: tuple[float, float, float] = (0.5, 0.7, 0.9)  # phases 2 and 3, end of cooling; shares (<= 1) or steps
    ramp: float = 0.02  # a term that becomes active rises over this many steps (or this fraction of the run)
    max_temperature: float = 4.0  # of the response term, before phase 2
    min_temperature: float = 1.0  # of the response term, from the last of the phases' bounds on
    balancers: tuple[Strategy, ...] = ("magnitude",)  # the next one when validation stops improving
    adaptation_rate: float = 0.1  # exponential smoothing of the balancer's weights, per update
    gradient_check_frequency: int = 10  # steps between updates of the balancer
    plateau_patience: int = 3  # evaluations without improvement before the next balancer takes over

    def __post_init__(self) -> None:
        self.choices()
        for key, value in vars(self).items():
            self.check(key, not key.endswith("_weight") or value >= 0, "weights are 0 (off) or positive")
        self.check("order", len(set(self.order)) == 3, f"give {', '.join(get_args(Term))} in any order")
        first = f"{self.order[0]}_weight"
        self.check(first, getattr(self, first) > 0, "phase 1 needs it; use a positive weight, or another order")
        remedy = "it or txt_distill_weight must be positive; feature_weight=0 switches the term off"
        self.check("img_distill_weight", self.img_distill_weight + self.txt_distill_weight > 0, remedy)
        alike = all(0 <= p <= 1 for p in self.phases) or all(p == 0 or p > 1 for p in self.phases)
        self.check("phases", alike, "give three fractions in [0, 1] or three step numbers above 1")
        self.check("phases", list(self.phases) == sorted(self.phases), "the bounds must be in rising order")
        self.at_least(0, "ramp")
        remedy = f"choose a positive value, at most max_temperature={self.max_temperature}"
        self.check("min_temperature", self.max_temperature >= self.min_temperature > 0, remedy)
        self.check("balancers", len(self.balancers) > 0, "name at least one strategy, for example ('fixed',)")
        self.check("adaptation_rate", 0 < self.adaptation_rate <= 1, "choose a share in (0, 1]")
        self.at_least(1, "gradient_check_frequency", "plateau_patience")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The optimiser and the loop."""

    max_epochs: int = 10  # passes over the pictures
    batch_size: int = 128  # pairs that are embedded together, over all processes
    learning_rate: float = 1e-3  # peak of the schedule
    weight_decay: float = 0.05  # of AdamW, on matrices
    warmup: float = 0.05  # share of the run in which the learning rate rises
    clip_grad_norm: float = 10.0  # bound of the gradient's norm, against explosions: a healthy norm is 1 or 2 here
    accumulate_grad_batches: int = 1  # batches of one step, with all their pairs as in-batch negatives
    ema_decay: float | None = None  # keep a moving average of the weights with this decay, and use it
    early_stopping_patience: int | None = None  # evaluations without improvement before training stops
    validate_every: int = 1  # epochs between evaluations
    checkpoint_minutes: float = 10.0  # minutes between checkpoints within an epoch; its end always writes one
    seed: int = 0  # of weights, order, captions and dropout
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"  # Lightning Fabric's name
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # Lightning Fabric's name
    crop_scale: float = 1.0  # random crops of the pictures keep at least this share of the area; 1 shows the whole
    views: int = 0  # different crops of a picture in the whole run, taken in turns; 0: a new one in each epoch
    mirrored: bool = False  # mirror half of the crops; not for captions that tell left from right
    coarse: int = 0  # scale a quarter of the crops down to this many pixels, or up to twice as many, and up again
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        self.choices()
        self.at_least(1, "max_epochs", "accumulate_grad_batches", "validate_every")
        self.at_least(0, "weight_decay", "views", "coarse", "seed")
        patience = self.early_stopping_patience
        self.check("early_stopping_patience", patience is None or patience >= 1, "use 1 or more, or null")
        self.check("batch_size", self.batch_size >= 2, "in-batch negatives need at least 2 pairs")
        for key in ("learning_rate", "clip_grad_norm", "checkpoint_minutes"):
            self.check(key, getattr(self, key) > 0, "use a positive number")
        self.check("crop_scale", 0 < self.crop_scale <= 1, "choose a share of the area in (0, 1]")
        self.check("warmup", 0 <= self.warmup < 1, "choose a fraction of the run in [0, 1)")
        self.check("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "choose a decay in (0, 1), or null")


@dataclass(frozen=True)
class Profile:
    """How much a run does: ``pictures`` of scenes, passes over them, and pictures in each test set.

    ``alone`` is what training without a teacher does otherwise: a rate of its own, and crops that no cache has to hold.
    ``captions`` names the set of captions that stands in the place of scenes.
    """

    pictures: int
    max_epochs: int
    batch_size: int
    test_pictures: int
    learning_rate: float = 3e-3
    crop_scale: float = 0.8
    views: int = 4
    alone: dict = field(default_factory=lambda: {"learning_rate": 1e-3, "views": 0})
    preset: str = "course"
    teacher: str = SHIPPED
    teacher_pretrained: str | None = None
    captions: str = ""

    def training(self, teacher: bool = True, **changes: Any) -> TrainConfig:
        """The settings of a run of this size, with or without a ``teacher``; ``changes`` replace some."""
        decided = {key: value for key, value in vars(self).items() if hasattr(TrainConfig, key)}
        return TrainConfig(**(decided | ({} if teacher else self.alone) | changes))


PROFILES = {name: from_mapping(Profile, each, f"{name}.") for name, each in _STORED["profiles"].items()}


def get_profile(name: str) -> Profile:
    """The profile called ``name``; ConfigError with the nearest names for another."""
    require(name in PROFILES, "profile", name, closest(name, PROFILES))
    return PROFILES[name]
