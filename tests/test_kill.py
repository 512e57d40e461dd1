"""Runs that are killed at random moments and resumed end in the same bytes as one that was not.

MOBILEQAT_KILLS sets how many kills there are in all; CI does a few.
"""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

KILLS = int(os.environ.get("MOBILEQAT_KILLS", "6"))
KILLS_PER_RUN = 10  # then it may end

RECIPE = """
name: killed
description: small enough to be killed often
deterministic: true
data: {source: digits, calibration_samples: 32, augment: {shift: 1}}
model: {name: dscnn, args: {filters: 8, blocks: 1}}
float: {epochs: 3, batch_size: 64, learning_rate: 0.01}
quantize: {scheme: w4a8, adaround: {steps: 5}}
qat: {epochs: 4, batch_size: 64, learning_rate: 0.001, weight_ema: 0.9, freeze_oscillations: 0.1}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 64, threads: 1}
"""


def run(directory, resume):
    """In a process of its own: a whole run, with a checkpoint after every step."""
    from mobileqat import pipeline
    from mobileqat.checkpoint import Checkpoint
    from mobileqat.recipe import parse_recipe

    Checkpoint.SECONDS = 0.0
    pipeline.train(parse_recipe(RECIPE, file="killed.yaml"), directory, resume=resume)


@pytest.fixture(scope="module")
def processes():
    """Forked from one that has imported everything but computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mobileqat.pipeline"])
    return context


def start(processes, directory, resume):
    process = processes.Process(target=run, args=(directory, resume))
    process.start()
    return process


def result(directory):
    from mobileqat.models import load_model

    files = {path.name: path.read_bytes() for path in directory.glob("*.tflite")}
    weights = {path.name: load_model(path).get_weights() for path in (directory / "models").glob("*.keras")}
    return files, weights


def test_kills(processes, tmp_path):
    started = time.monotonic()
    whole = start(processes, tmp_path / "whole", False)
    whole.join()
    assert whole.exitcode == 0
    seconds = time.monotonic() - started
    files, weights = result(tmp_path / "whole")
    assert set(files) == {"float.tflite", "ptq.tflite", "qat.tflite"}

    chance, kills, in_training, trial = random.Random(0), 0, 0, 0
    while kills < KILLS:
        trial += 1
        directory = tmp_path / f"run{trial}"
        for attempt in range(KILLS_PER_RUN + 1):
            process = start(processes, directory, (directory / "recipe.yaml").exists())
            is_last = attempt == KILLS_PER_RUN or kills >= KILLS
            process.join(None if is_last else chance.uniform(0.1, 0.9 * seconds))
            if process.exitcode is not None:
                break
            in_training += any((directory / "checkpoints").glob("[!.]*"))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert process.exitcode == 0, f"run {trial} after {kills} kills"
        again_files, again_weights = result(directory)
        assert again_files == files, f"run {trial} after {kills} kills"
        for name, values in weights.items():
            for a, b in zip(again_weights[name], values, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"run {trial}, {name}")
        assert not list(directory.rglob(".unfinished*")) and not list(directory.glob("checkpoints/*"))
    assert in_training, "no kill hit a training"
    print(f"{kills} kills in {trial} runs, {in_training} of them in a training")
