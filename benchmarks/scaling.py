"""What a second worker gives: QAT of ResNet8 by one process and by two, each with one thread, in turns.

    python benchmarks/scaling.py [--rounds N] [--note TEXT]

The global batch is 128 in both; an epoch is 2,048 random 32x32x3 samples.  Quoted is the wall time of the epochs after
the first, which traces.  Two workers on one machine share its memory and talk over loopback: what is measured is the
cost of synchronization (gradients, BatchNormalization, ranges), no network.  Results: results/scaling.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

BATCH, SAMPLES, EPOCHS, CLASSES = 128, 2048, 4, 10
WORKERS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing; goes into the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(train()))
        return
    measured: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(options.rounds):
        for count in WORKERS:
            measured[count].append(statistics.median(run(count)))
            print(count, "workers:", measured[count][-1], "s per epoch", flush=True)
    save(measured, options)


def run(count: int) -> list[float]:
    """Seconds of each epoch but the first, on the first of `count` workers."""
    addresses = [f"localhost:{port}" for port in free_ports(count)]
    started = []
    for index in range(count):
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        environment |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        if count > 1:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        command = [sys.executable, __file__, "--worker"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{count} workers ended with {[process.returncode for process in started]}")
    return json.loads(outputs[0].splitlines()[-1])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def train() -> list[float]:
    from mobileqat.distribute import make_strategy

    strategy = make_strategy("multi_worker" if "TF_CONFIG" in os.environ else "none")
    import keras
    import numpy as np

    import mobileqat
    from mobileqat.data import Dataset, Split
    from mobileqat.models import build_model
    from mobileqat.recipe import QatTraining
    from mobileqat.train import fit

    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        x = rng.integers(0, 256, (count, 32, 32, 3)).astype("float32")
        return Split(x, np.arange(count) % CLASSES)

    names = tuple(map(str, range(CLASSES)))
    dataset = Dataset("random", split(SAMPLES), split(CLASSES), split(CLASSES), names, (0.0, 255.0))
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = mobileqat.quantize_model(build_model("resnet8", (32, 32, 3), CLASSES, {}))
        mobileqat.calibrate(model, dataset.train.x[:BATCH])
    # Nothing that traces the step anew in mid-training.
    settings = QatTraining(
        epochs=EPOCHS, batch_size=BATCH, distillation=0.0, freeze_observers_after=1.0, freeze_batch_norm_after=1.0
    )
    return [epoch["seconds"] for epoch in fit(model, dataset, settings).epochs[1:]]


def save(measured: dict[int, list[float]], options: argparse.Namespace) -> None:
    from mobileqat.bench.host import describe_machine

    machine = describe_machine()
    names = ("tensorflow", "keras", "mobileqat")
    packages = {name: metadata.version(name) for name in names}
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine,
        "packages": packages,
        "note": options.note,
        "seconds_per_epoch": measured,
    }
    (HERE / "results" / "scaling.json").write_text(json.dumps(facts, indent=1) + "\n")
    speedups = [one / two for one, two in zip(measured[1], measured[2], strict=True)]
    lines = [
        "# What a second worker gives",
        "",
        f"{facts['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{', '.join(f'{name} {version}' for name, version in packages.items())}.",
        f"Made by `benchmarks/scaling.py`: QAT of ResNet8, global batch {BATCH}, workers of one thread each on one "
        f"machine. {options.note}".rstrip(),
        "",
        "| workers | seconds per epoch of 2,048 samples, median of rounds | lowest to highest |",
        "|---|---|---|",
    ]
    for count, seconds in measured.items():
        lines.append(f"| {count} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    lines += [
        "",
        f"Speed-up, round by round: {', '.join(f'{speedup:.2f}' for speedup in speedups)} (2 would be perfect).",
    ]
    (HERE / "results" / "scaling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
