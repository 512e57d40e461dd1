"""Trainings on several replicas, in real processes, give what one process gives on the same batches."""

import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest

RECIPE = """
name: together
description: no dropout, whose noise differs from replica to replica, and no step but by gradients' size
data: {source: digits, calibration_samples: 64, validation_fraction: 0.05, augment: {shift: 1}}
model: {name: "test_distribute:net"}
float: {epochs: 1, batch_size: 96, optimizer: sgd, learning_rate: 0.05}
quantize: {scheme: w8a8}
qat: {epochs: 2, batch_size: 96, optimizer: sgd, learning_rate: 0.01, keep_best: false, freeze_observers_after: 0.5}
bench: {enabled: false}
parity: {samples: 8}
evaluate: {limit: 64, threads: 1}
"""


def net(input_shape, classes):
    from keras import Input, Model, layers

    inputs = Input(input_shape)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name="norm")(x))
    return Model(inputs, layers.Dense(classes, activation="softmax", name="classes")(layers.Flatten()(x)))


def run(directory, resume=False, distribute="none", workers=(), index=0, seconds=None, seed=0, batch_size=96):
    """In a process of its own: a whole run, or the part of a worker in it."""
    if workers:
        task = {"type": "worker", "index": index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": list(workers)}, "task": task})
    import tensorflow as tf

    from mobileqat import pipeline
    from mobileqat.checkpoint import Checkpoint
    from mobileqat.recipe import parse_recipe

    if distribute == "mirrored":
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    if seconds is not None:
        Checkpoint.SECONDS = seconds
    overrides = [f"distribute={distribute}", f"seed={seed}", f"float.batch_size={batch_size}"]
    try:
        pipeline.train(parse_recipe(RECIPE, file="together.yaml", overrides=overrides), directory, resume=resume)
    except Exception as error:
        directory.with_name(f"error{index}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.fixture(scope="module")
def processes():
    """Forked from one that has imported everything but computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mobileqat.pipeline"])
    return context


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone") / "run"
    finish([start(processes, directory)])
    return weights(directory)


def start(processes, directory, **options):
    process = processes.Process(target=run, args=(directory,), kwargs=options)
    process.start()
    return process


def start_workers(processes, directory, count, **options):
    workers = [f"localhost:{port}" for port in free_ports(count)]
    common = {"distribute": "multi_worker", "workers": workers, **options}
    return [start(processes, directory, index=index, **common) for index in range(count)]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def finish(started):
    for process in started:
        process.join(300)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * len(started)


def weights(directory):
    from mobileqat.models import load_model

    found = {}
    for variant in ("float", "qat"):
        model = load_model(directory / "models" / f"{variant}.keras")
        found |= {f"{variant}/{variable.path}": variable.numpy() for variable in model.variables}
    return found


def assert_close(together, alone):
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        # A value that rounds the other way moves a range, hence the gradients, by about a step of the grid.
        np.testing.assert_allclose(together[name], value, rtol=2e-3, atol=2e-3 * np.abs(value).max(), err_msg=name)


def test_two_devices_equal_one(processes, tmp_path, alone):
    finish([start(processes, tmp_path / "run", distribute="mirrored")])
    assert_close(weights(tmp_path / "run"), alone)


def test_two_workers_equal_one(processes, tmp_path, alone):
    finish(start_workers(processes, tmp_path / "run", 2))
    assert_close(weights(tmp_path / "run"), alone)
    # One writer: a whole run, and nothing of the worker.
    assert (tmp_path / "run" / "report.json").is_file()
    assert len(list((tmp_path / "run" / "tensorboard" / "qat" / "train").glob("*"))) == 1


def test_lost_worker(processes, tmp_path, alone):
    directory = tmp_path / "run"
    started = start_workers(processes, directory, 3, seconds=0.0)
    checkpoint, until = directory / "checkpoints" / "qat.npz", time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    assert checkpoint.is_file(), "no training began"
    os.kill(started[2].pid, signal.SIGKILL)
    for process in started:
        process.join(240)
    assert all(process.exitcode for process in started), "a worker went on without the others"
    for index in range(2):
        message = (tmp_path / f"error{index}.txt").read_text()
        assert message.startswith(f"ClusterError: Worker {index} lost the connection to another worker."), message
    finish(start_workers(processes, directory, 3, resume=True))
    assert_close(weights(directory), alone)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_not_a_cluster(monkeypatch, config):
    from mobileqat.distribute import make_strategy
    from mobileqat.errors import ClusterError

    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ClusterError, match=r"needs TF_CONFIG.*Received: "):
        make_strategy("multi_worker")


def test_batches_that_cannot_be_shared(processes, tmp_path):
    process = start(processes, tmp_path / "run", distribute="mirrored", batch_size=95)
    process.join(300)
    assert process.exitcode == 1
    assert "Batches of 95 samples cannot be shared equally by 2 replicas" in (tmp_path / "run/report.json").read_text()


def test_workers_that_start_differently(processes, tmp_path):
    workers = [f"localhost:{port}" for port in free_ports(2)]
    common = {"distribute": "multi_worker", "workers": workers}
    started = [start(processes, tmp_path / "run", index=index, seed=index, **common) for index in range(2)]
    for process in started:
        process.join(300)
    assert all(process.exitcode for process in started)
    wanted = "ClusterError: Worker 1 has other training labels than worker 0."
    assert (tmp_path / "error1.txt").read_text().startswith(wanted)
