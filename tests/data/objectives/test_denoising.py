"""Span corruption is undone exactly and has T5's lengths; infilling has BART's spans; both by their definitions."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.data import MOST_INFILLED
from trainer.data.batches import IGNORED
from trainer.data.objectives.denoising import (
    Infilling,
    SpanCorruption,
    corrupted_lengths,
    lost_spans,
    noise_spans,
    permuted_sentences,
    poisson,
    tokens_for_inputs,
)
from trainer.data.objectives.rows import Ids, Rows, Vocabulary, random_rows, uniform

PAD, START, END, MASK, DOT, FIRST = 0, 1, 2, 3, 4, 5
TEXT = 400
SENTINELS = np.arange(TEXT, TEXT + 100)


def vocabulary() -> Vocabulary:
    numbers = np.arange(TEXT + 100)
    special = (numbers < DOT) | (numbers >= TEXT)
    return Vocabulary(len(numbers), PAD, START, END, MASK, SENTINELS, special, numbers >= 0, numbers == DOT)


def rows(count: int, length: int, held: int | None = None, seed: int = 0) -> Rows:
    ids = np.random.default_rng(seed).integers(DOT, TEXT, (count, length))
    return Rows(ids, np.full(count, length if held is None else held), np.arange(count))


def restored(inputs: Ids, targets: Ids) -> list[int]:
    """The original text: each sentinel of the inputs replaced by what follows it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token in SENTINELS:
            spans[token] = []
        elif token not in (END, IGNORED):
            spans[list(spans)[-1]].append(token)
    found = []
    for token in inputs.tolist():
        found += spans.pop(token) if token in spans else [token] if token not in (PAD, END) else []
    assert spans == {}, "a sentinel of the targets is not in the inputs"
    return found


# T5


@settings(max_examples=500, deadline=None)
@given(
    length=st.integers(2, 300),
    fraction=st.floats(0.05, 0.5),
    mean_span=st.floats(1.0, 6.0),
    sample=st.integers(0, 2**62),
    short=st.integers(0, 50),
)
def test_inputs_and_targets_together_are_the_original(
    length: int, fraction: float, mean_span: float, sample: int, short: int
) -> None:
    """Twenty rows an example: 10,000 random samples."""
    if corrupted_lengths(length, fraction, mean_span)[1] - 1 > 100:
        fraction, mean_span = 0.15, 3.0
    ids = np.random.default_rng(sample % 1000).integers(DOT, TEXT, (20, length))
    held = np.maximum(length - np.arange(20) % (short + 1), 2)
    objective = SpanCorruption(
        vocabulary(), corrupted_lengths(length, fraction, mean_span)[0] + length, 3, fraction, mean_span
    )
    batch = objective.batch(Rows(ids, held, sample + np.arange(20)))
    for row in range(20):
        assert restored(batch["input_ids"][row], batch["labels"][row]) == ids[row, : held[row]].tolist()
        count = (batch["labels"][row] != IGNORED).sum()
        assert batch["labels"][row, count - 1] == END
        assert batch["decoder_input_ids"][row, 0] == PAD
        assert (batch["decoder_input_ids"][row, 1:count] == batch["labels"][row, : count - 1]).all()


