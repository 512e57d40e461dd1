"""What each integer operator computes, to the bit, as TensorFlow functions on integer-valued tensors.

The authority is the runtime that phones use by default: LiteRT with the XNNPACK delegate, and LiteRT's own kernels
for what the delegate leaves to them.  Every kernel takes the integers of its inputs (float32 tensors holding values
of int8, or wider accumulators) and returns those of its output; `tests/test_kernels.py` compares each with the
interpreter on random and on tie-prone data.  Gradients are the wrapper's business, not the kernels'.

Rounding, where each operator does it:
    conv, dense, mul     float32(acc) * float32 scale, ties to even
    mean                 the same on the sum of raw integers, zero points added before rounding
    add                  21-bit multipliers, arithmetic shift, ties up
    average pool         integer division of the sum over the valid window, ties away from zero
    leaky ReLU, requant. 8-bit fixed point, ties up
    tables               float32 function values, ties away from zero (LOGISTIC, TANH), or fixed point (HARD_SWISH)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mobileqat.fakequant import product, quotient, round_half_away


class Grid(NamedTuple):
    """Scale and zero point of a tensor as float32 scalars, and the integers it can hold."""

    scale: tf.Tensor
    zero_point: tf.Tensor
    qmin: int
    qmax: int

    def integers(self, real):
        """Integers of values that lie on this grid."""
        return tf.round(real / self.scale) + self.zero_point

    def real(self, integers):
        return (integers - self.zero_point) * self.scale

    def clamp(self, activation: str) -> tuple[tf.Tensor, tf.Tensor]:
        """Integers between which a fused activation keeps the output."""
        low, high = tf.constant(float(self.qmin)), tf.constant(float(self.qmax))
        if activation in ("RELU", "RELU6"):
            low = tf.maximum(low, self.zero_point)
        if activation == "RELU6":
            high = tf.minimum(high, round_half_away(quotient(6.0, self.scale)) + self.zero_point)
        return low, high


Kernel = Callable[[keras.layers.Layer, Sequence[tf.Tensor], Sequence[Grid], Grid, str], tf.Tensor]


# ------------------------------------------------------------------ accumulators of operators with weights


def accumulate(kind: str, layer, x, weights):
    """Exact int32 accumulators as float32: the layer's own operation on centred integers, without bias.

    float32 adds integers exactly up to 2**24, which sums of thousands of int8 products stay below in practice.
    """
    return _ACCUMULATE[kind](layer, x, weights)


def _conv_2d(layer, x, weights):
    return keras.ops.conv(
        x, weights, layer.strides, layer.padding, layer.data_format, dilation_rate=layer.dilation_rate
    )


def _depthwise_conv_2d(layer, x, weights):
    return keras.ops.depthwise_conv(
        x, weights, layer.strides, layer.padding, layer.data_format, dilation_rate=layer.dilation_rate
    )


def _transpose_conv(layer, x, weights):
    return keras.ops.conv_transpose(x, weights, list(layer.strides), layer.padding, data_format=layer.data_format)


def _fully_connected(layer, x, weights):
    return tf.tensordot(x, weights, 1) if len(x.shape) > 2 else tf.matmul(x, weights)


_ACCUMULATE: dict[str, Callable] = {
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _fully_connected,
}


def requantize(accumulators, scale, output: Grid, activation: str):
    """Accumulators to output integers: one float32 product, clamp, ties to even."""
    low, high = output.clamp(activation)
    scaled = tf.clip_by_value(accumulators * scale, low - output.zero_point, high - output.zero_point)
    return tf.round(scaled) + output.zero_point


# ------------------------------------------------------------------ element by element


def _int32(x):
    return tf.cast(x, tf.int32)


def _centred(x, grid: Grid):
    return _int32(x) - _int32(grid.zero_point)


def _exponent(x):
    """floor(log2(x)) of a positive float32, from its bits."""
    return tf.bitwise.right_shift(tf.bitcast(x, tf.int32), 23) - 127


def _power_of_two(exponent):
    return tf.bitcast(tf.bitwise.left_shift(exponent + 127, 23), tf.float32)


def _shift_right(x, bits):
    return tf.bitwise.right_shift(x, tf.broadcast_to(bits, tf.shape(x)))


def add(layer, inputs, grids, output: Grid, activation: str):
    ratios = [quotient(grid.scale, output.scale) for grid in grids]
    shift = 20 - _exponent(tf.maximum(*ratios))
    terms = [
        _centred(x, grid) * _int32(tf.round(ratio * _power_of_two(shift)))
        for x, grid, ratio in zip(inputs, grids, ratios, strict=True)
    ]
    half = tf.bitwise.left_shift(tf.constant(1), shift - 1)
    integers = tf.cast(_shift_right(terms[0] + terms[1] + half, shift), tf.float32) + output.zero_point
    return tf.clip_by_value(integers, *output.clamp(activation))


def mul(layer, inputs, grids, output: Grid, activation: str):
    (a, b), (grid_a, grid_b) = inputs, grids
    # An integer product keeps TensorFlow's graph optimizer from reordering the float multiplications.
    products = tf.cast(_centred(a, grid_a) * _centred(b, grid_b), tf.float32)
    return requantize(products, quotient(product(grid_a.scale, grid_b.scale), output.scale), output, activation)


def _fixed_point_8(centred, multiplier, output: Grid):
    integers = tf.bitwise.right_shift(centred * multiplier + 128, 8)
    return tf.clip_by_value(tf.cast(integers, tf.float32) + output.zero_point, float(output.qmin), float(output.qmax))


def leaky_relu(layer, inputs, grids, output: Grid, activation: str):
    centred = _centred(inputs[0], grids[0])
    ratio = quotient(grids[0].scale, output.scale)
    positive = _int32(tf.round(256.0 * ratio))
    negative = _int32(tf.round(256.0 * product(ratio, np.float32(layer.negative_slope))))
    return _fixed_point_8(centred, tf.where(centred >= 0, positive, negative), output)


def requantize_int8(layer, inputs, grids, output: Grid, activation: str):
    multiplier = _int32(tf.round(256.0 * quotient(grids[0].scale, output.scale)))
    return _fixed_point_8(_centred(inputs[0], grids[0]), multiplier, output)


def relu6(layer, inputs, grids, output: Grid, activation: str):
    return tf.clip_by_value(inputs[0], *output.clamp("RELU6"))


def minimum(layer, inputs, grids, output: Grid, activation: str):
    return tf.minimum(inputs[0], quantized_constant(layer.maximum, output))


def quantized_constant(value: float, grid: Grid):
    """The integer that stands for a constant operand on a tensor's grid."""
    integer = round_half_away(quotient(value, grid.scale)) + grid.zero_point
    return tf.clip_by_value(integer, float(grid.qmin), float(grid.qmax))


