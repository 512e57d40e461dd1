"""Every operator's integer arithmetic against the interpreter, on random grids and on data full of ties.

Inputs are all integers of int8.  With scales that are powers of two most results of a rounding operator lie exactly
between two integers, where rounding rules show.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat import kernels
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.kernels import Grid
from mobileqat.parity import verify
from mobileqat.quantize import quantize_model

SHAPE = (6, 7, 8)


def two_inputs(layer, *more, shape=SHAPE):
    x, y = keras.Input(SHAPE, name="x"), keras.Input(shape, name="y")
    tensor = layer([x, y])
    for follower in more:
        tensor = follower(tensor)
    return keras.Model([x, y], tensor)


OPERATORS = {
    "CONV_2D": lambda: sequential(L.Conv2D(5, 3, padding="same"), shape=SHAPE),
    "CONV_2D relu6": lambda: sequential(L.Conv2D(5, 3, 2, activation="relu6"), shape=SHAPE),
    "DEPTHWISE_CONV_2D": lambda: sequential(L.DepthwiseConv2D(3, padding="same"), shape=SHAPE),
    "TRANSPOSE_CONV": lambda: sequential(L.Conv2DTranspose(5, 3, 2, "same"), shape=SHAPE),
    "FULLY_CONNECTED": lambda: sequential(L.Dense(9), shape=SHAPE),
    "ADD": lambda: two_inputs(L.Add()),
    "ADD relu": lambda: two_inputs(L.Add(), L.ReLU(), shape=(1, 1, 8)),
    "MUL": lambda: two_inputs(L.Multiply()),
    "MUL relu6": lambda: two_inputs(L.Multiply(), L.ReLU(6.0), shape=(1, 1, 8)),
    "LEAKY_RELU": lambda: sequential(L.LeakyReLU(negative_slope=0.3), shape=SHAPE),
    "QUANTIZE": lambda: two_inputs(L.Concatenate()),
    "LOGISTIC": lambda: sequential(L.Activation("sigmoid"), shape=SHAPE),
    "TANH": lambda: sequential(L.Activation("tanh"), shape=SHAPE),
    "HARD_SWISH": lambda: sequential(L.Activation("hard_swish"), shape=SHAPE),
    "SOFTMAX": lambda: sequential(L.Softmax(), shape=(6, 7, 33)),
    "MEAN": lambda: sequential(L.GlobalAveragePooling2D(), shape=SHAPE),
    "MEAN of 64": lambda: sequential(L.GlobalAveragePooling2D(keepdims=True), shape=(8, 8, 16)),
    "AVERAGE_POOL_2D": lambda: sequential(L.AveragePooling2D(2, 1), shape=SHAPE),
    "AVERAGE_POOL_2D same": lambda: sequential(L.AveragePooling2D(3, 2, "same"), shape=SHAPE),
    "RESIZE_BILINEAR": lambda: sequential(L.UpSampling2D((2, 3), interpolation="bilinear"), shape=SHAPE),
    "RESIZE_BILINEAR 4": lambda: sequential(L.UpSampling2D(4, interpolation="bilinear"), shape=(3, 5, 4)),
}


def set_grid(quantizer, scale, zero_point):
    for member in quantizer.members:
        quantizer.set_range(member, scale * (-128 - zero_point), scale * (127 - zero_point))


def integers(count, shape, rng):
    return rng.integers(-128, 128, (count, *shape))


@pytest.mark.parametrize("grids", ["random", "powers of two", "power of two, zero point 0"])
@pytest.mark.parametrize("build", OPERATORS.values(), ids=OPERATORS)
def test_equals_the_interpreter(build, grids):
    rng = np.random.default_rng(len(grids))
    model = build()
    give_trained_weights(model)
    if grids != "random":  # weights of -1 and 1 make every product a multiple of one power of two
        for variable in model.trainable_variables:
            sign = np.sign(variable.numpy())
            variable.assign(sign * 127 / 128 if "kernel" in variable.path else sign * 2.0**-4)
    quantized = quantize_model(model, input_range=(-1, 1) if "Concatenate" in str(model.layers) else None)
    samples = []
    for name in quantized.plan.inputs:
        quantizer = quantized.quantizers[name]
        exponent = rng.integers(-6, -3)
        scale = np.float32(rng.uniform(0.01, 0.1)) if grids == "random" else np.float32(2.0**exponent)
        zero_point = 0 if "0" in grids else int(rng.integers(-128, 128))
        if quantizer.is_learned:
            set_grid(quantizer, scale, zero_point)
        scale, zero_point = (float(value) for value in quantizer.parameters())
        shape = quantized.plan.tensors[name].shape
        samples.append(((integers(16, shape, rng) - zero_point) * scale).astype(np.float32))
    set_output_grid(quantized, samples, grids)
    parity = verify(quantized, convert(quantized), samples)
    assert [(op.kind, op.identical, op.max_lsb) for op in parity.operators if op.max_lsb] == []


def set_output_grid(quantized, samples, grids):
    """A grid for what the operator computes: a little too small, so that some outputs saturate."""
    inputs = {name: quantized.quantizers[name] for name in quantized.plan.inputs}
    before = {name: [float(value) for value in quantizer.parameters()] for name, quantizer in inputs.items()}
    calibrate(quantized, samples if len(samples) > 1 else samples[0])
    for name, quantizer in inputs.items():
        set_grid(quantizer, *before[name])
    for quantizer in quantized.quantizers.values():
        if quantizer.is_learned and quantizer not in inputs.values():
            scale, zero_point = (float(value) for value in quantizer.parameters())
            set_grid(quantizer, 0.8 * scale if grids == "random" else 2.0 ** np.floor(np.log2(scale)), zero_point)


# --- small references of their own


def grid(scale, zero_point=0):
    return Grid(tf.constant(np.float32(scale)), tf.constant(np.float32(zero_point)), -128, 127)


def test_requantization_rounds_ties_to_even():
    accumulators = tf.constant([1.0, 3.0, 5.0, -1.0, -3.0, 1000.0, -1000.0])
    result = kernels.requantize(accumulators, tf.constant(0.5), grid(1.0), "NONE")
    np.testing.assert_array_equal(result, [0, 2, 2, 0, -2, 127, -128])


@pytest.mark.parametrize("activation, expected", [("NONE", (-128, 127)), ("RELU", (-60, 127)), ("RELU6", (-60, 60))])
def test_clamp_of_a_fused_activation(activation, expected):
    assert tuple(float(bound) for bound in grid(0.05, -60).clamp(activation)) == expected


def test_average_pool_divides_by_the_valid_part_of_the_window():
    """Ties away from zero; the border is not counted."""
    x = np.random.default_rng(0).integers(-128, 128, (2, 5, 5, 3)).astype(np.float32)
    result = kernels.average_pool(L.AveragePooling2D(3, 1, "same"), [tf.constant(x)], [grid(1.0)], grid(1.0), "NONE")
    for row, column in ((0, 0), (2, 2), (4, 1)):
        window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].astype(int)
        total, count = window.sum((1, 2)), window.shape[1] * window.shape[2]
        expected = np.sign(total) * ((np.abs(total) + count // 2) // count)
        np.testing.assert_array_equal(result[:, row, column], expected)


def test_add_shifts_ties_up():
    x, y = tf.constant([[1.0, -1.0, 3.0, 7.0]]), tf.constant([[0.0, 0.0, 0.0, -2.0]])
    result = kernels.add(L.Add(), [x, y], [grid(0.5), grid(0.5)], grid(1.0), "NONE")
    np.testing.assert_array_equal(result, [[1, 0, 2, 3]])


def test_accumulators_are_exact_integers():
    rng = np.random.default_rng(0)
    x, weights = rng.integers(-255, 256, (2, 8, 8, 64)), rng.integers(-127, 128, (3, 3, 64, 4))
    layer = L.Conv2D(4, 3)
    result = kernels.accumulate("CONV_2D", layer, tf.constant(x, tf.float32), tf.constant(weights, tf.float32))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(result, np.einsum("bhwikl,klio->bhwo", patches, weights))
