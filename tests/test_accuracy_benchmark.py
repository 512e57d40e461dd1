"""benchmarks/accuracy: which cells there are, resuming, and the tables; the measurements themselves run by hand."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "accuracy"


@pytest.fixture(autouse=True)
def benchmark(monkeypatch, tmp_path):
    """The benchmark's modules importable by their own names, for one test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))
    yield
    for name in ("ablation", "run", "sources", "table", "tasks", "twin"):
        sys.modules.pop(name, None)


def test_cells():
    import tasks

    names = [cell.name for cell in tasks.cells(seeds=3)]
    assert len(names) == len(set(names))
    assert {"fsdd/w4a8/2", "fsdd/tfmot/2", "fsdd/converter/2", "fsdd/w8a16/0", "kws/mlperf/0"} <= set(names)
    assert {"fsdd/w8a8/7", "fsdd/tfmot/7", "mobilenetv1/w8a16/2"} <= set(names), "more where three do not tell"
    assert {"fsdd/w8a8/8", "fsdd/w4a8/3", "fsdd/w8a16/1", "fsdd/float/1", "kws/tfmot/0", "kws/w8a8/1"}.isdisjoint(names)
    for task in tasks.TASKS:
        assert next(name for name in names if name.startswith(f"{task}/")) == f"{task}/float/0"


def test_every_cell_has_a_recipe_and_a_mark_of_its_own(tmp_path):
    import tasks

    wanted = list(tasks.cells(seeds=2))
    assert len({(cell.task, tasks.fingerprint(cell, False)) for cell in wanted}) == len(wanted)
    for cell in wanted:
        recipe = tasks.recipe_of(cell, False, tmp_path / "float.keras")
        assert (recipe.seed, recipe.float.epochs) == (cell.seed, 0)
        assert recipe.qat.enabled == (cell.what != "float" and cell.task != "kws")
        assert recipe.evaluate.limit is None  # whole test sets
    mixed = tasks.recipe_of(tasks.Cell("fsdd", "w4a8-edges8", 0), False)
    assert (mixed.quantize.scheme, mixed.quantize.layers) == ("w4a8", {"conv": "w8a8", "classes": "w8a8"})


def test_a_changed_recipe_changes_the_mark():
    import tasks

    cell = tasks.Cell("fsdd", "w4a8+damping", 0, {"qat.damping": 1e-4})
    other = tasks.Cell("fsdd", "w4a8+damping", 0, {"qat.damping": 1e-3})
    assert tasks.fingerprint(cell, False) != tasks.fingerprint(other, False)
    assert tasks.fingerprint(cell, False) != tasks.fingerprint(cell, True)


def test_ablation_variants_are_valid():
    import ablation
    import tasks

    for cell in ablation.cells(seeds=1):
        tasks.recipe_of(cell, False)


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """`run.run` on two tasks, with cells that are not really run; returns it and the names of what was."""
    import run
    import tasks

    done = []

    def in_child(cell, folder, weights, settings):
        done.append(cell.name)
        if cell.name in failing:
            return {"status": "failed", "reason": "no luck"}
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.touch()
        row = {"accuracy": 0.5 + 0.1 * cell.seed, "samples": 10, "size_bytes": 7, "fully_integer": True}
        variants = {"float": ["float"], "converter": ["ptq"]}.get(cell.what, ["ptq", "qat"])
        return {"status": "done", "rows": dict.fromkeys(variants, row), "weights": go.weights}

    failing: set[str] = set()
    monkeypatch.setattr(run, "in_child", in_child)
    wanted = [
        tasks.Cell(*cell)
        for cell in (("fsdd", "float", 0), ("fsdd", "w8a8", 0), ("fsdd", "w8a8", 1), ("fsdd", "converter", 0))
    ]

    def go(only=None, prefix="", wanted=wanted):
        done.clear()
        settings = argparse.Namespace(only=only, quick=True, runs=tmp_path, timeout=1, table=False)
        failed = run.run(wanted, settings, prefix, run.table.accuracy_table)
        return failed, list(done)

    go.failing = failing
    go.weights = "digest"
    go.results = tmp_path / "quick/results"
    return go


def test_a_run_goes_on_where_it_stopped(runner, capsys):
    runner.failing.add("fsdd/w8a8/1")
    assert runner(["*/float/*", "*/w8a8/*"]) == (1, ["fsdd/float/0", "fsdd/w8a8/0", "fsdd/w8a8/1"])
    runner.failing.clear()
    # What failed is tried again, what is done is not.
    assert runner() == (0, ["fsdd/w8a8/1", "fsdd/converter/0"])
    assert runner() == (0, [])
    assert set(json.loads((runner.results / "fsdd.json").read_text())) == {
        *("float/0", "w8a8/0", "w8a8/1", "converter/0"),
    }
    assert (
        "| **ours PTQ w8a8** | 55.00 (50.00 to 60.00) | 2 | 7 | yes |  | yes (+5.00) |"
        in (runner.results / "results.md").read_text()
    )


