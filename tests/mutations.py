"""Damaged `.tflite` files, drawn from a `random.Random`: bits, words, ends and splices of the bytes, and `fields`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

WORDS = (0, 1, 2, 4, 8, 0xFF, 0x7F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x10000)
INTEGERS = (*range(-3, 10), 16, 127, 128, 255, 1000, 2**15, 2**16, 2**20, 2**30, 2**31 - 1, -(2**31))
REALS = (0.0, -1.0, 1.0, 1e-30, 1e30, 0.5, float("inf"), float("nan"))
LARGE = 64  # bytes of a constant that are its values and nothing else


def bits(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(random.randint(1, 8)):
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def words(content: bytes, random: Random) -> bytes:
    """Some words outside the large constants are overwritten."""
    damaged = bytearray(content)
    places = _structure(content)
    for _ in range(random.randint(1, 3)):
        word = random.choice((*WORDS, random.getrandbits(32), random.randrange(64)))
        struct.pack_into("<I", damaged, random.choice(places), word)
    return bytes(damaged)


def structure_bits(content: bytes, random: Random) -> bytes:
    """Some bits outside the large constants are flipped."""
    damaged = bytearray(content)
    places = _structure(content)
    for _ in range(random.randint(1, 3)):
        damaged[random.choice(places) + random.randrange(4)] ^= 1 << random.randrange(8)
    return bytes(damaged)


def truncated(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def spliced(content: bytes, random: Random) -> bytes:
    """A piece of the file stands in another place, or is missing, or is there twice."""
    start, end, place = sorted(random.randrange(len(content)) for _ in range(3))
    piece = content[start:end]
    choices = (
        content[:start] + content[end:],
        content[:place] + piece + content[place:],
        content[: place - len(piece)] + piece + content[place:],
    )
    return random.choice(choices)


def offsets(content: bytes, random: Random) -> bytes:
    """A word is replaced by the distance to another place in the file."""
    damaged = bytearray(content)
    place = random.choice(_structure(content))
    target = random.randrange(len(content) // 4) * 4
    struct.pack_into("<i", damaged, place, random.choice((target - place, place - target)))
    return bytes(damaged)


def noise(content: bytes, random: Random) -> bytes:
    """Random bytes, sometimes behind the head of a model."""
    head = random.choice((b"", content[: random.randrange(64)], content[:4] + b"TFL3"))
    return head + random.randbytes(random.randrange(2000))


def fields(content: bytes, random: Random) -> bytes:
    """Some fields of the file's tables have other values; the file is packed anew, so that all offsets fit."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    slots = list(_slots(model))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(slots)(random)
    builder = flatbuffers.Builder(len(content) + 1024)
    try:
        builder.Finish(model.Pack(builder), b"TFL3")
    except (TypeError, ValueError, struct.error, OverflowError, flatbuffers.builder.BuilderNotFinishedError):
        return content  # a value that the field cannot hold
    return bytes(builder.Output())


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (bits, words, structure_bits, truncated, spliced, offsets, noise)


def _structure(content: bytes) -> list[int]:
    """The places of all words outside the large constants."""
    root = schema.Model.GetRootAs(content)
    is_free = np.ones(len(content) // 4, bool)
    for index in range(root.BuffersLength()):
        table = root.Buffers(index)._tab
        field = table.Offset(4)
        if field and table.VectorLen(field) > LARGE:
            start = table.Vector(field)
            is_free[start // 4 : (start + table.VectorLen(field)) // 4] = False
    return (4 * np.flatnonzero(is_free)[:-1]).tolist()


def _slots(table: Any) -> Iterator[Callable[[Random], None]]:
    """A function for each field below a table, that changes it."""
    for name, value in list(vars(table).items()):
        if isinstance(value, bool | int | float):
            yield lambda random, name=name, value=value: setattr(table, name, _other(value, random))
        elif isinstance(value, list | np.ndarray) and len(value) and not hasattr(value[0], "__dict__"):
            if len(value) <= LARGE and not isinstance(value[0], bytes | str):
                yield lambda random, name=name, value=value: setattr(table, name, _other_list(list(value), random))
        elif isinstance(value, list):
            for item in value:
                yield from _slots(item)
            if value:
                yield lambda random, value=value: value.pop(random.randrange(len(value))) if value else None
                yield lambda random, value=value: random.shuffle(value)
        elif hasattr(value, "__dict__"):
            yield from _slots(value)
            if not isinstance(value, schema.SubGraphT):
                yield lambda random, name=name: setattr(table, name, None)


def _other(value: Any, random: Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return random.choice((*REALS, -value, value * 2))
    return random.choice((*INTEGERS, value + 1, value - 1, -value, value ^ (1 << random.randrange(8))))


def _other_list(values: list, random: Random) -> list:
    action = random.randrange(5)
    place = random.randrange(len(values))
    if action == 0:
        del values[place]
    elif action == 1:
        values.insert(place, random.choice((values[place], 1)))
    elif action == 2:
        random.shuffle(values)
    else:
        bound = isinstance(values[place], np.integer) and values[place].dtype == np.uint8
        other = _other(values[place].item() if isinstance(values[place], np.generic) else values[place], random)
        values[place] = other & 255 if bound else other
    return values
