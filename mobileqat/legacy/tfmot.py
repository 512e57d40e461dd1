"""The steps of a run with `engine: tfmot`, in place of the native ones: training, PTQ and conversion in `worker`.

    float    a `tf_keras` model by function or file -> models/float.h5
    ptq      TensorFlow's converter, calibrated on training samples -> ptq.tflite
    qat      TFMOT's quantize_model, fine-tuned -> models/qat.h5
    convert  float.tflite, qat.tflite
    parity   TFMOT's simulation against the interpreter, end to end: its graph has no operator to compare one by one

Data, inspection, evaluation, latency and report are the pipeline's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mobileqat import flatbuffer, numerics, parity
from mobileqat.data import calibration_samples
from mobileqat.errors import ParityError
from mobileqat.legacy import process
from mobileqat.legacy.ranges import read_ranges
from mobileqat.runtime import Session
from mobileqat.schemes import get_scheme


def _float(run: Any) -> dict:
    model = run.recipe.model
    source = {"function": _function(run), "args": model.args, "weights": model.weights}
    result = _train(run, "float", run.recipe.float, source)
    name, parameters = model.name or result["name"], result["parameters"]
    return {
        "model": {"name": name, "parameters": parameters},
        "training": result["training"],
        "packages": result["packages"],
    }


def _ptq(run: Any) -> dict:
    samples = calibration_samples(run.dataset, run.recipe.data.calibration_samples, run.recipe.seed)
    _write_files(run, {"ptq": "float"}, samples)
    return {"calibration": "TensorFlow's converter", "samples": len(samples)}


def _qat(run: Any) -> dict | None:
    if not run.recipe.qat.enabled:
        return None
    source = {"source": str(_model(run, "float")), "function": _function(run)}
    result = _train(run, "qat", run.recipe.qat, source)
    return {"training": result["training"], "plan": _plan_rows(_model(run, "qat"))}


def _convert(run: Any) -> dict:
    _write_files(run, {name: name for name in run.variants if name != "ptq"})
    return {
        name: {"file": f"{name}.tflite", "size_bytes": run.keep_file(name, run.file(name))} for name in run.variants
    }


def _parity(run: Any) -> dict:
    x = np.asarray(run.test[0])  # the worker takes data in memory
    settings, evaluation = run.recipe.parity, run.recipe.evaluate
    bars = parity.Bars(**settings.model_dump(exclude={"samples"}))
    results = {}
    models = {name: str(_model(run, name)) for name in run.variants if name != "ptq"}
    arguments = {"sources": models, "unwrap": False, "function": _function(run)}
    _, simulations = process.call("predict", arguments, arrays={"x": x})
    for variant in run.variants:
        interpreted = np.asarray(Session(run.file(variant), evaluation.runtime, evaluation.threads).predict(x))
        simulated = simulations.get(f"{variant}.000")
        run.keep_outputs(variant, interpreted, simulated)
        if variant != "qat" or simulated is None:
            continue
        if evaluation.runtime != "litert":
            interpreted = np.asarray(Session(run.file(variant), "litert", evaluation.threads).predict(x))
        result = compare(run.file(variant), simulated, interpreted, bars)
        # There are no operators to compare, nor weights: the converter folds and names them in its own way.
        results[variant] = result.to_dict() | {"weights": None}
        if not result.passed:
            problems = "\n".join(f"  - {problem}" for problem in result.problems)
            run.fail(ParityError(f"{variant}.tflite does not compute what TFMOT trained:\n{problems}"))
    return results


STEPS: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "ptq": _ptq,
    "qat": _qat,
    "convert": _convert,
    "parity": _parity,
}


def compare(content: bytes, simulated: np.ndarray, interpreted: np.ndarray, bars: parity.Bars) -> parity.Parity:
    """End-to-end parity of a simulation's real outputs with a file's raw ones, in LSBs of the file's output.

    Args:
        content: the file.
        simulated: float32 [n, ...].
        interpreted: what `Session.predict` gave, of the file's output type.
        bars: only those for end to end count.
    """
    session = Session(content)
    real = np.asarray(session.dequantize(interpreted))
    integers = [_integers(array, content) for array in (simulated, real)]
    end_to_end = parity.compare_outputs(integers[:1], integers[1:])
    nothing = parity.WeightParity(0, 0)
    problems = parity.find_problems(nothing, (), end_to_end, bars)
    return parity.Parity("litert", nothing, (), end_to_end, problems)


def _integers(real: np.ndarray, content: bytes) -> np.ndarray:
    """Real outputs on the grid of the file's output, or as they are when it computes its output in float."""
    file = flatbuffer.read(content)
    tensor = file.tensors[file.outputs[0]]
    makers = {index: operator for operator in file.operators for index in operator.outputs}
    # A float or uint8 interface is converted from the grid in which the output is computed.
    if tensor.index in makers and makers[tensor.index].name in ("DEQUANTIZE", "QUANTIZE"):
        tensor = file.tensors[makers[tensor.index].inputs[0]]
    if tensor.scales is None or tensor.zero_points is None:
        return np.asarray(real)
    bounds = np.iinfo(tensor.dtype)
    integers = np.round(np.asarray(real) / tensor.scales[0]) + tensor.zero_points[0]
    return np.clip(integers, bounds.min, bounds.max).astype(np.int32)


