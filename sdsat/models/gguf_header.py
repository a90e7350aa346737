"""The header of a GGUF file: its settings, and what tensors lie where.

    magic, version, number of tensors, number of settings
    settings    name, type, value; an array is its elements' type, their number, the elements
    tensors     name, number of dimensions, dimensions, type, offset behind the header

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). One wrong byte can make a reader go on
for minutes, or ask for more memory than there is; so every count and length is held against the
file, and an array, as the vocabulary is, becomes a list only when it is asked for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

# Struct's codes of numbers and bools, by their type in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_TEXT = 8
_ARRAY = 9
_LENGTH = struct.Struct("<Q")
_LONGEST_NAME = 2**16 - 1  # bytes, of a setting or tensor
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 2**21  # of all arrays; a vocabulary of 262,000 tokens has 1.3 million
_VERSIONS = (2, 3)
_BIG_ENDIAN = tuple(version << 24 for version in _VERSIONS)
_ALIGNMENT = "general.alignment"


class Unread(ValueError):
    """A file that may be whole, of a form that isn't read."""


class FileTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: llama.cpp's.
        shape: as the file has it: a matrix is [in, out].
        kind: how its numbers are held.
        begin: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    begin: int

    @property
    def held(self) -> tuple[int, ...]:
        """Its shape in bytes, outputs first.

        Raises ValueError for a shape that its type can't have.
        """
        return gguf.quant_shape_to_byte_shape(tuple(reversed(self.shape)), self.kind)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file. Raises ValueError as `held`."""
        return prod(self.held)


class GgufFile:
    """A GGUF file whose header has been read.

    Attributes:
        settings: numbers, bools and texts by their names; arrays are not among them.
        tensors: by their names.
    """

    def __init__(self, file: Path):
        """Read the header.

        Raises ValueError where a count or a length leads out of the file or beyond what a model
        has, Unread for another version or order of bytes, and OSError where it can't be read.
        """
        with file.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        walk = _Walk(self._data)
        found, self.tensors = walk.header()
        self.settings = {key: value for key, value in found.items() if type(value) is not _Array}
        self._arrays = {key: value for key, value in found.items() if type(value) is _Array}

    def value(self, key: str) -> Any:
        """Return a setting, an array as a list; None for one that the file lacks.

        Raises ValueError for a text that is none.
        """
        array = self._arrays.get(key)
        return self.settings.get(key) if array is None else _Walk(self._data).list_of(array)

    def numbers(self, tensor: FileTensor) -> np.ndarray:
        """Return a tensor's numbers in float32, the last dimension of `shape` first."""
        held = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.begin)
        return gguf.dequantize(held.reshape(tensor.held), tensor.kind)


class _Array(NamedTuple):
    """An array of a file: the type of its elements, their number and where they begin."""

    kind: int
    length: int
    begin: int


class _Walk:
    """A place in a header that moves on.

    Attributes:
        data: the file's bytes.
        at: how many of them are behind.
        elements: of arrays so far.
    """

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 4  # behind the magic
        self.elements = 0

    def header(self) -> tuple[dict[str, Any], dict[str, FileTensor]]:
        """Walk over all of it.

        Returns settings, of arrays the place, and tensors. Raises ValueError, as all of these.
        """
        version = self.number("I")
        if version in _BIG_ENDIAN:
            raise Unread("a big-endian GGUF file; expected a little-endian one")
        if version not in _VERSIONS:
            raise Unread(f"version {version} of GGUF; expected 2 or 3")
        num_tensors = self.number("Q")
        settings = dict(self.named(self.number("Q"), "a setting", self.setting))
        tensors = dict(self.named(num_tensors, "a tensor", self.tensor))
        alignment = settings.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} {alignment}, which is no power of 2")
        behind = self.at + -self.at % alignment
        return settings, {
            name: self.checked(FileTensor(name, shape, kind, behind + offset))
            for name, (shape, kind, offset) in tensors.items()
        }

    def named(self, count: int, what: str, read: Any) -> Iterator[tuple[str, Any]]:
        """Read so many names, each with what `read` reads behind it.

        what: has the name, for the message.
        """
        names = set()
        for _ in range(count):
            name = self.text(f"{what}'s name", _LONGEST_NAME)
            if name in names:
                raise ValueError(f"{what} {name!r} twice")
            names.add(name)
            yield name, read()

    def setting(self) -> Any:
        """Read a setting's type and value."""
        return self.value(self.number("I"))

    def tensor(self) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]:
        """Read a tensor's dimensions, type and offset."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return shape, gguf.GGMLQuantizationType(self.number("I")), self.number("Q")

    def checked(self, tensor: FileTensor) -> FileTensor:
        """Hold a tensor's end against the file's. Returns it."""
        if tensor.begin + tensor.num_bytes > len(self.data):
            raise ValueError(
                f"tensor {tensor.name!r} ends behind the file's {len(self.data)} bytes"
            )
        return tensor

    def number(self, code: str) -> Any:
        """Read a number of struct's type `code`."""
        start = self.at
        self.skip(struct.calcsize(f"={code}"), "a number")
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def skip(self, count: int, what: str) -> None:
        """Go on by so many bytes. what: they are, for the message."""
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"{what} ends behind the file's {len(self.data)} bytes")

    def text(self, what: str, longest: int | None = None) -> str:
        """Read a text. longest: bytes of a name, which has one at least."""
        length = self.number("Q")
        if longest is not None and not 1 <= length <= longest:
            raise ValueError(f"{what} of {length} bytes")
        start = self.at
        self.skip(length, what)
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """Read a setting's value of a type; of an array the place."""
        if kind == _TEXT:
            return self.text("a text")
        if kind == _ARRAY:
            return self.array()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        raise ValueError(f"a setting of type {kind}")

    def array(self) -> _Array:
        """Walk over an array."""
        array = _Array(self.number("I"), self.number("Q"), self.at)
        self.elements += array.length
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"arrays of {self.elements} elements")
        if array.kind in _NUMBERS:
            self.skip(array.length * struct.calcsize(f"={_NUMBERS[array.kind]}"), "an array")
        elif array.kind == _TEXT:
            self.texts(array.length)
        else:
            raise Unread(f"an array of type {array.kind} in its header; expected numbers or texts")
        return array

    def texts(self, count: int) -> None:
        """Walk over so many texts: a vocabulary, so quickly."""
        at, last, read = self.at, len(self.data) - _LENGTH.size, _LENGTH.unpack_from
        for _ in range(count):
            at += _LENGTH.size + (read(self.data, at)[0] if at <= last else 0)
        self.skip(at - self.at, "a text")

    def list_of(self, array: _Array) -> list[Any]:
        """Read an array that was walked over."""
        self.at = array.begin
        return [self.value(array.kind) for _ in range(array.length)]
