"""Lowering: what layers and operators become, views, biases and shared weights; it computes what the model computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L
from keras import ops

from mobileqat import lowering
from mobileqat.errors import UnsupportedModelError
from mobileqat.graph import read
from mobileqat.lower_layers import LAYERS, REASONS
from mobileqat.lowering import expand, lower
from mobileqat.quantize import quantize_model
from mobileqat.rules import rule_key


def lowered(model, pinned=()):
    return lower(read(model, expand), pinned)


def kinds(model, pinned=()):
    return [rule_key(node.layer) for node in lowered(model, pinned).nodes]


def rows(model, pinned=()):
    return [(node.path, rule_key(node.layer)) for node in lowered(model, pinned).nodes]


def computed(graph, samples):
    """The outputs of a lowered graph in float."""
    values = dict(zip(graph.inputs, map(tf.constant, samples), strict=True))
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs] or [values[graph.inputs[0]]]
        if node.prologue:
            scale, offset = node.prologue
            inputs = [inputs[0] * scale + offset]
        values[node.path] = node.layer(inputs if len(inputs) > 1 else inputs[0])
    return [values[name] for name in graph.outputs]


def check_same(model, pinned=()):
    """The lowered graph computes what the model computes; returns it."""
    give_trained_weights(model)
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(3, *x.shape[1:])).astype(np.float32) for x in model.inputs]
    graph = lowered(model, pinned)
    expected = keras.tree.flatten(model(samples if len(samples) > 1 else samples[0]))
    for result, real in zip(computed(graph, samples), expected, strict=True):
        np.testing.assert_allclose(result, real, rtol=1e-4, atol=1e-5)
    return graph


def on_input(function, *shapes):
    inputs = [keras.Input(shape, name=f"x{index}") for index, shape in enumerate(shapes)]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], function(*inputs))


# --- what layers become


def test_activations_become_layers():
    model = sequential(L.Conv2D(4, 3, activation="relu6", name="conv"), L.Dense(2, activation="swish", name="dense"))
    assert rows(model) == [
        ("conv", "Conv2D"), ("conv/relu6", "RELU6"), ("dense", "Dense"), ("dense/silu/sigmoid", "LOGISTIC"),
        ("dense/silu", "MUL"),
    ]  # fmt: skip


def test_separable_convolution():
    assert rows(sequential(L.SeparableConv2D(4, 3, activation="relu", name="sep"))) == [
        ("sep/depthwise", "DepthwiseConv2D"), ("sep/pointwise", "Conv2D"), ("sep/relu", "RELU"),
    ]  # fmt: skip


def test_merges_become_binary():
    model = on_input(lambda *tensors: L.Add(name="sum")(tensors), *[(4, 4, 3)] * 4)
    assert rows(model) == [("sum/1", "ADD"), ("sum/2", "ADD"), ("sum", "ADD")]


def normalization():
    return L.Normalization(mean=[0.2, -0.4, 1.0], variance=[0.5, 1.0, 4.0])


@pytest.mark.parametrize(
    "layers, expected",
    [
        ([L.Rescaling(1 / 255), L.Conv2D(4, 3)], ["Conv2D"]),
        ([L.Rescaling(1 / 255, -0.5), L.Conv2D(4, 3)], ["Conv2D"]),
        ([L.Rescaling(1 / 255), L.Conv2D(4, 3, padding="same")], ["Conv2D"]),
        ([L.Rescaling(1 / 255, -0.5), L.Conv2D(4, 3, padding="same")], ["DepthwiseConv2D", "Conv2D"]),
        ([L.Rescaling(1 / 255, -0.5), L.Conv2D(4, 1, padding="same")], ["Conv2D"]),
        ([normalization(), L.DepthwiseConv2D(3, use_bias=False)], ["DepthwiseConv2D"]),
        ([L.Rescaling(0.5), normalization(), L.Conv2D(4, 3), L.BatchNormalization()], ["Conv2D", "BatchNormalization"]),
        ([normalization(), L.Dense(4)], ["Dense"]),
        ([L.Rescaling(2.0, 1.0), L.Flatten(), L.Dense(4)], ["RESHAPE", "Dense"]),
        ([normalization(), L.Flatten(), L.Dense(4)], ["DepthwiseConv2D", "RESHAPE", "Dense"]),
        ([L.Rescaling(2.0), L.Conv2DTranspose(4, 3)], ["Conv2DTranspose"]),
        ([L.Rescaling(2.0, 1.0), L.Conv2DTranspose(4, 3)], ["DepthwiseConv2D", "Conv2DTranspose"]),
        ([normalization(), L.Conv2D(3, 1, groups=3)], ["DepthwiseConv2D", "Conv2D"]),
        ([L.Rescaling(2.0, 1.0), L.ZeroPadding2D(1), L.Conv2D(4, 3)], ["DepthwiseConv2D", "Conv2D"]),
        ([L.Rescaling(2.0, 1.0), L.ReLU(), L.Conv2D(4, 3)], ["DepthwiseConv2D", "RELU", "Conv2D"]),
    ],
)
def test_preprocessing_is_absorbed_by_the_first_kernel(layers, expected):
    """Where zeros that pad the image, or other readers, are not in the way."""
    graph = check_same(sequential(*layers))
    assert [rule_key(node.layer) for node in graph.nodes] == expected


def test_preprocessing_with_two_readers_stays():
    model = on_input(lambda x: (lambda y: [L.Conv2D(4, 3)(y), L.Conv2D(2, 1)(y)])(L.Rescaling(2.0, 1.0)(x)), (9, 9, 3))
    assert sorted(rule_key(node.layer) for node in check_same(model).nodes) == ["Conv2D", "Conv2D", "DepthwiseConv2D"]


def test_a_shared_kernel_absorbs_for_each_call_its_own():
    shared = L.Conv2D(3, 3)
    model = on_input(lambda x, y: [shared(L.Rescaling(2.0, 1.0)(x)), shared(y)], (9, 9, 3), (9, 9, 3))
    first, second = check_same(model).nodes
    assert first.layer is second.layer and (first.prologue is None) != (second.prologue is None)


def test_scaling_becomes_a_convolution():
    model = sequential(L.Rescaling(1 / 255, name="scale"), L.ReLU(), L.BatchNormalization(name="norm"))
    assert kinds(model) == ["DepthwiseConv2D", "RELU", "DepthwiseConv2D", "BatchNormalization"]


@pytest.mark.parametrize("pinned, expected", [((), 1), (("x0",), 2)])
def test_concatenation_requantizes_what_is_fixed(pinned, expected):
    model = on_input(lambda x: L.Concatenate()([x, L.Softmax()(x), L.Conv2D(2, 1)(x)]), (4, 4, 3))
    assert kinds(model, pinned).count("QUANTIZE") == expected


NOTHING = [
    L.Activation("linear"), L.Identity(), L.ActivityRegularization(0.1), L.Reshape((9, 9, 3)), L.UpSampling2D(1),
    L.ZeroPadding2D(0), L.Permute((1, 2, 3)), lambda x: x * 1.0 + 0.0, lambda x: x[:, :, 0:], lambda x: x**1,
    lambda x: ops.squeeze(ops.expand_dims(x, 1), 1), lambda x: ops.cast(x, "float32"),
]  # fmt: skip


@pytest.mark.parametrize("nothing", NOTHING)
def test_what_does_nothing_vanishes(nothing):
    assert kinds(on_input(lambda x: L.Conv2D(3, 1, activation="linear")(nothing(x)), (9, 9, 3))) == ["Conv2D"]


def test_what_no_output_needs_vanishes():
    model = on_input(lambda x: ops.split(L.Conv2D(4, 1)(x), 2, axis=-1)[1], (4, 4, 3))
    assert kinds(model) == ["Conv2D", "STRIDED_SLICE"]


def test_a_model_of_many_layers_computes_the_same():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Rescaling(0.5, 0.1)(x)
    y = L.SeparableConv2D(6, 3, activation="swish", depth_multiplier=2)(y)
    y = L.BatchNormalization()(L.MaxPooling2D()(L.BatchNormalization()(y)))
    y = L.Add()([y, L.Conv2D(6, 1, activation="leaky_relu")(y), L.ReLU(negative_slope=0.3)(y)])
    y = L.Conv2DTranspose(6, 3, activation="relu6")(L.Concatenate()([y, L.Softmax()(y)]))
    check_same(keras.Model(x, L.Dense(4, activation="softmax")(L.Flatten()(y))))


# Keras operators on tensors [5, 6, 4] (and a second one): kinds of what they become.
OPERATORS = {
    "add": (lambda x, y: x + y, ["ADD"]),
    "subtract": (lambda x, y: x - y, ["SUB"]),
    "add a number": (lambda x, y: 1.5 + x, ["Constant", "ADD"]),
    "subtract from a number": (lambda x, y: 1.0 - x, ["Constant", "SUB"]),
    "negative": (lambda x, y: -x, ["Constant", "SUB"]),
    "multiply by a number": (lambda x, y: x * 0.5, ["Constant", "MUL"]),
    "divide by a number": (lambda x, y: x / 4, ["Constant", "MUL"]),
    "divide": (lambda x, y: x / (y * y + 1.0), ["MUL", "Constant", "ADD", "TABLE", "MUL"]),
    "scale per channel": (lambda x, y: x * np.float32([1, 2, -3, 0.5]), ["DepthwiseConv2D"]),
    "square": (lambda x, y: ops.square(x), ["MUL"]),
    "cube": (lambda x, y: x**3, ["MUL", "MUL"]),
    "power": (lambda x, y: ops.absolute(x) ** 1.5, ["ABS", "TABLE"]),
    "clip": (lambda x, y: ops.clip(x, -0.5, 0.7), ["Constant", "MAXIMUM", "Constant", "MINIMUM"]),
    "clip at 0": (lambda x, y: ops.clip(x, 0, 6), ["RELU6"]),
    "maximum": (lambda x, y: ops.maximum(x, y), ["MAXIMUM"]),
    "minimum": (lambda x, y: ops.minimum(x, 0.2), ["Constant", "MINIMUM"]),
    "hard sigmoid": (lambda x, y: ops.hard_sigmoid(x), ["Constant", "ADD", "RELU6", "Constant", "MUL"]),
    "softmax of another axis": (lambda x, y: ops.softmax(x, 1), ["TRANSPOSE", "SOFTMAX", "TRANSPOSE"]),
    "softmax of the last axes": (lambda x, y: L.Softmax((2, 3))(x), ["RESHAPE", "SOFTMAX", "RESHAPE"]),
    "transpose": (lambda x, y: ops.transpose(x, (0, 3, 1, 2)), ["TRANSPOSE"]),
    "swapaxes": (lambda x, y: ops.swapaxes(x, 1, -1), ["TRANSPOSE"]),
    "moveaxis": (lambda x, y: ops.moveaxis(x, 1, -1), ["TRANSPOSE"]),
    "move an axis of size 1": (lambda x, y: ops.moveaxis(x[..., :1], -1, 1), ["STRIDED_SLICE", "RESHAPE"]),
    "reshape": (lambda x, y: ops.reshape(x, (-1, 30, 4)), ["RESHAPE"]),
    "slice": (lambda x, y: x[:, 1:, ::2, -1], ["STRIDED_SLICE", "RESHAPE"]),
    "slice with an ellipsis": (lambda x, y: x[:, None, ..., 1:3], ["STRIDED_SLICE", "RESHAPE"]),
    "split": (lambda x, y: ops.split(x, [1, 4], axis=2), ["STRIDED_SLICE"] * 3),
    "unstack": (lambda x, y: ops.unstack(x, axis=-1)[1:3], ["STRIDED_SLICE"] * 2 + ["RESHAPE"] * 2),
    "concatenate": (lambda x, y: ops.concatenate([x, y], axis=1), ["CONCATENATION"]),
    "stack": (lambda x, y: ops.stack([x, y], axis=1), ["RESHAPE", "RESHAPE", "CONCATENATION"]),
    "pad": (lambda x, y: ops.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1))), ["PAD"]),
    "pad by reflection": (lambda x, y: ops.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), "reflect"), ["MIRROR_PAD"]),
    "tile": (lambda x, y: ops.tile(x, (1, 2, 1, 3)), ["TILE"]),
    "repeat": (lambda x, y: ops.repeat(x, 2, axis=2), ["RESHAPE", "TILE", "RESHAPE"]),
    "flip": (lambda x, y: ops.flip(x, axis=2), ["Constant", "GATHER"]),
    "take": (lambda x, y: ops.take(x, np.int32([2, 0, -1]), axis=-1), ["Constant", "GATHER"]),
    "take one": (lambda x, y: ops.take(x, 1, axis=1), ["STRIDED_SLICE", "RESHAPE"]),
    "mean": (lambda x, y: ops.mean(x, (1, 2), keepdims=True), ["MEAN"]),
    "sum": (lambda x, y: ops.sum(x, -1), ["SUM"]),
    "max": (lambda x, y: ops.max(x, 1), ["REDUCE_MAX"]),
    "min": (lambda x, y: ops.min(x, (1, 3)), ["REDUCE_MIN"]),
    "variance": (lambda x, y: ops.var(x, 1), ["MEAN", "SUB", "MUL", "MEAN"]),
    "deviation": (lambda x, y: ops.std(x, (1, 2), keepdims=True), ["MEAN", "SUB", "MUL", "MEAN", "TABLE"]),
    "moments": (lambda x, y: ops.moments(x, (1, 2)), ["MEAN", "SUB", "MUL", "MEAN", "RESHAPE"]),
    "normalize": (lambda x, y: ops.normalize(x, -1), ["L2_NORMALIZATION"]),
    "normalize another axis": (lambda x, y: ops.normalize(x, 1), ["TRANSPOSE", "L2_NORMALIZATION", "TRANSPOSE"]),
    "product": (lambda x, y: ops.matmul(x, ops.transpose(y, (0, 1, 3, 2))), ["TRANSPOSE", "BATCH_MATMUL"]),
    "product with a constant": (lambda x, y: ops.matmul(x, np.eye(4, 3, dtype=np.float32)), ["Dense"]),
    "einsum": (lambda x, y: ops.einsum("bijc,bikc->bijk", x, y), ["BATCH_MATMUL"]),
    "einsum with transpositions": (
        lambda x, y: ops.einsum("bijc,bkjc->bjki", x, y), ["TRANSPOSE", "TRANSPOSE", "BATCH_MATMUL", "TRANSPOSE"],
    ),
    "pool": (lambda x, y: ops.max_pool(x, 2) + ops.average_pool(y, 2), ["MAX_POOL_2D", "AVERAGE_POOL_2D", "ADD"]),
    "convolution": (lambda x, y: ops.conv(x, np.ones((2, 2, 4, 3), np.float32), padding="same"), ["Conv2D"]),
    "depthwise": (lambda x, y: ops.depthwise_conv(x, np.ones((2, 2, 4, 1), np.float32)), ["DepthwiseConv2D"]),
    "resize": (lambda x, y: ops.image.resize(x, (7, 3)), ["RESIZE_BILINEAR"]),
    "log": (lambda x, y: ops.log(ops.exp(x)), ["EXP", "LOG"]),
    "gelu": (lambda x, y: ops.gelu(x, approximate=False), ["GELU"]),
    "tables": (lambda x, y: ops.sin(ops.softplus(ops.sign(x))), ["TABLE"] * 3),
}  # fmt: skip


@pytest.mark.parametrize("function, expected", OPERATORS.values(), ids=OPERATORS)
def test_operators(function, expected):
    model = on_input(lambda x, y: [*keras.tree.flatten(function(x, y)), y * 1.0], (5, 6, 4), (5, 6, 4))
    graph = check_same(model)
    assert sorted(rule_key(node.layer) for node in graph.nodes) == sorted(expected)


# --- padding


@pytest.mark.parametrize(
    "layers, padding",
    [
        ([L.ZeroPadding2D(((0, 1), (0, 1))), L.Conv2D(4, 3, strides=2)], "same"),  # MobileNet's, on even sizes
        ([L.ZeroPadding2D(((0, 1), (0, 1))), L.DepthwiseConv2D(3, strides=2)], "same"),
        ([L.ZeroPadding2D(1), L.Conv2D(4, 3)], "same"),
        ([L.ZeroPadding2D(2), L.Conv2D(4, 3, dilation_rate=2)], "same"),
        ([L.ZeroPadding2D(((1, 1), (0, 1))), L.Conv2D(4, (3, 2))], "same"),
        ([L.ZeroPadding2D(1), L.Conv2D(4, 3, strides=2)], "valid"),  # ResNet's: one more before, one less after
        ([L.ZeroPadding2D(1), L.Conv2D(4, 5)], "valid"),
        ([L.ZeroPadding2D(((1, 0), (1, 0))), L.Conv2D(4, 2)], "valid"),
        ([L.ZeroPadding2D(1), L.Conv2D(4, 3, padding="same")], "same with PAD"),
        ([L.ZeroPadding2D(1), L.Conv2DTranspose(4, 3)], "valid"),
    ],
)
def test_padding_that_kernels_do_themselves(layers, padding):
    """Zeros before a kernel become its padding="same" where that means the same zeros."""
    graph = check_same(sequential(*layers, shape=(8, 8, 3)))
    assert graph.nodes[-1].layer.padding == padding.split()[0]
    assert ("PAD" in [rule_key(node.layer) for node in graph.nodes]) == (padding != "same")


def test_padding_with_other_readers_stays_for_them():
    def both(x):
        padded = L.ZeroPadding2D(1)(x)
        return [L.Conv2D(2, 3)(padded), L.MaxPooling2D(2)(padded)]

    graph = check_same(on_input(both, (6, 6, 3)))
    assert sorted(rule_key(node.layer) for node in graph.nodes) == ["Conv2D", "MAX_POOL_2D", "PAD"]


def test_a_kernel_that_is_used_twice_keeps_its_padding():
    conv = L.Conv2D(2, 3)
    model = on_input(lambda x: [conv(L.ZeroPadding2D(1)(x)), conv(x)], (6, 6, 3))
    assert kinds(model) == ["PAD", "Conv2D", "Conv2D"]
    check_same(model)


def test_a_single_row_is_multiplied_in_its_own_shape():
    """Not [1, 1, n]: the result would have to be reshaped back."""
    model = sequential(L.AveragePooling2D(8), L.Flatten(), L.Dense(4), L.Softmax(), shape=(8, 8, 3))
    assert kinds(model) == ["AVERAGE_POOL_2D", "RESHAPE", "Dense", "SOFTMAX"]
    check_same(model)


# --- views


def test_a_chain_of_one_dimensional_layers_has_no_reshape_inside():
    model = sequential(
        L.Conv1D(8, 3, padding="causal", name="conv"), L.BatchNormalization(name="norm"), L.ReLU(name="relu"),
        L.MaxPooling1D(name="pool"), L.SeparableConv1D(4, 3, name="sep"), L.Dropout(0.1), L.GlobalAveragePooling1D(),
        shape=(16, 4),
    )  # fmt: skip
    assert kinds(model) == [
        "RESHAPE", "PAD", "Conv2D", "BatchNormalization", "RELU", "MAX_POOL_2D", "DepthwiseConv2D", "Conv2D", "Dropout",
        "RESHAPE", "MEAN",
    ]  # fmt: skip
    check_same(model)
    quantized = quantize_model(model).plan.operators
    assert [op.nodes[1:] for op in quantized if op.batch_norm] == [("norm/batchnormalization", "relu/relu")]


def test_reshapes_that_undo_each_other_vanish():
    model = sequential(L.Conv2D(4, 1), L.Reshape((18, 18)), L.Flatten(), L.Reshape((9, 9, 4)), L.Conv2D(2, 1))
    assert kinds(model) == ["Conv2D", "Conv2D"]


def test_a_view_read_twice_is_reshaped_once():
    model = on_input(lambda x: [L.Dense(3)(L.Flatten(name="flat")(x)), L.Dense(2)(L.Reshape((36,))(x))], (3, 3, 4))
    assert kinds(model).count("RESHAPE") <= 2
    one = on_input(lambda x: (lambda flat: [L.Dense(3)(flat), L.Dense(2)(flat), flat])(L.Flatten()(x)), (3, 3, 4))
    assert kinds(one).count("RESHAPE") == 1
    check_same(one)


@pytest.mark.parametrize("shape, unrolled", [((9, 4, 2), True), ((6, 6, 2), True), ((36, 2), True), ((18, 4), False)])
def test_what_works_along_the_last_axis_looks_through_views(shape, unrolled):
    """Not where the last axis is another one: its channels would be mixed."""
    model = sequential(L.Reshape(shape), L.Dense(3, activation="softmax"), L.Flatten(), shape=(3, 12, 2))
    graph = check_same(model)
    before = [rule_key(node.layer) for node in graph.nodes].index("Dense")
    assert before == (0 if unrolled else 1)


def test_batch_normalization_looks_through_a_view():
    model = sequential(L.Conv1D(4, 3, use_bias=False), L.BatchNormalization(), shape=(9, 3))
    assert "DepthwiseConv2D" not in kinds(model)
    flat = sequential(L.Conv1D(4, 3), L.Flatten(), L.BatchNormalization(), shape=(9, 3))
    assert "DepthwiseConv2D" in kinds(flat), "its channels are not the convolution's"
    check_same(flat)


def test_branches_of_unlike_views_meet_in_one_shape():
    def branches(x):
        a = L.Conv1D(4, 1)(x)
        return L.Add()([a, L.Reshape((6, 4))(L.Dense(24)(L.Flatten()(x)))])

    check_same(on_input(branches, (6, 4)))


# --- weights: biases, shared layers, and variables used in two ways


class Weighted(L.Layer):
    """A custom layer that computes with its weights by a function `(layer, x)`."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(4, 4), initializer="random_normal")
        self.bias = self.add_weight(name="bias", shape=(4,), initializer="random_normal")

    def call(self, x):
        return self.function(self, x)


