"""Files: written whole or not at all, one writer at a time, only where a file belongs; hashes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sdsat.config import InputError, require


def reason(error: Exception) -> str:
    """Say what went wrong, in a few words without the file's name."""
    return (
        getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one InputError that names `path`.

    A full disk is one. Raises InputError, one line, for errors of the system, of safetensors and of
    torch.save's writer; all others pass.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # A RuntimeError of torch.save's writer names the part of torch that wrote.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise InputError(f"{path}: cannot be written ({reason(error)})") from None


def destination(path: Path, argument: str = "") -> Path:
    """Return the file that writing to `path` replaces, which need not be there yet.

    Symbolic links are followed: a link stays a link.

    argument: what gave the path, such as '--out'. Raises InputError, one line, where the folder is
    missing or can't be written to, or where something else than a regular file is: a device or a
    pipe must not be replaced, or read to its end.
    """
    name = _named(path, argument)
    with _usable(name):
        target = path.resolve()
        kind = "it is a folder" if target.is_dir() else "it is no regular file"
        require(
            target.is_file() or not os.path.lexists(target),
            f"{name}: cannot be written ({kind}; expected a file or a new name)",
        )
        require(target.parent.is_dir(), f"{name}: no such folder")
        _check_access(target.parent, name)
    return target


def make_folder(path: Path, argument: str = "") -> Path:
    """Make the folder, and those above it, where it is missing.

    argument: what gave the path, such as '--out'. Raises InputError, one line, where it can't be
    made or written to.
    """
    name = _named(path, argument)
    with _usable(name):
        path.mkdir(parents=True, exist_ok=True)
        _check_access(path, name)
    return path


def new_destination(path: Path, argument: str = "") -> Path:
    """Make the folder of a file where it is missing, and return its `destination`.

    argument: what gave the path, such as '--out'. Raises InputError, one line, where the folder
    can't be made or written to, or where something else than a regular file is.
    """
    make_folder(path.parent, argument)
    return destination(path, argument)


def _named(path: Path, argument: str) -> str:
    return f"{argument}={path}" if argument else str(path)


@contextmanager
def _usable(name: str) -> Iterator[None]:
    """Turn whatever is wrong with a path into one InputError.

    It may be a name too long, a loop of links, a zero byte, a read-only disk.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name}: cannot be written ({reason(error)})") from None


def _check_access(folder: Path, name: str) -> None:
    writable = os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    require(writable, f"{name}: cannot be written (no permission for {folder})")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, of a name of its own, which then becomes `path`.

    So `path` holds either the old or the new content, never a part, and of several writers the last
    one's.

    Raises InputError, one line, where it can't be written.
    """
    target = destination(path)
    part = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    with writing(path):
        try:
            yield part
            part.replace(target)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path, argument: str) -> Iterator[Path]:
    """Yield a folder beside `path` to write into, which then takes its name.

    So `path` is there whole or not at all.

    argument: what gave the path, such as 'out'. Raises InputError, one line, where it is there
    already or can't be written.
    """
    name = _named(path, argument)
    require(not os.path.lexists(path), f"{name}: exists already; choose a new directory")
    part: str | None = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(dir=path.absolute().parent, prefix=path.name + "-part-")
        Path(part).chmod(0o755)
        yield Path(part)
        Path(part).rename(path)
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, document: Any, ascii_only: bool = True) -> None:
    """Write a document as JSON, whole or not at all.

    ascii_only: whether other characters are written as escapes. Raises InputError, one line, where
    it can't be written.
    """
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1, ensure_ascii=ascii_only) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file's content.

    Raises InputError, with the file's name, where it can't be read or is no JSON.
    """
    require(path.is_file() or not path.exists(), f"{path}: cannot be read (not a regular file)")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file`, so that one run at a time writes `what`.

    Raises InputError, one line, for a second run, and where the lock can't be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{what}: another run is writing to it; wait for it or choose another"
        ) from None
    except OSError as error:
        raise InputError(f"{what}: cannot be written ({reason(error)})") from None
    try:
        yield
    finally:
        lock.release()


def sha256_of(file: Path) -> str:
    """Compute the sha256 of a regular file's content, in hex.

    Raises InputError, one line, where it can't be read.
    """
    require(file.is_file() or not file.exists(), f"{file}: cannot be read (not a regular file)")
    try:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({reason(error)})") from None
    return digest.hexdigest()


def sha256_of_all(hashes: Iterable[tuple[str, str]]) -> str:
    """Compute one hash for several (name, hash), whatever their order."""
    return hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest()
