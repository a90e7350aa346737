"""Requests about Python functions: to complete, write from words, mend, test or explain one.

Every function answers for itself: its own text seeds the choice of a wording and of the mistake to
find, so the same code makes the same requests wherever it is found.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("complete", "words", "fix", "test", "explain")
FENCE = "```python\n"
_LONGEST = 30  # lines of a function that is shown
_DOCUMENTED = 40  # characters of a docstring that says what to write


@dataclass(frozen=True)
class Request:
    """What a model is asked.

    Attributes:
        text: the user's turn.
        opening: how the model's answer begins.
        name: of the function that it is about, if any.
        code: the request without words, for a model that only continues text; '' for the text and
            the opening.
    """

    text: str
    opening: str = ""
    name: str = ""
    code: str = ""


@dataclass(frozen=True)
class Function:
    """A function with a docstring, as it stands in a file, moved to the left margin.

    code and bare are '' where the body is no more than the docstring, or does not stand below it.

    Attributes:
        name: of the function.
        arguments: their names, without self and cls.
        is_method: whether the first argument is self or cls.
        annotated: whether it has type hints.
        doc: its docstring.
        header: its text to the end of the docstring.
        code: the text before the docstring, first sentence of the docstring and body.
        bare: the code without a docstring.
    """

    name: str
    arguments: tuple[str, ...]
    is_method: bool
    annotated: bool
    doc: str
    header: str
    code: str = ""
    bare: str = ""


def functions(path: Path) -> Iterator[Function]:
    """Yield every function with a docstring in a Python file.

    There is none where it cannot be read as Python.
    """
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(source)))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError, MemoryError):
        return
    lines = source.split("\n")  # these are the lines that ast counts
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield _function(node, doc, lines)


def _function(node: ast.FunctionDef, doc: str, lines: list[str]) -> Function:
    """Make a Function of its syntax tree, its docstring and the lines of the file."""
    where = node.body[0]
    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    names = [argument.arg for argument in every]
    is_method = names[:1] in (["self"], ["cls"])
    header = textwrap.dedent("\n".join(lines[node.lineno - 1 : where.end_lineno])) + "\n"
    annotated = node.returns is not None or any(argument.annotation for argument in every)
    signature = lines[node.lineno - 1 : where.lineno - 1]
    body = lines[where.end_lineno : node.end_lineno]
    said = []
    indent = lines[where.lineno - 1][: where.col_offset]
    if not re.search(r'["\\]', sentence := first_sentence(doc)):
        said = [f'{indent}"""{sentence}"""']
    code = ""
    bare = ""
    if signature and len(node.body) > 1 and not indent.strip():
        code, bare = (
            textwrap.dedent("\n".join(signature + part + body)) + "\n" for part in (said, [])
        )
    fixed = (node.name, tuple(names[is_method:]), is_method, annotated, doc, header)
    return (
        Function(*fixed, code, bare) if _is_python(code) and _is_python(bare) else Function(*fixed)
    )


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError):
        return False


def first_paragraph(doc: str) -> str:
    """Return a docstring's first paragraph in one line, without the marks of reStructuredText."""
    text = " ".join(re.split(r"\n\s*\n", doc.strip(), maxsplit=1)[0].split())
    return re.sub(r"``+", "`", re.sub(r":[a-z:]+:`~?\.?([^`<]+)(?:<[^`]*>)?`", r"`\1`", text))


def first_sentence(doc: str) -> str:
    """Return a docstring's first sentence in one line."""
    return re.split(r"(?<=[a-z0-9)`\]]\.)\s", first_paragraph(doc), maxsplit=1)[0]


def ask(function: Function, kind: str) -> Request | None:
    """Make the request of this kind about a function; None where it does not suit.

    kind: one of KINDS.
    """
    rng = random.Random(f"{kind}\n{function.header}\n{function.code}")
    return _ASKED[kind](function, rng)


def completion(code: str, name: str = "") -> Request:
    """Ask to complete `code`: in a chat turn whose answer opens a code fence.

    A model without chat continues the code. name: of the function, if any.
    """
    return Request(
        f"Complete this Python function.\n{FENCE}{code.rstrip()}\n```", FENCE, name, code
    )


def _complete(function: Function, rng: random.Random) -> Request | None:
    return completion(function.header, function.name) if len(function.doc) >= _DOCUMENTED else None


