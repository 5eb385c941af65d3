"""What exporters put around a network: weights behind other nodes, functions, sub-graphs, metadata, other types."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, chain, execute, feeds_for
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import normalise


def normal(proto):
    return normalise(oir.from_proto(proto))


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def operators(model):
    return [node.op_type for node in model.graph]


# --- weights behind other nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 13, 18, 21])
def test_a_weight_behind_a_chain_takes_its_final_form(opset):
    net = Net(opset=opset)
    half = numpy_helper.from_array(net.generator.standard_normal((4, 6)).astype(np.float16))
    weight = net.op("Cast", net.op("Constant", value=half), to=TensorProto.FLOAT)
    weight = net.op("Reshape", net.op("Transpose", weight, perm=[1, 0]), net.ints(6, 4))
    net.output(net.op("MatMul", net.input(["N", 6]), net.op("Identity", weight)))
    proto = net.proto()
    model = normal(proto)
    assert operators(model) == ["MatMul"]
    (layer,) = find_layers(model)
    assert layer.weight_shape == (6, 4)
    np.testing.assert_array_equal(layer.weight.const_value.numpy(), numpy_helper.to_array(half).T.astype(np.float32))
    assert list(model.graph.initializers) == [layer.weight.name]
    assert_same_outputs(proto, model, feeds_for(proto))


@pytest.mark.parametrize("opset", [10, 13, 18, 19, 21])
@pytest.mark.parametrize("form", ["tensor", "tensor without zero point", "axis", "uint8"])
def test_a_quantised_weight_is_decoded(opset, form):
    if form == "axis" and opset < 13:
        pytest.skip("scales along an axis begin with opset 13")
    net = Net(opset=opset)
    x = net.input(["N", 3, 6, 6])
    kind = np.uint8 if form == "uint8" else np.int8
    codes = net.constant(net.generator.integers(0, 100, (4, 3, 3, 3)).astype(kind))
    scale = net.uniform(4, low=0.01, high=0.02) if form == "axis" else net.constant(np.float32(0.02))
    zero = net.constant(np.arange(4).astype(kind) if form == "axis" else kind(3))
    inputs = [codes, scale] + ([] if form == "tensor without zero point" else [zero])
    weight = net.op("DequantizeLinear", *inputs, **({"axis": 0} if form == "axis" else {}))
    net.output(net.op("Conv", x, weight, pads=[1] * 4))
    proto = net.proto()
    model = normal(proto)
    assert operators(model) == ["Conv"]
    assert_same_outputs(proto, model, feeds_for(proto))


def test_a_weight_of_four_bits_in_blocks_is_decoded():
    net = Net(opset=21)
    codes = net.generator.integers(-7, 8, (8, 4))
    scales = net.generator.uniform(0.1, 0.2, (2, 4)).astype(np.float32)
    stored = [net.constant(codes.astype(ml_dtypes.int4)), net.constant(scales)]
    net.output(net.op("MatMul", net.input(["N", 8]), net.op("DequantizeLinear", *stored, axis=0, block_size=4)))
    model = normal(net.proto())
    (layer,) = find_layers(model)
    np.testing.assert_array_equal(layer.weight.const_value.numpy(), codes.astype(np.float32) * scales.repeat(4, axis=0))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_types_are_weights(kind, tmp_path):
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weight = np.linspace(-1, 1, 12).reshape(3, 4).astype(kind)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="dense")],
        "typed",
        [value("x", ["N", 3], number)],
        [value("y", None, number)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "t.onnx")
    (layer,) = find_layers(load(tmp_path / "t.onnx"))
    array = layer.weight.const_value.numpy()
    assert array.dtype == kind
    assert (array == weight).all()


def test_a_constant_that_would_be_too_large_is_never_made():
    net = Net()
    x = net.input(["N", 4])
    shape = net.ints(1 << 24, 1 << 24)
    huge = [net.op("ConstantOfShape", shape), net.op("Expand", net.constant(np.float32(1)), shape)]
    huge += [net.op("Tile", net.normal(1, 1), shape)]
    pads = [
        net.op("Pad", net.normal(1), net.ints(0, 1 << 40)),
        net.op("OneHot", net.ints(1), net.ints(1 << 40), "pair"),
    ]
    net.constant(np.float32([0, 1]), "pair")
    steps = net.op("Range", net.constant(np.int64(0)), net.constant(np.int64(1 << 40)), net.constant(np.int64(1)))
    outer = net.op("MatMul", net.normal(100_000, 1), net.normal(1, 100_000))
    for name in (*huge, *pads, steps, outer):
        net.op("Shape", name)
    sums = [net.op("ReduceMax", name) for name in (*huge, *pads, outer)]
    net.output(net.op("Sum", x, *sums))
    model = oir.from_proto(net.proto(infer=False))
    with pytest.raises(ModelError, match="too large for any machine"):
        normalise(model)
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert stored < 2 << 20


def test_a_chain_of_doublings_stops():
    net = Net()
    x = net.input(["N", 64])
    table = net.normal(1024, 64)
    for _ in range(30):
        table = net.op("Concat", table, table, axis=0)
    net.output(net.op("MatMul", x, net.op("Slice", table, net.ints(0), net.ints(64), net.ints(0))))
    with pytest.raises(ModelError, match="too large"):
        normal(net.proto())


# --- functions --------------------------------------------------------------------------------------------------------


def function(name, body, inputs="a", outputs="z", opset=18, domain="own", attributes=()):
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1), helper.make_opsetid("other", 1)]
    return helper.make_function(domain, name, list(inputs), list(outputs), body, imports, list(attributes))


def with_functions(nodes, functions, opset=18, shape=("N", 4)):
    graph = helper.make_graph(nodes, "graph", [value("x", shape)], [value("y")])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1), helper.make_opsetid("other", 1)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def test_nested_functions_are_inlined():
    inner = function("Inner", [helper.make_node("Softplus", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["z"])])
    scaled = helper.make_node("LeakyRelu", ["t"], ["z"])
    scaled.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    body = [
        helper.make_node("Inner", ["a"], ["s"], domain="own"),
        helper.make_node("Inner", ["s"], ["t"], domain="own"),
    ]
    outer = function("Outer", [*body, scaled], domain="other", attributes=["slope"])
    nodes = [helper.make_node("Outer", ["x"], ["m"], domain="other", slope=0.25)]
    nodes += [helper.make_node("Outer", ["m"], ["y"], domain="other", slope=0.5)]
    proto = with_functions(nodes, [inner, outer])
    model = normal(proto)
    assert operators(model) == ["Softplus", "Neg", "Softplus", "Neg", "LeakyRelu"] * 2
    assert not model.functions
    assert_same_outputs(proto, model, {"x": np.float32([[-1, 2, 0.5, -3]])})


def test_functions_of_another_opset_are_inlined():
    body = [helper.make_node("ReduceMean", ["a"], ["z"], axes=[1], keepdims=1)]
    proto = with_functions(
        [helper.make_node("Mean1", ["x"], ["y"], domain="own")], [function("Mean1", body, opset=17)], 17
    )
    feeds = {"x": np.float32([[-1, 2, 0.5, -3]])}
    wanted = execute(proto, feeds)
    proto.opset_import[0].version = 19  # onnxruntime refuses such a mix; the function still says what it means
    np.testing.assert_array_equal(execute(normal(proto), feeds)["y"], wanted["y"])


def test_a_constant_in_a_function_becomes_a_weight():
    weight = numpy_helper.from_array(np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]))
    body = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("MatMul", ["a", "w"], ["z"])]
    nodes = [
        helper.make_node("Dense", ["x"], ["m"], domain="own"),
        helper.make_node("Dense", ["x"], ["n"], domain="own"),
    ]
    nodes += [helper.make_node("Add", ["m", "n"], ["y"])]
    proto = with_functions(nodes, [function("Dense", body)])
    model = normal(proto)
    assert len(find_layers(model)) == 2
    assert_same_outputs(proto, model, {"x": np.float32([[-1, 2, 0.5, -3]])})


# --- what is left alone -----------------------------------------------------------------------------------------------


def control_flow(opset):
    """If, Loop and Scan whose bodies hold what the passes on the main graph would rewrite."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    then = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], "k", value=one),
            helper.make_node("Add", ["k", "k"], ["two"], "two"),
            helper.make_node("Mul", ["x", "two"], ["t"], "t"),
            helper.make_node("Identity", ["t"], ["then"], "then"),
        ],
        "then",
        [],
        [value("then")],
    )
    otherwise = helper.make_graph([helper.make_node("Identity", ["x"], ["else"], "else")], "else", [], [value("else")])
    step = helper.make_graph(
        [
            helper.make_node("Identity", ["again"], ["still"], "still"),
            helper.make_node("Add", ["state", "x"], ["next"], "next"),
        ],
        "step",
        [value("number", [], TensorProto.INT64), value("again", [], TensorProto.BOOL), value("state")],
        [value("still", [], TensorProto.BOOL), value("next")],
    )
    sums = helper.make_graph(
        [
            helper.make_node("Add", ["sum", "row"], ["more"], "more"),
            helper.make_node("Identity", ["more"], ["kept"], "kept"),
        ],
        "sums",
        [value("sum", [4]), value("row", [4])],
        [value("more", [4]), value("kept", [4])],
    )
    net = Net(opset=opset)
    x = net.input(["N", 4])
    positive = net.op("Greater", net.op("ReduceMax", x, keepdims=0), net.constant(np.float32(0.5)))
    chosen = net.op("If", positive, then_branch=then, else_branch=otherwise)
    summed = net.op("Loop", net.constant(np.int64(3)), net.constant(np.bool_(True)), chosen, body=step)
    net.nodes.append(
        helper.make_node(
            "Scan", [net.constant(np.zeros(4, np.float32)), summed], ["last", "y"], num_scan_inputs=1, body=sums
        )
    )
    net.output("y")
    return net.proto(infer=False)


