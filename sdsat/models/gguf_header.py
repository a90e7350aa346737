"""The header of a GGUF file: whether its counts and lengths fit the file.

A reader follows them, element by element. One wrong byte can make it go on for minutes, or ask for
more memory than there is; so they are followed here first, in one quick walk that ends at the first
one that leads out of the file.

    magic, version, number of tensors, number of settings
    settings    name, type, value; an array is its elements' type, their number, the elements
    tensors     name, number of dimensions, dimensions, type, offset
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

# Struct's codes of numbers and bools, by their type in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_TEXT = 8
_ARRAY = 9
_LONGEST_NAME = 2**16 - 1  # bytes, of a setting or tensor
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 2**21  # of all arrays; a vocabulary of 262,000 tokens has 1.3 million


def check_header(file: Path) -> None:
    """Follow the header of a GGUF file to its end.

    Raises ValueError where a count or a length leads out of the file or beyond what a model has,
    and OSError where it can't be read.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    """A place in a header that moves on.

    Attributes:
        data: the file's bytes.
        at: how many of them are behind.
        elements: of arrays so far.
        order: of bytes in a number, as struct has it.
    """

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 4  # behind the magic
        self.elements = 0
        self.order = "<"

    def header(self) -> None:
        """Walk over all of it. Raises ValueError, as all of these."""
        version = self.number("I")
        if version & 0xFFFF == 0:  # written in the other order
            self.order = ">"
            version >>= 24
        if version in (0, 1):
            raise ValueError(f"version {version} of the format, which is no longer read")
        tensors = self.number("Q")
        for _ in range(self.number("Q")):
            self.text("a setting's name", _LONGEST_NAME)
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text("a tensor's name", _LONGEST_NAME)
            dimensions = self.number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self.skip(8 * dimensions + struct.calcsize("=IQ"), "a tensor's type and place")

    def number(self, code: str) -> int:
        """Read a whole number of struct's type `code`."""
        start = self.at
        self.skip(struct.calcsize(f"={code}"), "a number")
        return int(struct.unpack_from(self.order + code, self.data, start)[0])

    def skip(self, count: int, what: str) -> None:
        """Go on by so many bytes. what: they are, for the message."""
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"{what} ends behind the file's {len(self.data)} bytes")

    def text(self, what: str, longest: int | None = None) -> None:
        """Walk over a text. longest: bytes of a name, which has one at least."""
        length = self.number("Q")
        if longest is not None and not 1 <= length <= longest:
            raise ValueError(f"{what} of {length} bytes")
        self.skip(length, what)

    def value(self, kind: int) -> None:
        """Walk over a setting's value of a type."""
        if kind == _TEXT:
            self.text("a text")
        elif kind == _ARRAY:
            self.array(self.number("I"), self.number("Q"))
        elif kind in _NUMBERS:
            self.skip(struct.calcsize(f"={_NUMBERS[kind]}"), "a number")
        else:
            raise ValueError(f"a setting of type {kind}")

    def array(self, kind: int, count: int) -> None:
        """Walk over an array of `count` elements of a type."""
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"arrays of {self.elements} elements")
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(f"={_NUMBERS[kind]}"), "an array")
            return
        for _ in range(count):
            self.value(kind)
