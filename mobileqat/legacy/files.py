"""Keras 2 model files, read without Keras 2: the configuration, and the weights for the layers made from it.

    .h5      model_config as JSON; one group of named weights per layer, nested models flattened
    .keras   a zip of config.json and model.weights.h5; groups by class and number, numbered weights

SavedModels, and `.keras` files of models that TFMOT has annotated, are first made `.h5` files by `tf_keras`.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from mobileqat.errors import ModelError
from mobileqat.legacy.translate import QUANTIZE_LAYER, WRAPPERS, Part, Translation
from mobileqat.models.archive import check_model_file

# Variables of Keras 3 that other names belong to in Keras 2.
RENAMED_VARIABLES = {"depthwise_kernel": "kernel"}
# What TFMOT's wrappers and QuantizeLayers keep beside the weights of the layers.
OF_TFMOT = re.compile(r"optimizer_step|.*_(min|max)")
# State of random generators, which inference does not use.
OF_RANDOM = ("seed_generator", "_random_generator", "random_generator")


def read_config(path: Path) -> dict:
    """The configuration of the model in an `.h5` or `.keras` file.

    Raises:
        ModelError: a file that is missing, broken, or holds weights only.
    """
    if path.exists():
        check_model_file(path, looks_for_code=False)
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
        else:
            with h5py.File(path, "r") as file:
                if "model_config" not in file.attrs:
                    raise ModelError(
                        f"'{path}' holds weights without a model. Load them into the model they belong to with "
                        "tf_keras, and save the whole model."
                    )
                config = json.loads(file.attrs["model_config"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"'{path}' cannot be read as a Keras 2 model: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{path}' cannot be read as a Keras 2 model: its configuration is not a mapping.")
    return config


def entries(config: dict) -> Iterator[dict]:
    """The layers of a model's configuration, those of nested models and inside wrappers included."""
    inner = config.get("config")
    layers = inner if isinstance(inner, list) else (inner or {}).get("layers", ())
    wrapped = [] if isinstance(inner, list) else [inner.get(key) for key in ("layer", "backward_layer") if inner]
    for entry in (*layers, *(entry for entry in wrapped if isinstance(entry, dict))):
        yield entry
        yield from entries(entry)


def is_keras_3(config: dict) -> bool:
    """Whether Keras 3 wrote a configuration: it names shapes `batch_shape` and calls `{"args": ..., "kwargs": ...}`."""
    return any(
        "batch_shape" in (entry.get("config") or {}) or any("args" in node for node in entry.get("inbound_nodes") or ())
        for entry in entries(config)
    )


@contextmanager
def open_weights(path: Path) -> Iterator[h5py.Group]:
    """The group that holds a file's weights.

    Raises:
        ModelError: a file that is broken, or where what is read from the group is not as Keras 2 writes it.
    """
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                content = io.BytesIO(archive.read("model.weights.h5"))
            with h5py.File(content, "r") as file:
                yield file
        else:
            with h5py.File(path, "r") as file:
                yield file["model_weights"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"The weights in '{path}' cannot be read: {error}") from error


def load_weights(path: Path, translation: Translation) -> int:
    """Loads a file's weights into the model made from its configuration; returns how many arrays.

    Raises:
        ModelError: weights that are missing, or of another shape.
    """
    loader = _Loader(path, translation)
    with open_weights(path) as group:
        if path.suffix == ".keras":
            loader.load_numbered(translation.model, group, "")
        else:
            for part in translation.parts[id(translation.model)]:
                loader.load_named(part, group)
    for parts in translation.parts.values():
        for part in parts:
            if isinstance(part.made, keras.layers.Normalization):
                part.made.finalize_state()  # its statistics are used through tensors made of the variables
    missing = [v.path for v in translation.model.weights if v.path not in loader.loaded]
    if missing:
        raise ModelError(f"'{path}' has no values for {len(missing)} weights: {', '.join(missing[:5])}.")
    return len(loader.loaded)


def named_weights(group: h5py.Group, layer: str) -> dict[str, np.ndarray]:
    """The weights of one layer of an `.h5` file, by name and in order."""
    if layer not in group:
        return {}
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in group[layer].attrs["weight_names"]]
    return {name: np.asarray(group[layer][name]) for name in names}


def variable_name(name: str) -> str:
    """`quant_conv/kernel_min:0` -> `kernel_min`."""
    return name.split("/")[-1].split(":")[0]


