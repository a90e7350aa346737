"""What dev/measure_code.py says of a tree, on one that is easy to count by hand."""

import subprocess
import sys
from pathlib import Path, PurePosixPath

import measure_code
import pytest

TREE = {
    "sdsat/config.py": "A = 1\n",
    "sdsat/method/tree.py": "from sdsat.config import A, B\n\ndef short():\n    return A\n",
    "sdsat/method/walk.py": "def long():\n    from .tree import short\n\n    return short()\n",
    "sdsat/engines/base.py": (
        "from typing import TYPE_CHECKING\n\nimport torch\n\nfrom ..method import tree, walk\n"
        "if TYPE_CHECKING:\n    from sdsat.engines.fast import Fast\n"
    ),
    "sdsat/engines/fast.py": "from sdsat.engines.base import Base\nfrom sdsat.config import A\n",
    "sdsat/engines/kernel.cpp": "int x;\n" * 9,
    "tests/test_tree.py": "x" * 101 + "\n" + "y" * 100 + "\n",
}
FILES = {PurePosixPath(name): text for name, text in TREE.items()}


def test_lengths():
    assert measure_code.longest_function(FILES) == (4, "`walk.long`")
    assert measure_code.longest_module(FILES) == (9, "`kernel.cpp`")
    assert measure_code.long_lines(FILES) == 1


def test_imports_are_found_wherever_they_stand():
    """Across folders: A and B for method; the modules tree and walk, and A, for engines."""
    assert measure_code.names_across(FILES) == 5
    assert ("sdsat.method.walk", "sdsat.method.tree", "short") in set(measure_code.imports(FILES))


@pytest.mark.parametrize(("back", "size"), [("", 2), ("from sdsat.engines import fast\n", 4)])
def test_circles(back, size):
    """base and fast, the latter for types only; then through method too: tree, walk, base, fast."""
    tree = PurePosixPath("sdsat/method/tree.py")
    assert measure_code.largest_circle({**FILES, tree: FILES[tree] + back}) == size


@pytest.mark.skipif(not (measure_code.ROOT / ".git").exists(), reason="asks git for the files")
def test_the_table_of_this_tree():
    script = Path(measure_code.__file__)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(rows) == 7 and all(len(row) == 2 for row in rows)
