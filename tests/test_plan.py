"""Which layers become one operator, and which tensors share a grid."""

import json

import keras
import numpy as np
import pytest
from contract import sequential
from keras import layers as L
from keras import ops

from mobileqat.errors import MobileQatError
from mobileqat.graph import read
from mobileqat.lowering import expand, lower
from mobileqat.plan import make_plan
from mobileqat.quantize import quantize_model
from mobileqat.rules import CONSTANT, GONE, Output
from mobileqat.schemes import QuantSpec, get_scheme


def plan_of(model, exclude=(), pinned=()):
    return make_plan(lower(read(model, expand), pinned), get_scheme("w8a8"), exclude)


def small_model():
    return sequential(
        L.Conv2D(4, 3, name="conv"), L.BatchNormalization(name="norm"), L.ReLU(6.0, name="relu"),
        L.MaxPooling2D(name="pool"), L.Dropout(0.5, name="drop"), L.Flatten(name="flat"),
        L.Dense(3, activation="softmax", name="head"),
    )  # fmt: skip


def test_fusion():
    plan = plan_of(small_model())
    assert [(op.kind, op.nodes, op.fused_activation) for op in plan.operators] == [
        ("CONV_2D", ("conv", "norm", "relu"), "RELU6"),
        ("MAX_POOL_2D", ("pool",), "NONE"),
        (GONE, ("drop",), "NONE"),
        ("RESHAPE", ("flat",), "NONE"),
        ("FULLY_CONNECTED", ("head",), "NONE"),
        ("SOFTMAX", ("head/softmax",), "NONE"),
    ]
    first = plan.operators[0]
    assert (first.batch_norm, first.activation, first.output) == ("norm", "relu", "relu")


def test_sharing():
    plan = plan_of(small_model())
    assert {plan.tensors[name].group for name in ("relu", "pool", "drop", "flat")} == {"relu"}
    assert plan.members("relu") == ["relu"]
    assert plan.tensors["head/softmax"].output is Output.FIXED
    assert plan.tensors["head/softmax"].fixed == (1 / 256, -128)
    assert all(tensor.spec == QuantSpec(8) for tensor in plan.tensors.values())
    assert plan.tensors["flat"].shape == (36,)


def test_concatenation_joins_all_its_inputs():
    x = keras.Input((4, 4, 3), name="x")
    a, b = L.Conv2D(3, 1, name="a")(x), L.Conv2D(3, 1, name="b")(x)
    plan = plan_of(keras.Model(x, L.Concatenate(name="all")([a, L.MaxPooling2D(1, name="p")(b), a])))
    group = plan.tensors["all"].group
    assert sorted(plan.members(group)) == ["a", "b"]
    assert plan.tensors["x"].group != group


@pytest.mark.parametrize(
    "build",
    [
        lambda a: [L.ReLU(name="relu")(a), a],
        lambda a: L.Add(name="sum")([L.ReLU(name="relu")(a), a]),
        lambda a: L.ReLU(name="relu")(L.MaxPooling2D()(a)),
    ],
    ids=["output", "read twice", "after a pool"],
)
def test_what_may_not_fuse(build):
    x = keras.Input((4, 4, 3))
    plan = plan_of(keras.Model(x, build(L.Conv2D(3, 1, name="conv")(x))))
    assert ("relu",) in [op.nodes for op in plan.operators]


@pytest.mark.parametrize(
    "max_value, fused", [(None, ["RELU"]), (6, ["RELU6"]), (6.0, ["RELU6"]), (1.0, ["RELU", "NONE"])]
)
def test_fused_activations(max_value, fused):
    plan = plan_of(sequential(L.Conv2D(3, 1), L.ReLU(max_value)))
    assert [op.fused_activation for op in plan.operators if op.kind != CONSTANT] == fused


def test_what_lowering_makes_foldable_is_folded():
    """A BatchNormalization of its own would be left out of the file."""
    for layers in ([L.Flatten(), L.BatchNormalization()], [L.ReLU(), L.BatchNormalization(), L.BatchNormalization()]):
        plan = plan_of(sequential(L.Conv2D(3, 3), *layers))
        assert not [op for op in plan.operators if op.kind == GONE]
        assert sum(op.batch_norm is not None for op in plan.operators) == len(layers) - 1


def test_shared_convolution_folds_each_batch_normalization():
    x = keras.Input((4, 4, 3))
    convolution = L.Conv2D(3, 1, name="conv")
    tensors = [L.BatchNormalization(name=f"norm{k}")(convolution(x)) for k in range(2)]
    plan = plan_of(keras.Model(x, tensors))
    assert sorted(op.batch_norm for op in plan.operators) == ["norm0", "norm1"]


