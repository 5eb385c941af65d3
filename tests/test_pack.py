"""pack and extract on files: what is shared, what stays apart, and that the outputs never change."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Net, feeds_for
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_law import random_nets
from typer.testing import CliRunner

import onnxmerge
from onnxmerge.cli.app import app
from onnxmerge.errors import GateFailed, ModelError, UsageError
from onnxmerge.report.recipe import as_recipe, history
from onnxmerge.report.schema import Result
from onnxmerge.runtime.session import open_session, run

Feeds = dict[str, np.ndarray]

BACKBONE = ["Conv", "BatchNormalization", "Relu", "Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Flatten"]


def backbone(net: Net, x: str = "x") -> str:
    for out in (6, 8):
        x = net.relu(net.norm(net.conv(x, out)))
    return net.flatten(net.op("GlobalAveragePool", x), 8)


def classifier(head: int, classes: int, opset: int = 18, name: str = "x", batch: int | str = "N") -> Net:
    """One backbone whatever the arguments, and a head with weights drawn from `head`."""
    net = Net(seed=0, opset=opset)
    features = backbone(net, net.input([batch, 3, 9, 9], name))
    net.generator = np.random.default_rng([1, head])
    net.output(net.op("Softmax", net.gemm(features, classes), axis=1))
    return net


def write(folder: Path, **models: Net | onnx.ModelProto) -> list[Path]:
    paths = []
    for name, model in models.items():
        paths.append(folder / f"{name}.onnx")
        onnx.save(model.proto() if isinstance(model, Net) else model, paths[-1])
    return paths


def outputs(path: Path, feeds: Feeds) -> Feeds:
    return run(open_session(path, threads=1), feeds)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def names(values: list) -> list[str]:
    return [value.name for value in values]


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def called(path: Path, task: str) -> dict[str, str]:
    """For each input of the task what the packed model calls it."""
    return json.loads(metadata(path)["onnxmerge.tasks"])[task]


def assert_same_bits(packed: Path, originals: list[Path], seed: int = 0) -> None:
    """Each task gives what its original gives, bit for bit, on inputs of its own where inputs are apart."""
    feeds: Feeds = {}
    for path in originals:
        own = feeds_for(onnx.load(path), seed=seed)
        feeds |= {called(packed, path.stem)[name]: array for name, array in own.items()}
    got = outputs(packed, feeds)
    for path in originals:
        own = {name: feeds[there] for name, there in called(packed, path.stem).items()}
        for name, array in outputs(path, own).items():
            assert got[f"{path.stem}/{name}"].tobytes() == array.tobytes(), (path.stem, name)


def pack(paths: list[Path], **options: object) -> Path:
    target = paths[0].with_name("packed.onnx")
    onnxmerge.pack_models(paths, target, overwrite=True, threads=1, **options)
    return target


def reexport(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """As another exporter might have written it: other names inside, other orders of nodes and initializers."""
    chance = random.Random(seed)
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    inside = [t.name for t in graph.initializer] + [name for node in graph.node for name in node.output]
    numbers = chance.sample(range(10 * len(inside)), len(inside))
    new = {old: f"{number}" for old, number in zip(inside, numbers, strict=True) if old not in kept}
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in graph.node:
        node.name = f"n{chance.random()}"
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    tensors = chance.sample(list(graph.initializer), len(graph.initializer))
    waiting, ready, nodes = list(graph.node), {t.name for t in tensors} | {i.name for i in graph.input} | {""}, []
    while waiting:
        node = chance.choice([node for node in waiting if set(node.input) <= ready])
        waiting.remove(node)
        nodes.append(node)
        ready |= set(node.output)
    for field, values in (("node", nodes), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    graph.ClearField("value_info")
    return proto


# --- one backbone, several heads --------------------------------------------------------------------------------------


def test_a_shared_backbone_is_stored_and_computed_once(tmp_path: Path) -> None:
    paths = write(tmp_path, cats=classifier(1, 5), dogs=classifier(2, 3))
    result = onnxmerge.pack_models(paths, tmp_path / "packed.onnx")
    packed = tmp_path / "packed.onnx"
    assert operators(packed) == [*BACKBONE, "Gemm", "Softmax", "Gemm", "Softmax"]
    proto = onnx.load(packed)
    onnx.checker.check_model(proto, full_check=True)
    assert names(proto.graph.input) == ["x"]
    assert names(proto.graph.output) == [f"{path.stem}/{onnx.load(path).graph.output[0].name}" for path in paths]
    assert {node.name.split("/")[0] for node in proto.graph.node} == {"shared", "cats", "dogs"}
    assert len(proto.graph.initializer) == 12 + 4
    assert_same_bits(packed, paths)
    (candidate,) = result.candidates
    own = sum(record.parameters for record in result.inputs)
    shared = sum(numpy_helper.to_array(t).size for t in onnx.load(paths[0]).graph.initializer) - 8 * 5 - 5
    assert candidate.parameters == own - shared
    assert {task: score.relative_error for task, score in candidate.tasks.items()} == {"cats": 0.0, "dogs": 0.0}


def test_three_models(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3), c=classifier(3, 7))
    packed = pack(paths)
    assert operators(packed) == [*BACKBONE, *["Gemm", "Softmax"] * 3]
    assert_same_bits(packed, paths)


@pytest.mark.parametrize("seed", range(3))
def test_another_numbering_and_order_make_no_difference(seed: int, tmp_path: Path) -> None:
    second = reexport(classifier(2, 3).proto(), seed)
    paths = write(tmp_path, a=classifier(1, 5), b=second)
    packed = pack(paths)
    assert sorted(operators(packed)) == sorted([*BACKBONE, *["Gemm", "Softmax"] * 2])
    assert_same_bits(packed, paths)


def test_constants_folded_by_one_exporter_only(tmp_path: Path) -> None:
    """One file holds Transpose(weight), computed shapes and Constant nodes, the other what they come to."""
    weight = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    plain = Net()
    plain.input([2, 3, 4, 4])
    flat = plain.op("Reshape", "x", plain.ints(2, 48))
    plain.output(plain.relu(plain.op("MatMul", flat, plain.constant(np.ascontiguousarray(weight.T)))))
    wordy = Net()
    wordy.input([2, 3, 4, 4])
    batch = wordy.op(
        "Unsqueeze", wordy.op("Gather", wordy.op("Shape", "x"), wordy.constant(np.int64(0))), wordy.ints(0)
    )
    forty_eight = wordy.op("Constant", value=numpy_helper.from_array(np.array([48])))
    flat = wordy.op("Reshape", wordy.op("Identity", "x"), wordy.op("Concat", batch, forty_eight, axis=0))
    transposed = wordy.op("Transpose", wordy.constant(weight), perm=[1, 0])
    wordy.output(wordy.op("Tanh", wordy.op("MatMul", flat, transposed)))
    paths = write(tmp_path, plain=plain, wordy=wordy)
    packed = pack(paths)
    assert operators(packed) == ["Reshape", "MatMul", "Relu", "Tanh"]
    assert packed.stat().st_size < 1.3 * weight.nbytes
    assert_same_bits(packed, paths)


def test_different_opsets_meet(tmp_path: Path) -> None:
    paths = write(tmp_path, old=classifier(1, 5, opset=11), new=classifier(2, 3, opset=18))
    packed = pack(paths)
    assert operators(packed) == [*BACKBONE, "Gemm", "Softmax", "Gemm", "Softmax"]
    assert onnx.load(packed).opset_import[0].version == 18
    assert_same_bits(packed, paths)


def test_operands_in_another_order(tmp_path: Path) -> None:
    def build(swapped: bool, last: str) -> Net:
        net = Net()
        net.input(["N", 3, 8, 8])
        left, right = net.op("Tanh", net.conv("x", 4)), net.op("Tanh", net.conv("x", 4))
        net.output(net.op(last, net.op("Add", *((right, left) if swapped else (left, right)))))
        return net

    paths = write(tmp_path, a=build(False, "Relu"), b=build(True, "Sigmoid"))
    packed = pack(paths)
    assert sorted(operators(packed)) == ["Add", "Conv", "Conv", "Relu", "Sigmoid", "Tanh", "Tanh"]
    assert_same_bits(packed, paths)


def test_nothing_in_common_but_every_name(tmp_path: Path) -> None:
    def build(seed: int) -> Net:
        net = Net(seed)
        net.input(["N", 3, 8, 8])
        net.head(net.norm(net.conv("x", 4)))
        return net

    paths = write(tmp_path, a=build(1), b=build(2))
    assert names(onnx.load(paths[0]).graph.node) == names(onnx.load(paths[1]).graph.node)
    packed = pack(paths)
    assert len(operators(packed)) == 2 * len(operators(paths[0]))
    onnx.checker.check_model(onnx.load(packed), full_check=True)
    assert_same_bits(packed, paths)


def test_the_same_model_twice_keeps_both_outputs(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a=classifier(1, 5))
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(onnx.load(path), other / "a.onnx")
    packed = tmp_path / "packed.onnx"
    onnxmerge.pack_models([path, other / "a.onnx"], packed, threads=1)
    assert operators(packed) == [*BACKBONE, "Gemm", "Softmax", "Identity"]
    first, second = outputs(packed, feeds_for(onnx.load(path))).items()
    assert (first[0].split("/")[0], second[0].split("/")[0]) == ("a", "a_2")
    assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.slow
def test_random_pairs_share_what_is_equal(tmp_path: Path) -> None:
    """The second model is the first, written by another exporter, with some weights changed: all that does not depend
    on these is computed once.
    """

    @settings(max_examples=60)
    @given(random_nets(), st.integers(0, 2**20))
    def shares(net: Net, seed: int) -> None:
        first = net.proto()
        second = onnx.ModelProto.FromString(first.SerializeToString())
        floats = [t for t in second.graph.initializer if t.data_type == TensorProto.FLOAT]
        changed = set()
        for tensor in random.Random(seed).sample(floats, min(len(floats), 1 + seed % 3)):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
            changed.add(tensor.name)
        dependent = 0
        for node in second.graph.node:
            if changed & set(node.input):
                changed |= set(node.output)
                dependent += 1
        paths = write(tmp_path, a=first, b=reexport(second, seed))
        packed = pack(paths, check=False)
        alone = tmp_path / "alone.onnx"
        onnxmerge.extract_task(packed, "a", alone, overwrite=True)
        assert len(operators(packed)) <= len(operators(alone)) + dependent
        assert_same_bits(packed, paths, seed)

    shares()


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_of_one_name_are_tied_and_others_kept(tmp_path: Path) -> None:
    second = classifier(2, 3)
    scale = second.input(["N", 3], "scale")
    second.output(second.op("Mul", second.outputs.pop().name, scale))
    paths = write(tmp_path, a=classifier(1, 5), b=second)
    packed = pack(paths)
    assert names(onnx.load(packed).graph.input) == ["x", "scale"]
    assert_same_bits(packed, paths)


def test_share_input_ties_other_names(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3, name="image:0"), c=classifier(3, 4, name="y=z"))
    packed = pack(paths)
    assert names(onnx.load(packed).graph.input) == ["x", "image:0", "y=z"]
    assert operators(packed).count("Conv") == 6
    packed = pack(paths, share_inputs=["c:y=z=b:image:0"])
    assert names(onnx.load(packed).graph.input) == ["x", "y=z"]
    assert operators(packed).count("Conv") == 4
    packed = pack(paths, share_inputs=["a:x=b:image:0=c:y=z"])
    assert names(onnx.load(packed).graph.input) == ["x"]
    assert operators(packed).count("Conv") == 2
    assert_same_bits(packed, paths)
    onnxmerge.extract_task(packed, "b", tmp_path / "back.onnx")
    assert names(onnx.load(tmp_path / "back.onnx").graph.input) == ["image:0"]


def test_separate_inputs(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3), c=classifier(3, 4))
    packed = pack(paths, separate_inputs=True)
    assert names(onnx.load(packed).graph.input) == ["a/x", "b/x", "c/x"]
    shapes = [value.type.tensor_type.shape.dim[0].dim_param for value in onnx.load(packed).graph.input]
    assert len(set(shapes)) == 3, "batches of untied inputs are not the same batch"
    assert operators(packed).count("Conv") == 6
    assert len(onnx.load(packed).graph.initializer) == 12 + 6, "the weights are shared all the same"
    assert_same_bits(packed, paths)
    packed = pack(paths, separate_inputs=True, share_inputs=["a:x=c:x"])
    assert names(onnx.load(packed).graph.input) == ["x", "b/x"]
    assert_same_bits(packed, paths)


def test_contradictory_inputs_stay_apart_with_a_note(tmp_path: Path) -> None:
    def build(size: int) -> Net:
        net = Net()
        net.input(["N", size])
        net.output(net.gemm("x", 3))
        return net

    paths = write(tmp_path, a=build(4), b=build(5), c=build(4))
    result = onnxmerge.pack_models(paths, tmp_path / "packed.onnx", threads=1)
    assert names(onnx.load(tmp_path / "packed.onnx").graph.input) == ["x", "b/x"]
    assert_same_bits(tmp_path / "packed.onnx", paths)
    (note,) = (note for note in result.notes if "not tied" in note)
    assert "b:x (float [N, 5])" in note and "a:x (float [N, 4])" in note
    with pytest.raises(UsageError, match=r"a:x \(float \[N, 4\]\) and b:x \(float \[N, 5\]\) cannot be one input"):
        pack(paths, share_inputs=["a:x=b:x"])
    packed = pack(paths[:2])
    assert names(onnx.load(packed).graph.input) == ["a/x", "b/x"]


def test_a_fixed_batch_wins(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3, batch=2))
    packed = pack(paths)
    proto = onnx.load(packed)
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in (*proto.graph.input, *proto.graph.output)] == [
        2
    ] * 3
    assert operators(packed).count("Conv") == 2
    assert_same_bits(packed, paths)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("a:x=b:y", "no input is called 'b:y'; there are a:x, b:x"),
        ("a:x", "at least two"),
        ("a:x=a:x", "named twice"),
        ("nonsense", "no input is called 'nonsense'"),
    ],
)
def test_share_input_errors(asked: str, message: str, tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3))
    with pytest.raises(UsageError, match=message):
        pack(paths, share_inputs=[asked])
    assert not (tmp_path / "packed.onnx").exists()


# --- unusual graphs ---------------------------------------------------------------------------------------------------


def looping(constant: float) -> onnx.ModelProto:
    """Three rounds of x -> relu(x + w) in a Loop whose body captures w, then an If on the sum."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["on"], name="keep"),
            helper.make_node("Add", ["state", "w"], ["sum"], name="add"),
            helper.make_node("Relu", ["sum"], ["next"], name="relu"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["looped"], [f"{name}_out"], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Exp"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Loop", ["rounds", "", "x"], ["looped"], name="loop", body=body),
        helper.make_node("ReduceMax", ["looped"], ["most"], name="max", keepdims=0),
        helper.make_node("Less", ["most", "limit"], ["small"], name="less"),
        helper.make_node("If", ["small"], ["y"], name="if", **branches),
    ]
    weights = [
        numpy_helper.from_array(np.array(3), "rounds"),
        numpy_helper.from_array(np.linspace(-1, 1, 4, dtype=np.float32), "w"),
        numpy_helper.from_array(np.float32(constant), "limit"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_loops_and_branches_survive_and_are_shared(tmp_path: Path) -> None:
    paths = write(tmp_path, a=looping(2.0), b=looping(0.0), c=looping(2.0))
    packed = pack(paths)
    assert sorted(operators(packed)) == sorted(["Loop", "ReduceMax", "Less", "Less", "If", "If", "Identity"])
    assert_same_bits(packed, paths)
    for path in paths:
        onnxmerge.extract_task(packed, path.stem, tmp_path / "back.onnx", overwrite=True)
        feeds = feeds_for(onnx.load(path))
        assert outputs(tmp_path / "back.onnx", feeds)["y"].tobytes() == outputs(path, feeds)["y"].tobytes()


def test_custom_operators_survive(tmp_path: Path) -> None:
    def build(last: str) -> onnx.ModelProto:
        net = Net(opset=11 if last == "Relu" else 18)
        net.input(["N", 3])
        net.output(net.op(last, net.op("Gelu", net.gemm("x", 4), domain="com.microsoft")))
        proto = net.proto(infer=False)
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return proto

    paths = write(tmp_path, a=build("Relu"), b=build("Tanh"))
    packed = pack(paths)
    assert sorted(operators(packed)) == ["Gelu", "Gelu", "Gemm", "Relu", "Tanh"]
    assert_same_bits(packed, paths)


def test_custom_operator_sets_of_different_versions_are_refused(tmp_path: Path) -> None:
    protos = []
    for version in (1, 2):
        net = Net()
        net.input(["N", 3])
        net.output(net.op("Thing", "x", domain="my.company"))
        protos.append(net.proto(infer=False))
        protos[-1].opset_import.append(helper.make_opsetid("my.company", version))
    with pytest.raises(ModelError, match=r"a uses version 1 of the operator set 'my.company' and b version 2"):
        pack(write(tmp_path, a=protos[0], b=protos[1]))


def test_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    def build(last: str) -> Net:
        net = Net()
        net.input(["N", 32])
        half = net.op("Cast", net.constant(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float16)), to=1)
        eight = net.constant(np.random.default_rng(1).integers(-9, 9, (32, 32)).astype(np.int8))
        dense = net.op("DequantizeLinear", eight, net.constant(np.float32(0.1)), net.constant(np.int8(0)))
        net.output(net.op(last, net.op("MatMul", net.op("MatMul", "x", half), dense)))
        return net

    paths = write(tmp_path, a=build("Relu"), b=build("Tanh"))
    packed = pack(paths)
    kinds = sorted((t.data_type, len(t.raw_data)) for t in onnx.load(packed).graph.initializer)
    assert kinds == [(1, 4), (3, 1), (3, 32 * 32), (10, 2 * 32 * 32)]
    assert_same_bits(packed, paths)


def test_random_operators_are_told_and_not_compared(tmp_path: Path) -> None:
    def build() -> Net:
        net = Net()
        net.input(["N", 4])
        net.output(net.op("RandomNormalLike", net.relu("x")))
        return net

    paths = write(tmp_path, a=build(), b=build())
    result = onnxmerge.pack_models(paths, tmp_path / "packed.onnx", threads=1)
    assert operators(tmp_path / "packed.onnx") == ["Relu", "RandomNormalLike", "RandomNormalLike"]
    assert any("a draws random numbers" in note for note in result.notes)


def passing_through() -> onnx.ModelProto:
    """Its outputs: a computed value, the input itself, and a weight."""
    net = Net()
    x, weight = net.input(["N", 4]), net.normal(3)
    net.output(net.relu(x))
    proto = net.proto()
    proto.graph.output.append(proto.graph.input[0])
    proto.graph.output.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, [3]))
    return proto


