"""Any sample of a mixture by its number, and from that any rank's part of any global batch.

The only state is how many samples have been consumed, the same on every rank and valid for any number of them. Step g of a run with
global batches of B reads samples g B to (g + 1) B - 1; a rank takes its slice. Local to the process; no collective.

Invariant: a sample is a function of (datasets, settings, seed, number) alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED, micro_batches
from trainer.data.stream.mix import Mixture, Stage
from trainer.data.stream.order import EpochOrder, SourceOrder, key_of
from trainer.data.stream.packing import ALGORITHM_VERSION, Packing, Plan, make_plan
from trainer.data.stream.plans import load_or_make_plan
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.shards import DatasetManifest, ShardReader, hash_bytes, read_ends, read_manifest
from trainer.errors import DataError

STATE_FORMAT = 1
OPEN_SHARDS = 64
"""Open at a time, over all sources: more than the windows of a few sources."""

Batch = dict[str, NDArray[np.int64]]


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


@dataclass(frozen=True)
class Place:
    """Where a sample comes from."""

    source: int
    epoch: int
    shard: int
    row: int


class Source:
    """One dataset: manifests, plans, the order of its rows, open shards."""

    def __init__(
        self, dataset: Path | RemoteDataset, settings: StreamSettings, number: int, plan_folder: Path | None
    ) -> None:
        """plan_folder: where plans are kept between starts; None keeps them in memory."""
        self.remote = dataset if isinstance(dataset, RemoteDataset) else None
        self.folder = dataset.folder if isinstance(dataset, RemoteDataset) else dataset
        self.settings, self.plan_folder = settings, plan_folder
        self.manifest: DatasetManifest = read_manifest(self.folder)
        self.position = 0  # the sample that was placed last, from where shards are fetched ahead
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
    def rows(self) -> tuple[int, ...]:
        """Of each shard."""
        length = self.settings.sequence_length
        if self.settings.packing == "concat":
            return tuple(shard.tokens // length for shard in self.manifest.shards)
        return tuple(self.plan(number).num_rows for number in range(len(self.manifest.shards)))

    def plan(self, shard: int) -> Plan:
        """Of one shard; made once, then read from `plan_folder`."""
        with self.lock:
            if shard not in self.plans:
                self.plans[shard] = self._load_plan(shard)
                if len(self.plans) > OPEN_SHARDS:
                    self.plans.popitem(last=False)
            return self.plans[shard]

    def _load_plan(self, shard: int) -> Plan:
        settings = self.settings

        def make() -> Plan:
            if self.remote is not None:
                self.remote.ends(found)
            return make_plan(read_ends(self.folder, found), settings.sequence_length, settings.packing)

        found = self.manifest.shards[shard]
        key = f"{found.ends_hash}-{settings.packing}-{settings.sequence_length}-{ALGORITHM_VERSION}"
        return load_or_make_plan(self.plan_folder, key, settings.sequence_length, make)

    def reader(self, shard: int) -> ShardReader:
        """An open shard; the one used longest ago is closed."""
        with self.lock:
            if shard not in self.readers:
                if self.remote is not None:
                    self.fetch(self.remote, shard)
                self.readers[shard] = ShardReader(self.folder, self.manifest.shards[shard], self.manifest.dtype)
                if len(self.readers) > OPEN_SHARDS:
                    self.readers.popitem(last=False)
            self.readers.move_to_end(shard)
            return self.readers[shard]

    def fetch(self, remote: RemoteDataset, shard: int) -> None:
        """Wait for a shard, and let those of the next window come meanwhile."""
        epoch, inside = divmod(self.position, max(sum(self.rows), 1))
        here, after = self.order(epoch), self.order(epoch + 1)
        upcoming = [*here.shards_from(inside), *after.shards]
        remote.fetch(shard, upcoming)
        if upcoming[0] != self.window_start:
            self.window_start = upcoming[0]
            remote.fetch_ahead(upcoming[: 2 * self.settings.window], upcoming)

    def order(self, epoch: int) -> EpochOrder:
        """Of one pass over the source; the last two are kept."""
        if epoch not in self.orders:
            self.orders = {kept: order for kept, order in self.orders.items() if abs(kept - epoch) <= 1}
            self.orders[epoch] = SourceOrder(self.rows, self.seed, self.settings.window).epoch(epoch)
        return self.orders[epoch]

    def place(self, k: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of the source's k-th sample. DataError after `max_epochs` passes."""
        total = sum(self.rows)
        if total == 0:
            raise DataError(
                f"{self.folder} has not one row of {self.settings.sequence_length} tokens; lower data.sequence_length"
            )
        if k >= self.settings.max_epochs * total:
            raise DataError(
                f"{self.folder} has {total:,} rows, and sample {k:,} would be pass {k // total + 1} over it; raise data.max_epochs "
                f"({self.settings.max_epochs:g}), lower its weight, or train fewer steps"
            )
        epoch, inside = divmod(k, total)
        self.position = k
        return (epoch, *(self.order(epoch).at(inside) if self.settings.shuffle else self._in_file_order(inside)))

    def _in_file_order(self, inside: int) -> tuple[int, int]:
        ends = np.cumsum(self.rows)
        shard = int(np.searchsorted(ends, inside, side="right"))
        return shard, inside - (int(ends[shard - 1]) if shard else 0)


