"""The drawn world: the same from the same settings, true to its captions, and closed to what is held out."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from torch import nn

from mclip.config import ConfigError
from mclip.recipes import correct_of
from mclip.scenes.captions import COLOUR_NAMES, COLOUR_WORDS, RELATIONS, SHAPE_NAMES, SHAPE_WORDS
from mclip.scenes.drawing import SHAPES, _polygon, _regular, object_distance
from mclip.scenes.test_sets import PAIRS, evaluate_relation, relation_captions, scene_sets
from mclip.scenes.world import (
    HELD_OUT,
    SPLITS,
    SceneConfig,
    captions_of,
    export_scenes,
    make_scenes,
    sample_table,
    scene_pairs,
)
from mclip.sources.loading import load_pairs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_scenes_as_pairs_are_those_that_a_run_trains_on():
    config = SceneConfig(12, 64, "val", seed=3)
    pairs, loaded = scene_pairs(config, progress=False), load_pairs(scenes=config, progress=False)
    assert np.array_equal(pairs.images, make_scenes(config).images)
    assert (pairs.captions, pairs.key, pairs.name) == (loaded.captions, loaded.key, loaded.name)
    assert pairs.key != scene_pairs(dataclasses.replace(config, seed=4), progress=False).key


def small(**changes):
    return dataclasses.replace(SceneConfig(size=60, image_size=32), **changes)


def test_same_settings_same_bytes(tmp_path, monkeypatch):
    first = make_scenes(small())
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path))
    second = make_scenes(small())
    assert np.array_equal(first.images, second.images)
    assert first.captions == second.captions
    assert not np.array_equal(first.images, make_scenes(small(seed=1)).images)


def test_the_cache_key_covers_every_setting():
    reference = make_scenes(small())
    for change in ({"noise": 0.5}, {"captions": "clean"}, {"two_objects": 1.0}, {"split": "val"}):
        other = make_scenes(small(**change))
        assert other.captions != reference.captions or not np.array_equal(other.images, reference.images), change


def test_splits_never_share_a_picture():
    seen = {}
    for split in SPLITS:
        for image in make_scenes(small(split=split)).images:
            assert seen.setdefault(image.tobytes(), split) == split


@given(st.integers(0, 2**31), st.sampled_from(["train", "val", "teacher"]))
@settings(max_examples=20, deadline=None)
def test_held_out_pairs_never_occur_in_training(seed, split):
    config = SceneConfig(size=300, seed=seed, split=split)
    table = sample_table(config)
    shown = {(s, c) for s, c in zip(table["shape"].ravel(), table["colour"].ravel(), strict=True) if s >= 0}
    assert not shown & HELD_OUT
    banned = {
        f"{c} {s}"
        for shape, colour in HELD_OUT
        for c in (COLOUR_NAMES[colour], *COLOUR_WORDS.get(COLOUR_NAMES[colour], ()))
        for s in (SHAPE_NAMES[shape], *SHAPE_WORDS.get(SHAPE_NAMES[shape], ()))
    }
    text = "\n".join(line + "\n" for own in captions_of(config, table) for line in own)
    assert not [phrase for phrase in banned if f" {phrase}\n" in text or f" {phrase} " in text]


def test_the_check_would_see_a_held_out_caption():
    config = SceneConfig(size=50, split="test", pairs="held-out", captions="clean")
    table = sample_table(config)
    assert {(s, c) for s, c in zip(table["shape"][:, 0], table["colour"][:, 0], strict=True)} <= HELD_OUT


def test_captions_say_what_the_table_holds():
    config = SceneConfig(size=400, two_objects=0.0, captions="clean")
    table = sample_table(config)
    for row, own in enumerate(captions_of(config, table)):
        shape = SHAPE_NAMES[table["shape"][row, 0]]
        for line in own:
            assert any(word in line for word in (shape, *SHAPE_WORDS.get(shape, ()))), line


def test_noise_is_the_share_of_wrong_captions():
    clean, noisy = (captions_of(c, sample_table(c)) for c in (SceneConfig(2000), SceneConfig(2000, noise=0.3)))
    changed = np.mean(
        [a != b for own, other in zip(clean, noisy, strict=True) for a, b in zip(own, other, strict=True)]
    )
    assert 0.26 < changed < 0.31


@given(st.integers(3, 9), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_polygon_distance_against_brute_force(corners, seed):
    points = np.random.default_rng(seed).uniform(-1.5, 1.5, (40, 2)).astype(np.float32)
    outline = _regular(corners, 1.0)
    ours = _polygon(points[:, 0], points[:, 1], outline)
    inside = Polygon(outline).contains_points(points)
    walk = np.concatenate([np.linspace(a, b, 2000) for a, b in zip(outline, outline[1:] + outline[:1], strict=True)])
    brute = np.sqrt(((points[:, None] - walk[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(np.abs(ours), brute, atol=2e-3)
    assert np.array_equal(ours < 0, inside)


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=list(SHAPES))
def test_every_shape_is_inside_its_frame_and_not_empty(shape):
    centre, half = np.array([0.5]), np.array([0.4])
    distance, _, _ = object_distance(shape, centre, centre, half, np.array([0.0]), 96)
    inside = distance[0] < 0
    assert 0.05 < inside.mean() < 0.55
    rows, columns = np.nonzero(inside)
    assert np.hypot(rows / 96 - 0.5, columns / 96 - 0.5).max() < 0.4 * 1.25


def test_export_is_read_back_as_csv_and_as_coco(tmp_path):
    scenes = make_scenes(small(size=12))
    export_scenes(scenes, tmp_path / "set")
    for file in ("captions.csv", "captions.json"):
        pairs = load_pairs(tmp_path / "set" / file, 32, progress=False)
        assert pairs.captions == scenes.captions
        difference = np.abs(pairs.images.astype(int) - scenes.images.astype(int))
        assert difference.mean() < 6  # JPEG at quality 95


def test_zero_shot_sets_are_labelled_by_what_was_drawn():
    sets = scene_sets(32, 40)
    assert list(sets) == ["shape", "colour", "texture", "background", "colour-shape", "held-out"]
    assert len(sets["colour-shape"].class_names) == 108
    assert len(sets["held-out"].class_names) == len(PAIRS) == 120
    for shape, both in zip(sets["shape"].labels, sets["colour-shape"].labels, strict=True):
        assert sets["colour-shape"].class_names[both].endswith(sets["shape"].class_names[shape])
    held_out = {f"{COLOUR_NAMES[c]} {SHAPE_NAMES[s]}" for s, c in HELD_OUT}
    assert {sets["held-out"].class_names[label] for label in sets["held-out"].labels} <= held_out


def test_relation_captions_differ_in_the_relation_alone():
    scenes = make_scenes(small(split="test", two_objects=1.0))
    for row, (true, false) in enumerate(zip(*relation_captions(scenes), strict=True)):
        assert true != false
        (cx, other_cx), (cy, other_cy) = scenes.table["cx"][row], scenes.table["cy"][row]
        holds = {
            "to the left of": cx < other_cx,
            "to the right of": cx > other_cx,
            "above": cy < other_cy,
            "below": cy > other_cy,
        }
        opposite = {"to the left of": "to the right of", "above": "below"}
        opposite |= {word: other for other, word in opposite.items()}
        (named,) = (phrase for phrase in RELATIONS if phrase in true)
        assert holds[named]
        assert false == true.replace(named, opposite[named])


class Oracle(nn.Module):
    """Knows of each picture, in their order, its relation, and of each caption which one it names; sees ``wrong`` ones.

    A caption without a relation, or with two, is an error.
    """

    def __init__(self, relations: np.ndarray, wrong: int) -> None:
        super().__init__()
        shown = torch.tensor(relations)
        shown[:wrong] ^= 1  # left and right, above and below
        self.pictures, self.visual = iter(F.one_hot(shown, 4).float()), nn.Identity()
        self.visual.image_size = 64

    def tokenizer(self, captions: list[str]) -> torch.Tensor:
        named = [[phrase in caption for phrase in RELATIONS] for caption in captions]
        assert all(sum(row) == 1 for row in named)
        return torch.tensor(named).float()

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        return tokens

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return torch.stack([next(self.pictures) for _ in images])


def test_pictures_to_choose_by_are_others_and_the_seed_is_the_bootstraps():
    def pictures(**seeds: int) -> str:
        oracle = Oracle(np.zeros(40, int), 0)
        oracle.pictures = iter(torch.ones(40, 4))
        return evaluate_relation(oracle, oracle.tokenizer, "any", count=40, **seeds)["details"]["pictures"]

    assert pictures() == pictures(seed=7) != pictures(drawn=1)


@pytest.mark.parametrize(("wrong", "score"), [(0, 100.0), (10, 75.0), (40, 0.0)])
def test_relation_counts_the_pictures_whose_true_caption_is_nearer(wrong, score):
    config = SceneConfig(40, 64, "test", 0, captions="clean", two_objects=1.0)
    oracle = Oracle(sample_table(config)["relation"], wrong)
    record = evaluate_relation(oracle, oracle.tokenizer, "oracle", count=40)
    assert record["metrics"]["top1"]["value"] == score
    np.testing.assert_array_equal(correct_of(record), np.arange(40) >= wrong)
    undecided = Oracle(np.zeros(40, int), 0)
    undecided.pictures = iter(torch.ones(40, 4))
    assert evaluate_relation(undecided, oracle.tokenizer, "none", count=40)["metrics"]["top1"]["value"] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", 0), ("image_size", 8), ("split", "trian"), ("noise", 1.5), ("captions", "rude"), ("pairs", "held-out")],
)
def test_an_impossible_setting_is_named(key, value):
    with pytest.raises(ConfigError, match=key):
        SceneConfig(**{key: value})
