"""Full disks, directories that cannot be written, data that goes away: what was finished stays, and the run goes on.

Whole runs on a real file system of a few MB; without the right to mount one these tests are skipped.
"""

import contextlib
import json
import os
import subprocess

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from sklearn.datasets import load_digits

from mobileqat import pipeline
from mobileqat.checkpoint import Checkpoint
from mobileqat.errors import DataError, RunDirectoryError
from mobileqat.models import load_model
from mobileqat.recipe import parse_recipe

RECIPE = """
name: lost
description: small enough to be interrupted often
data: {calibration_samples: 32, augment: {shift: 1}, SOURCE}
model: {name: dscnn, args: {filters: 8, blocks: 1}}
float: {epochs: 1, batch_size: 32, learning_rate: 0.01}
qat: {epochs: 2, batch_size: 32, learning_rate: 0.001}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 64, threads: 1}
"""
DISK_BYTES = 4 * 2**20


def recipe(source="source: digits"):
    return parse_recipe(RECIPE.replace("SOURCE", source), file="lost.yaml")


class Incident:
    """A display that lets something happen when a step begins, or after so many batches of its training."""

    def __init__(self, step=None, action=None, batch=None):
        self.at, self.action, self.batch = step, action, batch
        self.happened = False
        self.batches = 0
        self.ended = {}

    def step(self, name):
        if name == self.at and self.batch is None:
            self.happen()

    def say(self, text):
        pass

    def done(self, name, status, seconds, message):
        self.ended[name] = status

    def training(self, name, epochs):
        def count(batch, logs=None):
            self.batches += 1
            if name == self.at and self.batches == self.batch:
                self.happen()

        return keras.callbacks.LambdaCallback(on_train_batch_end=count)

    def happen(self):
        self.happened = True
        self.action()


@pytest.fixture(autouse=True)
def always(monkeypatch, tmp_path):
    """A checkpoint after every step, and a cache of the test's own."""
    monkeypatch.setattr(Checkpoint, "SECONDS", 0.0)
    monkeypatch.setenv("MOBILEQAT_CACHE", str(tmp_path / "cache"))


def mount(*arguments):
    result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise OSError(result.stderr.strip() or "mount failed")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, free=0):
    """Takes all but `free` bytes."""
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "ballast", max(0, (disk / "ballast").stat().st_size - free))


def release(disk):
    (disk / "ballast").unlink()


def check_what_is_there(directory):
    """No file is half written: each can be read by what it is for."""
    assert not list(directory.rglob(".unfinished*"))
    for path in directory.glob("models/*.keras"):
        assert load_model(path).count_params() > 0
    for path in directory.glob("*.tflite"):
        Interpreter(str(path)).allocate_tensors()
    for path in directory.glob("*/*.npz"):
        with np.load(path) as arrays:
            assert all(array.dtype != object for array in arrays.values())
    for path in (*directory.glob("steps/*.json"), *directory.glob("*.json")):
        json.loads(path.read_text())


def result(directory):
    files = {path.name: path.read_bytes() for path in directory.glob("*.tflite")}
    assert set(files) == {"float.tflite", "ptq.tflite", "qat.tflite"}
    return files, np.load(directory / "outputs" / "qat.npz")["interpreter"].tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    pipeline.train(recipe(), directory)
    return result(directory)


def run_into(error, match, directory, incident, source="source: digits", resume=True):
    """A run that ends in an error which says how to go on, once something happens."""
    with pytest.raises(error, match=match) as caught:
        pipeline.train(recipe(source), directory, resume=resume, display=incident)
        pytest.fail(f"no error after {incident.at} {incident.batch}: {incident.ended}")
    assert incident.happened or incident.at is None
    assert str(directory) in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    check_what_is_there(directory)


PLACES = [
    ("float", 20, 0),
    ("float", 10, 10_000),  # the disk fills in the middle of a file
    ("ptq", None, 0),
    ("ptq", None, 40_000),
    ("qat", 45, 0),
    ("qat", 10, 30_000),
    ("convert", None, 0),
    ("inspect", None, 0),
    ("parity", None, 2000),
    ("evaluate", None, 0),
]


