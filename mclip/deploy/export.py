"""The student in a folder that an app can carry: ONNX graphs, tokenizer, preparation of pictures, and a self-check.

:mod:`mclip.deploy.reader` reads it without PyTorch. ONNX Runtime writes the int8 graphs, with numbers as by
Jacob et al. 2018 (https://arxiv.org/abs/1712.05877). On request there are graphs for ExecuTorch as well.
"""

import copy
import hashlib
import importlib.metadata
import inspect
import io
import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import yaml
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import ExifTags, Image
from torch import Tensor, nn

from mclip import pictures
from mclip.config import require
from mclip.deploy import reader
from mclip.deploy.fused import fused
from mclip.deploy.reader import GRAPHS, Deployed
from mclip.deploy.tokenizer import portable_tokenizer
from mclip.evaluate import ZeroShotSet, as_templates, zero_shot_record
from mclip.files import atomic_folder, file_hash, write_json
from mclip.model import MAX_LOGIT_SCALE, MobileCLIP
from mclip.pairs import normalise
from mclip.pictures import open_picture
from mclip.results import describe_model, versions

WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
"""The texts of the examples, and the README of the folder."""


class Half(nn.Module):
    """One half of ``model`` as a graph: ``encode`` is "encode_image" or "encode_text"."""

    def __init__(self, model: MobileCLIP, encode: str) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        """Prepared pictures (B, 3, S, S), or token ids (B, T) of any T that the model reads -> (B, d) of length 1."""
        return getattr(self.model, self.encode)(inputs, normalize=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' remarks about what this model does not use, or is not given."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_graphs(model: MobileCLIP, folder: Path, fuse: bool = True) -> None:
    """``image.onnx`` and ``text.onnx`` of the fused ``model``, by PyTorch's exporter on ``torch.export``.

    Batch and length of captions stay open; without ``fuse``, only to compare, they may be those of the example, two
    pictures and two captions of at most three words.
    """
    size, context = model.config.image.image_size, model.config.text.context_length
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=context)
    images, tokens = torch.zeros(2, 3, size, size), model.tokenizer(["a small dog", "a cat"])
    inputs = (("encode_image", "images", images, {0: batch}), ("encode_text", "tokens", tokens, {0: batch, 1: length}))
    deployed = fused(model) if fuse else model.eval()
    for name, (encode, key, example, shape) in zip(GRAPHS["float32"], inputs, strict=True):
        options = {"input_names": [key], "output_names": ["embeddings"], "dynamic_shapes": (shape,), "verbose": False}
        with quiet():
            proto = torch.onnx.export(Half(deployed, encode).eval(), (example,), dynamo=True, **options).model_proto
        inner = proto.graph  # below, the exporter's notes of which line of code made which node are left out
        for part in (proto, inner, *inner.node, *inner.value_info, *inner.input, *inner.output, *inner.initializer):
            part.ClearField("metadata_props")
        onnx.save(proto, folder / name)


class _Calibration(quantization.CalibrationDataReader):
    """``images`` in batches, which are read one at a time: histograms keep all activations of what is read at once."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = [{"images": images[start : start + 32]} for start in range(0, len(images), 32)]

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def slim(graph: Path) -> None:
    """Rewrite the file without what computes nothing: names of nodes, shapes in between, a constant's second copy."""
    proto = onnx.load(graph)
    inner = proto.graph
    inner.ClearField("value_info")
    names = {each.name: each.name for each in (*inner.input, *inner.output)}
    constants: dict[bytes, onnx.TensorProto] = {}
    for constant in inner.initializer:
        name, constant.name = constant.name, ""
        first = constants.setdefault(constant.SerializeToString(), onnx.TensorProto())
        if not first.name:
            first.CopyFrom(constant)
            first.name = f"c{len(constants)}"
        names[name] = first.name
    del inner.initializer[:]
    inner.initializer.extend(constants.values())
    for node in inner.node:
        node.ClearField("name")
        for ends in (node.input, node.output):
            ends[:] = [names.setdefault(name, f"t{len(names)}") if name else "" for name in ends]
    onnx.save(proto, graph)


