"""What the operators of a `.tflite` file may be given: conditions that kernels rely on and do not check.

Interpreters check most of an operator when they prepare it, and refuse. What is here made them abort, read through
null pointers, or run without end when it did not hold: every rule was found by running damaged files, and is a rule
of TensorFlow Lite's kernels. An operator that a table does not name is not held to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mobileqat.errors import FlatbufferError

if TYPE_CHECKING:
    from mobileqat.flatbuffer import Operator, Tensor

MAX_RANK = 8

# The first input that may be absent; no other may.
_OPTIONAL_FROM = {
    **dict.fromkeys(("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), 2),
    **dict.fromkeys(("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"), 3),
    "SVDF": 4,
    **dict.fromkeys(("LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"), 1),
    "BIDIRECTIONAL_SEQUENCE_RNN": 1,
}
_FEWEST_INPUTS = {
    **dict.fromkeys(("FAKE_QUANT", "SOFTMAX"), 1),
    **dict.fromkeys(("ASSIGN_VARIABLE", "BATCH_MATMUL", "SPLIT"), 2),
    **dict.fromkeys(("DEPTHWISE_CONV_2D", "SLICE"), 3),
    "STRIDED_SLICE": 4,
}

# Operators whose int8, uint8 and int16 operands need scales, and the inputs that may have one per channel.
_PER_CHANNEL = {
    **dict.fromkeys(("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), (1, 2)),
    **dict.fromkeys(("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"), (1, 3)),
}
_SCALED = frozenset(_PER_CHANNEL) | {
    *("ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "ELU", "EXP", "GELU", "HARD_SWISH", "L2_NORMALIZATION", "LEAKY_RELU"),
    *("LOG", "LOGISTIC", "LOG_SOFTMAX", "MEAN", "MUL", "PRELU", "RSQRT", "SOFTMAX", "SQRT", "SQUARED_DIFFERENCE"),
    *("SUB", "TANH"),
}
_QUANTIZED_TYPES = ("int8", "uint8", "int16")

# The input whose type the outputs have.
_SAME_TYPE = {
    **dict.fromkeys(
        (
            *("ADD", "AVERAGE_POOL_2D", "BATCH_TO_SPACE_ND", "CONCATENATION", "DEPTH_TO_SPACE", "EXPAND_DIMS"),
            *("GATHER", "GATHER_ND", "MAX_POOL_2D", "MAXIMUM", "MINIMUM", "MIRROR_PAD", "MUL", "PACK", "PAD", "PADV2"),
            *("REDUCE_MAX", "REDUCE_MIN", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "REVERSE_V2"),
            *("SLICE", "SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH", "SQUEEZE", "STRIDED_SLICE", "SUB", "SUM", "TILE"),
            *("TRANSPOSE", "UNPACK"),
        ),
        0,
    ),
    "SPLIT": 1,
}
# Operators that never look at the type of some inputs, and which it has to be.
_INDEX_TYPES = ("int32", "int64")
_INPUT_TYPES: dict[str, dict[int, tuple[str, ...]]] = {
    "FAKE_QUANT": {0: ("float32",)},
    "SLICE": {1: _INDEX_TYPES, 2: _INDEX_TYPES},
    "SPLIT": {0: _INDEX_TYPES},
}
# Types that few operators make; others pass them on at most.
_RARE_TYPES = ("string", "resource", "variant", "int2", "int4", "uint4", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_CALLS = ("CALL", "CALL_ONCE", "CUSTOM", "HASHTABLE", "IF", "VAR_HANDLE", "WHILE")
_MAKERS = (*_CALLS, "CAST", "DEQUANTIZE", "HASHTABLE_FIND", "QUANTIZE", "READ_VARIABLE")

# Input over output scale, of BATCH_MATMUL the product of both inputs': a fixed-point multiplier has to express it.
_SCALE_RATIO = {
    **dict.fromkeys(("ADD", "SUB"), (2.0**-30, 2.0**14)),
    **dict.fromkeys(("BATCH_MATMUL", "QUANTIZE"), (2.0**-60, 2.0**60)),
}
# The integer softmax multiplies by beta * scale * 2**26, which has to be more than 1.
SMALLEST_STEEPNESS = 2.0**-26
_LARGEST_WINDOW = 2**15  # of strides, dilations and filters along one axis


def check_operator(operator: Operator, tensors: Sequence[Tensor]) -> None:
    """Holds an operator, whose indices exist, to every rule.

    Raises:
        FlatbufferError: the first problem, with the operator it is in.
    """
    for rule in _RULES:
        for problem in rule(operator, tensors):
            raise FlatbufferError(f"operator {operator.index} {operator.name} {problem}")


def _operands(operator: Operator, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[index] for index in (*operator.inputs, *operator.outputs) if index != -1]


def _named(tensor: Tensor) -> str:
    return f"tensor {tensor.index} '{tensor.name}'"


def _inputs_are_there(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    fewest = _FEWEST_INPUTS.get(operator.name, 0)
    if len(operator.inputs) < fewest:
        yield f"has {len(operator.inputs)} inputs, expected at least {fewest}"
    if operator.name not in _CALLS and -1 in operator.inputs[: _OPTIONAL_FROM.get(operator.name)]:
        yield f"lacks input {operator.inputs.index(-1)}"


def _outputs_are_computed(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    for index in operator.outputs:
        if tensors[index].is_variable:
            yield f"writes {_named(tensors[index])}, which is a variable"


def _ranks_are_small(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    for tensor in _operands(operator, tensors):
        if len(tensor.shape) > MAX_RANK:
            yield f"computes with {_named(tensor)} of rank {len(tensor.shape)}, expected at most {MAX_RANK}"


def _nothing_is_empty(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    # A vector may be empty: the shape of a scalar is.
    for tensor in _operands(operator, tensors):
        if 0 in tensor.shape and len(tensor.shape) > 1:
            yield f"computes with {_named(tensor)} of shape {tensor.shape}, which holds nothing"


def _scales_are_there(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    if operator.name not in _SCALED:
        return
    channelwise = [
        operator.inputs[place] for place in _PER_CHANNEL.get(operator.name, ()) if place < len(operator.inputs)
    ]
    for tensor in _operands(operator, tensors):
        if tensor.dtype in _QUANTIZED_TYPES and tensor.scales is None:
            yield f"computes with {_named(tensor)}, which is {tensor.dtype} and has no scale"
        if tensor.scales is not None and tensor.scales.size > 1 and tensor.index not in channelwise:
            yield f"computes with {_named(tensor)}, which has {tensor.scales.size} scales, expected one"


def _types_are_expected(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    for place, expected in _INPUT_TYPES.get(operator.name, {}).items():
        tensor = tensors[operator.inputs[place]]
        if tensor.dtype not in expected:
            yield f"computes with {tensor.dtype} {_named(tensor)}, expected {' or '.join(expected)}"


def _types_are_kept(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    place = _SAME_TYPE.get(operator.name)
    if place is None or place >= len(operator.inputs):
        return
    given = tensors[operator.inputs[place]].dtype
    for tensor in (tensors[index] for index in operator.outputs):
        if tensor.dtype != given:
            yield f"makes {tensor.dtype} {_named(tensor)} of {given}"


def _types_are_made(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    given = {tensors[index].dtype for index in operator.inputs if index != -1}
    for tensor in (tensors[index] for index in operator.outputs):
        if tensor.dtype in _RARE_TYPES and tensor.dtype not in given and operator.name not in _MAKERS:
            yield f"makes {tensor.dtype} {_named(tensor)} of {' and '.join(sorted(given)) or 'nothing'}"
        if operator.name == "SOFTMAX" and tensor.is_float != ("float32" in given):
            yield f"makes {tensor.dtype} {_named(tensor)} of {' and '.join(sorted(given)) or 'nothing'}"


def _scales_fit(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    bounds = _SCALE_RATIO.get(operator.name)
    inputs, outputs = ([tensors[i].scales for i in side if i != -1] for side in (operator.inputs, operator.outputs))
    given, made = ([float(scales.max()) for scales in side if scales is not None] for side in (inputs, outputs))
    if bounds is None or not given or not made:
        return
    combined = math.prod(given) if operator.name == "BATCH_MATMUL" else max(given)
    if not bounds[0] < combined / made[0] < bounds[1]:
        yield f"has input scales {given} and output scale {made[0]:g}, which no integer multiplier relates"


def _windows_are_small(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    for option, value in operator.options.items():
        is_size = option.startswith(("stride_", "dilation_", "filter_"))
        if is_size and isinstance(value, int) and not 1 <= value <= _LARGEST_WINDOW:
            yield f"has {option} {value}, expected 1 to {_LARGEST_WINDOW}"


def _softmax_is_steep(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    if operator.name != "SOFTMAX":
        return
    beta = operator.options.get("beta")
    scales = tensors[operator.inputs[0]].scales
    steepness = math.nan if beta is None else beta * (1.0 if scales is None else float(scales[0]))
    if not SMALLEST_STEEPNESS < steepness < math.inf:
        yield f"has beta {beta} and input scales {scales}"


def _slices_fit(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    if operator.name == "STRIDED_SLICE":
        shapes = [tensors[index].shape for index in operator.inputs[1:4]]
        if len(set(shapes)) != 1:
            yield f"has begin, end and strides of shapes {shapes}"


def _grown(operator: Operator, tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The output's shape where a constant decides how large it is; otherwise None."""
    compute = _GROWTH.get(operator.name)
    if compute is None or len(operator.inputs) < 2:
        return None
    source, amounts = tensors[operator.inputs[0]], tensors[operator.inputs[1]].data
    if amounts is None or not np.issubdtype(amounts.dtype, np.integer) or -1 in source.shape_signature:
        return None
    return compute(source.shape, amounts)


