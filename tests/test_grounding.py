"""Grad-CAM against a closed form and finite differences; masks and scores against loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.container import BarContainer
from torch import nn

from mclip.config import PRESETS, ConfigError
from mclip.files import DATA
from mclip.model import MobileCLIP
from mclip.recipes import load_model
from mclip.results import ResultError, load_results, weights_sha256
from mclip.scenes.drawing import COLOURS, SHAPES, draw_objects
from mclip.scenes.test_sets import cases, object_masks
from mclip.scenes.world import SceneConfig, Scenes, make_scenes
from mclip.show import grounding
from mclip.show.grounding import (
    grad_cam,
    map_layers,
    map_of,
    overlap,
    overlap_chart,
    overlap_explorer,
    phrase_maps,
    pointing,
)
from mclip.study import measures
from mclip.study.table import BY_NAME


class Channels(nn.Module):
    """A model whose map is its picture and whose embedding is the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Identity()

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.map(images).mean((2, 3))


@pytest.fixture(scope="module")
def student() -> MobileCLIP:
    torch.manual_seed(0)
    return MobileCLIP(PRESETS["course"]).eval()


def test_grad_cam_of_mean_channels_is_their_weighted_sum():
    """The similarity is sum_c t_c mean(A_c), so alpha_c = t_c / (h w), whatever the picture."""
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.5, -0.5, 0.0]])
    model = Channels()
    expected = torch.stack([images[0, 0], (0.5 * images[1, 0] - 0.5 * images[1, 1]).relu()])
    expected = expected / expected.flatten(1).amax(1)[:, None, None]
    torch.testing.assert_close(grad_cam(model, model.map, images, texts), expected)


class Tokens(nn.Module):
    """A model whose layer has a transformer's shape: a class token, then a token for each place, row by row."""

    def __init__(self, class_token: torch.Tensor) -> None:
        super().__init__()
        self.tokens, self.class_token = nn.Identity(), class_token

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        first = self.class_token.expand(len(images), 1, -1)
        return self.tokens(torch.cat([first, images.flatten(2).transpose(1, 2)], 1)).mean(1)


def test_a_map_of_tokens_is_that_of_the_same_places():
    """The class token, here brighter than every place, is no place; rows stay rows and columns stay columns."""
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.5, -0.5, 0.0]])
    grid, row = Channels(), Tokens(torch.tensor([9.0, -9.0, 9.0]))
    expected = grad_cam(grid, grid.map, images, texts)
    torch.testing.assert_close(grad_cam(row, row.tokens, images, texts), expected)


def test_a_vision_transformers_map_agrees_with_loops_over_its_patches():
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text).eval()
    images, texts = torch.randn(2, 3, 32, 32), F.normalize(torch.randn(2, 16), dim=1)
    assert list(map_layers(model)) == ["block1", "block2"]
    for layer in map_layers(model).values():
        held = []
        handle = layer.register_forward_hook(lambda module, inputs, output, held=held: held.append(output))
        similarity = (model.encode_image(images, normalize=True) * texts).sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(similarity, held[0])
        assert held[0].shape == (2, 1 + 4 * 4, 32)  # 32 pixels are four patches of 8
        found = grad_cam(model, layer, images, texts)
        for number in range(2):
            weights = sum(gradient[number, 1 + patch] for patch in range(16)) / 16
            places = [[(weights @ held[0][number, 1 + 4 * y + x]).item() for x in range(4)] for y in range(4)]
            expected = torch.tensor(places).relu()
            torch.testing.assert_close(found[number], expected / expected.max(), atol=1e-4, rtol=1e-4)


def test_a_map_without_a_positive_place_is_zero():
    model, images = Channels(), torch.rand(1, 3, 4, 4)
    assert grad_cam(model, model.map, images, torch.tensor([[-1.0, -1.0, -1.0]])).abs().max() == 0
    assert not pointing(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)).any()


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_weights_of_the_channels_agree_with_finite_differences(student, name):
    """Raising a whole channel by e changes the similarity by e times the sum of its gradient."""
    torch.manual_seed(1)
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(1, 256), dim=1)
    layer, kept, nudge = map_layers(student)[name], [], [0.0, 0]

    def hook(module, inputs, output):
        kept.append(output.detach())
        raised = output.clone()
        raised[:, nudge[1]] += nudge[0]
        return raised

    handle = layer.register_forward_hook(hook)
    channels, differences = range(3), []
    with torch.no_grad():
        student.encode_image(images)
        for nudge[1] in channels:
            ends = []
            for nudge[0] in (-1e-2, 1e-2):
                ends.append((student.encode_image(images, normalize=True) * text).sum())
            differences.append((ends[1] - ends[0]) / 2e-2)
    handle.remove()
    held = kept[0].requires_grad_()
    replace = layer.register_forward_hook(lambda module, inputs, output: held)
    (gradient,) = torch.autograd.grad((student.encode_image(images, normalize=True) * text).sum(), held)
    replace.remove()
    torch.testing.assert_close(gradient.sum((2, 3))[0, :3], torch.stack(differences), atol=2e-3, rtol=0.05)
    expected = (gradient.mean((2, 3), keepdim=True) * held.detach()).sum(1).relu()
    torch.testing.assert_close(
        grad_cam(student, layer, images, text)[0], expected[0] / expected.max(), atol=1e-5, rtol=1e-4
    )


