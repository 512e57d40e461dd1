"""The reading of benchmark_model's output: every format, every failure, and texts that were cut or garbled."""

import os
import string
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobileqat.bench.benchmark_model import command, parse
from mobileqat.bench.benchmark_profile import parse_profile
from mobileqat.bench.benchmark_timings import Latency
from mobileqat.bench.record import Delegate, OperatorCost, Settings
from mobileqat.errors import DeviceError

# Our own sample texts, in the format of the program.

HEAD = """\
INFO: STARTING!
WARN: Duplicate flags: num_threads
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [4]
INFO: Graph: [/data/local/tmp/Aborted/0.tflite]
INFO: Loaded model /data/local/tmp/Aborted/0.tflite
"""
RUNS = """\
INFO: The input model file size (MB): 0.125
INFO: Initialized session in 2.5ms.
INFO: Running benchmark for at least 2 iterations and at least 0 seconds but terminate if exceeding 600 seconds.
INFO: count=2 first=1800 curr=1200 min=1200 max=1800 avg=1500 std=300

INFO: Running benchmark for at least 4 iterations and at least 0 seconds but terminate if exceeding 600 seconds.
INFO: count=4 first=1100 curr=1000 min=1000 max=1300 avg=1112.5 std=113

INFO: Inference timings in us: Init: 2500, First inference: 1800, Warmup (avg): 1500, Inference (avg): 1112.5
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE.
INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.25
"""
CLASSIC = HEAD + RUNS
EXPECTED = {
    "init_ms": 2.5,
    "first_ms": 1.8,
    "warmup": 2,
    "runs": 4,
    "latency_ms": Latency(1.1125, 1.0, 1.3, 0.113),
    "peak_memory_bytes": 2304 * 1024,
}

PROFILE = """\
INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t  [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t    CONV_2D\t    0.750\t    0.700\t 70.000%\t 70.000%\t     0.000\t        1\t[a/Relu6;a/Conv2D]:0
\t    ADD\t    0.100\t    0.125\t 25.000%\t 95.000%\t     0.000\t        2\t[b]:1
\t    AllocateTensors\t    0.050\t    0.050\t  5.000%\t100.000%\t     0.000\t        0\tAllocateTensors/0

Number of nodes executed: 3
Timings (microseconds): count=4 first=1001 curr=1000 min=1000 max=1001 avg=1000 std=0
Memory (bytes): count=0
3 nodes observed

"""

OLD = """\
STARTING!
Min num runs: [15]
Loaded model /data/local/tmp/0.tflite
Initialized session in 9.5ms
Running benchmark for at least 1 iterations and at least 0.5 seconds
count=1 curr=70000

Running benchmark for 4 iterations
count=4 first=66753 curr=66800 min=66699 max=66838 avg=66772.5 std=52

Average inference timings in us: Warmup: 70000, Init: 9500, no stats: 66772.5
"""

LITERT = """\
VERBOSE: Replacing 64 out of 65 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 2 partitions for subgraph 0
INFO: Initialized session in 4.478ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=2 first=2000 curr=1000 min=1000 max=2000 avg=1500 std=500 p5=1000 median=1000 p95=2000

INFO: Running benchmark for at least 3 iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count=3 first=463 curr=480 min=442 max=480 avg=461.667 std=15 p5=442 median=463 p95=480

INFO: [litert/tools/benchmark_litert_model.h:79]
========== BENCHMARK RESULTS ==========
INFO: [litert/tools/benchmark_litert_model.h:80] Model initialization: 4.48 ms
INFO: [litert/tools/benchmark_litert_model.h:82] Warmup (first):       2.00 ms
INFO: [litert/tools/benchmark_litert_model.h:84] Warmup (avg):         1.50 ms (2 runs)
INFO: [litert/tools/benchmark_litert_model.h:86] Inference (avg):      0.46 ms (3 runs)
INFO: [litert/tools/benchmark_litert_model.h:88] Inference (min):      0.44 ms
INFO: [litert/tools/benchmark_litert_model.h:90] Inference (max):      0.48 ms
INFO: [litert/tools/benchmark_litert_model.h:92] Inference (std):      0.02
INFO: [litert/tools/benchmark_litert_model.h:97] Throughput:           27.46 MB/s
INFO: [litert/tools/benchmark_litert_model.h:99] Overall footprint:    11.50 MB
INFO: [litert/tools/benchmark_litert_model.h:101] ======================================
"""


