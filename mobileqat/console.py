"""How a run shows itself on a terminal: a line per step, a bar per training, and the same lines in run.log."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mobileqat.errors import MobileQatError

# How each status of a step reads, and its colour.
_MARKS = {
    "done": ("done", "green"),
    "failed": ("failed", "red"),
    "resumed": ("kept", "cyan"),
    "skipped": ("skipped", "dim"),
}


class RunDisplay:
    """Shows steps and training; with `quiet`, only run.log is written."""

    def __init__(self, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._log: Path | None = None
        self._progress: Progress | None = None
        self._has_started = False

    @contextmanager
    def log_to(self, directory: Path) -> Iterator[None]:
        """Appends what is shown, and the error that ends a run, to run.log of the directory that the run makes."""
        self._log = directory / "run.log"
        self.console.print(f"Run directory: {directory}", soft_wrap=True)
        try:
            yield
        except (MobileQatError, KeyboardInterrupt) as error:
            self.log(f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            self.log(traceback.format_exc())
            raise
        finally:
            self._stop_progress()

    def log(self, text: str) -> None:
        # Before its first step a run may not own the directory.
        if self._log is None or not self._has_started:
            return
        # A full disk is reported by the artefact that it costs, not by the log.
        with suppress(OSError), open(self._log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def step(self, name: str) -> None:
        self._has_started = True
        self.log(f"{name} started")

    def say(self, text: str) -> None:
        """Something to know before time goes into the next step."""
        self.log(text)
        self.console.print(f"    {text}", soft_wrap=True, style="yellow")

    def done(self, name: str, status: str, seconds: float, message: str) -> None:
        """A step has ended. The message goes to the log only: the command ends with it."""
        self._stop_progress()
        self.log(f"{name} {status} {seconds:.1f} s {message}".rstrip())
        word, colour = _MARKS[status]
        self.console.print(f"  {name:<9} [{colour}]{word:<8}[/]{seconds:7.1f} s")

    def training(self, name: str, epochs: int) -> keras.callbacks.Callback:
        # A bar needs a terminal to be drawn over; elsewhere the line per epoch says enough.
        columns = (TextColumn("    {task.description}"), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        return _TrainingProgress(self, self._progress, name, epochs)

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _TrainingProgress(keras.callbacks.Callback):
    def __init__(self, display: RunDisplay, progress: Progress, name: str, epochs: int):
        super().__init__()
        self.display = display
        self.progress = progress
        self.name = name
        self.epochs = epochs
        self.task: TaskID | None = None

    def on_train_begin(self, logs=None):
        if self.task is None:  # a resumed training begins twice: with the rest of an epoch, and with whole ones
            self.task = self.progress.add_task(self.name, total=self.epochs * self.params["steps"])
            self.progress.start()

    def on_epoch_begin(self, epoch, logs=None):
        self.progress.update(self.task, completed=epoch * self.params["steps"])

    def on_train_batch_end(self, batch, logs=None):
        self.progress.advance(self.task)

    def on_epoch_end(self, epoch, logs=None):
        line = (
            f"{self.name} epoch {epoch + 1}/{self.epochs}: loss {logs['loss']:.4f}, accuracy {logs['accuracy']:.2%}, "
            f"validation {logs['val_accuracy']:.2%}"
        )
        self.display.log(line)
        self.display.console.print(f"    {line}", soft_wrap=True)
