"""The passes behind pack: what they unite, what they must leave alone; onnxruntime is the judge."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, execute, feeds_for
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.fold_stored import fold_stored
from onnxmerge.ir.light import raise_light_opset, read_light
from onnxmerge.ir.normalise import infer_shapes
from onnxmerge.ir.save import save, stored_bytes
from onnxmerge.ir.stored import digest, is_external
from onnxmerge.passes.deduplicate_initializers import DeduplicateInitializers
from onnxmerge.passes.merge_identical_nodes import MergeIdenticalNodes
from onnxmerge.passes.prefix_names import PrefixNames
from onnxmerge.passes.tie_inputs import TieInputs

Array = np.ndarray


def light(proto: onnx.ModelProto, folder: Path, name: str = "model") -> oir.Model:
    path = folder / f"{name}.onnx"
    onnx.save(proto, path)
    return read_light(path)


def operators(model: oir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_bits(
    first: oir.Model | onnx.ModelProto, second: oir.Model | onnx.ModelProto, feeds: dict[str, Array]
) -> None:
    ours, theirs = execute(first, feeds), execute(second, feeds)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert a.tobytes() == b.tobytes()


def twins(build: Callable[[Net, str], str]) -> onnx.ModelProto:
    """`build` twice on one input, each time with weights of its own that are equal."""
    net = Net()
    x = net.input(["N", 4, 6, 6])
    ends = []
    for _ in range(2):
        net.generator = np.random.default_rng(1)
        ends.append(build(net, x))
    net.output(*ends)
    return net.proto()


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(proto: onnx.ModelProto, folder: Path) -> oir.Model:
    model = light(proto, folder)
    DeduplicateInitializers()(model)
    MergeIdenticalNodes()(model)
    assert_bits(proto, model, feeds_for(proto))
    return model


def test_equal_branches_become_one_and_both_outputs_keep_their_names(tmp_path: Path) -> None:
    proto = twins(lambda net, x: net.relu(net.conv(net.norm(net.conv(x, 5)), 3)))
    model = merged(proto, tmp_path)
    assert operators(model) == ["Conv", "BatchNormalization", "Conv", "Relu", "Identity"]
    assert [v.name for v in model.graph.outputs] == [v.name for v in proto.graph.output]
    assert len(model.graph.initializers) == 8


def test_merging_is_idempotent(tmp_path: Path) -> None:
    model = merged(twins(lambda net, x: net.relu(net.conv(x, 3))), tmp_path)
    assert not MergeIdenticalNodes()(model).modified


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("Add", "ab", {}), ("Add", "ba", {}), True),
        (("Mul", "ab", {}), ("Mul", "ba", {}), True),
        (("Sum", "ab", {}), ("Sum", "ba", {}), True),
        (("Sum", "abx", {}), ("Sum", "xba", {}), False),  # floating-point sums of three depend on their order
        (("Max", "ab", {}), ("Max", "ba", {}), False),  # max(0, -0)
        (("Sub", "ab", {}), ("Sub", "ba", {}), False),
        (("Softmax", "x", {}), ("Softmax", "x", {"axis": -1}), True),
        (("Softmax", "x", {}), ("Softmax", "x", {"axis": 1}), False),
        (("LeakyRelu", "x", {"alpha": 0.01}), ("LeakyRelu", "x", {}), True),
        (("LeakyRelu", "x", {"alpha": 0.02}), ("LeakyRelu", "x", {}), False),
        (("Transpose", "x", {"perm": [0, 1, 3, 2]}), ("Transpose", "x", {"perm": [0, 1, 2, 3]}), False),
        (
            ("MaxPool", "x", {"kernel_shape": [2, 2]}),
            ("MaxPool", "x", {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}),
            True,
        ),
        (
            ("MaxPool", "x", {"kernel_shape": [2, 2]}),
            ("MaxPool", "x", {"kernel_shape": [2, 2], "strides": [2, 1]}),
            False,
        ),
        (("Clip", "x", {}), ("Clip", "x__", {}), True),  # optional inputs that are left out, one of them by name
        (("RandomNormalLike", "x", {}), ("RandomNormalLike", "x", {}), False),
        (("RandomNormalLike", "x", {"seed": 1.0}), ("RandomNormalLike", "x", {"seed": 1.0}), False),
        (("Bernoulli", "u", {}), ("Bernoulli", "u", {}), False),
        (("Dropout", "x_t", {}), ("Dropout", "x_t", {}), False),
    ],
)
def test_which_nodes_are_the_same(first: tuple, second: tuple, same: bool, tmp_path: Path) -> None:
    net = Net()
    named = {"x": net.input(["N", 4, 6, 6]), "_": "", "t": net.constant(np.array(True))}
    named |= {"a": net.relu("x"), "b": net.op("Neg", "x"), "u": net.op("Sigmoid", "x")}
    for op, reads, attributes in (first, second):
        net.output(net.op("Exp", net.op(op, *(named[i] for i in reads), **attributes)))
    model = light(net.proto(), tmp_path)
    DeduplicateInitializers()(model)
    MergeIdenticalNodes()(model)
    assert operators(model).count(first[0]) == (1 if same else 2)
    assert operators(model).count("Exp") == (1 if same else 2)


def test_a_kernel_shape_that_says_what_the_weight_says_makes_no_difference(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 4, 6, 6])
    weight = net.normal(3, 4, 3, 3)
    plain = net.op("Conv", "x", weight)
    spelled = net.op("Conv", "x", weight, kernel_shape=[3, 3], group=1, dilations=[1, 1], auto_pad="NOTSET")
    net.output(plain, spelled)
    assert operators(merged(net.proto(), tmp_path)) == ["Conv", "Identity"]


@pytest.mark.parametrize("batch", ["N", 3])
def test_reshapes_to_the_same_shape_are_the_same(batch: str | int, tmp_path: Path) -> None:
    net = Net()
    net.input([batch, 4, 6, 1])
    size = net.op("Unsqueeze", net.op("Gather", net.op("Shape", "x"), net.constant(np.int64(0))), net.ints(0))
    ways = [
        net.op("Flatten", "x"),
        net.op("Reshape", "x", net.ints(-1, 24)),
        net.op("Reshape", "x", net.ints(0, -1)),
        net.op("Reshape", "x", net.op("Concat", size, net.ints(24), axis=0)),
        net.op("Flatten", net.op("Squeeze", "x", net.ints(3))),
    ]
    other = net.op("Reshape", "x", net.ints(-1, 12))
    net.output(
        *(net.op(op, x) for op, x in zip(("Exp", "Neg", "Abs", "Tanh", "Sin"), ways, strict=True)), net.relu(other)
    )
    model = light(net.proto(), tmp_path)
    infer_shapes(model)
    while fold_stored(model):
        infer_shapes(model)
    DeduplicateInitializers()(model)
    MergeIdenticalNodes()(model)
    assert sorted(operators(model)) == ["Abs", "Exp", "Flatten", "Neg", "Relu", "Reshape", "Sin", "Tanh"]
    assert_bits(net.proto(), model, feeds_for(net.proto()))


def test_custom_operators_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 4])
    net.output(*(net.op("Gelu", "x", domain="com.microsoft") for _ in range(2)))
    proto = net.proto(infer=False)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert operators(merged(proto, tmp_path)) == ["Gelu", "Gelu"]


def test_copies_are_dropped(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 4])
    x = net.op("Dropout", net.relu(net.op("Cast", net.op("Identity", "x"), to=1)))
    net.output(x, net.op("Identity", x), net.op("Identity", net.relu("x")), net.op("Identity", "x"))
    assert sorted(operators(merged(net.proto(), tmp_path))) == ["Identity", "Identity", "Identity", "Relu"]


def branch(name: str, op: str, read: str) -> onnx.GraphProto:
    made = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, [read], [f"{name}_out"], name=f"{name}_node")], name, [], [made])


def conditional(*pairs: tuple[str, str, str]) -> onnx.ModelProto:
    """One If for each (operator of then, operator of else, value that both read)."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "half"], ["c"]),
    ]
    outputs = []
    for number, (then, otherwise, read) in enumerate(pairs):
        graphs = {"then_branch": branch(f"t{number}", then, read), "else_branch": branch(f"e{number}", otherwise, read)}
        nodes.append(helper.make_node("If", ["c"], [f"y{number}"], **graphs))
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, ["N", 4]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    half = numpy_helper.from_array(np.float32(0.5), "half")
    graph = helper.make_graph(nodes, "g", [x], outputs, [half])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_equal_sub_graphs_that_capture_the_same_are_one(tmp_path: Path) -> None:
    model = merged(
        conditional(("Exp", "Neg", "r"), ("Exp", "Neg", "r"), ("Exp", "Abs", "r"), ("Exp", "Neg", "x")), tmp_path
    )
    assert operators(model).count("If") == 3


