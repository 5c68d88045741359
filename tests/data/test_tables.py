"""Every format gives the same columns with the place of each row, and broken files say what is wrong where."""

import json
import os
from pathlib import Path

import pytest

from trainer.data.tables import READERS, Table, read_file
from trainer.errors import DataError

COLUMNS = {"data.text": "text", "data.label": "label"}
ROWS = {
    "text": ["a good film", 'it said "no", twice', "näive\u2028line"],
    "label": ["positive", "negative", "negative"],
}


def write(folder: Path, suffix: str) -> Path:
    """The rows of ROWS, with a column that nobody asks for."""
    path = folder / f"reviews{suffix}"
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": [1, 2, 3], **ROWS}), path)
    elif suffix == ".jsonl":
        records = [{"id": 1, "text": t, "label": w} for t, w in zip(ROWS["text"], ROWS["label"], strict=True)]
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [
            f'{number}{mark}"{text.replace(chr(34), chr(34) * 2)}"{mark}{label}'
            for number, text, label in zip(range(3), ROWS["text"], ROWS["label"], strict=True)
        ]
        path.write_text("\n".join([f"id{mark}text{mark}label", *lines]) + "\n", encoding="utf-8")
    return path


def read(folder: Path, name: str, content: str | bytes) -> Table:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, COLUMNS)


def places(table: Table, folder: Path) -> list[str]:
    return [table.place(line).removeprefix(f"{folder}{os.sep}") for line in table.lines]


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_columns(suffix: str, tmp_path: Path) -> None:
    table = read_file(write(tmp_path, suffix), COLUMNS)
    assert {name: list(values) for name, values in table.columns.items()} == ROWS
    assert len(table) == 3 and not table.malformed


def test_four_formats_are_read() -> None:
    assert tuple(READERS) == (".csv", ".tsv", ".jsonl", ".parquet")


def test_a_row_knows_its_line_below_fields_of_several_lines_and_blank_lines(tmp_path: Path) -> None:
    table = read(tmp_path, "x.csv", 'text,label\n"two\nlines",a\nthree,b\n\n\nfive,"c\n\n"\nsix,d\n')
    assert places(table, tmp_path) == ["x.csv:2", "x.csv:4", "x.csv:7", "x.csv:10"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system_and_a_byte_order_mark_are_read(ending: str, tmp_path: Path) -> None:
    table = read(tmp_path, "x.csv", b"\xef\xbb\xbf" + ending.join(["text,label", "one,a", "two,b", ""]).encode())
    assert table.columns == {"text": ["one", "two"], "label": ["a", "b"]}
    assert places(table, tmp_path) == ["x.csv:2", "x.csv:3"]


def test_rows_of_parquet_are_numbered(tmp_path: Path) -> None:
    assert places(read_file(write(tmp_path, ".parquet"), COLUMNS), tmp_path) == [
        f"reviews.parquet row {number}" for number in (1, 2, 3)
    ]


def test_a_text_of_any_size_is_read(tmp_path: Path) -> None:
    long_text = "word " * 100_000
    assert read(tmp_path, "x.csv", f"text,label\n{long_text},a\n").columns["text"] == [long_text]


def test_rows_with_too_many_or_too_few_fields_are_malformed(tmp_path: Path) -> None:
    table = read(tmp_path, "x.csv", "text,label\nwell, really,a\nfine,b\nalone\n")
    assert [(row.line, row.reason) for row in table.malformed] == [
        (2, "3 fields where the header has 2"),
        (4, "1 fields where the header has 2"),
    ]
    assert table.columns["text"] == ["fine"] and len(table) == 3


def test_lines_that_are_no_json_object_are_malformed(tmp_path: Path) -> None:
    content = '{"text": "a", "label": "b"}\n{"text": \n\n[1]\n' + "[" * 100_000 + "\n"
    table = read(tmp_path, "x.jsonl", content)
    assert [row.line for row in table.malformed] == [2, 4, 5]
    assert table.malformed[0].reason.startswith("not JSON: Expecting value at column")
    assert table.malformed[1].reason == "a JSON list where an object must be (it holds '[1]')"
    assert table.lines == [1]


def test_a_field_that_a_json_object_lacks_is_none(tmp_path: Path) -> None:
    table = read(tmp_path, "x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n')
    assert table.columns["label"] == ["b", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            b"text,label\ngood,a\nb\xe4d,b\n",
            r"x\.csv:3: byte 19 \(0xe4\) is not UTF-8; .*iconv -f WINDOWS-1252",
        ),
        ("x.csv", "text,label\ngood,a\n".encode("utf-16"), r"x\.csv:1: byte 0 .*iconv -f UTF-16"),
        ("x.csv", b"", "x.csv is empty"),
        ("x.jsonl", b"\n \n", "x.jsonl is empty"),
        ("x.csv", b"text,label\n", "x.csv holds no rows"),
        (
            "x.csv",
            b'text,label\nfine,a\n"never closed,b\nmore,a\n',
            r"x\.csv:3: broken quoting in the row that starts here",
        ),
        ("x.tsv", b'text\tlabel\n"Fine" film\ta\n', r"x\.tsv:2: broken quoting"),
        ("x.parquet", b"not parquet", "x.parquet is no Parquet file that can be read"),
        ("x.xlsx", b"PK", r"x\.xlsx must be one of \.csv \.tsv \.jsonl \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_rule_and_fix(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            "sentence,labels\nfine,a\n",
            r"data\.text \(text\): .*x\.csv has no such column; set data\.text to one of them; data\.label \(label\): "
            r".*; did you mean data\.label=labels\?; its columns are sentence, labels",
        ),
        ("x.csv", "Text,Label\nfine,a\n", r"did you mean data\.text=Text\?"),
        ("x.csv", "text\tlabel\nfine\ta\n", "separated by tabs: name it .tsv"),
        ("x.csv", "text;label\nfine;a\n", "separated by semicolons: write it with commas"),
        ("x.tsv", "text,label\nfine,a\n", "separated by commas: name it .csv"),
        ("x.csv", "good film,positive\nbad film,negative\n", "the first line must name the columns"),
        ("x.csv", "text,label,text\nfine,a,b\n", r"data\.text \(text\): .* has 2 columns of that name; rename one"),
        ("x.jsonl", '{"text": "fine", "rating": 3}\n', r"data\.label \(label\): .* its columns are text, rating"),
    ],
)
def test_a_missing_column_names_setting_columns_and_the_nearest(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content)


def test_a_folder_lists_the_files_in_it(tmp_path: Path) -> None:
    write(tmp_path, ".csv")
    with pytest.raises(DataError, match=r"is a folder; give one file .*; in it are reviews\.csv"):
        read_file(tmp_path, COLUMNS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv")
    path.chmod(0)
    with pytest.raises(DataError, match=r"reviews\.csv cannot be read: Permission denied"):
        read_file(path, COLUMNS)
