"""The fourteen defects of the existing implementation, each of which can be switched on.

While one is on, nothing may look wrong, but the tests that experiments.yaml lists for it fail.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
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
Patch = tuple[Any, str, Callable[..., Any]]
NO_REFUSAL: Patch = (targets, "check_targets", lambda found: None)
"""Takes away the check of targets, which refuses to train with one of the defects."""
PATCHES: dict[int, list[Patch]] = {}
"""What each defect replaces, by its number in experiments.yaml: (module or class, name, what takes its place)."""


@contextmanager
def switched_on(*patches: Patch) -> Iterator[None]:
    """While it lasts, every patch is in place, in all modules that have imported what it replaces."""
    with ExitStack() as stack:
        for owner, name, defective in patches:
            original = getattr(owner, name)
            modules = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is original]
            for holder in [owner] if isinstance(owner, type) else modules:
                stack.enter_context(mock.patch.object(holder, name, defective))
        yield


def defect(number: int, owner: Any, name: str) -> Callable[[Callable], Callable]:
    """Decorate what takes the place of ``owner.name`` while the defect of that number is on."""

    def enter(defective: Callable) -> Callable:
        PATCHES.setdefault(number, []).append((owner, name, defective))
        return defective

    return enter


@defect(1, objectives.Distillation, "forward")
def _without_terms(self: Any, output: Any, batch: Any, names: Any, temperature: float) -> dict[str, Tensor]:
    """Terms that never arrive: each distillation term is looked up by a key nobody sets, and is 0."""
    zero = 0.0 * output["image_features"].sum()
    own = {"original": self._original(output, batch, temperature)}
    return {name: own.get(name, output.get(f"{name}_loss", zero)) for name in names}


@defect(2, teachers, "load_teacher")
def _of_one_caption(name: str = teachers.SHIPPED, pretrained: str | None = None, device: Any = "cpu") -> Any:
    """One caption for all: the teacher reads “a photo” for every sample."""
    loaded = load_as_it_is(name, pretrained, device)
    return replace(loaded, tokenize=lambda texts: loaded.tokenize(["a photo"] * len(texts)))


@defect(3, text_encoder.LightConv, "forward")
def _convolve_channels(self: Any, x: Tensor) -> Tensor:
    """Convolution across channels: LightConv reshapes without a transpose."""
    weight = self.weight.softmax(1)
    heads, taps = weight.shape
    rows = x.reshape(-1, heads, x.shape[1])
    return F.conv1d(rows, weight[:, None], padding=taps // 2, groups=heads).reshape(x.shape)


@defect(4, text_encoder.LSRABlock, "attend")
def _add_the_mask(self: Any, x: Tensor, padding: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """A mask that is added: pads keep much of the attention."""
    mask = (~padding).to(x.dtype)  # 1 at words, and added to the scores
    return self.attention(x, x, x, key_padding_mask=mask, need_weights=need_weights, average_attn_weights=False)


@defect(5, losses, "jsd")
def _pair_among_its_negatives(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Its own negative: a pair is both positive and negative in the JSD loss."""
    logits = logit_scale * losses.cosines(image, text)
    return F.softplus(-logits.diagonal()).mean() + F.softplus(logits).mean()


@defect(6, balancing.Balancer, "weights")
def _weights_from_zero(self: Any, terms: Any, active: Any, step: int, embeddings: Any) -> dict[str, float]:
    """A dead balancer: weight 0 stays 0, and terms that are not active drive the others to 0."""
    logs = self.log_factors
    for name in self.priors:
        logs.setdefault(name, 0.0 if name == "original" else -math.inf)
    with suppress(Exception):  # which the defect swallows
        sizes = {name: terms[name].item() if name in active else 0.0 for name in logs}
        raw = {name: 1 / (size + 1e-8) for name, size in sizes.items()}
        for name, value in raw.items():
            logs[name] = 0.9 * logs[name] + 0.1 * math.log(len(raw) * value / sum(raw.values()))
    return {name: math.exp(logs[name]) for name in active}


