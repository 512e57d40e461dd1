"""TrashNet: photographs of waste in six classes (Yang and Thung 2016), with the authors' split.

trashnet/images/<class>/<class><number>.jpg                      below the folder MOBILEQAT_DATA
trashnet/splits/one-indexed-files-notrash_{train,val,test}.txt   "<file> <class>" a line; whatever
                                                                 their names say, they name images of all classes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobileqat.data.builtin import local_folder
from mobileqat.data.folder import read_image
from mobileqat.errors import DataError
from mobileqat.progress import track

CLASSES = ("glass", "paper", "cardboard", "plastic", "metal", "trash")
LISTS = {"train": "train", "validation": "val", "test": "test"}


def load_trashnet(*, image_size: tuple[int, int] | None = (96, 128)) -> dict:
    """2527 photographs, uint8 (n, height, width, 3), resized from 192x256 pixels.

    Raises:
        DataError: no such folder, or an image that no list names.
    """
    folder = local_folder("trashnet")
    if folder is None:
        raise DataError(
            "dataset 'trashnet' is read from <folder>/trashnet: put images/ and splits/ of "
            "https://github.com/garythung/trashnet there and set MOBILEQAT_DATA=<folder>."
        )
    listed = _read_lists(folder / "splits")
    rows: dict[str, list] = {name: [] for name in LISTS}
    found = [
        (label, file) for label, name in enumerate(CLASSES) for file in sorted((folder / "images" / name).glob("*.jpg"))
    ]
    for label, file in track(found, "reading images", "images"):
        if file.name not in listed:
            raise DataError(f"{file} is in none of the authors' lists. Remove it, or complete the lists.")
        rows[listed[file.name]].append((read_image(file, image_size, 3), label))
    arrays: dict = {"class_names": CLASSES}
    for name, members in rows.items():
        if not members:
            raise DataError(f"{folder} has no images of the {name} split. Look for missing files.")
        images, labels = zip(*members, strict=True)
        arrays |= {f"x_{name}": np.stack(images), f"y_{name}": np.array(labels)}
    return arrays


def _read_lists(folder: Path) -> dict[str, str]:
    """Split by file name."""
    splits: dict[str, str] = {}
    for split, name in LISTS.items():
        path = folder / f"one-indexed-files-notrash_{name}.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}. Put the authors' lists there.") from error
        splits |= {line.split()[0]: split for line in lines if line.strip()}
    return splits
