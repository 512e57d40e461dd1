"""How far long work is: the library says it, and a program that listens shows it.  Nobody listens by default.

    with task("calibration", total=8, unit="batches") as advance: ...; advance(1)
    for batch in track(batches, "calibration", "batches"): ...

As with logging, the code that works needs no reference to whoever looks on: `listening` sets that for a block of code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

Advance = Callable[[int], None]
# Called with what is done, how much of it there is (None when nobody knows) and its unit; a block like `task`'s.
Listener = Callable[[str, "int | None", str], AbstractContextManager[Advance]]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Shows the tasks of a block of code through `listener`; None for silence."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def task(what: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """A block of work; what it yields is called with the number of units that were done since the last call.

    Args:
        what: in a word or two.
        total: how many units there are; None when nobody knows.
        unit: plural.
    """
    listener = _listener.get()
    if listener is None:
        yield lambda count: None
        return
    with listener(what, total, unit) as advance:
        yield advance


def track(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one by one; an item is done when the next one is asked for.

    Args:
        items: what to go through.
        what: in a word or two.
        unit: what an item is, plural.
        total: how many there are, for items that have no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