def transposed(x, kernel):
    return ops.einsum("btc,dc->btd", x, kernel)


def weighted(function):
    return sequential(Weighted(function, name="custom"), shape=(5, 4))


def use_bias(model):
    return [node.layer.use_bias for node in lowered(model).nodes if hasattr(node.layer, "use_bias")]


@pytest.mark.parametrize(
    "function, biases",
    [
        (lambda layer, x: ops.matmul(x, layer.kernel) + layer.bias, [True]),
        (lambda layer, x: ops.einsum("btc,cd->btd", x, layer.kernel) + layer.bias, [True]),
        (lambda layer, x: ops.einsum("btc,dc->btd", x, layer.kernel) + layer.bias, [True]),
        (lambda layer, x: (lambda y: y + layer.bias + y)(x @ layer.kernel), [False]),
        (lambda layer, x: ops.relu(x @ layer.kernel) + layer.bias, [False]),
        (lambda layer, x: x @ layer.kernel + 0.5 * ops.ones((4,)), [False]),
    ],
    ids=["matmul", "einsum", "einsum transposed", "read twice", "after a ReLU", "frozen beside trained"],
)
def test_bias_added_into_a_product(function, biases):
    model = weighted(function)
    assert use_bias(model) == biases
    check_same(model)


def test_bias_of_a_product_that_leaves_the_model_stays_apart():
    x = keras.Input((5, 4))
    y = ops.matmul(x, np.eye(4, dtype=np.float32))
    assert use_bias(keras.Model(x, [y, y + np.float32([1, 2, 3, 4])])) == [False]


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: ops.relu(x @ layer.kernel) @ layer.kernel,
        lambda layer, x: ops.relu(x @ layer.kernel + layer.bias) @ layer.kernel + layer.bias,
        lambda layer, x: transposed(ops.relu(transposed(x, layer.kernel)), layer.kernel),
    ],
)
def test_a_weight_used_twice_alike_stays_one_layer(function):
    model = weighted(function)
    dense = [node for node in check_same(model).nodes if rule_key(node.layer) == "Dense"]
    assert len(dense) == 2 and len({id(node.layer) for node in dense}) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"),
        lambda: L.Conv1D(4, 1, activation="relu"),
        lambda: L.SeparableConv1D(4, 1),
        lambda: L.BatchNormalization(),
        lambda: L.MultiHeadAttention(1, 4),
    ],
)
def test_a_layer_called_twice_stays_shared(make):
    layer = make()
    call = (lambda x: layer(x, x)) if isinstance(layer, L.MultiHeadAttention) else layer
    graph = check_same(on_input(lambda x: call(ops.relu(call(x))), (5, 4)))
    held = {id(node.layer): node.sources for node in graph.nodes if node.sources}
    variables = [source.variable.path for sources in held.values() for source in sources]
    assert len(variables) == len(set(variables)) == len(layer.weights)


