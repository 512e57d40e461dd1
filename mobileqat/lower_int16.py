"""What stands in for operators that the runtime does not execute on int16 activations: the same function, of others.

    HARD_SWISH  ->  x * relu6(x + 3) / 6        PRELU  ->  relu(x) + alpha * min(x, 0)
    ELU         ->  relu(x) + exp(min(x, 0)) - 1

`Lowerer.emit` takes a row of `SUBSTITUTES` in place of a primitive.  What has no row keeps its kind, and the plan
refuses it by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mobileqat.lower_operators import ACTIVATIONS, clip
from mobileqat.lower_shapes import transpose
from mobileqat.lowerer import Lowerer, Value

# `(lowerer, path, *inputs, **options) -> output`
Substitute = Callable[..., str]


def _hard_swish(low: Lowerer, path: str, x: str) -> str:
    return low.binary(path, "MUL", x, ACTIVATIONS["hard_sigmoid"](low, f"{path}/gate", x))


def _below_zero(low: Lowerer, path: str, x: str) -> str:
    return low.binary(f"{path}/negative", "MINIMUM", x, Value.of(0, "zero"))


def _prelu(low: Lowerer, path: str, x: str, slopes: str) -> str:
    sloped = low.op(f"{path}/slope", "MUL", _below_zero(low, path, x), slopes)
    return low.op(path, "ADD", low.op(f"{path}/relu", "RELU", x), sloped)


def _times(low: Lowerer, path: str, x: str, factor: float) -> str:
    return x if factor == 1 else low.binary(path, "MUL", x, Value.of(factor, "factor"))


def _elu(low: Lowerer, path: str, x: str, alpha: float = 1.0, divisor: float = 1.0, scale: float = 1.0) -> str:
    """scale * (relu(x) + alpha * (exp(min(x, 0) / divisor) - 1))."""
    exponent = _times(low, f"{path}/divided", _below_zero(low, path, x), 1 / divisor)
    power = low.op(f"{path}/exp", "EXP", exponent)
    below = low.binary(f"{path}/minus_one", "SUB", power, Value.of(1, "one"))
    below = _times(low, f"{path}/scaled", below, alpha * scale)
    above = _times(low, f"{path}/above", low.op(f"{path}/relu", "RELU", x), scale)
    return low.op(path, "ADD", above, below)


def _celu(low: Lowerer, path: str, x: str, alpha: float) -> str:
    return _elu(low, path, x, alpha, divisor=alpha)


def _selu(low: Lowerer, path: str, x: str) -> str:
    return _elu(low, path, x, 1.6732632423543772, scale=1.0507009873554805)


def _softplus(low: Lowerer, path: str, x: str) -> str:
    """relu(x) + log(1 + exp(-|x|)): no exponential beyond 1."""
    minus = low.binary(f"{path}/minus", "MUL", low.op(f"{path}/abs", "ABS", x), Value.of(-1, "minus_one"))
    grown = low.binary(f"{path}/plus_one", "ADD", low.op(f"{path}/exp", "EXP", minus), Value.of(1, "one"))
    return low.op(path, "ADD", low.op(f"{path}/relu", "RELU", x), low.op(f"{path}/log", "LOG", grown))


def _mish(low: Lowerer, path: str, x: str) -> str:
    return low.op(path, "MUL", x, low.op(f"{path}/tanh", "TANH", _softplus(low, f"{path}/softplus", x)))


def _log_sigmoid(low: Lowerer, path: str, x: str) -> str:
    return low.op(path, "SUB", x, _softplus(low, f"{path}/softplus", x))


def _tanh_shrink(low: Lowerer, path: str, x: str) -> str:
    return low.op(path, "SUB", x, low.op(f"{path}/tanh", "TANH", x))


def _soft_shrink(low: Lowerer, path: str, x: str, threshold: float) -> str:
    """x less what a clip at the threshold leaves of it."""
    return low.op(path, "SUB", x, clip(low, f"{path}/clip", x, -threshold, threshold))


def _hard_tanh(low: Lowerer, path: str, x: str) -> str:
    return clip(low, path, x, -1.0, 1.0)


def _exponential(factor: float = 1.0, offset: float = 0.0) -> Substitute:
    def substitute(low: Lowerer, path: str, x: str) -> str:
        power = low.op(f"{path}/exp" if offset else path, "EXP", _times(low, f"{path}/factor", x, factor))
        return low.binary(path, "ADD", power, Value.of(offset, "offset")) if offset else power

    return substitute


def _logarithm(factor: float = 1.0, offset: float = 0.0) -> Substitute:
    def substitute(low: Lowerer, path: str, x: str) -> str:
        shifted = low.binary(f"{path}/shifted", "ADD", x, Value.of(offset, "offset")) if offset else x
        return _times(low, path, low.op(f"{path}/log", "LOG", shifted), factor)

    return substitute


def _l2_normalization(low: Lowerer, path: str, x: str) -> str:
    squares = low.op(f"{path}/squares", "MUL", x, x)
    total = low.op(f"{path}/sum", "SUM", squares, axes=(low.rank(x) - 1,), keepdims=True)
    return low.op(path, "MUL", x, low.op(f"{path}/rsqrt", "RSQRT", total, epsilon=1e-12))


def _blocks(low: Lowerer, path: str, x: str, apart: tuple[int, ...], whole: tuple[int, ...]) -> str:
    moved = transpose(low, f"{path}/transpose", low.view(f"{path}/apart", x, apart), [0, 1, 3, 2, 4, 5])
    return low.computed(low.view(path, moved, whole))


def _depth_to_space(low: Lowerer, path: str, x: str, block_size: int) -> str:
    (height, width, channels), b = low.shape(x), block_size
    rest = channels // b**2
    return _blocks(low, path, x, (height, width, b, b, rest), (height * b, width * b, rest))


def _space_to_depth(low: Lowerer, path: str, x: str, block_size: int) -> str:
    (height, width, channels), b = low.shape(x), block_size
    apart = (height // b, b, width // b, b, channels)
    return _blocks(low, path, x, apart, (height // b, width // b, channels * b**2))


# Functions that are tables of 256 integers on int8 activations.
TABLES: dict[str, Substitute] = {
    "celu": _celu,
    "elu": _elu,
    "exp2": _exponential(factor=math.log(2)),
    "expm1": _exponential(offset=-1.0),
    "hard_tanh": _hard_tanh,
    "log10": _logarithm(factor=1 / math.log(10)),
    "log1p": _logarithm(offset=1.0),
    "log2": _logarithm(factor=1 / math.log(2)),
    "log_sigmoid": _log_sigmoid,
    "mish": _mish,
    "selu": _selu,
    "soft_shrink": _soft_shrink,
    "softplus": _softplus,
    "tanh_shrink": _tanh_shrink,
}


def _table(low: Lowerer, path: str, x: str, function: str, **parameters) -> str | None:
    return TABLES[function](low, path, x, **parameters) if function in TABLES else None


SUBSTITUTES: dict[str, Callable[..., str | None]] = {
    "DEPTH_TO_SPACE": _depth_to_space,
    "ELU": _elu,
    "HARD_SWISH": _hard_swish,
    "L2_NORMALIZATION": _l2_normalization,
    "PRELU": _prelu,
    "SPACE_TO_DEPTH": _space_to_depth,
    "TABLE": _table,
}
