"""`samestep predict` by task: masks, model sources, options that a task does not read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification

from launch.cli import main
from tests.tiny import tiny_bert


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a head for masks."""
    folder = tiny_bert(tmp_path_factory.mktemp("masked") / "bert")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def predict(*words: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["predict", *words])
    assert done.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["predict", *words])
    assert done.value.code == 2
    return capsys.readouterr().err


TEXTS = ["the [MASK] is good", "[MASK] story with [MASK] actors and music", "a film [MASK]"]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_candidates_are_those_of_plain_transformers(
    masked: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(str(masked), "--task", "mlm", *TEXTS, "--top-k", "3", "--json", "--batch-size", str(batch_size))
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(masked), AutoTokenizer.from_pretrained(masked)
    for text, answer in zip(TEXTS, answers, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0, encoded["input_ids"][0] == tokenizer.mask_token_id]
        best = logits.double().softmax(-1).topk(3)
        assert answer["text"] == text
        assert [[c["token"] for c in mask] for mask in answer["masks"]] == [
            [tokenizer.decode([i]) for i in row] for row in best.indices.tolist()
        ]
        values: Any = [[c["probability"] for c in mask] for mask in answer["masks"]]
        for found, wanted in zip(values, best.values.tolist(), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
        words = text.split()
        filled = [w if w != "[MASK]" else None for w in words]
        assert answer["filled"].split()[:1] == ([filled[0]] if filled[0] else [answer["masks"][0][0]["token"]])
    assert "3 texts in" in err


def test_a_text_without_a_mask_is_refused(masked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, str(masked), "--task", "mlm", "a film")
    assert "has no mask; put [MASK] where a token is to be found" in said


def test_a_text_of_a_file_is_named_by_its_line(
    masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.predict_tasks.TEXTS_AT_ONCE", 2)
    file = tmp_path / "texts.txt"
    file.write_text("\na [MASK]\n\n\nthe [MASK]\na film\n")
    said = refused(capsys, str(masked), "--task", "mlm", "is [MASK]", "--file", str(file))
    assert f"--file ({file}), line 6 ('a film') has no mask" in said
    assert "text 2 ('a film') has no mask" in refused(capsys, str(masked), "--task", "mlm", "is [MASK]", "a film")


def test_a_source_without_the_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bert(tmp_path / "bert")
    assert "lack cls.predictions" in refused(capsys, str(folder), "--task", "mlm", "a [MASK]")


def test_a_classifier_that_is_no_run_answers_with_its_own_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bert(tmp_path / "bert")
    config = BertConfig.from_pretrained(folder, id2label={0: "calm", 1: "angry"}, label2id={"calm": 0, "angry": 1})
    BertForSequenceClassification(config).save_pretrained(folder)
    predict(str(folder), "--task", "classification", "a film", "the story", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row["probabilities"]) for row in rows] == [{"calm", "angry"}] * 2


def classifier(folder: Path, **settings: Any) -> Path:
    """A tiny classifier with these settings in its config.json. Returns `folder`."""
    config = BertConfig.from_pretrained(tiny_bert(folder), initializer_range=1.0, **settings)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def logits_of(folder: Path, text: str) -> torch.Tensor:
    """(C,) fp64, by plain transformers."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits[0].double()


def test_a_classifier_of_several_labels_answers_with_each_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classifier(tmp_path / "bert", num_labels=3, problem_type="multi_label_classification")
    predict(str(folder), "--task", "classification", "a good film", "--json")
    row = json.loads(capsys.readouterr().out)
    expected = logits_of(folder, "a good film").sigmoid().tolist()
    assert list(row["probabilities"].values()) == pytest.approx(expected, abs=1e-6)
    assert set(row["labels"]) == {f"LABEL_{number}" for number, value in enumerate(expected) if value > 0.5}


def test_a_source_with_one_output_answers_with_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = classifier(tmp_path / "bert", num_labels=1)
    predict(str(folder), "--task", "classification", "a good film", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["value"] == pytest.approx(float(logits_of(folder, "a good film")), abs=1e-5)
    several = classifier(tmp_path / "several", num_labels=2, problem_type="regression")
    assert "gives 2 numbers" in refused(capsys, str(several), "--task", "classification", "a good film")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--task", "mlm", "--temperature", "0.5"],
            "--temperature: has no effect on .*, whose task is mlm; leave it out",
        ),
        (["--task", "poetry"], "--task (poetry): "),
        (["--task", "plm"], "--task (plm): predict answers for classification, "),
    ],
)
def test_what_cannot_be_meant_is_refused(
    masked: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    said = refused(capsys, str(masked), "a [MASK]", *words)
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), said), said


def test_a_model_source_without_a_task_is_asked_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "say what it is to do: --task" in refused(capsys, "asset:minilm", "a text")
