"""Phones over adb: the real client against a simulated device, what it answers, and every way in which it fails.

The device's `benchmark_model` is a stand-in that computes with the real LiteRT, so outputs are compared, not canned.
"""

import http.server
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import adbd
import flatbuffers
import numpy as np
import opbuild
import pytest
from ai_edge_litert import schema_py_generated as schema

from mobileqat import flatbuffer
from mobileqat.bench import adb, android_state, benchmark_binary
from mobileqat.bench.android import Android
from mobileqat.bench.android_session import read_outputs
from mobileqat.bench.measure import measure
from mobileqat.bench.record import Delegate, Job, Settings
from mobileqat.bench.targets import parse_target
from mobileqat.errors import DeviceError
from mobileqat.runtime import Session

adbutils = pytest.importorskip("adbutils", reason="the tests drive the adb client that adbutils brings")
STAND_IN = [sys.executable, str(Path(__file__).with_name("benchmark_model.py"))]
HANG = ["/bin/sh", "-c", "sleep 1000; exit 1"]
INSTALLED = "package:org.tensorflow.lite.benchmark\n"
SETTINGS = Settings(warmup=1, runs=3, cooldown_s=0, timeout_s=60)


@pytest.fixture(scope="module")
def arm_cache():
    """The cache of the account that runs the tests, where an emulated ARM system may be."""
    return os.environ.get("MOBILEQAT_CACHE") or str(Path.home() / ".cache" / "mobileqat")


@pytest.fixture(scope="module")
def server(tmp_path_factory, arm_cache):
    """An adb server of the tests' own, with keys and a cache of its own; no adb but the bundled one."""
    with pytest.MonkeyPatch.context() as patch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            patch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("MOBILEQAT_CACHE", str(home / "cache"))
        patch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "5554")  # no emulator of the developer's
        patch.setenv("ADB_MDNS_AUTO_CONNECT", "0")
        patch.setenv("PATH", str(home))
        for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT", "ANDROID_SERIAL", "MOBILEQAT_BENCHMARK_MODEL"):
            patch.delenv(name, raising=False)
        yield adb.find_adb()
        subprocess.run([adb.find_adb(), "kill-server"], capture_output=True, check=True, timeout=30)


@pytest.fixture
def phone(tmp_path, server):
    with adbd.Phone(tmp_path / "device", STAND_IN) as phone:
        yield phone
        subprocess.run([server, "disconnect", phone.serial], capture_output=True, check=False, timeout=30)


@pytest.fixture
def binary(tmp_path):
    return str(write_program(tmp_path / "benchmark_model", machine=183))


def write_program(path, machine, bits=64, interpreter=b"/system/bin/linker64"):
    """Something with the ELF header of a program for a processor."""
    header = (
        b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little")
    )
    path.write_bytes(header + bytes(64) + interpreter + bytes(1000))
    return path


@pytest.fixture(scope="module")
def model():
    """A fully connected layer from 16 to 10 channels, int8."""
    generator = np.random.default_rng(0)
    operands = [
        opbuild.Operand(np.zeros((1, 16), np.int8), (0.02, 3)),
        opbuild.Operand(generator.integers(-127, 128, (10, 16)).astype(np.int8), (0.01, 0), constant=True),
        opbuild.Operand(generator.integers(-500, 500, 10).astype(np.int32), (0.0002, 0), constant=True),
    ]
    options = ("FullyConnectedOptions", {})
    return flatbuffer.read(opbuild.build("FULLY_CONNECTED", 4, options, operands, (1, 10), (0.05, -4)))


@pytest.fixture
def job(model):
    samples = np.random.default_rng(1).integers(-128, 128, (3, 1, 16)).astype(np.int8)
    return Job("dense", model, (samples,))


def refusal(target, jobs, settings=SETTINGS):
    with pytest.raises(DeviceError) as caught:
        target.run(jobs, settings)
    return caught.value


def is_clean(phone):
    """Nothing of ours lies or runs on the device; a killed process may take a moment."""
    for _ in range(50):
        if not phone.processes():
            break
        time.sleep(0.1)
    return not phone.processes() and not phone.left_behind()


# --- what works


