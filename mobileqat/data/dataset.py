"""What a dataset is, and the one place that decides whether given arrays make one.

Every source delivers a mapping with the keys of an npz file (`x_train`, `y_train`, `x_test`, `y_test`, and
optionally the validation pair, `class_names` and `value_range`). `build_dataset` checks it, carves the
validation split from train where none was given, and converts to float32 and int64.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobileqat.data.split import stratified_split
from mobileqat.data.stream import Samples, Streamed
from mobileqat.errors import DataError

REQUIRED_KEYS = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL_KEYS = ("x_validation", "y_validation", "class_names", "value_range")
SPLIT_NAMES = ("train", "validation", "test")
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their labels.

    Attributes:
        x: float32 (n, ...), raw values; images are (n, height, width, channels). An array, or `Streamed` where the
            samples are read from disk when they are asked for: `np.asarray(x[:10])` reads ten.
        y: int64 (n,), indices into the dataset's `class_names`.
    """

    x: Samples
    y: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of one classification task.

    Attributes:
        name: the source it was loaded from.
        train, validation, test: never empty, samples all of one shape; train has samples of every class.
        class_names: one name per label.
        value_range: lowest and highest value that x can take, (0, 255) for 8-bit pixels; None when unknown.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    value_range: tuple[float, float] | None


def build_dataset(source: str, arrays: Mapping, *, validation_fraction: float, seed: int) -> Dataset:
    """Check what a source delivered and make a `Dataset` of it.

    Args:
        source: name of the dataset, also used in error messages.
        arrays: x_* numeric (n, ...), y_* integer (n,); keys as in the module's docstring. A None value counts
            as absent. Without `class_names` the labels are their own names; without `value_range` arrays of
            unsigned 8-bit integers get (0, 255).
        validation_fraction: share of each train class to carve for validation; unused if the arrays have one.
        seed: decides which samples are carved.

    Raises:
        DataError: any violation; the message names source, split and first offending index.
    """
    arrays = {key: value for key, value in arrays.items() if value is not None}
    _check_keys(source, arrays)
    splits = {
        name: Split(_to_array(source, arrays, f"x_{name}"), _to_array(source, arrays, f"y_{name}"))
        for name in SPLIT_NAMES
        if f"x_{name}" in arrays
    }
    value_range = _parse_value_range(source, arrays.get("value_range"), splits)
    class_names = _parse_class_names(source, arrays.get("class_names"), splits["train"].y)
    check_splits(source, splits, class_names, value_range)
    if "validation" not in splits:
        splits |= _carve_validation(source, splits["train"], validation_fraction, seed)
    return Dataset(
        name=source,
        **{name: _to_float32(split) for name, split in splits.items()},
        class_names=class_names,
        value_range=value_range,
    )


def check_splits(
    source: str,
    splits: Mapping[str, Split],
    class_names: tuple[str, ...],
    value_range: tuple[float, float] | None,
) -> None:
    """Raise a DataError unless the splits, as delivered and before any conversion, make a dataset."""
    for name, split in splits.items():
        where = f"dataset {source!r}, {name} split"
        _check_samples(where, f"x_{name}", split.x, len(split.y) if split.y.ndim else 0)
        _check_labels(where, f"y_{name}", split.y, class_names)
        _check_values(where, f"x_{name}", split.x, value_range)
        if split.x.shape[1:] != splits["train"].x.shape[1:]:
            raise DataError(
                f"{where}: samples of shape {split.x.shape[1:]}; expected {splits['train'].x.shape[1:]} as "
                "in the train split. Resize or pad them alike."
            )
    untrained = np.setdiff1d(np.arange(len(class_names)), splits["train"].y)
    if untrained.size:
        label = untrained[0]
        raise DataError(
            f"dataset {source!r}, train split: class {class_names[label]!r} (label {label}) has no sample; "
            f"expected at least one of each of the {len(class_names)} classes. Add samples or remove it."
        )


def _check_samples(where: str, key: str, x: Samples, label_count: int) -> None:
    if x.dtype.kind not in "iuf":
        raise DataError(f"{where}: {key} must be integers or floats, received dtype {x.dtype}. Convert it.")
    if not 2 <= x.ndim <= 5 or 0 in x.shape[1:]:
        raise DataError(
            f"{where}: {key} must have shape (n, features), (n, height, width, channels) or the like, with 1 "
            f"to 4 axes after n, none of them empty; received {x.shape}. Reshape it."
        )
    if len(x) != label_count:
        raise DataError(
            f"{where}: expected one label per sample, received {len(x)} samples and {label_count} labels; "
            f"index {min(len(x), label_count)} has only one of the two. Remove or complete it."
        )
    if len(x) == 0:
        raise DataError(f"{where}: {key} is empty; expected at least one sample. Add data to this split.")


