"""A token dataset behind a URL: whole shards are copied to this node's disk when they are needed, verified, and given up when needed last.

The folder is named by the dataset's content, so any number of runs share it. All processes of a node use one copy, under a lock for each
file. Invariant: a file under its own name is complete and was verified; readers verify its blocks again.
"""

import errno
import hashlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from trainer.data.stream.patience import Alive, within
from trainer.data.stream.shards import BLOCK, MANIFEST, DatasetManifest, Shard, hash_bytes, parse_manifest, write_file
from trainer.errors import DataError

T = TypeVar("T")

TRIES = 5
FIRST_WAIT_S = 0.5
STALL_S = 120.0
"""A read that gives nothing for so long has failed. Object stores are read in blocks of up to 50 MiB: that is 0.4 MB/s."""
LOCK_S = TRIES * STALL_S
"""A lock that another process keeps twice as long, while its download does not grow, is given up: that one should have failed by then."""
AHEAD = 2
"""Downloads at once, ahead of their use."""
TOKENIZER = "tokenizer.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNLIKE = "its content is not what the manifest states"


class NotThereError(DataError):
    """The URL has no such file."""


def is_url(source: str) -> bool:
    """Whether a source is read through fsspec."""
    return "://" in source


class RemoteDataset:
    """A dataset's folder on this node's disk that fills as shards are asked for. Safe for several threads and processes."""

    def __init__(self, url: str, cache: Path, *, limit_bytes: float) -> None:
        """url: the folder that holds manifest.json. limit_bytes: of shard files kept. DataError where it cannot be reached."""
        self.url, self.limit_bytes, self.cache = url.rstrip("/"), limit_bytes, cache
        self.filesystem, self.root = open_filesystem(self.url)
        place = f"{self.url}/{MANIFEST}"
        content = self.read(MANIFEST, lambda found: bool(parse_manifest(found, place)))
        self.manifest: DatasetManifest = parse_manifest(content, place)
        self.folder = cache / "shards" / hashlib.sha256(content).hexdigest()[:32]
        self.write(MANIFEST, content)
        self.tokenizer()
        self.wanted: deque[tuple[int, Sequence[int]]] = deque()
        self.downloads: list[threading.Thread] = []

    def tokenizer(self) -> None:
        """Let tokenizer.json be on disk, if the URL has one: another source's will do."""

        def is_good(content: bytes) -> bool:
            return hashlib.sha256(content).hexdigest() == self.manifest.tokenizer.sha256

        path = self.folder / TOKENIZER
        if not (path.is_file() and is_good(path.read_bytes())):
            with suppress(NotThereError):
                self.write(TOKENIZER, self.read(TOKENIZER, is_good))

    def require_room(self, shards_at_once: int) -> None:
        """DataError unless so many of the largest shards fit the limit."""
        sizes = sorted((size_of(shard, self.manifest) for shard in self.manifest.shards), reverse=True)
        wanted = sum(sizes[:shards_at_once])
        if wanted > self.limit_bytes:
            raise DataError(
                f"data.cache_gb ({self.limit_bytes / 1e9:g} for {self.url}) cannot hold {shards_at_once} shards, {wanted / 1e9:.2f} GB, "
                "whose rows are shuffled together; raise it, or lower data.shuffle_window"
            )

    def ends(self, shard: Shard) -> None:
        """Let the file of document ends be on disk."""
        if not (self.folder / shard.ends).exists():
            content = self.read(shard.ends, lambda found: hash_bytes(found) == shard.ends_hash)
            self.write(shard.ends, content)

    def fetch(self, number: int, upcoming: Sequence[int], *, ahead: bool = False) -> None:
        """Let a shard's tokens be on disk. upcoming: shards in the order of their next use, for choosing what to give up.

        ahead: not where a shard that is needed sooner would have to go.
        """
        shard = self.manifest.shards[number]
        path = self.folder / shard.file
        if path.exists():
            return
        try:
            with self.locked(shard.file, self.part(shard)):
                if not path.exists() and self.make_room(number, upcoming, ahead=ahead):
                    self.download(shard, path)
        except OSError as error:
            raise self.unwritable(path, error) from None

    def fetch_ahead(self, numbers: Sequence[int], upcoming: Sequence[int]) -> None:
        """Start downloads in place of those not yet begun; one that fails is tried again, and reported, when the shard is needed."""
        missing = [number for number in numbers if not (self.folder / self.manifest.shards[number].file).exists()]
        self.wanted = deque((number, upcoming) for number in missing)
        self.downloads = [thread for thread in self.downloads if thread.is_alive()]
        for _ in range(min(AHEAD, len(missing)) - len(self.downloads)):
            self.downloads.append(threading.Thread(target=self._fetch_wanted, name="shards", daemon=True))
            self.downloads[-1].start()  # a daemon: a process that ends waits for no download

    def _fetch_wanted(self) -> None:
        while True:
            try:
                number, upcoming = self.wanted.popleft()
            except IndexError:
                return
            with suppress(DataError):
                self.fetch(number, upcoming, ahead=True)

    @contextmanager
    def locked(self, name: str, growing: Path) -> Iterator[None]:
        """Hold a lock of this node. DataError where another process keeps it and the file that it writes does not grow."""
        lock, size = FileLock(self.folder / f".{name}.lock"), -1
        while not lock.is_locked:
            try:
                lock.acquire(timeout=LOCK_S)
            except Timeout:
                before, size = size, size_on_disk(growing)
                if size == before:
                    raise DataError(
                        f"{lock.lock_file}, of {self.url}, has been held by another process that does nothing; end it, or set data.cache"
                    ) from None
        try:
            yield
        finally:
            lock.release()

    def make_room(self, number: int, upcoming: Sequence[int], *, ahead: bool) -> bool:
        """Delete the shards that are needed last until one more fits, and claim its place; False where it does not fit ahead of time."""
        ranks = {shard: rank for rank, shard in reversed(list(enumerate(upcoming)))}
        shards, last = self.manifest.shards, len(upcoming)
        with self.locked("room", self.part(shards[number])):
            held = [found for found in range(len(shards)) if found != number and self.is_held(shards[found])]
            kept = sum(size_of(shards[found], self.manifest) for found in held) + size_of(shards[number], self.manifest)
            held.sort(key=lambda found: ranks.get(found, last))
            whole = [
                found for found in held if (self.folder / shards[found].file).exists()
            ]  # what is on its way makes no room
            while whole and kept > self.limit_bytes:
                found = whole.pop()
                if ahead and ranks.get(found, last) < ranks.get(number, last):
                    return False
                (self.folder / shards[found].file).unlink(missing_ok=True)  # who has it open reads on
                kept -= size_of(shards[found], self.manifest)
            self.part(shards[number]).touch()
            return True

    def discard(self, number: int) -> None:
        """Delete the copy of a shard whose size is not what was fetched; not one that another process fetched anew meanwhile."""
        shard = self.manifest.shards[number]
        path = self.folder / shard.file
        try:
            with self.locked(shard.file, self.part(shard)):
                size = size_on_disk(path)
                if size < size_of(shard, self.manifest) or -(-size // BLOCK) != len(shard.blocks):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(path, error) from None

    def part(self, shard: Shard) -> Path:
        """Where a download grows."""
        return self.folder / f".{shard.file}.part"

    def is_held(self, shard: Shard) -> bool:
        """Whether its tokens, or a part of them, take room. The part first: a download that ends meanwhile renames it."""
        return self.part(shard).exists() or (self.folder / shard.file).exists()

    def download(self, shard: Shard, path: Path) -> None:
        """Copy a whole file beside its place, hash every block on the way, rename. Under the file's lock."""
        part, fresh = self.part(shard), self.folder / f".{shard.file}.try"

        def copy(alive: Alive) -> None:
            with self.filesystem.open(f"{self.root}/{shard.file}", "rb") as source:
                alive()  # ends a try that was given up while it opened; below, the file of one that hangs is not written on
                with fresh.open("wb") as target:
                    fresh.replace(part)
                    blocks = []
                    while block := read_block(source, alive):
                        blocks.append(hash_bytes(block))
                        target.write(block)
                    target.flush()
                    os.fsync(target.fileno())  # before it has its name: a power cut leaves no short file under it
            if blocks != shard.blocks:
                raise ValueError(UNLIKE)

        try:
            self.retry(shard.file, copy)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def read(self, name: str, is_good: Callable[[bytes], bool]) -> bytes:
        """A small file, whole. DataError names the URL."""

        def get(alive: Alive) -> bytes:
            found = bytes(self.filesystem.cat_file(f"{self.root}/{name}"))
            if not is_good(found):
                raise ValueError(UNLIKE)
            return found

        return self.retry(name, get)

    def retry(self, name: str, act: Callable[[Alive], T]) -> T:
        """What it returns once it succeeds, with growing pauses; DataError after TRIES, or at once for a missing file and a full disk."""
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                return within(STALL_S, act)
            except Exception as error:  # of any library behind fsspec
                if isinstance(error, OSError) and self.is_of_this_disk(error):
                    raise self.unwritable(self.cache, error) from None
                if isinstance(error, FileNotFoundError):
                    raise NotThereError(f"{self.url}/{name} does not exist; check data.sources") from None
                problem = str(error) or type(error).__name__
        raise DataError(f"{self.url}/{name} could not be read in {TRIES} tries: {problem}")

    def is_of_this_disk(self, error: OSError) -> bool:
        """Whether it is about the cache: trying again would not help."""
        return error.errno in DISK_FULL or str(error.filename or "").startswith(str(self.cache))

    def unwritable(self, path: Path, error: OSError) -> DataError:
        """What to say of a cache that cannot be written."""
        return DataError(
            f"{path}, the cache of {self.url}, cannot be written: {error.strerror or error}; free space there or set data.cache"
        )

    def write(self, name: str, content: bytes) -> None:
        """A small file into the folder, unless it is there; DataError for a cache that cannot be written."""
        path = self.folder / name
        try:
            if path.is_file() and path.read_bytes() == content:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(path, error) from None
        write_file(path, content)


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it). DataError for a protocol that is unknown or needs a package."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"data.sources ({url}): {error}") from None
    return filesystem, str(path)


def read_block(source: Any, alive: Alive) -> bytes:
    """A MiB, or what is left; some files give less than they are asked for."""
    block = b""
    while len(block) < BLOCK and (more := source.read(BLOCK - len(block))):
        alive()
        block += more
    return block


def size_on_disk(path: Path) -> int:
    """Bytes of a file, 0 without one."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def size_of(shard: Shard, manifest: DatasetManifest) -> int:
    """Bytes of its token file at least: what lies behind the tokens does not count."""
    return shard.data_offset + shard.tokens * (2 if manifest.dtype == "uint16" else 4)
