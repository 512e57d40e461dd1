"""A run directory: artefacts written whole or not at all, a journal of finished steps, one run at a time.

recipe.yaml  environment.json  run.log  report.json  report.html
float.tflite  ptq.tflite  qat.tflite          what to ship
models/*.keras                                float, ptq and qat Keras models
steps/*.json                                  the result of each finished step
outputs/*.npz                                 what every variant answered on the test set
tensorboard/                                  training events
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobileqat.errors import RunDirectoryError


class RunDirectory:
    """Creates or reopens a run directory and locks it.

    Args:
        path: the directory; its parents are created.
        recipe: the resolved recipe as YAML.
        resume: continue a run that was started with the same recipe.

    Raises:
        RunDirectoryError: the directory is in use, holds another run, or cannot be written.
    """

    def __init__(self, path: str | Path, recipe: str, resume: bool = False):
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._check_recipe(recipe, resume)
            for folder in ("models", "steps", "outputs"):
                (self.path / folder).mkdir(exist_ok=True)
            self.write_text("recipe.yaml", recipe)

    def _take_lock(self):
        lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunDirectoryError(
                f"'{self.path}' is in use by another run. Wait for it, or choose another --out."
            ) from None
        return lock

    def _check_recipe(self, recipe: str, resume: bool) -> None:
        previous = self.path / "recipe.yaml"
        if not previous.exists():
            if resume:
                raise RunDirectoryError(f"'{self.path}' holds no run to resume (no recipe.yaml).")
            return
        if not resume:
            raise RunDirectoryError(
                f"'{self.path}' holds a run already. Continue it with --resume, or choose another --out."
            )
        if previous.read_text() != recipe:
            changes = _difference(previous.read_text(), recipe)
            raise RunDirectoryError(
                f"The recipe has changed since '{self.path}' was started:\n{changes}\nUndo the change, or start a "
                "new run with another --out."
            )

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    # ------------------------------------------------------------------ journal

    def result(self, step: str) -> Any:
        """The result of a finished step, None when it has not finished."""
        path = self.path / "steps" / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, step: str, result: Any) -> None:
        """Records a step as finished; after this, `--resume` skips it."""
        self.write_json(f"steps/{step}.json", result)

    # ------------------------------------------------------------------ artefacts

    def write_bytes(self, name: str, content: bytes) -> Path:
        return self.write(name, lambda path: path.write_bytes(content))

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def write(self, name: str, writer: Callable[[Path], Any]) -> Path:
        """Lets `writer` fill a temporary file, and gives it its final name once it is on disk."""
        with disk_errors(self.path):
            return write_whole(self.path / name, writer)


def write_whole(path: Path, writer: Callable[[Path], Any]) -> Path:
    """Writes a file under a temporary name in the same folder, syncs it, then renames it."""
    # The suffix stays: Keras chooses the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a RunDirectoryError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunDirectoryError(
                f"The disk of '{path}' is full. What was finished is kept; free some space and use --resume."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise RunDirectoryError(f"'{path}' cannot be written: {error.strerror}.") from error
        raise


def _difference(old: str, new: str) -> str:
    import difflib

    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "started with", "now", lineterm="", n=0)
    return "\n".join(f"  {line}" for line in lines if not line.startswith("@@"))