def test_unknown_operators_cannot_be_compared_but_packed(tmp_path: Path) -> None:
    def build() -> onnx.ModelProto:
        net = Net()
        net.input(["N", 3])
        net.output(net.op("Thing", net.relu("x"), domain="my.company"))
        proto = net.proto(infer=False)
        proto.opset_import.append(helper.make_opsetid("my.company", 1))
        return proto

    paths = write(tmp_path, a=build(), b=build())
    result = onnxmerge.pack_models(paths, tmp_path / "packed.onnx", threads=1)
    assert operators(tmp_path / "packed.onnx") == ["Relu", "Thing", "Thing"]
    assert any("Nothing was compared" in note and "my.company" in note for note in result.notes)
    assert result.candidates[0].tasks == {}


@pytest.mark.parametrize("separate", [False, True])
def test_outputs_that_are_inputs_or_weights(separate: bool, tmp_path: Path) -> None:
    paths = write(tmp_path, a=passing_through(), b=passing_through())
    packed = pack(paths, separate_inputs=separate)
    assert names(onnx.load(packed).graph.output) == ["a/v1", "a/x", "a/c0", "b/v1", "b/x", "b/c0"]
    assert_same_bits(packed, paths)
    back = onnx.load(extracted(packed, "b"))
    assert (names(back.graph.input), names(back.graph.output)) == (["x"], ["v1", "x", "c0"])


