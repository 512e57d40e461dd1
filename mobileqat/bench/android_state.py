"""What an Android device is and how it is doing: cores, clocks, governor, temperature, throttling, battery.

One script prints everything in sections; the functions below it read the sections.  A device may hide any of them
from the shell's account, so every value may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mobileqat.bench.adb import Adb
from mobileqat.errors import DeviceError

PROPERTIES = """
for p in ro.product.manufacturer ro.product.model ro.soc.model ro.board.platform ro.hardware ro.product.cpu.abi \\
  ro.product.cpu.abilist ro.build.version.release ro.build.version.sdk ro.build.fingerprint ro.kernel.qemu \\
  ro.boot.qemu sys.boot_completed
do echo "$p=$(getprop $p)"; done
"""

STATE = """
cd /sys/devices/system/cpu && for c in cpu[0-9]*; do
  f=$c/cpufreq; o=1; [ -r $c/online ] && o=$(cat $c/online)
  echo "core ${c#cpu} $o $(cat $f/cpuinfo_max_freq || echo -) $(cat $f/scaling_max_freq || echo -) \\
$(cat $f/scaling_governor || echo -)"
done 2>/dev/null
cd /sys/class/thermal && for z in thermal_zone*; do
  echo "zone $(cat $z/temp || echo -) $(cat $z/type)"
