"""Decoder for loss-lessly packed 8-bit RGB images, about 1.7 kB per CIFAR-10 image.

A shard is one LZMA stream of residuals, uint8 (3, height, width, n). The planes hold R - G, G and B - G.
Each pixel is predicted from its neighbours west, north and north-west by LOCO-I's median edge detector
(Weinberger et al. 2000, https://doi.org/10.1109/83.855427),

    prediction = median(W, N, W + N - NW),

by W alone in the first row, by N alone in the first column, by 0 in the corner. The residual is what is
left, modulo 256; R and B are recovered modulo 256 once G is known, so nothing is lost.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np

from mobileqat.errors import DataError


def read_packed(path: Path, height: int = 32, width: int = 32) -> np.ndarray:
    """Decode one shard of images of `height` x `width` pixels.

    Returns:
        uint8 (n, height, width, 3).

    Raises:
        DataError: missing, damaged, or not a whole number of images.
    """
    try:
        residual = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"cannot unpack {path}: {error}. Replace the file.") from error
    if residual.size == 0 or residual.size % (3 * height * width):
        raise DataError(
            f"{path} unpacks to {residual.size} bytes; expected a multiple of {3 * height * width}, one "
            f"{height}x{width} RGB image. Replace the file."
        )
    red, green, blue = residual.reshape(3, height, width, -1).astype(np.int16)
    green = decode_plane(green, np.zeros_like(green))
    planes = np.stack([decode_plane(red, green), green, decode_plane(blue, green)], axis=-1)
    return np.ascontiguousarray(planes.transpose(2, 0, 1, 3), dtype=np.uint8)


def decode_plane(residual: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Undo the prediction of one plane, pixel by pixel, for all images at once.

    Args:
        residual: int16 (height, width, n), 0..255.
        base: what the coder subtracted from the plane: zeros for green, else green. Same shape and dtype.

    Returns:
        int16 (height, width, n), the plane's pixels, 0..255.
    """
    height, width, _ = residual.shape
    difference = np.empty_like(residual)
    for row in range(height):
        for column in range(width):
            prediction = predict(difference, row, column)
            pixel = (prediction + residual[row, column] + base[row, column]) & 255
            difference[row, column] = pixel - base[row, column]
    return difference + base


def predict(plane: np.ndarray, row: int, column: int) -> np.ndarray | np.int16:
    """The median edge detector at one pixel, int16 (n,), from the pixels decoded before it."""
    if row == 0:
        return plane[0, column - 1] if column else np.int16(0)
    north = plane[row - 1, column]
    if column == 0:
        return north
    west = plane[row, column - 1]
    gradient = west + north - plane[row - 1, column - 1]
    return np.clip(gradient, np.minimum(west, north), np.maximum(west, north))
