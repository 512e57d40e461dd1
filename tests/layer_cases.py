"""One small float model per layer, setting, operator and topology that quantizes: `LAYER_CASES`, by section.

A name starts with the Keras layer or operator that the case is about; each value builds the model.  The tests hold
every case to the contract (`test_layers.py`), and the coverage page of the documentation lists them.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from contract import sequential
from keras import layers as L
from keras import ops

from mobileqat.lowering import register_rule

IMAGE = (9, 9, 3)
STEPS = (12, 4)
VECTOR = (11,)


def chain(*layers: Callable, shape=IMAGE) -> Callable[[], keras.Model]:
    """Builds a sequential model of fresh layers."""
    return lambda: sequential(*(layer() for layer in layers), shape=shape)


def computes(function: Callable, shape=(6, 6, 4)) -> Callable[[], keras.Model]:
    """Builds a model of Keras operators on the output of a Dense layer."""

    def build():
        x = keras.Input(shape, name="x")
        return keras.Model(x, function(L.Dense(shape[-1])(x)))

    return build


def joins(layer: Callable, *shapes) -> Callable[[], keras.Model]:
    """Builds a model of one layer on a list of inputs."""

    def build():
        inputs = [keras.Input(shape, name=f"x{index}") for index, shape in enumerate(shapes)]
        return keras.Model(inputs, layer()(inputs))

    return build


def two_branches(function: Callable) -> Callable[[], keras.Model]:
    """Builds a model in which a function joins an input and two convolutions of it."""

    def build():
        x = keras.Input((6, 6, 3), name="x")
        return keras.Model(x, function(x, L.Conv2D(4, 3, padding="same")(x), L.Conv2D(4, 1, activation="relu")(x)))

    return build


# ------------------------------------------------------------------ layers with a kernel

CONVOLUTIONS = {
    "Conv1D": chain(lambda: L.Conv1D(6, 3), shape=STEPS),
    "Conv1D, one channel": chain(lambda: L.Conv1D(3, 5, padding="same"), shape=(9, 1)),
    "Conv1D, strides": chain(lambda: L.Conv1D(6, 3, 2, "same", activation="relu"), shape=(13, 3)),
    "Conv1D, causal": chain(lambda: L.Conv1D(6, 4, padding="causal", use_bias=False), shape=STEPS),
    "Conv1D, causal, dilated": chain(
        lambda: L.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="relu"), shape=STEPS
    ),
    "Conv1D, groups": chain(lambda: L.Conv1D(4, 3, groups=2), shape=STEPS),
    "Conv1D, several": chain(
        lambda: L.Conv1D(8, 3), L.BatchNormalization, L.ReLU, lambda: L.MaxPooling1D(2), lambda: L.Conv1D(8, 3),
        L.BatchNormalization, L.LeakyReLU, L.GlobalAveragePooling1D, lambda: L.Dense(3), shape=(20, 2),
    ),
    "Conv2D": chain(lambda: L.Conv2D(8, 3)),
    "Conv2D, one channel": chain(lambda: L.Conv2D(5, 3, padding="same"), shape=(7, 7, 1)),
    "Conv2D, one filter": chain(lambda: L.Conv2D(1, 3)),
    "Conv2D, no bias": chain(lambda: L.Conv2D(8, (3, 2), use_bias=False)),
    "Conv2D, strides on an odd size": chain(lambda: L.Conv2D(8, 3, 2, "same", activation="relu")),
    "Conv2D, strides on an even size": chain(lambda: L.Conv2D(8, 3, 2, "same", activation="relu6"), shape=(8, 10, 3)),
    "Conv2D, strides (1, 2), kernel (2, 5)": chain(lambda: L.Conv2D(4, (2, 5), (1, 2), "same")),
    "Conv2D, strides beyond the kernel": chain(lambda: L.Conv2D(4, 1, 2, "same")),
    "Conv2D, dilated": chain(lambda: L.Conv2D(8, 3, dilation_rate=2, padding="same")),
    "Conv2D, dilation (1, 3)": chain(lambda: L.Conv2D(8, 3, dilation_rate=(1, 3))),
    "Conv2D, groups": chain(lambda: L.Conv2D(8, 3, groups=2, padding="same"), shape=(7, 7, 4)),
    "Conv2D, groups of one channel": chain(lambda: L.Conv2D(6, 3, groups=3), shape=(7, 7, 3)),
    "Conv2D, groups, dilated": chain(lambda: L.Conv2D(6, 3, groups=2, dilation_rate=2), shape=(7, 7, 4)),
    "Conv2D, ReLU(1)": chain(lambda: L.Conv2D(4, 3), lambda: L.ReLU(max_value=1.0)),
    "Conv2D, softmax": chain(lambda: L.Conv2D(4, 3, activation="softmax")),
    "DepthwiseConv1D": chain(lambda: L.DepthwiseConv1D(3, padding="same"), shape=STEPS),
    "DepthwiseConv1D, strides, multiplier": chain(lambda: L.DepthwiseConv1D(3, 2, depth_multiplier=2), shape=STEPS),
    "DepthwiseConv1D, dilated": chain(lambda: L.DepthwiseConv1D(3, dilation_rate=2, activation="relu"), shape=STEPS),
    "DepthwiseConv2D": chain(lambda: L.DepthwiseConv2D(3, padding="same", activation="relu")),
    "DepthwiseConv2D, one channel": chain(lambda: L.DepthwiseConv2D(3), shape=(7, 7, 1)),
    "DepthwiseConv2D, multiplier": chain(lambda: L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)),
    "DepthwiseConv2D, strides": chain(lambda: L.DepthwiseConv2D(3, 2, "same"), shape=(8, 9, 3)),
    "DepthwiseConv2D, dilated": chain(lambda: L.DepthwiseConv2D((3, 5), dilation_rate=2, padding="same")),
    "SeparableConv1D": chain(lambda: L.SeparableConv1D(6, 3, activation="relu"), shape=STEPS),
    "SeparableConv1D, strides, no bias": chain(lambda: L.SeparableConv1D(6, 3, 2, "same", use_bias=False), shape=STEPS),
    "SeparableConv2D": chain(lambda: L.SeparableConv2D(8, 3, 2, "same", depth_multiplier=2, activation="relu")),
    "SeparableConv2D, no bias": chain(lambda: L.SeparableConv2D(8, 3, use_bias=False)),
    "SeparableConv2D, dilated": chain(lambda: L.SeparableConv2D(4, 3, dilation_rate=2, padding="same")),
    "Conv1DTranspose": chain(lambda: L.Conv1DTranspose(6, 3, 2, "same", activation="relu"), shape=STEPS),
    "Conv1DTranspose, valid": chain(lambda: L.Conv1DTranspose(4, 4, 2), shape=(5, 3)),
    "Conv2DTranspose": chain(lambda: L.Conv2DTranspose(4, 3, 2, "same", activation="relu"), shape=(5, 4, 3)),
    "Conv2DTranspose, valid": chain(lambda: L.Conv2DTranspose(4, (2, 3), 1), shape=(5, 4, 3)),
    "Conv2DTranspose, even kernel": chain(lambda: L.Conv2DTranspose(4, 4, 2, "same", use_bias=False), shape=(4, 4, 3)),
}  # fmt: skip

DENSE = {
    "Dense": chain(lambda: L.Dense(5, activation="relu"), lambda: L.Dense(3), shape=VECTOR),
    "Dense, one unit": chain(lambda: L.Dense(1, use_bias=False), shape=VECTOR),
    "Dense, one feature": chain(lambda: L.Dense(4), shape=(1,)),
    "Dense, rank 3": chain(lambda: L.Dense(5, activation="relu6"), lambda: L.Dense(3), shape=(4, 11)),
    "Dense, rank 4": chain(lambda: L.Dense(5), shape=(4, 3, 11)),
    "Dense, rank 5": chain(lambda: L.Dense(5, activation="relu"), shape=(2, 4, 3, 6)),
    "Dense, softmax": chain(lambda: L.Dense(5, activation="softmax"), shape=VECTOR),
    "EinsumDense, last axis": chain(lambda: L.EinsumDense("bc,cd->bd", 5, bias_axes="d"), shape=VECTOR),
    "EinsumDense, any rank": chain(lambda: L.EinsumDense("...c,cd->...d", 5, bias_axes="d"), shape=STEPS),
    "EinsumDense, two new axes": chain(
        lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", activation="relu"), shape=STEPS
    ),
    "EinsumDense, two axes summed": chain(
        lambda: L.EinsumDense("abcd,cde->abe", (None, 5), bias_axes="e"), shape=(4, 2, 3)
    ),
    "EinsumDense, middle axis": chain(lambda: L.EinsumDense("abc,bd->acd", (4, 5)), shape=STEPS),
    "EinsumDense, transposed kernel": chain(lambda: L.EinsumDense("abc,dc->abd", (None, 5)), shape=STEPS),
}


def embedding(*layers, size=6, rows=20) -> Callable[[], keras.Model]:
    def build():
        tokens = keras.Input((7,), dtype="int32", name="tokens")
        x = L.Embedding(rows, size)(tokens)
        for layer in layers:
            x = layer()(x)
        return keras.Model(tokens, x)

    return build


def shared_embedding():
    a, b = (keras.Input((5,), dtype="int32", name=name) for name in ("first", "second"))
    table = L.Embedding(20, 6)
    return keras.Model([a, b], L.Dense(3)(L.Concatenate(axis=1)([table(a), table(b)])))


def embedding_beside_numbers():
    tokens, x = keras.Input((1,), dtype="int32", name="tokens"), keras.Input((5,), name="x")
    return keras.Model([tokens, x], L.Dense(3)(L.Concatenate()([L.Flatten()(L.Embedding(20, 3)(tokens)), x])))


EMBEDDING = {
    "Embedding": embedding(lambda: L.Dense(3)),
    "Embedding, alone": embedding(),
    "Embedding, one feature": embedding(lambda: L.Flatten(), lambda: L.Dense(3), size=1),
    "Embedding, Conv1D": embedding(lambda: L.Conv1D(4, 3, activation="relu"), lambda: L.GlobalMaxPooling1D()),
    "Embedding, GlobalAveragePooling1D": embedding(lambda: L.GlobalAveragePooling1D(), lambda: L.Dense(3)),
    "Embedding, shared": shared_embedding,
    "Embedding, beside numbers": embedding_beside_numbers,
}

# ------------------------------------------------------------------ normalization

NORMALIZATION = {
    "BatchNormalization, after Conv2D": chain(lambda: L.Conv2D(8, 3), L.BatchNormalization, L.ReLU),
    "BatchNormalization, after Conv2D without bias": chain(
        lambda: L.Conv2D(8, 3, use_bias=False), L.BatchNormalization
    ),
    "BatchNormalization, scale=False": chain(
        lambda: L.Conv2D(8, 3), lambda: L.BatchNormalization(scale=False), lambda: L.ReLU(6.0)
    ),
    "BatchNormalization, center=False": chain(lambda: L.Conv2D(8, 3), lambda: L.BatchNormalization(center=False)),
    "BatchNormalization, after Conv1D": chain(lambda: L.Conv1D(8, 3), L.BatchNormalization, L.ReLU, shape=STEPS),
    "BatchNormalization, after DepthwiseConv1D": chain(
        lambda: L.DepthwiseConv1D(3), L.BatchNormalization, lambda: L.ReLU(6.0), shape=STEPS
    ),
    "BatchNormalization, after DepthwiseConv2D": chain(
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), L.BatchNormalization, L.ReLU
    ),
    "BatchNormalization, after SeparableConv2D": chain(lambda: L.SeparableConv2D(8, 3), L.BatchNormalization, L.ReLU),
    "BatchNormalization, after Conv2DTranspose": chain(
        lambda: L.Conv2DTranspose(4, 3, 2, "same"), L.BatchNormalization, L.ReLU
    ),
    "BatchNormalization, after Dense": chain(lambda: L.Dense(6), L.BatchNormalization, L.ReLU, shape=VECTOR),
    "BatchNormalization, after Dense of rank 3": chain(lambda: L.Dense(6), L.BatchNormalization, L.ReLU, shape=STEPS),
    "BatchNormalization, after Dense and Dropout": chain(
        lambda: L.Dense(6), lambda: L.Dropout(0.5), L.BatchNormalization, shape=VECTOR
    ),
    "BatchNormalization, after the activation": chain(lambda: L.Conv2D(8, 3, activation="relu"), L.BatchNormalization),
    "BatchNormalization, after a linear Activation": chain(
        lambda: L.Dense(6), lambda: L.Activation("linear"), L.BatchNormalization, shape=VECTOR
    ),
    "BatchNormalization, twice": chain(lambda: L.Conv2D(8, 3), L.BatchNormalization, L.BatchNormalization, L.ReLU),
    "BatchNormalization, before Conv2D": chain(L.BatchNormalization, lambda: L.Conv2D(4, 3)),
    "BatchNormalization, before Dense": chain(L.BatchNormalization, lambda: L.Dense(3), shape=VECTOR),
    "BatchNormalization, alone, rank 2": chain(L.BatchNormalization, shape=VECTOR),
    "BatchNormalization, alone, rank 3": chain(L.BatchNormalization, shape=STEPS),
    "BatchNormalization, alone, rank 4": chain(L.BatchNormalization, L.ReLU),
    "BatchNormalization, alone, one channel": chain(L.BatchNormalization, shape=(7, 5, 1)),
    "BatchNormalization, not trainable": chain(
        lambda: L.Conv2D(4, 3), lambda: L.BatchNormalization(trainable=False), L.ReLU
    ),
    "LayerNormalization": chain(L.LayerNormalization, shape=STEPS),
    "LayerNormalization, rank 2": chain(lambda: L.Dense(8), L.LayerNormalization, shape=VECTOR),
    "LayerNormalization, rank 4": chain(L.LayerNormalization),
    "LayerNormalization, center=False, scale=False": chain(
        lambda: L.LayerNormalization(center=False, scale=False), shape=STEPS
    ),
    "LayerNormalization, scale=False": chain(lambda: L.LayerNormalization(scale=False), shape=STEPS),
    "LayerNormalization, two axes": chain(lambda: L.LayerNormalization(axis=[1, 2]), shape=STEPS),
    "LayerNormalization, axis 1": chain(lambda: L.LayerNormalization(axis=1), shape=STEPS),
    "RMSNormalization": chain(L.RMSNormalization, shape=STEPS),
    "RMSNormalization, rank 4": chain(lambda: L.Conv2D(8, 3), L.RMSNormalization),
    "GroupNormalization": chain(lambda: L.GroupNormalization(2), shape=STEPS),
    "GroupNormalization, images": chain(lambda: L.Conv2D(6, 3), lambda: L.GroupNormalization(3), L.ReLU),
    "GroupNormalization, one group": chain(lambda: L.GroupNormalization(1), shape=(5, 5, 3)),
    "GroupNormalization, a group per channel": chain(lambda: L.GroupNormalization(-1), shape=STEPS),
    "GroupNormalization, scale=False, center=False": chain(
        lambda: L.GroupNormalization(2, scale=False, center=False), shape=STEPS
    ),
    "UnitNormalization": chain(L.UnitNormalization, shape=STEPS),
    "UnitNormalization, rank 2": chain(lambda: L.Dense(5), L.UnitNormalization, shape=VECTOR),
    "UnitNormalization, axis 1": chain(lambda: L.UnitNormalization(axis=1), shape=STEPS),
    "UnitNormalization, two axes": chain(lambda: L.UnitNormalization(axis=[-2, -1]), shape=STEPS),
}

# ------------------------------------------------------------------ attention


def self_attention(layer: Callable, **arguments):
    def build():
        x = keras.Input((6, 8), name="x")
        h = L.Dense(8)(x)
        return keras.Model(x, layer()(h, h, **arguments))

    return build


def cross_attention(layer: Callable):
    def build():
        x, y = keras.Input((6, 8), name="x"), keras.Input((5, 8), name="y")
        return keras.Model([x, y], layer()(x, y))

    return build


def key_of_its_own():
    x, y, z = (keras.Input((6, 8), name=name) for name in "xyz")
    return keras.Model([x, y, z], L.MultiHeadAttention(2, 4)(x, y, key=z))


def transformer_block():
    x = keras.Input((6, 8), name="x")
    h = L.LayerNormalization()(x)
    h = x + L.Dropout(0.1)(L.MultiHeadAttention(2, 4)(h, h))
    return keras.Model(x, h + L.Dense(8)(L.Dense(16, activation="gelu")(L.LayerNormalization()(h))))


def attention_of_one_tensor():
    x = keras.Input((6, 8), name="x")
    h = L.Dense(8)(x)
    return keras.Model(x, L.Attention()([h, h]))


ATTENTION = {
    "MultiHeadAttention": self_attention(lambda: L.MultiHeadAttention(2, 4)),
    "MultiHeadAttention, one head": self_attention(lambda: L.MultiHeadAttention(1, 3, dropout=0.1)),
    "MultiHeadAttention, of another sequence": cross_attention(
        lambda: L.MultiHeadAttention(2, 4, value_dim=3, output_shape=5, use_bias=False)
    ),
    "MultiHeadAttention, key of its own": key_of_its_own,
    "MultiHeadAttention, transformer block": transformer_block,
    "GroupQueryAttention": self_attention(lambda: L.GroupQueryAttention(4, 4, 2)),
    "GroupQueryAttention, one group": cross_attention(lambda: L.GroupQueryAttention(4, 2, 1, use_bias=False)),
    "Attention": joins(lambda: L.Attention(), (6, 8), (5, 8)),
    "Attention, key of its own": joins(lambda: L.Attention(), (6, 8), (5, 3), (5, 8)),
    "Attention, one tensor": attention_of_one_tensor,
}

# ------------------------------------------------------------------ merging

MERGING = {
    "Add": two_branches(lambda x, a, b: L.ReLU()(L.Add()([a, b]))),
    "Add, three": two_branches(lambda x, a, b: L.ReLU(6.0)(L.Add()([a, b, L.Conv2D(4, 1)(x)]))),
    "Add, twice the same": two_branches(lambda x, a, b: L.Add()([a, a])),
    "Add, broadcast": two_branches(lambda x, a, b: L.Add()([a, L.GlobalAveragePooling2D(keepdims=True)(b)])),
    "Add, of the inputs": joins(L.Add, (6, 6, 3), (6, 6, 3)),
    "Add, rank 2": joins(L.Add, (5,), (5,), (1,)),
    "Subtract": two_branches(lambda x, a, b: L.Subtract()([a, b])),
    "Subtract, broadcast": two_branches(lambda x, a, b: L.Subtract()([L.GlobalMaxPooling2D(keepdims=True)(b), a])),
    "Multiply": two_branches(lambda x, a, b: L.ReLU()(L.Multiply()([a, b]))),
    "Multiply, squeeze and excite": two_branches(
        lambda x, a, b: L.Multiply()(
            [gate := L.Conv2D(4, 1, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(a)), a, gate]
        )
    ),
    "Multiply, by itself": two_branches(lambda x, a, b: L.Multiply()([a, a])),
    "Average": two_branches(lambda x, a, b: L.Average()([a, b])),
    "Average, three": two_branches(lambda x, a, b: L.Average()([a, b, L.Conv2D(4, 1)(x)])),
    "Maximum": two_branches(lambda x, a, b: L.Maximum()([a, b])),
    "Maximum, three": two_branches(lambda x, a, b: L.Maximum()([a, b, L.Conv2D(4, 1)(x)])),
    "Maximum, of probabilities": two_branches(lambda x, a, b: L.Maximum()([L.Softmax()(a), b])),
    "Minimum": two_branches(lambda x, a, b: L.Minimum()([a, b])),
    "Minimum, of the inputs": joins(L.Minimum, (5,), (5,)),
    "Concatenate": two_branches(lambda x, a, b: L.Conv2D(3, 1)(L.Concatenate()([a, b]))),
    "Concatenate, tensors of fixed grids": two_branches(
        lambda x, a, b: L.Concatenate()(
            [L.Softmax()(a), L.Activation("sigmoid")(b), L.MaxPooling2D(1)(L.Activation("tanh")(a)), b]
        )
    ),
    "Concatenate, only tensors of fixed grids": two_branches(
        lambda x, a, b: L.Concatenate()([L.Softmax()(a), L.Activation("tanh")(b)])
    ),
    "Concatenate, the input": two_branches(lambda x, a, b: L.Concatenate(axis=-1)([L.MaxPooling2D(1)(x), a])),
    "Concatenate, axis 1, twice the same": two_branches(lambda x, a, b: L.Concatenate(axis=1)([a, a])),
    # The shared range must not let the first one grow.
    "Concatenate, a clipped tensor": two_branches(lambda x, a, b: L.Concatenate()([L.ReLU(max_value=0.3)(a), b])),
    "Concatenate, of two": two_branches(
        lambda x, a, b: [L.Concatenate()([a, b]), L.Concatenate()([b, L.Conv2D(2, 1)(x)])]
    ),
    "Concatenate, rank 2": joins(L.Concatenate, (3,), (1,), (5,)),
    "Concatenate, rank 3": joins(lambda: L.Concatenate(axis=1), (3, 4), (1, 4)),
    "Concatenate, rank 5": joins(lambda: L.Concatenate(axis=-2), (2, 3, 4, 3), (2, 3, 2, 3)),
    "Dot": joins(lambda: L.Dot(axes=(2, 2)), (6, 8), (5, 8)),
    "Dot, axes (2, 1)": joins(lambda: L.Dot(axes=(2, 1)), (6, 8), (8, 5)),
    "Dot, vectors": joins(lambda: L.Dot(axes=1), (8,), (8,)),
    "Dot, normalized vectors": joins(lambda: L.Dot(axes=1, normalize=True), (8,), (8,)),
    "Dot, normalized": joins(lambda: L.Dot(axes=-1, normalize=True), (6, 8), (5, 8)),
}

# ------------------------------------------------------------------ pooling

POOLING = {
    "MaxPooling1D": chain(lambda: L.MaxPooling1D(2), shape=(13, 3)),
    "MaxPooling1D, same": chain(lambda: L.MaxPooling1D(3, 2, "same"), shape=STEPS),
    "MaxPooling2D": chain(lambda: L.MaxPooling2D(), lambda: L.MaxPooling2D(3, 1, "same")),
    "MaxPooling2D, windows partly outside": chain(lambda: L.MaxPooling2D((3, 2), (2, 1), "same")),
    "AveragePooling1D": chain(lambda: L.AveragePooling1D(2), shape=STEPS),
    "AveragePooling1D, same": chain(lambda: L.AveragePooling1D(3, 2, "same"), shape=STEPS),
    "AveragePooling2D": chain(lambda: L.AveragePooling2D(2)),
    "AveragePooling2D, same": chain(lambda: L.AveragePooling2D(3, 2, "same"), shape=(9, 8, 3)),
    "AveragePooling2D, windows partly outside": chain(lambda: L.AveragePooling2D(5, 4, "same")),
    "AveragePooling2D, pool (2, 3)": chain(lambda: L.AveragePooling2D((2, 3))),
    "AveragePooling2D, strides (1, 2)": chain(lambda: L.AveragePooling2D(3, (1, 2), "same")),
    "AveragePooling2D, of probabilities": chain(lambda: L.Softmax(), lambda: L.AveragePooling2D(2)),
    "GlobalAveragePooling1D": chain(L.GlobalAveragePooling1D, shape=STEPS),
    "GlobalAveragePooling1D, keepdims": chain(lambda: L.GlobalAveragePooling1D(keepdims=True), shape=(7, 1)),
    "GlobalAveragePooling2D": chain(lambda: L.Conv2D(8, 3), L.GlobalAveragePooling2D, lambda: L.Dense(3)),
    "GlobalAveragePooling2D, keepdims": chain(lambda: L.GlobalAveragePooling2D(keepdims=True), shape=(8, 8, 5)),
    "GlobalAveragePooling2D, large": chain(L.GlobalAveragePooling2D, shape=(32, 31, 3)),
    "GlobalMaxPooling1D": chain(L.GlobalMaxPooling1D, shape=STEPS),
    "GlobalMaxPooling1D, keepdims": chain(lambda: L.GlobalMaxPooling1D(keepdims=True), shape=STEPS),
    "GlobalMaxPooling2D": chain(L.GlobalMaxPooling2D, lambda: L.Dense(3)),
    "GlobalMaxPooling2D, keepdims": chain(lambda: L.GlobalMaxPooling2D(keepdims=True), lambda: L.Conv2D(3, 1)),
    "AdaptiveAveragePooling1D": chain(lambda: L.AdaptiveAveragePooling1D(4), shape=STEPS),
    "AdaptiveAveragePooling2D": chain(lambda: L.AdaptiveAveragePooling2D((3, 1))),
    "AdaptiveMaxPooling1D": chain(lambda: L.AdaptiveMaxPooling1D(6), shape=STEPS),
    "AdaptiveMaxPooling2D": chain(lambda: L.AdaptiveMaxPooling2D(3)),
}

# ------------------------------------------------------------------ activations

# All of `keras.activations` but sparsemax, which sorts.
ACTIVATION_FUNCTIONS = [
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh",
    "glu", "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6", "selu", "sigmoid", "silu",
    "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus", "sparse_sigmoid", "squareplus", "swish", "tanh",
    "tanh_shrink",
]  # fmt: skip

ACTIVATION_LAYERS: dict[str, Callable] = {
    "ReLU": L.ReLU,
    "ReLU, max_value=6": lambda: L.ReLU(6.0),
    "ReLU, max_value=0.5": lambda: L.ReLU(max_value=0.5),
    "ReLU, negative_slope": lambda: L.ReLU(negative_slope=0.1),
    "ReLU, threshold": lambda: L.ReLU(threshold=0.4),
    "ReLU, all settings": lambda: L.ReLU(2.0, 0.1, 0.5),
    "LeakyReLU": lambda: L.LeakyReLU(negative_slope=0.3),
    "PReLU": lambda: L.PReLU(alpha_initializer=keras.initializers.RandomUniform(0.1, 0.4)),
    "PReLU, shared axes": lambda: L.PReLU(keras.initializers.RandomUniform(0.1, 0.4), shared_axes=[1, 2]),
    "ELU": L.ELU,
    "ELU, alpha=0.5": lambda: L.ELU(0.5),
    "Softmax": L.Softmax,
    "Softmax, axis 1": lambda: L.Softmax(axis=1),
    "Softmax, the last two axes": lambda: L.Softmax(axis=(-2, -1)),
}

ACTIVATIONS = {
    **{
        f"Activation, {name}": chain(lambda: L.Dense(6), lambda name=name: L.Activation(name), shape=(4, 5))
        for name in ACTIVATION_FUNCTIONS
    },
    **{
        f"{name}, between convolutions": chain(lambda: L.Conv2D(6, 1), layer, lambda: L.Conv2D(4, 1))
        for name, layer in ACTIVATION_LAYERS.items()
    },
    # Nothing that they could fuse into.
    **{
        f"{name}, of the input": chain(layer, lambda: L.Conv2D(4, 1))
        for name, layer in ACTIVATION_LAYERS.items()
        if "Softmax" not in name
    },
    **{
        f"Activation, {name}, of the input": chain(lambda name=name: L.Activation(name), lambda: L.Conv2D(4, 1))
        for name in ("relu6", "sigmoid", "tanh", "hard_swish", "swish", "hard_sigmoid", "gelu", "mish")
    },
    "PReLU, rank 2": chain(
        lambda: L.Dense(5), lambda: L.PReLU(alpha_initializer=keras.initializers.Constant(0.2)), shape=VECTOR
    ),
    "PReLU, rank 3": chain(
        lambda: L.PReLU(alpha_initializer=keras.initializers.RandomUniform(0.1, 0.4)), shape=STEPS
    ),
    "PReLU, rank 3, shared axes": chain(
        lambda: L.PReLU(alpha_initializer=keras.initializers.RandomUniform(0.1, 0.4), shared_axes=[1]), shape=STEPS
    ),
    "Softmax, rank 2": chain(L.Softmax, shape=VECTOR),
    "Softmax, axis 1, rank 3": chain(lambda: L.Softmax(axis=1), shape=STEPS),
    "Dense(activation=a layer)": chain(lambda: L.Dense(5, activation=L.LeakyReLU(negative_slope=0.1)), shape=VECTOR),
    "Dense(activation=softmax, sigmoid, tanh)": chain(
        *(lambda name=name: L.Dense(7, activation=name) for name in ("softmax", "sigmoid", "tanh")), shape=(4, 11)
    ),
    "Dense(activation=relu, leaky_relu, swish, hard_swish)": chain(
        *(lambda name=name: L.Dense(7, activation=name) for name in ("relu", "leaky_relu", "swish", "hard_swish")),
        shape=(4, 11),
    ),
    "Conv1D(activation=gelu)": chain(lambda: L.Conv1D(4, 3, activation="gelu"), shape=STEPS),
}  # fmt: skip

# ------------------------------------------------------------------ sizes and shapes

RESIZING = {
    "UpSampling1D": chain(lambda: L.UpSampling1D(3), lambda: L.Conv1D(2, 3), shape=(5, 4)),
    "UpSampling2D": chain(lambda: L.UpSampling2D(2), lambda: L.Conv2D(2, 1)),
    "UpSampling2D, size (3, 1)": chain(lambda: L.UpSampling2D((3, 1))),
    "UpSampling2D, bilinear": chain(lambda: L.UpSampling2D(2, interpolation="bilinear"), lambda: L.Conv2D(2, 1)),
    "UpSampling2D, bilinear, size 3": chain(lambda: L.UpSampling2D(3, interpolation="bilinear"), shape=(5, 4, 3)),
    "UpSampling2D, bilinear, size (2, 3)": chain(
        lambda: L.UpSampling2D((2, 3), interpolation="bilinear"), shape=(5, 1, 3)
    ),
    "UpSampling2D, bilinear, of probabilities": chain(
        L.Softmax, lambda: L.UpSampling2D(2, interpolation="bilinear"), shape=(4, 5, 3)
    ),
    "Resizing, bilinear": chain(lambda: L.Resizing(7, 5), lambda: L.Conv2D(2, 1)),
    "Resizing, bilinear, larger": chain(lambda: L.Resizing(11, 14)),
    "Resizing, nearest": chain(lambda: L.Resizing(4, 13, interpolation="nearest"), lambda: L.Conv2D(2, 1)),
    "Resizing, to the same size": chain(lambda: L.Resizing(9, 9), lambda: L.Conv2D(2, 1)),
    "CenterCrop": chain(lambda: L.CenterCrop(5, 4)),
}

SHAPES = {
    "ZeroPadding1D": chain(lambda: L.ZeroPadding1D((1, 2)), shape=STEPS),
    "ZeroPadding2D": chain(lambda: L.ZeroPadding2D(((0, 1), (2, 3))), lambda: L.Conv2D(4, 3)),
    "ZeroPadding2D, of negative values": chain(
        lambda: L.Conv2D(4, 1), lambda: L.Activation("log_sigmoid"), lambda: L.ZeroPadding2D(1)
    ),
    "Cropping1D": chain(lambda: L.Cropping1D((1, 2)), shape=STEPS),
    "Cropping2D": chain(lambda: L.Cropping2D(((1, 0), (2, 1))), lambda: L.Conv2D(4, 3)),
    "Reshape": chain(lambda: L.Reshape((27, 9)), lambda: L.Dense(4), lambda: L.Reshape((-1, 2))),
    "Reshape, of the input": chain(lambda: L.Reshape((3, 81))),
    "Reshape, to rank 5 and back": chain(
        lambda: L.Reshape((3, 3, 9, 3)), lambda: L.Reshape(IMAGE), lambda: L.Conv2D(4, 3)
    ),
    "Flatten": chain(lambda: L.Conv2D(2, 3), L.Flatten, lambda: L.Dense(4)),
    "Flatten, at the end": chain(lambda: L.Conv2D(2, 3), L.Flatten),
    "Permute": chain(lambda: L.Permute((3, 1, 2)), lambda: L.Conv2D(4, 1), lambda: L.Permute((2, 3, 1))),
    "Permute, rank 3": chain(lambda: L.Permute((2, 1)), shape=STEPS),
    "Permute, rank 5": chain(lambda: L.Permute((4, 2, 1, 3)), shape=(2, 3, 4, 5)),
    "RepeatVector": chain(lambda: L.Dense(4), lambda: L.RepeatVector(3), shape=(5,)),
}

AUGMENTATION: dict[str, Callable] = {
    "RandomBrightness": lambda: L.RandomBrightness(0.1),
    "RandomColorDegeneration": lambda: L.RandomColorDegeneration(0.1),
    "RandomColorJitter": lambda: L.RandomColorJitter(),
    "RandomContrast": lambda: L.RandomContrast(0.1),
    "RandomElasticTransform": lambda: L.RandomElasticTransform(),
    "RandomErasing": lambda: L.RandomErasing(),
    "RandomFlip": lambda: L.RandomFlip(),
    "RandomGaussianBlur": lambda: L.RandomGaussianBlur(),
    "RandomGrayscale": lambda: L.RandomGrayscale(),
    "RandomHue": lambda: L.RandomHue(0.1),
    "RandomInvert": lambda: L.RandomInvert(),
    "RandomPerspective": lambda: L.RandomPerspective(),
    "RandomPosterization": lambda: L.RandomPosterization(4),
    "RandomRotation": lambda: L.RandomRotation(0.1),
    "RandomSaturation": lambda: L.RandomSaturation(0.1),
    "RandomSharpness": lambda: L.RandomSharpness(0.1),
    "RandomTranslation": lambda: L.RandomTranslation(0.1, 0.1),
    "RandomZoom": lambda: L.RandomZoom(0.1),
}

PREPROCESSING = {
    **{name: chain(layer, lambda: L.Conv2D(4, 3)) for name, layer in AUGMENTATION.items()},
    "RandomFlip, RandomRotation, Rescaling": chain(
        L.RandomFlip, lambda: L.RandomRotation(0.1), lambda: L.Rescaling(0.5, -1.0), lambda: L.Conv2D(4, 3)
    ),
    "Rescaling": chain(lambda: L.Rescaling(0.5), lambda: L.Conv2D(4, 3)),
    "Rescaling, offset": chain(lambda: L.Rescaling(0.5, -1.0), lambda: L.Conv2D(4, 3)),
    "Rescaling, per channel": chain(lambda: L.Rescaling([0.1, 0.2, 0.05], [1.0, -1.0, 0.0])),
    "Rescaling, rank 2": chain(lambda: L.Rescaling(2.0, 0.5), lambda: L.Dense(3), shape=VECTOR),
    "Rescaling, rank 3": chain(lambda: L.Rescaling(0.5, -1.0), shape=STEPS),
    "Normalization": chain(
        lambda: L.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 0.5, 1.0]), shape=STEPS
    ),
    "Normalization, of everything": chain(lambda: L.Normalization(axis=None, mean=0.3, variance=2.0)),
    "Normalization, inverted": chain(
        lambda: L.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 0.5], invert=True)
    ),
}

NOISE = {
    "Dropout, SpatialDropout2D, GaussianDropout, GaussianNoise": chain(
        lambda: L.Dropout(0.5), lambda: L.Conv2D(4, 3), lambda: L.SpatialDropout2D(0.3), L.ReLU,
        lambda: L.GaussianDropout(0.2), lambda: L.GaussianNoise(0.1), L.Identity, L.Flatten, lambda: L.Dense(4),
    ),
    "Dropout, at the end": chain(lambda: L.Conv2D(4, 3), lambda: L.Dropout(0.5)),
    "Dropout, and nothing else": chain(lambda: L.Dropout(0.5), L.Flatten),
    "Dropout, between Conv2D and ReLU": chain(lambda: L.Conv2D(4, 3), lambda: L.Dropout(0.1), L.ReLU),
    "SpatialDropout1D, after Dense": chain(
        lambda: L.Dense(4), lambda: L.SpatialDropout1D(0.3), lambda: L.Dense(2), shape=STEPS
    ),
    "SpatialDropout1D, after Conv1D": chain(
        lambda: L.Conv1D(4, 3), lambda: L.SpatialDropout1D(0.3), L.ReLU, shape=STEPS
    ),
    "AlphaDropout": chain(
        lambda: L.Dense(8, activation="selu"), lambda: L.AlphaDropout(0.1), lambda: L.Dense(3), shape=VECTOR
    ),
    "GaussianNoise, of the input": chain(lambda: L.GaussianNoise(0.1), lambda: L.Conv2D(4, 3)),
    "ActivityRegularization": chain(lambda: L.Dense(4), lambda: L.ActivityRegularization(l2=0.01), shape=VECTOR),
}  # fmt: skip

# ------------------------------------------------------------------ recurrence

SHORT = (3, 4)

RECURRENT = {
    "SimpleRNN": chain(lambda: L.SimpleRNN(5), shape=SHORT),
    "SimpleRNN, relu, all steps": chain(
        lambda: L.SimpleRNN(5, activation="relu", return_sequences=True), lambda: L.Dense(2), shape=SHORT
    ),
    "LSTM": chain(lambda: L.LSTM(5), lambda: L.Dense(3), shape=SHORT),
    "LSTM, all steps": chain(lambda: L.LSTM(3, return_sequences=True), shape=SHORT),
    "LSTM, two": chain(lambda: L.LSTM(3, return_sequences=True), lambda: L.LSTM(2), shape=(2, 4)),
    "LSTM, one unit, no bias": chain(lambda: L.LSTM(1, use_bias=False), shape=SHORT),
    "GRU": chain(lambda: L.GRU(5), shape=SHORT),
    "GRU, all steps, backwards": chain(lambda: L.GRU(3, return_sequences=True, go_backwards=True), shape=SHORT),
    "GRU, no bias": chain(lambda: L.GRU(3, use_bias=False), shape=SHORT),
    "Bidirectional, LSTM": chain(lambda: L.Bidirectional(L.LSTM(3, return_sequences=True)), shape=(2, 4)),
    "Bidirectional, GRU, sum": chain(lambda: L.Bidirectional(L.GRU(3), merge_mode="sum"), shape=(2, 4)),
    "Bidirectional, SimpleRNN, mean": chain(
        lambda: L.Bidirectional(L.SimpleRNN(3, return_sequences=True), merge_mode="ave"), shape=SHORT
    ),
    "TimeDistributed, Dense": chain(lambda: L.TimeDistributed(L.Dense(3, activation="relu")), shape=SHORT),
    "TimeDistributed, Conv2D": chain(
        lambda: L.TimeDistributed(L.Conv2D(3, 3, activation="relu")), lambda: L.TimeDistributed(L.Flatten()),
        lambda: L.Dense(3), shape=(3, 6, 6, 2),
    ),
}  # fmt: skip

# ------------------------------------------------------------------ Keras operators


@keras.saving.register_keras_serializable("mobileqat_cases")
class Broadcast(keras.layers.Layer):
    """Asks for the batch's size, which only a layer that is opened knows."""

    def call(self, inputs):
        return ops.broadcast_to(inputs[:, :1], ops.shape(inputs)) - ops.reshape(inputs, ops.shape(inputs))


