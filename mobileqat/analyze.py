"""Where a quantized model loses what: layer by layer, in dB and in points of the task's metric, ranked.

For every operator that rounds: the signal-to-quantization-noise ratio of its output (SQNR, 10 log10 of the float
values' power over the error's), the metric with only this operator in integers and with only this one in float, and
what its weights and its range look like on their grids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from mobileqat.calibrate import as_arrays
from mobileqat.errors import ModelError
from mobileqat.fakequant import FakeQuantize
from mobileqat.layerwise import Step, require_twin, walk
from mobileqat.progress import track
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import CONSTANT
from mobileqat.wrappers import QuantizeWrapper, as_float32

Metric = Callable[[np.ndarray], float]

BINS = 64
# Beyond these a figure is worth a sentence.
LOUD_OUTLIERS = 4.0
LARGE_IMBALANCE = 30.0
MUCH_CLIPPED = 0.01
FEW_SAMPLES = 32  # so few say nothing of how values are spread
NOISE_SAMPLES = 2  # a metric that so many samples decide is taken as unchanged


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A kernel on its grid.

    Args:
        bits: of the integers.
        sqnr_db: of the operator's float output with nothing but these weights rounded.
        zeros: share of the weights that round to 0.
        dead_channels: output channels whose weights are all 0.
        channels: how many there are.
        histogram: of the integers.
    """

    bits: int
    sqnr_db: float
    zeros: float
    dead_channels: tuple[int, ...]
    channels: int
    histogram: Histogram


@dataclass(frozen=True)
class Activations:
    """An output's float values beside its grid.

    Args:
        low, high: ends of the grid, real values.
        scale, zero_point: of the grid.
        clipped: share of the values beyond the grid.
        outliers: width of the grid over the width of the central 99.9 % of the values; zero belongs to both.
        imbalance: widest range of a channel over the median one.
        dead_channels: channels that have the same value for every sample and place.
        channels: how many there are.
        is_own: whether the range is observed here, not fixed by the kernel or shared with the input.
        histogram: of the float values.
    """

    low: float
    high: float
    scale: float
    zero_point: int
    clipped: float
    outliers: float
    imbalance: float
    dead_channels: tuple[int, ...]
    channels: int
    is_own: bool
    histogram: Histogram


@dataclass(frozen=True)
class Layer:
    """One operator.

    Args:
        name: path of the layer that leads it.
        kind: LiteRT operator.
        sqnr_db: of its output with the whole model quantized: noise from before is in it.
        own_sqnr_db: of its output with float values, rounded to their grids, as inputs.
        channel_sqnr_db: the same of the median channel: noise that one wide channel drowns in the sum.
        only: the metric with this operator in integers and all others in float; None without a metric.
        without: the metric with this operator in float and all others in integers.
        weights: None for an operator without a kernel.
        activations: of its output.
        advice: what to try, a sentence each.
    """

    name: str
    kind: str
    sqnr_db: float
    own_sqnr_db: float
    channel_sqnr_db: float
    only: float | None
    without: float | None
    weights: Weights | None
    activations: Activations
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """A model's layers, the ones that cost most first.

    Args:
        model: its name.
        samples: how many it was run on.
        float_metric, quantized_metric: of the whole model; None without a metric.
        layers: ranked.
        recommendation: what to do first, in one or two sentences.
    """

    model: str
    samples: int
    float_metric: float | None
    quantized_metric: float | None
    layers: tuple[Layer, ...]
    recommendation: str

    def to_dict(self) -> dict:
        return asdict(self)