def test_a_task_may_be_called_like_our_own_prefix(tmp_path: Path) -> None:
    paths = write(tmp_path, shared=classifier(1, 5), b=classifier(2, 3))
    packed = pack(paths)
    assert operators(packed) == [*BACKBONE, *["Gemm", "Softmax"] * 2]
    assert_same_bits(packed, paths)


def test_functions_are_inlined(tmp_path: Path) -> None:
    def build(last: str) -> onnx.ModelProto:
        twice = helper.make_function(
            "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
        )
        net = Net()
        net.input(["N", 3])
        net.output(net.op(last, net.op("Twice", "x", domain="local")))
        proto = net.proto(infer=False)
        proto.opset_import.append(helper.make_opsetid("local", 1))
        proto.functions.append(twice)
        return proto

    paths = write(tmp_path, a=build("Relu"), b=build("Tanh"))
    packed = pack(paths)
    assert operators(packed) == ["Add", "Relu", "Tanh"]
    assert_same_bits(packed, paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_basic", "yolo", "lstm"])
def test_exports_of_one_network_at_several_opsets_are_one(name: str, tmp_path: Path) -> None:
    """With any batch and with a batch of 1; also norms unfolded, weights transposed and initializers as inputs."""
    from zoo.exporting import export

    shared = {}
    for exporter, opsets in {"legacy": (11, 13, 17), "unfolded": (12, 16)}.items():
        paths = [tmp_path / f"{exporter}{opset}.onnx" for opset in opsets]
        for path, opset in zip(paths, opsets, strict=True):
            export(name, exporter, opset, path)
        result = onnxmerge.pack_models(paths, tmp_path / f"{exporter}.onnx", threads=1)
        (candidate,) = result.candidates
        assert max(score.relative_error or 0.0 for score in candidate.tasks.values()) < 1e-6
        shared[exporter] = candidate.bytes / max(record.bytes for record in result.inputs)
    assert max(shared.values()) < 1.1, shared


# --- extract ----------------------------------------------------------------------------------------------------------


def extracted(packed: Path, task: str) -> Path:
    path = packed.with_name(f"{task}_back.onnx")
    onnxmerge.extract_task(packed, task, path, overwrite=True)
    return path


def test_extract_gives_the_original_back(tmp_path: Path) -> None:
    protos = {"a": classifier(1, 5).proto(), "b": classifier(2, 3).proto()}
    protos["a"].metadata_props.add(key="author", value="me")
    protos["a"].doc_string = "A net."
    paths = write(tmp_path, **protos)
    packed = pack(paths)
    assert metadata(packed)["a/author"] == "me" and metadata(packed)["a/doc_string"] == "A net."
    for path in paths:
        back, original = onnx.load(extracted(packed, path.stem)), onnx.load(path)
        onnx.checker.check_model(back, full_check=True)
        assert names(back.graph.input) == names(original.graph.input)
        assert names(back.graph.output) == names(original.graph.output)
        assert [node.op_type for node in back.graph.node] == [node.op_type for node in original.graph.node]
        assert len(back.graph.initializer) == len(original.graph.initializer)
        feeds = feeds_for(original)
        for name, array in outputs(path, feeds).items():
            assert outputs(extracted(packed, path.stem), feeds)[name].tobytes() == array.tobytes()
    assert metadata(extracted(packed, "a"))["author"] == "me"
    assert onnx.load(extracted(packed, "a")).doc_string == "A net."
    assert "author" not in metadata(extracted(packed, "b"))


def test_a_packed_model_can_be_packed_and_unpacked(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3), c=classifier(3, 7))
    inner = tmp_path / "inner.onnx"
    onnxmerge.pack_models(paths[:2], inner, threads=1)
    packed = pack([inner, paths[2], paths[0]])
    assert operators(packed) == [*BACKBONE, *["Gemm", "Softmax"] * 3, "Identity"]
    assert_same_bits(packed, [inner, paths[2], paths[0]])
    back = extracted(packed, "inner")
    assert names(onnx.load(back).graph.output) == names(onnx.load(inner).graph.output)
    assert_same_bits(back, paths[:2])
    assert_same_bits(back, paths[:2])
    feeds = feeds_for(onnx.load(paths[1]))
    (expected,), (got,) = (outputs(path, feeds).values() for path in (paths[1], extracted(back, "b")))
    assert got.tobytes() == expected.tobytes()