done 2>/dev/null
echo "section thermalservice"; dumpsys thermalservice 2>/dev/null
echo "section battery"; dumpsys battery 2>/dev/null
true
"""

STATUS_NAMES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_CPU, _SKIN = 0, 3  # android.hardware.thermal.TemperatureType


@dataclass(frozen=True)
class Core:
    """A CPU core; clocks in kHz, 0 where they are hidden."""

    index: int
    is_online: bool
    max_khz: int
    allowed_khz: int
    governor: str


@dataclass(frozen=True)
class State:
    """How the device is doing at a moment.

    Attributes:
        cores: by index.
        temperature_c: of the hottest core, or the skin's, or the battery's: the first of these that can be read.
        thermal_status: Android's, 0 (none) to 6 (shutdown); a device throttles from 1 on.
        battery_percent, is_charging: None where there is no battery.
    """

    cores: tuple[Core, ...] = ()
    temperature_c: float | None = None
    thermal_status: int | None = None
    battery_percent: int | None = None
    is_charging: bool | None = None


@dataclass(frozen=True)
class Identity:
    """What the device is; `properties` are those of `PROPERTIES`, empty ones left out."""

    serial: str
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.properties.get(f"ro.product.{key}", "") for key in ("manufacturer", "model")]
        return " ".join(part for part in parts if part) or self.serial

    @property
    def soc(self) -> str:
        keys = ("ro.soc.model", "ro.board.platform", "ro.hardware")
        return next((self.properties[key] for key in keys if key in self.properties), "unknown")

    @property
    def system(self) -> str:
        release, sdk = (self.properties.get(f"ro.build.version.{key}", "?") for key in ("release", "sdk"))
        return f"Android {release} (API {sdk})"

    @property
    def abis(self) -> tuple[str, ...]:
        """What the device runs, its own first."""
        own = self.properties.get("ro.product.cpu.abi", "")
        every = self.properties.get("ro.product.cpu.abilist", "").split(",")
        return tuple(dict.fromkeys(abi for abi in (own, *every) if abi))

    @property
    def is_emulator(self) -> bool:
        flags = {self.properties.get(key) for key in ("ro.kernel.qemu", "ro.boot.qemu")}
        return "1" in flags or self.properties.get("ro.hardware") in ("ranchu", "goldfish")


def identify(adb: Adb) -> Identity:
    """Asks a device what it is.

    Raises:
        DeviceError: it does not answer, or has not finished booting.
    """
    lines = adb.checked(PROPERTIES, "Asking the device what it is").splitlines()
    pairs = (line.strip().partition("=") for line in lines)
    properties = {key: value for key, _, value in pairs if value}
    if properties.get("sys.boot_completed") != "1":
        raise DeviceError(f"The Android device {adb.serial} is still booting: wait until its home screen is there.")
    return Identity(adb.serial, properties)


def read_state(adb: Adb) -> State:
    """Asks a device how it is doing.

    Raises:
        DeviceError: it does not answer.
    """
    return parse_state(adb.shell(STATE, "Asking the device for its temperature").output)


def parse_state(text: str) -> State:
    """The state in the output of `STATE`."""
    cores, _, rest = text.partition("section thermalservice")
    thermal, _, battery = rest.partition("section battery")
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    level, charge = (
        parse_battery(battery),
        re.search(r"^\s*(?:AC|USB|Wireless|Dock) powered: true", battery, re.MULTILINE),
    )
    return State(
        cores=parse_cores(cores),
        temperature_c=_temperature(cores, thermal, battery),
        thermal_status=int(status[1]) if status else None,
        battery_percent=level,
        is_charging=None if level is None else bool(charge),
    )


def parse_cores(text: str) -> tuple[Core, ...]:
    """The lines "core INDEX ONLINE MAX ALLOWED GOVERNOR", by index."""
    rows = re.findall(r"^core (\d+) (\d) (\S+) (\S+) +(\S+)", text, re.MULTILINE)
    cores = [Core(int(i), o == "1", _number(m), _number(a), g) for i, o, m, a, g in rows]
    return tuple(sorted(cores, key=lambda core: core.index))


def parse_battery(text: str) -> int | None:
    """Percent in `dumpsys battery`, None without a battery."""
    numbers = {key: int(value) for key, value in re.findall(r"^  (level|scale): (-?\d+)", text, re.MULTILINE)}
    if re.search(r"^  present: false", text, re.MULTILINE) or numbers.get("level", -1) < 0:
        return None
    return round(100 * numbers["level"] / (numbers.get("scale") or 100))


def parse_temperatures(text: str) -> list[tuple[int, float]]:
    """(type, degrees Celsius) in `dumpsys thermalservice`: the present ones, else those of the last event.

    Cached values may be hours old.  Sensors that are not there read 0 or a large negative number.
    """
    cached, _, present = text.partition("Current temperatures from HAL:")
    present = re.split(r"Current cooling devices|Temperature static", present)[0]
    rows = re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=(-?\d+)", present or cached)
    return [(int(kind), float(value)) for value, kind in rows if 0 < float(value) < 150]


def _temperature(zones: str, thermal: str, battery: str) -> float | None:
    sensors = parse_temperatures(thermal)
    for wanted in (_CPU, _SKIN):
        values = [value for kind, value in sensors if kind == wanted]
        if values:
            return max(values)
    rows = re.findall(r"^zone (\d+) (.*)", zones, re.MULTILINE)
    cores = [int(value) / 1000 for value, kind in rows if re.search(r"cpu|soc|tsens|x86_pkg|big|little", kind, re.I)]
    cores = [value for value in cores if 0 < value < 150]
    if cores:
        return max(cores)
    tenths = re.search(r"^  temperature: (\d+)", battery, re.MULTILINE)
    return int(tenths[1]) / 10 if tenths else None


def select_cores(cores: Sequence[Core], cpus: str) -> tuple[int, ...]:
    """The cores that "big", "little" or a list such as "0,4-7" stands for.

    "little" are the cores of the lowest top clock, "big" all others; where all cores are alike both are all of them.

    Raises:
        DeviceError: no such core, one that is offline, hidden clocks, or a list that cannot be read.
    """
    online = [core for core in cores if core.is_online]
    if cpus in ("big", "little"):
        clocks = {core.max_khz for core in online}
        if not clocks or 0 in clocks:
            raise DeviceError(f"The device hides its cores' clocks: give a list such as 4-7 in place of '{cpus}'.")
        slowest = min(clocks)
        wanted = [core.index for core in online if len(clocks) == 1 or (core.max_khz == slowest) == (cpus == "little")]
        return tuple(wanted)
    if not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*", cpus):
        raise DeviceError(f"cpus expects 'big', 'little' or a list such as '0' or '4-7'. Received: '{cpus}'")
    ranges = [[int(end) for end in part.split("-")] for part in cpus.split(",")]
    chosen = tuple(sorted({core for ends in ranges for core in range(ends[0], ends[-1] + 1)}))
    missing = set(chosen) - {core.index for core in online}
    if missing or not chosen:
        there = [core.index for core in online]
        raise DeviceError(f"The device has no cores {sorted(missing)} online. Expected some of {there}, got '{cpus}'.")
    return chosen


def core_mask(cores: Sequence[int]) -> str:
    """The hexadecimal mask that `taskset` takes."""
    return f"{sum(1 << core for core in cores):x}"


def warnings_of(identity: Identity, states: Sequence[State], cores: Sequence[int]) -> list[str]:
    """What makes numbers less trustworthy, seen in the states before, between and after measuring."""
    warnings = []
    if identity.is_emulator:
        warnings.append("The latency of an emulator is not representative of a phone.")
    status = max((state.thermal_status or 0 for state in states), default=0)
    if status:
        name = STATUS_NAMES[min(status, len(STATUS_NAMES) - 1)]
        warnings.append(f"The device was throttled: thermal status {status} ({name}). Let it cool and measure again.")
    for core in sorted({core.index for state in states for core in state.cores if _is_held_back(core, cores)}):
        warnings.append(f"Core {core} was not allowed its top clock, by heat or a power saving mode.")
    level = states[-1].battery_percent if states else None
    if level is not None and level < 20 and not states[-1].is_charging:
        warnings.append(f"The battery was at {level} %: power saving may slow the device.")
    return warnings


def _is_held_back(core: Core, used: Sequence[int]) -> bool:
    return (not used or core.index in used) and 0 < core.allowed_khz < core.max_khz


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
