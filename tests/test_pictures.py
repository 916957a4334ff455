"""Pictures in files and archives, random crops, and readers of folders and WebDataset shards."""

import errno
import io
import json
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mclip.cli.main import main
from mclip.pictures import RATIOS, Crops, PictureError, crop_box, open_picture, square
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import Pictures, decode, load_pairs
from mclip.sources.readers import DataError
from mclip.sources.zero_shot import zero_shot_set


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def gradient(width: int = 90, height: int = 60, number: int = 0) -> Image.Image:
    """Red grows to the right, green downwards; blue is the number."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 20 * number)], -1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A CSV of six pictures with two captions each, in turns."""
    lines = ["file_name,image_path,caption"]
    for number in range(6):
        gradient(number=number).save(tmp_path / f"{number}.png")
    for turn in ("first", "second"):
        lines += [f"{number}.png,,picture {number} {turn}" for number in range(6)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_captions_of_one_picture_may_lie_apart(folder):
    pairs = load_pairs(folder / "pairs.csv", 32, progress=False)
    assert pairs.captions[4] == ["picture 4 first", "picture 4 second"]
    assert len(pairs) == 6


def test_decoding_always_gives_what_decoding_once_gives(folder):
    once = load_pairs(folder / "pairs.csv", 32, progress=False)
    always = load_pairs(folder / "pairs.csv", 32, decoding="always", progress=False)
    assert isinstance(always.images, Pictures)
    assert always.images.shape == once.images.shape
    rows = np.array([3, 0, 5])
    np.testing.assert_array_equal(always.images[rows], once.images[rows])
    np.testing.assert_array_equal(always.images[1:3], once.images[1:3])
    np.testing.assert_array_equal(always.images[2], once.images[2])


def test_a_damaged_picture_is_found_when_it_is_needed_or_skipped_at_once(folder, capsys):
    (folder / "2.png").write_bytes(b"damaged")
    pairs = load_pairs(folder / "pairs.csv", 32, decoding="always", progress=False)
    assert len(pairs.images[np.array([0, 1])]) == 2
    with pytest.raises(PictureError, match=r"2\.png: not readable.*on_error='skip'"):
        pairs.images[np.array([1, 2])]
    skipped = load_pairs(folder / "pairs.csv", 32, decoding="always", on_error="skip", progress=False)
    assert (len(skipped), skipped.skipped) == (5, 2)
    assert [own[0] for own in skipped.captions] == [f"picture {number} first" for number in (0, 1, 3, 4, 5)]


@given(st.integers(0, 2**63), st.integers(8, 4000), st.integers(8, 4000), st.floats(0.05, 1.0))
@settings(max_examples=200, deadline=None)
def test_a_crop_keeps_its_share_and_its_ratio(seed, width, height, smallest):
    left, top, right, bottom = crop_box(seed, width, height, smallest)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert crop_box(seed, width, height, smallest) == (left, top, right, bottom)
    w, h = right - left, bottom - top
    assert (w - 0.5) / (h + 0.5) <= RATIOS[1]
    assert (w + 0.5) / (h - 0.5) >= RATIOS[0]
    if w != h:  # not the square that is the last resort
        assert (w + 0.5) * (h + 0.5) >= smallest * width * height


def test_a_crop_shows_the_part_that_its_box_names(tmp_path):
    gradient(400, 300).save(tmp_path / "picture.png")
    for seed in range(20):
        left, top, right, bottom = crop_box(seed, 400, 300, 0.3)
        crop = decode(str(tmp_path / "picture.png"), 32, seed, 0.3).astype(float)
        assert crop[0].mean() == pytest.approx((left + right) / 2 / 400 * 255, abs=2)
        assert crop[1].mean() == pytest.approx((top + bottom) / 2 / 300 * 255, abs=2)


def test_the_fast_way_of_reading_gives_what_pillow_gives(tmp_path):
    """JPEG (colour, grey) and PNG with a palette, whole and in part."""
    picture = gradient(300, 201)
    picture.save(tmp_path / "colour.jpg", quality=95)
    picture.convert("L").save(tmp_path / "grey.jpg", quality=95)
    picture.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    picture.convert("P").save(tmp_path / "palette.png")
    for name in ("colour.jpg", "grey.jpg", "print.jpg", "palette.png"):
        for seed in (None, 1, 2):
            slow = square(open_picture(str(tmp_path / name)), 32, seed, 0.3)
            fast = decode(str(tmp_path / name), 32, seed, 0.3)
            difference = fast.astype(int) - np.asarray(slow).transpose(2, 0, 1)
            assert np.abs(difference).max() <= 3, (name, seed)


def test_views_come_in_turns_and_their_seeds_differ():
    crops, pictures = Crops(0.5, 4, 7), np.arange(100)
    views = np.stack([crops.view(pictures, epoch) for epoch in range(8)])
    assert all(sorted(column[:4]) == [0, 1, 2, 3] for column in views.T)
    np.testing.assert_array_equal(views[:4], views[4:])
    assert len(set(views[0])) == 4
    seeds = np.stack([crops.seeds(pictures, np.full(100, view)) for view in range(4)])
    assert len(np.unique(seeds)) == 400
    assert not np.intersect1d(seeds, Crops(0.5, 4, 8).seeds(pictures, np.zeros(100))).size
    fresh = Crops(0.5, 0, 7)
    assert len({int(fresh.seeds(pictures[:1], fresh.view(pictures[:1], epoch))[0]) for epoch in range(50)}) == 50


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """Let this process open ``count`` more files and no others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_shards_need_few_descriptors(tmp_path):
    for number in range(40):
        write_shard(tmp_path / f"{number:05d}.tar", range(number, number + 1))
    pairs = load_pairs(tmp_path, 32, decoding="always", progress=False)
    pairs.images[:1]  # starts the threads
    with few_descriptors(16):
        assert len(pairs.images[:]) == 40


def test_trouble_of_the_system_is_never_a_bad_picture(folder, monkeypatch):
    with few_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        decode(str(folder / "0.png"), 32)
    for number in (errno.EIO, errno.ENOMEM, errno.EACCES, errno.ENFILE):

        def fail(name, *arguments, number=number, **options):
            raise OSError(number, os.strerror(number), str(name))

        monkeypatch.setattr("mclip.pictures.open", fail, raising=False)
        with pytest.raises(OSError, match=r"\.png") as error:
            load_pairs(folder / "pairs.csv", 32, on_error="skip", progress=False)
        assert error.value.errno == number


def test_only_the_chosen_pictures_are_decoded_and_none_is_copied(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("mclip.sources.loading.decode", lambda name, size: decoded.append(name) or decode(name, size))
    half = load_pairs(folder / "pairs.csv", 32, data_size=0.5, seed=1, progress=False)
    assert len(decoded) == len(half) == 3
    assert isinstance(half.images, np.memmap)
    whole = load_pairs(folder / "pairs.csv", 32, progress=False)
    rows = [list(whole.files).index(file) for file in half.files]
    np.testing.assert_array_equal(half.images, whole.images[rows])
    assert half.captions == [whole.captions[row] for row in rows]
    assert half.key != load_pairs(folder / "pairs.csv", 32, data_size=0.5, seed=2, progress=False).key


def test_a_share_of_scenes_is_not_copied():
    whole, half = (load_pairs(scenes=SceneConfig(40, 64, "val"), data_size=s, progress=False) for s in (1.0, 0.5))
    (stored,) = half.images.arrays
    assert isinstance(stored, np.memmap)
    assert half.images.shape == (20, 3, 64, 64)
    for row in (0, 7, 19):
        original = half.images.rows[row]
        np.testing.assert_array_equal(half.images[row], whole.images[original])
        assert half.captions[row] == whole.captions[original]
    np.testing.assert_array_equal(half.images[[3, 1]], whole.images[half.images.rows[[3, 1]]])


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    for name in ("a::b/1.png", "2::0:9"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        gradient(number=3).save(tmp_path / name, "PNG")
    (tmp_path / "pairs.csv").write_text("file_name,caption\na::b/1.png,one\n2::0:9,two\n", encoding="utf-8")
    pairs = load_pairs(tmp_path / "pairs.csv", 32, progress=False)
    assert len(pairs) == 2
    np.testing.assert_array_equal(pairs.images[0], pairs.images[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pairs("~/pairs.csv", 32, progress=False).key == pairs.key


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        gradient().save(tmp_path / name / "1.png")
    for name in ("2.heic", "3.HEIC", "4.gif", "1.txt", ".hidden.gif"):
        (tmp_path / "cat" / name).write_text("a cat", encoding="utf-8")
    for read in (lambda: load_pairs(tmp_path, 32), lambda: zero_shot_set(tmp_path)):
        read()
        assert "3 files of other kinds left out (2 of .heic, 1 of .gif)" in capsys.readouterr().out


def test_what_is_left_out_of_a_folder_of_shards_is_counted_and_named(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", range(2))
    (tmp_path / "0.parquet").write_bytes(b"")
    (tmp_path / "cat").mkdir()
    gradient().save(tmp_path / "cat" / "1.png")
    assert len(load_pairs(tmp_path, 32, progress=False)) == 2
    assert re.search(r"2 files of other kinds left out \(1 of \.\w+, 1 of \.\w+\)", capsys.readouterr().out)


def test_shards_in_a_sub_folder_are_read_as_pictures_are(tmp_path, capsys):
    """They were neither read nor named as left out."""
    for name, number in (("0.tar", 0), ("more/1.tar", 1), ("more/.hidden/2.tar", 2), (".3.tar", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, range(number, number + 1))
    pairs = load_pairs(tmp_path, 32, progress=False)
    assert pairs.captions == [["picture 0 first"], ["picture 1 first"]]
    assert capsys.readouterr().out == ""


def test_no_bar_is_shown_without_progress(folder, tmp_path_factory, capfd):
    shards = tmp_path_factory.mktemp("shards")
    write_shard(shards / "0.tar", range(2))
    for decoding in ("once", "always"):
        for source in (folder / "pairs.csv", shards):
            load_pairs(source, 33, decoding=decoding, on_error="skip", progress=False)
    load_pairs(scenes=SceneConfig(9, 32, "val"), progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["train", "teacher"])
def test_the_commands_pass_progress_on(monkeypatch, command):
    def load(*_, progress=True, **__):
        assert not progress
        raise DataError("far enough")

    monkeypatch.setattr("mclip.recipes.load_pairs", load)
    monkeypatch.setattr("mclip.cli.commands.load_pairs", load)
    assert main([command, "--progress", "false"]) == 2


def write_shard(path: Path, numbers: range, extra: dict[str, bytes] | None = None) -> None:
    """A shard as img2dataset writes it, by hand: NAME.jpg, NAME.txt, NAME.json."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            picture = io.BytesIO()
            gradient(number=number).save(picture, "PNG")
            caption = f"picture {number} first"
            members = {
                "png": picture.getvalue(),
                "txt": caption.encode(),
                "json": json.dumps({"caption": caption}).encode(),
            }
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for name, content in (extra or {}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("form", ["folder", "range"])
def test_webdataset_shards_equal_the_csv(folder, tmp_path_factory, form):
    shards = tmp_path_factory.mktemp("shards")
    write_shard(shards / "00000.tar", range(4))
    write_shard(shards / "00001.tar", range(4, 6))
    source = shards if form == "folder" else f"{shards}/{{00000..00001}}.tar"
    pairs = load_pairs(source, 32, progress=False)
    csv = load_pairs(folder / "pairs.csv", 32, progress=False)
    assert pairs.captions == [own[:1] for own in csv.captions]
    np.testing.assert_array_equal(pairs.images, csv.images)
    always = load_pairs(source, 32, decoding="always", progress=False)
    np.testing.assert_array_equal(always.images[np.array([5, 0])], csv.images[np.array([5, 0])])


def test_shards_equal_what_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:05d}", "png": gradient(number=number), "txt": f"picture {number}"})
    theirs = list(
        webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode("pil").to_tuple("png", "txt")
    )
    ours = load_pairs(tmp_path / "00000.tar", 32, progress=False)
    assert ours.captions == [[text] for _, text in theirs]
    for row, (picture, _) in enumerate(theirs):
        np.testing.assert_array_equal(np.asarray(ours.picture(row)), np.asarray(picture.convert("RGB")))


def test_bad_shards_are_named(tmp_path, capsys):
    with pytest.raises(DataError, match=r"7\.tar: no such file"):
        load_pairs(tmp_path / "7.tar", 32)
    (tmp_path / "bad.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(DataError, match=r"bad\.tar: not a whole WebDataset shard"):
        load_pairs(tmp_path / "bad.tar", 32, progress=False)
    write_shard(tmp_path / "part.tar", range(2), {"000000009.txt": b"a caption without a picture"})
    with pytest.raises(DataError, match=r"part\.tar: the sample '.*000000009' has no picture"):
        load_pairs(tmp_path / "part.tar", 32, progress=False)
    assert load_pairs(tmp_path / "part.tar", 32, on_error="skip", progress=False).skipped == 1


def test_what_comes_before_the_damage_of_a_shard_is_read(tmp_path):
    write_shard(tmp_path / "cut.tar", range(9))
    whole = load_pairs(tmp_path / "cut.tar", 32, progress=False)
    with tarfile.open(tmp_path / "cut.tar") as archive:
        seventh = archive.getmember("000000006.png").offset_data
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: seventh + 9])
    with pytest.raises(DataError, match=r"cut\.tar: not a whole WebDataset shard"):
        load_pairs(tmp_path / "cut.tar", 32, progress=False)
    left = load_pairs(tmp_path / "cut.tar", 32, on_error="skip", progress=False)
    assert list(left.captions) == list(whole.captions)[:6]
    assert left.skipped == 2, "the picture that was cut, and what is missing after it"


