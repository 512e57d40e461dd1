"""The judge itself: it must pass what is right and catch what is wrong."""

import dataclasses
import json
import re

import keras
import numpy as np
import pytest
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat import flatbuffer, parity
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert, convert_float
from mobileqat.errors import DataError, FlatbufferError, ModelError
from mobileqat.parity import Bars, EndToEnd, OperatorParity, WeightParity, compare_outputs, find_problems, verify
from mobileqat.quantize import quantize_model

X = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 3)).astype(np.float32)


def small_model(filters=4):
    model = sequential(
        L.Conv2D(filters, 3, activation="relu", name="conv"), L.Flatten(name="flat"),
        L.Dense(3, activation="softmax", name="head"), shape=(8, 8, 3),
    )  # fmt: skip
    give_trained_weights(model)
    return model


def calibrated(model=None, **options):
    quantized = quantize_model(model or small_model(), **options)
    calibrate(quantized, X)
    return quantized


@pytest.fixture(scope="module")
def quantized():
    keras.utils.set_random_seed(0)
    return calibrated()


@pytest.fixture(scope="module")
def content(quantized):
    return convert(quantized)


@pytest.mark.parametrize("count", [3, 8, 19, 20])
def test_simulates_in_full_batches(quantized, count):
    """A smaller last batch would be traced anew; filled up, it gives the same."""
    traced = []
    quantized.predict_function = None
    call, quantized.call = quantized.call, lambda *a, **k: traced.append(a[0].shape) or call(*a, **k)
    try:
        found = parity.simulate(quantized, X[:count], batch_size=8)
    finally:
        quantized.call, quantized.predict_function = call, None
    assert np.array_equal(found, quantized(X[:count]))
    assert len({tuple(shape) for shape in traced}) == 1


def test_passes_what_is_right(quantized, content):
    result = verify(quantized, content, X)
    assert result.passed and result.problems == ()
    assert result.weights == WeightParity(4 * 27 + 4 + 3 * 144 + 3, 4 * 27 + 4 + 3 * 144 + 3)
    assert [op.operator for op in result.operators] == ["conv", "flat", "head", "head/softmax"]
    assert result.end_to_end == EndToEnd(20, 1.0, 0, 1.0)
    assert result.runtime.startswith("litert ")


def test_results_are_data(quantized, content):
    row = json.loads(json.dumps(verify(quantized, content, X).to_dict()))
    assert row["passed"] is True and row["operators"][0]["passed"] is True
    assert row["weights"]["compared"] == row["weights"]["identical"]


def test_operator_samples(quantized, content):
    result = verify(quantized, content, X, operator_samples=3)
    assert result.operators[0].outputs == 3 * 6 * 6 * 4 and result.end_to_end.samples == 20


@pytest.mark.parametrize("data", [lambda: [X], lambda: {"x": X}])
def test_forms_of_samples(quantized, content, data):
    assert verify(quantized, content, data()).passed


def test_samples_that_do_not_fit(quantized, content):
    with pytest.raises(DataError, match="expects shape"):
        verify(quantized, content, X[:, :4])


def test_no_samples(quantized, content):
    with pytest.raises(DataError):
        verify(quantized, content, X[:0])


def with_other_bytes(content, name, position=0):
    """The file with one byte of a constant changed; byte 3 of a float32 holds sign and exponent."""
    tensor = next(tensor for tensor in flatbuffer.read(content).tensors if tensor.name == name)
    original = tensor.data.tobytes()
    changed = original[:position] + bytes([original[position] ^ 0x0F]) + original[position + 1 :]
    return content.replace(original, changed, 1)


def test_catches_a_changed_weight(quantized, content):
    result = verify(quantized, with_other_bytes(content, "conv/kernel"), X)
    assert not result.passed and result.weights.identical == result.weights.compared - 1
    assert "1 of 547 weight integers differ" in result.problems[0]
    assert [op.operator for op in result.operators if not op.passed] == ["conv"], "only the guilty operator"


def with_slopes():
    model = sequential(L.Conv2D(4, 3), L.PReLU(shared_axes=[1, 2], name="act"), shape=(8, 8, 3))
    give_trained_weights(model)
    model.get_layer("act").alpha.assign([[[0.1, 0.2, 0.3, -0.4]]])
    return calibrated(model)


def test_compares_constant_operands():
    """A changed one is found as a weight, and not once more as an operator: both worlds are fed the model's own."""
    quantized = with_slopes()
    content = convert(quantized)
    result = verify(quantized, content, X)
    assert result.passed and result.weights.compared == 4 * 27 + 4 + 4
    assert [op.kind for op in result.operators] == ["CONV_2D", "PRELU"]
    changed = verify(quantized, with_other_bytes(content, "act/alpha"), X)
    assert changed.weights.identical == result.weights.compared - 1 and not changed.passed


