"""The C++ compiler of the native engine, and the name of what it makes; all without torch."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from tqdm import tqdm

from sdsat.files import sha256_of_all

FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
_LOOK_SECONDS = 0.5  # between two looks at whether the compiler has ended


class Unavailable(Exception):
    """Why the native engine can't be used here, in one line."""


def compiler() -> list[str]:
    """Return the beginning of the compiler's command.

    It is $CXX, split as a shell would (`ccache g++`), else c++ or g++. Raises Unavailable where
    there is none.
    """
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given)
    except ValueError as error:
        raise Unavailable(f"CXX={given}: not a command ({error})") from None
    found = shutil.which("c++") or shutil.which("g++")
    if not command and found is None:
        raise Unavailable("no C++ compiler was found (c++, g++ or $CXX)")
    return command or [str(found)]


def compile_library(command: list[str], source: Path, target: Path) -> None:
    """Compile one source file to a shared library.

    Raises Unavailable, with the compiler's first line, where it fails, and OSError where it can't
    be run.
    """
    bar = tqdm(
        desc="native engine: compiling, once",
        bar_format="{desc}, {elapsed}",
        disable=None,
        leave=False,
        delay=1,
    )
    words = [*command, *FLAGS, str(source), "-o", str(target)]
    with (
        bar,
        subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            said = _said(process, bar)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        first = (said.strip().splitlines() or ["no message"])[0]
        raise Unavailable(f"{' '.join(command)} failed ({first})")


def _said(process: subprocess.Popen[str], bar: tqdm) -> str:
    """Wait for a process to end, and return what it wrote to stderr; the bar shows the time."""
    while True:
        try:
            return process.communicate(timeout=_LOOK_SECONDS)[1]
        except subprocess.TimeoutExpired:
            bar.update()


def source_hash() -> str:
    """Return one hash for all C++ sources, in hex.

    Raises OSError where one can't be read.
    """
    files = [file for pattern in ("*.cpp", "*.h") for file in FOLDER.glob(pattern)]
    return sha256_of_all(
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
    )


def library_name(command: list[str]) -> str:
    """Return a key of all that the library depends on: sources, compiler, flags and processor.

    Raises OSError where the compiler can't be run.
    """
    version = subprocess.run(
        [*command, "-v", "-march=native", "-E", "-x", "c++", os.devnull], capture_output=True
    ).stderr
    key = source_hash().encode() + version + " ".join(FLAGS).encode()
    return hashlib.sha256(key).hexdigest()[:16]
