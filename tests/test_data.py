"""Readers of captions, and the batches of an epoch."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mclip.config import ConfigError
from mclip.pairs import BatchSource, Pairs, Targets, normalise
from mclip.sources.loading import load_pairs
from mclip.sources.readers import DataError
from mclip.text_encoder import Tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Four pictures of one colour each, two captions for each."""
    (tmp_path / "images").mkdir()
    rows = ["file_name,image_path,caption"]
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "images" / f"{number}.png")
        rows += [f'{number}.png,images,"caption {number}, first"', f"{number}.png,images,caption {number} second"]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def append(folder: Path, line: str) -> Path:
    path = folder / "data.csv"
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    return path


def test_csv(folder):
    pairs = load_pairs(folder / "data.csv", 32, progress=False)
    assert pairs.images.shape == (4, 3, 32, 32)
    assert pairs.captions[1] == ["caption 1, first", "caption 1 second"]
    assert [pairs.images[i, :, 16, 16].argmax() for i in range(3)] == [0, 1, 2]


def test_coco_equals_csv(folder):
    csv = load_pairs(folder / "data.csv", 32, progress=False)
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(4)],
        "annotations": [{"image_id": 10 + i, "caption": c} for i, own in enumerate(csv.captions) for c in own],
    }
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")
    coco = load_pairs(folder / "data.json", 32, progress=False)
    assert coco.captions == csv.captions
    assert np.array_equal(coco.images, csv.images)


