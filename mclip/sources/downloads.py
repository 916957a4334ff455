"""Downloads that survive a bad network: resumed, timed out, tried again, checked, and whole or not there."""

from __future__ import annotations

import shutil
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

TIMEOUT = 30.0  # seconds without a byte
TRIES = 3  # in a row that bring nothing new
BACK_OFF = 1.0  # seconds before the second try; each further wait is twice as long
CHUNK = 64 * 1024
MAX_RATIO = 200  # deflate reaches 1,000 on bytes that are all alike; pictures and captions stay below 20
human_size = partial(tqdm.format_sizeof, suffix="B")


class DownloadError(OSError):
    """A file that cannot be had or unpacked; the message names what, why, what is kept and the remedy."""


def fetch(url: str, path: Path, checksum: str, size: int | None = None) -> Path:
    """Download ``url`` to ``path`` unless the file is there already, and return ``path``.

    What has arrived is kept in ``path.part`` and resumed, now or by a later call. Only a whole file takes its name.
    Of several processes that want the same file one downloads it. After time-outs, lost connections and errors of the
    server (5xx) it is tried again. ``checksum`` is "md5:..." or "sha256:...". A server that offers another number of
    bytes than ``size`` is refused at once.

    Raises: DownloadError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and _checksum(path, checksum) == checksum:
                return path
            failed = 0
            while failed < TRIES:
                have = _length(part)
                try:
                    _append(url, part, size)
                    break
                except (requests.Timeout, requests.ConnectionError, ChunkedEncodingError, HTTPError) as error:
                    failed = 0 if _length(part) > have else failed + 1
                    lasting = isinstance(error, HTTPError) and error.response.status_code < 500
                    if failed == TRIES or lasting or isinstance(error, SSLError):
                        raise
                time.sleep(BACK_OFF * 2 ** max(0, failed - 1))
            if (found := _checksum(part, checksum)) != checksum:
                part.unlink()
                raise OSError(f"the download is damaged ({found}, not {checksum}) and was deleted")
            part.replace(path)
    except OSError as error:  # those of requests are OSErrors too
        kept = f"{human_size(_length(part))} are kept, and the same call resumes them" if part.exists() else ""
        reason = str(error)
        if isinstance(error, HTTPError):
            reason = f"the server answered {error.response.status_code} {error.response.reason}"
        elif isinstance(error, requests.Timeout) or "timed out" in reason:  # requests gives both forms
            reason = f"no answer for {TIMEOUT:g} s"
        elif isinstance(error, requests.RequestException):
            reason = f"the connection failed: {error}"
        raise DownloadError(
            f"{url}: {reason}; wanted as {path} ({kept or 'nothing is kept of it'}). "
            f"Try again later, or download it in another way and place it as {path}."
        ) from error
    return path


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _checksum(path: Path, like: str) -> str:
    kind = like.partition(":")[0]
    return f"{kind}:{pooch.file_hash(str(path), alg=kind)}"


def _append(url: str, part: Path, size: int | None) -> None:
    """Add what ``part`` lacks, or begin it anew where the server cannot resume."""
    have = _length(part)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mclip/{__version__}"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
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
        bar = tqdm(None, part.stem, total, initial=start, unit="B", unit_scale=True, leave=False)
        with part.open("ab") as handle, bar:
            handle.truncate(start)
            for chunk in response.iter_content(CHUNK):
                handle.write(chunk)
                bar.update(len(chunk))
    if total and _length(part) < total:
        raise requests.ConnectionError(f"it ended after {_length(part)} of {total} bytes")


def extract(archive: Path, folder: Path, only: str = "") -> Path:
    """Unpack a zip archive as ``folder``, unless that is there, and return it; with ``only``, one folder of it.

    The folder takes its name only once all is unpacked. An archive is refused if a member's path leads outside, or if
    it holds more bytes than are free or than an honest archive holds. A link becomes a plain file.

    Raises: DownloadError, naming the archive.
    """
    try:
        with missing_folder(folder) as temporary:
            if temporary:
                _unpack(archive, temporary, f"{only}/" if only else "")
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(
            f"{archive}: {error or 'it ends too early'}; nothing was left in {folder}. "
            "A damaged archive is fetched again once it is deleted."
        ) from error
    return folder


def _unpack(archive: Path, folder: Path, prefix: str) -> None:
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        for member in members:
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise OSError(f"the path of the member {member.filename!r} leads outside the folder")
        size = sum(member.file_size for member in members)
        room = min(shutil.disk_usage(folder).free, MAX_RATIO * archive.stat().st_size)
        if size > room:
            raise OSError(f"{human_size(size)} would come out of it, more than the {human_size(room)} that it may take")
        wanted = [member for member in members if member.filename.startswith(prefix) and member.filename != prefix]
        if not wanted:
            raise OSError(f"it holds no folder {prefix}")
        for member in wanted:
            member.filename = member.filename.removeprefix(prefix)
            bundle.extract(member, folder)
