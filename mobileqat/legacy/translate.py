"""Keras 2 configurations as Keras 3 layers and models: what changed its name, its default or its meaning, in tables.

Nothing here runs what a file holds: classes come from `keras.layers`, functions from `operators`, and code inside a
configuration (a Lambda layer, a pickled function) is refused.  All refusals are collected before anything is wired.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

from mobileqat.errors import ModelError, UnsupportedModelError
from mobileqat.legacy.operators import OPERATORS, decode, slices

MODELS = ("Functional", "Model", "Sequential")
WRAPPERS = ("QuantizeAnnotate", "QuantizeWrapper", "QuantizeWrapperV2")
QUANTIZE_LAYER = "QuantizeLayer"
OPERATOR_LAYERS = ("TFOpLambda", "SlicingOpLambda")

# Classes that have another name today.
RENAMED = {"SyncBatchNormalization": "BatchNormalization"}
NOT_IN_KERAS_2 = ("FlaxLayer", "JaxLayer", "Layer", "TFSMLayer", "TorchModuleWrapper", "Wrapper")

# Classes that cannot be translated, with what to do about each.
REFUSED = {
    "Lambda": "holds Python code. Replace it by layers or operators, and save the model again",
    "TensorFlowOpLayer": "was saved by TensorFlow before 2.4. Load and save it with tf_keras once",
    "LocallyConnected1D": "left Keras. Replace it by a convolution",
    "LocallyConnected2D": "left Keras. Replace it by a convolution",
    "ThresholdedReLU": "left Keras. Replace it by ReLU(threshold=...)",
    "CuDNNGRU": "left Keras. Load and save the model with GRU instead",
    "CuDNNLSTM": "left Keras. Load and save the model with LSTM instead",
    "DenseFeatures": "left Keras. Feed the model the features it makes",
}

# Options of Keras 2 that change nothing in what a layer computes at inference, or that weights make up for.
IGNORED = {
    *("batch_input_shape", "input_shape", "input_dtype", "input_length", "build_config", "dynamic"),
    *("query_shape", "key_shape", "value_shape", "softmax_robust_masking", "robust_masking"),
    *("fused", "force_generator", "implementation", "rng_type", "sparse"),
}
# An option that Keras 3 lacks may be left out where it says nothing: no groups, no renormalization, no mask.
NEUTRAL = (None, False, 1)
RENAMED_OPTIONS = {("LeakyReLU", "alpha"): "negative_slope"}
# Options that old files leave out, where the default has changed since.
OLD_DEFAULTS = {"GRU": {"reset_after": False}, "GRUCell": {"reset_after": False}}

ACTIVATIONS = {
    *("elu", "exponential", "gelu", "leaky_relu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softplus", "softsign", "swish", "tanh"),
}
RENAMED_ACTIVATIONS = {"softmax_v2": "softmax"}
REGULARIZERS = ("L1", "L1L2", "L2", "OrthogonalRegularizer")
CONSTRAINTS = ("MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm")


@dataclass(eq=False)
class Translation:
    """A Keras 3 model made from a Keras 2 configuration, with its initial weights.

    Attributes:
        model: the model.
        parts: layers of every model in it, by model: entries of the configuration, in its order, each with the name
            and the class that it has there.
    """

    model: Any = None
    parts: dict[int, list[Part]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """One entry of a model's configuration; `made` is a layer, a model or a function of tensors."""

    name: Any
    class_name: str
    made: Any
    nodes: tuple


def translate(config: dict, source: str) -> Translation:
    """Makes the Keras 3 model that a Keras 2 configuration describes.

    Args:
        config: `{"class_name": ..., "config": ...}` of a functional or sequential model; TFMOT's wrappers are taken
            off and its QuantizeLayers left out.
        source: the file, for messages.

    Raises:
        UnsupportedModelError: layers, operators or options without an equivalent, all of them with what to do.
        ModelError: the configuration is not that of a model, or its layers do not fit together.
    """
    translator = _Translator(source)
    try:
        model = translator.model(config, "")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ModelError(f"The configuration in '{source}' is damaged: {_first_line(error)}") from error
    if translator.problems:
        count = len(translator.problems)
        lines = "\n".join(f"  - {problem}" for problem in translator.problems)
        raise UnsupportedModelError(f"'{source}' cannot be imported into Keras 3, {count} places:\n{lines}")
    translator.result.model = model
    return translator.result


