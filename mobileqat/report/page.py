"""The page: one self-contained HTML file from `results` and the template beside this module.

Everything is escaped by Jinja2 except the charts, whose markup `charts.py` builds element by element.
"""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mobileqat.report import formats
from mobileqat.report.charts import Chart, draw_charts
from mobileqat.report.comparison import comparison_rows, inspection_rows
from mobileqat.report.graph import draw_graph
from mobileqat.report.islands import border_table, cost_sentence, excluded_table
from mobileqat.report.layer_charts import draw_layer_charts
from mobileqat.report.results import (
    VARIANTS,
    failed_steps,
    file_name,
    last_failed_step,
    lookup,
    number,
    present_variants,
)
from mobileqat.report.runs import comparison_table, difference_table, draw_comparison, run_table

# Which section shows a chart; the tradeoff stands beside the verdict's table, others under "charts".
_SECTIONS = {
    "training-qat": "training",
    "training-float": "training",
    "ranges": "training",
    "noise": "layers",
    "weights": "layers",
    "outputs": "layers",
}
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
    return write_text(path, render_html(results))


def write_comparison(comparison: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the page that shows the result of `compare`, likewise."""
    return write_text(path, render_comparison(comparison))


def write_text(path: str | Path, text: str) -> Path:
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The page of several runs as text."""
    return template("runs.html.j2").render(
        comparison=comparison,
        table=comparison_table(comparison),
        differences=difference_table(comparison),
        runs=run_table(comparison),
        chart=draw_comparison(comparison),
    )


def render_html(results: Mapping[str, Any]) -> str:
    """The page as text.  Parts that `results` lacks say which step would have made them."""
    variants = present_variants(results.get("variants"))
    charts = {chart.name: chart for chart in (*draw_charts(results), *draw_layer_charts(results))}
    return template("report.html.j2").render(
        results=results,
        variants=variants,
        labels=VARIANTS,
        rows=comparison_rows(variants),
        inspection_rows=inspection_rows(variants),
        samples=max((number(v, "accuracy", "samples") or 0 for v in variants.values()), default=0),
        tradeoff=charts.pop("tradeoff", None),
        columns=_columns(charts.values()),
        graph=draw_graph(results),
        excluded=excluded_table(results),
        borders=border_table(results),
        island_costs=cost_sentence(results),
        operator_counts=_side_by_side(lookup(v, "inspection", "operator_counts") for v in variants.values()),
        dtype_counts=_side_by_side(lookup(v, "inspection", "dtype_counts") for v in variants.values()),
        environment=list(flat(results.get("environment") or {})),
        recipe=recipe_text(results),
        failed_steps=failed_steps(results),
        ended_by=last_failed_step(results),
        file_name=file_name,
        absence=functools.partial(_absence, results),
    )


def _columns(charts: Iterable[Chart]) -> dict[str, list[list[Chart]]]:
    """The charts of each section in two columns of about the same height, whatever is unfolded later."""
    columns: dict[str, list[list[Chart]]] = {}
    heights: dict[str, list[float]] = {}
    for chart in charts:
        section = _SECTIONS.get(chart.name, "charts")
        column = heights.setdefault(section, [0.0, 0.0])
        shorter = column.index(min(column))
        column[shorter] += chart.height + 90  # title, caption, margins
        columns.setdefault(section, [[], []])[shorter].append(chart)
    return columns


@functools.cache
def template(name: str, autoescape: bool = True) -> jinja2.Template:
    """A template beside this module, with the formats as filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mobileqat", "report"),
        autoescape=autoescape,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: _in_page(function) for function in _FORMATS})
    environment.filters["shape"] = _shape
    environment.filters["text"] = markdown_text
    return environment.get_template(name)


def _in_page(function: Any) -> Any:
    """A format that takes what the template does not find for a missing number, and keeps units with numbers."""

    def formatted(value: Any) -> str:
        return function(None if isinstance(value, jinja2.Undefined) else value).replace(" ", "\N{NO-BREAK SPACE}")

    return formatted


def markdown_text(value: Any) -> str:
    """One line of plain text in Markdown, also in a table's cell."""
    text = "".join(character if character.isprintable() else " " for character in f"{value}")
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


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


def recipe_text(results: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML, "" where it is not recorded."""
    recipe = results.get("recipe")
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as rows: {"machine": {"cores": 2}} -> ("machine: cores", 2)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}: ")
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
