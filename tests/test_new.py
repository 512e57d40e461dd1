"""`mobileqat new`: recipes from flags, from answers in a real terminal, and a run of one."""

import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_cli import error, run
from test_progress import ANSI, in_terminal

from mobileqat.errors import RecipeError
from mobileqat.new import Answers, collect, read_epochs, read_image_size, recognize_source, write_recipe
from mobileqat.recipe import Recipe, list_recipes, load_recipe, parse_recipe

ANSWERS = Answers("digits", None, None, "dscnn", "w8a8", 1, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images of two classes and a model function."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            pixels = random.integers(0, 128, (9, 7, 3), np.uint8) + np.uint8(127 * label)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    (tmp_path / "my_model.py").write_text(
        "import keras\n"
        "def build(input_shape, classes):\n"
        "    layers = [keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(classes)]\n"
        "    return keras.Sequential(layers)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("my_model", None)
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_flags_make_a_recipe_that_trains(folder):
    printed = run(
        "new", "mine.yaml", "--data", "photos", "--image-size", 8, 6, "--model", "my_model:build", "--scheme", "w4a8",
        "--float-epochs", 1, "--qat-epochs", 1,
    ).output  # fmt: skip
    assert printed == "mine.yaml is written. Run it with: mobileqat train mine.yaml\n"
    recipe = load_recipe("mine.yaml")
    assert (recipe.data.source, recipe.data.path, recipe.data.image_size) == ("image_folder", "photos", (8, 6))
    assert (recipe.model.name, recipe.quantize.scheme) == ("my_model:build", "w4a8")
    assert (recipe.float.epochs, recipe.qat.epochs) == (1, 1)
    quick = ("--set", "bench.enabled=false", "--set", "parity.samples=4")
    results = json.loads(run("train", "mine.yaml", "--out", "out", *quick, "--json").stdout)
    assert results["data"]["class_names"] == ["dark", "light"]
    assert results["variants"]["qat"]["parity"]["passed"]


def test_defaults_where_nobody_can_be_asked(folder):
    assert json.loads(run("new", "--data", "photos", "--json").stdout) == {"recipe": "photos_mobilenet_v2_w8a8.yaml"}
    recipe = load_recipe("photos_mobilenet_v2_w8a8.yaml")
    assert recipe.name == "photos_mobilenet_v2_w8a8"
    assert (recipe.data.image_size, recipe.float.epochs, recipe.qat.epochs) == ((96, 96), 20, 5)
    assert "Missing option '--data'" in error("new", "other.yaml")
    assert not (folder / "other.yaml").exists()


def test_an_existing_file_is_kept(folder):
    (folder / "mine.yaml").write_text("precious")
    assert "is there already" in error("new", "mine.yaml", "--data", "digits")
    assert (folder / "mine.yaml").read_text() == "precious"
    run("new", "mine.yaml", "--data", "digits", "--model", "dscnn", "--force")
    assert load_recipe("mine.yaml").model.name == "dscnn"
    assert "There is no folder" in error("new", "absent/mine.yaml", "--data", "digits")


def test_questions_are_asked_again_until_answered(folder):
    answers = [
        ("Data:", "nowhere\n"), ("Data:", "photos\n"), ("Model:", "my_model:build\n"), ("Resize", "big\n"),
        ("Resize", "8x6\n"), ("Scheme:", "\n"), ("Epochs of float", "1\n"), ("fine-tuning", "-1\n"),
        ("fine-tuning", "0\n"),
    ]  # fmt: skip
    code, text = in_terminal("new", "mine.yaml", cwd=folder, answers=answers)
    text = ANSI.sub("", text)
    assert code == 0, text
    assert "'nowhere' is neither a folder nor an .npz file" in text and "'big' is no size" in text
    assert "'-1' is no number of epochs" in text
    recipe = load_recipe("mine.yaml")
    assert (recipe.data.path, recipe.data.image_size, recipe.model.name) == ("photos", (8, 6), "my_model:build")
    assert (recipe.quantize.scheme, recipe.float.epochs, recipe.qat.enabled) == ("w8a8", 1, False)


def test_ctrl_c_at_a_question_leaves_no_file(folder):
    code, text = in_terminal(
        "new", "mine.yaml", cwd=folder, answers=[("Data:", "photos\n"), ("[mobilenet_v2]: ", "\x03")]
    )
    assert code == 1 and "Aborted!" in text and "Traceback" not in text
    assert not (folder / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ([None, 24, 32, 1], (24, 32), {"channels": 1}),
        ([None, 24, 32, 3], (24, 32), {}),
        ([None, None, None, 3], (96, 96), {}),
        ([None, 64, 1], (96, 96), {}),
    ],
)
def test_a_keras_file_says_what_images_it_takes(folder, shape, size, options):
    layers = [{"class_name": "InputLayer", "config": {"batch_shape": shape}}, {"class_name": "Dense", "config": {}}]
    with zipfile.ZipFile("mine.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": layers}}))
    run("new", "mine.yaml", "--data", "photos", "--model", "mine.keras")
    recipe = load_recipe("mine.yaml")
    assert (recipe.data.image_size, recipe.data.options) == (size, options)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_what_a_keras_file_does_not_say_has_a_default(folder, content):
    Path("mine.keras").write_bytes(content)
    run("new", "mine.yaml", "--data", "photos", "--model", "mine.keras")
    assert load_recipe("mine.yaml").data.image_size == (96, 96)


