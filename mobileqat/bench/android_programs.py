"""The two forms of `benchmark_model` on a device: the executable, and the app that reports through logcat.

Everything lies in one folder per run: N.tflite, N.xI (the timed sample of input I), and for outputs N.inI (all
samples), N.sh (the loop over them) and N.out.  The executable is started inside it and finds files by bare names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mobileqat.bench.adb import ANSWER_S, Adb, Result
from mobileqat.bench.android_state import Identity, core_mask
from mobileqat.bench.benchmark_binary import BASE_URL, Binary
from mobileqat.bench.benchmark_model import Parsed, command, parse
from mobileqat.bench.record import Job, Settings
from mobileqat.errors import DeviceError

STALE = "find {0} -mindepth 1 -maxdepth 1 -mtime +1 -exec rm -rf {{}} + 2>/dev/null"
INSTALL_APP = f"curl -fLO {BASE_URL}/android_aarch64_benchmark_model.apk && adb install -r -d -g android_*.apk"
_STOPPED = (124, 143)  # what different versions of `timeout` exit with
_KILLED = 137

# Samples lie one after another in a file per input; the program takes one sample per process.
_LOOP = """i=0; rm -f {index}.out
while [ $i -lt {count} ]; do
{select}
  {run} >{index}.log 2>&1 </dev/null; c=$?
  [ $c -eq 0 ] && [ ! -f {index}.one ] && c=1
  if [ $c -ne 0 ]; then echo "sample $i"; cat {index}.log; exit $c; fi
  [ $i -eq 0 ] && cp {index}.log {index}.first
  cat {index}.one >>{index}.out || exit 1
  rm -f {index}.one; i=$((i+1))
done
cat {index}.first
"""


class Program(Protocol):
    """What a session needs of either form."""

    identity: Identity
    cores: tuple[int, ...]
    version: str
    warnings: tuple[str, ...]

    def stage(self, stage: Path, jobs: Sequence[Job], settings: Settings) -> None:
        """Adds what it needs to the folder that is going to be pushed."""

    def push(self, stage: Path, folder: str) -> None:
        """Copies the folder's files to the device, and makes sure that they arrived."""

    def answer(self, folder: str, index: int, job: Job, settings: Settings) -> bytes | None:
        """The outputs of all samples, one after another; None if it cannot hand them out."""

    def measure(self, folder: str, index: int, job: Job, settings: Settings) -> str:
        """What the program prints while it times `settings.runs` inferences."""

    def stop(self, adb: Adb) -> None:
        """Ends what `clean_up` would not find."""


class Executable:
    """The command line program."""

    def __init__(self, adb: Adb, identity: Identity, binary: Binary, cores: tuple[int, ...]) -> None:
        self.adb, self.identity, self.binary, self.cores = adb, identity, binary, cores
        self.version = f"sha256:{binary.sha256[:16]}"
        self.warnings = binary.warnings
        listing = adb.shell(
            "for t in timeout taskset; do command -v $t; done", "Looking for timeout and taskset"
        ).output
        self._tools = {line.rpartition("/")[2] for line in listing.split()}
        if cores and "taskset" not in self._tools:
            raise DeviceError(f"The device has no taskset, so cores cannot be chosen. Received: {len(cores)} cores.")

    def stage(self, stage: Path, jobs: Sequence[Job], settings: Settings) -> None:
        shutil.copyfile(self.binary.path, stage / "benchmark_model")
        (stage / "benchmark_model").chmod(0o755)
        for index, job in enumerate(jobs):
            if job.wants_outputs:
                (stage / f"{index}.sh").write_text(self._loop(index, job, settings), encoding="utf-8", newline="\n")

    def push(self, stage: Path, folder: str) -> None:
        push_folder(self.adb, stage, folder)
        self.adb.checked(f"chmod 755 {folder}/benchmark_model", "Making benchmark_model executable")

    def answer(self, folder: str, index: int, job: Job, settings: Settings) -> bytes | None:
        result = self._shell(f"cd {folder} && sh {index}.sh {self._seconds()}", job.name)
        parse_output(job.name, result.output, settings.delegate)
        with tempfile.TemporaryDirectory() as name:
            target = Path(name, "outputs")
            self.adb.pull(f"{folder}/{index}.out", target, self.adb.deadline.left())
            return target.read_bytes()

    def measure(self, folder: str, index: int, job: Job, settings: Settings) -> str:
        inputs = _inputs(job, f"{index}.x")
        arguments = command("./benchmark_model", f"{index}.tflite", settings, inputs=inputs)
        run = self._bounded(arguments, str(self._seconds()))
        return self._shell(f"cd {folder} && {run} </dev/null", job.name).output

    def stop(self, adb: Adb) -> None:
        """Nothing: whatever it started works in the folder."""

    def _loop(self, index: int, job: Job, settings: Settings) -> str:
        sizes = [values[:1].nbytes for values in job.inputs]
        select = "\n".join(
            f"  dd if={index}.in{number} of={index}.s{number} bs={size} skip=$i count=1 2>/dev/null || exit 1"
            for number, size in enumerate(sizes)
        )
        inputs = _inputs(job, f"{index}.s")
        arguments = command("./benchmark_model", f"{index}.tflite", settings, inputs=inputs, output=f"{index}.one")
        run = self._bounded(arguments, "$1")
        return _LOOP.format(index=index, count=len(job.inputs[0]), select=select, run=run)

    def _bounded(self, arguments: Sequence[str], seconds: str) -> str:
        """The command line, ended by the device itself after so long: killing adb here would not end it there."""
        words = [f"timeout {seconds}"] if "timeout" in self._tools else []
        words += [f"taskset {core_mask(self.cores)}"] if self.cores else []
        libraries = "LD_LIBRARY_PATH=. " if any("delegate.so" in argument for argument in arguments) else ""
        return libraries + " ".join([*words, shlex.join(arguments)])

    def _seconds(self) -> int:
        return max(1, math.floor(self.adb.deadline.left()))

    def _shell(self, script: str, what: str) -> Result:
        """Runs it; the exit code counts after the text, which says more."""
        result = self.adb.shell(script, what, self.adb.deadline.left())
        if result.code in _STOPPED:
            raise DeviceError(f"{what}: benchmark_model took too long and was stopped (exit code {result.code}).")
        if result.code == _KILLED:
            raise DeviceError(f"{what}: the device killed benchmark_model, as it does when memory is short.")
        if result.code:
            parse_output(f"{what} (exit code {result.code})", result.output, None)
            raise DeviceError(f"{what}: benchmark_model ended with exit code {result.code}.")
        return result


class Apk:
    """The benchmark app: what an app sees of the device, without outputs and without a choice of cores."""

    PACKAGE = "org.tensorflow.lite.benchmark"
    LOG = "logcat -d -v threadtime -s mobileqat:* tflite:* tflite_BenchmarkModelActivity:* AndroidRuntime:E libc:F"

    def __init__(self, adb: Adb, identity: Identity, package: Path | None, cores: tuple[int, ...]) -> None:
        if cores:
            raise DeviceError("The benchmark APK cannot be pinned to cores: leave them out, or use the executable.")
        self.adb, self.identity, self.cores = adb, identity, cores
        self.version = "APK"
        self.warnings: tuple[str, ...] = ()
        if package:
            self.version = _hash_of(package)
            adb.install(package, adb.deadline.left())
        if not is_installed(adb):
            raise DeviceError(f"The app {self.PACKAGE} is not installed. Run: {INSTALL_APP}")

    def stage(self, stage: Path, jobs: Sequence[Job], settings: Settings) -> None:
        """Nothing: the app is installed."""

    def push(self, stage: Path, folder: str) -> None:
        push_folder(self.adb, stage, folder)
        self.adb.checked(f"chmod 755 {folder} && chmod 644 {folder}/*", "Letting the app read the files")

    def answer(self, folder: str, index: int, job: Job, settings: Settings) -> bytes | None:
        return None  # an app may not write to the folder

    def measure(self, folder: str, index: int, job: Job, settings: Settings) -> str:
        mark = f"mobileqat-{secrets.token_hex(8)}"
        settings = _absolute(settings, folder)
        inputs = _inputs(job, f"{folder}/{index}.x")
        arguments = command("", f"{folder}/{index}.tflite", settings, inputs=inputs)[1:]
        if any(re.search(r"\s", argument) for argument in arguments):
            raise DeviceError(f"{job.name}: the APK splits its arguments at blanks. Received: {arguments}")
        flags = " ".join(arguments)
        start = f"am start -S -n {self.PACKAGE}/.BenchmarkModelActivity --es args {shlex.quote(flags)}"
        # logcat keeps old runs: what counts comes after the mark.
        printed = self.adb.checked(f"log -t mobileqat {mark}; {start}", f"{job.name}: starting the app")
        if "Error" in printed:
            raise DeviceError(f"{job.name}: the app cannot be started: {printed.strip()[-300:]}")
        return self._wait(mark, job.name)

    def stop(self, adb: Adb) -> None:
        adb.shell(f"am force-stop {self.PACKAGE}", "Stopping the app")

    def _wait(self, mark: str, what: str) -> str:
        """The app's log from the mark on, once it holds the timings and nothing more comes."""
        previous = ""
        while True:
            self.adb.deadline.left()
            text = self.adb.checked(self.LOG, f"{what}: reading logcat", ANSWER_S).partition(mark)[2].partition("\n")[2]
            crash = re.search(r"FATAL EXCEPTION.*|Fatal signal.*", text)
            if crash:
                raise DeviceError(f"{what}: the app crashed: {crash[0][:300]}")
            if text == previous and re.search("Inference timings in us|Benchmarking failed|Failed to", text):
                return text
            previous = text
            time.sleep(0.5)


