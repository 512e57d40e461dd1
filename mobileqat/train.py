"""Training: one `fit` for float models and quantized ones, which `schedule` makes quantization-aware.

Validation of a quantized model runs the integer arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from mobileqat.batches import TrainingBatches, data_errors, validation_batches
from mobileqat.checkpoint import Checkpoint, Storage
from mobileqat.data import Dataset
from mobileqat.distillation import distilled, gives_probabilities
from mobileqat.distribute import is_multi_worker, per_replica, prepare, require_same, synchronized_batch_norm
from mobileqat.errors import ClusterError, TrainingError
from mobileqat.quantize import QuantizedModel
from mobileqat.recipe import Augment, QatTraining, Training
from mobileqat.schedule import (
    AveragedWeights,
    OscillationFreeze,
    Schedule,
    batch_norms,
    freeze,
    reestimate_batch_norm,
    train_with,
)
from mobileqat.tensorboard import TensorSummaries


@dataclass(frozen=True)
class History:
    """What a training did.

    Args:
        epochs: one dict per epoch: epoch, loss, accuracy, val_loss, val_accuracy, learning_rate, seconds.
        initial_val_accuracy: validation accuracy before the first step.
        best_epoch: the epoch whose weights were kept; 0 for the ones before training, None for the last.
        ranges: of a quantized model, `{"epoch", "ranges": {tensor: [minimum, maximum]}}` before training, as epoch 0,
            and after each epoch: the ends of each activation tensor's integer grid, real values.
        reestimated: whether BatchNormalization statistics that were taken anew stayed; None: none were.
    """

    epochs: list[dict]
    initial_val_accuracy: float
    best_epoch: int | None
    ranges: list[dict] = field(default_factory=list)
    reestimated: bool | None = None


@data_errors()
def fit(
    model: keras.Model,
    dataset: Dataset,
    settings: Training,
    *,
    augment: Augment | None = None,
    seed: int = 0,
    teacher: keras.Model | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    log_dir: Path | None = None,
    storage: Storage | None = None,
) -> History:
    """Trains a classifier in place.

    A model made in the scope of a `tf.distribute` strategy is trained on that strategy's replicas, see
    `mobileqat.distribute`.

    Args:
        model: float, or made by `quantize_model`; its output is probabilities or logits [n, classes].
        dataset: train and validation splits are used.
        settings: a recipe's `float` or `qat` section; the latter brings the schedule and distillation.
        augment: random changes to the training images.
        seed: of shuffling, augmentation and dropout.
        teacher: the float model, for distillation.
        callbacks: further Keras callbacks, such as a progress display.
        log_dir: where TensorBoard events go.
        storage: where checkpoints are kept; training goes on from the one that is there.

    Raises:
        ClusterError: the replicas cannot share a batch equally, or do not start and end with the same weights.
        TrainingError: the loss, a weight or a range became NaN or infinite; the model keeps the last finite weights.
        DataError: a streamed sample cannot be read any more.
    """
    keras.utils.set_random_seed(seed)
    strategy = model.distribute_strategy
    if settings.batch_size % strategy.num_replicas_in_sync:
        raise ClusterError(
            f"Batches of {settings.batch_size} samples cannot be shared equally by {strategy.num_replicas_in_sync} "
            "replicas. Make batch_size a multiple of their number."
        )
    with strategy.scope(), synchronized_batch_norm(model, strategy.num_replicas_in_sync > 1):
        train = TrainingBatches(dataset, settings.batch_size, augment, seed, strategy.num_replicas_in_sync)
        validation = validation_batches(dataset)
        trained = _compiled(model, settings, teacher, train.steps)
        recorder = _Recorder(model, keep_best=isinstance(settings, QatTraining) and settings.keep_best)
        techniques = _techniques(model, settings)
        memories = {"recorder": recorder, **techniques}
        is_spread = is_multi_worker(strategy)
        checkpoint = Checkpoint(storage or _Nowhere(), model, train, memories, with_metrics=not is_spread)
        goes_on = checkpoint.restore(trained.optimizer)
        if is_spread:
            require_same(strategy, model, dataset.train.y)
        if strategy.num_replicas_in_sync > 1:
            prepare(trained, strategy, *next(iter(validation.take(1))))
        # A resumed training has been evaluated before; its metrics, too, have to exist before the first step.
        initial = trained.evaluate(validation.take(1) if goes_on else validation, verbose=0, return_dict=True)
        if not goes_on:
            recorder.begin(initial["accuracy"])
        # What changes weights comes before what looks at them, and the checkpoint when all others have done their part.
        first_callbacks: list[Any] = [Schedule(model, settings)] if isinstance(settings, QatTraining) else []
        first_callbacks += [*techniques.values(), recorder, *callbacks]
        first_callbacks += [TensorSummaries(model, log_dir)] if log_dir is not None else []
        try:
            for first, end, step in checkpoint.stretches(settings.epochs):
                # Keras's TensorBoard closes its writers at the end of a stretch.
                boards = [keras.callbacks.TensorBoard(log_dir, write_graph=False)] if log_dir is not None else []
                trained.fit(
                    per_replica(strategy, train, first, step),
                    steps_per_epoch=train.steps - step,
                    initial_epoch=first,
                    epochs=end,
                    validation_data=validation,
                    shuffle=False,
                    verbose=0,
                    callbacks=keras.callbacks.CallbackList(
                        [*first_callbacks, *boards, checkpoint],
                        add_history=True,
                        model=trained,
                        epochs=settings.epochs,
                        steps=train.steps,
                    ),
                )
        except tf.errors.InvalidArgumentError as error:
            if "is not in [0, " not in str(error):
                raise
            # The weights are finite, what they compute is not: a kernel's table has no entry for NaN.
            recorder.stop(f"'{model.name}' computed values that are NaN or infinite in validation after", error)
        finally:
            if isinstance(model, QuantizedModel):
                freeze(model, observers=False, batch_norm=False)
                train_with(model)
        if is_spread:
            require_same(strategy, model, dataset.train.y)
        best, reestimated = recorder.keep(), None
        if isinstance(settings, QatTraining) and settings.reestimate_batch_norm and best != 0 and batch_norms(model):
            batches = train.starting().take(settings.reestimate_batch_norm)
            reestimated = _reestimate(model, trained, batches, validation, settings.keep_best)
        return History(recorder.epochs, recorder.initial_accuracy, best, recorder.ranges, reestimated)


def _compiled(model: keras.Model, settings: Training, teacher: keras.Model | None, steps_per_epoch: int) -> keras.Model:
    """The model to train, with its loss and its optimizer: `model` itself, or the one that distils into it."""
    trained = model
    if teacher is not None and isinstance(settings, QatTraining):
        trained = distilled(model, teacher, settings)
    optimizer = make_optimizer(settings, steps_per_epoch)
    if any(layer.compute_dtype == "float16" for layer in model._flatten_layers()):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)  # small gradients would be 0 in float16
    trained.compile(
        optimizer=optimizer,
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=not gives_probabilities(model), label_smoothing=settings.label_smoothing
        ),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    # Here, since variables made while a step is traced take longer than the rest of the tracing.
    trained.optimizer.build(trained.trainable_variables)
    return trained


def _techniques(model: keras.Model, settings: Training) -> dict[str, AveragedWeights | OscillationFreeze]:
    """The callbacks that change weights between steps, in their order."""
    found: dict[str, AveragedWeights | OscillationFreeze] = {}
    if isinstance(settings, QatTraining) and settings.freeze_oscillations:
        found["oscillations"] = OscillationFreeze(model, settings.freeze_oscillations)
    if settings.weight_ema is not None:
        found["averages"] = AveragedWeights(model, settings.weight_ema)
    return found


class _Nowhere:
    """Checkpoints that are not kept."""

    def read(self) -> None:
        return None

    def write(self, arrays) -> None:
        pass


def make_optimizer(settings: Training, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe section, with its learning rate schedule."""
    rate: float | keras.optimizers.schedules.LearningRateSchedule = settings.learning_rate
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if settings.schedule == "cosine":
        decay = max(1, settings.epochs * steps_per_epoch - warmup)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else settings.learning_rate,
            decay,
            warmup_target=settings.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    elif warmup:
        rate = keras.optimizers.schedules.PolynomialDecay(0.0, warmup, end_learning_rate=settings.learning_rate)
    common: dict[str, Any] = {"global_clipnorm": settings.clip_norm}
    if settings.optimizer == "sgd":
        common["momentum"] = 0.9
    # AdamW's own default decays.
    decay_rate = settings.weight_decay if settings.optimizer == "adamw" else settings.weight_decay or None
    optimizer = OPTIMIZERS[settings.optimizer](rate, weight_decay=decay_rate, **common)
    if isinstance(settings, QatTraining) and settings.range_learning_rate != 1.0:
        _scale_rate_of_ranges(optimizer, settings.range_learning_rate)
    if decay_rate:  # a range that decays would saturate more and more
        optimizer.exclude_from_weight_decay(var_names=list(RANGES))
    return optimizer


