"""A Keras 3 model rebuilt in Keras 2, which TFMOT needs: `python twin.py FOLDER` in a process with `tf_keras`.

`describe` (Keras 3) leaves FOLDER/twin.json, layers with their inputs, and FOLDER/twin.npz, their weights and outputs
for a few samples; the script (Keras 2) makes FOLDER/twin.h5 of them and compares the outputs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# What Keras 2 takes of each layer's configuration.
CONVOLUTION = ("strides", "padding", "use_bias")
TAKEN: dict[str, tuple[str, ...]] = {
    "Activation": ("activation",),
    "Add": (),
    "AveragePooling2D": ("pool_size", "strides", "padding"),
    "BatchNormalization": ("epsilon", "momentum", "scale", "center"),
    "Conv2D": ("filters", "kernel_size", "activation", *CONVOLUTION),
    "Dense": ("units", "activation", "use_bias"),
    "DepthwiseConv2D": ("kernel_size", "depth_multiplier", "activation", *CONVOLUTION),
    "Dropout": ("rate",),
    "Flatten": (),
    "GlobalAveragePooling2D": ("keepdims",),
    "Multiply": (),
    "ReLU": ("max_value",),
}
SAMPLES = 8
TOLERANCE = 1e-3


def describe(model, folder: Path, samples: np.ndarray, scale: float) -> None:
    """Writes what the script needs.

    Args:
        model: a Keras 3 model made of the layers in `TAKEN`.
        folder: where to.
        samples: of the data, unscaled.
        scale: the twin takes samples divided by it: its first kernel is multiplied instead.

    Raises:
        NotImplementedError: a layer that Keras 2 is not given here.
    """
    rows, arrays = [], {"samples": samples[:SAMPLES], "outputs": model.predict(samples[:SAMPLES], verbose=0)}
    scaled = False
    for layer in model.layers:
        kind, config = type(layer).__name__, layer.get_config()
        if kind == "InputLayer":
            rows.append({"name": layer.name, "kind": kind, "shape": list(layer.batch_shape[1:])})
            continue
        if kind not in TAKEN:
            raise NotImplementedError(f"layer '{layer.name}' of class {kind} has no counterpart in the Keras 2 twin")
        inputs = [tensor._keras_history.operation.name for tensor in layer._inbound_nodes[0].input_tensors]
        taken = {key: config[key] for key in TAKEN[kind]}
        rows.append({"name": layer.name, "kind": kind, "config": taken, "inputs": inputs})
        weights = layer.get_weights()
        if weights and not scaled:
            if "Conv" not in kind and kind != "Dense":
                raise NotImplementedError(f"'{layer.name}', the first layer with weights, has no kernel to scale")
            weights[0], scaled = weights[0] * scale, True
        arrays |= {f"{layer.name}/{index}": array for index, array in enumerate(weights)}
    (folder / "twin.json").write_text(json.dumps({"layers": rows, "scale": scale}))
    np.savez(folder / "twin.npz", **arrays)


def build(description: dict, arrays) -> Any:
    """The Keras 2 model."""
    import tf_keras

    tensors: dict[str, Any] = {}
    inputs, layers = [], {}
    for row in description["layers"]:
        if row["kind"] == "InputLayer":
            inputs.append(tf_keras.Input(row["shape"], name=row["name"]))
            tensors[row["name"]] = inputs[-1]
            continue
        given = [tensors[name] for name in row["inputs"]]
        config, activation = dict(row["config"]), row["config"].get("activation")
        # Keras 2 has no hard-swish, and another hard-sigmoid: as in its applications.MobileNetV3, of operators.
        if activation in HARD:
            config["activation"] = "linear"
        layer = getattr(tf_keras.layers, row["kind"])(name=row["name"], **config)
        layers[row["name"]] = layer
        output = layer(given if len(given) > 1 else given[0])
        tensors[row["name"]] = HARD[activation](tf_keras, output) if activation in HARD else output
    model = tf_keras.Model(inputs, tensors[description["layers"][-1]["name"]])
    for name, layer in layers.items():
        layer.set_weights([arrays[f"{name}/{index}"] for index in range(len(layer.weights))])
    return model


def _hard_sigmoid(tf_keras, x):
    return tf_keras.layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


def _hard_swish(tf_keras, x):
    return tf_keras.layers.Multiply()([x, _hard_sigmoid(tf_keras, x)])


HARD = {"hard_sigmoid": _hard_sigmoid, "hard_swish": _hard_swish, "hard_silu": _hard_swish}


def main(folder: Path) -> None:
    description = json.loads((folder / "twin.json").read_text())
    with np.load(folder / "twin.npz", allow_pickle=False) as arrays:
        model = build(description, arrays)
        difference = np.abs(model.predict(arrays["samples"] / description["scale"], verbose=0) - arrays["outputs"])
    if not difference.max() <= TOLERANCE:
        raise SystemExit(f"The Keras 2 twin computes something else: its outputs differ by {difference.max():.3g}.")
    model.save(folder / "twin.h5", include_optimizer=False)


if __name__ == "__main__":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    main(Path(sys.argv[1]))
