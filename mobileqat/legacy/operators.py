"""TensorFlow functions that Keras 2 models call on tensors, in terms of `keras.ops`.

Keras 2 saves `x + y`, `tf.nn.relu(x)` or `x[:, 0]` as layers (TFOpLambda, SlicingOpLambda) that name the function.
Each row takes the arguments that TensorFlow's function takes, by the same names; an argument that a row lacks is one
that cannot be translated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops


def decode(value: Any) -> Any:
    """A constant of a configuration: slices, the ellipsis and arrays have forms of their own in JSON."""
    if isinstance(value, dict):
        if value.get("class_name") == "__ellipsis__":
            return ...
        if value.get("class_name") == "__tuple__":
            return tuple(decode(item) for item in value["items"])
        if set(value) == {"start", "stop", "step"}:
            return slice(value["start"], value["stop"], value["step"])
        if set(value) == {"class_name", "config"} and value["class_name"] in ("__numpy__", "__tensor__"):
            return np.asarray(value["config"]["value"], value["config"]["dtype"])
        return {key: decode(entry) for key, entry in value.items()}
    return [decode(entry) for entry in value] if isinstance(value, list) else value


def slices(x, slice_spec):
    """`x[slice_spec]`."""
    spec = slice_spec if isinstance(slice_spec, list) else [slice_spec]
    return x[tuple(spec)]


def _unary(operator: Callable) -> Callable:
    return lambda x: operator(x)


def _binary(operator: Callable) -> Callable:
    def apply(x, y):
        return operator(_constant(x, y), _constant(y, x))

    return apply


def _constant(value, other):
    """A list of numbers as an array of the tensor's dtype: Keras operators read shapes off arrays only."""
    return np.asarray(value, other.dtype) if isinstance(value, (list, np.ndarray)) else value


def _reduction(operator: Callable) -> Callable:
    def apply(input_tensor, axis=None, keepdims=False):
        return operator(input_tensor, axis=tuple(axis) if isinstance(axis, list) else axis, keepdims=bool(keepdims))

    return apply


def _activation(operator: Callable) -> Callable:
    return lambda features: operator(features)


def _concat(values, axis):
    return ops.concatenate(values, axis=axis)


def _stack(values, axis=0):
    return ops.stack(values, axis=axis)


def _split(value, num_or_size_splits, axis=0):
    if isinstance(num_or_size_splits, list):
        return ops.split(value, np.cumsum(num_or_size_splits)[:-1].tolist(), axis=axis)
    return ops.split(value, num_or_size_splits, axis=axis)


def _unstack(value, num=None, axis=0):
    return ops.unstack(value, num=num, axis=axis)


def _reshape(tensor, shape):
    return ops.reshape(tensor, tuple(shape))


def _transpose(a, perm=None, conjugate=False):
    del conjugate  # of real values: themselves
    return ops.transpose(a, axes=None if perm is None else tuple(perm))


def _expand_dims(input, axis):
    return ops.expand_dims(input, axis)


def _squeeze(input, axis=None):
    return ops.squeeze(input, axis=tuple(axis) if isinstance(axis, list) else axis)


def _pad(tensor, paddings, mode="CONSTANT", constant_values=0):
    mode = mode.lower()
    pairs = tuple(tuple(pair) for pair in paddings)
    return ops.pad(tensor, pairs, mode, constant_values) if mode == "constant" else ops.pad(tensor, pairs, mode)


def _tile(input, multiples):
    return ops.tile(input, tuple(multiples))


def _flip(tensor, axis):
    return ops.flip(tensor, axis=tuple(axis) if isinstance(axis, list) else axis)


def _cast(x, dtype):
    return ops.cast(x, dtype)


def _clip(t, clip_value_min, clip_value_max):
    return ops.clip(t, clip_value_min, clip_value_max)


def _resize(images, size, method="bilinear"):
    return ops.image.resize(images, tuple(size), interpolation=method)


def _matmul(a, b, transpose_a=False, transpose_b=False):
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    b = ops.swapaxes(b, -1, -2) if transpose_b else b
    return ops.matmul(a, b)


def _softmax(logits, axis=-1):
    return ops.softmax(logits, axis=-1 if axis is None else axis)


def _leaky_relu(features, alpha=0.2):
    return ops.leaky_relu(features, negative_slope=alpha)


def _gelu(features, approximate=False):
    return ops.gelu(features, approximate=approximate)


def _silu(features, beta=1.0):
    return ops.silu(features) if beta == 1.0 else features * ops.sigmoid(features * beta)


def _l2_normalize(x, axis=None, epsilon=1e-12):
    axis = tuple(axis) if isinstance(axis, list) else axis
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=axis, keepdims=True), epsilon))


def _argmax(input, axis=0):
    return ops.argmax(input, axis=axis)


OPERATORS: dict[str, Callable] = {
    **dict.fromkeys(("__operators__.add", "math.add"), _binary(ops.add)),
    "math.subtract": _binary(ops.subtract),
    "math.multiply": _binary(ops.multiply),
    **dict.fromkeys(("math.truediv", "math.divide"), _binary(ops.divide)),
    "math.pow": _binary(ops.power),
    "math.maximum": _binary(ops.maximum),
    "math.minimum": _binary(ops.minimum),
    "math.greater": _binary(ops.greater),
    "math.greater_equal": _binary(ops.greater_equal),
    "math.less": _binary(ops.less),
    "math.less_equal": _binary(ops.less_equal),
    "math.negative": _unary(ops.negative),
    "math.abs": _unary(ops.abs),
    "math.square": _unary(ops.square),
    "math.sqrt": _unary(ops.sqrt),
    "math.rsqrt": _unary(ops.rsqrt),
    "math.exp": _unary(ops.exp),
    "math.log": _unary(ops.log),
    **dict.fromkeys(("math.tanh", "nn.tanh"), _unary(ops.tanh)),
    **dict.fromkeys(("math.sigmoid", "nn.sigmoid"), _unary(ops.sigmoid)),
    "nn.relu": _activation(ops.relu),
    "nn.relu6": _activation(ops.relu6),
    "nn.elu": _activation(ops.elu),
    "nn.selu": _activation(ops.selu),
    **dict.fromkeys(("math.softplus", "nn.softplus"), _activation(ops.softplus)),
    "nn.softsign": _activation(ops.softsign),
    "nn.gelu": _gelu,
    "nn.leaky_relu": _leaky_relu,
    **dict.fromkeys(("nn.silu", "nn.swish"), _silu),
    "nn.softmax": _softmax,
    "math.reduce_mean": _reduction(ops.mean),
    "math.reduce_sum": _reduction(ops.sum),
    "math.reduce_max": _reduction(ops.max),
    "math.reduce_min": _reduction(ops.min),
    "math.reduce_prod": _reduction(ops.prod),
    "math.argmax": _argmax,
    **dict.fromkeys(("math.l2_normalize", "nn.l2_normalize"), _l2_normalize),
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "unstack": _unstack,
    "reshape": _reshape,
    "transpose": _transpose,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "pad": _pad,
    "tile": _tile,
    "reverse": _flip,
    "identity": _unary(lambda x: x),
    "cast": _cast,
    "clip_by_value": _clip,
    "image.resize": _resize,
    "linalg.matmul": _matmul,
}
