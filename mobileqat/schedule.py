"""What makes a training quantization-aware: when its parts start and freeze, and what becomes of the weights meanwhile.

Ranges and BatchNormalization statistics freeze late in training, so that the last epochs train exactly the function
that is shipped.
"""

from __future__ import annotations

import math

import keras
import numpy as np
import tensorflow as tf

from mobileqat.fakequant import quantize_weights, round_weights
from mobileqat.quantize import QuantizedModel
from mobileqat.recipe import QatTraining
from mobileqat.wrappers import QuantizeWrapper


class Schedule(keras.callbacks.Callback):
    """Starts quantization, and freezes ranges and BatchNormalization statistics, after their share of the epochs.

    The switches are Python attributes, so what is frozen costs nothing; the step is traced anew when one changes.
    """

    def __init__(self, quantized: QuantizedModel, settings: QatTraining):
        super().__init__()
        self.quantized = quantized
        self.settings = settings
        # The last epoch at least: a training that never quantizes is none.
        self.quantize_from = min(_epochs(settings.start_after, settings), settings.epochs - 1)
        self.observers_from = _epochs(settings.freeze_observers_after, settings)
        self.batch_norm_from = _epochs(settings.freeze_batch_norm_after, settings)

    def on_epoch_begin(self, epoch, logs=None):
        changed = freeze(self.quantized, epoch >= self.observers_from, epoch >= self.batch_norm_from)
        changed |= train_with(
            self.quantized, epoch >= self.quantize_from, self.settings.estimator, self.settings.damping
        )
        if changed:
            self.model.make_train_function(force=True)


def _epochs(share: float, settings: QatTraining) -> int:
    """A share of the epochs, rounded up; the share is as a recipe writes it, and 0.14 * 50 a hair above 7."""
    return math.ceil(round(share * settings.epochs, 6))


def freeze(model: QuantizedModel, observers: bool, batch_norm: bool) -> bool:
    """Freezes or frees activation ranges and BatchNormalization statistics; returns whether anything changed.

    A training function traced before must be traced anew: `model.make_train_function(force=True)`, or `compile`. Frozen
    ranges are constants in it.
    """
    changed = False
    for quantizer in model.quantizers.values():
        changed |= quantizer.observing == observers
        quantizer.observing = not observers
    for wrapper in model.operators.values():
        changed |= wrapper.batch_norm_frozen != batch_norm
        wrapper.batch_norm_frozen = batch_norm
    return changed


def train_with(
    model: QuantizedModel, quantizing: bool = True, estimator: str = "clipped", damping: float = 0.0
) -> bool:
    """Sets how a training step quantizes; returns whether anything changed. Inference is always quantized."""
    changed = False
    for part in (*model.quantizers.values(), *model.operators.values()):
        wanted = {"quantizing": quantizing, "estimator": estimator}
        if isinstance(part, QuantizeWrapper):
            wanted["damping"] = damping
        changed |= any(getattr(part, name) != value for name, value in wanted.items())
        for name, value in wanted.items():
            setattr(part, name, value)
    return changed


class AveragedWeights(keras.callbacks.Callback):
    """Moving averages of weights and trained ranges, which are validated and kept in their place.

    Keras's own (`use_ema`, SwapEMAWeights) swaps by sums and differences, which rounds the weights in each epoch.
    """

    def __init__(self, watched: keras.Model, decay: float):
        super().__init__()
        self.variables = watched.trainable_variables
        self.averages = [tf.Variable(variable, trainable=False) for variable in self.variables]
        self.decay = decay
        self._trained: list[np.ndarray] | None = None  # what training goes on with, while the averages are in the model
        self._step = tf.function(self._follow, autograph=False)

    def _follow(self) -> None:
        for variable, average in zip(self.variables, self.averages, strict=True):
            average.assign_add((1.0 - self.decay) * (tf.convert_to_tensor(variable) - average))

    def on_train_batch_end(self, batch, logs=None):
        self._step()

    def on_test_begin(self, logs=None):
        self._trained = [variable.numpy() for variable in self.variables]
        for variable, average in zip(self.variables, self.averages, strict=True):
            variable.assign(average)

    def on_epoch_begin(self, epoch, logs=None):
        if self._trained is not None:
            for variable, value in zip(self.variables, self._trained, strict=True):
                variable.assign(value)
            self._trained = None

    def state(self) -> tuple[dict, list[np.ndarray]]:
        return {}, [average.numpy() for average in self.averages]

    def set_state(self, values: dict, arrays) -> None:
        for average, array in zip(self.averages, arrays, strict=True):
            average.assign(array)


