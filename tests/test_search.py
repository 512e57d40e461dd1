"""The search gives few bits to the layers that bear them, keeps its budget, and its prediction is the file's size."""

import keras
import numpy as np
import pytest
from contract import give_trained_weights, outputs_of, sequential
from keras import layers as L

from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.errors import MobileQatError
from mobileqat.quantize import quantize_model
from mobileqat.search import FLOAT, Mixture, _pareto, options, parse_budget, search, weight_bytes

X = np.random.default_rng(0).normal(size=(48, 8, 8, 3)).astype(np.float32)


def float_model():
    """Of two layers in the middle one bears few bits: its weights are 1, 0 and -1."""
    keras.utils.set_random_seed(0)
    layers = [L.Conv2D(8, 3, padding="same", activation="relu", name=name) for name in ("first", "rough", "fine")]
    model = sequential(*layers, L.GlobalAveragePooling2D(), L.Dense(5, name="dense"), shape=(8, 8, 3))
    give_trained_weights(model)
    rough = model.get_layer("rough").kernel
    rough.assign(0.1 * np.sign(np.round(10 * rough.numpy())))
    return model


def setup(*schemes):
    model, models = float_model(), {}
    for scheme in schemes:
        models[scheme] = quantize_model(model, scheme)
        calibrate(models[scheme], X)
    expected = outputs_of(model, X)[0]
    return model, models, lambda outputs: -float(np.mean((outputs - expected) ** 2))


def test_few_bits_go_where_they_do_not_hurt():
    model, models, metric = setup("w8a8", "w4a8")
    costs = weight_bytes(models)
    base = len(convert(models["w8a8"])) - sum(costs["w8a8"].values())
    budget = base + sum(costs["w8a8"].values()) - 0.5 * costs["w8a8"]["rough"]
    result = search(models, costs, budget, X, metric, base)
    assert result.chosen.choices == dict.fromkeys(costs["w8a8"], "w8a8") | {"rough": "w4a8"}
    assert result.noise["rough"]["w4a8"] < 0.5 * result.noise["fine"]["w4a8"]
    assert result.chosen.cost <= budget
    mixture = quantize_model(model, **options(result.chosen.choices))
    calibrate(mixture, X)
    # What was simulated is what is converted.
    assert metric(outputs_of(mixture, X)[0]) == pytest.approx(result.chosen.metric, rel=1e-6)
    assert abs(len(convert(mixture)) - result.chosen.cost) <= 64
    np.testing.assert_allclose([m.cost for m in result.front], sorted([m.cost for m in result.front], reverse=True))


def test_the_smallest_budget_takes_everything():
    _, models, metric = setup("w8a8", "w4a8")
    costs = weight_bytes(models)
    result = search(models, costs, sum(costs["w4a8"].values()), X, metric)
    assert set(result.chosen.choices.values()) == {"w4a8"}
    with pytest.raises(MobileQatError, match=r"budget of .*: the smallest mixture of .* takes .*\(--scheme\)"):
        search(models, costs, 0.5 * sum(costs["w4a8"].values()), X, metric)


def test_layers_may_stay_in_float():
    model, models, metric = setup("w8a8", "w2a8")
    costs = weight_bytes(models, with_float=True)
    result = search(models, costs, float("inf"), X, metric)
    assert FLOAT in result.chosen.choices.values() and result.chosen.metric >= result.front[-1].metric
    chosen = options(result.chosen.choices)
    mixture = quantize_model(model, **chosen)
    assert {op.name for op in mixture.plan.operators if not op.quantized} == set(chosen["exclude"])


def test_costs_that_are_measured_decide():
    """A choice that saves nothing is never taken."""
    _, models, metric = setup("w8a8", "w4a8")
    names = weight_bytes(models)["w8a8"]
    costs = {"w8a8": dict.fromkeys(names, 1.0), "w4a8": dict.fromkeys(names, 3.0) | {"dense": 0.5}}
    result = search(models, costs, 3.5, X, metric)
    assert [name for name, choice in result.chosen.choices.items() if choice == "w4a8"] == ["dense"]


def test_options_name_layers_exactly():
    choices = {"a": "w8a8", "b/c": "w8a8", "d*": "w4a8", "e[0]": FLOAT}
    assert options(choices) == {"scheme": "w8a8", "layers": {"d[*]": "w4a8"}, "exclude": ["e[[]0]"]}
    assert options({"a": FLOAT}) == {"scheme": "w8a8", "layers": {}, "exclude": ["a"]}


def test_a_front_has_no_mixture_that_another_beats():
    mixtures = [Mixture({}, cost, metric) for cost, metric in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.95), (4, 0.9))]
    assert [(m.cost, m.metric) for m in _pareto(mixtures)] == [(4, 0.95), (2, 0.9), (1, 0.5)]


