"""Reading, judging and exposing: on converted models, on real files, and on broken bytes."""

import itertools
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import flatbuffers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobileqat import flatbuffer
from mobileqat.errors import FlatbufferError

DATA = os.environ.get("MOBILEQAT_DATA")
REAL_FILES = (
    sorted(path for part in ("mlperf-tiny", "tflite-micro") for path in Path(DATA, part).rglob("*.tflite"))
    if DATA
    else []
)
CORRUPTION = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def models():
    """One small network in every kind of quantization, as bytes."""
    keras = pytest.importorskip("keras", reason="converting the test models needs keras")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3), batch_size=1, name="image")
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu6", name="conv")(inputs)
    x = keras.layers.DepthwiseConv2D(3, strides=2, name="depthwise")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(32, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(x))
    return {kind: convert(model, kind) for kind in ("float", "dynamic", "int8", "int8_float_io", "int8_uint8_io")}


def convert(model, kind):
    tf = pytest.importorskip("tensorflow", reason="converting the test models needs tensorflow")
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind.startswith("int8"):
        samples = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])).astype(np.float32)
        converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        interface = {"int8": tf.int8, "int8_float_io": tf.float32, "int8_uint8_io": tf.uint8}[kind]
        converter.inference_input_type = converter.inference_output_type = interface
    return converter.convert()


@pytest.fixture(scope="session")
def int8(models):
    return models["int8"]


# --- reading


def test_tensors_and_operators(int8):
    model = flatbuffer.read(int8)
    assert [operator.name for operator in model.operators] == [
        "CONV_2D", "DEPTHWISE_CONV_2D", "RESHAPE", "FULLY_CONNECTED", "FULLY_CONNECTED", "SOFTMAX",
    ]  # fmt: skip
    convolution = model.operators[0]
    assert convolution.options["padding"] == "SAME"
    assert convolution.options["fused_activation_function"] == "RELU6"
    assert (convolution.options["stride_w"], convolution.options["stride_h"]) == (1, 1)
    image, kernel, bias = (model.tensors[index] for index in convolution.inputs)
    assert (image.shape, image.dtype, image.is_constant, image.data) == ((1, 8, 8, 3), "int8", False, None)
    assert image.size_bytes == 192
    assert (kernel.shape, kernel.dtype, kernel.quantized_axis) == ((4, 3, 3, 3), "int8", 0)
    assert kernel.scales.shape == (4,) and kernel.scales.dtype == np.float32
    assert np.abs(kernel.data).max() == 127 and not kernel.zero_points.any()
    np.testing.assert_allclose(bias.scales, image.scales * kernel.scales, rtol=1e-6)
    assert bias.data.dtype == np.int32
    assert model.signatures["serving_default"]["inputs"] == {"image": model.inputs[0]}
    assert model.size_bytes == len(int8) and model.content == int8


