"""The order of the images: a seeded, endless, resumable, sharded stream of batches."""

from collections.abc import Iterator
from itertools import count

import numpy as np


class StepSampler:
    """A batch sampler whose stream is a function of (seed, draw number) alone.

    Draws are counted from 0 over the whole run. Draw d is entry ``d % length`` of the permutation for epoch ``d // length``,
    which is seeded by (seed, epoch). Batch b holds ``batch_size`` draws from b * batch_size on, and each of ``num_shards``
    processes gets an equal part of it. So the stream can start at any batch and does not depend on the number of workers or
    processes.

    Yields lists of ``(index, draw)`` for ``DataLoader(batch_sampler=...)``, without end.

    Args:
        length: number of images.
        batch_size: images per batch over all shards.
        seed: the run's seed.
        start: the first batch.
        shard, num_shards: the part of each batch for this process.

    Raises:
        ValueError: there are no images, or a batch is not divisible by the number of shards.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, shard: int = 0, num_shards: int = 1) -> None:
        if length < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1 or batch_size % num_shards:
            raise ValueError(f"a batch of {batch_size} does not divide into {num_shards} equal parts")
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.shard, self.num_shards = shard, num_shards
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """This shard's ``(index, draw)`` pairs of batch ``number``."""
        share = self.batch_size // self.num_shards
        first = number * self.batch_size + self.shard * share
        return [(self._index(draw), draw) for draw in range(first, first + share)]

    def _index(self, draw: int) -> int:
        epoch, position = divmod(draw, self.length)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.length)
        return int(self._order[position])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.batch(number) for number in count(self.start))
