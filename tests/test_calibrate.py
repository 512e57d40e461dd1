"""Ranges from data: what the three methods choose, and the forms and faults of calibration data."""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat import numerics
from mobileqat.calibrate import METHODS, calibrate
from mobileqat.data import reservoir_sample
from mobileqat.errors import CalibrationError, DataError, ModelError
from mobileqat.quantize import quantize_model
from mobileqat.schemes import QuantSpec

X = np.random.default_rng(0).normal(size=(200, 6, 6, 2)).astype(np.float32)


def small_model():
    keras.utils.set_random_seed(0)
    model = sequential(L.Conv2D(3, 3, name="conv"), L.ReLU(name="relu"), L.MaxPooling2D(name="pool"), shape=(6, 6, 2))
    give_trained_weights(model)
    return model


def two_inputs():
    x, y = keras.Input((6, 6, 2), name="left"), keras.Input((6, 6, 2), name="right")
    return quantize_model(keras.Model([x, y], L.Add(name="sum")([x, y])))


def ranges_after(data, method="minmax", model=None, **options):
    quantized = quantize_model(model or small_model())
    calibrate(quantized, data, method, **options)
    return {name: quantizer.ranges()[0] for name, quantizer in quantized.quantizers.items()}


def test_minmax():
    model = small_model()
    ranges = ranges_after(X, model=model)
    np.testing.assert_array_equal(ranges["x"], [X.min(), X.max()])
    np.testing.assert_allclose(ranges["relu"], [0, np.max(model.layers[1](model.layers[0](X)))], rtol=1e-5)
    np.testing.assert_array_equal(ranges["pool"], ranges["relu"])


@pytest.mark.parametrize("percentile, share", [(100, 0), (99, 0.005), (90, 0.05)])
def test_percentile_cuts_both_ends(percentile, share):
    low, high = ranges_after(X, "percentile", percentile=percentile)["x"]
    width = (X.max() - X.min()) / 2048
    np.testing.assert_allclose([low, high], np.quantile(X, [share, 1 - share]), atol=2 * width)


def test_mse_has_the_least_error():
    """On a long tail the full range wastes the grid; the chosen one beats it and its neighbours."""
    x = X**5
    low, high = ranges_after(x, "mse")["x"]
    spec = QuantSpec(8)

    def error(low, high):
        scale, zero_point = numerics.quantization_parameters(low, high, spec)
        restored = numerics.dequantize(numerics.quantize(x, scale, zero_point, spec), scale, zero_point)
        return np.mean((restored - x) ** 2)

    assert high < x.max()
    assert error(low, high) < error(x.min(), x.max())
    assert error(low, high) <= 1.02 * min(error(x.min() * f, x.max() * f) for f in np.arange(0.3, 1.01, 0.05))


@pytest.mark.parametrize("method", METHODS)
def test_methods_stay_inside_the_extremes(method):
    full, chosen = ranges_after(X), ranges_after(X, method)
    for name, (low, high) in chosen.items():
        assert full[name][0] <= low < high <= full[name][1]


def test_does_not_depend_on_earlier_ranges():
    quantized = quantize_model(small_model())
    calibrate(quantized, 100 * X)
    calibrate(quantized, X)
    np.testing.assert_array_equal(quantized.quantizers["x"].ranges()[0], ranges_after(X)["x"])


def test_does_not_touch_weights_or_statistics():
    quantized = quantize_model(sequential(L.Conv2D(3, 3), L.BatchNormalization(), L.Dropout(0.5), shape=(6, 6, 2)))
    before = {v.path: v.numpy() for v in quantized.variables if "range_" not in v.path}
    calibrate(quantized, X)
    for variable in quantized.variables:
        if variable.path in before:
            np.testing.assert_array_equal(variable, before[variable.path])


# --- forms of data

