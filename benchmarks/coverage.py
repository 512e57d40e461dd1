"""What quantizes, and into what: every architecture of tests/zoo.py and every layer case, in one run.

    MOBILEQAT_DATA=FOLDER python benchmarks/coverage.py             # writes docs/coverage.md and results/coverage.json
    python benchmarks/coverage.py --only U-Net --only Conv2D        # prints these rows and writes nothing

Models are measured in child processes, so that native code that dies takes one row with it and is named there.
`LAYER_TABLES` are dicts of test modules, `{name: builder}`; a builder gives a float model, or `(model, samples)`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/coverage.json"
DOCUMENT = ROOT / "docs/coverage.md"

ARCHITECTURE_TABLE = "zoo:ARCHITECTURES"
SECTIONS = (
    "Convolutions", "Dense", "Embedding", "Normalization", "Attention", "Merging", "Pooling", "Activations", "Resizing",
    "Shapes", "Preprocessing", "Noise", "Recurrent", "Operators", "Topologies",
)  # fmt: skip
LAYER_TABLES = tuple(f"layer_cases:{section.upper()}" for section in SECTIONS)
COMPARED_SAMPLES = 4

# Kernels whose output has one scale whatever goes in, and those that need all their inputs in one.
FIXED_KERNELS = ("LOGISTIC", "SOFTMAX", "LOG_SOFTMAX", "TANH", "L2_NORMALIZATION")
SHARING_KERNELS = ("CONCATENATION", "PACK", "MAXIMUM", "MINIMUM", "SELECT_V2", "DYNAMIC_UPDATE_SLICE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="these rows alone, printed and not written")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that one model may take")
    parser.add_argument("--measure", nargs=2, metavar=("TABLE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_into(*arguments.measure, arguments.names)
        return
    quiet_logs()
    architectures = run_table(ARCHITECTURE_TABLE, arguments.only, arguments.timeout, batch=1)
    layers = [
        row | {"section": section}
        for section, name in zip(SECTIONS, LAYER_TABLES, strict=True)
        for row in run_table(name, arguments.only, arguments.timeout, batch=40)
    ]
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": describe_environment(),
        "architectures": architectures,
        "layers": layers,
    }
    if arguments.only:
        print("\n\n".join(filter(None, (architecture_table(architectures), layer_table(layers)))))
        return
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(record))


def quiet_logs() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def describe_environment() -> dict:
    from mobileqat.pipeline import environment

    return environment()


# ------------------------------------------------------------------ processes


def load_table(table: str) -> dict[str, Any]:
    """A dict of a test module by "module:NAME"."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    module, name = table.split(":")
    return getattr(importlib.import_module(module), name)


def run_table(table: str, only: list[str] | None, timeout_s: float, batch: int) -> list[dict]:
    """Measures a table's models in child processes of `batch` models each; a child that dies is followed by another."""
    waiting = [name for name in load_table(table) if not only or name in only]
    rows: list[dict] = []
    while waiting:
        measured, end = run_child(table, waiting[:batch], timeout_s)
        if len(measured) < len(waiting[:batch]):
            measured.append({"name": waiting[len(measured)], "error": end})
        rows += measured
        for row in measured:
            print(f"{row['name']}: {row['error'] or summary(row)}", file=sys.stderr)
        waiting = waiting[len(measured) :]
    return rows


def summary(row: dict) -> str:
    return f"{sum(row['operators'].values())} operators, fully integer: {row['fully_integer']}"


def run_child(table: str, names: list[str], timeout_s: float) -> tuple[list[dict], str]:
    """Rows in the order of `names`, as many as there are, and how the child ended: "" when it ended well."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        command = [sys.executable, __file__, "--measure", table, str(file), "--", *names]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))}
        end = ""
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s * len(names),
                check=False,
            )
            if done.returncode:
                end = how_it_ended(done.returncode, done.stderr)
        except subprocess.TimeoutExpired:
            end = f"took longer than {timeout_s:g} s"
        lines = file.read_text().splitlines() if file.exists() else []
        # A model's row is written once before its float conversion, which may be fatal, and once after it.
        rows = {row["name"]: row for row in map(json.loads, lines)}
        return list(rows.values()), end


def how_it_ended(code: int, stderr: str) -> str:
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with code {code}"


# ------------------------------------------------------------------ one model


def measure_into(table: str, file: str, names: list[str]) -> None:
    """Appends a line of JSON to `file` for each model: what `measure` gives, or the error's first line."""
    quiet_logs()
    entries = load_table(table)
    with Path(file).open("a") as stream:
        for name in names:
            try:
                for row in measure(entries[name]):
                    stream.write(json.dumps({"name": name, "error": None} | row) + "\n")
                    stream.flush()
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                stream.write(json.dumps({"name": name, "error": f"{type(error).__name__}: {first}"}) + "\n")
                stream.flush()