def test_a_full_disk(disk, whole):
    """It fills up ten times in one run, which is resumed each time, and ends as a run on an empty disk does."""
    directory, resume = disk / "run", False
    for step, batch, free in PLACES:
        incident = Incident(step, lambda free=free: fill(disk, free), batch)
        run_into(RunDirectoryError, r"The disk of .* is full\. Free some space", directory, incident, resume=resume)
        release(disk)
        resume = True
    pipeline.train(recipe(), directory, resume=True)
    assert result(directory) == whole
    check_what_is_there(directory)


def test_a_disk_that_is_full_from_the_start(disk):
    fill(disk)
    with pytest.raises(RunDirectoryError, match=r"The disk of .*run.* is full\. Free some space, then try again"):
        pipeline.train(recipe(), disk / "run")


def test_a_directory_that_cannot_be_written_any_more(disk, whole):
    directory = disk / "run"
    with pytest.raises(RunDirectoryError, match=r"disk/run.* cannot be written: Read-only file system"):
        mount("-o", "remount,ro", str(disk))
        pipeline.train(recipe(), directory)
    mount("-o", "remount,rw", str(disk))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.train(recipe(), directory, display=Incident("qat", interrupt, 45))
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(RunDirectoryError, match=r"disk/run.* cannot be written: Read-only file system"):
        pipeline.train(recipe(), directory, resume=True)
    mount("-o", "remount,rw", str(disk))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    display = Incident()
    pipeline.train(recipe(), directory, resume=True, display=display)
    assert display.ended["ptq"] == "resumed" and display.ended["qat"] == "done"
    assert result(directory) == whole


def test_a_folder_of_the_run_that_becomes_a_file(tmp_path, whole):
    directory = tmp_path / "run"

    def replace():
        (directory / "outputs").rename(tmp_path / "outputs")
        (directory / "outputs").touch()

    expected = r"run/outputs/float\.npz' cannot be written: Not a directory"
    run_into(RunDirectoryError, expected, directory, Incident("parity", replace), resume=False)
    (directory / "outputs").unlink()
    display = Incident()
    pipeline.train(recipe(), directory, resume=True, display=display)
    assert display.ended["convert"] == "resumed" and display.ended["parity"] == "done"
    assert result(directory) == whole


# --- data that goes away


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits as a folder of images, 30 of each."""
    root = tmp_path_factory.mktemp("lost") / "images"
    digits = load_digits()
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        for index, image in enumerate(digits.images[digits.target == digit][:30]):
            Image.fromarray((image * 15).astype(np.uint8)).save(root / str(digit) / f"{index:02d}.png")
    return root


def folder(images, stream):
    return f"source: image_folder, path: {images}, options: {{channels: 1, stream: {stream}}}"


def test_data_that_goes_away_and_comes_back(images, tmp_path):
    """A streamed run that loses its data four times ends as one that had all of it in memory."""
    in_memory = folder(images, "false")
    pipeline.train(recipe(in_memory), tmp_path / "memory")
    expected = result(tmp_path / "memory")

    source, directory, away = folder(images, "true"), tmp_path / "run", images.with_name("away")

    def lose():
        images.rename(away)

    gone = r"images/\d/\d\d\.png is gone since the folder was listed\. Put it back\."
    resume = False
    for step, batch in (("float", 3), ("ptq", None), ("qat", 8), ("parity", None)):
        run_into(DataError, gone, directory, Incident(step, lose, batch), source, resume)
        with pytest.raises(DataError, match=r"images is not a folder\. Set path to the folder"):
            pipeline.train(recipe(source), directory, resume=True)
        away.rename(images)
        resume = True
    display = Incident()
    pipeline.train(recipe(source), directory, resume=True, display=display)
    assert display.ended["convert"] == "resumed" and display.ended["parity"] == "done"
    assert result(directory) == expected
    accuracies = [
        json.loads((run / "report.json").read_text())["variants"]["qat"]["accuracy"]
        for run in (directory, tmp_path / "memory")
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_other_data_is_refused_by_a_run_that_goes_on(images, tmp_path, stream):
    source, directory = folder(images, stream), tmp_path / "run"

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.train(recipe(source), directory, display=Incident("float", interrupt, 3))
    lost, kept = images / "3" / "07.png", tmp_path / "07.png"
    lost.rename(kept)
    expected = r"The data of source 'image_folder' has changed since .*run' was started: train 220 -> 219\. Put it back"
    with pytest.raises(DataError, match=expected):
        pipeline.train(recipe(source), directory, resume=True)
    kept.rename(lost)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(recipe(source), directory, resume=True, display=Incident("float", interrupt, 2))