def parse_output(what: str, text: str, delegate: str | None) -> Parsed:
    """`benchmark_model.parse`; its errors say what was run."""
    try:
        return parse(text, delegate=delegate)
    except DeviceError as error:
        raise DeviceError(f"{what}: {error}") from error


def is_installed(adb: Adb) -> bool:
    """Whether the benchmark app is on the device."""
    listed = adb.shell(f"pm list packages {Apk.PACKAGE}", "Asking for the benchmark app").output
    return f"package:{Apk.PACKAGE}" in listed.split()


def push_folder(adb: Adb, stage: Path, folder: str) -> None:
    """Copies a folder of the same name and compares its files on the device with what was sent.

    Raises:
        DeviceError: no room, a file that arrived otherwise, or the device went away.
    """
    parent = folder.rpartition("/")[0]
    adb.checked(f"mkdir -p {folder}; {STALE.format(parent)}; cd {folder}", "Making a folder on the device")
    adb.push(stage, f"{parent}/", adb.deadline.left())  # into a folder that exists: adb adds the name
    summed = adb.shell(
        f"cd {folder} && for t in sha256sum md5sum; do command -v $t >/dev/null 2>&1 || continue; "
        "echo $t; $t *; exit; done; echo none",
        "Comparing the files on the device",
        adb.deadline.left(),
    )
    tool, _, listing = summed.output.partition("\n")
    arrived = {line.split()[-1]: line.split()[0] for line in listing.splitlines() if line.strip()}
    for path in sorted(stage.iterdir()):
        is_equal = _pulled_equal(adb, path, folder) if tool == "none" else arrived.get(path.name) == _sum(path, tool)
        if not is_equal:
            raise DeviceError(
                f"{path.name} did not arrive on the device as it was sent: check the cable and the storage."
            )


def _pulled_equal(adb: Adb, path: Path, folder: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, path.name)
        adb.pull(f"{folder}/{path.name}", copy, adb.deadline.left())
        return copy.read_bytes() == path.read_bytes()


def _sum(path: Path, tool: str) -> str:
    algorithm = "sha256" if tool == "sha256sum" else "md5"
    return hashlib.new(algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()


def _hash_of(package: Path) -> str:
    try:
        return f"sha256:{hashlib.sha256(package.read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise DeviceError(f"The benchmark APK cannot be read: {error}") from error


def _inputs(job: Job, prefix: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and file of every input."""
    names = [job.model.tensors[index].name for index in job.model.inputs]
    return [(name, x.shape[1:], f"{prefix}{i}") for i, (name, x) in enumerate(zip(names, job.inputs, strict=True))]


def _absolute(settings: Settings, folder: str) -> Settings:
    if not settings.delegate.startswith("./"):
        return settings
    return dataclasses.replace(settings, delegate=f"{folder}/{settings.delegate[2:]}")