def test_a_random_operator_inside_a_branch_keeps_the_branches_apart(tmp_path: Path) -> None:
    model = light(conditional(("RandomNormalLike", "Neg", "r"), ("RandomNormalLike", "Neg", "r")), tmp_path)
    MergeIdenticalNodes()(model)
    assert operators(model).count("If") == 2


# --- initializers -----------------------------------------------------------------------------------------------------


def test_only_equal_type_shape_and_bytes_are_one(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 4])
    row = np.arange(4, dtype=np.float32)
    for array in (row, row.copy(), row[None], row.astype(np.float64), row + np.float32(1e-7), -0.0 * row, 0.0 * row):
        value = net.op("Cast", net.constant(array), to=1)
        net.output(net.op("Add", "x", value))
    model = light(net.proto(), tmp_path)
    DeduplicateInitializers()(model)
    kinds = sorted(value.const_value.dtype.name for value in model.graph.initializers.values())
    assert kinds == ["DOUBLE", "FLOAT", "FLOAT", "FLOAT", "FLOAT", "FLOAT"]  # the two equal rows are one


def test_strings_are_compared_one_by_one() -> None:
    texts = [oir.StringTensor(np.array(pair, object), name="a") for pair in ([b"ab", b"c"], [b"a", b"bc"])]
    assert digest(texts[0]) != digest(texts[1])