# ------------------------------------------------------------------ tables of 256 entries


def _look_up(x, table):
    return tf.gather(table, _int32(x) + 128)


def _function_table(function: Callable) -> Kernel:
    def kernel(layer, inputs, grids, output: Grid, activation: str):
        integers = tf.range(-128, 128, dtype=tf.float32)
        real = (integers - grids[0].zero_point) * grids[0].scale
        # float64 rounded once stands for the C library's correctly rounded float32 functions.
        values = tf.cast(function(tf.cast(real, tf.float64)), tf.float32)
        table = round_half_away(values * quotient(1.0, output.scale) + output.zero_point)
        return _look_up(inputs[0], tf.clip_by_value(table, float(output.qmin), float(output.qmax)))

    return kernel


def _divide_rounding_to_zero(x, divisor: int):
    return tf.where(x >= 0, x // divisor, -((-x) // divisor))


def _doubling_high_multiply(a, b):
    """int16 saturating rounding doubling multiply, the high half: round(a * b / 2**15)."""
    product = a * b
    nudged = tf.where(product >= 0, product + (1 << 14), product + 1 - (1 << 14))
    return tf.clip_by_value(_divide_rounding_to_zero(nudged, 1 << 15), -32768, 32767)


def _rounding_shift(x, bits):
    """Division by 2**bits, ties away from zero; bits >= 0."""
    mask = tf.bitwise.left_shift(tf.constant(1), bits) - 1
    remainder = tf.bitwise.bitwise_and(x, mask)
    threshold = tf.bitwise.right_shift(mask, 1) + tf.cast(x < 0, tf.int32)
    return _shift_right(x, bits) + tf.cast(remainder > threshold, tf.int32)


def _multiplier_16(ratio):
    """A positive ratio as (int16 mantissa, exponent): ratio = mantissa / 2**15 * 2**exponent."""
    exponent = _exponent(ratio) + 1
    mantissa = tf.cast(ratio, tf.float64) / tf.cast(_power_of_two(exponent), tf.float64)
    fixed = tf.floor(mantissa * 2.0**31 + 0.5)
    return _int32(tf.minimum(tf.floor((fixed + 2.0**15) / 2.0**16), 32767.0)), exponent


def hard_swish(layer, inputs, grids, output: Grid, activation: str):
    """LiteRT's HARD_SWISH: x on a grid 128 times finer, times a gate in [0, 1] on a 16-bit grid of 3 / 2**15."""
    fine = grids[0].scale * (1.0 / 128.0)
    output_mantissa, output_exponent = _multiplier_16(quotient(fine, output.scale))
    gate_mantissa, gate_exponent = _multiplier_16(quotient(fine, np.float32(3 / 32768)))
    x = (tf.range(-128, 128) - _int32(grids[0].zero_point)) * 128
    scaled = _doubling_high_multiply(x, output_mantissa)
    # A left shift is done in two saturating parts around the multiplication, a right shift after it.
    left, right = tf.maximum(gate_exponent, 0), tf.maximum(-gate_exponent, 0)
    before = tf.where(left > 0, left - 1, 0)
    gate = tf.clip_by_value(tf.bitwise.left_shift(x, tf.broadcast_to(before, x.shape)), -32768, 32767)
    gate = _doubling_high_multiply(gate, gate_mantissa)
    gate = tf.clip_by_value(tf.where(left > 0, gate * 2, gate), -32768, 32767)
    gate = tf.bitwise.right_shift(_rounding_shift(gate, right) + (1 << 15), 1)
    product = tf.clip_by_value(_divide_rounding_to_zero(gate * scaled, 1 << 15), -32768, 32767)
    shifted = _rounding_shift(product, tf.maximum(-output_exponent, 0))
    table = tf.cast(shifted, tf.float32) + output.zero_point
    return _look_up(inputs[0], tf.clip_by_value(table, float(output.qmin), float(output.qmax)))


def softmax(layer, inputs, grids, output: Grid, activation: str):
    steps = tf.range(256, dtype=tf.float32)
    table = tf.cast(tf.exp(tf.cast(-grids[0].scale * steps, tf.float64)), tf.float32)
    x = inputs[0]
    exponentials = tf.gather(table, _int32(tf.reduce_max(x, -1, keepdims=True) - x))
    # A running sum adds in the kernel's order; a tree would round differently.
    total = tf.cumsum(exponentials, axis=-1)[..., -1:]
    integers = round_half_away(exponentials * (1.0 / (total * output.scale))) + output.zero_point
    return tf.clip_by_value(integers, float(output.qmin), float(output.qmax))


# ------------------------------------------------------------------ over space


def mean(layer, inputs, grids, output: Grid, activation: str):
    x, count = inputs[0], float(inputs[0].shape[1] * inputs[0].shape[2])
    total = tf.cast(tf.reduce_sum(_int32(x), axis=(1, 2), keepdims=bool(layer.keepdims)), tf.float32)
    scale = product(quotient(grids[0].scale, output.scale), np.float32(1) / np.float32(count))
    offset = output.zero_point - grids[0].zero_point * count * scale
    return tf.clip_by_value(tf.round(total * scale + offset), float(output.qmin), float(output.qmax))


def average_pool(layer, inputs, grids, output: Grid, activation: str):
    x = inputs[0]
    window = tf.ones((*layer.pool_size, x.shape[-1], 1))
    settings = (window, layer.strides, layer.padding)
    total = _int32(keras.ops.depthwise_conv(x, *settings))
    count = _int32(keras.ops.depthwise_conv(tf.ones_like(x[:1]), *settings))
    magnitude = (tf.abs(total) + count // 2) // count
    return tf.cast(tf.sign(total) * magnitude, tf.float32)


def resize_bilinear(layer, inputs, grids, output: Grid, activation: str):
    """Half-pixel centres, weights of 11 fractional bits, ties up."""
    x = _int32(inputs[0])
    rows, columns = layer.size
    top, bottom, vertical = _bilinear_taps(x.shape[1], x.shape[1] * rows)
    left, right, horizontal = _bilinear_taps(x.shape[2], x.shape[2] * columns)

    def blend_columns(line):
        a, b = tf.gather(line, left, axis=2), tf.gather(line, right, axis=2)
        return a * 2048 + (b - a) * horizontal[:, None]

    upper, lower = blend_columns(tf.gather(x, top, axis=1)), blend_columns(tf.gather(x, bottom, axis=1))
    blended = upper * 2048 + (lower - upper) * vertical[:, None, None]
    return tf.cast(tf.bitwise.right_shift(blended + (1 << 21), 22), tf.float32)


def _bilinear_taps(size: int, new_size: int):
    ratio = tf.constant(size, tf.float32) / tf.constant(new_size, tf.float32)
    centre = tf.maximum((tf.range(new_size, dtype=tf.float32) + 0.5) * ratio - 0.5, 0.0)
    first = tf.minimum(_int32(tf.floor(centre)), size - 1)
    weight = _int32(tf.round((centre - tf.cast(first, tf.float32)) * 2048.0))
    return first, tf.minimum(first + 1, size - 1), weight


KERNELS: dict[str, Kernel] = {
    "ADD": add,
    "MUL": mul,
    "RELU6": relu6,
    "MINIMUM": minimum,
    "LEAKY_RELU": leaky_relu,
    "QUANTIZE": requantize_int8,
    "LOGISTIC": _function_table(tf.sigmoid),
    "TANH": _function_table(tf.tanh),
    "HARD_SWISH": hard_swish,
    "SOFTMAX": softmax,
    "MEAN": mean,
    "AVERAGE_POOL_2D": average_pool,
    "RESIZE_BILINEAR": resize_bilinear,
}
