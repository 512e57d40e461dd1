"""What is looked at in a `.keras` or `.h5` file before anything of it is unpacked or built.

Such files come from strangers: members may be named to land outside the folder they are unpacked in, declare far more
bytes than they hold, read other files through HDF5's links, or bring Python code. Each is a `ModelError`.
"""

from __future__ import annotations

import io
import json
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mobileqat.errors import ModelError

CONFIG = "config.json"
TEXT_LIMIT_BYTES = 32 * 2**20  # a hundred times the largest configuration of keras.applications
# Keras stores weights as they are; what others pack tighter stays below this, or is small.
EXPANSION, FREE_BYTES = 100, 256 * 2**20


def check_model_file(path: Path, looks_for_code: bool = True) -> None:
    """Looks at a `.keras` archive or an HDF5 file, of Keras 2 or 3, without loading it.

    Args:
        path: the file.
        looks_for_code: False where whoever builds the model does not run code, and names the layers that hold it.

    Raises:
        ModelError: it is damaged, unsafe to unpack, or holds Python code.
    """
    try:
        config = _check_archive(path) if path.suffix == ".keras" else _check_hdf5(path, path.stat().st_size, str(path))
        if looks_for_code and config is not None:
            _check_code(_loads(config, path), path)
    except ModelError:
        raise
    # zipfile, zlib, h5py and json each have their own exceptions for damaged files; h5py knows many.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ModelError(f"'{path}' is damaged: {' '.join(str(error).split())[:300]}") from error


def _check_archive(path: Path) -> bytes:
    """The text of the configuration."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for member in members:
            _check_member(path, member)
        if len(set(names)) < len(names):
            raise ModelError(f"'{path}' is no Keras 3 model: two of its members have one name.")
        if CONFIG not in names:
            raise ModelError(f"'{path}' is no Keras 3 model: its archive has no {CONFIG}.")
        _check_size(sum(member.file_size for member in members), path.stat().st_size, str(path))
        for name in names:
            if name.endswith(".h5"):
                content = archive.read(name)
                _check_hdf5(io.BytesIO(content), len(content), f"{path}: {name}")
        return archive.read(CONFIG)


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/"))
    # What Windows takes for a drive counts as well, and a link would redirect what is unpacked after it.
    if parts.is_absolute() or ".." in parts.parts or ":" in name or stat.S_ISLNK(member.external_attr >> 16):
        raise ModelError(f"'{path}' holds {name!r:.200}, which would be unpacked outside of its folder.")
    if name.endswith(".json") and member.file_size > TEXT_LIMIT_BYTES:
        raise ModelError(
            f"'{path}' holds {name!r:.200} of {member.file_size} bytes, expected at most {TEXT_LIMIT_BYTES}."
        )


def _check_size(declared_bytes: int, stored_bytes: int, where: str) -> None:
    limit = max(EXPANSION * stored_bytes, FREE_BYTES)
    if declared_bytes > limit:
        raise ModelError(f"'{where}' unpacks to {declared_bytes} bytes from {stored_bytes}, expected at most {limit}.")


def _loads(text: str | bytes, where: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"'{where}' has a configuration that is no JSON: {str(error)[:200]}") from None


def _check_code(config: Any, path: Any) -> None:
    """No Python function is pickled or marshalled in a configuration, whatever the installed Keras would do with it."""
    if not isinstance(config, dict):
        raise ModelError(f"'{path}' has a configuration that is no mapping.")
    for part in _mappings(config):
        if part.get("class_name") == "__lambda__" or "lambda" in (
            part.get("function_type"),
            part.get("output_shape_type"),
        ):
            raise ModelError(
                f"'{path}' holds Python code (a Lambda layer or a pickled function), which loading would run. Replace "
                "it by layers or a registered class, and save the model again."
            )


def _mappings(config: Any) -> Iterator[dict]:
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
        if isinstance(part, dict | list):
            waiting.extend(part.values() if isinstance(part, dict) else part)


def _check_hdf5(source: Path | io.BytesIO, stored_bytes: int, where: str) -> str | bytes | None:
    """Links and declared sizes; returns the text of the configuration, None in a file of weights alone."""
    import h5py

    declared = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                raise ModelError(f"'{where}' reads other files: '{name}' is kept outside of it.")
            declared.append(item.size * item.dtype.itemsize if item.size else 0)
            return
        for key in item:
            if isinstance(item.get(key, getlink=True), h5py.ExternalLink):
                raise ModelError(f"'{where}' reads other files: '{name}/{key}' is a link out of it.")

    with h5py.File(source, "r") as file:
        visit("", file)
        file.visititems(visit)
        _check_size(sum(declared), stored_bytes, where)
        return file.attrs.get("model_config")
