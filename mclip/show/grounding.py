"""Where a model looks when it reads a phrase: Grad-CAM of their similarity, its scores, and explorers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

from mclip.config import closest, require
from mclip.evaluate import embed_images, embed_texts, evaluating, input_of
from mclip.image_encoder import STAGES
from mclip.pictures import square
from mclip.results import ResultError
from mclip.show import widgets
from mclip.show.style import COLOURS, HATCHES, LABELS, PALETTE, NotebookFigure, figure, grouped_bars, label


def stage_names() -> list[str]:
    """The stage of each layer of the student's trunk: "stem", "stage1" to "stage5" by resolution, "last"."""
    names, stage = ["stem"], 1
    for *_, stride in STAGES:
        stage += stride > 1
        names.append(f"stage{stage}")
    return [*names, "last"]


def map_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` whose outputs are maps of the picture, by name, from fine to coarse.

    Of the student the last one of each stage, of timm's ResNets and EfficientNets their stages, of a Vision Transformer
    its blocks but the last, whose patches no longer reach the embedding.
    """
    if hasattr(model, "image_encoder"):
        stages = dict(zip(stage_names(), model.image_encoder.trunk, strict=True))  # of a stage the last layer stays
        return {name: layer for name, layer in stages.items() if name.startswith("stage")}
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "layer1"):
        return {name: getattr(trunk, name) for name in ("act1", "layer1", "layer2", "layer3", "layer4")}
    blocks = list(trunk.blocks if trunk is not None else model.visual.transformer.resblocks)
    if not hasattr(trunk, "conv_head"):
        del blocks[-1]
    return {f"block{number}": block for number, block in enumerate(blocks, start=1)}


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) of the cosine of each picture with its text: (B, h, w).

    The channels A_k of ``layer`` are summed with the means over the map of the gradient as their weights, and what
    is negative is cut off. Each map is scaled to a maximum of 1; one without a positive place stays 0. ``images``
    (B, 3, S, S) are prepared for the model, ``texts`` (B, d) normalised.
    """
    held: list[Tensor] = []

    def hold(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[0]

    with layer.register_forward_hook(hold), evaluating(model) as device, torch.inference_mode(False):
        # Tensors that were made in inference mode cannot be part of a gradient: copies can.
        pictures, goals = images.clone().to(device), texts.clone().to(device)
        with torch.enable_grad():
            similarity = (model.encode_image(pictures, normalize=True) * goals).sum()
        (gradient,) = torch.autograd.grad(similarity, held[0])
    maps = held[0].detach()
    if maps.ndim == 3:  # a transformer's tokens, the class token before the patches
        side = math.isqrt(maps.shape[1])
        maps, gradient = (x[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for x in (maps, gradient))
    cam = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).relu().cpu()
    return cam / cam.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]


def phrase_maps(
    model: nn.Module, tokenizer: Any, images: Tensor, phrases: Sequence[str], layer: str, size: int
) -> Tensor:
    """Maps (N, size, size) from 0 to 1 of pictures (N, 3, S, S), prepared, each for its own phrase, bilinear.

    ConfigError for an empty phrase, an unknown ``layer``, or another number of phrases than of pictures.
    """
    require(len(phrases) == len(images), "phrases", len(phrases), f"give one for each of {len(images)} pictures")
    layers = map_layers(model)
    require(layer in layers, "layer", layer, closest(layer, layers))
    require(all(phrase.strip() for phrase in phrases), "phrase", "", "write what to look for, such as: a red star")
    texts = embed_texts(model, tokenizer, phrases)
    parts = zip(images.split(64), texts.split(64), strict=True)
    maps = torch.cat([grad_cam(model, layers[layer], image, text) for image, text in parts])
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def map_of(model: nn.Module, tokenizer: Any, image: np.ndarray, phrase: str, layer: str) -> np.ndarray:
    """The map (H, W) of one picture, uint8 (3, H, W), for one phrase; ConfigError as :func:`phrase_maps`."""
    prepared = input_of(model).transform(Image.fromarray(np.asarray(image).transpose(1, 2, 0)))[None]
    return phrase_maps(model, tokenizer, prepared, [phrase], layer, image.shape[-1])[0].numpy()


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """The pointing game (Zhang et al. 2018): whether the highest place of a map (N, S, S) lies in the mask, (N,).

    Of several equal places the middle one counts, because an interpolated map has plateaus; a map of zeros misses.
    """
    flat, inside = maps.flatten(1), masks.flatten(1)
    top = flat.amax(1, keepdim=True)
    order = (flat == top).cumsum(1)
    middle = (order >= (order[:, -1:] + 1) // 2).float().argmax(1)
    return inside[torch.arange(len(maps)), middle] & (top[:, 0] > 0)


def overlap(maps: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """Intersection over union (N,) of where a map exceeds ``threshold`` times its maximum, and the mask."""
    chosen = maps > threshold * maps.flatten(1).amax(1)[:, None, None]
    union = (chosen | masks).flatten(1).sum(1)
    return (chosen & masks).flatten(1).sum(1) / union.clamp(min=1)


def scores(maps: Tensor, masks: Tensor, threshold: float) -> dict[str, np.ndarray]:
    """Pointing and overlap of each picture (N,), the mean of its two objects, in percent."""
    hits = {"pointing": pointing(maps, masks).float(), "iou": overlap(maps, masks, threshold)}
    return {name: 100 * values.view(-1, 2).mean(1).numpy() for name, values in hits.items()}


def baselines(masks: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Maps (N, S, S) that know nothing of picture and phrase, ``random`` and a hill in the ``centre``."""
    size, generator = masks.shape[-1], torch.Generator().manual_seed(seed)
    at = (torch.arange(size) + 0.5) / size - 0.5
    hill = torch.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 0.15**2))
    return {"random": torch.rand(masks.shape, generator=generator), "centre": hill.expand(len(masks), -1, -1)}


def grounding_chart(image: np.ndarray, maps: dict[str, np.ndarray], name: str = "Grad-CAM") -> NotebookFigure:
    """A picture, uint8 (3, H, W), beside each map (H, W) over it, under its phrase; ``name`` says what maps show."""
    fig = figure(max(5.5, 1.9 * (1 + len(maps))), 2.3)
    fig.set_layout_engine("compressed")
    axes = fig.subplots(1, 1 + len(maps))
    for ax, (title, heat) in zip(axes, {"the picture": None, **maps}.items(), strict=True):
        heatmap = widgets.show_picture(ax, image, heat)
        ax.set_title(label(title, 28))
    fig.colorbar(heatmap, ax=axes[-1], label=name, ticks=(0, 1), shrink=0.8)
    return fig


def overlap_chart(image: np.ndarray, maps: Tensor, masks: Tensor, row: int, threshold: float) -> NotebookFigure:
    """What map ``row`` of ``maps`` and ``masks`` (N, S, S) share at ``threshold``, and the mean IoU of all N at each.

    ``image``, uint8 (3, S, S), is the picture of that row.
    """
    fig = figure(8.3, 2.8)
    left, right = fig.subplots(1, 2, width_ratios=(0.7, 1))
    heat, mask, percent = maps[row].numpy(), masks[row].numpy(), 100 * overlap(maps, masks, threshold)
    bright = heat > threshold * heat.max()
    left.imshow(np.asarray(image).mean(0), cmap="gray", interpolation="nearest")
    areas = {"both": bright & mask, "map alone": bright & ~mask, "object alone": mask & ~bright}
    for (name, area), colour in zip(areas.items(), (PALETTE[2], PALETTE[1], PALETTE[0]), strict=True):
        left.imshow(np.where(area[..., None], to_rgba(colour, 0.75), 0.0), interpolation="nearest")
        left.plot([], [], "s", color=colour, label=name)
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    left.axis("off")
    left.set_title(f"IoU of this one {percent[row]:.0f} %")
    grid = np.linspace(0.05, 0.95, 19)
    right.plot(grid, [100 * overlap(maps, masks, float(cut)).mean() for cut in grid], color="black")
    right.axvline(threshold, color="black", linestyle=":")
    title = f"Mean IoU of {len(maps)} maps: at {threshold:.2f} it is {percent.mean():.1f} %"
    right.set(title=title, xlabel="threshold (share of the map's maximum)", ylabel="mean IoU (%)", ylim=(0, None))
    return fig


def overlap_explorer(images: np.ndarray, maps: Tensor, masks: Tensor, phrases: Sequence[str]) -> ipywidgets.VBox:
    """A slider for the threshold and a choice among pictures (N, 3, S, S) by their phrases, over overlap_chart."""
    cut = ipywidgets.FloatSlider(0.3, min=0.05, max=0.95, step=0.05, description="threshold", **widgets.WIDE)
    names = [(f"{row + 1}: {phrase}", row) for row, phrase in enumerate(phrases)]
    choice = ipywidgets.Dropdown(options=names, description="picture", layout=widgets.WIDE["layout"])
    return widgets.follow([choice, cut], lambda row, threshold: overlap_chart(images[row], maps, masks, row, threshold))


def prompt_explorer(
    model: nn.Module, tokenizer: Any, pictures: Mapping[str, Image.Image], prompts: Sequence[str], *layers: str
) -> ipywidgets.VBox:
    """A text box of prompts and a chooser over ``pictures`` and the reader's own; the chart follows both.

    It shows the square that the model reads, the Grad-CAM of the best prompt, and a bar for each prompt. Of several
    ``layers`` the reader chooses the one that the map is taken from.
    """
    chooser, upload = widgets.picture_chooser(pictures)
    look = {"rows": max(4, len(prompts)), "continuous_update": False, "layout": {"width": "400px"}}
    box = ipywidgets.Textarea("\n".join(prompts), description="prompts", **look)
    hidden = {"display": "none"} if len(layers) == 1 else {}
    choice = ipywidgets.Dropdown(options=layers, description="layer", layout=hidden)

    def draw(text: str, chosen: Any, layer: str) -> NotebookFigure:
        lines = widgets.read_prompts(text)
        picture = chosen if isinstance(chosen, Image.Image) else widgets.open_upload(chosen)
        cosines, shares = widgets.compare_prompts(model, tokenizer, embed_images(model, [picture])[0][0], lines)
        side, prepared = min(*picture.size, 320), input_of(model).transform(picture)[None]  # a chart shows no more
        heat = phrase_maps(model, tokenizer, prepared, [lines[cosines.argmax()]], layer, side)[0].numpy()
        return widgets.prompt_chart(np.asarray(square(picture, side)).transpose(2, 0, 1), lines, cosines, shares, heat)

    return widgets.follow([box, chooser, choice], draw, upload)


def grounding_scores(records: Iterable[Mapping[str, Any]]) -> NotebookFigure:
    """Pointing game and overlap of each model and baseline with 95 % intervals, and pointing by layer.

    The layers are those of the validation pictures, on which layer and threshold were chosen. Failures are left out.
    """
    measured = {r["model"]["name"]: r for r in records if r["task"] == "grounding" and "error" not in r}
    models = [name for name in LABELS if name in measured]
    if not models:
        raise ResultError("no grounding record of a model; run: python -m mclip study grounding")
    fig = figure(8.3, 3.6)
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    titles = {"pointing game": "pointing", "intersection\nover union": "iou"}
    table = {title: {name: own["metrics"][key] for name, own in measured.items()} for title, key in titles.items()}
    grouped_bars(left, table, list(measured))
    left.set(title="Does it point at the object? Does it cover it?", xlabel="percent, with 95 % interval")
    for name, marker in zip(models, "osD^", strict=False):
        values = [layer["pointing"] for layer in measured[name]["details"]["layers"].values()]
        look = {"marker": marker, "color": COLOURS[name], "linestyle": "--" if HATCHES[name] else "-"}
        right.plot(range(1, len(values) + 1), values, markersize=5, label=name, **look)
    right.set(title="Pointing by layer, fine to coarse", ylim=(0, None))
    right.set(xlabel="layer, from input to output", ylabel="pointing on validation (%)")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig
