"""Which layers become one operator, and which tensors share a grid."""

import json

import keras
import pytest
from contract import sequential
from keras import layers as L

from mobileqat.errors import MobileQatError
from mobileqat.graph import read
from mobileqat.lowering import lower
from mobileqat.plan import make_plan
from mobileqat.rules import GONE, Output
from mobileqat.schemes import QuantSpec, get_scheme


def plan_of(model, exclude=(), pinned=()):
    return make_plan(lower(read(model), pinned), get_scheme("w8a8"), exclude)


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
    assert [op.fused_activation for op in plan.operators] == fused


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


def test_exclude_must_match():
    with pytest.raises(MobileQatError, match=r"exclude='haed' matches no layer.*conv"):
        plan_of(small_model(), ("haed",))


def test_rows_for_reports():
    rows = json.loads(json.dumps(plan_of(small_model()).rows()))
    assert rows[0] == {
        "tensor": "x", "shape": [9, 9, 3], "operator": "INPUT", "layers": [], "bits": 8,
        "parameters": "a range of its own", "shared_with": None,
    }  # fmt: skip
    assert rows[2]["tensor"] == "pool" and rows[2]["shared_with"] == "relu"
    assert rows[-1]["parameters"] == "fixed by the kernel"
