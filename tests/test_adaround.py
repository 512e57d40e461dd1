"""Learned rounding: better than to nearest, on the same scales, and the file holds its integers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat.adaround import adaround
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.errors import CalibrationError
from mobileqat.fakequant import quantize_weights
from mobileqat.parity import verify
from mobileqat.quantize import quantize_model
from mobileqat.schemes import QuantSpec, Scheme

W4 = Scheme("w4a8", QuantSpec(4, symmetric=True, per_channel=True), QuantSpec(8))
rng = np.random.default_rng(0)
# Neighbouring pixels go together, as in photographs: errors of one sign add up.
X = (rng.normal(size=(64, 1, 1, 4)) + 0.3 * rng.normal(size=(64, 6, 6, 4))).astype(np.float32)


def quantized(*layers, scheme=W4):
    model = sequential(*layers, shape=X.shape[1:])
    give_trained_weights(model)
    result = quantize_model(model, scheme)
    calibrate(result, X)
    return result


LAYERS = {
    "Conv2D": lambda: [L.Conv2D(3, 3, activation="relu")],
    "Conv2D, BatchNormalization": lambda: [L.Conv2D(3, 3, use_bias=False), L.BatchNormalization(), L.ReLU()],
    "DepthwiseConv2D": lambda: [L.DepthwiseConv2D(3, depth_multiplier=2)],
    "Conv2DTranspose": lambda: [L.Conv2DTranspose(3, 3)],
    "Dense": lambda: [L.Flatten(), L.Dense(5)],
    "preprocessing": lambda: [L.Rescaling(2.0, 0.5), L.Conv2D(3, 3)],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("scheme", [W4, "w8a8"], ids=["w4a8", "w8a8"])
def test_rounds_better_than_to_nearest(layers, scheme):
    model = quantized(*layers(), scheme=scheme)
    (wrapper,) = (w for w in model.operators.values() if w.weight_spec)
    arguments = wrapper.rule.channel_axes, wrapper.weight_spec, wrapper.ratio()
    nearest, scales = quantize_weights(wrapper.kernel(), *arguments)
    (row,) = adaround(model, X, steps=200, batch_size=16)
    # Beside 8-bit weights most of the error comes from the rounded inputs.
    assert row.error < (0.7 if scheme is W4 else 1.0) * row.error_before and 0 < row.moved < 0.5
    np.testing.assert_allclose(
        quantize_weights(wrapper.kernel(), *arguments)[1], scales, rtol=0 if wrapper.prologue is None else 2e-7
    )
    # What is left in the layer lies on the grid, one step from the nearest integer at most, or saturates.
    integers = np.clip(wrapper.kernel() / scales, wrapper.weight_spec.qmin, wrapper.weight_spec.qmax)
    np.testing.assert_allclose(integers, np.round(integers), atol=1e-4)
    assert np.abs(np.round(integers) - nearest).max() == 1
    parity = verify(model, convert(model), X[:4])
    assert parity.passed and parity.weights.identical == parity.weights.compared
    np.testing.assert_array_equal(wrapper.constants()["weights"], np.round(integers))


def test_later_layers_make_up_for_earlier_ones(caplog):
    """Inputs come from the quantized layers before, targets from the float model."""
    layers = [L.Conv2D(8, 3, padding="same", activation="relu") for _ in range(6)]
    model = quantized(*layers)
    expected = np.asarray(keras.Sequential([keras.Input(X.shape[1:]), *layers])(X))

    def error():
        return np.mean((np.asarray(model(X)) - expected) ** 2)

    before = error()
    tf.get_logger().addHandler(caplog.handler)
    try:
        with caplog.at_level("WARNING", "tensorflow"):
            rows = adaround(model, X, steps=200)
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert error() < 0.5 * before
    assert [row.operator for row in rows] == [layer.name for layer in layers]
    assert not caplog.records  # TensorFlow warns of retracing at the fifth


def test_leaves_the_float_model_and_shared_layers_alone():
    x = keras.Input(X.shape[1:], name="x")
    twice = L.Conv2D(4, 1, name="twice")
    model = keras.Model(x, L.Conv2D(2, 1, name="once")(twice(twice(x))))
    before = model.get_weights()
    result = quantize_model(model, W4)
    calibrate(result, X)
    assert [row.operator for row in adaround(result, X, steps=20)] == ["once"]
    for array, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(result.operators["twice"].layer.kernel, before[0])


def test_the_same_seed_gives_the_same_integers():
    kernels = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = quantized(L.Conv2D(3, 3))
        adaround(model, X, steps=30, seed=4)
        kernels.append(next(iter(model.operators.values())).constants()["weights"])
    np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1.5}, {"batch_size": 0}, {"learning_rate": -1.0}])
def test_faults(options):
    with pytest.raises(CalibrationError, match=next(iter(options))):
        adaround(quantized(L.Dense(2)), X, **options)


def test_samples_that_are_not_finite_change_nothing():
    model = quantized(L.Conv2D(3, 3))
    before = model.get_weights()
    with pytest.raises(CalibrationError, match="not finite"):
        adaround(model, np.full_like(X, np.nan), steps=5)
    for array, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)
