"""The verdict, the console table and the page: for complete runs, partial runs and hostile names."""

import copy
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mobileqat.report import console_summary, decide, formats, render_html, write_html
from mobileqat.report.charts import draw_charts
from mobileqat.report.comparison import comparison_rows

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SECTIONS = ["charts", "parity", "inspection", "plan", "training", "steps", "environment", "recipe"]
CPU = {"cpu": "AMD EPYC 7B13", "cores": 2, "platform": "Linux-6.1-x86_64"}


def make_variant(
    name: str, accuracy: float | None, *, integer: bool = True, samples: int = 10_000, **other: Any
) -> dict[str, Any]:
    """A variant whose file passed every check."""
    return {
        "file": f"{name}.tflite",
        "size_bytes": 98_496 if integer else 318_144,
        "accuracy": {"samples": samples, "interpreter": accuracy, "simulation": accuracy},
        "inspection": make_inspection(integer),
        "parity": make_parity() if integer else None,
        "bench": [make_latency(0.284 if integer else 0.812)],
        **other,
    }


def make_inspection(integer: bool = True, problems: tuple[str, ...] = ()) -> dict[str, Any]:
    dtype, size_bytes = ("int8", 98_496) if integer else ("float32", 318_144)
    tensor = {
        "name": "serving_default_image:0",
        "shape": [1, 32, 32, 3],
        "dtype": dtype,
        "scale": 0.0039215689 if integer else None,
        "zero_point": -128 if integer else None,
    }
    return {
        "fully_integer": integer,
        "islands": [],
        "stray_conversions": [],
        "requantizations": [],
        "shape_arithmetic": [],
        "operator_counts": {"CONV_2D": 9, "ADD": 3, "MEAN": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1},
        "dtype_counts": {"int8": 28, "int32": 11} if integer else {"float32": 36, "int32": 1},
        "weight_bytes": size_bytes - 15_000,
        "size_bytes": size_bytes,
        "inputs": [tensor],
        "outputs": [tensor | {"name": "StatefulPartitionedCall:0", "shape": [1, 10]}],
        "problems": list(problems),
    }


def make_operator(name: str, kind: str = "CONV_2D", identical: float = 1.0, max_lsb: int = 0) -> dict[str, Any]:
    bar = 0.9999 if kind in ("CONV_2D", "FULLY_CONNECTED") else 0.99
    return {
        "operator": name,
        "kind": kind,
        "outputs": 1_048_576,
        "identical": identical,
        "max_lsb": max_lsb,
        "min_identical": bar,
        "bound_lsb": 1,
        "passed": identical >= bar and max_lsb <= 1,
    }


def make_parity(operators: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    operators = operators or [
        *(make_operator(f"conv{index}", identical=1 - index * 1e-6, max_lsb=1) for index in range(1, 10)),
        *(make_operator(f"add{index}", "ADD") for index in range(1, 4)),
        make_operator("average_pool", "MEAN", 0.9994, 1),
        make_operator("logits", "FULLY_CONNECTED"),
        make_operator("softmax", "SOFTMAX"),
    ]
    passed = all(row["passed"] for row in operators)
    return {
        "passed": passed,
        "runtime": "litert 2.3.0",
        "weights": {"compared": 77_360, "identical": 77_360},
        "end_to_end": {"samples": 10_000, "identical": 0.99812, "max_lsb": 1, "top1_agreement": 0.9999},
        "operators": operators,
        "problems": [] if passed else ["1 operator misses its bound."],
    }


def make_latency(median: float, threads: int = 1) -> dict[str, Any]:
    return {
        "target": "host",
        "runtime": "litert",
        "runtime_version": "2.3.0",
        "unit": "ms",
        "threads": threads,
        "warmup": 20,
        "runs": 200,
        "cost": {
            "median": median,
            "p90": 1.1 * median,
            "min": 0.95 * median,
            "max": 1.6 * median,
            "mean": 1.02 * median,
            "std": 0.05 * median,
        },
        "init_ms": 3.1,
        "peak_memory_bytes": 12_300_000,
        "delegate": None,
        "agreement": None,
        "device": CPU,
    }


def make_history(initial: float, values: list[float]) -> dict[str, Any]:
    epochs = [
        {
            "epoch": epoch,
            "loss": 0.42 - 0.01 * epoch,
            "accuracy": value + 0.01,
            "val_loss": 0.45,
            "val_accuracy": value,
            "learning_rate": 1e-4 / epoch,
            "seconds": 41.3,
        }
        for epoch, value in enumerate(values, 1)
    ]
    best = max(range(len(values)), key=values.__getitem__) + 1 if values else None
    return {"epochs": epochs, "best_epoch": best, "initial_val_accuracy": initial}


def make_results() -> dict[str, Any]:
    """A complete run: QAT gains 0.42 points over PTQ."""

    def per_class(offset: float) -> list[dict[str, Any]]:
        return [
            {"class": label, "accuracy": 0.8 + 0.015 * index + offset * (index % 4 - 1), "samples": 1000}
            for index, label in enumerate(CLASSES)
        ]

    variants = {
        "float": make_variant("float", 0.8719, integer=False, per_class=per_class(0), agreement_with_float=1.0),
        "ptq": make_variant("ptq", 0.8688, per_class=per_class(-0.006), agreement_with_float=0.9812),
        "qat": make_variant("qat", 0.873, per_class=per_class(0.004), agreement_with_float=0.9745),
    }
    names = ["data", "float", "ptq", "qat", "convert", "inspect", "parity", "evaluate", "bench", "report"]
    return {
        "schema_version": 1,
        "mobileqat": "0.1.0",
        "name": "cifar10_resnet8_w8a8",
        "description": "MLPerf Tiny ResNet8 on CIFAR-10, from its reference weights to int8",
        "created": "2026-11-20T16:00:00+00:00",
        "seconds": 812.0,
        "verdict": decide(variants, 0.1),
        "recipe": {"name": "cifar10_resnet8_w8a8", "seed": 0, "qat": {"epochs": 10, "learning_rate": 0.0001}},
        "data": {
            "source": "cifar10",
            "class_names": CLASSES,
            "train": 45_000,
            "validation": 5_000,
            "test": 10_000,
            "calibration": 512,
        },
        "model": {"name": "resnet8", "parameters": 78_666},
        "variants": variants,
        "training": {
            "float": make_history(0.8752, []),
            "qat": make_history(0.8706, [0.868, 0.8702, 0.8738, 0.8731, 0.8752, 0.8766, 0.8771, 0.8768, 0.877, 0.8769]),
        },
        "plan": [
            {
                "tensor": f"stack{index}/add",
                "shape": [32, 32, 16],
                "operator": "ADD",
                "layers": [f"stack{index}/add", f"stack{index}/relu"],
                "bits": 8,
                "parameters": "a range of its own",
                "shared_with": None,
                "scale": 0.02351234,
                "zero_point": -128,
                "minimum": 0.0,
                "maximum": 5.9956,
            }
            for index in range(1, 20)
        ],
        "steps": [{"name": name, "status": "done", "seconds": 41.5, "message": ""} for name in names],
        "environment": {"python": "3.11.7", "tensorflow": "2.21.0", "numpy": "2.2.0", "machine": CPU},
    }


def make_failed_results() -> dict[str, Any]:
    """The same run, ended by parity: no evaluation, no latency, no verdict."""
    results = make_results()
    del results["verdict"]
    results["steps"] = results["steps"][:7]
    results["steps"][6] |= {"status": "failed", "message": "ptq.tflite: conv1 misses its bound."}
    for variant in results["variants"].values():
        for part in ("accuracy", "per_class", "agreement_with_float", "bench", "parity"):
            del variant[part]
    return results


# --- verdict


def decide_shares(float_share: float | None, ptq: float | None, qat: float | None, **options: Any) -> dict[str, Any]:
    shares = {"float": float_share, "ptq": ptq, "qat": qat}
    variants = {
        name: make_variant(name, share, integer=name != "float", **options)
        for name, share in shares.items()
        if share is not None
    }
    return decide(variants, 0.1)


@pytest.mark.parametrize(
    ("float_share", "ptq", "qat", "ship", "worth_it"),
    [
        (0.8719, 0.8688, 0.8730, "qat", True),
        (0.8719, 0.8700, 0.8711, "qat", True),
        (0.8719, 0.8709, 0.8719, "ptq", False),  # 0.10 points: not more than the margin
        (0.8719, 0.8715, 0.8716, "ptq", False),
        (0.8719, 0.8720, 0.8700, "ptq", False),
        (0.8719, 0.5000, 0.8000, "qat", True),
        (0.8719, 0.8715, None, "ptq", None),
        (0.8719, None, 0.8715, "qat", None),
        (0.8719, None, None, "float", None),
        (None, 0.8688, 0.8730, "qat", True),
    ],
)
def test_verdict(float_share: float, ptq: float, qat: float, ship: str, worth_it: bool | None) -> None:
    verdict = decide_shares(float_share, ptq, qat)
    assert (verdict["ship"], verdict["qat_worth_it"]) == (ship, worth_it)
    assert verdict["file"] == f"{ship}.tflite"


NOT_INTEGER = {"inspection": make_inspection(False, ("1 x EXP computes in float32.",))}
NO_PARITY = {"parity": make_parity([make_operator("conv1", identical=0.5, max_lsb=9)])}


@pytest.mark.parametrize(
    ("broken", "ship", "reason"),
    [
        (
            {"qat": NOT_INTEGER},
            "ptq",
            "qat.tflite cannot ship, it is not fully integer: 1 x EXP computes in float32.",
        ),
        (
            {"qat": NO_PARITY},
            "ptq",
            "qat.tflite cannot ship, it does not match its simulation: 1 operator misses its bound.",
        ),
        ({"ptq": NO_PARITY}, "qat", "ptq.tflite cannot ship, it does not match its simulation"),
        (
            {"qat": {"inspection": make_inspection(problems=("1 operators compute shapes.",))}},
            "ptq",
            "qat.tflite cannot ship, it did not pass inspection: 1 operators compute shapes.",
        ),
        ({"qat": {"inspection": None}}, "ptq", "qat.tflite cannot ship, it was not inspected."),
        ({"qat": {"accuracy": None}}, "ptq", "qat.tflite cannot ship, it was not evaluated."),
        (
            {"qat": {"accuracy": {"interpreter": float("nan")}}},
            "ptq",
            "qat.tflite cannot ship, it was not evaluated.",
        ),
        ({"ptq": NOT_INTEGER, "qat": NO_PARITY}, "float", "ptq.tflite cannot ship, it is not fully integer"),
    ],
)
def test_a_file_that_fails_a_check_cannot_ship(broken: dict[str, Any], ship: str, reason: str) -> None:
    variants = make_results()["variants"]
    for name, parts in broken.items():
        variants[name] |= parts
    verdict = decide(variants, 0.1)
    assert verdict["ship"] == ship
    assert verdict["qat_worth_it"] is None
    assert any(text.startswith(reason) for text in verdict["reasons"]), verdict["reasons"]


def test_parity_that_was_not_checked_is_said() -> None:
    verdict = decide_shares(0.87, 0.87, 0.87, parity=None)
    assert verdict["ship"] == "ptq"
    assert "ptq.tflite was not compared with its simulation." in verdict["reasons"]


def test_nothing_evaluated_gives_no_verdict() -> None:
    assert decide({}, 0.1) == {
        "ship": None,
        "file": None,
        "headline": "No verdict: no file was evaluated.",
        "qat_worth_it": None,
        "reasons": [],
    }


@pytest.mark.parametrize(
    ("shares", "headline"),
    [
        (
            (0.8719, 0.8688, 0.8730),
            "Ship qat.tflite: 87.30 %, 0.11 points above float, 31 % of the size, 2.86x faster than float "
            "(litert, 1 thread); QAT gains 0.42 points over PTQ.",
        ),
        (
            (0.8719, 0.8715, 0.8716),
            "Ship ptq.tflite: 87.15 %, 0.04 points below float, 31 % of the size, 2.86x faster than float "
            "(litert, 1 thread); QAT was not needed (0.01 points more, within the margin of 0.10).",
        ),
        (
            (0.8719, 0.8719, 0.8716),
            "Ship ptq.tflite: 87.19 %, equal to float, 31 % of the size, 2.86x faster than float "
            "(litert, 1 thread); QAT was not needed (0.03 points less).",
        ),
        (
            (0.8719, 0.6000, 0.8000),
            "Ship qat.tflite, but it loses 7.19 points against float: 80.00 %, 31 % of the size, 2.86x "
            "faster than float (litert, 1 thread); QAT gains 20.00 points over PTQ.",
        ),
        ((None, None, 0.8), "Ship qat.tflite: 80.00 %."),
        ((0.8719, None, None), "Ship float.tflite: 87.19 %; the run has no integer file."),
    ],
)
def test_headline(shares: tuple[float | None, float | None, float | None], headline: str) -> None:
    assert decide_shares(*shares)["headline"] == headline


def test_headline_when_integer_is_slower() -> None:
    variants = make_results()["variants"]
    variants["qat"]["bench"] = [make_latency(0.95)]
    assert "1.17x slower than float" in decide(variants, 0.1)["headline"]


def test_the_ratio_measured_in_turns_counts() -> None:
    variants = make_results()["variants"]
    variants["qat"]["bench"][0]["ratio_to_float"] = {"min": 0.4, "median": 0.5, "max": 0.6}
    assert "2.00x faster than float" in decide(variants, 0.1)["headline"]
    assert [row.cells for row in comparison_rows(variants) if row.label == "ratio to float"][1] == (
        "1.00",
        "0.35",
        "0.50",
    )


def test_reasons_state_the_standard_error_and_the_losses() -> None:
    assert decide_shares(0.8719, 0.6, 0.8)["reasons"] == [
        "QAT reaches 80.00 % and PTQ 60.00 %: 20.00 points more, more than the margin of 0.10.",
        "The standard error of that difference is 0.63 points (binomial, 10,000 samples, files taken as "
        "independent): the difference is larger than one standard error.",
        "Loses more than 1.00 point against float: PTQ 27.19, QAT 7.19 points.",
    ]
    assert decide_shares(0.8719, 0.8688, 0.873)["reasons"][1].endswith("is within one standard error.")


# --- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.percent(0.87194), "87.19 %"),
        (formats.percent(None), "-"),
        (formats.exact_percent(1.0), "100 %"),
        (formats.exact_percent(1 - 1e-8), "99.999 %"),
        (formats.exact_percent(0.9999), "99.990 %"),
        (formats.points(0.114), "+0.11"),
        (formats.points(-0.001), "0.00"),
        (formats.kilobytes(318_144), "318.1 kB"),
        (formats.milliseconds(0.00611), "0.0061 ms"),
        (formats.milliseconds(0.2841), "0.284 ms"),
        (formats.milliseconds(28.41), "28.41 ms"),
        (formats.milliseconds(1284.1), "1,284.1 ms"),
        (formats.seconds(1.24), "1.2 s"),
        (formats.seconds(812), "13 min 32 s"),
        (formats.seconds(7300), "2 h 1 min"),
    ],
)
def test_formats(text: str, expected: str) -> None:
    assert text == expected


def test_rows_without_any_value_are_left_out() -> None:
    labels = [row.label for row in comparison_rows(make_failed_results()["variants"])]
    assert labels == ["Size", "ratio to float", "Fully integer"]


# --- console

COMPLETE_CONSOLE = """\
Ship qat.tflite: 87.30 %, 0.11 points above float, 31 % of the size, 2.86x faster than float
(litert, 1 thread); QAT gains 0.42 points over PTQ.

                                    float        PTQ        QAT
 ──────────────────────────────────────────────────────────────
 Accuracy, interpreter            87.19 %    86.88 %    87.30 %
   simulation                     87.19 %    86.88 %    87.30 %
   difference to float, points          -      -0.31      +0.11
   same class as float                  -    98.12 %    97.45 %
 Size                            318.1 kB    98.5 kB    98.5 kB
   ratio to float                    1.00       0.31       0.31
 Latency, litert, 1 thread       0.812 ms   0.284 ms   0.284 ms
   90th percentile               0.893 ms   0.312 ms   0.312 ms
   ratio to float                    1.00       0.35       0.35
   peak memory                    12.3 MB    12.3 MB    12.3 MB
 Fully integer                         no        yes        yes
 Parity with the simulation             -     passed     passed
"""

FAILED_OPERATORS = """
qat.tflite: 1 operator misses its bound.
qat.tflite: operators that miss their parity bound, worst 5 of 7

 Operator   Kind      Identical   required   Largest difference   allowed
 ────────────────────────────────────────────────────────────────────────
 conv1      CONV_2D    91.000 %   99.990 %                2 LSB     1 LSB
 conv2      CONV_2D    92.000 %   99.990 %                2 LSB     1 LSB
 conv3      CONV_2D    93.000 %   99.990 %                2 LSB     1 LSB
 conv4      CONV_2D    94.000 %   99.990 %                2 LSB     1 LSB
 conv5      CONV_2D    95.000 %   99.990 %                2 LSB     1 LSB
"""


