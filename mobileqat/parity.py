"""Simulation against interpreter, in LSBs (units of a tensor's scale): weights, every operator, end to end.

Each operator of the file gets the interpreter's own integer inputs in both worlds, so that one operator's error is
never another's.  End to end the two run freely from the same samples, and single LSBs may grow with depth.

The bars are LiteRT with XNNPACK, which phones run by default.  Where they come from: convolutions and dense layers
are exact but for float32 sums beyond 2**24; every other operator is modelled to the bit by `kernels`, and the 1 %
left to them covers values of libm that differ between machines in the tables of transcendental functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import keras
import numpy as np

from mobileqat import flatbuffer
from mobileqat.calibrate import as_arrays
from mobileqat.convert import KERNEL_LAYOUTS
from mobileqat.errors import DataError, FlatbufferError, ModelError
from mobileqat.numerics import dequantize, quantize
from mobileqat.progress import task, track
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import CONSTANT, GONE
from mobileqat.runtime import Session, available_runtimes


@dataclass(frozen=True)
class Bars:
    """What a conversion must reach.

    Args:
        min_identical_conv: share of identical outputs of convolutions and dense layers.
        min_identical_other: likewise of every other operator.
        max_lsb: largest difference of a single output of one operator.
        min_identical_output: share of identical outputs end to end.
        min_top1_agreement: share of samples with the same top-1 end to end.
    """

    min_identical_conv: float = 0.9999
    min_identical_other: float = 0.99
    max_lsb: int = 1
    min_identical_output: float = 0.99
    min_top1_agreement: float = 0.999


# LiteRT's other kernels requantize with 32-bit fixed-point multipliers and round twice: single operators differ from
# XNNPACK by one LSB in up to 0.4 % (convolutions) or 33 % (means) of the outputs, bilinear resizing by up to three.
OTHER_KERNELS = Bars(0.99, 0.6, 3, min_identical_output=0.6, min_top1_agreement=0.98)


def default_bars(runtime: str) -> Bars:
    """The bars of a runtime: exact where XNNPACK computes, looser for kernels that round differently."""
    return Bars() if runtime in ("litert", "tf-lite") else OTHER_KERNELS


@dataclass(frozen=True)
class WeightParity:
    """Integers of kernels and biases: how many were compared, and how many are the same in the file."""

    compared: int
    identical: int


@dataclass(frozen=True)
class OperatorParity:
    """One operator fed identical integers: share of identical outputs and the largest difference in LSBs."""

    operator: str
    kind: str
    outputs: int
    identical: float
    max_lsb: int
    min_identical: float
    bound_lsb: int

    @property
    def passed(self) -> bool:
        return self.identical >= self.min_identical and self.max_lsb <= self.bound_lsb


@dataclass(frozen=True)
class EndToEnd:
    """Whole model on the same samples: share of identical output values and of samples with the same top-1."""

    samples: int
    identical: float
    max_lsb: int
    top1_agreement: float


@dataclass(frozen=True)
class Parity:
    """The verdict on one file; `problems` says in a sentence each what missed its bar."""

    runtime: str
    weights: WeightParity
    operators: tuple[OperatorParity, ...]
    end_to_end: EndToEnd
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        result = asdict(self) | {"passed": self.passed}
        result["operators"] = [asdict(op) | {"passed": op.passed} for op in self.operators]
        return result


def verify(
    model: QuantizedModel,
    content: bytes,
    samples,
    *,
    bars: Bars | None = None,
    runtime: str = "litert",
    operator_samples: int = 64,
    simulated=None,
    interpreted=None,
) -> Parity:
    """Compares a quantized model with the file made from it.

    Args:
        model: made by `quantize_model`.
        content: the file, from `convert`.
        samples: an array [n, ...], or a list or dict of arrays for several inputs; real values.
        bars: what must be reached; `default_bars(runtime)` by default.
        runtime: interpreter to compare with.
        operator_samples: how many of the samples the operator-by-operator comparison uses.
        simulated: `model.predict(samples)`, if it is known already.
        interpreted: `Session(content, runtime).predict(samples)`, likewise.

    Raises:
        FlatbufferError: the file is broken, or was not made from this model.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__}")
    bars = bars or default_bars(runtime)
    arrays = as_arrays(model, samples)
    if len(arrays[0]) == 0:
        raise DataError("There is no sample to compare on.")
    file = flatbuffer.read(content)
    _require_same_tensors(model, file)
    weights = compare_weights(model, file)
    operators = compare_operators(model, file, [array[:operator_samples] for array in arrays], bars, runtime)
    if simulated is None:
        simulated = simulate(model, model.arrange(arrays))
    if interpreted is None:
        interpreted = Session(file, runtime).predict(arrays)
    end_to_end = compare_outputs(output_integers(model, simulated), output_integers(model, interpreted))
    description = f"{runtime} {available_runtimes()[runtime]}"
    return Parity(description, weights, operators, end_to_end, find_problems(weights, operators, end_to_end, bars))


