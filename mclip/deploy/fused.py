"""The student in the form that a device runs: the same embeddings, to rounding, from fewer and larger operations.

BatchNorm becomes part of the convolution before it, and kernels of LightConv become the matrices that they stand for.
"""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from mclip.config import require
from mclip.image_encoder import DepthwiseConv
from mclip.model import MobileCLIP
from mclip.text_encoder import LSRABlock, mix_steps, toeplitz


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold, in place, each BatchNorm that directly follows a convolution into its weights and bias; returns ``model``.

    With the running mean m and variance v, gamma (Wx - m) / sqrt(v + eps) + beta is again a convolution (Jacob et
    al. 2018, section 3.2, https://arxiv.org/abs/1712.05877). The model must be in evaluation mode. An activation
    that timm keeps inside its BatchNorm stays in its place.
    """
    for parent in list(model.modules()):
        for (name, conv), (after, norm) in pairwise(list(parent.named_children())):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            setattr(parent, name, fuse_conv_bn_eval(conv, norm))
            if isinstance(parent, nn.Sequential) and not hasattr(norm, "act"):
                delattr(parent, after)
            else:
                setattr(parent, after, getattr(norm, "act", nn.Identity()))
    return model


class FusedBlock(nn.Module):
    """An :class:`~mclip.text_encoder.LSRABlock` for inference.

    Attributes:
        matrices: LightConv's banded matrices (H, L + 1, L + 1), L the longest caption; each caption uses their corner.
    """

    def __init__(self, block: LSRABlock, context_length: int) -> None:
        super().__init__()
        self.norm, self.gate, self.mix, self.feed_forward = block.norm, block.gate, block.mix, block.feed_forward
        self.attention, self.heads = block.attention, block.attention.num_heads
        # One row more than is used: a corner that may be the whole would be a case of its own for torch.export.
        self.register_buffer("matrices", toeplitz(block.conv.weight.detach().softmax(1), context_length + 1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (B, T, d), padding (B, T) with True = pad -> (B, T, d), as the block that it was made of."""
        batch, length, _ = x.shape
        left, right = self.norm(x).chunk(2, dim=2)
        query_key_value = F.linear(left, self.attention.in_proj_weight, self.attention.in_proj_bias)
        parts = query_key_value.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        right = F.glu(self.gate(right), dim=2)
        mask = None
        # One caption alone is as long as itself: it has no padding to hide. A graph that is exported serves any batch.
        if torch.compiler.is_compiling() or batch > 1:
            mask, right = ~padding[:, None, None, :], right.masked_fill(padding[:, :, None], 0)
        left = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).reshape(batch, length, -1)
        right = mix_steps(self.matrices[:, :length, :length], right)
        x = x + torch.cat([self.attention.out_proj(left), self.mix(right)], dim=2)
        return x + self.feed_forward(x)


def fused(model: MobileCLIP) -> MobileCLIP:
    """A copy of ``model`` that gives the same embeddings faster. It cannot be trained, saved or fused again.

    ConfigError for what is no student, or is fused already.
    """
    remedy = "give a student as load_model returns it, or from MobileCLIP.from_pretrained"
    trained = isinstance(model, MobileCLIP) and all(isinstance(b, LSRABlock) for b in model.text_encoder.blocks)
    require(trained, "model", type(model).__name__, remedy)
    new = copy.deepcopy(model)
    for layer in new.image_encoder.modules():
        if isinstance(layer, DepthwiseConv):
            layer.__class__ = nn.Conv2d  # the subclass is for gradients, and holds nothing of its own
        elif isinstance(layer, nn.Hardswish | nn.Hardsigmoid):
            layer.inplace = True  # no backward pass will ask for the input
    fold_batch_norm(new.image_encoder.eval())
    new.image_encoder.to(memory_format=torch.channels_last)  # what the CPU's convolutions read without a copy
    text = new.text_encoder
    text.blocks = nn.ModuleList(FusedBlock(block, len(text.position_embedding)) for block in text.blocks)
    return new.eval().requires_grad_(False)