@pytest.mark.parametrize(
    "exclude, kept",
    [
        (("conv",), {"conv"}),
        (("norm",), {"conv"}),
        (("head",), {"head", "head/softmax"}),
        (("head/softmax",), {"head/softmax"}),
        (("h*", "pool"), {"pool", "head", "head/softmax"}),
    ],
)
def test_exclude(exclude, kept):
    plan = plan_of(small_model(), exclude)
    assert {op.name for op in plan.operators if not op.quantized} == kept


def test_exclude_tells_which_tensors_stay_in_float():
    plan = plan_of(small_model(), ("head",))
    assert plan.tensors["head"].spec is None and plan.tensors["head"].reason == "kept in float"
    assert plan.tensors["flat"].spec is not None


def twice():
    """A convolution that is called twice, and two additions of one name."""
    x, conv = keras.Input((8, 8, 4), name="x"), L.Conv2D(4, 3, padding="same", activation="swish", name="conv")
    y = conv(conv(x))
    return keras.Model(x, (y + x) + y)


def test_patterns_take_every_call_of_a_layer():
    plan = plan_of(twice(), ("conv",))
    assert {op.name for op in plan.operators if op.quantized} == {"add", "add@2"}
    assert [op.name for op in plan_of(twice(), ("conv@2",)).operators if not op.quantized and op.kind == "CONV_2D"] == [
        "conv@2"
    ]


def test_operators_of_one_name_are_no_calls():
    plan = plan_of(twice(), ("add",))
    assert [op.name for op in plan.operators if not op.quantized] == ["add"]


def test_bits_of_every_call_of_a_layer():
    def bits(layers):
        operators = quantize_model(twice(), layers=layers).plan.operators
        return {op.name: op.weight_spec.bits for op in operators if op.weight_spec}

    assert bits({"conv": "w4a8"}) == {"conv": 4, "conv@2": 4}
    assert bits({"conv": "w4a8", "conv@2": "w2a8"}) == {"conv": 4, "conv@2": 2}


def test_exclude_must_match():
    with pytest.raises(MobileQatError, match=r"exclude='haed' matches no layer.*conv"):
        plan_of(small_model(), ("haed",))


def test_rows_for_reports():
    rows = json.loads(json.dumps(plan_of(small_model()).rows()))
    assert rows[0] == {
        "tensor": "x", "shape": [9, 9, 3], "operator": "INPUT", "layers": [], "bits": 8, "weight_bits": None,
        "parameters": "a range of its own", "shared_with": None,
    }  # fmt: skip
    assert rows[2]["tensor"] == "pool" and rows[2]["shared_with"] == "relu"
    assert rows[-1]["parameters"] == "fixed by the kernel"


# --- constants, products of activations, whole numbers


def test_constants_are_operators_without_inputs():
    x = keras.Input((4, 3), name="x")
    plan = plan_of(keras.Model(x, ops.multiply(x, 0.5)))
    constant, product = plan.operators
    assert (constant.kind, constant.inputs, constant.quantized) == (CONSTANT, (), True)
    assert product.inputs == ("x", constant.output) and plan.is_constant(constant.output)
    planned = plan.tensors[constant.output]
    assert (planned.shape, planned.has_batch, planned.dtype) == ((1, 1, 1), False, "float32")
    assert planned.output is Output.OWN and plan.members(constant.output) == [constant.output]


def test_constants_beside_activations_are_no_members():
    """A bound that values are clipped at does not widen their range."""
    x = keras.Input((4, 3), name="x")
    plan = plan_of(keras.Model(x, ops.minimum(L.Dense(3, name="dense")(x), 100.0)))
    (constant,) = [op.output for op in plan.operators if op.kind == CONSTANT]
    group = plan.tensors["dense"].group
    assert plan.tensors[constant].group == group and plan.members(group) == ["dense"]


def test_a_table_of_embeddings_has_its_own_range():
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    plan = plan_of(keras.Model(tokens, L.Embedding(7, 3, name="embedding")(tokens)))
    (table,) = [op.output for op in plan.operators if op.kind == CONSTANT]
    assert plan.tensors["tokens"].dtype == "int32" and plan.tensors["tokens"].spec is None
    assert plan.tensors["tokens"].reason == "whole numbers"
    group = plan.tensors["embedding"].group
    assert plan.members(group) == [table] and plan.tensors[table].shape == (7, 3)
    assert plan.tensors["tokens"].group != group


def test_a_shared_constant_is_one_operator():
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    embedding = L.Embedding(7, 3)
    plan = plan_of(keras.Model(tokens, [embedding(tokens), embedding(tokens)]))
    assert [op.kind for op in plan.operators] == [CONSTANT, "GATHER", "GATHER"]