def _check_labels(where: str, key: str, y: np.ndarray, class_names: tuple[str, ...]) -> None:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {key} must be integers of shape (n,), received {y.dtype} of shape {y.shape}. "
            f"Use {key}.reshape(-1) on a column, argmax(axis=1) on one-hot labels, astype('int64') on floats."
        )
    outside = np.flatnonzero((y < 0) | (y >= len(class_names)))
    if outside.size:
        classes = f"0..{len(class_names) - 1} ({len(class_names)} classes)" if class_names else "0, 1, 2, ..."
        raise DataError(
            f"{where}: {key}[{outside[0]}] is {y[outside[0]]}; expected a label in {classes}. "
            "Number the labels from 0 or complete class_names."
        )


def _check_values(where: str, key: str, x: Samples, value_range: tuple[float, float] | None) -> None:
    if isinstance(x, Streamed):
        return  # pixels of 8 bits, which cannot be outside of their range
    # Without a range the bounds are float32's own, so that they reject inf and what would overflow to it.
    low, high = value_range or (-FLOAT32_MAX, FLOAT32_MAX)
    # Minimum and maximum propagate NaN and need no temporary array; the index is looked up only to report it.
    with np.errstate(invalid="ignore"):
        if low <= float(x.min()) and float(x.max()) <= high:
            return
        is_valid = (x >= np.float64(low)) & (x <= np.float64(high))
    index = np.unravel_index(np.argmin(is_valid), x.shape)
    expected = f"a value within value_range {value_range}" if value_range else "a value finite in float32"
    place = ", ".join(str(i) for i in index)
    raise DataError(f"{where}: {key}[{place}] is {x[index]}; expected {expected}. Clean the data.")


def _carve_validation(source: str, train: Split, fraction: float, seed: int) -> dict[str, Split]:
    if not 0 < fraction < 1:
        raise DataError(
            f"dataset {source!r}: validation_fraction must lie between 0 and 1. "
            f"Received: validation_fraction={fraction!r}"
        )
    kept, held = stratified_split(train.y, fraction, seed)
    if held.size == 0:
        raise DataError(
            f"dataset {source!r}, validation split: empty, because every class has only one train sample to "
            "carve it from; expected at least two of some class. Add data, or x_validation and y_validation."
        )
    return {
        "train": Split(train.x[kept], train.y[kept]),
        "validation": Split(train.x[held], train.y[held]),
    }


def _to_float32(split: Split) -> Split:
    return Split(split.x.astype(np.float32), split.y.astype(np.int64))


def _check_keys(source: str, arrays: Mapping) -> None:
    for key in arrays:
        if key not in REQUIRED_KEYS + OPTIONAL_KEYS:
            close = difflib.get_close_matches(str(key), REQUIRED_KEYS + OPTIONAL_KEYS, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise DataError(
                f"dataset {source!r}: unknown key {key!r}{hint} Expected {', '.join(REQUIRED_KEYS)} and "
                f"optionally {', '.join(OPTIONAL_KEYS)}. Rename or remove it."
            )
    pair = ("x_validation", "y_validation")
    required = REQUIRED_KEYS + pair if any(key in arrays for key in pair) else REQUIRED_KEYS
    missing = [key for key in required if key not in arrays]
    if missing:
        raise DataError(
            f"dataset {source!r}: missing {', '.join(missing)}; received {', '.join(arrays) or 'nothing'}. "
            "Add what is missing."
        )


def _to_array(source: str, arrays: Mapping, key: str) -> Any:
    if isinstance(arrays[key], Streamed):
        return arrays[key]
    try:
        return np.asarray(arrays[key])
    except (TypeError, ValueError) as error:
        raise DataError(f"dataset {source!r}: {key} is not an array: {error}. Give all samples one shape.") from error


def _parse_class_names(source: str, class_names, y_train: np.ndarray) -> tuple[str, ...]:
    if class_names is not None:
        names = np.asarray(class_names)
        if names.ndim != 1 or names.size == 0:
            raise DataError(
                f"dataset {source!r}: class_names must be a list of names, received {class_names!r}. "
                "Give one name per label, or leave class_names out."
            )
        return tuple(names.astype(str).tolist())
    if y_train.dtype.kind not in "iu" or y_train.size == 0:
        return ()  # check_splits says what is wrong with these labels
    # No more classes than samples: one stray label of 10**9 must be reported, not given a billion names.
    return tuple(str(label) for label in range(min(max(int(y_train.max()) + 1, 0), y_train.size)))


def _parse_value_range(source: str, value_range, splits: Mapping[str, Split]) -> tuple[float, float] | None:
    if value_range is None:
        return (0.0, 255.0) if all(split.x.dtype == np.uint8 for split in splits.values()) else None
    try:
        low, high = (float(bound) for bound in value_range)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"dataset {source!r}: value_range must be (low, high). Received: value_range={value_range!r}"
        ) from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(
            f"dataset {source!r}: value_range needs finite low < high. Received: value_range={value_range!r}"
        )
    return low, high