def _numbers(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


OPERATORS = {
    "x * 2 + 1": computes(lambda x: x * 2 + 1),
    "1 - x": computes(lambda x: 1 - x),
    "x - 1": computes(lambda x: x - 1.0),
    "x / 3": computes(lambda x: x / 3),
    "1 / x": computes(lambda x: 1 / (ops.sigmoid(x) + 1)),
    "x / y": computes(lambda x: x / (ops.sigmoid(x) + 1)),
    "-x": computes(lambda x: -x),
    "x ** 2": computes(lambda x: x**2),
    "x ** 3": computes(lambda x: x**3),
    "x ** 0.5": computes(lambda x: (ops.relu(x) + 0.1) ** 0.5),
    "x + vector": computes(lambda x: ops.relu(x) + _numbers(4)),
    "x * vector": computes(lambda x: x * _numbers(4)),
    "vector * x + vector": computes(lambda x: ops.add(_numbers(4), ops.multiply(_numbers(4), x))),
    "x + map": computes(lambda x: x + _numbers(6, 6, 4)),
    "map - x": computes(lambda x: ops.subtract(_numbers(1, 6, 6, 1), x)),
    "x * map": computes(lambda x: x * _numbers(6, 1, 4)),
    "x[:, 1:-1]": computes(lambda x: x[:, 1:-1]),
    "x[:, 1:-1, ::2]": computes(lambda x: x[:, 1:-1, ::2]),
    "x[:, 0]": computes(lambda x: x[:, 0]),
    "x[:, -1, ..., 1]": computes(lambda x: x[:, -1, ..., 1]),
    "x[:, None, ..., 1]": computes(lambda x: x[:, None, ..., 1]),
    "ops.add": computes(lambda x: ops.add(x, ops.tanh(x))),
    "ops.subtract": computes(lambda x: ops.subtract(ops.relu(x), x)),
    "ops.multiply": computes(lambda x: ops.multiply(x, ops.sigmoid(x))),
    "ops.divide": computes(lambda x: ops.divide(x, 1.5)),
    "ops.true_divide": computes(lambda x: ops.true_divide(x, _numbers(4) + 4)),
    "ops.negative": computes(lambda x: ops.negative(x)),
    "ops.power": computes(lambda x: ops.power(ops.relu(x) + 0.5, 1.5)),
    "ops.square": computes(lambda x: ops.square(x)),
    "ops.sqrt": computes(lambda x: ops.sqrt(ops.relu(x) + 0.1)),
    "ops.rsqrt": computes(lambda x: ops.rsqrt(ops.relu(x) + 0.5)),
    "ops.reciprocal": computes(lambda x: ops.reciprocal(ops.relu(x) + 0.5)),
    "ops.absolute": computes(lambda x: ops.absolute(x)),
    "ops.exp": computes(lambda x: ops.exp(x)),
    "ops.log": computes(lambda x: ops.log(ops.relu(x) + 1.0)),
    "ops.log1p": computes(lambda x: ops.log1p(ops.relu(x))),
    "ops.log2": computes(lambda x: ops.log2(ops.relu(x) + 1)),
    "ops.log10": computes(lambda x: ops.log10(ops.relu(x) + 1)),
    "ops.expm1": computes(lambda x: ops.expm1(x)),
    "ops.exp2": computes(lambda x: ops.exp2(x)),
    "ops.arctan": computes(lambda x: ops.arctan(x)),
    "ops.arcsinh": computes(lambda x: ops.arcsinh(x)),
    "ops.sinh": computes(lambda x: ops.sinh(x)),
    "ops.cosh": computes(lambda x: ops.cosh(x)),
    "ops.tan": computes(lambda x: ops.tan(ops.tanh(x))),
    "ops.floor": computes(lambda x: ops.floor(x) + x),
    "ops.ceil": computes(lambda x: ops.ceil(x) + x),
    "ops.round": computes(lambda x: ops.round(x) + x),
    "ops.trunc": computes(lambda x: ops.trunc(x) + x),
    "ops.sin": computes(lambda x: ops.sin(x)),
    "ops.cos": computes(lambda x: ops.cos(x)),
    "ops.erf": computes(lambda x: ops.erf(x)),
    "ops.sign": computes(lambda x: ops.sign(x) * x),
    "ops.maximum": computes(lambda x: ops.maximum(x, 0.1)),
    "ops.maximum, two tensors": computes(lambda x: ops.maximum(x, 0.5 - x)),
    "ops.minimum": computes(lambda x: ops.minimum(x, _numbers(4))),
    "ops.clip": computes(lambda x: ops.clip(x, -0.5, 0.7)),
    "ops.clip, 0 to 1": computes(lambda x: ops.clip(x, 0, 1)),
    "ops.clip, 0 to 6": computes(lambda x: ops.clip(x, 0, 6)),
    "ops.clip, wider than the range": computes(lambda x: ops.clip(x, -100.0, 100.0)),
    "ops.relu": computes(lambda x: ops.relu(x)),
    "ops.relu6": computes(lambda x: ops.relu6(x)),
    "ops.leaky_relu": computes(lambda x: ops.leaky_relu(x, 0.1)),
    "ops.elu": computes(lambda x: ops.elu(x, 0.7)),
    "ops.celu": computes(lambda x: ops.celu(x, 0.7)),
    "ops.selu": computes(lambda x: ops.selu(x)),
    "ops.gelu": computes(lambda x: ops.gelu(x)),
    "ops.gelu, exact": computes(lambda x: ops.gelu(x, approximate=False)),
    "ops.sigmoid": computes(lambda x: ops.sigmoid(x)),
    "ops.log_sigmoid": computes(lambda x: ops.log_sigmoid(x)),
    "ops.hard_sigmoid": computes(lambda x: ops.hard_sigmoid(x)),
    "ops.sparse_sigmoid": computes(lambda x: ops.sparse_sigmoid(x)),
    "ops.silu": computes(lambda x: ops.silu(x)),
    "ops.hard_silu": computes(lambda x: ops.hard_silu(x)),
    "ops.softplus": computes(lambda x: ops.softplus(x)),
    "ops.sparse_plus": computes(lambda x: ops.sparse_plus(x)),
    "ops.squareplus": computes(lambda x: ops.squareplus(x, 2)),
    "ops.softsign": computes(lambda x: ops.softsign(x)),
    "ops.tanh": computes(lambda x: ops.tanh(x)),
    "ops.hard_tanh": computes(lambda x: ops.hard_tanh(x)),
    "ops.tanh_shrink": computes(lambda x: ops.tanh_shrink(x)),
    "ops.soft_shrink": computes(lambda x: ops.soft_shrink(x, 0.2)),
    "ops.hard_shrink": computes(lambda x: ops.hard_shrink(x, 0.2)),
    "ops.threshold": computes(lambda x: ops.threshold(x, 0.2, -0.5)),
    "keras.activations.relu, with settings": computes(lambda x: keras.activations.relu(x, 0.1, 1.5, 0.2)),
    "ops.softmax": computes(lambda x: ops.softmax(x)),
    "ops.softmax, axis 1": computes(lambda x: ops.softmax(x, axis=1)),
    "ops.log_softmax": computes(lambda x: ops.log_softmax(x)),
    "ops.log_softmax, axis 1": computes(lambda x: ops.log_softmax(x, axis=1)),
    "ops.glu": computes(lambda x: ops.glu(x)),
    "ops.glu, axis 1": computes(lambda x: ops.glu(x, axis=1)),
    "ops.mean": computes(lambda x: ops.mean(x, (1, 2))),
    "ops.mean, last axis": computes(lambda x: ops.mean(x, -1, keepdims=True)),
    "ops.mean, all axes": computes(lambda x: ops.mean(x, (1, 2, 3))),
    "ops.sum": computes(lambda x: ops.sum(x, 1)),
    "ops.max": computes(lambda x: ops.max(x, (1,))),
    "ops.amax": computes(lambda x: ops.amax(x, axis=1, keepdims=True)),
    "ops.min": computes(lambda x: ops.min(x, -1)),
    "ops.amin": computes(lambda x: ops.amin(x, axis=(1, 2))),
    "ops.var": computes(lambda x: ops.var(x, -1)),
    "ops.std": computes(lambda x: ops.std(x, (1, 2))),
    "ops.moments": computes(lambda x: ops.add(*ops.moments(x, [1, 2], keepdims=True))),
    "ops.moments, without keepdims": computes(lambda x: list(ops.moments(x, [-1]))),
    "ops.normalize": computes(lambda x: ops.normalize(x, -1)),
    "ops.normalize, axis 1": computes(lambda x: ops.normalize(x, 1)),
    "ops.matmul": computes(lambda x: ops.matmul(x, ops.swapaxes(x, -1, -2))),
    "ops.matmul, matrix": computes(lambda x: ops.matmul(x, _numbers(4, 3))),
    "x @ matrix": computes(lambda x: x @ _numbers(4, 3), (5, 4)),
    "ops.einsum": computes(lambda x: ops.einsum("bhwc,bhvc->bhwv", x, x)),
    "ops.einsum, no common axes": computes(lambda x: ops.einsum("bic,bjd->bijcd", x, ops.tanh(x)), (3, 4)),
    "ops.einsum, matrix": computes(lambda x: ops.einsum("...c,dc->...d", x, _numbers(3, 4))),
    "ops.reshape": computes(lambda x: ops.reshape(x, (-1, 9, 16))),
    "ops.transpose": computes(lambda x: ops.transpose(x, (0, 3, 1, 2))),
    "ops.swapaxes": computes(lambda x: ops.swapaxes(x, 1, -1)),
    "ops.moveaxis": computes(lambda x: ops.moveaxis(x, -1, 1)),
    "ops.expand_dims": computes(lambda x: ops.expand_dims(x, -2) * 0.5, (5, 4)),
    "ops.squeeze": computes(lambda x: ops.squeeze(x[:, :1], 1)),
    "ops.concatenate": computes(lambda x: ops.concatenate([x, x * 2], 1)),
    "ops.stack": computes(lambda x: ops.stack([x, x + 1], 1)),
    "ops.stack, last axis": computes(lambda x: ops.stack([x, x, ops.relu(x)], -1), (5, 4)),
    "ops.split": computes(lambda x: ops.add(*ops.split(x, 2, -1))),
    "ops.split, at places": computes(lambda x: ops.split(x, [1, 4], axis=1)),
    "ops.unstack": computes(lambda x: ops.unstack(x, axis=1), (3, 4)),
    "ops.pad": computes(lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]])),
    "ops.pad, reflect": computes(lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], "reflect")),
    "ops.pad, symmetric": computes(lambda x: ops.pad(x, [[0, 0], [2, 1], [0, 0], [0, 0]], "symmetric")),
    "ops.tile": computes(lambda x: ops.tile(x, (1, 2, 1, 3))),
    "ops.repeat": computes(lambda x: ops.repeat(x, 2, axis=2)),
    "ops.broadcast_to": chain(lambda: Broadcast(), shape=(6, 6, 4)),
    "ops.flip": computes(lambda x: ops.flip(x, axis=2)),
    "ops.flip, two axes": computes(lambda x: ops.flip(x, axis=(1, -1))),
    "ops.take": computes(lambda x: ops.take(x, [3, 0, 1], axis=-1)),
    "ops.take, one": computes(lambda x: ops.take(x, -1, axis=1)),
    "ops.conv": computes(lambda x: ops.conv(x, _numbers(2, 2, 4, 3))),
    "ops.depthwise_conv": computes(lambda x: ops.depthwise_conv(x, _numbers(3, 3, 4, 1), padding="same")),
    "ops.max_pool": computes(lambda x: ops.max_pool(x, 2)),
    "ops.average_pool": computes(lambda x: ops.average_pool(x, 3, 1, "same")),
    "ops.image.resize": computes(lambda x: ops.image.resize(x, (9, 4))),
    "ops.image.resize, nearest": computes(lambda x: ops.image.resize(x, (3, 9), "nearest")),
    "ops.nn.depth_to_space": computes(lambda x: ops.nn.depth_to_space(x, 2)),
    "ops.nn.space_to_depth": computes(lambda x: ops.nn.space_to_depth(x, 2)),
    "ops.cast": computes(lambda x: ops.cast(x, "float32") * 2),
    "ops.copy": computes(lambda x: ops.copy(x) * 2),
    "ops.convert_to_tensor": computes(lambda x: ops.convert_to_tensor(x) * 2),
}

