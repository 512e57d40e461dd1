"""Code that runs one `.tflite` file in a program of one's own: its preprocessing, quantized input and output, labels.

The numbers in it are the file's; `LANGUAGES` is the table of templates.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from mobileqat import flatbuffer
from mobileqat.errors import MobileQatError
from mobileqat.metadata import Metadata, read_metadata


@dataclass(frozen=True)
class Language:
    """Where its template is, what a file of it is called, and its names of element types."""

    template: str
    file_name: str
    types: dict[str, str]


LANGUAGES = {
    "python": Language("python.py.j2", "run_{stem}.py", {name: name for name in ("int8", "uint8", "int16", "float32")}),
    "kotlin": Language(
        "kotlin.kt.j2", "{class_name}.kt", {"int8": "Byte", "uint8": "UByte", "int16": "Short", "float32": "Float"}
    ),
}


def write_snippet(path: str | Path, language: str) -> str:
    """The program text for a file.

    Args:
        path: of a `.tflite` file with one input and one output, and a batch of 1.
        language: a key of `LANGUAGES`.

    Raises:
        FlatbufferError: the file is broken.
        MobileQatError: no such language, or a file that the template has nothing for.
    """
    if language not in LANGUAGES:
        raise MobileQatError(f"There is no snippet in '{language}'. Expected one of: {', '.join(LANGUAGES)}.")
    path, row = Path(path), LANGUAGES[language]
    model = flatbuffer.read(path)
    tensors = {"input": _only(model, model.inputs, "input"), "output": _only(model, model.outputs, "output")}
    for role, tensor in tensors.items():
        if tensor.dtype not in row.types or (tensor.dtype != "float32" and tensor.scale is None):
            raise MobileQatError(
                f"The {role} '{tensor.name}' of '{path}' is {tensor.dtype} with scale {tensor.scale}. Snippets are for "
                f"{', '.join(row.types)}, integers with a scale."
            )
    metadata = read_metadata(path) or Metadata("")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mobileqat", "snippets"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"kotlin": _kotlin, "python": ascii, "number": _number}
    return environment.get_template(row.template).render(
        file=path.name,
        program=file_name(path, language),
        class_name=class_name(path.stem),
        size=model.size_bytes,
        sha256=hashlib.sha256(model.content).hexdigest(),
        types=row.types,
        bounds=_bounds(tensors["input"].dtype),
        metadata=metadata,
        **tensors,
    )


def file_name(path: str | Path, language: str) -> str:
    """What a snippet's file is called by custom."""
    stem = Path(path).stem
    return LANGUAGES[language].file_name.format(
        stem=re.sub(r"\W+", "_", stem, flags=re.ASCII), class_name=class_name(stem)
    )


def class_name(stem: str) -> str:
    """`mobile_net-v2` -> `MobileNetV2`; digits in front are left out."""
    words = re.findall(r"[A-Za-z0-9]+", stem)
    return "".join(word[0].upper() + word[1:] for word in words).lstrip("0123456789") or "Model"


def _only(model: flatbuffer.Model, indices: tuple[int, ...], role: str) -> flatbuffer.TensorDetails:
    if len(indices) != 1:
        raise MobileQatError(
            f"The file has {len(indices)} {role}s. Snippets are for files with one input and one output."
        )
    tensor = flatbuffer.details(model.tensors[indices[0]])
    if len(tensor.shape) < 2 or tensor.shape[0] != 1:
        raise MobileQatError(
            f"The {role} '{tensor.name}' has shape {tensor.shape}. Snippets are for a batch of 1: convert with one."
        )
    return tensor


def _bounds(dtype: str) -> tuple[int, int]:
    return (0, 0) if dtype == "float32" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def _number(value: float) -> str:
    """The shortest text that reads back as the same float32."""
    return np.format_float_scientific(np.float32(value), trim="0")


def _kotlin(text: str) -> str:
    """A string literal, in ASCII."""
    return json.dumps(text).replace("$", "\\$")