def test_extract_from_a_zipped_model(tmp_path: Path) -> None:
    demo = Path(onnxmerge.__file__).parent / "demo"
    data = {task: demo / f"{task}.yaml" for task in ("digits", "fashion")}
    quick = onnxmerge.ZipSettings(steps=0, samples=100, measure=False, share="2", max_drop=None)
    onnxmerge.zip_models([demo / "digits.onnx", demo / "fashion.onnx"], data, tmp_path / "out", settings=quick)
    merged = tmp_path / "out/merged.onnx"
    feeds = feeds_for(onnx.load(merged))
    for task in data:
        back = extracted(merged, task)
        (name,) = names(onnx.load(back).graph.output)
        assert outputs(back, feeds)[name].tobytes() == outputs(merged, feeds)[f"{task}/{name}"].tobytes()
        assert len(operators(back)) < len(operators(merged))


def test_extract_errors(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3))
    packed = pack(paths)
    with pytest.raises(UsageError, match=r"packed\.onnx: has no task 'c'; its tasks are a, b"):
        onnxmerge.extract_task(packed, "c", tmp_path / "c.onnx")
    with pytest.raises(UsageError, match=r"a\.onnx: is no merged model"):
        onnxmerge.extract_task(paths[0], "a", tmp_path / "c.onnx")
    with pytest.raises(UsageError, match=r"b\.onnx: exists already"):
        onnxmerge.extract_task(packed, "b", paths[1])