def two_ways(layer, x):
    return transposed(x @ layer.kernel, layer.kernel) + layer.bias


@pytest.mark.parametrize(
    "function, variable",
    [
        (two_ways, "kernel"),
        (lambda layer, x: x @ layer.kernel + ops.relu(x @ layer.kernel + layer.bias), "kernel"),
        (lambda layer, x: x @ layer.kernel + layer.bias + layer.bias, "bias"),
    ],
    ids=["transposed", "with and without bias", "bias added twice"],
)
def test_a_variable_used_in_two_ways_is_refused(function, variable):
    """Two copies of one weight would be trained apart."""
    with pytest.raises(UnsupportedModelError, match=rf"shares .*custom/{variable} with custom/.*in another way"):
        lowered(weighted(function))


def test_a_frozen_variable_may_be_used_in_two_ways():
    model = weighted(two_ways)
    model.layers[0].trainable = False
    check_same(model)


def test_sources_are_the_variables_of_the_model():
    x = keras.Input((6, 4), name="x")
    y = L.LayerNormalization()(L.MultiHeadAttention(2, 3)(x, x))
    model = keras.Model(x, L.GRU(5)(L.SeparableConv1D(4, 3)(y)))
    sources = {source.variable.path for node in lowered(model).nodes for source in node.sources}
    assert sources == {variable.path for variable in model.weights if "seed" not in variable.path}


