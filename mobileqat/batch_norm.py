"""BatchNormalization in training by TensorFlow's fused kernel, which Keras 3 does not use.

Keras computes moments, normalization and their gradients from a dozen operators, each of which passes over the
activations.  `FusedBatchNormV3` passes once forward and once backward; results and moving statistics are Keras's own
within float tolerance.
"""

from __future__ import annotations

import keras
import tensorflow as tf

SMALLEST_EPSILON = 1.001e-5  # cuDNN refuses less


def batch_normalize(layer: keras.layers.BatchNormalization, x, training: bool, frozen: bool = False):
    """What `layer(x, training=training and not frozen)` returns and assigns.

    Args:
        layer: a built BatchNormalization.
        x: its input, of any rank.
        training: normalizes by the batch's statistics and moves the moving ones, unless the layer is not trainable.
        frozen: normalizes by the moving statistics, in a training step.
    """
    if not (training and layer.trainable and _fits(layer, x)):
        return layer(x, training=training and not frozen)
    channels = x.shape[-1]
    ones, zeros = tf.ones([channels]), tf.zeros([channels])
    real = tf.cast(x, tf.float32)
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=real if len(x.shape) == 4 else tf.reshape(real, [-1, 1, 1, channels]),
        scale=tf.convert_to_tensor(layer.gamma) if layer.scale else ones,
        offset=tf.convert_to_tensor(layer.beta) if layer.center else zeros,
        mean=tf.convert_to_tensor(layer.moving_mean) if frozen else zeros,
        variance=tf.convert_to_tensor(layer.moving_variance) if frozen else zeros,
        epsilon=layer.epsilon,
        is_training=not frozen,
    )
    y = tf.cast(y if len(x.shape) == 4 else tf.reshape(y, tf.shape(x)), layer.compute_dtype)
    if frozen:
        return y
    # The kernel returns the unbiased variance; Keras averages the biased one.
    count = tf.cast(tf.size(real), tf.float32) / channels
    variance *= tf.maximum(count - 1.0, 1.0) / count
    for moving, batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving.assign(moving * layer.momentum + tf.stop_gradient(batch) * (1.0 - layer.momentum))
    return y


def _fits(layer, x) -> bool:
    is_last = layer.axis in (-1, len(x.shape) - 1)
    is_plain = type(layer) is keras.layers.BatchNormalization and not layer.synchronized
    is_symbolic = isinstance(x, keras.KerasTensor)
    return is_plain and is_last and not is_symbolic and layer.epsilon >= SMALLEST_EPSILON
