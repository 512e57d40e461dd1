"""The charts of the page as inline SVG, each the answer to a question and with its content in words.

matplotlib draws with placeholder colours; the SVG then gets the page's CSS variables (`currentColor` for text
and axes), so that it follows dark mode, and is 400 px wide, so that its text stays readable on a phone.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mobileqat.report import formats
from mobileqat.report.results import (
    VARIANTS,
    Place,
    accuracy,
    cost,
    cost_places,
    cost_ratio,
    difference_points,
    number,
    present_variants,
    wilson_interval,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 400  # px
INK = "#010203"
COLOURS = {"float": "#010204", "ptq": "#010205", "qat": "#010206"}
BAD = "#010207"
_CSS_COLOURS = {INK: "currentColor", BAD: "var(--bad)"} | {colour: f"var(--{name})" for name, colour in COLOURS.items()}
MARKERS = {"float": "s", "ptq": "o", "qat": "D"}
_MOST_CLASSES = 12
_LABEL_CHARACTERS = 20
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mobileqat",  # the same ids each time
    "text.parse_math": False,  # "$" in the name of a class is a "$"
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Table:
    """The numbers behind a chart, as written; the first cell of a row names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_numeric(self) -> list[bool]:
        """Whether a column holds numbers, or nothing."""
        return [all(row[place][:1] in tuple("+-0123456789") for row in self.rows) for place in range(len(self.columns))]


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        svg: markup, safe to insert; labelled with `description`.
        caption: how to read it.
        description: the content in words, for those who do not see it.
        table: its numbers.
    """

    name: str
    title: str
    svg: str
    caption: str
    description: str
    table: Table

    @property
    def height(self) -> float:
        """Of the drawing, in its own units."""
        return float(self.svg.split('viewBox="', 1)[1].split('"', 1)[0].split()[3])


def draw_charts(results: Mapping[str, Any]) -> list[Chart]:
    """Every chart that `results` has the data for."""
    with chart_style():
        return [chart for draw in _DRAWINGS if (chart := draw(results))]


@contextlib.contextmanager
def chart_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib's font only estimates widths; the browser draws with one that has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


# --- the charts


def _draw_accuracy(results: Mapping[str, Any]) -> Chart | None:
    variants = present_variants(results.get("variants"))
    shares = {name: share for name in variants if (share := accuracy(variants[name])) is not None}
    if not shares:
        return None
    figure, axes = canvas(height=70 + 40 * len(shares))
    words, rows = [], []
    for row, (name, share) in enumerate(shares.items()):
        colour, marker, text = COLOURS[name], MARKERS[name], formats.percent(share)
        samples = number(variants[name], "accuracy", "samples")
        low, high = wilson_interval(share, samples) if samples else (share, share)
        axes.plot([100 * low, 100 * high], [row, row], lw=1.2, color=colour)
        axes.plot(100 * share, row, marker, ms=7, color=colour)
        axes.annotate(text, (100 * share, row), (0, 9), textcoords="offset points", ha="center")
        words.append(f"{VARIANTS[name]} {text} ({formats.percent(low)} to {formats.percent(high)})")
        simulation = number(variants[name], "accuracy", "simulation")
        rows.append((VARIANTS[name], text, *map(formats.percent, (low, high, simulation)), formats.count(samples)))
        if simulation is not None:
            axes.plot(100 * simulation, row, marker, ms=11, mfc="none", mec=colour, mew=1)
    label_rows(axes, [VARIANTS[name] for name in shares])
    axes.set_ylim(len(shares) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.set_xlabel("accuracy, %")
    return drawn(
        figure,
        "accuracy",
        "What does quantization cost?",
        "Accuracy of each file in the interpreter, with its 95 % confidence interval. Outline: Keras "
        "simulation. The axis does not start at zero.",
        f"Accuracy in the interpreter: {'; '.join(words)}.",
        Table(("File", "Accuracy", "95 % interval from", "to", "Simulation", "Samples"), tuple(rows)),
    )


def _draw_tradeoff(results: Mapping[str, Any]) -> Chart | None:
    variants = present_variants(results.get("variants"))
    places = list(cost_places(variants, "ms"))
    axes_of: list[tuple[str, Callable[[Any], float | None], Callable[[float | None], str]]] = []
    if places:
        label = f"latency, ms ({formats.place(*places[0])})"
        axes_of.append((label, lambda variant: cost(variant, places[0]), formats.milliseconds))
    axes_of.append(("size, kB", lambda variant: _thousands(number(variant, "size_bytes")), _kilobytes))
    shares = {name: share for name in variants if (share := accuracy(variants[name])) is not None}
    if len(shares) < 2:
        return None
    figure, places_of = panels(230, columns=len(axes_of))
    for axes, (label, quantity, _) in zip(places_of, axes_of, strict=True):
        for size, (name, share) in zip((12, 9, 6), shares.items(), strict=False):  # so that equal ones can be seen
            value = quantity(variants[name])
            if value is not None:
                axes.plot(value, 100 * share, MARKERS[name], ms=size, color=COLOURS[name], label=VARIANTS[name])
        axes.set_xlim(left=0, right=1.15 * max([quantity(variants[name]) or 0 for name in shares]) or 1)
        _percent_limits(axes, shares.values())
        axes.grid()
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(label, fontsize=10)
    places_of[0].set_ylabel("accuracy, %")
    for axes in places_of[1:]:
        axes.sharey(places_of[0])
        axes.tick_params(axis="y", labelleft=False)
    handles, labels = places_of[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    rows = [
        (VARIANTS[name], formats.percent(share), *(write(quantity(variants[name])) for _, quantity, write in axes_of))
        for name, share in shares.items()
    ]
    return drawn(
        figure,
        "tradeoff",
        "What does accuracy cost?",
        "Up and to the left is better. Accuracy does not start at zero, latency and size do.",
        f"Accuracy against cost: {'; '.join(', '.join(row) for row in rows)}.",
        Table(("File", "Accuracy", *(label for label, _, _ in axes_of)), tuple(rows)),
    )


def _thousands(value: float | None) -> float | None:
    return None if value is None else value / 1e3


def _kilobytes(value: float | None) -> str:
    return formats.kilobytes(None if value is None else 1e3 * value)


def _draw_classes(results: Mapping[str, Any]) -> Chart | None:
    differences = class_differences(results.get("variants"))
    changed = [(label, row) for label, row in differences if any(row.values())]
    if not changed:
        return None
    largest = sorted(changed, key=lambda row: -max(abs(d) for d in row[1].values()))[:_MOST_CLASSES]
    figure, axes = canvas(height=95 + 20 * len(largest))
    names = [name for name in VARIANTS if any(name in row for _, row in largest)]
    axes.axvline(0, color=INK, lw=0.8)
    for name, offset in zip(names, (-0.16, 0.16) if len(names) == 2 else (0,), strict=True):
        points = [row.get(name, math.nan) for _, row in largest]
        places = [place + offset for place in range(len(largest))]
        axes.plot(points, places, MARKERS[name], ms=5, color=COLOURS[name], label=VARIANTS[name])
    label_rows(axes, [shortened(label) for label, _ in largest])
    axes.set_ylim(len(largest) - 0.5, -0.5)
    axes.set_xlabel("difference to float, points")
    figure.legend(loc="outside lower center", ncols=len(names))
    omitted = f"; {len(largest)} of {len(differences)} classes" if len(changed) > len(largest) else ""
    same = len(differences) - len(changed)
    unchanged = f" {same} of {len(differences)} classes did not change." if same else ""
    words = (
        f"{label} " + ", ".join(f"{VARIANTS[n]} {formats.points(d)}" for n, d in row.items()) for label, row in largest
    )
    return drawn(
        figure,
        "classes",
        "Which classes pay?",
        f"Change in accuracy against float, the largest first{omitted}.{unchanged}",
        f"Difference to float in points, by class: {'; '.join(words)}.",
        _class_table(results, dict(differences)),
    )


def _class_table(results: Mapping[str, Any], differences: Mapping[str, Mapping[str, float]]) -> Table:
    names = [name for name in VARIANTS if any(name in row for row in differences.values())]
    rows = [
        (
            row["class"],
            formats.count(row.get("samples")),
            formats.percent(row["accuracy"]),
            *(formats.points(differences.get(row["class"], {}).get(name)) for name in names),
        )
        for row in results["variants"]["float"]["per_class"]
    ]
    return Table(("Class", "Samples", "float", *(f"{VARIANTS[name]} - float, points" for name in names)), tuple(rows))


def class_differences(variants: Mapping[str, Any] | None) -> list[tuple[str, dict[str, float]]]:
    """(class, {variant: points against float}) in the order of the classes."""
    shares = {
        name: {row["class"]: row["accuracy"] for row in variant.get("per_class") or []}
        for name, variant in present_variants(variants).items()
    }
    reference = shares.pop("float", {})
    rows = []
    for label, share in reference.items():
        found = {name: difference_points(other.get(label), share) for name, other in shares.items()}
        known = {name: difference for name, difference in found.items() if difference is not None}
        if known:
            rows.append((label, known))
    return rows


def _draw_qat_training(results: Mapping[str, Any]) -> Chart | None:
    training = results.get("training") or {}
    levels = {"float": _final_validation(training.get("float")), "ptq": _initial(training.get("qat"))}
    return _draw_training(
        training.get("qat"),
        "qat",
        {name: level for name, level in levels.items() if level is not None},
        "What did QAT gain?",
        "Validation accuracy of the quantized simulation after each epoch.",
    )


def _draw_float_training(results: Mapping[str, Any]) -> Chart | None:
    history = (results.get("training") or {}).get("float")
    caption = "Validation accuracy of the float model after each epoch."
    return _draw_training(history, "float", {}, "Had float training converged?", caption)


def _draw_training(
    history: Mapping[str, Any] | None, name: str, levels: Mapping[str, float], title: str, caption: str
) -> Chart | None:
    epochs = (history or {}).get("epochs") or []
    curve = {row["epoch"]: value for row in epochs if (value := number(row, "val_accuracy")) is not None}
    if not curve:
        return None
    from matplotlib.ticker import MaxNLocator

    before = _initial(history)
    if before is not None:
        curve = {0: before, **curve}
        caption += " Epoch 0: before training."
    training = {row["epoch"]: value for row in epochs if (value := number(row, "accuracy")) is not None}
    figure, axes = canvas(height=260)
    colour = COLOURS[name]
    if training:
        label = f"{VARIANTS[name]}, training data"
        axes.plot(list(training), _percents(training), lw=1, alpha=0.6, color=colour, label=label)
    axes.plot(list(curve), _percents(curve), "-o", ms=4, color=colour, label=f"{VARIANTS[name]}, validation")
    for level, style in zip(levels, ("--", "-."), strict=False):
        label = f"{VARIANTS[level]}, validation"
        axes.axhline(100 * levels[level], ls=style, lw=1.3, color=COLOURS[level], label=label)
    best = number(history, "best_epoch")
    words = [f"{VARIANTS[level]} {formats.percent(value)}" for level, value in levels.items()]
    words += [f"epoch {epoch} {formats.percent(value)}" for epoch, value in curve.items()]
    if best is not None and best in curve:
        axes.plot(best, 100 * curve[best], "o", ms=11, mfc="none", mec=colour, mew=1.2)
        words.append(f"best epoch {best}")
        caption += f" Ring: the epoch that was kept, {best}."
    _percent_limits(axes, [*training.values(), *curve.values(), *levels.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(axis="y")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    return drawn(
        figure,
        f"training-{name}",
        title,
        caption,
        f"Validation accuracy: {'; '.join(words)}.",
        _epoch_table(epochs, before),
    )


def _epoch_table(epochs: Sequence[Mapping[str, Any]], before: float | None) -> Table:
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "loss": ("Loss", formats.significant),
        "accuracy": ("Accuracy", formats.percent),
        "val_loss": ("Validation loss", formats.significant),
        "val_accuracy": ("Validation accuracy", formats.percent),
        "learning_rate": ("Learning rate", formats.significant),
        "seconds": ("Time", formats.seconds),
    }
    rows = [(str(row["epoch"]), *(write(number(row, key)) for key, (_, write) in columns.items())) for row in epochs]
    if before is not None:
        first = (formats.percent(before) if key == "val_accuracy" else formats.MISSING for key in columns)
        rows = [("0", *first), *rows]
    return Table(("Epoch", *(label for label, _ in columns.values())), tuple(rows))


def _initial(history: Mapping[str, Any] | None) -> float | None:
    return number(history, "initial_val_accuracy")


def _final_validation(history: Mapping[str, Any] | None) -> float | None:
    """Of the kept epoch, else the last; of the model as it came when it was not trained."""
    epochs = (history or {}).get("epochs") or []
    best = number(history, "best_epoch")
    if not epochs or best == 0:
        return _initial(history)
    kept = next((row for row in epochs if row.get("epoch") == best), epochs[-1])
    return number(kept, "val_accuracy")


def _draw_latency(results: Mapping[str, Any]) -> Chart | None:
    caption = "One inference{where}. Bar: median. Tick: 90th percentile."
    return _draw_costs(results, "ms", "latency", "Is it faster?", caption)


def _draw_instructions(results: Mapping[str, Any]) -> Chart | None:
    caption = "Executed instructions of one inference on an emulated core{where}: they repeat exactly, and are no time."
    return _draw_costs(results, "instructions", "instructions", "How much work is it on ARM?", caption)


def _draw_cycles(results: Mapping[str, Any]) -> Chart | None:
    caption = "Cycles of one inference{where}, as the compiler estimates them."
    return _draw_costs(results, "cycles", "cycles", "How long does an accelerator take?", caption)


def _draw_costs(results: Mapping[str, Any], unit: str, name: str, title: str, caption: str) -> Chart | None:
    variants = present_variants(results.get("variants"))
    write = formats.COSTS[unit]
    keys = cost_places(variants, unit)
    bars = [
        (variant, key, median)
        for key in keys
        for variant in variants
        if (median := cost(variants[variant], key)) is not None
    ]
    if not bars:
        return None
    figure, axes = canvas(height=60 + 30 * len(bars))
    label, one = ("ms", 1.0) if unit == "ms" else ("millions", 1e6)
    longest = max(max(median, cost(variants[n], key, "p90") or 0) for n, key, median in bars) / one
    for row, (variant, key, median) in enumerate(bars):
        p90 = (cost(variants[variant], key, "p90") or median) / one
        axes.barh(row, median / one, 0.6, color=COLOURS[variant])
        axes.plot([median / one, p90], [row, row], "-|", color=INK, lw=1, ms=7)
        axes.annotate(write(median), (p90, row), (5, 0), textcoords="offset points", va="center_baseline")
    several = len(keys) > 1
    labels = [f"{VARIANTS[n]}, {formats.place(*key)}" if several else VARIANTS[n] for n, key, _ in bars]
    label_rows(axes, labels)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xlabel(f"{name}, {label}")
    where = "" if several else f" ({formats.place(*next(iter(keys)))})"
    words = (f"{label} {write(bar[2])}" for label, bar in zip(labels, bars, strict=True))
    return drawn(
        figure,
        name,
        title,
        caption.format(where=where),
        f"Median {name}: {'; '.join(words)}.",
        _cost_table(variants, bars, write),
    )


def _cost_table(
    variants: Mapping[str, Any], bars: Sequence[tuple[str, Place, float]], write: Callable[[float | None], str]
) -> Table:
    rows = []
    for variant, key, median in bars:
        beside = formats.factor(cost_ratio(variants[variant], variants.get("float"), key))
        spread = (write(cost(variants[variant], key, statistic)) for statistic in ("min", "p90", "max"))
        rows.append((VARIANTS[variant], formats.place(*key), write(median), *spread, beside))
    columns = ("File", "Where", "Median", "Minimum", "90th percentile", "Maximum", "Ratio to float")
    return Table(columns, tuple(rows))


_DRAWINGS = (
    _draw_tradeoff,
    _draw_accuracy,
    _draw_classes,
    _draw_latency,
    _draw_instructions,
    _draw_cycles,
    _draw_qat_training,
    _draw_float_training,
)


# --- drawing


def canvas(height: float) -> tuple[Figure, Axes]:
    figure, (axes,) = panels(height)
    return figure, axes


def panels(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with axes row by row; the SVG's unit is 1/72 inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _percent_limits(axes: Axes, shares: Iterable[float]) -> None:
    """Room around the values, and no axis of less than a point: what is equal shall look equal."""
    low, high = 100 * min(shares), 100 * max(shares)
    room = max(0.15 * (high - low), 0.5)
    axes.set_ylim(low - room, high + room)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - room <= tick <= min(high + room, 100)])


def _percents(curve: Mapping[int, float]) -> list[float]:
    return [100 * value for value in curve.values()]


def shortened(label: str, characters: int = _LABEL_CHARACTERS) -> str:
    """The end of a long label tells layers apart as often as its start: the middle goes."""
    label = printable(label)
    if len(label) <= characters:
        return label
    start = (characters - 1) // 2
    return f"{label[:start]}…{label[start + 1 - characters :]}"


def printable(text: str) -> str:
    """Names of folders can hold characters that XML cannot."""
    return "".join(character if character.isprintable() else "�" for character in text)


def drawn(figure: Figure, name: str, title: str, caption: str, description: str, table: Table) -> Chart:
    return Chart(name, title, to_svg(figure, name, description), caption, description, table)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """SVG to stand inside HTML: no namespaces, metadata or global styles, ids that are unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    referenced = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in referenced:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({key: _in_page(key, value, name) for key, value in attributes.items()})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-label": printable(description)})
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _in_page(key: str, value: str, name: str) -> str:
    """An attribute's value with the page's colours, and with ids that belong to this chart."""
    for colour, css in _CSS_COLOURS.items():
        value = value.replace(colour, css)
    if key == "id":
        return f"{name}-{value}"
    return re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if key == "href" or "url(" in value else value
