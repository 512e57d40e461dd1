"""Rewrites a float graph so that every layer is at most one runtime operator, without changing what it computes.

    Conv2D(activation="relu")  ->  Conv2D, RELU               Conv1D  ->  Conv2D on views
    swish                      ->  LOGISTIC, MUL              Add of n ->  n - 1 ADD
    x * 2 + 1                  ->  MUL, ADD with constants    lone BatchNormalization -> 1x1 DepthwiseConv2D with it

The rewrites are tables: `lower_layers.LAYERS` by Keras layer, `lower_operators.OPERATORS` by Keras operator, and
`formulas.FORMULAS` for layers that are told by what they compute.  Other layers are opened.  The result holds new
layers with copies of the weights; each node remembers the variables they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras

from mobileqat.errors import MobileQatError, UnsupportedModelError
from mobileqat.formulas import FORMULAS
from mobileqat.graph import Graph, Node
from mobileqat.lower_int16 import SUBSTITUTES
from mobileqat.lower_layers import LAYERS
from mobileqat.lower_operators import OPERATORS
from mobileqat.lowerer import Lowerer
from mobileqat.rules import class_name, find_rule

REWRITES = LAYERS | OPERATORS
_REGISTERED: dict[type, Callable] = {}


def register_rule(layer_class: type, formula: Callable | None = None) -> Callable:
    """Says what a custom layer computes, so that models with it quantize.

    Without a rule, a custom layer is opened: its `call` runs on symbolic tensors.  A rule is for layers whose `call`
    cannot, because it uses TensorFlow functions or reshapes its weights first.

    Args:
        layer_class: the layer's class, a `keras.layers.Layer`.
        formula: `(layer, *inputs) -> outputs` on symbolic tensors, written with Keras layers without weights, with
            `keras.ops`, and with the layer's own variables and sub-layers. Called at every `quantize_model`.

    Returns:
        The formula, so that this can be a decorator.

    Raises:
        MobileQatError: not a layer class, or not a function.

    Example:
        >>> @mobileqat.register_rule(Scale)
        ... def _(layer, x):
        ...     return x * layer.factor
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise MobileQatError(f"register_rule takes a keras.layers.Layer class. Received: {layer_class!r}")
    if formula is None:
        return lambda function: register_rule(layer_class, function)
    if not callable(formula):
        raise MobileQatError(f"register_rule takes a function (layer, *inputs) -> outputs. Received: {formula!r}")
    _REGISTERED[layer_class] = formula
    return formula


def expand(layer) -> Callable | None:
    """How to open a layer on symbolic tensors; None for what is lowered as a whole, or cannot be."""
    name = class_name(layer)
    if formula := _REGISTERED.get(type(layer)) or FORMULAS.get(name):
        return lambda *args, **kwargs: formula(layer, *args, **_without_training(kwargs))
    if name.startswith("ops.") or name in LAYERS or find_rule(layer):
        return None
    training = {"training": False} if layer._call_has_training_arg else {}
    return lambda *args, **kwargs: layer.call(*args, **_without_training(kwargs) | training)


def _without_training(kwargs: dict) -> dict:
    """Arguments of a call but for `training`, which Keras notes for layers that take none, too."""
    return {name: value for name, value in kwargs.items() if name != "training"}


def lower(graph: Graph, pinned_inputs: tuple[str, ...] = (), activation_bits: int = 8) -> Graph:
    """Lowers every node of a graph.

    Args:
        graph: as read from the caller's model with `expand`; the model is left untouched.
        pinned_inputs: inputs whose range is fixed, so that they cannot share parameters with other tensors.
        activation_bits: 16 expresses operators that the runtime has for 8 bits alone by others, where it can.

    Raises:
        UnsupportedModelError: layers or settings without a rule; all of them are listed with what to do.
    """
    lowerer = Lowerer(graph, REWRITES, pinned_inputs, SUBSTITUTES if activation_bits == 16 else None)
    for node in graph.nodes:
        lowerer.lower(node)
    lowerer.check_weights()
    outputs = tuple(lowerer.leave(name, lowerer.alias[name]) for name in graph.outputs)
    if lowerer.problems:
        raise UnsupportedModelError(_message(graph.name, lowerer.problems))
    nodes = _live(lowerer.nodes, outputs)
    names = {*graph.inputs, *(node.path for node in nodes)}
    return Graph(
        graph.name,
        graph.inputs,
        nodes,
        outputs,
        {name: tensor for name, tensor in lowerer.tensors.items() if name in names},
        read_paths=tuple(node.path for node in graph.nodes),
    )


def _live(nodes: list[Node], outputs: Sequence[str]) -> tuple[Node, ...]:
    """Nodes that some output depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if node.path in needed:
            needed.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def _message(model_name: str, problems: list[str]) -> str:
    """One message for everything in a model that cannot be quantized."""
    count = f"{len(problems)} place{'s' if len(problems) > 1 else ''}"
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return (
        f"Model '{model_name}' cannot be quantized as it is; {count} to change:\n{lines}\n"
        "What is supported: docs/coverage.md. A custom layer is described with mobileqat.register_rule."
    )
