"""A uniform sample of a stream: every item equally likely, the same for the same seed, in little memory."""

import itertools

import numpy as np
import pytest

from mobileqat.data import reservoir_sample
from mobileqat.errors import DataError

# Of chi-square with 49 degrees of freedom the quantile 0.999 is 85.35, with 14 it is 36.12.
COUNT, ITEMS, TRIALS = 10, 50, 3000


def chi_square_of_items(sample):
    """How far the items of a stream are from being drawn equally often; 49 degrees of freedom."""
    counts = np.zeros(ITEMS)
    for seed in range(TRIALS):
        counts[sample(range(ITEMS), COUNT, seed)] += 1
    expected = TRIALS * COUNT / ITEMS
    # Counts of items drawn without replacement vary less than independent ones.
    return float(((counts - expected) ** 2).sum() / (expected * (1 - COUNT / ITEMS)) * (ITEMS - 1) / ITEMS)


def slow_to_forget(stream, count, seed):
    """What Algorithm R becomes when an item's place is drawn among one too many."""
    random, kept = np.random.RandomState(seed), []
    for position, item in enumerate(stream):
        place = random.randint(position + 6)
        if len(kept) < count:
            kept.append(item)
        elif place < count:
            kept[place] = item
    return kept


def test_every_item_is_equally_likely():
    assert chi_square_of_items(reservoir_sample) < 85.35
    assert chi_square_of_items(slow_to_forget) > 85.35, "the bound finds a slight bias"


def test_every_subset_is_equally_likely():
    subsets = list(itertools.combinations(range(6), 2))
    counts = dict.fromkeys(subsets, 0)
    for seed in range(TRIALS):
        counts[tuple(reservoir_sample(iter(range(6)), 2, seed))] += 1
    expected = TRIALS / len(subsets)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 36.12


def test_a_sample_is_pinned():
    """The same on every machine and NumPy release, in the stream's order."""
    assert reservoir_sample(iter(range(1000)), 6, seed=1) == [96, 500, 652, 809, 879, 922]
    assert reservoir_sample(iter("abc"), 6) == ["a", "b", "c"]
    assert reservoir_sample(iter(()), 6) == []


def test_items_need_not_be_comparable():
    items = [np.zeros(2), {"a": 1}, None, object()]
    assert len(reservoir_sample(items * 5, 3)) == 3


def test_what_is_not_kept_is_forgotten():
    alive = set()

    class Item:
        def __init__(self):
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    largest = 0

    def stream():
        nonlocal largest
        for _ in range(500):
            yield Item()
            largest = max(largest, len(alive))

    reservoir_sample(stream(), 7)
    assert largest <= 7 + 2


def test_an_empty_reservoir_is_refused():
    with pytest.raises(DataError, match=r"at least one sample\. Received: count=0"):
        reservoir_sample([1], 0)
