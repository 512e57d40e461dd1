"""The process that imports `tf_keras` and TFMOT: `python -m mobileqat.legacy.worker TASK FOLDER`.

Started by `process` with TF_USE_LEGACY_KERAS=1.  FOLDER has arguments.json and in/*.npy; the task's result goes into
result.json and out/*.npy, what it reports on its way to stdout, a JSON object per line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat.errors import LegacyUnavailableError, MobileQatError, ModelError, UnsupportedModelError
from mobileqat.legacy import training
from mobileqat.models import call_function

INSTALL = 'pip install "mobileqat[tfmot]"'


class Task:
    """What a task is given, and where it leaves its arrays and reports."""

    def __init__(self, folder: Path, channel):
        self.folder = folder
        self.channel = channel
        self.arguments = json.loads((folder / "arguments.json").read_text())

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        paths = sorted((self.folder / "in").glob(f"{prefix}*.npy"))
        return {path.stem: np.load(path, allow_pickle=False) for path in paths}

    def leave(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            np.save(self.folder / "out" / f"{name}.npy", array, allow_pickle=False)

    def report(self, **event: Any) -> None:
        self.channel.write(json.dumps(event) + "\n")
        self.channel.flush()


def require(*packages: str) -> None:
    """Says what is missing before anything slow is imported."""
    names = {"tf_keras": "tf-keras", "tensorflow_model_optimization": "tensorflow-model-optimization"}
    missing = [names[package] for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise LegacyUnavailableError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed for {sys.executable}. "
            f"Install with: {INSTALL}"
        )


# ------------------------------------------------------------------ models


def load_model(path: str):
    """A whole `tf_keras` model; TFMOT's wrappers are known when it is installed.

    Raises:
        ModelError: the file cannot be loaded, or holds Python code.
    """
    import tf_keras

    # A Lambda is marshalled code; `.h5` files and SavedModels know no safe mode.
    tf_keras.layers.Lambda.from_config = classmethod(_refuse_code)
    try:
        with _quantize_scope():
            return tf_keras.models.load_model(path, compile=False)
    except MobileQatError:
        raise
    except Exception as error:
        raise ModelError(f"'{path}' cannot be loaded by tf_keras: {_brief(error)}") from error


def _refuse_code(cls, config, custom_objects=None):
    raise ModelError(
        f"Layer '{config.get('name')}' is a Lambda, which holds Python code that loading would run. Replace it by "
        "layers, and save the model again."
    )


def _quantize_scope():
    from contextlib import nullcontext

    if importlib.util.find_spec("tensorflow_model_optimization") is None:
        return nullcontext()
    import tensorflow_model_optimization as tfmot

    return tfmot.quantization.keras.quantize_scope()


def _brief(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


def without_wrappers(model):
    """The float model of one that TFMOT annotated or quantized: wrappers and QuantizeLayers off, weights kept."""
    import tf_keras

    def unwrap(layer):
        if type(layer).__name__ == "QuantizeLayer":
            return tf_keras.layers.Activation("linear", name=layer.name)
        inner = layer.layer if type(layer).__name__.startswith("Quantize") else layer
        return type(inner).from_config(inner.get_config())

    with _quantize_scope():
        plain = tf_keras.models.clone_model(model, clone_function=unwrap)
    inner = {layer.layer.name: layer for layer in model.layers if type(layer).__name__.startswith("QuantizeWrapper")}
    inner |= {layer.layer.name: layer for layer in model.layers if type(layer).__name__ == "QuantizeAnnotate"}
    for layer in plain.layers:
        source = inner.get(layer.name)
        if source is None:
            continue
        # Wrappers take a layer's weights for their own and may change the first part of their names.
        values = {variable.name.split("/")[-1]: variable for variable in source.weights}
        for variable in layer.weights:
            variable.assign(values[variable.name.split("/")[-1]])
    return plain


# ------------------------------------------------------------------ tasks: importing


def to_h5(task: Task) -> dict:
    """Saves a model as `.h5`, in which weights have names."""
    require("tf_keras")
    model = load_model(task.arguments["source"])
    try:
        model.save(task.arguments["target"], save_format="h5", include_optimizer=False)
    except Exception as error:
        raise ModelError(
            f"'{task.arguments['source']}' holds no functional or sequential Keras model: {_brief(error)}"
        ) from error
    return {}


def predict(task: Task) -> dict:
    """The outputs of models, `{name: path}`, on in/*.npy: arrays "name.000", "name.001" by output."""
    require("tf_keras", *(["tensorflow_model_optimization"] if task.arguments["unwrap"] else []))
    import tensorflow as tf

    _register_classes(task)
    arrays = list(task.arrays().values())
    for name, path in task.arguments["sources"].items():
        model = load_model(path)
        if task.arguments["unwrap"]:
            model = without_wrappers(model)
        outputs = tf.nest.flatten(model.predict(arrays if len(arrays) > 1 else arrays[0], verbose=0))
        task.leave(**{f"{name}.{index:03}": np.asarray(array) for index, array in enumerate(outputs)})
    return {}


# ------------------------------------------------------------------ tasks: QAT with TFMOT


def train_float(task: Task) -> dict:
    """Builds or loads the float model, checks it, trains it, and leaves it in `target`."""
    require("tf_keras", "tensorflow_model_optimization")
    import tf_keras

    arguments, data = task.arguments, task.arrays()
    tf_keras.utils.set_random_seed(arguments["seed"])
    model = _float_model(arguments, data["x_train"].shape[1:])
    _check_fits(model, data["x_train"].shape[1:], arguments["classes"])
    _quantized(model)  # what TFMOT refuses is reported before any training
    history = training.fit(task, model, data)
    model.save(arguments["target"], include_optimizer=False)
    return {"training": history, "parameters": int(model.count_params()), "name": model.name, "packages": _packages()}


def train_quantized(task: Task) -> dict:
    """Fine-tunes TFMOT's quantized copy of the float model, and leaves it in `target`."""
    import tf_keras

    _register_classes(task)
    tf_keras.utils.set_random_seed(task.arguments["seed"])
    model = _quantized(load_model(task.arguments["source"]))
    history = training.fit(task, model, task.arrays())
    model.save(task.arguments["target"], include_optimizer=False)
    return {"training": history}


def convert(task: Task) -> dict:
    """Converts models, rows of `source`, `target` and `quantize`, with TensorFlow's converter.

    With in/samples.npy, it quantizes a float model (PTQ).
    """
    _register_classes(task)
    samples = task.arrays().get("samples")
    for row in task.arguments["files"]:
        content = _convert(load_model(row["source"]), task.arguments | row, samples)
        Path(row["target"]).write_bytes(content)
    return {}


def _convert(model, arguments: dict, samples: np.ndarray | None) -> bytes:
    import tensorflow as tf

    batch = arguments["batch_size"]
    inputs = [tf.TensorSpec([batch, *tensor.shape[1:]], tensor.dtype, name=_name(tensor)) for tensor in model.inputs]
    function = tf.function(lambda *tensors: model(tensors if len(tensors) > 1 else tensors[0], training=False))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function(*inputs)], model)
    if arguments["quantize"]:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = getattr(tf, arguments["input_type"])
        converter.inference_output_type = getattr(tf, arguments["output_type"])
    if samples is not None:
        # The converter repeats nothing: a last batch that is not full is left out.
        whole = [samples[start : start + batch] for start in range(0, len(samples) - batch + 1, batch)]
        converter.representative_dataset = lambda: ([part] for part in whole)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    try:
        return converter.convert()
    except Exception as error:
        raise ModelError(f"TensorFlow cannot convert '{arguments['source']}': {_brief(error)}") from error


def _name(tensor) -> str:
    return tensor.name.split(":")[0]


def _float_model(arguments: dict, input_shape: tuple[int, ...]):
    """The model that the recipe names: a whole file, a function's model, or such a model with a file's weights."""
    import tf_keras

    function, weights = arguments["function"], arguments["weights"]
    if weights and (Path(weights).is_dir() or Path(weights).suffix == ".keras" or _holds_model(weights)):
        return load_model(weights)
    if function is None:
        raise ModelError(
            f"'{weights}' holds weights without a model. Name the function that makes the tf_keras model they belong "
            "to: model.name: module:function"
        )
    model = call_function(function, input_shape, arguments["classes"], arguments["args"])
    if not isinstance(model, tf_keras.Model):
        raise ModelError(
            f"Model function '{function}' must return a tf_keras model when engine is tfmot. Received: "
            f"{type(model).__module__}.{type(model).__name__}. Use `import tf_keras as keras` in its module."
        )
    if weights:
        try:
            model.load_weights(weights)
        except Exception as error:
            raise ModelError(f"'{weights}' cannot be loaded into '{model.name}': {_brief(error)}") from error
    return model


def _register_classes(task: Task) -> None:
    """Imports the module of the recipe's model function, whose own layers a saved model may hold."""
    function = task.arguments.get("function")
    if function:
        importlib.import_module(function.partition(":")[0])


def _holds_model(path: str) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "model_config" in file.attrs
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error


def _check_fits(model, sample: tuple[int, ...], classes: int) -> None:
    inputs, outputs = [tuple(x.shape) for x in model.inputs], [tuple(x.shape) for x in model.outputs]
    if inputs != [(None, *sample)]:
        raise ModelError(f"Model '{model.name}' takes inputs of shape {inputs}. The data's samples are {sample}.")
    if outputs != [(None, classes)]:
        raise ModelError(
            f"Model '{model.name}' has outputs of shape {outputs}. The data has {classes} classes: expected one output "
            f"of shape (None, {classes})."
        )


def _quantized(model):
    """TFMOT's quantized copy; layers that are annotated already decide when there are any."""
    import tensorflow_model_optimization as tfmot

    quantization = tfmot.quantization.keras
    is_annotated = any(type(layer).__name__ == "QuantizeAnnotate" for layer in model.layers)
    try:
        with quantization.quantize_scope():
            return quantization.quantize_apply(model) if is_annotated else quantization.quantize_model(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"TFMOT cannot quantize model '{model.name}': {_brief(error)} Import it with mobileqat import-keras2 and "
            "use engine: native, or annotate the layers that can be quantized."
        ) from error


def _packages() -> dict[str, str]:
    names = ("tensorflow", "tf-keras", "tensorflow-model-optimization")
    return {name: metadata.version(name) for name in names}


TASKS = {
    "convert": convert,
    "predict": predict,
    "to_h5": to_h5,
    "train_float": train_float,
    "train_quantized": train_quantized,
}


def main(name: str, folder: Path) -> int:
    # What other code prints goes to stderr, so that stdout has reports only.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = TASKS[name](Task(folder, channel))
    except MobileQatError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": "ModelError", "message": f"{name}: {_brief(error)}"}
    unfinished = folder / "unfinished.json"
    unfinished.write_text(json.dumps(result))
    unfinished.rename(folder / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
