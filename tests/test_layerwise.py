"""Operator by operator: the same values as the whole model, in float and in integers."""

import keras
import numpy as np
import pytest
from contract import give_trained_weights, outputs_of
from keras import layers as L

from mobileqat.calibrate import calibrate
from mobileqat.errors import CalibrationError, DataError, ModelError
from mobileqat.layerwise import bytes_per_sample, shared_layers, walk
from mobileqat.quantize import quantize_model, strip

X = np.random.default_rng(0).normal(size=(10, 6, 6, 2)).astype(np.float32)


def branches():
    """Constants, a tensor with two readers, a layer that stays in float, and one that serves twice."""
    x = keras.Input((6, 6, 2), name="x")
    twice = L.Conv2D(2, 3, padding="same", name="twice")
    y = twice(L.PReLU(name="prelu")(x))
    y = L.Add(name="add")([y, L.Conv2D(2, 1, name="float")(y)])
    model = keras.Model(x, L.Dense(3, name="dense")(L.Flatten(name="flat")(twice(y))))
    give_trained_weights(model)
    quantized = quantize_model(model, exclude=["float"])
    calibrate(quantized, X)
    return quantized


def test_values_are_those_of_the_whole_model():
    model = branches()
    for step in walk(model, X, batch_size=4):
        last = step
    assert last.wrapper.operator.output == model.plan.outputs[0]
    np.testing.assert_allclose(last.float_output, outputs_of(strip(model), X)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last.wrapper(last.inputs[0]), outputs_of(model, X)[0])


def test_every_operator_once_in_order():
    model = branches()
    assert [step.wrapper.operator for step in walk(model, X)] == list(model.plan.operators)


def test_changes_reach_the_integers_and_not_the_float_values():
    model = branches()
    before = [step.float_output for step in walk(model, X)]
    steps = []
    for step in walk(model, X):
        if step.wrapper.operator.name == "float":
            step.wrapper.layer.kernel.assign(0 * step.wrapper.layer.kernel)
        steps.append(step)
    for step, expected in zip(steps, before, strict=True):
        np.testing.assert_array_equal(step.float_output, expected)
    (after,) = (step for step in steps if step.wrapper.operator.name == "add")
    assert len(np.unique(after.inputs[1])) <= 2 < len(np.unique(after.float_inputs[1]))


def test_a_reference_gives_the_float_values():
    model, reference = branches(), branches()
    kernel = model.operators["dense"].layer.kernel
    kernel.assign(0 * kernel)
    expected = outputs_of(strip(reference), X)[0]
    last = list(walk(model, X, reference=reference))[-1]
    np.testing.assert_allclose(last.float_output, expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(last.run(last.wrapper, last.inputs), axis=0)) == 1 < len(np.unique(expected, axis=0))


def test_memory():
    """A residual block: its input is held until the sum, beside the second layer's input and output."""
    x = keras.Input((6, 6, 2), name="x")
    first = L.Conv2D(8, 1, name="first")(x)
    inner = L.Conv2D(32, 1, name="wide")(first)
    model = keras.Model(x, L.Add(name="add")([first, L.Conv2D(8, 1, name="narrow")(inner)]))
    assert bytes_per_sample(quantize_model(model)) == 2 * 4 * 36 * (8 + 32 + 8)


def test_shared_layers():
    assert shared_layers(branches()) == {"twice", "twice@2"}


def test_faults():
    model = branches()
    with pytest.raises(ModelError, match="quantize_model"):
        next(walk(strip(model), X))
    with pytest.raises(CalibrationError, match="no ranges"):
        next(walk(quantize_model(strip(model)), X))
    with pytest.raises(CalibrationError, match="no sample"):
        next(walk(model, X[:0]))
    with pytest.raises(DataError, match="expects shape"):
        next(walk(model, X[:, 1:]))
    with pytest.raises(CalibrationError, match="'x' are not finite"):
        next(walk(model, np.where(X > 1, np.nan, X)))
    other = quantize_model(keras.Sequential([keras.Input((6, 6, 2)), L.Dense(3, name="dense")]))
    with pytest.raises(ModelError, match=r"operators prelu.*, dense\. Received: dense$"):
        next(walk(model, X, reference=other))
