"""Pairs of texts and targets: what is read and refused, how they are split, and what a model with a decoder of its own gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.tiny import tiny_bart, tiny_pairs, tiny_t5
from trainer.config import PairData
from trainer.data.docstrings import INSTRUCTION, docstring_file, pairs_of_file, stdlib_summaries
from trainer.data.pairs import Pair, build_pairs, encode_texts, read_pairs, split_pairs
from trainer.errors import DataError

MAKERS = {"t5": tiny_t5, "bart": tiny_bart}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def data(path: Path, **changes: Any) -> PairData:
    return PairData(**{"source": str(path), "max_length": 8, "max_target_length": 4} | changes)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_pairs(suffix: str, tmp_path: Path) -> None:
    path, rows = tmp_path / f"pairs{suffix}", [("a, long text", "short"), ("another", "one\nof two lines ")]
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"article": [row[0] for row in rows], "summary": [row[1] for row in rows]}), path)
    elif suffix == ".jsonl":
        write(path, [{"article": text, "summary": target, "more": 1} for text, target in rows])
    else:
        mark = "," if suffix == ".csv" else "\t"
        path.write_text(mark.join(("article", "summary")) + "\n" + "".join(f'"{a}"{mark}"{b}"\n' for a, b in rows))
    found = read_pairs(data(path, text="article", target="summary", prefix="sum: "))
    assert found == [Pair("sum: a, long text", "short"), Pair("sum: another", "one\nof two lines")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " ", "target": "x"}, "column text is empty, and must hold text"),
        ({"text": "x", "target": None}, "column target is empty, and must hold text"),
        ({"text": "x"}, "column target is empty, and must hold text"),
        ({"text": 3, "target": "x"}, "column text must hold text, not 3"),
        ({"text": "x", "target": ["y"]}, "column target must hold text, not ['y']"),
        (
            {"text": "x", "target": "a \ud83d"},
            "column target holds half of a surrogate pair, which is no character: 'a \\ud83d'",
        ),
        ("not json", "not JSON: Expecting value at column 1 (it holds 'not json')"),
        ("[1]", "a JSON list where an object must be (it holds '[1]')"),
    ],
)
def test_a_row_that_is_no_pair_is_named_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"text": "a", "target": "b"}, row])
    with pytest.raises(DataError) as caught:
        read_pairs(data(path))
    assert str(caught.value) == f"{path}:2: {message}; correct them, or take them out"


def test_mistakes_are_told_together_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", ["oops", *({"text": "a", "target": ""} for _ in range(6))])
    with pytest.raises(DataError) as caught:
        read_pairs(data(path))
    said = str(caught.value)
    assert [f"{path}:{line}:" in said for line in range(1, 8)] == [True] * 5 + [False] * 2
    assert said.endswith("; and 2 more; correct them, or take them out")


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"text": "a", "summary": "b"}])
    with pytest.raises(
        DataError, match=r"data\.target \(target\): .* has no such column; .*its columns are text, summary"
    ):
        read_pairs(data(path))
    with pytest.raises(DataError, match=r"data\.text \(code\): asset:stdlib has no such column"):
        read_pairs(PairData(text="code"))
    with pytest.raises(DataError, match=r"data\.source \(.*none\.csv\): there is no such file"):
        read_pairs(data(tmp_path / "none.csv"))


# The standard library


def test_summaries_are_first_lines_that_say_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))
    nested = 'def f():\n    def g():\n        "Inside."\n        return 1\n    return g'
    rows = [
        ("def a(x):\n    return 2 * x", "Double x.\n\nAnd more."),
        ("def b():\n    return 1", ">>> b()\n1"),
        ("def c():\n    return 1", "+"),
        (nested, "Make g."),
        (nested.replace('        "Inside."\n', ""), "Make g again."),
    ]
    docstring_file_of(tmp_path, rows)
    assert [target for _, target in stdlib_summaries()] == ["Double x.", "Make g again."]
    assert read_pairs(PairData())[0] == Pair("def a(x):\n    return 2 * x", "Double x.")


def test_a_form_feed_is_no_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        'import os\n\x0c\ndef one():\n    """First."""\n    return 1\n\x0c\ndef two():\n    """Second."""\n    return 2\n'
    )
    assert list(pairs_of_file(file)) == [
        (f"{INSTRUCTION}def one():\n    return 1", "First."),
        (f"{INSTRUCTION}def two():\n    return 2", "Second."),
    ]


def docstring_file_of(cache: Path, rows: list[tuple[str, str]]) -> None:
    """The cached file as docstrings.py names it, with these rows."""
    import sys

    file = cache / "stdlib-docstrings-2-{}.{}.{}.jsonl".format(*sys.version_info)
    write(file, [{"prompt": INSTRUCTION + source, "response": docstring} for source, docstring in rows])
    assert docstring_file() == file


# The split


def test_equal_texts_stay_together_and_held_out_ones_count_once() -> None:
    pairs = [
        Pair(f"text  {number % 50}" if number < 50 else f"text {number % 50}", f"{number}") for number in range(100)
    ]
    settings = PairData(validation_fraction=0.2)
    train, held_out = split_pairs(pairs, settings)
    keys = [{" ".join(pair.text.split()) for pair in part} for part in (train, held_out)]
    assert keys[0].isdisjoint(keys[1])
    assert (len(train), len(held_out), len(keys[1])) == (80, 10, 10)
    assert all(int(pair.target) < 50 for pair in held_out)
    assert [int(pair.target) for pair in train] == sorted(int(pair.target) for pair in train)
    assert split_pairs(pairs, settings) == (train, held_out)
    assert split_pairs(pairs, settings.model_copy(update={"split_seed": 1}))[1] != held_out


def test_a_single_text_is_not_enough() -> None:
    with pytest.raises(
        DataError, match=r"data\.source \(asset:stdlib\): 1 different texts, and one is needed for training"
    ):
        split_pairs([Pair("a", "b"), Pair(" a", "c")], PairData())


# Tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_both_sides_end_and_are_cut_before_their_end(name: str, models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    found = encode_texts(["w1 w2", "w1 w2 w3 w4 w5 w6 w7"], tokenizer, 5)
    words = {f"w{number}": tokenizer.convert_tokens_to_ids(f"w{number}") for number in range(1, 8)}
    before = [] if name == "t5" else [tokenizer.convert_tokens_to_ids("<s>")]
    short, long = np.split(found.split.tokens, found.split.offsets[1:-1])
    assert short.tolist() == [*before, words["w1"], words["w2"], 1]
    assert long.tolist() == [*before, *list(words.values())[: 4 - len(before)], 1]
    assert found.full_lengths.tolist() == [3 + len(before), 8 + len(before)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_is_what_the_model_makes_of_labels(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The decoder's inputs by transformers' own shift, and the loss by its own cross-entropy."""
    from trainer.loss import token_losses

    model = AutoModelForSeq2SeqLM.from_pretrained(models[name]).eval()
    settings = data(tiny_pairs(tmp_path / "pairs.jsonl", rows=40), max_length=20, max_target_length=8)
    train = build_pairs(settings, AutoTokenizer.from_pretrained(models[name])).train
    batch = train.batch(np.arange(6), padding=0, start=model.config.decoder_start_token_id)
    expected = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert batch["attention_mask"].sum(dim=1).tolist() == train.texts.lengths[:6].tolist()
    assert (batch["labels"] != -100).sum(dim=1).tolist() == train.targets.lengths[:6].tolist()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = model(**inputs, labels=batch["labels"], use_cache=False).loss
        logits = model(**inputs, decoder_input_ids=batch["decoder_input_ids"], use_cache=False).logits
        alone = train.batch(np.array([3]), padding=0, start=model.config.decoder_start_token_id)
        of_one = model(**{key: alone[key] for key in (*inputs, "decoder_input_ids")}, use_cache=False).logits
    losses = token_losses(logits, batch["labels"])
    assert float(losses.sum() / (batch["labels"] != -100).sum()) == pytest.approx(float(theirs), rel=1e-6)
    assert float(token_losses(of_one, alone["labels"]).sum()) == pytest.approx(float(losses[3].sum()), rel=1e-5)


def test_without_ids_there_is_a_sample_without_a_target(models: dict[str, Path], tmp_path: Path) -> None:
    settings = data(tiny_pairs(tmp_path / "pairs.jsonl", rows=40), max_length=20, max_target_length=8)
    found = build_pairs(settings, AutoTokenizer.from_pretrained(models["t5"]))
    batch = found.train.batch(np.zeros(0, np.int64), padding=0, start=0)
    assert (batch["labels"] == -100).all()
    assert batch["attention_mask"].any()
    assert len(batch["num_tokens"]) == 0
    assert found.num_held_out == len(found.validation) == 2
    assert "0.0% cut at 20" in found.described_lengths[0]
