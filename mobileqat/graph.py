"""Reads Keras models into a flat, ordered list of nodes, and nothing else does.

Nested models are inlined and their names kept as paths ("backbone/conv1"); a layer called twice gives two nodes that
hold the same layer.  Every node has one output, named by the node's path, so a graph is nodes plus names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import keras

from mobileqat.errors import ModelError


@dataclass(frozen=True)
class Node:
    """One call of one layer or Keras operator; `path` also names its output tensor.

    `sources` are the variables of the caller's model that `layer.weights` were copied from, in order: empty for
    nodes read from a model, filled by lowering.
    """

    path: str
    layer: keras.layers.Layer
    inputs: tuple[str, ...]
    sources: tuple[keras.Variable, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, and the names of the tensors that enter and leave.

    `problems` are what reading found that cannot be quantized; lowering reports them together with its own.
    `read_paths` of a lowered graph are the paths in the caller's model, which patterns may name as well.
    """

    name: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, keras.KerasTensor]
    problems: tuple[str, ...] = ()
    read_paths: tuple[str, ...] = ()

    def consumers(self, tensor: str) -> list[Node]:
        return [node for node in self.nodes if tensor in node.inputs]


def read(model: keras.Model) -> Graph:
    """Reads a functional or sequential model.

    Raises:
        ModelError: the model is not built, is not a graph of layers, or has an input without a fixed shape.
    """
    functional = _functional(model)
    reader = _Reader()
    inputs = []
    for tensor in functional.inputs:
        name = tensor._keras_history.operation.name
        if any(size is None for size in tensor.shape[1:]):
            raise ModelError(
                f"Input '{name}' of model '{model.name}' has shape {tuple(tensor.shape)}. Expected every size but "
                "the batch to be fixed: integer kernels are planned for one shape. Rebuild the model with "
                "keras.Input(shape=...)."
            )
        inputs.append(reader.add_input(name, tensor))
    outputs = reader.inline(functional, "", inputs)
    return Graph(model.name, tuple(inputs), tuple(reader.nodes), tuple(outputs), reader.tensors, tuple(reader.problems))


def _functional(model):
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ModelError(
                f"Sequential model '{model.name}' is not built, so its shapes are unknown. Give it a keras.Input "
                "first, or call it once on data."
            )
        return model._functional
    if isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth"):
        return model
    raise ModelError(
        f"Expected a functional or sequential Keras 3 model. Received: {type(model).__module__}."
        f"{type(model).__name__}. A subclassed model has no graph to plan on; rebuild it with keras.Input and "
        "keras.Model(inputs, outputs). A tf_keras (Keras 2) model must be loaded with Keras 3."
    )


def output_structure(model: keras.Model):
    """The nest (tensor, list, dict) in which a model returns its outputs; flat order is the graph's."""
    return _functional(model)._outputs_struct


def _operations(functional) -> Iterator:
    """Keras nodes of a functional model, producers before consumers."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        yield from functional._nodes_by_depth[depth]


class _Reader:
    def __init__(self):
        self.nodes: list[Node] = []
        self.tensors: dict[str, keras.KerasTensor] = {}
        self.problems: list[str] = []

    def add_input(self, name, tensor):
        self.tensors[name] = tensor
        return name

    def inline(self, functional, prefix: str, inputs: list[str]) -> list[str]:
        names = {id(tensor): name for tensor, name in zip(functional.inputs, inputs, strict=True)}
        for keras_node in _operations(functional):
            operation = keras_node.operation
            if isinstance(operation, keras.layers.InputLayer):
                continue
            arguments = [names[id(tensor)] for tensor in keras_node.input_tensors]
            outputs = self._call(operation, prefix + operation.name, arguments, keras_node.output_tensors)
            names.update((id(tensor), name) for tensor, name in zip(keras_node.output_tensors, outputs, strict=True))
        return [names[id(tensor)] for tensor in functional.outputs]

    def _call(self, operation, path: str, arguments: list[str], results) -> list[str]:
        if isinstance(operation, keras.Sequential) or hasattr(operation, "_nodes_by_depth"):
            return self.inline(_functional(operation), path + "/", arguments)
        path = self._unique(path)
        self.nodes.append(Node(path, operation, tuple(arguments)))
        names = [path, *(f"{path}#{index}" for index in range(1, len(results)))]
        self.tensors.update(zip(names, results, strict=True))
        if len(results) > 1:
            self.problems.append(f"{path} ({type(operation).__name__}): a layer with {len(results)} outputs")
        return names

    def _unique(self, path: str) -> str:
        if path not in self.tensors:
            return path
        return next(f"{path}@{k}" for k in range(2, 1 << 20) if f"{path}@{k}" not in self.tensors)
