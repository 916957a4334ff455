"""The same work in two forms, timed in turns so that a slow moment meets both: parts of ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mclip.config import DistillConfig
from mclip.deploy.cost import random_model
from mclip.evaluate import BATCH_SIZE, embed_images
from mclip.model import MobileCLIP
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import Batch, BatchSource, Pairs, Targets
from mclip.pictures import Crops
from mclip.recipes import BASE, student_prepare
from mclip.study.noise import SENTENCE, random_pairs, random_targets
from mclip.targets import OnlineTargets
from mclip.teacher import Teacher
from mclip.text_encoder import LightConv, TextEncoder, light_conv_reference, padding_mask

Row = dict[str, Any]
Step = Callable[[], None]
ALL_TERMS = DistillConfig(phases=(0.0, 0.0, 0.0), ramp=0.0)
TERMS = ["original", "feature", "response"]


def batches(
    model: MobileCLIP,
    pairs: Pairs,
    batch_size: int,
    targets: Targets | OnlineTargets | None = None,
    crops: Crops | None = None,
) -> BatchSource:
    """Batches of ``pairs`` as the student ``model`` reads them, in the order of seed 0."""
    return BatchSource(pairs, model.tokenizer, student_prepare(model.config), batch_size, 0, targets, crops)


def in_turns(forms: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each form over ``rounds`` turns; one turn before them does not count."""
    clock: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            begun = time.perf_counter()
            form()
            clock[name].append(time.perf_counter() - begun)
    return {name: float(np.median(times[1:])) for name, times in clock.items()}


def ratio(what: str, slow: str, fast: str, forms: Mapping[str, Step], rounds: int, bar: str = "") -> Row:
    """The row of ``bench.json`` that says how many times as long ``slow`` takes as ``fast``."""
    seconds = in_turns(forms, rounds)
    return {"what": what, "value": seconds[slow] / seconds[fast], "unit": "times", "bar": bar, "seconds": seconds}


def _backward(module: nn.Module, forward: Callable[[], Tensor]) -> Step:
    """A forward and a backward pass, from the sum of the squares of what ``forward`` returns."""

    def step() -> None:
        forward().square().sum().backward()
        module.zero_grad(set_to_none=True)

    return step


def _training_step(model: MobileCLIP, objective: Contrastive, batch: Batch, names: list[str]) -> Step:
    """Forward and backward of the terms called ``names``, without the optimiser, which is the same in all forms."""

    def step() -> None:
        sum(objective(model(batch.images, batch.tokens), batch, names, 4.0).values()).backward()
        model.zero_grad(set_to_none=True)

    return step


def distillation(batch_size: int = 64, rounds: int = 12) -> list[Row]:
    """What cached distillation adds to a step of the course's student."""
    model, config = random_model("course")
    pairs, targets = random_pairs(batch_size, config.image.image_size), random_targets(batch_size)
    batch = next(batches(model, pairs, batch_size, targets).epoch(0))
    all_terms = Distillation(ALL_TERMS, (config.embed_dim,) * 2, 512, 100.0)
    forms = {
        "base": _training_step(model, Contrastive(BASE), batch, ["original"]),
        "distillation": _training_step(model, all_terms, batch, TERMS),
    }
    what = "distillation step with cached targets against a step of the student alone, course"
    return [ratio(what, "distillation", "base", forms, rounds, "at most 1.15")]


