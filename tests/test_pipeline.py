"""Whole runs on real data and the real interpreter: a small one checked thoroughly, the shipped recipes when slow."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from mobileqat import flatbuffer, models, pipeline, plot_data
from mobileqat.bench.targets import parse_target, require_target
from mobileqat.data import load_dataset
from mobileqat.errors import (
    CalibrationError,
    DataError,
    DeviceError,
    ModelError,
    ParityError,
    RunDirectoryError,
    TrainingError,
    UnsupportedModelError,
)
from mobileqat.layerwise import bytes_per_sample
from mobileqat.metadata import read_metadata
from mobileqat.models import load_model
from mobileqat.quantize import quantize_model, strip
from mobileqat.recipe import AdaRound, dump_recipe, load_recipe, parse_recipe

SMALL = (
    "model.args={filters: 32, blocks: 2}",
    "float.epochs=12",
    "float.batch_size=32",
    "qat.epochs=2",
    "qat.batch_size=32",
    "bench.runs=5",
    "bench.warmup=2",
)
VARIANTS = ("float", "ptq", "qat")


class Recorder:
    """A display that remembers the steps, and interrupts a training at an epoch when told to."""

    def __init__(self, interrupt: tuple[str, int] | None = None):
        self.interrupt = interrupt
        self.ended: dict[str, str] = {}
        self.said: list[str] = []

    def step(self, name):
        pass

    def say(self, text):
        self.said.append(text)

    def done(self, name, status, seconds, message):
        self.ended[name] = status

    def training(self, name, epochs):
        def ctrl_c(epoch, logs=None):
            if self.interrupt == (name, epoch + 1):
                raise KeyboardInterrupt

        return keras.callbacks.LambdaCallback(on_epoch_end=ctrl_c)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The directory of a finished run of a small network on digits, and what `train` returned."""
    directory = tmp_path_factory.mktemp("small") / "run"
    return directory, pipeline.train(load_recipe("digits_dscnn_w8a8", SMALL), directory)


def modified(directory: Path) -> dict[str, int]:
    patterns = ("*.tflite", "models/*", "outputs/*", "steps/*")
    return {
        str(p.relative_to(directory)): p.stat().st_mtime_ns for pattern in patterns for p in directory.glob(pattern)
    }


