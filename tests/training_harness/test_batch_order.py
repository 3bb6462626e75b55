"""The order of the data depends on seed and step alone, and several processes together see the batches of one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_harness.batch_order import BatchOrder

sizes, batches, seeds = st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**63 - 1)


@given(sizes, batches, seeds)
@settings(deadline=None)
def test_every_epoch_is_a_permutation_of_all_examples(size, batch_size, seed):
    order = BatchOrder(size, batch_size, seed)
    batches_needed = -(-3 * size // batch_size)
    indices = np.concatenate([order.batch_indices(i) for i in range(batches_needed)])
    for epoch in range(3):
        assert sorted(indices[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(sizes, batches, seeds, st.integers(1, 5))
@settings(deadline=None)
def test_n_processes_together_see_the_batches_of_one_with_n_times_the_batch_size(size, batch_size, seed, processes):
    ranks = [BatchOrder(size, batch_size, seed, rank, processes) for rank in range(processes)]
    single = BatchOrder(size, batch_size * processes, seed)
    for number in range(5):
        combined = np.concatenate([order.batch_indices(number) for order in ranks])
        assert combined.tolist() == single.batch_indices(number).tolist()


@given(sizes, batches, seeds, st.integers(0, 30))
@settings(deadline=None)
def test_a_resumed_run_needs_only_its_step(size, batch_size, seed, start):
    uninterrupted, resumed = (BatchOrder(size, batch_size, seed) for _ in range(2))
    expected = [uninterrupted.batch_indices(i).tolist() for i in range(start + 3)][start:]
    assert [resumed.batch_indices(start + i).tolist() for i in range(3)] == expected


def test_each_epoch_and_each_seed_has_a_different_order():
    order = BatchOrder(50, 50, seed=0)
    assert order.batch_indices(0).tolist() != order.batch_indices(1).tolist()
    assert order.batch_indices(0).tolist() != BatchOrder(50, 50, seed=1).batch_indices(0).tolist()
    assert order.batch_indices(0).tolist() != list(range(50))


def test_random_numbers_depend_on_position_and_seed_and_not_on_the_number_of_processes():
    single = [BatchOrder(30, 8, seed=3).random_numbers(number) for number in range(6)]
    for rank in (0, 1):
        half = BatchOrder(30, 4, seed=3, rank=rank, processes=2)
        for number, expected in enumerate(single):
            assert np.array_equal(half.random_numbers(number), expected[4 * rank : 4 * rank + 4])
    columns = BatchOrder(30, 8, seed=3).random_numbers(0, 5)
    assert columns.shape == (8, 5)
    assert np.array_equal(columns[:, :1], single[0]), "more columns do not change the first one"
    assert not np.array_equal(BatchOrder(30, 8, seed=4).random_numbers(0), single[0])


@pytest.mark.parametrize("columns", [1, 50])
def test_random_numbers_are_uniform(columns):
    numbers = BatchOrder(10, 100_000 // columns, seed=0).random_numbers(0, columns).ravel()
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, 20, (0, 1))[0]
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 60  # 19 degrees of freedom: a false alarm in one of 3 · 10⁵ seeds
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02  # six standard deviations
