"""Sessions on every installed interpreter: raw runs, quantized predictions, batching, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobileqat import flatbuffer, runtime
from mobileqat.errors import DataError, FlatbufferError, MobileQatError, RuntimeUnavailableError
from mobileqat.runtime import RUNTIMES, Session, available_runtimes

DATA = os.environ.get("MOBILEQAT_DATA")
REAL_FILES = (
    sorted(path for part in ("mlperf-tiny", "tflite-micro") for path in Path(DATA, part).rglob("*.tflite"))
    if DATA
    else []
)
# A bias whose scale names an axis that a vector does not have: only TensorFlow Lite Micro accepts it.
REFUSED_FILES = {"person_detect"}


def usable(name):
    return available_runtimes()[name][0].isdigit()


EVERY_RUNTIME = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not usable(name), reason=available_runtimes()[name]))
        for name in RUNTIMES
    ],
)


def convert(model, samples=None):
    """Float, or with samples (a list of inputs each) fully integer int8."""
    tf = pytest.importorskip("tensorflow", reason="converting the test models needs tensorflow")
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if samples is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: iter(samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def network():
    keras = pytest.importorskip("keras", reason="converting the test models needs keras")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3), batch_size=1, name="image")
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu6")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))


@pytest.fixture(scope="session")
def int8(network):
    return convert(network, [[image[None]] for image in images(16)])


@pytest.fixture(scope="session")
def float32(network):
    return convert(network)


@pytest.fixture(scope="session")
def two_inputs():
    """Two inputs and two outputs of different ranges."""
    keras = pytest.importorskip("keras", reason="converting the test models needs keras")
    left = keras.Input((4,), batch_size=1, name="left")
    right = keras.Input((4,), batch_size=1, name="right")
    model = keras.Model([left, right], [left + right, left * 2.0])
    values = np.random.default_rng(0).normal(size=(16, 2, 1, 4)).astype(np.float32)
    # The converter orders calibration samples by its own names for the inputs: give both the same range.
    return convert(model, [list(pair) for pair in values])


# --- the table


def test_available_runtimes():
    found = available_runtimes()
    assert set(found) == set(RUNTIMES)
    assert all(text[0].isdigit() or text.startswith("not usable: ") for text in found.values())
    assert usable(runtime.resolve_default())


def test_import_and_availability_stay_light():
    code = (
        "import sys; from mobileqat import runtime; runtime.available_runtimes(); "
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras', 'ai_edge_litert')))"
    )
    root = str(Path(runtime.__file__).resolve().parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_nothing_installed(monkeypatch):
    missing = runtime.Runtime("no-such-distribution", "no_such_module", "nothing")
    old = runtime.Runtime("numpy", "numpy", "nothing", numpy_major_below=1)
    monkeypatch.setattr(runtime, "RUNTIMES", {"missing": missing, "old": old})
    assert available_runtimes()["missing"] == "not usable: install the package no-such-distribution"
    assert "needs NumPy < 1, found" in available_runtimes()["old"]
    with pytest.raises(RuntimeUnavailableError, match="no interpreter is installed"):
        runtime.resolve_default()
    with pytest.raises(RuntimeUnavailableError, match="cannot be used: install"):
        runtime.import_runtime("missing")


# --- running


@EVERY_RUNTIME
def test_agrees_with_keras(name, network, int8, float32):
    x = images(10, seed=1)
    expected = np.concatenate([network(image[None]) for image in x])
    np.testing.assert_allclose(Session(float32, name).predict(x), expected, atol=1e-5)
    session = Session(int8, name)
    raw = session.predict(x)
    assert raw.dtype == np.int8 and raw.shape == (10, 3)
    np.testing.assert_allclose(session.dequantize(raw), expected, atol=0.04)


@EVERY_RUNTIME
def test_run_takes_and_gives_raw_arrays(name, int8):
    session = Session(int8, name)
    (details,) = session.inputs
    assert (details.shape, details.dtype) == ((1, 8, 8, 3), "int8")
    x = runtime.random_samples(details)
    (output,) = session.run(x)
    for again in (session.run({details.name: x}), session.run({"image": x}), [session.predict(x)]):
        np.testing.assert_array_equal(again[0], output)


def test_outputs_are_copies(int8):
    session = Session(int8)
    first = session.run(np.full((1, 8, 8, 3), 100, np.int8))[0]
    kept = first.copy()
    session.run(np.full((1, 8, 8, 3), -100, np.int8))
    np.testing.assert_array_equal(first, kept)


def test_several_inputs_and_outputs(two_inputs):
    session = Session(two_inputs)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    by_name = {"left": x, "right": np.zeros_like(x)}
    outputs = session.predict(by_name)
    real = session.dequantize(outputs)
    assert len(outputs) == 2 and all(array.shape == (5, 4) for array in outputs)
    matches = [min(np.abs(array - target).max() for target in (x, 2 * x)) for array in real]
    assert max(matches) < 0.1
    assert [row.name for row in session.inputs] == [session.model.tensors[i].name for i in session.model.inputs]


def test_a_parsed_model_is_taken(int8, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(int8)
    x = images(1)
    expected = Session(int8).predict(x)
    for model in (path, str(path), flatbuffer.read(path)):
        np.testing.assert_array_equal(Session(model).predict(x), expected)


@EVERY_RUNTIME
def test_exposed_tensors_leave_the_result_alone(name, int8):
    plain, exposed = Session(int8, name), Session(flatbuffer.expose_tensors(int8), name)
    x = runtime.random_samples(plain.inputs[0])
    outputs = exposed.run(x)
    np.testing.assert_array_equal(outputs[0], plain.run(x)[0])
    assert len(outputs) == 4
    assert all(array.shape == row.shape for array, row in zip(outputs, exposed.outputs, strict=True))


# --- quantizing


def test_ties_round_away_from_zero_and_clip():
    half_below_one = np.nextafter(np.float32(0.5), np.float32(0))
    x = np.array([0.5, 1.5, -0.5, -1.5, half_below_one, 1e9, -1e9, np.inf, -np.inf, 0.0], np.float32)
    raw = runtime._quantize(x, 1.0, 0, "int8")
    assert raw.tolist() == [1, 2, -1, -2, 0, 127, -128, 127, -128, 0]
    assert runtime._quantize(x[:2], 0.5, -128, "int8").tolist() == [-127, -125]
    assert runtime._quantize(np.float32([-5, 300]), 1.0, 0, "uint8").tolist() == [0, 255]


def test_quantization_is_that_of_the_reference_kernel(network):
    tf = pytest.importorskip("tensorflow")
    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images(16))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = converter.convert()
    model = flatbuffer.read(content)
    (entry,) = [operator for operator in model.operators if operator.inputs == model.inputs]
    assert entry.name == "QUANTIZE"
    session = Session(flatbuffer.expose_tensors(content, entry.outputs), "litert-reference")
    x, details = images(1, seed=2) * 2, session.outputs[-1]
    kernel = session.run(x)[-1]
    np.testing.assert_array_equal(kernel, runtime._quantize(x, details.scale, details.zero_point, details.dtype))


def test_integers_are_taken_raw(int8):
    session = Session(int8)
    x = images(3)
    raw = runtime._quantize(x, session.inputs[0].scale, session.inputs[0].zero_point, "int8")
    np.testing.assert_array_equal(session.predict(raw), session.predict(x))
    np.testing.assert_array_equal(session.predict(raw, quantize=False), session.predict(x.astype(np.float64)))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), {}, "takes int8 or real values"),
        (np.zeros((2, 8, 8, 3), np.float32), {"quantize": False}, "takes int8. Received: float32"),
        (np.zeros((8, 8, 3), np.float32), {}, "samples of shape"),
        (np.full((1, 8, 8, 3), np.nan, np.float32), {}, "NaN"),
        ([np.zeros((1, 8, 8, 3), np.int8)] * 2, {}, "takes 1 inputs"),
        ({"picture": np.zeros((1, 8, 8, 3), np.int8)}, {}, "picture"),
    ],
)
def test_wrong_samples(int8, x, options, message):
    with pytest.raises(DataError, match=message):
        Session(int8).predict(x, **options)


def test_wrong_raw_arrays(int8):
    session = Session(int8)
    for array in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.int8)):
        with pytest.raises(DataError, match=r"takes int8 \(1, 8, 8, 3\)"):
            session.run(array)


def test_numbers_of_samples_must_agree(two_inputs):
    with pytest.raises(DataError, match="different numbers"):
        Session(two_inputs).predict([np.zeros((2, 4), np.int8), np.zeros((3, 4), np.int8)])


# --- batching


@EVERY_RUNTIME
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_batches_change_nothing(name, int8, count):
    session = Session(int8, name, batch_size=4)
    assert session.batch_size == 4 and session.inputs[0].shape == (4, 8, 8, 3)
    x = images(count)
    batched = session.predict(x)
    assert batched.shape == (count, 3) and batched.dtype == np.int8
    np.testing.assert_array_equal(batched, Session(int8, name).predict(x))


def test_a_constant_batch_falls_back_to_one():
    keras = pytest.importorskip("keras")
    inputs = keras.Input((8, 8, 3), batch_size=1)
    content = convert(keras.Model(inputs, keras.ops.relu(keras.ops.reshape(inputs, (1, 192)))))
    session = Session(content, batch_size=4)
    assert session.batch_size == 1
    np.testing.assert_array_equal(session.predict(images(5)), images(5).reshape(5, 192).clip(0))


def test_a_batch_that_mixes_samples_falls_back_to_one():
    keras = pytest.importorskip("keras")
    inputs = keras.Input((4,), batch_size=1)
    content = convert(keras.Model(inputs, keras.ops.matmul(inputs, keras.ops.transpose(inputs))))
    assert Session(content, batch_size=3).batch_size == 1


def test_a_file_with_its_own_batch():
    keras = pytest.importorskip("keras")
    inputs = keras.Input((4,), batch_size=3)
    content = convert(keras.Model(inputs, inputs * 2.0))
    session = Session(content)
    assert session.batch_size == 3
    x = np.arange(28, dtype=np.float32).reshape(7, 4)
    np.testing.assert_array_equal(session.predict(x), 2 * x)


# --- refusals


def test_broken_files_never_reach_an_interpreter(int8, monkeypatch):
    monkeypatch.setattr(runtime, "_interpreter", lambda *_: pytest.fail("an interpreter was built"))
    for content in (b"", int8[: len(int8) // 2]):
        with pytest.raises(FlatbufferError):
            Session(content)


def test_unknown_runtime_and_numbers(int8):
    with pytest.raises(RuntimeUnavailableError, match="no runtime 'cuda', expected one of"):
        Session(int8, "cuda")
    for options in ({"threads": 0}, {"batch_size": 0}):
        with pytest.raises(MobileQatError, match="start at 1"):
            Session(int8, **options)


def test_the_interpreters_own_refusal_is_passed_on():
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    tensor = [schema.TensorT(name=name, shape=[1], type=schema.TensorType.INT8) for name in "xy"]
    graph = schema.SubGraphT(tensors=tensor, inputs=[0], outputs=[1])
    graph.operators = [schema.OperatorT(inputs=[0], outputs=[1])]
    code = schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.CUSTOM, customCode="Nowhere", version=1)
    model = schema.ModelT(3, [code], [graph], "", [schema.BufferT()])
    builder = flatbuffers.Builder(256)
    builder.Finish(model.Pack(builder), b"TFL3")
    assert flatbuffer.read(bytes(builder.Output())).operators[0].name == "Nowhere"
    with pytest.raises(RuntimeUnavailableError, match=r"litert refuses the model: .*Nowhere"):
        Session(bytes(builder.Output()))


# --- real files


@pytest.mark.skipif(not REAL_FILES, reason="MOBILEQAT_DATA names no folder with mlperf-tiny and tflite-micro")
@EVERY_RUNTIME
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files(name, path):
    if path.stem in REFUSED_FILES:
        with pytest.raises(RuntimeUnavailableError, match="quantized_dimension"):
            Session(path, name)
        return
    session = Session(path, name)
    x = [runtime.random_samples(row, 5) for row in session.inputs]
    expected = session.predict(x)
    assert expected.dtype == session.outputs[0].dtype and len(expected) == 5
    batched = Session(path, name, batch_size=2)
    assert runtime._equal(batched.predict(x), expected)
    stateful = any(tensor.is_variable for tensor in session.model.tensors)
    assert batched.batch_size == (1 if stateful else 2)
    np.testing.assert_array_equal(session.predict(x), expected)  # no state is left over
