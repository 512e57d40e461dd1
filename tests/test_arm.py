"""Emulated ARM: what it computes and counts, how it is set up, and what it says when something is missing.

Tests that need the emulator skip where `python -m mobileqat.bench.sysroot` has not been run.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

import mobileqat as mq
from mobileqat import flatbuffer
from mobileqat.bench import arm, child, measure, sysroot
from mobileqat.bench.arm import CPUS, EmulatedArm, make_view, read_counts
from mobileqat.bench.record import Job, Settings
from mobileqat.bench.targets import parse_target, require_target
from mobileqat.errors import DeviceError

MISSING = [f"{check.what}: {check.fix}" for check in EmulatedArm("arm:cortex-a53").check() if check.found is None]
emulated = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))
FEW = Settings(runs=5)


@functools.cache
def network() -> tuple[bytes, bytes]:
    """A small convolutional network, float and int8: its matrices are too wide for one tile of any kernel."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((24, 24, 3), batch_size=1)
    x = keras.layers.Conv2D(24, 3, strides=2, activation="relu")(inputs)
    x = keras.layers.DepthwiseConv2D(3, activation="relu6", padding="same")(x)
    y = keras.layers.Conv2D(24, 1)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.add([x, y]))
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
    quantized = mq.quantize_model(model)
    mq.calibrate(quantized, np.random.default_rng(0).normal(size=(32, 24, 24, 3)).astype(np.float32))
    return mq.convert_float(model), mq.convert(quantized)


def job(content: bytes, name: str = "model", samples: int = 4, **options) -> Job:
    model = flatbuffer.read(content)
    return Job(name, model, tuple(measure.random_vectors(model, samples)), **options)


@functools.cache
def measured(cpu: str, runtime: str, repeat: int = 0):
    """One emulated process, shared by the tests that ask the same; `repeat` asks for another one."""
    return measure.measure({"int8": network()[1]}, EmulatedArm(f"arm:{cpu}"), replace(FEW, runtime=runtime))


# --- what it computes and counts


@emulated
@pytest.mark.parametrize("runtime", ["litert", "litert-reference"])
@pytest.mark.parametrize("cpu", CPUS)
def test_int8_outputs_are_those_of_x86(cpu, runtime):
    agreement = measured(cpu, runtime).records["int8"].agreement
    assert (agreement.samples, agreement.identical, agreement.max_lsb) == (measure.SAMPLES, 1, 0)


@emulated
@pytest.mark.parametrize("cpu", CPUS)
def test_tflite_runtime_computes_what_the_reference_kernels_compute(cpu):
    record = measured(cpu, "tflite-runtime").records["int8"]
    assert record.runtime_version == "2.14.0"
    assert record.agreement.identical == 1


@emulated
def test_record():
    record = measured("cortex-a53", "litert").records["int8"]
    assert (record.target, record.runtime, record.unit, record.runs) == ("arm:cortex-a53", "litert", "instructions", 5)
    assert record.runtime_version == sysroot.interpreter_version("ai-edge-litert")
    # Time and memory would be the emulator's.
    assert record.init_ms is None
    assert record.peak_memory_bytes is None
    assert record.device["abi"] == "aarch64"
    assert "qemu-user 1:7.2" in record.device["system"]
    json.dumps(record.to_dict())


@emulated
def test_counts_repeat():
    first, second = (measured("cortex-a53", "litert", repeat).records["int8"].cost for repeat in (0, 1))
    assert first.median == pytest.approx(second.median, rel=1e-4)
    # Python's bookkeeping between two inferences takes a few hundred of its own now and then.
    assert first.max - first.min < 1000


@emulated
def test_kernels_are_those_of_the_core():
    counts = {
        (cpu, runtime): measured(cpu, runtime).records["int8"].cost.median
        for cpu in CPUS
        for runtime in ("litert", "litert-reference")
    }
    assert counts["cortex-a76", "litert"] < 0.8 * counts["cortex-a53", "litert"]  # the dot product
    assert counts["cortex-a53", "litert"] < 0.3 * counts["cortex-a53", "litert-reference"]
    # Reference kernels are plain C++: every core executes the same ones.
    reference = [counts[cpu, "litert-reference"] for cpu in CPUS]
    assert reference[0] == pytest.approx(reference[1], rel=1e-3)


