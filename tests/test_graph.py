"""Reading models into graphs, lowering them, and listing everything that cannot be quantized."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat.errors import ModelError, UnsupportedModelError
from mobileqat.graph import read
from mobileqat.lowering import lower
from mobileqat.quantize import quantize_model


def paths(model):
    return [node.path for node in read(model).nodes]


def lowered(model, pinned=()):
    return [(node.path, type(node.layer).__name__) for node in lower(read(model), pinned).nodes]


def inner_model(name="inner"):
    return keras.Sequential([keras.Input((4, 4, 3)), L.Conv2D(3, 1, name="conv"), L.ReLU(name="relu")], name=name)


def test_sequential():
    graph = read(sequential(L.Conv2D(4, 3, name="conv"), L.Flatten(name="flat")))
    assert graph.inputs == ("x",) and graph.outputs == ("flat",)
    assert [(node.path, node.inputs) for node in graph.nodes] == [("conv", ("x",)), ("flat", ("conv",))]
    assert graph.tensors["flat"].shape == (None, 196)
    assert [node.path for node in graph.consumers("conv")] == ["flat"]


def test_sequential_that_was_called_on_data():
    model = keras.Sequential([L.Conv2D(4, 3, name="conv")])
    model(np.zeros((1, 5, 5, 3), np.float32))
    assert paths(model) == ["conv"]


def test_nested_models_become_paths():
    inner = inner_model()
    x = keras.Input((4, 4, 3))
    outer = keras.Model(x, L.ReLU(name="last")(inner(x)), name="outer")
    y = keras.Input((4, 4, 3))
    assert paths(keras.Model(y, outer(y))) == ["outer/inner/conv", "outer/inner/relu", "outer/last"]


def test_calls_of_a_shared_layer_are_numbered():
    inner = inner_model()
    x = keras.Input((4, 4, 3))
    graph = read(keras.Model(x, inner(inner(x))))
    assert [node.path for node in graph.nodes] == ["inner/conv", "inner/relu", "inner/conv@2", "inner/relu@2"]
    assert graph.nodes[0].layer is graph.nodes[2].layer
    assert len({id(node.layer) for node in lower(graph).nodes}) == 2


def test_order_survives_serialization():
    """Ranges are saved by position: a reloaded model must be read in the same order."""
    x = keras.Input((4, 4, 3))
    tensors = [L.Conv2D(3, 1, name=f"conv{index}")(x) for index in (3, 1, 2)]
    shared = L.ReLU(name="relu")
    model = keras.Model(x, L.Add()([shared(tensor) for tensor in reversed(tensors)]))
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert [(n.path, n.inputs) for n in read(copy).nodes] == [(n.path, n.inputs) for n in read(model).nodes]


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: keras.Sequential([L.Conv2D(4, 3)]), "not built"),
        (lambda: sequential(L.Conv2D(4, 3), shape=(None, None, 3)), r"Input 'x' .*shape \(None, None, None, 3\)"),
        (Subclassed, "Expected a functional or sequential"),
        (lambda: L.Conv2D(4, 3), "Conv2D"),
        (lambda: "model.keras", "Received: builtins.str"),
        (lambda: None, "NoneType"),
    ],
    ids=["unbuilt", "unknown size", "subclassed", "layer", "path", "None"],
)
def test_refuses_what_has_no_graph(model, message):
    with pytest.raises(ModelError, match=message):
        quantize_model(model())


# --- lowering


def test_activations_become_layers():
    model = sequential(L.Conv2D(4, 3, activation="relu6", name="conv"), L.Dense(2, activation="swish", name="dense"))
    assert lowered(model) == [
        ("conv", "Conv2D"), ("conv/relu6", "ReLU"), ("dense", "Dense"),
        ("dense/silu/sigmoid", "Activation"), ("dense/silu", "Multiply"),
    ]  # fmt: skip


def test_separable_convolution():
    assert lowered(sequential(L.SeparableConv2D(4, 3, activation="relu", name="sep"))) == [
        ("sep/depthwise", "DepthwiseConv2D"), ("sep/pointwise", "Conv2D"), ("sep/relu", "ReLU"),
    ]  # fmt: skip


def test_merges_become_binary():
    x = keras.Input((4, 4, 3))
    tensors = [x, L.Conv2D(3, 1, name="a")(x), L.Conv2D(3, 1, name="b")(x), L.Conv2D(3, 1, name="c")(x)]
    added = [row for row in lowered(keras.Model(x, L.Add(name="sum")(tensors))) if row[1] == "Add"]
    assert added == [("sum/1", "Add"), ("sum/2", "Add"), ("sum", "Add")]


def test_scaling_becomes_a_convolution():
    model = sequential(L.Rescaling(1 / 255, name="scale"), L.ReLU(), L.BatchNormalization(name="norm"))
    assert [row[1] for row in lowered(model)] == ["DepthwiseConv2D", "ReLU", "DepthwiseConv2D", "BatchNormalization"]


@pytest.mark.parametrize("pinned, expected", [((), 1), (("x",), 2)])
def test_concatenation_requantizes_what_is_fixed(pinned, expected):
    x = keras.Input((4, 4, 3), name="x")
    model = keras.Model(x, L.Concatenate()([x, L.Softmax()(x), L.Conv2D(2, 1)(x)]))
    assert [row[1] for row in lowered(model, pinned)].count("Requantize") == expected


def test_linear_activations_vanish():
    model = sequential(L.Conv2D(4, 3, activation="linear", name="conv"), L.Activation("linear", name="nothing"))
    assert lowered(model) == [("conv", "Conv2D")]


def test_lowering_computes_the_same():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Rescaling(0.5, 0.1)(x)
    y = L.SeparableConv2D(6, 3, activation="swish", depth_multiplier=2)(y)
    y = L.BatchNormalization()(L.MaxPooling2D()(L.BatchNormalization()(y)))
    y = L.Add()([y, L.Conv2D(6, 1, activation="leaky_relu")(y), L.ReLU(negative_slope=0.3)(y)])
    y = L.Conv2DTranspose(6, 3, activation="relu6")(L.Concatenate()([y, L.Softmax()(y)]))
    model = keras.Model(x, L.Dense(4, activation="softmax")(L.Flatten()(y)))
    give_trained_weights(model)
    graph = lower(read(model))
    samples = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    values = {"x": tf.constant(samples)}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.path] = node.layer(inputs if len(inputs) > 1 else inputs[0])
    np.testing.assert_allclose(values[graph.outputs[0]], model(samples), rtol=1e-4, atol=1e-6)


# --- refusals


class WithoutConfig(keras.Layer):
    """A user's layer that cannot be rebuilt from a configuration."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, inputs):
        return inputs * self.size


