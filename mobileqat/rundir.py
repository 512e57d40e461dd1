"""A run directory: artefacts written whole or not at all, a journal of finished steps, one run at a time.

recipe.yaml  environment.json  run.log  report.json  report.html  model_card.md
model_explorer/*.json                         noise and parity, to lay over the .tflite files in Model Explorer
float.tflite  ptq.tflite  qat.tflite          what to ship
run_qat.py  Qat.kt                            programs that run it, likewise for ptq
checkpoints/*.npz                             where a training that was interrupted goes on
models/*.keras                                float, ptq and qat Keras models; float and qat as *.h5 with engine tfmot;
                                              calibrated is ptq before its rounding was learned
steps/*.json                                  the result of each finished step
outputs/*.npz                                 what every variant answered on the test set
tensorboard/                                  training events
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileqat.errors import RunDirectoryError

if TYPE_CHECKING:
    import numpy as np

UNFINISHED = ".unfinished-"
FOLDERS = ("models", "steps", "outputs", "checkpoints")


class SharedDirectory:
    """A run directory as a worker that trains with another process sees it: to be read.

    Args:
        path: the directory, which that process has made.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def result(self, step: str) -> Any:
        """The result of a finished step, None when it has not finished or a file that it wrote is gone."""
        path = self.path / "steps" / f"{step}.json"
        record = json.loads(path.read_text()) if path.exists() else {"result": None, "files": []}
        return record["result"] if all((self.path / name).is_file() for name in record["files"]) else None

    def checkpoint(self, step: str) -> Checkpoint:
        """Where the training of a step keeps its state."""
        return Checkpoint(self, f"checkpoints/{step}.npz", read_only=True)

    def write(self, name: str, writer: Callable[[Path], Any]) -> Path:
        """Nothing: the process that owns the directory writes this file."""
        return self.path / name


class RunDirectory(SharedDirectory):
    """Creates or reopens a run directory and locks it.

    Args:
        path: the directory; its parents are created.
        recipe: the resolved recipe as YAML.
        resume: continue a run that was started with the same recipe.

    Raises:
        RunDirectoryError: the directory is in use, holds another run, or cannot be written.
    """

    def __init__(self, path: str | Path, recipe: str, resume: bool = False):
        super().__init__(path)
        self._files: list[str] = []
        if resume and not (self.path / "recipe.yaml").is_file():
            raise RunDirectoryError(
                f"'{self.path}' holds no run to resume (no recipe.yaml). Start it without --resume."
            )
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._prepare(recipe, resume)
            except BaseException:
                self.close()
                raise

    def _prepare(self, recipe: str, resume: bool) -> None:
        if any(any((self.path / folder).glob("[!.]*")) for folder in ("models", "checkpoints")):
            self._check_recipe(recipe, resume)
        else:
            self._require_ours(recipe)
            # A run that ended before it had any model, by a wrong path say, does not block its directory.
            for record in (self.path / "steps").glob("*.json"):
                record.unlink()
        for folder in FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        for folder in (".", *FOLDERS):
            for unfinished in (self.path / folder).glob(f"{UNFINISHED}*"):
                unfinished.unlink()  # of a process that was killed: the lock says that nobody writes here
        self.write_text("recipe.yaml", recipe)

    def _require_ours(self, recipe: str) -> None:
        """Files that no run wrote stay as they are; environment.json is what a run writes first."""
        if (self.path / "environment.json").exists():
            return
        found, steps = self.path / "recipe.yaml", (self.path / "steps").glob("*.json")
        foreign = [found] if found.exists() and found.read_bytes() != recipe.encode() else []
        if names := [str(path.relative_to(self.path)) for path in (*foreign, *sorted(steps))]:
            raise RunDirectoryError(
                f"'{self.path}' holds files that no run wrote and a run would replace: {', '.join(names)}. "
                "Choose another --out."
            )

    def _take_lock(self):
        # Held until the process ends; without a buffer, which a full disk would keep from being closed.
        lock = open(self.path / ".lock", "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode(errors="replace").strip() or "another run"
            lock.close()
            raise RunDirectoryError(
                f"'{self.path}' is in use by {holder}. Wait for it, or choose another --out."
            ) from None
        except OSError:
            lock.close()
            raise
        return lock

    def _check_recipe(self, recipe: str, resume: bool) -> None:
        if not resume:
            raise RunDirectoryError(
                f"'{self.path}' holds a run already. Continue it with --resume, or choose another --out."
            )
        previous = (self.path / "recipe.yaml").read_text()
        if previous != recipe:
            raise RunDirectoryError(
                f"The recipe has changed since '{self.path}' was started:\n{_difference(previous, recipe)}\nUndo the "
                "change, or start a new run with another --out. To start that one from the float model of this one: "
                f"--set model.weights={self.path / 'models' / 'float.keras'} --set float.epochs=0"
            )

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    # ------------------------------------------------------------------ journal

    def finish(self, step: str, result: Any) -> None:
        """Records a step as finished, with the files written since the one before; `--resume` skips it from now on."""
        self.write_json(f"steps/{step}.json", {"result": result, "files": self._files})
        self._files = []
        self.checkpoint(step).delete()

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, step: str) -> Checkpoint:
        return Checkpoint(self, f"checkpoints/{step}.npz")

    # ------------------------------------------------------------------ artefacts

    def write_bytes(self, name: str, content: bytes) -> Path:
        return self.write(name, lambda path: path.write_bytes(content))

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def write(self, name: str, writer: Callable[[Path], Any]) -> Path:
        """Lets `writer` fill a temporary file, and gives it its final name once it is on disk."""
        path = write_whole(self.path / name, writer)
        self._files.append(name)
        return path


class Checkpoint:
    """One file of arrays in a run directory, replaced whole; `mobileqat.checkpoint` says what is in it."""

    def __init__(self, directory: SharedDirectory, name: str, read_only: bool = False):
        self.path = directory.path / name
        self.read_only = read_only

    def read(self) -> dict[str, np.ndarray] | None:
        """The arrays, None where there is no checkpoint.

        Raises:
            RunDirectoryError: a damaged file.
        """
        import numpy as np

        if not self.path.is_file():
            return None
        try:
            with zipfile.ZipFile(self.path):  # first, since np.load leaves a file open that it cannot read
                pass
            with np.load(self.path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RunDirectoryError(
                f"The checkpoint '{self.path}' is damaged: {error}. Delete it to train this step from its start."
            ) from error

    def delete(self) -> None:
        if not self.read_only:
            self.path.unlink(missing_ok=True)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        if not self.read_only:
            write_whole(self.path, lambda path: np.savez(path, allow_pickle=False, **arrays))


def write_whole(path: Path, writer: Callable[[Path], Any]) -> Path:
    """Writes a file under a temporary name in the same folder, syncs it, then renames it.

    Raises:
        RunDirectoryError: a disk that is full or cannot be written; the file is then what it was before.
    """
    # The suffix stays: Keras chooses the format by it.
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    with disk_errors(path):
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
    """Turns the errors of a disk that is full or cannot be written into a RunDirectoryError."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise RunDirectoryError(f"The disk of '{path}' is full. Free some space, then try again.") from error
        raise RunDirectoryError(f"'{path}' cannot be written: {error.strerror or error}.") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of Python, h5py or TensorFlow says that no space is left."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _difference(old: str, new: str) -> str:
    import difflib

    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "started with", "now", lineterm="", n=0)
    return "\n".join(f"  {line}" for line in lines if not line.startswith("@@"))
