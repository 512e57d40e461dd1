"""Latency and memory of `.tflite` files on this machine.

Measuring happens in a child process, `python -m mobileqat.bench.host`: a crash of native code ends the child
and not the caller, and its memory is nobody else's. The child prints one JSON object between two markers.
Several files in one child take turns, one invocation each, so that drift of the machine hits all alike.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobileqat import flatbuffer
from mobileqat.bench.statistics import Summary, summarize
from mobileqat.errors import MobileQatError, RuntimeUnavailableError
from mobileqat.runtime import Session, available_runtimes, import_runtime, random_samples

_BEGIN, _END = "<<<mobileqat.bench.host", "mobileqat.bench.host>>>"


@dataclass(frozen=True)
class LatencyRecord:
    """What one file costs on one runtime.

    Attributes:
        latency_ms: one invocation, without copying inputs or outputs.
        init_ms: building the interpreter and allocating its tensors.
        peak_memory_bytes: the file itself, plus the growth of the child's resident set from before the
            interpreter was built to its peak after the warm-up. What the library sets up on first use is in
            it, about 10 MB for LiteRT. None in a comparison, where files share a process.
        machine: "cpu" (model name), "cores", "platform".
        cpu: the core the child was pinned to, or None.
    """

    runtime: str
    runtime_version: str
    threads: int
    warmup: int
    runs: int
    latency_ms: Summary
    init_ms: float
    peak_memory_bytes: int | None
    size_bytes: int
    operator_counts: dict[str, int]
    machine: dict[str, Any]
    cpu: int | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that `json.dumps` takes."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RatioSpread:
    """Spread over the rounds of one file's latency divided by the first file's in the same round."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Comparison:
    """Files measured in turns. `records` and `ratios` have the same keys; the first one's ratio is 1."""

    records: dict[str, LatencyRecord]
    ratios: dict[str, RatioSpread]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that `json.dumps` takes."""
        return dataclasses.asdict(self)


def benchmark(
    model: bytes | str | Path,
    *,
    runtime: str = "litert",
    threads: int = 1,
    warmup: int = 20,
    runs: int = 200,
    cpu: int | None = None,
    timeout_s: float = 600.0,
) -> LatencyRecord:
    """Measures one file, on random inputs at its own batch size.

    Args:
        model: path or bytes of a `.tflite` file.
        runtime: a key of `runtime.RUNTIMES`.
        threads: interpreter threads.
        warmup: invocations before timing starts.
        runs: timed invocations.
        cpu: core to pin the child to (Linux), or None.
        timeout_s: the child is killed after this time.

    Raises:
        FlatbufferError: the file is broken.
        RuntimeUnavailableError: the runtime is missing, refuses the file, crashes or takes too long.
    """
    return compare(
        {"model": model},
        runtime=runtime,
        threads=threads,
        warmup=warmup,
        runs=runs,
        cpu=cpu,
        timeout_s=timeout_s,
    ).records["model"]


def compare(
    models: Mapping[str, bytes | str | Path],
    *,
    runtime: str = "litert",
    threads: int = 1,
    warmup: int = 20,
    runs: int = 200,
    cpu: int | None = None,
    timeout_s: float = 600.0,
) -> Comparison:
    """Measures several files in one child, round-robin; arguments and errors are those of `benchmark`."""
    if not models or threads < 1 or warmup < 0 or runs < 1:
        raise MobileQatError(
            "expected at least one model, threads >= 1, warmup >= 0 and runs >= 1. "
            f"Received: {len(models)} models, threads={threads}, warmup={warmup}, runs={runs}"
        )
    _check_cpu(cpu)
    contents = {name: flatbuffer.read(source) for name, source in models.items()}
    with tempfile.TemporaryDirectory(prefix="mobileqat-bench-") as folder:
        paths = [Path(folder) / f"{index}.tflite" for index in range(len(contents))]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content.content)
        arguments = [f"--runtime={runtime}", f"--threads={threads}", f"--warmup={warmup}", f"--runs={runs}"]
        arguments += [] if cpu is None else [f"--cpu={cpu}"]
        command = [sys.executable, "-m", "mobileqat.bench.host", *arguments, *map(str, paths)]
        measured = run_child(command, timeout_s)["models"]
    latencies = {name: row["latency_ms"] for name, row in zip(contents, measured, strict=True)}
    records = {
        name: LatencyRecord(
            runtime=runtime,
            runtime_version=available_runtimes()[runtime],
            threads=threads,
            warmup=warmup,
            runs=runs,
            latency_ms=summarize(latencies[name]),
            init_ms=row["init_ms"],
            peak_memory_bytes=row["peak_memory_bytes"] if len(contents) == 1 else None,
            size_bytes=contents[name].size_bytes,
            operator_counts=dict(Counter(operator.name for operator in contents[name].operators)),
            machine=describe_machine(),
            cpu=cpu,
        )
        for name, row in zip(contents, measured, strict=True)
    }
    first = next(iter(latencies.values()))
    return Comparison(records, {name: _ratio_spread(values, first) for name, values in latencies.items()})


def describe_machine() -> dict[str, Any]:
    """CPU model, number of logical cores, and platform."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "platform": platform.platform()}


