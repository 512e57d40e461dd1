"""The state of a training on disk: all that a process which was killed needs to go on as if it had not been.

Weights, ranges, statistics, optimizer, metrics, random generators of layers, what the callbacks remember, and the
position in the data; as plain arrays, no code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from mobileqat.batches import TrainingBatches
from mobileqat.errors import RunDirectoryError


class Storage(Protocol):
    """Where checkpoints are kept: one, replaced whole."""

    def read(self) -> Mapping[str, np.ndarray] | None: ...
    def write(self, arrays: Mapping[str, np.ndarray]) -> None: ...


class Memory(Protocol):
    """A callback that remembers something."""

    def state(self) -> tuple[dict, Sequence[np.ndarray]]:
        """JSON-able values and arrays."""

    def set_state(self, values: dict, arrays: Sequence[np.ndarray]) -> None: ...


class Checkpoint(keras.callbacks.Callback):
    """Writes the state of a training every minute, and restores it before the first step.

    Args:
        storage: where to.
        watched: the model whose variables count; a teacher's do not change.
        batches: whose position is kept.
        memories: callbacks that remember something, by name.
        with_metrics: keep the metrics of an epoch that has begun; on several machines they are spread over these.

    It has to be the last callback, so that it sees what the others have done.
    """

    SECONDS = 60.0  # between two checkpoints: what an interruption costs at most

    def __init__(
        self,
        storage: Storage,
        watched: keras.Model,
        batches: TrainingBatches,
        memories: Mapping[str, Memory],
        with_metrics: bool = True,
    ):
        super().__init__()
        self.storage = storage
        self.watched = watched
        self.batches = batches
        self.memories = memories
        self.with_metrics = with_metrics
        self.epoch = self.step = 0  # where training goes on, from 0
        self._metrics: list[np.ndarray] | None = None
        self._written = time.monotonic()

    def restore(self, optimizer: keras.optimizers.Optimizer) -> bool:
        """Puts the state back that is kept, if there is one; the optimizer has to be built.

        Raises:
            RunDirectoryError: the state is of another model.
        """
        found = self.storage.read()
        if found is None:
            return False
        values: dict[str, Any] = json.loads(str(found["values"]))
        groups = {
            name: [found[f"{name}/{index}"] for index in range(count)] for name, count in values["counts"].items()
        }
        _assign(self.watched.variables, groups["model"])
        _assign(optimizer.variables, groups["optimizer"])
        for name, memory in self.memories.items():
            memory.set_state(values["memories"][name], groups[name])
        self._metrics = groups["metrics"]
        self.epoch, self.step = values["position"]
        return True

    def stretches(self, epochs: int) -> Iterator[tuple[int, int, int]]:
        """What is left of `epochs`, as `(first epoch, end, first step)`: the rest of one, then whole ones."""
        whole = self.epoch
        if self.step:
            yield self.epoch, self.epoch + 1, self.step
            whole += 1
        if whole < epochs:
            yield whole, epochs, 0

    def on_epoch_begin(self, epoch, logs=None):
        start = self.step if epoch == self.epoch else 0
        if self._metrics and self.with_metrics:  # Keras has just reset them
            _assign(self.model.metrics_variables, self._metrics)
            self._metrics = None
        self._position = [epoch, start]
        self._write_when_due()

    def on_train_batch_end(self, batch, logs=None):
        self._position[1] += 1
        if self._position[1] < self.batches.steps:  # what comes after the last step is the next epoch's
            self._write_when_due()

    def _write_when_due(self) -> None:
        if time.monotonic() - self._written < self.SECONDS:
            return
        groups: dict[str, Sequence[np.ndarray]] = {
            "model": _values(self.watched.variables),
            "optimizer": _values(self.model.optimizer.variables),
            "metrics": _values(self.model.metrics_variables) if self.with_metrics else [],
        }
        remembered = {}
        for name, memory in self.memories.items():
            remembered[name], groups[name] = memory.state()
        counts = {name: len(arrays) for name, arrays in groups.items()}
        values = {"position": self._position, "counts": counts, "memories": remembered}
        arrays = {f"{name}/{index}": array for name, group in groups.items() for index, array in enumerate(group)}
        self.storage.write({"values": np.array(json.dumps(values)), **arrays})
        self._written = time.monotonic()


def _values(variables) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def _assign(variables, arrays: Sequence[np.ndarray]) -> None:
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [array.shape for array in arrays]:
        raise RunDirectoryError(
            "The checkpoint belongs to another model or another version of this program: its arrays have other shapes. "
            "Delete it to train this step from its start."
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
