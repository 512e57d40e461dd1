"""Hostile and damaged `.keras` and `.h5` files: each a ModelError, nothing written elsewhere, nothing executed.

`MOBILEQAT_FUZZ=100 pytest tests/test_fuzz_models.py` tries a hundred times as many damaged ones.
"""

from __future__ import annotations

import base64
import json
import marshal
import os
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path
from random import Random

import h5py
import keras
import numpy as np
import pytest

from mobileqat.errors import ModelError
from mobileqat.models import archive, load_model
from mobileqat.models.archive import check_model_file

FACTOR = int(os.environ.get("MOBILEQAT_FUZZ", 1))
CODE = compile("lambda x: __import__('pathlib').Path('executed').touch()", "", "eval").co_consts[0]
MARSHALLED = base64.b64encode(marshal.dumps(CODE)).decode()


def tiny() -> keras.Model:
    layers = [keras.Input((4,)), keras.layers.Dense(3, activation="relu"), keras.layers.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(2)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of one model as each kind of file."""
    folder = tmp_path_factory.mktemp("saved")
    tiny().save(folder / "model.keras")
    tiny().save_weights(folder / "model.weights.h5")
    with h5py.File(folder / "model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(json.loads(tiny().to_json()))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path, monkeypatch):
    """Works in a folder inside an empty one, which is as empty in the end; a lambda would leave a file, too."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert not Path("executed").exists()


def members(content: bytes) -> dict[str, bytes]:
    Path("original.keras").write_bytes(content)
    with zipfile.ZipFile("original.keras") as file:
        return {name: file.read(name) for name in file.namelist()}


def packed(
    parts: dict[str | zipfile.ZipInfo, bytes], path: str = "model.keras", method: int = zipfile.ZIP_STORED
) -> str:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in parts.items():
            file.writestr(name, content, method)
    return path


def refusal(path: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, tiny)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# --- archives


@pytest.mark.parametrize(
    "name", ["../evil", "assets/../../evil", "/tmp/mobileqat-evil", "..\\evil", "C:\\evil", "assets/../../../evil.h5"]
)
def test_members_outside_of_the_folder(saved, name):
    assert "outside of its folder" in refusal(packed(members(saved["model.keras"]) | {name: b"evil"}))


def test_links(saved):
    link = zipfile.ZipInfo("assets")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    assert "outside of its folder" in refusal(packed(members(saved["model.keras"]) | {link: b"/tmp"}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(saved):
    parts = members(saved["model.keras"])
    path = packed(parts)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("config.json", parts["config.json"])
    assert "one name" in refusal(path)


def test_archives_that_unpack_without_end(saved):
    parts = members(saved["model.keras"])
    zeros = bytes(300 * 2**20)
    paths = [
        packed(parts | {"config.json": zeros[: 40 * 2**20]}, "config.keras", zipfile.ZIP_DEFLATED),
        packed(parts | {"model.weights.h5": zeros}, "weights.keras", zipfile.ZIP_DEFLATED),
        packed(parts | {"assets/zeros": zeros}, "assets.keras", zipfile.ZIP_DEFLATED),
    ]
    del zeros
    for path in paths:
        tracemalloc.start()
        assert "expected at most" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


# --- configurations

WRONG_CONFIGS = {
    "absent": None,
    "empty": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"1",
    "an empty mapping": b"{}",
    "deep": b"[" * 100_000,
    "deep mappings": b'{"config":' * 100_000,
    "no class": json.dumps({"module": "keras", "class_name": "Nowhere", "config": {}}).encode(),
    "a function": json.dumps({"module": "os", "class_name": "system", "config": "touch executed"}).encode(),
    "a class of another package": json.dumps(
        {"module": "subprocess", "class_name": "Popen", "config": {"args": "touch executed"}}
    ).encode(),
    "a download": json.dumps(
        {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "file:///etc/passwd"}}
    ).encode(),
    "a layer": json.dumps({"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}}).encode(),
}


@pytest.mark.parametrize("config", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_wrong_configurations(saved, config):
    parts = members(saved["model.keras"])
    refusal(
        packed({name: content for name, content in (parts | {"config.json": config}).items() if content is not None})
    )
    if config is not None:
        with h5py.File("model.h5", "w") as file:
            file.attrs["model_config"] = np.void(config[:30_000] or b"\0")
        refusal("model.h5")


@pytest.mark.parametrize(
    "function",
    [
        {"class_name": "__lambda__", "config": {"code": MARSHALLED, "defaults": None, "closure": None}},
        [MARSHALLED, None, None],
        {"module": "builtins", "class_name": "function", "config": "os.abort", "registered_name": "os.abort"},
        {"module": "pickle", "class_name": "loads", "config": {"data": MARSHALLED}},
    ],
)
def test_code_in_a_layer(saved, function):
    arguments = {"name": "code", "function": function, "function_type": "lambda", "output_shape": [3]}
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": arguments, "registered_name": None}
    parts = members(saved["model.keras"])
    config = json.loads(parts["config.json"])
    config["config"]["layers"].insert(1, layer)
    assert "Python code" in refusal(packed(parts | {"config.json": json.dumps(config).encode()}))
    with h5py.File("model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
    assert "Python code" in refusal("model.h5")


# --- weights


def test_weights_of_another_model(saved):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(7)]).save("other.keras")
    other = members(Path("other.keras").read_bytes())["model.weights.h5"]
    for content in (other, b"", b"\x89HDF\r\n\x1a\n", bytes(1000), None):
        parts = members(saved["model.keras"]) | {"model.weights.h5": content}
        refusal(packed({name: content for name, content in parts.items() if content is not None}))


def external_link(file):
    file["layers"] = h5py.ExternalLink("/etc/passwd", "/")


def external_storage(file):
    file.create_dataset("layers/dense/vars/0", (4, 3), "float32", external=[("/etc/passwd", 0, 48)])


def virtual(file):
    layout = h5py.VirtualLayout((4, 3), "float32")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", (4, 3))
    file.create_virtual_dataset("layers/dense/vars/0", layout)


def shape_without_values(file):
    file.create_dataset("layers/dense/vars/0", (2**20, 2**20), "float32", chunks=(1024, 1024))


@pytest.mark.parametrize("hostile", [external_link, external_storage, virtual, shape_without_values])
def test_hostile_weights(saved, hostile):
    with h5py.File("a.weights.h5", "w") as file:
        hostile(file)
    expected = "expected at most" if hostile is shape_without_values else "reads other files"
    assert expected in refusal("a.weights.h5")
    assert expected in refusal(
        packed(members(saved["model.keras"]) | {"model.weights.h5": Path("a.weights.h5").read_bytes()})
    )


# --- at volume


def damaged(content: bytes, random: Random) -> bytes:
    kind = random.randrange(4)
    changed = bytearray(content)
    if kind == 0:
        return content[: random.randrange(len(content))]
    if kind == 1:
        start, end = sorted(random.randrange(len(content)) for _ in range(2))
        return content[:start] + content[end:] if random.random() < 0.5 else content[:end] + content[start:]
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(changed) // 4) * 4
        word = random.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, random.getrandbits(32), random.randrange(len(changed))))
        struct.pack_into("<I", changed, place, word if kind == 2 else changed[place] ^ (1 << random.randrange(8)))
    return bytes(changed)


def test_damaged_archives(saved):
    for seed in range(400 * FACTOR):
        Path("model.keras").write_bytes(damaged(saved["model.keras"], Random(seed)))
        try:
            check_model_file(Path("model.keras"))
        except ModelError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def changed(value, random: Random):
    """A JSON value with one part replaced, removed or doubled."""
    others = (None, True, 0, -1, 3, 1e300, "", "x", "float16", [], {}, [None], {"class_name": "Dense"})
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        index = random.randrange(len(value))
        if random.random() < 0.1:
            return random.choice((value[:index] + value[index + 1 :], value[: index + 1] + value[index:]))
        return [*value[:index], changed(value[index], random), *value[index + 1 :]]
    return random.choice(others)


@pytest.mark.filterwarnings("ignore")
def test_changed_configurations(saved):
    parts = members(saved["model.keras"])
    for seed in range(120 * FACTOR):
        random = Random(seed)
        config = json.loads(parts["config.json"])
        for _ in range(random.randint(1, 2)):
            config = changed(config, random)
        packed(parts | {"config.json": json.dumps(config).encode()})
        try:
            load_model("model.keras")
        except ModelError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {config}") from error


def test_a_model_of_many_weights_passes(monkeypatch):
    # Zeros that were packed again: the archive is small for a good reason.
    monkeypatch.setattr(archive, "FREE_BYTES", 0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1000)])
    model.save("model.keras")
    assert load_model("model.keras").count_params() == 5000