OPTIMIZERS = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}
RANGES = ("range_shift", "weight_ratio")  # names of trained ends of activation ranges, and of trained weight scales


def _scale_rate_of_ranges(optimizer: keras.optimizers.Optimizer, factor: float) -> None:
    """Makes an optimizer's learning rate `factor` times as large for trained ranges."""
    plain = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        name = optimizer._trainable_variables[optimizer._get_variable_index(variable)].name
        plain(gradient, variable, learning_rate * (factor if name in RANGES else 1.0))

    # On the instance: a model file names its optimizer's class, which has to be Keras's own.
    optimizer.update_step = update_step


def _reestimate(model: QuantizedModel, trained: keras.Model, batches, validation, keep_best: bool) -> bool:
    """Takes BatchNormalization statistics anew, under the quantized weights; with `keep_best` they stay unless they
    validate worse. Returns whether they stayed."""
    before, accuracy = model.get_weights(), trained.evaluate(validation, verbose=0, return_dict=True)["accuracy"]
    reestimate_batch_norm(model, batches)
    after = trained.evaluate(validation, verbose=0, return_dict=True)["accuracy"]
    stays = not keep_best or after >= accuracy
    if not stays:
        model.set_weights(before)
    return stays


# ------------------------------------------------------------------ callbacks


