"""Every operator's integer arithmetic against the interpreter: not one LSB apart.

Inputs are integers of int8.  With scales that are powers of two most results of a rounding operator lie exactly
between two integers, where rounding rules show; other grids are random, extreme, too wide or too narrow for the data.
Kernels run inside `tf.function`, where TensorFlow's optimizer could reorder float arithmetic.
"""

import zlib
from functools import cache
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from contract import give_trained_weights, sequential
from keras import layers as L
from opbuild import Operand, run

from mobileqat import kernels
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.kernels import KERNELS, Grid
from mobileqat.parity import verify
from mobileqat.primitives import FLOAT, Primitive
from mobileqat.quantize import quantize_model

GRIDS = ("random", "ties", "extreme", "wide", "narrow")
FUSED = {"NONE": 0, "RELU": 1, "RELU6": 3}
SAME = schema.Padding.SAME


class Draw:
    """Random data and grids of one kind, the same in every run."""

    def __init__(self, grids, *words):
        self.grids = grids
        self.rng = np.random.default_rng(zlib.crc32(repr((grids, *words)).encode()))

    def integers(self, shape):
        if self.grids == "extreme":
            return self.rng.choice(np.array([-128, -127, 0, 126, 127], np.int8), shape)
        return self.rng.integers(-128, 128, shape).astype(np.int8)

    def scale(self, natural=0.05):
        """Near the natural scale; far above or below it where the grid is to be too wide or too narrow."""
        if self.grids == "ties":
            return float(2.0 ** (np.round(np.log2(natural)) + self.rng.integers(-1, 2)))
        factor = {"wide": 30.0, "narrow": 1 / 30, "extreme": 1.0}.get(self.grids) or self.rng.uniform(0.5, 2.0)
        return float(np.float32(natural * factor))

    def input_scale(self):
        return (
            float(2.0 ** self.rng.integers(-6, -2))
            if self.grids == "ties"
            else float(np.float32(self.rng.uniform(0.01, 0.1)))
        )

    def zero_point(self):
        is_random = self.grids in ("random", "ties")
        return int(self.rng.integers(-128, 128) if is_random else self.rng.choice([-128, 127]))

    def grid(self):
        return self.input_scale(), self.zero_point()


@cache
def compiled(kind, options, activation):
    layer = SimpleNamespace(options=dict(options))

    @tf.function
    def compute(tensors, scales):
        made = [Grid(scale, zero_point, -128, 127) for scale, zero_point in scales]
        return KERNELS[kind](layer, tensors, made[:-1], made[-1], activation)

    return compute


def simulated(kind, options, arrays, grids, output, activation):
    tensors = [tf.constant(array.astype(np.float32)) for array in arrays]
    scales = [tuple(tf.constant(np.float32(value)) for value in grid) for grid in (*grids, output)]
    return compiled(kind, tuple(options.items()), activation)(tensors, scales).numpy()


def check(kind, version, table, arrays, grids, output, options=None, activation="NONE", constants=(), more=(), by=None):
    """Compares kernel and interpreter; `by` says whether the delegate is expected to compute the operator."""
    expected = simulated(kind, options or {}, arrays, grids, output, activation)
    operands = [
        Operand(array, grid, index in constants) for index, (array, grid) in enumerate(zip(arrays, grids, strict=True))
    ]
    operands += [Operand(np.asarray(values, np.int32), constant=True) for values in more]
    result, delegated = run(kind, version, table, operands, expected.shape, output)
    np.testing.assert_array_equal(result, expected, err_msg=f"{kind} {grids} {output}")
    assert by in (None, delegated)


def test_every_kernel_is_compared_here():
    compared = {"ADD", "SUB", "MUL", "MEAN", "SUM", "BATCH_MATMUL", "PRELU", "L2_NORMALIZATION", "AVERAGE_POOL_2D"}
    compared |= {"RESIZE_BILINEAR", "SOFTMAX", *(kind for kind, *_ in UNARY.values())}
    assert compared == set(KERNELS) - {"TABLE"}, "a TABLE is what the kernel says: there is nothing to compare with"


