"""What the model sees of a sample, token by token, with a kind for each: for `samestep data show` and its pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.batches import IGNORED
from trainer.data.objectives.rows import Batch, Vocabulary

KINDS = {
    "plain": "text that is seen",
    "masked": "masked, and to be found",
    "replaced": "another token, and to be found",
    "kept": "unchanged, and to be found",
    "gap": "stands for text that is taken away",
    "target": "to be found",
    "special": "special token",
}
"""kind -> what it means."""


@dataclass(frozen=True)
class Mark:
    """A token as the model is given it, or as it must be found."""

    text: str
    kind: str
    wanted: str = ""
    """What is to be found here, where that is another text."""
    place: int = -1
    """In the permuted order, from 0; -1 outside of it."""

    @property
    def words(self) -> str:
        """Without colours: `[given=wanted]`, `[place:token]`, or the text itself."""
        if self.place >= 0:
            return f"[{self.place}:{self.text}]"
        return f"[{self.text}={self.wanted}]" if self.kind in ("masked", "replaced", "kept") else self.text


def marks_of(
    objective: str, batch: Batch, row: int, vocabulary: Vocabulary, decode: Callable[[int], str]
) -> dict[str, list[Mark]]:
    """Title -> the marked tokens of a row of a batch. decode: the text of a token, as it stands in a text."""
    ids = unpadded(batch, row)
    if objective in ("span_corruption", "infilling"):
        gaps = {vocabulary.mask, *vocabulary.sentinels.tolist()}
        labels = batch["labels"][row]
        sides = {"given": (ids, "plain"), "to be found": (labels[labels != IGNORED], "target")}
        return {
            title: [side_mark(int(t), kind, gaps, vocabulary, decode) for t in tokens]
            for title, (tokens, kind) in sides.items()
        }
    if objective == "plm":
        places = ranks(batch["order"][row])
        return {
            "given, with the order of what is to be found": [
                permuted_mark(int(t), places[p], vocabulary, decode) for p, t in enumerate(ids)
            ]
        }
    if objective == "clm":
        is_found = np.append(False, batch["labels"][row][: len(ids) - 1] != IGNORED)
        kinds = np.where(is_found, "target", np.where(vocabulary.is_special[ids], "special", "plain")).tolist()
        found = [Mark(decode(int(token)), kind) for token, kind in zip(ids, kinds, strict=True)]
        return {"given; each token is to be found from those before it": found}
    labels = batch["labels"][row]
    return {"given": [masked_mark(int(t), int(labels[p]), vocabulary, decode) for p, t in enumerate(ids)]}


def unpadded(batch: Batch, row: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The tokens of a row that are no padding."""
    ids = batch["input_ids"][row]
    return ids[batch["attention_mask"][row] == 1] if "attention_mask" in batch else ids


def ranks(order: "np.ndarray[Any, np.dtype[np.int64]]") -> list[int]:
    """Places 0, 1, 2, ... of those that are in the order; -1 for the others."""
    places = np.full(len(order), -1)
    chosen = np.flatnonzero(order >= 0)
    places[chosen] = np.argsort(np.argsort(order[chosen]))
    return [int(place) for place in places]


def masked_mark(token: int, label: int, vocabulary: Vocabulary, decode: Callable[[int], str]) -> Mark:
    """Of a row with masks."""
    if label == IGNORED:
        return Mark(decode(token), "special" if vocabulary.is_special[token] else "plain")
    kind = "masked" if token == vocabulary.mask else "kept" if token == label else "replaced"
    return Mark(decode(token), kind, decode(label))


def side_mark(token: int, kind: str, gaps: set[int], vocabulary: Vocabulary, decode: Callable[[int], str]) -> Mark:
    """Of one side of an encoder-decoder sample."""
    special = "gap" if token in gaps else "special"
    return Mark(decode(token), special if vocabulary.is_special[token] else kind)


def permuted_mark(token: int, place: int, vocabulary: Vocabulary, decode: Callable[[int], str]) -> Mark:
    """Of a permuted row."""
    kind = "target" if place >= 0 else "special" if vocabulary.is_special[token] else "plain"
    return Mark(decode(token), kind, place=place)


def line(marks: Sequence[Mark]) -> str:
    """The marked text without colours."""
    return "".join(mark.words for mark in marks)
