"""Encoder-decoder objectives: T5's span corruption, and BART's text infilling with sentence permutation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED
from trainer.data.objectives.rows import (
    Batch,
    Ids,
    Rows,
    Vocabulary,
    Words,
    compacted,
    random_rows,
    shifted_right,
    uniform,
)

NOISE, KEPT, ORDER, LENGTHS, PLACES = 11, 12, 13, 14, 15  # keys of the random words
MOST_LOST = 0.5
"""Share of a row that infilling may take away."""


@dataclass(frozen=True)
class SpanCorruption:
    """T5 (Raffel et al., arXiv 1910.10683): each span of noise is one sentinel; the targets are the sentinels with what they stand for."""

    vocabulary: Vocabulary
    length: int
    """Tokens of a full input, its end included."""
    seed: int
    fraction: float
    mean_span: float

    def batch(self, rows: Rows) -> Batch:
        """input_ids, decoder_input_ids, labels int64, (B, inputs) and (B, targets); attention_mask where an input has padding."""
        vocabulary = self.vocabulary
        _, longest = corrupted_lengths(rows.ids.shape[1], self.fraction, self.mean_span)
        inputs = np.full((len(rows.ids), self.length), vocabulary.pad)
        labels = np.full((len(rows.ids), longest), IGNORED)
        for held in np.unique(rows.held).tolist():  # most often all rows are full
            same = np.flatnonzero(rows.held == held)
            given, wanted = self.corrupted(rows.ids[same, :held], rows.samples[same])
            inputs[same, : given.shape[1]], labels[same, : wanted.shape[1]] = given, wanted
        start = vocabulary.pad  # T5's decoder starts with padding
        batch = {
            "input_ids": inputs,
            "decoder_input_ids": shifted_right(labels, start, vocabulary.pad),
            "labels": labels,
        }
        is_token = inputs != vocabulary.pad
        return batch if is_token.all() else batch | {"attention_mask": is_token.astype(np.int64)}

    def corrupted(self, ids: Ids, samples: Ids) -> tuple[Ids, Ids]:
        """Inputs and targets of rows (B, n) of one length, each with its end."""
        noise, span = noise_spans(ids.shape[1], samples, self.seed, self.fraction, self.mean_span)
        begins = noise.copy()
        begins[:, 1:] &= ~noise[:, :-1]
        sentinels, end = self.vocabulary.sentinels[span], np.full((len(ids), 1), self.vocabulary.end)
        kept = ~noise | begins
        inputs = np.where(begins, sentinels, ids)[kept].reshape(len(ids), -1)
        pairs, wanted = np.stack([sentinels, ids], axis=2), np.stack([begins, noise], axis=2)
        targets = pairs[wanted].reshape(len(ids), -1)
        return np.hstack([inputs, end]), np.hstack([targets, end])


@dataclass(frozen=True)
class Infilling:
    """BART (Lewis et al., arXiv 1910.13461): sentences in another order, spans of Poisson length replaced by one mask each, some of
    length 0; the target is the whole text."""

    vocabulary: Vocabulary
    length: int
    """Tokens of a row, the frame included."""
    seed: int
    fraction: float
    """Share of the tokens that is taken away, on average."""
    mean_span: float
    permute_sentences: bool

    def batch(self, rows: Rows) -> Batch:
        """input_ids, decoder_input_ids, labels (B, T) int64; attention_mask where an input has padding, as it has most often."""
        vocabulary, is_token = self.vocabulary, rows.is_token
        ids = np.where(is_token, rows.ids, vocabulary.pad)
        noisy = permuted_sentences(ids, is_token, rows.samples, self) if self.permute_sentences else ids
        inputs, sizes = self.infilled(noisy, rows)
        labels = np.full((len(ids), self.length), IGNORED)
        labels[:, 0] = vocabulary.start
        labels[:, 1 : ids.shape[1] + 1][is_token] = ids[is_token]
        labels[np.arange(len(ids)), rows.held + 1] = vocabulary.end
        return {
            "input_ids": inputs,
            "attention_mask": (np.arange(self.length) < sizes[:, None]).astype(np.int64),
            "decoder_input_ids": shifted_right(
                labels, vocabulary.end, vocabulary.pad
            ),  # BART's decoder starts with </s>
            "labels": labels,
        }

    def infilled(self, ids: Ids, rows: Rows) -> tuple[Ids, Ids]:
        """(B, T) start, the tokens with spans replaced, end, padding; (B,) how many are no padding."""
        vocabulary = self.vocabulary
        begins, is_lost = lost_spans(rows, self.seed, self.fraction, self.mean_span)
        ended = np.hstack([ids, np.full((len(ids), 1), vocabulary.pad)])
        ended[np.arange(len(ids)), rows.held] = vocabulary.end
        values = np.stack([np.full(begins.shape, vocabulary.mask), ended], axis=2)
        kept = np.stack([begins, (np.arange(ended.shape[1]) <= rows.held[:, None]) & ~is_lost], axis=2)
        inner, sizes = compacted(
            values.reshape(len(ids), -1), kept.reshape(len(ids), -1), self.length - 1, vocabulary.pad
        )
        return np.hstack([np.full((len(ids), 1), vocabulary.start), inner]), sizes + 1


def noise_counts(length: int, fraction: float, mean_span: float) -> tuple[int, int]:
    """(tokens, spans) of noise in so many tokens, by T5's published rule."""
    tokens = min(max(round(length * fraction), 1), length - 1)
    return tokens, min(max(round(tokens / mean_span), 1), tokens, length - tokens)


