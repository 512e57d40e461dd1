"""Accuracy of Keras models and `.tflite` files on labelled samples, from their output values [n, classes]."""

from __future__ import annotations

import numpy as np

from mobileqat.errors import DataError


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose largest output is the label's; the first of equal outputs counts.

    Args:
        outputs: [n, classes], integers or reals; one column counts as a binary logit or probability of class 1.
        labels: int [n].

    Raises:
        DataError: shapes that do not fit.
    """
    return float(np.mean(top1(outputs, labels) == labels))


def top1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Predicted classes, int [n]."""
    outputs = np.asarray(outputs)
    if outputs.ndim != 2 or len(outputs) != len(labels):
        raise DataError(
            f"Accuracy needs outputs [n, classes] for {len(labels)} labels. Received: shape {outputs.shape}. A model "
            "with another kind of output can be converted and verified, but not scored here."
        )
    if outputs.shape[1] <= int(labels.max(initial=0)):
        raise DataError(f"Labels go up to {labels.max()}, but the model has {outputs.shape[1]} outputs.")
    return outputs.argmax(axis=1)


def per_class(outputs: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> list[dict]:
    """Accuracy of each class: rows with keys "class", "accuracy", "samples"."""
    right = top1(outputs, labels) == labels
    return [
        {
            "class": name,
            "accuracy": float(right[labels == index].mean()),
            "samples": int(np.sum(labels == index)),
        }
        for index, name in enumerate(class_names)
        if np.any(labels == index)
    ]
