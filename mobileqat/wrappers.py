"""`QuantizeWrapper`: one runtime operator as one Keras layer.

In training it is straight-through fake quantization around unchanged layers:

    layer(x; fake-quantized kernel) -> BatchNormalization -> ReLU -> FakeQuantize

At inference it computes what the integer operator computes: BatchNormalization folded, bias rounded to s_in * s_w,
accumulators in integers, requantized as the runtime does.  So validation accuracy during training is the device's.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from mobileqat import kernels, numerics
from mobileqat.fakequant import FakeQuantize, product, quantize_weights, quotient, straight_through
from mobileqat.kernels import Grid
from mobileqat.plan import Operator
from mobileqat.rules import GONE, Output, get_rule
from mobileqat.schemes import QuantSpec


class QuantizeWrapper(keras.layers.Layer):
    """Runs one operator of the plan.

    The wrapped layers are never changed: taken out, they are the float model's, with the trained master weights.

    Args:
        operator: the plan's entry.
        layer: the leading layer, linear.
        batch_norm: BatchNormalization folded into it, or None.
        activation: ReLU fused into it, or None.
        weight_spec: grid of the kernel, None for layers without one.
        input_quantizers: one `FakeQuantize` per input, None where the input is float.
        output_quantizer: the output's `FakeQuantize`, None where it is float.
        member: name under which the output is observed, None where its range is not its own.
        is_output: the output leaves the model.
    """

    def __init__(
        self,
        operator: Operator,
        layer: keras.layers.Layer,
        batch_norm: keras.layers.Layer | None = None,
        activation: keras.layers.Layer | None = None,
        weight_spec: QuantSpec | None = None,
        input_quantizers: tuple[FakeQuantize | None, ...] = (),
        output_quantizer: FakeQuantize | None = None,
        member: str | None = None,
        is_output: bool = False,
        **kwargs,
    ):
        # Quantizers compute in float32 whatever the policy; the wrapped layers keep theirs (mixed precision).
        super().__init__(dtype="float32", **kwargs)
        self.operator = operator
        self.rule = get_rule(layer)
        self.layer = layer
        self.batch_norm = batch_norm
        self.activation = activation
        self.weight_spec = weight_spec
        self.input_quantizers = list(input_quantizers)
        self.output_quantizer = output_quantizer
        self.member = member
        self.is_output = is_output
        # A Python attribute like FakeQuantize.observing; `train.Schedule` sets it and retraces.
        self.batch_norm_frozen = False
        self.supports_jit = True
        self.built = True

    def call(self, inputs, training=None):
        if self.operator.quantized and not training:
            return self._infer(tf.nest.flatten(inputs))
        x = tf.cast(self.float_call(inputs, training, self._fake_quantized_kernel()), tf.float32)
        if self._quantizes_output(training):
            return self.output_quantizer(x, member=self.member, training=training)
        return x

    @property
    def rounds(self) -> bool:
        """Whether the operator computes values that have to be rounded, rather than moving some that are."""
        return self.rule.rounds and self.operator.kind != GONE

    def _quantizes_output(self, training) -> bool:
        if self.output_quantizer is None:
            return False
        if not self.operator.quantized:
            return True
        # Probabilities that leave the model go into a loss: rounded to 0 they would give log(0) and no gradient.
        return self.rounds and not (training and self.is_output and self.rule.output is Output.FIXED)

    def float_call(self, inputs, training=None, kernel=None):
        """The float layers, with another kernel when one is given; no activation is quantized."""
        x = self._call_layer(inputs, training, kernel)
        if self.batch_norm is not None:
            x = self.batch_norm(x, training=bool(training) and not self.batch_norm_frozen)
        return x if self.activation is None else self.activation(x)

    def _call_layer(self, inputs, training, kernel):
        arguments = {"training": training} if self.layer._call_has_training_arg else {}
        if kernel is None:
            return self.layer(inputs, **arguments)
        with keras.StatelessScope(state_mapping=[(self.layer.kernel, kernel)]):
            return self.layer(inputs, **arguments)

    def _fake_quantized_kernel(self):
        if self.weight_spec is None:
            return None
        kernel = tf.convert_to_tensor(self.layer.kernel)
        integers, scales = quantize_weights(kernel, self.rule.channel_axes, self.weight_spec)
        return integers * scales

    # ------------------------------------------------------------------ integer inference

    def _infer(self, inputs):
        output = self.grid(self.output_quantizer)
        if not self.rounds:
            # On integers, since a mixed precision policy may round real values to 16 bits; integers it keeps.
            integers = [x / output.scale for x in inputs]
            return tf.cast(self.layer(integers if len(inputs) > 1 else integers[0]), tf.float32) * output.scale
        grids = [self.grid(quantizer) for quantizer in self.input_quantizers]
        if self.weight_spec is not None:
            return self._infer_weighted(inputs[0], grids[0], output)
        integers = [grid.integers(x) for grid, x in zip(grids, inputs, strict=True)]
        kernel = kernels.KERNELS[self.operator.kind]
        exact = kernel(self.layer, integers, grids, output, self.operator.fused_activation)
        differentiable = self.float_call(inputs if len(inputs) > 1 else inputs[0], training=False)
        return straight_through(output.real(exact), tf.cast(differentiable, tf.float32))

    def _infer_weighted(self, x, grid: Grid, output: Grid):
        weights, scales, bias = self.folded(grid.scale)
        centred = x / grid.scale
        centred = straight_through(tf.round(centred), centred)
        accumulators = kernels.accumulate(self.operator.kind, self.layer, centred, weights)
        accumulators += straight_through(tf.round(bias), bias)
        integers = kernels.requantize(
            accumulators,
            quotient(product(grid.scale, scales), output.scale),
            output,
            self.operator.fused_activation,
        )
        low, high = output.clamp(self.operator.fused_activation)
        clipped = tf.clip_by_value(accumulators * (grid.scale * scales), output.real(low), output.real(high))
        return straight_through(output.real(integers), clipped)

    def grid(self, quantizer: FakeQuantize) -> Grid:
        """A tensor's grid, for `kernels`."""
        scale, zero_point = quantizer.parameters()
        return Grid(scale, zero_point, quantizer.spec.qmin, quantizer.spec.qmax)

    def folded(self, input_scale):
        """Weight integers, weight scales and bias with BatchNormalization folded in.

        A scale per output channel commutes with max-abs quantization, so folding changes scales and never integers
        (a negative gamma flips their sign).

        Args:
            input_scale: the input's scale, float32 scalar.

        Returns:
            `(integers, scales, bias)`: float32 integers in the kernel's layout, float32 scales [channels], and the
            bias in units of `input_scale * scales`, not yet rounded, [channels].
        """
        axes = self.rule.channel_axes
        kernel = tf.convert_to_tensor(self.layer.kernel)
        integers, scales = quantize_weights(kernel, axes, self.weight_spec)
        channel_shape = [size if axis in axes else 1 for axis, size in enumerate(kernel.shape)]
        scales = tf.reshape(tf.broadcast_to(scales, channel_shape), [-1])
        bias = tf.convert_to_tensor(self.layer.bias) if self.layer.use_bias else tf.zeros_like(scales)
        if self.batch_norm is not None:
            factor, offset = self._batch_norm_affine()
            scales, bias = product(scales, tf.abs(factor)), product(bias, factor) + offset
            integers *= tf.reshape(tf.where(factor < 0, -1.0, 1.0), channel_shape)
        # A channel whose weights vanish beside its bias (gamma near 0) would need a bias beyond int32.
        dead = tf.abs(bias) >= product(input_scale, scales) * numerics.LARGEST_BIAS
        fallback = tf.maximum(quotient(tf.abs(bias), input_scale * 2.0**24), float(numerics.SMALLEST_SCALE))
        scales = tf.where(dead, fallback, scales)
        integers *= tf.reshape(tf.where(dead, 0.0, 1.0), channel_shape)
        return integers, scales, quotient(bias, product(input_scale, scales))

    def _batch_norm_affine(self):
        """BatchNormalization at inference as `x * factor + offset`, float32 [channels] each."""
        bn = self.batch_norm
        gamma = tf.convert_to_tensor(bn.gamma) if bn.scale else 1.0
        factor = quotient(gamma, tf.sqrt(tf.cast(bn.moving_variance, tf.float64) + bn.epsilon))
        offset = -product(bn.moving_mean, factor)
        return factor, offset + tf.convert_to_tensor(bn.beta) if bn.center else offset

    def input_scale(self) -> np.float32:
        """Scale of the first input, which the bias's unit depends on."""
        quantizer = self.input_quantizers[0]
        assert quantizer is not None
        return quantizer.grid()[0]

    def constants(self) -> dict[str, np.ndarray]:
        """What the integer file stores for this operator.

        Returns:
            "weights": int8 in Keras's kernel layout, "scales": float32 [channels], "bias": int32 [channels].
        """
        integers, scales, bias = self.folded(self.input_scale())
        return {
            "weights": integers.numpy().astype(np.int8),
            "scales": scales.numpy(),
            "bias": np.round(bias.numpy()).astype(np.int32),
        }

    def compute_output_spec(self, inputs, training=None):
        x = self.layer.compute_output_spec(inputs)
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def float_constants(self) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias in float32 with BatchNormalization folded in, for an operator kept in float."""
        axes = self.rule.channel_axes
        kernel = tf.convert_to_tensor(self.layer.kernel)
        channel_shape = [size if axis in axes else 1 for axis, size in enumerate(kernel.shape)]
        bias = tf.convert_to_tensor(self.layer.bias) if self.layer.use_bias else tf.zeros(np.prod(channel_shape))
        if self.batch_norm is not None:
            factor, offset = self._batch_norm_affine()
            kernel, bias = kernel * tf.reshape(factor, channel_shape), bias * factor + offset
        return kernel.numpy(), bias.numpy()
