"""The student in a folder that an app can carry: ONNX graphs, tokenizer, preparation of pictures, and a self-check.

:mod:`mclip.deployed` reads it without PyTorch. Graphs are in ONNX (https://onnx.ai), integers by ONNX Runtime.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn

from mclip.config import require
from mclip.deploy.fused import fused
from mclip.deploy.reader import (
    GOLDEN_FILE,
    GRAPHS,
    KIND,
    MANIFEST_FILE,
    PREPROCESS_FILE,
    TOKENIZER_FILE,
    VERSION,
    Deployed,
)
from mclip.deploy.tokenizer import portable_tokenizer
from mclip.evaluate import ZeroShotSet, as_templates, zero_shot_record
from mclip.files import atomic_folder, write_json
from mclip.model import MobileCLIP
from mclip.pairs import normalise
from mclip.recipes import load_model
from mclip.results import describe_model, versions
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import load_pairs

GOLDEN_TEXTS = (
    "a photo of a dog.",
    "  A small RED star,\non green grass!",
    "Crème brûlée in the café’s window",
    "it's 10 o'clock",
    "",
    "a very long caption " * 40,
)
"""What a tokenizer that was written anew gets wrong first: case, punctuation, white space, accents, numbers, length."""
CALIBRATION_BATCH = 64


class Half(nn.Module):
    """One half of ``model`` as a graph: ``encode`` is "encode_image" or "encode_text"."""

    def __init__(self, model: MobileCLIP, encode: str) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        """Prepared pictures (B, 3, S, S), or token ids (B, T) of any T that the model reads -> (B, d) of length 1."""
        return getattr(self.model, self.encode)(inputs, normalize=True)


def write_graphs(model: MobileCLIP, folder: Path) -> None:
    """``image.onnx`` and ``text.onnx`` of the fused ``model``, by PyTorch's exporter on ``torch.export``.

    Batch and length of captions stay open. The exporter's notes of which line of code made which node are left out.
    """
    size, context = model.config.image.image_size, model.config.text.context_length
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=context)
    deployed, (image, text) = fused(model), GRAPHS["float32"]
    pictures, tokens = torch.zeros(2, 3, size, size), model.tokenizer(["a small dog", "a cat"])
    jobs = (
        (image, Half(deployed, "encode_image"), pictures, ("images", {0: batch})),
        (text, Half(deployed, "encode_text"), tokens, ("tokens", {0: batch, 1: length})),
    )
    for name, graph, example, (key, shape) in jobs:
        with _quiet():
            program = torch.onnx.export(
                graph.eval(),
                (example,),
                input_names=[key],
                output_names=["embeddings"],
                dynamic_shapes=(shape,),
                dynamo=True,
                verbose=False,
            )
        proto = program.model_proto
        inner = proto.graph
        for part in (proto, inner, *inner.node, *inner.value_info, *inner.input, *inner.output, *inner.initializer):
            part.ClearField("metadata_props")
        onnx.save(proto, folder / name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of exporter and quantiser about parts of ONNX that this model does not use."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches = (images[start : start + CALIBRATION_BATCH] for start in range(0, len(images), CALIBRATION_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def write_int8(folder: Path, images: np.ndarray) -> None:
    """The graphs of ``folder`` once more in int8: text dynamic, image static, a scale for each row of a weight.

    Args:
        images: (N, 3, S, S) float32, prepared: calibration pictures of the training set, which fix the range of each
            activation. Weights are signed, activations unsigned, which x86 and ARM both have instructions for.
    """
    require(len(images) > 0, "calibration", images.shape, "give some pictures of the training set")
    (image, text), (image8, text8) = GRAPHS["float32"], GRAPHS["int8"]
    simplified = folder / f"{image}.simplified"
    with _quiet():
        quantize_dynamic(folder / text, folder / text8, per_channel=True, weight_type=QuantType.QInt8)
        # Symbolic shapes are not needed, and ONNX Runtime's inference of them stumbles over F.normalize.
        quant_pre_process(folder / image, simplified, skip_symbolic_shape=True)
        quantize_static(
            simplified,
            folder / image8,
            _Calibration(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    simplified.unlink()


def golden(model: MobileCLIP) -> dict[str, np.ndarray]:
    """Examples and what ``model``, as trained, makes of them at each step: prepared pictures, tokens, embeddings.

    Two scenes, larger than the model reads and not square, and :data:`GOLDEN_TEXTS`.
    """
    size = model.config.image.image_size
    side = size + size // 2
    drawn = load_pairs("scenes", side, scenes=SceneConfig(2, side, "val", captions="clean"), progress=False)
    pictures = np.array(drawn.images[:2]).transpose(0, 2, 3, 1)[:, : size + size // 4]
    prepared = torch.stack([model.preprocess(Image.fromarray(picture)) for picture in pictures])
    tokens = model.tokenizer(list(GOLDEN_TEXTS))
    with torch.inference_mode():
        images, texts = model.encode_image(prepared, normalize=True), model.encode_text(tokens, normalize=True)
    return {
        "pictures": pictures,
        "prepared": prepared.numpy().astype(np.float16),
        "image_embeddings": images.numpy(),
        "texts": np.array(GOLDEN_TEXTS),
        "tokens": tokens.numpy(),
        "text_embeddings": texts.numpy(),
    }


def export(
    model: nn.Module, folder: str | Path, name: str = "student", calibration: np.ndarray | None = None
) -> dict[str, Any]:
    """Write ``folder``, whole or not at all, after :class:`~mclip.deployed.Deployed` has read it and found it right.

    Args:
        model: a student; of other models nothing says that their halves export and their captions are cut alike.
        folder: must not exist.
        name: of the model, for the manifest and the card.
        calibration: prepared pictures (N, 3, S, S) of the training set; with them, int8 graphs are written as well.

    Returns:
        The manifest: what was exported, and of each file bytes and SHA-256.

    Raises:
        ConfigError: another kind of model, or a folder that is there. DeployError: a graph computes something else.
    """
    folder = Path(folder)
    remedy = "only a student can be exported; for models of open_clip use the exporters that their authors name"
    require(isinstance(model, MobileCLIP), "model", type(model).__name__, remedy)
    require(not folder.exists(), "out_dir", str(folder), "it is there already; delete it or choose another")
    model = copy.deepcopy(model).eval().cpu()
    settings = {
        "size": model.config.image.image_size,
        "crop": "shortest side resized, then the centre",
        "interpolation": "bicubic",
        "channels": "RGB",
        "mean": model.MEAN,
        "std": model.STD,
    }
    forms = ["float32", "int8"] if calibration is not None else ["float32"]
    with atomic_folder(folder) as new:
        write_graphs(model, new)
        if calibration is not None:
            write_int8(new, calibration)
        portable_tokenizer(model.config.text.context_length).save(str(new / TOKENIZER_FILE), pretty=False)
        write_json(new / PREPROCESS_FILE, settings)
        np.savez_compressed(new / GOLDEN_FILE, **golden(model))
        files = {path.name: _describe(path) for path in sorted(new.iterdir())}
        manifest = {
            "kind": KIND,
            "version": VERSION,
            "model": describe_model(name, model),
            "forms": forms,
            "embed_dim": model.config.embed_dim,
            "context_length": model.config.text.context_length,
            "logit_scale": model.logit_scale.exp().item(),
            "files": files,
            "versions": versions() | {"onnx": onnx.__version__},
        }
        write_json(new / MANIFEST_FILE, manifest)
        (new / "README.md").write_text(_card(manifest), encoding="utf-8")
        for form in forms:
            Deployed(new, form)
    return manifest


def _describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _card(manifest: dict[str, Any]) -> str:
    model = manifest["model"]
    rows = [f"| `{name}` | {file['bytes']:,} | `{file['sha256']}` |" for name, file in manifest["files"].items()]
    return "\n".join(
        [
            f"# {model['name']}, for a device",
            "",
            f"Parameters: {model['parameters']:,}. Weights' SHA-256: `{model['sha256']}`. Embeddings of "
            f"{manifest['embed_dim']} numbers; captions of at most {manifest['context_length']} tokens.",
            "",
            "`mclip/deployed.py` reads this folder with numpy, Pillow, onnxruntime and tokenizers. An app in another "
            "language computes the examples of `golden.npz` first: picture, prepared picture and embedding, "
            "text, tokens and embedding have to agree.",
            "",
            "| file | bytes | SHA-256 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def calibration_pictures(model: MobileCLIP, source: str = "", count: int = 256) -> np.ndarray:
    """``count`` prepared pictures (N, 3, S, S) of the training pairs ``source``; drawn scenes if empty."""
    size = model.config.image.image_size
    pairs = load_pairs(source, size, scenes=SceneConfig(count, size, "train"), progress=False)
    return normalise(torch.from_numpy(np.array(pairs.images[:count])), size, model.MEAN, model.STD).contiguous().numpy()


def export_student(
    model_checkpoint: str = "kd",
    out_dir: str = "runs/export",
    int8: bool = True,
    train_data_path: str = "",
    pictures: int = 256,
) -> None:
    """Write a student into a folder that an app can carry, and check it there.

    Args:
        model_checkpoint: base, kd, or a model folder.
        out_dir: a folder that does not exist yet.
        int8: write graphs in 8-bit integers as well, a quarter of the size.
        train_data_path: the pairs that the model was trained on, whose pictures calibrate int8; empty draws scenes.
        pictures: how many of them.
    """
    require(pictures > 0, "pictures", pictures, "calibration needs one or more")
    model, _ = load_model(model_checkpoint)
    remedy = "only a student can be exported: base, kd, or the model folder of a run"
    require(isinstance(model, MobileCLIP), "model_checkpoint", model_checkpoint, remedy)
    calibration = calibration_pictures(model, train_data_path, pictures) if int8 else None
    manifest = export(model, out_dir, Path(model_checkpoint).name, calibration)
    for name, file in manifest["files"].items():
        print(f"{name:16}{file['bytes']:12,} bytes")
    print(f"{out_dir}: written, read again without PyTorch, and checked: {', '.join(manifest['forms'])}")


def evaluate_deployed(reader: Deployed, dataset: ZeroShotSet, name: str, *, seed: int = 0) -> dict[str, Any]:
    """The results record of an exported student: preparation, tokens and graphs are those that a device has.

    The pictures of ``dataset`` are an array (N, 3, H, W), and their labels are known. The record's SHA-256 is over
    those of both graphs.
    """
    start, templates = time.perf_counter(), as_templates(dataset.templates)
    classifier = torch.from_numpy(reader.classifier(dataset.class_names, templates))
    embeddings = torch.from_numpy(reader.encode_images(np.asarray(dataset.images).transpose(0, 2, 3, 1)))
    graphs = "".join(reader.manifest["files"][graph]["sha256"] for graph in reader.graphs)
    described = {**reader.manifest["model"], "name": name, "sha256": hashlib.sha256(graphs.encode()).hexdigest()}
    more = {"templates": templates, "seed": seed}
    return zero_shot_record(dataset, described, embeddings, classifier, dataset.labels, start, **more)
