"""The arithmetic on int16 activations against the interpreter: not one LSB apart."""

import zlib
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from opbuild import Operand, run

from mobileqat.kernels import Grid
from mobileqat.kernels16 import KERNELS

GRIDS = ("random", "ties", "extreme")
FUSED = {"NONE": 0, "RELU": 1, "RELU6": 3}
ONE = (1 / 32768, 0)


def draw(grids, *words):
    return np.random.default_rng(zlib.crc32(repr((grids, *words)).encode()))


def integers(rng, grids, shape):
    if grids == "extreme":
        return rng.choice(np.array([-32768, -32767, -1, 0, 1, 32766, 32767], np.int16), shape)
    return rng.integers(-32768, 32768, shape).astype(np.int16)


def scale(rng, grids, natural):
    """Near the natural scale: a power of two where ties are wanted."""
    if grids == "ties":
        return float(2.0 ** (np.round(np.log2(natural)) + rng.integers(-1, 2)))
    return float(np.float32(natural * rng.uniform(0.3, 3.0)))


@cache
def compiled(kind, options, activation):
    layer = SimpleNamespace(options=dict(options))

    @tf.function
    def compute(tensors, scales):
        made = [Grid(scale, tf.constant(0.0), -32768, 32767) for scale in scales]
        return KERNELS[kind](layer, tensors, made[:-1], made[-1], activation)

    return compute


def check(kind, version, table, arrays, scales, output, options=None, activation="NONE", more=(), identical=1.0):
    """Compares kernel and interpreter; a share of the outputs may differ by one."""
    tensors = [tf.constant(array.astype(np.float32)) for array in arrays]
    made = [tf.constant(np.float32(value)) for value in (*scales, output)]
    expected = compiled(kind, tuple((options or {}).items()), activation)(tensors, made).numpy()
    operands = [Operand(array, (value, 0)) for array, value in zip(arrays, scales, strict=True)]
    operands += [Operand(np.asarray(values, np.int32), constant=True) for values in more]
    result, delegated = run(kind, version, table, operands, expected.shape, (output, 0), "int16")
    assert not delegated
    np.testing.assert_allclose(result, expected, rtol=0, atol=identical < 1.0, err_msg=f"{kind} {scales} {output}")
    assert np.mean(result == expected) >= identical


LARGE = (8, 32, 32, 16)  # where what happens once in 100,000 times is seen


@pytest.mark.parametrize(
    "shapes",
    [
        (LARGE, LARGE),
        (LARGE, (1, 1, 1, 16)),
        ((8, 5, 7, 3), (8, 5, 7, 3)),
        ((2, 5, 7, 3), (1, 1, 1, 3)),
        ((2, 5, 1), (1, 1, 7)),
    ],
)
@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
def test_two_tensors(kind, shapes):
    for index, grids in enumerate(GRIDS):
        rng = draw(grids, kind, shapes)
        scales = [scale(rng, grids, 1e-4), scale(rng, grids, 3e-4)]
        output = scale(rng, grids, scales[0] * scales[1] * 20000 if kind == "MUL" else 3e-4)
        activation = tuple(FUSED)[index]
        fields = {"fusedActivationFunction": FUSED[activation]} | ({} if kind == "MUL" else {"potScaleInt16": False})
        table = (f"{kind.title()}Options", fields)
        check(kind, 2, table, [integers(rng, grids, shape) for shape in shapes], scales, output, {}, activation)


@pytest.mark.parametrize("shape, axes", [((8, 9), (1,)), ((3, 8, 8, 16), (1, 2)), ((2, 5, 3, 4, 8), (1, 3))])
@pytest.mark.parametrize("kind", ["MEAN", "SUM"])
def test_reductions(kind, shape, axes):
    count = np.prod([shape[axis] for axis in axes])
    for grids in GRIDS:
        rng = draw(grids, kind, shape)
        step = scale(rng, grids, 1e-3)
        output = scale(rng, grids, step * (np.sqrt(count) if kind == "SUM" else 1 / np.sqrt(count)))
        options = {"axes": axes, "keepdims": len(axes) > 1}
        table = ("ReducerOptions", {"keepDims": options["keepdims"]})
        check(kind, 2, table, [integers(rng, grids, shape)], [step], output, options, more=[axes])


