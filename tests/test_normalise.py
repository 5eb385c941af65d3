"""The normal form of a graph, and that it computes what the stored graph computes."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, chain, execute, feeds_for
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.errors import ModelError
from onnxmerge.ir.load import load
from onnxmerge.ir.normalise import OPSET, normalise
from onnxmerge.ir.save import save
from onnxmerge.ir.spaces import find_spaces


def normal(proto: onnx.ModelProto) -> oir.Model:
    return normalise(oir.from_proto(proto))


def check_normal(model: oir.Model) -> None:
    """What `normalise` promises of every graph."""
    assert model.opset_imports[""] >= OPSET
    assert not any(node.op_type == "Constant" for node in model.graph)
    inputs = {value.name for value in model.graph.inputs}
    assert not inputs & set(model.graph.initializers)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.size < 2 or len(value.uses()) <= 1
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    onnx.checker.check_model(oir.to_proto(model), full_check=True)


def test_real_networks(real_model):
    stored = onnx.load(real_model)
    model = load(real_model)
    check_normal(model)
    assert all(value.shape is not None for node in model.graph for value in node.outputs)
    assert not isinstance(model.graph.inputs[0].shape[0], int)
    assert_same_outputs(stored, model, feeds_for(stored, batch=1))


@pytest.mark.parametrize("name", ["mnist-net_256x2", "ultraface_slim_320", "candy_nc8_256"])
def test_a_freed_batch_computes_each_sample_alone(name, shared):
    model = load(shared(name))
    feeds = feeds_for(model, batch=3)
    together = execute(model, feeds)
    for row in range(3):
        alone = execute(model, {key: array[row : row + 1] for key, array in feeds.items()})
        for key, array in alone.items():
            np.testing.assert_allclose(together[key][row : row + 1], array, atol=1e-5 * np.abs(array).max())


# --- old opsets and exporters' habits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17])
def test_old_opsets(opset):
    net = Net(opset=opset)
    x = net.norm(net.conv(net.input(["N", 3, 8, 8]), 6))
    if opset < 11:
        x = net.op("Clip", x, min=-1.0, max=2.0)
        x = net.op("Pad", x, pads=[0, 0, 1, 0, 0, 0, 0, 1])
    else:
        x = net.op("Clip", x, net.constant(np.float32(-1)), net.constant(np.float32(2)))
        x = net.op("Pad", x, net.ints(0, 0, 1, 0, 0, 0, 0, 1))
    pooled = net.op("ReduceMean", x, axes=[2, 3], keepdims=0)
    pooled = net.op("Unsqueeze", pooled, axes=[2]) if opset < 13 else net.op("Unsqueeze", pooled, net.ints(2))
    net.output(net.op("Softmax", net.gemm(net.flatten(pooled, 6), 4), axis=1))
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    assert model.opset_imports[""] == OPSET
    assert not find_spaces(model).frozen
    assert_same_outputs(proto, model, feeds_for(proto))


def test_newer_opsets_stay():
    net = Net(opset=20)
    net.head(net.op("Gelu", net.conv(net.input(["N", 3, 8, 8]), 4)))
    assert normal(net.proto()).opset_imports[""] == 20


def test_opset_before_7_is_refused():
    proto = chain().proto()
    proto.opset_import[0].version = 6
    with pytest.raises(ModelError, match="opset 6 is too old"):
        normal(proto)


def test_constant_nodes_become_initializers():
    proto = chain().proto()
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in list(proto.graph.initializer)
    ]
    wanted = {tensor.name for tensor in proto.graph.initializer}
    proto.graph.ClearField("initializer")
    for constant in reversed(constants):
        proto.graph.node.insert(0, constant)
    model = normal(proto)
    check_normal(model)
    assert set(model.graph.initializers) == wanted
    assert_same_outputs(chain().proto(), model, feeds_for(model))


def test_initializers_listed_as_inputs():
    proto = chain().proto()
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = normal(proto)
    check_normal(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert_same_outputs(proto, model, feeds_for(proto))


def test_weights_behind_transpose_and_reshape_take_their_final_form():
    net = Net()
    x = net.input(["N", 6])
    net.output(net.op("MatMul", x, net.op("Transpose", net.normal(5, 6), perm=[1, 0])))
    net.output(net.op("Add", net.outputs[0].name, net.reshape(net.normal(5), 1, 5)))
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    assert sorted(node.op_type for node in model.graph) == ["Add", "MatMul"]
    assert_same_outputs(proto, model, feeds_for(proto))


def test_shape_arithmetic_over_known_sizes_is_folded():
    net = Net()
    x = net.conv(net.input(["N", 3, 8, 8]), 4)
    height = net.op("Gather", net.op("Shape", x), net.constant(np.int64(2)), axis=0)
    size = net.op("Unsqueeze", net.op("Mul", height, net.constant(np.int64(2))), net.ints(0))
    scaled = net.op("Concat", net.op("Shape", x, end=2), size, size, axis=0)
    net.head(net.op("Resize", x, "", "", scaled, channels=4, mode="nearest"))
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    assert_same_outputs(proto, model, feeds_for(proto))


@pytest.mark.parametrize("pick", ["Gather", "Slice"])
def test_a_weight_cut_at_a_known_size_of_a_partly_free_shape_is_folded(pick):
    """torch's attention slices its weights at places computed from the width of what it reads."""
    net = Net()
    shape = net.op("Shape", net.input(["N", "T", 6]))
    if pick == "Gather":
        width = net.op("Unsqueeze", net.op("Gather", shape, net.constant(np.int64(-1))), net.ints(0))
    else:
        width = net.op("Slice", shape, net.ints(2), net.ints(3), net.ints(0))
    rows = net.op("Slice", net.normal(12, 6), net.ints(0), width, net.ints(0))
    net.channels[rows] = 6
    net.output(net.op("MatMul", "x", net.op("Transpose", rows, perm=[1, 0])))
    model = net.model()
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert_same_outputs(net.proto(), model, feeds_for(model))