class _Translator:
    def __init__(self, source: str):
        self.source = source
        self.problems: list[str] = []
        self.result = Translation()

    # -------------------------------------------------------------- models

    def model(self, entry: dict, prefix: str) -> keras.Model | None:
        """A model from its entry; None when there are problems, which are noted."""
        config = entry.get("config")
        if entry.get("class_name") not in MODELS or not isinstance(config, (dict, list)):
            raise ModelError(
                f"'{self.source}' holds a {entry.get('class_name')}. Expected a functional or sequential model: a "
                "subclassed one has no configuration to rebuild it from."
            )
        # Sequential models of before TensorFlow 1.10 are a bare list of layers.
        config = config if isinstance(config, dict) else {"layers": config}
        parts = [self._part(layer, prefix) for layer in config["layers"]]
        if self.problems:
            return None
        try:
            if entry["class_name"] == "Sequential":
                model = self._sequential(config, parts)
            else:
                model = self._functional(config, parts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            where = f"model '{prefix.rstrip('/')}' of " if prefix else ""
            raise ModelError(
                f"The layers of {where}'{self.source}' do not fit together: {_first_line(error)}"
            ) from error
        model.trainable = config.get("trainable", True)
        self.result.parts[id(model)] = parts
        return model

    def _part(self, entry: dict, prefix: str) -> Part:
        class_name, config = entry["class_name"], entry.get("config") or {}
        name = entry.get("name") or config.get("name")
        nodes = tuple(entry.get("inbound_nodes") or ())
        return Part(name, class_name, self._make(entry, f"{prefix}{name}", nodes), nodes)

    def _make(self, entry: dict, path: str, nodes: tuple = ()):
        """The layer, model or function of an entry; what cannot be made is noted and gives None."""
        class_name, config = entry["class_name"], entry.get("config") or {}
        if class_name in MODELS:
            return self.model(entry, f"{path}/")
        if class_name in WRAPPERS:
            return self._make(config["layer"], path)
        if class_name == QUANTIZE_LAYER:
            return lambda inputs: inputs
        if class_name == "InputLayer":
            return self._input(config, path)
        if class_name in OPERATOR_LAYERS:
            return self._operator(config.get("function"), path, nodes)
        return self._layer(entry, path)

    def _input(self, config: dict, path: str):
        if config.get("ragged"):
            return self._refuse(path, "InputLayer", "is ragged. Pad the data, and use a dense input")
        shape = config.get("batch_input_shape", config.get("batch_shape"))
        if shape is None:
            return self._refuse(path, "InputLayer", "has no shape. Build the model before it is saved")
        return keras.Input(batch_shape=shape, dtype=config.get("dtype") or "float32", name=config.get("name"))

    def _functional(self, config: dict, parts: list[Part]) -> keras.Model:
        tensors = _wire(config, parts)
        inputs, outputs = (_structure(config[key], tensors) for key in ("input_layers", "output_layers"))
        return keras.Model(inputs, outputs, name=config.get("name"))

    def _sequential(self, config: dict, parts: list[Part]) -> keras.Model:
        first = config["layers"][0]
        options = first.get("config") or {}
        if first["class_name"] == "InputLayer":
            layers = [part.made for part in parts]
        else:
            while "layer" in options and "batch_input_shape" not in options:
                options = options["layer"]["config"]
            shape = options.get("batch_input_shape", config.get("build_input_shape"))
            if shape is None:
                raise ModelError(
                    f"Sequential model '{config.get('name')}' of '{self.source}' does not say the shape of its input. "
                    "Load it with tf_keras, call it once on data and save it again."
                )
            layers = [keras.Input(batch_shape=shape, dtype=_dtype_name(options.get("dtype"))), *(p.made for p in parts)]
        kept = [layer for layer in layers if not inspect.isfunction(layer)]
        return keras.Sequential(kept, name=config.get("name"))

    # -------------------------------------------------------------- layers

    def _operator(self, function: Any, path: str, nodes: tuple):
        if function == "__operators__.getitem":
            return slices
        operator = OPERATORS.get(str(function).removeprefix("compat.v1."))
        if operator is None:
            return self._refuse(path, f"tf.{function}", "has no equivalent in the table. Replace it by Keras layers")
        for node in nodes:
            _, options = _read_node(node)
            try:
                inspect.signature(operator).bind(None, **options)
            except TypeError as error:
                return self._refuse(path, f"tf.{function}", f"is called in a way that cannot be translated: {error}")
        return operator

    def _layer(self, entry: dict, path: str) -> Any:
        class_name, config = entry["class_name"], dict(entry.get("config") or {})
        if class_name in REFUSED:
            return self._refuse(path, class_name, REFUSED[class_name])
        layer_class = _layer_class(class_name)
        if layer_class is None:
            known_as = entry.get("registered_name") or class_name
            return self._refuse(path, known_as, "is not a Keras layer. Replace it, or rebuild the model in Keras 3")
        found = len(self.problems)
        trainable = config.pop("trainable", True)
        options = dict(self._options(layer_class, class_name, config, path))
        if len(self.problems) > found:
            return None
        try:
            layer = layer_class(**options)
        except (TypeError, ValueError) as error:
            return self._refuse(path, class_name, f"is refused by Keras 3: {_first_line(error)}")
        layer.trainable = trainable
        return layer

    def _options(self, layer_class: type, class_name: str, config: dict, path: str) -> Iterator[tuple[str, Any]]:
        accepted = _accepted(layer_class)
        settings: dict[str, Any] = OLD_DEFAULTS.get(class_name, {}) | config
        for old_key, value in settings.items():
            key = RENAMED_OPTIONS.get((class_name, old_key), old_key)
            if key in IGNORED or key.endswith("_initializer"):
                continue
            if key not in accepted:
                if not any(value is neutral for neutral in NEUTRAL):
                    self._refuse(path, class_name, f"has {key}={value!r}, which Keras 3 lacks")
                continue
            yield key, self._option(key, value, class_name, path)

    def _option(self, key: str, value: Any, class_name: str, path: str):
        if key == "name":
            return value.replace("/", "_")  # Keras 3 joins paths with slashes
        if key == "dtype":
            return _dtype_name(value)
        if key in ("activation", "recurrent_activation"):
            return self._activation(value, class_name, path)
        if key.endswith("_regularizer"):
            return self._by_name(keras.regularizers, REGULARIZERS, value, class_name, path)
        if key.endswith("_constraint"):
            return self._by_name(keras.constraints, CONSTRAINTS, value, class_name, path)
        if key in ("layer", "backward_layer", "cell") and isinstance(value, dict):
            return self._make(value, f"{path}/{(value.get('config') or {}).get('name', key)}")
        if key == "cells":
            return [self._make(cell, f"{path}/{key}") for cell in value]
        if class_name.endswith("BatchNormalization") and key == "axis" and isinstance(value, (list, tuple)):
            return value[0] if len(value) == 1 else self._refuse(path, class_name, f"normalizes several axes: {value}")
        return decode(value)

    def _activation(self, value: Any, class_name: str, path: str) -> Any:
        if isinstance(value, dict):
            inner: Any = value.get("class_name")
            config: Any = value.get("config")
            if inner == "NoOpActivation":
                return "linear"
            if inner == "QuantizeAwareActivation":
                return self._activation(config["activation"], class_name, path)
            if inner == "function":
                return self._activation(config, class_name, path)
            return self._layer(value, f"{path}/activation")
        if value is None:
            return None
        name: Any = RENAMED_ACTIVATIONS.get(value, value)
        if name == "hard_sigmoid":
            problem = "uses hard_sigmoid, which is another function in Keras 3. Train it with sigmoid instead"
            return self._refuse(path, class_name, problem)
        if name not in ACTIVATIONS:
            return self._refuse(
                path, class_name, f"has activation {value!r}, which Keras 3 lacks. Use a Keras activation"
            )
        return name

    def _by_name(self, module, names: tuple[str, ...], value, class_name: str, path: str):
        """A regularizer or constraint from its entry, `{"class_name": ..., "config": ...}`, or its short name."""
        if value is None:
            return None
        entry = value if isinstance(value, dict) else {"class_name": value, "config": {}}
        known = {name.lower(): name for name in names}
        name = known.get(str(entry.get("class_name")).replace("_", "").lower())
        if name is None:
            problem = f"has a {entry.get('class_name')}, which is not Keras's. Remove it: it is of no use once trained"
            return self._refuse(path, class_name, problem)
        return getattr(module, name)(**decode(entry.get("config") or {}))

    def _refuse(self, path: str, class_name: str, problem: str) -> None:
        self.problems.append(f"{path} ({class_name}): {problem}.")


def _layer_class(name: str) -> Any:
    """The class of a Keras 2 layer; those that Keras 3 brought, some of which run code, are none."""
    found = getattr(keras.layers, RENAMED.get(name, name), None)
    is_layer = inspect.isclass(found) and issubclass(found, keras.layers.Layer)
    return found if is_layer and name not in NOT_IN_KERAS_2 else None


def _accepted(layer_class: type) -> set[str]:
    """Names of the options that a layer class takes, itself or by handing them on to its bases."""
    names: set[str] = set()
    for base in layer_class.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        names |= {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        if parameters and "kwargs" not in parameters:
            break
    return names - {"self"}


def _dtype_name(value) -> str | None:
    """The name of a dtype policy, however it was saved."""
    return value.get("config", {}).get("name") if isinstance(value, dict) else value


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# ------------------------------------------------------------------ wiring

Tensors = dict[tuple[str, int], Any]  # (entry, call) -> what it returned


def _wire(config: dict, parts: list[Part]) -> Tensors:
    """Calls every part on its inputs, in an order in which they are known."""
    tensors: Tensors = {(part.name, 0): part.made for part in parts if part.class_name == "InputLayer"}
    first_calls = _first_calls(config, parts)
    waiting = [
        (part, first_calls.get(part.name, 0) + index, *_read_node(node))
        for part in parts
        for index, node in enumerate(part.nodes)
    ]
    while waiting:
        left = []
        for call in waiting:
            part, index, first, options = call
            if all(key in tensors for key in _references((first, options))):
                tensors[part.name, index] = _call(part, index, _resolve(first, tensors), _resolve(options, tensors))
            else:
                left.append(call)
        if len(left) == len(waiting):
            names = ", ".join(sorted({part.name for part, *_ in left}))
            raise ValueError(f"the inputs of {names} are not made by any layer")
        waiting = left
    return tensors


def _call(part: Part, index: int, first, options: dict):
    is_layer = not inspect.isfunction(part.made)
    if is_layer:
        options = {key: value for key, value in options.items() if value is not None}
        # Keras 2 writes a call on one tensor as one on a list of one.
        first = first[0] if isinstance(first, list) and len(first) == 1 else first
        if isinstance(part.made, (keras.layers.RNN, keras.layers.Bidirectional)) and isinstance(first, list):
            first, options = first[0], options | {"initial_state": first[1:]}
    try:
        made = part.made(first, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{part.name}' ({part.class_name}): {_first_line(error)}") from error
    if not is_layer:
        _name_operations(made, (first, options), f"{part.name}_{index}" if index else part.name)
    return made


def _name_operations(outputs, inputs, name: str) -> None:
    """Names the Keras operations between tensors: the names they give themselves may be those of layers."""
    known = {id(tensor) for tensor in keras.tree.flatten(inputs)}
    found: dict[int, Any] = {}
    waiting = [tensor for tensor in keras.tree.flatten(outputs) if id(tensor) not in known]
    while waiting:
        history = waiting.pop(0)._keras_history
        found.setdefault(id(history.operation), history.operation)
        sources = history.operation._inbound_nodes[history.node_index].input_tensors
        waiting += [tensor for tensor in sources if id(tensor) not in known]
    for number, operation in enumerate(found.values()):
        operation.name = f"{name}_{number}" if number else name


def _first_calls(config: dict, parts: list[Part]) -> dict[str, int]:
    """The number of each model's first call: Keras 2 counts the making of a nested model as one, but not always."""
    read = [_read_node(node) for part in parts for node in part.nodes]
    used = [*_references(read), *_references(_as_references(config.get("output_layers")))]
    nested = {part.name for part in parts if part.class_name in MODELS}
    return {name: min(index for other, index in used if other == name) for name in nested & {name for name, _ in used}}


@dataclass(frozen=True)
class _Reference:
    """One output of one call of one entry."""

    name: str
    call: int
    output: int


def _is_reference(value) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and type(value[1]) is type(value[2]) is int
    )


def _read_node(node) -> tuple[Any, dict]:
    """The first argument of a call, with references in place of tensors, and its keyword arguments."""
    options: dict[str, Any] = {}

    def read(value):
        if isinstance(value, (list, tuple)) and value and value[0] == "_CONSTANT_VALUE":
            options.update(value[3])
            return decode(value[2])
        if _is_reference(value):
            options.update(value[3] if len(value) == 4 else {})
            return _Reference(*value[:3])
        if isinstance(value, dict):
            return {key: read(entry) for key, entry in value.items()}
        return [read(entry) for entry in value]

    first = read(node)
    options.pop("name", None)
    return first, {key: decode(_as_references(value)) for key, value in options.items()}


def _as_references(value):
    """A structure with references in place of what denotes them."""
    if _is_reference(value):
        return _Reference(*value[:3])
    if isinstance(value, dict):
        return {key: _as_references(entry) for key, entry in value.items()}
    return [_as_references(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _references(value) -> Iterator[tuple[str, int]]:
    if isinstance(value, _Reference):
        yield value.name, value.call
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _references(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _references(entry)


def _resolve(value, tensors: Tensors):
    """A structure with tensors in place of references."""
    if isinstance(value, _Reference):
        made = tensors[value.name, value.call]
        return made[value.output] if isinstance(made, (list, tuple)) else made
    if isinstance(value, dict):
        return {key: _resolve(entry, tensors) for key, entry in value.items()}
    return [_resolve(entry, tensors) for entry in value] if isinstance(value, list) else value


def _structure(value, tensors: Tensors):
    """Inputs or outputs of a model; a list of one is a single tensor, as Keras 2 writes it."""
    resolved = _resolve(_as_references(value), tensors)
    return resolved[0] if isinstance(resolved, list) and len(resolved) == 1 else resolved