def listed(model):
    """The lines of the one error, without their dashes."""
    with pytest.raises(UnsupportedModelError) as error:
        quantize_model(model)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert f"{len(lines)} place" in str(error.value)
    return [line.removeprefix("  - ") for line in lines]


def test_all_unsupported_layers_are_listed_with_their_paths():
    inner = keras.Sequential([keras.Input((4, 4, 3)), L.LayerNormalization(name="norm")], name="inner")
    x = keras.Input((4, 4, 3))
    y = L.Conv2D(3, 1, activation="gelu", name="conv")(inner(x))
    y = L.LSTM(4, name="lstm")(L.Reshape((16, 3))(y))
    lines = listed(keras.Model(x, L.UnitNormalization(name="unit")(y)))
    assert [line.split(" ")[0] for line in lines] == ["inner/norm", "conv/gelu", "lstm", "unit"]
    assert all("no rule for" in line for line in lines)


def test_three_dimensions():
    assert "Conv3D" in listed(sequential(L.Conv3D(2, 3, name="c"), L.MaxPooling3D(name="p"), shape=(6, 6, 6, 1)))[0]


def test_operators_are_listed():
    x = keras.Input((4, 4, 3))
    lines = listed(keras.Model(x, keras.ops.relu(x * 2.0 + 1.0)))
    assert len(lines) == 3 and [line.split(" ")[0] for line in lines] == ["multiply", "add", "relu"]


def test_operators_and_layers_in_one_error():
    x = keras.Input((4, 4, 3))
    lines = listed(keras.Model(x, L.LayerNormalization(name="norm")(x * 2.0)))
    assert len(lines) == 2


def test_layers_that_cannot_be_rebuilt():
    lines = listed(sequential(L.Lambda(lambda x: x, name="lambda"), WithoutConfig(3), L.LayerNormalization()))
    assert len(lines) == 3


def test_layers_with_several_arguments():
    x = keras.Input((4, 8))
    lines = listed(keras.Model(x, L.LayerNormalization()(L.MultiHeadAttention(2, 4, name="attention")(x, x))))
    assert len(lines) == 2 and lines[0].startswith("attention")


def test_layers_with_several_outputs():
    x = keras.Input((4, 8))
    outputs, state = L.GRU(4, return_state=True, name="gru")(x)
    assert "2 outputs" in listed(keras.Model(x, [outputs, state]))[0]


def test_subclassed_model_inside():
    x = keras.Input((4, 4, 3))
    lines = listed(keras.Model(x, L.LayerNormalization()(Subclassed(name="inner")(x))))
    assert len(lines) == 2 and lines[0].startswith("inner")


def test_activation_that_is_a_layer():
    assert "LeakyReLU" in listed(sequential(L.Conv2D(4, 3, activation=L.LeakyReLU(), name="conv")))[0]


def test_channels_first():
    convolution = L.Conv2D(4, 1, data_format="channels_first", name="conv")
    lines = listed(sequential(convolution, L.GlobalAveragePooling2D(data_format="channels_first", name="pool")))
    assert [line.split(" ")[0] for line in lines] == ["conv", "pool"]
    assert all("channels_last" in line for line in lines)


def test_training_argument_of_a_call():
    """Keras lets a model's `training=True` win over `norm(x, training=False)`: the quantized model does as it does."""
    x = keras.Input((4, 4, 3), name="x")
    norm = L.BatchNormalization()
    model = keras.Model(x, norm(L.Conv2D(3, 1)(x), training=False))
    quantized = quantize_model(model)
    copy = next(wrapper.batch_norm for wrapper in quantized.operators.values() if wrapper.batch_norm)
    samples = np.random.default_rng(0).normal(5, 3, size=(64, 4, 4, 3)).astype(np.float32)
    for each in (model, quantized):
        each(samples, training=True)
    moved = [bool(np.any(np.asarray(bn.moving_mean) != 0)) for bn in (norm, copy)]
    assert moved[0] == moved[1]
