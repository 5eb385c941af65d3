"""Stored tensors: whether their data fit their sizes, where they may lie, and whether their numbers are numbers."""

import numpy as np
import onnx
import pytest
from graphs import Net, chain
from onnx import TensorProto, helper, numpy_helper

from onnxmerge.errors import ModelError
from onnxmerge.ir.layers import find_layers
from onnxmerge.ir.load import load, read


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture
def refused(tmp_path):
    """`refused(proto)` is the message of the error that reading it raises."""

    def message(proto):
        onnx.save(proto, tmp_path / "bad.onnx")
        with pytest.raises(ModelError) as caught:
            read(tmp_path / "bad.onnx")
        return str(caught.value)

    return message


def weight_of(proto):
    return next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)


@pytest.mark.parametrize("dims", [[8, 3, 3, 4], [2**40, 3, 3, 3], [2**62, 2**62], []])
def test_sizes_that_do_not_fit_the_data(dims, refused):
    proto = chain().proto()
    weight = weight_of(proto)
    weight.dims[:] = dims
    assert f"the initializer {weight.name!r} holds 864 bytes, which do not fit" in refused(proto)


def test_huge_sizes_without_data(refused):
    proto = chain().proto()
    weight_of(proto).ClearField("raw_data")
    weight_of(proto).dims[:] = [2**40]
    assert "holds 0 numbers, which do not fit 1099511627776 FLOAT" in refused(proto)


def test_negative_sizes(refused):
    proto = chain().proto()
    weight_of(proto).dims[0] = -8
    assert f"the initializer {weight_of(proto).name!r} has the negative size -8" in refused(proto)
    proto = chain().proto()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -3
    assert "the value 'x' has the negative size -3" in refused(proto)


def test_an_unknown_element_type(refused):
    proto = chain().proto()
    weight_of(proto).data_type = 99
    assert "has the unknown element type 99" in refused(proto)


def test_data_in_the_field_of_another_type(refused):
    proto = chain().proto()
    weight = weight_of(proto)
    weight.ClearField("raw_data")
    weight.int64_data.extend([0] * 216)
    assert "holds 0 numbers, which do not fit 8x3x3x3 FLOAT" in refused(proto)


TYPED = [np.float32, np.float64, np.float16, np.int8, np.int32, np.int64, np.uint8, np.uint32, np.uint64, np.bool_]


@pytest.mark.parametrize("kind", [*TYPED, np.complex64])
@pytest.mark.parametrize("raw", [True, False])
def test_data_of_every_type_are_accepted(kind, raw, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(kind)
    number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    data = array.tobytes() if raw else array.ravel().tolist()
    tensor = helper.make_tensor("w", number, [2, 3], data, raw=raw)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [], [value("y", [2, 3], number)], [tensor]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    np.testing.assert_array_equal(load(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy(), array)


def test_strings_and_optional_types_are_read(tmp_path):
    nodes = [helper.make_node("Identity", ["words"], ["y"]), helper.make_node("SequenceAt", ["s", "i"], ["z"])]
    tensors = [
        helper.make_tensor("words", TensorProto.STRING, [2], ["cat", "dog"]),
        numpy_helper.from_array(np.int64(0), "i"),
    ]
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [sequence], [value("y", [2], TensorProto.STRING), value("z", [2])], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    assert [node.op_type for node in load(tmp_path / "m.onnx").graph] == ["Identity", "SequenceAt"]


def test_sparse_initializers(refused):
    values = numpy_helper.from_array(np.float32([1, 2]), "sparse")
    places = numpy_helper.from_array(np.int64([0, 5]), "places")
    proto = chain().proto()
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [9]))
    assert "the sparse initializer 'sparse' is not supported" in refused(proto)
    net = Net()
    net.output(net.op("Constant", sparse_value=helper.make_sparse_tensor(values, places, [9])))
    assert "holds a sparse tensor" in refused(net.proto(infer=False))


# --- numbers ----------------------------------------------------------------------------------------------------------


def with_constant(array, as_node):
    net = Net()
    x = net.input(["N", 4])
    constant = net.op("Constant", value=numpy_helper.from_array(array)) if as_node else net.constant(array)
    net.output(net.op("Add", x, constant))
    return net.proto(infer=False)


