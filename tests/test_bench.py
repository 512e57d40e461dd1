"""Host latency: the record, the child's isolation, and the statistics. Nothing here depends on speed."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mobileqat.bench import host
from mobileqat.bench.statistics import summarize
from mobileqat.errors import FlatbufferError, MobileQatError, RuntimeUnavailableError


@pytest.fixture(scope="session")
def dense():
    """A float model of one layer, as bytes."""
    keras = pytest.importorskip("keras", reason="converting the test model needs keras")
    tf = pytest.importorskip("tensorflow", reason="converting the test model needs tensorflow")
    inputs = keras.Input((4,), batch_size=1)
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
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


def test_benchmark(dense, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(dense)
    for model in (dense, path, str(path)):
        record = host.benchmark(model, warmup=2, runs=5)
        latency = record.latency_ms
        assert 0 < latency.min <= latency.median <= latency.p90 <= latency.max
        assert latency.min <= latency.mean <= latency.max and latency.std >= 0
        assert record.init_ms > 0 and record.peak_memory_bytes >= record.size_bytes == len(dense)
        assert record.operator_counts == {"FULLY_CONNECTED": 1}
        assert (record.runtime, record.threads, record.warmup, record.runs) == ("litert", 1, 2, 5)
        assert record.runtime_version[0].isdigit() and record.cpu is None
        assert set(record.machine) == {"cpu", "cores", "platform"}
    assert json.loads(json.dumps(record.to_dict()))["latency_ms"]["median"] == latency.median


def test_benchmark_pinned_to_a_core(dense):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform cannot pin a process")
    core = min(os.sched_getaffinity(0))
    assert host.benchmark(dense, warmup=0, runs=1, cpu=core).cpu == core
    with pytest.raises(MobileQatError, match="cpu 100000 is not among"):
        host.benchmark(dense, cpu=100_000)


def test_compare(dense):
    comparison = host.compare({"first": dense, "second": dense, "third": dense}, warmup=1, runs=7)
    assert list(comparison.records) == list(comparison.ratios) == ["first", "second", "third"]
    first = comparison.ratios["first"]
    assert (first.min, first.median, first.max) == (1.0, 1.0, 1.0)
    assert all(spread.min <= spread.median <= spread.max for spread in comparison.ratios.values())
    assert all(record.peak_memory_bytes is None for record in comparison.records.values())
    json.dumps(comparison.to_dict())


def test_ratios_are_taken_round_by_round():
    spread = host._ratio_spread([2.0, 40.0, 600.0], [1.0, 10.0, 100.0])
    assert (spread.min, spread.median, spread.max) == (2.0, 4.0, 6.0)


def test_sessions_take_turns():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.invoke = lambda: calls.append(name)

    latencies = host._time_in_turns([Recorder("a"), Recorder("b")], rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in latencies] == [3, 3]


# --- what can go wrong


@pytest.mark.parametrize("options", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_numbers_are_checked(dense, options):
    with pytest.raises(MobileQatError, match="runs >= 1"):
        host.benchmark(dense, **options)


def test_broken_file(tmp_path):
    with pytest.raises(FlatbufferError):
        host.benchmark(tmp_path / "nowhere.tflite")


def test_the_childs_errors_come_back(dense):
    with pytest.raises(RuntimeUnavailableError, match="no runtime 'cuda'"):
        host.benchmark(dense, runtime="cuda")


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_crash_is_named(name):
    with pytest.raises(RuntimeUnavailableError, match=f"killed by {name}"):
        host.run_child(python(f"import os; os.kill(os.getpid(), {int(signal.Signals[name])})"), timeout_s=60)


def test_a_crash_after_the_result_is_an_error():
    code = f"print('{host._BEGIN} {{}} {host._END}', flush=True); import os; os.abort()"
    with pytest.raises(RuntimeUnavailableError, match="killed by SIGABRT"):
        host.run_child(python(code), timeout_s=60)


def test_silence_and_chatter():
    with pytest.raises(RuntimeUnavailableError, match="exit code 0 and without a usable result"):
        host.run_child(python("print('hello')"), timeout_s=60)
    with pytest.raises(RuntimeUnavailableError, match=r"exit code 3.*: told why"):
        host.run_child(python("import sys; print('told why', file=sys.stderr); sys.exit(3)"), timeout_s=60)
    code = f"print('noise'); print('{host._BEGIN}', '{{\"a\": 1}}', '{host._END}'); print('noise')"
    assert host.run_child(python(code), timeout_s=60) == {"a": 1}


def test_a_child_that_hangs():
    with pytest.raises(RuntimeUnavailableError, match=r"stopped after 0\.5 s"):
        host.run_child(python("import time; time.sleep(60)"), timeout_s=0.5)


def test_the_childs_memory_is_its_own(dense):
    small = host.benchmark(dense, warmup=1, runs=1).peak_memory_bytes
    ballast = np.ones(100_000_000, np.uint8)  # ru_maxrss would pass this on to the child
    assert host.benchmark(dense, warmup=1, runs=1).peak_memory_bytes < small + ballast.nbytes // 2


def test_the_command_line(dense, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(dense)
    command = [sys.executable, "-m", "mobileqat.bench.host", "--warmup=0", "--runs=2", str(path)]
    root = str(host.Path(host.__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    text = done.stdout.partition(host._BEGIN)[2].partition(host._END)[0]
    assert len(json.loads(text)["models"][0]["latency_ms"]) == 2