def with_delegate(line):
    return HEAD + f"INFO: {line}\n" + RUNS


def as_logcat(text, tag="tflite  "):
    lines = (line.removeprefix("INFO: ") for line in text.splitlines())
    return "".join(f"01-11 23:28:59.026  7651  7651 I {tag}: {line}\n" for line in lines)


# --- formats


@pytest.mark.parametrize(
    "text",
    [
        CLASSIC,
        CLASSIC.replace("INFO: ", "").replace("WARN: ", ""),
        CLASSIC.replace("\n", "\r\n"),
        as_logcat(CLASSIC),
        as_logcat(CLASSIC) + as_logcat("count=9 curr=7\n", tag="SomeoneElse"),
        "".join(f"I/tflite  ( 7651): {line.removeprefix('INFO: ')}\n" for line in CLASSIC.splitlines()),
    ],
    ids=["prefixed", "bare", "crlf", "logcat", "logcat of others", "old logcat"],
)
def test_formats(text):
    parsed = parse(text)
    assert {name: getattr(parsed, name) for name in EXPECTED} == EXPECTED
    assert (parsed.delegate, parsed.delegation, parsed.profile, parsed.warnings) == (None, None, (), ())


def test_the_format_of_2019():
    parsed = parse(OLD)
    assert (parsed.init_ms, parsed.first_ms, parsed.warmup, parsed.runs) == (9.5, 70.0, 1, 4)
    assert parsed.latency_ms == Latency(66.7725, 66.699, 66.838, 0.052)
    assert parsed.peak_memory_bytes is None


def test_the_format_of_litert():
    parsed = parse(LITERT, delegate="xnnpack")
    assert (parsed.init_ms, parsed.first_ms, parsed.warmup, parsed.runs) == (4.478, 2.0, 2, 3)
    assert parsed.latency_ms == Latency(0.461667, 0.442, 0.48, 0.015, median=0.463, p5=0.442, p95=0.48)
    assert parsed.peak_memory_bytes == 11776 * 1024
    assert parsed.delegation == "partial" and parsed.delegate == Delegate("xnnpack", 64, 65)


def test_litert_results_alone():
    parsed = parse("INFO: STARTING!\n========" + LITERT.partition("========")[2])
    assert (parsed.init_ms, parsed.runs, parsed.latency_ms) == (4.48, 3, Latency(0.46, 0.44, 0.48, 0.02))


def test_single_and_equal_runs():
    text = CLASSIC.replace(
        "count=2 first=1800 curr=1200 min=1200 max=1800 avg=1500 std=300", "count=2 curr=9(all same)"
    )
    text = text.replace("First inference: 1800, Warmup (avg): 1500", "First inference: 9, Warmup (avg): 9")
    text = text.replace("count=4 first=1100 curr=1000 min=1000 max=1300 avg=1112.5 std=113", "count=1 curr=9992420")
    text = text.replace("least 4 it", "least 1 it").replace("Inference (avg): 1112.5", "Inference (avg): 9.99242e+06")
    parsed = parse(text)
    assert parsed.latency_ms == Latency(9992.42, 9992.42, 9992.42, 0.0)
    assert (parsed.first_ms, parsed.warmup, parsed.runs) == (0.009, 2, 1)


def test_no_warmup():
    text = CLASSIC.replace("count=2 first=1800 curr=1200 min=1200 max=1800 avg=1500 std=300", "count=0")
    text = text.replace("First inference: 1800, Warmup (avg): 1500", "First inference: 0, Warmup (avg): 0")
    parsed = parse(text.replace("least 2 it", "least 0 it"))
    assert (parsed.warmup, parsed.first_ms) == (0, 1.1)


def test_a_line_of_timings_printed_twice():
    line = next(line for line in CLASSIC.splitlines(keepends=True) if "timings" in line)
    assert parse(CLASSIC + line) == parse(CLASSIC)


# --- delegates

APPLIED, GRAPH = "Explicitly applied", "delegate, and the model graph will be"


