"""What every quantized model must hold, from one call: `check_layer`.

A test gives a float model; the contract gives it weights as training leaves them, takes it through quantization,
calibration, a training step, saving and conversion, and compares simulation and interpreter to the bit.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L

from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.flatbuffer import Inspection, inspect
from mobileqat.parity import Parity, verify
from mobileqat.plan import QuantPlan
from mobileqat.quantize import QuantizedModel, quantize_model, strip
from mobileqat.rules import Output
from mobileqat.runtime import Session

# Operators up to which a model is compiled as well as run eagerly: compiling takes longest.
LARGEST_COMPILED = 8


@dataclass(frozen=True)
class Checked:
    """What `check_layer` made, for further questions."""

    quantized: QuantizedModel
    flatbuffer: bytes
    inspection: Inspection
    parity: Parity
    samples: list[np.ndarray]


def sequential(*layers, shape=(9, 9, 3)) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape, name="x"), *layers], name="model")


def small_classifier() -> keras.Model:
    """A convolution, pooling, a dense layer and a softmax on 8x8x3, with weights as training leaves them."""
    model = sequential(
        L.Conv2D(4, 3, activation="relu", name="conv"), L.MaxPooling2D(name="pool"), L.Flatten(name="flat"),
        L.Dense(3, activation="softmax", name="head"), shape=(8, 8, 3),
    )  # fmt: skip
    give_trained_weights(model)
    return model


def give_trained_weights(model: keras.Model, seed: int = 0) -> None:
    """Statistics and offsets as training leaves them: no variable at its initial 0 or 1, some gammas negative."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        name = variable.path.split("/")[-1]
        if name == "gamma":
            variable.assign(rng.normal(1, 0.3, variable.shape) * rng.choice([1, 1, 1, -1], variable.shape))
        elif name in ("beta", "bias", "moving_mean"):
            variable.assign(rng.normal(0, 0.3, variable.shape))
        elif name == "moving_variance":
            variable.assign(rng.uniform(0.5, 2, variable.shape))


def samples_of(model: keras.Model, low: float, high: float, count: int = 8) -> list[np.ndarray]:
    """Random inputs, one array per input; whole numbers for indices, which every table in the tests has rows for."""
    rng = np.random.default_rng(1)
    return [
        rng.integers(0, 20, (count, *t.shape[1:])).astype(np.int32)
        if t.dtype == "int32"
        else rng.uniform(low, high, (count, *t.shape[1:])).astype(np.float32)
        for t in model.inputs
    ]


def arranged(model: keras.Model, samples):
    """One array per input as the model takes them: alone, in a list or in a dict."""
    if isinstance(model, keras.Sequential) or not hasattr(model, "_inputs_struct"):
        return samples[0] if len(samples) == 1 else samples
    return keras.tree.pack_sequence_as(model._inputs_struct, samples)


def check_layer(
    model: keras.Model,
    *,
    low: float = -2.0,
    high: float = 2.0,
    samples: list[np.ndarray] | None = None,
    exact: bool = True,
    fully_integer: bool = True,
    relative_error: float = 0.08,
    give_weights: bool = True,
    **options,
) -> Checked:
    """Holds a model to the whole contract.

    Args:
        model: float; its weights are replaced unless `give_weights` is False.
        low, high: between which random samples lie; `samples` replaces them, one array per input.
        exact: every operator and the whole model equal the interpreter to the bit; False: within `parity.Bars`.
        fully_integer: the file has no float island; False where `exclude` made some.
        relative_error: largest RMS difference to the float model, relative to its RMS output.
        options: of `quantize_model`.
    """
    if give_weights:
        give_trained_weights(model)
    weights = model.get_weights()
    quantized = quantize_model(model, **options)
    samples = samples or samples_of(quantized, low, high)
    inputs = arranged(quantized, samples)
    expected = outputs_of(model, inputs)
    check_plan(quantized.plan)
    check_lowering(quantized, expected, samples)
    check_stripped(quantized, model, expected, inputs)
    calibrate(quantized, inputs)
    for simulated, real in zip(outputs_of(quantized, samples), expected, strict=True):
        assert simulated.shape == real.shape
        assert rms(simulated - real) <= relative_error * rms(real)

    check_training_step(quantized, samples)
    for after, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(after, before, err_msg="the caller's model changed")

    content = convert(quantized)
    inspection = inspect(content)
    assert inspection.fully_integer == fully_integer, inspection.problems
    assert (inspection.problems == ()) == fully_integer
    outputs = outputs_of(quantized, samples)
    parity = verify(quantized, content, samples, simulated=outputs)
    check_parity(parity, exact)
    check_same_everywhere(quantized, content, samples, outputs, exact)
    check_saving(quantized, samples, outputs)
    return Checked(quantized, content, inspection, parity, samples)


def check_data(model: keras.Model, low: float, high: float) -> None:
    """Calibrated on samples between two bounds, simulation and file agree on any data, in batches of 1 and of 8."""
    give_trained_weights(model)
    quantized = quantize_model(model)
    usual = samples_of(quantized, low, high)
    calibrate(quantized, arranged(quantized, usual))
    wide = samples_of(quantized, 20 * low, 20 * abs(low), count=5)
    constants = [np.stack([np.full_like(x[0], 0), np.full_like(x[0], abs(high))]) for x in wide]
    samples = [np.concatenate(parts) for parts in zip(usual, wide, constants, strict=True)]
    outputs = outputs_of(quantized, samples)
    for batch_size in (1, 8):
        content = convert(quantized, batch_size=batch_size)
        assert inspect(content).fully_integer
        check_parity(verify(quantized, content, samples, simulated=outputs, operator_samples=16), exact=True)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def outputs_of(model, samples) -> list[np.ndarray]:
    """Outputs in inference mode, run eagerly; samples are a list of one array per input, or as the model takes them."""
    inputs = arranged(model, samples) if isinstance(samples, list) else samples
    return [np.asarray(output) for output in keras.tree.flatten(model(inputs, training=False))]


