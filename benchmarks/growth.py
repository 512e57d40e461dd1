"""What planning, calibration, conversion and parity take: MobileNetV2 beside TFMOT, and as a net gets deeper and wider.

    python benchmarks/growth.py [--repeats N] [--note TEXT]

MobileNetV2 at 224x224 (random weights, 32 calibration samples) goes from a float Keras model to int8 bytes, ours
and by TFMOT, each in a process of its own, in turns.  TFMOT has no calibration; its model is converted with the
ranges it starts with.  The growing nets are inverted residual blocks at 32x32.  Quoted is CPU time; the growth is the
exponent of a power law between the smallest and the largest, 1 being linear.  Results: results/growth.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

FACTORS = (1, 2, 4)
BLOCKS, WIDTH = 6, 32
STEPS = {"ours": ("quantize", "calibrate", "convert"), "tfmot": ("quantize", "convert")}
PACKAGES = ("tensorflow", "keras", "tf-keras", "tensorflow-model-optimization", "mobileqat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing; goes into the results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *numbers = options.worker
        seconds = WORKERS[kind](*map(int, numbers))
        print(json.dumps(seconds))
        return
    sizes = [(depth, 1) for depth in FACTORS] + [(1, width) for width in FACTORS[1:]]
    jobs = [("ours",), ("tfmot",)] + [("grown", str(depth), str(width)) for depth, width in sizes]
    measured: dict[tuple[str, ...], list[dict]] = {job: [] for job in jobs}
    for _ in range(options.repeats):
        for job in jobs:
            measured[job].append(child(job))
            print(*job, measured[job][-1], flush=True)
    save(measured, options)


def child(job: tuple[str, ...]) -> dict[str, float]:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    if job[0] == "tfmot":
        environment["TF_USE_LEGACY_KERAS"] = "1"
    command = [sys.executable, __file__, "--worker", *job]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(output.stdout.splitlines()[-1])


def save(measured: dict[tuple[str, ...], list[dict]], options: argparse.Namespace) -> None:
    from mobileqat.bench.host import describe_machine

    rows = [{"job": job, "seconds": seconds} for job, seconds in measured.items()]
    machine = describe_machine()
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine,
        "repeats": options.repeats,
        "note": options.note,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "rows": rows,
    }
    (HERE / "results" / "growth.json").write_text(json.dumps(facts, indent=1) + "\n")
    medians = {job: {step: median(seconds, step) for step in seconds[0]} for job, seconds in measured.items()}
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [
        "# From a float model to an int8 file, and growth",
        "",
        f"{facts['date']}, {machine['cpu']}, {machine['cores']} cores, {packages}.",
        "Made by `benchmarks/growth.py`: seconds of CPU time, medians of "
        f"{options.repeats}, one TensorFlow thread. {options.note}".rstrip(),
        "",
        "## MobileNetV2, 224x224",
        "",
        "| | quantize | calibrate, 32 samples | convert | in all |",
        "|---|---|---|---|---|",
    ]
    for name, title in (("ours", "mobileqat"), ("tfmot", "TFMOT and TFLiteConverter")):
        row = medians[name,]
        cells = [f"{row[step]:.1f}" if step in row else "" for step in STEPS["ours"]]
        lines.append(f"| {title} | {' | '.join(cells)} | {sum(row.values()):.1f} |")
    ratios = [sum(a.values()) / sum(b.values()) for a, b in zip(measured["ours",], measured["tfmot",], strict=True)]
    lines += ["", f"Ratio of the sums, repeat by repeat: {', '.join(f'{ratio:.2f}' for ratio in ratios)}."]
    for title, jobs in (
        ("Deeper", [("grown", str(factor), "1") for factor in FACTORS]),
        ("Wider", [("grown", "1", str(factor)) for factor in FACTORS]),
    ):
        steps = list(medians[jobs[0]])
        lines += ["", f"## {title}", "", f"| | {' | '.join(steps)} |", "|---|" + "---|" * len(steps)]
        for factor, job in zip(FACTORS, jobs, strict=True):
            lines.append(f"| {factor}x | {' | '.join(f'{medians[job][step]:.2f}' for step in steps)} |")
        growth = [math.log(medians[jobs[-1]][step] / medians[jobs[0]][step]) / math.log(FACTORS[-1]) for step in steps]
        lines.append(f"| exponent | {' | '.join(f'{exponent:.2f}' for exponent in growth)} |")
    lines += ["", f"1x: {BLOCKS} blocks of {WIDTH} channels. A net twice as wide has four times the weights."]
    (HERE / "results" / "growth.md").write_text("\n".join(lines) + "\n")


def median(seconds: list[dict], step: str) -> float:
    return statistics.median(row[step] for row in seconds)


# ------------------------------------------------------------------ workers


class Clock(dict):
    """CPU seconds by step."""

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self[step] = time.process_time() - started


def to_bytes(clock: Clock, model, samples):
    """The quantized model and its file, each step timed."""
    import mobileqat

    with clock("quantize"):
        quantized = mobileqat.quantize_model(model)
    with clock("calibrate"):
        mobileqat.calibrate(quantized, samples)
    with clock("convert"):
        return quantized, mobileqat.convert(quantized)


def ours() -> dict[str, float]:
    import keras
    import numpy as np

    model = keras.applications.MobileNetV2((224, 224, 3), weights=None)
    samples = np.random.default_rng(0).uniform(-1, 1, (32, 224, 224, 3)).astype("float32")
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # one batch gives the statistics; without them random weights let activations vanish
    model(samples[:8], training=True)
    clock = Clock()
    to_bytes(clock, model, samples)
    return clock


def tfmot() -> dict[str, float]:
    import tensorflow as tf
    import tensorflow_model_optimization as peer
    import tf_keras

    model = tf_keras.applications.MobileNetV2((224, 224, 3), weights=None)
    clock = Clock()
    with clock("quantize"):
        quantized = peer.quantization.keras.quantize_model(model)
    with clock("convert"):
        converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        converter.convert()
    return clock


def grown(depth: int, width: int) -> dict[str, float]:
    import numpy as np

    import mobileqat
    from mobileqat import plot_data
    from mobileqat.pipeline import plan_rows
    from mobileqat.report.page import render_html

    model = net(BLOCKS * depth, WIDTH * width)
    samples = np.random.default_rng(0).uniform(-1, 1, (32, 32, 32, 3)).astype("float32")
    clock = Clock()
    quantized, content = to_bytes(clock, model, samples)
    with clock("inspect"):
        mobileqat.inspect(content)
    with clock("verify, 8 samples"):
        parity = mobileqat.verify(quantized, content, samples[:8])
    with clock("report"):
        variant = {"layers": plot_data.noise(quantized, samples), "parity": parity.to_dict()}
        plan, graph = plan_rows(quantized), {"variant": "qat", **plot_data.graph(content)}
        render_html({"variants": {"qat": variant}, "plan": plan, "graph": graph})
    return clock


def net(blocks: int, width: int):
    """Inverted residual blocks of one width."""
    import keras
    from keras import layers

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, strides=2, padding="same")(inputs)))
    for _ in range(blocks):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(2 * width, 1, use_bias=False)(x)))
        y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        x = layers.Add()([x, layers.BatchNormalization()(layers.Conv2D(width, 1, use_bias=False)(y))])
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


WORKERS = {"ours": ours, "tfmot": tfmot, "grown": grown}

if __name__ == "__main__":
    main()
