"""What the report's plots are drawn from, against the model and the file that it says it is of."""

import json
import math

import numpy as np
import pytest
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat import plot_data
from mobileqat.analyze import analyze
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.flatbuffer import read
from mobileqat.quantize import quantize_model

X = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def quantized():
    return network()


def network(**options):
    model = sequential(
        L.Conv2D(6, 3, activation="relu", name="conv1"),
        L.Conv2D(6, 3, activation="relu", name="conv2"),
        L.GlobalAveragePooling2D(name="pool"),
        L.Dense(5, activation="softmax", name="dense"),
        shape=(8, 8, 3),
    )
    give_trained_weights(model)
    result = quantize_model(model, **options)
    calibrate(result, X)
    return result


def test_noise_is_the_analysis_in_execution_order(quantized):
    rows = plot_data.noise(quantized, X)
    expected = {layer.name: layer for layer in analyze(quantized, X).layers}
    assert [row["operator"] for row in rows] == [name for name in quantized.operators if name in expected]
    for row in rows:
        layer = expected[row["operator"]]
        assert row["own_sqnr_db"] == round(layer.own_sqnr_db, 2) and row["sqnr_db"] == round(layer.sqnr_db, 2)
        assert row["tensor"] == quantized.operators[row["operator"]].operator.output
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_histograms_count_every_weight_and_value_on_the_integer_grid(quantized):
    rows = {row["operator"]: row for row in plot_data.noise(quantized, X)}
    weights = rows["conv1"]["weights"]
    integers = quantized.operators["conv1"].constants()["weights"]
    assert sum(weights["counts"]) == integers.size and len(weights["counts"]) <= plot_data.MOST_BINS
    for place, count in enumerate(weights["counts"]):
        low = weights["low"] + weights["step"] * place
        assert count == np.sum((integers > low) & (integers < low + weights["step"]))
    values = rows["conv1"]["activations"]
    assert sum(values["counts"]) == len(X) * math.prod(quantized.plan.tensors[rows["conv1"]["tensor"]].shape)
    # A range that was calibrated on these samples has its smallest value, 0 after a ReLU, at the end of the grid.
    assert values["low"] == pytest.approx(values["qmin"], abs=0.01)
    assert values["low"] + values["step"] * len(values["counts"]) == pytest.approx(values["qmax"], abs=1)
    assert rows["pool"]["weights"] is None


def test_only_the_noisiest_have_histograms(quantized, monkeypatch):
    monkeypatch.setattr(plot_data, "MOST_HISTOGRAMS", 2)
    rows = plot_data.noise(quantized, X)
    drawn = [row["operator"] for row in rows if row["activations"]]
    ranked = [layer.name for layer in analyze(quantized, X).layers]
    assert sorted(drawn) == sorted(ranked[:2])


def test_large_tensors_take_fewer_samples(quantized, monkeypatch):
    seen = []

    def counted(model, samples, **options):
        seen.append(len(samples))
        return analyze(model, samples, **options)

    monkeypatch.setattr(plot_data, "analyze", counted)
    plot_data.noise(quantized, X)
    monkeypatch.setattr(plot_data, "MOST_VALUES", 6 * 6 * 6 * 10)
    plot_data.noise(quantized, X)
    monkeypatch.setattr(plot_data, "MOST_VALUES", 1)
    plot_data.noise(quantized, X)
    assert seen == [32, 10, 4]


def test_graph_is_the_file_s(quantized):
    content = convert(quantized)
    graph, file = plot_data.graph(content), read(content)
    assert [row["kind"] for row in graph["operators"]] == [operator.name for operator in file.operators]
    assert graph["inputs"] == list(file.inputs) and graph["outputs"] == list(file.outputs)
    named = {index for row in graph["operators"] for index in (*row["inputs"], *row["outputs"])}
    assert set(map(int, graph["tensors"])) == named
    for row in graph["operators"]:
        for index in row["outputs"]:
            tensor = graph["tensors"][str(index)]
            scale, zero_point = quantized.quantizers[tensor["name"]].grid()
            assert (tensor["scale"], tensor["zero_point"], tensor["dtype"]) == (float(scale), zero_point, "int8")
    assert "int8 [6, 3, 3, 3]" in graph["operators"][0]["constants"]
    assert json.loads(json.dumps(graph, allow_nan=False)) == graph


def test_a_large_graph_is_only_counted(quantized, monkeypatch):
    monkeypatch.setattr(plot_data, "MOST_OPERATORS", 2)
    content = convert(quantized)
    assert plot_data.graph(content) == {"omitted": len(read(content).operators)}


def test_islands_name_their_pattern_and_their_borders(quantized):
    assert plot_data.islands(quantized.plan, ()) == {"operators": [], "borders": []}
    found = plot_data.islands(network(exclude=("conv2*",)).plan, ("nothing", "conv2*"))
    assert [(row["operator"], row["kind"], row["pattern"]) for row in found["operators"]] == [
        ("conv2", "CONV_2D", "conv2*")
    ]
    assert [(row["conversion"], row["values"]) for row in found["borders"]] == [
        ("DEQUANTIZE", 6 * 6 * 6),
        ("QUANTIZE", 4 * 4 * 6),
    ]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("epochs", [1, 59, 60, 200])
def test_ranges_keep_first_and_last_epoch(epochs):
    ranges = [{"epoch": epoch, "ranges": {"a": [0.0, 1 / (epoch + 3)]}} for epoch in range(epochs + 1)]
    kept = [row["epoch"] for row in plot_data.thinned(ranges)]
    assert kept[0] == 0 and kept[-1] == epochs
    assert len(kept) == min(epochs + 1, plot_data.MOST_EPOCHS) and kept == sorted(set(kept))
    assert plot_data.thinned(ranges)[0]["ranges"]["a"] == [0.0, 0.33333]
    assert plot_data.thinned([]) == []