@emulated
def test_jobs_share_a_process_and_keep_their_order():
    float_model, int8_model = network()
    jobs = [
        job(float_model, wants_outputs=False),
        job(int8_model, is_timed=False, samples=3),
        job(int8_model, wants_outputs=False),
    ]
    outcome = EmulatedArm("arm:cortex-a53").run(jobs, FEW)
    in_float, untimed, in_int8 = outcome.measurements
    assert [len(row.costs) for row in outcome.measurements] == [5, 0, 5]
    assert [len(row.outputs) for row in outcome.measurements] == [0, 1, 0]
    assert untimed.outputs[0].shape == (3, 1, 10)
    alone = measured("cortex-a53", "litert").records["int8"].cost.median
    assert np.median(in_int8.costs) == pytest.approx(alone, rel=1e-3)
    assert min(in_float.costs) > max(in_int8.costs)


@emulated
def test_outputs_without_counting():
    """`predict` asks for no rounds at all."""
    values = measure.random_vectors(flatbuffer.read(network()[1]), 2)
    (outputs,) = measure.predict(network()[1], EmulatedArm("arm:cortex-a76"), values)
    (expected,) = measure.predict(network()[1], measure.Host(), values)
    assert np.array_equal(outputs, expected)


@emulated
def test_what_the_interpreter_refuses():
    broken = replace(job(network()[1]), inputs=(np.zeros((1, 1, 8, 8, 3), np.int8),))
    with pytest.raises(DeviceError, match=r"^litert on arm:cortex-a53: ValueError: .*[Dd]imension"):
        EmulatedArm("arm:cortex-a53").run([broken], FEW)


@emulated
def test_too_slow():
    with pytest.raises(DeviceError, match=r"^litert on arm:cortex-a53 was stopped after 0.5 s\.$"):
        EmulatedArm("arm:cortex-a53").run([job(network()[1])], replace(FEW, timeout_s=0.5))


@emulated
def test_a_crash_under_emulation_is_named(monkeypatch, tmp_path):
    """What a kernel for another core ends in."""
    (tmp_path / "crash.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setattr(child, "WORKER", tmp_path / "crash.py")
    with pytest.raises(DeviceError, match=r"^litert on arm:cortex-a76 was killed by SIGILL"):
        EmulatedArm("arm:cortex-a76").run([job(network()[1])], FEW)


@emulated
def test_everything_is_there():
    require_target(EmulatedArm("arm:cortex-a76"))
    found = {check.what: check.found for check in EmulatedArm("arm:cortex-a76").check()}
    assert found["qemu-aarch64 that takes plugins"].startswith("qemu-aarch64 version 7.2.")


@emulated
def test_a_second_set_up_downloads_nothing(monkeypatch):
    monkeypatch.setattr(sysroot, "_make_system", None)
    monkeypatch.setattr(sysroot, "_wheels_maker", lambda package: None)
    lines = []
    sysroot.set_up(["litert", "tflite-runtime"], lines.append)
    assert len(lines) == 4
    assert all(": ready in " in line for line in lines)


# --- names and requests


@pytest.mark.parametrize("cpu", CPUS)
def test_names(cpu):
    target = parse_target(f"arm:{cpu}")
    assert isinstance(target, EmulatedArm)
    assert (target.name, target.cpu) == (f"arm:{cpu}", cpu)


@pytest.mark.parametrize("name", ["arm:max", "arm:cortex-m4", "arm:cortex-a53 "])
def test_cores_that_were_not_tried(name):
    message = f"There is no target '{name}'. Expected one of: arm:cortex-a53, arm:cortex-a76."
    with pytest.raises(DeviceError) as error:
        EmulatedArm(name)
    assert str(error.value) == message


def test_one_thread():
    with pytest.raises(DeviceError, match=r"instructions of one thread.* Received: threads=2"):
        EmulatedArm("arm:cortex-a53").run([], replace(FEW, threads=2))


@pytest.mark.parametrize("runtime", ["tf-lite", "tflite"])
def test_runtimes_without_an_arm_build(runtime):
    message = f"no ARM build of the runtime '{runtime}'. Expected one of: litert, litert-builtin, litert-reference, tfl"
    with pytest.raises(DeviceError, match=message):
        EmulatedArm("arm:cortex-a53").run([], replace(FEW, runtime=runtime))


def test_what_linux_says_about_a_core(tmp_path):
    (tmp_path / "root" / "usr").mkdir(parents=True)
    (tmp_path / "root" / "usr" / "file").touch()
    view = make_view(tmp_path / "view", tmp_path / "root", CPUS["cortex-a76"])
    rows = dict(line.split("\t: ") for line in (view / "proc/cpuinfo").read_text().splitlines() if line)
    assert (rows["CPU implementer"], rows["CPU part"]) == ("0x41", "0xd0b")
    assert "asimddp" in rows["Features"].split()
    assert "asimddp" not in CPUS["cortex-a53"].features.split()
    assert (view / "sys/devices/system/cpu/possible").read_text() == "0\n"
    assert (view / "usr/file").exists()


# --- counts


def written(tmp_path, *lines) -> Path:
    path = tmp_path / "counts.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_counts_in_turns(tmp_path):
    """The second round starts with the second session, as in `worker.py`."""
    path = written(tmp_path, 10, 12, 20, 25, 30, 36, 40, 43, "end")
    assert read_counts(path, sessions=2, rounds=2) == [[2, 3], [5, 6]]


def test_no_counts(tmp_path):
    assert read_counts(written(tmp_path, "end"), sessions=2, rounds=0) == [[], []]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 marks without an end, expected 2"),
        ([10, 12], "1 marks without an end, expected 2"),
        ([10, "end"], "1 marks and an end, expected 2"),
        ([10, 12, 14, "end"], "3 marks and an end, expected 2"),
        ([12, 10, "end"], "expected 2 ascending ones"),
        ([10, "1O", "end"], "no usable counts"),
    ],
)
def test_unusable_counts(tmp_path, lines, message):
    with pytest.raises(DeviceError, match=message):
        read_counts(written(tmp_path, *lines), sessions=1, rounds=1)


