"""Questions, their contexts and answers: read, checked, split. Needs neither torch nor a tokenizer.

Place in the flow: trainer/resolve looks for mistakes here before anything is launched; trainer/data/windows.py makes tokens of it.
Invariant: an answer is the stretch of its context that its place says, to the character; anything else is an error that says where.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import QuestionData
from trainer.data.batches import permutation
from trainer.data.sources import check_path, hub_table, is_hub_id, load_hub
from trainer.data.stdlib_questions import question_file
from trainer.data.tables import Table, columns_of, read_file, surrogate_problem
from trainer.errors import DataError

COLUMNS = ("question", "context", "answers")
SUFFIXES = (".json", ".jsonl", ".parquet")
FORM = 'answers must be {"text": [...], "answer_start": [...]}, two lists of one length'
MOST_SHOWN = 5
"""Mistakes of a source that are listed."""

Row = tuple[Mapping[str, object], str]
"""A question with its context and answers as the source has them, and where it stands."""


@dataclass(frozen=True)
class Question:
    """One question about a context."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    """(text, its first character in the context) of every right answer; the first is learned. None: the context does not answer it."""
    group: str = ""
    """Questions of one group stay on one side of the split: their context, or their file."""


@dataclass(frozen=True)
class RawQuestions:
    """What a run learns and is tested on, before there are tokens."""

    train: list[Question]
    validation: list[Question]
    sources: tuple[str, ...]
    """Where they came from, for the screen."""

    @property
    def may_have_no_answer(self) -> bool:
        """Whether some question of the training data has no answer, so that the model learns to say so."""
        return any(not question.answers for question in self.train)


def read_questions(data: QuestionData) -> RawQuestions:
    """Read, check and split. DataError names place, rule and fix of what is wrong, of all sources at once."""
    named = read_all(data)
    whole = named["data.source"]
    if data.validation is not None:
        train, held_out = whole, named["data.validation"]
        words = f"{data.validation}, {len(held_out):,} questions"
    else:
        train, held_out = hold_out(whole, data)
        kept = "file" if data.source == "asset:stdlib" else "context"
        words = (
            f"{len(held_out):,} questions held out of it, no {kept} on both sides, data.split_seed {data.split_seed}"
        )
    if not any(question.answers for question in train):
        raise DataError(
            f"data.source ({data.source}): none of its {len(train):,} questions for training has an answer; give others"
        )
    most = data.validation_rows or len(held_out)
    if len(held_out) > most:
        held_out = [held_out[place] for place in np.sort(permutation(len(held_out), data.split_seed, 1)[:most])]
        words += f", {most:,} of them used"
    return RawQuestions(train, held_out, (f"{data.source}, {len(whole):,} questions", f"validation: {words}"))


def read_all(data: QuestionData) -> dict[str, list[Question]]:
    """The questions of every source that a setting names."""
    found, problems = {}, []
    for setting, name, split in (
        ("data.source", data.source, "train"),
        ("data.validation", data.validation, data.validation),
    ):
        try:
            if name is not None and split is not None:
                found[setting] = read_named(data, name, setting, split)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def hold_out(questions: Sequence[Question], data: QuestionData) -> tuple[list[Question], list[Question]]:
    """Training and validation questions, both in their order: random groups until the validation has its share."""
    groups = list(dict.fromkeys(question.group for question in questions))
    sizes = dict.fromkeys(groups, 0)
    for question in questions:
        sizes[question.group] += 1
    wanted, held_out, count = data.validation_fraction * len(questions), set(), 0
    for place in permutation(len(groups), data.split_seed):
        if count < wanted:
            held_out.add(groups[place])
            count += sizes[groups[place]]
    if len(held_out) == len(groups):
        raise DataError(
            f"data.validation_fraction ({data.validation_fraction:g}) of data.source ({data.source}), {len(groups)} context(s), leaves "
            "none for training, and no context may be on both sides; lower it, give more contexts, or name data.validation"
        )
    sides = [[one for one in questions if (one.group in held_out) is side] for side in (False, True)]
    return sides[0], sides[1]


def read_named(data: QuestionData, name: str, setting: str, split: str) -> list[Question]:
    """The questions of an asset, a file or a hub dataset's split. DataError lists what is wrong with them."""
    rows, problems = read_rows(data, name, setting, split)
    group_by = "title" if name == "asset:stdlib" else "context"
    questions = []
    for row, place in rows:
        found = mistakes(row)
        problems += [f"{place}: {mistake}" for mistake in found]
        if not found:
            answers = tuple((str(text), int(start)) for text, start in answers_of(row["answers"]))  # type: ignore[call-overload]
            questions.append(Question(str(row["question"]), str(row["context"]), answers, str(row[group_by])))
    if problems:
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise DataError("; ".join(problems[:MOST_SHOWN]) + more + "; correct them, or take them out")
    if not questions:
        raise DataError(f"{setting} ({name}) holds no questions; give a file with some")
    return questions


