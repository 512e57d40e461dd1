"""TFRecord files: the same samples as an image folder, files as others write them, and damage of every kind."""

import gzip
import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobileqat.data import Streamed, load_dataset, tfrecord
from mobileqat.errors import DataError

SPLITS = ("train", "validation", "test")
KEYS = ("image/encoded", "image/class/label")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(index, size=(6, 5)):
    return np.random.RandomState(index).randint(0, 256, (*size, 3), dtype=np.uint8)


def encoded(image, kind="PNG"):
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind)
    return content.getvalue()


def feature(value):
    if isinstance(value, int):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def example(image, label, keys=KEYS):
    features = {keys[0]: feature(image), keys[1]: feature(label), "other": feature(7)}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)


def examples(start, count, classes=3):
    return [example(encoded(pixels(index)), index % classes) for index in range(start, start + count)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def load(path="data", **options):
    return load_dataset("tfrecord", path=str(path), **options)


def values(dataset):
    return {
        (np.asarray(getattr(dataset, name).x)[i].tobytes(), int(y))
        for name in SPLITS
        for i, y in enumerate(getattr(dataset, name).y)
    }


@pytest.fixture
def shards(own_folder):
    """Two files of train and one of test, by name: 18 + 12 + 9 records."""
    write(own_folder / "data" / "mine-train.tfrecord-00000-of-00002", examples(0, 18))
    write(own_folder / "data" / "mine-train.tfrecord-00001-of-00002", examples(18, 12))
    write(own_folder / "data" / "mine-test.tfrecord-00000-of-00001", examples(30, 9))
    return own_folder / "data"


# --- what they hold


@pytest.mark.parametrize("stream", [False, True])
def test_every_record_is_read(shards, stream):
    dataset = load(stream=stream)
    assert isinstance(dataset.train.x, Streamed if stream else np.ndarray)
    assert dataset.class_names == ("0", "1", "2") and dataset.value_range == (0, 255)
    assert [len(getattr(dataset, name).y) for name in SPLITS] == [27, 3, 9]
    expected = {(pixels(index).astype(np.float32).tobytes(), index % 3) for index in range(39)}
    assert values(dataset) == expected
    np.testing.assert_array_equal(np.asarray(dataset.test.x), np.stack([pixels(i) for i in range(30, 39)]))


def test_streamed_records_are_those_in_memory(shards):
    streamed, whole = load(stream=True), load(stream=False)
    for name in SPLITS:
        np.testing.assert_array_equal(np.asarray(getattr(streamed, name).x), getattr(whole, name).x)
        np.testing.assert_array_equal(getattr(streamed, name).y, getattr(whole, name).y)


@pytest.mark.parametrize("stream", [False, True])
def test_they_are_what_an_image_folder_is(own_folder, stream):
    """The same photographs of another size, resized and in grey, in the same order."""
    records = []
    for label, name in enumerate(("ant", "bee")):
        (own_folder / "images" / name).mkdir(parents=True)
        for index in range(10):
            photo = encoded(pixels(10 * label + index, (20, 30)), "JPEG")
            (own_folder / "images" / name / f"{index}.jpg").write_bytes(photo)
            records.append(example(photo, name.encode()))
    write(own_folder / "data" / "all.tfrecord", records)
    options = {"image_size": (8, 12), "channels": 1, "stream": stream}
    a = load(class_names=["ant", "bee"], **options)
    b = load_dataset("image_folder", path="images", **options)
    assert a.class_names == b.class_names
    for name in SPLITS:
        np.testing.assert_array_equal(np.asarray(getattr(a, name).x), np.asarray(getattr(b, name).x))
        np.testing.assert_array_equal(getattr(a, name).y, getattr(b, name).y)


def test_bare_pixels_and_other_names(own_folder):
    records = [example(pixels(i).tobytes(), i % 2 + 1, keys=("pixels", "class")) for i in range(20)]
    write(own_folder / "data" / "x.tfrecord", records)
    keys = {"image_key": "pixels", "label_key": "class", "first_label": 1, "raw": True}
    dataset = load(image_size=(6, 5), **keys)
    assert values(dataset) == {(pixels(i).astype(np.float32).tobytes(), i % 2) for i in range(20)}
    with pytest.raises(DataError, match=r"record 0: feature 'pixels' has 90 bytes; expected 75, .*\(5, 5, 3\)"):
        load(image_size=(5, 5), **keys)
    with pytest.raises(DataError, match="raw pixels have no size of their own: set image_size"):
        load(**keys)


@pytest.mark.parametrize(
    "names, path, sizes",
    [
        (["a.tfrecord", "b.tfrecords"], "data", {"train": ["a.tfrecord", "b.tfrecords"]}),
        (["a.tfrecord", "b.tfrecord"], "data/b.tfrecord", {"train": ["b.tfrecord"]}),
        (
            ["train-00-of-02", "train-01-of-02", "validation-00-of-01", "notes.txt"],
            "data/*-of-*",
            {"train": ["train-00-of-02", "train-01-of-02"], "validation": ["validation-00-of-01"]},
        ),
        (
            ["x_val.tfrecord", "x_train.tfrecord", "x_test.tfrecord", "x_features.json"],
            "data",
            {"train": ["x_train.tfrecord"], "validation": ["x_val.tfrecord"], "test": ["x_test.tfrecord"]},
        ),
        (
            ["train/a.tfrecord", "test/a.tfrecord", "stray.tfrecord"],
            "data",
            {"train": ["a.tfrecord"], "test": ["a.tfrecord"]},
        ),
        (["trained.tfrecord", "latest.tfrecord"], "data", {"train": ["latest.tfrecord", "trained.tfrecord"]}),
    ],
)
def test_splits_by_name(own_folder, names, path, sizes):
    for name in names:
        write(own_folder / "data" / name, [])
    found = tfrecord._list_splits(path)
    assert {split: [file.name for file in files] for split, files in found.items()} == sizes
    assert next(iter(found)) == "train"


# --- what is wrong with them


def change(path, position, value=None):
    """One byte changed, or the file cut."""
    content = bytearray(path.read_bytes())
    if value is None:
        content = content[:position]
    else:
        content[position] ^= value
    path.write_bytes(content)


FIRST = len(examples(0, 1)[0]) + 16  # bytes of the first record


@pytest.mark.parametrize(
    "damage, message, left",
    [
        ((12 + 40, 1), r"00000-of-00002, record 0, at byte 0: its checksum is not that of its content", 38),
        ((FIRST + 3, 1), rf"record 1, at byte {FIRST}: its length is damaged.*cannot be found", 22),
        ((FIRST + 9, 1), rf"record 1, at byte {FIRST}: its length is damaged", 22),
        ((FIRST + 7, None), rf"record 1, at byte {FIRST}: the file ends after 7 of the 12 bytes before a record", 22),
        ((FIRST + 50, None), rf"record 1, at byte {FIRST}: it has \d+ bytes, and the file ends after 34", 22),
        ((FIRST + 13, None), rf"record 1, at byte {FIRST}: it has \d+ bytes, and the file ends after 0", 22),
    ],
)
def test_damaged_records(shards, damage, message, left):
    change(next(shards.glob("*train*00000*")), *damage)
    with pytest.raises(DataError, match=message):
        load(stream=True)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=f"(?s)data: 1 broken records are left out:.*{message}"):
            dataset = load(stream=True, broken="skip")
        assert sum(len(getattr(dataset, name).y) for name in SPLITS) == left
        known = {(pixels(index).astype(np.float32).tobytes(), index % 3) for index in range(39)}
        assert values(dataset) < known


