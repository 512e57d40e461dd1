"""Keras 2 (`tf_keras`) models: importing them into Keras 3, and TFMOT's QAT behind the same pipeline.

`tf_keras` and TFMOT are only ever imported by `worker`, a process of its own: importing TFMOT changes TensorFlow's
Keras for everyone in the process.
"""
