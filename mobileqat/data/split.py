"""Which samples go where: stratified splits and the calibration draw.

Both rest on one ranking: shuffle the samples, then number those of each class 0, 1, 2, ... A split holds
out the lowest ranks of every class; calibration takes all samples of rank 0, then of rank 1, and so on.
The shuffle is NumPy's `RandomState`, whose stream, unlike that of `default_rng`, never changes between
releases (NEP 19): a test split has to stay the same test split.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from mobileqat.data.stream import Samples
from mobileqat.errors import DataError

if TYPE_CHECKING:
    from mobileqat.data.dataset import Dataset

TEST_FRACTION = 0.2
TEST_SEED = 0


def shuffled_ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle the samples and rank each one within its class.

    Args:
        labels: (n,) integers.
        seed: 0 .. 2**32 - 1.

    Returns:
        `order`, a permutation of 0 .. n - 1, and `rank`: sample `order[i]` is number `rank[i]` of its class.
        Both int64 (n,).
    """
    try:
        order = np.random.RandomState(operator.index(seed)).permutation(len(labels))
    except (TypeError, ValueError) as error:
        raise DataError(f"seed must be an integer in 0..4294967295. Received: seed={seed!r}") from error
    _, class_index, class_sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    grouped = np.argsort(class_index, kind="stable")
    class_starts = np.cumsum(class_sizes) - class_sizes
    rank = np.empty(len(labels), np.int64)
    rank[grouped] = np.arange(len(labels)) - np.repeat(class_starts, class_sizes)
    return order, rank


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `fraction` of every class, rounded, but at least one sample of each class that has two.

    Args:
        labels: (n,) integers.
        fraction: share to hold out, between 0 and 1.
        seed: the same seed gives the same split.

    Returns:
        The indices kept and the indices held out, each ascending. A class never loses its last sample, so
        nothing is held out where every class has only one.
    """
    order, rank = shuffled_ranks(labels, seed)
    _, class_index, class_sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    held_counts = np.minimum(np.maximum(np.rint(fraction * class_sizes), 1), class_sizes - 1)
    is_held = rank < held_counts[class_index]
    return np.sort(order[~is_held]), np.sort(order[is_held])


def hold_out_test(x: Samples, y: np.ndarray) -> dict[str, Any]:
    """Make a test split for data that come without one: a stratified 20 %, always the same samples."""
    train, test = stratified_split(y, TEST_FRACTION, TEST_SEED)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def calibration_samples(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    """Draw samples for calibration from the train split, as many of each class as there are.

    Validation and test samples are never used: ranges fitted to them would leak into the accuracy.

    Args:
        dataset: where `dataset.train` is drawn from.
        count: how many samples; all of train if it has fewer.
        seed: the same seed gives the same draw, and a shorter draw is the beginning of a longer one.

    Returns:
        float32 (min(count, n), ...), in memory, in an order that mixes the classes; nothing else is read.

    Raises:
        DataError: `count` is below 1.
    """
    return np.asarray(dataset.train.x[_calibration_draw(dataset, count, seed)])


def _calibration_draw(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    if count < 1:
        raise DataError(f"calibration needs at least one sample. Received: count={count}")
    order, rank = shuffled_ranks(dataset.train.y, seed)
    # Stable: samples of one rank stay shuffled, so no class is favoured when `count` cuts through a rank.
    return order[np.argsort(rank, kind="stable")[:count]]


def classes_not_calibrated(dataset: Dataset, count: int, seed: int) -> list[str]:
    """Names of the classes of which `calibration_samples` draws no sample."""
    seen = set(dataset.train.y[_calibration_draw(dataset, count, seed)].tolist())
    return [name for index, name in enumerate(dataset.class_names) if index not in seen]
