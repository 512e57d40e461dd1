"""Layers told by what they compute: each a function on symbolic tensors, which `graph` reads in the layer's place.

They are written with `keras.ops`, with primitives, and with the layer's own weights.  `weight` names a part of a
variable, in another layout where the runtime wants one.  A formula for a custom layer is registered by the user:
`mobileqat.register_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from keras import ops

from mobileqat.graph import Refused, Source
from mobileqat.primitives import Constant, Primitive


def weight(x, variable, shape=None, index=None, permutation=None):
    """A variable, or a part of one, as a symbolic tensor; `x` is any tensor of the graph."""
    if shape is None and index is None and permutation is None:
        return variable
    return Constant(source=Source(variable, index, permutation), shape=shape, name=None)(x)


def _inverse_root(x, epsilon: float):
    return Primitive("RSQRT", epsilon=float(epsilon))(x)


def _refuse_mask(layer, *masks) -> None:
    if any(mask is not None for mask in masks):
        raise Refused("it is called with a mask; the integer graph has no masks")


# ------------------------------------------------------------------ normalization


def layer_normalization(layer, x):
    axes = [axis % len(x.shape) for axis in _as_list(layer.axis)]
    centred = x - ops.mean(x, axes, keepdims=True)
    variance = ops.mean(ops.square(centred), axes, keepdims=True)
    result = centred * _inverse_root(variance, layer.epsilon)
    if getattr(layer, "rms_scaling", False):
        result = x * _inverse_root(variance, layer.epsilon)
        return result * layer.gamma if layer.gamma is not None else result
    if layer.scale:
        result = result * _spread(x, layer.gamma, axes)
    return result + _spread(x, layer.beta, axes) if layer.center else result


def _spread(x, variable, axes: Sequence[int]):
    """A weight over some axes, with ones for the others: as it is when they are the last axes."""
    if axes == list(range(len(x.shape) - len(axes), len(x.shape))):
        return variable
    return weight(x, variable, [size if axis in axes else 1 for axis, size in enumerate(x.shape)])


def _as_list(axis) -> list[int]:
    return [axis] if isinstance(axis, int) else list(axis)


def rms_normalization(layer, x):
    axes = _as_list(layer.axis)
    mean_square = ops.mean(ops.square(x), axes, keepdims=True)
    return x * _inverse_root(mean_square, layer.epsilon) * layer.scale


def group_normalization(layer, x):
    if layer.axis % len(x.shape) != len(x.shape) - 1:
        raise Refused(f"GroupNormalization over axis {layer.axis}; expected the last axis")
    *space, channels = x.shape[1:]
    groups = channels if layer.groups == -1 else layer.groups
    grouped = ops.reshape(x, (-1, math.prod(space), groups, channels // groups))
    centred = grouped - ops.mean(grouped, (1, 3), keepdims=True)
    variance = ops.mean(ops.square(centred), (1, 3), keepdims=True)
    result = ops.reshape(centred * _inverse_root(variance, layer.epsilon), (-1, *space, channels))
    result = result * layer.gamma if layer.scale else result
    return result + layer.beta if layer.center else result


def unit_normalization(layer, x):
    axes = _as_list(layer.axis)
    return ops.normalize(x, axes[0], 2) if len(axes) == 1 else _normalize_over(x, axes)


def _normalize_over(x, axes):
    axes = [axis % len(x.shape) for axis in axes]
    if axes != list(range(len(x.shape) - len(axes), len(x.shape))):
        raise Refused(f"UnitNormalization over axes {axes}; expected one axis, or the last ones")
    flat = ops.reshape(x, (-1, *x.shape[1 : axes[0]], math.prod(x.shape[axes[0] :])))
    return ops.reshape(ops.normalize(flat, -1, 2), (-1, *x.shape[1:]))


# ------------------------------------------------------------------ products


def einsum_dense(layer, x):
    equation = layer.equation if "..." not in layer.equation else _fill(layer.equation, x)
    result = ops.einsum(equation, x, layer.kernel)
    if layer.bias is not None:
        result = result + layer.bias
    return layer.activation(result) if layer.activation is not None else result


def _fill(equation: str, x) -> str:
    """An equation with letters for its '...'."""
    first = equation.split(",")[0]
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in equation]
    return equation.replace("...", "".join(letters[: len(x.shape) - len(first.replace("...", ""))]))


def dot(layer, inputs):
    a, b = inputs
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else list(layer.axes)
    axes = [axis % len(x.shape) for axis, x in zip(axes, (a, b), strict=True)]
    if layer.normalize:
        a, b = ops.normalize(a, axes[0], 2), ops.normalize(b, axes[1], 2)
    flat = len(a.shape) == len(b.shape) == 2
    if flat:
        a, b = (ops.expand_dims(x, 1) for x in (a, b))
        axes = [2, 2]
    a = ops.moveaxis(a, axes[0], -1)
    b = ops.moveaxis(b, axes[1], -1)
    shape = (*a.shape[1:-1], *b.shape[1:-1])
    a, b = (ops.reshape(x, (-1, math.prod(x.shape[1:-1]), x.shape[-1])) for x in (a, b))
    product = Primitive("BATCH_MATMUL", adj_x=False, adj_y=True)([a, b])
    return ops.reshape(product, (-1, 1) if flat else (-1, *shape))


# ------------------------------------------------------------------ attention


def _attend(query, key, value, scale: float):
    """softmax(scale * Q K^T) V for [batch, heads, steps, size]; the scale is an option of the runtime's SOFTMAX."""
    scores = Primitive("BATCH_MATMUL", adj_x=False, adj_y=True)([query, key])
    probabilities = Primitive("SOFTMAX", beta=float(scale))(scores)
    return Primitive("BATCH_MATMUL", adj_x=False, adj_y=False)([probabilities, value])


