"""A mean that rounding shifts is put back; what has no bias is named."""

import keras
import numpy as np
import pytest
from contract import give_trained_weights, outputs_of, sequential
from keras import layers as L

from mobileqat.bias_correction import correct_bias
from mobileqat.calibrate import calibrate
from mobileqat.quantize import quantize_model, strip

X = np.random.default_rng(0).uniform(0, 1, (64, 5, 5, 4)).astype(np.float32)


def plant(layer) -> None:
    """Weights that all round to zero but for one: positive inputs make that a shift."""
    kernel = np.full(layer.kernel.shape, 0.45 / 127, np.float32)
    kernel[(0,) * (kernel.ndim - 2)][0] = 1.0
    layer.kernel.assign(kernel)


LAYERS = {
    "bias": lambda: [L.Conv2D(3, 3, name="layer")],
    "BatchNormalization": lambda: [L.Conv2D(3, 3, use_bias=False, name="layer"), L.BatchNormalization()],
    "ReLU": lambda: [L.Conv2D(3, 3, name="layer", activation="relu")],
    "Dense": lambda: [L.Flatten(), L.Dense(3, name="layer")],
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_a_planted_shift_goes_away(layers):
    model = sequential(*layers(), shape=(5, 5, 4))
    give_trained_weights(model)
    plant(model.get_layer("layer"))
    quantized = quantize_model(model)
    calibrate(quantized, X)

    def shift():
        axes = tuple(range(outputs_of(model, X)[0].ndim - 1))
        return np.abs(np.mean(outputs_of(quantized, X)[0] - outputs_of(model, X)[0], axis=axes)).max()

    before = shift()
    result = correct_bias(quantized, X, batch_size=24)
    step = max(float(quantizer.parameters()[0]) for quantizer in quantized.quantizers.values())
    assert before > 0.02 and shift() < 0.1 * before + 0.2 * step
    assert list(result.shifts) == ["layer"] and not result.skipped


def test_leaves_the_float_model_and_the_kernels_alone():
    model = sequential(L.Conv2D(3, 3), L.ReLU(), L.Conv2D(2, 3), shape=(5, 5, 4))
    give_trained_weights(model)
    before = model.get_weights()
    quantized = quantize_model(model)
    calibrate(quantized, X)
    correct_bias(quantized, X)
    for array, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)
    after = strip(quantized).get_weights()
    assert [np.array_equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, True, False]


def test_what_it_skips_has_a_reason():
    x = keras.Input((5, 5, 4), name="x")
    twice = L.Conv2D(4, 1, name="twice")
    model = keras.Model(x, L.Conv2D(2, 1, use_bias=False, name="plain")(twice(twice(x))))
    quantized = quantize_model(model)
    calibrate(quantized, X)
    result = correct_bias(quantized, X)
    assert not result.shifts and set(result.skipped) == {"twice", "twice@2", "plain"}
    assert "bias" in result.skipped["plain"] and "other operators" in result.skipped["twice"]
