"""Conversations as samples: targets, cutting, examples, packing."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.data.test_templates import tokenizer
from trainer.config import InstructData
from trainer.data import instruct
from trainer.data.instruct import Sample, build_instruct
from trainer.errors import ConfigError, DataError

PAIR = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(path: Path, **changes: Any) -> InstructData:
    return InstructData(
        **{"source": str(path), "max_length": 200, "validation_fraction": 0.2, "template": "chatml"} | changes
    )


def chats(tmp_path: Path, count: int = 10, turns: int = 2) -> Path:
    """Conversations of different lengths."""
    rows = []
    for number in range(count):
        messages = []
        for turn in range(turns):
            messages += [
                {"role": "user", "content": f"Question {turn} of {number}" + "?" * (number % 4)},
                {"role": "assistant", "content": f"Answer {turn}" + "!" * (number % 3)},
            ]
        rows.append({"messages": messages})
    return write(tmp_path / "chats.jsonl", rows)


def targets(sample: Sample) -> list[str]:
    """The texts that are learned, in their order."""
    plain, runs = tokenizer(), np.flatnonzero(np.diff(np.concatenate([[0], sample.is_target.astype(int), [0]])))
    return [plain.decode(sample.ids[first:last]) for first, last in runs.reshape(-1, 2)]


def test_what_is_learned_is_as_asked(tmp_path: Path) -> None:
    path = chats(tmp_path)
    first = build_instruct(data(path), tokenizer()).train.samples[0]
    assert targets(first) == ["Answer 0<|im_end|>", "Answer 1<|im_end|>"]
    last = build_instruct(data(path, learn="last"), tokenizer()).train.samples[0]
    assert targets(last) == ["Answer 1<|im_end|>"]
    whole = build_instruct(data(path, learn="everything"), tokenizer()).train.samples[0]
    assert whole.is_target.tolist() == [False] + [True] * (len(whole.ids) - 1)
    assert tokenizer().decode(first.ids[: first.prompt_length]).endswith("<|im_start|>assistant\n")


def test_long_conversations_are_cut_behind_an_answer_and_counted(tmp_path: Path) -> None:
    path = chats(tmp_path, turns=3)
    whole = build_instruct(data(path, max_length=400), tokenizer())
    assert (len(whole.cut), len(whole.left_out)) == (0, 0)
    shortest = min(len(sample.ids) for sample in whole.train.samples)
    cut = build_instruct(data(path, max_length=shortest - 1, allow=("truncated",)), tokenizer())
    assert (len(cut.cut), len(cut.left_out)) == (10, 0)
    for sample in cut.train.samples:
        assert len(targets(sample)) == 2
        assert tokenizer().decode(sample.ids).endswith("<|im_end|>")
    with pytest.raises(DataError, match=r"0 of 10 conversations have an answer within data\.max_length"):
        build_instruct(data(path, max_length=20), tokenizer())


def test_samples_do_not_depend_on_how_many_are_tokenized_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data(chats(tmp_path), few_shot=2, max_length=400)
    whole = build_instruct(settings, tokenizer()).train.samples
    monkeypatch.setattr(instruct, "TOGETHER", 3)
    parts = build_instruct(settings, tokenizer()).train.samples
    assert len(whole) > 3
    assert [(one.ids.tolist(), one.is_target.tolist(), one.answers, one.place) for one in parts] == [
        (one.ids.tolist(), one.is_target.tolist(), one.answers, one.place) for one in whole
    ]


def test_a_tokenizer_in_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ByT5Tokenizer, has no fast form"):
        build_instruct(data(chats(tmp_path), template="alpaca"), ByT5Tokenizer())


def test_examples_stand_before_every_conversation_and_are_not_learned(tmp_path: Path) -> None:
    path = chats(tmp_path, turns=1)
    found = build_instruct(data(path, few_shot=2, max_length=400), tokenizer())
    assert len(found.train.samples) + len(found.validation.samples) == 8
    for sample in [*found.train.samples, *found.validation.samples]:
        text = tokenizer().decode(sample.ids)
        assert text.startswith(
            "<|im_start|>user\nQuestion 0 of 0<|im_end|>\n<|im_start|>assistant\nAnswer 0<|im_end|>\n"
        )
        assert len(targets(sample)) == 1
        assert sample.prompt_length > text.index("Question 0 of 1")


def test_packed_rows_hold_every_sample_once_with_positions_of_its_own(tmp_path: Path) -> None:
    path = chats(tmp_path, count=30, turns=1)
    plain = build_instruct(data(path), tokenizer())
    found = build_instruct(data(path, packing="best_fit"), tokenizer())
    assert len(found.train) < len(plain.train) / 1.5
    assert sorted(index for row in found.train.rows for index in row) == list(range(len(plain.train)))
    assert found.train.lengths.max() <= 200
    batch = found.train.batch(np.arange(len(found.train)), padding=0)
    told = [(ids, label) for ids, label in pieces(batch)]
    alone = [(ids, label) for ids, label in pieces(plain.train.batch(np.arange(len(plain.train)), padding=0))]
    assert sorted(told) == sorted(alone)


def pieces(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every sample of a batch, by positions that start anew."""
    found = []
    for row, held in enumerate(batch["num_tokens"].tolist()):
        positions = batch["position_ids"][row, :held] if "position_ids" in batch else torch.arange(held)
        starts = [*(positions == 0).nonzero().flatten().tolist(), held]
        for first, last in itertools.pairwise(starts):
            assert positions[first:last].tolist() == list(range(last - first))
            found.append((batch["input_ids"][row, first:last].tolist(), batch["labels"][row, first:last].tolist()))
    return found