def test_a_digest_is_the_same_on_disk_and_in_memory(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 64])
    net.output(net.matmul("x", 64))
    model = oir.from_proto(net.proto())
    save(model, tmp_path / "a.onnx", beside=True)
    stored = oir.load(tmp_path / "a.onnx")
    assert is_external(stored) and not is_external(model)
    for name, value in model.graph.initializers.items():
        assert digest(value.const_value) == digest(stored.graph.initializers[name].const_value)
    assert stored_bytes(tmp_path / "a.onnx") == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_external_data_come_into_a_small_file(tmp_path: Path) -> None:
    net = Net()
    net.output(net.matmul(net.input(["N", 64]), 64))
    folder = tmp_path / "far"
    folder.mkdir()
    save(oir.from_proto(net.proto()), folder / "a.onnx", beside=True)
    save(oir.load(folder / "a.onnx"), tmp_path / "b.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"far", "b.onnx"}
    assert_bits(net.proto(), onnx.load(tmp_path / "b.onnx"), feeds_for(net.proto()))


def test_a_missing_or_short_data_file_is_named(tmp_path: Path) -> None:
    net = Net()
    net.output(net.matmul(net.matmul(net.input(["N", 64]), 64), 64))
    path = tmp_path / "a.onnx"
    save(oir.from_proto(net.proto()), path, beside=True)
    data = tmp_path / "a.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"a\.onnx\.data: is truncated"):
        save(oir.load(path), tmp_path / "b.onnx", beside=True)
    data.unlink()
    with pytest.raises(ModelError, match=r"a\.onnx\.data: the external data file"):
        DeduplicateInitializers()(oir.load(path))
    assert {file.name for file in tmp_path.iterdir()} == {"a.onnx"}


def test_writing_a_small_model_over_a_large_one_removes_its_data(tmp_path: Path) -> None:
    net = Net()
    net.output(net.matmul(net.input(["N", 64]), 64))
    model = oir.from_proto(net.proto())
    save(model, tmp_path / "a.onnx", beside=True)
    save(oir.load(tmp_path / "a.onnx"), tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert_bits(net.proto(), onnx.load(tmp_path / "a.onnx"), feeds_for(net.proto()))


# --- names and inputs -------------------------------------------------------------------------------------------------


def test_prefixes_reach_every_name(tmp_path: Path) -> None:
    proto = conditional(("Exp", "Neg", "r"))
    model = light(proto, tmp_path)
    PrefixNames("T/")(model)
    back = oir.to_proto(model)
    names = {
        name for graph in model.graphs() for node in graph for name in (node.name, *(o.name for o in node.outputs))
    }
    names |= {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    assert all(name.startswith("T/") for name in names)
    assert back.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "T/N"
    feeds = feeds_for(proto)
    assert_bits(proto, model, {"T/x": feeds["x"]} | feeds)


def two_inputs(first: list, second: list) -> oir.Model:
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)
        for n, shape in zip("ab", (first, second), strict=True)
    ]
    nodes = [helper.make_node("Relu", ["a"], ["c"]), helper.make_node("Neg", ["b"], ["d"])]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "cd"]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return oir.from_proto(onnx.shape_inference.infer_shapes(model))


