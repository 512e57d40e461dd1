"""The table that `benchmark_model` prints with one row per operator, as text or as CSV.

A row's average is printed beside its share of all operators' time, and that time stands below the table, so every
average is there twice: `avg * calls = share * total`, as exactly as three decimals (or six digits in CSV) allow.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mobileqat.bench.record import OperatorCost
from mobileqat.errors import DeviceError

_INITIALIZATION = "Profiling Info for Benchmark Initialization:"
_NUMBERS = ("avg ms", "%", "cdf%", "times called")
_RUNS = "Operator-wise Profiling Info for Regular Benchmark Runs:"
_TOTAL = re.compile(
    r"Timings \(microseconds\): count=(\d+)(?: first=\d+)? curr=(\d+)(?:.* avg=(\d+(?:\.\d+)?(?:e\+?\d+)?) .*)?"
)


@dataclass(frozen=True)
class _Row:
    kind: str
    name: str
    avg_ms: float
    percent: float
    cumulative_percent: float
    calls: int


def parse_profile(text: str) -> tuple[OperatorCost, ...]:
    """The operators of the timed runs in their order, from the program's output or from its CSV file.

    Costs are milliseconds per inference.  A delegate appears as one row per kernel, or with the rows that it reports
    itself; where a model has several subgraphs, the first one's table is read.

    Raises:
        DeviceError: there is no table, it is cut off, or its rows contradict each other.
    """
    lines = _section(text.replace("\r", "").split("\n")[:-1])
    header = next((index for index, line in enumerate(lines) if _is_header(line)), None)
    if header is None:
        raise DeviceError("benchmark_model printed no table of operators.")
    rows = _rows(lines[header:])
    count, total_ms = _total(lines[header:], len(rows))
    if not any(row.calls for row in rows):
        # Builds of 2018 and 2019 print no calls, and shares of all runs' time together.
        return _costs([dataclasses.replace(row, calls=1) for row in rows], total_ms * count)
    return _costs(rows, total_ms)


def _section(lines: Sequence[str]) -> Sequence[str]:
    for index, line in enumerate(lines):
        if line.strip().endswith(_RUNS):
            return lines[index + 1 :]
    if any(line.strip().endswith(_INITIALIZATION) for line in lines):
        raise DeviceError("The table of operators is cut off.")
    return lines


def _is_header(line: str) -> bool:
    return {"node type", "name"} <= set(_columns(line))


def _columns(line: str) -> list[str]:
    """Names of a header's columns in one spelling: "[avg ms]" and "avg_ms" are the same."""
    cells = line.strip().split("\t" if "\t" in line.strip() else ",")
    return [cell.strip(" []").replace("_", " ").lower() for cell in cells]


def _rows(lines: Sequence[str]) -> list[_Row]:
    columns, separator = _columns(lines[0]), "\t" if "\t" in lines[0].strip() else ","
    table: list[_Row] = []
    for line in lines[1:]:
        if not line.strip():
            return table
        # XNNPACK's kinds have commas, which the CSV does not protect; in names they are replaced.
        cells = dict(zip(columns, line.lstrip("\t").rsplit(separator, len(columns) - 1), strict=False))
        try:
            numbers = [float(cells[column].strip().rstrip("%")) for column in _NUMBERS]
        except (KeyError, ValueError):
            numbers = [math.nan]
        if len(cells) != len(columns) or not all(map(math.isfinite, numbers)):
            raise DeviceError(f"A row of the table of operators is garbled: {line.strip()[:200]}")
        avg, percent, cumulative, calls = numbers
        table.append(_Row(cells["node type"].strip(), _name(cells["name"]), avg, percent, cumulative, int(calls)))
    raise DeviceError("The table of operators is cut off.")


def _name(text: str) -> str:
    """The output tensor: "[conv/Relu6]:3" without its brackets and its place in the graph."""
    match = re.fullmatch(r"\[(.*)\](?::\w+)?", text.strip())
    return match[1] if match else text.strip()


def _total(lines: Iterable[str], count: int) -> tuple[int, float]:
    """Runs, and milliseconds of all operators in one of them; the table must have as many rows as nodes ran."""
    runs, total_us = 0, 0.0
    for line in lines:
        match = re.fullmatch(r"(\d+) nodes observed", line.strip())
        if match and runs and int(match[1]) == count:
            return runs, total_us / 1e3
        if match:
            raise DeviceError(f"The table of operators has {count} rows for {match[1]} nodes.")
        match = _TOTAL.fullmatch(line.strip())
        if match:
            runs, total_us = int(match[1]), float(match[3] or match[2])
    raise DeviceError("The end of the table of operators is missing.")


def _costs(rows: Sequence[_Row], total_ms: float) -> tuple[OperatorCost, ...]:
    cumulative = 0.0
    for row in rows:
        shared_ms = row.percent / 100 * total_ms
        rounding_ms = 0.0006 * row.calls + 2e-5 * total_ms
        if row.calls and abs(row.avg_ms * row.calls - shared_ms) > rounding_ms:
            raise DeviceError(f"The time of '{row.name[:80]}' does not fit its share in the table of operators.")
        if abs(cumulative + row.percent - row.cumulative_percent) > 0.0021:
            raise DeviceError(f"The shares in the table of operators do not add up at '{row.name[:80]}'.")
        cumulative = row.cumulative_percent
    # Zero calls are less than one per run; what there was is in the share.
    return tuple(
        OperatorCost(row.name, row.kind, row.avg_ms * row.calls or row.percent / 100 * total_ms, row.calls)
        for row in rows
    )
