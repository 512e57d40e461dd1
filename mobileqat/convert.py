"""Writes the `.tflite` file straight from the plan: `convert` for a quantized model, `convert_float` for a float one.

One operator of the plan is one operator of the file, and one tensor of the plan one tensor with the same name.  The
weights, biases and scales are the ones that the simulation computes with, so the file holds the trained integers by
construction, and nothing can leave a float island or shape arithmetic behind.  `convert_float` goes through
TensorFlow's own converter, which is what a float model ships with today.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from mobileqat import kernels
from mobileqat.errors import CalibrationError, MobileQatError, ModelError
from mobileqat.fakequant import FakeQuantize
from mobileqat.flatbuffer import AlignedBuffer
from mobileqat.models import check_finite_weights
from mobileqat.numerics import smallest_scale
from mobileqat.operands import SMALLEST_STEEPNESS
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import CONSTANT, GONE
from mobileqat.wrappers import QuantizeWrapper

DTYPES = {
    np.dtype("float32"): schema.TensorType.FLOAT32,
    np.dtype("int8"): schema.TensorType.INT8,
    np.dtype("uint8"): schema.TensorType.UINT8,
    np.dtype("int16"): schema.TensorType.INT16,
    np.dtype("int32"): schema.TensorType.INT32,
    np.dtype("int64"): schema.TensorType.INT64,
}
# Types of a file's inputs and outputs by bits of the activations; "auto" is the first.
IO_TYPES = {8: ("int8", "uint8", "float32"), 16: ("int16", "float32")}


def _transpose_conv_kernel(kernel: np.ndarray, layer) -> np.ndarray:
    """[H, W, O, I] to [O, H, W, I], filled up with zeros to the stride: XNNPACK refuses a kernel smaller than that."""
    missing = [(0, max(stride - size, 0)) for stride, size in zip(layer.strides, kernel.shape, strict=False)]
    return np.pad(kernel, (*missing, (0, 0), (0, 0))).transpose(2, 0, 1, 3)


# From Keras's kernel layout to the runtime's, and the axis of the output channels there.
KERNEL_LAYOUTS: dict[str, tuple[Callable[[np.ndarray, Any], np.ndarray], int]] = {
    "CONV_2D": (lambda kernel, layer: kernel.transpose(3, 0, 1, 2), 0),
    "DEPTHWISE_CONV_2D": (lambda kernel, layer: kernel.reshape(1, *kernel.shape[:2], -1), 3),
    "TRANSPOSE_CONV": (_transpose_conv_kernel, 0),
    "FULLY_CONNECTED": (lambda kernel, layer: kernel.transpose(), 0),
}


def convert(
    model: QuantizedModel, *, input_type: str = "auto", output_type: str = "auto", batch_size: int = 1
) -> bytes:
    """Converts a quantized model to an integer flatbuffer.

    Args:
        model: made by `quantize_model`, calibrated or trained.
        input_type: "auto" for the activations' own type, int8 or int16; "float32", or for int8 "uint8", adds one
            QUANTIZE operator at the input.
        output_type: likewise at the output.
        batch_size: static size of the batch axis.

    Returns:
        The file's bytes.

    Raises:
        CalibrationError: ranges that are missing, collapsed or not finite.
        ModelError: weights that are not finite.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"Expected a model made by quantize_model. Received: {type(model).__name__} '{model.name}'. Use "
            "convert_float for a float model."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise MobileQatError(f"batch_size must be a whole number of at least 1. Received: {batch_size!r}")
    types = {role: _io_type(model, role, value) for role, value in (("input", input_type), ("output", output_type))}
    check_finite_weights(model)
    check_ranges(model)
    return _Writer(model, batch_size).write(types["input"], types["output"])


def _io_type(model: QuantizedModel, role: str, value: str) -> np.dtype:
    scheme = model.plan.scheme
    known = IO_TYPES[scheme.activations.bits]
    if value not in ("auto", *known):
        raise MobileQatError(
            f"{role}_type must be one of auto, {', '.join(known)} for scheme '{scheme.name}'. Received: {value!r}"
        )
    return np.dtype(known[0] if value == "auto" else value)


