"""The public way in and out: quantize, annotate and apply, islands of float, saving, training like any Keras model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from contract import check_layer, check_lowering, give_trained_weights, outputs_of, rms, sequential
from keras import layers as L

from mobileqat import flatbuffer
from mobileqat.calibrate import calibrate
from mobileqat.convert import convert
from mobileqat.errors import CalibrationError, MobileQatError, ModelError
from mobileqat.parity import verify
from mobileqat.quantize import (
    QuantizedModel,
    quantize_annotate_layer,
    quantize_annotate_model,
    quantize_apply,
    quantize_model,
    strip,
)
from mobileqat.runtime import Session
from mobileqat.schemes import QuantSpec, Scheme

X = np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 3)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 32)


def small_model(last="softmax"):
    model = sequential(
        L.Conv2D(4, 3, name="conv"), L.BatchNormalization(name="norm"), L.ReLU(name="relu"),
        L.MaxPooling2D(name="pool"), L.Dropout(0.2, name="drop"), L.Flatten(name="flat"),
        L.Dense(3, activation=last, name="head"), shape=(8, 8, 3),
    )  # fmt: skip
    give_trained_weights(model)
    return model


def calibrated(model=None, **options):
    quantized = quantize_model(model or small_model(), **options)
    calibrate(quantized, X)
    return quantized


def weights_by_path(model):
    return {variable.path: variable.numpy() for variable in model.variables}


# --- asking for the impossible


@pytest.mark.parametrize("input_range", [(1, 1), (2, 1), (0, float("nan")), (0, float("inf")), (0,), (0, 1, 2), 5])
def test_input_range_must_be_a_range(input_range):
    with pytest.raises(ModelError, match="input_range"):
        quantize_model(small_model(), input_range=input_range)


def test_quantized_twice():
    with pytest.raises(ModelError, match="quantized already"):
        quantize_model(quantize_model(small_model()))


@pytest.mark.parametrize("layers", [[L.Activation("linear")], [L.Reshape((8, 8, 3)), L.Dropout(0.5)]])
def test_models_that_compute_nothing(layers):
    with pytest.raises(ModelError, match="computes nothing"):
        quantize_model(sequential(*layers, shape=(8, 8, 3)))


@pytest.mark.parametrize("exclude", [["nothing"], ["conv", "heads"]])
def test_exclude_must_match(exclude):
    with pytest.raises(MobileQatError, match="matches no layer"):
        quantize_model(small_model(), exclude=exclude)


def test_exclude_takes_one_pattern_as_a_string_or_says_so():
    """A string is a sequence of characters: `exclude="conv"` must not become four patterns."""
    try:
        quantized = quantize_model(small_model(), exclude="conv")
    except MobileQatError as error:
        assert "'conv'" in str(error)
    else:
        assert [op.name for op in quantized.plan.operators if not op.quantized] == ["conv"]


UNSUPPORTED_SCHEMES = {
    "int16 activations": Scheme("w8a16", QuantSpec(8, True, True), QuantSpec(16, symmetric=True)),
    "asymmetric weights": Scheme("odd", QuantSpec(8), QuantSpec(8)),
}


@pytest.mark.parametrize("scheme", UNSUPPORTED_SCHEMES.values(), ids=UNSUPPORTED_SCHEMES)
def test_custom_scheme_is_right_or_refused(scheme):
    """A `Scheme` of one's own either converts to a file that passes parity, or is an error on purpose."""
    try:
        quantized = calibrated(scheme=scheme)
        content = convert(quantized)
    except MobileQatError:
        return
    assert verify(quantized, content, X).passed


def test_custom_scheme_survives_saving(tmp_path):
    quantized = calibrated(scheme=Scheme("mine", QuantSpec(8, symmetric=True), QuantSpec(8)))
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded(X), quantized(X))


# --- weights of few bits

