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
    leaky ReLU, requant. 8-bit fixed point, ties up; leaky ReLU of a slope beyond that as abs
    sub                  as add; sum as mean
    batch matmul         as conv where the right operand's zero point is 0, else LiteRT's 32-bit fixed point
    abs, prelu, l2, rsqrt  LiteRT's 32-bit fixed point, rounded twice
    tables               float32 function values; ties to even after the zero point is added (LOGISTIC, TANH, ELU), away
                         from zero before (GELU, EXP, LOG), or 16-bit fixed point (HARD_SWISH)
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mobileqat.fakequant import product, quotient, round_half_away
from mobileqat.fixed_point import (
    divide_rounding_to_zero,
    doubling_high_multiply,
    exponent_of,
    float64,
    high_multiply,
    int32,
    inverse_square_root,
    multiplier_16,
    multiplier_32,
    multiply,
    multiply_ties_up,
    power_of_two,
    rounding_shift,
    rounding_shift_64,
    shift_right,
)
from mobileqat.primitives import FLOAT


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


def leaves_delegate(kind: str, storage_bits: int, layer) -> bool:
    """Whether XNNPACK refuses a kernel stored as int4, so that LiteRT's built-in one unpacks it and rounds twice.

    XNNPACK takes dense layers with an even number of inputs, two of which share a byte.  On ARM the built-in
    convolution rounds once, as XNNPACK does; measured on Cortex-A53 and A76.
    """
    if kind == "FULLY_CONNECTED":
        return storage_bits == 4 and layer.kernel.shape[0] % 2 == 1
    return storage_bits == 4 and platform.machine() not in ("aarch64", "arm64")


def exact_ratio(input_scale, scales, output_scale):
    """s_in * s_w / s_out in float64, as the built-in kernels compute it."""
    return float64(input_scale) * float64(scales) / float64(output_scale)


def requantize_fixed_point(accumulators, ratio, output: Grid, activation: str):
    """Accumulators to output integers by the built-in kernels: a 32-bit multiplier, then a shift, ties up in both."""
    scaled = multiply_ties_up(tf.cast(accumulators, tf.int64), multiplier_32(ratio))
    return tf.clip_by_value(tf.cast(scaled, tf.float32) + output.zero_point, *output.clamp(activation))


# ------------------------------------------------------------------ element by element


def _centred(x, grid: Grid):
    return int32(x) - int32(grid.zero_point)


def _weighted_sum(inputs, grids, output: Grid, activation: str, signs):
    ratios = [quotient(grid.scale, output.scale) for grid in grids]
    shift = 20 - exponent_of(tf.maximum(*ratios))
    a, b = (
        _centred(x, grid) * (sign * int32(tf.round(ratio * power_of_two(shift))))
        for x, grid, ratio, sign in zip(inputs, grids, ratios, signs, strict=True)
    )
    half = tf.bitwise.left_shift(tf.constant(1), shift - 1)
    integers = tf.cast(shift_right(a + b + half, shift), tf.float32) + output.zero_point
    return tf.clip_by_value(integers, *output.clamp(activation))


def add(layer, inputs, grids, output: Grid, activation: str):
    return _weighted_sum(inputs, grids, output, activation, (1, 1))


def sub(layer, inputs, grids, output: Grid, activation: str):
    return _weighted_sum(inputs, grids, output, activation, (1, -1))


def mul(layer, inputs, grids, output: Grid, activation: str):
    (a, b), (grid_a, grid_b) = inputs, grids
    # An integer product keeps TensorFlow's graph optimizer from reordering the float multiplications.
    products = tf.cast(_centred(a, grid_a) * _centred(b, grid_b), tf.float32)
    return requantize(products, quotient(product(grid_a.scale, grid_b.scale), output.scale), output, activation)


def _fixed_point_8(centred, multiplier, output: Grid):
    integers = tf.bitwise.right_shift(centred * multiplier + 128, 8)
    return tf.clip_by_value(tf.cast(integers, tf.float32) + output.zero_point, float(output.qmin), float(output.qmax))


