"""The rows of the table that puts float, PTQ and QAT side by side, for the console and for the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mobileqat.report import formats
from mobileqat.report.results import (
    Place,
    accuracy,
    cost,
    cost_places,
    cost_ratio,
    cost_records,
    difference_points,
    lookup,
    number,
    present_variants,
    ratio,
)

Variant = Mapping[str, Any]
Quantity = tuple[str, Callable[[Variant], str], bool]  # label, cell of a variant, whether it is a detail


@dataclass(frozen=True)
class Row:
    """One quantity of every variant.

    Attributes:
        cells: one per present variant, with units.
        is_detail: whether the row refines the one above it.
    """

    label: str
    cells: tuple[str, ...]
    is_detail: bool = False


def comparison_rows(variants: Mapping[str, Variant] | None) -> list[Row]:
    """The rows that have at least one value."""
    columns = present_variants(variants)
    return _rows(columns, _quantities(columns))


def inspection_rows(variants: Mapping[str, Variant] | None) -> list[Row]:
    """What inspection found in each file."""
    return _rows(present_variants(variants), _findings())


def _rows(columns: Mapping[str, Variant], quantities: Iterable[Quantity]) -> list[Row]:
    rows = [
        Row(label, tuple(cell(variant) for variant in columns.values()), is_detail)
        for label, cell, is_detail in quantities
    ]
    return [row for row in rows if set(row.cells) != {formats.MISSING}]


def _quantities(columns: Mapping[str, Variant]) -> Iterator[Quantity]:
    reference = columns.get("float", {})
    others = {name for name, variant in columns.items() if variant is not reference}

    def beside_float(quantity: Callable[[Variant], str]) -> Callable[[Variant], str]:
        return lambda variant: quantity(variant) if variant is not reference else formats.MISSING

    yield "Accuracy, interpreter", lambda v: formats.percent(accuracy(v)), False
    yield "simulation", lambda v: formats.percent(number(v, "accuracy", "simulation")), True
    if others:
        points = beside_float(lambda v: formats.points(difference_points(accuracy(v), accuracy(reference))))
        yield "difference to float, points", points, True
        agreement = beside_float(lambda v: formats.percent(number(v, "agreement_with_float")))
        yield "same class as float", agreement, True
    yield "Size", lambda v: formats.kilobytes(number(v, "size_bytes")), False
    size = number(reference, "size_bytes")
    yield "ratio to float", lambda v: formats.factor(ratio(number(v, "size_bytes"), size)), True
    for place, unit in cost_places(columns).items():
        yield from _cost_quantities(place, unit, reference)
    yield "Fully integer", _fully_integer, False
    yield "Parity with the simulation", _parity, False


COST_LABELS = {"ms": "Latency", "instructions": "Instructions", "cycles": "Cycles, estimated"}


def _cost_quantities(place: Place, unit: str, reference: Variant) -> Iterator[Quantity]:
    write = formats.COSTS.get(unit, formats.significant)

    def detail(*path: str) -> Callable[[Variant], float | None]:
        return lambda variant: number(cost_records(variant).get(place), *path)

    memory, delegated, identical = (
        detail("peak_memory_bytes"),
        detail("delegate", "share"),
        detail("agreement", "identical"),
    )
    yield f"{COST_LABELS.get(unit, unit)}, {formats.place(*place)}", lambda v: write(cost(v, place)), False
    if unit == "ms":
        yield "90th percentile", lambda v: write(cost(v, place, "p90")), True
    yield "ratio to float", lambda v: formats.factor(cost_ratio(v, reference, place)), True
    yield "peak memory", lambda v: formats.megabytes(memory(v)), True
    yield "operators on the delegate", lambda v: formats.exact_percent(delegated(v)), True
    yield "outputs identical to this machine's", lambda v: formats.exact_percent(identical(v)), True


def _fully_integer(variant: Variant) -> str:
    if excluded := lookup(variant, "inspection", "excluded"):
        return f"{len(excluded)} excluded"
    return {True: "yes", False: "no"}.get(lookup(variant, "inspection", "fully_integer"), formats.MISSING)


def _parity(variant: Variant) -> str:
    return {True: "passed", False: "failed"}.get(lookup(variant, "parity", "passed"), formats.MISSING)


def _findings() -> Iterator[Quantity]:
    yield "Fully integer", _fully_integer, False
    yield "Constants", lambda v: formats.kilobytes(number(v, "inspection", "weight_bytes")), False
    for label, key in (
        ("Operators outside integer arithmetic", "islands"),
        ("Conversions from or to float inside the graph", "stray_conversions"),
        ("Requantizations", "requantizations"),
        ("Operators that compute shapes", "shape_arithmetic"),
    ):
        yield label, _length_of(key), False


def _length_of(key: str) -> Callable[[Variant], str]:
    def cell(variant: Variant) -> str:
        found = lookup(variant, "inspection", key)
        return formats.MISSING if found is None else str(len(found))

    return cell
