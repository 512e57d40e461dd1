"""The table agrees with the float meaning, the arithmetic and the writer."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers as L
from keras import ops

from mobileqat.convert import _EMITTERS, KERNEL_LAYOUTS
from mobileqat.kernels import _ACCUMULATE, KERNELS
from mobileqat.plan import FUSED_ACTIVATIONS
from mobileqat.primitives import FLOAT, FUNCTIONS, Constant, Primitive
from mobileqat.rules import CONSTANT, RULES, VANISHING, Output, class_name, find_rule, get_rule, rule_key

LAYERS = sorted(key for key in RULES if key not in FLOAT)


def operators(condition):
    return {rule.operator for rule in RULES.values() if rule.operator not in ("", CONSTANT) and condition(rule)}


def test_every_operator_can_be_written():
    assert operators(lambda rule: True) == set(_EMITTERS)
    # A TABLE is written as CAST, CAST and GATHER.
    assert all(hasattr(schema.BuiltinOperator, operator) for operator in set(_EMITTERS) - {"TABLE"})


def test_every_operator_that_rounds_has_its_arithmetic():
    assert operators(lambda rule: rule.rounds and not rule.has_kernel) == set(KERNELS)
    assert operators(lambda rule: rule.has_kernel) == set(_ACCUMULATE) == set(KERNEL_LAYOUTS)


def test_every_primitive_has_a_rule_of_its_name():
    assert set(FLOAT) <= set(RULES)
    assert all(RULES[kind].operator == kind for kind in FLOAT)


def test_what_does_not_round_shares_its_parameters():
    assert all(rule.output is Output.SHARED for rule in RULES.values() if not rule.rounds)


def test_fixed_parameters():
    assert all((rule.fixed is not None) == (rule.output is Output.FIXED) for rule in RULES.values())


def test_fused_activations_are_primitives():
    assert set(FUSED_ACTIVATIONS) <= set(FLOAT)


def test_layers_that_vanish():
    gone = {key for key, rule in RULES.items() if not rule.operator}
    assert gone == {"BatchNormalization", *VANISHING}


@pytest.mark.parametrize("name", VANISHING)
def test_what_vanishes_does_nothing_at_inference(name):
    x = np.random.default_rng(0).uniform(0, 1, (2, 8, 3) if name.endswith("1D") else (2, 8, 8, 3)).astype(np.float32)
    factors = {"RandomPosterization": (4,), "RandomTranslation": (0.5, 0.5)}
    np.testing.assert_array_equal(getattr(L, name)(*factors.get(name, (0.5,)))(x, training=False), x)


@pytest.mark.parametrize("key", [key for key in LAYERS if key != "Constant"])
def test_keys_name_keras_layers(key):
    assert issubclass(getattr(L, key), keras.Layer)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_functions_of_tables_are_functions_of_one_value(function):
    parameters = FUNCTIONS[function].__code__.co_varnames[1 : FUNCTIONS[function].__code__.co_argcount]
    options = {name: 0.5 for name in parameters if name not in ("max_value", "name")}
    options |= {"max_value": 1.0} if "max_value" in parameters else {}
    layer = Primitive("TABLE", function=function, **options)
    assert layer(ops.convert_to_tensor([[0.25, 0.5], [1.0, 2.0]])).shape == (2, 2)
    assert layer(keras.Input((3, 2))).shape == (None, 3, 2)


@pytest.mark.parametrize(
    "layer, key",
    [
        (lambda: Primitive("ADD"), "ADD"),
        (lambda: Constant([1.0]), "Constant"),
        (lambda: L.Conv2D(1, 1), "Conv2D"),
        (lambda: (keras.Input((2,)) + 1.0)._keras_history.operation, "ops.Add"),
    ],
)
def test_rule_keys(layer, key):
    """Keras operators are prefixed, since layers have the same names."""
    assert rule_key(layer()) == key


def test_unknown_layers_have_no_rule():
    assert find_rule(L.LayerNormalization()) is None and class_name(L.Add()) == "Add"
    assert find_rule(L.Add()) is None, "lowering makes an ADD of it"
    assert get_rule(Primitive("ADD")).operator == "ADD"
    with pytest.raises(KeyError):
        get_rule(L.LayerNormalization())


def test_products_of_activations_want_a_symmetric_operand():
    assert {key: rule.symmetric_input for key, rule in RULES.items() if rule.symmetric_input is not None} == {
        "BATCH_MATMUL": 1
    }
