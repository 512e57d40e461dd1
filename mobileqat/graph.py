"""Reads Keras models into a flat, ordered list of nodes, and nothing else does.

Nested models are inlined and their names kept as paths ("backbone/conv1"); a layer called twice gives two nodes that
hold the same layer; Keras operators (`x * 2`) are nodes like layers.  A layer that is not understood as a whole is
opened: its computation, run on symbolic tensors, is a graph that is inlined in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobileqat.errors import ModelError

# Given a layer, the function that computes the same on symbolic tensors, or None to keep the layer as one node.
Expand = Callable[[Any], "Callable | None"]


class Refused(Exception):
    """A layer, or a setting of it, that the integer runtime cannot execute; the message says why and what to do."""


@dataclass(frozen=True)
class Ref:
    """A tensor among a node's arguments, by name."""

    name: str


@dataclass(frozen=True)
class Source:
    """Where the values of a lowered weight come from: a variable, or a part of one in another layout.

    The part `variable[index]` is transposed by `permutation`; the lowered weight holds its elements in that order, in
    whatever shape it has.
    """

    variable: keras.Variable
    index: int | tuple[slice, ...] | None = None
    permutation: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple:
        """Equal for sources that give the same values."""
        return id(self.variable), repr(self.index), self.permutation

    def value(self) -> np.ndarray:
        """The values now, in the lowered layout."""
        return self._view(keras.ops.convert_to_numpy(self.variable))

    def assign(self, value) -> None:
        """Writes values of the lowered weight, of any shape with as many elements, back to the variable."""
        array = keras.ops.convert_to_numpy(self.variable).copy()
        view = self._view(array)
        view[...] = np.reshape(value, view.shape)
        self.variable.assign(array)

    def _view(self, array: np.ndarray) -> np.ndarray:
        part = array if self.index is None else array[self.index]
        return part if self.permutation is None else part.transpose(self.permutation)


@dataclass(frozen=True)
class Weight:
    """A weight, or its first rows, among a node's arguments: the layer's code has reshaped or cut it before use."""

    variable: keras.Variable
    shape: tuple[int, ...]
    index: tuple[slice, ...] | None = None


@dataclass(frozen=True)
class Node:
    """One call of one layer or Keras operator; `path` also names its (first) output tensor.

    `arguments` are those of the call, `(args, kwargs)`, with a `Ref` for each tensor.  `sources` say where the weights
    of a lowered layer come from, in the order of `layer.weights`.  `prologue` is a `(scale, offset)` per input channel
    that a lowered layer with a kernel applies to its input: preprocessing that its weights absorb.
    """

    path: str
    layer: keras.layers.Layer
    inputs: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    arguments: tuple[tuple, dict] = ((), {})
    outputs: tuple[str, ...] = ()
    prologue: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, and the names of the tensors that enter and leave.

    `problems` are what reading found that cannot be quantized; lowering reports them together with its own.
    `read_paths` of a lowered graph are the paths in the caller's model, which patterns may name as well.
    `is_resizable`: the model leaves sizes open, so that what holds at the given ones may not hold at others.
    """

    name: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, keras.KerasTensor]
    problems: tuple[str, ...] = ()
    read_paths: tuple[str, ...] = ()
    is_resizable: bool = False

    def consumers(self, tensor: str) -> list[Node]:
        return [node for node in self.nodes if tensor in node.inputs]


def read(model: keras.Model, expand: Expand = lambda layer: None, input_shape=None) -> Graph:
    """Reads a Keras 3 model.

    Args:
        model: functional or sequential and built, or subclassed; it is left untouched.
        expand: for a layer to be opened, the function to run on symbolic tensors; None keeps it as a node.
        input_shape: shape of the inputs without the batch, for a model that leaves sizes open; for several inputs a
            list, or a dict by name.

    Raises:
        ModelError: the model is not built, is not a graph of layers, or has an input without a fixed shape.
    """
    root = _functional(model, input_shape)
    reader = _Reader(expand)
    inputs = []
    for tensor in root.inputs:
        name = tensor._keras_history.operation.name
        if any(size is None for size in tensor.shape[1:]):
            raise ModelError(
                f"Input '{name}' of model '{model.name}' has shape {tuple(tensor.shape)}. Expected every size but the "
                "batch to be fixed: integer kernels are planned for one shape. Give quantize_model the shape to plan "
                "for, such as input_shape=(224, 224, 3), or rebuild the model with keras.Input(shape=...)."
            )
        inputs.append(reader.add_input(name, tensor))
    outputs = reader.inline(root, "", inputs, None if _is_graph(model) else model)
    return Graph(
        model.name,
        tuple(inputs),
        tuple(reader.nodes),
        tuple(outputs),
        reader.tensors,
        tuple(reader.problems),
        is_resizable=input_shape is not None,
    )


def _is_graph(layer) -> bool:
    return isinstance(layer, keras.Sequential) or hasattr(layer, "_nodes_by_depth")


def _functional(model, input_shape=None):
    """The model as a graph of operations on fixed inputs: a functional model, or a `keras.Function`."""
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ModelError(
                f"Sequential model '{model.name}' is not built, so its shapes are unknown. Give it a keras.Input "
                "first, or call it once on data."
            )
        model = model._functional
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"Expected a Keras 3 model. Received: {type(model).__module__}.{type(model).__name__}. A tf_keras (Keras "
            "2) model goes through `mobileqat import-keras2` first, or through the recipe key `engine: tfmot`."
        )
    if not _is_graph(model):
        return _trace(model, _placeholders(model, input_shape))
    return model if input_shape is None else _trace(model, _resized(model, input_shape))


def _trace(model, inputs) -> keras.Function:
    """The graph of a model's own computation on these inputs."""
    try:
        return keras.Function(inputs, model.call(inputs, **_inference(model)))
    except Exception as error:  # whatever the user's code raises
        raise ModelError(
            f"Model '{model.name}' ({type(model).__name__}) cannot be traced on symbolic inputs: {brief(error)}. Its "
            "call may use Keras layers and keras.ops, no other functions on tensors and no branches on their values. "
            "Change it, or rebuild the model with keras.Input and keras.Model(inputs, outputs)."
        ) from error


