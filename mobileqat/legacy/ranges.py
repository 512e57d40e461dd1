"""Activation ranges that TFMOT has trained: read from its files, kept as JSON, set on a quantized model.

TFMOT keeps ranges by layer: of its output, or of what enters its activation (softmax).  The grid that follows from a
range is the same here and there.  Ranges of weights are not read: they are the largest magnitudes of the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileqat.errors import ModelError
from mobileqat.legacy import files
from mobileqat.legacy.translate import QUANTIZE_LAYER, WRAPPERS
from mobileqat.rundir import write_whole

if TYPE_CHECKING:
    from mobileqat.quantize import QuantizedModel

# What TFMOT's variables are ranges of: the prefix of `*_min` and `*_max` -> a `Range.of`.
OF = {"output": "output", "post_activation": "output", "pre_activation": "pre_activation"}
# Where TFMOT starts ranges, of inputs and others; one that is still there has never been trained.
INITIAL = ((0.0, 0.0), (-6.0, 6.0))


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of one tensor.

    Args:
        layer: name of an input or a layer.
        of: "output", or "pre_activation" for what its activation is given.
    """

    layer: str
    of: str
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Ranges:
    """The ranges of a model; `untrained` names layers whose range is where TFMOT starts it."""

    ranges: tuple[Range, ...]
    untrained: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        return {"schema_version": 1, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Writes a JSON file for `load_ranges`."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_whole(Path(path), lambda temporary: temporary.write_text(text))


def load_ranges(path: str | Path) -> Ranges:
    """Reads what `Ranges.save` wrote.

    Raises:
        ModelError: no such file, or not one of ranges.
    """
    try:
        content = json.loads(Path(path).read_text())
        ranges = tuple(Range(**row) for row in content["ranges"])
        for row in ranges:
            if row.of not in OF.values() or not -math.inf < row.minimum <= row.maximum < math.inf:
                raise ValueError(f"not a range: {row}")
        return Ranges(ranges, tuple(content["untrained"]))
    except FileNotFoundError:
        raise ModelError(
            f"There is no file '{path}'. Expected ranges, as import-keras2 --ranges writes them."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"'{path}' is not a file of ranges, as import-keras2 --ranges writes them: {error}") from error


def read_ranges(path: Path, config: dict | None = None) -> Ranges:
    """The ranges in an `.h5` file of a model that TFMOT has quantized; none of one that is only annotated."""
    found: list[Range] = []
    untrained: list[str] = []
    with files.open_weights(path) as group:
        for row in _read(config or files.read_config(path), group):
            if (row.minimum, row.maximum) in INITIAL:
                untrained.append(row.layer)
            else:
                found.append(row)
    return Ranges(tuple(found), tuple(untrained))


def _read(config: dict, group) -> Iterator[Range]:
    previous = ""
    layers = config["config"]["layers"]
    inner = {entry.get("name") or entry["config"]["name"]: _inner_name(entry) for entry in layers}
    for entry in layers:
        name = entry.get("name") or entry["config"]["name"]
        weights = {files.variable_name(key): array for key, array in files.named_weights(group, name).items()}
        source = previous
        previous = name
        if entry["class_name"] == QUANTIZE_LAYER:
            # What it quantizes is the output of the layer before it, most often an input.
            nodes = entry.get("inbound_nodes")
            before = nodes[0][0][0] if nodes else source
            kinds, layer = {f"{name}": "output"}, inner.get(before, before)
            previous = before
        elif entry["class_name"] in WRAPPERS:
            kinds, layer = OF, inner[name]
        else:
            continue
        for prefix, of in kinds.items():
            if f"{prefix}_min" in weights:
                yield Range(layer, of, float(weights[f"{prefix}_min"]), float(weights[f"{prefix}_max"]))


def _inner_name(entry: dict) -> str:
    """The name of the layer inside a wrapper, or of any other."""
    config = entry["config"]
    return config["layer"]["config"]["name"] if entry["class_name"] in WRAPPERS else config["name"]


@dataclass(frozen=True)
class Applied:
    """What `set_ranges` did: tensors that have a range now, tensors that still need one, ranges without a tensor."""

    tensors: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def set_ranges(model: QuantizedModel, ranges: Ranges | str | Path) -> Applied:
    """Sets imported activation ranges on a quantized model.

    The inputs of a concatenation share the grid of its output, and get its range.  Where `missing` is not empty,
    calibrate the model first and set the ranges after that.

    Args:
        model: made by `quantize_model` from the imported float model.
        ranges: from `import_keras2` or `load_ranges`, or a file of `import-keras2 --ranges`.

    Raises:
        ModelError: not a quantized model, no file of ranges, or no range fits any of its tensors.
    """
    from mobileqat.quantize import QuantizedModel

    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__}.")
    if not isinstance(ranges, Ranges):
        ranges = load_ranges(ranges)
    tensors = {(row.layer, row.of): _tensor(model.plan, row) for row in ranges.ranges}
    known = {tensor: row for row in ranges.ranges if (tensor := tensors[row.layer, row.of]) is not None}
    applied, missing = [], []
    for quantizer in {id(q): q for q in model.quantizers.values()}.values():
        for member in quantizer.members:
            bounds = _bounds(model.plan, known, member)
            if bounds:
                quantizer.set_range(member, *bounds)
                applied.append(member)
            else:
                missing.append(member)
    if not applied:
        raise ModelError(
            f"None of the {len(ranges.ranges)} ranges belongs to a tensor of model '{model.name}'. They are by layer: "
            "quantize the model that was imported together with them."
        )
    unused = [f"{layer} ({of})" for (layer, of), tensor in tensors.items() if tensor is None]
    return Applied(tuple(applied), tuple(missing), tuple(unused))


def _tensor(plan: Any, row: Range) -> str | None:
    """The tensor that a range is of, None when no tensor of the plan has that meaning."""
    pieces = [
        path for op in plan.operators for path in op.nodes if path == row.layer or path.startswith(f"{row.layer}/")
    ]
    if not pieces:
        return row.layer if row.layer in plan.inputs and row.of == "output" else None
    # A layer with a softmax was taken apart: its first piece gives what the last one is given.
    before = pieces[0] if len(pieces) > 1 else None
    path = before if row.of == "pre_activation" else pieces[-1]
    return path if path in plan.tensors else None


def _bounds(plan: Any, known: dict[str, Range], member: str) -> tuple[float, float] | None:
    """The range of an observed tensor: its own, or that of the concatenation that it goes into, as in TFMOT's files.

    The outputs of pooling have ranges there too, but kernels give them the grid of what is pooled.
    """
    joined = [
        known[operator.output]
        for operator in plan.operators
        if operator.kind == "CONCATENATION"
        and operator.output in known
        and plan.tensors[operator.output].group == plan.tensors[member].group
    ]
    row = joined[-1] if joined else known.get(member)
    return (row.minimum, row.maximum) if row else None
