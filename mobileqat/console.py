"""How a run shows itself on a terminal: a line per step, a bar per training, and the same lines in run.log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_MARKS = {
    "done": "[green]done[/]",
    "failed": "[red]failed[/]",
    "resumed": "[cyan]kept[/]",
    "skipped": "[dim]skipped[/]",
}


class RunDisplay:
    """Shows steps and training; with `quiet`, only run.log is written."""

    def __init__(self, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._log: Path | None = None

    @contextmanager
    def log_to(self, directory: Path) -> Iterator[None]:
        """Appends what is shown to run.log of the run directory, which the run itself makes."""
        self._log = directory / "run.log"
        self.console.print(f"Run directory: {directory}", soft_wrap=True)
        yield

    def log(self, text: str) -> None:
        if self._log is not None and self._log.parent.is_dir():
            with open(self._log, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def step(self, name: str) -> None:
        self.log(f"{name} started")

    def done(self, name: str, status: str, seconds: float, message: str) -> None:
        self.log(f"{name} {status} {seconds:.1f} s {message}".rstrip())
        self.console.print(f"  {name:<9} {_MARKS[status]:<8} {seconds:7.1f} s")
        if message:
            self.console.print(f"    {message}", markup=False)

    def training(self, name: str, epochs: int) -> keras.callbacks.Callback:
        return _TrainingProgress(self, name, epochs)


class _TrainingProgress(keras.callbacks.Callback):
    def __init__(self, display: RunDisplay, name: str, epochs: int):
        super().__init__()
        self.display = display
        self.name = name
        self.epochs = epochs
        self.progress = Progress(
            TextColumn("    {task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=display.console,
            transient=True,
        )
        self.task = self.progress.add_task(name)

    def on_train_begin(self, logs=None):
        self.progress.update(self.task, total=self.epochs * self.params["steps"])
        self.progress.start()

    def on_train_batch_end(self, batch, logs=None):
        self.progress.advance(self.task)

    def on_epoch_end(self, epoch, logs=None):
        line = (
            f"{self.name} epoch {epoch + 1}/{self.epochs}: loss {logs['loss']:.4f}, accuracy {logs['accuracy']:.2%}, "
            f"validation {logs['val_accuracy']:.2%}"
        )
        self.display.log(line)
        self.display.console.print(f"    {line}")

    def on_train_end(self, logs=None):
        self.progress.stop()