# Name, arguments and what it does; each fits any function.
_WORDS = (
    "Write a Python function `{name}({arguments})`. {doc}",
    "Write a Python function called {name} that takes {listed}. {doc}",
    "Implement `{name}` in Python. {doc}\n\nIt should take {listed}.",
    "I need a Python function named `{name}` with {listed}. What it should do: {doc}",
    "{doc}\n\nWrite this as a Python function `{name}({arguments})`.",
    (
        "Can you write a function in Python for this?\n\n{doc}\n\nPlease call it {name}; its "
        "input: {listed}."
    ),
    "Give me the code of a Python function with this signature: `def {name}({arguments}):`\n{doc}",
    "How would you write this in Python? {doc}",
    "Python: {doc} Write a function for it.",
    (
        "Please help me with a small task. I want a function {name}({arguments}) in Python "
        "with this description: {doc}"
    ),
    "Create a Python function that does the following: {doc} Name it `{name}`.",
    "Show me how to implement {name} in Python, with {listed}.\nDescription: {doc}",
)
_WISHES = (
    *[""] * 6,
    " Add an example of how to call it.",
    " Handle wrong input.",
    (" Only show the code."),
    (" Use type hints."),
    " Explain briefly how it works.",
    " Use only the standard library.",
    " Keep it short.",
    (" Include a docstring."),
)


def _words(function: Function, rng: random.Random) -> Request | None:
    doc = first_paragraph(function.doc)
    if (
        not _DOCUMENTED <= len(doc) <= 400
        or not doc[0].isalpha()
        or function.is_method
        or function.name.startswith("__")
    ):
        return None
    if re.search(r"deprecat|>>>|:param|^(TODO|See|Alias|Test|Same as)\b", doc, re.IGNORECASE):
        return None
    doc += "" if doc[-1] in ".:;!?" else "."
    marked = [f"`{name}`" for name in function.arguments]
    listed = (
        "no arguments"
        if not marked
        else f"the argument{'s' * (len(marked) > 1)} " + _joined(marked)
    )
    text = rng.choice(_WORDS).format(
        name=function.name, arguments=", ".join(function.arguments), listed=listed, doc=doc
    )
    return Request(text + rng.choice(_WISHES), name=function.name)


def _joined(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


_FIX = (
    "This function has a bug. Find it and fix it.",
    "There is one mistake in this code. What is it, and how is it corrected?",
    "My tests fail for this function. Can you find the error and give me the corrected version?",
    "Fix the bug in this Python function.",
    (
        "Something is wrong with this code: it gives wrong results. Find the mistake and show "
        "the fixed function."
    ),
    "Why doesn't this function work as it should? Please correct it.",
    "Debug this function for me. Say what was wrong.",
    "Please review this function. I think that one line is wrong.",
    "Find the bug:",
    "I changed something in `{name}` and now it is broken. Can you repair it?",
    (
        "The function `{name}` does not do what its description says. Correct it and explain "
        "the change in one sentence."
    ),
    "What's the bug here? Answer with the whole corrected function.",
)
_TEST = (
    "Write pytest tests for this function.",
    "Write unit tests with pytest for `{name}`. Cover the edge cases.",
    "Can you write a few tests for this code?",
    "Which test cases would you write for this function? Give them as pytest code.",
    "Write a unittest.TestCase for the function `{name}`.",
    "I need tests for this function before I change it. Please write them with pytest.",
    "Write three short tests for this Python function.",
    "Write parametrized pytest tests for `{name}`.",
    "Test this function: typical input, empty input and invalid input.",
    "Please add tests for the following code.",
)
# {what to ask: whether the docstring is shown}
_EXPLAIN = {
    "What does this code do?": False,
    "Explain this function step by step.": True,
    "Explain in simple words what `{name}` does.": False,
    "Add a docstring to this function.": False,
    "Write a docstring with parameters and return value for `{name}`.": False,
    "Add type hints to this function.": True,
    "Refactor this function so that it is easier to read.": True,
    "Can this function be made faster? If so, rewrite it.": True,
    "Review this code. What would you improve?": True,
    "Add comments to this code.": True,
    "What does this function return? Give an example of a call and its result.": False,
    "Add error handling for invalid arguments to this function.": True,
    "Rewrite this function in JavaScript.": True,
    "Give better names to the variables of this function.": True,
    "Which errors can this function raise, and when?": True,
    "Summarize what this function does in one sentence.": False,
}


def _shown(function: Function, code: str, question: str, rng: random.Random) -> Request | None:
    """Ask a question about `code`, before it or after it.

    None for code that is too long or has next to nothing in it.

    Args:
        function: that the code is of.
        code: to be shown.
        question: a wording, in which {name} stands for the function's name.
        rng: places the question.
    """
    if not 3 <= code.count("\n") <= _LONGEST or function.name.startswith("__"):
        return None
    question = question.format(name=function.name)
    block = f"{FENCE}{code.rstrip()}\n```"
    after = rng.random() < 0.25 and not question.endswith(":")
    return Request(
        f"{block}\n\n{question}" if after else f"{question}\n{block}", name=function.name
    )


def _fix(function: Function, rng: random.Random) -> Request | None:
    code = with_mistake(function.code, rng)
    return _shown(function, code, rng.choice(_FIX), rng) if code else None


def _test(function: Function, rng: random.Random) -> Request | None:
    return None if function.is_method else _shown(function, function.code, rng.choice(_TEST), rng)


def _explain(function: Function, rng: random.Random) -> Request | None:
    suiting = [
        question for question in _EXPLAIN if not (function.annotated and "type hints" in question)
    ]
    question = rng.choice(suiting)
    return _shown(function, function.code if _EXPLAIN[question] else function.bare, question, rng)


_ASKED = {"complete": _complete, "words": _words, "fix": _fix, "test": _test, "explain": _explain}

_COMPARED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", ("is not")),
    ast.IsNot: ("is not", "is"),
}
_COMPUTED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
}
_Change = tuple[int, int, str]  # from, to, what stands there instead


