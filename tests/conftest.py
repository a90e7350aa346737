"""What tests are given.

It imports little: a process that only hands out tests reads it too.
"""

import inspect
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest

pytest.register_assert_rewrite("common")


def pytest_collection_finish():
    """Where tests are handed out only, nothing is collected."""
    processes.begin_server()


@pytest.fixture
def tokenizer():
    from common import CHARACTERS, tiny_tokenizer

    return tiny_tokenizer(CHARACTERS)


@pytest.fixture
def unprivileged():
    """A new folder of a user for whom modes count, which root is not: who runs the tests, or
    nobody.
    """
    folder = Path(tempfile.mkdtemp())
    if root := os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def _one_probe_a_shape():
    """Of models of one shape only the first is probed: which passes have the same bits depends on
    sizes, and not on weights. Most of what a tiny model does would be this; test_model.py tests it.
    """
    from sdsat.engines import base as engines

    found = {}

    def probe(engine):
        config = engine.model.lm.config.to_dict()
        sizes = sorted((k, v) for k, v in config.items() if isinstance(v, (int, float)))
        recorded = getattr(engine, "graphs", None) is not None
        shape = (type(engine), recorded, engine.model.dtype, config["model_type"], *sizes)
        if shape not in found:
            found[shape] = real(engine)
        return found[shape]

    real = engines.probe_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "probe_rows", probe)
        yield


@pytest.fixture(scope="session", autouse=True)
def _asked_once():
    """`generate` of transformers asks in every call which settings of generation a config has, and
    at every token what arguments a processor takes. Equals get the first answer.
    """
    from transformers import PreTrainedConfig
    from transformers.generation import logits_process

    answers = {}

    def parameters(config):
        key = (type(config), repr(vars(config)))
        if key not in answers:
            answers[key] = real(config)
        return answers[key]

    def signature(method):
        function = getattr(method, "__func__", method)
        if function not in answers:
            answers[function] = inspect.signature(method)
        return answers[function]

    real = PreTrainedConfig._get_generation_parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "_get_generation_parameters", parameters)
        patch.setattr(logits_process, "inspect", SimpleNamespace(signature=signature))
        yield


@pytest.fixture
def own_process(tmp_path_factory):
    """Begin a process that calls a function with arguments, and with an environment."""
    begun = []

    def begin(function, *arguments, **environment):
        folder = tmp_path_factory.mktemp("process")
        begun.append(processes.OwnProcess(folder, function, arguments, environment))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()


@pytest.fixture
def quick_workers(monkeypatch):
    """Processes that this program starts begin at once; yields them, as they come."""
    monkeypatch.setattr(processes, "started", [])
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: processes.context())
    return processes.started


@pytest.fixture
def sketches(monkeypatch):
    """Plots are laid out, but not drawn: their files are empty. Real ones are in test_report.py."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **_: Path(file).write_bytes(b"")
    )


@pytest.fixture
def llama():
    from common import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An adapter directory whose base is a tiny random model with a tokenizer of one character a
    token.
    """
    from common import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))