def console_text(results: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"), color_system=None)  # noqa: SIM115
    with console.file:
        console.print(console_summary(results))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_console_of_a_complete_run() -> None:
    assert console_text(make_results()) == COMPLETE_CONSOLE


def test_console_shows_the_worst_operators_of_a_failed_parity() -> None:
    results = make_results()
    rows = [make_operator(f"conv{index}", identical=0.9 + index / 100, max_lsb=2) for index in range(1, 8)]
    results["variants"]["qat"]["parity"] = make_parity([make_operator("[red]odd"), *rows])
    assert console_text(results).endswith(FAILED_OPERATORS)


def test_console_of_a_failed_run_names_the_step_and_reads_no_markup() -> None:
    results = make_failed_results()
    results["variants"]["qat"]["parity"] = make_parity() | {"problems": [f"problem {index}" for index in range(9)]}
    results["steps"][6]["message"] = "[bold]layer[/bold] misses its bound"
    lines = console_text(results).splitlines()
    assert lines[0] == "Failed at step parity: [bold]layer[/bold] misses its bound"
    assert lines[-2:] == ["qat.tflite: problem 4", "qat.tflite: 4 more problems, all of them in the report"]
    assert console_text({}) == ""


# --- page


class Page(HTMLParser):
    """Checks nesting, and collects ids, links, tags and text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if values.get("href"):
            self.links.append(str(values["href"]))
        if tag == "th":
            assert values.get("scope") in ("col", "row")
        if tag == "svg":
            assert values["role"] == "img" and values["aria-label"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def check_page(html: str) -> Page:
    """What holds for every page."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in html
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert "http://" not in html and "https://" not in html
    assert "script" not in page.tags
    assert page.tags.count("h1") == 1 and page.tags.count("title") == 1
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert set(SECTIONS) <= set(page.ids)
    assert page.tags.count("table") == page.tags.count("caption")
    assert "Undefined" not in html and "None" not in page.text
    return page


def test_page_of_a_complete_run() -> None:
    results = make_results()
    page = check_page(render_html(results))
    headline = results["verdict"]["headline"]
    assert headline in page.text
    assert page.text.index(headline) < page.text.index("Accuracy, interpreter")
    assert page.tags.count("svg") == 4
    for text in (
        "87.30 %",
        "+0.11",
        "98.5 kB",
        "0.284 ms",
        "99.999 %",
        "epochs: 10",
        "machine: cpu",
        "13 min 32 s",
    ):
        assert text in page.text
    assert "Not available" not in page.text


def test_page_of_a_failed_run_says_which_step_is_missing() -> None:
    page = check_page(render_html(make_failed_results()))
    assert "No verdict: the run ended at step parity." in page.text
    assert "Step parity failed. ptq.tflite: conv1 misses its bound." in page.text
    assert "Not available: step parity failed" in page.text
    assert "98.5 kB" in page.text
    assert page.tags.count("svg") == 1  # the training curve


def test_page_of_a_run_that_went_on_after_failed_checks_shows_them_and_the_verdict() -> None:
    results = make_results()
    for index, message in (
        (5, "ptq.tflite is not fully integer:"),
        (6, "qat.tflite does not compute what was trained:"),
    ):
        results["steps"][index] |= {"status": "failed", "message": message}
    page = check_page(render_html(results))
    assert results["verdict"]["headline"] in page.text
    assert "Step inspect failed. ptq.tflite is not" in page.text and "Step parity failed. qat.tflite does" in page.text
    assert "Not available" not in page.text and "ended" not in page.text


def test_weights_from_before_training_can_be_the_best() -> None:
    results = make_results()
    results["training"]["qat"]["best_epoch"] = 0
    assert "kept: the weights before training." in check_page(render_html(results)).text


def test_page_without_qat_and_bench() -> None:
    results = make_results()
    del results["variants"]["qat"], results["training"]["qat"]
    results["steps"][3] |= {"status": "skipped", "message": "qat.enabled is false"}
    for variant in results["variants"].values():
        variant["bench"] = []
    results["verdict"] = decide(results["variants"], 0.1)
    page = check_page(render_html(results))
    assert "Not available: step qat skipped: qat.enabled is false." in page.text
    assert "Latency" not in page.text


@pytest.mark.parametrize("key", [None, *make_results()])
def test_any_part_may_be_missing(key: str | None) -> None:
    results = make_results()
    results.pop(key, None) if key else results.clear()
    check_page(render_html(results))
    console_text(results)


@pytest.mark.parametrize("part", make_variant("qat", 0.8))
def test_any_part_of_a_variant_may_be_missing_or_null(part: str) -> None:
    results = make_results()
    del results["variants"]["qat"][part]
    results["variants"]["ptq"][part] = None
    check_page(render_html(results))
    console_text(results)
    decide(results["variants"], 0.1)


def _hostile(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: _hostile(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item, text) for item in value]
    return text + value if isinstance(value, str) else value


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        "$\\frac{a}$ 犬 \x00\x1b &amp;",
        "{{ 7 * 7 }}",
    ],
)
def test_names_from_users_are_escaped(text: str) -> None:
    results = make_results()
    names = results["data"].pop("class_names")
    results = _hostile(results, text)
    results["data"]["class_names"] = [text + name for name in names]
    page = check_page(render_html(results))
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert text.replace("\x00", "\ufffd").split("\ufffd")[0] in page.text


