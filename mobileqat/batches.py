"""What a training step is fed: shuffled, augmented batches, each a function of seed, epoch and step alone.

So a training that was interrupted goes on with the batch that would have come next, whatever was prefetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from mobileqat.data import Dataset, augment_images

if TYPE_CHECKING:
    from mobileqat.recipe import Augment


class TrainingBatches:
    """Batches (x float32 [n, ...], y one-hot float32 [n, classes]) of the train split, the last one smaller.

    Args:
        dataset: whose train split is used.
        batch_size: samples per step.
        augment: random changes to images, new ones in every epoch.
        seed: of order and augmentation.

    Attributes:
        steps: of a whole epoch.

    Several replicas share a batch in equal parts; of the last one up to `replicas - 1` samples are left out for that.
    """

    def __init__(self, dataset: Dataset, batch_size: int, augment: Augment | None, seed: int, replicas: int = 1):
        self._x, self._y = tf.constant(dataset.train.x), tf.constant(one_hot(dataset, dataset.train.y))
        self._batch_size = batch_size
        self._seed = seed
        self._replicas = replicas
        whole, rest = divmod(len(dataset.train.x), batch_size)
        self.steps = whole + (rest >= replicas)
        self._augment = augment

    def starting(self, epoch: int = 0, step: int = 0, parts: range = range(1)) -> tf.data.Dataset:
        """The batches from a step of an epoch on (both from 0), without an end: epoch follows epoch.

        Args:
            parts: which of the replicas' parts of each batch, one after the other.
        """
        epochs = tf.data.Dataset.range(epoch, tf.int64.max)
        steps = epochs.flat_map(lambda number: self._steps(number, tf.where(number == epoch, step, 0), parts))
        batches = steps.map(lambda drawn, chosen: self._gather(chosen), num_parallel_calls=tf.data.AUTOTUNE)
        augment = self._augment
        if augment is not None and (augment.flip or augment.shift or augment.cutout):
            batches = augment_images(
                batches,
                flip=augment.flip,
                shift=augment.shift,
                cutout=augment.cutout,
                seed=steps.map(lambda drawn, chosen: drawn),
                parts=self._replicas,
            )
        # Without an end there is no replica that lacks data at the end, which `tf.distribute` else looks for.
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return batches.apply(endless).prefetch(tf.data.AUTOTUNE)

    def _steps(self, epoch, start, parts: range) -> tf.data.Dataset:
        """`((seeds for augmentation, int64 [3, 2], part), indices of samples)` of every step from `start` on."""
        # Three words of entropy into the two that stateless generators take.
        key = tf.random.experimental.stateless_fold_in(tf.constant([self._seed, 0], tf.int64), epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(len(self._x)), key)
        steps = tf.data.Dataset.from_tensor_slices(order).batch(self._batch_size).take(self.steps)

        def in_parts(step, chosen):
            folded = tf.random.experimental.stateless_fold_in(key, step)
            bounds = {"minval": None, "maxval": None, "dtype": tf.int64}
            seeds = tf.random.stateless_uniform([3, 2], folded, **bounds)
            size = tf.size(chosen) // self._replicas
            return tf.data.Dataset.range(parts.start, parts.stop, output_type=tf.int32).map(
                lambda part: ((seeds, part), chosen[part * size : (part + 1) * size])
            )

        return steps.enumerate().skip(tf.cast(start, tf.int64)).flat_map(in_parts)

    def _gather(self, chosen):
        return tf.gather(self._x, chosen), tf.gather(self._y, chosen)


def validation_batches(dataset: Dataset, batch_size: int = 256) -> tf.data.Dataset:
    """Batches (x, y) of the validation split, in order."""
    pairs = dataset.validation.x, one_hot(dataset, dataset.validation.y)
    return tf.data.Dataset.from_tensor_slices(pairs).batch(batch_size).prefetch(tf.data.AUTOTUNE)


def one_hot(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """float32 [n, classes] of labels [n]."""
    return np.eye(len(dataset.class_names), dtype=np.float32)[labels]
