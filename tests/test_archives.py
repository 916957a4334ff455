"""Archives that are honest, hostile or damaged."""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from bad_server import CONTENT, fails

from mclip.sources.downloads import extract


def zipped(files: dict[str, bytes], path: Path, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            bundle.writestr(member, content)
    return path


HONEST = {"top/a.txt": b"a" * 50, "top/deep/b.txt": CONTENT[:500], "__MACOSX/top/._a.txt": b"fork"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_archives_unpack_whole_and_once(tmp_path):
    archive, whole, part = zipped(HONEST, tmp_path / "x.zip"), tmp_path / "all", tmp_path / "top"
    extract(archive, whole)
    assert {str(p.relative_to(whole)): p.read_bytes() for p in whole.rglob("*") if p.is_file()} == HONEST
    extract(archive, part)
    assert sorted(path.name for path in part.iterdir()) == ["a.txt", "deep"]
    (part / "mine").touch()
    archive.unlink()
    extract(archive, part)  # what is there is left alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "top"]


def refused(archive: Path, *words: str) -> None:
    """``archive`` is named with ``words``, and nothing is left of it, inside its folder or outside."""
    folder = archive.parent / "inside" / "folder"
    fails(lambda: extract(archive, folder), str(archive), *words)
    assert not list(folder.parent.iterdir())
    assert sorted(path.name for path in archive.parent.iterdir()) == sorted(["inside", archive.name])


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../../evil"])
def test_no_member_is_written_outside(tmp_path, name):
    extract(zipped({"good": b"1", name: b"2"}, tmp_path / "x.zip"), tmp_path / "inside" / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"x.zip", "inside"}
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["folder"]


def test_a_link_is_a_text(tmp_path):
    extract(zipped({"link": b"../evil"}, tmp_path / "x.zip", stat.S_IFLNK | 0o777), tmp_path / "zip")
    assert not (tmp_path / "zip" / "link").is_symlink()
    assert (tmp_path / "zip" / "link").read_bytes() == b"../evil"


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
