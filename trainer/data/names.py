"""`asset:stdlib` as words with tags: names that the running Python's standard library defines and imports, found by `ast` and `tokenize`.

A sentence is a logical line, its words are Python's tokens. FUNCTION, CLASS and ARGUMENT are names where they are defined; MODULE what is
imported, of several words where it is dotted. Real text: nothing is made up, lines with blanks inside strings are left out.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from trainer.data.assets import stdlib_files
from trainer.data.batches import permutation
from trainer.data.made import made_once

MOST_WITH, MOST_WITHOUT = 24, 6
"""Lines of a file with names and without any: about 20,000 in all, none of which is much of one file."""
MOST_WORDS = 60
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
DOCUMENT = "-DOCSTART-"

Line = list[tuple[str, str]]
"""(word, tag) of each word."""
Place = tuple[int, int]
"""Line and column, as `ast` and `tokenize` count them."""


def names_file() -> Path:
    """A CoNLL file, made at first use in some 10 s. Any number of processes may call it. DataError for a full disk."""

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as out:
            for number, source in enumerate(stdlib_files()):
                out.writelines(conll_lines(chosen(list(lines_of(source)), number)))

    return made_once("stdlib-names-{}.{}.{}.conll".format(*sys.version_info), write)


def conll_lines(lines: list[Line]) -> Iterator[str]:
    """A document of a CoNLL file; nothing for one without a line."""
    if lines:
        yield f"{DOCUMENT}\tO\n\n"
    for line in lines:
        yield "".join(f"{word}\t{tag}\n" for word, tag in line) + "\n"


def chosen(lines: list[Line], number: int) -> list[Line]:
    """Some lines of a file, in their order, each text once."""
    lines = [list(line) for line in dict.fromkeys(tuple(line) for line in lines)]
    kept: list[int] = []
    for most, has_name in ((MOST_WITH, True), (MOST_WITHOUT, False)):
        places = [place for place, line in enumerate(lines) if any(tag != "O" for _, tag in line) == has_name]
        kept += [places[place] for place in permutation(len(places), number, has_name)[:most]]
    return [lines[place] for place in sorted(kept)]


def lines_of(file: Path) -> Iterator[Line]:
    """The logical lines of a file that parses, with tags."""
    source = file.read_text(encoding="utf-8")
    try:
        tags = places_of(ast.parse(source))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):  # the standard library ships broken files as test data
        return
    line: list[tokenize.TokenInfo] = []
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            if 3 <= len(line) <= MOST_WORDS and not any(set(" \t\n\f") & set(one.string) for one in line):
                yield tagged(line, tags)
            line = []
        elif token.type not in SKIPPED and token.string:
            line.append(token)


def places_of(tree: ast.AST) -> dict[Place, str]:
    """Where names of arguments and imported modules begin."""
    found: dict[Place, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "ARGUMENT"
        elif isinstance(node, ast.Import):
            found |= {(name.lineno, name.col_offset): "MODULE" for name in node.names}
    return found


def tagged(line: list[tokenize.TokenInfo], tags: dict[Place, str]) -> Line:
    """The words of a line with their tags. ast counts columns in bytes, tokenize in characters."""
    found: Line = []
    before, kind, goes_on = "", "", False
    for token in line:
        is_name = token.type == tokenize.NAME
        column = len(token.line[: token.start[1]].encode())
        if is_name and before in ("def", "class"):
            kind, begins = "FUNCTION" if before == "def" else "CLASS", True
        elif is_name and before == "from" and line[0].string == "from":
            kind, begins = "MODULE", True
        else:
            kind = tags.get((token.start[0], column), "") if not goes_on else kind
            begins = bool(kind) and not goes_on
        goes_on_here = goes_on and (is_name or token.string == ".")
        found.append((token.string, f"B-{kind}" if begins else f"I-{kind}" if goes_on_here else "O"))
        goes_on = kind == "MODULE" and (begins or goes_on_here) and follows_dot(line, token)
        before = token.string
    return found


def follows_dot(line: list[tokenize.TokenInfo], token: tokenize.TokenInfo) -> bool:
    """Whether a dotted name goes on behind this token: a dot behind a name, or a name behind a dot."""
    place = next(number for number, one in enumerate(line) if one is token) + 1
    if place == len(line):
        return False
    following = line[place]
    if token.string == ".":
        return following.type == tokenize.NAME and following.string != "import"
    return following.string == "."