def write_int8(
    folder: Path,
    images: np.ndarray,
    *,
    bits: Literal[7, 8] = 7,
    first_in_float: bool = True,
    percentile: float = 99.999,
) -> None:
    """The graphs of ``folder`` once more in int8, with a scale for each row of a weight.

    The text half is dynamic: the range of an activation is measured anew in each call. The image half is static: a
    range holds ``percentile`` % of what ``images`` (N, 3, S, S) float32 give, prepared pictures like those of training.
    A single outlier would make the steps of all others coarse. Pictures of a test set would make its result look better
    than it is. Weights are signed and activations unsigned, for which x86 and ARM have instructions. x86
    processors without VNNI add pairs of products in 16 bits, which overflow unless weights keep to 7 bits. The first
    convolution costs little in float.
    """
    (image, text), (image8, text8) = GRAPHS["float32"], GRAPHS["int8"]
    simplified = folder / f"{image}.simplified"
    weights = {"per_channel": True, "weight_type": quantization.QuantType.QInt8, "reduce_range": bits == 7}
    static = {"quant_format": quantization.QuantFormat.QDQ, "activation_type": quantization.QuantType.QUInt8}
    # The stride works for every method, and counts batches.
    ranges = {"CalibPercentile": percentile, "CalibStridedMinMax": 1}
    static |= {"calibrate_method": quantization.CalibrationMethod.Percentile, "extra_options": ranges}
    with quiet():
        quantization.quantize_dynamic(folder / text, folder / text8, **weights)
        # Symbolic shapes are not needed, and ONNX Runtime's inference of them stumbles over F.normalize.
        quant_pre_process(folder / image, simplified, skip_symbolic_shape=True)
        first = next(node.name for node in onnx.load(simplified).graph.node if node.op_type == "Conv")
        static["nodes_to_exclude"] = [first] if first_in_float else []
        try:
            quantization.quantize_static(simplified, folder / image8, _Calibration(images), **static, **weights)
        except ValueError:  # where a layer always gives one number there is no histogram
            static["calibrate_method"] = quantization.CalibrationMethod.MinMax
            quantization.quantize_static(simplified, folder / image8, _Calibration(images), **static, **weights)
    simplified.unlink()
    for name in (image8, text8):
        slim(folder / name)


