"""How matrix products, convolutions and operators on images become runtime operators: one row each in `PRODUCTS`."""

from __future__ import annotations

import math
import string
from collections.abc import Callable

import keras

from mobileqat.graph import Node, Refused, Source
from mobileqat.lower_shapes import transpose
from mobileqat.lowerer import Lowerer, Rewrite, Value, initializer


def matmul(low: Lowerer, path: str, a, b, adj_y: bool = False) -> str:
    if isinstance(b, Value) and b.array.ndim == 2 and not isinstance(a, Value):
        if adj_y:
            raise Refused("a product with a transposed weight; transpose it when the layer is built")
        return low.dense(path, a, b, b.array.shape[1])
    if isinstance(a, Value) or isinstance(b, Value):
        raise Refused("a product with a constant that is not a matrix [inputs, units] on the right")
    if low.rank(a) != low.rank(b):
        raise Refused(f"a product of tensors of rank {low.rank(a)} and {low.rank(b)}; reshape them to one rank")
    if low.rank(a) < 3:
        raise Refused("a product over the batch axis")
    return low.op(path, "BATCH_MATMUL", a, b, adj_x=False, adj_y=adj_y)


def _matmul(low: Lowerer, node: Node) -> str:
    a, b = low.arguments(node, 2)
    return matmul(low, node.path, a, b)


def _einsum(low: Lowerer, node: Node) -> str:
    return einsum(low, node.path, node.layer.subscripts, *(low.value(v) for v in node.arguments[0]))


def einsum(low: Lowerer, path: str, equation: str, *operands) -> str:
    """A sum of products of a tensor and a weight, or of two tensors, as a matrix product between transpositions."""
    if len(operands) != 2 or "->" not in equation:
        raise Refused(f"einsum {equation!r} of {len(operands)} operands; expected two, and an explicit result")
    (first, second), result = (
        equation.replace(" ", "").split("->")[0].split(","),
        equation.replace(" ", "").split("->")[1],
    )
    if "..." in equation:
        first, second, result = _without_ellipsis(low, equation, first, second, result, operands)
    if isinstance(operands[0], Value):
        first, second, operands = second, first, operands[::-1]
    if any(len(set(labels)) != len(labels) for labels in (first, second, result)):
        raise Refused(f"einsum {equation!r}: a letter twice in one operand")
    if set(first + second) - set(result) - (set(first) & set(second)):
        raise Refused(f"einsum {equation!r}: it sums over a letter of one operand")
    tensor, other = operands
    if isinstance(tensor, Value):
        raise Refused("einsum of constants")
    if not first or result[:1] != first[0]:
        raise Refused(f"einsum {equation!r}: the batch axis has to stay first")
    if isinstance(other, Value):
        return _einsum_weight(low, path, first, second, result, tensor, other)
    return _einsum_tensors(low, path, first, second, result, tensor, other)


def _without_ellipsis(low, equation, first, second, result, operands):
    """Letters for '...', which one operand may have: the tensor."""
    letters = iter(sorted(set(string.ascii_uppercase) - set(equation)))
    tensor = operands[1] if isinstance(operands[0], Value) else operands[0]
    labels = second if isinstance(operands[0], Value) else first
    extra = "".join(next(letters) for _ in range(low.rank(tensor) - len(labels.replace("...", ""))))
    return tuple(text.replace("...", extra) for text in (first, second, result))


def _einsum_weight(low, path, first: str, second: str, result: str, tensor: str, weight: Value) -> str:
    summed = [label for label in first if label in second and label not in result]
    batched = [label for label in first if label in second and label in result]
    if batched:
        raise Refused(f"einsum with a weight that shares the letter {batched[0]!r} with the result")
    sizes = dict(zip(first[1:], low.shape(tensor), strict=True)) | dict(zip(second, weight.array.shape, strict=True))
    kept, units = [label for label in first if label not in summed], [label for label in second if label not in summed]
    moved = transpose(low, f"{path}/transpose", tensor, [first.index(label) for label in kept + summed])
    inputs = math.prod(sizes[label] for label in summed)
    flat = low.view(f"{path}/flat", moved, (*(sizes[label] for label in kept[1:]), inputs))
    order = tuple(second.index(label) for label in summed + units)
    matrix = weight.array.transpose(order).reshape(inputs, -1)
    source = weight.source and _permuted(weight.source, order)
    product = low.dense(f"{path}/dense", flat, Value(matrix, source, weight.name), matrix.shape[1])
    labels = kept + units
    shaped = low.view(f"{path}/shaped", product, [sizes[label] for label in labels[1:]])
    return transpose(low, path, shaped, [labels.index(label) for label in result])


def _permuted(source: Source, order: tuple[int, ...]) -> Source:
    return source if order == tuple(range(len(order))) else Source(source.variable, source.index, order)


