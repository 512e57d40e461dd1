"""What each integer operator computes on int16 activations (16x8), to the bit: the rows that `kernels` has for int8.

XNNPACK takes no int16, so LiteRT's own kernels are the authority; every zero point is 0 and results saturate at
-32768 and 32767.  Rounding, where each operator does it:

    conv, depthwise, transposed conv, batch matmul   64-bit accumulators, multipliers of 16 bits, ties up
    dense, sum                                       float64 product, ties away from zero
    add, sub, mul, mean, abs, leaky ReLU, requantization   32-bit fixed point, rounded twice
    logistic, tanh                                   a table of 256 entries, linear between them
    exp, gelu, log, rsqrt, softmax                   tables of 513 entries, linear between them
    bilinear resizing                                weights of 10 bits, ties away from zero
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mobileqat import kernels
from mobileqat.fakequant import product, quotient, round_half_away
from mobileqat.fixed_point import (
    divide_multiplier,
    float64,
    multiplier_32,
    multiply,
    multiply_accumulator,
    wrap_16,
)
from mobileqat.kernels import Grid, Kernel


def int64(x):
    return tf.cast(x, tf.int64)


def _shift_right(x, bits: int):
    return tf.bitwise.right_shift(x, tf.constant(bits, x.dtype))


def _emit(integers, output: Grid, activation: str = "NONE"):
    return tf.clip_by_value(tf.cast(integers, tf.float32), *output.clamp(activation))


# ------------------------------------------------------------------ operators with weights


def _halves(x):
    """x = 256 * high + low with both near int8, so that float32 adds their products exactly, as it does int8's."""
    high = tf.floor((x + 128.0) / 256.0)
    return high, x - 256.0 * high


def accumulate(kind: str, layer, x, weights):
    """64-bit accumulators, as float64: exact for dense layers, for others as long as float32 is, see `kernels`."""
    if kind == "FULLY_CONNECTED":
        return kernels.accumulate(kind, layer, float64(x), float64(weights))
    high, low = (float64(kernels.accumulate(kind, layer, part, weights)) for part in _halves(x))
    return 256.0 * high + low


def requantize(kind: str, accumulators, input_scale, scales, output: Grid, activation: str):
    """Accumulators to output integers; `scales` are the weights' [channels]."""
    ratio = float64(input_scale) * float64(scales) / float64(output.scale)
    if kind == "FULLY_CONNECTED":
        return _emit(round_half_away(accumulators * ratio), output, activation)
    return _emit(multiply_accumulator(int64(accumulators), multiplier_32(ratio)), output, activation)


def batch_matmul(layer, inputs, grids, output: Grid, activation: str):
    a, b = map(float64, inputs)
    accumulators = tf.matmul(a, b, transpose_a=bool(layer.options["adj_x"]), transpose_b=bool(layer.options["adj_y"]))
    ratio = float64(product(grids[0].scale, grids[1].scale)) / float64(output.scale)
    return _emit(multiply_accumulator(int64(accumulators), multiplier_32(ratio)), output, activation)


# ------------------------------------------------------------------ element by element


# LiteRT's AVX2 loop over sums of equal shapes scales the addends with one rounding, its scalar code with two: a result
# in 100,000 differs.
_HAS_AVX2_LOOP = platform.machine().lower() in ("x86_64", "amd64")


def _weighted_sum(inputs, grids, output: Grid, activation: str, sign: int):
    twice_largest = 2.0 * float64(tf.maximum(grids[0].scale, grids[1].scale))
    rounds_once = _HAS_AVX2_LOOP and sign > 0 and inputs[0].shape[1:] == inputs[1].shape[1:]

    def scaled(x, grid: Grid):
        mantissa, exponent = multiplier_32(float64(grid.scale) / twice_largest)
        if rounds_once:
            return multiply(int64(x), (mantissa, exponent + 15))
        return multiply(int64(x) * (1 << 15), (mantissa, exponent))

    a, b = (scaled(x, grid) for x, grid in zip(inputs, grids, strict=True))
    ratio = multiplier_32(twice_largest / (32768.0 * float64(output.scale)))
    return _emit(multiply(a + sign * b, ratio), output, activation)


