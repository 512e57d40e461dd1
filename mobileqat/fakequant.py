"""Straight-through fake quantization on TensorFlow: the `FakeQuantize` layer for activations, a function for weights.

Forward, a value snaps to its grid; backward, rounding counts as the identity (Bengio et al. 2013), and values beyond
the range, which saturate, pass no gradient.  Ranges follow a debiased moving average (Kingma & Ba 2015, section 3)
that calibration sets and training continues, or start there and are trained like weights:

    w <- d * w + (1 - d),   m <- d * m + (1 - d) * batch_range,   range = m / w  (+ width * learned shift)
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from mobileqat import numerics
from mobileqat.schemes import QuantSpec


@tf.custom_gradient
def straight_through(exact, differentiable):
    """The value of `exact` with the gradient of `differentiable`; both tensors have one shape and dtype.

    Not `d + stop_gradient(exact - d)`: TensorFlow's graph optimizer reorders such sums, and the value is then no
    longer `exact` to the bit.
    """
    return tf.identity(exact), lambda gradient: (None, gradient)


def product(a, b):
    """a * b in float32, correctly rounded.

    By way of float64: TensorFlow's graph optimizer rewrites float32 scalars (x / 255 becomes x * (1 / 255), 1 / sqrt
    becomes rsqrt), which moves a scale by an ulp and now and then an integer with it.  A float64 result rounds to
    the same float32 either way.
    """
    return tf.cast(tf.cast(a, tf.float64) * tf.cast(b, tf.float64), tf.float32)


def quotient(a, b):
    """a / b in float32, correctly rounded; see `product`."""
    return tf.cast(tf.cast(a, tf.float64) / tf.cast(b, tf.float64), tf.float32)


def round_half_away(x):
    """`numerics.round_half_away` on tensors."""
    whole = tf.sign(x) * tf.floor(tf.abs(x))
    return whole + tf.sign(x) * tf.cast(tf.abs(x - whole) >= 0.5, x.dtype)


ESTIMATORS = ("clipped", "identity", "soft")
SOFTNESS = 0.5  # of the soft estimator: the slope is between 1 - SOFTNESS and 1 + SOFTNESS


def fake_quantize(
    x, scale, bounds, clips, estimator: str = "clipped", round_to_grid: Callable = tf.round, distance: float = 1.0
):
    """Values snapped to `scale * {bounds[0], ..., bounds[1]}`, with straight-through gradients.

    With r = x / scale, forward is y = scale * round(clip(r, *bounds)).  Backward:

        dy/dscale  inside    round(r) - r     (LSQ, Esser et al. 2020)
        dy/dclip   outside   1 for the end that x lies beyond (PACT, Choi et al. 2018; LSQ+, Bhalgat et al. 2020)
        dy/dx      inside    1;  soft: 1 - SOFTNESS * cos(2 pi (r - bounds[0]) / distance), steep where rounding jumps
                   outside   0;  identity: 1

    Args:
        x: float32 tensor.
        scale: float32, broadcasts against x.
        bounds: the first and last integer, without the zero point.
        clips: real values of the two, as functions of what is learned; only their gradient counts.
        estimator: one of `ESTIMATORS`.
        round_to_grid: from values within the bounds to integers.
        distance: between two of those: 1, and 2 for signs.
    """
    scaled = tf.stop_gradient(x / scale)
    inside = tf.clip_by_value(scaled, *bounds)
    rounded = tf.stop_gradient(round_to_grid(inside))
    phase = 2.0 * np.pi / distance * (scaled - bounds[0])
    slope = 1.0 - SOFTNESS * tf.cos(phase) if estimator == "soft" else 1.0
    within = slope * x + scale * (rounded - scaled)
    low, high = (clip + (x if estimator == "identity" else tf.zeros_like(x)) for clip in clips)
    relaxed = tf.where(scaled < bounds[0], low, tf.where(scaled > bounds[1], high, within))
    return straight_through(rounded * scale, relaxed)


@tf.custom_gradient
def scale_gradient(x, factor):
    """x, with a gradient `factor` times as large."""
    return tf.identity(x), lambda gradient: (gradient * factor, None)


def no_loss(variable):
    """0, with a gradient of 0: Keras warns of variables that a step leaves out."""
    return 0.0 * tf.reduce_sum(variable)


def step_gradient_factor(count: int, qmax: int) -> float:
    """1 / sqrt(count * qmax): brings gradients of a step size to the size of those of `count` values (LSQ, 2.2)."""
    return 1.0 / float(np.sqrt(count * qmax))


def weight_scales(weights, channel_axes: tuple[int, ...], spec: QuantSpec):
    """`numerics.weight_scales` on tensors: max-abs (binary: mean-abs) per channel, shaped to broadcast, no gradient."""
    kept = channel_axes if spec.per_channel else ()
    reduced = [axis for axis in range(len(weights.shape)) if axis not in kept]
    reduce = tf.reduce_mean if spec.is_binary else tf.reduce_max
    largest = reduce(tf.abs(tf.stop_gradient(weights)), axis=reduced, keepdims=True)
    zeros = float(numerics.size_of_zeros(spec))
    return quotient(tf.where(largest > numerics.SMALLEST_WEIGHT, largest, zeros), spec.qmax)


def quantize_weights(weights, channel_axes: tuple[int, ...], spec: QuantSpec, ratio=None):
    """Weight integers (as float32 values) and their scales; the gradient of `integers * scales` is the identity.

    Args:
        ratio: the scales' share of `weight_scales`, shaped like them; None is 1, where no weight saturates.
    """
    scales = weight_scales(weights, channel_axes, spec)
    if ratio is not None:
        scales = product(scales, ratio)
    scaled = weights / scales
    return straight_through(round_weights(scaled, spec), scaled), scales


def fake_quantize_weights(weights, channel_axes: tuple[int, ...], spec: QuantSpec, ratio=None, estimator="clipped"):
    """Weights snapped to their grid, for training; a `ratio` that is trained gets its gradient."""
    if ratio is None and estimator != "soft":  # nothing saturates, and nothing is learned
        integers, scales = quantize_weights(weights, channel_axes, spec)
        return integers * scales
    scales = weight_scales(weights, channel_axes, spec)
    if ratio is not None:
        count = int(np.prod(weights.shape)) // int(np.prod(scales.shape))
        scales = scales * scale_gradient(ratio, step_gradient_factor(count, spec.qmax))
    bounds = (float(spec.qmin), float(spec.qmax))
    clips = [bound * scales for bound in bounds]
    distance = 2.0 if spec.is_binary else 1.0
    return fake_quantize(
        weights, scales, bounds, clips, estimator, lambda scaled: round_weights(scaled, spec), distance
    )


def round_weights(scaled, spec: QuantSpec):
    """The integers nearest to weights in units of their scale; of binary ones the signs."""
    if spec.is_binary:
        return tf.where(scaled < 0, -1.0, 1.0)
    return tf.clip_by_value(tf.round(scaled), spec.qmin, spec.qmax)


def _fake_quantize_rectified(x, high, bits: int):
    """x snapped to the grid of [0, high]; its gradient passes in 0 < x <= high, as behind a ReLU."""

    @tf.custom_gradient
    def quantize(x, high):
        def gradient(upstream):
            # ReLU6's gradient is a mask in one pass over x. A hair below 6, so that `high` itself passes.
            features = x * (6.0 * (1.0 - 2e-7) / high)
            return tf.raw_ops.Relu6Grad(gradients=upstream, features=features), None

        return tf.quantization.fake_quant_with_min_max_vars(x, 0.0, high, num_bits=bits), gradient

    return quantize(x, high)


def _range_of_all_replicas(batch):
    """The range of the whole batch, float32 [2], where several replicas have parts of it; the same on each."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return batch
    ranges = replica.all_gather(batch[tf.newaxis], axis=0)
    return tf.stack([tf.reduce_min(ranges[:, 0]), tf.reduce_max(ranges[:, 1])])


