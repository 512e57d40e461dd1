"""Rewrites a float graph so that every layer is at most one runtime operator, without changing what it computes.

    Conv2D(activation="relu")  ->  Conv2D, ReLU               SeparableConv2D  ->  DepthwiseConv2D, Conv2D
    swish                      ->  sigmoid, Multiply          Add of n         ->  n - 1 binary Adds
    Rescaling                  ->  1x1 DepthwiseConv2D        lone BatchNorm.  ->  1x1 DepthwiseConv2D, BatchNorm.

The result holds new layers with copies of the weights; each node remembers the variables they came from.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from mobileqat.errors import UnsupportedModelError
from mobileqat.graph import Graph, Node
from mobileqat.rules import RULES, Output, class_name, find_rule, function_name, rule_key


@keras.saving.register_keras_serializable("mobileqat")
class Requantize(keras.layers.Layer):
    """Changes a tensor's scale and zero point and nothing else: the runtime's int8 to int8 QUANTIZE."""

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("mobileqat")
class Clip(keras.layers.Layer):
    """The smaller of a tensor and a constant: what the runtime needs for a ReLU with a bound other than 6."""

    def __init__(self, maximum: float, **kwargs):
        super().__init__(**kwargs)
        self.maximum = maximum

    def call(self, inputs):
        return keras.ops.minimum(inputs, self.maximum)

    def compute_output_shape(self, input_shape):
        return input_shape


def lower(graph: Graph, pinned_inputs: tuple[str, ...] = ()) -> Graph:
    """Lowers every node of a graph.

    Args:
        graph: as read from the caller's model, which is left untouched.
        pinned_inputs: inputs whose range is fixed, so that they cannot share parameters with other tensors.

    Raises:
        UnsupportedModelError: layers or settings without a rule; all of them are listed with what to do.
    """
    lowerer = _Lowerer(graph, pinned_inputs)
    for node in graph.nodes:
        lowerer.lower(node)
    if lowerer.problems:
        raise UnsupportedModelError(_message(graph.name, lowerer.problems))
    return Graph(
        graph.name,
        graph.inputs,
        tuple(lowerer.nodes),
        tuple(lowerer.alias[name] for name in graph.outputs),
        lowerer.tensors,
        read_paths=tuple(node.path for node in graph.nodes),
    )


def _message(model_name: str, problems: list[str]) -> str:
    """One message for everything in a model that cannot be quantized."""
    count = f"{len(problems)} place{'s' if len(problems) > 1 else ''}"
    lines = "\n".join(f"  - {problem}" for problem in problems)
    keys = (RULES.keys() | _LOWERINGS.keys()) - {"Clip", "Requantize"}
    layers = sorted({key.partition(":")[0] for key in keys if not key.startswith("ops.")})
    activations = sorted(
        {*_ACTIVATIONS, "linear", "silu", *(key[11:] for key in RULES if key.startswith("Activation:"))}
    )
    return (
        f"Model '{model_name}' cannot be quantized as it is; {count} to change:\n{lines}\n"
        f"Supported layers: {', '.join(layers)}. Supported activations: {', '.join(activations)}."
    )


class _Lowerer:
    """Holds the lowered graph while it grows; `alias` maps tensors of the original graph to lowered ones."""

    def __init__(self, graph: Graph, pinned_inputs: tuple[str, ...]):
        self.graph = graph
        self.pinned = set(pinned_inputs)
        self.nodes: list[Node] = []
        self.by_path: dict[str, Node] = {}
        self.problems = list(graph.problems)
        # Inputs, and further outputs of layers that are refused anyway.
        given = graph.tensors.keys() - {node.path for node in graph.nodes}
        self.alias = {name: name for name in given}
        self.tensors = {name: _placeholder(graph.tensors[name]) for name in given}
        self._copies: dict[tuple[int, str], keras.layers.Layer] = {}

    def lower(self, node: Node) -> None:
        inputs = tuple(self.alias[name] for name in node.inputs)
        rewrite = _LOWERINGS.get(class_name(node.layer), _plain if find_rule(node.layer) else _unsupported)
        self.alias[node.path] = rewrite(self, node, inputs)

    def copy(self, layer, role: str = "", make: Callable | None = None, **overrides) -> keras.layers.Layer:
        """The lowered copy of a layer: one per original and role, so that shared layers stay shared."""
        key = (id(layer), role)
        if key not in self._copies:
            config = layer.get_config() | overrides
            self._copies[key] = make(config) if make else type(layer).from_config(config)
        return self._copies[key]

    def emit(self, path: str, layer, inputs: tuple[str, ...], sources=()) -> str:
        """Appends a node, builds its layer and copies its weights; returns the name of its output."""
        shapes = tuple(self.tensors[name].shape for name in inputs)
        rule = find_rule(layer)
        if problem := self._problem(layer, rule, shapes, inputs):
            self.problems.append(f"{path} ({type(layer).__name__}): {problem}")
        tensors = [self.tensors[name] for name in inputs]
        already_built = layer.built and any(node.layer is layer for node in self.nodes)
        self.tensors[path] = layer(tensors[0] if len(tensors) == 1 else tensors)
        if sources and not already_built:
            for variable, source in zip(layer.weights, sources, strict=True):
                variable.assign(source)
        node = Node(path, layer, inputs, tuple(sources))
        self.nodes.append(node)
        self.by_path[path] = node
        return path

    def _problem(self, layer, rule, shapes, inputs) -> str | None:
        if rule is None:
            return f"no rule for {rule_key(layer)}"
        if problem := rule.refuse and rule.refuse(layer, shapes):
            return problem
        if class_name(layer) == "BatchNormalization" and not self.folds_into(inputs[0]):
            return "it follows no convolution or dense layer, on an input that is not rank 4"
        return None

    def folds_into(self, tensor: str) -> bool:
        """Whether a BatchNormalization on this tensor can be folded into the layer that makes it."""
        producer = self.by_path.get(tensor)
        rule = producer and find_rule(producer.layer)
        if not rule or not rule.has_kernel:
            return False
        # A linear activation has vanished: its output is an alias of the tensor, and it reads nothing.
        readers = sum(
            self.alias.get(name) == tensor
            for node in self.graph.nodes
            for name in node.inputs
            if self.alias.get(node.path) != tensor
        )
        leaves = any(tensor == self.alias.get(name) for name in self.graph.outputs)
        return readers <= 1 and not leaves

    def is_fixed(self, tensor: str) -> bool:
        """Whether a tensor's parameters are fixed by a kernel or by a pinned input, through shared operators."""
        while tensor in self.by_path:
            node = self.by_path[tensor]
            rule = find_rule(node.layer)
            if rule is None or rule.output is Output.OWN:
                return False
            if rule.output is Output.FIXED:
                return True
            tensor = node.inputs[0]
        return tensor in self.pinned

    def activation(self, path: str, function, tensor: str) -> str:
        """Appends an activation function as a node of its own."""
        name = function_name(function)
        if name in ("silu", "swish"):
            gate = self.emit(f"{path}/sigmoid", keras.layers.Activation("sigmoid"), (tensor,))
            return self.emit(path, keras.layers.Multiply(), (tensor, gate))
        return self.emit(path, _ACTIVATIONS.get(name, lambda: keras.layers.Activation(function))(), (tensor,))


