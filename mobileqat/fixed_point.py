"""Fixed-point arithmetic of LiteRT's kernels on integer tensors, to the bit.

A positive ratio is a mantissa and an exponent: of 16 bits in HARD_SWISH, of 32 bits elsewhere.  Products round twice,
first in the doubling high multiply, then in the shift that follows.
"""

from __future__ import annotations

import tensorflow as tf


def int32(x):
    return tf.cast(x, tf.int32)


def exponent_of(x):
    """floor(log2(x)) of a positive float32, from its bits."""
    return tf.bitwise.right_shift(tf.bitcast(x, tf.int32), 23) - 127


def power_of_two(exponent):
    return tf.bitcast(tf.bitwise.left_shift(exponent + 127, 23), tf.float32)


def shift_right(x, bits):
    return tf.bitwise.right_shift(x, tf.broadcast_to(bits, tf.shape(x)))


# ------------------------------------------------------------------ 16 bits


def divide_rounding_to_zero(x, divisor: int):
    return tf.where(x >= 0, x // divisor, -((-x) // divisor))


def doubling_high_multiply(a, b):
    """int16 saturating rounding doubling multiply, the high half: round(a * b / 2**15)."""
    product = a * b
    nudged = tf.where(product >= 0, product + (1 << 14), product + 1 - (1 << 14))
    return tf.clip_by_value(divide_rounding_to_zero(nudged, 1 << 15), -32768, 32767)


def rounding_shift(x, bits):
    """Division by 2**bits, ties away from zero; bits >= 0."""
    mask = tf.bitwise.left_shift(tf.constant(1), bits) - 1
    remainder = tf.bitwise.bitwise_and(x, mask)
    threshold = tf.bitwise.right_shift(mask, 1) + tf.cast(x < 0, tf.int32)
    return shift_right(x, bits) + tf.cast(remainder > threshold, tf.int32)


def multiplier_16(ratio):
    """A positive ratio as (int16 mantissa, exponent): ratio = mantissa / 2**15 * 2**exponent."""
    exponent = exponent_of(ratio) + 1
    mantissa = tf.cast(ratio, tf.float64) / tf.cast(power_of_two(exponent), tf.float64)
    fixed = tf.floor(mantissa * 2.0**31 + 0.5)
    return int32(tf.minimum(tf.floor((fixed + 2.0**15) / 2.0**16), 32767.0)), exponent


# ------------------------------------------------------------------ 32 bits


def float64(x):
    return tf.cast(x, tf.float64)


def _float64_power_of_two(exponent):
    return tf.bitcast(tf.bitwise.left_shift(tf.cast(exponent, tf.int64) + 1023, tf.constant(52, tf.int64)), tf.float64)


def multiplier_32(ratio):
    """A positive float64 ratio as int64 (mantissa in [2**30, 2**31), exponent): mantissa / 2**31 * 2**exponent."""
    exponent = tf.bitwise.right_shift(tf.bitcast(ratio, tf.int64), tf.constant(52, tf.int64)) - 1022
    fixed = tf.cast(tf.floor(ratio / _float64_power_of_two(exponent) * 2.0**31 + 0.5), tf.int64)
    carry = fixed == 2**31
    fixed, exponent = tf.where(carry, fixed // 2, fixed), exponent + tf.cast(carry, tf.int64)
    tiny = exponent < -31
    return tf.where(tiny, tf.zeros_like(fixed), fixed), tf.where(tiny, tf.zeros_like(exponent), exponent)


def _shift_left_64(x, bits):
    return tf.bitwise.left_shift(x, tf.broadcast_to(bits, tf.shape(x)))


def high_multiply(a, b):
    """round(a * b / 2**31) of int64 tensors that hold int32 values, ties up (gemmlowp's nudge, then truncation)."""
    product = a * b
    nudged = tf.where(product >= 0, product + (1 << 30), product + 1 - (1 << 30))
    magnitude = tf.bitwise.right_shift(tf.abs(nudged), tf.constant(31, tf.int64))
    return tf.minimum(tf.where(nudged >= 0, magnitude, -magnitude), 2**31 - 1)


def rounding_shift_64(x, bits):
    """Division by 2**bits, ties away from zero; bits >= 0."""
    bits = tf.broadcast_to(bits, tf.shape(x))
    mask = tf.bitwise.left_shift(tf.ones_like(x), bits) - 1
    threshold = tf.bitwise.right_shift(mask, tf.ones_like(x)) + tf.cast(x < 0, tf.int64)
    return tf.bitwise.right_shift(x, bits) + tf.cast(tf.bitwise.bitwise_and(x, mask) > threshold, tf.int64)


def multiply(x, multiplier):
    """x * mantissa / 2**31 * 2**exponent, rounded twice as LiteRT does; x of int32 or int64."""
    mantissa, exponent = multiplier
    zero = tf.zeros_like(exponent)
    x = _shift_left_64(tf.cast(x, tf.int64), tf.maximum(exponent, zero))
    return rounding_shift_64(high_multiply(x, mantissa), tf.maximum(-exponent, zero))


def multiply_ties_up(x, multiplier):
    """`multiply` as ruy and NEON round it, in convolutions and dense layers: every tie goes up."""
    mantissa, exponent = multiplier
    zero = tf.zeros_like(exponent)
    x = _shift_left_64(x, tf.maximum(exponent, zero))
    half = tf.constant(1 << 30, tf.int64)
    high = tf.bitwise.right_shift(x * mantissa + half, tf.constant(31, tf.int64))
    shift = tf.maximum(-exponent, zero)
    rounding = tf.bitwise.right_shift(_shift_left_64(tf.ones_like(shift), shift), tf.ones_like(shift))
    return tf.bitwise.right_shift(high + rounding, tf.broadcast_to(shift, tf.shape(high)))


# ------------------------------------------------------------------ inverse square root

_ONE_AND_A_HALF = (1 << 28) + (1 << 27)  # on the 3-integer-bit grid of the Newton iteration
_HALF_SQRT_2 = 1518500250


def inverse_square_root(x):
    """1 / sqrt(x) of positive int64 as (mantissa, exponent) for `multiply`: five Newton steps in fixed point."""
    x = tf.cast(x, tf.int64)
    # How often x must be divided by 4 to fall below 2**29; sums of squares stay below 2**31.
    big = tf.cast(x >= 1 << 29, tf.int64)
    scaled = tf.where(big > 0, x // 4, x)
    bits = (
        tf.bitwise.right_shift(tf.bitcast(float64(tf.maximum(scaled, 1)), tf.int64), tf.constant(52, tf.int64)) - 1022
    )
    pairs = (31 - bits) // 2 - 1
    scaled = tf.bitwise.left_shift(scaled, 2 * pairs)
    value = tf.bitwise.right_shift(scaled, tf.ones_like(scaled))
    half = rounding_shift_64(value, tf.constant(1, tf.int64))
    guess = tf.fill(tf.shape(x), tf.constant(1 << 28, tf.int64))
    limit = 2**31 - 1
    for _ in range(5):
        cubed = tf.clip_by_value(high_multiply(high_multiply(guess, guess), guess) * 64, -limit - 1, limit)
        term = high_multiply(guess, tf.constant(_ONE_AND_A_HALF, tf.int64)) - high_multiply(half, cubed)
        guess = tf.clip_by_value(term * 8, -limit - 1, limit)
    mantissa = high_multiply(guess, tf.constant(_HALF_SQRT_2, tf.int64))
    # Inputs of 2 and 3 shift left, where the kernel shifts its mantissa instead: the product is the same.
    small = x <= 1
    mantissa = tf.where(small, tf.fill(tf.shape(x), tf.constant(limit, tf.int64)), mantissa)
    return mantissa, tf.where(small, tf.zeros_like(pairs), pairs - 11 - big)


# ------------------------------------------------------------------ 64-bit accumulators of int16 activations


def multiply_accumulator(x, multiplier):
    """x * mantissa / 2**31 * 2**exponent of int64 x: a mantissa reduced to 16 bits, rounded once, ties up."""
    mantissa, exponent = multiplier
    reduced = tf.bitwise.right_shift(mantissa + (1 << 15), tf.fill(tf.shape(mantissa), tf.constant(16, tf.int64)))
    reduced = tf.where(mantissa < 0x7FFF0000, reduced, 0x7FFF * tf.ones_like(reduced))
    product = x * reduced
    shift = tf.broadcast_to(15 - exponent, tf.shape(product))
    half = tf.bitwise.left_shift(tf.ones_like(product), shift - 1)
    return tf.bitwise.right_shift(product + half, shift)


def divide_multiplier(multiplier, count: int):
    """A multiplier over a whole number, as means are scaled: the quotient of mantissas is cut off, not rounded."""
    mantissa, exponent = multiplier
    shift = tf.minimum(tf.constant(min(count.bit_length() - 1, 32), tf.int64), 31 + exponent)
    return tf.bitwise.left_shift(mantissa, shift) // count, exponent - shift


def wrap_16(x):
    """An integer kept in 16 bits, as C's conversion to int16 does."""
    return tf.bitwise.bitwise_and(x + 32768, tf.constant(0xFFFF, x.dtype)) - 32768
