"""Shards behind a URL when this node or the line misbehaves: reads that hang, locks that stay, disks that are full."""

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from filelock import FileLock

from tests.data.stream.test_remote import SETTINGS, read_all
from tests.tiny import tiny_tokens
from trainer.data.stream import reader, remote
from trainer.data.stream.reader import Stream
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.shards import read_manifest
from trainer.errors import DataError


class SlowFileSystem(fsspec.AbstractFileSystem):
    """A folder on disk whose files hang, or trickle, as its class is told."""

    protocol = "slow"
    hangs: ClassVar[Counter[str]] = Counter()
    """File name, or "open" and it -> how often that still hangs."""
    damage: ClassVar[Counter[str]] = Counter()
    """File name -> how often half of it is given still."""
    pause_s: ClassVar[float] = 0.0
    """Before every PIECE of a shard."""
    released: ClassVar[threading.Event] = threading.Event()

    PIECE = 200

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("slow://").strip("/")

    @classmethod
    def give(cls, path: str) -> bytes:
        """The file's bytes; a hang ends when the test does."""
        content = Path(cls._strip_protocol(path)).read_bytes()
        name = path.rpartition("/")[2]
        cls.hang(name)
        if cls.damage[name] > 0:
            cls.damage[name] -= 1
            return content[: len(content) // 2]
        return content

    @classmethod
    def hang(cls, what: str) -> None:
        if cls.hangs[what] > 0:
            cls.hangs[what] -= 1
            cls.released.wait()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        return self.give(path)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self.hang(f"open {path.rpartition('/')[2]}")
        return Trickle(path)


class Trickle(io.RawIOBase):
    """An open file of SlowFileSystem: it hangs when it is read."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.content: io.BytesIO | None = None

    def read(self, size: int = -1) -> bytes:
        if self.content is None:
            self.content = io.BytesIO(SlowFileSystem.give(self.path))
        time.sleep(SlowFileSystem.pause_s)
        return self.content.read(min(size, SlowFileSystem.PIECE))


fsspec.register_implementation("slow", SlowFileSystem, clobber=True)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset on disk, which slow:// gives too; patience is short."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "STALL_S", 0.15)
    monkeypatch.setattr(reader, "SEGMENT", 2)
    SlowFileSystem.released.clear()
    SlowFileSystem.pause_s = 0.0
    for table in (SlowFileSystem.hangs, SlowFileSystem.damage):
        table.clear()
    yield tiny_tokens(tmp_path / "tokens", documents=100)
    SlowFileSystem.released.set()


def open_slow(dataset: Path, limit_bytes: float = 1e9) -> RemoteDataset:
    return RemoteDataset(f"slow:/{dataset}", dataset.parent / "cache", limit_bytes=limit_bytes)


def read_local(dataset: Path) -> np.ndarray:
    return read_all(Stream([dataset], SETTINGS))


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "shard-00001.bin", "shard-00001.ends"])
def test_a_remote_that_hangs_is_an_error_in_bounded_time(name: str, dataset: Path) -> None:
    SlowFileSystem.hangs[name] = 10**6
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"{name} could not be read in 5 tries: nothing came for 0\.15 s"):
        read_all(Stream([open_slow(dataset)], SETTINGS))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.bin", "open shard-00001.bin", "shard-00001.ends"])
def test_what_hung_is_asked_for_again_and_may_come_late(name: str, dataset: Path) -> None:
    SlowFileSystem.hangs[name] = 3
    far = Stream([open_slow(dataset)], SETTINGS)
    found = read_all(far)
    SlowFileSystem.released.set()  # those that hung go on, and write no more
    time.sleep(0.1)
    assert np.array_equal(found, read_local(dataset))
    assert np.array_equal(read_all(Stream([open_slow(dataset)], SETTINGS)), found)


def test_a_slow_line_that_still_gives_is_waited_for(dataset: Path) -> None:
    SlowFileSystem.pause_s = 0.06
    shard = read_manifest(dataset).shards[0]
    assert (
        2 * shard.tokens / SlowFileSystem.PIECE * SlowFileSystem.pause_s > remote.STALL_S
    )  # in all, not between bytes
    found = open_slow(dataset)
    found.fetch(0, [0])
    assert (found.folder / shard.file).read_bytes() == (dataset / shard.file).read_bytes()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_small_files_cut_on_the_way_are_fetched_again(name: str, dataset: Path) -> None:
    SlowFileSystem.damage[name] = 2
    found = open_slow(dataset)
    assert (found.folder / name).read_bytes() == (dataset / name).read_bytes()


def test_a_cached_tokenizer_that_was_cut_is_replaced_and_lasting_damage_is_an_error(dataset: Path) -> None:
    path = open_slow(dataset).folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:50])
    assert open_slow(dataset).manifest == read_manifest(dataset)
    assert path.read_bytes() == (dataset / "tokenizer.json").read_bytes()
    path.unlink()
    SlowFileSystem.damage["tokenizer.json"] = 10**6
    with pytest.raises(DataError, match=r"tokenizer\.json could not be read in 5 tries: its content is not what"):
        open_slow(dataset)
    SlowFileSystem.damage["manifest.json"] = 10**6
    with pytest.raises(DataError, match=r"manifest\.json could not be read in 5 tries: .*cannot be read"):
        open_slow(dataset)
    (dataset / "tokenizer.json").unlink()
    SlowFileSystem.damage.clear()
    open_slow(dataset)  # another source may have it


def test_a_lock_that_another_process_keeps_is_an_error_but_not_while_its_download_grows(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LOCK_S", 0.2)
    found = open_slow(dataset)
    lock = FileLock(found.folder / ".shard-00000.bin.lock", thread_local=False)
    lock.acquire()
    with pytest.raises(DataError, match=r"shard-00000\.bin\.lock, of slow:.*has been held by another process"):
        found.fetch(0, [0])

    def download() -> None:
        for size in range(8):
            (found.folder / ".shard-00000.bin.part").write_bytes(b"x" * size)
            time.sleep(0.1)
        lock.release()

    thread = threading.Thread(target=download)
    thread.start()
    found.fetch(0, [0])
    thread.join()
    assert (found.folder / "shard-00000.bin").exists()


class GivenUpAtOnce(RemoteDataset):
    """Whose shards another process gives up as soon as they are there, twice."""

    left = 2

    def fetch(self, number: int, *words: Any, **settings: Any) -> None:
        super().fetch(number, *words, **settings)
        if self.left:
            self.left -= 1
            (self.folder / self.manifest.shards[number].file).unlink(missing_ok=True)


def test_a_shard_given_up_before_it_was_open_is_fetched_again(dataset: Path) -> None:
    found = GivenUpAtOnce(f"slow:/{dataset}", dataset.parent / "cache", limit_bytes=1e9)
    assert np.array_equal(read_all(Stream([found], SETTINGS)), read_local(dataset))
    assert found.left == 0


def test_a_full_disk_is_said_at_once(dataset: Path) -> None:
    found = open_slow(dataset)
    (found.folder / ".shard-00000.bin.try").symlink_to("/dev/full")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cache, the cache of slow:.*No space left on device; free space there or set"):
        found.fetch(0, [0])
    assert time.monotonic() - began < 1
    assert not list(found.folder.glob("*.bin"))
