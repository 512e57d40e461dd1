"""The pictures of docs/how-qat-works.md, drawn from the project's own arithmetic.

    python docs/pictures.py             # writes docs/images/*.svg
    python docs/pictures.py FOLDER      # writes them elsewhere

Every value in them comes from `mobileqat.numerics` or `mobileqat.fakequant`, none is drawn by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mobileqat import fakequant, numerics
from mobileqat.schemes import SCHEMES, QuantSpec

IMAGES = Path(__file__).parent / "images"
STEPS = 40  # of the toy training
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#b8560f", "#2f7d3b", "#77808a"
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "mobileqat",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "legend.frameon": False,
}


def figure(columns: int, width: float = 8.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    drawing = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return drawing, list(np.atleast_1d(drawing.subplots(1, columns)))


def staircase() -> Figure:
    """A 3-bit grid: what is rounded to what, and the error that is left."""
    spec = QuantSpec(3)
    scale, zero_point = numerics.quantization_parameters(-1.0, 2.5, spec)
    x = np.linspace(-2, 3.5, 2201, dtype=np.float32)
    y = numerics.dequantize(numerics.quantize(x, scale, zero_point, spec), scale, zero_point)
    drawing, (left, right) = figure(2)
    left.plot(x, x, color=GREY, linewidth=1, label="x")
    left.plot(x, y, color=BLUE, linewidth=1.8, label="snapped to the grid")
    left.set(xlabel="x", title=f"Eight integers, scale {scale:g}, zero point {zero_point}")
    left.legend()
    right.plot(x, y - x, color=ORANGE, linewidth=1.2)
    for end, place in ((scale * (spec.qmin - zero_point), "right"), (scale * (spec.qmax - zero_point), "left")):
        right.axvline(end, color=GREY, linewidth=0.8, linestyle="--")
        right.text(end, 0.92, " saturates ", ha=place, color=GREY, transform=right.get_xaxis_transform())
    right.set(xlabel="x", title="Error: half a step inside, growing outside")
    return drawing


def nudge() -> Figure:
    """The range [-0.9, 1.0] before and after it is moved so that an integer stands for 0.0."""
    spec = QuantSpec(3)
    low, high = -0.9, 1.0
    scale, zero_point = numerics.quantization_parameters(low, high, spec)
    integers = np.arange(spec.qmin, spec.qmax + 1)
    asked = np.linspace(low, high, len(integers))
    used = numerics.dequantize(integers, scale, zero_point)
    drawing, (axes,) = figure(1, height=2.2)
    for values, height, color in ((asked, 1.0, GREY), (used, 0.0, BLUE)):
        axes.plot(values, np.full(len(values), height), "o-", color=color)
    for value, integer in zip(used, integers, strict=True):
        axes.annotate(str(integer), (value, 0), (0, -15), textcoords="offset points", ha="center", color=BLUE)
    axes.axvline(0, color=ORANGE, linewidth=1)
    axes.set(
        yticks=[0, 1], yticklabels=["nudged: an integer is 0.0", "as asked: 0.0 falls between two"], xlabel="real value"
    )
    axes.set_ylim(-0.7, 1.4)
    axes.spines["left"].set_visible(False)
    return drawing


def gradients() -> Figure:
    """Forward and backward of `fakequant.fake_quantize`, for each estimator."""
    bounds, scale = (-3.0, 3.0), 0.5
    x = tf.constant(np.linspace(-2.4, 2.4, 1921, dtype=np.float32))
    drawing, (left, right) = figure(2)
    colors = {"clipped": BLUE, "identity": GREEN, "soft": ORANGE}
    for estimator in fakequant.ESTIMATORS:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = fakequant.fake_quantize(x, scale, bounds, [bound * scale for bound in bounds], estimator)
        slope = tape.gradient(y, x)
        right.plot(x, slope, color=colors[estimator], linewidth=1.5, label=estimator)
    left.plot(x, y, color=BLUE, linewidth=1.8)
    left.set(xlabel="x", title="Forward: the step function")
    right.set(xlabel="x", ylim=(-0.1, 1.9), title="Backward: the slope that stands in for it")
    right.legend(loc="upper center", ncols=3, columnspacing=0.8, handlelength=1.0, fontsize=8)
    return drawing


def toy_training() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Six weights with 3 bits, fitted to a linear target with fake quantization.

    Returns:
        master and snapped weights at every step (steps, 6), the target (6,), and the loss at every step.
    """
    spec = QuantSpec(3, symmetric=True, per_channel=True)
    rng = np.random.default_rng(3)
    # Inputs that correlate: an error of one weight can be made good by another.
    x = rng.normal(size=(512, 1)) + 0.4 * rng.normal(size=(512, 6))
    # In steps of 0.3 these are 3, 1.4, 1.43, 0.4, 0.43 and -1.57: to nearest, five of them are rounded down.
    target = np.array([0.9, 0.42, 0.43, 0.12, 0.13, -0.47], np.float32)
    x, y = tf.constant(x, tf.float32), tf.constant(x @ target, tf.float32)
    weights = tf.Variable(target[:, None])
    masters, snapped, losses = [], [], []
    for step in range(STEPS):
        with tf.GradientTape() as tape:
            kernel = fakequant.fake_quantize_weights(weights, (1,), spec)
            loss = tf.reduce_mean((tf.matmul(x, kernel)[:, 0] - y) ** 2)
        masters.append(weights.numpy()[:, 0])
        snapped.append(kernel.numpy()[:, 0])
        losses.append(float(loss))
        weights.assign_sub(0.004 * (1 - step / STEPS) * tape.gradient(loss, weights))
    return np.array(masters), np.array(snapped), target, losses


