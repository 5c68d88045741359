"""What every objective starts from: rows of tokens, what is known of the tokens, and random words for each sample."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import GOLDEN_GAMMA, IGNORED, mix_words

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]
Batch = dict[str, NDArray[np.int64]]

WORD = 2**64
"""How many random words there are."""


@dataclass(frozen=True)
class Vocabulary:
    """What an objective knows of the tokenizer."""

    size: int
    pad: int
    start: int
    """Before a text: [CLS] or <s>."""
    end: int
    """After a text: [SEP] or </s>."""
    mask: int
    """-1 where the objective needs none."""
    sentinels: Ids
    """(S,) int64, in the order of their use; empty where the objective needs none."""
    is_special: NDArray[np.bool_]
    """(V,) tokens that are no text and are never masked."""
    starts_word: NDArray[np.bool_]
    """(V,) tokens with which a word begins."""
    ends_sentence: NDArray[np.bool_]
    """(V,) tokens with which a sentence or a line ends."""


@dataclass(frozen=True)
class Rows:
    """Rows of a stream."""

    ids: Ids
    """(B, n) int64; what stands behind a row's own tokens means nothing."""
    held: Ids
    """(B,) tokens of each row."""
    samples: Ids
    """(B,) their global numbers, on which all randomness depends."""
    documents: Ids | None = None
    """(B, n) the document of each token, counted in its row, -1 behind; for objectives on pairs."""
    others: "Rows | None" = None
    """For nsp: a row of another place for each row."""

    @property
    def is_token(self) -> NDArray[np.bool_]:
        """(B, n) where the rows have tokens."""
        return np.arange(self.ids.shape[1]) < self.held[:, None]


def random_rows(samples: Ids, count: int, *key: int) -> Words:
    """(B, count) random words that depend on `key` and each sample's number: row b is `random_words(count, *key, samples[b])`."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix_words(state + np.array([part % WORD], np.uint64) + GOLDEN_GAMMA)
    states = mix_words(state + samples.astype(np.uint64) + GOLDEN_GAMMA)
    return mix_words(states[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_GAMMA)


def below(words: Words, share: float) -> NDArray[np.bool_]:
    """Which words fall into the first `share` of all."""
    return words < np.uint64(min(int(share * WORD), WORD - 1))


def uniform(words: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1), from the 53 high bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def framed(rows: Rows, vocabulary: Vocabulary, length: int) -> tuple[Ids, NDArray[np.bool_]]:
    """(B, length) start, the row, end, padding; and where that is not padding. length: at least the rows' plus 2."""
    ids = np.full((len(rows.ids), length), vocabulary.pad)
    ids[:, 0] = vocabulary.start
    ids[:, 1 : rows.ids.shape[1] + 1] = np.where(rows.is_token, rows.ids, vocabulary.pad)
    ids[np.arange(len(ids)), rows.held + 1] = vocabulary.end
    return ids, np.arange(length) < rows.held[:, None] + 2


def compacted(values: Ids, kept: NDArray[np.bool_], width: int, fill: int) -> tuple[Ids, Ids]:
    """(B, width) the kept values of each row side by side, then `fill`; and (B,) how many were kept."""
    places = np.cumsum(kept, axis=1) - 1
    found = np.full((len(values), width), fill)
    rows = np.broadcast_to(np.arange(len(values))[:, None], kept.shape)
    found[rows[kept], places[kept]] = values[kept]
    return found, kept.sum(axis=1)


def shifted_right(labels: Ids, start: int, pad: int) -> Ids:
    """What a decoder is given: `start`, then the labels without the last; padding where a label is none."""
    given = np.empty_like(labels)
    given[:, 0] = start
    given[:, 1:] = np.where(labels[:, :-1] == IGNORED, pad, labels[:, :-1])
    return given