class OscillationFreeze(keras.callbacks.Callback):
    """Freezes weights that flip between two integers, at the one they are at more often (Nagel et al. 2022).

    Per weight and step, with x its integer:  o = 1 if x moved back by one, the other way than before, else 0;
    f <- m o + (1 - m) f;  x_ema <- m x + (1 - m) x_ema.  Where f exceeds the threshold at a flip, the weight stays from
    then on at that of the two integers that is closer to x_ema.  Unlike in the paper, moves by several integers are no
    flips, and a channel's largest weight is frozen at the grid's end only, since it makes the scale.
    """

    MOMENTUM = 0.01

    def __init__(self, quantized: QuantizedModel, threshold: float):
        super().__init__()
        self.wrappers = [w for w in quantized.operators.values() if w.weight_spec is not None and w.prologue is None]
        self.threshold = threshold
        self.state_of_weights = [self._start(wrapper) for wrapper in self.wrappers]
        self._follows = False  # whether weights have been followed since quantization started
        self._step = tf.function(self._all)

    def on_epoch_begin(self, epoch, logs=None):
        is_quantizing = bool(self.wrappers) and self.wrappers[0].quantizing
        if is_quantizing and not self._follows:  # what weights did in float epochs counts for nothing
            for wrapper, state in zip(self.wrappers, self.state_of_weights, strict=True):
                integers, _ = self._integers(wrapper)
                state["last"].assign(integers)
                state["average"].assign(integers)
        self._follows = is_quantizing

    def on_train_batch_end(self, batch, logs=None):
        if self.wrappers and self.wrappers[0].quantizing:
            self._step()

    def _variables(self) -> list[tf.Variable]:
        return [variable for state in self.state_of_weights for variable in state.values()]

    def state(self) -> tuple[dict, list[np.ndarray]]:
        return {"follows": self._follows}, [variable.numpy() for variable in self._variables()]

    def set_state(self, values: dict, arrays) -> None:
        self._follows = values["follows"]
        for variable, array in zip(self._variables(), arrays, strict=True):
            variable.assign(array)

    @staticmethod
    def _integers(wrapper: QuantizeWrapper):
        assert wrapper.weight_spec is not None
        return quantize_weights(wrapper.kernel(), wrapper.rule.channel_axes, wrapper.weight_spec, wrapper.ratio())

    def _start(self, wrapper: QuantizeWrapper) -> dict[str, tf.Variable]:
        integers, _ = self._integers(wrapper)
        zeros = tf.zeros_like(integers)
        start = {"last": integers, "direction": zeros, "frequency": zeros, "average": integers, "frozen": zeros}
        return {name: tf.Variable(value, trainable=False) for name, value in start.items()}

    def _all(self) -> None:
        for wrapper, state in zip(self.wrappers, self.state_of_weights, strict=True):
            spec, last = wrapper.weight_spec, tf.identity(state["last"])
            assert spec is not None
            integers, scales = self._integers(wrapper)
            moved = integers - last
            is_flip = (moved * state["direction"] < 0) & (tf.abs(moved) <= (2.0 if spec.is_binary else 1.0))
            state["direction"].assign(tf.where(moved != 0, tf.sign(moved), state["direction"]))
            for name, value in (("frequency", tf.cast(is_flip, tf.float32)), ("average", integers)):
                state[name].assign_add(self.MOMENTUM * (value - state[name]))
            # The average trails behind a weight that came from afar: of the two integers, the one on its side.
            low, high = tf.minimum(last, integers), tf.maximum(last, integers)
            usual = tf.clip_by_value(round_weights(state["average"], spec), low, high)
            is_held = state["frozen"] > 0
            freezes = is_flip & (state["frequency"] > self.threshold)
            freezes &= ~self._makes_scale(wrapper, last, is_held, usual)
            held = tf.where(is_held, last, usual)
            is_frozen = is_held | freezes
            wrapper.layer.kernel.assign(tf.where(is_frozen, held * scales, tf.convert_to_tensor(wrapper.layer.kernel)))
            state["last"].assign(tf.where(is_frozen, held, integers))
            state["frozen"].assign(tf.cast(is_frozen, tf.float32))

    @staticmethod
    def _makes_scale(wrapper: QuantizeWrapper, last, is_held, usual):
        """Weights that would leave their channel without one to make its scale, if they froze at `usual`: with all
        weights at a share of the largest one, a channel would shrink in every step."""
        spec, sizes = wrapper.weight_spec, tf.abs(wrapper.kernel())
        assert spec is not None
        channels = wrapper.rule.channel_axes if spec.per_channel else ()
        others = [axis for axis in range(len(sizes.shape)) if axis not in channels]
        can_make = ~is_held | (tf.abs(last) == spec.qmax)
        largest = tf.reduce_max(tf.where(can_make, sizes, 0.0), axis=others, keepdims=True)
        return (tf.abs(usual) < spec.qmax) & (sizes >= largest)


def reestimate_batch_norm(model: QuantizedModel, batches) -> None:
    """Sets every BatchNormalization's moving statistics to their mean over batches of (x, y) or x.

    Training quantizes the weights that the statistics follow, and a moving average lags behind them.
    """
    layers = batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    freeze(model, observers=True, batch_norm=False)
    try:
        for index, batch in enumerate(batches):
            for layer in layers:  # the mean of all batches so far
                layer.momentum = index / (index + 1)
            model(batch[0] if isinstance(batch, tuple) else batch, training=True)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        freeze(model, observers=False, batch_norm=False)


def batch_norms(model: QuantizedModel) -> list[keras.layers.Layer]:
    """The BatchNormalization layers that are folded into others."""
    return [w.batch_norm for w in model.operators.values() if w.batch_norm is not None]