def test_charts_use_the_colours_of_the_page() -> None:
    results = make_results()
    results["variants"]["qat"]["bench"].append(make_latency(0.2, threads=2))
    results["training"]["float"] = make_history(0.1, [0.7, float("nan"), 0.87])
    charts = {chart.name: chart for chart in draw_charts(results)}
    assert list(charts) == ["accuracy", "classes", "training-qat", "training-float", "latency"]
    for chart in charts.values():
        assert "currentColor" in chart.svg and "var(--" in chart.svg and "#0102" not in chart.svg
        assert 'viewBox="0 0 400 ' in chart.svg
    assert "QAT, litert, 2 threads 0.200 ms" in charts["latency"].description
    assert charts["accuracy"].description == (
        "Accuracy in the interpreter: float 87.19 % (86.52 % to 87.83 %); PTQ 86.88 % (86.20 % to 87.53 %); "
        "QAT 87.30 % (86.63 % to 87.94 %)."
    )


def test_no_chart_of_classes_when_none_changed() -> None:
    results = make_results()
    for variant in results["variants"].values():
        variant["per_class"] = [{"class": "all", "accuracy": 1.0, "samples": 359}]
        variant["accuracy"] |= {"interpreter": 1.0, "samples": 359}
    charts = {chart.name: chart for chart in draw_charts(results)}
    assert "classes" not in charts
    assert "float 100.00 % (98.94 % to 100.00 %)" in charts["accuracy"].description