def test_measures_files_in_turns(phone, binary, model, job):
    phone.say("thermalservice", THERMAL_SAMSUNG)
    phone.say("battery", BATTERY)
    other = Job("other", model, job.inputs, wants_outputs=False)
    outcome = Android(f"android:{phone.serial}", binary).run([job, other], SETTINGS)

    first, second = outcome.measurements
    expected = Session(model).predict(job.inputs[0][:, 0], quantize=False)
    np.testing.assert_array_equal(first.outputs[0][:, 0], expected)
    assert first.outputs[0].dtype == np.int8 and not second.outputs
    for measurement in outcome.measurements:
        assert len(measurement.costs) == 3 and min(measurement.costs) >= 0
        assert measurement.init_ms > 0 and measurement.peak_memory_bytes == 8172 * 1024
        assert (measurement.details["rounds"], measurement.details["runs_per_round"]) == (3, 1)
        assert measurement.details["delegation"] == "complete"
    graphs = [command.partition("--graph=")[2].split()[0] for command in phone.commands if "--graph=" in command]
    assert graphs == ["0.tflite", "1.tflite", "1.tflite", "0.tflite", "0.tflite", "1.tflite"]
    assert (outcome.unit, outcome.runtime) == ("ms", "benchmark_model")
    assert outcome.runtime_version.startswith("sha256:")
    assert outcome.device | {"name": ""} == {
        "name": "",
        "soc": "SIM1",
        "abi": "arm64-v8a",
        "system": "Android 14 (API 34)",
        "cores": 4,
        "governor": "walt",
        "temperature_c": (25.6, 25.6),
        "battery_percent": (100, 100),
    }
    assert not [warning for warning in outcome.warnings if "spread" not in warning]
    assert is_clean(phone)


def test_agrees_with_this_machine(phone, binary, model, monkeypatch):
    """The way of the command line: fixed vectors, records, agreement."""
    comparison = measure({"model": model.content}, Android(f"android:{phone.serial}", binary), SETTINGS, samples=4)
    record = comparison.records["model"]
    assert (record.agreement.samples, record.agreement.identical, record.agreement.max_lsb) == (4, 1, 0)
    assert record.cost.median >= 0 and record.target == f"android:{phone.serial}"


def test_computes_on_an_emulated_arm(tmp_path, server, arm_cache, binary, job):
    """The stand-in, with the ARM builds of Python and LiteRT under qemu: what a device would compute."""
    sysroot = pytest.importorskip("mobileqat.bench.sysroot", reason="there is no emulated ARM system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEQAT_CACHE", arm_cache)
        problem = sysroot.system().problem() or sysroot.wheels("litert").problem()
        if problem:
            pytest.skip(f"the emulated ARM system is {problem}: {sysroot.SETUP}")
        arm = importlib.import_module("mobileqat.bench.arm")
        root, site, emulator = sysroot.system().path / "root", sysroot.wheels("litert").path, sysroot.emulator()
    view = arm.make_view(tmp_path / "view", root, arm.CPUS["cortex-a53"])
    words = [*emulator, "-cpu", "cortex-a53", "-L", str(view), str(root / "usr/bin/python3.11"), STAND_IN[1]]
    with adbd.Phone(tmp_path / "device", words, environment={"PYTHONPATH": str(site)}) as phone:
        outcome = Android(f"android:{phone.serial}", binary).run([job], Settings(runs=0, timeout_s=300))
    expected = Session(job.model).predict(job.inputs[0][:, 0], quantize=False)
    np.testing.assert_array_equal(outcome.measurements[0].outputs[0][:, 0], expected)


HOSTILE = ["a b", "a'b", 'a"b', "a;touch executed", "$(touch executed)", "`touch executed`", "&touch executed&"]
HOSTILE += ["a\ntouch executed\n", "'; touch executed; '", "-rf", "--help", "a\\", "a:b", "*", "~", "${HOME}", "#", "ü"]


def renamed(model, name):
    """The file with another name for its input."""
    table = schema.ModelT.InitFromPackedBuf(model.content, 0)
    table.subgraphs[0].tensors[model.inputs[0]].name = name
    builder = flatbuffers.Builder(1024)
    builder.Finish(table.Pack(builder), b"TFL3")
    return flatbuffer.read(bytes(builder.Output()))


