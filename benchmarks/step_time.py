"""What a training step costs: float Keras 3, our QAT, and TFMOT's QAT, in turns.

    python benchmarks/step_time.py [--model NAME ...] [--rounds N] [--steps N] [--threads N]

One process per model and variant holds a compiled model and trains it on one batch when told to; the driver goes round
all of them, so that what else the machine does falls on all alike.  Quoted are ratios to float Keras 3, round by round:
CPU time of the process by its median, wall time by its best round.  Results: results/step_time.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

MODELS = {
    "mobilenetv2": ("MobileNetV2, 96x96x3", 32, (96, 96, 3)),
    "resnet8": ("ResNet8, 32x32x3", 128, (32, 32, 3)),
    "transformer": ("transformer of two blocks, 64 tokens of 64", 32, (64, 64)),
}
VARIANTS = {
    "keras": "float, Keras 3",
    "qat": "ours",
    "qat-frozen": "ours, ranges frozen",
    "qat-late": "ours, ranges and statistics frozen",
    "qat-distilled": "ours, with distillation",
    "tf_keras": "float, tf_keras",
    "tfmot": "TFMOT",
}
CLASSES = 10
MOST_OPERATORS = 12
PACKAGES = ("tensorflow", "keras", "tf-keras", "tensorflow-model-optimization", "numpy", "mobileqat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="all, unless said")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="all, unless said")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="of each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="what else the machine was doing; goes into the results")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.steps)
        return
    rows = []
    for model in options.model or MODELS:
        rows += measure(model, options.variant or list(VARIANTS), options)
    save(rows, options)


# ------------------------------------------------------------------ driver


class Worker:
    """A process with one variant; `step` makes it do a round."""

    def __init__(self, model: str, variant: str, options: argparse.Namespace):
        threads = str(options.threads)
        environment = os.environ | {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_NUM_INTRAOP_THREADS": threads,
            "TF_NUM_INTEROP_THREADS": "1",
        }
        if variant in ("tf_keras", "tfmot"):
            environment["TF_USE_LEGACY_KERAS"] = "1"
        command = [sys.executable, __file__, "--steps", str(options.steps), "--worker", model, variant]
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.start = self._read()

    def ask(self, what: str) -> dict:
        assert self.process.stdin
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def measure(model: str, variants: list[str], options: argparse.Namespace) -> list[dict]:
    workers = {variant: Worker(model, variant, options) for variant in variants}
    rows = {variant: {"model": model, "variant": variant, **worker.start} for variant, worker in workers.items()}
    running = {variant: worker for variant, worker in workers.items() if "error" not in worker.start}
    rounds: dict[str, list[dict]] = {variant: [] for variant in running}
    for _ in range(options.rounds):
        for variant, worker in running.items():
            rounds[variant].append(worker.ask("round"))
    for variant, worker in running.items():
        rows[variant]["operators"] = worker.ask("profile")
    for worker in workers.values():
        worker.close()
    for variant, measured in rounds.items():
        rows[variant] |= summary(measured, rounds.get("keras", measured))
        print(json.dumps(rows[variant]), flush=True)
    return list(rows.values())


def summary(measured: list[dict], base: list[dict]) -> dict:
    """Seconds and ratios to the base: CPU per round as median and spread, wall of the best round."""
    ratios = [own["cpu"] / other["cpu"] for own, other in zip(measured, base, strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "cpu_s": statistics.median(row["cpu"] for row in measured),
        "wall_s": min(row["wall"] for row in measured),
        "cpu_ratio": statistics.median(ratios),
        "cpu_ratio_quartiles": [quarters[0], quarters[2]],
        "wall_ratio": min(row["wall"] for row in measured) / min(row["wall"] for row in base),
        "memory_mb": max(row["memory_mb"] for row in measured),
    }


def save(rows: list[dict], options: argparse.Namespace) -> None:
    from mobileqat.bench.host import describe_machine

    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": describe_machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "note": options.note,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "rows": rows,
    }
    (HERE / "results" / "step_time.json").write_text(json.dumps(facts, indent=1) + "\n")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [
        "# What a training step costs",
        "",
        f"{facts['date']}, {facts['machine']['cpu']}, {facts['machine']['cores']} cores, {packages}.",
        f"{options.threads} thread, {options.rounds} rounds of {options.steps} steps, in turns. {options.note}",
        "Made by `benchmarks/step_time.py`. Ratios to float Keras 3: CPU time by the median of rounds, in brackets its "
        "quartiles; wall time by the best round. First trace: from the call to the first step's end. Memory: the "
        "process's peak, with TensorFlow.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        title, batch, _ = MODELS[model]
        lines += [
            "",
            f"## {title}, batch {batch}",
            "",
            "| | CPU time | wall time | first trace, s | peak memory, MB |",
            "|---|---|---|---|---|",
        ]
        of_model = [row for row in rows if row["model"] == model]
        for row in of_model:
            name = VARIANTS[row["variant"]]
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | |")
                continue
            low, high = row["cpu_ratio_quartiles"]
            lines.append(
                f"| {name} | {row['cpu_ratio']:.2f} ({low:.2f} to {high:.2f}) | {row['wall_ratio']:.2f} "
                f"| {row['trace_s']:.1f} | {row['memory_mb']:.0f} |"
            )
        lines += ["", *operator_table(of_model)]
    (HERE / "results" / "step_time.md").write_text("\n".join(lines) + "\n")


def operator_table(rows: list[dict]) -> list[str]:
    """Where a step's time goes: the operators that cost our QAT most, in each variant."""
    profiles = {row["variant"]: row["operators"] for row in rows if row.get("operators")}
    if "qat" not in profiles:
        return []
    shown = [name for name in ("keras", "qat", "qat-late", "tfmot") if name in profiles]
    header = ["milliseconds per step", *(VARIANTS[name] for name in shown)]
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for kind in profiles["qat"]:
        cells = [f"{profiles[name][kind]:.1f}" if kind in profiles[name] else "" for name in shown]
        table.append(f"| {kind} | {' | '.join(cells)} |")
    return table


