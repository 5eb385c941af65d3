"""Bad files end in one sentence and exit code 2 or 3: never a hang, a crash, a traceback or a file from elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import onnx
import pytest
from graphs import Net, chain, residual
from onnx import TensorProto, helper
from typer.testing import CliRunner

from onnxmerge.cli.app import app
from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load, read


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def refused(tmp_path):
    """`refused(proto)` is the message of the error that reading it raises: one line that begins with the file."""

    def message(proto):
        file = tmp_path / "bad.onnx"
        file.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
        with pytest.raises(ModelError) as caught:
            read(file)
        text = str(caught.value)
        assert text.startswith(f"{file}: ")
        assert "\n" not in text
        result = CliRunner().invoke(app, ["inspect", str(file)])
        assert (result.exit_code, result.stderr) == (3, f"onnxmerge: error: {text}\n")
        return text

    return message


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_value_made_twice(refused):
    proto = chain().proto()
    relus = [node for node in proto.graph.node if node.op_type == "Relu"]
    relus[1].output[0] = relus[0].output[0]
    assert f"the value {relus[0].output[0]!r} is made twice, the second time by Relu {relus[1].name!r}" in refused(
        proto
    )


@pytest.mark.parametrize("taken", ["x", "c0"])
def test_a_value_with_the_name_of_an_input_or_initializer(taken, refused):
    proto = chain().proto()
    proto.graph.node[1].output[0] = taken
    assert f"the value {taken!r} is made twice" in refused(proto)


@pytest.mark.parametrize("kind", ["input", "initializer", "output"])
def test_a_name_that_stands_there_twice(kind, refused):
    proto = chain().proto()
    entries = getattr(proto.graph, kind)
    entries.append(entries[0])
    assert f"the {kind} {entries[0].name!r} stands there twice" in refused(proto)


def test_an_input_that_nothing_makes(refused):
    proto = chain().proto()
    node = proto.graph.node[3]
    node.input[0] = "nowhere"
    assert f"{node.op_type} {node.name!r} reads 'nowhere', which nothing makes" in refused(proto)


def test_an_output_that_nothing_makes(refused):
    proto = chain().proto()
    proto.graph.output[0].name = "nowhere"
    assert "nothing makes the output 'nowhere'" in refused(proto)


@pytest.mark.parametrize("reader", [0, 3])
def test_a_cycle(reader, refused):
    proto = chain().proto()
    proto.graph.node[reader].input[0] = proto.graph.node[5].output[0]
    assert "reads its own output (a cycle)" in refused(proto)


def test_a_cycle_through_the_body_of_an_if(refused):
    branch = helper.make_graph([helper.make_node("Neg", ["late"], ["b"], "inner")], "branch", [], [value("b")])
    net = Net()
    x = net.input([2])
    positive = net.op("Greater", net.op("ReduceMax", x, keepdims=0), net.constant(np.float32(0)))
    chosen = net.op("If", positive, then_branch=branch, else_branch=branch)
    net.output(net.op("Neg", chosen, name="late"))
    assert "cycle" in refused(net.proto(infer=False))


def test_bodies_in_bodies(tmp_path):
    def body():
        return helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [], [value("y")])

    graph = body()
    for _ in range(25):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=body())
        graph = helper.make_graph([node], "g", [], [value("y")])
    graph.input.extend([value("x", [2]), value("c", [], TensorProto.BOOL)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(proto, tmp_path / "m.onnx")
    load(tmp_path / "m.onnx")


def test_bodies_nested_too_deep(refused):
    """Written byte by byte, since protobuf does not write what it would not read."""

    def field(number, content):
        size, length = len(content), bytearray()
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *length, size]) + content

    graph = field(1, field(4, b"Neg"))
    for _ in range(3000):
        graph = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, graph)))
    output = field(12, field(1, b"y"))
    assert "is not a readable ONNX model" in refused(b"\x08\x08" + field(7, graph + output) + field(8, b"\x10\x12"))


def test_a_network_without_nodes_or_layers_is_read(tmp_path):
    empty = helper.make_graph([], "g", [value("x", [1, 4])], [value("x", [1, 4])])
    weightless = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", [1, 4])], [value("y")])
    for graph in (empty, weightless):
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx"
        )
        assert find_layers(load(tmp_path / "m.onnx")) == []
        assert CliRunner().invoke(app, ["inspect", str(tmp_path / "m.onnx")]).exit_code == 0


# --- nodes ------------------------------------------------------------------------------------------------------------


def first(proto, op_type):
    return next(node for node in proto.graph.node if node.op_type == op_type)


def test_a_required_input_that_is_left_out(refused):
    proto = chain().proto()
    node = first(proto, "BatchNormalization")
    node.input[2] = ""
    assert f"BatchNormalization {node.name!r} lacks input 2" in refused(proto)


@pytest.mark.parametrize(("op_type", "count"), [("Conv", 1), ("Conv", 4), ("Relu", 0), ("Gemm", 5)])
def test_a_wrong_number_of_inputs(op_type, count, refused):
    proto = chain().proto()
    node = first(proto, op_type)
    inputs = (list(node.input) * 3)[:count]
    node.ClearField("input")
    node.input.extend(inputs)
    assert f"{op_type} {node.name!r} has {count} inputs, but takes at" in refused(proto)


def test_attributes_that_the_operator_does_not_have(refused):
    proto = chain().proto()
    first(proto, "Relu").attribute.append(helper.make_attribute("slope", 0.1))
    assert "has the attribute 'slope', which opset 18 does not know" in refused(proto)


def test_an_attribute_of_a_wrong_type(refused):
    proto = chain().proto()
    node = first(proto, "Conv")
    attribute = next(a for a in node.attribute if a.name == "pads")
    attribute.CopyFrom(helper.make_attribute("pads", "none"))
    assert f"the attribute 'pads' of Conv {node.name!r} is of a wrong type" in refused(proto)


@pytest.mark.parametrize("number", [0, -1, 2**62])
def test_an_attribute_out_of_range(number, refused):
    proto = chain().proto()
    next(a for a in first(proto, "Conv").attribute if a.name == "group").i = number
    assert "the attribute 'group' of Conv" in refused(proto)


def test_a_missing_attribute(refused):
    net = Net()
    x = net.input([2, 3])
    net.output(net.op("Concat", x, x))
    assert "lacks the attribute 'axis'" in refused(net.proto(infer=False))


def test_an_operator_that_the_opset_dropped(refused):
    net = Net(opset=12)
    net.output(net.op("Upsample", net.input([1, 2, 3, 3]), net.constant(np.float32([1, 1, 2, 2]))))
    assert "no longer exists in opset 12" in refused(net.proto(infer=False))


def test_an_unknown_operator_of_the_standard_is_left_to_onnxruntime(tmp_path):
    net = Net()
    x = net.op("Frobnicate", net.conv(net.input(["N", 3, 6, 6]), 4))
    net.output(x)
    onnx.save(net.proto(infer=False), tmp_path / "m.onnx")
    assert len(find_layers(load(tmp_path / "m.onnx"))) == 1


def test_the_standard_without_an_opset(refused):
    proto = chain().proto()
    proto.opset_import[0].domain = "own"
    assert "of which no opset is declared" in refused(proto)


def test_two_opsets_for_one_domain(refused):
    proto = chain().proto()
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    assert "two opsets for the domain ''" in refused(proto)


# --- functions --------------------------------------------------------------------------------------------------------


def calling(*bodies):
    """A model that calls the first of the functions f0, f1, ...; each body is the list of what it calls in turn."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = []
    for number, calls in enumerate(bodies):
        names = ["a", *(f"m{index}" for index in range(len(calls)))]
        nodes = [
            helper.make_node(called, [names[i]], [names[i + 1]], domain="" if called == "Relu" else "own")
            for i, called in enumerate(calls)
        ]
        functions.append(helper.make_function("own", f"f{number}", ["a"], [names[-1]], nodes, imports))
    graph = helper.make_graph(
        [helper.make_node("f0", ["x"], ["y"], domain="own")], "g", [value("x", [2])], [value("y")]
    )
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)


