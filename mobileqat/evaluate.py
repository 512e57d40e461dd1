"""Accuracy of Keras models and `.tflite` files on labelled samples, from their output values [n, classes]."""

from __future__ import annotations

import numpy as np

from mobileqat.errors import DataError


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose largest output is the label's; the first of equal outputs counts.

    Args:
        outputs: [n, classes], integers or reals.
        labels: int [n].

    Raises:
        DataError: shapes that do not fit, no sample, or outputs that are NaN.
    """
    return float(np.mean(top1(outputs, labels) == labels))


def top1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Predicted classes, int [n]; `labels` only serve to check the shapes."""
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if outputs.ndim != 2 or len(outputs) != len(labels):
        raise DataError(
            f"Accuracy needs outputs [n, classes] for {len(labels)} labels. Received: shape {outputs.shape}. A model "
            "with another kind of output can be converted and verified, but not scored here."
        )
    if len(labels) == 0:
        raise DataError("There is no sample to score.")
    if outputs.shape[1] <= int(labels.max()):
        raise DataError(f"Labels go up to {labels.max()}, but the model has {outputs.shape[1]} outputs.")
    undefined = np.isnan(outputs).any(axis=1)
    if undefined.any():
        raise DataError(
            f"The outputs of {undefined.sum()} of {len(outputs)} samples are NaN, first of sample "
            f"{undefined.argmax()}. Look for NaN or infinity in the model's weights."
        )
    return outputs.argmax(axis=1)


def per_class(outputs: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> list[dict]:
    """Accuracy of each class that has samples: rows with keys "class", "accuracy", "samples"."""
    labels = np.asarray(labels)
    right = top1(outputs, labels) == labels
    return [
        {"class": name, "accuracy": float(right[labels == index].mean()), "samples": int(np.sum(labels == index))}
        for index, name in enumerate(class_names)
        if np.any(labels == index)
    ]
