"""Downloads that survive a bad network: resumed, timed out, tried again, checked, and whole or not there."""

import time
import zipfile
import zlib
from pathlib import Path

import pooch
import requests
from requests.exceptions import ChunkedEncodingError, HTTPError
from tqdm import tqdm

from mclip import __version__
from mclip.files import lock, missing_folder

TIMEOUT = 30.0  # seconds without a byte
TRIES = 3  # in a row that bring nothing new
BACK_OFF = 1.0  # seconds before the second try; each further wait is twice as long
CHUNK = 64 * 1024


class DownloadError(OSError):
    """A file that cannot be had or unpacked; the message names what, why and the remedy."""


def fetch(url: str, path: Path, checksum: str) -> Path:
    """Download ``url`` to ``path`` unless the file is there already, and return ``path``.

    What has arrived is kept in ``path.part`` and resumed, now or by a later call. Only a whole file takes its name.
    Of several processes that want the same file one downloads it. After time-outs, lost connections and errors of the
    server (5xx) it is tried again. ``checksum`` is "md5:..." or "sha256:...".

    Raises: DownloadError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path):
            if path.is_file() and pooch.hashes.hash_matches(str(path), checksum):
                return path
            failures = 0
            while failures < TRIES:
                have = _length(part)
                try:
                    _append(url, part)
                    break
                except (requests.Timeout, requests.ConnectionError, ChunkedEncodingError, HTTPError) as error:
                    failures = 0 if _length(part) > have else failures + 1
                    lasting = isinstance(error, HTTPError) and error.response.status_code < 500
                    if failures == TRIES or lasting:
                        raise
                time.sleep(BACK_OFF * 2 ** max(0, failures - 1))
            if not pooch.hashes.hash_matches(str(part), checksum):
                part.unlink()
                raise OSError(f"the download is damaged, not that of {checksum}, and was deleted")
            part.replace(path)
    except OSError as error:  # those of requests are OSErrors too
        raise DownloadError(
            f"{url}: {error}; wanted as {path}. The same call resumes it from the {_length(part):,} bytes that are "
            f"kept. Or download it in another way and place it as {path}."
        ) from error
    return path


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, part: Path) -> None:
    """Add what ``part`` lacks, or begin it anew where the server cannot resume."""
    have = _length(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": f"mclip/{__version__}"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if have and response.status_code == 416:  # no byte comes after those; the checksum tells if all is well
            return
        response.raise_for_status()
        start = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        total = start + int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(None, part.stem, total, initial=start, unit="B", unit_scale=True, leave=False)
        with part.open("ab") as handle, bar:
            handle.truncate(start)
            for chunk in response.iter_content(CHUNK):  # ChunkedEncodingError if it ends too early
                handle.write(chunk)
                bar.update(len(chunk))


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip archive, whose checksum is known, as ``folder``: what it holds under that name, or else all of it.

    A folder that is there is left alone. It takes its name only once all is unpacked. Of members whose path leads
    outside, zipfile drops what leads there; a link becomes a plain file.

    Raises: DownloadError, naming the archive.
    """
    try:
        with missing_folder(folder) as temporary:
            if temporary:
                with zipfile.ZipFile(archive) as bundle:
                    prefix = f"{folder.name}/"
                    inside = [member for member in bundle.infolist() if member.filename.startswith(prefix)]
                    for member in inside or bundle.infolist():
                        if member.filename != prefix:
                            member.filename = member.filename.removeprefix(prefix)
                            bundle.extract(member, temporary)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(
            f"{archive}: {error or 'it ends too early'}; nothing was left in {folder}. "
            "A damaged archive is fetched again once it is deleted."
        ) from error
