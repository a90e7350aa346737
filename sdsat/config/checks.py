"""Checks of values: a bad one raises `InputError`, in one line that says what would be right."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any


class InputError(ValueError):
    """Bad input.

    The message is one line that names the argument, its value and what would be right; the CLI
    exits with 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def is_whole(value: Any) -> bool:
    """Tell whether this is a whole number, numpy's too but no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Tell whether this is a finite number, numpy's too but no bool."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return good and bool(-math.inf < value < math.inf)


def whole(
    name: str, value: Any, expected: str, low: int | None = None, high: int | None = None
) -> int:
    """Return `value` as an int.

    Args:
        name: of the argument, as the message has it.
        value: a whole number, numpy's too but no bool.
        expected: what would be right, as the message has it.
        low: the least that is right; None for no bound.
        high: the most that is right; None for no bound.

    Raises:
        InputError: for anything else.
    """
    good = is_whole(value)
    good = good and (low is None or value >= low) and (high is None or value <= high)
    require(good, f"{name}={value!r}: expected {expected}")
    return int(value)


def real(name: str, value: Any, expected: str, low: float, high: float = math.inf) -> float:
    """Return `value` as a float.

    Args:
        name: of the argument, as the message has it.
        value: a finite number, numpy's too but no bool.
        expected: what would be right, as the message has it.
        low: the least that is right.
        high: the most that is right.

    Raises:
        InputError: for anything else.
    """
    good = is_real(value) and low <= value <= high
    require(good, f"{name}={value!r}: expected {expected}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return `value`, if it is True or False. Raises InputError for anything else."""
    require(isinstance(value, bool), f"{name}={value!r}: expected True or False")
    return bool(value)


def several(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """Return a list or tuple as a tuple.

    Raises InputError, which names it, for anything else; a text is neither.
    """
    require(isinstance(value, (list, tuple)), f"{name}={value!r}: expected {expected}")
    return tuple(value)


def keep(config: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made.

    So numpy's numbers become Python's, and lists tuples.
    """
    for name, value in values.items():
        object.__setattr__(config, name, value)


def utf8(name: str, text: str) -> str:
    """Return `text`, if it has characters alone.

    A command line that is not UTF-8 reaches Python as lone surrogates. Raises InputError, which
    names the argument, for these.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: not UTF-8 at character {error.start}; expected text in UTF-8"
        ) from None
    return text


def plain_warnings() -> None:
    """Print warnings as one line each, as every other message of the command line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]
