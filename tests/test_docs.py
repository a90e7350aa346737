"""What the documents show works: commands, links, the Python in them, and the example programs."""

import http.server
import json
import re
import runpy
import shlex
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import typer
from conftest import tiny_llama, tiny_tokenizer

from sdsat.cli.main import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
STARTS = ("sdsat ", "bash ", "python ", ".venv-vllm/bin/python ")


def commands_in(document):
    """Commands on lines of their own and in backquotes, without settings before them and remarks
    after them.
    """
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    shown = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for command in [*shown, *re.findall(r"`([^`]+)`", text)]:
        command = re.sub(r"^([A-Z_]+=\S+ )+", "", " ".join(command.split())).split(" # ")[0]
        launched = (
            command.startswith(("accelerate launch ", "torchrun ")) and " -m sdsat " in command
        )
        if launched or command.startswith(STARTS):
            yield command.removesuffix(" ...")


COMMANDS = sorted(
    {(command, document.name) for document in DOCUMENTS for command in commands_in(document)}
)


def test_there_are_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("command", "document"), COMMANDS)
def test_a_command_is_one_that_exists_with_these_options(command, document, monkeypatch):
    """The command line takes it as it stands; that the commands do what they say is tested in their
    own files.
    """
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "-m" in words:  # a launcher before it
        words = words[words.index("-m") + 1 :]
    if words[0] == "sdsat":
        group = typer.main.get_command(app)
        with group.make_context("sdsat", ["bench"]) as context:
            name, found, rest = group.resolve_command(context, words[1:] or ["bench"])
        options = {option for parameter in found.params for option in parameter.opts}
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= options, f"{document}: {name} has no {given - options}"
        return
    program = ROOT / next(word for word in words[1:] if not word.startswith("-"))
    assert program.is_file(), f"{document}: there is no {program.name}"
    source = program.read_text()
    for option in (word for word in words if word.startswith("--")):
        assert option in source or option.lstrip("-").replace("-", "_") in source, (
            f"{document}: {program.name} has no {option}"
        )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", document.read_text()):
        assert (document.parent / link).exists(), link


def test_the_readmes_python_runs(tiny, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    exec(compile(code.replace("smollm2-135m-sdsat", str(tiny)), "README.md", "exec"), {})
    assert "def add" in capsys.readouterr().out


def example(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_batch_example_runs(tiny, monkeypatch, capsys):
    example("batch.py", monkeypatch, tiny, "def f(x):", "import os", "x", "--max-new-tokens", 9)
    out = capsys.readouterr().out
    assert out.count("passes") == 3 and "alone: the same output" in out


def test_the_training_example_runs(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer(["<unk>", *map(chr, range(32, 127)), "\n"])
    tiny_llama(
        vocab=len(tokenizer), max_position_embeddings=4096, eos_token_id=5
    ).float().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"Say number {i} in some words.\n" for i in range(24))
    )
    sizes = ("--prompts", 24, "--steps", 4, "--max-new-tokens", 10, "--held-out", 4, "--rank", 4)
    example(
        "training.py",
        monkeypatch,
        tmp_path / "base",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "out",
        *sizes,
    )
    assert "the same output as without drafts" in capsys.readouterr().out


class _Answers(http.server.BaseHTTPRequestHandler):
    """Streams two pieces of text, as `vllm serve` does; keeps what it was asked."""

    asked: ClassVar[list] = []

    def do_POST(self):
        self.asked.append(
            (self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "sdsat"}
        for text in ("def f", "(x):"):
            choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
            self.wfile.write(f"data: {json.dumps({**head, 'choices': choices})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


def test_the_serving_example_runs(monkeypatch, capsys):
    """The real client against a stand-in server (scripts/serve_vllm.py runs the real one)."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    example("serving.py", monkeypatch, "Write", "f.")
    server.shutdown()
    server.server_close()
    assert capsys.readouterr().out == "def f(x):\n"
    ((path, asked),) = _Answers.asked
    assert path == "/v1/chat/completions"
    assert (asked["model"], asked["stream"], asked["messages"][0]["content"]) == (
        "sdsat",
        True,
        "Write f.",
    )
