"""Whole architectures: Keras's own, models written here, and files that nobody here made.

    model, samples = ARCHITECTURES["MobileNetV3Small"].load()

Random weights say nothing about quantization when activations grow or die with depth, so `give_trained_statistics`
leaves every model as training would: offsets away from zero, BatchNormalization with the statistics of its data.
Inputs are as small as the architecture takes.  MLPerf Tiny's files lie in the folder named by MOBILEQAT_DATA.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import layers as L
from keras import ops

from mobileqat.models import build_model

SAMPLES = 16

# Embeddings as training leaves them: far enough from each other to matter beside biases.
UNLIKE = keras.initializers.RandomNormal(stddev=0.5, seed=0)

KERAS, WRITTEN, MLPERF = "keras.applications", "written for the tests", "MLPerf Tiny"


@dataclass(frozen=True)
class Architecture:
    """One model with data to calibrate and compare it on.

    Args:
        source: where it is from: `KERAS`, `WRITTEN` or `MLPERF`.
        build: gives the float model, trained or not.
        make_samples: gives real values, one array [n, ...] per input of the model.
        input_range: what `quantize_model` is told about the input; None where only data can tell.
        is_trained: its weights are left as they are.
        until: a layer that has seen every kind of block: as far as everyday tests go. None where they take it all.
    """

    source: str
    build: Callable[[], keras.Model]
    make_samples: Callable[[keras.Model], list[np.ndarray]]
    input_range: tuple[float, float] | None = None
    is_trained: bool = False
    until: str | None = None

    def load(self, *, whole: bool = True) -> tuple[keras.Model, list[np.ndarray]]:
        """The float model as training leaves it, and its samples; the same in every run.

        Args:
            whole: False stops after the layer `until`, where there is one.
        """
        keras.backend.clear_session(free_memory=False)  # so that layers get the same names
        keras.utils.set_random_seed(0)
        model = self.build()
        if self.until is not None and not whole:
            model = keras.Model(model.input, model.get_layer(self.until).output, name=model.name)
        samples = self.make_samples(model)
        if not self.is_trained:
            give_trained_statistics(model, samples)
        return model, samples

    @property
    def is_available(self) -> bool:
        """Whether its files are here."""
        return self.source != MLPERF or "MOBILEQAT_DATA" in os.environ


# ------------------------------------------------------------------ weights as training leaves them


def give_trained_statistics(model: keras.Model, samples: list[np.ndarray], seed: int = 0) -> None:
    """Random scales and offsets, then BatchNormalization statistics as `samples` produce them, layer by layer.

    In training mode each normalization sees the batch normalized by those before it, so with a momentum of zero one
    pass leaves statistics that fit each other, however deep the model is.

    Args:
        model: float, of any nesting; it is changed.
        samples: real values, one array [n, ...] per input.
    """
    rng = np.random.default_rng(seed)
    layers = list(dict.fromkeys(model._flatten_layers(include_self=False)))
    for layer in layers:  # by attribute: a layer need not give its variables a name
        for name in ("gamma", "beta", "bias"):
            variable = getattr(layer, name, None)
            if not isinstance(variable, keras.Variable):
                continue
            if name == "gamma":
                variable.assign(rng.normal(1, 0.2, variable.shape) * rng.choice([1, 1, 1, -1], variable.shape))
            else:
                variable.assign(variable + rng.normal(0, 0.2, variable.shape))
    replaced = {"momentum": 0.0, "rate": 0.0, "drop_path_rate": 0.0}
    before = [(layer, name, getattr(layer, name)) for layer in layers for name in replaced if hasattr(layer, name)]
    for layer, name, _ in before:
        setattr(layer, name, replaced[name])
    run(model, samples, training=True)
    for layer, name, value in before:
        setattr(layer, name, value)


def run(model: keras.Model, samples: list[np.ndarray], training: bool = False) -> list[np.ndarray]:
    """Outputs of one eager call, flat: tracing a network of hundreds of operators takes far longer than running it."""
    outputs = model(keras.tree.pack_sequence_as(model.input, samples), training=training)
    return [np.asarray(output) for output in keras.tree.flatten(outputs)]


# ------------------------------------------------------------------ data


def pixels(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth random pictures with some grain, 0 to 255 [n, height, width, channels]."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (count, 5, 5, channels))
    smooth = np.asarray(ops.image.resize(coarse, (height, width), interpolation="bicubic"))
    return np.clip(np.round(smooth + rng.normal(0, 8, smooth.shape)), 0, 255).astype(np.float32)


def images(preprocess: Callable[[np.ndarray], np.ndarray] = np.asarray, count: int = SAMPLES):
    """Pictures in the model's size, as the model wants them."""

    def make(model: keras.Model) -> list[np.ndarray]:
        return [np.asarray(preprocess(pixels(count, *model.input_shape[1:])), np.float32)]

    return make


