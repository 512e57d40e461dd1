"""A task in `worker`, the process that may import `tf_keras` and TFMOT: JSON and arrays go in and out, no pickle.

The interpreter is this one, or the one that MOBILEQAT_TFMOT_PYTHON names: mobileqat must be installed there too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat import errors

INTERPRETER = "MOBILEQAT_TFMOT_PYTHON"


def call(
    task: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    arrays: Mapping[str, np.ndarray] | None = None,
    on_event: Callable[[dict], None] | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Runs one task to its end.

    Args:
        task: name of a function in `worker.TASKS`.
        arguments: JSON-able keyword arguments.
        arrays: arrays for the task, by name.
        on_event: is given what the task reports on its way, such as the end of an epoch.

    Returns:
        The task's result, and the arrays it leaves.

    Raises:
        LegacyUnavailableError: `tf_keras` or TFMOT is not installed, or the interpreter cannot be started.
        MobileQatError: what the task raises, as the same class; ModelError for a process that dies.
    """
    with tempfile.TemporaryDirectory(prefix="mobileqat-") as name:
        folder = Path(name)
        for part in ("in", "out"):
            (folder / part).mkdir()
        (folder / "arguments.json").write_text(json.dumps(dict(arguments or {})))
        for key, array in (arrays or {}).items():
            np.save(folder / "in" / f"{key}.npy", array, allow_pickle=False)
        code = _run(task, folder, on_event)
        record = folder / "result.json"
        if not record.is_file():
            raise errors.ModelError(f"Task '{task}' of the Keras 2 process {_ending(code)}: {_last_lines(folder)}")
        result = json.loads(record.read_text())
        if "error" in result:
            raise getattr(errors, result["error"], errors.ModelError)(result["message"])
        outputs = {path.stem: np.load(path, allow_pickle=False) for path in sorted((folder / "out").glob("*.npy"))}
        return result, outputs


def _run(task: str, folder: Path, on_event: Callable[[dict], None] | None) -> int:
    command = [os.environ.get(INTERPRETER) or sys.executable, "-m", "mobileqat.legacy.worker", task, str(folder)]
    try:
        with (folder / "stderr.txt").open("wb") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=_environment()
            )
    except OSError as error:
        raise errors.LegacyUnavailableError(
            f"'{command[0]}' cannot be started: {error.strerror}. {INTERPRETER} must name a Python interpreter that "
            "has mobileqat[tfmot] installed."
        ) from error
    with child:
        try:
            for line in child.stdout or ():
                if on_event:
                    on_event(json.loads(line))
            return child.wait()
        finally:
            child.kill()  # nothing is left running, whatever ended the loop


def _environment() -> dict[str, str]:
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not os.environ.get(INTERPRETER):
        package_root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    return environment


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and without a result"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _last_lines(folder: Path) -> str:
    lines = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])[-1000:] or "no message"
