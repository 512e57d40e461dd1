"""Reading, refusing and writing recipes. Error messages are compared whole: they are the interface."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mobileqat import recipe as recipe_module
from mobileqat.errors import RecipeError
from mobileqat.recipe import (
    Recipe,
    dump_recipe,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_schema,
)

RECIPES = Path(__file__).parent.parent / "recipes"
SHIPPED = [
    *(
        "cifar10_mobilenetv3_w8a8",
        "cifar10_resnet8_w8a8",
        "digits_dscnn_scratch_w4a8",
        "digits_dscnn_w8a8",
        "fashion_mnist_mobilenetv1_w8a8",
    ),
    *("fsdd_dscnn_w8a8", "kws01_dscnn_w8a8", "trashnet_mobilenetv2_w8a8"),
]
SECTIONS = (
    "name, description, seed, deterministic, distribute, precision, engine, data, model, float, quantize, qat, "
    "convert, parity, evaluate, bench, report"
)
SOURCES = "digits, cifar10, fashion_mnist, fsdd, kws01, trashnet, image_folder, npz, tfrecord or module:function"
MINIMAL = """\
name: small
description: the least that is a recipe
data: {source: digits}
model: {name: dscnn}
float: {epochs: 1}
"""


def error_of(text: str, *overrides: str) -> str:
    """The message that refuses `text`."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file="r.yaml", overrides=overrides)
    return str(caught.value)


def minimal(*overrides: str) -> Recipe:
    return parse_recipe(MINIMAL, file="r.yaml", overrides=overrides)


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEQAT_DATA", "/data")


# --- what a recipe means ------------------------------------------------------------------------------


def test_defaults() -> None:
    recipe = minimal()
    assert recipe.data.path is None
    assert recipe.float.learning_rate == 1e-3
    assert (recipe.qat.epochs, recipe.qat.learning_rate, recipe.qat.batch_size) == (5, 1e-4, 64)
    assert recipe.quantize.input_range == "data"
    assert recipe.bench.threads == (1,)


def test_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        minimal().qat.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("qat.epochs=2", "qat", "epochs", 2),
        ("qat.learning_rate=1e-5", "qat", "learning_rate", 1e-5),
        ("qat.learning_rate = 1", "qat", "learning_rate", 1.0),
        ("qat.keep_best=false", "qat", "keep_best", False),
        ("bench.threads=[1, 2]", "bench", "threads", (1, 2)),
        ("quantize.input_range=null", "quantize", "input_range", None),
        ("quantize.input_range=", "quantize", "input_range", None),
        ("quantize.input_range=[-1, 1]", "quantize", "input_range", (-1.0, 1.0)),
        ("data.image_size=[96, 64]", "data", "image_size", (96, 64)),
        ("data.options={a: {b: 1}}", "data", "options", {"a": {"b": 1}}),
        ("data.options.a.b=1", "data", "options", {"a": {"b": 1}}),
        ("data.source=my.module:load", "data", "source", "my.module:load"),
        ("model.weights=a=b.h5", "model", "weights", "a=b.h5"),
    ],
)
def test_override(override: str, section: str, key: str, value: object) -> None:
    got = getattr(getattr(minimal(override), section), key)
    assert got == value
    assert type(got) is type(value)


def test_later_override_wins() -> None:
    assert minimal("data.augment={shift: 4}", "data.augment.shift=2", "seed=1", "seed=2").data.augment.shift == 2


def test_scalar_alias_repeats_a_value() -> None:
    text = MINIMAL.replace("{epochs: 1}", "{epochs: 1, batch_size: &b 32}\nqat: {batch_size: *b}")
    assert parse_recipe(text, file="r.yaml").qat.batch_size == 32


def test_environment_is_expanded_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/f")
    recipe = minimal("data.source=npz", "data.path=${FOLDER}/x.npz", "data.options={a: '${FOLDER}'}")
    assert recipe.data.path == "/f/x.npz"
    assert recipe.data.options == {"a": "${FOLDER}"}
    assert minimal("model.weights=${MOBILEQAT_DATA}/${FOLDER}.h5").model.weights == "/data//f.h5"