# --- refusals


def listed(model):
    """The lines of the one error, without their dashes."""
    with pytest.raises(UnsupportedModelError) as error:
        quantize_model(model)
    lines = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert f"{len(lines)} place" in str(error.value)
    return [line.removeprefix("  - ") for line in lines]


def test_all_unsupported_layers_are_listed_with_their_paths():
    inner = keras.Sequential([keras.Input((4, 4, 3)), L.BatchNormalization(axis=1, name="norm")], name="inner")
    x = keras.Input((4, 4, 3))
    y = L.Conv2D(3, 1, activation=ops.sort, name="conv")(inner(x))
    y = L.LSTM(4, stateful=False, name="lstm")(L.Reshape((16, 3))(y), initial_state=[L.Dense(4)(L.Flatten()(x))] * 2)
    lines = listed(keras.Model(x, ops.cumsum(L.Masking(name="mask")(L.RepeatVector(2)(y)), axis=1)))
    assert [line.split(" ")[0] for line in lines] == ["lstm", "inner/norm", "conv", "mask", "cumsum"]


def test_three_dimensions():
    lines = listed(sequential(L.Conv3D(2, 3, name="c"), L.MaxPooling3D(name="p"), shape=(6, 6, 6, 1)))
    assert lines == [f"c (Conv3D): {REASONS['Conv3D']}", f"p (MaxPooling3D): {REASONS['MaxPooling3D']}"]


