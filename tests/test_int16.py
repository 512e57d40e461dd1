"""Scheme w8a16: int8 weights, int16 activations, from the plan to the file and back."""

import contextlib

import keras
import numpy as np
import pytest
from contract import check_layer, sequential, small_classifier
from keras import layers as L
from layer_cases import LAYER_CASES

from mobileqat import flatbuffer
from mobileqat.calibrate import calibrate
from mobileqat.convert import INT16_VERSIONS, convert
from mobileqat.errors import CalibrationError, MobileQatError, UnsupportedModelError
from mobileqat.flatbuffer import inspect
from mobileqat.kernels16 import KERNELS
from mobileqat.lower_int16 import SUBSTITUTES, TABLES
from mobileqat.parity import verify
from mobileqat.plan import Output
from mobileqat.primitives import FUNCTIONS
from mobileqat.quantize import quantize_model
from mobileqat.rules import CONSTANT, RULES
from mobileqat.runtime import Session
from mobileqat.schemes import INT16

X = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)

# One or two for each operator; all of `layer_cases` but functions without an int16 form pass.
CASES = [
    ("Convolutions", "Conv2D, strides on an odd size"),
    ("Convolutions", "DepthwiseConv2D, multiplier"),
    ("Convolutions", "Conv2DTranspose"),
    ("Dense", "Dense, rank 3"),
    ("Embedding", "Embedding, beside numbers"),
    ("Normalization", "BatchNormalization, after Conv2DTranspose"),
    ("Normalization", "LayerNormalization"),
    ("Attention", "MultiHeadAttention"),
    ("Merging", "Add, broadcast"),
    ("Merging", "Subtract, broadcast"),
    ("Merging", "Multiply, squeeze and excite"),
    ("Merging", "Concatenate, tensors of fixed grids"),
    ("Pooling", "MaxPooling2D, windows partly outside"),
    ("Pooling", "AveragePooling2D, windows partly outside"),
    ("Activations", "PReLU, rank 3"),
    ("Activations", "Activation, hard_swish, of the input"),
    ("Activations", "Activation, tanh"),
    ("Activations", "Activation, leaky_relu"),
    ("Activations", "Activation, mish"),
    ("Resizing", "UpSampling2D, bilinear, size 3"),
    ("Resizing", "Resizing, nearest"),
    ("Shapes", "Permute"),
    ("Recurrent", "SimpleRNN"),
    ("Operators", "ops.absolute"),
    ("Operators", "ops.log"),
    ("Operators", "ops.pad, reflect"),
    ("Operators", "ops.nn.depth_to_space"),
    ("Topologies", "Inputs and outputs as dicts"),
]


@pytest.mark.filterwarnings("ignore:`build..` was called on layer:UserWarning")
@pytest.mark.parametrize("section, name", CASES, ids=[f"{section}: {name}" for section, name in CASES])
def test_case(section, name):
    keras.utils.set_random_seed(0)
    check_layer(LAYER_CASES[section][name](), scheme="w8a16", relative_error=0.02)


@pytest.mark.parametrize("name", ["Activation, gelu", "Activation, exponential"])
def test_functions_of_libm(name):
    """Entries of a table may differ by one where float32 functions of two C libraries do."""
    check_layer(LAYER_CASES["Activations"][name](), scheme="w8a16", relative_error=0.02, exact=False)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Conv2D(5, 3, padding="same", activation="relu6"),
        lambda: L.DepthwiseConv2D(3, 2, activation="relu"),
        lambda: L.Conv2DTranspose(5, 3, 2, "same"),
        lambda: L.Dense(9),
    ],
    ids=["CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED"],
)
def test_ties(layer):
    """Weights and grids of powers of two: most accumulators lie between two integers of the output."""
    model = sequential(layer(), shape=(6, 7, 8))
    for variable in model.trainable_variables:
        signs = np.random.default_rng(1).choice([-1.0, 1.0], variable.shape)
        variable.assign(signs * 127 / 128 if "kernel" in variable.path else signs * 2.0**-13)
    quantized = quantize_model(model, scheme="w8a16")
    samples = np.random.default_rng(2).integers(-32768, 32768, (8, 6, 7, 8)).astype(np.float32) * 2.0**-12
    calibrate(quantized, samples)
    for name, scale in (("x", 2.0**-12), (quantized.plan.outputs[0], 2.0**-10)):
        quantizer = quantized.quantizers[name]
        quantizer.set_range(quantizer.members[0], -32767 * scale, 32767 * scale)
    (parity,) = verify(quantized, convert(quantized), samples).operators
    assert parity.max_lsb == 0


@pytest.fixture(scope="module")
def quantized():
    keras.utils.set_random_seed(0)
    result = quantize_model(small_classifier(), scheme="w8a16")
    calibrate(result, X)
    return result


def test_plan(quantized):
    assert {tensor.spec for tensor in quantized.plan.tensors.values()} == {INT16}
    assert quantized.plan.tensors["head/softmax"].fixed == (1 / 32768, 0)
    assert quantized.quantizers["pool"].grid()[1] == 0


def test_file(quantized):
    content = convert(quantized)
    tensors = {tensor.name: tensor for tensor in flatbuffer.read(content).tensors}
    types = [tensors[name].dtype for name in ("x", "conv/kernel", "conv/bias", "conv/relu", "head/softmax")]
    assert types == ["int16", "int8", "int64", "int16", "int16"]
    for operator in flatbuffer.read(content).operators:
        assert operator.version >= INT16_VERSIONS.get(operator.name, 1)
    assert inspect(content).fully_integer
    assert convert(quantized, input_type="int16", output_type="auto") == content


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "input_type, output_type", [("float32", "float32"), ("int16", "float32"), ("float32", "int16")]
)
def test_interface_types(quantized, input_type, output_type, batch_size):
    content = convert(quantized, input_type=input_type, output_type=output_type, batch_size=batch_size)
    session = Session(content)
    assert (session.inputs[0].dtype, session.outputs[0].dtype) == (input_type, output_type)
    np.testing.assert_allclose(session.dequantize(session.predict(X)), quantized(X), atol=1e-6)
    assert inspect(content).islands == ()
    assert verify(quantized, content, X).passed