def interpreter_accuracy(file: Path, x: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy by nothing but the interpreter: this project's code takes no part."""
    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    if source["dtype"] == np.int8:
        scale, zero_point = source["quantization"]
        x = np.clip(np.round(x / np.float32(scale)) + zero_point, -128, 127)
    right = 0
    for sample, label in zip(x.astype(source["dtype"]), labels, strict=True):
        interpreter.set_tensor(source["index"], sample[None])
        interpreter.invoke()
        right += interpreter.get_tensor(sink["index"])[0].argmax() == label
    return right / len(labels)


def check_parity(results: dict) -> None:
    """The bars of exactness that hold for every run."""
    for variant in ("ptq", "qat"):
        parity = results["variants"][variant]["parity"]
        assert parity["passed"], parity["problems"]
        assert parity["weights"]["identical"] == parity["weights"]["compared"] > 0
        for operator in parity["operators"]:
            is_conv = operator["kind"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
            assert operator["identical"] >= (0.9999 if is_conv else 0.99), operator
            assert operator["max_lsb"] <= 1, operator
        assert parity["end_to_end"]["identical"] >= 0.99
        assert parity["end_to_end"]["top1_agreement"] >= 0.999
        assert results["variants"][variant]["inspection"]["fully_integer"]


# ------------------------------------------------------------------ a finished run


def test_every_artefact_is_there(small_run):
    directory, _ = small_run
    expected = {"environment.json", "recipe.yaml", "report.html", "report.json", ".lock"}
    expected |= {f"{variant}.tflite" for variant in VARIANTS}
    expected |= {"run_ptq.py", "Ptq.kt", "run_qat.py", "Qat.kt"}
    expected |= {f"models/{variant}.keras" for variant in VARIANTS}
    expected |= {f"outputs/{variant}.npz" for variant in VARIANTS}
    expected |= {f"steps/{step}.json" for step in pipeline.STEPS}
    kinds = ("identical_percent", "sqnr_db", "sqnr_in_model_db")
    expected |= {"model_card.md"} | {f"model_explorer/{v}_{kind}.json" for v in ("ptq", "qat") for kind in kinds}
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("tensorboard/")} == expected
    assert list(directory.glob("tensorboard/qat/train/events.*"))


def test_the_report_can_draw_every_plot_and_names_tensors_of_the_files(small_run):
    directory, _ = small_run
    page = (directory / "report.html").read_text()
    names = ("tradeoff", "accuracy", "latency", "profile", "training-qat", "ranges", "noise", "weights", "outputs")
    assert [name for name in names if f'id="chart-{name}"' not in page] == []
    assert 'id="zoom-readable"' in page and "Nothing is excluded" in page
    assert len((directory / "report.json").read_bytes()) < 300_000
    for variant in ("ptq", "qat"):
        content = (directory / f"{variant}.tflite").read_bytes()
        names_in_file = {tensor.name for tensor in flatbuffer.read(content).tensors}
        for path in directory.glob(f"model_explorer/{variant}_*.json"):
            assert set(json.loads(path.read_text())["main"]["results"]) <= names_in_file
        assert hashlib.sha256(content).hexdigest() in (directory / "model_card.md").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_have_metadata(small_run, variant):
    found = read_metadata(small_run[0] / f"{variant}.tflite")
    assert found.labels == tuple(small_run[1]["data"]["class_names"]) == tuple("0123456789")
    assert found.name == "digits_dscnn_w8a8" and (found.mean, found.std) == (0.0, 1.0)
    assert small_run[1]["variants"][variant]["size_bytes"] == (small_run[0] / f"{variant}.tflite").stat().st_size


def test_metadata_is_left_out_on_request(small_run, tmp_path):
    directory = shutil.copytree(small_run[0], tmp_path / "run")
    recipe = load_recipe("digits_dscnn_w8a8", [*SMALL, "convert.metadata=false"])
    (directory / "recipe.yaml").write_text(dump_recipe(recipe))
    (directory / "steps" / "convert.json").unlink()
    pipeline.train(recipe, directory, resume=True)
    assert read_metadata(directory / "qat.tflite") is None
    assert (directory / "qat.tflite").stat().st_size < (small_run[0] / "qat.tflite").stat().st_size


@pytest.mark.parametrize("variant", ["ptq", "qat"])
def test_the_program_beside_a_file_answers_as_was_evaluated(small_run, variant):
    """On every test sample, from its pixels."""
    directory, results = small_run
    spec = importlib.util.spec_from_file_location(f"run_{variant}", directory / f"run_{variant}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    interpreter, test = program.load(), load_dataset("digits").test
    answers = np.stack([program.run(interpreter, sample) for sample in test.x])
    evaluated = np.load(directory / "outputs" / f"{variant}.npz")["interpreter"]
    count = len(evaluated)
    assert np.array_equal(answers[:count], program.dequantize(evaluated))
    right = np.mean([program.LABELS[i] == str(y) for i, y in zip(answers[:count].argmax(1), test.y, strict=False)])
    assert right == results["variants"][variant]["accuracy"]["interpreter"]


def test_techniques_before_training_repair_few_bits(small_run, tmp_path):
    weights = small_run[0] / "models" / "float.keras"
    plain = [f"model.weights={weights}", "model.name=null", "float.epochs=0", "qat.enabled=false"]
    plain += ["bench.enabled=false", "quantize.scheme=w3a8", "quantize.adaround.steps=0"]
    techniques = ["equalize=true", "correct_bias=true", "adaround={steps: 100, samples: 128}"]
    techniques = [f"quantize.{technique}" for technique in techniques]
    accuracies = {}
    for name, overrides in (("plain", plain), ("repaired", plain + techniques)):
        results = pipeline.train(load_recipe("digits_dscnn_w8a8", overrides), tmp_path / name)
        accuracies[name] = results["variants"]["ptq"]["accuracy"]["interpreter"]
        assert results["variants"]["ptq"]["parity"]["passed"]
    assert accuracies["repaired"] > accuracies["plain"]
    notes = json.loads((tmp_path / "repaired" / "steps" / "ptq.json").read_text())["result"]["result"]
    rounded = {row["operator"] for row in notes["rounded"]}
    assert rounded == {row["layers"][0] for row in notes["plan"] if row["weight_bits"]} and notes["equalized"]
    assert all(row["error"] <= row["error_before"] for row in notes["rounded"])
    assert [line.split()[0] for line in results["preparation"]] == ["Equalized", "Learned", "Corrected"]
    assert all(line in (tmp_path / "repaired" / "report.html").read_text() for line in results["preparation"][:1])
    # Noise is that against the weights before rounding: the plain run's, not that of weights on their grid.
    kept, path = tmp_path / "repaired" / "models", tmp_path / "repaired" / "models" / "ptq.keras"
    reference = pipeline.find_reference(path)
    assert reference is not None and pipeline.find_reference(kept / "float.keras") is None
    samples = np.asarray(load_dataset("digits").test.x[:64])
    against, itself = (plot_data.noise(load_model(path), samples, r) for r in (reference, None))
    assert results["variants"]["ptq"]["layers"] == against != itself


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"scheme": "w8a8"}, None),
        ({"scheme": "w8a16"}, None),
        ({"scheme": "w1a8"}, None),
        ({"scheme": "w7a8"}, 300),
        ({"scheme": "w2a8"}, 300),
        ({"scheme": "w8a8", "layers": {"classes": "w4a8"}}, 300),
    ],
)
def test_few_bits_are_rounded_by_adaround_unless_told_otherwise(options, steps, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline, "adaround", lambda model, x, **given: calls.append((len(x), given)) or [])
    dataset, model = load_dataset("digits"), models.build_model("dscnn", (8, 8, 1), 10, {"filters": 4, "blocks": 1})
    quantized = quantize_model(model, **options)
    pipeline._adaround(quantized, dataset, AdaRound(), seed=3)
    pipeline._adaround(quantized, dataset, AdaRound(steps=0), seed=3)
    assert calls == ([(1024, {"steps": steps, "seed": 3, "batch_size": 32, "learning_rate": 0.03})] if steps else [])
    pipeline._adaround(quantized, dataset, AdaRound(steps=7, samples=40), seed=3)
    monkeypatch.setattr(pipeline, "LAYERWISE_BYTES", 20 * bytes_per_sample(quantized))
    pipeline._adaround(quantized, dataset, AdaRound(steps=7, samples=40), seed=3)
    assert [count for count, given in calls[-2:] if given["steps"] == 7] == [40, 20]


