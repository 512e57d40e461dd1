"""The table of targets, and the one way from a name on the command line to one of them.

`host`, `arm:cortex-a53`, `android`, `android:SERIAL`, `ssh://user@host`, `ethos-u55-128`: the part before the first
colon selects the row, the target's own module reads the rest.  Modules are imported when a target is asked for.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

from mobileqat.bench.record import Target
from mobileqat.errors import DeviceError


@dataclass(frozen=True)
class Row:
    """Which names a target has (a pattern), how to write one, and the function that makes it from its name."""

    pattern: str
    usage: str
    factory: str
    meaning: str


TARGETS: dict[str, Row] = {
    "host": Row(r"host", "host", "mobileqat.bench.host:Host", "this machine"),
    "arm": Row(r"arm:.+", "arm:cortex-a53", "mobileqat.bench.arm:EmulatedArm", "an ARM core under qemu, instructions"),
    "android": Row(r"android(:.+)?", "android[:SERIAL]", "mobileqat.bench.android:Android", "a phone, over adb"),
    "ssh": Row(r"ssh://.+", "ssh://user@host", "mobileqat.bench.ssh:Ssh", "an ARM Linux board, over ssh"),
    "ethos-u": Row(r"ethos-u.+", "ethos-u55-128", "mobileqat.bench.vela:Vela", "an Arm NPU, compiled by Vela"),
}


def parse_target(name: str) -> Target:
    """The target that a name stands for; nothing is run or connected.

    Raises:
        DeviceError: no such target, or a name that its module refuses.
    """
    for row in TARGETS.values():
        if re.fullmatch(row.pattern, name):
            module, _, factory = row.factory.partition(":")
            return getattr(importlib.import_module(module), factory)(name)
    usages = ", ".join(row.usage for row in TARGETS.values())
    raise DeviceError(f"There is no target '{name}'. Expected one of: {usages}.")
