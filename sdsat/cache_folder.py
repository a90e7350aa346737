"""The cache folder: what is made once for this machine and kept there.

Whatever is not whole there counts as absent.

Nothing depends on being able to write there: what cannot be kept is made again by the next process,
after a warning. What is loaded as code must belong to this user or to root, and so must its folder,
and nobody else may write to either.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from sdsat.config import InputError, require
from sdsat.files import make_folder, reason, replacing, sha256_of

PATIENCE_SECONDS = 6 * 3600  # for another process that fetches or converts a model
_LOCK_SECONDS = 600  # whoever holds a lock for longer hangs
REMEMBER_FROM = 1 << 26  # bytes of a file whose hash is worth remembering
SETTLED = 2.0  # seconds after which a file that changes gets another time stamp


def cache_dir() -> Path:
    """Return the user's cache folder of this program; it may be absent.

    It is $SDSAT_CACHE, or $XDG_CACHE_HOME/sdsat, or ~/.cache/sdsat.

    Raises InputError, one line, for a user without a home folder.
    """
    try:
        if os.environ.get("SDSAT_CACHE"):
            return Path(os.environ["SDSAT_CACHE"]).expanduser()
        return (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sdsat"
        )
    except RuntimeError as error:
        raise InputError(f"cache folder: {error}; set SDSAT_CACHE to a folder") from None


@contextmanager
def creating(name: str, seconds: float = _LOCK_SECONDS) -> Iterator[Path]:
    """Hold the lock under which one process at a time makes `name` in the cache folder.

    The folder is yielded; `name` may stand for several things. Another process is waited for, for
    `seconds`.

    Raises OSError where the folder can't be written to, and InputError for a user without a home
    folder.
    """
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock", timeout=seconds):
        yield folder


def load_library(name: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """Load the shared library `name`, from the cache folder or built now and put there.

    The name is a key of all that the library depends on. The kept file's name holds its hash too,
    so that a damaged one is not loaded, which would be a bus error, but built again. Where it can't
    be kept, it is built for this process alone, with a warning.

    build: writes the library to a path; what it raises goes to the caller. Raises OSError for a
    library that can't be loaded.
    """
    with suppress(InputError, OSError):  # what is wrong is said below, once
        if (kept := _kept_library(cache_dir() / "native", name)) is not None:
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="sdsat-") as private:
        built = Path(private) / f"{name}.so"  # not in the cache folder: its disk may be full
        try:
            with creating("native") as folder:
                if (kept := _kept_library(folder / "native", name)) is None:
                    build(built)
                    kept = _keep_library(folder / "native", name, built)
                return ctypes.CDLL(str(kept))
        except (InputError, OSError) as error:
            warnings.warn(
                f"the native engine is compiled at every start: it cannot be kept ({_said(error)})",
                stacklevel=4,
            )
        if not built.exists():
            build(built)
        return ctypes.CDLL(str(built))


def _said(error: Exception) -> str:
    where = getattr(error, "filename", None)
    return str(error) if isinstance(error, InputError) or not where else f"{where}: {reason(error)}"


def _kept_library(folder: Path, name: str) -> Path | None:
    """Find NAME-SHA256.so, with that content, which only this user or root can have written.

    None where there is no such file.
    """
    for file in folder.glob(f"{name}-*.so"):
        if (
            file.is_file()
            and _is_guarded(file)
            and not _danger(folder)
            and sha256_of(file) == file.stem.rpartition("-")[2]
        ):
            return file
    return None


def _keep_library(folder: Path, name: str, built: Path) -> Path:
    """Put a library that was built elsewhere into the cache folder.

    Raises OSError where that is not possible.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)  # it may be of an earlier version, or of a generous umask
    require(not _danger(folder), f"{_danger(folder)}: others can write to it")
    for damaged in folder.glob(f"{name}-*.so"):
        damaged.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        part = Path(own) / f"{name}.so"
        shutil.copyfile(built, part)
        part.chmod(0o700)
        return part.replace(folder / f"{name}-{sha256_of(part)}.so")


def _is_guarded(path: Path) -> bool:
    """Tell whether it belongs to this user or to root, and nobody else may write to it."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _danger(folder: Path) -> Path | None:
    """Find the folder through which others could replace one of its files by their own.

    It is the folder itself, or the first one above it; None where there is none.
    """
    folder = folder.resolve()
    if not _is_guarded(folder):
        return folder
    modes = {above: above.stat().st_mode for above in folder.parents}
    return next(
        (above for above, mode in modes.items() if mode & stat.S_IWOTH and not mode & stat.S_ISVTX),
        None,
    )


def remembered_sha256(file: Path) -> str:
    """Compute `sha256_of`, or for a large file that has not changed remember it.

    It is remembered in the cache folder. A file is the same while its place, inode, size, and times
    of last change are.

    Raises InputError, one line, where the file can't be read.
    """
    before = _stamp(file)
    if before is None or before[2] < REMEMBER_FROM:
        return sha256_of(file)
    memo = None
    with suppress(InputError, OSError, ValueError):
        memo = cache_dir() / "hashes" / hashlib.sha256(repr(before).encode()).hexdigest()
        held = memo.read_text()
        if re.fullmatch("[0-9a-f]{64}", held):
            return held
    digest = sha256_of(file)
    if (
        memo is not None
        and _stamp(file) == before
        and time.time() - max(before[3:]) / 1e9 > SETTLED
    ):
        with suppress(InputError):  # to forget it costs time only
            make_folder(memo.parent)
            with replacing(memo) as part:
                part.write_text(digest)
    return digest


def _stamp(file: Path) -> tuple[str, int, int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return str(file.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
