"""Batches by position, and trainings that go on in mid-epoch as if they had not been interrupted."""

import keras
import numpy as np
import pytest
from test_train import float_model, make_dataset, quantized_model

from mobileqat.batches import TrainingBatches
from mobileqat.checkpoint import Checkpoint
from mobileqat.errors import RunDirectoryError
from mobileqat.recipe import Augment, QatTraining, Training
from mobileqat.train import fit

AUGMENTS = {"plain": None, "augmented": Augment(flip=True, shift=2, cutout=3)}


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def epoch_of(batches, epoch, start=0):
    count = batches.steps - start
    return [(x.numpy(), y.numpy()) for x, y in batches.starting(epoch, start).take(count)]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_are_a_function_of_seed_epoch_and_step(dataset, augment):
    batches, same, other = (TrainingBatches(dataset, 16, AUGMENTS[augment], seed) for seed in (5, 5, 6))
    epochs = [epoch_of(batches, epoch) for epoch in range(3)]
    assert len(epochs[0]) == batches.steps
    for start in (0, 1, batches.steps - 1):
        for (x, y), (wanted_x, wanted_y) in zip(epoch_of(same, 1, start), epochs[1][start:], strict=True):
            np.testing.assert_array_equal(x, wanted_x)
            np.testing.assert_array_equal(y, wanted_y)
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0]), "every epoch has another order"
    assert not np.array_equal(epochs[0][0][0], epoch_of(other, 0)[0][0])


def test_epochs_follow_each_other(dataset):
    batches = TrainingBatches(dataset, 16, AUGMENTS["augmented"], 0)
    last, first = (x.numpy() for x, _ in batches.starting(3, batches.steps - 1).take(2))
    np.testing.assert_array_equal(last, epoch_of(batches, 3)[-1][0])
    np.testing.assert_array_equal(first, epoch_of(batches, 4)[0][0])


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_replicas_have_equal_parts_of_the_same_batches(dataset, augment, replicas):
    whole = TrainingBatches(dataset, 12, AUGMENTS[augment], 0)
    shared = TrainingBatches(dataset, 12, AUGMENTS[augment], 0, replicas)
    parts = [list(shared.starting(1, 1, range(part, part + 1)).take(shared.steps - 1)) for part in range(replicas)]
    for wanted, *given in zip(epoch_of(whole, 1, 1)[: shared.steps - 1], *parts, strict=True):
        assert len({len(x) for x, _ in given}) == 1
        count = len(wanted[0]) // replicas * replicas
        if count < len(wanted[0]) and AUGMENTS[augment]:
            continue  # a batch that is cut draws other numbers
        for index in (0, 1):
            together = np.concatenate([pair[index] for pair in given])
            np.testing.assert_array_equal(together, wanted[index][:count])


def test_an_epoch_holds_every_sample_once(dataset):
    batches = TrainingBatches(dataset, 16, None, 0)
    seen = np.concatenate([x for x, _ in epoch_of(batches, 4)])
    assert seen.dtype == np.float32 and len(seen) == len(dataset.train.x)
    assert {x.tobytes() for x in seen} == {x.tobytes() for x in dataset.train.x}
    assert len(epoch_of(batches, 0)[-1][0]) == len(dataset.train.x) % 16 or len(dataset.train.x) % 16 == 0


def test_labels_stay_with_their_samples(dataset):
    labels = {x.tobytes(): y for x, y in zip(dataset.train.x, dataset.train.y, strict=True)}
    for x, y in epoch_of(TrainingBatches(dataset, 16, None, 0), 2):
        assert [labels[sample.tobytes()] for sample in x] == np.argmax(y, 1).tolist()


class Memory:
    """Keeps every checkpoint; the one that `read` gives is set by the test."""

    def __init__(self, found=None):
        self.found, self.written = found, []

    def read(self):
        return self.found

    def write(self, arrays):
        self.written.append({name: np.array(array) for name, array in arrays.items()})


@pytest.fixture
def always(monkeypatch):
    """A checkpoint at every opportunity."""
    monkeypatch.setattr(Checkpoint, "SECONDS", 0.0)


KINDS = {
    "float": (float_model, Training(epochs=3, learning_rate=0.01, batch_size=32)),
    "qat": (
        lambda dataset: quantized_model(
            dataset, scheme="w4a8", weight_range="learned", learn_activation_ranges=True
        ),
        QatTraining(epochs=3, learning_rate=0.01, batch_size=32, freeze_observers_after=0.3),
    ),
    "everything": (
        lambda dataset: quantized_model(dataset, scheme="w4a8"),
        QatTraining(
            epochs=3, learning_rate=0.01, batch_size=32, weight_ema=0.9, freeze_oscillations=0.1, start_after=0.3,
            optimizer="adamw", weight_decay=0.01, warmup_epochs=0.5, clip_norm=1.0, keep_best=False, damping=1e-3,
            reestimate_batch_norm=2,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_any_step(dataset, kind, always, tmp_path):
    make, settings = KINDS[kind]
    arguments = () if kind == "float" else (dataset,)
    options = {"seed": 3, "augment": Augment(shift=1), "teacher": None if kind == "float" else float_model()}
    whole, everything = make(*arguments), Memory()
    history = fit(whole, dataset, settings, storage=everything, **options)
    steps = TrainingBatches(dataset, 32, None, 0).steps
    assert len(everything.written) == 3 * steps  # at the beginning of each epoch, and after all steps but the last
    for index in (0, 2, steps - 1, steps, 2 * steps + 3, len(everything.written) - 1):
        keras.utils.set_random_seed(99)  # an interrupted process has another past
        resumed = make(*arguments)
        storage = Memory(everything.written[index])
        again = fit(resumed, dataset, settings, storage=storage, log_dir=tmp_path, **options)
        for a, b in zip(resumed.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert again.best_epoch == history.best_epoch
        assert again.initial_val_accuracy == history.initial_val_accuracy
        assert spans_of(again) == spans_of(history)
        assert [row["epoch"] for row in again.ranges] == ([] if kind == "float" else [0, 1, 2, 3])
        for row, wanted in zip(again.epochs, history.epochs, strict=True):
            assert {**row, "seconds": 0} == {**wanted, "seconds": 0}


def spans_of(history):
    """Ranges by epoch; layers without a name of their own get another one each time."""
    return [list(row["ranges"].values()) for row in history.ranges]


def test_a_checkpoint_of_another_model_is_refused(dataset, always):
    storage = Memory()
    fit(float_model(), dataset, Training(epochs=1), storage=storage)
    with pytest.raises(RunDirectoryError, match="belongs to another model"):
        fit(quantized_model(dataset), dataset, QatTraining(epochs=1), storage=Memory(storage.written[-1]))


def test_a_minute_passes_between_checkpoints(dataset):
    storage = Memory()
    fit(float_model(), dataset, Training(epochs=2), storage=storage)
    assert storage.written == []
