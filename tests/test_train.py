"""Training on a corner of the digits: it learns, its schedule keeps its word, and it stops where it must."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import sequential
from keras import layers as L
from sklearn.datasets import load_digits

from mobileqat.calibrate import calibrate, float_activations
from mobileqat.convert import convert
from mobileqat.data import build_dataset
from mobileqat.distillation import Distillation, distilled, gives_probabilities
from mobileqat.errors import CalibrationError, ModelError, TrainingError
from mobileqat.fakequant import quantize_weights
from mobileqat.parity import verify
from mobileqat.quantize import quantize_model
from mobileqat.recipe import Augment, QatTraining, Training
from mobileqat.rules import GONE
from mobileqat.schedule import OscillationFreeze, Schedule, freeze, reestimate_batch_norm, train_with
from mobileqat.train import fit, make_optimizer


def make_dataset(count=200):
    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.float32), digits.target
    chosen = labels < 4
    images, labels = images[chosen], labels[chosen]
    arrays = {
        "x_train": images[:count], "y_train": labels[:count], "x_test": images[-100:], "y_test": labels[-100:],
    }  # fmt: skip
    return build_dataset("digits", arrays, validation_fraction=0.2, seed=0)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def float_model(last="softmax"):
    keras.utils.set_random_seed(0)
    return sequential(
        L.BatchNormalization(momentum=0.5), L.Conv2D(8, 3), L.BatchNormalization(momentum=0.5), L.ReLU(), L.Flatten(),
        L.Dropout(0.1), L.Dense(4, activation=last), shape=(8, 8, 1),
    )  # fmt: skip


def quantized_model(dataset, **options):
    quantized = quantize_model(float_model(), **options)
    calibrate(quantized, dataset.train.x)
    return quantized


def test_float_training_learns(dataset):
    history = fit(float_model(), dataset, Training(epochs=3, learning_rate=0.02, batch_size=16))
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert set(history.epochs[0]) == {
        "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds",
    }  # fmt: skip


def test_qat_learns(dataset):
    quantized = quantized_model(dataset)
    history = fit(quantized, dataset, QatTraining(epochs=3, learning_rate=0.02, batch_size=16))
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert 0 <= history.initial_val_accuracy <= 1
    assert max(row["val_accuracy"] for row in history.epochs) >= history.initial_val_accuracy


def test_same_seed_same_weights(dataset):
    results = []
    for seed in (3, 3, 4):
        model = float_model()
        fit(model, dataset, Training(epochs=1), seed=seed, augment=Augment(flip=True, shift=1))
        results.append(model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(results[0], results[2], strict=True))


class Watch(keras.callbacks.Callback):
    """Ranges and BatchNormalization statistics at the end of each epoch."""

    def __init__(self, quantized):
        super().__init__()
        self.quantized = quantized
        self.ranges, self.statistics = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.ranges.append([quantizer.ranges() for quantizer in self.quantized.quantizers.values()])
        self.statistics.append([v.numpy() for v in self.quantized.non_trainable_variables if "moving" in v.path])


def changes(states):
    return [
        any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in itertools.pairwise(states)
    ]


@pytest.mark.parametrize("observers, batch_norm", [(0.5, 0.75), (0.75, 0.25), (1.0, 1.0)])
def test_schedule(dataset, observers, batch_norm):
    """Of four epochs, those after the given share leave ranges or statistics exactly as they are."""
    quantized = quantized_model(dataset)
    watch = Watch(quantized)
    settings = QatTraining(
        epochs=4, keep_best=False, freeze_observers_after=observers, freeze_batch_norm_after=batch_norm
    )
    fit(quantized, dataset, settings, callbacks=[watch])
    assert changes(watch.ranges) == [epoch < 4 * observers for epoch in (1, 2, 3)]
    assert changes(watch.statistics) == [epoch < 4 * batch_norm for epoch in (1, 2, 3)]
    assert all(quantizer.observing for quantizer in quantized.quantizers.values()), "free again afterwards"


def test_freeze_from_the_start(dataset):
    quantized = quantized_model(dataset)
    ranges = [quantizer.ranges() for quantizer in quantized.quantizers.values()]
    fit(quantized, dataset, QatTraining(epochs=1, freeze_observers_after=0.0, freeze_batch_norm_after=0.0))
    for before, quantizer in zip(ranges, quantized.quantizers.values(), strict=True):
        np.testing.assert_array_equal(quantizer.ranges(), before)


def test_freeze_tells_whether_anything_changed(dataset):
    quantized = quantized_model(dataset)
    assert not freeze(quantized, observers=False, batch_norm=False)
    assert freeze(quantized, observers=True, batch_norm=False)
    assert not freeze(quantized, observers=True, batch_norm=False)


class Spoil(keras.callbacks.Callback):
    """Ruins the weights after the first epoch, before validation sees them."""

    def __init__(self, model):
        super().__init__()
        self.watched = model

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            for variable in self.watched.trainable_variables:
                variable.assign(np.zeros(variable.shape))


@pytest.mark.parametrize("keep_best", [True, False])
def test_keep_best(dataset, keep_best):
    quantized = quantized_model(dataset)
    fit(quantized, dataset, QatTraining(epochs=4, learning_rate=0.02, batch_size=16))
    settings = QatTraining(epochs=2, learning_rate=1e-6, keep_best=keep_best)
    history = fit(quantized, dataset, settings, callbacks=[Spoil(quantized)])
    accuracy = np.mean(np.argmax(quantized(dataset.validation.x), 1) == dataset.validation.y)
    accuracies = [history.initial_val_accuracy, *(row["val_accuracy"] for row in history.epochs)]
    if keep_best:
        assert history.best_epoch in (0, 1)
        np.testing.assert_allclose(accuracy, max(accuracies), atol=1e-6)
    else:
        assert history.best_epoch is None
        np.testing.assert_allclose(accuracy, accuracies[-1], atol=1e-6)


def test_no_epochs_change_nothing(dataset):
    for model, settings in (
        (float_model(), Training(epochs=0)),
        (quantized_model(dataset), QatTraining(epochs=0)),
    ):
        before = model.get_weights()
        assert fit(model, dataset, settings).epochs == []
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_distillation(dataset):
    teacher = float_model(last=None)
    fit(teacher, dataset, Training(epochs=2, learning_rate=0.02))
    quantized, weights = quantized_model(dataset), teacher.get_weights()
    history = fit(
        quantized, dataset, QatTraining(epochs=2, distillation=1.0, learning_rate=0.02, batch_size=16), teacher=teacher
    )
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    for before, after in zip(weights, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)
    assert teacher.trainable, "the caller's teacher is left as it was"


def test_distillation_from_itself_has_no_divergence(dataset):
    """A student equal to its teacher has nothing to learn from it."""
    model = float_model()
    same = keras.models.clone_model(model)
    same.set_weights(model.get_weights())
    trained = Distillation(model, same, weight=1.0, temperature=3.0)
    trained.compile(loss="categorical_crossentropy")
    x, y = dataset.train.x[:8], np.eye(4, dtype=np.float32)[dataset.train.y[:8]]
    loss = trained.compute_loss(x, y, model(x), None, True)
    np.testing.assert_allclose(loss, 0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_distillation_leaves_penalties_whole(weight):
    """Damping and regularizers are no imitation of labels: a student that equals its teacher still pays for them."""
    model = keras.Sequential([keras.Input((4,)), L.Dense(4, activation="softmax", kernel_regularizer="l2")])
    teacher = keras.models.clone_model(model)
    teacher.set_weights(model.get_weights())
    trained = Distillation(model, teacher, weight, temperature=3.0)
    trained.compile(loss="categorical_crossentropy")
    x, y = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    penalty = 0.01 * np.sum(np.square(model.layers[0].kernel))
    entropy = -np.mean(np.log(np.sum(model(x) * y, axis=-1)))
    np.testing.assert_allclose(
        trained.compute_loss(x, y, model(x), None, True), penalty + (1 - weight) * entropy, rtol=1e-5
    )


def feature_error(quantized, teacher, x, index=1):
    """Mean squared error of one tensor against the float model's, in units of that one's variance."""
    twin = quantize_model(teacher)
    wanted = float_activations(twin, [tf.constant(x)])[twin.plan.operators[index].output].numpy()
    probe = keras.Model(quantized.input, quantized.operators[quantized.plan.operators[index].name].output)
    return np.mean((probe(x).numpy() - wanted) ** 2) / np.var(wanted)


def test_features_follow_the_teacher(dataset):
    """The chosen layer comes nearer to the float model's, which labels alone drive away from it."""
    teacher = float_model()
    fit(teacher, dataset, Training(epochs=3, learning_rate=0.01, batch_size=16))  # statistics that fit the data
    quantized = quantize_model(teacher)
    calibrate(quantized, dataset.train.x)
    settings = {"epochs": 3, "learning_rate": 0.01, "batch_size": 16, "distillation": 0.0, "keep_best": False}
    fit(quantized, dataset, QatTraining(**settings), teacher=teacher)
    apart = feature_error(quantized, teacher, dataset.validation.x)
    fit(quantized, dataset, QatTraining(**settings, distillation_features=("conv*",)), teacher=teacher)
    assert feature_error(quantized, teacher, dataset.validation.x) < 0.5 * apart