# ------------------------------------------------------------------ topologies


def relu6_that_cannot_fuse():
    x = keras.Input((6, 6, 3), name="x")
    a = L.Conv2D(4, 1, kernel_initializer=keras.initializers.Constant(3.0))(L.Conv2D(4, 3, padding="same")(x))
    return keras.Model(x, [a, L.ReLU(6.0)(a)])


def several_inputs():
    x, y = keras.Input((6, 6, 3), name="left"), keras.Input((6, 6, 3), name="right")
    return keras.Model([x, y], L.Conv2D(4, 3)(L.Add()([x, y])))


def dicts():
    inputs = {"image": keras.Input((6, 6, 3), name="image"), "age": keras.Input((2,), name="age")}
    h = L.Concatenate()([L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(inputs["image"])), L.Dense(3)(inputs["age"])])
    return keras.Model(inputs, {"score": L.Dense(1, activation="sigmoid")(h), "class": L.Dense(3)(h)})


def nests():
    inputs = {"b": keras.Input((4,), name="b"), "a": keras.Input((4,), name="a"), "c": keras.Input((4,), name="c")}
    one, two = inputs["b"], inputs["c"]
    return keras.Model(inputs, (L.Dense(3)(one), [L.Dense(2)(two - inputs["a"]), {"d": one * two}]))


