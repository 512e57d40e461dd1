"""Runs a quantized model operator by operator on samples, in float and in integers side by side.

For techniques that change one layer's weights at a time: what comes after a changed layer sees the change in its
integer inputs, while the float values it is compared with stay those of the model as it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mobileqat.calibrate import as_arrays
from mobileqat.errors import CalibrationError, ModelError
from mobileqat.plan import Operator
from mobileqat.progress import track
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import CONSTANT
from mobileqat.wrappers import QuantizeWrapper


@dataclass(frozen=True)
class Step:
    """One operator and its values on all samples.

    Args:
        wrapper: the operator.
        float_wrapper: the same with the weights that count as float.
        float_inputs: its inputs in the float model, [n, ...] each.
        inputs: its inputs as the quantized operators before it make them.
        float_output: its output in the float model.
        run: `run(function, inputs)` calls a function of such inputs in batches.
    """

    wrapper: QuantizeWrapper
    float_wrapper: QuantizeWrapper
    float_inputs: list[np.ndarray]
    inputs: list[np.ndarray]
    float_output: np.ndarray
    run: Callable[[Callable, list[np.ndarray]], np.ndarray]


def walk(
    model: QuantizedModel,
    samples: Any,
    batch_size: int = 64,
    what: str = "layer by layer",
    reference: QuantizedModel | None = None,
) -> Iterator[Step]:
    """Gives every operator in execution order, and runs it in integers once the caller is done with it.

    The caller may change the weights of the operator it is given, and of no other.  Values are held in memory until
    their last reader is done.

    Args:
        model: calibrated.
        samples: an array [n, ...], or a list or dict of arrays for several inputs.
        batch_size: samples that run together.
        what: this is for, as progress shows it.
        reference: a twin of `model` that computes the float values, where the model's own weights are no longer those
            that it was quantized from, as after AdaRound.

    Raises:
        ModelError: not a quantized model, or a reference that is no twin of it.
        CalibrationError: a range is missing, there is no sample, or one is not finite.
        DataError: samples that do not fit the model's inputs.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__}")
    model._require_ranges()
    float_model = model if reference is None else require_twin(model, reference)
    arrays = as_arrays(model, samples)
    if not len(arrays[0]):
        raise CalibrationError("There is no sample to run the model on.")
    for name, array in zip(model.plan.inputs, arrays, strict=True):
        if not np.isfinite(array).all():
            raise CalibrationError(f"Samples for input '{name}' are not finite (NaN or infinity).")
    run = _Runner(model, batch_size)
    float_values = dict(zip(model.plan.inputs, arrays, strict=True))
    values = {name: run.snap(name, array) for name, array in float_values.items()}
    last_reader = _last_readers(model)
    pairs = list(zip(model.plan.operators, model.operators.values(), strict=True))
    for operator, wrapper in track(pairs, what, "operators"):
        names = _inputs(model, operator)
        float_inputs, inputs = [float_values[n] for n in names], [values[n] for n in names]
        run_this, float_wrapper = partial(run, operator), float_model.operators[operator.name]
        output = run_this(partial(float_wrapper.float_call, training=False), float_inputs)
        yield Step(wrapper, float_wrapper, float_inputs, inputs, output, run_this)
        float_values[operator.output], values[operator.output] = output, run_this(wrapper, inputs)
        for name in set(names):
            if last_reader[name] == operator.name:
                del float_values[name], values[name]


def require_twin(model: QuantizedModel, reference: QuantizedModel) -> QuantizedModel:
    """The reference, if it has the model's operators.

    Raises:
        ModelError: it has others.
    """
    is_quantized = isinstance(reference, QuantizedModel)
    found, expected = list(reference.operators) if is_quantized else [], list(model.operators)
    if found != expected:
        raise ModelError(
            f"No reference for model '{model.name}': expected one made by quantize_model from the same float model, of "
            f"operators {', '.join(expected)}. Received: {', '.join(found) or type(reference).__name__}"
        )
    return reference


def bytes_per_sample(model: QuantizedModel) -> int:
    """What `walk` holds in memory at most, per sample."""
    sizes = {name: math.prod(t.shape) if t.has_batch else 0 for name, t in model.plan.tensors.items()}
    last_reader, live, most = _last_readers(model), set(model.plan.inputs), 0
    for operator in model.plan.operators:
        live.add(operator.output)
        most = max(most, sum(sizes[name] for name in live))
        live -= {name for name in _inputs(model, operator) if last_reader[name] == operator.name}
    return 2 * np.dtype(np.float32).itemsize * most  # the float values and the quantized ones


def _last_readers(model: QuantizedModel) -> dict[str, str]:
    """The last operator that reads each tensor."""
    return {name: op.name for op in model.plan.operators for name in _inputs(model, op)}


def _inputs(model: QuantizedModel, operator: Operator) -> tuple[str, ...]:
    # A constant reads nothing; an input of the model gives it the size of the batch.
    return model.plan.inputs[:1] if operator.kind == CONSTANT else operator.inputs


def shared_layers(model: QuantizedModel) -> set[str]:
    """Operators whose weights another operator uses as well: changing them here would change them there."""
    counts = Counter(id(wrapper.layer) for wrapper in model.operators.values())
    counts.update(id(w.batch_norm) for w in model.operators.values() if w.batch_norm is not None)
    return {
        name
        for name, wrapper in model.operators.items()
        if counts[id(wrapper.layer)] > 1 or (wrapper.batch_norm is not None and counts[id(wrapper.batch_norm)] > 1)
    }


class _Runner:
    """Runs functions of a plan's tensors in batches."""

    def __init__(self, model: QuantizedModel, batch_size: int):
        self.model = model
        self.batch_size = batch_size

    def snap(self, name: str, array: np.ndarray) -> np.ndarray:
        """A model input on its grid, if it has one."""
        quantizer = self.model.quantizers.get(name)
        return array if quantizer is None else np.asarray(quantizer(array, training=False))

    def __call__(self, operator, function: Callable, inputs: list[np.ndarray]) -> np.ndarray:
        tensors = self.model.plan.tensors
        is_batched = [tensors[name].has_batch for name in _inputs(self.model, operator)]
        count = max([len(x) for x, split in zip(inputs, is_batched, strict=True) if split], default=1)
        parts = []
        for start in range(0, count, self.batch_size):
            part = [
                x[start : start + self.batch_size] if split else x for x, split in zip(inputs, is_batched, strict=True)
            ]
            parts.append(np.asarray(function(part if len(part) > 1 else part[0])))
        return np.concatenate(parts) if tensors[operator.output].has_batch else parts[0]
