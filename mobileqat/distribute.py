"""Training on several devices or machines, by TensorFlow's own engine (`tf.distribute`).

Every replica has a part of each batch.  What depends on the whole batch is made to: gradients are summed (Keras),
BatchNormalization takes the moments of all parts, and observed ranges hold all of them (`FakeQuantize.observe`).  So a
training gives what one process gives on the same batches, within float tolerance, and every replica has the same grid.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf

from mobileqat.batches import TrainingBatches
from mobileqat.errors import ClusterError

EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


def make_strategy(kind: str) -> tf.distribute.Strategy:
    """A strategy by its name in a recipe; several machines have to make it before TensorFlow does anything else.

    Args:
        kind: none; mirrored: all GPUs of this machine; multi_worker: the machines of `TF_CONFIG`.

    Raises:
        ClusterError: `TF_CONFIG` is missing or does not describe a cluster and this process's place in it.
    """
    if kind == "mirrored":
        return tf.distribute.MirroredStrategy()
    if kind != "multi_worker":
        return tf.distribute.get_strategy()
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text)
        workers, task = config["cluster"]["worker"], config["task"]
        is_worker = set(config["cluster"]) == {"worker"} and task["type"] == "worker"
        fits = is_worker and len(workers) > 1 and 0 <= int(task["index"]) < len(workers)
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ClusterError(
            "distribute: multi_worker needs TF_CONFIG, with the addresses of two workers or more and this process's "
            f"place among them, such as {EXAMPLE}. Received: {text[:300] or 'nothing'}"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def worker_index(strategy: tf.distribute.Strategy) -> int:
    """This process's place among the workers; 0 is the chief, which alone writes artefacts."""
    return strategy.cluster_resolver.task_id if is_multi_worker(strategy) else 0


def from_chief(strategy: tf.distribute.Strategy, value: int) -> int:
    """The chief's `value`, on every worker; waits until all have asked."""

    def share():
        replica = tf.distribute.get_replica_context()
        own = tf.where(replica.replica_id_in_sync_group == 0, tf.constant(value, tf.int64), 0)
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, own)

    return int(strategy.experimental_local_results(tf.function(lambda: strategy.run(share))())[0])


def require_same(strategy: tf.distribute.Strategy, model: keras.Model, labels: np.ndarray) -> None:
    """Checks that every worker has the same weights, ranges and data, to the bit, which no later step would notice.

    Raises:
        ClusterError: on every worker that differs from the chief.
    """
    names = ("weights or ranges", "training labels")
    weights = b"".join(w.tobytes() for w in model.get_weights())
    own = [zlib.crc32(weights), zlib.crc32(labels.tobytes())]
    different = [name for name, mine in zip(names, own, strict=True) if from_chief(strategy, mine) != mine]
    if different:
        raise ClusterError(
            f"Worker {worker_index(strategy)} has other {' and '.join(different)} than worker 0. Give all workers the "
            "same recipe, data, versions of the packages, and run directory."
        )


@contextmanager
def lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns TensorFlow's errors of a broken connection into a ClusterError."""
    try:
        yield
    except LOST as error:
        if not is_multi_worker(strategy):
            raise
        raise ClusterError(
            f"Worker {worker_index(strategy)} lost the connection to another worker. Start all workers again with "
            "--resume: training goes on from the last checkpoint."
        ) from error


LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


def per_replica(
    strategy: tf.distribute.Strategy, batches: TrainingBatches, epoch: int, step: int
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """`batches.starting(epoch, step)`; under a strategy of several replicas each worker reads its own parts."""
    if strategy.num_replicas_in_sync == 1:
        return batches.starting(epoch, step)

    def own_parts(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * count
        return batches.starting(epoch, step, range(first, first + count))

    return strategy.distribute_datasets_from_function(own_parts)


@contextmanager
def synchronized_batch_norm(model: keras.Model, wanted: bool) -> Iterator[None]:
    """Lets every BatchNormalization of a model take its moments over all replicas, for as long as this lasts."""
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    before = [layer.synchronized for layer in layers]
    for layer in layers:
        layer.synchronized = layer.synchronized or wanted
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.synchronized = value


def prepare(model: keras.Model, strategy: tf.distribute.Strategy, x, y) -> None:
    """Makes Keras 3.15 train a compiled model under a strategy of several replicas.

    Args:
        model: is fitted in the strategy's scope from now on.
        x: a batch of inputs, to build loss and metrics on.
        y: its labels.
    """
    if is_multi_worker(strategy):
        # There, what a step returns is averaged over its first axis, which a scalar has not.
        for name in ("train_step", "test_step"):
            setattr(model, name, _with_an_axis(getattr(model, name)))
    model.test_on_batch(x, y)
    # `fit` averages the first batch over the replicas to see its shapes, which fails where their parts differ in size
    # and on several machines.  A model that names no strategy is spared that, and uses the one whose scope it is in.
    model._distribute_strategy = None


def _with_an_axis(step: Callable) -> Callable:
    return lambda data: {name: tf.reshape(value, [1]) for name, value in step(data).items()}
