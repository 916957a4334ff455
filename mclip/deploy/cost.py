"""What a model costs to keep and to run: parameters, multiply-adds, bytes and milliseconds.

The models have random weights, because the cost does not depend on them.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnxruntime
import open_clip
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mclip.config import PRESETS, ModelConfig, closest, require
from mclip.deploy.export import quiet, write_graphs, write_int8
from mclip.deploy.fused import fold_batch_norm, fused
from mclip.deploy.reader import GRAPHS, session
from mclip.evaluate import input_of
from mclip.model import MobileCLIP

CAPTION = "a small brown dog runs across the green grass today"
"""Ten words, twelve tokens with start and end."""
_MOBILECLIP = ("MobileCLIP2-S0", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B")
RIVALS = ("ViT-B-32", *_MOBILECLIP, "ViT-M-32-alt", "ViT-S-32-alt")
"""OpenAI's architecture; MobileCLIP, of whose S0 open_clip has the second version; two of about TinyCLIP's sizes."""
KINDS = {
    "convolutions": "Conv",
    "matrix products": "MatMul Gemm FusedMatMul",
    "means and norms": "BatchNormalization LayerNormalization ReduceMean ReduceSum",
    "moving numbers": "Reshape Transpose Concat Slice Gather GatherND Squeeze Unsqueeze Split Expand Shape Range Pad "
    "ReorderInput ReorderOutput",
}
"""Operations of ONNX by what they do; all others compute number by number."""
Form = Literal["deployed", "trained", "ONNX", "int8"]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """A model in evaluation mode, or its ``graphs``, to be measured; ``parameters`` are those as trained, by part."""

    name: str
    model: nn.Module
    image_size: int
    tokenizer: Callable[[list[str]], Tensor]
    parameters: dict[str, int]
    graphs: tuple[bytes, ...] = ()

    @property
    def megabytes(self) -> float:
        """Size of the weights, or of the graphs, in files, in MB of 10^6 bytes."""
        file = io.BytesIO(b"".join(self.graphs))
        if not self.graphs:
            torch.save(self.model.state_dict(), file)
        return len(file.getbuffer()) / 1e6

    def calls(self, batch: int = 1) -> dict[str, Call]:
        """What is timed: ``batch`` random pictures or captions to embeddings, with the threads that PyTorch has now."""
        images = torch.rand(batch, 3, self.image_size, self.image_size)
        tokens = self.tokenizer([CAPTION] * batch)
        if self.graphs:
            image, text = (session(graph, torch.get_num_threads()) for graph in self.graphs)
            inputs = ({"images": images.numpy()}, {"tokens": tokens.numpy()})
            return {"image": partial(image.run, None, inputs[0]), "text": partial(text.run, None, inputs[1])}
        image, text = (partial(encode, normalize=True) for encode in (self.model.encode_image, self.model.encode_text))
        return {"image": partial(image, images), "text": partial(text, tokens)}

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of each half, for one sample; empty for graphs."""
        return {} if self.graphs else {half: multiply_adds(call) for half, call in self.calls().items()}


def candidate(name: str, form: Form = "deployed") -> Candidate:
    """The preset or open_clip architecture ``name`` with random weights.

    Deployed: BatchNorm folded into convolutions, parallel branches added up (``reparameterize_model`` of timm), the
    student fused. Trained: as training leaves it. ONNX and int8: the deployed student in ONNX Runtime. The ranges of
    int8 mean nothing, because random pictures calibrate it.
    """
    require(name in PRESETS or name in open_clip.list_models(), "model", name, closest(name, [*PRESETS, *RIVALS]))
    ours, exported = name in PRESETS, form in ("ONNX", "int8")
    require(ours or not exported, "form", form, f"{name} is not a preset; only the student has the form {form}")
    if ours:
        model, _ = random_model(name)
        tokenizer = model.tokenizer
    else:
        torch.manual_seed(0)
        with quiet():  # open_clip warns that there are no weights, which is as it should be
            model, tokenizer = open_clip.create_model(name), open_clip.get_tokenizer(name)
    size, counts, graphs = input_of(model).size, parameter_parts(model.eval()), ()
    if exported:
        with TemporaryDirectory() as folder:
            for file, content in zip(GRAPHS["float32"], float32_graphs(name), strict=True):
                (Path(folder) / file).write_bytes(content)
            if form == "int8":
                write_int8(Path(folder), torch.rand(8, 3, size, size).numpy())
            files = GRAPHS["int8" if form == "int8" else "float32"]
            graphs = tuple((Path(folder) / file).read_bytes() for file in files)
    elif form == "deployed":
        model = fused(model) if ours else fold_batch_norm(reparameterize_model(model))
    return Candidate(candidate_name(name, form), model, size, tokenizer, counts, graphs)


@cache
def float32_graphs(name: str) -> tuple[bytes, ...]:
    """The graphs of a preset with random weights; writing them takes most of the time of an export."""
    with TemporaryDirectory() as folder:
        write_graphs(random_model(name)[0], Path(folder))
        return tuple((Path(folder) / file).read_bytes() for file in GRAPHS["float32"])


def candidate_name(name: str, form: Form) -> str:
    """How tables call ``name`` in this form: the deployed one has the bare name."""
    return name if form == "deployed" else f"{name}, {'as trained' if form == 'trained' else form}"


def random_model(name: str) -> tuple[MobileCLIP, ModelConfig]:
    """A preset with random weights."""
    torch.manual_seed(0)
    return MobileCLIP(PRESETS[name]), PRESETS[name]


def parameter_parts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters of a student or an open_clip model: image, text without its token table, and the rest."""
    parts = dict.fromkeys(("image", "text", "token table", "other"), 0)
    for name, parameter in model.named_parameters():
        kind = "image" if name.startswith(("visual.", "image_")) else "text"
        kind = "token table" if "token_embedding" in name else "other" if name.startswith("logit_") else kind
        parts[kind] += parameter.numel()
    return {**parts, "total": sum(parts.values())}


def multiply_adds(call: Call) -> int:
    """Multiply-adds of the matrix products and convolutions in ``call``, by PyTorch's counter of operations."""
    # The counter does not know PyTorch's fused path of attention, and would take it for nothing.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops() // 2


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
    """Milliseconds of each call, warmed up, without gradients: the ``median`` and the 95th percentile ``p95``.

    All calls are timed in turns, so that what disturbs the machine disturbs all alike. A turn is one call that is not
    timed, for the caches, and ``repeats`` that are.
    """
    clock: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                for _ in range(repeats):
                    begun = time.perf_counter()
                    call()
                    clock[name].append(1000 * (time.perf_counter() - begun))
    return {name: summary(times) for name, times in clock.items()}


def summary(times: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return dict(zip(("median", "p95"), np.quantile(times, [0.5, 0.95]).tolist(), strict=True))


def time_by_kind(graph: Path, inputs: Mapping[str, np.ndarray], rounds: int = 30) -> dict[str, float]:
    """Milliseconds that one run of an ONNX graph spends in each of ``KINDS``, on one thread: ONNX Runtime's profile.

    The runtime joins operations before it starts, so what is timed is what it really computes.
    """
    kind_of = {operation: kind for kind, operations in KINDS.items() for operation in operations.split()}
    times = dict.fromkeys((*KINDS, "the rest"), 0.0)
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        run = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(rounds):
            run.run(None, dict(inputs))
        events = json.loads(Path(run.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            times[kind_of.get(event["args"]["op_name"], "the rest")] += event["dur"] / 1000 / rounds
    return times