def write_executorch(model: MobileCLIP, folder: Path, images: np.ndarray | None) -> None:
    """``image.pte`` and ``text.pte`` of the fused ``model`` for ExecuTorch, whose XNNPACK backend computes on CPUs.

    A graph reads one picture, or one caption of any length. With ``images`` as of :func:`write_int8`, int8 graphs are
    written as well, ranges static for pictures and dynamic for text; embeddings of tokens stay in float32.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    size, deployed = model.config.image.image_size, fused(model)
    deployed.image_encoder.to(memory_format=torch.contiguous_format)  # XNNPACK orders channels itself
    tokens = model.tokenizer(["a small brown dog"])
    length = torch.export.Dim("length", min=2, max=model.config.text.context_length)
    inputs = (("encode_image", torch.zeros(1, 3, size, size), None), ("encode_text", tokens, ({1: length},)))
    for form in ("float32", "int8") if images is not None else ("float32",):
        for name, (encode, example, shape) in zip(GRAPHS[f"executorch {form}"], inputs, strict=True):
            dynamic = encode == "encode_text"
            with quiet(), torch.no_grad():
                graph = torch.export.export(Half(deployed, encode).eval(), (example,), dynamic_shapes=shape)
                if form == "int8":
                    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
                    observed = prepare_pt2e(graph.module(), XNNPACKQuantizer().set_global(config))
                    for row in example if dynamic else torch.from_numpy(images):
                        observed(row[None])
                    graph = torch.export.export(convert_pt2e(observed), (example,), dynamic_shapes=shape)
                program = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()]).to_executorch()
            (folder / name).write_bytes(program.buffer)


def golden_pictures(side: int) -> dict[str, bytes]:
    """PNG files of smooth random colours, ``side`` wide and higher than wide, of the kinds that readers get wrong.

    By name: plain colours; a photograph that was taken with the camera turned (EXIF); a palette, partly transparent;
    16-bit grey.
    """
    rng, high = np.random.default_rng(0), side + side // 4
    rough = [Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)) for _ in range(4)]
    plain, turned, palette, grey = (picture.resize((side, high), Image.Resampling.BICUBIC) for picture in rough)
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6  # held a quarter turn to the left
    grey16 = np.asarray(grey.convert("L"), np.uint16) * 257 + rng.integers(0, 200, (high, side), np.uint16)
    files = {name: io.BytesIO() for name in ("plain.png", "turned.png", "palette.png", "grey16.png")}
    plain.save(files["plain.png"], "PNG")
    turned.save(files["turned.png"], "PNG", exif=note)
    palette.quantize(16).save(files["palette.png"], "PNG", transparency=bytes(range(0, 256, 17)))
    Image.fromarray(grey16).save(files["grey16.png"], "PNG")
    return {name: file.getvalue() for name, file in files.items()}


def golden(model: MobileCLIP) -> dict[str, np.ndarray]:
    """Examples and what ``model``, as trained, makes of them at each step.

    ``pictures`` names files, whose bytes are under these names, (F,) uint8. ``prepared`` and ``image_embeddings`` are
    what becomes of them, and ``tokens`` and ``text_embeddings`` of ``texts``.
    """
    files = golden_pictures(model.config.image.image_size * 3 // 2)
    opened = (open_picture(Image.open(io.BytesIO(content))) for content in files.values())
    prepared = torch.stack([model.preprocess(picture) for picture in opened])
    tokens = model.tokenizer(WORDS["golden_texts"])
    with torch.inference_mode():
        images, texts = model.encode_image(prepared, normalize=True), model.encode_text(tokens, normalize=True)
    inputs = {"pictures": np.array(list(files)), "prepared": prepared.numpy().astype(np.float16)}
    inputs |= {"texts": np.array(WORDS["golden_texts"]), "tokens": tokens.numpy()}
    contents = {name: np.frombuffer(content, np.uint8) for name, content in files.items()}
    return {**contents, **inputs, "image_embeddings": images.numpy(), "text_embeddings": texts.numpy()}


def standalone_reader() -> str:
    """The text of :mod:`mclip.deploy.reader`, with what it imports from :mod:`mclip.pictures` word for word."""
    constants = re.findall(r"^(?:UNREADABLE|LONGEST) = .*$", inspect.getsource(pictures), re.MULTILINE)
    functions = "\n\n".join(inspect.getsource(function) for function in (pictures.middle, pictures.as_rgb))
    carried = "\n".join(["import struct", "from PIL import ExifTags, ImageOps\n", *constants, "\n", functions, ""])
    return inspect.getsource(reader).replace("from mclip.pictures import UNREADABLE, as_rgb\n", carried)


def export(
    model: nn.Module,
    folder: str | Path,
    name: str = "student",
    calibration: np.ndarray | None = None,
    executorch: bool = False,
) -> dict[str, Any]:
    """Write ``folder``, whole or not at all, after :class:`Deployed` has read it and found it right.

    Args:
        model: a student.
        folder: must not exist.
        name: of the model, for the manifest and the card.
        calibration: uint8 pictures (N, 3, H, W) like those of training; with them, int8 graphs are written as well.
        executorch: write the graphs for ExecuTorch as well, in the same forms.

    Returns: the manifest: what was exported, and of each file bytes and SHA-256.

    Raises: ConfigError for another kind of model, or a folder that is there; DeployError if a graph computes something
        else, or if ExecuTorch is asked for and not installed.
    """
    folder = Path(folder).expanduser()
    remedy = "only a student can be exported; for models of open_clip use the exporters that their authors name"
    require(isinstance(model, MobileCLIP), "model", type(model).__name__, remedy)
    require(not folder.exists(), "out_dir", str(folder), "it is there already; delete it or choose another")
    some = calibration is None or len(calibration) > 0
    require(some, "calibration", "no pictures", "give some pictures of the training set")
    if executorch:
        reader.require_executorch()
    model = copy.deepcopy(model).eval().cpu()
    size, context = model.config.image.image_size, model.config.text.context_length
    steps = {"size": size, "crop": "shortest side resized, then the centre", "interpolation": "bicubic"}
    forms, prepared = ["float32"], None
    written_by = versions() | {"onnx": onnx.__version__}
    with atomic_folder(folder) as new:
        write_graphs(model, new)
        if calibration is not None:
            prepared = normalise(torch.tensor(np.asarray(calibration)), size, model.MEAN, model.STD)
            prepared = prepared.contiguous().numpy()
            write_int8(new, prepared)
            forms.append("int8")
        if executorch:
            write_executorch(model, new, prepared)
            forms += [f"executorch {form}" for form in forms]
            written_by["executorch"] = importlib.metadata.version("executorch")
        portable_tokenizer(context).save(str(new / reader.TOKENIZER), pretty=False)
        write_json(new / reader.PREPROCESS, steps | {"channels": "RGB", "mean": model.MEAN, "std": model.STD})
        np.savez_compressed(new / reader.GOLDEN, **golden(model))
        hashes = {path.name: file_hash(path)[path.name] for path in sorted(new.iterdir())}
        manifest = {
            "kind": reader.KIND,
            "version": reader.VERSION,
            "model": describe_model(name, model),
            "forms": forms,
            "embed_dim": model.config.embed_dim,
            "context_length": context,
            "logit_scale": min(model.logit_scale.exp().item(), MAX_LOGIT_SCALE),
            "files": {file: {"bytes": (new / file).stat().st_size, "sha256": sha} for file, sha in hashes.items()},
            "versions": written_by,
        }
        write_json(new / reader.MANIFEST, manifest)
        rows = [f"| `{file}` | {about['bytes']:,} | `{about['sha256']}` |" for file, about in manifest["files"].items()]
        (new / "README.md").write_text(WORDS["card"].format(**manifest, rows="\n".join(rows)), encoding="utf-8")
        (new / "reader.py").write_text(standalone_reader(), encoding="utf-8")
        for form in forms:
            Deployed(new, form)
    return manifest


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