def check_lowering(quantized: QuantizedModel, expected, samples) -> None:
    """The operators of the plan, run in float, compute what the model computes."""
    values = dict(zip(quantized.plan.inputs, samples, strict=True))
    for wrapper in quantized.operators.values():
        inputs = [values[name] for name in wrapper.operator.inputs] or samples[:1]
        values[wrapper.operator.output] = wrapper.float_call(inputs if len(inputs) > 1 else inputs[0], training=False)
    for name, real in zip(quantized.plan.outputs, expected, strict=True):
        np.testing.assert_allclose(values[name], real, rtol=1e-3, atol=1e-4 * rms(real) + 1e-6, err_msg=name)


def check_plan(plan: QuantPlan) -> None:
    """Every tensor has one maker, before its readers, and one grid that all of its group share."""
    made = list(plan.inputs)
    for operator in plan.operators:
        assert set(operator.inputs) <= set(made), f"{operator.name} reads what is not made yet"
        made.append(operator.output)
    assert len(set(made)) == len(made) and set(made) == set(plan.tensors)
    assert set(plan.outputs) <= set(made)
    nodes = [node for operator in plan.operators for node in operator.nodes]
    assert len(set(nodes)) == len(nodes)
    for tensor in plan.tensors.values():
        group = [other for other in plan.tensors.values() if other.group == tensor.group]
        assert tensor.group in plan.tensors and len({other.spec for other in group}) == 1, tensor.name
        assert (tensor.fixed is not None) == (tensor.output is Output.FIXED), tensor.name
        fixed = {other.fixed for other in group if other.fixed}
        assert not fixed or (len(fixed) == 1 and not plan.members(tensor.group)), f"{tensor.name} is fixed and observed"
        assert fixed or tensor.spec is None or plan.members(tensor.group), f"{tensor.name} is never observed"
    for operator in plan.operators:
        output = plan.tensors[operator.output]
        if output.output is Output.SHARED and output.spec is not None:
            quantized = [plan.tensors[name] for name in operator.inputs if plan.tensors[name].dtype == "float32"]
            assert {tensor.group for tensor in quantized} == {output.group}, operator.name


def check_stripped(quantized: QuantizedModel, model: keras.Model, expected, inputs) -> None:
    """An untrained quantized model holds exactly the float model."""
    stripped = strip(quantized)
    assert [type(layer) for layer in stripped.layers] == [type(layer) for layer in model.layers]
    for got, real in zip(outputs_of(stripped, inputs), expected, strict=True):
        np.testing.assert_array_equal(got, real)


def check_training_step(quantized: QuantizedModel, samples) -> None:
    """One step: gradients are finite, and not zero for any variable that moves the output."""
    rng = np.random.default_rng(2)
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(quantized(arranged(quantized, samples), training=True))
        loss = sum(tf.reduce_mean(tf.square(y - rng.normal(size=y.shape).astype(np.float32))) for y in outputs)
    variables = quantized.trainable_variables
    cancelled = {
        id(wrapper.layer.bias)
        for wrapper in quantized.operators.values()
        if wrapper.batch_norm is not None and wrapper.layer.use_bias
    }
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    gradients = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    for variable, gradient in zip(variables, gradients, strict=True):
        assert gradient is not None, variable.path
        assert np.isfinite(gradient).all(), variable.path
        assert id(variable) in cancelled or np.any(gradient != 0), variable.path
        # A small step for any scale of weights and data, so that the ranges still fit.
        if rms(gradient) > 0:
            variable.assign_sub(1e-3 * rms(variable) / rms(gradient) * gradient)


def check_parity(parity: Parity, exact: bool) -> None:
    assert parity.weights.identical == parity.weights.compared
    assert not [op for op in parity.operators if not op.passed or (exact and op.max_lsb > 0)]
    if exact:
        assert parity.passed, parity.problems
        assert parity.end_to_end.identical == 1.0


def check_same_everywhere(quantized: QuantizedModel, content: bytes, samples, outputs, exact: bool) -> None:
    """The file gives the outputs of eager calls, as real values; so does the compiled model, which `predict` uses."""
    if exact:
        session = Session(content)
        from_file = keras.tree.flatten(session.dequantize(session.predict(samples)))
        for got, expected in zip(from_file, outputs, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    if len(quantized.plan.operators) <= LARGEST_COMPILED:
        compiled = tf.function(lambda inputs: quantized(inputs, training=False), autograph=False)
        for got, expected in zip(keras.tree.flatten(compiled(arranged(quantized, samples))), outputs, strict=True):
            np.testing.assert_array_equal(got, expected)


def check_saving(quantized: QuantizedModel, samples, outputs) -> None:
    """`save` and `load_model` keep outputs, ranges and the plan, without any scope."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        quantized.save(path)
        loaded = keras.models.load_model(path)
    assert loaded.plan == quantized.plan
    for name, quantizer in quantized.quantizers.items():
        np.testing.assert_array_equal(loaded.quantizers[name].ranges(), quantizer.ranges())
    for got, expected in zip(outputs_of(loaded, samples), outputs, strict=True):
        np.testing.assert_array_equal(got, expected)
