"""The process in which a model's code runs: it holds an answer's function and calls it when asked.

Standard library only.

Its source is given to a bare interpreter (`python -I -c`), as sdsat need not be in sight there. It
reads questions from standard input, a line of JSON each, and replies on standard output; what the
code prints goes nowhere. sandbox.py builds the walls around it and judge.py asks the questions,
with `encode` and `decode` of this file.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import types
from collections.abc import Iterable, Set
from numbers import Integral, Real
from typing import Any

MAX_REPLY_BYTES = 1 << 20
_FILE_BYTES = 16 << 20
_OPEN_FILES = 64
_KINDS = (list, tuple, set, frozenset)

# System calls that make memory which no limit counts, or would give the powers to: by machine, its
# number for seccomp and theirs.
_REFUSED_CALLS = {
    "x86_64": (
        0xC000003E,
        {"shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "memfd_secret": 447}
        | {"mount": 165, "fsopen": 430, "unshare": 272, "io_uring_setup": 425, "bpf": 321},
    ),
    "aarch64": (
        0xC00000B7,
        {"shmget": 194, "semget": 190, "msgget": 186, "memfd_create": 279, "memfd_secret": 447}
        | {"mount": 40, "fsopen": 430, "unshare": 97, "io_uring_setup": 425, "bpf": 280},
    ),
}


def encode(value: Any) -> Any:
    """Write a value as JSON keeps it.

    Scalars are as they are, all else is [kind, content]; of what is no plain data only its type's
    name is kept. Iterators and other iterables are read out. numpy's scalars are Python's.
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", list(value)]
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Set) and not isinstance(value, _KINDS):  # a dict's keys
        value = set(value)
    kind = next((kind.__name__ for kind in _KINDS if isinstance(value, kind)), "iterator")
    if isinstance(value, Iterable):
        return [kind, [encode(item) for item in value]]
    return ["object", type(value).__name__]


def decode(value: Any) -> Any:
    """Read the value that was encoded.

    An iterator is one again; what was no plain data is an object that equals nothing else.
    """
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind in ("complex", "bytes"):
        return complex(*content) if kind == "complex" else bytes(content)
    makers: dict[str, Any] = {maker.__name__: maker for maker in _KINDS}
    return (
        object() if kind == "object" else makers.get(kind, iter)([decode(item) for item in content])
    )


def limit(memory_bytes: int, seconds: float) -> list[str]:
    """Bound what this process may use, for good: it starts no process, and no thread.

    Returns in words what can't be bounded.
    """
    wanted = {
        "memory": ("RLIMIT_AS", memory_bytes),
        "processor time": ("RLIMIT_CPU", int(seconds) + 2),
        "file size": ("RLIMIT_FSIZE", _FILE_BYTES),
        "open files": ("RLIMIT_NOFILE", _OPEN_FILES),
        "core dumps": ("RLIMIT_CORE", 0),
        "processes": ("RLIMIT_NPROC", 0),
    }
    refused = []
    for what, (name, value) in wanted.items():
        try:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, OSError, ValueError):
            refused.append(what)
    return refused


def refuse_calls() -> bool:
    """Have the kernel refuse `_REFUSED_CALLS`, for good, here and in what this process starts.

    Returns whether it does.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or machine not in _REFUSED_CALLS:
        return False
    architecture, calls = _REFUSED_CALLS[machine]
    load = 0x20
    equal = 0x15
    at_least = 0x35
    end = 0x06
    foreign = 0x40000000  # numbers of x86's third set of calls
    allow = 0x7FFF0000
    permission_error = 0x00050001
    refuse_set = 22
    no_new_privileges = 38
    count = len(calls)
    steps = [
        (load, 0, 0, 4),
        (equal, 0, count + 3, architecture),
        (load, 0, 0, 0),
        (at_least, count + 1, 0, foreign),
    ]
    steps += [(equal, count - place, 0, number) for place, number in enumerate(calls.values())]
    steps += [(end, 0, 0, allow), (end, 0, 0, permission_error)]
    try:
        import ctypes

        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
        prctl = ctypes.CDLL(None).prctl
        zero = ctypes.c_ulong(0)
        prctl(no_new_privileges, ctypes.c_ulong(1), zero, zero, zero)
        refused: bool = prctl(refuse_set, ctypes.c_ulong(2), program) == 0
        return refused
    except (ImportError, OSError, AttributeError):
        return False


def refuse_sockets() -> None:
    """Have no sockets, where the system gives no namespace without a network.

    To make one raises OSError from then on.
    """
    import _socket
    import socket

    # It is still a class: ssl, which any web client imports, derives its own from it.
    class Refused(socket.socket):
        def __init__(self, *arguments: object, **named: object) -> None:
            raise OSError("no network here")

    socket.socket = _socket.socket = Refused  # type: ignore


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def main(memory_bytes: int, seconds: float, namespaces: bool) -> None:
    """Say that all is set up, take the program, then answer calls of its function.

    It ends when the questions end.

    Args:
        memory_bytes: that the process may use.
        seconds: of processor time.
        namespaces: whether the process stands in namespaces, without a network.
    """
    questions = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    for descriptor in (0, 1):
        os.dup2(2, descriptor)  # standard error leads nowhere

    def reply(content: dict[str, Any]) -> None:
        left = memoryview(json.dumps(content).encode() + b"\n")
        while left:
            left = left[os.write(replies, left) :]

    os.chdir(os.environ["HOME"])
    unlimited = limit(memory_bytes, seconds)
    if not refuse_calls():
        unlimited.append("shared memory")
    if not namespaces:
        refuse_sockets()
        unlimited += ["processes"] if os.geteuid() == 0 else []  # no limit holds for root
    reply({"unlimited": unlimited})
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look their module up
    program, name = json.loads(questions.readline())
    try:
        exec(compile(program, "<answer>", "exec"), module.__dict__)
        function = module.__dict__[name]
        reply({})
    except BaseException as error:
        reply({"error": _said(error)})
    for line in questions:
        try:
            content = {"value": encode(function(*decode(json.loads(line))))}
        except BaseException as error:
            content = {"error": _said(error)}
        reply(content)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "True")
