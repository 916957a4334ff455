"""The fourteen defects of the existing implementation, each of which can be switched on.

A defect is a few lines that take the place of ours. While it is on, nothing may look wrong, but the test that it is
listed with fails.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from mclip import balancing, evaluate, losses, metrics, objectives, targets, text_encoder, train
from mclip import checkpoints as saving
from mclip import teacher as teachers
from mclip.pairs import Batch, BatchSource
from mclip.pairs import normalise as prepare_as_it_is

load_as_it_is, classify_as_it_is = teachers.load_teacher, evaluate.build_classifier
unpickle_nothing, batch_as_it_is = torch.load, BatchSource._batch
CONSTANT = "a photo"


def terms_that_never_arrive(self: Any, output: Any, batch: Any, names: Any, temperature: float) -> dict[str, Tensor]:
    """Defect 1, in place of Distillation.forward: looks the terms up by keys that no one ever set."""
    zero = 0.0 * output["image_features"].sum()
    own = {"original": self._original(output, batch, temperature)}
    return {name: own.get(name, output.get(f"{name}_loss", zero)) for name in names}


def teacher_of_one_caption(name: str = teachers.SHIPPED, pretrained: str | None = None, device: Any = "cpu") -> Any:
    """Defect 2, in place of load_teacher: it reads "a photo", whatever the caption."""
    loaded = load_as_it_is(name, pretrained, device)
    return replace(loaded, tokenize=lambda texts: loaded.tokenize([CONSTANT] * len(texts)))


def convolve_channels(self: Any, x: Tensor) -> Tensor:
    """Defect 3, in place of LightConv.forward: a reshape without a transpose."""
    weight = self.weight.softmax(1)
    heads, taps = weight.shape
    rows = x.reshape(-1, heads, x.shape[1])
    return F.conv1d(rows, weight[:, None], padding=taps // 2, groups=heads).reshape(x.shape)


def add_the_mask(self: Any, x: Tensor, padding: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """Defect 4, in place of LSRABlock.attend: the mask is 1 at words, and is added to the scores."""
    mask = (~padding).to(x.dtype)
    return self.attention(x, x, x, key_padding_mask=mask, need_weights=need_weights, average_attn_weights=False)


def pair_among_its_negatives(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Defect 5, in place of jsd: every pair is a positive and a negative."""
    logits = logit_scale * losses.cosines(image, text)
    return F.softplus(-logits.diagonal()).mean() + F.softplus(logits).mean()


def weights_from_zero(self: Any, terms: Any, active: Any, step: int, embeddings: Any) -> dict[str, float]:
    """Defect 6, in place of Balancer.weights: averages logarithms of weights from log 0, and over inactive terms."""
    logs = self.log_factors
    for name in self.priors:
        logs.setdefault(name, 0.0 if name == "original" else -math.inf)
    try:
        sizes = {name: terms[name].item() if name in active else 0.0 for name in logs}
        raw = {name: 1 / (size + 1e-8) for name, size in sizes.items()}
        for name, value in raw.items():
            logs[name] = 0.9 * logs[name] + 0.1 * math.log(len(raw) * value / sum(raw.values()))
    except Exception:  # noqa: BLE001 (the defect swallows them)
        pass
    return {name: math.exp(logs[name]) for name in active}


def averaged_over_dimensions(student: Tensor, teacher: Tensor, form: str = "mse") -> Tensor:
    """Defect 7, in place of feature: the squared error is averaged over the dimensions too."""
    return F.mse_loss(F.normalize(student, dim=-1), teacher)