def test_catches_a_changed_table():
    quantized = calibrated(sequential(L.Conv2D(4, 3), L.Activation("mish", name="act"), shape=(8, 8, 3)))
    content = convert(quantized)
    assert verify(quantized, content, X).passed
    table = next(t.data for t in flatbuffer.read(content).tensors if t.name == "act/table")
    result = verify(
        quantized, content.replace(table.tobytes(), np.clip(table + 3, -128, 127).astype(np.int8).tobytes()), X
    )
    assert [op.kind for op in result.operators if not op.passed] == ["TABLE"]


def test_catches_a_changed_range(content):
    other = calibrated()
    calibrate(other, 2 * X)
    assert not verify(other, content, X).passed


def test_catches_other_weights(content):
    model = small_model()
    model.get_layer("conv").kernel.assign(-1.1 * model.get_layer("conv").kernel)
    result = verify(calibrated(model), content, X)
    assert not result.passed and result.weights.identical < result.weights.compared


@pytest.mark.parametrize(
    "other",
    [
        lambda: convert(calibrated(small_model(filters=5))),
        lambda: convert(calibrated(sequential(L.Conv2D(4, 3, activation="relu", name="conv"), shape=(8, 8, 3)))),
        lambda: convert(calibrated(), batch_size=2)[:-1000],
        lambda: convert_float(small_model()),
        lambda: b"",
    ],
    ids=["other shapes", "fewer layers", "truncated", "float", "empty"],
)
def test_files_of_other_models(quantized, other):
    with pytest.raises(FlatbufferError):
        verify(quantized, other(), X)


def test_float_model(content):
    with pytest.raises(ModelError, match="quantize_model"):
        verify(small_model(), content, X)


def test_float_outputs_are_compared_as_real_numbers():
    """An output kept in float must not pass because it is 0 once cut to an integer."""
    close, far = np.float32([[0.1, 0.2]]), np.float32([[0.9, 0.2]])
    assert compare_outputs([close], [close + np.float32(1e-7)]).identical == 1.0
    assert compare_outputs([close], [far]).identical < 1.0


def test_float_output_of_a_changed_file():
    quantized = calibrated(exclude=["head"])
    content = convert(quantized)
    assert verify(quantized, content, X).passed
    assert not verify(quantized, with_other_bytes(content, "head/bias", position=3), X).passed


def test_compare_outputs():
    simulated = [np.int32([[5, 1], [3, 4], [0, 9], [7, 7]])]
    interpreted = [np.int8([[5, 1], [4, 3], [0, 9], [7, 5]])]
    assert compare_outputs(simulated, interpreted) == EndToEnd(4, 5 / 8, 2, 0.75)


def test_compare_outputs_takes_the_worst_of_several():
    same, other = np.int32([[1, 2]]), np.int32([[2, 1]])
    result = compare_outputs([same, same], [same, other])
    assert (result.identical, result.top1_agreement) == (0.5, 0.0)


def operator(identical=1.0, max_lsb=0):
    return OperatorParity("conv", "CONV_2D", 100, identical, max_lsb, 0.99, 1)


@pytest.mark.parametrize(
    "found, message",
    [
        ({"weights": WeightParity(10, 9)}, "1 of 10 weight integers differ"),
        ({"operators": (operator(0.98),)}, r"'conv' \(CONV_2D\): 98.0000%"),
        ({"operators": (operator(0.999, 2),)}, "difference 2 LSB, allowed 1"),
        ({"end_to_end": EndToEnd(10, 0.9, 3, 1.0)}, "90.000% of the output values"),
        ({"end_to_end": EndToEnd(10, 1.0, 0, 0.9)}, "top-1 agrees on 90.000%"),
    ],
)
def test_each_bar_has_its_problem(found, message):
    everything = {
        "weights": WeightParity(10, 10), "operators": (operator(0.999, 1),),
        "end_to_end": EndToEnd(10, 1.0, 0, 1.0), "bars": Bars(),
    }  # fmt: skip
    assert find_problems(**everything) == ()
    problems = find_problems(**everything | found)
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_stricter_bars(quantized, content):
    bars = dataclasses.replace(Bars(), min_identical_output=1.01)
    assert not verify(quantized, content, X, bars=bars).passed


@pytest.mark.parametrize("runtime", ["litert-builtin", "litert-reference"])
def test_other_kernels(quantized, content, runtime):
    result = verify(quantized, content, X, runtime=runtime)
    assert result.passed, result.problems
    assert result.runtime.startswith(runtime)
    assert parity.default_bars(runtime) != parity.default_bars("litert")
