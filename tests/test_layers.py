"""The contract, held by every layer and topology: one case is one small model."""

import keras
import numpy as np
import pytest
from contract import check_layer, sequential
from keras import layers as L

from mobileqat.rules import RULES

CONVOLUTIONS = {
    "linear": lambda: sequential(L.Conv2D(8, 3)),
    "one channel": lambda: sequential(L.Conv2D(5, 3, padding="same"), shape=(7, 7, 1)),
    "no bias": lambda: sequential(L.Conv2D(8, (3, 2), use_bias=False)),
    "strides on an odd size": lambda: sequential(L.Conv2D(8, 3, 2, "same", activation="relu")),
    "strides on an even size": lambda: sequential(L.Conv2D(8, 3, 2, "same", activation="relu6"), shape=(8, 10, 3)),
    "strides (1, 2), kernel (2, 5)": lambda: sequential(L.Conv2D(4, (2, 5), (1, 2), "same")),
    "strides beyond the kernel": lambda: sequential(L.Conv2D(4, 1, 2, "same")),
    "dilation": lambda: sequential(L.Conv2D(8, 3, dilation_rate=2, padding="same")),
    "groups": lambda: sequential(L.Conv2D(8, 3, groups=2, padding="same"), shape=(7, 7, 4)),
    "groups of one channel": lambda: sequential(L.Conv2D(6, 3, groups=3), shape=(7, 7, 3)),
    "max_value": lambda: sequential(L.Conv2D(4, 3), L.ReLU(max_value=1.0)),
    "depthwise": lambda: sequential(L.DepthwiseConv2D(3, padding="same", activation="relu")),
    "depthwise multiplier": lambda: sequential(L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)),
    "depthwise strides": lambda: sequential(L.DepthwiseConv2D(3, 2, "same"), shape=(8, 9, 3)),
    "depthwise dilation": lambda: sequential(L.DepthwiseConv2D((3, 5), dilation_rate=2, padding="same")),
    "separable": lambda: sequential(L.SeparableConv2D(8, 3, 2, "same", depth_multiplier=2, activation="relu")),
    "separable, no bias": lambda: sequential(L.SeparableConv2D(8, 3, use_bias=False)),
    "transposed same": lambda: sequential(L.Conv2DTranspose(4, 3, 2, "same", activation="relu"), shape=(5, 4, 3)),
    "transposed valid": lambda: sequential(L.Conv2DTranspose(4, (2, 3), 1), shape=(5, 4, 3)),
    "transposed even kernel": lambda: sequential(L.Conv2DTranspose(4, 4, 2, "same", use_bias=False), shape=(4, 4, 3)),
    "dense": lambda: sequential(L.Dense(5, activation="relu"), L.Dense(3), shape=(11,)),
    "dense, one output": lambda: sequential(L.Dense(1, use_bias=False), shape=(11,)),
    "dense on rank 3": lambda: sequential(L.Dense(5, activation="relu6"), L.Dense(3), shape=(4, 11)),
    "dense on rank 4": lambda: sequential(L.Dense(5), shape=(4, 3, 11)),
}

BATCH_NORMALIZATION = {
    "conv": lambda: sequential(L.Conv2D(8, 3), L.BatchNormalization(), L.ReLU()),
    "conv without bias": lambda: sequential(L.Conv2D(8, 3, use_bias=False), L.BatchNormalization()),
    "scale=False": lambda: sequential(L.Conv2D(8, 3), L.BatchNormalization(scale=False), L.ReLU(6.0)),
    "center=False": lambda: sequential(L.Conv2D(8, 3), L.BatchNormalization(center=False)),
    "depthwise": lambda: sequential(
        L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), L.BatchNormalization(), L.ReLU()
    ),
    "separable": lambda: sequential(L.SeparableConv2D(8, 3), L.BatchNormalization(), L.ReLU()),
    "transposed": lambda: sequential(L.Conv2DTranspose(4, 3, 2, "same"), L.BatchNormalization(), L.ReLU()),
    "dense": lambda: sequential(L.Dense(6), L.BatchNormalization(), L.ReLU(), shape=(11,)),
    "after the activation": lambda: sequential(L.Conv2D(8, 3, activation="relu"), L.BatchNormalization()),
    "first of all": lambda: sequential(L.BatchNormalization(), L.Conv2D(4, 3)),
    "twice": lambda: sequential(L.Conv2D(8, 3), L.BatchNormalization(), L.BatchNormalization(), L.ReLU()),
    "after a linear activation": lambda: sequential(
        L.Dense(6), L.Activation("linear"), L.BatchNormalization(), shape=(11,)
    ),
}

