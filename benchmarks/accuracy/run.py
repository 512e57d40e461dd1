"""Accuracy of float, PTQ and QAT in the interpreter, on whole test sets, beside TFMOT and TFLiteConverter.

    MOBILEQAT_DATA=FOLDER python benchmarks/accuracy/run.py            # goes on where a run before it was stopped
    python benchmarks/accuracy/run.py --only 'fsdd/w8a8/*'             # TASK/WHAT/SEED, see tasks.py
    python benchmarks/accuracy/run.py --quick --runs FOLDER            # every cell on a few samples: does it work?

A cell that is done is not done again unless its recipe or its float model changed.  Results: results/TASK.json and
results/results.md beside this file.  So that runs on several days and machines start from the same weights, the float
models that are trained here are kept, too: models/TASK.keras.  All else is in the folder of runs; with --quick
results and float models as well.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import table  # noqa: E402
from tasks import Cell, cells, fingerprint, trains_float  # noqa: E402

from mobileqat.bench.host import describe_machine  # noqa: E402
from mobileqat.errors import RecipeError  # noqa: E402

RUNS = Path(os.environ.get("MOBILEQAT_CACHE") or Path.home() / ".cache" / "mobileqat") / "accuracy"
# What a cell ended with that is not tried again; a failure or a crash of ours is.
FINAL = ("done", "refused")
PEERS = ("converter", "converter-w8a16", "tfmot", "mlperf")


def main(arguments: list[str] | None = None) -> int:
    options = parse(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    settings = options.parse_args(arguments)
    return run(list(cells(settings.seeds)), settings, "", table.accuracy_table)


def parse(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--only", action="append", metavar="TASK/WHAT/SEED", help="these cells alone; * matches any")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the cells that have several")
    parser.add_argument("--quick", action="store_true", help="a few samples and single epochs: shows that it works")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where models and logs go")
    parser.add_argument("--timeout", type=float, default=3 * 3600, help="seconds that one cell may take")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table anew")
    return parser


def run(
    wanted: list[Cell], settings: argparse.Namespace, prefix: str, make_table: Callable[[dict[str, dict]], str]
) -> int:
    """Runs the cells that are not done, writing results after each; returns how many failed."""
    runs = settings.runs / ("quick" if settings.quick else "full")
    results = Results(runs / "results" if settings.quick else HERE / "results", prefix)
    chosen = [] if settings.table else select(wanted, settings.only)
    failures = 0
    for number, cell in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {cell.name}: ", end="", flush=True)
        record = outcome(cell, runs, results, settings)
        print(f"{record['status']} {record.get('reason', '')}".rstrip(), flush=True)
        failures += record["status"] not in FINAL
        results.write_table(make_table)
    results.write_table(make_table)
    return failures


def select(wanted: Iterable[Cell], patterns: list[str] | None) -> list[Cell]:
    """The cells that match, with the float cells that they start from."""
    wanted = list(wanted)
    if not patterns:
        return wanted
    chosen = [cell for cell in wanted if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)]
    if not chosen:
        raise SystemExit(f"no cell matches {', '.join(patterns)}; there are: {' '.join(c.name for c in wanted)}")
    tasks = {cell.task for cell in chosen}
    return [cell for cell in wanted if cell in chosen or (cell.what == "float" and cell.task in tasks)]


def outcome(cell: Cell, runs: Path, results: Results, settings: argparse.Namespace) -> dict:
    """What a cell ended with, now or in a run before."""
    weights = float_model(cell, runs, settings.quick)
    start = None if cell.what == "float" else (results.find(Cell(cell.task, "float", 0)) or {}).get("weights")
    try:
        mark = fingerprint(cell, settings.quick, start)
    except RecipeError as error:
        # A scheme that this version does not have; not final, so that it is run once it is there.
        reason = f"not in this version: {str(error).partition(', expected')[0]}"
        record = {"status": "failed", "reason": reason, "fingerprint": None}
        results.keep(cell, record)
        return record
    known = results.find(cell)
    has_model = cell.what != "float" or weights.is_file()
    if known and known["status"] in FINAL and known["fingerprint"] == mark and has_model:
        return known | {"reason": "before"}
    if cell.what != "float" and not weights.is_file():
        record = {"status": "failed", "reason": "there is no float model"}
    else:
        record = in_child(cell, runs / cell.task / cell.what / str(cell.seed), weights, settings)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record |= {"fingerprint": mark, "date": now, "machine": describe_machine(), "packages": packages()}
    results.keep(cell, record)
    return record


def float_model(cell: Cell, runs: Path, quick: bool) -> Path:
    """Where the float model is that a task's cells start from. Files of others are not kept with the results."""
    is_kept = not quick and trains_float(cell)
    return HERE / "models" / f"{cell.task}.keras" if is_kept else runs / cell.task / "float.keras"


def in_child(cell: Cell, folder: Path, weights: Path, settings: argparse.Namespace) -> dict:
    """Runs one cell in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(HERE), os.environ.get("PYTHONPATH"))))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mobileqat-") as name:
        job, result = Path(name) / "job.json", Path(name) / "result.json"
        paths = {"folder": folder, "float": weights, "result": result}
        given = {"cell": asdict(cell), "quick": settings.quick, **{key: str(path) for key, path in paths.items()}}
        job.write_text(json.dumps(given))
        with (folder / "log.txt").open("wb") as log:
            command = [sys.executable, str(HERE / "cell.py"), str(job)]
            try:
                code = subprocess.run(
                    command, env=environment, stdout=log, stderr=log, timeout=settings.timeout, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                return {"status": "failed", "reason": f"not done after {settings.timeout:.0f} s"}
        if result.is_file():
            return json.loads(result.read_text())
    # A peer that dies in native code has had its chance: dying is its result.
    status = "refused" if code < 0 and cell.what in PEERS and code != -signal.SIGKILL else "failed"
    return {"status": status, "reason": ending(code, folder / "log.txt"), "seconds": time.perf_counter() - started}


def ending(code: int, log: Path) -> str:
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return " ".join(lines[-1:])[:300] or f"exit code {code}"


class Results:
    """One JSON file per task: its cells by `WHAT/SEED`. Those of an ablation are in files of their own, by a prefix of
    their names; the float models, which all share, are in the files without one."""

    def __init__(self, folder: Path, prefix: str):
        self.folder = folder
        self.prefix = prefix

    def path(self, task: str, what: str = "") -> Path:
        return self.folder / f"{'' if what == 'float' else self.prefix}{task}.json"

    def read(self, task: str) -> dict:
        floats = read_json(self.path(task, "float"))
        return {key: cell for key, cell in floats.items() if key.startswith("float/")} | read_json(self.path(task))

    def find(self, cell: Cell) -> dict | None:
        return self.read(cell.task).get(cell.key)

    def keep(self, cell: Cell, record: dict) -> None:
        path = self.path(cell.task, cell.what)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(read_json(path) | {cell.key: record}, indent=1) + "\n")

    def write_table(self, make_table: Callable[[dict[str, dict]], str]) -> None:
        tasks = {task: self.read(task) for task in table.TASKS if self.path(task).is_file()}
        if tasks:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{self.prefix or 'results'}.md".replace("_.md", ".md"), make_table(tasks))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_whole(path: Path, text: str) -> None:
    """A run that is killed leaves the file before or after, never half of it."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


@cache
def packages() -> dict[str, str]:
    from importlib import metadata

    names = ("mobileqat", "tensorflow", "keras", "ai-edge-litert", "numpy", "tf-keras", "tensorflow-model-optimization")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
