"""The plan: every runtime operator of a model and, for every tensor, its grid or the reason it has none.

Made once from the lowered graph, the rule table and the scheme.  The quantized Keras model has one layer per operator
of the plan, the flatbuffer one operator per layer, and calibration, parity and the report walk the same list.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mobileqat.errors import MobileQatError
from mobileqat.graph import Graph, Node
from mobileqat.rules import GONE, Output, get_rule
from mobileqat.schemes import QuantSpec, Scheme

# What a runtime operator calls the ReLU that it applies itself, by the layer's max_value.
FUSED_ACTIVATIONS = {None: "RELU", 6.0: "RELU6"}


@dataclass(frozen=True)
class Operator:
    """One runtime operator.

    Args:
        name: path of the lowered layer that leads it, "block1/conv".
        kind: LiteRT builtin operator, or `rules.GONE` for a layer that does nothing at inference (Dropout).
        nodes: paths of the lowered layers it is made of: the leader, a folded BatchNormalization, a fused ReLU.
        inputs: names of its input tensors.
        output: name of its output tensor, the path of its last layer.
        batch_norm: path of the BatchNormalization folded into it.
        activation: path of the ReLU fused into it.
        fused_activation: "NONE", "RELU" or "RELU6".
        quantized: False when it stays in float.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    batch_norm: str | None = None
    activation: str | None = None
    fused_activation: str = "NONE"
    quantized: bool = True


@dataclass(frozen=True)
class TensorPlan:
    """The grid of one tensor between operators.

    Args:
        name: the tensor.
        shape: without the batch axis.
        spec: its grid, None for a tensor in float.
        group: the tensors with the same `group` share scale and zero point.
        output: where the parameters come from; `OWN` tensors are observed.
        fixed: `(scale, zero_point)` when a kernel fixes them.
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    group: str
    output: Output
    fixed: tuple[float, int] | None = None

    @property
    def reason(self) -> str:
        return "kept in float" if self.spec is None else self.output.value


@dataclass(frozen=True)
class QuantPlan:
    """Operators in execution order and tensors by name."""

    name: str
    scheme: Scheme
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[Operator, ...]
    tensors: dict[str, TensorPlan]

    def members(self, group: str) -> list[str]:
        """Observed tensors of a group, in execution order."""
        return [t.name for t in self.tensors.values() if t.group == group and t.output is Output.OWN]

    def rows(self) -> list[dict]:
        """One JSON-able row per tensor, for reports."""
        made_by = {op.output: op for op in self.operators}
        return [
            {
                "tensor": tensor.name,
                "shape": list(tensor.shape),
                "operator": made_by[name].kind if name in made_by else "INPUT",
                "layers": list(made_by[name].nodes) if name in made_by else [],
                "bits": tensor.spec.bits if tensor.spec else None,
                "parameters": tensor.reason,
                "shared_with": tensor.group if tensor.group != name else None,
            }
            for name, tensor in self.tensors.items()
        ]


def make_plan(graph: Graph, scheme: Scheme, exclude: tuple[str, ...] = ()) -> QuantPlan:
    """Plans a lowered graph.

    Args:
        graph: from `lowering.lower`.
        scheme: grids of weights and activations.
        exclude: patterns (`fnmatch`) of layer paths that stay in float.

    Raises:
        MobileQatError: a pattern in `exclude` matches no layer.
    """
    by_path = {node.path: node for node in graph.nodes}
    fused = _fuse(graph, _excluded(graph, exclude))
    read_as_integers = _read_as_integers(fused)
    groups = _Groups()
    operators: list[Operator] = []
    specs: dict[str, tuple[Output, tuple[float, int] | None, bool]] = {
        name: (Output.OWN, None, name in read_as_integers) for name in graph.inputs
    }
    for operator in fused:
        rule = get_rule(by_path[operator.name].layer)
        if operator.kind == GONE:
            # What does nothing stands in the form of what it is given.
            operator = replace(operator, quantized=specs[operator.inputs[0]][2])
        output = (Output.SHARED if operator.kind == GONE else rule.output) if operator.quantized else Output.OWN
        # A float operator's output that an integer one reads is observed and rounded where it is made.
        specs[operator.output] = (output, rule.fixed, operator.quantized or operator.output in read_as_integers)
        operators.append(operator)
        if output is Output.SHARED:
            for name in operator.inputs:
                groups.join(operator.output, name)
    tensors = {
        name: TensorPlan(
            name,
            tuple(graph.tensors[name].shape[1:]),
            scheme.activations if quantized else None,
            groups.root(name),
            output,
            fixed,
        )
        for name, (output, fixed, quantized) in specs.items()
    }
    return QuantPlan(graph.name, scheme, graph.inputs, graph.outputs, tuple(operators), tensors)


def _read_as_integers(operators: list[Operator]) -> set[str]:
    """Tensors that some integer operator reads, also through operators that do nothing."""
    names: set[str] = set()
    for operator in reversed(operators):
        if operator.output in names if operator.kind == GONE else operator.quantized:
            names.update(operator.inputs)
    return names


def _excluded(graph: Graph, patterns: tuple[str, ...]) -> set[str]:
    paths = [node.path for node in graph.nodes]
    excluded: set[str] = set()
    for pattern in patterns:
        matched = _matching(paths, pattern)
        if not matched and not _matching(graph.read_paths, pattern):
            raise MobileQatError(f"exclude={pattern!r} matches no layer of '{graph.name}'. Layers: {', '.join(paths)}")
        excluded |= matched
    return excluded


def _matching(paths: Iterable[str], pattern: str) -> set[str]:
    """Paths that a pattern names, and what lies below them."""
    return {p for p in paths if fnmatch.fnmatchcase(p, pattern) or fnmatch.fnmatchcase(p, pattern + "/*")}


def _fuse(graph: Graph, excluded: set[str]) -> list[Operator]:
    """Groups each leading layer with the BatchNormalization and the ReLU that the runtime executes with it."""
    operators: list[Operator] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.path in taken:
            continue
        rule = get_rule(node.layer)
        members, batch_norm, activation, fused = [node], None, None, "NONE"
        if rule.has_kernel and (follower := _only_consumer(graph, members[-1], "BatchNormalization")):
            batch_norm = follower.path
            members.append(follower)
        if rule.fuses_activation and (follower := _only_consumer(graph, members[-1], "ReLU")):
            fused = FUSED_ACTIVATIONS[follower.layer.max_value]
            activation = follower.path
            members.append(follower)
        paths = tuple(member.path for member in members)
        taken.update(paths)
        quantized = excluded.isdisjoint(paths)
        is_requantization = rule.operator == "QUANTIZE"
        operators.append(
            Operator(
                node.path,
                GONE if is_requantization and not quantized else rule.operator,
                paths,
                node.inputs,
                paths[-1],
                batch_norm,
                activation,
                fused,
                quantized,
            )
        )
    return operators


def _only_consumer(graph: Graph, node: Node, layer_class: str) -> Node | None:
    """The consumer of a node's output if it is the only one, of that class, and the output is not a model output."""
    consumers = graph.consumers(node.path)
    if len(consumers) == 1 and node.path not in graph.outputs and type(consumers[0].layer).__name__ == layer_class:
        return consumers[0]
    return None


class _Groups:
    """Union-find over tensor names."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def join(self, name: str, other: str) -> None:
        a, b = self.root(name), self.root(other)
        if a != b:
            self.parent[a] = b
