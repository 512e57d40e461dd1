"""The plan: every runtime operator of a model and, for every tensor, its grid or the reason it has none.

Made once from the lowered graph, the rule table and the scheme.  The quantized Keras model has one layer per operator
of the plan, the flatbuffer one operator per layer, and calibration, parity and the report walk the same list.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mobileqat.errors import MobileQatError, UnsupportedModelError
from mobileqat.graph import Graph, Node
from mobileqat.rules import CONSTANT, FIXED_INT16, GONE, Output, Rule, get_rule, rule_key
from mobileqat.schemes import QuantSpec, Scheme

# Primitives that an operator can apply itself.
FUSED_ACTIVATIONS = ("RELU", "RELU6")


@dataclass(frozen=True)
class Operator:
    """One runtime operator.

    Args:
        name: path of the lowered layer that leads it, "block1/conv".
        kind: LiteRT builtin operator, `rules.GONE` for a layer that does nothing at inference (Dropout), or
            `rules.CONSTANT` for a constant operand.
        nodes: paths of the lowered layers it is made of: the leader, a folded BatchNormalization, a fused ReLU.
        inputs: names of its input tensors.
        output: name of its output tensor, the path of its last layer.
        batch_norm: path of the BatchNormalization folded into it.
        activation: path of the ReLU fused into it.
        fused_activation: "NONE", "RELU" or "RELU6".
        quantized: False when it stays in float.
        weight_spec: grid of its kernel, None without one or in float.
        storage_bits: width in which the file holds the kernel, 4 or 8.
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
    weight_spec: QuantSpec | None = None
    storage_bits: int = 8


@dataclass(frozen=True)
class TensorPlan:
    """The grid of one tensor between operators.

    Args:
        name: the tensor.
        shape: without the batch axis; whole for a constant without one.
        spec: its grid, None for a tensor in float or of integers.
        group: the tensors with the same `group` share scale and zero point.
        output: where the parameters come from; `OWN` tensors are observed.
        fixed: `(scale, zero_point)` when a kernel fixes them.
        dtype: "float32", or "int32" for indices, which are never quantized.
        has_batch: False for a constant that serves every sample.
    """

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    group: str
    output: Output
    fixed: tuple[float, int] | None = None
    dtype: str = "float32"
    has_batch: bool = True

    @property
    def reason(self) -> str:
        if self.dtype != "float32":
            return "whole numbers"
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
        """Observed tensors of a group, in execution order.

        Constants count only where they are alone, as a table of embeddings is: beside activations (a bound that values
        are clipped at) they saturate rather than widen the range.
        """
        owned = [t.name for t in self.tensors.values() if t.group == group and t.output is Output.OWN]
        return [name for name in owned if not self.is_constant(name)] or owned

    def is_constant(self, tensor: str) -> bool:
        return tensor in self._constants

    @cached_property
    def _constants(self) -> frozenset[str]:
        return frozenset(op.output for op in self.operators if op.kind == CONSTANT)

    def borders(self) -> list[dict]:
        """Where float islands that were excluded meet integers: one QUANTIZE or DEQUANTIZE each.

        Returns:
            `{"tensor", "conversion", "made_by", "read_by"}` per conversion, in execution order.
        """
        vanished = {op.output: op.inputs[0] for op in self.operators if op.kind == GONE}

        def shown(name: str) -> str:
            while name in vanished:
                name = vanished[name]
            return name

        makers = {op.output: op for op in self.operators}
        readers: dict[str, list[Operator]] = {}
        for op in self.operators:
            if op.kind != GONE:
                for name in op.inputs:
                    readers.setdefault(shown(name), []).append(op)
        rows = []
        for name, tensor in self.tensors.items():
            if name in vanished or tensor.spec is None:
                continue
            maker = makers.get(name)
            made_by = maker.name if maker else "input"
            by_form = {
                form: [op.name for op in readers.get(name, ()) if op.quantized is form] for form in (True, False)
            }
            if maker is not None and not maker.quantized:
                rows.append(_border(name, "QUANTIZE", made_by, by_form[True]))
            if by_form[False]:
                rows.append(_border(name, "DEQUANTIZE", made_by, by_form[False]))
        return rows

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
                "weight_bits": _weight_bits(made_by.get(name)),
                "parameters": tensor.reason,
                "shared_with": tensor.group if tensor.group != name else None,
            }
            for name, tensor in self.tensors.items()
        ]


def _weight_bits(operator: Operator | None) -> list[int] | None:
    """Width of a kernel's grid, and of what holds it in the file."""
    spec = operator and operator.weight_spec
    return [spec.bits, operator.storage_bits] if operator and spec else None


def _border(tensor: str, conversion: str, made_by: str, read_by: list[str]) -> dict:
    return {"tensor": tensor, "conversion": conversion, "made_by": made_by, "read_by": read_by}


