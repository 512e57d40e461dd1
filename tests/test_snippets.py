"""Generated programs, run: Python's on the real interpreter, Kotlin's compiled, with a stand-in for the interpreter."""

import importlib.util
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import mobileqat as mq
from mobileqat.convert import convert_float
from mobileqat.errors import MobileQatError
from mobileqat.metadata import Metadata, add_metadata, describe
from mobileqat.runtime import Session, to_raw
from mobileqat.snippets import class_name, file_name, write_snippet

LABELS = ('quote"', "dollar $x", "\N{SNOWMAN} and \N{GRINNING FACE}")
TYPES = ("int8", "uint8", "int16", "float32")


@pytest.fixture(scope="module")
def samples():
    """Pixels, ties between two integers, and values beyond the range."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (40, 6, 5, 3)).astype(np.float32)
    x[30:] += random.choice(np.float32([-300, -0.5, 0.5, 0.49999997, 300]), x[30:].shape)
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples):
    """A file per type of input and output."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 5, 3), name="image"),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    metadata = describe("tiny", "", LABELS, (6, 5, 3), (0.0, 255.0))
    path = tmp_path_factory.mktemp("snippets")
    for name in TYPES:
        quantized = mq.quantize_model(model, "w8a16" if name == "int16" else "w8a8", input_range=(-60, 255))
        mq.calibrate(quantized, samples[:20])
        content = mq.convert(quantized, input_type=name, output_type=name)
        (path / f"{name}.tflite").write_bytes(add_metadata(content, metadata))
    (path / "bare.tflite").write_bytes(convert_float(model))
    return path


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*TYPES, "bare"])
def test_python_gives_what_mobileqat_gives(folder, samples, name):
    file = folder / f"{name}.tflite"
    program = folder / file_name(file, "python")
    program.write_text(write_snippet(file, "python"))
    module, session = load(program), Session(file)
    interpreter = module.load()
    received = np.stack([module.run(interpreter, sample) for sample in samples])
    assert np.array_equal(received, session.dequantize(session.predict(samples)))
    assert (() if name == "bare" else LABELS) == module.LABELS
    with pytest.raises(ValueError, match=r"Expected a sample of shape \(6, 5, 3\)"):
        module.run(interpreter, samples)


def test_python_as_a_program(folder, samples, tmp_path):
    from PIL import Image

    file = shutil.copy(folder / "int8.tflite", tmp_path / "my model.tflite")
    program = tmp_path / file_name(file, "python")
    assert program.name == "run_my_model.py"
    program.write_text(write_snippet(file, "python"))
    np.save(tmp_path / "x.npy", samples[0])
    Image.fromarray(samples[0].astype(np.uint8)).save(tmp_path / "x.png")
    session = Session(file)
    answer = session.dequantize(session.predict(samples[:1]))[0]
    expected = [f"{answer[i]:.4f}  {LABELS[i]}" for i in np.argsort(-answer, kind="stable")]
    for name in ("x.npy", "x.png"):
        command = [sys.executable, "-X", "utf8", str(program), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, cwd="/")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == expected
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "Use: python run_my_model.py input.npy, or picture.jpg\n")


def test_python_is_in_ascii_and_says_what_it_belongs_to(folder):
    import hashlib

    text = write_snippet(folder / "int8.tflite", "python")
    digest = hashlib.sha256((folder / "int8.tflite").read_bytes()).hexdigest()
    assert text.isascii() and digest in text and digest in write_snippet(folder / "int8.tflite", "kotlin")


def test_normalization_is_in_it(folder, tmp_path):
    from PIL import Image

    content = (folder / "int8.tflite").read_bytes()
    file = tmp_path / "m.tflite"
    file.write_bytes(add_metadata(content, Metadata("m", "", LABELS, "RGB", mean=10.0, std=2.0)))
    (tmp_path / "run_m.py").write_text(write_snippet(file, "python"))
    Image.new("RGB", (5, 6), (20, 10, 0)).save(tmp_path / "x.png")
    assert load(tmp_path / "run_m.py").read_image(tmp_path / "x.png")[2, 3].tolist() == [5.0, 0.0, -5.0]
    assert "(pixel - 1.0e+01f) / 2.0e+00f" in write_snippet(file, "kotlin")


@pytest.mark.parametrize(("stem", "name"), [("mobile_net-v2", "MobileNetV2"), ("4bit", "bit"), ("é", "Model")])
def test_class_names(stem, name):
    assert class_name(stem) == name


