"""The student in 8-bit integers, after training: dynamic for text, static for images.

A float is stored as scale x (integer - zero point), so a number takes one byte, and the scale says what one step of the
integer is worth. Weights are known beforehand. The range of an activation is measured anew in each call (dynamic), or
once, on calibration pictures (static) (Jacob et al. 2018, https://arxiv.org/abs/1712.05877).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    float_qparams_weight_only_qconfig,
    get_default_qconfig_mapping,
    per_channel_dynamic_qconfig,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from mclip.config import require
from mclip.model import MobileCLIP

DYNAMIC = {nn.Linear: per_channel_dynamic_qconfig, nn.Embedding: float_qparams_weight_only_qconfig}
"""A scale for each row of a weight; the token table has one for each token."""


def int8_text(model: MobileCLIP) -> MobileCLIP:
    """A copy of ``model``, as :func:`~mclip.fused.fused` returns it, whose text half multiplies int8 weights.

    Linear layers and the token table are stored in int8; activations are quantised as they come, with the range that
    they have in that call. Attention, LightConv and LayerNorm stay in float.
    """
    new = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its removal; its version is pinned
        for name in ("text_encoder", "text_projection"):
            setattr(new, name, quantize_dynamic(getattr(new, name), DYNAMIC, inplace=True))
    return new


def int8_image(model: MobileCLIP, images: Tensor, batch_size: int = 64) -> MobileCLIP:
    """A copy of ``model``, as :func:`~mclip.fused.fused` returns it, whose image encoder computes in int8 throughout.

    Args:
        images: (N, 3, S, S), prepared for the model: calibration pictures, which fix the range of each activation.
            Take them from the training set: pictures of the test set would make its result look better than it is.
        batch_size: how many are shown at once.
    """
    require(len(images) > 0, "images", tuple(images.shape), "give some pictures of the training set")
    new = copy.deepcopy(model)
    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        observed = prepare_fx(new.image_encoder, mapping, (images[:1],))
        for batch in images.split(batch_size):
            observed(batch)
        new.image_encoder = convert_fx(observed)
        new.image_projection = quantize_dynamic(new.image_projection, DYNAMIC)
    return new
