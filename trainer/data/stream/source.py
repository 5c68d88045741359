"""One token dataset of a stream: its catalog, packing plans, the order of its rows, and its open shards. Local to the process."""

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream.catalog import Catalog, open_catalog
from trainer.data.stream.order import EpochOrder, SourceOrder, key_of
from trainer.data.stream.packing import ALGORITHM_VERSION, Packing, Plan, make_plan
from trainer.data.stream.plans import load_or_make_plan, load_or_make_words
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.shards import ShardReader, read_ends
from trainer.errors import DataError

OPEN_SHARDS = 16
"""Kept open at a time, of one source, or two windows; its readers know what is verified. Few, for a mixture may have many sources."""
KEPT_PLAN_BYTES = 16 * 2**20
"""Of the plans that one source keeps in memory: 13 of shards of 64 MB, more than a window."""
OPEN_TRIES = 5
"""Of a remote shard, which other processes that share a full cache may give up."""


@dataclass(frozen=True)
class StreamSettings:
    """What decides every sample of a stream."""

    sequence_length: int
    """Tokens of a row."""
    packing: Packing = "concat"
    isolate: bool = True
    """Positions start anew with each document, which attention does not leave; no target is across an edge."""
    seed: int = 0
    window: int = 8
    """Shards whose rows are shuffled together."""
    max_epochs: float = 1.0
    """Most passes over any source; more is an error, not silent repetition."""
    shuffle: bool = True
    """Off: rows in the order of the files, for validation."""


class Place(NamedTuple):
    """Where a sample comes from."""

    source: int
    epoch: int
    shard: int
    row: int


