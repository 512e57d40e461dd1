"""Keras 2 models for the tests, made by `tf_keras` in a process of its own: `python keras2_models.py FOLDER`.

Leaves NAME.h5 and NAME.keras of every model below, and NAME.npz with random inputs and the outputs for them.
"""

import os
import sys
from pathlib import Path

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras as keras

layers = keras.layers


def sequential():
    return keras.Sequential(
        [
            layers.Conv2D(4, 3, activation="relu", input_shape=(8, 8, 3)),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3, activation="softmax", kernel_regularizer="l2"),
        ]
    )


def convolutions():
    x = image = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)
    x = layers.Conv2D(4, 3, groups=2, dilation_rate=2, name="conv/grouped")(x)
    x = layers.UpSampling2D(interpolation="bilinear")(x)
    x = layers.Cropping2D(1)(layers.ZeroPadding2D(2)(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, depthwise_regularizer=keras.regularizers.L1L2(0.1, 0.2))(x)
    x = layers.SeparableConv2D(4, 3)(x)
    x = layers.SpatialDropout2D(0.1)(x)
    x = layers.AveragePooling2D(padding="same")(x)
    x = layers.LeakyReLU(0.1)(layers.Activation(tf.nn.relu6)(x))
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.Reshape((-1,))(layers.Permute((3, 1, 2))(x))
    return keras.Model(image, layers.Dense(2, activation="swish", kernel_constraint=keras.constraints.MaxNorm(2))(x))


def nested():
    backbone = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="bn")],
        name="backbone",
    )
    features = keras.Input((6, 6, 4))
    head = keras.Model(features, layers.Dense(2, name="conv")(layers.Flatten()(features)), name="head")
    first, second = keras.Input((8, 8, 3), name="first"), keras.Input((8, 8, 3), name="second")
    x, y = backbone(first), backbone(second)
    return keras.Model([first, second], [head(layers.Add()([x, y])), head(x)])


def nested_without_input_layer():
    inner = keras.Sequential([layers.Conv2D(4, 3, name="conv", input_shape=(8, 8, 3)), layers.ReLU(6.0)])
    model = keras.Model(inner.input, layers.Conv2D(4, 3, name="conv2")(inner.output))
    return keras.Sequential([model, layers.GlobalAveragePooling2D(), layers.Dense(2)])


def shared_layer():
    x = keras.Input((8,))
    dense = layers.Dense(8, activation="tanh")
    return keras.Model(x, dense(dense(x)))


def dictionaries():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate()([a, b])
    outputs = {"u": layers.Dense(2)(x), "v": layers.Dense(1, activation="sigmoid")(x)}
    return keras.Model({"a": a, "b": b}, outputs)


def recurrent():
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(5, 4, mask_zero=True)(tokens)
    x = layers.LSTM(4, return_sequences=True, dropout=0.1)(x)
    x = layers.GRU(3, return_sequences=True, reset_after=False)(x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="sum")(x)
    return keras.Model(tokens, layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])(x))


def recurrent_states():
    x = keras.Input((6, 3))
    sequence, *state = layers.LSTM(4, return_sequences=True, return_state=True)(x)
    return keras.Model(x, layers.LSTM(4)(sequence, initial_state=state))


def normalizations():
    x = sequence = keras.Input((8, 4))
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(1).normal(2, 3, (50, 8, 4)))
    x = layers.GroupNormalization(2)(layers.LayerNormalization()(normalization(x)))
    x = layers.DepthwiseConv1D(3)(layers.Conv1D(4, 3, padding="causal")(x))
    return keras.Model(sequence, layers.GlobalAveragePooling1D()(x))


def frozen():
    backbone = keras.Sequential([layers.Conv2D(4, 3, input_shape=(8, 8, 3)), layers.BatchNormalization()])
    backbone.trainable = False
    image = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(backbone(image, training=False))
    return keras.Model(image, layers.BatchNormalization(trainable=False)(x))


def attention():
    x = keras.Input((6, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    y = layers.TimeDistributed(layers.Dense(4))(layers.Attention()([y, x]))
    return keras.Model(x, layers.Dot(axes=-1, normalize=True)([x, y]))


def activation_layers():
    x = keras.Input((6,))
    y = layers.ELU(0.5)(layers.Softmax()(layers.Dense(4, activation="gelu")(x)))
    return keras.Model(x, layers.Dense(3, activation=layers.ReLU(max_value=2.0))(y))


def operators():
    image = keras.Input((6, 6, 3), name="image")
    x = 2.0 - (layers.Conv2D(4, 3, name="tf.reshape")(image) + 1.0) / 3.0
    y = tf.nn.relu6(x * tf.constant([1.0, 2.0, 3.0, 4.0]))
    z = tf.concat([x, -y], axis=-1)[:, 1:3, :, :2]
    z = tf.reduce_mean(tf.reshape(z[:, :, 0], [-1, 4]), axis=1, keepdims=True)
    a, b = tf.split(tf.maximum(y, x), [1, 3], axis=-1)
    b = tf.nn.leaky_relu(tf.transpose(tf.pad(b, [[0, 0], [1, 1], [0, 0], [0, 0]]), [0, 3, 1, 2]))
    b = tf.matmul(b, b, transpose_b=True)
    a = tf.image.resize(tf.nn.silu(tf.squeeze(tf.expand_dims(a, 1), 1)), (3, 5))
    return keras.Model(image, [tf.clip_by_value(z, -1, 1), a, tf.math.l2_normalize(b, axis=-1), y[..., 0] > 0.5])


MODELS = (
    sequential, convolutions, nested, nested_without_input_layer, shared_layer, dictionaries, recurrent,
    recurrent_states, normalizations, frozen, attention, activation_layers, operators,
)  # fmt: skip
# tf_keras cannot write the ellipsis of a slice into a .keras file.
ONLY_H5 = (operators,)


def random_inputs(model) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shapes = [(tensor.dtype, (5, *tensor.shape[1:])) for tensor in model.inputs]
    return [
        random.integers(0, 5, shape).astype(np.int32) if dtype == tf.int32 else random.normal(size=shape).astype("f")
        for dtype, shape in shapes
    ]


def main(folder: Path) -> None:
    for build in MODELS:
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        model = build()
        random = np.random.default_rng(0)
        for variable in model.weights:  # no bias stays zero, no gain one
            if variable.dtype == tf.float32 and build is not normalizations:
                noise = np.abs(random.normal(0, 0.3, variable.shape))
                variable.assign(variable + noise)
        inputs = random_inputs(model)
        outputs = tf.nest.flatten(model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0))
        arrays = {f"in{i}": array for i, array in enumerate(inputs)} | {f"out{i}": a for i, a in enumerate(outputs)}
        np.savez(folder / f"{build.__name__}.npz", **arrays)
        model.save(folder / f"{build.__name__}.h5")
        if build not in ONLY_H5:
            model.save(folder / f"{build.__name__}.keras")
    model.save(folder / "saved_model", save_format="tf")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
