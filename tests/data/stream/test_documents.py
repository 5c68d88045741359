"""What an input names, and what of it cannot be read: hub ids, kinds of files, splits, subsets, and a line that breaks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from trainer.config import LiveData
from trainer.data.stream import live
from trainer.data.stream.documents import list_files, open_dataset, read_documents, read_rows
from trainer.errors import DataError


def texts(name: Path | str, **choice: str) -> list[str]:
    return [document.text for document in read_documents([str(name)], "text", **choice)]


@pytest.mark.parametrize("name", ["mlfoundations/dclm-baseline-1.0", "wikitext", "HuggingFaceFW/fineweb-edu"])
def test_a_hub_id_may_hold_a_dot(name: str) -> None:
    assert list_files(name) is None


@pytest.mark.parametrize("name", ["notes.txt", "a/data.jsonl.gz", "web.JSON", "a/b/c", "./corpus", "data.parquet"])
def test_a_path_that_is_missing_is_no_hub_id(name: str) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        list_files(name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSONL"])
def test_json_lines_are_documents_for_datasets_and_for_live_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(tmp_path / name) == ["one", "two"]
    stream = live.open_dataset(LiveData(source=str(tmp_path / name)))
    assert [row["text"] for row in stream] == ["one", "two"]


def test_json_that_is_no_line_each_is_an_error_with_its_rule(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}], indent=1))
    with pytest.raises(DataError, match=r"a\.json, line 1: not JSON .*; each line must be an object"):
        texts(tmp_path / "a.json")


def test_half_of_a_surrogate_pair_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "b \\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: text holds half of a surrogate pair.*'b \\ud83d'"):
        texts(tmp_path / "a.jsonl")


def rows_of(*words: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(words)})


def test_a_dataset_on_disk_gives_the_split_that_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": rows_of("a"), "test": rows_of("b", "c")}).save_to_disk(saved)
    assert (texts(saved), texts(saved, split="test")) == (["a"], ["b", "c"])
    with pytest.raises(DataError, match=r"--split \(dev\) is none of .*, which has train, test; name one"):
        texts(saved, split="dev")
    with pytest.raises(DataError, match=r"--subset \(en\): .* keeps no subsets"):
        texts(saved, subset="en")
    rows_of("d").save_to_disk(tmp_path / "single")
    assert texts(tmp_path / "single") == ["d"]
    with pytest.raises(DataError, match=r"--split \(train\): .* a single split; leave it out"):
        texts(tmp_path / "single", split="train")


def test_a_dataset_on_disk_without_the_usual_split_is_an_error(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": rows_of("a")}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"--split \(train\) is none of .*, which has test"):
        texts(tmp_path / "saved")


def hub_dataset(folder: Path) -> str:
    """Files as a hub dataset's repository holds them, of two subsets."""
    folder.mkdir()
    for name in ("en", "de"):
        for split in ("train", "test"):
            (folder / f"{name}-{split}.jsonl").write_text(json.dumps({"text": f"{name} {split}"}) + "\n")
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}-train.jsonl}}\n"
        f"  - {{split: test, path: {name}-test.jsonl}}\n"
        for name in ("en", "de")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    return str(folder)


def test_a_hub_dataset_gives_the_subset_and_split_that_are_named(tmp_path: Path) -> None:
    name = hub_dataset(tmp_path / "hub")
    assert [row["text"] for row in open_dataset(name, "de", None)] == ["de train"]
    assert [row["text"] for row in open_dataset(name, "en", "test")] == ["en test"]
    for subset, split in (("fr", None), ("en", "dev"), (None, None)):  # of two subsets, one must be named
        with pytest.raises(DataError, match=r"hub, --subset .* is neither a file nor a dataset that opens: \S+"):
            open_dataset(name, subset, split)


def test_subset_and_split_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"--split \(test\) choose from a hub dataset, and no INPUT is one"):
        read_documents([str(tmp_path / "a.txt")], "text", split="test")


class BreaksAtTheThird:
    """A stream whose line is lost."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        yield {"text": "b"}
        raise ConnectionError("the line was lost")


def test_a_stream_that_breaks_names_the_row() -> None:
    found = read_rows("owner/name", BreaksAtTheThird(), "text")
    assert [next(found).text, next(found).text] == ["a", "b"]
    with pytest.raises(DataError, match=r"owner/name, row 2 cannot be read: the line was lost; run it again"):
        next(found)


def test_live_text_that_breaks_names_the_source() -> None:
    rows = live.LiveRows(BreaksAtTheThird(), Letters(), LiveData(source="owner/name", sequence_length=3))
    rows.take(1)
    with pytest.raises(DataError, match=r"data\.source \(owner/name\) cannot be read on after 2 documents .*was lost"):
        rows.take(1)


@pytest.mark.parametrize(("bad", "words"), [(3, "is int, not text"), ("\ud83d", "holds half of a surrogate pair")])
def test_live_text_that_is_none_names_the_document(bad: Any, words: str) -> None:
    given = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": bad}]
    rows = live.LiveRows(given, Letters(), LiveData(source="owner/name", sequence_length=5))
    assert rows.take(1)["input_ids"].tolist() == [[ord("a"), 0, 0, ord("b"), 0]]
    with pytest.raises(DataError, match=rf"data\.source \(owner/name\), document 4 of this rank: text {words}"):
        rows.take(1)


def test_live_text_may_begin_with_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "two"}\n')
    stream = live.open_dataset(LiveData(source=str(tmp_path / "a.jsonl")))
    assert [row["text"] for row in stream] == [None, "two"]


class Letters:
    """A tokenizer: a token a letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}
