"""Records, the host and the child's isolation, statistics, and what is the same for all targets. No test of speed."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mobileqat import flatbuffer
from mobileqat.bench import child, measure, targets, worker
from mobileqat.bench.host import Host
from mobileqat.bench.record import (
    Agreement,
    Check,
    Delegate,
    Job,
    Measurement,
    OperatorCost,
    Outcome,
    Settings,
)
from mobileqat.bench.show import align
from mobileqat.bench.statistics import summarize
from mobileqat.errors import (
    DataError,
    DelegationError,
    DeviceError,
    FlatbufferError,
    MobileQatError,
    RuntimeUnavailableError,
)
from mobileqat.runtime import Session

FEW = Settings(warmup=1, runs=3)


@pytest.fixture(scope="session")
def dense():
    """A float model of one layer, as bytes."""
    keras = pytest.importorskip("keras", reason="converting the test model needs keras")
    tf = pytest.importorskip("tensorflow", reason="converting the test model needs tensorflow")
    inputs = keras.Input((4,), batch_size=1)
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    return tf.lite.TFLiteConverter.from_keras_model(model).convert()


@pytest.fixture(scope="session")
def layers():
    """Two dense layers and a softmax, as bytes."""
    keras = pytest.importorskip("keras", reason="converting the test model needs keras")
    tf = pytest.importorskip("tensorflow", reason="converting the test model needs tensorflow")
    inputs = keras.Input((4,), batch_size=1)
    hidden = keras.layers.Dense(3, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(hidden))
    return tf.lite.TFLiteConverter.from_keras_model(model).convert()


# --- statistics


def test_summary():
    summary = summarize([3.0, 1.0, 2.0, 10.0])
    assert (summary.median, summary.min, summary.max, summary.mean) == (2.5, 1.0, 10.0, 4.0)
    assert summary.p90 == pytest.approx(7.9)
    assert summary.std == pytest.approx(math.sqrt(50 / 3))
    assert summarize([5.0]).to_dict() == dict.fromkeys(("median", "p90", "min", "max", "mean"), 5.0) | {"std": 0}


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_summary_of_nothing(values):
    with pytest.raises(ValueError, match="at least one finite value"):
        summarize(values)


# --- measuring


def test_measure(dense, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(dense)
    for model in (dense, path, str(path)):
        record = measure.measure({"model": model}, settings=Settings(warmup=2, runs=5)).records["model"]
        cost = record.cost
        assert 0 < cost.min <= cost.median <= cost.p90 <= cost.max
        assert cost.min <= cost.mean <= cost.max and cost.std >= 0
        assert record.init_ms > 0 and record.peak_memory_bytes >= record.size_bytes == len(dense)
        assert record.operator_counts == {"FULLY_CONNECTED": 1}
        assert (record.target, record.unit, record.runtime) == ("host", "ms", "litert")
        assert (record.threads, record.warmup, record.runs) == (1, 2, 5)
        assert record.runtime_version[0].isdigit() and set(record.device) == {"cpu", "cores", "platform"}
        assert record.agreement is None and record.delegate is None and record.profile == ()
    assert json.loads(json.dumps(record.to_dict()))["cost"]["median"] == cost.median


def test_pinned_to_a_core(dense):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform cannot pin a process")
    core = min(os.sched_getaffinity(0))
    assert measure.measure({"m": dense}, settings=replace(FEW, cpus=f"{core},{core}-{core}")).records["m"].runs == 3
    with pytest.raises(MobileQatError, match="Expected cores that this process may use"):
        measure.measure({"m": dense}, settings=replace(FEW, cpus="100000"))


@pytest.mark.parametrize(
    "cpus", ["big", "", "3-", "5-4", "1,,2", "-1", "0-9999999999", "9" * 5000, "0;reboot", "$(reboot)", "0\n", "٣"]
)
def test_lists_of_cores(cpus):
    assert child.core_numbers("0,4-6") == [0, 4, 5, 6] and child.core_numbers(None) == []
    with pytest.raises(DeviceError, match="Expected cores as a list such as 0 or 0,4-7"):
        child.core_numbers(cpus)


def test_several_files(dense):
    comparison = measure.measure({"first": dense, "second": dense, "third": dense}, settings=Settings(warmup=1, runs=7))
    assert list(comparison.records) == list(comparison.ratios) == ["first", "second", "third"]
    first = comparison.ratios["first"]
    assert (first.min, first.median, first.max) == (1.0, 1.0, 1.0)
    assert all(spread.min <= spread.median <= spread.max for spread in comparison.ratios.values())
    assert all(record.peak_memory_bytes is None for record in comparison.records.values())
    json.dumps(comparison.to_dict())


def test_ratios_are_taken_round_by_round():
    spread = measure._ratio_spread([2.0, 40.0, 600.0], [1.0, 10.0, 100.0])
    assert (spread.min, spread.median, spread.max) == (2.0, 4.0, 6.0)
    only = measure._ratio_spread([2.0, 4.0], [1.0])
    assert (only.min, only.median, only.max) == (3.0, 3.0, 3.0)


def test_sessions_take_turns():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.invoke = lambda: calls.append(name)

    latencies = worker._time_in_turns([Recorder("a"), Recorder("b")], rounds=range(3))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in latencies] == [3, 3]


def test_operators_are_measured_alone(layers):
    record = measure.measure({"m": layers}, settings=replace(FEW, profile=True)).records["m"]
    model = flatbuffer.read(layers)
    assert [row.kind for row in record.profile] == [operator.name for operator in model.operators]
    assert [row.name for row in record.profile] == [model.tensors[op.outputs[0]].name for op in model.operators]
    assert all(row.cost > 0 for row in record.profile)


# --- outputs


def test_outputs_are_those_of_the_interpreter(layers):
    x = np.random.default_rng(0).normal(size=(5, 1, 4)).astype(np.float32)
    (outputs,) = measure.predict(layers, Host(), [x])
    session = Session(layers)
    np.testing.assert_array_equal(outputs, np.stack([session.run(row)[0] for row in x]))


def test_vectors_are_the_same_everywhere(layers):
    model = flatbuffer.read(layers)
    first, second = (measure.random_vectors(model, 6) for _ in range(2))
    assert first[0].shape == (6, 1, 4) and first[0].dtype == np.float32
    np.testing.assert_array_equal(first[0], second[0])


def test_samples_become_vectors_of_the_files_batch(layers):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(measure.raw_vectors(layers, x)[0], x[:, None])
    with pytest.raises(DataError, match="takes samples of shape"):
        measure.raw_vectors(layers, x[:, :3])


def test_agreement():
    expected = [np.array([[1, 5], [7, 2]], np.int8)]
    same = measure.compare_outputs(expected, expected)
    assert same == Agreement(2, 1.0, 0.0, 1.0)
    other = measure.compare_outputs(expected, [np.array([[1, 5], [1, 2]], np.int8)])
    assert other == Agreement(2, 0.75, 6.0, 0.5)
    extreme = measure.compare_outputs([np.array([[-128]], np.int8)], [np.array([[127]], np.int8)])
    assert extreme.max_lsb == 255


def test_what_agreement_is_asked_for():
    found = Agreement(200, 0.9999, 1.0, 0.985)
    (problem,) = measure.problems("m.tflite", {"arm:cortex-a53": found})
    assert problem.startswith("m.tflite on arm:cortex-a53: 99.9900% of the output values are those of this machine; ")
    assert measure.problems("m.tflite", {"android": replace(found, bound_lsb=None)}) == []
    assert measure.problems("m.tflite", {"arm:cortex-a53": replace(found, bound_lsb=1)}) == []
    (problem,) = measure.problems("m", {"android": Agreement(200, 0.5, 9.0, 0.97, bound_lsb=None)})
    assert "top-1 agrees with this machine on 97.00% of 200 samples" in problem


def test_which_files_are_the_same_everywhere(layers):
    """Integer ones on a CPU, but for convolutions that are unpacked from int4."""
    from keras import layers as L

    from mobileqat import calibrate, convert, quantize_model

    def converted(scheme, *stack, shape, **options):
        import keras

        quantized = quantize_model(keras.Sequential([keras.Input(shape), *stack]), scheme)
        calibrate(quantized, np.ones((2, *shape), np.float32))
        return flatbuffer.read(convert(quantized, **options))

    def bound(file, **settings):
        return measure.bound_lsb(file, Settings(**settings))

    dense = converted("w4a8", L.Dense(3), shape=(4,), input_type="float32", output_type="float32")
    assert bound(dense) == bound(dense, runtime="litert-reference") == 0
    assert bound(dense, delegate="gpu") is bound(dense, runtime="litert-builtin") is None
    assert bound(converted("w8a8", L.Conv2D(3, 1), shape=(4, 4, 2))) == 0
    assert bound(converted("w4a8", L.Conv2D(3, 1), shape=(4, 4, 2))) is None
    assert bound(flatbuffer.read(layers)) is None
    assert bound(converted("w8a16", L.Dense(3, activation="tanh"), shape=(4,))) == 0
    assert bound(converted("w8a16", L.Dense(3, activation="gelu"), shape=(4,))) is None
    last = converted("w8a8", L.Dense(3, name="dense"), L.Softmax(), shape=(4,), output_type="float32")
    assert bound(last) == 1 and [last.tensors[i].name for i in measure.before_softmax(last)] == ["dense"]
    inside = converted("w8a8", L.Softmax(), L.Dense(3), shape=(4,))
    assert bound(inside) is None and measure.before_softmax(inside) == []
    assert measure.before_softmax(converted("w8a8", L.Softmax(), shape=(4,))) == []


# --- other targets


class Elsewhere:
    """A target that answers as it was told, and remembers what it was asked."""

    name, has_profiler, computes, integer_only = "elsewhere", True, True, False

    def __init__(self, factor=1, delegate=None):
        self.factor, self.delegate, self.asked = factor, delegate, []

    def run(self, jobs, settings):
        self.asked.append((jobs, settings))
        profile = (OperatorCost("y", "FULLY_CONNECTED", 7.0),)
        answers = [(output * self.factor,) for (output,) in measure.host_outputs(jobs, settings)]
        rows = [Measurement((10.0,), outputs=a, delegate=self.delegate, profile=profile) for a in answers]
        return Outcome(tuple(rows), "cycles", "npu", "1.0", {"name": "board"}, ("it was hot",))

    def check(self):
        return [Check("fan", None, "buy one"), Check("hat", None, "", is_needed=False)]


def test_another_target(layers):
    target = Elsewhere(delegate=Delegate("npu", 1, 2))
    comparison = measure.measure({"a": layers, "b": layers}, target, replace(FEW, profile=True))
    record = comparison.records["a"]
    assert len(target.asked) == 1  # it has a profiler
    assert record.agreement == Agreement(16, 1.0, 0.0, 1.0, bound_lsb=None)  # a float file
    assert (record.unit, record.runs, record.cost.median, record.warnings) == ("cycles", 1, 10.0, ("it was hot",))
    assert record.to_dict()["delegate"] == {"name": "npu", "operators": 1, "of": 2, "share": 0.5}
    assert measure.disagreements(comparison.records) == []
    measure.require_delegated(comparison.records, 0.5)
    with pytest.raises(DelegationError, match=r"a: npu took 1 of 2 operators \(50%\), expected at least 90%"):
        measure.require_delegated(comparison.records, 0.9)


def test_another_target_that_computes_something_else(layers):
    comparison = measure.measure({"a": layers}, Elsewhere(factor=-1), FEW)
    assert comparison.records["a"].agreement.identical == 0
    assert len(measure.disagreements(comparison.records)) == 1
    with pytest.raises(DelegationError, match="does not say"):
        measure.require_delegated(comparison.records, 0.9)


def test_a_target_that_lacks_something():
    with pytest.raises(DeviceError) as error:
        targets.require_target(Elsewhere())
    assert str(error.value) == "The target elsewhere cannot be used:\n  fan: missing. buy one"
    targets.require_target(Host())


@pytest.mark.parametrize("name", ["phone", "", "hosts", "arm:", "ssh://"])
def test_no_such_target(name):
    with pytest.raises(DeviceError, match=r"Expected one of: host, arm:cortex-a53, android\[:SERIAL\]"):
        targets.parse_target(name)


@pytest.mark.parametrize("row", targets.TARGETS.values(), ids=targets.TARGETS)
def test_targets_can_be_named_as_they_say(row):
    name = row.usage.replace("[:SERIAL]", ":1234")
    target = targets.parse_target(name)
    kinds = {"host": (False, True, False), "ethos-u": (True, False, True)}
    assert target.name == name
    for expected in (kinds[key] for key in kinds if name.startswith(key)):
        assert (target.has_profiler, target.computes, target.integer_only) == expected


def test_operators_are_aligned_by_kind():
    def rows(text):
        return [OperatorCost(f"{kind}{index}", kind, 1.0) for index, kind in enumerate(text)]

    pairs = [(a and a.kind, b and b.kind) for a, b in align(rows("QCDAS"), rows("CDPAS"))]
    assert pairs == [("Q", None), ("C", "C"), ("D", "D"), (None, "P"), ("A", "A"), ("S", "S")]


# --- what can go wrong


@pytest.mark.parametrize("options", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_numbers_are_checked(dense, options):
    with pytest.raises(MobileQatError, match="runs >= 1"):
        measure.measure({"m": dense}, settings=Settings(**options))


def test_broken_file(tmp_path):
    with pytest.raises(FlatbufferError):
        measure.measure({"m": tmp_path / "nowhere.tflite"})


def test_no_such_runtime(dense):
    with pytest.raises(RuntimeUnavailableError, match="no runtime 'cuda'"):
        measure.measure({"m": dense}, settings=Settings(runtime="cuda"))


def test_the_childs_errors_come_back(dense):
    job = Job("m", flatbuffer.read(dense), (np.zeros((1, 1, 5), np.float32),))
    with pytest.raises(DeviceError, match="litert on this machine: ValueError: Cannot set tensor: Dimension mismatch"):
        Host().run([job], FEW)


def python(code):
    return [sys.executable, "-c", code]


def result_of(code, folder):
    done = child.run_command(python(f"folder = {str(folder)!r}; {code}"), 60, "the benchmark")
    return child.read_result(folder, done, "it")


WRITE = "open(folder + '/result.json', 'w').write('{\"models\": []}')"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_crash_is_named(name, tmp_path):
    with pytest.raises(DeviceError, match=f"killed by {name}"):
        result_of(f"import os; os.kill(os.getpid(), {int(signal.Signals[name])})", tmp_path)


def test_a_crash_after_the_result_is_an_error(tmp_path):
    with pytest.raises(DeviceError, match="killed by SIGABRT"):
        result_of(f"{WRITE}; import os; os.abort()", tmp_path)


def test_silence_and_chatter(tmp_path):
    with pytest.raises(DeviceError, match="exit code 0 and without a usable result"):
        result_of("print('hello')", tmp_path)
    with pytest.raises(DeviceError, match=r"exit code 3.*: told why"):
        result_of("import sys; print('told why', file=sys.stderr); sys.exit(3)", tmp_path)
    assert result_of(f"print('noise'); {WRITE}", tmp_path) == {"models": []}


def test_a_child_that_hangs_or_does_not_start():
    with pytest.raises(DeviceError, match=r"it was stopped after 0\.5 s"):
        child.run_command(python("import time; time.sleep(60)"), 0.5, "it")
    with pytest.raises(DeviceError, match="it cannot be started: "):
        child.run_command(["/no/such/program"], 5, "it")


def test_the_childs_memory_is_its_own(dense):
    def peak():
        return measure.measure({"m": dense}, settings=FEW).records["m"].peak_memory_bytes

    small = peak()
    ballast = np.ones(100_000_000, np.uint8)  # ru_maxrss would pass this on to the child
    assert peak() < small + ballast.nbytes // 2


def test_the_worker_needs_nothing_of_the_package(dense, tmp_path):
    """It is copied to boards that have Python, NumPy and an interpreter only."""
    job = Job("m", flatbuffer.read(dense), (np.zeros((2, 1, 4), np.float32),))
    child.write_jobs(tmp_path, [job], FEW)
    code = "import sys, runpy; sys.modules['mobileqat'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv = [{str(child.WORKER)!r}, {str(tmp_path)!r}]; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    (row,) = child.read_result(tmp_path, done, "it")["models"]
    (measured,) = child.measurements(tmp_path, [job], [row])
    assert len(measured.costs) == 3 and measured.outputs[0].shape == (2, 1, 2)
