"""Runs with `engine: tfmot`, and the ranges and weights of what TFMOT has trained on the native path."""

import json
import os
import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from test_keras2 import HAS_TF_KERAS, interpreter, without_tf_keras

import mobileqat as mq
from mobileqat import flatbuffer, pipeline
from mobileqat.data import load_dataset
from mobileqat.errors import (
    InspectionError,
    LegacyUnavailableError,
    ModelError,
    ParityError,
    TrainingError,
    UnsupportedModelError,
)
from mobileqat.legacy import process
from mobileqat.legacy.ranges import Range, Ranges, read_ranges
from mobileqat.legacy.tfmot import compare
from mobileqat.numerics import quantization_parameters
from mobileqat.parity import Bars
from mobileqat.recipe import parse_recipe
from mobileqat.runtime import Session
from mobileqat.schemes import get_scheme

needs_tfmot = pytest.mark.skipif(not HAS_TF_KERAS, reason='needs TFMOT: pip install "mobileqat[tfmot]"')

MODEL = """
import tf_keras as keras
layers = keras.layers

def small(input_shape, classes, filters=16):
    x = image = keras.Input(input_shape, name="image")
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(momentum=0.9, name="bn")(x))
    y = layers.Conv2D(filters, 1, activation="relu", name="branch")(x)
    x = layers.Concatenate(name="joined")([layers.Conv2D(filters, 1, name="linear")(x), y])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, layers.Dense(classes, activation="softmax", name="classes")(x), name="small")

def nested(input_shape, classes):
    inner = keras.Sequential([keras.Input(input_shape), layers.Flatten()])
    return keras.Sequential([keras.Input(input_shape), inner, layers.Dense(classes)])

@keras.utils.register_keras_serializable("project")
class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2

def annotated(input_shape, classes):
    import tensorflow_model_optimization as tfmot
    dense = tfmot.quantization.keras.quantize_annotate_layer(layers.Dense(classes, name="classes"))
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), Doubled(name="doubled"), dense])

def wrong_classes(input_shape):
    return small(input_shape, 7)

def of_keras_3(input_shape, classes):
    import keras as keras_3
    return keras_3.Sequential([keras_3.Input(input_shape), keras_3.layers.Flatten(), keras_3.layers.Dense(classes)])
"""
RECIPE = """
name: small_tfmot
description: a small tf_keras network on digits
engine: tfmot
data: {source: digits, calibration_samples: 64, augment: {shift: 1}}
model: {name: "tf_keras_models:small"}
float: {epochs: 10, batch_size: 32, learning_rate: 0.02}
qat: {epochs: 2, batch_size: 32, learning_rate: 0.003}
bench: {runs: 5, warmup: 2}
"""


def recipe(*overrides):
    return parse_recipe(RECIPE, file="tfmot.yaml", overrides=overrides)


class Display:
    """Remembers the steps and the epochs."""

    def __init__(self):
        self.ended: dict[str, str] = {}
        self.epochs: dict[str, list[float]] = {}

    def step(self, name):
        pass

    def done(self, name, status, seconds, message):
        self.ended[name] = status

    def training(self, name, epochs):
        seen = self.epochs.setdefault(name, [])
        return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["val_accuracy"]))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A working directory with the models' module, for every test of this file."""
    folder = tmp_path_factory.mktemp("tfmot")
    (folder / "tf_keras_models.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(project):
    """The directory of a finished run, what `train` returned, and what was shown."""
    display = Display()
    return project / "run", pipeline.train(recipe(), project / "run", display=display), display


# ------------------------------------------------------------------ a finished run


@needs_tfmot
def test_every_artefact_is_there(run):
    directory, results, display = run
    expected = {"environment.json", "recipe.yaml", "report.html", "report.json", ".lock"}
    expected |= {"float.tflite", "ptq.tflite", "qat.tflite", "models/float.h5", "models/qat.h5"}
    expected |= {"run_ptq.py", "Ptq.kt", "run_qat.py", "Qat.kt"}
    expected |= {f"outputs/{variant}.npz" for variant in ("float", "ptq", "qat")}
    expected |= {f"steps/{step}.json" for step in pipeline.STEPS} | {"model_card.md"}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("tensorboard/")} == expected
    assert list(directory.glob("tensorboard/qat/train/events.*"))
    assert set(display.ended.values()) == {"done"}
    for name in ("float", "qat"):
        assert display.epochs[name] == [row["val_accuracy"] for row in results["training"][name]["epochs"]]