def leaky_relu(layer, inputs, grids, output: Grid, activation: str):
    centred, alpha = _centred(inputs[0], grids[0]), np.float32(layer.options["alpha"])
    ratio = quotient(grids[0].scale, output.scale)
    sloped = product(ratio, alpha)
    positive, negative = (int32(tf.round(256.0 * factor)) for factor in (ratio, sloped))
    delegated = _fixed_point_8(centred, tf.where(centred >= 0, positive, negative), output)
    # XNNPACK leaves factors that its 8 bits cannot hold to LiteRT's own kernel.
    is_delegated = (ratio >= 1 / 256) & (ratio <= 128.0) & (tf.abs(sloped) >= 1 / 256) & (tf.abs(sloped) < 128.0)
    scaled = tf.cast(multiply_slope(centred, alpha, grids[0], output), tf.float32) + output.zero_point
    return tf.where(is_delegated, delegated, tf.clip_by_value(scaled, float(output.qmin), float(output.qmax)))


def multiply_slope(x, alpha: np.float32, grid: Grid, output: Grid):
    """Centred integers times a leaky ReLU's factor, in the 32-bit fixed point of LiteRT's own kernel."""
    identity = multiplier_32(float64(quotient(grid.scale, output.scale)))
    slope = multiplier_32(float64(quotient(product(grid.scale, abs(alpha)), output.scale)))
    return tf.where(x >= 0, multiply(x, identity), multiply(-x if alpha < 0 else x, slope))


def requantize_int8(layer, inputs, grids, output: Grid, activation: str):
    multiplier = int32(tf.round(256.0 * quotient(grids[0].scale, output.scale)))
    return _fixed_point_8(_centred(inputs[0], grids[0]), multiplier, output)


def relu6(layer, inputs, grids, output: Grid, activation: str):
    return tf.clip_by_value(inputs[0], *output.clamp("RELU6"))


# ------------------------------------------------------------------ tables of 256 entries


def _look_up(x, table):
    return tf.gather(table, int32(x) + 128)


def _function_table(function: Callable) -> Kernel:
    """The delegate's table: the zero point is added in float32, then ties go to even."""

    def kernel(layer, inputs, grids, output: Grid, activation: str):
        integers = tf.range(-128, 128, dtype=tf.float32)
        real = (integers - grids[0].zero_point) * grids[0].scale
        # float64 rounded once stands for the C library's correctly rounded float32 functions.
        values = tf.cast(function(float64(real)), tf.float32)
        table = tf.round(values * quotient(1.0, output.scale) + output.zero_point)
        return _look_up(inputs[0], tf.clip_by_value(table, float(output.qmin), float(output.qmax)))

    return kernel


def _sigmoid(x):
    """The delegate's float32 steps: near a tie they show."""
    return 1.0 / _rounded(1.0 + _rounded(tf.exp(-x)))


def hard_swish(layer, inputs, grids, output: Grid, activation: str):
    """LiteRT's HARD_SWISH: x on a grid 128 times finer, times a gate in [0, 1] on a 16-bit grid of 3 / 2**15."""
    fine = grids[0].scale * (1.0 / 128.0)
    output_mantissa, output_exponent = multiplier_16(quotient(fine, output.scale))
    gate_mantissa, gate_exponent = multiplier_16(quotient(fine, np.float32(3 / 32768)))
    x = (tf.range(-128, 128) - int32(grids[0].zero_point)) * 128
    scaled = doubling_high_multiply(x, output_mantissa)
    # A left shift is done in two saturating parts around the multiplication, a right shift after it.
    left, right = tf.maximum(gate_exponent, 0), tf.maximum(-gate_exponent, 0)
    before = tf.where(left > 0, left - 1, 0)
    gate = tf.clip_by_value(tf.bitwise.left_shift(x, tf.broadcast_to(before, x.shape)), -32768, 32767)
    gate = doubling_high_multiply(gate, gate_mantissa)
    gate = tf.clip_by_value(tf.where(left > 0, gate * 2, gate), -32768, 32767)
    gate = tf.bitwise.right_shift(rounding_shift(gate, right) + (1 << 15), 1)
    product = tf.clip_by_value(divide_rounding_to_zero(gate * scaled, 1 << 15), -32768, 32767)
    shifted = rounding_shift(product, tf.maximum(-output_exponent, 0))
    table = tf.cast(shifted, tf.float32) + output.zero_point
    return _look_up(inputs[0], tf.clip_by_value(table, float(output.qmin), float(output.qmax)))


