"""A thin client of the real `adb` program, every call bounded by time.

What adb gets wrong is put right here: its exit code says nothing about the command (a device that dies looks like
success), so every command ends with a marker of its own that carries the exit code; it waits for devices forever, so
states are polled; and a network device that came back is "already connected" until it is disconnected.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobileqat.bench.child import run_command
from mobileqat.errors import DeviceError

SETTLE_S = 5.0  # a server that has just started lists its devices one by one
ANSWER_S = 30.0  # for whatever should take no time at all
INSTALL = "pip install 'mobileqat[android]'"

REMEDIES = {
    "unauthorized": "unlock it and accept 'Allow USB debugging?'; if nothing is asked, run: adb kill-server, replug it",
    "authorizing": "unlock it and accept 'Allow USB debugging?'",
    "offline": "replug it, or run: adb reconnect offline",
    "connecting": "wait, or replug it",
    "no permissions": "this account may not open the USB device; on Debian or Ubuntu run: "
    "sudo apt install android-sdk-platform-tools-common && sudo usermod -aG plugdev $USER, log in again, replug it",
    "missing": "connect it with USB debugging on, then look for it with: adb devices -l",
}
_NOT_STARTED = re.compile(r"device '.*' not found|device offline|no devices/emulators found|error: closed")


@dataclass(frozen=True)
class Device:
    """A line of `adb devices -l`; `state` is "device" for one that can be used."""

    serial: str
    state: str
    description: str = ""


@dataclass(frozen=True)
class Result:
    """What a command on the device printed, and its own exit code."""

    output: str
    code: int


class Deadline:
    """A moment before which everything has to be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, at_most: float = float("inf")) -> float:
        """Seconds until then, but no more than `at_most`.

        Raises:
            DeviceError: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeviceError(f"Measuring was stopped, the {self.seconds:g} s that it may take are over.")
        return min(left, at_most)


def find_adb() -> Path:
    """The program: on PATH, in the Android SDK, or the one that the package adbutils brings.

    Raises:
        DeviceError: there is none; the message says how to get one.
    """
    on_path = shutil.which("adb")
    if on_path:
        return Path(on_path)
    name = "adb.exe" if os.name == "nt" else "adb"
    kits = [os.environ.get(key) for key in ("ANDROID_HOME", "ANDROID_SDK_ROOT")]
    folders = [Path(kit, "platform-tools") for kit in kits if kit]
    package = importlib.util.find_spec("adbutils")  # found, not imported: it pulls in a network stack
    if package and package.origin:
        folders.append(Path(package.origin).parent / "binaries")
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return folder / name
    raise DeviceError(
        "adb was not found on PATH nor in ANDROID_HOME. Install it with: pip install 'mobileqat[android]'"
    )


def list_devices(adb: Path, timeout_s: float = ANSWER_S) -> list[Device]:
    """All that adb's server knows about; starts the server if it is not running.

    Raises:
        DeviceError: the server cannot be started or does not answer.
    """
    try:
        done = run_command([str(adb), "devices", "-l"], _tenths(timeout_s), "adb devices")
    except DeviceError as error:
        raise DeviceError(f"{error} Restart its server with: adb kill-server") from error
    if done.returncode:
        raise DeviceError(f"adb's server cannot be reached: {_brief(done.stderr or done.stdout)}")
    return parse_devices(done.stdout)


def parse_devices(text: str) -> list[Device]:
    """The devices in the output of `adb devices -l`, whatever the server says before them."""
    lines = text.partition("List of devices attached")[2].splitlines()
    rows = (re.match(r"(\S+)\s+(no permissions|\S+)\s*(.*)", line) for line in lines)
    return [Device(*row.groups()) for row in rows if row]


def open_device(serial: str | None, deadline: Deadline) -> Adb:
    """The client of one usable device.

    Args:
        serial: None takes the only device there is.
        deadline: for this and for every later command.

    Raises:
        DeviceError: no adb, no such device, several to choose from, or one that is not ready; with what to do.
    """
    adb = find_adb()
    end = time.monotonic() + SETTLE_S
    while True:
        devices = list_devices(adb, deadline.left(ANSWER_S))
        chosen = _choose(devices, serial)
        if chosen and chosen.state == "device":
            return Adb(adb, chosen.serial, deadline)
        if time.monotonic() > end:
            raise DeviceError(_refusal(chosen, serial))
        if serial and ":" in serial and (chosen is None or chosen.state == "offline"):
            connect(adb, serial, deadline)
        time.sleep(0.2)


def connect(adb: Path, serial: str, deadline: Deadline) -> None:
    """Connects to a device in the network; whether that worked shows in the list of devices."""
    for command in ("disconnect", "connect"):
        run_command([str(adb), command, serial], deadline.left(ANSWER_S), f"adb {command} {serial}")


class Adb:
    """Commands, pushes and pulls with one device."""

    def __init__(self, path: Path, serial: str, deadline: Deadline) -> None:
        self.path, self.serial, self.deadline = path, serial, deadline

    def shell(self, script: str, what: str, timeout_s: float = ANSWER_S) -> Result:
        """Runs a shell script on the device to its end; stdout and stderr together.

        Args:
            script: for the device's `sh`, quoted by the caller.
            what: for messages.
            timeout_s: the longest it may take, on top of the deadline.

        Raises:
            DeviceError: the device or the connection went away, or it takes too long.
        """
        marker = f"mobileqat-{secrets.token_hex(8)}"
        ended = f"({script}\n) 2>&1; c=$?; echo; echo {marker} $c"
        for attempt in range(2):
            done = self._run(["shell", ended], what, timeout_s)
            text = done.stdout.replace("\r\n", "\n")
            end = re.search(rf"\n{marker} (\d+)\n\Z", text)
            if end:
                return Result(text[: end.start()], int(end[1]))
            if attempt or not _NOT_STARTED.search(done.stderr) or not self._is_back():
                break
        raise DeviceError(f"{what}: {self._diagnosis(text + done.stderr)}")

    def checked(self, script: str, what: str, timeout_s: float = ANSWER_S) -> str:
        """The output of a script that has to succeed.

        Raises:
            DeviceError: as `shell`, and for an exit code other than 0.
        """
        result = self.shell(script, what, timeout_s)
        if result.code:
            raise DeviceError(f"{what} failed with exit code {result.code}: {_brief(result.output)}")
        return result.output

    def push(self, source: Path, remote: str, timeout_s: float) -> None:
        """Copies a file or a folder to the device.

        Raises:
            DeviceError: no room, the device went away, or it takes too long.
        """
        self._copy(["push", str(source), remote], "Copying the files to the device", timeout_s)

    def pull(self, remote: str, target: Path, timeout_s: float) -> None:
        """Copies a file from the device; errors as for `push`."""
        self._copy(["pull", remote, str(target)], f"Fetching {remote.rpartition('/')[2]} from the device", timeout_s)

    def install(self, package: Path, timeout_s: float) -> None:
        """Installs an APK; errors as for `push`."""
        self._copy(["install", "-r", "-d", "-g", str(package)], f"Installing {package.name}", timeout_s)

    def _copy(self, arguments: Sequence[str], what: str, timeout_s: float) -> None:
        done = self._run(arguments, what, timeout_s)
        text = done.stdout + done.stderr
        if "No space left" in text or "INSUFFICIENT_STORAGE" in text:
            raise DeviceError(f"{what}: its storage is full. Make room; look with: {self.hint('df /data')}")
        if done.returncode or "\nFailure [" in text:
            raise DeviceError(f"{what}: {self._diagnosis(text)}")

    def _run(self, arguments: Sequence[str], what: str, timeout_s: float):
        command = [str(self.path), "-s", self.serial, *arguments]
        return run_command(command, _tenths(self.deadline.left(timeout_s)), what)

    def hint(self, command: str) -> str:
        """The command line that runs a command on this device by hand."""
        return f"adb -s {shlex.quote(self.serial)} shell {command}"

    def state(self) -> str:
        """The device's state, "missing" for one that adb does not list."""
        chosen = _choose(list_devices(self.path, self.deadline.left(ANSWER_S)), self.serial)
        return chosen.state if chosen else "missing"

    def _is_back(self) -> bool:
        """Whether the device can be used now: a server that was just started has to find it again."""
        try:
            open_device(self.serial, self.deadline)
        except DeviceError:
            return False
        return True

    def _diagnosis(self, text: str) -> str:
        """Why a command has no end, in words."""
        try:
            state = self.state()
        except DeviceError as error:
            return f"the connection to {self.serial} broke. {error}"
        if state == "device":
            return f"the connection to {self.serial} broke or the command was killed: {_brief(text)}"
        return f"{self.serial} went away (it is {state} now): {REMEDIES.get(state, 'wait until it is back')}."


def _choose(devices: Sequence[Device], serial: str | None) -> Device | None:
    """The device of that serial; without one the only device, a usable one first.

    Raises:
        DeviceError: there are several.
    """
    if serial is not None:
        return next((device for device in devices if device.serial == serial), None)
    usable = [device for device in devices if device.state == "device"] or list(devices)
    if len(usable) > 1:
        serials = ", ".join(f"android:{device.serial}" for device in usable)
        raise DeviceError(f"Several devices are connected. Expected one of: {serials}.")
    return usable[0] if usable else None


def _refusal(device: Device | None, serial: str | None) -> str:
    if device is None:
        what = f"The Android device {serial} is not connected" if serial else "No Android device is connected"
        return f"{what}: {REMEDIES['missing']}."
    remedy = REMEDIES.get(device.state, "start Android on it")
    return f"The Android device {device.serial} cannot be used, it is '{device.state}': {remedy}."


def _tenths(seconds: float) -> float:
    """Seconds as messages show them."""
    return max(round(seconds, 1), 0.1)


def _brief(text: str, limit: int = 300) -> str:
    """The last lines of a program's output, in one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-limit:] or "no message"