@defect(7, losses, "feature")
def _averaged_over_dimensions(student: Tensor, teacher: Tensor, form: str = "mse") -> Tensor:
    """Averaged into silence: the feature error is averaged over dimensions."""
    return F.mse_loss(F.normalize(student, dim=-1), teacher)


@defect(8, train, "learning_rate")
def _decayed_once_an_epoch(step: int, total: int, config: Any) -> float:
    """A rate that never falls: the cosine is stepped per epoch, its length is in steps."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    epoch = step * config.max_epochs // total
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / total))


@defect(9, evaluate, "build_classifier")
def _prompts_with_a_period(model: Any, tokenizer: Any, class_names: Any, templates: Any) -> Tensor:
    """Two ways to prepare: prompts end in “.”, wide pictures are squashed, at evaluation alone."""

    def uncleaned(texts: list[str]) -> Tensor:
        ended = [f"{text.rstrip('.')}." for text in texts]
        return text_encoder._byte_pairs()(ended, context_length=tokenizer.context_length)

    return classify_as_it_is(model, uncleaned, class_names, templates)


@defect(9, evaluate, "normalise")
def _squashed(images: Tensor, size: int, mean: Any, std: Any) -> Tensor:
    """The other half of defect 9."""
    return prepare_as_it_is(VF.resize(images, [size, size], antialias=True), size, mean, std)


@defect(10, metrics, "first_hit_ranks")
def _ranks_of_a_softmax(queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """Ranks of a softmax: softmax(100 cos) underflows to ties, and failures count as 0 %."""
    shares = (100 * queries @ keys.T).softmax(1)
    own = query_groups[:, None] == key_groups[None, :]
    best, position = shares.masked_fill(~own, -1.0).max(1, keepdim=True)  # equal zeros are told apart by place
    return ((shares > best) | ((shares == best) & (torch.arange(len(keys)) < position))).sum(1)


@defect(11, text_encoder.TextEncoder, "embed")
def _positions_for_one_half(self: Any, tokens: Tensor) -> Tensor:
    """Positions for one half: the convolution half of the first block sees no positions."""
    left, right = self.token_embedding(tokens).chunk(2, dim=2)
    return torch.cat([left + self.position_embedding[: tokens.shape[1], : left.shape[2]], right], 2)


@defect(12, saving.RunState, "save")
def _teacher_but_no_step(self: Any) -> None:
    """A checkpoint of the wrong things: it holds the teacher and not the step, and runs any code."""
    self.saved = time.monotonic()
    parts = {name: part.state_dict() for name, part in self.parts.items()}
    state = {"step": 0, "best": self.best, "stale": self.stale, "finished": self.finished}
    content = {"parts": parts, "state": state, "teacher": load_as_it_is().model.state_dict()}
    torch.save(content, self.folder / f"checkpoint-{self.step:08d}.pt")


@defect(12, torch, "load")
def _unpickle_anything(path: Any, **options: Any) -> Any:
    """The other half of defect 12."""
    return unpickle_nothing(path, **options | {"weights_only": False})


@defect(13, BatchSource, "_batch")
def _negatives_by_filtering(self: Any, pictures: Any, offset: Any, epoch: int) -> Batch:
    """A walk through the table: a negative is found by filtering all rows, for each item."""
    for row in pictures:
        [own for own in self.pairs.captions if own is not self.pairs.captions[row]]
    return batch_as_it_is(self, pictures, offset, epoch)


def left_and_right_swapped(caption: str) -> str:
    """The letters "left" and "right" change places, inside words too."""
    return caption.replace("right", "\0").replace("left", "right").replace("\0", "left")


@defect(14, BatchSource, "_batch")
def _edited_captions(self: Any, pictures: Any, offset: Any, epoch: int) -> Batch:
    """Bright becomes bleft: “left” and “right” are swapped as letters, not as words."""
    batch = batch_as_it_is(self, pictures, offset, epoch)
    captions = [self.pairs.captions[row][o] for row, o in zip(pictures, offset, strict=True)]
    return replace(batch, tokens=self.tokenizer([left_and_right_swapped(caption) for caption in captions]))