def make_plan(
    graph: Graph, scheme: Scheme, exclude: tuple[str, ...] = (), layers: Mapping[str, QuantSpec] | None = None
) -> QuantPlan:
    """Plans a lowered graph.

    Args:
        graph: from `lowering.lower`.
        scheme: grids of weights and activations.
        exclude: patterns (`fnmatch`) of layer paths that stay in float.
        layers: other grids for the kernels of some layers, by pattern; the last pattern that matches decides.

    Raises:
        MobileQatError: a pattern in `exclude` or `layers` matches no layer.
        UnsupportedModelError: operators that the runtime does not execute on int16 activations.
    """
    rules = {node.path: get_rule(node.layer) for node in graph.nodes}
    fused = _fuse(graph, _excluded(graph, exclude))
    fused = _with_weights(fused, graph, scheme, layers or {})
    read_as_integers = _read_as_integers(fused)
    read_in_float = {name for operator in fused if not operator.quantized for name in operator.inputs}
    forms = {name: _Form(Output.OWN, name in read_as_integers or name not in read_in_float) for name in graph.inputs}
    operators: list[Operator] = []
    for operator in fused:
        if operator.kind == GONE:
            # What does nothing stands in the form of what it is given.
            operator = replace(operator, quantized=forms[operator.inputs[0]].quantized)
        elif operator.kind == CONSTANT:
            operator = replace(operator, quantized=operator.output in read_as_integers)
        operators.append(operator)
        forms[operator.output] = _form(operator, rules[operator.name], operator.output in read_as_integers)
    if scheme.activations.bits == 16:
        _require_int16(graph, scheme, operators, rules)
        forms = {name: replace(form, fixed=form.fixed and FIXED_INT16) for name, form in forms.items()}
    integral = {name for name, tensor in graph.tensors.items() if not tensor.dtype.startswith(("float", "bfloat"))}
    groups = _groups(operators, forms, integral)
    symmetric = _symmetric(operators, rules, forms, groups)
    tensors = {}
    for name, form in forms.items():
        has_batch = graph.tensors[name].shape[:1] == (None,)
        spec = scheme.activations
        if groups.root(name) in symmetric:
            spec = replace(spec, symmetric=True, full_range=True)
        tensors[name] = TensorPlan(
            name,
            tuple(graph.tensors[name].shape[1 if has_batch else 0 :]),
            spec if form.quantized and name not in integral else None,
            groups.root(name),
            form.output,
            form.fixed,
            "int32" if name in integral else "float32",
            has_batch,
        )
    return QuantPlan(graph.name, scheme, graph.inputs, graph.outputs, tuple(operators), tensors)


@dataclass(frozen=True)
class _Form:
    """How a tensor stands between operators: in integers or not, and where its parameters come from."""

    output: Output
    quantized: bool
    fixed: tuple[float, int] | None = None


def _form(operator: Operator, rule: Rule, read_as_integers: bool) -> _Form:
    output = Output.OWN
    if operator.quantized:
        output = Output.SHARED if operator.kind == GONE else rule.output
    # A float operator's output that an integer one reads is observed and rounded where it is made.
    return _Form(output, operator.quantized or read_as_integers, rule.fixed if output is Output.FIXED else None)


def _require_int16(graph: Graph, scheme: Scheme, operators: list[Operator], rules: dict[str, Rule]) -> None:
    layers = {node.path: node.layer for node in graph.nodes}
    refused = [
        f"'{operator.name}': {_described(layers[operator.name])}"
        for operator in operators
        if operator.quantized and not rules[operator.name].int16
    ]
    if refused:
        lines = "\n".join(f"  - {row}" for row in refused)
        raise UnsupportedModelError(
            f"Model '{graph.name}' cannot be quantized with scheme '{scheme.name}': the runtime does not execute "
            f"these on int16 activations:\n{lines}\nScheme 'w8a8' takes them; or replace these layers."
        )


def _described(layer) -> str:
    return f"a table of {layer.options['function']}" if rule_key(layer) == "TABLE" else rule_key(layer)


def _groups(operators: list[Operator], forms: dict[str, _Form], integral: set[str]) -> _Groups:
    """Tensors that share their parameters."""
    groups = _Groups()
    for operator in operators:
        if forms[operator.output].output is Output.SHARED:
            for name in operator.inputs:
                if name not in integral:
                    groups.join(operator.output, name)
    return groups


def _symmetric(operators: list[Operator], rules, forms: dict[str, _Form], groups: _Groups) -> set[str]:
    """Groups whose zero point should be 0, which those with fixed parameters cannot have."""
    wanted = {
        groups.root(operator.inputs[rules[operator.name].symmetric_input])
        for operator in operators
        if operator.quantized and rules[operator.name].symmetric_input is not None
    }
    return wanted - {groups.root(name) for name, form in forms.items() if form.output is Output.FIXED}


