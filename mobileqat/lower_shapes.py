"""How Keras operators that move values become runtime operators: one row each in `SHAPES`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mobileqat.graph import Node, Refused
from mobileqat.lowerer import Lowerer, Rewrite, Value


def transpose(low: Lowerer, path: str, tensor: str, permutation: Sequence[int]) -> str:
    if permutation[0] != 0:
        raise Refused(f"the transposition {tuple(permutation)} moves the batch axis")
    if list(permutation) == list(range(len(permutation))):
        return tensor
    shape = low.shape(tensor)
    moved = [axis for axis in permutation if axis and shape[axis - 1] != 1]
    if moved == sorted(moved):  # only axes of size 1 move: nothing changes place
        return low.view(path, tensor, tuple(shape[axis - 1] for axis in permutation[1:]))
    return low.op(path, "TRANSPOSE", tensor, permutation=tuple(permutation))


def _transpose(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    rank = low.rank(tensor)
    axes = node.layer.axes or tuple(reversed(range(rank)))
    return transpose(low, node.path, tensor, [axis % rank for axis in axes])


def _swapaxes(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    permutation = list(range(low.rank(tensor)))
    a, b = node.layer.axis1, node.layer.axis2
    permutation[a], permutation[b] = permutation[b], permutation[a]
    return transpose(low, node.path, tensor, permutation)


def _moveaxis(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    probe = np.empty(tuple(range(2, 2 + low.rank(tensor))), np.int8)
    order = [size - 2 for size in np.moveaxis(probe, node.layer.source, node.layer.destination).shape]
    return transpose(low, node.path, tensor, order)


def _to_result_shape(low: Lowerer, node: Node) -> str:
    """Reshape, squeeze, expand: the shape that Keras computed."""
    tensor = low.tensor(node.arguments[0][0])
    return low.view(node.path, tensor, result_shape(low, node))


def result_shape(low: Lowerer, node: Node, index: int = 0) -> tuple[int, ...]:
    """Shape, without the batch, that Keras gives a node's output; one open size is filled in."""
    shape = low.graph.tensors[node.outputs[index]].shape
    sizes = [-1 if size is None else size for size in shape[1:]]
    batch = low.graph.tensors[low.graph.inputs[0]].shape[0]
    if not shape or shape[0] not in (None, 1, batch):  # 1 in what was opened
        raise Refused(f"its result of shape {tuple(shape)} has lost the batch axis")
    if sizes.count(-1) > 1:
        raise Refused(f"its result has the open shape {tuple(shape)}")
    if -1 in sizes:
        total = math.prod(low.shape(low.alias[node.inputs[0]]))
        sizes[sizes.index(-1)] = total // max(math.prod(size for size in sizes if size != -1), 1)
    return tuple(sizes)


def slices(low: Lowerer, path: str, tensor: str, begin, end, strides=None) -> str:
    """A part of a tensor, all of it an alias."""
    shape = low.shape(tensor)
    strides = tuple(strides or (1,) * len(shape))
    if tuple(begin) == (0,) * len(shape) and tuple(end) == shape and strides == (1,) * len(shape):
        return tensor
    return low.op(path, "STRIDED_SLICE", tensor, begin=tuple(begin), end=tuple(end), strides=strides)


def _get_item(low: Lowerer, node: Node) -> str:
    args, kwargs = node.arguments
    tensor, key = low.tensor(args[0]), args[1] if len(args) > 1 else kwargs["key"]
    key = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    shape = low.shape(tensor)
    if Ellipsis in key:
        place = key.index(Ellipsis)
        given = sum(entry is not None and entry is not Ellipsis for entry in key)
        key = (*key[:place], *(slice(None),) * (len(shape) + 1 - given), *key[place + 1 :])
    if key[0] != slice(None):
        raise Refused(f"the index {key[0]} on the batch axis; expected ':' there")
    sizes = iter(shape)
    begin, end, strides, result = [], [], [], []
    for entry in key[1:]:
        if entry is None:
            result.append(1)
            continue
        if not isinstance(entry, (int, slice, np.integer)):
            raise Refused(f"an index of type {type(entry).__name__}; expected numbers and slices")
        size = next(sizes)
        first, last, step = (
            (int(entry) % size, int(entry) % size + 1, 1) if not isinstance(entry, slice) else (entry.indices(size))
        )
        if step < 0:
            raise Refused("a slice with a negative step; use keras.ops.flip")
        begin.append(first)
        end.append(max(last, first))
        strides.append(step)
        if isinstance(entry, slice):
            result.append(len(range(first, last, step)))
    rest = list(sizes)
    begin, end, strides, result = [*begin, *[0] * len(rest)], [*end, *rest], [*strides, *[1] * len(rest)], result + rest
    if 0 in result:
        raise Refused(f"the slice {key} of {shape} is empty")
    part_shape = [len(range(*bounds)) for bounds in zip(begin, end, strides, strict=True)]
    if part_shape == result:
        return slices(low, node.path, tensor, begin, end, strides)
    return low.view(node.path, slices(low, f"{node.path}/slice", tensor, begin, end, strides), result)


