"""Several runs side by side: which belong together, means and ranges, what limits the comparison, and the page."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_results import make_latency, make_parity, make_results
from test_report import check_nesting

from mobileqat.report import compare, console_comparison, write_comparison
from mobileqat.report.page import render_comparison
from mobileqat.report.runs import comparison_table, difference_table, run_table


def make_run(seed: int, qat: float, **changes: Any) -> dict[str, Any]:
    """A run of the recipe with another seed and accuracy; `changes` are of its recipe's `qat` section."""
    results = make_results()
    results["recipe"] = copy.deepcopy(results["recipe"]) | {"seed": seed}
    results["recipe"]["qat"] |= changes
    results["variants"]["qat"]["accuracy"]["interpreter"] = qat
    return results


def seeds() -> dict[str, dict[str, Any]]:
    """Three seeds of one recipe, and one run of another."""
    runs = {f"runs/{seed}": make_run(seed, qat) for seed, qat in enumerate((0.871, 0.874, 0.873))}
    return runs | {"runs/long": make_run(0, 0.875, epochs=40)}


def test_seeds_of_a_recipe_are_one_row_by_mean_and_range() -> None:
    comparison = compare(seeds())
    assert [group["label"] for group in comparison["groups"]] == ["cifar10_resnet8_w8a8 #1", "cifar10_resnet8_w8a8 #2"]
    first = comparison["groups"][0]
    assert [(run["run"], run["seed"]) for run in first["runs"]] == [("runs/0", 0), ("runs/1", 1), ("runs/2", 2)]
    accuracy = first["variants"]["qat"]["accuracy"]
    assert accuracy["values"] == [0.871, 0.874, 0.873]
    assert accuracy["mean"] == pytest.approx(0.872667, abs=1e-6)
    assert (accuracy["min"], accuracy["max"]) == (0.871, 0.874)
    assert first["variants"]["qat"]["points"]["values"] == [-0.09, 0.21, 0.11]
    assert comparison["differences"] == [
        {"key": "qat.epochs", "values": {"cifar10_resnet8_w8a8 #1": 10, "cifar10_resnet8_w8a8 #2": 40}}
    ]
    assert comparison["notes"] == []
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_points_are_against_the_float_file_of_the_same_run() -> None:
    runs = seeds()
    for run, share in zip(runs.values(), (0.80, 0.90, 0.85, 0.87), strict=True):
        run["variants"]["float"]["accuracy"]["interpreter"] = share
    points = compare(runs)["groups"][0]["variants"]["qat"]["points"]
    assert points["values"] == pytest.approx([7.1, -2.6, 2.3])


def test_the_table_writes_ranges_only_where_runs_differ() -> None:
    table = comparison_table(compare(seeds()))
    rows = {row[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    qat = rows["cifar10_resnet8_w8a8 #1", "QAT"]
    assert qat["Runs"] == "3"
    assert qat["Accuracy"] == "87.27 % (87.10 % to 87.40 %)"
    assert qat["Against float, points"] == "+0.08 (-0.09 to +0.21)"
    assert qat["Size"] == "98.5 kB"
    assert qat["Latency, litert, 1 thread"] == "0.284 ms"
    assert qat["Ratio to float"] == "0.35"
    assert qat["Parity passed"] == "3 of 3"
    assert rows["cifar10_resnet8_w8a8 #1", "float"]["Against float, points"] == "-"


def test_the_headline_is_of_a_file_that_matches_its_simulation_in_every_run() -> None:
    runs = seeds()
    best = "QAT of cifar10_resnet8_w8a8 #2 is the most accurate: 87.50 %, +0.31 points against float, over 1 run."
    assert compare(runs)["headline"] == best
    broken = make_parity()
    runs["runs/long"]["variants"]["qat"]["parity"] = broken | {"passed": False}
    assert compare(runs)["headline"].startswith("QAT of cifar10_resnet8_w8a8 #1 is the most accurate: 87.27 % (87.10 %")
    for run in runs.values():
        for variant in run["variants"].values():
            variant["parity"] = broken | {"passed": False}
    assert compare(runs)["headline"].startswith("No integer file")


def test_what_limits_the_comparison_is_said() -> None:
    runs = seeds()
    runs["runs/1"]["environment"] |= {"machine": {"cpu": "Cortex-A76"}}
    runs["runs/2"]["data"] |= {"test": 500}
    runs["runs/0"]["mobileqat"] = "0.0.9"
    runs["runs/long"]["verdict"] = {"ship": None}
    assert compare(runs)["notes"] == [
        "Latencies are from different machines: AMD EPYC 7B13, Cortex-A76.",
        "Accuracies are of different test sets and cannot be compared.",
        "Runs are of different versions of mobileqat: 0.0.9, 0.1.0.",
        "Without a verdict: runs/long.",
    ]


def test_places_that_only_some_runs_measured() -> None:
    runs = seeds()
    row = make_latency(7_060_000) | {"target": "arm:cortex-a53", "unit": "instructions"}
    runs["runs/1"]["variants"]["qat"]["bench"].append(row)
    table = comparison_table(compare(runs))
    column = table.columns.index("Instructions, arm:cortex-a53, litert, 1 thread")
    assert [row[column] for row in table.rows] == ["-", "-", "7.060 M", "-", "-", "-"]


@pytest.mark.parametrize("key", make_results())
def test_any_part_of_a_run_may_be_missing(key: str) -> None:
    runs = seeds()
    del runs["runs/1"][key]
    comparison = compare(runs)
    check_nesting(render_comparison(comparison))
    assert len(run_table(comparison).rows) == 4


def test_nothing_but_failed_runs() -> None:
    comparison = compare({"a": {}, "b": {}})
    assert comparison["headline"].startswith("No integer file")
    assert difference_table(comparison) is None
    check_nesting(render_comparison(comparison))


def test_page_of_several_runs(tmp_path: Path) -> None:
    runs = seeds()
    runs["<img src=x>"] = make_run(7, 0.8)
    path = write_comparison(compare(runs), tmp_path / "comparison.html")
    page = check_nesting(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1 and "img" not in page.tags and "script" not in page.tags
    for text in ("87.40 %", "What differs between the recipes", "qat.epochs", "runs/long", "<img src=x>"):
        assert text in page.text, text


def test_numbers_stay_beside_their_units_in_80_columns() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(console_comparison(compare(seeds())))
    lines = [line.strip() for line in captured.get().splitlines()]
    assert not {"ms", "kB", "%"} & set(lines)
    assert sum(" ms" in line for line in lines) >= 3


def test_console_of_several_runs() -> None:
    console = Console(width=140, record=True, color_system=None, quiet=False)
    with console.capture() as captured:
        console.print(console_comparison(compare(seeds())))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines[0].startswith("QAT of cifar10_resnet8_w8a8 #2 is the most accurate")
    assert any(line.startswith("cifar10_resnet8_w8a8 #1: runs/") for line in lines)
    assert any(line.startswith(" qat.epochs") for line in lines)
