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
from run_results import (
    make_failed_results,
    make_history,
    make_inspection,
    make_islands,
    make_latency,
    make_layers,
    make_operator,
    make_parity,
    make_results,
    make_variant,
)

from mobileqat.report import console_summary, decide, formats, render_html, write_html
from mobileqat.report.charts import draw_charts
from mobileqat.report.comparison import comparison_rows
from mobileqat.report.graph import draw_graph
from mobileqat.report.islands import border_table, cost_sentence, excluded_table
from mobileqat.report.layer_charts import draw_layer_charts

SECTIONS = ["charts", "training", "layers", "graph", "excluded", "parity", "inspection", "plan", "steps"]
SECTIONS += ["environment", "recipe"]
CHARTS = ["tradeoff", "accuracy", "classes", "latency", "training-qat"]
LAYER_CHARTS = ["profile", "ranges", "noise", "weights", "outputs"]


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


def test_reasons_say_when_the_float_model_has_learned_nothing() -> None:
    per_class = [{"class": "cat", "accuracy": 1.0, "samples": 30}, {"class": "dog", "accuracy": 0.0, "samples": 20}]
    variants = make_results()["variants"]
    for share, is_said in ((0.6, True), (0.62, False)):
        variants["float"] |= {"accuracy": {"interpreter": share, "samples": 50}, "per_class": per_class}
        reasons = decide(variants, 0.1)["reasons"]
        assert (
            any("no more than the answer 'cat' to every sample would (60.00 %)" in text for text in reasons) == is_said
        )


def test_reasons_say_when_an_integer_file_costs_more_than_float() -> None:
    variants = make_results()["variants"]
    file = decide(variants, 0.1)["file"]
    assert not any("measure on the target" in text for text in decide(variants, 0.1)["reasons"])
    variants["float"]["size_bytes"] = 10
    assert any(text.startswith(f"{file} is larger than the float file") for text in decide(variants, 0.1)["reasons"])


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
        self.tags.append("tooltip" if tag == "title" and "svg" in self.open else tag)
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
    """What holds for every page of a run."""
    page = check_nesting(html)
    assert set(SECTIONS) <= set(page.ids)
    return page


def check_nesting(html: str) -> Page:
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
    assert page.tags.count("table") == page.tags.count("caption")
    assert "Undefined" not in html and "None" not in page.text
    return page


def test_page_of_a_complete_run() -> None:
    results = make_results()
    page = check_page(render_html(results))
    headline = results["verdict"]["headline"]
    assert headline in page.text
    assert page.text.index(headline) < page.text.index("Accuracy, interpreter")
    assert [id for id in page.ids if id.startswith("chart-")] and set(page.ids) >= {
        f"chart-{name}" for name in [*CHARTS, *LAYER_CHARTS]
    }
    assert page.tags.count("svg") == len(CHARTS) + len(LAYER_CHARTS) + 1  # and the graph
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
    assert page.tags.count("svg") == 2  # the training curve and the ranges


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


@pytest.mark.parametrize(("stayed", "words"), [(True, "anew: kept."), (False, "anew: not kept, they validated worse.")])
def test_page_says_whether_statistics_taken_anew_stayed(stayed: bool, words: str) -> None:
    results = make_results()
    assert "statistics taken anew" not in check_page(render_html(results)).text
    results["training"]["qat"]["reestimated"] = stayed
    assert f"BatchNormalization statistics taken {words}" in check_page(render_html(results)).text


def test_page_without_qat_and_bench() -> None:
    results = make_results()
    del results["variants"]["qat"], results["training"]["qat"]
    results["steps"][3] |= {"status": "skipped", "message": "qat.enabled is false"}
    for variant in results["variants"].values():
        variant["bench"] = []
    results["verdict"] = decide(results["variants"], 0.1)
    page = check_page(render_html(results))
    assert "Not available: step qat skipped: qat.enabled is false." in page.text
    assert "Latency" not in page.text and "chart-profile" not in page.ids


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
    assert list(charts) == [*CHARTS, "training-float"]
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
    assert chart.caption == (
        "Change in accuracy against float, the largest first; 12 of 100 classes. 1 of 100 classes did not change."
    )
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


# --- layers, graph, islands


def layer_charts(results: dict[str, Any]) -> dict[str, Any]:
    return {chart.name: chart for chart in draw_layer_charts(results)}


def test_every_chart_has_its_numbers():
    results = make_results()
    for chart in (*draw_charts(results), *draw_layer_charts(results)):
        assert chart.table.rows, chart.name
        assert {len(row) for row in chart.table.rows} == {len(chart.table.columns)}, chart.name
        assert all(isinstance(cell, str) for row in chart.table.rows for cell in row), chart.name