def test_features_are_named_by_any_of_their_layers(dataset):
    quantized = quantized_model(dataset)
    convolution = next(op for op in quantized.plan.operators if op.kind == "CONV_2D")
    assert len(convolution.nodes) == 3
    for path in convolution.nodes:
        trained = distilled(quantized, float_model(), QatTraining(distillation_features=(path,)))
        assert list(trained.features) == [convolution.output]
    with pytest.raises(ModelError, match=r"matches 'pool' of qat.distillation_features. There are: .*dense"):
        distilled(quantized, float_model(), QatTraining(distillation_features=("pool",)))


def test_no_distillation_leaves_the_model_alone(dataset):
    quantized = quantized_model(dataset)
    assert distilled(quantized, float_model(), QatTraining(distillation=0.0)) is quantized


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_learning_rate_of_ranges(dataset, optimizer):
    """Ranges move `range_learning_rate` times as far in a step, weights as before."""
    moved = []
    for factor in (1.0, 0.25):
        settings = QatTraining(learning_rate=1e-3, range_learning_rate=factor, optimizer=optimizer)
        model = quantized_model(dataset, weight_range="learned", learn_activation_ranges=True)
        before = {v.path.partition("/")[2]: v.numpy() for v in model.trainable_variables}
        model.compile(make_optimizer(settings, 10), "categorical_crossentropy")
        model.train_on_batch(dataset.train.x[:32], np.eye(4)[dataset.train.y[:32]])
        after = {v.path.partition("/")[2]: v.numpy() for v in model.trainable_variables}
        moved.append({path: after[path] - before[path] for path in before})
    for path, change in moved[0].items():
        share = 0.25 if path.endswith("range_shift") else 1.0
        if not path.endswith("weight_ratio"):  # kept at 1 and below
            np.testing.assert_allclose(moved[1][path], share * change, rtol=0.02, atol=1e-7, err_msg=path)