def test_names_in_files_reach_the_shell_quoted(phone, binary, model, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = job.inputs[0][:1]
    jobs = [Job(name, renamed(model, name), (sample,), is_timed=False) for name in HOSTILE]
    expected = Session(model).predict(sample[:, 0], quantize=False)
    for measured in Android(f"android:{phone.serial}", binary).run(jobs, SETTINGS).measurements:
        np.testing.assert_array_equal(measured.outputs[0][:, 0], expected)
    assert not list(tmp_path.rglob("executed")) and is_clean(phone)


@pytest.mark.parametrize("name", ["a\0b", "a,b"])
def test_names_that_no_command_line_holds(phone, binary, model, job, name):
    job = Job("dense", renamed(model, name), job.inputs)
    assert "Received: an input" in str(refusal(Android(f"android:{phone.serial}", binary), [job]))


@pytest.mark.parametrize("serial", [*HOSTILE, "a\0:b", "-s:5555", "$(touch executed):5555"])
def test_serials_reach_no_shell(server, binary, job, serial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adb, "SETTLE_S", 0.1)
    refusal(Android(f"android:{serial}", binary), [job])
    assert shlex.quote(serial) in adb.Adb(server, serial, adb.Deadline(1)).hint("true")
    assert not list(tmp_path.rglob("executed"))


def test_vendor_delegate_goes_along(phone, binary, job, tmp_path):
    (tmp_path / "libvendor.so").write_bytes(b"\x7fELF")
    settings = Settings(warmup=1, runs=1, cooldown_s=0, delegate=str(tmp_path / "libvendor.so"))
    measurement = Android(f"android:{phone.serial}", binary).run([job], settings).measurements[0]
    assert measurement.delegate == Delegate("libvendor.so", 1, 1)
    assert is_clean(phone)


def test_operators_are_timed_apart_from_the_rounds(phone, binary, model, job):
    job = Job("dense", model, job.inputs, wants_outputs=False)
    settings = Settings(warmup=1, runs=2, cooldown_s=0, profile=True)
    measurement = Android(f"android:{phone.serial}", binary).run([job], settings).measurements[0]
    assert [(row.kind, row.name, row.calls) for row in measurement.profile] == [("FULLY_CONNECTED", "y", 1)]
    profiled = ["profiling" in command for command in phone.commands if "--graph=" in command]
    assert profiled == [False, False, True] and len(measurement.costs) == 2


def test_large_files_travel_unchanged(phone, tmp_path):
    """More than a message of the protocol holds, there and back."""
    content = np.random.default_rng(2).bytes(3 * 2**20 + 1)
    (tmp_path / "sent").write_bytes(content)
    client = adb.open_device(phone.serial, adb.Deadline(60))
    client.push(tmp_path / "sent", "/data/local/tmp/file", 60)
    client.pull("/data/local/tmp/file", tmp_path / "received", 60)
    assert (tmp_path / "received").read_bytes() == content
    with pytest.raises(DeviceError, match="Fetching nothing from the device"):
        client.pull("/data/local/tmp/nothing", tmp_path / "received", 60)


def test_no_delegate(phone, binary, job):
    settings = Settings(warmup=1, runs=1, cooldown_s=0, delegate="none")
    measurement = Android(f"android:{phone.serial}", binary).run([job], settings).measurements[0]
    assert measurement.delegate is None and measurement.details["delegation"] is None


def test_the_only_device_needs_no_serial(phone, binary, job, server, monkeypatch):
    monkeypatch.setenv("ANDROID_SERIAL", phone.serial)
    outcome = parse_target("android")
    outcome.program = binary
    assert outcome.run([job], SETTINGS).device["name"] == "mobileqat simulated phone"


@pytest.mark.parametrize(("cpus", "mask"), [("big", "c"), ("little", "3"), ("0,2-3", "d")])
def test_cores(phone, binary, model, job, cpus, mask):
    job = Job("dense", model, job.inputs, wants_outputs=False)
    settings = Settings(warmup=0, runs=1, cooldown_s=0, cpus=cpus)
    Android(f"android:{phone.serial}", binary).run([job], settings)
    assert set((phone.root / "masks").read_text().split()) == {mask}


@pytest.mark.parametrize("missing", [["sha256sum"], ["sha256sum", "md5sum"], ["timeout"]])
def test_a_device_may_lack_tools(phone, binary, job, missing):
    for name in missing:
        phone.remove_tool(name)
    measurement = Android(f"android:{phone.serial}", binary).run([job], Settings(runs=0)).measurements[0]
    assert len(measurement.outputs[0]) == 3 and not measurement.costs


def test_an_emulator_is_called_one(phone, tmp_path, job):
    """An x86-64 one, with a program built for it."""
    for key, value in (
        ("ro.hardware", "ranchu"),
        ("ro.product.cpu.abi", "x86_64"),
        ("ro.product.cpu.abilist", "x86_64"),
    ):
        phone.set_property(key, value)
    program = write_program(tmp_path / "benchmark_model", machine=62)
    outcome = Android(f"android:{phone.serial}", str(program)).run([job], Settings(runs=0))
    assert outcome.warnings == ("The latency of an emulator is not representative of a phone.",)
    assert outcome.device["abi"] == "x86_64" and len(outcome.measurements[0].outputs[0]) == 3


def test_waits_for_the_temperature_and_says_when_it_stays(phone, binary, model, job):
    counter = phone.root / "asked"
    phone.say("thermalservice", "#!/bin/sh\n" + HEATING.format(counter=counter))
    job = Job("dense", model, job.inputs, wants_outputs=False)
    target = Android(f"android:{phone.serial}", binary)
    cooled = target.run([job], Settings(warmup=0, runs=1, cooldown_s=5))
    # 30 degrees at the start, then 45, 40, 35 and 30 again.
    assert cooled.device["temperature_c"][0] == 30 and counter.read_text().count("x") >= 5
    assert not [warning for warning in cooled.warnings if "warmer" in warning]

    counter.unlink()
    warm = target.run([job], Settings(warmup=0, runs=1, cooldown_s=0))
    assert [warning for warning in warm.warnings if "stayed warmer than the 30.0 degrees" in warning]


def test_a_server_killed_between_commands_comes_back(phone, binary, job, server):
    target = Android(f"android:{phone.serial}", binary)
    client = adb.open_device(phone.serial, adb.Deadline(60))
    subprocess.run([server, "kill-server"], capture_output=True, check=True, timeout=30)
    assert client.shell("echo here; exit 3", "a command") == adb.Result("here\n", 3)
    subprocess.run([server, "kill-server"], capture_output=True, check=True, timeout=30)
    assert target.run([job], Settings(runs=0)).measurements[0].outputs


def test_devices_without_the_shell_protocol(tmp_path, server):
    with adbd.Phone(tmp_path / "old", STAND_IN, features="") as old:
        client = adb.open_device(old.serial, adb.Deadline(60))
        assert client.shell("echo one; echo two >&2; false", "a command") == adb.Result("one\ntwo\n", 1)


@pytest.mark.parametrize(
    "script", ["exit 7", "echo unfinished; printf x; exit 7", "echo 'a  b' \"c$HOME\"; exit 7", "(exit 1); exit 7"]
)
def test_the_exit_code_is_the_commands(phone, script):
    assert adb.open_device(phone.serial, adb.Deadline(60)).shell(script, "a command").code == 7


@pytest.mark.parametrize("count", [0, 3, 7, 20, 34, 36])
def test_a_command_cut_off_at_any_byte_has_no_exit_code(phone, count):
    """The last of these cuts the exit code itself."""
    client = adb.open_device(phone.serial, adb.Deadline(8))
    phone.faults.die_on, phone.faults.after_bytes = "echo hello", count
    with pytest.raises(DeviceError, match=r"A command: .*went away"):
        client.shell("echo hello; exit 139", "A command")


def test_check_names_what_is_there(phone, binary):
    checks = Android(f"android:{phone.serial}", binary).check()
    assert [check.what for check in checks] == ["adb", "Android device", "benchmark_model"]
    assert all(check.found for check in checks) and not any(check.fix for check in checks)


def test_check_says_what_to_do(server, monkeypatch):
    monkeypatch.setattr(adb, "SETTLE_S", 0)
    program, device, binary = Android("android:nobody").check()
    assert "Android Debug Bridge" in program.found
    assert device.found is None and "adb devices -l" in device.fix
    assert binary.found is None and binary.fix.startswith("curl ") and "android_aarch64_benchmark_model" in binary.fix
    assert "adb install" in Android("android:nobody", "apk").check()[2].fix
    assert "set MOBILEQAT_BENCHMARK_MODEL to a file that exists" in Android("android:nobody", "/nowhere").check()[2].fix
    monkeypatch.setattr(adb.importlib.util, "find_spec", lambda name: None)
    assert Android("android").check()[0].fix == "pip install 'mobileqat[android]'"


# --- what fails


def test_no_adb(job, server, monkeypatch):
    monkeypatch.setattr(adb.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'mobileqat[android]'" in str(refusal(Android("android"), [job]))


def write_adb(folder, body, monkeypatch):
    """An adb in an SDK; a script in the place of the real one."""
    path = folder / "platform-tools" / "adb"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("ANDROID_SDK_ROOT", str(folder))


def test_adb_that_hangs(tmp_path, job, server, monkeypatch):
    write_adb(tmp_path, "exec /bin/sleep 100", monkeypatch)
    error = refusal(Android("android:any"), [job], Settings(timeout_s=1))
    assert "adb devices was stopped after" in str(error)


def test_server_that_cannot_start(tmp_path, job, server, monkeypatch):
    write_adb(tmp_path, "echo 'error: cannot connect to daemon' >&2; exit 1", monkeypatch)
    assert "adb's server cannot be reached: error: cannot connect to daemon" in str(refusal(Android("android"), [job]))


def test_the_sdk_has_an_adb(tmp_path, server, monkeypatch):
    (tmp_path / "platform-tools").mkdir()
    (tmp_path / "platform-tools/adb").symlink_to(server)
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path))
    assert adb.find_adb() == tmp_path / "platform-tools/adb"


