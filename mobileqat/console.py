"""How work shows itself on a terminal: bars for what takes long, a line per step of a run, and the same in run.log.

On a terminal a task has a bar with its rate and the time that remains, gone when it ends. Elsewhere it has plain lines:
the first after ten seconds, the next ones after twice the time each.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from mobileqat import progress
from mobileqat.errors import MobileQatError

if TYPE_CHECKING:
    import keras

# How each status of a step reads, and its colour.
_MARKS = {
    "done": ("done", "green"),
    "failed": ("failed", "red"),
    "resumed": ("kept", "cyan"),
    "skipped": ("skipped", "dim"),
}
SHOWN_AFTER_S = 0.5  # what is over sooner would only flicker
FIRST_LINE_S = 10.0
RATE_OVER_S = 120.0  # long enough for the validation between two epochs to count


class Bars:
    """A listener of `progress` that draws on a console.

    Args:
        console: where to.
        clock: seconds, for plain lines.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console = console
        self.clock = clock
        self._bars: _LateBars | None = None

    @contextmanager
    def __call__(self, what: str, total: int | None = None, unit: str = "") -> Iterator[progress.Advance]:
        with self.task(what, total, unit) as shown:
            yield shown.advance

    @contextmanager
    def task(self, what: str, total: int | None = None, unit: str = "") -> Iterator[_Shown]:
        """As `progress.task`; what it yields can also be renamed, and set to a number of units."""
        if not self.console.is_terminal:
            yield _Lines(self, what, total, unit)
            return
        with ExitStack() as stack:
            if self._bars is None:  # the outermost task
                self._bars = stack.enter_context(_LateBars(self.console))
                stack.callback(setattr, self, "_bars", None)
            bars = self._bars
            number = bars.add_task(what, total=total, unit=unit)
            stack.callback(bars.remove_task, number)
            yield _Bar(bars, number)


class _LateBars(Progress):
    def __init__(self, console: Console):
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _KnownBar(bar_width=24), _Status())
        super().__init__(
            *columns, TimeElapsedColumn(), console=console, transient=True, speed_estimate_period=RATE_OVER_S
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0.0) >= SHOWN_AFTER_S])


class _KnownBar(BarColumn):
    """A bar where there is a total, nothing where there is none: the spinner and the clock move."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.total else Text("")


class _Status(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(status(task.completed, task.total, task.fields["unit"], task.speed))


def status(completed: float, total: float | None, unit: str, rate: float | None) -> str:
    """Such as "120 of 359 samples, 6.4/s, 0:00:37 left"; what is not known is left out.

    Args:
        rate: units per second.
    """
    if total is None and not completed:
        return ""
    parts = [f"{completed:.0f} of {total:.0f} {unit}" if total is not None else f"{completed:.0f} {unit}"]
    if rate:
        parts.append(f"{rate:.0f}/s" if rate >= 100 else f"{rate:.2g}/s" if rate < 10 else f"{rate:.3g}/s")
        if total is not None:
            parts.append(f"{duration((total - completed) / rate)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Such as 0:00:37."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class _Shown:
    """One task on its way; by itself it shows nothing."""

    def advance(self, count: int) -> None:
        """So many more units are done."""

    def set(self, completed: int | None = None, what: str | None = None, total: int | None = None) -> None:
        """Puts it where it is now, under another name or with another total."""


class _Bar(_Shown):
    def __init__(self, bars: Progress, number: Any):
        self.bars = bars
        self.number = number

    def advance(self, count: int) -> None:
        self.bars.advance(self.number, count)

    def set(self, completed: int | None = None, what: str | None = None, total: int | None = None) -> None:
        self.bars.update(self.number, completed=completed, description=what, total=total)


class _Lines(_Shown):
    def __init__(self, owner: Bars, what: str, total: int | None, unit: str):
        self.owner = owner
        self.what, self.total, self.unit = what, total, unit
        self.completed, self.at_start = 0, 0
        self.started = owner.clock()
        self.next_s = FIRST_LINE_S

    def advance(self, count: int) -> None:
        self.completed += count
        elapsed = self.owner.clock() - self.started
        if elapsed >= self.next_s:
            self.next_s = 2.0 * elapsed
            said = status(self.completed, self.total, self.unit, (self.completed - self.at_start) / elapsed)
            self.owner.console.print(f"    {self.what}: {said}", soft_wrap=True, markup=False)

    def set(self, completed: int | None = None, what: str | None = None, total: int | None = None) -> None:
        self.what = self.what if what is None else what
        self.total = self.total if total is None else total
        if completed is not None:
            if not self.completed:
                self.at_start = completed  # of a training that is resumed: it did not take that long
            self.completed = completed


def stderr_bars() -> Bars:
    """Bars on stderr, so that stdout has a command's result alone."""
    return Bars(Console(stderr=True, highlight=False))