# Kernels that the runtime takes as int4, in the delegate (dense, even) and out of it, and those that it does not.
FEW_BITS = {
    "convolution": (lambda: [L.Conv2D(6, 3), L.BatchNormalization(), L.ReLU(6)], (9, 9, 3), 4),
    "grouped": (lambda: [L.Conv2D(8, 3, groups=2)], (6, 6, 4), 8),
    "depthwise": (lambda: [L.DepthwiseConv2D(3)], (6, 6, 4), 8),
    "transposed": (lambda: [L.Conv2DTranspose(3, 3, strides=2)], (5, 5, 4), 8),
    "dense, even": (lambda: [L.Dense(7, activation="relu")], (32,), 4),
    "dense, odd": (lambda: [L.Dense(5)], (33,), 4),
    "dense on rank 3": (lambda: [L.Dense(5)], (4, 16), 4),
}


@pytest.mark.parametrize("bits", [4, 1])
@pytest.mark.parametrize("name", FEW_BITS)
def test_weights_of_few_bits(name, bits):
    """To the last bit, whichever kernel takes them."""
    layers, shape, stored = FEW_BITS[name]
    model = sequential(*layers(), shape=shape)
    checked = check_layer(model, scheme=f"w{bits}a8", relative_error={4: 0.4, 1: 1.5}[bits])
    (operator,) = checked.quantized.plan.operators
    kernel = next(t for t in flatbuffer.read(checked.flatbuffer).tensors if t.name == f"{operator.name}/kernel")
    assert operator.storage_bits == stored and kernel.dtype == f"int{stored}"
    assert np.abs(kernel.data).max() == (7 if bits == 4 else 1) and (bits > 1 or np.all(kernel.data != 0))


@pytest.mark.parametrize("bits", [7, 6, 5, 3, 2])
def test_weights_of_other_widths(bits):
    quantized = calibrated(scheme=f"w{bits}a8")
    content = convert(quantized)
    assert verify(quantized, content, X).passed
    largest = {t.name: np.abs(t.data).max() for t in flatbuffer.read(content).tensors if t.name.endswith("/kernel")}
    assert set(largest.values()) == {2 ** (bits - 1) - 1}


def test_int4_may_stay_in_bytes():
    wide = Scheme("w4a8", QuantSpec(4, True, True), QuantSpec(8), narrow_storage=False)
    quantized = calibrated(scheme=wide)
    assert {op.storage_bits for op in quantized.plan.operators} == {8}
    assert verify(quantized, convert(quantized), X).passed
    assert len(convert(quantized)) > len(convert(calibrated(scheme="w4a8")))


def test_schemes_by_layer(tmp_path):
    quantized = calibrated(layers={"*": "w4a8", "head": "w8a8"})
    bits = {op.name: op.weight_spec.bits for op in quantized.plan.operators if op.weight_spec}
    assert bits == {"conv": 4, "head": 8}
    assert verify(quantized, convert(quantized), X).passed
    quantized.save(tmp_path / "q.keras")
    assert convert(keras.models.load_model(tmp_path / "q.keras")) == convert(quantized)


def test_schemes_by_layer_must_fit():
    with pytest.raises(MobileQatError, match=r"layers='stem' matches no layer of 'model' with a kernel"):
        quantize_model(small_model(), layers={"stem": "w4a8"})
    with pytest.raises(MobileQatError, match="layers='relu' matches no layer"):
        quantize_model(small_model(), layers={"relu": "w4a8"})
    with pytest.raises(MobileQatError, match="Unknown scheme 'w9a8'"):
        quantize_model(small_model(), layers={"conv": "w9a8"})
    with pytest.raises(ModelError, match="weight_range must be one of auto, maxabs, mse, learned"):
        quantize_model(small_model(), weight_range="best")


@pytest.mark.parametrize(
    ("scheme", "is_learned"), [("w8a8", False), ("w8a16", False), ("w7a8", True), ("w2a8", True), ("w1a8", False)]
)
def test_scales_of_few_integers_are_learned_by_default(scheme, is_learned):
    quantized = quantize_model(small_model(), scheme)
    trained = [variable.path for variable in quantized.trainable_variables if "weight_ratio" in variable.path]
    assert trained == (["quant_conv/weight_ratio", "quant_head/weight_ratio"] if is_learned else [])


