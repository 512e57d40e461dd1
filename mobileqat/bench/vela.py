"""Arm Ethos-U NPUs, as their compiler Vela sees them: what runs on the NPU, its memory, and cycles by estimate.

`ethos-u55-128` and its relatives name Vela's accelerator configurations, each with Vela's default system and memory
mode.  Nothing is executed, so there are no outputs to compare and no milliseconds but the estimate's: cycles by the
clock of the default system.  Vela comes from PyPI (`ethos-u-vela`) and is run as a program, wherever it is installed:
MOBILEQAT_VELA, beside this Python, or on PATH.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

from mobileqat.bench.child import ending, run_command
from mobileqat.bench.record import Check, Delegate, Job, Measurement, OperatorCost, Outcome, Settings
from mobileqat.errors import DeviceError
from mobileqat.flatbuffer import Model

FIX = "pip install ethos-u-vela"
_REASON = re.compile(r"Warning \([^)]*\) operator: (\S+), ofm: '([^']*)'\s*\nReason: (.+)")


class Vela:
    """A configuration of an Ethos-U.  Jobs that want outputs get none: `Measurement.outputs` stays empty.

    Args:
        name: "ethos-u55-128" and so on; which exist is Vela's to say.

    Raises:
        DeviceError: the name has another form.
    """

    has_profiler = True
    integer_only = True
    computes = False

    def __init__(self, name: str):
        match = re.fullmatch(r"ethos-(u\d\d)-(\d+)", name)
        if not match:
            raise DeviceError(f"Expected a name such as ethos-u55-128. Received: '{name}'")
        self.name = name
        self._description = f"Arm Ethos-{match[1].upper()}, {match[2]} MACs per cycle"

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Compiles every file; `costs` of those that are timed is one number, the estimated cycles.

        Raises:
            DeviceError: Vela is missing, does not know the configuration, takes too long, cannot compile a file, or
                places none of its operators on the NPU.
        """
        program, version = _find_vela()
        deadline = time.monotonic() + settings.timeout_s
        measurements, device = [], {}
        for job in jobs:
            with tempfile.TemporaryDirectory(prefix="mobileqat-vela-") as folder:
                text = _compile(program, self.name, job, Path(folder), max(deadline - time.monotonic(), 0.1))
                summary = _table(Path(folder), "summary")[0]
                layers = _table(Path(folder), "per-layer")
            measurements.append(_measurement(job, summary, layers, text, settings))
            device = _device(self._description, summary)
        partial = [m.delegate for m in measurements if m.delegate and m.delegate.share < 1]
        warnings = ["The estimate leaves out the operators that run on the CPU."] if partial else []
        return Outcome(tuple(measurements), "cycles", "vela", version, device, tuple(warnings))

    def check(self) -> list[Check]:
        try:
            program, version = _find_vela()
        except DeviceError:
            return [Check("Vela, the compiler for Ethos-U", None, FIX)]
        return [Check("Vela, the compiler for Ethos-U", f"{version} ({program})")]


def _find_vela() -> tuple[str, str]:
    """Path and version."""
    beside = shutil.which("vela", path=str(Path(sys.executable).parent))
    program = os.environ.get("MOBILEQAT_VELA") or beside or shutil.which("vela")
    if program is None:
        raise DeviceError(f"Vela is not installed: {FIX}")
    done = run_command([program, "--version"], 60, "Vela")
    version = done.stdout.strip()
    # KubeVela's program has the same name.
    if done.returncode or not re.fullmatch(r"\d+\.\d+\S*", version):
        raise DeviceError(f"{program} is not the compiler Vela (or is broken): {FIX}")
    return program, version


def _compile(program: str, configuration: str, job: Job, folder: Path, timeout_s: float) -> str:
    """What Vela printed; its tables are in the folder."""
    path = folder / "model.tflite"
    path.write_bytes(job.model.content)
    options = [f"--accelerator-config={configuration}", f"--output-dir={folder}", "--verbose-performance"]
    done = run_command([program, *options, str(path)], timeout_s, f"Vela, compiling '{job.name}',")
    if done.returncode or not list(folder.glob("*_summary_*.csv")):
        raise DeviceError(f"Vela, compiling '{job.name}', {_complaint(done)}")
    return done.stdout


def _complaint(done: CompletedProcess) -> str:
    if "invalid choice" in done.stderr:
        return f"does not know the configuration: {done.stderr.strip().splitlines()[-1]}"
    lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip() and "Warning:" not in line]
    return f"{ending(done.returncode)}: {' | '.join(lines[-3:])[:600] or 'no message'}"


def _table(folder: Path, kind: str) -> list[dict[str, str]]:
    try:
        with next(folder.glob(f"model_{kind}*.csv")).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except StopIteration:
        raise DeviceError(f"Vela left no {kind} table: another version is needed, {FIX}") from None


def _measurement(
    job: Job, summary: dict[str, str], layers: Sequence[dict[str, str]], text: str, settings: Settings
) -> Measurement:
    kinds = _kinds(job.model)
    reasons = {name: reason for _, name, reason in _REASON.findall(text)}
    on_cpu = {row["Name"]: kinds[row["Name"]] for row in layers if row["Target"] == "CPU" and row["Name"] in kinds}
    on_npu = len(job.model.operators) - len(on_cpu)
    listed = [f"{kind} '{name}': {reasons.get(name, 'no reason given')}" for name, kind in on_cpu.items()]
    if not on_npu or not any(row["Target"] == "NPU" for row in layers):
        raise DeviceError(f"Vela places no operator of '{job.name}' on the NPU. The first is {listed[:1]}")
    flash = float(summary["on_chip_flash_memory_used"]) + float(summary["off_chip_flash_memory_used"])
    details = {
        "sram_bytes": round(1024 * float(summary["sram_memory_used"])),
        "flash_bytes": round(1024 * flash),
        "dram_bytes": round(1024 * float(summary["dram_memory_used"])),
        "macs": round(float(summary["nn_macs"])),
        "estimated_ms": round(1e3 * float(summary["inference_time"]), 9),
        "npu_operators": on_npu,
        **({"cpu_operators": "; ".join(listed)} if listed else {}),
    }
    return Measurement(
        costs=(float(summary["cycles_total"]),) if job.is_timed and settings.runs else (),
        delegate=Delegate("ethos-u", on_npu, len(job.model.operators)),
        profile=_profile(layers, kinds) if settings.profile else (),
        details=details,
    )


def _kinds(model: Model) -> dict[str, str]:
    """Operators by the name of their first output."""
    return {model.tensors[operator.outputs[0]].name: operator.name for operator in model.operators if operator.outputs}


def _profile(layers: Sequence[dict[str, str]], kinds: dict[str, str]) -> tuple[OperatorCost, ...]:
    """Cycles per operator of the file: Vela makes several of one, the last of which has the name of its output."""
    rows = [row for row in layers if row["Target"] == "NPU"]
    costs, cycles = [], 0.0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cycles += float(row["Op Cycles"])
        is_last = following is None or following["Name"] != row["Name"]
        if is_last and (row["Name"] in kinds or following is None):
            costs.append(OperatorCost(row["Name"], kinds.get(row["Name"], row["Original Operator"]), cycles))
            cycles = 0.0
    return tuple(costs)


def _device(description: str, summary: dict[str, str]) -> dict[str, str | float]:
    return {
        "name": description,
        "system": f"{summary['system_config']}, {summary['memory_mode']}",
        "clock_mhz": float(summary["core_clock"]) / 1e6,
    }
