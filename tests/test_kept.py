"""The cache folder: used as it is where it is whole, made again where it isn't, and never trusted
with another's code.
"""

import errno
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from common import one_line_error, tiny_llama, tiny_tokenizer

from sdsat.cache_folder import load_library
from sdsat.engines.native import bindings
from sdsat.models import gguf


class Build:
    """Compiles a library whose `answer` is the number of builds so far; counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, target):
        self.count += 1
        source = target.with_suffix(".c")
        source.write_text(f"int answer(void) {{ return {self.count}; }}")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)


@pytest.fixture
def cache(monkeypatch, unprivileged):
    monkeypatch.setenv("SDSAT_CACHE", str(unprivileged / "cache"))
    return unprivileged / "cache"


def kept(cache):
    (file,) = (cache / "native").glob("*.so")
    return file


def quietly(build, name="key"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_library(name, build).answer()


def test_a_library_is_built_once_and_used_where_nothing_can_be_written(cache):
    build = Build()
    assert [quietly(build) for _ in range(2)] == [1, 1] and build.count == 1
    assert quietly(build, "another") == 2
    for folder in (cache / "native", cache):
        folder.chmod(0o500)
    (cache / "native.lock").chmod(0o400)
    assert quietly(build) == 1 and build.count == 2
    cache.chmod(0o700)


@pytest.mark.parametrize("damage", [b"", b"cut", b"another"])
def test_a_damaged_library_is_not_loaded_but_built_again(cache, damage):
    """To load one that was cut short ends the process with a bus error."""
    build = Build()
    build.count = 10
    quietly(build)
    file = kept(cache)
    whole = file.read_bytes()
    file.unlink()  # this process goes on with the one that it has loaded
    file.write_bytes(whole[: len(whole) // 2] if damage == b"cut" else damage)
    file.chmod(0o700)
    assert quietly(build) == 12 and build.count == 12
    assert quietly(build) == 12 and build.count == 12  # and is kept


@pytest.mark.parametrize("mode", [0o722, 0o720, 0o702])
def test_a_library_that_others_can_write_to_is_not_loaded(cache, mode):
    build = Build()
    build.count = 20
    quietly(build)
    kept(cache).chmod(mode)
    assert quietly(build) == 22
    assert kept(cache).stat().st_mode & 0o022 == 0


def test_nor_one_in_a_folder_that_others_can_write_to(cache):
    build = Build()
    build.count = 30
    quietly(build)
    # this user's own: closed, for whatever is there, and built anew
    (cache / "native").chmod(0o777)
    assert quietly(build) == 32 and (cache / "native").stat().st_mode & 0o077 == 0
    cache.chmod(0o777)  # somebody else could put another folder in its place
    with pytest.warns(UserWarning, match=f"cannot be kept .*{cache}: others can write to it"):
        assert load_library("key", build).answer() == 33
    cache.chmod(0o700)


def test_a_kept_library_needs_no_other_folder(cache, monkeypatch):
    build = Build()
    quietly(build)
    # a machine where nothing else can be written
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    assert quietly(build) == 1 and build.count == 1


def test_a_full_disk_costs_no_more_than_keeping_it(cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    build = Build()
    with pytest.warns(
        UserWarning, match="compiled at every start: it cannot be kept .*No space left"
    ):
        assert load_library("key", build).answer() == 1
    assert build.count == 1 and not list(cache.rglob("*.so"))  # built once, and not on that disk


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file another user's")
def test_nor_another_users(cache):
    build = Build()
    build.count = 40
    quietly(build)
    os.seteuid(0)
    os.chown(kept(cache), 12345, 12345)
    os.seteuid(65534)
    assert quietly(build) == 42 and kept(cache).stat().st_uid == 65534
    os.seteuid(0)
    os.chown(cache / "native", 12345, 12345)
    os.seteuid(65534)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert load_library("key", build).answer() == 43


@pytest.mark.parametrize("obstacle", ["a file", "read-only", "no home"])
def test_what_cannot_be_kept_is_built_for_this_process_with_a_warning(cache, monkeypatch, obstacle):
    build = Build()
    build.count = {"a file": 50, "read-only": 60, "no home": 70}[obstacle]
    if obstacle == "a file":
        cache.write_text("")
    elif obstacle == "read-only":
        cache.mkdir(mode=0o500)
    else:
        monkeypatch.setenv("SDSAT_CACHE", "~nobody-of-that-name/cache")
    with pytest.warns(UserWarning, match="compiled at every start: it cannot be kept"):
        assert load_library("key", build).answer() == build.count


def test_a_failed_build_says_why_and_leaves_nothing(cache):
    def fail(target):
        target.write_text("half")
        raise bindings.Unavailable("no")

    with pytest.raises(bindings.Unavailable, match="no"):
        load_library("key", fail)
    assert not list(cache.rglob("*.so*"))


def test_a_model_that_an_earlier_version_made_is_whole_with_all_known_files(cache):
    made = []

    def make(target):
        made.append(target)
        tiny_llama().save_pretrained(target)
        tiny_tokenizer(["<unk>", "a"]).save_pretrained(target)

    folder = gguf.kept("model", make)
    known = tuple(sorted(file.name for file in folder.iterdir() if file.name != "files"))
    (folder / "files").unlink()
    assert gguf.kept("model", make, known) == folder and len(made) == 1
    (folder / "generation_config.json").unlink()
    assert gguf.kept("model", make, known) == folder and len(made) == 2
    (folder / "files").unlink()
    assert gguf.kept("model", make) == folder and len(made) == 3


def test_a_model_is_used_where_it_is_whole_and_made_again_where_it_is_not(cache, monkeypatch):
    made = []

    def make(target):
        made.append(target)
        tiny_llama().save_pretrained(target)
        tokenizer = tiny_tokenizer(["<unk>", "a"])
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(target)

    folder = gguf.kept("model", make)
    assert gguf.kept("model", make) == folder and len(made) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a copy that was cut short
    assert gguf.kept("model", make) == folder and len(made) == 2
    (folder / "config.json").unlink()
    assert gguf.kept("model", make) == folder and len(made) == 3
    names = sorted(file.name for file in folder.iterdir())
    assert "chat_template.jinja" in names and "tokenizer_config.json" in names
    for name in names:
        for damage in (Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-2])):
            damage(folder / name)
            assert gguf.kept("model", make) == folder
            assert sorted(file.name for file in folder.iterdir()) == names
    assert len(made) == 3 + 2 * len(names)
    del made[3:]
    (cache / "model.lock").unlink()
    cache.chmod(0o500)
    # nothing needs to be written, no lock either
    assert gguf.kept("model", make) == folder and len(made) == 3
    (cache / "model").chmod(0o700)
    cache.chmod(0o700)
    shutil.rmtree(folder)
    cache.chmod(0o500)
    with one_line_error(f"cache folder {cache}: cannot be written", "set SDSAT_CACHE"):
        gguf.kept("model", make)
    cache.chmod(0o700)
    monkeypatch.setenv("SDSAT_CACHE", "~nobody-of-that-name/cache")
    with one_line_error("cache folder: ", "set SDSAT_CACHE to a folder"):
        gguf.kept("model", make)
