"""Where files live, and how they are written so that an interruption never leaves half of one."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from mclip.config import ConfigError, closest, require

PACKAGE = Path(__file__).resolve().parent
CLONE = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None  # None where it is installed
DATA = (CLONE or PACKAGE) / "data"  # what ships: teacher, student checkpoints, published figures, results
MODELS = ("base", "kd", "clip", "teacher", "photo", "photo-teacher", "photo-base")  # those that ship


def cache_dir() -> Path:
    """Folder for what can be made again: ``MCLIP_CACHE``, the clone's ``data/cache``, or ``~/.cache/mclip``."""
    candidates = [DATA / "cache"] if CLONE else []
    candidates.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mclip")
    if own := os.environ.get("MCLIP_CACHE"):
        candidates = [Path(own)]
    for candidate in candidates:
        with suppress(OSError, RuntimeError):  # the latter where there is no home
            folder = candidate.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    tried = ", ".join(map(str, candidates))
    raise ConfigError(f"no folder to write the cache to ({tried}): set MCLIP_CACHE to one that can be written.")


def model_folder(name: str | Path) -> Path:
    """The folder of a model that ships (``MODELS``), or ``name``, a model's folder or a run's; ``~`` is expanded."""
    name = str(name)
    ships = DATA / ("teacher" if name == "teacher" else f"checkpoints/{name}")
    folder = ships if name in MODELS and ships.is_dir() else Path(name).expanduser()
    remedy = f"give a model folder or a name; {closest(name, MODELS)}"
    if name in MODELS:
        remedy = f"{ships} is not there; restore it, or make it again as its card or {DATA / 'photographs'} says"
    require(folder.is_dir(), "model", name, remedy)
    of_run = (folder / "model").is_dir() and not any(folder.glob("*config.json"))
    return folder / "model" if of_run else folder


def lock(path: str | Path) -> FileLock:
    """A lock for ``path`` among processes. Its file lies in the cache, so that nothing stays beside ``path``."""
    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    return FileLock(folder / content_key(Path(path).expanduser().resolve()))


@contextmanager
def atomic_path(path: str | Path, ending: str = ".part") -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file to, or a folder; it takes the final name if the block succeeds."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{ending}")
    try:
        yield temporary
        old = temporary.with_name(f"{temporary.name}-old")
        if temporary.is_dir() and path.exists():
            path.rename(old)  # a kill before the next line leaves the old folder whole, under this name
        try:
            temporary.replace(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes the final name, and the place of one that has it, only if the block succeeds."""
    with atomic_path(path, ending="") as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def missing_folder(path: str | Path) -> Iterator[Path | None]:
    """Yield None where ``path`` is there, else a folder to fill, as :func:`atomic_folder`.

    One process fills it while the others wait; if it is killed, the next one takes over.
    """
    path = Path(path)
    with lock(path):
        if path.is_dir():
            yield None
        else:
            for leftover in path.parent.glob(f".{path.name}.*/"):  # of a process that was killed
                shutil.rmtree(leftover)
            with atomic_folder(path) as temporary:
                yield temporary


def new_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """A memory-mapped array in a new file, for which the disk has room; OSError where it has not.

    Without the room a full disk would end the process at some later write, with no more than "Bus error".
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    return array


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; ConfigError, with the file and the line, for one that is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path}: missing or damaged ({error}); restore the file, or measure anew.") from error


def file_hash(path: Path) -> dict[str, str]:
    """``{name: SHA-256}`` of a file, as it is kept beside weights under the key "sha256"."""
    with path.open("rb") as handle:
        return {path.name: hashlib.file_digest(handle, "sha256").hexdigest()}


def content_key(*parts: Any) -> str:
    """A 16-digit hexadecimal key of JSON-serialisable ``parts``: equal parts, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
