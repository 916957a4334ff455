"""The teacher: any open_clip model, frozen, and its embeddings of a data set, computed once and kept.

Which teacher is one parameter: "scenes" is the small one that ships in ``data/teacher``; a folder holds another
of that kind; any other name is an open_clip architecture, with ``pretrained`` a tag such as "openai" or a file.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import default_bpe
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import closest
from .data import Pairs, Targets, normalise
from .files import DATA, atomic_folder, atomic_path, cache_dir, content_key, missing_folder, write_json
from .readers import decode_images
from .results import weights_sha256

SHIPPED = "scenes"
MERGES_FILE, CONFIG_FILE, WEIGHTS_FILE = "merges.txt.gz", "open_clip_config.json", "open_clip_model.safetensors"
SMALL_VOCABULARY_MERGES = 4096


class TeacherError(ValueError):
    """A teacher that cannot be loaded or used; the message says what was tried and what would be right."""


@dataclass(frozen=True)
class Teacher:
    """A frozen open_clip model with its own tokenizer and preparation of pictures.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenize: captions -> token ids (B, T), the teacher's own.
        name: for messages and results files.
        image_size, mean, std: what the model's pictures must look like.
        logit_scale: exp of the learned temperature.
        embed_dim: width D of its embeddings.
    """

    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    logit_scale: float
    embed_dim: int

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) -> what the model reads."""
        return normalise(images, self.image_size, self.mean, self.std)


def small_clip_config(vision: dict[str, Any], embed_dim: int = 256, image_size: int = 64) -> dict[str, Any]:
    """An open_clip configuration with a small text tower, for training from scratch on a CPU."""
    text = {
        "context_length": 32,
        "vocab_size": 512 + SMALL_VOCABULARY_MERGES + 2,
        "width": 128,
        "heads": 4,
        "layers": 2,
    }
    model = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": image_size, **vision},
        "text_cfg": text,
        "custom_text": True,
    }
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


TEACHER_CONFIG = small_clip_config({"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"})
"""The teacher that ships: a ten-layer ResNet image tower (timm)."""
PLAIN_CLIP_CONFIG = small_clip_config({"layers": 4, "width": 128, "head_width": 32, "patch_size": 16})
"""The plain CLIP of the comparison: a small Vision Transformer."""


def write_untrained(folder: str | Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write an open_clip model folder with random weights: configuration, weights, and its byte-pair merges.

    The merges are the first 4,096 of CLIP's own, so that the token embedding is small.
    """
    with atomic_folder(folder) as temporary:
        lines = (
            gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")[: SMALL_VOCABULARY_MERGES + 1]
        )
        with gzip.GzipFile(temporary / MERGES_FILE, "wb", mtime=0) as handle:
            handle.write("\n".join(lines).encode("utf-8"))
        torch.manual_seed(seed)
        write_json(temporary / CONFIG_FILE, config)
        model = open_clip.CustomTextCLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})
        save_file(model.state_dict(), temporary / WEIGHTS_FILE)


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Replace the weights in a model folder, in fp16."""
    with atomic_path(Path(folder) / WEIGHTS_FILE) as temporary:
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, temporary)


def load_open_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable[[Sequence[str]], Tensor]]:
    """An open_clip model, whose ``forward`` returns a dict, and its tokenizer; names as in the module's text."""
    folder = DATA / "teacher" if name == SHIPPED else Path(name)
    if (folder / CONFIG_FILE).is_file():
        merges = {"bpe_path": str(folder / MERGES_FILE)} if (folder / MERGES_FILE).is_file() else {}
        source = f"local-dir:{folder}"
        try:
            model = open_clip.create_model(source, output_dict=True)
            return model, open_clip.get_tokenizer(source, **merges)
        except (ValueError, RuntimeError, OSError, KeyError, SafetensorError) as error:
            raise TeacherError(
                f"{folder}: not loadable as an open_clip model ({error}); copy or train it again."
            ) from error
    if name == SHIPPED or folder.is_dir():
        raise TeacherError(
            f"{folder}: no {CONFIG_FILE} in it; train a teacher with `python -m mclip teacher`, or name another."
        )
    if name not in open_clip.list_models():
        raise TeacherError(
            f"no teacher {name!r}: {closest(name, [SHIPPED, *open_clip.list_models()])}, or give a folder."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained or "").is_file():
        raise TeacherError(
            f"teacher {name!r} has no weights {pretrained!r}: {closest(pretrained or '', tags)}, or give a file."
        )
    try:
        return open_clip.create_model(name, pretrained=pretrained, output_dict=True), open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise TeacherError(
            f"the weights {pretrained!r} of {name} could not be had ({error}). Download them elsewhere and give "
            "the file's path as teacher_pretrained, or use teacher='scenes'."
        ) from error


