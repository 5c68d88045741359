"""Shards behind a URL: verified, shared, bounded on disk, tried again, and never a hang or a wrong token."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest

from tests.tiny import tiny_tokens
from trainer.data.stream import reader, remote
from trainer.data.stream.reader import Stream, StreamSettings
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.shards import read_manifest
from trainer.errors import DataError

SETTINGS = StreamSettings(32, "best_fit", window=2, max_epochs=2)


class UnreliableFileSystem(fsspec.AbstractFileSystem):
    """Memory that fails, cuts and changes what is read, as its class is told; counts what it gives."""

    protocol = "unreliable"
    store: ClassVar[dict[str, bytes]] = {}
    failures: ClassVar[Counter[str]] = Counter()
    """File name -> how often reading still fails."""
    damage: ClassVar[dict[str, tuple[str, int]]] = {}
    """File name -> (cut or flip, how often still)."""
    given: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unreliable://").strip("/")

    @classmethod
    def give(cls, path: str, content: bytes) -> bytes:
        name = path.rpartition("/")[2]
        cls.given[name] += 1
        if cls.failures[name] > 0:
            cls.failures[name] -= 1
            raise ConnectionError("the line was lost")
        kind, left = cls.damage.get(name, ("", 0))
        if left:
            cls.damage[name] = (kind, left - 1)
            return content[: len(content) // 2] if kind == "cut" else bytes([content[0] ^ 1]) + content[1:]
        return content

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return self.give(path, self.store[path])

    def exists(self, path: str, **_: Any) -> bool:
        return self._strip_protocol(path) in self.store

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return io.BytesIO(self.cat_file(path))


fsspec.register_implementation("unreliable", UnreliableFileSystem, clobber=True)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset on disk, and the same behind unreliable://tokens; places are worked out few at a time, as its shards are tiny."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(reader, "SEGMENT", 2)
    folder = tiny_tokens(tmp_path / "tokens", documents=100)
    for path in folder.iterdir():
        UnreliableFileSystem.store[f"/tokens/{path.name}"] = path.read_bytes()
    for table in (UnreliableFileSystem.failures, UnreliableFileSystem.damage, UnreliableFileSystem.given):
        table.clear()
    yield folder
    UnreliableFileSystem.store.clear()


def open_remote(tmp_path: Path, limit_bytes: float = 1e9) -> RemoteDataset:
    return RemoteDataset("unreliable://tokens", tmp_path / "cache", limit_bytes=limit_bytes)


def read_all(stream: Stream) -> np.ndarray:
    return np.concatenate([stream.batch([sample])["input_ids"] for sample in range(2 * stream.rows[0])])


def shard_files(found: RemoteDataset) -> set[str]:
    return {path.name for path in found.folder.glob("shard-*.bin")}


def wait(found: RemoteDataset) -> None:
    """For the downloads ahead."""
    for thread in found.downloads:
        thread.join(60)


def bytes_held(folder: Path) -> int:
    """Of whole shards; another thread may be deleting one."""
    total = 0
    for path in folder.glob("*.bin"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_remote_tokens_are_the_local_ones(dataset: Path, tmp_path: Path) -> None:
    local, far = Stream([dataset], SETTINGS), Stream([open_remote(tmp_path)], SETTINGS)
    assert np.array_equal(read_all(far), read_all(local))
    assert far.identity == local.identity  # known by content, not by place
    shards = [shard.file for shard in read_manifest(dataset).shards]
    assert {name: UnreliableFileSystem.given[name] for name in shards} == dict.fromkeys(shards, 1)


def test_only_what_is_needed_is_fetched(dataset: Path, tmp_path: Path) -> None:
    found = open_remote(tmp_path)
    Stream([found], SETTINGS).batch([0])
    wait(found)
    assert 1 <= len(shard_files(found)) <= 2 * SETTINGS.window < len(read_manifest(dataset).shards)


def test_a_download_that_ends_while_room_is_counted_is_counted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks its file is renamed; whoever missed it would fill the disk beyond the limit."""
    found = open_remote(tmp_path)
    shard = found.manifest.shards[0]
    found.part(shard).touch()
    exists = Path.exists

    def look(path: Path) -> bool:
        seen = exists(path)
        if exists(found.part(shard)):
            found.part(shard).replace(found.folder / shard.file)
        return seen

    monkeypatch.setattr(Path, "exists", look)
    assert found.is_held(shard)


