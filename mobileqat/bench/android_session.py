"""One measurement on an Android device: a folder of its own, filled, used and removed whatever happens.

Outputs come from one process per sample, costs from rounds in which the files take turns, a process each.  A round's
cost is its median, or its mean where the program prints no percentiles.  What still runs from the folder at the end is
killed: the processes whose working directory it is.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobileqat.bench.adb import Adb, Deadline
from mobileqat.bench.android_programs import Program, parse_output
from mobileqat.bench.android_state import State, read_state, warnings_of
from mobileqat.bench.benchmark_model import Parsed
from mobileqat.bench.record import Job, Measurement, Outcome, Settings
from mobileqat.bench.statistics import summarize
from mobileqat.errors import DeviceError

HOME = "/data/local/tmp/mobileqat"
ROUNDS = 10
WARMER_C = 2.0  # how much warmer than at the start is "back"
WIDEST_SPREAD = 0.25  # (largest - smallest) / median of a file's rounds
CLEANUP_S = 20.0
BUILT_IN = ("xnnpack", "gpu", "none")

_KILL = r"""
for p in $(ls -ld /proc/[0-9]*/cwd 2>/dev/null | sed -n 's|.*/proc/\([0-9]*\)/cwd -> FOLDER.*|\1|p'); do
  kill -9 $p 2>/dev/null