@pytest.mark.parametrize("opset", [18, 21])
def test_control_flow_survives_untouched(opset):
    proto = control_flow(opset)
    model = normal(proto)
    stored, kept = (
        {n.op_type: n for n in g.node if n.op_type in ("If", "Loop", "Scan")}
        for g in (proto.graph, oir.to_proto(model).graph)
    )
    assert stored.keys() == kept.keys()
    for kind, node in stored.items():
        for one, other in zip(node.attribute, kept[kind].attribute, strict=True):
            assert one.name == other.name
            assert list(one.g.node) == list(other.g.node)
            assert [v.name for v in (*one.g.input, *one.g.output)] == [
                v.name for v in (*other.g.input, *other.g.output)
            ]
    for scale in (0.1, 1.0):
        feeds = {"x": scale * feeds_for(proto)["x"]}
        np.testing.assert_allclose(execute(proto, feeds)["y"], execute(model, feeds)["y"], rtol=1e-6)


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_control_flow_of_older_opsets_computes_the_same(opset):
    proto = control_flow(opset)
    model = normal(proto)
    for scale in (0.1, 1.0):
        feeds = {"x": scale * feeds_for(proto)["x"]}
        np.testing.assert_allclose(execute(proto, feeds)["y"], execute(model, feeds)["y"], rtol=1e-6)


