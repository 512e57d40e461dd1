"""What is inside a `.tflite` file: its tensors, operators and signatures, and whether it is fully integer.

Every offset and index is checked here, before any native code sees the file: a broken file is a
`FlatbufferError`, never a crash. Four functions share that reading: `read` gives the content as frozen
dataclasses, `inspect` judges it (the tensor types decide, never the converter's silence), `expose_tensors`
turns intermediate tensors into outputs, `single_operators` makes a model of each operator. Real values are
`scale * (stored - zero_point)`.
"""

import copy
import dataclasses
import functools
import graphlib
import importlib
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from mobileqat.errors import FlatbufferError, RuntimeUnavailableError
from mobileqat.operands import check_operator

_SCHEMA_MODULES = ("ai_edge_litert.schema_py_generated", "tensorflow.lite.python.schema_py_generated")

# Bits per stored element. Types that are absent (string, resource, variant) have no fixed element size.
_BITS = {
    "bool": 8, "int2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16,
    "int32": 32, "uint32": 32, "int64": 64, "uint64": 64, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64, "complex64": 64, "complex128": 128,
}  # fmt: skip
_INTEGER_TYPES = frozenset({"int2", "int4", "int8", "int16", "int32", "int64", "bool"})
_FLOAT_TYPES = frozenset(name for name in _BITS if name.startswith(("float", "bfloat", "complex")))

# Fields of builtin options that hold an enumeration of the schema.
_OPTION_ENUMS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "weightsFormat": "FullyConnectedOptionsWeightsFormat",
    "kernelType": "LSTMKernelType",
    "mode": "MirrorPadMode",
    "combiner": "CombinerType",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
    "outputType": "TensorType",
    "outType": "TensorType",
    "idxOutType": "TensorType",
    "quantizedBiasType": "TensorType",
}

# No phone holds an activation of 2 GiB, and interpreters die allocating one: such a shape is a corrupt one.
_MAX_ACTIVATION_BYTES = 2**31 - 1

# Field numbers in the schema, for what its generated accessors cannot give: positions, and checked strings.
_MODEL_DESCRIPTION, _MODEL_SIGNATURES = 3, 7
_SUBGRAPH_OUTPUTS = 2
_TENSOR_NAME = 3
_CODE_CUSTOM_NAME = 1
_SIGNATURE_KEY = 2
_TENSOR_MAP_NAME = 0


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a subgraph.

    Attributes:
        index: position in the subgraph, the number that operators and interpreters use.
        name: as stored; the Keras layer's path usually stands in it.
        shape: static shape, `()` for a scalar.
        shape_signature: like `shape` with -1 for dynamic dimensions; equals `shape` when all are static.
        dtype: lower-case name, such as "int8", "int4" or "float32".
        scales: float32, shape [1] (per tensor) or [channels], or None when the tensor has no scale.
        zero_points: int64, same shape as `scales`, or None.
        quantized_axis: the axis `scales` runs along when there are several.
        data: read-only constant values in `shape`; types below 8 bits unpacked to int8 (uint4 to uint8); None
            for activations, sparse constants, strings, and types NumPy lacks.
        is_constant: the file holds its values.
        is_variable: state that survives from one inference to the next.
        buffer_index: tensors of equal constants may share one buffer.
        size_bytes: bytes as stored, packed.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    shape_signature: tuple[int, ...]
    dtype: str
    scales: np.ndarray | None
    zero_points: np.ndarray | None
    quantized_axis: int
    data: np.ndarray | None
    is_constant: bool
    is_variable: bool
    buffer_index: int
    size_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether the stored values are floating point or complex."""
        return self.dtype in _FLOAT_TYPES


@dataclass(frozen=True)
class Operator:
    """One operator of a subgraph, in execution order.

    Attributes:
        name: the builtin's name ("CONV_2D") or the name of a custom operator.
        inputs, outputs: tensor indices; -1 stands for an optional input that is absent.
        options: the builtin options in snake case; enumerations by name ("SAME", "RELU6"), element types by
            dtype name ("int8"), vectors as lists.
    """

    index: int
    name: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A list of operators over its own list of tensors; control flow operators call further ones."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """A checked `.tflite` file; `tensors`, `operators`, `inputs`, `outputs` are the main subgraph's.

    Attributes:
        subgraphs: the main subgraph first.
        signatures: name -> {"inputs": {name: tensor index}, "outputs": {name: tensor index}}.
        content: the file's bytes.
    """

    subgraphs: tuple[Subgraph, ...]
    signatures: dict[str, dict[str, dict[str, int]]]
    description: str
    content: bytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.subgraphs[0].tensors

    @property
    def operators(self) -> tuple[Operator, ...]:
        return self.subgraphs[0].operators

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.subgraphs[0].inputs

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.subgraphs[0].outputs

    @property
    def size_bytes(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class TensorDetails:
    """An input or output as a caller sees it; `scale` and `zero_point` are None for unquantized tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True)