@pytest.mark.parametrize(
    ("line", "asked", "delegation", "delegate"),
    [
        (f"{APPLIED} XNNPACK {GRAPH} partially executed by the delegate w/ 2 delegate kernels.",
         "xnnpack", "partial", None),
        (f"{APPLIED} GPU {GRAPH} completely executed by the delegate.", "gpu", "complete", None),
        (f"Applied GPU {GRAPH} completely executed w/ the delegate.", None, "complete", None),
        (f"{APPLIED} EXTERNAL {GRAPH} completely executed by the delegate.",
         "/data/local/tmp/libgpu_vendor.so", "complete", None),
        ("Replacing 17 out of 21 node(s) with delegate (TfLiteQnnDelegate) node, yielding 9 partitions for subgraph 0.",
         "libQnnTFLiteDelegate.so", "partial", Delegate("libQnnTFLiteDelegate.so", 17, 21)),
        ("Replacing 31 out of 31 node(s) with delegate (LITERT_CL) node, yielding 1 partitions for subgraph 0.",
         "gpu", "complete", Delegate("gpu", 31, 31)),
        ("Replacing 31 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 1 partitions.",
         "gpu", "partial", None),
    ],
)  # fmt: skip
def test_delegates(line, asked, delegation, delegate):
    parsed = parse(with_delegate(line), delegate=asked)
    assert (parsed.delegation, parsed.delegate) == (delegation, delegate)


def test_subgraphs_are_added_and_repetitions_are_not():
    lines = [
        f"Replacing {n} out of {of} node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 part for graph {i}."
        for n, of, i in [(3, 4, 0), (3, 4, 0), (5, 6, 1)]
    ]
    assert parse(with_delegate("\nINFO: ".join(lines))).delegate == Delegate("xnnpack", 8, 10)


@pytest.mark.parametrize(
    ("line", "asked", "message"),
    [
        ("Though XNNPACK delegate is explicitly applied, the model graph will not be executed by the delegate.",
         "xnnpack", "applied it to nothing: Though XNNPACK"),
        ("GPU acceleration is unsupported on this platform.", "gpu", "applied it to nothing: GPU acceleration is"),
        (f"{APPLIED} XNNPACK {GRAPH} completely executed by the delegate.",
         "gpu", "'gpu' was asked for, and benchmark_model applied it to nothing"),
        ("Created TensorFlow Lite XNNPACK delegate for CPU.", "none", "No delegate was asked for"),
        ("Replacing 9 out of 4 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions.",
         "xnnpack", "took 9 of 4"),
    ],
)  # fmt: skip
def test_delegates_that_are_not_what_was_asked_for(line, asked, message):
    with pytest.raises(DeviceError, match=message):
        parse(with_delegate(line), delegate=asked)


def test_an_unasked_delegate_that_takes_nothing_is_a_warning():
    line = "Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate."
    assert parse(with_delegate(line)).warnings == (line,)