def test_many_classes_show_the_largest_changes() -> None:
    results = make_results()
    for name, variant in results["variants"].items():
        variant["per_class"] = [
            {
                "class": f"class {index}",
                "accuracy": 0.5 + (index / 1000 if name == "qat" else 0),
                "samples": 10,
            }
            for index in range(100)
        ]
    chart = next(chart for chart in draw_charts(results) if chart.name == "classes")
    assert chart.caption == "Change in accuracy against float, the largest first; 12 of 100 classes."
    assert "class 99" in chart.svg and "class 87" not in chart.svg


def test_rendering_is_reproducible_and_leaves_its_input_alone() -> None:
    results = make_results()
    before = copy.deepcopy(results)
    assert render_html(results) == render_html(results)
    assert results == before


def test_write_html_replaces_or_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    assert write_html(make_results(), path) == path
    assert path.read_text(encoding="utf-8") == render_html(make_results())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_html({}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_report_stays_light() -> None:
    code = (
        "import sys, mobileqat.report; "
        "print([name for name in ('keras', 'tensorflow', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bits_of_weights():
    """How many, and what holds them where the runtime takes no fewer."""
    results = make_results()
    for row, bits in zip(results["plan"], ([8, 8], [4, 4], [4, 8], [2, 4], None), strict=False):
        row["weight_bits"] = bits
    rows = re.findall(r"<th scope=\"row\" class=\"name\">stack\d+/add</th>.*", render_html(results))
    cells = [re.findall(r'<td class="number">([^<]*)</td>', row)[1] for row in rows[:5]]
    assert cells == ["8", "4", "4 in int8", "2 in int4", "-"]


def test_instructions_have_a_chart_of_their_own():
    results = make_results()
    for variant, count in (("float", 7_060_000), ("qat", 5_010_000)):
        row = make_latency(count) | {"target": "arm:cortex-a53", "unit": "instructions"}
        results["variants"][variant]["bench"].append(row)
    charts = {chart.name: chart for chart in draw_charts(results)}
    assert "instructions" not in charts["latency"].description
    description = charts["instructions"].description
    assert description == "Median instructions: float 7.060 M; QAT 5.010 M."
    assert "instructions, millions" in charts["instructions"].svg and "1e6" not in charts["instructions"].svg
    cells = {row.label: row.cells for row in comparison_rows(results["variants"])}
    assert cells["Instructions, arm:cortex-a53, litert, 1 thread"] == ("7.060 M", "-", "5.010 M")
