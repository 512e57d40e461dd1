"""The table: what becomes of each operator in the integer runtime.

One row per primitive, and one per Keras layer that is kept whole: those with a kernel, and those that do nothing at
inference.  (`lowering` expresses every other layer by these.)  A row says which operator, where the output's
quantization parameters come from, which weight axis keeps a scale per channel, and what may fuse into it.  A new
runtime operator is a row here, its float meaning in `primitives`, its arithmetic in `kernels` and its options in
`convert`; a test holds that the four agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mobileqat.primitives import Primitive

GONE = ""
CONSTANT = "CONSTANT"


class Output(Enum):
    """Where an operator's output gets its scale and zero point from."""

    OWN = "a range of its own"
    SHARED = "its input's parameters"
    FIXED = "fixed by the kernel"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        operator: LiteRT builtin operator, GONE for a layer that does nothing at inference, CONSTANT for an operand.
        output: the output's parameters: of its own, shared with the input(s), or fixed by the kernel.
        rounds: False when the operator only moves or selects grid values, so that nothing is rounded.
        fixed: `(scale, zero_point)` for `Output.FIXED`, int8; for int16 it is `FIXED_INT16`.
        channel_axes: for a layer with a kernel, the axes of the Keras kernel that form the output channels.
        input_axis: the axis of the Keras kernel along the input channels.
        fuses_activation: a following ReLU, used nowhere else, becomes part of the operator.
        symmetric_input: position of the input whose zero point should be 0: XNNPACK takes a product of two activations
            only so, and is 19 times faster than LiteRT's own kernel.
        int16: whether LiteRT executes it on int16 activations.
    """

    operator: str
    output: Output = Output.OWN
    rounds: bool = True
    fixed: tuple[float, int] | None = None
    channel_axes: tuple[int, ...] = ()
    input_axis: int = 0
    fuses_activation: bool = False
    symmetric_input: int | None = None
    int16: bool = True

    @property
    def has_kernel(self) -> bool:
        return bool(self.channel_axes)


def _moves(operator: str, int16: bool = True) -> Rule:
    """An operator that moves or selects values."""
    return Rule(operator, Output.SHARED, rounds=False, int16=int16)


_TO_ONE = (1 / 256, -128)
_AROUND_ZERO = (1 / 128, 0)
FIXED_INT16 = (1 / 32768, 0)

# Layers that do something in training alone.
VANISHING = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise",
    "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast", "RandomElasticTransform",
    "RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert",
    "RandomPerspective", "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness",
    "RandomTranslation", "RandomZoom",
)  # fmt: skip

RULES: dict[str, Rule] = {
    "Conv2D": Rule("CONV_2D", channel_axes=(3,), input_axis=2, fuses_activation=True),
    "DepthwiseConv2D": Rule("DEPTHWISE_CONV_2D", channel_axes=(2, 3), input_axis=2, fuses_activation=True),
    "Conv2DTranspose": Rule("TRANSPOSE_CONV", channel_axes=(2,), input_axis=3, fuses_activation=True),
    "Dense": Rule("FULLY_CONNECTED", channel_axes=(1,), input_axis=0, fuses_activation=True),
    "BatchNormalization": Rule(GONE),
    **{name: Rule(GONE, Output.SHARED, rounds=False) for name in VANISHING},
    "Constant": Rule(CONSTANT),
    "ADD": Rule("ADD", fuses_activation=True),
    "SUB": Rule("SUB", fuses_activation=True),
    "MUL": Rule("MUL", fuses_activation=True),
    "MAXIMUM": _moves("MAXIMUM"),
    "MINIMUM": _moves("MINIMUM"),
    "BATCH_MATMUL": Rule("BATCH_MATMUL", symmetric_input=1),
    "MEAN": Rule("MEAN"),
    "SUM": Rule("SUM"),
    "REDUCE_MAX": _moves("REDUCE_MAX"),
    "REDUCE_MIN": _moves("REDUCE_MIN"),
    "MAX_POOL_2D": _moves("MAX_POOL_2D"),
    "AVERAGE_POOL_2D": Rule("AVERAGE_POOL_2D", Output.SHARED),
    "CONCATENATION": _moves("CONCATENATION"),
    "RESHAPE": _moves("RESHAPE"),
    "TRANSPOSE": _moves("TRANSPOSE"),
    "STRIDED_SLICE": _moves("STRIDED_SLICE"),
    "PAD": _moves("PAD"),
    "MIRROR_PAD": _moves("MIRROR_PAD"),
    "TILE": _moves("TILE"),
    "GATHER": _moves("GATHER"),
    "SPACE_TO_DEPTH": _moves("SPACE_TO_DEPTH", int16=False),
    "DEPTH_TO_SPACE": _moves("DEPTH_TO_SPACE", int16=False),
    "RESIZE_NEAREST_NEIGHBOR": _moves("RESIZE_NEAREST_NEIGHBOR"),
    "RESIZE_BILINEAR": Rule("RESIZE_BILINEAR", Output.SHARED),
    "QUANTIZE": Rule("QUANTIZE"),
    "RELU": _moves("RELU"),
    "RELU6": Rule("RELU6", Output.SHARED),
    "LEAKY_RELU": Rule("LEAKY_RELU"),
    "PRELU": Rule("PRELU", int16=False),
    "ELU": Rule("ELU", int16=False),
    "GELU": Rule("GELU"),
    "HARD_SWISH": Rule("HARD_SWISH", int16=False),
    "ABS": Rule("ABS"),
    "EXP": Rule("EXP"),
    "LOG": Rule("LOG"),
    "RSQRT": Rule("RSQRT"),
    "TABLE": Rule("TABLE", int16=False),
    "LOGISTIC": Rule("LOGISTIC", Output.FIXED, fixed=_TO_ONE),
    "SOFTMAX": Rule("SOFTMAX", Output.FIXED, fixed=_TO_ONE),
    "TANH": Rule("TANH", Output.FIXED, fixed=_AROUND_ZERO),
    "L2_NORMALIZATION": Rule("L2_NORMALIZATION", Output.FIXED, fixed=_AROUND_ZERO, int16=False),
}


def function_name(function) -> str:
    """Name of an activation function, which may be a layer or another callable object."""
    return getattr(function, "__name__", type(function).__name__)


def class_name(layer) -> str:
    """Class name of a Keras layer; "ops.Add" of a Keras operator, since layers have the same names.

    A class derived from a Keras layer whose `call` it inherits counts as that layer; other classes of users get a name
    that no table has, whatever they are called.
    """
    own = type(layer)
    keras_class = next((c for c in own.__mro__ if c.__module__.startswith(("keras.", "mobileqat."))), None)
    if keras_class is None or getattr(own, "call", None) is not getattr(keras_class, "call", None):
        return f"{own.__module__}.{own.__qualname__}"
    return keras_class.__name__ if hasattr(layer, "weights") else f"ops.{keras_class.__name__}"


def rule_key(layer) -> str:
    """The table's key for a layer: a primitive's kind, or the class name."""
    return layer.kind if isinstance(layer, Primitive) else class_name(layer)


def find_rule(layer) -> Rule | None:
    """The layer's row, or None when the table has none."""
    return RULES.get(rule_key(layer))


def get_rule(layer) -> Rule:
    """The row of a layer that is known to have one."""
    return RULES[rule_key(layer)]