def corrupted_lengths(length: int, fraction: float, mean_span: float) -> tuple[int, int]:
    """(inputs, targets) that so many tokens become, each with its end."""
    if length < 2:
        return length + 1, 1
    tokens, spans = noise_counts(length, fraction, mean_span)
    return length - tokens + spans + 1, tokens + spans + 1


def tokens_for_inputs(inputs: int, fraction: float, mean_span: float) -> int:
    """The most tokens whose corrupted inputs are at most `inputs` long, so that inputs are full: T5's `random_spans_helper`."""
    length = 1
    while corrupted_lengths(length + 1, fraction, mean_span)[0] <= inputs:
        length += 1
    return length


def noise_spans(
    length: int, samples: Ids, seed: int, fraction: float, mean_span: float
) -> tuple[NDArray[np.bool_], Ids]:
    """(B, n) where noise is, and (B, n) the number of the span of noise that is here or next; the first token is never noise."""
    if length < 2:
        shape = (len(samples), length)
        return np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
    tokens, spans = noise_counts(length, fraction, mean_span)
    noise = random_parts(tokens, spans, random_rows(samples, tokens, seed, NOISE))
    kept = random_parts(length - tokens, spans, random_rows(samples, length - tokens, seed, KEPT))
    edges = np.cumsum(np.stack([kept, noise], axis=2).reshape(len(samples), -1), axis=1)
    marks = np.zeros((len(samples), length + 1), np.int64)
    np.put_along_axis(marks, edges, 1, axis=1)
    part = np.cumsum(marks[:, :length], axis=1)
    return part % 2 == 1, np.minimum(part // 2, spans - 1)


def random_parts(total: int, parts: int, words: Words) -> Ids:
    """(B, parts) whole numbers above 0 that add up to `total`, every such list equally likely. words: (B, total)."""
    order = np.argsort(words[:, 1:], axis=1)[:, : parts - 1]  # which of the total - 1 gaps are cut
    cuts = np.sort(order + 1, axis=1)
    edges = np.hstack([np.zeros((len(words), 1), np.int64), cuts, np.full((len(words), 1), total)])
    return np.diff(edges, axis=1)


def lost_spans(rows: Rows, seed: int, fraction: float, mean_span: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(B, n + 1) before which token a mask stands, and which tokens it replaces. Spans do not touch each other.

    A row of n tokens has n * fraction / mean_span of them, rounded, of Poisson length; never more than half of the row is lost, and there
    are no more of them than that, so that what is kept has a gap for each.
    """
    size, wanted = rows.ids.shape[1], np.rint(rows.held * fraction / mean_span).astype(np.int64)
    spans = np.maximum(np.minimum(wanted, rows.held // 2), 1)
    most = max(int(spans.max(initial=1)), 1)
    exists = np.arange(most) < spans[:, None]
    lengths = poisson(uniform(random_rows(rows.samples, most, seed, LENGTHS)), mean_span) * exists
    room = (rows.held * MOST_LOST).astype(np.int64)[:, None]
    lengths = np.minimum(lengths, np.maximum(room - (np.cumsum(lengths, axis=1) - lengths), 0))
    lengths[:, 0] += np.maximum(spans - lengths.sum(axis=1), 0) * (
        rows.held > spans
    )  # an input is never longer than its row
    kept = rows.held - lengths.sum(axis=1)
    words = random_rows(rows.samples, size + 1, seed, PLACES)
    words[np.arange(size + 1) > kept[:, None]] = np.iinfo(np.uint64).max
    places = np.argsort(words, axis=1, kind="stable")[:, :most]
    places = np.sort(np.where(exists, places, size + 1), axis=1)
    starts = places + np.cumsum(lengths, axis=1) - lengths
    starts = np.where(exists, starts, size + 1)
    begins, change = np.zeros((len(starts), size + 2), np.bool_), np.zeros((len(starts), size + 2), np.int64)
    np.put_along_axis(begins, starts, True, axis=1)
    row = np.broadcast_to(np.arange(len(starts))[:, None], starts.shape)
    np.add.at(change, (row, starts), exists.astype(np.int64))
    np.add.at(change, (row, np.minimum(starts + lengths, size + 1)), -exists.astype(np.int64))
    return begins[:, : size + 1], (np.cumsum(change, axis=1) > 0)[:, : size + 1]


def poisson(numbers: NDArray[np.float64], mean: float) -> Ids:
    """Poisson numbers from uniform ones, by the inverse of the distribution."""
    counts = np.arange(int(mean + 12 * mean**0.5) + 12)
    logs = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    return np.searchsorted(np.cumsum(np.exp(counts * np.log(mean) - mean - logs))[:-1], numbers, side="right").astype(
        np.int64
    )


def permuted_sentences(ids: Ids, is_token: NDArray[np.bool_], samples: Ids, objective: Infilling) -> Ids:
    """The rows with their sentences in a random order; what stands behind a row's tokens stays there."""
    begins = np.zeros(ids.shape, np.bool_)
    begins[:, 1:] = objective.vocabulary.ends_sentence[ids[:, :-1]]
    first = np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), axis=1)
    words = random_rows(samples, ids.shape[1], objective.seed, ORDER) >> np.uint64(1)
    keys = np.where(is_token, np.take_along_axis(words, first, axis=1), np.iinfo(np.uint64).max)
    return np.take_along_axis(ids, np.argsort(keys, axis=1, kind="stable"), axis=1)