def test_maps_leave_the_model_as_it_was(student):
    student.train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    maps = phrase_maps(student, student.tokenizer, torch.randn(3, 3, 64, 64), ["a", "b", "c"], "stage2", 48)
    assert student.training
    assert all(torch.equal(before[name], buffer) for name, buffer in student.named_buffers())
    student.eval()
    assert maps.shape == (3, 48, 48)
    assert maps.min() >= 0
    assert maps.max() <= 1


@pytest.mark.parametrize("name", ["kd", "clip", "teacher"])
def test_every_model_of_the_course_has_maps(name):
    model, tokenizer = load_model(name)
    picture = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    sides = []
    for layer, module in map_layers(model).items():
        found = map_of(model, tokenizer, picture, "a red star", layer)
        assert found.shape == (64, 64)
        assert np.isfinite(found).all()
        sides.append(module)
    assert len(sides) >= 3


def test_the_last_stage_of_a_convolutional_trunk_has_maps_and_the_last_block_of_a_transformer_has_none():
    for name, layers in (("tf_efficientnet_lite0", 7), ("vit_tiny_patch16_224", 11)):
        model = nn.Module()
        model.visual = nn.Module()
        model.visual.trunk = timm.create_model(name)
        assert list(map_layers(model).values()) == list(model.visual.trunk.blocks)[:layers]
    assert layers == len(model.visual.trunk.blocks) - 1


def painted(scenes: Scenes, row: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (S, S) that the object is sure to cover when it alone is painted, and those it may cover.

    The rest of a pixel that is covered in part, or not at all, shows whether black or white lay below.
    """
    table, size = scenes.table, scenes.config.image_size
    geometry = tuple(table[key][row : row + 1, slot] for key in ("cx", "cy", "radius", "angle"))
    pictures = [np.full((1, size, size, 3), shade, np.float32) for shade in (0, 1)]
    for picture in pictures:
        draw_objects(picture, table["shape"][row, slot], np.zeros(1, int), np.ones((1, 3)), geometry)
    black, white = (picture[0].max(-1) for picture in pictures)
    return np.abs(white - black) < 1e-6, black > 0


@pytest.mark.parametrize("one_on_the_other", [False, True])
def test_masks_are_the_pixels_that_an_object_paints(one_on_the_other):
    scenes = make_scenes(SceneConfig(60, 64, "val", two_objects=1.0, captions="clean"), progress=False)
    if one_on_the_other:
        places = {key: scenes.table[key].mean(1, keepdims=True).repeat(2, 1) for key in ("cx", "cy")}
        scenes = dataclasses.replace(scenes, table={**scenes.table, **places})
    masks = object_masks(scenes)
    assert masks.shape == (60, 2, 64, 64)
    assert set(scenes.table["shape"].ravel()) == set(range(len(SHAPES)))
    hidden = 0
    for row, (behind, front) in enumerate(masks):
        (sure_behind, may_behind), (sure_front, may_front) = (painted(scenes, row, slot) for slot in (0, 1))
        assert sure_front.sum() > 30
        assert front[sure_front].all()
        assert not front[~may_front].any()
        assert behind[sure_behind & ~may_front].all()
        assert not behind[~may_behind | sure_front].any()
        hidden += (sure_behind & sure_front).any()
    assert hidden == (60 if one_on_the_other else 0)


def test_a_phrase_belongs_to_its_own_mask():
    """Inside a mask the picture is nearer to the colour that the phrase names than to the other phrase's."""
    images, phrases, masks = cases("val", 60)
    assert images.shape == (120, 3, 64, 64)
    assert masks.shape == (120, 64, 64)
    nearer = []
    for first in range(0, 120, 2):
        assert torch.equal(images[first], images[first + 1])
        words = [phrases[first + slot].split() for slot in (0, 1)]
        assert words[0][1] != words[1][1]
        assert words[0][2] != words[1][2]
        named = [torch.tensor(COLOURS[word[1]]) for word in words]
        for slot in (0, 1):
            assert masks[first + slot].sum() >= 30
            seen = (images[first + slot].float() / 255)[:, masks[first + slot]].mean(1)
            nearer.append(bool((seen - named[slot]).norm() < (seen - named[1 - slot]).norm()))
    assert np.mean(nearer) > 0.9  # a dark texture may look like another colour


def test_a_scene_of_one_object_has_one_mask():
    scenes = make_scenes(SceneConfig(8, 64, "val", two_objects=0.0), progress=False)
    masks = object_masks(scenes)
    assert masks[:, 0].any((1, 2)).all()
    assert not masks[:, 1].any()


def test_scores_against_loops():
    rng = np.random.default_rng(0)
    maps, masks = torch.from_numpy(rng.random((6, 9, 9))), torch.from_numpy(rng.random((6, 9, 9)) < 0.3)
    for threshold in (0.2, 0.5, 0.8):
        for row in range(6):
            cells = [(y, x) for y in range(9) for x in range(9)]
            top = max(cells, key=lambda cell: maps[row][cell])
            bright = {cell for cell in cells if maps[row][cell] > threshold * maps[row][top]}
            inside = {cell for cell in cells if masks[row][cell]}
            assert bool(pointing(maps, masks)[row]) == (top in inside)
            assert overlap(maps, masks, threshold)[row].item() == pytest.approx(
                len(bright & inside) / len(bright | inside)
            )


def test_the_middle_of_a_plateau_counts():
    maps = torch.zeros(1, 1, 9)
    maps[0, 0, 2:7] = 1.0
    for place in range(9):
        mask = torch.zeros(1, 1, 9, dtype=torch.bool)
        mask[0, 0, place] = True
        assert bool(pointing(maps, mask)) == (place == 4)


def test_noise_points_as_often_as_the_area_says():
    masks = torch.rand(4000, 16, 16, generator=torch.Generator().manual_seed(3)) < 0.2
    hits = pointing(grounding.baselines(masks)["random"], masks).float().mean().item()
    assert hits == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 4000) ** 0.5)


