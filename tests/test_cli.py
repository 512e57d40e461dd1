"""The command line as its users meet it: whole outputs, exit codes, files left behind. No Keras at import."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from run_results import make_results

from mobileqat import cli
from mobileqat.errors import ParityError, TrainingError

COMMANDS = (
    "analyze",
    "bench",
    "completion",
    "convert",
    "doctor",
    "evaluate",
    "import-keras2",
    "inspect",
    "new",
    "recipes",
    "report",
    "search",
    "snippet",
    "train",
    "verify",
)
RECIPE = """
name: tiny
description: one dense layer
data: {source: digits, calibration_samples: 32}
model: {name: "tiny_model:build"}
qat: {epochs: 1, batch_size: 256}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 32}
"""
MODEL = """
import time
from pathlib import Path
import keras
def build(input_shape, classes, wait=False):
    if wait:
        Path("waiting").touch()
        time.sleep(120)
    layers = keras.layers
    return keras.Sequential([keras.Input(input_shape), layers.Flatten(), layers.Dense(classes, activation="softmax")])
"""


def run(*arguments, code: int = 0):
    """Runs a command in this process and checks its exit code; an exception that gets out is a failure."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="mobileqat")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def error(*arguments, code: int = 2) -> str:
    """The message of a command that fails: on stderr, on one screen."""
    result = run(*arguments, code=code)
    assert result.stderr.startswith("Error: ") or "\nError: " in result.stderr
    assert len(result.stderr.splitlines()) <= 24
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model files of one small network, and digits as an npz file."""
    import keras

    import mobileqat as mq
    from mobileqat.convert import convert_float
    from mobileqat.data import load_dataset

    path, data = tmp_path_factory.mktemp("files"), load_dataset("digits")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.Flatten(name="flat"),
            layers.Dense(10, activation="softmax", name="classes"),
        ],
        name="small",
    )
    model.save(path / "float.keras")
    model.save_weights(path / "only.weights.h5")
    quantized = mq.quantize_model(model, input_range=(0, 255))
    mq.calibrate(quantized, data.train.x[:64])
    quantized.save(path / "quantized.keras")
    (path / "quantized.tflite").write_bytes(mq.convert(quantized))
    (path / "float.tflite").write_bytes(convert_float(model))
    splits = {"train": data.train, "test": data.test}
    arrays = {f"{axis}_{name}": getattr(split, axis)[:200] for name, split in splits.items() for axis in "xy"}
    np.savez(path / "digits.npz", **arrays)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with a recipe and its model function."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "tiny_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("tiny_model", None)
    yield tmp_path
    sys.modules.pop("tiny_model", None)


# ------------------------------------------------------------------ help, and what is quick


def test_help():
    assert run("--help").output == (
        "Usage: mobileqat [OPTIONS] COMMAND [ARGS]...\n"
        "\n"
        "  From a Keras model to a verified integer .tflite file.\n"
        "\n"
        "  Start here:\n"
        "    mobileqat recipes                        what can be run\n"
        "    mobileqat train digits_dscnn_w8a8        a whole run in about a minute\n"
        "    mobileqat new                            a recipe for your own data and model\n"
        "\n"
        "Options:\n"
        "  --version   Show the version and exit.\n"
        "  -h, --help  Show this message and exit.\n"
        "\n"
        "Commands:\n"
        "  analyze        Say what quantization costs in MODEL, layer by layer.\n"
        "  bench          Measure what one inference of FILES costs.\n"
        "  completion     Print a script for completion in SHELL.\n"
        "  convert        Convert MODEL to an integer .tflite file.\n"
        "  doctor         Say what is there, what is missing, and how to get it.\n"
        "  evaluate       Score MODEL on the test split of --data.\n"
        "  import-keras2  Rebuild the Keras 2 model SOURCE in Keras 3 as TARGET.\n"
        "  inspect        Say what is inside FILE, and whether it is fully integer.\n"
        "  new            Write a recipe for your own data and model to FILE.\n"
        "  recipes        List the shipped recipes, or show one.\n"
        "  report         Print the report of RUN_DIR again.\n"
        "  search         Find the bits of each layer's weights under a budget.\n"
        "  snippet        Print a program that runs FILE, in Python or Kotlin.\n"
        "  train          Run a RECIPE: a file, or the name of a shipped one.\n"
        "  verify         Compare the quantized Keras MODEL with FILE, in LSBs.\n"
    )


def test_every_command_is_tested_here():
    assert sorted(cli.main.commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command):
    output = run(command, "--help").output
    assert f"  Example:\n    mobileqat {command}" in output
    assert "--debug" in output and "--quiet" in output
    assert ("--json" in output) == (command != "completion")  # a script is for a shell


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_parses(command):
    example = cli.main.commands[command].help.split("Example:\n")[1].split()
    assert example[:2] == ["mobileqat", command]
    cli.main.commands[command].make_context(command, example[2:])


def test_recipes():
    from mobileqat.recipe import list_recipes

    rows = list_recipes()
    lines = run("recipes").output.splitlines()
    assert [line.split()[0] for line in lines[: len(rows)]] == [row.name for row in rows]
    assert all(line.endswith(row.description) for line, row in zip(lines, rows, strict=False))
    assert lines[len(rows) :] == ["", "See one with: mobileqat recipes show NAME", "Run one with: mobileqat train NAME"]
    shown = json.loads(run("recipes", "--json").stdout)
    assert [(row["name"], row["description"]) for row in shown] == [(row.name, row.description) for row in rows]
    assert {"digits_dscnn_w8a8", "cifar10_resnet8_w8a8", "fashion_mnist_mobilenetv1_w8a8"} <= {r.name for r in rows}


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["train", "--help"], ["--version"]])
def test_what_is_quick_imports_nothing_heavy(arguments):
    program = f"""
