"""`sdsat chat`: answers are those of fresh decodes of the whole conversation; what a line does; and
the program in a terminal.
"""

import fcntl
import io
import json
import os
import pty
import string
import struct
import sys
import termios
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from common import adapted, one_line_error, tiny_llama, tiny_tokenizer
from pexpect import fdpexpect
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from test_decode import WHOLE, drafting

from sdsat.cli import main as cli
from sdsat.config import DecodeConfig, SamplingConfig
from sdsat.interfaces import terminal
from sdsat.interfaces.chat import Conversation, Stopped
from sdsat.interfaces.chat_terminal import Piped, Typed, chat_in_terminal, take
from sdsat.models.adapter import AdapterConfig

K = 4
LETTERS = ["<unk>", *string.ascii_letters, *" \n.,?"]
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(pieces=LETTERS):
    tokenizer = tiny_tokenizer(pieces)
    roles = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def chat_decoder(pieces=tuple(LETTERS), dtype=torch.bfloat16, positions=4096):
    tokenizer = chat_tokenizer(list(pieces))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    sizes = dict(WHOLE, max_position_embeddings=positions, eos_token_id=end)
    decoder = drafting(tiny_llama(dtype, vocab=len(tokenizer), **sizes), native=True, k=K)
    decoder.model.tokenizer = tokenizer
    return decoder


def silent(_):
    pass


def tokens_of(answer):
    return [token for step in answer.steps for token in step.tokens]


