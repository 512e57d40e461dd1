"""Files of one operator, written by hand, and what the interpreter makes of them: `run`."""

from __future__ import annotations

from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

TYPES = {
    np.dtype("int8"): schema.TensorType.INT8,
    np.dtype("uint8"): schema.TensorType.UINT8,
    np.dtype("int16"): schema.TensorType.INT16,
    np.dtype("int32"): schema.TensorType.INT32,
    np.dtype("int64"): schema.TensorType.INT64,
    np.dtype("float32"): schema.TensorType.FLOAT32,
}


@dataclass(frozen=True)
class Operand:
    """A tensor that the operator reads: its values, its grid if it has one, and whether the file holds it."""

    values: np.ndarray
    grid: tuple[float, int] | None = None
    constant: bool = False


def build(kind: str, version: int, options, operands: list[Operand], shape, grid, dtype="int8") -> bytes:
    """A file of one operator.

    Args:
        kind: LiteRT builtin operator.
        options: `(name of the options table, {field: value})`, or None.
        operands: what it reads, in order.
        shape, grid, dtype: of its output.
    """
    tensors, buffers = [], [schema.BufferT()]
    for index, operand in enumerate(operands):
        place = 0
        if operand.constant:
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(operand.values.tobytes(), np.uint8)
            place = len(buffers) - 1
        tensors.append(_tensor(f"x{index}", operand.values.shape, operand.values.dtype, operand.grid, place))
    tensors.append(_tensor("y", shape, np.dtype(dtype), grid, 0))
    code = schema.OperatorCodeT()
    code.builtinCode, code.version = getattr(schema.BuiltinOperator, kind), version
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, list(range(len(operands))), [len(operands)]
    if options:
        name, fields = options
        operator.builtinOptions = getattr(schema, f"{name}T")()
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
        for field, value in fields.items():
            assert hasattr(operator.builtinOptions, field), field
            setattr(operator.builtinOptions, field, value)
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.name = tensors, [operator], "main"
    graph.inputs = [index for index, operand in enumerate(operands) if not operand.constant]
    graph.outputs = [len(operands)]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(name: str, shape, dtype, grid, place: int) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), TYPES[dtype], place
    if grid is not None:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [grid[0]], [grid[1]]
    return tensor


def run(
    kind: str, version: int, options, operands: list[Operand], shape, grid, dtype="int8"
) -> tuple[np.ndarray, bool]:
    """The operator's output, and whether the delegate computed it."""
    content = build(kind, version, options, operands, shape, grid, dtype)
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    given = [operand.values for operand in operands if not operand.constant]
    for detail, values in zip(interpreter.get_input_details(), given, strict=True):
        interpreter.set_tensor(detail["index"], values)
    interpreter.invoke()
    delegated = any("DELEGATE" in row["op_name"] for row in interpreter._get_ops_details())
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy(), delegated
