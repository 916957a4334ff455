"""Pictures of every mode, by every way in: training's reader, a teacher's, and the evaluation of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclip.pictures import PictureError, as_rgb, open_picture, read_picture
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import image_folder_set

ROW, COLUMN = np.mgrid[0:48, 0:64]
GREY = (2 * ROW + COLUMN).astype(np.uint8)
COLOURS = np.stack([4 * COLUMN, 5 * ROW, np.full_like(ROW, 40)], -1).astype(np.uint8)  # no two corners alike
# What a camera held in each of the eight ways stores of an upright picture (EXIF 2.32, tag 0x0112).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def every_way(path: Path) -> list[np.ndarray]:
    """The picture at ``path/set/a/``, (H, W, 3), as training, a teacher, and an evaluation read it."""
    other = path.parents[1] / "b" / "other.png"
    other.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other)
    evaluated = image_folder_set(path.parents[1]).images[0][0]
    return [
        read_picture(str(path)).numpy().transpose(1, 2, 0),
        np.asarray(open_picture(str(path))),
        np.asarray(evaluated),
    ]


@pytest.fixture
def place(tmp_path) -> Path:
    """The folder of a class."""
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff"])
def test_sixteen_bits_are_scaled_and_not_cut_off(place, name):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(place / name)
    assert Image.open(place / name).mode == "I;16"
    for found in every_way(place / name):
        np.testing.assert_array_equal(found, np.stack([GREY] * 3, -1))


def test_sixteen_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65_407, 65_535]], np.uint16)
    expected = np.round(values / 257)
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2")):
        picture = Image.frombytes(mode, (7, 1), values.astype(kind).tobytes())
        np.testing.assert_array_equal(np.asarray(as_rgb(picture))[..., 0], expected)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_a_photograph_stands_upright_however_the_camera_was_held(place, name, orientation):
    note = Image.Exif()
    note[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](COLOURS))).save(place / name, exif=note, quality=98)
    for found in every_way(place / name):
        assert found.shape == COLOURS.shape
        assert np.abs(found.astype(int) - COLOURS).mean() < (6 if name.endswith("jpg") else 1e-9)


@pytest.mark.parametrize("note", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_note_turns_nothing(place, note):
    Image.fromarray(COLOURS).save(place / "photo.jpg", exif=note)
    assert all(found.shape == COLOURS.shape for found in every_way(place / "photo.jpg"))


def test_what_is_transparent_is_white_and_half_of_it_half_white(place):
    alpha = np.zeros_like(GREY)
    alpha[:, 16:32], alpha[:, 32:] = 102, 255
    Image.fromarray(np.dstack([COLOURS, alpha])).save(place / "logo.png")
    share = alpha[..., None] / 255
    for found in every_way(place / "logo.png"):
        np.testing.assert_allclose(found, share * COLOURS + (1 - share) * 255, atol=1)


@pytest.mark.parametrize("transparent", [None, 3])
def test_palettes_are_looked_up(place, transparent):
    palette = Image.fromarray(COLOURS).quantize(16)
    expected = np.asarray(palette.convert("RGB")).copy()
    if transparent is not None:
        expected[np.asarray(palette) == transparent] = 255
    palette.save(place / "palette.png", **({} if transparent is None else {"transparency": transparent}))
    for found in every_way(place / "palette.png"):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_white_are_refused_with_a_remedy(place, kind):
    file = place / "depth.tiff"
    Image.fromarray(np.linspace(0, 1000, 64 * 48).reshape(48, 64).astype(kind)).save(file)
    with pytest.raises(PictureError, match=r"depth\.tiff: .*does not say which number is white: save it with 8 or 16"):
        read_picture(str(file))
    with pytest.raises(PictureError, match=r"depth\.tiff"):
        open_picture(str(file))


def test_nothing_is_done_twice():
    note = Image.Exif()
    note[0x0112] = 6
    lying = Image.fromarray(COLOURS)
    lying.info["exif"] = note.tobytes()
    once = as_rgb(lying)
    assert once.size == lying.size[::-1]
    assert as_rgb(once) is once
    assert lying.size == (64, 48), "the caller's own picture stays as it is"
    plain = Image.fromarray(COLOURS)
    assert as_rgb(plain) is plain


def test_pictures_that_were_decoded_otherwise_are_decoded_again(place, monkeypatch, tmp_path):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    Image.fromarray(COLOURS).save(place / "picture.png")
    before = load_pairs(place.parent, 32, progress=False).key
    monkeypatch.setattr("mclip.sources.loading.DECODING_VERSION", 1)
    assert load_pairs(place.parent, 32, progress=False).key != before
