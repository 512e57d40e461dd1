"""Bias correction: puts back the mean that quantization shifts, channel by channel (Nagel et al. 2019, section 4.2).

Rounded weights and clipped activations move the mean of a layer's output.  Measured on samples, before the
activation, layer by layer with the earlier layers corrected already:

    bias += mean(float output) - mean(quantized output)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mobileqat.layerwise import Step, shared_layers, walk
from mobileqat.quantize import QuantizedModel
from mobileqat.wrappers import QuantizeWrapper


@dataclass(frozen=True)
class BiasCorrection:
    """What `correct_bias` did.

    Args:
        shifts: for every corrected operator, what was added to its output, float32 [channels].
        skipped: operators with weights that were left as they are, with the reason.
    """

    shifts: dict[str, np.ndarray]
    skipped: dict[str, str]


def correct_bias(
    model: QuantizedModel, samples: Any, batch_size: int = 64, reference: QuantizedModel | None = None
) -> BiasCorrection:
    """Makes the mean of every weighted operator's output that of the float model, by its bias.

    Args:
        model: calibrated; the biases, or betas of BatchNormalization, change in place.
        samples: calibration data, an array [n, ...], or a list or dict of arrays for several inputs.
        batch_size: samples that run together.
        reference: a twin with the float weights, where `adaround` has moved the model's own.

    Raises:
        CalibrationError: a range is missing, there is no sample, or one is not finite.
        DataError: samples that do not fit the model's inputs.
    """
    shared = shared_layers(model)
    shifts: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for step in walk(model, samples, batch_size, "bias correction", reference):
        operator = step.wrapper.operator
        if step.wrapper.weight_spec is None:
            continue
        variable = _offset_variable(step.wrapper)
        if variable is None:
            skipped[operator.name] = "it has neither a bias nor a BatchNormalization with beta"
        elif operator.name in shared:
            skipped[operator.name] = "its weights serve other operators too"
        else:
            shifts[operator.name] = _shift(step)
            variable.assign(variable + shifts[operator.name])
    return BiasCorrection(shifts, skipped)


def _offset_variable(wrapper: QuantizeWrapper):
    """The variable that is added to the output, [channels]."""
    if wrapper.batch_norm is not None:
        return wrapper.batch_norm.beta if wrapper.batch_norm.center else None
    return wrapper.layer.bias if wrapper.layer.use_bias else None


def _shift(step: Step) -> np.ndarray:
    """Mean of the float output minus that of the quantized one, before the activation, float32 [channels]."""
    real = step.run(partial(step.float_wrapper.linear_call, training=False), step.float_inputs)
    rounded = step.run(partial(step.wrapper.linear_call, training=False, quantized=True), step.inputs)
    return np.asarray(np.mean(real - rounded, axis=tuple(range(real.ndim - 1)), dtype=np.float64), np.float32)
