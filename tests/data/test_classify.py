"""From a file to tokenized splits: exact splits, counted bad rows, and batches that hold what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny import tiny_bert, tiny_sentences
from trainer.config import ClassificationData, ModelConfig, RunConfig
from trainer.data.classify import ClassificationSet, Split, build_data, read_splits
from trainer.data.labels import largest_remainder
from trainer.errors import ConfigError, DataError


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good_rows(count: int) -> list[dict]:
    return [{"text": f"sentence {i}", "label": "ab"[i % 2]} for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tiny") / "model")


def test_sst_is_split_70_15_15_and_stratified() -> None:
    splits = read_splits(ClassificationData())
    assert splits.test is not None
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [7050, 1511, 1511]
    assert [int((s.labels == 1).sum()) for s in (splits.train, splits.validation, splits.test)] == [3498, 749, 749]
    assert len(set(splits.train.texts) | set(splits.validation.texts) | set(splits.test.texts)) > 10_000


def test_the_split_depends_on_its_seed_alone(tmp_path: Path) -> None:
    path = str(tiny_sentences(tmp_path / "x.csv", rows=100))
    one, same, other = (read_splits(ClassificationData(source=path, split_seed=s)) for s in (0, 0, 1))
    assert one.train.texts == same.train.texts != other.train.texts


def test_largest_remainder_is_exact() -> None:
    assert largest_remainder(np.array([3, 3, 4]), 5).tolist() == [2, 1, 2]
    assert largest_remainder(np.array([5076, 4996]), 1511).sum() == 1511


def test_named_splits_are_used_whole(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", good_rows(10))
    validation = jsonl(tmp_path / "validation.jsonl", good_rows(4))
    splits = read_splits(ClassificationData(source=str(train), validation=str(validation), test_fraction=0))
    assert (len(splits.train), len(splits.validation), splits.test) == (10, 4, None)


def test_three_classes_and_integer_labels(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": i % 3} for i in range(30)]
    splits = read_splits(ClassificationData(source=str(jsonl(tmp_path / "x.jsonl", rows))))
    assert splits.label_names == ("0", "1", "2")


BAD = [
    ({"text": "x"}, "no label"),
    ({"text": "", "label": "a"}, "text is empty"),
    ({"text": "  ", "label": "a"}, "text is empty"),
    ({"text": "x", "label": "c"}, r"label 'c' is not in the label set \(a, b\)"),
    ({"text": 3, "label": "a"}, "text is int, not text"),
    ({"text": "x", "label": ["a"]}, "the label is list"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_reported_with_file_and_line(row: dict, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [*good_rows(20), row])
    with pytest.raises(DataError, match=rf"1 of 21 rows are bad.*x\.jsonl:21: {message}.*max_bad_fraction=0\.048"):
        read_splits(ClassificationData(source=str(path), labels=("a", "b")))


def test_few_bad_rows_are_dropped_where_that_is_allowed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [*good_rows(20), *(row for row, _ in BAD)])
    splits = read_splits(ClassificationData(source=str(path), labels=("a", "b"), max_bad_fraction=0.3))
    assert len(splits.train) + len(splits.validation) + len(splits.test or ()) == 20
    assert splits.notes[0].startswith("dropped: 6 of 26 rows are bad (2 x text is empty")


def test_a_missing_column_lists_the_columns_and_the_nearest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"sentence": "x", "labels": "a"}] * 4)
    with pytest.raises(DataError) as error:
        read_splits(ClassificationData(source=str(path)))
    assert "no column 'text' (data.text); it has sentence, labels" in str(error.value)
    assert "did you mean data.label=labels?" in str(error.value)


def test_a_label_with_too_few_examples_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [*good_rows(10), {"text": "x", "label": "rare"}])
    with pytest.raises(DataError, match="label 'rare' has 1 example"):
        read_splits(ClassificationData(source=str(path)))


def test_one_label_only_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "x", "label": "a"}] * 9)
    with pytest.raises(DataError, match="at least two are needed"):
        read_splits(ClassificationData(source=str(path)))


def test_a_named_split_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", good_rows(10))
    with pytest.raises(
        DataError, match=r"data.validation \(validation\) is no file; only a hub dataset has named splits"
    ):
        read_splits(ClassificationData(source=str(path), validation="validation"))


def test_build_data_says_what_the_data_is(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines: list[str] = []
    source = str(tiny_sentences(tmp_path / "x.csv", rows=100))
    data_config = ClassificationData(source=source, max_length=8)
    config = RunConfig(name="t", model=ModelConfig(source=str(tokenizer_folder)), data=data_config)
    data = build_data(config, SimpleNamespace(print=lines.append))  # type: ignore[arg-type]
    text = lines[0]
    assert "train      70 samples: negative 34  positive 36" in text
    assert "batches    3 of 32 per epoch" in text and "padding" in text
    cut = float(text.split("max 8, ")[1].split("%")[0])
    untruncated = [len(data.tokenizer(t)["input_ids"]) > 8 for t in read_splits(data_config).train.texts]
    assert cut == pytest.approx(100 * np.mean(untruncated), abs=0.05)


def test_max_length_beyond_the_tokenizer_is_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = str(tiny_sentences(tmp_path / "x.csv"))
    config = RunConfig(
        name="t",
        model=ModelConfig(source=str(tokenizer_folder)),
        data=ClassificationData(source=source, max_length=200),
    )
    with pytest.raises(ConfigError, match=r"data.max_length \(200\) must be at most the tokenizer's limit \(128\)"):
        build_data(config, SimpleNamespace(print=print))  # type: ignore[arg-type]


def test_pairs_carry_token_types(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"text": "good film", "other": "bad story", "label": "ab"[i % 2]} for i in range(20)]
    data_config = ClassificationData(source=str(jsonl(tmp_path / "x.jsonl", rows)), text_pair="other")
    config = RunConfig(name="t", model=ModelConfig(source=str(tokenizer_folder)), data=data_config)
    data = build_data(config, SimpleNamespace(print=lambda text: None))  # type: ignore[arg-type]
    batch = data.collate(data.train, np.array([0]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_collate_pads_on_the_right_like_the_library(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = str(tiny_sentences(tmp_path / "x.csv", rows=100))
    config = RunConfig(
        name="t", model=ModelConfig(source=str(tokenizer_folder)), data=ClassificationData(source=source)
    )
    data = build_data(config, SimpleNamespace(print=lambda text: None))  # type: ignore[arg-type]
    texts = read_splits(config.data).train.texts
    ids = np.array([5, 0, 33])
    expected = data.tokenizer([texts[i] for i in ids], padding=True, return_tensors="pt")
    batch = data.collate(data.train, ids)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].tolist() == expected[name].tolist()
    assert batch["labels"].tolist() == data.train.labels[ids].tolist()


def test_no_ids_make_a_dummy_example_that_is_no_target() -> None:
    split = Split(np.array([7, 8, 9], np.int32), np.array([0, 2, 3]), None, np.array([1, 0]))
    data = ClassificationSet(split, split, None, ("a", "b"), None)
    batch = data.collate(split, np.array([], np.int64))
    assert batch["input_ids"].tolist() == [[7, 8]] and batch["labels"].tolist() == [-100]
