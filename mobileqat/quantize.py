"""From a float Keras model to its quantized twin and back: `quantize_model`, the annotate/apply pair, `strip`.

The quantized model is an ordinary functional Keras model with one `QuantizeWrapper` per runtime operator.  It is
saved as the float model's configuration plus the options it was quantized with, and rebuilt by the same code.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import keras
import tensorflow as tf

from mobileqat import graph as graphs
from mobileqat.errors import CalibrationError, ModelError
from mobileqat.fakequant import FakeQuantize
from mobileqat.lowering import expand, lower
from mobileqat.plan import QuantPlan, make_plan
from mobileqat.rules import CONSTANT, GONE, Output
from mobileqat.schemes import SCHEMES, QuantSpec, Scheme, get_scheme
from mobileqat.wrappers import QuantizeWrapper

WEIGHT_RANGES = ("auto", "maxabs", "mse", "learned")


@keras.saving.register_keras_serializable("mobileqat")
class QuantizedModel(keras.Model):
    """A functional Keras model that computes on integer grids.  Made by `quantize_model`; do not construct it.

    Attributes:
        plan: the `QuantPlan` it was built from.
    """

    @property
    def operators(self) -> dict[str, QuantizeWrapper]:
        """The wrappers by operator name, in execution order."""
        wrappers = {w.operator.name: w for w in self.layers if isinstance(w, QuantizeWrapper)}
        return {op.name: wrappers[op.name] for op in self.plan.operators}

    @property
    def quantizers(self) -> dict[str, FakeQuantize]:
        """The activation quantizer of every tensor that has a grid."""
        found = dict(self._input_quantizers())
        for wrapper in self.operators.values():
            if wrapper.output_quantizer is not None:
                found[wrapper.operator.output] = wrapper.output_quantizer
        return found

    def arrange(self, arrays: Sequence):
        """One array or tensor per input of the plan as the model takes them: alone, in a list or in a dict."""
        return keras.tree.pack_sequence_as(self._inputs_struct, list(arrays))

    def _input_quantizers(self):
        for layer in self.layers:
            if isinstance(layer, FakeQuantize):
                for node in layer._inbound_nodes:
                    yield node.input_tensors[0]._keras_history.operation.name, layer

    def unobserved(self) -> list[str]:
        """Tensors whose range is not known yet."""
        return [
            name
            for name, quantizer in self.quantizers.items()
            if quantizer.is_learned and name in quantizer.members
            for row in [quantizer.members.index(name)]
            if not float(quantizer.range_weight[row]) > 0
        ]

    def call(self, inputs, training=None, mask=None):
        if not isinstance(tf.nest.flatten(inputs)[0], keras.KerasTensor) and (
            not training or self._options["learn_activation_ranges"]
        ):
            self._require_ranges()
        return super().call(inputs, training=training, mask=mask)

    def _require_ranges(self) -> None:
        with tf.init_scope():  # reads the variables now, also while a function is being traced
            missing = self.unobserved() if tf.executing_eagerly() else []
        if missing:
            raise CalibrationError(
                f"Model '{self.name}' has no ranges yet for {len(missing)} activation tensors, the first "
                f"'{missing[0]}'. Run mobileqat.calibrate(model, data), or train for at least one step."
            )

    def get_config(self):
        config = {"float_model": self._float_config, "names": self._names}
        return config | {"options": self._options, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        float_model = _rebuild(config["float_model"], config["names"], custom_objects)
        return quantize_model(float_model, **config["options"], name=config["name"])


def quantize_model(
    model: keras.Model,
    scheme: str | Scheme = "w8a8",
    *,
    exclude: Sequence[str] = (),
    layers: Mapping[str, str] | None = None,
    input_range: Sequence[float] | None = None,
    input_shape=None,
    ema_decay: float = 0.99,
    weight_range: str = "auto",
    learn_activation_ranges: bool = False,
    name: str | None = None,
) -> QuantizedModel:
    """Makes the quantized twin of a float model.

    Args:
        model: a Keras 3 model, functional, sequential or subclassed, built, which is left untouched.
        scheme: a name in `mobileqat.schemes.SCHEMES`.
        exclude: patterns of layer paths that stay in float, such as `"head/*"`. A pattern takes what lies below the
            paths that it matches, and every call of a layer that is called several times (`"conv"`, `"conv@2"`).
        layers: other schemes for the kernels of some layers, by pattern as in `exclude`: `{"block*/expand": "w4a8"}`;
            the last pattern that matches decides.
        input_range: `(minimum, maximum)` of the input data when it is known, such as (0, 255) for pixels; its grid
            is then fixed and exact. None learns it like any other range.
        input_shape: shape of the input without the batch, to plan a model that leaves sizes open, such as
            `keras.Input((None, None, 3))`; for several inputs a list, or a dict by name.
        ema_decay: decay per step of the moving averages that follow activation ranges in training.
        weight_range: where the scales of kernels come from, per channel. "maxabs": the largest weight, which never
            saturates. "mse": the share of it with the least squared error, fitted by `calibrate`. "learned": from
            there trained with the weights (LSQ, Esser et al. 2020). "auto": "learned" for kernels of 2 to 7 bits,
            "maxabs" for others.
        learn_activation_ranges: train the ends of activation ranges, from where `calibrate` left them (LSQ+, Bhalgat
            et al. 2020), rather than follow the data by moving averages.
        name: of the new model; "quantized_" and the model's name by default.

    Returns:
        A new model with copies of the weights, to be calibrated or trained, then converted.

    Raises:
        UnsupportedModelError: layers that the integer runtime cannot execute, all of them with what to do.

    Example:
        >>> q = quantize_model(model)
        >>> mobileqat.calibrate(q, x_train[:512])
        >>> q.compile("adam", "sparse_categorical_crossentropy"); q.fit(x_train, y_train)
        >>> flatbuffer = mobileqat.convert(q)
    """
    if isinstance(model, QuantizedModel):
        raise ModelError(f"Model '{model.name}' is quantized already.")
    scheme = get_scheme(scheme)
    pinned = _bounds(input_range) if input_range is not None else None
    if not 0 < ema_decay < 1:
        raise ModelError(f"ema_decay must be between 0 and 1. Received: {ema_decay}")
    if weight_range not in WEIGHT_RANGES:
        raise ModelError(f"weight_range must be one of {', '.join(WEIGHT_RANGES)}. Received: {weight_range!r}")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    graph = graphs.read(model, expand, input_shape)
    lowered = lower(graph, graph.inputs if pinned else (), scheme.activations.bits)
    plan = make_plan(lowered, scheme, exclude, _weight_specs(layers or {}, scheme))
    if not any(operator.kind not in (GONE, CONSTANT) for operator in plan.operators):
        raise ModelError(f"Model '{model.name}' computes nothing: there is no operator to quantize.")
    structures = graphs.structures(model, input_shape)
    quantizers = _make_quantizers(plan, pinned, ema_decay, learn_activation_ranges)
    quantized = _build(lowered, plan, quantizers, weight_range, name or f"quantized_{model.name}", structures)
    quantized._float_config, quantized._names = _describe(model), _names(model)
    quantized._options = {
        "scheme": scheme.name if SCHEMES.get(scheme.name) == scheme else asdict(scheme),
        "exclude": list(exclude),
        "layers": dict(layers or {}),
        "input_range": pinned and list(pinned),
        "input_shape": input_shape,
        "ema_decay": ema_decay,
        "weight_range": weight_range,
        "learn_activation_ranges": learn_activation_ranges,
    }
    quantized.plan = plan
    return quantized


def _weight_specs(layers: Mapping[str, str], scheme: Scheme) -> dict[str, QuantSpec]:
    others = {pattern: get_scheme(name) for pattern, name in layers.items()}
    for pattern, other in others.items():
        if other.activations != scheme.activations:
            raise ModelError(
                f"layers={{{pattern!r}: {other.name!r}}} changes the activations of '{scheme.name}', which the layers "
                "around share. Expected a scheme with the same activations."
            )
    return {pattern: other.weights for pattern, other in others.items()}


def _bounds(input_range) -> tuple[float, float]:
    try:
        low, high = map(float, input_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ModelError(f"input_range must be two finite numbers (minimum, maximum). Received: {input_range!r}")
    return low, high


def _describe(model: keras.Model) -> str:
    """A float model's configuration as JSON, the form in which the quantized model keeps and saves it.

    Keras numbers shared objects by memory address; kept beyond the call that made them, such numbers would clash with
    those of the file they end up in.  How the float model was compiled is no part of it.
    """
    left_out = ("shared_object_id", "compile_config")

    def without_numbers(value):
        if isinstance(value, dict):
            return {key: without_numbers(entry) for key, entry in value.items() if key not in left_out}
        return [without_numbers(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(without_numbers(keras.saving.serialize_keras_object(model)))


def _rebuild(description: str, names: list, custom_objects=None) -> keras.Model:
    model = keras.saving.deserialize_keras_object(json.loads(description), custom_objects=custom_objects)
    _rename(model, names)
    return model


def _parts(model) -> list:
    """What a functional or sequential model is made of, in the order of its configuration."""
    if isinstance(model, keras.Sequential):
        return model.layers
    return model.operations if hasattr(model, "_nodes_by_depth") else []


def _names(model) -> list:
    """Names of a model and of its parts, nested: `[name, [part, ...]]`.

    A custom layer or model whose `get_config` leaves its name out would be given another one by a counter.
    """
    return [model.name, [_names(part) for part in _parts(model)]]


def _rename(model, names: list) -> None:
    model.name, parts = names
    for part, inner in zip(_parts(model), parts, strict=True):
        _rename(part, inner)


def _build(
    lowered: graphs.Graph,
    plan: QuantPlan,
    quantizers: dict[str, FakeQuantize],
    weight_range: str,
    name: str,
    structures,
) -> QuantizedModel:
    layers = {node.path: node.layer for node in lowered.nodes}
    prologues = {node.path: node.prologue for node in lowered.nodes}

    def quantizer(tensor):
        planned = plan.tensors[tensor]
        return quantizers[planned.group] if planned.spec else None

    inputs, values, leaving = [], {}, _leaving(plan)
    names: set[str] = set()
    for tensor in plan.inputs:
        info = lowered.tensors[tensor]
        inputs.append(keras.Input(info.shape[1:], name=tensor, dtype=info.dtype))
        values[tensor] = inputs[-1] if quantizer(tensor) is None else quantizer(tensor)(inputs[-1], member=tensor)
    for operator in plan.operators:
        planned = plan.tensors[operator.output]
        wrapper = QuantizeWrapper(
            operator,
            layers[operator.name],
            layers[operator.batch_norm] if operator.batch_norm else None,
            layers[operator.activation] if operator.activation else None,
            tuple(quantizer(tensor) for tensor in operator.inputs),
            quantizer(operator.output),
            operator.output if planned.output is Output.OWN else None,
            operator.output in leaving,
            prologues[operator.name],
            _weight_range(weight_range, operator.weight_spec),
            name=_layer_name("quant", operator.name, names),
        )
        # A constant reads nothing; any input makes it a node of the Keras graph.
        arguments = [inputs[0]] if operator.kind == CONSTANT else [values[tensor] for tensor in operator.inputs]
        values[operator.output] = wrapper(arguments if len(arguments) > 1 else arguments[0])
    outputs = [values[tensor] for tensor in plan.outputs]
    return QuantizedModel(
        inputs=keras.tree.pack_sequence_as(structures[0], inputs),
        outputs=keras.tree.pack_sequence_as(structures[1], outputs),
        name=name,
    )


def _leaving(plan: QuantPlan) -> set[str]:
    """Tensors that leave the model, also by way of operators that only move their values."""
    readers = Counter(name for operator in plan.operators for name in operator.inputs)
    leaving = set(plan.outputs)
    for operator in reversed(plan.operators):
        if operator.output in leaving and plan.tensors[operator.output].output is Output.SHARED:
            leaving.update(name for name in operator.inputs if readers[name] == 1)
    return leaving


def _weight_range(wanted: str, spec: QuantSpec | None) -> str:
    """What "auto" stands for: few integers are worth saturating some weights for."""
    if wanted != "auto":
        return wanted
    return "learned" if spec is not None and spec.is_coarse else "maxabs"


def _layer_name(prefix: str, path: str, taken: set[str]) -> str:
    """A path as a Keras layer name: "block/conv@2" -> "quant_block.conv.2"; TensorFlow scopes allow little else."""
    name = f"{prefix}_{re.sub(r'[^A-Za-z0-9_.-]', '.', path)}"
    if name in taken:
        name = next(n for k in range(2, 1 << 20) if (n := f"{name}.{k}") not in taken)
    taken.add(name)
    return name


def _make_quantizers(plan: QuantPlan, pinned, ema_decay: float, learns: bool) -> dict[str, FakeQuantize]:
    """One `FakeQuantize` per group of tensors that share their parameters."""
    quantizers: dict[str, FakeQuantize] = {}
    names: set[str] = set()
    for tensor in plan.tensors.values():
        if tensor.spec is None or tensor.group in quantizers:
            continue
        group = [other for other in plan.tensors.values() if other.group == tensor.group]
        fixed = next((other.fixed for other in group if other.output is Output.FIXED), None)
        is_pinned = pinned is not None and any(other.name in plan.inputs for other in group)
        quantizers[tensor.group] = FakeQuantize(
            tensor.spec,
            () if fixed or is_pinned else plan.members(tensor.group),
            fixed,
            pinned if is_pinned else None,
            ema_decay,
            # The range of a constant is what it holds.
            learns and not any(plan.is_constant(member) for member in plan.members(tensor.group)),
            name=_layer_name("range", tensor.group, names),
        )
    return quantizers


# ------------------------------------------------------------------ annotate and apply, as in TFMOT


@keras.saving.register_keras_serializable("mobileqat")
class QuantizeAnnotate(keras.layers.Wrapper):
    """Marks a layer for `quantize_apply`; computes what the layer computes."""

    def __init__(self, layer, **kwargs):
        kwargs.setdefault("name", f"annotated_{layer.name}")
        super().__init__(layer, **kwargs)

    def call(self, inputs, training=None):
        arguments = {"training": training} if self.layer._call_has_training_arg else {}
        return self.layer(inputs, **arguments)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)


def quantize_annotate_layer(layer: keras.layers.Layer) -> QuantizeAnnotate:
    """Marks one layer to be quantized by `quantize_apply`; the layers not marked stay in float.

    Example:
        >>> model = keras.Sequential([keras.Input((28, 28, 1)), quantize_annotate_layer(keras.layers.Conv2D(8, 3)),
        ...                           keras.layers.Flatten()])
        >>> q = quantize_apply(model)
    """
    if isinstance(layer, keras.Model):
        raise ModelError(f"'{layer.name}' is a model. Mark it with quantize_annotate_model, or mark its layers.")
    return QuantizeAnnotate(layer)


def quantize_annotate_model(model: keras.Model) -> keras.Model:
    """A copy of a functional or sequential model with every layer marked."""
    return _clone(model, lambda layer: layer if isinstance(layer, QuantizeAnnotate) else QuantizeAnnotate(layer))


def quantize_apply(model: keras.Model, scheme: str | Scheme = "w8a8", **options) -> QuantizedModel:
    """Quantizes the marked layers of an annotated model, and no others.

    Args:
        model: has layers marked by `quantize_annotate_layer` or `quantize_annotate_model`.
        scheme: as for `quantize_model`, like the other options.

    Raises:
        ModelError: no layer is marked.
    """
    marked = {
        node.path.removesuffix(node.layer.name) + node.layer.layer.name
        for node in graphs.read(model).nodes
        if isinstance(node.layer, QuantizeAnnotate)
    }
    if not marked:
        raise ModelError(
            f"Model '{model.name}' has no annotated layer. Mark layers with quantize_annotate_layer, or quantize "
            "the whole model with quantize_model."
        )
    plain = _clone(model, lambda layer: layer.layer if isinstance(layer, QuantizeAnnotate) else layer)
    unmarked = [node.path for node in graphs.read(plain).nodes if node.path.partition("@")[0] not in marked]
    return quantize_model(plain, scheme, exclude=(*options.pop("exclude", ()), *unmarked), **options)


def _is_input(layer) -> bool:
    return isinstance(layer, keras.layers.InputLayer)


def _clone(model, convert):
    """Clones a model, nested ones included, passing a copy of each layer through `convert`; the weights are kept."""

    def clone_layer(layer):
        copy = layer.__class__.from_config(layer.get_config())
        return copy if _is_input(layer) else convert(copy)

    clone = keras.models.clone_model(model, clone_function=clone_layer, recursive=True)
    clone.set_weights(model.get_weights())
    return clone


# ------------------------------------------------------------------ and back


def strip(model: QuantizedModel) -> keras.Model:
    """The float model, as it was given to `quantize_model`, with the trained master weights.

    Args:
        model: a quantized model; it is left untouched.

    Returns:
        A new model of the original architecture: no wrapper, no fake quantization.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__} '{model.name}'.")
    float_model = _rebuild(model._float_config, model._names)
    trained = {node: layer for wrapper in model.operators.values() for node, layer in _wrapped(wrapper)}
    graph = graphs.read(float_model, expand, model._options["input_shape"])
    pinned = graph.inputs if model._options["input_range"] else ()
    for node in lower(graph, pinned, model.plan.scheme.activations.bits).nodes:
        for source, variable in zip(node.sources, trained[node.path].weights if node.sources else (), strict=True):
            source.assign(variable)
    return float_model


def resize(model: QuantizedModel, input_shape) -> QuantizedModel:
    """A fully convolutional quantized model for inputs of another size, with the same weights and ranges.

    Args:
        model: quantized from a float model that leaves sizes open, such as `keras.Input((None, None, 3))`.
        input_shape: as for `quantize_model`.

    Raises:
        ModelError: the float model fixes its sizes, or has weights that depend on them.
    """
    resized = quantize_model(strip(model), **model._options | {"input_shape": input_shape}, name=model.name)
    shapes = [[tuple(weight.shape) for weight in twin.weights] for twin in (model, resized)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"Model '{model.name}' has weights that depend on the size of its input; it has to stay.")
    resized.set_weights(model.get_weights())
    return resized


def _wrapped(wrapper: QuantizeWrapper):
    """The layers inside a wrapper with the paths of their nodes."""
    operator = wrapper.operator
    yield operator.name, wrapper.layer
    if operator.batch_norm:
        yield operator.batch_norm, wrapper.batch_norm
    if operator.activation:
        yield operator.activation, wrapper.activation