def test_the_report_is_what_was_returned(small_run):
    directory, results = small_run
    assert (directory / "report.json").read_text() == json.dumps(results, indent=1) + "\n"
    assert list(results["variants"]) == list(VARIANTS)
    assert [step["name"] for step in results["steps"]] == list(pipeline.STEPS)
    assert {step["status"] for step in results["steps"]} == {"done"}
    page = (directory / "report.html").read_text()
    assert results["verdict"]["file"] in page
    assert not re.search(r'(src|href)="https?:', page)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reported_accuracy_is_what_the_interpreter_gives(small_run, variant):
    directory, results = small_run
    test = load_dataset("digits").test
    reported = results["variants"][variant]["accuracy"]
    assert reported["samples"] == len(test.y) == 359
    assert reported["interpreter"] == interpreter_accuracy(directory / f"{variant}.tflite", test.x, test.y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_saved_model_gives_the_reported_simulation(small_run, variant):
    directory, results = small_run
    test = load_dataset("digits").test
    outputs = load_model(directory / "models" / f"{variant}.keras").predict(test.x, verbose=0)
    assert float(np.mean(outputs.argmax(1) == test.y)) == results["variants"][variant]["accuracy"]["simulation"]
    with np.load(directory / "outputs" / f"{variant}.npz") as kept:
        np.testing.assert_allclose(kept["simulation"], outputs, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reported_sizes_and_operators_are_the_file_s(small_run, variant):
    directory, results = small_run
    row = results["variants"][variant]
    size = (directory / row["file"]).stat().st_size
    assert row["size_bytes"] == row["inspection"]["size_bytes"] == size
    assert all(record["size_bytes"] == size for record in row["bench"])
    counts = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 2, "MEAN": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1}
    assert row["inspection"]["operator_counts"] == counts
    assert row["inspection"]["fully_integer"] is (variant != "float")


class Bench:
    """As much of a run as the bench step sees."""

    def __init__(self, directory, settings):
        self.recipe = load_recipe("digits_dscnn_w8a8", (*SMALL, *settings))
        self.variants, self.failures = list(VARIANTS), []
        self.test = load_dataset("digits").test.x, None
        self.file = lambda variant: (directory / f"{variant}.tflite").read_bytes()
        self.fail = self.failures.append


def test_other_targets(small_run):
    require_target(parse_target("ethos-u55-128"))
    run = Bench(
        small_run[0], ("bench.targets=[host, ethos-u55-128]", "bench.min_delegated=0.9", "bench.threads=[1, 2]")
    )
    records = pipeline._bench(run)
    places = {variant: [(row["target"], row["unit"]) for row in rows] for variant, rows in records.items()}
    assert places["float"] == 2 * [("host", "ms")] and places["qat"] == [
        *2 * [("host", "ms")],
        ("ethos-u55-128", "cycles"),
    ]
    assert records["ptq"][2]["delegate"]["share"] == 1.0 and "ratio_to_float" not in records["ptq"][2]
    assert run.failures == []  # this machine does not say how many operators XNNPACK took


def test_a_target_that_is_not_there_is_found_before_training(tmp_path):
    recipe = load_recipe("digits_dscnn_w8a8", (*SMALL, "bench.targets=['android:no-such-phone']"))
    display = Recorder()
    with pytest.raises(DeviceError, match="The target android:no-such-phone cannot be used"):
        pipeline.train(recipe, tmp_path / "run", display=display)
    assert display.ended == {"data": "failed"}


def test_simulation_and_interpreter_agree(small_run):
    _, results = small_run
    check_parity(results)
    for variant in ("ptq", "qat"):
        assert results["variants"][variant]["parity"]["end_to_end"]["identical"] == 1.0
        accuracy = results["variants"][variant]["accuracy"]
        assert accuracy["simulation"] == accuracy["interpreter"]


def test_the_network_has_learned(small_run):
    _, results = small_run
    accuracies = {name: row["accuracy"]["interpreter"] for name, row in results["variants"].items()}
    assert accuracies["float"] > 0.9
    assert min(accuracies["ptq"], accuracies["qat"]) > accuracies["float"] - 0.05
    assert [len(results["training"][name]["epochs"]) for name in ("float", "qat")] == [12, 2]


def test_the_resolved_recipe_and_the_versions_are_kept(small_run):
    directory, results = small_run
    kept = parse_recipe((directory / "recipe.yaml").read_text(), file="recipe.yaml")
    assert kept == load_recipe("digits_dscnn_w8a8", SMALL)
    assert results["recipe"] == kept.model_dump(mode="json")
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["keras"] == keras.__version__
    assert environment["packages"]["tensorflow"] == environment["tensorflow"]


def test_calibration_draws_from_the_training_split(small_run):
    _, results = small_run
    data = results["data"]
    assert data["calibration"] <= data["train"]
    assert data["train"] + data["validation"] + data["test"] == 1797


# ------------------------------------------------------------------ resume


def test_resume_of_a_finished_run_does_nothing_again(small_run, tmp_path):
    directory = shutil.copytree(small_run[0], tmp_path / "run")
    before, display = modified(directory), Recorder()
    results = pipeline.train(load_recipe("digits_dscnn_w8a8", SMALL), directory, resume=True, display=display)
    assert set(display.ended.values()) == {"resumed"}
    assert modified(directory) == before
    for part in ("variants", "verdict", "training", "plan"):
        assert json.dumps(results[part]) == json.dumps(small_run[1][part])


def test_resume_redoes_the_steps_whose_files_are_gone(small_run, tmp_path):
    directory = shutil.copytree(small_run[0], tmp_path / "run")
    (directory / "qat.tflite").unlink()
    display = Recorder()
    results = pipeline.train(load_recipe("digits_dscnn_w8a8", SMALL), directory, resume=True, display=display)
    assert [name for name, status in display.ended.items() if status == "resumed"] == ["data", "float", "ptq", "qat"]
    assert set(list(display.ended.values())[4:]) == {"done"}
    assert (directory / "qat.tflite").read_bytes() == (small_run[0] / "qat.tflite").read_bytes()
    check_parity(results)


def test_an_interrupted_run_resumes_to_the_same_files(small_run, tmp_path):
    """Also: the same seed gives the same bytes, twice, float and quantized."""
    recipe, directory = load_recipe("digits_dscnn_w8a8", SMALL), tmp_path / "run"
    interrupted = Recorder(interrupt=("qat", 1))
    with pytest.raises(KeyboardInterrupt) as raised:
        pipeline.train(recipe, directory, display=interrupted)
    assert raised.value.__notes__ == [
        "Step 'qat' did not finish. What came before it is kept. To go on: mobileqat train "
        f"{directory}/recipe.yaml --out {directory} --resume"
    ]
    assert interrupted.ended == {"data": "done", "float": "done", "ptq": "done", "qat": "failed"}
    partial = json.loads((directory / "report.json").read_text())
    assert partial["verdict"]["ship"] is None
    assert partial["steps"][-1]["message"] == "KeyboardInterrupt"
    assert not (directory / "models" / "qat.keras").exists()

    resumed = Recorder()
    pipeline.train(recipe, directory, resume=True, display=resumed)
    assert [name for name, status in resumed.ended.items() if status == "resumed"] == ["data", "float", "ptq"]
    for variant in VARIANTS:
        file = f"{variant}.tflite"
        assert (directory / file).read_bytes() == (small_run[0] / file).read_bytes(), variant


def test_resume_with_another_recipe_is_refused(small_run):
    before = modified(small_run[0])
    with pytest.raises(RunDirectoryError, match=r"-  epochs: 2\n  \+  epochs: 3"):
        pipeline.train(load_recipe("digits_dscnn_w8a8", [*SMALL, "qat.epochs=3"]), small_run[0], resume=True)
    assert modified(small_run[0]) == before


# ------------------------------------------------------------------ runs that fail

# A network of one layer that needs no training: a run takes a second or two.
TINY = """
name: tiny
description: one dense layer
data: {source: digits, calibration_samples: 32}
model: {name: "test_pipeline:dense_model"}
qat: {epochs: 1, batch_size: 256}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 32}
"""


def dense_model(input_shape, classes):
    layers = keras.layers
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(classes, activation="softmax")])