def convert_float(model: keras.Model, *, batch_size: int = 1, input_shape: Sequence[int] | None = None) -> bytes:
    """Converts a float Keras model with TensorFlow's converter, at static sizes so that no shape is computed.

    Args:
        model: functional, sequential, or subclassed and called before.
        batch_size: size of the batch axis.
        input_shape: shape of the only input without the batch, for a model that leaves sizes open.
    """
    check_finite_weights(model)
    specs = [
        tf.TensorSpec((batch_size, *(input_shape or t.shape[1:])), t.dtype, t._keras_history.operation.name)
        for t in model.inputs
    ]
    function = tf.function(lambda *inputs: model(inputs if len(inputs) > 1 else inputs[0], training=False))
    concrete = function.get_concrete_function(*specs)
    # With the function as the trackable object the converter freezes its variables; with the model it does not.
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], function).convert()


def check_ranges(model: QuantizedModel) -> None:
    """Raises CalibrationError when an activation range is missing, collapsed or not finite."""
    if missing := model.unobserved():
        raise CalibrationError(
            f"Model '{model.name}' has {len(missing)} activation tensors whose range never moved: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Run mobileqat.calibrate(model, data), or "
            "train for at least one step."
        )
    betas = {
        wrapper.operator.inputs[0]: wrapper.layer.options.get("beta", 1.0)
        for wrapper in model.operators.values()
        if wrapper.operator.kind == "SOFTMAX"
    }
    for name, quantizer in model.quantizers.items():
        ranges = quantizer.ranges()
        if not np.isfinite(ranges).all():
            raise CalibrationError(
                f"The range of activation tensor '{name}' is {ranges.tolist()}. Expected finite numbers: the "
                "calibration data or the model's weights hold NaN or infinity."
            )
        if not quantizer.is_learned or model.plan.is_constant(name):
            continue
        scale = quantizer.grid()[0]
        if scale <= smallest_scale(quantizer.spec) or scale * betas.get(name, np.inf) <= SMALLEST_STEEPNESS:
            raise CalibrationError(
                f"The range of activation tensor '{name}' has collapsed to zero: {ranges.tolist()}. Calibrate "
                "on data the model reacts to, or remove the dead layer."
            )


# ------------------------------------------------------------------ the file


@dataclass(frozen=True)
class _Quantization:
    """What a tensor's quantization fields say; arrays of one entry for per-tensor."""

    scales: np.ndarray
    zero_points: np.ndarray
    axis: int = 0


