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
from ai_edge_litert import schema_py_generated as schema

from mobileqat import kernels
from mobileqat.errors import CalibrationError, MobileQatError, ModelError
from mobileqat.fakequant import FakeQuantize
from mobileqat.models import check_finite_weights
from mobileqat.numerics import SMALLEST_SCALE
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import GONE
from mobileqat.wrappers import QuantizeWrapper

DTYPES = {
    np.dtype("float32"): schema.TensorType.FLOAT32,
    np.dtype("int8"): schema.TensorType.INT8,
    np.dtype("uint8"): schema.TensorType.UINT8,
    np.dtype("int32"): schema.TensorType.INT32,
}
IO_TYPES = ("int8", "uint8", "float32")


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
    model: QuantizedModel, *, input_type: str = "int8", output_type: str = "int8", batch_size: int = 1
) -> bytes:
    """Converts a quantized model to an integer flatbuffer.

    Args:
        model: made by `quantize_model`, calibrated or trained.
        input_type: "int8", "uint8" or "float32"; the last two add one QUANTIZE operator at the input.
        output_type: likewise at the output.
        batch_size: static size of the batch axis.

    Returns:
        The file's bytes.

    Raises:
        CalibrationError: ranges that are missing, collapsed or not finite.
        ModelError: weights that are not finite.
    """
    for role, value in (("input_type", input_type), ("output_type", output_type)):
        if value not in IO_TYPES:
            raise MobileQatError(f"{role} must be one of {', '.join(IO_TYPES)}. Received: {value!r}")
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"Expected a model made by quantize_model. Received: {type(model).__name__} '{model.name}'. Use "
            "convert_float for a float model."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise MobileQatError(f"batch_size must be a whole number of at least 1. Received: {batch_size!r}")
    check_finite_weights(model)
    check_ranges(model)
    return _Writer(model, batch_size).write(np.dtype(input_type), np.dtype(output_type))


