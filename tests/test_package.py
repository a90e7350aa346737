"""What is installed, and the first minutes: set-up, what this machine gives, shell completion."""

import os
import pty
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import install
import pytest
from common import let_vanish
from test_embedded import write_wheel

from sdsat.cli import main as cli
from sdsat.engines.native import compiler
from sdsat.interfaces import doctor

ROOT = Path(__file__).parent.parent
NAMES = [
    "sdsat",
    "packages",
    "extras",
    "compiler",
    "instructions",
    "engine",
    "threads",
    "memory",
    "GPU",
    "cache",
]


def test_a_wheel_holds_all_files_of_the_package(monkeypatch):
    """As setuptools reads pyproject.toml; nothing is built, which would take a minute."""
    distribution = pytest.importorskip("setuptools.dist").Distribution()
    monkeypatch.chdir(ROOT)
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    held = {
        Path(folder, name)
        for _, folder, _, names in command.get_data_files_without_manifest()
        for name in names
    }
    files = [file for file in (ROOT / "sdsat").rglob("*") if file.is_file()]
    there = {file for file in files if "__pycache__" not in file.parts}
    packages = {file.parent for file in there if file.name == "__init__.py"}
    assert {ROOT / folder.replace(".", "/") for folder in distribution.packages} >= packages
    assert {file for file in there if file.suffix != ".py"} == {ROOT / file for file in held}
    assert {file.parent for file in there if file.suffix == ".py"} == packages


@pytest.fixture
def findings(monkeypatch, tmp_path):
    """The doctor's findings by name, with an empty cache folder."""
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "cache"))
    return lambda: {finding.name: finding for finding in doctor.examine()}


def test_ten_lines_say_what_this_machine_gives(findings):
    found = findings()
    assert list(found) == NAMES
    assert f"torch {metadata.version('torch')}" in found["packages"].found
    assert not found["packages"].fix and not any(each.needed for each in found.values())
    assert all("\n" not in str(each) for each in found.values())
    assert "no model yet" in found["cache"].found
    assert f"{len(os.sched_getaffinity(0))} processor" in found["threads"].found