def analyze(
    model: QuantizedModel,
    samples: Any,
    metric: Metric | None = None,
    batch_size: int = 64,
    reference: QuantizedModel | None = None,
) -> Analysis:
    """Measures what each operator of a quantized model costs.

    Args:
        model: calibrated or trained.
        samples: an array [n, ...], or a list or dict of arrays for several inputs; not the ones it was calibrated on.
        metric: of the model's first output on the samples, an array [n, ...]; more is better.
        batch_size: samples that run together.
        reference: a twin of `model` whose weights count as float: the model as it was calibrated, before AdaRound moved
            its weights onto their grid. None takes the model's own weights.

    Raises:
        ModelError: not a quantized model, or a reference that is no twin of it.
        CalibrationError: a range is missing, there is no sample, or one is not finite.
        DataError: samples that do not fit the model's inputs.
    """
    steps = walk(model, samples, batch_size, reference=reference)
    layers = [_measure(step, model) for step in steps if is_switchable(model, step.wrapper)]
    float_metric = quantized_metric = None
    if metric is not None:
        switched = SwitchedModel(model, reference=reference)

        def score(choices: dict[str, int]) -> float:
            return metric(switched.predict(samples, choices, batch_size))

        all_integer = dict.fromkeys(switched.operators, 1)
        float_metric, quantized_metric = score({}), score(all_integer)
        for index, layer in enumerate(track(layers, "one layer at a time", "layers")):
            only, without = score({layer.name: 1}), score(all_integer | {layer.name: 0})
            layers[index] = Layer(**vars(layer) | {"only": only, "without": without})
    count = len(as_arrays(model, samples)[0])
    layers = [Layer(**vars(layer) | {"advice": tuple(_advice(layer, count))}) for layer in layers]
    noise = NOISE_SAMPLES / count
    ranked = tuple(sorted(layers, key=partial(_rank, float_metric, noise)))
    recommendation = _recommend(ranked, float_metric, quantized_metric, noise)
    return Analysis(model.name, count, float_metric, quantized_metric, ranked, recommendation)


def is_switchable(model: QuantizedModel, wrapper: QuantizeWrapper) -> bool:
    """Whether an operator computes in integers and rounds; others only move values."""
    operator = wrapper.operator
    is_real = model.plan.tensors[operator.output].spec is not None
    return operator.quantized and is_real and wrapper.rounds and operator.kind != CONSTANT


class SwitchedModel:
    """Quantized twins of one float model, as one function whose operators are chosen anew at every call.

    A choice is 0 for float, 1 for the first model's integers, 2 for the second's.  The graph is traced once.  Float
    is with the weights of `reference`, by default of the first model.

    Attributes:
        operators: names of those that can be chosen.
    """

    def __init__(self, *models: QuantizedModel, reference: QuantizedModel | None = None):
        if not models or not all(isinstance(model, QuantizedModel) for model in models):
            raise ModelError("Expected models made by quantize_model.")
        self.models = models
        self.reference = models[0] if reference is None else require_twin(models[0], reference)
        plan = models[0].plan
        wrappers = models[0].operators
        self.operators = [name for name, wrapper in wrappers.items() if is_switchable(models[0], wrapper)]
        signature = [tf.TensorSpec((None, *plan.tensors[n].shape), plan.tensors[n].dtype) for n in plan.inputs]
        choices = tf.TensorSpec((len(self.operators),), tf.int32)
        self._run = tf.function(self._forward, input_signature=[choices, *signature], autograph=False)

    def predict(self, samples: Any, choices: Mapping[str, int], batch_size: int = 64) -> np.ndarray:
        """The first output for all samples; operators without a choice are in float."""
        return self.predict_all(samples, choices, batch_size)[0]

    def predict_all(self, samples: Any, choices: Mapping[str, int], batch_size: int = 64) -> list[np.ndarray]:
        """Every output, as `predict` does the first one."""
        vector = tf.constant([choices.get(name, 0) for name in self.operators], tf.int32)
        arrays = as_arrays(self.models[0], samples)
        starts = range(0, len(arrays[0]), batch_size)
        batches = [self._run(vector, *(a[s : s + batch_size] for a in arrays)) for s in starts]
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    def _forward(self, choices, *inputs):
        plan = self.models[0].plan
        values = dict(zip(plan.inputs, inputs, strict=True))
        for operator in plan.operators:
            arguments = [values[name] for name in operator.inputs] or [inputs[0]]
            branches = [partial(_in_float, self.reference.operators[operator.name], arguments)]
            if operator.name in self.operators:
                branches += [partial(_in_integers, model.operators[operator.name], arguments) for model in self.models]
                choice = choices[self.operators.index(operator.name)]
                values[operator.output] = tf.switch_case(choice, branches)
            else:
                values[operator.output] = branches[0]()
        return [values[name] for name in plan.outputs]


