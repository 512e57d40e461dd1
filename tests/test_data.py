"""mobileqat.data: every source, every check, the splits, the caches and the augmentation.

Tests on the real CIFAR-10 and Fashion-MNIST run where MOBILEQAT_DATA names a folder that holds them.
"""

import gzip
import itertools
import lzma
import os
import shutil
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobileqat import data
from mobileqat.data import builtin, cache, speech, trashnet
from mobileqat.data.dataset import build_dataset
from mobileqat.data.packed import read_packed
from mobileqat.data.speech import mel_filters, mfcc
from mobileqat.data.split import shuffled_ranks, stratified_split
from mobileqat.errors import DataError

REAL_DATA = os.environ.get("MOBILEQAT_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="MOBILEQAT_DATA is not set")


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch, tmp_path):
    """No test sees the caller's data, writes the caller's cache, or finds modules in the caller's folder."""
    monkeypatch.delenv("MOBILEQAT_DATA", raising=False)
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def arrays(**changes) -> dict:
    """A valid mapping for `build_dataset`: 3 classes of 10 + 4 samples of shape (4, 4, 1)."""
    rng = np.random.RandomState(0)
    valid = {
        "x_train": rng.randint(0, 256, (30, 4, 4, 1), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.randint(0, 256, (12, 4, 4, 1), dtype=np.uint8),
        "y_test": np.arange(12) % 3,
    }
    return valid | changes


def build(mapping, **options):
    return build_dataset("mine", mapping, **{"validation_fraction": 0.1, "seed": 0, **options})


def replaced(key, index, value, dtype=None):
    """The valid array `key` with one element changed."""
    array = arrays()[key].astype(dtype or arrays()[key].dtype)
    array[index] = value
    return array


# --- public names


def test_all_is_sorted_and_complete():
    assert data.__all__ == sorted(data.__all__, key=lambda name: (name[0].islower(), name))
    assert all(hasattr(data, name) for name in data.__all__)


def test_import_is_light():
    heavy = {"keras", "tensorflow", "sklearn", "PIL"}
    code = f"import sys, mobileqat.data; print({heavy} & set(sys.modules) or 'light')"
    root = os.path.dirname(os.path.dirname(data.__path__[0]))
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "light"


def test_sources_are_one_line_each():
    names = ["cifar10", "digits", "fashion_mnist", "fsdd", "image_folder", "kws01", "npz", "tfrecord", "trashnet"]
    assert list(data.sources()) == names
    assert all(description and "\n" not in description for description in data.sources().values())


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("cifra10", {}, r"unknown dataset 'cifra10'; did you mean 'cifar10'\?"),
        ("zzz", {}, r"unknown dataset 'zzz'\. Expected cifar10, digits, .* or 'module:function'"),
        ("digits", {"path": "x"}, "'digits': got an unexpected keyword argument 'path'.*it takes: none"),
        ("digits", {"image_size": (8, 8)}, "unexpected keyword argument 'image_size'"),
        ("npz", {}, "'npz': missing a required argument: 'path'.*it takes: path, limit_bytes"),
        (
            "image_folder",
            {"path": "x", "chanels": 1},
            "'chanels'.*it takes: path, image_size, channels, broken, stream",
        ),
        ("digits", {"validation_fraction": 1.0}, "'digits': validation_fraction must lie between 0 and 1"),
        ("digits", {"validation_fraction": 0}, "Received: validation_fraction=0"),
        ("digits", {"seed": -1}, "seed must be an integer in .* Received: seed=-1"),
        ("digits", {"seed": None}, "Received: seed=None"),
    ],
)
def test_impossible_requests(source, options, message):
    with pytest.raises(DataError, match=message):
        data.load_dataset(source, **options)


# --- splits


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_split_partitions_each_class(labels, fraction, seed):
    kept, held = stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    for label in np.unique(labels):
        size, held_size = np.sum(labels == label), np.sum(labels[held] == label)
        assert held_size == min(max(np.rint(fraction * size), 1), size - 1)


def test_stratified_split_is_pinned():
    """A test split must be the same samples on every machine and NumPy release."""
    order, rank = shuffled_ranks(np.array([0, 0, 0, 1, 1, 1, 1]), seed=0)
    assert order.tolist() == [6, 2, 1, 3, 0, 5, 4]
    assert rank.tolist() == [0, 0, 1, 1, 2, 2, 3]
    kept, held = stratified_split(np.array([0, 0, 0, 1, 1, 1, 1]), 0.5, seed=0)
    assert (kept.tolist(), held.tolist()) == ([0, 4, 5], [1, 2, 3, 6])