@pytest.mark.parametrize(
    ("scheme", "value", "fitting"),
    [("w8a16", "int8", "auto, int16 or float32"), ("w8a8", "int16", "auto, int8, uint8 or float32")],
)
def test_interface_fits_scheme(scheme: str, value: str, fitting: str) -> None:
    assert minimal(f"quantize.scheme={scheme}", "convert.output_type=float32").convert.input_type == "auto"
    with pytest.raises(RecipeError, match=f"convert.input_type: not a type of scheme {scheme}, expected {fitting}"):
        minimal(f"quantize.scheme={scheme}", f"convert.input_type={value}")


# --- what is refused, and in which words --------------------------------------------------------------


def test_every_problem_is_listed_with_its_line() -> None:
    text = """\
name: a b
description: "two\\nlines"
sed: 1
data:
  source: cifar
  path: 2024-01-01
  image_size: [32, "32"]
  options: [1]
  augment: 3
model:
  name: resnet8
float:
  epoch: 1
  epochs: true
  learning_rate: 1e-3
  learning_rate: 1e-2
quantize:
  percentile: 99
  input_range: [1, 0]
  3: x
qat:
  ema_decay: 1
  optimizer: lion
  batch_size: .inf
"""
    assert error_of(text).splitlines() == [
        "r.yaml:1: name: wrong value, expected letters, digits, '_', '-' and '.', received 'a b'",
        "r.yaml:2: description: wrong value, expected one line of text, received 'two\\nlines'",
        f"r.yaml:3: sed: unknown key (did you mean 'seed'?), expected one of {SECTIONS}, received 'sed'",
        f"r.yaml:5: data.source: wrong value, expected {SOURCES}, received 'cifar'",
        "r.yaml:6: data.path: wrong type, expected text (quote it), a number, true, false or null, received timestamp",
        'r.yaml:7: data.image_size: wrong value, expected null or [height, width] in pixels, received [32, "32"]',
        "r.yaml:8: data.options: wrong type, expected a mapping of keys to values, received [1]",
        "r.yaml:9: data.augment: wrong type, expected a mapping of keys to values, received 3",
        "r.yaml:13: float.epoch: unknown key (did you mean 'epochs'?), expected one of epochs, batch_size, "
        "optimizer, learning_rate, schedule, warmup_epochs, weight_decay, label_smoothing, clip_norm, weight_ema, "
        "received 'epoch'",
        "r.yaml:14: float.epochs: wrong type, expected a valid integer, received true",
        "r.yaml:16: float.learning_rate: duplicate key, expected each key once, received it first at r.yaml:15",
        "r.yaml:19: quantize.input_range: wrong value, expected 'data', null or [lowest, highest], received [1, 0]",
        "r.yaml:20: quantize.3: key is not text, expected text (quote it), received 3",
        "r.yaml:22: qat.ema_decay: out of range, expected less than 1, received 1",
        "r.yaml:23: qat.optimizer: wrong value, expected 'adam', 'adamw' or 'sgd', received 'lion'",
        "r.yaml:24: qat.batch_size: wrong value, expected a finite number, received .inf",
    ]