def test_operators_of_other_domains_survive_with_the_shapes_that_the_exporter_knew():
    net = Net(opset=13)
    x = net.conv(net.input(["N", 3, 8, 8]), 4)
    net.nodes.append(
        helper.make_node("Mystery", [x, net.normal(4)], ["m"], "mystery", domain="own", level=3, mode="soft")
    )
    net.channels["m"] = 4
    net.head("m")
    proto = net.proto(infer=False)
    proto.opset_import.append(helper.make_opsetid("own", 2))
    proto.graph.value_info.append(value("m", ["N", 4, 8, 8]))
    stored = next(node for node in proto.graph.node if node.op_type == "Mystery")
    model = normal(proto)
    assert next(node for node in oir.to_proto(model).graph.node if node.op_type == "Mystery") == stored
    assert model.opset_imports["own"] == 2
    assert [list(layer.linear.shape)[1:] for layer in find_layers(model)] == [[4, 8, 8], [5]]


def test_metadata_and_documentation_survive():
    for opset in (9, 13, 18):
        net = Net(opset=opset)
        net.head(net.op("Clip", net.input(["N", 3, 8, 8]), min=0.0) if opset < 11 else net.input(["N", 3, 8, 8]))
        proto = net.proto()
        proto.producer_name, proto.producer_version, proto.domain = "exporter", "1.2", "org.example"
        proto.doc_string, proto.graph.doc_string, proto.model_version = "a model", "a graph", 7
        proto.graph.node[0].doc_string = "a node"
        helper.set_model_props(proto, {"classes": "cat,dog"})
        proto.graph.metadata_props.add(key="graph", value="kept")
        proto.graph.node[0].metadata_props.add(key="node", value="kept")
        proto.graph.input[0].doc_string = "an image"
        proto.graph.input[0].metadata_props.add(key="range", value="0..1")
        name = proto.graph.node[0].name
        stored = oir.to_proto(normal(proto))
        for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version", "metadata_props"):
            assert getattr(stored, field) == getattr(proto, field)
        assert stored.graph.doc_string == "a graph"
        assert stored.graph.metadata_props == proto.graph.metadata_props
        node = next(node for node in stored.graph.node if node.name == name)
        assert (node.doc_string, node.metadata_props[0].value) == ("a node", "kept")
        assert stored.graph.input[0].doc_string == "an image"
        assert stored.graph.input[0].metadata_props[0].value == "0..1"
        assert [v.name for v in stored.graph.output] == [v.name for v in proto.graph.output]


