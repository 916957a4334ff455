"""What a model costs to keep and to run: parameters, multiply-adds, bytes, milliseconds and memory.

The models have random weights, because the cost does not depend on them. The rivals are those that open_clip ships,
in the form in which they would be deployed; so is the student.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from mclip.config import PRESETS, ModelConfig, closest, require
from mclip.deploy.fused import fold_batch_norm, fused
from mclip.deploy.quantise import int8_image, int8_text
from mclip.image_encoder import stage_names
from mclip.model import MobileCLIP
from mclip.results import describe_model
from mclip.text_encoder import padding_mask

CAPTION = "a small brown dog runs across the green grass today"
"""Ten words, twelve tokens with start and end."""
RIVALS = (
    "ViT-B-32",
    "MobileCLIP2-S0",
    "MobileCLIP-S1",
    "MobileCLIP-S2",
    "MobileCLIP-B",
    "ViT-M-32-alt",
    "ViT-S-32-alt",
)
"""OpenAI's architecture; MobileCLIP, of whose S0 open_clip has the second version; two of about TinyCLIP's sizes."""
Form = Literal["deployed", "trained", "int8"]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """A model to be measured.

    Attributes:
        name: the preset or open_clip architecture, and the form where it is not the deployed one.
        model: anything with ``encode_image`` and ``encode_text``, in evaluation mode.
        image_size: side of its pictures in pixels.
        tokenizer: captions -> token ids.
        parameters: numbers of parameters by part, as trained.
        description: the ``model`` field of a results record.
    """

    name: str
    model: nn.Module
    image_size: int
    tokenizer: Callable[[list[str]], Tensor]
    parameters: dict[str, int]
    description: dict[str, Any]

    def calls(self, batch: int = 1) -> dict[str, Call]:
        """What is timed: ``batch`` pictures of noise, and ``batch`` times the caption, to normalised embeddings."""
        images = torch.rand(batch, 3, self.image_size, self.image_size)
        tokens = self.tokenizer([CAPTION] * batch)
        return {
            "image": lambda: self.model.encode_image(images, normalize=True),
            "text": lambda: self.model.encode_text(tokens, normalize=True),
        }


def candidate(name: str, form: Form = "deployed") -> Candidate:
    """The preset or open_clip architecture ``name`` with random weights.

    Deployed: BatchNorm folded into convolutions, parallel branches added up (``reparameterize_model`` of timm), the
    student fused. Trained: as training leaves it. int8: the deployed student, quantised (its ranges mean nothing, as
    it has seen noise).
    """
    require(name in PRESETS or name in open_clip.list_models(), "model", name, closest(name, [*PRESETS, *RIVALS]))
    ours = name in PRESETS
    require(ours or form != "int8", "form", form, f"{name} is not a preset; only the student has an int8 form")
    torch.manual_seed(0)
    if ours:
        model, config = random_model(name)
        size, tokenizer = config.image.image_size, model.tokenizer
    else:
        model, tokenizer = _without_warning(open_clip.create_model, name), open_clip.get_tokenizer(name)
        size = model.visual.image_size
        size = size if isinstance(size, int) else size[0]
    label = candidate_name(name, form)
    counts, description = parameter_parts(model.eval()), describe_model(label, model)
    if form != "trained":
        model = fused(model) if ours else fold_batch_norm(reparameterize_model(model))
    if form == "int8":
        model = int8_image(int8_text(model), torch.rand(8, 3, size, size))
    return Candidate(label, model, size, tokenizer, counts, description)


def candidate_name(name: str, form: Form) -> str:
    """How tables call ``name`` in this form: the deployed one has the bare name."""
    return name if form == "deployed" else f"{name}, {'as trained' if form == 'trained' else form}"


def _without_warning(create: Callable[[str], nn.Module], name: str) -> nn.Module:
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights, which is as it should be
    try:
        return create(name)
    finally:
        logging.disable(logging.NOTSET)


def parameter_parts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters of a student or an open_clip model: image, text, token table, other, total.

    Projections count with their encoder; the token table is not counted in the text.
    """
    parts = dict.fromkeys(("image", "text", "token table", "other"), 0)
    for name, parameter in model.named_parameters():
        kind = "image" if name.startswith(("visual.", "image_")) else "text"
        kind = "token table" if "token_embedding" in name else "other" if name.startswith("logit_") else kind
        parts[kind] += parameter.numel()
    return {**parts, "total": sum(parts.values())}