def test_what_has_no_snippet(folder, tmp_path):
    with pytest.raises(MobileQatError, match="There is no snippet in 'cobol'"):
        write_snippet(folder / "int8.tflite", "cobol")
    first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    two = keras.Model([first, second], keras.layers.Dense(2)(first + second))
    (tmp_path / "two.tflite").write_bytes(convert_float(two))
    with pytest.raises(MobileQatError, match="has 2 inputs"):
        write_snippet(tmp_path / "two.tflite", "python")
    one = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    (tmp_path / "batch.tflite").write_bytes(convert_float(one, batch_size=3))
    with pytest.raises(MobileQatError, match=r"has shape \(3, 4\). Snippets are for a batch of 1"):
        write_snippet(tmp_path / "batch.tflite", "python")


# ------------------------------------------------------------------ Kotlin

INTERPRETER = """
package org.tensorflow.lite
import java.io.File
import java.nio.ByteBuffer
class Interpreter(val model: ByteBuffer, val options: Options) : AutoCloseable {
    class Options { fun setNumThreads(threads: Int): Options { check(threads == 1); return this } }
    fun run(input: Any, output: Any) {
        val given = ByteArray((input as ByteBuffer).remaining())
        input.get(given)
        File("given.bin").appendBytes(given)
        val answer = (output as ByteBuffer)
        val all = File("answers.bin").readBytes()
        answer.put(all, turn++ * answer.remaining(), answer.remaining())
    }
    override fun close() { println("closed") }
    var turn = 0
}
"""
BITMAP = """
package android.graphics
class Bitmap(val color: Int) {
    companion object {
        fun createScaledBitmap(source: Bitmap, width: Int, height: Int, filter: Boolean): Bitmap {
            check(width == 5 && height == 6 && filter)
            return source
        }
    }
    fun getPixels(pixels: IntArray, offset: Int, stride: Int, x: Int, y: Int, width: Int, height: Int) {
        check(offset == 0 && stride == 5 && x == 0 && y == 0 && width == 5 && height == 6)
        pixels.fill(color)
    }
}
"""
MAIN = """
import java.io.DataInputStream
import java.io.File
import java.nio.ByteBuffer
fun main(arguments: Array<String>) {
    val data = DataInputStream(File("samples.bin").inputStream().buffered())
    val samples = List(arguments[1].toInt()) { FloatArray(90) { data.readFloat() } }
    when (arguments[0]) {
%s
    }
}
"""
CASE = """
        "%(name)s" -> %(type)s(ByteBuffer.allocate(1)).use { model ->
            for (values in samples) println(model.run(values).map { it.toRawBits() }.joinToString(" "))
            println(%(type)s.LABELS.joinToString("|"))
            println(model.valuesOf(android.graphics.Bitmap(0x7f102030)).take(4).joinToString(" "))
        }
"""


@pytest.fixture(scope="module")
def compiled(folder, tmp_path_factory):
    """A jar with the classes of all types."""
    path = tmp_path_factory.mktemp("kotlin")
    (path / "Interpreter.kt").write_text(INTERPRETER)
    (path / "Bitmap.kt").write_text(BITMAP)
    for name in TYPES:
        (path / file_name(f"{name}.tflite", "kotlin")).write_text(write_snippet(folder / f"{name}.tflite", "kotlin"))
    cases = "".join(CASE % {"name": name, "type": class_name(name)} for name in TYPES)
    (path / "Main.kt").write_text(MAIN % cases)
    sources = sorted(map(str, path.glob("*.kt")))
    command = ["kotlinc", *sources, "-include-runtime", "-d", str(path / "out.jar")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not re.search(r"error:", done.stderr), done.stderr
    return path / "out.jar"


@pytest.mark.skipif(
    not (shutil.which("kotlinc") and shutil.which("java")), reason="needs kotlinc and java: apt install kotlin"
)
@pytest.mark.parametrize("name", TYPES)
def test_kotlin_feeds_and_reads_the_interpreter_as_mobileqat_does(compiled, folder, samples, name, tmp_path):
    session = Session(folder / f"{name}.tflite")
    raw = session.predict(samples)
    (tmp_path / "samples.bin").write_bytes(samples.astype(">f4").tobytes())
    (tmp_path / "answers.bin").write_bytes(raw.tobytes())
    command = ["java", "-Dfile.encoding=UTF-8", "-jar", str(compiled), name, str(len(samples))]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    *answers, labels, pixels, closed = done.stdout.decode().splitlines()
    assert (tmp_path / "given.bin").read_bytes() == to_raw(samples, session.inputs[0], True).tobytes()
    bits = np.array([line.split() for line in answers], np.int64).astype(np.int32)
    assert np.array_equal(bits.view(np.float32), session.dequantize(raw))
    assert labels == "|".join(LABELS)
    assert pixels == "16.0 32.0 48.0 16.0" and closed == "closed"
