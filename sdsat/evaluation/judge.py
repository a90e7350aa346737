"""The process that judges one answer: it starts the answer's, and asks its function what tests ask.

It leaves nothing running. The tests run here, and only values of plain data come over from the
answer's process, which knows neither the tests nor the verdict: to pass, it has to reply what they
expect. Nothing of sdsat but candidate.py is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdsat.evaluation.candidate import MAX_REPLY_BYTES, decode, encode

START_SECONDS = 60.0  # for two interpreters on a busy machine
MAX_VERDICT = 500  # characters: an answer may have it say anything
_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


class _TimeIsUp(BaseException):
    """Raised wherever the judge is when a time limit ends."""


class AnswerError(Exception):
    """The answer's code raised, ended its process or sent what is no reply."""


class Candidate:
    """The function under test, in the process that holds it. Arguments and results are copies."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def read(self) -> dict[str, Any]:
        """Read the next reply.

        Raises AnswerError where there is none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline(MAX_REPLY_BYTES)
        if not line:
            raise AnswerError("the answer ended its process")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise AnswerError("no reply, or one that is too long")
        if "error" in reply:
            raise AnswerError(str(reply["error"]))
        return reply

    def ask(self, question: Any) -> dict[str, Any]:
        """Ask a question, a value of JSON, and read the reply.

        Raises AnswerError where there is none.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read() says so
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return self.read()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, as the tests do; the result is a copy.

        Raises AnswerError where it raises.
        """
        return decode(self.ask(encode(arguments))["value"])


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_descendants(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap the answer's process and all that it started.

    On Linux that is also what has left its group.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Orphans end too: this process is their reaper.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.exists() and (found := children.read_text().split()):
        for child in found:
            os.kill(int(child), signal.SIGKILL)
        os.wait()


def _run_tests(candidate: Candidate, problem: dict[str, str], completion: str) -> str:
    """Run a HumanEval problem's tests on an answer. Returns 'passed' or 'failed: ...'."""
    try:
        candidate.ask([problem["prompt"] + completion, problem["entry_point"]])
        # The tests use what the prompt defines beside the function, and the function by its name.
        namespace: dict[str, Any] = {}
        exec(problem["prompt"] + "\n    pass\n" + problem["test"], namespace)
        namespace[problem["entry_point"]] = candidate
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            namespace["check"](candidate)
    except AnswerError as error:
        return f"failed: {error}"[:MAX_VERDICT]
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:MAX_VERDICT]
    return "passed"


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Check the answer that `request` holds.

    request: `command`, `environment` and `folder` of the answer's process; `problem`, `completion`,
    `seconds`.

    Returns {"result": verdict, "unlimited": what could not be bounded}.
    """
    unlimited: list[str] = []
    place = {"env": request["environment"], "cwd": request["folder"], "start_new_session": True}
    try:
        process = subprocess.Popen(
            request["command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **place,
        )
    except OSError as error:
        return {"result": f"sandbox error: {error}", "unlimited": unlimited}
    try:
        candidate = Candidate(process)
        try:
            with _at_most(START_SECONDS):
                unlimited = candidate.read()["unlimited"]
        except (AnswerError, KeyError, _TimeIsUp):  # none of the answer's code has run yet
            return {"result": "sandbox error: its process does not start", "unlimited": unlimited}
        try:
            with _at_most(request["seconds"]):
                result = _run_tests(candidate, request["problem"], request["completion"])
        except _TimeIsUp:
            result = "timed out"
        return {"result": result, "unlimited": unlimited}
    finally:
        _end_descendants(process)


def main() -> None:
    """Read a request from standard input and write the verdict, both JSON.

    Raises SystemExit, without a verdict, where Python leaves asserts out, as any answer would pass.
    """
    if sys.flags.optimize:
        sys.exit("this Python leaves asserts out, and the tests are asserts")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    print(json.dumps(judge(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