def test_missing_device(job, server, binary, monkeypatch):
    monkeypatch.setattr(adb, "SETTLE_S", 0)
    error = refusal(Android("android:nobody", binary), [job])
    assert "nobody is not connected" in str(error) and "adb devices -l" in str(error)


def test_unauthorized_device(phone, job, binary, monkeypatch):
    monkeypatch.setattr(adb, "SETTLE_S", 0.5)
    phone.faults.never_authorizes = True
    error = refusal(Android(f"android:{phone.serial}", binary), [job])
    assert "authoriz" in str(error) and "accept 'Allow USB debugging?'" in str(error)


def test_offline_device(phone, job, binary, monkeypatch):
    monkeypatch.setattr(adb, "SETTLE_S", 0.5)
    phone.faults.is_mute = True
    error = refusal(Android(f"android:{phone.serial}", binary), [job])
    assert "offline" in str(error) or "not connected" in str(error)


def test_several_devices(phone, tmp_path, job, binary, server):
    with adbd.Phone(tmp_path / "second", STAND_IN) as second:
        for each in (phone, second):
            adb.open_device(each.serial, adb.Deadline(60))
        error = refusal(Android("android", binary), [job])
        assert "Several devices" in str(error) and f"android:{second.serial}" in str(error)


def test_booting_device(phone, job, binary):
    phone.set_property("sys.boot_completed", "")
    assert "still booting" in str(refusal(Android(f"android:{phone.serial}", binary), [job]))


