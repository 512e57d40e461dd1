"""Reference arithmetic of affine quantization, in NumPy: the definition that everything else is tested against.

    real = scale * (q - zero_point)        q = clip(round(real / scale) + zero_point, qmin, qmax)

Scales are float32, as the flatbuffer stores them, and so is every intermediate: the interpreter sees the same bits.
"""

from __future__ import annotations

import numpy as np

from mobileqat.schemes import QuantSpec

# Below this a range counts as collapsed; dividing by a smaller scale overflows float32 for ordinary activations.
SMALLEST_SCALE = np.float32(1e-9)
# Below this a channel of weights counts as zero: its scale would be subnormal, which TensorFlow flushes to 0.
SMALLEST_WEIGHT = np.float32(1e-30)
# A bias this large, in units of s_in * s_w, still leaves room in int32 for the products added to it.
LARGEST_BIAS = 2.0**30
# The same in int64: LiteRT takes 48 bits in all.
LARGEST_BIAS_INT16 = 2.0**46


def quantization_parameters(minimum, maximum, spec: QuantSpec) -> tuple[np.float32, int]:
    """Scale and zero point of the smallest grid that holds [minimum, maximum] and zero.

    The range is widened to contain 0.0 and moved ("nudged", Jacob et al. 2018, section 3) so that an integer
    represents 0.0 exactly, which zero padding needs.

    Args:
        minimum: lower end of the observed range.
        maximum: upper end of the observed range.
        spec: the grid.

    Returns:
        `(scale, zero_point)`, float32 and int.
    """
    low = np.minimum(np.float32(minimum), np.float32(0))
    high = np.maximum(np.float32(maximum), np.float32(0))
    if spec.symmetric:
        return np.maximum(np.maximum(-low, high) / np.float32(spec.qmax), smallest_scale(spec)), 0
    scale = np.maximum((high - low) / np.float32(spec.qmax - spec.qmin), smallest_scale(spec))
    zero_point = np.clip(np.round(np.float32(spec.qmin) - low / scale), spec.qmin, spec.qmax)
    return scale, int(zero_point)


def weight_scales(weights: np.ndarray, channel_axes: tuple[int, ...], spec: QuantSpec) -> np.ndarray:
    """Max-abs scales of symmetric weights, shaped to broadcast against them; of binary ones the mean-abs.

    The mean of absolute values is the scale that is nearest to the weights for their signs (Rastegari et al. 2016).

    Args:
        weights: float array.
        channel_axes: axes that keep a scale of their own, `(3,)` for a Conv2D kernel [H, W, I, O] -> [1, 1, 1, O].
        spec: the grid; without `per_channel` one scale serves the whole tensor.

    Returns:
        float32 scales; a channel of zeros gets scale 1 / qmax, which represents it exactly, or, with signs alone,
        next to nothing.
    """
    kept = channel_axes if spec.per_channel else ()
    reduced = tuple(axis for axis in range(weights.ndim) if axis not in kept)
    largest = (np.mean if spec.is_binary else np.max)(np.abs(weights.astype(np.float32)), axis=reduced, keepdims=True)
    return np.where(largest > SMALLEST_WEIGHT, largest, size_of_zeros(spec)) / np.float32(spec.qmax)


def size_of_zeros(spec: QuantSpec) -> np.float32:
    """What stands for the largest weight of a channel of zeros: binary weights cannot be 0, whatever their scale."""
    return SMALLEST_SCALE if spec.is_binary else np.float32(1)


def smallest_scale(spec: QuantSpec) -> np.float32:
    """Of an activation's grid; a range that needs less has collapsed. The same range for every number of bits."""
    return np.float32(SMALLEST_SCALE * 255 / (spec.qmax - spec.qmin))


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest integer and ties away from zero, as `TfLiteRound` does."""
    whole = np.trunc(x)
    # x - whole is exact in float32; adding 0.5 before truncating is not, just below a tie.
    return whole + np.sign(x) * (np.abs(x - whole) >= 0.5)


def quantize(real: np.ndarray, scale, zero_point, spec: QuantSpec) -> np.ndarray:
    """Integers nearest to `real`, ties away from zero as in LiteRT's QUANTIZE; float array in, int32 array out."""
    return quantize_between(real, scale, zero_point, spec.qmin, spec.qmax)


def quantize_between(real: np.ndarray, scale, zero_point, qmin: int, qmax: int) -> np.ndarray:
    """`quantize` onto any integers, such as a file's uint8 input."""
    scaled = np.asarray(real, np.float32) / np.float32(scale)
    # Clipping first is the same, and keeps infinities out of the rounding.
    inside = np.clip(scaled, np.float32(qmin - zero_point), np.float32(qmax - zero_point))
    return (round_half_away(inside) + zero_point).astype(np.int32)


def dequantize(integers: np.ndarray, scale, zero_point) -> np.ndarray:
    """Real values of integers: `scale * (q - zero_point)` in float32."""
    return np.float32(scale) * (np.asarray(integers, np.int32) - zero_point).astype(np.float32)
