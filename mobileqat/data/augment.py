"""Random flips, shifts and cutouts of image batches, inside the tf.data pipeline.

Pixels are only moved or replaced by the image's mean, never interpolated: images of integers stay images
of integers, the grid that the quantized model's input will have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobileqat.errors import DataError

if TYPE_CHECKING:
    import tensorflow as tf


def augment_images(
    dataset: tf.data.Dataset, *, flip: bool, shift: int, cutout: int = 0, seed: int | tf.data.Dataset, parts: int = 1
) -> tf.data.Dataset:
    """Augment each image of a batched dataset independently, anew in every epoch.

    Args:
        dataset: of batches (x, y, ...) with x (n, height, width, channels); all but x pass unchanged.
        flip: mirror left to right with probability 1/2.
        shift: move by -shift..shift pixels in each direction; the border reflects (it does not repeat).
        cutout: side in pixels of a square, centred anywhere in the image and clipped at its border, that is
            filled with the image's mean per channel (DeVries & Taylor 2017, arXiv:1708.04552); 0 for none.
            The mean is rounded where all pixels of the image are integers.
        seed: with the same seed (and the same `tf.random.set_seed`, if any) epoch k is always the same; or a
            dataset that gives each batch its own seeds, int64 [3, 2], and which of `parts` it is.
        parts: equal parts of a larger batch that draws its random numbers as a whole.

    Raises:
        DataError: x is not a batch of images of known size, or shift or cutout do not fit that size.
    """
    import tensorflow as tf

    height, width = _image_size(dataset, shift, cutout)

    def augment(batch, drawn):
        (x, *rest), (seeds, part) = batch, drawn
        count = tf.shape(x)[0]

        def own(numbers):
            """Of the numbers for the whole batch those for this part of it; samples are the second dimension."""
            return numbers[:, part * count : (part + 1) * count]

        offsets = own(_uniform(seeds[0], [2, count * parts], -shift, shift))
        rows = _reflect(_shifted(offsets[0], height), height)
        columns = _reflect(_shifted(offsets[1], width), width)
        if flip:
            is_flipped = own(_uniform(seeds[1], [1, count * parts], 0, 1))[0, :, tf.newaxis] == 1
            columns = tf.where(is_flipped, width - 1 - columns, columns)
        x = tf.gather(tf.gather(x, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
        if cutout:
            x = _cut_out(x, cutout, own(tf.random.stateless_uniform([2, count * parts], seeds[2])))
        return (x, *rest)

    batches = tf.data.Dataset.zip(dataset, seed if isinstance(seed, tf.data.Dataset) else _seeds(seed))
    return batches.map(augment, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _seeds(seed: int) -> tf.data.Dataset:
    """One draw of seeds per batch.

    Unlike a stateful generator it gives the same numbers however far an abandoned iterator has prefetched, and unlike
    a counter it gives new ones in the next epoch.
    """
    import tensorflow as tf

    draws = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(6)
    return draws.map(lambda draw: (tf.reshape(draw, [3, 2]), 0))


def _image_size(dataset: tf.data.Dataset, shift: int, cutout: int) -> tuple[int, int]:
    spec = dataset.element_spec
    shape = spec[0].shape if isinstance(spec, tuple) and hasattr(spec[0], "shape") else None
    if shape is None or shape.rank != 4 or None in shape[1:3]:
        raise DataError(
            "augmentation needs batches (x, y) with x of shape (n, height, width, channels) and known size. "
            f"Received: element_spec={spec}"
        )
    height, width = shape[1:3]
    shortest = min(height, width)
    if not (0 <= shift < shortest and 0 <= cutout <= shortest):
        raise DataError(
            f"expected 0 <= shift < {shortest} and 0 <= cutout <= {shortest} for images of {height}x{width} "
            f"pixels. Received: shift={shift}, cutout={cutout}"
        )
    return height, width


def _uniform(seed: tf.Tensor, shape, low: int, high: int) -> tf.Tensor:
    """int32 of `shape`, uniform in low..high, both included."""
    import tensorflow as tf

    return tf.random.stateless_uniform(shape, seed, minval=low, maxval=high + 1, dtype=tf.int32)


def _shifted(offset: tf.Tensor, size: int) -> tf.Tensor:
    """offset (n,) -> (n, size): the index that each output pixel would be read from on an endless axis."""
    import tensorflow as tf

    return tf.range(size) + offset[:, tf.newaxis]


def _reflect(index: tf.Tensor, size: int) -> tf.Tensor:
    """Fold indices in -size + 1 .. 2 * size - 2 back into 0..size - 1: -1 -> 1, size -> size - 2."""
    import tensorflow as tf

    return size - 1 - tf.abs(size - 1 - tf.abs(index))


def _cut_out(x: tf.Tensor, side: int, centre: tf.Tensor) -> tf.Tensor:
    """`centre`: float32 [2, n], row and column as shares of the image."""
    import tensorflow as tf

    height, width = x.shape[1:3]
    is_row = _is_within(tf.cast(centre[0] * height, tf.int32), side, height)
    is_column = _is_within(tf.cast(centre[1] * width, tf.int32), side, width)
    is_cut = is_row[:, :, tf.newaxis, tf.newaxis] & is_column[:, tf.newaxis, :, tf.newaxis]
    return tf.where(is_cut, _fill(x), x)


def _is_within(centre: tf.Tensor, side: int, size: int) -> tf.Tensor:
    """centre (n,) -> bool (n, size): the `side` pixels around it, clipped at the border."""
    import tensorflow as tf

    distance = tf.range(size) - (centre[:, tf.newaxis] - side // 2)
    return (distance >= 0) & (distance < side)


def _fill(x: tf.Tensor) -> tf.Tensor:
    """(n, height, width, channels) -> (n, 1, 1, channels): means, rounded for images of integers."""
    import tensorflow as tf

    pixels = tf.cast(x, tf.float32)
    mean = tf.reduce_mean(pixels, axis=[1, 2], keepdims=True)
    is_integer = tf.reduce_all(pixels == tf.round(pixels), axis=[1, 2, 3], keepdims=True)
    return tf.cast(tf.where(is_integer, tf.round(mean), mean), x.dtype)
