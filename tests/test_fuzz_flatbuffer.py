"""Damaged `.tflite` files: an answer or a FlatbufferError, soon and in little memory; what passes kills no interpreter.

`MOBILEQAT_FUZZ=100 pytest tests/test_fuzz_flatbuffer.py` tries a hundred times as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random

import keras
import mutations
import numpy as np
import pytest
import tensorflow as tf
import victim
from contract import give_trained_weights, samples_of
from keras import layers as L
from keras import ops
from opbuild import Operand, build

from mobileqat import flatbuffer
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.errors import FlatbufferError
from mobileqat.quantize import quantize_model

FACTOR = int(os.environ.get("MOBILEQAT_FUZZ", 1))
DATA = os.environ.get("MOBILEQAT_DATA")
REAL_FILES = (
    sorted(path for part in ("mlperf-tiny", "tflite-micro") for path in Path(DATA, part).rglob("*.tflite"))
    if DATA
    else []
)
SLOWEST_S = 10.0
LARGEST_REAL_BYTES = 20_000
# Objects for what a small file holds; what is large in a file is not copied.
MEMORY_BYTES, MEMORY_PER_BYTE = 8 * 2**20, 60


def network() -> keras.Model:
    """Most kinds of operators in a small model."""
    inputs = keras.Input((6, 6, 3), name="image")
    x = L.Conv2D(4, 3, padding="same", activation="relu6")(inputs)
    y = L.DepthwiseConv2D(3, padding="same")(x)
    x = L.Concatenate()([L.Add()([x, y]), L.MaxPooling2D(2, 1, "same")(x)])
    x = ops.pad(x[:, 1:], [(0, 0), (1, 0), (0, 0), (0, 0)])
    x = L.UpSampling2D(2)(L.AveragePooling2D(2)(x))
    x = L.Conv2DTranspose(3, 3, padding="same")(x) * L.Conv2D(3, 1, activation="sigmoid")(x)
    x = ops.transpose(ops.tanh(x), (0, 2, 1, 3))
    x = L.Dense(5, activation="relu")(ops.mean(x, axis=1))
    return keras.Model(inputs, L.Dense(3, activation="softmax")(L.Flatten()(x)))


def converted(scheme: str) -> bytes:
    keras.utils.set_random_seed(0)
    model = network()
    give_trained_weights(model)
    if scheme == "float":
        return tf.lite.TFLiteConverter.from_keras_model(model).convert()
    quantized = quantize_model(model, scheme=scheme)
    calibrate(quantized, quantized.arrange(samples_of(quantized, -2.0, 2.0, count=4)))
    return convert(quantized)


@pytest.fixture(scope="module")
def files():
    """Whole files by name."""
    found = {scheme: converted(scheme) for scheme in ("w8a8", "w8a16", "w4a8", "float")}
    return found | {path.stem: path.read_bytes() for path in REAL_FILES if path.stat().st_size < LARGEST_REAL_BYTES}


def ask_everything(content: bytes) -> bool:
    """Whether the reader accepts a file; the functions that judge and change a file agree on that."""
    try:
        flatbuffer.read(content)
    except FlatbufferError as error:
        assert len(str(error)) < 2000
        return False
    json.dumps(flatbuffer.inspect(content).to_dict())
    flatbuffer.read(flatbuffer.expose_tensors(content))
    return True


def take_apart(content: bytes) -> None:
    """The same of every operator alone; details that only a copy shows may still be refused."""
    try:
        parts = flatbuffer.single_operators(content)
    except FlatbufferError:
        return
    for _, single in parts:
        ask_everything(single)


@pytest.mark.parametrize("damage", [*mutations.BYTES, mutations.fields], ids=lambda function: function.__name__)
def test_the_reader_answers_or_refuses(files, damage):
    for seed in range((8 if damage is mutations.fields else 25) * FACTOR):
        for name, content in files.items():
            damaged = damage(content, Random(seed))
            start = time.monotonic()
            try:
                if ask_everything(damaged) and seed % 4 == 0:
                    take_apart(damaged)
            except Exception as error:
                raise AssertionError(f"{damage.__name__} of {name}, seed {seed}") from error
            assert time.monotonic() - start < SLOWEST_S, f"{damage.__name__} of {name}, seed {seed}"


@pytest.mark.parametrize("damage", [mutations.words, mutations.offsets, mutations.fields])
def test_the_reader_needs_little_memory(files, damage):
    for seed in range(4 * FACTOR):
        for name, content in list(files.items())[:4]:
            damaged = damage(content, Random(seed))
            tracemalloc.start()
            ask_everything(damaged)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            limit = MEMORY_BYTES + MEMORY_PER_BYTE * len(damaged)
            assert peak < limit, f"{damage.__name__} of {name}, seed {seed}: {peak} bytes for {len(damaged)}"


# --- interpreters


def endings(folder: Path) -> list[tuple[str, str, str]]:
    """(file, kernels, "ran", "refused" or the signal that killed it) of the folder's files."""
    command = [sys.executable, victim.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=36000, check=True)
    return [tuple(line.split()) for line in done.stdout.splitlines()]


def survivors(files: dict[str, bytes], folder: Path, count: int) -> None:
    """Writes so many damaged files that the reader accepts, named by what reproduces them."""
    kinds = (*[mutations.fields] * 4, mutations.words, mutations.structure_bits, mutations.offsets, mutations.bits)
    seed = written = 0
    while written < count:
        random = Random(seed)
        name = random.choice(list(files))
        damage = random.choice(kinds)
        damaged = damage(files[name], random)
        if damaged != files[name] and ask_everything(damaged):
            (folder / f"{name}-{damage.__name__}-{seed}.tflite").write_bytes(damaged)
            written += 1
        seed += 1


def test_what_passes_kills_no_interpreter(files, tmp_path):
    singles = {
        f"{name}.{operator.index}.{operator.name}": single
        for name in ("w8a8", "w8a16", "w4a8", "float")
        for operator, single in flatbuffer.single_operators(files[name])
    }
    survivors(files | singles, tmp_path, 150 * FACTOR)
    rows = endings(tmp_path)
    assert len(rows) == 150 * FACTOR * len(victim.KERNELS)
    # Slow is not dead: a batch of a million samples takes its time.
    killed = [row for row in rows if row[2] not in ("ran", "refused", "SIGALRM")]
    assert not killed
    assert Counter(row[2] for row in rows)["ran"] > len(rows) // 3


def test_an_interpreter_that_dies_is_noticed(tmp_path):
    """The file that the rule about scales was made for: the test above would see it."""
    operands = [Operand(np.zeros((1, 4), np.int8)), Operand(np.zeros((1, 4), np.int8), (0.1, 0))]
    content = build("ADD", 2, ("AddOptions", {}), operands, (1, 4), (0.1, 0))
    with pytest.raises(
        FlatbufferError, match="operator 0 ADD computes with tensor 0 'x0', which is int8 and has no scale"
    ):
        flatbuffer.read(content)
    (tmp_path / "add.tflite").write_bytes(content)
    assert {row[2] for row in endings(tmp_path)} == {"SIGABRT"}
