"""Datasets in a NumPy `.npz` file, read as untrusted input.

Pickled objects are refused (loading them runs code), and the sizes that the archive declares for its
members are held against a limit before anything is decompressed; `zipfile` reads no further than declared.
"""

from __future__ import annotations

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