def run_child(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Runs a command that prints a JSON object between the markers, and returns the object.

    Raises:
        RuntimeUnavailableError: the child reports an error, is killed by a signal (named), takes longer than
            `timeout_s`, or prints no result.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search_path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeUnavailableError(f"the benchmark was stopped after {timeout_s:g} s") from None
    _, _, rest = done.stdout.partition(_BEGIN)
    text, end, _ = rest.partition(_END)
    # The interpreter may still die while it is taken down: the exit code counts beside the markers.
    result = json.loads(text) if end else {}
    if "error" in result:
        raise RuntimeUnavailableError(result["error"])
    if done.returncode or not end:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeUnavailableError(f"the benchmark {_ending(done.returncode)}: {last_lines or 'no message'}")
    return result


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode} and without a usable result"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def _ratio_spread(values: Sequence[float], first: Sequence[float]) -> RatioSpread:
    ratios = summarize([value / reference for value, reference in zip(values, first, strict=True)])
    return RatioSpread(ratios.min, ratios.median, ratios.max)


def _check_cpu(cpu: int | None) -> None:
    if cpu is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise MobileQatError(f"this platform cannot pin a process. Received: cpu={cpu}, expected None")
    if cpu not in os.sched_getaffinity(0):
        raise MobileQatError(f"cpu {cpu} is not among those allowed here: {sorted(os.sched_getaffinity(0))}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- in the child


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the files named on the command line and prints the result between the markers."""
    parser = argparse.ArgumentParser(prog="python -m mobileqat.bench.host", description=main.__doc__)
    parser.add_argument("paths", nargs="+", metavar="MODEL.tflite")
    parser.add_argument("--runtime", default="litert")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--cpu", type=int)
    options = parser.parse_args(arguments)
    try:
        result: dict[str, Any] = {"models": _measure(options)}
    except MobileQatError as error:
        result = {"error": str(error)}
    print(_BEGIN, json.dumps(result), _END, flush=True)
    return int("error" in result)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each file in order: "init_ms", "peak_memory_bytes" and the list "latency_ms"."""
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    # The interpreter's modules and the parsed files are loaded first: their time and memory are Python's.
    import_runtime(options.runtime)
    models = [flatbuffer.read(path) for path in options.paths]
    gc.collect()
    gc.disable()
    sessions, rows = [], []
    for model in models:
        baseline_bytes = _reset_peak_memory()
        start_ns = time.perf_counter_ns()
        session = Session(model, options.runtime, options.threads)
        init_ms = (time.perf_counter_ns() - start_ns) / 1e6
        session.set_inputs(*(random_samples(details) for details in session.inputs))
        for _ in range(options.warmup):
            session.invoke()
        growth_bytes = max(_peak_memory_bytes() - baseline_bytes, 0)
        rows.append({"init_ms": init_ms, "peak_memory_bytes": growth_bytes + model.size_bytes})
        sessions.append(session)
    latencies = _time_in_turns(sessions, options.runs)
    return [{**row, "latency_ms": values} for row, values in zip(rows, latencies, strict=True)]


def _time_in_turns(sessions: Sequence[Session], rounds: int) -> list[list[float]]:
    """Milliseconds per session and round; every round starts with another session."""
    latencies: list[list[float]] = [[] for _ in sessions]
    for first in range(rounds):
        for offset in range(len(sessions)):
            index = (first + offset) % len(sessions)
            start_ns = time.perf_counter_ns()
            sessions[index].invoke()
            latencies[index].append((time.perf_counter_ns() - start_ns) / 1e6)
    return latencies


def _peak_memory_bytes() -> int:
    """Largest resident set of this process so far, or since the last reset.

    Linux keeps `ru_maxrss` across fork and exec, so in a child of a large process it shows the parent's peak;
    VmHWM belongs to this program alone.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak_memory() -> int:
    """Lowers the recorded peak to the present resident set where the kernel allows it; returns the peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_memory_bytes()


if __name__ == "__main__":
    sys.exit(main())
