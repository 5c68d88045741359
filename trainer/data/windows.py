"""Questions as tokens: each with its context, a long one in windows that overlap, and every token's place in the context's characters.

Place in the flow: questions.py reads, trainer/task/question_answering.py trains, trainer/predict/questions.py answers. Invariant: every
token of a context is in some window of each of its questions, and a target is found by places in the text, never by searching tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from trainer.data.batches import IGNORED
from trainer.data.questions import Question
from trainer.data.tokens import require_fast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]
QUESTION_SHARE = 4
"""A question takes at most one in so many tokens of a window; longer ones are cut."""
TOGETHER = 1000
"""Texts tokenized in one call."""


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around a pair of texts."""

    ids: tuple[list[int], list[int], list[int]]
    """Special tokens before the first text, between the two and after the second."""
    types: tuple[list[int], ...] | None
    """token_type_ids of the five parts: special, first text, special, second text, special; one each for the texts. None: not used."""
    cls: int
    """Place of the token that stands for "no answer" from the start, or -1 from the end."""

    @property
    def num_special(self) -> int:
        """Tokens that are of neither text."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class Windows:
    """Windows in flat arrays. Window i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: NDArray[np.int32]
    offsets: Ints
    """(W + 1,)"""
    token_types: NDArray[np.int8] | None
    """As long as `tokens`. None where the model needs none."""
    places: NDArray[np.int32]
    """(as many as tokens, 2) first and last + 1 character of each token in its context; 0, 0 for tokens of anything else."""
    inside: Ints
    """(W, 2) first and last + 1 token of the window that is of the context."""
    cls: Ints
    """(W,) the token that stands for "no answer"."""
    labels: Ints
    """(W, 2) first and last token of the answer; `cls` where the window does not hold it; IGNORED where no window of its question does."""
    questions: Ints
    """(W,) index of its question."""

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def lengths(self) -> Ints:
        """(W,) tokens."""
        return np.diff(self.offsets)

    def characters(self, ids: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """First and last + 1 character in the context of the stretches first..last, tokens of the windows `ids`."""
        starts = self.offsets[ids]
        return self.places[starts + first, 0].astype(np.int64), self.places[starts + last, 1].astype(np.int64)

    def batch(self, ids: Ints, padding: int) -> "dict[str, Tensor]":
        """CPU tensors, padded on the right to the longest window.

        input_ids, attention_mask and, where the model needs them, token_type_ids: (B, T) int64; labels (B, 2) int64. Without ids: a
        dummy, the first window, whose labels are IGNORED.
        """
        import torch  # not at the top: the module is read where a second for torch is too long

        rows = ids if len(ids) else np.zeros(1, np.int64)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        found = np.where(mask, starts[:, None] + columns, 0)
        batch: dict[str, Any] = {"input_ids": np.where(mask, self.tokens[found], padding), "attention_mask": mask}
        if self.token_types is not None:
            batch["token_type_ids"] = np.where(mask, self.token_types[found], 0)
        batch["labels"] = self.labels[rows] if len(ids) else np.full((1, 2), IGNORED)
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


def make_windows(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", *, max_length: int, stride: int
) -> Windows:
    """All windows of all questions, in their order. ConfigError for a tokenizer in Python."""
    frame = frame_of(tokenizer)
    asked = [ids for ids, _ in encode([one.question.strip() for one in questions], tokenizer)]
    contexts = list(dict.fromkeys(one.context for one in questions))
    by_context = dict(zip(contexts, encode(contexts, tokenizer), strict=True))
    made = []
    for number, (question, ids) in enumerate(zip(questions, asked, strict=True)):
        first = ids[: max_length // QUESTION_SHARE]
        context, places = by_context[question.context]
        room = max_length - frame.num_special - len(first)
        answer = answer_tokens(question, places)
        parts = list(parts_of(len(context), room, stride))
        is_found = [answer is not None and start <= answer[0] and answer[1] < end for start, end in parts]
        for (start, end), holds in zip(parts, is_found, strict=True):
            window = framed(frame, first, context[start:end], places[start:end])
            label = (window["cls"],) * 2
            if holds and answer is not None:
                label = answer[0] - start + window["inside"][0], answer[1] - start + window["inside"][0]
            elif question.answers and not any(is_found):
                label = IGNORED, IGNORED
            made.append({**window, "labels": label, "questions": number})
    return joined(made, has_types=frame.types is not None)


def frame_of(tokenizer: "PreTrainedTokenizerBase") -> Frame:
    """What the tokenizer puts around two texts, from what it makes of a pair."""
    require_fast(tokenizer, tokenizer.name_or_path)
    pair = cast(Any, tokenizer)("1", "1")
    ids, sides, types = pair["input_ids"], pair.sequence_ids(0), pair.get("token_type_ids")
    cuts = [sides.index(0), len(sides) - sides[::-1].index(0), sides.index(1), len(sides) - sides[::-1].index(1)]
    special = ids[: cuts[0]], ids[cuts[1] : cuts[2]], ids[cuts[3] :]
    of_parts = None
    if types is not None:
        of_parts = types[: cuts[0]], [types[cuts[0]]], types[cuts[1] : cuts[2]], [types[cuts[2]]], types[cuts[3] :]
    cls = tokenizer.cls_token_id
    return Frame(special, of_parts, -1 if cls in special[2] and cls not in special[0] else 0)


def framed(frame: Frame, first: Ints, context: Ints, places: NDArray[np.int32]) -> dict[str, Any]:
    """One window without its labels."""
    before, between, after = frame.ids
    ids = np.concatenate([before, first, between, context, after]).astype(np.int32)
    start = len(before) + len(first) + len(between)
    all_places = np.zeros((len(ids), 2), np.int32)
    all_places[start : start + len(context)] = places
    window = {"tokens": ids, "places": all_places, "inside": (start, start + len(context))}
    if frame.types is not None:
        sizes = 1, len(first), 1, len(context), 1
        window["token_types"] = np.array(
            [kind for part, size in zip(frame.types, sizes, strict=True) for kind in part * size], np.int8
        )
    return window | {"cls": frame.cls % len(ids)}


def joined(made: Sequence[dict[str, Any]], *, has_types: bool) -> Windows:
    """Windows as flat arrays."""
    lengths = np.array([len(window["tokens"]) for window in made], np.int64)
    columns = {
        name: np.array([window[name] for window in made], np.int64) for name in ("inside", "cls", "labels", "questions")
    }
    return Windows(
        tokens=np.concatenate([window["tokens"] for window in made]),
        offsets=np.concatenate([np.zeros(1, np.int64), lengths]).cumsum(),
        token_types=np.concatenate([window["token_types"] for window in made]) if has_types else None,
        places=np.concatenate([window["places"] for window in made]),
        **columns,
    )


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[Ints, NDArray[np.int32]]]:
    """Tokens of each text, (N,), and their characters, (N, 2), without special tokens."""
    for start in range(0, len(texts), TOGETHER):
        encoded = cast(Any, tokenizer)(
            list(texts[start : start + TOGETHER]), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield np.array(ids, np.int64), np.array(places, np.int32).reshape(-1, 2)


def parts_of(count: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of stretches of at most `room` of `count` tokens, neighbours sharing `stride`; one, though it be empty."""
    assert stride < room, (stride, room)
    start = 0
    while start + room < count:
        yield start, start + room
        start += room - stride
    yield start, count


def answer_tokens(question: Question, places: NDArray[np.int32]) -> tuple[int, int] | None:
    """First and last token of the context that the answer lies in; None without an answer, or one that has no token."""
    if not question.answers:
        return None
    text, start = question.answers[0]
    held = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < start + len(text)))
    return (int(held[0]), int(held[-1])) if len(held) else None