class _Loader:
    def __init__(self, path: Path, translation: Translation):
        self.path = path
        self.translation = translation
        self.loaded: set[str] = set()

    # -------------------------------------------------------------- .h5

    def load_named(self, part: Part, group: h5py.Group) -> None:
        if part.class_name == QUANTIZE_LAYER or not isinstance(part.made, keras.layers.Layer):
            return
        stored = named_weights(group, part.name)
        if part.class_name in WRAPPERS:
            stored = {name: array for name, array in stored.items() if not OF_TFMOT.fullmatch(variable_name(name))}
        layer = part.made
        # Keras 2 lists what is trained first, those of nested models too.
        variables = [*layer.trainable_weights, *layer.non_trainable_weights]
        pairs = _by_name(variables, stored) or list(zip(variables, stored.values(), strict=False))
        fits = len(variables) == len(stored) and all(tuple(v.shape) == array.shape for v, array in pairs)
        if not fits:
            expected = [f"{v.path} {tuple(v.shape)}" for v in variables]
            received = [f"{name} {array.shape}" for name, array in stored.items()]
            raise ModelError(
                f"The weights of '{part.name}' in '{self.path}' do not fit it. Expected: {', '.join(expected)}. "
                f"Received: {', '.join(received) or 'none'}."
            )
        for variable, array in pairs:
            self._assign(variable, array)

    # -------------------------------------------------------------- .keras

    def load_numbered(self, layer: Any, group: h5py.Group, where: str) -> None:
        """Loads a group whose parts are named by attributes of the layer, and a model's layers by class and number."""
        own = group.get("vars", {})
        if len(own):
            variables = layer._trainable_variables + layer._non_trainable_variables
            if len(variables) != len(own) or any(
                tuple(v.shape) != own[str(index)].shape for index, v in enumerate(variables)
            ):
                raise ModelError(f"The weights of '{where}' in '{self.path}' do not fit layer '{layer.name}'.")
            for index, variable in enumerate(variables):
                self._assign(variable, np.asarray(own[str(index)]))
        for name in group:
            if name in ("vars", *OF_RANDOM) or not isinstance(group[name], h5py.Group):
                continue
            if id(layer) in self.translation.parts:
                is_container = name in ("layers", "_layer_checkpoint_dependencies")
                rows = self.translation.parts[id(layer)] if is_container else []
                members = [(part.class_name, part.made) for part in rows]
            elif isinstance(attribute := getattr(layer, name, None), (list, tuple)):
                members = [(type(member).__name__, member) for member in attribute]
            else:
                members = []
                if isinstance(attribute, keras.layers.Layer):
                    self.load_numbered(attribute, group[name], f"{where}/{name}")
            for key, member in _container_names(members):
                if key in group[name] and isinstance(member, keras.layers.Layer):
                    self.load_numbered(member, group[name][key], f"{where}/{key}")

    def _assign(self, variable, array: np.ndarray) -> None:
        variable.assign(array)
        self.loaded.add(variable.path)


def _by_name(variables, stored: dict[str, np.ndarray]) -> list[tuple[Any, np.ndarray]] | None:
    """Variables with their arrays by "layer/variable", None where such names are not the same on both sides."""
    arrays = {_key(name): array for name, array in stored.items()}
    keys = [_key(variable.path) for variable in variables]
    if len(arrays) != len(stored) or sorted(keys) != sorted(arrays):
        return None
    return [(variable, arrays[key]) for variable, key in zip(variables, keys, strict=True)]


def _key(name: str) -> str:
    owner, _, variable = name.split(":")[0].rpartition("/")
    return f"{owner.split('/')[-1]}/{RENAMED_VARIABLES.get(variable, variable)}"


def _container_names(members: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The names that Keras 2 gives the members of a list, from their classes: "conv2d", "conv2d_1", ... in order."""
    counts: dict[str, int] = {}
    for class_name, member in members:
        name = _snake_case("Functional" if class_name == "Model" else class_name)
        number = counts.get(name, 0)
        counts[name] = number + 1
        yield (f"{name}_{number}" if number else name), member


def _snake_case(name: str) -> str:
    name = re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def holds_wrappers(config: dict) -> bool:
    """Whether TFMOT has annotated or quantized a model."""
    return any(entry.get("class_name") in (*WRAPPERS, QUANTIZE_LAYER) for entry in entries(config))


def is_quantized(config: dict) -> bool:
    """Whether TFMOT has quantized a model, not only annotated it."""
    return any(entry.get("class_name") in (*WRAPPERS[1:], QUANTIZE_LAYER) for entry in entries(config))
