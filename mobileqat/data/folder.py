"""Datasets made of image files, one folder per class, read with Pillow.

    path/train/<class>/*.jpg, path/test/<class>/*.jpg, path/validation/<class>/*.jpg     or
    path/<class>/*.jpg

Without a test folder a stratified 20 % of the train images, always the same ones, become the test split.
Names that start with a dot are ignored; any other file that is not an image is an error, so that nothing
is left out without notice. An image that cannot be read is one, too, unless `broken` says to skip it.

A large folder is streamed: its images are decoded when they are needed. All of them are decoded once at the
start, too, so that a broken one is not found in the middle of a training; the cache remembers the outcome.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from mobileqat.data.cache import remembered
from mobileqat.data.dataset import SPLIT_NAMES
from mobileqat.data.split import hold_out_test
from mobileqat.data.stream import Streamed, in_parallel, is_streamed
from mobileqat.errors import DataError
from mobileqat.progress import track

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# By what a file holds, whatever its name says: Pillow knows formats that other programs are started for.
PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
PILLOW_MODES = {1: "L", 3: "RGB"}

Listing = dict[str, dict[str, list[Path]]]


def load_image_folder(
    *,
    path: str,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    broken: str = "refuse",
    stream: bool | None = None,
) -> dict:
    """Read the image files below `path`.

    Args:
        path: the folder, laid out as in the module's docstring.
        image_size: (height, width) in pixels to resize to, bilinear with antialiasing; may be None when all
            images have one size already.
        channels: 3 for RGB, 1 for grayscale.
        broken: what becomes of an image that cannot be read; "refuse" is an error, "skip" leaves it out, and one
            warning names all such files with the reason of each.
        stream: decode images when they are needed rather than keep all of them in memory; the values are the same.
            By default where they would take more than 2 GiB as float32.

    Returns:
        x_* uint8 (n, height, width, channels), or `Streamed` of them; y_* int64 (n,), class_names in sorted order.

    Raises:
        DataError: names the folder or file that is missing, empty, broken, or of another size.
    """
    check_options(image_size, channels, broken)
    root = Path(path)
    listing = _list_splits(root)
    files = _files(listing)
    reader = ImageFiles(files, image_size, channels)
    streams = is_streamed(stream, len(files), reader.shape)
    if streams or broken == "skip":
        problems = _find_broken(root, reader, broken, streams)
        if problems:
            listing = _without_broken(path, listing, problems)
            reader = ImageFiles(_files(listing), image_size, channels)
    x = Streamed(reader) if streams else np.asarray(Streamed(reader))
    arrays: dict = {"class_names": list(listing["train"])}
    start = 0
    for split, classes in listing.items():
        y = np.repeat(np.arange(len(classes)), [len(class_files) for class_files in classes.values()])
        arrays |= {f"x_{split}": x[start : start + len(y)], f"y_{split}": y}
        start += len(y)
    if "test" not in listing:
        _check_enough_for_test(listing["train"])
        arrays |= hold_out_test(arrays["x_train"], arrays["y_train"])
    return arrays


class ImageFiles:
    """Reads image files by number; they have the shape of the first that can be read."""

    def __init__(self, files: Sequence[Path], image_size: tuple[int, int] | None, channels: int):
        self.files = [os.fspath(file) for file in files]  # a tenth of the memory of paths
        self.image_size = image_size
        self.channels = channels
        self.first, self.shape = self._first()

    def __len__(self) -> int:
        return len(self.files)

    def _first(self) -> tuple[str, tuple[int, ...]]:
        if self.image_size is not None:
            return self.files[0], (*self.image_size, self.channels)
        for file in self.files:
            try:
                return file, read_image(Path(file), None, self.channels).shape
            except DataError:
                continue  # it is named when all are read
        return self.files[0], read_image(Path(self.files[0]), None, self.channels).shape

    def read(self, index: int) -> np.ndarray:
        file = self.files[index]
        try:
            image = read_image(Path(file), self.image_size, self.channels)
        except DataError as error:
            if os.path.exists(file):
                raise
            raise DataError(f"{file} is gone since the folder was listed. Put it back.") from error
        if image.shape != self.shape:
            raise OtherSizeError(
                f"{file} has {image.shape[0]}x{image.shape[1]} pixels (height x width), {self.first} has "
                f"{self.shape[0]}x{self.shape[1]}. Set image_size to resize all images alike."
            )
        return image


class OtherSizeError(DataError):
    """An image is whole, and of another size than the first: nothing to skip."""


def read_image(path: Path, image_size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """One image file as uint8 (height, width, channels), upright, resized unless `image_size` is None."""
    return decode_image(path, f"the image {path}", image_size, channels)


def decode_image(source: Path | IO[bytes], name: str, image_size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """`read_image` of a path or an open file, which errors call `name`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(source, formats=PILLOW_FORMATS) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                # Pillow would clip these to 0..255 without a word.
                raise DataError(f"{name} has more than 8 bits per channel ({image.mode}). Convert it.")
            # Cameras store rotated pictures as they came off the sensor, with a note to turn them.
            upright = ImageOps.exif_transpose(image).convert(PILLOW_MODES[channels])
        height, width = image_size or (upright.height, upright.width)
        resized = upright.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized).reshape(height, width, channels)
    except DataError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError and more on broken files.
        raise DataError(f"cannot read {name}: {error}. Replace or remove it.") from error