FORMS = {
    "array": lambda: X,
    "list of one array": lambda: [X],
    "dict": lambda: {"x": X},
    "double precision": lambda: X.astype(np.float64),
    "generator of batches": lambda: (X[start : start + 64] for start in range(0, 200, 64)),
    "generator of dicts": lambda: ({"x": X[start : start + 50]} for start in range(0, 200, 50)),
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices(X).batch(30),
    "tensor": lambda: tf.constant(X),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_forms_of_data(form, method):
    expected = ranges_after(X, method)
    for name, ranges in ranges_after(form(), method).items():
        np.testing.assert_allclose(ranges, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_batch_size_does_not_matter(batch_size):
    few = X[:16]
    for name, ranges in ranges_after(few, batch_size=batch_size).items():
        np.testing.assert_allclose(ranges, ranges_after(few)[name], rtol=1e-5, atol=1e-6)


def test_several_inputs():
    for data in ([X, 2 * X], {"right": 2 * X, "left": X}, ({"left": X, "right": 2 * X} for _ in range(2))):
        quantized = two_inputs()
        calibrate(quantized, data)
        np.testing.assert_array_equal(quantized.quantizers["left"].ranges(), [[X.min(), X.max()]])
        np.testing.assert_array_equal(quantized.quantizers["right"].ranges(), [[2 * X.min(), 2 * X.max()]])


def test_whole_numbers():
    """Indices have no range; what they look up has that of the table."""
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    model = keras.Model(tokens, L.Dense(2)(L.Embedding(7, 3, name="embedding")(tokens)))
    quantized = quantize_model(model)
    assert "tokens" not in quantized.quantizers
    table = model.get_layer("embedding").embeddings.numpy()
    for data in (np.zeros((4, 5), np.int32), np.ones((4, 5)), {"tokens": np.zeros((4, 5), np.int64)}):
        calibrate(quantized, data)
        np.testing.assert_allclose(quantized.quantizers["embedding"].ranges(), [[table.min(), table.max()]])


@pytest.mark.parametrize("method", METHODS)
def test_range_of_a_constant_is_that_of_its_values(method):
    """It is known, so that no method may cut it."""
    model = sequential(L.PReLU(alpha_initializer="random_normal"), shape=(6, 6, 2))
    alpha = model.layers[0].alpha.numpy()
    ranges = ranges_after(X, method, model)
    (constant,) = [values for name, values in ranges.items() if name.endswith("alpha")]
    np.testing.assert_allclose(constant, [alpha.min(), alpha.max()])


# --- faults


def broken(value):
    x = X.copy()
    x[17, 2, 3, 1] = value
    return x


FAULTS = {
    "NaN": (lambda: broken(np.nan), CalibrationError, "not finite"),
    "infinity": (lambda: broken(np.inf), CalibrationError, "not finite"),
    "no batch": (lambda: iter(()), CalibrationError, "no calibration data"),
    "no samples": (lambda: X[:0], CalibrationError, "no calibration data"),
    "an empty batch": (lambda: iter([X[:0]]), CalibrationError, "no calibration data|empty"),
    "wrong shape": (lambda: X[:, :5], DataError, r"Input 'x' expects shape \(n, 6, 6, 2\).*\(200, 5, 6, 2\)"),
    "one sample": (lambda: X[0], DataError, "expects shape"),
    "samples one by one": (lambda: iter(X), DataError, "expects shape"),
    "two arrays for one input": (lambda: [X, X], DataError, "1 input.*2 arrays"),
    "with labels": (lambda: iter([(X, np.zeros(200))]), DataError, "2 arrays"),
    "unknown name": (lambda: {"image": X}, DataError, r"\['x'\].*\['image'\]"),
    "number": (lambda: 5, DataError, "Received: int"),
    "None": (lambda: None, DataError, "NoneType"),
    "ragged": (lambda: [[X[0], X[1, :3]]], DataError, "x"),
    "words": (lambda: np.full((4, 6, 6, 2), "word"), DataError, "x"),
}


@pytest.mark.parametrize("data, error, message", FAULTS.values(), ids=FAULTS)
def test_faults_of_data(data, error, message):
    with pytest.raises(error, match=message):
        calibrate(quantize_model(small_model()), data())


def test_unlike_numbers_of_samples():
    with pytest.raises(DataError, match="right"):
        calibrate(two_inputs(), [X, X[:-1]])


def test_nan_where_nothing_but_a_comparison_reads_it():
    """max(NaN, 0) may be 0: the fault must be found in the data itself, also behind a pinned input."""
    model = sequential(L.ReLU(), L.MaxPooling2D(), L.Conv2D(2, 1), shape=(6, 6, 2))
    for options in ({}, {"input_range": (-4, 4)}):
        with pytest.raises(CalibrationError, match="not finite"):
            calibrate(quantize_model(model, **options), broken(np.nan))


def test_nan_weights():
    model = small_model()
    model.get_layer("conv").bias.assign([np.nan, 0, 0])
    with pytest.raises(ModelError, match="conv/bias"):
        calibrate(quantize_model(model), X)


@pytest.mark.parametrize("options", [{"method": "median"}, {"percentile": 0}, {"percentile": 101}, {"percentile": 50}])
def test_unknown_choices(options):
    with pytest.raises(CalibrationError, match="|".join(options)):
        calibrate(quantize_model(small_model()), X, **options)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_positive(batch_size):
    with pytest.raises((CalibrationError, DataError), match="batch_size"):
        calibrate(quantize_model(small_model()), X, batch_size=batch_size)


def test_float_model():
    with pytest.raises(ModelError, match="quantize_model"):
        calibrate(small_model(), X)


def test_a_reservoir_of_a_stream():
    """Ranges of the samples that are drawn, whatever batches they come in; the same for the same seed."""
    parts = [X[start : start + 30] for start in range(0, 200, 30)]
    drawn = np.stack(reservoir_sample(X, 20, seed=4))
    for method in METHODS:
        expected = ranges_after(drawn, method, batch_size=8)
        for data in (iter(parts), X):
            found = ranges_after(data, method, batch_size=8, reservoir=20, seed=4)
            assert found.keys() == expected.keys()
            for name, (low, high) in expected.items():
                np.testing.assert_array_equal(found[name], [low, high])
    low, high = ranges_after(iter(parts), reservoir=20, seed=5)["x"]
    assert (low, high) != (drawn.min(), drawn.max())
    np.testing.assert_array_equal(ranges_after(iter(parts), reservoir=1000)["x"], [X.min(), X.max()])
    with pytest.raises(DataError, match=r"A reservoir holds at least one sample\. Received: count=0"):
        ranges_after(iter(parts), reservoir=0)
    with pytest.raises(CalibrationError, match="no calibration data"):
        ranges_after(iter([]), reservoir=5)


def test_memory_of_a_reservoir():
    quantized = quantize_model(small_model())
    sizes = []

    def stream():
        random = np.random.default_rng(0)
        for _ in range(60):
            sizes.append(tracemalloc.get_traced_memory()[0])
            yield random.normal(size=(500, 6, 6, 2)).astype(np.float32)  # 144 kB

    tracemalloc.start()
    calibrate(quantized, stream(), reservoir=50)
    tracemalloc.stop()
    assert max(sizes) - sizes[0] < 500_000 < 60 * 144_000 / 10
