"""Bit widths and grids as data: what a quantized tensor looks like, and the named schemes that recipes choose.

A grid is fixed by `QuantSpec` (how many bits, symmetric or not) and, once ranges are known, by a scale and a zero
point: real = scale * (integer - zero_point).  Changing precision is changing a value here, never a class.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mobileqat.errors import MobileQatError


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor, before its range is known.

    Args:
        bits: width of the integer, 1 to 16; 1 is the binary grid {-1, 1}, for weights (Courbariaux et al. 2015).
        symmetric: the zero point is 0 and the grid is [-qmax, qmax] (LiteRT's rule for weights and for int16
            activations); otherwise [-2**(bits-1), 2**(bits-1) - 1] with any zero point (int8 activations).
        per_channel: one scale per output channel instead of one for the tensor.
        full_range: a symmetric grid that reaches down to -2**(bits-1), as activations do where a kernel saturates.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    full_range: bool = False

    def __post_init__(self):
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits must be between 1 and 16. Received: bits={self.bits}")

    @property
    def is_binary(self) -> bool:
        return self.bits == 1

    @property
    def is_coarse(self) -> bool:
        """2 to 7 bits: so few integers that scales and rounding are worth fitting, and more than two signs."""
        return 2 <= self.bits < 8

    @property
    def qmax(self) -> int:
        return max(2 ** (self.bits - 1) - 1, 1)

    @property
    def qmin(self) -> int:
        return -self.qmax if self.symmetric and not self.full_range else -self.qmax - 1


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Args:
        name: for messages and files.
        weights: grid of kernels.
        activations: grid of activations.
        narrow_storage: whether kernels of 4 bits and less are stored as int4 where the runtime executes that; its
            dense layers are then as fast as from int8, its convolutions slower (they are unpacked, and leave the
            delegate), and both half as large.
    """

    name: str
    weights: QuantSpec
    activations: QuantSpec
    narrow_storage: bool = True


# What LiteRT's int16 kernels take: zero point 0, results saturate at -32768.
INT16 = QuantSpec(16, symmetric=True, full_range=True)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", QuantSpec(8, symmetric=True, per_channel=True), QuantSpec(8)),
        Scheme("w8a16", QuantSpec(8, symmetric=True, per_channel=True), INT16),
        *(
            Scheme(f"w{bits}a8", QuantSpec(bits, symmetric=True, per_channel=True), QuantSpec(8))
            for bits in range(7, 0, -1)
        ),
    )
}


def get_scheme(scheme: str | Scheme | dict) -> Scheme:
    """The scheme of that name; a `Scheme` is taken as it is, and one written by `asdict` is restored.

    Raises:
        MobileQatError: no scheme has that name, or no integer kernel takes its grids.
    """
    if isinstance(scheme, dict):
        specs = {key: QuantSpec(**scheme[key]) for key in ("weights", "activations")}
        scheme = Scheme(**(scheme | specs))
    if isinstance(scheme, Scheme):
        if scheme.activations not in (QuantSpec(8), INT16):
            raise MobileQatError(
                f"Activations must be asymmetric int8, QuantSpec(8), or symmetric int16, {INT16}. Received: "
                f"{scheme.activations}"
            )
        weights = scheme.weights
        if weights.bits > 8 or not weights.symmetric or weights.full_range:  # a negative gamma turns -128 into 128
            raise MobileQatError(
                f"Weights must be symmetric, without full_range, and have at most 8 bits. Received: {weights}"
            )
        return scheme
    if scheme in SCHEMES:
        return SCHEMES[scheme]
    near = difflib.get_close_matches(str(scheme), SCHEMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise MobileQatError(f"Unknown scheme {scheme!r}. Expected one of: {', '.join(SCHEMES)}.{hint}")
