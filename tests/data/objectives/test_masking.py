"""Masks by their definition over a million tokens, against transformers' own collator, and whole words."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from trainer.data.batches import IGNORED, random_words
from trainer.data.objectives.masking import Mlm, MlmPairs
from trainer.data.objectives.rows import Rows, Vocabulary, random_rows

PAD, UNK, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 4, 5
SIZE, LENGTH = 500, 128


def vocabulary(size: int = SIZE) -> Vocabulary:
    special = np.arange(size) < FIRST
    return Vocabulary(
        size, PAD, CLS, SEP, MASK, np.zeros(0, np.int64), special, np.arange(size) % 3 != 0, np.zeros(size, np.bool_)
    )


def rows(count: int, held: int = LENGTH - 2, first_sample: int = 0) -> Rows:
    rng = np.random.default_rng(0)
    ids = rng.integers(FIRST, SIZE, (count, LENGTH - 2))
    return Rows(ids, np.full(count, held), np.arange(first_sample, first_sample + count))


def mlm(**settings: Any) -> Mlm:
    return Mlm(
        **({"vocabulary": vocabulary(), "length": LENGTH, "seed": 7, "fraction": 0.15, "whole_words": False} | settings)
    )


def test_random_rows_are_the_pinned_generators_words() -> None:
    found = random_rows(np.array([5, 9, 2**40]), 6, 3, 1)
    for row, sample in zip(found, (5, 9, 2**40), strict=True):
        assert row.tolist() == random_words(6, 3, 1, sample).tolist()


@pytest.mark.parametrize("whole_words", [False, True])
def test_over_a_million_tokens_the_shares_are_those_of_the_definition(whole_words: bool) -> None:
    given = rows(8200)
    batch = mlm(whole_words=whole_words).batch(given)
    ids, labels = batch["input_ids"], batch["labels"]
    is_target = labels != IGNORED
    original = np.hstack([np.full((8200, 1), CLS), given.ids, np.full((8200, 1), SEP)])
    assert given.ids.size > 10**6
    assert is_target.sum() / given.ids.size == pytest.approx(0.15, abs=0.001)
    assert (labels[is_target] == original[is_target]).all()
    assert (ids[~is_target] == original[~is_target]).all()
    is_masked, is_same = ids[is_target] == MASK, ids[is_target] == original[is_target]
    assert is_masked.mean() == pytest.approx(0.8, abs=0.003)
    assert is_same.mean() == pytest.approx(0.1 + 0.1 / SIZE, abs=0.003)
    assert (~is_masked & ~is_same).mean() == pytest.approx(0.1 * (1 - 2 / SIZE), abs=0.003)
    new = ids[is_target][~is_masked & ~is_same]
    assert np.bincount(new, minlength=SIZE)[FIRST:].std() / np.sqrt(len(new) / SIZE) < 1.2  # as even as chance allows


def test_special_tokens_and_padding_are_never_targets() -> None:
    given = rows(300, held=40)
    given.ids[:, 10] = SEP  # the end of a document inside a row
    batch = mlm(fraction=0.9).batch(given)
    assert (batch["labels"][:, [0, 11, 41]] == IGNORED).all()
    assert (batch["labels"][:, 42:] == IGNORED).all() and (batch["input_ids"][:, 42:] == PAD).all()
    assert batch["attention_mask"].sum(axis=1).tolist() == [42] * 300
    assert "attention_mask" not in mlm().batch(rows(3))


def test_it_agrees_in_distribution_with_transformers_collator(tmp_path: Any) -> None:
    words = {
        word: number
        for number, word in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *[f"w{n}" for n in range(5, SIZE)]]
        )
    }
    collator = DataCollatorForLanguageModeling(BertTokenizerFast(vocab=words), mlm_probability=0.15)
    given = rows(3000)
    ours = mlm().batch(given)
    torch.manual_seed(0)
    originals = torch.tensor(np.hstack([np.full((3000, 1), CLS), given.ids, np.full((3000, 1), SEP)]))
    special = (originals < FIRST).long()
    theirs = collator([{"input_ids": i, "special_tokens_mask": s} for i, s in zip(originals, special, strict=True)])
    for name, mine, others in (
        ("targets", ours["labels"] != IGNORED, theirs["labels"].numpy() != IGNORED),
        ("masks", ours["input_ids"] == MASK, theirs["input_ids"].numpy() == MASK),
    ):
        by_place = mine.mean(axis=0) - others.mean(axis=0)
        assert abs(mine.mean() - others.mean()) < 0.002, name
        assert np.abs(by_place).max() < 5 * np.sqrt(0.25 / 3000), name
        per_row = np.bincount(mine.sum(axis=1), minlength=60)[:60] - np.bincount(others.sum(axis=1), minlength=60)[:60]
        assert np.abs(np.cumsum(per_row)).max() / 3000 < 1.95 * np.sqrt(2 / 3000), (
            name
        )  # Kolmogorov-Smirnov, 1 in 1,000


def test_words_are_masked_whole_or_not_at_all() -> None:
    given = rows(200)
    is_target = (mlm(whole_words=True).batch(given)["labels"] != IGNORED)[:, 1:-1]
    begins = vocabulary().starts_word[given.ids]
    inside = ~begins[:, 1:]
    assert inside.any()
    assert (is_target[:, 1:][inside] == is_target[:, :-1][inside]).all()


def test_a_sample_is_masked_the_same_in_any_batch_and_otherwise_in_another_epoch() -> None:
    given, whole = rows(8), mlm().batch(rows(8))
    part = Rows(given.ids[3:5], given.held[3:5], given.samples[3:5])
    assert (mlm().batch(part)["labels"] == whole["labels"][3:5]).all()
    assert (mlm().batch(part)["input_ids"] == whole["input_ids"][3:5]).all()
    later = Rows(given.ids, given.held, given.samples + 1000)
    assert (mlm().batch(later)["labels"] != whole["labels"]).any(axis=1).all()
    assert (mlm(seed=8).batch(given)["labels"] != whole["labels"]).any(axis=1).all()


# Pairs


def paired(count: int) -> Rows:
    """Each row holds a short document and a long one, whose tokens count up."""
    ids = np.tile(np.concatenate([np.full(25, 9), np.arange(100, 200)]), (count, 1))
    documents = np.tile(np.repeat([0, 1], [25, 100]), (count, 1))
    held = np.full(count, 125)
    other = Rows(np.full_like(ids, 77), held, np.arange(count) + 5, documents)
    return Rows(ids, held, np.arange(count), documents, other)


@pytest.mark.parametrize("swap", [False, True])
def test_half_of_the_pairs_belong_together(swap: bool) -> None:
    objective = MlmPairs(vocabulary(), LENGTH, 3, fraction=1e-12, whole_words=False, swap=swap)
    batch = objective.batch(paired(20_000))
    labels, ids, types = batch["pair_labels"], batch["input_ids"], batch["token_type_ids"]
    assert labels.mean() == pytest.approx(0.5, abs=0.015)
    for row in range(200):
        line = ids[row][batch["attention_mask"][row] == 1]
        ends = np.flatnonzero(line == SEP)
        first, second = line[1 : ends[0]], line[ends[0] + 1 : ends[1]]
        assert len(ends) == 2 and ends[1] == len(line) - 1 and line[0] == CLS
        assert types[row, : len(line)].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        if labels[row] == 0:
            assert np.concatenate([first, second]).tolist() == list(range(100, 200))
        elif swap:
            assert np.concatenate([second, first]).tolist() == list(range(100, 200))
        else:
            assert (first == np.arange(100, 100 + len(first))).all() and (second == 77).all()


def one_row(ids: list[int], documents: list[int], other: list[int]) -> Rows:
    beside = Rows(np.array([other]), np.array([len(other)]), np.array([9]), np.zeros((1, len(other)), np.int64))
    return Rows(np.array([ids]), np.array([len(ids)]), np.array([0]), np.array([documents]), beside)


def segments(rows: Rows, dot: int, swap: bool = False) -> tuple[list[int], list[int], int]:
    """The two texts of a row, and whether they do not belong together. dot: the token that ends a sentence."""
    numbers = np.arange(SIZE)
    words = Vocabulary(SIZE, PAD, CLS, SEP, MASK, np.zeros(0, np.int64), numbers < FIRST, numbers != 99, numbers == dot)
    batch = MlmPairs(words, LENGTH, 3, fraction=1e-12, whole_words=False, swap=swap).batch(rows)
    line = batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
    end = line.index(SEP)
    return line[1:end], line[end + 1 : -1], int(batch["pair_labels"][0])


def test_nothing_but_the_text_gives_a_pair_away() -> None:
    """Segments begin behind sentences, of a document and of another place; separators stay out; both kinds are equally long."""
    dot, ends = 50, [60, 61, 62, 50, 63, 64, 50, 65, 66, 67, 50, SEP]
    seen = set()
    for sample in range(60):
        given = one_row(ends, [0] * len(ends), [SEP, 70, 71, 50, 72, 73, 74, 75, 50, 76, 77, 78, 79, 80, 81, 50, SEP])
        given = Rows(given.ids, given.held, np.array([sample]), given.documents, given.others)
        first, second, is_other = segments(given, dot)
        assert first[-1] == dot and SEP not in [*first, *second]
        assert len(first) + len(second) == len(ends) - 1
        assert second[0] in ({70, 72, 76} if is_other else {63, 65})
        seen.add((is_other, second[0]))
    assert len(seen) == 5


def test_a_document_of_one_sentence_is_cut_before_a_word() -> None:
    for sample in range(20):
        given = one_row([60, 99, 99, 61, 99], [0] * 5, [70, 99, 71, 99, 72, 99])
        given = Rows(given.ids, given.held, np.array([sample]), given.documents, given.others)
        first, second, is_other = segments(given, dot=50)
        assert first == [60, 99, 99]
        assert (second[0] != 99) if is_other else (second == [61, 99])


def test_a_pair_fits_its_row_whatever_the_cut() -> None:
    objective = MlmPairs(vocabulary(), 64, 3, fraction=0.15, whole_words=False, swap=False)
    assert objective.batch(paired(500))["attention_mask"].sum(axis=1).max() == 64
