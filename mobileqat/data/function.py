"""Datasets made by the user's own code, named `module:function`."""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mobileqat.data.dataset import SPLIT_NAMES, Dataset
from mobileqat.errors import DataError


def load_function(source: str, arguments: Mapping) -> dict:
    """Import what `module:function` names and call it; returns arrays keyed as in an npz file."""
    with working_directory_importable():
        function = import_function(source)
        check_arguments(source, function, arguments)
        try:
            returned = function(**arguments)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"dataset {source!r} raised {type(error).__name__}: {error}. Correct it.") from error
    return to_arrays(source, returned)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let modules in the current directory be imported, which an installed command otherwise cannot."""
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def import_function(source: str) -> Callable:
    """The callable that `module:function` names; a DataError says why there is none."""
    module_name, _, function_name = source.partition(":")
    try:
        function = operator.attrgetter(function_name)(importlib.import_module(module_name))
    except Exception as error:
        # Importing the user's module can raise anything.
        raise DataError(
            f"dataset {source!r} cannot be imported: {type(error).__name__}: {error}. Expected "
            f"'module:function', with the module in {Path.cwd()} or installed."
        ) from error
    if not callable(function):
        raise DataError(f"dataset {source!r} is a {type(function).__name__}; expected a function.")
    return function


def check_arguments(source: str, function: Callable, arguments: Mapping) -> None:
    """Raise a DataError unless `function(**arguments)` is a possible call."""
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "none"
        raise DataError(f"dataset {source!r}: {error}. Options that it takes: {taken}.") from error


def to_arrays(source: str, returned: object) -> dict:
    """What a user's function returned, a `Dataset` or a mapping, keyed as in an npz file."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if not isinstance(returned, Dataset):
        raise DataError(
            f"dataset {source!r} returned {type(returned).__name__}; expected a mobileqat.data.Dataset or a "
            "dict with x_train, y_train, x_test and y_test."
        )
    arrays: dict = {"class_names": returned.class_names, "value_range": returned.value_range}
    for name in SPLIT_NAMES:
        split = getattr(returned, name)
        arrays |= {f"x_{name}": split.x, f"y_{name}": split.y}
    return arrays
