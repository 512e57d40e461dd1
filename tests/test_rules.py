"""The table agrees with the arithmetic and with the writer, and refuses what the runtime cannot execute."""

import keras
import pytest
from ai_edge_litert import schema_py_generated as schema
from contract import sequential
from keras import layers as L

from mobileqat.convert import _EMITTERS, KERNEL_LAYOUTS
from mobileqat.errors import UnsupportedModelError
from mobileqat.kernels import _ACCUMULATE, KERNELS
from mobileqat.lowering import Clip, Requantize
from mobileqat.quantize import quantize_model
from mobileqat.rules import RULES, Output, find_rule, rule_key


def operators(condition):
    return {rule.operator for rule in RULES.values() if rule.operator and condition(rule)}


def test_every_operator_can_be_written():
    assert operators(lambda rule: True) == set(_EMITTERS)
    assert all(hasattr(schema.BuiltinOperator, operator) for operator in _EMITTERS)


def test_every_operator_that_rounds_has_its_arithmetic():
    assert operators(lambda rule: rule.rounds and not rule.has_kernel) == set(KERNELS)
    assert operators(lambda rule: rule.has_kernel) == set(_ACCUMULATE) == set(KERNEL_LAYOUTS)


def test_what_does_not_round_shares_its_parameters():
    assert all(rule.output is Output.SHARED for rule in RULES.values() if not rule.rounds)


def test_fixed_parameters():
    assert all((rule.fixed is not None) == (rule.output is Output.FIXED) for rule in RULES.values())


def test_layers_that_vanish():
    gone = {key for key, rule in RULES.items() if not rule.operator}
    assert gone == {
        "BatchNormalization", "Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "Identity",
    }  # fmt: skip


@pytest.mark.parametrize("key", sorted(RULES))
def test_keys_name_keras_layers(key):
    name, _, mode = key.partition(":")
    if name == "Activation":
        assert rule_key(L.Activation(mode)) == key
    elif name == "UpSampling2D":
        assert rule_key(L.UpSampling2D(interpolation=mode)) == key
    else:
        assert name in (Clip.__name__, Requantize.__name__) or issubclass(getattr(L, name), keras.Layer)


def test_unknown_layers_have_no_rule():
    assert find_rule(L.LayerNormalization()) is None
    assert find_rule(L.Activation("gelu")) is None
    assert find_rule(L.UpSampling2D(interpolation="bicubic")) is None


REFUSED = {
    "output_padding": (lambda: L.Conv2DTranspose(4, 3, 2, output_padding=1), "output_padding"),
    "dilated transposed": (lambda: L.Conv2DTranspose(4, 3, dilation_rate=2), "dilated transposed"),
    "softmax over another axis": (lambda: L.Softmax(axis=1), "softmax over axis 1"),
    "threshold": (lambda: L.ReLU(threshold=0.5), "threshold=0.5"),
    "slope and max_value": (lambda: L.ReLU(6.0, negative_slope=0.1), "negative_slope and max_value"),
    "bicubic": (lambda: L.UpSampling2D(2, interpolation="bicubic"), "bicubic"),
    "gelu": (lambda: L.Conv2D(4, 3, activation="gelu"), "Activation:gelu"),
    "batch norm over rows": (lambda: L.BatchNormalization(axis=1), "BatchNormalization over axis 1"),
    "channels_first pool": (lambda: L.MaxPooling2D(data_format="channels_first"), "channels_last"),
    "layer normalization": (L.LayerNormalization, "LayerNormalization"),
    "one dimension": (lambda: L.TimeDistributed(L.Conv1D(2, 3)), "TimeDistributed"),
}


@pytest.mark.parametrize("layer, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_where_and_why(layer, message):
    layer = layer()
    with pytest.raises(UnsupportedModelError, match=message) as error:
        quantize_model(sequential(layer, shape=(9, 9, 4)))
    assert f"- {layer.name}" in str(error.value)


@pytest.mark.parametrize("shape, steps", [((9, 3), "reshape"), ((9, 9, 3), "one rank")])
def test_merge_of_unlike_ranks(shape, steps):
    x, y = keras.Input((9, 9, 3)), keras.Input((9, 3))
    with pytest.raises(UnsupportedModelError, match=steps):
        quantize_model(keras.Model([x, y], L.Add(name="sum")([x, y])))


def test_batch_normalization_without_a_layer_to_fold_into():
    with pytest.raises(UnsupportedModelError, match="follows no convolution or dense layer"):
        quantize_model(sequential(L.Flatten(), L.BatchNormalization()))