def read_rows(data: QuestionData, name: str, setting: str, split: str) -> tuple[Iterator[Row], list[str]]:
    """The rows of a source, and what cannot be read of it."""
    if name.startswith("asset:"):
        if name != "asset:stdlib":
            raise DataError(f"{setting} ({name}) is no asset with questions; use asset:stdlib or a file")
        table = read_file(question_file(), {one: one for one in (*COLUMNS, "title")}, kind="asset")
    elif Path(name).suffix.lower() == ".json":
        return squad_rows(check_path(name, setting)), []
    elif is_hub_id(name) if setting == "data.source" else names_split(data, name):
        dataset = load_hub(data.source, data.subset, split, setting)
        table = hub_table(dataset, f"{data.source}[{split}]", columns_to_read(name, dataset.column_names))
    else:
        path = check_path(name, setting)
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{setting} ({name}) must be one of {' '.join(SUFFIXES)}, a SQuAD file or rows; convert it")
        table = read_file(path, columns_to_read(name, columns_of(path)))
    return rows_of(table), [f"{table.place(bad.line)}: {bad.reason}" for bad in table.malformed]


def names_split(data: QuestionData, name: str) -> bool:
    """Whether data.validation is a split of a hub dataset rather than a file."""
    path = Path(name).expanduser()
    return is_hub_id(data.source) and not os.path.isfile(path) and path.suffix.lower() not in SUFFIXES


def columns_to_read(name: str, present: Sequence[str]) -> dict[str, str]:
    """DataError where a column is missing."""
    missing = [column for column in COLUMNS if column not in present]
    if missing:
        raise DataError(
            f"{name} has no column {' or '.join(missing)}, and a row needs question, context and answers; its columns are "
            f"{', '.join(present)[:200]}; rename them"
        )
    return {column: column for column in COLUMNS}


def rows_of(table: Table) -> Iterator[Row]:
    """The rows of a table."""
    for number, line in enumerate(table.lines):
        yield {name: values[number] for name, values in table.columns.items()}, table.place(line)


def squad_rows(path: Path) -> Iterator[Row]:
    """The rows of a SQuAD file, v1 or v2. DataError for JSON of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({str(error)[:100]}); check that it was copied whole") from None
    for article, number in _listed(content, "data", str(path)):
        place = f"{path}: article {number}"
        for paragraph, paragraph_number in _listed(article, "paragraphs", place):
            where = f"{place}, paragraph {paragraph_number}"
            for asked, question_number in _listed(paragraph, "qas", where):
                given = asked.get("answers") if isinstance(asked, dict) else None
                row = {"question": asked.get("question") if isinstance(asked, dict) else None, "answers": given}
                yield row | {"context": paragraph.get("context")}, f"{where}, question {question_number}"


def _listed(value: Any, key: str, place: str) -> Iterator[tuple[Any, int]]:
    """The items of a list in an object, numbered from 1."""
    items = value.get(key) if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{place}: no list {key!r}, as SQuAD files have; write rows of another form as .jsonl")
    yield from ((item, number) for number, item in enumerate(items, start=1))


def answers_of(value: object) -> list[tuple[object, object]]:
    """(text, answer_start) of each answer, in either form of writing them down. ValueError for another."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(FORM)
        return list(zip(texts, starts, strict=True))
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(FORM)
    return [(one.get("text"), one.get("answer_start")) for one in value]


def mistakes(row: Mapping[str, object]) -> list[str]:
    """What is wrong with a row."""
    found = [
        f"{name} must hold text, not {row[name]!r:.60}"
        for name in ("question", "context")
        if not isinstance(row[name], str) or not str(row[name]).strip()
    ]
    texts = {name: text for name in ("question", "context") if isinstance(text := row[name], str)}
    found += [f"{name} {problem}" for name, text in texts.items() if (problem := surrogate_problem(text))]
    try:
        answers = answers_of(row["answers"])
    except ValueError as error:
        return [*found, f"{error}, not {row['answers']!r:.60}"]
    context = row["context"]
    if isinstance(context, str):
        found += [words for text, start in answers if (words := mistake_of_answer(context, text, start))]
    return found


def mistake_of_answer(context: str, text: object, start: object) -> str:
    """What is wrong with an answer; "" if nothing is."""
    if not isinstance(text, str) or not text.strip():
        return f"the text of an answer must hold text, not {text!r:.60}; a question without an answer has empty lists"
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        return f"answer_start ({start!r:.40}) must be a character of the context, from 0"
    there = context[start : start + len(text)]
    if there == text:
        return ""
    near = max(context.find(text, max(start - len(text), 0)), context.find(text))
    fix = f"it stands at {near}" if near >= 0 else "it is nowhere in the context"
    return f"answer_start ({start}): the context has {there!r:.40} there, not the answer {text!r:.40}; {fix}"
