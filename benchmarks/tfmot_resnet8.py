"""TFMOT's QAT of a `.h5` ResNet8, for `resnet8.py`: runs in a Python of its own, since TFMOT needs Keras 2.

    python tfmot_resnet8.py RESNET8.h5 DATA.npz OUT_FOLDER STEPS SEED

Leaves OUT_FOLDER/tfmot.tflite and OUT_FOLDER/tfmot.npz (the simulation's outputs on the test set).
"""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras


def main(weights: str, data: str, folder: str, steps: int, seed: int) -> None:
    tf_keras.utils.set_random_seed(seed)
    arrays = np.load(data)
    model = tfmot.quantization.keras.quantize_model(tf_keras.models.load_model(weights, compile=False))
    model.compile(tf_keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy")
    order = np.random.default_rng(seed).permutation(len(arrays["x_train"]))[: steps * 64]
    # TFMOT has no calibration: its ranges start at +-6 and only training moves them.
    model.fit(arrays["x_train"][order], arrays["y_train"][order], batch_size=64, verbose=0)
    np.savez(os.path.join(folder, "tfmot.npz"), simulation=model.predict(arrays["x_test"], verbose=0))
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with open(os.path.join(folder, "tfmot.tflite"), "wb") as file:
        file.write(converter.convert())


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))
