"""Masked language modelling as BERT's (Devlin et al., arXiv 1810.04805), alone or with pairs of segments (NSP; ALBERT's SOP).

Of the tokens that are text 15 % are targets; 80 % of these are replaced by the mask token, 10 % by a random token, 10 % are left.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED, mix_words
from trainer.data.objectives.rows import WORD, Batch, Ids, Rows, Vocabulary, Words, below, framed, random_rows, uniform

MASKED, REPLACED = 0.8, 0.9
"""Of the targets: up to the first share masked, from there to the second a random token."""
MASKS, PAIRS = 1, 2  # keys of the random words


@dataclass(frozen=True)
class Mlm:
    """Rows with masks; a label is the token that was there."""

    vocabulary: Vocabulary
    length: int
    """Tokens of a row, the frame included."""
    seed: int
    fraction: float
    whole_words: bool

    def batch(self, rows: Rows) -> Batch:
        """input_ids, labels (B, T) int64, labels in place; attention_mask where a row has padding."""
        ids, is_token = framed(rows, self.vocabulary, self.length)
        return masked(self, ids, is_token, rows.samples)


@dataclass(frozen=True)
class MlmPairs:
    """Two segments of one document in each row, or of two: whether they belong together, jointly with the masks.

    nsp: the second segment follows the first (label 0) or comes from another place (1). sop: the two stand in their order (0) or are
    swapped (1), as in ALBERT (arXiv 1909.11942).
    """

    vocabulary: Vocabulary
    length: int
    seed: int
    fraction: float
    whole_words: bool
    swap: bool
    """sop; else nsp."""

    @property
    def pair_weight(self) -> float:
        """Masked tokens that a pair counts as: with it the joint loss is about the sum of both means, on any number of ranks."""
        return self.fraction * self.length

    def batch(self, rows: Rows) -> Batch:
        """input_ids, token_type_ids, attention_mask, labels (B, T) int64; pair_labels (B,)."""
        words = random_rows(rows.samples, 3, self.seed, PAIRS)
        changed, draws = below(words[:, 0], 0.5), uniform(words[:, 1:])
        ids = np.full((len(rows.ids), self.length), self.vocabulary.pad)
        types, is_token = np.zeros_like(ids), np.zeros(ids.shape, np.bool_)
        for b in range(len(ids)):
            document = longest_document(rows, b, self.vocabulary)
            other = document if rows.others is None else longest_document(rows.others, b, self.vocabulary)
            first, second = self.pair(document, other, draws[b], changed[b])
            start, end = [self.vocabulary.start], [self.vocabulary.end]
            line = np.concatenate([start, first, end, second, end])
            ids[b, : len(line)], is_token[b, : len(line)] = line, True
            types[b, len(first) + 2 : len(line)] = 1
        batch = masked(self, ids, is_token, rows.samples)
        return batch | {
            "attention_mask": is_token.astype(np.int64),
            "token_type_ids": types,
            "pair_labels": changed.astype(np.int64),
        }

    def pair(self, document: Ids, other: Ids, draws: NDArray[np.float64], changed: bool) -> tuple[Ids, Ids]:
        """The two segments; together they leave room for three special tokens. draws: (2,) numbers in [0, 1).

        A segment of another place begins as one that follows does, and is as long: nothing but what it says gives it away.
        """
        document = document[: self.length - 3]
        places = borders(document, self.vocabulary)
        place = places[int(draws[0] * len(places))]
        first, second = document[:place], document[place:]
        if not changed or self.swap:
            return (second, first) if changed else (first, second)
        size = max(len(second), 1)
        begins = [0, *(begin for begin in borders(other, self.vocabulary) if begin <= len(other) - size)]
        begin = begins[int(draws[1] * len(begins))]
        return first, other[begin : begin + size]


def masked(objective: Mlm | MlmPairs, ids: Ids, is_token: NDArray[np.bool_], samples: Ids) -> Batch:
    """The rows with masks, the labels, and the attention mask where one is needed."""
    vocabulary, words = objective.vocabulary, random_rows(samples, ids.shape[1], objective.seed, MASKS)
    is_text = is_token & ~vocabulary.is_special[ids]
    chosen = is_text & below(
        drawn_by_word(words, ids, vocabulary) if objective.whole_words else words, objective.fraction
    )
    batch = {"input_ids": replaced(ids, chosen, words, vocabulary), "labels": np.where(chosen, ids, IGNORED)}
    return batch if is_token.all() else batch | {"attention_mask": is_token.astype(np.int64)}


def drawn_by_word(words: Words, ids: Ids, vocabulary: Vocabulary) -> Words:
    """The random word of each token's first token of its word, so that a word is masked whole."""
    begins = vocabulary.starts_word[ids] | vocabulary.is_special[ids]
    begins[:, 1:] |= vocabulary.is_special[ids[:, :-1]]
    first = np.maximum.accumulate(np.where(begins, np.arange(ids.shape[1]), 0), axis=1)
    return np.take_along_axis(words, first, axis=1)


def replaced(ids: Ids, chosen: NDArray[np.bool_], words: Words, vocabulary: Vocabulary) -> Ids:
    """The tokens that the model is given: the chosen ones masked, another token, or as they are."""
    found, rows, columns = ids.copy(), *np.nonzero(chosen)
    own = mix_words(words[rows, columns])  # `words` decided who is chosen: those that are left are small
    new = (mix_words(own) % np.uint64(vocabulary.size)).astype(np.int64)
    new[own < np.uint64(int(MASKED * WORD))] = vocabulary.mask
    is_kept = own >= np.uint64(int(REPLACED * WORD))
    new[is_kept] = ids[rows[is_kept], columns[is_kept]]
    found[rows, columns] = new
    return found


def borders(document: Ids, vocabulary: Vocabulary) -> list[int]:
    """Where the second of two texts may begin: behind a sentence; before a word where there is but one; anywhere in a word."""
    after_sentences = np.flatnonzero(vocabulary.ends_sentence[document[:-1]]) + 1
    before_words = np.flatnonzero(vocabulary.starts_word[document[1:]]) + 1
    found = next((places.tolist() for places in (after_sentences, before_words) if len(places)), None)
    return found or list(range(1, max(len(document), 2)))


def longest_document(rows: Rows, row: int, vocabulary: Vocabulary) -> Ids:
    """The tokens of the document that has most of a row, without the special tokens at its ends."""
    assert rows.documents is not None
    documents = rows.documents[row, : rows.held[row]]
    best = int(np.bincount(documents).argmax())
    document = rows.ids[row, : rows.held[row]][documents == best]
    text = np.flatnonzero(~vocabulary.is_special[document])
    return document[text[0] : text[-1] + 1] if len(text) else document