# --- failures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CLASSIC.replace("INFO: Log", "WARN: Unconsumed cmdline flags: --use_gpu=true\nINFO: Log"), "--use_gpu=true"),
        (HEAD + "ERROR: Could not open '/x.tflite'.\nERROR: Failed to load model /x.tflite\n", "not find.*/x.tflite"),
        (HEAD + "ERROR: The model is not a valid Flatbuffer buffer\nERROR: Benchmarking failed.\n", "cannot load"),
        ("sh: ./benchmark_model: not executable: 64-bit ELF file\n", "for another processor"),
        ("sh: /data/local/tmp/bm: inaccessible or not found\n", "is not there"),
        ("sh: /data/local/tmp/benchmark_model: Permission denied\n", "may not be executed"),
        (HEAD + "ERROR: x.cc:4 a <= b was not true.\nERROR: Node number 5 (EXPAND_DIMS) failed to prepare.\n",
         r"number 5 \(EXPAND_DIMS\) failed to prepare. \| x.cc:4 a <= b"),
        (HEAD + "ERROR: Select TensorFlow op(s), included in the given model, is(are) not supported.\n", "flex"),
        (HEAD + "ERROR: Encountered unresolved custom op: Foo.\n", "lacks an operator.*Foo"),
        ("STARTING!\nFailed to parse flag 'num_runs' against argv '--num_runs=x'\n", "value of a flag.*num_runs=x"),
        ("ERROR: usage: /a b/benchmark_model <flags>\nFlags:\n\t--num_runs=50\tint32\n", "only printed its help"),
        (HEAD + "Failed to apply XNNPACK delegate.\nBenchmarking failed.\n", "could not apply the delegate"),
        (HEAD + "ERROR: Disallowed CPU fallback detected.\n", "operators that the delegate does not take"),
        (HEAD.replace("INFO: Graph", "INFO: Run w/o invoking kernels: [1]\nINFO: Graph"), "dry run"),
        (CLASSIC.replace("least 4 it", "least 0 it").replace(
            "count=4 first=1100 curr=1000 min=1000 max=1300 avg=1112.5 std=113", "count=0"), "ran no inference"),
        (HEAD + "INFO: EXTERNAL delegate created.\nSegmentation fault\n", "crashed"),
        (CLASSIC + "ERROR: Benchmarking failed.\n", "benchmark_model failed"),
        (HEAD, "cut off; its last line is: Loaded model"),
        ("", "cut off; its last line is: nothing"),
        (CLASSIC + CLASSIC, "more than one run"),
        (CLASSIC.replace("Init: 2500", "Init: 2600"), "not those it printed before"),
        (CLASSIC.replace("least 4 it", "least 3 it"), "announced 3 runs and made 4"),
        (CLASSIC.replace("least 4 it", "least 5 it"), "announced 5 runs and made 4"),
        (CLASSIC.replace("std=113", "std=9"), "contradicts itself"),
        (CLASSIC.replace("std=113", "std=113 p5=1200 median=1100 p95=1300"), "contradicts itself"),
        (CLASSIC.replace("curr=1000 ", ""), "cut off"),
        (CLASSIC.replace("avg=1112.5", "avg=1112,5"), "garbled"),
        (CLASSIC.replace("least 0 seconds", "least . seconds"), "does not announce its runs"),
        (LITERT.replace("(3 runs)", "(4 runs)"), "not those it printed before"),
        (LITERT.replace("(max):      0.48", "(max):      0.58"), "not those it printed before"),
        (LITERT[:-20], "cut off"),
    ],
)  # fmt: skip
def test_failures(text, message):
    with pytest.raises(DeviceError, match=message):
        parse(text)


def test_other_complaints_are_warnings():
    assert parse(CLASSIC.replace("INFO: Note:", "WARN: Note:")).warnings[0].startswith("Note: ")


# --- the operator profile


def test_profile():
    parsed = parse(CLASSIC + PROFILE)
    assert parsed.profile[:2] == (OperatorCost("a/Relu6;a/Conv2D", "CONV_2D", 0.7), OperatorCost("b", "ADD", 0.25, 2))
    assert parsed.profile[2].cost == pytest.approx(0.05) and parsed.profile[2].calls == 0
    assert parsed.warnings == ()


def test_profile_of_the_runs_and_not_of_the_initialization():
    first = PROFILE.replace("Operator-wise Profiling Info for Regular Benchmark Runs:", "Profiling Info for Benchmark "
                            "Initialization:")  # fmt: skip
    assert parse_profile(first.replace("CONV_2D", "ModifyGraph") + PROFILE) == parse_profile(PROFILE)
    with pytest.raises(DeviceError, match="cut off"):
        parse_profile(first)


def test_profile_with_a_start_column_and_without_calls():
    """Builds of 2018: shares are of all runs' time."""
    text = (
        "\t[node type]\t[start]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]\n"
        "\tCONV_2D\t0.000\t0.8\t0.750\t37.500%\t37.500%\t0.000\t0\t[a]\n"
        "\tADD\t0.750\t0.3\t0.250\t12.500%\t50.000%\t0.000\t0\t[b]\n\n"
        "Timings (microseconds): count=2 first=1001 curr=1000 min=999 max=1001 avg=1000 std=1\n2 nodes observed\n"
    )
    assert parse_profile(text) == (OperatorCost("a", "CONV_2D", 0.75), OperatorCost("b", "ADD", 0.25))