SHAPES = {
    "equal": ((8, 5, 7, 3), (8, 5, 7, 3)),
    "[1,1,1,C]": ((2, 5, 7, 3), (1, 1, 1, 3)),
    "[C]": ((2, 5, 7), (7,)),
    "both": ((2, 5, 1), (1, 1, 7)),
    "rank 2": ((8, 13), (1, 13)),
    "rank 5": ((2, 3, 1, 2, 4), (2, 1, 3, 1, 1)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
def test_two_tensors(kind, shapes):
    for index, grids in enumerate(GRIDS):
        draw = Draw(grids, kind, shapes)
        activation = ("NONE", "RELU", "RELU6")[len(shapes[0]) % 3]
        points = [draw.grid(), draw.grid()]
        natural = 100 * points[0][0] * points[1][0] if kind == "MUL" else max(points)[0]
        table = (f"{kind.title()}Options", {"fusedActivationFunction": FUSED[activation]})
        constants = ((), (0,), (1,))[index % 3]
        arrays, output = [draw.integers(shape) for shape in shapes], (draw.scale(natural), draw.zero_point())
        check(kind, 2, table, arrays, points, output, {}, activation, constants, by=True)


@pytest.mark.parametrize(
    "shape, axes",
    [((8, 9), (1,)), ((3, 5, 7), (2,)), ((3, 5, 6, 8), (1, 3)), ((3, 8, 8, 16), (1, 2)), ((2, 5, 3, 4, 8), (1, 3))],
)
@pytest.mark.parametrize("kind", ["MEAN", "SUM"])
def test_reductions(kind, shape, axes):
    count = np.prod([shape[axis] for axis in axes])
    for grids in GRIDS:
        draw = Draw(grids, kind, shape, axes)
        scale, zero_point = draw.grid()
        natural = scale * (np.sqrt(count) if kind == "SUM" else 1 / np.sqrt(count))
        options = {"axes": axes, "keepdims": len(axes) > 1}
        table = ("ReducerOptions", {"keepDims": options["keepdims"]})
        output = draw.scale(natural), draw.zero_point()
        check(kind, 2, table, [draw.integers(shape)], [(scale, zero_point)], output, options, more=[axes], by=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("adj_x, adj_y", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(
    "left, right", [((2, 5, 7), (2, 7, 3)), ((2, 1, 5, 33), (1, 3, 33, 4)), ((1, 5, 250), (250, 4))]
)
def test_products_of_activations(left, right, adj_x, adj_y, symmetric):
    """The delegate takes a right operand with zero point 0, and rounds otherwise than LiteRT's own kernel."""
    for grids in GRIDS:
        draw = Draw(grids, left, right, adj_x, adj_y, symmetric)
        a, b = draw.input_scale(), draw.input_scale()
        shapes = [(*s[:-2], s[-1], s[-2]) if swap else s for s, swap in ((left, adj_x), (right, adj_y))]
        points = [(a, draw.zero_point()), (b, 0 if symmetric else draw.zero_point() or 1)]
        output = draw.scale(a * b * 74 * 74 * np.sqrt(left[-1]) / 40), draw.zero_point()
        table = ("BatchMatMulOptions", {"adjX": adj_x, "adjY": adj_y})
        arrays, options = [draw.integers(shape) for shape in shapes], {"adj_x": adj_x, "adj_y": adj_y}
        check("BATCH_MATMUL", 2, table, arrays, points, output, options, by=symmetric)


ALL = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
# Kind, version, options table, options, fixed output grid.
UNARY = {
    "ABS": ("ABS", 2, ("AbsOptions", {}), {}, None),
    "EXP": ("EXP", 2, ("ExpOptions", {}), {}, None),
    "LOG": ("LOG", 2, None, {}, None),
    "ELU": ("ELU", 1, None, {}, None),
    "GELU": ("GELU", 2, ("GeluOptions", {"approximate": False}), {"approximate": False}, None),
    "GELU tanh": ("GELU", 2, ("GeluOptions", {"approximate": True}), {"approximate": True}, None),
    "RSQRT": ("RSQRT", 2, None, {}, None),
    "HARD_SWISH": ("HARD_SWISH", 1, None, {}, None),
    "LEAKY_RELU": ("LEAKY_RELU", 1, ("LeakyReluOptions", {"alpha": 0.3}), {"alpha": 0.3}, None),
    "QUANTIZE": ("QUANTIZE", 1, None, {}, None),
    "LOGISTIC": ("LOGISTIC", 2, None, {}, (1 / 256, -128)),
    "TANH": ("TANH", 2, None, {}, (1 / 128, 0)),
    "RELU6": ("RELU6", 2, None, {}, "the input's"),
}


@pytest.mark.parametrize("kind, version, table, options, fixed", UNARY.values(), ids=UNARY)
def test_functions_of_one_value(kind, version, table, options, fixed):
    for grids in GRIDS:
        for repeat in range(3):
            draw = Draw(grids, kind, repeat)
            scale, zero_point = draw.grid()
            x = ALL
            if kind == "RSQRT":  # the runtime refuses integers below the zero point
                zero_point = min(zero_point, 100)
                x = ALL[:, zero_point + 128 :]
            # These two take no ratio of scales beyond 256.
            natural = scale if kind in ("LEAKY_RELU", "QUANTIZE", "HARD_SWISH", "ABS") else 0.05
            output = (
                (scale, zero_point) if fixed == "the input's" else fixed or (draw.scale(natural), draw.zero_point())
            )
            check(kind, version, table, [x], [(scale, zero_point)], output, options)


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.5e-3, 3.9e-3, 4e-3, -2e-3, -0.5, 3.0, 127.0])
@pytest.mark.parametrize("ratio", [1.0, 0.9, 1.7])
def test_slopes_that_the_delegate_leaves_alone(alpha, ratio):
    """XNNPACK takes what 8 bits of fraction hold; LiteRT's own kernel rounds the rest, and differently."""
    for grids in GRIDS:
        draw = Draw(grids, alpha, ratio)
        grid, table = (np.float32(0.05), draw.zero_point()), ("LeakyReluOptions", {"alpha": alpha})
        output = (np.float32(0.05 / ratio), draw.zero_point())
        takes = 1 / 256 <= abs(np.float32(alpha) * np.float32(grid[0] / output[0])) < 128
        check("LEAKY_RELU", 1, table, [ALL], [grid], output, {"alpha": alpha}, by=bool(takes))


def test_exponentials_that_overflow_saturate():
    check("EXP", 2, ("ExpOptions", {}), [ALL], [(0.5, -128)], (1e-9, 3))


@pytest.mark.parametrize("shape, slopes", [((1, 5, 7), (7,)), ((8, 3, 5, 3), (1, 1, 3)), ((2, 3, 4, 1), (3, 4, 1))])
def test_learned_slopes(shape, slopes):
    for grids in GRIDS:
        draw = Draw(grids, shape)
        points = [draw.grid(), (draw.input_scale() / 8, draw.zero_point())]
        output = draw.scale(points[0][0]), draw.zero_point()
        check("PRELU", 1, None, [draw.integers(shape), draw.integers(slopes)], points, output, constants=(1,))


@pytest.mark.parametrize("shape", [(30, 7), (8, 5, 3), (3, 2, 2, 1), (2, 4000)])
def test_l2_normalization(shape):
    for grids in GRIDS:
        draw = Draw(grids, shape)
        zero_point = draw.zero_point()
        near = np.clip(draw.rng.integers(-2, 3, shape) + zero_point, -128, 127).astype(np.int8)
        for x in (draw.integers(shape), near):
            check("L2_NORMALIZATION", 2, ("L2NormOptions", {}), [x], [(0.05, zero_point)], (1 / 128, 0))


@pytest.mark.parametrize("shape, beta", [((3, 33), 1.0), ((2, 6, 7, 5), 1.0), ((4, 1), 1.0), ((3, 4, 10), 0.35355338)])
def test_softmax(shape, beta):
    for grids in GRIDS:
        draw = Draw(grids, shape)
        table = ("SoftmaxOptions", {"beta": beta})
        check("SOFTMAX", 2, table, [draw.integers(shape)], [draw.grid()], (1 / 256, -128), {"beta": beta})


@pytest.mark.parametrize(
    "size, strides, padding", [((2, 2), (1, 1), "valid"), ((3, 3), (2, 2), "same"), ((1, 5), (1, 3), "same")]
)
def test_average_pool(size, strides, padding):
    for grids in GRIDS:
        draw = Draw(grids, size)
        options = {"pool_size": size, "strides": strides, "padding": padding}
        fields = {"filterHeight": size[0], "filterWidth": size[1], "strideH": strides[0], "strideW": strides[1]}
        fields["padding"] = SAME if padding == "same" else schema.Padding.VALID
        x, grid = draw.integers((2, 6, 7, 8)), draw.grid()
        check("AVERAGE_POOL_2D", 2, ("Pool2DOptions", fields), [x], [grid], grid, options)


@pytest.mark.parametrize("grids", ["random", "extreme"])
@pytest.mark.parametrize(
    "shape, size",
    [((1, 6, 5, 3), (9, 11)), ((8, 6, 5, 1), (3, 2)), ((2, 7, 7, 4), (14, 14)), ((1, 7, 9, 3), (1, 1)),
     ((1, 1, 1, 2), (5, 3)), ((1, 32, 30, 1), (7, 9)), ((1, 100, 3, 1), (33, 100))],
)  # fmt: skip
def test_resizing(shape, size, grids):
    """Nearest neighbours as well, whose choice between two depends on float32 rounding."""
    x, grid = Draw(grids, shape, size).integers(shape), (0.05, 3)
    options = {"halfPixelCenters": True}
    check("RESIZE_BILINEAR", 3, ("ResizeBilinearOptions", options), [x], [grid], grid, {"size": size}, more=[size])
    expected = Primitive("RESIZE_NEAREST_NEIGHBOR", size=size)(x.astype(np.float32)).numpy()
    operands = [Operand(x, grid), Operand(np.int32(size), constant=True)]
    table = ("ResizeNearestNeighborOptions", options)
    np.testing.assert_array_equal(run("RESIZE_NEAREST_NEIGHBOR", 3, table, operands, expected.shape, grid)[0], expected)


@pytest.mark.parametrize("shapes", [((2, 5, 7), (2, 5, 7)), ((8, 5, 3), (1, 1, 3)), ((2, 3, 4, 5, 6), (1, 1, 1, 1, 6))])
@pytest.mark.parametrize("kind", ["MAXIMUM", "MINIMUM"])
def test_what_moves_integers_is_its_float_meaning(kind, shapes):
    arrays = [Draw("random", shape).integers(shape) for shape in shapes]
    expected = FLOAT[kind](*(tf.constant(array, tf.float32) for array in arrays)).numpy()
    operands = [Operand(array, (0.05, 3)) for array in arrays]
    version = 3 if len(shapes[0]) > 4 else 2
    result, _ = run(kind, version, ("MaximumMinimumOptions", {}), operands, expected.shape, (0.05, 3))
    np.testing.assert_array_equal(result, expected)


# --- operators with weights, as whole models: biases, channels and fused activations come with them

SHAPE = (6, 7, 8)
WEIGHTED = {
    "CONV_2D": lambda: L.Conv2D(5, 3, padding="same"),
    "CONV_2D relu6": lambda: L.Conv2D(5, 3, 2, activation="relu6"),
    "CONV_2D groups": lambda: L.Conv2D(6, 3, groups=2, dilation_rate=2),
    "DEPTHWISE_CONV_2D": lambda: L.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
    "TRANSPOSE_CONV": lambda: L.Conv2DTranspose(5, 3, 2, "same"),
    "FULLY_CONNECTED": lambda: L.Dense(9),
}


@pytest.mark.parametrize("grids", ["random", "powers of two"])
@pytest.mark.parametrize("layer", WEIGHTED.values(), ids=WEIGHTED)
def test_operators_with_weights(layer, grids):
    rng = np.random.default_rng(len(grids))
    model = sequential(layer(), shape=SHAPE)
    give_trained_weights(model)
    if grids != "random":  # weights of -1 and 1 make every product a multiple of one power of two
        for variable in model.trainable_variables:
            sign = np.sign(variable.numpy())
            variable.assign(sign * 127 / 128 if "kernel" in variable.path else sign * 2.0**-4)
    quantized = quantize_model(model)
    scale = float(np.float32(rng.uniform(0.01, 0.1)) if grids == "random" else 2.0 ** rng.integers(-6, -3))
    zero_point = int(rng.integers(-128, 128))
    samples = ((rng.integers(-128, 128, (16, *SHAPE)) - zero_point) * scale).astype(np.float32)
    calibrate(quantized, samples)
    (output,) = [quantizer for name, quantizer in quantized.quantizers.items() if name != "x"]
    # A grid a little too small for what comes out, so that some of it saturates.
    natural, output_zero_point = (float(value) for value in output.parameters())
    set_grid(output, 0.8 * natural if grids == "random" else 2.0 ** np.floor(np.log2(natural)), output_zero_point)
    set_grid(quantized.quantizers["x"], scale, zero_point)
    parity = verify(quantized, convert(quantized), samples)
    assert [(op.kind, op.max_lsb) for op in parity.operators] == [(parity.operators[0].kind, 0)]


def set_grid(quantizer, scale, zero_point):
    for member in quantizer.members:
        quantizer.set_range(member, scale * (-128 - zero_point), scale * (127 - zero_point))


# --- small references of their own


def grid(scale, zero_point=0):
    return Grid(tf.constant(np.float32(scale)), tf.constant(np.float32(zero_point)), -128, 127)


def test_requantization_rounds_ties_to_even():
    accumulators = tf.constant([1.0, 3.0, 5.0, -1.0, -3.0, 1000.0, -1000.0])
    result = kernels.requantize(accumulators, tf.constant(0.5), grid(1.0), "NONE")
    np.testing.assert_array_equal(result, [0, 2, 2, 0, -2, 127, -128])


@pytest.mark.parametrize("activation, expected", [("NONE", (-128, 127)), ("RELU", (-60, 127)), ("RELU6", (-60, 60))])
def test_clamp_of_a_fused_activation(activation, expected):
    assert tuple(float(bound) for bound in grid(0.05, -60).clamp(activation)) == expected


def test_average_pool_divides_by_the_valid_part_of_the_window():
    """Ties away from zero; the border is not counted."""
    x = np.random.default_rng(0).integers(-128, 128, (2, 5, 5, 3)).astype(np.float32)
    layer = Primitive("AVERAGE_POOL_2D", pool_size=(3, 3), strides=(1, 1), padding="same")
    result = kernels.average_pool(layer, [tf.constant(x)], [grid(1.0)], grid(1.0), "NONE")
    for row, column in ((0, 0), (2, 2), (4, 1)):
        window = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].astype(int)
        total, count = window.sum((1, 2)), window.shape[1] * window.shape[2]
        expected = np.sign(total) * ((np.abs(total) + count // 2) // count)
        np.testing.assert_array_equal(result[:, row, column], expected)


def test_add_shifts_ties_up():
    x, y = tf.constant([[1.0, -1.0, 3.0, 7.0]]), tf.constant([[0.0, 0.0, 0.0, -2.0]])
    result = kernels.add(Primitive("ADD"), [x, y], [grid(0.5), grid(0.5)], grid(1.0), "NONE")
    np.testing.assert_array_equal(result, [[1, 0, 2, 3]])


@pytest.mark.parametrize(
    "function, options", [("sign", {}), ("reciprocal", {}), ("softplus", {}), ("power", {"exponent": -0.5})]
)
def test_tables_round_the_function_once(function, options):
    """Ties away from zero; what is no number is 0, what is beyond the grid saturates."""
    layer = Primitive("TABLE", function=function, **options)
    x = np.arange(-128, 128).astype(np.float32)
    result = kernels.table(layer, [tf.constant(x)], [grid(0.25, 5)], grid(0.125, -7), "NONE").numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        real = layer(tf.constant((x - 5) * 0.25, tf.float64)).numpy().astype(np.float32) / np.float32(0.125)
    real = np.where(np.isnan(real), 0, real)
    expected = np.clip(np.sign(real) * np.floor(np.abs(real) + 0.5) - 7, -128, 127)
    np.testing.assert_array_equal(result, expected)


def test_accumulators_are_exact_integers():
    rng = np.random.default_rng(0)
    x, weights = rng.integers(-255, 256, (2, 8, 8, 64)), rng.integers(-127, 128, (3, 3, 64, 4))
    layer = keras.layers.Conv2D(4, 3)
    result = kernels.accumulate("CONV_2D", layer, tf.constant(x, tf.float32), tf.constant(weights, tf.float32))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(result, np.einsum("bhwikl,klio->bhwo", patches, weights))
