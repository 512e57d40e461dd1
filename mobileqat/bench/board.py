"""What `ssh.py` runs on a board: takes a job folder from stdin, works on it, returns what the worker left on stdout.

It needs Python 3.9 and the standard library, and nothing of this package: its text travels over the same connection.
Standard input is a line of JSON ("size" of the tar archive that follows, 0 to be asked only what is here, and
"timeout_s"); standard output ends with a mark, the size of a tar archive, and the archive.  The folder is removed and
the worker killed whatever happens, also when the connection is gone.
"""

import contextlib
import glob
import importlib.metadata
import io
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading

MARK = b"\nmobileqat results: "
PACKAGES = ("numpy", "ai-edge-litert", "tflite-runtime", "tensorflow")


def main() -> None:
    header = json.loads(sys.stdin.buffer.readline())
    archive = sys.stdin.buffer.read(header["size"])
    if len(archive) != header["size"]:
        sys.exit("the files arrived incomplete")
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    report = {"device": describe(), "packages": installed()}
    with tempfile.TemporaryDirectory(prefix="mobileqat-") as folder:
        if archive:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(folder)
            del archive  # small boards need the memory
            report.update(work(folder, header["timeout_s"]))
        with open(os.path.join(folder, "board.json"), "w", encoding="utf-8") as file:
            json.dump(report, file)
        returned = pack(folder)
    sys.stdout.buffer.write(MARK + b"%d\n" % len(returned) + returned)
    sys.stdout.buffer.flush()


def work(folder: str, timeout_s: float) -> dict:
    """Runs the worker; "returncode" is None if it took too long."""
    before = sensors()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, os.path.join(folder, "worker.py"), folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        threading.Thread(target=end_with_connection, args=(process,), daemon=True).start()
        try:
            returncode = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            kill(process)
        errors.seek(0)
        text = errors.read()[-4000:].decode("utf-8", "replace")
    return {"returncode": returncode, "stderr": text, "before": before, "after": sensors()}


def end_with_connection(process: subprocess.Popen) -> None:
    """Blocks until nobody reads the standard output any more, without a cost for what is being measured."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    poll.poll()
    kill(process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(folder: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in glob.glob(os.path.join(folder, "*.out*.npy")) + glob.glob(os.path.join(folder, "[br]*.json")):
            tar.add(path, arcname=os.path.basename(path))
    return stream.getvalue()


def describe() -> dict:
    """The board in the words of `record.Outcome.device`, as far as it says."""
    names = [
        line.partition(":")[2].strip() for line in read("/proc/cpuinfo").splitlines() if line[:5] in ("model", "Model")
    ]
    processors = [name for name in names if not name.isdigit()]
    governors = {read(path) for path in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    release = dict(line.split("=", 1) for line in read("/etc/os-release").splitlines() if "=" in line)
    found = {
        "name": read("/proc/device-tree/model") or platform.node(),
        "soc": processors[0] if processors else "",
        "abi": platform.machine(),
        "system": f"{release.get('PRETTY_NAME', platform.system()).strip(chr(34))}, Linux {platform.release()}",
        "cores": os.cpu_count(),
        "governor": ", ".join(sorted(governors - {""})),
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value}


def sensors() -> dict:
    """The highest temperature in degrees Celsius, and what counts or flags throttling."""
    zones = [read(path) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    temperatures = [int(text) / 1000 for text in zones if text.lstrip("-").isdigit()]
    counters = glob.glob("/sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
    counters += glob.glob("/sys/devices/platform/soc/soc:firmware/get_throttled")  # Raspberry Pi
    return {"temperature_c": max(temperatures, default=None), "throttling": {path: read(path) for path in counters}}


def installed() -> dict:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""


if __name__ == "__main__":
    main()
