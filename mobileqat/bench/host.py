"""The target `host`: this machine's interpreters, in a child process of its own."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobileqat.bench import child
from mobileqat.bench.record import Check, Job, Outcome, Settings
from mobileqat.errors import MobileQatError
from mobileqat.progress import task
from mobileqat.runtime import RUNTIMES, available_runtimes, require_runtime


class Host:
    """This machine."""

    has_profiler = False
    integer_only = False
    computes = True

    def __init__(self, name: str = "host") -> None:
        self.name = name

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Latency in ms; see `Target.run`.

        Raises:
            RuntimeUnavailableError: the runtime is not usable here.
            MobileQatError: a core that does not exist, or may not be used.
        """
        version = require_runtime(settings.runtime)
        with tempfile.TemporaryDirectory(prefix="mobileqat-bench-") as folder:
            child.write_jobs(Path(folder), jobs, settings, cpus=_allowed_cores(settings.cpus))
            command = [sys.executable, str(child.WORKER), folder]
            with _watching(Path(folder) / "rounds", settings.runs):
                done = child.run_command(command, settings.timeout_s, "the benchmark")
            rows = child.read_result(Path(folder), done, f"{settings.runtime} on this machine")["models"]
            measured = child.measurements(Path(folder), jobs, rows)
        return Outcome(measured, "ms", settings.runtime, version, describe_machine())

    def check(self) -> list[Check]:
        """The interpreters that can be used."""
        found = available_runtimes()
        return [
            Check(
                f"runtime {name} ({RUNTIMES[name].kernels})",
                version if version[0].isdigit() else None,
                "" if version[0].isdigit() else _remedy(name, version.removeprefix("not usable: ")),
                is_needed=name == "litert",
            )
            for name, version in found.items()
        ]


@contextmanager
def _watching(path: Path, rounds: int) -> Iterator[None]:
    """Shows how many of the rounds are done, as the worker writes it down now and then."""
    ended = threading.Event()
    with task("timed rounds", rounds or None, "rounds") as advance:

        def look() -> None:
            seen = 0
            while not ended.wait(0.5):
                try:
                    now = int(path.read_text(encoding="ascii"))
                except (OSError, ValueError):  # not there yet, or half written
                    continue
                advance(now - seen)
                seen = now

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _remedy(name: str, reason: str) -> str:
    """The command that provides a runtime, and why it is not usable."""
    extra = "mobileqat[tflite-runtime]" if name == "tflite-runtime" else RUNTIMES[name].package
    return f'pip install "{extra}" ({reason})'


def describe_machine() -> dict[str, Any]:
    """CPU model, number of logical cores, and platform."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "platform": platform.platform()}


def _allowed_cores(cpus: str | None) -> list[int]:
    """Core numbers of a list such as "0" or "0,2-3".

    Raises:
        DeviceError: no such list.
        MobileQatError: a core that this process may not use, or a platform that cannot pin.
    """
    numbers = child.core_numbers(cpus)
    if numbers and not hasattr(os, "sched_setaffinity"):
        raise MobileQatError(f"This platform cannot pin a process. Received: cpus {cpus}, expected none.")
    if numbers and not set(numbers) <= os.sched_getaffinity(0):
        allowed = sorted(os.sched_getaffinity(0))
        raise MobileQatError(f"Expected cores that this process may use, of {allowed}. Received: {cpus}")
    return numbers


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