@needs_tfmot
def test_the_report_has_what_a_native_one_has(run):
    directory, results, _ = run
    assert json.loads((directory / "report.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["variants"]) == ["float", "ptq", "qat"]
    for name, variant in results["variants"].items():
        assert variant["size_bytes"] == (directory / f"{name}.tflite").stat().st_size
        assert variant["bench"][0]["cost"]["median"] > 0
        assert variant["accuracy"]["samples"] == 359
    for name in ("ptq", "qat"):
        assert results["variants"][name]["inspection"]["fully_integer"]
    assert results["model"] == {"name": "tf_keras_models:small", "parameters": 1082}
    assert {"tf-keras", "tensorflow-model-optimization"} <= set(results["environment"])
    assert results["verdict"]["ship"] in ("ptq", "qat")
    assert [row["tensor"] for row in results["plan"]][:2] == ["image", "relu"]
    page = (directory / "report.html").read_text()
    assert "tensorflow-model-optimization" in page and "End to end on 359 samples" in page


@needs_tfmot
def test_reported_numbers_are_what_interpreter_and_simulation_give(run):
    directory, results, _ = run
    test = load_dataset("digits").test
    for name in ("float", "ptq", "qat"):
        outputs = np.asarray(Session(directory / f"{name}.tflite").predict(test.x))
        assert results["variants"][name]["accuracy"]["interpreter"] == np.mean(outputs.argmax(1) == test.y)
    _, simulated = process.call(
        "predict", {"sources": {"qat": str(directory / "models/qat.h5")}, "unwrap": False}, arrays={"x": test.x}
    )
    accuracy = results["variants"]["qat"]["accuracy"]
    assert accuracy["simulation"] == np.mean(simulated["qat.000"].argmax(1) == test.y)
    assert results["variants"]["ptq"]["accuracy"]["simulation"] is None  # the converter has none
    # By hand: integers of the softmax, whose scale is 1/256 and zero point -128.
    integers = np.clip(np.round(simulated["qat.000"] * 256) - 128, -128, 127)
    difference = np.abs(integers - outputs)
    parity = results["variants"]["qat"]["parity"]
    assert parity["end_to_end"]["identical"] == np.mean(difference == 0)
    assert parity["end_to_end"]["max_lsb"] == difference.max()
    assert parity["operators"] == [] and parity["weights"] is None


@needs_tfmot
def test_the_networks_have_learned(run):
    accuracies = {name: row["accuracy"]["interpreter"] for name, row in run[1]["variants"].items()}
    assert accuracies["float"] > 0.6
    assert min(accuracies["ptq"], accuracies["qat"]) > accuracies["float"] - 0.1


@needs_tfmot
def test_resume_keeps_what_is_finished(run, tmp_path):
    directory, display = shutil.copytree(run[0], tmp_path / "run"), Display()
    (directory / "steps" / "evaluate.json").unlink()
    results = pipeline.train(recipe(), directory, resume=True, display=display)
    assert [name for name, status in display.ended.items() if status == "done"] == ["evaluate", "bench"]
    assert results["variants"]["qat"]["accuracy"] == run[1]["variants"]["qat"]["accuracy"]


@needs_tfmot
def test_a_run_from_a_file_with_other_types_and_without_qat(run, tmp_path):
    overrides = ("model={weights: %s}" % (run[0] / "models/float.h5"), "float.epochs=0", "qat.enabled=false")
    types = ("convert.input_type=uint8", "convert.output_type=float32", "evaluate.limit=64", "bench.enabled=false")
    results = pipeline.train(recipe(*overrides, *types), tmp_path / "run")
    assert list(results["variants"]) == ["float", "ptq"]
    assert results["variants"]["ptq"]["inspection"]["inputs"][0]["dtype"] == "uint8"
    assert results["model"]["name"] == "small"
    np.testing.assert_array_equal(
        Session(tmp_path / "run" / "float.tflite").predict(load_dataset("digits").test.x[:8]),
        Session(run[0] / "float.tflite").predict(load_dataset("digits").test.x[:8]),
    )


@needs_tfmot
def test_parity_counts_lsbs_of_the_grid_whatever_the_output_type(run, tmp_path):
    source, types = str(run[0] / "models/qat.h5"), ("int8", "uint8", "float32")
    rows = [{"source": source, "target": str(tmp_path / name), "output_type": name} for name in types]
    process.call("convert", {"files": rows, "quantize": True, "batch_size": 1, "input_type": "int8"})
    x = load_dataset("digits").test.x[:64]
    with np.load(run[0] / "outputs" / "qat.npz") as outputs:
        simulated, interpreted = outputs["simulation"][:64], outputs["interpreter"][:64]
    expected = compare((run[0] / "qat.tflite").read_bytes(), simulated, interpreted, Bars())
    for name in types:
        content = (tmp_path / name).read_bytes()
        outputs = np.asarray(Session(content).predict(x))
        assert outputs.dtype == name
        assert compare(content, simulated, outputs, Bars()).end_to_end == expected.end_to_end


@needs_tfmot
def test_a_missed_bar_is_a_failed_check(run, tmp_path):
    directory = shutil.copytree(run[0], tmp_path / "run")
    text = (directory / "recipe.yaml").read_text()
    strict = parse_recipe(text, file="recipe.yaml", overrides=["parity.min_identical_output=1"])
    (directory / "recipe.yaml").write_text(text.replace("min_identical_output: 0.5", "min_identical_output: 1.0"))
    (directory / "steps" / "parity.json").unlink()
    with np.load(run[0] / "outputs" / "qat.npz") as outputs:
        exact = compare((run[0] / "qat.tflite").read_bytes(), outputs["simulation"], outputs["interpreter"], Bars())
    assert exact.end_to_end.identical < 1
    with pytest.raises(ParityError, match=r"qat\.tflite does not compute what TFMOT trained"):
        pipeline.train(strict, directory, resume=True)


@pytest.mark.slow
@needs_tfmot
def test_an_annotated_model_with_a_layer_of_the_project_s_own(project, tmp_path):
    """Only what is annotated is quantized; what stays in float is found and named by the inspection."""
    short = ("float.epochs=1", "qat.epochs=1", "bench.enabled=false", "evaluate.limit=64")
    with pytest.raises(InspectionError, match=r"qat\.tflite is not fully integer"):
        pipeline.train(recipe("model.name=tf_keras_models:annotated", *short), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "report.json").read_text())
    assert results["variants"]["ptq"]["inspection"]["fully_integer"]
    assert results["variants"]["qat"]["inspection"]["islands"]
    assert [row["tensor"] for row in results["plan"]] == ["classes"]


# ------------------------------------------------------------------ runs that fail


@needs_tfmot
@pytest.mark.parametrize(
    ("override", "error", "problem"),
    [
        ("model.name=tf_keras_models:nested", UnsupportedModelError, "use engine: native"),
        ("model.name=tf_keras_models:wrong_classes", ModelError, "shape [(None, 7)]. The data has 10 classes"),
        ("model.name=tf_keras_models:of_keras_3", ModelError, "must return a tf_keras model"),
        ("model.args={depth: 3}", ModelError, "unexpected keyword argument 'depth'"),
        ("model={weights: only.weights.h5}", ModelError, "Name the function that makes the tf_keras model"),
        ("model.weights=absent.h5", ModelError, "'absent.h5' cannot be read"),
    ],
)
def test_what_cannot_run_ends_before_any_training(project, tmp_path, override, error, problem):
    with h5py.File(project / "only.weights.h5", "w") as file:
        file.create_group("layers")
    with pytest.raises(error) as raised:
        pipeline.train(recipe(override), tmp_path / "run")
    assert problem in str(raised.value)
    assert not list((tmp_path / "run").glob("models/*"))
    assert not (tmp_path / "run" / "tensorboard").exists()


@needs_tfmot
def test_training_that_diverges_is_a_failed_check(project, tmp_path):
    with pytest.raises(TrainingError, match="became nan at step"):
        pipeline.train(recipe("float.learning_rate=3e38", "float.optimizer=sgd"), tmp_path / "run")


def test_without_tfmot_the_run_says_what_to_install(project, tmp_path, monkeypatch):
    monkeypatch.setenv(process.INTERPRETER, without_tf_keras(tmp_path))
    with pytest.raises(LegacyUnavailableError) as raised:
        pipeline.train(recipe(), tmp_path / "run")
    assert "tf-keras and tensorflow-model-optimization are not installed" in str(raised.value)
    assert 'pip install "mobileqat[tfmot]"' in str(raised.value)


def test_an_interrupt_ends_the_other_process(project, tmp_path, monkeypatch):
    script = 'echo $$ > pid; echo \'{"event": "begin"}\'; exec sleep 60'
    monkeypatch.setenv(process.INTERPRETER, interpreter(tmp_path, script))

    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.call("train_float", on_event=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((project / "pid").read_text()), 0)


# ------------------------------------------------------------------ ranges and weights on the native path


@pytest.fixture(scope="module")
def imported(run):
    """The run's QAT model in Keras 3, and its ranges."""
    result = mq.import_keras2(run[0] / "models/qat.h5", run[0].parent / "imported.keras")
    return mq.load_model(run[0].parent / "imported.keras"), result


@needs_tfmot
def test_the_float_model_inside_has_the_trained_weights(run, imported):
    model, result = imported
    assert [layer.name for layer in model.layers] == [
        "image", "conv", "bn", "relu", "linear", "branch", "joined", "pool", "classes",
    ]  # fmt: skip
    assert result.not_compared is None and result.largest_difference < 1e-5
    with h5py.File(run[0] / "models/qat.h5", "r") as file:
        kernels = [array for key, array in _arrays(file["model_weights/quant_classes"]) if key == "kernel:0"]
    np.testing.assert_array_equal(model.get_layer("classes").kernel, kernels[0])


def _arrays(group):
    found = []
    group.visititems(lambda name, item: found.append((name.split("/")[-1], item)) if hasattr(item, "shape") else None)
    return [(name, np.asarray(item)) for name, item in found]


@needs_tfmot
def test_imported_ranges_give_the_grids_of_tfmot_s_own_file(run, imported):
    """The last word is the file that TensorFlow's converter made from the same model."""
    model, result = imported
    quantized = mq.quantize_model(model)
    applied = mq.set_ranges(quantized, result.ranges)
    assert not applied.missing and not applied.unused
    content = mq.convert(quantized)
    assert mq.verify(quantized, content, load_dataset("digits").test.x[:64]).passed
    ours, theirs = (_grids(flatbuffer.read(file)) for file in (content, (run[0] / "qat.tflite").read_bytes()))
    assert len(ours) == len(theirs) >= 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    test = load_dataset("digits").test
    answers = [np.asarray(Session(c).predict(test.x)).argmax(1) for c in (content, run[0] / "qat.tflite")]
    # The weights are not quantized alike: TFMOT folds BatchNormalization after it has rounded them.
    assert np.mean(answers[0] == answers[1]) > 0.95


def _grids(file) -> list[tuple[float, int]]:
    """Scale and zero point of every activation, without those that say the same twice."""
    tensors = [t for t in file.tensors if not t.is_constant and t.scales is not None and t.dtype == "int8"]
    return sorted({(float(f"{t.scales[0]:.6g}"), int(t.zero_points[0])) for t in tensors})


@needs_tfmot
def test_ranges_as_a_file_and_through_the_command_line(run, imported, tmp_path):
    from click.testing import CliRunner

    from mobileqat.cli import main

    names = {name: str(tmp_path / name) for name in ("new.keras", "ranges.json", "new.tflite")}
    source = str(run[0] / "models/qat.h5")
    done = CliRunner().invoke(main, ["import-keras2", source, names["new.keras"], "--ranges", names["ranges.json"]])
    assert done.exit_code == 0, done.output
    assert "Largest difference of the outputs to tf_keras" in done.output
    assert mq.load_ranges(names["ranges.json"]) == imported[1].ranges
    done = CliRunner().invoke(
        main, ["convert", names["new.keras"], "--ranges", names["ranges.json"], "-o", names["new.tflite"]]
    )
    assert done.exit_code == 0, done.output
    quantized = mq.quantize_model(imported[0])
    mq.set_ranges(quantized, names["ranges.json"])
    assert Path(names["new.tflite"]).read_bytes() == mq.convert(quantized)


@needs_tfmot
def test_ranges_that_were_never_trained_are_named(run, tmp_path):
    data, target = load_dataset("digits"), tmp_path / "qat.h5"
    splits = {"train": data.train, "validation": data.validation}
    arrays = {f"{axis}_{name}": getattr(split, axis)[:32] for name, split in splits.items() for axis in "xy"}
    arguments = {
        "source": str(run[0] / "models/float.h5"),
        "target": str(target),
        "settings": recipe("qat.epochs=0").qat.model_dump(),
        "augment": {},
        "seed": 0,
        "classes": 10,
        "log_dir": str(tmp_path),
    }
    process.call("train_quantized", arguments, arrays=arrays)
    ranges = read_ranges(target)
    assert ranges.ranges == ()
    assert set(ranges.untrained) == {"image", "relu", "linear", "branch", "joined", "pool", "classes"}


# ------------------------------------------------------------------ ranges without TFMOT


@pytest.fixture
def network():
    x = image = keras.Input((4,), name="image")
    a, b = (keras.layers.Dense(3, name=name, activation=function)(x) for name, function in (("a", "relu"), ("b", None)))
    x = keras.layers.Concatenate(name="joined")([a, b])
    return keras.Model(image, keras.layers.Dense(2, activation="softmax", name="classes")(x))


RANGES = (
    Range("image", "output", -1.0, 2.0),
    Range("joined", "output", -3.0, 5.0),
    Range("b", "output", -2.0, 4.0),
    Range("classes", "pre_activation", -8.0, 7.0),
)


def test_ranges_reach_the_tensors_of_the_same_meaning(network):
    quantized = mq.quantize_model(network)
    applied = mq.set_ranges(quantized, Ranges((*RANGES, Range("gone", "output", 0.0, 1.0))))
    assert applied.missing == () and applied.unused == ("gone (output)",)
    spec = get_scheme("w8a8").activations
    for tensor, bounds in {"image": (-1, 2), "joined": (-3, 5), "a/relu": (-3, 5), "classes": (-8, 7)}.items():
        scale, zero_point = quantized.quantizers[tensor].grid()
        assert (scale, zero_point) == pytest.approx(quantization_parameters(*bounds, spec), rel=1e-6)


def test_a_pooled_tensor_keeps_its_own_range():
    """Average pooling has a narrower range in TFMOT, and the grid of its input in the runtime."""
    image = keras.Input((4, 4, 2), name="image")
    x = keras.layers.AveragePooling2D(2, name="pool")(keras.layers.Conv2D(2, 1, name="conv")(image))
    quantized = mq.quantize_model(keras.Model(image, x))
    ranges = (
        Range("image", "output", -1.0, 1.0),
        Range("conv", "output", -9.0, 9.0),
        Range("pool", "output", 0.0, 1.0),
    )
    assert mq.set_ranges(quantized, Ranges(ranges)).missing == ()
    assert quantized.quantizers["conv"].ranges().tolist() == [[-9, 9]]


def test_what_has_no_range_is_named_and_keeps_its_calibration(network):
    quantized = mq.quantize_model(network)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("f")
    mq.calibrate(quantized, x)
    before = quantized.quantizers["classes"].ranges().tolist()
    applied = mq.set_ranges(quantized, Ranges(RANGES[:1]))
    assert applied.tensors == ("image",) and set(applied.missing) == {"a/relu", "b", "classes"}
    assert quantized.quantizers["classes"].ranges().tolist() == before
    assert quantized.quantizers["image"].ranges().tolist() == [[-1, 2]]


def test_ranges_of_another_model_are_refused(network):
    with pytest.raises(ModelError, match="None of the 1 ranges belongs to a tensor"):
        mq.set_ranges(mq.quantize_model(network), Ranges((Range("conv", "output", 0.0, 1.0),)))
    with pytest.raises(ModelError, match="Expected a model made by quantize_model"):
        mq.set_ranges(network, Ranges(RANGES))


def test_a_file_of_ranges_is_read_back(tmp_path):
    ranges = Ranges(RANGES, ("other",))
    ranges.save(tmp_path / "ranges.json")
    assert mq.load_ranges(tmp_path / "ranges.json") == ranges


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"ranges": []}',
        '{"ranges": [{"layer": "a"}], "untrained": []}',
        '{"ranges": [{"layer": "a", "of": "output", "minimum": 1, "maximum": 0}], "untrained": []}',
        '{"ranges": [{"layer": "a", "of": "input", "minimum": 0, "maximum": 1}], "untrained": []}',
        '{"ranges": [{"layer": "a", "of": "output", "minimum": NaN, "maximum": 1}], "untrained": []}',
        '{"ranges": [{"layer": "a", "of": "output", "minimum": "0", "maximum": 1}], "untrained": []}',
    ],
)
def test_files_that_are_not_ranges_are_refused(tmp_path, text):
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(ModelError, match="is not a file of ranges"):
        mq.load_ranges(tmp_path / "ranges.json")


def test_a_missing_file_of_ranges(tmp_path):
    with pytest.raises(ModelError, match="There is no file"):
        mq.load_ranges(tmp_path / "absent.json")