@pytest.mark.parametrize("weight_range", ["mse", "learned"])
def test_least_squares_weights_are_nearer(weight_range):
    def distance(quantized):
        wrapper = quantized.operators["head"]
        constants = wrapper.constants()
        return rms(constants["weights"] * constants["scales"] - wrapper.layer.kernel.numpy())

    quantized = calibrated(scheme="w3a8", weight_range=weight_range)
    assert distance(quantized) < 0.95 * distance(calibrated(scheme="w3a8", weight_range="maxabs"))
    assert verify(quantized, convert(quantized), X).passed


# --- like any Keras model


def test_is_a_functional_keras_model():
    quantized = quantize_model(small_model(), name="mine")
    assert isinstance(quantized, keras.Model) and quantized.name == "mine"
    assert quantize_model(small_model()).name == "quantized_model"
    assert quantized.input_shape == (None, 8, 8, 3) and quantized.output_shape == (None, 3)
    quantized.summary(print_fn=lambda *args, **kwargs: None)


@pytest.mark.parametrize("method", ["call", "predict", "evaluate"])
def test_needs_ranges(method):
    quantized = quantize_model(small_model())
    quantized.compile(loss="sparse_categorical_crossentropy")
    with pytest.raises(CalibrationError, match=r"calibrate"):
        if method == "call":
            quantized(X)
        elif method == "predict":
            quantized.predict(X, verbose=0)
        else:
            quantized.evaluate(X, Y, verbose=0)


def test_a_training_step_gives_ranges():
    quantized = quantize_model(small_model())
    quantized(X, training=True)
    assert quantized.unobserved() == []
    assert np.isfinite(quantized(X)).all()


def test_compile_and_fit():
    quantized = calibrated()
    ranges = quantized.quantizers["relu"].ranges()
    quantized.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = quantized.fit(X, Y, epochs=3, batch_size=8, verbose=0, validation_data=(X, Y)).history
    assert history["loss"][-1] < history["loss"][0]
    assert np.isfinite(history["val_loss"]).all()
    assert np.any(quantized.quantizers["relu"].ranges() != ranges)
    parity = verify(quantized, convert(quantized), X)
    assert parity.passed and parity.end_to_end.identical == 1.0


def test_jit_compile():
    quantized = calibrated()
    quantized.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    before = weights_by_path(quantized)
    assert np.isfinite(quantized.train_on_batch(X, Y))
    assert all(np.any(v.numpy() != before[v.path]) for v in quantized.trainable_variables if "bias" not in v.path)


