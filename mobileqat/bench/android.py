"""The target `android[:SERIAL]`: a phone or an emulator over adb, measured by LiteRT's own `benchmark_model`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mobileqat.bench import adb as adb_module
from mobileqat.bench.adb import Adb, Deadline, find_adb, list_devices, open_device
from mobileqat.bench.android_programs import INSTALL_APP, Apk, Executable, Program, is_installed
from mobileqat.bench.android_session import Session
from mobileqat.bench.android_state import identify, read_state, select_cores
from mobileqat.bench.benchmark_binary import PATH_VARIABLE, cached_path, download_command, find_binary
from mobileqat.bench.child import run_command
from mobileqat.bench.record import Check, Job, Outcome, Settings
from mobileqat.errors import DeviceError


class Android:
    """A device by its serial number, or the only one there is.

    Args:
        name: "android" or "android:SERIAL"; ANDROID_SERIAL stands in for a missing serial, as it does for adb.
        program: path of a `benchmark_model` or of its `.apk`, or "apk" for the one that is installed.  Default:
            the environment's MOBILEQAT_BENCHMARK_MODEL, else the cached or downloaded program for the device.
    """

    has_profiler = True
    integer_only = False

    def __init__(self, name: str, program: str | None = None) -> None:
        self.name = name
        self.serial = name.partition(":")[2] or os.environ.get("ANDROID_SERIAL") or None
        self.program = program or os.environ.get(PATH_VARIABLE) or None

    @property
    def _is_app(self) -> bool:
        return self.program is not None and (self.program == "apk" or self.program.endswith(".apk"))

    @property
    def computes(self) -> bool:
        """Whether outputs can be had: an app may not write them where adb can read."""
        return not self._is_app

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Runs all jobs; see `Target.run`.

        Raises:
            DeviceError: see there.  `measured` of the error is the `Outcome` of what was measured until then.
        """
        deadline = Deadline(settings.timeout_s)
        adb = open_device(self.serial, deadline)
        session = Session(adb, self._program(adb, settings), jobs, settings)
        try:
            try:
                session.run()
            finally:
                session.clean_up()
        except DeviceError as error:
            raise session.explained(error) from error
        return session.outcome()

    def check(self) -> list[Check]:
        """adb, a usable device, the program; see `Target.check`."""
        try:
            adb = find_adb()
        except DeviceError:
            return [Check("adb", None, adb_module.INSTALL)]
        abis: Sequence[str] = ("arm64-v8a",)
        client = None
        try:
            version = run_command([str(adb), "version"], 10, "adb version").stdout.splitlines()
            client = open_device(self.serial, Deadline(10))
            identity = identify(client)
        except DeviceError as error:
            listed = ", ".join(f"{device.serial} ({device.state})" for device in _listed(adb))
            device = Check("Android device", None, f"{error} Connected: {listed or 'none'}.")
        else:
            device = Check("Android device", f"{client.serial}: {identity.name}, {identity.system}")
            abis = identity.abis
        return [Check("adb", f"{adb} ({' '.join(version[:2])})"), device, self._check_program(abis, client)]

    def _check_program(self, abis: Sequence[str], client: Adb | None) -> Check:
        what = "benchmark_model"
        if self.program == "apk":
            is_there = client is not None and is_installed(client)
            return Check(what, Apk.PACKAGE) if is_there else Check(what, None, INSTALL_APP)
        if self.program:
            fix = f"set {PATH_VARIABLE} to a file that exists, or unset it"
            return Check(what, self.program) if Path(self.program).exists() else Check(what, None, fix)
        try:
            path = cached_path(abis)
        except DeviceError as error:
            return Check(what, None, str(error))
        if path.exists():
            return Check(what, str(path))
        return Check(f"{what} (else the first run downloads it)", None, download_command(path), is_needed=False)

    def _program(self, adb: Adb, settings: Settings) -> Program:
        """The program that measures, ready to be pushed."""
        identity = identify(adb)
        cores = select_cores(read_state(adb).cores, settings.cpus) if settings.cpus else ()
        if self._is_app:
            return Apk(adb, identity, None if self.program == "apk" else Path(str(self.program)), cores)
        return Executable(adb, identity, find_binary(identity.abis, self.program, adb.deadline), cores)


def _listed(adb: Path) -> list[adb_module.Device]:
    try:
        return list_devices(adb, 10)
    except DeviceError:
        return []