def _inference(layer) -> dict[str, bool]:
    return {"training": False} if getattr(layer, "_call_has_training_arg", False) else {}


def brief(error: Exception) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + " ..."


def _placeholders(model, input_shape):
    """Inputs for a subclassed model, of the given shape or of the one it was built for."""
    if input_shape is not None:
        shapes = keras.tree.map_shape_structure(lambda shape: (None, *shape), input_shape)
    else:
        built = getattr(model, "_build_shapes_dict", None) or {}
        if not built:
            raise ModelError(
                f"The subclassed model '{model.name}' has never been called, so the shapes of its inputs are unknown. "
                "Call it once on data, or give quantize_model input_shape=(...)."
            )
        shapes = next(iter(built.values())) if len(built) == 1 else dict(built)
    if isinstance(shapes, dict):
        return {name: keras.Input(shape[1:], name=name) for name, shape in shapes.items()}
    count = iter(range(1, 1 << 20))
    return keras.tree.map_shape_structure(
        lambda shape: keras.Input(shape[1:], name="input" if (k := next(count)) == 1 else f"input_{k}"), shapes
    )


def _resized(model, input_shape):
    """Inputs like a functional model's, with the sizes it leaves open filled in."""
    tensors = {tensor._keras_history.operation.name: tensor for tensor in model.inputs}
    if isinstance(input_shape, dict):
        shapes = dict(input_shape)
    elif input_shape and isinstance(input_shape[0], (list, tuple)):
        shapes = dict(zip(tensors, input_shape, strict=False))
    else:
        shapes = dict.fromkeys(tensors, input_shape)
    fresh = {}
    for name, tensor in tensors.items():
        shape = tuple(shapes.get(name, ()))
        fits = len(shape) == len(tensor.shape) - 1
        if not fits or any(old not in (None, new) for new, old in zip(shape, tensor.shape[1:], strict=True)):
            raise ModelError(f"input_shape={input_shape!r} does not fit input '{name}' of shape {tuple(tensor.shape)}.")
        fresh[name] = keras.Input(shape, name=name, dtype=tensor.dtype)
    return keras.tree.pack_sequence_as(model._inputs_struct, list(fresh.values()))


