"""AdaRound: learns for every weight whether to round it up or down (Nagel et al. 2020, arXiv:2004.10568).

Rounding to nearest is best for each weight alone, not for a layer's output.  Layer by layer, on samples,

    w(V) = s * clip(floor(w / s) + h(V), -qmax, qmax),   h(V) = clip(sigmoid(V) * 1.2 - 0.1, 0, 1)
    min  |f(w(V) x') - f(w x)|**2 + lambda * sum(1 - |2 h(V) - 1|**beta),   beta annealed from 20 to 2

where x' comes from the quantized layers before it, x from the float ones, and f holds BatchNormalization and ReLU.
The scale stays: the largest weight of a channel, which defines it, and weights that saturate keep their integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobileqat.errors import CalibrationError
from mobileqat.fakequant import quantize_weights
from mobileqat.layerwise import Step, shared_layers, walk
from mobileqat.quantize import QuantizedModel
from mobileqat.schemes import QuantSpec
from mobileqat.wrappers import as_float32

DEFAULT_STEPS = 300  # 1000, three times as long, gave no more on MobileNetV1 and on DS-CNN
# Of the rectified sigmoid, and of the regulariser; the paper's.
GAMMA, ZETA = -0.1, 1.1
BETA = (20.0, 2.0)
WARM_UP = 0.2  # share of the steps before the regulariser sets in
LAMBDA = 0.01


@dataclass(frozen=True)
class Rounding:
    """What `adaround` did to one operator.

    Args:
        operator: its name.
        weights: how many there are.
        moved: share of the integers that are not those of rounding to nearest.
        error_before: mean squared error of the output, relative to the mean square of the float output, rounded to
            nearest.
        error: the same afterwards.
    """

    operator: str
    weights: int
    moved: float
    error_before: float
    error: float


def adaround(
    model: QuantizedModel,
    samples: Any,
    *,
    steps: int = DEFAULT_STEPS,
    batch_size: int = 32,
    learning_rate: float = 3e-2,
    seed: int = 0,
) -> list[Rounding]:
    """Rounds the weights of every operator so that its output stays closest to the float model's.

    Args:
        model: calibrated; its kernels become multiples of their scales, in place.
        samples: calibration data, an array [n, ...], or a list or dict of arrays for several inputs; the values of a
            layer on all of them are held in memory.
        steps: of Adam, per operator.
        batch_size: samples per step.
        learning_rate: of Adam.
        seed: of the choice of batches.

    Returns:
        A row per operator with weights of its own.

    Raises:
        CalibrationError: a range is missing, there is no sample, one is not finite, or a number is not positive or
            (steps, batch_size) not whole.
        DataError: samples that do not fit the model's inputs.
    """
    are_whole = all(isinstance(number, int) for number in (steps, batch_size))
    if not are_whole or min(steps, batch_size, learning_rate) <= 0:
        raise CalibrationError(
            "adaround needs whole positive numbers as steps and batch_size, and a positive learning_rate. "
            f"Received: {steps}, {batch_size}, {learning_rate}"
        )
    shared, rows = shared_layers(model), []
    for step in walk(model, samples, what="adaround"):
        spec = step.wrapper.weight_spec
        # A shared kernel sees several inputs, and a binary one has no next integer: they stay as they are.
        if spec is not None and not spec.is_binary and step.wrapper.operator.name not in shared:
            rows.append(_Layer(step, spec).round(steps, batch_size, learning_rate, seed))
    return rows


class _Layer:
    """One layer whose weights lie between two integers each."""

    def __init__(self, step: Step, spec: QuantSpec):
        self.step, self.wrapper, self.targets = step, step.wrapper, step.float_output
        self.spec = spec
        self.kernel = self.wrapper.kernel()
        _, self.scales = quantize_weights(self.kernel, self.wrapper.rule.channel_axes, spec, self.wrapper.ratio())
        self.scaled = self.kernel / self.scales
        self.floor = tf.floor(self.scaled)
        # Those that define a scale, and those that saturate.
        self.is_fixed = tf.abs(self.scaled) > spec.qmax - 1e-4
        self.power = float(np.mean(np.square(self.targets))) or 1.0

    def round(self, steps: int, batch_size: int, learning_rate: float, seed: int) -> Rounding:
        nearest = self._integers(tf.round(self.scaled - self.floor))
        chosen = self._integers(tf.round(self._optimize(steps, batch_size, learning_rate, seed)))
        before, error = self._error(nearest), self._error(chosen)
        if error >= before:
            chosen, error = nearest, before
        self.wrapper.layer.kernel.assign(self._kernel(chosen))
        moved = float(np.mean(chosen != nearest))
        return Rounding(self.wrapper.operator.name, int(tf.size(nearest)), moved, before, error)

    def _optimize(self, steps: int, batch_size: int, learning_rate: float, seed: int):
        """h(V) after the last step, nearly all of it 0 or 1."""
        rest = (self.scaled - self.floor - GAMMA) / (ZETA - GAMMA)
        v = keras.Variable(tf.math.log(rest / (1.0 - rest)), dtype="float32")
        optimizer = keras.optimizers.Adam(learning_rate)
        optimizer.build([v])
        inputs, targets = tf.constant(self.step.inputs[0]), tf.constant(self.targets)

        @tf.function
        def optimize():
            for index in tf.range(steps):
                batch = tf.random.stateless_uniform([batch_size], [seed, index], 0, len(inputs), tf.int32)
                with tf.GradientTape() as tape:
                    up = _rectified_sigmoid(v.value)
                    difference = self._output(tf.gather(inputs, batch), self._integers(up)) - tf.gather(targets, batch)
                    error = tf.reduce_mean(tf.reduce_sum(tf.square(difference), -1)) / self.power
                    loss = error + _regularization(up, tf.cast(index, tf.float32) / steps)
                optimizer.apply([tape.gradient(loss, v.value)], [v])

        optimize.get_concrete_function()()  # a plain call would warn of the tracing, once per layer, that is meant
        return _rectified_sigmoid(v.value)

    def _integers(self, up):
        """Weights in units of their scales, rounded up by a share in [0, 1]."""
        shifted = tf.where(self.is_fixed, tf.round(self.scaled), self.floor + up)
        return tf.clip_by_value(shifted, self.spec.qmin, self.spec.qmax)

    def _kernel(self, integers):
        """The layer's own kernel with these integers, and with the scales that it has."""
        largest = self.scales * self.spec.qmax
        inside = tf.clip_by_value(integers * self.scales, -largest, largest)
        return self.wrapper.layer_kernel(tf.where(self.is_fixed, self.kernel, inside))

    def _output(self, inputs, integers):
        """The layer's float output with other weights."""
        with keras.StatelessScope(state_mapping=[(self.wrapper.layer.kernel, self._kernel(integers))]):
            return as_float32(self.wrapper.float_call(inputs, training=False))

    def _error(self, integers) -> float:
        outputs = self.step.run(lambda x: self._output(x, integers), self.step.inputs)
        return float(np.mean(np.square(outputs - self.targets))) / self.power


def _rectified_sigmoid(v):
    return tf.clip_by_value(tf.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def _regularization(up, progress):
    """Pushes every share to 0 or 1, harder and harder."""
    late = tf.maximum((progress - WARM_UP) / (1.0 - WARM_UP), 0.0)
    beta = BETA[1] + 0.5 * (BETA[0] - BETA[1]) * (1.0 + tf.cos(late * np.pi))
    penalty = LAMBDA * tf.reduce_sum(1.0 - tf.pow(tf.abs(2.0 * up - 1.0), beta))
    return tf.where(progress < WARM_UP, 0.0, penalty)