def test_validation_is_carved_from_train_by_seed():
    mapping = arrays(x_train=np.arange(30, dtype=np.float64).reshape(30, 1), x_test=np.zeros((12, 1)))
    first, again, other = (build(mapping, validation_fraction=0.2, seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.validation.y).tolist() == [2, 2, 2]
    assert sorted([*first.train.x.flat, *first.validation.x.flat]) == list(range(30))
    np.testing.assert_array_equal(first.train.x % 3, first.train.y[:, np.newaxis])
    np.testing.assert_array_equal(first.validation.x, again.validation.x)
    assert not np.array_equal(first.validation.x, other.validation.x)


def test_given_validation_split_is_kept():
    mapping = arrays(x_validation=arrays()["x_test"][:5], y_validation=arrays()["y_test"][:5])
    dataset = build(mapping)
    assert (len(dataset.train.x), len(dataset.validation.x)) == (30, 5)


def test_validation_needs_a_class_with_two_samples():
    with pytest.raises(DataError, match="'mine', validation split: empty, because every class has only one"):
        build(arrays(x_train=np.zeros((3, 4, 4, 1)), y_train=np.arange(3)))


def imbalanced_dataset():
    """Train holds 100 samples of class 0, 10 of class 1 and 3 of class 2; each sample is its own index."""
    x, y = np.arange(113.0).reshape(-1, 1), np.repeat([0, 1, 2], [100, 10, 3])
    held = {"x_test": x, "y_test": y, "x_validation": x, "y_validation": y}
    return build({"x_train": x, "y_train": y, **held})


@pytest.mark.parametrize("count, expected", [(3, [1, 1, 1]), (9, [3, 3, 3]), (20, [9, 8, 3]), (50, [37, 10, 3])])
def test_calibration_is_class_balanced(count, expected):
    dataset = imbalanced_dataset()
    samples = data.calibration_samples(dataset, count, seed=0)
    assert samples.dtype == np.float32
    assert len(np.unique(samples)) == count
    balance = np.bincount(dataset.train.y[samples.astype(int).ravel()])
    assert sorted(balance, reverse=True) == expected


def test_calibration_is_deterministic_and_nested():
    dataset = imbalanced_dataset()
    longer = data.calibration_samples(dataset, 40, seed=3)
    np.testing.assert_array_equal(data.calibration_samples(dataset, 40, seed=3), longer)
    np.testing.assert_array_equal(data.calibration_samples(dataset, 15, seed=3), longer[:15])
    assert not np.array_equal(data.calibration_samples(dataset, 40, seed=4), longer)


def test_calibration_takes_all_of_train_and_nothing_else():
    dataset = data.load_dataset("digits")
    samples = data.calibration_samples(dataset, 10**6, seed=0)
    assert samples.shape == dataset.train.x.shape
    assert {sample.tobytes() for sample in samples} == {sample.tobytes() for sample in dataset.train.x}


@pytest.mark.parametrize("count, missing", [(2, 1), (3, 0), (113, 0)])
def test_classes_without_a_calibration_sample(count, missing):
    dataset = imbalanced_dataset()
    drawn = set(dataset.train.y[data.calibration_samples(dataset, count, seed=0).astype(int).ravel()])
    absent = [name for index, name in enumerate(dataset.class_names) if index not in drawn]
    assert data.classes_not_calibrated(dataset, count, seed=0) == absent
    assert len(absent) == missing


def test_calibration_needs_a_sample():
    with pytest.raises(DataError, match="Received: count=0"):
        data.calibration_samples(imbalanced_dataset(), 0, seed=0)


# --- what makes a dataset


def test_build_converts_and_names():
    dataset = build(arrays(class_names=["a", "b", "c"]))
    assert (dataset.name, dataset.class_names, dataset.value_range) == ("mine", ("a", "b", "c"), (0.0, 255.0))
    for split, count in ((dataset.train, 27), (dataset.validation, 3), (dataset.test, 12)):
        assert (split.x.dtype, split.x.shape) == (np.float32, (count, 4, 4, 1))
        assert (split.y.dtype, split.y.shape) == (np.int64, (count,))
    np.testing.assert_array_equal(dataset.test.x, arrays()["x_test"])


def test_class_names_default_to_the_labels():
    assert build(arrays()).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    "dtype, given, expected",
    [
        (np.uint8, None, (0, 255)),
        (np.float32, None, None),
        (np.int16, None, None),
        (np.float64, [-1, 256], (-1, 256)),
        (np.float16, np.array([0, 255]), (0, 255)),
    ],
)
def test_value_range(dtype, given, expected):
    mapping = arrays(x_train=arrays()["x_train"].astype(dtype), x_test=arrays()["x_test"].astype(dtype))
    assert build(mapping | {"value_range": given}).value_range == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_test": None}, "'mine': missing x_test; received x_train, y_train, y_test"),
        ({"x_validation": np.zeros((1, 4, 4, 1))}, "missing y_validation"),
        ({"x_val": np.zeros(3)}, r"unknown key 'x_val'; did you mean 'x_\w+'\? Expected"),
        ({"zzz": 1}, r"unknown key 'zzz'\. Expected x_train"),
        ({"x_train": [[1, 2], [3]]}, "x_train is not an array"),
        ({"x_train": np.zeros(30)}, r"train split: x_train must have shape .* received \(30,\)"),
        ({"x_train": np.zeros((30, 0, 4))}, r"none of them empty; received \(30, 0, 4\)"),
        ({"x_train": np.zeros((30, 1, 1, 1, 1, 1))}, r"received \(30, 1, 1, 1, 1, 1\)"),
        ({"x_train": np.full((30, 4), "a")}, "x_train must be integers or floats, received dtype <U1"),
        ({"x_train": np.full((30, 4), 1j)}, "received dtype complex128"),
        ({"x_train": np.full((30, 4), None)}, "received dtype object"),
        ({"x_test": np.zeros((11, 4, 4, 1))}, "test split: .*11 samples and 12 labels; index 11"),
        ({"x_test": np.zeros((0, 4, 4, 1)), "y_test": np.zeros(0, int)}, "test split: x_test is empty"),
        (
            {"x_test": np.zeros((12, 5, 4, 1))},
            r"test split: samples of shape \(5, 4, 1\); expected \(4, 4, 1\)",
        ),
        (
            {"x_test": replaced("x_test", (7, 1, 2, 0), np.nan, float)},
            r"x_test\[7, 1, 2, 0\] is nan; expected a",
        ),
        ({"x_train": replaced("x_train", 3, -np.inf, float)}, r"x_train\[3, 0, 0, 0\] is -inf"),
        ({"x_train": replaced("x_train", 3, np.inf, np.float16)}, r"x_train\[3, 0, 0, 0\] is inf"),
        (
            {"x_train": replaced("x_train", 4, 1e39, float)},
            r"x_train\[4, 0, 0, 0\] is 1e\+39; .*finite in float32",
        ),
        (
            {"value_range": (0, 200)},
            r"x_train\[.*\] is 2\d\d; expected a value within value_range \(0.0, 200.0\)",
        ),
        ({"value_range": (0, np.inf)}, "value_range needs finite low < high"),
        ({"value_range": (2, 1)}, "value_range needs finite low < high"),
        ({"value_range": 255}, "value_range must be"),
        (
            {"y_train": arrays()["y_train"].astype(float)},
            r"y_train must be integers of shape \(n,\), received float64",
        ),
        (
            {"y_train": arrays()["y_train"][:, np.newaxis]},
            r"received int64 of shape \(30, 1\)\. Use y_train.reshape",
        ),
        ({"y_test": np.int64(3)}, "12 samples and 0 labels"),
        (
            {"y_test": replaced("y_test", 5, 3)},
            r"test split: y_test\[5\] is 3; expected a label in 0\.\.2 \(3 cl",
        ),
        ({"y_train": replaced("y_train", 2, -1)}, r"train split: y_train\[2\] is -1"),
        ({"y_train": replaced("y_train", 2, 10**12)}, r"y_train\[2\] is 1000000000000"),
        ({"y_train": np.full(30, -1)}, r"y_train\[0\] is -1"),
        ({"y_train": np.arange(30) % 2 * 2}, r"train split: class '1' \(label 1\) has no sample"),
        ({"class_names": ["a", "b"]}, r"y_train\[2\] is 2; expected a label in 0\.\.1"),
        ({"class_names": ["a", "b", "c", "d"]}, r"class 'd' \(label 3\) has no sample"),
        ({"class_names": "abc"}, "class_names must be a list of names, received 'abc'"),
        ({"class_names": []}, "class_names must be a list"),
    ],
)
def test_violations(changes, message):
    with pytest.raises(DataError, match=message):
        build(arrays(**changes))


