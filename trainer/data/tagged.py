"""Words with tags as tokens: the first token of each word has the word's tag, the others none.

Between trainer/data/tags.py and the batches. Invariant: no word is lost: a sentence of more than max_length tokens is cut between words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.data.batches import IGNORED
from trainer.data.tags import Sentence
from trainer.data.tokens import require_fast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaggedSet:
    """Pieces of sentences. Piece i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray
    """(sum of lengths,) int64, special tokens included."""
    offsets: np.ndarray
    """(N + 1,) int64."""
    labels: np.ndarray
    """int64, as long as `tokens`: class id of a word's first token, -100 of any other."""
    words: np.ndarray
    """int64, as long as `tokens`: number of the word, counted over all sentences, where there is a label; -1 elsewhere."""
    sentence_ends: np.ndarray
    """(S,) int64: words up to the end of each sentence."""
    word_labels: np.ndarray
    """(W,) int64: class id of every word."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens."""
        return np.diff(self.offsets)

    def batch(self, ids: np.ndarray, padding: int) -> "dict[str, Tensor]":
        """CPU tensors of these pieces, (B, T) int64, padded on the right: input_ids, attention_mask, labels, words.

        Without ids: the first piece, without targets.
        """
        import torch  # not at the top: tags are read where a second for torch is too long

        rows = ids if len(ids) else np.zeros(1, np.int64)
        starts, lengths = self.offsets[rows], self.lengths[rows]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        places = np.where(mask, starts[:, None] + columns, 0)
        is_given = mask if len(ids) else np.zeros_like(mask)
        arrays = {
            "input_ids": np.where(mask, self.tokens[places], padding),
            "attention_mask": mask,
            "labels": np.where(is_given, self.labels[places], IGNORED),
            "words": np.where(is_given, self.words[places], -1),
        }
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def tokenize_tagged(
    sentences: Sequence[Sentence], tag_names: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TaggedSet:
    """Tokens and labels of all sentences, cut into pieces of at most `max_length` tokens. ConfigError for a tokenizer in Python."""
    require_fast(tokenizer, tokenizer.name_or_path)
    before = " " if needs_space(tokenizer) else ""
    ids = {name: number for number, name in enumerate(tag_names)}
    word_labels = np.array([ids[tag] for sentence in sentences for tag in sentence.tags], np.int64)
    tokens: list[np.ndarray] = []
    words: list[np.ndarray] = []
    ends = np.cumsum([len(sentence.words) for sentence in sentences])
    for sentence, end in zip(sentences, ends, strict=True):
        first = int(end) - len(sentence.words)
        for piece, number in pieces([before + word for word in sentence.words], tokenizer, max_length):
            tokens.append(np.array(piece["input_ids"], np.int64))
            words.append(first_tokens(piece.word_ids(), first + number))
    flat = np.concatenate(words)
    labels = np.where(flat >= 0, word_labels[np.maximum(flat, 0)], IGNORED)
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in tokens])])
    return TaggedSet(np.concatenate(tokens), offsets, labels, flat, ends, word_labels)


def needs_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a word that is given alone is read as the inside of a longer one unless a space stands before it, as by GPT-2 and RoBERTa."""

    def tokens(words: str | list[str]) -> list[int]:
        is_split = not isinstance(words, str)
        return list(cast(Any, tokenizer)(words, is_split_into_words=is_split, add_special_tokens=False)["input_ids"])

    text = tokens("a a")
    return tokens(["a", "a"]) != text == tokens(["a", " a"])


def pieces(words: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Iterator[tuple[Any, int]]:
    """(encoded words, number of the first of them) of each part of a sentence; a word of more tokens than fit loses its last ones."""
    whole = tokenizer(list(words), is_split_into_words=True, verbose=False)
    if len(whole["input_ids"]) <= max_length:
        yield whole, 0
        return
    counts = np.bincount([word for word in whole.word_ids() if word is not None], minlength=len(words))
    room, first, held = max_length - tokenizer.num_special_tokens_to_add(), 0, 0
    for number, count in enumerate([*counts.tolist(), room + 1]):
        if number > first and held + count > room:
            yield (
                tokenizer(list(words[first:number]), is_split_into_words=True, truncation=True, max_length=max_length),
                first,
            )
            first, held = number, 0
        held += count


def first_tokens(word_ids: Sequence[int | None], first_word: int) -> np.ndarray:
    """The number of each word at its first token, -1 elsewhere."""
    found = np.full(len(word_ids), -1, np.int64)
    before: int | None = None
    for place, word in enumerate(word_ids):
        if word is not None and word != before:
            found[place] = first_word + word
        before = word if word is not None else before
    return found
