"""Images in TFRecord files: `tf.train.Example` records, each an image and its label.

    path/train/*.tfrecord, path/test/*.tfrecord, path/validation/*.tfrecord     or
    path/*.tfrecord, path/*.tfrecord-00000-of-00010                             or a file, or a pattern: data/*-of-*

Without these folders a file's name says its split by the word train, test, validation or val; where no name says one,
all are train. Without test files a stratified 20 % of train, always the same records, become the test split.

A record is its length (8 bytes), a checksum of that (4), the content, and a checksum of the content (4); the checksums
are CRC-32C. All records are read and decoded once, for the labels and to find broken ones; where each one lies stays
in the cache. After that any record can be read by itself, and its checksums are looked at again.
"""

from __future__ import annotations

import glob
import json
import re
import struct
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from mobileqat.data.cache import cache_folder, fingerprint_of_paths, keep
from mobileqat.data.folder import check_options, decode_image
from mobileqat.data.npz import read_npz
from mobileqat.data.split import hold_out_test
from mobileqat.data.stream import Streamed, in_parallel, is_streamed
from mobileqat.errors import DataError

FILE_NAME = re.compile(r"\.tfrecords?(\.gz)?(-\d+-of-\d+)?$")
SPLIT_WORDS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
HEADER, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
MAX_LABEL = 2**31
INDEX_TYPES = {"shard": np.int32, "number": np.int64, "offset": np.int64, "length": np.int64, "label": np.int64}


class Fields(NamedTuple):
    """Where an Example has what.

    Args:
        image_key: a bytes feature: a PNG, JPEG or other image file, or bare pixels if `raw`.
        label_key: an int64 feature, or a bytes feature with the name of a class.
        class_names: of the labels, in order; required where labels are names.
        first_label: the number of the first class.
        image_size: (height, width) in pixels to resize to; of bare pixels their size.
        channels: 3 for RGB, 1 for grayscale.
        raw: whether the image is height * width * channels bytes without a header.
    """

    image_key: str
    label_key: str
    class_names: tuple[str, ...] | None
    first_label: int
    image_size: tuple[int, int] | None
    channels: int
    raw: bool


def load_tfrecord(
    *,
    path: str,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    image_key: str = "image/encoded",
    label_key: str = "image/class/label",
    class_names: Sequence[str] | None = None,
    first_label: int = 0,
    raw: bool = False,
    broken: str = "refuse",
    stream: bool | None = None,
) -> dict:
    """Read the records of the files at `path`, laid out as in the module's docstring.

    Args:
        path: a folder, a file, or a pattern.
        broken: what becomes of a record that is damaged or has no such image or label; "refuse" is an error, "skip"
            leaves it out, and one warning names all such records with the reason of each.
        stream: decode images when they are needed rather than keep all of them in memory; the values are the same.
            By default where they would take more than 2 GiB as float32.
        image_size, channels, image_key, label_key, class_names, first_label, raw: see `Fields`.

    Returns:
        x_* uint8 (n, height, width, channels), or `Streamed` of them; y_* int64 (n,).

    Raises:
        DataError: names the file and the record, counted from 0, that is missing, broken or of another size.
    """
    check_options(image_size, channels, broken)
    if raw and image_size is None:
        raise DataError("raw pixels have no size of their own: set image_size to theirs.")
    if not isinstance(first_label, int) or isinstance(first_label, bool):
        raise DataError(f"first_label must be a whole number. Received: first_label={first_label!r}")
    if class_names is not None and not isinstance(class_names, (list, tuple)):
        raise DataError(f"class_names must be a list of names. Received: class_names={class_names!r}")
    names = None if class_names is None else tuple(map(str, class_names))
    size = None if image_size is None else (image_size[0], image_size[1])
    fields = Fields(image_key, label_key, names, first_label, size, channels, raw)
    splits = _list_splits(path)
    files = [file for split_files in splits.values() for file in split_files]
    index = _load_index(path, files, fields, broken)
    reader = Records(files, index, fields)
    x: Any = Streamed(reader)
    if not is_streamed(stream, len(x), reader.shape):
        x = np.asarray(x)
    arrays: dict = {"class_names": names}
    first_file = 0
    for split, split_files in splits.items():
        # Records lie in the order of the files.
        bounds = np.searchsorted(index["shard"], [first_file, first_file + len(split_files)])
        chosen = slice(*bounds.tolist())
        arrays |= {f"x_{split}": x[chosen], f"y_{split}": index["label"][chosen]}
        first_file += len(split_files)
    if "test" not in splits:
        arrays |= hold_out_test(arrays["x_train"], arrays["y_train"])
    return arrays


