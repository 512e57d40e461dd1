"""Fake quantization on tensors: the reference arithmetic to the bit, straight-through gradients, moving ranges."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobileqat import fakequant, numerics
from mobileqat.fakequant import FakeQuantize, quantize_weights, straight_through
from mobileqat.schemes import QuantSpec

INT8 = QuantSpec(8)
WEIGHTS = QuantSpec(8, symmetric=True, per_channel=True)
REALS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
QUICK = settings(max_examples=60)


def calibrated(low=-1.0, high=2.0, spec=INT8):
    layer = FakeQuantize(spec, ("x",))
    layer.set_range("x", low, high)
    return layer


def compiled(function, *arguments):
    """The result from inside a traced function, where TensorFlow's graph optimizer is at work."""
    return tf.function(function)(*arguments)


@pytest.mark.parametrize("spec", [INT8, QuantSpec(4), QuantSpec(16, symmetric=True)])
@QUICK
@given(bounds=st.tuples(REALS, REALS).map(sorted))
def test_parameters_are_those_of_numerics(spec, bounds):
    layer = calibrated(*bounds, spec)
    expected = numerics.quantization_parameters(*bounds, spec)
    for scale, zero_point in (layer.parameters(), tf.function(layer.parameters)()):
        assert (scale.numpy(), zero_point.numpy()) == expected


@QUICK
@given(hnp.arrays(np.float32, 20, elements=st.floats(-4, 4, width=32, allow_subnormal=False)))
def test_inference_is_quantize_and_dequantize(values):
    layer = calibrated()
    scale, zero_point = numerics.quantization_parameters(-1, 2, INT8)
    expected = numerics.dequantize(numerics.quantize(values, scale, zero_point, INT8), scale, zero_point)
    np.testing.assert_array_equal(layer(values), expected)
    np.testing.assert_array_equal(compiled(layer, tf.constant(values)), expected)


def test_training_lies_on_the_grid_of_inference():
    layer = calibrated()
    layer.observing = False
    values = np.random.default_rng(0).uniform(-3, 3, 5000).astype(np.float32)
    scale, zero_point = (parameter.numpy() for parameter in layer.parameters())
    in_training, at_inference = (
        np.round(np.asarray(layer(values, member="x", training=training)) / scale + zero_point)
        for training in (True, False)
    )
    np.testing.assert_array_equal(in_training, at_inference)


@QUICK
@given(hnp.arrays(np.float32, 30, elements=st.floats(-3, 3, width=32)))
def test_ties_as_in_numerics(values):
    halves = np.concatenate([values, np.float32([0.5, -0.5, 1.5, -2.5, 0.49999997, 8388609])])
    np.testing.assert_array_equal(fakequant.round_half_away(tf.constant(halves)), numerics.round_half_away(halves))


@QUICK
@given(hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-10, 10, width=32, allow_subnormal=False)))
def test_weights_are_those_of_numerics(weights):
    expected = numerics.weight_scales(weights, (2,), WEIGHTS)
    integers, scales = quantize_weights(tf.constant(weights), (2,), WEIGHTS)
    np.testing.assert_array_equal(scales, expected)
    np.testing.assert_array_equal(integers, np.round(weights / expected))
    again, _ = compiled(lambda w: quantize_weights(w, (2,), WEIGHTS), tf.constant(weights))
    np.testing.assert_array_equal(again, integers)


