"""Instruction data: conversations as tokens, with what of them is learned, cut, split, and packed or batched.

Place in the flow: conversations.py reads, rendering.py makes text, trainer/data/gate.py checks, trainer/task/instruct.py trains.
Invariant: a target is known by its place in the conversation's structure and not by its value, since many tokenizers pad with the token
that ends an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.config import InstructData
from trainer.data.batches import IGNORED, permutation
from trainer.data.conversations import Conversation, Turn, read_conversations
from trainer.data.rendering import OTHERWISE, Format, Rendered, load_format
from trainer.data.stream.packing import best_fit_rows
from trainer.data.tokens import require_fast
from trainer.errors import DataError

Ints = NDArray[np.int64]
SHOWN = 80
"""Characters of a conversation that an error shows."""
TOGETHER = 1000
"""Conversations tokenized in one call: Python's lists of tokens and places take 150 bytes a token, our arrays 9."""


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens."""

    ids: Ints
    """(N,) of the whole conversation, the end of its last answer included."""
    is_target: NDArray[np.bool_]
    """(N,) whether it is learned to say this token, given those before it."""
    answers: tuple[tuple[int, int], ...]
    """First and last + 1 token of each answer with what ends it; few-shot examples are not among them."""
    place: str
    """Where it stands in the source."""
    is_cut: bool = False
    """Whether later turns were left out."""
    straddles: bool = False
    """Whether a token belongs to a prompt and to the answer behind it."""
    begins_otherwise: bool = False
    """Whether what is learned begins with something else than what the answer says."""

    @property
    def prompt_length(self) -> int:
        """Tokens before the last answer: what the model is asked with."""
        return self.answers[-1][0]

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class InstructSplit:
    """Rows of samples: one each, or several that do not see each other."""

    samples: list[Sample]
    rows: list[list[int]]
    """Which samples make up each row."""
    is_packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """(R,) tokens that the model reads of each row."""
        return np.array([sum(self.samples[index].num_inputs for index in row) for row in self.rows], np.int64)

    def batch(self, ids: Ints, padding: int) -> dict[str, Tensor]:
        """input_ids and labels (B, T) int64, T the longest row; labels are shifted, IGNORED where nothing is learned; num_tokens (B,).

        Of packed rows also position_ids, which start anew with each sample and in the padding. Without ids: one row of one padding token
        without a target.
        """
        rows = [[self.samples[index] for index in self.rows[place]] for place in ids]
        held = np.array([sum(sample.num_inputs for sample in row) for row in rows], np.int64)
        shape = max(len(rows), 1), max(held.tolist(), default=1)
        inputs, labels = np.full(shape, padding, np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            start = 0
            for sample in row:
                end = start + sample.num_inputs
                inputs[place, start:end] = sample.ids[:-1]
                labels[place, start:end] = np.where(sample.is_target[1:], sample.ids[1:], IGNORED)
                positions[place, start:end] = np.arange(end - start)
                start = end
        batch = {"input_ids": inputs, "labels": labels, "num_tokens": held}
        if self.is_packed:
            batch["position_ids"] = positions
        return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass(frozen=True)
class InstructSet:
    """What a run learns and is tested on."""

    train: InstructSplit
    validation: InstructSplit
    conversations: list[Conversation]
    """All that were read, in the order of the source."""
    format: Format
    before: tuple[Turn, ...]
    """What stands before every conversation that has no system text of its own: data.system, and the examples of data.few_shot."""
    source_format: str
    left_out: tuple[str, ...]
    """Places of conversations whose first answer ends behind max_length tokens."""
    cut: tuple[str, ...]
    """Places of those that lost later turns."""


def build_instruct(data: InstructData, tokenizer: PreTrainedTokenizerBase) -> InstructSet:
    """Read, tokenize, cut, and hold out the validation rows. DataError where nothing is left."""
    source_format, conversations = read_conversations(data)
    found = load_format(data.template, tokenizer)
    shots, rest = conversations[: data.few_shot], conversations[data.few_shot :]
    encoded = encode(with_shots(rest, shots), found, tokenizer, data)
    samples = [sample for sample in encoded if sample is not None]
    num_validation = max(round(len(samples) * data.validation_fraction), 1)
    if len(samples) < num_validation + 1:
        raise DataError(
            f"data.source ({data.source}): {len(samples)} of {len(rest):,} conversations have an answer within data.max_length "
            f"({data.max_length}) tokens, and one is needed for training and one for validation; raise it, or give more"
        )
    order = permutation(len(samples), data.split_seed)
    train = [samples[index] for index in np.sort(order[num_validation:])]
    held_out = [samples[index] for index in order[: min(num_validation, data.validation_rows or num_validation)]]
    return InstructSet(
        train=packed(train, data.max_length) if data.packing == "best_fit" else one_a_row(train),
        validation=one_a_row(held_out),
        conversations=conversations,
        format=found,
        before=(*([Turn("system", data.system)] if data.system is not None else []), *turns_of_shots(shots)),
        source_format=source_format,
        left_out=tuple(one.place for one, sample in zip(rest, encoded, strict=True) if sample is None),
        cut=tuple(sample.place for sample in samples if sample.is_cut),
    )


def with_shots(conversations: Sequence[Conversation], shots: Sequence[Conversation]) -> list[tuple[Conversation, int]]:
    """Each conversation behind the examples, and how many turns of it are examples; a system turn stays first."""
    before = turns_of_shots(shots)
    found = []
    for conversation in conversations:
        num_system = int(conversation.turns[0].role == "system")
        turns = (*conversation.turns[:num_system], *before, *conversation.turns[num_system:])
        found.append((Conversation(turns, conversation.place), num_system + len(before) if before else 0))
    return found


def turns_of_shots(shots: Sequence[Conversation]) -> list[Turn]:
    """The turns of the examples, but for their system texts."""
    return [turn for shot in shots for turn in shot.turns if turn.role != "system"]


def one_a_row(samples: list[Sample]) -> InstructSplit:
    """A row for each sample."""
    return InstructSplit(samples, [[index] for index in range(len(samples))])


def packed(samples: list[Sample], length: int) -> InstructSplit:
    """Best-fit rows of at most `length` tokens; no sample is cut for it."""
    rows = best_fit_rows(np.array([sample.num_inputs for sample in samples], np.int64), length)
    order = np.argsort(rows, kind="stable")
    edges = np.flatnonzero(np.diff(rows[order])) + 1
    return InstructSplit(samples, [group.tolist() for group in np.split(order, edges)], is_packed=True)


def encode(
    conversations: Sequence[tuple[Conversation, int]],
    found: Format,
    tokenizer: PreTrainedTokenizerBase,
    data: InstructData,
) -> list[Sample | None]:
    """Tokens and targets of each conversation, whose first turns are examples; None for one whose first answer does not fit.

    ConfigError for a tokenizer in Python.
    """
    require_fast(tokenizer, tokenizer.name_or_path)
    samples: list[Sample | None] = []
    for start in range(0, len(conversations), TOGETHER):
        some = conversations[start : start + TOGETHER]
        rendered = [render(conversation, num_examples, found, data) for conversation, num_examples in some]
        tokens = cast(Any, tokenizer)(
            [text.text for text in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        rows = zip(tokens["input_ids"], tokens["offset_mapping"], rendered, some, strict=True)
        samples += [
            sample_of(
                np.array(ids, np.int64),
                np.array(offsets, np.int64).reshape(-1, 2),
                text,
                conversation=conversation,
                num_examples=num_examples,
                data=data,
            )
            for ids, offsets, text, (conversation, num_examples) in rows
        ]
    return samples


def render(conversation: Conversation, num_examples: int, found: Format, data: InstructData) -> Rendered:
    """A conversation as text. DataError with its place where the template refuses it, or rewrites an answer that is to be learned."""
    try:
        rendered = found.render(conversation.turns)
        if not rendered.answers or (rendered.rewritten > num_examples and data.learn != "last"):
            fix = "data.learn=last, or " if rendered.answers else ""
            raise DataError(
                f"{found.name} template writes turn {rendered.rewritten} differently once others follow it, or from how it asks for it, "
                f"so what is learned would not be what the model is asked for; use {fix}{OTHERWISE}"
            )
    except DataError as error:
        raise DataError(f"{conversation.place}: {error}; it begins {conversation.turns[0].text[:SHOWN]!r}") from None
    return rendered


def sample_of(
    ids: Ints, offsets: Ints, text: Rendered, *, conversation: Conversation, num_examples: int, data: InstructData
) -> Sample | None:
    """A conversation cut behind the last answer that fits. ids: (N,); offsets: (N, 2) characters of each token."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    learned = [
        turn.content.strip()
        for number, turn in enumerate(conversation.turns)
        if turn.role == "assistant" and number >= max(num_examples, text.rewritten)
    ]
    places = list(zip(text.answers[-len(learned) :], learned, strict=True))
    # A tokenizer that trims white space off its offsets gives a line break no width: it belongs to what it lies in, not to what it touches.
    spans = [np.flatnonzero((ends > first) & (starts < last)) for (first, last), _ in places]
    fitting = [(int(span[0]), int(span[-1]) + 1) for span in spans if len(span) and span[-1] < data.max_length]
    if not fitting:
        return None
    length = fitting[-1][1]
    is_target = np.zeros(length, bool)
    for first, last in fitting[-1:] if data.learn == "last" else fitting:
        is_target[first:last] = True
    if data.learn == "everything":
        is_target[1:] = True
    return Sample(
        ids=ids[:length],
        is_target=is_target,
        answers=tuple(fitting),
        place=conversation.place,
        is_cut=len(fitting) < len(spans),
        straddles=any(bool(((starts < first) & (ends > first)).any()) for (first, _), _ in places),
        begins_otherwise=any(not text.text[first:last].strip().startswith(answer) for (first, last), answer in places),
    )