def existing_step(teacher: Teacher, batch_size: int = 16, rounds: int = 3, preset: str = "klmobile") -> list[Row]:
    """Our step against one of the structure that KLmobile's has, both on the student ``preset``.

    There the pictures go back to PIL for the teacher's own preparation, the teacher embeds them and the captions in
    every step, the image encoder runs twice, and captions are padded to 77 tokens.
    """
    model, config = random_model(preset)
    pairs, targets = random_pairs(batch_size, config.image.image_size), random_targets(batch_size, teacher.embed_dim)
    batch = next(batches(model, pairs, batch_size, targets).epoch(0))
    objective = Distillation(ALL_TERMS, (config.embed_dim,) * 2, teacher.embed_dim, 100.0)
    captions = [own[0] for own in pairs.captions]

    def theirs() -> None:
        with torch.inference_mode():
            pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in batch.pixels]
            image = teacher.model.encode_image(torch.stack([teacher.transform(p) for p in pictures]), normalize=True)
            text = teacher.model.encode_text(teacher.tokenize(captions), normalize=True)
        seen = Batch(batch.pixels, batch.tokens, batch.index, image.clone(), text.clone(), batch.prepare)
        image_features = model.image_encoder(batch.images)
        text_features = padded_features(model.text_encoder, batch.tokens)
        again = model.image_encoder(batch.images)  # the pictures once more, as their own negatives
        output = {
            "image_features": F.normalize(model.image_projection(image_features), dim=-1),
            "text_features": F.normalize(model.text_projection(text_features), dim=-1),
            "logit_scale": model.logit_scale.exp(),
        }
        (sum(objective(output, seen, TERMS, 4.0).values()) + 0 * again.sum()).backward()
        model.zero_grad(set_to_none=True)

    forms = {"theirs": theirs, "ours": _training_step(model, objective, batch, TERMS)}
    what = f"a step of the structure of KLmobile's against ours, {preset}, batch {batch_size}"
    return [ratio(what, "theirs", "ours", forms, rounds)]


def padded_features(encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """What ``encoder`` says of ``tokens`` (B, T) that are padded to its whole context: the same, for more work."""
    missing = len(encoder.position_embedding) - tokens.shape[1]
    tokens = F.pad(tokens, (0, missing))
    padding = padding_mask(tokens)
    x = encoder.dropout(encoder.embed(tokens))
    for block in encoder.blocks:
        x = block(x, padding)
    return encoder.norm(x[torch.arange(len(x)), (~padding).sum(1) - 1])


def forms(rounds: int = 10) -> list[Row]:
    """LightConv as a matrix, captions cut to the longest, channels innermost: each against the plain form."""
    torch.manual_seed(0)
    conv, x = LightConv(256, 8, 15), torch.randn(64, 32, 256, requires_grad=True)
    light = {
        "conv1d": _backward(conv, lambda: light_conv_reference(x, conv.weight.softmax(1))),
        "matrix": _backward(conv, lambda: conv(x)),
    }
    klmobile, _ = random_model("klmobile")
    tokens = klmobile.tokenizer([SENTENCE] * 16)
    encoder = klmobile.text_encoder
    text = {
        "padded": _backward(encoder, lambda: padded_features(encoder, tokens)),
        "cut": _backward(encoder, lambda: encoder(tokens)),
    }
    image_encoder, pictures = random_model("mobile-512")[0].image_encoder, torch.randn(16, 3, 224, 224)
    innermost = random_model("mobile-512")[0].image_encoder.to(memory_format=torch.channels_last)
    last = pictures.contiguous(memory_format=torch.channels_last)
    layout = {
        "channels first": _backward(image_encoder, lambda: image_encoder(pictures)),
        "channels last": _backward(innermost, lambda: innermost(last)),
    }
    return [
        ratio(
            "LightConv as conv1d against a banded matrix, T = 32", "conv1d", "matrix", light, 4 * rounds, "at least 4"
        ),
        ratio("captions of fifteen words padded to 77 tokens against cut, klmobile", "padded", "cut", text, rounds),
        ratio(
            "image encoder, channels first against last, mobile-512", "channels first", "channels last", layout, rounds
        ),
    ]


def evaluation(batches: int = 4, singles: int = 32, rounds: int = 7) -> list[Row]:
    """Pictures embedded in batches, as evaluation does, against one by one: seconds of a picture, course's student."""
    model, config = random_model("course")
    pictures = random_pairs(batches * BATCH_SIZE, config.image.image_size).images[np.arange(batches * BATCH_SIZE)]
    seconds = in_turns(
        {
            "one by one": lambda: embed_images(model, pictures[:singles], 1),
            "batches": lambda: embed_images(model, pictures),
        },
        rounds,
    )
    each = {"one by one": seconds["one by one"] / singles, "batches": seconds["batches"] / len(pictures)}
    what = f"pictures embedded one by one against batches of {BATCH_SIZE}, course, 64 px"
    value = each["one by one"] / each["batches"]
    return [{"what": what, "value": value, "unit": "times", "bar": "at least 20", "seconds": each}]