@pytest.mark.parametrize(("machine", "bits", "name"), [(62, 64, "x86_64"), (3, 32, "x86"), (243, 64, "riscv64")])
def test_wrong_abi(phone, tmp_path, job, machine, bits, name):
    program = write_program(tmp_path / "other", machine, bits)
    error = refusal(Android(f"android:{phone.serial}", str(program)), [job])
    assert f"is a program for {name}. Expected one for arm64-v8a or armeabi-v7a" in str(error)
    assert not phone.left_behind()


def test_not_a_program_for_android(phone, tmp_path, job):
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert "no ELF header" in str(refusal(Android(f"android:{phone.serial}", str(tmp_path / "text")), [job]))
    linux = write_program(tmp_path / "linux", 183, interpreter=b"/lib/ld-linux-aarch64.so.1")
    assert "built for Linux" in str(refusal(Android(f"android:{phone.serial}", str(linux)), [job]))
    assert "cannot be read" in str(refusal(Android(f"android:{phone.serial}", str(tmp_path / "none")), [job]))


def test_full_storage(phone, job, binary):
    phone.faults.room_bytes = 1500
    error = refusal(Android(f"android:{phone.serial}", binary), [job])
    assert "storage is full" in str(error) and "df /data" in str(error)
    assert is_clean(phone)


def test_storage_that_fills_up_in_mid_run(phone, job, binary):
    full = 'case "$*" in *.one) echo "cat: write error: No space left on device" >&2; exit 1;; esac; exec /bin/cat "$@"'
    phone.add_tool("cat", full)
    assert "No space left on device" in str(refusal(Android(f"android:{phone.serial}", binary), [job]))
    assert is_clean(phone)


def test_corrupted_push(phone, job, binary):
    phone.faults.corrupts = True
    assert "did not arrive on the device as it was sent" in str(
        refusal(Android(f"android:{phone.serial}", binary), [job])
    )
    assert is_clean(phone)


@pytest.mark.parametrize("lies", [False, True])
def test_device_that_dies_in_mid_run_keeps_what_was_measured(
    phone, model, job, binary, server, tmp_path, monkeypatch, lies
):
    """The third measurement kills it: two rounds are kept.  Old versions of adb exit with 0 then."""
    if lies:
        write_adb(tmp_path, f'{server} "$@"; exit 0', monkeypatch)
    phone.faults.die_on, phone.faults.die_at, phone.faults.after_bytes = "./benchmark_model", 3, 100
    job = Job("dense", model, job.inputs, wants_outputs=False)
    error = refusal(Android(f"android:{phone.serial}", binary), [job])
    assert "went away" in str(error) and "dense 2 of 3 rounds" in str(error)
    assert len(error.measured.measurements[0].costs) == 2


