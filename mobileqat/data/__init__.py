"""Datasets by name, in one shape: raw float32 samples in three splits, checked before use.

A source is a name in the table below, or `module:function` for the user's own code. The test split belongs
to the data and never depends on the seed; validation is carved from train; calibration draws from train.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from mobileqat.data.augment import augment_images
from mobileqat.data.builtin import load_cifar10, load_digits, load_fashion_mnist
from mobileqat.data.dataset import Dataset, Split, build_dataset
from mobileqat.data.folder import load_image_folder
from mobileqat.data.function import check_arguments, load_function
from mobileqat.data.npz import load_npz
from mobileqat.data.reservoir import reservoir_sample
from mobileqat.data.speech import load_fsdd, load_kws01
from mobileqat.data.split import calibration_samples, classes_not_calibrated
from mobileqat.data.stream import Streamed, in_batches
from mobileqat.data.tfrecord import load_tfrecord
from mobileqat.data.trashnet import load_trashnet
from mobileqat.errors import DataError

__all__ = [
    "Dataset",
    "Split",
    "Streamed",
    "augment_images",
    "calibration_samples",
    "classes_not_calibrated",
    "in_batches",
    "load_dataset",
    "reservoir_sample",
    "sources",
]


class Source(NamedTuple):
    description: str
    load: Callable[..., dict]


SOURCES = {
    "cifar10": Source("CIFAR-10 photographs, 32x32x3, 10 classes, 50000 + 10000", load_cifar10),
    "digits": Source("scikit-learn's handwritten digits, 8x8x1, 10 classes, 1797", load_digits),
    "fashion_mnist": Source("Fashion-MNIST clothes, 28x28x1, 10 classes, 60000 + 10000", load_fashion_mnist),
    "fsdd": Source("Free Spoken Digit Dataset as MFCC, 49x10x1, 10 classes, 3000", load_fsdd),
    "image_folder": Source("images in <path>/[train/]<class>/, resized to image_size", load_image_folder),
    "kws01": Source("MLPerf Tiny's keyword samples as MFCC, 49x10x1, 12 classes, 1000", load_kws01),
    "npz": Source("arrays x_train, y_train, x_test, y_test of the NumPy file <path>", load_npz),
    "tfrecord": Source("images in the TFRecord files of <path>, a folder, file or pattern", load_tfrecord),
    "trashnet": Source("TrashNet photographs, 6 classes, 2527, resized to image_size", load_trashnet),
}


def load_dataset(
    source: str,
    *,
    path: str | None = None,
    image_size: tuple[int, int] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    **options,
) -> Dataset:
    """Load and check a dataset.

    Args:
        source: a name of `sources()`, or `module:function`, a callable that returns a `Dataset` or a dict
            with the keys of an npz file.
        path: file or folder, for the sources that read one.
        image_size: (height, width) in pixels, for the sources that resize.
        validation_fraction: share of each train class to carve for validation, where the source has no
            validation split of its own.
        seed: decides which train samples are carved; the test split does not depend on it.
        options: handed to the source; an option that it does not take is an error.

    Returns:
        x float32, raw values as stored (pixels 0..255), y int64. Samples of a large image folder or of many TFRecords
        are read from disk when they are asked for; see `Split`.

    Raises:
        DataError: unknown source or option, missing or damaged files, arrays that make no dataset.

    Example:
        >>> load_dataset("digits").train.x.shape
        (1295, 8, 8, 1)
    """
    arguments = {**options, "path": path, "image_size": image_size}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if ":" in source:
        arrays = load_function(source, arguments)
    elif source in SOURCES:
        check_arguments(source, SOURCES[source].load, arguments)
        arrays = SOURCES[source].load(**arguments)
    else:
        close = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        expected = ", ".join(SOURCES)
        raise DataError(f"unknown dataset {source!r}{hint} Expected {expected} or 'module:function'.")
    return build_dataset(source, arrays, validation_fraction=validation_fraction, seed=seed)


def sources() -> dict[str, str]:
    """Name and one-line description of every source of the table."""
    return {name: source.description for name, source in SOURCES.items()}