_ACTIVATIONS: dict[str, Callable[[], keras.layers.Layer]] = {
    "relu": keras.layers.ReLU,
    "relu6": lambda: keras.layers.ReLU(max_value=6.0),
    "leaky_relu": lambda: keras.layers.LeakyReLU(negative_slope=0.2),
    "softmax": keras.layers.Softmax,
}


def _placeholder(tensor: keras.KerasTensor) -> keras.KerasTensor:
    return keras.KerasTensor(tensor.shape, tensor.dtype)


def _is_linear(function) -> bool:
    return function is None or function is keras.activations.linear


def _plain(lowerer: _Lowerer, node: Node, inputs) -> str:
    layer = lowerer.copy(node.layer)
    return lowerer.emit(node.path, layer, inputs, tuple(node.layer.weights))


def _unsupported(lowerer: _Lowerer, node: Node, inputs) -> str:
    """Notes a layer without a rule, unread and uncopied, and goes on: all problems are reported together."""
    key = rule_key(node.layer)
    if key.startswith("ops."):
        what = f"Keras operator {key[4:]} has no rule with these operands; use the matching layer instead"
    else:
        what = f"no rule for {key}"
    lowerer.problems.append(f"{node.path} ({class_name(node.layer)}): {what}")
    lowerer.tensors[node.path] = _placeholder(lowerer.graph.tensors[node.path])
    return node.path


def _with_activation(lowerer: _Lowerer, node: Node, inputs) -> str:
    function = node.layer.activation
    if _is_linear(function):
        return _plain(lowerer, node, inputs)
    layer = lowerer.copy(node.layer, activation="linear")
    tensor = lowerer.emit(node.path, layer, inputs, tuple(node.layer.weights))
    return lowerer.activation(f"{node.path}/{function_name(function)}", function, tensor)


