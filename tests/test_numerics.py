"""Properties of the reference arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobileqat.numerics import (
    SMALLEST_SCALE,
    SMALLEST_WEIGHT,
    dequantize,
    quantization_parameters,
    quantize,
    round_half_away,
    weight_scales,
)
from mobileqat.schemes import QuantSpec

INT8 = QuantSpec(8)
SPECS = st.builds(QuantSpec, st.integers(2, 16), st.booleans())
REALS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
RANGES = st.tuples(REALS, REALS).map(sorted)


@given(RANGES, SPECS)
def test_zero_is_exact(bounds, spec):
    scale, zero_point = quantization_parameters(*bounds, spec)
    assert spec.qmin <= zero_point <= spec.qmax
    zero = quantize(np.float32(0), scale, zero_point, spec)
    assert zero == zero_point and dequantize(zero, scale, zero_point) == 0
    if spec.symmetric:
        assert zero_point == 0


@given(RANGES, SPECS)
def test_grid_holds_the_range(bounds, spec):
    """Nudging moves an end by half a step at most."""
    scale, zero_point = quantization_parameters(*bounds, spec)
    low, high = (dequantize(q, scale, zero_point) for q in (spec.qmin, spec.qmax))
    slack = 0.501 * float(scale)
    assert low <= min(bounds[0], 0) + slack and high >= max(bounds[1], 0) - slack


@given(RANGES, SPECS, st.data())
def test_round_trip_of_integers(bounds, spec, data):
    scale, zero_point = quantization_parameters(*bounds, spec)
    integers = data.draw(hnp.arrays(np.int32, 20, elements=st.integers(spec.qmin, spec.qmax)))
    np.testing.assert_array_equal(quantize(dequantize(integers, scale, zero_point), scale, zero_point, spec), integers)


@given(hnp.arrays(np.float32, 20, elements=REALS), SPECS)
def test_error_is_half_a_step(values, spec):
    scale, zero_point = quantization_parameters(values.min(), values.max(), spec)
    restored = dequantize(quantize(values, scale, zero_point, spec), scale, zero_point)
    # One more half step at the ends, which nudging moves.
    assert np.abs(restored - values).max() <= 1.01 * float(scale)


def test_values_beyond_the_range_saturate():
    scale, zero_point = quantization_parameters(-1, 1, INT8)
    np.testing.assert_array_equal(quantize([-9.0, 9.0, -np.inf, np.inf], scale, zero_point, INT8), [-128, 127] * 2)


@pytest.mark.parametrize(
    "minimum, maximum, expected",
    [
        (0, 255, (1.0, -128)),
        (-128, 127, (1.0, 0)),
        (2, 4, (4 / 255, -128)),
        (-4, -2, (4 / 255, 127)),
        (0, 0, (SMALLEST_SCALE, -128)),
    ],
)
def test_parameters(minimum, maximum, expected):
    assert quantization_parameters(minimum, maximum, INT8) == (np.float32(expected[0]), expected[1])


def test_ties_go_away_from_zero():
    np.testing.assert_array_equal(round_half_away(np.float32([0.5, 1.5, 2.5, -0.5, -2.5])), [1, 2, 3, -1, -3])
    below = np.nextafter(np.float32(0.5), np.float32(0))
    np.testing.assert_array_equal(round_half_away(np.float32([below, -below, 8388609, -0.0])), [0, 0, 8388609, 0])


@given(hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-10, 10, width=32, allow_subnormal=False)))
def test_weight_scales_reach_the_end_of_the_grid(weights):
    """The largest weight of each channel becomes exactly +-127, and no weight saturates."""
    spec = QuantSpec(8, symmetric=True, per_channel=True)
    scales = weight_scales(weights, (2,), spec)
    assert scales.shape == (1, 1, 4) and scales.dtype == np.float32 and (scales > 0).all()
    largest = np.abs(np.round(weights / scales)).max((0, 1))
    np.testing.assert_array_equal(largest, np.where(np.abs(weights).max((0, 1)) > SMALLEST_WEIGHT, 127, 0))


def test_weight_scale_of_the_whole_tensor():
    weights = np.float32([[1, -2], [0.5, 0]])
    assert weight_scales(weights, (1,), QuantSpec(8, symmetric=True)) == np.float32(2 / 127)
    np.testing.assert_array_equal(
        weight_scales(np.zeros((3, 2)), (1,), QuantSpec(8, symmetric=True, per_channel=True)),
        np.full((1, 2), np.float32(1 / 127)),
    )