def test_other_float_weights_make_results_old(runner):
    runner()
    path = runner.results / "fsdd.json"
    results = json.loads(path.read_text())
    results["float/0"]["weights"] = "of another training"
    path.write_text(json.dumps(results))
    assert runner() == (0, ["fsdd/w8a8/0", "fsdd/w8a8/1", "fsdd/converter/0"])


def test_an_ablation_shares_the_float_model(runner):
    import tasks

    runner()
    cells = [tasks.Cell("fsdd", "float", 0), tasks.Cell("fsdd", "w4a8+damping", 0, {"qat.damping": 1e-4})]
    assert runner(prefix="ablation_", wanted=cells) == (0, ["fsdd/w4a8+damping/0"])
    assert set(json.loads((runner.results / "ablation_fsdd.json").read_text())) == {"w4a8+damping/0"}
    assert (runner.results / "ablation.md").read_text().count("| float | 50.00 |") == 1
    assert runner(prefix="ablation_", wanted=cells) == (0, [])


def test_without_a_float_model_nothing_else_runs(runner, capsys):
    runner.failing.add("fsdd/float/0")
    assert runner() == (4, ["fsdd/float/0"])
    assert "no float model" in capsys.readouterr().out


def test_only_must_match(runner):
    with pytest.raises(SystemExit, match="no cell matches fsd/"):
        runner(["fsd/*"])


def test_a_scheme_that_is_not_there_is_said_and_tried_again(runner, tmp_path, capsys):
    import run
    import tasks

    cell = tasks.Cell("fsdd", "w8a8+odd", 0, {"quantize.scheme": "w9a9"})
    settings = argparse.Namespace(quick=True)
    record = run.outcome(cell, tmp_path, run.Results(tmp_path, ""), settings)
    assert record["status"] == "failed" and "not in this version" in record["reason"]


def test_table_says_why_a_peer_has_no_row():
    import table
    import tasks

    row = {"accuracy": 0.9, "samples": 10, "size_bytes": 7, "fully_integer": True, "identical": 0.999}
    mark = tasks.fingerprint(tasks.Cell("fsdd", "w8a8", 0), False, "digest")
    found = {
        "float/0": {"status": "done", "rows": {"float": row}, "weights": "digest"},
        "tfmot/0": {"status": "refused", "reason": "TFMOT cannot | do it"},
        "w8a8/0": {"status": "done", "rows": {"qat": row}, "fingerprint": mark},
        "w4a8/0": {"status": "done", "rows": {"qat": row}, "fingerprint": "of another recipe"},
    }
    text = table.accuracy_table({"fsdd": found})
    assert "| TFMOT QAT w8a8 | TFMOT cannot / do it | | | | |  |" in text
    assert "| **ours QAT w8a8** | 90.00 | 1 | 7 | yes | 99.900% | theirs: none |" in text
    assert "| **ours QAT w4a8** (old) | 90.00 |" in text and "(old): measured with other settings" in text


def test_ablation_table():
    import table

    row = {"accuracy": 0.9, "samples": 10, "size_bytes": 7, "fully_integer": True}
    found = {
        "float/0": {"rows": {"float": row}},
        "w4a8+baseline/0": {"rows": {"ptq": row, "qat": row}},
        "w4a8+baseline/1": {"rows": {"ptq": row, "qat": row | {"accuracy": 0.92}}},
        "w4a8+better/0": {"rows": {"ptq": row, "qat": row | {"accuracy": 0.91}}},
        "w4a8+better/1": {"rows": {"ptq": row, "qat": row | {"accuracy": 0.93}}},
        "w4a8+broken/0": {"reason": "no luck"},
    }
    text = table.ablation_table({"fsdd": found})
    assert "| baseline | 90.00 (90.00 to 90.00) | 91.00 (90.00 to 92.00) | +0.00 |" in text
    assert "| better | 90.00 (90.00 to 90.00) | 92.00 (91.00 to 93.00) | +1.00 |" in text
    assert "| broken | no luck | | |" in text
    assert "Seeds of one row differ by up to 2.0 points" in text


def test_sources_are_scaled_and_shortened():
    import sources

    arrays = sources.prepare(of="digits", count=20, scale=8.0, options={})
    assert arrays["x_train"].shape == (20, 8, 8, 1) and arrays["x_test"].max() <= 2
    assert arrays["value_range"] == (0, 2)
    assert len(np.unique(arrays["y_train"])) > 1


def test_twin_describes_the_models_that_are_compared(tmp_path):
    import twin

    from mobileqat.models import build_model

    model = build_model("mobilenet_v3_small", (16, 16, 3), 4, {"alpha": 0.1})
    twin.describe(model, tmp_path, np.zeros((3, 16, 16, 3), np.float32), scale=2.0)
    layers = json.loads((tmp_path / "twin.json").read_text())["layers"]
    assert [row["name"] for row in layers] == [layer.name for layer in model.layers]
    with np.load(tmp_path / "twin.npz") as arrays:
        np.testing.assert_allclose(arrays["conv/0"], 2 * model.get_layer("conv").get_weights()[0])
