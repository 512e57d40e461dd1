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
        epoch: from 0; whoever iterates over batches sets it before.
        steps: of a whole epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, augment: Augment | None, seed: int):
        self._x, self._y = tf.constant(dataset.train.x), tf.constant(one_hot(dataset, dataset.train.y))
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.steps = -(-len(dataset.train.x) // batch_size)
        self._augment = augment

    def from_step(self, start: int = 0) -> tf.data.Dataset:
        """The batches of `epoch` from a step on, to be iterated once per epoch."""
        # The variable is read when an iterator takes its first element, so each epoch has its own order.
        steps = tf.data.Dataset.range(1).flat_map(lambda _: self._steps(start))
        batches = steps.map(lambda seed, chosen: self._gather(chosen), num_parallel_calls=tf.data.AUTOTUNE)
        augment = self._augment
        if augment is not None and (augment.flip or augment.shift or augment.cutout):
            seeds = steps.map(lambda seed, chosen: seed)
            batches = augment_images(batches, flip=augment.flip, shift=augment.shift, cutout=augment.cutout, seed=seeds)
        return batches.apply(tf.data.experimental.assert_cardinality(self.steps - start)).prefetch(tf.data.AUTOTUNE)

    def _steps(self, start: int) -> tf.data.Dataset:
        """Seeds for augmentation, int64 [3, 2], and indices of samples, of every step from `start` on."""
        # Three words of entropy into the two that stateless generators take.
        key = tf.random.experimental.stateless_fold_in(tf.constant([self._seed, 0], tf.int64), self.epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(len(self._x)), key)
        steps = tf.data.Dataset.from_tensor_slices(order).batch(self._batch_size).enumerate().skip(start)

        def with_seeds(step, chosen):
            folded = tf.random.experimental.stateless_fold_in(key, step)
            bounds = {"minval": None, "maxval": None, "dtype": tf.int64}
            return tf.random.stateless_uniform([3, 2], folded, **bounds), chosen

        return steps.map(with_seeds)

    def _gather(self, chosen):
        return tf.gather(self._x, chosen), tf.gather(self._y, chosen)


def validation_batches(dataset: Dataset, batch_size: int = 256) -> tf.data.Dataset:
    """Batches (x, y) of the validation split, in order."""
    pairs = dataset.validation.x, one_hot(dataset, dataset.validation.y)
    return tf.data.Dataset.from_tensor_slices(pairs).batch(batch_size).prefetch(tf.data.AUTOTUNE)


def one_hot(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """float32 [n, classes] of labels [n]."""
    return np.eye(len(dataset.class_names), dtype=np.float32)[labels]