def test_an_output_behind_an_identity_keeps_its_name():
    net = Net()
    x = net.relu(net.input(["N", 4]))
    net.output(net.op("Identity", net.op("Neg", x), name="first"), net.op("Identity", "x", name="second"))
    proto = net.proto()
    model = normal(proto)
    assert [v.name for v in model.graph.outputs] == ["first", "second"]
    assert operators(model) == ["Relu", "Neg", "Identity"]
    assert_same_outputs(proto, model, feeds_for(proto))


def test_nodes_in_any_order_are_sorted(tmp_path):
    proto = chain().proto()
    nodes = list(reversed(proto.graph.node))
    proto.graph.ClearField("node")
    proto.graph.node.extend(nodes)
    onnx.save(proto, tmp_path / "reversed.onnx")
    assert_same_outputs(chain().proto(), load(tmp_path / "reversed.onnx"), feeds_for(proto))


def test_the_other_name_of_the_standard_domain(tmp_path):
    proto = chain().proto()
    proto.opset_import[0].domain = "ai.onnx"
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    onnx.save(proto, tmp_path / "named.onnx")
    model = load(tmp_path / "named.onnx")
    assert model.opset_imports == {"": 18}
    assert len(find_layers(model)) == 4


def test_weights_beyond_two_gigabytes_stay_outside(tmp_path):
    """An external weight of 2.5 GB, sparse on disk, whose network still has to be converted."""
    rows = 625_000
    with open(tmp_path / "weights.bin", "wb") as data:
        data.truncate(rows * 1000 * 4)
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 1000])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows"], ["y"], axes=[0]),
    ]
    graph = helper.make_graph(nodes, "large", [value("x", ["N"], TensorProto.INT64)], [value("y")], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    proto.metadata_props.add(key="kept", value="yes")
    onnx.save(proto, tmp_path / "large.onnx")
    model = load(tmp_path / "large.onnx")
    assert model.opset_imports[""] == 18
    assert model.metadata_props["kept"] == "yes"
    assert isinstance(model.graph.initializers["w"].const_value, oir.ExternalTensor)
    assert list(model.graph.outputs[0].shape)[2] == 1000