def training() -> Figure:
    """Master weights move under the grid until the snapped ones fit the task better."""
    masters, snapped, target, losses = toy_training()
    drawing, (left, right) = figure(2)
    shown = [index for index in range(len(target)) if len(np.unique(np.rint(snapped[:, index] / 0.3))) > 1]
    for index, color in zip(shown, (BLUE, GREEN, ORANGE), strict=False):
        left.plot(masters[:, index], color=color, linewidth=1, linestyle="--")
        left.plot(snapped[:, index], color=color, linewidth=1.8)
    left.set(xlabel="step", title="Master weights (dashed), snapped (solid)")
    right.plot(losses, color=BLUE)
    right.axhline(losses[0], color=GREY, linewidth=0.8, linestyle="--")
    right.text(len(losses), losses[0], "rounding to nearest (PTQ)", ha="right", va="bottom", color=GREY)
    right.set(xlabel="step", ylim=(0, losses[0] * 1.25), title="Loss of the snapped weights")
    return drawing


def clipping_errors(bits: int, values: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Mean squared error of quantizing `values` in [-clip, clip], for each clip."""
    spec = QuantSpec(bits)
    errors = []
    for clip in clips:
        grid = numerics.quantization_parameters(-clip, clip, spec)
        snapped = numerics.dequantize(numerics.quantize(values, *grid, spec), *grid)
        errors.append(float(np.mean((snapped - values) ** 2)))
    return np.array(errors)


def ranges() -> Figure:
    """Why the widest range is not the best one when bits are few."""
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    clips = np.linspace(0.5, float(np.max(np.abs(values))), 120)
    drawing, (axes,) = figure(1, width=6.5)
    for bits, color in ((8, BLUE), (6, GREEN), (4, ORANGE)):
        errors = clipping_errors(bits, values, clips)
        best = int(np.argmin(errors))
        axes.semilogy(clips, errors, color=color, linewidth=1.5, label=f"{bits} bits, best at {clips[best]:.1f}")
        axes.plot(clips[best], errors[best], "o", color=color)
    axes.set(xlabel="range ends at +- this many standard deviations", ylabel="mean squared error")
    axes.set_title("Clip too much, or round too coarsely: normal values")
    axes.legend(loc="upper right")
    return drawing


def dense_example() -> dict:
    """One output of an int8 dense layer with four inputs, step by step, by the reference arithmetic."""
    scheme = SCHEMES["w8a8"]
    x = np.array([0.2, 1.4, 0.0, 2.3], np.float32)
    weights, bias = np.array([0.31, -0.52, 0.77, 0.4], np.float32), np.float32(0.25)
    s_in, z_in = numerics.quantization_parameters(0.0, 2.5, scheme.activations)
    s_out, z_out = numerics.quantization_parameters(-1.0, 3.0, scheme.activations)
    s_w = numerics.weight_scales(weights[:, None], (1,), scheme.weights)[0, 0]
    q_x = numerics.quantize(x, s_in, z_in, scheme.activations)
    q_w = numerics.quantize(weights, s_w, 0, scheme.weights)
    q_bias = int(np.round(bias / (s_in * s_w)))
    accumulator = int(np.sum((q_x - z_in) * q_w)) + q_bias
    scaled = np.float32(accumulator) * (s_in * s_w / s_out)
    q_out = int(np.clip(np.rint(scaled) + z_out, scheme.activations.qmin, scheme.activations.qmax))
    return {
        "q_x": q_x,
        "q_w": q_w,
        "q_bias": q_bias,
        "accumulator": accumulator,
        "scaled": float(scaled),
        "q_out": q_out,
        "real": float(numerics.dequantize(np.array(q_out), s_out, z_out)),
        "float": float(x @ weights + bias),
        "z_in": z_in,
        "z_out": z_out,
        "multiplier": float(s_in * s_w / s_out),
    }


def kernel() -> Figure:
    """The integer kernel as a chain of boxes, with the numbers of `dense_example`."""
    values = dense_example()
    boxes = (
        ("int8 inputs", f"{[int(v) for v in values['q_x']]}", f"zero point {values['z_in']}"),
        ("int8 weights", f"{[int(v) for v in values['q_w']]}", "zero point 0"),
        ("int32 sum", f"{values['accumulator']}", f"of it bias {values['q_bias']}"),
        ("one product", f"x {values['multiplier']:.6f}", f"= {values['scaled']:.3f}"),
        ("round, add, clamp", f"{values['q_out']}", f"zero point {values['z_out']}"),
        ("it stands for", f"{values['real']:.4f}", f"float: {values['float']:.4f}"),
    )
    drawing, (axes,) = figure(1, width=8, height=2.8)
    axes.set(xlim=(0, 6.3), ylim=(0, 2))
    axes.axis("off")
    for index, (title, value, note) in enumerate(boxes):
        left, bottom = index % 3 * 2.1 + 0.25, 1.1 - index // 3
        color = BLUE if index < 5 else GREY
        box = FancyBboxPatch(
            (left, bottom), 1.7, 0.75, boxstyle="round,pad=0.03", facecolor="#f4f6f8", edgecolor=color, linewidth=1.2
        )
        axes.add_patch(box)
        for text, height, style in ((title, 0.63, {"color": color}), (value, 0.38, {"fontweight": "bold"})):
            axes.text(left + 0.85, bottom + height, text, ha="center", va="center", fontsize=11, **style)
        axes.text(left + 0.85, bottom + 0.13, note, ha="center", va="center", color=GREY, fontsize=10)
        if index:
            sign = "x" if index == 1 else "→"
            axes.text(left - 0.2, bottom + 0.38, sign, ha="center", va="center", color=GREY, fontsize=13)
    return drawing


PICTURES = {
    "staircase": staircase,
    "nudge": nudge,
    "gradients": gradients,
    "training": training,
    "ranges": ranges,
    "kernel": kernel,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            # No date: the same numbers give the same file.
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
