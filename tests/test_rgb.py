"""Pictures of every kind, by every way in: training, a teacher, evaluation, ``mclip.load`` and the exported reader."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import nn

import mclip
from mclip import pictures
from mclip.deploy import reader
from mclip.deploy.export import standalone_reader
from mclip.evaluate import embed_images
from mclip.pairs import normalise
from mclip.pictures import PictureError, as_rgb, middle, open_picture, read_picture
from mclip.sources.loading import decode, load_pairs
from mclip.sources.zero_shot import zero_shot_set

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
    evaluated = zero_shot_set(path.parents[1]).images[0][0]
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
    with pytest.raises(PictureError, match=r"depth\.tiff: .*does not say which number is white: save it as a PNG of 8"):
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


# One way for a picture: training, evaluation, mclip.load and the exported reader, from file to pixels

SIZE = 64
LEVELS = 3  # of 255: Pillow and torch round a resized pixel differently, and so do two JPEG decoders


class Camera(nn.Module):
    """A student that keeps what it is shown."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.config, self.preprocess, self.MEAN, self.STD = (
            student.config,
            student.preprocess,
            student.MEAN,
            student.STD,
        )
        self.shown: list[torch.Tensor] = []

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        self.shown.append(images)
        return torch.ones(len(images), 2)


@pytest.fixture(scope="module")
def ways() -> dict[str, Callable[[Path], np.ndarray]]:
    """By name, a function from a file to the pixels (3, 64, 64), 0 to 255, that a student sees."""
    student, preprocess, _ = mclip.load("kd")
    _, open_clips, _ = mclip.load("teacher")
    mean, std = (np.array(numbers)[:, None, None] for numbers in (student.MEAN, student.STD))
    settings = {"size": SIZE, "interpolation": "bicubic", "channels": "RGB", "mean": student.MEAN, "std": student.STD}

    def levels(prepared: np.ndarray) -> np.ndarray:
        return 255 * (np.asarray(prepared) * std + mean)

    def evaluated(path: Path) -> np.ndarray:
        camera = Camera(student)
        embed_images(camera, [Image.open(path)])
        return levels(camera.shown[0][0])

    return {
        "training": lambda path: decode(str(path), SIZE),
        "evaluation": evaluated,
        "load": lambda path: levels(preprocess(Image.open(path))),
        "load, open_clip's": lambda path: 255 * (0.25 * open_clips(Image.open(path)).numpy() + 0.5),
        "reader": lambda path: levels(reader.prepare(path, settings)),
    }


def colours(width: int = 96, height: int = 80) -> Image.Image:
    """Smooth random colours."""
    rough = np.random.default_rng(width).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def on_white(picture: Image.Image, alpha: np.ndarray) -> Image.Image:
    share = alpha[..., None] / 255
    return Image.fromarray((share * np.asarray(picture.convert("RGB")) + (1 - share) * 255).round().astype(np.uint8))


def odd_kinds() -> dict[str, tuple[Image.Image, dict, Image.Image]]:
    """By file name: what is saved, with which options, and the upright RGB picture that it shows."""
    plain, grey = colours(), colours().convert("L")
    alpha = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (80, 1))
    faded = plain.copy()
    faded.putalpha(Image.fromarray(alpha))
    faded_grey = Image.merge("LA", [grey, Image.fromarray(alpha)])
    palette = plain.quantize(16)
    shares = np.array(range(0, 256, 17))
    hole = on_white(palette, np.where(np.asarray(palette) == 3, 0, 255))
    turned, bits = Image.Exif(), plain.convert("1")
    turned[0x0112] = 6
    lying = plain.transpose(Image.Transpose.ROTATE_90)
    print_colours, second = plain.convert("CMYK"), Image.new("RGB", plain.size, "red")
    animation = {"save_all": True, "append_images": [second], "duration": 100}
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    return {
        "alpha.png": (faded, {}, on_white(plain, alpha)),
        "alpha.webp": (faded, {"lossless": True, "exact": True}, on_white(plain, alpha)),
        "grey-alpha.png": (faded_grey, {}, on_white(grey, alpha)),
        "palette.png": (palette, {}, palette.convert("RGB")),
        "palette-alpha.png": (
            palette,
            {"transparency": bytes(shares.tolist())},
            on_white(palette, shares[np.asarray(palette)]),
        ),
        "palette-hole.gif": (palette, {"transparency": 3, "optimize": False}, hole),
        "grey16.png": (deep, {}, grey.convert("RGB")),
        "grey16.tiff": (deep, {}, grey.convert("RGB")),
        "turned.jpg": (lying, {"exif": turned, "quality": 98, "subsampling": 0}, plain),
        "turned.png": (lying, {"exif": turned}, plain),
        "turned.tiff": (lying, {"exif": turned}, plain),
        "print.jpg": (print_colours, {"quality": 98, "subsampling": 0}, plain),
        "bits.png": (bits, {}, bits.convert("RGB")),
        "animation.gif": (palette, animation, palette.convert("RGB")),
        "animation.png": (plain, animation, plain),
        "animation.webp": (plain, {**animation, "lossless": True}, plain),
        "long.png": (colours(2000, 10), {}, colours(2000, 10)),
        "long.jpg": (colours(9, 1777), {"quality": 98, "subsampling": 0}, colours(9, 1777)),
    }


