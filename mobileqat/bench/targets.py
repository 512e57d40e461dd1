"""The table of targets, and the one way from a name on the command line to one of them.

`host`, `arm:cortex-a53`, `android`, `android:SERIAL`, `ssh://user@host`, `ethos-u55-128`: the part before the first
colon selects the row, the target's own module reads the rest.  Modules are imported when a target is asked for.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobileqat.errors import DeviceError

if TYPE_CHECKING:
    from mobileqat.bench.record import Target


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

USAGES = ", ".join(row.usage for row in TARGETS.values())


def parse_target(name: str) -> Target:
    """The target that a name stands for; nothing is run or connected.

    Raises:
        DeviceError: no such target, or a name that its module refuses.
    """
    module, _, factory = find_row(name).factory.partition(":")
    return getattr(importlib.import_module(module), factory)(name)


def require_target(target: Target) -> None:
    """Checks that a target has what it needs.

    Raises:
        DeviceError: it has not; the message says what is missing and what provides it.
    """
    missing = [check for check in target.check() if check.is_needed and check.found is None]
    if missing:
        lines = [f"  {check.what}: missing{f'. {check.fix}' if check.fix else ''}" for check in missing]
        raise DeviceError("\n".join([f"The target {target.name} cannot be used:", *lines]))


def find_row(name: str) -> Row:
    """The row of a target's name.

    Raises:
        DeviceError: there is none.
    """
    for row in TARGETS.values():
        if re.fullmatch(row.pattern, name):
            return row
    raise DeviceError(f"There is no target '{name}'. Expected one of: {USAGES}.")
