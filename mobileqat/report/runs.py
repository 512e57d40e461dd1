"""Several runs side by side: those of one recipe that differ in nothing but the seed are one row, by mean and range."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from mobileqat.report import formats
from mobileqat.report.charts import COLOURS, MARKERS, Chart, Table, canvas, chart_style, drawn, label_rows, shortened
from mobileqat.report.comparison import COST_LABELS
from mobileqat.report.results import (
    VARIANTS,
    accuracy,
    cost,
    cost_places,
    cost_ratio,
    difference_points,
    file_name,
    lookup,
    number,
    present_variants,
)

Results = Mapping[str, Any]
_NUMBER_WIDTH = 12  # characters of a console's column that are not broken
_RUNS_NAMED = 4  # of a recipe, in a heading


def compare(runs: Mapping[str, Results]) -> dict[str, Any]:
    """Groups runs by recipe.

    Args:
        runs: path of a run -> content of its report.json.

    Returns:
        JSON-able: "headline"; "notes", sentences on what limits the comparison; "differences" between recipes of one
        name, `{"key", "values": {label: value}}`; "groups", each with "label", "recipe",
        "runs" (`{"run", "seed", "headline"}`) and "variants": for each one "file", "runs" (how many have it), "parity"
        (how many passed, None without a check), and summaries `{"values", "mean", "min", "max"}` or None: "accuracy",
        "points" (against the float file of the same run), "size_bytes", and by place "cost" and "ratio_to_float".
    """
    by_recipe: dict[str, dict[str, Results]] = {}
    for path, results in runs.items():
        by_recipe.setdefault(_identity(results), {})[path] = results
    firsts = [next(iter(members.values())) for members in by_recipe.values()]
    labels = _labels([str(results.get("name") or "run") for results in firsts])
    groups = [_group(label, members) for label, members in zip(labels, by_recipe.values(), strict=True)]
    return {
        "headline": _headline(groups),
        "notes": list(_notes(runs)),
        "differences": list(_differences({group["label"]: group["recipe"] for group in groups})),
        "groups": groups,
    }


def _identity(results: Results) -> str:
    recipe = {key: value for key, value in (results.get("recipe") or {}).items() if key != "seed"}
    return json.dumps([results.get("name"), recipe], sort_keys=True)


def _labels(names: Sequence[str]) -> list[str]:
    """Names of recipes, numbered where several have one name."""
    taken = Counter[str]()
    labels = []
    for name in names:
        taken[name] += 1
        labels.append(f"{name} #{taken[name]}" if names.count(name) > 1 else name)
    return labels


def _differences(recipes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The keys in which recipes differ, in the order of the recipe."""
    flat = {label: dict(_flat(recipe)) for label, recipe in recipes.items()}
    for key in dict.fromkeys(key for recipe in flat.values() for key in recipe):
        values = {label: recipe.get(key) for label, recipe in flat.items()}
        if key not in ("name", "description") and len({json.dumps(value) for value in values.values()}) > 1:
            yield {"key": key, "values": values}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _group(label: str, members: Mapping[str, Results]) -> dict[str, Any]:
    variants = [present_variants(results.get("variants")) for results in members.values()]
    names = [name for name in VARIANTS if any(name in found for found in variants)]
    runs = [
        {"run": path, "seed": lookup(results, "recipe", "seed"), "headline": lookup(results, "verdict", "headline")}
        for path, results in members.items()
    ]
    first = next(iter(members.values()))
    recipe = {key: value for key, value in (first.get("recipe") or {}).items() if key != "seed"}
    return {"label": label, "recipe": recipe, "runs": runs, "variants": {n: _variant(n, variants) for n in names}}


