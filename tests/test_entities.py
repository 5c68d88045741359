"""Entities of tags and their scores: hand-worked cases, and a brute-force oracle on random tags."""

from itertools import product

import numpy as np
import pytest

from trainer.entities import Entity, entities_of, entity_counts, scores


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O O", []),
        ("B-X I-X O", [("X", 0, 2)]),
        ("B-X B-X I-X", [("X", 0, 1), ("X", 1, 3)]),
        ("O I-X I-X", [("X", 1, 3)]),  # as conlleval and seqeval have it
        ("B-X I-Y", [("X", 0, 1), ("Y", 1, 2)]),
        ("I-X O I-X", [("X", 0, 1), ("X", 2, 3)]),
    ],
)
def test_entities_are_those_of_conlleval(tags: str, wanted: list[Entity]) -> None:
    assert entities_of(tags.split()) == wanted


def brute_force(tags: tuple[str, ...]) -> set[Entity]:
    """Every stretch that is one type throughout, begins as an entity may, and cannot be made longer."""
    found = set()
    for first, last in product(range(len(tags)), range(1, len(tags) + 1)):
        part = tags[first:last]
        if first >= last or "O" in part or len({tag[2:] for tag in part}) > 1:
            continue
        begins = part[0][0] == "B" or first == 0 or tags[first - 1] == "O" or tags[first - 1][2:] != part[0][2:]
        goes_on = last < len(tags) and tags[last] == f"I-{part[0][2:]}"
        if begins and not goes_on and all(tag[0] == "I" for tag in part[1:]):
            found.add((part[0][2:], first, last))
    return found


def test_random_tags_agree_with_brute_force() -> None:
    for tags in product(("O", "B-X", "I-X", "B-Y", "I-Y"), repeat=5):
        assert set(entities_of(tags)) == brute_force(tags), tags


def test_scores_are_precision_recall_and_f1_over_all_entities() -> None:
    wanted = [["B-X", "I-X", "O", "B-Y"], ["B-X", "O", "O", "O"]]
    found = [["B-X", "I-X", "O", "B-X"], ["B-X", "I-X", "O", "B-Y"]]
    counts = entity_counts(wanted, found)
    assert counts == {"": (1, 4, 3), "X": (1, 3, 2), "Y": (0, 1, 1)}
    assert scores(*counts[""]) == {"precision": 1 / 4, "recall": 1 / 3, "f1": pytest.approx(2 / 7)}
    assert scores(0, 0, 0) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert np.isclose(scores(2, 2, 2)["f1"], 1.0)
