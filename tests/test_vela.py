"""Ethos-U through Vela: real compilations where it is installed, and every way in which it can fail."""

import json
import sys

import numpy as np
import pytest

from mobileqat import flatbuffer
from mobileqat.bench import vela
from mobileqat.bench.measure import measure
from mobileqat.bench.record import Delegate, Job, Settings
from mobileqat.bench.targets import parse_target
from mobileqat.errors import DeviceError

CONFIGURATIONS = ["ethos-u55-32", "ethos-u55-256", "ethos-u65-512", "ethos-u85-1024"]


def is_installed():
    try:
        return bool(vela._find_vela())
    except DeviceError:
        return False


needs_vela = pytest.mark.skipif(not is_installed(), reason=f"Vela is not installed: {vela.FIX}")


def convert(layers, quantize=True):
    """An int8 file of Keras layers; what has no int8 kernel stays in floating point."""
    keras = pytest.importorskip("keras", reason="converting the test model needs keras")
    tf = pytest.importorskip("tensorflow", reason="converting the test model needs tensorflow")
    x = inputs = keras.Input((8, 8, 3), batch_size=1)
    for layer in layers(keras):
        x = layer(x)
    converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(inputs, x))
    if quantize:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        samples = np.random.default_rng(0).normal(size=(4, 1, 8, 8, 3)).astype("float32")
        converter.representative_dataset = lambda: ([sample] for sample in samples)
    return flatbuffer.read(converter.convert())


def layers(keras):
    yield keras.layers.Conv2D(8, 3, activation="relu")
    yield keras.layers.GlobalAveragePooling2D()
    yield keras.layers.Dense(4, activation="softmax")


def layers_with_a_sine(keras):
    yield keras.layers.Conv2D(8, 3)
    yield keras.layers.Lambda(keras.ops.sin)
    yield keras.layers.Conv2D(4, 3)


@pytest.fixture(scope="session")
def integer():
    converted = convert(layers)
    # Its float inputs and outputs are converted on the CPU.
    assert [operator.name for operator in converted.operators][:2] == ["QUANTIZE", "CONV_2D"]
    return converted


@needs_vela
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_compilation(integer, name):
    outcome = parse_target(name).run([Job("a", integer, ()), Job("b", integer, ())], Settings(profile=True))
    assert (outcome.unit, outcome.runtime) == ("cycles", "vela") and outcome.runtime_version[0].isdigit()
    assert outcome.device["name"].startswith("Arm Ethos-U") and outcome.device["clock_mhz"] > 0
    first, second = outcome.measurements
    assert first == second and first.outputs == () and first.init_ms is None
    (cycles,) = first.costs
    assert cycles == sum(entry.cost for entry in first.profile) > 0
    assert first.details["estimated_ms"] == pytest.approx(cycles / outcome.device["clock_mhz"] / 1e3)
    assert first.details["sram_bytes"] > 0 and first.details["macs"] >= 6 * 6 * 8 * 27
    assert first.details["flash_bytes"] + first.details["dram_bytes"] > 8 * 27  # the weights
    kinds = [entry.kind for entry in first.profile]
    assert "CONV_2D" in kinds and kinds[-1] == "SOFTMAX"


@needs_vela
def test_measure(integer):
    files = {"a": integer.content, "b": integer.content}
    comparison = measure(files, parse_target("ethos-u55-128"), Settings(profile=True))
    record = comparison.records["b"]
    assert record.unit == "cycles" and record.runs == 1 and record.agreement is None and record.profile
    assert comparison.ratios["b"].median == 1
    json.dumps(comparison.to_dict())


@needs_vela
def test_more_units_take_fewer_cycles(integer):
    costs = [parse_target(n).run([Job("a", integer, ())], Settings()).measurements[0].costs for n in CONFIGURATIONS[:2]]
    assert costs[0] > costs[1]