def input_used_twice():
    x = keras.Input((6, 6, 3), name="x")
    return keras.Model(x, L.Add()([L.Conv2D(3, 1)(L.Conv2D(4, 3, padding="same")(x)), x]))


def unused_input():
    x, y = keras.Input((4,), name="x"), keras.Input((5,), name="y")
    return keras.Model([x, y], L.Dense(3)(x))


def nested():
    inner = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(4, 3, padding="same"), L.ReLU()], name="inner")
    z = keras.Input((6, 6, 4))
    middle = keras.Sequential([keras.Input((6, 6, 4)), L.Conv2D(4, 1, name="conv")], name="middle")
    outer = keras.Model(z, L.BatchNormalization()(middle(z)), name="outer")
    x = keras.Input((6, 6, 3), name="x")
    return keras.Model(x, L.Add()([outer(L.Conv2D(4, 3, padding="same")(x)), inner(inner(L.Conv2D(4, 1)(x)))]))


def nested_five_deep():
    model = keras.Sequential([keras.Input((5, 4)), L.Dense(4, activation="relu")], name="level0")
    for level in range(1, 5):
        z = keras.Input((5, 4))
        model = keras.Model(z, L.Add()([model(z), L.Dense(4)(z)]), name=f"level{level}")
    x = keras.Input((5, 4), name="x")
    return keras.Model(x, model(x))


