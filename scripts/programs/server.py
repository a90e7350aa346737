"""A program of its own that answers HTTP on this machine."""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdsat.config import InputError, require

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Server:
    """One that answers: at `port`, `seconds` after it was begun; what it says is in `log`."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.log = log
        self.seconds = 0.0

    def open(self, path: str, asked: Any = None, timeout: float = 3600) -> bytes:
        """GET, or POST what is asked as JSON."""
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            found: bytes = answer.read()
        return found


def _end_with_parent() -> None:
    """Have this process ended with the one that began it, however that ends; on Linux."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def serving(
    command: list[str], environment: dict[str, str] | None = None, patience: float = 900
) -> Iterator[Server]:
    """Run `command --port N` while the block does, once its /health answers.

    environment: variables beside this process's. patience: seconds until it must answer. It and its
    workers end with the block. Raises InputError where it ends before it answers, or doesn't answer
    in time.
    """
    name = Path(command[0]).name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handle, log = tempfile.mkstemp(prefix=f"{name}_", suffix=".log")
    server = Server(port, Path(log))
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, **(environment or {})},
        stdout=handle,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    os.close(handle)
    try:
        while True:
            if process.poll() is not None:
                lines = server.log.read_text(errors="replace").splitlines()
                last = next((line for line in reversed(lines) if "rror" in line), "")
                raise InputError(
                    f"{name} ended before it answered ({last.strip()}); its log: {log}"
                )
            require(
                time.monotonic() - began < patience,
                f"{name} did not answer in {patience:.0f} seconds; its log: {log}",
            )
            with contextlib.suppress(OSError):
                server.open("health", timeout=5)
                break
            time.sleep(0.2)
        server.seconds = time.monotonic() - began
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def served(command: list[str], environment: dict[str, str] | None = None) -> Server:
    """The same until this process ends."""
    running = contextlib.ExitStack()
    atexit.register(running.close)
    return running.enter_context(serving(command, environment))
