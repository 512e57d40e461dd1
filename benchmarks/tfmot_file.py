"""TFMOT's int8 file of a model, for `arm_instructions.py`: in a Python of its own, since TFMOT needs Keras 2.

    python tfmot_file.py MODEL.h5 SAMPLES.npy OUT.tflite

MODEL.h5 may also be `mobilenet_v2`: that architecture with random weights and 10 classes, in the samples' size. A few
training steps set the ranges, to classes drawn at random: how many instructions a file takes does not depend on them.
"""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras


def main(source: str, samples: str, target: str) -> None:
    tf_keras.utils.set_random_seed(0)
    x = np.load(samples, allow_pickle=False)
    if source == "mobilenet_v2":
        model = tf_keras.applications.MobileNetV2(weights=None, input_shape=x.shape[1:], classes=10)
    else:
        model = tf_keras.models.load_model(source, compile=False)
    quantized = tfmot.quantization.keras.quantize_model(model)
    quantized.compile(tf_keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
    quantized.fit(x, np.random.default_rng(0).integers(0, 10, len(x)), batch_size=16, verbose=0)
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with open(target, "wb") as file:
        file.write(converter.convert())


if __name__ == "__main__":
    main(*sys.argv[1:])
