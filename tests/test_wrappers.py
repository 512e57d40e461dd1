"""One operator as a layer: fake quantization in training, folding and integer arithmetic at inference."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import give_trained_weights, sequential
from keras import layers as L

from mobileqat import numerics
from mobileqat.calibrate import calibrate
from mobileqat.quantize import quantize_model
from mobileqat.schemes import QuantSpec

WEIGHTS = QuantSpec(8, symmetric=True, per_channel=True)
X = np.random.default_rng(0).uniform(-1, 1, (4, 6, 6, 4)).astype(np.float32)


def quantized(*layers):
    model = sequential(*layers, shape=(6, 6, 4))
    give_trained_weights(model)
    result = quantize_model(model)
    calibrate(result, X)
    return result


def wrapper_of(model):
    return next(wrapper for wrapper in model.operators.values() if wrapper.weight_spec)


def fake_quantized(kernel, axes):
    scales = numerics.weight_scales(kernel, axes, WEIGHTS)
    return np.round(kernel / scales) * scales


LAYERS = {
    "Conv2D": (lambda: L.Conv2D(5, 3), (3,), lambda x, k, b: tf.nn.conv2d(x, k, 1, "VALID") + b),
    "DepthwiseConv2D": (
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
        (2, 3),
        lambda x, k, b: tf.nn.depthwise_conv2d(x, k, [1, 1, 1, 1], "VALID") + b,
    ),
    "Conv2DTranspose": (
        lambda: L.Conv2DTranspose(5, 3),
        (2,),
        lambda x, k, b: tf.nn.conv2d_transpose(x, k, (4, 8, 8, 5), 1, "VALID") + b,
    ),
    "Dense": (lambda: L.Dense(5), (1,), lambda x, k, b: tf.tensordot(x, k, 1) + b),
}


@pytest.mark.parametrize("layer, axes, compute", LAYERS.values(), ids=LAYERS)
def test_training_uses_the_fake_quantized_kernel(layer, axes, compute):
    model = quantized(layer())
    wrapper = wrapper_of(model)
    kernel, bias = wrapper.layer.kernel.numpy(), wrapper.layer.bias.numpy()
    wrapper.output_quantizer.observing = False
    expected = wrapper.output_quantizer(compute(X, fake_quantized(kernel, axes), bias))
    # Another order of summation may move a value across the middle between two integers.
    difference = np.abs(wrapper(X, training=True) - expected) / float(wrapper.output_quantizer.parameters()[0])
    assert np.mean(difference > 0.01) < 0.001 and difference.max() < 1.01
    np.testing.assert_array_equal(wrapper.layer.kernel.numpy(), kernel)


def test_inference_differs_from_training_by_rounding_only():
    model = quantized(L.Conv2D(5, 3), L.BatchNormalization(), L.ReLU())
    wrapper = wrapper_of(model)
    wrapper.batch_norm_frozen = True
    wrapper.output_quantizer.observing = False
    x = model.quantizers["x"](X)
    difference = wrapper(x, training=True) - wrapper(x, training=False)
    assert np.abs(difference).max() <= 1.01 * float(wrapper.output_quantizer.parameters()[0])


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.1}])
@pytest.mark.parametrize("layer", [lambda: L.Conv2D(5, 3), lambda: L.DepthwiseConv2D(3, use_bias=False)])
def test_folding(layer, options):
    """Folded integers and scales stand for kernel * gamma / sqrt(variance + epsilon)."""
    wrapper = wrapper_of(quantized(layer(), L.BatchNormalization(**options)))
    norm, channels = wrapper.batch_norm, wrapper.batch_norm.moving_mean.shape[0]
    factor = 1 / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    factor = factor * norm.gamma.numpy() if norm.scale else factor
    bias = wrapper.layer.bias.numpy() if wrapper.layer.use_bias else np.zeros(channels)
    bias = (bias - norm.moving_mean.numpy()) * factor + (norm.beta.numpy() if norm.center else 0)
    integers, scales, in_units = wrapper.folded(np.float32(0.01))
    axes = wrapper.rule.channel_axes
    shape = [size if axis in axes else 1 for axis, size in enumerate(wrapper.layer.kernel.shape)]
    expected = fake_quantized(wrapper.layer.kernel.numpy(), axes) * factor.reshape(shape)
    np.testing.assert_allclose(integers * tf.reshape(scales, shape), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(in_units * scales * 0.01, bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(integers, np.round(integers))
    assert np.abs(integers).max() == 127 and (scales.numpy() > 0).all()


def test_constants():
    constants = wrapper_of(quantized(L.Conv2D(5, 3), L.BatchNormalization())).constants()
    assert constants["weights"].dtype == np.int8 and constants["weights"].shape == (3, 3, 4, 5)
    assert constants["weights"].min() >= -127
    assert constants["scales"].dtype == np.float32 and constants["scales"].shape == (5,)
    assert constants["bias"].dtype == np.int32 and constants["bias"].shape == (5,)


def test_bias_of_a_dead_channel_fits_int32():
    model = quantized(L.Conv2D(2, 1), L.BatchNormalization())
    wrapper = wrapper_of(model)
    wrapper.batch_norm.gamma.assign([0.0, 1e-30])
    wrapper.batch_norm.beta.assign([3.0, -3.0])
    constants = wrapper.constants()
    assert (constants["weights"] == 0).all()
    np.testing.assert_allclose(
        constants["bias"] * constants["scales"] * wrapper.input_quantizers[0].parameters()[0].numpy(),
        [3, -3],
        rtol=1e-5,
    )


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    model = quantized(L.Conv2D(5, 3), L.ReLU(), L.AveragePooling2D(2), L.Activation("hard_swish"), L.Dense(3))
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(model(x, training=training)))
    sources = [x, *(variable.value for variable in model.trainable_variables)]
    for gradient in tape.gradient(loss, sources):
        assert gradient is not None and np.isfinite(gradient).all() and np.any(gradient != 0)


def test_gradients_are_close_to_the_float_model():
    model = sequential(L.Conv2D(5, 3, activation="tanh"), L.Dense(3), shape=(6, 6, 4))
    give_trained_weights(model)
    q = quantize_model(model)
    calibrate(q, X)
    gradients = []
    for candidate, training in ((model, True), (q, True), (q, False)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(candidate(X, training=training)))
        gradients.append(tape.gradient(loss, candidate.trainable_variables[0].value).numpy().ravel())
    for gradient in gradients[1:]:
        assert np.corrcoef(gradients[0], gradient)[0, 1] > 0.99


def test_saturated_outputs_pass_no_gradient():
    model = quantized(L.Dense(3))
    for quantizer in (model.quantizers["x"], wrapper_of(model).output_quantizer):
        quantizer.observing = False
    wrapper_of(model).output_quantizer.set_range(wrapper_of(model).member, -1e-6, 1e-6)
    for training in (True, False):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(X, training=training))
        gradient = tape.gradient(loss, wrapper_of(model).layer.kernel.value)
        assert np.abs(gradient).max() < 1e-3


@pytest.mark.parametrize("behind", [[], [L.Reshape((3, 1)), L.Dropout(0.0), L.Flatten(name="again")]])
def test_probabilities_are_not_rounded_in_training(behind):
    """Softmax rounded to 0 has an infinite cross entropy and no gradient."""
    model = quantized(L.Flatten(), L.Dense(3, activation="softmax"), *behind)
    off_grid = np.asarray(model(X, training=True)) * 256
    assert np.abs(off_grid - np.round(off_grid)).max() > 0.01
    on_grid = np.asarray(model(X, training=False)) * 256
    np.testing.assert_array_equal(on_grid, np.round(on_grid))


def test_frozen_batch_norm_keeps_its_statistics():
    model = quantized(L.Conv2D(5, 3), L.BatchNormalization())
    wrapper = wrapper_of(model)
    before = wrapper.batch_norm.moving_mean.numpy()
    wrapper.batch_norm_frozen = True
    wrapper(X, training=True)
    np.testing.assert_array_equal(wrapper.batch_norm.moving_mean, before)
    wrapper.batch_norm_frozen = False
    wrapper(X, training=True)
    assert np.any(wrapper.batch_norm.moving_mean.numpy() != before)


def test_dropout_drops_in_training_only():
    model = quantized(L.Conv2D(8, 1), L.Dropout(0.5))
    zeros = [np.mean(np.asarray(model(X, training=training)) == 0) for training in (True, False)]
    assert zeros[0] > 0.4 and zeros[1] < 0.2


def test_wrapped_layers_are_float():
    """Out of its wrapper a layer computes what it always did."""
    wrapper = wrapper_of(quantized(L.Conv2D(5, 3)))
    expected = tf.nn.conv2d(X, wrapper.layer.kernel, 1, "VALID") + wrapper.layer.bias
    np.testing.assert_allclose(wrapper.layer(X), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(wrapper.layer, keras.layers.Conv2D)


# --- preprocessing inside a kernel


@pytest.mark.parametrize(
    "layer", [lambda: L.Conv2D(5, 3), lambda: L.DepthwiseConv2D(3, use_bias=False), lambda: L.Dense(5)]
)
@pytest.mark.parametrize("norm", [(), (L.BatchNormalization,)])
def test_kernel_that_takes_in_preprocessing(layer, norm):
    """Its integers and bias stand for kernel * scale and for what the offset adds; the master weights do not change."""
    mean, variance = [0.2, -0.4, 1.0, 0.0], [0.5, 1.0, 4.0, 0.1]
    model = sequential(L.Normalization(mean=mean, variance=variance), layer(), *(n() for n in norm), shape=(6, 6, 4))
    give_trained_weights(model)
    result = quantize_model(model)
    calibrate(result, X)
    wrapper = wrapper_of(result)
    assert len(result.plan.operators) == 1 and wrapper.prologue is not None
    np.testing.assert_array_equal(wrapper.layer.kernel, model.layers[1].kernel)
    np.testing.assert_allclose(wrapper.float_call(X, training=False), model(X), rtol=1e-4, atol=1e-5)
    step = result.quantizers[wrapper.operator.output].grid()[0]
    assert np.abs(np.asarray(result(X)) - model(X)).max() < 20 * step
    kernel, bias = wrapper.float_constants()
    factor = np.float32(1 / np.sqrt(variance)).reshape((-1, 1))
    if not norm:
        np.testing.assert_allclose(kernel, wrapper.layer.kernel.numpy() * factor, rtol=1e-5)
    assert bias.shape == (kernel.shape[-1] if layer().__class__ is not L.DepthwiseConv2D else 4,)


# --- constants


def constant_of(model):
    return next(wrapper for wrapper in model.operators.values() if wrapper.operator.kind == "CONSTANT")


def test_range_of_a_constant_is_what_it_holds_now():
    """Not an average over training, and the same in a model that trains slowly and in one that trains fast."""
    model = quantized(L.Conv2D(4, 1), L.PReLU(shared_axes=[1, 2]))
    wrapper = constant_of(model)
    wrapper.layer.value.assign(np.float32([0.1, -0.2, 0.3, 7.0]).reshape(wrapper.layer.value.shape))
    model(X, training=True)
    np.testing.assert_allclose(wrapper.output_quantizer.ranges(), [[-0.2, 7.0]], rtol=1e-5)
    assert wrapper.constant().dtype == np.int8 and wrapper.constant().max() == 127


def test_constants_train_with_the_variable_they_come_from():
    model = sequential(L.Conv2D(4, 1, use_bias=False), L.PReLU(shared_axes=[1, 2]), shape=(6, 6, 4))
    result = quantize_model(model)
    assert len(result.trainable_variables) == len(model.trainable_variables) == 2
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(result(X, training=True))
    assert np.any(tape.gradient(loss, constant_of(result).layer.value.value) != 0)


def test_frozen_constants_stay():
    model = sequential(L.Conv2D(4, 1), L.PReLU(shared_axes=[1, 2], trainable=False), shape=(6, 6, 4))
    assert len(quantize_model(model).trainable_variables) == 2
