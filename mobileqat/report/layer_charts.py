"""Charts that look inside the files: noise and parity by layer, ranges over training, histograms, operators' costs.

Each shows a bounded part of a large model, the worst first where there is a worst; its table has everything that
report.json has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mobileqat.report import formats
from mobileqat.report.charts import (
    BAD,
    COLOURS,
    INK,
    MARKERS,
    Chart,
    Table,
    chart_style,
    drawn,
    label_rows,
    panels,
    shortened,
)
from mobileqat.report.results import VARIANTS, lookup, number, present_variants

_MOST_LAYERS = 40
_MOST_RANGES = 30
_MOST_KINDS = 10
_PANELS = 3  # ranges beside each other


def draw_layer_charts(results: Mapping[str, Any]) -> list[Chart]:
    """Every chart of layers that `results` has the data for."""
    with chart_style():
        return [chart for draw in _DRAWINGS if (chart := draw(results))]


def layer_rows(variant: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Noise and parity of each operator of a file, in execution order: either may be missing."""
    noise = {row["operator"]: row for row in variant.get("layers") or []}
    parity = {row["operator"]: row for row in lookup(variant, "parity", "operators") or []}
    # Parity knows every operator; noise only those that round.
    return [{**noise.get(name, {}), **parity.get(name, {})} for name in dict.fromkeys([*parity, *noise])]


# --- noise