class Records:
    """Reads indexed records by number.

    Args:
        files: their paths.
        index: arrays [n] by the names of `INDEX_TYPES`, and "shape".
        fields: of an Example.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, np.ndarray], fields: Fields):
        self.files = files
        self.index = index
        self.fields = fields
        self.shape = tuple(index["shape"].tolist())

    def __len__(self) -> int:
        return len(self.index["label"])

    def read(self, index: int) -> np.ndarray:
        file, number, offset, length = (
            int(self.index[name][index]) for name in ("shard", "number", "offset", "length")
        )
        where = f"{self.files[file]}, record {number}"
        try:
            with open(self.files[file], "rb") as opened:
                opened.seek(offset)
                content = opened.read(HEADER.size + length + CHECKSUM.size)
        except OSError as error:
            raise DataError(f"cannot read {where}: {error.strerror}. Put the file back.") from error
        header, content, checksum = content[: HEADER.size], content[HEADER.size : -4], content[-4:]
        changed = f"{where}, has changed since it was indexed, or is damaged. Put the file back as it was."
        is_whole = _has_checksum(header[:8], header[8:]) and _has_checksum(content, checksum)
        if not is_whole or len(content) != length:
            raise DataError(changed)
        image, label = decode_record(content, where, self.fields)
        if image.shape != self.shape or label != self.index["label"][index]:
            raise DataError(changed)
        return image


def decode_record(content: bytes, where: str, fields: Fields) -> tuple[np.ndarray, int]:
    """The image, uint8 (height, width, channels), and the label, counted from 0, of a serialized Example.

    Raises:
        DataError: it is none, or has no such image or label.
    """
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(content).features.feature
    except Exception as error:  # of protobuf, whose implementations have different ones
        raise DataError(f"{where} is no tf.train.Example: {error}. Write it with tf.train.Example.") from error
    for key, option in ((fields.image_key, "image_key"), (fields.label_key, "label_key")):
        if key not in features:
            raise DataError(
                f"{where} has no feature {key!r}; it has {', '.join(sorted(features)) or 'none'}. Set option {option}."
            )
    return _image(features[fields.image_key], where, fields), _label(features[fields.label_key], where, fields)


def _image(feature: Any, where: str, fields: Fields) -> np.ndarray:
    values = feature.bytes_list.value
    if len(values) != 1:
        raise DataError(
            f"{where}: feature {fields.image_key!r} must be one string of bytes, received {len(values)}. Correct it."
        )
    if not fields.raw:
        name = f"the image of {where}"
        return decode_image(BytesIO(values[0]), name, fields.image_size, fields.channels)
    assert fields.image_size is not None
    shape = (*fields.image_size, fields.channels)
    if len(values[0]) != np.prod(shape):
        raise DataError(
            f"{where}: feature {fields.image_key!r} has {len(values[0])} bytes; expected {np.prod(shape)}, bare pixels "
            f"of shape {shape}. Set image_size and channels to theirs, or raw to false."
        )
    return np.frombuffer(values[0], np.uint8).reshape(shape)


def _label(feature: Any, where: str, fields: Fields) -> int:
    numbers, names = feature.int64_list.value, feature.bytes_list.value
    if len(numbers) + len(names) != 1:
        raise DataError(
            f"{where}: feature {fields.label_key!r} must be one int64 or the name of a class, received "
            f"{len(numbers) + len(names)} values. Correct it."
        )
    if numbers:
        if not 0 <= numbers[0] - fields.first_label < MAX_LABEL:
            raise DataError(f"{where} has label {numbers[0]}; expected one from {fields.first_label} on. Correct it.")
        return numbers[0] - fields.first_label
    name = names[0].decode("utf-8", "replace")
    if fields.class_names is None or name not in fields.class_names:
        known = (
            "no class_names are given" if fields.class_names is None else f"expected {', '.join(fields.class_names)}"
        )
        raise DataError(f"{where} is of class {name!r}; {known}. Complete the option class_names.")
    return fields.class_names.index(name)


# ------------------------------------------------------------------ files


def _list_splits(path: str) -> dict[str, list[Path]]:
    """Files by split, train first."""
    root = Path(path)
    if (root / "train").is_dir():
        folders = {name: root / name for name in ("train", "validation", "test") if (root / name).is_dir()}
        return {name: _list_folder(folder) for name, folder in folders.items()}
    if root.is_dir():
        files = _list_folder(root)
    else:
        files = [Path(name) for name in sorted(glob.glob(path)) if Path(name).is_file()]
        if not files:
            raise DataError(f"There is no file {path}. Set path to a folder, a file, or a pattern such as data/*-of-*.")
    _refuse_gzip(files)
    return _by_name(path, files)


def _list_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if FILE_NAME.search(file.name) and file.is_file())
    if not files:
        raise DataError(f"{folder} has no files named *.tfrecord or *.tfrecord-00000-of-00010. Set path to them.")
    _refuse_gzip(files)
    return files


def _refuse_gzip(files: Sequence[Path]) -> None:
    for file in files:
        try:
            with open(file, "rb") as opened:
                is_gzip = opened.read(2) == b"\x1f\x8b"
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}. Correct the path.") from error
        if is_gzip:
            raise DataError(
                f"{file} is compressed: none of its records can be read without those before it. Unpack it with gunzip."
            )


def _by_name(path: str, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", file.name.lower()) if word in SPLIT_WORDS]
        if words:
            splits.setdefault(words[0], []).append(file)
        else:
            unnamed.append(file)
    if not splits:
        return {"train": files}
    if unnamed or "train" not in splits:
        problem = f"{unnamed[0]} names no split and others do" if unnamed else f"no file of {path} is named train"
        raise DataError(f"{problem}; expected train, test, validation or val in every name, or in none. Rename them.")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


# ------------------------------------------------------------------ index


def _load_index(path: str, files: list[Path], fields: Fields, broken: str) -> dict[str, np.ndarray]:
    """Of all whole records; from the cache where it holds the index intact."""
    facts = [[str(file.resolve()) for file in files], fields, broken]
    cached = cache_folder() / f"tfrecord-{fingerprint_of_paths(map(str, files), facts)}.npz"
    index = _read_index(cached)
    if index is None:
        index = _build_index(files, fields, broken)
        keep(cached, index, f"{path} is indexed")
    problems = json.loads(str(index["problems"]))
    if problems:
        reasons = "".join(f"\n  {reason}" for reason in problems)
        warnings.warn(f"{path}: {len(problems)} broken records are left out:{reasons}", stacklevel=4)
    return index


def _read_index(path: Path) -> dict[str, np.ndarray] | None:
    try:
        index = read_npz(path)
    except DataError:
        return None  # absent or damaged: either way it is built anew
    types = {name: array.dtype for name, array in index.items() if name not in ("shape", "problems")}
    return index if types == INDEX_TYPES and {"shape", "problems"} <= set(index) else None


def _build_index(files: list[Path], fields: Fields, broken: str) -> dict[str, np.ndarray]:
    """Reads, checks and decodes every record of the files."""
    rows = array("q")  # an eighth of the memory of tuples
    problems: list[str] = []
    shape: tuple[int, ...] | None = None
    first = ""

    def check(found: _Found) -> tuple[_Found, np.ndarray | None, int, str]:
        try:
            if found.problem:
                raise DataError(found.problem)
            image, label = decode_record(found.content, found.where, fields)
            return found._replace(content=b""), np.array(image.shape), label, ""
        except DataError as error:
            if broken == "refuse":
                raise
            return found._replace(content=b""), None, 0, str(error)

    records = (found for number, file in enumerate(files) for found in scan(file, number))
    for found, size, label, problem in in_parallel(check, records):
        if size is None:
            problems.append(problem)
            continue
        shape, first = shape or tuple(size.tolist()), first or found.where
        if tuple(size.tolist()) != shape:
            raise DataError(
                f"{found.where} has {size[0]}x{size[1]} pixels (height x width), {first} has {shape[0]}x{shape[1]}. "
                "Set image_size to resize all images alike."
            )
        rows.extend((found.file, found.number, found.offset, found.length, label))
    if shape is None:
        raise DataError(f"{files[0]} has no record that can be read: {problems[0] if problems else 'it is empty'}")
    columns = np.frombuffer(rows, np.int64).reshape(-1, len(INDEX_TYPES)).T
    index = {name: column.astype(kind) for (name, kind), column in zip(INDEX_TYPES.items(), columns, strict=True)}
    return index | {"shape": np.array(shape), "problems": np.array(json.dumps(problems))}


class _Found(NamedTuple):
    """A record of a file: its number there, where it begins, and its content, or what is wrong with it."""

    where: str
    file: int
    number: int
    offset: int
    length: int
    content: bytes
    problem: str


def scan(path: Path, file: int = 0) -> Iterator[_Found]:
    """Every record of a file in order; after one whose length is damaged nothing more can be found."""
    try:
        with open(path, "rb") as opened:
            end, offset, number = opened.seek(0, 2), 0, 0
            while offset < end:
                found = _scan_record(opened, path, file, number, offset, end)
                yield found
                if found.length < 0:
                    return
                offset, number = offset + HEADER.size + found.length + CHECKSUM.size, number + 1
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Correct the path.") from error


def _scan_record(opened: Any, path: Path, file: int, number: int, offset: int, end: int) -> _Found:
    where = f"{path}, record {number}"

    def lost(what: str) -> _Found:
        problem = f"{where}, at byte {offset}: {what}; what follows in this file cannot be found. Write it anew."
        return _Found(where, file, number, offset, -1, b"", problem)

    opened.seek(offset)
    header = opened.read(HEADER.size)
    if len(header) < HEADER.size:
        return lost(f"the file ends after {len(header)} of the {HEADER.size} bytes before a record")
    if not _has_checksum(header[:8], header[8:]):
        return lost("its length is damaged, or this is no TFRecord file")
    length = HEADER.unpack(header)[0]
    remaining = end - offset - HEADER.size - CHECKSUM.size
    if length > remaining:
        return lost(f"it has {length} bytes, and the file ends after {max(remaining, 0)}")
    content, checksum = opened.read(length), opened.read(CHECKSUM.size)
    problem = ""
    if not _has_checksum(content, checksum):
        problem = f"{where}, at byte {offset}: its checksum is not that of its content. Write the file anew."
    return _Found(where, file, number, offset, length, content, problem)


def _has_checksum(content: bytes, checksum: bytes) -> bool:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(content)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return checksum == CHECKSUM.pack(masked)
