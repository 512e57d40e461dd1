"""Samples read by number: the same values as in memory, in the same batches, with little memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_checkpoint import Memory, epoch_of
from test_train import float_model

from mobileqat import pipeline
from mobileqat.batches import TrainingBatches, data_errors, validation_batches
from mobileqat.calibrate import calibrate
from mobileqat.checkpoint import Checkpoint
from mobileqat.convert import convert
from mobileqat.data import Streamed, calibration_samples, folder, in_batches, load_dataset, stream
from mobileqat.errors import DataError
from mobileqat.quantize import quantize_model
from mobileqat.recipe import Augment, Training
from mobileqat.train import fit

SPLITS = ("train", "validation", "test")


class Numbers:
    """Sample i is 2x1 pixels of value i; a number in `lost` cannot be read."""

    shape = (2, 1)

    def __init__(self, count=200):
        self.count, self.lost, self.reads = count, set(), []

    def __len__(self):
        return self.count

    def read(self, index):
        self.reads.append(index)
        if index in self.lost:
            raise DataError(f"sample {index} is gone.\nPut it back.")
        return np.full(self.shape, index, np.uint8)


def write_images(root, count=24, size=(8, 8)):
    """root/{ant,bee,cat,dog}/NN.png in grey, `count` each, noise of another level for each class."""
    random = np.random.RandomState(0)
    for level, name in enumerate(("ant", "bee", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = (random.randint(0, 100, size) + 50 * level).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("stream") / "images")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))


def load(path, **options):
    return load_dataset("image_folder", path=str(path), channels=1, **options)


# --- the face of an array


def test_it_behaves_like_an_array():
    array = np.repeat(np.arange(200, dtype=np.uint8), 2).reshape(200, 2, 1)
    x = Streamed(Numbers())
    assert (x.shape, x.ndim, x.dtype, len(x)) == (array.shape, array.ndim, array.dtype, len(array))
    for key in (slice(None), slice(3, 90, 7), slice(-5, None), np.array([5, 3, 3, 199]), np.arange(0)):
        np.testing.assert_array_equal(np.asarray(x[key]), array[key])
    np.testing.assert_array_equal(x[7], array[7])
    np.testing.assert_array_equal(x[-1], array[-1])
    np.testing.assert_array_equal(np.asarray(x[50:150][np.array([0, -1])]), array[50:150][[0, -1]])
    np.testing.assert_array_equal(np.stack(list(x[:3])), array[:3])
    assert [len(batch) for batch in x.batches(64)] == [64, 64, 64, 8]
    np.testing.assert_array_equal(np.concatenate(list(x.batches(64))), array)
    converted = x.astype(np.float32)
    assert converted.dtype == np.asarray(converted).dtype == np.float32 and x.dtype == np.uint8
    with pytest.raises(IndexError):
        x[200]
    with pytest.raises(ValueError, match="read into a new array"):
        np.asarray(x, copy=False)


def test_nothing_is_read_before_it_is_needed():
    x = Streamed(Numbers())
    chosen = x[10:100][::10].astype(np.float32)
    assert x.reader.reads == []
    np.asarray(chosen)
    assert sorted(x.reader.reads) == list(range(10, 100, 10))


def test_the_first_error_in_order_is_raised():
    x = Streamed(Numbers())
    x.reader.lost = {150, 20, 180}
    with pytest.raises(DataError, match="sample 20 is gone"):
        np.asarray(x)


def test_functions_of_samples_see_them_in_batches(monkeypatch):
    monkeypatch.setattr(stream, "BATCH_BYTES", 4 * 2 * 70)  # 70 samples fit
    seen = []

    def double(x):
        seen.append(len(x))
        return 2.0 * x

    x = Streamed(Numbers())
    expected = 2.0 * np.asarray(x)
    np.testing.assert_array_equal(in_batches(double, x, multiple=32), expected)
    assert seen == [64, 64, 64, 8]
    np.testing.assert_array_equal(in_batches(double, np.asarray(x)), expected)
    assert seen[4:] == [200], "what is in memory stays whole"


# --- image folders


def test_a_streamed_folder_has_the_values_of_one_in_memory(images):
    streamed, whole = load(images, stream=True), load(images, stream=False)
    for name in SPLITS:
        a, b = getattr(streamed, name), getattr(whole, name)
        assert isinstance(a.x, Streamed) and isinstance(b.x, np.ndarray)
        assert np.asarray(a.x).dtype == b.x.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a.x), b.x)
        np.testing.assert_array_equal(a.y, b.y)
    assert (streamed.class_names, streamed.value_range) == (whole.class_names, whole.value_range)
    for count in (1, 30, 1000):
        drawn = calibration_samples(streamed, count, seed=3)
        assert isinstance(drawn, np.ndarray)
        np.testing.assert_array_equal(drawn, calibration_samples(whole, count, seed=3))


def test_large_folders_are_streamed(images, monkeypatch):
    size = 4 * 24 * 8 * 8 * 4
    monkeypatch.setattr(stream, "STREAM_ABOVE_BYTES", size)
    assert isinstance(load(images).train.x, np.ndarray)
    monkeypatch.setattr(stream, "STREAM_ABOVE_BYTES", size - 1)
    assert isinstance(load(images).train.x, Streamed)
    assert isinstance(load(images, stream=False).train.x, np.ndarray)
    with pytest.raises(DataError, match="stream must be true, false or left out\\. Received: stream='yes'"):
        load(images, stream="yes")


def test_broken_images_are_found_before_training(tmp_path):
    root = write_images(tmp_path / "images", 4)
    (root / "bee" / "02.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*bee/02\.png"):
        load(root, stream=True)
    with pytest.warns(UserWarning, match="1 broken images are left out"):
        streamed = load(root, stream=True, broken="skip")
    with pytest.warns(UserWarning, match="1 broken images are left out"):
        whole = load(root, stream=False, broken="skip")
    np.testing.assert_array_equal(np.asarray(streamed.train.x), whole.train.x)
    with pytest.warns(UserWarning, match="1 broken images are left out"):  # the cache remembers what was broken
        assert len(load(root, stream=True, broken="skip").train.x) == len(whole.train.x)


def test_images_of_another_size_are_found_before_training(tmp_path):
    root = write_images(tmp_path / "images", 4)
    Image.new("L", (9, 8)).save(root / "cat" / "03.png")
    for broken in ("refuse", "skip"):
        with pytest.raises(DataError, match=r"cat/03\.png has 8x9 pixels .* has 8x8\. Set image_size"):
            load(root, stream=True, broken=broken)


def test_all_images_are_read_once_and_again_when_one_changes(tmp_path, monkeypatch):
    root = write_images(tmp_path / "images", 4)
    decode, decoded = folder.read_image, []
    monkeypatch.setattr(folder, "read_image", lambda path, *options: decoded.append(path) or decode(path, *options))
    options = {"stream": True, "image_size": (8, 8)}
    load(root, **options)
    assert len(decoded) == 16
    load(root, **options)
    assert len(decoded) == 16, "the cache knows that they are whole"
    (root / "dog" / "01.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/01\.png"):
        load(root, **options)
    with pytest.raises(DataError, match=r"dog/01\.png"):  # what was refused is not remembered as whole
        load(root, **options)


@pytest.mark.parametrize("damage", [b"", b"no archive", lambda content: content[:-40]])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    root = write_images(tmp_path / "images", 4)
    load(root, stream=True)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole) if callable(damage) else damage)
    load(root, stream=True)
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [whole]


def test_a_file_that_is_gone_is_named(tmp_path):
    root = write_images(tmp_path / "images", 4)
    dataset = load(root, stream=True)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"images/.*\.png is gone since the folder was listed. Put it back"):
        np.asarray(dataset.train.x)
    (tmp_path / "elsewhere").rename(root)
    np.asarray(dataset.train.x)


# --- batches and training

AUGMENTS = {"plain": None, "augmented": Augment(flip=True, shift=2, cutout=3)}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_are_those_of_data_in_memory(images, augment):
    streamed, whole = load(images, stream=True), load(images, stream=False)
    a, b = (TrainingBatches(dataset, 16, AUGMENTS[augment], seed=5) for dataset in (streamed, whole))
    assert a.starting().element_spec == b.starting().element_spec
    for epoch, start in ((0, 0), (3, 0), (3, 2)):
        for (x, y), (wanted_x, wanted_y) in zip(epoch_of(a, epoch, start), epoch_of(b, epoch, start), strict=True):
            np.testing.assert_array_equal(x, wanted_x)
            np.testing.assert_array_equal(y, wanted_y)
    for (x, y), (wanted_x, wanted_y) in zip(validation_batches(streamed, 3), validation_batches(whole, 3), strict=True):
        np.testing.assert_array_equal(x, wanted_x)
        np.testing.assert_array_equal(y, wanted_y)


def test_validation_batches_of_large_samples_are_smaller(images, monkeypatch):
    dataset = load(images, stream=True)
    monkeypatch.setattr(stream, "BATCH_BYTES", 4 * 64 * 5)
    assert [len(x) for x, _ in validation_batches(dataset)] == [5, 3]


def test_training_on_streamed_data_goes_on_from_any_step(images, monkeypatch):
    monkeypatch.setattr(Checkpoint, "SECONDS", 0.0)
    settings = Training(epochs=2, learning_rate=0.01, batch_size=16)
    options = {"seed": 3, "augment": Augment(shift=1)}
    whole, everything = float_model(), Memory()
    history = fit(whole, load(images, stream=False), settings, storage=everything, **options)
    for found in (None, everything.written[2], everything.written[-1]):
        keras.utils.set_random_seed(99)
        model = float_model()
        again = fit(model, load(images, stream=True), settings, storage=Memory(found), **options)
        for a, b in zip(model.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        for row, wanted in zip(again.epochs, history.epochs, strict=True):
            assert {**row, "seconds": 0} == {**wanted, "seconds": 0}


DETERMINISTIC = """
    import hashlib, sys
    import tensorflow as tf
    from mobileqat.batches import TrainingBatches
    from mobileqat.data import load_dataset
    from mobileqat.recipe import Augment

    if sys.argv[2] == "deterministic":
        tf.config.experimental.enable_op_determinism()
    tf.random.set_seed(0)
    dataset = load_dataset("image_folder", path=sys.argv[1], channels=1, stream=True)
    batches = TrainingBatches(dataset, 16, Augment(shift=1), 3)
    batches = batches.starting().take(2 * batches.steps)
    print(hashlib.sha256(b"".join(x.numpy().tobytes() + y.numpy().tobytes() for x, y in batches)).hexdigest())