@pytest.mark.parametrize(
    "record, message",
    [
        (b"\xff\xff", "record 18 is no tf.train.Example"),
        (example(b"no image", 0), "cannot read the image of .*record 18: cannot identify"),
        (example(encoded(pixels(0)), 0, keys=("image", KEYS[1])), "record 18 has no feature 'image/encoded'; it has "),
        (example(encoded(pixels(0)), 0, keys=(KEYS[0], "l")), r"no feature 'image/class/label'.*option label_key"),
        (example(7, 0), "record 18: feature 'image/encoded' must be one string of bytes, received 0"),
        (example(encoded(pixels(0)), b"ant"), "record 18 is of class 'ant'; no class_names are given"),
        (example(encoded(pixels(0)), -1), "record 18 has label -1; expected one from 0 on"),
        (example(encoded(pixels(0)), 2**62), "record 18 has label 4611686018427387904"),
    ],
    ids=range(8),
)
def test_records_that_are_no_labelled_images(shards, record, message):
    write(next(shards.glob("*train*00000*")), [*examples(0, 18), record])
    with pytest.raises(DataError, match=message):
        load(stream=True)
    with pytest.warns(UserWarning, match=f"1 broken records are left out:\n.*(?:{message})"):
        dataset = load(stream=True, broken="skip")
    assert sum(len(getattr(dataset, name).y) for name in SPLITS) == 39


@pytest.mark.parametrize("broken", ["refuse", "skip"])
def test_an_image_of_another_size(shards, broken):
    write(next(shards.glob("*test*")), [*examples(30, 9), example(encoded(pixels(0, (6, 6))), 0)])
    with pytest.raises(DataError, match=r"mine-test.*record 9 has 6x6 pixels .* record 0 has 6x5\. Set image_size"):
        load(broken=broken)
    assert load(broken=broken, image_size=(3, 3)).test.x.shape == (10, 3, 3, 3)


