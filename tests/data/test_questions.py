"""Questions as they are read: SQuAD files, rows, mistakes with their places, and a split that no context crosses."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.tiny import tiny_questions
from trainer.config import ModelConfig, QuestionData, RunConfig, TrainConfig
from trainer.data import questions
from trainer.data.questions import Question, read_questions
from trainer.data.stdlib_questions import LONGEST, MOST_OF_FILE, SHORTEST, chosen_rows, rows_of_file
from trainer.errors import DataError
from trainer.resolve.inputs import input_problems

ROW = {"question": "what?", "context": "a good film", "answers": {"text": ["good"], "answer_start": [2]}}


def write(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def rows(count: int, per_context: int = 3) -> list[dict[str, Any]]:
    return [ROW | {"context": f"a good film {number // per_context}"} for number in range(count)]


def squad(path: Path, *asked: Any, context: Any = "a good film") -> str:
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(asked)}]}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_squad_files_and_rows_give_the_same_questions(tmp_path: Path) -> None:
    answered = {
        "id": "1",
        "question": "what?",
        "answers": [{"text": "good", "answer_start": 2}],
        "is_impossible": False,
    }
    without = {
        "id": "2",
        "question": "why?",
        "answers": [],
        "is_impossible": True,
        "plausible_answers": [{"text": "x"}],
    }
    table = [ROW, ROW | {"question": "why?", "answers": {"text": [], "answer_start": []}}]
    validation = write(tmp_path / "v.jsonl", ROW)
    Dataset.from_list(table).to_parquet(tmp_path / "x.parquet")
    read = [
        read_questions(QuestionData(source=source, validation=validation))
        for source in (
            squad(tmp_path / "x.json", answered, without),
            write(tmp_path / "x.jsonl", *table),
            write(tmp_path / "y.jsonl", ROW | {"answers": [{"text": "good", "answer_start": 2}]}, table[1]),
            str(tmp_path / "x.parquet"),
        )
    ]
    expected = [
        Question("what?", "a good film", (("good", 2),), "a good film"),
        Question("why?", "a good film", (), "a good film"),
    ]
    assert [one.train for one in read] == [expected] * 4
    assert read[0].may_have_no_answer
    assert read[0].sources == (f"{tmp_path / 'x.json'}, 2 questions", f"validation: {validation}, 1 questions")


def test_a_hub_dataset_is_read_by_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(source: str, subset: str | None, split: str, setting: str) -> Dataset:
        asked.append((source, subset, split, setting))
        return Dataset.from_list(rows(3))

    monkeypatch.setattr(questions, "load_hub", load)
    found = read_questions(QuestionData(source="owner/squad", subset="v2", validation="validation"))
    assert asked == [
        ("owner/squad", "v2", "train", "data.source"),
        ("owner/squad", "v2", "validation", "data.validation"),
    ]
    assert (len(found.train), len(found.validation)) == (3, 3)


def test_no_context_is_on_both_sides_and_the_cap_leaves_the_split_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", *rows(60))
    data = QuestionData(source=source, validation_fraction=0.2)
    whole = read_questions(data)
    assert (len(whole.train), len(whole.validation)) == (48, 12)
    assert not {one.context for one in whole.train} & {one.context for one in whole.validation}
    capped = read_questions(data.model_copy(update={"validation_rows": 5}))
    assert capped.train == whole.train
    assert len(capped.validation) == 5 and set(capped.validation) <= set(whole.validation)
    assert capped.sources[1].endswith("no context on both sides, data.split_seed 0, 5 of them used")
    other = read_questions(data.model_copy(update={"split_seed": 1}))
    assert {one.context for one in other.validation} != {one.context for one in whole.validation}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": " "}, "question must hold text, not ' '"),
        ({"question": None}, "question must hold text, not None"),
        ({"context": 3}, "context must hold text, not 3"),
        ({"question": "\ud83d?"}, "question holds half of a surrogate pair, which is no character: '\\ud83d?'"),
        ({"context": "a good \ude00"}, "context holds half of a surrogate pair"),
        (
            {"answers": None},
            'answers must be {"text": [...], "answer_start": [...]}, two lists of one length, not None',
        ),
        ({"answers": {"text": ["good"], "answer_start": []}}, "two lists of one length"),
        ({"answers": {"text": "good", "answer_start": 2}}, "two lists of one length"),
        ({"answers": {"text": [" "], "answer_start": [1]}}, "a question without an answer has empty lists"),
        (
            {"answers": {"text": ["good"], "answer_start": ["2"]}},
            "answer_start ('2') must be a character of the context",
        ),
        ({"answers": {"text": ["good"], "answer_start": [True]}}, "answer_start (True) must be a character"),
        ({"answers": {"text": ["good"], "answer_start": [-9]}}, "answer_start (-9) must be a character"),
        (
            {"answers": {"text": ["good"], "answer_start": [3]}},
            "answer_start (3): the context has 'ood ' there, not the answer 'good'; it stands at 2",
        ),
        ({"answers": {"text": ["bad"], "answer_start": [99]}}, "has '' there, not the answer 'bad'; it is nowhere"),
    ],
)
def test_a_bad_row_is_named_with_its_place_and_the_rule(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ROW, ROW | change)
    with pytest.raises(DataError) as caught:
        read_questions(QuestionData(source=source))
    assert str(caught.value).startswith(f"{source}:2: ") and words in str(caught.value)
    assert str(caught.value).endswith("correct them, or take them out")


def test_all_mistakes_of_all_sources_are_reported_at_once_the_first_five_of_each(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", *[ROW | {"question": ""} for _ in range(7)])
    with open(source, "a", encoding="utf-8") as file:
        file.write("{broken\n")
    held_out = squad(tmp_path / "v.json", {"question": "a?", "answers": [{"text": "film", "answer_start": 6}]}, 3)
    with pytest.raises(DataError) as caught:
        read_questions(QuestionData(source=source, validation=held_out))
    first, second = str(caught.value).split("\n")
    assert first.count("question must hold text") == 4 and f"{source}:8: not JSON" in first
    assert "; and 3 more; correct them" in first
    assert f"{held_out}: article 1, paragraph 1, question 1: answer_start (6)" in second
    assert "question 2: question must hold text, not None" in second


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "[]", "no list 'data', as SQuAD files have; write rows of another form as .jsonl"),
        ("x.json", '{"data": [{"title": "t"}]}', "article 1: no list 'paragraphs'"),
        ("x.json", '{"data": [', "cannot be read as JSON"),
        ("x.json", '{"data": []}', "holds no questions"),
        ("x.csv", "question,context,answers\n", "must be one of .json .jsonl .parquet"),
        ("x.jsonl", '{"question": "a", "text": "b"}\n', "has no column context or answers"),
        ("x.jsonl", json.dumps(ROW) + "\n", "1 context(s), leaves none for training"),
        (
            "x.jsonl",
            "".join(json.dumps(ROW | {"context": str(n), "answers": []}) + "\n" for n in range(9)),
            "none of its 8 questions for training has an answer",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_questions(QuestionData(source=str(tmp_path / name)))
    assert words in str(caught.value)


@pytest.mark.parametrize("source", ["nothing.json", "nothing.jsonl", "asset:sst"])
def test_a_source_that_is_not_there_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"there is no such file|is no asset with questions"):
        read_questions(QuestionData(source=source))


def test_preflight_finds_a_bad_row_without_torch(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ROW | {"question": ""})
    config = RunConfig(
        name="t",
        model=ModelConfig(task="question_answering"),
        data=QuestionData(source=source),
        train=TrainConfig(max_steps=1, metric="f1"),
    )
    assert f"{source}:1: question must hold text" in input_problems(config, ["model: skip"])[0]
    good = tiny_questions(tmp_path / "good.jsonl")
    code = (
        "import sys; from trainer.config import QuestionData; from trainer.data.questions import read_questions; "
        f"read_questions(QuestionData(source={str(good)!r})); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stride": 40, "max_length": 64}, "must be at most 32, half of max_length"),
        ({"validation_fraction": 0.0}, "greater than 0"),
        ({"max_length": 16}, "greater than or equal to 32"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuestionData(**values)


SOURCE = '''
class Shape(Base, Sized):
    """Text with ümlauts, which are two bytes each."""

    def area(self, é=1, scale=2.5, *, unit="m²", other=None):
        if scale < 0:
            raise ValueError("negative")
        return self.width * scale

    def two(self):
        return 1
        return 2
'''


def test_questions_about_source_are_answered_by_what_stands_there(tmp_path: Path) -> None:
    file = tmp_path / "shapes.py"
    filler = "\n".join(f"# line {number} of what else is there" for number in range(30))
    file.write_text(SOURCE + "\n" + filler + "\n", encoding="utf-8")
    found = {row["question"]: row for row in rows_of_file(file)}
    assert {question: row["answers"]["text"][0] for question, row in found.items()} == {
        "What does class Shape inherit from?": "Base, Sized",
        "What is the default of argument é of area?": "1",
        "What is the default of argument scale of area?": "2.5",
        "What does area return?": "self.width * scale",
        "Which exception does area raise?": "ValueError",
    }  # the unit "m²" is left out: it has no two letters; `two` returns more than one thing
    for row in found.values():
        start, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        assert row["context"][start:].startswith(text)
        assert row["title"] == f"{tmp_path.name}/shapes.py"
    file.write_text("def broken(:\n")
    assert list(rows_of_file(file)) == []


def test_contexts_of_a_real_file_do_not_overlap_and_name_what_is_asked_for_once() -> None:
    file = Path(ast.__file__)
    text = file.read_text(encoding="utf-8")
    found = list(rows_of_file(file))
    contexts = list(dict.fromkeys(row["context"] for row in found))
    assert len(found) > 20 and len(contexts) > 5
    ends = 0
    for context in contexts:
        assert SHORTEST <= len(context) <= LONGEST
        start = text.index(context)
        assert start >= ends
        ends = start + len(context)
    assert found == list(rows_of_file(file))


def test_no_context_is_of_two_files_and_no_test_file_is_asked_about(tmp_path: Path) -> None:
    real = [Path(ast.__file__).with_name(name) for name in ("ast.py", "bisect.py", "calendar.py", "enum.py")]
    copy, test = tmp_path / "copy.py", tmp_path / "test" / "x.py"
    test.parent.mkdir()
    for other in (copy, test):
        other.write_text(real[2].read_text(encoding="utf-8"), encoding="utf-8")
    found = chosen_rows([*real, copy, test])
    assert {str(row["title"]).split("/")[-1] for row in found} == {"ast.py", "bisect.py", "calendar.py", "enum.py"}
    assert max(Counter(row["title"] for row in found).values()) <= MOST_OF_FILE
    assert found == chosen_rows([*real, copy, test])