def nested_of_several():
    """A sub-model with two inputs and two outputs, called twice."""
    a, b = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model([a, b], [L.Dense(4, activation="relu")(a) + b, L.Dense(4)(b)], name="inner")
    x, y = keras.Input((4,), name="x"), keras.Input((4,), name="y")
    first, second = inner(inner([x, y]))
    return keras.Model([x, y], [first, L.Concatenate()([first, second])])


def nested_of_dicts():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model({"a": a, "b": b}, {"sum": a + b, "twice": L.Dense(4)(a)}, name="inner")
    x = keras.Input((4,), name="x")
    results = inner({"a": x, "b": L.Dense(4)(x)})
    return keras.Model(x, results["sum"] - results["twice"])


def shared_layers():
    x = keras.Input((6, 6, 3), name="x")
    a, b = L.Conv2D(4, 3, padding="same")(x), L.Conv2D(4, 1, activation="relu")(x)
    convolution, relu, batch_norm = L.Conv2D(4, 3), L.ReLU(), L.BatchNormalization()
    tensors = [relu(batch_norm(convolution(tensor))) for tensor in (a, b)]
    return keras.Model(x, [L.Add()(tensors), relu(a)])


def shared_sub_model():
    tower = keras.Sequential([keras.Input((8,)), L.Dense(5, activation="relu"), L.Dense(4)], name="tower")
    x, y = keras.Input((8,), name="x"), keras.Input((8,), name="y")
    return keras.Model([x, y], L.Dot(axes=1, normalize=True)([tower(x), tower(y)]))


