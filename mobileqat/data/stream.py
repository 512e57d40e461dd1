"""Samples that are read when they are asked for, behind the face of an array: data larger than memory.

A `Streamed` has the length, shape and indexing of an array [n, ...]; a slice of it is another `Streamed`, and `read`
or `np.asarray` brings the samples into memory.  Any sample can be read at any time, so that shuffling is a permutation
of indices, and a training that was interrupted goes on with the batch that would have come next.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from mobileqat.errors import DataError

STREAM_ABOVE_BYTES = 2 * 2**30  # as float32, which is what training holds
BATCH_BYTES = 32 * 2**20  # a batch for evaluation, as float32
IN_FLIGHT = 64  # items that wait for a thread


class Reader(Protocol):
    """Gives any of its samples, from several threads at once.

    Attributes:
        shape: of one sample.
    """

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Sample number `index`, uint8 of `shape`; a DataError names the file that cannot be read."""


class Streamed:
    """Samples of a reader in any order, [n, ...], read by as many threads as there are processors.

    Args:
        reader: where they come from.
        indices: which of the reader's samples, int64 [n]; all of them by default.
        dtype: that they are converted to.
    """

    def __init__(self, reader: Reader, indices: np.ndarray | None = None, dtype: Any = np.uint8):
        self.reader = reader
        self.indices = np.arange(len(reader)) if indices is None else indices
        self.dtype = np.dtype(dtype)
        self.shape = (len(self.indices), *reader.shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Any:
        """A sample for a number; a `Streamed` of the chosen ones, unread, for a slice or an array of indices."""
        if isinstance(key, (int, np.integer)):
            return self.read(np.array([key]))[0]
        return Streamed(self.reader, self.indices[key], self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("Streamed samples are read into a new array.")
        return self.read(np.arange(len(self))).astype(dtype or self.dtype, copy=False)

    def astype(self, dtype: Any) -> Streamed:
        """The same samples, converted when they are read."""
        return Streamed(self.reader, self.indices, dtype)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions`, [len(positions), ...].

        Raises:
            DataError: a sample cannot be read.
        """
        numbers = self.indices[positions]
        samples = np.empty((len(numbers), *self.shape[1:]), self.dtype)

        def fill(row: int) -> None:
            samples[row] = self.reader.read(int(numbers[row]))

        for _ in in_parallel(fill, range(len(numbers))):
            pass
        return samples

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(np.arange(start, min(start + size, len(self))))


Samples = np.ndarray | Streamed


def is_streamed(stream: bool | None, count: int, shape: tuple[int, ...]) -> bool:
    """Whether to stream `count` samples of `shape`: as asked for, by default above `STREAM_ABOVE_BYTES` as float32.

    Raises:
        DataError: `stream` is no choice.
    """
    if stream is not None and not isinstance(stream, bool):
        raise DataError(f"stream must be true, false or left out. Received: stream={stream!r}")
    return 4 * count * math.prod(shape) > STREAM_ABOVE_BYTES if stream is None else stream


def batch_size_within_memory(shape: tuple[int, ...], largest: int) -> int:
    """How many samples of `shape` fit into `BATCH_BYTES`, from 1 to `largest`."""
    return min(largest, max(1, BATCH_BYTES // (4 * math.prod(shape))))


def in_batches(function: Callable[[Any], Any], x: Samples, multiple: int = 64) -> np.ndarray:
    """`function(x)`, an array [n, ...], with no more than a few batches of streamed samples in memory.

    Args:
        function: of arrays of samples; each of its results depends on its own sample alone.
        x: samples; those in memory are handed over whole.
        multiple: of which a batch's size is one, so that batches inside of `function` stay what they are.
    """
    if not isinstance(x, Streamed):
        return np.asarray(function(x))
    size = multiple * max(1, batch_size_within_memory(x.shape[1:], max(1, len(x))) // multiple)
    return np.concatenate([np.asarray(function(batch)) for batch in x.batches(size)])


def in_parallel(function: Callable[[Any], Any], items: Iterable) -> Iterator:
    """`map` by threads, in order; of any number of items a few are in memory. Decoders release Python's lock."""
    pool, waiting = _threads(os.getpid()), iter(items)
    while some := list(itertools.islice(waiting, IN_FLIGHT)):
        yield from pool.map(function, some)


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool for the process: threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mobileqat-data")