def measure(entry) -> Iterator[dict]:
    """Rows of one model, the second completing the first with the float file's size.

    Args:
        entry: an `Architecture` of tests/zoo.py, or a builder of a small float model or of `(model, samples)`.
    """
    import keras

    import mobileqat
    from mobileqat.convert import convert_float

    model, samples, input_range, source = load(entry)
    started = time.perf_counter()
    quantized = mobileqat.quantize_model(model, input_range=input_range)
    seconds = {"quantize": time.perf_counter() - started}
    started = time.perf_counter()
    mobileqat.calibrate(quantized, samples if len(samples) > 1 else samples[0])
    seconds["calibrate"] = time.perf_counter() - started
    started = time.perf_counter()
    content = mobileqat.convert(quantized)
    seconds["convert"] = time.perf_counter() - started
    row = {
        "source": source,
        "inputs": [{"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype)} for tensor in quantized.inputs],
        "parameters": model.count_params(),
        "layers": sorted({kind for kind in layer_kinds(model) if kind != "InputLayer"}),
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
        **describe_file(content),
        **describe_parity(quantized, content, [array[:COMPARED_SAMPLES] for array in samples]),
        "float_size_bytes": None,
    }
    yield row
    del quantized
    keras.backend.clear_session()
    if source is not None:
        # TensorFlow's converter raises anything, or dies; what is missing then is one number of a row that stands.
        with contextlib.suppress(Exception):
            yield row | {"float_size_bytes": len(convert_float(model))}


def load(entry) -> tuple:
    """`(model, samples, input_range, source)` of an architecture or of a builder."""
    if not callable(entry):
        return *entry.load(), entry.input_range, entry.source
    import keras
    from contract import give_trained_weights, samples_of

    import mobileqat

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    built = entry()
    model, samples = built if isinstance(built, tuple) else (built, None)
    give_trained_weights(model)
    if samples is None:  # a subclassed model says what its inputs are once it is traced
        samples = samples_of(model if hasattr(model, "inputs") else mobileqat.quantize_model(model), -2.0, 2.0)
    return model, samples, None, None


def layer_kinds(model) -> Iterator[str]:
    """Class names of a model's layers and operators, nested models opened; operators are prefixed."""
    for operation in getattr(model, "operations", model.layers):
        if hasattr(operation, "operations") or hasattr(operation, "layers"):
            yield from layer_kinds(operation)
        else:
            name = type(operation).__name__
            yield name if hasattr(operation, "weights") else f"ops.{name}"


def describe_file(content: bytes) -> dict:
    from mobileqat import flatbuffer

    inspection = flatbuffer.inspect(content)
    reasons = Counter(requantization_reasons(flatbuffer.read(content), inspection.requantizations))
    return {
        "fully_integer": inspection.fully_integer,
        "problems": list(inspection.problems),
        "operators": dict(sorted(inspection.operator_counts.items())),
        "size_bytes": inspection.size_bytes,
        "requantizations": dict(reasons.most_common()),
    }


def describe_parity(quantized, content: bytes, samples: list) -> dict:
    """Parity with the simulation run eagerly: tracing a network of hundreds of operators takes minutes."""
    from zoo import run

    import mobileqat

    parity = mobileqat.verify(quantized, content, samples, simulated=run(quantized, samples))
    worst = min(parity.operators, key=lambda operator: (operator.identical, -operator.max_lsb))
    return {
        "weights": {"compared": parity.weights.compared, "identical": parity.weights.identical},
        "parity": {
            "compared": len(parity.operators),
            "outside": [f"{op.operator} ({op.kind})" for op in parity.operators if not op.passed],
            "worst_kind": worst.kind,
            "worst_identical": worst.identical,
            "max_lsb": max(operator.max_lsb for operator in parity.operators),
            "min_identical": min(operator.min_identical for operator in parity.operators),
            "bound_lsb": max(operator.bound_lsb for operator in parity.operators),
        },
        "end_to_end_identical": parity.end_to_end.identical,
    }


# ------------------------------------------------------------------ why a QUANTIZE stays


def requantization_reasons(file, conversions) -> Iterator[str]:
    """One reason per QUANTIZE from integers to integers, read off the file: what made its input, what reads it."""
    producers = {index: operator for operator in file.operators for index in operator.outputs}
    readers: dict[int, list] = {}
    for operator in file.operators:
        for index in operator.inputs:
            readers.setdefault(index, []).append(operator)
    for conversion in conversions:
        operator = file.operators[conversion.operator_index]
        (source,), (target,) = operator.inputs, operator.outputs
        origin = origin_of(file, producers, source)
        kinds = sorted({reader.name for reader in readers.get(target, [])})
        yield reason(
            origin,
            " and ".join(kinds) or "the model's output",
            conversion,
            shares=any(kind in SHARING_KERNELS for kind in kinds),
            read_elsewhere=len(readers[source]) > 1,
        )


def origin_of(file, producers: dict, index: int) -> str | None:
    """The operator that gave a tensor its scale, past those that keep it; None for an input of the model."""
    while index in producers:
        operator = producers[index]
        kept = [i for i in operator.inputs if i != -1 and same_grid(file.tensors[i], file.tensors[index])]
        if not kept or operator.name in FIXED_KERNELS:
            return operator.name
        index = kept[0]
    return None


def same_grid(a, b) -> bool:
    return (
        a.dtype == b.dtype
        and a.scales is not None
        and b.scales is not None
        and a.scales.tolist() == b.scales.tolist()
        and a.zero_points.tolist() == b.zero_points.tolist()
    )


def reason(origin: str | None, reader: str, conversion, *, shares: bool, read_elsewhere: bool) -> str:
    if conversion.source_dtype != conversion.target_dtype:
        return f"{conversion.source_dtype} to {conversion.target_dtype} before {reader}"
    needs = f"{reader} needs one scale for all its inputs" if shares else f"{reader} needs another"
    if origin is None:
        return f"the model's input keeps its scale, {needs}"
    if origin in FIXED_KERNELS:
        return f"{origin} has a fixed scale, {needs}"
    if read_elsewhere:
        return f"{origin} is read in its own scale elsewhere, {needs}"
    return f"{origin} gives another scale, {needs}"


# ------------------------------------------------------------------ the document

INTRODUCTION = """\
# What quantizes, and into what

Generated by `python benchmarks/coverage.py` on {date}: {cpu}, {cores} cores, Python {python}, TensorFlow {tensorflow},
Keras {keras}, LiteRT {litert}. Do not edit; numbers in full are in
[benchmarks/results/coverage.json](../benchmarks/results/coverage.json).

{passed} of {total} architectures and {layers_passed} of {layers_total} layer cases are quantized, converted to a fully
integer file, and have every operator within its parity bound.

How to read it:

- **Weights** are random but as training leaves them: offsets away from zero, BatchNormalization statistics from data
  ([tests/zoo.py](../tests/zoo.py)). MLPerf Tiny's files are trained. Ranges are calibrated on 16 samples, min/max.
- **Operators** are those of the file, by kind. Nothing is left to a float fallback where "fully integer" says yes.
- **QUANTIZE inside** counts the operators that change a tensor's scale between two integer operators, and says why each
  one is there. Every other tensor needs none: operators that must share a scale were given one range.
- **Worst operator** feeds each operator the interpreter's own integers in both worlds and compares the simulation with
  LiteRT (XNNPACK): the smallest share of identical outputs, and the largest difference in LSBs, units of the output's
  scale. The bound is in brackets. **End to end** both run freely on {samples} samples.
- **Seconds** are for quantizing, calibrating and converting together, in one process on this machine.
"""


def document(record: dict) -> str:
    environment, rows, layers = record["environment"], record["architectures"], record["layers"]
    introduction = INTRODUCTION.format(
        date=record["date"],
        cpu=environment["machine"]["cpu"],
        cores=environment["machine"]["cores"],
        python=environment["python"],
        tensorflow=environment["tensorflow"],
        keras=environment["keras"],
        litert=environment["ai-edge-litert"],
        passed=sum(map(passed, rows)),
        total=len(rows),
        layers_passed=sum(map(passed, layers)),
        layers_total=len(layers),
        samples=COMPARED_SAMPLES,
    )
    parts = [introduction, "## Architectures", architecture_table(rows), "## Operators of each", operator_table(rows)]
    if layers:
        parts.append("## Layers and operators")
        for section in SECTIONS:
            parts += [f"### {section}", layer_table([row for row in layers if row["section"] == section])]
    parts += ["## What is refused", refusal_table()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def passed(row: dict) -> bool:
    return (
        row["error"] is None
        and row["fully_integer"]
        and not row["problems"]
        and not row["parity"]["outside"]
        and row["weights"]["compared"] == row["weights"]["identical"]
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def architecture_table(rows: list[dict]) -> str:
    header = [
        "architecture", "input", "parameters", "operators", "size", "/ float", "fully integer", "QUANTIZE inside",
        "worst operator", "end to end", "seconds",
    ]  # fmt: skip
    return table(header, [[row["name"], *architecture_cells(row, len(header) - 1)] for row in rows])


def architecture_cells(row: dict, count: int) -> list[str]:
    if row["error"] is not None:
        return [row["error"], *[""] * (count - 1)]
    float_size = row["float_size_bytes"]
    reasons = [f"{number}: {why}" for why, number in row["requantizations"].items()]
    return [
        ", ".join("x".join(map(str, i["shape"])) + f" {i['dtype']}" * (i["dtype"] != "float32") for i in row["inputs"]),
        f"{row['parameters']:,}",
        f"{sum(row['operators'].values())}",
        f"{row['size_bytes']:,} B",
        f"{row['size_bytes'] / float_size:.3f}" if float_size else "float fails",
        "yes" if row["fully_integer"] and not row["problems"] else " ".join(row["problems"]),
        "; ".join(reasons) or "none",
        parity_cell(row),
        percent(row["end_to_end_identical"]),
        f"{sum(row['seconds'].values()):.1f}",
    ]


def parity_cell(row: dict) -> str:
    parity = row["parity"]
    cell = (
        f"{percent(parity['worst_identical'])} (>= {percent(parity['min_identical'])}), "
        f"{parity['max_lsb']} LSB (<= {parity['bound_lsb']})"
    )
    if parity["worst_identical"] < 1:
        cell = f"{parity['worst_kind']} {cell}"
    if outside := parity["outside"]:
        cell += f"; outside: {', '.join(outside)}"
    return cell


def percent(share: float) -> str:
    return f"{100 * share:.6g} %"


def operator_table(rows: list[dict]) -> str:
    return table(
        ["architecture", "from", "runtime operators"],
        [[row["name"], row["source"], operator_list(row)] for row in rows if row["error"] is None],
    )


def operator_list(row: dict) -> str:
    by_count = sorted(row["operators"].items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in by_count)


def layer_table(rows: list[dict]) -> str:
    header = ["case", "Keras layers and operators", "runtime operators", "fully integer", "worst operator (bound)"]
    return table(header, [[row["name"], *layer_cells(row)] for row in rows])


def refusal_table() -> str:
    """Layers that the integer runtime cannot run, by reason."""
    from mobileqat.lower_layers import REASONS

    by_reason: dict[str, list[str]] = {}
    for name, reason in REASONS.items():
        by_reason.setdefault(reason, []).append(name)
    return table(["Keras layers", "why, and what to do"], [[", ".join(n), reason] for reason, n in by_reason.items()])


def layer_cells(row: dict) -> list[str]:
    if row["error"] is not None:
        return [row["error"], "", "", ""]
    integer = "yes" if row["fully_integer"] else " ".join(row["problems"])
    return [", ".join(row["layers"]), operator_list(row), integer, parity_cell(row)]


if __name__ == "__main__":
    main()