# --- digits


def test_digits():
    dataset = data.load_dataset("digits")
    assert (len(dataset.train.x), len(dataset.validation.x), len(dataset.test.x)) == (1295, 143, 359)
    assert dataset.train.x.shape[1:] == (8, 8, 1)
    assert dataset.value_range == (0, 16) and dataset.class_names == tuple("0123456789")
    pixels = np.concatenate([dataset.train.x, dataset.validation.x, dataset.test.x])
    assert (pixels.min(), pixels.max()) == (0, 16)
    assert np.bincount(dataset.test.y).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_digits_test_split_does_not_depend_on_the_seed():
    first, other = (data.load_dataset("digits", seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.test.x, other.test.x)
    assert not np.array_equal(first.validation.y, other.validation.y)


# --- npz


def write_npz(path="data.npz", **changes):
    np.savez_compressed(path, **{key: value for key, value in arrays(**changes).items() if value is not None})
    return str(path)


@pytest.mark.parametrize("names", [["cat", "dög", "emu"], np.array([b"cat", b"dog", b"emu"])])
def test_npz(names):
    dataset = data.load_dataset("npz", path=write_npz(class_names=names))
    assert len(dataset.class_names) == 3 and dataset.class_names[0] == "cat"
    np.testing.assert_array_equal(dataset.test.x, arrays()["x_test"])


def test_npz_missing_array():
    with pytest.raises(DataError, match="'npz': missing y_test"):
        data.load_dataset("npz", path=write_npz(y_test=None))


def test_npz_refuses_python_objects():
    with pytest.raises(DataError, match=r"data.npz is damaged or holds Python objects"):
        data.load_dataset("npz", path=write_npz(class_names=np.array(["a", None], object)))


def test_npz_refuses_a_zip_bomb_unread(monkeypatch):
    path = write_npz(x_train=np.zeros((30, 4, 4, 1000)))
    assert os.path.getsize(path) < 20_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("decompressed"))
    with pytest.raises(DataError, match=r"data.npz unpacks to 38.* bytes; expected at most 1000000"):
        data.load_dataset("npz", path=path, limit_bytes=1_000_000)


def test_npz_declared_shape_larger_than_the_file():
    header = np.lib.format.magic(1, 0) + b"\x76\x00"
    header += b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile("data.npz", "w") as archive:
        archive.writestr("x_train.npy", header + bytes(8))
    with pytest.raises(DataError, match="is damaged"):
        data.load_dataset("npz", path="data.npz")


