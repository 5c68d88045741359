"""Every format gives the same rows with the place they came from, and broken files say what is wrong where."""

import gzip
import json
from pathlib import Path

import pytest

from trainer.data.tables import is_file_source, read_table
from trainer.errors import DataError

ROWS = [("a good film", "positive"), ('it said "no", twice', "negative")]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"reviews{suffix}"
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [r[0] for r in ROWS], "label": [r[1] for r in ROWS]}), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(lines) + "\n")
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    else:
        d = "\t" if suffix == ".tsv" else ","
        path.write_text(f'text{d}label\na good film{d}positive\n"it said ""no"", twice"{d}negative\n')
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    table = read_table(str(write(tmp_path, suffix)))
    assert table.columns == ("text", "label")
    assert [(row.values["text"], row.values["label"]) for row in table.rows] == ROWS


def test_a_row_knows_its_line_even_below_a_cell_of_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"two\nlines",a\nthree,b\n\nfive,c\n')
    table = read_table(str(path))
    assert [table.place(row) for row in table.rows] == ["x.csv:2", "x.csv:4", "x.csv:6"]


def test_a_broken_json_line_is_a_row_with_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n{"text": \n\n[1]\n')
    rows = read_table(str(path)).rows
    assert [row.line for row in rows] == [1, 2, 4]
    assert (
        rows[0].problem is None and "not JSON" in str(rows[1].problem) and "not a JSON object" in str(rows[2].problem)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\ngood,a\nb\xe4d,b\n", r"x.csv:3: byte 19 \(0xe4\) is not UTF-8"),
        ("x.csv", b"", "the file is empty"),
        ("x.csv", b"text,label\n", "no rows below the header"),
        ("x.parquet", b"not parquet", "not a Parquet file"),
        ("x.xlsx", b"", "the format must be one of .csv, .tsv"),
    ],
)
def test_a_broken_file_is_named_with_the_rule(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(str(tmp_path / name))


def test_a_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"no such file; did you mean .*reviews\.csv"):
        read_table(str(tmp_path / "review.csv"))


def test_an_unreachable_hub_dataset_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing.*is no local file.*give a local \.csv"):
        read_table("nobody/nothing")


def test_paths_are_told_from_hub_names() -> None:
    assert is_file_source("missing/train.csv") and is_file_source("./x") and is_file_source("~/x")
    assert not is_file_source("stanfordnlp/sst2")
