"""Reference models by name, and loading the user's own: every way a run can come by its float model.

Reference models take raw integer samples (pixels 0..255): their first BatchNormalization does the scaling, so that
the input's grid holds the data exactly.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mobileqat.errors import ModelError
from mobileqat.models.archive import check_model_file
from mobileqat.models.mobilenets import mobilenet_v2, mobilenet_v3_small

if TYPE_CHECKING:
    import keras

Shape = tuple[int, ...]


def _conv_bn_relu(x, layer, name: str):
    import keras

    x = layer(x)
    # Keras's momentum of 0.99 needs hundreds of steps to follow; small datasets have a few dozen per epoch.
    x = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def dscnn(
    input_shape: Shape,
    classes: int,
    filters: int = 32,
    blocks: int = 3,
    kernel_size: int | Sequence[int] = 3,
    strides: int | Sequence[int] = 1,
) -> keras.Model:
    """DS-CNN (Zhang et al. 2017, "Hello Edge"): a convolution and depthwise separable blocks.

    `kernel_size` and `strides` are the first convolution's; for speech, (10, 4) and 2.
    """
    from keras import Input, Model, layers

    inputs = Input(input_shape, name="image")
    x = _conv_bn_relu(inputs, layers.Conv2D(filters, kernel_size, strides, "same", use_bias=False, name="conv"), "conv")
    for index in range(1, blocks + 1):
        name = f"depthwise_{index}"
        x = _conv_bn_relu(x, layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=name), name)
        name = f"pointwise_{index}"
        x = _conv_bn_relu(x, layers.Conv2D(filters, 1, use_bias=False, name=name), name)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    return Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(x), name="dscnn")


def resnet8(input_shape: Shape, classes: int, filters: int = 16, l2: float = 1e-4) -> keras.Model:
    """ResNet8 of MLPerf Tiny's image classification benchmark (Banbury et al. 2021), three residual stacks."""
    from keras import Input, Model, layers, regularizers

    def conv(count, size, strides, name):
        regularizer = regularizers.L2(l2) if l2 else None
        return layers.Conv2D(
            count,
            size,
            strides,
            "same",
            kernel_initializer="he_normal",
            kernel_regularizer=regularizer,
            name=name,
        )

    inputs = Input(input_shape, name="image")
    x = _conv_bn_relu(inputs, conv(filters, 3, 1, "conv"), "conv")
    for stack in range(3):
        count, strides, name = filters * 2**stack, 1 if stack == 0 else 2, f"stack{stack + 1}"
        y = _conv_bn_relu(x, conv(count, 3, strides, f"{name}_conv1"), f"{name}_conv1")
        y = layers.BatchNormalization(momentum=0.9, name=f"{name}_conv2_bn")(conv(count, 3, 1, f"{name}_conv2")(y))
        if stack:
            x = conv(count, 1, strides, f"{name}_shortcut")(x)
        x = layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.AveragePooling2D(x.shape[1:3], name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    outputs = layers.Dense(classes, activation="softmax", kernel_initializer="he_normal", name="classes")(x)
    return Model(inputs, outputs, name="resnet8")


# Output channels at alpha = 1 and stride of MobileNetV1's separable blocks (Howard et al. 2017, table 1).
_MOBILENET_V1_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


def mobilenet_v1(
    input_shape: Shape, classes: int, alpha: float = 0.25, first_stride: int = 1, dropout: float = 0.1
) -> keras.Model:
    """MobileNetV1 (Howard et al. 2017), by default with stride 1 in the first convolution for small images."""
    from keras import Input, Model, layers

    def channels(count: int) -> int:
        return max(8, int(count * alpha) // 8 * 8)

    inputs = Input(input_shape, name="image")
    stem = layers.Conv2D(channels(32), 3, first_stride, "same", use_bias=False, name="conv")
    x = _conv_bn_relu(inputs, stem, "conv")
    for index, (count, strides) in enumerate(_MOBILENET_V1_BLOCKS, 1):
        name = f"depthwise_{index}"
        x = _conv_bn_relu(x, layers.DepthwiseConv2D(3, strides, "same", use_bias=False, name=name), name)
        name = f"pointwise_{index}"
        x = _conv_bn_relu(x, layers.Conv2D(channels(count), 1, use_bias=False, name=name), name)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    return Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(x), name="mobilenet_v1")


MODELS: dict[str, Callable[..., Any]] = {
    "dscnn": dscnn,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": mobilenet_v3_small,
    "resnet8": resnet8,
}


def build_model(name: str, input_shape: Shape, classes: int, args: dict[str, Any] | None = None) -> keras.Model:
    """Builds a model.

    Args:
        name: a reference model's name, or `module:function`; the function is called with `args`, and with
            `input_shape` and `classes` if it takes parameters of those names.
        input_shape: of one sample.
        classes: number of classes.
        args: further keyword arguments.

    Raises:
        ModelError: no such model or function, arguments it does not take, or a result that is no Keras model.
    """
    import keras

    model = call_function(name, input_shape, classes, args)
    if not isinstance(model, keras.Model):
        raise ModelError(f"Model function '{name}' must return a Keras 3 model. Received: {type(model).__name__}")
    return model


def call_function(name: str, input_shape: Shape, classes: int, args: dict[str, Any] | None = None) -> Any:
    """What a model function returns, whatever it is; arguments and errors as of `build_model`."""
    function = _import_function(name) if ":" in name else _reference(name)
    given = {"input_shape": tuple(input_shape), "classes": classes}
    takes = inspect.signature(function).parameters
    arguments = {key: value for key, value in given.items() if key in takes} | (args or {})
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            f"Model '{name}' does not take these arguments: {error}. It takes: {', '.join(takes)}."
        ) from None
    try:
        return function(**arguments)
    except Exception as error:  # whatever the user's code raises, the cause stays attached for --debug
        raise ModelError(f"Model function '{name}' raised {type(error).__name__}: {error}") from error


