"""What the report's plots need beyond the results of the checks, as JSON-able values of bounded size.

noise    SQNR of every operator that rounds, and histograms of the noisiest ones on their integer grids
graph    operators and activation tensors of a file
islands  what stays in float: which pattern says so, and the conversions it costs
thinned  ranges of every tensor over training
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from mobileqat import flatbuffer
from mobileqat.analyze import Activations, Layer, Weights, analyze
from mobileqat.plan import QuantPlan
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import GONE

MOST_HISTOGRAMS = 12  # of the noisiest operators
MOST_BINS = 64
MOST_OPERATORS = 400  # of a graph; a larger one cannot be read anyway
MOST_EPOCHS = 60
MOST_VALUES = 2**22  # of one tensor, all samples together: what the comparison with float may hold in memory
SAMPLES = (4, 64)


def noise(model: QuantizedModel, samples: np.ndarray, reference: QuantizedModel | None = None) -> list[dict[str, Any]]:
    """Signal to quantization noise of each operator that rounds, in execution order.

    Args:
        model: calibrated or trained.
        samples: [n, ...]; as many of the first ones are used as `MOST_VALUES` allows.
        reference: see `analyze`.

    Returns:
        `{"operator", "kind", "tensor", "sqnr_db", "own_sqnr_db", "weights", "activations"}` per operator: with the
        noise of everything before it, and with its own alone. The last two are histograms, None for all but the
        `MOST_HISTOGRAMS` noisiest operators.
    """
    largest = max(math.prod(tensor.shape) for tensor in model.plan.tensors.values())
    least, most = SAMPLES
    taken = samples[: max(least, min(most, MOST_VALUES // max(largest, 1)))]
    analysis = analyze(model, taken, reference=reference)
    order = {name: place for place, name in enumerate(model.operators)}
    rows = [
        (order[layer.name], _row(layer, model, has_histograms=rank < MOST_HISTOGRAMS))
        for rank, layer in enumerate(analysis.layers)
    ]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _row(layer: Layer, model: QuantizedModel, has_histograms: bool) -> dict[str, Any]:
    output = model.operators[layer.name].operator.output
    spec = model.quantizers[output].spec
    return {
        "operator": layer.name,
        "kind": layer.kind,
        "tensor": output,
        "sqnr_db": round(layer.sqnr_db, 2),
        "own_sqnr_db": round(layer.own_sqnr_db, 2),
        "weights": _weights(layer.weights) if has_histograms and layer.weights else None,
        "activations": _activations(layer.activations, spec.qmin, spec.qmax) if has_histograms else None,
    }


def _weights(weights: Weights) -> dict[str, Any]:
    """Counts of the kernel's integers, in bins of `step` neighbouring ones from `low`."""
    counts = weights.histogram.counts
    step = -(-len(counts) // MOST_BINS)
    binned = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    ends = {"qmin": int(weights.histogram.low), "qmax": int(weights.histogram.high)}
    return {"bits": weights.bits, **ends, "low": weights.histogram.low - 0.5, "step": step, "counts": binned}


def _activations(values: Activations, qmin: int, qmax: int) -> dict[str, Any]:
    """Counts of the float values in units of the integer grid: what lies beyond `qmin` and `qmax` is clipped."""
    histogram = values.histogram
    low = histogram.low / values.scale + values.zero_point
    step = (histogram.high - histogram.low) / values.scale / len(histogram.counts)
    ends = {"qmin": qmin, "qmax": qmax, "clipped": values.clipped}
    return {**ends, "low": round(low, 3), "step": float(f"{step:.6g}"), "counts": list(histogram.counts)}


def graph(content: bytes) -> dict[str, Any]:
    """Operators and activation tensors of a file.

    Returns:
        `{"inputs", "outputs", "operators", "tensors"}`: tensor indices; `{"kind", "inputs", "outputs", "constants"}`
        per operator; `{"name", "shape", "dtype", "scale", "zero_point"}` by tensor index, as text. Of a graph of more
        than `MOST_OPERATORS`, `{"omitted": how many it has}`.
    """
    file = flatbuffer.read(content)
    if len(file.operators) > MOST_OPERATORS:
        return {"omitted": len(file.operators)}
    shown = {*file.inputs, *file.outputs}
    operators = []
    for operator in file.operators:
        inputs = [index for index in operator.inputs if index != -1]
        values = [index for index in inputs if not file.tensors[index].is_constant]
        constants = [_constant(file.tensors[index]) for index in inputs if file.tensors[index].is_constant]
        outputs = list(operator.outputs)
        operators.append({"kind": operator.name, "inputs": values, "outputs": outputs, "constants": constants})
        shown.update(values, outputs)
    rows = {index: flatbuffer.details(file.tensors[index]) for index in sorted(shown)}
    tensors = {str(index): vars(row) | {"shape": list(row.shape)} for index, row in rows.items()}
    return {"inputs": list(file.inputs), "outputs": list(file.outputs), "operators": operators, "tensors": tensors}


def _constant(tensor: flatbuffer.Tensor) -> str:
    """ "int8 [16, 3, 3, 3]"."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def islands(plan: QuantPlan, patterns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What stays in float.

    Args:
        plan: of the quantized model.
        patterns: what a recipe excludes.

    Returns:
        "operators": `{"operator", "kind", "output", "pattern"}` each, the pattern None where none names it;
        "borders": `QuantPlan.borders` with "values", how many one sample converts there.
    """
    operators = [
        {"operator": op.name, "kind": op.kind, "output": op.output, "pattern": _pattern(op.nodes, patterns)}
        for op in plan.operators
        if not op.quantized and op.kind != GONE
    ]
    borders = [row | {"values": math.prod(plan.tensors[row["tensor"]].shape)} for row in plan.borders()]
    return {"operators": operators, "borders": borders}


def _pattern(paths: Sequence[str], patterns: Sequence[str]) -> str | None:
    for pattern in patterns:
        if any(fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*") for path in paths):
            return pattern
    return None


def thinned(ranges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_EPOCHS` rows `{"epoch", "ranges": {tensor: [minimum, maximum]}}`, first and last among them."""
    if len(ranges) > MOST_EPOCHS:
        ranges = [ranges[round(place)] for place in np.linspace(0, len(ranges) - 1, MOST_EPOCHS)]
    return [
        {
            "epoch": row["epoch"],
            "ranges": {name: [float(f"{end:.5g}") for end in ends] for name, ends in row["ranges"].items()},
        }
        for row in ranges
    ]