@pytest.mark.parametrize("as_node", [True, False])
@pytest.mark.parametrize("array", [[0, -np.inf, 0, -np.inf], [-np.inf] * 4, [np.inf], -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_infinite_masks_and_bounds_are_read(array, as_node, kind, tmp_path):
    onnx.save(with_constant(np.array(array, kind), as_node), tmp_path / "m.onnx")
    (tensor,) = load(tmp_path / "m.onnx").graph.initializers.values()
    np.testing.assert_array_equal(tensor.const_value.numpy(), np.array(array, kind))


@pytest.mark.parametrize("as_node", [True, False])
@pytest.mark.parametrize("array", [[0.5, -np.inf, 0, 0], [0, np.nan, 0, 0], np.nan])
def test_infinite_weights_and_nan_are_refused(array, as_node, tmp_path):
    onnx.save(with_constant(np.array(array, np.float32), as_node), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"the (initializer|attribute) .*holds NaN or infinite values"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 2**20 + 3])
def test_nan_is_found_wherever_it_stands(place, tmp_path):
    array = np.zeros(2**20 + 4, np.float32)
    array[place] = np.nan
    net = Net()
    net.output(net.op("Add", net.input([array.size]), net.constant(array)))
    onnx.save(net.proto(infer=False), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="holds NaN"):
        load(tmp_path / "m.onnx")


# --- external data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def external(tmp_path):
    """`external(location="...")` is the path of a model with one weight, 48 bytes in an external file."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    (folder / "weights.bin").write_bytes(bytes(96))
    (folder / "inner").mkdir()
    (folder / "inner" / "weights.bin").write_bytes(bytes(48))
    (folder / "out.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "in.bin").symlink_to(folder / "weights.bin")
    (folder / "up").symlink_to(tmp_path)

    def write(attribute=False, **entries):
        tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in ({"location": "weights.bin"} | entries).items():
            tensor.external_data.add(key=key, value=str(entry))
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        if attribute:
            nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
        graph = helper.make_graph(nodes, "g", [value("x", ["N", 3])], [value("y")], [] if attribute else [tensor])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
        return folder / "model.onnx"

    return write


@pytest.mark.parametrize("attribute", [True, False])
@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("../secret.bin", "outside the model's folder"),
        ("inner/../../secret.bin", "outside the model's folder"),
        ("..\\secret.bin", "outside the model's folder"),
        ("C:\\secret.bin", "outside the model's folder"),
        ("/etc/passwd", "outside the model's folder"),
        ("out.bin", "a link that leads outside"),
        ("up/secret.bin", "a link that leads outside"),
        ("", "not named"),
        ("wei\0ghts.bin", "not named"),
        ("absent.bin", "absent.bin of the .* is missing"),
        ("inner", "is missing"),
    ],
)
def test_external_data_elsewhere(location, why, attribute, external):
    with pytest.raises(ModelError, match=why):
        read(external(attribute, location=location))


@pytest.mark.parametrize("location", ["weights.bin", "./weights.bin", "inner/weights.bin", "in.bin"])
def test_external_data_in_the_folder(location, external, monkeypatch):
    path = external(location=location)
    (layer,) = find_layers(load(path))
    assert not layer.weight.const_value.numpy().any()
    monkeypatch.chdir(path.parent)
    load(path.name)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"offset": -1}, "offset or length is no number >= 0"),
        ({"length": -48}, "offset or length is no number >= 0"),
        ({"offset": "start"}, "offset or length is no number >= 0"),
        ({"offset": 64}, "weights.bin is truncated"),
        ({"offset": 2**70}, "weights.bin is truncated"),
        ({"length": 44}, "has 44 bytes in 'weights.bin', which do not fit 3x4"),
        ({"length": 2**60}, "which do not fit 3x4"),
    ],
)
def test_external_data_at_no_valid_place(entries, why, external):
    with pytest.raises(ModelError, match=why):
        read(external(**entries))


def test_the_working_folder_makes_no_difference(external, monkeypatch):
    path = external(location="../secret.bin")
    monkeypatch.chdir(path.parent)
    with pytest.raises(ModelError, match="outside the model's folder"):
        read("model.onnx")