import sys
sys.argv = ["mobileqat", *{arguments!r}]
from mobileqat.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"tensorflow", "keras", "numpy", "ai_edge_litert", "matplotlib", "sklearn", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    finished = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_module_is_the_command():
    finished = subprocess.run([sys.executable, "-m", "mobileqat", "recipes"], capture_output=True, text=True)
    assert finished.returncode == 0
    assert finished.stdout == run("recipes").output
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["inspect"], "Missing argument 'FILE'"),
        (["bench"], "Missing argument 'FILES...'"),
        (["evaluate", "a.tflite"], "Missing option '--data'"),
        (["bench", "a.tflite", "--runs", "0"], "0 is not in the range x>=1"),
        (["bench", "a.tflite", "--runtime", "x"], "'x' is not one of"),
        (["convert", "a.keras", "--samples", "0"], "0 is not in the range x>=1"),
        (["train", "digits_dscnn_w8a8", "--resume"], "--resume needs --out"),
    ],
)
def test_usage_errors(arguments, problem):
    assert problem in error(*arguments)


# ------------------------------------------------------------------ errors of any command


def recipes_that_raise(monkeypatch, exception):
    def raises():
        raise exception

    monkeypatch.setattr("mobileqat.recipe.list_recipes", raises)


@pytest.mark.parametrize(
    ("exception", "code", "message"),
    [
        (KeyboardInterrupt(), 1, "Error: Interrupted.\n"),
        (ParityError("beyond the bar"), 1, "Error: beyond the bar\n"),
        (PermissionError(errno.EACCES, "no", "x"), 2, "Error: PermissionError: [Errno 13] no: 'x'\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "Error: The disk is full: [Errno 28] No space\n"),
        (MemoryError(), 2, "Error: MemoryError: no message\n"),
        (
            ZeroDivisionError("bug"),
            2,
            "Error: Unexpected ZeroDivisionError: bug\nRun it again with --debug to see where.\n",
        ),
    ],
)
def test_an_error_is_one_message_and_a_code(monkeypatch, exception, code, message):
    recipes_that_raise(monkeypatch, exception)
    assert error("recipes", code=code) == message


def test_an_endless_message_is_cut(monkeypatch):
    recipes_that_raise(monkeypatch, ValueError("\n".join(["a line of a long message"] * 500)))
    assert len(error("recipes").splitlines()) < 15


def test_debug_adds_the_traceback_and_keeps_the_code(monkeypatch):
    recipes_that_raise(monkeypatch, ParityError("beyond the bar"))
    result = CliRunner().invoke(cli.main, ["recipes", "--debug"])
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("Error: beyond the bar\n")


def test_json_is_all_there_is_on_stdout(monkeypatch):
    from mobileqat.recipe import list_recipes

    def chatty():
        print("Downloading data from somewhere")
        return list_recipes()

    monkeypatch.setattr("mobileqat.recipe.list_recipes", chatty)
    result = run("recipes", "--json")
    assert isinstance(json.loads(result.stdout), list)
    assert result.stderr == "Downloading data from somewhere\n"


# ------------------------------------------------------------------ inspect, verify, evaluate, bench


def test_inspect_an_integer_file(folder):
    file = folder / "quantized.tflite"
    detail = json.loads(run("inspect", file, "--json").stdout)
    size, weights = file.stat().st_size / 1000, detail["weight_bytes"] / 1000
    assert [line.rstrip() for line in run("inspect", file).output.splitlines()] == [
        f"{file}: fully integer, {size:.1f} kB of which constants {weights:.1f} kB",
        "  input 'image': int8 [1, 8, 8, 1], scale 1, zero point -128",
        "  output 'classes/softmax': int8 [1, 10], scale 0.00390625, zero point -128",
        "operator         count",
        "CONV_2D          1",
        "RESHAPE          1",
        "FULLY_CONNECTED  1",
        "SOFTMAX          1",
    ]
    assert detail["fully_integer"] is True
    assert detail["size_bytes"] == file.stat().st_size


def test_inspect_a_float_file_fails_the_check(folder):
    result = run("inspect", folder / "float.tflite", code=1)
    assert "not fully integer" in result.output
    assert "CONV_2D computes in float32" in result.output
    assert json.loads(run("inspect", folder / "float.tflite", "--json", code=1).stdout)["fully_integer"] is False


@pytest.mark.parametrize("data", [[], ["--data", "digits"]])
def test_verify(folder, data):
    files = (folder / "quantized.keras", folder / "quantized.tflite")
    lines = run("verify", *files, *data, "--samples", 16).output.splitlines()
    assert lines[0].split() == ["operator", "kind", "outputs", "identical", "largest", "passed"]
    assert lines[1].split() == ["conv", "CONV_2D", str(16 * 144), "100.0000%", "0", "LSB", "yes"]
    assert lines[-1] == "passed"
    assert lines[-3].startswith("weights: ")
    detail = json.loads(run("verify", *files, *data, "--samples", 16, "--json").stdout)
    assert detail["passed"] is True
    assert detail["end_to_end"]["samples"] == 16


def test_verify_fails_on_another_file(folder, tmp_path):
    from mobileqat.flatbuffer import read

    content = bytearray((folder / "quantized.tflite").read_bytes())
    weights = next(t.data for t in read(bytes(content)).tensors if t.is_constant and t.dtype == "int8")
    start = bytes(content).index(weights.tobytes())
    content[start : start + weights.nbytes] = np.flip(weights).tobytes()
    (tmp_path / "changed.tflite").write_bytes(content)
    result = run("verify", folder / "quantized.keras", tmp_path / "changed.tflite", "--samples", 16, code=1)
    assert "failed\n" in result.output
    assert "weight integers differ" in result.output


@pytest.mark.parametrize("exclude", [[], ["first"]], ids=["an index", "a float input"])
def test_verify_makes_samples_for_inputs_without_a_grid(tmp_path, exclude):
    import keras
    from keras import layers as L

    from mobileqat.calibrate import calibrate
    from mobileqat.convert import convert
    from mobileqat.quantize import quantize_model

    x = keras.Input((6,), dtype="float32" if exclude else "int32")
    first = L.Dense(8, name="first") if exclude else L.Embedding(10, 4, name="first")
    model = keras.Model(x, L.Dense(3)(L.Flatten()(first(x))))
    quantized = quantize_model(model, exclude=exclude)
    calibrate(quantized, np.random.default_rng(0).integers(0, 10, (32, 6)))
    quantized.save(tmp_path / "model.keras")
    (tmp_path / "model.tflite").write_bytes(convert(quantized))
    assert run("verify", tmp_path / "model.keras", tmp_path / "model.tflite").output.endswith("passed\n")


def test_verify_wants_a_quantized_model(folder):
    message = error("verify", folder / "float.keras", folder / "float.tflite")
    assert "is float. verify compares a model saved after quantize_model" in message


def test_evaluate_gives_the_same_for_a_model_and_its_file(folder):
    options = ("--data", "digits", "--limit", 100, "--json")
    file = json.loads(run("evaluate", folder / "quantized.tflite", *options).stdout)
    model = json.loads(run("evaluate", folder / "quantized.keras", *options).stdout)
    assert file["accuracy"] == model["accuracy"]
    assert file["per_class"] == model["per_class"]
    assert (file["samples"], file["runtime"], model["runtime"]) == (100, "litert", "keras")


def test_analyze(folder, tmp_path):
    data = ("--data", "npz", "--data-path", folder / "digits.npz", "--limit", 20)
    result = run("analyze", folder / "quantized.keras", *data, "--out", tmp_path / "charts")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("float ") and any(line.startswith("conv ") for line in lines)
    assert lines[-1] == f"Charts: {tmp_path / 'charts'}"
    names = {path.name for path in (tmp_path / "charts").iterdir()}
    assert {"analysis.json", "sqnr.svg", "metric.svg"} < names and any("conv" in name for name in names)
    printed = json.loads(run("analyze", folder / "float.keras", *data, "--scheme", "w4a8", "--json").stdout)
    assert {row["name"] for row in printed["layers"]} == {"conv", "classes", "classes/softmax"}
    written = json.loads((tmp_path / "charts" / "analysis.json").read_text())
    assert printed["samples"] == written["samples"] == 20 and printed["float_metric"] == written["float_metric"]
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert "is a file. Expected a folder" in error("analyze", folder / "quantized.keras", *data, "--out", taken)
    assert taken.read_text() == "mine"


def test_search_writes_a_recipe_that_trains(folder, tmp_path):
    from mobileqat.recipe import load_recipe

    recipe = tmp_path / "mixed.yaml"
    data = ("--data", "npz", "--data-path", folder / "digits.npz", "--samples", 32, "--limit", 20)
    result = run("search", folder / "float.keras", *data, "--budget", "size=85%", "-o", recipe)
    assert "(chosen)" in result.stdout and str(recipe) in result.stdout
    settings = load_recipe(recipe).quantize
    assert settings.scheme == "w4a8" or set(settings.layers.values()) == {"w4a8"}
    assert settings.adaround.steps is None and not settings.correct_bias
    overrides = (
        "quantize.adaround.steps=5",
        "qat.epochs=1",
        "qat.batch_size=64",
        "bench.enabled=false",
        "parity.samples=4",
        "evaluate.limit=20",
    )
    arguments = [part for override in overrides for part in ("--set", override)]
    run("train", recipe, "--out", tmp_path / "run", *arguments)
    message = error("search", folder / "float.keras", *data, "--budget", "size=1kB", "-o", recipe)
    assert "Nothing fits the budget of 1,000 B" in message
    assert "data.source" in error("search", folder / "float.keras", "--data", "nope", "--budget", "size=1kB")
    assert "Not a budget" in error("search", folder / "float.keras", *data, "--budget", "bytes=3", "-o", recipe)
    assert "quantized already" in error("search", folder / "quantized.keras", *data, "--budget", "size=85%")


def test_search_by_measured_cost(folder, tmp_path):
    from mobileqat.recipe import load_recipe

    model = tmp_path / "my model.keras"  # no name that a recipe may have
    shutil.copy(folder / "float.keras", model)
    data = ("--data", "npz", "--data-path", folder / "digits.npz", "--samples", 32, "--limit", 20)
    options = ("--budget", "cost=1000%", "--with-float", "-o", tmp_path / "mixed.yaml", "--json")
    found = json.loads(run("search", model, *data, *options).stdout)
    assert load_recipe(tmp_path / "mixed.yaml").name == "my_model-mixed"
    assert found["what"] == "cost" and found["chosen"]["cost"] <= found["budget"]
    assert set(found["noise"]["conv"]) == {"w8a8", "w4a8", "float"}


def test_evaluate_prints_a_line_per_class(folder):
    file = folder / "quantized.tflite"
    rows = json.loads(run("evaluate", file, "--data", "digits", "--json").stdout)
    lines = run("evaluate", file, "--data", "digits").output.splitlines()
    assert lines[0] == f"{file}: accuracy {rows['accuracy']:.2%} on 359 test samples (litert)"
    assert len(lines) == 11
    assert lines[1].split() == ["0", f"{rows['per_class'][0]['accuracy']:.2%}", "36", "samples"]


def test_bench(folder):
    files = (folder / "float.tflite", folder / "quantized.tflite")
    detail = json.loads(run("bench", *files, "--runs", 5, "--warmup", 1, "--json").stdout)["host"]
    assert list(detail["records"]) == [str(file) for file in files]
    for record in detail["records"].values():
        assert 0 < record["cost"]["min"] <= record["cost"]["median"] <= record["cost"]["p90"]
    lines = run("bench", *files, "--runs", 5, "--warmup", 1).output.splitlines()
    assert "5 timed runs" in lines[-1]
    assert "1 warm-up" in lines[-1]


def test_bench_compares_operators(folder):
    files = (folder / "float.tflite", folder / "quantized.tflite")
    output = run("bench", "--compare", *files, "--runs", 2, "--warmup", 1).output
    assert "quantized.tflite against" in output and "operator by operator:" in output
    rows = [line.split() for line in output.partition("operator by operator:")[2].splitlines()]
    assert ["operator", "kind", "first", "this", "difference"] in rows
    assert sum("CONV_2D" in row for row in rows) == 1
    assert "--compare needs at least two files" in error("bench", "--compare", files[0])


def test_bench_on_a_target_that_is_not_there(folder):
    message = error("bench", folder / "quantized.tflite", "--target", "phone")
    assert "There is no target 'phone'. Expected one of: host, arm:cortex-a53" in message


def test_verify_on_a_target(folder):
    lines = run(
        "verify", folder / "quantized.tflite", "--data", "digits", "--samples", 16, "--target", "host"
    ).output.splitlines()
    assert lines[1].split() == ["host", "16", "100", "%", "0", "LSB", "100", "%"] and lines[-1] == "passed"
    assert lines[2].startswith("host, before SOFTMAX ")
    detail = json.loads(
        run("verify", folder / "quantized.keras", folder / "quantized.tflite", "--target", "host", "--json").stdout
    )
    assert detail["passed"] is True
    expected = {"samples": 256, "identical": 1.0, "max_lsb": 0.0, "top1_agreement": 1.0, "bound_lsb": 1}
    assert detail["targets"] == {"host": expected, "host, before SOFTMAX": expected | {"bound_lsb": 0}}
    assert "Expected the MODEL that FILE was made from" in error("verify", folder / "quantized.tflite")


def test_doctor():
    lines = run("doctor", "--target", "host").output.splitlines()
    assert lines[0] == "host: ready" and lines[1].startswith("  runtime litert (XNNPACK, what phones run by default): ")
    rows = json.loads(run("doctor", "--target", "host", "--json").stdout)["host"]
    assert [row["is_needed"] for row in rows] == [True] + 4 * [False]


def test_doctor_names_versions_and_commands(monkeypatch):
    """Without a target only mobileqat and this machine decide; what is missing comes with its command."""
    from importlib import metadata

    from mobileqat.bench.record import Check

    monkeypatch.setattr("mobileqat.bench.android.Android.check", lambda self: [Check("adb", None, "apt install adb")])
    output = run("doctor").output
    assert output.startswith("mobileqat: ready\n  mobileqat: ") and "\nandroid: not ready\n" in output
    for package in ("tensorflow", "keras", "ai-edge-litert", "numpy"):
        assert f"  {package}: {metadata.version(package)}\n" in output
    assert run("doctor", "--target", "android", code=1).output.endswith("  adb: missing. apt install adb\n")

    def version(package):
        if package in ("keras", "tf-keras"):
            raise metadata.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr("mobileqat.doctor.metadata.version", version)
    output = run("doctor", code=1).output
    assert output.startswith("mobileqat: not ready\n") and "  keras: missing. pip install keras\n" in output
    assert 'not there, not needed. pip install "mobileqat[tfmot]"' in output


# ------------------------------------------------------------------ convert


def test_convert_a_quantized_model(folder, tmp_path):
    run("convert", folder / "quantized.keras", "-o", tmp_path / "out.tflite")
    assert (tmp_path / "out.tflite").read_bytes() == (folder / "quantized.tflite").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.tflite"]


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_convert_a_float_model_with_data_of_its_own(folder, tmp_path, method):
    data = ("--data", "npz", "--data-path", folder / "digits.npz", "--samples", 50, "--method", method)
    detail = json.loads(run("convert", folder / "float.keras", *data, "-o", tmp_path / "out.tflite", "--json").stdout)
    assert detail["fully_integer"] is True
    assert detail["file"] == str(tmp_path / "out.tflite")
    assert (tmp_path / "out.tflite").stat().st_size == detail["size_bytes"]


def test_convert_beside_the_model_by_default(folder, tmp_path):
    (tmp_path / "m.keras").write_bytes((folder / "quantized.keras").read_bytes())
    run("convert", tmp_path / "m.keras", "--input-type", "uint8", "--output-type", "float32")
    detail = json.loads(run("inspect", tmp_path / "m.tflite", "--json").stdout)
    assert detail["inputs"][0]["dtype"] == "uint8"
    assert detail["outputs"][0]["dtype"] == "float32"


def test_convert_never_overwrites_its_model(folder, tmp_path):
    model = tmp_path / "m.keras"
    model.write_bytes((folder / "quantized.keras").read_bytes())
    assert "Expected another file to write" in error("convert", model, "-o", model)
    assert model.read_bytes() == (folder / "quantized.keras").read_bytes()
    assert "Expected another file to write" in error("convert", model, "-o", tmp_path)
    assert "There is no folder" in error("convert", model, "-o", tmp_path / "absent" / "m.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]


def test_convert_a_float_model_needs_data(folder, tmp_path):
    out = tmp_path / "out.tflite"
    assert "Add --data SOURCE" in error("convert", folder / "float.keras", "-o", out)
    assert "--data-path PATH" in error("convert", folder / "float.keras", "--data", "npz", "-o", out)
    assert not out.exists()


def test_an_interrupted_or_full_disk_leaves_no_file(folder, tmp_path, monkeypatch):
    out = tmp_path / "out.tflite"
    full = f"Error: The disk of '{out}' is full. Free some space, then try again.\n"
    for exception, code, message in (
        (KeyboardInterrupt(), 1, "Error: Interrupted.\n"),
        (OSError(errno.ENOSPC, "No space"), 2, full),
    ):

        def fails(_, exception=exception):
            raise exception

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            assert error("convert", folder / "quantized.keras", "-o", out, code=code) == message
        assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "empty, expected a .tflite model"),
        (b"\x00" * 64, "not a .tflite model"),
        (bytes(range(256)) * 20, "not a .tflite model"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["bench"], ["evaluate", "--data", "digits"]])
