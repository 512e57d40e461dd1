"""Decoded arrays kept on disk, in the folder MOBILEQAT_CACHE or ~/.cache/mobileqat.

A cache file is an uncompressed npz, so that zip's CRC-32 vouches for every byte when it is read back. Its
name carries a hash of the names, sizes and modification times of the files it was decoded from.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
    try:
        write_atomically(path, arrays)
    except OSError as error:
        warnings.warn(f"{name} is decoded anew on every load: cannot write {path}: {error}", stacklevel=2)
    return arrays


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
