"""A student as an app carries it: pictures and sentences to embeddings, without PyTorch.

It reads a folder that :mod:`mclip.deploy.export` wrote. The folder holds a copy, ``reader.py``, which needs numpy,
Pillow, onnxruntime and tokenizers, and nothing of mclip. Only for graphs of ExecuTorch (``.pte``) does it need the
package executorch, and with it PyTorch.
"""

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from mclip.pictures import UNREADABLE, as_rgb

KIND, VERSION = "mclip.export", 2
MANIFEST, TOKENIZER, PREPROCESS, GOLDEN = "manifest.json", "tokenizer.json", "preprocess.json", "golden.npz"
GRAPHS = {
    "float32": ("image.onnx", "text.onnx"),
    "int8": ("image-int8.onnx", "text-int8.onnx"),
    "int8 image": ("image-int8.onnx", "text.onnx"),
    "int8 text": ("image.onnx", "text-int8.onnx"),
    "executorch float32": ("image.pte", "text.pte"),
    "executorch int8": ("image-int8.pte", "text-int8.pte"),
}
"""By form, the graph of each half. "int8 image" and "int8 text" keep the other half in float32."""
Picture = Image.Image | np.ndarray | str | Path


class DeployError(ValueError):
    """A folder that cannot be used, or that computes something else here; the message names the file."""


def open_picture(picture: Picture) -> Image.Image:
    """A path, a PIL picture or an array (H, W, 3) uint8, as :func:`as_rgb` makes it.

    Raises: DeployError, which names the file where it is known.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DeployError(f"a picture of {picture.dtype} {picture.shape}: give uint8 (H, W, 3), red first.")
        picture = Image.fromarray(picture)
    given = isinstance(picture, Image.Image)
    try:
        return as_rgb(picture if given else Image.open(picture))
    except UNREADABLE as error:
        name = getattr(picture, "filename", "") or "a picture" if given else picture
        raise DeployError(f"{name}: not readable as a picture ({error}).") from error


def prepare(picture: Picture, settings: dict[str, Any]) -> np.ndarray:
    """What the image graph reads, (3, S, S) float32, by the settings of ``preprocess.json``.

    The shortest side is resized to S, the centre cut out, 0..255 becomes 0..1, and each channel is standardised.
    """
    picture, size = open_picture(picture), settings["size"]
    kernel = Image.Resampling[settings["interpolation"].upper()]
    resized = picture.resize([size * side // min(picture.size) for side in picture.size], kernel)
    left, top = (round((side - size) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    if settings["channels"] == "BGR":
        pixels = pixels[:, :, ::-1]
    pixels = (pixels - np.float32(settings["mean"])) / np.float32(settings["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def require_executorch() -> None:
    """Raises: DeployError, with the remedy, if the package executorch is not installed."""
    if importlib.util.find_spec("executorch") is None:
        remedy = "run uv sync --extra executorch (or pip install 'mclip[executorch]')"
        raise DeployError(f"graphs of ExecuTorch (.pte) need the package executorch, which is not installed: {remedy}.")


class ExecuTorchSession:
    """A ``.pte`` file behind the one method of ONNX Runtime's session that :class:`Deployed` calls.

    The graph computes one row at a time. ExecuTorch's Python package takes and gives PyTorch's tensors.
    """

    def __init__(self, graph: Path, threads: int = 0) -> None:
        """Raises: DeployError if executorch is not installed, or cannot load ``graph``."""
        require_executorch()
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        if threads:
            _unsafe_reset_threadpool(threads)  # of the process; unsafe only while another graph computes
        try:
            self.program = Runtime.get().load_program(graph)  # kept: the method does not own its memory
            self.method = self.program.load_method("forward")
        except RuntimeError as error:
            raise DeployError(
                f"{graph}: ExecuTorch cannot load it ({error}); export again with its version."
            ) from error

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One input (N, ...) by any name -> one output (N, d)."""
        import torch

        (rows,) = (torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values())
        # The graph writes each answer over the last one, so each is copied.
        return [np.concatenate([self.method.execute([row])[0].numpy().copy() for row in rows.split(1)])]


