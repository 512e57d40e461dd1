"""The page: one self-contained HTML file from `results` and the template beside this module.

Everything is escaped by Jinja2 except the charts, whose markup `charts.py` builds element by element.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mobileqat.report import formats
from mobileqat.report.charts import class_differences, draw_charts
from mobileqat.report.comparison import comparison_rows, inspection_rows
from mobileqat.report.results import (
    VARIANTS,
    failed_steps,
    file_name,
    last_failed_step,
    lookup,
    number,
    present_variants,
)

_FORMATS = (
    formats.count,
    formats.exact_percent,
    formats.kilobytes,
    formats.percent,
    formats.points,
    formats.seconds,
    formats.significant,
)


def write_html(results: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the page; an earlier one at `path` stays until the new one is complete."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(render_html(results), encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render_html(results: Mapping[str, Any]) -> str:
    """The page as text.  Parts that `results` lacks say which step would have made them."""
    variants = present_variants(results.get("variants"))
    return _template().render(
        results=results,
        variants=variants,
        labels=VARIANTS,
        rows=comparison_rows(variants),
        inspection_rows=inspection_rows(variants),
        samples=max((number(v, "accuracy", "samples") or 0 for v in variants.values()), default=0),
        charts=draw_charts(results),
        class_differences=class_differences(variants),
        operator_counts=_side_by_side(lookup(v, "inspection", "operator_counts") for v in variants.values()),
        dtype_counts=_side_by_side(lookup(v, "inspection", "dtype_counts") for v in variants.values()),
        environment=list(_flat(results.get("environment") or {})),
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True) if results.get("recipe") else "",
        failed_steps=failed_steps(results),
        ended_by=last_failed_step(results),
        file_name=file_name,
        absence=functools.partial(_absence, results),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mobileqat", "report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: _in_page(function) for function in _FORMATS})
    environment.filters["shape"] = _shape
    return environment.get_template("report.html.j2")


def _in_page(function: Any) -> Any:
    """A format that takes what the template does not find for a missing number, and keeps units with numbers."""

    def formatted(value: Any) -> str:
        return function(None if isinstance(value, jinja2.Undefined) else value).replace(" ", "\N{NO-BREAK SPACE}")

    return formatted


def _shape(shape: Any) -> str:
    if not isinstance(shape, list | tuple):
        return formats.MISSING
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape)) or "scalar"


def _side_by_side(counts: Iterable[Mapping[str, int] | None]) -> dict[str, list[int]]:
    """{kind: count in each variant}, the most frequent kind first."""
    columns = [column or {} for column in counts]
    kinds = dict.fromkeys(kind for column in columns for kind in column)
    table = {kind: [column.get(kind, 0) for column in columns] for kind in kinds}
    return dict(sorted(table.items(), key=lambda row: (-max(row[1]), row[0])))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as rows: {"machine": {"cores": 2}} -> ("machine: cores", 2)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", value


def _absence(results: Mapping[str, Any], step_name: str) -> str:
    """Why what a step makes is not there."""
    steps = {step.get("name"): step for step in results.get("steps") or []}
    step, ended_by = steps.get(step_name), last_failed_step(results)
    if step and step.get("status") in ("failed", "skipped"):
        message = (step.get("message") or "").rstrip(".")
        return f"Not available: step {step_name} {step['status']}{': ' if message else ''}{message}."
    if not step and ended_by:
        return f"Not available: the run ended at step {ended_by['name']}."
    return "Not part of this run."