def simulate(model: keras.Model, samples, batch_size: int = 64):
    """`model.predict` on samples [n, ...], or on a list or dict of them, with progress.

    The last batch is filled up: a smaller one would have the whole model traced once more, which takes seconds.
    """
    count = len(keras.tree.flatten(samples)[0])
    whole = count - count % batch_size
    with task("simulation", count, "samples") as advance:

        def predict(part, size: int):
            done = keras.callbacks.LambdaCallback(
                on_predict_batch_end=lambda batch, logs: advance(min(batch_size, size - batch * batch_size))
            )
            return model.predict(part, batch_size=batch_size, verbose=0, callbacks=[done])

        if whole in (0, count):
            return predict(samples, count)
        first = predict(keras.tree.map_structure(lambda x: x[:whole], samples), whole)
        filling = np.minimum(np.arange(whole, whole + batch_size), count - 1)  # repeats the last sample
        rest = predict(keras.tree.map_structure(lambda x: x[filling], samples), count - whole)
        return keras.tree.map_structure(lambda a, b: np.concatenate([a, b[: count - whole]]), first, rest)


def find_problems(weights: WeightParity, operators, end_to_end: EndToEnd, bars: Bars) -> tuple[str, ...]:
    """One sentence per bar that was missed."""
    problems = []
    if weights.identical != weights.compared:
        problems.append(f"{weights.compared - weights.identical} of {weights.compared} weight integers differ.")
    problems += [
        f"Operator '{op.operator}' ({op.kind}): {op.identical:.4%} of its outputs are identical, expected at least "
        f"{op.min_identical:.2%}; largest difference {op.max_lsb} LSB, allowed {op.bound_lsb}."
        for op in operators
        if not op.passed
    ]
    if end_to_end.identical < bars.min_identical_output:
        problems.append(
            f"End to end {end_to_end.identical:.3%} of the output values are identical (largest difference "
            f"{end_to_end.max_lsb} LSB), expected at least {bars.min_identical_output:.1%}."
        )
    if end_to_end.top1_agreement < bars.min_top1_agreement:
        problems.append(
            f"End to end top-1 agrees on {end_to_end.top1_agreement:.3%} of {end_to_end.samples} samples, expected "
            f"at least {bars.min_top1_agreement:.1%}."
        )
    return tuple(problems)


def _as_list(arrays) -> list[np.ndarray]:
    return keras.tree.flatten(arrays)


def _require_same_tensors(model: QuantizedModel, file: flatbuffer.Model) -> None:
    shapes = {tensor.name: tensor.shape[1:] for tensor in file.tensors}
    for operator in model.plan.operators:
        if operator.kind in (GONE, CONSTANT) or not operator.quantized:
            continue
        expected, received = model.plan.tensors[operator.output].shape, shapes.get(operator.output)
        if received != expected:
            has = "no such tensor" if received is None else f"one of shape {received}"
            raise FlatbufferError(
                f"The file was not converted from model '{model.name}': expected a tensor '{operator.output}' of shape "
                f"{expected}, it has {has}. Convert the model again with mobileqat."
            )


def output_integers(model: QuantizedModel, outputs) -> list[np.ndarray]:
    """Model outputs on the plan's grids, one array per output, whatever type they come in.

    int8 stays, uint8 is the same grid moved by 128, real values are divided by the scale; outputs that the plan keeps
    in float stay real.
    """
    integers = []
    for name, values in zip(model.plan.outputs, _as_list(outputs), strict=True):
        if values.dtype == np.uint8:
            integers.append(values.astype(np.int32) - 128)
        elif np.issubdtype(values.dtype, np.integer):
            integers.append(values)
        else:
            integers.append(_integers(model, name, values))
    return integers


def _integers(model: QuantizedModel, name: str, real) -> np.ndarray:
    quantizer = model.quantizers.get(name)
    if quantizer is None:
        return np.asarray(real)
    scale, zero_point = quantizer.grid()
    return (np.round(np.asarray(real, np.float32) / scale) + zero_point).astype(np.int32)


# ------------------------------------------------------------------ weights


def compare_weights(model: QuantizedModel, file: flatbuffer.Model) -> WeightParity:
    """Compares the integers of every kernel, bias and constant operand."""
    by_name = {tensor.name: tensor for tensor in file.tensors}
    compared = identical = 0
    for name, expected in _stored(model):
        stored = by_name[name].data
        compared += expected.size
        if stored is not None and name in model.plan.tensors and model.plan.tensors[name].has_batch:
            stored = stored[:1]  # a constant that is repeated for every sample
        if stored is not None and stored.shape == expected.shape:
            identical += int(np.sum(stored == expected))
    return WeightParity(compared, identical)


