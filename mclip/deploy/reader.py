"""A student as an app carries it: pictures and sentences to embeddings, without PyTorch.

It reads a folder that :mod:`mclip.export` wrote, and needs numpy, Pillow, onnxruntime and tokenizers. Nothing else of
mclip is imported: a copy of this file beside the folder is enough.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

KIND, VERSION = "mclip.export", 1
MANIFEST_FILE, TOKENIZER_FILE, PREPROCESS_FILE, GOLDEN_FILE = (
    "manifest.json",
    "tokenizer.json",
    "preprocess.json",
    "golden.npz",
)
GRAPHS = {"float32": ("image.onnx", "text.onnx"), "int8": ("image-int8.onnx", "text-int8.onnx")}
"""By form, the graph of each half."""
TOLERANCE = {"float32": 1e-4, "int8": 0.1}
"""By form, how far the cosine of an embedding with that of PyTorch's float model may fall below 1."""
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers for what fills a pixel of a resized picture."""

Picture = Image.Image | np.ndarray | str | Path


class DeployError(ValueError):
    """A folder that cannot be used, or that computes something else here; the message names the file."""


def open_picture(picture: Picture) -> Image.Image:
    """A path, a PIL picture or an array (H, W, 3) uint8 as a PIL picture in RGB, 8 bits each.

    A file is turned the right way up first: cameras store what the sensor saw, and a note (EXIF) of how they were held.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DeployError(f"a picture of {picture.dtype} {picture.shape}: give uint8 (H, W, 3), red first.")
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        try:
            with Image.open(picture) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            raise DeployError(f"{picture}: not readable as a picture ({error}).") from error
    return picture.convert("RGB")


def prepare(picture: Picture, settings: dict[str, Any]) -> np.ndarray:
    """What the image graph reads, (3, S, S) float32, by the settings of ``preprocess.json``.

    The shortest side is resized to S, the centre cut out, 0..255 becomes 0..1, and each channel is standardised.
    """
    picture, size = open_picture(picture), settings["size"]
    shortest = min(picture.size)
    resized = picture.resize([size * side // shortest for side in picture.size], FILTERS[settings["interpolation"]])
    left, top = (round((side - size) / 2) for side in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    if settings["channels"] == "BGR":
        pixels = pixels[:, :, ::-1]
    pixels = (pixels - np.float32(settings["mean"])) / np.float32(settings["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class Deployed:
    """Both halves of an exported student.

    Attributes:
        form, graphs: which numbers it computes with, and the files of the image and the text graph.
        manifest: what was exported: model, embed_dim, context_length, logit_scale, files with bytes and SHA-256.
        settings: of :func:`prepare`.
        tokenizer: texts -> token ids; cleaning, start, end and the longest caption are part of it.
    """

    def __init__(self, folder: str | Path, form: str = "float32", threads: int = 0, check: bool = True) -> None:
        """Load and check an exported folder.

        Args:
            form: float32 or int8.
            threads: that a call computes with; 0 leaves it to ONNX Runtime.
            check: compute the examples of ``golden.npz`` and compare.

        Raises:
            DeployError: a file is missing, is not what was exported, or gives other numbers on this device.
        """
        self.folder, self.form = Path(folder), form
        if form not in GRAPHS:
            raise DeployError(f"form={form!r} cannot work: choose {' or '.join(GRAPHS)}.")
        self.graphs = GRAPHS[form]
        self.manifest = self._read_json(MANIFEST_FILE)
        if self.manifest.get("kind") != KIND or self.manifest.get("version") != VERSION:
            raise DeployError(f"{self.folder / MANIFEST_FILE}: not of mclip's export, version {VERSION}; export again.")
        for name in (*self.graphs, TOKENIZER_FILE, PREPROCESS_FILE, GOLDEN_FILE):
            self._require_whole(name)
        self.settings = self._read_json(PREPROCESS_FILE)
        self.tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER_FILE))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._image, self._text = (
            onnxruntime.InferenceSession(self.folder / name, options, providers=["CPUExecutionProvider"])
            for name in self.graphs
        )
        if check:
            self.check()

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DeployError(f"{path}: not readable ({error}); copy the folder again.") from error
        if not isinstance(found, dict):
            raise DeployError(f"{path}: holds no mapping; copy the folder again.")
        return found

    def _require_whole(self, name: str) -> None:
        path, files = self.folder / name, self.manifest["files"]
        if name not in files:
            raise DeployError(f"{path}: not among the exported files; export again, with form {self.form}.")
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DeployError(f"{path}: not readable ({error}); copy the folder again.") from error
        if found != files[name]["sha256"]:
            raise DeployError(f"{path}: not the file that was exported (its SHA-256 differs); copy the folder again.")

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
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        mean = self.encode_texts(prompts).reshape(len(class_names), len(templates), -1).mean(1)
        return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T

    def zero_shot(
        self, pictures: Sequence[Picture], class_names: Sequence[str], templates: Sequence[str] = ("a {}",)
    ) -> np.ndarray:
        """Cosines (N, n_classes) of pictures and classes; the largest in a row is the answer."""
        return self.encode_images(pictures) @ self.classifier(class_names, templates)

    def check(self) -> None:
        """Compute the examples of ``golden.npz`` step by step; DeployError for the first step that is off."""
        for name, text in self.deviations():
            raise DeployError(f"{self.folder / name}: {text}; do not trust this folder on this device.")

    def deviations(self) -> Iterator[tuple[str, str]]:
        """The steps that give something else than when exported: the file that decides the step, and what is off."""
        with np.load(self.folder / GOLDEN_FILE, allow_pickle=False) as golden:
            grey = 1 / (255 * min(self.settings["std"])) + 2e-3  # one level, and the rounding of the stored numbers
            off = np.abs(self.prepare(list(golden["pictures"])) - golden["prepared"].astype(np.float32)).max()
            if off > grey:
                yield PREPROCESS_FILE, f"a prepared picture is off by up to {off:.1f} standard deviations"
            tokens = self.tokenize(golden["texts"].tolist())
            if tokens.shape != golden["tokens"].shape or (tokens != golden["tokens"]).any():
                yield TOKENIZER_FILE, "a text has other tokens"
            images = self.encode_prepared(golden["prepared"].astype(np.float32))
            texts = self.encode_tokens(golden["tokens"])
            steps = zip(self.graphs, (images, texts), ("image_embeddings", "text_embeddings"), strict=True)
            for name, found, key in steps:
                lowest = (found * golden[key]).sum(1).min()
                if not lowest > 1 - TOLERANCE[self.form]:  # not-a-number is wrong as well
                    yield name, f"an embedding has cosine {lowest:.4f} with the exported one"
