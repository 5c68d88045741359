"""`asset:stdlib` as pairs: functions of the running Python's standard library, and the docstrings their authors wrote."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.data.assets import stdlib_files
from trainer.data.made import made_once

INSTRUCTION = "Write the docstring of this Python function.\n\n"
INSIDE = re.compile(r"^\s+(?:async def|def|class) ", re.MULTILINE)
"""A function or class inside a function."""


def docstring_file() -> Path:
    """A JSONL file of {"prompt", "response"}, made at first use in 10 s. Any number of processes may call it. DataError for a full disk.

    Holds every function that has a docstring and a body beside it, in the order of files.
    """

    def write(file: Path) -> None:
        pairs = [pair for source in stdlib_files() for pair in pairs_of_file(source)]
        lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in pairs]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return made_once("stdlib-docstrings-2-{}.{}.{}.jsonl".format(*sys.version_info), write)


def stdlib_summaries() -> list[tuple[str, str]]:
    """(function, first line of its docstring), in the order of files.

    Without lines that say nothing (a doctest, no letter), and without functions that hold another one's docstring: on two sides of a split
    they would tell each other's answer.
    """
    pairs = [json.loads(line) for line in docstring_file().read_text(encoding="utf-8").split("\n") if line]
    found = []
    for pair in pairs:
        source, summary = pair["prompt"].removeprefix(INSTRUCTION), pair["response"].splitlines()[0].strip()
        says_something = not summary.startswith(">>>") and any(map(str.isalpha, summary))
        if says_something and not (INSIDE.search(source) and holds_docstring(source)):
            found.append((source, summary))
    return found


def holds_docstring(source: str) -> bool:
    """Whether a function or class inside a function has one; True where the source does not parse alone."""
    try:
        (outer,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        return True
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(ast.get_docstring(node) for node in ast.walk(outer) if node is not outer and isinstance(node, kinds))


def pairs_of_file(file: Path) -> Iterator[tuple[str, str]]:
    """(prompt, response) of each function of a file that parses."""
    source = file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the standard library ships broken files as test data
        return
    lines = source.split("\n")  # as ast counts them: splitlines also cuts at form feeds
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip():
                yield INSTRUCTION + without_docstring(lines, node), docstring.strip()


def without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's source, unindented, without the lines of its docstring."""
    first = node.body[0]
    end = node.end_lineno or node.lineno
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or first.lineno : end]]
    return inspect.cleandoc("\n".join(["", *kept]))