def _separable(lowerer: _Lowerer, node: Node, inputs) -> str:
    layer = node.layer
    shared = {"data_format": layer.data_format, "dtype": layer.dtype_policy, "trainable": layer.trainable}
    depthwise = lowerer.copy(
        layer,
        "depthwise",
        lambda config: keras.layers.DepthwiseConv2D(
            config["kernel_size"],
            config["strides"],
            config["padding"],
            depth_multiplier=config["depth_multiplier"],
            dilation_rate=config["dilation_rate"],
            depthwise_regularizer=config["depthwise_regularizer"],
            depthwise_constraint=config["depthwise_constraint"],
            use_bias=False,
            name=f"{config['name']}_depthwise",
            **shared,
        ),
    )
    pointwise = lowerer.copy(
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
    tensor = lowerer.emit(f"{node.path}/depthwise", depthwise, inputs, (layer.depthwise_kernel,))
    sources = (layer.pointwise_kernel, layer.bias) if layer.use_bias else (layer.pointwise_kernel,)
    if _is_linear(layer.activation):
        return lowerer.emit(node.path, pointwise, (tensor,), sources)
    tensor = lowerer.emit(f"{node.path}/pointwise", pointwise, (tensor,), sources)
    return lowerer.activation(f"{node.path}/{function_name(layer.activation)}", layer.activation, tensor)


def _activation(lowerer: _Lowerer, node: Node, inputs) -> str:
    if _is_linear(node.layer.activation):
        return inputs[0]
    return lowerer.activation(node.path, node.layer.activation, inputs[0])


def _relu(lowerer: _Lowerer, node: Node, inputs) -> str:
    layer = node.layer
    if layer.negative_slope and layer.max_value is None and not layer.threshold:
        return lowerer.emit(node.path, keras.layers.LeakyReLU(negative_slope=float(layer.negative_slope)), inputs)
    if layer.max_value not in (None, 6) and not layer.negative_slope and not layer.threshold:
        tensor = lowerer.emit(f"{node.path}/relu", keras.layers.ReLU(), inputs)
        return lowerer.emit(node.path, Clip(float(layer.max_value)), (tensor,))
    return _plain(lowerer, node, inputs)


def _chain(lowerer: _Lowerer, node: Node, inputs) -> str:
    """A merge of n inputs as binary merges from the left."""
    tensor = inputs[0]
    for index, other in enumerate(inputs[1:], 1):
        last = index == len(inputs) - 1
        layer = type(node.layer)(dtype=node.layer.dtype_policy)
        tensor = lowerer.emit(node.path if last else f"{node.path}/{index}", layer, (tensor, other))
    return tensor


def _binary_operator(lowerer: _Lowerer, node: Node, inputs) -> str:
    """`x + y` and `x * y` of two tensors; with a constant there is no rule yet."""
    if len(inputs) != 2:
        return _unsupported(lowerer, node, inputs)
    layer = keras.layers.Add() if class_name(node.layer) == "ops.Add" else keras.layers.Multiply()
    return lowerer.emit(node.path, layer, inputs)


def _concatenate(lowerer: _Lowerer, node: Node, inputs) -> str:
    """All inputs share the output's parameters; one whose parameters are fixed is requantized first."""
    inputs = tuple(
        lowerer.emit(f"{node.path}/requantize_{index}", Requantize(), (tensor,)) if lowerer.is_fixed(tensor) else tensor
        for index, tensor in enumerate(inputs)
    )
    return lowerer.emit(node.path, lowerer.copy(node.layer), inputs)


def _constant_depthwise(lowerer: _Lowerer, path, layer, tensor, scale, offset) -> str:
    """`x * scale + offset` per channel as a 1x1 depthwise convolution that does not train."""
    channels = lowerer.tensors[tensor].shape[-1]
    new = lowerer.copy(
        layer,
        "scale",
        lambda config: keras.layers.DepthwiseConv2D(
            1,
            use_bias=offset is not None,
            depthwise_initializer=_constant(np.broadcast_to(scale, channels)[:, None]),
            bias_initializer=_constant(np.broadcast_to(0.0 if offset is None else offset, channels)),
            trainable=False,
            name=f"{config['name']}_scale",
        ),
    )
    return lowerer.emit(path, new, (tensor,))


def _constant(values):
    """An initializer that gives these values, broadcast to the variable's shape."""
    return lambda shape, dtype=None: keras.ops.broadcast_to(keras.ops.cast(values, dtype or "float32"), shape)


def _rescaling(lowerer: _Lowerer, node: Node, inputs) -> str:
    rank = len(lowerer.tensors[inputs[0]].shape)
    if rank != 4:
        lowerer.problems.append(
            f"{node.path} (Rescaling): its input has rank {rank}; expected rank 4 [batch, height, width, channels]. "
            "Scale the data before the model instead"
        )
        return inputs[0]
    return _constant_depthwise(lowerer, node.path, node.layer, inputs[0], node.layer.scale, node.layer.offset)


def _batch_normalization(lowerer: _Lowerer, node: Node, inputs) -> str:
    tensor = inputs[0]
    if not lowerer.folds_into(tensor) and len(lowerer.tensors[tensor].shape) == 4:
        tensor = _constant_depthwise(lowerer, f"{node.path}/scale", node.layer, tensor, 1.0, None)
    return _plain(lowerer, node, (tensor,))


_LOWERINGS: dict[str, Callable[[_Lowerer, Node, tuple[str, ...]], str]] = {
    "Conv2D": _with_activation,
    "DepthwiseConv2D": _with_activation,
    "Conv2DTranspose": _with_activation,
    "Dense": _with_activation,
    "SeparableConv2D": _separable,
    "Activation": _activation,
    "ReLU": _relu,
    "Add": _chain,
    "Multiply": _chain,
    "ops.Add": _binary_operator,
    "ops.Multiply": _binary_operator,
    "Concatenate": _concatenate,
    "Rescaling": _rescaling,
    "BatchNormalization": _batch_normalization,
}
