"""Files: whole or absent whoever else writes, only where a file belongs, and hashes that tell
contents apart.
"""

import hashlib
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from common import one_line_error

from sdsat import cache_folder as kept
from sdsat.cache_folder import remembered_sha256
from sdsat.files import (
    destination,
    locked,
    make_folder,
    read_json,
    replacing,
    sha256_of,
    write_json,
)


def test_many_writers_of_one_file_never_fail_and_no_reader_sees_a_part(tmp_path):
    file = tmp_path / "a.json"
    stop = threading.Event()
    write_json(file, [0] * 999)

    def write(number):
        for _ in range(50):
            write_json(file, [number] * 999)

    def read():
        seen = []
        while not stop.is_set():
            seen.append(json.loads(file.read_text()))
        return seen

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        for writer in [pool.submit(write, number) for number in (1, 2, 3)]:
            writer.result()
        stop.set()
    assert all(len(content) == 999 and len(set(content)) == 1 for content in reader.result())
    assert list(tmp_path.iterdir()) == [file]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    for failure, raised in (
        (KeyboardInterrupt, KeyboardInterrupt),
        (ZeroDivisionError, ZeroDivisionError),
    ):
        with pytest.raises(raised), replacing(file) as part:
            part.write_text("half")
            raise failure
    assert json.loads(file.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [file]


def special(folder):
    """(path, what is said of it) of things that are no place for a file."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "to-a-device").symlink_to("/dev/full")
    (folder / "a-file").write_text("")
    return [
        ("/dev/full", "it is no regular file"),
        (folder / "to-a-device", "it is no regular file"),
        (folder / "pipe", "it is no regular file"),
        (folder / "folder", "it is a folder"),
        (folder / "loop", "cannot be written"),
        (folder / ("x" * 300), "cannot be written"),
        (folder / "none" / "x", "no such folder"),
        (folder / "a-file" / "x", ""),
    ]


def test_only_a_file_or_a_new_name_is_written_to_and_nothing_else_is_read(tmp_path):
    before = stat.S_IFMT(os.stat("/dev/full").st_mode)
    for path, said in special(tmp_path):
        with one_line_error(f"--out={path}: ", said):
            destination(type(tmp_path)(path), "--out")
        with one_line_error(path, said):
            write_json(type(tmp_path)(path), {})
        if str(path).startswith("/dev") or path.name in ("pipe", "to-a-device"):
            # neither waits for a pipe nor reads a device for ever
            for read in (
                read_json,
                sha256_of,
            ):
                with one_line_error(f"{path}: cannot be read (not a regular file)"):
                    read(type(tmp_path)(path))
    assert stat.S_IFMT(os.stat("/dev/full").st_mode) == before
    assert not list(tmp_path.glob("*.part"))


def test_a_symbolic_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    write_json(tmp_path / "real" / "there", {"old": 1})
    for name in ("there", "new"):
        write_json(tmp_path / name, {"new": 2})
        assert (tmp_path / name).is_symlink()
        assert json.loads((tmp_path / "real" / name).read_text()) == {"new": 2}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "a-file").write_text("")
    for path in (tmp_path / "a-file", tmp_path / "a-file" / "x", type(tmp_path)("/proc/none/x")):
        with one_line_error(f"out={path}: cannot be written ("):
            make_folder(path, "out")
    assert (
        make_folder(tmp_path / "a" / "b", "out").is_dir()
        and make_folder(tmp_path / "a", "out").is_dir()
    )


def test_where_this_user_may_not_write_is_said_before(tmp_path, unprivileged):
    folder = unprivileged / "sealed"
    folder.mkdir(mode=0o500)
    with one_line_error(f"--out={folder / 'x'}: cannot be written (no permission for {folder})"):
        destination(folder / "x", "--out")
    with one_line_error(f"out={folder}: cannot be written"):
        make_folder(folder, "out")


def test_a_second_holder_of_a_lock_is_refused(tmp_path):
    with locked(tmp_path / "x.lock", "x"), one_line_error("x: another run is writing to it"):  # noqa: SIM117
        with locked(tmp_path / "x.lock", "x"):
            pass


def test_hashes_are_those_of_the_content(tmp_path, monkeypatch):
    """Large files' are remembered: not beyond a change of the content that leaves size and time
    stamp as they were.
    """
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "REMEMBER_FROM", 0)
    monkeypatch.setattr(kept, "SETTLED", -1.0)
    file = tmp_path / "weights"
    times = (1e9, 1e9)
    for content in (b"a" * 9999, b"b" * 9999):
        file.write_bytes(content)
        os.utime(file, times)
        for _ in range(2):
            assert remembered_sha256(file) == sha256_of(file) == hashlib.sha256(content).hexdigest()
    memos = list((tmp_path / "cache" / "hashes").iterdir())
    assert len(memos) == 2
    for memo in memos:
        memo.write_text("cut sho")  # what is not whole is as good as absent
    assert remembered_sha256(file) == hashlib.sha256(b"b" * 9999).hexdigest()
    monkeypatch.setattr(kept, "sha256_of", lambda file: "read again")
    assert remembered_sha256(file) == hashlib.sha256(b"b" * 9999).hexdigest()
    with one_line_error(tmp_path / "none", "cannot be read"):
        sha256_of(tmp_path / "none")
