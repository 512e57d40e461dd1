"""A board with Linux and Python, over the system's `ssh`: `ssh://[user@]host[:port][?python=/usr/bin/python3.11]`.

The board needs Python 3.9 or newer with NumPy and a runtime; nothing of this package is installed there.  One
connection does everything: `board.py` and a job folder go in, the worker's results come out.  Keys, host keys, jump
hosts and aliases are ssh's own business, and so its configuration applies; nothing is ever asked interactively.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobileqat.bench import board
from mobileqat.bench.child import WORKER, core_numbers, measurements, read_result, write_jobs
from mobileqat.bench.record import Check, Job, Measurement, Outcome, Settings
from mobileqat.errors import DeviceError

# ssh puts user and host into command lines of its configuration: neither has a character that a shell knows.
_NAME = re.compile(
    r"ssh://(?:(?P<user>\w[\w.+-]*)@)?(?P<host>\[[\w:.%]+\]|\w[\w.-]*)(?::(?P<port>[0-9]{1,5}))?/?(?:\?python=(?P<python>.+))?",
    re.ASCII,
)
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    # Notices a board that is gone within 15 s.
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
# Reads the program from the connection, too: it would not fit on every shell's command line.
_BOOTSTRAP = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
_PATIENCE_S = 30.0  # beyond the worker's time, for connecting and sending
_LIMIT_BYTES = 1 << 30

_REFUSALS: tuple[tuple[str, str], ...] = (
    (r"Could not resolve hostname", "the host is unknown"),
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the one it had before"),
    (r"Host key verification failed|No \S+ host key is known", "its host key is not known: connect by hand once"),
    (r"Connection refused", "it refuses the connection"),
    (r"Permission denied \(", "it does not accept the key: connect by hand without a password first"),
    (r"No route to host|Network is unreachable|timed out", "it cannot be reached"),
    (r"Bad configuration option|Bad owner or permissions", "ssh refuses its configuration"),
)


class Ssh:
    """A board.

    Args:
        name: the address; `python` is the interpreter to use there, by default `python3`.

    Raises:
        DeviceError: the address has another form.
    """

    has_profiler = False
    integer_only = False
    computes = True

    def __init__(self, name: str):
        match = _NAME.fullmatch(name)
        if not match:
            raise DeviceError(f"Expected ssh://[user@]host[:port][?python=/path/to/python3]. Received: '{name}'")
        self.name = name
        self._host = match["host"].strip("[]")
        self._login = [
            *(["-l", match["user"]] if match["user"] else []),
            *(["-p", match["port"]] if match["port"] else []),
        ]
        self._python = match["python"] or "python3"

    def run(self, jobs: Sequence[Job], settings: Settings) -> Outcome:
        """Works on all files in one process on the board; costs are milliseconds.

        Raises:
            DeviceError: no connection or a lost one, no Python, NumPy or runtime there, or the worker crashes, takes
                too long, or cannot run a file.
        """
        with tempfile.TemporaryDirectory(prefix="mobileqat-ssh-") as name:
            sent, returned = Path(name, "sent"), Path(name, "returned")
            sent.mkdir()
            returned.mkdir()
            write_jobs(sent, jobs, settings, core_numbers(settings.cpus))
            shutil.copy(WORKER, sent / "worker.py")
            report = self._call(_pack(sent), returned, _expected(jobs), settings.timeout_s)
            if report["returncode"] is None:
                raise DeviceError(f"The worker on {self.name} was stopped after {settings.timeout_s:g} s.")
            version, measured = self._results(returned, jobs, report)
        device, warnings = _device(report)
        return Outcome(measured, "ms", settings.runtime, version, device, warnings)

    def check(self) -> list[Check]:
        address = shlex.join(["ssh", *self._login, self._host])
        # Quoted for the shell there, and as a whole for the one here.
        python = shlex.quote(shlex.quote(self._python))
        install = f"{address} {python} -m pip install numpy ai-edge-litert"
        if shutil.which("ssh") is None:
            return [Check("the program ssh", None, "apt install openssh-client")]
        try:
            with tempfile.TemporaryDirectory(prefix="mobileqat-ssh-") as folder:
                report = self._call(b"", Path(folder), {"board.json"}, 0.0)
        except DeviceError as error:
            return [Check(f"a connection to {self.name} ({error})", None, f"{address} {python} --version")]
        device, packages = report["device"], report["packages"]
        runtimes = [f"{package} {packages[package]}" for package in board.PACKAGES[1:] if package in packages]
        return [
            Check(f"a connection to {self.name}", f"{device.get('name', '')}, Python {device.get('python', '')}"),
            Check("NumPy on the board", packages.get("numpy"), "" if "numpy" in packages else install),
            Check("a runtime on the board", ", ".join(runtimes) or None, "" if runtimes else install),
        ]

    def _call(self, archive: bytes, folder: Path, expected: set[str], timeout_s: float) -> dict[str, Any]:
        """Sends the archive, unpacks the answer into the folder, and returns the board's report."""
        source = Path(board.__file__).read_bytes()
        header = json.dumps({"size": len(archive), "timeout_s": timeout_s}).encode()
        payload = b"%d\n%s%s\n%s" % (len(source), source, header, archive)
        options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
        remote = f"{shlex.quote(self._python)} -c {shlex.quote(_BOOTSTRAP)}"
        with tempfile.TemporaryFile() as answer:
            # Anything that ends this call, Ctrl-C too, ends ssh, and with it the worker on the board.
            done = self._ssh(["-T", *options, *self._login, "--", self._host, remote], payload, answer, timeout_s)
            size = answer.tell()
            answer.seek(0)
            _, mark, rest = answer.read().rpartition(board.MARK) if size <= _LIMIT_BYTES else (b"", b"", b"")
        if done.returncode or not mark:
            raise DeviceError(f"{self.name}: {self._reason(done)}")
        try:
            length, _, content = rest.partition(b"\n")
            if len(content) != int(length):
                raise ValueError("the answer is incomplete")
            _unpack(content, folder, expected)
            return json.loads((folder / "board.json").read_text(encoding="utf-8"))
        except (ValueError, OSError, tarfile.TarError) as error:
            raise DeviceError(f"{self.name} sent no usable answer: {error}") from error

    def _ssh(
        self, arguments: Sequence[str], payload: bytes, answer: Any, timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        limit_s = timeout_s + _PATIENCE_S
        try:
            return subprocess.run(
                ["ssh", *arguments], input=payload, stdout=answer, stderr=subprocess.PIPE, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"The connection to {self.name} was closed after {limit_s:g} s.") from None
        except (OSError, ValueError) as error:  # no argument can hold a zero byte
            raise DeviceError(f"ssh cannot be started ({error}): apt install openssh-client") from error

    def _reason(self, done: subprocess.CompletedProcess[bytes]) -> str:
        text = done.stderr.decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if done.returncode == 255:
            for pattern, meaning in _REFUSALS:
                found = [line for line in lines if re.search(pattern, line)]
                if found:
                    return f"{meaning} ({found[-1][:300]})."
            return f"the connection was lost ({' | '.join(lines[-2:])[:300] or 'no message'})."
        if done.returncode in (126, 127):
            return f"there is no '{self._python}' ({' | '.join(lines[-1:])[:300]}): add ?python=/path/to/python3"
        return f"its Python ended with exit code {done.returncode}: {' | '.join(lines[-3:])[:600] or 'no message'}"

    def _results(
        self, folder: Path, jobs: Sequence[Job], report: dict[str, Any]
    ) -> tuple[str, tuple[Measurement, ...]]:
        """The runtime's version and the answers."""
        done = subprocess.CompletedProcess([], report["returncode"], "", report["stderr"])
        try:
            result = read_result(folder, done, f"the worker on {self.name}")
            return result["version"] or "unknown", measurements(folder, jobs, result["models"])
        except DeviceError as error:
            if "No module named" not in str(error):
                raise
            python = shlex.quote(self._python)
            raise DeviceError(f"{error} On the board: {python} -m pip install numpy ai-edge-litert") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DeviceError(f"The results of the worker on {self.name} are broken: {error}") from error


def _pack(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return stream.getvalue()


def _expected(jobs: Sequence[Job]) -> set[str]:
    outputs = (f"{i}.out{j}.npy" for i, job in enumerate(jobs) for j in range(len(job.model.outputs)))
    return {"board.json", "result.json", *outputs}


def _unpack(content: bytes, folder: Path, expected: set[str]) -> None:
    """Writes the archive's files, each of which must be regular, expected, and there once.

    Raises:
        ValueError: one is not.
    """
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            is_plain = member.isreg() and not member.issparse() and member.name in expected
            file = tar.extractfile(member) if is_plain else None
            if file is None or (folder / member.name).exists():
                raise ValueError(f"it holds '{member.name[:100]}'")
            (folder / member.name).write_bytes(file.read())


def _device(report: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The record's device, and what makes its numbers less trustworthy."""
    before, after, device = report["before"], report["after"], dict(report["device"])
    if before["temperature_c"] is not None and after["temperature_c"] is not None:
        device["temperature_c"] = (before["temperature_c"], after["temperature_c"])
    warnings = []
    governor = device.get("governor", "performance")
    if governor != "performance":
        warnings.append(f"The governor is '{governor}': latencies depend on what clock it chooses.")
    if before["throttling"] != after["throttling"]:
        warnings.append("The board throttled while it was measured.")
    return device, tuple(warnings)
