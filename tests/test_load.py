"""Files that cannot be loaded end in one sentence that names the file, and the array at fault."""

import re
import shutil

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import Net, chain, execute
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxmerge.errors import ModelError, UsageError
from onnxmerge.ir.load import load, read


def failure(path, kind):
    """The message of the error that loading `path` must raise: one line that begins with the file."""
    with pytest.raises(kind) as caught:
        load(path)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert "no such file" in failure(tmp_path / "absent.onnx", UsageError)
    assert "no such file" in failure(tmp_path, UsageError)  # a folder


@pytest.mark.parametrize("content", [b"", b"not a model\n", b"{}", b"\x00" * 64, b"\x08\x08"])
def test_another_format(content, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    assert "is not a readable ONNX model" in failure(file, ModelError)


def test_truncated_anywhere(shared, tmp_path):
    whole = shared("resnet8_cifar10").read_bytes()
    file = tmp_path / "cut.onnx"

    @settings(max_examples=40)
    @given(st.integers(0, len(whole) - 1))
    def fails(length):
        file.write_bytes(whole[:length])
        failure(file, ModelError)

    fails()
    for missing in range(1, 20):  # the opset stands last
        file.write_bytes(whole[:-missing])
        failure(file, ModelError)
    file.write_bytes(whole)
    load(file)


def test_no_opset():
    path = MODELS / "super_resolution.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not at hand")
    message = failure(path, ModelError)
    assert "opset" in message
    assert "export it again" in message


def test_opset_too_old(tmp_path):
    proto = chain().proto()
    proto.opset_import[0].version = 6
    onnx.save(proto, tmp_path / "old.onnx")
    assert "opset 6 is too old" in failure(tmp_path / "old.onnx", ModelError)


def test_no_outputs(tmp_path):
    proto = chain().proto()
    proto.graph.ClearField("output")
    onnx.save(proto, tmp_path / "endless.onnx")
    assert "no outputs" in failure(tmp_path / "endless.onnx", ModelError)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad, tmp_path):
    proto = chain().proto()
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    array = numpy_helper.to_array(weight).copy()
    array[-1, 0, 0, 0] = bad
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    message = failure(tmp_path / "bad.onnx", ModelError)
    assert f"'{weight.name}'" in message
    assert "NaN or infinite" in message


def test_shapes_that_contradict_each_other(tmp_path):
    net = Net()
    net.output(net.op("Add", net.conv(net.input(["N", 3, 8, 8]), 4), net.normal(5, 1, 1)))
    onnx.save(net.proto(infer=False), tmp_path / "odd.onnx")
    with pytest.raises(ModelError, match="onnxruntime refuses it"):
        execute(load(tmp_path / "odd.onnx"), {})


@pytest.fixture
def external(tmp_path):
    """A model whose weights lie in a file beside it."""
    file = tmp_path / "model.onnx"
    onnx.save(chain().proto(), file, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return file


def test_external_data_is_read(external):
    wanted = {name: value.const_value.numpy() for name, value in load(external).graph.initializers.items()}
    assert wanted
    for tensor in chain().proto().graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), wanted[tensor.name])


def test_external_data_missing(external):
    (external.parent / "weights.bin").unlink()
    message = failure(external, ModelError)
    assert "weights.bin" in message
    assert re.search(r"initializer 'c\d+' is missing", message)


def test_external_data_truncated(external):
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-100])
    message = failure(external, ModelError)
    assert "weights.bin is truncated" in message
    assert re.search(r"initializer 'c\d+'", message)


def test_external_data_is_found_beside_a_moved_model(external, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model.onnx", "weights.bin"):
        shutil.copy(external.parent / name, moved / name)
    external.unlink()
    (external.parent / "weights.bin").unlink()
    load(moved / "model.onnx")


def test_read_leaves_the_model_as_stored(shared):
    path = shared("ultraface_rfb_320")
    model, stored = read(path), onnx.load(path)
    assert [node.op_type for node in model.graph] == [node.op_type for node in stored.graph.node]
    assert model.opset_imports[""] == 9