def _litert_table(function: Callable):
    """LiteRT's own table (the delegate's is `_function_table`): rounds before the zero point is added."""

    def kernel(layer, inputs, grids, output: Grid, activation: str):
        real = (tf.range(-128, 128, dtype=tf.float32) - grids[0].zero_point) * grids[0].scale
        values = tf.cast(function(layer, float64(real), output), tf.float32)
        table = round_half_away(values * quotient(1.0, output.scale)) + output.zero_point
        return _look_up(inputs[0], tf.clip_by_value(table, float(output.qmin), float(output.qmax)))

    return kernel


def gelu(layer, x, output):
    """The kernel's float32 steps, each from float64: near a tie the order of roundings shows."""
    if layer.options.get("approximate"):
        cubed = _rounded(_rounded(_rounded(np.float32(0.044715) * x) * x) * x)
        gate = _rounded(1.0 + _rounded(tf.tanh(_rounded(np.float32(np.sqrt(2.0 / np.pi)) * _rounded(x + cubed)))))
    else:
        gate = _rounded(tf.math.erfc(_rounded(x * np.float32(-np.sqrt(0.5)))))
    return 0.5 * x * gate


def _rounded(x):
    return float64(tf.cast(x, tf.float32))


def _log(layer, x, output: Grid):
    lowest = float64(output.scale) * (output.qmin - float64(output.zero_point))
    return tf.where(x > 0.0, tf.math.log(tf.where(x > 0.0, x, 1.0)), lowest)


def table(layer, inputs, grids, output: Grid, activation: str):
    """A function that the runtime has no operator for: a table of our own, correctly rounded, ties away from zero."""
    function = partial(FLOAT["TABLE"], **layer.options)
    real = (tf.range(-128, 128, dtype=tf.float32) - grids[0].zero_point) * grids[0].scale
    values = tf.cast(function(float64(real)), tf.float32)
    values = tf.where(tf.math.is_nan(values), tf.zeros_like(values), values)
    integers = round_half_away(values * quotient(1.0, output.scale)) + output.zero_point
    return _look_up(inputs[0], tf.clip_by_value(integers, float(output.qmin), float(output.qmax)))


def softmax(layer, inputs, grids, output: Grid, activation: str):
    steps = tf.range(256, dtype=tf.float32)
    scale = product(grids[0].scale, np.float32(layer.options.get("beta", 1.0)))
    table = tf.cast(tf.exp(float64(-scale * steps)), tf.float32)
    x = inputs[0]
    exponentials = tf.gather(table, int32(tf.reduce_max(x, -1, keepdims=True) - x))
    # A running sum adds in the kernel's order; a tree would round differently.
    total = tf.cumsum(exponentials, axis=-1)[..., -1:]
    integers = round_half_away(exponentials * (1.0 / (total * output.scale))) + output.zero_point
    return tf.clip_by_value(integers, float(output.qmin), float(output.qmax))


# ------------------------------------------------------------------ LiteRT's 32-bit fixed point


def _emit(integers, output: Grid, activation: str = "NONE"):
    return tf.clip_by_value(tf.cast(integers, tf.float32) + output.zero_point, *output.clamp(activation))


