"""Whole architectures are quantized, converted fully integer, and computed by the file as by the simulation.

Random weights make the end of a deep network chaos, one LSB becoming many: operators are held to their bounds one by
one, on the integers that the interpreter feeds them.
"""

import keras
import numpy as np
import pytest
from zoo import ARCHITECTURES, Architecture, give_trained_statistics, pixels, run

from mobileqat import calibrate, convert, inspect, quantize_model, verify
from mobileqat.calibrate import float_activations

LONG = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.until}


def each(table):
    return pytest.mark.parametrize("architecture", [pytest.param(entry, id=name) for name, entry in table.items()])


@each(ARCHITECTURES)
def test_architectures(architecture):
    check(architecture, whole=False)


@pytest.mark.slow
@each(LONG)
def test_whole_architectures(architecture):
    check(architecture, whole=True)


def check(architecture: Architecture, whole: bool) -> None:
    if not architecture.is_available:
        pytest.skip("MOBILEQAT_DATA does not name the folder with this file")
    model, samples = architecture.load(whole=whole)
    quantized = quantize_model(model, input_range=architecture.input_range)
    calibrate(quantized, samples if len(samples) > 1 else samples[0])
    content = convert(quantized)

    inspection = inspect(content)
    assert inspection.fully_integer and inspection.problems == ()
    few = [array[:4] for array in samples]
    simulated = run(quantized, few)
    parity = verify(quantized, content, few, simulated=simulated)
    assert parity.weights.identical == parity.weights.compared
    assert not [operator for operator in parity.operators if not operator.passed]
    expected = run(model, few)
    check_rewritten(quantized, few, expected)
    if not whole or architecture.until is None:
        for real, integer in zip(expected, simulated, strict=True):
            assert np.corrcoef(real.ravel(), integer.ravel())[0, 1] > 0.95


def check_rewritten(quantized, samples: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Before anything is rounded, the operators compute what the float model does."""
    tensors = float_activations(quantized, samples)
    for name, real in zip(quantized.plan.outputs, expected, strict=True):
        assert np.abs(tensors[name] - real).max() <= 2e-3 * np.abs(real).max(), name


def test_statistics_fit_the_data():
    """Every BatchNormalization gives its gamma and beta back as deviation and mean, at any depth."""
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for _ in range(6):
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(12, 3, padding="same")(x)))
    x = keras.layers.Dropout(0.5)(x)
    last = keras.layers.BatchNormalization(epsilon=1e-6, momentum=0.7, name="last")
    model = keras.Model(inputs, last(keras.layers.Conv2D(4, 1)(x)))
    samples = [pixels(32, 8, 8)]
    give_trained_statistics(model, samples)
    outputs = np.asarray(model(samples[0], training=False))
    np.testing.assert_allclose(outputs.mean((0, 1, 2)), last.beta.numpy(), atol=1e-3)
    np.testing.assert_allclose(outputs.std((0, 1, 2)), np.abs(last.gamma.numpy()), rtol=1e-2)
    assert last.momentum == 0.7 and model.layers[-3].rate == 0.5


@pytest.mark.parametrize("name", ["DS-CNN", "U-Net"])
def test_same_in_every_run(name):
    (first, samples), (second, again) = (ARCHITECTURES[name].load() for _ in range(2))
    for got, expected in zip(second.get_weights() + again, first.get_weights() + samples, strict=True):
        np.testing.assert_array_equal(got, expected)
