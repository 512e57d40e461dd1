"""Reference models, a user's own functions, and files that do not load."""

import importlib
import sys

import keras
import numpy as np
import pytest

from mobileqat.errors import ModelError
from mobileqat.models import MODELS, build_model, check_finite_weights, load_model, own_classes
from mobileqat.quantize import quantize_model


@pytest.mark.parametrize("name, layers, parameters", [("dscnn", 25, 5_450), ("resnet8", 30, 78_666)])
def test_reference_models(name, layers, parameters):
    model = build_model(name, (32, 32, 3) if name == "resnet8" else (8, 8, 1), 10)
    assert model.name == name and model.output_shape == (None, 10)
    assert (len(model.layers), model.count_params()) == (layers, parameters)


@pytest.mark.parametrize(
    "name, shape, arguments, layers, parameters, last",
    [
        ("dscnn", (49, 10, 1), {"filters": 64, "blocks": 4, "kernel_size": [10, 4], "strides": 2}, 31, 24_202, (25, 5)),
        ("mobilenet_v2", (96, 128, 3), {}, 153, 342_378, (3, 4)),
        ("mobilenet_v3_small", (32, 32, 3), {"strides": [1, 2, 2, 2, 1]}, 140, 415_538, (4, 4)),
        ("mobilenet_v3_small", (64, 64, 1), {}, 140, 415_394, (2, 2)),
    ],
)
def test_reference_models_for_other_inputs(name, shape, arguments, layers, parameters, last):
    model = build_model(name, shape, 10, arguments)
    assert model.get_layer("pool").input.shape[1:3] == last
    assert (len(model.layers), model.count_params()) == (layers, parameters)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_reference_models_are_fully_supported(name):
    model = build_model(name, (16, 16, 3), 4, {"alpha": 0.1} if name == "mobilenet_v1" else {})
    plan = quantize_model(model).plan
    assert all(op.quantized for op in plan.operators)
    np.testing.assert_allclose(np.sum(model(np.zeros((2, 16, 16, 3))), axis=1), 1, rtol=1e-5)


def test_arguments():
    assert build_model("dscnn", (8, 8, 1), 10, {"filters": 8, "blocks": 1}).get_layer("conv").filters == 8
    assert build_model("mobilenet_v1", (16, 16, 1), 10, {"alpha": 0.25}).get_layer("conv").filters == 8


USERS_MODULE = """
import keras
def sized(input_shape, classes, width=3):
    return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(classes)])
def fixed():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
def nothing(classes):
    return "a model"
def broken():
    raise RuntimeError("the user's own")
value = 3
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text(USERS_MODULE)
    monkeypatch.chdir(tmp_path)
    yield "users_models"
    sys.modules.pop("users_models", None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def test_own_functions(users_module):
    assert build_model(f"{users_module}:sized", (5, 5, 1), 7, {"width": 4}).output_shape == (None, 7)
    assert build_model(f"{users_module}:fixed", (5, 5, 1), 7).output_shape == (None, 2)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet9", {}, "Did you mean 'resnet8'"),
        ("dscnn", {"depth": 3}, "depth.*It takes: input_shape, classes, filters, blocks"),
        ("no_such_module:f", {}, "cannot be imported"),
        ("users_models:missing", {}, "missing"),
        ("users_models:value", {}, "not callable.*int"),
        ("users_models:nothing", {}, "must return a Keras 3 model. Received: str"),
        ("users_models:sized", {"depth": 1}, "depth"),
    ],
)
def test_models_that_cannot_be_built(users_module, name, arguments, message):
    with pytest.raises(ModelError, match=message):
        build_model(name, (8, 8, 1), 10, arguments)


def test_faults_inside_a_users_function_are_named(users_module):
    with pytest.raises(ModelError, match=r"users_models:broken' raised RuntimeError: the user's own"):
        build_model(f"{users_module}:broken", (8, 8, 1), 10)


# --- files


def tiny():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


@pytest.mark.parametrize("suffix", [".keras", pytest.param(".h5", marks=pytest.mark.filterwarnings("ignore"))])
def test_loads_models(tmp_path, suffix):
    model = tiny()
    model.save(tmp_path / f"model{suffix}")
    loaded = load_model(tmp_path / f"model{suffix}")
    np.testing.assert_array_equal(loaded.layers[0].kernel, model.layers[0].kernel)


def test_loads_weights_into_a_model(tmp_path):
    model = tiny()
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = load_model(tmp_path / "a.weights.h5", build=tiny)
    np.testing.assert_array_equal(loaded.layers[0].kernel, model.layers[0].kernel)


def test_weights_need_their_model(tmp_path):
    tiny().save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ModelError, match="weights without a model"):
        load_model(tmp_path / "a.weights.h5")


def test_weights_of_another_model(tmp_path):
    tiny().save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ModelError, match=r"a\.weights\.h5"):
        load_model(tmp_path / "a.weights.h5", lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))


@pytest.mark.parametrize("name", ["missing.keras", "model.txt", "folder.keras"])
def test_files_that_are_no_models(tmp_path, name):
    (tmp_path / "model.txt").write_text("model")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(ModelError, match=name):
        load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.95])
def test_truncated_files(tmp_path, name, kept):
    path = tmp_path / name
    tiny().save(path) if name.endswith(".keras") else tiny().save_weights(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ModelError, match=name):
        load_model(path, build=tiny)


def test_files_with_code_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="Lambda"):
        load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights(tmp_path, value):
    model = tiny()
    check_finite_weights(model)
    model.layers[0].bias.assign([value, 0])
    with pytest.raises(ModelError, match=r"NaN or infinite values in 1 of 2 weights: .*bias"):
        check_finite_weights(model)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_model(tmp_path / "model.keras")


def test_quantized_models_load(tmp_path):
    quantized = quantize_model(tiny())
    quantized.save(tmp_path / "q.keras")
    assert load_model(tmp_path / "q.keras").plan == quantized.plan


OWN_LAYER = """
import keras


class Twice(keras.layers.Layer):
    def call(self, x):
        return x * 2.0


def build():
    return keras.Sequential([keras.Input((4,)), Twice(), keras.layers.Dense(2)])
"""


def test_layers_of_the_user_are_found_in_their_module(tmp_path, monkeypatch):
    (tmp_path / "own_layers.py").write_text(OWN_LAYER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("own_layers").build()
    model.save("float.keras")
    quantize_model(model).save("quantized.keras")
    for name in ("float.keras", "quantized.keras"):
        with pytest.raises(ModelError, match=r"holds 'Twice', which is not Keras's own\. Name the module"):
            load_model(name)
    for module in ("own_layers", "own_layers:build"):
        with own_classes(module):
            assert isinstance(load_model("float.keras").layers[0], sys.modules["own_layers"].Twice)
            load_model("quantized.keras")
    with pytest.raises(ModelError, match="'Twice'"):
        load_model("float.keras")
    with pytest.raises(ModelError, match="'absent_module' cannot be imported"), own_classes("absent_module"):
        pass
    with own_classes(None), own_classes("dscnn"):
        pass
