"""What is installed of what mobileqat itself uses; targets check their own needs (`Target.check`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mobileqat.bench.record import Check

NEEDED = ("tensorflow", "keras", "ai-edge-litert", "numpy")
# Of extras: what for, and the packages.
OPTIONAL = {
    "tfmot": ("engine tfmot, and Keras 2 models in SavedModels", ("tensorflow-model-optimization", "tf-keras")),
}


def check_installation() -> list[Check]:
    """Python, packages, and folders that are set; quick, imports nothing heavy."""
    return list(_checks())


def _checks() -> Iterator[Check]:
    yield Check("mobileqat", _version("mobileqat"), "pip install mobileqat")
    yield Check("Python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})")
    for package in NEEDED:
        yield Check(package, _version(package), f"pip install {package}")
    for extra, (purpose, packages) in OPTIONAL.items():
        versions = [_version(package) for package in packages]
        found = ", ".join(f"{name} {version}" for name, version in zip(packages, versions, strict=True))
        fix = f'pip install "mobileqat[{extra}]"'
        yield Check(f"{' and '.join(packages)} ({purpose})", found if all(versions) else None, fix, is_needed=False)
    yield _folder("MOBILEQAT_DATA", "datasets that are looked for before they are downloaded")
    yield _folder("MOBILEQAT_CACHE", "downloads; else in ~/.cache")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _folder(variable: str, purpose: str) -> Check:
    """A variable that is set has to name a folder."""
    path, what = os.environ.get(variable), f"{variable} ({purpose})"
    if path and variable == "MOBILEQAT_DATA" and not Path(path).is_dir():
        return Check(what, None, f"'{path}' is no folder: mkdir -p '{path}', or unset {variable}")
    return Check(what, path or None, f"export {variable}=FOLDER", is_needed=False)