@pytest.mark.parametrize("name", odd_kinds())
def test_every_way_shows_the_same_pixels(place, ways, name):
    picture, options, shown = odd_kinds()[name]
    picture.save(place / name, **options)
    side = min(shown.size)
    expected = shown.resize([SIZE * length // side for length in shown.size], Image.Resampling.BICUBIC)
    left, top = ((length - SIZE) // 2 for length in expected.size)
    expected = np.asarray(expected.crop((left, top, left + SIZE, top + SIZE)), float).transpose(2, 0, 1)
    for way, pixels in ways.items():
        difference = np.abs(pixels(place / name) - expected)
        assert difference.mean() < 1, way
        assert difference.max() <= LEVELS + (9 if name.endswith("jpg") else 0), way  # JPEG itself loses some


def test_the_exported_reader_carries_the_decision_word_for_word():
    text, carried = standalone_reader(), {}
    exec(compile(text, "reader.py", "exec"), carried)
    for name in ("middle", "as_rgb"):
        assert inspect.getsource(getattr(pictures, name)) in text
        assert carried[name].__code__.co_filename == "reader.py"
    for name in ("LONGEST", "UNREADABLE"):
        assert carried[name] == getattr(pictures, name)
    assert not re.search(r"^\s*(from|import) mclip", text, re.MULTILINE)


def damaged(path: Path) -> None:
    colours().save(path)
    path.write_bytes(path.read_bytes()[:400])


def no_picture(path: Path) -> None:
    path.write_text("<html>not found</html>", encoding="utf-8")


def damaged_avif(path: Path) -> None:
    """For which Pillow has a RuntimeError of its own."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    colours().save(path, "AVIF")
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("write", [damaged, damaged_avif, no_picture, lambda path: colours(400, 400).save(path)])
def test_every_way_names_what_it_cannot_read(place, ways, write, monkeypatch):
    """A cut file, a page of a web server, and a decompression bomb."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    write(place / "bad.png")
    (place.parent / "b").mkdir()
    colours().save(place.parent / "b" / "good.png")
    ways = dict(ways)
    # Image.open of a caller's own would fail before the picture is ours: these two read files as well.
    ways |= {"load": mclip.load("kd")[1], "load, open_clip's": mclip.load("teacher")[1]}
    ways["evaluation"] = lambda path: embed_images(mclip.load("kd")[0], zero_shot_set(path.parents[1]).images)
    errors = {"reader": reader.DeployError}
    for way, pixels in ways.items():
        with pytest.raises(errors.get(way, PictureError), match=r"bad\.png: not readable as a picture"):
            pixels(place / "bad.png")


def test_a_picture_that_pillow_has_opened_is_named_too(place):
    damaged(place / "bad.png")
    _, preprocess, _ = mclip.load("kd")
    settings = {"size": SIZE}
    with pytest.raises(PictureError, match=r"bad\.png: not readable"):
        preprocess(Image.open(place / "bad.png"))
    with pytest.raises(reader.DeployError, match=r"bad\.png: not readable"):
        reader.prepare(Image.open(place / "bad.png"), settings)


def test_only_the_ends_of_very_long_pictures_are_left_out():
    for width, height in ((100, 100), (800, 100), (1, 8), (3, 20)):
        assert middle(width, height) == (0, 0, width, height)
    assert middle(1000, 10) == (460, 0, 540, 10)
    assert middle(3, 101) == (0, 38, 3, 63)  # centred: as many pixels above as below
    long = colours(1000, 10)
    assert as_rgb(long).size == (80, 10)
    assert as_rgb(as_rgb(long)).size == (80, 10)


STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_megabytes(call: Callable[[], object]) -> float:
    """How far the memory of this process rises above where it is, while ``call`` runs."""
    resident = lambda key: int(re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())[1]) / 1024  # noqa: E731
    FORGET.write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.skipif(not os.access(FORGET, os.W_OK), reason="the peak of a process is known on Linux alone")
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_very_long_picture_costs_no_memory(place, ways, shape):
    Image.new("RGB", shape, "red").save(place / "long.png")
    for way, pixels in ways.items():
        assert added_megabytes(lambda pixels=pixels: pixels(place / "long.png")) < 100, way  # resized whole: over 700


@pytest.mark.skipif(not os.access(FORGET, os.W_OK), reason="the peak of a process is known on Linux alone")
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_very_long_array_costs_no_memory(shape):
    long = torch.full((1, 3, *shape), 255, dtype=torch.uint8)
    assert added_megabytes(lambda: normalise(long, 32, (0.0,) * 3, (1.0,) * 3)) < 100  # resized whole: over 700
