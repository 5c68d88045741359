"""Entities of BIO tags, and how many are found: an entity counts when its type, its first and its last word are right.

As conlleval and seqeval have it: an I-X that does not follow an X begins an entity. Pure; every rank computes the same numbers.
"""

from collections.abc import Sequence

Entity = tuple[str, int, int]
"""Type, first word, last word + 1."""


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in their order."""
    found: list[Entity] = []
    kind, first = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, new = tag.partition("-")
        if kind and (prefix != "I" or new != kind):
            found.append((kind, first, place))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, first = new, place
    return found


def entity_counts(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """type -> (right, found, wanted) over sentences of tags; "" is of all types."""
    counts: dict[str, list[int]] = {"": [0, 0, 0]}
    for right_tags, tags in zip(wanted, found, strict=True):
        right, mine = set(entities_of(right_tags)), set(entities_of(tags))
        for column, entities in enumerate((right & mine, mine, right)):
            for kind, _, _ in entities:
                for name in ("", kind):
                    counts.setdefault(name, [0, 0, 0])[column] += 1
    return {name: (row[0], row[1], row[2]) for name, row in sorted(counts.items())}


def scores(right: int, found: int, wanted: int) -> dict[str, float]:
    """Precision, recall and their harmonic mean; 0 where there is nothing to divide by."""
    precision, recall = right / max(found, 1), right / max(wanted, 1)
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}