def test_a_fixed_axis_wins_over_a_symbolic_one_everywhere() -> None:
    model = two_inputs(["M", 4], [3, "K"])
    TieInputs({"x": ["a", "b"]})(model)
    (value,) = model.graph.inputs
    assert (value.name, list(value.shape)) == ("x", [3, 4])
    assert [list(output.shape) for output in model.graph.outputs] == [[3, 4], [3, 4]]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    ours = execute(model, {"x": x})
    np.testing.assert_array_equal(list(ours.values()), [x, -x])


def test_symbols_that_meet_are_one_symbol() -> None:
    model = two_inputs(["M", 4], ["K", 4])
    TieInputs({"a": ["a", "b"]})(model)
    assert [output.shape[0].value for output in model.graph.outputs] == ["M", "M"]


@pytest.mark.parametrize(("first", "second"), [(["N", 4], ["N", 5]), (["N", 4], ["N", 4, 4]), (["K", "K"], [3, 4])])
def test_contradictory_shapes_are_refused(first: list, second: list) -> None:
    with pytest.raises(UsageError, match=r"the inputs a .* and b .* contradict"):
        TieInputs({"x": ["a", "b"]}).call(two_inputs(first, second))


# --- folding and opsets -----------------------------------------------------------------------------------------------


def folded(net: Net, folder: Path) -> oir.Model:
    model = light(net.proto(), folder)
    infer_shapes(model)
    fold_stored(model)
    MergeIdenticalNodes()(model)
    assert_bits(net.proto(), model, feeds_for(net.proto()))
    assert (
        sum(v.const_value.nbytes for v in model.graph.initializers.values())
        <= sum(len(t.raw_data) for t in net.proto().graph.initializer) + 1024
    )
    return model


def test_a_transposed_weight_is_folded(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 40])
    weight = net.op("Reshape", net.op("Transpose", net.normal(30, 40), perm=[1, 0]), net.ints(40, 30))
    net.output(net.op("MatMul", "x", net.op("Mul", weight, net.constant(np.float32(0.1)))))
    assert operators(folded(net, tmp_path)) == ["MatMul"]


def test_a_weight_that_is_also_read_unfolded_stays(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 40])
    weight = net.normal(30, 40)
    transposed = net.op("Transpose", weight, perm=[1, 0])
    net.output(net.op("MatMul", net.op("MatMul", "x", transposed), weight))
    assert operators(folded(net, tmp_path)) == ["Transpose", "MatMul", "MatMul"]