def test_lost_counts(tmp_path):
    with pytest.raises(DeviceError, match="no usable counts"):
        read_counts(tmp_path / "counts.txt", sessions=1, rounds=1)


def test_commas_in_options(tmp_path):
    assert arm._escaped(Path("/a,b/c.so")) == "/a,,b/c.so"


# --- setting up, without a network


class Makers:
    """Stand-ins for the downloads that count how often they are asked; `error` is raised by the next one."""

    def __init__(self):
        self.made = []
        self.error = None
        self.busy = threading.Lock()

    def make(self, path: Path, say) -> dict[str, str]:
        assert self.busy.acquire(blocking=False), "two at a time"
        try:
            (path / "folder").mkdir()
            (path / "folder" / "file").write_text("content")
            (path / "link").symlink_to("folder/file")
            if self.error:
                raise self.error
            self.made.append(path)
            say("making")
            return {"file.deb": hashlib.sha256(b"").hexdigest()}
        finally:
            self.busy.release()


@pytest.fixture
def makers(monkeypatch, tmp_path):
    made = Makers()
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path))
    monkeypatch.setattr(sysroot, "machine_problem", lambda: None)
    monkeypatch.setattr(sysroot, "_make_system", made.make)
    monkeypatch.setattr(sysroot, "_wheels_maker", lambda package: made.make)
    monkeypatch.setattr(sysroot, "plugin", lambda: tmp_path / "plugin.so")
    return made


def names_in(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def test_missing_parts_name_the_command(makers):
    with pytest.raises(DeviceError, match=r"ai-edge-litert for ARM: not set up.*: python -m mobileqat\.bench\.sysroot"):
        EmulatedArm("arm:cortex-a53").run([], FEW)
    with pytest.raises(DeviceError, match="cannot be used") as error:
        require_target(EmulatedArm("arm:cortex-a53"))
    assert "python -m mobileqat.bench.sysroot --runtime litert" in str(error.value)
    assert "tflite-runtime" not in str(error.value)  # can be used, and is not needed


def test_a_part_is_made_once_and_verified(makers):
    lines = []
    sysroot.set_up(["litert", "litert-reference"], lines.append)
    assert len(makers.made) == 2  # both runtimes are one interpreter
    part = sysroot.system()
    assert part.problem() is None
    assert part.downloads() == {"file.deb": hashlib.sha256(b"").hexdigest()}
    assert part.check().found == str(part.path)
    sysroot.set_up(["litert"], lines.append)
    assert len(makers.made) == 2
    assert names_in(sysroot.folder()) == sorted(["lock", part.path.name, sysroot.wheels("litert").path.name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "folder/file").unlink(), "folder/file is missing"),
        (lambda path: (path / "folder/file").write_text("cont"), "folder/file has 4 bytes, expected 7"),
        (lambda path: (path / "link").unlink(), "link is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "not set up"),
    ],
)
def test_damage_is_found_and_repaired(makers, damage, message):
    sysroot.set_up([], print)
    part = sysroot.system()
    damage(part.path)
    assert message in part.problem()
    with pytest.raises(DeviceError, match=message):
        part.require()
    sysroot.set_up([], print)
    assert part.problem() is None
    assert names_in(sysroot.folder()) == sorted(["lock", part.path.name])