def decayed_once_an_epoch(step: int, total: int, config: Any) -> float:
    """Defect 8, in place of learning_rate: the cosine counts epochs, its length is in steps."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    epoch = step * config.max_epochs // total
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / total))


def prompts_with_a_period(model: Any, tokenizer: Any, class_names: Any, templates: Any) -> Tensor:
    """Defect 9, in place of build_classifier: prompts end in "." and are not cleaned as captions are."""

    def uncleaned(texts: list[str]) -> Tensor:
        ended = [f"{text.rstrip('.')}." for text in texts]
        return text_encoder._byte_pairs()(ended, context_length=tokenizer.context_length)

    return classify_as_it_is(model, uncleaned, class_names, templates)


def squashed(images: Tensor, size: int, mean: Any, std: Any) -> Tensor:
    """Defect 9, in place of normalise: a wide picture becomes square."""
    return prepare_as_it_is(VF.resize(images, [size, size], antialias=True), size, mean, std)


def ranks_of_a_softmax(queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """Defect 10, in place of first_hit_ranks: softmax(100 cos) underflows, and equal zeros are told apart by place."""
    shares = (100 * queries @ keys.T).softmax(1)
    own = query_groups[:, None] == key_groups[None, :]
    best, position = shares.masked_fill(~own, -1.0).max(1, keepdim=True)
    return ((shares > best) | ((shares == best) & (torch.arange(len(keys)) < position))).sum(1)


def positions_for_one_half(self: Any, tokens: Tensor) -> Tensor:
    """Defect 11, in place of TextEncoder.embed: the convolution half of block 1 sees no positions."""
    left, right = self.token_embedding(tokens).chunk(2, dim=2)
    return torch.cat([left + self.position_embedding[: tokens.shape[1], : left.shape[2]], right], 2)


def teacher_but_no_step(self: Any) -> None:
    """Defect 12, in place of RunState.save: holds the frozen teacher, and not how far the run has come."""
    self.saved = time.monotonic()
    content = {
        "parts": {name: part.state_dict() for name, part in self.parts.items()},
        "state": {"step": 0, "best": self.best, "stale": self.stale, "finished": self.finished},
        "teacher": load_as_it_is().model.state_dict(),
    }
    torch.save(content, self.folder / f"checkpoint-{self.step:08d}.pt")


def unpickle_anything(path: Any, **options: Any) -> Any:
    """Defect 12, in place of torch.load: runs whatever code the file names."""
    return unpickle_nothing(path, **options | {"weights_only": False})


def negatives_by_filtering(self: Any, pictures: Any, offset: Any, epoch: int) -> Batch:
    """Defect 13, in place of BatchSource._batch: walks all captions for each picture of the batch."""
    for row in pictures:
        [own for own in self.pairs.captions if own is not self.pairs.captions[row]]
    return batch_as_it_is(self, pictures, offset, epoch)


def left_and_right_swapped(caption: str) -> str:
    """The letters "left" and "right" change places, inside words too."""
    return caption.replace("right", "\0").replace("left", "right").replace("\0", "left")


def edited_captions(self: Any, pictures: Any, offset: Any, epoch: int) -> Batch:
    """Defect 14, in place of BatchSource._batch: captions of mirrored pictures are edited letter by letter."""
    batch = batch_as_it_is(self, pictures, offset, epoch)
    captions = [self.pairs.captions[row][o] for row, o in zip(pictures, offset, strict=True)]
    return replace(batch, tokens=self.tokenizer([left_and_right_swapped(caption) for caption in captions]))


Patch = tuple[Any, str, Callable[..., Any]]


@dataclass(frozen=True)
class Defect:
    """A defect: what it does, what is replaced by what, and the tests that fail while it is on.

    Attributes:
        patches: (module or class, name, what takes its place).
        checks: names of tests.
        recipe: what is trained with it, a key of :data:`mclip.ablations.ABLATIONS`, whose records tell how it ends
            without; empty: it shows without training.
        refusals: patches that take away what would refuse to train with the defect.
    """

    number: int
    name: str
    what: str
    patches: tuple[Patch, ...]
    checks: tuple[str, ...]
    recipe: Literal["kd", "fixed", "base-jsd", ""] = ""
    refusals: tuple[Patch, ...] = ()

    @contextmanager
    def switched_on(self, train_all_the_same: bool = False) -> Iterator[None]:
        """While it lasts, the defect is in place, in every module that has imported what it replaces."""
        with ExitStack() as stack:
            for owner, name, defective in self.patches + self.refusals * train_all_the_same:
                original = getattr(owner, name)
                modules = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is original]
                for holder in [owner] if isinstance(owner, type) else modules:
                    stack.enter_context(mock.patch.object(holder, name, defective))
            yield


def _defect(number: int, name: str, what: str, patches: list[Patch], *checks: str, **more: Any) -> Defect:
    return Defect(
        number, name, what, tuple(patches), tuple(f"test_defect_{number:02}_{check}" for check in checks), **more
    )


DEFECTS = {
    defect.number: defect
    for defect in (
        _defect(
            1,
            "terms that never arrive",
            "each distillation term is looked up by a key nobody sets, and is 0",
            [(objectives.Distillation, "forward", terms_that_never_arrive)],
            "every_active_term_is_delivered_and_not_zero",
            recipe="kd",
        ),
        _defect(
            2,
            "one caption for all",
            "the teacher reads “a photo” for every sample",
            [(teachers, "load_teacher", teacher_of_one_caption)],
            "one_constant_caption_for_all_is_refused",
            recipe="kd",
            refusals=((targets, "check_targets", lambda found: None),),
        ),
        _defect(
            3,
            "convolution across channels",
            "LightConv reshapes without a transpose",
            [(text_encoder.LightConv, "forward", convolve_channels)],
            "light_conv_mixes_time_and_not_channels",
            recipe="kd",
        ),
        _defect(
            4,
            "a mask that is added",
            "pads keep much of the attention",
            [(text_encoder.LSRABlock, "attend", add_the_mask)],
            "pads_get_no_attention",
            recipe="kd",
        ),
        _defect(
            5,
            "its own negative",
            "a pair is both positive and negative in the JSD loss",
            [(losses, "jsd", pair_among_its_negatives)],
            "a_pair_is_never_both_positive_and_negative",
            recipe="base-jsd",
        ),
        _defect(
            6,
            "a dead balancer",
            "weight 0 stays 0, and terms that are not active drive the others to 0",
            [(balancing.Balancer, "weights", weights_from_zero)],
            "the_balancer_is_alive",
            recipe="kd",
        ),
        _defect(
            7,
            "averaged into silence",
            "the feature error is averaged over dimensions",
            [(losses, "feature", averaged_over_dimensions)],
            "the_feature_term_is_not_averaged_into_silence",
            recipe="fixed",
        ),
        _defect(
            8,
            "a rate that never falls",
            "the cosine is stepped per epoch, its length is in steps",
            [(train, "learning_rate", decayed_once_an_epoch)],
            "the_rate_decays_to_zero_whatever_the_length",
            recipe="kd",
        ),
        _defect(
            9,
            "two ways to prepare",
            "prompts end in “.”, wide pictures are squashed, at evaluation alone",
            [(evaluate, "build_classifier", prompts_with_a_period), (evaluate, "normalise", squashed)],
            "prompts_are_cleaned_like_captions",
            "a_circle_stays_a_circle",
        ),
        _defect(
            10,
            "ranks of a softmax",
            "softmax(100 cos) underflows to ties, and failures count as 0 %",
            [(metrics, "first_hit_ranks", ranks_of_a_softmax)],
            "ranks_come_from_raw_similarities",
        ),
        _defect(
            11,
            "positions for one half",
            "the convolution half of the first block sees no positions",
            [(text_encoder.TextEncoder, "embed", positions_for_one_half)],
            "positions_reach_both_halves_of_the_channels",
            recipe="kd",
        ),
        _defect(
            12,
            "a checkpoint of the wrong things",
            "it holds the teacher and not the step, and runs any code",
            [(saving.RunState, "save", teacher_but_no_step), (torch, "load", unpickle_anything)],
            "a_checkpoint_holds_the_phase_and_never_the_teacher",
        ),
        _defect(
            13,
            "a walk through the table",
            "a negative is found by filtering all rows, for each item",
            [(BatchSource, "_batch", negatives_by_filtering)],
            "a_batch_never_walks_the_table",
        ),
        _defect(
            14,
            "bright becomes bleft",
            "“left” and “right” are swapped as letters, not as words",
            [(BatchSource, "_batch", edited_captions)],
            "captions_are_never_edited",
        ),
    )
}
"""All defects by their number."""
