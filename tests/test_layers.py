"""The contract, held by every layer, operator and topology: one case of `layer_cases` is one small model."""

import keras
import numpy as np
import pytest
from contract import check_data, check_layer, sequential
from keras import layers as L
from layer_cases import ACTIVATION_FUNCTIONS, LAYER_CASES

from mobileqat.formulas import FORMULAS
from mobileqat.graph import read
from mobileqat.lower_layers import LAYERS, REASONS
from mobileqat.lower_operators import OPERATORS
from mobileqat.lowering import expand, lower
from mobileqat.rules import RULES, class_name, rule_key

# Where the model is far from its 8-bit twin, or from its file: options of `check_layer`, chosen by measurement.
OPTIONS = {
    "ops.ceil": {"relative_error": 0.06},  # steps of 1, which inputs near them fall on the other side of
    "ops.floor": {"relative_error": 0.06},
    "Shared layers, of several operators": {"relative_error": 0.08},  # inputs of very different size, normalized
    "ops.threshold": {"relative_error": 0.08},
}


def parametrize(names):
    """Over pairs (section, case)."""
    return pytest.mark.parametrize("section, name", names, ids=[f"{section}: {name}" for section, name in names])


def build(section: str, name: str) -> keras.Model:
    return LAYER_CASES[section][name]()


# Keras warns when it rebuilds a layer whose sub-layers are built at the first call.
@pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning")
@parametrize([(section, name) for section, table in LAYER_CASES.items() for name in table])
def test_case(section, name):
    check_layer(build(section, name), **{"relative_error": 0.04} | OPTIONS.get(name, {}))


REPRESENTATIVES = [
    ("Convolutions", "Conv1D, causal, dilated"),
    ("Convolutions", "Conv2D, one channel"),
    ("Convolutions", "Conv2D, groups"),
    ("Convolutions", "Conv2D, strides on an odd size"),
    ("Convolutions", "DepthwiseConv2D, one channel"),
    ("Convolutions", "SeparableConv2D"),
    ("Convolutions", "Conv2DTranspose"),
    ("Dense", "Dense, rank 3"),
    ("Dense", "EinsumDense, two new axes"),
    ("Embedding", "Embedding, beside numbers"),
    ("Normalization", "BatchNormalization, after Conv2D"),
    ("Normalization", "BatchNormalization, alone, one channel"),
    ("Normalization", "LayerNormalization"),
    ("Normalization", "RMSNormalization"),
    ("Normalization", "GroupNormalization, one group"),
    ("Normalization", "UnitNormalization"),
    ("Attention", "MultiHeadAttention"),
    ("Attention", "Attention"),
    ("Merging", "Add, broadcast"),
    ("Merging", "Subtract, broadcast"),
    ("Merging", "Multiply, squeeze and excite"),
    ("Merging", "Average, three"),
    ("Merging", "Maximum, of probabilities"),
    ("Merging", "Concatenate, tensors of fixed grids"),
    ("Merging", "Dot"),
    ("Pooling", "MaxPooling2D, windows partly outside"),
    ("Pooling", "AveragePooling2D, windows partly outside"),
    ("Pooling", "GlobalAveragePooling1D, keepdims"),
    ("Pooling", "GlobalMaxPooling2D, keepdims"),
    ("Activations", "PReLU, rank 3"),
    ("Activations", "ReLU, all settings, of the input"),
    ("Activations", "Activation, gelu"),
    ("Activations", "Activation, hard_swish, of the input"),
    ("Activations", "Activation, hard_sigmoid, of the input"),
    ("Activations", "Activation, swish, of the input"),
    ("Activations", "Softmax, axis 1, rank 3"),
    ("Resizing", "UpSampling2D, bilinear, size 3"),
    ("Resizing", "Resizing, nearest"),
    ("Shapes", "ZeroPadding2D"),
    ("Shapes", "Permute"),
    ("Shapes", "RepeatVector"),
    ("Preprocessing", "Normalization"),
    ("Recurrent", "SimpleRNN"),
    ("Recurrent", "GRU, no bias"),
    ("Operators", "x * 2 + 1"),
    ("Operators", "x + map"),
    ("Operators", "ops.absolute"),
    ("Operators", "ops.exp"),
    ("Operators", "ops.sum"),
    ("Operators", "ops.var"),
    ("Operators", "ops.take"),
    ("Operators", "ops.pad, reflect"),
    ("Topologies", "Residual blocks"),
    ("Topologies", "Inputs and outputs as dicts"),
]


@parametrize(REPRESENTATIVES)
def test_awkward_data(section, name):
    """Ranges below zero; zeros, constants and values far outside of what was calibrated; batches of 1 and 8."""
    check_data(build(section, name), -5.0, -1.0)


@pytest.mark.parametrize("padding, kernel, strides", [("valid", 1, 2), ("same", 2, 3)])
def test_transposed_convolution_with_gaps(padding, kernel, strides):
    """Kernels smaller than their strides go to LiteRT's own kernel, whose fixed point differs by one LSB."""
    check_layer(sequential(L.Conv2DTranspose(4, kernel, strides, padding), shape=(5, 4, 3)), exact=False)


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


@parametrize(
    [
        ("Merging", "Concatenate, the input"),
        ("Merging", "Minimum, of the inputs"),
        ("Topologies", "Input used twice"),
        ("Topologies", "Several inputs"),
        ("Topologies", "Operators on the input"),
    ]
)
def test_pinned_input(section, name):
    """The inputs keep their range whatever shares parameters with them downstream."""
    checked = check_layer(build(section, name), low=-1, high=1, input_range=(-1, 1))
    for name in checked.quantized.plan.inputs:
        np.testing.assert_array_equal(checked.quantized.quantizers[name].ranges(), [[-1, 1]])


@pytest.mark.parametrize(
    "shape, layers",
    [
        ((8, 7, 3), [lambda: L.Conv2D(4, 3), L.GlobalAveragePooling2D, lambda: L.Dense(2)]),
        ((5, 3), [lambda: L.Conv1D(4, 3), lambda: L.SimpleRNN(2)]),
    ],
)
def test_sizes_left_open(shape, layers):
    """The model leaves every size but the channels open; the plan is for one shape."""
    open_shape = (*[None] * (len(shape) - 1), shape[-1])
    check_layer(sequential(*(layer() for layer in layers), shape=open_shape), input_shape=shape)


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
    """Each row of the tables is used by some case."""
    met, used = set(), set()

    def note(layer):
        met.add(class_name(layer))
        return expand(layer)

    for table in LAYER_CASES.values():
        for case in table.values():
            used |= {rule_key(node.layer) for node in lower(read(case(), note)).nodes}
    assert used == set(RULES)
    assert set(LAYERS) - set(REASONS) <= met
    assert set(OPERATORS) <= met
    assert set(FORMULAS) <= met


def test_every_activation_has_a_case():
    functions = {name for name in dir(keras.activations) if not name.startswith("_")}
    no_activations = {"deserialize", "get", "serialize"}
    assert functions - no_activations - {"sparsemax", "threshold"} == set(ACTIVATION_FUNCTIONS)
