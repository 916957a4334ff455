"""Downloads that survive a bad network: resumed, timed out, tried again, checked, and whole or not there."""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import requests
from filelock import FileLock
from tqdm.auto import tqdm

from mclip import __version__
from mclip.files import missing_folder

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
BACK_OFF = 1.0  # seconds before the second try; each further wait is twice as long
CHUNK = 64 * 1024


class DownloadError(OSError):
    """A file that cannot be had or unpacked; the message names what, why, what is kept and the remedy."""


def human_size(count: float) -> str:
    """``count`` bytes in the largest unit that suits it: 815.6 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def fetch(
    url: str,
    path: str | Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    progress: bool = True,
    timeout: float = DOWNLOAD_TIMEOUT,
    tries: int = 3,
) -> Path:
    """Download ``url`` to ``path`` unless the file is there already, and return ``path``.

    What has arrived is kept in ``path.part`` and resumed, now or by a later call. The file takes its name only once
    it is whole. Of several processes that want the same file one downloads it.

    Args:
        checksum: "md5:..." or "sha256:..."; without it and ``size`` any file at ``path`` is taken as right.
        size: bytes; a server that offers another number is refused at once.
        timeout: seconds without a byte after which the connection is given up.
        tries: in a row that bring nothing new, after time-outs, lost connections and errors of the server (5xx).

    Raises: DownloadError.
    """
    path = Path(path).expanduser()
    part = path.with_name(path.name + ".part")
    if path.is_file() and not _difference(path, checksum, size):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not _difference(path, checksum, size):
                return path  # another process was faster
            _receive_with_retries(url, part, size, progress, timeout, tries)
            if difference := _difference(part, checksum, size):
                part.unlink()
                raise OSError(f"the download is damaged ({difference}) and was deleted")
            part.replace(path)
    except OSError as error:  # those of requests are OSErrors too
        kept = f"{human_size(part.stat().st_size)} are kept, and the same call resumes them" if part.exists() else ""
        raise DownloadError(
            f"{url}: {_reason(error, timeout)}; wanted as {path} ({kept or 'nothing is kept of it'}). "
            f"Try again later, or download it in another way and place it as {path}."
        ) from error
    return path


def _difference(path: Path, checksum: str | None, size: int | None) -> str:
    """What is wrong with the file; empty if nothing."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, not {size}"
    if checksum:
        name, _, expected = checksum.partition(":")
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()
        return "" if digest == expected else f"{name} {digest}, not {expected}"
    return ""


def _reason(error: OSError, timeout: float) -> str:
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):  # requests gives both forms
        return f"no answer for {timeout:g} s"
    return f"the connection failed: {error}" if isinstance(error, requests.RequestException) else str(error)


def _may_pass(error: requests.RequestException) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response.status_code >= 500
    passing = (requests.Timeout, requests.ConnectionError, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, passing) and not isinstance(error, requests.exceptions.SSLError)


def _receive_with_retries(url: str, part: Path, size: int | None, progress: bool, timeout: float, tries: int) -> None:
    failed, most = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            return _receive(url, part, size, progress, timeout)
        except requests.RequestException as error:
            now = part.stat().st_size if part.exists() else 0
            failed, most = (0 if now > most else failed) + 1, max(now, most)
            if failed >= tries or not _may_pass(error):
                raise
        time.sleep(BACK_OFF * 2 ** (failed - 1))


def _receive(url: str, part: Path, size: int | None, progress: bool, timeout: float) -> None:
    """Append to ``part`` what it lacks, or begin it anew where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None:
        if have == size:
            return
        _require_space(part, size - have, size)
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mclip/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if have and response.status_code == 416:  # no byte after those: either all are here, or too many
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            return _receive(url, part, size, progress, timeout)
        response.raise_for_status()
        resumed = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(resumed[1]) if resumed and response.status_code == 206 else 0
        if start > have:
            raise OSError(f"the server sent bytes from {start} on where {have} were asked for")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if total is not None:
            if size not in (None, total):
                raise OSError(f"the server offers {total} bytes, not {size}: this is not the file")
            _require_space(part, total - have, total)
        # Some servers call the compression of a .tar.gz an encoding of the transfer: the file is wanted as it is.
        response.raw.headers.pop("Content-Encoding", None)
        bar = tqdm(None, part.stem, total, initial=start, unit="B", unit_scale=True, disable=not progress, leave=False)
        with part.open("ab") as handle, bar:
            handle.truncate(start)
            for chunk in response.iter_content(CHUNK):
                handle.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise requests.ConnectionError(f"it ended after {part.stat().st_size} of {total} bytes")


def _require_space(path: Path, needed: int, total: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        missing = f"{human_size(needed)} of {human_size(total)} are still to be written"
        raise OSError(f"{missing}, but only {human_size(free)} are free in {path.parent}")


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
