"""The teacher: any open_clip model, frozen.

"scenes" is the small one that ships in ``data/teacher``; a folder holds another of that kind; any other name is an
open_clip architecture, with ``pretrained`` a tag such as "openai" or a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import open_clip
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from mclip.config import SHIPPED, closest
from mclip.evaluate import input_of
from mclip.files import DATA, cache_dir, file_hash, read_json
from mclip.pairs import normalise

CONFIG_FILE, WEIGHTS_FILE, MERGES_FILE = "open_clip_config.json", "open_clip_model.safetensors", "merges.txt.gz"
# What open_clip raises for weights that cannot be loaded or downloaded: a file's, a connection's, the hub's errors.
UNLOADABLE = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError)
Tokenize = Callable[[Sequence[str]], Tensor]


class TeacherError(ValueError):
    """A teacher that cannot be loaded or used; the message says what was tried and what would be right."""


@dataclass(frozen=True)
class Teacher:
    """A frozen open_clip model, in evaluation mode, with its own tokenizer and preparation of pictures."""

    model: nn.Module
    tokenize: Tokenize  # captions -> ids (B, T)
    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Image], Tensor]  # a picture of any size -> what the model reads, (3, S, S)
    logit_scale: float  # the scale itself, not its logarithm
    embed_dim: int  # width D of the embeddings

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) -> what the model reads."""
        return normalise(images, self.image_size, self.mean, self.std)


def load_teacher(name: str = SHIPPED, pretrained: str | None = None, device: str | torch.device = "cpu") -> Teacher:
    """The teacher called ``name``, frozen. TeacherError names what was tried and the nearest names."""
    model, tokenize = load_open_clip(name, pretrained)
    model = model.to(device).float().eval().requires_grad_(False)
    with torch.inference_mode():
        width = model.encode_text(tokenize(["a"]).to(device)).shape[1]
    label = name if pretrained is None else f"{name}/{Path(pretrained).stem}"
    return Teacher(model, tokenize, label, *input_of(model), model.logit_scale.exp().item(), width)


def load_open_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, Tokenize]:
    """An open_clip model, whose ``forward`` returns a dict, and its tokenizer; names as in the module's text."""
    folder = DATA / "teacher" if name == SHIPPED else Path(name).expanduser()
    if name == SHIPPED or folder.is_dir():
        return _from_folder(folder)
    if name in open_clip.list_models():
        return _from_architecture(name, pretrained or "")
    raise TeacherError(f"no teacher {name!r}: {closest(name, [SHIPPED, *open_clip.list_models()])}, or give a folder.")


def _from_folder(folder: Path) -> tuple[nn.Module, Tokenize]:
    if not (folder / CONFIG_FILE).is_file():
        remedy = "train a teacher with `python -m mclip teacher`, or name another"
        raise TeacherError(f"{folder}: no {CONFIG_FILE} in it; {remedy}.")
    own_words = {"bpe_path": str(folder / MERGES_FILE)} if (folder / MERGES_FILE).is_file() else {}
    try:
        stored = read_json(folder / CONFIG_FILE).get("sha256")
        if stored and stored != file_hash(folder / WEIGHTS_FILE):  # a folder that open_clip itself wrote names none
            raise ValueError(f"damaged: the SHA-256 of {WEIGHTS_FILE} is not the one in {CONFIG_FILE}")
        model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
        return model, open_clip.get_tokenizer(f"local-dir:{folder}", **own_words)
    except (*UNLOADABLE, TypeError, AttributeError) as error:
        unusable = f"not loadable as an open_clip model ({error}); copy or train it again"
        raise TeacherError(f"{folder}: {unusable}.") from error


def _from_architecture(name: str, pretrained: str) -> tuple[nn.Module, Tokenize]:
    tags, folder = open_clip.list_pretrained_tags_by_model(name), str(cache_dir() / "weights")
    file = Path(pretrained).expanduser()
    if not file.is_file() and pretrained not in tags:
        remedy = f"{closest(pretrained, tags)}, or give a file"
        raise TeacherError(f"teacher {name!r} has no weights {pretrained or None!r}: {remedy}.")
    weights = str(file) if file.is_file() else pretrained
    try:
        model = open_clip.create_model(name, pretrained=weights, output_dict=True, cache_dir=folder)
        return model, open_clip.get_tokenizer(name)
    except UNLOADABLE as error:
        if file.is_file():
            raise TeacherError(f"{file}: not usable as weights of {name} ({error}); copy it again.") from error
        source = open_clip.get_pretrained_cfg(name, pretrained)
        tried = " and ".join(f"{kind} {source[kind]}" for kind in ("hf_hub", "url") if source.get(kind))
        raise TeacherError(
            f"the weights {pretrained!r} of {name} are not in {folder}, and {tried} failed: {error}. Download them "
            "elsewhere and give the file's path as teacher_pretrained; teacher_model='scenes' ships."
        ) from error
