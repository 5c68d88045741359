"""The order of samples is a pure function, and every rank gets its share of the same global batches."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches import epoch_batches, evaluation_batches, micro_batches, permutation, random_words, rank_share

LENGTHS = np.array([(7 * i) % 31 + 1 for i in range(1000)])


def test_the_generator_has_not_changed() -> None:
    # golden values: a run that resumes under another numpy must see the same order
    assert permutation(10, 0, 0, 0).tolist() == [1, 9, 0, 8, 4, 6, 7, 2, 3, 5]
    assert random_words(3, 1, 2).tolist() == [16613338946343043936, 5167718485781182436, 139405959784801653]


def test_the_batches_have_not_changed() -> None:
    # golden values too: they fix pools, the draw of the last batch and the order of the batches
    batches = epoch_batches(LENGTHS[:30], 4, 3, 1, group_by_length=True)
    assert [batch.tolist() for batch in batches] == [
        [20, 29, 17, 22],
        [6, 11, 8, 13],
        [0, 23, 2, 3],
        [28, 15, 24, 21],
        [18, 5, 1, 19],
        [27, 7, 25, 4],
        [14, 16, 12, 26],
        [9, 10],
    ]


def test_splitmix64_agrees_with_the_published_first_output() -> None:
    # Vigna's splitmix64.c from state 0 gives 0xe220a8397b1dcdaf first
    assert int(random_words(1)[0]) == 0xE220A8397B1DCDAF


def test_permutations_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_every_sample_once_and_the_small_batch_last(count, size, epoch, group) -> None:
    batches = epoch_batches(LENGTHS[:count], size, 0, epoch, group_by_length=group)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert [len(b) for b in batches] == [size] * (count // size) + [count % size] * (count % size > 0)


@settings(max_examples=200)
@given(st.integers(1, 60), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 20)))
def test_ranks_share_a_global_batch_exactly(count, world_size, micro) -> None:
    batch = np.arange(100, 100 + count)
    shares = [micro_batches(batch, rank, world_size, micro) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert np.concatenate([part for share in shares for part in share]).tolist() == batch.tolist()
    largest = max(len(rank_share(batch, rank, world_size)) for rank in range(world_size))
    assert len(shares[0]) == math.ceil(math.ceil(count / world_size) / (micro or largest))
    for rank in range(world_size):
        by_hand = [100 + i for i in range(count) if math.floor(i * world_size / count) == rank]
        assert rank_share(batch, rank, world_size).tolist() == by_hand
        assert all(len(part) <= (micro or count) for part in shares[rank])


def test_samples_of_a_small_training_set_meet_others_in_every_epoch() -> None:
    def batches(epoch: int) -> set[frozenset[int]]:
        return {frozenset(b.tolist()) for b in epoch_batches(LENGTHS[:200], 10, 0, epoch, group_by_length=True)}

    assert len(batches(0) & batches(1)) <= 2 and len(batches(0)) == 20


def test_the_last_smaller_batch_is_drawn_like_any_sample() -> None:
    last = np.concatenate([epoch_batches(LENGTHS, 48, 0, epoch, group_by_length=True)[-1] for epoch in range(20)])
    assert len(last) == 20 * (1000 % 48)
    assert abs(LENGTHS[last].mean() - LENGTHS.mean()) < 1.5


def test_a_plain_shuffle_takes_no_account_of_length() -> None:
    longest = [int(LENGTHS[b].max()) for b in epoch_batches(LENGTHS, 16, 0, 0, group_by_length=False)]
    assert min(longest) > 20


def test_grouping_by_length_leaves_little_padding() -> None:
    def padding(group: bool) -> float:
        lengths = np.tile(LENGTHS, 4)
        batches = epoch_batches(lengths, 16, 0, 0, group_by_length=group)
        return 1 - lengths.sum() / sum(len(b) * lengths[b].max() for b in batches)

    assert padding(True) < 0.05 < 0.3 < padding(False)


def test_lengths_of_successive_batches_are_mixed() -> None:
    longest = [int(LENGTHS[b].max()) for b in epoch_batches(LENGTHS, 16, 0, 0, group_by_length=True)]
    assert longest != sorted(longest)


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 4))
def test_evaluation_counts_every_example_once(count, size, world_size) -> None:
    batches = evaluation_batches(LENGTHS[:count], size, world_size)
    seen = [i for b in batches for rank in range(world_size) for i in rank_share(b, rank, world_size).tolist()]
    assert sorted(seen) == list(range(count))
    assert max(len(rank_share(b, rank, world_size)) for b in batches for rank in range(world_size)) <= size