done
"""


@dataclass
class Progress:
    """What is known of one job so far."""

    rounds: list[Parsed] = field(default_factory=list)
    outputs: tuple[np.ndarray, ...] = ()
    profiled: Parsed | None = None


class Session:
    """One folder on the device, from the first push to the clean-up."""

    def __init__(self, adb: Adb, program: Program, jobs: Sequence[Job], settings: Settings) -> None:
        self.adb, self.program, self.jobs, self.settings = adb, program, jobs, settings
        self.folder = f"{HOME}/{secrets.token_hex(6)}"
        self.progress = [Progress() for _ in jobs]
        self.states: list[State] = []
        self.warnings: list[str] = list(program.warnings)
        self.start_c: float | None = None
        self.is_clean = True
        self.rounds = min(ROUNDS, settings.runs) if any(job.is_timed for job in jobs) else 0

    def run(self) -> None:
        """Everything between the push and the clean-up."""
        self._push()
        self.states.append(read_state(self.adb))
        self.start_c = self.states[0].temperature_c
        for index, job in enumerate(self.jobs):
            if job.wants_outputs:
                self._answer(index)
        for first in range(self.rounds):
            self._round(first)
        for index, job in enumerate(self.jobs):
            if job.is_timed and self.settings.profile:
                self.progress[index].profiled = self._measure(index, self._share(runs=self.settings.runs, profile=True))
        self.states.append(read_state(self.adb))

    def _share(self, runs: int, profile: bool) -> Settings:
        # Profiling slows every operator down: what it times is never mixed with the latency.
        delegate = self.settings.delegate if self.settings.delegate in BUILT_IN else "./delegate.so"
        return dataclasses.replace(self.settings, runs=max(runs, 1), profile=profile, delegate=delegate)

    def _push(self) -> None:
        """Fills the folder; every file is compared with what was sent."""
        with tempfile.TemporaryDirectory() as name:
            stage = Path(name, self.folder.rpartition("/")[2])
            stage.mkdir()
            if self.settings.delegate not in BUILT_IN:
                _copy(Path(self.settings.delegate), stage / "delegate.so")
            for index, job in enumerate(self.jobs):
                (stage / f"{index}.tflite").write_bytes(job.model.content)
                for number, values in enumerate(job.inputs):
                    (stage / f"{index}.x{number}").write_bytes(values[:1].tobytes())
                    if job.wants_outputs:
                        (stage / f"{index}.in{number}").write_bytes(values.tobytes())
            self.program.stage(stage, self.jobs, self._share(1, False))
            self.program.push(stage, self.folder)

    def _answer(self, index: int) -> None:
        content = self.program.answer(self.folder, index, self.jobs[index], self._share(1, False))
        if content is None:
            self._warn("The APK hands no outputs out: nothing says that the device computes what the host does.")
        else:
            self.progress[index].outputs = read_outputs(self.jobs[index], content)

    def _round(self, first: int) -> None:
        """One invocation of every timed job, another one first in every round."""
        self._cool_down()
        timed = [index for index, job in enumerate(self.jobs) if job.is_timed]
        share = self._share(math.ceil(self.settings.runs / self.rounds), False)
        for offset in range(len(timed)):
            index = timed[(first + offset) % len(timed)]
            self.progress[index].rounds.append(self._measure(index, share))

    def _measure(self, index: int, settings: Settings) -> Parsed:
        job = self.jobs[index]
        text = self.program.measure(self.folder, index, job, settings)
        parsed = parse_output(job.name, text, settings.delegate)
        for warning in parsed.warnings:
            self._warn(f"benchmark_model: {warning}")
        return parsed

    def _cool_down(self) -> None:
        """Waits until the device is no warmer than at the start, no longer than it may.

        Where waiting did not help, the next rounds are measured as warm as this one.
        """
        end = time.monotonic() + min(self.settings.cooldown_s, self.adb.deadline.left() / 2)
        while True:
            state = read_state(self.adb)
            self.states.append(state)
            start_c, now_c = self.start_c, state.temperature_c
            is_warm = start_c is not None and now_c is not None and now_c > start_c + WARMER_C
            if not is_warm and not state.thermal_status:
                return
            if time.monotonic() > end:
                break
            time.sleep(min(1.0, self.settings.cooldown_s / 10))
        if is_warm:
            self._warn(f"The device stayed warmer than the {self.start_c} degrees Celsius that it had at the start.")
            self.start_c = state.temperature_c

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)

    def clean_up(self) -> None:
        """Kills and removes what is ours on the device; a device that is gone keeps it, which becomes a warning."""
        adb = Adb(self.adb.path, self.adb.serial, Deadline(CLEANUP_S))
        kill = _KILL.replace("FOLDER", self.folder)
        try:
            self.program.stop(adb)
            # What started between the listing and the killing is met by the second pass.
            adb.checked(f"{kill}rm -rf {self.folder}\n{kill}rmdir {HOME} 2>/dev/null\ntrue", "Cleaning up")
        except DeviceError:
            self._warn(f"{self.folder} could not be removed from the device: a run from tomorrow on does that.")
            self.is_clean = False

    def outcome(self) -> Outcome:
        """What was measured; complete after `run`, partial before."""
        warnings = [*self.warnings, *warnings_of(self.program.identity, self.states, self.program.cores)]
        for job, progress in zip(self.jobs, self.progress, strict=True):
            warnings += _spread_warnings(job, progress)
        return Outcome(
            measurements=tuple(_measurement(p, self.settings) for p in self.progress),
            unit="ms",
            runtime="benchmark_model",
            runtime_version=self.program.version,
            device=self._device(),
            warnings=tuple(warnings),
        )

    def _device(self) -> dict:
        identity, states = self.program.identity, self.states or [State()]
        first, last, chosen = states[0], states[-1], self.program.cores
        governors = [core.governor for core in first.cores if not chosen or core.index in chosen]
        known = {
            "name": identity.name,
            "soc": identity.soc,
            "abi": identity.abis[0] if identity.abis else None,
            "system": identity.system,
            "cores": len(first.cores) or None,
            "cpus": ",".join(map(str, chosen)) or None,
            "governor": ", ".join(dict.fromkeys(governors)) or None,
            "temperature_c": None if first.temperature_c is None else (first.temperature_c, last.temperature_c),
            "battery_percent": None if first.battery_percent is None else (first.battery_percent, last.battery_percent),
        }
        return {key: value for key, value in known.items() if value is not None}

    def explained(self, error: DeviceError) -> DeviceError:
        """The error with what was measured until then and what is left on the device."""
        parts = [
            f"{job.name} {len(p.rounds)} of {self.rounds} rounds, median {summarize(_costs(p)).median:.3f} ms"
            for job, p in zip(self.jobs, self.progress, strict=True)
            if p.rounds
        ]
        until_then = f" Measured until then: {'; '.join(parts)}." if parts else ""
        left = "" if self.is_clean else f" {self.warnings[-1]}"
        explained = DeviceError(f"{error}{until_then}{left}")
        explained.measured = self.outcome()
        return explained


def read_outputs(job: Job, content: bytes) -> tuple[np.ndarray, ...]:
    """One raw array [n, *shape] per output of the file, from n times all outputs one after another.

    Raises:
        DeviceError: not as many bytes as the file's outputs take, or a type that NumPy lacks.
    """
    tensors = [job.model.tensors[index] for index in job.model.outputs]
    count = len(job.inputs[0])
    try:
        sizes = [np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for tensor in tensors]
    except TypeError as error:
        raise DeviceError(f"{job.name}: outputs of this type cannot be read from a device: {error}") from error
    if len(content) != count * sum(sizes):
        expected = f"{count} samples of {sum(sizes)} bytes"
        raise DeviceError(
            f"{job.name}: the outputs have the wrong size. Expected {expected}, got {len(content)} bytes."
        )
    rows = np.frombuffer(content, np.uint8).reshape(count, sum(sizes))
    ends = np.cumsum(sizes)
    return tuple(
        np.ascontiguousarray(rows[:, end - size : end]).view(tensor.dtype).reshape(count, *tensor.shape)
        for tensor, size, end in zip(tensors, sizes, ends, strict=True)
    )


def _costs(progress: Progress) -> list[float]:
    latencies = [parsed.latency_ms for parsed in progress.rounds]
    return [latency.mean if latency.median is None else latency.median for latency in latencies]


def _measurement(progress: Progress, settings: Settings) -> Measurement:
    rounds = progress.rounds
    if not rounds:
        return Measurement(outputs=progress.outputs)
    last, peaks = rounds[-1], [parsed.peak_memory_bytes for parsed in rounds]
    delegate = last.delegate
    if delegate and settings.delegate not in BUILT_IN:
        delegate = dataclasses.replace(delegate, name=Path(settings.delegate).name)
    return Measurement(
        costs=tuple(_costs(progress)),
        init_ms=summarize([parsed.init_ms for parsed in rounds]).median,
        peak_memory_bytes=max((peak for peak in peaks if peak is not None), default=None),
        outputs=progress.outputs,
        delegate=delegate,
        profile=progress.profiled.profile if progress.profiled else (),
        details={
            "rounds": len(rounds),
            "runs_per_round": last.runs,
            "first_ms": summarize([parsed.first_ms for parsed in rounds]).median,
            "min_ms": min(parsed.latency_ms.min for parsed in rounds),
            "max_ms": max(parsed.latency_ms.max for parsed in rounds),
            "delegation": last.delegation,
        },
    )


def _spread_warnings(job: Job, progress: Progress) -> list[str]:
    if len(progress.rounds) < 2:
        return []
    cost = summarize(_costs(progress))
    spread = (cost.max - cost.min) / cost.median if cost.median else 0.0
    if spread <= WIDEST_SPREAD:
        return []
    return [f"{job.name}: the rounds took {cost.min:.3f} to {cost.max:.3f} ms, a spread of {spread:.0%} of the median."]


def _copy(source: Path, target: Path) -> None:
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        expected = f"one of {', '.join(BUILT_IN)}, or the path of a delegate's library"
        raise DeviceError(f"The delegate cannot be read: {error}. Expected {expected}.") from error