def _variant(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One variant over the runs of a group that have it."""
    found = [(run[name], run.get("float")) for run in runs if name in run]
    places = {place: None for variant, _ in found for place in cost_places({name: variant})}
    checked = [passed for variant, _ in found if (passed := lookup(variant, "parity", "passed")) is not None]
    points = [difference_points(accuracy(variant), accuracy(beside)) for variant, beside in found]
    return {
        "file": file_name(name, found[0][0]),
        "runs": len(found),
        "parity": sum(checked) if checked else None,
        "accuracy": _summary([accuracy(variant) for variant, _ in found]),
        "points": _summary(points) if name != "float" else None,
        "size_bytes": _summary([number(variant, "size_bytes") for variant, _ in found]),
        "places": [
            {
                "place": formats.place(*place),
                "unit": next(unit for variant, _ in found if (unit := cost_places({name: variant}).get(place))),
                "cost": _summary([cost(variant, place) for variant, _ in found]),
                "ratio_to_float": _summary([cost_ratio(variant, beside, place) for variant, beside in found]),
            }
            for place in places
        ],
    }


def _summary(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"values": known, "mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def _headline(groups: Sequence[Mapping[str, Any]]) -> str:
    """The best mean of integer files that match their simulation in every run."""
    able = [
        (variant["accuracy"]["mean"], group, name, variant)
        for group in groups
        for name, variant in group["variants"].items()
        if name != "float" and variant["accuracy"] and variant["parity"] in (None, variant["runs"])
    ]
    if not able:
        return "No integer file was evaluated and matches its simulation in every run."
    _, group, name, variant = max(able, key=lambda row: row[0])
    beside = variant["points"]
    against = f", {formats.points(beside['mean'])} points against float" if beside else ""
    return (
        f"{VARIANTS[name]} of {group['label']} is the most accurate: {_over(variant['accuracy'], formats.percent)}"
        f"{against}, over {_count(variant['runs'], 'run')}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _over(summary: Mapping[str, Any] | None, write: Callable[[float | None], str]) -> str:
    """ "87.15 % (87.09 % to 87.20 %)", without the range where all are equal."""
    if summary is None:
        return formats.MISSING
    mean, low, high = (write(summary[key]) for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _notes(runs: Mapping[str, Results]) -> Iterator[str]:
    def all_of(*path: str) -> list[Any]:
        return list(dict.fromkeys(found for results in runs.values() if (found := lookup(results, *path)) is not None))

    machines, versions = all_of("environment", "machine", "cpu"), all_of("mobileqat")
    if len(machines) > 1:
        yield f"Latencies are from different machines: {', '.join(machines)}."
    if len(all_of("data", "source")) > 1 or len(all_of("data", "test")) > 1:
        yield "Accuracies are of different test sets and cannot be compared."
    if len(versions) > 1:
        yield f"Runs are of different versions of mobileqat: {', '.join(versions)}."
    unfinished = [path for path, results in runs.items() if not lookup(results, "verdict", "ship")]
    if unfinished:
        yield f"Without a verdict: {', '.join(unfinished)}."


# ------------------------------------------------------------------ as tables


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """One row per recipe and file."""
    columns = ["Recipe", "File", "Runs", "Accuracy", "Against float, points", "Size"]
    places = {row["place"]: row["unit"] for _, _, variant in _rows(comparison) for row in variant["places"]}
    for place, unit in places.items():
        columns += [f"{COST_LABELS.get(unit, unit)}, {place}", "Ratio to float"]
    rows = []
    for group, name, variant in _rows(comparison):
        cells = [group["label"], VARIANTS[name], str(variant["runs"])]
        cells += [_over(variant["accuracy"], formats.percent), _over(variant["points"], formats.points)]
        cells += [_over(variant["size_bytes"], formats.kilobytes)]
        measured = {row["place"]: row for row in variant["places"]}
        for place in places:
            row = measured.get(place, {})
            write = formats.COSTS.get(row.get("unit", "ms"), formats.significant)
            cells += [_over(row.get("cost"), write), _over(row.get("ratio_to_float"), formats.factor)]
        passed = formats.MISSING if variant["parity"] is None else f"{variant['parity']} of {variant['runs']}"
        rows.append((*cells, passed))
    return Table((*columns, "Parity passed"), tuple(rows))


def run_table(comparison: Mapping[str, Any]) -> Table:
    """Every run with its seed, accuracies and verdict."""
    rows = [
        (run["run"], group["label"], formats.count(run["seed"]), run["headline"] or "No verdict.")
        for group in comparison["groups"]
        for run in group["runs"]
    ]
    return Table(("Run", "Recipe", "Seed", "Verdict"), tuple(rows))


def _rows(comparison: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    for group in comparison["groups"]:
        for name, variant in group["variants"].items():
            yield group, name, variant


def difference_table(comparison: Mapping[str, Any]) -> Table | None:
    """In what recipes differ, None where there is one or they do not."""
    if not comparison["differences"]:
        return None
    rows = [(row["key"], *(json.dumps(value) for value in row["values"].values())) for row in comparison["differences"]]
    return Table(("Key", *(group["label"] for group in comparison["groups"])), tuple(rows))


def console_comparison(comparison: Mapping[str, Any]) -> RenderableType:
    """The comparison on a terminal; names from users are never read as markup."""
    table = comparison_table(comparison)
    parts: list[RenderableType] = [Text(comparison["headline"], "bold")]
    for group in comparison["groups"]:
        rows = [row[1:] for row in table.rows if row[0] == group["label"]]
        shown = RichTable(title=_title(group), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("")
        for place, column in enumerate(table.columns[2:], 1):
            widest = max(len(row[place]) for row in rows)  # headings give way; a number stays beside its unit
            shown.add_column(Text(column), justify="right", overflow="fold", min_width=min(widest, _NUMBER_WIDTH))
        for row in rows:
            shown.add_row(*map(Text, row))
        parts.append(shown)
    differences = difference_table(comparison)
    if differences:
        keys = RichTable(title="What differs", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in differences.columns:
            keys.add_column(Text(column), overflow="fold")
        for row in differences.rows:
            keys.add_row(*map(Text, row))
        parts.append(keys)
    return Group(*parts, *(Text(note, "yellow") for note in comparison["notes"]))


def _title(group: Mapping[str, Any]) -> Text:
    """A recipe and where its runs lie."""
    runs = [run["run"] for run in group["runs"]]
    more = f" and {len(runs) - _RUNS_NAMED} more" if len(runs) > _RUNS_NAMED else ""
    return Text(f"{group['label']}: {', '.join(runs[:_RUNS_NAMED])}{more}")


# ------------------------------------------------------------------ as a chart


def draw_comparison(comparison: Mapping[str, Any]) -> Chart | None:
    """Accuracy of every run by recipe and file, and the means."""
    rows = [(group, name, variant["accuracy"]) for group, name, variant in _rows(comparison) if variant["accuracy"]]
    if not rows:
        return None
    with chart_style():
        figure, axes = canvas(height=80 + 26 * len(rows))
        for place, (_, name, summary) in enumerate(rows):
            values = [100 * value for value in summary["values"]]
            axes.plot(values, [place] * len(values), MARKERS[name], ms=5, alpha=0.55, color=COLOURS[name], mew=0)
            axes.plot(100 * summary["mean"], place, "|", ms=15, mew=2, color=COLOURS[name])
        labels = [f"{shortened(group['label'], 30)}, {VARIANTS[name]}" for group, name, _ in rows]
        label_rows(axes, labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.1)
        axes.set_xlabel("accuracy, %")
        words = [f"{label} {_over(row[2], formats.percent)}" for label, row in zip(labels, rows, strict=True)]
        cells = tuple(
            (label, str(len(row[2]["values"])), *(formats.percent(row[2][key]) for key in ("mean", "min", "max")))
            for label, row in zip(labels, rows, strict=True)
        )
        return drawn(
            figure,
            "runs",
            "Which recipe is more accurate, and by more than seeds differ?",
            "Each mark is a run, each line the mean over the runs of a recipe. The axis does not start at zero.",
            f"Accuracy in the interpreter: {'; '.join(words)}.",
            Table(("Recipe and file", "Runs", "Mean", "Lowest", "Highest"), cells),
        )
