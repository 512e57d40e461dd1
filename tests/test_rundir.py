import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobileqat.errors import RunDirectoryError
from mobileqat.rundir import RunDirectory, disk_errors, is_disk_full, write_whole

RECIPE = "name: a\nseed: 0\nqat:\n  epochs: 5\n"


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run", RECIPE)
    yield directory
    directory.close()


@pytest.fixture
def started(tmp_path):
    """The path of a run that was left after its first model."""
    directory = RunDirectory(tmp_path / "run", RECIPE)
    directory.write_bytes("models/float.keras", b"weights")
    directory.finish("float", {"accuracy": 0.5})
    directory.close()
    return directory.path


# ------------------------------------------------------------------ writing


def test_a_new_run_has_its_recipe_and_nothing_else(run):
    assert files(run.path) == [".lock", "recipe.yaml"]
    assert (run.path / "recipe.yaml").read_text() == RECIPE


def test_parents_are_made(tmp_path):
    RunDirectory(tmp_path / "a" / "b" / "c", RECIPE).close()
    assert (tmp_path / "a" / "b" / "c" / "recipe.yaml").is_file()


def test_a_writer_that_fails_leaves_what_was_there(run):
    run.write_text("report.json", "old")

    def fails_midway(path):
        path.write_text("half of the n")
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        run.write("report.json", fails_midway)
    assert (run.path / "report.json").read_text() == "old"
    assert files(run.path) == [".lock", "recipe.yaml", "report.json"]


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    seen = []
    write_whole(tmp_path / "float.keras", lambda path: (seen.append(path), path.write_bytes(b"x")))
    assert seen[0].suffix == ".keras" and seen[0].parent == tmp_path
    assert files(tmp_path) == ["float.keras"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_writing(run, number):
    run.write_bytes("qat.tflite", b"old")

    def fills_the_disk(path):
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(RunDirectoryError, match=r"The disk of '.*qat\.tflite' is full\. Free some space"):
        run.write("qat.tflite", fills_the_disk)
    assert (run.path / "qat.tflite").read_bytes() == b"old"
    assert files(run.path) == [".lock", "qat.tflite", "recipe.yaml"]


def test_a_full_disk_while_syncing(run, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunDirectoryError, match="is full"):
        run.write_bytes("ptq.tflite", b"x")
    assert files(run.path) == [".lock", "recipe.yaml"]


def test_an_interrupt_while_writing(run):
    def interrupted(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write("models/float.keras", interrupted)
    assert files(run.path) == [".lock", "recipe.yaml"]


def test_json_holds_finite_numbers_only(run):
    with pytest.raises(ValueError, match="Out of range float"):
        run.write_json("report.json", {"loss": float("nan")})
    assert not (run.path / "report.json").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT, errno.EISDIR, errno.EIO])
def test_other_disk_errors_name_the_path(number):
    with pytest.raises(RunDirectoryError) as raised, disk_errors(Path("a/b")):
        raise OSError(number, os.strerror(number), "a/b")
    assert str(raised.value) == f"'a/b' cannot be written: {os.strerror(number)}."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError("Can't write data (error message = 'No space left on device')"), True),  # as h5py says it
        (RuntimeError("events.v2; No space left on device"), True),  # as TensorFlow says it
        (OSError(errno.EACCES, "x"), False),
        (ValueError("x"), False),
    ],
)
def test_is_disk_full(error, expected):
    assert is_disk_full(error) is expected


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match="cannot be written"):
            RunDirectory(path, RECIPE)
    assert (tmp_path / "file").read_text() == "x"


# ------------------------------------------------------------------ the journal


def test_a_finished_step_is_read_back(run):
    assert run.result("float") is None
    run.finish("float", {"accuracy": 0.5})
    assert run.result("float") == {"accuracy": 0.5}


def test_a_step_whose_file_is_gone_has_not_finished(run):
    run.write_bytes("models/float.keras", b"weights")
    run.finish("float", 1)
    run.write_bytes("float.tflite", b"file")
    run.finish("convert", 2)
    (run.path / "models" / "float.keras").unlink()
    assert run.result("float") is None
    assert run.result("convert") == 2


# ------------------------------------------------------------------ opening again


def test_another_run_is_not_overwritten(started):
    before = files(started)
    with pytest.raises(RunDirectoryError) as raised:
        RunDirectory(started, RECIPE)
    assert str(raised.value) == (
        f"'{started}' holds a run already. Continue it with --resume, or choose another --out."
    )
    assert files(started) == before


def test_resume_goes_on(started):
    again = RunDirectory(started, RECIPE, resume=True)
    assert again.result("float") == {"accuracy": 0.5}
    again.close()


