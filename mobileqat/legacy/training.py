"""Training with `tf_keras`, in the process that may import it: what `mobileqat.train` does, as far as TFMOT goes.

TFMOT has no calibration, no distillation and no schedule: its ranges start at +-6 and follow training by a moving
average with a decay of 0.999.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mobileqat.errors import TrainingError

if TYPE_CHECKING:
    from mobileqat.legacy.worker import Task


def fit(task: Task, model, data: dict[str, np.ndarray]) -> dict:
    """Trains a classifier in place.

    Args:
        task: its arguments hold the recipe's section as `settings`, `augment`, `seed`, `classes` and `log_dir`; it is
            told of the beginning and of every epoch.
        model: a `tf_keras` model with one output [n, classes], probabilities or logits.
        data: `x_train`, `y_train`, `x_validation`, `y_validation`.

    Returns:
        The fields of `mobileqat.train.History`.

    Raises:
        TrainingError: the loss or a weight became NaN or infinite.
    """
    import tensorflow as tf
    import tf_keras

    arguments, settings = task.arguments, task.arguments["settings"]
    one_hot = np.eye(arguments["classes"], dtype=np.float32)
    labels = {name: one_hot[data[f"y_{name}"]] for name in ("train", "validation")}
    batches = tf.data.Dataset.from_tensor_slices((data["x_train"], labels["train"]))
    batches = batches.shuffle(len(data["x_train"]), seed=arguments["seed"]).batch(settings["batch_size"])
    if any(arguments["augment"].values()):
        from mobileqat.data.augment import augment_images

        batches = augment_images(batches, **arguments["augment"], seed=arguments["seed"])
    validation = tf.data.Dataset.from_tensor_slices((data["x_validation"], labels["validation"])).batch(256)
    model.compile(
        _optimizer(settings, len(batches)),
        tf_keras.losses.CategoricalCrossentropy(
            from_logits=not gives_probabilities(model), label_smoothing=settings["label_smoothing"]
        ),
        metrics=[tf_keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    initial = model.evaluate(validation, verbose=0, return_dict=True)["accuracy"]
    recorder = _recorder(task, initial, keep_best=settings.get("keep_best", False))
    if settings["epochs"]:
        task.report(event="begin", steps=len(batches))
        callbacks = [recorder, tf_keras.callbacks.TensorBoard(arguments["log_dir"], write_graph=False)]
        model.fit(
            batches.prefetch(tf.data.AUTOTUNE),
            epochs=settings["epochs"],
            validation_data=validation,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    return {"epochs": recorder.epochs, "initial_val_accuracy": initial, "best_epoch": recorder.keep(model)}


def gives_probabilities(model) -> bool:
    """Whether the output comes from softmax or sigmoid; layers that only move values may follow."""
    layer = model.outputs[0]._keras_history.layer
    while True:
        inner = getattr(layer, "layer", layer)  # of TFMOT's wrapper
        activation = getattr(inner, "activation", None)
        name = getattr(getattr(activation, "activation", activation), "__name__", "")
        if name in ("softmax", "sigmoid") or type(inner).__name__ == "Softmax":
            return True
        is_moving = type(inner).__name__ in ("Reshape", "Flatten", "Dropout", "Permute")
        if not (is_moving or (type(inner).__name__ == "Activation" and name == "linear")):
            return False
        layer = layer.input._keras_history.layer


def _optimizer(settings: dict, steps_per_epoch: int):
    """As `mobileqat.train.make_optimizer`."""
    from tf_keras import optimizers

    rate: Any = settings["learning_rate"]
    warmup = round(settings["warmup_epochs"] * steps_per_epoch)
    if settings["schedule"] == "cosine":
        rate = optimizers.schedules.CosineDecay(
            0.0 if warmup else settings["learning_rate"],
            max(1, settings["epochs"] * steps_per_epoch - warmup),
            warmup_target=settings["learning_rate"] if warmup else None,
            warmup_steps=warmup,
        )
    elif warmup:
        rate = optimizers.schedules.PolynomialDecay(0.0, warmup, end_learning_rate=settings["learning_rate"])
    decay = settings["weight_decay"] or None
    if settings["optimizer"] == "sgd":
        return optimizers.SGD(rate, momentum=0.9, weight_decay=decay)
    if settings["optimizer"] == "adamw":
        return optimizers.AdamW(rate, weight_decay=settings["weight_decay"])
    return optimizers.Adam(rate, weight_decay=decay)


def _recorder(task: Task, initial_accuracy: float, keep_best: bool):
    """A callback that records epochs, keeps the best weights, and stops when a loss or a weight is not finite."""
    import tf_keras

    class Recorder(tf_keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.epochs: list[dict] = []
            self._best = None
            self._started = 0.0

        def on_train_begin(self, logs=None):
            # The weights before training stay unless an epoch does as well.
            self._best = (initial_accuracy, 0, self.model.get_weights()) if keep_best else None

        def on_epoch_begin(self, epoch, logs=None):
            self._started = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            if not math.isfinite(logs["loss"]):
                self._stop(f"The loss of '{self.model.name}' became {logs['loss']} at step {batch + 1} of")
            task.report(event="batch", batch=batch)

        def on_epoch_end(self, epoch, logs=None):
            weights = self.model.get_weights()
            if not all(np.isfinite(array).all() for array in weights):
                self._stop(f"Weights of '{self.model.name}' became NaN or infinite in")
            row = {key: float(value) for key, value in logs.items()}
            rate = float(self.model.optimizer.learning_rate.numpy())
            seconds = time.perf_counter() - self._started
            self.epochs.append({"epoch": epoch + 1, **row, "learning_rate": rate, "seconds": seconds})
            task.report(event="epoch", epoch=epoch, logs=row)
            if self._best and row["val_accuracy"] >= self._best[0]:
                self._best = (row["val_accuracy"], epoch + 1, weights)

        def _stop(self, what: str) -> NoReturn:
            rate = float(self.model.optimizer.learning_rate.numpy())
            raise TrainingError(
                f"{what} epoch {len(self.epochs) + 1}, at learning rate {rate:.3g}. Lower the learning rate, or look "
                "for NaN in the data."
            )

        def keep(self, model):
            """Puts the best weights back; returns their epoch."""
            if self._best is None:
                return None
            model.set_weights(self._best[2])
            return self._best[1]

    return Recorder()
