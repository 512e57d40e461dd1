"""Hostile and damaged npz files and images: arrays, or a DataError that names the file; bounded memory, nothing run.

`MOBILEQAT_FUZZ=100 pytest tests/test_fuzz_data.py` tries a hundred times as many.
"""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from mobileqat.data import load_dataset
from mobileqat.data.folder import IMAGE_SUFFIXES, read_image
from mobileqat.data.npz import read_npz
from mobileqat.errors import DataError

FACTOR = int(os.environ.get("MOBILEQAT_FUZZ", 1))
MIB = 2**20


class Code:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def damaged(content: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return content[: random.randrange(len(content))]
    if random.random() < 0.2:
        start, end = sorted(random.randrange(len(content)) for _ in range(2))
        return random.choice((content[:start] + content[end:], content[:end] + content[start:]))
    changed = bytearray(content)
    for _ in range(random.randint(1, 6)):
        changed[random.randrange(len(changed))] = random.choice((0, 1, 255, 127, random.randrange(256)))
    return bytes(changed)


def packed(**members: bytes) -> Path:
    with zipfile.ZipFile("data.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return Path("data.npz")


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    content = text.encode().ljust(117) + b"\n"
    return np.lib.format.magic(*version) + len(content).to_bytes(2 if version == (1, 0) else 4, "little") + content


# --- npz


PICKLES = {
    "an object array": npy(np.array([Code()], object), allow_pickle=True),
    "a pickle": pickle.dumps(Code()),
    "a pickle behind a header": header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + pickle.dumps(Code()),
    "objects in a structure": header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}")
    + pickle.dumps(Code()),
    "code for a type": header("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,)}"),
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_pickles_are_refused(content):
    path = packed(x_train=content)
    with pytest.raises(DataError, match=r"data\.npz"):
        read_npz(path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.npz"):
        read_npz(path)


HUGE = {
    "one axis": "{'descr': '<f8', 'fortran_order': False, 'shape': (300000000,)}",
    "many axes": "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2000, 1000, 1000)}",
    "overflow": "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
    "a wide type": "{'descr': '|S1000000000', 'fortran_order': False, 'shape': (3,)}",
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_headers_that_claim_more_than_there_is(text, version):
    path = packed(x_train=header(text, version) + bytes(64))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"data\.npz is damaged"):
        read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_zeros_that_unpack_without_end():
    with zipfile.ZipFile("data.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        for _ in range(64):
            file.write(bytes(MIB))
    tracemalloc.start()
    with pytest.raises(DataError, match="expected at most 10000000"):
        read_npz(Path("data.npz"), limit_bytes=10_000_000)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")
def test_damaged_npz():
    x, y = np.arange(40, dtype=np.float32).reshape(10, 4), np.arange(10) % 2
    np.savez("plain.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez_compressed("small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    contents = [Path(name).read_bytes() for name in ("plain.npz", "small.npz")]
    for seed in range(600 * FACTOR):
        random = Random(seed)
        if seed % 2:  # the archive is whole and a member of it is not
            packed(x_train=damaged(npy(x), random), y_train=npy(y), x_test=npy(x), y_test=npy(y))
        else:
            Path("data.npz").write_bytes(damaged(random.choice(contents), random))
        try:
            load_dataset("npz", path="data.npz")
        except DataError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


# --- images


@pytest.fixture(scope="module")
def images():
    """A small image in every format that is read."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    contents = {}
    for suffix in IMAGE_SUFFIXES:
        file = io.BytesIO()
        pixels.save(file, Image.registered_extensions()[suffix])
        contents[suffix] = file.getvalue()
    return contents


@pytest.mark.filterwarnings("ignore")
def test_damaged_images(images):
    for seed in range(800 * FACTOR):
        random = Random(seed)
        suffix = random.choice(IMAGE_SUFFIXES)
        path = Path(f"broken{suffix}")
        path.write_bytes(damaged(images[suffix], random))
        try:
            assert read_image(path, (4, 4), 3).shape == (4, 4, 3)
        except DataError as error:
            assert path.name in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_other_formats_are_no_images():
    # Pillow hands an EPS file to Ghostscript, whatever its name.
    Image.new("RGB", (4, 4)).save("picture.eps")
    Path("picture.eps").rename("picture.jpg")
    with pytest.raises(DataError, match=r"picture\.jpg"):
        read_image(Path("picture.jpg"), None, 3)


def test_an_image_of_enormous_size(images):
    content = bytearray(images[".bmp"])
    content[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    Path("large.bmp").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"large\.bmp.*exceeds limit"):
        read_image(Path("large.bmp"), (4, 4), 3)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.fixture
def folder(images):
    """Two classes of ten images, two of them broken."""
    for name in ("ant", "bee"):
        Path("images", name).mkdir(parents=True)
        for index in range(10):
            Path("images", name, f"{index}.png").write_bytes(images[".png"])
    Path("images/ant/3.png").write_bytes(b"not an image")
    Path("images/bee/7.png").write_bytes(images[".png"][:60])
    return "images"


def test_broken_images_are_refused(folder):
    with pytest.raises(DataError, match=r"cannot read the image images/ant/3\.png"):
        load_dataset("image_folder", path=folder)


def test_broken_images_are_skipped_by_choice(folder):
    with pytest.warns(UserWarning) as caught:
        dataset = load_dataset("image_folder", path=folder, broken="skip")
    (message,) = [str(warning.message) for warning in caught]
    first, *lines = message.splitlines()
    assert first == "images: 2 broken images are left out:" and len(lines) == 2
    assert "images/ant/3.png: cannot identify image file" in lines[0] and "images/bee/7.png: " in lines[1]
    assert len(dataset.train.y) + len(dataset.validation.y) + len(dataset.test.y) == 18


def test_a_class_of_broken_images(folder):
    for path in Path("images/bee").iterdir():
        path.write_bytes(b"")
    expected = "no image of class 'bee' in the train split can be read"
    with pytest.warns(UserWarning, match="11 broken images"), pytest.raises(DataError, match=expected):
        load_dataset("image_folder", path=folder, broken="skip")


def test_another_choice(folder):
    with pytest.raises(DataError, match=r"broken must be 'refuse' or 'skip'\. Received: broken='ignore'"):
        load_dataset("image_folder", path=folder, broken="ignore")
