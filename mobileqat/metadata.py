"""LiteRT metadata inside a `.tflite` file: what its input and output mean, as Android's task libraries read it.

    add_metadata(content, Metadata(...)) -> bytes      read_metadata(content) -> Metadata or None

The metadata is a flatbuffer (schema "M001", metadata_schema.fbs of TensorFlow Lite Support) in a buffer of the model
that its list of metadata calls TFLITE_METADATA; labels.txt is a zip archive behind the model. Interpreters skip both.
The same arguments give the same bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

from mobileqat import flatbuffer
from mobileqat.errors import FlatbufferError, MobileQatError

NAME = b"TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS = "labels.txt"
PARSER_VERSION = "1.0.0"  # the oldest that knows all that is written here
MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Metadata:
    """What a classifier's file says of itself.

    Args:
        name: of the model.
        description: in a sentence.
        labels: one per class, in the order of the output's last axis; empty for none.
        color_space: "RGB" or "GRAYSCALE" for images [batch, height, width, channels], None for other inputs.
        mean, std: a value x (a pixel 0..255, or whatever the data holds) enters as (x - mean) / std, a real value; an
            integer input is then quantized by its own scale and zero point.
        value_range: lowest and highest real value of the input, if known.
    """

    name: str
    description: str = ""
    labels: tuple[str, ...] = ()
    color_space: str | None = None
    mean: float = 0.0
    std: float = 1.0
    value_range: tuple[float, float] | None = None


def describe(
    name: str,
    description: str,
    labels: Sequence[str],
    sample_shape: Sequence[int],
    value_range: tuple[float, float] | None,
) -> Metadata:
    """The metadata of a classifier that takes samples as its data holds them, without normalization.

    Args:
        name: of the model.
        description: in a sentence.
        labels: class names.
        sample_shape: without the batch; 8-bit pixels with 1 or 3 channels are taken for images.
        value_range: of the samples, if known.
    """
    spaces = {1: "GRAYSCALE", 3: "RGB"}
    is_image = len(sample_shape) == 3 and value_range == (0.0, 255.0)
    color_space = spaces.get(sample_shape[-1]) if is_image else None
    return Metadata(name, description, tuple(labels), color_space, value_range=value_range)


# ------------------------------------------------------------------ writing


def add_metadata(content: bytes, metadata: Metadata) -> bytes:
    """The same model with metadata, in place of any that it has.

    Args:
        content: a `.tflite` file.
        metadata: of its first input and its first output; others are only named.

    Raises:
        FlatbufferError: the file is broken.
        MobileQatError: labels that do not fit the output, or hold line breaks.
    """
    model = flatbuffer.read(content)
    _check_labels(model, metadata)
    schema = flatbuffer.generated_schema()
    file = schema.ModelT.InitFromPackedBuf(content)
    if any(buffer.offset > 1 for buffer in file.buffers):
        raise FlatbufferError(
            "The file keeps constants behind the flatbuffer (more than 2 GB): no metadata can follow."
        )
    kept = [row for row in file.metadata or [] if row.name != NAME]
    replaced = {row.buffer for row in file.metadata or [] if row.name == NAME}
    # Emptied, not removed: tensors name buffers by number.
    constants = [None if i in replaced or b.data is None else bytes(b.data) for i, b in enumerate(file.buffers)]
    buffers = [flatbuffer.AlignedBuffer(data) for data in constants]
    number = min(replaced, default=len(buffers))
    packed = flatbuffer.AlignedBuffer(_pack_metadata(model, metadata))
    buffers[number : number + 1] = [packed]
    file.buffers = buffers
    entry = schema.MetadataT()
    entry.name, entry.buffer = NAME, number
    file.metadata = [*kept, entry]
    builder = flatbuffers.Builder(len(content) + 4096)
    builder.Finish(file.Pack(builder), b"TFL3")
    return _with_labels(bytes(builder.Output()), metadata.labels)


def _check_labels(model: flatbuffer.Model, metadata: Metadata) -> None:
    labels = metadata.labels
    broken = [label for label in labels if not label or label.splitlines() != [label] or label != label.strip()]
    if broken:
        raise MobileQatError(f"A label takes one line, without spaces around it. Received: {broken[0]!r}")
    shape = model.tensors[model.outputs[0]].shape
    if labels and shape[-1:] != (len(labels),):
        raise MobileQatError(f"The file's first output has shape {shape}, and there are {len(labels)} labels.")
    if "\0" in f"{metadata.name}{metadata.description}" or metadata.std == 0:
        raise MobileQatError(f"Metadata must have text without zero bytes and a std other than 0. Received: {metadata}")


def _with_labels(content: bytes, labels: Sequence[str]) -> bytes:
    """Uncompressed, as Android's reader wants it, with a fixed time; the zip's offsets count from the file's start."""
    if not labels:
        return content
    stream = io.BytesIO()
    stream.write(content)
    entry = zipfile.ZipInfo(LABELS, (1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry, "".join(f"{label}\n" for label in labels).encode())
    return stream.getvalue()


def _pack_metadata(model: flatbuffer.Model, metadata: Metadata) -> bytes:
    inputs: list[dict[str, Any]] = [{"name": model.tensors[index].name} for index in model.inputs]
    outputs: list[dict[str, Any]] = [{"name": model.tensors[index].name} for index in model.outputs]
    inputs[0] |= _input(metadata)
    if metadata.labels:
        label_file = {"name": LABELS, "description": "Labels of the classes.", "type": TENSOR_AXIS_LABELS}
        outputs[0] |= {"content": {"properties": ("FeatureProperties", {})}, "associated_files": [label_file]}
    graph = {"input_tensor_metadata": inputs, "output_tensor_metadata": outputs}
    root = {
        "name": metadata.name,
        "description": metadata.description,
        "subgraph_metadata": [graph],
        "min_parser_version": PARSER_VERSION,
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_pack(builder, "ModelMetadata", root), IDENTIFIER)
    return bytes(builder.Output())


def _input(metadata: Metadata) -> dict[str, Any]:
    properties: tuple[str, dict[str, int]] = ("FeatureProperties", {})
    if metadata.color_space is not None:
        properties = ("ImageProperties", {"color_space": COLOR_SPACES.index(metadata.color_space)})
    values: dict[str, Any] = {
        "content": {"properties": properties},
        "process_units": [{"options": ("NormalizationOptions", {"mean": [metadata.mean], "std": [metadata.std]})}],
    }
    if metadata.value_range is not None:
        low, high = metadata.value_range
        values["stats"] = {"max": [high], "min": [low]}
    return values


# ------------------------------------------------------------------ reading


def read_metadata(source: bytes | str | Path) -> Metadata | None:
    """The metadata of a file, None where it has none.

    Raises:
        FlatbufferError: the file, or its metadata, is broken.
    """
    content = flatbuffer.read(source).content
    try:
        return _read(content)
    except (
        *(struct.error, ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError, NotImplementedError),
        *(RuntimeError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise FlatbufferError(f"The metadata of the file is damaged: {error}") from error


def _read(content: bytes) -> Metadata | None:
    root = flatbuffer.generated_schema().Model.GetRootAs(content)
    entries = [root.Metadata(index) for index in range(root.MetadataLength())]
    numbers = [entry.Buffer() for entry in entries if entry.Name() == NAME]
    if not numbers or root.Buffers(numbers[0]).DataIsNone():
        return None
    packed = root.Buffers(numbers[0]).DataAsNumpy().tobytes()
    if packed[4:8] != IDENTIFIER:
        raise ValueError(f"identifier {packed[4:8]!r}, expected {IDENTIFIER!r}")
    start = struct.unpack_from("<I", packed)[0]
    values = _Unpacker(packed).table("ModelMetadata", start)
    graph = values["subgraph_metadata"][0]
    given, answer = graph["input_tensor_metadata"][0], graph["output_tensor_metadata"][0]
    kind, properties = given.get("content", {}).get("properties", ("", {}))
    options = [unit["options"] for unit in given.get("process_units", []) if "options" in unit]
    scaling: dict[str, Any] = next((fields for name, fields in options if name == "NormalizationOptions"), {})
    stats = given.get("stats", {})
    files = [row for row in answer.get("associated_files", []) if row.get("type") == TENSOR_AXIS_LABELS]
    return Metadata(
        name=values.get("name", ""),
        description=values.get("description", ""),
        labels=_read_labels(content, files[0]["name"]) if files else (),
        color_space=COLOR_SPACES[properties.get("color_space", 0)] if kind == "ImageProperties" else None,
        mean=(scaling.get("mean") or [0.0])[0],
        std=(scaling.get("std") or [1.0])[0],
        value_range=(stats["min"][0], stats["max"][0]) if stats.get("min") and stats.get("max") else None,
    )


def _read_labels(content: bytes, name: str) -> tuple[str, ...]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(name) as file:
        text = file.read(MAX_LABEL_BYTES + 1)
    if len(text) > MAX_LABEL_BYTES:
        raise ValueError(f"more than {MAX_LABEL_BYTES} bytes of labels")
    return tuple(text.decode().splitlines())


# ------------------------------------------------------------------ the schema, as far as it is used here

TENSOR_AXIS_LABELS = 2
COLOR_SPACES: tuple[str | None, ...] = (None, "RGB", "GRAYSCALE")

# Of a field: "string", "byte", "floats", the name of a table, [a table] for a vector, or {number: table} for a union,
# which takes two fields, its type and its value. None: not used here. Positions are the format.
Kind = Any
TABLES: Mapping[str, Sequence[tuple[str, Kind]]] = {
    "ModelMetadata": (
        ("name", "string"),
        ("description", "string"),
        ("version", "string"),
        ("subgraph_metadata", ["SubGraphMetadata"]),
        ("author", "string"),
        ("license", "string"),
        ("associated_files", ["AssociatedFile"]),
        ("min_parser_version", "string"),
    ),
    "SubGraphMetadata": (
        ("name", "string"),
        ("description", "string"),
        ("input_tensor_metadata", ["TensorMetadata"]),
        ("output_tensor_metadata", ["TensorMetadata"]),
    ),
    "TensorMetadata": (
        ("name", "string"),
        ("description", "string"),
        ("dimension_names", None),
        ("content", "Content"),
        ("process_units", ["ProcessUnit"]),
        ("stats", "Stats"),
        ("associated_files", ["AssociatedFile"]),
    ),
    "Content": (("properties", {1: "FeatureProperties", 2: "ImageProperties"}),),
    "ProcessUnit": (("options", {1: "NormalizationOptions"}),),
    "FeatureProperties": (),
    "ImageProperties": (("color_space", "byte"),),
    "NormalizationOptions": (("mean", "floats"), ("std", "floats")),
    "Stats": (("max", "floats"), ("min", "floats")),
    "AssociatedFile": (("name", "string"), ("description", "string"), ("type", "byte"), ("locale", "string")),
}


def _slots(table: str) -> list[tuple[int, str, Kind]]:
    """(number, name, kind) of each field; of a union the number of its value."""
    slots, number = [], 0
    for name, kind in TABLES[table]:
        number += isinstance(kind, dict)
        slots.append((number, name, kind))
        number += 1
    return slots


def _pack(builder: flatbuffers.Builder, table: str, values: Mapping[str, Any]) -> int:
    """Writes a table, its parts first; fields without a value are left out."""
    numbers: list[tuple[int, int]] = []
    offsets: list[tuple[int, int]] = []
    for number, name, kind in _slots(table):
        value = values.get(name)
        if not value and value != {}:
            continue
        if kind == "byte":
            numbers.append((number, value))
        elif isinstance(kind, dict):
            member, fields = value
            numbers.append((number - 1, next(code for code, known in kind.items() if known == member)))
            offsets.append((number, _pack(builder, member, fields)))
        else:
            offsets.append((number, _pack_value(builder, kind, value)))
    builder.StartObject(max((number for number, *_ in _slots(table)), default=-1) + 1)
    for number, value in numbers:
        builder.PrependUint8Slot(number, value, 0)
    for number, offset in offsets:
        builder.PrependUOffsetTRelativeSlot(number, offset, 0)
    return builder.EndObject()


def _pack_value(builder: flatbuffers.Builder, kind: Kind, value: Any) -> int:
    if kind == "string":
        return builder.CreateString(value)
    if kind == "floats":
        builder.StartVector(4, len(value), 4)
        for number in reversed(value):
            builder.PrependFloat32(number)
        return builder.EndVector()
    if isinstance(kind, list):
        offsets = [_pack(builder, kind[0], item) for item in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    return _pack(builder, kind, value)


class _Unpacker:
    """Reads tables as dicts, with no more parts than the buffer has bytes: parts may lie in one another."""

    def __init__(self, content: bytes):
        self.content = content
        self.left = len(content)

    def table(self, name: str, start: int) -> dict[str, Any]:
        self._spend(4)
        table = Table(self.content, start)
        values: dict[str, Any] = {}
        for number, field, kind in _slots(name):
            offset = table.Offset(4 + 2 * number)
            if not offset or kind is None:
                continue
            if isinstance(kind, dict):
                type_offset = table.Offset(2 + 2 * number)
                code = table.Get(number_types.Uint8Flags, type_offset + table.Pos) if type_offset else 0
                if code in kind:  # others are of no use here
                    values[field] = kind[code], self.table(kind[code], table.Indirect(offset + table.Pos))
            else:
                values[field] = self._value(table, kind, offset)
        return values

    def _value(self, table: Table, kind: Kind, offset: int) -> Any:
        if kind == "byte":
            return table.Get(number_types.Int8Flags, offset + table.Pos)
        if kind == "string":
            text = table.String(offset + table.Pos)
            self._spend(len(text))
            return text.decode()
        if kind == "floats":
            length, start = table.VectorLen(offset), table.Vector(offset)
            self._spend(4 * length)
            return list(struct.unpack_from(f"<{length}f", self.content, start))
        if isinstance(kind, list):
            length, start = table.VectorLen(offset), table.Vector(offset)
            self._spend(4 * length)
            return [self.table(kind[0], table.Indirect(start + 4 * index)) for index in range(length)]
        return self.table(kind, table.Indirect(offset + table.Pos))

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError("its parts overlap")