def to_minus_one_one(x: np.ndarray) -> np.ndarray:
    return x / 127.5 - 1


def to_zero_one(x: np.ndarray) -> np.ndarray:
    return x / 255


def subtract_mean(x: np.ndarray) -> np.ndarray:
    """What networks ported from Caffe were trained on: BGR less the mean colour of ImageNet."""
    return x[..., ::-1] - np.array([103.939, 116.779, 123.68])


def standardize(x: np.ndarray) -> np.ndarray:
    """What networks ported from PyTorch were trained on."""
    return (x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


def waveforms(model: keras.Model) -> list[np.ndarray]:
    """Two decaying tones each, with noise, -1 to 1 [n, time, 1]."""
    rng = np.random.default_rng(1)
    time = np.arange(model.input_shape[1]) / 8000
    frequency = rng.uniform(80, 2000, (SAMPLES, 2, 1))
    tones = np.sin(2 * np.pi * frequency * time) * np.exp(-rng.uniform(0, 20, (SAMPLES, 2, 1)) * time)
    return [
        np.clip(0.45 * tones.sum(1) + rng.normal(0, 0.02, (SAMPLES, len(time))), -1, 1)[..., None].astype("float32")
    ]


def spectrograms(model: keras.Model) -> list[np.ndarray]:
    """Cepstra like those of keyword spotting: the first coefficient is large, the others decay."""
    rng = np.random.default_rng(1)
    decay = np.linspace(20, 2, model.input_shape[2])[:, None]
    return [(rng.normal(0, 1, (SAMPLES, *model.input_shape[1:])) * decay).astype(np.float32)]


def tokens(vocabulary: int):
    """Whole numbers below `vocabulary`, int32 [n, length]; small ones are frequent, as words are."""

    def make(model: keras.Model) -> list[np.ndarray]:
        drawn = np.random.default_rng(1).zipf(1.3, (SAMPLES, *model.input_shape[1:]))
        return [np.minimum(drawn, vocabulary - 1).astype(np.int32)]

    return make


# ------------------------------------------------------------------ written here: convolutions


def convolve(x, filters: int, kernel: int = 3, strides: int = 1):
    x = L.Conv2D(filters, kernel, strides, "same", use_bias=False)(x)
    return L.ReLU()(L.BatchNormalization()(x))


def separable(x, filters: int, strides: int = 1):
    x = L.DepthwiseConv2D(3, strides, "same", use_bias=False)(x)
    x = L.ReLU(6.0)(L.BatchNormalization()(x))
    return convolve(x, filters, 1)


def unet() -> keras.Model:
    """Segmentation: three levels with skips, transposed convolutions on the way up."""
    x = inputs = keras.Input((32, 32, 3), name="image")
    skips = []
    for filters in (8, 16, 32):
        x = convolve(convolve(x, filters), filters)
        skips.append(x)
        x = L.MaxPooling2D()(x)
    x = L.Dropout(0.3)(convolve(x, 64))
    for filters, skip in zip((32, 16, 8), reversed(skips), strict=True):
        x = L.Conv2DTranspose(filters, 2, 2)(x)
        x = convolve(convolve(L.Concatenate()([x, skip]), filters), filters)
    return keras.Model(inputs, L.Conv2D(1, 1, activation="sigmoid", name="mask")(x), name="unet")


def _detector_heads(classes: int = 4, anchors: int = 3):
    """Feature maps of three scales, and the box and class predictions on each."""
    inputs = keras.Input((64, 64, 3), name="image")
    x = convolve(inputs, 8, strides=2)
    scales = []
    for filters in (16, 24, 32, 48):
        x = separable(separable(x, filters, strides=2), filters)
        scales.append(x)
    boxes = [L.Conv2D(anchors * 4, 3, padding="same")(scale) for scale in scales[1:]]
    scores = [L.Conv2D(anchors * classes, 3, padding="same")(scale) for scale in scales[1:]]
    boxes = [L.Reshape((-1, 4))(tensor) for tensor in boxes]
    return inputs, boxes, [L.Reshape((-1, classes))(tensor) for tensor in scores]


def ssd() -> keras.Model:
    """Detector: all anchors of all scales in one output each for boxes and class scores."""
    inputs, boxes, scores = _detector_heads()
    boxes = L.Concatenate(axis=1, name="boxes")(boxes)
    scores = L.Softmax(name="scores")(L.Concatenate(axis=1)(scores))
    return keras.Model(inputs, [boxes, scores], name="ssd")


def ssd_dict() -> keras.Model:
    """Detector whose outputs are a dict of dicts, one entry per scale, with scores from a sigmoid."""
    inputs, boxes, scores = _detector_heads()
    outputs = {
        "boxes": {f"scale_{index}": tensor for index, tensor in enumerate(boxes)},
        "scores": {f"scale_{index}": ops.sigmoid(tensor) for index, tensor in enumerate(scores)},
    }
    return keras.Model(inputs, outputs, name="ssd_dict")


def autoencoder() -> keras.Model:
    """Two models in a third: the decoder mirrors the encoder."""
    encoder = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            L.Conv2D(8, 3, 2, "same", activation="relu", kernel_initializer="he_normal"),
            L.Conv2D(16, 3, 2, "same", activation="relu", kernel_initializer="he_normal"),
            L.Flatten(),
            L.Dense(16, kernel_initializer="he_normal", name="code"),
        ],
        name="encoder",
    )
    decoder = keras.Sequential(
        [
            keras.Input((16,)),
            L.Dense(7 * 7 * 16, activation="relu", kernel_initializer="he_normal"),
            L.Reshape((7, 7, 16)),
            L.Conv2DTranspose(16, 3, 2, "same", activation="relu", kernel_initializer="he_normal"),
            L.UpSampling2D(2, interpolation="bilinear"),
            L.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ],
        name="decoder",
    )
    inputs = keras.Input((28, 28, 1), name="image")
    return keras.Model(inputs, decoder(encoder(inputs)), name="autoencoder")


