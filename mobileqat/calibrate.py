"""Activation ranges from data: run the float layers of a quantized model and set every observed range.

minmax       the smallest and the largest value seen
percentile   cuts the same share of values at both ends, over a histogram
mse          the range whose grid has the least mean squared error, over a histogram (Banner et al. 2019, searched)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobileqat import numerics
from mobileqat.data.reservoir import reservoir_sample
from mobileqat.errors import CalibrationError, DataError, ModelError
from mobileqat.models import check_finite_weights
from mobileqat.progress import track
from mobileqat.quantize import QuantizedModel
from mobileqat.schemes import QuantSpec
from mobileqat.wrappers import as_float32

METHODS = ("minmax", "percentile", "mse")
BINS = 2048


def calibrate(
    model: QuantizedModel,
    data: Any,
    method: str = "minmax",
    *,
    percentile: float = 99.99,
    batch_size: int = 64,
    reservoir: int | None = None,
    seed: int = 0,
) -> None:
    """Sets the activation ranges of a quantized model from data, and the weight scales that are fitted or learned.

    The float layers run, without any quantization, so the result does not depend on ranges set before: calibrating a
    trained model takes learned ranges and weight scales from it.

    Args:
        model: made by `quantize_model`.
        data: an array [n, ...], a list or dict of arrays for several inputs, or an iterable of batches of those.
        method: "minmax", "percentile" or "mse".
        percentile: share of values inside the range, in percent, for "percentile".
        batch_size: samples per step when `data` is arrays, or comes from a reservoir.
        reservoir: draw that many samples of all batches, each equally likely, and keep no others in memory: for an
            iterable that is longer than memory. By default all samples count.
        seed: of the reservoir.

    Raises:
        CalibrationError: a tensor whose values are not finite, or no data at all.
        DataError: data that does not fit the model's inputs.
    """
    if method not in METHODS:
        raise CalibrationError(f"Unknown calibration method {method!r}. Expected one of: {', '.join(METHODS)}.")
    if not 50 < percentile <= 100:
        raise CalibrationError(f"percentile must be in (50, 100]. Received: {percentile}")
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size must be a whole number of at least 1. Received: {batch_size!r}")
    check_finite_weights(model)
    batches = list(_drawn(model, data, batch_size, reservoir, seed))
    if not batches:
        raise CalibrationError("There is no calibration data: the iterable gave no batch.")
    _check_finite(model, batches)
    ranges = _minimum_and_maximum(model, batches)
    if method != "minmax":
        histograms = _histograms(model, batches, ranges)
        for name, (low, high) in ranges.items():
            if name in histograms:
                if method == "percentile":
                    ranges[name] = _percentile_range(histograms[name], low, high, percentile)
                else:
                    ranges[name] = _least_squares_range(histograms[name], low, high, model.quantizers[name].spec)
    for name, (low, high) in ranges.items():
        quantizer = model.quantizers[name]
        quantizer.set_range(name, low, high)
    for wrapper in model.operators.values():
        wrapper.fit_weight_range()


def _batches(model: QuantizedModel, data: Any, batch_size: int) -> Iterator[list[np.ndarray]]:
    """Batches as lists of arrays in the order of the model's inputs."""
    is_whole = isinstance(data, (list, tuple, dict)) or hasattr(data, "__array__")
    arrays = as_arrays(model, data) if is_whole else None
    if arrays is None:
        yield from (as_arrays(model, batch) for batch in _iterable(data))
        return
    for start in range(0, len(arrays[0]), batch_size):
        yield [array[start : start + batch_size] for array in arrays]


def _drawn(
    model: QuantizedModel, data: Any, batch_size: int, reservoir: int | None, seed: int
) -> Iterable[list[np.ndarray]]:
    """Batches of all samples, or of those that a reservoir keeps."""
    batches = _batches(model, data, batch_size)
    if reservoir is None:
        return batches
    # Copies, since a row of a batch would keep the whole batch in memory.
    samples = ([array[row].copy() for array in batch] for batch in batches for row in range(len(batch[0])))
    kept = reservoir_sample(samples, reservoir, seed)
    parts = (kept[start : start + batch_size] for start in range(0, len(kept), batch_size))
    return [[np.stack(arrays) for arrays in zip(*part, strict=True)] for part in parts]


def _iterable(data: Any) -> Iterable:
    try:
        return iter(data)
    except TypeError:
        raise DataError(
            "Calibration data must be an array, a list or dict of arrays, or an iterable of batches. "
            f"Received: {type(data).__name__}"
        ) from None