def session(graph: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession | ExecuTorchSession:
    """A graph, from a file or its bytes, ready to compute on the CPU; a file ``.pte`` is read by ExecuTorch.

    0 threads leave their number to the engine; in ExecuTorch it is one for all graphs of the process.
    """
    if isinstance(graph, Path) and graph.suffix == ".pte":
        return ExecuTorchSession(graph, threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Deployed:
    """Both halves of an exported student.

    Attributes:
        form, graphs: which numbers it computes with, and the files of the image and the text graph.
        manifest: what was exported: model, embed_dim, context_length, logit_scale, files with bytes and SHA-256.
        settings: of :func:`prepare`.
        tokenizer: texts -> token ids; cleaning, start, end and the longest caption are part of it.
    """

    def __init__(self, folder: str | Path, form: str = "float32", threads: int = 0, check: bool = True) -> None:
        """Load an exported folder, and compare it with the examples of ``golden.npz`` unless ``check`` is False.

        ``form`` is float32 or int8, or "int8 image" or "int8 text" for one half in int8, or "executorch float32" or
        "executorch int8". A call computes with ``threads``; 0 leaves their number to the engine.

        Raises: DeployError if a file is missing, is not what was exported, or gives other numbers on this device, or if
            executorch is needed and not installed.
        """
        self.folder, self.form = Path(folder).expanduser(), form
        if form not in GRAPHS:
            raise DeployError(f"form={form!r} cannot work: choose {', '.join(GRAPHS)}.")
        self.graphs = GRAPHS[form]
        self.manifest = self._read_json(MANIFEST)
        kind, version = self.manifest.get("kind"), self.manifest.get("version")
        if (kind, version) != (KIND, VERSION):
            text = f"written by version {version} of {kind}, and this reader reads version {VERSION} of {KIND}"
            raise self._error(MANIFEST, f"{text}; export again, or use the reader of that version.")
        for name in (*self.graphs, TOKENIZER, PREPROCESS, GOLDEN):
            if name not in self.manifest["files"]:
                raise self._error(name, f"not among the exported files; export again, with form {form}.")
            if hashlib.sha256(self._read(name)).hexdigest() != self.manifest["files"][name]["sha256"]:
                raise self._error(name, "not the file that was exported (its SHA-256 differs); copy the folder again.")
        self.settings = self._read_json(PREPROCESS)
        self.tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        self._image, self._text = (session(self.folder / name, threads) for name in self.graphs)
        if check:
            self.check()

    def _error(self, name: str, text: str) -> DeployError:
        return DeployError(f"{self.folder / name}: {text}")

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise self._error(name, f"not readable ({error}); copy the folder again.") from error

    def _read_json(self, name: str) -> dict[str, Any]:
        content = self._read(name)
        try:
            return dict(**json.loads(content))
        except (ValueError, TypeError) as error:  # TypeError: JSON of another shape
            raise self._error(name, f"not JSON that holds a mapping ({error}); copy the folder again.") from error

    def prepare(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Pictures -> (N, 3, S, S) float32, by :func:`prepare`."""
        return np.stack([prepare(picture, self.settings) for picture in pictures])

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> token ids (N, T) int64, T the longest of the call, padded on the right with 0."""
        return np.array([row.ids for row in self.tokenizer.encode_batch(list(texts))], np.int64)

    def encode_prepared(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, S, S) from :meth:`prepare` -> embeddings (N, d) of length 1."""
        return self._image.run(None, {"images": images})[0]

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """(N, T) from :meth:`tokenize` -> embeddings (N, d) of length 1."""
        return self._text.run(None, {"tokens": tokens})[0]

    def encode_images(self, pictures: Sequence[Picture], batch_size: int = 32) -> np.ndarray:
        """Paths, PIL pictures or arrays (H, W, 3) uint8 -> embeddings (N, d) float32 of length 1."""
        return self._in_batches(pictures, batch_size, lambda part: self.encode_prepared(self.prepare(part)))

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Texts -> embeddings (N, d) float32 of length 1."""
        return self._in_batches(texts, batch_size, lambda part: self.encode_tokens(self.tokenize(part)))

    def _in_batches(self, items: Sequence[Any], size: int, encode: Callable[[Any], np.ndarray]) -> np.ndarray:
        if isinstance(items, str | Path | Image.Image):
            raise DeployError(f"{items!r} alone: give a list, also of one.")
        parts = [encode(items[start : start + size]) for start in range(0, len(items), size)]
        return np.concatenate(parts) if parts else np.zeros((0, self.manifest["embed_dim"]), np.float32)

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = ("a {}",)) -> np.ndarray:
        """Class embeddings (d, n_classes): the mean over templates, normalised (Radford et al. 2021, 3.1.4)."""
        if isinstance(class_names, str) or isinstance(templates, str) or not all("{}" in text for text in templates):
            raise DeployError("class_names and templates are lists, and each template has {} in the name's place.")
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        mean = self.encode_texts(prompts).reshape(len(class_names), len(templates), -1).mean(1)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T

    def zero_shot(
        self, pictures: Sequence[Picture], class_names: Sequence[str], templates: Sequence[str] = ("a {}",)
    ) -> np.ndarray:
        """Cosines (N, n_classes) of pictures and classes; the largest in a row is the answer."""
        return self.encode_images(pictures) @ self.classifier(class_names, templates)

    def check(self) -> None:
        """Compute the examples of ``golden.npz`` step by step.

        Raises: DeployError for the first step that gives something else than when exported. It names the file that
            decides the step.
        """
        trust = "; do not trust this folder on this device."
        with np.load(self.folder / GOLDEN, allow_pickle=False) as golden:
            grey = 1 / (255 * min(self.settings["std"])) + 2e-3  # one level, and the rounding of the stored numbers
            inputs = golden["prepared"].astype(np.float32)
            for name, expected in zip(golden["pictures"].tolist(), inputs, strict=True):
                off = np.abs(prepare(Image.open(io.BytesIO(golden[name].tobytes())), self.settings) - expected).max()
                if not off <= grey:
                    text = f"the picture {name} is off by up to {off:.1f} standard deviations"
                    raise self._error(PREPROCESS, text + trust)
            tokens = self.tokenize(golden["texts"].tolist())
            if not np.array_equal(tokens, golden["tokens"]):
                raise self._error(TOKENIZER, "a text has other tokens" + trust)
            images = self.encode_prepared(inputs) * golden["image_embeddings"]
            texts = self.encode_tokens(tokens) * golden["text_embeddings"]
            for name, products in zip(self.graphs, (images, texts), strict=True):
                cosine = products.sum(1).min()
                if not cosine > 1 - (0.1 if "int8" in name else 1e-4):  # not-a-number is not near
                    raise self._error(name, f"an embedding has cosine {cosine:.4f} with the exported one" + trust)