# --- files and the command line ---------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_same_input_same_bytes(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=reexport(classifier(2, 3).proto(), 1), c=looping(1.0))
    contents = set()
    for _ in range(2):
        packed = pack(paths)
        contents.add((packed.read_bytes(), extracted(packed, "b").read_bytes(), extracted(packed, "c").read_bytes()))
    assert len(contents) == 1


def test_weights_beside_the_model_stay_beside_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    paths = []
    for name, net in {"a": classifier(1, 5), "b": classifier(2, 3)}.items():
        paths.append(tmp_path / "in" / f"{name}.onnx")
        onnx.save(net.proto(), paths[-1], save_as_external_data=True, location=f"{name}.bin", size_threshold=0)
    packed = tmp_path / "packed.onnx"
    result = onnxmerge.pack_models(paths, packed, threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "packed.onnx", "packed.onnx.data"}
    assert_same_bits(packed, paths)
    assert [r.bytes for r in result.inputs] == [
        path.stat().st_size + path.with_suffix(".bin").stat().st_size for path in paths
    ]
    size = sum(file.stat().st_size for file in tmp_path.glob("packed*"))
    assert result.candidates[0].bytes == size < sum(record.bytes for record in result.inputs)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("packed*"):
        file.rename(moved / file.name)
    assert_same_bits(moved / "packed.onnx", paths)
    extracted(moved / "packed.onnx", "a")
    assert {path.name for path in moved.glob("a_back*")} == {"a_back.onnx", "a_back.onnx.data"}


