"""One cell, in a process of its own: `python cell.py JOB.json`, started by `run.py`; the result is JSON in a file.

Native code that dies, and Keras 2, stay in here. A peer that cannot do a cell says why; that is a result too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS, TFMOT_STEPS, Cell, recipe_of, source_of

from mobileqat.errors import CheckFailed
from mobileqat.recipe import Recipe, dump_recipe, parse_recipe

TRAINING_KEYS = (
    "epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup_epochs",
    "weight_decay",
    "label_smoothing",
    "keep_best",
)


class Refused(Exception):
    """A peer cannot do this cell."""


def main(job: Path) -> None:
    arguments = json.loads(job.read_text())
    cell = Cell(**arguments["cell"])
    folder, weights, quick = Path(arguments["folder"]), Path(arguments["float"]), arguments["quick"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    do = KINDS["ours" if cell.scheme else cell.what]
    try:
        result: dict[str, Any] = {"status": "done", "rows": do(cell, folder, weights, quick)}
        if cell.what == "float":
            result["weights"] = digest(weights)
    except Refused as refusal:
        result = {"status": "refused", "reason": str(refusal)}
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = sum(use.ru_utime + use.ru_stime for use in spent)
    Path(arguments["result"]).write_text(json.dumps(result))


# ------------------------------------------------------------------ ours


def run_float(cell: Cell, folder: Path, weights: Path, quick: bool) -> dict:
    """Trains the float model, or imports it, and leaves it in `weights`."""
    from mobileqat.models import load_model

    task = TASKS[cell.task]
    imported = None
    if task.keras2:
        from mobileqat.legacy.keras2 import import_keras2

        imported = folder / "imported.keras"
        import_keras2(data_file(task.keras2), imported)
    report = run_recipe(source_of(recipe_of(cell, quick, imported), quick), folder / "run")
    weights.parent.mkdir(parents=True, exist_ok=True)
    load_model(folder / "run/models/float.keras").save(weights)  # without the optimizer's state
    return {"float": row_of(report, "float")}


def digest(model: Path) -> str:
    """Of a model's weights, whatever file they are in."""
    from mobileqat.models import load_model

    content = hashlib.sha256()
    for array in load_model(model).get_weights():
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]


def run_ours(cell: Cell, folder: Path, weights: Path, quick: bool) -> dict:
    report = run_recipe(source_of(recipe_of(cell, quick, weights), quick), folder / "run")
    variants = ("ptq", "qat") if report["recipe"]["qat"]["enabled"] else ("ptq",)
    return {variant: row_of(report, variant) for variant in variants}


def run_recipe(recipe: Recipe, folder: Path) -> dict:
    """Runs or resumes a recipe; a check that fails is in the report."""
    from mobileqat.pipeline import train

    path = folder / "recipe.yaml"
    resumes = path.is_file() and path.read_text() == dump_recipe(recipe)
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        return train(recipe, folder, resume=resumes)
    except CheckFailed:
        return json.loads((folder / "report.json").read_text())


def row_of(report: dict, variant: str) -> dict:
    found = report["variants"][variant]
    verdict = found.get("parity") or {}
    parity = verdict.get("end_to_end") or {}
    training = report["training"].get(variant) or {}
    return {
        "accuracy": found["accuracy"]["interpreter"],
        "samples": found["accuracy"]["samples"],
        "size_bytes": found["size_bytes"],
        "fully_integer": found["inspection"]["fully_integer"],
        "identical": parity.get("identical"),
        "max_lsb": parity.get("max_lsb"),
        "parity_problems": list(verdict.get("problems", ())),
        "training_seconds": sum(epoch["seconds"] for epoch in training.get("epochs", ())),
        "epochs": len(training.get("epochs", ())),
    }


# ------------------------------------------------------------------ peers


