"""What the documents show works: commands, links, the Python in them, and the example programs."""

import http.server
import json
import re
import runpy
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import typer
import yaml
from common import tiny_llama, tiny_tokenizer

from sdsat.cli.main import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for folder in (".", "docs", "dev") for path in (ROOT / folder).glob("*.md"))
REFERENCE = ROOT / "results/reference/smollm2-135m-sdsat"
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
        if words[1:2] and words[1].startswith("--"):
            assert words[1] in {option for parameter in group.params for option in parameter.opts}
            return
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


def anchors(document):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]*))?\)", document.read_text()):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_a_document_opens_with_what_a_reader_can_do_then(document):
    assert document.read_text().split("\n\n")[1].startswith("After reading this you ")


def table(document, first):
    """The rows of the table whose head begins with `first`, without its head."""
    lines = document.read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_is_short_and_begins_with_the_race():
    text = re.sub(r"```.*?```|<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.S)
    prose = [line for line in text.splitlines() if not line.startswith(("    ", "|"))]
    assert len(" ".join(prose).split()) <= 700
    assert text.split("\n\n")[1].startswith("![") and "(docs/race.svg)" in text.split("\n\n")[1]
    assert "@keyframes" in (ROOT / "docs/race.svg").read_text()


def test_the_readmes_figures_are_those_of_its_results():
    """Every row's speeds are those of one run in each summary that the caption links."""

    def cell(run):
        low, high = run["speedup_ci95"]
        return f"{run['speedup']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")

    measured = ("greedy", "nucleus_t1.0", "greedy_everyday")
    for name, *cells in table(ROOT / "README.md", "strategy"):
        strategy = "ar" if name.startswith("AR") else "transformers"
        strategy = next(iter(re.findall(r"^`([\w-]+)`", name)), strategy)
        for model in ("smollm2-135m-sdsat", "qwen2.5-coder-0.5b-sdsat"):
            speed, *gains = cells[: 1 + len(measured)]
            cells = cells[1 + len(measured) :]
            for folder, gain in zip(measured, gains, strict=True):
                summary = json.loads(
                    (REFERENCE.parent / model / folder / "summary.json").read_text()
                )
                runs = [run for run in summary["runs"] if run["strategy"] == strategy]
                if folder == "greedy" and speed:
                    runs = [run for run in runs if f"{run['tokens_per_second']:.1f}" == speed]
                assert not gain or any(cell(run) == gain for run in runs), (name, model, folder)
                # and the caption may say that no output of ours is another one than AR's
                ours = [run for run in summary["runs"] if run["strategy"] != "transformers"]
                assert all(run["identical_outputs"] == run["num_problems"] for run in ours)
        assert not cells


def test_the_audits_in_the_table_are_those_of_their_files():
    for audit, tokens, *_, same, plain in table(ROOT / "docs/exactness.md", "audit"):
        link = re.findall(r"\((.*?)\)", audit)[0]
        document = json.loads((ROOT / "docs" / link).read_text())
        for cell, of in ((same, "strategies"), (plain, "transformers")):
            rows = [
                row
                for row in document["summary"]
                if (row["against"] == "transformers") == (of == "transformers")
            ]
            counts = [sum(row[key] for row in rows) for key in ("identical", "num_problems")]
            assert cell.split(",")[0] == ("{}/{}".format(*counts) if rows else ""), audit
        assert document["settings"]["max_new_tokens"] == int(tokens)


def test_what_runs_before_a_commit_is_what_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    lines = (ROOT / "scripts/test.sh").read_text().splitlines()
    checks = [line.split(" &")[0] for line in lines]  # one runs beside the tests
    assert {hooks[name]["entry"] for name in ("format", "lint", "types")} <= set(checks)
    assert hooks["tests"]["entry"] in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(("size", "code"), [(71, 0), (72, 1)])
def test_a_long_commit_subject_is_refused(tmp_path, size, code):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (entry,) = (h["entry"] for h in config["repos"][0]["hooks"] if h["id"] == "subject")
    (tmp_path / "message").write_text("x" * size + "\n\n" + "y" * 200)
    assert subprocess.run([*shlex.split(entry), tmp_path / "message"]).returncode == code


def test_the_issue_template_asks_for_the_audit():
    (path,) = (ROOT / ".github/ISSUE_TEMPLATE").iterdir()
    fields = {field["id"]: field for field in yaml.safe_load(path.read_text())["body"]}
    assert "sdsat verify" in fields["audit"]["attributes"]["description"]
    assert fields["audit"]["validations"]["required"]


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
