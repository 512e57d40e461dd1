"""Brings the accuracy figures of the pages up to date with benchmarks/accuracy/results/*.json.

    python docs/figures.py            # rewrites docs/schemes.md and recipes/README.md where they differ
    python docs/figures.py --check    # only says so, by its exit code

In docs/schemes.md everything between two comments is written anew; in recipes/README.md the last four cells of each
recipe that was measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks/accuracy"
sys.path.insert(0, str(BENCHMARK))

from run import read_json  # noqa: E402
from tasks import TASKS  # noqa: E402

COLUMNS = (("w8a8", "ptq"), ("w8a8", "qat"), ("w4a8", "ptq"), ("w4a8", "qat"), ("w8a16", "ptq"))
BEGIN, END = "<!-- figures: written by docs/figures.py -->", "<!-- end of figures -->"
CELLS_OF_RECIPE = 4  # float, PTQ, QAT, time

Cells = Mapping[str, dict]


def main(arguments: list[str]) -> int:
    outdated = [path for path, text in updated().items() if text != path.read_text(encoding="utf-8")]
    for path in outdated:
        print(f"{path.relative_to(ROOT)}: figures are not those of the results")
        if "--check" not in arguments:
            path.write_text(updated()[path], encoding="utf-8")
    return 1 if outdated and "--check" in arguments else 0


def updated() -> dict[Path, str]:
    """The pages as they should be."""
    results = {task: read_json(BENCHMARK / "results" / f"{task}.json") for task in TASKS}
    results = {task: cells for task, cells in results.items() if accuracy(cells, "float", "float") is not None}
    schemes, recipes = ROOT / "docs/schemes.md", ROOT / "recipes/README.md"
    return {
        schemes: between(schemes.read_text(encoding="utf-8"), scheme_table(results)),
        recipes: recipe_rows(recipes.read_text(encoding="utf-8"), results),
    }


def accuracy(cells: Cells, what: str, row: str) -> float | None:
    """Mean over seeds, in percent; None where nothing was measured."""
    done = [cell for name, cell in cells.items() if name.split("/")[0] == what and cell["status"] == "done"]
    values = [cell["rows"][row]["accuracy"] for cell in done if row in cell["rows"]]
    return 100 * mean(values) if values else None


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def scheme_table(results: Mapping[str, Cells]) -> str:
    header = "| model, data | float | " + " | ".join(f"`{scheme}` {row.upper()}" for scheme, row in COLUMNS) + " |"
    lines = [header, "|---" * (len(COLUMNS) + 2) + "|"]
    for task, cells in results.items():
        values = [accuracy(cells, "float", "float"), *(accuracy(cells, *column) for column in COLUMNS)]
        title = TASKS[task].title.partition(":")[0]
        lines.append(f"| {title} | " + " | ".join(map(shown, values)) + " |")
    losses = [f"{name} {worst(results, *column):.2f}" for column, name in zip(COLUMNS, NAMES, strict=False)]
    return "\n".join([*lines, "", f"The most that any of these loses against float, in points: {', '.join(losses)}."])


NAMES = ("int8 PTQ", "int8 QAT", "4-bit PTQ", "4-bit QAT", "16-bit PTQ")


def worst(results: Mapping[str, Cells], what: str, row: str) -> float:
    pairs = [(accuracy(cells, "float", "float"), accuracy(cells, what, row)) for cells in results.values()]
    return max(0.0, *(start - reached for start, reached in pairs if start is not None and reached is not None))


def between(text: str, content: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}"


def recipe_rows(text: str, results: Mapping[str, Cells]) -> str:
    for task, cells in results.items():
        if TASKS[task].overrides:  # not the recipe as it stands
            continue
        values = [accuracy(cells, "float", "float"), *(accuracy(cells, "w8a8", row) for row in ("ptq", "qat"))]
        # Of CPU time: the wall time of shared machines says little.
        seconds = cells["float/0"]["cpu_seconds"] + cells.get("w8a8/0", {}).get("cpu_seconds", 0)
        figures = " | ".join([*map(shown, values), f"{max(seconds / 60, 1):.0f} min"])
        kept = rf"(\| `{TASKS[task].recipe}` \|(?:[^|\n]*\|){{2}}) "
        text = re.sub(kept + r"[^|\n]*\|" * CELLS_OF_RECIPE, rf"\1 {figures} |", text)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