def shared_on_two_ranks():
    dense = L.Dense(4)
    x, y = keras.Input((8,), name="x"), keras.Input((3, 8), name="y")
    return keras.Model([x, y], [dense(x), dense(y)])


def shared_lower_halves():
    """Layers that lower to several operators, called twice."""
    separable, swish, norm = L.SeparableConv2D(4, 3, padding="same"), L.Activation("swish"), L.RMSNormalization()
    x = keras.Input((6, 6, 4), name="x")
    a = norm(swish(separable(x)))
    return keras.Model(x, norm(swish(separable(a))) + a)


def convolution_read_twice():
    """BatchNormalization that cannot fold, because something else reads the convolution too."""
    x = keras.Input((6, 6, 3), name="x")
    a = L.Conv2D(4, 3, padding="same")(x)
    return keras.Model(x, L.Add()([L.BatchNormalization()(a), a]))


def many_consumers():
    x = keras.Input((6, 6, 4), name="x")
    a = L.Conv2D(4, 1)(x)
    return keras.Model(
        x, [L.ReLU()(a), L.MaxPooling2D()(a), L.Flatten()(a), L.Activation("tanh")(a), a[:, :3], L.Add()([a, x]), a]
    )


def residual_blocks():
    x = keras.Input((8, 8, 3), name="x")
    h = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, padding="same", use_bias=False)(x)))
    for stride in (1, 2):
        y = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, stride, "same", use_bias=False)(h)))
        y = L.BatchNormalization()(L.Conv2D(4, 3, padding="same", use_bias=False)(y))
        shortcut = h if stride == 1 else L.BatchNormalization()(L.Conv2D(4, 1, stride, use_bias=False)(h))
        h = L.ReLU()(L.Add()([y, shortcut]))
    return keras.Model(x, L.Dense(3, activation="softmax")(L.GlobalAveragePooling2D()(h)))


