"""Datasets in a NumPy `.npz` file, read as untrusted input.

Pickled objects are refused (loading them runs code), and the sizes that the archive declares for its
members are held against a limit before anything is decompressed; `zipfile` reads no further than declared.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from mobileqat.errors import DataError

LIMIT_BYTES = 8 * 2**30


def load_npz(*, path: str, limit_bytes: int = LIMIT_BYTES) -> dict[str, np.ndarray]:
    """All arrays of the file at `path`; see `read_npz`."""
    return read_npz(Path(path), limit_bytes)


def read_npz(path: Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, np.ndarray]:
    """Read every array of an npz file.

    Args:
        path: the file.
        limit_bytes: refuse an archive that declares more than this, uncompressed.

    Raises:
        DataError: missing, not an npz file, damaged, too large, or holding Python objects.
    """
    try:
        if not zipfile.is_zipfile(path):
            path.stat()  # says whether it is missing or something else
            raise DataError(f"{path} is not an npz file. Write it with numpy.savez.")
        with np.load(path, allow_pickle=False) as archive:
            declared_bytes = sum(member.file_size for member in archive.zip.infolist())
            if declared_bytes > limit_bytes:
                raise DataError(
                    f"{path} unpacks to {declared_bytes} bytes; expected at most {limit_bytes}. "
                    "If you trust the file, raise the option limit_bytes."
                )
            for member in archive.zip.infolist():
                _check_header(path, archive.zip, member)
            return {key: archive[key] for key in archive.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    except Exception as error:
        # zipfile, zlib, lzma and NumPy's header parser each have their own exceptions for damaged files.
        raise DataError(
            f"{path} is damaged or holds Python objects: {error}. Write plain arrays with numpy.savez."
        ) from error


def _check_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """NumPy makes room for what an array's header says before it reads the values: as many there have to be."""
    if not member.filename.endswith(".npy"):
        return
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    declared_bytes = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and declared_bytes > member.file_size:
        raise DataError(
            f"{path} is damaged: {member.filename} says it has shape {shape} of {dtype}, {declared_bytes} bytes, and "
            f"has {member.file_size}. Write plain arrays with numpy.savez."
        )
