"""The targets `arm:cortex-a53` and `arm:cortex-a76`: the real ARM interpreters under qemu, in executed instructions.

An emulator says nothing about time, but it executes what the core would: the kernels that the interpreter selects for
that core, instruction by instruction. The count repeats from process to process, up to the few hundred by which
Python's own bookkeeping between two inferences varies, and every inference includes Python's call, 3,000 of them.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mobileqat.bench import child, sysroot
from mobileqat.bench.record import Check, Job, Measurement, Outcome, Settings
from mobileqat.errors import DeviceError
from mobileqat.runtime import RUNTIMES

# Python adapts its bytecode during the first rounds: they are executed and not counted.
UNCOUNTED_ROUNDS = 10
# More counted rounds than this tell nothing new.
MAX_ROUNDS = 10


@dataclass(frozen=True)
class Cpu:
    """What a core's /proc/cpuinfo says; it must fit what qemu's `-cpu` of that name executes.

    Interpreters choose their kernels by it, among other things, and LiteRT since 2.2 dies of an x86 one.
    """

    part: str
    variant: str
    revision: int
    features: str

    def cpuinfo(self) -> str:
        rows = {
            "processor": "0",
            "BogoMIPS": "48.00",
            "Features": self.features,
            "CPU implementer": "0x41",
            "CPU architecture": "8",
            "CPU variant": self.variant,
            "CPU part": self.part,
            "CPU revision": str(self.revision),
        }
        return "".join(f"{name}\t: {value}\n" for name, value in rows.items()) + "\n"


_ARMV8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV8_2 = f"{_ARMV8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"

# Cores of Debian 12's qemu on which outputs were found to be those of x86, bit for bit. qemu's default is not among
# them: on its SME, LiteRT computes wrong values without a word.
CPUS: dict[str, Cpu] = {
    "cortex-a53": Cpu("0xd03", "0x0", 4, _ARMV8_0),
    "cortex-a76": Cpu("0xd0b", "0x4", 1, _ARMV8_2),  # has the dot product
}


class EmulatedArm:
    """An ARM core under qemu, `arm:cortex-a53`.

    Raises:
        DeviceError: a core that is not in `CPUS`.
    """

    has_profiler = False
    integer_only = False
    computes = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.cpu = name.partition(":")[2]
        if self.cpu not in CPUS:
            expected = ", ".join(f"arm:{cpu}" for cpu in CPUS)
            raise DeviceError(f"There is no target '{name}'. Expected one of: {expected}.")

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Instructions per inference; see `Target.run`. All jobs share one emulated process.

        `Settings.cpus` says nothing here, and more than `MAX_ROUNDS` runs are not carried out.

        Raises:
            DeviceError: what `mobileqat.bench.sysroot` sets up is not there, more than one thread is asked for, or
                the interpreter fails.
        """
        if settings.threads != 1:
            raise DeviceError(
                f"{self.name} counts the instructions of one thread: waiting threads execute any number of them. "
                f"Received: threads={settings.threads}."
            )
        site = sysroot.wheels(settings.runtime).require()
        root = sysroot.system().require() / "root"
        counted = min(settings.runs, MAX_ROUNDS)
        rounds = counted and UNCOUNTED_ROUNDS + counted
        what = f"{settings.runtime} on {self.name}"
        with tempfile.TemporaryDirectory(prefix="mobileqat-bench-") as name:
            folder, counts = Path(name), Path(name) / "counts.txt"
            # The rounds that are not counted are the warm-up.
            child.write_jobs(folder, jobs, replace(settings, runs=rounds, warmup=1, cpus=None), mark=True)
            command = [*self._emulator(folder, root, counts), str(root / sysroot.INTERPRETER), str(child.WORKER), name]
            done = child.run_command(command, settings.timeout_s, what, _environment(site))
            result = child.read_result(folder, done, what)
            timed = [index for index, job in enumerate(jobs) if job.is_timed]
            costs = dict(zip(timed, read_counts(counts, len(timed), rounds), strict=True))
            rows = [[float(cost) for cost in costs.get(index, [])[-counted:]] for index in range(len(jobs))]
            measured = child.measurements(folder, jobs, result["models"], rows)
        version = result["version"] or sysroot.interpreter_version(RUNTIMES[settings.runtime].package)
        measurements = tuple(_without_time(measurement) for measurement in measured)
        return Outcome(measurements, "instructions", settings.runtime, version, self._describe())

    def check(self) -> list[Check]:
        """The machine, the emulated system, the ARM builds of the interpreters, and the plugin's compiler."""
        problem = sysroot.machine_problem()
        machine = Check("x86-64 Linux", None if problem else "this machine", problem or "")
        runtimes = {RUNTIMES[name].package: name for name in reversed(sysroot.arm_runtimes())}
        parts = [replace(sysroot.wheels(name).check(), is_needed=name == "litert") for name in runtimes.values()]
        system = sysroot.system().check()
        return [machine, system, *reversed(parts), _check_emulator(is_there=system.found is not None), _check_plugin()]

    def _emulator(self, folder: Path, root: Path, counts: Path) -> list[str]:
        """The command up to the program: qemu, the core, its view of the file system, and the plugin."""
        view = make_view(folder / "view", root, CPUS[self.cpu])
        options = [_escaped(sysroot.plugin()), f"out={_escaped(counts)}"]
        return [*sysroot.emulator(), "-cpu", self.cpu, "-L", str(view), "-plugin", ",".join(options)]

    def _describe(self) -> dict[str, object]:
        downloads = [name.split("_") for name in sysroot.system().downloads()]
        versions = {(name, rest[-1]): version.replace("%3a", ":") for name, version, *rest in downloads}
        return {
            "name": f"{self.cpu} emulated by qemu",
            "abi": "aarch64",
            "system": f"qemu-user {versions.get(('qemu-user', 'amd64.deb'))}, "
            f"libc6 {versions.get(('libc6', 'arm64.deb'))}, Python {sysroot.PYTHON}",
            "cores": 1,
        }


