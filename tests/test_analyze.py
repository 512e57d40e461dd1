"""The analysis finds what was planted: a layer with an outlier, one with unlike channels, dead channels."""

import json

import keras
import numpy as np
import pytest
from contract import give_trained_weights, outputs_of, samples_of, sequential
from keras import layers as L

from mobileqat.adaround import adaround
from mobileqat.analyze import SwitchedModel, analyze, sqnr_db
from mobileqat.calibrate import calibrate
from mobileqat.errors import CalibrationError, ModelError
from mobileqat.fakequant import quantize_weights
from mobileqat.quantize import quantize_model, strip
from mobileqat.report.layers import print_analysis, write_analysis

rng = np.random.default_rng(0)
X = rng.normal(size=(48, 8, 8, 3)).astype(np.float32)


def network(change=lambda model: None, scheme="w8a8", samples=X):
    """Three convolutions, each with a ReLU, and a dense layer; quantized."""
    convolutions = [L.Conv2D(6, 3, activation="relu", name=f"conv{k}") for k in (1, 2, 3)]
    model = sequential(*convolutions, L.Flatten(name="flat"), L.Dense(5, name="dense"), shape=(8, 8, 3))
    give_trained_weights(model)
    change(model)
    quantized = quantize_model(model, scheme)
    calibrate(quantized, samples)
    return quantized


def agreement(model):
    """Share of the samples with the same largest output as in float."""
    expected = outputs_of(strip(model), X)[0].argmax(1)
    return lambda outputs: float(np.mean(outputs.argmax(1) == expected))


def scale_channel(model, layer: str, following: str, channel: int, factor: float) -> None:
    first, second = model.get_layer(layer), model.get_layer(following)
    kernel, bias, after = first.kernel.numpy(), first.bias.numpy(), second.kernel.numpy()
    kernel[..., channel] *= factor
    bias[channel] *= factor
    after[:, :, channel] /= factor
    first.kernel.assign(kernel)
    first.bias.assign(bias)
    second.kernel.assign(after)


def test_finds_the_layer_with_unlike_channels():
    model = network(lambda model: scale_channel(model, "conv2", "conv3", 4, 300.0))
    result = analyze(model, X, agreement(model))
    assert result.layers[0].name == "conv2"
    assert result.float_metric == 1.0 and result.quantized_metric < 0.9
    worst = {layer.name: layer for layer in result.layers}["conv2"]
    assert worst.only < 0.9 and worst.channel_sqnr_db < worst.own_sqnr_db - 20
    assert worst.activations.imbalance > 100 and any("equalize" in advice for advice in worst.advice)
    assert "'conv2'" in result.recommendation and "equalize" in result.recommendation


def test_finds_outliers_of_a_range():
    samples = X.copy()
    samples[0, 3, 3] = 500.0  # in the calibration data alone
    result = analyze(network(samples=samples), X)
    assert result.float_metric is None and result.layers[0].only is None
    first = {layer.name: layer for layer in result.layers}["conv1"]
    assert first.activations.outliers > 20 and any("percentile" in advice for advice in first.advice)


def test_finds_what_is_clipped():
    result = analyze(network(samples=0.1 * X), X)
    assert any("clipped" in advice for layer in result.layers for advice in layer.advice)
    assert all(layer.activations.clipped < 1e-3 for layer in analyze(network(), X).layers)


def test_finds_dead_channels():
    def kill(model):
        layer = model.get_layer("conv1")
        kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
        kernel[..., 2], bias[2] = 0.0, -1.0
        bias[5] = -100.0  # its weights live, its ReLU never opens
        layer.kernel.assign(kernel)
        layer.bias.assign(bias)

    row = {layer.name: layer for layer in analyze(network(kill), X).layers}["conv1"]
    assert row.activations.dead_channels == (2, 5) and row.weights.dead_channels == (2,)
    assert any("2 of 6 channels" in advice for advice in row.advice)


def test_few_bits_are_named():
    model = network(scheme="w3a8")
    result = analyze(model, X, agreement(model))
    assert all("adaround" in layer.advice[0] for layer in result.layers if layer.weights)
    assert {layer.weights.bits for layer in result.layers} == {3}
    for layer in result.layers:
        assert sum(layer.weights.histogram.counts) == model.operators[layer.name].layer.kernel.shape.num_elements()
        assert len(layer.weights.histogram.counts) == 7


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_nothing_to_repair(scheme):
    model = network(scheme=scheme)
    assert "nothing to repair" in analyze(model, X, agreement(model)).recommendation