@pytest.mark.parametrize("path", ["my photos", "a: b #c", "- x", "'", '"', "null", "1e3", "é", "{a}", "%x", "a\\b"])
def test_any_path_is_read_back(path):
    answers = Answers("image_folder", path, (8, 8), "dscnn", "w8a8", 1, 0)
    recipe = parse_recipe(write_recipe(answers, "x.yaml"), file="x.yaml")
    assert recipe.data.path == path and not recipe.qat.enabled


def test_comments_are_true():
    """What stands as a comment is the default, and gives the same recipe when it is no comment any more."""
    text = write_recipe(ANSWERS, "x.yaml")
    assert max(map(len, text.splitlines())) <= 110
    with_defaults = "\n".join(
        line.replace("# ", "", 1) if line.startswith(("# convert:", "# bench:")) else
        re.sub(r"^  # (\w+: )", r"  \1", line)
        for line in text.splitlines()
    )  # fmt: skip
    assert "\n  input_type: auto" in with_defaults and "\n  batch_size: 64" in with_defaults
    assert parse_recipe(with_defaults, file="x") == parse_recipe(text, file="x")


@pytest.mark.parametrize("name", [row.name for row in list_recipes()])
def test_comments_stay_in_step_with_the_shipped_recipes(name):
    """The suggested keys exist; a shipped recipe's own answers make a recipe of the same meaning."""
    assert isinstance(parse_recipe(write_recipe(ANSWERS, name), file=name), Recipe)


def test_sources_are_recognized(tmp_path):
    (tmp_path / "data.npz").write_bytes(b"")
    assert recognize_source(str(tmp_path)) == ("image_folder", str(tmp_path))
    assert recognize_source(str(tmp_path / "data.npz")) == ("npz", str(tmp_path / "data.npz"))
    assert recognize_source("digits") == ("digits", None)
    assert recognize_source("module:load") == ("module:load", None)
    with pytest.raises(RecipeError, match=r"There is no file 'absent\.npz'"):
        recognize_source("absent.npz")


@pytest.mark.parametrize("text", ["", "8", "0 8", "8 8 8", "-1 2", "8.5 9"])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match="no size"):
        read_image_size(text)
    assert read_image_size("keep") is None and read_image_size(" 8, 9 ") == (8, 9)


def test_what_is_no_answer(tmp_path):
    with pytest.raises(RecipeError, match="no number of epochs"):
        read_epochs("many")
    for model, problem in (("nothing", "is no model"), ("absent.keras", "There is no file")):
        answers = {"--data": "digits", "--model": model}
        with pytest.raises(RecipeError, match=problem):
            collect(lambda option, question, read, default, given=answers: read(given.get(option, default)))
    with pytest.raises(RecipeError, match="nothing to start from"):
        write_recipe(Answers("digits", None, None, "dscnn", "w8a8", 0, 1), "x.yaml")


# ------------------------------------------------------------------ recipes show


def test_recipes_show_prints_the_file_as_it_is():
    row = next(row for row in list_recipes() if row.name == "digits_dscnn_w8a8")
    assert run("recipes", "show", row.name).output == row.path.read_text()
    assert run("recipes", "show", row.path).output == row.path.read_text()
    shown = json.loads(run("recipes", "show", row.name, "--json").stdout)
    assert shown == {"path": str(row.path), "recipe": load_recipe(row.name).model_dump(mode="json")}


def test_recipes_show_full_has_every_default():
    text = run("recipes", "show", "digits_dscnn_w8a8", "--full").output
    assert parse_recipe(text, file="full") == load_recipe("digits_dscnn_w8a8")
    assert "damping: 0.0" in text


def test_recipes_show_of_what_is_not_there():
    assert "no such recipe (did you mean 'digits_dscnn_w8a8'?)" in error("recipes", "show", "digits_dscnn_w8")