def convert_float(model: keras.Model, *, batch_size: int = 1) -> bytes:
    """Converts a float Keras model with TensorFlow's converter, with a static batch so that no shape is computed."""
    import tensorflow as tf

    check_finite_weights(model)
    specs = [tf.TensorSpec((batch_size, *t.shape[1:]), t.dtype, t._keras_history.operation.name) for t in model.inputs]
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
    for name, quantizer in model.quantizers.items():
        ranges = quantizer.ranges()
        if not np.isfinite(ranges).all():
            raise CalibrationError(
                f"The range of activation tensor '{name}' is {ranges.tolist()}. Expected finite numbers: the "
                "calibration data or the model's weights hold NaN or infinity."
            )
        if quantizer.is_learned and quantizer.grid()[0] <= SMALLEST_SCALE:
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


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16, as the schema demands (`force_align`)."""

    def __init__(self, content: bytes | None = None):
        super().__init__()
        self.content = content

    def Pack(self, builder):
        offset = None
        if self.content:
            builder.Prep(16, len(self.content))
            offset = builder.CreateByteVector(self.content)
        schema.BufferStart(builder)
        if offset is not None:
            schema.BufferAddData(builder, offset)
        return schema.BufferEnd(builder)


class _Writer:
    """Collects tensors, buffers and operators of one subgraph."""

    def __init__(self, model: QuantizedModel, batch_size: int):
        self.model = model
        self.plan = model.plan
        self.batch_size = batch_size
        self.tensors: list[schema.TensorT] = []
        self.buffers = [_AlignedBuffer()]  # buffer 0 is empty by convention
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
        tensor.type = DTYPES[np.dtype(dtype)]
        tensor.hasRank = True
        if quantization is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.asarray(quantization.scales, np.float32)
            tensor.quantization.zeroPoint = np.asarray(quantization.zero_points, np.int64)
            tensor.quantization.quantizedDimension = quantization.axis
        if content is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(_AlignedBuffer(content))
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

    def shape(self, name: str) -> tuple[int, ...]:
        return (self.batch_size, *self.plan.tensors[name].shape)

    def quantization(self, quantizer: FakeQuantize) -> _Quantization:
        scale, zero_point = quantizer.grid()
        return _Quantization(np.array([scale]), np.array([zero_point]))

    def activation(self, name: str, in_float: bool) -> int:
        """The tensor of the plan in the form its reader needs; a conversion is written where the two differ."""
        if in_float and name not in self._float:
            self._float[name] = self.tensor(f"{name}/float32", self.shape(name), np.float32)
            self.operator("DEQUANTIZE", [self._stored[name]], self._float[name], version=2)
        return self._float[name] if in_float else self._stored[name]

    def declare(self, name: str, in_float: bool) -> int:
        """Makes a tensor that the next operator fills, in float or in the plan's integers."""
        quantizer = self.quantizers.get(name)
        if in_float:
            suffix = "/float32" if quantizer else ""
            self._float[name] = self.tensor(name + suffix, self.shape(name), np.float32)
            return self._float[name]
        assert quantizer is not None
        self._stored[name] = self.tensor(name, self.shape(name), np.int8, self.quantization(quantizer))
        return self._stored[name]

    # -------------------------------------------------------------- operators

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: Any = None, version: int = 1) -> None:
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
                continue
            self._write_operator(wrapper)
        outputs = [self._write_output(name, output_type) for name in self.plan.outputs]
        return self._pack(inputs, outputs)

    def _write_input(self, name: str, dtype: np.dtype) -> int:
        if name not in self.quantizers:
            return self.declare(name, in_float=True)
        if dtype == np.int8:
            return self.declare(name, in_float=False)
        outer = self._boundary(name, dtype)
        self.operator("QUANTIZE", [outer], self.declare(name, in_float=False))
        return outer

    def _boundary(self, name: str, dtype: np.dtype) -> int:
        """A model input or output in another type than int8; uint8 holds the same grid moved by 128."""
        quantization = None
        if dtype == np.uint8:
            inner = self.quantization(self.quantizers[name])
            quantization = _Quantization(inner.scales, inner.zero_points + 128)
        return self.tensor(f"{name}/{dtype.name}", self.shape(name), dtype, quantization)

    def _write_output(self, name: str, dtype: np.dtype) -> int:
        if name not in self.quantizers:
            return self.activation(name, in_float=True)
        if dtype == np.int8:
            return self.activation(name, in_float=False)
        if dtype == np.float32:
            return self.activation(name, in_float=True)
        outer = self._boundary(name, dtype)
        self.operator("QUANTIZE", [self.activation(name, in_float=False)], outer)
        return outer

    def _write_operator(self, wrapper: QuantizeWrapper) -> None:
        operator = wrapper.operator
        in_float = not operator.quantized
        inputs = [self.activation(name, in_float) for name in operator.inputs]
        output = self.declare(operator.output, in_float)
        options, constants, version = _EMITTERS[operator.kind](self, wrapper)
        if "x" in constants:  # operands around the input, such as TRANSPOSE_CONV's
            inputs = [inputs[0] if index == "x" else index for index in constants]
        else:
            inputs = [*inputs, *constants]
        self.operator(operator.kind, inputs, output, options, version)
        if in_float and operator.output in self.quantizers:
            self.operator("QUANTIZE", [output], self.declare(operator.output, in_float=False))
            # Later readers in float get the rounded values, as they do in the simulation.
            del self._float[operator.output]

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
        return [
            self.constant(
                f"{name}/kernel", layout(constants["weights"], wrapper.layer), _Quantization(scales, zeros, axis)
            ),
            self.constant(f"{name}/bias", constants["bias"], _Quantization(input_scale * scales, zeros)),
        ]

    def check_ratio(self, wrapper: QuantizeWrapper, accumulator_scales: np.ndarray) -> None:
        """XNNPACK refuses accumulators that are coarser than the output by 256 or more."""
        name = wrapper.operator.output
        ratio = float(np.max(accumulator_scales / self.quantizers[name].grid()[0]))
        if ratio >= 256:
            raise CalibrationError(
                f"The range of activation tensor '{name}' is too narrow for what makes it: one step of the products is "
                f"{ratio:.0f} steps of the output, and the runtime takes less than 256. The layer is almost dead on "
                "the calibration data; calibrate on other data, or remove it."
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
# Each emitter returns the operator's options, its constant operands, and the lowest kernel version that takes them.

Emitted = tuple[Any, list, int]


def _options(name: str, **fields):
    options = getattr(schema, f"{name}OptionsT")()
    for field, value in fields.items():
        assert hasattr(options, field), field
        setattr(options, field, value)
    return options


def _padding(layer) -> int:
    return schema.Padding.SAME if layer.padding == "same" else schema.Padding.VALID


def _fused(wrapper: QuantizeWrapper) -> int:
    return getattr(schema.ActivationFunctionType, wrapper.operator.fused_activation)


def _strides(layer) -> dict[str, int]:
    return {"strideH": layer.strides[0], "strideW": layer.strides[1]}


def _window(wrapper: QuantizeWrapper) -> dict[str, int]:
    layer = wrapper.layer
    return {"padding": _padding(layer), "fusedActivationFunction": _fused(wrapper)} | _strides(layer)


def _dilation(layer) -> dict[str, int]:
    return {"dilationHFactor": layer.dilation_rate[0], "dilationWFactor": layer.dilation_rate[1]}


def _conv_2d(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    constants = writer.weights(wrapper)
    version = 3 if wrapper.layer.groups == 1 else 6
    return _options("Conv2D", **_window(wrapper), **_dilation(wrapper.layer)), constants, version


def _depthwise_conv_2d(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    constants = writer.weights(wrapper)
    options = _options(
        "DepthwiseConv2D",
        depthMultiplier=wrapper.layer.depth_multiplier,
        **_window(wrapper),
        **_dilation(wrapper.layer),
    )
    return options, constants, 3


def _transpose_conv(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    kernel, bias = writer.weights(wrapper)
    shape = writer.integers(wrapper, "output_shape", writer.shape(wrapper.operator.output))
    # Version 4 brought the fused activation; version 3 the bias.
    version = 3 if wrapper.operator.fused_activation == "NONE" else 4
    return _options("TransposeConv", **_window(wrapper)), [shape, kernel, "x", bias], version


def _fully_connected(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    constants = writer.weights(wrapper)
    keep = len(writer.shape(wrapper.operator.output)) > 2
    options = _options("FullyConnected", fusedActivationFunction=_fused(wrapper), keepNumDims=keep)
    return options, constants, 5 if keep else 4


def _pool_2d(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    height, width = wrapper.layer.pool_size
    return _options("Pool2D", filterHeight=height, filterWidth=width, **_window(wrapper)), [], 2


def _reduce(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    options = _options("Reducer", keepDims=bool(wrapper.layer.keepdims))
    return options, [writer.integers(wrapper, "axes", [1, 2])], 2


def _concatenation(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    rank = len(writer.shape(wrapper.operator.output))
    return _options("Concatenation", axis=wrapper.layer.axis % rank), [], 2


def _pad(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    return (
        _options("Pad"),
        [writer.integers(wrapper, "paddings", [(0, 0), *wrapper.layer.padding, (0, 0)])],
        2,
    )


def _strided_slice(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    shape = writer.shape(wrapper.operator.inputs[0])
    (top, bottom), (left, right) = wrapper.layer.cropping
    begin, end = (0, top, left, 0), (shape[0], shape[1] - bottom, shape[2] - right, shape[3])
    operands = [("begin", begin), ("end", end), ("strides", (1, 1, 1, 1))]
    return _options("StridedSlice"), [writer.integers(wrapper, *operand) for operand in operands], 2


def _reshape(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    shape = writer.shape(wrapper.operator.output)
    return (
        _options("Reshape", newShape=np.asarray(shape, np.int32)),
        [writer.integers(wrapper, "shape", shape)],
        1,
    )


def _transpose(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    return _options("Transpose"), [writer.integers(wrapper, "permutation", (0, *wrapper.layer.dims))], 2


def _resize_to(writer: _Writer, wrapper: QuantizeWrapper) -> int:
    return writer.integers(wrapper, "size", writer.shape(wrapper.operator.output)[1:3])


def _resize_nearest(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    return _options("ResizeNearestNeighbor"), [_resize_to(writer, wrapper)], 2


def _resize_bilinear(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    return _options("ResizeBilinear", halfPixelCenters=True), [_resize_to(writer, wrapper)], 3


def _minimum(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
    name, maximum = f"{wrapper.operator.name}/maximum", wrapper.layer.maximum
    if not wrapper.operator.quantized:
        return _options("MaximumMinimum"), [writer.constant(name, np.array([maximum], np.float32))], 1
    quantizer = wrapper.output_quantizer
    assert quantizer is not None
    integer = kernels.quantized_constant(maximum, wrapper.grid(quantizer)).numpy()
    constant = writer.constant(name, np.array([integer], np.int8), writer.quantization(quantizer))
    return _options("MaximumMinimum"), [constant], 2


def _plain(name: str | None, version: int, **fields: Callable[[QuantizeWrapper], Any]):
    """An operator without constant operands; `fields` compute its options from the wrapper."""

    def emit(writer: _Writer, wrapper: QuantizeWrapper) -> Emitted:
        options = _options(name, **{field: value(wrapper) for field, value in fields.items()}) if name else None
        return options, [], version

    return emit


_EMITTERS: dict[str, Callable[[_Writer, QuantizeWrapper], Emitted]] = {
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "TRANSPOSE_CONV": _transpose_conv,
    "FULLY_CONNECTED": _fully_connected,
    "ADD": _plain("Add", 2, fusedActivationFunction=_fused),
    "MUL": _plain("Mul", 2, fusedActivationFunction=_fused),
    "CONCATENATION": _concatenation,
    "MAX_POOL_2D": _pool_2d,
    "AVERAGE_POOL_2D": _pool_2d,
    "MEAN": _reduce,
    "REDUCE_MAX": _reduce,
    "PAD": _pad,
    "STRIDED_SLICE": _strided_slice,
    "RESHAPE": _reshape,
    "TRANSPOSE": _transpose,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest,
    "RESIZE_BILINEAR": _resize_bilinear,
    "QUANTIZE": _plain(None, 1),
    "RELU": _plain(None, 2),
    "RELU6": _plain(None, 2),
    "MINIMUM": _minimum,
    "LEAKY_RELU": _plain("LeakyRelu", 1, alpha=lambda wrapper: float(wrapper.layer.negative_slope)),
    "SOFTMAX": _plain("Softmax", 2, beta=lambda wrapper: 1.0),
    "LOGISTIC": _plain(None, 2),
    "TANH": _plain(None, 2),
    "HARD_SWISH": _plain(None, 1),
}
