"""The fused BatchNormalization against Keras's own: outputs, gradients and moving statistics."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mobileqat import batch_norm
from mobileqat.batch_norm import batch_normalize

SHAPES = [(8, 6, 5, 7), (16, 7), (4, 9, 7), (1, 7), (1, 1, 1, 7), (2, 2, 3, 2, 7)]
OPTIONS = [{}, {"scale": False}, {"center": False, "momentum": 0.5, "epsilon": 0.1}, {"dtype": "mixed_bfloat16"}]


def make(shape, **options):
    layer = keras.layers.BatchNormalization(**options)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(0.5, 1.5, weight.shape).astype(np.float32) for weight in layer.weights])
    return layer


def run(layer, function, x, weight):
    """Output, gradients and what the weights are afterwards."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * weight)
    trained = [variable.value for variable in layer.trainable_weights]
    return [y, *tape.gradient(loss, [x, *trained]), *layer.get_weights()]


def make_sure_it_fuses(monkeypatch):
    calls = []
    fused = tf.raw_ops.FusedBatchNormV3
    monkeypatch.setattr(batch_norm.tf.raw_ops, "FusedBatchNormV3", lambda **given: calls.append(1) or fused(**given))
    return calls


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_keras(shape, options, frozen, monkeypatch):
    calls = make_sure_it_fuses(monkeypatch)
    ours, kerass = make(shape, **options), make(shape, **options)
    rng = np.random.default_rng(1)
    x = tf.constant(rng.normal(2, 3, shape), ours.compute_dtype)
    weight = tf.constant(rng.normal(size=shape).astype(np.float32))
    got = run(ours, lambda x: batch_normalize(ours, x, True, frozen), x, weight)
    expected = run(kerass, lambda x: kerass(x, training=not frozen), x, weight)
    assert calls
    tolerance = 0.02 if options.get("dtype") else 2e-5
    for a, b in zip(got, expected, strict=True):
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options, training",
    [({"axis": 1}, True), ({"epsilon": 1e-6}, True), ({"synchronized": True}, True), ({}, False)],
    ids=str,
)
def test_what_the_kernel_does_not_do_is_left_to_keras(options, training, monkeypatch):
    calls = make_sure_it_fuses(monkeypatch)
    layer, same = make((4, 3, 3, 3), **options), make((4, 3, 3, 3), **options)
    x = tf.random.normal((4, 3, 3, 3))
    np.testing.assert_array_equal(batch_normalize(layer, x, training), same(x, training=training))
    np.testing.assert_array_equal(layer.moving_mean, same.moving_mean)
    assert not calls


def test_a_layer_that_is_not_trainable_keeps_its_statistics(monkeypatch):
    calls = make_sure_it_fuses(monkeypatch)
    layer = make((4, 3))
    layer.trainable = False
    before = layer.get_weights()
    batch_normalize(layer, tf.random.normal((4, 3)), True)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not calls
