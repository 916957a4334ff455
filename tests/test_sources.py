"""Named sets from beginning to end: fetched, unpacked, read; torchvision downloads its own."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_server import Server, serving
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils

from mclip.cli.main import main
from mclip.config import ConfigError
from mclip.sources import caption_sets, downloads, zero_shot
from mclip.sources.caption_sets import caption_set
from mclip.sources.downloads import DownloadError
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import TORCHVISION_SETS, torchvision_set


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "BACK_OFF", 0.0)
    with serving() as state:
        yield state


def picture(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (colour, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


def coco_annotations(split: str, ids: range) -> bytes:
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in ids]
    captions = [{"image_id": i, "caption": f"a thing of {split} number {i}."} for i in ids for _ in range(2)]
    return json.dumps({"images": images, "annotations": captions}).encode()


TRAIN, VAL = range(4), range(4, 6)
NAMES = [f"{i}_ab.jpg" for i in range(5)]  # train has two, val, test and no split one each
ARCHIVES = {
    "annotations_trainval2017.zip": zipped(
        {
            "annotations/captions_train2017.json": coco_annotations("train", TRAIN),
            "annotations/captions_val2017.json": coco_annotations("val", VAL),
        }
    ),
    "train2017.zip": zipped({f"train2017/{i:012}.jpg": picture(i) for i in TRAIN}),
    "val2017.zip": zipped({f"val2017/{i:012}.jpg": picture(i) for i in VAL}),
    "Flickr8k_text.zip": zipped(
        {
            "Flickr8k.token.txt": "\n".join(
                f'{name}#{k}\tA "red, wide" thing\u2019s number {k} .'
                for name in [*NAMES, "9_cd.jpg.1"]
                for k in range(5)
            ).encode(),
            "Flickr_8k.trainImages.txt": "\n".join(NAMES[:2]).encode(),
            "Flickr_8k.devImages.txt": NAMES[2].encode(),
            "Flickr_8k.testImages.txt": NAMES[3].encode() + b"\n",
            "__MACOSX/._readme.txt": b"fork",
        }
    ),
    "Flickr8k_Dataset.zip": zipped(
        {f"Flicker8k_Dataset/{name}": picture(i) for i, name in enumerate(NAMES)} | {"__MACOSX/._x": b"fork"}
    ),
}


@pytest.fixture
def small(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same sources with tiny archives, served locally."""

    for folder, archive in caption_sets.ARCHIVES.items():
        name = archive["url"].rpartition("/")[2]
        server.files[f"/{name}"] = ARCHIVES[name]
        local = {"url": f"{server.url}/{name}", "checksum": "md5:" + hashlib.md5(ARCHIVES[name]).hexdigest()}
        monkeypatch.setitem(caption_sets.ARCHIVES, folder, archive | local)
    return server


@pytest.mark.parametrize(("name", "sizes"), [("coco", {"train": 4, "val": 2}), ("flickr8k", {"train": 2, "val": 1})])
def test_a_set_is_fetched_unpacked_and_read(small, tmp_path, name, sizes):
    small.faults = ["503"]
    for split, size in sizes.items():
        pairs = load_pairs(caption_set(name, tmp_path, download=True, split=split), 32, progress=False)
        assert len(pairs) == size
        assert {len(own) for own in pairs.captions} == {2 if name == "coco" else 5}
        first = sum(list(sizes.values())[: list(sizes).index(split)])  # pictures are as red as their number
        assert pairs.images[:, 0].mean((1, 2)).tolist() == pytest.approx(range(first, first + size), abs=1)
    asked = len(small.requests)
    assert asked == 1 + len({folder for folders in caption_sets.SETS[name].values() for folder in folders})
    for archive in (tmp_path / name).glob("*.zip"):
        archive.unlink()
    caption_set(name, tmp_path, download=True)
    caption_set(name, tmp_path)
    assert len(small.requests) == asked


