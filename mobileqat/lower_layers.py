"""How Keras layers become runtime operators: one row each in `LAYERS`, and the reason for each that cannot.

One-dimensional layers [batch, steps, channels] are two-dimensional ones on a view of height 1.
"""

from __future__ import annotations

import math

import keras
import numpy as np

from mobileqat.graph import Node, Refused, Source
from mobileqat.lower_operators import activation, add, elu, multiply, relu, softmax
from mobileqat.lower_products import resize
from mobileqat.lower_shapes import concatenate, embed, pad, repeat, transpose
from mobileqat.lowerer import Lowerer, Rewrite, Value, sources_of
from mobileqat.primitives import Primitive


def _require_channels_last(layer) -> None:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise Refused("data_format='channels_first' has no integer kernel; build the model with channels_last")


def _as_image(low: Lowerer, path: str, tensor: str) -> str:
    """A view [1, steps, channels] of [steps, channels]; images as they are."""
    shape = low.shape(tensor)
    return tensor if len(shape) == 3 else low.view(f"{path}/image", tensor, (1, *shape))


def _as_given(low: Lowerer, path: str, result: str, rank: int) -> str:
    """The result of a two-dimensional layer in the rank of its input."""
    shape = low.shape(result)
    return result if rank == 4 else low.view(path, result, shape[1:])


def _two(values, one) -> tuple:
    """Settings per spatial axis of a 1D or 2D layer as those of a 2D layer."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values if len(values) == 2 else (one, *values)


def _name(path: str, rank: int, role: str) -> str:
    return path if rank == 4 else f"{path}/{role}"


# ------------------------------------------------------------------ layers with a kernel


def _settings(layer, **overrides) -> dict:
    """A convolution's configuration as that of the 2D layer."""
    config = layer.get_config()
    for key in ("kernel_size", "strides", "dilation_rate"):
        if key in config:
            config[key] = _two(config[key], 1)
    return config | {"activation": None, "data_format": "channels_last"} | overrides


def _convolve(low: Lowerer, node: Node, kind: type[keras.layers.Layer], **overrides) -> str:
    """A convolution of any kind, its activation as a node of its own."""
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    rank = low.rank(tensor)
    image = _as_image(low, node.path, tensor)
    settings = _settings(layer, **overrides)
    if settings["padding"] == "causal":
        (dilation,), (size,) = layer.dilation_rate, layer.kernel_size
        image = pad(low, f"{node.path}/causal", image, ((0, 0), (dilation * (size - 1), 0), (0, 0)))
        settings["padding"] = "valid"
    elif settings["padding"] == "valid" and rank == 4 and kind is not keras.layers.Conv2DTranspose:
        unpadded = _padded_alike(low, layer, image)
        if unpadded is not None:
            image, settings["padding"] = unpadded, "same"
    new = low.copy(layer, make=lambda _: kind.from_config(settings))
    moves = kind is keras.layers.Conv2DTranspose or (settings["padding"] == "same" and max(settings["kernel_size"]) > 1)
    image, prologue = (image, None) if settings.get("groups", 1) > 1 else low.absorb(image, padded=moves)
    name = _name(node.path, rank, "convolution")
    result = low.emit(name, new, image, sources=sources_of(layer), prologue=prologue)
    return activation(low, _activation_path(node), layer.activation, _as_given(low, node.path, result, rank))


def _padded_alike(low: Lowerer, layer, image: str) -> str | None:
    """The tensor before zero padding that is just what padding="same" means: kernels pad while they read."""
    node = low.by_path.get(image)
    if node is None or not isinstance(node.layer, Primitive) or node.layer.kind != "PAD" or low.graph.is_resizable:
        return None
    if sum(other.layer is layer for other in low.graph.nodes) > 1:  # it may be called on unpadded images, too
        return None
    (before,) = node.inputs
    wanted = [
        _same_padding(size, kernel, stride, dilation)
        for size, kernel, stride, dilation in zip(
            low.shape(before)[:2], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
        )
    ]
    return before if list(node.layer.options["paddings"]) == [*wanted, (0, 0)] else None


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after an axis with padding="same", as TensorFlow and its runtimes count them."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _activation_path(node: Node) -> str:
    function = node.layer.activation
    return f"{node.path}/{getattr(function, '__name__', 'activation')}"


def _convolution(low: Lowerer, node: Node) -> str:
    return _convolve(low, node, keras.layers.Conv2D)


