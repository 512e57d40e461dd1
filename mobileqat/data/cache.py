"""Decoded arrays kept on disk, in the folder MOBILEQAT_CACHE or ~/.cache/mobileqat.

A cache file is an uncompressed npz, so that zip's CRC-32 vouches for every byte when it is read back. Its
name carries a hash of the names, sizes and modification times of the files it was decoded from.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat.data.npz import read_npz
from mobileqat.errors import DataError


def cached_arrays(
    name: str,
    sources: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    decode: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The uint8 arrays that `decode` returns, from the cache when it holds them intact.

    Args:
        name: first part of the cache file's name.
        sources: the files that `decode` reads; a change in any of them calls for a new cache file.
        shapes: the shape of each array; a cache with anything else is decoded anew.
        decode: called without arguments when the cache is absent, damaged or of other shapes.
    """
    path = cache_folder() / f"{name}-{fingerprint(sources)}.npz"
    try:
        arrays = read_npz(path)
        if {key: (array.shape, array.dtype) for key, array in arrays.items()} == {
            key: (shape, np.uint8) for key, shape in shapes.items()
        }:
            return arrays
    except DataError:
        pass  # absent or damaged: either way it is written anew
    arrays = decode()
    keep(path, arrays, f"{name} is decoded")
    return arrays


def keep(path: Path, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Write a cache file; a warning where that is not possible, since nothing but time is lost."""
    try:
        write_atomically(path, arrays)
    except OSError as error:
        warnings.warn(f"{what} anew on every load: cannot write {path}: {error}", stacklevel=3)


def remembered(name: str, files: Iterable[str], facts: Sequence, find: Callable[[], Any]) -> Any:
    """What `find` returns, a JSON-able value, from the cache while no file has changed.

    Args:
        name: first part of the cache file's name.
        files: paths of what `find` reads.
        facts: what else decides the outcome, JSON-able.
        find: called where the cache does not know.
    """
    path = cache_folder() / f"{name}-{fingerprint_of_paths(files, facts)}.npz"
    try:
        return json.loads(str(read_npz(path)["value"]))
    except (DataError, KeyError, ValueError):
        pass  # absent or damaged: either way it is found anew
    value = find()
    keep(path, {"value": np.array(json.dumps(value))}, f"{name} are read")
    return value


def fingerprint_of_paths(files: Iterable[str], facts: Sequence = ()) -> str:
    """16 hexadecimal digits that change with `facts` and with the path, size or modification time of any file.

    Raises:
        DataError: a file is gone.
    """
    digest = hashlib.sha256(json.dumps(list(facts)).encode())
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}. Put it back, or correct the path.") from error
        digest.update(json.dumps([file, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The folder MOBILEQAT_CACHE, or ~/.cache/mobileqat. It need not exist."""
    return Path(os.environ.get("MOBILEQAT_CACHE") or Path.home() / ".cache" / "mobileqat")


def fingerprint(files: Sequence[Path]) -> str:
    """16 hexadecimal digits that change with the name, size or modification time of any file."""
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def write_atomically(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