def test_a_failure_leaves_nothing_half(makers):
    sysroot.set_up([], print)
    (sysroot.system().path / "link").unlink()
    for error in (DeviceError("no network"), KeyboardInterrupt()):
        makers.error = error
        with pytest.raises(type(error)):
            sysroot.set_up([], print)
        assert names_in(sysroot.folder()) == sorted(["lock", sysroot.system().path.name])
        assert "link is missing" in sysroot.system().problem()


def test_leftovers_of_a_killed_process_are_swept(makers):
    (sysroot.folder() / ".new-killed" / "half").mkdir(parents=True)
    sysroot.set_up([], print)
    assert names_in(sysroot.folder()) == sorted(["lock", sysroot.system().path.name])


def test_two_at_once(makers):
    errors = []

    def set_up():
        try:
            sysroot.set_up(["litert"], lambda line: None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=set_up) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(makers.made) == 2


def test_a_waiting_process_says_so(makers, tmp_path):
    """The lock belongs to another process: it ends when that process does, and not before."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    sysroot.folder().mkdir(parents=True)
    command = [sys.executable, "-c", code, str(sysroot.folder() / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        lines = []

        def say(line):
            if line.startswith("waiting"):
                assert not makers.made
                other.stdin.close()
            lines.append(line)

        sysroot.set_up([], say)
    assert lines[0] == "waiting for another process that is setting up"
    assert len(makers.made) == 1


def test_a_cache_that_cannot_be_written(makers, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"cannot be written.*set MOBILEQAT_CACHE to another"):
        sysroot.set_up([], print)


@pytest.mark.parametrize("machine", [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_other_machines(monkeypatch, machine):
    monkeypatch.setattr(sysroot.platform, "system", lambda: machine[0])
    monkeypatch.setattr(sysroot.platform, "machine", lambda: machine[1])
    with pytest.raises(DeviceError, match=f"on x86-64 Linux only, this is {machine[1]} {machine[0]}"):
        sysroot.set_up([], print)
    assert EmulatedArm("arm:cortex-a53").check()[0].found is None


# --- commands that are missing or fail


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """A PATH on which only the commands of a folder are found; call it to add one: name and shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sysroot, "machine_problem", lambda: None)
    monkeypatch.setattr(sysroot, "KEYRING", folder)
    (tmp_path / "keyring").touch()
    monkeypatch.setattr(sysroot, "KEYRING", tmp_path / "keyring")

    def add(name: str, script: str = "exit 0") -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


MAKE_PLUGIN = 'while [ "$1" != -o ]; do shift; done; : > "$2"'


def test_no_compiler(commands):
    with pytest.raises(DeviceError, match=r"A C compiler is needed.*: apt-get install gcc libc6-dev"):
        sysroot.set_up([], print)
    assert EmulatedArm("arm:cortex-a53").check()[-1].fix == "apt-get install gcc libc6-dev"


def test_a_compiler_that_fails(commands):
    commands("cc", "echo 'stdio.h: No such file' >&2; exit 1")
    with pytest.raises(DeviceError, match=r"^Compiling qemu's plugin failed: stdio\.h: No such file\.$"):
        sysroot.set_up([], print)


@pytest.mark.parametrize("present", [[], ["apt-get"]])
def test_no_debian(commands, present):
    commands("cc", MAKE_PLUGIN)
    for name in present:
        commands(name)
    missing = "dpkg-deb" if present else "apt-get"
    with pytest.raises(DeviceError, match=f"{missing} is missing: .* comes from Debian"):
        sysroot.set_up([], print)


