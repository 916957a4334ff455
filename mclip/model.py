"""The student: an image encoder and a text encoder that meet in one embedding space, and its files."""

import dataclasses
import math
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from mclip.config import ModelConfig, from_mapping
from mclip.files import atomic_path, file_hash, read_json, write_json
from mclip.image_encoder import ImageEncoder
from mclip.pictures import open_picture
from mclip.text_encoder import TextEncoder, Tokenizer

MAX_LOGIT_SCALE = 100.0
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
KIND = "mclip.MobileCLIP"


class ModelError(ValueError):
    """A model that cannot be read or written; the message names the file and the remedy."""


def in_fp16(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The weights ``state`` in fp16; ModelError, which names ``file``, where a number is too large for it."""
    halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if lost := [key for key, value in halved.items() if not value.isfinite().all()]:
        raise ModelError(f"{file}: fp16 cannot hold {lost}; save without half=True.")
    return halved


class ProjectionHead(nn.Module):
    """Linear shortcut + (Linear -> GELU -> Linear) -> LayerNorm, from an encoder's width to the embedding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shortcut = nn.Linear(in_features, out_features)
        first, second = nn.Linear(in_features, out_features), nn.Linear(out_features, out_features)
        self.residual = nn.Sequential(first, nn.GELU(), second)
        self.norm = nn.LayerNorm(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return self.norm(self.shortcut(x) + self.residual(x))


class MobileCLIP(nn.Module):
    """MobileNetV3-Large and a Lite Transformer, a projection head on each; methods and keys as open_clip's ``CLIP``."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each channel of ImageNet's pictures

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config.image)
        self.text_encoder = TextEncoder(config.text)
        self.image_projection = ProjectionHead(self.image_encoder.features, config.embed_dim)
        self.text_projection = ProjectionHead(self.text_encoder.features, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # a logarithm (Radford et al. 2021)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # of the sigmoid loss alone (Zhai et al. 2023)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images (B, 3, S, S), prepared as ``preprocess`` does -> embeddings (B, embed_dim)."""
        embedding = self.image_projection(self.image_encoder(images))
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, T) from ``tokenizer`` -> embeddings (B, embed_dim)."""
        embedding = self.text_projection(self.text_encoder(tokens))
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Both embeddings (B, embed_dim) of a batch of pairs, of length 1, and what the losses need besides."""
        image, text = self.image_encoder(images), self.text_encoder(tokens)
        scale = self.logit_scale.exp()
        return {
            "image_features": F.normalize(self.image_projection(image), dim=-1),
            "text_features": F.normalize(self.text_projection(text), dim=-1),
            # The value is capped, the gradient is not: after clamp() a scale above 100 could never come back.
            "logit_scale": scale - (scale - MAX_LOGIT_SCALE).clamp(min=0).detach(),
            "logit_bias": self.logit_bias,
            "image_penultimate": image,
            "text_penultimate": text,
        }

    @property
    def preprocess(self) -> v2.Compose:
        """PIL picture of any mode -> (3, S, S) for evaluation: shortest side resized, then the centre cut out."""
        size = self.config.image.image_size
        cut = [v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
        scale = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.MEAN, self.STD)]
        return v2.Compose([open_picture, *cut, *scale])

    @property
    def tokenizer(self) -> Tokenizer:
        """Captions -> token ids, for this model's context length."""
        return Tokenizer(self.config.text.context_length)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write ``model.safetensors``, and ``config.json`` with its SHA-256; ``half`` stores fp16, or ModelError."""
        folder = Path(folder).expanduser()
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        try:
            with atomic_path(folder / WEIGHTS_FILE) as temporary:
                save_file(in_fp16(state, folder / WEIGHTS_FILE) if half else state, temporary)
            record = {"kind": KIND, "config": dataclasses.asdict(self.config)}
            write_json(folder / CONFIG_FILE, {**record, "sha256": file_hash(folder / WEIGHTS_FILE)})
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder}: cannot write here ({error}); choose another folder.") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that ``save_pretrained`` wrote, in fp32 and in evaluation mode; ModelError if it cannot be read."""
        folder = Path(folder).expanduser()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                missing = f"no {name} in it" if folder.is_dir() else "no such folder"
                raise ModelError(f"{folder}: {missing}; give a folder that save_pretrained wrote.")
        path, settings = folder / WEIGHTS_FILE, folder / CONFIG_FILE
        try:
            record = read_json(settings)
            if not isinstance(record, dict) or record.get("kind") != KIND:
                raise ValueError("another kind of model")
            stored, sha256 = from_mapping(ModelConfig, record.get("config")), record.get("sha256")
        except (OSError, ValueError) as error:  # a ConfigError too
            raise ModelError(f"{settings}: not the settings of a student ({error}); copy or save it again.") from error
        try:
            if sha256 and sha256 != file_hash(path):  # an older folder has none
                raise OSError(f"its SHA-256 is not that of {CONFIG_FILE}")
            state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
            model = cls(stored)
            model.load_state_dict(state)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or not safetensors ({error}); copy or save it again.") from error
        except RuntimeError as error:
            raise ModelError(f"{path} does not fit {CONFIG_FILE}; save the model again. {error}") from error
        return model.eval()