def _resized(shape: tuple[int, ...], size: np.ndarray) -> tuple[int, ...] | None:
    return (shape[0], *map(int, size), shape[3]) if len(shape) == 4 and size.shape == (2,) else None


def _padded(shape: tuple[int, ...], amounts: np.ndarray) -> tuple[int, ...] | None:
    return (
        tuple(n + int(a) + int(b) for n, (a, b) in zip(shape, amounts, strict=True))
        if amounts.shape == (len(shape), 2)
        else None
    )


def _tiled(shape: tuple[int, ...], counts: np.ndarray) -> tuple[int, ...] | None:
    return (
        tuple(n * int(count) for n, count in zip(shape, counts, strict=True)) if counts.shape == (len(shape),) else None
    )


_GROWTH: dict[str, Callable[[tuple[int, ...], np.ndarray], tuple[int, ...] | None]] = {
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), _resized),
    **dict.fromkeys(("MIRROR_PAD", "PAD", "PADV2"), _padded),
    "TILE": _tiled,
}


def _sizes_fit(operator: Operator, tensors: Sequence[Tensor]) -> Iterator[str]:
    # What the file says its tensors need is bounded; what such a constant asks for need not be.
    grown = _grown(operator, tensors)
    for index in operator.outputs:
        if grown is not None and grown != tensors[index].shape and -1 not in tensors[index].shape_signature:
            yield f"makes shape {grown}, {_named(tensors[index])} has {tensors[index].shape}"


_RULES = (
    _inputs_are_there,
    _outputs_are_computed,
    _ranks_are_small,
    _nothing_is_empty,
    _scales_are_there,
    _types_are_expected,
    _types_are_kept,
    _types_are_made,
    _scales_fit,
    _windows_are_small,
    _softmax_is_steep,
    _slices_fit,
    _sizes_fit,
)