def test_missing_sets_say_where_they_come_from(tmp_path):
    with pytest.raises(ConfigError) as raised:
        caption_set("coco", tmp_path)
    for part in ("train2017", "19.3 GB", "http://images.cocodataset.org/zips/train2017.zip", "253 MB", str(tmp_path)):
        assert part in str(raised.value)
    assert f"python -m mclip download coco --root_dir {tmp_path}" in str(raised.value)
    with pytest.raises(ConfigError, match="about 1 GB"):
        caption_set("flickr8k", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'flickr8k'"):
        caption_set("flickr30k", tmp_path)
    with pytest.raises(ConfigError, match="coco has train, val"):
        caption_set("coco", tmp_path, split="test")


def test_archives_placed_by_hand_are_unpacked(small, tmp_path):
    (tmp_path / "flickr8k").mkdir()
    for name in ("Flickr8k_text.zip", "Flickr8k_Dataset.zip"):
        (tmp_path / "flickr8k" / name).write_bytes(ARCHIVES[name])
    path = caption_set("flickr8k", tmp_path, download=True, split="test")
    assert not small.requests
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0].values()) == [NAMES[3], "Flicker8k_Dataset", 'A "red, wide" thing\u2019s number 0 .']
    path.unlink()
    (tmp_path / "flickr8k" / "Flickr8k_text" / "Flickr8k.token.txt").unlink()
    with pytest.raises(DownloadError, match=r"Flickr8k_text: not the captions"):
        caption_set("flickr8k", tmp_path, split="test")


def test_the_command_fetches_every_split(small, tmp_path, capsys):
    assert main(["download", "flickr8k", "--root_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "flickr8k" / f"{split}.csv") for split in ("train", "val", "test")]
    small.faults = ["404"]
    assert main(["download", "coco", "--root_dir", str(tmp_path)]) == 2
    assert "404" in capsys.readouterr().err
    assert main(["download", "cifar"]) == 2
    assert "did you mean" in capsys.readouterr().err


CLASSES = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"


def test_torchvision_downloads_its_own_sets(server, tmp_path, monkeypatch):
    content = zipped({f"2750/{name}/{name}_1.jpg": picture(i) for i, name in enumerate(CLASSES.split())})
    server.files["/EuroSAT.zip"] = content
    theirs, md5 = utils.download_url, hashlib.md5(content).hexdigest()
    local = lambda url, root, filename, md5_of_theirs: theirs(f"{server.url}/EuroSAT.zip", root, filename, md5)  # noqa: E731
    monkeypatch.setattr(utils, "download_url", local)
    server.faults = ["404"]
    with pytest.raises(ConfigError, match=r"eurosat.*404.*place"):
        torchvision_set("eurosat", tmp_path, download=True)
    (tmp_path / "eurosat" / "EuroSAT.zip").write_bytes(b"damaged")
    assert main(["download", "eurosat", "--root_dir", str(tmp_path)]) == 0
    assert len(torchvision_set("eurosat", tmp_path).images) == 10


def test_a_link_to_google_drive_names_gdown(tmp_path, monkeypatch):
    def through_drive(root, download, **_):
        utils.download_file_from_google_drive("137RyRjvTBkBiIfeYBNZBtViDHQ6_Ewsp", root)

    monkeypatch.setattr("torchvision.datasets.Caltech101", through_drive)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ConfigError, match=r"pip install gdown.*place its files there"):
        torchvision_set("caltech101", tmp_path, download=True)


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_what_is_there_is_opened_without_the_network(name, tmp_path, monkeypatch):
    def refuse(url: str, *_: object, **__: object) -> None:
        pytest.fail(f"{url} was asked for")

    monkeypatch.setattr("socket.create_connection", refuse)
    source = zero_shot._SETS[name]
    if source.get("downloads", True):
        kind = getattr(datasets, source["dataset"])
        [check] = {"_check_exists", "_check_integrity"} & {key for each in kind.__mro__ for key in vars(each)}
        monkeypatch.setattr(kind, check, lambda self: True)
        monkeypatch.setattr(utils, "check_integrity", lambda path, md5: True)
    with pytest.raises(ConfigError, match=r"cannot be read below"):  # nothing else is there
        torchvision_set(name, tmp_path, download=True)


def test_a_whole_set_is_opened_with_download(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("the network was asked"))
    for i, name in enumerate(CLASSES.split()):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(picture(i))
    assert len(torchvision_set("eurosat", tmp_path, download=True).images) == 10