def _in_float(wrapper: QuantizeWrapper, inputs):
    return as_float32(wrapper.float_call(inputs if len(inputs) > 1 else inputs[0], training=False))


def _in_integers(wrapper: QuantizeWrapper, inputs):
    """An operator in integers on any inputs: what a float operator made is rounded first."""
    quantizers = wrapper.input_quantizers
    inputs = [x if q is None else q(x, training=False) for x, q in zip(inputs, quantizers, strict=True)]
    return wrapper(inputs if len(inputs) > 1 else inputs[0], training=False)


# ------------------------------------------------------------------ one layer


def _measure(step: Step, model: QuantizedModel) -> Layer:
    wrapper, real = step.wrapper, step.float_output
    own = step.run(lambda x: _in_integers(wrapper, x if isinstance(x, list) else [x]), step.float_inputs)
    sqnr = sqnr_db(real, step.run(wrapper, step.inputs))
    if real.ndim == 1 and model.plan.tensors[wrapper.operator.output].has_batch:
        real, own = real[:, None], own[:, None]  # a number per sample is one channel
    return Layer(
        wrapper.operator.name,
        wrapper.operator.kind,
        sqnr,
        sqnr_db(real, own),
        _channel_sqnr_db(real, own),
        None,
        None,
        _weights(step) if wrapper.weight_spec is not None else None,
        _activations(real, model.quantizers[wrapper.operator.output], wrapper.operator.output),
    )


def sqnr_db(real: np.ndarray, rounded: np.ndarray) -> float:
    """Power of the values over the power of the error, in dB, at most 200."""
    noise = float(np.mean(np.square(real - rounded), dtype=np.float64))
    signal = float(np.mean(np.square(real), dtype=np.float64))
    return 10.0 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-20 * signal, 1e-30)))


def _channel_sqnr_db(real: np.ndarray, rounded: np.ndarray) -> float:
    """SQNR of the median one of the channels that are not 0 throughout."""
    channels = real.shape[-1]
    ratios = [
        sqnr_db(real[..., channel], rounded[..., channel]) for channel in range(channels) if np.any(real[..., channel])
    ]
    return float(np.median(ratios)) if ratios else sqnr_db(real, rounded)


def _weights(step: Step) -> Weights:
    wrapper, spec = step.wrapper, step.wrapper.weight_spec
    assert spec is not None
    integers = wrapper.folded(wrapper.input_scale())[0].numpy()
    axes = tuple(axis for axis in range(integers.ndim) if axis not in wrapper.rule.channel_axes)
    is_dead = ~np.any(integers, axis=axes).reshape(-1)
    rounded = step.run(partial(wrapper.float_call, training=False, quantized=True), step.float_inputs)
    counts = np.bincount(integers.astype(np.int64).ravel() - spec.qmin, minlength=spec.qmax - spec.qmin + 1)
    histogram = Histogram(float(spec.qmin), float(spec.qmax), tuple(counts.tolist()))
    dead = tuple(np.flatnonzero(is_dead).tolist())
    sqnr = sqnr_db(step.float_output, rounded)
    return Weights(spec.bits, sqnr, float(np.mean(integers == 0)), dead, len(is_dead), histogram)


