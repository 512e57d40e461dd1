"""What operators may be given: each rule refuses what kernels die of, and lets the honest twin pass."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from opbuild import Operand, build

from mobileqat import flatbuffer
from mobileqat.errors import FlatbufferError

GRID = (0.1, 0)


def zeros(*shape, grid=GRID, dtype=np.int8):
    return Operand(np.zeros(shape, dtype), grid)


def constant(*values, dtype=np.int32):
    return Operand(np.array(values, dtype), constant=True)


def edited(content, change):
    """The file after a change to its tensors and its operator."""
    import flatbuffers

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    change(model.subgraphs[0].tensors, model.subgraphs[0].operators[0])
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def add(left=GRID, right=GRID, out=GRID, dtype="int8"):
    operands = [zeros(1, 4, grid=left, dtype=dtype), zeros(1, 4, grid=right, dtype=dtype)]
    return build("ADD", 2, ("AddOptions", {}), operands, (1, 4), out, dtype)


def convolution(**options):
    options = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, **options}
    kernel = Operand(np.ones((2, 1, 1, 3), np.int8), GRID, constant=True)
    return build("CONV_2D", 3, ("Conv2DOptions", options), [zeros(1, 4, 4, 3), kernel], (1, 4, 4, 2), GRID)


def softmax(beta=1.0, grid=GRID):
    return build("SOFTMAX", 2, ("SoftmaxOptions", {"beta": beta}), [zeros(1, 4, grid=grid)], (1, 4), (1 / 256, -128))


def resize(size=(8, 8), shape=(1, 8, 8, 1)):
    operands = [zeros(1, 4, 4, 1), constant(*size)]
    return build("RESIZE_NEAREST_NEIGHBOR", 3, ("ResizeNearestNeighborOptions", {}), operands, shape, GRID)


def pad(amounts=((0, 0), (1, 1)), shape=(1, 6)):
    return build("PAD", 2, ("PadOptions", {}), [zeros(1, 4), constant(*amounts)], shape, GRID)


def tile(counts=(1, 3), shape=(1, 12)):
    return build("TILE", 2, ("TileOptions", {}), [zeros(1, 4), constant(*counts)], shape, GRID)


def strided_slice(strides=(1, 1)):
    operands = [zeros(1, 4), constant(0, 0), constant(1, 2), constant(*strides)]
    return build("STRIDED_SLICE", 2, ("StridedSliceOptions", {}), operands, (1, 2), GRID)


def reshape(dtype="int8"):
    return build("RESHAPE", 1, ("ReshapeOptions", {}), [zeros(1, 4), constant(4)], (4,), GRID, dtype)


def split(axis=None):
    axis = axis or Operand(np.array(1, np.int32), constant=True)
    return build("SPLIT", 2, ("SplitOptions", {"numSplits": 1}), [axis, zeros(1, 4)], (1, 4), GRID)


def quantize(given=GRID, out=GRID):
    return build("QUANTIZE", 2, ("QuantizeOptions", {}), [zeros(1, 4, grid=given)], (1, 4), out)


@pytest.mark.parametrize(
    "content",
    [
        *(add(), add(dtype="int16"), add((1e-3, 0), (1e3, 0), (1.0, 0)), convolution(), softmax(), resize(), pad()),
        *(tile(), strided_slice(), reshape(), split(), quantize(), quantize((1e-9, 0), (1e3, 0))),
    ],
)
def test_honest_operators_pass(content):
    assert flatbuffer.read(content).operators


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (add(left=None), "ADD computes with tensor 0 'x0', which is int8 and has no scale"),
        (add(out=None, dtype="int16"), "ADD computes with tensor 2 'y', which is int16 and has no scale"),
        (add(out=(1e-20, 0)), "no integer multiplier relates"),
        (add(out=(1e30, 0)), "no integer multiplier relates"),
        (quantize((1e-38, 0)), "no integer multiplier relates"),
        (convolution(strideH=0), "CONV_2D has stride_h 0, expected 1 to 32768"),
        (convolution(dilationWFactor=-1), "CONV_2D has dilation_w_factor -1"),
        (convolution(strideW=2**30), "CONV_2D has stride_w 1073741824"),
        (softmax(beta=0.0), "SOFTMAX has beta 0.0"),
        (softmax(beta=-1.0), "SOFTMAX has beta -1.0"),
        (softmax(beta=float("nan")), "SOFTMAX has beta nan"),
        (softmax(grid=(1e-20, 0)), "SOFTMAX has beta 1.0 and input scales"),
        (resize((2**24, 8)), "RESIZE_NEAREST_NEIGHBOR makes shape"),
        (pad(((0, 0), (0, 2**24))), "PAD makes shape"),
        (tile((1, 2**31 - 1)), "TILE makes shape"),
        (strided_slice((1,)), "STRIDED_SLICE has begin, end and strides of shapes"),
        (reshape("int16"), "RESHAPE makes int16 tensor 2 'y' of int8"),
        (split(zeros(1)), "SPLIT computes with int8 tensor 0 'x0', expected int32 or int64"),
    ],
)
def test_what_kernels_die_of(content, message):
    with pytest.raises(FlatbufferError, match=f"operator 0 {message}|{message}"):
        flatbuffer.read(content)


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (add(), lambda tensors, op: op.inputs.__setitem__(1, -1), "ADD lacks input 1"),
        (convolution(), lambda tensors, op: op.inputs.__setitem__(1, -1), "CONV_2D lacks input 1"),
        (strided_slice(), lambda tensors, op: setattr(op, "inputs", [0, 1, 2]), "has 3 inputs, expected at least 4"),
        (softmax(), lambda tensors, op: setattr(op, "inputs", []), "SOFTMAX has 0 inputs, expected at least 1"),
        (softmax(), lambda tensors, op: setattr(op, "builtinOptions", None), "SOFTMAX has beta None"),
        (
            add(),
            lambda tensors, op: setattr(tensors[2], "isVariable", True),
            "writes tensor 2 'y', which is a variable",
        ),
        (add(), lambda tensors, op: setattr(tensors[0], "shape", [1] * 9), "of rank 9, expected at most 8"),
        (add(), lambda tensors, op: setattr(tensors[0], "shape", [0, 4]), r"of shape \(0, 4\), which holds nothing"),
        (reshape(), lambda tensors, op: setattr(tensors[2], "type", schema.TensorType.RESOURCE), "makes resource"),
        (softmax(), lambda tensors, op: setattr(tensors[0], "type", schema.TensorType.FLOAT32), "of float32"),
        (
            add(),
            lambda tensors, op: vars(tensors[0].quantization).update(
                scale=[0.1] * 4, zeroPoint=[0] * 4, quantizedDimension=1
            ),
            "which has 4 scales, expected one",
        ),
    ],
)
def test_what_kernels_die_of_after_a_change(content, change, message):
    with pytest.raises(FlatbufferError, match=message):
        flatbuffer.read(edited(content, lambda tensors, op: (listed(op), change(tensors, op))))


def listed(op):
    op.inputs = list(op.inputs)


def test_a_bias_may_be_absent():
    def change(tensors, op):
        op.inputs = [*op.inputs, -1]

    assert flatbuffer.read(edited(convolution(), change)).operators[0].inputs == (0, 1, -1)
