"""What the terminal shows at the end of a run: the verdict, one table, and the worst rows of what failed."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobileqat.report import formats
from mobileqat.report.comparison import comparison_rows
from mobileqat.report.results import VARIANTS, failed_steps, file_name, lookup, present_variants

_MOST_PROBLEMS = 5  # of one file; the page has the rest
_STYLES = {"failed": "bold red", "passed": "green"}


def console_summary(results: Mapping[str, Any]) -> RenderableType:
    """The run in one screen; text from the user (layer names, messages) is never read as markup."""
    return Group(*_parts(results))


def _parts(results: Mapping[str, Any]) -> Iterator[RenderableType]:
    for step in failed_steps(results):
        yield Text(f"Failed at step {step['name']}: {step.get('message') or 'no message'}", "bold red")
    headline = lookup(results, "verdict", "headline")
    if headline:
        yield Text(headline, "bold")
    variants = present_variants(results.get("variants"))
    if variants:
        yield _comparison(variants)
    for name, variant in variants.items():
        yield from _failures(name, variant)


def _comparison(variants: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in variants:
        table.add_column(VARIANTS[name], justify="right", no_wrap=True)
    for row in comparison_rows(variants):
        label = Text(f"  {row.label}" if row.is_detail else row.label, "dim" if row.is_detail else "")
        table.add_row(label, *(Text(cell, _STYLES.get(cell, "")) for cell in row.cells))
    return table


def _failures(name: str, variant: Mapping[str, Any]) -> Iterator[RenderableType]:
    file = file_name(name, variant)
    inspection, parity = variant.get("inspection") or {}, variant.get("parity") or {}
    found = inspection.get("problems") if name != "float" else None
    problems = [*(found or []), *(parity.get("problems") or [])]
    for problem in problems[:_MOST_PROBLEMS]:
        yield Text(f"{file}: {problem}", "red")
    if len(problems) > _MOST_PROBLEMS:
        yield Text(f"{file}: {len(problems) - _MOST_PROBLEMS} more problems, all of them in the report", "red")
    failed = [row for row in parity.get("operators") or [] if not row.get("passed")]
    if failed:
        yield _worst_operators(file, sorted(failed, key=lambda row: row["identical"]))


def _worst_operators(file: str, failed: list[dict[str, Any]]) -> Table:
    shown = failed[:_MOST_PROBLEMS]
    more = f", worst {len(shown)} of {len(failed)}" if len(failed) > len(shown) else ""
    title = Text(f"{file}: operators that miss their parity bound{more}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for label in ("Operator", "Kind"):
        table.add_column(label, overflow="fold")
    for label in ("Identical", "required", "Largest difference", "allowed"):
        table.add_column(label, justify="right")
    for row in shown:
        table.add_row(
            Text(row["operator"]),
            Text(row["kind"]),
            formats.exact_percent(row["identical"]),
            formats.exact_percent(row["min_identical"]),
            f"{row['max_lsb']} LSB",
            f"{row['bound_lsb']} LSB",
        )
    return table