def test_missing_keys() -> None:
    assert error_of("data: {}\n\nmodel: {args: {}}\n").splitlines() == [
        "r.yaml:1: name: missing, expected the recipe's name: letters, digits, '_', '-' and '.', received nothing",
        "r.yaml:1: description: missing, expected one line for the list of recipes, received nothing",
        f"r.yaml:1: data.source: missing, expected {SOURCES}, received nothing",
        "r.yaml:3: model.name: missing, expected dscnn, resnet8, mobilenet_v1, mobilenet_v2, mobilenet_v3_small "
        "or module:function, or weights with a "
        "whole model, received nothing",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["float.epochs=0"],
            "r.yaml:4: model.weights: nothing to start from, expected weights or float.epochs of at least 1 "
            "for a reference model, received weights null and 0 epochs",
        ),
        (
            ["quantize.percentile=99"],
            "--set quantize.percentile=99: quantize.percentile: has no use, expected calibration: percentile "
            "beside it, received minmax",
        ),
        (
            ["data.source=npz"],
            "r.yaml:3: data.path: missing, expected the path that source npz reads, received null",
        ),
        (
            ["data.path=x"],
            "--set data.path=x: data.path: has no use, expected null for source digits, received 'x'",
        ),
        (
            ["qat.epochs=1", "qat.warmup_epochs=1.5"],
            "--set qat.warmup_epochs=1.5: qat.warmup_epochs: longer than the training, expected at most "
            "epochs = 1, received 1.5",
        ),
        (
            ["qat.freeze_batch_norm_after=1.1"],
            "--set qat.freeze_batch_norm_after=1.1: qat.freeze_batch_norm_after: out of range, expected less "
            "than or equal to 1, received 1.1",
        ),
        (
            ["qat.freeze_observers_after=-1"],
            "--set qat.freeze_observers_after=-1: qat.freeze_observers_after: out of range, expected greater "
            "than or equal to 0, received -1",
        ),
    ],
)
def test_impossible_combination(overrides: list[str], message: str) -> None:
    assert error_of(MINIMAL, *overrides).splitlines() == [message]


def test_own_model_function_may_bring_its_weights() -> None:
    assert minimal("model.name=zoo:build", "float.epochs=0").model.weights is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "flot.epochs=3",
            f"--set flot.epochs=3: flot: unknown key (did you mean 'float'?), expected one of {SECTIONS}, "
            "received 'flot'",
        ),
        (
            "qat.epochs=abc",
            "--set qat.epochs=abc: qat.epochs: wrong type, expected a valid integer, received 'abc'",
        ),
        (
            "bench.threads=[1, 65]",
            "--set bench.threads=[1, 65]: bench.threads: wrong value, expected a list of thread counts, each "
            "from 1 to 64, received [1, 65]",
        ),
        (
            "name=[",
            "--set name=[: name: not valid YAML: while parsing a flow node, expected the node content, but "
            "found '<stream end>'",
        ),
        (
            "model.name.x=3",
            "--set model.name.x=3: model.name: has no keys, expected a section, received 'dscnn'",
        ),
        (
            "qat.epochs",
            "--set qat.epochs: qat.epochs: not an override, expected key=value, received 'qat.epochs'",
        ),
        (
            "qat..epochs=1",
            "--set qat..epochs=1: qat..epochs=1: not an override, expected key=value, received 'qat..epochs=1'",
        ),
        ("report=4", "--set report=4: report: wrong type, expected a mapping of keys to values, received 4"),
    ],
)
def test_bad_override(override: str, message: str) -> None:
    assert error_of(MINIMAL, override).splitlines() == [message]


def test_every_bad_override_is_listed() -> None:
    assert len(error_of(MINIMAL, "a", "b", "seed=x", "report.x=1").splitlines()) == 4


def test_unset_variable_in_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOBILEQAT_DATA")
    weights = "${MOBILEQAT_DATA}/mlperf-tiny/models/ic01/pretrainedResnet.h5"
    path = RECIPES / "cifar10_resnet8_w8a8.yaml"
    line = path.read_text(encoding="utf-8").splitlines().index(f"  weights: {weights}") + 1
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}:{line}: model.weights: ${{MOBILEQAT_DATA}} is not set, expected a value: set it to a folder "
        "that holds the file, or override with --set model.weights=PATH, or train from scratch with "
        f"--set model.weights=null --set float.epochs=N, received '{weights}'"
    )
    assert load_recipe(path, ["model.weights=null", "float.epochs=3"]).float.epochs == 3