@pytest.mark.parametrize("name", sorted(REASONS))
def test_layers_with_a_reason_exist(name):
    assert issubclass(getattr(L, name), L.Layer) and name in LAYERS


def test_channels_first():
    convolution = L.Conv2D(4, 1, data_format="channels_first", name="conv")
    lines = listed(sequential(convolution, L.GlobalAveragePooling2D(data_format="channels_first", name="pool")))
    assert [line.split(" ")[0] for line in lines] == ["conv", "pool"]
    assert all("channels_last" in line for line in lines)


REFUSED_LAYERS = {
    "output_padding": (lambda: L.Conv2DTranspose(4, 3, 2, output_padding=1), "output_padding"),
    "dilated transposed": (lambda: L.Conv2DTranspose(4, 3, dilation_rate=2), "dilated transposed"),
    "depthwise strides": (lambda: L.DepthwiseConv2D(3, (1, 2)), r"strides \(1, 2\)"),
    "strides and dilation": (lambda: L.DepthwiseConv2D(3, 2, dilation_rate=2), "strides and dilation"),
    "softmax over apart axes": (lambda: L.Softmax(axis=(1, 3)), r"softmax over the axes \[1, 3\]"),
    "batch norm over rows": (lambda: L.BatchNormalization(axis=1), "BatchNormalization over axis 1"),
    "unit norm over apart axes": (lambda: L.UnitNormalization(axis=(1, 3)), r"axes \[1, 3\]"),
    "bicubic": (lambda: L.UpSampling2D(2, interpolation="bicubic"), "bicubic"),
    "antialias": (lambda: L.Resizing(3, 3, antialias=True), "antialias"),
    "adaptive windows": (lambda: L.AdaptiveAveragePooling2D(4), "does not divide"),
    "crop of a smaller image": (lambda: L.CenterCrop(20, 20), "20x20"),
    "channels_first pool": (lambda: L.MaxPooling2D(data_format="channels_first"), "channels_last"),
    "masking": (lambda: L.Masking(), "no masks"),
    "random size": (lambda: L.RandomCrop(3, 3), "input pipeline"),
    "spectral norm": (lambda: L.SpectralNormalization(L.Conv2D(3, 1)), "quantize the layer inside"),
    "convolutional LSTM": (lambda: L.ConvLSTM1D(2, 3), "two spatial dimensions"),
    "words": (lambda: L.Hashing(3), "strings"),
    "unknown activation": (lambda: L.Conv2D(4, 3, activation=ops.sort), "activation sort has no rule.*relu6"),
    "TensorFlow": (lambda: L.Lambda(tf.nn.relu), "TensorFlow functions"),
    "inside a wrapper": (lambda: L.TimeDistributed(L.BatchNormalization(axis=1)), "axis 1"),
}


