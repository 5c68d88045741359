"""Every row of a file is a sample or a bad row with its place; labels of any type get one name."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ClassificationData
from trainer.data.samples import Samples, label_name, label_set, read_samples
from trainer.data.tables import Table, read_file

GOOD = [{"text": f"sentence {number}", "label": "ab"[number % 2]} for number in range(20)]

BAD = [
    ({"text": "x"}, "missing label", ""),
    ({"text": "x", "label": None}, "missing label", ""),
    ({"text": "x", "label": "  "}, "missing label", ""),
    ({"text": "x", "label": float("nan")}, "missing label", ""),
    ({"label": "a"}, "empty text", ""),
    ({"text": " \t", "label": "a"}, "empty text", ""),
    ({"text": "x", "label": "c"}, "unknown label", "'c'"),
    ({"text": "x", "label": "aa"}, "unknown label", "'aa', did you mean 'a'?"),
    ({"text": 3, "label": "a"}, "wrong type", "the text is a int: 3"),
    (
        {"text": "x \ud83d", "label": "a"},
        "broken text",
        "the text holds half of a surrogate pair, which is no character: 'x \\ud83d'",
    ),
    ({"text": ["x"], "label": "a"}, "wrong type", "the text is a list: ['x']"),
    ({"text": "x", "label": ["a"]}, "wrong type", "a label must be a word or an integer, not ['a']"),
    ({"text": "x", "label": 0.5}, "wrong type", "a label must be a word or an integer, not 0.5"),
    (["x", "a"], "malformed row", 'a JSON list where an object must be (it holds \'["x", "a"]\')'),
]


def table_of(path: Path, rows: list[Any], **columns: str) -> Table:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(path, {"data.text": "text", "data.label": "label", **columns})


def read(table: Table, **settings: Any) -> tuple[Samples, list[Any], str | None]:
    data = ClassificationData(source=table.name, **settings)
    return read_samples(table, data, label_set(table, data), setting="data.source")


@pytest.mark.parametrize(("row", "kind", "detail"), BAD)
def test_a_bad_row_is_named_with_kind_file_and_line(row: Any, kind: str, detail: str, tmp_path: Path) -> None:
    table = table_of(tmp_path / "x.jsonl", [*GOOD, row])
    samples, bad, problem = read(table, labels=("a", "b"))
    assert [(one.line, one.kind, one.detail) for one in bad] == [(21, kind, detail)]
    assert len(samples) == 20 and problem is not None
    assert "1 of 21 rows cannot be used, more than data.max_bad_fraction (0)" in problem
    place = f"{kind}: 1\n    {tmp_path / 'x.jsonl'}:21" + (f": {detail}" if detail else "")
    assert place in problem and "correct them, or set data.max_bad_fraction=0.048 to leave them out" in problem


def test_bad_rows_are_counted_by_kind_and_the_first_of_each_are_shown(tmp_path: Path) -> None:
    table = table_of(tmp_path / "x.jsonl", [row for row, _, _ in BAD] * 50 + GOOD)
    samples, bad, problem = read(table, labels=("a", "b"))
    assert len(bad) == 700 and len(samples) == 20 and problem is not None
    for count in (
        "missing label: 200",
        "empty text: 100",
        "unknown label: 100",
        "wrong type: 200",
        "broken text: 50",
        "malformed row: 50",
    ):
        assert count in problem
    assert len(problem.split("\n")) <= 15
    assert "the labels are a, b: data.labels sets them" in problem


@pytest.mark.parametrize(("fraction", "accepted"), [(0.0, False), (0.28, False), (0.29, True), (1.0, True)])
def test_a_share_of_bad_rows_up_to_the_limit_is_left_out(fraction: float, accepted: bool, tmp_path: Path) -> None:
    rows = GOOD * 4
    table = table_of(tmp_path / "x.jsonl", [{"text": "", "label": "a"}] * 29 + rows[:71])
    samples, bad, problem = read(table, max_bad_fraction=fraction)
    assert (problem is None) == accepted
    assert (len(samples), len(bad)) == (71, 29)


def test_a_file_of_bad_rows_alone_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    table = table_of(tmp_path / "x.jsonl", [{"text": "", "label": "a"}] * 3)
    problem = read(table, labels=("a", "b"), max_bad_fraction=1.0)[2]
    assert problem is not None and "3 of 3 rows cannot be used" in problem


@pytest.mark.parametrize("hidden", [None, -1, "-1", ""])
def test_data_without_any_label_says_so(hidden: Any, tmp_path: Path) -> None:
    table = table_of(tmp_path / "x.jsonl", [{"text": "x", "label": hidden}] * 3)
    data = ClassificationData(labels=("a", "b"))
    problem = read_samples(table, data, ("a", "b"), setting="data.test")[2]
    assert problem is not None and "no row has a label in column label" in problem
    assert "set data.test=none" in problem


def test_the_fallback_of_a_hub_test_split_is_a_class_id_without_a_name() -> None:
    table = Table(
        "o/d[test]", "hub dataset", {"text": ["x", "y"], "label": [-1, 0]}, [1, 2], class_names={"label": ("n", "p")}
    )
    samples, bad, _ = read_samples(table, ClassificationData(), ("n", "p"), setting="data.test")
    assert samples.labels.tolist() == [0] and [(row.line, row.kind) for row in bad] == [(1, "missing label")]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a", "a"),
        (" a ", "a"),
        (3, "3"),
        (3.0, "3"),
        ("3", "3"),
        (True, "true"),
        (None, None),
        (float("nan"), None),
        ("", None),
        (0.5, ""),
        (float("inf"), ""),
        ([1], ""),
        ({}, ""),
        (b"a", ""),
    ],
)
def test_a_label_has_one_name_whatever_its_type(value: object, name: str | None) -> None:
    assert label_name(value) == name


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "c"], ("a", "b", "c")), ([10, 2, 0], ("0", "2", "10")), (["10", "2", "x"], ("10", "2", "x"))],
)
def test_the_label_set_is_sorted_and_numbers_by_value(
    labels: list[Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    table = table_of(tmp_path / "x.jsonl", [{"text": "x", "label": label} for label in labels])
    assert label_set(table, ClassificationData()) == names


def test_a_hub_datasets_own_order_of_classes_is_kept_and_settings_overrule_it() -> None:
    table = Table(
        "o/d", "hub dataset", {"text": ["x", "y"], "label": [0, 1]}, [1, 2], class_names={"label": ("pos", "neg")}
    )
    data = ClassificationData()
    assert label_set(table, data) == ("pos", "neg")
    other = ClassificationData(labels=("neg", "pos"))
    assert read_samples(table, other, label_set(table, other), setting="data.source")[0].labels.tolist() == [1, 0]


def test_the_order_of_labels_is_that_of_the_settings(tmp_path: Path) -> None:
    samples, _, _ = read(table_of(tmp_path / "x.jsonl", GOOD), labels=("b", "a"))
    assert samples.labels[:2].tolist() == [1, 0]


def test_the_second_text_of_a_pair_is_read_and_checked(tmp_path: Path) -> None:
    rows: list[Any] = [{**row, "other": f"other {number}"} for number, row in enumerate(GOOD)]
    rows[3]["other"] = ""
    table = table_of(tmp_path / "x.jsonl", rows, **{"data.text_pair": "other"})
    samples, bad, _ = read(table, text_pair="other")
    assert samples.pairs is not None and samples.pairs[4] == "other 5"
    assert [(row.line, row.kind) for row in bad] == [(4, "empty text")]
