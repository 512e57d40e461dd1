"""Which `benchmark_model` runs on a device: one given by path, the one in the cache, or a fresh download.

The official builds are nightly ones under a fixed address, so no checksum can be written down here.  What is decided:
the first download over https is trusted and its sha256 kept beside it; from then on the cached file is used only while
it has that sha256, and is never replaced by itself.  MOBILEQAT_BENCHMARK_MODEL_SHA256 pins a build of one's own choice,
and every measurement names the first digits of the sha256 of the program that made it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shlex
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobileqat.bench.adb import Deadline
from mobileqat.data.cache import cache_folder
from mobileqat.errors import DeviceError

BASE_URL = "https://storage.googleapis.com/tensorflow-nightly-public/prod/tensorflow/release/lite/tools/nightly/latest"
PUBLISHED = {"arm64-v8a": "android_aarch64_benchmark_model", "armeabi-v7a": "android_arm_benchmark_model"}
PATH_VARIABLE, SHA256_VARIABLE = "MOBILEQAT_BENCHMARK_MODEL", "MOBILEQAT_BENCHMARK_MODEL_SHA256"
BUILD = "bazel build -c opt --config=android_{} //tensorflow/lite/tools/benchmark:benchmark_model"

# ELF class (1: 32 bits, 2: 64 bits) and machine.
MACHINES = {"arm64-v8a": (2, 183), "armeabi-v7a": (1, 40), "x86_64": (2, 62), "x86": (1, 3), "riscv64": (2, 243)}
_LARGEST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Binary:
    """A program that fits a device, and what to say about it."""

    path: Path
    abi: str
    sha256: str
    warnings: tuple[str, ...] = ()


def find_binary(abis: Sequence[str], given: str | None, deadline: Deadline) -> Binary:
    """The program for a device.

    Args:
        abis: what the device runs, its own first.
        given: path of a program; None takes the cached one, or downloads it.
        deadline: for the download.

    Raises:
        DeviceError: no such file, one for another processor or another sha256, none published for the device, or the
            download fails.
    """
    path, notes = (Path(given), []) if given else _cached(abis, deadline)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeviceError(f"benchmark_model cannot be read: {error}") from error
    abi = abi_of(content, str(path))
    if abi not in abis:
        raise DeviceError(
            f"{path} is a program for {abi}. Expected one for {' or '.join(abis)}, which the device runs."
        )
    sha256 = hashlib.sha256(content).hexdigest()
    wanted = os.environ.get(SHA256_VARIABLE)
    if wanted and wanted.lower() != sha256:
        raise DeviceError(
            f"{path} is not the program that {SHA256_VARIABLE} asks for. Expected {wanted}, got {sha256}."
        )
    if abi[:3] != abis[0][:3]:
        notes.append(f"The device is {abis[0]} and translates the program, which is built for {abi}.")
    return Binary(path, abi, sha256, tuple(notes))


def abi_of(content: bytes, what: str) -> str:
    """The ABI that a program is built for, from its ELF header.

    Raises:
        DeviceError: it is no program for Android.
    """
    if content[:4] != b"\x7fELF" or len(content) < 64:
        raise DeviceError(f"{what} is not a program: it has no ELF header.")
    if b"/ld-linux" in content[:4096]:
        raise DeviceError(f"{what} is built for Linux, not for Android. Expected one of {sorted(PUBLISHED.values())}.")
    machine = content[4], int.from_bytes(content[18:20], "little")
    for abi, expected in MACHINES.items():
        if machine == expected:
            return abi
    raise DeviceError(
        f"{what} is a program for an unknown processor (ELF machine {machine[1]}, {32 * machine[0]} bits)."
    )


def cached_path(abis: Sequence[str]) -> Path:
    """Where the program for a device is kept; it need not exist.

    Raises:
        DeviceError: none is published for the device.
    """
    for abi in abis:
        if abi in PUBLISHED:
            return cache_folder() / "benchmark_model" / PUBLISHED[abi]
    own = abis[0] if abis else "it"
    raise DeviceError(
        f"No benchmark_model is published for {own}. Build one ({BUILD.format(own)}) and set {PATH_VARIABLE} to it."
    )


def download_command(path: Path) -> str:
    """The command line that puts a published program into the cache."""
    return shlex.join(["curl", "--create-dirs", "-fLo", str(path), f"{BASE_URL}/{path.name}"])


def _cached(abis: Sequence[str], deadline: Deadline) -> tuple[Path, list[str]]:
    """The program in the cache, downloaded if it is not there; and what to say about it."""
    path = cached_path(abis)
    record = path.with_name(f"{path.name}.json")
    if not path.exists():
        _download(f"{BASE_URL}/{path.name}", path, deadline)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        known = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        record.write_text(json.dumps({"sha256": sha256, "url": f"{BASE_URL}/{path.name}"}), encoding="utf-8")
        return path, [f"benchmark_model is new here and trusted from now on: {SHA256_VARIABLE}={sha256} pins it."]
    if known != sha256:
        raise DeviceError(
            f"{path} was changed after it was first used: delete it and {record.name} to download it again."
        )
    return path, []


def _download(url: str, path: Path, deadline: Deadline) -> None:
    """Fetches a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            with urllib.request.urlopen(url, timeout=deadline.left(30)) as answer:
                expected = answer.headers.get("Content-Length")
                while chunk := answer.read(2**18):
                    file.write(chunk)
                    deadline.left()
                    if file.tell() > _LARGEST_BYTES:
                        raise DeviceError(f"{url} is larger than {_LARGEST_BYTES} bytes.")
            if expected is not None and file.tell() != int(expected):
                raise DeviceError(f"{url} was cut off after {file.tell()} of {expected} bytes.")
            file.close()
            os.chmod(file.name, 0o755)
            os.replace(file.name, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            os.unlink(file.name)
            hint = f"Download it elsewhere and set {PATH_VARIABLE} to the file."
            raise DeviceError(f"benchmark_model cannot be downloaded from {url}: {error}. {hint}") from error
        except BaseException:
            os.unlink(file.name)
            raise