def test_what_cannot_be_drawn_is_named(student):
    picture = np.zeros((3, 64, 64), np.uint8)
    with pytest.raises(ConfigError, match="did you mean 'stage1'"):
        map_of(student, student.tokenizer, picture, "a star", "stag1")
    with pytest.raises(ConfigError, match="write what to look for"):
        map_of(student, student.tokenizer, picture, "  ", "stage1")
    with pytest.raises(ConfigError, match="phrases=2 cannot work: give one for each of 1 pictures"):
        phrase_maps(student, student.tokenizer, torch.zeros(1, 3, 64, 64), ["a star", "a circle"], "stage1", 64)


def test_layer_and_threshold_are_not_chosen_on_the_test_pictures(monkeypatch):
    row, tuning = BY_NAME["grounding/kd"], cases("val", 3)
    choices = []
    for seed in (0, 1):
        monkeypatch.setattr(measures, "_cases", lambda profile, seed=seed: (tuning, cases("test", 6, seed=seed)))
        (record,) = measures.grad_cam_maps(row, {"profile": "smoke"})
        choices.append((record["details"]["layer"], record["details"]["layers"]))
    assert choices[0] == choices[1], "the test pictures took part in the choice"
    layer, layers = choices[0]
    assert layer == max(layers, key=lambda name: layers[name]["pointing"])


def test_the_figure_shows_the_committed_records():
    records = load_results(DATA / "results" / "grounding.json")
    found = {record["model"]["name"]: record for record in records}
    bars, layers = grounding.grounding_scores(records).axes
    drawn = [[bar.get_width() for bar in each] for each in bars.containers if isinstance(each, BarContainer)]
    order = ("base", "kd", "teacher", "random", "centre")
    assert drawn == [[found[name]["metrics"][key]["value"] for key in ("pointing", "iou")] for name in order]
    drawn = {line.get_label(): list(line.get_ydata()) for line in layers.get_lines()}
    for name in ("base", "kd", "teacher"):
        assert drawn[name] == [scores["pointing"] for scores in found[name]["details"]["layers"].values()]
    with pytest.raises(ResultError, match="mclip study grounding"):
        grounding.grounding_scores([])


def test_the_committed_records_are_of_the_models_that_ship():
    for record in load_results(DATA / "results" / "grounding.json"):
        if record["model"]["parameters"]:
            assert weights_sha256(load_model(record["model"]["name"])[0]) == record["model"]["sha256"]


def test_the_explorer_of_the_threshold_shows_the_overlap():
    rng = np.random.default_rng(0)
    maps, masks = (
        torch.from_numpy(rng.random((3, 6, 6), dtype=np.float32)),
        torch.from_numpy(rng.random((3, 6, 6)) < 0.4),
    )
    fig = overlap_chart(rng.integers(0, 256, (3, 6, 6), dtype=np.uint8), maps, masks, 1, 0.5)
    both, _, alone = (image.get_array()[..., 3] > 0 for image in fig.axes[0].images[1:])
    bright = maps[1] > 0.5 * maps[1].max()
    assert (both | alone).tolist() == masks[1].tolist()
    assert both.tolist() == (bright & masks[1]).tolist()
    curve = fig.axes[1].lines[0]
    at_half = np.flatnonzero(np.isclose(curve.get_xdata(), 0.5))[0]
    assert curve.get_ydata()[at_half] == pytest.approx(100 * overlap(maps, masks, 0.5).mean())
    above, message, chart, _ = overlap_explorer(
        rng.integers(0, 256, (3, 3, 6, 6)), maps, masks, ["a", "b", "c"]
    ).children
    seen = {bytes(chart.value)}
    for control, value in zip(above.children, (2, 0.8), strict=True):
        control.value = value
        seen.add(bytes(chart.value))
    assert len(seen) == 3
    assert message.value == ""