def gradient_of(function, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(function(x))
    return tape.gradient(y, x).numpy()


@pytest.mark.parametrize("training", [True, False])
def test_gradient_is_one_inside_and_zero_outside(training):
    layer = calibrated()
    layer.observing = False
    x = np.float32([-5, -1.2, -0.9, 0, 0.013, 1.9, 2.2, 7])
    gradient = gradient_of(lambda x: layer(x, member="x", training=training), x)
    np.testing.assert_allclose(gradient, [0, 0, 1, 1, 1, 1, 0, 0], rtol=1e-6)


def test_weight_gradient_is_the_identity():
    weights = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    gradient = gradient_of(lambda w: tf.multiply(*quantize_weights(w, (3,), WEIGHTS)), weights)
    np.testing.assert_allclose(gradient, np.ones_like(weights), rtol=1e-6)


def test_straight_through():
    assert straight_through(tf.constant(3.0), tf.constant(2.5)).numpy() == 3.0
    assert gradient_of(lambda x: straight_through(tf.round(x), 2.0 * x), np.float32(0.3)) == 2.0


def test_ranges_are_a_debiased_average():
    layer = FakeQuantize(INT8, ("a", "b"), ema_decay=0.9)
    assert np.isnan(layer.ranges()).all()
    batches = [np.float32([-1, 2]), np.float32([-3, 1]), np.float32([0, 5])]
    for batch in batches:
        layer(batch, member="a", training=True)
    weights = 0.1 * 0.9 ** np.array([2, 1, 0])
    expected = weights @ np.array(batches) / weights.sum()
    np.testing.assert_allclose(layer.ranges()[0], expected, rtol=1e-6)
    assert np.isnan(layer.ranges()[1]).all(), "a member that was not seen does not move"


def test_first_batch_sets_the_range():
    layer = FakeQuantize(INT8, ("x",), ema_decay=0.999)
    layer(np.float32([-2, 6]), member="x", training=True)
    np.testing.assert_allclose(layer.ranges(), [[-2, 6]], rtol=1e-4)


def test_calibration_starts_the_average():
    layer = FakeQuantize(INT8, ("x",), ema_decay=0.5)
    layer.set_range("x", -4, 4)
    layer(np.float32([0, 8]), member="x", training=True)
    np.testing.assert_allclose(layer.ranges(), [[-2, 6]])


def test_a_decay_of_zero_keeps_the_last_range_only():
    layer = FakeQuantize(INT8, ("a", "b"), ema_decay=0.9)
    for values in ([-1, 2], [-3, 1]):
        layer(np.float32(values), member="a", training=True, ema_decay=0.0)
    np.testing.assert_array_equal(layer.ranges()[0], [-3, 1])
    assert np.isnan(layer.ranges()[1]).all()


def test_what_is_no_member_is_not_observed():
    """A bound that activations are clipped at lies on their grid, and does not move it."""
    layer = calibrated()
    values = layer(np.float32([-50, 0.5]), member="bound", training=True)
    np.testing.assert_array_equal(layer.ranges(), [[-1, 2]])
    assert float(values[0]) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("full_range, lowest", [(False, -127), (True, -128)])
def test_symmetric_grids(full_range, lowest):
    """One with its full range gives the kernel's lowest integer too; zero is exact, and so is its gradient."""
    layer = calibrated(-1.27, 1.27, QuantSpec(8, symmetric=True, full_range=full_range))
    layer.observing = False
    scale, zero_point = layer.parameters()
    assert float(zero_point) == 0 and float(scale) == pytest.approx(0.01)
    for training in (True, False):
        got = np.round(np.asarray(layer(np.float32([-9, 0, 9]), member="x", training=training)) / scale)
        np.testing.assert_array_equal(got, [lowest, 0, 127])


@pytest.mark.parametrize("observing", [True, False])
def test_a_frozen_range_is_a_constant_of_the_step(observing):
    layer = calibrated()
    layer.observing = observing
    shape = tf.TensorSpec([None], tf.float32)
    step = tf.function(lambda x: layer(x, member="x", training=True)).get_concrete_function(shape)
    assert bool(step.captured_inputs) == observing
    values = tf.linspace(-1.0, 2.0, 1000)  # the very range, so that observing it moves nothing
    np.testing.assert_array_equal(step(values), layer(values, member="x", training=True))


@pytest.mark.parametrize("observing", [True, False])
@pytest.mark.parametrize("ceiling", [6.0, float("inf")])
def test_a_grid_that_begins_at_zero_stands_for_the_relu(ceiling, observing):
    plain, short = calibrated(0.0, 5.5), calibrated(0.0, 5.5)
    plain.observing = short.observing = observing
    assert short.rectifies(ceiling)
    x = tf.constant(np.random.default_rng(0).uniform(-8, 8, (50, 40)).astype(np.float32))
    upstream = tf.random.stateless_normal(x.shape, [0, 0])
    results = []
    for _ in range(2):  # the second time with ranges that have moved
        for step in (
            lambda x: plain(tf.minimum(tf.nn.relu(x), ceiling), member="x", training=True),
            lambda x: short.rectify(x, "x", ceiling),
        ):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = step(x)
            results.append((y.numpy(), tape.gradient(y, x, upstream).numpy()))
        np.testing.assert_array_equal(plain.ranges(), short.ranges())
    for (y, gradient), (short_y, short_gradient) in (results[:2], results[2:]):
        np.testing.assert_array_equal(short_y, y)
        np.testing.assert_array_equal(short_gradient, gradient)


@pytest.mark.parametrize("ends", [(-0.5, 3.0), (0.0, 6.5)])
def test_another_grid_does_not_stand_for_a_relu6(ends):
    assert not calibrated(*ends).rectifies(6.0)


@pytest.mark.parametrize("training, observing", [(False, True), (None, True), (True, False)])
def test_ranges_that_do_not_move(training, observing):
    layer = calibrated()
    layer.observing = observing
    layer(np.float32([-50, 50]), member="x", training=training)
    np.testing.assert_array_equal(layer.ranges(), [[-1, 2]])


def test_parameters_follow_the_ranges_in_traced_code():
    """They are computed once per graph, not once for ever."""
    layer = calibrated()
    function = tf.function(lambda x: layer(x) + layer(2.0 * x))
    before = function(tf.constant([0.7])).numpy()
    layer.set_range("x", -1, 1)
    after = function(tf.constant([0.7])).numpy()
    np.testing.assert_allclose(after, layer(np.float32([0.7])) + layer(np.float32([1.4])), rtol=1e-6)
    assert after < before


def test_grid_holds_every_member():
    layer = FakeQuantize(INT8, ("a", "b"))
    layer.set_range("a", -1, 1)
    layer.set_range("b", 0, 3)
    assert layer.parameters()[0].numpy() == numerics.quantization_parameters(-1, 3, INT8)[0]


@pytest.mark.parametrize(
    "options, ranges",
    [({"fixed": (1 / 256, -128)}, [[0, 255 / 256]]), ({"pinned": (0.0, 255.0)}, [[0, 255]])],
)
def test_parameters_that_no_data_changes(options, ranges):
    layer = FakeQuantize(INT8, **options)
    layer(np.float32([-1000, 1000]), member="x", training=True)
    np.testing.assert_allclose(layer.ranges(), ranges)
    assert not layer.is_learned and layer.variables == []
    copy = FakeQuantize.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert [value.numpy() for value in copy.parameters()] == [value.numpy() for value in layer.parameters()]


def test_needs_a_source_of_ranges():
    with pytest.raises(ValueError, match="members"):
        FakeQuantize(INT8)


def test_config_round_trip():
    layer = FakeQuantize(QuantSpec(4, symmetric=True), ("a", "b"), ema_decay=0.7, name="grid")
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert (copy.spec, copy.members, copy.ema_decay, copy.name) == (layer.spec, layer.members, 0.7, "grid")


def test_products_round_once():
    """The graph optimizer may not turn a division by a constant into a product with its reciprocal."""
    values = np.random.default_rng(0).uniform(0.1, 10, 2000).astype(np.float32)
    np.testing.assert_array_equal(
        compiled(lambda a: fakequant.quotient(a, 255), tf.constant(values)), values / np.float32(255)
    )
    np.testing.assert_array_equal(
        compiled(lambda a: fakequant.product(a, np.float32(0.1)), tf.constant(values)), values * np.float32(0.1)
    )


# --- estimators and learned grids


SCALE, BOUNDS = np.float32(0.25), (-3.0, 4.0)
# Away from ties and from the ends, so that finite differences see one branch.
VALUES = np.array([-2.0, -0.9, -0.6, -0.03, 0.0, 0.1, 0.31, 0.77, 0.9, 1.3], np.float32)
R = VALUES / SCALE
BELOW, ABOVE = BOUNDS[0] > R, BOUNDS[1] < R
INSIDE = ~(BELOW | ABOVE)


def relaxed(x, scale, low, high, estimator):
    """What the gradients are those of, in float64: rounding replaced by its residual at `VALUES`, held fixed.

    With the soft estimator rounding itself is r - SOFTNESS / (2 pi) sin(2 pi r), of which x sees the slope.
    """
    r = x / scale
    soft = -fakequant.SOFTNESS / (2 * np.pi) * np.sin(2 * np.pi * x / SCALE) * SCALE if estimator == "soft" else 0.0
    residual = np.round(np.clip(R, *BOUNDS).astype(np.float64)) - R.astype(np.float64)
    inside = scale * (r + residual) + soft
    beyond = x if estimator == "identity" else 0.0
    return np.where(BELOW, low + beyond, np.where(ABOVE, high + beyond, inside))


def gradients(estimator):
    x, scale = tf.constant(VALUES), tf.constant(SCALE)
    low, high = (tf.constant(np.float32(bound * SCALE)) for bound in BOUNDS)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch((x, scale, low, high))
        y = fakequant.fake_quantize(x, scale, BOUNDS, (low, high), estimator)
        values = tf.unstack(y)
    per_value = {
        name: np.array([0.0 if (g := tape.gradient(v, t)) is None else float(g) for v in values])
        for name, t in (("scale", scale), ("low", low), ("high", high))
    }
    return y.numpy(), per_value | {"x": tape.gradient(y, x).numpy()}


@pytest.mark.parametrize("estimator", fakequant.ESTIMATORS)
def test_gradients_in_closed_form(estimator):
    y, found = gradients(estimator)
    np.testing.assert_allclose(y, SCALE * np.round(np.clip(R, *BOUNDS)), rtol=0, atol=0)
    slope = 1 - fakequant.SOFTNESS * np.cos(2 * np.pi * R) if estimator == "soft" else np.ones_like(R)
    outside = 1.0 if estimator == "identity" else 0.0
    np.testing.assert_allclose(found["x"], np.where(INSIDE, slope, outside), rtol=1e-5)
    np.testing.assert_allclose(found["scale"], np.where(INSIDE, np.round(R) - R, 0.0), atol=1e-6)
    np.testing.assert_array_equal(found["low"], BELOW)
    np.testing.assert_array_equal(found["high"], ABOVE)


@pytest.mark.parametrize("estimator", fakequant.ESTIMATORS)
@pytest.mark.parametrize("name", ["x", "scale", "low", "high"])
def test_gradients_against_finite_differences(estimator, name):
    point = {"x": VALUES.astype(np.float64), "scale": float(SCALE)}
    point |= {"low": BOUNDS[0] * float(SCALE), "high": BOUNDS[1] * float(SCALE)}
    step = 1e-6
    up, down = (relaxed(**(point | {name: point[name] + sign * step}), estimator=estimator) for sign in (1, -1))
    _, found = gradients(estimator)
    np.testing.assert_allclose(found[name], (up - down) / (2 * step), rtol=1e-4, atol=1e-5)


def test_the_soft_estimator_is_steep_where_a_sign_changes():
    """The integers -1 and 1 are two apart: one jump, at 0."""
    weights = tf.constant([[-1.0], [-0.5], [0.0], [0.5], [1.0]])  # the scale, their mean-abs, is 0.6
    with tf.GradientTape() as tape:
        tape.watch(weights)
        y = fakequant.fake_quantize_weights(weights, (1,), QuantSpec(1, symmetric=True, per_channel=True), None, "soft")
        total = tf.reduce_sum(y)
    slope = tape.gradient(total, weights).numpy()[:, 0]
    expected = 1 + fakequant.SOFTNESS * np.cos(np.pi * 0.5 / 0.6)
    np.testing.assert_allclose(slope, [0, expected, 1 + fakequant.SOFTNESS, expected, 0], atol=1e-5)


def test_unknown_ends_of_a_range_are_trained():
    """The loss wants larger values than the range holds: the upper end moves, the lower one at 0 does not."""
    layer = FakeQuantize(QuantSpec(4), ("x",), learns_range=True)
    layer.set_range("x", 0.0, 1.0)
    x = tf.constant([[0.2, 0.5, 3.0]])
    optimizer = keras.optimizers.SGD(0.5)
    for _ in range(60):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(x, member="x", training=True) - x))
        optimizer.apply_gradients([(tape.gradient(loss, layer.range_shift.value), layer.range_shift)])
    low, high = layer.ranges()[0]
    assert low == 0.0 and 2.5 < high < 3.5
    scale, zero_point = layer.grid()
    assert zero_point == -8 and scale == np.float32(high) / np.float32(15)


