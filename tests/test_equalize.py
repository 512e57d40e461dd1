"""Equalization leaves the float function alone, and repairs channels whose ranges differ."""

import keras
import numpy as np
import pytest
from contract import give_trained_weights, outputs_of, sequential
from keras import layers as L

from mobileqat.calibrate import calibrate
from mobileqat.equalize import equalize
from mobileqat.errors import CalibrationError, ModelError
from mobileqat.quantize import quantize_model, strip

rng = np.random.default_rng(0)
X = rng.normal(size=(32, 8, 8, 3)).astype(np.float32)

CHAINS = {
    "bias": lambda: [L.Conv2D(6, 3, activation="relu"), L.Conv2D(4, 3)],
    "BatchNormalization": lambda: [
        *(L.Conv2D(6, 3, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Conv2D(4, 3), L.BatchNormalization()),
    ],
    "depthwise": lambda: [L.Conv2D(6, 1), L.ReLU(), L.DepthwiseConv2D(3, activation="relu"), L.Conv2D(4, 1)],
    "pooling": lambda: [L.Conv2D(6, 3), L.ReLU(), L.MaxPooling2D(), L.Dropout(0.5), L.ZeroPadding2D(), L.Conv2D(4, 3)],
    "head": lambda: [L.Conv2D(6, 3, activation="relu"), L.GlobalAveragePooling2D(), L.Dense(4)],
    "transposed": lambda: [L.Conv2DTranspose(6, 3), L.LeakyReLU(0.2), L.Conv2DTranspose(4, 3)],
}


def unbalanced(*layers):
    """A model whose first activation has channels of very different ranges."""
    model = sequential(*layers, shape=(8, 8, 3))
    give_trained_weights(model)
    first, second = model.layers[:2]
    factors = np.exp(np.linspace(-2, 2, 6))
    for variable in second.weights[:2] if isinstance(second, L.BatchNormalization) else first.weights:
        is_transposed = isinstance(first, L.Conv2DTranspose) and len(variable.shape) == 4
        variable.assign(variable * (factors[:, None] if is_transposed else factors))
    return model


@pytest.mark.parametrize("layers", CHAINS.values(), ids=CHAINS)
def test_the_function_stays_and_integers_gain(layers):
    model = unbalanced(*layers())
    quantized = quantize_model(model)
    calibrate(quantized, X)
    expected = outputs_of(model, X)[0]
    error = np.mean((outputs_of(quantized, X)[0] - expected) ** 2)
    before = model.get_weights()
    pairs = equalize(quantized)
    assert len(pairs) == len(kernels(quantized)) - 1
    assert pairs[0].smallest < pairs[0].largest / 3
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs_of(strip(quantized), X)[0] / scale, expected / scale, atol=1e-5)
    with pytest.raises(CalibrationError, match="no ranges"):
        outputs_of(quantized, X)
    calibrate(quantized, X)
    assert np.mean((outputs_of(quantized, X)[0] - expected) ** 2) < error
    for array, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, other)


def kernels(model):
    return [wrapper for wrapper in model.operators.values() if wrapper.weight_spec]


def test_ranges_agree_afterwards():
    quantized = quantize_model(unbalanced(*CHAINS["bias"]()))
    equalize(quantized)
    first, second = (np.abs(wrapper.layer.kernel) for wrapper in kernels(quantized))
    np.testing.assert_allclose(first.max((0, 1, 2)), second.max((0, 1, 3)), rtol=1e-4)


def test_dead_channels_stay():
    model = sequential(L.Conv2D(3, 1), L.ReLU(), L.Conv2D(2, 1), shape=(8, 8, 3))
    kernel = model.layers[0].kernel.numpy()
    kernel[..., 1] = 0
    model.layers[0].kernel.assign(kernel)
    quantized = quantize_model(model)
    equalize(quantized)
    assert all(np.isfinite(array).all() for array in quantized.get_weights())


@pytest.mark.parametrize("gamma", [1e-2, 1e-6, 1e-20])
def test_a_channel_that_is_nearly_dead_does_not_take_the_range(gamma):
    """Its bias is what it gives; raised as its weights would have it, it would fill the range of all channels."""
    keras.utils.set_random_seed(0)
    convolutions = L.Conv2D(6, 3, use_bias=False), L.Conv2D(4, 3)
    model = sequential(convolutions[0], L.BatchNormalization(), L.ReLU(), convolutions[1], shape=(8, 8, 3))
    model.layers[1].gamma.assign([gamma] + 5 * [1.0])
    model.layers[1].beta.assign(6 * [0.1])
    expected = outputs_of(model, X)[0]

    def noise(quantized):
        calibrate(quantized, X)
        return np.mean((outputs_of(quantized, X)[0] - expected) ** 2)

    quantized = quantize_model(model)
    before = noise(quantized)
    assert equalize(quantized)
    assert noise(quantized) < 1.5 * before
    np.testing.assert_allclose(outputs_of(strip(quantized), X)[0], expected, atol=1e-4)


def two_readers():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(3, 1)(x)
    return keras.Model(x, L.Add()([L.Conv2D(3, 1)(y), y]))


def two_outputs():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(3, 1)(x)
    return keras.Model(x, [y, L.Conv2D(3, 1)(y)])


def twice():
    x = keras.Input((8, 8, 3), name="x")
    layer = L.Conv2D(3, 1)
    return keras.Model(x, layer(layer(x)))


UNCHAINED = {
    "ReLU6": lambda: sequential(L.Conv2D(3, 1), L.ReLU(6.0), L.Conv2D(2, 1), shape=(8, 8, 3)),
    "sigmoid": lambda: sequential(L.Conv2D(3, 1, activation="sigmoid"), L.Conv2D(2, 1), shape=(8, 8, 3)),
    "flatten": lambda: sequential(L.Conv2D(3, 1), L.Flatten(), L.Dense(2), shape=(8, 8, 3)),
    "fixed gamma": lambda: sequential(
        L.Conv2D(3, 1), L.BatchNormalization(scale=False), L.Conv2D(2, 1), shape=(8, 8, 3)
    ),
    "two readers": two_readers,
    "two outputs": two_outputs,
    "twice": twice,
}


@pytest.mark.parametrize("build", UNCHAINED.values(), ids=UNCHAINED)
def test_what_cannot_be_equalized_stays(build):
    quantized = quantize_model(build())
    before = quantized.get_weights()
    assert equalize(quantized) == []
    for array, expected in zip(quantized.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_float_model_is_refused():
    with pytest.raises(ModelError, match="quantize_model"):
        equalize(two_readers())