def absolute(layer, inputs, grids, output: Grid, activation: str):
    magnitude = tf.abs(_centred(inputs[0], grids[0]))
    # A ratio of 1 (the mantissa is then 2**30, the exponent 1) leaves integers as they are.
    return _emit(multiply(magnitude, multiplier_32(float64(quotient(grids[0].scale, output.scale)))), output)


def prelu(layer, inputs, grids, output: Grid, activation: str):
    """Second input: the slopes, on a grid of their own."""
    x, slope = (_centred(*operand) for operand in zip(inputs, grids, strict=True))
    positive = multiplier_32(float64(quotient(grids[0].scale, output.scale)))
    negative = multiplier_32(float64(quotient(product(grids[0].scale, grids[1].scale), output.scale)))
    scaled = tf.where(x >= 0, multiply(x + 0 * slope, positive), multiply(x * slope, negative))
    return _emit(scaled, output)


def l2_normalization(layer, inputs, grids, output: Grid, activation: str):
    """Over the last axis; the output grid is fixed at scale 1 / 128, zero point 0."""
    x = tf.cast(_centred(inputs[0], grids[0]), tf.int64)
    mantissa, exponent = inverse_square_root(tf.reduce_sum(x * x, -1, keepdims=True))
    scaled = multiply(x, (mantissa, exponent + 7))
    return tf.clip_by_value(tf.cast(scaled, tf.float32), -128.0, 127.0)


def rsqrt(layer, inputs, grids, output: Grid, activation: str):
    """Inputs below the zero point make the runtime fail; here they give the largest integer, as 0 does."""
    centred = tf.range(256, dtype=tf.int64)
    mantissa, exponent = inverse_square_root(tf.maximum(centred, 1))
    exponent = exponent + 20
    left, right = tf.maximum(exponent, 0), tf.maximum(-exponent, 0)
    inverse = rounding_shift_64(high_multiply(tf.bitwise.left_shift(tf.ones_like(left), left), mantissa), right)
    scale = multiplier_32(1.0 / float64(product(tf.cast(tf.sqrt(float64(grids[0].scale)), tf.float32), output.scale)))
    values = _emit(multiply(inverse, (scale[0], scale[1] - 20)), output)
    table = tf.where(centred == 0, 127.0, values)
    return tf.gather(table, tf.maximum(_centred(inputs[0], grids[0]), 0))


# ------------------------------------------------------------------ sums


def _reduced(layer, x):
    axes = tuple(int(axis) for axis in layer.options["axes"])
    return axes, float(np.prod([x.shape[axis] for axis in axes]))


def _scaled_sum(layer, x, axes, count, scale, grid: Grid, output: Grid):
    total = tf.cast(tf.reduce_sum(int32(x), axis=axes, keepdims=bool(layer.options["keepdims"])), tf.float32)
    offset = output.zero_point - grid.zero_point * count * scale
    return tf.clip_by_value(tf.round(total * scale + offset), float(output.qmin), float(output.qmax))


def mean(layer, inputs, grids, output: Grid, activation: str):
    axes, count = _reduced(layer, inputs[0])
    scale = product(quotient(grids[0].scale, output.scale), np.float32(1) / np.float32(count))
    return _scaled_sum(layer, inputs[0], axes, count, scale, grids[0], output)


def sum_(layer, inputs, grids, output: Grid, activation: str):
    axes, count = _reduced(layer, inputs[0])
    return _scaled_sum(layer, inputs[0], axes, count, quotient(grids[0].scale, output.scale), grids[0], output)


def batch_matmul(layer, inputs, grids, output: Grid, activation: str):
    """The delegate takes a right operand with zero point 0, LiteRT itself the others: two roundings.

    Sums are exact in float32 up to 2**24.
    """
    a, b = (x - grid.zero_point for x, grid in zip(inputs, grids, strict=True))
    accumulators = tf.matmul(a, b, transpose_a=bool(layer.options["adj_x"]), transpose_b=bool(layer.options["adj_y"]))
    scales = product(grids[0].scale, grids[1].scale)
    delegated = requantize(accumulators, quotient(scales, output.scale), output, activation)
    builtin = _emit(multiply(int32(accumulators), multiplier_32(float64(scales) / float64(output.scale))), output)
    return tf.where(grids[1].zero_point == 0.0, delegated, builtin)


