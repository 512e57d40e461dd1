"""The coverage benchmark: what dies or fails is a row by name, and every QUANTIZE has its reason."""

import importlib.util
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers as L

from mobileqat import calibrate, convert, quantize_model
from mobileqat.flatbuffer import inspect, read

spec = importlib.util.spec_from_file_location(
    "coverage_benchmark", Path(__file__).parents[1] / "benchmarks/coverage.py"
)
coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)


def fine() -> keras.Model:
    return keras.Sequential([keras.Input((6, 6, 3)), L.Conv2D(4, 3), L.MaxPooling2D(), L.Flatten()])


def with_samples() -> tuple[keras.Model, list[np.ndarray]]:
    return fine(), [np.full((4, 6, 6, 3), 0.5, np.float32)]


def fails() -> keras.Model:
    raise ValueError("no such model\nand more")


CASES = {"fine": fine, "fails": fails, "dies": os.abort, "with samples": with_samples}


@pytest.fixture(scope="module")
def rows():
    return coverage.run_table("test_coverage:CASES", None, 300, batch=len(CASES))


def test_rows(rows):
    assert [row["name"] for row in rows] == list(CASES)
    assert rows[0]["operators"] == {"CONV_2D": 1, "MAX_POOL_2D": 1, "RESHAPE": 1} and coverage.passed(rows[0])
    assert rows[1]["error"] == "ValueError: no such model"
    assert rows[2]["error"] == "the process was killed by SIGABRT"
    assert coverage.passed(rows[3])


def test_layer_table(rows):
    lines = coverage.layer_table(rows).splitlines()
    assert lines[2] == (
        "| fine | Conv2D, Flatten, MaxPooling2D | 1 CONV_2D, 1 MAX_POOL_2D, 1 RESHAPE | yes "
        "| 100 % (>= 99 %), 0 LSB (<= 1) |"
    )
    assert lines[4] == "| dies | the process was killed by SIGABRT |  |  |  |"


def test_only_what_is_asked_for():
    assert coverage.run_table("test_coverage:CASES", ["unknown"], 300, batch=1) == []


def gates():
    x = keras.Input((4, 4, 3), name="x")
    gate = L.MaxPooling2D(1)(L.Activation("sigmoid")(L.Conv2D(2, 1)(x)))
    return keras.Model(x, L.Concatenate()([gate, L.Conv2D(2, 1)(x)]))


def pinned():
    x = keras.Input((4, 4, 3), name="x")
    return keras.Model(x, L.Concatenate()([x, L.Conv2D(2, 1)(x)]))


@pytest.mark.parametrize(
    "build, expected",
    [
        (gates, ["LOGISTIC has a fixed scale, CONCATENATION needs one scale for all its inputs"]),
        (pinned, ["the model's input keeps its scale, CONCATENATION needs one scale for all its inputs"]),
        (fine, []),
    ],
)
def test_reasons(build, expected):
    quantized = quantize_model(build(), input_range=(0, 1))
    calibrate(quantized, np.random.default_rng(0).uniform(0, 1, (8, *quantized.input_shape[1:])))
    content = convert(quantized)
    assert list(coverage.requantization_reasons(read(content), inspect(content).requantizations)) == expected
