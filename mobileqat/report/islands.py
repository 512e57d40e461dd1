"""What stays in float, why, and what it costs: conversions at its borders and the time of its operators."""

from collections.abc import Mapping
from typing import Any

from mobileqat.report import formats
from mobileqat.report.charts import Table
from mobileqat.report.layer_charts import operator_costs
from mobileqat.report.results import lookup


def excluded_table(results: Mapping[str, Any]) -> Table | None:
    """The operators that stay in float, or None where none does."""
    operators = lookup(results, "islands", "operators") or []
    if not operators:
        return None
    costs = _costs(results)
    rows = [
        (
            row["operator"],
            row["kind"],
            f"exclude: {row['pattern']}" if row.get("pattern") else "follows what it reads",
            _time(_cost_of(costs, row["output"])),
        )
        for row in operators
    ]
    return Table(("Operator", "Kind", "Why", "Time in the integer file"), tuple(rows))


def border_table(results: Mapping[str, Any]) -> Table | None:
    """The conversions where islands meet integers, or None without any."""
    borders = lookup(results, "islands", "borders") or []
    if not borders:
        return None
    rows = [
        (
            row["tensor"],
            row["conversion"],
            row["made_by"],
            ", ".join(row["read_by"]) or "the output",
            formats.count(row.get("values")),
        )
        for row in borders
    ]
    return Table(("Tensor", "Conversion", "Made by", "Read by", "Values per sample"), tuple(rows))


def cost_sentence(results: Mapping[str, Any]) -> str:
    """What all islands cost together, or "" where there is none or nothing was measured."""
    operators, costs = lookup(results, "islands", "operators") or [], _costs(results)
    if not operators or not costs:
        return ""
    conversions = sum(row["cost"] for row in costs.values() if row["kind"] in ("QUANTIZE", "DEQUANTIZE"))
    in_float = sum(filter(None, (_cost_of(costs, row["output"]) for row in operators)))
    total = sum(row["cost"] for row in costs.values())
    return (
        f"Of {_time(total)} in operators measured one by one, those in float take {_time(in_float)} and conversions "
        f"{_time(conversions)}."
    )


def _costs(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the last integer file's operators, by output tensor."""
    profiles = {name: rows for name, rows in operator_costs(results).items() if name != "float"}
    return {row["name"]: row for row in list(profiles.values())[-1]} if profiles else {}


def _cost_of(costs: Mapping[str, Mapping[str, Any]], output: str) -> float | None:
    """A float tensor beside an integer one of the same name has a suffix."""
    found = costs.get(f"{output}/float32") or costs.get(output)
    return found["cost"] if found else None


def _time(milliseconds: float | None) -> str:
    return formats.MISSING if milliseconds is None else f"{1e3 * milliseconds:,.2f} µs"