def operators_on_the_input():
    x = keras.Input((6, 6, 4), name="x")
    return keras.Model(x, [x * 2 + 1, x[:, 1:-1], ops.transpose(x, (0, 3, 1, 2)), ops.mean(x, 1), ops.softmax(x)])


def fixed_batch():
    x = keras.Input(batch_shape=(8, 6, 6, 3), name="x")
    return keras.Model(x, L.Dense(2)(ops.reshape(L.Conv2D(4, 3)(x), (8, -1))))


@keras.saving.register_keras_serializable("mobileqat_cases")
class Block(keras.layers.Layer):
    """A custom layer of Keras layers."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.convolution = L.Conv2D(channels, 3, padding="same")
        self.norm = L.BatchNormalization()

    def build(self, shape):
        self.convolution.build(shape)
        self.norm.build((*shape[:-1], self.channels))

    def call(self, inputs, training=None):
        return ops.relu(self.norm(self.convolution(inputs), training=training))

    def get_config(self):
        return super().get_config() | {"channels": self.channels}


@keras.saving.register_keras_serializable("mobileqat_cases")
class Gate(keras.layers.Layer):
    """A custom layer with weights of its own, written with keras.ops; `Block` inside."""

    def build(self, shape):
        self.block = Block(shape[-1])
        self.block.build(shape)
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], shape[-1]), initializer="glorot_uniform")

    def call(self, inputs):
        return self.block(inputs) * self.scale + ops.sigmoid(ops.matmul(inputs, self.kernel)) * inputs


@keras.saving.register_keras_serializable("mobileqat_cases")
class Encoder(keras.layers.Layer):
    """A transformer block as in Keras's examples, without a configuration of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = L.MultiHeadAttention(2, 4)
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]
        self.dense = keras.Sequential([L.Dense(16, activation="relu"), L.Dense(8)])
        self.dropout = L.Dropout(0.1)

    def call(self, inputs, training=None):
        x = self.norms[0](inputs + self.dropout(self.attention(inputs, inputs), training=training))
        return self.norms[1](x + self.dropout(self.dense(x), training=training))