@pytest.mark.parametrize("layer, message", REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_refusals_say_where_and_why(layer, message):
    layer = layer()
    with pytest.raises(UnsupportedModelError, match=message) as error:
        quantize_model(sequential(layer, shape=(9, 9, 4)))
    assert f"- {layer.name}" in str(error.value)


REFUSED_OPERATORS = {
    "no rule": (lambda x: ops.sort(x), "sort .*no rule for the Keras operator Sort"),
    "batch mean": (lambda x: ops.mean(x), "over the batch axis"),
    "batch softmax": (lambda x: ops.softmax(x, 0), "over the batch"),
    "batch index": (lambda x: x[0], "batch axis"),
    "batch transposition": (lambda x: ops.transpose(x), "moves the batch axis"),
    "batch concatenation": (lambda x: ops.concatenate([x, x], 0), "batch axis"),
    "batch flip": (lambda x: ops.flip(x), "batch"),
    "negative step": (lambda x: x[:, ::-1], "ops.flip"),
    "padding value": (lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=2.0), "pads with zeros"),
    "cast": (lambda x: ops.cast(x, "int32"), "cast from float32 to int32"),
    "exponent": (lambda x: ops.power(2.0, x), "to the power of a number"),
    "order": (lambda x: ops.normalize(x, -1, order=1), "order=1"),
    "embedding of reals": (lambda x: L.Embedding(3, 2)(x * 2.0), "whole numbers.*dtype='int32'"),
    "initial state": (lambda x: L.LSTM(4)(x, initial_state=[x[:, 0, :4], x[:, 1, :4]]), "initial state"),
    "attention scores": (
        lambda x: list(L.MultiHeadAttention(1, 2)(x, x, return_attention_scores=True)), "return_attention_scores",
    ),
    "causal mask": (lambda x: L.MultiHeadAttention(1, 2)(x, x, use_causal_mask=True), "use_causal_mask"),
    "unlike ranks": (lambda x: L.Add()([x, ops.mean(x, 1)]), "one rank"),
}  # fmt: skip


