"""Metadata inside files: what is written is read back, the model is the same, and Android's library takes it."""

import ast
import io
import os
import subprocess
import zipfile

import keras
import numpy as np
import pytest

import mobileqat as mq
from mobileqat import flatbuffer
from mobileqat.convert import convert_float
from mobileqat.errors import FlatbufferError, MobileQatError
from mobileqat.metadata import IDENTIFIER, Metadata, add_metadata, describe, read_metadata
from mobileqat.runtime import Session

LABELS = ("cat", "Hund", "poisson d'été")
METADATA = describe("tiny", "a tiny net", LABELS, (32, 32, 3), (0.0, 255.0))
TASK_LIBRARY = os.environ.get("MOBILEQAT_TASK_LIBRARY_PYTHON")


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def files(samples):
    """One network by what its file takes and gives."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, 2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", kernel_initializer=keras.initializers.RandomNormal(stddev=9.0)),
        ]
    )
    quantized = mq.quantize_model(model, input_range=(0, 255))
    mq.calibrate(quantized, samples)
    types = ("int8", "uint8", "float32")
    found = {name: mq.convert(quantized, input_type=name, output_type=name) for name in types}
    wide = mq.quantize_model(model, "w8a16", input_range=(0, 255))
    mq.calibrate(wide, samples)
    return found | {"int16": mq.convert(wide), "float model": convert_float(model)}


NAMES = ["int8", "uint8", "float32", "int16", "float model"]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_same(files, samples, name):
    before, after = files[name], add_metadata(files[name], METADATA)
    a, b = flatbuffer.read(before), flatbuffer.read(after)
    assert (a.operators, a.inputs, a.outputs, a.signatures) == (b.operators, b.inputs, b.outputs, b.signatures)
    assert a.description == b.description
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.name, x.shape, x.dtype, x.quantized_axis, x.is_constant) == (
            y.name, y.shape, y.dtype, y.quantized_axis, y.is_constant,
        )  # fmt: skip
        for field in ("data", "scales", "zero_points"):
            one, other = getattr(x, field), getattr(y, field)
            assert (one is None and other is None) or np.array_equal(one, other)
    one, other = (flatbuffer.inspect(content).to_dict() for content in (before, after))
    assert one | {"size_bytes": 0} == other | {"size_bytes": 0}
    assert np.array_equal(Session(before).predict(samples), Session(after).predict(samples))
    # What parity and profiles make of a file.
    indices = [index for operator in a.operators for index in operator.outputs]
    exposed = [Session(flatbuffer.expose_tensors(content, indices)).predict(samples[:2]) for content in (before, after)]
    assert all(np.array_equal(x, y) for x, y in zip(*exposed, strict=True))
    singles = [[content for _, content in flatbuffer.single_operators(content)] for content in (before, after)]
    assert singles[0] == singles[1]


@pytest.mark.parametrize("name", NAMES)
def test_constants_stay_aligned(files, name):
    content = add_metadata(files[name], METADATA)
    root = flatbuffer.generated_schema().Model.GetRootAs(content)
    starts = [flatbuffer._vector_position(root.Buffers(i), 0)[0] for i in range(root.BuffersLength())]
    assert len([start for start in starts if start]) > 3
    assert all(start % 16 == 0 for start in starts)


@pytest.mark.parametrize(
    "metadata",
    [
        METADATA,
        describe("grey", "", LABELS, (8, 8, 1), (0.0, 255.0)),
        describe("sound", "not pixels", LABELS, (49, 10, 1), (-3.5, 7.25)),
        describe("unknown range", "", LABELS, (4,), None),
        Metadata("no labels"),
        Metadata("scaled", "x", LABELS, "RGB", mean=127.5, std=0.5),
    ],
    ids=lambda metadata: metadata.name,
)
def test_what_is_written_is_read_back(files, metadata):
    content = add_metadata(files["uint8"], metadata)
    assert read_metadata(content) == metadata
    assert content == add_metadata(files["uint8"], metadata)
    assert read_metadata(files["uint8"]) is None


def test_kinds_of_inputs():
    kinds = [
        describe("m", "", (), shape, span).color_space
        for shape, span in (
            ((8, 8, 3), (0.0, 255.0)), ((8, 8, 1), (0.0, 255.0)), ((8, 8, 4), (0.0, 255.0)), ((8, 8, 3), (0.0, 1.0)),
            ((8, 8, 3), None), ((8, 3), (0.0, 255.0)),
        )
    ]  # fmt: skip
    assert kinds == ["RGB", "GRAYSCALE", None, None, None, None]


def test_metadata_is_replaced(files):
    once = add_metadata(files["int8"], METADATA)
    other = Metadata("another", labels=("a", "b", "c"))
    assert add_metadata(once, METADATA) == once
    assert read_metadata(add_metadata(once, other)) == other
    assert len(add_metadata(once, other)) < len(once)


def test_labels_are_a_zip_behind_the_model(files):
    content = add_metadata(files["int8"], METADATA)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (entry,) = archive.infolist()
        assert archive.read("labels.txt").decode() == "cat\nHund\npoisson d'été\n"
    assert (entry.compress_type, entry.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
    bare = content[: entry.header_offset]
    assert np.array_equal(*(Session(part).predict(np.ones((1, 32, 32, 3), np.float32)) for part in (bare, content)))


@pytest.mark.parametrize("label", ["", "two\nlines", "two\rlines", " space", "tab\t", "\u2028"])
def test_labels_that_take_no_line(files, label):
    with pytest.raises(MobileQatError, match="A label takes one line"):
        add_metadata(files["int8"], Metadata("m", labels=("a", "b", label)))


def test_labels_that_do_not_fit(files):
    with pytest.raises(MobileQatError, match=r"first output has shape \(1, 3\), and there are 2 labels"):
        add_metadata(files["int8"], Metadata("m", labels=("a", "b")))


def test_damage_is_refused(files):
    """Whatever byte of the metadata is wrong: an error of ours, or metadata that can be shown."""
    content = add_metadata(files["int8"], METADATA)
    start = content.index(IDENTIFIER) - 4
    end = content.index(b"PK\x03\x04")
    refused = 0
    for position in (*range(start, min(start + 500, end)), *range(end, len(content))):
        for value in (0, 1, 127, 255):
            damaged = bytearray(content)
            damaged[position] = value
            try:
                found = read_metadata(bytes(damaged))
                assert found is None or isinstance(found.labels, tuple)
            except FlatbufferError:
                refused += 1
    assert refused > 100


def test_a_bomb_of_labels_is_refused(files, monkeypatch):
    monkeypatch.setattr("mobileqat.metadata.MAX_LABEL_BYTES", 10)
    with pytest.raises(FlatbufferError, match="more than 10 bytes of labels"):
        read_metadata(add_metadata(files["int8"], METADATA))


# ------------------------------------------------------------------ TensorFlow Lite's own reader


CLASSIFY = """
import sys
import numpy as np
from tflite_support import metadata
from tflite_support.task import vision
path, samples = sys.argv[1:]
shown = metadata.MetadataDisplayer.with_model_file(path)
assert shown.get_packed_associated_file_list() == ["labels.txt"]
classifier = vision.ImageClassifier.create_from_file(path)
for sample in np.load(samples):
    found = classifier.classify(vision.TensorImage.create_from_array(sample)).classifications[0].categories
    print([(row.category_name, row.score) for row in sorted(found, key=lambda row: row.index)])
"""


@pytest.mark.skipif(
    TASK_LIBRARY is None, reason="needs MOBILEQAT_TASK_LIBRARY_PYTHON, a Python that has tflite-support"
)
@pytest.mark.parametrize("name", ["uint8", "float32", "float model", "int8"])
def test_the_task_library_classifies_with_it(files, samples, name, tmp_path):
    path, arrays = tmp_path / "m.tflite", tmp_path / "x.npy"
    path.write_bytes(add_metadata(files[name], METADATA))
    np.save(arrays, samples[:5].astype(np.uint8))
    command = [TASK_LIBRARY, "-c", CLASSIFY, str(path), str(arrays)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if name == "int8":  # a limit of that library: it is told in the recipe's schema
        assert "Requested one of these types: kTfLiteUint8/kTfLiteFloat32, got INT8" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    session = Session(path)
    expected = session.dequantize(session.predict(samples[:5].astype(np.uint8 if name == "uint8" else np.float32)))
    for line, row in zip(done.stdout.splitlines(), expected, strict=True):
        labels, scores = zip(*ast.literal_eval(line), strict=True)
        assert labels == LABELS
        np.testing.assert_allclose(scores, row, atol=1e-3 if name == "float model" else 1e-6)
