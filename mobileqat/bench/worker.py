"""Runs the files of a job folder in this process: `python worker.py FOLDER`.

It needs the standard library, NumPy and one interpreter, and nothing of this package: the same file is started here,
under qemu, and on a board over ssh.  `child.py` writes the folder and reads what this leaves in it.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def main(folder: Path) -> int:
    """Reads `job.json`, leaves `result.json` and the outputs; the exit code is 1 if the result is an error."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        result = run(folder, job)
    except Exception as error:  # whatever the interpreter raises is the job's result
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


def run(folder: Path, job: dict) -> dict:
    """For each model in order "init_ms", "peak_memory_bytes" and "latencies_ms"; and what ran them."""
    if job["cpus"]:
        os.sched_setaffinity(0, job["cpus"])
    # The interpreter's modules are loaded first: their time and memory are Python's.
    module = importlib.import_module(job["module"])
    gc.collect()
    gc.disable()
    sessions = [_Session(module, folder, index, job) for index in range(len(job["models"]))]
    for session in sessions:
        session.answer()
    timed = [s for s in sessions if s.is_timed]
    rounds = range(job["runs"]) if job["mark"] else _counted(job["runs"], folder / "rounds")
    latencies = (_mark_in_turns if job["mark"] else _time_in_turns)(timed, rounds)
    for session, values in zip(timed, latencies):  # noqa: B905 (Python 3.9 on boards)
        session.row["latencies_ms"] = values
    return {"models": [session.row for session in sessions], "version": _version(job["package"])}


class _Session:
    """One file in one interpreter, its first inputs set."""

    def __init__(self, module, folder: Path, index: int, job: dict):
        model = job["models"][index]
        self.stem, self.is_timed = folder / str(index), model["timed"]
        options = {"num_threads": job["threads"]}
        if job["resolver"]:
            options["experimental_op_resolver_type"] = module.OpResolverType[job["resolver"]]
        content = (folder / f"{index}.tflite").read_bytes()
        baseline_bytes = _reset_peak_memory()
        start_ns = time.perf_counter_ns()
        self.interpreter = module.Interpreter(model_content=content, **options)
        self.interpreter.allocate_tensors()
        init_ms = (time.perf_counter_ns() - start_ns) / 1e6
        self.inputs = self.interpreter.get_input_details()
        self.outputs = self.interpreter.get_output_details()
        self.samples = [np.load(f"{self.stem}.in{i}.npy", allow_pickle=False) for i in range(len(self.inputs))]
        self.count = model["samples"]
        self.has_state = model["has_state"]
        self.set_inputs(0)
        for _ in range(job["warmup"] if self.is_timed else 0):
            self.invoke()
        growth_bytes = max(_peak_memory_bytes() - baseline_bytes, 0)
        self.row = {"init_ms": init_ms, "peak_memory_bytes": growth_bytes + len(content), "latencies_ms": []}

    def set_inputs(self, sample: int) -> None:
        for details, values in zip(self.inputs, self.samples):  # noqa: B905
            self.interpreter.set_tensor(details["index"], values[sample])

    def invoke(self) -> None:
        self.interpreter.invoke()

    def answer(self) -> None:
        """Writes the outputs of every sample, then sets the first one again."""
        results: list = [[] for _ in self.outputs]
        for sample in range(self.count):
            if self.has_state:  # a converted LSTM would go on from where the last invocation ended
                self.interpreter.reset_all_variables()
            self.set_inputs(sample)
            self.invoke()
            for values, details in zip(results, self.outputs):  # noqa: B905
                values.append(self.interpreter.get_tensor(details["index"]))
        for index, values in enumerate(results):
            if values:
                np.save(f"{self.stem}.out{index}.npy", np.stack(values))
        self.set_inputs(0)


def _counted(rounds: int, path: Path):
    """The numbers of the rounds; twice a second, between two timed invocations, a file tells how many are done."""
    told_ns = time.perf_counter_ns()
    for number in range(rounds):
        yield number
        if time.perf_counter_ns() - told_ns > 500_000_000:
            path.write_text(str(number + 1), encoding="ascii")
            told_ns = time.perf_counter_ns()


def _time_in_turns(sessions: list, rounds) -> list:
    """Milliseconds per session and round; every round starts with another session."""
    latencies: list = [[] for _ in sessions]
    for first in rounds:
        for offset in range(len(sessions)):
            index = (first + offset) % len(sessions)
            start_ns = time.perf_counter_ns()
            sessions[index].invoke()
            latencies[index].append((time.perf_counter_ns() - start_ns) / 1e6)
    return latencies


def _mark_in_turns(sessions: list, rounds) -> list:
    """The same turns without a clock: two `sched_yield` calls, which a counter of instructions sees, enclose each."""
    for first in rounds:
        for offset in range(len(sessions)):
            invoke = sessions[(first + offset) % len(sessions)].interpreter.invoke
            os.sched_yield()
            invoke()
            os.sched_yield()
    return [[] for _ in sessions]


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


def _version(package: str):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
