"""The order of the data is a function of seed and step alone, and many processes see what one would."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_harness.batch_order import BatchOrder

sizes, batches, seeds = st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**63 - 1)


@given(sizes, batches, seeds)
@settings(deadline=None)
def test_every_epoch_is_a_permutation_and_drops_nothing(size, batch_size, seed):
    order = BatchOrder(size, batch_size, seed)
    needed = -(-3 * size // batch_size)
    seen = np.concatenate([order.batch_indices(i) for i in range(needed)])
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(sizes, batches, seeds, st.integers(1, 5))
@settings(deadline=None)
def test_n_processes_see_together_what_one_sees_at_n_times_the_batch(size, batch_size, seed, processes):
    ranks = [BatchOrder(size, batch_size, seed, rank, processes) for rank in range(processes)]
    alone = BatchOrder(size, batch_size * processes, seed)
    for number in range(5):
        together = np.concatenate([order.batch_indices(number) for order in ranks])
        assert together.tolist() == alone.batch_indices(number).tolist()


@given(sizes, batches, seeds, st.integers(0, 30))
@settings(deadline=None)
def test_a_resumed_run_needs_only_its_step(size, batch_size, seed, start):
    uninterrupted, resumed = (BatchOrder(size, batch_size, seed) for _ in range(2))
    expected = [uninterrupted.batch_indices(i).tolist() for i in range(start + 3)][start:]
    assert [resumed.batch_indices(start + i).tolist() for i in range(3)] == expected


def test_epochs_and_seeds_have_orders_of_their_own():
    order = BatchOrder(50, 50, seed=0)
    assert order.batch_indices(0).tolist() != order.batch_indices(1).tolist()
    assert order.batch_indices(0).tolist() != BatchOrder(50, 50, seed=1).batch_indices(0).tolist()
    assert order.batch_indices(0).tolist() != list(range(50))


def test_an_example_s_draw_depends_on_its_place_and_the_seed_and_not_on_the_processes():
    whole = [BatchOrder(30, 8, seed=3).random_numbers(number) for number in range(6)]
    for rank in (0, 1):
        halves = BatchOrder(30, 4, seed=3, rank=rank, processes=2)
        for number, both in enumerate(whole):
            assert np.array_equal(halves.random_numbers(number), both[4 * rank : 4 * rank + 4])
    columns = BatchOrder(30, 8, seed=3).random_numbers(0, 5)
    assert columns.shape == (8, 5)
    assert np.array_equal(columns[:, :1], whole[0]), "more numbers an example leave the first as it is"
    assert not np.array_equal(BatchOrder(30, 8, seed=4).random_numbers(0), whole[0])


@pytest.mark.parametrize("columns", [1, 50])
def test_draws_are_spread_evenly(columns):
    draws = BatchOrder(10, 100_000 // columns, seed=0).random_numbers(0, columns).ravel()
    assert ((draws >= 0) & (draws < 1)).all()
    counts = np.histogram(draws, 20, (0, 1))[0]
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 60  # 19 degrees of freedom: exceeded by chance once in 3 · 10⁵ seeds
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02  # six standard deviations