def test_functions_that_call_themselves(refused):
    assert "the function 'f0' calls itself" in refused(calling(["f0"]))
    assert "calls itself" in refused(calling(["f1"], ["f2"], ["f0"]))


def test_functions_that_make_billions_of_nodes(refused):
    assert "nodes when its functions are inlined" in refused(calling(*[[f"f{i + 1}"] * 2 for i in range(40)], ["Relu"]))


def test_a_function_called_with_too_many_inputs(tmp_path):
    proto = calling(["Relu"])
    proto.graph.node[0].input.append("x")
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="a function cannot be inlined"):
        load(tmp_path / "m.onnx")


# --- sizes of values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[2**40, 3, 8, 8], [2**20, 2**20], [2**62, 2**62]])
def test_inputs_too_large_for_any_machine(sizes, tmp_path):
    net = Net()
    net.output(net.relu(net.input(sizes)))
    onnx.save(net.proto(infer=False), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="too large for any machine"):
        load(tmp_path / "m.onnx")


def test_a_negative_size_before_a_slice(tmp_path):
    """onnx's own shape inference ends the process there."""
    net = Net()
    x = net.op("MaxPool", net.input([1, 2, 4, 4]), kernel_shape=[9, 9])
    net.output(net.op("Slice", x, net.ints(0), net.ints(4), net.ints(2)))
    onnx.save(net.proto(infer=False), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"MaxPool 'MaxPool_v\d+' makes a value with a negative size"):
        load(tmp_path / "m.onnx")


