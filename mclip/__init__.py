"""mclip: distil CLIP into a model that fits a phone.

The package is a set of plain modules, one idea each; the notebooks in ``notebooks/`` introduce them in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what load() needs is imported when it is called: ``import mclip`` stays light
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from PIL.Image import Image

__version__ = "0.1.0"


def load(
    name: str | Path = "kd", device: str | torch.device = "cpu"
) -> tuple[torch.nn.Module, Callable[[Image], torch.Tensor], Callable[[str | list[str]], torch.Tensor]]:
    """A trained model, its preparation of pictures and its tokenizer, as open_clip returns them.

    ``name`` is base, kd, clip, teacher, photo, photo-base or photo-teacher, which ship with the course, or the folder
    of a model. ``preprocess`` takes a PIL picture of any mode to (3, S, S), ``tokenizer`` captions to ids (B, context
    length). Code written for open_clip runs on them; calling the model gives a dict, as with ``output_dict=True``.

    Raises: ConfigError for no such model or device; ModelError or TeacherError for a folder that cannot be read.
    """
    import torch

    from mclip.config import ConfigError
    from mclip.evaluate import input_of
    from mclip.files import model_folder
    from mclip.model import MobileCLIP
    from mclip.teacher import CONFIG_FILE, load_open_clip
    from mclip.text_encoder import Tokenizer

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device={str(device)!r} cannot be used here ({error}); "cpu" always can.') from error
    folder = model_folder(name)
    if (folder / CONFIG_FILE).is_file():
        model, tokenizer = load_open_clip(str(folder))
    else:
        model = MobileCLIP.from_pretrained(folder)
        tokenizer = Tokenizer(model.config.text.context_length, padded=True)
    return model.eval().to(device), input_of(model).transform, tokenizer