def test_decoded_weights_stay_as_stored(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 40])
    half = net.op("Cast", net.constant(np.ones((40, 40), np.float16)), to=1)
    small = net.constant(np.ones((40, 40), np.int8))
    scale, zero = net.constant(np.float32(0.5)), net.constant(np.int8(1))
    net.output(net.op("MatMul", net.op("MatMul", "x", half), net.op("DequantizeLinear", small, scale, zero)))
    assert operators(folded(net, tmp_path)) == ["Cast", "MatMul", "DequantizeLinear", "MatMul"]


def test_shape_arithmetic_over_known_sizes_is_folded(tmp_path: Path) -> None:
    net = Net()
    net.input([2, 3, 4, 4])
    shape = net.op("Shape", "x")
    last = net.op("Gather", shape, net.constant(np.int64(3)))
    target = net.op(
        "Concat", net.ints(2), net.op("Unsqueeze", net.op("Mul", last, last), net.ints(0)), net.ints(-1), axis=0
    )
    net.output(net.op("Reshape", "x", target))
    assert operators(folded(net, tmp_path)) == ["Reshape"]


def test_a_spread_constant_is_not_stored(tmp_path: Path) -> None:
    net = Net()
    net.input([64, 64])
    net.output(net.op("Add", "x", net.op("Expand", net.constant(np.float32(1)), net.ints(64, 64))))
    assert operators(folded(net, tmp_path)) == ["Expand", "Add"]


def test_folding_weights_on_disk_does_not_load_them(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 40])
    net.output(net.op("MatMul", "x", net.op("Transpose", net.normal(30, 40), perm=[1, 0])))
    save(oir.from_proto(net.proto()), tmp_path / "a.onnx", beside=True)
    model = read_light(tmp_path / "a.onnx")
    fold_stored(model)
    (weight,) = (v.const_value for v in model.graph.initializers.values() if v.uses())
    assert isinstance(weight, oir.LazyTensor) and operators(model) == ["MatMul"]
    save(model, tmp_path / "b.onnx", beside=True)
    save(oir.load(tmp_path / "b.onnx"), tmp_path / "c.onnx")
    assert_bits(net.proto(), onnx.load(tmp_path / "c.onnx"), feeds_for(net.proto()))


@pytest.mark.parametrize("beside", [False, True])
def test_raising_the_opset_leaves_weights_where_they_are(beside: bool, tmp_path: Path) -> None:
    net = Net(opset=11)
    net.input(["N", 4, 1, 40])
    x = net.op("Squeeze", "x", axes=[2], channels=40)
    x = net.op("Softmax", net.matmul(x, 64), axis=2)
    net.output(net.op("ReduceSum", x, axes=[1], keepdims=0))
    save(oir.from_proto(net.proto()), tmp_path / "old.onnx", beside=beside)
    model = read_light(tmp_path / "old.onnx")
    raise_light_opset(model, 18)
    assert model.opset_imports[""] == 18
    assert is_external(model) == beside
    save(model, tmp_path / "new.onnx")
    assert_bits(net.proto(), onnx.load(tmp_path / "new.onnx"), feeds_for(net.proto()))


def test_a_cycle_is_one_sentence(tmp_path: Path) -> None:
    net = Net()
    net.input(["N", 4])
    net.output(net.relu("x"))
    proto = net.proto()
    proto.graph.node[0].input[0] = proto.graph.node[0].output[0]
    with pytest.raises(ModelError, match=r"model\.onnx: .*cycle"):
        light(proto, tmp_path)


def test_names_and_order_make_no_difference(tmp_path: Path) -> None:
    """What is merged depends on the graph alone: shuffled initializers give the same number of nodes and bytes."""
    proto = twins(lambda net, x: net.relu(net.conv(net.norm(net.conv(x, 5)), 3)))
    results = set()
    for seed in range(5):
        shuffled = onnx.ModelProto.FromString(proto.SerializeToString())
        tensors = list(shuffled.graph.initializer)
        random.Random(seed).shuffle(tensors)
        shuffled.graph.ClearField("initializer")
        shuffled.graph.initializer.extend(tensors)
        model = merged(shuffled, tmp_path)
        results.add((tuple(operators(model)), len(model.graph.initializers)))
    assert len(results) == 1
