"""Tokenized samples in flat arrays, and what is said of their lengths.

Between trainer/data/samples.py and the batches. Invariant: a split holds no padding; batches are padded when collated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.samples import Samples
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 10_000
"""Texts tokenized in one call: Python's lists of tokens take ten times the memory of our arrays."""
LARGEST_LIMIT = 1_000_000
"""A tokenizer without a limit states 1e30."""


@dataclass(frozen=True)
class Split:
    """Samples of one split. Sample i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray
    """(sum of lengths,) int32, special tokens included."""
    offsets: np.ndarray
    """(N + 1,) int64."""
    token_types: np.ndarray | None
    """int8, as long as `tokens`: which text of a pair a token is of. None where the model needs none."""
    labels: np.ndarray
    """(N,) int64 class ids; for multi (N, C) float64 of 0 and 1, for regression (N, 1) float64."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens."""
        return np.diff(self.offsets)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) where in `tokens` those of each sample lie, and (B, T) bool which of these places are its own; T the longest."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        return np.where(mask, starts[:, None] + columns, 0), mask

    def padded(self, rows: np.ndarray, padding: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) tokens of each sample, padded on the right, and (B, T) bool which are no padding."""
        places, mask = self.places(rows)
        return np.where(mask, self.tokens[places], padding), mask


@dataclass(frozen=True)
class Tokenized:
    """A split, and what was cut from it."""

    split: Split
    full_lengths: np.ndarray
    """(N,) int64: tokens of each sample before it was cut."""

    def describe_lengths(self, max_length: int) -> str:
        """Mean, p95 and maximum of the lengths before the cut, and the share that was cut."""
        full = self.full_lengths
        return (
            f"mean {full.mean():.1f}, p95 {np.percentile(full, 95):.0f}, max {full.max():,}; "
            f"{np.mean(full > max_length):.1%} cut at {max_length}"
        )


def tokenize(samples: Samples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenized:
    """The samples in tokens, each cut to `max_length`; of a pair the tokenizer cuts the longer text first.

    DataError for a text without a token.
    """
    parts = [_tokenize_chunk(chunk, tokenizer, max_length) for chunk in _chunks(samples)]
    offsets = np.concatenate([np.zeros(1, np.int64), *(part.split.lengths for part in parts)]).cumsum()
    _check_no_empty(samples, offsets)
    types = [part.split.token_types for part in parts if part.split.token_types is not None]
    flat_types = np.concatenate(types) if types else None
    if flat_types is not None and not flat_types.any():
        flat_types = None  # zeros are what a model assumes without them
    tokens = np.concatenate([part.split.tokens for part in parts])
    return Tokenized(
        Split(tokens, offsets, flat_types, samples.labels), np.concatenate([part.full_lengths for part in parts])
    )


def check_max_length(
    max_length: int,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    pair: bool,
    source: str,
    positions: int | None,
    virtual_tokens: int = 0,
) -> None:
    """ConfigError where the model cannot read `max_length` tokens, or they hold no text.

    source: of the model. positions: how many the model has embeddings for, where it says so. virtual_tokens: how many of them the method
    takes.
    """
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < LARGEST_LIMIT]
    longest = min(limits, default=LARGEST_LIMIT) - virtual_tokens
    if max_length > longest:
        less = f" behind method.num_virtual_tokens ({virtual_tokens})" if virtual_tokens else ""
        raise ConfigError(
            f"data.max_length ({max_length}) must be at most {longest}, the longest input of model.source ({source}){less}; "
            f"set data.max_length={longest}"
        )
    smallest = tokenizer.num_special_tokens_to_add(pair) + 1 + pair
    if max_length < smallest:
        raise ConfigError(
            f"data.max_length ({max_length}) must be at least {smallest}: the special tokens and one of "
            f"{'each' if pair else 'the'} text; 128 is usual for sentences"
        )


def require_fast(tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """ConfigError for a tokenizer written in Python, which does not say where in a text its tokens stand. source: model.source."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.source ({source}): its tokenizer, {type(tokenizer).__name__}, has no fast form, and does not say where in a text its "
            "tokens stand; use a model with a fast tokenizer (tokenizer.json)"
        )


def _chunks(samples: Samples) -> Iterator[Samples]:
    for start in range(0, len(samples), CHUNK):
        yield samples.take(np.arange(start, min(start + CHUNK, len(samples))))


def _tokenize_chunk(samples: Samples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenized:
    """Whole texts first, for their lengths; the few that are too long once more."""
    encoded = _encode(samples, tokenizer, None)
    full_lengths = _lengths(encoded["input_ids"])
    too_long = np.flatnonzero(full_lengths > max_length)
    if len(too_long):
        cut = _encode(samples.take(too_long), tokenizer, max_length)
        for name, rows in encoded.items():
            for position, row in enumerate(too_long):
                rows[row] = cut[name][position]
    rows, types = encoded["input_ids"], encoded.get("token_type_ids")
    offsets = np.concatenate([np.zeros(1, np.int64), _lengths(rows)]).cumsum()
    flat_types = None if types is None else _flat(types, np.int8)
    return Tokenized(Split(_flat(rows, np.int32), offsets, flat_types, samples.labels), full_lengths)


def _encode(
    samples: Samples, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> dict[str, list[list[int]]]:
    """input_ids, and token_type_ids where the model takes them: a list for each sample, without padding."""
    encoded = tokenizer(
        samples.texts,
        samples.pairs,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        verbose=False,  # of texts that are too long, which are counted here
    )
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def _lengths(rows: list[list[int]]) -> np.ndarray:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def _flat(rows: list[list[int]], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype)


def _check_no_empty(samples: Samples, offsets: np.ndarray) -> None:
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise DataError(
            f"{len(empty):,} texts have no token in the model's vocabulary, such as {samples.texts[empty[0]]!r:.80}; remove them"
        )
