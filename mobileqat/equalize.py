"""Cross-layer equalization: moves scale between consecutive layers until their ranges agree (Nagel et al. 2019).

ReLU and pooling commute with positive factors per channel, so between two layers with weights

    W1[c] / s[c],  b1[c] / s[c]   and   W2[:, c] * s[c],   s[c] = sqrt(range(W1[c]) / range(W2[:, c]))

compute the same.  With a scale per output channel the ranges of W1 never mattered; what is left to gain is the range of
the activation between the two, which all of its channels share: no bias is raised beyond 8 times the layer's largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mobileqat.errors import ModelError
from mobileqat.layerwise import shared_layers
from mobileqat.plan import Operator
from mobileqat.quantize import QuantizedModel
from mobileqat.rules import GONE
from mobileqat.wrappers import QuantizeWrapper

# Operators that positive factors per channel pass through unchanged.
COMMUTING = (
    *(GONE, "RELU", "LEAKY_RELU", "PAD", "MIRROR_PAD", "MAX_POOL_2D", "AVERAGE_POOL_2D", "MEAN", "RESHAPE"),
    *("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR"),
)


# A channel of tiny weights would be raised until its bias alone makes the range that all channels share.
BIAS_GROWTH = 8.0


@dataclass(frozen=True)
class Pair:
    """Two layers that were equalized, and the smallest and largest factor that the first was divided by."""

    first: str
    second: str
    smallest: float
    largest: float


def equalize(model: QuantizedModel, iterations: int = 20) -> list[Pair]:
    """Equalizes the weights of consecutive layers; the float function stays.

    Args:
        model: made by `quantize_model`; its weights change in place, and the ranges of the tensors that change with
            them are forgotten: calibrate afterwards.
        iterations: how often all pairs are gone through; a depthwise convolution is in two.

    Returns:
        The pairs. Not among them: tensors that several operators read or that leave the model, ReLU6 and other
        functions that are not homogeneous, and layers that serve twice.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"Expected a model made by quantize_model. Received: {type(model).__name__}")
    chains = _chains(model)
    totals: list = [1.0] * len(chains)
    limits = [BIAS_GROWTH * np.abs(first.float_constants()[1]).max() for first, _, _ in chains]
    for _ in range(iterations if chains else 0):
        for index, (first, second, _) in enumerate(chains):
            factors = _factors(first, second, limits[index])
            _scale_output(first, 1 / factors)
            _scale_input(second, factors)
            totals[index] = totals[index] * factors
    for _, _, tensors in chains:
        for name in tensors:
            _forget(model, name)
    return [
        Pair(first.operator.name, second.operator.name, float(np.min(total)), float(np.max(total)))
        for (first, second, _), total in zip(chains, totals, strict=True)
    ]


def _chains(model: QuantizedModel) -> list[tuple[QuantizeWrapper, QuantizeWrapper, list[str]]]:
    """Pairs of layers with nothing between them but commuting operators, and the tensors between them."""
    plan, shared, chains = model.plan, shared_layers(model), []
    readers: dict[str, list[Operator]] = {}
    for operator in plan.operators:
        for name in operator.inputs:
            readers.setdefault(name, []).append(operator)
    for first in model.operators.values():
        if first.weight_spec is None or not _can_scale_output(first):
            continue
        channels, tensors = plan.tensors[first.operator.output].shape[-1], [first.operator.output]
        while _is_between(model, tensors[-1], readers.get(tensors[-1], []), channels):
            tensors.append(readers[tensors[-1]][0].output)
        following = readers.get(tensors[-1], [])
        if len(following) != 1 or tensors[-1] in plan.outputs:
            continue
        second = model.operators[following[0].name]
        if _can_scale_input(second, channels) and not {first.operator.name, second.operator.name} & shared:
            chains.append((first, second, tensors))
    return chains


def _is_between(model: QuantizedModel, tensor: str, readers: list[Operator], channels: int) -> bool:
    """Whether the only reader of a tensor lets factors per channel through."""
    if len(readers) != 1 or tensor in model.plan.outputs or readers[0].kind not in COMMUTING:
        return False
    before, after = (model.plan.tensors[name].shape for name in (tensor, readers[0].output))
    options = getattr(model.operators[readers[0].name].layer, "options", {})
    return after[-1:] == (channels,) and len(before) not in options.get("axes", ())


def _can_scale_output(wrapper: QuantizeWrapper) -> bool:
    bn = wrapper.batch_norm
    return wrapper.operator.fused_activation != "RELU6" and (bn is None or (bn.scale and bn.center))


def _can_scale_input(wrapper: QuantizeWrapper, channels: int) -> bool:
    is_weighted = wrapper.weight_spec is not None and wrapper.prologue is None
    return is_weighted and wrapper.layer.kernel.shape[wrapper.rule.input_axis] == channels


def _factors(first: QuantizeWrapper, second: QuantizeWrapper, limit: float) -> np.ndarray:
    """What the first layer's output is divided by, float32 [channels]; no bias grows beyond the limit."""
    (kernel, bias), (following, _) = first.float_constants(), second.float_constants()
    out = _largest(np.abs(kernel), first.rule.channel_axes)
    into = _largest(np.abs(following), (second.rule.input_axis,))
    is_alive = (out > 0) & (into > 0)
    factors = np.sqrt(np.where(is_alive, out, 1) / np.where(is_alive, into, 1))
    return np.maximum(factors, np.abs(bias) / max(limit, np.finfo(np.float32).tiny)).astype(np.float32)


def _largest(kernel: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    return kernel.max(axis=tuple(axis for axis in range(kernel.ndim) if axis not in kept)).reshape(-1)


def _scale_output(wrapper: QuantizeWrapper, factors: np.ndarray) -> None:
    if (bn := wrapper.batch_norm) is not None:
        bn.gamma.assign(bn.gamma * factors)
        bn.beta.assign(bn.beta * factors)
        return
    kernel, axes = wrapper.layer.kernel, wrapper.rule.channel_axes
    kernel.assign(kernel * factors.reshape([size if axis in axes else 1 for axis, size in enumerate(kernel.shape)]))
    if wrapper.layer.use_bias:
        wrapper.layer.bias.assign(wrapper.layer.bias * factors)


def _scale_input(wrapper: QuantizeWrapper, factors: np.ndarray) -> None:
    kernel = wrapper.layer.kernel
    shape = [-1 if axis == wrapper.rule.input_axis else 1 for axis in range(len(kernel.shape))]
    kernel.assign(kernel * factors.reshape(shape))


def _forget(model: QuantizedModel, tensor: str) -> None:
    """Makes the range of a tensor unknown again."""
    quantizer = model.quantizers.get(tensor)
    if quantizer is not None and tensor in quantizer.members:
        keep = 1.0 - np.eye(len(quantizer.members), dtype=np.float32)[quantizer.members.index(tensor)]
        quantizer.range_sum.assign(quantizer.range_sum * keep[:, None])
        quantizer.range_weight.assign(quantizer.range_weight * keep)