def _einsum_tensors(low, path, first: str, second: str, result: str, a: str, b: str) -> str:
    """Batch letters in both and in the result, summed letters in both alone, the rest in one."""
    if second[:1] != first[0]:
        raise Refused(f"einsum {first},{second}->{result}: the batch axis has to be first in both")
    sizes = dict(zip(first[1:], low.shape(a), strict=True)) | dict(zip(second[1:], low.shape(b), strict=True))
    batch = [label for label in first[1:] if label in second and label in result]
    summed = [label for label in first if label in second and label not in result]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]

    def matrix(name, tensor, labels, parts):
        moved = transpose(
            low, f"{path}/{name}", tensor, [0, *(labels.index(label) for part in parts for label in part)]
        )
        counts = [math.prod(sizes[label] for label in part) for part in parts[1:]]
        return low.view(f"{path}/{name}/matrix", moved, (*(sizes[label] for label in batch), *counts))

    left = matrix("left", a, first, (batch, rows, summed))
    right = matrix("right", b, second, (batch, columns, summed))
    product = low.op(f"{path}/matmul", "BATCH_MATMUL", left, right, adj_x=False, adj_y=True)
    labels = [first[0], *batch, *rows, *columns]
    shaped = low.view(f"{path}/shaped", product, [sizes[label] for label in labels[1:]])
    return transpose(low, path, shaped, [labels.index(label) for label in result])


# ------------------------------------------------------------------ convolutions, pooling, images


def _pair(value) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _require_images(low: Lowerer, node: Node, tensor: str) -> None:
    if low.rank(tensor) != 4 or getattr(node.layer, "data_format", None) not in (None, "channels_last"):
        raise Refused("only images [batch, height, width, channels], channels last, have a rule here; use the layer")


def _convolution(make: Callable[..., keras.layers.Layer], role: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        tensor, kernel = low.arguments(node, 2)
        if isinstance(tensor, Value) or not isinstance(kernel, Value):
            raise Refused("a convolution with a kernel that the model computes")
        _require_images(low, node, tensor)
        settings = {
            "strides": _pair(node.layer.strides),
            "padding": node.layer.padding,
            "dilation_rate": _pair(node.layer.dilation_rate),
            "use_bias": False,
            "trainable": kernel.source is not None and kernel.source.variable.trainable,
            role: initializer(kernel.array),
        }
        sources = () if kernel.source is None else (kernel.source,)
        channels = low.shape(tensor)[-1]
        return low.emit(node.path, make(kernel.array.shape, channels, settings), tensor, sources=sources)

    return rewrite


def _conv_2d(shape, channels: int, settings: dict) -> keras.layers.Layer:
    return keras.layers.Conv2D(shape[3], shape[:2], groups=channels // shape[2], **settings)


def _depthwise_conv_2d(shape, channels: int, settings: dict) -> keras.layers.Layer:
    return keras.layers.DepthwiseConv2D(shape[:2], depth_multiplier=shape[3], **settings)


def _pool(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        tensor = low.tensor(node.arguments[0][0])
        _require_images(low, node, tensor)
        size = _pair(node.layer.pool_size)
        strides = size if node.layer.strides is None else _pair(node.layer.strides)
        return low.op(node.path, kind, tensor, pool_size=size, strides=strides, padding=node.layer.padding)

    return rewrite


def _resize(low: Lowerer, node: Node) -> str:
    operator, tensor = node.layer, low.tensor(node.arguments[0][0])
    _require_images(low, node, tensor)
    if operator.antialias or operator.crop_to_aspect_ratio or operator.pad_to_aspect_ratio:
        raise Refused("resizing with antialias or a kept aspect ratio")
    return resize(low, node.path, tensor, operator.size, operator.interpolation)


def resize(low: Lowerer, path: str, tensor: str, size, interpolation: str) -> str:
    kinds = {"nearest": "RESIZE_NEAREST_NEIGHBOR", "bilinear": "RESIZE_BILINEAR"}
    if interpolation not in kinds:
        raise Refused(f"interpolation={interpolation!r}; the runtime has nearest and bilinear")
    if tuple(size) == low.shape(tensor)[:2]:
        return tensor
    return low.op(path, kinds[interpolation], tensor, size=tuple(size))


def _rearrange(kind: str) -> Rewrite:
    def rewrite(low: Lowerer, node: Node) -> str:
        tensor = low.tensor(node.arguments[0][0])
        _require_images(low, node, tensor)
        return low.op(node.path, kind, tensor, block_size=node.layer.block_size)

    return rewrite


PRODUCTS: dict[str, Rewrite] = {
    "Matmul": _matmul,
    "Einsum": _einsum,
    "Conv": _convolution(_conv_2d, "kernel_initializer"),
    "DepthwiseConv": _convolution(_depthwise_conv_2d, "depthwise_initializer"),
    "MaxPool": _pool("MAX_POOL_2D"),
    "AveragePool": _pool("AVERAGE_POOL_2D"),
    "Resize": _resize,
    "DepthToSpace": _rearrange("DEPTH_TO_SPACE"),
    "SpaceToDepth": _rearrange("SPACE_TO_DEPTH"),
}