def published_lengths(inputs_length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """The formula of t5.data.preprocessors.random_spans_helper: (tokens, targets) for inputs of this length."""

    def to_inputs_and_targets(tokens_length: int) -> tuple[int, int]:
        num_noise_tokens = round(tokens_length * noise_density)
        num_nonnoise_tokens = tokens_length - num_noise_tokens
        num_noise_spans = round(num_noise_tokens / mean_span)
        return num_nonnoise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1

    tokens = inputs_length
    while to_inputs_and_targets(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, to_inputs_and_targets(tokens)[1]


@settings(max_examples=300, deadline=None)
@given(inputs=st.integers(32, 2048), density=st.floats(0.1, 0.4), mean_span=st.floats(2.0, 6.0))
def test_lengths_are_those_that_t5_publishes(inputs: int, density: float, mean_span: float) -> None:
    tokens, targets = published_lengths(inputs, density, mean_span)
    assert tokens_for_inputs(inputs, density, mean_span) == tokens
    assert corrupted_lengths(tokens, density, mean_span)[1] == targets
    assert (tokens_for_inputs(512, 0.15, 3.0), corrupted_lengths(568, 0.15, 3.0)) == (568, (512, 114))


def test_full_rows_need_no_padding() -> None:
    length = tokens_for_inputs(256, 0.15, 3.0)
    batch = SpanCorruption(vocabulary(), 256, 0, 0.15, 3.0).batch(rows(10, length))
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == (10, 256)
    assert (batch["labels"] != IGNORED).all()


def test_over_a_million_tokens_noise_is_as_defined() -> None:
    length = tokens_for_inputs(512, 0.15, 3.0)
    noise, span = noise_spans(length, np.arange(1800), 1, 0.15, 3.0)
    assert noise.size > 10**6
    begins = noise.copy()
    begins[:, 1:] &= ~noise[:, :-1]
    assert noise.mean() == pytest.approx(0.15, abs=0.001)
    assert noise.sum() / begins.sum() == pytest.approx(3.0, abs=0.05)
    assert not noise[:, 0].any()
    by_place = noise[:, 50:-50].mean(axis=0)  # anywhere alike
    assert np.abs(by_place - by_place.mean()).max() < 5 * np.sqrt(0.13 / 1800)
    assert (np.diff(span, axis=1) >= 0).all()


# BART


@pytest.mark.parametrize("held", [254, 100, 9, 2, 1])
@pytest.mark.parametrize(
    ("fraction", "mean_span"), [(0.3, 3.0), (0.6, 1.0), (0.9, 1.2), (0.5, 1.0), (0.99, 1.0), (0.9, 20.0)]
)
def test_infilling_keeps_the_other_tokens_in_order_and_wants_the_whole_text(
    fraction: float, mean_span: float, held: int
) -> None:
    objective = Infilling(vocabulary(), 256, 5, fraction, mean_span, permute_sentences=False)
    source = rows(200, 254, held)
    batch = objective.batch(source)
    for row in range(200):
        text = source.ids[row, :held].tolist()
        size = int(batch["attention_mask"][row].sum())
        given_ids = batch["input_ids"][row, :size].tolist()
        assert given_ids[0] == START and given_ids[-1] == END
        assert (batch["input_ids"][row, size:] == PAD).all()
        kept = [token for token in given_ids[1:-1] if token != MASK]
        iterator = iter(text)
        assert all(token in iterator for token in kept)  # a subsequence
        wanted = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert wanted == [START, *text, END]
        assert batch["decoder_input_ids"][row, : len(wanted)].tolist() == [END, *wanted[:-1]]
        assert MASK not in [a for a, b in pairwise(given_ids) if a == b]  # spans do not touch


def test_the_most_that_may_be_asked_for_is_taken_away() -> None:
    source = rows(500, 510)
    _, is_lost = lost_spans(source, 5, MOST_INFILLED, 3.0)
    assert is_lost.sum() / source.ids.size == pytest.approx(MOST_INFILLED, abs=0.004)


def test_over_a_million_tokens_spans_are_poisson() -> None:
    objective = Infilling(vocabulary(), 512, 5, 0.3, 3.0, permute_sentences=False)
    source = rows(2000, 510)
    batch = objective.batch(source)
    masks = (batch["input_ids"] == MASK).sum()
    lost = source.ids.size - (batch["attention_mask"].sum() - 2 * 2000 - masks)
    assert source.ids.size > 10**6
    assert lost / masks == pytest.approx(3.0, abs=0.05)
    assert lost / source.ids.size == pytest.approx(0.3, abs=0.005)
    begins, is_lost = lost_spans(source, 5, 0.3, 3.0)
    ends = np.diff(np.hstack([is_lost, np.zeros((2000, 1), np.bool_)]).astype(np.int8), axis=1) == -1
    assert (begins & ~is_lost).sum() + ends.sum() == begins.sum()  # spans of no token, and the others
    row, start = np.nonzero(begins & is_lost)
    end = np.nonzero(ends)[1] + 1  # in the same order: spans of a row do not touch
    lengths = np.concatenate([end - start, np.zeros((begins & ~is_lost).sum(), np.int64)])
    shares = np.bincount(lengths, minlength=20)[:12] / len(lengths)
    wanted = [3.0**n * math.exp(-3.0) / math.factorial(n) for n in range(12)]
    assert np.abs(shares - wanted).max() < 0.004 and len(row) == len(end)


def test_poisson_numbers_have_the_distribution() -> None:
    numbers = poisson(uniform(random_rows(np.arange(1000), 1000, 1)), 3.0).ravel()
    assert numbers.mean() == pytest.approx(3.0, abs=0.01)
    assert numbers.var() == pytest.approx(3.0, abs=0.03)
    assert (numbers == 0).mean() == pytest.approx(np.exp(-3), abs=0.001)


def test_sentences_change_places_and_stay_whole() -> None:
    objective = Infilling(vocabulary(), 66, 5, 0.3, 3.0, permute_sentences=True)
    ids = np.random.default_rng(1).integers(FIRST, TEXT, (50, 64))
    ids[:, [10, 30, 31, 50]] = DOT
    held = Rows(ids, np.full(50, 60), np.arange(50))
    moved = permuted_sentences(ids, held.is_token, held.samples, objective)
    orders = set()
    for before, after in zip(ids.tolist(), moved.tolist(), strict=True):
        sentences = [before[a:b] for a, b in ((0, 11), (11, 31), (31, 32), (32, 51), (51, 60))]
        assert after[60:] == before[60:]
        order = [next(p for p in range(60) if after[p : p + len(s)] == s) for s in sentences]
        orders.add(tuple(np.argsort(order).tolist()))
        assert sorted(after[:60]) == sorted(before[:60])
    assert len(orders) > 25  # of 120
