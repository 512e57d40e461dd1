"""Importing Keras 2 models: what comes out computes what went in, and what cannot be imported is refused by name."""

import base64
import importlib.util
import json
import marshal
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner

import mobileqat as mq
from mobileqat import cli
from mobileqat.errors import LegacyUnavailableError, ModelError, ParityError, UnsupportedModelError
from mobileqat.legacy import files, process
from mobileqat.legacy.keras2 import import_keras2
from mobileqat.legacy.translate import translate

HAS_TF_KERAS = bool(os.environ.get(process.INTERPRETER) or importlib.util.find_spec("tf_keras"))
needs_tf_keras = pytest.mark.skipif(not HAS_TF_KERAS, reason='needs tf_keras: pip install "mobileqat[tfmot]"')
DATA = os.environ.get("MOBILEQAT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs MOBILEQAT_DATA, the folder of the data sets")
MLPERF = Path(DATA or ".") / "mlperf-tiny" / "models"
SCRIPT = Path(__file__).with_name("keras2_models.py")
MODELS = (
    "sequential", "convolutions", "nested", "nested_without_input_layer", "shared_layer", "dictionaries", "recurrent",
    "recurrent_states", "normalizations", "frozen", "attention", "activation_layers", "operators",
)  # fmt: skip
FILES = [
    f"{name}.{suffix}" for name in MODELS for suffix in ("h5", "keras") if (name, suffix) != ("operators", "keras")
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Every model of keras2_models.py, with inputs and outputs, as tf_keras has them."""
    folder = tmp_path_factory.mktemp("zoo")
    python = os.environ.get(process.INTERPRETER) or sys.executable
    done = subprocess.run([python, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def rebuild(path: Path) -> keras.Model:
    translation = translate(files.read_config(path), str(path))
    files.load_weights(path, translation)
    return translation.model


def relative_difference(received, expected) -> float:
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(received, expected, strict=True)]
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


# ------------------------------------------------------------------ models that can be imported


@needs_tf_keras
@pytest.mark.parametrize("file", FILES)
def test_the_imported_model_computes_the_same(zoo, file, tmp_path):
    rebuild(zoo / file).save(tmp_path / "new.keras")
    model = keras.models.load_model(tmp_path / "new.keras", safe_mode=True)
    with np.load(zoo / f"{Path(file).stem}.npz") as arrays:
        inputs = [arrays[f"in{i}"] for i in range(len(model.inputs))]
        outputs = [arrays[f"out{i}"] for i in range(len(model.outputs))]
    assert all(np.ptp(array.astype("f")) > 0.01 for array in outputs)  # nothing that two models agree on by chance
    given = inputs[0] if isinstance(model, keras.Sequential) else keras.tree.pack_sequence_as(model.input, inputs)
    received = keras.tree.flatten(model.predict(given, verbose=0))
    assert relative_difference(received, outputs) < 1e-5


@needs_tf_keras
def test_names_regularizers_and_what_is_frozen_are_kept(zoo):
    model = rebuild(zoo / "convolutions.h5")
    layer = model.get_layer("depthwise_conv2d")
    assert [round(float(layer.depthwise_regularizer.l1), 6), round(float(layer.depthwise_regularizer.l2), 6)] == [
        0.1,
        0.2,
    ]
    assert model.layers[0].name == "image"
    assert model.get_layer("conv_grouped").groups == 2  # Keras 3 has no slash in names
    frozen = rebuild(zoo / "frozen.keras")
    assert len(frozen.trainable_weights) == 2
    assert isinstance(rebuild(zoo / "sequential.h5"), keras.Sequential)


@needs_tf_keras
@pytest.mark.parametrize("source", ["sequential.keras", "saved_model"])
def test_import_compares_what_it_wrote(zoo, source, tmp_path):
    imported = import_keras2(zoo / source, tmp_path / "new.keras")
    assert imported.not_compared is None and imported.ranges is None
    assert 0 <= imported.largest_difference <= 1e-6 * imported.largest_output
    assert list(tmp_path.iterdir()) == [tmp_path / "new.keras"]
    mq.load_model(tmp_path / "new.keras")


@needs_tf_keras
def test_outputs_that_differ_are_an_error_and_nothing_is_written(zoo, tmp_path, monkeypatch):
    """tf_keras and this project are given different files: as good as a translation that is wrong."""
    monkeypatch.setattr(files, "load_weights", lambda path, translation: 0)
    with pytest.raises(ParityError, match=r"differ by .* Nothing was written"):
        import_keras2(zoo / "sequential.h5", tmp_path / "new.keras")
    assert not list(tmp_path.iterdir())


@needs_data
@pytest.mark.parametrize(
    ("file", "weights"),
    [
        ("ic01/pretrainedResnet.h5", 48),
        ("vww01/vww_96.h5", 164),
        pytest.param("ad01/ad01.h5", 56, marks=pytest.mark.slow),
        pytest.param("sww01/str_ww_ref_model.h5", 26, marks=pytest.mark.slow),
        pytest.param("kws01/kws_ref_model", 56, marks=[pytest.mark.slow, needs_tf_keras]),
    ],
)
def test_mlperf_tiny(file, weights, tmp_path):
    imported = import_keras2(MLPERF / file, tmp_path / "new.keras")
    assert imported.weights == weights
    if HAS_TF_KERAS:
        assert imported.largest_difference <= 1e-5 * imported.largest_output
    else:
        assert "pip install" in imported.not_compared


@needs_data
def test_what_keras_3_loads_itself_is_the_same_model(tmp_path):
    path = MLPERF / "ic01" / "pretrainedResnet.h5"
    x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("f")
    ours, theirs = rebuild(path), keras.models.load_model(path, compile=False)
    np.testing.assert_array_equal(ours.predict(x, verbose=0), theirs.predict(x, verbose=0))


@needs_data
def test_an_imported_model_goes_through_the_native_path():
    model = rebuild(MLPERF / "vww01" / "vww_96.h5")
    quantized = mq.quantize_model(model, input_range=(0, 1))
    x = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3)).astype("f") / 255
    mq.calibrate(quantized, x)
    content = mq.convert(quantized)
    assert mq.inspect(content).fully_integer


# ------------------------------------------------------------------ files made by hand


def entry(class_name: str, name: str, inbound: list | None = None, **config) -> dict:
    nodes = [[[source, 0, 0, {}] for source in inbound]] if inbound else []
    return {"class_name": class_name, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes}


def write_h5(path: Path, layers: list[dict], weights: dict | None = None, class_name: str = "Functional") -> Path:
    config = {"name": "model", "layers": layers}
    if class_name == "Functional":
        config |= {"input_layers": [["x", 0, 0]], "output_layers": [[layers[-1]["name"], 0, 0]]}
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": class_name, "config": config})
        file.create_group("model_weights").attrs["layer_names"] = [layer["config"]["name"].encode() for layer in layers]
        for name, arrays in (
            (layer["config"]["name"], (weights or {}).get(layer["config"]["name"], {})) for layer in layers
        ):
            group = file.create_group(f"model_weights/{name}")
            group.attrs["weight_names"] = list(arrays)
            for key, array in arrays.items():
                group[key] = array
    return path


INPUT = entry("InputLayer", "x", batch_input_shape=[None, 4], dtype="float32")
DENSE = {"dense": {"dense/kernel:0": np.ones((4, 3)), "dense/bias:0": np.arange(3.0)}}


def test_a_file_made_by_hand(tmp_path):
    dense = entry("Dense", "dense", ["x"], units=3, activation="relu", kernel_initializer={"class_name": "Unknown"})
    model = rebuild(write_h5(tmp_path / "model.h5", [INPUT, dense], DENSE))
    assert model.predict(np.ones((1, 4)), verbose=0).tolist() == [[4, 5, 6]]


def test_a_sequential_model_as_a_bare_list(tmp_path):
    dense = {"class_name": "Dense", "config": {"name": "dense", "units": 3, "batch_input_shape": [None, 4]}}
    path = write_h5(tmp_path / "model.h5", [dense], DENSE, class_name="Sequential")
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [dense]})
    assert rebuild(path).predict(np.ones((1, 4)), verbose=0).tolist() == [[4, 5, 6]]


def test_a_gru_of_before_reset_after(tmp_path):
    source = entry("InputLayer", "x", batch_input_shape=[None, 5, 4])
    weights = {"kernel:0": np.ones((4, 6)), "recurrent_kernel:0": np.ones((2, 6)), "bias:0": np.ones(6)}
    model = rebuild(write_h5(tmp_path / "model.h5", [source, entry("GRU", "gru", ["x"], units=2)], {"gru": weights}))
    assert model.get_layer("gru").reset_after is False


def test_all_that_cannot_be_imported_is_listed_at_once(tmp_path):
    code = base64.b64encode(marshal.dumps((lambda x: os.abort()).__code__)).decode()
    layers = [
        INPUT,
        entry("Lambda", "code", ["x"], function=[code, None, None], function_type="lambda"),
        entry("Attend", "custom", ["code"]) | {"registered_name": "mine>Attend"},
        entry("Dense", "gate", ["custom"], units=4, activation="hard_sigmoid"),
        entry("Dense", "odd", ["gate"], units=4, activation="snake"),
        entry("BatchNormalization", "renormalized", ["odd"], axis=[1], virtual_batch_size=4),
        entry("TFOpLambda", "tf.linalg.svd", function="linalg.svd")
        | {"inbound_nodes": [["renormalized", 0, 0, {"name": None}]]},
        entry("TFOpLambda", "tf.math.reduce_mean", function="math.reduce_mean")
        | {"inbound_nodes": [["tf.linalg.svd", 0, 0, {"axis": 1, "reduction_indices": 2}]]},
        entry("Dense", "penalized", ["tf.math.reduce_mean"], units=4, kernel_regularizer={"class_name": "Mine"}),
        entry("LocallyConnected1D", "local", ["penalized"], filters=3, kernel_size=[1]),
        entry("TFSMLayer", "foreign", ["local"], filepath="somewhere"),
        entry("Dropout", "drop", ["foreign"], rate=0.5),
    ]
    with pytest.raises(UnsupportedModelError) as raised:
        import_keras2(write_h5(tmp_path / "model.h5", layers), tmp_path / "new.keras")
    assert str(raised.value).splitlines() == [
        f"'{tmp_path / 'model.h5'}' cannot be imported into Keras 3, 10 places:",
        "  - code (Lambda): holds Python code. Replace it by layers or operators, and save the model again.",
        "  - custom (mine>Attend): is not a Keras layer. Replace it, or rebuild the model in Keras 3.",
        "  - gate (Dense): uses hard_sigmoid, which is another function in Keras 3. Train it with sigmoid instead.",
        "  - odd (Dense): has activation 'snake', which Keras 3 lacks. Use a Keras activation.",
        "  - renormalized (BatchNormalization): has virtual_batch_size=4, which Keras 3 lacks.",
        "  - tf.linalg.svd (tf.linalg.svd): has no equivalent in the table. Replace it by Keras layers.",
        "  - tf.math.reduce_mean (tf.math.reduce_mean): is called in a way that cannot be translated: got an "
        "unexpected keyword argument 'reduction_indices'.",
        "  - penalized (Dense): has a Mine, which is not Keras's. Remove it: it is of no use once trained.",
        "  - local (LocallyConnected1D): left Keras. Replace it by a convolution.",
        "  - foreign (TFSMLayer): is not a Keras layer. Replace it, or rebuild the model in Keras 3.",
    ]
    assert not (tmp_path / "new.keras").exists()


def test_places_in_nested_models_have_paths(tmp_path):
    inner = entry("Functional", "block", ["x"])
    inner["config"] |= {
        "layers": [INPUT, entry("Dense", "gate", ["x"], units=4, activation="hard_sigmoid")],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["gate", 0, 0]],
    }
    wrapped = entry("TimeDistributed", "each", ["block"], layer=entry("Lambda", "code"))
    with pytest.raises(UnsupportedModelError) as raised:
        rebuild(write_h5(tmp_path / "model.h5", [INPUT, inner, wrapped]))
    assert [line.split()[1] for line in str(raised.value).splitlines()[1:]] == ["block/gate", "each/code"]


@needs_tf_keras
def test_code_in_a_file_is_not_run_by_tf_keras_either(tmp_path):
    mark = tmp_path / "mark"
    code = base64.b64encode(marshal.dumps(compile(f"open({str(mark)!r}, 'w')", "x", "eval"))).decode()
    layers = [INPUT, entry("Lambda", "code", ["x"], function=[code, None, None], function_type="lambda")]
    path = write_h5(tmp_path / "model.h5", layers)
    with pytest.raises(ModelError, match="'code' is a Lambda, which holds Python code"):
        process.call("predict", {"sources": {"x": str(path)}, "unwrap": False}, arrays={"x": np.zeros((1, 4))})
    assert not mark.exists()


def broken(kind: str, folder: Path) -> Path:
    path = folder / "old.h5"
    dense = entry("Dense", "dense", ["x"], units=3)
    if kind == "weights only":
        with h5py.File(path, "w") as file:
            file.create_group("dense")
    elif kind == "other shapes":
        write_h5(path, [INPUT, dense], {"dense": {"dense/kernel:0": np.ones((4, 2)), "dense/bias:0": np.ones(3)}})
    elif kind == "missing weight":
        write_h5(path, [INPUT, dense], {"dense": {"dense/kernel:0": np.ones((4, 3))}})
    elif kind == "no layer of that name":
        write_h5(path, [INPUT, entry("Dense", "dense", ["absent"], units=3)], DENSE)
    elif kind == "shapes that do not fit":
        write_h5(path, [INPUT, entry("Conv2D", "conv", ["x"], filters=3, kernel_size=[3, 3])])
    elif kind == "damaged":
        write_h5(path, [INPUT, entry("Dense", "dense", ["x"], units=3, activation=["relu"])])
    elif kind == "no model":
        write_h5(path, [INPUT, dense], DENSE, class_name="Tokenizer")
    elif kind == "no shape":
        write_h5(path, [dense], DENSE, class_name="Sequential")
    elif kind == "truncated":
        write_h5(path, [INPUT, dense], DENSE)
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "truncated archive":
        path = folder / "old.keras"
        path.write_bytes(b"PK\x03\x04")
    elif kind == "text":
        path = folder / "old.txt"
        path.write_text("model")
    elif kind == "folder":
        path = folder / "old"
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("absent", "There is no file"),
        ("weights only", "holds weights without a model"),
        ("other shapes", "Expected: dense/kernel (4, 3), dense/bias (3,). Received: dense/kernel:0 (4, 2)"),
        ("missing weight", "The weights of 'dense' in"),
        ("no layer of that name", "the inputs of dense are not made by any layer"),
        ("shapes that do not fit", "do not fit together: 'conv' (Conv2D)"),
        ("damaged", "is damaged"),
        ("no model", "holds a Tokenizer. Expected a functional or sequential model"),
        ("no shape", "does not say the shape of its input"),
        ("truncated", "is damaged"),
        ("truncated archive", "is damaged"),
        ("text", "is not an .h5 or .keras file"),
        ("folder", "no SavedModel"),
    ],
)
def test_broken_files_are_refused(tmp_path, kind, problem):
    with pytest.raises(ModelError) as raised:
        import_keras2(broken(kind, tmp_path), tmp_path / "new.keras")
    assert problem in str(raised.value)
    assert not (tmp_path / "new.keras").exists()


def test_keras_3_files_need_no_import(tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="saved by Keras 3 already"):
        import_keras2(tmp_path / "model.keras", tmp_path / "new.keras")


def test_the_target_is_a_keras_file(tmp_path):
    with pytest.raises(ModelError, match=r"must end in \.keras"):
        import_keras2(tmp_path / "old.h5", tmp_path / "new.h5")


# ------------------------------------------------------------------ the other process


def interpreter(folder: Path, script: str) -> str:
    """An executable in place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def without_tf_keras(folder: Path) -> str:
    """This Python, as it is where neither tf_keras nor TFMOT is installed."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name.startswith('t') else find(name, *rest)\n"
    )
    package_root = Path(mq.__file__).parents[1]
    return interpreter(folder, f'PYTHONPATH="{folder}:{package_root}:$PYTHONPATH" exec "{sys.executable}" "$@"')


def test_without_tf_keras_the_import_says_what_was_not_done(tmp_path, monkeypatch):
    monkeypatch.setenv(process.INTERPRETER, without_tf_keras(tmp_path))
    source = write_h5(tmp_path / "old.h5", [INPUT, entry("Dense", "dense", ["x"], units=3)], DENSE)
    imported = import_keras2(source, tmp_path / "new.keras")
    assert imported.largest_difference is None
    assert imported.not_compared == (
        f'tf-keras is not installed for {sys.executable}. Install with: pip install "mobileqat[tfmot]"'
    )
    assert (tmp_path / "new.keras").is_file()


def test_without_tf_keras_a_saved_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(process.INTERPRETER, without_tf_keras(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "saved_model.pb").touch()
    with pytest.raises(LegacyUnavailableError, match=r'pip install "mobileqat\[tfmot\]"'):
        import_keras2(tmp_path / "old", tmp_path / "new.keras")


def test_an_interpreter_that_does_not_start(monkeypatch):
    monkeypatch.setenv(process.INTERPRETER, "/no/python/here")
    with pytest.raises(LegacyUnavailableError, match="cannot be started: No such file"):
        process.call("predict")


@pytest.mark.parametrize(
    ("script", "problem"),
    [("kill -SEGV $$", "was killed by SIGSEGV: no message"), ("echo oh >&2; exit 3", "ended with exit code 3 .* oh")],
)
def test_a_process_that_dies_is_an_error(tmp_path, monkeypatch, script, problem):
    monkeypatch.setenv(process.INTERPRETER, interpreter(tmp_path, script))
    with pytest.raises(ModelError, match=problem):
        process.call("predict")


def test_this_process_stays_with_keras_3():
    """Neither tf_keras nor TFMOT is imported here, and TensorFlow's Keras stays what it is."""
    code = (
        "import os, sys, mobileqat.legacy.keras2, mobileqat.legacy.tfmot\n"
        "assert not {'tf_keras', 'tensorflow_model_optimization'} & set(sys.modules)\n"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_archive_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        layers = [INPUT, entry("Dense", "dense", ["x"], units=3)]
        config = {"layers": layers, "input_layers": [["x", 0, 0]], "output_layers": [["dense", 0, 0]]}
        archive.writestr("config.json", json.dumps({"class_name": "Functional", "config": config}))
    with pytest.raises(ModelError, match=r"model\.weights\.h5"):
        import_keras2(tmp_path / "old.keras", tmp_path / "new.keras")


# ------------------------------------------------------------------ the command


def command(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.main, ["import-keras2", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command(tmp_path):
    source = write_h5(tmp_path / "old.h5", [INPUT, entry("Dense", "dense", ["x"], units=3)], DENSE)
    lines = command(source, tmp_path / "new.keras").stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'new.keras'}: 2 layers, 2 weights"
    expected = "Largest difference of the outputs to tf_keras " if HAS_TF_KERAS else "The outputs were not compared"
    assert lines[1].startswith(expected)
    result = json.loads(command(source, tmp_path / "again.keras", "--json").stdout)
    assert result["weights"] == 2 and result["ranges"] is None
    assert (result["largest_difference"] is None) is not HAS_TF_KERAS


def test_the_command_has_no_ranges_of_a_float_model(tmp_path):
    source = write_h5(tmp_path / "old.h5", [INPUT, entry("Dense", "dense", ["x"], units=3)], DENSE)
    result = command(source, tmp_path / "new.keras", "--ranges", tmp_path / "ranges.json", code=2)
    assert "has no activation ranges: TFMOT has not quantized it" in result.stderr
    assert not (tmp_path / "ranges.json").exists()


def test_the_command_never_overwrites_its_source(tmp_path):
    (tmp_path / "old.keras").write_text("model")
    result = command(tmp_path / "old.keras", tmp_path / "old.keras", code=2)
    assert "Expected another file to write" in result.stderr
    assert (tmp_path / "old.keras").read_text() == "model"