@pytest.mark.parametrize("bounds", [(-1.0, 2.0), (0.0, 2.0), (-0.5, 0.0)])
@pytest.mark.parametrize("estimator", fakequant.ESTIMATORS)
def test_the_gradient_of_an_end(bounds, estimator):
    """d/dhigh of sum(y * w) is that of the scale, (high - low) / levels, inside and 1 beyond; likewise d/dlow."""
    layer = FakeQuantize(QuantSpec(4), ("x",), learns_range=True)
    layer.set_range("x", *bounds)
    layer.estimator = estimator
    scale, zero_point = (float(p) for p in layer.parameters())
    x = np.random.default_rng(0).uniform(-1.5, 2.5, (4, 50)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=x.shape)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, member="x", training=True) * weights)
    found = tape.gradient(loss, layer.range_shift.value).numpy()
    r = x / scale
    below, above = r < -8 - zero_point, r > 7 - zero_point
    residual = np.where(below | above, 0, np.round(r) - r)
    factor = fakequant.step_gradient_factor(50, 7) * (bounds[1] - bounds[0])
    # The scale's own gradient is scaled like that of the ends, since it is computed from them.
    low = np.sum(weights * (below - residual / 15)) * factor if bounds[0] < 0 else 0.0
    high = np.sum(weights * (above + residual / 15)) * factor if bounds[1] > 0 else found[1]
    np.testing.assert_allclose(found, [low, high], rtol=2e-4, atol=1e-4)


