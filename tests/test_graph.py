"""Reading models into graphs: paths, opened layers and their weights, subclassed models, open sizes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L
from keras import ops

from mobileqat import graph as graphs
from mobileqat import lowering
from mobileqat.errors import MobileQatError, ModelError, UnsupportedModelError
from mobileqat.graph import Ref, Source, Weight, read
from mobileqat.lowering import expand, lower, register_rule
from mobileqat.quantize import quantize_model, strip
from mobileqat.rules import class_name


def paths(model):
    return [node.path for node in read(model).nodes]


def opened(model, **options):
    """Paths and class names of what is read with every layer opened that has no rule."""
    return [(node.path, class_name(node.layer)) for node in read(model, expand, **options).nodes]


def refusal(model, **options):
    with pytest.raises(UnsupportedModelError) as error:
        quantize_model(model, **options)
    return str(error.value)


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


def test_order_survives_serialization():
    """Ranges are saved by position: a reloaded model must be read in the same order."""
    x = keras.Input((4, 4, 3))
    tensors = [L.Conv2D(3, 1, name=f"conv{index}")(x) for index in (3, 1, 2)]
    shared = L.ReLU(name="relu")
    model = keras.Model(x, L.Add()([shared(tensor) for tensor in reversed(tensors)]))
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert [(n.path, n.inputs) for n in read(copy).nodes] == [(n.path, n.inputs) for n in read(model).nodes]


def test_operators_are_nodes_with_their_arguments():
    x = keras.Input((4, 3), name="x")
    multiplied, parts = read(keras.Model(x, ops.split(x * 2.0, [1, 2], axis=-1))).nodes
    assert multiplied.arguments[0] == (Ref("x"), 2.0) and multiplied.inputs == ("x",)
    assert parts.outputs == ("split", "split#1", "split#2") and parts.inputs == (multiplied.path,)


def test_layers_without_expand_stay_whole():
    x = keras.Input((4, 8), name="x")
    attention = L.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(x, L.LayerNormalization(name="norm")(attention(x, x)))
    assert paths(model) == ["attention", "norm"]
    assert opened(model)[0][0].startswith("attention/")


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: keras.Sequential([L.Conv2D(4, 3)]), "not built"),
        (lambda: sequential(L.Conv2D(4, 3), shape=(None, None, 3)), r"'x' .*\(None, None, None, 3\).*input_shape="),
        (lambda: Subclassed(), r"never been called.*input_shape="),
        (lambda: L.Conv2D(4, 3), "Conv2D"),
        (lambda: "model.keras", "Received: builtins.str"),
        (lambda: None, "NoneType"),
    ],
    ids=["unbuilt", "unknown size", "subclassed", "layer", "path", "None"],
)
def test_refuses_what_has_no_graph(model, message):
    with pytest.raises(ModelError, match=message):
        quantize_model(model())


# --- custom layers are opened


@keras.saving.register_keras_serializable("tests")
class Block(L.Layer):
    """Layers in attributes, in a list and in a dict, one of them called twice, and a weight that is reshaped first."""

    def __init__(self, **options):
        super().__init__(**options)
        self.convolution = L.Conv2D(3, 1)
        self.norms = [L.BatchNormalization(), L.BatchNormalization()]
        self.branches = {"left": L.Conv2D(3, 3, padding="same"), "right": L.ReLU()}

    def build(self, shape):
        self.token = self.add_weight(name="token", shape=(3,), initializer="random_normal")

    def call(self, x, training=None):
        x = self.norms[0](self.convolution(x), training=training)
        x = self.norms[1](self.convolution(x), training=training)
        return self.branches["left"](x) + self.branches["right"](x) + ops.reshape(self.token, (1, 1, 1, 3))

    def get_config(self):
        return super().get_config()  # Keras keeps the name of layers that have this method only


BLOCK = [
    ("block/convolution", "Conv2D"), ("block/norms_0", "BatchNormalization"), ("block/convolution@2", "Conv2D"),
    ("block/norms_1", "BatchNormalization"), ("block/branches_left", "Conv2D"), ("block/branches_right", "ReLU"),
    ("block/add", "ops.Add"), ("block/add@2", "ops.Add"),
]  # fmt: skip


def test_opened_layers_are_named_by_their_attributes():
    model = sequential(L.Conv2D(3, 1, name="first"), Block(name="block"), shape=(4, 4, 3))
    found = opened(model)
    assert found[0] == ("first", "Conv2D") and sorted(found[1:]) == sorted(BLOCK)
    nodes = {node.path: node for node in read(model, expand).nodes}
    assert nodes["block/convolution"].layer is nodes["block/convolution@2"].layer is model.layers[1].convolution
    assert nodes["block/convolution"].inputs == ("first",)


def test_names_of_opened_layers_do_not_change(tmp_path):
    """Not by Keras's counters: `exclude` and saved ranges go by them."""
    model = sequential(Block(name="block"), Block(name="other"), shape=(4, 4, 3))
    names = opened(model)
    model.save(tmp_path / "model.keras")
    for again in (keras.models.load_model(tmp_path / "model.keras"), model):
        assert opened(again) == names


