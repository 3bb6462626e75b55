"""The order of the training examples, as a function of the seed and the step alone.

    epoch e is a random permutation drawn from (seed, e); batch s of process r takes the next `batch_size` entries of it

The position in the data does not need to be stored: a resumed run computes it from its step. N processes with batch size B
see together the same examples as one process with batch size N · B.
"""

import numpy as np


class BatchOrder:
    """Indices of the examples of each batch.

    A batch may span the end of an epoch, so no example is dropped.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and process.
        seed: Seed of the permutations.
        rank: Index of this process.
        processes: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.processes = rank, processes
        self._permutations: dict[int, np.ndarray] = {}

    def batch_indices(self, number: int) -> np.ndarray:
        """Return the example indices (batch_size,) int64 of batch `number` of this process; batches count from 0."""
        start = (number * self.processes + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        epochs = positions // self.size
        return np.concatenate(
            [self._permutation(int(epoch))[positions[epochs == epoch] % self.size] for epoch in np.unique(epochs)]
        )

    @staticmethod
    def batch_numbers(step: int, accumulation_steps: int) -> range:
        """Return the numbers of the batches of optimizer step `step`; steps count from 1."""
        return range((step - 1) * accumulation_steps, step * accumulation_steps)

    def step_indices(self, step: int, accumulation_steps: int) -> np.ndarray:
        """Return the example indices of this process in optimizer step `step`; steps count from 1."""
        return np.concatenate([self.batch_indices(number) for number in self.batch_numbers(step, accumulation_steps)])

    def random_numbers(self, number: int, count: int = 1) -> np.ndarray:
        """Return (batch_size, count) uniform random numbers in [0, 1), `count` for each example of batch `number`.

        They depend on the seed, the position of the example and the column, and not on the number of processes.
        Generator: splitmix64 (Steele, Lea, Flood 2014).
        """
        start = (number * self.processes + self.rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size, dtype=np.uint64)[:, None]
        columns = np.arange(count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            x = (
                positions
                + np.uint64(self.seed) * np.uint64(0xD1342543DE82EF95)
                + columns * np.uint64(0xA24BAED4963EE407)
            )
            x = x * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:  # a batch spans at most the last epochs; older permutations are dropped
            self._permutations = {e: order for e, order in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return self._permutations[epoch]