def multiply_adds(call: Call) -> int:
    """Multiply-adds of the matrix products and convolutions in ``call``, by PyTorch's counter of operations.

    PyTorch's fused path of attention, which its counter does not know and would take for nothing, is off meanwhile.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops() // 2


def checkpoint_megabytes(model: nn.Module) -> float:
    """Size of ``model``'s weights in a file, in MB of 10^6 bytes, in the precision that the model has."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latency(calls: Mapping[str, Call], rounds: int = 20, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, warmed up, without gradients.

    All calls are timed in turns, so that what disturbs the machine disturbs all alike; each turn is one call that is
    not timed, for the caches, and ``repeats`` that are.

    Returns:
        For each name the ``median`` and 95th percentile ``p95`` of the clock on the wall, and ``cpu``, the median of
        the processor's time. With one thread and nothing else running, median and cpu agree.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                for _ in range(repeats):
                    begun, worked = time.perf_counter(), time.process_time()
                    call()
                    found[name].append((time.perf_counter() - begun, time.process_time() - worked))
    return {name: _summary(1000 * np.array(pairs)) for name, pairs in found.items()}


def _summary(pairs: np.ndarray) -> dict[str, float]:
    wall, cpu = pairs.T
    found = {"median": np.median(wall), "p95": np.quantile(wall, 0.95), "cpu": np.median(cpu)}
    return {name: float(value) for name, value in found.items()}


def time_by_part(parts: Mapping[str, nn.Module], call: Call, rounds: int = 20) -> dict[str, float]:
    """Milliseconds that ``call`` spends in each of the modules ``parts``, by torch.profiler, after one warm-up."""
    marks: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks.append(record_function(name))
            marks[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in parts.items()]
    handles += [module.register_forward_hook(leave) for module in parts.values()]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start, and a missing GPU, as errors
    try:
        with torch.inference_mode():
            call()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(rounds):
                    call()
    finally:
        for handle in handles:
            handle.remove()
    return {e.key: e.cpu_time_total / rounds / 1000 for e in profiler.key_averages() if e.key in parts}


def random_model(name: str) -> tuple[MobileCLIP, ModelConfig]:
    """A preset with random weights."""
    config = replace(PRESETS[name], image=replace(PRESETS[name].image, pretrained=False))
    torch.manual_seed(0)
    return MobileCLIP(config), config


def block_times(preset: str = "klmobile", rounds: int = 30) -> dict[str, dict[str, Any]]:
    """An LSRA block, as deployed, beside PyTorch's transformer block of the same width, heads and feed-forward.

    By number of tokens, one caption, one thread: milliseconds, and multiply-adds, of each.
    """
    model, config = random_model(preset)
    text, number = config.text, len(config.text.kernels) // 2
    lsra = fused(model.eval()).text_encoder.blocks[number]
    plain = nn.TransformerEncoderLayer(text.width, text.heads, text.feed_forward, batch_first=True, norm_first=True)
    plain = plain.eval().requires_grad_(False)
    found = {}
    for length in (12, text.context_length):
        x, padding = torch.randn(1, length, text.width), padding_mask(torch.ones(1, length, dtype=torch.long))
        calls = {"LSRA": lambda x=x, padding=padding: lsra(x, padding), "plain": lambda x=x: plain(x)}
        with threads(1):
            clock = latency(calls, rounds)
        found[str(length)] = {
            name: clock[name] | {"multiply_adds": multiply_adds(call)} for name, call in calls.items()
        }
    return found


def stage_times(preset: str = "mobile-256", rounds: int = 20) -> dict[str, float]:
    """Milliseconds of one picture in each stage of the deployed image encoder, one thread, by torch.profiler."""
    each = candidate(preset)
    layers = {
        f"{number:02} {name}": layer
        for number, (name, layer) in enumerate(zip(stage_names(), each.model.image_encoder.trunk, strict=True))
    }
    with threads(1):
        found = time_by_part(layers, each.calls()["image"], rounds)
    stages = dict.fromkeys(stage_names(), 0.0)
    for name, milliseconds in found.items():
        stages[name.split(" ")[1]] += milliseconds
    return stages
