"""Downloads that survive a bad network: resumed, timed out, tried again, checked, and whole or not there."""

from __future__ import annotations

import shutil
import tarfile
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock
from requests.exceptions import ChunkedEncodingError, HTTPError, SSLError
from tqdm import tqdm

from mclip import __version__
from mclip.files import missing_folder

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
BACK_OFF = 1.0  # seconds before the second try; each further wait is twice as long
CHUNK = 64 * 1024
human_size = partial(tqdm.format_sizeof, suffix="B")
MAX_RATIO = 200  # deflate reaches 1,000 on bytes that are all alike; pictures and captions stay below 20


class DownloadError(OSError):
    """A file that cannot be had or unpacked; the message names what, why, what is kept and the remedy."""


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

    What has arrived is kept in ``path.part`` and resumed, now or by a later call. Only a whole file takes its name.
    Of several processes that want the same file one downloads it.

    Args:
        checksum: "md5:..." or "sha256:..."; without it and ``size`` any file at ``path`` is taken as right.
        size: bytes; a server that offers another number is refused at once.
        timeout: seconds without a byte after which the connection is given up.
        tries: in a row that bring nothing new, after time-outs, lost connections and errors of the server (5xx).

    Raises: DownloadError.
    """
    path = Path(path).expanduser()
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not _difference(path, checksum, size):
                return path
            failed = 0
            while failed < tries:
                have = _length(part)
                try:
                    _append(url, part, size, progress, timeout)
                    break
                except (requests.Timeout, requests.ConnectionError, ChunkedEncodingError, HTTPError) as error:
                    failed = 0 if _length(part) > have else failed + 1
                    lasting = isinstance(error, HTTPError) and error.response.status_code < 500
                    if failed == tries or lasting or isinstance(error, SSLError):
                        raise
                time.sleep(BACK_OFF * 2 ** max(0, failed - 1))
            if difference := _difference(part, checksum, size):
                part.unlink()
                raise OSError(f"the download is damaged ({difference}) and was deleted")
            part.replace(path)
    except OSError as error:  # those of requests are OSErrors too
        kept = f"{human_size(_length(part))} are kept, and the same call resumes them" if part.exists() else ""
        if isinstance(error, HTTPError):
            error = OSError(f"the server answered {error.response.status_code} {error.response.reason}")
        elif isinstance(error, requests.Timeout) or "timed out" in str(error):  # requests gives both forms
            error = OSError(f"no answer for {timeout:g} s")
        elif isinstance(error, requests.RequestException):
            error = OSError(f"the connection failed: {error}")
        raise DownloadError(
            f"{url}: {error}; wanted as {path} ({kept or 'nothing is kept of it'}). "
            f"Try again later, or download it in another way and place it as {path}."
        ) from error
    return path


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _difference(path: Path, checksum: str | None, size: int | None) -> str:
    """What is wrong with the file; empty if nothing."""
    if size not in (None, _length(path)):
        return f"{_length(path)} bytes, not {size}"
    name, _, expected = (checksum or "").partition(":")
    if not name:
        return ""
    digest = pooch.file_hash(str(path), alg=name)
    return "" if digest == expected else f"{name} {digest}, not {expected}"


def _append(url: str, part: Path, size: int | None, progress: bool, timeout: float) -> None:
    """Add what ``part`` lacks, or begin it anew where the server cannot resume."""
    have = _length(part)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mclip/{__version__}"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if have and response.status_code == 416:  # the server has no byte after those
            part.unlink()
            raise requests.ConnectionError(f"the file ends before byte {have}")
        response.raise_for_status()
        start = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if size not in (None, total):
            raise OSError(f"the server offers {total} bytes, not {size}: this is not the file")
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise OSError(f"{human_size(total - have)} are still to be written, but only {human_size(free)} are free")
        bar = tqdm(None, part.stem, total, initial=start, unit="B", unit_scale=True, disable=not progress, leave=False)
        with part.open("ab") as handle, bar:
            handle.truncate(start)
            for chunk in response.iter_content(CHUNK):
                handle.write(chunk)
                bar.update(len(chunk))
    if total and _length(part) < total:
        raise requests.ConnectionError(f"it ended after {_length(part)} of {total} bytes")


def extract(archive: str | Path, folder: str | Path, *, only: str = "") -> Path:
    """Unpack a zip or tar archive as ``folder``, unless that is there, and return it; with ``only``, one folder of it.

    The folder takes its name only once all is unpacked. An archive is refused if a member's path or link leads outside,
    or if it holds more bytes than are free or than an honest archive holds.

    Raises: DownloadError, naming the archive.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with missing_folder(folder) as temporary:
            if temporary:
                whole = temporary.resolve()
                is_tar = tarfile.is_tarfile(archive)
                _check_members(archive, whole, is_tar)
                unpack = (pooch.Untar if is_tar else pooch.Unzip)([only] if only else None, str(whole))
                unpack(str(archive), "download", None)
                if only:
                    inner = (whole / only).rename(f"{whole}.inner")
                    shutil.rmtree(whole)
                    inner.rename(whole)
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(
            f"{archive}: {error or 'it ends too early'}; nothing was left in {folder}. "
            "A damaged archive is fetched again once it is deleted."
        ) from error
    return folder


def _check_members(archive: Path, folder: Path, is_tar: bool) -> None:
    """OSError or TarError unless it is safe to unpack. Of a zip archive a link would become a plain file."""
    with tarfile.open(archive) if is_tar else zipfile.ZipFile(archive) as bundle:
        if is_tar:
            members = [(member.name, member.size) for member in bundle if tarfile.data_filter(member, folder)]
        else:
            members = [(member.filename, member.file_size) for member in bundle.infolist()]
    for name, _ in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise OSError(f"the path of the member {name!r} leads outside the folder")
    unpacked = sum(size for _, size in members)
    room = min(shutil.disk_usage(folder).free, MAX_RATIO * archive.stat().st_size)
    if unpacked > room:
        raise OSError(f"{human_size(unpacked)} would come out of it, more than the {human_size(room)} that it may take")