def _activations(real: np.ndarray, quantizer: FakeQuantize, name: str) -> Activations:
    scale, zero_point = quantizer.grid()
    low, high = (float(scale) * (bound - zero_point) for bound in (quantizer.spec.qmin, quantizer.spec.qmax))
    # A million of the values tell; an odd step meets every channel.
    central = np.quantile(real.ravel()[:: real.size // 1_000_000 | 1], [0.0005, 0.9995])
    width = max(central[1], 0.0) - min(central[0], 0.0)
    channels = real.reshape(-1, real.shape[-1])
    spans = channels.max(0) - channels.min(0)
    alive = spans[spans > 0]
    counts, edges = np.histogram(real.astype(np.float64), BINS)  # float32 may have fewer values in a narrow range
    return Activations(
        low,
        high,
        float(scale),
        zero_point,
        float(np.mean((real < low - scale / 2) | (real > high + scale / 2))),
        (high - low) / max(float(width), float(scale)),
        float(alive.max() / np.median(alive)) if len(alive) else 1.0,
        tuple(np.flatnonzero(spans == 0).tolist()),
        len(spans),
        quantizer.is_learned and name in quantizer.members,
        Histogram(float(edges[0]), float(edges[-1]), tuple(counts.tolist())),
    )


# ------------------------------------------------------------------ in words


def _rank(float_metric: float | None, noise: float, layer: Layer) -> tuple[float, float]:
    """By the metric where it tells, then by the SQNR."""
    loss = float_metric - layer.only if float_metric is not None and layer.only is not None else 0.0
    return -loss if loss > noise else 0.0, min(layer.own_sqnr_db, layer.channel_sqnr_db)


def _advice(layer: Layer, samples: int) -> list[str]:
    values, weights, advice = layer.activations, layer.weights, []
    is_telling = samples >= FEW_SAMPLES
    # A range that a kernel fixes, or that comes from the input, is not this layer's to change.
    if is_telling and values.outliers > LOUD_OUTLIERS and values.is_own:
        share = f"{1 / values.outliers:.0%}"
        advice.append(f"outliers: 99.9 % of the values take {share} of the grid; calibrate with percentile or mse")
    if values.clipped > MUCH_CLIPPED and values.is_own:
        advice.append(f"clipped: {values.clipped:.1%} of the values lie beyond the grid; calibrate on other data")
    if is_telling and values.imbalance > LARGE_IMBALANCE:
        advice.append(f"the widest channel has {values.imbalance:.0f} times the usual range; try equalize")
    if weights is not None and weights.bits < 8 and weights.sqnr_db < layer.own_sqnr_db + 3:
        if weights.bits == 1:  # signs have no rounding to learn
            advice.append(f"signs alone are coarse for its weights ({weights.sqnr_db:.1f} dB); take more bits")
        else:
            few = f"{weights.bits} bits are few for its weights ({weights.sqnr_db:.1f} dB)"
            advice.append(f"{few}; take more, or learn their rounding (adaround) where that is off")
    if is_telling and values.dead_channels and values.channels > 1:
        dead = len(values.dead_channels)
        advice.append(f"{dead} of {values.channels} channels never change; they can be pruned")
    return advice


def _recommend(
    layers: tuple[Layer, ...], float_metric: float | None, quantized_metric: float | None, noise: float
) -> str:
    if not layers:
        return "No operator rounds: there is nothing to analyze."
    worst = layers[0]
    if float_metric is None or quantized_metric is None:
        text = f"'{worst.name}' adds the most noise: {worst.own_sqnr_db:.1f} dB."
        return " ".join([text, *map(_sentence, worst.advice[:1])])
    loss = float_metric - quantized_metric
    if loss <= noise:
        return "Quantization costs nothing that these samples show: there is nothing to repair."
    # A table of integers has no float operator that could take its place.
    best = max(layers, key=lambda layer: 0.0 if layer.kind == "TABLE" else layer.without or 0.0)
    gain = (best.without or 0.0) - quantized_metric if best.kind != "TABLE" else 0.0
    text = f"Quantization costs {100 * loss:.2f} points."
    alone = float_metric - (worst.only or 0.0)
    if gain <= noise and alone > noise and worst.advice:
        return " ".join([f"{text} '{worst.name}' alone costs {100 * alone:.2f}.", _sentence(worst.advice[0])])
    if gain <= noise:
        return f"{text} No single layer is to blame: fine-tune with QAT, or try adaround and correct_bias."
    text += f" With '{best.name}' alone in float {100 * gain:.2f} of them come back."
    return " ".join([text, *map(_sentence, best.advice[:1] or [f"exclude it: quantize.exclude [{best.name}]"])])


def _sentence(advice: str) -> str:
    return f"{advice[0].upper()}{advice[1:]}."
