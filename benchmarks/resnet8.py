"""mobileqat beside TFMOT on MLPerf Tiny's ResNet8 and CIFAR-10: parity, accuracy, size, latency, in one run.

    MOBILEQAT_DATA=FOLDER python benchmarks/resnet8.py RUN_DIR --tfmot-python PYTHON

RUN_DIR is a finished run of recipes/cifar10_resnet8_w8a8.yaml; PYTHON has tensorflow-model-optimization and tf-keras.
Writes results/resnet8.json and results/resnet8.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from mobileqat.bench import measure as bench
from mobileqat.bench.record import Settings
from mobileqat.data import load_dataset
from mobileqat.evaluate import accuracy
from mobileqat.flatbuffer import inspect
from mobileqat.numerics import quantize
from mobileqat.parity import compare_outputs
from mobileqat.pipeline import environment
from mobileqat.runtime import Session
from mobileqat.schemes import QuantSpec

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--tfmot-python", default="python")
    parser.add_argument("--tfmot-steps", type=int, default=1400, help="two epochs, enough for its moving averages")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of the latency comparison")
    arguments = parser.parse_args()
    dataset = load_dataset("cifar10")
    files = {name: (arguments.run_dir / f"{name}.tflite").read_bytes() for name in ("float", "ptq", "qat")}
    simulations = {}
    for name in ("ptq", "qat"):
        with np.load(arguments.run_dir / "outputs" / f"{name}.npz") as outputs:
            simulations[name] = outputs["simulation"]
    files["tfmot"], simulations["tfmot"] = train_tfmot(arguments, dataset)
    rows = {name: measure(content, simulations.get(name), dataset) for name, content in files.items()}
    for threads in (1, 2):
        add_latency(rows, files, threads, arguments.rounds)
    write(rows)


def train_tfmot(arguments: argparse.Namespace, dataset) -> tuple[bytes, np.ndarray]:
    weights = Path(os.environ["MOBILEQAT_DATA"]) / "mlperf-tiny/models/ic01/pretrainedResnet.h5"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, x_train=dataset.train.x, y_train=dataset.train.y, x_test=dataset.test.x)
        script = Path(__file__).with_name("tfmot_resnet8.py")
        command = [arguments.tfmot_python, script, weights, data, folder, str(arguments.tfmot_steps), "0"]
        subprocess.run(list(map(str, command)), check=True)
        with np.load(Path(folder) / "tfmot.npz") as outputs:
            return (Path(folder) / "tfmot.tflite").read_bytes(), outputs["simulation"]


def measure(content: bytes, simulation: np.ndarray | None, dataset) -> dict:
    """Size, accuracy in the interpreter and, against the simulation, identical outputs and top-1 agreement."""
    session = Session(content, threads=2)
    outputs = np.asarray(session.predict(dataset.test.x))
    row = {
        "size_bytes": len(content),
        "accuracy": accuracy(outputs, dataset.test.y),
        "fully_integer": inspect(content).fully_integer,
    }
    if simulation is not None:
        details = session.outputs[0]
        integers = quantize(simulation, details.scale, details.zero_point, QuantSpec())
        parity = compare_outputs([integers], [outputs])
        row |= {"identical": parity.identical, "max_lsb": parity.max_lsb, "top1_agreement": parity.top1_agreement}
    return row


def add_latency(rows: dict, files: dict[str, bytes], threads: int, rounds: int) -> None:
    settings = Settings(threads=threads, warmup=50, runs=500)
    comparisons = [bench.measure(files, settings=settings) for _ in range(rounds)]
    for name, row in rows.items():
        medians = [comparison.records[name].cost.median for comparison in comparisons]
        ratios = [comparison.ratios[name].median for comparison in comparisons]
        row[f"latency_ms_{threads}"] = [min(medians), float(np.median(medians)), max(medians)]
        row[f"ratio_to_float_{threads}"] = [min(ratios), float(np.median(ratios)), max(ratios)]


def write(rows: dict) -> None:
    date = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    record = {"date": date, "environment": environment(), "rows": rows}
    (RESULTS / "resnet8.json").write_text(json.dumps(record, indent=1) + "\n")
    machine = record["environment"]["machine"]
    lines = [
        "# ResNet8 (MLPerf Tiny) on CIFAR-10, 10,000 test images",
        "",
        f"{date}, {machine['cpu']}, {machine['cores']} cores, TensorFlow {record['environment']['tensorflow']}, "
        f"LiteRT {record['environment']['ai-edge-litert']}. Made by `benchmarks/resnet8.py`. Latency: 500 inferences "
        "per file in turns, ratios to the float file in the same turn; median (min to max) over repeats.",
        "",
        "| | accuracy | size | simulation = interpreter | largest | same top-1 | latency, 1 thread | 2 threads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = ["", "", ""]
        if "identical" in row:
            cells = [f"{row['identical']:.3%}", f"{row['max_lsb']} LSB", f"{row['top1_agreement']:.2%}"]
        ratios = [row[f"ratio_to_float_{threads}"] for threads in (1, 2)]
        spread = [f"{median:.3f} ({low:.3f} to {high:.3f})" for low, median, high in ratios]
        cells = [f"{row['accuracy']:.2%}", f"{row['size_bytes']} B", *cells, *spread]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (RESULTS / "resnet8.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
