"""How far long work is: what the library says, and what a terminal and a pipe show of it."""

import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mobileqat
from mobileqat import console
from mobileqat.bench import host, worker
from mobileqat.console import Bars, RunDisplay, duration, status
from mobileqat.progress import listening, task, track

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Listener:
    """Remembers the tasks in order: what, total, unit, and the units done; the names in the order they ended."""

    def __init__(self):
        self.tasks = []
        self.ended = []

    @contextmanager
    def __call__(self, what, total, unit):
        row = [what, total, unit, 0]
        self.tasks.append(row)

        def advance(count):
            row[3] += count

        try:
            yield advance
        finally:
            self.ended.append(what)


def test_nobody_listens():
    with task("work", 3) as advance:
        advance(1)
    assert list(track("abc", "work", "letters")) == ["a", "b", "c"]


def test_a_listener_hears_every_task_and_its_end():
    listener = Listener()
    with listening(listener):
        assert list(track("abc", "spelling", "letters")) == ["a", "b", "c"]
        assert list(track(iter("ab"), "an iterator", "letters")) == ["a", "b"]
        with pytest.raises(ZeroDivisionError), task("failing", 2, "steps") as advance:
            advance(1 // 0)
    list(track("abc", "afterwards", "letters"))
    assert listener.tasks == [
        ["spelling", 3, "letters", 3], ["an iterator", None, "letters", 2], ["failing", 2, "steps", 0]
    ]  # fmt: skip
    assert listener.ended == ["spelling", "an iterator", "failing"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, None, "", None), ""),
        ((120, 359, "samples", 6.4), "120 of 359 samples, 6.4/s, 0:00:37 left"),
        ((5, None, "files", 0.25), "5 files, 0.25/s"),
        ((10, 20, "steps", 512.3), "10 of 20 steps, 512/s, 0:00:00 left"),
        ((0, 20, "steps", None), "0 of 20 steps"),
        ((0, 20, "steps", 0.0), "0 of 20 steps"),
    ],
)
def test_status(arguments, text):
    assert status(*arguments) == text


def test_duration():
    assert [duration(seconds) for seconds in (0.4, 61, 3600 * 27 + 59.6)] == ["0:00:00", "0:01:01", "27:01:00"]


def test_plain_lines_come_after_ten_seconds_and_then_ever_more_rarely():
    now, stream = [0.0], io.StringIO()
    bars = Bars(Console(file=stream), clock=lambda: now[0])
    with bars("reading", 100, "files") as advance:
        for _ in range(100):
            now[0] += 1.0
            advance(1)
    assert stream.getvalue().splitlines() == [
        "    reading: 10 of 100 files, 1/s, 0:01:30 left",
        "    reading: 20 of 100 files, 1/s, 0:01:20 left",
        "    reading: 40 of 100 files, 1/s, 0:01:00 left",
        "    reading: 80 of 100 files, 1/s, 0:00:20 left",
    ]


def test_bars_on_a_terminal_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(console, "SHOWN_AFTER_S", 0.0)
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=120))
    with bars("outer") as _, bars("[red]inner", 8, "batches") as advance:
        advance(3)
        bars._bars.refresh()
        shown = ANSI.sub("", stream.getvalue())
    assert "outer" in shown and "[red]inner" in shown and "3 of 8 batches" in shown
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    assert bars._bars is None
    with bars("again") as _:
        assert bars._bars is not None


def test_what_is_over_at_once_does_not_flicker():
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=120))
    with bars("quick", 2, "steps") as advance:
        advance(2)
        bars._bars.refresh()
    assert "quick" not in stream.getvalue()