# --- damage at random -------------------------------------------------------------------------------------------------


def old_network():
    """Operators in their old forms, with a fixed batch."""
    net = Net(opset=9)
    x = net.op("Clip", net.norm(net.conv(net.input([1, 3, 6, 6]), 4)), min=0.0, max=6.0)
    x = net.op("Upsample", net.op("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1]), net.constant(np.float32([1, 1, 2, 2])))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Slice", net.concat(x, x), starts=[0, 0], ends=[4, 100], axes=[1, 2])
    x = net.op("Reshape", net.op("ReduceMean", x, axes=[2, 3], keepdims=0), net.ints(1, -1), channels=4)
    net.output(net.op("Softmax", net.gemm(x, 5), axis=1))
    return net


def moving_network():
    """Operators that move, spread and pick channels."""
    net = Net()
    x = net.reshape(net.conv(net.input([2, 4, 6, 6]), 8), 2, 2, 4, 6, 6)
    x = net.reshape(net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), 2, 8, 6, 6, channels=8)
    net.nodes.append(helper.make_node("Split", [x, net.ints(4, 4)], ["s1", "s2"], "split", axis=1))
    x = net.op("Concat", "s2", "s1", axis=1, channels=8)
    x = net.op("Slice", x, net.ints(0, 1), net.ints(8, 6), net.ints(1, 2), net.ints(1, 2))
    x = net.op("Tile", net.op("Resize", x, "", "", net.ints(2, 8, 6, 6), mode="nearest"), net.ints(1, 1, 2, 1))
    x = net.op("ConvTranspose", net.op("Expand", x, net.ints(2, 8, 12, 6)), net.normal(8, 4, 3, 3), strides=[2, 2])
    x = net.op("Gather", net.op("AveragePool", x, kernel_shape=[3, 3]), net.ints(0, 2, 1, 3), axis=1, channels=4)
    net.output(net.op("DepthToSpace", net.norm(x, "InstanceNormalization"), blocksize=2))
    return net


