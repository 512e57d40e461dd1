"""Stands in for `benchmark_model` 2.14 on a simulated device: the same flags and lines, computed by the real LiteRT.

It runs as a program of its own, with Python and LiteRT of the host or of an arm64 system under qemu.
"""

import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

DEFAULTS = {
    "graph": "",
    "num_threads": "-1",
    "num_runs": "50",
    "min_secs": "1",
    "max_secs": "150",
    "warmup_runs": "1",
    "warmup_min_secs": "0.5",
    "use_xnnpack": "",
    "input_layer": "",
    "input_layer_shape": "",
    "input_layer_value_files": "",
    "output_filepath": "",
    "enable_op_profiling": "false",
    "external_delegate_path": "",
}


def main(arguments):
    flags, unknown = dict(DEFAULTS), []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in flags:
            flags[name] = value
        else:
            unknown.append(argument)
    print("INFO: STARTING!\nWARN: Duplicate flags: num_threads")
    if unknown:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(unknown)}")
    print(f"INFO: Graph: [{flags['graph']}]")
    if flags["enable_op_profiling"] == "true":
        print("INFO: Enable op profiling: [1]")
    start = time.perf_counter()
    try:
        interpreter = load(flags)
    except (OSError, ValueError) as error:
        print(f"ERROR: Failed to load model {flags['graph']} ({error})\nERROR: Benchmarking failed.", file=sys.stderr)
        return 1
    init_us = round((time.perf_counter() - start) * 1e6)
    print(f"INFO: Initialized session in {init_us / 1e3:g}ms.")
    set_inputs(interpreter, flags)
    warmup = stage(interpreter, int(flags["warmup_runs"]), float(flags["warmup_min_secs"]), flags)
    timed = stage(interpreter, int(flags["num_runs"]), float(flags["min_secs"]), flags)
    first = warmup[0] if warmup else 0
    means = [f"{np.mean(values):g}" if values else "0" for values in (warmup, timed)]
    print(
        f"INFO: Inference timings in us: Init: {init_us:g}, First inference: {first:g}, "
        f"Warmup (avg): {means[0]}, Inference (avg): {means[1]}"
    )
    print("INFO: Memory footprint delta from the start of the tool (MB): init=6.11328 overall=7.98047")
    if flags["enable_op_profiling"] == "true":
        print_profile(interpreter, timed)
    if flags["output_filepath"]:
        with open(flags["output_filepath"], "wb") as file:
            for details in interpreter.get_output_details():
                file.write(interpreter.get_tensor(details["index"]).tobytes())
    return 0


def load(flags):
    options = {"model_path": flags["graph"], "num_threads": max(int(flags["num_threads"]), 1)}
    if flags["use_xnnpack"] == "false":
        options["experimental_op_resolver_type"] = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(**options)
    interpreter.allocate_tensors()
    if flags["external_delegate_path"]:
        with open(flags["external_delegate_path"], "rb"):
            print("INFO: EXTERNAL delegate created.")
        print("VERBOSE: Replacing 1 out of 1 node(s) with delegate (VENDOR) node, yielding 1 partitions.")
        print("INFO: Explicitly applied EXTERNAL delegate, ", end="")
        print("and the model graph will be completely executed by the delegate.")
    if flags["use_xnnpack"] == "true":
        print("INFO: XNNPACK delegate created.")
        print("INFO: Explicitly applied XNNPACK delegate, ", end="")
        print("and the model graph will be completely executed by the delegate.")
    return interpreter


def set_inputs(interpreter, flags):
    pairs = [item.rsplit(":", 1) for item in flags["input_layer_value_files"].split(",") if item]
    files = {name.replace("\\:", ":"): path for name, path in pairs}
    for details in interpreter.get_input_details():
        values = np.zeros(details["shape"], details["dtype"])
        if details["name"] in files:
            values = np.fromfile(files[details["name"]], details["dtype"]).reshape(details["shape"])
        interpreter.set_tensor(details["index"], values)


def stage(interpreter, runs, seconds, flags):
    """Microseconds of every inference of a stage, announced and summarized as the program does."""
    print(
        f"INFO: Running benchmark for at least {runs} iterations and at least {seconds:g} seconds "
        f"but terminate if exceeding {float(flags['max_secs']):g} seconds."
    )
    values = []
    for _ in range(runs):
        start = time.perf_counter()
        interpreter.invoke()
        values.append(round((time.perf_counter() - start) * 1e6))
    if len(values) < 2:
        print(f"INFO: count={len(values)}" + (f" curr={values[0]}" if values else "") + "\n")
    else:
        print(
            f"INFO: count={len(values)} first={values[0]} curr={values[-1]} min={min(values)} max={max(values)} "
            f"avg={np.mean(values):g} std={int(np.std(values))}\n"
        )
    return values


def print_profile(interpreter, values):
    """The table of a model of one operator, which takes all of the time."""
    average_ms = np.mean(values) / 1e3
    columns = ("[node type]", "[first]", "[avg ms]", "[%]", "[cdf%]", "[mem KB]", "[times called]", "[Name]")
    name = f"[{interpreter.get_output_details()[0]['name']}]:0"
    row = ("FULLY_CONNECTED", f"{average_ms:.3f}", f"{average_ms:.3f}", "100.000%", "100.000%", "0.000", "1", name)
    print("INFO: Operator-wise Profiling Info for Regular Benchmark Runs:")
    print("============================== Run Order ==============================")
    for cells in (columns, row):
        print("".join(f"\t{cell:>12}" for cell in cells))
    total = f"count={len(values)} first={values[0]} curr={values[-1]} min={min(values)} max={max(values)}"
    print("\nNumber of nodes executed: 1")
    print(f"\nTimings (microseconds): {total} avg={np.mean(values):g} std={int(np.std(values))}")
    print("Memory (bytes): count=0\n1 nodes observed\n\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