def test_weights_beyond_a_learned_scale_saturate():
    weights = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32))
    spec = QuantSpec(4, symmetric=True, per_channel=True)
    ratio = tf.fill((1, 1, 1, 5), 0.5)
    integers, scales = quantize_weights(weights, (3,), spec, ratio)
    np.testing.assert_array_equal(scales, numerics.weight_scales(weights.numpy(), (3,), spec) * np.float32(0.5))
    assert set(np.unique(integers)) == set(range(-7, 8))
    with tf.GradientTape() as tape:
        tape.watch((weights, ratio))
        y = fakequant.fake_quantize_weights(weights, (3,), spec, ratio)
        loss = tf.reduce_sum(y)
    np.testing.assert_array_equal(y, integers * scales)
    by_weight, by_ratio = tape.gradient(loss, (weights, ratio))
    scaled = weights / scales
    np.testing.assert_array_equal(by_weight, np.abs(scaled) <= 7)
    largest = numerics.weight_scales(weights.numpy(), (3,), spec)
    slope = np.where(np.abs(scaled) <= 7, integers - scaled, np.sign(scaled) * 7) * largest
    expected = slope.sum((0, 1, 2)) * fakequant.step_gradient_factor(36, 7)
    np.testing.assert_allclose(np.ravel(by_ratio), expected, rtol=1e-4)


