"""Extractive question answering as training: it learns on one process and on several alike, and is exported for plain transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForQuestionAnswering, BertConfig

from tests.distributed.resume_runs import metrics_of, start
from tests.tiny import tiny_bert, tiny_questions
from trainer.config import (
    FullConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    QuestionData,
    RunConfig,
    TrainConfig,
)
from trainer.errors import ConfigError
from trainer.model.architecture import load_architecture
from trainer.model.export import load_exported
from trainer.spans import exact_match, span_f1
from trainer.task.question_answering import QuestionAnsweringTask, build

METHODS = {"full": FullConfig(), "head": HeadConfig(), "lora": LoraConfig(rank=4)}
STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    tiny_bert(folder / "model")
    tiny_questions(folder / "all.jsonl", rows=60)
    tiny_questions(folder / "some.jsonl", rows=60, unanswerable=True)
    return folder


def run_config(root: Path, run: Path, *, source: str = "all.jsonl", method: str = "full", **train: Any) -> RunConfig:
    """Contexts of up to 50 words in windows of 32 tokens; without dropout, which differs between numbers of ranks."""
    settings: dict[str, Any] = {"max_steps": STEPS, "global_batch_size": 16, "log_every": 4, "eval_every": 6}
    return RunConfig(
        name="questions",
        run_dir=run,
        model=ModelConfig(source=str(root / "model"), task="question_answering", dropout=0.0, attention_dropout=0.0),
        method=METHODS[method],
        data=QuestionData(
            source=str(root / source), max_length=32, stride=8, max_answer_length=4, validation_fraction=0.25
        ),
        optim=OptimConfig(peak_lr=1e-2),
        train=TrainConfig(**({"metric": "f1"} | settings | train)),
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_learns_and_is_exported(method: str, root: Path, tmp_path: Path) -> None:
    seen = start(run_config(root, tmp_path, method=method), "single", 1)
    assert seen is not None and seen[0]["error"] is None
    losses = seen[0]["losses"]
    assert np.mean([losses[step] for step in range(STEPS - 3, STEPS)]) < np.mean([losses[step] for step in range(3)])
    last = metrics_of(tmp_path)[-1]
    assert last["eval/count"] == 15
    assert 0 <= last["eval/exact_match"] <= last["eval/f1"] <= 1
    model, tokenizer, info = load_exported(tmp_path / "model")
    assert (info["task"], info["max_length"], info["stride"], info["no_answer"]) == ("question_answering", 32, 8, False)
    if method != "lora":
        plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
        inputs = tokenizer("is a good story", "a great film", return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(plain(**inputs).start_logits, model(**inputs).start_logits)
    said = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert said.startswith("question: is a ") and said.count("answer: ") == 15
    assert "| eval f1 |" in (tmp_path / "summary.md").read_text() or "f1" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(("backend", "ranks"), [("ddp", 2), ("zero2", 2)])
def test_ranks_take_the_steps_of_one_process_and_count_every_question_once(
    backend: str, ranks: int, root: Path, tmp_path: Path
) -> None:
    single = start(run_config(root, tmp_path / "single", source="some.jsonl"), "single", 1)
    several = start(run_config(root, tmp_path / "ranks", source="some.jsonl", eval_batch_size=5), backend, ranks)
    assert single is not None and several is not None
    assert [facts["error"] for facts in (*single, *several)] == [None] * (1 + ranks)
    summed = [sum(facts["losses"][step] for facts in several) for step in range(STEPS)]
    assert summed == pytest.approx([single[0]["losses"][step] for step in range(STEPS)], rel=1e-4)
    one, other = ([line for line in metrics_of(tmp_path / run) if "eval/loss" in line] for run in ("single", "ranks"))
    assert len(one) == len(other) >= 2
    for expected, found in zip(one, other, strict=True):
        assert found["eval/count"] == expected["eval/count"] == 15
        assert found["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-4)
        assert found["eval/f1"] == pytest.approx(expected["eval/f1"], abs=1e-9)
        assert found["eval/exact_match"] == pytest.approx(expected["eval/exact_match"], abs=1e-9)


class OneRank:
    """What evaluation asks of an engine, on one process."""

    rank, world_size = 0, 1

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def sum_array_over_ranks(self, array: torch.Tensor) -> torch.Tensor:
        return array


class Hesitant(torch.nn.Module):
    """A model that gives "no answer" so much more than it would."""

    def __init__(self, model: torch.nn.Module, shift: float) -> None:
        super().__init__()
        self.inner, self.shift = model, shift

    def forward(self, **inputs: torch.Tensor) -> Any:
        given = self.inner(**inputs)
        for logits in (given.start_logits, given.end_logits):
            logits[:, 0] += self.shift
        return given


@pytest.mark.parametrize(("source", "shift"), [("all.jsonl", 0.0), ("all.jsonl", 3.0), ("some.jsonl", 3.0)])
def test_evaluation_takes_the_best_of_all_windows_of_a_question(
    source: str, shift: float, root: Path, tmp_path: Path
) -> None:
    """The oracle reads one window at a time, without padding, and tries every stretch."""
    task = build(run_config(root, tmp_path, source=source), Accelerator(cpu=True))
    model = Hesitant(random_model(root), shift)
    found = task.evaluate(lambda inputs: model(**inputs), OneRank(), "validation")  # type: ignore[arg-type]
    answers, loss = oracle(task, model)
    assert found.details["answers"].tolist() == answers
    right = [[text for text, _ in one.answers] for one in task.raw.validation]
    assert found.metrics["exact_match"] == np.mean([exact_match(*pair) for pair in zip(answers, right, strict=True)])
    assert found.metrics["f1"] == np.mean([span_f1(*pair) for pair in zip(answers, right, strict=True)])
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(task.validation) > len(answers)  # some have several windows
    assert ("" in answers) == (source == "some.jsonl")
    assert any(answers)


def random_model(root: Path) -> Any:
    """With weights large enough for varied answers."""
    config = BertConfig.from_pretrained(root / "model")
    config.initializer_range = 0.5
    torch.manual_seed(1)
    return AutoModelForQuestionAnswering.from_config(config).eval()


def oracle(task: QuestionAnsweringTask, model: Any) -> tuple[list[str], float]:
    """The answer to each question by brute force, and the mean loss over targets as transformers computes it."""
    tokenizer, answers, losses = task.tokenizer, [], []
    for number, question in enumerate(task.raw.validation):
        encoded = tokenizer(
            question.question, question.context, truncation="only_second", max_length=32, stride=8,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, no_answer = (-np.inf, ""), np.inf
        labels = task.validation.labels[task.validation.questions == number]
        for window, ids in enumerate(encoded["input_ids"]):
            types = torch.tensor([encoded["token_type_ids"][window]])
            with torch.no_grad():
                given = model(input_ids=torch.tensor([ids]), token_type_ids=types)
            start, end = given.start_logits[0].double(), given.end_logits[0].double()
            losses += [float(-side.log_softmax(0)[at]) for side, at in zip((start, end), labels[window], strict=True)]
            no_answer = min(no_answer, float(start[0] + end[0]))
            inside = [place for place, side in enumerate(encoded.sequence_ids(window)) if side == 1]
            offsets = encoded["offset_mapping"][window]
            for first in inside:
                for last in (place for place in inside if first <= place < first + 4):
                    text = question.context[offsets[first][0] : offsets[last][1]]
                    best = max(best, (float(start[first] + end[last]), text))
        answers.append("" if task.raw.may_have_no_answer and no_answer > best[0] else best[1])
    return answers, float(np.mean(losses))


def test_a_window_longer_than_the_model_reads_is_refused(root: Path, tmp_path: Path) -> None:
    config = run_config(root, tmp_path)
    long = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 256})})
    with pytest.raises(ConfigError, match=r"data.max_length \(256\) must be at most 128"):
        build(long, Accelerator(cpu=True))


def test_a_source_with_other_labels_gets_a_head_for_start_and_end(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {str(number): f"l{number}" for number in range(5)}}
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_architecture(ModelConfig(source=str(folder), task="question_answering"), ()).num_labels == 2


def test_what_the_data_is_is_said(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = build(run_config(root, tmp_path, source="some.jsonl"), Accelerator(cpu=True))
    said = capsys.readouterr().out
    assert f"data       {root / 'some.jsonl'}, 60 questions\n" in said
    assert "15 questions held out of it, no context on both sides, data.split_seed 0\n" in said
    assert f"45 questions for training, {sum(not one.answers for one in task.raw.train)} without an answer\n" in said
    assert f"{len(task.train)} windows of at most 32 tokens (data.max_length) for training, " in said