def _split(low: Lowerer, node: Node) -> list[str]:
    tensor = low.tensor(node.arguments[0][0])
    axis = node.layer.axis % low.rank(tensor)
    given = node.layer.indices_or_sections
    size = low.tensors[tensor].shape[axis]
    cuts = list(range(0, size, size // given)) if isinstance(given, int) else [0, *given]
    return split(low, node.path, tensor, axis, cuts, node.outputs)


def split(low: Lowerer, path: str, tensor: str, axis: int, cuts: Sequence[int], names=None) -> list[str]:
    """The parts of a tensor between cuts along an axis."""
    if axis == 0:
        raise Refused("it splits the batch axis")
    shape = low.shape(tensor)
    parts = []
    for index, (first, last) in enumerate(zip(cuts, [*cuts[1:], shape[axis - 1]], strict=True)):
        begin, end = [0] * len(shape), list(shape)
        begin[axis - 1], end[axis - 1] = int(first), int(last)
        parts.append(slices(low, names[index] if names else f"{path}/{index}", tensor, begin, end))
    return parts


def _unstack(low: Lowerer, node: Node) -> list[str]:
    tensor = low.tensor(node.arguments[0][0])
    axis = node.layer.axis % low.rank(tensor)
    size = low.tensors[tensor].shape[axis]
    parts = split(low, f"{node.path}/slice", tensor, axis, range(size))
    shape = [s for index, s in enumerate(low.shape(tensor), 1) if index != axis]
    return [low.view(name, part, shape) for name, part in zip(node.outputs, parts, strict=True)]


def concatenate(low: Lowerer, path: str, tensors: Sequence[str], axis: int) -> str:
    """All inputs share the output's parameters; one whose parameters are fixed is requantized first."""
    axis %= low.rank(tensors[0])
    if axis == 0:
        raise Refused("it concatenates along the batch axis")
    if len(tensors) == 1:
        return tensors[0]
    return low.shared(path, "CONCATENATION", *tensors, axis=axis)


def _tensors(low: Lowerer, path: str, values: Sequence) -> list[str]:
    """Tensors, and constants as tensors of the rank of the others."""
    operands = [low.value(value) for value in values]
    rank = max((low.rank(o) for o in operands if not isinstance(o, Value)), default=0)
    return [low.constant(path, o, rank, batched=True) if isinstance(o, Value) else o for o in operands]


def _concatenate(low: Lowerer, node: Node) -> str:
    return concatenate(low, node.path, _tensors(low, node.path, node.arguments[0][0]), node.layer.axis)


def _stack(low: Lowerer, node: Node) -> str:
    return stack(low, node.path, [low.tensor(value) for value in node.arguments[0][0]], node.layer.axis)


def stack(low: Lowerer, path: str, tensors: Sequence[str], axis: int) -> str:
    rank = low.rank(tensors[0]) + 1
    axis %= rank
    shape = low.shape(tensors[0])
    parts = [
        low.view(f"{path}/{index}", tensor, (*shape[: axis - 1], 1, *shape[axis - 1 :]))
        for index, tensor in enumerate(tensors)
    ]
    return concatenate(low, path, parts, axis)


def _pad(low: Lowerer, node: Node) -> str:
    tensor, operator = low.tensor(node.arguments[0][0]), node.layer
    (first, *paddings), kwargs = [tuple(pair) for pair in operator.pad_width], node.arguments[1]
    value = kwargs.get("constant_values", getattr(operator, "constant_values", None))
    if first != (0, 0):
        raise Refused("it pads the batch axis")
    return pad(low, node.path, tensor, paddings, operator.mode, value or 0)


def pad(low: Lowerer, path: str, tensor: str, paddings, mode: str = "constant", value: float = 0) -> str:
    if not any(map(any, paddings)):
        return tensor
    if mode in ("reflect", "symmetric"):
        return low.op(path, "MIRROR_PAD", tensor, paddings=tuple(paddings), mode=mode)
    if mode != "constant" or value != 0:
        raise Refused(f"padding of mode {mode!r} with {value}; the runtime pads with zeros, or by reflection")
    return low.op(path, "PAD", tensor, paddings=tuple(paddings))


def tile(low: Lowerer, path: str, tensor: str, multiples: Sequence[int]) -> str:
    multiples = tuple(int(count) for count in multiples)
    return tensor if set(multiples) <= {1} else low.op(path, "TILE", tensor, multiples=multiples)


def _tile(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    given = np.atleast_1d(node.layer.repeats)
    repeats = [1] * (low.rank(tensor) - len(given)) + [int(count) for count in given]
    if len(repeats) > low.rank(tensor) or repeats[0] != 1:
        raise Refused(f"repeats={tuple(repeats)} tiles the batch or adds axes")
    return tile(low, node.path, tensor, repeats[1:])


def _repeat(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    if node.layer.axis is None or not np.isscalar(node.layer.repeats):
        raise Refused("repeat without an axis, or with a count for each entry")
    return repeat(low, node.path, tensor, node.layer.axis, int(np.asarray(node.layer.repeats).item()))


def repeat(low: Lowerer, path: str, tensor: str, axis: int, count: int) -> str:
    """Every entry along an axis `count` times in a row."""
    axis %= low.rank(tensor)
    if axis == 0:
        raise Refused("it repeats the batch")
    shape = low.shape(tensor)
    split_axis = low.view(f"{path}/expand", tensor, (*shape[:axis], 1, *shape[axis:]))
    multiples = [1] * (len(shape) + 1)
    multiples[axis] = count
    tiled = tile(low, f"{path}/tile", split_axis, multiples)
    return low.view(path, tiled, (*shape[: axis - 1], shape[axis - 1] * count, *shape[axis:]))


def _broadcast_to(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    shape, target = low.shape(tensor), tuple(node.layer.shape)[1:]
    if len(shape) != len(target):
        raise Refused(f"it broadcasts {shape} to {target}, of another rank")
    return tile(low, node.path, tensor, [new // old for old, new in zip(shape, target, strict=True)])


def _flip(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    axes = node.layer.axis
    if axes is None:
        raise Refused("flip without an axis turns the batch around")
    for axis in [axes] if isinstance(axes, int) else axes:
        size = low.tensors[tensor].shape[axis]
        tensor = take(low, node.path, tensor, range(size - 1, -1, -1), axis)
    return tensor


def take(low: Lowerer, path: str, tensor: str, indices, axis: int) -> str:
    axis %= low.rank(tensor)
    if axis == 0:
        raise Refused("it gathers along the batch axis")
    chosen = np.asarray(indices, np.int32)
    if chosen.ndim != 1:
        raise Refused(f"indices of shape {chosen.shape}; expected a list")
    chosen = np.where(chosen < 0, chosen + low.tensors[tensor].shape[axis], chosen)
    positions = low.constant(path, Value(chosen, name="indices"))
    return low.op(path, "GATHER", tensor, positions, axis=axis)


def _take(low: Lowerer, node: Node) -> str:
    params, indices = low.arguments(node, 2)
    axis = node.layer.axis
    if isinstance(params, Value) and not isinstance(indices, Value):
        return embed(low, node.path, params, indices, axis)
    if isinstance(params, Value) or not isinstance(indices, Value) or axis is None:
        raise Refused("it takes with computed indices, or without an axis; expected constant indices along an axis")
    if indices.array.ndim == 0:
        index = int(indices.array) % low.tensors[params].shape[axis]
        part = split_at(low, f"{node.path}/slice", params, axis % low.rank(params), index)
        return low.view(node.path, part, result_shape(low, node))
    return take(low, node.path, params, indices.array, axis)


def split_at(low: Lowerer, path: str, tensor: str, axis: int, index: int) -> str:
    begin, end = [0] * len(low.shape(tensor)), list(low.shape(tensor))
    begin[axis - 1], end[axis - 1] = index, index + 1
    return slices(low, path, tensor, begin, end)


def embed(low: Lowerer, path: str, table: Value, indices: str, axis: int | None = 0) -> str:
    """Rows of a table of weights by integer tensors."""
    if axis not in (0, None) or table.array.ndim != 2:
        raise Refused(f"a table of shape {table.array.shape} along axis {axis}; expected rows of a matrix")
    if low.tensors[indices].dtype not in ("int32", "int16", "int8", "uint8", "uint16", "int64"):
        raise Refused(
            f"its indices are {low.tensors[indices].dtype}; expected whole numbers: keras.Input(..., dtype='int32')"
        )
    return low.op(path, "GATHER", low.constant(path, table), indices, axis=0)


def _cast(low: Lowerer, node: Node) -> str:
    tensor = low.tensor(node.arguments[0][0])
    integral = [
        low.tensors[tensor].dtype.startswith(("int", "uint")),
        str(node.layer.dtype).startswith(("int", "uint")),
    ]
    if integral[0] != integral[1]:
        raise Refused(f"a cast from {low.tensors[tensor].dtype} to {node.layer.dtype}")
    return tensor


SHAPES: dict[str, Rewrite] = {
    "Transpose": _transpose,
    "Swapaxes": _swapaxes,
    "Moveaxis": _moveaxis,
    "Reshape": _to_result_shape,
    "ExpandDims": _to_result_shape,
    "Squeeze": _to_result_shape,
    "GetItem": _get_item,
    "Split": _split,
    "Unstack": _unstack,
    "Concatenate": _concatenate,
    "Stack": _stack,
    "Pad": _pad,
    "Tile": _tile,
    "Repeat": _repeat,
    "BroadcastTo": _broadcast_to,
    "Flip": _flip,
    "Take": _take,
    "Cast": _cast,
    "ConvertToTensor": lambda low, node: low.inputs(node)[0],
    "Copy": lambda low, node: low.inputs(node)[0],
}