def test_batch_norms_stay():
    model = chain().model()
    assert sum(node.op_type == "BatchNormalization" for node in model.graph) == 3


def test_tied_weights_are_untied_and_stored_once_again(tmp_path):
    net = Net()
    x = net.conv(net.input(["N", 6, 8, 8]), 6, kernel=7)
    weight, bias = net.nodes[0].input[1:]
    x = net.op("Conv", net.relu(x), weight, bias, channels=6, pads=[3] * 4)
    net.head(x)
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    first, second = (node for node in model.graph if node.op_type == "Conv")
    for index in (1, 2):
        assert first.inputs[index] is not second.inputs[index]
        np.testing.assert_array_equal(first.inputs[index].const_value.numpy(), second.inputs[index].const_value.numpy())
    assert_same_outputs(proto, model, feeds_for(proto))
    assert numpy_helper.to_array(proto.graph.initializer[0]).size > 1024  # no limit to what is stored once
    save(model, tmp_path / "tied.onnx")
    stored = onnx.load(tmp_path / "tied.onnx")
    assert len(stored.graph.initializer) == len(proto.graph.initializer)


def test_names_are_made_unique():
    proto = chain().proto()
    for node in proto.graph.node:
        node.name = "same"
    names = [node.name for node in normal(proto).graph]
    assert len(set(names)) == len(names)


def test_metadata_survives():
    for opset in (13, 18):
        net = Net(opset=opset)
        net.head(net.conv(net.input(["N", 3, 8, 8]), 4))
        proto = net.proto()
        helper.set_model_props(proto, {"classes": "cat,dog"})
        assert normal(proto).metadata_props["classes"] == "cat,dog"


def test_functions_are_inlined():
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    function = helper.make_function("own", "NegRelu", ["a"], ["c"], body, [helper.make_opsetid("", 18)])
    node = helper.make_node("NegRelu", ["x"], ["y"], domain="own")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    graph = helper.make_graph([node], "graph", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    model = normal(proto)
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]
    np.testing.assert_array_equal(execute(model, {"x": np.float32([[-1, 2, 0, 3]])})["y"], [[0, -2, 0, -3]])


# --- the batch axis ---------------------------------------------------------------------------------------------------


def batch_of(model: oir.Model) -> int | str | None:
    size = model.graph.inputs[0].shape[0]
    return size if isinstance(size, int) else size.value


@pytest.mark.parametrize("target", [(1, -1), (1, 256), (-1, 256), (0, -1)])
def test_a_fixed_batch_is_freed(target):
    net = Net()
    x = net.relu(net.conv(net.input([1, 3, 8, 8]), 4))
    net.output(net.gemm(net.reshape(x, *target, channels=256), 5))
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    assert batch_of(model) == "N"
    assert_same_outputs(proto, model, feeds_for(proto))
    assert execute(model, feeds_for(model, batch=3))[model.graph.outputs[0].name].shape == (3, 5)


def test_a_fixed_batch_is_freed_beside_a_reshaped_constant():
    net = Net()
    x = net.conv(net.input([1, 3, 8, 8]), 4)
    net.head(net.op("Add", x, net.reshape(net.normal(4), 1, -1, 1, 1)))
    model = normal(net.proto())
    assert batch_of(model) == "N"
    assert_same_outputs(net.proto(), model, feeds_for(net.proto()))


def test_a_fixed_batch_is_freed_without_declared_output_shapes():
    net = Net()
    net.head(net.conv(net.input([1, 3, 8, 8]), 4))
    assert batch_of(normal(net.proto(infer=False))) == "N"


@pytest.mark.parametrize("target", [(256,), (2, 128), (16, 16)])
def test_a_batch_that_cannot_be_freed_stays(target):
    """A Reshape to a constant total size holds for one batch size only."""
    net = Net()
    x = net.relu(net.conv(net.input([1, 3, 8, 8]), 4))
    columns = target[-1]
    flat = net.reshape(x, *target, channels=columns)
    net.output(net.op("MatMul", net.op("Unsqueeze", flat, net.ints(0)), net.normal(columns, 5)))
    proto = net.proto()
    model = normal(proto)
    check_normal(model)
    assert batch_of(model) == 1
    assert_same_outputs(proto, model, feeds_for(proto))


def test_a_batch_that_an_output_does_not_follow_stays():
    net = Net()
    x = net.conv(net.input([1, 3, 8, 8]), 4)
    net.output(net.op("ReduceSum", x, net.ints(0), keepdims=1))
    model = normal(net.proto())
    assert batch_of(model) == 1


def test_a_declared_output_shape_that_is_wrong_does_not_hide_the_others():
    net = Net()
    net.head(net.relu(net.conv(net.input(["N", 3, 8, 8]), 4)))
    proto = net.proto()
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(proto.graph.output[0].name, TensorProto.FLOAT, [1, 7])  # it is [N, 5]
    )
    model = normal(proto)
    assert [space.size for space in find_spaces(model).permutable()] == [4]