class Stream:
    """A mixture of token datasets, random-accessible by sample number."""

    def __init__(
        self,
        datasets: Sequence[Path | RemoteDataset],
        settings: StreamSettings,
        *,
        stages: Sequence[Stage] | None = None,
        plan_folder: Path | None = None,
    ) -> None:
        """stages: weights of the sources; None: in proportion to their tokens. DataError where tokenizers differ."""
        self.settings = settings
        self.sources = [Source(dataset, settings, number, plan_folder) for number, dataset in enumerate(datasets)]
        self.tokenizer = self.sources[0].manifest.tokenizer
        for source in self.sources[1:]:
            if source.manifest.tokenizer != self.tokenizer:
                raise DataError(
                    f"{source.folder} was tokenized with another tokenizer than {self.sources[0].folder}; tokenize both with the same"
                )
        tokens = tuple(float(source.manifest.num_tokens) for source in self.sources)
        self.stages = tuple(stages or [Stage(0, tokens)])
        self.mixture = Mixture(self.stages, key_of(settings.seed, 2**32))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of each source."""
        return tuple(sum(source.rows) for source in self.sources)

    def place(self, sample: int) -> Place:
        """Where a global sample comes from."""
        number, k = self.mixture.at(sample)
        return Place(number, *self.sources[number].place(k))

    def batch(self, samples: Sequence[int]) -> Batch:
        """(B, T) int64 arrays of these global samples: input_ids, labels; with `isolate` also position_ids and document_ids.

        labels[b, t] is the token after input_ids[b, t]; -100 where that is another document, another row or padding. Document ids count
        from 0 in each row; padding has -1.
        """
        shape = (len(samples), self.settings.sequence_length)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED)
        isolate = self.settings.isolate
        positions = np.zeros(shape, np.int64) if isolate else None
        documents = np.full(shape, -1) if isolate else None
        ramp = np.arange(shape[1])
        for b, sample in enumerate(samples):
            place = self.place(sample)
            source = self.sources[place.source]
            reader = source.reader(place.shard)
            if positions is None or documents is None:
                start = place.row * shape[1]
                self._fill_plain(ids[b], labels[b], source, reader, place, start)
                continue
            plan = source.plan(place.shard)
            first, last = plan.row_starts[place.row], plan.row_starts[place.row + 1]
            at = 0
            for number, piece in enumerate(range(first, last)):
                length = int(plan.lengths[piece])
                tokens = reader.tokens(int(plan.starts[piece]), length)
                end = at + length
                ids[b, at:end] = tokens
                labels[b, at : end - 1] = tokens[1:]
                positions[b, at:end] = ramp[:length]
                documents[b, at:end] = number
                at = end
        batch = {"input_ids": ids, "labels": labels}
        if positions is not None and documents is not None:
            batch |= {"position_ids": positions, "document_ids": documents}
        return batch

    def _fill_plain(self, ids: Any, labels: Any, source: Source, reader: ShardReader, place: Place, start: int) -> None:
        """A row whose documents see each other."""
        length = self.settings.sequence_length
        if self.settings.packing == "concat":
            tokens = reader.tokens(start, length)
            ids[:] = tokens
            labels[:-1] = tokens[1:]
            return
        plan, at = source.plan(place.shard), 0
        for piece in range(plan.row_starts[place.row], plan.row_starts[place.row + 1]):
            end = at + int(plan.lengths[piece])
            ids[at:end] = reader.tokens(int(plan.starts[piece]), end - at)
            at = end
        labels[: at - 1] = ids[1:at]

    def micro_batches(
        self, first_sample: int, batch_size: int, rank: int, world_size: int, micro_batch_size: int | None
    ) -> list[list[int]]:
        """The samples of a rank's micro-batches of the global batch that starts at `first_sample`; as many on every rank."""
        batch = np.arange(first_sample, first_sample + batch_size)
        return [part.tolist() for part in micro_batches(batch, rank, world_size, micro_batch_size)]

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the samples: datasets, settings, weights, algorithm."""
        facts = (
            [source.manifest.dataset_id for source in self.sources],
            asdict(self.settings),
            self.stages,
            ALGORITHM_VERSION,
        )
        return hash_bytes(repr(facts).encode())

    def state(self, samples: int) -> dict[str, Any]:
        """What a checkpoint keeps: under 1 KB, the same on every rank."""
        return {
            "format": STATE_FORMAT,
            "samples": samples,
            "datasets": hash_bytes("".join(source.manifest.dataset_id for source in self.sources).encode()),
            "identity": self.identity,
            "seed": self.settings.seed,
        }

    def check_state(self, state: dict[str, Any]) -> int:
        """Samples consumed, of a state of this very stream. DataError names what changed."""
        now = self.state(0)
        for name, what in (
            ("format", "the format"),
            ("datasets", "a dataset"),
            ("seed", "data.seed"),
            ("identity", "a data setting"),
        ):
            if state.get(name) != now[name]:
                raise DataError(
                    f"{what} changed since the checkpoint ({state.get(name)} is now {now[name]}); restore it, or start anew"
                )
        return int(state["samples"])
