"""How Keras operators (`x * 2`, `keras.ops.mean`) become runtime operators: one row each in `OPERATORS`.

This file has arithmetic, functions of one value and reductions; `lower_shapes` has what moves values, `lower_products`
matrix products, convolutions and images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np

from mobileqat.graph import Node, Refused
from mobileqat.lower_products import PRODUCTS
from mobileqat.lower_shapes import SHAPES, split, transpose
from mobileqat.lowerer import Lowerer, Rewrite, Value
from mobileqat.primitives import TABULATED, Primitive
from mobileqat.rules import class_name, function_name

# ------------------------------------------------------------------ arithmetic


def _binary(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        return low.binary(node.path, kind, *low.arguments(node, 2))

    return rewrite


def _is_scalar(value, number: float | None = None) -> bool:
    return isinstance(value, Value) and value.array.size == 1 and (number is None or value.array.item() == number)


def _per_channel(low: Lowerer, value, tensor) -> bool:
    """Whether a constant is a vector along the last axis of a tensor that is channels by its rank."""
    if not isinstance(value, Value) or isinstance(tensor, Value) or not value.array.ndim:
        return False
    return low.shape(tensor)[-1:] == value.array.shape[-1:] == (value.array.size,) != (1,)


def _add(low: Lowerer, node: Node) -> str:
    a, b = low.arguments(node, 2)
    return add(low, node.path, a, b)


def add(low: Lowerer, path: str, a, b) -> str:
    if isinstance(a, Value):
        a, b = b, a
    if _is_scalar(b, 0.0) and b.source is None:
        return a
    if _per_channel(low, b, a) and (tensor := low.add_bias(path, a, b)):
        return tensor
    return low.binary(path, "ADD", a, b)


def _subtract(low: Lowerer, node: Node) -> str:
    a, b = low.arguments(node, 2)
    if isinstance(b, Value) and b.source is None:
        return add(low, node.path, a, Value(-b.array))
    return low.binary(node.path, "SUB", a, b)


def _multiply(low: Lowerer, node: Node) -> str:
    return multiply(low, node.path, *low.arguments(node, 2))


def multiply(low: Lowerer, path: str, a, b) -> str:
    if isinstance(a, Value):
        a, b = b, a
    if _is_scalar(b, 1.0) and b.source is None:
        return a
    if _per_channel(low, b, a):
        return low.affine(path, a, b)
    return low.binary(path, "MUL", a, b)


def _divide(low: Lowerer, node: Node) -> str:
    a, b = low.arguments(node, 2)
    if isinstance(b, Value):
        if b.source is not None:
            raise Refused("division by a weight; multiply by its inverse instead")
        return multiply(low, node.path, a, Value(1 / b.array.astype(np.float64)))
    inverse = table(low, f"{node.path}/reciprocal", "reciprocal", b)
    return multiply(low, node.path, a, inverse)


def _negative(low: Lowerer, node: Node) -> str:
    return low.binary(node.path, "SUB", Value.of(0), low.tensor(node.arguments[0][0]))


def _power(low: Lowerer, node: Node) -> str:
    base, exponent = low.arguments(node, 2)
    if isinstance(base, Value) or isinstance(exponent, str) or not _is_scalar(exponent) or exponent.source:
        raise Refused("only a tensor to the power of a number has a rule")
    power = exponent.array.item()
    if power == 1:
        return base
    if power == 2:
        return square(low, node.path, base)
    if power == 3:
        return low.binary(node.path, "MUL", square(low, f"{node.path}/square", base), base)
    return table(low, node.path, "power", base, exponent=float(power))


def square(low: Lowerer, path: str, tensor: str) -> str:
    return low.binary(path, "MUL", tensor, tensor)


def _square(low: Lowerer, node: Node) -> str:
    return square(low, node.path, low.tensor(node.arguments[0][0]))


def _clip(low: Lowerer, node: Node) -> str:
    args, kwargs = node.arguments
    bounds = dict(zip(("x_min", "x_max"), args[1:], strict=False)) | kwargs
    low_end = getattr(node.layer, "x_min", bounds.get("x_min"))
    high_end = getattr(node.layer, "x_max", bounds.get("x_max"))
    return clip(low, node.path, low.tensor(args[0]), low_end, high_end)


def clip(low: Lowerer, path: str, tensor: str, minimum, maximum) -> str:
    if minimum is not None:
        is_relu = np.ndim(minimum) == 0 and minimum == 0
        name = path if maximum is None else f"{path}/minimum"
        if is_relu and maximum == 6:
            return low.pointwise(path, Primitive("RELU6"), tensor)
        if is_relu:
            tensor = low.pointwise(name, Primitive("RELU"), tensor)
        else:
            tensor = low.binary(name, "MAXIMUM", tensor, Value(np.asarray(minimum)))
    if maximum is not None:
        tensor = low.binary(path, "MINIMUM", tensor, Value(np.asarray(maximum)))
    return tensor


# ------------------------------------------------------------------ functions of one value


def table(low: Lowerer, path: str, function: str, tensor: str, **parameters) -> str:
    return low.pointwise(path, Primitive("TABLE", function=function, **parameters), tensor)


def _primitive(kind: str, **options) -> Callable:
    return lambda low, path, tensor: low.pointwise(path, Primitive(kind, **options), tensor)


def _table(function: str, **parameters) -> Callable:
    return lambda low, path, tensor: table(low, path, function, tensor, **parameters)


def _silu(low: Lowerer, path: str, tensor: str) -> str:
    gate = low.pointwise(f"{path}/sigmoid", Primitive("LOGISTIC"), tensor)
    return low.binary(path, "MUL", tensor, gate)


def relu(low: Lowerer, path: str, tensor: str, negative_slope=0.0, max_value=None, threshold=0.0) -> str:
    """ReLU with all of its settings."""
    slope, threshold = float(negative_slope or 0), float(threshold or 0)
    if threshold or (slope and max_value is not None):
        settings = {"negative_slope": slope, "max_value": max_value, "threshold": threshold}
        return table(low, path, "relu", tensor, **settings)
    if slope:
        return low.pointwise(path, Primitive("LEAKY_RELU", alpha=slope), tensor)
    return clip(low, path, tensor, 0.0, None if max_value is None else float(max_value))


def _hard_sigmoid(low: Lowerer, path: str, tensor: str) -> str:
    """relu6(x + 3) / 6: two operators that every delegate has, where a table would take three that few have."""
    shifted = low.binary(f"{path}/add", "ADD", tensor, Value.of(3, "three"))
    clipped = low.pointwise(f"{path}/relu6", Primitive("RELU6"), shifted)
    return low.binary(path, "MUL", clipped, Value.of(1 / 6, "sixth"))


def elu(low: Lowerer, path: str, tensor: str, alpha: float = 1.0) -> str:
    rewrite = _primitive("ELU") if alpha == 1 else _table("elu", alpha=float(alpha))
    return rewrite(low, path, tensor)


def softmax(low: Lowerer, path: str, tensor: str, axis=-1) -> str:
    """SOFTMAX works on the last axis: others are moved there and back."""
    rank = low.rank(tensor)
    if not isinstance(axis, int):
        if len(axis) != 1:
            return _softmax_over_axes(low, path, tensor, sorted(a % rank for a in axis))
        axis = axis[0]
    if axis % rank == 0:
        raise Refused("softmax over the batch")
    if axis % rank == rank - 1:
        return low.pointwise(path, Primitive("SOFTMAX"), tensor)
    swapped = list(range(rank))
    swapped[axis % rank], swapped[-1] = swapped[-1], swapped[axis % rank]
    moved = transpose(low, f"{path}/transpose", tensor, swapped)
    return transpose(low, path, low.op(f"{path}/softmax", "SOFTMAX", moved), swapped)


def _softmax_over_axes(low: Lowerer, path: str, tensor: str, axes: list[int]) -> str:
    rank, shape = low.rank(tensor), low.shape(tensor)
    if axes != list(range(rank - len(axes), rank)) or axes[0] == 0:
        raise Refused(f"softmax over the axes {axes}; expected the last ones")
    kept = shape[: axes[0] - 1]
    flat = low.view(f"{path}/flat", tensor, (*kept, math.prod(shape[axes[0] - 1 :])))
    return low.view(path, low.op(f"{path}/softmax", "SOFTMAX", flat), shape)


def _glu(low: Lowerer, path: str, tensor: str, axis: int = -1) -> str:
    axis %= low.rank(tensor)
    size = low.tensors[tensor].shape[axis]
    value, gate = split(low, f"{path}/half", tensor, axis, (0, size // 2))
    return low.binary(path, "MUL", value, low.op(f"{path}/sigmoid", "LOGISTIC", gate))


def _log_sum_exp(low: Lowerer, path: str, tensor: str, axis, keepdims: bool) -> tuple[str, str]:
    """The tensor less its largest value, which keeps the exponentials in [0, 1], and the logarithm of their sum."""
    largest = reduce(low, f"{path}/max", "REDUCE_MAX", tensor, axis, True)
    shifted = low.binary(f"{path}/shifted", "SUB", tensor, largest)
    exponentials = low.op(f"{path}/exp", "EXP", shifted)
    total = reduce(low, f"{path}/sum", "SUM", exponentials, axis, keepdims)
    return shifted, low.op(f"{path}/log", "LOG", total)


def _log_softmax(low: Lowerer, path: str, tensor: str, axis: int = -1) -> str:
    shifted, logarithm = _log_sum_exp(low, path, tensor, axis, True)
    return low.binary(path, "SUB", shifted, logarithm)


# Activation functions without settings, by name in keras.activations: `(lowerer, path, tensor) -> tensor`.
ACTIVATIONS: dict[str, Callable[[Lowerer, str, str], str]] = {
    "linear": lambda low, path, tensor: tensor,
    "relu": _primitive("RELU"),
    "relu6": _primitive("RELU6"),
    "leaky_relu": _primitive("LEAKY_RELU", alpha=0.2),
    "elu": elu,
    "selu": _table("selu"),
    "celu": _table("celu", alpha=1.0),
    "gelu": _primitive("GELU", approximate=False),
    "glu": _glu,
    "log_softmax": _log_softmax,
    "silu": _silu,
    "swish": _silu,
    "hard_silu": _primitive("HARD_SWISH"),
    "hard_swish": _primitive("HARD_SWISH"),
    "mish": _table("mish"),
    "sigmoid": _primitive("LOGISTIC"),
    "hard_sigmoid": _hard_sigmoid,
    "tanh": _primitive("TANH"),
    "hard_tanh": _table("hard_tanh"),
    "softplus": _table("softplus"),
    "softsign": _table("softsign"),
    "softmax": softmax,
    "exponential": _primitive("EXP"),
    "log_sigmoid": _table("log_sigmoid"),
    "soft_shrink": _table("soft_shrink", threshold=0.5),
    "hard_shrink": _table("hard_shrink", threshold=0.5),
    "tanh_shrink": _table("tanh_shrink"),
    "threshold": _table("threshold", threshold=0.0, default_value=0.0),
    "sparse_plus": _table("sparse_plus"),
    "sparse_sigmoid": _table("sparse_sigmoid"),
    "squareplus": _table("squareplus", b=4.0),
    # Keras operators that are no activations.
    **{name: _table(name) for name in TABULATED if hasattr(keras.ops, name)},
    "exp2": _table("exp2"),
    "absolute": _primitive("ABS"),
    "log": _primitive("LOG"),
    "rsqrt": _primitive("RSQRT"),
}


def activation(low: Lowerer, path: str, function, tensor: str) -> str:
    """An activation function, which may be a layer, as nodes of its own."""
    if function is None:
        return tensor
    if isinstance(function, keras.layers.Layer):
        return _activation_layer(low, path, function, tensor)
    name = function_name(function)
    if name not in ACTIVATIONS or getattr(keras.activations, name, None) is not function:
        raise Refused(
            f"the activation {name} has no rule; use one of {', '.join(KERAS_ACTIVATIONS)}, or write it with keras.ops"
        )
    return ACTIVATIONS[name](low, path, tensor)


def _activation_layer(low: Lowerer, path: str, layer: keras.layers.Layer, tensor: str) -> str:
    """`activation=keras.layers.LeakyReLU(0.1)`: as if the layer followed."""
    rewrite = low.rewrites.get(class_name(layer))
    if rewrite is None:
        raise Refused(f"its activation is the layer {type(layer).__name__}; let that layer follow instead")
    low.alias.setdefault(tensor, tensor)
    result = rewrite(low, Node(path, layer, (tensor,), outputs=(path,)))
    assert isinstance(result, str)
    return result


KERAS_ACTIVATIONS = sorted(name for name in ACTIVATIONS if hasattr(keras.activations, name))


def _function(name: str) -> Rewrite:
    return lambda low, node: ACTIVATIONS[name](low, node.path, low.tensor(node.arguments[0][0]))


def _function_with(rewrite: Callable, **attributes: str) -> Rewrite:
    """A function whose settings are attributes of the operator: option name -> attribute."""

    def lowered(low: Lowerer, node: Node) -> str:
        settings = {option: getattr(node.layer, attribute) for option, attribute in attributes.items()}
        return rewrite(low, node.path, low.tensor(node.arguments[0][0]), **settings)

    return lowered


def _with_settings(kind: str) -> Callable:
    return lambda low, path, tensor, **options: low.pointwise(path, Primitive(kind, **options), tensor)


def _table_with_settings(function: str) -> Callable:
    return lambda low, path, tensor, **parameters: table(low, path, function, tensor, **parameters)


# ------------------------------------------------------------------ reductions


def reduce(low: Lowerer, path: str, kind: str, tensor: str, axis, keepdims: bool) -> str:
    rank = low.rank(tensor)
    axes = range(rank) if axis is None else [axis] if isinstance(axis, int) else axis
    axes = tuple(sorted(int(a) % rank for a in axes))
    if 0 in axes:
        raise Refused("it reduces over the batch axis; give it axes from 1 on")
    return low.op(path, kind, tensor, axes=axes, keepdims=bool(keepdims))


def _reduction(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        if getattr(node.layer, "initial", None) is not None:
            raise Refused("a reduction with an initial value")
        return reduce(low, node.path, kind, low.tensor(node.arguments[0][0]), node.layer.axis, node.layer.keepdims)

    return rewrite


def variance(low: Lowerer, path: str, tensor: str, axes, keepdims: bool) -> tuple[str, str]:
    """Mean and variance over axes."""
    average = reduce(low, f"{path}/mean", "MEAN", tensor, axes, True)
    centred = low.binary(f"{path}/centred", "SUB", tensor, average)
    spread = reduce(low, path, "MEAN", square(low, f"{path}/square", centred), axes, keepdims)
    if not keepdims:
        average = low.view(f"{path}/mean/squeezed", average, low.shape(spread))
    return average, spread


def _moments(low: Lowerer, node: Node) -> tuple[str, str]:
    tensor = low.tensor(node.arguments[0][0])
    return variance(low, node.path, tensor, node.layer.axes, node.layer.keepdims)


def _variance(low: Lowerer, node: Node) -> str:
    return variance(low, node.path, low.tensor(node.arguments[0][0]), node.layer.axis, node.layer.keepdims)[1]


def _standard_deviation(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    spread = variance(low, f"{node.path}/variance", tensor, node.layer.axis, node.layer.keepdims)[1]
    return table(low, node.path, "sqrt", spread)


def l2_normalize(low: Lowerer, path: str, tensor: str, axis) -> str:
    """L2_NORMALIZATION over the last axis; other axes are brought there."""
    rank = low.rank(tensor)
    axes = sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis))
    if 0 in axes:
        raise Refused("it normalizes over the batch axis")
    if axes == [rank - 1]:
        return low.op(path, "L2_NORMALIZATION", tensor)
    order = [*(a for a in range(rank) if a not in axes), *axes]
    shape = low.shape(tensor)
    moved = transpose(low, f"{path}/transpose", tensor, order)
    sizes = [shape[a - 1] for a in order[1:]]
    flat = (*sizes[: rank - 1 - len(axes)], math.prod(shape[a - 1] for a in axes))
    normalized = low.op(f"{path}/l2", "L2_NORMALIZATION", low.view(f"{path}/flat", moved, flat))
    return transpose(low, path, low.view(f"{path}/shaped", normalized, sizes), [order.index(a) for a in range(rank)])


def _normalize(low: Lowerer, node: Node) -> str:
    if node.layer.order != 2:
        raise Refused(f"normalize(order={node.layer.order}); expected order=2")
    return l2_normalize(low, node.path, low.tensor(node.arguments[0][0]), node.layer.axis)


ARITHMETIC: dict[str, Rewrite] = {
    "Add": _add,
    "Subtract": _subtract,
    "Multiply": _multiply,
    "Divide": _divide,
    "TrueDivide": _divide,
    "Negative": _negative,
    "Power": _power,
    "Square": _square,
    "Maximum": _binary("MAXIMUM"),
    "Minimum": _binary("MINIMUM"),
    "Clip": _clip,
    "Absolute": _function("absolute"),
    "Exp": _function("exponential"),
    "Exp2": _function("exp2"),
    "Log": _function("log"),
    "Rsqrt": _function("rsqrt"),
    "Tanh": _function("tanh"),
    "Relu": _function("relu"),
    "ReLU": _function_with(relu, negative_slope="negative_slope", max_value="max_value", threshold="threshold"),
    "Relu6": _function("relu6"),
    "Sigmoid": _function("sigmoid"),
    "SparseSigmoid": _function("sparse_sigmoid"),
    "Softplus": _function("softplus"),
    "Softsign": _function("softsign"),
    "SparsePlus": _function("sparse_plus"),
    "Silu": _function("silu"),
    "LogSigmoid": _function("log_sigmoid"),
    "HardSigmoid": _function("hard_sigmoid"),
    "HardSilu": _function("hard_silu"),
    "HardTanh": _function("hard_tanh"),
    "TanhShrink": _function("tanh_shrink"),
    "Selu": _function("selu"),
    "Elu": _function_with(elu, alpha="alpha"),
    "Celu": _function_with(_table_with_settings("celu"), alpha="alpha"),
    "Gelu": _function_with(_with_settings("GELU"), approximate="approximate"),
    "LeakyRelu": _function_with(_with_settings("LEAKY_RELU"), alpha="negative_slope"),
    "SoftShrink": _function_with(_table_with_settings("soft_shrink"), threshold="threshold"),
    "HardShrink": _function_with(_table_with_settings("hard_shrink"), threshold="threshold"),
    "Threshold": _function_with(
        _table_with_settings("threshold"), threshold="threshold", default_value="default_value"
    ),
    "Squareplus": _function_with(_table_with_settings("squareplus"), b="b"),
    "Softmax": _function_with(softmax, axis="axis"),
    "LogSoftmax": _function_with(_log_softmax, axis="axis"),
    "Glu": _function_with(_glu, axis="axis"),
    **{name.capitalize(): _function(name) for name in TABULATED if name in ACTIVATIONS},
    "Mean": _reduction("MEAN"),
    "Sum": _reduction("SUM"),
    "Max": _reduction("REDUCE_MAX"),
    "Amax": _reduction("REDUCE_MAX"),
    "Min": _reduction("REDUCE_MIN"),
    "Amin": _reduction("REDUCE_MIN"),
    "Var": _variance,
    "Std": _standard_deviation,
    "Moments": _moments,
    "Normalize": _normalize,
}

OPERATORS: dict[str, Rewrite] = {f"ops.{name}": row for name, row in (ARITHMETIC | SHAPES | PRODUCTS).items()}