def _stored(model: QuantizedModel) -> Iterator[tuple[str, np.ndarray]]:
    """What the file should hold: names and integers."""
    for name, wrapper in model.operators.items():
        if wrapper.operator.kind == CONSTANT and wrapper.operator.quantized:
            yield name, wrapper.constant()
        if wrapper.weight_spec is not None:
            constants = wrapper.constants()
            layout, _ = KERNEL_LAYOUTS[wrapper.operator.kind]
            yield f"{name}/kernel", layout(constants["weights"], wrapper.layer)
            yield f"{name}/bias", constants["bias"]


# ------------------------------------------------------------------ operators


def compare_operators(
    model: QuantizedModel, file: flatbuffer.Model, arrays: list[np.ndarray], bars: Bars, runtime: str
) -> tuple[OperatorParity, ...]:
    """Compares every integer operator on the integers that the interpreter itself feeds it."""
    tensors = _interpreter_tensors(model, file, arrays, runtime)
    results = []
    for wrapper in track(model.operators.values(), "operators in the simulation", "operators"):
        operator = wrapper.operator
        if operator.kind in (GONE, CONSTANT) or not operator.quantized:
            continue
        inputs = [_real(model, name, tensors[name]) for name in operator.inputs]
        simulated = np.asarray(wrapper(inputs if len(inputs) > 1 else inputs[0], training=False))
        expected = tensors[operator.output].astype(np.int32)
        difference = np.abs(_integers(model, operator.output, simulated) - expected)
        weighted = operator.kind in KERNEL_LAYOUTS
        results.append(
            OperatorParity(
                operator.name,
                operator.kind,
                difference.size,
                float(np.mean(difference == 0)),
                int(difference.max()),
                bars.min_identical_conv if weighted else bars.min_identical_other,
                bars.max_lsb,
            )
        )
    return tuple(results)


def _real(model: QuantizedModel, name: str, integers: np.ndarray) -> np.ndarray:
    return dequantize(integers, *model.quantizers[name].grid()) if name in model.quantizers else integers


def _quantize(model: QuantizedModel, name: str, real: np.ndarray) -> np.ndarray:
    quantizer = model.quantizers[name]
    return quantize(real, *quantizer.grid(), quantizer.spec)


def _interpreter_tensors(model: QuantizedModel, file, arrays, runtime: str) -> dict[str, np.ndarray]:
    """Integers of every tensor of the plan on these samples, in the interpreter.

    All of them are made outputs of the graph: a delegate shows nothing else of what it computes.
    """
    computed = {index for operator in file.operators for index in operator.outputs}
    wanted = [index for index in sorted(computed) if file.tensors[index].name in model.plan.tensors]
    session = Session(flatbuffer.expose_tensors(file.content, wanted), runtime)
    outputs = _as_list(session.predict(arrays))
    tensors = {row.name: array for row, array in zip(session.outputs, outputs, strict=True)}
    for name, array in zip(model.plan.inputs, arrays, strict=True):
        if name not in tensors:
            tensors[name] = _quantize(model, name, array) if name in model.quantizers else array
    for wrapper in model.operators.values():
        operator = wrapper.operator
        if operator.kind == GONE and operator.inputs[0] in tensors:
            tensors[operator.output] = tensors[operator.inputs[0]]
        if operator.kind == CONSTANT:
            value = wrapper.constant()
            is_batched = model.plan.tensors[operator.output].has_batch
            tensors[operator.output] = np.repeat(value, len(arrays[0]), axis=0) if is_batched else value
    return tensors


# ------------------------------------------------------------------ end to end


def compare_outputs(simulated: list[np.ndarray], interpreted: list[np.ndarray]) -> EndToEnd:
    """Compares output integers [n, ...], one array per output of the model."""
    differences = [_difference(a, b) for a, b in zip(simulated, interpreted, strict=True)]
    same = np.concatenate([(difference == 0).ravel() for difference in differences])
    agreement = [np.mean(_top1(a) == _top1(b)) for a, b in zip(simulated, interpreted, strict=True)]
    return EndToEnd(
        len(simulated[0]),
        float(same.mean()),
        int(max(difference.max() for difference in differences)),
        float(min(agreement)),
    )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in LSBs; of outputs kept in float, in steps of a ten-thousandth of their range."""
    if np.issubdtype(a.dtype, np.integer) and np.issubdtype(b.dtype, np.integer):
        return np.abs(a.astype(np.int64) - b.astype(np.int64))
    step = max(float(np.ptp(a)), float(np.ptp(b)), 1e-30) / 10_000
    return np.round(np.abs(a.astype(np.float64) - b) / step).astype(np.int64)


def _top1(outputs: np.ndarray) -> np.ndarray:
    """Index of the largest value along the last axis; for a single value, whether it is positive."""
    return outputs.argmax(-1) if outputs.shape[-1] > 1 else outputs[..., 0] > 0