def structures(model: keras.Model, input_shape=None) -> tuple[Any, Any]:
    """The nests (tensor, list, dict) of a model's inputs and outputs; flat order is the graph's."""
    root = _functional(model, input_shape)
    return root._inputs_struct, root._outputs_struct


def _operations(root) -> Iterator:
    """Keras nodes of a functional model, producers before consumers."""
    for depth in sorted(root._nodes_by_depth, reverse=True):
        yield from root._nodes_by_depth[depth]


def snake_case(name: str) -> str:
    """A class's name as in the names that Keras gives its layers: "Conv2D" gives "conv2d", "MyBlock" "my_block"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()


class _Reader:
    def __init__(self, expand: Expand):
        self.expand = expand
        self.nodes: list[Node] = []
        self.tensors: dict[str, keras.KerasTensor] = {}
        self.problems: list[str] = []
        self.is_opened = False  # whether what is read now lies inside an opened layer

    def add_input(self, name, tensor):
        self.tensors[name] = tensor
        return name

    def inline(self, root, prefix: str, inputs: Sequence[str], owner=None) -> list[str]:
        """Appends the nodes of a graph; what an opened layer (`owner`) computes gets names that do not change."""
        names = {id(tensor): name for tensor, name in zip(root.inputs, inputs, strict=True)}
        own_names = _attribute_names(owner) if owner is not None else {}
        is_opened, self.is_opened = self.is_opened, self.is_opened or owner is not None
        for keras_node in _operations(root):
            operation = keras_node.operation
            if isinstance(operation, keras.layers.InputLayer):
                continue
            path = prefix + (own_names.get(id(operation)) or self._stable_name(operation))
            outputs = self._call(operation, path, keras_node, names)
            names.update((id(tensor), name) for tensor, name in zip(keras_node.output_tensors, outputs, strict=True))
        self.is_opened = is_opened
        return [names[id(tensor)] for tensor in root.outputs]

    def _stable_name(self, operation) -> str:
        """A layer's name, but for those that Keras numbers by counters which a saved model may not bring back.

        These are operators, and what an opened layer makes itself: its configuration does not hold their names.
        """
        class_name = snake_case(type(operation).__name__)
        if not hasattr(operation, "weights"):
            return class_name
        is_automatic = re.fullmatch(rf"{class_name}(_\d+)?", operation.name)
        return class_name if self.is_opened and is_automatic else operation.name

    def _call(self, operation, path: str, keras_node, names) -> list[str]:
        inputs = [names[id(tensor)] for tensor in keras_node.input_tensors]
        if _is_graph(operation):
            return self.inline(_functional(operation), path + "/", inputs)
        function = self.expand(operation)
        if function is not None:
            return self._open(operation, function, path, keras_node, inputs)
        return self._append(operation, path, keras_node, names, inputs)

    def _append(self, operation, path: str, keras_node, names, inputs) -> list[str]:
        path = self._unique(path)

        def reference(value):
            return Ref(names[id(value)]) if isinstance(value, keras.KerasTensor) else value

        arguments = keras.tree.map_structure(reference, (keras_node.arguments.args, keras_node.arguments.kwargs))
        outputs = [path, *(f"{path}#{index}" for index in range(1, len(keras_node.output_tensors)))]
        self.nodes.append(Node(path, operation, tuple(inputs), arguments=arguments, outputs=tuple(outputs)))
        self.tensors.update(zip(outputs, keras_node.output_tensors, strict=True))
        return outputs

    def _open(self, operation, function, path: str, keras_node, inputs) -> list[str]:
        """Inlines what a layer computes, on inputs of its own so that the caller's graph does not grow.

        Their batch is 1, so that code which asks for the batch's size gets a number.
        """
        fresh = [keras.Input(batch_shape=(1, *t.shape[1:]), dtype=t.dtype) for t in keras_node.input_tensors]
        by_id = {id(tensor): new for tensor, new in zip(keras_node.input_tensors, fresh, strict=True)}
        args, kwargs = keras.tree.map_structure(
            lambda value: by_id.get(id(value), value), (keras_node.arguments.args, keras_node.arguments.kwargs)
        )
        first = len(self.nodes)
        try:
            with _tensors_first(), tf.GradientTape(persistent=True) as tape:
                results = function(*args, **kwargs)
            root = keras.Function(fresh, results)
        except Exception as error:  # whatever the layer's code raises
            self.problems.append(_cannot_open(operation, path, error))
            return self._append(operation, path, keras_node, self._names(keras_node, inputs), inputs)
        outputs = self.inline(root, path + "/", inputs, operation)
        self._find_weights(operation, path, first, tape)
        return outputs

    def _find_weights(self, operation, path: str, first: int, tape: tf.GradientTape) -> None:
        """Puts weights in the place of constants that were computed from them.

        Code such as `ops.reshape(self.token, ...)` computes with a weight before any symbolic tensor comes in, so the
        graph holds its result, a constant.  The tape knows which weight it depends on; if it holds the weight's values
        in their order, in any shape, it stands for the weight.
        """
        for index, node in enumerate(self.nodes[first:], first):
            for value in keras.tree.flatten(node.arguments):
                if not (isinstance(value, tf.Tensor) and value.dtype.is_floating):
                    continue
                weights = [v for v in operation.trainable_variables if tape.gradient(value, v.value) is not None]
                weight = _as_weight(value, weights[0]) if len(weights) == 1 else None
                if weight is not None:
                    self.nodes[index] = _with_weight(self.nodes[index], value, weight)
                elif weights:
                    self.problems.append(
                        f"{path} ({type(operation).__name__}): it computes with its weights "
                        f"{', '.join(v.name for v in weights)} before they meet the inputs, which cannot be traced. "
                        "Describe the layer with mobileqat.register_rule"
                    )

    @staticmethod
    def _names(keras_node, inputs) -> dict[int, str]:
        return {id(tensor): name for tensor, name in zip(keras_node.input_tensors, inputs, strict=True)}

    def _unique(self, path: str) -> str:
        if path not in self.tensors:
            return path
        return next(f"{path}@{k}" for k in range(2, 1 << 20) if f"{path}@{k}" not in self.tensors)


_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "matmul")


@contextmanager
def _tensors_first() -> Iterator[None]:
    """While a layer is opened, leaves `self.scale * x` to the symbolic tensor x: a variable would call TensorFlow."""

    def yielding(method):
        return lambda variable, other: (
            NotImplemented if isinstance(other, keras.KerasTensor) else method(variable, other)
        )

    methods = {f"__{name}__": getattr(keras.Variable, f"__{name}__") for name in _OPERATORS}
    for name, method in methods.items():
        setattr(keras.Variable, name, yielding(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(keras.Variable, name, method)


def _cannot_open(operation, path: str, error: Exception) -> str:
    if isinstance(error, Refused):
        return f"{path} ({type(operation).__name__}): {error}"
    reason = brief(error)
    if "KerasTensor cannot be used as input to a TensorFlow function" in reason:
        reason = "it calls TensorFlow functions; with keras.ops its computation could be read"
    return (
        f"{path} ({type(operation).__name__}): no rule for this layer, and it cannot be opened: {reason}. Describe it "
        "with mobileqat.register_rule, or replace it"
    )


def _as_weight(value, variable) -> Weight | None:
    """A constant as the weight it was computed from, if it holds its values, or its first rows, in their order."""
    values, array = np.asarray(value), np.asarray(variable)
    if np.array_equal(values.ravel(), array.ravel()):
        return Weight(variable, values.shape)
    if values.ndim == array.ndim and np.array_equal(values, array[: len(values)]):
        return Weight(variable, values.shape, (slice(0, len(values)),))
    return None


def _with_weight(node: Node, value, weight: Weight) -> Node:
    return replace(node, arguments=keras.tree.map_structure(lambda v: weight if v is value else v, node.arguments))


def _attribute_names(layer) -> dict[int, str]:
    """Names of the layers inside a layer, by the attributes that hold them: stable where Keras's counters are not."""
    names: dict[int, str] = {}

    def add(name: str, value) -> None:
        if isinstance(value, keras.layers.Layer):
            names.setdefault(id(value), name)
        elif isinstance(value, dict):
            for key, entry in value.items():
                add(f"{name}_{key}", entry)
        elif isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                add(f"{name}_{index}", entry)

    for attribute, value in vars(layer).items():
        if not attribute.startswith("_"):
            add(attribute, value)
    return names
