"""Archives that are honest, hostile or damaged."""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from bad_server import CONTENT, fails

from mclip.sources import downloads
from mclip.sources.downloads import extract


def zipped(files: dict[str, bytes], path: Path, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            bundle.writestr(member, content)
    return path


HONEST = {"top/a.txt": b"a" * 50, "top/deep/b.txt": CONTENT[:500], "__MACOSX/top/._a.txt": b"fork"}


def test_archives_unpack_whole_and_once(tmp_path):
    archive = zipped(HONEST, tmp_path / "x.zip")
    found = extract(archive, tmp_path / "all")
    assert {str(p.relative_to(found)): p.read_bytes() for p in found.rglob("*") if p.is_file()} == HONEST
    part = extract(archive, tmp_path / "top", only="top")
    assert sorted(path.name for path in part.iterdir()) == ["a.txt", "deep"]
    (part / "mine").touch()
    archive.unlink()
    assert extract(archive, part) == part  # what is there is left alone
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["all", "top"]


def refused(archive: Path, *words: str) -> None:
    """``archive`` is named with ``words``, and nothing is left of it, inside its folder or outside."""
    folder = archive.parent / "inside" / "folder"
    fails(lambda: extract(archive, folder), str(archive), *words)
    assert [path.name for path in folder.parent.iterdir()] == [".folder.lock"]
    assert sorted(path.name for path in archive.parent.iterdir()) == sorted(["inside", archive.name])


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../../evil", "..\\evil"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    refused(zipped({"good": b"1", name: b"2"}, tmp_path / "x.zip"), repr(name), "outside")


def test_a_link_is_a_text(tmp_path):
    archive = zipped({"link": b"../evil"}, tmp_path / "x.zip", stat.S_IFLNK | 0o777)
    link = extract(archive, tmp_path / "zip") / "link"
    assert not link.is_symlink()
    assert link.read_bytes() == b"../evil"


def test_bombs_are_refused(tmp_path, monkeypatch):
    archive = zipped({"zeros": bytes(10**6)}, tmp_path / "x.zip")
    refused(archive, "1.00MB would come out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=100))
    shutil.rmtree(tmp_path / "inside")
    refused(archive, "1.00MB would come out of it, more than the 100B")


def test_damaged_archives_are_named(tmp_path):
    archive = zipped({"noise": CONTENT}, tmp_path / "x.zip")
    whole = archive.read_bytes()
    for damaged, words in (
        (whole[: len(whole) // 2], "fetched again"),
        (b"<html>log in first</html>" * 100, "not a zip file"),
        (whole[:2000] + b"xxxx" + whole[2004:], "CRC"),
    ):
        archive.write_bytes(damaged)
        refused(archive, words)
        shutil.rmtree(tmp_path / "inside")
    fails(lambda: extract(tmp_path / "none.zip", tmp_path / "none"), "none.zip")


def test_a_folder_that_the_archive_lacks_is_named(tmp_path):
    archive = zipped(HONEST, tmp_path / "x.zip")
    fails(lambda: extract(archive, tmp_path / "train", only="train2017"), "holds no folder train2017")
