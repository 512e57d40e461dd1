"""The written file: interface types, batch sizes, names, alignment, and what stops a conversion."""

import keras
import numpy as np
import pytest
from contract import give_trained_weights, small_classifier
from keras import layers as L
from keras import ops

from mobileqat import flatbuffer
from mobileqat.calibrate import calibrate
from mobileqat.convert import check_ranges, convert, convert_float
from mobileqat.errors import CalibrationError, MobileQatError, ModelError
from mobileqat.flatbuffer import inspect
from mobileqat.parity import verify
from mobileqat.quantize import quantize_model
from mobileqat.runtime import Session

X = np.random.default_rng(0).uniform(-1, 1, (10, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def quantized():
    keras.utils.set_random_seed(0)
    result = quantize_model(small_classifier())
    calibrate(result, X)
    return result


def test_one_operator_of_the_plan_is_one_of_the_file(quantized):
    file = flatbuffer.read(convert(quantized))
    assert [op.name for op in file.operators] == [op.kind for op in quantized.plan.operators]
    names = [file.tensors[op.outputs[0]].name for op in file.operators]
    assert names == [op.output for op in quantized.plan.operators]


def test_constants_are_the_simulations(quantized):
    tensors = {tensor.name: tensor for tensor in flatbuffer.read(convert(quantized)).tensors}
    constants = quantized.operators["conv"].constants()
    kernel, bias = tensors["conv/kernel"], tensors["conv/bias"]
    np.testing.assert_array_equal(kernel.data, constants["weights"].transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(kernel.scales, constants["scales"])
    np.testing.assert_array_equal(bias.data, constants["bias"])
    assert kernel.quantized_axis == 0 and (kernel.dtype, bias.dtype) == ("int8", "int32")
    input_scale = tensors["x"].scales[0]
    np.testing.assert_array_equal(bias.scales, input_scale * constants["scales"])


def test_same_bytes_every_time(quantized):
    assert convert(quantized) == convert(quantized)


def test_constants_are_aligned(quantized):
    """XNNPACK reads buffers in place and needs them at multiples of 16."""
    content = convert(quantized)
    for tensor in flatbuffer.read(content).tensors:
        if tensor.is_constant:
            assert content.find(tensor.data.tobytes()) % 16 == 0


def test_signature(quantized):
    file = flatbuffer.read(convert(quantized))
    signature = file.signatures["serving_default"]
    assert {name: file.tensors[index].name for name, index in signature["inputs"].items()} == {"x": "x"}
    assert list(signature["outputs"]) == ["head/softmax"]


TYPES = ("int8", "uint8", "float32")


@pytest.mark.parametrize("output_type", TYPES)
@pytest.mark.parametrize("input_type", TYPES)
def test_interface_types(quantized, input_type, output_type):
    content = convert(quantized, input_type=input_type, output_type=output_type)
    session = Session(content)
    assert (session.inputs[0].dtype, session.outputs[0].dtype) == (input_type, output_type)
    np.testing.assert_allclose(session.dequantize(session.predict(X)), quantized(X), atol=1e-6)
    inspection = inspect(content)
    assert inspection.islands == (), inspection.problems
    assert inspection.fully_integer or "float32" in (input_type, output_type)
    parity = verify(quantized, content, X)
    assert parity.passed, parity.problems


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_is_static(quantized, batch_size):
    content = convert(quantized, batch_size=batch_size)
    session = Session(content)
    assert session.inputs[0].shape == (batch_size, 8, 8, 3) and session.outputs[0].shape == (batch_size, 3)
    np.testing.assert_allclose(session.dequantize(session.predict(X)), quantized(X), atol=1e-6)
    assert inspect(content).fully_integer
    assert verify(quantized, content, X).passed


@pytest.mark.parametrize("runtime", ["litert-builtin", "litert-reference", "tf-lite"])
def test_every_kernel_set_takes_the_file(quantized, runtime):
    """Kernels of another rounding may differ by one LSB per operator."""
    session = Session(convert(quantized), runtime)
    difference = np.abs(session.dequantize(session.predict(X)) - np.asarray(quantized(X)))
    assert difference.max() <= 3 / 256


def test_inputs_and_outputs_by_name():
    x, y = keras.Input((4, 4, 2), name="left"), keras.Input((4, 4, 2), name="right")
    a = L.Conv2D(2, 1, name="a")(x)
    quantized = quantize_model(keras.Model([x, y], [L.Add(name="sum")([a, y]), a]))
    left, right = X[:, :4, :4, :2], X[:, 4:, 4:, 1:]
    calibrate(quantized, [left, right])
    content = convert(quantized, input_type="float32", output_type="float32")
    outputs = Session(content).predict({"right": right, "left": left})
    for got, expected in zip(outputs, quantized([left, right]), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert list(flatbuffer.read(content).signatures["serving_default"]["outputs"]) == ["sum", "a"]


def test_an_input_that_is_an_output():
    x = keras.Input((4, 4, 2), name="x")
    quantized = quantize_model(keras.Model(x, [L.Conv2D(2, 1, name="a")(x), x]))
    calibrate(quantized, X[:, :4, :4, :2])
    session = Session(convert(quantized))
    outputs = session.dequantize(session.predict(X[:, :4, :4, :2]))
    for got, expected in zip(outputs, quantized(X[:, :4, :4, :2]), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


# --- constants, tables, whole numbers


def from_sequences(function, shape=(6, 4), dtype="float32", **options):
    """A quantized model of a function of one input, with its samples."""
    x = keras.Input(shape, dtype=dtype, name="x")
    model = keras.Model(x, function(x))
    give_trained_weights(model)
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 7, (12, *shape)) if dtype == "int32" else rng.normal(size=(12, *shape))
    result = quantize_model(model, **options)
    calibrate(result, samples.astype(dtype))
    return result, samples.astype(dtype)


def named(content):
    return {tensor.name: tensor for tensor in flatbuffer.read(content).tensors}


def test_constant_operands_are_stored_on_their_grid():
    quantized, _ = from_sequences(lambda x: L.PReLU(name="act")(x) * 0.5)
    tensors = named(convert(quantized))
    wrapper = quantized.operators["act/alpha"]
    stored = tensors["act/alpha"]
    np.testing.assert_array_equal(stored.data, wrapper.constant())
    assert stored.dtype == "int8" and stored.scales[0] == wrapper.output_quantizer.grid()[0]


def test_a_constant_kept_in_float_is_stored_so():
    quantized, samples = from_sequences(lambda x: L.Dense(3)(L.PReLU(name="act")(x)), exclude=["act*"])
    assert named(convert(quantized))["act/alpha"].dtype == "float32"
    assert verify(quantized, convert(quantized), samples).passed


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_sizes_of_all_kinds_of_operators(batch_size):
    """Constants that are repeated for every sample, indices, slices and shapes follow the batch."""

    def function(x):
        y = L.GRU(4, return_sequences=True)(L.MultiHeadAttention(2, 3)(x, x))
        y = ops.concatenate([y[:, 1:], ops.flip(y, 1)], 1)
        return ops.tile(ops.pad(ops.repeat(y, 2, 1), ((0, 0), (1, 0), (0, 0))), (1, 1, 2))

    quantized, samples = from_sequences(function, (2, 4))
    content = convert(quantized, batch_size=batch_size)
    assert inspect(content).fully_integer
    parity = verify(quantized, content, samples, simulated=np.asarray(quantized(samples)))
    assert parity.passed, parity.problems


def test_a_function_without_an_operator_is_a_table():
    quantized, samples = from_sequences(lambda x: L.Activation("softplus", name="plus")(L.Dense(3, name="dense")(x)))
    content = convert(quantized)
    file = flatbuffer.read(content)
    assert [op.name for op in file.operators] == ["FULLY_CONNECTED", "CAST", "CAST", "GATHER"]
    scale, zero_point = quantized.quantizers["plus"].grid()
    in_scale, in_zero_point = quantized.quantizers["dense"].grid()
    real = np.log1p(np.exp((np.arange(-128, 128) - in_zero_point) * np.float64(in_scale)))
    expected = np.clip(np.floor(real / scale + 0.5) + zero_point, -128, 127)
    stored = np.roll(named(content)["plus/table"].data, 128)
    assert np.mean(stored == expected) > 0.99 and np.abs(stored - expected).max() <= 1
    inspection = inspect(content)
    assert inspection.fully_integer and inspection.islands == ()
    assert verify(quantized, content, samples).passed


@pytest.mark.parametrize("input_type", TYPES)
def test_indices_stay_int32(input_type):
    quantized, samples = from_sequences(lambda x: L.GlobalMaxPooling1D()(L.Embedding(7, 3)(x)), (5,), "int32")
    content = convert(quantized, input_type=input_type)
    session = Session(content)
    assert session.inputs[0].dtype == "int32" and inspect(content).fully_integer
    np.testing.assert_allclose(session.dequantize(session.predict(samples)), quantized(samples), atol=1e-6)


def test_a_table_of_weights_is_stored_once():
    x = keras.Input((5,), dtype="int32", name="x")
    y = keras.Input((4,), dtype="int32", name="y")
    embedding = L.Embedding(7, 3)
    quantized = quantize_model(keras.Model([x, y], L.Concatenate(axis=1)([embedding(x), embedding(y)])))
    tokens = [np.zeros((2, 5), np.int32), np.ones((2, 4), np.int32)]
    calibrate(quantized, tokens)
    content = convert(quantized)
    assert sum(t.is_constant and t.shape == (7, 3) for t in flatbuffer.read(content).tensors) == 1
    assert verify(quantized, content, tokens).passed


def test_constants_of_zeros():
    """Not a collapsed range: slopes start at 0, and a constant may be 0 on purpose."""
    quantized, samples = from_sequences(lambda x: L.PReLU()(ops.maximum(x, np.zeros(4, np.float32))))
    assert verify(quantized, convert(quantized), samples).passed


# --- what stops a conversion


@pytest.mark.parametrize("options", [{"input_type": "int16"}, {"output_type": "int4"}, {"input_type": None}])
def test_unknown_types(quantized, options):
    with pytest.raises(MobileQatError, match=next(iter(options))):
        convert(quantized, **options)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
def test_batch_size_is_a_positive_integer(quantized, batch_size):
    with pytest.raises(MobileQatError, match="batch_size"):
        convert(quantized, batch_size=batch_size)


def test_float_model():
    with pytest.raises(ModelError, match="convert_float"):
        convert(small_classifier())


def test_never_calibrated():
    with pytest.raises(CalibrationError, match=r"never moved: x, .*calibrate"):
        convert(quantize_model(small_classifier()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights(value):
    quantized = quantize_model(small_classifier())
    calibrate(quantized, X)
    quantized.operators["conv"].layer.bias.assign([0, value, 0, 0])
    with pytest.raises(ModelError, match=r"NaN or infinite.*bias"):
        convert(quantized)


def test_broken_ranges():
    quantized = quantize_model(small_classifier())
    calibrate(quantized, X)
    quantized.quantizers["head"].set_range("head", -1, np.inf)
    with pytest.raises((CalibrationError, ModelError), match=r"head|range_head"):
        convert(quantized)


def test_collapsed_range():
    quantized = quantize_model(small_classifier())
    calibrate(quantized, np.zeros_like(X))
    with pytest.raises(CalibrationError, match="'x' has collapsed to zero"):
        check_ranges(quantized)


@pytest.mark.parametrize("top", [1e-12, 1e-6])  # the softmax behind it needs more than any other operator
def test_range_too_small_for_a_scale(top):
    """Below the smallest scale a grid no longer fits its range: the same fault as a collapsed one."""
    quantized = quantize_model(small_classifier())
    calibrate(quantized, X)
    quantized.quantizers["head"].set_range("head", 0, top)
    with pytest.raises(CalibrationError, match="'head'"):
        convert(quantized)


def test_requantization_that_the_delegate_refuses():
    """XNNPACK takes no ratio of scales of 256 or more; the file would not load on a phone."""
    quantized = quantize_model(small_classifier())
    calibrate(quantized, X)
    quantized.quantizers["conv/relu"].set_range("conv/relu", 0, 1e-7)
    try:
        content = convert(quantized)
    except MobileQatError:
        return
    Session(content).predict(X)


def test_float_file(quantized):
    model = small_classifier()
    session = Session(convert_float(model))
    assert session.inputs[0].dtype == "float32" and session.batch_size == 1
    np.testing.assert_allclose(session.predict(X), model(X), atol=1e-5)
    assert "SHAPE" not in inspect(convert_float(model)).operator_counts


def test_float_file_of_nan_weights():
    model = small_classifier()
    model.get_layer("conv").bias.assign([np.nan, 0, 0, 0])
    with pytest.raises(ModelError, match="NaN"):
        convert_float(model)