@pytest.mark.parametrize("function, message", REFUSED_OPERATORS.values(), ids=REFUSED_OPERATORS)
def test_refusals_of_operators(function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        quantize_model(on_input(function, (6, 5)))


def test_what_follows_a_refusal():
    """It may have lost its shape: that is no crash."""
    for function in (lambda x: 2.0 * ops.mean(x), lambda x: x - ops.mean(x), lambda x: L.Dense(3)(ops.sort(x)) + 1.0):
        with pytest.raises(UnsupportedModelError, match=r"mean|sort"):
            quantize_model(on_input(function, (6, 5)))


def test_what_no_rewrite_foresaw_is_listed_too(monkeypatch):
    def broken(low, node):
        raise KeyError("alpha")

    monkeypatch.setitem(lowering.REWRITES, "ops.Sin", broken)
    lines = listed(on_input(lambda x: ops.sort(ops.sin(L.Conv1D(3, 1)(x))), (6, 5)))
    assert [line.split(" ")[0] for line in lines] == ["sin", "sort"] and "(Sin): KeyError: 'alpha'" in lines[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: L.Embedding(3, 2)(ops.relu(x)),
        lambda x: [L.Embedding(3, 2)(x), ops.relu(x)],
        lambda x: [L.Embedding(3, 2)(x), L.Dense(2)(x)],
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_indices_are_whole_numbers_throughout(function, dtype):
    """The runtime has no arithmetic on int32."""
    x = keras.Input((5,), dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=r"whole numbers|indices"):
        quantize_model(keras.Model(x, function(x)))


def test_embedding_with_masks():
    x = keras.Input((5,), dtype="int32")
    with pytest.raises(UnsupportedModelError, match="mask_zero=True"):
        quantize_model(keras.Model(x, L.Embedding(4, 3, mask_zero=True)(x)))


def test_padding_stays_where_sizes_are_open():
    """ZeroPadding2D and a strided convolution are padding="same" at even sizes only."""
    layers = [L.ZeroPadding2D(((0, 1), (0, 1))), L.Conv2D(4, 3, strides=2, name="conv")]
    fixed = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    assert [op.kind for op in quantize_model(fixed).plan.operators] == ["CONV_2D"]
    still_open = keras.Sequential([keras.Input((None, None, 3)), *layers])
    quantized = quantize_model(still_open, input_shape=(8, 8, 3))
    assert [op.kind for op in quantized.plan.operators] == ["PAD", "CONV_2D"]