def _floats(model: keras.Model) -> list:
    """Weights, ranges and statistics."""
    return [v for v in model.variables if keras.backend.is_float_dtype(v.dtype)]


def _is_finite(variable):
    return tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(variable)))


class _Recorder(keras.callbacks.Callback):
    """Records epochs, keeps the best weights, and stops when a loss or a weight is not finite."""

    def __init__(self, watched: keras.Model, keep_best: bool):
        super().__init__()
        self.watched = watched
        self.keep_best = keep_best
        self.epochs: list[dict] = []
        self.ranges: list[dict] = []
        self.initial_accuracy = 0.0
        self._last_finite = watched.get_weights()
        self._best_epoch, self._best_accuracy, self._best = 0, 0.0, self._last_finite
        self._started = 0.0
        self._all_finite = tf.function(self._check, autograph=False)

    def begin(self, accuracy: float) -> None:
        """Takes the weights before training as the best ones: they stay unless an epoch does as well."""
        self.initial_accuracy = self._best_accuracy = accuracy
        self._note_ranges(0)

    def _note_ranges(self, epoch: int) -> None:
        if not isinstance(self.watched, QuantizedModel):
            return
        quantizers = self.watched.quantizers.items()
        spans = {name: list(quantizer.ends()) for name, quantizer in quantizers if quantizer.is_learned}
        self.ranges.append({"epoch": epoch, "ranges": spans})

    def state(self) -> tuple[dict, list[np.ndarray]]:
        values = {
            "epochs": self.epochs,
            "ranges": self.ranges,
            "initial_accuracy": self.initial_accuracy,
            "best_epoch": self._best_epoch,
            "best_accuracy": self._best_accuracy,
        }
        return values, [*self._last_finite, *self._best]

    def set_state(self, values: dict, arrays) -> None:
        self.epochs, self.ranges = values["epochs"], values.get("ranges", [])  # older checkpoints have no ranges
        self.initial_accuracy = values["initial_accuracy"]
        self._best_epoch, self._best_accuracy = values["best_epoch"], values["best_accuracy"]
        self._last_finite, self._best = list(arrays[: len(arrays) // 2]), list(arrays[len(arrays) // 2 :])

    def _check(self):
        return tf.reduce_all([_is_finite(variable) for variable in _floats(self.watched)])

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        where = f"at step {batch + 1} of"
        if not math.isfinite(logs["loss"]):
            self.stop(f"The loss of '{self.watched.name}' became {logs['loss']} {where}")
        # Fake quantization saturates, so that a loss can stay finite where gradients, hence weights, are not.
        if not self._all_finite():
            self.stop(f"Weights or ranges of '{self.watched.name}' became NaN or infinite {where}")

    def on_epoch_end(self, epoch, logs=None):
        self._last_finite = self.watched.get_weights()
        row = {key: float(value) for key, value in logs.items()}
        row["learning_rate"] = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.epochs.append({"epoch": epoch + 1, **row, "seconds": time.perf_counter() - self._started})
        self._note_ranges(epoch + 1)
        # A later epoch wins a tie: it has trained longer on the frozen grid.
        if row["val_accuracy"] >= self._best_accuracy:
            self._best_epoch, self._best_accuracy, self._best = epoch + 1, row["val_accuracy"], self._last_finite

    def stop(self, what: str, cause: Exception | None = None) -> NoReturn:
        """Puts the weights of the last good epoch back and ends the training."""
        broken = [v.path for v in _floats(self.watched) if not _is_finite(v)]
        where = f" Not finite: {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}." if broken else ""
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.watched.set_weights(self._last_finite)
        raise TrainingError(
            f"{what} epoch {len(self.epochs) + 1}, at learning rate {rate:.3g}.{where} The model has the weights "
            "of the epoch before. Lower the learning rate, or look for NaN in the data."
        ) from cause

    def keep(self) -> int | None:
        """Puts the best weights back; returns their epoch."""
        if not self.keep_best:
            return None
        self.watched.set_weights(self._best)
        return self._best_epoch
