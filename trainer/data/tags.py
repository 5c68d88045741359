"""Words with tags: read, checked, split. Needs neither torch nor a tokenizer.

Place in the flow: trainer/resolve looks for mistakes here before anything is launched; trainer/data/tagged.py makes tokens of it.
Invariant: every sentence that is given on has a tag for each word, and tags that follow each other as BIO asks.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import TagData
from trainer.data.batches import permutation
from trainer.data.names import DOCUMENT, names_file
from trainer.data.sources import check_path, is_hub_id, load_hub
from trainer.data.tables import read_file, surrogate_problem
from trainer.errors import DataError

CONLL = (".conll", ".bio", ".iob", ".txt")
MOST_SHOWN = 5
"""Mistakes of a source that are listed."""
NO_ENTITY = "O"


@dataclass(frozen=True)
class Sentence:
    """Words with a tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    group: int
    """Sentences of one document stay on one side of the split."""
    places: tuple[str, ...] = ()
    """Of each word, for messages; one of the whole row stands for all."""


@dataclass(frozen=True)
class RawTags:
    """What a run learns and is tested on, before there are tokens."""

    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence] | None
    tag_names: tuple[str, ...]
    """O, then B-X and I-X of every type, in the order of class ids."""
    sources: tuple[str, ...]
    """Where they came from, for the screen."""