ACTIVATIONS = {
    name: lambda layer=layer: sequential(L.Conv2D(6, 1), layer(), L.Conv2D(4, 1))
    for name, layer in {
        "relu": lambda: L.Activation("relu"),
        "relu6": lambda: L.Activation("relu6"),
        "ReLU(0.5)": lambda: L.ReLU(max_value=0.5),
        "ReLU(slope)": lambda: L.ReLU(negative_slope=0.1),
        "leaky_relu": lambda: L.Activation("leaky_relu"),
        "LeakyReLU": lambda: L.LeakyReLU(negative_slope=0.3),
        "sigmoid": lambda: L.Activation("sigmoid"),
        "tanh": lambda: L.Activation("tanh"),
        "hard_swish": lambda: L.Activation("hard_swish"),
        "swish": lambda: L.Activation("swish"),
        "softmax": lambda: L.Softmax(),
        "linear": lambda: L.Activation("linear"),
    }.items()
}

# An activation that cannot fuse into what comes before it.
LONE_ACTIVATIONS = {
    name: lambda layer=layer: sequential(layer(), L.Conv2D(4, 1))
    for name, layer in {
        "relu": lambda: L.ReLU(),
        "relu6": lambda: L.ReLU(max_value=6.0),
        "ReLU(0.5)": lambda: L.ReLU(max_value=0.5),
        "LeakyReLU": lambda: L.LeakyReLU(),
        "sigmoid": lambda: L.Activation("sigmoid"),
        "tanh": lambda: L.Activation("tanh"),
        "hard_swish": lambda: L.Activation("hard_swish"),
        "swish": lambda: L.Activation("swish"),
    }.items()
}


def noises():
    return L.GaussianDropout(0.2), L.GaussianNoise(0.1), L.Identity()


SPACE = {
    "max pool": lambda: sequential(L.MaxPooling2D(), L.MaxPooling2D(3, 1, "same")),
    "max pool, windows partly outside": lambda: sequential(L.MaxPooling2D((3, 2), (2, 1), "same")),
    "average pool": lambda: sequential(L.AveragePooling2D(2)),
    "average pool same": lambda: sequential(L.AveragePooling2D(3, 2, "same"), shape=(9, 8, 3)),
    "average pool, windows partly outside": lambda: sequential(L.AveragePooling2D(5, 4, "same")),
    "average pool, pool (2, 3)": lambda: sequential(L.AveragePooling2D((2, 3))),
    "average pool, strides (1, 2)": lambda: sequential(L.AveragePooling2D(3, (1, 2), "same")),
    "global average": lambda: sequential(L.Conv2D(8, 3), L.GlobalAveragePooling2D(), L.Dense(3)),
    "global average keepdims": lambda: sequential(L.GlobalAveragePooling2D(keepdims=True), shape=(8, 8, 5)),
    "global average of the input": lambda: sequential(L.GlobalAveragePooling2D(), shape=(32, 31, 3)),
    "global max": lambda: sequential(L.GlobalMaxPooling2D(), L.Dense(3)),
    "global max keepdims": lambda: sequential(L.GlobalMaxPooling2D(keepdims=True), L.Conv2D(3, 1)),
    "zero padding": lambda: sequential(L.ZeroPadding2D(((0, 1), (2, 3))), L.Conv2D(4, 3)),
    "cropping": lambda: sequential(L.Cropping2D(((1, 0), (2, 1))), L.Conv2D(4, 3)),
    "reshape": lambda: sequential(L.Reshape((27, 9)), L.Dense(4), L.Reshape((-1, 2))),
    "flatten": lambda: sequential(L.Conv2D(2, 3), L.Flatten(), L.Dense(4)),
    "permute": lambda: sequential(L.Permute((3, 1, 2)), L.Conv2D(4, 1), L.Permute((2, 3, 1))),
    "nearest 2": lambda: sequential(L.UpSampling2D(2), L.Conv2D(2, 1)),
    "nearest (3, 1)": lambda: sequential(L.UpSampling2D((3, 1))),
    "bilinear 2": lambda: sequential(L.UpSampling2D(2, interpolation="bilinear"), L.Conv2D(2, 1)),
    "bilinear 3": lambda: sequential(L.UpSampling2D(3, interpolation="bilinear"), shape=(5, 4, 3)),
    "bilinear (2, 3)": lambda: sequential(L.UpSampling2D((2, 3), interpolation="bilinear"), shape=(5, 1, 3)),
    "dropouts": lambda: sequential(
        L.Dropout(0.5), L.Conv2D(4, 3), L.SpatialDropout2D(0.3), L.ReLU(), *noises(), L.Flatten(), L.Dense(4)
    ),
    "dropout at the end": lambda: sequential(L.Conv2D(4, 3), L.Dropout(0.5)),
    "nothing but dropout and a reshape": lambda: sequential(L.Dropout(0.5), L.Flatten()),
}


