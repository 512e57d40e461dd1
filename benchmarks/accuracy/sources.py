"""A data source in smaller portions or other units, for recipes of this benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mobileqat.data import SOURCES


def prepare(
    *, of: str, count: int | None = None, scale: float | None = None, options: Mapping[str, Any], image_size=None
) -> dict:
    """The arrays of the source `of`: the first `count` samples of each split, divided by `scale`."""
    arguments = {**options} | ({} if image_size is None else {"image_size": image_size})
    arrays = dict(SOURCES[of].load(**arguments))
    for split in ("train", "validation", "test"):
        if count is not None and f"x_{split}" in arrays:
            # Spread over the split: some sources are sorted by class.
            chosen = np.linspace(0, len(arrays[f"y_{split}"]) - 1, min(count, len(arrays[f"y_{split}"]))).astype(int)
            arrays |= {f"{axis}_{split}": np.asarray(arrays[f"{axis}_{split}"])[chosen] for axis in "xy"}
        if scale is not None and f"x_{split}" in arrays:
            arrays[f"x_{split}"] = arrays[f"x_{split}"].astype(np.float32) / np.float32(scale)
    if scale is not None and arrays.get("value_range") is not None:
        arrays["value_range"] = tuple(bound / scale for bound in arrays["value_range"])
    return arrays
