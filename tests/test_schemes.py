"""Grids and schemes as data."""

import pytest

from mobileqat.errors import MobileQatError
from mobileqat.schemes import SCHEMES, QuantSpec, Scheme, get_scheme


@pytest.mark.parametrize(
    "spec, bounds",
    [
        (QuantSpec(8), (-128, 127)),
        (QuantSpec(8, symmetric=True), (-127, 127)),
        (QuantSpec(8, symmetric=True, full_range=True), (-128, 127)),
        (QuantSpec(4, symmetric=True), (-7, 7)),
        (QuantSpec(16, symmetric=True), (-32767, 32767)),
        (QuantSpec(2), (-2, 1)),
        (QuantSpec(2, symmetric=True), (-1, 1)),
        (QuantSpec(1, symmetric=True), (-1, 1)),
    ],
)
def test_bounds(spec, bounds):
    assert (spec.qmin, spec.qmax) == bounds


@pytest.mark.parametrize("bits", [-8, 0, 17, 32])
def test_refuses_bits(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        QuantSpec(bits)


def test_specs_are_values():
    assert QuantSpec(8) == QuantSpec(8) and hash(QuantSpec(8)) == hash(QuantSpec(8))
    with pytest.raises(AttributeError):
        QuantSpec(8).bits = 4


def test_names_are_keys():
    assert all(scheme.name == name for name, scheme in SCHEMES.items())


def test_w8a8_is_what_the_runtime_fixes():
    scheme = get_scheme("w8a8")
    assert scheme.weights == QuantSpec(8, symmetric=True, per_channel=True)
    assert scheme.activations == QuantSpec(8)
    assert get_scheme(scheme) is scheme


@pytest.mark.parametrize("spec", [
    QuantSpec(8, symmetric=True, per_channel=True, full_range=True), QuantSpec(16, symmetric=True), QuantSpec(8),
])  # fmt: skip
def test_weights_that_no_kernel_takes(spec):
    """With -128 in the grid, folding a negative gamma would give 128."""
    with pytest.raises(MobileQatError, match="Weights must be symmetric, without full_range, and have at most 8 bits"):
        get_scheme(Scheme("own", spec, QuantSpec(8)))


@pytest.mark.parametrize("name", ["w8a7", "W8A8", "", None, 8])
def test_unknown_scheme(name):
    with pytest.raises(MobileQatError, match=r"Unknown scheme.*w8a8"):
        get_scheme(name)


def test_nearest_scheme_is_suggested():
    with pytest.raises(MobileQatError, match="Did you mean 'w8a8'"):
        get_scheme("w8a")
