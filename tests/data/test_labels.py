"""What a label cell says for several labels and for numbers, how such data is split and weighed, and each bad cell's message."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet, table
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.utils.class_weight import compute_class_weight

from tests.tiny import tiny_bert, tiny_targets
from trainer.config import ClassificationData, ModelConfig, RunConfig
from trainer.data.classify import RawSplits, build_data, read_splits
from trainer.data.samples import label_set, read_samples
from trainer.data.sources import hub_table
from trainer.data.split import plain_split
from trainer.data.tables import read_file
from trainer.errors import ConfigError, DataError


def write(path: Path, labels: list[Any]) -> str:
    rows = [{"text": f"sentence {number}", "label": label} for number, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_samples(splits: RawSplits) -> dict[str, list[float]]:
    """Text -> its row of values, of all splits together."""
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    return {
        text: row.tolist() for part in parts for text, row in zip(part.texts, part.labels.astype(float), strict=True)
    }


MULTI = [["b", "a"], [], ["c"], "a, b", "c;a", 3, ["3", 3.0], "a"]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        (",", [["a", "b"], [], ["c"], ["a", "b"], ["c;a"], ["3"], ["3"], ["a"]]),
        (";", [["a", "b"], [], ["c"], ["a, b"], ["a", "c"], ["3"], ["3"], ["a"]]),
    ],
)
def test_several_labels_are_a_list_or_a_separated_text(
    separator: str, expected: list[list[str]], tmp_path: Path
) -> None:
    source = write(tmp_path / "x.jsonl", MULTI)
    data = ClassificationData(source=source, target="multi", label_separator=separator)
    splits = read_splits(data)
    oracle = MultiLabelBinarizer(classes=sorted({name for names in expected for name in names})).fit(expected)
    assert splits.label_names == tuple(oracle.classes_)
    assert all_samples(splits) == {
        f"sentence {number}": row.tolist() for number, row in enumerate(oracle.transform(expected).astype(float))
    }


def test_lists_of_a_parquet_file_and_of_hub_class_ids_are_read(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    rows = {"text": [f"text {number}" for number in range(8)], "label": [["x"], ["y", "x"], [], ["y"]] * 2}
    parquet.write_table(table(rows), tmp_path / "x.parquet")
    data = ClassificationData(source=str(tmp_path / "x.parquet"), target="multi")
    expected = {f"text {number}": ([1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0])[number % 4] for number in range(8)}
    assert all_samples(read_splits(data)) == expected
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=["x", "y"]))})
    ids = [[("x", "y").index(name) for name in names] for names in rows["label"]]
    hub = hub_table(
        Dataset.from_dict({"text": rows["text"], "label": ids}, features=features),
        "a/b[train]",
        {"data.text": "text", "data.label": "label"},
    )
    names = label_set(hub, data)
    samples, bad, problem = read_samples(hub, data, names, setting="data.source")
    assert (names, bad, problem) == (("x", "y"), [], None)
    assert dict(zip(samples.texts, samples.labels.tolist(), strict=True)) == expected


def test_numbers_are_read_from_numbers_and_from_text(tmp_path: Path) -> None:
    cells = [1, 2.5, "-3", " 4e-1 ", -1, "0"]
    splits = read_splits(
        ClassificationData(
            source=write(tmp_path / "x.jsonl", cells * 6),
            target="regression",
            validation_fraction=0.3,
            test_fraction=0.3,
        )
    )
    numbers = [1.0, 2.5, -3.0, 0.4, -1.0, 0.0]
    assert all_samples(splits) == {f"sentence {number}": [numbers[number % 6]] for number in range(36)}
    assert splits.label_names == ("label",)
    assert splits.train.labels.dtype == np.float64


@pytest.mark.parametrize(
    ("target", "cell", "kind", "detail"),
    [
        ("regression", "good", "wrong type", "a label must be a finite number, not 'good'"),
        ("regression", "1,5", "wrong type", "a label must be a finite number, not '1,5'"),
        ("regression", "inf", "wrong type", "a label must be a finite number, not 'inf'"),
        ("regression", "1e39", "wrong type", "a label must be a finite number, not '1e39'"),
        ("regression", 10**400, "wrong type", "a label must be a finite number, not 1000000000000000000000000"),
        ("regression", True, "wrong type", "a label must be a finite number, not True"),
        ("regression", [1.0], "wrong type", "a label must be a finite number, not [1.0]"),
        ("regression", None, "missing label", ""),
        ("regression", " ", "missing label", ""),
        ("regression", float("nan"), "missing label", ""),
        ("multi", None, "missing label", ""),
        ("multi", " ", "missing label", ""),
        ("multi", ["a", None], "missing label", ""),
        ("multi", [["a"]], "wrong type", "a label must be a word or an integer, not [['a']]"),
        ("multi", {"a": 1}, "wrong type", "a label must be a word or an integer, not {'a': 1}"),
        ("multi", ["a", "alpho"], "unknown label", "'alpho', did you mean 'alpha'?"),
        ("single", ["a"], "wrong type", "a label must be a word or an integer, not ['a']"),
    ],
)
def test_a_bad_label_is_named_with_file_and_line(
    target: Any, cell: Any, kind: str, detail: str, tmp_path: Path
) -> None:
    good: list[Any] = [1.0, 2.0] * 5 if target == "regression" else ["a", "alpha"] * 5
    source = write(tmp_path / "x.jsonl", [*good, cell])
    labels = None if target == "regression" else ("a", "alpha")
    data = ClassificationData(source=source, target=target, labels=labels)
    read = read_file(Path(source), {"data.text": "text", "data.label": "label"})
    _, bad, _ = read_samples(read, data, label_set(read, data), setting="data.source")
    assert [(row.line, row.kind) for row in bad] == [(11, kind)] and bad[0].detail.startswith(detail)
    with pytest.raises(DataError) as error:
        read_splits(data)
    assert f"{kind}: 1\n    {source}:11" + (f": {detail}" if detail else "") in str(error.value)


def test_numbers_that_are_all_the_same_are_refused_by_split(tmp_path: Path) -> None:
    source, test = write(tmp_path / "x.jsonl", [1, 2] * 20), write(tmp_path / "test.jsonl", [-1] * 7)
    with pytest.raises(
        DataError, match=r"data\.label \(label\): all 7 samples of the test split have the value -1, .*"
    ):
        read_splits(ClassificationData(source=source, test=test, target="regression"))


def test_labels_without_a_second_one_are_refused(tmp_path: Path) -> None:
    for cells in ([["a"], []], [[], []]):
        with pytest.raises(DataError, match=r"data\.label \(label\): the only label in .* two or more are needed"):
            read_splits(ClassificationData(source=write(tmp_path / "x.jsonl", cells * 5), target="multi"))


@pytest.mark.parametrize("target", ["multi", "regression"])
def test_a_plain_split_has_exact_sizes_and_a_test_set_of_its_own(target: Any, tmp_path: Path) -> None:
    source = str(tiny_targets(tmp_path / "x.jsonl", rows=101))
    label = "labels" if target == "multi" else "score"
    settings = {"source": source, "label": label, "target": target, "test_fraction": 0.2}
    one, other = (
        read_splits(ClassificationData(validation_fraction=share, **settings))  # type: ignore[arg-type]
        for share in (0.1, 0.3)
    )
    assert [len(part) for part in (one.train, one.validation, one.test) if part is not None] == [71, 10, 20]
    assert [len(part) for part in (other.train, other.validation) if part is not None] == [51, 30]
    assert one.test is not None and other.test is not None and one.test.texts == other.test.texts


def test_a_plain_split_needs_a_training_sample() -> None:
    with pytest.raises(DataError, match=r"would hold 0 of 10 samples; lower data\.validation_fraction"):
        plain_split(10, (5, 5), seed=0)


def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [*["a"] * 30, *["b"] * 7, *["c"] * 13])
    splits = read_splits(ClassificationData(source=source, class_weights="balanced"))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=splits.train.labels)
    assert splits.class_weights is not None
    np.testing.assert_allclose(splits.class_weights, expected, rtol=1e-15)


def test_balanced_weights_of_several_labels_are_the_ratio_of_scikit_learns_two(tmp_path: Path) -> None:
    source = str(tiny_targets(tmp_path / "x.jsonl"))
    splits = read_splits(ClassificationData(source=source, label="labels", target="multi", class_weights="balanced"))
    assert splits.class_weights is not None
    for column, weight in zip(splits.train.labels.T, splits.class_weights, strict=True):
        without, with_label = compute_class_weight("balanced", classes=np.array([0.0, 1.0]), y=column)
        assert weight == pytest.approx(with_label / without, rel=1e-12)


def test_weights_that_do_not_fit_the_labels_found_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", ["a", "b"] * 10)
    with pytest.raises(
        ConfigError, match=r"data\.class_weights \(1, 2, 3\) must be one for each of the 2 labels: a, b; give 2"
    ):
        read_splits(ClassificationData(source=source, class_weights=(1.0, 2.0, 3.0)))
    with pytest.raises(DataError, match=r"data\.class_weights \(balanced\): 'c' is a label of none of the training"):
        read_splits(ClassificationData(source=source, labels=("a", "b", "c"), class_weights="balanced"))
    every = write(tmp_path / "y.jsonl", [["a"], ["a", "b"]] * 10)
    with pytest.raises(DataError, match="'a' is a label of all"):
        read_splits(ClassificationData(source=every, target="multi", class_weights="balanced"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "multi", "label": "labels"}, ["shuffled, data.split_seed 0", "bad", "good", "music"]),
        ({"target": "regression", "label": "score"}, ["shuffled", "std  lowest  highest", "train           112"]),
        (
            {"target": "multi", "label": "labels", "class_weights": (2.0, 1.0, 0.25)},
            ["weights    of the loss, by label: bad 2, good 1, music 0.25"],
        ),
    ],
)
def test_batches_hold_values_and_the_screen_says_what_the_labels_are(
    settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = tiny_bert(tmp_path / "model")
    source = str(tiny_targets(tmp_path / "x.jsonl"))
    config = RunConfig(
        name="t", model=ModelConfig(source=str(folder)), data=ClassificationData(source=source, **settings)
    )
    accelerator: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        data = build_data(config, accelerator)
    assert all(word in screen.getvalue() for word in words), screen.getvalue()
    batch = data.collate(data.train, np.array([3, 5]))
    np.testing.assert_array_equal(batch["values"].numpy(), data.train.labels[[3, 5]])
    assert batch["labels"].tolist() == [0, 0] and str(batch["values"].dtype) == "torch.float32"
    dummy = data.collate(data.train, np.zeros(0, np.int64))
    assert dummy["labels"].tolist() == [-100] and dummy["values"].shape == (1, len(data.label_names))