def _reference(name: str) -> Callable[..., Any]:
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ModelError(f"Unknown model '{name}'. Expected one of {', '.join(MODELS)}, or module:function.{hint}")


def _import_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(_import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"Model function '{name}' cannot be imported: {error}. Modules are looked for in the working directory, "
            f"{os.getcwd()}, and among the installed packages."
        ) from error
    if not callable(function):
        raise ModelError(f"Model function '{name}' is not callable. Received: {type(function).__name__}")
    return function


def _import_module(name: str) -> ModuleType:
    folder = os.getcwd()
    # A user's module beside the recipe is importable, as it is for `python -m`.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


@contextmanager
def own_classes(name: str | None) -> Iterator[None]:
    """Lets Keras find the layers that a module of the user defines or imports, registered or not, while files are read.

    Args:
        name: a module, or `module:function`; a reference model's name and None have no classes of their own.

    Raises:
        ModelError: the module, or the function in it, cannot be imported.
    """
    import keras

    if name is None or name in MODELS:
        yield
        return
    if ":" in name:
        _import_function(name)
    try:
        module = _import_module(name.partition(":")[0])
    except ImportError as error:
        raise ModelError(f"Module '{name}' cannot be imported: {error}.") from error
    classes = {
        value.__name__: value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, keras.Layer) and value.__module__.split(".")[0] != "keras"
    }
    with keras.saving.custom_object_scope(classes):
        yield


