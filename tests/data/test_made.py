"""What is made once: whole or not there, by one of many processes, and again where it was damaged."""

import multiprocessing
from pathlib import Path

import pytest

from trainer.data.made import made_once
from trainer.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path) -> None:
    path.with_name("beside").write_text("dropped")
    with path.with_name("made").open("a") as file:
        file.write("x")
    path.write_text("whole")


def count_calls(_: int) -> str:
    def make(path: Path) -> None:
        with (path.parents[1] / "calls").open("a") as file:
            file.write("x")
        write(path)

    return made_once("thing", make).read_text()


def test_many_processes_make_it_once(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(count_calls, range(8)) == ["whole"] * 8
    assert (cache / "calls").read_text() == "x"
    assert sorted(path.name for path in cache.iterdir() if not path.name.startswith(".")) == ["calls", "thing"]


def test_what_fails_leaves_nothing(cache: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made_once("thing", fail)
    assert not (cache / "thing").exists()
    assert made_once("thing", write).read_text() == "whole"


def test_a_folder_that_lost_a_part_is_made_anew(cache: Path) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "part").write_text("whole")

    def is_whole(folder: Path) -> bool:
        return (folder / "part").exists()

    made_once("thing", make, is_whole=is_whole)
    (cache / "thing" / "part").unlink()
    assert is_whole(made_once("thing", make, is_whole=is_whole))


def test_what_a_killed_call_left_is_cleared(cache: Path) -> None:
    (cache / ".making-thing").mkdir(parents=True)
    (cache / ".making-thing" / "thing").write_text("half")
    assert made_once("thing", write).read_text() == "whole"
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == ["thing"]


def test_a_cache_that_cannot_be_written_is_said(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be written: .*; set SAMESTEP_CACHE"):
        made_once("thing", write)
