"""Any sample of a mixture by its number, and from that any rank's part of any global batch.

The only state is how many samples have been consumed, the same on every rank and valid for any number of them: step g of a run with
global batches of B reads samples g B to (g + 1) B - 1, and a rank takes its slice. Beside the step a checkpoint holds the datasets' ids
and `identity`. Local to the process; no collective.

Invariant: a sample is a function of (datasets, settings, seed, number) alone.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED
from trainer.data.stream.mix import ENDLESS, SMALLEST_SHARE, Mixture, Stage
from trainer.data.stream.order import key_of
from trainer.data.stream.packing import ALGORITHM_VERSION
from trainer.data.stream.remote import RemoteDataset
from trainer.data.stream.segment import EMPTY, Cut, Segment
from trainer.data.stream.shards import hash_bytes
from trainer.data.stream.source import Place, Source, StreamSettings
from trainer.errors import DataError

__all__ = ["Batch", "Place", "Source", "Stream", "StreamSettings"]

SEGMENT, KEPT_SEGMENTS = 16384, 2
"""Samples whose places are worked out together (a quarter as many cost twice the time for each), and how many such are kept."""

Batch = dict[str, NDArray[np.int64]]


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
        """stages: weights of the sources; None: by their rows, so that all end together. DataError where tokenizers differ."""
        self.settings = settings
        self.sources = [Source(dataset, settings, number, plan_folder) for number, dataset in enumerate(datasets)]
        self.tokenizer = self.sources[0].catalog.tokenizer
        for source in self.sources[1:]:
            if source.catalog.tokenizer != self.tokenizer:
                raise DataError(
                    f"{source.folder} was tokenized with another tokenizer than {self.sources[0].folder}; tokenize both with the same"
                )
        by_rows = not stages and len(self.sources) > 1
        self.stages = tuple(stages or [Stage(0, self._weights_by_rows() if by_rows else (1.0,))])
        period = max(sum(self.rows), 1) if by_rows else ENDLESS
        self.mixture = Mixture(self.stages, key_of(settings.seed, 2**32), period=period)
        self._segments: dict[int, Segment] = {}
        self._dtype = np.dtype(max(source.catalog.dtype for source in self.sources)).newbyteorder("<")
        ramp = np.arange(settings.sequence_length, dtype=np.int64).view(np.uint8).data
        self._ramps = [ramp[:edge] for edge in range(0, len(ramp) + 1, 8)]  # bytes of 0 to n - 1 for every n

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of each source."""
        return tuple(source.num_rows for source in self.sources)

    def _weights_by_rows(self) -> tuple[float, ...]:
        """Of each source. DataError for one that is too small beside the others."""
        total = sum(self.rows)
        for source, rows in zip(self.sources, self.rows, strict=True):
            if 0 < rows < SMALLEST_SHARE * total:
                raise DataError(
                    f"{source.name} has {rows:,} of the {total:,} rows of data.sources, a share below {SMALLEST_SHARE:g} that is not mixed "
                    "evenly; leave it out, or set data.weights"
                )
        return tuple(map(float, self.rows)) if total else (1.0,) * len(self.sources)

    def place(self, sample: int) -> Place:
        """Where a global sample comes from. DataError where a source would be read too often."""
        return Place(*self._place(sample))

    def _place(self, sample: int) -> tuple[int, int, int, int]:
        segment, inside = self._segment(sample // SEGMENT), sample % SEGMENT
        if inside >= segment.num_samples:  # none is read behind the first that must not be
            for number in (sample, sample - inside + segment.num_samples):
                source, k = self.mixture.at(number)
                self.sources[source].check(k)
        source, epoch, shard, row = segment.places[:, inside].tolist()
        return source, epoch, shard, row

    def _segment(self, number: int) -> Segment:
        """SEGMENT consecutive samples, up to the first that a source would have to give once too often; the last few are kept."""
        segment = self._segments.get(number)
        if segment is None:
            segment = self._placed(*self.mixture.span(number * SEGMENT, SEGMENT))
            for other in self._segments.values():
                other.close(list(other.readers))
            self._segments[number] = segment
            while len(self._segments) > KEPT_SEGMENTS:
                del self._segments[next(iter(self._segments))]
        return segment

    def _placed(self, sources: NDArray[np.int64], ks: NDArray[np.int64]) -> Segment:
        """Of the ks-th samples of these sources, up to the first that its source would have to give once too often."""
        found = np.empty((4, len(ks)), np.int64)
        found[0] = sources
        for source in np.unique(sources).tolist():
            mine = sources == source
            found[1:, mine] = self.sources[source].places(ks[mine])
        allowed = int(np.argmin(np.append(found[1], -1)))
        length, isolate = self.settings.sequence_length, self.settings.isolate
        return Segment(found[:, :allowed], self.sources, length, self._dtype, isolate=isolate)

    def batch(self, samples: Sequence[int], *, document_ids: bool = False, scattered: bool = False) -> Batch:
        """Arrays of these global samples, B rows of T: input_ids, labels; with `isolate` also position_ids, all (B, T) int64.

        labels[b, t] is the token after input_ids[b, t]; -100 where that is another document, another row or padding. num_tokens: (B,)
        int64, tokens of each row that are no padding. document_ids: (B, T) int64 if asked for, counted from 0 in each row, padding -1.
        scattered: no neighbours of the samples will be asked for; they are placed alone, and their places not kept.
        """
        shape, isolate = (len(samples), self.settings.sequence_length), self.settings.isolate
        cut = self._cut_alone(samples) if scattered else self._cut(samples)
        tokens = np.frombuffer(b"".join(cut.tokens), self._dtype)
        if not (cut.is_padded or isolate or document_ids):
            return plain_batch(tokens.reshape(shape), cut.held)
        ids = tokens.astype(np.int64)
        flat_labels = np.empty_like(ids)
        flat_labels[:-1] = ids[1:]  # a copy costs half of another widening
        labels = flat_labels.reshape(shape)
        batch = {"input_ids": ids.reshape(shape), "labels": labels, "num_tokens": cut.held}
        if isolate:
            flat_labels[cut.lasts] = IGNORED
            ramps = self._ramps
            positions = bytearray().join([ramps[size] for size in cut.sizes])  # writable, unlike bytes
            batch["position_ids"] = np.frombuffer(positions, np.int64).reshape(shape)
        else:
            labels[:, -1] = IGNORED
        if cut.is_padded:
            for row, count in zip(labels, cut.held.tolist(), strict=True):
                row[count - 1 :] = IGNORED
        return batch | {"document_ids": cut.document_ids(shape)} if document_ids else batch

    def _cut(self, samples: Sequence[int]) -> Cut:
        """What these samples are made of, verified; consecutive ones are taken together."""
        if samples and samples[-1] - samples[0] == len(samples) - 1:  # most often all of them, in one segment
            segment, inside = self._segment(samples[0] // SEGMENT), samples[0] % SEGMENT
            end = inside + len(samples)
            if end <= segment.num_samples and list(samples) == list(range(samples[0], samples[-1] + 1)):
                return segment.cut(inside, end)
        cut, at = EMPTY, 0
        while at < len(samples):
            first = samples[at]
            self._place(first)  # raises for one that must not be read
            segment, inside = self._segment(first // SEGMENT), first % SEGMENT
            count = 1
            while (
                at + count < len(samples)
                and samples[at + count] == first + count
                and inside + count < segment.num_samples
            ):
                count += 1
            cut = segment.cut(inside, inside + count).after(cut, at * self.settings.sequence_length)
            at += count
        return cut

    def _cut_alone(self, samples: Sequence[int]) -> Cut:
        """The same of samples that lie anywhere."""
        sources, ks = np.array([self.mixture.at(sample) for sample in samples], np.int64).reshape(-1, 2).T
        segment = self._placed(sources, ks)
        for source, k in zip(sources[segment.num_samples :].tolist(), ks[segment.num_samples :].tolist(), strict=True):
            self.sources[source].check(k)  # raises for the first
        return segment.cut(0, len(samples)) if samples else EMPTY

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the samples: datasets, settings, weights, algorithm; not how often a source may be read."""
        facts = (
            [source.catalog.dataset_id for source in self.sources],
            asdict(self.settings) | {"max_epochs": None},
            self.stages,
            self.mixture.period,
            ALGORITHM_VERSION,
        )
        return hash_bytes(repr(facts).encode())


def plain_batch(tokens: NDArray[Any], held: NDArray[np.int64]) -> Batch:
    """Full rows, (B, T), whose documents see each other: input_ids and labels are two views of the same numbers."""
    rows = np.empty((len(tokens), tokens.shape[1] + 1), np.int64)
    rows[:, :-1] = tokens
    rows[:, -1] = IGNORED
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:], "num_tokens": held}