def test_npz_damaged():
    path = Path(write_npz())
    content = bytearray(path.read_bytes())
    content[100] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data.npz is damaged"):
        data.load_dataset("npz", path="data.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"\x93NUMPY"])
def test_npz_of_another_format(content):
    Path("data.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"data.npz is not an npz file"):
        data.load_dataset("npz", path="data.npz")


def test_npz_missing_file():
    with pytest.raises(DataError, match=r"cannot read absent.npz: .*No such file"):
        data.load_dataset("npz", path="absent.npz")


# --- module:function

MODULE = """
import numpy as np
from mobileqat.data import load_dataset

def mapping(count=30):
    x, y = np.zeros((count, 2)), np.arange(count) % 3
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "value_range": (-1, 1)}

def digits(): return load_dataset("digits", seed=5)
def late(): import late_helper; return mapping(late_helper.COUNT)
def number(): return 3
def broken(): return {}["nothing"]
def invalid(): return mapping() | {"x_test": np.full((30, 2), np.nan)}
constant = 7
class Namespace: mapping = staticmethod(mapping)
"""


@pytest.fixture
def own_module(tmp_path):
    (tmp_path / "own_data.py").write_text(MODULE)
    (tmp_path / "late_helper.py").write_text("COUNT = 60")
    yield
    for name in ("own_data", "late_helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "function, options, count",
    [("mapping", {}, 27), ("mapping", {"count": 60}, 54), ("Namespace.mapping", {}, 27), ("late", {}, 54)],
)
def test_function(own_module, function, options, count):
    path = list(sys.path)
    dataset = data.load_dataset(f"own_data:{function}", **options)
    assert len(dataset.train.x) == count and dataset.name == f"own_data:{function}"
    assert dataset.value_range == (-1, 1)
    assert sys.path == path


def test_function_that_returns_a_dataset(own_module):
    dataset, digits = data.load_dataset("own_data:digits"), data.load_dataset("digits", seed=5)
    assert (dataset.class_names, dataset.value_range) == (digits.class_names, digits.value_range)
    np.testing.assert_array_equal(dataset.validation.x, digits.validation.x)


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("own_data:absent", {}, "'own_data:absent' cannot be imported: AttributeError"),
        ("absent_module:f", {}, "cannot be imported: ModuleNotFoundError"),
        (":mapping", {}, "cannot be imported: ValueError"),
        ("own_data:constant", {}, "is a int; expected a function"),
        ("own_data:number", {}, "returned int; expected a mobileqat.data.Dataset or a dict"),
        ("own_data:broken", {}, "raised KeyError: 'nothing'"),
        ("own_data:mapping", {"cuont": 3}, "unexpected keyword argument 'cuont'.*it takes: count"),
        ("own_data:mapping", {"image_size": (3, 3)}, "unexpected keyword argument 'image_size'"),
        ("own_data:invalid", {}, r"'own_data:invalid', test split: x_test\[0, 0\] is nan"),
    ],
)
def test_function_errors(own_module, source, options, message):
    with pytest.raises(DataError, match=message):
        data.load_dataset(source, **options)


# --- image_folder