def _project(layer, x, heads: int, size: int):
    """[batch, steps, inputs] to [batch, heads, steps, size] by an EinsumDense of Keras's attention layers."""
    kernel = weight(x, layer.kernel, shape=(layer.kernel.shape[0], heads * size))
    result = ops.matmul(x, kernel)
    if layer.bias is not None:
        result = result + weight(x, layer.bias, shape=(heads * size,))
    return ops.transpose(ops.reshape(result, (-1, x.shape[1], heads, size)), (0, 2, 1, 3))


def _join(layer, x, steps: int, heads: int, size: int):
    """[batch, heads, steps, size] to [batch, steps, outputs]."""
    joined = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, steps, heads * size))
    outputs = layer.kernel.shape[2:]
    if len(outputs) != 1:
        raise Refused(f"attention with output_shape={tuple(outputs)}; expected one axis")
    result = ops.matmul(joined, weight(x, layer.kernel, shape=(heads * size, outputs[0])))
    return result if layer.bias is None else result + layer.bias


def multi_head_attention(layer, query, value, key=None, **options):
    _refuse_options(layer, options)
    _require_sequences(query, value)
    key = value if key is None else key
    heads = layer.num_heads
    q = _project(layer.query_dense, query, heads, layer.key_dim)
    k = _project(layer.key_dense, key, heads, layer.key_dim)
    v = _project(layer.value_dense, value, heads, layer.value_dim)
    context = _attend(q, k, v, 1 / math.sqrt(layer.key_dim))
    return _join(layer.output_dense, context, query.shape[1], heads, layer.value_dim)


