"""A token dataset behind a URL: whole shards are copied to this node's disk when they are needed, verified, and given up when needed last.

The folder is named by the dataset's content, so any number of runs share it. All processes of a node use one copy, under a lock for each
file. Invariant: a file under its own name is complete and was verified; readers verify its blocks again.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock

from trainer.data.stream.shards import BLOCK, MANIFEST, DatasetManifest, Shard, hash_bytes, read_manifest, write_file
from trainer.errors import DataError

TRIES = 5
FIRST_WAIT_S = 0.5
AHEAD = 2
"""Downloads at once, ahead of their use."""


def is_url(source: str) -> bool:
    """Whether a source is read through fsspec."""
    return "://" in source


class RemoteDataset:
    """A dataset's folder on this node's disk that fills as shards are asked for. Safe for several threads and processes."""

    def __init__(self, url: str, cache: Path, *, limit_bytes: float) -> None:
        """url: the folder that holds manifest.json. limit_bytes: of shard files kept. DataError where it cannot be reached."""
        self.url, self.limit_bytes = url.rstrip("/"), limit_bytes
        self.filesystem, self.root = open_filesystem(self.url)
        content = self.read(MANIFEST)
        stated = hashlib.sha256(content).hexdigest()[:32]
        self.folder = cache / "shards" / stated
        self.write(MANIFEST, content)
        self.manifest: DatasetManifest = read_manifest(self.folder)
        if not (self.folder / "tokenizer.json").exists() and self.exists("tokenizer.json"):
            self.write("tokenizer.json", self.read("tokenizer.json"))
        self.downloads = ThreadPoolExecutor(AHEAD, thread_name_prefix="shards")

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
            with FileLock(self.folder / f".{shard.file}.lock"):
                if not path.exists() and self.make_room(number, upcoming, ahead=ahead):
                    self.download(shard, path)
        except OSError as error:
            raise DataError(
                f"{path}, of {self.url}, cannot be written: {error.strerror or error}; free space there or set data.cache"
            ) from None

    def fetch_ahead(self, numbers: Sequence[int], upcoming: Sequence[int]) -> None:
        """Start downloads; one that fails is tried again, and reported, when the shard is needed."""
        for number in numbers:
            if not (self.folder / self.manifest.shards[number].file).exists():
                self.downloads.submit(self.fetch, number, upcoming, ahead=True)

    def make_room(self, number: int, upcoming: Sequence[int], *, ahead: bool) -> bool:
        """Delete the shards that are needed last until one more fits, and claim its place; False where it does not fit ahead of time."""
        ranks = {shard: rank for rank, shard in reversed(list(enumerate(upcoming)))}
        shards, last = self.manifest.shards, len(upcoming)
        with FileLock(self.folder / ".room.lock"):
            held = [found for found in range(len(shards)) if found != number and self.is_held(shards[found])]
            kept = sum(size_of(shards[found], self.manifest) for found in held) + size_of(shards[number], self.manifest)
            held.sort(key=lambda found: ranks.get(found, last))
            while held and kept > self.limit_bytes:
                found = held.pop()
                if ahead and ranks.get(found, last) < ranks.get(number, last):
                    return False
                (self.folder / shards[found].file).unlink(missing_ok=True)  # who has it open reads on
                kept -= size_of(shards[found], self.manifest)
            self.part(shards[number]).touch()
            return True

    def part(self, shard: Shard) -> Path:
        """Where a download grows."""
        return self.folder / f".{shard.file}.part"

    def is_held(self, shard: Shard) -> bool:
        """Whether its tokens, or a part of them, take room."""
        return (self.folder / shard.file).exists() or self.part(shard).exists()

    def download(self, shard: Shard, path: Path) -> None:
        """Copy a whole file beside its place, hash every block on the way, rename. Under the file's lock."""
        part = self.part(shard)

        def copy() -> bool:
            with self.filesystem.open(f"{self.root}/{shard.file}", "rb") as source, part.open("wb") as target:
                blocks = []
                while block := read_block(source):
                    blocks.append(hash_bytes(block))
                    target.write(block)
            return blocks == shard.blocks

        try:
            self.retry(shard.file, copy)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def read(self, name: str, is_good: Callable[[bytes], bool] = bool) -> bytes:
        """A small file, whole. DataError names the URL."""
        found = b""

        def get() -> bool:
            nonlocal found
            found = self.filesystem.cat_file(f"{self.root}/{name}")
            return is_good(found)

        self.retry(name, get)
        return found

    def exists(self, name: str) -> bool:
        """Whether the URL has such a file."""
        try:
            return bool(self.filesystem.exists(f"{self.root}/{name}"))
        except Exception:  # of any library behind fsspec
            return False

    def retry(self, name: str, act: Callable[[], bool]) -> None:
        """Do it until it succeeds, with growing pauses; DataError after TRIES, or at once for a file that is not there."""
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                if act():
                    return
                problem = "its content is not what the manifest states"
            except FileNotFoundError:
                raise DataError(f"{self.url}/{name} does not exist; check data.sources") from None
            except Exception as error:  # of any library behind fsspec
                if isinstance(error, OSError) and error.filename and str(error.filename).startswith(str(self.folder)):
                    raise
                problem = str(error) or type(error).__name__
        raise DataError(f"{self.url}/{name} could not be read in {TRIES} tries: {problem}")

    def write(self, name: str, content: bytes) -> None:
        """A small file into the folder; DataError for a cache that cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}; set data.cache") from None
        write_file(self.folder / name, content)


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it). DataError for a protocol that is unknown or needs a package."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"data.sources ({url}): {error}") from None
    return filesystem, str(path)


def read_block(source: Any) -> bytes:
    """A MiB, or what is left; some files give less than they are asked for."""
    block = b""
    while len(block) < BLOCK and (more := source.read(BLOCK - len(block))):
        block += more
    return block


def size_of(shard: Shard, manifest: DatasetManifest) -> int:
    """Bytes of its token file, about: what lies behind the tokens does not count."""
    return shard.data_offset + shard.tokens * (2 if manifest.dtype == "uint16" else 4)