def test_a_layer_that_is_called_twice_is_stored_once_and_chosen_once():
    keras.utils.set_random_seed(0)
    inputs, conv = keras.Input((8, 8, 8)), L.Conv2D(8, 3, padding="same", name="twice")
    outputs = L.Dense(4, name="dense")(L.GlobalAveragePooling2D()(conv(L.ReLU()(conv(inputs)))))
    model, x = keras.Model(inputs, outputs), np.random.default_rng(0).normal(size=(32, 8, 8, 8)).astype(np.float32)
    give_trained_weights(model)
    models = {scheme: quantize_model(model, scheme) for scheme in ("w8a8", "w4a8")}
    for quantized in models.values():
        calibrate(quantized, x)
    expected = outputs_of(model, x)[0]
    sizes, costs = {scheme: len(convert(quantized)) for scheme, quantized in models.items()}, weight_bytes(models)
    base = sizes["w8a8"] - sum(costs["w8a8"].values())
    bound = (sizes["w8a8"] + sizes["w4a8"]) / 2
    chosen = search(models, costs, bound, x, lambda found: -float(np.mean((found - expected) ** 2)), base).chosen
    assert chosen.choices["twice"] == chosen.choices["twice@2"] == "w4a8"
    mixture = quantize_model(model, **options(chosen.choices))
    calibrate(mixture, x)
    assert abs(len(convert(mixture)) - chosen.cost) <= 64


@pytest.mark.parametrize("choices", [
    {"sep/depthwise": "w8a8", "sep": "w4a8", "dense": "w8a8"},
    {"sep/depthwise": "w4a8", "sep": "w2a8", "dense": "w8a8"},
    {"sep/depthwise": "w4a8", "sep": "w8a8", "dense": "w4a8"},
])  # fmt: skip
def test_options_are_the_mixture_where_one_path_is_below_another(choices):
    layers = L.SeparableConv2D(16, 3, name="sep"), L.ReLU(), L.GlobalAveragePooling2D(), L.Dense(5, name="dense")
    plan = quantize_model(sequential(*layers, shape=(8, 8, 3)), **options(choices)).plan
    assert {op.name: f"w{op.weight_spec.bits}a8" for op in plan.operators if op.weight_spec} == choices


def test_what_exclude_takes_together_is_chosen_together():
    layers = L.SeparableConv2D(16, 3, name="sep"), L.ReLU(), L.GlobalAveragePooling2D(), L.Dense(5, name="dense")
    model = sequential(*layers, shape=(8, 8, 3))
    give_trained_weights(model)
    models = {"w8a8": quantize_model(model)}
    calibrate(models["w8a8"], X)
    costs = weight_bytes(models, with_float=True)
    found = search(models, costs, float("inf"), X, lambda outputs: 0.0)
    assert found.noise.keys() == {"sep/depthwise", "dense"}
    for mixture in found.front:
        assert mixture.choices["sep/depthwise"] == mixture.choices["sep"]


def test_a_layer_that_only_the_second_output_needs_counts():
    inputs = keras.Input((8, 8, 3))
    trunk = L.Conv2D(8, 3, activation="relu", name="trunk")(inputs)
    heads = [L.Dense(4, name=name)(L.Flatten()(trunk)) for name in ("one", "two")]
    model = keras.Model(inputs, heads)
    give_trained_weights(model)
    models = {scheme: quantize_model(model, scheme) for scheme in ("w8a8", "w2a8")}
    for quantized in models.values():
        calibrate(quantized, X)
    found = search(models, weight_bytes(models), float("inf"), X, lambda _: 0.0)
    assert found.noise.keys() == {"trunk", "one", "two"}
    assert found.noise["two"]["w2a8"] > 10 * found.noise["two"]["w8a8"] > 0


@pytest.mark.parametrize(("text", "what", "amount"), [
    ("size=60kB", "size", 60e3), ("size=60%", "size", 0.6), ("size=7", "size", 7.0), ("cost=0.5ms", "cost", 0.5),
])  # fmt: skip
def test_budgets(text, what, amount):
    budget = parse_budget(text)
    assert (budget.what, budget.amount) == (what, pytest.approx(amount))


@pytest.mark.parametrize("text", ["cost=60kB", "size=5ms", "size=5 GB", "size=0", "cost=..", "time=3ms", "size"])
def test_budgets_in_units_of_something_else_are_refused(text):
    with pytest.raises(MobileQatError, match=r"Not a budget: .* Expected a size in B, kB, MB or %"):
        parse_budget(text)


def test_schemes_differ_in_weights_alone():
    _, models, metric = setup("w8a8", "w8a16")
    with pytest.raises(MobileQatError, match="same activations"):
        search(models, weight_bytes(models), 1e9, X, metric)


def test_one_scheme_is_no_choice():
    _, models, metric = setup("w8a8")
    with pytest.raises(MobileQatError, match="two schemes"):
        search(models, weight_bytes(models), 1e9, X, metric)