def normalized(input_shape, classes):
    """With BatchNormalization, and a channel without weights."""
    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    model = keras.Model(image, keras.layers.Dense(classes)(keras.layers.Flatten()(x)))
    kernel = model.get_layer("conv").kernel
    kernel.assign(kernel.numpy() * np.array([1, 1, 0, 1], np.float32))
    return model


def no_model():
    return None


def wrong_classes(input_shape):
    return dense_model(input_shape, 7)


def wrong_input(classes):
    return dense_model((5, 5, 1), classes)


def two_outputs(input_shape, classes):
    image = keras.Input(input_shape)
    x = keras.layers.Flatten()(image)
    return keras.Model(image, [keras.layers.Dense(classes)(x), keras.layers.Dense(classes)(x)])


def map_output(input_shape, classes):
    image = keras.Input(input_shape)
    return keras.Model(image, keras.layers.Conv2D(classes, 3)(image))


class Subclassed(keras.Model):
    def call(self, x):
        return x


def subclassed():
    return Subclassed()


@keras.saving.register_keras_serializable("tests")
class Custom(keras.Model):
    def __init__(self, classes, **options):
        super().__init__(**options)
        self.convolution = keras.layers.Conv2D(4, 3, activation="relu")
        self.head = keras.layers.Dense(classes, activation="softmax")
        self.classes = classes

    def call(self, x):
        return self.head(keras.ops.mean(self.convolution(x), axis=(1, 2)))

    def get_config(self):
        return super().get_config() | {"classes": self.classes}