def check_options(image_size, channels, broken) -> None:
    if broken not in ("refuse", "skip"):
        raise DataError(f"broken must be 'refuse' or 'skip'. Received: broken={broken!r}")
    if channels not in PILLOW_MODES:
        raise DataError(f"channels must be 1 (grayscale) or 3 (RGB). Received: channels={channels!r}")
    if image_size is not None and not (
        isinstance(image_size, (tuple, list))
        and len(image_size) == 2
        and all(isinstance(pixels, int) and pixels > 0 for pixels in image_size)
    ):
        raise DataError(f"image_size must be (height, width) in pixels. Received: image_size={image_size!r}")


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _list_splits(root: Path) -> Listing:
    """The image files of each class of each split; train comes first."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder. Set path to the folder that holds the class folders.")
    train = root / "train"
    # A `train` folder without folders in it is a class: pictures of trains.
    if not train.is_dir() or not any(entry.is_dir() for entry in _visible(train)):
        return {"train": _list_classes(root)}
    folders = [root / split for split in SPLIT_NAMES if (root / split).is_dir()]
    listing = {folder.name: _list_classes(folder) for folder in folders}
    for split, classes in listing.items():
        _check_same_classes(root, split, set(classes), set(listing["train"]))
    return listing


def _check_same_classes(root: Path, split: str, classes: set[str], train_classes: set[str]) -> None:
    if classes != train_classes:
        name = min(classes ^ train_classes)
        absent, present = (split, "train") if name in train_classes else ("train", split)
        raise DataError(
            f"{root / absent} has no class folder {name!r}, but {root / present} has; expected the same "
            "classes in every split. Add or remove it."
        )


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    classes = {entry.name: _list_images(entry) for entry in _visible(folder) if entry.is_dir()}
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class>/<image files>.")
    return classes


def _list_images(folder: Path) -> list[Path]:
    files = _visible(folder)
    if not files:
        raise DataError(f"{folder} is empty; expected images of this class. Add some or remove the folder.")
    for file in files:
        if not file.is_file() or file.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{file} is not an image file; expected names ending in {', '.join(IMAGE_SUFFIXES)}. "
                "Move it out of the class folder."
            )
    return files


def _files(listing: Listing) -> list[Path]:
    return [file for classes in listing.values() for files in classes.values() for file in files]


def _find_broken(root: Path, reader: ImageFiles, broken: str, remember: bool) -> dict[str, str]:
    """Reasons of the images that cannot be read, by path; an error for the first one unless they are to be skipped."""

    def problem(index: int) -> str | None:
        try:
            reader.read(index)
        except OtherSizeError:
            raise
        except DataError as error:
            if broken == "refuse":
                raise
            return str(error)
        return None

    def find() -> dict[str, str]:
        pairs = zip(reader.files, in_parallel(problem, range(len(reader))), strict=True)
        problems = track(pairs, "reading images", "images", len(reader))
        return {file: reason for file, reason in problems if reason is not None}

    if not remember:
        return find()
    facts = [str(root.resolve()), reader.image_size, reader.channels, broken]
    found = remembered("images", reader.files, facts, find)
    return found if isinstance(found, dict) else find()


def _without_broken(path: str, listing: Listing, problems: dict[str, str]) -> Listing:
    """The files that can be read; the others are named in one warning."""
    reasons = "".join(f"\n  {reason}" for reason in problems.values())
    warnings.warn(f"{path}: {len(problems)} broken images are left out:{reasons}", stacklevel=3)
    kept = {
        split: {name: [file for file in files if os.fspath(file) not in problems] for name, files in classes.items()}
        for split, classes in listing.items()
    }
    for split, classes in kept.items():
        for name, files in classes.items():
            if not files:
                raise DataError(f"{path}: no image of class {name!r} in the {split} split can be read. Replace them.")
    return kept


def _check_enough_for_test(classes: dict[str, list[Path]]) -> None:
    for files in classes.values():
        if len(files) < 2:
            raise DataError(
                f"{files[0].parent} has one image; expected at least 2, to be in both train and test. Add "
                "images, or make train and test folders."
            )