def test_device_that_reboots(phone, job, binary):
    phone.faults.die_on, phone.faults.reboots = "./benchmark_model", True
    error = refusal(Android(f"android:{phone.serial}", binary), [Job("dense", job.model, job.inputs, False)])
    assert "broke" in str(error) or "went away" in str(error)
    assert is_clean(phone)


def test_hanging_program_is_stopped_by_the_device(phone, job, binary):
    phone.program = HANG
    error = refusal(Android(f"android:{phone.serial}", binary), [job], Settings(timeout_s=6, cooldown_s=0))
    assert "was stopped" in str(error) and is_clean(phone)


def test_hanging_program_is_killed_without_a_timeout_tool(phone, job, binary):
    phone.program = HANG
    phone.remove_tool("timeout")
    error = refusal(Android(f"android:{phone.serial}", binary), [job], Settings(timeout_s=6, cooldown_s=0))
    assert "was stopped after" in str(error) and is_clean(phone)


def test_hanging_service(phone, job, binary):
    phone.faults.hang_on = "dumpsys"
    error = refusal(Android(f"android:{phone.serial}", binary), [job], Settings(timeout_s=5))
    assert "Asking the device for its temperature was stopped after" in str(error) and is_clean(phone)


def test_server_killed_in_mid_command(phone, job, binary, server):
    def kill():
        subprocess.run([server, "kill-server"], capture_output=True, check=True, timeout=30)

    phone.faults.call_on = ("./benchmark_model", lambda: threading.Thread(target=kill).start())
    phone.program = ["/bin/sh", "-c", "sleep 5"]
    error = refusal(Android(f"android:{phone.serial}", binary), [Job("dense", job.model, job.inputs, False)])
    assert "broke" in str(error) or "went away" in str(error)
    assert is_clean(phone)


def test_killed_client(phone, job, binary):
    def kill():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if phone.serial.encode() in words and b"shell" in words:
                os.kill(int(path.parent.name), signal.SIGKILL)

    phone.faults.call_on = ("./benchmark_model", kill)
    phone.program = HANG
    error = refusal(Android(f"android:{phone.serial}", binary), [Job("dense", job.model, job.inputs, False)])
    assert "broke or the command was killed" in str(error)
    assert is_clean(phone)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -KILL $$", "killed benchmark_model, as it does when memory is short"),
        ("kill -SEGV $$", "exit code 139"),
        ("echo 'ERROR: Failed to load model 0.tflite'; exit 1", "cannot load the file"),
        ("echo 'INFO: STARTING!'; exit 0", "is cut off"),
        ("echo 'WARN: Unconsumed cmdline flags: --use_gpu=true'", "built without a flag"),
        ("echo CANNOT LINK EXECUTABLE: library libfoo.so not found; exit 1", "misses a library"),
    ],
)
def test_program_that_fails(phone, job, binary, script, said):
    phone.program = ["/bin/sh", "-c", script]
    for wants_outputs in (True, False):
        each = Job("dense", job.model, job.inputs, wants_outputs)
        assert said in str(refusal(Android(f"android:{phone.serial}", binary), [each]))
    assert is_clean(phone)


def test_no_taskset(phone, job, binary):
    phone.remove_tool("taskset")
    error = refusal(Android(f"android:{phone.serial}", binary), [job], Settings(cpus="big"))
    assert "no taskset" in str(error)


def test_no_such_delegate(phone, job, binary):
    error = refusal(Android(f"android:{phone.serial}", binary), [job], Settings(delegate="nowhere.so"))
    assert "The delegate cannot be read" in str(error) and is_clean(phone)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # killed, and not waited for
