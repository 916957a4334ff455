"""Archives that are honest, hostile or damaged."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
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


def tarred(files: dict[str, bytes], path: Path, **attributes: object) -> Path:
    with tarfile.open(path, "w:" if path.suffix == ".tar" else "w:gz") as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            vars_of = {"size": len(content), **attributes}
            for key, value in vars_of.items():
                setattr(member, key, value)
            bundle.addfile(member, io.BytesIO(content))
    return path


HONEST = {"top/a.txt": b"a" * 50, "top/deep/b.txt": CONTENT[:500], "__MACOSX/top/._a.txt": b"fork"}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz"])
def test_archives_unpack_whole_and_once(tmp_path, name):
    archive = (zipped if name == "x.zip" else tarred)(HONEST, tmp_path / name)
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
    for pack, file in ((zipped, "x.zip"), (tarred, "x.tar")):
        folder = tmp_path / file[2:]
        folder.mkdir()
        refused(pack({"good": b"1", name: b"2"}, folder / file), repr(name), "outside")


@pytest.mark.parametrize("link", ["../../evil", "/etc/passwd"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_lead_outside_are_refused(tmp_path, link, kind):
    refused(tarred({"link": b""}, tmp_path / "x.tar", type=kind, linkname=link), "'link'")


def test_devices_are_refused_and_a_link_in_a_zip_archive_is_a_text(tmp_path):
    refused(tarred({"null": b""}, tmp_path / "x.tar", type=tarfile.CHRTYPE), "'null'")
    archive = zipped({"link": b"../evil"}, tmp_path / "x.zip", stat.S_IFLNK | 0o777)
    link = extract(archive, tmp_path / "zip") / "link"
    assert not link.is_symlink()
    assert link.read_bytes() == b"../evil"


@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
def test_bombs_are_refused(tmp_path, monkeypatch, name):
    archive = (zipped if name == "x.zip" else tarred)({"zeros": bytes(10**6)}, tmp_path / name)
    refused(archive, "1.00MB would come out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=100))
    shutil.rmtree(tmp_path / "inside")
    refused(archive, "1.00MB would come out of it, more than the 100B")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz"])
def test_damaged_archives_are_named(tmp_path, name):
    archive = (zipped if name == "x.zip" else tarred)({"noise": CONTENT}, tmp_path / name)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    refused(archive, "fetched again")
    shutil.rmtree(tmp_path / "inside")
    archive.write_bytes(b"<html>log in first</html>" * 100)
    refused(archive, "not a zip file")
    if name == "x.zip":  # which has a checksum of its content
        shutil.rmtree(tmp_path / "inside")
        archive.write_bytes(whole[:2000] + b"xxxx" + whole[2004:])
        refused(archive)
    fails(lambda: extract(tmp_path / "none.zip", tmp_path / "none"), "none.zip")


def test_a_folder_that_the_archive_lacks_is_named(tmp_path):
    archive = zipped(HONEST, tmp_path / "x.zip")
    fails(lambda: extract(archive, tmp_path / "train", only="train2017"), "train2017", "No such file")
