"""Answers from a context: alike for any batch size, in the place they say, with a confidence that is a probability."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig

from tests.task.test_question_answering import Hesitant
from tests.tiny import FILLERS, tiny_bert
from trainer.errors import DataError
from trainer.predict.answer import Answer, PredictOptions, open_answerer

RNG = np.random.default_rng(0)
CONTEXT = " ".join(["good", *RNG.choice(FILLERS, 70)])
INFO = {"max_length": 32, "stride": 8, "max_answer_length": 3, "no_answer": False}
TEXTS = ["is a film", json.dumps({"question": "the music", "context": "a great film"}), "very long"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


def answers(
    folder: Path, texts: list[str], shift: float = 0.0, no_answer: bool = False, **options: object
) -> list[Answer]:
    config = BertConfig.from_pretrained(folder)
    config.initializer_range = 0.5
    torch.manual_seed(0)
    model = Hesitant(AutoModelForQuestionAnswering.from_config(config), shift)
    settings = PredictOptions(**({"context": CONTEXT} | options))  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return open_answerer("question_answering", model, tokenizer, INFO | {"no_answer": no_answer}, settings).answer(
        texts
    )


def test_answers_stand_where_they_say_for_any_batch_size(folder: Path) -> None:
    together, alone = (answers(folder, TEXTS, batch_size=size) for size in (32, 1))
    for one, other, context in zip(together, alone, (CONTEXT, "a great film", CONTEXT), strict=True):
        assert list(one.facts) == ["text", "answer", "confidence", "start", "end"]
        assert one.facts["answer"] == context[one.facts["start"] : one.facts["end"]] != ""  # type: ignore[misc]
        assert 0 < one.facts["confidence"] < 1  # type: ignore[operator]
        assert {**one.facts, "confidence": 0} == {**other.facts, "confidence": 0}
        assert one.facts["confidence"] == pytest.approx(other.facts["confidence"], rel=1e-4)
        assert str(one.facts["answer"]) in one.words and str(one.facts["text"]) in one.words
    assert [one.facts["text"] for one in together] == ["is a film", "the music", "very long"]
    assert answers(folder, []) == []


def test_confidences_of_all_stretches_sum_to_one(folder: Path) -> None:
    """A context of two tokens has three stretches."""
    (said,) = answers(folder, ["is"], context="good film")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = BertConfig.from_pretrained(folder)
    config.initializer_range = 0.5
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    with torch.no_grad():
        found = model(**tokenizer("is", "good film", return_tensors="pt"))
    start, end = found.start_logits[0].double(), found.end_logits[0].double()
    scores = torch.stack([start[3] + end[3], start[3] + end[4], start[4] + end[4]])
    assert said.facts["confidence"] == pytest.approx(float(scores.softmax(0).max()), rel=1e-5)
    assert said.facts["answer"] == ["good", "good film", "film"][int(scores.argmax())]


def test_a_model_that_learned_of_questions_without_an_answer_may_give_none(folder: Path) -> None:
    texts = [f"is {word}" for word in FILLERS]
    always = answers(folder, texts, shift=5.0)
    assert all(one.facts["answer"] for one in always)
    none = answers(folder, texts, shift=5.0, no_answer=True)
    assert [one.facts["answer"] for one in none] == [""] * len(texts)
    assert all(one.facts["start"] is None and one.words.startswith("(no answer)") for one in none)
    assert all(0.5 < one.facts["confidence"] < 1 for one in none)  # type: ignore[operator]
    some = answers(folder, texts, shift=-5.0, no_answer=True)
    assert [one.facts["answer"] for one in some] == [one.facts["answer"] for one in always]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("is a film", r"text 2 \(is a film\) has no context to answer from; give one with --context"),
        ('{"question": "is"}', "has no context to answer from"),
        ('{"context": "a film"}', "has no question"),
        ('{"question": " ", "context": "a film"}', "has no question"),
        ('{"question": ', "is no JSON object"),
    ],
)
def test_a_text_that_cannot_be_answered_is_named(text: str, words: str, folder: Path) -> None:
    with pytest.raises(DataError, match=words):
        answers(folder, [TEXTS[1], text], context=None)