# ------------------------------------------------------------------ worker


def work(model: str, variant: str, steps: int) -> None:
    """Builds a variant, answers with what its first step took, then does a round per line of standard input."""
    try:
        function, iterator, seconds = trainer(model, variant)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}), flush=True)
        return
    print(json.dumps({"trace_s": seconds}), flush=True)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(profile(function, iterator, steps)), flush=True)
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            logs = function(iterator)
        float(logs["loss"])  # waits for it
        row = {"cpu": (time.process_time() - cpu) / steps, "wall": (time.perf_counter() - wall) / steps}
        row["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(row), flush=True)


def profile(function, iterator, steps: int) -> dict[str, float]:
    """Milliseconds per step by type of operator, the most costly first, by TensorFlow's profiler."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            float(function(iterator)["loss"])
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    spent: dict[str, float] = {}
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # Operators are events called NODE:TYPE; others are of the runtime around them.
                node, is_operator, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if is_operator and node and kind.isidentifier() and kind not in ("Run", "Process"):
                    spent[kind] = spent.get(kind, 0.0) + event.duration_ps / 1e9 / steps
    return dict(sorted(spent.items(), key=lambda row: -row[1])[:MOST_OPERATORS])


def trainer(model: str, variant: str):
    """A step function over an iterator, traced, and the seconds that took."""
    import numpy as np
    import tensorflow as tf

    _, batch, shape = MODELS[model]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (batch, *shape)).astype("float32") / 128 - 1
    y = np.eye(CLASSES, dtype="float32")[rng.integers(0, CLASSES, batch)]
    if variant in ("tf_keras", "tfmot"):
        import tf_keras as keras
    else:
        import keras
    keras.utils.set_random_seed(0)
    net = BUILDERS[model](keras, shape)
    if variant == "tfmot":
        import tensorflow_model_optimization as tfmot

        net = tfmot.quantization.keras.quantize_model(net)
    elif variant.startswith("qat"):
        net = ours(net, variant, x)
    net.compile(keras.optimizers.SGD(0.001, momentum=0.9), keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    iterator = iter(tf.data.Dataset.from_tensors((x, y)).repeat())
    started = time.perf_counter()
    if variant not in ("tf_keras", "tfmot"):
        net.optimizer.build(net.trainable_variables)  # as `mobileqat.train` does
    function = net.make_train_function() or net.train_function
    for _ in range(3):
        float(function(iterator)["loss"])
    return function, iterator, time.perf_counter() - started


def ours(net, variant: str, x):
    import mobileqat
    from mobileqat.distillation import distilled
    from mobileqat.recipe import QatTraining
    from mobileqat.schedule import freeze

    quantized = mobileqat.quantize_model(net)
    mobileqat.calibrate(quantized, x)
    freeze(quantized, observers=variant in ("qat-frozen", "qat-late"), batch_norm=variant == "qat-late")
    return distilled(quantized, net, QatTraining()) if variant == "qat-distilled" else quantized


def mobilenetv2(keras, shape):
    return keras.applications.MobileNetV2(shape, weights=None, classes=CLASSES)


def resnet8(keras, shape):
    """MLPerf Tiny's: three stages of one residual block."""
    layers = keras.layers

    def block(x, filters, size, strides):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(block(inputs, 16, 3, 1))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = block(layers.ReLU()(block(x, filters, 3, strides)), filters, 3, 1)
        shortcut = x if strides == 1 else layers.Conv2D(filters, 1, strides, padding="same")(x)
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))


def transformer(keras, shape):
    layers = keras.layers
    x = inputs = keras.Input(shape)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 16)(y, y)])
        y = layers.Dense(128, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(shape[-1])(y)])
    return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


BUILDERS = {"mobilenetv2": mobilenetv2, "resnet8": resnet8, "transformer": transformer}

if __name__ == "__main__":
    main()