def test_what_is_missing_comes_with_a_fix(findings, monkeypatch, tmp_path):
    real = metadata.version
    absent = {"torch", "uvicorn"}

    def version(name):
        if name in absent:
            raise metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "0001" if os.cpu_count() == 1 else "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDSAT_CACHE", str(tmp_path / "file/cache"))
    found = findings()
    assert "missing or of another version: torch, transformers 4.0" in found["packages"].found
    assert "pip install 'torch>=2.11' 'transformers<5.20,>=5.16.1'" in found["packages"].fix
    assert found["packages"].needed
    assert (
        "without serve" in found["extras"].found
        and found["extras"].fix == "pip install 'uvicorn>=0.54'"
    )
    assert "no C++ compiler was found" in found["compiler"].found
    assert "g++" in found["compiler"].fix and "three times slower" in found["engine"].found
    assert "SDSAT_CACHE" in found["cache"].fix


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("4", ""),
        ("4,2", ""),
        ("", ""),
        ("3", "to use them all"),
        ("0", "no number of threads"),
        ("-1", "no number of threads"),
        ("abc", "no number of threads"),
        ("999", "more than there are"),
    ],
)
def test_threads_that_are_not_those_of_the_machine(given, fix, findings, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    found = findings()["threads"]
    assert bool(found.fix) == bool(fix) and fix in found.fix


def test_the_doctor_sees_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.setenv("SDSAT_CACHE", "~no-such-user/cache")
    found = {finding.name: finding for finding in doctor.examine()}
    assert list(found) == NAMES and "set SDSAT_CACHE" in found["cache"].fix


def test_a_compiler_without_openmp_is_none(findings, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'omp.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found = findings()
    assert "omp.h: No such file" in found["compiler"].found
    assert "unset CXX" in found["compiler"].fix  # which is at fault, not that there is none
    assert "three times slower" in found["engine"].found


def test_gpus_that_torch_does_not_use(findings, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'A GPU'\necho 'Another'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    torch = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: torch)
    for built, fix in (("None", "install a torch that is built for CUDA"), ("'13.0'", "")):
        (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {built}\n")
        found = findings()["GPU"]
        assert found.found.startswith("A GPU, Another") and found.fix == fix
        assert found.found.endswith("not used") == bool(fix)


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, None)])
def test_the_exit_code_says_whether_it_can_run(monkeypatch, capsys, needed, code):
    lines = [doctor.Finding("packages", "no torch", "install it", needed)]
    monkeypatch.setattr(doctor, "examine", lambda: lines)
    monkeypatch.setattr(sys, "argv", ["sdsat", "doctor"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (exit_.value.code or None) == code
    assert capsys.readouterr().out == "packages      no torch -> install it\n"


def test_doctor_and_completion_do_without_torch_and_the_hubs_library():
    heavy = "{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    code = "import sys; from sdsat.cli import main; from sdsat.interfaces import doctor"
    command = [sys.executable, "-c", f"{code}; print({heavy})"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_shell_completes_commands_and_options():
    def completed(words, number):
        code = "from sdsat.cli.main import main; main()"
        shell = {"_SDSAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}
        command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'sdsat'; {code}"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **shell}
        )
        return done.stdout.split()

    assert completed("sdsat ver", "1") == ["verify"]
    assert completed("sdsat bench --data", "2") == ["--data-limit", "--dataset"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Two small packages, which are all that pip sees."""
    for number in (1, 2):
        write_wheel(tmp_path, number, b"xy"[number - 1 : number])
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", f"{tmp_path} file:///no/such/folder/"),
        ("CONFIG_FILE", os.devnull),
        ("TARGET", str(tmp_path / "packages")),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    return tmp_path


def test_progress_is_read_from_pips_lines(tmp_path):
    progress = install.Progress()
    assert "0 packages looked at" in progress.shown(tmp_path)
    assert progress.read("Collecting torch==2.13.0 (from -r requirements.txt (line 2))\n") == ""
    line = "  Downloading https://host/torch-2.13.0-cp311-none-any.whl (200.0 MB)\n"
    assert progress.read(line) == "fetching torch-2.13.0-cp311-none-any.whl (200.0 MB)"
    (tmp_path / "pip-unpack").mkdir()
    with (tmp_path / "pip-unpack/torch-2.13.0-cp311-none-any.whl").open("wb") as file:
        file.truncate(50_000_000)
    assert progress.shown(tmp_path).startswith("[######..................] fetching: torch-2.13.0")
    assert progress.read("  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)\n") == ""
    assert progress.read("Installing collected packages: tqdm, torch\n") == "installing 2 packages"
    assert progress.shown(tmp_path) == f"[{'.' * 24}] installing: 0 of 2 packages"


def test_a_folder_that_goes_ends_no_progress(tmp_path, monkeypatch):
    (tmp_path / "pip-unpack-1").mkdir()
    progress = install.Progress()
    progress.read("  Downloading https://host/torch-2.13.0.whl (200.0 MB)\n")
    gone = let_vanish(monkeypatch, "pip-unpack")
    assert f"[{'.' * 24}] fetching: torch" in progress.shown(tmp_path) and gone


def test_packages_are_installed_with_a_line_of_progress(index):
    """On a terminal, where the line ends empty, so that what follows stands alone."""
    mine, its = pty.openpty()
    command = [sys.executable, ROOT / "scripts/install.py", index / "log"]
    process = subprocess.Popen([*command, "sdsat-test-part1", "sdsat-test-part2"], stderr=its)
    os.close(its)
    said = b""
    try:
        while part := os.read(mine, 1 << 16):
            said += part
    except OSError:  # the other end is closed
        pass
    os.close(mine)
    assert process.wait() == 0
    assert (index / "packages/sdsat_test_part2/part.bin").read_bytes() == b"y"
    drawn = said.decode().split("\r\033[K")
    assert any("packages looked at" in line for line in drawn) and drawn[-1] == ""
    assert "WARNING" in (index / "log").read_text()  # of the folder that is not there
    assert not any("WARNING" in line for line in drawn)


def test_what_cannot_be_installed_is_said(index, capfd):
    assert install.main(index / "log", ["sdsat-test-part3"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said and all(line.startswith("ERROR") for line in said)
    log = (index / "log").read_text()
    assert all(line in log for line in said)


def test_pip_that_fails_without_an_error_is_said(index, capfd, monkeypatch):
    """As one that lacks a file of its own: a traceback, whose last line says what is wrong."""
    (index / "pip.py").write_text("raise ModuleNotFoundError('half')")
    monkeypatch.setenv("PYTHONPATH", str(index))
    assert install.main(index / "log", ["sdsat-test-part1"]) == 1
    assert capfd.readouterr().err == "ModuleNotFoundError: half\n"


def test_what_a_killed_installation_leaves_is_taken_away(index, monkeypatch):
    """It fetches into a folder beside the log; a log line is there as soon as pip has said it."""
    source = "import os, pathlib, sys, time; print('Collecting it', flush=True); "
    source += "pathlib.Path(os.environ['TMPDIR'], 'part').touch(); time.sleep(60)"
    (index / "pip.py").write_text(source)
    command = [sys.executable, ROOT / "scripts/install.py", index / "log", "it"]
    monkeypatch.setenv("PYTHONPATH", str(index))
    process = subprocess.Popen(command, start_new_session=True)
    until = time.monotonic() + 20
    while not list(index.glob("log-part-*/part")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(index.glob("log-part-*/part")) and "Collecting it" in (index / "log").read_text()
    (index / "pip.py").write_text("")
    assert install.main(index / "log", ["it"]) == 0
    assert not list(index.glob("log-part-*"))


def has_pip(python):
    """Whether the set-up would go on with this interpreter's environment."""
    script = (ROOT / "scripts/setup.sh").read_text()
    function = re.search(r"^sdsat_has_pip\(\).*?^}", script, flags=re.S | re.M)[0]
    return subprocess.run(["bash", "-c", f"{function}\nsdsat_has_pip {python}"]).returncode == 0


def test_the_set_up_sees_what_was_left_half_installed(tmp_path):
    """A package whose files are not all there is none for pip then, and without pip .venv is made
    anew.
    """
    assert not has_pip(tmp_path / "bin/python")
    venv.create(tmp_path, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": tmp_path}))
    assert not has_pip(tmp_path / "bin/python")
    for name in ("pip-1.dist-info", "whole-1.dist-info", "half-1.dist-info"):
        (packages / name).mkdir()
        (packages / name / "METADATA").touch()
        if name[0] != "h":
            (packages / name / "INSTALLER").write_text("pip\n")
    assert has_pip(tmp_path / "bin/python")
    assert {each.name for each in packages.iterdir()} == {"pip-1.dist-info", "whole-1.dist-info"}
    (packages / "pip-1.dist-info/INSTALLER").unlink()
    assert not has_pip(tmp_path / "bin/python")