def custom(input_shape, classes):
    return Custom(classes, name="custom")


def open_sizes(input_shape, classes):
    image = keras.Input((None, None, input_shape[-1]))
    return keras.Model(image, Custom(classes)(image))


def nan_weights(input_shape, classes):
    model = dense_model(input_shape, classes)
    kernel, bias = model.get_weights()
    kernel[3, 2] = np.nan
    model.set_weights([kernel, bias])
    return model


def unsupported(input_shape, classes):
    image = keras.Input(input_shape)
    x = keras.layers.BatchNormalization(axis=1, name="normalized")(image)
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.Softmax(axis=(1, 3), name="softmax")(x)
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.Flatten()(x)))


def dead_layer(input_shape, classes):
    image = keras.Input(input_shape)
    bias = keras.initializers.Constant(-1e6)
    x = keras.layers.Conv2D(4, 3, activation="relu", bias_initializer=bias, name="dead")(image)
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.Flatten()(x)))


def layer_normalized(input_shape, classes):
    image = keras.Input(input_shape)
    x = keras.layers.LayerNormalization(name="ln")(keras.layers.Conv2D(4, 3)(image))
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.Flatten()(x)))


class Doubled(keras.layers.Layer):
    """Not registered with Keras, as most layers of users are."""

    def call(self, x):
        return x * 2.0