def test_profile_as_csv():
    text = (
        "node type,first,avg_ms,%,cdf%,mem KB,times called,name\n"
        "Convolution (NHWC, QC8) GEMM,0.16,0.7502,75.02%,75.02%,0,1,Delegate/Convolution (NHWC\t QC8) GEMM:0\n"
        "SOFTMAX,0.016,0.2498,24.98%,100%,0,1,[b]:7\n\n"
        "Timings (microseconds): count=2 first=1001 curr=1000 min=999 max=1001 avg=1000 std=1\n2 nodes observed\n"
    )
    convolution, softmax = parse_profile(text)
    assert (convolution.kind, convolution.cost) == ("Convolution (NHWC, QC8) GEMM", 0.7502)
    assert softmax == OperatorCost("b", "SOFTMAX", 0.2498)


@pytest.mark.parametrize(
    ("garbled", "message"),
    [
        (PROFILE.replace("0.700\t", "0.708\t"), "does not fit its share"),
        (PROFILE.replace("95.000%", "94.000%"), "do not add up"),
        (PROFILE.replace("3 nodes", "4 nodes"), "3 rows for 4 nodes"),
        (PROFILE.replace("0.125\t", "0.1x5\t"), "garbled"),
        (PROFILE.replace("0.125\t", "nan\t"), "garbled"),
        (PROFILE.replace("\t[b]:1", ""), "garbled"),
        (PROFILE.partition("Timings")[0], "end of the table"),
        (PROFILE.partition("\t    ADD")[0], "cut off"),
        (PROFILE.partition("============")[0], "no table"),
    ],
)
def test_a_broken_profile_is_left_out(garbled, message):
    with pytest.raises(DeviceError, match=message):
        parse_profile(garbled)
    parsed = parse(CLASSIC.replace("INFO: Graph", "INFO: Enable op profiling: [1]\nINFO: Graph") + garbled)
    assert parsed.profile == () and parsed.latency_ms == EXPECTED["latency_ms"]
    assert "no operator profile" in parsed.warnings[-1]


def test_a_profile_in_a_file_is_not_missed():
    text = CLASSIC.replace(
        "INFO: Graph",
        "INFO: Enable op profiling: [1]\nINFO: CSV File to export profiling data to: [/data/p.csv]\nINFO: Graph",
    )
    assert parse(text).warnings == ()


# --- texts that were cut or garbled

WHOLE = [CLASSIC + PROFILE, OLD, LITERT, as_logcat(CLASSIC)]


@settings(deadline=None, max_examples=300)
@given(text=st.sampled_from(WHOLE), cut=st.floats(0, 1))
def test_cut(text, cut):
    check_lines_lost(text, text[: int(len(text) * cut)])


@settings(deadline=None, max_examples=300)
@given(text=st.sampled_from(WHOLE), data=st.data())
def test_lines_lost_doubled_or_swapped(text, data):
    lines = text.splitlines(keepends=True)
    i, j = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    lost, doubled, swapped = lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:], [*lines]
    swapped[i], swapped[j] = lines[j], lines[i]
    check_lines_lost(text, "".join(data.draw(st.sampled_from([lost, doubled, swapped]))))


def check_lines_lost(text, damaged):
    """What was printed once may be missing; everything else is there and right, or there is an error."""
    whole = parse(text)
    try:
        parsed = parse(damaged)
    except DeviceError:
        return
    assert parsed.peak_memory_bytes in (whole.peak_memory_bytes, None)
    assert parsed.profile in (whole.profile, ())
    assert parsed.delegate in (whole.delegate, None)
    ignored = {"peak_memory_bytes": None, "profile": (), "delegate": None, "delegation": None, "warnings": ()}
    if "BENCHMARK" in text:  # may stand on its block of results alone
        assert astuple(parsed.latency_ms)[:4] == pytest.approx(astuple(whole.latency_ms)[:4], abs=0.0061)
        assert (parsed.warmup, parsed.runs) == (whole.warmup, whole.runs)
    else:
        assert replace(parsed, **ignored) == replace(whole, **ignored)


@settings(deadline=None, max_examples=500)
@given(text=st.sampled_from(WHOLE), data=st.data())
def test_garbled_characters(text, data):
    """What is printed twice never comes out wrong."""
    check_garbled(text, garbled(text, data))


def garbled(text, data):
    """One character becomes another or is lost."""
    position = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.sampled_from("0123456789") | st.sampled_from(string.printable) | st.just(""))
    return text[:position] + character + text[position + 1 :]


