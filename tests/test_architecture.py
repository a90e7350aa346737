"""The folders' order: data flows one way, and no import runs back up or closes a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

from sdsat.config import ALL_STRATEGIES, STRATEGY
from sdsat.decoding.strategies import PLANNERS

ROOT = Path(__file__).parent.parent
# Each floor may import those before it. What stands on one floor may not import from each other.
FLOORS = [
    ("config",),
    ("files",),
    ("cache_folder",),
    ("environment", "figures", "resume"),
    ("method",),
    ("models",),
    ("tasks",),
    ("engines",),
    ("decoding",),
    ("training", "interfaces"),
    ("evaluation",),
    ("cli",),
]
FLOOR = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}
# Where a strategy's name stands for what the strategy does.
TABLES = {"sdsat.config.strategies", "sdsat.decoding.strategies"}
# Words that are compared here and tell no strategies apart: the key `lookup` of an argument, where
# drafts come from, baselines, and whether a name is one at all.
ONLY_NAMES = {
    "sdsat.config.decoding",
    "sdsat.config.strategies",
    "sdsat.decoding.auto_planner",
    "sdsat.decoding.resolve",
    "sdsat.evaluation.quality",
    "sdsat.evaluation.verify",
}
BY_NAME = ("importlib.import_module", "import_module", "__import__")  # calls that import
ENTRANCES = ("sdsat", "sdsat.__main__")  # they hand over to the floor above all, on first use


def sources(root):
    """{module: its source} of the package below `root`."""
    found = {}
    for file in (root / "sdsat").rglob("*.py"):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        found[module.removesuffix(".__init__")] = file.read_text()
    return found


@cache
def nodes(source):
    """Imports, and what can tell names apart, wherever in it; each module is parsed once."""
    kinds = (ast.Import, ast.ImportFrom, ast.Compare, ast.Call, ast.Dict, ast.MatchValue)
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))


def package_of(module, modules):
    """From where its relative imports count: a folder's `__init__` from the folder itself."""
    is_folder = any(other.startswith(f"{module}.") for other in modules)
    return module if is_folder else module.rpartition(".")[0]