def test_unset_variable_in_data_path() -> None:
    assert error_of(MINIMAL, "data.source=npz", "data.path=${NO_SUCH_VARIABLE}/x") == (
        "--set data.path=${NO_SUCH_VARIABLE}/x: data.path: ${NO_SUCH_VARIABLE} is not set, expected a value: "
        "set it, or override with --set data.path=PATH, received '${NO_SUCH_VARIABLE}/x'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "r.yaml:1: wrong type, expected a mapping of keys to values, received [1]"),
        (
            "a: 1\nb: [",
            "r.yaml:2: not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        (
            "a: 1\n\nb: \0",
            "r.yaml:3: not valid YAML: unacceptable character #x0000: special characters are not allowed",
        ),
        ("a: " + "[" * 50, "r.yaml:1: not valid YAML: more than 32 aliases or 20 levels of nesting"),
        (
            f"a: &x 1\nb: [{'*x,' * 33}]",
            "r.yaml:2: not valid YAML: more than 32 aliases or 20 levels of nesting",
        ),
        (
            "a: &x [1, 2]\nb: [*x, *x]",
            "r.yaml:2: not valid YAML: alias of a list or mapping; only a single value can be repeated",
        ),
        (
            "a: &x [*x]",
            "r.yaml:1: not valid YAML: alias of a list or mapping; only a single value can be repeated",
        ),
        ("#" * (256 * 1024 + 1), "r.yaml:1: not valid YAML: longer than 262144 characters"),
        (
            "!!python/object/apply:os.getcwd []",
            "r.yaml:1: wrong type, expected text (quote it), a number, true, false or null, "
            "received python/object/apply:os.getcwd",
        ),
    ],
)
def test_hostile_or_broken_yaml(text: str, message: str) -> None:
    assert error_of(text) == message


@pytest.mark.parametrize("value", ["0x" + "f" * 9000, "9" * 5000, '!!int ""', "!!bool x", '"\\uD800"'])
def test_unreadable_scalar_is_one_problem(value: str) -> None:
    message = error_of(MINIMAL, f"seed={value}")
    assert ": seed: unreadable value, expected a YAML " in message
    assert len(message.splitlines()) == 1


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digts_dscnn_w8a8", "nowhere/digits_dscnn.yaml"])
def test_missing_recipe_names_the_nearest(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value) == (
        f"{name}: no such recipe (did you mean 'digits_dscnn_w8a8'?), expected a YAML file or one of "
        + ", ".join(SHIPPED)
    )


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not a text file, expected UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "long.yaml").write_text("#" * 300_000, encoding="utf-8")
    with pytest.raises(RecipeError, match="longer than 262144 characters"):
        load_recipe(tmp_path / "long.yaml")


def test_installed_recipes_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_recipes").mkdir()
    (tmp_path / "_recipes" / "small.yaml").write_text(MINIMAL, encoding="utf-8")
    (tmp_path / "_recipes" / "torn.yaml").write_text("a: [", encoding="utf-8")
    monkeypatch.setattr(recipe_module, "__file__", str(tmp_path / "recipe.py"))
    assert load_recipe("small") == minimal()
    assert [(row.name, row.description) for row in list_recipes()] == [
        ("small", "the least that is a recipe"),
        ("torn", "(no description: not a valid recipe)"),
    ]


def test_list_recipes_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOBILEQAT_DATA")
    assert [row.name for row in list_recipes()] == SHIPPED


def test_import_stays_light() -> None:
    code = "import sys, mobileqat.recipe as r; r.list_recipes(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"keras", "tensorflow", "numpy", "jax", "torch"}.isdisjoint(modules.split())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert load_recipe(name).name == name
    assert f"`{name}`" in (RECIPES / "README.md").read_text(encoding="utf-8")
    # What editors check must not disagree with what is accepted.
    jsonschema.Draft202012Validator(recipe_schema()).validate(yaml.safe_load(text))


def test_committed_schema_is_current() -> None:
    committed = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed == recipe_schema(), (
        "recipes/recipe.schema.json is out of date; regenerate it: "
        "python -m mobileqat.recipe > recipes/recipe.schema.json"
    )


def test_every_key_is_described() -> None:
    schema = recipe_schema()
    for section in [schema, *schema["$defs"].values()]:
        undescribed = [key for key, value in section["properties"].items() if "description" not in value]
        assert not undescribed, f"{section['title']}: {undescribed}"


# --- properties ---------------------------------------------------------------------------------------

_SCALARS: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.text()
_FINITE = st.floats(allow_nan=False, allow_infinity=False)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@pytest.mark.parametrize("name", SHIPPED)
def test_dump_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe), file="dumped.yaml") == recipe


