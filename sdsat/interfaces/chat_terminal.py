"""`sdsat chat`: a conversation in a terminal, or piped, a line a turn.

A line that begins with /WORD is a command (`COMMANDS`), every other one a question.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.text import Text

from sdsat.config import DecodeConfig, InputError, require, utf8
from sdsat.decoding.decoder import Decoder
from sdsat.files import write_json
from sdsat.interfaces.chat import Answer, Conversation, Stopped
from sdsat.interfaces.terminal import Piece, reading_bar, styled, warm_up, write

_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)


class Face(Protocol):
    """Where lines come from, and where answers go.

    Attributes:
        typed: whether somebody types them: a wrong line is then said to be so, and does not end it.
        green: whether accepted drafts are green.
    """

    typed: bool
    green: bool

    def lines(self) -> Iterator[str]:
        """Yield what is entered, until there is no more."""

    def show(self, pieces: list[Piece]) -> None:
        """Show pieces of an answer."""

    def note(self, text: str) -> None:
        """Show a line that is no answer."""

    def check(self) -> None:
        """Raise Stopped where the answer that comes is to stop."""


class Piped:
    """Lines of a stream, and plain text: answers to stdout, all else to stderr.

    stream: of bytes in UTF-8.
    """

    typed = False
    green = False

    def __init__(self, stream: IO[bytes]):
        self._stream = stream

    def lines(self) -> Iterator[str]:
        """See Face.lines. Raises InputError for one that is not UTF-8."""
        for number, line in enumerate(self._stream, 1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"line {number}: not UTF-8 at byte {error.start}; expected text in UTF-8"
                ) from None

    def show(self, pieces: list[Piece]) -> None:
        """See Face.show."""
        write(pieces)

    def note(self, text: str) -> None:
        """See Face.note."""
        print(text, file=sys.stderr)

    def check(self) -> None:
        """See Face.check: an interrupt ends the program."""


class Typed:
    """A terminal: lines are edited, accepted drafts are green, and Ctrl-C ends an answer.

    Raises InputError where prompt_toolkit is not installed.
    """

    typed = True
    green = True

    def __init__(self) -> None:
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        except ImportError:
            raise InputError(
                "sdsat chat: lines of a terminal are edited by prompt_toolkit, which is not "
                "installed; expected `pip install 'sdsat[chat]'`"
            ) from None
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,  # what is pasted keeps its lines
            prompt_continuation="  ",
            key_bindings=keys,
            completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
            complete_while_typing=False,
        )
        self._console = Console(highlight=False)
        self._stopped = False

    def lines(self) -> Iterator[str]:
        """See Face.lines: Ctrl-C empties a line, Ctrl-D ends.

        Between two lines an interrupt only says that the answer is to stop, which it does between
        two passes, where nothing is left half done.
        """

        def stop(*_: Any) -> None:
            self._stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            while True:
                try:
                    line = self._session.prompt()
                except KeyboardInterrupt:
                    continue
                except EOFError:
                    return
                self._stopped = False
                yield line
        finally:
            signal.signal(signal.SIGINT, before)

    def show(self, pieces: list[Piece]) -> None:
        """See Face.show."""
        coloured = [(text, drafted and self.green) for text, drafted in pieces]
        self._console.print(styled(coloured), end="", soft_wrap=True)

    def note(self, text: str) -> None:
        """See Face.note."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def check(self) -> None:
        """See Face.check."""
        if self._stopped:
            raise Stopped


def _help(chat: Conversation, face: Face, argument: str) -> None:
    """List the commands."""
    for name, command in COMMANDS.items():
        about = (command.__doc__ or "").split("\n")[0]
        face.note(f"/{name:<12}{about}")
    face.note("Ctrl-C stops an answer, Ctrl-D ends. Alt-Enter begins a new line.")


def _reset(chat: Conversation, face: Face, argument: str) -> None:
    """Begin a new conversation."""
    chat.reset()
    face.note("a new conversation")