def test_reads_paths_and_bytes_alike(int8, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(int8)
    assert flatbuffer.read(path).operators == flatbuffer.read(str(path)).operators == flatbuffer.read(int8).operators


def test_constants_are_read_only(int8):
    constant = next(tensor for tensor in flatbuffer.read(int8).tensors if tensor.is_constant)
    with pytest.raises(ValueError, match="read-only"):
        constant.data[...] = 0


def test_matches_the_interpreter(models):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    for content in models.values():
        model = flatbuffer.read(content)
        runner = interpreter.Interpreter(
            model_content=content,
            experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        runner.allocate_tensors()
        for tensor, row in zip(model.tensors, runner.get_tensor_details(), strict=False):
            assert (tensor.index, tensor.name, tensor.shape) == (
                row["index"],
                row["name"],
                tuple(row["shape"]),
            )
            assert tensor.dtype == np.dtype(row["dtype"]).name
            expected = row["quantization_parameters"]["scales"]
            np.testing.assert_array_equal(expected, [] if tensor.scales is None else tensor.scales)
            if tensor.is_constant:
                np.testing.assert_array_equal(tensor.data, runner.get_tensor(tensor.index))


@pytest.mark.parametrize(
    ("bits", "signed", "values"),
    [(4, True, [-8, 7, -1, 0]), (4, False, [0, 15, 8, 7]), (2, True, [-2, 1, -1, 0])],
)
def test_unpack(bits, signed, values):
    mask = (1 << bits) - 1
    packed = sum((value & mask) << (bits * position) for position, value in enumerate(values))
    stored = np.frombuffer(packed.to_bytes(len(values) * bits // 8, "little"), np.uint8)
    assert flatbuffer._unpack(stored, bits, signed).tolist() == values


# --- broken files


def one_tensor_model(**changes):
    """The smallest useful file: one operator from tensor 0 (input) and 1 (constant) to tensor 2, edited."""
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name, shape, buffer):
        return schema.TensorT(name=name, shape=shape, type=schema.TensorType.INT8, buffer=buffer)

    model = schema.ModelT(
        version=3,
        description="test",
        operatorCodes=[schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.MAXIMUM, version=1)],
        buffers=[schema.BufferT(), schema.BufferT(data=[1, 2, 3, 4])],
        subgraphs=[
            schema.SubGraphT(
                tensors=[tensor("x", [1, 4], 0), tensor("constant", [1, 4], 1), tensor("y", [1, 4], 0)],
                inputs=[0],
                outputs=[2],
                operators=[schema.OperatorT(opcodeIndex=0, inputs=[0, 1], outputs=[2])],
            )
        ],
    )
    for path, value in changes.items():
        *parents, field = path.split("__")
        target = model
        for part in parents:
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        setattr(target, field, value)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


QUANTIZATION = "subgraphs__0__tensors__0__quantization"


def quantization(**fields):
    from ai_edge_litert import schema_py_generated as schema

    return schema.QuantizationParametersT(**fields)


def test_the_unedited_model_is_fine():
    assert flatbuffer.read(one_tensor_model()).tensors[1].data.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"version": 2}, "schema version 2"),
        ({"subgraphs": []}, "no subgraph"),
        ({"subgraphs__0__outputs": []}, "no subgraph with outputs"),
        ({"subgraphs__0__tensors__0__type": 99}, "99 is no known TensorType"),
        ({"subgraphs__0__tensors__0__shape": [1, -4]}, "shape"),
        ({"subgraphs__0__tensors__0__shape": [2**31 - 1] * 8}, "more than any device holds"),
        ({"subgraphs__0__tensors__0__shapeSignature": [-1]}, "shape signature"),
        ({"subgraphs__0__tensors__0__buffer": 7}, "buffer 7 does not exist"),
        ({"subgraphs__0__tensors__1__shape": [1, 5]}, "is 5 bytes, its buffer has 4"),
        ({"subgraphs__0__tensors__1__externalBuffer": 1}, "another file"),
        ({"subgraphs__0__inputs": [3]}, "tensor 3 does not exist"),
        ({"subgraphs__0__outputs": [-1]}, "tensor -1 does not exist"),
        ({"subgraphs__0__operators__0__opcodeIndex": 1}, "operator code 1 does not exist"),
        ({"operatorCodes__0__builtinCode": 9999}, "9999 is no known BuiltinOperator"),
        ({"subgraphs__0__operators__0__inputs": [0, 2]}, "reads tensor 2 'y' too early"),
        ({"subgraphs__0__operators__0__inputs": [0, 9]}, "input tensor 9 does not exist"),
        ({"subgraphs__0__operators__0__outputs": [1]}, "overwrites tensor 1 'constant'"),
        ({"subgraphs__0__operators__0__outputs": [0]}, "overwrites tensor 0 'x'"),
        ({"subgraphs__0__operators__0__intermediates": [5]}, "intermediate: tensor 5"),
        ({"subgraphs__0__operators": []}, "output tensor 2 'y' is never computed"),
        ({QUANTIZATION: quantization(scale=[float("nan")])}, "positive finite"),
        ({QUANTIZATION: quantization(scale=[0.0])}, "positive finite"),
        ({QUANTIZATION: quantization(scale=[1.0, 1.0])}, "2 scales along axis 0"),
        ({QUANTIZATION: quantization(scale=[1.0], zeroPoint=[300])}, "outside int8"),
        ({QUANTIZATION: quantization(scale=[1.0], zeroPoint=[1, 2])}, "2 zero points"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_structural_damage_is_named(edit, message):
    with pytest.raises(FlatbufferError, match=message):
        flatbuffer.read(one_tensor_model(**edit))


def test_subgraphs_calling_each_other():
    from ai_edge_litert import schema_py_generated as schema

    content = one_tensor_model(
        operatorCodes__0__builtinCode=schema.BuiltinOperator.WHILE,
        subgraphs__0__operators__0__builtinOptionsType=schema.BuiltinOptions.WhileOptions,
        subgraphs__0__operators__0__builtinOptions=schema.WhileOptionsT(condSubgraphIndex=0, bodySubgraphIndex=0),
    )
    with pytest.raises(FlatbufferError, match="circle"):
        flatbuffer.read(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"TFL3", "identifier"),
        (b"PK\3\4 a zip file", "identifier"),
        (b"\xff\xff\xff\x7fTFL3", "corrupt"),
    ],
)
def test_not_a_model(content, message):
    with pytest.raises(FlatbufferError, match=message):
        flatbuffer.read(content)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FlatbufferError, match=r"nowhere\.tflite: cannot be read"):
        flatbuffer.read(tmp_path / "nowhere.tflite")
    with pytest.raises(FlatbufferError, match="cannot be read"):
        flatbuffer.read(str(tmp_path))