def test_custom_training_loop():
    quantized = calibrated(small_model(last=None))
    optimizer, losses = keras.optimizers.Adam(1e-2), []

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = quantized(X, training=True)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(Y, logits, from_logits=True))
        optimizer.apply(tape.gradient(loss, quantized.trainable_variables), quantized.trainable_variables)
        return loss

    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """Layers compute in 16 bits while training; grids and integer inference stay exact."""
    keras.config.set_dtype_policy(policy)
    try:
        model = small_model(last=None)
        quantized = calibrated(model)
        quantized.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        quantized.fit(X, Y, epochs=1, verbose=0)
        assert all(variable.dtype == "float32" for variable in quantized.trainable_variables)
        parity = verify(quantized, convert(quantized), X)
        assert parity.passed and parity.end_to_end.identical == 1.0
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_untrainable_model_keeps_its_variables():
    quantized = calibrated()
    before = weights_by_path(quantized)
    quantized.trainable = False
    quantized.compile("sgd", "sparse_categorical_crossentropy")
    quantized.fit(X, Y, epochs=1, verbose=0)
    for path, value in weights_by_path(quantized).items():
        if "seed_generator" not in path:
            np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_layers_frozen_in_the_float_model_stay_frozen():
    model = small_model()
    for name in ("conv", "norm"):
        model.get_layer(name).trainable = False
    quantized = calibrated(model)
    assert len(quantized.trainable_variables) == len(model.trainable_variables) == 2
    frozen = [variable.numpy() for variable in quantized.operators["conv"].weights[:2]]
    statistics = quantized.operators["conv"].batch_norm.moving_mean.numpy()
    quantized.compile("sgd", "sparse_categorical_crossentropy")
    quantized.fit(X, Y, epochs=1, verbose=0)
    for value, variable in zip(frozen, quantized.operators["conv"].weights[:2], strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(quantized.operators["conv"].batch_norm.moving_mean, statistics)


def test_regularizers_and_constraints_stay():
    model = sequential(
        L.SeparableConv2D(4, 3, depthwise_regularizer="l2", pointwise_regularizer="l1", bias_constraint="non_neg"),
        L.Conv2D(2, 1, kernel_regularizer="l2", activation="relu", kernel_constraint="unit_norm"),
        shape=(8, 8, 3),
    )
    quantized = calibrated(model)
    np.testing.assert_allclose(sorted(map(float, quantized.losses)), sorted(map(float, model.losses)), rtol=1e-6)
    constraints = [type(variable.constraint) for variable in quantized.trainable_variables]
    assert constraints == [type(variable.constraint) for variable in model.trainable_variables]


def test_outputs_keep_their_names_and_structure():
    """A dict of outputs, as for one loss per head, stays a dict with the same keys."""
    x = keras.Input((8, 8, 3), name="x")
    y = L.Flatten()(L.Conv2D(2, 3)(x))
    model = keras.Model(x, {"a": L.Dense(2, name="a")(y), "b": L.Dense(3, name="b")(y)})
    quantized = calibrated(model)
    assert {name: value.shape for name, value in quantized(X).items()} == {"a": (32, 2), "b": (32, 3)}
    quantized.compile("sgd", {"a": "mse", "b": "mse"})
    quantized.fit(X, {"a": np.zeros((32, 2)), "b": np.zeros((32, 3))}, verbose=0)


def test_inputs_by_name():
    x, y = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    quantized = quantize_model(keras.Model({"left": x, "right": y}, L.Add()([x, L.Conv2D(3, 1)(y)])))
    calibrate(quantized, {"right": 2 * X, "left": X})
    assert quantized.quantizers["right"].ranges().max() > 1.5 * quantized.quantizers["left"].ranges().max()
    np.testing.assert_array_equal(
        quantized.predict({"left": X, "right": X}, verbose=0), quantized({"right": X, "left": X})
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integer_inputs(dtype):
    x = keras.Input((8, 8, 3), dtype=dtype, name="x")
    model = keras.Model(x, L.Conv2D(2, 3)(L.Rescaling(1 / 255)(x)))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(dtype)
    for options in ({}, {"input_range": (0, 255)}):
        quantized = quantize_model(model, **options)
        calibrate(quantized, pixels)
        assert rms(quantized(pixels) - model(pixels)) < 0.05 * rms(model(pixels))
        assert verify(quantized, convert(quantized), pixels.astype(np.float32)).passed


def test_open_sizes_are_told():
    model = keras.Sequential([keras.Input((None, None, 3), name="x"), L.Conv2D(4, 3), L.GlobalAveragePooling2D()])
    quantized = calibrated(model, input_shape=(8, 8, 3))
    assert verify(quantized, convert(quantized), X).passed
    assert strip(quantized).input_shape == (None, None, None, 3)


# --- saving


def test_a_trained_model_survives_saving(tmp_path):
    """Ranges, statistics and weights after training, and training goes on where it stopped."""
    quantized = calibrated()
    quantized.compile("sgd", "sparse_categorical_crossentropy")
    quantized.fit(X, Y, epochs=1, verbose=0)
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    assert isinstance(loaded, QuantizedModel) and loaded.name == quantized.name
    np.testing.assert_array_equal(loaded(X), quantized(X))
    assert convert(loaded) == convert(quantized)
    for model in (loaded, quantized):
        model.compile("sgd", "sparse_categorical_crossentropy")
        keras.utils.set_random_seed(3)
        model.get_layer("quant_drop").layer.rate = 0.0
        model.fit(X, Y, epochs=1, verbose=0, shuffle=False)
    np.testing.assert_allclose(loaded(X), quantized(X), atol=1 / 256)


def test_options_survive_saving(tmp_path):
    quantized = calibrated(exclude=["head"], input_range=(-1, 1), ema_decay=0.5)
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    assert loaded.plan == quantized.plan
    assert loaded.quantizers["x"].pinned == (-1, 1) and loaded.quantizers["relu"].ema_decay == 0.5


def test_input_shape_survives_saving(tmp_path):
    quantized = calibrated(sequential(L.Conv2D(4, 3), shape=(None, None, 3)), input_shape=(8, 8, 3))
    quantized.save(tmp_path / "q.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "q.keras")(X), quantized(X))


def test_weights_file(tmp_path):
    quantized = calibrated()
    quantized.save_weights(tmp_path / "q.weights.h5")
    other = quantize_model(small_model())
    other.load_weights(tmp_path / "q.weights.h5")
    np.testing.assert_array_equal(other(X), quantized(X))


def test_saving_after_strip(tmp_path):
    """`strip` reads the configuration that `save` writes, and must not use it up."""
    x = keras.Input((8, 8, 3), name="x")
    quantized = calibrated(keras.Model(x, L.Conv2D(2, 3)(x)))
    assert strip(quantized).count_params() == strip(quantized).count_params()
    quantized.save(tmp_path / "q.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "q.keras")(X), quantized(X))


# --- and back


def test_strip_gives_the_trained_weights():
    model = small_model(last=None)
    quantized = calibrated(model)
    quantized.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    quantized.fit(X, Y, epochs=1, verbose=0)
    stripped = strip(quantized)
    assert [layer.name for layer in stripped.layers] == [layer.name for layer in model.layers]
    np.testing.assert_array_equal(stripped.get_layer("conv").kernel, quantized.operators["conv"].layer.kernel)
    norm = quantized.operators["conv"].batch_norm
    np.testing.assert_array_equal(stripped.get_layer("norm").moving_variance, norm.moving_variance)
    assert np.any(stripped.get_layer("head").kernel.numpy() != model.get_layer("head").kernel.numpy())
    assert rms(stripped(X) - quantized(X)) < 0.1 * rms(stripped(X))


def test_strip_puts_parts_of_weights_back():
    """Weights that were lowered in another layout, or in parts, return to their variables as they were trained."""
    x = keras.Input((3, 4), name="x")
    y = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    y = L.EinsumDense("abc,dc->abd", (3, 5), bias_axes="d", name="einsum")(L.LayerNormalization()(y))
    model = keras.Model(x, L.GRU(3, name="gru")(L.PReLU()(y)))
    give_trained_weights(model)
    samples = np.random.default_rng(0).normal(size=(16, 3, 4)).astype(np.float32)
    quantized = quantize_model(model)
    calibrate(quantized, samples)
    quantized.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=True)
    quantized.fit(samples, np.ones((16, 3)), epochs=2, verbose=0)
    stripped = strip(quantized)
    moved = {
        after.path: bool(np.any(np.asarray(after) != np.asarray(before)))
        for after, before in zip(stripped.trainable_variables, model.trainable_variables, strict=True)
    }
    # softmax does not see what a key's bias adds
    assert [path for path, has_moved in moved.items() if not has_moved and "key/bias" not in path] == []
    check_lowering(quantized, outputs_of(stripped, [samples]), [samples])


def test_strip_takes_quantized_models_only():
    with pytest.raises(ModelError, match="made by quantize_model"):
        strip(small_model())


def a_loss_of_ones_own(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred))


def test_a_compiled_float_model():
    """How the float model was trained is none of the quantized model's business."""
    model = small_model()
    model.compile(keras.optimizers.Adam(3e-4), a_loss_of_ones_own, metrics=[a_loss_of_ones_own])
    model.fit(X, np.zeros((32, 3)), verbose=0)
    quantized = calibrated(model)
    np.testing.assert_array_equal(outputs_of(strip(quantized), [X])[0], outputs_of(model, [X])[0])


# --- islands of float


def test_islands_inside_opened_layers():
    """A pattern names a layer of the model, and so all that it becomes, or one operator of those."""
    x = keras.Input((6, 4), name="x")
    y = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(x, L.Dense(3)(L.LayerNormalization(name="norm")(y)))
    for exclude in (["norm"], ["attention"], ["attention/*"], ["norm/subtract"]):
        check_layer(model, exclude=exclude, fully_integer=False, low=-1, high=1)


@pytest.mark.parametrize("exclude", ["conv", "pool", "flat", "head", "head/softmax", "*"])
def test_excluded_layers_stay_in_float(exclude):
    check_layer(small_model(), exclude=[exclude], fully_integer=False, low=-1, high=1)


def test_excluded_layer_that_does_nothing_at_inference():
    """Dropout in float, in training, widens what comes after it; the file has no operator to change the grid."""
    quantized = calibrated(exclude=["drop"])
    quantized(X, training=True)
    for quantizer in quantized.quantizers.values():
        if "drop" in quantizer.members:
            quantizer.set_range("drop", 0, 9)
    assert verify(quantized, convert(quantized), X).passed


def test_two_islands_in_a_row():
    """Between float operators nothing saturates, so a bounded ReLU must really be bounded in the file."""
    model = sequential(
        L.Conv2D(4, 1, name="a"), L.ReLU(0.25, name="b"), L.Conv2D(4, 1, name="c"), L.MaxPooling2D(1),
        L.ReLU(0.1, name="d"), L.ReLU(6.0, name="e"), shape=(8, 8, 3),
    )  # fmt: skip
    give_trained_weights(model)
    quantized = calibrated(model, exclude=["*"])
    np.testing.assert_allclose(Session(convert(quantized)).predict(X), model(X), rtol=1e-4, atol=1e-5)


def test_float_tensors_are_not_requantized():
    """QUANTIZE makes integers: from float to float it is no operator of the runtime."""
    content = convert(calibrated(merged_model(), exclude=["concat"]))
    file = flatbuffer.read(content)
    made = [file.tensors[op.outputs[0]].dtype for op in file.operators if op.name == "QUANTIZE"]
    assert set(made) == {"int8"}


def merged_model():
    x = keras.Input((8, 8, 3), name="x")
    a = L.Conv2D(4, 3, padding="same", activation="relu", name="a")(x)
    b = L.Conv2D(4, 1, activation="sigmoid", name="b")(x)
    c = L.Concatenate(name="concat")([L.Multiply(name="product")([a, b]), b])
    return keras.Model(x, [L.Conv2D(2, 1, name="c")(c), L.GlobalAveragePooling2D(name="mean")(c)])


@pytest.mark.parametrize("exclude", [["a"], ["b"], ["product"], ["concat"], ["c"], ["mean"], ["a", "product"], ["*"]])
def test_islands_between_branches(exclude):
    check_layer(merged_model(), exclude=exclude, fully_integer=False, low=-1, high=1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Conv2D(4, 3, activation="relu6", name="float"),
        lambda: L.DepthwiseConv2D(3, 2, name="float"),
        lambda: L.Conv2DTranspose(4, 3, 2, activation="relu", name="float"),
        lambda: L.Dense(4, activation="swish", name="float"),
        lambda: L.ReLU(0.25, name="float"),
        lambda: L.LeakyReLU(name="float"),
        lambda: L.Softmax(name="float"),
        lambda: L.Activation("hard_swish", name="float"),
        lambda: L.AveragePooling2D(2, name="float"),
        lambda: L.GlobalMaxPooling2D(keepdims=True, name="float"),
        lambda: L.ZeroPadding2D(1, name="float"),
        lambda: L.Cropping2D(1, name="float"),
        lambda: L.Permute((2, 1, 3), name="float"),
        lambda: L.UpSampling2D(2, interpolation="bilinear", name="float"),
        lambda: L.BatchNormalization(name="float"),
    ],
)
def test_every_kind_of_island(layer):
    model = sequential(L.Conv2D(4, 1), L.MaxPooling2D(1), layer(), L.Conv2D(3, 1), shape=(8, 8, 3))
    check_layer(model, exclude=["float"], fully_integer=False, low=-1, high=1)


def test_island_whose_output_both_kinds_read():
    """A float tensor that an integer and a float operator read: both see what the file gives them."""
    x = keras.Input((8, 8, 3), name="x")
    a = L.Conv2D(4, 1, name="a")(x)
    model = keras.Model(x, [L.Conv2D(2, 1, name="integer")(a), L.Conv2D(2, 1, name="float")(a), a])
    give_trained_weights(model)
    quantized = calibrated(model, exclude=["a", "float"])
    session = Session(convert(quantized, output_type="float32"))
    for simulated, real in zip(quantized(X), session.dequantize(session.predict([X])), strict=True):
        np.testing.assert_allclose(simulated, real, rtol=1e-4, atol=1e-5)


# --- annotate and apply


def test_annotated_layers_are_quantized_and_no_others():
    model = sequential(
        L.Conv2D(4, 3, name="float"), quantize_annotate_layer(L.Conv2D(4, 3, activation="relu", name="integer")),
        quantize_annotate_layer(L.Flatten(name="flat")), L.Dense(3, name="head"), shape=(8, 8, 3),
    )  # fmt: skip
    quantized = quantize_apply(model)
    assert {op.name for op in quantized.plan.operators if op.quantized} == {"integer", "flat"}
    calibrate(quantized, X)
    assert not flatbuffer.inspect(convert(quantized)).fully_integer
    assert rms(quantized(X) - model(X)) < 0.05 * rms(model(X))


def test_annotated_layer_computes_the_same():
    model = small_model()
    annotated = quantize_annotate_model(model)
    np.testing.assert_array_equal(annotated(X), model(X))
    assert model.layers[0].name == "conv", "the model itself is not annotated"
    assert len(annotated.trainable_variables) == len(model.trainable_variables)


def test_annotated_model_is_quantized_whole():
    model = small_model()
    quantized = quantize_apply(quantize_annotate_model(model))
    assert quantized.plan == quantize_model(model).plan
    for got, expected in zip(quantized.get_weights(), quantize_model(model).get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_annotated_functional_model_with_branches_and_a_nested_model():
    x = keras.Input((8, 8, 3), name="x")
    inner = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(4, 1, name="c"), L.ReLU(name="r")], name="inner")
    a = L.Conv2D(4, 3, padding="same", name="a")(x)
    model = keras.Model(x, L.Add(name="sum")([inner(a), a, inner(inner(a))]), name="model")
    give_trained_weights(model)
    quantized = quantize_apply(quantize_annotate_model(model), input_range=(-1, 1))
    assert all(op.quantized for op in quantized.plan.operators)
    calibrate(quantized, X)
    assert rms(quantized(X) - model(X)) < 0.05 * rms(model(X))