# ------------------------------------------------------------------ over space


def window_sums(layer, x):
    """Sums over the windows of a pooling layer, [n, rows, columns, channels]; exact for integers up to 2**24.

    Channels become samples: TensorFlow's depthwise convolution takes unequal strides only with oneDNN, which is off on
    many CPUs.
    """
    _, rows, columns, channels = x.shape
    planes = tf.reshape(tf.transpose(x, (0, 3, 1, 2)), (-1, rows, columns, 1))
    window = tf.ones((*layer.options["pool_size"], 1, 1))
    sums = tf.nn.conv2d(planes, window, layer.options["strides"], layer.options["padding"].upper())
    return tf.transpose(tf.reshape(sums, (-1, channels, *sums.shape[1:3])), (0, 2, 3, 1))


def average_pool(layer, inputs, grids, output: Grid, activation: str):
    x = inputs[0]
    total, count = int32(window_sums(layer, x)), int32(window_sums(layer, tf.ones_like(x[:1])))
    magnitude = (tf.abs(total) + count // 2) // count
    return tf.cast(tf.sign(total) * magnitude, tf.float32)


def resize_bilinear(layer, inputs, grids, output: Grid, activation: str):
    """Half-pixel centres, weights of 11 fractional bits, ties up."""
    x = int32(inputs[0])
    rows, columns = layer.options["size"]
    top, bottom, vertical = _bilinear_taps(x.shape[1], rows)
    left, right, horizontal = _bilinear_taps(x.shape[2], columns)

    def blend_columns(line):
        a, b = tf.gather(line, left, axis=2), tf.gather(line, right, axis=2)
        return a * 2048 + (b - a) * horizontal[:, None]

    upper, lower = blend_columns(tf.gather(x, top, axis=1)), blend_columns(tf.gather(x, bottom, axis=1))
    blended = upper * 2048 + (lower - upper) * vertical[:, None, None]
    return tf.cast(tf.bitwise.right_shift(blended + (1 << 21), 22), tf.float32)


def _bilinear_taps(size: int, new_size: int):
    """Neighbours and weights; in NumPy, so that no graph optimizer touches the float32 arithmetic."""
    ratio = np.float32(size) / np.float32(new_size)
    centre = np.maximum(
        (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * ratio - np.float32(0.5), np.float32(0)
    )
    first = np.minimum(np.floor(centre).astype(np.int32), size - 1)
    weight = np.rint((centre - first.astype(np.float32)) * np.float32(2048)).astype(np.int32)
    return first, np.minimum(first + 1, size - 1), weight


KERNELS: dict[str, Kernel] = {
    "ADD": add,
    "SUB": sub,
    "MUL": mul,
    "BATCH_MATMUL": batch_matmul,
    "MEAN": mean,
    "SUM": sum_,
    "AVERAGE_POOL_2D": average_pool,
    "RESIZE_BILINEAR": resize_bilinear,
    "QUANTIZE": requantize_int8,
    "RELU6": relu6,
    "LEAKY_RELU": leaky_relu,
    "PRELU": prelu,
    "ELU": _function_table(lambda x: tf.where(x < 0.0, tf.math.expm1(x), x)),
    "GELU": _litert_table(gelu),
    "HARD_SWISH": hard_swish,
    "ABS": absolute,
    "EXP": _litert_table(lambda layer, x, output: tf.exp(x)),
    "LOG": _litert_table(_log),
    "RSQRT": rsqrt,
    "TABLE": table,
    "LOGISTIC": _function_table(_sigmoid),
    "TANH": _function_table(tf.tanh),
    "SOFTMAX": softmax,
    "L2_NORMALIZATION": l2_normalization,
}