def _read_as_integers(operators: list[Operator]) -> set[str]:
    """Tensors that some integer operator reads, also through operators that do nothing."""
    names: set[str] = set()
    for operator in reversed(operators):
        if operator.output in names if operator.kind == GONE else operator.quantized:
            names.update(operator.inputs)
    return names


def _with_weights(
    operators: list[Operator], graph: Graph, scheme: Scheme, layers: Mapping[str, QuantSpec]
) -> list[Operator]:
    """The operators with the grid of their kernel, and how it is stored."""
    nodes = {node.path: node.layer for node in graph.nodes}
    with_kernel = [op.name for op in operators if op.quantized and get_rule(nodes[op.name]).has_kernel]
    specs, calls = dict.fromkeys(with_kernel, scheme.weights), _calls(graph)
    for pattern, spec in layers.items():
        matched = _matching(with_kernel, pattern, calls)
        if not matched:
            raise MobileQatError(
                f"layers={pattern!r} matches no layer of '{graph.name}' with a kernel in integers. Such layers: "
                f"{', '.join(with_kernel)}"
            )
        specs |= dict.fromkeys(matched, spec)

    def planned(op: Operator) -> Operator:
        spec = specs.get(op.name)
        if spec is None:
            return op
        narrow = scheme.narrow_storage and scheme.activations.bits == 8
        bits = _storage_bits(op.kind, nodes[op.name], spec, narrow)
        return replace(op, weight_spec=spec, storage_bits=bits)

    return [planned(op) for op in operators]


def _storage_bits(kind: str, layer, spec: QuantSpec, narrow: bool) -> int:
    """int4 for convolutions without groups and dense layers: others would run in slow kernels, or in none."""
    takes_int4 = kind == "FULLY_CONNECTED" or (kind == "CONV_2D" and layer.groups == 1)
    return 4 if narrow and takes_int4 and spec.bits <= 4 else 8


def _excluded(graph: Graph, patterns: tuple[str, ...]) -> set[str]:
    paths, calls = [node.path for node in graph.nodes], _calls(graph)
    excluded: set[str] = set()
    for pattern in patterns:
        matched = _matching(paths, pattern, calls)
        if not matched and not _matching(graph.read_paths, pattern, calls):
            raise MobileQatError(f"exclude={pattern!r} matches no layer of '{graph.name}'. Layers: {', '.join(paths)}")
        excluded |= matched
    for node in graph.nodes:
        if node.path in excluded and rule_key(node.layer) == "TABLE":
            raise MobileQatError(
                f"exclude matches '{node.path}', but the runtime has no float operator for "
                f"{node.layer.options['function']}: it exists as an integer table only. Leave it in integers, or "
                "replace it."
            )
    return excluded


def _matching(paths: Iterable[str], pattern: str, calls: Mapping[str, str]) -> set[str]:
    """Paths that a pattern names, what lies below them, and further calls of layers that it names."""
    return {path for path in paths if matches(path, pattern) or matches(calls.get(path, path), pattern)}


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a path, or one that it lies below."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")


def _calls(graph: Graph) -> dict[str, str]:
    """Of layers that are called again ("conv@2"), and what lies below them, the path of the first call; other operators
    of one name ("add@2") are no calls of one layer."""
    layers = {node.path: node.layer for node in graph.nodes}
    numbers = {path: list(AGAIN.finditer(path)) for path in layers if AGAIN.search(path)}
    heads = {
        path[: number.end()]
        for path, found in numbers.items()
        for number in found
        if layers.get(path[: number.start()] + path[number.end() :]) is layers[path]
    }

    def first(path: str, found: list[re.Match[str]]) -> str:
        for number in reversed(found):
            if path[: number.end()] in heads:
                path = path[: number.start()] + path[number.end() :]
        return path

    return {path: first(path, found) for path, found in numbers.items()}


AGAIN = re.compile(r"@[0-9]+(?=/|$)")


def _fuse(graph: Graph, excluded: set[str]) -> list[Operator]:
    """Groups each leading layer with the BatchNormalization and the ReLU that the runtime executes with it."""
    operators: list[Operator] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.path in taken:
            continue
        rule = get_rule(node.layer)
        assert rule_key(node.layer) != "BatchNormalization", f"{node.path} was not folded"
        members, batch_norm, activation, fused = [node], None, None, "NONE"
        if rule.has_kernel and (follower := _only_consumer(graph, members[-1], ("BatchNormalization",))):
            batch_norm = follower.path
            members.append(follower)
        if rule.fuses_activation and (follower := _only_consumer(graph, members[-1], FUSED_ACTIVATIONS)):
            fused = rule_key(follower.layer)
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


def _only_consumer(graph: Graph, node: Node, keys: tuple[str, ...]) -> Node | None:
    """The consumer of a node's output if it is the only one, of that kind, and the output is not a model output."""
    consumers = graph.consumers(node.path)
    if len(consumers) == 1 and node.path not in graph.outputs and rule_key(consumers[0].layer) in keys:
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
