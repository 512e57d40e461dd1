"""What is asked of a target, what it answers, and the record that every target yields.

A *target* runs `.tflite` files somewhere: in a child process here, under qemu, on a phone, on a board, in Vela.  It
takes jobs and returns raw measurements; everything else (statistics, ratios, agreement with the host) is computed in
one place, `measure`, the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mobileqat.bench.statistics import Summary
from mobileqat.flatbuffer import Model

UNITS = {"ms": "milliseconds", "instructions": "executed instructions", "cycles": "estimated cycles"}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        runtime: a key of `runtime.RUNTIMES`; targets that bring their own program ignore it.
        threads: interpreter threads.
        warmup: invocations before timing starts.
        runs: timed invocations; 0 computes outputs only.
        cpus: cores to run on: None, a list such as "0" or "4-7", or on a phone "big" or "little".
        delegate: "xnnpack", "gpu", "none", or the path of a vendor's delegate (Android).
        profile: whether to measure every operator too.
        timeout_s: the longest that one target may take with one set of files.
        cooldown_s: the longest wait for the temperature to come back before a measurement (Android).
    """

    runtime: str = "litert"
    threads: int = 1
    warmup: int = 20
    runs: int = 200
    cpus: str | None = None
    delegate: str = "xnnpack"
    profile: bool = False
    timeout_s: float = 600.0
    cooldown_s: float = 60.0


@dataclass(frozen=True)
class Job:
    """A file to run.

    Attributes:
        name: for messages.
        model: the checked file.
        inputs: one raw array [n, *shape of the tensor] per input of the file, n >= 1 invocations.
        wants_outputs: whether the outputs of all n invocations are wanted.
        is_timed: whether to time it, on the first invocation's inputs.
    """

    name: str
    model: Model
    inputs: tuple[np.ndarray, ...]
    wants_outputs: bool = True
    is_timed: bool = True


@dataclass(frozen=True)
class Delegate:
    """How many of a file's operators a delegate took over."""

    name: str
    operators: int
    of: int

    @property
    def share(self) -> float:
        return self.operators / self.of if self.of else 0.0


@dataclass(frozen=True)
class OperatorCost:
    """What one operator costs per inference, in the record's unit; `name` is its output tensor."""

    name: str
    kind: str
    cost: float
    calls: int = 1


@dataclass(frozen=True)
class Measurement:
    """A target's answer to one job.

    Attributes:
        costs: one value per timed run, in `Outcome.unit`.
        init_ms: building the interpreter and allocating its tensors, if it can be told.
        peak_memory_bytes: likewise.
        outputs: one raw array [n, *shape of the tensor] per output of the file, if they were wanted.
        delegate: None where the target does not say.
        profile: one entry per operator, empty without `Settings.profile` or a profiler.
        details: what only this target has, such as Vela's SRAM: name -> number or text.
    """

    costs: tuple[float, ...] = ()
    init_ms: float | None = None
    peak_memory_bytes: int | None = None
    outputs: tuple[np.ndarray, ...] = ()
    delegate: Delegate | None = None
    profile: tuple[OperatorCost, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A target's answer to a list of jobs, in their order.

    Attributes:
        unit: a key of `UNITS`.
        device: what was measured on, name -> number or text: "name", "soc", "abi", "system" (its version), "cores",
            "governor", "temperature_c" and "battery_percent" (pairs before and after), as far as the target has it.
        warnings: what makes the numbers less trustworthy, a sentence each.
    """

    measurements: tuple[Measurement, ...]
    unit: str
    runtime: str
    runtime_version: str
    device: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One thing that a target needs, or can use; `fix` is the exact command that provides it, empty if it is there."""

    what: str
    found: str | None
    fix: str = ""
    is_needed: bool = True


class Target(Protocol):
    """Somewhere to run files.  Its class is a row of `targets.TARGETS`."""

    name: str  # as on the command line: "host", "arm:cortex-a53", "android:SERIAL"
    has_profiler: bool  # measures operators itself; elsewhere each one is measured as a model of its own
    computes: bool  # gives outputs: a compiler's estimate has none
    integer_only: bool  # has no use for a float file

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Runs all jobs in one go; those that are timed take turns, one invocation each.

        Raises:
            DeviceError: the target is missing, goes away, takes too long, or cannot run a file; it says which.
        """

    def check(self) -> list[Check]:
        """What the target needs and whether it is there; quick, changes nothing."""


@dataclass(frozen=True)
class Agreement:
    """Outputs on fixed vectors against the host's: share of identical values, largest difference in LSBs.

    `bound_lsb` is how far single values may be apart: 0 where kernels compute the same integers on every machine, None
    where they are known not to.
    """

    samples: int
    identical: float
    max_lsb: float
    top1_agreement: float
    bound_lsb: float | None = 0


@dataclass(frozen=True)
class Record:
    """What one file costs on one target; `cost` is in `unit`, the other fields are those of the above classes."""

    target: str
    runtime: str
    runtime_version: str
    unit: str
    threads: int
    warmup: int
    runs: int
    cost: Summary
    init_ms: float | None
    peak_memory_bytes: int | None
    size_bytes: int
    operator_counts: dict[str, int]
    delegate: Delegate | None
    profile: tuple[OperatorCost, ...]
    agreement: Agreement | None
    device: dict[str, Any]
    details: dict[str, Any]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that `json.dumps` takes."""
        result = dataclasses.asdict(self)
        if self.delegate:
            result["delegate"]["share"] = self.delegate.share
        return result


@dataclass(frozen=True)
class RatioSpread:
    """Spread over the rounds of one file's cost divided by the first file's in the same round."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Comparison:
    """Files measured in turns.  `records` and `ratios` have the same keys; the first one's ratio is 1."""

    records: dict[str, Record]
    ratios: dict[str, RatioSpread]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that `json.dumps` takes."""
        records = {name: record.to_dict() for name, record in self.records.items()}
        return {"records": records, "ratios": {name: vars(ratio) for name, ratio in self.ratios.items()}}