def load_teacher(name: str = SHIPPED, pretrained: str | None = None, device: str | torch.device = "cpu") -> Teacher:
    """The teacher called ``name``, frozen. TeacherError names what was tried and the nearest names."""
    model, tokenize = load_open_clip(name, pretrained)
    model = model.to(device).float().eval().requires_grad_(False)
    settings = open_clip.get_model_preprocess_cfg(model)
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    with torch.inference_mode():
        width = model.encode_text(tokenize(["a"]).to(device)).shape[1]
    label = name if pretrained is None else f"{name}/{Path(pretrained).stem}"
    return Teacher(
        model,
        tokenize,
        label,
        size,
        tuple(settings["mean"]),
        tuple(settings["std"]),
        model.logit_scale.exp().item(),
        width,
    )


def _embed(
    teacher: Teacher,
    encode: Callable[..., Tensor],
    inputs: Callable[[int, int], Tensor],
    count: int,
    label: str,
    progress: bool,
    size: int = 256,
) -> np.ndarray:
    """``count`` normalised embeddings in fp16; ``inputs(start, stop)`` prepares a batch."""
    device = next(teacher.model.parameters()).device
    teacher.model.eval()
    rows = np.empty((count, teacher.embed_dim), np.float16)
    with torch.inference_mode():
        for start in tqdm(range(0, count, size), f"teacher {label}", disable=not progress, leave=False):
            stop = min(start + size, count)
            rows[start:stop] = encode(inputs(start, stop).to(device), normalize=True).half().cpu().numpy()
    return rows


def teacher_targets(teacher: Teacher, pairs: Pairs, progress: bool = True) -> Targets:
    """The teacher's embeddings of every picture and every caption of ``pairs``, from the cache where they are.

    Kept as fp16, memory-mapped, under a key of the teacher's layers, weights and tokens, the data and the view (the
    teacher's own preparation), so that targets of another teacher or of edited data are never used.

    Raises: TeacherError if all captions look alike to the teacher: distilling such targets teaches nothing.
    """
    view = (teacher.image_size, teacher.mean, teacher.std)
    # Layers without weights (activations) and the tokenizer's merges show in neither the weights nor the data.
    sample = teacher.tokenize([own[0] for own in pairs.captions[:256]]).tolist()
    identity = (str(teacher.model), sample, weights_sha256(teacher.model))
    folder = cache_dir() / "targets" / content_key("targets", identity, pairs.key, view)
    with missing_folder(folder) as temporary:
        if temporary:
            _write_targets(temporary, teacher, pairs, progress)
    images, texts = (np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("images", "texts"))
    stored = Targets(images, texts, teacher.logit_scale, folder.name)
    check_targets(stored)
    return stored


def _write_targets(folder: Path, teacher: Teacher, pairs: Pairs, progress: bool) -> None:
    """texts.npy and images.npy: a caption that comes several times is embedded once."""
    images = decode_images(pairs.files, teacher.image_size, progress=progress)[0] if pairs.files else pairs.images
    captions = [caption for own in pairs.captions for caption in own]
    texts = sorted(set(captions))
    place = {text: row for row, text in enumerate(texts)}

    def tokens_of(start: int, stop: int) -> Tensor:
        return teacher.tokenize(texts[start:stop])

    def view_of(start: int, stop: int) -> Tensor:
        return teacher.prepare(torch.from_numpy(np.array(images[start:stop])))

    unique = _embed(teacher, teacher.model.encode_text, tokens_of, len(texts), "captions", progress)
    np.save(folder / "texts.npy", unique[[place[text] for text in captions]])
    pictures = _embed(teacher, teacher.model.encode_image, view_of, len(images), "pictures", progress)
    np.save(folder / "images.npy", pictures)


def check_targets(targets: Targets) -> None:
    """TeacherError unless the text targets differ from caption to caption."""
    sample = torch.from_numpy(targets.texts[:: max(1, len(targets.texts) // 512)].astype(np.float32))
    if len(sample) > 1 and (sample - sample[0]).abs().max() < 1e-3:
        raise TeacherError("the teacher's embeddings of all captions are equal, so they hold nothing to distil: "
                           "it must be given the captions of the data, not one constant text.")  # fmt: skip


def copy_model(source: str | Path, destination: str | Path) -> None:
    """Copy a model folder, whole or not at all."""
    with atomic_folder(destination) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