def add(layer, inputs, grids, output: Grid, activation: str):
    return _weighted_sum(inputs, grids, output, activation, 1)


def sub(layer, inputs, grids, output: Grid, activation: str):
    return _weighted_sum(inputs, grids, output, activation, -1)


def mul(layer, inputs, grids, output: Grid, activation: str):
    ratio = quotient(product(grids[0].scale, grids[1].scale), output.scale)
    return _emit(multiply(int64(inputs[0]) * int64(inputs[1]), multiplier_32(float64(ratio))), output, activation)


def absolute(layer, inputs, grids, output: Grid, activation: str):
    ratio = quotient(grids[0].scale, output.scale)
    return _emit(multiply(tf.abs(int64(inputs[0])), multiplier_32(float64(ratio))), output)


def requantize_int16(layer, inputs, grids, output: Grid, activation: str):
    ratio = float64(grids[0].scale) / float64(output.scale)
    return _emit(multiply(int64(inputs[0]), multiplier_32(ratio)), output)


def leaky_relu(layer, inputs, grids, output: Grid, activation: str):
    return _emit(kernels.multiply_slope(int64(inputs[0]), np.float32(layer.options["alpha"]), grids[0], output), output)


# ------------------------------------------------------------------ sums


def mean(layer, inputs, grids, output: Grid, activation: str):
    total, count = _total(layer, inputs[0])
    multiplier = multiplier_32(float64(grids[0].scale) / float64(output.scale))
    return _emit(multiply(total, divide_multiplier(multiplier, count)), output)


def sum_(layer, inputs, grids, output: Grid, activation: str):
    total, _ = _total(layer, inputs[0])
    return _emit(round_half_away(float64(total) * (float64(grids[0].scale) / float64(output.scale))), output)


def _total(layer, x):
    axes = tuple(int(axis) for axis in layer.options["axes"])
    total = tf.reduce_sum(int64(x), axis=axes, keepdims=bool(layer.options["keepdims"]))
    return total, int(np.prod([x.shape[axis] for axis in axes]))


# ------------------------------------------------------------------ tables, linear between their entries


def _interpolate(table, x):
    """Nine bits of an int16 choose two of 513 entries, seven lie between them; differences wrap around as in C."""
    index, offset = _shift_right(x, 7) + 256, tf.bitwise.bitwise_and(x, tf.constant(0x7F, x.dtype))
    base, following = tf.gather(table, index), tf.gather(table, index + 1)
    return wrap_16(base + _shift_right(wrap_16(following - base) * offset + 64, 7))


def _float32(x):
    """Rounded to float32, in float64, where TensorFlow's graph optimizer moves no rounding."""
    return float64(tf.cast(x, tf.float32))


def _table(function: Callable, input_scale, output_scale, rounded: Callable = _float32):
    """The 513 entries of a function: its values, moved by half of the error that a straight line makes midway."""
    low, high = rounded(input_scale * -32768.0), rounded(input_scale * 32767.0)
    step = rounded(rounded(high - low) / 512.0)
    span = rounded(rounded(output_scale * 32767.0) - rounded(output_scale * -32768.0))
    inverse = rounded(65536.0 / span)

    def scaled(x):
        return rounded(rounded(function(x)) * inverse)

    left = rounded(low + rounded(tf.range(513, dtype=tf.float64) * step))
    values = scaled(left)
    midway = round_half_away(scaled(rounded(left[:-1] + rounded(step / 2.0))))
    straight = round_half_away(rounded(rounded(values[1:] + round_half_away(values[:-1])) / 2.0))
    entries = round_half_away(values[:-1]) - round_half_away(rounded(rounded(straight - midway) / 2.0))
    last = round_half_away(scaled(high))
    return int64(tf.clip_by_value(tf.concat([entries, last[None]], 0), -32768.0, 32767.0))


def _tabulated(function: Callable) -> Kernel:
    """`function(layer, x, output)` on float64 tensors."""

    def kernel(layer, inputs, grids, output: Grid, activation: str):
        table = _table(lambda x: function(layer, x, output), float64(grids[0].scale), float64(output.scale))
        return _emit(_interpolate(table, int64(inputs[0])), output)

    return kernel