def test_a_folder_of_damaged_pictures_leaves_nothing_to_skip_to(tmp_path):
    for number in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "cats" / f"{number}.jpg").write_bytes(b"half of")
    with pytest.raises(DataError, match="none of its 3 pictures can be read"):
        load_pairs(tmp_path, 32, on_error="skip", progress=False)


def test_tables_of_one_name_are_told_apart_by_their_folders(folder, tmp_path):
    names = []
    for place in ("birds", "boats"):
        shutil.copytree(folder, tmp_path / place)
        (tmp_path / place / "pairs.csv").rename(tmp_path / place / "val.csv")
        names.append(load_pairs(tmp_path / place / "val.csv", 32, progress=False).name)
    assert names == ["birds", "boats"]


def sample(number: int, **members: object) -> dict[str, bytes]:
    """Members of one sample; what is no text is written as JSON."""
    picture = io.BytesIO()
    gradient(number=number).save(picture, "PNG")
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in members.items()}
    return {f"{number}.png": picture.getvalue(), **{f"{number}.{key}": text.encode() for key, text in written.items()}}


def test_captions_of_shards_in_every_form(tmp_path, capsys):
    several = {"caption": "two", "caption_2": ["three", None], "captions": ["one"], "url": "x", "recaption": "new"}
    members = (
        sample(1, txt="one", json=several) | sample(2, json={"caption": ["a", "b"]}) | sample(3, json={"url": "x"})
    )
    members |= (
        sample(4, txt="four", json="{damaged")
        | sample(7, json={"caption": "\ud800"})
        | {"8": b"no kind"}
        | {"5.png": b"", "5.json": b"[]"}
        | sample(6, txt="", caption="six")
    )
    write_shard(tmp_path / "00000.tar", range(0), members)
    source = f"{tmp_path}/{{00000..00001}}.tar"
    pairs = load_pairs(source, 32, on_error="skip", progress=False)
    assert pairs.captions == [["one", "two", "three"], ["a", "b"], ["four"], ["six"]]
    # Samples 3, 5, 7 and 8 lack a caption or a picture, or are not Unicode; one archive is not there.
    assert pairs.skipped == 5
    assert "5 rows left out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"00000\.tar: the sample '.*3' has no caption"):
        load_pairs(tmp_path, 32, progress=False)
    write_shard(tmp_path / "00000.tar", range(0), sample(1, json=several))
    with pytest.raises(DataError, match=r"00001\.tar: no such file"):
        load_pairs(source, 32, progress=False)
    assert load_pairs(tmp_path, 32, caption_key="recaption", progress=False).captions == [["new"]]