def products(second):
    x = keras.Input((4, 3), name="x")
    a, b = L.Dense(3, name="a")(x), L.Dense(3, name="b")(x)
    return plan_of(keras.Model(x, ops.matmul(a, second(b))))


def test_the_right_operand_of_a_product_is_symmetric():
    plan = products(lambda b: ops.transpose(b, (0, 2, 1)))
    symmetric = {name for name, tensor in plan.tensors.items() if tensor.spec.symmetric}
    assert symmetric == {"b", "transpose"}, "what shares parameters with it, and nothing else"


def test_a_fixed_right_operand_stays_as_it_is():
    plan = products(lambda b: ops.softmax(ops.transpose(b, (0, 2, 1))))
    assert not any(tensor.spec.symmetric for tensor in plan.tensors.values())


def test_attention():
    """Keys and values are symmetric, queries and probabilities are not."""
    x = keras.Input((4, 6), name="x")
    plan = plan_of(keras.Model(x, L.MultiHeadAttention(2, 3, name="attention")(x, x)))
    products = [op for op in plan.operators if op.kind == "BATCH_MATMUL"]
    assert [[plan.tensors[name].spec.symmetric for name in op.inputs] for op in products] == [[False, True]] * 2
    assert plan.tensors[products[1].inputs[0]].output is Output.FIXED
    assert not plan.tensors["x"].spec.symmetric


def test_functions_that_are_tables_cannot_stay_in_float():
    model = sequential(L.Dense(3, name="dense"), L.Activation("softplus", name="plus"))
    assert [op.kind for op in plan_of(model).operators] == ["FULLY_CONNECTED", "TABLE"]
    with pytest.raises(MobileQatError, match="no float operator for softplus"):
        plan_of(model, ("plus",))


def test_exclude_names_paths_of_the_model_or_of_what_it_becomes():
    model = sequential(L.LayerNormalization(name="norm"), L.Dense(2, name="head"), shape=(4, 3))
    assert {op.quantized for op in plan_of(model, ("norm",)).operators if op.name.startswith("norm/")} == {False}
    assert [op.name for op in plan_of(model, ("norm/subtract",)).operators if not op.quantized] == ["norm/subtract"]
    linear = sequential(L.Dense(2, name="head"), L.Activation("linear", name="nothing"))
    assert all(op.quantized for op in plan_of(linear, ("nothing",)).operators), "it has vanished, but is no mistake"


# --- borders of float islands


def borders(model, exclude):
    return [
        (row["tensor"], row["conversion"], row["made_by"], row["read_by"]) for row in plan_of(model, exclude).borders()
    ]


def test_borders_of_an_island():
    assert plan_of(small_model()).borders() == []
    assert borders(small_model(), ("pool",)) == [
        ("relu", "DEQUANTIZE", "conv", ["pool"]), ("pool", "QUANTIZE", "pool", ["flat"]),
    ]  # fmt: skip
    assert [row["conversion"] for row in plan_of(small_model(), ("flat",)).borders()] == ["DEQUANTIZE", "QUANTIZE"]


def test_borders_at_the_ends_of_the_model():
    assert borders(small_model(), ("conv",)) == [("relu", "QUANTIZE", "conv", ["pool"])]
    assert borders(small_model(), ("head*",)) == [("flat", "DEQUANTIZE", "flat", ["head"])]
    assert borders(small_model(), ("*",)) == []


def test_borders_where_both_kinds_read():
    x = keras.Input((4, 4, 3), name="x")
    a = L.Conv2D(3, 1, name="a")(x)
    model = keras.Model(x, [L.Conv2D(2, 1, name="b")(a), L.Conv2D(2, 1, name="c")(a)])
    assert ("a", "DEQUANTIZE", "a", ["c"]) in borders(model, ("c",))
    found = borders(model, ("a", "c"))
    assert ("a", "QUANTIZE", "a", ["b"]) in found and ("a", "DEQUANTIZE", "a", ["c"]) in found


def test_borders_are_the_conversions_of_the_file():
    from mobileqat import flatbuffer
    from mobileqat.calibrate import calibrate
    from mobileqat.convert import convert

    quantized = quantize_model(small_model(), exclude=["pool"])
    calibrate(quantized, np.random.default_rng(0).normal(size=(8, 9, 9, 3)).astype(np.float32))
    file = flatbuffer.read(convert(quantized))
    written = [op.name for op in file.operators if op.name in ("QUANTIZE", "DEQUANTIZE")]
    assert written == [row["conversion"] for row in quantized.plan.borders()]