@keras.saving.register_keras_serializable("tests")
class FeedForward(L.Layer):
    """A model among the attributes: its configuration is the layer's own, so its layers are numbered anew."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.Sequential([L.Dense(4, activation="relu"), L.Dense(5, name="wide"), L.Dense(3)])

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return super().get_config()


def test_names_in_models_inside_opened_layers_do_not_change(tmp_path):
    model = sequential(FeedForward(name="block"), shape=(3,))
    expected = ["block/dense/dense", "block/dense/wide", "block/dense/dense@2"]
    assert [path for path, _ in opened(model)] == expected
    model.save(tmp_path / "model.keras")
    for count in range(3):
        L.Dense(1)  # moves Keras's counter
        again = keras.models.load_model(tmp_path / "model.keras")
        assert [path for path, _ in opened(again)] == expected, count
    quantized = quantize_model(model)
    L.Dense(1)
    kernel = strip(quantized).layers[0].dense.layers[0].kernel
    np.testing.assert_array_equal(kernel, quantized.operators["block/dense/dense"].layer.kernel)


def test_opening_leaves_the_model_alone():
    model = sequential(Block(name="block"), shape=(4, 4, 3))
    before = paths(model), len(model.variables)
    quantize_model(model)
    assert (paths(model), len(model.variables)) == before == (["block"], len(model.variables))


def test_weights_that_are_reshaped_first_are_found_by_their_values():
    model = sequential(Block(name="block"), shape=(4, 4, 3))
    (last,) = [node for node in read(model, expand).nodes if node.path == "block/add@2"]
    assert last.arguments[0][1] == Weight(model.layers[0].token, (1, 1, 1, 3))
    sources = [source for node in lower(read(model, expand)).nodes for source in node.sources]
    assert any(source.variable is model.layers[0].token for source in sources)


class Computed(L.Layer):
    """Computes with its weights before they meet the input."""

    def build(self, shape):
        self.factor = self.add_weight(name="factor", shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * ops.exp(self.factor)


class UsesTensorFlow(L.Layer):
    def call(self, x):
        return tf.nn.relu(x)


@pytest.mark.parametrize(
    "layer, messages",
    [
        (Computed, ["factor", "register_rule"]),
        (UsesTensorFlow, ["cannot be opened", "TensorFlow functions", "register_rule"]),
    ],
)
def test_layers_that_cannot_be_opened(layer, messages):
    text = refusal(sequential(layer(name="custom"), shape=(4, 3)))
    assert f"- custom ({layer.__name__}): " in text and all(message in text for message in messages)
    assert "1 place to change" in text


def test_a_frozen_weight_may_be_computed_with():
    layer = Computed()
    layer.trainable = False
    model = sequential(layer, shape=(4, 3))
    layer.factor.assign([0.1, 0.2, 0.3])
    assert lower(read(model, expand)).nodes


def test_a_variable_may_stand_on_the_left():
    class Affine(Computed):
        def call(self, x):
            return 1.0 - self.factor * x

    assert [name for _, name in opened(sequential(Affine(), shape=(4, 3)))] == ["ops.Multiply", "ops.Subtract"]


def test_a_layer_inside_a_layer_is_opened_too():
    class Outer(L.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.inner = Block()

        def call(self, x):
            return self.inner(x)

    found = opened(sequential(Outer(name="outer"), shape=(4, 4, 3)))
    assert sorted(found) == sorted((path.replace("block", "outer/inner"), name) for path, name in BLOCK)


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


# --- rules of the user's own


@pytest.fixture
def rules():
    """Registered rules are of the process; those of a test end with it."""
    before = dict(lowering._REGISTERED)
    yield
    lowering._REGISTERED.clear()
    lowering._REGISTERED.update(before)


def test_register_rule(rules):
    register_rule(UsesTensorFlow, lambda layer, x: ops.relu(x))
    model = sequential(UsesTensorFlow(name="custom"), shape=(4, 3))
    assert [path for path, _ in opened(model)] == ["custom/relu"]


def test_register_rule_decorates_and_wins_over_opening(rules):
    @register_rule(Block)
    def block(layer, x, **options):
        return layer.convolution(x) * 2.0

    model = sequential(Block(name="block"), shape=(4, 4, 3))
    assert block.__name__ == "block"
    assert opened(model) == [("block/convolution", "Conv2D"), ("block/multiply", "ops.Multiply")]


def test_a_rule_may_refuse(rules):
    @register_rule(UsesTensorFlow)
    def _(layer, x):
        raise graphs.Refused("not on a Monday")

    assert "- custom (UsesTensorFlow): not on a Monday" in refusal(sequential(UsesTensorFlow(name="custom")))


@pytest.mark.parametrize("arguments", [("Conv2D",), (int, len), (L.Layer, 3), (L.ReLU(), len)])
def test_register_rule_takes_a_layer_class_and_a_function(rules, arguments):
    with pytest.raises(MobileQatError, match="register_rule takes"):
        register_rule(*arguments)


# --- subclassed models, and sizes that are open


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, name="subclassed", **options):
        super().__init__(name=name, **options)
        self.features = L.Conv2D(4, 3, activation="relu")
        self.heads = [L.Dense(2), L.Dense(3)]

    def call(self, inputs):
        x = ops.mean(self.features(inputs), axis=(1, 2))
        return {"small": self.heads[0](x), "large": self.heads[1](x)}


def called(model, *shapes):
    arrays = [np.zeros((2, *shape), np.float32) for shape in shapes]
    model(arrays if len(arrays) > 1 else arrays[0])
    return model


@pytest.mark.parametrize(
    "make", [lambda: (called(Subclassed(), (8, 8, 3)), None), lambda: (Subclassed(), (8, 8, 3))], ids=["called", "told"]
)
def test_subclassed_model(make):
    model, input_shape = make()
    graph = read(model, expand, input_shape)
    assert graph.inputs == ("input",) and graph.tensors["input"].shape == (None, 8, 8, 3)
    assert [node.path for node in graph.nodes][:2] == ["features", "mean"] and len(graph.outputs) == 2


def test_subclassed_model_inside():
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, Subclassed(name="inner")(x)["large"])
    assert {path.split("/")[0] for path, _ in opened(model)} == {"inner"}


def test_inputs_of_a_subclassed_model_by_name():
    class Two(keras.Model):
        def call(self, inputs):
            return inputs["left"] + inputs["right"]

    assert read(Two(), expand, {"left": (4,), "right": (4,)}).inputs == ("left", "right")


def test_subclassed_model_that_branches_on_values():
    class Branches(keras.Model):
        def call(self, inputs):
            return inputs if float(ops.sum(inputs)) > 0 else -inputs

    with pytest.raises(ModelError, match=r"'branches' \(Branches\) cannot be traced.*keras.ops"):
        read(Branches(name="branches"), expand, (4,))


def test_subclassed_model_quantizes_and_survives_saving(tmp_path):
    model = called(Subclassed(), (8, 8, 3))
    give_trained_weights(model)
    quantized = quantize_model(model)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    quantized(x, training=True)
    assert {name: value.shape for name, value in quantized(x).items()} == {"small": (4, 2), "large": (4, 3)}
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    for name, value in quantized(x).items():
        np.testing.assert_array_equal(loaded(x)[name], value)


@pytest.mark.parametrize("input_shape", [(8, 6, 3), {"x": (8, 6, 3)}])
def test_input_shape_fills_open_sizes(input_shape):
    model = sequential(L.Conv2D(4, 3, name="conv"), shape=(None, None, 3))
    assert read(model, expand, input_shape).tensors["conv"].shape == (None, 6, 4, 4)
    quantized = quantize_model(model, input_shape=input_shape)
    assert quantized.input_shape == (None, 8, 6, 3)
    assert model.input_shape == (None, None, None, 3)


class Doubles(L.Layer):
    def call(self, x):
        return 2.0 * x


@pytest.mark.parametrize("layer", [Doubles, L.LayerNormalization, lambda: L.LSTM(3), lambda: L.GaussianNoise(0.1)])
def test_layers_in_models_that_are_traced_again(layer):
    """Keras then notes `training=False` for every layer, whether it takes that or not."""
    told = quantize_model(sequential(layer(), L.Dense(3), shape=(None, 3)), input_shape=(5, 3))
    known = quantize_model(sequential(layer(), L.Dense(3), shape=(5, 3)))
    assert [op.kind for op in told.plan.operators] == [op.kind for op in known.plan.operators]


def test_a_formula_called_with_a_training_argument():
    x = keras.Input((5, 3), name="x")
    model = keras.Model(x, L.LayerNormalization(name="norm")(x, training=False))
    assert {path.split("/")[0] for path, _ in opened(model)} == {"norm"}


@pytest.mark.parametrize("input_shape", [(8, 6), (8, 6, 4), (8, None, 3), {"y": (8, 6, 3)}])
def test_input_shape_has_to_fit(input_shape):
    with pytest.raises(ModelError, match="'x'"):
        quantize_model(sequential(L.Conv2D(4, 3), shape=(None, None, 3)), input_shape=input_shape)


def test_input_shapes_of_several_inputs():
    x, y = keras.Input((None, 3), name="x"), keras.Input((None, 3), name="y")
    model = keras.Model([x, y], L.Concatenate(axis=1, name="all")([x, y]))
    assert read(model, expand, [(4, 3), (5, 3)]).tensors["all"].shape == (None, 9, 3)


# --- where the values of a lowered weight come from


@pytest.mark.parametrize(
    "index, permutation, shape",
    [
        (None, None, (2, 3, 4)),
        (1, None, (3, 4)),
        ((slice(0, 1), slice(1, 3)), None, (1, 2, 4)),
        (None, (2, 0, 1), (4, 2, 3)),
        ((slice(1, 2), slice(None), slice(2, None)), (2, 0, 1), (2, 1, 3)),
    ],
)
def test_source_reads_and_writes_a_part_of_a_variable(index, permutation, shape):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    variable = keras.Variable(values)
    source = Source(variable, index, permutation)
    part = values if index is None else values[index]
    expected = part if permutation is None else part.transpose(permutation)
    np.testing.assert_array_equal(source.value(), expected)
    assert source.value().shape == shape
    source.assign(-source.value().ravel())
    np.testing.assert_array_equal(source.value(), -expected)
    changed = variable.numpy() != values
    assert changed.sum() == np.count_nonzero(expected), "no other part of the variable moves"


def test_sources_are_the_same_when_they_give_the_same_values():
    a, b = keras.Variable(np.zeros((2, 2))), keras.Variable(np.zeros((2, 2)))
    assert Source(a).key == Source(a).key != Source(b).key
    assert Source(a, 0).key == Source(a, 0).key != Source(a, 1).key
    assert Source(a, (slice(0, 1),)).key == Source(a, (slice(0, 1),)).key != Source(a, None, (1, 0)).key
