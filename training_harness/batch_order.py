"""Which examples make up which batch, as a function of seed and step alone.

    epoch e is the permutation drawn from (seed, e); batch s of process r takes the next `batch_size` entries of it

Nothing about the place in the data needs to be stored: a resumed run asks for the step it stands at. N processes at batch
size B see together what one process sees at batch size N · B.
"""

import numpy as np


class BatchOrder:
    """Indices of every batch; the sequence goes on over the ends of epochs, so that no example is dropped."""

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.processes = rank, processes
        self._epochs: dict[int, np.ndarray] = {}

    def batch_indices(self, number: int) -> np.ndarray:
        """Indices (batch_size,) int64 of this process's batch `number`, from 0."""
        start = (number * self.processes + self.rank) * self.batch_size
        places = np.arange(start, start + self.batch_size)
        epochs = places // self.size
        return np.concatenate([self._permutation(int(e))[places[epochs == e] % self.size] for e in np.unique(epochs)])

    @staticmethod
    def batch_numbers(step: int, accumulated: int) -> range:
        """The batches of optimiser step `step`, from 1."""
        return range((step - 1) * accumulated, step * accumulated)

    def step_indices(self, step: int, accumulated: int) -> np.ndarray:
        """What this process sees in optimiser step `step`, from 1."""
        return np.concatenate([self.batch_indices(number) for number in self.batch_numbers(step, accumulated)])

    def random_numbers(self, number: int, count: int = 1) -> np.ndarray:
        """(batch_size, count) numbers in [0, 1), `count` for each example of `batch(number)`.

        They are a function of the seed, the example's place among all batches and their column, so the same whatever the number
        of processes. splitmix64 (Steele, Lea, Flood 2014).
        """
        start = (number * self.processes + self.rank) * self.batch_size
        places = np.arange(start, start + self.batch_size, dtype=np.uint64)[:, None]
        columns = np.arange(count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            x = places + np.uint64(self.seed) * np.uint64(0xD1342543DE82EF95) + columns * np.uint64(0xA24BAED4963EE407)
            x = x * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return self._epochs[epoch]
