"""Summaries of repeated measurements, in milliseconds or as ratios.

Latencies are skewed to the right: the median says what a run takes, the 90th percentile what a user notices.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """`p90` interpolates between order statistics; `std` is the sample's (n - 1), 0 for one value."""

    median: float
    p90: float
    min: float
    max: float
    mean: float
    std: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def summarize(values: Sequence[float]) -> Summary:
    """Summary of at least one finite value.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = np.asarray(values, np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected at least one finite value. Received: {list(values)[:5]}")
    return Summary(
        median=float(np.median(array)),
        p90=float(np.percentile(array, 90)),
        min=float(array.min()),
        max=float(array.max()),
        mean=float(array.mean()),
        std=float(array.std(ddof=1)) if array.size > 1 else 0.0,
    )
