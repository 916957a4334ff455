"""The teacher: any open_clip model, frozen.

Which teacher is one parameter: "scenes" is the small one that ships in ``data/teacher``; a folder holds another
of that kind; any other name is an open_clip architecture, with ``pretrained`` a tag such as "openai" or a file.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import default_bpe
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mclip.config import SHIPPED, closest, require
from mclip.files import DATA, atomic_folder, atomic_path, cache_dir, write_json
from mclip.pairs import normalise

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
        transform: a picture of any size -> what the model reads, (3, S, S); open_clip's own.
    """

    model: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    logit_scale: float
    embed_dim: int
    transform: Callable[[Image], Tensor]

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
    folder = cache_dir() / "weights"
    own = [folder / f"{name}-{pretrained}{suffix}" for suffix in (".safetensors", ".pt", ".bin")]
    file = next((str(file) for file in (Path(pretrained or ""), *own) if file.is_file()), None)
    if file is None and pretrained not in tags:
        raise TeacherError(
            f"teacher {name!r} has no weights {pretrained!r}: {closest(pretrained or '', tags)}, or give a file."
        )
    try:
        model = open_clip.create_model(name, pretrained=file or pretrained, output_dict=True, cache_dir=str(folder))
        return model, open_clip.get_tokenizer(name)
    # What fails may be a file, a connection, or the hub's own errors, which are of any of these kinds.
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        if file:
            raise TeacherError(f"{file}: not usable as weights of {name} ({error}); copy it again.") from error
        source = open_clip.get_pretrained_cfg(name, pretrained)
        places = " and ".join(f"{kind} {source[kind]}" for kind in ("hf_hub", "url") if source.get(kind))
        raise TeacherError(
            f"the weights {pretrained!r} of {name} are neither in {folder} nor could they be downloaded; tried "
            f"{places}: {error}. Download them elsewhere and save them as {own[0]} (or .pt), or give the file's path "
            "as teacher_pretrained; teacher_model='scenes' ships."
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
        image_transform_v2(PreprocessCfg(**settings), is_train=False),
    )


def load_teachers(names: str, pretrained: str | None = None, device: str = "cpu") -> list[Teacher]:
    """One teacher or several, separated by commas, as are their weights; errors as in :func:`load_teacher`."""
    models = [name.strip() for name in names.split(",")]
    weights = [tag.strip() or None for tag in (pretrained or "").split(",")]
    weights += [None] * (len(models) - len(weights))
    remedy = f"give one tag or file for each of the {len(models)} teachers, separated by commas; it may be empty"
    require(len(weights) == len(models), "teacher_pretrained", pretrained, remedy)
    return [load_teacher(model, tag, device) for model, tag in zip(models, weights, strict=True)]


def copy_model(source: str | Path, destination: str | Path) -> None:
    """Copy a model folder, whole or not at all."""
    with atomic_folder(destination) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
