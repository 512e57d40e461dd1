"""Recipes at volume: whatever the text, the values and the overrides, a recipe that reads back or a line per problem.

`MOBILEQAT_FUZZ=100 pytest tests/test_fuzz_recipe.py` tries a hundred times as many, and other ones.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mobileqat.errors import RecipeError
from mobileqat.recipe import MAX_CHARACTERS, Recipe, dump_recipe, parse_recipe

FACTOR = int(os.environ.get("MOBILEQAT_FUZZ", 0))
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))]
MINIMAL = """\
name: small
description: the least that is a recipe
data: {source: digits}
model: {name: dscnn}
float: {epochs: 1}
"""
SLOWEST_S = 30.0  # for 256 Ki characters: PyYAML takes four seconds for as many as it may get


def tried(examples: int) -> settings:
    return settings(
        max_examples=examples * max(FACTOR, 1),
        derandomize=not FACTOR,
        print_blob=bool(FACTOR),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def data_folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEQAT_DATA", "/data")
        yield


def accepts_or_explains(text: str, *overrides: str) -> None:
    """A recipe that reads back as an equal one, or a printable line of bounded length for each problem."""
    try:
        recipe = parse_recipe(text, file="r.yaml", overrides=overrides)
    except RecipeError as error:
        lines = str(error).split("\n")
        assert all(line.startswith(("r.yaml:", "--set ")) for line in lines)
        assert all(line.isprintable() and len(line) < 1000 for line in lines)
        return
    assert parse_recipe(dump_recipe(recipe), file="dumped.yaml") == recipe


# --- strategies

SYNTAX = st.sampled_from(
    [
        *(": ", "- ", "\n", "\n  ", "{", "}", "[", "]", ", ", "&a ", "*a", "!!", "<<: ", "|", ">", "'", '"', "#", "%"),
        *("---", "...", "? ", "=", "\t", "\\x", "\0", "\ud800", "\x85", "\u2028", "\ufeff", "${HOME}", "!!binary "),
        *("~", "null", "true", "1e3", ".inf", ".nan", "0x", "1:59:59.5", "2001-01-01", "!!python/name:os.abort"),
        *("9" * 5000, "1" + ":59" * 300 + ".5"),
    ]
)
TEXTS = st.text(max_size=60) | st.lists(SYNTAX | st.text(max_size=4), max_size=12).map("".join)


def key_paths(section: type[BaseModel] = Recipe, prefix: tuple[str, ...] = ()):
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_paths(field.annotation, (*prefix, name))


KEYS = st.sampled_from([".".join(path) for path in key_paths()])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.binary(max_size=8)
    | TEXTS
    | st.sampled_from(
        [0, 1, -1, 64, 2**32, 2**200, 1e-320, "w4a8", "npz", "a:b", "int8", "data", "android:x", "${HOME}"]
    )
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return inner | st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4)


VALUES = nested(nested(SCALARS))


def flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), TEXTS), min_size=1, max_size=4)


def edited(text: str, edits: list[tuple[float, int, str]]) -> str:
    """Some pieces of the text are replaced."""
    for place, length, piece in edits:
        start = int(place * len(text))
        text = text[:start] + piece + text[start + length :]
    return text


# --- what is tried


@tried(200)
@given(text=TEXTS)
def test_any_text(text):
    accepts_or_explains(text)
    accepts_or_explains(MINIMAL + text)
    accepts_or_explains(MINIMAL, text, f"data.options={text}")


@tried(60)
@given(text=st.sampled_from(RECIPES), edits=EDITS)
def test_edited_recipes(text, edits):
    accepts_or_explains(edited(text, edits))


@tried(300)
@given(values=st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
def test_any_value_at_any_key(values):
    accepts_or_explains(MINIMAL, *(f"{key}={flow(value)}" for key, value in values))
    document = yaml.safe_load(MINIMAL)
    for key, value in values:
        *path, name = key.split(".")
        section = document
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                return
        section[name] = value
    accepts_or_explains(yaml.safe_dump(document))


@tried(150)
@given(overrides=st.lists(st.builds("{}={}".format, KEYS | TEXTS, TEXTS) | TEXTS, max_size=5))
def test_any_overrides(overrides):
    accepts_or_explains(MINIMAL, *overrides)


LONG = {
    "keys": "".join(f"key{index}: 1\n" for index in range(5000)),
    "one key many times": "a: 1\n" * 5000,
    "list": f"{MINIMAL}quantize: {{exclude: [{'a,' * 20000}]}}",
    "targets": f"{MINIMAL}bench: {{targets: [{'x,' * 20000}]}}",
    "digits": f"seed: {'9' * 200_000}",
    "sexagesimal": f"seed: 1{':59' * 20000}",
    "sexagesimal fraction": f"seed: 1{':59' * 60000}.5",
    "exponent": f"seed: {'1' * 100_000}e{'1' * 100_000}",
    "anchors": f"a: [{''.join(f'&a{index} 1,' for index in range(5000))}]",
    "merges": f"a: {{{'<<: 1,' * 5000}}}",
    "tags": "a: !!x y\n" * 5000,
    "complex keys": "? [a, b]\n: 1\n" * 4000,
    "comment": "#" * 250_000,
    "directives": "%YAML 1.1\n" * 20000,
    "variables": MINIMAL.replace("source: digits", f"source: npz, path: '{'${NO_SUCH_VARIABLE}' * 10000}'"),
    "name": MINIMAL.replace("small", "a" * 200_000 + "!"),
    "function": MINIMAL.replace("dscnn", f"'{'a.' * 100_000}!'"),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_texts_end_soon(text):
    start = time.monotonic()
    accepts_or_explains(text[:MAX_CHARACTERS])
    assert time.monotonic() - start < SLOWEST_S
