"""What is written beside the page: the model card and node data for Model Explorer."""

import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from run_results import make_failed_results, make_operator, make_parity, make_results

from mobileqat.report import write_report
from mobileqat.report.model_card import render_card
from mobileqat.report.node_data import node_data


def card(results: dict[str, Any]) -> str:
    """As HTML, since that is how it is read."""
    return MarkdownIt("commonmark").enable("table").render(render_card(results))


def with_digests() -> dict[str, Any]:
    results = make_results()
    for name, variant in results["variants"].items():
        variant["inspection"]["sha256"] = f"{name}-digest"
    return results


def test_card_of_a_complete_run() -> None:
    results = with_digests()
    html = card(results).replace("\N{NO-BREAK SPACE}", " ")
    assert html.startswith("<h1>cifar10_resnet8_w8a8</h1>")
    assert html.count("<table>") == 2 and html.count("<pre>") == 1
    for text in (
        results["verdict"]["headline"],
        "qat.tflite: SHA-256 <code>qat-digest</code>",
        "QAT: 87.30 %, 95 % confidence interval 86.63 % to 87.94 %",
        "<td>serving_default_image:0</td>",
        "airplane, automobile",
        "The least accurate classes of QAT: airplane (79.60 %)",
        "77,360 of 77,360 weight integers are identical",
        "45,000 training, 5,000 validation, 10,000 test and 512 calibration samples",
        "Made by mobileqat 0.1.0 on 2026-11-20T16:00:00+00:00",
        "machine: cpu: AMD EPYC 7B13",
        "epochs: 10",
    ):
        assert text in html, text
    assert "None" not in html and "Undefined" not in html


def test_names_from_users_are_no_markdown() -> None:
    results = with_digests()
    results["name"] = "# <script>alert(1)</script>"
    results["description"] = "a | b\n\n# no heading\n```\n"
    results["data"]["class_names"][0] = "[link](javascript:x) *bold* `code`"
    results["variants"]["qat"]["inspection"]["inputs"][0]["name"] = "a|b\n| c"
    results["recipe"]["note"] = "```\n# not a heading\n````"
    html = card(results)
    assert html.count("<h1>") == 1 and "<script" not in html and "<a " not in html
    assert "<em>" not in html and "<strong>" not in html and "<td>a|b | c</td>" in html
    assert html.count("<h2>") == card(with_digests()).count("<h2>") and html.count("<pre>") == 1


@pytest.mark.parametrize("key", [None, *make_results()])
def test_any_part_may_be_missing(key: str | None) -> None:
    results = make_results()
    results.pop(key, None) if key else results.clear()
    html = card(results)
    assert "Undefined" not in html and "None" not in html


def test_node_data_is_keyed_by_tensors() -> None:
    results = make_results()
    results["plan"] = [{"tensor": "conv2/relu", "layers": ["conv2", "conv2/relu"]}]
    operators = [
        make_operator("conv1"),
        make_operator("conv2", identical=0.99995),
        make_operator("add1", "ADD", 0.5, 9),
    ]
    results["variants"]["qat"]["parity"] = make_parity(operators)
    results["variants"]["ptq"] |= {"layers": None, "parity": None}
    files = node_data(results)
    assert sorted(files) == ["qat_identical_percent.json", "qat_sqnr_db.json", "qat_sqnr_in_model_db.json"]
    noise = files["qat_sqnr_db.json"]["main"]
    assert noise["results"] == {"conv1_relu": {"value": 41.2}, "add1": {"value": 44.0}, "softmax": {"value": 50.1}}
    assert [row["stop"] for row in noise["gradient"]] == [0, 1]
    assert files["qat_sqnr_in_model_db.json"]["main"]["results"]["add1"] == {"value": 42.0}
    parity = files["qat_identical_percent.json"]["main"]["results"]
    assert {name: row["value"] for name, row in parity.items()} == pytest.approx(
        {"conv1_relu": 100, "conv2/relu": 99.995, "add1": 50}
    )
    assert len({row["bgColor"] for row in parity.values()}) == 3  # exact, within its bar, beyond it


def test_everything_is_written_and_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        assert write_report(make_results(), tmp_path) == tmp_path / "report.html"
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        kinds = ("identical_percent", "sqnr_db", "sqnr_in_model_db")
        assert found == {"report.html", "model_card.md"} | {
            f"model_explorer/{variant}_{kind}.json" for variant in ("ptq", "qat") for kind in kinds
        }
    for path in tmp_path.glob("model_explorer/*.json"):
        assert json.loads(path.read_text())["main"]["results"]


def test_a_failed_run_has_no_card(tmp_path: Path) -> None:
    write_report(make_failed_results(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