def test_interrupt_leaves_nothing(phone, job, binary):
    """Ctrl-C while the program runs on the device."""
    phone.program = HANG
    done = threading.Event()

    def interrupt():
        while not done.is_set() and not any("sleep" in name for name in command_lines(phone)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Android(f"android:{phone.serial}", binary).run([job], SETTINGS)
    done.set()
    thread.join()
    assert is_clean(phone)


def command_lines(phone):
    lines = []
    for process in phone.processes():
        try:
            lines.append(Path(f"/proc/{process}/cmdline").read_text())
        except OSError:
            continue
    return lines


def test_outputs_of_another_size(job):
    with pytest.raises(DeviceError, match="Expected 3 samples of 10 bytes, got 29 bytes"):
        read_outputs(job, bytes(29))


# --- the app


def test_apk(phone, job):
    (phone.root / "installed").write_text(INSTALLED)
    outcome = Android(f"android:{phone.serial}", "apk").run([job], SETTINGS)
    assert len(outcome.measurements[0].costs) == 3 and not outcome.measurements[0].outputs
    assert outcome.runtime_version == "APK"
    assert [warning for warning in outcome.warnings if "hands no outputs out" in warning]
    assert is_clean(phone)


def test_apk_that_is_pushed(phone, job, tmp_path):
    (tmp_path / "app.apk").write_bytes(b"PK")
    target = Android(f"android:{phone.serial}", str(tmp_path / "app.apk"))
    assert not target.computes
    outcome = target.run([Job("dense", job.model, job.inputs, wants_outputs=False)], SETTINGS)
    assert outcome.runtime_version.startswith("sha256:") and len(outcome.measurements[0].costs) == 3
    assert is_clean(phone)


def test_apk_that_is_not_installed(phone, job):
    (phone.root / "installed").write_text("")
    assert "adb install" in str(refusal(Android(f"android:{phone.serial}", "apk"), [job]))


def test_apk_that_crashes(phone, job):
    (phone.root / "installed").write_text(INSTALLED)
    phone.program = ["/bin/sh", "-c", "echo 'FATAL EXCEPTION: main'"]
    assert "the app crashed" in str(refusal(Android(f"android:{phone.serial}", "apk"), [job]))


# --- the program's download


class Files(http.server.BaseHTTPRequestHandler):
    content, length, status = b"", None, 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.length or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The official location, on this machine, with an empty cache."""

    class Store(Files):
        content = write_program(tmp_path / "published", 183).read_bytes()

    with http.server.HTTPServer(("127.0.0.1", 0), Store) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setattr(benchmark_binary, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "MOBILEQAT_BENCHMARK_MODEL_SHA256"):
            monkeypatch.delenv(name, raising=False)
        yield Store
        httpd.shutdown()
        thread.join()


def find(abis=("arm64-v8a",)):
    return benchmark_binary.find_binary(abis, None, adb.Deadline(30))


def test_first_download_is_trusted_and_pinned(store, tmp_path):
    first = find()
    assert first.abi == "arm64-v8a" and first.path.read_bytes() == store.content
    assert f"MOBILEQAT_BENCHMARK_MODEL_SHA256={first.sha256} pins it" in first.warnings[0]
    record = json.loads(first.path.with_name(first.path.name + ".json").read_text())
    assert record["sha256"] == first.sha256 and record["url"].endswith("/android_aarch64_benchmark_model")
    store.content = b"another night's build"
    assert find().sha256 == first.sha256 and not find().warnings
    first.path.write_bytes(first.path.read_bytes() + b"x")
    with pytest.raises(DeviceError, match="was changed after it was first used"):
        find()


def test_pinned_checksum(store, monkeypatch):
    monkeypatch.setenv("MOBILEQAT_BENCHMARK_MODEL_SHA256", "0" * 64)
    with pytest.raises(DeviceError, match="not the program that MOBILEQAT_BENCHMARK_MODEL_SHA256 asks for"):
        find()


@pytest.mark.parametrize("fault", [{"status": 404}, {"length": 10**6}, {"length": 10**12}])
def test_failed_download_leaves_nothing(store, tmp_path, fault):
    for name, value in fault.items():
        setattr(store, name, value)
    with pytest.raises(DeviceError, match=r"MOBILEQAT_BENCHMARK_MODEL|was cut off"):
        find()
    assert not list((tmp_path / "cache/benchmark_model").iterdir())


def test_nothing_is_published_for_x86(store):
    with pytest.raises(DeviceError, match=r"bazel build.*android_x86_64"):
        find(("x86_64", "x86"))
    assert "translates the program" in find(("x86_64", "arm64-v8a")).warnings[-1]


# --- what devices print

# dumpsys thermalservice of a Samsung A52 with Android 12 (android.stackexchange.com/questions/246774), and the form of
# devices whose cache is stale; sensors that are missing read 0 or -99.9.
THERMAL_SAMSUNG = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
\tkilled: false
\tbroadcasts count: -1
ThermalStatusListeners:
\tcallbacks: 4
\tkilled: false
\tbroadcasts count: -1
Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=0.0, mType=2, mName=SUBBAT, mStatus=0}
\tTemperature{mValue=95.6, mType=0, mName=AP, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL 2.0 connected: yes
Current temperatures from HAL:
\tTemperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
\tTemperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
\tTemperature{mValue=24.7, mType=3, mName=LRB, mStatus=0}
\tTemperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=88, mType=0, mName=tpu_cooling}
Temperature static thresholds from HAL:
"""
THERMAL_CACHED = """IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=-99.9, mType=6, mName=TYPE_POWER_AMPLIFIER, mStatus=0}
\tTemperature{mValue=41.5, mType=3, mName=skin, mStatus=2}
HAL Ready: false
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  Max charging voltage: 5000000
  Charge counter: 3270000
  status: 5
  health: 2
  present: true
  level: 100
  scale: 100
  voltage: 4352
  temperature: 274
  technology: Li-ion
"""
HEATING = """
echo x >>{counter}
case $(grep -c x {counter}) in 1) c=30;; 2) c=45;; 3) c=40;; 4) c=35;; *) c=30;; esac
echo "Thermal Status: 0"
echo "Current temperatures from HAL:"
echo "Temperature{{mValue=$c.0, mType=0, mName=cpu, mStatus=0}}"
"""
CORES = "core 0 1 1800000 1800000 walt\ncore 10 1 2800000 2000000 walt\ncore 4 0 2400000 2400000 walt\ncore 7 1 - - -\n"


def state(cores="", thermal="", battery=""):
    return android_state.parse_state(f"{cores}\nsection thermalservice\n{thermal}\nsection battery\n{battery}\n")


def test_states():
    read = state(CORES, THERMAL_SAMSUNG, BATTERY)
    assert [(core.index, core.is_online, core.max_khz) for core in read.cores] == [
        (0, True, 1800000),
        (4, False, 2400000),
        (7, True, 0),
        (10, True, 2800000),
    ]
    assert (read.temperature_c, read.thermal_status, read.battery_percent, read.is_charging) == (25.6, 0, 100, True)
    cached = state(thermal=THERMAL_CACHED, battery=BATTERY.replace("level: 100", "level: 19").replace("true", "false"))
    assert (cached.temperature_c, cached.thermal_status, cached.battery_percent) == (41.5, 2, None)
    assert state("zone 38500 battery\nzone 51000 cpu-0-0\nzone 52000 cpu-1-0\nzone -40000 soc\n").temperature_c == 52
    assert state(battery=BATTERY).temperature_c == 27.4
    assert state(thermal="Can't find service: thermalservice") == android_state.State()


def test_warnings():
    phone = android_state.Identity("SERIAL")
    low = state(CORES, THERMAL_CACHED, BATTERY.replace("level: 100", "level: 12").replace("USB powered: true", ""))
    warnings = android_state.warnings_of(phone, [low, low], ())
    assert [warning.split(",")[0].split(":")[0] for warning in warnings] == [
        "The device was throttled",
        "Core 10 was not allowed its top clock",
        "The battery was at 12 %",
    ]
    assert not android_state.warnings_of(phone, [state(CORES)], (0,))


def test_core_lists():
    cores = android_state.parse_cores(CORES.replace("- - -", "2800000 - -"))
    assert android_state.select_cores(cores, "big") == (7, 10)
    assert android_state.select_cores(cores, "little") == (0,)
    assert android_state.select_cores(cores, "7,10-10") == (7, 10)
    assert android_state.core_mask((7, 10)) == "480"
    for cpus in ("4", "5-3", "99", "fast", "1;2", "", "0-9999999999", "9" * 5000, "$(reboot)", "0\n", "٣"):
        with pytest.raises(DeviceError, match=r"Expected some of|expects 'big'"):
            android_state.select_cores(cores, cpus)
    with pytest.raises(DeviceError, match="hides its cores' clocks"):
        android_state.select_cores(android_state.parse_cores(CORES), "big")


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("R5CT30ABCDEF           device usb:1-1 model:Pixel_8", ("R5CT30ABCDEF", "device", "usb:1-1 model:Pixel_8")),
        ("192.168.1.5:5555\toffline transport_id:1", ("192.168.1.5:5555", "offline", "transport_id:1")),
        (
            "0123  no permissions (missing udev rules?); see [url]",
            ("0123", "no permissions", "(missing udev rules?); see [url]"),
        ),
        ("emulator-5554 unauthorized", ("emulator-5554", "unauthorized", "")),
    ],
)
def test_lists_of_devices(line, device):
    text = f"* daemon not running; starting now at tcp:5037\n* daemon started\nList of devices attached\n{line}\n\n"
    (found,) = adb.parse_devices(text)
    assert (found.serial, found.state, found.description) == device
    assert not adb.parse_devices("List of devices attached\n\n")