def test_a_failed_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxmerge.methods.pack.parity as parity

    real: Callable[..., parity.Difference] = parity.difference
    broken = {"largest": 1e-3, "identical": False}
    monkeypatch.setattr(parity, "difference", lambda *pair: parity.Difference(**(vars(real(*pair)) | broken)))
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3))
    with pytest.raises(GateFailed, match=r"the outputs of a differ from the original's by 1\.0e-03"):
        pack(paths)
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx"}
    assert command("pack", *paths, "-o", tmp_path / "packed.onnx")[0] == 1
    assert command("pack", *paths, "-o", tmp_path / "packed.onnx", "--no-check")[0] == 0


def test_the_command_line(tmp_path: Path) -> None:
    paths = write(tmp_path, a=classifier(1, 5), b=classifier(2, 3))
    out, report = tmp_path / "packed.onnx", tmp_path / "report.json"
    code, stdout, stderr = command("pack", *paths, "-o", out, "--json", "--report", report)
    assert code == 0, stderr
    result = Result.model_validate_json(stdout)
    assert json.loads(stdout) == json.loads(report.read_text())
    assert (result.method, result.chosen) == ("pack", "packed")
    (step,) = history(metadata(out))
    assert as_recipe([step], out) == result.recipe and step.versions["onnxmerge"]
    assert step.files == {record.path: record.sha256 for record in result.inputs}
    code, stdout, stderr = command("pack", *paths, "-o", out)
    assert (code, stdout) == (2, "") and "--overwrite" in stderr
    code, stdout, _ = command("pack", *paths, "-o", out, "--overwrite")
    assert code == 0 and "packed" in stdout and "bit for bit" in " ".join(stdout.split())
    code, stdout, stderr = command("extract", out, "--task", "a", "-o", tmp_path / "back.onnx", "--json")
    assert code == 0 and json.loads(stdout)["outputs"] == names(onnx.load(paths[0]).graph.output)
    code, _, stderr = command("extract", out, "--task", "nobody", "-o", tmp_path / "no.onnx")
    assert code == 2 and "its tasks are a, b" in stderr
    assert command("pack", paths[0], "-o", tmp_path / "one.onnx")[0] == 2
    assert command("pack", *paths, "-o", tmp_path / "absent/packed.onnx")[0] == 2
    (tmp_path / "junk.onnx").write_text("junk")
    assert command("pack", paths[0], tmp_path / "junk.onnx", "-o", tmp_path / "no.onnx")[0] == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_pack_on_real_networks(shared: Callable[[str], Path], tmp_path: Path) -> None:
    paths = [shared(name) for name in ("resnet20_cifar10", "ultraface_rfb_320", "ppocr_v2_cls", "candy_nc8_256")]
    result = onnxmerge.pack_models(paths, tmp_path / "packed.onnx", threads=1)
    assert result.candidates[0].bytes < 1.02 * sum(record.bytes for record in result.inputs)  # names grow longer
    assert max(score.relative_error for score in result.candidates[0].tasks.values()) < 1e-6
