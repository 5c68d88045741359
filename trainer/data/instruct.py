"""Instruction data: prompts and the responses to learn, as tokens of the model's own chat template.

Place in the flow: trainer/task/instruct.py trains on it. Invariant: a target is a token of the response or the end token after it, known
by its place and not by its value, since many tokenizers pad with the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.config import InstructData
from trainer.data.batches import IGNORED, permutation
from trainer.data.docstrings import docstring_file
from trainer.data.tables import read_file
from trainer.errors import DataError

PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"
"""For a tokenizer without a chat template."""


@dataclass(frozen=True)
class InstructSplit:
    """Tokenized conversations of one prompt and one response."""

    rows: list[np.ndarray]
    """int64 tokens of prompt, response and end token."""
    prompt_lengths: np.ndarray
    """(N,) int64 tokens of each prompt."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 tokens that the model reads of each row: all but the last."""
        return np.array([len(row) - 1 for row in self.rows], np.int64)

    def take(self, ids: np.ndarray) -> "InstructSplit":
        """The rows at these positions."""
        return InstructSplit([self.rows[index] for index in ids], self.prompt_lengths[ids])

    def batch(self, ids: np.ndarray, padding: int) -> dict[str, Tensor]:
        """input_ids and labels (B, T) int64, T the longest row; labels are shifted, IGNORED outside the response; num_tokens (B,).

        Without ids: one row of one padding token without a target.
        """
        rows = [self.rows[index] for index in ids]
        longest = max((len(row) - 1 for row in rows), default=1)
        inputs = np.full((max(len(rows), 1), longest), padding, np.int64)
        labels = np.full_like(inputs, IGNORED)
        for place, (row, prompt) in enumerate(zip(rows, self.prompt_lengths[ids], strict=True)):
            inputs[place, : len(row) - 1] = row[:-1]
            labels[place, prompt - 1 : len(row) - 1] = row[prompt:]
        num_tokens = np.array([len(row) - 1 for row in rows], np.int64)
        return {
            name: torch.from_numpy(array)
            for name, array in (("input_ids", inputs), ("labels", labels), ("num_tokens", num_tokens))
        }


@dataclass(frozen=True)
class InstructSet:
    """What a run learns and is tested on."""

    train: InstructSplit
    validation: InstructSplit
    num_left_out: int
    """Pairs of more than max_length tokens."""


def read_pairs(data: InstructData) -> tuple[Sequence[str], Sequence[str]]:
    """(prompts, responses) of the source. DataError for a row without text."""
    names = {"data.prompt": data.prompt, "data.response": data.response}
    if data.source == "asset:stdlib":
        table = read_file(docstring_file(), names, kind="asset")
    else:
        table = read_file(Path(data.source).expanduser(), names)
    columns = [table.columns[name] for name in (data.prompt, data.response)]
    for setting, column in zip(("prompt", "response"), columns, strict=True):
        for line, value in zip(table.lines, column, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{table.place(line)}: column {getattr(data, setting)} must hold text, not {value!r:.60}; correct it"
                )
    if table.malformed:
        first = table.malformed[0]
        raise DataError(f"{table.place(first.line)}: {first.reason}; correct it")
    return cast(Sequence[str], columns[0]), cast(Sequence[str], columns[1])


def build_instruct(data: InstructData, tokenizer: PreTrainedTokenizerBase) -> InstructSet:
    """Read, tokenize, leave out what is too long, and hold out the validation rows. DataError where nothing is left."""
    prompts, responses = read_pairs(data)
    whole = tokenize_pairs(prompts, responses, tokenizer)
    fits = np.flatnonzero(whole.lengths < data.max_length)
    num_validation = min(max(round(len(fits) * data.validation_fraction), 1), data.validation_rows or len(fits))
    if len(fits) < num_validation + 1:
        raise DataError(
            f"data.source ({data.source}): {len(fits)} of {len(whole):,} pairs have at most data.max_length ({data.max_length}) tokens, "
            "and one is needed for training and one for validation; raise it, or give more pairs"
        )
    order = fits[permutation(len(fits), data.split_seed)]
    held_out = round(len(fits) * data.validation_fraction) or 1
    return InstructSet(
        train=whole.take(np.sort(order[held_out:])),
        validation=whole.take(np.sort(order[:num_validation])),
        num_left_out=len(whole) - len(fits),
    )


def tokenize_pairs(
    prompts: Sequence[str], responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> InstructSplit:
    """Each prompt in the template, its response and the end token behind it."""
    end = tokenizer.eos_token_id
    assert end is not None, "load_tokenizer gives every tokenizer an end token"
    heads = encode(tokenizer, [in_template(tokenizer, prompt) for prompt in prompts])
    tails = encode(tokenizer, list(responses))
    rows = [np.array([*head, *tail, end], np.int64) for head, tail in zip(heads, tails, strict=True)]
    return InstructSplit(rows, np.array([len(head) for head in heads], np.int64))


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text, without special tokens of the tokenizer's own."""
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def in_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text before the response, in the model's own chat template where it has one."""
    if tokenizer.chat_template is None:
        return PLAIN_PROMPT.format(prompt=prompt)
    turns = [{"role": "user", "content": prompt}]
    return cast(str, cast(Any, tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
