"""Typed settings: the model and its presets; training and distillation in :mod:`mclip.settings`.

Every setting is a field of a frozen dataclass. A value that cannot work raises :class:`ConfigError`, which names
the key, the value and what would be right; the same errors come from Python, YAML files and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import ConfigError as ConfigError
from .checks import closest as closest
from .checks import from_mapping as from_mapping
from .checks import from_yaml as from_yaml
from .checks import require as require
from .settings import DistillConfig as DistillConfig
from .settings import TrainConfig as TrainConfig


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
