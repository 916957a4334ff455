"""The teacher's targets: shards that are resumed, views that can be cut again, and a teacher online."""

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pictures import gradient
from test_train import TINY

from mclip import targets as module
from mclip.config import ConfigError, DistillConfig, TrainConfig
from mclip.pairs import BatchSource, Pairs, Targets
from mclip.pictures import Crops, square
from mclip.recipes import OnlineTargets, fitted, load_model, train_student
from mclip.targets import teacher_targets
from mclip.teacher import Teacher, TeacherError, load_teacher


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("scenes")


def toy(count: int = 10) -> Pairs:
    images = np.stack([np.asarray(gradient(64, 64, n)).transpose(2, 0, 1) for n in range(count)])
    return Pairs(images, [[f"picture {n} of a red star", f"a ring {n}"] for n in range(count)], f"toy {count}", "toy")


def test_a_teacher_that_is_not_finite_is_named_and_nothing_is_kept(teacher, own_cache):
    broken = dataclasses.replace(teacher, model=copy.deepcopy(teacher.model))
    next(p for p in broken.model.visual.parameters() if p.ndim > 1).data[:] = math.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="image"):
            teacher_targets(broken, toy(), progress=False)
    assert not list(own_cache.rglob("images-*.done"))


def test_small_shards_hold_what_one_large_one_holds(teacher, own_cache, monkeypatch):
    whole = teacher_targets(teacher, toy(), progress=False)
    images, texts = np.array(whole.images), np.array(whole.texts)
    monkeypatch.setenv("MCLIP_CACHE", str(own_cache) + "2")
    monkeypatch.setattr(module, "PICTURES_IN_SHARD", 4)
    monkeypatch.setattr(module, "CAPTIONS_IN_SHARD", 6)
    parts = teacher_targets(teacher, toy(), progress=False)
    assert sorted(p.name for p in Path(str(own_cache) + "2").rglob("*.done")) == [
        *(f"images-{n:05d}.done" for n in range(3)),
        *(f"texts-{n:05d}.done" for n in range(4)),
    ]
    np.testing.assert_allclose(parts.images[:], images, atol=2e-3)
    np.testing.assert_allclose(parts.texts[:], texts, atol=2e-3)
    assert parts.images[:].dtype == np.float16


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2), st.integers(0, 2**16))
def test_targets_of_another_width_keep_what_cosines_they_can(width, dimensions, views, seed):
    """Against numpy's singular vectors of all pictures and captions, each kind with half of the weight."""
    rng = np.random.default_rng(seed)
    shapes = [(7, views, dimensions) if views else (7, dimensions), (11, dimensions)]
    images, texts = (rng.normal(size=shape).astype(np.float16) for shape in shapes)
    crops = Crops(0.5, views, 0) if views else None
    images, texts = (side / np.linalg.norm(side, axis=-1, keepdims=True) for side in (images, texts))
    given_view = np.zeros(7, int) if views else None
    image, text = fitted(Targets(images, texts, 1.0, crops=crops), width).of(np.arange(7), np.arange(7), given_view)

    flat = images.reshape(-1, dimensions).astype(float)
    scaled = np.concatenate([flat / len(flat) ** 0.5, texts.astype(float) / len(texts) ** 0.5])
    first = np.linalg.svd(scaled)[2][:width]
    shown = images[:, 0] if views else images
    sides = [side.astype(float) @ first.T for side in (shown, texts[:7])]
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    assert image.shape == text.shape == (7, width)
    assert np.allclose((image @ text.T).numpy(), a @ b.T, atol=5e-3)


def test_each_view_is_the_crop_that_its_seed_cuts_again(teacher):
    pairs, crops = toy(6), Crops(0.4, 3, 5)
    found = teacher_targets(teacher, pairs, progress=False, crops=crops)
    assert found.images.shape == (6, 3, 256)
    seeds = crops.seeds(np.arange(6)[:, None], np.arange(3))
    assert len(np.unique(seeds)) == 18
    views = [square(pairs.picture(i), 64, int(seeds[i, k]), 0.4) for i in range(6) for k in range(3)]
    with torch.inference_mode():
        direct = teacher.model.encode_image(torch.stack([teacher.transform(view) for view in views]), normalize=True)
    np.testing.assert_allclose(found.images.reshape(18, -1), direct.numpy(), atol=2e-3)
    other = teacher_targets(teacher, pairs, progress=False, crops=Crops(0.4, 3, 6))
    assert other.key != found.key