def run_converter(cell: Cell, folder: Path, weights: Path, quick: bool) -> dict:
    """TFLiteConverter's full-integer PTQ of the Keras 3 model, at batch 1, on our calibration samples."""
    import tensorflow as tf

    from mobileqat.data import calibration_samples
    from mobileqat.models import load_model

    recipe = source_of(recipe_of(cell, quick, weights), quick)
    dataset = load(recipe)
    samples = calibration_samples(dataset, recipe.data.calibration_samples, recipe.seed)
    model = load_model(weights)
    specs = [tf.TensorSpec((1, *t.shape[1:]), t.dtype, t._keras_history.operation.name) for t in model.inputs]
    function = tf.function(lambda x: model(x, training=False))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function(*specs)], function)
    is_wide = cell.what.endswith("w8a16")
    operators = "EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8" if is_wide else "TFLITE_BUILTINS_INT8"
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[np.newaxis]] for sample in samples)
    converter.target_spec.supported_ops = [getattr(tf.lite.OpsSet, operators)]
    kind = tf.int16 if is_wide else tf.int8
    converter.inference_input_type = converter.inference_output_type = kind
    try:
        content = converter.convert()
    except Exception as error:
        raise Refused(f"TFLiteConverter: {brief(error)}") from error
    (folder / "ptq.tflite").write_bytes(content)
    return {"ptq": measure(content, dataset, recipe)}


def run_tfmot(cell: Cell, folder: Path, weights: Path, quick: bool) -> dict:
    """TFMOT's QAT of the same weights, by our pipeline's engine for it.

    It gets our epochs, learning rate and augmentation.  It has no calibration: its ranges start at +-6 and move by a
    thousandth per step.  So its inputs are scaled to +-6 (the first kernel by the inverse), and it trains for
    `TFMOT_STEPS` steps at least.
    """
    import twin

    from mobileqat.errors import MobileQatError
    from mobileqat.models import load_model

    native = source_of(recipe_of(cell, quick, weights), quick)
    dataset = load(native)
    scale = float(np.abs(dataset.train.x).max()) / 6
    try:
        twin.describe(load_model(weights), folder, dataset.test.x, scale)
    except NotImplementedError as error:
        raise Refused(f"Keras 2: {error}") from error
    python = os.environ.get("MOBILEQAT_TFMOT_PYTHON") or sys.executable
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run([python, twin.__file__, folder], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"Keras 2: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    batch = TASKS[cell.task].tfmot_batch
    epochs = native.qat.epochs
    if not quick:
        epochs = max(epochs, math.ceil(TFMOT_STEPS / (len(dataset.train.x) / batch)))
    scaled = source_of(recipe_of(cell, quick, weights), quick, scale)
    settings = native.qat.model_dump(mode="json")
    values = {
        "name": f"{cell.task}_tfmot",
        "description": f"{TASKS[cell.task].title}, by TFMOT",
        "seed": cell.seed,
        "engine": "tfmot",
        "data": scaled.data.model_dump(mode="json"),
        "model": {"weights": str(folder / "twin.h5")},
        "qat": {key: settings[key] for key in TRAINING_KEYS} | {"epochs": epochs, "batch_size": batch},
        "evaluate": native.evaluate.model_dump(mode="json"),
        "bench": {"enabled": False},
    }
    try:
        report = run_recipe(parse_recipe(json.dumps(values), file="tfmot"), folder / "run")
    except MobileQatError as error:
        raise Refused(str(error)) from error
    return {"qat": row_of(report, "qat")}


def run_shipped(cell: Cell, folder: Path, weights: Path, quick: bool) -> dict:
    """The file that others ship for the task."""
    recipe = source_of(recipe_of(cell, quick, weights), quick)
    shipped = TASKS[cell.task].shipped
    assert shipped is not None
    return {"ptq": measure(data_file(shipped).read_bytes(), load(recipe), recipe)}


def measure(content: bytes, dataset, recipe: Recipe) -> dict:
    from mobileqat.evaluate import accuracy
    from mobileqat.flatbuffer import inspect
    from mobileqat.runtime import Session

    x, labels = dataset.test.x[: recipe.evaluate.limit], dataset.test.y[: recipe.evaluate.limit]
    return {
        "accuracy": accuracy(np.asarray(Session(content, threads=recipe.evaluate.threads).predict(x)), labels),
        "samples": len(labels),
        "size_bytes": len(content),
        "fully_integer": inspect(content).fully_integer,
    }


def load(recipe: Recipe):
    from mobileqat.data import load_dataset

    data = recipe.data
    how: dict[str, Any] = {"validation_fraction": data.validation_fraction, "seed": recipe.seed}
    return load_dataset(data.source, path=data.path, image_size=data.image_size, **how, **data.options)


def data_file(name: str) -> Path:
    return Path(os.environ["MOBILEQAT_DATA"]) / name


def brief(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


KINDS: dict[str, Callable[[Cell, Path, Path, bool], dict]] = {
    "float": run_float,
    "ours": run_ours,
    "converter": run_converter,
    "converter-w8a16": run_converter,
    "tfmot": run_tfmot,
    "mlperf": run_shipped,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