def test_files_that_cannot_be_used(own_folder):
    with pytest.raises(DataError, match=r"There is no file data\. Set path to a folder, a file, or a pattern"):
        load()
    (own_folder / "data").mkdir()
    with pytest.raises(DataError, match=r"data has no files named \*\.tfrecord"):
        load()
    (own_folder / "data" / "a.tfrecord").touch()
    with pytest.raises(DataError, match=r"a\.tfrecord has no record that can be read: it is empty"):
        load()
    for name in ("a.tfrecord", "a.tfrecord.gz"):
        (own_folder / "data" / name).write_bytes(gzip.compress(b"records"))
        with pytest.raises(DataError, match=rf"{name} is compressed: .*Unpack it with gunzip"):
            load(f"data/{name}")
    write(own_folder / "data" / "a.tfrecord", [b"\xff"])
    with pytest.raises(DataError, match=r"no record that can be read: .*no tf\.train\.Example"):
        load("data/a.tfrecord", broken="skip")


@pytest.mark.parametrize(
    "names, message",
    [
        (["a-train.tfrecord", "b.tfrecord"], r"b\.tfrecord names no split and others do"),
        (["a-test.tfrecord"], "no file of data is named train"),
    ],
)
def test_names_that_leave_the_split_open(own_folder, names, message):
    for name in names:
        write(own_folder / "data" / name, examples(0, 9))
    with pytest.raises(DataError, match=message):
        load()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"broken": "ignore"}, "broken must be 'refuse' or 'skip'"),
        ({"stream": 1}, "stream must be true, false or left out"),
        ({"class_names": "abc"}, "class_names must be a list of names. Received: class_names='abc'"),
        ({"first_label": 0.5}, "first_label must be a whole number. Received: first_label=0.5"),
        ({"class_names": ["a", "b"]}, r"y_train\[2\] is 2; expected a label in 0\.\.1"),
        ({"lable_key": "x"}, "'lable_key'.*it takes: path, image_size, channels, image_key"),
    ],
)
def test_options(shards, options, message):
    with pytest.raises(DataError, match=message):
        load(**options)


# --- the index


def test_files_are_indexed_once(shards, monkeypatch):
    first = load(stream=True)
    monkeypatch.setattr(tfrecord, "scan", lambda *_: pytest.fail("the cache knows"))
    assert values(load(stream=True)) == values(first)
    monkeypatch.undo()


@pytest.mark.parametrize("damage", [b"", b"no archive", lambda content: content[:-40]])
def test_a_damaged_index_is_made_anew(shards, own_folder, damage):
    expected = values(load())
    (file,) = (own_folder / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()) if callable(damage) else damage)
    assert values(load()) == expected
    assert file.stat().st_size > 1000


def test_an_index_of_another_kind_is_made_anew(shards, own_folder):
    expected = values(load())
    (file,) = (own_folder / "cache").iterdir()
    np.savez(file, label=np.zeros(3, np.int32))
    assert values(load()) == expected


def test_another_label_key_is_another_index(shards):
    assert load().class_names == ("0", "1", "2")
    with pytest.raises(DataError, match=r"y_train\[0\] is 7; expected a label in 0\.\.0"):
        load(label_key="other", class_names=["a"])


@pytest.mark.parametrize("position", [3, 9, 60, -2])
def test_files_that_change_after_they_were_indexed(shards, position):
    dataset = load(stream=True)
    path = next(shards.glob("*test*"))
    change(path, position if position > 0 else FIRST + position, 1)
    with pytest.raises(DataError, match=r"mine-test.*, record 0, has changed since it was indexed, or is damaged"):
        np.asarray(dataset.test.x)
    write(path, examples(0, 9, classes=2))
    with pytest.raises(DataError, match=r"record \d, has changed since it was indexed"):  # whole, and another's
        np.asarray(dataset.test.x)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"record 0, has changed since"):
        np.asarray(dataset.test.x[:1])
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*mine-test.*, record 0: No such file.*Put the file back"):
        np.asarray(dataset.test.x)


# --- damage at volume


RECORDS = [bytes([i]) * size for i, size in enumerate((0, 1, 30, 7, 200))]


@settings(max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, 317), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 318),
)
def test_no_damage_passes_as_a_record(tmp_path_factory, flips, end):
    path = tmp_path_factory.getbasetemp() / "fuzz.tfrecord"
    content = bytearray(b"".join(map(framed, RECORDS)))
    assert len(content) == 318
    for position, value in flips:
        content[position] ^= value
    path.write_bytes(content[:end])
    found = list(tfrecord.scan(path))
    whole = [row.content for row in found if not row.problem]
    assert set(whole) <= set(RECORDS) and len(whole) <= len(RECORDS)
    if not any(value for _, value in flips) and end == 318:
        assert whole == RECORDS


def framed(record):
    """As TensorFlow writes it."""
    length = struct.pack("<Q", len(record))
    return length + checksum(length) + record + checksum(record)


def checksum(content):
    table = [0] * 256
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table[byte] = value
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def test_framing_is_tensorflows(own_folder):
    path = write(own_folder / "x.tfrecord", RECORDS)
    assert path.read_bytes() == b"".join(map(framed, RECORDS))
    assert [row.content for row in tfrecord.scan(path)] == RECORDS
    assert [row.offset for row in tfrecord.scan(path)] == [0, 16, 33, 79, 102]