def load_model(path: str | Path, build: Callable[[], keras.Model] | None = None) -> keras.Model:
    """Loads a Keras model, or weights into a model built for them.

    Args:
        path: a `.keras` or `.h5` file. A file that holds weights only needs `build`.
        build: makes the model that a weights file belongs to.

    Raises:
        ModelError: a file that is missing, truncated, not Keras's, unsafe to load (see `archive`), holds NaN weights,
            or whose weights do not fit the model.
    """
    import keras

    # Registers the classes that a quantized model's file names.
    importlib.import_module("mobileqat.quantize")
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no file '{path}'. Expected a .keras or .h5 model or weights file.")
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise ModelError(f"'{path}' is not a .keras or .h5 file.")
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        raise ModelError(f"'{path}' is empty, truncated or not written by Keras 3: a .keras file is a zip archive.")
    check_model_file(path)
    try:
        if _holds_weights_only(path):
            if build is None:
                raise ModelError(f"'{path}' holds weights without a model. Load them into the model they belong to.")
            model = build()
            model.load_weights(path)
        else:
            model = keras.models.load_model(path, compile=False, safe_mode=True)
    except ModelError:
        raise
    except Exception as error:  # a wrong configuration makes Keras and TensorFlow raise whatever they like
        if "safe_mode" in str(error) or "unsafe" in str(error):
            raise ModelError(
                f"'{path}' holds Python code (a Lambda layer or a pickled function), which loading would run. Replace "
                "it by layers or a registered class, and save the model again."
            ) from error
        if unknown := re.search(r"Could not locate (?:class|function) '([^']+)'", str(error)):
            raise ModelError(
                f"'{path}' holds '{unknown[1]}', which is not Keras's own. Name the module that defines it: in a "
                "recipe by model.name: module:function, for a command by --module MODULE, in Python by importing it. "
                "If it is not found there, put @keras.saving.register_keras_serializable() above its definition."
            ) from error
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:3])[:500]
        raise ModelError(f"'{path}' cannot be loaded as a Keras 3 model or weights: {reason}") from error
    if not isinstance(model, keras.Model):
        raise ModelError(f"'{path}' holds a {type(model).__name__}, expected a Keras 3 model.")
    check_finite_weights(model)
    return model


def with_policy(model: keras.Model, policy: str) -> keras.Model:
    """A copy of a model whose layers have another dtype policy: what they compute in; its weights stay float32.

    Args:
        model: built; layers that stand on a policy of integers or of quantization keep it.
        policy: "float32", "mixed_bfloat16" or "mixed_float16".

    Raises:
        ModelError: a model that Keras cannot make again from its configuration.
    """
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)  # of layers that are made anew in lowering, without a configuration
    try:
        copy = type(model).from_config(_replace_policies(model.get_config(), policy))
        copy.set_weights(model.get_weights())
    except Exception as error:  # whatever the configuration of somebody's own class makes of it
        raise ModelError(
            f"Model '{model.name}' cannot be made again with dtype policy {policy}: {str(error).splitlines()[0]}. Give "
            "its classes get_config and from_config, or train with precision: float32."
        ) from error
    finally:
        keras.config.set_dtype_policy(before)
    return copy


def _replace_policies(config: Any, policy: str) -> Any:
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy" and str(config["config"].get("name")) in POLICIES:
            return {**config, "config": {**config["config"], "name": policy}}
        if isinstance(config.get("float_model"), str):  # of a quantized model
            config = config | {"float_model": json.dumps(_replace_policies(json.loads(config["float_model"]), policy))}
        return {key: _replace_policies(value, policy) for key, value in config.items()}
    return [_replace_policies(value, policy) for value in config] if isinstance(config, list | tuple) else config


POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def _holds_weights_only(path: Path) -> bool:
    if path.suffix == ".keras":
        return False
    import h5py

    with h5py.File(path, "r") as file:
        return "model_config" not in file.attrs


def check_finite_weights(model: keras.Model) -> None:
    """Raises ModelError when a weight is NaN or infinite, naming such variables."""
    import keras
    import numpy as np

    broken = [v.path for v in model.weights if not np.isfinite(keras.ops.convert_to_numpy(v)).all()]
    if broken:
        raise ModelError(
            f"Model '{model.name}' has NaN or infinite values in {len(broken)} of {len(model.weights)} weights: "
            f"{', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''}. Training diverged, or the file is damaged."
        )
