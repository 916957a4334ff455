"""Archives from the network: unpacked whole or not at all, and nowhere but into their folder."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from .downloads import CHUNK, DownloadError, human_size
from .files import missing_folder

MAX_RATIO = 200  # deflate reaches 1,000 on bytes that are all alike; pictures and captions stay below 20
BROKEN = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged, encrypted or hostile archive raises."""


class _Members:
    """Admits members one by one: no name that leads outside, no more bytes than there is room for."""

    def __init__(self, archive: Path, folder: Path, only: str) -> None:
        self.only = f"{only}/" if only else ""
        self.length = archive.stat().st_size
        self.free = shutil.disk_usage(folder).free
        self.count = self.bytes = 0
        self.current = ""

    def admit(self, name: str, size: int) -> bool:
        """Whether to unpack the member; OSError if that would be unsafe."""
        self.current = name
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise OSError("its name leads outside the folder")
        if not name.startswith(self.only):
            return False
        self.count += 1
        self.bytes += size
        if self.bytes > self.free:
            raise OSError(f"unpacked it needs more than the {human_size(self.free)} that are free")
        if self.bytes > MAX_RATIO * self.length:
            raise OSError(f"more than {MAX_RATIO} times the archive's {human_size(self.length)} come out of it")
        return True

    def admit_tar(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """A filter for ``extractall``: the data filter refuses links that lead outside, and devices."""
        return tarfile.data_filter(member, folder) if self.admit(member.name, member.size) else None

    def admit_zip(self, member: zipfile.ZipInfo) -> bool:
        """The same for a member of a zip archive, which is a plain file or a folder."""
        admitted = self.admit(member.filename, member.file_size)
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise OSError("it is a link or a device")
        return admitted


def extract(archive: str | Path, folder: str | Path, *, only: str = "", progress: bool = True) -> Path:
    """Unpack a zip, tar, tar.gz or tgz archive as ``folder``, unless that is there, and return it.

    The folder takes its name only once all is unpacked. Checked against the archive's own checksums (zip, gz); refused
    are names and links that lead outside, devices, and more bytes than are free or than an honest archive holds.

    Args:
        only: unpack this folder of the archive alone: ``folder`` holds what it holds.

    Raises: DownloadError, naming the archive and the member.
    """
    archive, folder = Path(archive), Path(folder)
    members = None
    try:
        with missing_folder(folder) as temporary:
            if temporary:
                members = _Members(archive, temporary, only)
                _unpack(archive, temporary, members, progress)
                if not members.count:
                    members.current = only
                    raise OSError("it is not in the archive")
                if only:
                    inner = temporary.with_name(f"{temporary.name}.inner")
                    (temporary / only).rename(inner)
                    temporary.rmdir()
                    inner.rename(temporary)
    except BROKEN as error:
        member = f", member {members.current!r}" if members and members.current else ""
        raise DownloadError(
            f"{archive}{member}: {error or 'it ends too early'}; nothing was left in {folder}. "
            "A damaged archive is fetched again once it is deleted."
        ) from error
    return folder


def _unpack(archive: Path, folder: Path, members: _Members, progress: bool) -> None:
    if tarfile.is_tarfile(archive):  # first: a tar archive may end with a zip archive, and not the reverse
        if not hasattr(tarfile, "data_filter"):
            raise OSError("unpacking tar archives safely needs Python 3.11.4 or later")
        with tarfile.open(archive) as bundle:
            bundle.extractall(folder, filter=members.admit_tar)
            while bundle.fileobj.read(CHUNK):  # tarfile stops before the end, where gzip compares its checksum
                pass
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            admitted = [member for member in bundle.infolist() if members.admit_zip(member)]
            for member in tqdm(admitted, f"unpacking {archive.name}", disable=not progress, leave=False):
                members.current = member.filename
                bundle.extract(member, folder)
    else:
        raise OSError("it is neither a zip nor a tar archive, or it is damaged")