def test_resume_shows_what_has_changed_in_the_recipe(started):
    with pytest.raises(RunDirectoryError) as raised:
        RunDirectory(started, RECIPE.replace("epochs: 5", "epochs: 6"), resume=True)
    assert str(raised.value) == (
        f"The recipe has changed since '{started}' was started:\n"
        "  --- started with\n"
        "  +++ now\n"
        "  -  epochs: 5\n"
        "  +  epochs: 6\n"
        "Undo the change, or start a new run with another --out. To start that one from the float model of this one: "
        f"--set model.weights={started / 'models' / 'float.keras'} --set float.epochs=0"
    )
    assert (started / "recipe.yaml").read_text() == RECIPE


def test_nothing_to_resume_makes_nothing(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        RunDirectory(tmp_path / "run", RECIPE, resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_model_may_start_over_with_another_recipe(tmp_path, resume):
    first = RunDirectory(tmp_path, RECIPE)
    first.write_json("environment.json", {})
    first.finish("data", {"train": 1})
    first.close()
    again = RunDirectory(tmp_path, RECIPE + "x: 1\n", resume=resume)
    assert again.result("data") is None
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE + "x: 1\n"
    again.close()


@pytest.mark.parametrize("name", ["recipe.yaml", "steps/notes.json"])
def test_files_of_something_else_stay(tmp_path, name):
    (tmp_path / "steps").mkdir()
    (tmp_path / name).write_text("# mine")
    for _ in range(2):
        with pytest.raises(
            RunDirectoryError, match=rf"files that no run wrote .*: {re.escape(name)}\. Choose another --out"
        ):
            RunDirectory(tmp_path, RECIPE)
    assert files(tmp_path) == [".lock", name] and (tmp_path / name).read_text() == "# mine"


def test_one_run_at_a_time(started):
    first = RunDirectory(started, RECIPE, resume=True)
    with pytest.raises(RunDirectoryError) as raised:
        RunDirectory(started, RECIPE, resume=True)
    holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())}, since [0-9: -]{{19}}"
    expected = rf"'{re.escape(str(started))}' is in use by {holder}\. Wait for it, or choose another --out\."
    assert re.fullmatch(expected, str(raised.value))
    first.close()
    RunDirectory(started, RECIPE, resume=True).close()


def test_a_checkpoint_lasts_until_its_step_is_finished(run):
    checkpoint = run.checkpoint("qat")
    assert checkpoint.read() is None
    checkpoint.write({"a": np.arange(3), "b": np.array("text")})
    checkpoint.write({"a": np.arange(4)})
    found = run.checkpoint("qat").read()
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], np.arange(4))
    run.finish("qat", None)
    assert run.checkpoint("qat").read() is None


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_checkpoint_is_named(run, damage):
    checkpoint = run.checkpoint("qat")
    checkpoint.write({"a": np.arange(300)})
    checkpoint.path.write_bytes(damage(checkpoint.path.read_bytes()))
    with pytest.raises(
        RunDirectoryError, match=r"qat\.npz' is damaged: .* Delete it to train this step from its start"
    ):
        checkpoint.read()


def test_a_run_with_a_checkpoint_alone_does_not_start_over(tmp_path):
    first = RunDirectory(tmp_path, RECIPE)
    first.checkpoint("float").write({"a": np.arange(3)})
    first.close()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        RunDirectory(tmp_path, RECIPE)
    with pytest.raises(RunDirectoryError, match="recipe has changed"):
        RunDirectory(tmp_path, RECIPE + "x: 1\n", resume=True)
    again = RunDirectory(tmp_path, RECIPE, resume=True)
    assert again.checkpoint("float").read() is not None
    again.close()


def test_a_directory_that_was_refused_is_not_locked(started):
    with pytest.raises(RunDirectoryError):
        RunDirectory(started, "another: recipe\n", resume=True)
    RunDirectory(started, RECIPE, resume=True).close()


def test_a_killed_run_leaves_no_lock_and_no_half_file(tmp_path):
    program = f"""
import os
from mobileqat.rundir import RunDirectory
run = RunDirectory({str(tmp_path)!r}, {RECIPE!r})
run.write_bytes("models/float.keras", b"weights")
run.finish("float", 1)
run.write("models/ptq.keras", lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), 9)))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert not (tmp_path / "models" / "ptq.keras").exists()
    assert any(name.startswith("models/.unfinished") for name in files(tmp_path))
    again = RunDirectory(tmp_path, RECIPE, resume=True)
    assert files(tmp_path) == [".lock", "models/float.keras", "recipe.yaml", "steps/float.json"]
    assert json.loads((tmp_path / "steps" / "float.json").read_text())["result"] == 1
    again.close()