def _log(layer, x, output: Grid):
    return tf.where(x > 0.0, tf.math.log(tf.where(x > 0.0, x, 1.0)), -32768.0 * float64(output.scale))


def _inverse_root(layer, x, output: Grid):
    root = _float32(tf.sqrt(tf.where(x > 0.0, x, 1.0)))
    return tf.where(x > 0.0, 1.0 / root, 32767.0 * float64(output.scale))


def _softmax_tables() -> tuple[np.ndarray, np.ndarray]:
    """exp on [-10, 0] and 1 / (1 + x) on [0, 1], computed in float64; both on a grid of [-1, 1]."""

    def away(x):
        return np.sign(x) * np.floor(np.abs(x) + 0.5)

    def entries(function, low, high):
        inverse = 65536.0 / 2.0
        step = (high - low) / 512
        left = low + np.arange(513) * step
        values = function(left) * inverse
        midway = away(function(left[:-1] + step / 2) * inverse)
        error = away((values[1:] + away(values[:-1])) / 2) - midway
        last = away(function(np.array([high])) * inverse)
        return np.clip(np.concatenate([away(values[:-1]) - away(error / 2), last]), -32768, 32767).astype(np.int64)

    return entries(np.exp, -10.0, 0.0), entries(lambda x: 1 / (1 + x), 0.0, 1.0)


_EXPONENTIALS, _RECIPROCALS = _softmax_tables()


def _leading_bit(x):
    """floor(log2(x)) of positive int64 below 2**53."""
    return _shift_right(tf.bitcast(float64(x), tf.int64), 52) - 1023


def softmax(layer, inputs, grids, output: Grid, activation: str):
    x = int64(inputs[0])
    scale = product(grids[0].scale, np.float32(layer.options.get("beta", 1.0)))
    difference = x - tf.reduce_max(x, -1, keepdims=True)
    scaled = multiply(difference, multiplier_32(float64(scale) / (10.0 / 65535.0))) + 32767
    exponentials = _interpolate(tf.constant(_EXPONENTIALS), tf.clip_by_value(scaled, -32768, 32767))
    total = tf.reduce_sum(exponentials, -1, keepdims=True)
    shift = _leading_bit(total)
    # The sum as 1 + fraction, the fraction in 16 bits and then moved to those of an int16.
    fraction = _shift_right(tf.bitwise.left_shift(total, 30 - shift) + (1 << 13), 14) - (1 << 15) - (1 << 16)
    reciprocal = _interpolate(tf.constant(_RECIPROCALS), tf.clip_by_value(fraction, -32768, 32767))
    products = exponentials * reciprocal + tf.bitwise.left_shift(tf.ones_like(shift), shift - 1)
    probabilities = tf.bitwise.right_shift(products, tf.broadcast_to(shift, tf.shape(products)))
    return tf.cast(tf.clip_by_value(probabilities, 0, 32767), tf.float32)


def _sigmoid_entries() -> np.ndarray:
    """LiteRT's table of sigmoid(i / 24) in 1 / 65536: moved by half of the error that a straight line makes midway."""
    x = np.arange(256)
    exact, midway, following = (65536 / (1 + np.exp(-(x + step) / 24)) for step in (0, 0.5, 1))
    entries = np.round(exact - ((exact + following) / 2 - midway) / 2)
    entries[-1] = 65535
    return entries.astype(np.int64)


_SIGMOID = _sigmoid_entries()


def _table_multiplier(scale):
    """The factor to a grid of 1 / 12288 as (whole number, bits to shift), cut off."""
    factor = float64(scale) * (4096.0 * 3.0)
    # How often the factor doubles before it exceeds 32767 / 2.
    bits = _shift_right(tf.bitcast(factor, tf.int64), 52) - 1023
    shift = tf.clip_by_value(14 - bits, 0, 31)
    scaled = factor * tf.cast(tf.bitwise.left_shift(tf.ones_like(shift), shift), tf.float64)
    return int64(scaled), shift


