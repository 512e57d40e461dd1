"""Console tables of what was measured."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from mobileqat.bench.record import Agreement, Check, Comparison, OperatorCost, Record
from mobileqat.report import formats

_DESCRIBED = {
    "name": "{}",
    "cpu": "{}",
    "soc": "SoC {}",
    "abi": "{}",
    "system": "{}",
    "cores": "{} cores",
    "governor": "governor {}",
    "temperature_c": "temperature {0[0]} to {0[1]} C",
    "battery_percent": "battery {0[0]} to {0[1]} %",
}
_UNITS = {"ms": "", "instructions": " Instructions, no time.", "cycles": " Cycles as the compiler estimates them."}


def print_comparison(comparison: Comparison, compare: bool) -> None:
    """Files side by side; operators below, each file's own or, with `compare`, against the first file's."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_files(comparison))
    name, first = next(iter(comparison.records.items()))
    console.print(_how(first), markup=False)
    for other, record in comparison.records.items():
        if record.details:
            details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in record.details.items())
            console.print(f"{other}: {details}", markup=False)
    for warning in first.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for other, record in comparison.records.items():
        if compare and other != name:
            console.print(f"\n{other} against {name}, operator by operator:", markup=False)
            console.print(_differences(first, record))
        elif record.profile and not compare:
            console.print(f"\n{other}, operator by operator:", markup=False)
            console.print(_profile(record))


def print_agreements(agreements: Mapping[str, Agreement]) -> None:
    """Outputs on targets against this machine's."""
    table = _table("target", "samples", "identical", "largest", "top-1 agreement")
    for target, row in agreements.items():
        shares = [formats.exact_percent(share) for share in (row.identical, row.top1_agreement)]
        table.add_row(target, str(row.samples), shares[0], f"{row.max_lsb:g} LSB", shares[1])
    Console(highlight=False, soft_wrap=True).print(table)


def print_checks(checks: Mapping[str, Sequence[Check]]) -> None:
    """What targets need, and what is missing."""
    console = Console(highlight=False, soft_wrap=True)
    for target, rows in checks.items():
        is_ready = all(row.found is not None or not row.is_needed for row in rows)
        console.print(f"{target}: {'[green]ready[/]' if is_ready else '[red]not ready[/]'}")
        for row in rows:
            missing = "missing" if row.is_needed else "not there, not needed"
            state = row.found or ". ".join(filter(None, (missing, row.fix)))
            console.print(f"  {row.what}: {state}", markup=False)


def _table(*columns: str) -> Table:
    """The first column gives way where the terminal is narrow; numbers stay whole."""
    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, no_wrap=True)
    return table


def _files(comparison: Comparison) -> Table:
    first = next(iter(comparison.records.values()))
    write, extra = formats.COSTS[first.unit], _extra_columns(comparison)
    statistics = ("median", "p90", "min") if first.unit == "ms" else ("median",)
    table = _table("file", *statistics, "size", "ratio (range)", *extra)
    table.padding = (0, 1, 0, 0)  # room for a file's name in 80 columns
    for name, shown in _short_names(comparison.records).items():
        record, ratio = comparison.records[name], comparison.ratios[name]
        costs = [write(getattr(record.cost, statistic)) for statistic in statistics]
        spread = f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"
        cells = [cell(record) for cell in extra.values()]
        table.add_row(shown, *costs, formats.kilobytes(record.size_bytes), spread, *cells)
    return table


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Paths without the folder that all of them lie in."""
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if all(map(os.path.dirname, paths)) else ""
    return {path: os.path.relpath(path, folder) if folder else path for path in paths}


def _extra_columns(comparison: Comparison) -> dict:
    """Columns that only some targets have."""
    columns: dict[str, Callable[[Record], str]] = {
        "init": lambda r: formats.milliseconds(r.init_ms),
        "peak memory": lambda r: formats.megabytes(r.peak_memory_bytes),
        "delegated": lambda r: f"{r.delegate.operators} of {r.delegate.of}" if r.delegate else formats.MISSING,
        "outputs as here": lambda r: formats.exact_percent(r.agreement.identical if r.agreement else None),
    }
    records = comparison.records.values()
    return {name: cell for name, cell in columns.items() if any(cell(r) != formats.MISSING for r in records)}


def _how(record: Record) -> str:
    device = ", ".join(text.format(record.device[key]) for key, text in _DESCRIBED.items() if record.device.get(key))
    counts = f"{record.warmup} warm-up and {record.runs} timed runs each" if record.runs > 1 else "one estimate each"
    threads = f"{record.threads} thread{'' if record.threads == 1 else 's'}"
    where = f" on {device}" if device else ""
    runtime = f"{record.runtime} {record.runtime_version}"
    return f"{record.target}: {runtime}, {threads}, {counts}{where}.{_UNITS[record.unit]}"


def _profile(record: Record) -> Table:
    write, total = formats.COSTS[record.unit], sum(row.cost for row in record.profile) or 1
    table = _table("operator", "kind", "cost", "share")
    for row in record.profile:
        table.add_row(row.name, row.kind, write(row.cost), f"{row.cost / total:.1%}")
    return table


def _differences(first: Record, other: Record) -> Table:
    write = formats.COSTS[first.unit]
    table = _table("operator", "kind", "first", "this", "difference")
    for a, b in align(first.profile, other.profile):
        costs = [write(row.cost) if row else formats.MISSING for row in (a, b)]
        difference = (b.cost if b else 0) - (a.cost if a else 0)
        shown = b or a
        assert shown is not None  # a pair has one of them
        table.add_row(shown.name, shown.kind, *costs, ("+" if difference > 0 else "") + write(difference))
    return table


def align(
    first: Sequence[OperatorCost], other: Sequence[OperatorCost]
) -> Iterator[tuple[OperatorCost | None, OperatorCost | None]]:
    """Pairs of operators of two files, in order, by the longest common runs of kinds; None where one has no match."""
    matcher = difflib.SequenceMatcher(None, [row.kind for row in first], [row.kind for row in other], autojunk=False)
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(first[a:a_end], other[b:b_end], strict=True)
        else:
            yield from ((row, None) for row in first[a:a_end])
            yield from ((None, row) for row in other[b:b_end])