def attention_network():
    net = Net()
    x = net.input([2, 5, 8])
    parts = [net.op("Transpose", net.reshape(net.matmul(x, 8), 0, -1, 2, 4), perm=[0, 2, 1, 3]) for _ in range(3)]
    scores = net.op("MatMul", parts[0], net.op("Transpose", parts[1], perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[2])
    x = net.op("Add", x, net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, 8, channels=8))
    net.output(net.op("LayerNormalization", x, net.uniform(8), net.normal(8), axis=-1))
    return net


NETWORKS = {
    "chain": lambda: chain(width=4),
    "residual": lambda: residual(width=2),
    "old": old_network,
    "moving": moving_network,
    "attention": attention_network,
}


def outcomes(folder, count, kind):
    """Damage the networks `count` times, run `kind` on all in a process of its own, and return the lines it printed."""
    whole = {name: make().proto(infer=False).SerializeToString() for name, make in NETWORKS.items()}
    generator = np.random.default_rng(0)
    for number in range(count):
        name = list(whole)[number % len(whole)]
        harm = damage.DAMAGES[generator.choice(len(damage.DAMAGES), p=[0.1, 0.2, 0.1, 0.2, 0.4])]
        (folder / f"{number:04}_{name}_{harm.__name__}.onnx").write_bytes(harm(whole[name], generator))
    command = [sys.executable, damage.__file__, str(folder), kind]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=540)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"{lines[-1]} ended the process ({ended.returncode}): {ended.stderr[-400:]}"
    return [line for line in lines if "code" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("load", 600), ("check", 400)])
def test_damaged_files_end_in_one_sentence(kind, count, tmp_path):
    """`check` is all that `inspect --check` does, onnxruntime included."""
    found = outcomes(tmp_path, count, kind)
    assert len(found) == count
    faults = [line for line in found if line["code"] not in (0, 2, 3)]
    assert not faults, f"{len(faults)} of {count}, first {faults[0]['file']}: {faults[0]['fault']}"
    assert {line["code"] for line in found} >= {0, 3}


@pytest.mark.slow
def test_a_damaged_real_network(shared, tmp_path):
    whole = shared("resnet8_cifar10").read_bytes()
    generator = np.random.default_rng(0)
    for number in range(60):
        harm = damage.DAMAGES[number % len(damage.DAMAGES)]
        (tmp_path / f"{number:04}.onnx").write_bytes(harm(whole, generator))
    command = [sys.executable, damage.__file__, str(tmp_path), "load"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0
    codes = [json.loads(line).get("code", 0) for line in ended.stdout.splitlines()]
    assert set(codes) <= {0, 2, 3}


@pytest.mark.slow
def test_the_command_line_prints_one_line(tmp_path):
    whole = chain(width=4).proto().SerializeToString()
    generator = np.random.default_rng(1)
    codes = []
    for number in range(8):
        file = tmp_path / f"{number}.onnx"
        file.write_bytes(damage.DAMAGES[number % len(damage.DAMAGES)](whole, generator))
        command = [sys.executable, "-m", "onnxmerge", "inspect", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
        codes.append(ended.returncode)
        if ended.returncode:
            assert ended.stderr.startswith(f"onnxmerge: error: {file}")
            assert ended.stderr.count("\n") == 1
            assert ended.stdout == ""
        assert "Traceback" not in ended.stderr
    assert set(codes) <= {0, 2, 3}
    assert 3 in codes
    assert {Path(file).suffix for file in os.listdir(tmp_path)} == {".onnx"}  # nothing else was written


# --- networks that have nothing to share ------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "missing"), [(["N", 3], "layers"), (None, "inputs")])
def test_zip_refuses_networks_without_layers_or_inputs(shape, missing, tmp_path):
    net = Net()
    net.output(net.op("Exp", net.input(shape) if shape else net.normal(2, 3)))
    for name in ("a.onnx", "b.onnx"):
        onnx.save(net.proto(), tmp_path / name)
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 3), np.float32))
    files = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    arguments = ["zip", *files, "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert f"has no {missing}, so nothing can be shared" in result.stderr
    assert not (tmp_path / "out").exists()