@pytest.mark.parametrize("crops", [None, Crops(0.4, 3, 5)], ids=["whole", "views"])
def test_an_online_teacher_says_what_the_cache_holds(teacher, crops):
    pairs = toy(8)
    batches = []
    cached = teacher_targets(teacher, pairs, progress=False, crops=crops)
    for targets in (cached, OnlineTargets(teacher, pairs, crops)):
        source = BatchSource(pairs, load_model("kd")[1], lambda x: x.float(), 4, 0, targets, crops)
        batches.append([batch for epoch in range(3) for batch in source.epoch(epoch)])
    for cached, online in zip(*batches, strict=True):
        assert torch.equal(cached.pixels, online.pixels)
        torch.testing.assert_close(cached.teacher_image, online.teacher_image, atol=2e-3, rtol=0)
        torch.testing.assert_close(cached.teacher_text, online.teacher_text, atol=2e-3, rtol=0)


def test_student_and_teacher_see_the_same_crop(teacher):
    """The defect this guards against: a target of one crop beside the pixels of another."""
    pairs, crops = toy(8), Crops(0.2, 2, 5)
    targets = teacher_targets(teacher, pairs, progress=False, crops=crops)
    source = BatchSource(pairs, load_model("kd")[1], lambda x: x, 4, 0, targets, crops)
    for batch in source.epoch(1):
        with torch.inference_mode():
            seen = teacher.model.encode_image(teacher.prepare(batch.pixels), normalize=True)
        torch.testing.assert_close(seen, batch.teacher_image, atol=5e-3, rtol=0)


def test_crops_with_a_cache_need_a_number_of_views(teacher):
    with pytest.raises(ConfigError, match="views=0 cannot work"):
        teacher_targets(teacher, toy(), False, Crops(0.5, 0, 0))


@pytest.mark.parametrize("damage", ["cut", "pickle", "shape", "rows"])
def test_a_damaged_shard_is_named_and_never_unpickled(teacher, own_cache, damage):
    whole = np.array(teacher_targets(teacher, toy(), progress=False).images)
    file = next(own_cache.rglob("images.npy"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "pickle":
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "shape":
        np.save(file, np.zeros((10, 7), np.float16))
    else:
        np.save(file, np.zeros((9, 256), np.float16))
    with pytest.raises(TeacherError, match=r"images\.npy.*computed again"):
        teacher_targets(teacher, toy(), progress=False)
    file.unlink()
    assert np.array_equal(teacher_targets(teacher, toy(), progress=False).images, whole)


SLOW = """
import sys, time, numpy as np
from pathlib import Path
from mclip.targets import fill
def compute(rows):
    print(rows.start, flush=True)
    time.sleep(float(sys.argv[2]))
    return np.full((len(rows), 2), rows.start, np.float16)
fill(Path(sys.argv[1]) / "images.npy", (12, 2), 2, compute, True)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_one_process_computes_and_another_stands_in_where_it_is_killed(tmp_path):
    first = start(tmp_path, 0.4)
    begun = [first.stdout.readline().strip()]
    second = start(tmp_path, 0.0)
    first.send_signal(signal.SIGKILL)
    lines = second.communicate(timeout=120)[0].splitlines()
    computed = begun + lines[:-1]
    assert sorted(set(computed), key=int) == ["0", "2", "4", "6", "8", "10"]
    assert len(computed) <= 7  # only what the killed one was at may come twice
    rows = np.load(tmp_path / "images.npy")
    np.testing.assert_array_equal(rows[:, 0], [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10])
    again = start(tmp_path, 0.0).communicate(timeout=120)[0]
    assert again.splitlines() == ["images: 12 were there, 0 computed; 4 bytes each"]


def test_training_on_views_resumes_bit_for_bit(tmp_path):
    pairs = toy(16)
    settings = TrainConfig(max_epochs=3, batch_size=8, crop_scale=0.5, views=2, progress=False, accelerator="cpu")
    for name, stop in (("whole", None), ("cut", 3)):

        def interrupt(record, stop=stop):
            if record["step"] == stop and "loss" in record:
                os.kill(os.getpid(), signal.SIGINT)

        arguments = (TINY, pairs, pairs, settings, tmp_path / name)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train_student(*arguments, distill=DistillConfig(), on_record=interrupt)
        train_student(*arguments, distill=DistillConfig())
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