def _super_resolution(name: str, depth_to_space: Callable) -> keras.Model:
    """ESPCN: convolutions at low resolution, whose channels become pixels at the end, added to a plain resize."""
    x = inputs = keras.Input((16, 16, 3), name="image")
    for filters in (16, 16):
        x = L.Conv2D(filters, 3, padding="same", activation="tanh")(x)
    x = depth_to_space(L.Conv2D(3 * 2 * 2, 3, padding="same")(x), 2)
    x = ops.clip(x + L.UpSampling2D(2, interpolation="bilinear")(inputs), 0.0, 1.0)
    return keras.Model(inputs, x, name=name)


def _depth_to_space(x, block: int):
    """[n, h, w, block * block * c] to [n, block * h, block * w, c] by operators that every backend has."""
    _, height, width, channels = x.shape
    depth = channels // block**2
    x = ops.reshape(x, (-1, height, width, block, block, depth))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height * block, width * block, depth))


def super_resolution() -> keras.Model:
    return _super_resolution("super_resolution", _depth_to_space)


def super_resolution_operator() -> keras.Model:
    return _super_resolution("super_resolution_operator", ops.nn.depth_to_space)


def waveform_cnn() -> keras.Model:
    """Sound events from samples: a wide strided convolution, then separable and dilated ones."""
    x = inputs = keras.Input((2000, 1), name="waveform")
    x = L.Conv1D(16, 40, 8, "same", use_bias=False)(x)
    x = L.MaxPooling1D(4)(L.ReLU()(L.BatchNormalization()(x)))
    x = L.SeparableConv1D(32, 5, padding="same", activation="relu")(x)
    skip = x
    x = L.Conv1D(32, 3, dilation_rate=2, padding="same")(x)
    x = L.Add()([L.LeakyReLU(negative_slope=0.1)(L.BatchNormalization()(x)), skip])
    x = L.AveragePooling1D(2)(L.Conv1D(32, 3, padding="causal", activation="elu")(x))
    x = L.Dropout(0.2)(L.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, L.Dense(10, activation="softmax")(x), name="waveform_cnn")


def ds_cnn() -> keras.Model:
    """Keywords from cepstra, as MLPerf Tiny has it."""
    return build_model("dscnn", (49, 10, 1), 12)


# ------------------------------------------------------------------ written here: attention


@keras.saving.register_keras_serializable("mobileqat_zoo")
class Positions(L.Layer):
    """Adds a learned vector to each place of a sequence [n, length, width]."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer=UNLIKE, name="table")

    def call(self, x):
        return x + self.table


@keras.saving.register_keras_serializable("mobileqat_zoo")
class ClassToken(L.Layer):
    """Puts one learned vector before a sequence: [n, length, width] to [n, length + 1, width]."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer=UNLIKE, name="token")

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
        return ops.concatenate([token, x], axis=1)