def group_query_attention(layer, query, value, key=None, **options):
    _refuse_options(layer, options)
    key = value if key is None else key
    _require_sequences(query, value)
    heads, groups, size = layer.num_query_heads, layer.num_key_value_heads, layer.head_dim
    q = _project(layer._query_dense, query, heads, size)
    k, v = (
        ops.repeat(_project(dense, x, groups, size), heads // groups, axis=1)
        for dense, x in ((layer._key_dense, key), (layer._value_dense, value))
    )
    context = _attend(q, k, v, 1 / math.sqrt(size))
    return _join(layer._output_dense, context, query.shape[1], heads, size)


def _refuse_options(layer, options: dict) -> None:
    given = [name for name, value in options.items() if value not in (None, False) and name != "training"]
    if given:
        raise Refused(f"it is called with {', '.join(given)}; the integer graph has no masks and returns no scores")


def _require_sequences(*tensors) -> None:
    for x in tensors:
        if len(x.shape) != 3:
            raise Refused(f"attention over an input of shape {tuple(x.shape)}; expected [batch, steps, features]")


def attention(layer, inputs, mask=None, **options):
    _refuse_options(layer, options)
    _refuse_mask(layer, *(mask if isinstance(mask, (list, tuple)) else [mask]))
    query, value, *rest = inputs
    key = rest[0] if rest else value
    if layer.score_mode != "dot" or layer.scale is not None:
        raise Refused(f"attention with score_mode={layer.score_mode!r} and a learned scale; expected 'dot' without")
    return _attend(query, key, value, 1.0)


# ------------------------------------------------------------------ recurrence


def _steps(x) -> list:
    """The steps [batch, features] of a sequence."""
    return [x[:, step] for step in range(x.shape[1])]


def _zeros_are_implied(state) -> None:
    if state is not None:
        raise Refused("recurrent layers with an initial state have no rule; start from zero")


def _unroll(layer, x, cell: Callable, initial_state=None, mask=None, **options):
    """Runs a cell `(inputs, states) -> (output, states)` over all steps; states are None before the first."""
    _zeros_are_implied(initial_state)
    _refuse_mask(layer, mask)
    if layer.stateful:
        raise Refused("stateful=True keeps state between calls, which a file without variables cannot")
    steps = _steps(x)
    outputs, states = [], None
    for inputs in reversed(steps) if layer.go_backwards else steps:
        output, states = cell(inputs, states)
        outputs.append(output)
    result = ops.stack(outputs, axis=1) if layer.return_sequences else outputs[-1]
    return [result, *(states or [])] if layer.return_state else result


def simple_rnn(layer, x, **options):
    cell = layer.cell

    def step(inputs, states):
        h = ops.matmul(inputs, cell.kernel)
        h = h + cell.bias if cell.use_bias else h
        h = h if states is None else h + ops.matmul(states[0], cell.recurrent_kernel)
        h = cell.activation(h)
        return h, [h]

    return _unroll(layer, x, step, **options)


def lstm(layer, x, **options):
    cell = layer.cell

    def step(inputs, states):
        z = ops.matmul(inputs, cell.kernel)
        z = z + cell.bias if cell.use_bias else z
        z = z if states is None else z + ops.matmul(states[0], cell.recurrent_kernel)
        in_forget, candidate, out = ops.split(z, [2 * cell.units, 3 * cell.units], axis=-1)
        enter, forget = ops.split(cell.recurrent_activation(in_forget), 2, axis=-1)
        new = enter * cell.activation(candidate)
        carry = new if states is None else forget * states[1] + new
        h = cell.recurrent_activation(out) * cell.activation(carry)
        return h, [h, carry]

    return _unroll(layer, x, step, **options)


def gru(layer, x, **options):
    cell, units = layer.cell, layer.cell.units
    if not cell.reset_after:
        raise Refused("GRU(reset_after=False) has no rule; use reset_after=True, the default")

    def step(inputs, states):
        z = ops.matmul(inputs, cell.kernel)
        z = z + weight(inputs, cell.bias, index=0) if cell.use_bias else z
        gates, candidate = ops.split(z, [2 * units], axis=-1)
        recurrent = None
        if states is not None:
            of_gates, recurrent = ops.split(ops.matmul(states[0], cell.recurrent_kernel), [2 * units], axis=-1)
            gates = gates + of_gates
        if cell.use_bias:
            gates = gates + weight(inputs, cell.bias, (2 * units,), (slice(1, 2), slice(0, 2 * units)))
            bias = Constant(source=Source(cell.bias, (slice(1, 2), slice(2 * units, None))), batched=True)(inputs)
            recurrent = bias if recurrent is None else recurrent + bias
        update, reset = ops.split(cell.recurrent_activation(gates), 2, axis=-1)
        new = cell.activation(candidate if recurrent is None else candidate + reset * recurrent)
        h = new - update * new if states is None else new + update * (states[0] - new)
        return h, [h]

    return _unroll(layer, x, step, **options)


def time_distributed(layer, x, **options):
    """The inner layer on every step."""
    _refuse_mask(layer, options.get("mask"))
    return ops.stack([layer.layer(step) for step in _steps(x)], axis=1)


def bidirectional(layer, x, **options):
    _refuse_mask(layer, options.get("mask"))
    _zeros_are_implied(options.get("initial_state"))
    forward, backward = layer.forward_layer(x), layer.backward_layer(x)
    if layer.return_state:
        raise Refused("Bidirectional(return_state=True) has no rule")
    if layer.return_sequences:
        backward = ops.flip(backward, axis=1)
    merges = {
        "concat": lambda: ops.concatenate([forward, backward], axis=-1),
        "sum": lambda: forward + backward,
        "ave": lambda: (forward + backward) * 0.5,
        "mul": lambda: forward * backward,
        None: lambda: [forward, backward],
    }
    return merges[layer.merge_mode]()


FORMULAS: dict[str, Callable] = {
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "GroupNormalization": group_normalization,
    "UnitNormalization": unit_normalization,
    "EinsumDense": einsum_dense,
    "Dot": dot,
    "MultiHeadAttention": multi_head_attention,
    "GroupedQueryAttention": group_query_attention,
    "Attention": attention,
    "SimpleRNN": simple_rnn,
    "LSTM": lstm,
    "GRU": gru,
    "Bidirectional": bidirectional,
    "TimeDistributed": time_distributed,
}
