"""Plans against a plain best-fit decreasing, one document at a time; every token once; speed and padding of the specification."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.stream.packing import Plan, best_fit_rows, make_plan, padding_of

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def rooms_of_plain_best_fit(lengths: list[int], sequence_length: int) -> list[int]:
    """What is left in each row when documents are placed one by one, longest first, into the fullest row with room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(sequence_length - length)
    return sorted(rooms)


def tokens_of(plan: Plan) -> list[int]:
    return [t for start, length in zip(plan.starts, plan.lengths, strict=True) for t in range(start, start + length)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_leaves_the_rooms_that_the_plain_algorithm_leaves(lengths: list[int]) -> None:
    rows = best_fit_rows(np.array(lengths, np.int64), 32)
    fill = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert sorted((32 - fill).astype(int).tolist()) == rooms_of_plain_best_fit(lengths, 32)


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_best_fit_holds_every_token_once_and_cuts_only_long_documents(lengths: list[int]) -> None:
    plan = make_plan(np.cumsum(np.array(lengths, np.int64)), 16, "best_fit")
    assert sorted(tokens_of(plan)) == list(range(sum(lengths)))
    assert all(plan.lengths[a:b].sum() <= 16 for a, b in zip(plan.row_starts, plan.row_starts[1:], strict=False))
    ends = np.cumsum(lengths)
    short = {(end - length, length) for end, length in zip(ends.tolist(), lengths, strict=True) if 0 < length <= 16}
    assert short <= set(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_concat_fills_every_row_and_leaves_less_than_one_over(lengths: list[int]) -> None:
    plan = make_plan(np.cumsum(np.array(lengths, np.int64)), 16, "concat")
    assert tokens_of(plan) == list(range(sum(lengths) // 16 * 16))
    assert padding_of([plan]) == 0 or plan.num_rows == 0
    starts = set(np.cumsum(lengths).tolist()) | {0}
    inside = [s for s in plan.starts.tolist() if s % 16]
    assert set(inside) <= starts


def test_documents_of_the_specification_pack_fast_and_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(720) - 0.5, 1.0, 300_000).astype(np.int64), 1, 2048)
    ends = np.cumsum(lengths)
    began = time.process_time()
    plan = make_plan(ends, 2048, "best_fit")
    documents_per_s = len(lengths) / (time.process_time() - began)
    assert len(plan.lengths) == len(lengths)  # none was cut
    assert padding_of([plan]) <= 0.001
    assert documents_per_s >= 500_000


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_documents_make_no_rows(packing: str) -> None:
    assert make_plan(np.zeros(0, np.int64), 8, packing).num_rows == 0  # type: ignore[arg-type]