SETTINGS = [
    DecodeConfig(K, 40, strategy="two-step"),
    DecodeConfig(K, 40, "auto", SamplingConfig(1.0, seed=5), strategy="auto"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("decode", "system"),
    [(SETTINGS[0], ""), (SETTINGS[1], "Be brief.")],
    ids=["greedy", "sampled"],
)
def test_answers_are_those_to_the_whole_conversation(dtype, decode, system):
    decoder = chat_decoder(dtype=dtype)
    tokenizer = decoder.model.tokenizer
    chat = Conversation(decoder, decode, system)
    turns = [{"role": "system", "content": system}] if system else []
    for number, question in enumerate(["What is it?", "Why?", "And how, then?"]):
        turns.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        sampling = replace(decode.sampling, seed=decode.sampling.seed + number * 2**32)
        plain = replace(chat.decode.plain, sampling=sampling)
        shown = []
        answer = chat.ask(
            question, lambda pieces, shown=shown: shown.extend(text for text, _ in pieces)
        )
        out = decoder.generate(ids, plain)
        assert tokens_of(answer) == out.token_ids and answer.finish == out.finish
        assert "".join(shown) == answer.text == out.text
        assert answer.num_prompt == len(ids)
        turns.append({"role": "assistant", "content": out.text})
    assert chat.turns == turns


def test_an_answer_is_kept_as_the_model_wrote_it():
    """Its tokenizer would split the text otherwise, and all behind that would be read again."""
    pieces = (*LETTERS, *(a + b for a in "abcdefgh" for b in "aeiou"))
    decoder = chat_decoder(pieces)
    tokenizer = decoder.model.tokenizer
    prompts = []
    generate = decoder.generate

    def seen(ids, *arguments):
        prompts.append(ids)
        return generate(ids, *arguments)

    spied = SimpleNamespace(model=decoder.model, resolved=decoder.resolved, generate=seen)
    chat = Conversation(spied, DecodeConfig(K, 24))
    joined = False
    read_again, context = True, 0
    for number in range(6):
        answer = chat.ask(f"Say {'abcdef'[number]}.", silent)
        special = set(tokens_of(answer)[:-1]) & {0, *range(len(pieces), len(tokenizer))}
        again = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        joined = joined or (not special and again != tokens_of(answer))
        assert tokens_of(answer) == generate(prompts[-1], replace(chat.decode.plain)).token_ids
        # whatever its tokens, they say what the template does
        text = tokenizer.apply_chat_template(
            chat.turns[:-1], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(prompts[-1]) == text
        if not read_again:
            assert answer.num_kept >= context - 1
        read_again, context = special, chat.context
    assert joined


@pytest.fixture
def chat():
    return Conversation(chat_decoder(), DecodeConfig(K, 40, strategy="two-step"))


class Face:
    """Lines to enter, and what is shown for them."""

    green = True

    def __init__(self, lines=(), typed=True, stop_after=None):
        self.entered = lines
        self.typed = typed
        self.shown = []
        self.notes = []
        self.stop_after = stop_after

    def lines(self):
        yield from self.entered

    def show(self, pieces):
        self.shown.append(pieces)

    def note(self, text):
        self.notes.append(text)

    def check(self):
        if self.stop_after is not None and len(self.shown) >= self.stop_after:
            raise Stopped

    @property
    def text(self):
        return "".join(text for pieces in self.shown for text, _ in pieces)


def test_what_was_stopped_stays_as_far_as_it_was_shown(chat):
    whole = Conversation(chat.decoder, chat.decode).ask("Tell me.", silent).text
    face = Face(stop_after=3)
    take(chat, face, "Tell me.")
    (_, turn) = chat.turns
    assert turn["content"] + "\n" == face.text and 0 < len(turn["content"]) < len(whole)
    assert whole.startswith(turn["content"]) and face.notes == ["stopped"]
    again = Face()
    take(chat, again, "Go on.")
    tokenizer = chat.decoder.model.tokenizer
    text = tokenizer.apply_chat_template(
        chat.turns[:-1], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert again.text == chat.decoder.generate(ids, chat.decode.plain).text + "\n"


def test_what_was_stopped_before_it_began_was_not_asked(chat):
    take(chat, Face(), "Tell me.")
    turns = list(chat.turns)
    face = Face(stop_after=0)
    take(chat, face, "Tell me more.")
    assert chat.turns == turns and len(chat.answers) == 1 and not face.shown
    assert face.notes == ["stopped before the answer began; the question is dropped"]


def test_a_full_context_says_so_and_what_to_do():
    chat = Conversation(chat_decoder(positions=96), DecodeConfig(K, 60, strategy="two-step"))
    chat.decode = replace(chat.decode, stop_ids=())
    face = Face()
    take(chat, face, "a" * 20)
    assert chat.context < 96 and face.notes == ["the answer ends here: max_new_tokens=60"]
    take(chat, face, "b")
    assert chat.context == 96 and chat.is_full
    assert face.notes[1:] == [
        "the context of 96 tokens is full, and the answer ends here; /reset begins a new "
        "conversation, /save FILE keeps this one"
    ]
    turns = list(chat.turns)
    with one_line_error("context: full, ", "tiny takes 96; expected /reset"):
        take(chat, face, "c")
    assert chat.turns == turns
    take(chat, face, "/reset")
    take(chat, face, "c")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]


def test_a_reset_begins_anew(chat):
    first, again = Face(), Face()
    chat.decode = replace(chat.decode, sampling=SamplingConfig(1.0, seed=2))
    take(chat, first, "Tell me.")
    take(chat, Face(), "And then?")
    take(chat, again, "/reset")
    assert chat.turns == [] and chat.context == 0
    take(chat, again, "Tell me.")
    assert again.text == first.text and chat.answers[-1].num_kept == 0


def test_saving(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    take(chat, Face(), "Tell me \u00e4.")
    file = tmp_path / "two words.json"
    take(chat, Face(), f"/save {file} ")
    saved = file.read_text("utf-8")
    assert json.loads(saved) == {"model": "tiny", "messages": chat.turns} and "\u00e4" in saved
    with one_line_error("/save: no file; expected /save FILE"):
        take(chat, Face(), "/save")
    for wrong in (
        "none/x.json: no such folder",
        "~nobody-of-that-name/x",
        "a\0b: cannot be written",
    ):
        with one_line_error(wrong):
            take(chat, Face(), f"/save {wrong.split(':')[0]}")

    def full(*_):
        raise OSError(28, "full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with one_line_error("two words.json: cannot be written (full)"):
        take(chat, Face(), f"/save {file}")
    assert file.read_text("utf-8") == saved and os.listdir() == [file.name]


def test_figures(chat):
    face = Face()
    take(chat, face, "/stats")
    assert face.notes == ["no answer yet"]
    for question in ("Tell me.", "And then?"):
        take(chat, Face(), question)
    del face.notes[:]
    take(chat, face, "/stats")
    one, two = chat.answers
    count = len(tokens_of(one)) + len(tokens_of(two))
    drafted = sum(sum(step.drafted) for answer in (one, two) for step in answer.steps)
    assert face.notes[0].startswith(f"answer 2: {len(tokens_of(two))} tokens, ")
    assert face.notes[0].endswith(f"; {two.num_prompt} tokens of prompt, {two.num_kept} kept")
    assert one.num_kept == 0 and two.num_kept >= one.num_prompt + len(tokens_of(one)) - 1
    assert face.notes[1].startswith(f"all 2: {count} tokens, ")
    assert face.notes[1].endswith(f" {drafted / count:.0%} of them accepted drafts")
    assert face.notes[2] == f"context: {two.num_prompt + len(tokens_of(two))} of 4096 tokens"


def test_what_is_a_command(chat):
    face = Face()
    take(chat, face, "  ")
    assert not chat.turns
    with one_line_error("/rest: no such command; expected /reset, /save, "):
        take(chat, face, "/rest")
    for question in ("/usr/bin is what?", " /rest"):
        take(chat, face, question)
        assert chat.turns[-2]["content"] == question.strip()
    assert not face.notes or set(face.notes) == {"the answer ends here: max_new_tokens=40"}
    del face.notes[:]
    take(chat, face, "/help")
    for name in ("/reset", "/save", "/stats", "/green", "/help"):
        assert sum(note.startswith(name + " ") for note in face.notes) == 1
    with one_line_error("question: not UTF-8 at character 4"):
        take(chat, face, "tell\udce4")


def test_a_typed_mistake_is_said_and_a_piped_one_ends_it():
    decoder = chat_decoder()
    lines = ["/rest", "Tell me."]
    face = Face(lines)
    chat_in_terminal(decoder, SETTINGS[0], face)
    assert face.notes[1].startswith("error: /rest: ") and face.text
    face = Face(lines, typed=False)
    with one_line_error("/rest"):
        chat_in_terminal(decoder, SETTINGS[0], face)
    assert not face.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_accepted_drafts_are_green_until_that_is_turned_off(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        face = Typed()
        face.show([("drafted", True)])
        take(None, face, "/green")
        face.show([("again", True)])
    assert "\x1b[1;32mdrafted\x1b[0m" in sys.stdout.getvalue()
    assert sys.stdout.getvalue().endswith("off\x1b[0m\nagain")


def test_what_a_model_writes_does_not_act_on_a_terminal(monkeypatch):
    """Piped, every character is there."""
    text = "a\x1b]52;c;AAAA\x07\x9b2J\x0c\rb\n"
    monkeypatch.setattr(sys, "stdout", Terminal())
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        Typed().show([(text, False)])
    assert sys.stdout.getvalue() == "a\ufffd]52;c;AAAA\ufffd\ufffd2J\ufffdb\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    Piped(io.BytesIO()).show([(text, False), ("\tc", True)])
    assert sys.stdout.getvalue() == text + "\tc"


def test_keys():
    """Ctrl-C empties the line; what is pasted, and Alt-Enter, keep several; Ctrl-D ends."""
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        keys.send_text("half\x03one\r\x1b[200~two\nlines\x1b[201~\rthree\x1b\rmore\r\x04")
        assert list(Typed().lines()) == ["one", "two\nlines", "three\nmore"]


@pytest.mark.parametrize(("total", "shown"), [(2000, False), (2001, True)])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_long_prompt_shows_how_far_it_is_read(total, shown, stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    # as `sdsat generate` does; the last token is the first pass's
    terminal.timed(chat_decoder(), [5] * (total + 1), DecodeConfig(0, 1))
    said = sys.stderr.getvalue()
    assert bool(said) == (shown and stream is Terminal)
    assert not said or (f"/{total}" in said and said.rstrip(" ").endswith("\r"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter directory whose base is a tiny random chat model."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer()
    lm = tiny_llama(
        torch.float32, len(tokenizer), max_position_embeddings=8192, **WHOLE, eos_token_id=None
    )
    model = adapted(lm, k=5)
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    sample = model.adapter.config.base_sample
    model.adapter.config = AdapterConfig(str(folder / "base"), model.sat, 4, base_sample=sample)
    model.adapter.save(folder / "adapter")
    return folder / "adapter"


def command(monkeypatch, capsys, given, *arguments):
    """Run `sdsat chat ...` with this input: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    monkeypatch.setattr(sys, "argv", ["sdsat", "chat", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0, *capsys.readouterr()


FIXED = ("--strategy", "two-step", "--max-new-tokens", "12", "--dtype", "float32")


def test_piped_lines_are_turns(saved, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = b"Hello.\n\nWhy?\r\n/save it.json\n/reset\nHello."
    code, out, errors = command(monkeypatch, capsys, given, saved, *FIXED)
    assert code == 0, errors
    hello, why = (
        turn["content"]
        for turn in json.loads((tmp_path / "it.json").read_text())["messages"]
        if turn["role"] == "assistant"
    )
    assert out == f"{hello}\n{why}\n{hello}\n" and why and hello != why
    assert "saved: it.json" in errors and "error" not in errors


def test_bad_input_is_one_line(saved, tiny, monkeypatch, capsys):
    def fails(given, *arguments):
        code, out, errors = command(monkeypatch, capsys, given, *arguments)
        (line,) = (each for each in errors.splitlines() if each.startswith("error: "))
        assert code == 2 and not out
        return line

    assert fails(b"", tiny) == (
        "error: model: it has no chat template to write turns with; expected a chat model"
    )
    assert "template_option=x=1" in fails(b"", saved, "--template-option", "x=1")
    assert "temperature=-1.0: expected" in fails(b"", saved, "--temperature", "-1")
    assert "error: line 1: not UTF-8 at byte 1" in fails(b"a\xe4\n", saved, *FIXED)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "argv", ["sdsat", "chat", str(saved)])
    for name in ("stdin", "stdout"):
        with monkeypatch.context() as closed, pytest.raises(SystemExit):
            closed.setattr(sys, name, None)
            cli.main()
        assert capsys.readouterr().err == f"error: {name}: closed; expected a terminal or a pipe\n"
    with one_line_error("prompt_toolkit, which is not installed", "pip install 'sdsat[chat]'"):
        Typed()


PROMPTED = r">[^>]*\x1b\[\?25h"  # and the cursor behind it is shown


def chat_apart(model, slave):
    """`sdsat chat` with a terminal of its own."""
    os.setsid()
    for stream in range(3):
        os.dup2(os.open(slave, os.O_RDWR), stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
    sys.argv = ["sdsat", "chat", model, "--max-new-tokens", "4000", *FIXED[:2], *FIXED[4:]]
    cli.main()


def test_in_a_terminal(saved, own_process, tmp_path):
    """Turns, Ctrl-C in the middle of an answer, commands, and Ctrl-D."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 4096, 0, 0))
    process = own_process(
        chat_apart, str(saved), os.ttyname(slave), TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1"
    )
    screen = fdpexpect.fdspawn(master, timeout=60)
    screen.expect("Ctrl-D ends")

    def ask(question):
        screen.expect(PROMPTED)
        screen.send(question + "\r")

    for question in ("Hello.", "Why?"):
        ask(question)
        screen.expect(r"\x1b\[1;32m\w")  # an accepted draft
        screen.send("\x03")
        screen.expect("stopped")
    ask("/stats")
    screen.expect(r"all 2: \d+ tokens")
    ask("/reset")
    screen.expect("a new conversation")
    ask("Again.")
    screen.expect(r"\x1b\[1;32m\w")
    screen.send("\x03")
    screen.expect("stopped")
    file = tmp_path / "saved.json"
    ask(f"/save {file}")
    screen.expect("saved: ")
    question, answer = json.loads(file.read_text())["messages"]
    assert question == {"role": "user", "content": "Again."}
    assert 0 < len(answer["content"]) < 4000
    screen.expect(PROMPTED)
    screen.send("\x04")
    process.process.join(30)
    assert process.process.exitcode == 0
    os.close(slave)