def imports(module, source, modules):
    """The package's own modules that a source imports, wherever in it: under TYPE_CHECKING and
    inside functions too.
    """
    package = package_of(module, modules).split(".")
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [(origin, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            names = [(part.value, None) for part in node.args if isinstance(part, ast.Constant)]
        else:
            continue
        for origin, name in names:
            if str(origin).split(".")[0] != "sdsat":
                continue
            inner = f"{origin}.{name}"
            found.add(inner if inner in modules else origin)
    return found


def folder(module):
    return module.split(".")[1] if "." in module else ""


def through_the_top(files):
    """Modules that take something from the package itself, which has all that users import."""
    found = set()
    for module, source in files.items():
        for node in nodes(source) if module not in ENTRANCES else ():
            if isinstance(node, ast.Import):
                wrong = any(alias.name == "sdsat" for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                up = package_of(module, files).count(".") + 1
                top = node.module == "sdsat" or (node.module is None and node.level == up)
                allowed = FLOOR.keys() | {"__version__"}
                wrong = top and any(alias.name not in allowed for alias in node.names)
            else:
                continue
            found |= {module} if wrong else set()
    return sorted(found)


def upward(files):
    """Lines that say which import runs up, or between folders of one floor."""
    lines = []
    for module, source in sorted(files.items()):
        if module in ENTRANCES:
            continue
        for other in sorted(imports(module, source, files)):
            here = folder(module)
            there = folder(other)
            if there and here != there and FLOOR[there] >= FLOOR[here]:
                lines.append(f"{module} imports {other}")
    return lines


def circles(files):
    """Modules that import each other, directly or through others."""
    graph = {
        module: imports(module, source, files) & files.keys()
        for module, source in files.items()
        if module not in ENTRANCES
    }

    def reached(module):
        todo = list(graph[module])
        seen = set()
        while todo:
            other = todo.pop()
            if other not in seen and other in graph:
                seen.add(other)
                todo += graph[other]
        return seen

    return sorted(module for module in graph if module in reached(module))


def test_every_module_stands_on_a_floor():
    assert {folder(module) for module in sources(ROOT) if module not in ENTRANCES} <= FLOOR.keys()


def test_imports_run_down():
    assert upward(sources(ROOT)) == []


@pytest.mark.parametrize(
    "added", ["from sdsat import load\n", "import sdsat\n", "from .. import load\n"]
)
@pytest.mark.parametrize("module", ["sdsat.engines.base", "sdsat.engines"])
def test_nothing_is_taken_from_the_package_itself(added, module):
    files = sources(ROOT)
    assert through_the_top(files) == []
    files[module] += added
    assert through_the_top(files) == [module]


def test_no_imports_close_a_circle():
    assert circles(sources(ROOT)) == []


@pytest.mark.parametrize(
    "added",
    [
        "from sdsat.decoding.loop import Decoder\n",
        "import sdsat.decoding.loop\n",
        "from ..decoding import loop\n",
        "if TYPE_CHECKING:\n    from sdsat.decoding import loop\n",
        "def late():\n    from sdsat.decoding.loop import Decoder\n    return Decoder\n",
        "def late():\n    return importlib.import_module('sdsat.decoding.loop')\n",
    ],
)
@pytest.mark.parametrize("module", ["sdsat.engines.base", "sdsat.engines"])
def test_an_import_that_runs_up_is_found(added, module):
    """The test of the test: wherever it stands, and in whatever form."""
    files = sources(ROOT)
    files[module] += added
    assert upward(files) == [f"{module} imports sdsat.decoding.loop"]
    assert module == "sdsat.engines" or module in circles(files)  # nothing imports the folder


def test_a_circle_within_a_folder_is_found():
    files = sources(ROOT)
    files["sdsat.method.tree"] += "def late():\n    import sdsat.method.layout\n"
    assert circles(files) == ["sdsat.method.layout", "sdsat.method.tree"]


def told_apart(node):
    """What a node compares, matches, looks up or asks for its beginning or end."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.MatchValue):
        return [node.value]
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key]
    of_text = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return node.args if of_text and node.func.attr in ("startswith", "endswith") else []


def names_of_strategies(files):
    """Modules that tell something apart by a strategy's name."""
    names = {*ALL_STRATEGIES} - {"auto"}  # which is a tree, an engine and a dtype too
    found = set()
    for module, source in files.items():
        for node in nodes(source):
            for part in (part for side in told_apart(node) for part in ast.walk(side)):
                # a table's key `lookup` is the setting of this name
                of_table = isinstance(node, ast.Dict) and getattr(part, "value", "") == "lookup"
                name = isinstance(part, ast.Constant) and part.value in names and not of_table
                name = name or (isinstance(part, ast.Name) and part.id == "LOOKUP")
                attribute = isinstance(part, ast.Attribute) and part.attr == "strategy"
                if name or attribute:
                    found.add(module)
    return found


def test_strategies_are_told_apart_in_one_place():
    """Tables of config/strategies.py and decoding/strategies.py say what each does; nobody asks for
    names.
    """
    assert names_of_strategies(sources(ROOT)) <= ONLY_NAMES | TABLES
    assert set(PLANNERS) == set(STRATEGY)


@pytest.mark.parametrize(
    "expression",
    [
        'c.strategy == "one-pass"',
        "c.strategy in NAMES",
        'name in ("two-step", "rounded")',
        'name.startswith("two-step")',
        '{"one-pass": 1, "two-step": 2}[name]',
        "name != LOOKUP",
    ],
)
def test_a_strategy_that_is_told_apart_by_name_is_found(expression):
    added = {"sdsat.decoding.loop": f"def f(c, name):\n    return {expression}\n"}
    assert names_of_strategies(added) == {"sdsat.decoding.loop"}


def test_a_match_of_strategies_is_found():
    added = {"sdsat.decoding.loop": 'match name:\n    case "one-pass":\n        pass\n'}
    assert names_of_strategies(added) == {"sdsat.decoding.loop"}