@keras.saving.register_keras_serializable("mobileqat")
class FakeQuantize(keras.layers.Layer):
    """The grid of a group of activation tensors that share scale and zero point.

    Each observed tensor ("member") has a moving range of its own; the grid holds all of them.  Without members the
    parameters are `fixed`.

    Args:
        spec: bits and symmetry of the grid.
        members: names of the observed tensors.
        fixed: `(scale, zero_point)` that a kernel prescribes.
        pinned: `(minimum, maximum)` known beforehand, which no data changes.
        ema_decay: decay of the moving average per training step.
        learns_range: whether the ends of the range are trained, from where calibration left them.
    """

    def __init__(
        self, spec: QuantSpec, members=(), fixed=None, pinned=None, ema_decay=0.99, learns_range=False, **kwargs
    ):
        # Grids need float32 whatever the policy (mixed precision).
        super().__init__(**(kwargs | {"dtype": "float32"}))
        if not members and fixed is None and pinned is None:
            raise ValueError("FakeQuantize needs observed members, fixed parameters or a pinned range.")
        self.spec = spec
        self.members = tuple(members)
        self.fixed = fixed
        self.pinned = pinned
        self.ema_decay = ema_decay
        # Python attributes, so that what is frozen costs nothing; `schedule.Schedule` sets them and retraces.
        self.observing = True
        self.quantizing = True
        self.estimator = "clipped"
        self.supports_jit = True
        if self.is_learned:
            # All replicas assign the same values, see `observe`.
            float32 = {"dtype": "float32", "trainable": False, "autocast": False, "aggregation": "only_first_replica"}
            count = len(self.members)
            self.range_sum = self.add_weight(name="range_sum", shape=(count, 2), initializer="zeros", **float32)
            self.range_weight = self.add_weight(name="range_weight", shape=(count,), initializer="zeros", **float32)
        self.learns_range = learns_range and self.is_learned
        if self.learns_range:  # of the ends, in units of the calibrated width
            self.range_shift = self.add_weight(
                name="range_shift", shape=(2,), initializer="zeros", dtype="float32", autocast=False
            )
        self.built = True

    @property
    def is_learned(self) -> bool:
        """Whether the range comes from data, by observation or training."""
        return self.fixed is None and self.pinned is None

    def ranges(self) -> np.ndarray:
        """Current `[minimum, maximum]` per member, float32 (members, 2); NaN where nothing was observed yet."""
        if self.pinned is not None:
            return np.array([self.pinned], np.float32)
        if self.fixed is not None:
            scale, zero_point = self.fixed
            bounds = [scale * (self.spec.qmin - zero_point), scale * (self.spec.qmax - zero_point)]
            return np.array([bounds], np.float32)
        weight = ops.convert_to_numpy(self.range_weight)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            ranges = np.where(weight > 0, ops.convert_to_numpy(self.range_sum) / weight, np.float32("nan"))
        if self.learns_range and np.isfinite(ranges).all():
            return np.array([[float(bound) for bound in self.bounds()]] * len(ranges), np.float32)
        return ranges

    def set_range(self, member: str, minimum: float, maximum: float) -> None:
        """Starts a member's moving average at a calibrated range."""
        row = self.members.index(member)
        total, weight = (ops.convert_to_numpy(v).copy() for v in (self.range_sum, self.range_weight))
        total[row], weight[row] = (minimum, maximum), 1.0
        self.range_sum.assign(total)
        self.range_weight.assign(weight)
        if self.learns_range:
            self.range_shift.assign([0.0, 0.0])

    def inference_parameters(self):
        """`parameters`, computed once in each traced graph: every reader of a tensor asks for them."""
        if tf.executing_eagerly():
            return self.parameters()
        # Kept by the graph, so that both are let go together.
        graph = tf.compat.v1.get_default_graph()
        if not hasattr(graph, "mobileqat_grids"):
            graph.mobileqat_grids = {}
        if id(self) not in graph.mobileqat_grids:
            graph.mobileqat_grids[id(self)] = self, self.parameters()
        return graph.mobileqat_grids[id(self)][1]

    def parameters(self):
        """Scale and zero point as float32 scalars; the same arithmetic as `numerics.quantization_parameters`."""
        if self.fixed is not None:
            return tf.constant(self.fixed[0], tf.float32), tf.constant(float(self.fixed[1]), tf.float32)
        if self.pinned is not None:
            scale, zero_point = numerics.quantization_parameters(*self.pinned, self.spec)
            return tf.constant(scale, tf.float32), tf.constant(float(zero_point), tf.float32)
        low, high = self.bounds()
        smallest = float(numerics.smallest_scale(self.spec))
        if self.spec.symmetric:
            return tf.maximum(quotient(tf.maximum(-low, high), self.spec.qmax), smallest), tf.constant(0.0)
        scale = tf.maximum(quotient(high - low, self.spec.qmax - self.spec.qmin), smallest)
        zero_point = tf.round(float(self.spec.qmin) - quotient(low, scale))
        return scale, tf.clip_by_value(zero_point, float(self.spec.qmin), float(self.spec.qmax))

    def _training_parameters(self):
        """`parameters`; of a frozen range as constants of the step that is traced, in which it then costs nothing."""
        if self.observing or self.learns_range:
            return self.parameters()
        with tf.init_scope():
            values = [ops.convert_to_numpy(value) for value in self.parameters()]
        return tuple(tf.constant(value, tf.float32) for value in values)

    def bounds(self, gradient_factor: float = 1.0):
        """The range of the group before it is nudged, float32 scalars around 0; trained ends have gradients."""
        weight = tf.convert_to_tensor(self.range_weight)[:, None]
        ranges = quotient(self.range_sum, tf.where(weight > 0, weight, 1.0))
        low = tf.minimum(tf.reduce_min(ranges[:, 0]), 0.0)
        high = tf.maximum(tf.reduce_max(ranges[:, 1]), 0.0)
        if not self.learns_range:
            return low, high
        shift = scale_gradient(tf.convert_to_tensor(self.range_shift), gradient_factor) * (high - low)
        # An end at 0 stays: what is never negative, after a ReLU, has no use for negative integers.
        return tf.where(low < 0, tf.minimum(low + shift[0], 0.0), 0.0), tf.maximum(high + shift[1], 0.0)

    def grid(self) -> tuple[np.float32, int]:
        """Scale and zero point as the file stores them."""
        scale, zero_point = (ops.convert_to_numpy(value) for value in self.parameters())
        return np.float32(scale), int(zero_point)

    def ends(self) -> tuple[float, float]:
        """Real values of the first and the last integer of the grid."""
        scale, zero_point = self.grid()
        return float(scale) * (self.spec.qmin - zero_point), float(scale) * (self.spec.qmax - zero_point)

    def observe(self, x, member: str, ema_decay: float | None = None) -> None:
        """Moves a member's range towards the range of this batch, by the layer's `ema_decay` or another."""
        self._move(tf.reduce_min(x), tf.reduce_max(x), member, ema_decay)

    def _move(self, low, high, member: str, ema_decay: float | None = None) -> None:
        row = self.members.index(member)
        batch = _range_of_all_replicas(tf.stack([low, high]))
        decay = self.ema_decay if ema_decay is None else ema_decay
        if len(self.members) == 1:
            self.range_sum.assign(self.range_sum * decay + (1.0 - decay) * batch)
            self.range_weight.assign(self.range_weight * decay + (1.0 - decay))
            return
        decay = tf.one_hot(row, len(self.members)) * (decay - 1.0) + 1.0
        self.range_sum.assign(self.range_sum * decay[:, None] + (1.0 - decay)[:, None] * batch)
        self.range_weight.assign(self.range_weight * decay + (1.0 - decay))

    def call(self, inputs, member: str | None = None, training=None, ema_decay: float | None = None):
        """Fake-quantizes `inputs` of any shape to float32; observes them first when training an observed member."""
        x = tf.cast(inputs, tf.float32)
        is_member = member is not None and member in self.members
        if training and self.trainable and self.observing and self.is_learned and not self.learns_range and is_member:
            self.observe(tf.stop_gradient(x), str(member), ema_decay)
        if not training:
            return self.snap(x, *self.inference_parameters())
        if self.quantizing:
            return self._train(x)
        if self.learns_range:
            self.add_loss(no_loss(self.range_shift))
        return x

    def rectifies(self, ceiling: float) -> bool:
        """Whether the grid clips at 0 and not beyond `ceiling`, so that `rectify` can stand for a ReLU and `call`."""
        is_plain = self.quantizing and self.estimator == "clipped" and not self.spec.symmetric
        if not (is_plain and self.is_learned and not self.learns_range and len(self.members) == 1):
            return False
        with tf.init_scope():
            low, high = (float(bound) for bound in self.bounds())
        return low == 0.0 and high <= ceiling  # of what a ReLU gives, always; of ranges that were set, perhaps not

    def rectify(self, x, member: str, ceiling: float):
        """What `call` gives for min(max(x, 0), ceiling) in training, in half the passes over the activations.

        To be asked only where `rectifies(ceiling)`, in the step that is traced.
        """
        if self.trainable and self.observing:
            self._move(tf.constant(0.0), tf.clip_by_value(tf.reduce_max(x), 0.0, ceiling), member)
        scale, _ = self._training_parameters()
        return _fake_quantize_rectified(x, scale * float(self.spec.qmax - self.spec.qmin), self.spec.bits)

    def _train(self, x):
        scale, zero_point = self._training_parameters()
        low, high = self.spec.qmin - zero_point, self.spec.qmax - zero_point
        if self.learns_range:
            count = int(np.prod([size or 1 for size in x.shape[1:]]))
            clips = self.bounds(step_gradient_factor(count, self.spec.qmax))
            levels = self.spec.qmax - self.spec.qmin if not self.spec.symmetric else 2 * self.spec.qmax
            # The value of the scale with the gradient of the ends, which the smallest scale and the nudge have not.
            width = clips[1] - clips[0] if not self.spec.symmetric else 2.0 * tf.maximum(-clips[0], clips[1])
            scale = straight_through(scale, width / levels)
            return fake_quantize(x, scale, (low, high), clips, self.estimator)
        if self.estimator != "clipped":
            return fake_quantize(x, scale, (low, high), (low * scale, high * scale), self.estimator)
        return tf.quantization.fake_quant_with_min_max_vars(
            x, scale * low, scale * high, num_bits=self.spec.bits, narrow_range=self.spec.qmin == -self.spec.qmax
        )

    def snap(self, x, scale, zero_point):
        """Rounds half away from zero like the runtime's QUANTIZE; gradients pass inside the range."""
        scaled = tf.clip_by_value(x / scale, self.spec.qmin - zero_point, self.spec.qmax - zero_point)
        return straight_through(round_half_away(scaled), scaled) * scale

    def compute_output_shape(self, input_shape, **kwargs):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "spec": vars(self.spec),
            "members": list(self.members),
            "fixed": self.fixed,
            "pinned": self.pinned,
            "ema_decay": self.ema_decay,
            "learns_range": self.learns_range,
        }

    @classmethod
    def from_config(cls, config):
        spec = QuantSpec(**config["spec"])
        pairs = {key: config[key] and tuple(config[key]) for key in ("fixed", "pinned")}
        return cls(**(config | {"spec": spec} | pairs))
