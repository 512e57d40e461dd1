"""Training batches per second from memory, from a streamed image folder and from streamed TFRecords.

    python benchmarks/input_pipeline.py [--note TEXT]

The same synthetic photographs in all three, JPEG of 160x160 pixels resized to 96x96, batches of 32, no model: what the
input pipeline gives at most. The sources take turns, an epoch each. Writes results/input_pipeline.json and
results/input_pipeline.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf
from PIL import Image

from mobileqat.batches import TrainingBatches
from mobileqat.data import load_dataset
from mobileqat.pipeline import environment

RESULTS = Path(__file__).parent / "results"
IMAGES, CLASSES, SIZE, TARGET, BATCH, REPEATS = 1500, 5, 160, (96, 96), 32, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    note = parser.parse_args().note
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["MOBILEQAT_CACHE"] = str(root / "cache")
        write_images(root)
        batches = {source: TrainingBatches(dataset, BATCH, None, 0) for source, dataset in load(root).items()}
        for training in batches.values():
            epoch(training)  # traces, fills the page cache
        rows: dict[str, list[dict]] = {source: [] for source in batches}
        for _ in range(REPEATS):
            for source, training in batches.items():
                rows[source].append(epoch(training))
    write(rows, note)


def write_images(root: Path) -> None:
    """The same photographs as a folder per class and as four TFRecord files."""
    random = np.random.RandomState(0)
    writers = [tf.io.TFRecordWriter(str(root / f"x-{shard}.tfrecord")) for shard in range(4)]
    for index in range(IMAGES):
        label = index % CLASSES
        # Smooth, so that a file is about as large as a photograph's.
        coarse = Image.fromarray(random.randint(0, 256, (10, 10, 3), dtype=np.uint8))
        content = io.BytesIO()
        coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        folder = root / "images" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.jpg").write_bytes(content.getvalue())
        features = {
            "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[content.getvalue()])),
            "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        writers[index % len(writers)].write(example.SerializeToString())
    for writer in writers:
        writer.close()


def load(root: Path) -> dict:
    images = {"path": str(root / "images"), "image_size": TARGET}
    return {
        "image folder in memory": load_dataset("image_folder", stream=False, **images),
        "image folder, streamed": load_dataset("image_folder", stream=True, **images),
        "TFRecord, streamed": load_dataset("tfrecord", path=str(root), image_size=TARGET, stream=True),
    }


def epoch(batches: TrainingBatches) -> dict:
    wall, cpu, samples = time.perf_counter(), time.process_time(), 0
    for x, _ in batches.starting().take(batches.steps):
        samples += len(x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"samples": samples, "wall_s": wall, "cpu_s": cpu}


def write(rows: dict[str, list[dict]], note: str) -> None:
    found = {"date": datetime.date.today().isoformat(), "environment": environment(), "note": note, "epochs": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "input_pipeline.json").write_text(json.dumps(found, indent=1) + "\n")
    first = next(iter(rows.values()))
    lines = [
        "# Input pipeline: in memory and streamed",
        "",
        f"{found['date']}, {os.cpu_count()} processors, TensorFlow {tf.__version__}. {note} Made by "
        f"`benchmarks/input_pipeline.py`: {first[0]['samples']} JPEG images of {SIZE}x{SIZE} pixels resized to "
        f"{TARGET[0]}x{TARGET[1]}, batches of {BATCH}, without a model; medians (smallest to largest) of {REPEATS} "
        "epochs in turns.",
        "",
        "| | samples/s | to memory, same turn | CPU ms per sample |",
        "|---|---|---|---|",
    ]
    for source, epochs in rows.items():
        rates = [row["samples"] / row["wall_s"] for row in epochs]
        ratios = [base["wall_s"] / row["wall_s"] for base, row in zip(first, epochs, strict=True)]
        cpu = [1000 * row["cpu_s"] / row["samples"] for row in epochs]
        lines.append(f"| {source} | {spread(rates, 0)} | {spread(ratios, 4)} | {spread(cpu, 3)} |")
    (RESULTS / "input_pipeline.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