def _depthwise(low: Lowerer, node: Node) -> str:
    layer = node.layer
    if max(layer.dilation_rate) > 1 and max(layer.strides) > 1:
        raise Refused("strides and dilation together have no kernel")
    strides = _two(layer.strides, layer.strides[0])
    if len(set(strides)) > 1:
        raise Refused(f"depthwise strides {tuple(layer.strides)}; Keras on TensorFlow computes equal strides only")
    return _convolve(low, node, keras.layers.DepthwiseConv2D, strides=strides)


def _transposed(low: Lowerer, node: Node) -> str:
    layer = node.layer
    if layer.output_padding is not None and tuple(_two(layer.output_padding, 0)) != (0, 0):
        raise Refused("output_padding is not supported; crop or pad after the layer instead")
    if max(layer.dilation_rate) > 1:
        raise Refused("a dilated transposed convolution has no integer kernel")
    return _convolve(low, node, keras.layers.Conv2DTranspose, output_padding=None)


def _dense(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    new = low.copy(layer, activation="linear")
    tensor, prologue = low.absorb(tensor, padded=False)
    tensor = low.product(node.path, new, tensor, sources=sources_of(layer), prologue=prologue)
    return activation(low, _activation_path(node), layer.activation, tensor)


def _separable(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    rank = low.rank(tensor)
    shared = {"dtype": layer.dtype_policy, "trainable": layer.trainable}
    strides = _two(layer.strides, layer.strides[0])
    image = _as_image(low, node.path, tensor)
    depthwise = low.copy(
        layer,
        "depthwise",
        lambda config: keras.layers.DepthwiseConv2D(
            _two(config["kernel_size"], 1),
            strides,
            layer.padding,
            depth_multiplier=config["depth_multiplier"],
            dilation_rate=_two(config["dilation_rate"], 1),
            depthwise_regularizer=config["depthwise_regularizer"],
            depthwise_constraint=config["depthwise_constraint"],
            use_bias=False,
            name=f"{config['name']}_depthwise",
            **shared,
        ),
    )
    pointwise = low.copy(
        layer,
        "pointwise",
        lambda config: keras.layers.Conv2D(
            config["filters"],
            1,
            kernel_regularizer=config["pointwise_regularizer"],
            kernel_constraint=config["pointwise_constraint"],
            bias_regularizer=config["bias_regularizer"],
            bias_constraint=config["bias_constraint"],
            use_bias=config["use_bias"],
            name=f"{config['name']}_pointwise",
            **shared,
        ),
    )
    sources = [Source(layer.pointwise_kernel), *([Source(layer.bias)] if layer.use_bias else [])]
    tensor = low.emit(f"{node.path}/depthwise", depthwise, image, sources=(Source(layer.depthwise_kernel),))
    is_last = rank == 4 and layer.activation in (None, keras.activations.linear)
    tensor = low.emit(node.path if is_last else f"{node.path}/pointwise", pointwise, tensor, sources=sources)
    return activation(low, _activation_path(node), layer.activation, _as_given(low, node.path, tensor, rank))


def _embedding(low: Lowerer, node: Node) -> str:
    layer, (indices,) = node.layer, low.inputs(node)
    if layer.mask_zero:
        raise Refused(
            "mask_zero=True: the integer graph has no masks; pad with a token that the model learns to ignore"
        )
    return embed(low, node.path, Value(np.asarray(layer.embeddings), Source(layer.embeddings), "embeddings"), indices)


def _batch_normalization(low: Lowerer, node: Node) -> str:
    """Folded into the layer with a kernel before it, else into a 1x1 depthwise convolution made for it."""
    layer, (tensor,) = node.layer, low.inputs(node)
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    shape = low.shape(tensor)
    if axis not in (-1, len(shape)):
        raise Refused(f"BatchNormalization over axis {axis}; only the last axis (channels) can be folded")
    if not low.folds_into(tensor):
        tensor = low.affine(f"{node.path}/scale", tensor, Value(np.ones(shape[-1:])))
    new = low.copy(layer)
    tensor = low.pointwise(node.path, new, tensor, sources=sources_of(layer))
    new.input_spec = None  # shared between tensors of several ranks, it is called on views of one
    return tensor


# ------------------------------------------------------------------ activations


def _activation(low: Lowerer, node: Node) -> str:
    return activation(low, node.path, node.layer.activation, low.inputs(node)[0])


def _relu(low: Lowerer, node: Node) -> str:
    layer = node.layer
    return relu(low, node.path, low.inputs(node)[0], layer.negative_slope, layer.max_value, layer.threshold)


def _leaky_relu(low: Lowerer, node: Node) -> str:
    primitive = Primitive("LEAKY_RELU", alpha=float(node.layer.negative_slope))
    return low.pointwise(node.path, primitive, low.inputs(node)[0])


def _elu(low: Lowerer, node: Node) -> str:
    return elu(low, node.path, low.inputs(node)[0], float(node.layer.alpha))


def _prelu(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    alpha = low.constant(node.path, Value(np.asarray(layer.alpha), Source(layer.alpha), "alpha"), low.rank(tensor))
    return low.op(node.path, "PRELU", tensor, alpha)


def _softmax(low: Lowerer, node: Node) -> str:
    if len(low.inputs(node)) > 1:
        raise Refused("softmax with a mask; the integer graph has no masks")
    axis = node.layer.axis
    return softmax(low, node.path, low.inputs(node)[0], axis if isinstance(axis, int) else tuple(axis))


# ------------------------------------------------------------------ merges


def _chain(kind: str) -> Rewrite:
    """A merge of n inputs as binary merges from the left."""

    def rewrite(low: Lowerer, node: Node) -> str:
        tensor, *others = low.inputs(node)
        for index, other in enumerate(others, 1):
            path = node.path if index == len(others) else f"{node.path}/{index}"
            tensor = low.binary(path, kind, tensor, other)
        return tensor

    return rewrite


def _average(low: Lowerer, node: Node) -> str:
    inputs = low.inputs(node)
    total = inputs[0]
    for index, other in enumerate(inputs[1:], 1):
        total = low.binary(f"{node.path}/add_{index}", "ADD", total, other)
    return multiply(low, node.path, total, Value.of(1 / len(inputs), "share"))


def _concatenate(low: Lowerer, node: Node) -> str:
    return concatenate(low, node.path, low.inputs(node), node.layer.axis)


# ------------------------------------------------------------------ space and shape


def _pool(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        layer, (tensor,) = node.layer, low.inputs(node)
        _require_channels_last(layer)
        rank = low.rank(tensor)
        result = low.op(
            _name(node.path, rank, "pool"),
            kind,
            _as_image(low, node.path, tensor),
            pool_size=_two(layer.pool_size, 1),
            strides=_two(layer.strides, 1),
            padding=layer.padding,
        )
        return _as_given(low, node.path, result, rank)

    return rewrite


def _global(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        layer, (tensor,) = node.layer, low.inputs(node)
        _require_channels_last(layer)
        axes = tuple(range(1, low.rank(tensor) - 1))
        return low.op(node.path, kind, tensor, axes=axes, keepdims=bool(layer.keepdims))

    return rewrite


def _adaptive(kind: str) -> Rewrite:
    """Pooling to a given size, where its windows are all alike."""

    def rewrite(low: Lowerer, node: Node) -> str:
        layer, (tensor,) = node.layer, low.inputs(node)
        _require_channels_last(layer)
        rank = low.rank(tensor)
        image = _as_image(low, node.path, tensor)
        sizes, target = low.shape(image)[:2], _two(layer.output_size, 1)
        if any(size % new for size, new in zip(sizes, target, strict=True)):
            raise Refused(
                f"output_size={tuple(target)} does not divide the input's {sizes}: its windows differ in size"
            )
        window = tuple(size // new for size, new in zip(sizes, target, strict=True))
        name = _name(node.path, rank, "pool")
        return _as_given(
            low, node.path, low.op(name, kind, image, pool_size=window, strides=window, padding="valid"), rank
        )

    return rewrite


def _spatial_pairs(setting) -> list[tuple[int, int]]:
    """Padding or cropping per spatial axis, as Keras keeps it for 1D and 2D layers."""
    if isinstance(setting, int):
        return [(setting, setting)]
    pairs = [setting] if isinstance(setting[0], int) else setting
    return [tuple(pair) for pair in pairs]


def _zero_padding(low: Lowerer, node: Node) -> str:
    _require_channels_last(node.layer)
    return pad(low, node.path, low.inputs(node)[0], [*_spatial_pairs(node.layer.padding), (0, 0)])


def _cropping(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    shape = low.shape(tensor)
    pairs = [*_spatial_pairs(layer.cropping), (0, 0)]
    begin = tuple(first for first, _ in pairs)
    end = tuple(size - last for size, (_, last) in zip(shape, pairs, strict=True))
    return low.op(node.path, "STRIDED_SLICE", tensor, begin=begin, end=end, strides=(1,) * len(shape))


def _reshape(low: Lowerer, node: Node) -> str:
    tensor, target = low.inputs(node)[0], tuple(node.layer.target_shape)
    if -1 in target:
        rest = math.prod(size for size in target if size != -1)
        target = tuple(math.prod(low.shape(tensor)) // rest if size == -1 else size for size in target)
    return low.view(node.path, tensor, target)


def _flatten(low: Lowerer, node: Node) -> str:
    _require_channels_last(node.layer)
    tensor = low.inputs(node)[0]
    return low.view(node.path, tensor, (math.prod(low.shape(tensor)),))


def _permute(low: Lowerer, node: Node) -> str:
    return transpose(low, node.path, low.inputs(node)[0], (0, *node.layer.dims))


def _repeat_vector(low: Lowerer, node: Node) -> str:
    tensor = low.inputs(node)[0]
    row = low.view(f"{node.path}/row", tensor, (1, *low.shape(tensor)))
    return low.op(node.path, "TILE", row, multiples=(node.layer.n, 1))


def _up_sampling_2d(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    height, width, _ = low.shape(tensor)
    size = (height * layer.size[0], width * layer.size[1])
    return resize(low, node.path, tensor, size, layer.interpolation)


def _up_sampling_1d(low: Lowerer, node: Node) -> str:
    return repeat(low, node.path, low.inputs(node)[0], 1, int(node.layer.size))


def _resizing(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    if layer.antialias or layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio:
        raise Refused("resizing with antialias or a kept aspect ratio")
    return resize(low, node.path, tensor, (layer.height, layer.width), layer.interpolation)


def _center_crop(low: Lowerer, node: Node) -> str:
    layer, (tensor,) = node.layer, low.inputs(node)
    _require_channels_last(layer)
    height, width, channels = low.shape(tensor)
    top, left = (height - layer.height) // 2, (width - layer.width) // 2
    if top < 0 or left < 0:
        raise Refused(f"a crop to {layer.height}x{layer.width} of a smaller image; use Resizing")
    end = (top + layer.height, left + layer.width, channels)
    return low.op(node.path, "STRIDED_SLICE", tensor, begin=(top, left, 0), end=end, strides=(1, 1, 1))


# ------------------------------------------------------------------ preprocessing


def _rescaling(low: Lowerer, node: Node) -> str:
    layer, tensor = node.layer, low.inputs(node)[0]
    return _constant_affine(low, node.path, tensor, np.asarray(layer.scale), np.asarray(layer.offset))


def _normalization(low: Lowerer, node: Node) -> str:
    layer, tensor = node.layer, low.inputs(node)[0]
    if layer.mean is None:
        raise Refused("it has no statistics yet; call adapt(), or give it mean and variance")
    mean, variance = (np.asarray(value, np.float64) for value in (layer.mean, layer.variance))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return _constant_affine(low, node.path, tensor, deviation, mean)
    return _constant_affine(low, node.path, tensor, 1 / deviation, -mean / deviation)


def _constant_affine(low: Lowerer, path: str, tensor: str, scale: np.ndarray, offset: np.ndarray) -> str:
    channels = low.shape(tensor)[-1]
    if all(values.size == 1 or values.shape[-1:] == (values.size,) == (channels,) for values in (scale, offset)):
        flat = [np.reshape(values, -1) for values in (scale, offset)]
        bias = Value(flat[1]) if np.any(offset) else None
        return low.affine(path, tensor, Value(flat[0]), bias)
    scaled = multiply(low, f"{path}/multiply", tensor, Value(scale, name="scale"))
    return add(low, path, scaled, Value(offset, name="offset"))


def _noise(low: Lowerer, node: Node) -> str:
    """Noise on every value alone, unless it has a shape."""
    append = low.pointwise if getattr(node.layer, "noise_shape", None) is None else low.emit
    return append(node.path, low.copy(node.layer), *low.inputs(node))


def _spatial_dropout_1d(low: Lowerer, node: Node) -> str:
    """On the image that a chain of 1D layers works on, if there is one."""
    layer, (tensor,) = node.layer, low.inputs(node)
    image = low.base(tensor)
    if low.shape(image) != (1, *low.shape(tensor)):
        return low.emit(node.path, low.copy(layer), tensor)
    new = low.copy(layer, make=lambda config: keras.layers.SpatialDropout2D(layer.rate, name=config["name"]))
    return low.view(node.path, low.emit(f"{node.path}/image", new, image), low.shape(tensor))


def _unchanged(low: Lowerer, node: Node) -> str:
    return low.inputs(node)[0]


LAYERS: dict[str, Rewrite] = {
    "Conv1D": _convolution,
    "Conv2D": _convolution,
    "DepthwiseConv1D": _depthwise,
    "DepthwiseConv2D": _depthwise,
    "Conv1DTranspose": _transposed,
    "Conv2DTranspose": _transposed,
    "SeparableConv1D": _separable,
    "SeparableConv2D": _separable,
    "Dense": _dense,
    "Embedding": _embedding,
    "BatchNormalization": _batch_normalization,
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "PReLU": _prelu,
    "Softmax": _softmax,
    "Add": _chain("ADD"),
    "Subtract": _chain("SUB"),
    "Multiply": _chain("MUL"),
    "Maximum": _chain("MAXIMUM"),
    "Minimum": _chain("MINIMUM"),
    "Average": _average,
    "Concatenate": _concatenate,
    "MaxPooling1D": _pool("MAX_POOL_2D"),
    "MaxPooling2D": _pool("MAX_POOL_2D"),
    "AveragePooling1D": _pool("AVERAGE_POOL_2D"),
    "AveragePooling2D": _pool("AVERAGE_POOL_2D"),
    "GlobalAveragePooling1D": _global("MEAN"),
    "GlobalAveragePooling2D": _global("MEAN"),
    "GlobalMaxPooling1D": _global("REDUCE_MAX"),
    "GlobalMaxPooling2D": _global("REDUCE_MAX"),
    "AdaptiveAveragePooling1D": _adaptive("AVERAGE_POOL_2D"),
    "AdaptiveAveragePooling2D": _adaptive("AVERAGE_POOL_2D"),
    "AdaptiveMaxPooling1D": _adaptive("MAX_POOL_2D"),
    "AdaptiveMaxPooling2D": _adaptive("MAX_POOL_2D"),
    "ZeroPadding1D": _zero_padding,
    "ZeroPadding2D": _zero_padding,
    "Cropping1D": _cropping,
    "Cropping2D": _cropping,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Permute": _permute,
    "RepeatVector": _repeat_vector,
    "UpSampling1D": _up_sampling_1d,
    "UpSampling2D": _up_sampling_2d,
    "Resizing": _resizing,
    "CenterCrop": _center_crop,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "Dropout": _noise,
    "AlphaDropout": _noise,
    "GaussianDropout": _noise,
    "GaussianNoise": _noise,
    "SpatialDropout1D": _spatial_dropout_1d,
    "Identity": _unchanged,
    "ActivityRegularization": _unchanged,
}


# ------------------------------------------------------------------ what the integer runtime cannot run

_THREE_DIMENSIONS = "the runtime's integer kernels have two spatial dimensions; unroll one of them in the model"
_TEXT = "strings and look-ups by hash have no integer operator; do this in the input pipeline"
_MASK = "the integer graph has no masks"
_RANDOM_SIZE = "it changes the image's size at random; do this in the input pipeline"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "Conv3D", "Conv3DTranspose", "MaxPooling3D", "AveragePooling3D", "GlobalMaxPooling3D",
            "GlobalAveragePooling3D", "AdaptiveAveragePooling3D", "AdaptiveMaxPooling3D", "UpSampling3D",
            "ZeroPadding3D", "Cropping3D", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D",
        ),
        _THREE_DIMENSIONS,
    ),
    **dict.fromkeys(
        (
            "StringLookup", "IntegerLookup", "TextVectorization", "Hashing", "HashedCrossing", "Discretization",
            "CategoryEncoding",
        ),
        _TEXT,
    ),
    "Masking": _MASK,
    "RandomCrop": _RANDOM_SIZE,
    "MelSpectrogram": "Fourier transforms have no integer operator; compute the spectrogram before the model",
    "STFTSpectrogram": "Fourier transforms have no integer operator; compute the spectrogram before the model",
    "SpectralNormalization": "it rewrites its kernel while training; quantize the layer inside it",
}  # fmt: skip


def _refuse(reason: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        raise Refused(reason)

    return rewrite


LAYERS |= {name: _refuse(reason) for name, reason in REASONS.items()}