class Source:
    """One dataset: catalog, plans, the order of its rows, open shards."""

    def __init__(
        self, dataset: Path | RemoteDataset, settings: StreamSettings, number: int, plan_folder: Path | None
    ) -> None:
        """plan_folder: where catalog and plans are kept between starts; None: only in memory."""
        self.remote = dataset if isinstance(dataset, RemoteDataset) else None
        self.folder = dataset.folder if isinstance(dataset, RemoteDataset) else dataset
        self.settings, self.plan_folder = settings, plan_folder
        self.catalog: Catalog = open_catalog(self.folder, plan_folder)
        self.window_start = -1
        self.seed = key_of(settings.seed, number)
        self.readers: OrderedDict[int, ShardReader] = OrderedDict()
        self.plans: OrderedDict[int, Plan] = OrderedDict()
        self.orders: dict[int, EpochOrder] = {}
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        """Its URL or folder, for people."""
        return self.remote.url if self.remote is not None else str(self.folder)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Of each shard. Packed ones are counted at the first start, which makes every plan; later ones read their numbers."""
        settings, catalog = self.settings, self.catalog
        if settings.packing == "concat":
            return catalog.tokens // settings.sequence_length
        name = f"{catalog.dataset_id}-{settings.packing}-{settings.sequence_length}-{ALGORITHM_VERSION}.rows"
        numbers = range(len(catalog.tokens))
        return load_or_make_words(
            self.plan_folder, name, lambda: np.array([self._load_plan(number).num_rows for number in numbers], np.int64)
        )

    @cached_property
    def num_rows(self) -> int:
        """Of all shards: one pass."""
        return int(self.rows.sum())

    def plan(self, shard: int) -> Plan:
        """Of one shard; made once, then read from `plan_folder`. As many are kept as KEPT_PLAN_BYTES hold, and the last."""
        found = self.plans.get(shard)
        if found is None:
            with self.lock:
                found = self.plans[shard] = self._load_plan(shard)
                while len(self.plans) > 1 and sum(plan.num_bytes for plan in self.plans.values()) > KEPT_PLAN_BYTES:
                    self.plans.popitem(last=False)
        return found

    def pieces(self, shard: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """(which of the rows, first token, tokens) of every piece of some rows, in their order; without documents a row is one piece."""
        length = self.settings.sequence_length
        if self.settings.packing == "concat" and not self.settings.isolate:
            return np.arange(len(rows)), rows * length, np.full(len(rows), length)
        return self.plan(shard).pieces_of(rows)

    def _load_plan(self, shard: int) -> Plan:
        settings = self.settings

        def make() -> Plan:
            if self.remote is not None:
                self.remote.ends(found)
            return make_plan(read_ends(self.folder, found), settings.sequence_length, settings.packing)

        found = self.catalog.shard(shard)
        key = f"{found.ends_hash}-{settings.packing}-{settings.sequence_length}-{ALGORITHM_VERSION}"
        return load_or_make_plan(self.plan_folder, key, settings.sequence_length, make)

    def reader(self, shard: int, epoch: int = 0) -> ShardReader:
        """An open shard; the one used longest ago is closed. epoch: in which it is read, for what is fetched ahead."""
        found = self.readers.get(shard)
        if found is not None:
            self.readers.move_to_end(shard)
            return found
        with self.lock:
            found = self.readers[shard] = self._open_shard(shard, epoch)
            if self.remote is not None:  # what was given up takes its room on the disk until it is closed
                for number in [number for number, reader in self.readers.items() if not reader.path.exists()]:
                    del self.readers[number]
            if len(self.readers) > max(OPEN_SHARDS, 2 * self.settings.window):
                self.readers.popitem(last=False)
            return found

    def _open_shard(self, shard: int, epoch: int) -> ShardReader:
        """Fetched first where it is remote, and again where another process gave it up before it was open, or a copy is damaged."""
        found, dtype = self.catalog.shard(shard), self.catalog.dtype
        if self.remote is not None:
            for _ in range(OPEN_TRIES):
                self.fetch(self.remote, shard, epoch)
                with suppress(DataError):
                    return ShardReader(self.folder, found, dtype)
                self.remote.discard(shard)
        return ShardReader(self.folder, found, dtype)

    def fetch(self, remote: RemoteDataset, shard: int, epoch: int) -> None:
        """Wait for a shard, and let those of the next window come meanwhile."""
        upcoming = [*self.shards_from(shard, epoch), *self.shards_from(None, epoch + 1)]
        remote.fetch(shard, upcoming)
        if upcoming[0] != self.window_start:
            self.window_start = upcoming[0]
            remote.fetch_ahead(upcoming[: 2 * self.settings.window], upcoming)

    def shards_from(self, shard: int | None, epoch: int) -> list[int]:
        """Shards in the order of their use, from the window of `shard` on; None: from the epoch's first."""
        if not self.settings.shuffle:
            return list(range(shard or 0, len(self.rows)))
        order = self.order(epoch)
        return order.shards_from(int(order.shards[0]) if shard is None else shard)

    def order(self, epoch: int) -> EpochOrder:
        """Of one pass over the source; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {kept: order for kept, order in self.orders.items() if abs(kept - epoch) <= 1}
            self.orders[epoch] = SourceOrder(self.rows, self.seed, self.settings.window).epoch(epoch)
        return self.orders[epoch]

    def places(self, ks: NDArray[np.int64]) -> NDArray[np.int64]:
        """(3, N) epoch, shard and row of the source's k-th samples; -1 where `check` would refuse."""
        total = self.num_rows
        found = np.full((3, len(ks)), -1)
        allowed = ks < self.settings.max_epochs * total
        epochs = ks // max(total, 1)
        for epoch in np.unique(epochs[allowed]).tolist():
            mine = allowed & (epochs == epoch)
            inside = ks[mine] - epoch * total
            shards, rows = self.order(epoch).at_many(inside) if self.settings.shuffle else self._in_file_order(inside)
            found[:, mine] = np.full(len(shards), epoch), shards, rows
        return found

    def check(self, k: int) -> None:
        """DataError for a sample after `max_epochs` passes."""
        total = self.num_rows
        if total == 0:
            raise DataError(
                f"{self.name} has not one row of {self.settings.sequence_length} tokens; lower data.sequence_length"
            )
        if k >= self.settings.max_epochs * total:
            raise DataError(
                f"{self.name} has {total:,} rows, and sample {k:,} would be pass {k // total + 1} over it; raise data.max_epochs "
                f"({self.settings.max_epochs:g}), lower its weight, or train fewer steps"
            )

    def _in_file_order(self, inside: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts = np.concatenate([[0], np.cumsum(self.rows)])
        shards = np.searchsorted(starts, inside, side="right") - 1
        return shards, inside - starts[shards]
