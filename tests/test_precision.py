"""Mixed precision: layers compute in 16 bits while training, and nothing else does."""

import json
import zipfile

import keras
import numpy as np
import pytest

from mobileqat import models, pipeline
from mobileqat.errors import ModelError
from mobileqat.recipe import parse_recipe

RECIPE = """
name: half
description: small
data: {source: digits, calibration_samples: 64}
model: {name: dscnn, args: {filters: 8, blocks: 1}}
float: {epochs: 1, batch_size: 64, learning_rate: 0.01}
qat: {epochs: 1, batch_size: 64, learning_rate: 0.01, keep_best: false}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 64}
"""


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_computes_in_16_bits_and_ships_the_same(precision, tmp_path, monkeypatch):
    computed, fit = [], pipeline.fit

    def watched_fit(model, *arguments, **options):
        kernels = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
        computed.append({layer.compute_dtype for layer in model._flatten_layers() if isinstance(layer, kernels)})
        history = fit(model, *arguments, **options)
        assert all(variable.dtype == "float32" for variable in model.trainable_variables)
        return history

    monkeypatch.setattr(pipeline, "fit", watched_fit)
    recipe = parse_recipe(RECIPE, file="half.yaml", overrides=[f"precision={precision}"])
    results = pipeline.train(recipe, tmp_path / "run")
    assert computed == [{precision}, {precision}]  # float, then QAT
    for variant in ("ptq", "qat"):
        assert results["variants"][variant]["parity"]["passed"]
        assert results["variants"][variant]["inspection"]["fully_integer"]
    weights = []
    for variant in ("float", "ptq", "qat"):
        path = tmp_path / "run" / "models" / f"{variant}.keras"
        with zipfile.ZipFile(path) as archive:
            assert "mixed_" not in archive.read("config.json").decode()
        weights.append(models.load_model(path).trainable_variables[0].numpy())
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[1], weights[2])
    assert "FLOAT16" not in json.dumps(results["variants"]["float"]["inspection"]).upper()


class Odd(keras.layers.Layer):
    """Its configuration does not say what it was made with."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, x):
        return x * self.size


def test_a_model_that_cannot_be_made_again_is_refused_by_name():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Odd(3)], name="odd")
    with pytest.raises(ModelError, match=r"Model 'odd' cannot be made again with dtype policy mixed_bfloat16: "):
        models.with_policy(model, "mixed_bfloat16")