def test_broken_tflite(tmp_path, command, content, problem):
    file = tmp_path / "broken.tflite"
    if content is not None:
        file.write_bytes(content)
    message = error(command[0], file, *command[1:])
    assert str(file) in message and problem in message


def test_a_truncated_tflite_is_refused_wherever_it_ends(folder, tmp_path):
    content = (folder / "quantized.tflite").read_bytes()
    file = tmp_path / "truncated.tflite"
    for end in range(1, len(content), len(content) // 60):
        file.write_bytes(content[:end])
        assert str(file) in error("inspect", file)


@pytest.mark.parametrize("name", ["float.keras", "quantized.keras", "only.weights.h5"])
def test_a_truncated_model_is_refused_wherever_it_ends(folder, tmp_path, name):
    content = (folder / name).read_bytes()
    file, out = tmp_path / f"truncated{Path(name).suffix}", tmp_path / "out.tflite"
    for end in range(0, len(content), len(content) // 25):
        file.write_bytes(content[:end])
        assert f"'{file}' " in error("convert", file, "--data", "digits", "-o", out)
    assert not out.exists()


def rewritten(source: Path, target: Path, name: str, content: bytes | None) -> Path:
    """A copy of a .keras file with one member replaced, or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
        if content is not None:
            new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("config.json", None),
        ("config.json", b"not json"),
        ("config.json", b"[1, 2]"),
        ("config.json", b'{"a": 1}'),
        ("model.weights.h5", None),
        ("model.weights.h5", b"garbage"),
    ],
)
def test_a_keras_file_with_a_wrong_member(folder, tmp_path, member, content):
    file = rewritten(folder / "float.keras", tmp_path / "wrong.keras", member, content)
    assert f"'{file}' " in error("convert", file, "--data", "digits", "-o", tmp_path / "out.tflite")
    assert not (tmp_path / "out.tflite").exists()


def test_code_in_a_keras_file_is_not_run(folder, tmp_path):
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "lambda.keras")
    message = error("convert", tmp_path / "lambda.keras", "--data", "digits")
    assert "Lambda" in message


def test_other_files_are_no_models(folder):
    data = ("--data", "digits")
    assert "ends in .tflite, .keras or .h5" in error("evaluate", folder / "digits.npz", *data)
    assert "is not a .keras or .h5 file" in error("convert", folder / "quantized.tflite", *data)
    assert "not a .tflite model" in error("inspect", folder / "float.keras")
    assert "holds weights without a model" in error("convert", folder / "only.weights.h5", *data)


# ------------------------------------------------------------------ train and report


def test_train_and_report(project):
    result = run("train", "tiny.yaml", "--out", "out")
    lines = result.output.splitlines()
    assert lines[0] == "Run directory: out"
    steps = [line.split()[:2] for line in lines[1:] if line.startswith("  ") and line.endswith(" s")]
    names = ("data", "float", "ptq", "qat", "convert", "inspect", "parity", "layers", "evaluate", "bench")
    assert steps == [[name, "skipped" if name == "bench" else "done"] for name in names]
    assert lines[-1] == "Report: out/report.html"
    log = (project / "out" / "run.log").read_text()
    assert all(f"{name} started" in log for name in names)

    (project / "out" / "report.html").unlink()
    printed = run("report", "out").output
    assert result.output.endswith(printed)
    assert (project / "out" / "report.html").is_file()
    assert json.loads(run("report", "out", "--json").stdout) == json.loads((project / "out/report.json").read_text())

    resumed = run("train", "tiny.yaml", "--out", "out", "--resume").output
    assert "qat       kept" in resumed
    assert json.loads(run("train", "tiny.yaml", "--out", "out", "--resume", "--json").stdout)["name"] == "tiny"

    assert "holds a run already" in error("train", "tiny.yaml", "--out", "out")
    message = error("train", "tiny.yaml", "--out", "out", "--resume", "--set", "seed=7")
    assert "  -seed: 0\n  +seed: 7\n" in message
    assert "Ship" not in run("train", "tiny.yaml", "--out", "out", code=2).stdout


def test_several_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        results = make_results()
        results["recipe"]["seed"] = seed
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}" / "report.json").write_text(json.dumps(results))
    lines = run("report", "run0", "run1").output.splitlines()
    assert "QAT of cifar10_resnet8_w8a8 is the most accurate" in lines[0]
    assert lines[-1] == "Comparison: comparison.html"
    assert "3 of" not in (tmp_path / "comparison.html").read_text()
    found = json.loads(run("report", "run0", "run1", "--json", "-o", "other.html").stdout)
    assert [row["seed"] for row in found["groups"][0]["runs"]] == [0, 1]
    assert (tmp_path / "other.html").is_file()
    assert "The same run is given twice" in run("report", "run0", "./run0", code=2).stderr
    assert "There is no 'run2/report.json'" in error("report", "run0", "run2")


def test_one_run_can_be_shown_elsewhere(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(make_results()))
    assert run("report", tmp_path, "-o", tmp_path / "page.html").output.endswith("page.html\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "report.json"]
    run("report", tmp_path)
    assert {"model_card.md", "model_explorer", "report.html"} < {path.name for path in tmp_path.iterdir()}


def test_all_problems_of_a_recipe_at_once(project):
    (project / "typos.yaml").write_text(RECIPE.replace("bench:", "bensh:").replace("epochs", "epoch"))
    message = error("train", "typos.yaml", "--set", "seed=minus", "--set", "nothing")
    assert message.splitlines()[0].startswith("Error: ")
    for part in ("bensh: unknown key (did you mean 'bench'?)", "qat.epoch: unknown key", "--set seed=minus: seed:"):
        assert part in message
    assert "--set nothing: nothing: not an override" in message
    assert not (project / "runs").exists()


def test_a_module_that_is_not_there_leaves_no_run(project):
    message = error("train", "tiny.yaml", "--out", "out", "--set", "model.name=absent_module:build")
    assert "No module named 'absent_module'. Modules are looked for in the working directory, " in message
    assert not (project / "out").exists()


def test_data_that_fails_first_leaves_nothing_to_resume(project):
    message = error("train", "tiny.yaml", "--out", "out", "--set", "data={source: npz, path: absent.npz}")
    assert message.endswith("No step came before it: start again, also with --out out.\n")
    run("train", "tiny.yaml", "--out", "out", "--quiet")


def test_options_of_the_data(folder):
    arguments = ("evaluate", folder / "qat.tflite", "--data")
    assert "'channels'" in error(*arguments, "digits", "--data-option", "channels=1")
    assert "expects KEY=VALUE" in run(*arguments, "digits", "--data-option", "channels", code=2).stderr
    assert "cannot be imported" in error(*arguments, "digits", "--module", "absent_module")


def test_train_names_the_step_that_failed(project):
    message = error("train", "tiny.yaml", "--out", "out", "--set", "model.args={absent: 1}")
    assert message == (
        "Error: Model 'tiny_model:build' does not take these arguments: got an unexpected keyword argument 'absent'. "
        "It takes: input_shape, classes, wait.\n"
        "Step 'float' did not finish. What came before it is kept. To go on: mobileqat train out/recipe.yaml --out out "
        "--resume\n"
    )
    assert not list((project / "out" / "models").iterdir())
    assert "absent" in (project / "out" / "run.log").read_text()


@pytest.mark.parametrize(("failure", "is_shown"), [(ParityError("differs"), True), (TrainingError("nan"), False)])
def test_the_report_is_shown_when_a_check_on_the_files_failed(project, monkeypatch, failure, is_shown):
    def train(settings, directory, **_):
        directory.mkdir()
        (directory / "report.json").write_text('{"schema_version": 1, "verdict": {"headline": "the verdict"}}')
        raise failure

    monkeypatch.setattr("mobileqat.pipeline.train", train)
    result = run("train", "tiny.yaml", "--out", "out", code=1)
    assert ("the verdict" in result.stdout) is is_shown
    assert result.stderr == f"Error: {failure}\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "There is no"),
        ("{", "is not valid JSON"),
        ("[]", "is not a report of this version"),
        ('{"schema_version": 99}', "is not a report of this version"),
        ('{"schema_version": 1, "variants": 3}', "Unexpected AttributeError"),
    ],
)
def test_report_of_a_broken_run(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert problem in error("report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def start(project: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mobileqat", "train", "tiny.yaml", "--out", "out", *arguments]
    return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_second_run_at_once(project, number):
    with start(project, "--set", "model.args={wait: true}") as process:
        try:
            wait_for(project / "waiting", process)
            assert "in use by process " in error("train", "tiny.yaml", "--out", "out")
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert errors == (
        "Error: Interrupted.\nStep 'float' did not finish. What came before it is kept. To go on: mobileqat train "
        "out/recipe.yaml --out out --resume\n"
    )
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [["data", "done"], ["float", "failed"]]
    left = {path.relative_to(project / "out").as_posix() for path in (project / "out").rglob("*") if path.is_file()}
    assert left == {
        ".lock", "environment.json", "recipe.yaml", "report.html", "report.json", "run.log", "steps/data.json"
    }  # fmt: skip
