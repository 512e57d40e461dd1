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

from mobileqat import kernels, kernels16, numerics
from mobileqat.batch_norm import batch_normalize
from mobileqat.fakequant import (
    FakeQuantize,
    fake_quantize_weights,
    no_loss,
    product,
    quantize_weights,
    quotient,
    straight_through,
    weight_scales,
)
from mobileqat.fixed_point import float64
from mobileqat.kernels import Grid
from mobileqat.plan import Operator
from mobileqat.rules import CONSTANT, GONE, Output, get_rule
from mobileqat.schemes import QuantSpec

KERNELS = {8: kernels.KERNELS, 16: kernels16.KERNELS}  # by bits of the activations

CEILINGS = {"RELU": float("inf"), "RELU6": 6.0}  # where the fused activations end


def as_float32(x):
    """Real values in float32; whole numbers as they are."""
    x = tf.convert_to_tensor(x)
    return tf.cast(x, tf.float32) if x.dtype.is_floating else x


class QuantizeWrapper(keras.layers.Layer):
    """Runs one operator of the plan.

    The wrapped layers are never changed: taken out, they are the float model's, with the trained master weights.

    Args:
        operator: the plan's entry.
        layer: the leading layer, linear.
        batch_norm: BatchNormalization folded into it, or None.
        activation: ReLU fused into it, or None.
        input_quantizers: one `FakeQuantize` per input, None where the input is float.
        output_quantizer: the output's `FakeQuantize`, None where it is float.
        member: name under which the output is observed, None where its range is not its own.
        is_output: the output leaves the model, if only moved on its way.
        prologue: `(scale, offset)` per input channel, float32, that the kernel takes in: preprocessing.
        weight_range: "maxabs", "mse" or "learned"; see `quantize_model`.
    """

    def __init__(
        self,
        operator: Operator,
        layer: keras.layers.Layer,
        batch_norm: keras.layers.Layer | None = None,
        activation: keras.layers.Layer | None = None,
        input_quantizers: tuple[FakeQuantize | None, ...] = (),
        output_quantizer: FakeQuantize | None = None,
        member: str | None = None,
        is_output: bool = False,
        prologue: tuple[np.ndarray, np.ndarray] | None = None,
        weight_range: str = "maxabs",
        **kwargs,
    ):
        # Quantizers compute in float32 whatever the policy; the wrapped layers keep theirs (mixed precision).
        super().__init__(dtype="float32", **kwargs)
        self.operator = operator
        self.rule = get_rule(layer)
        self.layer = layer
        self.batch_norm = batch_norm
        self.activation = activation
        self.input_quantizers = list(input_quantizers)
        self.output_quantizer = output_quantizer
        self.member = member
        self.is_output = is_output
        self.prologue = prologue
        # Python attributes like FakeQuantize.observing; `schedule.Schedule` sets them and retraces.
        self.batch_norm_frozen = False
        self.quantizing = True
        self.estimator = "clipped"
        self.damping = 0.0
        self.weight_ratio = None
        if self.weight_spec is not None and weight_range != "maxabs":
            shape = tuple(
                weight_scales(tf.convert_to_tensor(layer.kernel), self.rule.channel_axes, self.weight_spec).shape
            )
            # The scales' share of the largest: 1 saturates no weight.
            self.weight_ratio = self.add_weight(
                name="weight_ratio",
                shape=shape,
                initializer="ones",
                trainable=weight_range == "learned",
                constraint=lambda ratio: keras.ops.clip(ratio, 0.01, 1.0),
                dtype="float32",
                autocast=False,
            )
        self.supports_jit = True
        self.built = True

    def call(self, inputs, training=None):
        is_constant = self.operator.kind == CONSTANT
        if self.operator.quantized and not training and not is_constant:
            return self._infer(tf.nest.flatten(inputs))
        if training and self._rectifies(training):
            x = as_float32(self.linear_call(inputs, training, quantized=True))
            return self.output_quantizer.rectify(x, self.member, CEILINGS[self.operator.fused_activation])
        if training and not self.quantizing and self.weight_ratio is not None:
            self.add_loss(no_loss(self.weight_ratio))
        x = as_float32(self.float_call(inputs, training, quantized=self.operator.quantized and self.quantizing))
        if self._quantizes_output(training):
            # The range of a constant is what it holds now, not what it held on average.
            decay = 0.0 if is_constant else None
            return self.output_quantizer(x, member=self.member, training=training, ema_decay=decay)
        return x

    @property
    def weight_spec(self) -> QuantSpec | None:
        """Grid of the kernel, None for layers without one."""
        return self.operator.weight_spec

    @property
    def rounds(self) -> bool:
        """Whether the operator computes values that have to be rounded, rather than moving some that are."""
        return self.rule.rounds and self.operator.kind != GONE

    def _quantizes_output(self, training) -> bool:
        # Probabilities that leave the model go into a loss: rounded to 0 they would give log(0) and no gradient.
        leaves = training and self.is_output and self.rule.output is Output.FIXED
        return self.output_quantizer is not None and not leaves and (self.rounds or not self.operator.quantized)

    def _rectifies(self, training) -> bool:
        """Whether the output's grid, which clips anyway, does the work of the fused ReLU."""
        is_rectified = self.activation is not None and self.operator.fused_activation in CEILINGS
        if self.output_quantizer is None or not (is_rectified and self.operator.quantized and self.quantizing):
            return False
        ceiling = CEILINGS[self.operator.fused_activation]
        return self._quantizes_output(training) and self.output_quantizer.rectifies(ceiling)

    def float_call(self, inputs, training=None, quantized=False):
        """The float layers, their kernel fake-quantized if asked for; no activation is quantized."""
        x = self.linear_call(inputs, training, quantized)
        return x if self.activation is None else self.activation(x)

    def linear_call(self, inputs, training=None, quantized=False):
        """`float_call` without the fused ReLU."""
        x = self._call_layer(inputs, training, self.weight_spec if quantized else None)
        if self.batch_norm is not None:
            x = batch_normalize(self.batch_norm, x, bool(training), self.batch_norm_frozen)
        return x

    def _call_layer(self, inputs, training, spec: QuantSpec | None):
        arguments = {"training": training} if self.layer._call_has_training_arg else {}
        if spec is None and self.prologue is None:
            return self.layer(inputs, **arguments)
        kernel = self.kernel()
        if spec is not None:
            real = kernel
            kernel = fake_quantize_weights(real, self.rule.channel_axes, spec, self.ratio(), self.estimator)
            if training and self.damping:
                self._damp(real, tf.stop_gradient(kernel), spec)
        with keras.StatelessScope(state_mapping=[(self.layer.kernel, kernel)]):
            x = self.layer(inputs, **arguments)
        return x if self.prologue is None else x + tf.cast(self._offset(), x.dtype)

    def _damp(self, real, quantized, spec: QuantSpec) -> None:
        """Pulls weights to the middle of their step; those that saturate are left alone (Nagel et al. 2022)."""
        scales = tf.stop_gradient(quantize_weights(real, self.rule.channel_axes, spec, self.ratio())[1])
        inside = tf.clip_by_value(real, scales * spec.qmin, scales * spec.qmax)
        self.add_loss(self.damping * tf.reduce_sum(tf.square(quantized - inside)))

    def ratio(self):
        """The scales' share of the largest useful ones, in (0, 1]; None where it is 1."""
        return None if self.weight_ratio is None else tf.convert_to_tensor(self.weight_ratio)

    def fit_weight_range(self) -> None:
        """Sets the scales of the kernel to those with the least squared error, per channel, of 71 shares."""
        spec = self.weight_spec
        if self.weight_ratio is None or spec is None:
            return
        kernel, axes = self.kernel(), self.rule.channel_axes
        reduced = [axis for axis, size in enumerate(self.weight_ratio.shape) if size == 1]
        shares = np.linspace(1.0, 0.3, 71, dtype=np.float32)
        errors = []
        for share in shares:
            integers, scales = quantize_weights(kernel, axes, spec, tf.fill(self.weight_ratio.shape, share))
            errors.append(tf.reduce_sum(tf.square(integers * scales - kernel), reduced, keepdims=True))
        self.weight_ratio.assign(tf.gather(tf.constant(shares), tf.argmin(tf.stack(errors))))

    def kernel(self):
        """The kernel that is applied to the input as it comes: with the prologue's scale taken in."""
        kernel = tf.convert_to_tensor(self.layer.kernel)
        return kernel if self.prologue is None else kernel * self._per_input(self.prologue[0])

    def layer_kernel(self, kernel):
        """The layer's own weights that `kernel` makes this one of."""
        if self.prologue is None:
            return kernel
        factor = self._per_input(self.prologue[0])
        return tf.where(factor == 0, self.layer.kernel, kernel / tf.where(factor == 0, 1.0, factor))

    def bias(self):
        """The bias, float32 [channels], with the prologue's offset taken in."""
        axes = self.rule.channel_axes
        if self.layer.use_bias:
            bias = tf.convert_to_tensor(self.layer.bias)
        else:
            bias = tf.zeros([np.prod([self.layer.kernel.shape[axis] for axis in axes])])
        return bias if self.prologue is None else bias + self._offset()

    def _offset(self):
        """What the prologue's offset adds to every output, float32 [channels]."""
        moved = tf.convert_to_tensor(self.layer.kernel) * self._per_input(self.prologue[1])
        axes = [axis for axis in range(len(moved.shape)) if axis not in self.rule.channel_axes]
        return tf.reshape(tf.reduce_sum(moved, axes), [-1])

    def _per_input(self, values):
        """Values per input channel, shaped to broadcast against the kernel."""
        kernel = self.layer.kernel
        shape = [1] * len(kernel.shape)
        shape[self.rule.input_axis] = -1
        return tf.reshape(tf.constant(values), shape)

    # ------------------------------------------------------------------ integer inference

    def _infer(self, inputs):
        if self.output_quantizer is None:  # whole numbers: indices on their way to a GATHER
            return self.layer(inputs if len(inputs) > 1 else inputs[0])
        output = self.grid(self.output_quantizer)
        if not self.rounds:
            # On integers, since a mixed precision policy may round real values to 16 bits; integers it keeps.
            integers = [x / output.scale if x.dtype.is_floating else x for x in inputs]
            return tf.cast(self.layer(integers if len(inputs) > 1 else integers[0]), tf.float32) * output.scale
        grids = [self.grid(quantizer) for quantizer in self.input_quantizers]
        if self.weight_spec is not None:
            return self._infer_weighted(inputs[0], grids[0], output)
        integers = [grid.integers(x) for grid, x in zip(grids, inputs, strict=True)]
        kernel = KERNELS[self.bits][self.operator.kind]
        exact = kernel(self.layer, integers, grids, output, self.operator.fused_activation)
        differentiable = self.float_call(inputs if len(inputs) > 1 else inputs[0], training=False)
        return straight_through(output.real(exact), tf.cast(differentiable, tf.float32))

    def _infer_weighted(self, x, grid: Grid, output: Grid):
        weights, scales, bias = self.folded(grid.scale)
        centred = x / grid.scale
        centred = straight_through(tf.round(centred), centred)
        accumulators = kernels.accumulate(self.operator.kind, self.layer, centred, weights)
        accumulators += straight_through(tf.round(bias), bias)
        if self.bits == 16:
            exact = kernels16.accumulate(self.operator.kind, self.layer, centred, weights) + float64(tf.round(bias))
            arguments = (grid.scale, scales, output, self.operator.fused_activation)
            integers = kernels16.requantize(self.operator.kind, exact, *arguments)
        else:
            integers = self._requantize(accumulators, grid.scale, scales, output)
        low, high = output.clamp(self.operator.fused_activation)
        clipped = tf.clip_by_value(accumulators * (grid.scale * scales), output.real(low), output.real(high))
        return straight_through(output.real(integers), clipped)

    def _requantize(self, accumulators, input_scale, scales, output: Grid):
        """As the kernel does that runs: the delegate's, or the built-in one where the delegate refuses int4."""
        activation = self.operator.fused_activation
        if kernels.leaves_delegate(self.operator.kind, self.operator.storage_bits, self.layer):
            ratio = kernels.exact_ratio(input_scale, scales, output.scale)
            return kernels.requantize_fixed_point(accumulators, ratio, output, activation)
        return kernels.requantize(
            accumulators, quotient(product(input_scale, scales), output.scale), output, activation
        )

    @property
    def bits(self) -> int:
        """Bits of the activations."""
        assert self.output_quantizer is not None
        return self.output_quantizer.spec.bits

    def grid(self, quantizer: FakeQuantize) -> Grid:
        """A tensor's grid, for `kernels`."""
        scale, zero_point = quantizer.inference_parameters()
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
        kernel = self.kernel()
        integers, scales = quantize_weights(kernel, axes, self.weight_spec, self.ratio())
        channel_shape = [size if axis in axes else 1 for axis, size in enumerate(kernel.shape)]
        scales = tf.reshape(tf.broadcast_to(scales, channel_shape), [-1])
        bias = self.bias()
        if self.batch_norm is not None:
            factor, offset = self._batch_norm_affine()
            # In float64, so that no order of float32 operations moves an integer of the bias.
            bias = tf.cast(float64(bias) * float64(factor) + float64(offset), tf.float32)
            scales = product(scales, tf.abs(factor))
            integers *= tf.reshape(tf.where(factor < 0, -1.0, 1.0), channel_shape)
        # A channel whose weights vanish beside its bias (gamma near 0) would need a bias beyond int32.
        largest = numerics.LARGEST_BIAS if self.bits == 8 else numerics.LARGEST_BIAS_INT16
        dead = tf.abs(bias) >= product(input_scale, scales) * largest
        fallback = tf.maximum(quotient(tf.abs(bias), input_scale * 2.0**24), float(numerics.SMALLEST_SCALE))
        scales = tf.where(dead, fallback, scales)
        integers *= tf.reshape(tf.where(dead, 0.0, 1.0), channel_shape)
        return integers, scales, quotient(bias, product(input_scale, scales))

    def _batch_norm_affine(self):
        """BatchNormalization at inference as `x * factor + offset`, float32 [channels] each."""
        bn = self.batch_norm
        gamma = tf.convert_to_tensor(bn.gamma) if bn.scale else 1.0
        factor = quotient(gamma, tf.sqrt(tf.cast(bn.moving_variance, tf.float64) + bn.epsilon))
        offset = -float64(bn.moving_mean) * float64(factor)
        return factor, tf.cast(offset + float64(bn.beta) if bn.center else offset, tf.float32)

    def input_scale(self) -> np.float32:
        """Scale of the first input, which the bias's unit depends on."""
        quantizer = self.input_quantizers[0]
        assert quantizer is not None
        return quantizer.grid()[0]

    def constants(self) -> dict[str, np.ndarray]:
        """What the integer file stores for this operator.

        Returns:
            "weights": int8 in Keras's kernel layout, "scales": float32 [channels], "bias": int32 [channels], int64
            for int16 activations.
        """
        integers, scales, bias = self.folded(self.input_scale())
        return {
            "weights": integers.numpy().astype(np.int8),
            "scales": scales.numpy(),
            "bias": np.round(bias.numpy()).astype(np.int32 if self.bits == 8 else np.int64),
        }

    def compute_output_spec(self, inputs, training=None):
        x = self.layer.compute_output_spec(inputs)
        return keras.KerasTensor(x.shape, x.dtype if x.dtype.startswith(("int", "uint")) else self.compute_dtype)

    def constant(self) -> np.ndarray:
        """The value of a constant operand as the file stores it: int8 or int16 on its grid, float32, or int32."""
        value = self.layer.value.numpy()
        if self.output_quantizer is None:
            return value
        spec = self.output_quantizer.spec
        return numerics.quantize(value, *self.output_quantizer.grid(), spec).astype(f"int{spec.bits}")

    def float_constants(self) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias in float32 with BatchNormalization folded in, for an operator kept in float."""
        axes = self.rule.channel_axes
        kernel, bias = self.kernel(), self.bias()
        channel_shape = [size if axis in axes else 1 for axis, size in enumerate(kernel.shape)]
        if self.batch_norm is not None:
            factor, offset = self._batch_norm_affine()
            kernel, bias = kernel * tf.reshape(factor, channel_shape), bias * factor + offset
        return kernel.numpy(), bias.numpy()
