"""Job folders of `worker.py`: writes them, starts the process that works on one, reads what it leaves.

Measuring happens in another process: a crash of native code ends it and not the caller, and its memory is nobody
else's.  Several files in one process take turns, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat.bench import worker
from mobileqat.bench.record import Job, Measurement, Settings
from mobileqat.errors import DeviceError
from mobileqat.runtime import RUNTIMES

WORKER = Path(worker.__file__)


def write_jobs(
    folder: Path, jobs: Sequence[Job], settings: Settings, cpus: Sequence[int] = (), mark: bool = False
) -> None:
    """Fills a folder with `job.json`, the files and their inputs."""
    runtime = RUNTIMES[settings.runtime]
    models = []
    for index, job in enumerate(jobs):
        (folder / f"{index}.tflite").write_bytes(job.model.content)
        for number, values in enumerate(job.inputs):
            np.save(folder / f"{index}.in{number}.npy", values, allow_pickle=False)
        has_state = any(tensor.is_variable for tensor in job.model.tensors)
        models.append({"samples": len(job.inputs[0]) if job.wants_outputs else 0, "has_state": has_state})
        models[-1]["timed"] = job.is_timed and settings.runs > 0
    description = {
        "module": runtime.module,
        "package": runtime.package,
        "resolver": runtime.resolver,
        "threads": settings.threads,
        "warmup": settings.warmup,
        "runs": settings.runs,
        "cpus": list(cpus),
        "mark": mark,
        "models": models,
    }
    (folder / "job.json").write_text(json.dumps(description), encoding="utf-8")


def core_numbers(cpus: str | None) -> list[int]:
    """A list of cores such as "0,4-5" as [0, 4, 5]; None is empty.

    Raises:
        DeviceError: it is no such list.
    """
    # As many digits as a core's number may have: a range is written out.
    parts = (
        [re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part) for part in cpus.split(",")] if cpus is not None else []
    )
    numbers = [n for part in parts if part for n in range(int(part[1]), int(part[2] or part[1]) + 1)]
    if not all(parts) or (parts and not numbers):
        raise DeviceError(f"Expected cores as a list such as 0 or 0,4-7. Received: '{cpus}'")
    return numbers


def run_command(
    command: Sequence[str],
    timeout_s: float,
    what: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.CompletedProcess:
    """Runs a command to its end, whatever its exit code; its output is text. It runs in `folder`, if one is given.

    Raises:
        DeviceError: it cannot be started, or takes longer than `timeout_s`; it is dead then.
    """
    try:
        return subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{what} was stopped after {timeout_s:g} s.") from None
    except (OSError, ValueError) as error:  # no argument can hold a zero byte
        raise DeviceError(f"{what} cannot be started: {error}") from error


def read_result(folder: Path, done: subprocess.CompletedProcess, what: str) -> dict[str, Any]:
    """What the worker left: "version", and "models" with a row each.

    Raises:
        DeviceError: the worker reports an error, was killed by a signal (named), or left no result.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {}
    if "error" in result:
        raise DeviceError(f"{what}: {result['error']}")
    # The interpreter may still die while it is taken down: the exit code counts beside the result.
    if done.returncode or not result:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise DeviceError(f"{what} {ending(done.returncode)}: {last_lines or 'no message'}")
    return result


def ending(returncode: int) -> str:
    """How a process without a usable result ended, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode} and without a usable result"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def measurements(
    folder: Path, jobs: Sequence[Job], rows: Sequence[dict], costs: Sequence[Sequence[float]] | None = None
) -> tuple[Measurement, ...]:
    """The worker's rows with the outputs it left; `costs` stand in for its latencies."""
    alone = len(jobs) == 1  # files that share a process share its memory
    return tuple(
        Measurement(
            costs=tuple(row["latencies_ms"] if costs is None else costs[index]),
            init_ms=row["init_ms"],
            peak_memory_bytes=row["peak_memory_bytes"] if alone else None,
            outputs=_outputs(folder, index, len(job.model.outputs)) if job.wants_outputs else (),
        )
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True))
    )


def _outputs(folder: Path, index: int, count: int) -> tuple[np.ndarray, ...]:
    return tuple(np.load(folder / f"{index}.out{number}.npy", allow_pickle=False) for number in range(count))