def test_vectors_that_overlap_do_not_unfold():
    # Ten thousand subgraphs that are all the same table, in a copy behind the file: offsets
    # point forward.
    count, content = 10_000, bytearray(one_tensor_model())
    size = len(content)
    root = flatbuffer._root(bytes(content))
    slot, subgraph = root._tab.Pos + root._tab.Offset(8), root.Subgraphs(0)._tab.Pos
    struct.pack_into("<I", content, slot, size - slot)
    references = [4 * (count - i) + subgraph for i in range(count)]
    bomb = bytes(content) + struct.pack(f"<I{count}I", count, *references) + one_tensor_model()
    with pytest.raises(FlatbufferError, match="overlap"):
        flatbuffer.read(bomb)


def read_or_refuse(content):
    """What every corruption must do; the judgement has to survive whatever the reading accepts."""
    try:
        flatbuffer.read(content)
    except FlatbufferError:
        return
    json.dumps(flatbuffer.inspect(content).to_dict())
    flatbuffer.expose_tensors(content)


@CORRUPTION
@given(content=st.binary(max_size=2000))
def test_random_bytes(content):
    read_or_refuse(content)
    read_or_refuse(content[:4] + b"TFL3" + content[4:])


@CORRUPTION
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8))
def test_bit_flips(int8, flips):
    content = bytearray(int8)
    for position, bit in flips:
        content[int(position * len(content))] ^= 1 << bit
    read_or_refuse(bytes(content))


