"""Command options are those of the settings: names, defaults, environment variables, and how a word
becomes a value.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from common import one_line_error
from typer.testing import CliRunner

from sdsat.cli.main import app
from sdsat.cli.options import Defaults, Given, Only, from_settings, out_file
from sdsat.config import NUMBERS, WHOLE_NUMBERS, WORDS, numbers_of, option


@dataclass(frozen=True)
class Settings:
    number: int = option(3, "How many.", env="NUMBER")
    levels: tuple[float, ...] = option((0, 0.5), "Levels.", text=NUMBERS)
    files: tuple[Path, ...] = option((), "Files.", names=("--file",), repeated=True)
    names: tuple[str, ...] = option(("a", "b"), "Names.", text=WORDS)
    shape: str | None = option(None, "Shape.", names=("-s", "--shape"))
    size: int = option(7, "Size.", is_open=True)
    k_list: tuple[int, ...] = option((1, 2), text=WHOLE_NUMBERS, is_open=True)
    hidden: int = 5


def run(command, *arguments, **environment):
    """(what the command got, its exit code, what it said)."""
    got = []
    script = typer.Typer()

    @script.command()
    @from_settings
    def main(
        *,
        config: command,
        out: Annotated[Path | None, out_file("A file.")] = None,
    ) -> None:
        got.append((config, out))

    result = CliRunner().invoke(script, list(arguments), env=environment)
    if isinstance(result.exception, ValueError):
        raise result.exception
    return (got or [(None, None)])[0], result


def test_settings_are_made_of_what_is_given():
    (config, _), _ = run(Settings)
    assert config == Settings()
    arguments = ["--levels", "0.2,1", "--file", "x", "--file", "y", "--names", "c", "-s", "round"]
    (config, _), _ = run(Settings, *arguments, "--size", "8", "--k-list", "5,6", NUMBER="4")
    assert config == Settings(4, (0.2, 1.0), (Path("x"), Path("y")), ("c",), "round", 8, (5, 6))
    assert run(Settings, "--hidden", "6")[1].exit_code == 2


def test_a_command_may_have_other_defaults_and_some_of_the_options():
    kind = Annotated[Settings, Only("number", "shape"), Defaults(number=9, shape="flat")]
    (config, _), _ = run(kind)
    assert config == Settings(number=9, shape="flat")
    assert run(kind, "--names", "c")[1].exit_code == 2


def test_what_is_left_open_is_not_given():
    (given, _), _ = run(Given[Settings], "--number", "1", "--k-list", "")
    assert "size" not in given.values and "k_list" not in given.values
    made = given.make({"number": 2, "size": 4}, hidden=6)
    assert made == Settings(number=1, size=4, hidden=6)
    (given, _), _ = run(Given[Settings], "--size", "5")
    assert given.make({"size": 4}).size == 5


def test_help_shows_each_fields_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = run(Settings, "--help")[1].output
    for shown in ("How many.", "NUMBER", "default: 3", "default: 0,0.5", "default: a,b", "--file"):
        assert shown in text
    assert "default: 7" not in text and "hidden" not in text


def test_a_bad_value_is_one_line_that_names_the_option(tmp_path):
    for name, text in (("levels", "warm"), ("k_list", "1,two")):
        with one_line_error(f"{name}={text}: expected a number, or several with commas between"):
            run(Settings, f"--{name.replace('_', '-')}", text)
    with one_line_error("--out=none/x.json: no such folder"):
        run(Settings, "--out", "none/x.json")
    (_, out), _ = run(Settings, "--out", str(tmp_path / "x.json"))
    assert out == tmp_path / "x.json"
    with one_line_error("seeds=: expected a number, or several"):
        numbers_of("seeds", "")


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["train", "--help"]], ids=str)
def test_help_does_not_wait_for_torch(words):
    script = (
        "import sys; from sdsat.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "print({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


def test_every_command_is_there():
    commands = typer.main.get_command(app).commands
    assert list(commands) == [
        *("generate", "chat", "bench", "report", "verify", "eval", "inspect"),
        *("distill", "train", "export", "serve", "doctor"),
    ]
    assert all(command.help for command in commands.values())
