"""Pairs of a text and what is made of it: read, checked and split, then tokenized and batched for a model with a decoder of its own.

`read_pairs` needs neither torch nor a tokenizer, so that mistakes are found before anything is launched. trainer/task/seq2seq.py trains.
Invariant: equal texts, but for white space, lie on the same side of the split, and the held-out ones count once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.config import PairData
from trainer.data.batches import IGNORED, permutation
from trainer.data.docstrings import stdlib_summaries
from trainer.data.samples import Samples
from trainer.data.sources import check_path, hub_table, is_hub_id, load_hub
from trainer.data.tables import Table, check_columns, read_file, surrogate_problem
from trainer.data.tokens import Split, Tokenized, tokenize
from trainer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MOST_SHOWN = 5
"""Mistakes of a source that are listed."""


@dataclass(frozen=True)
class Pair:
    """One text, its prefix included, and what a model should make of it."""

    text: str
    target: str


@dataclass(frozen=True)
class PairSplit:
    """Pairs and their tokens."""

    pairs: list[Pair]
    texts: Split
    targets: Split

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of text and target together."""
        return np.asarray(self.texts.lengths + self.targets.lengths, np.int64)

    def batch(self, ids: NDArray[np.int64], *, padding: int, start: int) -> "dict[str, Tensor]":
        """CPU tensors, padded on the right. Without ids: the first pair, without a target.

        input_ids and attention_mask: (B, S) int64. labels: (B, T) int64, the token that the model should say at each place, IGNORED in the
        padding; decoder_input_ids: (B, T) int64, the token before it, `start` at first. num_tokens: (B,) of text and target.
        """
        import torch  # not at the top: read_pairs runs where a second for torch is too long

        rows = ids if len(ids) else np.zeros(1, np.int64)
        (inputs, is_text), (said, is_said) = self.texts.padded(rows, padding), self.targets.padded(rows, padding)
        batch = {
            "input_ids": inputs,
            "attention_mask": is_text,
            "decoder_input_ids": np.concatenate([np.full((len(rows), 1), start), said[:, :-1]], axis=1),
            "labels": np.where(is_said & bool(len(ids)), said, IGNORED),
            "num_tokens": self.lengths[ids],
        }
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


@dataclass(frozen=True)
class PairSet:
    """What a run learns and is tested on."""

    train: PairSplit
    validation: PairSplit
    num_held_out: int
    """Texts that are held out, of which validation takes the first."""
    num_repeated: int
    """Pairs of the validation whose target is one of training's too."""
    described_lengths: tuple[str, str]
    """What is said of the lengths of texts and of targets in training."""


def read_pairs(data: PairData) -> list[Pair]:
    """Every pair of `data.source`. DataError lists what cannot be learned from, with file and line."""
    table = read_table(data)
    prefix = data.prefix or ""
    problems = {bad.line: bad.reason for bad in table.malformed}
    pairs = []
    for line, text, target in zip(table.lines, table.columns[data.text], table.columns[data.target], strict=True):
        problem = problem_of(data.text, text) or problem_of(data.target, target)
        if problem:
            problems[line] = problem
        pairs.append(Pair(prefix + str(text), str(target).strip()))
    if problems:
        shown = [f"{table.place(line)}: {problems[line]}" for line in sorted(problems)[:MOST_SHOWN]]
        more = f"; and {len(problems) - MOST_SHOWN:,} more" if len(problems) > MOST_SHOWN else ""
        raise DataError("; ".join(shown) + more + "; correct them, or take them out")
    return pairs


def read_table(data: PairData) -> Table:
    """The columns of texts and targets."""
    columns = {"data.text": data.text, "data.target": data.target}
    if data.source == "asset:stdlib":
        check_columns(data.source, ["text", "target"], columns)
        summaries = stdlib_summaries()
        values = {"text": [text for text, _ in summaries], "target": [target for _, target in summaries]}
        return Table(data.source, "asset", values, range(1, len(summaries) + 1), has_lines=False)
    if is_hub_id(data.source):
        dataset = load_hub(data.source, data.subset, data.split, "data.source")
        return hub_table(dataset, f"{data.source}[{data.split}]", columns)
    return read_file(check_path(data.source, "data.source"), columns)


def problem_of(column: str, value: object) -> str:
    """What is wrong with a cell; nothing if it holds text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return f"column {column} is empty, and must hold text"
    if not isinstance(value, str):
        return f"column {column} must hold text, not {value!r:.60}"
    problem = surrogate_problem(value)
    return problem and f"column {column} {problem}"


def split_pairs(pairs: Sequence[Pair], data: PairData) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training in their order, and the held-out ones in random order, each text once. DataError where nothing would be left."""
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(" ".join(pair.text.split()), len(numbers)) for pair in pairs]
    num_held_out = max(round(len(numbers) * data.validation_fraction), 1)
    if len(numbers) <= num_held_out:
        raise DataError(
            f"data.source ({data.source}): {len(numbers)} different texts, and one is needed for training and one for validation; give more"
        )
    held_out = permutation(len(numbers), data.split_seed)[:num_held_out]
    first = dict(zip(reversed(keys), reversed(pairs), strict=True))
    is_held_out = np.isin(np.arange(len(numbers)), held_out)
    train = [pair for key, pair in zip(keys, pairs, strict=True) if not is_held_out[key]]
    return train, [first[int(key)] for key in held_out]


def build_pairs(data: PairData, tokenizer: "PreTrainedTokenizerBase") -> PairSet:
    """Read, split and tokenize. Every rank calls it, and each does all of it."""
    train, held_out = split_pairs(read_pairs(data), data)
    validation, known = held_out[: data.validation_rows], {pair.target for pair in train}
    texts, targets = encoded(train, tokenizer, data)
    return PairSet(
        train=PairSplit(train, texts.split, targets.split),
        validation=PairSplit(validation, *(part.split for part in encoded(validation, tokenizer, data))),
        num_held_out=len(held_out),
        num_repeated=sum(pair.target in known for pair in validation),
        described_lengths=(
            texts.describe_lengths(data.max_length),
            targets.describe_lengths(data.max_target_length),
        ),
    )


def encoded(pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", data: PairData) -> tuple[Tokenized, Tokenized]:
    """Tokens of the texts and of the targets."""
    texts = encode_texts([pair.text for pair in pairs], tokenizer, data.max_length)
    return texts, encode_texts([pair.target for pair in pairs], tokenizer, data.max_target_length)


def encode_texts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Tokenized:
    """Each text in tokens, the end of sequence behind it where the tokenizer has one, cut to `max_length` with it."""
    end, samples = tokenizer.eos_token_id, Samples(list(texts), None, np.zeros(len(texts), np.int64))
    if end is None or end in tokenizer("a")["input_ids"]:
        return tokenize(samples, tokenizer, max_length)
    found = tokenize(samples, tokenizer, max_length - 1)
    tokens, offsets = found.split.tokens, found.split.offsets
    with_end = replace(
        found.split,
        tokens=np.insert(tokens, offsets[1:], end),
        offsets=offsets + np.arange(len(offsets)),
        token_types=None,
    )
    return Tokenized(with_end, found.full_lengths + 1)
