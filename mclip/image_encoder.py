"""The image half of the student: MobileNetV3-Large with global average pooling.

The network is torchvision's, built from the stage table below, with settings of our own.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.ops import Conv2dNormActivation

from mclip.config import ImageConfig

# Howard et al. 2019, Table 1 (https://arxiv.org/abs/1905.02244): one inverted residual block a row, between a
# stride-2 stem of 16 channels and a 1x1 convolution to six times the last width.
# kernel, expanded channels, output channels, squeeze-and-excitation, activation, stride
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


def stage_table(width: float = 1.0) -> list[InvertedResidualConfig]:
    """STAGES in torchvision's form, channels multiplied by ``width`` and rounded to multiples of 8."""
    inputs = (16, *(out for _, _, out, *_ in STAGES))
    return [InvertedResidualConfig(n, *row, 1, width) for n, row in zip(inputs, STAGES, strict=False)]


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution, with the weights of ``conv``, that trains fast on maps of a few pixels.

    On a CPU, PyTorch's backward pass of a 5x5 kernel over a 2x2 map takes some twenty times as long as the arithmetic.
    For such maps the kernel is written out as a matrix from input to output pixels, as LightConv does along time.
    """

    LARGEST = 100  # input pixels times output pixels of a map that is worth a matrix

    def __init__(self, conv: nn.Conv2d) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(*shape, groups=conv.groups, bias=False)
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        (height, width), (kernel, _) = x.shape[-2:], self.kernel_size
        rows, columns = ((side + 2 * self.padding[0] - kernel) // self.stride[0] + 1 for side in (height, width))
        small = height * width * rows * columns <= self.LARGEST and kernel >= 5  # with 3x3 the library is faster
        if not small or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width)  # of the input pixels; 0 is padding
        under_tap = F.unfold(numbers, kernel, padding=self.padding, stride=self.stride)[0].long().T
        # Tap of the kernel that joins each output pixel to each input pixel; for none the zero after the last.
        taps = torch.full((len(under_tap), height * width + 1), kernel**2)
        taps = taps.scatter(1, under_tap, torch.arange(kernel**2).expand_as(under_tap))[:, 1:]
        matrix = F.pad(self.weight.flatten(1), (0, 1)).T[taps]
        pixels = x.permute(0, 2, 3, 1).reshape(len(x), 1, height * width, -1)
        return (pixels * matrix).sum(2).unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """MobileNetV3-Large without its classifier (Howard et al. 2019), with fully connected layers after pooling."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=config.bn_momentum)
        # torchvision also builds a classifier: kept small, and dropped at once.
        network = MobileNetV3(stage_table(config.width), last_channel=8, num_classes=1, norm_layer=norm)
        self.trunk = network.features
        for block in self.trunk.modules():
            if isinstance(block, Conv2dNormActivation) and block[0].groups > 1:
                block[0] = DepthwiseConv(block[0])
            elif isinstance(block, nn.Hardswish):
                block.inplace = False  # its backward pass needs the input, which would be copied first
        self.features = self.trunk[-1].out_channels  # width of the output
        self.head = nn.Sequential()
        for width in config.head:
            self.head.extend([nn.Hardswish()] if len(self.head) else [])
            self.head.append(nn.Linear(self.features, width))
            self.features = width

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, ``features``)."""
        return self.head(self.trunk(images).mean((2, 3)))