def two_convolutions(x=None):
    x = keras.Input((6, 6, 3), name="x") if x is None else x
    return x, L.Conv2D(4, 3, padding="same")(x), L.Conv2D(4, 1, activation="relu")(x)


def add_two():
    x, a, b = two_convolutions()
    return keras.Model(x, L.ReLU()(L.Add()([a, b])))


def add_three():
    x, a, b = two_convolutions()
    return keras.Model(x, L.ReLU(6.0)(L.Add()([a, b, L.Conv2D(4, 1)(x)])))


def add_twice_the_same():
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Add()([a, a]))


def add_broadcast():
    x, a, b = two_convolutions()
    return keras.Model(x, L.Add()([a, L.GlobalAveragePooling2D(keepdims=True)(b)]))


def multiply_two():
    x, a, b = two_convolutions()
    return keras.Model(x, L.ReLU()(L.Multiply()([a, b])))


def squeeze_and_excite():
    x, a, _ = two_convolutions()
    gate = L.Conv2D(4, 1, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(a))
    return keras.Model(x, L.Multiply()([gate, a, gate]))


def square():
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Multiply()([a, a]))


def concatenate():
    x, a, b = two_convolutions()
    return keras.Model(x, L.Conv2D(3, 1)(L.Concatenate()([a, b])))


def concatenate_fixed():
    x, a, b = two_convolutions()
    tensors = [L.Softmax()(a), L.Activation("sigmoid")(b), L.MaxPooling2D(1)(L.Activation("tanh")(a)), b]
    return keras.Model(x, L.Concatenate()(tensors))


def concatenate_input():
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Concatenate(axis=-1)([L.MaxPooling2D(1)(x), a]))


def concatenate_twice_the_same():
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Concatenate(axis=1)([a, a]))


def concatenate_clipped():
    """ReLU(1) beside a wider tensor: the shared range must not let the first one grow."""
    x, a, b = two_convolutions()
    return keras.Model(x, L.Concatenate()([L.ReLU(max_value=0.3)(a), b]))


def relu_that_cannot_fuse():
    x, a, _ = two_convolutions()
    return keras.Model(x, [a, L.ReLU()(a)])


def relu6_that_cannot_fuse():
    x, a, _ = two_convolutions()
    a = L.Conv2D(4, 1, kernel_initializer=keras.initializers.Constant(3.0))(a)
    return keras.Model(x, [a, L.ReLU(6.0)(a)])


def several_inputs():
    x, y = keras.Input((6, 6, 3), name="left"), keras.Input((6, 6, 3), name="right")
    return keras.Model([x, y], L.Conv2D(4, 3)(L.Add()([x, y])))


def several_outputs():
    x, a, b = two_convolutions()
    return keras.Model(x, [L.Dense(3, activation="softmax")(L.Flatten()(a)), b, L.Conv2D(2, 3)(b)])


def output_of_the_dropout_and_its_input():
    x, a, _ = two_convolutions()
    return keras.Model(x, [L.Dropout(0.5)(a), a])


def input_used_twice():
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Add()([L.Conv2D(3, 1)(a), x]))


def nested():
    inner = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(4, 3, padding="same"), L.ReLU()], name="inner")
    z = keras.Input((6, 6, 4))
    middle = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(4, 1, name="conv")], name="middle")
    outer = keras.Model(z, L.BatchNormalization()(middle(z)), name="outer")
    x, a, b = two_convolutions()
    return keras.Model(x, L.Add()([outer(a), inner(inner(b))]))


def shared_layers():
    x, a, b = two_convolutions()
    convolution, relu, batch_norm = L.Conv2D(4, 3), L.ReLU(), L.BatchNormalization()
    tensors = [relu(batch_norm(convolution(tensor))) for tensor in (a, b)]
    return keras.Model(x, [L.Add()(tensors), relu(a)])


def convolution_read_twice():
    """BatchNormalization that cannot fold, because something else reads the convolution too."""
    x, a, _ = two_convolutions()
    return keras.Model(x, L.Add()([L.BatchNormalization()(a), a]))


MERGES = [
    add_two, add_three, add_twice_the_same, add_broadcast, multiply_two, squeeze_and_excite, square, concatenate,
    concatenate_fixed, concatenate_input, concatenate_twice_the_same, concatenate_clipped,
]  # fmt: skip
TOPOLOGIES = [
    relu_that_cannot_fuse, relu6_that_cannot_fuse, several_inputs, several_outputs,
    output_of_the_dropout_and_its_input, input_used_twice, nested, shared_layers, convolution_read_twice,
]  # fmt: skip


def cases(table):
    return pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in table.items()])


@cases(CONVOLUTIONS)
def test_convolutions(build):
    check_layer(build())


