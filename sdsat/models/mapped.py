"""Weights that stay in their file: mapped into memory, they take none until they are read.

The native engine holds all that it reads in an order of its own. So that a model isn't in memory
twice, the weights of its modules are views of the file that they were read from: what of it lies in
memory can go at any time, and comes back when a module is used. A change in place makes a page this
process's own, and never reaches the file.
"""

from __future__ import annotations

import ctypes
import json
import struct
from contextlib import suppress
from ctypes import c_size_t, c_void_p
from math import prod
from mmap import ACCESS_COPY, PAGESIZE, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sdsat.files import read_json
from sdsat.models.dtypes import SAFETENSORS_DTYPES

# Linux's: advice by which pages leave, to come back as they are in the file; and what it says of
# each page, in 8 bytes (Documentation/admin-guide/mm/pagemap.rst).
_DONTNEED = 4
_ENTRIES = np.dtype("u8")
_IN_MEMORY = np.uint64(3 << 62)  # or swapped out
_OF_FILE = np.uint64(1 << 61)  # not this process's own


class MappedFile:
    """A file as memory, of which tensors are views.

    Each has a storage of its own, so that a pickle of it holds its bytes, and not all of the file.
    """

    def __init__(self, file: Path):
        with file.open("rb") as opened:
            self._bytes = mmap(opened.fileno(), 0, access=ACCESS_COPY)
        self.whole = self.part(0, len(self._bytes))

    def part(self, first: int, last: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return the numbers in bytes first to last, [count]."""
        if first == last:
            return torch.empty(0, dtype=dtype)
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=first)


class MappedWeights:
    """The safetensors files of a folder or hub id, as tensors that are views of them.

    A copy of it has no files: the tensors of a copied model are in memory.
    """

    def __init__(self, path: str, where: dict[str, Any] | None = None):
        """Map the files; all of them, or none if one has numbers of another kind or at odd bytes.

        path: a folder, or a hub id, whose files are fetched. where: options of transformers that
        say whether it is local, and its revision. Raises OSError, ValueError or KeyError for
        damaged ones.
        """
        self.tensors: dict[str, Tensor] = {}
        self.files: list[MappedFile] = []
        if not all(map(self._map, _files(path, where or {}))):
            self.tensors.clear()
            self.files.clear()

    def _map(self, file: Path) -> bool:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        if any(facts["dtype"] not in SAFETENSORS_DTYPES for facts in header.values()):
            return False
        mapped = self.map_file(file)
        for name, facts in header.items():
            dtype = SAFETENSORS_DTYPES[facts["dtype"]]
            first, last = (8 + size + offset for offset in facts["data_offsets"])
            shape = facts["shape"]
            if last - first != prod(shape) * dtype.itemsize or first < 8 + size:
                raise ValueError(f"{file.name}: {name} lies at bytes {first} to {last}")
            if last > len(mapped.whole):
                raise ValueError(f"{file.name}: it ends before {name} does")
            if first % dtype.itemsize:
                return False
            self.tensors[name] = mapped.part(first, last, dtype).view(shape)
        return True

    def map_file(self, file: Path) -> MappedFile:
        """Map one more file. Raises OSError or ValueError where it can't be read."""
        self.files.append(MappedFile(file))
        return self.files[-1]

    def page_out(self) -> None:
        """Take the files out of this process's memory until they are read again; on Linux only.

        One of which a page was changed in place stays, as the change would be lost. What this
        process has freed goes back to the system, too.
        """
        with suppress(AttributeError, OSError, TypeError, ValueError):
            system = ctypes.CDLL(None)
            for file in self.files:
                begin = file.whole.data_ptr()
                size = len(file.whole)
                if not _is_changed(begin, size):
                    system.madvise(c_void_p(begin), c_size_t(size), _DONTNEED)
        give_back()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the files out of a copy."""
        return {"tensors": {}, "files": []}


def give_back() -> None:
    """Give what this process has freed back to the system; where glibc has freed it only."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _is_changed(begin: int, size: int) -> bool:
    """Say whether a mapped file has pages that are this process's own.

    begin: its first byte's address; size: in bytes. Raises OSError where the system doesn't say.
    """
    pages = range(begin // PAGESIZE, (begin + size - 1) // PAGESIZE + 1)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(pages.start * _ENTRIES.itemsize)
        entries = np.frombuffer(pagemap.read(len(pages) * _ENTRIES.itemsize), _ENTRIES)
    if len(entries) < len(pages):
        raise OSError("/proc/self/pagemap ends early")
    return bool(np.any((entries & _IN_MEMORY != 0) & (entries & _OF_FILE == 0)))


def _files(path: str, where: dict[str, Any]) -> list[Path]:
    """Find the safetensors files of a folder or of a hub id; none where there are none."""

    def found(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
        return None if file is None else Path(file)

    index = None if (single := found(SAFE_WEIGHTS_NAME)) else found(SAFE_WEIGHTS_INDEX_NAME)
    names = sorted(set(read_json(index)["weight_map"].values())) if index else []
    return [file for file in (single, *map(found, names)) if file is not None]