def _on_table_grid(x, scale):
    """Integers times the factor, ties up."""
    multiplier, shift = _table_multiplier(scale)
    half = tf.where(shift > 0, tf.bitwise.left_shift(tf.ones_like(shift), tf.maximum(shift - 1, 0)), 0)
    return tf.bitwise.right_shift(int64(x) * multiplier + half, tf.broadcast_to(shift, tf.shape(x)))


def _sigmoid_between(magnitude, bits: int, beyond: int):
    """The table at a magnitude with so many bits between entries; `beyond` past its end."""
    index = tf.minimum(_shift_right(magnitude, bits), 254)
    low, high = tf.gather(_SIGMOID, index), tf.gather(_SIGMOID, index + 1)
    between = tf.bitwise.bitwise_and(magnitude, tf.constant((1 << bits) - 1, tf.int64)) * (high - low)
    return tf.where(_shift_right(magnitude, bits) >= 255, tf.constant(beyond, tf.int64), low * (1 << bits) + between)


# At an input scale within 0.07 % of 2**-12, for TANH also of 2**-11, LiteRT computes in gemmlowp's fixed point instead,
# up to 12 LSB away from these two; parity tells.


def logistic(layer, inputs, grids, output: Grid, activation: str):
    x = _on_table_grid(inputs[0], grids[0].scale)
    result = _sigmoid_between(tf.abs(x), 9, 0x7FFF << 10)
    return tf.cast(_shift_right(tf.where(x >= 0, result + 512, (1 << 25) - result + 511), 10), tf.float32)


def tanh(layer, inputs, grids, output: Grid, activation: str):
    """2 * sigmoid(2 * x) - 1."""
    x = _on_table_grid(inputs[0], grids[0].scale)
    result = _sigmoid_between(tf.abs(x), 8, 0xFFFF << 8) - (1 << 23)
    return tf.cast(_shift_right(tf.where(x >= 0, result + 128, 127 - result), 8), tf.float32)


# ------------------------------------------------------------------ over space


def average_pool(layer, inputs, grids, output: Grid, activation: str):
    x = inputs[0]
    high, low, count = (int64(kernels.window_sums(layer, part)) for part in (*_halves(x), tf.ones_like(x[:1])))
    total = 256 * high + low
    return tf.cast(tf.sign(total) * ((tf.abs(total) + count // 2) // count), tf.float32)


def _taps(size: int, new_size: int):
    """Neighbours and the weight of the second in 1 / 1024, by integer division as in C."""
    ratio = (1024 * size + new_size // 2) // new_size
    centre = np.arange(new_size) * ratio + ratio // 2 - 512
    first = np.clip(np.trunc(centre / 1024).astype(np.int64), 0, size - 1)
    second = np.minimum(np.trunc((centre + 1023) / 1024).astype(np.int64), size - 1)
    return first, second, centre - 1024 * first


def resize_bilinear(layer, inputs, grids, output: Grid, activation: str):
    x = int64(inputs[0])
    for axis, new_size in zip((1, 2), layer.options["size"], strict=True):
        first, second, weight = _taps(x.shape[axis], new_size)
        weight = weight.reshape([-1 if a == axis else 1 for a in range(4)])
        x = tf.gather(x, first, axis=axis) * (1024 - weight) + tf.gather(x, second, axis=axis) * weight
    magnitude = _shift_right(tf.abs(x) + (1 << 19), 20)
    return tf.cast(tf.where(x >= 0, magnitude, -magnitude), tf.float32)


KERNELS: dict[str, Kernel] = {
    "ADD": add,
    "SUB": sub,
    "MUL": mul,
    "BATCH_MATMUL": batch_matmul,
    "MEAN": mean,
    "SUM": sum_,
    "AVERAGE_POOL_2D": average_pool,
    "RESIZE_BILINEAR": resize_bilinear,
    "QUANTIZE": requantize_int16,
    "RELU6": kernels.relu6,
    "LEAKY_RELU": leaky_relu,
    "ABS": absolute,
    "GELU": _tabulated(kernels.gelu),
    "LOGISTIC": logistic,
    "TANH": tanh,
    "EXP": _tabulated(lambda layer, x, output: tf.exp(x)),
    "LOG": _tabulated(_log),
    "RSQRT": _tabulated(_inverse_root),
    "SOFTMAX": softmax,
}
