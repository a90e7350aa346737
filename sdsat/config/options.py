"""Fields of settings as options of commands: a word of the command line, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdsat.config.checks import InputError


@dataclass(frozen=True)
class Text:
    """How one word of a command line holds a value.

    Attributes:
        read: (the option's name, the word) -> the value; raises InputError.
        write: the value -> the word.
    """

    read: Callable[[str, str], Any]
    write: Callable[[Any], str]


def _joined(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def numbers_of(name: str, text: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    """Read '0,1,5' -> (0, 1, 5).

    Raises InputError, which names the option, for anything else.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{name}={text}: expected a number, or several with commas between"
        ) from None


WORD = Text(lambda _, text: text, str)
WORDS = Text(lambda _, text: tuple(text.split(",")) if text else (), _joined)
WHOLE_NUMBERS = Text(numbers_of, _joined)
NUMBERS = Text(lambda name, text: numbers_of(name, text, float), _joined)


@dataclass(frozen=True)
class Option:
    """How a field of settings is given on the command line: cli/options.py makes an option of it.

    Attributes:
        help: one line for `--help`.
        env: the environment variable that gives it, too.
        names: such as ('-k', '--k'); () for the field's own name.
        text: how a word holds the value; None where its type says that (numbers, flags, paths,
            texts).
        repeated: given once for each item of the tuple that it is.
        is_open: has no default on the command line; the command decides what stands for it.
    """

    help: str | None = None
    env: str | None = None
    names: tuple[str, ...] = ()
    text: Text | None = None
    repeated: bool = False
    is_open: bool = False


def option(default: Any, about: str | Option | None = None, **further: Any) -> Any:
    """Make a field of settings that is an option of commands too.

    Args:
        default: of the field, and of the option unless a command has another.
        about: its help, or an Option that several settings share.
        **further: other fields of Option.
    """
    if not isinstance(about, Option):
        about = Option(about, **further)
    return field(default=default, metadata={"option": about})


# Options of several settings.
TREE = Option(
    "Draft tree: auto, grown, chain, paper, or a branching list such as 2,1,1.",
    env="TREE",
    text=WORD,
)
DTYPES = (
    "float32, bfloat16, float16, int8 (linear layers in 8 bits, on a CPU), gguf (a GGUF file in "
    "its own bits, on a CPU)"
)
DTYPE = Option(f"{DTYPES}, or auto for the checkpoint's own.", env="DTYPE")
MAX_NEW_TOKENS = Option(env="MAX_NEW_TOKENS")
SEED = Option(env="SEED")
TEMPERATURE = Option("0 is greedy.")
TEMPLATE_OPTIONS = Option(
    "KEY=VALUE for the chat template, as enable_thinking=false; repeat for more. "
    "Default: as the template has it.",
    env="TEMPLATE_OPTIONS",
    names=("--template-option",),
    repeated=True,
)