def test_a_switched_model_is_the_float_one_the_quantized_one_or_a_mixture():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(4, 3, padding="same", name="conv")(L.PReLU(name="prelu")(x))
    y = L.Add(name="add")([y, L.Conv2D(4, 1, name="float")(y)])
    model = keras.Model(x, L.Dense(5, activation="softmax", name="dense")(L.Flatten()(L.MaxPooling2D()(y))))
    give_trained_weights(model)
    quantized = quantize_model(model, exclude=["float"])
    calibrate(quantized, X)
    switched = SwitchedModel(quantized)
    assert switched.operators == ["prelu", "conv", "add", "dense", "dense/softmax"]
    np.testing.assert_allclose(switched.predict(X, {}), outputs_of(model, X)[0], atol=1e-5)
    everything = dict.fromkeys(switched.operators, 1)
    np.testing.assert_array_equal(switched.predict(X, everything, batch_size=20), outputs_of(quantized, X)[0])
    errors = [
        np.mean((switched.predict(X, everything | choices) - outputs_of(model, X)[0]) ** 2)
        for choices in ({}, {"prelu": 0, "conv": 0, "add": 0})
    ]
    assert 0 < errors[1] < errors[0]


def test_sqnr():
    real = rng.normal(size=10_000)
    assert sqnr_db(real, real + 0.01 * rng.normal(size=10_000)) == pytest.approx(40, abs=0.2)
    assert sqnr_db(real, real) == 200
    assert np.isfinite(sqnr_db(0 * real, real))


def test_several_inputs():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    model = keras.Model([left, right], L.Dense(3, name="dense")(L.Add(name="add")([left, right])))
    quantized = quantize_model(model)
    samples = samples_of(quantized, -1, 1)
    calibrate(quantized, samples)
    assert {layer.name for layer in analyze(quantized, samples, np.mean).layers} == {"add", "dense"}


def test_what_is_written_and_printed(tmp_path, capsys):
    model = network()
    result = analyze(model, X, agreement(model)).to_dict()
    write_analysis(result, tmp_path / "new")
    assert json.loads((tmp_path / "new/analysis.json").read_text()) == json.loads(json.dumps(result))
    charts = sorted(path.name for path in (tmp_path / "new").glob("*.svg"))
    assert charts[-2:] == ["metric.svg", "sqnr.svg"] and len(charts) == 6
    assert "dense" in (tmp_path / "new/sqnr.svg").read_text()
    print_analysis(result)
    printed = capsys.readouterr().out
    assert "in model: with the noise of all before it. Change of accuracy, alone:" in printed
    assert result["recommendation"] in printed


def test_noise_of_learned_rounding_is_that_against_the_weights_before():
    """AdaRound leaves weights on their grid, which has no noise against itself."""
    before = network(scheme="w3a8")
    model = quantize_model(strip(before), "w3a8")
    calibrate(model, X)
    adaround(model, X, steps=30)
    weights = before.operators["conv2"].kernel().numpy()
    folded, scales = quantize_weights(model.operators["conv2"].kernel(), (3,), model.operators["conv2"].weight_spec)
    own, compared = (
        {layer.name: layer for layer in analyze(model, X, agreement(before), reference=r).layers}["conv2"]
        for r in (None, before)
    )
    assert own.weights.sqnr_db > compared.weights.sqnr_db + 3
    error = sqnr_db(weights, (folded * scales).numpy())
    assert abs(compared.weights.sqnr_db - error) < 4 < own.weights.sqnr_db - error
    assert analyze(model, X, agreement(before), reference=before).float_metric == 1.0


def test_few_samples_say_nothing_of_channels():
    model = network()
    assert not [layer for layer in analyze(model, X[:1]).layers if any("never change" in a for a in layer.advice)]


def test_faults():
    with pytest.raises(ModelError, match="quantize_model"):
        analyze(strip(network()), X)
    with pytest.raises(CalibrationError, match="no sample"):
        analyze(network(), X[:0])


def test_values_that_hardly_differ_are_counted():
    """float32 has fewer numbers between them than the histogram has bins."""
    model = sequential(L.Flatten(), L.Dense(1, activation="sigmoid"), shape=(8, 8, 3))
    model.layers[-1].kernel.assign(np.linspace(-0.1, 0.1, 192)[:, None])
    model.layers[-1].bias.assign([16.5])
    quantized = quantize_model(model)
    calibrate(quantized, X)
    (layer,) = [layer for layer in analyze(quantized, X).layers if layer.kind == "LOGISTIC"]
    histogram = layer.activations.histogram
    assert sum(histogram.counts) == len(X) and 0 < histogram.high - histogram.low < 1e-6


def test_a_number_per_sample_is_one_channel():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.ops.sum(L.Dense(4)(L.Flatten()(inputs)), axis=-1))
    quantized = quantize_model(model)
    calibrate(quantized, X)
    (layer,) = [layer for layer in analyze(quantized, X).layers if layer.kind == "SUM"]
    assert layer.activations.channels == 1 and layer.activations.dead_channels == () and layer.advice == ()


def test_signs_have_no_rounding_to_learn():
    advice = [text for layer in analyze(network(scheme="w1a8"), X).layers for text in layer.advice]
    assert any("signs alone are coarse" in text for text in advice) and not any("adaround" in text for text in advice)
