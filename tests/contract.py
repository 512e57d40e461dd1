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

from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.flatbuffer import Inspection, inspect
from mobileqat.parity import Parity, verify
from mobileqat.quantize import QuantizedModel, quantize_model, strip
from mobileqat.runtime import Session


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
    rng = np.random.default_rng(1)
    return [rng.uniform(low, high, (count, *t.shape[1:])).astype(np.float32) for t in model.inputs]


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
    samples = samples or samples_of(model, low, high)
    expected = outputs_of(model, samples)
    weights = model.get_weights()

    quantized = quantize_model(model, **options)
    check_stripped(quantized, model, samples)
    calibrate(quantized, samples if len(samples) > 1 else samples[0])
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
    parity = verify(quantized, content, samples)
    check_parity(parity, exact)
    check_same_everywhere(quantized, content, samples, exact)
    check_saving(quantized, samples)
    return Checked(quantized, content, inspection, parity, samples)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def outputs_of(model, samples) -> list[np.ndarray]:
    """Outputs in inference mode, run eagerly."""
    return [
        np.asarray(output)
        for output in tf.nest.flatten(model(samples if len(samples) > 1 else samples[0], training=False))
    ]


def check_stripped(quantized: QuantizedModel, model: keras.Model, samples) -> None:
    """An untrained quantized model holds exactly the float model."""
    stripped = strip(quantized)
    assert [type(layer) for layer in stripped.layers] == [type(layer) for layer in model.layers]
    for got, expected in zip(outputs_of(stripped, samples), outputs_of(model, samples), strict=True):
        np.testing.assert_array_equal(got, expected)


def check_training_step(quantized: QuantizedModel, samples) -> None:
    """One step: gradients are finite, and not zero for any variable that moves the output."""
    rng = np.random.default_rng(2)
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(quantized(samples if len(samples) > 1 else samples[0], training=True))
        loss = sum(tf.reduce_mean(tf.square(y - rng.normal(size=y.shape).astype(np.float32))) for y in outputs)
    variables = quantized.trainable_variables
    cancelled = {
        id(wrapper.layer.bias)
        for wrapper in quantized.operators.values()
        if wrapper.batch_norm is not None and wrapper.layer.use_bias
    }
    gradients = tape.gradient(loss, [variable.value for variable in variables])
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


def check_same_everywhere(quantized: QuantizedModel, content: bytes, samples, exact: bool) -> None:
    """Eager calls, `predict` and the file agree on every output, as real values."""
    session = Session(content)
    raw = session.predict(samples)
    from_file = session.dequantize(raw) if exact else None
    from_file = from_file if isinstance(from_file, list) else [from_file]
    predicted = tf.nest.flatten(quantized.predict(samples if len(samples) > 1 else samples[0], verbose=0))
    for index, eager in enumerate(outputs_of(quantized, samples)):
        np.testing.assert_array_equal(predicted[index], eager)
        if exact:
            np.testing.assert_allclose(from_file[index], eager, rtol=1e-6, atol=1e-6)


def check_saving(quantized: QuantizedModel, samples) -> None:
    """`save` and `load_model` keep outputs, ranges and the plan, without any scope."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        quantized.save(path)
        loaded = keras.models.load_model(path)
    assert loaded.plan == quantized.plan
    for name, quantizer in quantized.quantizers.items():
        np.testing.assert_array_equal(loaded.quantizers[name].ranges(), quantizer.ranges())
    for got, expected in zip(outputs_of(loaded, samples), outputs_of(quantized, samples), strict=True):
        np.testing.assert_array_equal(got, expected)
