"""Processes that begin at once: a new Python imports torch and transformers for seconds.

They are forks of a server, which is a fork of the process that runs the tests, from before its
first test: it has imported all that tests need, and has done nothing else: no model, no thread. So
what they do is what a new process does, but for what it reads while it starts.
"""

import multiprocessing
import os
import sys
import warnings
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import NamedTuple

import pytest
import torch


class QuickProcess(ForkServerProcess):
    """A process with the environment that its parent has now, as a spawned one has it."""

    def start(self):
        self._environment = dict(os.environ)
        super().start()
        started.append(self)

    def run(self):
        os.environ.clear()
        os.environ.update(self._environment)
        # Whoever first asks for torch's threads after a fork makes them anew, and a second one that
        # asks meanwhile finds none ("Invalid thread pool!").
        torch.set_num_threads(1)
        super().run()


class QuickContext(ForkServerContext):
    Process = QuickProcess


_CONTEXT = QuickContext()
started = []  # of a test, in order


def begin_server():
    """Have this process forked, now, into the server of `context()`."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Killed processes leave semaphores behind, as they should.
        patch.setenv("PYTHONWARNINGS", "ignore")
        resource_tracker.ensure_running()
        warnings.simplefilter("ignore")  # that there are threads: none that the server needs
        patch.setattr(util, "spawnv_passfds", _fork)
        forkserver.ensure_running()


def _fork(python, arguments, descriptors):
    """Do in a fork of this process what `python arguments` does; returns its id.

    It has one thread, and looks no model up in the hub.
    """
    if process := os.fork():
        return process
    try:
        kept = sorted({0, 1, 2, *descriptors})
        for before, after in zip(kept, [*kept[1:], 2**16], strict=True):
            os.closerange(before + 1, after)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        torch.set_num_threads(1)
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def context():
    """What starts such processes."""
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
