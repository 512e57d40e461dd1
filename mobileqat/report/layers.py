"""An analysis of layers on a terminal and as SVG files, from its JSON-able form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mobileqat.report import formats
from mobileqat.report.charts import canvas, chart_style, label_rows, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN_LAYERS = 8  # histograms of the worst ones
_BLUE, _ORANGE = "#1f6feb", "#d9730d"


LEGEND = "SQNR: of this layer's own rounding; channel: of its median channel; in model: with the noise of all before it"
METRIC_LEGEND = ". Change of accuracy, alone: only this layer quantized; all but it: only this layer in float."


def print_analysis(analysis: Mapping[str, Any]) -> None:
    """The ranked layers as a table, what to try below it, and the recommendation at the end."""
    console = Console(highlight=False, soft_wrap=True)
    float_metric, metric = analysis["float_metric"], analysis["quantized_metric"]
    has_metric = float_metric is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=16)
    for column in ["kind", "SQNR", "channel", "in model", *(["alone", "all but it"] if has_metric else [])]:
        table.add_column(column, no_wrap=True)
    for row in analysis["layers"]:
        bits = f", {row['weights']['bits']} bits" if row["weights"] else ""
        noise = [decibels(row[key]) for key in ("own_sqnr_db", "channel_sqnr_db", "sqnr_db")]
        cells = [row["name"], row["kind"] + bits, *noise]
        if has_metric:
            cells += [
                formats.points(100 * (row["only"] - float_metric)),
                formats.points(100 * (row["without"] - metric)),
            ]
        table.add_row(*cells)
    if has_metric:
        console.print(f"float {formats.percent(float_metric)}, quantized {formats.percent(metric)}")
    console.print(table)
    console.print(LEGEND + (METRIC_LEGEND if has_metric else "."), style="dim")
    for row in analysis["layers"]:
        for advice in row["advice"]:
            console.print(f"  - {row['name']}: {advice}", markup=False)
    console.print(analysis["recommendation"], markup=False)


def print_search(found: Mapping[str, Any]) -> None:
    """The front, the chosen mixture layer by layer, and what real conversions gave."""
    console = Console(highlight=False, soft_wrap=True)
    write = formats.kilobytes if found["what"] == "size" else formats.milliseconds
    table = Table(found["what"], "accuracy", "layers", box=None, pad_edge=False)
    for mixture in found["front"]:
        chosen = list(mixture["choices"].values())
        counts = ", ".join(f"{chosen.count(name)} {name}" for name in dict.fromkeys(chosen))
        mark = " (chosen)" if mixture == found["chosen"] else ""
        table.add_row(write(mixture["cost"]), formats.percent(mixture["metric"]), counts + mark)
    console.print(table)
    for layer, choice in found["chosen"]["choices"].items():
        console.print(f"  {layer}: {choice}", markup=False)
    console.print("Weights rounded to nearest, biases corrected; train learns how to round 2 to 7 bits.", style="dim")
    for row in found["verified"]:
        mark = "chosen, " if row["choices"] == found["chosen"]["choices"] else ""
        size, share = formats.kilobytes(row["size_bytes"]), formats.percent(row["accuracy"])
        over = row["size_bytes"] - found["budget"] if mark and found["what"] == "size" else 0
        excess = f"; {over:,.0f} B more than the budget" if over > 0 else ""
        console.print(f"converted: {mark}{size}, {share} of the test samples{excess}", markup=False)


def decibels(value: float) -> str:
    return f"{value:.1f} dB"


def write_analysis(analysis: Mapping[str, Any], folder: Path) -> None:
    """Writes analysis.json and the charts as SVG files into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(analysis, indent=1, allow_nan=False))
    layers = analysis["layers"]
    if not layers:
        return
    with chart_style():
        _save(_draw_sqnr(layers), folder / "sqnr.svg")
        if analysis["float_metric"] is not None:
            _save(_draw_metric(analysis), folder / "metric.svg")
        for index, layer in enumerate(layers[:DRAWN_LAYERS], 1):
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", layer["name"])
            _save(_draw_histograms(layer), folder / f"layer-{index:02d}-{name}.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_sqnr(layers: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = canvas(height=80 + 18 * len(layers))
    places = list(range(len(layers)))
    axes.plot([row["own_sqnr_db"] for row in layers], places, "o", color=_BLUE, ms=6, label="this layer alone")
    axes.plot([row["sqnr_db"] for row in layers], places, "|", color=_ORANGE, ms=10, mew=2, label="in the whole model")
    return _finished(figure, axes, layers, "signal to quantization noise, dB")


def _draw_metric(analysis: Mapping[str, Any]) -> Figure:
    layers = analysis["layers"]
    figure, axes = canvas(height=80 + 18 * len(layers))
    places = list(range(len(layers)))
    lost = [100 * (row["only"] - analysis["float_metric"]) for row in layers]
    won = [100 * (row["without"] - analysis["quantized_metric"]) for row in layers]
    axes.barh([p - 0.2 for p in places], lost, 0.36, color=_ORANGE, label="only this one quantized")
    axes.barh([p + 0.2 for p in places], won, 0.36, color=_BLUE, label="only this one in float")
    return _finished(figure, axes, layers, "change of the metric, points")


def _finished(figure: Figure, axes: Axes, layers: Sequence[Mapping[str, Any]], label: str) -> Figure:
    label_rows(axes, [shortened(row["name"]) for row in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_histograms(layer: Mapping[str, Any]) -> Figure:
    """Counts, logarithmic, of the activations with the ends of their grid, and of the weights' integers."""
    from matplotlib.figure import Figure

    parts = [("activations", layer["activations"])]
    parts += [("weights, integers", layer["weights"])] if layer["weights"] else []
    figure = Figure(figsize=(400 / 72, 180 * len(parts) / 72), layout="constrained")
    figure.suptitle(layer["name"], fontsize=11)
    for axes, (title, values) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        histogram = values["histogram"]
        counts, low, high = histogram["counts"], histogram["low"], histogram["high"]
        width = (high - low) / max(len(counts) - (title != "activations"), 1)
        start = low + width / 2 if title == "activations" else low
        axes.bar([start + width * k for k in range(len(counts))], counts, width, color=_BLUE)
        if title == "activations":
            for end in (values["low"], values["high"]):
                axes.axvline(end, color=_ORANGE, lw=1.2)
        axes.set_yscale("log")
        # The default writes powers as mathematics, which the style takes for plain text.
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel("count")
        axes.set_xlabel(title)
    return figure