def write_image(path, value=0, size=(6, 5), mode="RGB"):
    """An image of one colour, `size` = (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value if mode != "RGB" else (value, 2 * value, 100)).save(path)
    return path


def write_classes(folder):
    """folder/{ant,bee}/NN.png, 10 each, 6x5 pixels whose red is 10 to 19 for ants and 60 to 69 for bees."""
    for name, value in (("ant", 10), ("bee", 60)):
        for index in range(10):
            write_image(folder / name / f"{index:02d}.png", value + index)
    return folder


@pytest.fixture
def class_folders(tmp_path):
    return write_classes(tmp_path / "images")


@pytest.fixture
def split_folders(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / "images" / split)
    return tmp_path / "images"


def load_folder(folder, **options):
    return data.load_dataset("image_folder", path=str(folder), **options)


def test_class_folders(class_folders):
    (class_folders / "README.txt").write_text("beside the class folders: ignored")
    (class_folders / "ant" / ".DS_Store").write_text("hidden: ignored")
    dataset = load_folder(class_folders)
    assert dataset.class_names == ("ant", "bee") and dataset.value_range == (0, 255)
    assert [len(split.x) for split in (dataset.train, dataset.validation, dataset.test)] == [14, 2, 4]
    assert dataset.train.x.shape[1:] == (6, 5, 3)
    for split in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_array_equal(split.x[:, 0, 0, 0] >= 60, split.y == 1)
        np.testing.assert_array_equal(split.x[..., 1], 2 * split.x[..., 0])
    np.testing.assert_array_equal(load_folder(class_folders, seed=9).test.x, dataset.test.x)


def test_split_folders(split_folders):
    dataset = load_folder(split_folders)
    assert [len(split.x) for split in (dataset.train, dataset.validation, dataset.test)] == [18, 2, 20]
    for name in ("ant", "bee"):
        write_image(split_folders / "validation" / name / "a.jpg", 200)
    dataset = load_folder(split_folders)
    assert [len(split.x) for split in (dataset.train, dataset.validation, dataset.test)] == [20, 2, 20]
    assert dataset.validation.x[..., 0].min() > 190


def test_train_folder_without_test_folder(split_folders):
    (split_folders / "test").rename("elsewhere")
    dataset = load_folder(split_folders)
    assert [len(split.x) for split in (dataset.train, dataset.validation, dataset.test)] == [14, 2, 4]


def test_a_class_may_be_called_train(class_folders):
    (class_folders / "bee").rename(class_folders / "train")
    assert load_folder(class_folders).class_names == ("ant", "train")


def test_grayscale(class_folders):
    assert load_folder(class_folders, channels=1).train.x.shape[1:] == (6, 5, 1)


def test_resize_is_bilinear_and_height_comes_first(class_folders):
    write_image(class_folders / "ant" / "wide.jpg", size=(20, 50))
    with Image.open(class_folders / "ant" / "wide.jpg") as image:
        expected = np.asarray(image.resize((8, 4), Image.Resampling.BILINEAR), np.float32)
    dataset = load_folder(class_folders, image_size=(4, 8))
    assert dataset.train.x.shape[1:] == (4, 8, 3)
    images = np.concatenate([dataset.train.x, dataset.validation.x, dataset.test.x])
    assert any(np.array_equal(image, expected) for image in images)


def test_camera_rotation_is_applied(class_folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    for name in ("ant", "bee"):
        for index in range(10):
            Image.new("RGB", (6, 5)).save(class_folders / name / f"{index:02d}.png", exif=exif)
    assert load_folder(class_folders).train.x.shape[1:] == (6, 5, 3)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_8_bits_are_refused(class_folders, mode):
    write_image(class_folders / "ant" / "deep.tif", 40_000, mode=mode)
    with pytest.raises(DataError, match=r"deep\.tif has more than 8 bits per channel"):
        load_folder(class_folders)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: root.rename("moved"), "images is not a folder. Set path"),
        (lambda root: (root / "cat").mkdir(), "images/cat is empty; expected images of this class"),
        (
            lambda root: (root / "ant" / "a.txt").touch(),
            r"ant/a\.txt is not an image file; expected names ending in",
        ),
        (lambda root: (root / "ant" / "b.png").mkdir(), r"ant/b\.png is not an image file"),
        (
            lambda root: (root / "ant" / "b.png").write_bytes(b"not a png"),
            r"cannot read the image .*ant/b\.png",
        ),
        (
            lambda root: write_image(root / "ant" / "b.png", size=(6, 6)),
            r"ant/b\.png has 6x6 pixels .* 6x5.*image_s",
        ),
        (lambda root: write_image(root / "cat" / "b.png"), "images/cat has one image; expected at least 2"),
    ],
)
def test_class_folder_errors(class_folders, change, message):
    change(class_folders)
    with pytest.raises(DataError, match=message):
        load_folder(class_folders)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda root: (root / "test" / "bee").rename("bee"),
            "images/test has no class folder 'bee', but .*train has",
        ),
        (
            lambda root: write_image(root / "test" / "cat" / "a.png"),
            "images/train has no class folder 'cat', but",
        ),
    ],
)
def test_split_folder_errors(split_folders, change, message):
    change(split_folders)
    with pytest.raises(DataError, match=message):
        load_folder(split_folders)


def test_no_class_folders(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images has no class folders; expected .*images/<class>/<image files>"):
        load_folder(tmp_path / "images")


def test_truncated_image(class_folders):
    photo = class_folders / "bee" / "photo.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(photo)
    photo.write_bytes(photo.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"cannot read the image .*bee/photo\.jpg: image file is truncated"):
        load_folder(class_folders, image_size=(6, 5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 2}, "channels must be 1 .* Received: channels=2"),
        ({"image_size": (0, 8)}, "image_size must be .* Received: image_size=\\(0, 8\\)"),
        ({"image_size": 8}, "Received: image_size=8"),
        ({"image_size": (8.5, 8)}, "Received: image_size=\\(8.5, 8\\)"),
    ],
)
def test_image_folder_options(class_folders, options, message):
    with pytest.raises(DataError, match=message):
        load_folder(class_folders, **options)


# --- cifar10


def pack(images: np.ndarray) -> bytes:
    """The coder that `read_packed` undoes: uint8 (n, height, width, 3) -> LZMA stream."""
    red, green, blue = images.astype(np.int16).transpose(3, 1, 2, 0)
    return lzma.compress(np.stack([residual(red - green), residual(green), residual(blue - green)]).tobytes())


def residual(plane: np.ndarray) -> np.ndarray:
    """Plane minus its median edge prediction, modulo 256: int16 -> uint8 (height, width, n)."""
    prediction = np.zeros_like(plane)
    prediction[0, 1:] = plane[0, :-1]
    prediction[1:, 0] = plane[:-1, 0]
    west, north, north_west = plane[1:, :-1], plane[:-1, 1:], plane[:-1, :-1]
    prediction[1:, 1:] = np.median([west, north, west + north - north_west], axis=0)
    return (plane - prediction).astype(np.uint8)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 5), width=st.integers(1, 5), extreme=st.booleans())
def test_packed_round_trip(tmp_path_factory, seed, height, width, extreme):
    images = np.random.RandomState(seed).randint(0, 256, (3, height, width, 3)).astype(np.uint8)
    if extreme:
        images = images // 128 * np.uint8(255)
    path = tmp_path_factory.mktemp("packed") / "shard.xz"
    path.write_bytes(pack(images))
    np.testing.assert_array_equal(read_packed(path, height, width), images)


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """A MOBILEQAT_DATA folder with 2 + 1 shards of 20 images; returns the images, (60, 32, 32, 3)."""
    folder = tmp_path / "data" / "cifar10" / "packed"
    folder.mkdir(parents=True)
    images = np.random.RandomState(0).randint(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    for index, name in enumerate(("train_00", "train_01", "test_00")):
        (folder / f"{name}.xz").write_bytes(pack(images[20 * index : 20 * index + 20]))
    labels = (np.arange(60) % 10).astype(np.uint8)
    np.savez(folder / "labels.npz", y_train=labels[:40], y_test=labels[40:])
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path / "data"))
    return images


def test_cifar10_from_local_folder(tiny_cifar10):
    dataset = data.load_dataset("cifar10")
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird") and dataset.value_range == (0, 255)
    np.testing.assert_array_equal(dataset.test.x, tiny_cifar10[40:])
    np.testing.assert_array_equal(builtin.load_cifar10()["x_train"], tiny_cifar10[:40])


def test_cifar10_is_decoded_once(tiny_cifar10, monkeypatch):
    builtin.load_cifar10()
    monkeypatch.setattr(builtin, "read_packed", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(builtin.load_cifar10()["x_train"], tiny_cifar10[:40])


@pytest.mark.parametrize("position", [0, 3000, -30_000, -1])
def test_damaged_cache_is_rebuilt(tiny_cifar10, tmp_path, position):
    builtin.load_cifar10()
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)
    np.testing.assert_array_equal(builtin.load_cifar10()["x_train"], tiny_cifar10[:40])
    assert cache.read_npz(path).keys() == {"x_train", "x_test"}


@pytest.mark.parametrize(
    "content",
    [{"x_train": np.zeros((2, 2), np.uint8)}, {"x_train": np.zeros((40, 32, 32, 3)), "x_test": np.zeros(3)}],
)
def test_cache_of_other_arrays_is_rebuilt(tiny_cifar10, tmp_path, content):
    builtin.load_cifar10()
    (path,) = (tmp_path / "cache").iterdir()
    np.savez(path, **content)
    np.testing.assert_array_equal(builtin.load_cifar10()["x_test"], tiny_cifar10[40:])


def test_changed_source_is_decoded_anew(tiny_cifar10, tmp_path):
    builtin.load_cifar10()
    shard = tmp_path / "data" / "cifar10" / "packed" / "test_00.xz"
    shard.write_bytes(pack(255 - tiny_cifar10[40:]))
    os.utime(shard, ns=(0, 0))
    np.testing.assert_array_equal(builtin.load_cifar10()["x_test"], 255 - tiny_cifar10[40:])


def test_cache_that_cannot_be_written_warns(tiny_cifar10, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="cifar10 is decoded anew on every load: cannot write"):
        np.testing.assert_array_equal(builtin.load_cifar10()["x_train"], tiny_cifar10[:40])


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write_atomically(tmp_path / "cache" / "a.npz", {"x": np.zeros(3)})
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_defaults_to_home(monkeypatch, tmp_path):
    monkeypatch.delenv("MOBILEQAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "mobileqat"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: (folder / "train_00.xz").unlink(),
            "train_.*xz hold 20 images, labels.npz has 40 labels",
        ),
        (
            lambda folder: (folder / "test_00.xz").unlink(),
            "test_.*xz hold 0 images, labels.npz has 20 labels",
        ),
        (lambda folder: (folder / "train_01.xz").write_bytes(b"damaged"), r"cannot unpack .*train_01\.xz"),
        (
            lambda folder: (folder / "train_01.xz").write_bytes(lzma.compress(bytes(3073))),
            r"train_01\.xz unpacks to 3073 bytes; expected a multiple of 3072",
        ),
        (lambda folder: (folder / "labels.npz").unlink(), r"cannot read .*labels\.npz"),
        (
            lambda folder: np.savez(folder / "labels.npz", y=np.zeros(3)),
            r"labels\.npz has \['y'\]; expected y_train",
        ),
    ],
)
def test_damaged_cifar10_folder(tiny_cifar10, tmp_path, change, message):
    change(tmp_path / "data" / "cifar10" / "packed")
    with pytest.raises(DataError, match=message):
        data.load_dataset("cifar10")


@pytest.fixture(scope="module")
def real_cifar10(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEQAT_DATA", REAL_DATA)
        patch.setenv("MOBILEQAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield builtin.load_cifar10()


@needs_real_data
def test_real_cifar10(real_cifar10):
    x, y = real_cifar10["x_train"], real_cifar10["y_train"]
    assert x.shape == (50_000, 32, 32, 3) and real_cifar10["x_test"].shape == (10_000, 32, 32, 3)
    assert y[:4].tolist() == [6, 9, 9, 4] and real_cifar10["y_test"][:4].tolist() == [3, 8, 8, 0]
    assert np.bincount(y).tolist() == [5000] * 10
    np.testing.assert_allclose(x.mean((0, 1, 2)), [125.3, 123.0, 113.9], atol=0.1)


# --- fashion_mnist


def write_idx(path, values: np.ndarray):
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def tiny_fashion_mnist(tmp_path, monkeypatch):
    """A MOBILEQAT_DATA folder with 40 + 40 images; returns its subfolder and the images, (40, 28, 28)."""
    folder = tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    images = np.random.RandomState(0).randint(0, 256, (40, 28, 28)).astype(np.uint8)
    for name in ("train", "t10k"):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", (np.arange(40) % 10).astype(np.uint8))
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path / "data"))
    return folder, images


def test_fashion_mnist_from_local_folder(tiny_fashion_mnist):
    _, images = tiny_fashion_mnist
    dataset = data.load_dataset("fashion_mnist")
    np.testing.assert_array_equal(dataset.test.x, images[..., np.newaxis])
    assert dataset.class_names[-1] == "Ankle boot" and dataset.value_range == (0, 255)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"damaged", "cannot read .*Not a gzipped file"),
        (gzip.compress(bytes(1000))[:-10], "cannot read"),
        (gzip.compress(b""), "is not an idx file of bytes with 1 axes.* has 0 bytes"),
        (gzip.compress(b"\0\0\x0d\1" + bytes(4)), "starts with 00000d01"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\x05" + bytes(4)), r"declares shape \(5,\) and has 12 bytes"),
    ],
    # gzip writes the time into its header, and processes that share out the tests must agree on their names.
    ids=["missing", "not gzip", "cut off", "empty", "another magic number", "another size"],
)
def test_damaged_idx_file(tiny_fashion_mnist, content, message):
    path = tiny_fashion_mnist[0] / "t10k-labels-idx1-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        data.load_dataset("fashion_mnist")
    assert str(path) in str(raised.value)


@needs_real_data
def test_real_fashion_mnist(monkeypatch):
    monkeypatch.setenv("MOBILEQAT_DATA", REAL_DATA)
    dataset = data.load_dataset("fashion_mnist", validation_fraction=0.05)
    assert [len(split.x) for split in (dataset.train, dataset.validation, dataset.test)] == [
        57_000,
        3000,
        10_000,
    ]
    assert dataset.train.x.shape[1:] == (28, 28, 1)
    assert dataset.test.y[:4].tolist() == [9, 2, 1, 1]
    assert np.bincount(dataset.validation.y).tolist() == [300] * 10


# --- where known datasets come from


# --- speech


def test_mel_filters_cover_every_frequency_once():
    filters = mel_filters(8000, 512)
    assert filters.shape == (257, 40) and filters.min() == 0
    inside = filters[4:235].sum(axis=1)
    assert (inside > 0.99).all() and (inside < 1.01).all()


def test_mfcc_of_silence_and_of_a_tone():
    tone = (8000 * np.sin(2 * np.pi * 1000 / 8000 * np.arange(4000))).astype(np.int16)
    silent, half = mfcc([np.zeros(100, np.int16), tone], 8000)[..., 0]
    assert silent.shape == (49, 10) and silent.dtype == np.float32
    np.testing.assert_allclose(silent[:, 0], np.log(1e-6) * np.sqrt(40), rtol=1e-6)
    np.testing.assert_allclose(silent[:, 1:], 0, atol=1e-4)
    np.testing.assert_array_equal(half[26:], silent[26:])  # padded at its end
    np.testing.assert_allclose(half[:20], np.broadcast_to(half[0], (20, 10)), rtol=0.05, atol=0.5)


def write_recordings(folder, rate=8000, speakers=("lucas", "nina"), takes=(0, 5, 6)):
    folder.mkdir(parents=True)
    samples = np.random.default_rng(0).integers(-3000, 3000, 2000, np.int16)
    for digit, speaker, take in itertools.product(range(10), speakers, takes):
        with wave.open(str(folder / f"{digit}_{speaker}_{take}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((samples // (digit + 1)).astype("<i2").tobytes())


def test_fsdd_from_recordings_and_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))
    write_recordings(tmp_path / "fsdd/recordings")
    official = data.load_dataset("fsdd")
    assert (len(official.train.x) + len(official.validation.x), len(official.test.x)) == (40, 20)
    speakers = data.load_dataset("fsdd", split="speakers")
    assert (len(speakers.train.x) + len(speakers.validation.x), len(speakers.test.x)) == (30, 30)
    assert official.test.x.shape[1:] == (49, 10, 1) and official.value_range is None
    clips = [speech._read_clip(file) for file in sorted((tmp_path / "fsdd/recordings").glob("*.wav"))]
    np.savez(
        tmp_path / "fsdd/fsdd.npz",
        audio=np.concatenate([clip.samples for clip in clips]),
        offsets=np.cumsum([0, *(len(clip.samples) for clip in clips)]),
        **{name: np.array([getattr(clip, name) for clip in clips]) for name in ("digit", "speaker", "take")},
    )
    np.testing.assert_array_equal(data.load_dataset("fsdd").test.x, official.test.x)


def test_fsdd_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"split must be one of official, speakers. Received: split='odd'"):
        data.load_dataset("fsdd", split="odd")
    (tmp_path / "fsdd/recordings").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no \.wav files"):
        data.load_dataset("fsdd")
    (tmp_path / "fsdd/recordings/0_lucas_0.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"cannot read the recording .*0_lucas_0"):
        data.load_dataset("fsdd")
    shutil.rmtree(tmp_path / "fsdd")
    write_recordings(tmp_path / "fsdd/recordings", rate=16000)
    with pytest.raises(DataError, match=r"\(16000, 2, 1\); expected \(8000, 2, 1\)"):
        data.load_dataset("fsdd")
    np.savez(tmp_path / "fsdd/fsdd.npz", audio=np.zeros(3))
    with pytest.raises(DataError, match=r"expected audio, digit, offsets"):
        data.load_dataset("fsdd")


def test_failed_download_of_fsdd_says_what_to_do(monkeypatch):
    import keras

    def fail(*_, **__):
        raise Exception("no route to host")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    with pytest.raises(DataError, match=r"no route to host.*<folder>/fsdd/recordings and set MOBILEQAT_DATA"):
        data.load_dataset("fsdd")


def test_kws01(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="set MOBILEQAT_DATA=<folder>"):
        data.load_dataset("kws01")
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))
    folder = tmp_path / "mlperf-tiny/npz"
    folder.mkdir(parents=True)
    integers = np.random.default_rng(0).integers(-128, 128, (240, 49, 10, 1), np.int8)
    np.savez(folder / "kws01.npz", mfcc=integers, y=np.repeat(np.arange(12, dtype=np.uint8), 20))
    dataset = data.load_dataset("kws01")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part.x) for part in parts] == [36, 12, 192]
    # The known range is the grid that the samples lie on: (128 + 127) steps.
    low, high = dataset.value_range
    steps = (dataset.test.x - low) / ((high - low) / 255)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    np.savez(folder / "kws01.npz", x=integers)
    with pytest.raises(DataError, match="expected mfcc and y"):
        data.load_dataset("kws01")


# --- TrashNet


def test_trashnet(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="garythung/trashnet there and set MOBILEQAT_DATA"):
        data.load_dataset("trashnet")
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))
    splits = {"train": (1, 2, 3), "val": (4,), "test": (5, 6)}
    (tmp_path / "trashnet/splits").mkdir(parents=True)
    for name in trashnet.CLASSES:
        for number in range(1, 7):
            write_image(tmp_path / f"trashnet/images/{name}/{name}{number}.png", 10 * number, (12, 16), "L")
        for file in (tmp_path / f"trashnet/images/{name}").iterdir():
            file.rename(file.with_suffix(".jpg"))
    for split, numbers in splits.items():
        lines = [f"{name}{number}.jpg 1" for name in trashnet.CLASSES for number in numbers]
        (tmp_path / f"trashnet/splits/one-indexed-files-notrash_{split}.txt").write_text("\n".join(lines) + "\n")
    dataset = data.load_dataset("trashnet", image_size=(6, 8))
    assert dataset.class_names == trashnet.CLASSES and dataset.value_range == (0, 255)
    parts = {"train": dataset.train, "val": dataset.validation, "test": dataset.test}
    for split, part in parts.items():
        assert part.x.shape == (6 * len(splits[split]), 6, 8, 3)
        assert set(part.x.flat) == {10 * number for number in splits[split]}
    write_image(tmp_path / "trashnet/images/glass/glass9.jpg")
    with pytest.raises(DataError, match=r"glass9.jpg is in none of the authors' lists"):
        data.load_dataset("trashnet")
    (tmp_path / "trashnet/splits/one-indexed-files-notrash_val.txt").unlink()
    with pytest.raises(DataError, match="Put the authors' lists there"):
        data.load_dataset("trashnet")


def test_local_folder_must_exist(monkeypatch):
    monkeypatch.setenv("MOBILEQAT_DATA", "/nowhere")
    with pytest.raises(DataError, match="MOBILEQAT_DATA names /nowhere, which is not a folder"):
        data.load_dataset("cifar10")


@pytest.mark.parametrize("name, shape", [("cifar10", (32, 32, 3)), ("fashion_mnist", (28, 28))])
def test_download_through_keras(monkeypatch, tmp_path, name, shape):
    import keras

    x, y = np.zeros((40, *shape), np.uint8), (np.arange(40) % 10).astype(np.uint8)
    column = y[:, np.newaxis] if name == "cifar10" else y
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: ((x, column), (x, column)))
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))  # a folder without this dataset
    dataset = data.load_dataset(name)
    assert dataset.test.x.shape == (40, *shape[:2], 3 if name == "cifar10" else 1)
    assert dataset.test.y.tolist() == y.tolist()


@pytest.mark.parametrize("name, layout", [("cifar10", "cifar10/packed"), ("fashion_mnist", "fashion-mnist")])
def test_failed_download_says_what_to_do(monkeypatch, name, layout):
    import keras

    def fail():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", fail)
    message = rf"'{name}': .*URL fetch failure. Check the network, or put the files in <folder>/{layout} and set"
    with pytest.raises(DataError, match=message):
        data.load_dataset(name)


# --- augmentation


@pytest.fixture
def tf():
    import tensorflow

    return tensorflow


def augmented(tf, x, batch_size=16, seed=0, epochs=1, **options):
    """All images of `x` after augmentation, once per epoch."""
    batches = tf.data.Dataset.from_tensor_slices((x, np.arange(len(x)))).batch(batch_size)
    options = {"flip": False, "shift": 0, **options}
    dataset = data.augment_images(batches, seed=seed, **options)
    assert dataset.element_spec == batches.element_spec
    epochs = [[(x.numpy(), y.numpy()) for x, y in dataset] for _ in range(epochs)]
    for epoch in epochs:
        assert np.concatenate([y for _, y in epoch]).tolist() == list(range(len(x)))
    return [np.concatenate([x for x, _ in epoch]) for epoch in epochs]


def pixels(count=64, height=7, width=6, channels=3):
    return np.random.RandomState(0).randint(0, 256, (count, height, width, channels)).astype(np.float32)


def test_no_augmentation_is_the_identity(tf):
    np.testing.assert_array_equal(augmented(tf, pixels())[0], pixels())


def test_flip_mirrors_about_half_of_the_images(tf):
    x = pixels(400)
    (flipped,) = augmented(tf, x, flip=True)
    is_flipped = (flipped == x[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == x).all((1, 2, 3)) ^ is_flipped).all()
    assert 160 < is_flipped.sum() < 240


def test_shift_is_a_crop_of_the_reflected_image(tf):
    x = pixels(200)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    seen = set()
    for image, wide in zip(augmented(tf, x, shift=2)[0], padded, strict=True):
        crops = [(r, c) for r in range(5) for c in range(5) if np.array_equal(wide[r : r + 7, c : c + 6], image)]
        assert len(crops) == 1
        seen.add(crops[0])
    assert len(seen) == 25


def test_cutout_is_a_clipped_square_of_the_rounded_mean(tf):
    x = pixels(300)
    sizes = set()
    for image, cut in zip(x, augmented(tf, x, cutout=3)[0], strict=True):
        mean = np.rint(image.mean((0, 1)))
        rows, columns = np.nonzero((image != cut).any(-1))
        area = cut[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        np.testing.assert_array_equal(area, np.broadcast_to(mean, area.shape))
        np.testing.assert_array_equal((image != cut).any(-1).sum(), rows.size)
        sizes.add(area.shape[:2])
    assert (3, 3) in sizes and max(sizes) == (3, 3) and (2, 2) in sizes


def test_integer_pixels_stay_integers_and_fractions_are_not_rounded(tf):
    options = {"flip": True, "shift": 3, "cutout": 4}
    (x,) = augmented(tf, pixels(), **options)
    np.testing.assert_array_equal(x, np.rint(x))
    (scaled,) = augmented(tf, pixels() / 255, **options)
    assert len(np.unique(scaled)) > 255


def test_augmentation_is_deterministic_per_seed_and_new_in_each_epoch(tf):
    options = {"flip": True, "shift": 2, "cutout": 3, "epochs": 2}
    first, again, other = (augmented(tf, pixels(), seed=seed, **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_augmentation_keeps_sample_weights_and_length(tf):
    batches = tf.data.Dataset.from_tensor_slices((pixels(10), np.arange(10), np.ones(10))).batch(4)
    dataset = data.augment_images(batches, flip=True, shift=1, seed=0)
    assert (len(dataset), len(next(iter(dataset)))) == (3, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shift": 6}, "expected 0 <= shift < 6 .* for images of 7x6 pixels. Received: shift=6, cutout=0"),
        ({"shift": -1}, "Received: shift=-1"),
        ({"cutout": 7}, "Received: shift=0, cutout=7"),
    ],
)
def test_augmentation_must_fit_the_image(tf, options, message):
    with pytest.raises(DataError, match=message):
        augmented(tf, pixels(), **options)


@pytest.mark.parametrize("samples", [(np.zeros((8, 6)), np.zeros(8)), np.zeros((8, 6, 6, 1))])
def test_augmentation_needs_batches_of_labelled_images(tf, samples):
    batches = tf.data.Dataset.from_tensor_slices(samples).batch(2)
    with pytest.raises(DataError, match=r"augmentation needs batches \(x, y\) with x of shape"):
        data.augment_images(batches, flip=True, shift=0, seed=0)
