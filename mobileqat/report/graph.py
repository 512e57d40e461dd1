"""The graph of the integer file as inline SVG: an operator per row in execution order, with the tensor it makes.

What the next row reads goes straight down; what is read later goes around, in lanes on the left.  The rows are narrow,
so that they can be read on a phone, and the page enlarges them without a script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from mobileqat.report import formats
from mobileqat.report.charts import Table, printable, shortened
from mobileqat.report.layer_charts import decibels, layer_rows
from mobileqat.report.results import VARIANTS, file_name, lookup, number

_WIDTH, _ROW, _BOX = 400, 50, 38
_LANE, _MOST_LANES = 9, 10
_NAME_CHARACTERS, _DETAIL_CHARACTERS = 28, 58
_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class GraphFigure:
    """The drawing and its numbers.

    Attributes:
        svg: markup, safe to insert.
        file: whose graph it is.
        omitted: how many operators it would have, when they are too many to draw; `svg` is empty then.
    """

    svg: str
    file: str
    table: Table
    omitted: int = 0


@dataclass(frozen=True)
class _Node:
    """A row: an input of the graph or an operator."""

    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    constants: tuple[str, ...]


def draw_graph(results: Mapping[str, Any]) -> GraphFigure | None:
    """The graph of `results`, or None where it was not recorded."""
    graph = results.get("graph")
    if not graph:
        return None
    variant = graph.get("variant") or "qat"
    file = file_name(variant, lookup(results, "variants", variant) or {})
    if "operators" not in graph:
        return GraphFigure("", file, Table((), ()), graph.get("omitted") or 0)
    nodes = [_Node("INPUT", (), (index,), ()) for index in graph["inputs"]]
    nodes += [
        _Node(row["kind"], tuple(row["inputs"]), tuple(row["outputs"]), tuple(row.get("constants") or ()))
        for row in graph["operators"]
    ]
    tensors = {int(index): row for index, row in graph["tensors"].items()}
    layers = layer_rows(lookup(results, "variants", variant) or {})
    noise = {row["tensor"]: row.get("own_sqnr_db") for row in layers if "tensor" in row}
    svg = _draw(nodes, tensors, noise, set(graph["outputs"]), f"{VARIANTS.get(variant, variant)}: {file}")
    return GraphFigure(svg, file, _table(nodes, tensors, noise))


def _table(nodes: Sequence[_Node], tensors: Mapping[int, Any], noise: Mapping[str, Any]) -> Table:
    rows = []
    for place, node in enumerate(nodes):
        for index in node.makes:
            tensor = tensors[index]
            rows.append(
                (
                    tensor["name"],
                    str(place),
                    node.kind,
                    ", ".join(tensors[read]["name"] for read in node.reads) or formats.MISSING,
                    _shape(tensor["shape"]),
                    tensor["dtype"],
                    formats.significant(number(tensor, "scale")),
                    formats.significant(number(tensor, "zero_point")),
                    "; ".join(node.constants) or formats.MISSING,
                    decibels(number(noise, tensor["name"])),
                )
            )
    columns = ("Tensor", "Row", "Operator", "Reads", "Shape", "Type", "Scale", "Zero point", "Constants", "SQNR")
    return Table(columns, tuple(rows))


def _shape(shape: Sequence[int]) -> str:
    return f" {_TIMES} ".join(map(str, shape)) or "scalar"


# --- drawing


def _draw(
    nodes: Sequence[_Node], tensors: Mapping[int, Any], noise: Mapping[str, Any], outputs: set[int], title: str
) -> str:
    edges = list(_edges(nodes))
    lanes = _lanes([edge for edge in edges if edge[1] > edge[0] + 1])
    step = min(_LANE, _LANE * _MOST_LANES / max(len(set(lanes.values())), 1))
    left = 6 + step * (max(lanes.values(), default=-1) + 1)
    height = _ROW * len(nodes) + 4
    label = f"Graph of {printable(title)}: {len(nodes)} rows, each an input or an operator and the tensor it makes."
    svg = Element("svg", {"viewBox": f"0 0 {_WIDTH} {height}", "role": "img", "aria-label": label})
    paths = SubElement(svg, "g", {"fill": "none", "stroke": "currentColor", "stroke-opacity": "0.55"})
    for edge in edges:
        lane = lanes.get(edge)
        SubElement(paths, "path", {"d": _path(*edge, left, None if lane is None else left - step * (lane + 0.7))})
    for place, node in enumerate(nodes):
        _draw_node(svg, node, place, left, tensors, noise, outputs)
    return tostring(svg, encoding="unicode", short_empty_elements=False)


def _edges(nodes: Sequence[_Node]) -> Iterator[tuple[int, int]]:
    made_by = {index: place for place, node in enumerate(nodes) for index in node.makes}
    seen = set()
    for place, node in enumerate(nodes):
        for read in node.reads:
            edge = made_by.get(read, place), place
            if edge[0] < place and edge not in seen:
                seen.add(edge)
                yield edge


def _lanes(edges: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """The first lane that is free, shorter edges closer to the boxes."""
    taken: list[list[tuple[int, int]]] = []
    lanes = {}
    for edge in sorted(edges, key=lambda edge: (edge[1] - edge[0], edge)):
        free = (n for n, lane in enumerate(taken) if all(edge[1] <= other[0] or edge[0] >= other[1] for other in lane))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append(edge)
        lanes[edge] = lane
    return lanes


def _path(start: int, end: int, left: float, lane: float | None) -> str:
    top, bottom = _ROW * start + 2 + _BOX, _ROW * end + 2
    if lane is None:
        x = left + 20
        return f"M{x:.1f} {top}V{bottom}m-3 -5l3 5l3 -5"
    begin, middle = top - _BOX / 2 + 8, bottom + _BOX / 2 - 8
    return f"M{left:.1f} {begin}H{lane:.1f}V{middle}H{left:.1f}m-5 -3l5 3l-5 3"


def _draw_node(
    svg: Element,
    node: _Node,
    place: int,
    left: float,
    tensors: Mapping[int, Any],
    noise: Mapping[str, Any],
    outputs: set[int],
) -> None:
    tensor = tensors[node.makes[0]] if node.makes else {}
    name, dtype = str(tensor.get("name", "")), str(tensor.get("dtype", ""))
    is_float = dtype.startswith("float")
    group = SubElement(svg, "g", {"font-size": "11"})
    SubElement(group, "title").text = printable(
        f"{node.kind} {name}; {_detail(tensor)}; constants: {'; '.join(node.constants) or 'none'}"
    )
    box = {"x": f"{left:.1f}", "y": str(_ROW * place + 2), "width": f"{_WIDTH - 1 - left:.1f}", "height": str(_BOX)}
    stroke = "var(--bad)" if is_float else "var(--line)"
    SubElement(group, "rect", {**box, "rx": "4", "fill": "var(--panel)", "stroke": stroke})
    first, second = _ROW * place + 17, _ROW * place + 32
    kind = SubElement(group, "text", {"x": f"{left + 7:.1f}", "y": str(first), "fill": "currentColor"})
    SubElement(kind, "tspan", {"font-weight": "600"}).text = node.kind
    is_output = any(index in outputs for index in node.makes)
    SubElement(kind, "tspan", {"dx": "6"}).text = shortened(name, _NAME_CHARACTERS) + (" (output)" if is_output else "")
    decibel = number(noise, name)
    if decibel is not None:
        right = {"x": str(_WIDTH - 7), "y": str(first), "text-anchor": "end", "fill": "currentColor"}
        SubElement(group, "text", right).text = decibels(decibel)
    detail = {"x": f"{left + 7:.1f}", "y": str(second), "fill": "var(--bad)" if is_float else "var(--quiet)"}
    detail["font-size"] = "10"
    more = f" and {len(node.makes) - 1} more" if len(node.makes) > 1 else ""
    SubElement(group, "text", detail).text = shortened(_detail(tensor) + more, _DETAIL_CHARACTERS)


def _detail(tensor: Mapping[str, Any]) -> str:
    """ "int8 1 x 8 x 8 x 64, scale 0.01662, zero point -128"."""
    parts = [f"{tensor.get('dtype', '')} {_shape(tensor.get('shape') or ())}"]
    if number(tensor, "scale") is not None:
        parts += [f"scale {tensor['scale']:.4g}", f"zero point {tensor['zero_point']}"]
    return ", ".join(parts)
