"""Distillation: the quantized model learns what the float model answers, and optionally what its layers compute.

loss = (1 - w) * loss(labels) + w * T**2 * KL(teacher || student at temperature T)     (Hinton et al. 2015)
     + feature_weight * mean over features of  mean((student - teacher)**2) / var(teacher)   (Romero et al. 2015)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import keras
import tensorflow as tf
from keras import ops

from mobileqat import graph as graphs
from mobileqat.calibrate import float_activations
from mobileqat.errors import ModelError
from mobileqat.lowering import expand, lower
from mobileqat.quantize import QuantizedModel, quantize_model
from mobileqat.recipe import QatTraining
from mobileqat.rules import CONSTANT, GONE, Output, function_name, get_rule


class Distillation(keras.Model):
    """Trains a student on labels, on a teacher's softened outputs, and on its features.

    Args:
        student: the model that learns.
        teacher: a float model of the same inputs and outputs, which this one keeps to itself.
        weight: of the teacher's outputs against the labels, 0 to 1.
        temperature: that softens both outputs.
        features: tensors of the student's plan, each with the tensor of the twin's that it follows.
        twin: quantized from the teacher with the student's options; its float layers give the teacher's features.
        feature_weight: of the loss between features.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        weight: float,
        temperature: float,
        features: Mapping[str, str] | None = None,
        twin: QuantizedModel | None = None,
        feature_weight: float = 1.0,
    ):
        super().__init__(name=f"distilled_{student.name}")
        self.student = student
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.features = dict(features or {})
        self.twin = twin
        self.feature_weight = feature_weight
        for model in (teacher, twin):
            if model is not None:
                model.trainable = False
        self.student_log_probabilities = _log_probabilities(student)
        self.teacher_log_probabilities = _log_probabilities(teacher)
        self.inner = student
        if self.features:
            made = {wrapper.operator.output: wrapper.output for wrapper in student.operators.values()}
            self.inner = keras.Model(student.input, [student.outputs[0], *(made[name] for name in self.features)])
        self._computed: list = []

    def call(self, inputs, training=None):
        outputs = self.inner(inputs, training=training)
        if not self.features:
            return outputs
        self._computed = outputs[1:]
        return outputs[0]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        # Damping and regularizers, which are part of that loss, hold whoever is imitated.
        penalties = sum((ops.sum(penalty) for penalty in self.losses), 0.0)
        teacher = ops.log_softmax(
            self.teacher_log_probabilities(self.teacher(x, training=False)) / self.temperature, axis=-1
        )
        student = ops.log_softmax(self.student_log_probabilities(y_pred) / self.temperature, axis=-1)
        divergence = ops.mean(ops.sum(ops.exp(teacher) * (teacher - student), axis=-1))
        added = self.weight * (self.temperature**2 * divergence + penalties)
        if self.features:
            added += self.feature_weight * self._feature_loss(x)
        # Keras's own loss is a replica's share already, since the replicas' gradients are summed.
        return (1 - self.weight) * loss + added / tf.distribute.get_strategy().num_replicas_in_sync

    def _feature_loss(self, x):
        assert self.twin is not None
        wanted = float_activations(self.twin, [x])
        losses = []
        for name, computed in zip(self.features.values(), self._computed, strict=True):
            target = tf.stop_gradient(wanted[name])
            losses.append(tf.reduce_mean(tf.square(computed - target)) / (tf.math.reduce_variance(target) + 1e-6))
        return tf.add_n(losses) / len(losses)


def distilled(student: keras.Model, teacher: keras.Model, settings: QatTraining) -> keras.Model:
    """The model to train in place of `student`: itself, if the settings ask for no distillation.

    Raises:
        ModelError: a pattern of features that no layer of the student matches, or a teacher of other layers.
    """
    if not settings.distillation and not settings.distillation_features:
        return student
    copy = keras.models.clone_model(teacher)
    copy.set_weights(teacher.get_weights())
    arguments = (settings.distillation, settings.temperature)
    if not settings.distillation_features:
        return Distillation(student, copy, *arguments)
    twin = quantize_model(copy, **student._options)
    operators = [model.plan.operators for model in (student, twin)]
    if [op.kind for op in operators[0]] != [op.kind for op in operators[1]]:
        raise ModelError(
            f"The teacher '{teacher.name}' has other layers than the model that '{student.name}' is made of."
        )
    counterparts = {own.output: other.output for own, other in zip(*operators, strict=True)}
    features = {name: counterparts[name] for name in _matching(student, settings.distillation_features)}
    return Distillation(student, copy, *arguments, features, twin, settings.feature_weight)


def _matching(student: QuantizedModel, patterns: Sequence[str]) -> list[str]:
    """Tensors made by operators one of whose layers matches a pattern."""
    operators = [operator for operator in student.plan.operators if operator.kind not in (GONE, CONSTANT)]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [op.output for op in operators if any(fnmatchcase(path, pattern) for path in op.nodes)]
        if not found:
            raise ModelError(
                f"No layer of '{student.name}' matches {pattern!r} of qat.distillation_features. There are: "
                f"{', '.join(op.output for op in operators)}."
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _log_probabilities(model: keras.Model) -> Callable:
    if gives_probabilities(model):
        return lambda outputs: ops.log(ops.maximum(outputs, 1e-7))
    return lambda outputs: ops.log_softmax(outputs, axis=-1)


def gives_probabilities(model: keras.Model) -> bool:
    """Whether the model's first output comes from softmax or sigmoid; otherwise it is taken as logits.

    Layers that only move values, such as Reshape or Dropout, may follow.
    """
    if isinstance(model, QuantizedModel):
        makers = {wrapper.operator.output: wrapper for wrapper in model.operators.values()}
        name = model.plan.outputs[0]
        # By the rule: the plan gives an operator in float a grid of its own, also one that only moves values.
        while name in makers and (makers[name].operator.kind == GONE or makers[name].rule.output is Output.SHARED):
            name = makers[name].operator.inputs[0]
        return name in makers and makers[name].operator.kind in ("SOFTMAX", "LOGISTIC")
    try:
        graph = lower(graphs.read(model, expand))
    except ModelError:
        return _ends_in_probabilities(model)
    nodes = {node.path: node for node in graph.nodes}
    name = graph.outputs[0]
    while name in nodes and get_rule(nodes[name].layer).output is Output.SHARED:
        name = nodes[name].inputs[0]
    return name in nodes and get_rule(nodes[name].layer).operator in ("SOFTMAX", "LOGISTIC")


def _ends_in_probabilities(layer) -> bool:
    """For a model that cannot be lowered, or not without its sizes: whether its last layer is softmax or sigmoid."""
    if isinstance(layer, keras.Model):
        return _ends_in_probabilities(layer.layers[-1])
    function = function_name(getattr(layer, "activation", None))
    return isinstance(layer, keras.layers.Softmax) or function in ("softmax", "sigmoid")