def test_binary_weights():
    """BinaryConnect: signs, never 0, with the mean of absolute values as their scale."""
    weights = np.array([[0.5, -0.1], [-1.5, 0.0], [1.0, 0.2]], np.float32)
    spec = QuantSpec(1, symmetric=True, per_channel=True)
    integers, scales = quantize_weights(tf.constant(weights), (1,), spec)
    np.testing.assert_array_equal(integers, [[1, -1], [-1, 1], [1, 1]])
    np.testing.assert_allclose(np.ravel(scales), [1.0, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(scales, numerics.weight_scales(weights, (1,), spec))


def test_binary_weights_of_a_channel_of_zeros_are_next_to_nothing():
    weights = np.array([[0.5, 0.0], [-1.5, 0.0]], np.float32)
    spec = QuantSpec(1, symmetric=True, per_channel=True)
    integers, scales = quantize_weights(tf.constant(weights), (1,), spec)
    assert np.abs(integers * scales)[:, 1].max() < 1e-8 and np.abs(integers * scales)[:, 0].min() == 1
    np.testing.assert_array_equal(scales, numerics.weight_scales(weights, (1,), spec))


def test_before_quantization_starts_values_pass():
    layer = calibrated()
    layer.quantizing = False
    x = tf.constant([0.123, 5.0])
    np.testing.assert_array_equal(layer(x, member="x", training=True), x)
    assert np.any(layer(x) != x)  # at inference it always quantizes
    assert layer.ranges()[0, 1] > 2.0  # and it goes on observing