def test_the_disk_is_bounded_and_shards_needed_soon_are_kept(dataset: Path, tmp_path: Path) -> None:
    sizes = [2 * shard.tokens for shard in read_manifest(dataset).shards]
    limit = 3.5 * max(sizes)
    found = open_remote(tmp_path, limit_bytes=limit)
    found.require_room(SETTINGS.window)
    stream, local = Stream([found], SETTINGS), Stream([dataset], SETTINGS)
    most = 0
    for sample in range(stream.rows[0]):
        assert np.array_equal(stream.batch([sample])["input_ids"], local.batch([sample])["input_ids"])
        most = max(most, bytes_held(found.folder))
    assert 0 < most <= limit
    given = [UnreliableFileSystem.given[shard.file] for shard in read_manifest(dataset).shards]
    assert sum(given) <= 2 * len(given), given  # within one pass, a shard is rarely fetched twice
    with pytest.raises(DataError, match=r"data\.cache_gb .* cannot hold 2 shards"):
        open_remote(tmp_path, limit_bytes=max(sizes)).require_room(2)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.bin", "shard-00000.ends"])
def test_three_failures_and_then_it_works(name: str, dataset: Path, tmp_path: Path) -> None:
    UnreliableFileSystem.failures[name] = 3
    far = Stream([open_remote(tmp_path)], SETTINGS)
    assert np.array_equal(read_all(far), read_all(Stream([dataset], SETTINGS)))


@pytest.mark.parametrize("kind", ["cut", "flip"])
@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00000.ends"])
def test_damage_on_the_way_is_found_and_fetched_again(name: str, kind: str, dataset: Path, tmp_path: Path) -> None:
    UnreliableFileSystem.damage[name] = (kind, 2)
    far = Stream([open_remote(tmp_path)], SETTINGS)
    assert np.array_equal(read_all(far), read_all(Stream([dataset], SETTINGS)))


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.bin", "shard-00001.ends"])
def test_a_remote_that_never_works_is_an_error_that_names_url_and_file(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    UnreliableFileSystem.failures[name] = 10**6
    with pytest.raises(DataError, match=rf"unreliable://tokens/{name} could not be read in 5 tries: the line was lost"):
        read_all(Stream([open_remote(tmp_path)], SETTINGS))
    found = next((tmp_path / "cache").rglob("manifest.json"), None)
    assert found is None or not (found.parent / name).exists()


def test_lasting_damage_is_an_error(dataset: Path, tmp_path: Path) -> None:
    UnreliableFileSystem.damage["shard-00001.bin"] = ("flip", 10**6)
    with pytest.raises(DataError, match=r"shard-00001\.bin could not be read .* not what the manifest states"):
        read_all(Stream([open_remote(tmp_path)], SETTINGS))


def test_a_missing_file_and_an_unknown_protocol_are_errors(dataset: Path, tmp_path: Path) -> None:
    del UnreliableFileSystem.store["/tokens/shard-00001.bin"]
    with pytest.raises(DataError, match=r"shard-00001\.bin does not exist"):
        read_all(Stream([open_remote(tmp_path)], SETTINGS))
    with pytest.raises(DataError, match="Protocol not known"):
        RemoteDataset("nosuch://tokens", tmp_path, limit_bytes=1e9)


def test_a_cached_shard_that_was_changed_is_found_at_first_use(dataset: Path, tmp_path: Path) -> None:
    found = open_remote(tmp_path)
    read_all(Stream([found], SETTINGS))
    path = found.folder / "shard-00002.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002\.bin: bytes from 0 on were changed"):
        read_all(Stream([open_remote(tmp_path)], SETTINGS))


def test_a_cached_shard_that_a_power_cut_left_short_is_fetched_again(dataset: Path, tmp_path: Path) -> None:
    whole = read_all(Stream([open_remote(tmp_path)], SETTINGS))
    found = open_remote(tmp_path)
    (found.folder / "shard-00002.bin").write_bytes(b"")
    assert np.array_equal(read_all(Stream([found], SETTINGS)), whole)


