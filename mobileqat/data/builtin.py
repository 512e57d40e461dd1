"""Datasets known by name: where their files are and how they are laid out.

`digits` comes with scikit-learn. `cifar10` and `fashion_mnist` are read from the folder MOBILEQAT_DATA when
it holds them, for machines without a network, else through `keras.datasets`:

    fashion-mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz      the official files
    cifar10/packed/{train,test}_NN.xz, labels.npz                       see packed.py
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mobileqat.data.cache import cached_arrays
from mobileqat.data.npz import read_npz
from mobileqat.data.packed import read_packed
from mobileqat.data.split import hold_out_test
from mobileqat.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10_SHAPE = (32, 32, 3)


def load_digits() -> dict:
    """scikit-learn's 1797 handwritten digits, (n, 8, 8, 1), values 0..16."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    return {
        **hold_out_test(digits.images[..., np.newaxis], digits.target),
        "class_names": [str(digit) for digit in range(10)],
        "value_range": (0, 16),
    }


def load_cifar10() -> dict:
    """CIFAR-10: 50000 + 10000 photographs, uint8 (n, 32, 32, 3)."""
    folder = local_folder("cifar10/packed")
    arrays = _read_packed_cifar10(folder) if folder else _download("cifar10", "cifar10/packed")
    return {**arrays, "class_names": CIFAR10_CLASSES}


def load_fashion_mnist() -> dict:
    """Fashion-MNIST: 60000 + 10000 pictures of clothes, uint8 (n, 28, 28, 1)."""
    folder = local_folder("fashion-mnist")
    arrays = _read_idx_files(folder) if folder else _download("fashion_mnist", "fashion-mnist")
    for key in ("x_train", "x_test"):
        arrays[key] = arrays[key][..., np.newaxis]
    return {**arrays, "class_names": FASHION_MNIST_CLASSES}


def local_folder(subfolder: str) -> Path | None:
    """`subfolder` of the folder MOBILEQAT_DATA; None where the variable is unset or the subfolder absent."""
    root = os.environ.get("MOBILEQAT_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise DataError(f"MOBILEQAT_DATA names {root}, which is not a folder. Correct or unset it.")
    folder = Path(root) / subfolder
    return folder if folder.is_dir() else None


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    The bytes are 0, 0, 8 (the type), the rank, one big-endian uint32 per axis, then the data.

    Returns:
        uint8, of `rank` axes.

    Raises:
        DataError: missing, damaged, of another type or rank, or not as long as it declares.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}. Replace the file.") from error
    header_bytes = 4 + 4 * rank
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header_bytes, 4)]
    if content[:4] != bytes((0, 0, 8, rank)) or len(content) != header_bytes + math.prod(shape):
        raise DataError(
            f"{path} is not an idx file of bytes with {rank} axes: it starts with {content[:4].hex()}, "
            f"declares shape {tuple(shape)} and has {len(content)} bytes. Replace the file."
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_idx_files(folder: Path) -> dict[str, np.ndarray]:
    return {
        "x_train": read_idx(folder / "train-images-idx3-ubyte.gz", 3),
        "y_train": read_idx(folder / "train-labels-idx1-ubyte.gz", 1),
        "x_test": read_idx(folder / "t10k-images-idx3-ubyte.gz", 3),
        "y_test": read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1),
    }


def _read_packed_cifar10(folder: Path) -> dict[str, np.ndarray]:
    labels = read_npz(folder / "labels.npz")
    if not {"y_train", "y_test"} <= labels.keys():
        raise DataError(f"{folder / 'labels.npz'} has {sorted(labels)}; expected y_train and y_test. Replace the file.")
    label_counts = {split: labels[f"y_{split}"].size for split in ("train", "test")}
    shapes = {f"x_{split}": (count, *CIFAR10_SHAPE) for split, count in label_counts.items()}
    decode = partial(_unpack, folder, label_counts)
    images = cached_arrays("cifar10", sorted(folder.glob("*.xz")), shapes, decode)
    return {**images, "y_train": labels["y_train"], "y_test": labels["y_test"]}


def _unpack(folder: Path, label_counts: dict[str, int]) -> dict[str, np.ndarray]:
    arrays = {}
    # lzma and NumPy release the interpreter lock, so that threads use all cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, label_count in label_counts.items():
            shards = pool.map(read_packed, sorted(folder.glob(f"{split}_*.xz")))
            x = np.concatenate([np.empty((0, *CIFAR10_SHAPE), np.uint8), *shards])
            if len(x) != label_count:
                raise DataError(
                    f"{folder}: {split}_*.xz hold {len(x)} images, labels.npz has {label_count} labels "
                    "for them. Look for a missing file."
                )
            arrays[f"x_{split}"] = x
    return arrays


def _download(name: str, layout: str) -> dict[str, np.ndarray]:
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:
        # Keras raises a bare Exception when a download fails, and unpacking has its own for a damaged file.
        raise DataError(
            f"dataset {name!r}: keras.datasets cannot deliver it: {error}. Check the network, or put the "
            f"files in <folder>/{layout} and set MOBILEQAT_DATA=<folder>."
        ) from error
    # Keras gives CIFAR labels as a column.
    y_train, y_test = y_train.reshape(-1), y_test.reshape(-1)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