# ------------------------------------------------------------------ what the worker is asked for


def _model(run: Any, variant: str) -> Path:
    return (run.directory.path / "models" / f"{variant}.h5").resolve()


def _function(run: Any) -> str | None:
    """The model function that the recipe names; a reference model's name is none of `tf_keras`."""
    name = run.recipe.model.name
    return name if name is not None and ":" in name else None


def _train(run: Any, variant: str, settings, source: dict) -> dict:
    data, recipe = run.dataset, run.recipe
    splits = {"train": data.train, "validation": data.validation}
    arguments = {
        **source,
        "settings": settings.model_dump(),
        "augment": recipe.data.augment.model_dump(),
        "seed": recipe.seed,
        "classes": len(data.class_names),
        "log_dir": str((run.directory.path / "tensorboard" / variant).resolve()),
    }
    arrays = {f"{axis}_{name}": np.asarray(getattr(split, axis)) for name, split in splits.items() for axis in "xy"}
    shown = _Shown(run.training_callbacks(variant, settings.epochs))
    task = "train_float" if variant == "float" else "train_quantized"
    result: dict = {}

    def train(path: Path) -> None:
        result.update(process.call(task, arguments | {"target": str(path.resolve())}, arrays=arrays, on_event=shown)[0])

    run.directory.write(f"models/{variant}.h5", train)
    return result


class _Shown:
    """Shows the worker's training by the callbacks that show a native one."""

    def __init__(self, callbacks: list):
        self.callbacks = callbacks

    def __call__(self, event: dict) -> None:
        for callback in self.callbacks:
            if event["event"] == "begin":
                callback.set_params({"steps": event["steps"]})
                callback.on_train_begin()
            elif event["event"] == "batch":
                callback.on_train_batch_end(event["batch"])
            else:
                callback.on_epoch_end(event["epoch"], event["logs"])


def _write_files(run: Any, models: dict[str, str], samples: np.ndarray | None = None) -> None:
    """Converts models into `.tflite` files, `{file: model}`."""
    with tempfile.TemporaryDirectory(prefix="mobileqat-") as name:
        targets = {file: Path(name) / f"{file}.tflite" for file in models}
        rows = [
            {"source": str(_model(run, model)), "target": str(targets[file]), "quantize": file != "float"}
            for file, model in models.items()
        ]
        arrays = {} if samples is None else {"samples": samples}
        settings = {
            key: "int8" if value == "auto" else value
            for key, value in run.recipe.convert.model_dump(exclude={"metadata"}).items()
        }
        arguments = settings | {"files": rows, "function": _function(run)}
        process.call("convert", arguments, arrays=arrays)
        for target in targets.values():
            run.directory.write_bytes(target.name, target.read_bytes())


def _plan_rows(path: Path) -> list[dict]:
    """A row for every range that TFMOT has trained, with the grid that follows from it."""
    spec = get_scheme("w8a8").activations
    rows = []
    for row in read_ranges(path).ranges:
        scale, zero_point = numerics.quantization_parameters(row.minimum, row.maximum, spec)
        rows.append(
            {
                "tensor": row.layer,
                "shape": None,
                "operator": None,
                "layers": [row.layer],
                "bits": spec.bits,
                "parameters": "trained" if row.of == "output" else "trained, before the activation",
                "shared_with": None,
                "scale": float(scale),
                "zero_point": int(zero_point),
                "minimum": row.minimum,
                "maximum": row.maximum,
            }
        )
    return rows