def check_garbled(text, damaged):
    whole = parse(text)
    try:
        parsed = parse(damaged)
    except DeviceError:
        return
    assert parsed.latency_ms.mean == pytest.approx(whole.latency_ms.mean, abs=0.0061 if "BENCHMARK" in text else 0)
    assert parsed.init_ms == pytest.approx(whole.init_ms, abs=0.0061 if "BENCHMARK" in text else 0)
    if "Average inference" not in text:  # builds of 2019 print it once
        assert parsed.first_ms == pytest.approx(whole.first_ms, abs=0.0061 if "BENCHMARK" in text else 0)
    if "at least 0 seconds" in text:
        assert parsed.runs == whole.runs
    costs = [entry.cost for entry in parsed.profile]
    assert costs in ([], pytest.approx([entry.cost for entry in whole.profile], abs=0.004))


# --- the command line


def test_command():
    settings = Settings(threads=2, warmup=3, runs=50, timeout_s=90.0, delegate="xnnpack")
    assert command("/d/benchmark_model", "/d/0.tflite", settings) == [
        "/d/benchmark_model", "--graph=/d/0.tflite", "--num_threads=2", "--num_runs=50", "--min_secs=0",
        "--warmup_runs=3", "--warmup_min_secs=0", "--max_secs=90", "--use_xnnpack=true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("delegate", "flag"),
    [
        ("none", "--use_xnnpack=false"),
        ("gpu", "--use_gpu=true"),
        ("/d/libvendor.so", "--external_delegate_path=/d/libvendor.so"),
    ],
)
def test_command_with_delegates_and_a_profile(delegate, flag):
    arguments = command("b", "g", Settings(delegate=delegate, profile=True))
    assert flag in arguments and "--enable_op_profiling=true" in arguments


def test_command_for_outputs():
    inputs = [("x:0", (1, 96, 96, 3), "/d/0.bin"), ("y", (1, 4), "/d/1.bin")]
    arguments = command("b", "g", Settings(profile=True), inputs=inputs, output="/d/out.bin")
    assert {"--num_runs=1", "--warmup_runs=0", "--output_filepath=/d/out.bin"} < set(arguments)
    assert "--input_layer=x:0,y" in arguments and "--input_layer_shape=1,96,96,3:1,4" in arguments
    assert r"--input_layer_value_files=x\:0:/d/0.bin,y:/d/1.bin" in arguments
    assert "--enable_op_profiling=true" not in arguments
    with pytest.raises(DeviceError, match="separates inputs by commas"):
        command("b", "g", Settings(), inputs=[("a,b", (1,), "/d/0.bin")])


# --- outputs of the real program, where the shared data is

REAL = Path(os.environ.get("MOBILEQAT_DATA", "")).parent / "android/benchmark_model"
needs_real = pytest.mark.skipif(
    "MOBILEQAT_DATA" not in os.environ or not REAL.is_dir(),
    reason="captured outputs of benchmark_model lie beside MOBILEQAT_DATA",
)

