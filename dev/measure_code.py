"""How the code is built, in figures: of the working tree, and of commits beside it.

    python dev/measure_code.py [COMMIT ...]

Prints a table with a column for each. Functions, modules and imports are those of the package,
lines over 100 columns those of every Python, C++ and shell file. A name counts as imported across
folders where it comes from another part of the package: another folder of sdsat/, or a module that
lies beside the folders.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
PACKAGE = "sdsat"
CODE = (".py", ".cpp", ".h", ".sh")
COLUMNS = 100
# They hand over to the floor above all, on first use (tests/test_architecture.py).
ENTRANCES = ("sdsat", "sdsat.__main__")
Files = dict[PurePosixPath, str]


def working_tree() -> Files:
    """{path: text} of the code files that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    paths = [PurePosixPath(line) for line in listed.stdout.splitlines()]
    held = [path for path in paths if path.suffix in CODE and (ROOT / path).is_file()]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in held}


def committed(commit: str) -> Files:
    """{path: text} of the code files of a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and PurePosixPath(member.name).suffix in CODE:
                files[PurePosixPath(member.name)] = content.read().decode()
    return files


def in_package(files: Files, suffixes: tuple[str, ...] = (".py",)) -> Files:
    return {
        path: text
        for path, text in files.items()
        if path.parts[0] == PACKAGE and path.suffix in suffixes
    }


def longest_function(files: Files) -> tuple[int, str]:
    """(lines, where) of the longest Python function."""
    found = [
        (node.end_lineno - node.lineno + 1, f"`{path.stem}.{node.name}`")
        for path, text in in_package(files).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    return max(found)


def longest_module(files: Files) -> tuple[int, str]:
    """(lines, which) of the longest source file."""
    modules = in_package(files, (".py", ".cpp", ".h"))
    return max((len(text.splitlines()), f"`{path.name}`") for path, text in modules.items())


def imports(files: Files) -> Iterator[tuple[str, str, str]]:
    """(importing module, imported module, name) for every name that a module of the package takes
    from another, wherever the import stands.
    """
    names = {name_of(path): path for path in in_package(files)}
    for module, path in names.items():
        if module in ENTRANCES:
            continue
        parts = module.split(".")
        package = parts if path.name == "__init__.py" else parts[:-1]
        for node in ast.walk(ast.parse(files[path])):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in names:
                        yield module, alias.name, alias.name
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    whole = f"{source}.{alias.name}"
                    target = whole if whole in names else source
                    if target in names and target != module:
                        yield module, target, alias.name


def name_of(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The folder of the package that a module lies in, or the module itself beside the folders."""
    return ".".join(module.split(".")[:2])


def names_across(files: Files) -> int:
    """How many names are imported across folders, each counted once a folder that imports it."""
    found = {
        (part_of(module), target, name)
        for module, target, name in imports(files)
        if part_of(module) != part_of(target)
    }
    return len(found)


def largest_circle(files: Files) -> int:
    """The most modules that all reach each other by imports; 1 where there is no circle."""
    after: dict[str, set[str]] = {}
    for module, target, _ in imports(files):
        after.setdefault(module, set()).add(target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for module in after.get(left.pop(), set()) - seen:
                seen.add(module)
                left.append(module)
        return seen

    reach = {module: reached(module) for module in after}
    circles = [
        sum(module in reach.get(other, ()) for other in found if other != module) + 1
        for module, found in reach.items()
        if module in found
    ]
    return max(circles, default=1)


def long_lines(files: Files) -> int:
    return sum(len(line) > COLUMNS for text in files.values() for line in text.splitlines())


def main() -> None:
    """Print the table."""
    trees = {commit: committed(commit) for commit in sys.argv[1:]} | {"now": working_tree()}
    figures = {
        "longest function, lines": lambda files: "{} ({})".format(*longest_function(files)),
        "longest module, lines": lambda files: "{} ({})".format(*longest_module(files)),
        "names imported across folders": names_across,
        "modules in the largest circle of imports": largest_circle,
        f"lines over {COLUMNS} columns": long_lines,
    }
    print(f"| | {' | '.join(trees)} |")
    print(f"| --- {'| --- ' * len(trees)}|")
    for name, measure in figures.items():
        print(f"| {name} | {' | '.join(str(measure(files)) for files in trees.values())} |")


if __name__ == "__main__":
    main()