class Island:
    """An operator that does not compute in integers, with the tensors that show it.

    `operator_index` is None for an input or output of the model that no operator touches.
    """

    operator_index: int | None
    operator_name: str
    tensor_names: tuple[str, ...]
    reason: str
    subgraph_index: int = 0


@dataclass(frozen=True)
class Conversion:
    """A QUANTIZE or DEQUANTIZE operator, with the dtypes and names of its two tensors."""

    operator_index: int
    operator_name: str
    source_name: str
    source_dtype: str
    target_name: str
    target_dtype: str
    subgraph_index: int = 0


@dataclass(frozen=True)
class Inspection:
    """The verdict on one file.

    Attributes:
        fully_integer: no islands and no stray conversions. Float and uint8 tensors are allowed only as the
            model's own inputs and outputs, next to a boundary QUANTIZE or DEQUANTIZE.
        islands: operators (or untouched inputs and outputs) that are not integer.
        boundary: conversions at the model's own inputs and outputs.
        stray_conversions: conversions from or to float anywhere else.
        requantizations: QUANTIZE from integer to integer: cheap, and what concatenation needs.
        shape_arithmetic: "index NAME" of operators that only compute shapes, left from a dynamic batch.
        dynamic_tensors: names of the tensors with a dynamic dimension.
        operator_counts, dtype_counts: over all subgraphs.
        weight_bytes: bytes of all constants, shared buffers once.
        problems: one sentence each: what, where, and the fix.
    """

    fully_integer: bool
    islands: tuple[Island, ...]
    boundary: tuple[Conversion, ...]
    stray_conversions: tuple[Conversion, ...]
    requantizations: tuple[Conversion, ...]
    shape_arithmetic: tuple[str, ...]
    dynamic_tensors: tuple[str, ...]
    operator_counts: dict[str, int]
    dtype_counts: dict[str, int]
    weight_bytes: int
    size_bytes: int
    inputs: tuple[TensorDetails, ...]
    outputs: tuple[TensorDetails, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that `json.dumps` takes."""
        return dataclasses.asdict(self)


# --- reading


def read(source: bytes | str | Path) -> Model:
    """Reads and checks a `.tflite` file, or its bytes.

    Checked are: the identifier, all offsets, tensor, buffer, operator code and subgraph indices, constants'
    sizes against shape and dtype, quantization parameters, that every operator reads only tensors that an
    input, a constant or an earlier operator provides, and what `operands` knows of its kernels. The time taken is
    linear in the size of the file.

    Raises:
        FlatbufferError: the file is missing, empty, truncated or broken.
        RuntimeUnavailableError: neither ai-edge-litert nor tensorflow is installed.
    """
    where, content = _load(source)
    generated_schema()
    with _refusing(where):
        return _parse(content)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Makes whatever damage raises a FlatbufferError of that file."""
    try:
        yield
    except FlatbufferError as error:
        raise FlatbufferError(f"{where}: {error}") from None
    # What the generated accessors and NumPy raise when an offset or a length leads out of the file.
    except (struct.error, ValueError, TypeError, IndexError, OverflowError) as error:
        raise FlatbufferError(f"{where}: truncated or corrupt, an offset leads nowhere ({error})") from error


def _load(source: bytes | str | Path) -> tuple[str, bytes]:
    if not isinstance(source, str | Path):
        return "model bytes", bytes(source)
    try:
        return str(source), Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise FlatbufferError(f"{source}: cannot be read ({getattr(error, 'strerror', error)})") from error


@functools.cache
def generated_schema() -> Any:
    """The module that flatc made of LiteRT's schema.

    Raises:
        RuntimeUnavailableError: neither ai-edge-litert nor tensorflow is installed.
    """
    for name in _SCHEMA_MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RuntimeUnavailableError("Reading .tflite files needs ai-edge-litert (or tensorflow): install one.")


@functools.cache
def _enum_names(enum: str) -> Mapping[int, str]:
    values = vars(getattr(generated_schema(), enum)).items()
    return {value: name for name, value in values if not name.startswith("_")}


def _enum_name(enum: str, value: int) -> str:
    name = _enum_names(enum).get(value)
    if name is None:
        raise FlatbufferError(f"{value} is no known {enum}")
    return name.lower() if enum == "TensorType" else name


class _Reader:
    """Reads vectors, tables and strings, and pays for each from a budget of one unit per byte of the file.

    Nothing in an honest file costs more than the bytes it occupies. Offsets that lead to the same bytes over
    and over would make a small file unfold without end; here they run out of budget.
    """

    _TABLE_COST = 8  # the reference to it and its own header, four bytes each

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.left = len(content)

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise FlatbufferError("corrupt, its vectors and tables overlap")

    def tables(self, table: Any, field: str) -> list[Any]:
        length = getattr(table, f"{field}Length")()
        self.spend(self._TABLE_COST * length)
        return [getattr(table, field)(index) for index in range(length)]

    def vector(self, table: Any, field: str) -> np.ndarray | None:
        if getattr(table, f"{field}IsNone")():
            return None
        self.spend(getattr(table, f"{field}Length")())
        return getattr(table, f"{field}AsNumpy")()

    def integers(self, table: Any, field: str) -> tuple[int, ...]:
        vector = self.vector(table, field)
        return () if vector is None else tuple(vector.tolist())

    def string(self, table: Any, field_number: int) -> str:
        start, length = _vector_position(table, field_number)
        self.spend(length)
        # A string is followed by a zero byte. The generated accessor would silently return a shorter one.
        if start + length >= len(self.content):
            raise FlatbufferError("truncated, a string leads out of the file")
        return self.content[start : start + length].decode()


def _vector_position(table: Any, field_number: int) -> tuple[int, int]:
    """First byte and length of a vector or string; (0, 0) when the field is absent."""
    offset = table._tab.Offset(4 + 2 * field_number)
    return (table._tab.Vector(offset), table._tab.VectorLen(offset)) if offset else (0, 0)


def _root(content: bytes) -> Any:
    return generated_schema().Model.GetRootAs(content)


def _parse(content: bytes) -> Model:
    if not content:
        raise FlatbufferError("empty, expected a .tflite model")
    if content[4:8] != b"TFL3":
        raise FlatbufferError(f"not a .tflite model: identifier {content[4:8]!r}, expected b'TFL3'")
    reader, root = _Reader(content), _root(content)
    if root.Version() != 3:
        raise FlatbufferError(f"schema version {root.Version()}, expected 3")
    buffers = [_read_buffer(reader, table) for table in reader.tables(root, "Buffers")]
    codes = [_read_code(reader, table) for table in reader.tables(root, "OperatorCodes")]
    rows = reader.tables(root, "Subgraphs")
    subgraphs = tuple(_read_subgraph(reader, row, buffers, codes) for row in rows)
    if not subgraphs or not subgraphs[0].outputs:
        raise FlatbufferError("has no subgraph with outputs")
    _check_calls(subgraphs)
    signatures = dict(_read_signature(reader, row, subgraphs) for row in reader.tables(root, "SignatureDefs"))
    return Model(subgraphs, signatures, reader.string(root, _MODEL_DESCRIPTION), content)


def _read_buffer(reader: _Reader, table: Any) -> np.ndarray:
    """The stored bytes, uint8 [n]; n is 0 for activations."""
    if table.Offset() > 1:  # models above 2 GB keep constants behind the flatbuffer proper
        return np.frombuffer(reader.content, np.uint8, table.Size(), table.Offset())
    # Not paid for: the bytes are neither copied nor looped over.
    return np.zeros(0, np.uint8) if table.DataIsNone() else table.DataAsNumpy()


def _read_code(reader: _Reader, table: Any) -> tuple[str, int]:
    # Files written before code 127 was exceeded have only the deprecated one-byte field.
    name = _enum_name("BuiltinOperator", max(table.BuiltinCode(), table.DeprecatedBuiltinCode()))
    return (reader.string(table, _CODE_CUSTOM_NAME) or name) if name == "CUSTOM" else name, table.Version()


def _read_subgraph(reader: _Reader, table: Any, buffers: list[np.ndarray], codes: list[tuple[str, int]]) -> Subgraph:
    tensor_rows, operator_rows = reader.tables(table, "Tensors"), reader.tables(table, "Operators")
    subgraph = Subgraph(
        tuple(_read_tensor(reader, row, index, buffers) for index, row in enumerate(tensor_rows)),
        tuple(_read_operator(reader, row, index, codes) for index, row in enumerate(operator_rows)),
        reader.integers(table, "Inputs"),
        reader.integers(table, "Outputs"),
    )
    # Recurrent kernels keep quantization parameters in these; they hold no values and are in no list.
    for row in operator_rows:
        for index in reader.integers(row, "Intermediates"):
            _element(subgraph.tensors, index, "operator intermediate: tensor")
    _check_use(subgraph)
    for operator in subgraph.operators:
        check_operator(operator, subgraph.tensors)
    return subgraph


def _read_tensor(reader: _Reader, table: Any, index: int, buffers: list[np.ndarray]) -> Tensor:
    name = reader.string(table, _TENSOR_NAME)
    where = f"tensor {index} '{name}'"
    dtype = _enum_name("TensorType", table.Type())
    shape = reader.integers(table, "Shape")
    signature = reader.integers(table, "ShapeSignature") or shape
    if min(shape, default=0) < 0 or len(signature) != len(shape):
        raise FlatbufferError(f"{where} has shape {shape} and shape signature {signature}")
    buffer = _element(buffers, table.Buffer(), f"{where}: buffer")
    if table.ExternalBuffer():
        raise FlatbufferError(f"{where} keeps its values in another file, which is not supported")
    scales, zero_points, axis = _read_quantization(reader, table.Quantization(), where, dtype, shape)
    is_sparse = table.Sparsity() is not None
    if is_sparse:
        _pay_for_sparsity(reader, table.Sparsity())
    size_bytes = -(-math.prod(shape) * _BITS.get(dtype, 0) // 8)
    if buffer.size and dtype in _BITS and not is_sparse and buffer.size != size_bytes:
        raise FlatbufferError(f"{where}: {dtype} {shape} is {size_bytes} bytes, its buffer has {buffer.size}")
    if not buffer.size and size_bytes > _MAX_ACTIVATION_BYTES:
        raise FlatbufferError(f"{where}: {dtype} {shape} is {size_bytes} bytes, more than any device holds")
    return Tensor(
        index=index,
        name=name,
        shape=shape,
        shape_signature=signature,
        dtype=dtype,
        scales=scales,
        zero_points=zero_points,
        quantized_axis=axis,
        data=_decode(reader, buffer, dtype, shape) if buffer.size and not is_sparse else None,
        is_constant=bool(buffer.size),
        is_variable=table.IsVariable(),
        buffer_index=table.Buffer(),
        size_bytes=buffer.size or size_bytes,
    )


def _pay_for_sparsity(reader: _Reader, table: Any) -> None:
    reader.integers(table, "TraversalOrder")
    reader.integers(table, "BlockMap")
    reader.tables(table, "DimMetadata")


def _read_quantization(
    reader: _Reader, table: Any, where: str, dtype: str, shape: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """Scales [1] or [channels], zero points of the same shape, and the axis; float tensors have none."""
    # Minimum and maximum only inform. They are paid for, as `single_operators` copies them.
    ranges = [reader.vector(table, side) for side in ("Scale", "Min", "Max")] if table is not None else [None]
    scales = ranges[0]
    if scales is None or not scales.size or dtype in _FLOAT_TYPES:
        return None, None, 0
    zero_points = reader.vector(table, "ZeroPoint")
    if zero_points is None or not zero_points.size:
        zero_points = np.zeros(1, np.int64)
    # One zero point may serve all channels.
    if zero_points.size not in (1, scales.size):
        raise FlatbufferError(f"{where} has {scales.size} scales and {zero_points.size} zero points")
    # Biases of older files name their weight's axis.
    axis = 0 if len(shape) == 1 else table.QuantizedDimension()
    if scales.size > 1 and not (0 <= axis < len(shape) and shape[axis] == scales.size):
        raise FlatbufferError(f"{where} of shape {shape} has {scales.size} scales along axis {axis}")
    # Kernels abort the process on a multiplier that is not finite.
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise FlatbufferError(f"{where} has a scale that is not a positive finite number")
    if dtype in ("int8", "uint8", "int16"):
        bounds = np.iinfo(dtype)
        if zero_points.min() < bounds.min or zero_points.max() > bounds.max:
            raise FlatbufferError(f"{where} has a zero point outside {dtype}")
    return scales.astype(np.float32), np.broadcast_to(zero_points.astype(np.int64), scales.shape), axis


def _decode(reader: _Reader, buffer: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Constant values in their shape: a view of the file, or a copy where several share a byte."""
    bits = _BITS.get(dtype, 0)
    if 0 < bits < 8:
        reader.spend(buffer.size)
        return _unpack(buffer, bits, dtype.startswith("int"))[: math.prod(shape)].reshape(shape)
    try:
        return buffer.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
    except TypeError:  # a type that NumPy lacks: string, bfloat16, float8
        return None


def _unpack(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """uint8 [n] -> int8 or uint8 [n * 8 / bits]; the first value stands in the lowest bits."""
    shifted = packed[:, None] << np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    # An arithmetic shift of the signed view extends the sign.
    values = (shifted.view(np.int8) if signed else shifted) >> (8 - bits)
    values.flags.writeable = False
    return values.reshape(-1)


def _read_operator(reader: _Reader, table: Any, index: int, codes: list[tuple[str, int]]) -> Operator:
    name, version = _element(codes, table.OpcodeIndex(), f"operator {index}: operator code")
    for field in ("CustomOptions", "MutatingVariableInputs"):
        reader.vector(table, field)
    inputs, outputs = reader.integers(table, "Inputs"), reader.integers(table, "Outputs")
    return Operator(index, name, version, inputs, outputs, _read_options(reader, table))


def _read_options(reader: _Reader, table: Any) -> dict[str, Any]:
    schema = generated_schema()
    options = schema.BuiltinOptionsCreator(table.BuiltinOptionsType(), table.BuiltinOptions())
    if options is None:
        options = schema.BuiltinOptions2Creator(table.BuiltinOptions2Type(), table.BuiltinOptions2())
    if options is None:
        return {}
    return {_snake_case(field): _option(reader, field, value) for field, value in vars(options).items()}


def _option(reader: _Reader, field: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        reader.spend(value.size)
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    return _enum_name(_OPTION_ENUMS[field], value) if field in _OPTION_ENUMS and value is not None else value


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _read_signature(
    reader: _Reader, table: Any, subgraphs: tuple[Subgraph, ...]
) -> tuple[str, dict[str, dict[str, int]]]:
    name = reader.string(table, _SIGNATURE_KEY)
    subgraph = _element(subgraphs, table.SubgraphIndex(), f"signature '{name}': subgraph")
    entry: dict[str, dict[str, int]] = {}
    for side in ("Inputs", "Outputs"):
        rows = reader.tables(table, side)
        entry[side.lower()] = {reader.string(row, _TENSOR_MAP_NAME): row.TensorIndex() for row in rows}
    for index in (*entry["inputs"].values(), *entry["outputs"].values()):
        _element(subgraph.tensors, index, f"signature '{name}': tensor")
    return name, entry


def _element(sequence: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(sequence):
        raise FlatbufferError(f"{what} {index} does not exist, there are {len(sequence)}")
    return sequence[index]


def _check_use(subgraph: Subgraph) -> None:
    """Indices exist; whatever is read was provided before; nothing is written twice or over a constant."""
    tensors = subgraph.tensors
    for index in (*subgraph.inputs, *subgraph.outputs):
        _element(tensors, index, "graph input or output: tensor")
    # An empty constant, such as the shape of a scalar, has an empty buffer as activations have.
    ready = {t.index for t in tensors if t.is_constant or t.is_variable or 0 in t.shape}
    ready.update(subgraph.inputs)
    written: set[int] = set()
    for operator in subgraph.operators:
        where = f"operator {operator.index} {operator.name}"
        for index in operator.inputs:
            if index != -1 and _element(tensors, index, f"{where}: input tensor").index not in ready:
                raise FlatbufferError(f"{where} reads tensor {index} '{tensors[index].name}' too early")
        for index in operator.outputs:
            tensor = _element(tensors, index, f"{where}: output tensor")
            if tensor.is_constant or index in written or index in subgraph.inputs:
                raise FlatbufferError(f"{where} overwrites tensor {index} '{tensor.name}'")
        written.update(operator.outputs)
        ready.update(operator.outputs)
    for index in subgraph.outputs:
        if index not in ready:
            raise FlatbufferError(f"output tensor {index} '{tensors[index].name}' is never computed")


def _check_calls(subgraphs: tuple[Subgraph, ...]) -> None:
    """Control flow names subgraphs that exist, and none that leads back to itself."""
    calls: dict[int, set[int]] = {}
    for caller, subgraph in enumerate(subgraphs):
        for operator in subgraph.operators:
            # "then_subgraph_index", "body_subgraph_index" and so on; CALL has "subgraph".
            callees = [value for field, value in operator.options.items() if "subgraph" in field]
            for callee in callees:
                _element(subgraphs, callee, f"operator {operator.index} {operator.name}: subgraph")
            calls.setdefault(caller, set()).update(callees)
    try:
        graphlib.TopologicalSorter(calls).prepare()
    except graphlib.CycleError as error:
        raise FlatbufferError(f"subgraphs call each other in a circle: {error.args[1]}") from None


# --- judging


def inspect(source: bytes | str | Path) -> Inspection:
    """Judges whether a file is fully integer, and says what is in the way; see `Inspection`.

    Raises:
        FlatbufferError: as `read`.
    """
    model = read(source)
    islands = tuple(_islands(model))
    conversions = tuple(_conversions(model))
    stray = tuple(row for kind, row in conversions if kind == "stray")
    shape_arithmetic = tuple(f"{row.index} {row.name}" for row in _shape_arithmetic(model.subgraphs[0]))
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors]
    dynamic = tuple(tensor.name for tensor in tensors if -1 in tensor.shape_signature)
    return Inspection(
        fully_integer=not islands and not stray,
        islands=islands,
        boundary=tuple(row for kind, row in conversions if kind == "boundary"),
        stray_conversions=stray,
        requantizations=tuple(row for kind, row in conversions if kind == "requantization"),
        shape_arithmetic=shape_arithmetic,
        dynamic_tensors=dynamic,
        operator_counts=dict(Counter(op.name for subgraph in model.subgraphs for op in subgraph.operators)),
        dtype_counts=dict(Counter(tensor.dtype for tensor in tensors)),
        weight_bytes=sum({t.buffer_index: t.size_bytes for t in tensors if t.is_constant}.values()),
        size_bytes=model.size_bytes,
        inputs=tuple(details(model.tensors[index]) for index in model.inputs),
        outputs=tuple(details(model.tensors[index]) for index in model.outputs),
        problems=tuple(_problems(islands, stray, shape_arithmetic, dynamic)),
    )


def details(tensor: Tensor) -> TensorDetails:
    if tensor.scales is None or tensor.zero_points is None or tensor.scales.size != 1:
        return TensorDetails(tensor.name, tensor.shape, tensor.dtype, None, None)
    return TensorDetails(tensor.name, tensor.shape, tensor.dtype, float(tensor.scales[0]), int(tensor.zero_points[0]))


def _is_conversion(operator: Operator) -> bool:
    return operator.name in ("QUANTIZE", "DEQUANTIZE") and len(operator.inputs) == len(operator.outputs) == 1


def _islands(model: Model) -> Iterator[Island]:
    for subgraph_index, subgraph in enumerate(model.subgraphs):
        interface = {*subgraph.inputs, *subgraph.outputs} if subgraph_index == 0 else set()
        for operator in subgraph.operators:
            if _is_conversion(operator):
                continue
            indices = dict.fromkeys((*operator.inputs, *operator.outputs))
            used = [subgraph.tensors[index] for index in indices if index != -1]
            foreign = [
                t
                for t in used
                if not (t.dtype in _INTEGER_TYPES or _is_byte_interface(t, interface) or _is_index(operator, t))
            ]
            if foreign:
                names = tuple(tensor.name for tensor in foreign)
                yield Island(operator.index, operator.name, names, _reason(used, foreign), subgraph_index)
    touched = {index for operator in model.operators for index in (*operator.inputs, *operator.outputs)}
    for index in dict.fromkeys((*model.inputs, *model.outputs)):
        if index not in touched and model.tensors[index].is_float:
            tensor = model.tensors[index]
            yield Island(None, "", (tensor.name,), f"{tensor.dtype} input or output that no operator touches")


def _is_index(operator: Operator, tensor: Tensor) -> bool:
    """Plain bytes on their way from int8 to the indices of a table."""
    return operator.name == "CAST" and tensor.dtype == "uint8" and tensor.scales is None


def _is_byte_interface(tensor: Tensor, interface: set[int]) -> bool:
    return tensor.dtype == "uint8" and tensor.index in interface


def _reason(used: list[Tensor], foreign: list[Tensor]) -> str:
    kinds = " and ".join(sorted({tensor.dtype for tensor in foreign}))
    if not any(tensor.is_float for tensor in foreign):
        return f"computes on {kinds}, the scheme before int8" if kinds == "uint8" else f"holds {kinds}"
    if all(tensor.is_constant for tensor in foreign):
        return f"has {kinds} constants"
    if any(tensor.is_constant and tensor.scales is not None for tensor in used):
        return f"has integer weights but {kinds} activations (dynamic range quantization)"
    return f"computes in {kinds}"


def _conversions(model: Model) -> Iterator[tuple[str, Conversion]]:
    """(kind, conversion) pairs; only the main subgraph has a boundary, the others are called from inside."""
    for subgraph_index, subgraph in enumerate(model.subgraphs):
        interface = {*subgraph.inputs, *subgraph.outputs} if subgraph_index == 0 else set()
        for operator in filter(_is_conversion, subgraph.operators):
            source, target = subgraph.tensors[operator.inputs[0]], subgraph.tensors[operator.outputs[0]]
            row = Conversion(
                operator.index,
                operator.name,
                source_name=source.name,
                source_dtype=source.dtype,
                target_name=target.name,
                target_dtype=target.dtype,
                subgraph_index=subgraph_index,
            )
            yield _conversion_kind(source, target, interface), row


def _conversion_kind(source: Tensor, target: Tensor, interface: set[int]) -> str:
    floats = [tensor for tensor in (source, target) if tensor.is_float]
    if floats:
        return "boundary" if len(floats) == 1 and floats[0].index in interface else "stray"
    at_boundary = _is_byte_interface(source, interface) or _is_byte_interface(target, interface)
    return "boundary" if at_boundary and source.dtype != target.dtype else "requantization"


def _shape_arithmetic(subgraph: Subgraph) -> list[Operator]:
    """SHAPE, and every operator whose non-constant inputs all descend from one."""
    descendants: set[int] = set()
    found = []
    for operator in subgraph.operators:
        inputs = {i for i in operator.inputs if i != -1 and not subgraph.tensors[i].is_constant}
        if operator.name == "SHAPE" or (inputs and inputs <= descendants):
            descendants.update(operator.outputs)
            found.append(operator)
    return found


def _problems(
    islands: tuple[Island, ...],
    stray: tuple[Conversion, ...],
    shape_arithmetic: tuple[str, ...],
    dynamic: tuple[str, ...],
) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Island]] = {}
    for island in islands:
        groups.setdefault((island.operator_name, island.reason), []).append(island)
    for (name, reason), members in groups.items():
        tensor_names = [member.tensor_names[-1] for member in members]
        yield (
            f"{len(members)} x {name or 'tensor'} {reason}: {_listing(tensor_names)}; give inputs and "
            "outputs ranges (calibration or fake quantization), or use a layer that has an integer kernel."
        )
    if stray:
        yield (
            f"{len(stray)} conversions inside the graph: "
            f"{_listing([f'{row.operator_name} {row.source_name} -> {row.target_name}' for row in stray])}; "
            "make the float operators next to them integer and they disappear."
        )
    if shape_arithmetic:
        yield (
            f"{len(shape_arithmetic)} operators compute shapes at run time: {_listing(shape_arithmetic)}; "
            "convert with a static batch of 1."
        )
    if dynamic:
        yield (
            f"{len(dynamic)} tensors have a dynamic dimension: {_listing(dynamic)}; some delegates refuse "
            "them, convert with a static batch of 1."
        )


def _listing(names: Sequence[str], limit: int = 3) -> str:
    # The converter joins the names of all layers that it fused with ";". The first is enough to find one.
    shown = ", ".join(name.split(";")[0] for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


# --- exposing


def expose_tensors(source: bytes | str | Path, tensor_indices: Iterable[int] | None = None) -> bytes:
    """The same model with intermediate tensors among its outputs, so that a delegate must compute them.

    Interpreters reuse an intermediate's memory, and delegates never write it at all; an output is always
    there. The original outputs stay first, in order; signatures are dropped; all else, indices included, is
    unchanged.

    Args:
        source: path or bytes.
        tensor_indices: tensors of the main subgraph to add, in this order. Default: every tensor that an
            operator computes, by index.

    Raises:
        FlatbufferError: as `read`, or a tensor that no operator computes is asked for.
    """
    model = read(source)
    computed = {index for operator in model.operators for index in operator.outputs}
    wanted = sorted(computed) if tensor_indices is None else [int(index) for index in tensor_indices]
    for index in wanted:
        if index not in computed:
            raise FlatbufferError(f"tensor {index} cannot be exposed: no operator of the graph computes it")
    return _with_outputs(model.content, list(dict.fromkeys((*model.outputs, *wanted))))


def _with_outputs(content: bytes, outputs: list[int]) -> bytes:
    """Appends a new vector of outputs and points the subgraph at it, so that no constant moves."""
    root = _root(content)
    table = root.Subgraphs(0)._tab
    field = table.Offset(4 + 2 * _SUBGRAPH_OUTPUTS)
    patched = bytearray(content)
    patched.extend(bytes(-len(patched) % 4))
    struct.pack_into("<I", patched, table.Pos + field, len(patched) - (table.Pos + field))
    patched.extend(struct.pack(f"<I{len(outputs)}i", len(outputs), *outputs))
    signatures, _ = _vector_position(root, _MODEL_SIGNATURES)
    if signatures:
        struct.pack_into("<I", patched, signatures - 4, 0)
    return bytes(patched)


# --- writing


class AlignedBuffer:
    """A buffer for the generated classes to pack, whose bytes start at a multiple of 16 as the schema demands."""

    def __init__(self, content: bytes | None = None):
        self.content = content

    def Pack(self, builder: flatbuffers.Builder) -> int:  # as the generated classes call it
        schema, offset = generated_schema(), None
        if self.content:
            builder.Prep(16, len(self.content))
            offset = builder.CreateByteVector(self.content)
        schema.BufferStart(builder)
        if offset is not None:
            schema.BufferAddData(builder, offset)
        return schema.BufferEnd(builder)


# --- taking apart


def single_operators(source: bytes | str | Path) -> list[tuple[Operator, bytes]]:
    """Every operator of the main graph as a model of its own, so that what it costs can be measured alone.

    The inputs of such a model are the tensors that the operator computes with, its outputs those it computes; the
    constants it uses are in it. Operators are left out that only exist with others: those that read or write state
    (variables, resources) or call other subgraphs.

    Raises:
        FlatbufferError: as `read`.
    """
    where, content = _load(source)
    model, root = read(source), _root(content)
    alone = [operator for operator in model.operators if _is_alone(model, operator)]
    with _refusing(where):
        graph = generated_schema().SubGraphT.InitFromObj(root.Subgraphs(0))
        return [(operator, _single(root, graph, model, operator)) for operator in alone]


def _is_alone(model: Model, operator: Operator) -> bool:
    tensors = [model.tensors[index] for index in (*operator.inputs, *operator.outputs) if index >= 0]
    calls = any(key.endswith("subgraph_index") or key == "subgraph" for key in operator.options)
    return not calls and not any(tensor.is_variable or tensor.dtype in ("resource", "variant") for tensor in tensors)


def _single(root: Any, graph: Any, model: Model, operator: Operator) -> bytes:
    schema = generated_schema()
    used = list(dict.fromkeys(index for index in (*operator.inputs, *operator.outputs) if index >= 0))
    position = {index: number for number, index in enumerate(used)} | {-1: -1}
    tensors = [_single_tensor(graph.tensors[index], number + 1) for number, index in enumerate(used)]
    code = graph.operators[operator.index].opcodeIndex
    single = _changed(
        graph.operators[operator.index],
        opcodeIndex=0,
        inputs=[position[index] for index in operator.inputs],
        outputs=[position[index] for index in operator.outputs],
    )
    part = _changed(
        graph,
        tensors=tensors,
        operators=[single],
        inputs=[position[i] for i in dict.fromkeys(operator.inputs) if i >= 0 and not model.tensors[i].is_constant],
        outputs=[position[index] for index in operator.outputs],
    )
    # A buffer per tensor behind the empty one: shared buffers need not stay shared here.
    buffers = [schema.BufferT.InitFromObj(root.Buffers(graph.tensors[index].buffer)) for index in used]
    result = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT.InitFromObj(root.OperatorCodes(code))],
        subgraphs=[part],
        buffers=[schema.BufferT(), *buffers],
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(result.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _single_tensor(tensor: Any, buffer: int) -> Any:
    # Biases of older files name their weight's axis, which interpreters refuse in some places.
    is_vector = tensor.shape is not None and len(tensor.shape) == 1 and tensor.quantization is not None
    quantization = _changed(tensor.quantization, quantizedDimension=0) if is_vector else tensor.quantization
    return _changed(tensor, buffer=buffer, quantization=quantization)


def _changed(table: Any, **fields: Any) -> Any:
    """A shallow copy of one of the schema's objects with other fields."""
    twin = copy.copy(table)
    vars(twin).update(fields)
    return twin