SUCCESSES = {
    "public/01_old_2019_arm64_quant": (9.933, 127.425, 15, 66.7676),
    "public/02_tf2x_xnnpack_int8_opprofile_rpi": (18.777, 64.791, 50, 55.0432),
    "public/05_gpu_full_delegation_android": (870.557, 130.565, 50, 119.375),
    "real_2.14.1_arm64_qemu/opprof": (45.343, 137.078, 10, 107.438),
    "real_2.14.1_x86/basic": (1.01, 22.886, 62, 16.2365),
    "real_2.14.1_x86/memfoot": (0.371, 0.434, 4225, 0.237342),
    "real_2.14.1_x86/opprof": (1.159, 21.14, 68, 14.7175),
    "real_2.14.1_x86/opprof_csv_old": (6.44, 36.151, 42, 23.7642),
    "real_2.14.1_x86/verbose": (0.394, 0.403, 2908, 0.343529),
    "real_2.14.1_x86_xnnpack/xnn_minnodes": (10.578, 1.885, 678, 1.47478),
    "real_2.14.1_x86_xnnpack/xnn_opprof": (7.435, 1.987, 744, 1.32706),
    "real_2.14.1_x86_xnnpack/xnn_true": (6.022, 1.554, 778, 1.28449),
    "real_2.14.1_x86_xnnpack_noqs8/xnn_default": (0.984, 15.94, 46, 21.993),
    "real_2.14.1_x86_xnnpack_noqs8/xnn_false": (1.046, 19.156, 63, 16.1049),
    "real_2.14.1_x86_xnnpack_noqs8/xnn_opprof": (2.473, 40.673, 62, 16.066),
}
FAILURES = {
    "public/03_delegate_fail_xnnpack": "could not apply the delegate",
    "public/04_opprofile_nnapi_partitions_nostartcol": "cut off",
    "public/06_logcat_benchmark_apk_xnnpack": "cut off",
    "public/07_new_litert_compiledmodel_gpu_2026": "cut off",
    "public/08_kernel_prepare_error_flex_model": "EXPAND_DIMS",
    "public/09_wrong_abi_not_executable": "another processor",
    "public/10_readme_opprofile_mobilenetv1": "cut off",
    "real_2.14.1_x86/badflag": "no_such_flag",
    "real_2.14.1_x86/dry": "dry run",
    "real_2.14.1_x86/extdel": "crashed",
    "real_2.14.1_x86/garbage": "cannot load",
    "real_2.14.1_x86/gpu": "use_gpu",
    "real_2.14.1_x86/help": "help",
    "real_2.14.1_x86/nofile": "does not find",
    "real_2.14.1_x86/nograph": "given no file",
    "real_2.14.1_x86/opprof_csv": "op_profiling_output_mode",
    "real_2.14.1_x86/truncated": "cannot load",
    "real_2.14.1_x86/xnnflag": "use_xnnpack",
    "real_2.14.1_x86_xnnpack/xnn_reqfull": "operators that the delegate does not take",
    "real_2.14.1_x86_xnnpack_noqs8/help": "help",
}


def real(name):
    return (REAL / f"{name}.txt").read_text(encoding="utf-8")


@needs_real
@pytest.mark.parametrize("name", SUCCESSES)
def test_real_outputs(name):
    parsed = parse(real(name))
    assert (parsed.init_ms, parsed.first_ms, parsed.runs, parsed.latency_ms.mean) == SUCCESSES[name]
    if "opprof" in name and name.startswith("real") and "csv" not in name:
        # A run's time is its operators' and a little more.
        assert len(parsed.profile) == 65
        assert 0.9 * parsed.latency_ms.mean < sum(entry.cost for entry in parsed.profile) < parsed.latency_ms.mean


@needs_real
@pytest.mark.parametrize("name", FAILURES)
def test_real_failures(name):
    with pytest.raises(DeviceError, match=FAILURES[name]):
        parse(real(name))


@needs_real
@pytest.mark.parametrize("name", ["xnn_true", "xnn_minnodes"])
def test_real_delegates(name):
    assert parse(real(f"real_2.14.1_x86_xnnpack/{name}"), delegate="xnnpack").delegation == "partial"
    with pytest.raises(DeviceError, match="applied it to nothing"):
        parse(real(f"real_2.14.1_x86_xnnpack_noqs8/{name}"), delegate="xnnpack")
    assert parse(real("public/05_gpu_full_delegation_android"), delegate="gpu").delegation == "complete"


@needs_real
def test_real_results_of_litert():
    """The excerpt lacks its last line."""
    parsed = parse(real("public/07_new_litert_compiledmodel_gpu_2026") + "=" * 38 + "\n")
    assert (parsed.init_ms, parsed.warmup, parsed.runs) == (23744.73, 1, 10)
    assert parsed.latency_ms == Latency(7430.2, 7416.4, 7448.86, 9.92)


@needs_real
def test_real_profile_of_2018():
    profile = parse_profile(real("public/10_readme_opprofile_mobilenetv1"))
    assert len(profile) == 31 and sum(entry.cost for entry in profile) == pytest.approx(79.44, abs=0.1)


@needs_real
@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(SUCCESSES)), cut=st.floats(0, 1))
def test_real_outputs_cut(name, cut):
    text = real(name)
    check_lines_lost(text, text[: int(len(text) * cut)])


@needs_real
@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(SUCCESSES)), data=st.data())
def test_real_outputs_garbled(name, data):
    text = real(name)
    check_garbled(text, garbled(text, data))
