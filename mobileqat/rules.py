"""The table: what becomes of each kind of layer in the integer runtime.

One row per Keras layer class (activations by function), after `lowering` has rewritten the model so that every layer
maps to at most one runtime operator.  A row says which operator, where the output's quantization parameters come
from, which weight axis keeps a scale per channel, and what may fuse into it.  Supporting a new layer is a new row
here, its arithmetic in `kernels` and its options in `convert`; a test holds that the three agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

GONE = ""
Check = Callable[[Any, tuple], "str | None"]


class Output(Enum):
    """Where an operator's output gets its scale and zero point from."""

    OWN = "a range of its own"
    SHARED = "its input's parameters"
    FIXED = "fixed by the kernel"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        operator: LiteRT builtin operator, or GONE for a layer that does nothing at inference.
        output: the output's parameters: of its own, shared with the input(s), or fixed by the kernel.
        rounds: False when the operator only moves or selects grid values, so that nothing is rounded.
        fixed: `(scale, zero_point)` for `Output.FIXED`, int8.
        channel_axes: for a layer with a kernel, the axes of the Keras kernel that form the output channels.
        fuses_activation: a following ReLU, used nowhere else, becomes part of the operator.
        refuse: `(layer, input_shapes) -> reason or None`, for settings that the runtime cannot execute.
    """

    operator: str
    output: Output = Output.OWN
    rounds: bool = True
    fixed: tuple[float, int] | None = None
    channel_axes: tuple[int, ...] = ()
    fuses_activation: bool = False
    refuse: Check | None = None

    @property
    def has_kernel(self) -> bool:
        return bool(self.channel_axes)


def _channels_last(layer, shapes):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "data_format='channels_first' has no integer kernel; build the model with channels_last"
    return None


def _transposed(layer, shapes):
    if layer.output_padding is not None:
        return "output_padding is not supported; crop or pad after the layer instead"
    if tuple(layer.dilation_rate) != (1, 1):
        return "a dilated transposed convolution has no integer kernel"
    return _channels_last(layer, shapes)


def _depthwise(layer, shapes):
    if max(layer.dilation_rate) > 1 and max(layer.strides) > 1:
        return "strides and dilation together have no kernel"
    return _channels_last(layer, shapes)


def _softmax(layer, shapes):
    axis = layer.axis if isinstance(layer.axis, int) else None
    if axis not in (-1, len(shapes[0]) - 1):
        return f"softmax over axis {layer.axis}; the kernel takes the last axis only"
    return None


def _relu(layer, shapes):
    if layer.threshold:
        return f"ReLU(threshold={layer.threshold}) has no integer kernel; use threshold=0"
    if layer.negative_slope and layer.max_value is not None:
        return "ReLU with both negative_slope and max_value has no integer kernel"
    return None


def _resize(layer, shapes):
    if layer.interpolation not in ("nearest", "bilinear"):
        return f"interpolation={layer.interpolation!r}; the runtime has nearest and bilinear"
    return _channels_last(layer, shapes)


def _binary(layer, shapes):
    if len(shapes[0]) != len(shapes[1]):
        return f"inputs of rank {len(shapes[0])} and {len(shapes[1])}; reshape them to one rank"
    return None


def _batch_norm(layer, shapes):
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    if axis not in (-1, len(shapes[0]) - 1):
        return f"BatchNormalization over axis {axis}; only the last axis (channels) can be folded"
    return None


RULES: dict[str, Rule] = {
    "Conv2D": Rule("CONV_2D", channel_axes=(3,), fuses_activation=True, refuse=_channels_last),
    "DepthwiseConv2D": Rule("DEPTHWISE_CONV_2D", channel_axes=(2, 3), fuses_activation=True, refuse=_depthwise),
    "Conv2DTranspose": Rule("TRANSPOSE_CONV", channel_axes=(2,), fuses_activation=True, refuse=_transposed),
    "Dense": Rule("FULLY_CONNECTED", channel_axes=(1,), fuses_activation=True),
    "BatchNormalization": Rule(GONE, refuse=_batch_norm),
    "Add": Rule("ADD", fuses_activation=True, refuse=_binary),
    "Multiply": Rule("MUL", fuses_activation=True, refuse=_binary),
    "Concatenate": Rule("CONCATENATION", Output.SHARED, rounds=False),
    "MaxPooling2D": Rule("MAX_POOL_2D", Output.SHARED, rounds=False, refuse=_channels_last),
    "AveragePooling2D": Rule("AVERAGE_POOL_2D", Output.SHARED, refuse=_channels_last),
    "GlobalAveragePooling2D": Rule("MEAN", refuse=_channels_last),
    "GlobalMaxPooling2D": Rule("REDUCE_MAX", Output.SHARED, rounds=False, refuse=_channels_last),
    "ZeroPadding2D": Rule("PAD", Output.SHARED, rounds=False, refuse=_channels_last),
    "Cropping2D": Rule("STRIDED_SLICE", Output.SHARED, rounds=False, refuse=_channels_last),
    "Reshape": Rule("RESHAPE", Output.SHARED, rounds=False),
    "Flatten": Rule("RESHAPE", Output.SHARED, rounds=False, refuse=_channels_last),
    "Permute": Rule("TRANSPOSE", Output.SHARED, rounds=False),
    "UpSampling2D:nearest": Rule("RESIZE_NEAREST_NEIGHBOR", Output.SHARED, rounds=False, refuse=_resize),
    "UpSampling2D:bilinear": Rule("RESIZE_BILINEAR", Output.SHARED, refuse=_resize),
    "Requantize": Rule("QUANTIZE"),
    "ReLU": Rule("RELU", Output.SHARED, rounds=False, refuse=_relu),
    "ReLU:6": Rule("RELU6", Output.SHARED, refuse=_relu),
    "Clip": Rule("MINIMUM", Output.SHARED),
    "LeakyReLU": Rule("LEAKY_RELU"),
    "Softmax": Rule("SOFTMAX", Output.FIXED, fixed=(1 / 256, -128), refuse=_softmax),
    "Activation:sigmoid": Rule("LOGISTIC", Output.FIXED, fixed=(1 / 256, -128)),
    "Activation:tanh": Rule("TANH", Output.FIXED, fixed=(1 / 128, 0)),
    "Activation:hard_silu": Rule("HARD_SWISH"),
    "Dropout": Rule(GONE, Output.SHARED, rounds=False),
    "SpatialDropout2D": Rule(GONE, Output.SHARED, rounds=False),
    "GaussianDropout": Rule(GONE, Output.SHARED, rounds=False),
    "GaussianNoise": Rule(GONE, Output.SHARED, rounds=False),
    "Identity": Rule(GONE, Output.SHARED, rounds=False),
}


def function_name(function) -> str:
    """Name of an activation function, which may be a layer or another callable object."""
    return getattr(function, "__name__", type(function).__name__)


def class_name(layer) -> str:
    """A layer's class name; a Keras operator's is prefixed, "ops.Add", since layers have the same names."""
    name = type(layer).__name__
    return name if hasattr(layer, "weights") else f"ops.{name}"


def rule_key(layer) -> str:
    """The table's key for a layer: its class name, with the function or mode that selects the operator."""
    name = class_name(layer)
    if name == "Activation":
        return f"{name}:{function_name(layer.activation)}"
    if name == "ReLU" and layer.max_value == 6:
        return f"{name}:6"
    if name == "UpSampling2D":
        return f"{name}:{layer.interpolation}"
    return name


def find_rule(layer) -> Rule | None:
    """The layer's row, or None when the table has none."""
    return RULES.get(rule_key(layer))


def get_rule(layer) -> Rule:
    """The row of a layer that is known to have one."""
    return RULES[rule_key(layer)]
