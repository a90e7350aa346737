"""Install packages with one line of progress; scripts/setup.sh runs it with nothing installed.

    python scripts/install.py LOG -r requirements.txt

Arguments after LOG are those of `pip install`. What pip says goes to LOG, and its errors here too.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

SECONDS = 0.2  # between two looks
WIDTH = 24
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
LARGE = 20e6  # bytes of a file that is worth a line where there is no terminal


class Progress:
    """What pip is at, as far as its lines tell.

    Attributes:
        names: packages that were looked at.
        file: the name of the file that is fetched, '' for none.
        size: its bytes.
        total: how many packages are installed at the end; 0 until that begins.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.file = ""
        self.size = 0.0
        self.total = 0
        self.before = 0

    def read(self, line: str) -> str:
        """Take in a line of pip; returns what to say where there is no terminal."""
        if found := re.match(r"\s*Collecting ([\w.-]+)", line):
            self.names.add(found[1])
            self.file = ""
        elif found := re.match(r"\s*Downloading (\S+) \(([\d.]+) (kB|MB|GB)\)", line):
            self.file = found[1].rpartition("/")[2]
            self.size = float(found[2]) * BYTES[found[3]]
            return f"fetching {self.file} ({found[2]} {found[3]})" if self.size > LARGE else ""
        elif line.startswith("Installing collected packages: "):
            self.before = installed()
            self.total = len(line.split(", "))
            self.file = ""
            return f"installing {self.total} packages"
        return ""

    def shown(self, temporary: Path) -> str:
        """Write the line of a terminal; files lie in `temporary` while they are fetched."""
        if self.total:
            done = min(installed() - self.before, self.total)
            return f"{bar(done / self.total)} installing: {done} of {self.total} packages"
        if not self.file:
            return f"{bar(0)} fetching: {len(self.names)} packages looked at"
        # os.walk passes over folders that pip has taken away, unlike rglob.
        places = [parent for parent, _, names in os.walk(temporary) if self.file in names]
        held = sum(size_of(Path(parent, self.file)) for parent in places)
        share = min(held / self.size, 1)
        return f"{bar(share)} fetching: {self.file}, {self.size / 1e6:.1f} MB"


def bar(share: float) -> str:
    done = int(share * WIDTH)
    return f"[{'#' * done}{'.' * (WIDTH - done)}]"


def installed() -> int:
    return sum(1 for _ in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has moved it away
        return 0


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def draw(progress: Progress, temporary: Path, ended: threading.Event) -> None:
    """Draw the line over and over, until the end."""
    columns = (os.get_terminal_size(2).columns or 80) - len("setup: ") - 1
    while not ended.wait(SECONDS):
        line = progress.shown(temporary)[: max(columns, 0)]
        print(f"\r\033[Ksetup: {line}", end="", file=sys.stderr, flush=True)
    print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(log: Path, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--root-user-action=ignore", "--no-input", "--progress-bar=off", *arguments]
    progress = Progress()
    terminal = sys.stderr.isatty()
    ended = threading.Event()
    for left in log.parent.glob(f"{log.stem}-part-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=f"{log.stem}-part-", dir=log.parent) as temporary,
        log.open("a", buffering=1) as kept,
    ):
        drawing = threading.Thread(target=draw, args=(progress, Path(temporary), ended))
        if terminal:
            drawing.start()
        errors = []
        line = ""
        try:
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "TMPDIR": temporary},
            ) as pip:
                assert pip.stdout is not None
                for line in pip.stdout:
                    kept.write(line)
                    errors += [line.rstrip()] if line.lower().startswith("error") else []
                    if (said := progress.read(line)) and not terminal:
                        say(said)
        except KeyboardInterrupt:
            say("interrupted; the same command goes on with what was fetched")
            return 130
        finally:
            ended.set()
            if terminal:
                drawing.join()
    if pip.returncode and not errors:
        errors = [line.rstrip() or f"pip ended with {pip.returncode}"]
    for error in errors:
        print(error, file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