@CORRUPTION
@given(data=st.data())
def test_damaged_words(data):
    """Offsets and lengths overwritten in a file with nothing but structure."""
    content = bytearray(one_tensor_model())
    for _ in range(data.draw(st.integers(1, 4))):
        position = 4 * data.draw(st.integers(2, len(content) // 4 - 1))
        word = data.draw(st.sampled_from([0, 1, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1))
        struct.pack_into("<I", content, position, word)
    read_or_refuse(bytes(content))


@CORRUPTION
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncations(int8, fraction):
    # The converter writes from the back: what is missing at the end is a table that the front refers to.
    with pytest.raises(FlatbufferError):
        flatbuffer.read(int8[: int(fraction * (len(int8) - 64))])


# --- judging


def test_fully_integer(int8):
    inspection = flatbuffer.inspect(int8)
    assert inspection.fully_integer
    assert not inspection.islands and not inspection.boundary and not inspection.stray_conversions
    assert not inspection.problems
    assert set(inspection.dtype_counts) == {"int8", "int32"}
    assert inspection.operator_counts["FULLY_CONNECTED"] == 2
    assert inspection.inputs[0].dtype == "int8" and inspection.inputs[0].scale > 0
    assert inspection.outputs[0].scale == 1 / 256 and inspection.outputs[0].zero_point == -128
    assert 0 < inspection.weight_bytes < inspection.size_bytes == len(int8)


@pytest.mark.parametrize(("kind", "dtype"), [("int8_float_io", "float32"), ("int8_uint8_io", "uint8")])
def test_conversions_at_the_boundary_are_allowed(models, kind, dtype):
    inspection = flatbuffer.inspect(models[kind])
    assert inspection.fully_integer
    assert inspection.inputs[0].dtype == inspection.outputs[0].dtype == dtype
    assert len(inspection.boundary) == 2 and not inspection.stray_conversions


def test_float_model_is_islands_all_over(models):
    inspection = flatbuffer.inspect(models["float"])
    assert not inspection.fully_integer
    assert len(inspection.islands) == 6
    assert {island.reason for island in inspection.islands} == {"computes in float32"}
    assert any("CONV_2D" in problem and "ranges" in problem for problem in inspection.problems)


def test_dynamic_range_is_told_from_float(models):
    reasons = {island.reason for island in flatbuffer.inspect(models["dynamic"]).islands}
    assert "has integer weights but float32 activations (dynamic range quantization)" in reasons


def test_to_dict_is_json(models):
    for content in models.values():
        plain = flatbuffer.inspect(content).to_dict()
        assert json.loads(json.dumps(plain))["size_bytes"] == len(content)


def test_shape_arithmetic_of_a_dynamic_batch():
    keras = pytest.importorskip("keras")
    inputs = keras.Input((4, 4, 2))
    model = keras.Model(inputs, keras.layers.Flatten()(keras.layers.Conv2D(2, 1)(inputs)))
    inspection = flatbuffer.inspect(convert(model, "int8"))
    assert inspection.shape_arithmetic[0].endswith("SHAPE")
    assert {name.split()[1] for name in inspection.shape_arithmetic} >= {"SHAPE", "STRIDED_SLICE", "PACK"}
    assert inspection.dynamic_tensors
    assert any("static batch of 1" in problem for problem in inspection.problems)


@pytest.mark.parametrize(
    ("source", "target", "source_is_input", "kind"),
    [
        ("float32", "int8", True, "boundary"),
        ("float32", "int8", False, "stray"),
        ("uint8", "int8", True, "boundary"),
        ("uint8", "int8", False, "requantization"),
        ("int8", "int8", True, "requantization"),
        ("int8", "int16", False, "requantization"),
        ("float16", "float32", True, "stray"),
    ],
)
def test_conversion_kinds(source, target, source_is_input, kind):
    def tensor(index, dtype):
        return flatbuffer.Tensor(
            index, "t", (1,), (1,), dtype, None, None, 0, None, False, False, buffer_index=0, size_bytes=1
        )

    interface = {0} if source_is_input else set()
    assert flatbuffer._conversion_kind(tensor(0, source), tensor(1, target), interface) == kind


def test_a_float_output_without_operators_is_an_island():
    changes = {
        "subgraphs__0__operators": [],
        "subgraphs__0__outputs": [0],
        "subgraphs__0__tensors__0__type": 0,
    }
    (island,) = flatbuffer.inspect(one_tensor_model(**changes)).islands
    assert island.operator_index is None and island.tensor_names == ("x",)


def test_legacy_uint8_is_an_island():
    from ai_edge_litert import schema_py_generated as schema

    inner = {f"subgraphs__0__tensors__{index}__type": schema.TensorType.UINT8 for index in range(3)}
    (island,) = flatbuffer.inspect(one_tensor_model(**inner)).islands
    assert island.operator_name == "MAXIMUM" and "before int8" in island.reason


@pytest.mark.parametrize(
    ("operator", "scales", "expected"), [("CAST", None, True), ("CAST", [0.1], False), ("ADD", None, False)]
)
def test_bytes_on_their_way_to_a_table_are_no_island(operator, scales, expected):
    tensor = SimpleNamespace(dtype="uint8", scales=scales)
    assert flatbuffer._is_index(SimpleNamespace(name=operator), tensor) == expected


# --- exposing


def test_exposed_tensors(int8):
    before, exposed = flatbuffer.read(int8), flatbuffer.expose_tensors(int8)
    after = flatbuffer.read(exposed)
    computed = [index for operator in before.operators for index in operator.outputs]
    assert after.outputs[0] == before.outputs[0]
    assert sorted(after.outputs) == sorted(computed)
    assert after.inputs == before.inputs and after.operators == before.operators
    assert after.signatures == {} and before.signatures
    for old, new in itertools.zip_longest(before.tensors, after.tensors):
        assert (old.name, old.shape, old.dtype) == (new.name, new.shape, new.dtype)
        assert old.data is None or np.array_equal(old.data, new.data)


def test_chosen_tensors_keep_their_order(int8):
    model = flatbuffer.read(int8)
    chosen = [model.operators[3].outputs[0], model.operators[0].outputs[0]]
    assert flatbuffer.read(flatbuffer.expose_tensors(int8, chosen)).outputs == (*model.outputs, *chosen)


def test_only_computed_tensors_can_be_exposed(int8):
    model = flatbuffer.read(int8)
    with pytest.raises(FlatbufferError, match="no operator"):
        flatbuffer.expose_tensors(int8, model.inputs)


# --- real files


@pytest.mark.skipif(not REAL_FILES, reason="MOBILEQAT_DATA names no folder with mlperf-tiny and tflite-micro")
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files(path):
    inspection = flatbuffer.inspect(path)
    is_float = any(word in path.stem for word in ("float", "fp32")) or path.stem == "pretrainedResnet"
    assert inspection.fully_integer == (not is_float)
    assert inspection.weight_bytes < inspection.size_bytes == path.stat().st_size
    exposed = flatbuffer.read(flatbuffer.expose_tensors(path))
    assert len(exposed.outputs) == len({i for operator in exposed.operators for i in operator.outputs})