def own_layer(input_shape, classes):
    layers = keras.layers
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), Doubled(), layers.Dense(classes)])


def bad_data():
    x, y = np.zeros((30, 8, 8, 1), np.float32), np.arange(30) % 10
    x[7, 1, 2, 0] = np.nan
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y}


def tiny(*overrides):
    return parse_recipe(TINY, file="tiny.yaml", overrides=overrides)


@pytest.mark.parametrize(
    ("override", "error", "problem"),
    [
        ("model.name=test_pipeline:no_model", ModelError, "must return a Keras 3 model. Received: NoneType"),
        ("model.name=test_pipeline:absent", ModelError, "'test_pipeline:absent' cannot be imported"),
        ("model.name=absent_module:f", ModelError, "No module named 'absent_module'"),
        ("model.name=test_pipeline:TINY", ModelError, "is not callable"),
        ("model.name=test_pipeline:wrong_classes", ModelError, "shape [(None, 7)]. The data has 10 classes"),
        ("model.name=test_pipeline:wrong_input", ModelError, "takes inputs of shape [(None, 5, 5, 1)]"),
        ("model.name=test_pipeline:two_outputs", ModelError, "expected one output of shape (None, 10)"),
        ("model.name=test_pipeline:map_output", ModelError, "outputs of shape [(None, 6, 6, 10)]"),
        ("model.name=test_pipeline:subclassed", ModelError, "computes nothing"),
        ("model.name=test_pipeline:nan_weights", ModelError, "NaN or infinite values in 1 of 2 weights"),
        ("model.weights=absent.keras", ModelError, "There is no file 'absent.keras'"),
        ("model.args={depth: 3}", ModelError, "unexpected keyword argument 'depth'"),
        ("data.source=test_pipeline:bad_data", DataError, "x_train[7, 1, 2, 0] is nan"),
        ("data.source=test_pipeline:absent", DataError, "cannot be imported"),
    ],
)
def test_what_cannot_run_ends_before_any_training(tmp_path, override, error, problem):
    with pytest.raises(error) as raised:
        pipeline.train(tiny("float.epochs=1", override), tmp_path / "run")
    assert problem in str(raised.value)
    assert not list((tmp_path / "run").glob("models/*"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_all_unsupported_layers_are_reported_before_any_training(tmp_path):
    with pytest.raises(UnsupportedModelError) as raised:
        pipeline.train(tiny("model.name=test_pipeline:unsupported", "float.epochs=1"), tmp_path / "run")
    assert "- normalized" in str(raised.value) and "- softmax" in str(raised.value)
    assert "- conv" not in str(raised.value)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_what_an_excluded_square_root_adds_is_excluded_with_it(tmp_path):
    """In float it adds its epsilon by an operator of its own."""
    excluded = "quantize.exclude=[ln/primitive]"
    results = pipeline.train(tiny("model.name=test_pipeline:layer_normalized", excluded), tmp_path / "run")
    assert results["variants"]["ptq"]["inspection"]["problems"] == []
    assert "ADD" in results["variants"]["ptq"]["inspection"]["excluded"]


def test_a_range_that_never_moves_ends_before_qat(tmp_path):
    with pytest.raises(CalibrationError, match=r"'dead/relu' has collapsed to zero"):
        pipeline.train(tiny("model.name=test_pipeline:dead_layer"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "models").iterdir()] == ["float.keras"]


def test_training_that_diverges_is_a_failed_check(tmp_path):
    diverging = ("qat.learning_rate=3e38", "qat.optimizer=sgd", "qat.batch_size=64")
    with pytest.raises(TrainingError, match=r"became (nan|NaN or infinite) at step"):
        pipeline.train(tiny(*diverging), tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run" / "models").iterdir()}
    assert kept == {"float.keras", "ptq.keras", "qat_last_good.keras"}
    last_good, ptq = (load_model(tmp_path / "run" / "models" / f"{name}.keras") for name in ("qat_last_good", "ptq"))
    for kept_weight, weight in zip(last_good.get_weights(), ptq.get_weights(), strict=True):
        np.testing.assert_array_equal(kept_weight, weight)


def test_qat_from_scratch_starts_where_float_training_starts(tmp_path):
    settings = ("float.epochs=3", "float.learning_rate=0.01", "qat.from_scratch=true", "qat.epochs=0")
    results = pipeline.train(tiny(*settings), tmp_path / "run")
    initial, trained = (load_model(tmp_path / "run" / "models" / f"{name}.keras") for name in ("initial", "float"))
    quantized = load_model(tmp_path / "run" / "models" / "qat.keras")
    for own, start, end in zip(strip(quantized).weights, initial.weights, trained.weights, strict=True):
        np.testing.assert_array_equal(own, start)
        assert not np.array_equal(own, end)
    accuracies = {name: row["accuracy"]["interpreter"] for name, row in results["variants"].items()}
    assert accuracies["qat"] < accuracies["ptq"] - 0.2


@pytest.mark.parametrize("learns", ["false", "true"])
def test_qat_from_scratch_learns_what_float_training_learns(learns, tmp_path):
    """Beyond too small ranges values get no gradient, and classes stay unlearned."""
    settings = [
        "model.args={filters: 32, blocks: 2}",
        "data.augment.shift=0",
        "parity.samples=2",
        "bench.enabled=false",
    ]
    for section in ("float", "qat"):
        settings += [f"{section}.epochs=6", f"{section}.batch_size=32", f"{section}.learning_rate=0.01"]
    settings += ["qat.from_scratch=true", "qat.distillation=0", f"quantize.learn_activation_ranges={learns}"]
    results = pipeline.train(load_recipe("digits_dscnn_w8a8", settings), tmp_path / "run")
    accuracies = {name: row["accuracy"]["interpreter"] for name, row in results["variants"].items()}
    assert accuracies["qat"] >= accuracies["float"] - 0.03


def test_classes_that_calibration_never_sees_are_named(tmp_path):
    display = Recorder()
    pipeline.train(tiny("data.calibration_samples=3", "qat.enabled=false"), tmp_path / "run", display=display)
    (line,) = [line for line in display.said if "Calibration" in line]
    assert re.match(r"Calibration sees no sample of (\d, ){6}\d: ", line)


def test_one_calibration_sample_and_batches_of_one(tmp_path):
    settings = ("data.calibration_samples=1", "qat.batch_size=1", "model.name=test_pipeline:normalized")
    results = pipeline.train(tiny(*settings), tmp_path / "run")
    for variant in ("ptq", "qat"):
        assert results["variants"][variant]["parity"]["passed"]
    assert np.isfinite(results["training"]["qat"]["epochs"][0]["loss"])


def test_a_disk_that_fills_up_leaves_what_came_before(tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def full_after_the_models(descriptor):
        if list((tmp_path / "run").glob("models/qat.keras")):
            synced.append(descriptor)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_the_models)
    with pytest.raises(RunDirectoryError, match="is full"):
        pipeline.train(tiny(), tmp_path / "run")
    assert synced
    assert not list((tmp_path / "run").glob("*.tflite"))
    assert not list((tmp_path / "run").rglob(".unfinished*"))

    monkeypatch.undo()
    display = Recorder()
    pipeline.train(tiny(), tmp_path / "run", resume=True, display=display)
    assert display.ended["ptq"] == "resumed" and display.ended["evaluate"] == "done"


def test_a_failed_check_is_reported_after_everything_ran_and_tried_again(tmp_path):
    recipe, directory = tiny("qat.enabled=false"), tmp_path / "run"
    pipeline.train(recipe, directory)
    content = (directory / "ptq.tflite").read_bytes()
    model = load_model(directory / "models" / "ptq.keras")
    kernel = next(weight for weight in model.weights if weight.path.endswith("kernel"))
    kernel.assign(np.flip(kernel.numpy(), axis=1))
    model.save(directory / "models" / "ptq.keras")
    (directory / "steps" / "parity.json").unlink()
    display = Recorder()
    with pytest.raises(ParityError, match="does not compute what was trained"):
        pipeline.train(recipe, directory, resume=True, display=display)
    assert (directory / "ptq.tflite").read_bytes() == content
    assert display.ended["parity"] == "failed" and display.ended["evaluate"] == "done"
    results = json.loads((directory / "report.json").read_text())
    assert results["variants"]["ptq"]["parity"]["passed"] is False
    assert results["verdict"]["ship"] == "float"
    assert not (directory / "steps" / "parity.json").exists()


def test_without_qat_two_files_are_made(tmp_path):
    results = pipeline.train(tiny("qat.enabled=false"), tmp_path / "run")
    assert list(results["variants"]) == ["float", "ptq"]
    assert results["verdict"]["qat_worth_it"] is None
    assert not (tmp_path / "run" / "qat.tflite").exists()
    statuses = {step["name"]: step["status"] for step in results["steps"]}
    assert statuses["qat"] == statuses["bench"] == "skipped"


@pytest.mark.parametrize(("input_type", "output_type"), [("uint8", "float32"), ("float32", "uint8")])
def test_other_interface_types_run_through(tmp_path, input_type, output_type):
    recipe = tiny("qat.enabled=false", f"convert.input_type={input_type}", f"convert.output_type={output_type}")
    results = pipeline.train(recipe, tmp_path / "run")
    assert results["variants"]["ptq"]["parity"]["passed"]
    inspection = results["variants"]["ptq"]["inspection"]
    assert inspection["inputs"][0]["dtype"] == input_type
    assert inspection["outputs"][0]["dtype"] == output_type


@pytest.mark.parametrize("model", ["custom", "open_sizes"])
def test_models_whose_shapes_the_data_tells(tmp_path, model):
    """A subclassed model, and one whose input leaves its sizes open."""
    results = pipeline.train(tiny(f"model.name=test_pipeline:{model}"), tmp_path / "run")
    assert all(results["variants"][variant]["parity"]["passed"] for variant in ("ptq", "qat"))
    assert results["variants"]["qat"]["inspection"]["inputs"][0]["shape"] == (1, 8, 8, 1)


# ------------------------------------------------------------------ the shipped recipes


def test_a_layer_of_the_user_goes_through_a_run_and_its_resumption(tmp_path):
    recipe = tiny("model.name=test_pipeline:own_layer", "qat.enabled=true", "qat.epochs=1")
    pipeline.train(recipe, tmp_path)
    (tmp_path / "models" / "qat.keras").unlink()
    resumed = Recorder()
    pipeline.train(recipe, tmp_path, resume=True, display=resumed)
    assert (resumed.ended["float"], resumed.ended["qat"]) == ("resumed", "done")


def test_a_model_that_takes_grey_images_says_how_to_read_them():
    assert pipeline._remedy([(None, 32, 32, 1)], (96, 96, 3)) == (
        " Image folders and TFRecord files are read as that with data.options: {channels: 1} and data.image_size: "
        "[32, 32]."
    )
    assert pipeline._remedy([(None, 64, 1)], (32, 1)) == pipeline._remedy([(None, 8, 8, 16)], (8, 8, 3)) == ""


def run_recipe(name: str, directory: Path, *overrides: str) -> dict:
    results = pipeline.train(load_recipe(name, overrides), directory)
    check_parity(results)
    return {variant: row["accuracy"]["interpreter"] for variant, row in results["variants"].items()} | {
        "size_ratio": results["variants"]["qat"]["size_bytes"] / results["variants"]["float"]["size_bytes"]
    }


needs_data = pytest.mark.skipif(
    not os.environ.get("MOBILEQAT_DATA"), reason="needs MOBILEQAT_DATA, the folder of the data sets"
)


@pytest.mark.slow
def test_recipe_digits(tmp_path):
    numbers = run_recipe("digits_dscnn_w8a8", tmp_path / "run")
    assert numbers["float"] >= 0.97
    assert numbers["ptq"] >= numbers["float"] - 0.02
    assert numbers["qat"] >= numbers["float"] - 0.015


@pytest.mark.slow
def test_recipe_digits_from_scratch(tmp_path):
    numbers = run_recipe("digits_dscnn_scratch_w4a8", tmp_path / "run")
    assert numbers["qat"] >= numbers["float"] - 0.02


@pytest.mark.slow
@needs_data
def test_recipe_cifar10(tmp_path):
    numbers = run_recipe("cifar10_resnet8_w8a8", tmp_path / "run")
    assert numbers["float"] == pytest.approx(0.8719, abs=0.0005)
    assert numbers["ptq"] >= 0.870
    assert numbers["qat"] >= 0.8719 - 0.002  # one seed; the mean of three is what has to reach 0.8719
    assert numbers["size_ratio"] <= 0.30


@pytest.mark.slow
@needs_data
def test_recipe_fashion_mnist(tmp_path):
    numbers = run_recipe("fashion_mnist_mobilenetv1_w8a8", tmp_path / "run")
    assert numbers["float"] >= 0.90
    assert numbers["qat"] >= numbers["float"] - 0.01