class Break(keras.callbacks.Callback):
    """Makes one weight NaN before the second step of the second epoch."""

    def __init__(self, watched):
        super().__init__()
        self.watched, self.epoch = watched, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1):
            bias = self.watched.trainable_variables[-1]
            bias.assign(np.full(bias.shape, np.nan))


@pytest.mark.parametrize("kind", ["float", "qat", "qat without keep_best", "distilled"])
def test_divergence_is_an_error(dataset, kind):
    """The model keeps its last finite weights, and a quantized one is ready to be trained again."""
    if kind == "float":
        model, settings = float_model(), Training(epochs=3)
    else:
        model = quantized_model(dataset)
        settings = QatTraining(
            epochs=3, keep_best="without" not in kind, freeze_observers_after=0.0,
            distillation=0.5 if kind == "distilled" else 0.0,
        )  # fmt: skip
    with pytest.raises(TrainingError, match=r"(nan|inf).*step 2 of epoch 2.*Lower the learning rate"):
        fit(model, dataset, settings, callbacks=[Break(model)], teacher=float_model() if kind == "distilled" else None)
    assert all(np.isfinite(value).all() for value in model.get_weights())
    if kind != "float":
        assert all(quantizer.observing for quantizer in model.quantizers.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_learning_rate_beyond_reason(dataset, optimizer):
    """Fake quantization saturates, so the loss can stay finite while weights run away: never without an error."""
    for model, settings in (
        (float_model(), Training(epochs=3, learning_rate=1e30, optimizer=optimizer)),
        (quantized_model(dataset), QatTraining(epochs=3, learning_rate=1e30, optimizer=optimizer, keep_best=False)),
    ):
        with contextlib.suppress(TrainingError):
            fit(model, dataset, settings)
        assert all(np.isfinite(value).all() for value in model.get_weights())


@pytest.mark.parametrize(
    "layers, expected",
    [
        ((lambda: L.Dense(4, activation="softmax"),), True),
        ((lambda: L.Dense(4), lambda: L.Softmax()), True),
        ((lambda: L.Dense(4), lambda: L.Activation("softmax")), True),
        ((lambda: L.Dense(4),), False),
        ((lambda: L.Dense(4, activation="relu"),), False),
        ((lambda: L.Dense(4, activation="softmax"), lambda: L.Reshape((4,))), True),
        ((lambda: L.Dense(4, activation="softmax"), lambda: L.Dropout(0.0)), True),
    ],
)
def test_probabilities_or_logits(layers, expected):
    """The float model and its quantized twin must give one answer: their loss depends on it."""
    model = sequential(L.Flatten(), *(layer() for layer in layers))
    assert gives_probabilities(model) == expected
    for exclude in ((), (model.layers[-1].name,), ("*",)):
        assert gives_probabilities(quantize_model(model, exclude=exclude)) == expected


@pytest.mark.parametrize(
    "function, expected",
    [
        (keras.ops.sigmoid, True),
        (lambda x: keras.ops.reshape(keras.ops.softmax(x), (-1, 4)), True),
        (lambda x: keras.ops.softmax(x) * 2.0, False),
        (lambda x: L.Softmax()(keras.ops.sort(x)), True),
    ],
    ids=["sigmoid", "reshaped", "scaled", "not to be quantized"],
)
def test_probabilities_of_operators(function, expected):
    x = keras.Input((4,))
    assert gives_probabilities(keras.Model(x, function(x))) == expected


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule, warmup", [("constant", 0), ("cosine", 0), ("cosine", 1)])
def test_optimizers(optimizer, schedule, warmup):
    settings = Training(epochs=4, optimizer=optimizer, schedule=schedule, warmup_epochs=warmup, weight_decay=0.01)
    made = make_optimizer(settings, steps_per_epoch=10)
    assert type(made).__name__.lower() == optimizer and made.weight_decay == 0.01
    rate = made._learning_rate
    if schedule == "cosine":
        rates = [float(rate(step)) for step in (0, 10, 40)]
        np.testing.assert_allclose(rates[::2], [0 if warmup else 1e-3, 0], atol=1e-9)
        np.testing.assert_allclose(rates[1], 1e-3 if warmup else 1e-3 * 0.853553, rtol=1e-4)


def test_constant_rate_warms_up_too():
    """Either the warm-up of a constant schedule happens, or asking for it is an error."""
    settings = Training(epochs=4, schedule="constant", warmup_epochs=1)
    rate = make_optimizer(settings, steps_per_epoch=10)._learning_rate
    assert callable(rate) and float(rate(0)) < 1e-4 and abs(float(rate(20)) - 1e-3) < 1e-9


def test_tensorboard(dataset, tmp_path):
    fit(float_model(), dataset, Training(epochs=1), log_dir=tmp_path)
    assert list(tmp_path.rglob("events*"))


def summaries(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    return accumulator.Reload()


def test_tensorboard_shows_the_tensors_of_a_quantized_model(dataset, tmp_path):
    quantized = quantized_model(dataset)
    fit(quantized, dataset, QatTraining(epochs=2, batch_size=64, keep_best=False), log_dir=tmp_path)
    found = summaries(tmp_path / "tensors")
    tags = set(found.Tags()["tensors"])
    weighted = {name for name, w in quantized.operators.items() if w.weight_spec is not None}
    assert {tag for tag in tags if tag.startswith("integers/")} == {f"integers/{name}" for name in weighted}
    assert {tag for tag in tags if tag.startswith("weights/")} == {f"weights/{name}" for name in weighted}
    learned = {name for name, quantizer in quantized.quantizers.items() if quantizer.is_learned}
    assert {tag for tag in tags if tag.startswith("ranges/")} == {
        f"ranges/{n}/{e}" for n in learned for e in ("low", "high")
    }
    name = next(iter(learned))
    scale, zero_point = quantized.quantizers[name].grid()
    _, last = (tf.make_ndarray(event.tensor_proto) for event in found.Tensors(f"ranges/{name}/high"))
    np.testing.assert_allclose(last, scale * (127 - zero_point), rtol=1e-6)
    integers = quantized.operators[next(iter(weighted))].constants()["weights"]
    buckets = tf.make_ndarray(found.Tensors(f"integers/{next(iter(weighted))}")[-1].tensor_proto)  # [low, high, count]
    assert buckets[:, 2].sum() == integers.size
    assert (buckets[0, 0], buckets[-1, 1]) == (integers.min(), integers.max())


def test_tensorboard_shows_the_plan_as_a_graph(dataset, tmp_path):
    quantized = quantized_model(dataset)
    grids = {name: quantizer.grid() for name, quantizer in quantized.quantizers.items()}  # as training finds them
    fit(quantized, dataset, QatTraining(epochs=1, batch_size=64), log_dir=tmp_path)
    nodes = {node.name: node for node in summaries(tmp_path / "tensors").Graph().node}
    operators = {op.name: op for op in quantized.plan.operators if op.kind != GONE}
    assert set(nodes) == {*operators, *quantized.plan.inputs}
    for name, operator in operators.items():
        assert nodes[name].op == operator.kind and all(maker in nodes for maker in nodes[name].input)
        assert len(nodes[name].input) == len(operator.inputs)
        scale, zero_point = grids[operator.output]
        assert nodes[name].attr["scale"].f == scale and nodes[name].attr["zero_point"].i == zero_point


def test_tensorboard_shows_the_weights_and_the_graph_of_a_float_model(dataset, tmp_path):
    model = float_model()
    fit(model, dataset, Training(epochs=1), log_dir=tmp_path)
    found = summaries(tmp_path / "tensors")
    kernels = {f"weights/{v.path}" for v in model.trainable_variables if len(v.shape) > 1}
    assert len(kernels) == 2 and set(found.Tags()["tensors"]) == kernels
    assert "Conv2D" in {node.op for node in found.Graph().node}


# --- learned grids, estimators, oscillation


def test_learned_ranges_are_trained_and_kept(dataset, tmp_path):
    quantized = quantized_model(dataset, scheme="w4a8", weight_range="learned", learn_activation_ranges=True)
    start = {v.path: v.numpy() for v in quantized.trainable_variables if v.name in ("weight_ratio", "range_shift")}
    # Fitted by least squares; a BatchNormalization alone has one weight per channel, which needs no other scale.
    start = {path: value for path, value in start.items() if ".scale/" not in path}
    assert len(start) == 6 and any(np.any(value < 1) for path, value in start.items() if "ratio" in path)
    settings = QatTraining(epochs=2, learning_rate=0.01, batch_size=16, weight_decay=0.5, keep_best=False)
    fit(quantized, dataset, settings)
    after = {v.path: v.numpy() for v in quantized.trainable_variables}
    assert all(np.any(after[path] != value) for path, value in start.items())
    assert all(np.max(value) <= 1 for path, value in after.items() if "ratio" in path)
    assert verify(quantized, convert(quantized), dataset.validation.x).passed
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert convert(loaded) == convert(quantized)


def test_learned_ranges_need_a_start(dataset):
    quantized = quantize_model(float_model(), learn_activation_ranges=True)
    with pytest.raises(CalibrationError, match="has no ranges yet"):
        quantized(dataset.train.x[:2], training=True)


def test_ranges_do_not_decay(dataset):
    quantized = quantized_model(dataset, weight_range="learned", learn_activation_ranges=True)
    optimizer = make_optimizer(QatTraining(weight_decay=0.1, optimizer="adamw"), 10)
    optimizer.build(quantized.trainable_variables)
    decayed = {v.name: optimizer._use_weight_decay(v) for v in quantized.trainable_variables}
    assert decayed["kernel"] and not decayed["weight_ratio"] and not decayed["range_shift"]


STEPS = [{"estimator": "identity"}, {"estimator": "soft"}, {"damping": 0.5}, {"start_after": 0.5}]


@pytest.mark.parametrize("settings", STEPS)
def test_settings_of_a_step_are_put_back(dataset, settings):
    quantized = quantized_model(dataset, scheme="w4a8", learn_activation_ranges=True)
    seen = []

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            wrapper = next(iter(quantized.operators.values()))
            seen.append((wrapper.quantizing, wrapper.estimator, wrapper.damping))

    history = fit(quantized, dataset, QatTraining(epochs=2, batch_size=32, **settings), callbacks=[See()])
    assert np.isfinite(history.epochs[-1]["loss"])
    expected = (True, settings.get("estimator", "clipped"), settings.get("damping", 0.0))
    assert seen[-1] == expected and seen[0] == ((False, *expected[1:]) if "start_after" in settings else expected)
    for part in (*quantized.operators.values(), *quantized.quantizers.values()):
        assert part.quantizing and part.estimator == "clipped"


def test_damping_pulls_weights_to_their_integers(dataset):
    def distance(damping):
        quantized = quantized_model(dataset, scheme="w4a8")
        settings = QatTraining(epochs=4, learning_rate=0.003, batch_size=32, damping=damping, keep_best=False)
        fit(quantized, dataset, settings)
        wrappers = [w for w in quantized.operators.values() if w.weight_spec]
        scaled = [quantize_weights(w.kernel(), w.rule.channel_axes, w.weight_spec, w.ratio()) for w in wrappers]
        return np.mean(
            [np.mean(np.abs(np.clip(w.kernel() / s, -7, 7) - i)) for w, (i, s) in zip(wrappers, scaled, strict=True)]
        )

    assert distance(10.0) < 0.7 * distance(0.0)


def test_damping_leaves_saturated_weights_alone(dataset):
    quantized = quantized_model(dataset, scheme="w4a8", weight_range="learned")
    wrapper = next(w for w in quantized.operators.values() if w.weight_spec)
    wrapper.weight_ratio.assign(np.full(wrapper.weight_ratio.shape, 0.5, np.float32))
    wrapper.damping = 1.0
    kernel = wrapper.layer.kernel
    with tf.GradientTape() as tape:
        wrapper(dataset.train.x[:2], training=True)
        (loss,) = wrapper.losses
    gradient = tape.gradient(loss, kernel.value).numpy()
    largest = np.abs(kernel.numpy()).max(axis=(0, 1, 2), keepdims=True)
    np.testing.assert_array_equal(gradient == 0, np.abs(kernel.numpy()) > 0.5 * largest)


def test_oscillating_weights_freeze(dataset):
    quantized = quantized_model(dataset, scheme="w4a8")
    wrapper = next(w for w in quantized.operators.values() if w.operator.kind == "CONV_2D")
    kernel = wrapper.layer.kernel
    index = (0, 0, 0, 0)
    _, scales = quantize_weights(wrapper.kernel(), wrapper.rule.channel_axes, wrapper.weight_spec, wrapper.ratio())
    scale = float(scales[0, 0, 0, 0])
    values = kernel.numpy()
    values[index] = 1.6 * scale
    kernel.assign(values)
    freezer = OscillationFreeze(quantized, threshold=0.02)
    for step in range(8):
        values = kernel.numpy()
        values[index] = (1.4, 1.6)[step % 2] * scale
        values[1, 1, 0, 1] += 0.01 * scale  # drifts one way
        kernel.assign(values)
        freezer.on_train_batch_end(step)
    state = freezer.state_of_weights[freezer.wrappers.index(wrapper)]
    frozen = state["frozen"].numpy()
    assert frozen[index] == 1 and frozen.sum() == 1
    assert kernel.numpy()[index] == np.float32(2) * np.float32(scale)  # where it was for longer


def freezer_of_one_layer(values):
    """A dense layer of one channel with these weights, scale 1 where the largest is 7, and what watches it."""
    keras.utils.set_random_seed(0)
    model = sequential(L.Dense(1, use_bias=False), shape=(len(values),))
    quantized = quantize_model(model, "w4a8", weight_range="maxabs")
    calibrate(quantized, np.ones((4, len(values)), np.float32))
    (wrapper,) = [w for w in quantized.operators.values() if w.weight_spec]
    wrapper.layer.kernel.assign(np.asarray(values, np.float32)[:, None])
    return quantized, wrapper.layer.kernel, OscillationFreeze(quantized, threshold=0.02)


def set_weight(kernel, index, value):
    values = kernel.numpy()
    values[index, 0] = value
    kernel.assign(values)


def alternate(kernel, freezer, values, steps):
    """The second weight is at each of two values in turn."""
    for step in range(steps):
        set_weight(kernel, 1, values[step % 2])
        freezer.on_train_batch_end(step)


def test_what_weights_did_in_float_epochs_freezes_none_of_them():
    quantized, kernel, freezer = freezer_of_one_layer([7.0, 0.0])
    train_with(quantized, quantizing=False)
    freezer.on_epoch_begin(0)
    for value in np.linspace(0, 4.4, 200):
        set_weight(kernel, 1, value)
        freezer.on_train_batch_end(0)
    train_with(quantized)
    freezer.on_epoch_begin(1)
    alternate(kernel, freezer, (4.6, 4.4), 6)
    assert freezer.state_of_weights[0]["frozen"].numpy()[1, 0] == 1
    assert kernel.numpy()[1, 0] == 4.0


def test_a_frozen_weight_stays_whatever_the_optimizer_does():
    _, kernel, freezer = freezer_of_one_layer([7.0, 1.6])
    freezer.on_epoch_begin(0)
    alternate(kernel, freezer, (1.4, 1.6), 8)
    assert kernel.numpy()[1, 0] == 2.0
    for step in range(300):
        set_weight(kernel, 1, 2.0 + 0.6)
        freezer.on_train_batch_end(step)
        assert kernel.numpy()[1, 0] == 2.0


def test_a_channel_of_weights_that_flip_keeps_its_largest_one():
    _, kernel, freezer = freezer_of_one_layer([1.0, 0.9, 0.9])
    freezer.state_of_weights[0]["average"].assign(np.full((3, 1), 6.3, np.float32))  # all are at 6 more often
    for step in range(12):  # they take turns as the largest
        kernel.assign(np.roll(np.float32([1.0, 0.9, 0.9]), step)[:, None])
        freezer.on_train_batch_end(step)
    assert 1 <= freezer.state_of_weights[0]["frozen"].numpy().sum() < 3
    before = np.abs(kernel.numpy()).max()
    for step in range(50):
        freezer.on_train_batch_end(step)
    assert np.abs(kernel.numpy()).max() == before


def test_moves_by_several_integers_are_no_flips():
    _, kernel, freezer = freezer_of_one_layer([7.0, 1.0])
    freezer.on_epoch_begin(0)
    alternate(kernel, freezer, (4.0, 1.0), 30)
    assert not freezer.state_of_weights[0]["frozen"].numpy().any()


@pytest.mark.parametrize("start", [-1.0, 1.0])
def test_signs_that_flip_are_frozen_at_the_one_they_have_more_often(dataset, start):
    quantized = quantized_model(dataset, scheme="w1a8")
    wrapper = next(w for w in quantized.operators.values() if w.weight_spec is not None)
    kernel, index = wrapper.layer.kernel, (0, 0, 0, 0)
    size = np.abs(kernel.numpy()).max()

    def move(sign):
        values = kernel.numpy()
        values[index] = sign * size
        kernel.assign(values)

    move(start)
    freezer = OscillationFreeze(quantized, threshold=0.02)
    state = freezer.state_of_weights[freezer.wrappers.index(wrapper)]
    for step in range(12):
        if not state["frozen"].numpy()[index]:
            move(start if step % 3 < 2 else -start)
        freezer.on_train_batch_end(step)
    assert state["frozen"].numpy()[index] == 1
    assert np.sign(kernel.numpy()[index]) == start


@pytest.mark.parametrize(
    ("epochs", "share", "first"), [(1, 0.5, 0), (5, 0.9, 4), (3, 0.7, 2), (4, 0.5, 2), (4, 0.0, 0), (50, 0.14, 7)]
)
def test_the_last_epoch_is_quantized_whatever_the_start(dataset, epochs, share, first):
    schedule = Schedule(quantized_model(dataset), QatTraining(epochs=epochs, start_after=share))
    assert schedule.quantize_from == first


def test_batch_norm_statistics_are_taken_anew(dataset):
    quantized = quantized_model(dataset)
    norm = next(w.batch_norm for w in quantized.operators.values() if w.batch_norm is not None)
    norm.moving_mean.assign(norm.moving_mean + 7.0)
    momentum, ranges = norm.momentum, {n: q.ranges().copy() for n, q in quantized.quantizers.items()}
    batches = [dataset.train.x[start : start + 40] for start in range(0, 120, 40)]
    seen = []
    for batch in batches:
        reestimate_batch_norm(quantized, [batch])
        seen.append(norm.moving_mean.numpy().copy())
    reestimate_batch_norm(quantized, batches)
    np.testing.assert_allclose(norm.moving_mean, np.mean(seen, axis=0), rtol=1e-5)
    assert norm.momentum == momentum
    assert all(np.array_equal(quantized.quantizers[name].ranges(), value) for name, value in ranges.items())


@pytest.mark.parametrize("keep_best", [True, False])
def test_statistics_that_validate_worse_are_kept_only_where_the_last_weights_are(dataset, keep_best, monkeypatch):
    quantized = quantized_model(dataset)
    norm = next(w.batch_norm for w in quantized.operators.values() if w.batch_norm is not None)
    trained = []

    def ruin(model, batches):
        trained.append(norm.moving_mean.numpy())
        norm.moving_mean.assign(norm.moving_mean + 100.0)

    monkeypatch.setattr("mobileqat.train.reestimate_batch_norm", ruin)
    settings = QatTraining(epochs=1, learning_rate=0.01, reestimate_batch_norm=3, keep_best=keep_best)
    assert fit(quantized, dataset, settings).reestimated is (not keep_best)
    np.testing.assert_array_equal(norm.moving_mean, trained[0] + (0.0 if keep_best else 100.0))
    assert fit(quantized, dataset, QatTraining(epochs=1)).reestimated is None


def test_without_statistics_none_are_taken_anew(dataset):
    model = sequential(L.Flatten(), L.Dense(4, activation="softmax"), shape=(8, 8, 1))
    quantized = quantize_model(model)
    calibrate(quantized, dataset.train.x)
    assert fit(quantized, dataset, QatTraining(epochs=1, reestimate_batch_norm=3, keep_best=False)).reestimated is None


FURTHER = [{"weight_ema": 0.5}, {"clip_norm": 0.1}, {"reestimate_batch_norm": 3}, {"freeze_oscillations": 0.1}]


@pytest.mark.parametrize("settings", FURTHER)
def test_further_settings_train(dataset, settings):
    quantized = quantized_model(dataset, scheme="w4a8")
    history = fit(quantized, dataset, QatTraining(epochs=2, learning_rate=0.01, batch_size=32, **settings))
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert verify(quantized, convert(quantized), dataset.validation.x).passed


def test_averaged_weights(dataset):
    """What is kept is the moving average of the weights after each step, from the initial ones on."""
    model, seen = float_model(), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append([variable.numpy() for variable in model.trainable_variables])

    averages = [variable.numpy() for variable in model.trainable_variables]
    fit(model, dataset, Training(epochs=2, batch_size=32, weight_ema=0.75), callbacks=[Watch()])
    for weights in seen:
        averages = [0.75 * average + 0.25 * weight for average, weight in zip(averages, weights, strict=True)]
    assert len(seen) == 2 * 5
    for variable, average in zip(model.trainable_variables, averages, strict=True):
        np.testing.assert_allclose(variable, average, rtol=1e-5, atol=1e-7)


def test_what_is_not_finite_is_named(dataset):
    quantized = quantized_model(dataset)

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernel = next(w.layer.kernel for w in quantized.operators.values() if w.weight_spec)
            kernel.assign(kernel * np.float32("nan"))

    before = quantized.get_weights()
    with pytest.raises(TrainingError, match=r"became (nan|NaN).* at step 2 of epoch 1.* Not finite: .*kernel"):
        fit(quantized, dataset, QatTraining(epochs=1, batch_size=32), callbacks=[Break()])
    assert all(np.array_equal(a, b) for a, b in zip(quantized.get_weights(), before, strict=True))
