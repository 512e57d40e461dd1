"""Instructions per inference on emulated ARM cores: float, mobileqat's int8 and TFMOT's int8 of one architecture.

    MOBILEQAT_DATA=FOLDER python benchmarks/arm_instructions.py --tfmot-python PYTHON

PYTHON has tensorflow-model-optimization and tf-keras. Every number is measured three times, in a process each. Writes
results/arm_instructions.json and results/arm_instructions.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np

import mobileqat as mq
from mobileqat.bench.arm import CPUS, EmulatedArm
from mobileqat.bench.measure import measure
from mobileqat.bench.record import Record, Settings
from mobileqat.data import load_dataset
from mobileqat.pipeline import environment

RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("litert", "tflite-runtime")
REPEATS = 3
TOLERANCE = 1e-4  # by which repeats may differ
SAMPLES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tfmot-python", default="python")
    arguments = parser.parse_args()
    files = {"ResNet8, 32x32": resnet8(arguments), "MobileNetV2, 96x96": mobilenet_v2(arguments)}
    rows = [
        row
        for model, variants in files.items()
        for cpu in CPUS
        for runtime in RUNTIMES
        for row in measure_rows(model, variants, cpu, runtime)
    ]
    profiles = {model: {cpu: operator_rows(variants, cpu) for cpu in CPUS} for model, variants in files.items()}
    write(rows, profiles)


def resnet8(arguments: argparse.Namespace) -> dict[str, bytes]:
    path = Path(os.environ["MOBILEQAT_DATA"]) / "mlperf-tiny/models/ic01/pretrainedResnet.h5"
    samples = load_dataset("cifar10").train.x[:SAMPLES]
    return variants(mq.load_model(path), samples, str(path), arguments)


def mobilenet_v2(arguments: argparse.Namespace) -> dict[str, bytes]:
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=10)
    rng = np.random.default_rng(0)
    for variable in model.weights:  # untrained offsets are 0, and what is random vanishes from layer to layer
        if variable.path.endswith("/beta"):
            variable.assign(rng.normal(0, 0.3, variable.shape))
    samples = rng.uniform(-1, 1, (SAMPLES, 96, 96, 3)).astype(np.float32)
    return variants(model, samples, "mobilenet_v2", arguments)


def variants(model: keras.Model, samples: np.ndarray, source: str, arguments) -> dict[str, bytes]:
    """The files that are compared; the first one is what ratios refer to."""
    quantized = mq.quantize_model(model)
    mq.calibrate(quantized, samples)
    files = {"float": mq.convert_float(model), "mobileqat": mq.convert(quantized)}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "tfmot.tflite"
        np.save(Path(folder) / "x.npy", samples)
        script = Path(__file__).with_name("tfmot_file.py")
        command = [arguments.tfmot_python, script, source, Path(folder) / "x.npy", target]
        subprocess.run(list(map(str, command)), check=True)
        return files | {"tfmot": target.read_bytes()}


def measure_rows(model: str, files: Mapping[str, bytes], cpu: str, runtime: str) -> list[dict]:
    """A row per file, with the median of every repeat."""
    repeats = [_records(files, cpu, runtime) for _ in range(REPEATS)]
    rows = []
    for variant in files:
        medians = [records[variant].cost.median for records in repeats]
        record = repeats[0][variant]
        assert max(medians) - min(medians) <= TOLERANCE * min(medians), (model, variant, cpu, runtime, medians)
        rows.append(
            {
                "model": model,
                "variant": variant,
                "cpu": cpu,
                "runtime": f"{record.runtime} {record.runtime_version}",
                "instructions": medians,
                "to_float": float(np.median(medians) / np.median([row["float"].cost.median for row in repeats])),
                "size_bytes": record.size_bytes,
                "operators": record.operator_counts,
                "identical_to_x86": record.agreement.identical if record.agreement else None,
                "max_lsb": record.agreement.max_lsb if record.agreement else None,
                "device": record.device,
            }
        )
        print(f"{model} {variant} {cpu} {runtime}: {medians}", flush=True)
    return rows


def _records(files: Mapping[str, bytes], cpu: str, runtime: str) -> dict[str, Record]:
    return dict(measure(files, EmulatedArm(f"arm:{cpu}"), Settings(runtime=runtime, runs=5)).records)


def operator_rows(files: Mapping[str, bytes], cpu: str) -> dict[str, dict[str, float]]:
    """Instructions by kind of operator, each measured as a model of its own."""
    settings = Settings(runs=3, profile=True)
    records = measure(files, EmulatedArm(f"arm:{cpu}"), settings, samples=0).records
    totals: dict[str, dict[str, float]] = {}
    for variant, record in records.items():
        sums = totals.setdefault(variant, {})
        for operator in record.profile:
            sums[operator.kind] = sums.get(operator.kind, 0) + operator.cost
    return totals


def write(rows: list[dict], profiles: dict) -> None:
    date = datetime.date.today().isoformat()
    record = {"date": date, "environment": environment(), "rows": rows, "operators": profiles}
    (RESULTS / "arm_instructions.json").write_text(json.dumps(record, indent=1) + "\n")
    device = rows[0]["device"]["system"]
    lines = [
        "# Instructions per inference on emulated ARM cores",
        "",
        f"{date}, {device}. Made by `benchmarks/arm_instructions.py`: batch 1, one thread, the real aarch64 builds of "
        f"the interpreters. The median of {REPEATS} processes; they differ by at most "
        f"{max(_spread(row) for row in rows):.4%}. cortex-a76 has the dot product, cortex-a53 has not. "
        "Instructions are work, not time. *Identical* is the share of output values that equal those of the same "
        "file on this machine (float kernels add in another order).",
        "",
        "| | core | runtime | float | mobileqat | TFMOT | mobileqat to float | mobileqat to TFMOT | identical |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for start in range(0, len(rows), 3):
        group = {row["variant"]: row for row in rows[start : start + 3]}
        counts = {name: float(np.median(row["instructions"])) for name, row in group.items()}
        ours = group["mobileqat"]
        cells = [f"{count / 1e6:.3f} M" for count in counts.values()]
        cells += [f"{counts['mobileqat'] / counts[name]:.3f}" for name in ("float", "tfmot")]
        cells.append(" / ".join(f"{group[name]['identical_to_x86']:.0%}" for name in group))
        lines.append(f"| {ours['model']} | {ours['cpu']} | {ours['runtime']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## By operator",
        "",
        "LiteRT, each operator measured as a model of its own, summed by kind; 3,000 instructions of each operator are "
        "the call from Python.",
        "",
        "| | core | operator | float | mobileqat | TFMOT |",
        "|---|---|---|---|---|---|",
    ]
    for model, cpus in profiles.items():
        for cpu, totals in cpus.items():
            for kind in sorted({kind for sums in totals.values() for kind in sums}):
                cells = [f"{sums[kind] / 1e6:.3f} M" if kind in sums else "" for sums in totals.values()]
                lines.append(f"| {model} | {cpu} | {kind} | {' | '.join(cells)} |")
    (RESULTS / "arm_instructions.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _spread(row: dict) -> float:
    return (max(row["instructions"]) - min(row["instructions"])) / min(row["instructions"])


if __name__ == "__main__":
    main()
