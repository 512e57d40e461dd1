"""A uniform sample of a stream of unknown length, in memory for the sample alone.

Algorithm R (Vitter 1985, https://doi.org/10.1145/3147.3165): the first N items fill the reservoir; item i, counted
from 0, takes the place of a random one with probability N / (i + 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from mobileqat.errors import DataError

Item = TypeVar("Item")


def reservoir_sample(stream: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` items of a stream, each subset of that size equally likely; all items of a shorter stream.

    Args:
        stream: iterated over once.
        count: at least 1.
        seed: the same seed and stream give the same sample.

    Returns:
        The items in the order of the stream.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"A reservoir holds at least one sample. Received: count={count}")
    # RandomState's stream of numbers never changes between releases of NumPy.
    random = np.random.RandomState(seed)
    kept: list[tuple[int, Item]] = []
    for position, item in enumerate(stream):
        if len(kept) < count:
            kept.append((position, item))
            continue
        place = random.randint(position + 1, dtype=np.int64)
        if place < count:
            kept[place] = (position, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]
