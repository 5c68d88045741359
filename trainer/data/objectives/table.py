"""The table of objectives: which model each needs, which special tokens, and how long the rows are that it starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trainer.config import StreamData
from trainer.data.objectives.denoising import Infilling, SpanCorruption, noise_counts, tokens_for_inputs
from trainer.data.objectives.masking import Mlm, MlmPairs
from trainer.data.objectives.permutation import Permutation
from trainer.data.objectives.rows import Batch, Rows, Vocabulary
from trainer.errors import ConfigError


class Objective(Protocol):
    """Makes batches of rows. Pure; each says which arrays it gives."""

    def batch(self, rows: Rows) -> Batch:
        """What the model is given, and labels: int64 arrays, one row a sample."""


@dataclass(frozen=True)
class Known:
    """A row of the table."""

    words: str
    """What is to be found."""
    roles: tuple[str, ...]
    """Special tokens that it needs, beside padding."""
    frame: tuple[str, ...]
    """How special tokens stand around a text (`$A`) in its rows, by role."""
    row_length: Callable[[StreamData], int]
    """Tokens of a stream's row, of which it makes a row of data.sequence_length."""
    build: Callable[[StreamData, Vocabulary, int], Objective]
    """(settings, vocabulary, seed) -> the objective."""


def build_mlm(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """Masks alone."""
    return Mlm(vocabulary, data.sequence_length, seed, fraction_of(data), data.whole_words)


def build_pairs(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """Masks and pairs of segments."""
    swap = data.objective == "mlm_sop"
    return MlmPairs(vocabulary, data.sequence_length, seed, fraction_of(data), data.whole_words, swap=swap)


def build_span_corruption(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """Spans of noise as sentinels. ConfigError where there are fewer sentinels than spans."""
    _, spans = noise_counts(row_length(data), fraction_of(data), data.mean_span)
    if spans > len(vocabulary.sentinels):
        raise ConfigError(
            f"data.sequence_length ({data.sequence_length}) has {spans} spans of noise, and the tokenizer {len(vocabulary.sentinels)} "
            "sentinels; lower it or data.noise_fraction, or raise data.mean_span"
        )
    return SpanCorruption(vocabulary, data.sequence_length, seed, fraction_of(data), data.mean_span)


def build_infilling(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """Spans as masks, sentences in another order."""
    return Infilling(vocabulary, data.sequence_length, seed, fraction_of(data), data.mean_span, permute_sentences=True)


def build_permutation(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """Spans in a random order."""
    return Permutation(vocabulary, data.sequence_length, seed, fraction_of(data), max_span=5)


AROUND = ("start", "$A", "end")

OBJECTIVES: dict[str, Known] = {
    "mlm": Known("masked tokens", ("start", "end", "mask"), AROUND, lambda data: data.sequence_length - 2, build_mlm),
    "mlm_nsp": Known(
        "masked tokens and whether a text follows another",
        ("start", "end", "mask"),
        AROUND,
        lambda data: data.sequence_length - 3,
        build_pairs,
    ),
    "mlm_sop": Known(
        "masked tokens and the order of two texts",
        ("start", "end", "mask"),
        AROUND,
        lambda data: data.sequence_length - 3,
        build_pairs,
    ),
    "span_corruption": Known(
        "spans of tokens, from sentinels",
        ("end", "sentinels"),
        ("$A", "end"),
        lambda data: tokens_for_inputs(data.sequence_length, fraction_of(data), data.mean_span),
        build_span_corruption,
    ),
    "infilling": Known(
        "a text from one with gaps and permuted sentences",
        ("start", "end", "mask"),
        AROUND,
        lambda data: data.sequence_length - 2,
        build_infilling,
    ),
    "plm": Known(
        "spans of tokens in a random order",
        ("start", "end"),
        ("$A", "end", "start"),
        lambda data: data.sequence_length - 2,
        build_permutation,
    ),
}
"""data.objective -> what it is. clm, the next token, needs nothing of this: rows and labels come from the stream."""

FRACTIONS = {"span_corruption": 0.15, "infilling": 0.3, "plm": 1 / 6}
"""Where data.noise_fraction is none; masks take 0.15."""


SHORTEST = 2
"""Tokens of text in a row, at least."""


def is_paired(data: StreamData) -> bool:
    """Whether pairs of texts of one document are judged too."""
    return data.objective in ("mlm_nsp", "mlm_sop")


def fraction_of(data: StreamData) -> float:
    """The share of the tokens that is to be found."""
    return data.noise_fraction if data.noise_fraction is not None else FRACTIONS.get(data.objective, 0.15)


def row_length(data: StreamData) -> int:
    """Tokens of a stream's row, of which the objective makes one of data.sequence_length. ConfigError where that leaves too few."""
    if data.objective == "clm":
        return data.sequence_length
    length = OBJECTIVES[data.objective].row_length(data)
    if length < SHORTEST:
        raise ConfigError(
            f"data.sequence_length ({data.sequence_length}) leaves {max(length, 0)} tokens of text beside the special tokens of "
            f"data.objective={data.objective}; it must leave {SHORTEST}: set it to {data.sequence_length + SHORTEST - length} or more"
        )
    return length


def build_objective(data: StreamData, vocabulary: Vocabulary, seed: int) -> Objective:
    """The objective of the settings. ConfigError where the vocabulary does not do."""
    return OBJECTIVES[data.objective].build(data, vocabulary, seed)