@needs_vela
def test_operators_on_the_cpu_are_named():
    file = convert(layers_with_a_sine)
    outcome = parse_target("ethos-u55-128").run([Job("a", file, ())], Settings())
    (measurement,) = outcome.measurements
    on_cpu = [operator.name for operator in file.operators if operator.name in ("QUANTIZE", "DEQUANTIZE", "SIN")]
    expected = Delegate("ethos-u", len(file.operators) - len(on_cpu), len(file.operators))
    assert measurement.delegate == expected and 0 < expected.share < 1
    assert measurement.details["npu_operators"] == expected.operators
    assert "SIN '" in measurement.details["cpu_operators"] and "loat32" in measurement.details["cpu_operators"]
    assert outcome.warnings and measurement.profile == ()


@needs_vela
def test_only_what_is_timed_has_a_cost(integer):
    untimed = Job("a", integer, (), is_timed=False)
    for jobs, runs in [([untimed], 5), ([Job("a", integer, ())], 0)]:
        (measurement,) = parse_target("ethos-u55-128").run(jobs, Settings(runs=runs)).measurements
        assert measurement.costs == () and measurement.details["sram_bytes"] > 0


@needs_vela
def test_a_float_file_has_nothing_for_the_npu():
    with pytest.raises(DeviceError, match=r"no operator of 'a' on the NPU. The first is .*Float32"):
        parse_target("ethos-u55-128").run([Job("a", convert(layers, quantize=False), ())], Settings())


@needs_vela
def test_configurations_that_vela_does_not_have(integer):
    with pytest.raises(DeviceError, match=r"does not know the configuration: .*choose from .*ethos-u55-128"):
        parse_target("ethos-u55-7").run([Job("a", integer, ())], Settings())


@needs_vela
def test_the_check_finds_it():
    (check,) = parse_target("ethos-u55-128").check()
    assert check.found and check.found[0].isdigit() and check.fix == ""


# --- with programs that are not Vela, or that misbehave


@pytest.mark.parametrize("name", ["ethos-u", "ethos-u55", "ethos-u55-", "ethos-u55-x"])
def test_names(name):
    with pytest.raises(DeviceError, match=r"Expected a name such as ethos-u55-128|no target"):
        parse_target(name)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes a program that MOBILEQAT_VELA names; it answers --version and then does what is asked."""

    def make(code, version="9.9.9"):
        path = tmp_path / "vela"
        path.write_text(
            f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv:\n    sys.exit(print('{version}'))\n{code}"
        )
        path.chmod(0o755)
        monkeypatch.setenv("MOBILEQAT_VELA", str(path))

    return make


JOB = Job("a", flatbuffer.Model((), {}, "", b"TFL3"), ())


@pytest.mark.parametrize(
    ("code", "timeout_s", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", 60, "compiling 'a', was killed by SIGSEGV"),
        ("print('Error: no such thing'); sys.exit(1)", 60, "exit code 1 .*: Error: no such thing"),
        ("print('Warning: all is well')", 60, "exit code 0 and without a usable result: no message"),
        ("import time; time.sleep(60)", 1, r"compiling 'a', was stopped after"),
    ],
)
def test_failures(program, code, timeout_s, message):
    program(code)
    with pytest.raises(DeviceError, match=message):
        vela.Vela("ethos-u55-128").run([JOB], Settings(timeout_s=timeout_s))


def test_another_program_of_that_name(program):
    program("", version="CLI Version: 1.9")
    with pytest.raises(DeviceError, match="is not the compiler Vela"):
        vela.Vela("ethos-u55-128").run([JOB], Settings())
    (check,) = vela.Vela("ethos-u55-128").check()
    assert check.found is None and "ethos-u-vela" in check.fix


def test_without_vela(monkeypatch, tmp_path):
    monkeypatch.delenv("MOBILEQAT_VELA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vela.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DeviceError, match="Vela is not installed: pip install ethos-u-vela"):
        vela.Vela("ethos-u55-128").run([JOB], Settings())