"""


def test_deterministic_mode_gives_the_same_batches(images):
    """It cannot be switched off again, hence processes of their own."""
    digests = set()
    for how in ("deterministic", "as it is"):
        command = [sys.executable, "-c", textwrap.dedent(DETERMINISTIC), str(images), how]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout.split()[-1])
    assert len(digests) == 1


def test_errors_keep_their_kind_on_the_way_through_tensorflow(images):
    dataset = load(images, stream=True)
    dataset.train.x.reader.files[:] = [f"{file}.gone" for file in dataset.train.x.reader.files]
    with pytest.raises(DataError, match=r"^.*\.png\.gone is gone since the folder was listed\. Put it back\.$"):
        fit(float_model(), dataset, Training(epochs=1))
    with pytest.raises(DataError, match=r"^two\nlines$"), data_errors():
        list(tf.data.Dataset.range(1).map(lambda x: tf.numpy_function(fail, [x], tf.int64)))
    with pytest.raises(tf.errors.UnknownError), data_errors():
        raise tf.errors.UnknownError(None, None, "something else")


def fail(x):
    raise DataError("two\nlines")


def test_commands_work_on_streamed_data(images, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_BYTES", 4 * 64 * 64)  # 64 images
    streamed, whole = load(images, stream=True), load(images, stream=False)
    quantized = quantize_model(float_model(), input_range=whole.value_range)
    calibrate(quantized, calibration_samples(streamed, 32, seed=0))
    quantized.save(tmp_path / "model.keras")
    (tmp_path / "model.tflite").write_bytes(convert(quantized))
    for name in ("model.keras", "model.tflite"):
        a, b = (pipeline.evaluate_file(tmp_path / name, data, None, "litert", 1) for data in (streamed, whole))
        assert a == b and a["samples"] == len(whole.test.y)
    a, b = (
        pipeline.verify_model(quantized, tmp_path / "model.tflite", data, 20, "litert") for data in (streamed, whole)
    )
    assert a == b and a.passed and a.end_to_end.samples == 20
    path = tmp_path / "model.keras"
    a, b = (pipeline.analyze_model(path, data, "w8a8", "minmax", 32, 8).to_dict() for data in (streamed, whole))
    assert a == b


# --- memory

MEMORY = """
    import sys
    import numpy as np
    from mobileqat.batches import TrainingBatches, validation_batches
    from mobileqat.data import in_batches, load_dataset

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    def use(path, stream):
        dataset = load_dataset("image_folder", path=path, stream=stream)
        batches = TrainingBatches(dataset, 8, None, 0)
        for _ in batches.starting().take(batches.steps): pass
        for _ in validation_batches(dataset): pass
        return in_batches(lambda x: x.mean((1, 2, 3)), dataset.test.x).sum() + len(dataset.train.x)

    use(sys.argv[1], True)  # what the libraries need once
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    use(sys.argv[2], sys.argv[3] == "stream")
    print(status("VmHWM") - before)
"""


def growth_mib(small, large, how):
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), small, large, how]
    # glibc's arenas, one per thread, would blur what is measured.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return float(result.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_does_not_grow_with_the_data(tmp_path):
    for folder_name, count in (("small", 4), ("large", 160)):
        for name in ("ant", "bee", "cat", "dog"):
            (tmp_path / folder_name / name).mkdir(parents=True)
            image = Image.new("RGB", (200, 200), "blue")
            for index in range(count):
                image.save(tmp_path / folder_name / name / f"{index}.png")
    data_mib = 640 * 200 * 200 * 3 * 4 / 2**20
    allowed_mib = 120
    assert data_mib > 2.4 * allowed_mib
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    assert growth_mib(small, large, "stream") < allowed_mib
    assert growth_mib(small, large, "memory") > data_mib, "the measurement sees what is held"