def test_a_run_shows_steps_and_epochs(tmp_path, capsys):
    display = RunDisplay()
    with display.log_to(tmp_path):
        display.step("qat")
        callback = display.training("qat", 2)
        callback.set_params({"steps": 10})
        callback.on_train_begin()
        for epoch in range(2):
            callback.on_epoch_begin(epoch)
            for batch in range(10):
                callback.on_train_batch_end(batch)
            callback.on_epoch_end(epoch, {"loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.875})
        display.say("[bold] is text")
        display.done("qat", "done", 1.25, "message")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Run directory: {tmp_path}"
    assert re.fullmatch(
        r"    qat epoch 2/2: loss 0.5000, accuracy 90.00%, validation 87\.50% \(\d+\.\d s\)", lines[2]
    ), lines[2]
    assert lines[3:] == ["    [bold] is text", "  qat       done        1.2 s"]
    assert "qat done 1.2 s message" in (tmp_path / "run.log").read_text()


def test_a_quiet_run_only_logs(tmp_path, capsys):
    display = RunDisplay(quiet=True)
    with display.log_to(tmp_path):
        display.step("qat")
        callback = display.training("qat", 1)
        callback.set_params({"steps": 1})
        callback.on_train_batch_end(0)
        display.done("qat", "done", 1.0, "")
    assert capsys.readouterr() == ("", "")
    assert "qat done" in (tmp_path / "run.log").read_text()


# ------------------------------------------------------------------ who says something


def test_the_library_says_how_far_it_is():
    import keras

    import mobileqat as mq
    from mobileqat.analyze import analyze
    from mobileqat.runtime import Session

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)])
    x = np.random.default_rng(0).uniform(0, 1, (70, 6, 6, 1)).astype(np.float32)
    quantized, listener = mq.quantize_model(model), Listener()
    with listening(listener):
        mq.calibrate(quantized, x, "mse")
        mq.adaround(quantized, x, steps=1)
        mq.correct_bias(quantized, x)
        content = mq.convert(quantized)
        Session(content).predict(x)
        assert mq.verify(quantized, content, x).passed
        analyze(quantized, x, lambda outputs: float(outputs.mean()))
    operators = len(quantized.plan.operators)
    assert {what for what, *_ in listener.tasks} == {
        "calibration", "histograms", "adaround", "bias correction", "litert interpreter", "simulation",
        "operators in the simulation", "layer by layer", "one layer at a time",
    }  # fmt: skip
    for what, total, unit, done in listener.tasks:
        assert unit and done == total, what
    assert ["calibration", 2, "batches", 2] in listener.tasks
    assert ["adaround", operators, "operators", operators] in listener.tasks
    assert ["simulation", 70, "samples", 70] in listener.tasks


def test_the_benchmark_tells_its_rounds(tmp_path, monkeypatch):
    now, file = [0], tmp_path / "rounds"
    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    seen = []
    for number in worker._counted(5, file):
        assert number == len(seen)
        now[0] += 300_000_000
        seen.append(file.read_text() if file.exists() else None)
    assert seen == [None, None, "2", "2", "4"]


def test_the_host_reads_them(tmp_path):
    file, listener = tmp_path / "rounds", Listener()
    with listening(listener), host._watching(file, 20):
        for text in ("", "7"):
            file.write_text(text)
            for _ in range(60):
                if listener.tasks[0][3] == 7:
                    break
                host.threading.Event().wait(0.05)
    assert listener.tasks == [["timed rounds", 20, "rounds", 7]]


# ------------------------------------------------------------------ the program in a real terminal


def in_terminal(*arguments, cwd=None, answers=()) -> tuple[int, str]:
    """Exit code and everything that a terminal was sent; `answers` are typed when what stands before them is seen."""
    ours, theirs = pty.openpty()
    source = str(Path(mobileqat.__file__).parents[1])  # not what is installed elsewhere
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": source}
    command = [sys.executable, "-m", "mobileqat", *arguments]
    child = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl+C
    )
    os.close(theirs)
    received, seen, waiting, typed = b"", 0, list(answers), ""
    while True:
        if typed == "\x03" and not select.select([ours], [], [], 5)[0]:
            # Python does not see a Ctrl+C that comes between its prompt and its reading; a person presses it again.
            os.write(ours, b"\x03")
        if not select.select([ours], [], [], 60)[0]:
            child.kill()
            child.wait()
            raise AssertionError(f"nothing more after {received!r}")
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        received += part
        if waiting and waiting[0][0] in received[seen:].decode(errors="replace"):
            seen = len(received)
            typed = waiting.pop(0)[1]
            os.write(ours, typed.encode())
    os.close(ours)
    return child.wait(timeout=60), received.decode()


@pytest.fixture
def tiny_file(tmp_path):
    import keras

    from mobileqat.convert import convert_float

    layers = keras.layers
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(10, activation="softmax")])
    (tmp_path / "m.tflite").write_bytes(convert_float(model))
    return tmp_path / "m.tflite"


def test_a_terminal_sees_what_takes_long_and_then_the_result(tiny_file):
    code, text = in_terminal("evaluate", str(tiny_file), "--data", "digits")
    assert code == 0, text
    assert "loading TensorFlow" in text
    assert f"{tiny_file}: accuracy " in text
    last = ANSI.sub("", text.rpartition("\x1b[2K")[2])
    assert "loading" not in last and "accuracy" in last


@pytest.mark.parametrize("options", [["--quiet"], ["--quiet", "--json"]])
def test_quiet(tiny_file, options):
    code, text = in_terminal("evaluate", str(tiny_file), "--data", "digits", "--limit", "20", *options)
    assert code == 0
    assert text == "" if "--json" not in options else text.lstrip().startswith("{") and "loading" not in text


def test_quiet_keeps_errors_and_exit_codes(tiny_file):
    code, text = in_terminal("inspect", str(tiny_file), "-q")
    assert (code, text) == (1, "")
    code, text = in_terminal("inspect", "absent.tflite", "-q")
    assert code == 2 and "Error: absent.tflite: cannot be read" in ANSI.sub("", text)