@pytest.mark.parametrize("options", [{"input_type": "int8"}, {"output_type": "uint8"}])
def test_refused_interface_types(quantized, options):
    with pytest.raises(MobileQatError, match=r"one of auto, int16, float32 for scheme 'w8a16'"):
        convert(quantized, **options)


@pytest.mark.parametrize("runtime", ["litert-builtin", "litert-reference", "tf-lite"])
def test_every_kernel_set_takes_the_file(quantized, runtime):
    parity = verify(quantized, convert(quantized), X, runtime=runtime)
    assert all(row.max_lsb <= 1 and row.identical > 0.9 for row in parity.operators), parity.operators


def test_what_is_refused_is_listed_with_paths():
    x = keras.Input((4, 4, 2), name="x")
    y = L.Activation("squareplus", name="smooth")(L.Conv2D(2, 1, name="conv")(x))
    model = keras.Model(x, L.Activation("softsign", name="soft")(y))
    with pytest.raises(UnsupportedModelError, match=r"'smooth': a table of squareplus\n  - 'soft': .*\n.*'w8a8'"):
        quantize_model(model, scheme="w8a16")


def test_products_beyond_their_range_are_refused():
    """LiteRT shifts the 32-bit products of two int16 before it multiplies, and they would wrap."""
    quantized = quantize_model(keras.Model(x := keras.Input((3,), name="x"), x * x), scheme="w8a16")
    calibrate(quantized, np.full((2, 3), 100, np.float32))
    (output,) = quantized.plan.outputs
    quantized.quantizers[output].set_range(output, 0.0, 0.1)
    with pytest.raises(CalibrationError, match="less than 1"):
        convert(quantized)


def test_dense_layers_of_many_inputs():
    """Sums of one sign leave what float32 holds exactly."""
    model = sequential(L.Dense(3, kernel_initializer="ones"), shape=(20_000,))
    check_layer(model, scheme="w8a16", give_weights=False, low=0.0, high=1.0)


def test_values_that_int8_takes_have_not_collapsed():
    """Such as a residual branch that starts with a factor of 1e-6; a thousandth of it has collapsed in both."""
    x = keras.Input((4,), name="x")
    model = keras.Model(x, x + L.Dense(4, name="small")(x))
    data = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    for size in (1e-6, 1e-9):
        model.get_layer("small").kernel.assign(np.full((4, 4), size))
        for scheme in ("w8a8", "w8a16"):
            quantized = quantize_model(model, scheme)
            calibrate(quantized, data)
            with (
                contextlib.nullcontext() if size == 1e-6 else pytest.raises(CalibrationError, match="collapsed to zero")
            ):
                assert verify(quantized, convert(quantized), data).passed


def test_a_bias_beyond_32_bits():
    model = sequential(L.Conv2D(2, 1, name="conv"), shape=(4, 4, 2))
    model.get_layer("conv").kernel.assign(1e-4 * np.ones((1, 1, 2, 2)))
    model.get_layer("conv").bias.assign([1.0, -1.0])
    quantized = check_layer(model, scheme="w8a16", give_weights=False, low=-0.5, high=0.5).quantized
    bias = quantized.operators["conv"].constants()["bias"]
    assert bias.dtype == np.int64 and np.abs(bias).min() > 2**31


def test_training_end_to_end():
    """Learns to find the brighter half, and the file computes what was trained."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (256, 8, 8, 1)).astype(np.float32)
    labels = (images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))).astype(np.int32)
    keras.utils.set_random_seed(0)
    model = sequential(
        L.Conv2D(8, 3, strides=2, use_bias=False), L.BatchNormalization(momentum=0.8), L.Activation("hard_swish"),
        L.DepthwiseConv2D(3, padding="same"), L.ReLU(), L.Flatten(), L.Dense(2, activation="softmax"),
        shape=(8, 8, 1),
    )  # fmt: skip
    quantized = quantize_model(model, scheme="w8a16", input_range=(0, 1))
    calibrate(quantized, images)
    quantized.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    quantized.fit(images, labels, epochs=20, batch_size=32, verbose=0)
    content = convert(quantized)
    parity = verify(quantized, content, images)
    assert parity.passed and parity.end_to_end.identical == 1.0, parity.problems
    accuracy = np.mean(Session(content).predict(images).argmax(-1) == labels)
    assert accuracy == pytest.approx(quantized.evaluate(images, labels, verbose=0)[1]) and accuracy > 0.9


def test_rules_arithmetic_and_substitutes_agree():
    has_int16 = {rule.operator for rule in RULES.values() if rule.int16 and rule.operator not in ("", CONSTANT)}
    lacks = {rule.operator for rule in RULES.values() if not rule.int16}
    rounding = {rule.operator for rule in RULES.values() if rule.rounds and not rule.has_kernel and rule.operator}
    assert (rounding & has_int16) - {CONSTANT} == set(KERNELS)
    assert lacks == set(SUBSTITUTES)
    assert set(TABLES) <= set(FUNCTIONS)
    assert set(INT16_VERSIONS) - {"DEQUANTIZE"} <= has_int16
    assert all(RULES[kind].output is not Output.FIXED or kind in KERNELS for kind in has_int16 & set(RULES))