def test_a_whole_copy_that_another_process_fetched_meanwhile_is_not_discarded(dataset: Path, tmp_path: Path) -> None:
    found = open_remote(tmp_path)
    read_all(Stream([found], SETTINGS))
    path = found.folder / found.manifest.shards[2].file
    content = path.read_bytes()
    found.discard(2)
    assert path.read_bytes() == content
    for damaged in (content[:-1], content + bytes(2**20)):
        path.write_bytes(damaged)
        found.discard(2)
        assert not path.exists()


def test_what_is_given_up_is_closed(dataset: Path, tmp_path: Path) -> None:
    """An open file takes its room on the disk as long as it is open."""
    found = open_remote(tmp_path, limit_bytes=3.5 * max(2 * shard.tokens for shard in read_manifest(dataset).shards))
    stream, most = Stream([found], SETTINGS), 0
    for sample in range(stream.rows[0]):
        stream.batch([sample])
        most = max(most, sum(not reader.path.exists() for reader in stream.sources[0].readers.values()))
    assert (
        most <= 3 < len(read_manifest(dataset).shards) - 3
    )  # what downloads ahead gave up since the last shard was opened


def test_a_download_that_was_killed_makes_no_room(dataset: Path, tmp_path: Path) -> None:
    size = max(2 * shard.tokens for shard in read_manifest(dataset).shards)
    found = open_remote(tmp_path, limit_bytes=2.5 * size)
    for number in (5, 6):
        (found.folder / f".shard-{number:05d}.bin.part").write_bytes(b"half")
    found.fetch(0, [0, 1, 2])
    found.fetch(1, [0, 1, 2])
    assert shard_files(found) == {"shard-00001.bin"}  # beside two parts there is room for none, and one is needed


def test_what_a_killed_download_left_is_never_read(dataset: Path, tmp_path: Path) -> None:
    found = open_remote(tmp_path)
    (found.folder / ".shard-00000.bin.part").write_bytes(b"half")
    (found.folder / ".shard-00001.bin.part").write_bytes(b"")
    assert np.array_equal(read_all(Stream([found], SETTINGS)), read_all(Stream([dataset], SETTINGS)))
    wait(found)
    assert not list(found.folder.glob("*.part"))


def test_several_readers_fetch_a_shard_once(dataset: Path, tmp_path: Path) -> None:
    seen: list[np.ndarray] = []
    readers = [Stream([open_remote(tmp_path)], SETTINGS) for _ in range(4)]
    threads = [threading.Thread(target=lambda stream=stream: seen.append(read_all(stream))) for stream in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 4
    assert all(np.array_equal(one, seen[0]) for one in seen)
    for shard in read_manifest(dataset).shards:
        assert UnreliableFileSystem.given[shard.file] == 1


def test_a_cache_that_cannot_be_written_is_an_error(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"set data\.cache"):
        open_remote(tmp_path)


def test_two_passes_give_up_the_shard_that_is_needed_last_and_not_the_one_used_longest_ago(
    dataset: Path, tmp_path: Path
) -> None:
    shards = read_manifest(dataset).shards
    sizes = [2 * shard.tokens for shard in shards]
    limit, uses = 3.5 * max(sizes), [*range(len(shards))] * 2
    found = open_remote(tmp_path, limit_bytes=limit)
    for place, number in enumerate(uses):
        found.fetch(number, uses[place:])
        assert bytes_held(found.folder) <= limit
    fetched = sum(UnreliableFileSystem.given[shard.file] for shard in shards)
    used_longest_ago = fetches(uses, sizes, limit, lambda shard, place: -latest(uses[:place], shard))
    needed_last = fetches(uses, sizes, limit, lambda shard, place: first(uses[place:], shard))
    assert fetched == needed_last < used_longest_ago == len(uses)


def fetches(uses: list[int], sizes: list[int], limit: float, rank: Callable[[int, int], int]) -> int:
    """How often a cache of so many bytes fetches, which gives up the shard of the highest rank(shard, place in `uses`)."""
    held: set[int] = set()
    count = 0
    for place, number in enumerate(uses):
        if number not in held:
            count += 1
            while held and sum(sizes[shard] for shard in held | {number}) > limit:
                held.remove(max(held, key=lambda shard: rank(shard, place)))
            held.add(number)
    return count


def first(uses: list[int], shard: int) -> int:
    """Uses until it is used; beyond all where it is not."""
    return uses.index(shard) if shard in uses else len(uses)


def latest(uses: list[int], shard: int) -> int:
    """Place of its last use."""
    return max(place for place, used in enumerate(uses) if used == shard)