def _save(chat: Conversation, face: Face, argument: str) -> None:
    """Save the conversation: /save FILE, as JSON."""
    require(argument != "", "/save: no file; expected /save FILE")
    document = {"model": chat.decoder.model.name, "messages": chat.turns}
    try:
        path = Path(argument).expanduser()
    except RuntimeError:
        raise InputError(f"/save: {argument}: nobody's home is there; expected a file") from None
    write_json(path, document, ascii_only=False)
    face.note(f"saved: {path}")


def _stats(chat: Conversation, face: Face, argument: str) -> None:
    """Show speed, accepted drafts, and how full the context is."""
    for line in chat.figures():
        face.note(line)


def _green(chat: Conversation, face: Face, argument: str) -> None:
    """Show accepted drafts in green, or no longer."""
    face.green = not face.green
    face.note(f"accepted drafts in green: {'on' if face.green else 'off'}")


COMMANDS: dict[str, Callable[[Conversation, Face, str], None]] = {
    "reset": _reset,
    "save": _save,
    "stats": _stats,
    "green": _green,
    "help": _help,
}


def take(chat: Conversation, face: Face, line: str) -> None:
    """Do what a line says: a command, or a question to answer.

    Args:
        chat: the conversation.
        face: where the answer goes.
        line: an empty one says nothing.

    Raises:
        InputError: for a command that there isn't, or that fails, and where the context is full.
    """
    command = _COMMAND.fullmatch(line.rstrip())
    if command is not None:
        name, argument = command.groups(default="")
        known = ", ".join(f"/{each}" for each in COMMANDS)
        beside = "or a space before what is no command"
        require(name in COMMANDS, f"/{name}: no such command; expected {known}, {beside}")
        COMMANDS[name](chat, face, argument)
    elif line.strip():
        _answer(chat, face, utf8("question", line.strip()))


def _answer(chat: Conversation, face: Face, question: str) -> None:
    def show(pieces: list[Piece]) -> None:
        face.show(pieces)
        face.check()

    with reading_bar() as bar:

        def on_read(count: int, total: int) -> None:
            bar(count, total)
            face.check()

        answer = chat.ask(question, show, on_read)
    if answer is not None:
        face.show([("\n", False)])
    for note in _ends(chat, answer):
        face.note(note)


def _ends(chat: Conversation, answer: Answer | None) -> Iterator[str]:
    """Say why an answer ended, where the model didn't end it."""
    model = chat.decoder.model
    if answer is None:
        yield "stopped before the answer began; the question is dropped"
    elif answer.finish is None:
        yield "stopped"
    elif answer.finish == "length" and chat.is_full:
        yield (
            f"the context of {model.max_context} tokens is full, and the answer ends here; /reset "
            "begins a new conversation, /save FILE keeps this one"
        )
    elif answer.finish == "length":
        yield f"the answer ends here: max_new_tokens={chat.decode.max_new_tokens}"


def chat_in_terminal(
    decoder: Decoder,
    decode: DecodeConfig,
    face: Face,
    system: str = "",
    template_options: Sequence[str] = (),
) -> None:
    """Hold a conversation until the lines end.

    Args:
        decoder: of a chat model.
        decode: how it answers; the model's own ends are added.
        face: where lines come from, and answers go.
        system: see `Conversation`.
        template_options: see prompts.encode.

    Raises:
        InputError: where the settings and the model do not fit together; and for a wrong line, if
            `face` ends with one.
    """
    chat = Conversation(decoder, decode, system, template_options)
    warm_up(decoder, chat.decode)
    if face.typed:
        face.note(f"{decoder.model.name}: accepted drafts are green; /help says more, Ctrl-D ends")
    for line in face.lines():
        try:
            take(chat, face, line)
        except InputError as error:
            if not face.typed:
                raise
            face.note(f"error: {error}")