def read_tags(data: TagData) -> RawTags:
    """Read, check and split. DataError names place, rule and fix of what is wrong, of all sources at once."""
    found: dict[str, list[Sentence]] = {}
    problems: list[str] = []
    for setting, name in (("source", data.source), ("validation", data.validation), ("test", data.test)):
        try:
            if name is not None:
                found[setting] = read_named(data, f"data.{setting}", name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    types = data.labels or tuple(sorted({tag[2:] for one in found["source"] for tag in one.tags if tag != NO_ENTITY}))
    if not types:
        raise DataError(
            f"data.source ({data.source}): all of its tags are O, and there is nothing to find; give tags such as B-NAME"
        )
    for setting, sentences in found.items():
        check_types(sentences, types, f"data.{setting} ({getattr(data, setting)})")
    parts, words = split(found, data)
    names = (NO_ENTITY, *(f"{prefix}-{kind}" for kind in types for prefix in ("B", "I")))
    shown = f"{data.source}, {len(found['source']):,} sentences; entities: {', '.join(types)}"
    return RawTags(parts["source"], parts["validation"], parts.get("test"), names, (shown, words))


def read_named(data: TagData, setting: str, name: str) -> list[Sentence]:
    """The sentences of a source or a named split."""
    path = Path(name).expanduser()
    if name == "asset:stdlib":
        sentences = read_conll(names_file(), data, setting)
    elif name.startswith("asset:"):
        raise DataError(f"{setting} ({name}): no such sentences with tags; there is asset:stdlib")
    elif path.suffix.lower() in CONLL:
        sentences = read_conll(check_path(name, setting), data, setting)
    elif path.suffix.lower() in (".jsonl", ".parquet") or os.path.exists(path):
        table = read_file(check_path(name, setting), {"data.words": data.words, "data.tags": data.tags})
        if table.malformed:
            raise DataError(f"{table.place(table.malformed[0].line)}: {table.malformed[0].reason}; correct it")
        sentences = rows_of(
            table.columns[data.words],
            table.columns[data.tags],
            [table.place(line) for line in table.lines],
            setting=setting,
        )
    elif is_hub_id(data.source):
        sentences = read_hub(data, setting, "train" if setting == "data.source" else name)
    else:
        raise DataError(
            f"{setting} ({name}): there is no such file; give one that exists, or a hub dataset as data.source"
        )
    problems = [problem for sentence in sentences for problem in bio_problems(sentence)]
    if problems:
        raise DataError(listed(setting, name, problems))
    if not sentences:
        raise DataError(f"{setting} ({name}) holds no sentence")
    return sentences


def read_conll(file: Path, data: TagData, setting: str) -> list[Sentence]:
    """Sentences of a CoNLL file; a line -DOCSTART- begins a document. DataError for lines with other columns than the first."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a text file in UTF-8") from None
    sentences: list[Sentence] = []
    words: list[tuple[str, str, str]] = []
    problems: list[str] = []
    columns, document, has_documents = 0, 0, False
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        cells = line.split("\t") if "\t" in line else line.split()
        if line.strip() and not line.startswith(DOCUMENT):
            columns = columns or checked_columns(len(cells), data, f"{file}:{number}")
            if len(cells) < 2 or len(cells) != columns:
                problems.append(
                    f"{file}:{number}: {len(cells)} columns, and the first line has {columns}; each line needs word and tag"
                )
            else:
                words.append((cells[data.word_column].strip(), cells[data.tag_column].strip(), f"{file}:{number}"))
            continue
        if words:
            texts, tags, places = zip(*words, strict=True)
            sentences.append(Sentence(texts, tags, document if has_documents else len(sentences), places))
            words = []
        if line.startswith(DOCUMENT):
            document, has_documents = document + 1, True
    if problems:
        raise DataError(listed(setting, str(file), problems))
    return sentences


def checked_columns(count: int, data: TagData, place: str) -> int:
    """The columns of a CoNLL file by its first line. DataError where word or tag would be read from none of them, or from the same."""
    for name, column in (("word_column", data.word_column), ("tag_column", data.tag_column)):
        if count > 1 and not -count <= column < count:
            raise DataError(f"data.{name} ({column}): {place} has {count} columns, 0 to {count - 1}; name one of them")
    if count > 1 and data.word_column % count == data.tag_column % count:
        raise DataError(
            f"data.tag_column ({data.tag_column}) is the column of the words at {place}, which has {count}; name another"
        )
    return count


def rows_of(
    words: Sequence[object],
    tags: Sequence[object],
    places: Sequence[str],
    *,
    setting: str,
    names: Sequence[str] | None = None,
) -> list[Sentence]:
    """Sentences of two columns of lists. setting: that names them. names: of class ids."""
    problems, sentences = [], []
    for number, (one, other, place) in enumerate(zip(words, tags, places, strict=True)):
        if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other) or not one:
            sizes = " and ".join(
                str(len(cell)) if isinstance(cell, list) else type(cell).__name__ for cell in (one, other)
            )
            problems.append(f"{place}: words and tags must be lists of one length, not {sizes}; correct them")
            continue
        if problem := row_problem(one, other, names):
            problems.append(f"{place}: {problem}")
            continue
        named = other if names is None else [names[tag] for tag in other]
        sentences.append(Sentence(tuple(one), tuple(named), number, (place,) * len(one)))
    if problems:
        raise DataError(listed(setting, "its rows", problems))
    return sentences


def row_problem(words: Sequence[object], tags: Sequence[object], names: Sequence[str] | None) -> str:
    """What is wrong with the words and the tags of a row, which are names or, of `names`, class ids; "" if nothing is."""
    for word in words:
        if not isinstance(word, str):
            return f"words must be text, not {word!r:.40}; write them as text"
        if problem := surrogate_problem(word):
            return f"a word {problem}; correct it"
    for tag in tags:
        if names is None and not isinstance(tag, str):
            return "tags must be names such as B-PERSON, not class ids; write the names"
        if names is not None and not (isinstance(tag, int) and 0 <= tag < len(names)):
            return f"tags must be class ids, 0 to {len(names) - 1}, not {tag!r:.40}; correct them, or leave the row out"
    return ""


def read_hub(data: TagData, setting: str, name: str) -> list[Sentence]:
    """Sentences of a split of a hub dataset, whose tags may be class ids."""
    from trainer.data.tables import check_columns

    dataset = load_hub(data.source, data.subset, name, setting)
    check_columns(f"{data.source}[{name}]", dataset.column_names, {"data.words": data.words, "data.tags": data.tags})
    names = getattr(getattr(dataset.features[data.tags], "feature", None), "names", None)
    places = [f"{data.source}[{name}] row {row}" for row in range(1, len(dataset) + 1)]
    return rows_of(dataset[data.words][:], dataset[data.tags][:], places, setting=setting, names=names)


def bio_problems(sentence: Sentence) -> list[str]:
    """What is wrong with the words and tags of a sentence."""
    problems, before = [], NO_ENTITY
    for word, tag, place in zip(sentence.words, sentence.tags, sentence.places, strict=True):
        prefix, _, kind = tag.partition("-")
        if not word:
            problems.append(f"{place}: an empty word; leave the line out")
        elif tag != NO_ENTITY and (prefix not in ("B", "I") or not kind):
            problems.append(
                f"{place}: tag {tag!r} of {word!r:.40} must be O, B-TYPE or I-TYPE; convert the tags to BIO"
            )
        elif prefix == "I" and before not in (f"B-{kind}", f"I-{kind}"):
            problems.append(f"{place}: {tag} of {word!r:.40} follows {before}; an entity begins with B-{kind}")
        before = tag
    return problems


def check_types(sentences: Sequence[Sentence], types: Sequence[str], where: str) -> None:
    """DataError for entities of a type that is not among the labels."""
    known = {NO_ENTITY, *(f"{prefix}-{kind}" for kind in types for prefix in ("B", "I"))}
    for sentence in sentences:
        for tag, place in zip(sentence.tags, sentence.places, strict=True):
            if tag not in known:
                raise DataError(
                    f"{where}: {place}: {tag} is of no known type; the types are {', '.join(types)}: data.labels sets them"
                )


def listed(setting: str, name: str, problems: Sequence[str]) -> str:
    """The first problems, and how many there are."""
    shown = "\n".join(f"  {problem}" for problem in problems[:MOST_SHOWN])
    return f"{setting} ({name}): {len(problems):,} mistakes\n{shown}" + (
        "\n  ..." if len(problems) > MOST_SHOWN else ""
    )


def split(found: Mapping[str, list[Sentence]], data: TagData) -> tuple[dict[str, list[Sentence]], str]:
    """The named splits, and those cut from the source by document; in words."""
    parts = dict(found)
    groups = list(dict.fromkeys(sentence.group for sentence in found["source"]))
    order = [groups[place] for place in permutation(len(groups), data.split_seed)]
    taken, words = 0, []
    for name, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if name in found:
            words.append(f"{name}: {getattr(data, name)}, {len(found[name]):,} sentences")
            continue
        if not fraction:
            continue
        count = round(len(groups) * fraction)
        if not count or taken + count >= len(groups):
            raise DataError(
                f"data.{name}_fraction ({fraction:g}) of {len(groups):,} document(s) leaves none for {'training' if count else name}; "
                f"change it, give more documents, or name data.{name}"
            )
        mine = set(order[taken : taken + count])
        parts[name] = [sentence for sentence in found["source"] if sentence.group in mine]
        taken += count
        words.append(f"{name}: {len(parts[name]):,} sentences of {count:,} documents held out")
    train = set(order[taken:])
    parts["source"] = [sentence for sentence in found["source"] if sentence.group in train]
    return parts, "; ".join(words)