def make_view(path: Path, root: Path, cpu: Cpu) -> Path:
    """The emulated program's file system: the ARM system, and what Linux says about the core.

    qemu opens a file in here if there is one of that name, and the machine's own otherwise.
    """
    (path / "proc").mkdir(parents=True)
    (path / "proc" / "cpuinfo").write_text(cpu.cpuinfo(), encoding="ascii")
    cores = path / "sys" / "devices" / "system" / "cpu"
    cores.mkdir(parents=True)
    for name in ("possible", "present"):
        (cores / name).write_text("0\n", encoding="ascii")
    for found in root.iterdir():
        (path / found.name).symlink_to(found)
    return path


def read_counts(path: Path, sessions: int, rounds: int) -> list[list[int]]:
    """Instructions per session and round, from what the plugin wrote.

    Args:
        path: a count at each mark, two marks per inference, in the order of `worker.py`: every round starts with
            another session.
        sessions: how many files were counted.
        rounds: how often each.

    Raises:
        DeviceError: the file is incomplete, or has another number of marks.
    """
    try:
        *lines, last = path.read_text(encoding="ascii").split() or [""]
        marks = [int(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DeviceError(f"qemu's plugin left no usable counts: {error}") from error
    if last != "end" or len(marks) != 2 * sessions * rounds or marks != sorted(marks):
        raise DeviceError(
            f"qemu's plugin left {len(marks)} marks {'and an end' if last == 'end' else 'without an end'}, "
            f"expected {2 * sessions * rounds} ascending ones and an end."
        )
    counts: list[list[int]] = [[] for _ in range(sessions)]
    for place, (before, after) in enumerate(zip(marks[::2], marks[1::2], strict=True)):
        first, offset = divmod(place, sessions)
        counts[(first + offset) % sessions].append(after - before)
    return counts


def _without_time(measurement: Measurement) -> Measurement:
    """Milliseconds and memory under emulation are the emulator's."""
    return replace(measurement, init_ms=None, peak_memory_bytes=None)


def _environment(site: Path) -> dict[str, str]:
    """Little else than the interpreter's folder: nothing of this machine's Python gets in."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _escaped(path: Path) -> str:
    """A path among qemu's comma-separated options."""
    return str(path).replace(",", ",,")


def _check_emulator(is_there: bool) -> Check:
    what = "qemu-aarch64 that takes plugins"
    if not is_there:
        return Check(what, None, sysroot.SETUP)
    try:
        version, usage = (
            child.run_command([*sysroot.emulator(), option], 30, what).stdout for option in ("--version", "--help")
        )
    except DeviceError as error:
        return Check(f"{what} ({error})", None, f"rm -r {shlex.quote(str(sysroot.system().path))} && {sysroot.SETUP}")
    if "-plugin" not in usage:
        return Check(
            f"{what} (it does not run)", None, f"rm -r {shlex.quote(str(sysroot.system().path))} && {sysroot.SETUP}"
        )
    return Check(what, version.partition("(")[0].strip())


def _check_plugin() -> Check:
    what = "C compiler, for qemu's plugin"
    if sysroot.is_plugin_made():
        return Check(what, "not needed any more: the plugin is in the cache")
    compiler = sysroot.find_compiler()
    return Check(what, compiler, "" if compiler else sysroot.COMPILER)