def _draw_noise(results: Mapping[str, Any]) -> Chart | None:
    variants = present_variants(results.get("variants"))
    rows = {name: layer_rows(variant) for name, variant in variants.items() if variant.get("layers")}
    if not rows:
        return None
    last = list(rows)[-1]
    noisy = [row for row in rows[last] if number(row, "own_sqnr_db") is not None]
    worst = sorted(noisy, key=lambda row: row["own_sqnr_db"])[:_MOST_LAYERS]
    shown = [row for row in noisy if row in worst]
    if not shown:
        return None
    figure, (axes,) = panels(85 + 18 * len(shown))
    for name, layers in rows.items():
        found = {row["operator"]: row for row in layers}
        places = [place for place, row in enumerate(shown) if row["operator"] in found]
        own = [_drawable(found[shown[place]["operator"]], "own_sqnr_db") for place in places]
        all_of_it = [_drawable(found[shown[place]["operator"]], "sqnr_db") for place in places]
        marker, colour = MARKERS[name], COLOURS[name]
        axes.plot(own, places, marker, ms=5, color=colour, label=f"{VARIANTS[name]}, alone")
        axes.plot(all_of_it, places, "|", ms=9, mew=1.6, color=colour, label=f"{VARIANTS[name]}, in the model")
    _write_parity(axes, shown)
    label_rows(axes, [shortened(row["operator"]) for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.9)
    axes.set_xlabel("signal to quantization noise, dB")
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    omitted = f" The {len(shown)} noisiest of {len(noisy)} operators." if len(shown) < len(noisy) else ""
    words = (f"{row['operator']} {decibels(row['own_sqnr_db'])}" for row in shown)
    return drawn(
        figure,
        "noise",
        "Which layers add noise, and do they match?",
        "More dB is better; 6 dB are one bit. Filled: the operator alone. Line: with the noise of all before it. "
        f"Right: share of {VARIANTS[last]}'s outputs that equal the simulation's.{omitted}",
        f"Signal to quantization noise of each operator of {VARIANTS[last]}, alone: {'; '.join(words)}.",
        _noise_table(rows),
    )


def _drawable(row: Mapping[str, Any], key: str) -> float:
    """NaN for what is missing, which leaves no mark."""
    value = number(row, key)
    return math.nan if value is None else value


def decibels(value: float | None) -> str:
    return formats.MISSING if value is None else f"{value:.1f} dB"


def _write_parity(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Beside each row, outside the axes."""
    for place, row in enumerate(rows):
        if number(row, "identical") is not None:
            text, is_good = formats.exact_percent(row["identical"]).replace(".000", ""), row.get("passed")
            axes.annotate(
                text,
                (1, place),
                (5, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center_baseline",
                color=INK if is_good else BAD,
                fontsize=10,
                annotation_clip=False,
            )


def _noise_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    cells = [
        (
            row["operator"],
            VARIANTS[name],
            row["kind"],
            decibels(number(row, "own_sqnr_db")),
            decibels(number(row, "sqnr_db")),
            formats.exact_percent(number(row, "identical")),
            formats.significant(number(row, "max_lsb")),
        )
        for name, layers in rows.items()
        for row in layers
    ]
    columns = ("Operator", "File", "Kind", "SQNR alone", "SQNR in the model", "Identical outputs", "Largest LSB")
    return Table(columns, tuple(cells))


# --- ranges


def _draw_ranges(results: Mapping[str, Any]) -> Chart | None:
    history = lookup(results, "training", "qat", "ranges") or []
    if len(history) < 2:
        return None
    epochs = [row["epoch"] for row in history]
    tensors = list(history[0]["ranges"])
    spans = {name: [row["ranges"][name] for row in history if name in row["ranges"]] for name in tensors}
    spans = {name: span for name, span in spans.items() if len(span) == len(epochs)}
    moved = sorted(spans, key=lambda name: -_movement(spans[name]))[:_MOST_RANGES]
    shown = [name for name in spans if name in moved]
    if not shown:
        return None
    rows = -(-len(shown) // _PANELS)
    figure, places = panels(30 + 66 * rows, rows, _PANELS)
    colour = COLOURS["qat"]
    for axes, name in zip(places, shown, strict=False):
        low, high = zip(*spans[name], strict=True)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.25, lw=0)
        axes.plot(epochs, low, lw=1.2, color=colour)
        axes.plot(epochs, high, lw=1.2, color=colour)
        axes.set_title(shortened(name, 22), fontsize=8, loc="left", pad=3)
        axes.set_yticks(sorted({low[-1], high[-1]}), [f"{end:.3g}" for end in sorted({low[-1], high[-1]})])
        axes.set_xticks([epochs[0], epochs[-1]])
        axes.tick_params(labelsize=7, length=2, pad=2)
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    omitted = f" The {len(shown)} of {len(spans)} that moved most." if len(shown) < len(spans) else ""
    words = (f"{name} from {_span(spans[name][0])} to {_span(spans[name][-1])}" for name in shown)
    cells = [(name, _span(span[0]), _span(span[-1]), f"{100 * _movement(span):.1f} %") for name, span in spans.items()]
    return drawn(
        figure,
        "ranges",
        "Did the ranges settle?",
        "Real range of each activation tensor that is observed, by epoch of QAT; 0 is calibration. Numbers: the range "
        f"at the end.{omitted}",
        f"Ranges over training: {'; '.join(words)}.",
        Table(("Tensor", "Calibrated", "At the end", "Largest change, of its width"), tuple(cells)),
    )


def _movement(span: Sequence[Sequence[float]]) -> float:
    """The farthest that an end went, as a share of the width at the start."""
    (low, high), width = span[0], max(span[0][1] - span[0][0], 1e-12)
    return max(max(abs(row[0] - low), abs(row[1] - high)) for row in span) / width


def _span(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4g} to {ends[1]:.4g}"


# --- histograms


def _draw_weights(results: Mapping[str, Any]) -> Chart | None:
    last, rows = _with_histograms(results, "weights")
    if last is None:
        return None
    cells = [(*_head(row), *_weight_cells(row["weights"])) for row in rows]
    words = (f"{row[0]}, {row[2]} bits, {row[3]} at the ends" for row in cells)
    return drawn(
        _small_histograms(rows, "weights", COLOURS[last]),
        "weights",
        "Are the weights' integers well used?",
        f"Integers of the kernels of {VARIANTS[last]}{_which(results, last)}. Height: logarithm of the count. Each "
        "channel has a scale of its own, so that each reaches an end.",
        f"Weights on their integer grid: {'; '.join(words)}.",
        Table(("Operator", "Kind", "Bits", "Share in the end bins", "Share in the middle bin"), tuple(cells)),
    )


def _draw_outputs(results: Mapping[str, Any]) -> Chart | None:
    last, rows = _with_histograms(results, "activations")
    if last is None:
        return None
    cells = [
        (*_head(row), _central(row["activations"]), formats.percent(number(row, "activations", "clipped")))
        for row in rows
    ]
    words = (f"{row[0]} from {row[2]}, {row[3]} clipped" for row in cells)
    return drawn(
        _small_histograms(rows, "activations", COLOURS[last]),
        "outputs",
        "Do the outputs fit their grid?",
        f"Float outputs in units of {VARIANTS[last]}'s integers{_which(results, last)}. Height: logarithm of the "
        "count. Lines: the ends of the grid, beyond which values are clipped.",
        f"Central 99.9 % of the outputs, in integers: {'; '.join(words)}.",
        Table(("Operator", "Kind", "Central 99.9 %, in integers", "Clipped"), tuple(cells)),
    )


def _with_histograms(results: Mapping[str, Any], part: str) -> tuple[str | None, list[dict[str, Any]]]:
    """The last variant whose layers were recorded, and its operators that have this histogram."""
    variants = present_variants(results.get("variants"))
    for name in reversed(list(variants)):
        rows = [row for row in variants[name].get("layers") or [] if row.get(part)]
        if rows:
            return name, rows
    return None, []


def _which(results: Mapping[str, Any], variant: str) -> str:
    rows = results["variants"][variant]["layers"]
    shown = sum(bool(row.get("activations")) for row in rows)
    return f", of the {shown} noisiest of {len(rows)} operators" if shown < len(rows) else ""


def _head(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["operator"], row["kind"]


def _small_histograms(rows: Sequence[Mapping[str, Any]], part: str, colour: str) -> Any:
    lines = -(-len(rows) // 2)
    figure, places = panels(20 + 66 * lines, lines, 2)
    for axes, row in zip(places, rows, strict=False):
        axes.set_title(shortened(row["operator"], 28), fontsize=9, loc="left", pad=2)
        _stairs(axes, row[part], colour)
    for axes in places[len(rows) :]:
        axes.set_axis_off()
    return figure


def _stairs(axes: Any, histogram: Mapping[str, Any], colour: str) -> None:
    counts, low, step = histogram["counts"], histogram["low"], histogram["step"] or 1.0
    edges = [low + step * place for place in range(len(counts) + 1)]
    axes.stairs([math.log10(1 + count) for count in counts], edges, fill=True, color=colour, alpha=0.75)
    ends = [histogram["qmin"], histogram["qmax"]]
    for end in ends:
        axes.axvline(end, color=INK, lw=0.8, ls=":")
    axes.set_xticks(ends, [str(end) for end in ends])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=8, length=2, pad=2)


def _weight_cells(histogram: Mapping[str, Any]) -> tuple[str, str, str]:
    counts, total = histogram["counts"], max(sum(histogram["counts"]), 1)
    middle = int((0 - histogram["low"]) // histogram["step"])
    ends = counts[0] + counts[-1] if len(counts) > 1 else counts[0]
    return str(histogram["bits"]), formats.percent(ends / total), formats.percent(counts[middle] / total)


def _central(histogram: Mapping[str, Any]) -> str:
    """Where the central 99.9 % of the values lie, in integers."""
    counts, low, step = histogram["counts"], histogram["low"], histogram["step"]
    tail = 0.0005 * sum(counts)
    first = _place_of(counts, tail)
    last = len(counts) - 1 - _place_of(counts[::-1], tail)
    return f"{low + step * first:.0f} to {low + step * (last + 1):.0f}"


def _place_of(counts: Sequence[int], tail: float) -> int:
    total = 0.0
    for place, count in enumerate(counts):
        total += count
        if total > tail:
            return place
    return 0


# --- profile


def _draw_profile(results: Mapping[str, Any]) -> Chart | None:
    profiles = operator_costs(results)
    if not profiles:
        return None
    kinds: dict[str, dict[str, float]] = {}
    for name, rows in profiles.items():
        for row in rows:
            kinds.setdefault(row["kind"], dict.fromkeys(profiles, 0.0))[name] += row["cost"]
    largest = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))
    shown = largest[:_MOST_KINDS]
    figure, (axes,) = panels(80 + (8 + 14 * len(profiles)) * len(shown))
    height = 0.8 / len(profiles)
    for index, name in enumerate(profiles):
        places = [place + (index - (len(profiles) - 1) / 2) * height for place in range(len(shown))]
        values = [1e3 * kinds[kind][name] for kind in shown]
        axes.barh(places, values, 0.9 * height, color=COLOURS[name], label=VARIANTS[name])
    label_rows(axes, [shortened(kind) for kind in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("time per inference, µs")
    figure.legend(loc="outside lower center", ncols=len(profiles))
    omitted = f" The {len(shown)} largest of {len(largest)} kinds." if len(shown) < len(largest) else ""
    words = (
        f"{kind} " + ", ".join(f"{VARIANTS[name]} {_microseconds(cost)}" for name, cost in kinds[kind].items())
        for kind in shown
    )
    return drawn(
        figure,
        "profile",
        "Which operators take the time?",
        "Each operator measured as a model of its own on this machine, summed by kind: without what the runtime fuses "
        f"across operators, and with what each invocation costs.{omitted}",
        f"Time by kind of operator: {'; '.join(words)}.",
        _profile_table(profiles),
    )


def operator_costs(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of every operator by variant, from the first place that has them for some file."""
    variants = present_variants(results.get("variants"))
    for index in range(max((len(v.get("bench") or []) for v in variants.values()), default=0)):
        found = {}
        for name, variant in variants.items():
            record = (variant.get("bench") or [])[index : index + 1]
            if record and record[0].get("unit") == "ms" and record[0].get("profile"):
                found[name] = record[0]["profile"]
        if found:
            return found
    return {}


def _profile_table(profiles: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Operators of each file; a float file names its own tensors, so that operators stand in execution order."""
    rows = [
        (shortened(row["name"], 60), VARIANTS[name], row["kind"], _microseconds(row["cost"]))
        for name, operators in profiles.items()
        for row in operators
    ]
    return Table(("Output tensor", "File", "Operator", "Time"), tuple(rows))


def _microseconds(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:,.2f} µs"


_DRAWINGS = (_draw_profile, _draw_ranges, _draw_noise, _draw_weights, _draw_outputs)