@settings(deadline=None)
@given(options=st.dictionaries(st.text(), nested(_SCALARS | _FINITE | st.sampled_from(["1e3", "<<", "null"]))))
def test_dump_reads_back_any_options(options: dict[str, Any]) -> None:
    recipe = minimal().model_copy(update={"data": minimal().data.model_copy(update={"options": options})})
    assert parse_recipe(dump_recipe(recipe), file="dumped.yaml") == recipe


def accepts_or_explains(text: str, *overrides: str) -> None:
    try:
        parse_recipe(text, file="r.yaml", overrides=overrides)
    except RecipeError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith(("r.yaml:", "--set ")) for line in lines)


@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text(alphabet="ab:- \n[]{}&*!|>'\"#%@,?01.e~\\xU\t<="))
def test_any_text_is_accepted_or_explained(text: str) -> None:
    accepts_or_explains(text)
    accepts_or_explains(MINIMAL + text)
    accepts_or_explains(MINIMAL, text, f"data.options={text}")


@settings(deadline=None, max_examples=100)
@given(
    section=st.sampled_from(list(Recipe.model_fields)),
    key=st.text() | st.sampled_from(["epochs", "weights", "path", "input_range", "threads", "options"]),
    value=nested(_SCALARS | st.floats() | st.dates() | st.binary() | st.just(date.min)),
)
def test_any_values_are_accepted_or_explained(section: str, key: str, value: Any) -> None:
    valid = yaml.safe_load(MINIMAL)
    accepts_or_explains(yaml.safe_dump(value))
    accepts_or_explains(yaml.safe_dump(valid | {section: value}))
    accepts_or_explains(yaml.safe_dump(valid | {section: {key: value}}))
    accepts_or_explains(MINIMAL, f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True)}")


# --- engine: tfmot ----------------------------------------------------------------------------------

TFMOT = ("engine=tfmot", "model.name=zoo:build", "float.epochs=0")


def test_tfmot_brings_looser_bars_that_a_recipe_can_set() -> None:
    native, loose, set_by_hand = minimal(), minimal(*TFMOT), minimal(*TFMOT, "parity.min_top1_agreement=0.97")
    assert native.engine == "native" and native.parity.min_identical_output == 0.99
    assert (loose.parity.min_top1_agreement, loose.parity.min_identical_output) == (0.95, 0.5)
    assert (set_by_hand.parity.min_top1_agreement, set_by_hand.parity.min_identical_output) == (0.97, 0.5)
    assert parse_recipe(dump_recipe(loose), file="r.yaml") == loose


def test_a_model_may_be_its_file_alone() -> None:
    assert minimal("model={weights: old.h5}", "float.epochs=0").model.name is None
    assert minimal("engine=tfmot", "model={weights: old.h5}").model.name is None


@pytest.mark.parametrize(
    ("override", "key", "received"),
    [
        ("quantize.calibration=mse", "quantize.calibration", "'mse'"),
        ("quantize.input_range=null", "quantize.input_range", "null"),
        ("qat.distillation=0.25", "qat.distillation", "0.25"),
        ("qat.ema_decay=0.9", "qat.ema_decay", "0.9"),
        ("qat.freeze_observers_after=1", "qat.freeze_observers_after", "1.0"),
        ("parity.max_lsb=2", "parity.max_lsb", "2"),
    ],
)
def test_keys_that_tfmot_has_no_use_for(override: str, key: str, received: str) -> None:
    message = error_of(MINIMAL, *TFMOT, override)
    assert message.startswith(f"--set {override}: {key}: has no use for engine tfmot, expected the default")
    assert message.endswith(f"received {received}")


def test_tfmot_cannot_build_a_reference_model() -> None:
    assert error_of(MINIMAL, "engine=tfmot") == (
        "r.yaml:4: model.name: a Keras 3 model, expected module:function that returns a tf_keras model, or weights "
        "with a whole model for engine tfmot, received 'dscnn'"
    )


def test_an_unknown_engine() -> None:
    assert error_of(MINIMAL, "engine=qkeras").endswith("expected 'native' or 'tfmot', received 'qkeras'")
