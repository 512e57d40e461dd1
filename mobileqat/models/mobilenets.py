"""MobileNetV2 and MobileNetV3-Small: inverted residuals, with strides that can be set for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import keras

# Expansion, output channels at alpha = 1, repeats and stride of the first (Sandler et al. 2018, table 2).
_V2_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class _Block(NamedTuple):
    kernel: int
    expanded: int
    channels: int
    attends: bool
    activation: str
    halves: bool = False


# Howard et al. 2019, table 2.
_V3_SMALL_BLOCKS = (
    _Block(3, 16, 16, True, "relu", halves=True),
    _Block(3, 72, 24, False, "relu", halves=True),
    _Block(3, 88, 24, False, "relu"),
    _Block(5, 96, 40, True, "hard_swish", halves=True),
    _Block(5, 240, 40, True, "hard_swish"),
    _Block(5, 240, 40, True, "hard_swish"),
    _Block(5, 120, 48, True, "hard_swish"),
    _Block(5, 144, 48, True, "hard_swish"),
    _Block(5, 288, 96, True, "hard_swish", halves=True),
    _Block(5, 576, 96, True, "hard_swish"),
    _Block(5, 576, 96, True, "hard_swish"),
)


def mobilenet_v2(
    input_shape: tuple[int, ...], classes: int, alpha: float = 0.35, first_stride: int = 2, dropout: float = 0.2
) -> keras.Model:
    """MobileNetV2 (Sandler et al. 2018); the last convolution has 1280 channels times alpha, but 640 at least."""
    from keras import Input, Model, layers

    inputs = Input(input_shape, name="image")
    x = _conv(inputs, _multiple_of_8(32 * alpha), 3, first_stride, "relu6", "conv")
    index = 0
    for expansion, count, repeats, first in _V2_STAGES:
        for repeat in range(repeats):
            index += 1
            expanded, name = expansion * x.shape[-1], f"block_{index}"
            y = x if expansion == 1 else _conv(x, expanded, 1, 1, "relu6", f"{name}_expand")
            y = _depthwise(y, 3, 1 if repeat else first, "relu6", f"{name}_depthwise")
            y = _conv(y, _multiple_of_8(count * alpha), 1, 1, None, f"{name}_project")
            x = layers.Add(name=f"{name}_add")([x, y]) if repeat else y
    x = _conv(x, max(640, _multiple_of_8(1280 * alpha)), 1, 1, "relu6", "last_conv")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    return Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(x), name="mobilenet_v2")


def mobilenet_v3_small(
    input_shape: tuple[int, ...],
    classes: int,
    alpha: float = 0.5,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    dropout: float = 0.2,
) -> keras.Model:
    """MobileNetV3-Small (Howard et al. 2019): hard-swish, and squeeze-and-excite blocks.

    Args:
        input_shape: of one image.
        classes: number of classes.
        alpha: multiplies all channels.
        strides: of the first convolution and of the four blocks that halve the image; (1, 2, 2, 2, 1) for 32x32.
        dropout: before the classifier.
    """
    from keras import Input, Model, layers

    remaining = list(strides)
    inputs = Input(input_shape, name="image")
    x = _conv(inputs, _multiple_of_8(16 * alpha), 3, remaining.pop(0), "hard_swish", "conv")
    for index, block in enumerate(_V3_SMALL_BLOCKS, 1):
        name, activation = f"block_{index}", block.activation
        count, stride = _multiple_of_8(block.channels * alpha), remaining.pop(0) if block.halves else 1
        # The first block of the paper expands to the channels it is given.
        y = x if index == 1 else _conv(x, _multiple_of_8(block.expanded * alpha), 1, 1, activation, f"{name}_expand")
        y = _depthwise(y, block.kernel, stride, activation, f"{name}_depthwise")
        if block.attends:
            y = _squeeze_excite(y, name)
        y = _conv(y, count, 1, 1, None, f"{name}_project")
        x = layers.Add(name=f"{name}_add")([x, y]) if stride == 1 and x.shape[-1] == count else y
    x = _conv(x, _multiple_of_8(576 * alpha), 1, 1, "hard_swish", "last_conv")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(_multiple_of_8(1024 * alpha), name="features")(x)
    x = layers.Dropout(dropout, name="dropout")(layers.Activation("hard_swish", name="features_hard_swish")(x))
    return Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(x), name="mobilenet_v3_small")


def _conv(x, channels: int, size: int, stride: int, activation: str | None, name: str):
    from keras import layers

    layer = layers.Conv2D(channels, size, stride, "same", use_bias=False, kernel_initializer="he_normal", name=name)
    return _normalized(layer(x), activation, name)


def _depthwise(x, size: int, stride: int, activation: str, name: str):
    from keras import layers

    return _normalized(layers.DepthwiseConv2D(size, stride, "same", use_bias=False, name=name)(x), activation, name)


def _normalized(x, activation: str | None, name: str):
    from keras import layers

    # Keras's momentum of 0.99 needs hundreds of steps to follow; small datasets have a few dozen per epoch.
    x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
    if activation is None:
        return x
    if activation == "hard_swish":
        return layers.Activation("hard_swish", name=f"{name}_hard_swish")(x)
    return layers.ReLU(6.0 if activation == "relu6" else None, name=f"{name}_relu")(x)


def _squeeze_excite(x, name: str):
    """Channels weighted by what all pixels hold together (Hu et al. 2018)."""
    from keras import layers

    count = x.shape[-1]
    weight = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_squeeze")(x)
    weight = layers.Conv2D(_multiple_of_8(count / 4), 1, activation="relu", name=f"{name}_reduce")(weight)
    weight = layers.Conv2D(count, 1, activation="hard_sigmoid", name=f"{name}_excite")(weight)
    return layers.Multiply(name=f"{name}_scale")([x, weight])


def _multiple_of_8(count: float) -> int:
    """The nearest multiple of 8, at least 8 and not below nine tenths of `count`."""
    rounded = max(8, int(count + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * count else rounded