def test_noise_stands_beside_parity():
    results = make_results()
    results["variants"]["qat"]["parity"] = make_parity([make_operator("conv1", identical=0.9, max_lsb=3)])
    chart = layer_charts(results)["noise"]
    assert "conv1 41.2 dB; add1 44.0 dB; softmax 50.1 dB" in chart.description
    assert ("conv1", "QAT", "CONV_2D", "41.2 dB", "39.2 dB", "90.000 %", "3") in chart.table.rows
    assert ("add1", "QAT", "ADD", "44.0 dB", "42.0 dB", "-", "-") in chart.table.rows
    assert "var(--bad)" in chart.svg  # conv1 misses its bound
    assert "var(--bad)" not in layer_charts(make_results())["noise"].svg


def test_the_noisiest_layers_of_a_large_model_are_drawn_and_all_are_in_the_table():
    results = make_results()
    row = make_layers()[0] | {"weights": None, "activations": None}
    layers = [row | {"operator": f"op{index}", "own_sqnr_db": float(20 + index)} for index in range(100)]
    results["variants"]["qat"]["layers"] = layers
    chart = layer_charts(results)["noise"]
    assert "The 40 noisiest of 100 operators." in chart.caption
    assert ">op39<" in chart.svg and ">op40<" not in chart.svg
    assert sum(cells[0].startswith("op") for cells in chart.table.rows) == 100


def test_ranges_over_training():
    chart = layer_charts(make_results())["ranges"]
    assert chart.table.rows == (
        ("conv1_relu", "0 to 6", "0 to 3.5", "41.7 %"),
        ("add1", "-1 to 3", "-1 to 3", "0.0 %"),
    )


def test_histograms_say_how_the_grid_is_used():
    charts = layer_charts(make_results())
    # 5 + 30 of 593 in the bins at the ends; the bin of 0 has 9.
    assert charts["weights"].table.rows == (("conv1", "CONV_2D", "8", "5.90 %", "1.52 %"),)
    operator, kind, central, clipped = charts["outputs"].table.rows[0]
    assert (operator, kind, clipped) == ("conv1", "CONV_2D", "0.20 %")
    assert central == "-128 to 126"


def test_time_by_kind_of_operator():
    chart = layer_charts(make_results())["profile"]
    assert "CONV_2D float 600.00 µs, PTQ 200.00 µs, QAT 200.00 µs; ADD float 30.00 µs" in chart.description
    assert len(chart.table.rows) == 9


def test_graph_shows_each_tensor_with_its_grid():
    graph = draw_graph(make_results())
    assert graph is not None and graph.file == "qat.tflite"
    for text in (
        "CONV_2D",
        "conv1_relu",
        "int8 1 \N{MULTIPLICATION SIGN} 32 \N{MULTIPLICATION SIGN} 32",
        "scale 0.0235, zero point -128",
        "41.2 dB",
        "(output)",
    ):
        assert text in graph.svg
    paths = re.findall(r'<path d="([^"]+)"', graph.svg)
    # Three steps down the column, and one lane around conv1 from the input to add1.
    assert sorted("H" in path for path in paths) == [False, False, False, True]
    assert graph.table.rows[2][:4] == ("add1", "2", "ADD", "conv1_relu, image")


def test_lanes_do_not_cross_what_overlaps():
    from mobileqat.report.graph import _lanes

    edges = [(0, 4), (1, 3), (3, 6), (2, 9)]
    lanes = _lanes(edges)
    for first in edges:
        for other in edges:
            if first != other and first[0] < other[1] and other[0] < first[1]:
                assert lanes[first] != lanes[other], (first, other)
    assert lanes[1, 3] == lanes[3, 6] == 0


def test_a_graph_that_is_too_large_is_not_drawn():
    results = make_results()
    results["graph"] = {"variant": "qat", "omitted": 1234}
    assert "qat.tflite has 1234 operators: too many to draw." in check_page(render_html(results)).text


def test_what_is_excluded_says_why_and_what_it_costs():
    results = make_results()
    results["islands"] = make_islands()
    profile = results["variants"]["qat"]["bench"][0]["profile"]
    profile[1]["name"] = "add1/float32"
    profile += [{"name": "conv1_relu/float32", "kind": "DEQUANTIZE", "cost": 0.004, "calls": 1}]
    excluded, borders = excluded_table(results), border_table(results)
    assert excluded is not None and borders is not None
    assert excluded.rows == (
        ("add1", "ADD", "exclude: add*", "50.00 µs"),
        ("more", "MUL", "follows what it reads", "-"),
    )
    assert [row[1:] for row in borders.rows] == [
        ("DEQUANTIZE", "conv1", "add1", "4,096"),
        ("QUANTIZE", "add1", "the output", "4,096"),
    ]
    assert cost_sentence(results) == (
        "Of 264.00 µs in operators measured one by one, those in float take 50.00 µs and conversions 4.00 µs."
    )
    page = check_page(render_html(results))
    assert "exclude: add*" in page.text and "Nothing is excluded" not in page.text


def test_nothing_excluded_is_said():
    assert "Nothing is excluded" in check_page(render_html(make_results())).text