def as_arrays(model: QuantizedModel, data: Any) -> list[np.ndarray]:
    """One float32 (for indices int32) array per input of the model, in order, from an array, a list or a dict.

    Raises:
        DataError: the data does not fit the inputs.
    """
    names = list(model.plan.inputs)
    if isinstance(data, dict) and isinstance(model._inputs_struct, dict) and set(data) == set(model._inputs_struct):
        data = keras.tree.flatten({key: data[key] for key in model._inputs_struct})
    if isinstance(data, dict):
        if set(data) != set(names):
            raise DataError(f"Expected data for the inputs {names}. Received: {sorted(data)}")
        data = [data[name] for name in names]
    parts = data if isinstance(data, (list, tuple)) else [data]
    if len(parts) != len(names):
        inputs = f"{len(names)} input{'s' if len(names) > 1 else ''} {names}"
        raise DataError(f"Model '{model.name}' has {inputs}. Received: {len(parts)} arrays")
    arrays: list[np.ndarray] = []
    for name, part in zip(names, parts, strict=True):
        try:
            array = np.asarray(part)
            if array.dtype != model.plan.tensors[name].dtype:
                array = array.astype(model.plan.tensors[name].dtype, casting="unsafe")
        except (TypeError, ValueError) as error:
            raise DataError(f"Data for input '{name}' cannot be read as an array of numbers: {error}") from error
        expected = model.plan.tensors[name].shape
        if array.shape[1:] != expected or len(array) != len(arrays[0] if arrays else array):
            sizes = ", ".join(map(str, expected))
            raise DataError(f"Input '{name}' expects shape (n, {sizes}). Received: {array.shape}")
        arrays.append(array)
    return arrays


def _check_finite(model: QuantizedModel, batches) -> None:
    """Refuses empty batches, and data that is NaN or infinite, which TensorFlow's minimum and ReLU may swallow."""
    for index, batch in enumerate(batches):
        for name, array in zip(model.plan.inputs, batch, strict=True):
            if len(array) == 0:
                raise CalibrationError(f"There is no calibration data in batch {index}: it is empty.")
            if not np.isfinite(array).all():
                raise CalibrationError(
                    f"Calibration data for input '{name}' is not finite (NaN or infinity), batch {index}."
                )


def _observed(model: QuantizedModel) -> list[str]:
    return [name for name, quantizer in model.quantizers.items() if quantizer.is_learned and name in quantizer.members]


def float_activations(model: QuantizedModel, inputs) -> dict[str, tf.Tensor]:
    """Every tensor of the plan, computed in float."""
    values = dict(zip(model.plan.inputs, inputs, strict=True))
    for wrapper in model.operators.values():
        arguments = [values[name] for name in wrapper.operator.inputs] or [inputs[0]]
        x = wrapper.float_call(arguments if len(arguments) > 1 else arguments[0], training=False)
        values[wrapper.operator.output] = as_float32(x)
    return values


def _signature(model: QuantizedModel) -> list[tf.TensorSpec]:
    planned = [model.plan.tensors[name] for name in model.plan.inputs]
    return [tf.TensorSpec((None, *tensor.shape), tensor.dtype) for tensor in planned]


def _minimum_and_maximum(model: QuantizedModel, batches) -> dict[str, tuple[float, float]]:
    names = _observed(model)
    if not names:
        return {}

    @tf.function(input_signature=_signature(model))
    def extremes(*inputs):
        values = float_activations(model, inputs)
        return tf.stack([[tf.reduce_min(values[name]), tf.reduce_max(values[name])] for name in names])

    seen = np.stack([extremes(*batch).numpy() for batch in track(batches, "calibration", "batches")])
    if not np.isfinite(seen).all():
        # min and max propagate NaN only in some kernels, so the first tensor named is where it surfaced.
        broken = [
            name for name, values in zip(names, seen.transpose(1, 0, 2), strict=True) if not np.isfinite(values).all()
        ]
        raise CalibrationError(
            f"Activation tensor '{broken[0]}' is not finite on the calibration data ({len(broken)} such tensors). "
            "Look for NaN or infinity in the data and in the model's weights."
        )
    lows, highs = seen[:, :, 0].min(0), seen[:, :, 1].max(0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)}


def _histograms(model: QuantizedModel, batches, ranges) -> dict[str, np.ndarray]:
    """Counts in `BINS` equal bins between each tensor's extremes."""
    names = [name for name, (low, high) in ranges.items() if high > low and not model.plan.is_constant(name)]

    @tf.function(input_signature=_signature(model))
    def count(*inputs):
        values = float_activations(model, inputs)
        return tf.stack([tf.histogram_fixed_width(values[name], list(ranges[name]), BINS) for name in names])

    total = sum(count(*batch).numpy().astype(np.int64) for batch in track(batches, "histograms", "batches"))
    return dict(zip(names, total, strict=True))


def _percentile_range(counts, low, high, percentile: float) -> tuple[float, float]:
    share = np.cumsum(counts) / counts.sum()
    edges = np.linspace(low, high, BINS + 1)
    tail = (100 - percentile) / 200
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    return float(edges[first]), float(edges[min(last, BINS - 1) + 1])


def _least_squares_range(counts, low, high, spec: QuantSpec) -> tuple[float, float]:
    """Shrinks both ends together in steps of 1 % and keeps the range with the least squared error."""
    edges = np.linspace(low, high, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2

    def error(factor: float) -> float:
        scale, zero_point = numerics.quantization_parameters(low * factor, high * factor, spec)
        restored = numerics.dequantize(numerics.quantize(centres, scale, zero_point, spec), scale, zero_point)
        return float(np.sum(counts * (restored - centres) ** 2))

    best = min(np.arange(1.0, 0.29, -0.01), key=error)
    return float(low * best), float(high * best)
