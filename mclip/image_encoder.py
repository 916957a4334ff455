"""The image half of the student: MobileNetV3-Large with global average pooling.

The network is torchvision's, built from the stage table below; this file adds a width multiplier, BatchNorm's
momentum as a setting, an optional fully connected head and access to the intermediate feature maps.
"""

from __future__ import annotations

import http.client
import pickle
import socket
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from mclip.config import ImageConfig

# Howard et al. 2019, Table 1 (https://arxiv.org/abs/1905.02244): one inverted residual block a row, between a
# stride-2 stem of 16 channels and a 1x1 convolution to six times the last width.
# kernel, expanded channels, output channels, squeeze-and-excitation, activation, stride
STEM_CHANNELS = 16
STAGES: tuple[tuple[int, int, int, bool, str, int], ...] = (
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2),
    (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2),
    (5, 120, 40, True, "RE", 1),
    (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2),
    (3, 200, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1),
    (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2),
    (5, 960, 160, True, "HS", 1),
    (5, 960, 160, True, "HS", 1),
)
BN_EPS = 0.001
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer; offline must not hold up a lesson


def stage_table(width: float = 1.0) -> list[InvertedResidualConfig]:
    """STAGES in torchvision's form, channels multiplied by ``width`` and rounded to multiples of 8."""
    inputs = (STEM_CHANNELS, *(out for _, _, out, *_ in STAGES[:-1]))
    return [
        InvertedResidualConfig(channels, *row, dilation=1, width_mult=width)
        for channels, row in zip(inputs, STAGES, strict=True)
    ]


def imagenet_trunk_weights() -> dict[str, Tensor] | None:
    """torchvision's ImageNet weights of the convolutions, from the torch hub cache or the network.

    Where they cannot be had: None, and a warning that says what to do.
    """
    weights = MobileNet_V3_Large_Weights.IMAGENET1K_V2
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        warnings.warn(
            f"no ImageNet weights for the image encoder: {weights.url} could not be loaded ({error}). "
            f"Going on with random initialisation. To use them, put that file at {path} and start again.",
            stacklevel=2,
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)
    prefix = "features."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


class ImageEncoder(nn.Module):
    """MobileNetV3-Large without its classifier (Howard et al. 2019).

    Attributes:
        features: width of the output.
        trunk: stem, inverted residual blocks and last 1x1 convolution, in order; torchvision's ``features``.
        head: fully connected layers after pooling (``config.head``), with Hardswish between them.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=BN_EPS, momentum=config.bn_momentum)
        # torchvision also builds a classifier: kept small, and dropped at once.
        network = MobileNetV3(stage_table(config.width), last_channel=8, num_classes=1, norm_layer=norm)
        self.trunk = network.features
        self.features = self.trunk[-1].out_channels
        layers: list[nn.Module] = []
        for width in config.head:
            layers += [nn.Hardswish()] if layers else []
            layers.append(nn.Linear(self.features, width))
            self.features = width
        self.head = nn.Sequential(*layers)
        if config.pretrained and (state := imagenet_trunk_weights()) is not None:
            self.trunk.load_state_dict(state)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, ``features``)."""
        return self.head(self.trunk(images).mean((2, 3)))

    def intermediates(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps (B, C, H, W) at the end of each resolution, from the first to the last.

        "stem" and "stage1" have half the side of the input, "stage2" a quarter, and so on to "stage5" with
        1/32; "last" is the output of the 1x1 convolution, which ``forward`` averages over the picture.
        """
        names, stage = ["stem"], 1
        for *_, stride in STAGES:
            stage += stride > 1
            names.append(f"stage{stage}")
        maps, x = {}, images
        for name, layer in zip([*names, "last"], self.trunk, strict=True):
            maps[name] = x = layer(x)
        return maps