def test_a_members_name_is_never_a_path(tmp_path):
    """Nothing is unpacked: a member that would climb out of the folder is only a name."""
    shard = tmp_path / "shards" / "evil.tar"
    shard.parent.mkdir()
    write_shard(shard, range(2), {"../../outside.txt": b"climbed out", "../../outside.png": (b"no picture")})
    with pytest.raises(DataError, match="not readable as a picture"):
        load_pairs(shard, 32, progress=False)
    assert {path.name for path in tmp_path.rglob("*")} == {"shards", "evil.tar"}


def test_a_folder_by_class_or_with_text_files(tmp_path):
    for name in ("brown_bear", "cat"):
        (tmp_path / name).mkdir()
        gradient().save(tmp_path / name / "1.png")
    (tmp_path / "cat" / "1.txt").write_text("a cat on a mat\n\nthe cat sits\n", encoding="utf-8")
    pairs = load_pairs(tmp_path, 32, progress=False)
    assert pairs.captions == [["a photo of a brown bear"], ["a cat on a mat", "the cat sits"]]
    gradient().save(tmp_path / "lost.png")
    with pytest.raises(DataError, match=r"lost\.png: no caption; it needs lost\.txt"):
        load_pairs(tmp_path, 32, progress=False)


def test_hidden_folders_and_files_are_not_read(tmp_path):
    root = tmp_path / ".data" / "zoo"
    for name in ("cat/1.png", "cat/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/2.png", "cat/._1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        gradient().save(root / name)
    assert load_pairs(root, 32, progress=False).captions == [["a photo of a cat"]]


def test_a_table_with_tabs_and_named_columns(folder):
    (folder / "pairs.tsv").write_text("title\tfilepath\na red, red star\t0.png\n", encoding="utf-8")
    pairs = load_pairs(folder / "pairs.tsv", 32, image_key="filepath", caption_key="title", progress=False)
    assert pairs.captions == [["a red, red star"]]


def test_real_photographs_crop_alike_for_student_and_teacher():
    root = os.environ.get("MCLIP_REAL_DATA")
    if not root:
        pytest.skip("MCLIP_REAL_DATA is not set: no real photographs")
    pairs = load_pairs(Path(root) / "flickr8k-mini" / "val.csv", 64, decoding="always", progress=False)
    crops = Crops(0.4, 2, 0)
    for row in range(5):
        small = pairs.cropped(row, 64, row, crops).astype(int)
        large = square(pairs.picture(row), 64, row, crops.smallest)
        assert np.abs(small - np.asarray(large).transpose(2, 0, 1)).mean() < 3


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"<html>no picture", "begins with b'<html>no'")])
def test_an_unknown_kind_of_picture_is_described_and_never_by_an_address(tmp_path, content, said):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(PictureError, match=re.escape(said)) as caught:
        open_picture(str(tmp_path / "a.png"))
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PIL", "tensor"])
def test_views_are_mirrored_and_coarse_as_their_seeds_say(kind):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    picture = Image.fromarray(noise) if kind == "PIL" else torch.from_numpy(noise).permute(2, 0, 1)
    plain, changed = Crops(0.6, 4, 0), Crops(0.6, 4, 0, mirrored=True, coarse=16)
    as_array = lambda view: np.asarray(view).transpose(2, 0, 1) if kind == "PIL" else view.numpy()  # noqa: E731
    mirrored = coarse = 0
    for seed in range(400):
        before, after = (as_array(crops.cut(picture, 64, seed)).astype(float) for crops in (plain, changed))
        assert np.array_equal(after, as_array(changed.cut(picture, 64, seed)))
        detail = np.abs(np.diff(after, axis=2)).mean() / np.abs(np.diff(before, axis=2)).mean()
        coarse += detail < 0.7
        if detail >= 0.7:
            assert np.array_equal(after, before) or np.array_equal(after, before[:, :, ::-1])
            mirrored += np.array_equal(after, before[:, :, ::-1])
    assert 70 < coarse < 130  # a quarter of 400, and four standard deviations
    assert abs(mirrored / (400 - coarse) - 0.5) < 0.12


@pytest.mark.parametrize("picture", [np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), None])
def test_what_is_no_picture_is_named_by_its_type(picture):
    with pytest.raises(PictureError, match=rf"of type {type(picture).__name__}: give a PIL picture"):
        open_picture(picture)
