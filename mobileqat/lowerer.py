"""The machinery of lowering: the graph of runtime operators while it grows.

Reshapes are lazy: a tensor may be a *view* of another one.  What works value by value, or along the last axis alone,
is applied to the viewed tensor, so that a chain of 1D layers becomes 2D operators without a RESHAPE in between, and
fuses as a 2D chain does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from mobileqat.graph import Graph, Node, Ref, Refused, Source, Weight, brief
from mobileqat.primitives import Constant, Primitive
from mobileqat.rules import VANISHING, Output, class_name, find_rule

# Operators that take whole numbers as well as grid values.
MOVES_INDICES = ("RESHAPE", "STRIDED_SLICE", "CONCATENATION", "TRANSPOSE", "TILE", "GATHER", *VANISHING)

# Lowers one node: appends what it becomes and returns the name of its output, or the names if it has several.
Rewrite = Callable[["Lowerer", Node], "str | Sequence[str]"]


@dataclass(frozen=True)
class Value:
    """A constant among a node's arguments."""

    array: np.ndarray
    source: Source | None = None
    name: str = "constant"

    @classmethod
    def of(cls, number: float, name: str = "constant") -> Value:
        return cls(np.asarray(number, np.float32), name=name)


class Lowerer:
    """Holds the lowered graph while it grows; `alias` maps tensors of the original graph to lowered ones."""

    def __init__(
        self,
        graph: Graph,
        rewrites: Mapping[str, Rewrite],
        pinned_inputs: tuple[str, ...],
        substitutes: Mapping[str, Callable] | None = None,
    ):
        self.graph = graph
        self.rewrites = rewrites
        self.substitutes = substitutes or {}
        self.pinned = set(pinned_inputs)
        self.nodes: list[Node] = []
        self.by_path: dict[str, Node] = {}
        self.problems = list(graph.problems)
        self.alias = {name: name for name in graph.inputs}
        indices = _read_as_indices(graph)
        self.tensors = {
            name: keras.KerasTensor((None, *graph.tensors[name].shape[1:]), "int32" if name in indices else "float32")
            for name in graph.inputs
        }
        self.values: dict[str, Value] = {}
        self._bases: dict[str, str] = {}
        self._views: dict[tuple[str, tuple[int, ...]], str] = {}
        self._copies: dict[Any, keras.layers.Layer] = {}
        self._constants: dict[tuple, str] = {}
        self._affines: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        self._without_batch: set[str] = set()
        self._refused = {problem.partition(" (")[0] for problem in self.problems}

    # -------------------------------------------------------------- nodes

    def lower(self, node: Node) -> None:
        try:
            outputs = self._rewrite(node)
        except Exception as error:  # settings that no rewrite foresaw, too, are told with their path
            reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {brief(error)}"
            if not self._follows_refusal(node) and node.path not in self._refused:
                self.problems.append(f"{node.path} ({type(node.layer).__name__}): {reason}")
            outputs = node.outputs
            for name in outputs:
                self.tensors[name] = _placeholder(self.graph.tensors[name])
                if self.tensors[name].shape[:1] not in ((None,), (1,)):
                    self._without_batch.add(name)
        self.alias.update(zip(node.outputs, (outputs,) if isinstance(outputs, str) else outputs, strict=True))

    def _follows_refusal(self, node: Node) -> bool:
        """Whether a node reads what was refused because it loses the batch: what it then makes of that says nothing."""
        return any(self.alias[name] in self._without_batch for name in node.inputs)

    def _rewrite(self, node: Node):
        if isinstance(node.layer, Constant):
            if node.layer.batched:
                return self._batched(node)
            self.values[node.path] = Value(
                np.asarray(node.layer.value), next(iter(node.layer.sources), None), node.path.rpartition("/")[2]
            )
            self.tensors[node.path] = _placeholder(self.graph.tensors[node.path])
            return node.path
        if isinstance(node.layer, Primitive):
            return self.op(node.path, node.layer.kind, *self.inputs(node), **node.layer.options)
        name = class_name(node.layer)
        if rewrite := self.rewrites.get(name):
            return rewrite(self, node)
        if find_rule(node.layer) is None:
            what = f"the Keras operator {name[4:]}" if name.startswith("ops.") else "this layer"
            raise Refused(f"there is no rule for {what}; replace it, or describe the layer it is in with register_rule")
        return self.emit(node.path, self.copy(node.layer), *self.inputs(node), sources=sources_of(node.layer))

    def _batched(self, node: Node) -> str:
        value = Value(np.asarray(node.layer.value), next(iter(node.layer.sources), None))
        return self.constant(node.path, value, batched=True)

    def inputs(self, node: Node) -> tuple[str, ...]:
        """Lowered names of the tensors that a node reads."""
        return tuple(self.alias[name] for name in node.inputs)

    def arguments(self, node: Node, count: int) -> list[str | Value]:
        """The first arguments of a node, lowered."""
        args, kwargs = node.arguments
        return [self.value(argument) for argument in [*args, *kwargs.values()][:count]]

    def value(self, argument) -> str | Value:
        """An argument of a node: the lowered tensor of that name, or a constant."""
        if isinstance(argument, Ref):
            tensor = self.alias[argument.name]
            return self.values.get(tensor, tensor)
        if isinstance(argument, keras.Variable):
            return Value(np.asarray(argument), Source(argument), argument.name)
        if isinstance(argument, Weight):
            source = Source(argument.variable, argument.index)
            return Value(np.reshape(source.value(), argument.shape), source, argument.variable.name)
        array = np.asarray(argument)
        if array.dtype.kind not in "fiub":
            raise Refused(f"it takes {type(argument).__name__} as an operand; expected a tensor or numbers")
        return Value(array)

    def tensor(self, argument) -> str:
        """An argument of a node that has to be a tensor."""
        value = self.value(argument)
        if isinstance(value, Value):
            raise Refused("its operand is a constant; expected a tensor that the model computes")
        return value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape without the batch."""
        shape = tuple(self.tensors[tensor].shape[1:])
        if None in shape:
            raise Refused(f"the shape {shape} of its input is not known when the model is read")
        return shape

    def rank(self, tensor: str) -> int:
        """Rank, the batch included."""
        return len(self.tensors[tensor].shape)

    # -------------------------------------------------------------- building

    def copy(self, layer, key: Any = "", make: Callable | None = None, **overrides) -> keras.layers.Layer:
        """The lowered copy of a layer: one per original and key, so that shared layers stay shared."""
        key = (id(layer), key)
        if key not in self._copies:
            config = layer.get_config() | overrides
            self._copies[key] = make(config) if make else type(layer).from_config(config)
        return self._copies[key]

    def emit(self, path: str, layer, *inputs: str, sources: Sequence[Source] = (), prologue=None) -> str:
        """Appends a node, builds its layer and copies its weights; returns the name of its output.

        A primitive that has a substitute is expressed by others instead.
        """
        if isinstance(layer, Primitive) and layer.kind in self.substitutes:
            result = self.substitutes[layer.kind](self, path, *inputs, **layer.options)
            if result is not None:
                return result
        path = self._unique(path)
        inputs = tuple(self.computed(name) for name in inputs)
        if find_rule(layer) is None:
            raise Refused(f"there is no rule for {type(layer).__name__}")
        self._check_indices(layer, inputs)
        tensors = [self.tensors[name] for name in inputs]
        built_before = any(node.layer is layer for node in self.nodes)
        self.tensors[path] = _placeholder(layer(tensors[0] if len(tensors) == 1 else tensors))
        if sources and not built_before:
            for variable, source in zip(layer.weights, sources, strict=True):
                variable.assign(np.reshape(source.value(), variable.shape))
        node = Node(path, layer, inputs, tuple(sources), outputs=(path,), prologue=prologue)
        self.nodes.append(node)
        self.by_path[path] = node
        return path

    def _check_indices(self, layer, inputs: tuple[str, ...]) -> None:
        kind = layer.kind if isinstance(layer, Primitive) else class_name(layer)
        read = inputs[:1] if kind == "GATHER" else inputs
        integral = [name for name in read if self.tensors[name].dtype.startswith("int")]
        if integral and kind not in MOVES_INDICES:
            raise Refused(
                f"it computes with {integral[0]}, whose whole numbers are indices; give numbers an input of their own"
            )

    def op(self, path: str, kind: str, *inputs: str, **options) -> str:
        """Appends a primitive."""
        return self.emit(path, Primitive(kind, **options), *inputs)

    def _unique(self, path: str) -> str:
        if path not in self.tensors:
            return path
        return next(f"{path}@{k}" for k in range(2, 1 << 20) if f"{path}@{k}" not in self.tensors)

    def constant(self, path: str, value: Value, rank: int | None = None, batched: bool = False) -> str:
        """A constant operand as a tensor, with leading ones up to `rank`; a source gives one tensor per shape."""
        array = value.array
        shape = (1,) * max((rank or 0) - array.ndim, 0) + array.shape
        key = value.source and (value.source.key, shape, batched)
        if key in self._constants:
            return self._constants[key]
        layer = Constant(array, value.source, shape, batched)
        path = self._unique(f"{path}/{value.name}")
        self.tensors[path] = keras.KerasTensor((None, *shape[1:]) if batched else shape, layer.value.dtype)
        sources = () if value.source is None else (value.source,)
        self.nodes.append(Node(path, layer, (), sources, outputs=(path,)))
        self.by_path[path] = self.nodes[-1]
        if key:
            self._constants[key] = path
        return path

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is a constant without a batch."""
        layer = self.by_path[tensor].layer if tensor in self.by_path else None
        return isinstance(layer, Constant) and not layer.batched

    # -------------------------------------------------------------- views

    def view(self, path: str, tensor: str, shape: Sequence[int]) -> str:
        """A tensor in another shape (without the batch); no operator until something needs it in that shape."""
        base = self.base(tensor)
        shape = tuple(shape)
        if math.prod(shape) != math.prod(self.shape(base)):
            raise Refused(f"{self.shape(tensor)} cannot be reshaped to {shape}")
        for name in (tensor, base):
            if self.shape(name) == shape:
                return name
        if (base, shape) not in self._views:
            self._views[base, shape] = path = self._unique(path)
            self._bases[path] = base
            self.tensors[path] = keras.KerasTensor((None, *shape), self.tensors[base].dtype)
        return self._views[base, shape]

    def base(self, tensor: str) -> str:
        """The tensor that a view shows."""
        return self._bases.get(tensor, tensor)

    def computed(self, tensor: str) -> str:
        """A view becomes a RESHAPE when an operator has to have it in its shape."""
        if tensor in self._bases and tensor not in self.by_path:
            layer = Primitive("RESHAPE", shape=self.shape(tensor))
            node = Node(tensor, layer, (self._bases[tensor],), outputs=(tensor,))
            self.nodes.append(node)
            self.by_path[tensor] = node
        return tensor

    def leave(self, name: str, tensor: str) -> str:
        """A tensor as an output of the model."""
        return self.computed(tensor)

    def pointwise(self, path: str, layer, *tensors: str, sources: Sequence[Source] = ()) -> str:
        """Appends what works value by value, or along the last axis alone: on the tensors that views show."""
        bases = [self.base(tensor) for tensor in tensors]
        last = self.shape(tensors[0])[-1:]
        same = all(self.shape(tensor) == self.shape(tensors[0]) for tensor in tensors)
        alike = all(self.shape(base) == self.shape(bases[0]) and self.shape(base)[-1:] == last for base in bases)
        if bases == list(tensors) or not (same and alike):
            return self.emit(path, layer, *tensors, sources=sources)
        name = layer.kind if isinstance(layer, Primitive) else type(layer).__name__
        result = self.emit(f"{path}/{name.lower()}", layer, *bases, sources=sources)
        shape = (*self.shape(tensors[0])[:-1], *self.shape(result)[-1:])
        return self.view(path, result, shape)

    # -------------------------------------------------------------- questions

    def folds_into(self, tensor: str) -> bool:
        """Whether a BatchNormalization on this tensor can be folded into the layer that makes it."""
        base = self.base(tensor)
        producer = self.by_path.get(base)
        rule = producer and find_rule(producer.layer)
        same_channels = self.shape(tensor)[-1:] == self.shape(base)[-1:]
        return bool(rule and rule.has_kernel) and same_channels and self.has_one_reader(tensor)

    def has_one_reader(self, tensor: str) -> bool:
        """Whether one node of the read graph reads a tensor, and it does not leave the model."""
        base = self.base(tensor)

        def shows(name: str) -> bool:
            return name in self.alias and self.base(self.alias[name]) == base

        # Nodes that have vanished (a linear activation, a reshape) show the same tensor: their readers count.
        readers = sum(
            shows(name) for node in self.graph.nodes if not shows(node.path) for name in node.inputs if shows(name)
        )
        return readers <= 1 and not any(shows(name) for name in self.graph.outputs)

    def is_fixed(self, tensor: str) -> bool:
        """Whether a tensor's parameters are fixed by a kernel or by a pinned input, through shared operators."""
        tensor = self.base(tensor)
        while tensor in self.by_path:
            node = self.by_path[tensor]
            rule = find_rule(node.layer)
            if rule is None or rule.output is Output.OWN or not node.inputs:
                return False
            if rule.output is Output.FIXED:
                return True
            tensor = self.base(node.inputs[0])
        return tensor in self.pinned

    def check_weights(self) -> None:
        """Notes variables that two lowered layers hold copies of: training would pull the copies apart."""
        holders: dict[tuple, Node] = {}
        for node in self.nodes:
            for source in node.sources:
                first = holders.setdefault(source.key[:2], node)
                if first.layer is not node.layer and source.variable.trainable:
                    self.problems.append(
                        f"{node.path} ({type(node.layer).__name__}): it shares {source.variable.path} with "
                        f"{first.path}, which uses it in another way. Give each a variable of its own, or freeze it "
                        "(trainable = False)"
                    )

    # -------------------------------------------------------------- common rewrites

    def shared(self, path: str, kind: str, *tensors: str, **options) -> str:
        """An operator whose inputs share the output's parameters; those that are fixed are requantized first."""
        if len(tensors) > 1:
            tensors = tuple(
                self.op(f"{path}/requantize_{index}", "QUANTIZE", tensor) if self.is_fixed(tensor) else tensor
                for index, tensor in enumerate(tensors)
            )
        return self.op(path, kind, *tensors, **options)

    def binary(self, path: str, kind: str, a: str | Value, b: str | Value) -> str:
        """ADD, SUB, MUL, MAXIMUM or MINIMUM of two tensors, or of one and a constant."""
        tensor = b if isinstance(a, Value) else a
        if isinstance(tensor, Value):
            raise Refused("both of its operands are constants; compute the result before the model")
        operands = [self._operand(path, value, tensor) for value in (a, b)]
        ranks = [self.rank(operand) for operand in operands]
        if ranks[0] != ranks[1]:
            raise Refused(f"inputs of rank {ranks[0]} and {ranks[1]}; reshape them to one rank")
        if kind in ("MAXIMUM", "MINIMUM"):
            return self.shared(path, kind, *operands)
        if any(self.is_constant(operand) for operand in operands):
            return self.op(path, kind, *operands)
        return self.pointwise(path, Primitive(kind), *operands)

    def _operand(self, path: str, value: str | Value, other: str) -> str:
        if not isinstance(value, Value):
            return value
        if value.array.ndim > self.rank(other):
            raise Refused(f"a constant of shape {value.array.shape} with a tensor of rank {self.rank(other)}")
        if value.array.ndim == self.rank(other) and value.array.shape[0] != 1:
            raise Refused(f"a constant of shape {value.array.shape}, whose first axis is the batch; expected 1 there")
        return self.constant(path, replace(value, array=value.array.astype(np.float32)), self.rank(other))

    def dense(self, path: str, tensor: str, kernel: Value, units: int) -> str:
        """Product along the last axis with a weight [inputs, units]."""

        def make():
            trainable = kernel.source is None or kernel.source.variable.trainable
            return keras.layers.Dense(
                units, use_bias=False, trainable=trainable, kernel_initializer=initializer(kernel.array)
            )

        if kernel.source is None:
            return self.product(path, make(), tensor)
        key = ("dense", *kernel.source.key)
        layer = self._copies[key] = self._copies.get(key) or make()
        return self.product(path, layer, tensor, sources=(kernel.source,))

    def product(self, path: str, layer, tensor: str, *, sources: Sequence[Source] = (), prologue=None) -> str:
        """Appends a Dense, along the last axis of a tensor of any rank.

        TensorFlow's matmul of [n, 1, steps, inputs] and a matrix corrupts memory (2.18 to 2.21 on x86, measured), so
        tensors of rank 4 and more lose their axes of size 1 first.
        """
        shape, base = self.shape(tensor), self.base(tensor)
        flat = base if self.shape(base)[-1:] == shape[-1:] else tensor
        if len(self.shape(flat)) > 2 and 1 in self.shape(flat)[:-1]:
            # With one axis left the result has its own shape, and is not reshaped back.
            rows = () if len(shape) == 1 else (math.prod(self.shape(flat)[:-1]),)
            flat = self.view(f"{path}/flat", flat, (*rows, shape[-1]))
        name = path if self.shape(flat) == shape else f"{path}/dense"
        result = self.emit(name, layer, flat, sources=sources, prologue=prologue)
        return self.view(path, result, (*shape[:-1], *self.shape(result)[-1:]))

    def affine(self, path: str, tensor: str, scale: Value, bias: Value | None = None) -> str:
        """`x * scale + bias` per channel (last axis): a 1x1 depthwise convolution, exact for any scale."""
        shape = self.shape(tensor)
        factors = np.broadcast_to(scale.array.ravel(), shape[-1:])
        offsets = np.broadcast_to(0.0 if bias is None else bias.array.ravel(), shape[-1:])
        is_constant = scale.source is None and (bias is None or bias.source is None)
        if is_constant and (before := self._affines.get(self.base(tensor))) and self.has_one_reader(tensor):
            tensor, factors, offsets = before[0], before[1] * factors, before[2] * factors + offsets
        flat = self.base(tensor) if self.shape(self.base(tensor))[-1:] == shape[-1:] else tensor
        if self.rank(flat) != 4:
            flat = self.view(f"{path}/2d", flat, (1, math.prod(shape[:-1]), shape[-1]))
        key = ("affine", scale.source and scale.source.key, bias and bias.source and bias.source.key)
        layer = None if is_constant else self._copies.get(key)
        if layer is None:
            layer = self._copies[key] = keras.layers.DepthwiseConv2D(
                1,
                use_bias=bool(np.any(offsets)) if is_constant else bias is not None,
                depthwise_initializer=initializer(factors),
                bias_initializer=initializer(offsets),
                trainable=scale.source is not None and scale.source.variable.trainable,
            )
        sources = tuple(v.source for v in (scale, bias) if v is not None and v.source is not None)
        result = self.emit(path if self.shape(flat) == shape else f"{path}/depthwise", layer, flat, sources=sources)
        if is_constant:
            self._affines[result] = (flat, factors, offsets)
        return self.view(path, result, shape)

    def absorb(self, tensor: str, padded: bool) -> tuple[str, tuple[np.ndarray, np.ndarray] | None]:
        """Preprocessing that the next layer with a kernel can take into its weights.

        Args:
            tensor: that layer's input.
            padded: it pads its input with zeros, which an offset would move.

        Returns:
            The tensor before the preprocessing and `(scale, offset)` per input channel; the tensor and None where
            there is no such thing.
        """
        before = self._affines.get(self.base(tensor))
        if before is None or not self.has_one_reader(tensor):
            return tensor, None
        source, scale, offset = before
        channels = self.shape(tensor)[-1:]
        if scale.shape != channels:
            if np.ptp(scale) or np.ptp(offset):
                return tensor, None
            scale, offset = (np.broadcast_to(values[0], channels) for values in (scale, offset))
        if padded and np.any(offset):
            return tensor, None
        prologue = scale.astype(np.float32), offset.astype(np.float32)
        return self.view(f"{tensor}/raw", source, self.shape(tensor)), prologue

    def add_bias(self, path: str, tensor: str, bias: Value) -> str | None:
        """`x + bias` per channel inside the layer with a kernel that makes x; None where that is not possible."""
        base = self.base(tensor)
        node = self.by_path.get(base)
        rule = node and find_rule(node.layer)
        if not node or not rule or not rule.has_kernel or node.layer.use_bias:
            return None
        if self.shape(tensor)[-1:] != self.shape(base)[-1:] or not self.has_one_reader(tensor):
            return None
        if bool(bias.source) != bool(node.sources):
            return None
        trainable = bias.source is None or bias.source.variable.trainable
        if trainable != node.layer.trainable:
            return None
        # A kernel used at several places, each with this bias, stays one layer.
        key = (id(node.layer), bias.source and bias.source.key)
        layer = self._copies.get(key) or self._with_bias(node, bias)
        self._copies[key] = layer
        index = self.nodes.index(node)
        sources = (*node.sources, bias.source) if bias.source else ()
        self.nodes[index] = self.by_path[base] = replace(node, layer=layer, sources=sources)
        return tensor

    def _with_bias(self, node: Node, bias: Value) -> keras.layers.Layer:
        kernel = "depthwise_initializer" if hasattr(node.layer, "depthwise_initializer") else "kernel_initializer"
        channels = self.shape(node.path)[-1:]
        settings = {
            "use_bias": True,
            "bias_initializer": initializer(np.broadcast_to(bias.array.ravel(), channels)),
            kernel: initializer(np.asarray(node.layer.kernel)),
        }
        layer = type(node.layer).from_config(node.layer.get_config() | settings)
        layer(self.tensors[node.inputs[0]])
        return layer


def sources_of(layer) -> tuple[Source, ...]:
    return tuple(Source(variable) for variable in layer.weights)


def initializer(values) -> Callable:
    """An initializer that gives these values in the variable's shape, scalars repeated."""
    array = np.asarray(values)

    def initialize(shape, dtype=None):
        filled = np.broadcast_to(array, shape) if array.ndim == 0 else np.reshape(array, shape)
        return keras.ops.convert_to_tensor(filled, dtype or "float32")

    return initialize


def _read_as_indices(graph: Graph) -> set[str]:
    """Tensors of whole numbers that look something up, and those that they are moved from."""
    names: set[str] = set()
    for node in reversed(graph.nodes):
        key = class_name(node.layer)
        looks_up = key == "Embedding" or (key == "ops.Take" and not isinstance(node.arguments[0][0], Ref))
        if looks_up or names & set(node.outputs):
            names.update(node.inputs)
    return names


def _placeholder(tensor: keras.KerasTensor) -> keras.KerasTensor:
    return keras.KerasTensor(tensor.shape, tensor.dtype)