@pytest.mark.parametrize("padding, kernel, strides", [("valid", 1, 2), ("same", 2, 3)])
def test_transposed_convolution_with_gaps(padding, kernel, strides):
    """Kernels smaller than their strides go to LiteRT's own kernel, whose fixed point differs by one LSB."""
    check_layer(sequential(L.Conv2DTranspose(4, kernel, strides, padding), shape=(5, 4, 3)), exact=False)


@cases(BATCH_NORMALIZATION)
def test_batch_normalization(build):
    check_layer(build())


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_vanishing_gamma(beta):
    """A channel that BatchNormalization switches off needs a bias that fits its scale."""
    gammas = [0.0, 1e-20, -1e-12, 1e-9, 1e-7, -1e-5, 1e-3, 1.0]
    model = sequential(L.Conv2D(8, 3), L.BatchNormalization(name="norm"), L.Conv2D(3, 1))
    model.get_layer("norm").gamma.assign(gammas)
    model.get_layer("norm").beta.assign(np.full(8, beta))
    model.get_layer("norm").moving_mean.assign(np.full(8, 0.3))
    check_layer(model, give_weights=False)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-36, 1e-20])
def test_vanishing_kernel(size):
    """Weight decay drives the kernels of dead channels towards subnormal numbers."""
    model = sequential(L.Conv2D(4, 3, name="conv"), L.ReLU())
    kernel = model.get_layer("conv").kernel
    kernel.assign(kernel * np.float32([size, 1, 1, 0]))
    model.get_layer("conv").bias.assign([0.5, 0.1, 0.0, 0.2])
    check_layer(model, give_weights=False)


@cases(ACTIVATIONS)
def test_activations(build):
    check_layer(build())


@cases(LONE_ACTIVATIONS)
def test_activations_of_the_input(build):
    check_layer(build(), low=-8, high=8)


@pytest.mark.parametrize("functions", [("softmax", "sigmoid", "tanh"), ("relu", "leaky_relu", "swish", "hard_swish")])
def test_activation_argument(functions):
    check_layer(sequential(*[L.Dense(7, activation=function) for function in functions], shape=(4, 11)))


@cases(SPACE)
def test_space(build):
    check_layer(build())


@pytest.mark.parametrize("build", MERGES)
def test_merges(build):
    check_layer(build())


@pytest.mark.parametrize("build", TOPOLOGIES)
def test_topologies(build):
    check_layer(build())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Rescaling(1 / 255),
        lambda: L.Rescaling(1 / 127.5, -1),
        lambda: L.Rescaling([0.1, 0.2, 0.05], [1.0, -1.0, 0.0]),
    ],
    ids=["to [0, 1]", "to [-1, 1]", "per channel"],
)
@pytest.mark.parametrize("input_range", [None, (0, 255)])
def test_pixels(layer, input_range):
    model = sequential(layer(), L.Conv2D(4, 3, padding="same"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 9, 3)).astype(np.float32)
    check_layer(model, samples=[pixels], input_range=input_range)


@pytest.mark.parametrize("build", [concatenate_input, input_used_twice, several_inputs])
def test_pinned_input(build):
    """The input keeps its range whatever shares parameters with it downstream."""
    checked = check_layer(build(), low=-1, high=1, input_range=(-1, 1))
    name = checked.quantized.plan.inputs[0]
    np.testing.assert_array_equal(checked.quantized.quantizers[name].ranges(), [[-1, 1]])


@pytest.mark.parametrize(
    "low, high", [(3.0, 3.0), (-5.0, -1.0), (-1e-3, 1e-3), (1e4, 2e4)], ids=["constant", "negative", "small", "large"]
)
def test_unusual_inputs(low, high):
    check_layer(sequential(L.Conv2D(4, 3), L.ReLU(), L.MaxPooling2D(), L.Flatten(), L.Dense(3)), low=low, high=high)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("layer", [L.Add, L.Multiply])
def test_branches_of_unlike_scale(layer, factor):
    """A residual branch that starts near zero, or a huge one: the delegate may refuse such a ratio of scales."""
    x = keras.Input((6, 6, 4), name="x")
    branch = L.Conv2D(4, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=factor))(x)
    check_layer(keras.Model(x, layer()([x, branch])), give_weights=False)


def test_every_rule_has_a_case():
    """Each row of the table is used by some model above."""
    from mobileqat.graph import read
    from mobileqat.lowering import lower
    from mobileqat.rules import rule_key

    tables = (CONVOLUTIONS, BATCH_NORMALIZATION, ACTIVATIONS, LONE_ACTIVATIONS, SPACE)
    models = [build() for table in tables for build in table.values()] + [build() for build in MERGES + TOPOLOGIES]
    used = {rule_key(node.layer) for model in models for node in lower(read(model)).nodes}
    assert used == set(RULES)