@pytest.mark.parametrize("adj_x, adj_y", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("left, right", [((2, 5, 7), (2, 7, 3)), ((2, 1, 5, 33), (1, 3, 33, 4))])
def test_products_of_activations(left, right, adj_x, adj_y):
    for grids in GRIDS:
        rng = draw(grids, left, adj_x, adj_y)
        shapes = [(*s[:-2], s[-1], s[-2]) if swap else s for s, swap in ((left, adj_x), (right, adj_y))]
        scales = [scale(rng, grids, 1e-3), scale(rng, grids, 1e-3)]
        output = scale(rng, grids, scales[0] * scales[1] * 16000 * np.sqrt(left[-1]))
        table = ("BatchMatMulOptions", {"adjX": adj_x, "adjY": adj_y})
        arrays = [integers(rng, grids, shape) for shape in shapes]
        check("BATCH_MATMUL", 2, table, arrays, scales, output, {"adj_x": adj_x, "adj_y": adj_y})


ALL = np.arange(-32768, 32768).astype(np.int16).reshape(1, -1)
# Version, options table, options, natural scales of input and output (None: the input's).
UNARY = {
    "ABS": (2, ("AbsOptions", {}), {}, 1e-3, 1e-3),
    "LEAKY_RELU": (1, ("LeakyReluOptions", {"alpha": 0.3}), {"alpha": 0.3}, 1e-3, 1e-3),
    "LEAKY_RELU falling": (1, ("LeakyReluOptions", {"alpha": -0.002}), {"alpha": -0.002}, 1e-3, 1e-3),
    "QUANTIZE": (1, None, {}, 1e-3, 1e-3),
    "RELU6": (2, None, {}, 1e-3, None),
    "EXP": (2, ("ExpOptions", {}), {}, 1e-4, 1e-3),
    "LOG": (2, None, {}, 1e-3, 2e-4),
    "RSQRT": (2, None, {}, 1e-3, 1e-3),
    "GELU": (2, ("GeluOptions", {"approximate": False}), {"approximate": False}, 2e-4, 2e-4),
    "GELU tanh": (2, ("GeluOptions", {"approximate": True}), {"approximate": True}, 2e-4, 2e-4),
    "LOGISTIC": (2, None, {}, 3e-4, ONE[0]),
    "TANH": (2, None, {}, 3e-4, ONE[0]),
}


@pytest.mark.parametrize("kind", UNARY)
def test_functions_of_one_value(kind):
    version, table, options, natural, natural_output = UNARY[kind]
    for grids in ("random", "ties"):
        rng = draw(grids, kind)
        x = ALL[:, 32768:] if kind == "RSQRT" else ALL
        step = scale(rng, grids, natural)
        if grids == "ties" and kind in ("LOGISTIC", "TANH"):
            step = 2.0**-10
        output = step if natural_output is None else natural_output
        output = output if output in (step, ONE[0]) else scale(rng, grids, natural_output)
        # Entries of a table may differ by one where erf, tanh, exp and log of two C libraries do.
        identical = 0.99 if kind in ("EXP", "LOG") or kind.startswith("GELU") else 1.0
        check(kind.split()[0], version, table, [x], [step], output, options, identical=identical)


@pytest.mark.parametrize("shape, beta", [((3, 33), 1.0), ((2, 6, 7, 5), 1.0), ((4, 1), 1.0), ((3, 4, 10), 0.35355338)])
def test_softmax(shape, beta):
    for grids in GRIDS:
        for natural in (1e-4, 1e-3):
            rng = draw(grids, shape, natural)
            table = ("SoftmaxOptions", {"beta": beta})
            x = integers(rng, grids, shape)
            check("SOFTMAX", 2, table, [x], [scale(rng, grids, natural)], ONE[0], {"beta": beta})


@pytest.mark.parametrize(
    "size, strides, padding", [((2, 2), (1, 1), "valid"), ((3, 3), (2, 2), "same"), ((1, 5), (1, 3), "same")]
)
def test_average_pool(size, strides, padding):
    for grids in GRIDS:
        rng = draw(grids, size)
        options = {"pool_size": size, "strides": strides, "padding": padding}
        fields = {"filterHeight": size[0], "filterWidth": size[1], "strideH": strides[0], "strideW": strides[1]}
        fields["padding"] = schema.Padding.SAME if padding == "same" else schema.Padding.VALID
        x = integers(rng, grids, (2, 6, 7, 8))
        check("AVERAGE_POOL_2D", 2, ("Pool2DOptions", fields), [x], [0.001], 0.001, options)


@pytest.mark.parametrize(
    "shape, size",
    [((1, 6, 5, 3), (9, 11)), ((8, 6, 5, 1), (3, 2)), ((2, 7, 7, 4), (14, 14)), ((1, 100, 3, 1), (33, 100))],
)
def test_resizing(shape, size):
    for grids in GRIDS:
        x = integers(draw(grids, shape), grids, shape)
        table = ("ResizeBilinearOptions", {"halfPixelCenters": True})
        check("RESIZE_BILINEAR", 3, table, [x], [0.001], 0.001, {"size": size}, more=[size])