BAD_ROWS = [
    ('0.png,images,"  "', "line 10: the caption is empty"),
    ("5.png,images,a caption", "line 10: no picture at"),
    ("broken.png,images,a caption", r"data\.csv, line 10: .*broken\.png: not readable as a picture"),
    ("gone.png,images,a caption", r"data\.csv, line 10: .*gone\.png: not readable as a picture"),
    ("text.png,images,a caption", r"data\.csv, line 10: .*text\.png: not readable as a picture"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(folder, row, message, capsys):
    whole = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "images" / "text.png").write_text("not a picture", encoding="utf-8")
    path = append(folder, row)
    with pytest.raises(DataError, match=message) as error:
        load_pairs(path, 32, progress=False)
    assert "on_error='skip'" in str(error.value)
    pairs = load_pairs(path, 32, on_error="skip", progress=False)
    assert (len(pairs), pairs.skipped) == (4, 1)
    assert "1 rows left out" in capsys.readouterr().out


def test_files_that_cannot_be_used_are_named(folder):
    with pytest.raises(DataError, match=r"missing\.csv: no such file"):
        load_pairs(folder / "missing.csv", 32)
    (folder / "empty.csv").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="the file is empty"):
        load_pairs(folder / "empty.csv", 32)
    (folder / "header.csv").write_text("file_name,caption\n", encoding="utf-8")
    with pytest.raises(DataError, match="no usable rows"):
        load_pairs(folder / "header.csv", 32)
    with pytest.raises(DataError, match="no column 'title'; the columns are file_name, image_path, caption"):
        load_pairs(folder / "data.csv", 32, caption_key="title")
    (folder / "bad.json").write_text('{"images": []}', encoding="utf-8")
    with pytest.raises(DataError, match="not COCO Captions JSON"):
        load_pairs(folder / "bad.json", 32)
    (folder / "latin.csv").write_bytes(b"file_name,caption\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        load_pairs(folder / "latin.csv", 32)
    (folder / "data.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"unknown kind '\.txt'"):
        load_pairs(folder / "data.txt", 32)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_data_size_outside_its_range(folder, share):
    with pytest.raises(ConfigError, match="data_size"):
        load_pairs(folder / "data.csv", 32, data_size=share)


def test_data_size_takes_a_share_and_changes_the_key(folder):
    whole, half = (load_pairs(folder / "data.csv", 32, data_size=s, progress=False) for s in (1.0, 0.5))
    assert len(half) == 2
    assert half.key != whole.key
    assert all(own in whole.captions for own in half.captions)


def test_an_edited_picture_changes_the_key(folder):
    before = load_pairs(folder / "data.csv", 32, progress=False).key
    Image.new("RGB", (60, 40), (1, 2, 3)).save(folder / "images" / "0.png")
    os.utime(folder / "images" / "0.png", (1, 1))
    assert load_pairs(folder / "data.csv", 32, progress=False).key != before


def toy(pictures: int, captions: int = 3) -> Pairs:
    images = np.zeros((pictures, 3, 8, 8), np.uint8)
    images[:, 0, 0, 0] = np.arange(pictures)
    return Pairs(images, [[f"picture {i} line {j}" for j in range(captions)] for i in range(pictures)], "toy", "toy")


def source(pairs: Pairs, batch_size: int, seed: int = 0, targets: Targets | None = None) -> BatchSource:
    return BatchSource(pairs, Tokenizer(16), lambda images: images.float(), batch_size, seed, targets)


@given(st.integers(4, 40), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_an_epoch_visits_each_picture_at_most_once_with_its_own_caption(pictures, batch_size, seed):
    pairs = toy(pictures)
    texts = np.arange(pictures * 3, dtype=np.float16)[:, None]
    batches = list(source(pairs, batch_size, seed, Targets(np.arange(pictures)[:, None], texts, 1.0)).epoch(0))
    visited = torch.cat([b.index for b in batches])
    assert len(visited) == len(visited.unique()) == pictures // batch_size * batch_size
    for b in batches:
        assert torch.equal(b.images[:, 0, 0, 0].long(), b.index)
        assert torch.equal(b.teacher_image[:, 0].long(), b.index)
        assert torch.equal(b.teacher_text[:, 0].long() // 3, b.index)


def test_batches_are_a_function_of_seed_and_epoch():
    batches = source(toy(30), 5)
    first, again = list(batches.epoch(3)), list(batches.epoch(3))
    later = list(batches.epoch(3, start=4))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[4].index, later[0].index)
    assert not torch.equal(first[0].index, next(batches.epoch(4)).index)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size=9"):
        source(toy(4), 9)


def test_defect_13_a_batch_never_walks_the_table():
    """Drawing a negative by filtering all rows costs the whole table for each item; ours indexes."""

    class Watched(list):
        walks = 0

        def __iter__(self):
            Watched.walks += 1
            return super().__iter__()

    pairs = toy(64)
    watched = Pairs(pairs.images, Watched(pairs.captions), "toy", "toy")
    batches = source(watched, 8)
    assert len(watched.first_caption) == 65  # counted once, and kept
    prepared = Watched.walks
    for _ in batches.epoch(0):
        pass
    assert Watched.walks == prepared
    defective = [[own for own in watched.captions if own is not pairs.captions[i]] for i in range(3)]
    assert Watched.walks == prepared + len(defective)  # the defective form is seen


def test_defect_14_captions_are_never_edited():
    """Swapping "left" and "right" as substrings turns "bright" into "bleft"; ours leaves captions alone."""
    text = "a bright lamp to the right of a leftover"
    pairs = Pairs(np.zeros((2, 3, 8, 8), np.uint8), [[text], [text]], "k", "n")
    tokens = next(source(pairs, 2).epoch(0)).tokens
    assert torch.equal(tokens, Tokenizer(16)([text, text]))
    defective = text.replace("right", "#").replace("left", "right").replace("#", "left")
    assert "bleft" in defective
    assert not torch.equal(Tokenizer(16)([defective] * 2), tokens)


def test_normalise_keeps_the_aspect_ratio():
    wide = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    wide[..., 10:30] = 255  # the centre square
    out = normalise(wide, 20, (0.0,) * 3, (1.0,) * 3)
    assert out.shape == (1, 3, 20, 20)
    assert torch.allclose(out, torch.ones_like(out))


def test_real_captions():
    root = os.environ.get("MCLIP_REAL_DATA")
    if not root:
        pytest.skip("MCLIP_REAL_DATA is not set: no real photographs")
    csv, coco = (
        load_pairs(Path(root) / "flickr8k-mini" / f, 64, progress=False) for f in ("val.csv", "captions_val.json")
    )
    assert len(csv) == len(coco) == 300
    assert sorted(map(tuple, csv.captions)) == sorted(map(tuple, coco.captions))