@keras.saving.register_keras_serializable("mobileqat_zoo")
class TokenAndPosition(L.Layer):
    """Sum of a token's embedding and its place's, int [n, length] to [n, length, width]."""

    def __init__(self, length: int, vocabulary: int, width: int, **kwargs):
        super().__init__(**kwargs)
        self.length, self.vocabulary, self.width = length, vocabulary, width
        self.tokens = L.Embedding(vocabulary, width, embeddings_initializer=UNLIKE)
        self.places = L.Embedding(length, width, embeddings_initializer=UNLIKE)

    def build(self, shape):
        self.tokens.build(shape)
        self.places.build((self.length,))

    def call(self, x):
        return self.tokens(x) + self.places(ops.arange(self.length))

    def get_config(self):
        return super().get_config() | {"length": self.length, "vocabulary": self.vocabulary, "width": self.width}


@keras.saving.register_keras_serializable("mobileqat_zoo")
class TransformerBlock(L.Layer):
    """Attention, then two dense layers, each with a skip and normalized after (Vaswani et al. 2017)."""

    def __init__(self, heads: int, width: int, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width, self.hidden = heads, width, hidden
        self.attention = L.MultiHeadAttention(heads, width // heads)
        self.feed_forward = keras.Sequential([L.Dense(hidden, activation="relu"), L.Dense(width)])
        self.norms = [L.LayerNormalization(epsilon=1e-6), L.LayerNormalization(epsilon=1e-6)]
        self.dropouts = [L.Dropout(0.1), L.Dropout(0.1)]

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in (self.feed_forward, *self.norms):
            layer.build(shape)

    def call(self, x, training=None):
        attended = self.dropouts[0](self.attention(x, x), training=training)
        x = self.norms[0](x + attended)
        return self.norms[1](x + self.dropouts[1](self.feed_forward(x), training=training))

    def get_config(self):
        return super().get_config() | {"heads": self.heads, "width": self.width, "hidden": self.hidden}


def _encode(x, heads: int, hidden: int):
    """A transformer block that normalizes first, out of plain layers and operators (Dosovitskiy et al. 2021)."""
    normalized = L.LayerNormalization(epsilon=1e-6)(x)
    x = x + L.MultiHeadAttention(heads, x.shape[-1] // heads, dropout=0.1)(normalized, normalized)
    y = L.Dense(hidden, activation="gelu")(L.LayerNormalization(epsilon=1e-6)(x))
    return x + L.Dense(x.shape[-1])(L.Dropout(0.1)(y))


def _vision_transformer(name: str, pool: Callable, *tokens) -> keras.Model:
    inputs = keras.Input((32, 32, 3), name="image")
    x = L.Conv2D(32, 8, 8, name="patches")(inputs)
    x = L.Reshape((16, 32))(x)
    for layer in (*tokens, Positions()):
        x = layer(x)
    for _ in range(2):
        x = _encode(x, heads=4, hidden=64)
    x = pool(L.LayerNormalization(epsilon=1e-6)(x))
    return keras.Model(inputs, L.Dense(10, activation="softmax")(x), name=name)


def vit() -> keras.Model:
    return _vision_transformer("vit", L.GlobalAveragePooling1D())


def vit_class_token() -> keras.Model:
    return _vision_transformer("vit_class_token", lambda x: x[:, 0], ClassToken())


def text_transformer() -> keras.Model:
    """Text classification from whole numbers, with layers that contain layers."""
    inputs = keras.Input((24,), dtype="int32", name="tokens")
    x = TokenAndPosition(24, 200, 32)(inputs)
    x = TransformerBlock(heads=2, width=32, hidden=64)(x)
    x = L.Dense(20, activation="relu")(L.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, L.Dense(2, activation="softmax")(L.Dropout(0.1)(x)), name="text_transformer")


# ------------------------------------------------------------------ files nobody here made


class _Keras2DepthwiseConv2D(L.DepthwiseConv2D):
    """Reads configurations of Keras 2, which stored a number of groups that depthwise layers do not have."""

    @classmethod
    def from_config(cls, config):
        return L.DepthwiseConv2D.from_config({key: value for key, value in config.items() if key != "groups"})


def _file(path: str) -> Callable[[], keras.Model]:
    def load() -> keras.Model:
        return keras.models.load_model(
            _data_folder() / "mlperf-tiny/models" / path,
            custom_objects={"DepthwiseConv2D": _Keras2DepthwiseConv2D},
            compile=False,
        )

    return load


def _data_folder() -> Path:
    return Path(os.environ["MOBILEQAT_DATA"])


def _stored(path: str, name: str):
    def make(model: keras.Model) -> list[np.ndarray]:
        with np.load(_data_folder() / "mlperf-tiny" / path) as file:
            return [file[name][:SAMPLES].astype(np.float32)]

    return make


def _mel_energies(model: keras.Model) -> list[np.ndarray]:
    """Five frames of 128 mel bands in decibels, as the anomaly detector hears machines: loud low, quiet high."""
    rng = np.random.default_rng(1)
    bands = np.linspace(-10, -45, 128) + rng.normal(0, 4, (SAMPLES, 1, 128))
    return [(bands + rng.normal(0, 3, (SAMPLES, 5, 128))).reshape(SAMPLES, 640).astype(np.float32)]


# ------------------------------------------------------------------ the table


def _application(name: str, size: int, preprocess=np.asarray, input_range=None, until=None) -> Architecture:
    def build() -> keras.Model:
        return getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)

    return Architecture(KERAS, build, images(preprocess), input_range, until=until)


_UNIT, _BYTE, _SIGNED = (0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)

ARCHITECTURES: dict[str, Architecture] = {
    "MobileNet": _application("MobileNet", 32, to_minus_one_one, _SIGNED, until="conv_pw_6_relu"),
    "MobileNetV2": _application("MobileNetV2", 32, to_minus_one_one, _SIGNED, until="block_5_add"),
    "MobileNetV3Small": _application("MobileNetV3Small", 32, input_range=_BYTE, until="expanded_conv_5_add"),
    "MobileNetV3Large": _application("MobileNetV3Large", 32, input_range=_BYTE, until="expanded_conv_5_add"),
    "EfficientNetB0": _application("EfficientNetB0", 32, input_range=_BYTE, until="block3b_add"),
    "EfficientNetV2B0": _application("EfficientNetV2B0", 32, input_range=_BYTE, until="block4b_add"),
    "NASNetMobile": _application("NASNetMobile", 32, to_minus_one_one, _SIGNED, until="reduction_concat_stem_2"),
    "DenseNet121": _application("DenseNet121", 32, standardize, until="conv3_block2_concat"),
    "ResNet50": _application("ResNet50", 32, subtract_mean, until="conv3_block1_out"),
    "ResNet50V2": _application("ResNet50V2", 32, to_minus_one_one, _SIGNED, until="conv3_block1_out"),
    "InceptionV3": _application("InceptionV3", 75, to_minus_one_one, _SIGNED, until="mixed4"),
    "Xception": _application("Xception", 71, to_minus_one_one, _SIGNED, until="block4_sepconv1_act"),
    "VGG16": _application("VGG16", 32, subtract_mean, until="block3_pool"),
    "ConvNeXtTiny": _application(
        "ConvNeXtTiny", 32, input_range=_BYTE, until="convnext_tiny_stage_1_block_1_layernorm"
    ),
    "U-Net": Architecture(WRITTEN, unet, images(to_zero_one), _UNIT),
    "SSD": Architecture(WRITTEN, ssd, images(to_minus_one_one), _SIGNED),
    "SSD, dict outputs": Architecture(WRITTEN, ssd_dict, images(to_minus_one_one), _SIGNED),
    "ViT, mean": Architecture(WRITTEN, vit, images(to_minus_one_one), _SIGNED),
    "ViT, class token": Architecture(WRITTEN, vit_class_token, images(to_minus_one_one), _SIGNED),
    "DS-CNN": Architecture(WRITTEN, ds_cnn, spectrograms),
    "waveform CNN": Architecture(WRITTEN, waveform_cnn, waveforms, _SIGNED),
    "text transformer": Architecture(WRITTEN, text_transformer, tokens(200)),
    "autoencoder": Architecture(WRITTEN, autoencoder, images(to_zero_one), _UNIT),
    "super-resolution": Architecture(WRITTEN, super_resolution, images(to_zero_one), _UNIT),
    "super-resolution, DepthToSpace": Architecture(WRITTEN, super_resolution_operator, images(to_zero_one), _UNIT),
    "ic01": Architecture(MLPERF, _file("ic01/pretrainedResnet.h5"), _stored("npz/ic01.npz", "x"), _BYTE, True),
    "vww01": Architecture(MLPERF, _file("vww01/vww_96.h5"), images(to_zero_one), _UNIT, True),
    "ad01": Architecture(MLPERF, _file("ad01/ad01.h5"), _mel_energies, None, True),
    "sww01": Architecture(
        MLPERF,
        _file("sww01/str_ww_ref_model.h5"),
        _stored("models/sww01/calibration_samples.npz", "specs"),
        None,
        True,
    ),
}