class RunDisplay:
    """Shows steps and training; with `quiet`, only run.log is written."""

    def __init__(self, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self.bars = Bars(self.console)
        self._log: Path | None = None
        self._step = ExitStack()
        self._has_started = False

    @contextmanager
    def log_to(self, directory: Path) -> Iterator[None]:
        """Appends what is shown, and the error that ends a run, to run.log of the directory that the run makes."""
        self._log = directory / "run.log"
        self.console.print(f"Run directory: {directory}", soft_wrap=True, markup=False)
        try:
            with progress.listening(None if self.console.quiet else self.bars), self._step:
                yield
        except (MobileQatError, KeyboardInterrupt) as error:
            self.log(f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            self.log(traceback.format_exc())
            raise

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
        self._step.close()
        if not self.console.quiet:
            self._step.enter_context(self.bars(name))

    def say(self, text: str) -> None:
        """Something to know before time goes into the next step."""
        self.log(text)
        self.console.print(f"    {text}", soft_wrap=True, style="yellow", markup=False)

    def done(self, name: str, status: str, seconds: float, message: str) -> None:
        """A step has ended. The message goes to the log only: the command ends with it."""
        self._step.close()
        self.log(f"{name} {status} {seconds:.1f} s {message}".rstrip())
        word, colour = _MARKS[status]
        self.console.print(f"  {name:<9} [{colour}]{word:<8}[/]{seconds:7.1f} s")

    def training(self, name: str, epochs: int) -> keras.callbacks.Callback:
        from keras.callbacks import LambdaCallback

        shown = _Shown()
        if not self.console.quiet:
            shown = self._step.enter_context(self.bars.task(f"{name}, preparing", unit="steps"))
        return _Training(self, shown, name, epochs).attach(LambdaCallback())


class _Training:
    """What a training shows: a bar over all its steps, and a line per epoch."""

    def __init__(self, display: RunDisplay, shown: _Shown, name: str, epochs: int):
        self.display = display
        self.shown = shown
        self.name = name
        self.epochs = epochs
        self.epoch = 0
        self.began = 0.0
        self.callback: Any = None

    def attach(self, callback: Any) -> Any:
        """Makes a Keras callback call this: this file is read where Keras is not loaded yet."""
        self.callback = callback
        for name in ("on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"):
            setattr(callback, name, getattr(self, name))
        return callback

    def on_train_begin(self, logs=None):
        self.began = time.monotonic()
        self.shown.set(total=self.epochs * self.callback.params["steps"])

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.began = epoch, time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        # By the batch's number: a training that is resumed does not begin with the first epoch.
        done = self.epoch * self.callback.params["steps"] + batch
        self.shown.set(done, f"{self.name}, epoch {self.epoch + 1} of {self.epochs}")
        self.shown.advance(1)

    def on_epoch_end(self, epoch, logs=None):
        seconds, self.epoch, self.began = time.monotonic() - self.began, epoch + 1, time.monotonic()
        line = (
            f"{self.name} epoch {epoch + 1}/{self.epochs}: loss {logs['loss']:.4f}, accuracy {logs['accuracy']:.2%}, "
            f"validation {logs['val_accuracy']:.2%} ({seconds:.1f} s)"
        )
        self.display.log(line)
        self.display.console.print(f"    {line}", soft_wrap=True)
