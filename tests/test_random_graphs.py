"""Models drawn at random from a table of steps: whatever is combined, simulation and file agree to the bit.

A model is a program: a list of `(step, a, b)`, where `a` and `b` choose the tensors that the step reads, counted back
from the newest.  A step that does not fit them is skipped.  The failing program that Hypothesis prints is small, and
`run` with it is the reproducer.  `MOBILEQAT_RANDOM_GRAPHS=500 pytest tests/test_random_graphs.py` draws 500 new models.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import keras
import numpy as np
from contract import check_lowering, check_plan, give_trained_weights, outputs_of, samples_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from keras import layers as L
from keras import ops

from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.errors import CalibrationError, ModelError
from mobileqat.flatbuffer import inspect
from mobileqat.parity import verify
from mobileqat.quantize import quantize_model

EXAMPLES = int(os.environ.get("MOBILEQAT_RANDOM_GRAPHS", 0))
LARGEST = 600  # values of one tensor per sample


def numbers(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def rank(x) -> int:
    return len(x.shape)


def on(*ranks: int) -> Callable:
    """Whether a tensor has one of these ranks, the batch included."""
    return lambda x: rank(x) in ranks


def at_least(size: int, axis: int = 1) -> Callable:
    return lambda x: rank(x) > 2 and x.shape[axis] >= size


def anything(x) -> bool:
    return True


# Steps on one tensor: a condition and the function.
ONE: dict[str, tuple[Callable, Callable]] = {
    "Dense": (anything, lambda x: L.Dense(4)(x)),
    "Dense, relu": (anything, lambda x: L.Dense(3, activation="relu")(x)),
    "Dense, no bias": (anything, lambda x: L.Dense(5, use_bias=False)(x)),
    "Conv1D": (on(3), lambda x: L.Conv1D(4, 3, padding="same", activation="relu")(x)),
    "Conv1D, causal": (on(3), lambda x: L.Conv1D(3, 2, padding="causal", dilation_rate=2)(x)),
    "Conv2D": (on(4), lambda x: L.Conv2D(4, 3, padding="same")(x)),
    "Conv2D, strides": (on(4), lambda x: L.Conv2D(3, 3, 2, "same", use_bias=False)(x)),
    "DepthwiseConv1D": (on(3), lambda x: L.DepthwiseConv1D(3, padding="same")(x)),
    "DepthwiseConv2D": (on(4), lambda x: L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)),
    "Conv2DTranspose": (on(4), lambda x: L.Conv2DTranspose(3, 3, padding="same")(x)),
    "BatchNormalization": (anything, lambda x: L.BatchNormalization()(x)),
    "LayerNormalization": (lambda x: x.shape[-1] > 1, lambda x: L.LayerNormalization()(x)),
    "UnitNormalization": (lambda x: x.shape[-1] > 1, lambda x: L.UnitNormalization()(x)),
    "ReLU": (anything, lambda x: L.ReLU()(x)),
    "ReLU6": (anything, lambda x: L.ReLU(6.0)(x)),
    "LeakyReLU": (anything, lambda x: L.LeakyReLU()(x)),
    "gelu": (anything, lambda x: L.Activation("gelu")(x)),
    "swish": (anything, lambda x: L.Activation("swish")(x)),
    "hard_swish": (anything, lambda x: L.Activation("hard_swish")(x)),
    "softplus": (anything, lambda x: L.Activation("softplus")(x)),
    "linear": (anything, lambda x: L.Activation("linear")(x)),
    "sigmoid": (anything, lambda x: ops.sigmoid(x)),
    "tanh": (anything, lambda x: ops.tanh(x)),
    "Softmax": (lambda x: x.shape[-1] > 1, lambda x: L.Softmax()(x)),
    "softmax, axis 1": (lambda x: x.shape[1] > 1, lambda x: ops.softmax(x, axis=1)),
    "Dropout": (anything, lambda x: L.Dropout(0.5)(x)),
    "GaussianNoise": (anything, lambda x: L.GaussianNoise(0.1)(x)),
    "clip": (anything, lambda x: ops.clip(x, -0.5, 0.8)),
    "maximum, number": (anything, lambda x: ops.maximum(x, 0.1)),
    "abs": (anything, lambda x: ops.abs(x)),
    "x * 2 + 1": (anything, lambda x: x * 2 + 1),
    "1 - x": (anything, lambda x: 1 - x),
    "x / 3": (anything, lambda x: x / 3),
    "x * vector": (anything, lambda x: x * numbers(x.shape[-1])),
    "x + vector": (anything, lambda x: x + numbers(x.shape[-1])),
    "x + map": (anything, lambda x: x + numbers(*x.shape[1:])),
    "x - row": (lambda x: rank(x) > 2, lambda x: x - numbers(1, *x.shape[2:])),
    "Rescaling": (anything, lambda x: L.Rescaling(0.5, 0.2)(x)),
    "x[:, 1:]": (at_least(2), lambda x: x[:, 1:]),
    "x[:, -1]": (at_least(1), lambda x: x[:, -1]),
    "x[..., ::2]": (at_least(2, -1), lambda x: x[..., ::2]),
    "x[:, None]": (on(2, 3), lambda x: x[:, None]),
    "Flatten": (anything, lambda x: L.Flatten()(x)),
    "Reshape, vector": (anything, lambda x: L.Reshape((-1,))(x)),
    "Reshape, split channels": (
        lambda x: rank(x) < 4 and x.shape[-1] % 2 == 0,
        lambda x: L.Reshape((*x.shape[1:-1], -1, 2))(x),
    ),
    "Reshape, flat space": (on(4), lambda x: ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))),
    "expand and squeeze": (anything, lambda x: ops.squeeze(ops.expand_dims(x, 1), 1)),
    "transpose": (on(3, 4), lambda x: ops.swapaxes(x, 1, -1)),
    "Permute": (on(4), lambda x: L.Permute((3, 1, 2))(x)),
    "flip": (anything, lambda x: ops.flip(x, -1)),
    "take": (anything, lambda x: ops.take(x, [0, -1], axis=-1)),
    "tile": (anything, lambda x: ops.tile(x, (1,) * (rank(x) - 1) + (2,))),
    "repeat": (on(3, 4), lambda x: ops.repeat(x, 2, axis=1)),
    "pad": (on(3, 4), lambda x: ops.pad(x, [(0, 0), (1, 0), *[(0, 0)] * (rank(x) - 2)])),
    "ZeroPadding2D": (on(4), lambda x: L.ZeroPadding2D(1)(x)),
    "MaxPooling1D": (lambda x: rank(x) == 3 and x.shape[1] > 1, lambda x: L.MaxPooling1D(2)(x)),
    "MaxPooling2D": (on(4), lambda x: L.MaxPooling2D(2, 1, "same")(x)),
    "AveragePooling1D": (on(3), lambda x: L.AveragePooling1D(2, 1, "same")(x)),
    "AveragePooling2D": (on(4), lambda x: L.AveragePooling2D(3, 2, "same")(x)),
    "GlobalAveragePooling": (
        on(3, 4),
        lambda x: (L.GlobalAveragePooling1D if rank(x) == 3 else L.GlobalAveragePooling2D)()(x),
    ),
    "GlobalMaxPooling": (on(4), lambda x: L.GlobalMaxPooling2D(keepdims=True)(x)),
    "mean": (on(3, 4), lambda x: ops.mean(x, axis=1)),
    "mean, last axis": (anything, lambda x: ops.mean(x, axis=-1, keepdims=True)),
    "sum": (on(3, 4), lambda x: ops.sum(x, axis=-2)),
    "max": (on(3, 4), lambda x: ops.max(x, axis=1, keepdims=True)),
    "UpSampling2D": (on(4), lambda x: L.UpSampling2D(2)(x)),
    "UpSampling2D, bilinear": (on(4), lambda x: L.UpSampling2D(2, interpolation="bilinear")(x)),
    "UpSampling1D": (on(3), lambda x: L.UpSampling1D(2)(x)),
    "split and add": (lambda x: x.shape[-1] % 2 == 0, lambda x: ops.add(*ops.split(x, 2, axis=-1))),
    "square": (anything, lambda x: ops.square(x)),
    "outer product": (on(3), lambda x: ops.matmul(x, ops.swapaxes(x, 1, 2))),
    "TimeDistributed": (
        lambda x: rank(x) == 3 and x.shape[1] <= 3,
        lambda x: L.TimeDistributed(L.Dense(3, activation="relu"))(x),
    ),
    "MultiHeadAttention": (on(3), lambda x: L.MultiHeadAttention(2, 2)(x, x)),
}

# Steps on two tensors of one shape, which may be the same tensor.
TWO: dict[str, Callable] = {
    "Add": lambda a, b: L.Add()([a, b]),
    "Add, relu": lambda a, b: L.ReLU()(L.Add()([a, b])),
    "a + b": lambda a, b: a + b,
    "Multiply": lambda a, b: L.Multiply()([a, b]),
    "Average": lambda a, b: L.Average()([a, b]),
    "Maximum": lambda a, b: L.Maximum()([a, b]),
    "Minimum": lambda a, b: L.Minimum()([a, b]),
    "a - b / 2": lambda a, b: a - b / 2,
    "Concatenate": lambda a, b: L.Concatenate()([a, b]),
    "Concatenate, axis 1": lambda a, b: ops.concatenate([a, b], axis=1),
    "Concatenate, three": lambda a, b: ops.concatenate([a, b, a], axis=-1),
    "stack": lambda a, b: ops.stack([a, b], axis=1),
}

# What a sub-model may hold.
INNER = ["Dense", "Dense, relu", "BatchNormalization", "ReLU", "tanh", "x * 2 + 1", "x * vector", "Dropout", "Flatten"]
STEPS = [*ONE, *TWO, "again", "sub-model", "sub-model, twice"]


class Builder:
    """Runs a program on Keras tensors."""

    def __init__(self, inputs):
        self.pool = list(inputs)
        self.layers: list[tuple[Callable, tuple]] = []  # to be called again on tensors of that shape

    def step(self, name: str, a: int, b: int) -> None:
        x, y = (self.pool[-1 - index % len(self.pool)] for index in (a, b))
        result = self.result(name, x, y, b)
        if result is not None and rank(result) <= 5 and np.prod(result.shape[1:]) <= LARGEST:
            self.pool.append(result)

    def result(self, name: str, x, y, choice: int):
        if name in ONE:
            condition, function = ONE[name]
            return function(x) if condition(x) else None
        if name in TWO:
            return TWO[name](x, y) if x.shape == y.shape and rank(x) < 5 else None
        if name == "again":
            return self.again(x, choice)
        model = self.sub_model(x, choice)
        return model(x) if name == "sub-model" else L.Add()([model(x), model(ops.tanh(x))])

    def again(self, x, choice: int):
        """A layer that was called before, on another tensor of the same shape; a new one the first time."""
        known = [layer for layer, shape in self.layers if shape == x.shape[1:]]
        if known:
            return known[choice % len(known)](x)
        kinds = [L.Dense, L.BatchNormalization, L.RMSNormalization, L.LayerNormalization, L.Activation, L.Dropout]
        arguments = {L.Dense: [4], L.Activation: ["swish"], L.Dropout: [0.5]}
        layer = (kind := kinds[choice % len(kinds)])(*arguments.get(kind, []))
        self.layers.append((layer, x.shape[1:]))
        return layer(x)

    def sub_model(self, x, choice: int) -> keras.Model:
        inner = Builder([keras.Input(x.shape[1:])])
        for index in range(1 + choice % 3):
            inner.step(INNER[(choice + index) % len(INNER)], 0, index)
        model = keras.Model(inner.pool[0], inner.pool[-1])
        self.layers.append((model, x.shape[1:]))
        return model


def build(shapes, program, outputs) -> keras.Model | None:
    """The model of a program; None where no step fitted."""
    inputs = [
        keras.Input(shape, name=f"x{index}", dtype="int32" if shape == TOKENS else None)
        for index, shape in enumerate(shapes)
    ]
    builder = Builder(L.Embedding(20, 4)(x) if x.dtype == "int32" else x for x in inputs)
    for step in program:
        builder.step(*step)
    made = builder.pool[len(inputs) :]  # an input by itself is no output
    if not made:
        return None
    return keras.Model(inputs, [made[-1], *(made[index % len(made)] for index in outputs)])


def run(shapes, program, outputs, pinned: bool) -> None:
    """Builds a model and holds all that must be true of it."""
    keras.utils.set_random_seed(0)
    keras.backend.clear_session(free_memory=False)
    model = build(shapes, program, outputs)
    if model is None:
        return
    give_trained_weights(model)
    try:
        quantized = quantize_model(model, input_range=(-2, 2) if pinned else None)
    except ModelError as error:
        assert "computes nothing" in str(error)
        return
    check_plan(quantized.plan)
    samples = samples_of(quantized, -2.0, 2.0, count=4)
    check_lowering(quantized, outputs_of(model, samples), samples)
    calibrate(quantized, quantized.arrange(samples))
    try:
        content = convert(quantized)
    except CalibrationError as error:
        assert "collapsed" in str(error)  # a tensor that is zero for all samples: nothing to quantize
        return
    inspection = inspect(content)
    assert inspection.fully_integer, inspection.problems
    parity = verify(quantized, content, samples, simulated=outputs_of(quantized, samples))
    assert parity.weights.identical == parity.weights.compared
    differing = Counter(f"{op.kind} by {op.max_lsb}" for op in parity.operators if op.max_lsb > 0)
    assert not differing, differing
    assert parity.end_to_end.identical == 1.0
    assert parity.passed, parity.problems


TOKENS = (6,)  # the input of this shape holds whole numbers
SHAPES = [(4,), (5, 4), (1, 3), (5, 5, 3), (4, 3, 1), TOKENS]
PROGRAMS = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9)


@settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    print_blob=bool(EXAMPLES),
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2), PROGRAMS, st.lists(st.integers(0, 8), max_size=2),
    st.booleans(),
)  # fmt: skip
def test_random_graphs(shapes, program, outputs, pinned):
    run(shapes, program, outputs, pinned)