@keras.saving.register_keras_serializable("mobileqat_cases")
class Token(keras.layers.Layer):
    """Puts a learned vector in front of a sequence, as vision transformers do."""

    def build(self, shape):
        self.token = self.add_weight(name="token", shape=(1, 1, shape[-1]), initializer="glorot_uniform")

    def call(self, inputs):
        token = ops.broadcast_to(self.token, (ops.shape(inputs)[0], 1, inputs.shape[-1]))
        return ops.concatenate([token, inputs], axis=1)


@keras.saving.register_keras_serializable("mobileqat_cases")
class Positions(keras.layers.Layer):
    """Adds a learned vector per step."""

    def build(self, shape):
        self.positions = self.add_weight(name="positions", shape=shape[1:], initializer="glorot_uniform")

    def call(self, inputs):
        return inputs + self.positions


@keras.saving.register_keras_serializable("mobileqat_cases")
class TensorFlowScale(keras.layers.Layer):
    """A custom layer that cannot be opened: it calls TensorFlow functions."""

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")

    def call(self, inputs):
        return tf.nn.tanh(inputs * self.scale)

    def compute_output_shape(self, input_shape):
        return input_shape


@register_rule(TensorFlowScale)
def _tensorflow_scale(layer, x):
    return ops.tanh(x * layer.scale)


@keras.saving.register_keras_serializable("mobileqat_cases")
class Subclassed(keras.Model):
    """A subclassed model with a layer that is called twice."""

    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = L.Dense(units, activation="relu")
        self.shared = L.Dense(units)
        self.blocks = [L.Dense(units, activation="gelu") for _ in range(2)]

    def call(self, inputs, training=None):
        x = self.shared(self.shared(self.first(inputs)))
        for block in self.blocks:
            x = x + block(x)
        return {"features": x, "logits": ops.softmax(x[:, :3] * 2)}

    def get_config(self):
        return super().get_config() | {"units": self.units}


def subclassed():
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 7), np.float32))
    return model


def subclassed_inside():
    inner = Subclassed(name="inner")
    x = keras.Input((7,), name="x")
    return keras.Model(x, inner(x)["features"] * 2)


@keras.saving.register_keras_serializable("mobileqat_cases")
class SubclassedOnDicts(keras.Model):
    """A subclassed model with inputs by name, without a configuration of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left, self.right = L.Dense(3), L.Dense(3, activation="relu")

    def call(self, inputs):
        return {"sum": self.left(inputs["a"]) + self.right(inputs["b"])}


def subclassed_on_dicts():
    model = SubclassedOnDicts(name="on_dicts")
    model({"a": np.zeros((1, 4), np.float32), "b": np.zeros((1, 5), np.float32)})
    return model


def subclassed_twice_inside():
    tower = SubclassedOnDicts(name="tower")
    x, y, z = (keras.Input((size,), name=name) for size, name in ((4, "x"), (5, "y"), (5, "z")))
    return keras.Model([x, y, z], tower({"a": x, "b": y})["sum"] - tower({"a": x, "b": z})["sum"])


TOPOLOGIES = {
    "Nested models": nested,
    "Nested models, five deep": nested_five_deep,
    "Nested models, several inputs and outputs, called twice": nested_of_several,
    "Nested models, dicts": nested_of_dicts,
    "Shared layers": shared_layers,
    "Shared layers, of several operators": shared_lower_halves,
    "Shared layers, on two ranks": shared_on_two_ranks,
    "Shared sub-model": shared_sub_model,
    "Several inputs": several_inputs,
    "Several inputs, one unused": unused_input,
    "Several outputs": two_branches(
        lambda x, a, b: [L.Dense(3, activation="softmax")(L.Flatten()(a)), b, L.Conv2D(2, 3)(b)]
    ),
    "Several outputs, the same twice": two_branches(lambda x, a, b: [a, a, L.Flatten()(b), L.Flatten()(b)]),
    "Several outputs, of one tensor": two_branches(lambda x, a, b: [L.Flatten()(a), L.Reshape((-1, 4))(a), a]),
    "Inputs and outputs as dicts": dicts,
    "Inputs as a dict, outputs as a nest": nests,
    "Many consumers": many_consumers,
    "Input used twice": input_used_twice,
    "Output that is also consumed, ReLU": two_branches(lambda x, a, b: [a, L.ReLU()(a)]),
    "Output that is also consumed, ReLU6": relu6_that_cannot_fuse,
    "Output that is also consumed, Dropout": two_branches(lambda x, a, b: [L.Dropout(0.5)(a), a]),
    "Output that is also consumed, BatchNormalization": two_branches(lambda x, a, b: [a, L.BatchNormalization()(a)]),
    "BatchNormalization beside another reader": convolution_read_twice,
    "Residual blocks": residual_blocks,
    "Operators on the input": operators_on_the_input,
    "The input as an output": two_branches(lambda x, a, b: [x, L.Flatten()(x), L.Add()([a, b])]),
    "Fixed batch": fixed_batch,
    "Subclassed model": subclassed,
    "Subclassed model, inputs by name": subclassed_on_dicts,
    "Subclassed model inside another": subclassed_inside,
    "Subclassed model inside another, twice": subclassed_twice_inside,
    "Custom layer, opened": chain(lambda: Block(4), lambda: L.Conv2D(2, 1)),
    "Custom layer, nested, with weights": chain(Gate, shape=(6, 6, 4)),
    "Custom layer, transformer block": chain(lambda: L.Dense(8), Encoder, L.GlobalAveragePooling1D, shape=SHORT),
    "Custom layer, learned positions": chain(Positions, lambda: L.Dense(3), shape=STEPS),
    "Custom layer, learned token": chain(Token, lambda: L.Dense(3), shape=SHORT),
    "Custom layer, register_rule": chain(lambda: L.Dense(5), TensorFlowScale, lambda: L.Dense(3), shape=VECTOR),
}

LAYER_CASES: dict[str, dict[str, Callable[[], keras.Model]]] = {
    "Convolutions": CONVOLUTIONS,
    "Dense": DENSE,
    "Embedding": EMBEDDING,
    "Normalization": NORMALIZATION,
    "Attention": ATTENTION,
    "Merging": MERGING,
    "Pooling": POOLING,
    "Activations": ACTIVATIONS,
    "Resizing": RESIZING,
    "Shapes": SHAPES,
    "Preprocessing": PREPROCESSING,
    "Noise": NOISE,
    "Recurrent": RECURRENT,
    "Operators": OPERATORS,
    "Topologies": TOPOLOGIES,
}