def test_no_keyring(commands, monkeypatch, tmp_path):
    for name, script in (("cc", MAKE_PLUGIN), ("apt-get", ""), ("dpkg-deb", ""), ("apt-config", "")):
        commands(name, script)
    monkeypatch.setattr(sysroot, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(DeviceError, match="is missing: apt-get install debian-archive-keyring"):
        sysroot.set_up([], print)


def test_no_network(commands, monkeypatch):
    """The error names what failed and where from; the next attempt starts from the beginning."""
    for name in ("dpkg-deb", "apt-config"):
        commands(name)
    commands("cc", MAKE_PLUGIN)
    commands("apt-get", "echo 'W: unimportant' >&2; echo 'E: Could not resolve host.' >&2; exit 100")
    monkeypatch.setenv("MOBILEQAT_DEBIAN_MIRROR", "http://mirror.example/debian")
    message = (
        "Reading Debian's list of packages failed: E: Could not resolve host. "
        "The mirror is http://mirror.example/debian; MOBILEQAT_DEBIAN_MIRROR can name another one."
    )
    with pytest.raises(DeviceError) as error:
        sysroot.set_up([], print)
    assert str(error.value) == message
    assert [name for name in names_in(sysroot.folder()) if not name.startswith("count_instructions-")] == ["lock"]


def test_apt_of_its_own(commands, tmp_path):
    """Nothing of this machine's apt is used but how it reaches the network."""
    commands("apt-config", """echo 'Acquire::http::Proxy "http://proxy";'; echo 'DPkg::Post-Invoke "rm -r /";'""")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text = sysroot._configure_apt(scratch, "http://mirror.example/debian").read_text()
    assert 'Acquire::http::Proxy "http://proxy";' in text
    assert "Post-Invoke" not in text
    assert f'Dir::State "{scratch}/state";' in text
    sources = (scratch / "sources.list").read_text()
    assert sources == f"deb [signed-by={sysroot.KEYRING}] http://mirror.example/debian bookworm main\n"


@pytest.mark.parametrize(("code", "rc"), [("", 0), ("raise DeviceError('no network')", 2)])
def test_command(monkeypatch, capsys, code, rc):
    asked = []

    def set_up(runtimes, say):
        asked.extend(runtimes)
        say("a line")
        exec(code, {"DeviceError": DeviceError})

    monkeypatch.setattr(sysroot, "set_up", set_up)
    assert sysroot.main(["--runtime", "litert"]) == rc
    assert asked == ["litert"]
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert captured.err == ("error: no network\n" if rc else "")


# --- the plugin


needs_compiler = pytest.mark.skipif(sysroot.find_compiler() is None, reason=f"no C compiler: {sysroot.COMPILER}")


@needs_compiler
def test_the_plugin_compiles_once_and_without_warnings(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path))
    path = sysroot.plugin()
    assert sysroot.is_plugin_made()
    assert names_in(sysroot.folder()) == [path.name]
    monkeypatch.setattr(sysroot, "find_compiler", lambda: None)
    assert sysroot.plugin() == path
    compiler = shutil.which("cc") or shutil.which("gcc")
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(sysroot.plugin_source())]
    subprocess.run(command, check=True, timeout=60)


@emulated
@pytest.mark.parametrize("option", ["", ",out=/nonexistent/counts"])
def test_the_plugin_needs_a_file(option):
    """Without it the emulator does not start: counts never go anywhere else."""
    root = sysroot.system().require() / "root"
    command = [*sysroot.emulator(), "-cpu", "cortex-a53", "-L", str(root), "-plugin", f"{sysroot.plugin()}{option}"]
    done = child.run_command([*command, str(root / sysroot.INTERPRETER), "--version"], 60, "qemu")
    assert done.returncode
    assert "out=FILE is missing or cannot be written" in done.stderr


def test_the_plugin_is_in_the_wheel():
    """Beside the recipes: the target works from an installed package too."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    source = os.path.relpath(sysroot.plugin_source(), project.parent)
    assert f'"{source}" = "mobileqat/_arm/{sysroot.plugin_source().name}"' in project.read_text(encoding="utf-8")
