"""Processes that begin at once: a new Python imports torch and transformers for seconds.

They are forks of a server that has imported both, and has done nothing else: no model, no thread.
So what they do is what a new process does, but for what it reads while it starts.
"""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest

_IMPORTED = (
    "conftest",
    "sdsat.cli.main",
    "sdsat.evaluation.bench",
    "sdsat.training.loop",
    "transformers.models.llama.modeling_llama",
    "hypothesis",
)


class QuickProcess(ForkServerProcess):
    """A process with the environment that its parent has now, as a spawned one has it."""

    def start(self):
        self._environment = dict(os.environ)
        super().start()
        started.append(self)

    def run(self):
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class QuickContext(ForkServerContext):
    Process = QuickProcess


_CONTEXT = QuickContext()
started = []  # of a test, in order


def context():
    """What starts such processes; each has one thread, and looks no model up in the hub."""
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return _CONTEXT


class Ended(NamedTuple):
    code: int
    out: str
    errors: str


class OwnProcess:
    """A process that calls `function(*arguments)`; what it prints goes to files in `folder`."""

    def __init__(self, folder, function, arguments, environment):
        self.folder = folder
        arguments = (folder, environment, function, arguments)
        self.process = context().Process(target=_call, args=arguments)
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    def end(self, timeout=200):
        """Wait for it; -9 and the like are the signals that ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still at it after {timeout} s"
        texts = ((self.folder / name).read_text() for name in ("out", "errors"))
        return Ended(self.process.exitcode, *texts)

    def kill(self):
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _call(folder, environment, function, arguments):
    for stream, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    function(*arguments)


def fork_workers():
    """Have a process of this kind fork its own workers, which can't come from its server."""
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda kind: fork