def test_annotations_survive_saving(tmp_path):
    annotated = quantize_annotate_model(small_model())
    annotated.save(tmp_path / "annotated.keras")
    loaded = keras.models.load_model(tmp_path / "annotated.keras")
    assert quantize_apply(loaded).plan == quantize_apply(annotated).plan


def test_unmarked_layers_that_vanish():
    model = sequential(quantize_annotate_layer(L.Conv2D(4, 3)), L.Activation("linear"), shape=(8, 8, 3))
    assert all(op.quantized for op in quantize_apply(model).plan.operators)


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda: quantize_apply(small_model()), "no annotated layer"),
        (lambda: quantize_annotate_layer(small_model()), "quantize_annotate_model"),
    ],
)
def test_annotation_mistakes(misuse, message):
    with pytest.raises(ModelError, match=message):
        misuse()


def test_simulation_of_a_shared_layer_has_its_own_ranges(tmp_path):
    """Each call of a shared layer is observed for itself, also after a reload."""
    x = keras.Input((8, 8, 3), name="x")
    shared = L.Conv2D(3, 1, name="shared")
    quantized = calibrated(keras.Model(x, shared(L.ReLU(name="mid")(shared(x)))))
    assert np.any(quantized.quantizers["shared@2"].ranges() != quantized.quantizers["mid"].ranges())
    assert len(quantized.trainable_variables) == 2
    quantized.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    np.testing.assert_array_equal(loaded(X), quantized(X))