def with_mistake(code: str, rng: random.Random) -> str:
    """Make one small mistake in one function's code, so that it is another program.

    A comparison, an operator or a number is off by one step, `and` stands for `or`, a `not` or a
    `return` is lost, or a variable stands for another one. Returns '' where none of these can be
    made.
    """
    if not code or not code.isascii():  # ast's columns are bytes
        return ""
    tree = ast.parse(code)
    starts = [0]
    for line in code.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    kinds = _changes(code, tree, starts)
    while kinds:  # each kind of mistake is as likely as another
        made = kinds.pop(rng.randrange(len(kinds)))
        begin, end, instead = made[rng.randrange(len(made))]
        wrong = code[:begin] + instead + code[end:]
        if _is_python(wrong) and ast.dump(ast.parse(wrong)) != ast.dump(tree):
            return wrong
    return ""


def _changes(code: str, tree: ast.AST, starts: list[int]) -> list[list[_Change]]:
    """List the mistakes that can be made, one list a kind.

    starts: where each line of the code starts.
    """
    made: dict[str, list[_Change]] = {}

    def begin(node: ast.expr | ast.stmt) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.end_lineno - 1] + node.end_col_offset

    def between(kind: str, left: ast.expr, right: ast.expr, right_way: str, wrong_way: str) -> None:
        gap = code[end(left) : begin(right)]
        pattern = r"\s+".join(re.escape(word) for word in right_way.split())
        if "#" not in gap and (found := re.search(pattern, gap)):
            made.setdefault(kind, []).append(
                (end(left) + found.start(), end(left) + found.end(), wrong_way)
            )

    (function,) = (node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.FunctionDef))
    arguments = [
        argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")
    ]
    for node in (inner for statement in function.body for inner in ast.walk(statement)):
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
                between("comparison", left, right, *_COMPARED[type(op)])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED and not (
                _is_text(left) or _is_text(right)
            ):
                between("operator", left, right, *_COMPUTED[type(op)])
            case ast.AugAssign(target=target, op=ast.Add() | ast.Sub() as op, value=value):
                between(
                    "operator",
                    target,
                    value,
                    *(("+=", "-=") if isinstance(op, ast.Add) else ("-=", "+=")),
                )
            case ast.BoolOp(op=op, values=[left, right, *_]):
                between(
                    "connective",
                    left,
                    right,
                    *(("and", "or") if isinstance(op, ast.And) else ("or", "and")),
                )
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                made.setdefault("not", []).append((begin(node), begin(operand), ""))
            case ast.Constant(value=int(value)) if not isinstance(value, bool) and 0 <= value <= 10:
                made.setdefault("number", []).append((begin(node), end(node), str(value + 1)))
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                made.setdefault("return", []).append((begin(node), begin(value), ""))
            case ast.Name(id=name, ctx=ast.Load()) if name in arguments:
                made.setdefault("variable", []).extend(
                    (begin(node), end(node), other) for other in arguments if other != name
                )
    return [changes for changes in made.values() if changes]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