class _Writer:
    """Collects tensors, buffers and operators of one subgraph."""

    def __init__(self, model: QuantizedModel, batch_size: int):
        self.model = model
        self.plan = model.plan
        self.batch_size = batch_size
        self.integer = np.dtype(f"int{model.plan.scheme.activations.bits}")
        self.tensors: list[schema.TensorT] = []
        self.buffers = [AlignedBuffer()]  # buffer 0 is empty by convention
        self._buffers: dict[bytes, int] = {}
        self.operators: list[schema.OperatorT] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.quantizers = model.quantizers
        self._stored: dict[str, int] = {}
        self._float: dict[str, int] = {}

    # -------------------------------------------------------------- tensors

    def tensor(self, name: str, shape, dtype, quantization: _Quantization | None = None, content=None) -> int:
        tensor = schema.TensorT()
        tensor.name = name
        tensor.shape = np.asarray(shape, np.int32)
        tensor.type = schema.TensorType.INT4 if dtype == "int4" else DTYPES[np.dtype(dtype)]
        tensor.hasRank = True
        if quantization is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.asarray(quantization.scales, np.float32)
            tensor.quantization.zeroPoint = np.asarray(quantization.zero_points, np.int64)
            tensor.quantization.quantizedDimension = quantization.axis
        if content is not None:
            # A layer that is called several times stores its kernel once.
            tensor.buffer = self._buffers.setdefault(content, len(self.buffers))
            if tensor.buffer == len(self.buffers):
                self.buffers.append(AlignedBuffer(content))
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, array: np.ndarray, quantization: _Quantization | None = None) -> int:
        array = np.ascontiguousarray(array)
        return self.tensor(
            name,
            array.shape,
            array.dtype,
            quantization,
            array.astype(array.dtype.newbyteorder("<")).tobytes(),
        )

    def constant_int4(self, name: str, array: np.ndarray, quantization: _Quantization) -> int:
        """Integers in [-8, 7], two in a byte, the first in the lower half."""
        nibbles = np.append(array.astype(np.int8).reshape(-1), np.zeros(array.size % 2, np.int8)).view(np.uint8) & 15
        content = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
        return self.tensor(name, array.shape, "int4", quantization, content)

    def shape(self, name: str) -> tuple[int, ...]:
        planned = self.plan.tensors[name]
        return (self.batch_size, *planned.shape) if planned.has_batch else planned.shape

    def quantization(self, quantizer: FakeQuantize) -> _Quantization:
        scale, zero_point = quantizer.grid()
        return _Quantization(np.array([scale]), np.array([zero_point]))

    def activation(self, name: str, in_float: bool) -> int:
        """The tensor of the plan in the form its reader needs; a conversion is written where the two differ."""
        if self.plan.tensors[name].dtype == "int32":
            return self._stored[name]
        if in_float and name not in self._float:
            self._float[name] = self.tensor(f"{name}/float32", self.shape(name), np.float32)
            self.operator("DEQUANTIZE", [self._stored[name]], self._float[name], version=2)
        return self._float[name] if in_float else self._stored[name]

    def declare(self, name: str, in_float: bool) -> int:
        """Makes a tensor that the next operator fills, in float or in the plan's integers."""
        if self.plan.tensors[name].dtype == "int32":
            self._stored[name] = self.tensor(name, self.shape(name), np.int32)
            return self._stored[name]
        quantizer = self.quantizers.get(name)
        if in_float:
            suffix = "/float32" if quantizer else ""
            self._float[name] = self.tensor(name + suffix, self.shape(name), np.float32)
            return self._float[name]
        assert quantizer is not None
        self._stored[name] = self.tensor(name, self.shape(name), self.integer, self.quantization(quantizer))
        return self._stored[name]

    # -------------------------------------------------------------- operators

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: Any = None, version: int = 1) -> None:
        if any(self.tensors[index].type == schema.TensorType.INT16 for index in (*inputs, output)):
            version = max(version, INT16_VERSIONS.get(kind, 1))
        operator = schema.OperatorT()
        operator.opcodeIndex = self.codes.setdefault((kind, version), len(self.codes))
        operator.inputs = np.asarray(inputs, np.int32)
        operator.outputs = np.asarray([output], np.int32)
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(operator)

    def write(self, input_type: np.dtype, output_type: np.dtype) -> bytes:
        inputs = [self._write_input(name, input_type) for name in self.plan.inputs]
        for wrapper in self.model.operators.values():
            operator = wrapper.operator
            if operator.kind == GONE:
                for forms in (self._stored, self._float):
                    if operator.inputs[0] in forms:
                        forms[operator.output] = forms[operator.inputs[0]]
            elif operator.kind == CONSTANT:
                self._write_constant(wrapper)
            else:
                self._write_operator(wrapper)
        outputs = [self._write_output(name, output_type) for name in self.plan.outputs]
        return self._pack(inputs, outputs)

    def _write_input(self, name: str, dtype: np.dtype) -> int:
        if self.plan.tensors[name].dtype == "int32":
            return self.declare(name, in_float=False)
        if name not in self.quantizers:
            if self.plan.tensors[name].spec is None:
                return self.declare(name, in_float=True)
            # No operator reads it; any grid will do.
            return self.tensor(name, self.shape(name), self.integer, _Quantization(np.ones(1), np.zeros(1)))
        if dtype == self.integer:
            return self.declare(name, in_float=False)
        outer = self._boundary(name, dtype)
        self.operator("QUANTIZE", [outer], self.declare(name, in_float=False))
        return outer

    def _boundary(self, name: str, dtype: np.dtype) -> int:
        """A model input or output in another type than the plan's; uint8 holds the same grid moved by 128."""
        quantization = None
        if dtype == np.uint8:
            inner = self.quantization(self.quantizers[name])
            quantization = _Quantization(inner.scales, inner.zero_points + 128)
        return self.tensor(f"{name}/{dtype.name}", self.shape(name), dtype, quantization)

    def _write_output(self, name: str, dtype: np.dtype) -> int:
        if name not in self.quantizers:
            return self.activation(name, in_float=True)
        if dtype == self.integer:
            return self.activation(name, in_float=False)
        if dtype == np.float32:
            return self.activation(name, in_float=True)
        outer = self._boundary(name, dtype)
        self.operator("QUANTIZE", [self.activation(name, in_float=False)], outer)
        return outer

    def _write_constant(self, wrapper: QuantizeWrapper) -> None:
        """A constant operand; one that is repeated for every sample is stored so."""
        name = wrapper.operator.output
        value = wrapper.constant()
        if self.plan.tensors[name].has_batch:
            value = np.repeat(value, self.batch_size, axis=0)
        quantizer = self.quantizers.get(name)
        index = self.constant(name, value, quantizer and self.quantization(quantizer))
        forms = self._float if value.dtype == np.float32 else self._stored
        forms[name] = index

    def _write_operator(self, wrapper: QuantizeWrapper) -> None:
        operator = wrapper.operator
        in_float = not operator.quantized
        inputs = [self.activation(name, in_float) for name in operator.inputs]
        output = self.declare(operator.output, in_float)
        if not in_float and operator.kind in ("ADD", "SUB", "MUL"):
            self._check_scales(wrapper)
        _EMITTERS[operator.kind](self, wrapper, inputs, output)
        if in_float and operator.output in self.quantizers:
            self.operator("QUANTIZE", [output], self.declare(operator.output, in_float=False))
            # Later readers in float get the rounded values, as they do in the simulation.
            del self._float[operator.output]

    def _check_scales(self, wrapper: QuantizeWrapper) -> None:
        scales = np.array([self.quantizers[name].grid()[0] for name in wrapper.operator.inputs])
        self.check_ratio(wrapper, np.prod(scales) if wrapper.operator.kind == "MUL" else np.max(scales))

    def weights(self, wrapper: QuantizeWrapper) -> list[int]:
        """The kernel in the runtime's layout and the bias, as constants named after the layer."""
        name = wrapper.operator.name
        layout, axis = KERNEL_LAYOUTS[wrapper.operator.kind]
        if not wrapper.operator.quantized:
            kernel, bias = wrapper.float_constants()
            return [self.constant(f"{name}/kernel", layout(kernel, wrapper.layer)), self.constant(f"{name}/bias", bias)]
        constants = wrapper.constants()
        input_scale = wrapper.input_scale()
        scales = constants["scales"]
        self.check_ratio(wrapper, input_scale * scales)
        zeros = np.zeros(scales.shape, np.int64)
        weights = layout(constants["weights"], wrapper.layer)
        store = self.constant_int4 if wrapper.operator.storage_bits == 4 else self.constant
        return [
            store(f"{name}/kernel", weights, _Quantization(scales, zeros, axis)),
            self.constant(f"{name}/bias", constants["bias"], _Quantization(input_scale * scales, zeros)),
        ]

    def check_ratio(self, wrapper: QuantizeWrapper, accumulator_scales: np.ndarray) -> None:
        """XNNPACK refuses accumulators that are coarser than the output by 256 or more; int16 kernels overflow."""
        name = wrapper.operator.output
        limit = 256 if self.integer == np.int8 else 1 if wrapper.operator.kind == "MUL" else 128
        ratio = float(np.max(accumulator_scales / self.quantizers[name].grid()[0]))
        if ratio >= limit:
            raise CalibrationError(
                f"The range of activation tensor '{name}' is too narrow for what makes it: one step of the products is "
                f"{ratio:.0f} steps of the output, and the runtime takes less than {limit}. The layer is almost dead "
                "on the calibration data; calibrate on other data, or remove it."
            )

    def integers(self, wrapper: QuantizeWrapper, role: str, values) -> int:
        return self.constant(f"{wrapper.operator.name}/{role}", np.asarray(values, np.int32))

    # -------------------------------------------------------------- packing

    def _pack(self, inputs: list[int], outputs: list[int]) -> bytes:
        subgraph = schema.SubGraphT()
        subgraph.name = "main"
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs = [_tensor_map(name, index) for name, index in zip(self.plan.inputs, inputs, strict=True)]
        signature.outputs = [_tensor_map(name, index) for name, index in zip(self.plan.outputs, outputs, strict=True)]
        file = schema.ModelT()
        file.version = 3
        file.description = f"mobileqat {self.plan.scheme.name}"
        file.operatorCodes = [_operator_code(kind, version) for kind, version in self.codes]
        file.subgraphs, file.buffers, file.signatureDefs = [subgraph], self.buffers, [signature]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(file.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _tensor_map(name: str, index: int) -> schema.TensorMapT:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry


def _operator_code(kind: str, version: int) -> schema.OperatorCodeT:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    # Readers older than the 32-bit field look at the 8-bit one.
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = version
    return code


# ------------------------------------------------------------------ one row per operator
#
# Each emitter writes the operator that computes a tensor of the plan, with the lowest kernel version that takes it.

# The versions that brought int16 activations.
INT16_VERSIONS = {
    "CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7, "BATCH_MATMUL": 3, "ADD": 3, "SUB": 5, "MUL": 4,
    "MAXIMUM": 4, "MINIMUM": 4, "CONCATENATION": 3, "MAX_POOL_2D": 3, "AVERAGE_POOL_2D": 3, "MEAN": 3, "REDUCE_MAX": 3,
    "REDUCE_MIN": 3, "PAD": 3, "MIRROR_PAD": 3, "TRANSPOSE": 5, "GATHER": 4, "RESIZE_NEAREST_NEIGHBOR": 4,
    "RESIZE_BILINEAR": 4, "QUANTIZE": 2, "DEQUANTIZE": 3, "RELU": 3, "RELU6": 3, "LEAKY_RELU": 2, "ABS": 3, "RSQRT": 3,
    "LOGISTIC": 3, "TANH": 3, "SOFTMAX": 3,
}  # fmt: skip

Emitter = Callable[[_Writer, QuantizeWrapper, "list[int]", int], None]


def _options(name: str, **fields):
    options = getattr(schema, f"{name}OptionsT")()
    for field, value in fields.items():
        assert hasattr(options, field), field
        setattr(options, field, value)
    return options


def _fused(wrapper: QuantizeWrapper) -> int:
    return getattr(schema.ActivationFunctionType, wrapper.operator.fused_activation)


def _window(wrapper: QuantizeWrapper, strides, padding: str) -> dict[str, int]:
    return {
        "padding": schema.Padding.SAME if padding == "same" else schema.Padding.VALID,
        "fusedActivationFunction": _fused(wrapper),
        "strideH": strides[0],
        "strideW": strides[1],
    }


def _layer_window(wrapper: QuantizeWrapper) -> dict[str, int]:
    return _window(wrapper, wrapper.layer.strides, wrapper.layer.padding)


def _dilation(layer) -> dict[str, int]:
    return {"dilationHFactor": layer.dilation_rate[0], "dilationWFactor": layer.dilation_rate[1]}


def _conv_2d(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    options = _options("Conv2D", **_layer_window(wrapper), **_dilation(wrapper.layer))
    version = 3 if wrapper.layer.groups == 1 else 6
    writer.operator("CONV_2D", [*inputs, *writer.weights(wrapper)], output, options, version)


def _depthwise_conv_2d(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    multiplier = {"depthMultiplier": wrapper.layer.depth_multiplier}
    options = _options("DepthwiseConv2D", **multiplier, **_layer_window(wrapper), **_dilation(wrapper.layer))
    writer.operator("DEPTHWISE_CONV_2D", [*inputs, *writer.weights(wrapper)], output, options, 3)


def _transpose_conv(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    kernel, bias = writer.weights(wrapper)
    shape = writer.integers(wrapper, "output_shape", writer.shape(wrapper.operator.output))
    # Version 4 brought the fused activation; version 3 the bias.
    version = 3 if wrapper.operator.fused_activation == "NONE" else 4
    options = _options("TransposeConv", **_layer_window(wrapper))
    writer.operator("TRANSPOSE_CONV", [shape, kernel, *inputs, bias], output, options, version)


def _fully_connected(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    keep = len(writer.shape(wrapper.operator.output)) > 2
    options = _options("FullyConnected", fusedActivationFunction=_fused(wrapper), keepNumDims=keep)
    writer.operator("FULLY_CONNECTED", [*inputs, *writer.weights(wrapper)], output, options, 5 if keep else 4)


def _pool_2d(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    settings = wrapper.layer.options
    height, width = settings["pool_size"]
    window = _window(wrapper, settings["strides"], settings["padding"])
    options = _options("Pool2D", filterHeight=height, filterWidth=width, **window)
    writer.operator(wrapper.operator.kind, inputs, output, options, 2)


def _reduce(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    settings = wrapper.layer.options
    options = _options("Reducer", keepDims=settings["keepdims"])
    axes = writer.integers(wrapper, "axes", settings["axes"])
    writer.operator(wrapper.operator.kind, [*inputs, axes], output, options, 2)


def _batch_matmul(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    settings = wrapper.layer.options
    options = _options("BatchMatMul", adjX=settings["adj_x"], adjY=settings["adj_y"])
    writer.operator("BATCH_MATMUL", inputs, output, options, 2)


def _concatenation(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    options = _options("Concatenation", axis=wrapper.layer.options["axis"])
    writer.operator("CONCATENATION", inputs, output, options, 2)


def _paddings(writer: _Writer, wrapper: QuantizeWrapper) -> int:
    return writer.integers(wrapper, "paddings", [(0, 0), *wrapper.layer.options["paddings"]])


def _rank_version(writer: _Writer, wrapper: QuantizeWrapper, up_to_4: int, beyond: int) -> int:
    ranks = [len(writer.shape(name)) for name in (*wrapper.operator.inputs, wrapper.operator.output)]
    return up_to_4 if max(ranks) <= 4 else beyond


def _pad(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    version = _rank_version(writer, wrapper, 2, 4)
    writer.operator("PAD", [*inputs, _paddings(writer, wrapper)], output, _options("Pad"), version)


def _mirror_pad(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    mode = getattr(schema.MirrorPadMode, wrapper.layer.options["mode"].upper())
    writer.operator("MIRROR_PAD", [*inputs, _paddings(writer, wrapper)], output, _options("MirrorPad", mode=mode), 2)


def _strided_slice(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    settings = wrapper.layer.options
    batch = {"begin": 0, "end": writer.batch_size, "strides": 1}
    operands = [writer.integers(wrapper, role, (first, *settings[role])) for role, first in batch.items()]
    version = _rank_version(writer, wrapper, 2, 4)
    writer.operator("STRIDED_SLICE", [*inputs, *operands], output, _options("StridedSlice"), version)


def _reshape(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    shape = writer.shape(wrapper.operator.output)
    options = _options("Reshape", newShape=np.asarray(shape, np.int32))
    writer.operator("RESHAPE", [*inputs, writer.integers(wrapper, "shape", shape)], output, options)


def _transpose(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    permutation = wrapper.layer.options["permutation"]
    version = {5: 4, 6: 6}.get(len(permutation), 2)
    operand = writer.integers(wrapper, "permutation", permutation)
    writer.operator("TRANSPOSE", [*inputs, operand], output, _options("Transpose"), version)


def _tile(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    multiples = writer.integers(wrapper, "multiples", (1, *wrapper.layer.options["multiples"]))
    writer.operator("TILE", [*inputs, multiples], output, _options("Tile"), 3)


def _gather(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    writer.operator("GATHER", inputs, output, _options("Gather", axis=wrapper.layer.options["axis"]), 2)


def _resize(name: str) -> Emitter:
    def emit(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
        size = writer.integers(wrapper, "size", wrapper.layer.options["size"])
        options = _options(name, halfPixelCenters=True)
        writer.operator(wrapper.operator.kind, [*inputs, size], output, options, 3)

    return emit


def _table(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    """A function that the runtime lacks: look each byte up in a table of 256.

    CAST to uint8 wraps, so -128 .. -1 become 128 .. 255, and the table is stored in that order.
    """
    name = wrapper.operator.output
    source, target = wrapper.input_quantizers[0], wrapper.output_quantizer
    assert source is not None and target is not None
    every = tf.range(-128, 128, dtype=tf.float32)
    grids = wrapper.grid(source), wrapper.grid(target)
    values = kernels.KERNELS["TABLE"](wrapper.layer, [every], grids[:1], grids[1], "NONE").numpy()
    quantization = writer.quantization(target)
    table = writer.constant(f"{name}/table", np.roll(values, 128).astype(np.int8), quantization)
    shape = writer.shape(name)
    bytes_, indices = (writer.tensor(f"{name}/{dtype}", shape, dtype) for dtype in ("uint8", "int32"))
    writer.operator("CAST", inputs, bytes_, _cast("INT8", "UINT8"), 3)
    writer.operator("CAST", [bytes_], indices, _cast("UINT8", "INT32"), 3)
    writer.operator("GATHER", [table, indices], output, _options("Gather", axis=0), 2)


def _rsqrt(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
    """On integers the epsilon is far below a step, and the kernel saturates at 0; in float it is an ADD."""
    name, epsilon = wrapper.operator.output, wrapper.layer.options.get("epsilon", 0.0)
    if not wrapper.operator.quantized and epsilon:
        constant = writer.constant(f"{name}/epsilon", np.array([epsilon], np.float32))
        shifted = writer.tensor(f"{name}/shifted", writer.shape(name), np.float32)
        writer.operator("ADD", [*inputs, constant], shifted, _options("Add"))
        inputs = [shifted]
    writer.operator("RSQRT", inputs, output, None, 2)


def _cast(from_type: str, to_type: str):
    types = (getattr(schema.TensorType, name) for name in (from_type, to_type))
    return _options("Cast", **dict(zip(("inDataType", "outDataType"), types, strict=True)))


def _plain(name: str | None, version: int, beyond_rank_4: int | None = None, **fields: Callable) -> Emitter:
    """An operator without operands of its own; `fields` compute its options from the wrapper."""

    def emit(writer: _Writer, wrapper: QuantizeWrapper, inputs, output) -> None:
        options = _options(name, **{field: value(wrapper) for field, value in fields.items()}) if name else None
        chosen = _rank_version(writer, wrapper, version, beyond_rank_4 or version)
        writer.operator(wrapper.operator.kind, inputs, output, options, chosen)

    return emit


def _assumes_powers_of_two(wrapper: QuantizeWrapper) -> bool:
    """The schema's default for the scales of int16 sums, which ours are not."""
    return wrapper.output_quantizer is None or wrapper.bits == 8


def _setting(key: str, default=None) -> Callable[[QuantizeWrapper], Any]:
    return lambda wrapper: wrapper.layer.options.get(key, default)


_EMITTERS: dict[str, Emitter] = {
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _fully_connected,
    "BATCH_MATMUL": _batch_matmul,
    "ADD": _plain("Add", 2, fusedActivationFunction=_fused, potScaleInt16=_assumes_powers_of_two),
    "SUB": _plain("Sub", 2, 3, fusedActivationFunction=_fused, potScaleInt16=_assumes_powers_of_two),
    "MUL": _plain("Mul", 2, fusedActivationFunction=_fused),
    "MAXIMUM": _plain("MaximumMinimum", 2, 3),
    "MINIMUM": _plain("MaximumMinimum", 2, 3),
    "CONCATENATION": _concatenation,
    "MAX_POOL_2D": _pool_2d,
    "AVERAGE_POOL_2D": _pool_2d,
    "MEAN": _reduce,
    "SUM": _reduce,
    "REDUCE_MAX": _reduce,
    "REDUCE_MIN": _reduce,
    "PAD": _pad,
    "MIRROR_PAD": _mirror_pad,
    "STRIDED_SLICE": _strided_slice,
    "RESHAPE": _reshape,
    "TRANSPOSE": _transpose,
    "TILE": _tile,
    "GATHER": _gather,
    "SPACE_TO_DEPTH": _plain("SpaceToDepth", 2, blockSize=_setting("block_size")),
    "DEPTH_TO_SPACE": _plain("DepthToSpace", 2, blockSize=_setting("block_size")),
    "RESIZE_NEAREST_NEIGHBOR": _resize("ResizeNearestNeighbor"),
    "RESIZE_BILINEAR": _resize("ResizeBilinear"),
    "QUANTIZE": _plain(None, 1),
    "RELU": _plain(None, 2),
    "RELU6": _plain(None, 2),
    "LEAKY_RELU": _plain("LeakyRelu", 1, alpha=_setting("alpha")),
    "PRELU": _plain(None, 1),
    "ELU": _plain(None, 1),
    "GELU": _plain("Gelu", 2, approximate=_setting("approximate")),
    "HARD_SWISH": _plain(None, 1),
    "ABS": _plain("Abs", 2),
    "EXP": _plain("Exp", 2),
    "LOG": _plain(None, 2),
    "RSQRT": _rsqrt,
    "TABLE": _table,
    "LOGISTIC": _plain(None, 2),
    "TANH": _plain(None, 2),
    "SOFTMAX": _plain("Softmax", 2, beta=_setting("beta", 1.0)),
    "L2_NORMALIZATION": _plain("L2Norm", 2),
}
