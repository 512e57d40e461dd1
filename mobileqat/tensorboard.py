"""What TensorBoard shows of a training beside its metrics: the graph, histograms of weights, ranges of activations.

graph                        a quantized model's plan: LiteRT operators with shapes, and grids as training finds them
weights/OPERATOR             trained weights, after every epoch
integers/OPERATOR            the integers that they are in the file
ranges/TENSOR/low, high      ends of an activation's grid, real values
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mobileqat.quantize import QuantizedModel
from mobileqat.rules import GONE


class TensorSummaries(keras.callbacks.Callback):
    """Writes summaries of a model's tensors to a run of its own, `tensors`, beside those of Keras's TensorBoard.

    Args:
        watched: float, or made by `quantize_model`.
        log_dir: the folder of the latter.
    """

    def __init__(self, watched: keras.Model, log_dir: Path):
        super().__init__()
        self.watched = watched
        self.log_dir = log_dir
        self._writer: Any = None

    def on_train_begin(self, logs=None):
        if self._writer is not None:  # a resumed training begins twice
            return
        self._writer = tf.summary.create_file_writer(str(self.log_dir / "tensors"))
        with self._writer.as_default():
            is_quantized = isinstance(self.watched, QuantizedModel)
            tf.summary.graph(plan_graph(self.watched) if is_quantized else float_graph(self.watched))

    def on_epoch_end(self, epoch, logs=None):
        with self._writer.as_default(step=epoch):
            for path, value in self._weights().items():
                tf.summary.histogram(path, value)
            for path, value in self._ranges().items():
                tf.summary.scalar(path, value)
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.flush()

    def _weights(self) -> dict[str, np.ndarray]:
        if not isinstance(self.watched, QuantizedModel):
            return {f"weights/{v.path}": v.numpy() for v in self.watched.trainable_variables if len(v.shape) > 1}
        values = {}
        for name, wrapper in self.watched.operators.items():
            if wrapper.weight_spec is not None:
                values[f"weights/{name}"] = np.asarray(wrapper.kernel())
                values[f"integers/{name}"] = wrapper.constants()["weights"]
        return values

    def _ranges(self) -> dict[str, float]:
        if not isinstance(self.watched, QuantizedModel):
            return {}
        values = {}
        for name, quantizer in self.watched.quantizers.items():
            if quantizer.is_learned:
                values[f"ranges/{name}/low"], values[f"ranges/{name}/high"] = quantizer.ends()
        return values


def float_graph(model: keras.Model) -> tf.Graph:
    """What TensorFlow computes for a float model at inference."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs]
    function = tf.function(lambda *inputs: model(inputs if len(inputs) > 1 else inputs[0], training=False))
    return function.get_concrete_function(*specs).graph


def plan_graph(model: QuantizedModel) -> tf.compat.v1.GraphDef:
    """A quantized model's plan as a graph: one node per operator of the file, and one per input."""
    graph, plan = tf.compat.v1.GraphDef(), model.plan
    makers = {name: _node_name(name) for name in plan.inputs}
    for name in plan.inputs:
        _describe(graph.node.add(name=makers[name], op="INPUT"), model, name)
    for operator in plan.operators:
        if operator.kind == GONE:
            makers[operator.output] = makers[operator.inputs[0]]
            continue
        node = graph.node.add(name=_node_name(operator.name), op=operator.kind)
        makers[operator.output] = node.name
        node.input.extend(makers[name] for name in operator.inputs)
        _describe(node, model, operator.output)
    return graph


def _node_name(name: str) -> str:
    # A colon would stand before an output's number, a circumflex before a control input.
    return name.replace(":", "_").replace("^", "_")


def _describe(node: Any, model: QuantizedModel, tensor: str) -> None:
    planned, quantizer = model.plan.tensors[tensor], model.quantizers.get(tensor)
    node.attr["shape"].s = str(list(planned.shape)).encode()
    node.attr["type"].s = (planned.dtype if quantizer is None else f"int{quantizer.spec.bits}").encode()
    if quantizer is not None and not np.isnan(quantizer.ranges()).any():
        scale, zero_point = quantizer.grid()
        node.attr["scale"].f, node.attr["zero_point"].i = float(scale), int(zero_point)
