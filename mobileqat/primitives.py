"""The runtime's operators as Keras layers: `Primitive` for those without weights, `Constant` for constant operands.

`lowering` expresses every model by these, by Conv2D, DepthwiseConv2D, Conv2DTranspose and Dense, and by the layers
that do nothing at inference.  A primitive is data, its kind and its options; what it computes in float is a row here,
in integers a row of `kernels`, and how it is written a row of `convert`.

Axes count the batch as axis 0; shapes, slices and paddings leave the batch out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from mobileqat.graph import Source


class Primitive(keras.layers.Layer):
    """One runtime operator.

    Args:
        kind: LiteRT builtin operator, or "TABLE" for a function of one value that the runtime lacks.
        options: what the operator is set to; see `FLOAT`.
    """

    def __init__(self, kind: str, name: str | None = None, **options):
        super().__init__(name=name)
        self.kind = kind
        self.options = options
        self.built = True

    def call(self, inputs):
        tensors = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return FLOAT[self.kind](*tensors, **self.options)

    def compute_output_spec(self, inputs):
        result = self.call(inputs)
        return keras.KerasTensor(result.shape, result.dtype)


class Constant(keras.layers.Layer):
    """A constant operand.  Called on any tensor, which it ignores, it gives its value.

    Args:
        value: array; None to take it from `source`.
        source: the variable it comes from; it then trains if the variable does.
        shape: its shape, if that is not the value's.
        batched: its first axis, of size 1, is the batch: repeated for every sample.
    """

    def __init__(self, value: Any = None, source: Source | None = None, shape=None, batched=False, name=None):
        super().__init__(dtype="float32", name=name)
        self.batched = batched
        value = np.asarray(source.value() if source is not None else value)
        value = value if shape is None else value.reshape(shape)
        value = value.astype("int32" if value.dtype.kind in "iub" else "float32")
        self.sources = () if source is None else (source,)
        self.value = self.add_weight(
            name="value",
            shape=value.shape,
            dtype=value.dtype.name,
            autocast=False,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(value),
            trainable=source is not None and source.variable.trainable,
        )
        self.built = True

    def call(self, inputs):
        value = ops.convert_to_tensor(self.value)
        return ops.repeat(value, ops.shape(inputs)[0], axis=0) if self.batched else value

    def compute_output_spec(self, inputs):
        shape = self.value.shape
        return keras.KerasTensor((inputs.shape[0], *shape[1:]) if self.batched else shape, self.value.dtype)


def _add(a, b):
    # keras.ops.add takes an operand with one long axis, of the size of a's axis 1, for a channels-first bias.
    return ops.add(a, b) if isinstance(a, keras.KerasTensor) else tf.add(a, b)


def _slice(x, begin, end, strides):
    return x[(slice(None), *(slice(*bounds) for bounds in zip(begin, end, strides, strict=True)))]


def _pad(x, paddings, mode="constant"):
    return ops.pad(x, [(0, 0), *paddings], mode)


def _batch_matmul(x, y, adj_x=False, adj_y=False):
    return ops.matmul(ops.swapaxes(x, -1, -2) if adj_x else x, ops.swapaxes(y, -1, -2) if adj_y else y)


def _pool(function: Callable, x, pool_size, strides, padding):
    return function(x, pool_size, strides, padding, data_format="channels_last")


def _resize(interpolation: str, x, size):
    return ops.image.resize(x, size, interpolation, antialias=False, data_format="channels_last")


def _depth_to_space(x, block_size):
    height, width, channels = x.shape[1:]
    x = ops.reshape(x, (-1, height, width, block_size, block_size, channels // block_size**2))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height * block_size, width * block_size, channels // block_size**2))


def _space_to_depth(x, block_size):
    height, width, channels = x.shape[1:]
    x = ops.reshape(x, (-1, height // block_size, block_size, width // block_size, block_size, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height // block_size, width // block_size, channels * block_size**2))


# What each primitive computes in float: tensors first, then the options by name.
FLOAT: dict[str, Callable] = {
    "ADD": _add,
    "SUB": ops.subtract,
    "MUL": ops.multiply,
    "MAXIMUM": ops.maximum,
    "MINIMUM": ops.minimum,
    "CONCATENATION": lambda *tensors, axis: ops.concatenate(tensors, axis),
    "BATCH_MATMUL": _batch_matmul,
    "MEAN": lambda x, axes, keepdims: ops.mean(x, axes, keepdims),
    "SUM": lambda x, axes, keepdims: ops.sum(x, axes, keepdims),
    "REDUCE_MAX": lambda x, axes, keepdims: ops.max(x, axes, keepdims),
    "REDUCE_MIN": lambda x, axes, keepdims: ops.min(x, axes, keepdims),
    "MAX_POOL_2D": partial(_pool, ops.max_pool),
    "AVERAGE_POOL_2D": partial(_pool, ops.average_pool),
    "RESHAPE": lambda x, shape: ops.reshape(x, (-1, *shape)),
    "TRANSPOSE": lambda x, permutation: ops.transpose(x, permutation),
    "STRIDED_SLICE": _slice,
    "PAD": _pad,
    "MIRROR_PAD": _pad,
    "TILE": lambda x, multiples: ops.tile(x, (1, *multiples)),
    "GATHER": lambda params, indices, axis: ops.take(params, indices, axis),
    "SPACE_TO_DEPTH": _space_to_depth,
    "DEPTH_TO_SPACE": _depth_to_space,
    "RESIZE_NEAREST_NEIGHBOR": partial(_resize, "nearest"),
    "RESIZE_BILINEAR": partial(_resize, "bilinear"),
    "QUANTIZE": lambda x: x,
    "RELU": ops.relu,
    "RELU6": ops.relu6,
    "LEAKY_RELU": lambda x, alpha: ops.leaky_relu(x, alpha),
    "PRELU": lambda x, alpha: ops.relu(x) - alpha * ops.relu(-x),
    "LOGISTIC": ops.sigmoid,
    "TANH": ops.tanh,
    "HARD_SWISH": ops.hard_silu,
    "ELU": lambda x: ops.elu(x),
    "GELU": lambda x, approximate: ops.gelu(x, approximate),
    "ABS": ops.absolute,
    "EXP": ops.exp,
    "LOG": ops.log,
    "RSQRT": lambda x, epsilon=0.0: ops.rsqrt(x + epsilon),
    "SOFTMAX": lambda x, beta=1.0: ops.softmax(x * beta if beta != 1.0 else x),
    "L2_NORMALIZATION": lambda x: ops.normalize(x, -1),
    "TABLE": lambda x, function, **parameters: FUNCTIONS[function](x, **parameters),
}

# Operators of keras.ops of one value that become tables as they are.
TABULATED = (
    "arctan", "arcsinh", "ceil", "cos", "cosh", "erf", "expm1", "floor", "log10", "log1p", "log2", "reciprocal",
    "round", "sign", "sin", "sinh", "sqrt", "tan", "trunc",
)  # fmt: skip

# Functions of one value that the runtime has no integer operator for; a table of 256 integers stands for each.
FUNCTIONS: dict[str, Callable] = {
    **{name: getattr(ops, name) for name in TABULATED if hasattr(ops, name)},
    "celu": lambda x, alpha: ops.maximum(x, 0) + alpha * (ops.exp(ops.minimum(x, 0) / alpha) - 1),
    "elu": lambda x, alpha: ops.maximum(x, 0) + alpha * (ops.exp(ops.minimum(x, 0)) - 1),
    "exp2": lambda x: ops.exp(x * math.log(2)),
    "hard_shrink": lambda x, threshold: x * ops.cast(ops.abs(x) > threshold, x.dtype),
    "hard_sigmoid": ops.hard_sigmoid,
    "hard_tanh": lambda x: ops.clip(x, -1, 1),
    "log_sigmoid": ops.log_sigmoid,
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
    "power": lambda x, exponent: ops.power(x, exponent),
    "relu": lambda x, negative_slope, max_value, threshold: _general_relu(x, negative_slope, max_value, threshold),
    "selu": lambda x: 1.0507009873554805 * (ops.maximum(x, 0) + 1.6732632423543772 * (ops.exp(ops.minimum(x, 0)) - 1)),
    "soft_shrink": lambda x, threshold: ops.maximum(x - threshold, 0) + ops.minimum(x + threshold, 0),
    "softplus": ops.softplus,
    "softsign": lambda x: x / (ops.abs(x) + 1),
    "sparse_plus": lambda x: ops.where(x >= 1, x, ops.where(x <= -1, ops.zeros_like(x), (x + 1) * (x + 1) / 4)),
    "sparse_sigmoid": lambda x: ops.clip((x + 1) / 2, 0, 1),
    "squareplus": lambda x, b: (x + ops.sqrt(x * x + b)) / 2,
    "tanh_shrink": lambda x: x - ops.tanh(x),
    "threshold": lambda x, threshold, default_value: ops.where(x > threshold, x, ops.full_like(x, default_value)),
}


def _general_relu(x, negative_slope, max_value, threshold):
    """Keras's ReLU with all of its settings."""
    above = x if max_value is None else ops.minimum(x, max_value)
    return ops.where(x >= threshold, above, negative_slope * (x - threshold))
