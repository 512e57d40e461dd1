"""What a training step is fed: shuffled, augmented batches, each a function of seed, epoch and step alone.

So a training that was interrupted goes on with the batch that would have come next, whatever was prefetched. Samples
that are streamed are read by number, too, a few batches ahead of the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tensorflow as tf

from mobileqat.data import Dataset, Split, Streamed, augment_images
from mobileqat.data.stream import batch_size_within_memory
from mobileqat.errors import DataError

if TYPE_CHECKING:
    from mobileqat.recipe import Augment

AHEAD = 2  # streamed batches that are read at the same time, and that wait: memory holds no more


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
        self._gather = _gatherer(dataset.train, len(dataset.class_names))
        self._count = len(dataset.train.y)
        self._ahead = _ahead(dataset.train)
        self._batch_size = batch_size
        self._seed = seed
        self._replicas = replicas
        whole, rest = divmod(self._count, batch_size)
        self.steps = whole + (rest >= replicas)
        self._augment = augment

    def starting(self, epoch: int = 0, step: int = 0, parts: range = range(1)) -> tf.data.Dataset:
        """The batches from a step of an epoch on (both from 0), without an end: epoch follows epoch.

        Args:
            parts: which of the replicas' parts of each batch, one after the other.
        """
        epochs = tf.data.Dataset.range(epoch, tf.int64.max)
        steps = epochs.flat_map(lambda number: self._steps(number, tf.where(number == epoch, step, 0), parts))
        batches = steps.map(lambda drawn, chosen: self._gather(chosen), num_parallel_calls=self._ahead)
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
        return batches.apply(endless).prefetch(self._ahead)

    def _steps(self, epoch, start, parts: range) -> tf.data.Dataset:
        """`((seeds for augmentation, int64 [3, 2], part), indices of samples)` of every step from `start` on."""
        # Three words of entropy into the two that stateless generators take.
        key = tf.random.experimental.stateless_fold_in(tf.constant([self._seed, 0], tf.int64), epoch)
        order = tf.random.experimental.stateless_shuffle(tf.range(self._count), key)
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


def validation_batches(dataset: Dataset, batch_size: int = 256) -> tf.data.Dataset:
    """Batches (x, y) of the validation split, in order; smaller ones where samples are large."""
    split = dataset.validation
    batch_size = batch_size_within_memory(split.x.shape[1:], batch_size)
    chosen = tf.data.Dataset.range(len(split.y)).batch(batch_size)
    gather = _gatherer(split, len(dataset.class_names))
    return chosen.map(gather, num_parallel_calls=_ahead(split)).prefetch(_ahead(split))


def _ahead(split: Split) -> int:
    return AHEAD if isinstance(split.x, Streamed) else tf.data.AUTOTUNE


def _gatherer(split: Split, classes: int) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """A function of indices [n] that gives x float32 [n, ...] and y float32 [n, classes], one-hot."""
    x, labels = split.x, tf.constant(split.y)
    if not isinstance(x, Streamed):
        x = tf.constant(x)

    def gather(chosen):
        if isinstance(x, Streamed):
            # Which samples these are depends on the indices alone: without state, and so of any order.
            samples = tf.numpy_function(x.read, [chosen], tf.float32, stateful=False)
            samples.set_shape([chosen.shape[0], *x.shape[1:]])
        else:
            samples = tf.gather(x, chosen)
        return samples, tf.one_hot(tf.gather(labels, chosen), classes)

    return gather


@contextmanager
def data_errors() -> Iterator[None]:
    """Makes a DataError again of what TensorFlow makes of one that was raised while a batch was read."""
    try:
        yield
    except tf.errors.UnknownError as error:
        found = re.search(r"\bDataError: (.*?)\nTraceback \(most recent call last\):", error.message, re.DOTALL)
        if found is None:
            raise
        raise DataError(found[1]) from error
