"""`asset:stdlib` as questions: what functions and classes of the running Python's standard library say of themselves, found by `ast`.

Answers are exact stretches of real source. Every context is a stretch of one file, and no two overlap.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.assets import stdlib_files
from trainer.data.batches import permutation, random_words
from trainer.data.made import made_once

NUM_QUESTIONS = 8_000
SHORTEST, LONGEST = 1_000, 3_000
"""Characters of a context."""
MOST_OF_FILE, MOST_OF_CONTEXT = 80, 8
"""Questions, so that no file and no context is most of the data."""
LONGEST_ANSWER = 60
"""Characters."""
ALIKE = {"test", "tests", "idle_test", "encodings"}
"""Folders that are left out: their files say the same thing over and over."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A question with the places of what it names and of its answer, in characters of the file."""

    question: str
    name: str
    """Of the function or class; defined once in the context."""
    defined_at: int
    start: int
    end: int


def question_file() -> Path:
    """A JSONL file of {"title", "context", "question", "answers"}, made at first use in 10 s. DataError for a full disk.

    Any number of processes may call it. The title is the file within the library.
    """

    def write(file: Path) -> None:
        lines = [json.dumps(row) for row in chosen_rows(stdlib_files())]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return made_once("stdlib-questions-{}.{}.{}.jsonl".format(*sys.version_info), write)


def chosen_rows(files: list[Path]) -> list[dict[str, object]]:
    """NUM_QUESTIONS of the questions of these files, in their order; a context that two files share is taken once."""
    rows: list[dict[str, object]] = []
    seen: set[object] = set()
    for file in files:
        if ALIKE & set(file.parts):
            continue
        of_file = [row for row in rows_of_file(file) if row["context"] not in seen]
        seen |= {row["context"] for row in of_file}
        rows += [of_file[place] for place in sorted(permutation(len(of_file), len(seen))[:MOST_OF_FILE])]
    return [rows[place] for place in sorted(permutation(len(rows), 0)[:NUM_QUESTIONS])]


def rows_of_file(file: Path) -> Iterator[dict[str, object]]:
    """The questions of a file that parses, context after context."""
    text = file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # the standard library ships broken files as test data
        return
    found = list(questions_of(tree, Places(text)))
    for first, last in stretches(text):
        context = text[first:last]
        inside = [one for one in found if first <= min(one.defined_at, one.start) and one.end <= last]
        clear = [one for one in inside if len(re.findall(rf"\b(?:def|class)\s+{one.name}\b", context)) == 1]
        for place in sorted(permutation(len(clear), first)[:MOST_OF_CONTEXT]):
            one = clear[place]
            answer = {"text": [text[one.start : one.end]], "answer_start": [one.start - first]}
            title = "/".join(file.parts[-2:])
            yield {"title": title, "context": context, "question": one.question, "answers": answer}


class Places:
    """Characters of a text for ast's places, which are lines and UTF-8 bytes."""

    def __init__(self, text: str) -> None:
        self.text, self.lines, self.starts = text, text.split("\n"), [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def at(self, line: int, column: int) -> int:
        """line from 1; column in bytes, from 0."""
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)

    def span(self, first: ast.expr, last: ast.expr) -> tuple[int, int]:
        """First and last + 1 character of expressions that stand side by side."""
        assert last.end_lineno is not None and last.end_col_offset is not None
        return self.at(first.lineno, first.col_offset), self.at(last.end_lineno, last.end_col_offset)


def stretches(text: str) -> Iterator[tuple[int, int]]:
    """(first, last + 1) character of the contexts: whole lines, ending where a blank line follows where there is one."""
    ends = [match.end() for match in re.finditer("\n", text)]
    blank = {match.start() + 1 for match in re.finditer(r"\n[ \t]*\n", text)}
    lengths = SHORTEST + random_words(len(text) // SHORTEST + 1, len(text)) % (LONGEST - SHORTEST)
    first = number = 0
    while len(text) - first >= SHORTEST:
        limit = first + int(lengths[number])
        fitting = [end for end in ends if first + SHORTEST // 2 < end <= limit]
        if not fitting:  # a line longer than a context
            return
        last = max([end for end in fitting if end in blank], default=fitting[-1])
        if last - first >= SHORTEST:
            yield first, last
        first, number = last, number + 1


def questions_of(tree: ast.AST, places: Places) -> Iterator[Found]:
    """Every question whose answer is one short line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.bases:
            named = [(f"What does class {node.name} inherit from?", node.bases[0], node.bases[-1])]
        elif isinstance(node, Function):
            named = [(question, answer, answer) for question, answer in questions_of_function(node)]
        else:
            continue
        for question, first, last in named:
            start, end = places.span(first, last)
            answer = places.text[start:end]
            if "\n" not in answer and len(answer) <= LONGEST_ANSWER and re.search(r"[A-Za-z]{2}|\d", answer):
                yield Found(question, node.name, places.at(node.lineno, node.col_offset), start, end)


def questions_of_function(node: Function) -> Iterator[tuple[str, ast.expr]]:
    """Questions and the expressions that answer them. A default of None is not asked for: half of all are."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*zip(positional[::-1], arguments.defaults[::-1], strict=False)][::-1]
    defaults += [pair for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if pair[1] is not None]  # type: ignore[misc]
    for argument, default in defaults:
        if not (isinstance(default, ast.Constant) and default.value is None):
            yield f"What is the default of argument {argument.arg} of {node.name}?", default
    inside = list(own_statements(node))
    returned = [one.value for one in inside if isinstance(one, ast.Return) and one.value is not None]
    if len(returned) == 1:
        yield f"What does {node.name} return?", returned[0]
    raised = [one.exc for one in inside if isinstance(one, ast.Raise) and one.exc is not None]
    if len(raised) == 1:
        exception = raised[0].func if isinstance(raised[0], ast.Call) else raised[0]
        yield f"Which exception does {node.name} raise?", exception


def own_statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a function is called, without the functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield from own_statements(child)
