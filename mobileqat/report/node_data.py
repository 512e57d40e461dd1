"""Noise and parity of each operator as node data of Model Explorer (`ai-edge-model-explorer`), to lay over a `.tflite`.

One file per quantity, since its name is what Model Explorer shows: `{graph: {"results": {tensor: {"value"}}, ...}}`.  A
node is found by the name of a tensor that it makes; the main graph of a `.tflite` file is called "main".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobileqat.report.layer_charts import layer_rows
from mobileqat.report.results import number, present_variants

GRAPH = "main"
_NOISE_COLOURS = [{"stop": 0, "bgColor": "#f4a582"}, {"stop": 1, "bgColor": "#ffffff"}]  # least dB, most dB
_FAILED, _PASSED, _EXACT = "#f4a582", "#fddbc7", "#d9f0d3"


def node_data(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> content, for each integer file and quantity that `results` has."""
    made_by = {row["layers"][0]: row["tensor"] for row in results.get("plan") or [] if row.get("layers")}
    files = {}
    for name, variant in present_variants(results.get("variants")).items():
        rows = [(row.get("tensor") or made_by.get(row["operator"]), row) for row in layer_rows(variant)]
        known = [(tensor, row) for tensor, row in rows if tensor]
        for key, column in (("sqnr_db", "own_sqnr_db"), ("sqnr_in_model_db", "sqnr_db")):
            values = {tensor: {"value": row[column]} for tensor, row in known if number(row, column) is not None}
            if values:
                files[f"{name}_{key}.json"] = {GRAPH: {"results": values, "gradient": _NOISE_COLOURS}}
        parity = {tensor: _parity(row) for tensor, row in known if number(row, "identical") is not None}
        if parity:
            files[f"{name}_identical_percent.json"] = {GRAPH: {"results": parity}}
    return files


def _parity(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each operator has a bar of its own, hence a colour of its own."""
    colour = _FAILED if not row.get("passed") else _EXACT if row["identical"] == 1 else _PASSED
    return {"value": 100 * row["identical"], "bgColor": colour, "textColor": "#000000"}
