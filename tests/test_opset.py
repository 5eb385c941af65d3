"""Raising the opset: onnxruntime computes the same before and after, for every operator whose form has changed."""

import itertools

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from graphs import Net, assert_same_outputs, execute, feeds_for
from onnx import TensorProto, helper

from onnxmerge.errors import ModelError
from onnxmerge.ir.normalise import OPSET, normalise
from onnxmerge.ir.opset import _ADAPTERS, NEWEST, OLDEST, raise_opset

OPSETS = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26]

SAME = {
    *(
        "ArgMax",
        "ArgMin",
        "AveragePool",
        "Cast",
        "CastLike",
        "Constant",
        "DepthToSpace",
        "DequantizeLinear",
        "GatherND",
    ),
    *("GRU", "LSTM", "RNN", "Gemm", "LpPool", "MaxPool", "OptionalHasElement", "QuantizeLinear", "Range", "Reshape"),
    *("ScatterElements", "ScatterND", "Shape", "SpaceToDepth", "Attention"),
}
"""Operators that only gained attributes, inputs or outputs which, left out, mean what was meant before."""
STEPS_THAT_ADD = {("TopK", 11), ("Resize", 18), ("Pad", 18), ("GroupNormalization", 21), ("GridSample", 16)}


def form(schema):
    """What a node of this version may look like, without element types."""
    attributes = {
        name: (str(a.type), a.required, helper.get_attribute_value(a.default_value) if a.default_value.name else None)
        for name, a in schema.attributes.items()
    }
    return [p.name for p in schema.inputs], [p.name for p in schema.outputs], attributes, schema.deprecated


def test_every_change_of_form_has_an_adapter_or_changes_nothing():
    versions: dict[str, list] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= NEWEST:
            versions.setdefault(schema.name, []).append(schema)
    unknown = set()
    for name, schemas in versions.items():
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in itertools.pairwise(schemas):
            step = (name, new.since_version)
            if new.since_version > OLDEST and form(old) != form(new) and name not in SAME:
                unknown |= {step} - _ADAPTERS.keys() - STEPS_THAT_ADD
    assert not unknown
    assert {name for name, _ in _ADAPTERS} <= versions.keys()
    assert not {name for name, _ in _ADAPTERS} & SAME


def normal(proto):
    return normalise(oir.from_proto(proto))


def check(net, tolerance=1e-5, **feeds):
    """The normal form of the net computes what the net computes."""
    proto = net.proto()
    model = normal(proto)
    assert model.opset_imports[""] == max(OPSET, net.opset)
    onnx.checker.check_model(oir.to_proto(model), full_check=True)
    assert_same_outputs(proto, model, feeds_for(proto) | feeds, tolerance)
    return model


def image(opset, shape=(2, 4, 6, 6)):
    """A net whose input goes through one convolution, and that convolution's output."""
    net = Net(opset=opset)
    return net, net.conv(net.input(list(shape)), shape[1])


def since(first, last=26):
    return [opset for opset in OPSETS if first <= opset <= last]


@pytest.mark.parametrize("opset", OPSETS)
def test_a_convolutional_network(opset):
    net, x = image(opset)
    x = net.relu(net.norm(x))
    x = net.op("Clip", x, min=-0.5, max=0.8) if opset < 11 else clip(net, x, -0.5, 0.8)
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Add", x, net.conv(x, 4))
    pooled = reduced(net, "ReduceMean", x, [2, 3], 18)
    x = net.gemm(squeezed(net, pooled, [2, 3]), 5)
    net.output(net.op("Softmax", x, axis=1))
    check(net)


@pytest.mark.parametrize("opset", since(7, 8))
def test_batch_normalisation_with_spatial(opset):
    net, x = image(opset)
    parameters = [net.uniform(4), net.normal(4), net.normal(4), net.uniform(4)]
    attributes = {"spatial": 1} if opset < 9 else {}
    net.output(net.op("BatchNormalization", x, *parameters, epsilon=1e-3, **attributes))
    check(net)


def test_batch_normalisation_of_each_position_is_refused():
    net, x = image(7)
    parameters = [net.uniform(4, 6, 6), net.normal(4, 6, 6), net.normal(4, 6, 6), net.uniform(4, 6, 6)]
    net.output(net.op("BatchNormalization", x, *parameters, spatial=0))
    with pytest.raises(
        ModelError, match=r"BatchNormalization 'BatchNormalization_v\d+' cannot be converted.*spatial=0"
    ):
        normal(net.proto(infer=False))


def test_batch_normalisation_for_training_is_refused():
    net, x = image(9)
    parameters = [net.uniform(4), net.normal(4), net.normal(4), net.uniform(4)]
    net.output(net.op("BatchNormalization", x, *parameters))
    net.nodes[-1].output.extend(["mean", "var", "saved_mean", "saved_var"])
    with pytest.raises(ModelError, match="exported for training"):
        normal(net.proto())


def clip(net, x, low, high):
    return net.op("Clip", x, net.constant(np.float32(low)), net.constant(np.float32(high)))


@pytest.mark.parametrize("opset", since(7, 12))
@pytest.mark.parametrize("bounds", [{}, {"min": 0.1}, {"max": 0.2}, {"min": -0.1, "max": 0.3}])
def test_clip(opset, bounds):
    net, x = image(opset)
    if opset < 11:
        x = net.op("Clip", x, **bounds)
    else:
        inputs = [net.constant(np.float32(bounds[name])) if name in bounds else "" for name in ("min", "max")]
        x = net.op("Clip", x, *inputs)
    net.output(net.relu(x))
    check(net)


def test_a_number_that_becomes_an_input_has_the_type_of_the_data():
    net = Net(opset=9)
    x = net.op("Cast", net.input([2, 3]), to=TensorProto.DOUBLE)
    net.output(net.op("Cast", net.op("Pad", x, pads=[0, 1, 0, 1], value=0.25), to=TensorProto.FLOAT))
    check(net)


@pytest.mark.parametrize("opset", since(7, 18))
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(opset, mode):
    net, x = image(opset)
    amounts = [0, 1, 2, 0, 0, 1, 1, 2]
    if opset < 11:
        x = net.op("Pad", x, pads=amounts, mode=mode, value=0.5)
    else:
        x = net.op("Pad", x, net.ints(*amounts), net.constant(np.float32(0.5)), mode=mode)
    net.output(net.relu(x))
    check(net)


@pytest.mark.parametrize("opset", since(7, 11))
@pytest.mark.parametrize("axes", [None, [1, 3]])
def test_slice(opset, axes):
    net, x = image(opset)
    if opset < 10:
        x = net.op("Slice", x, starts=[0, 1], ends=[2, -1], **({"axes": axes} if axes else {}))
    else:
        x = net.op("Slice", x, net.ints(0, 1), net.ints(2, -1), *([net.ints(*axes)] if axes else []))
    net.output(net.relu(x))
    check(net)


@pytest.mark.parametrize("opset", since(7, 13))
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1])
def test_softmax_over_several_axes(opset, kind, axis):
    if axis == -1 and opset < 11:
        pytest.skip("negative axes begin with opset 11")
    net, x = image(opset, (2, 3, 4, 2))
    net.output(net.op(kind, x, **({} if axis is None else {"axis": axis})))
    check(net)


@pytest.mark.parametrize("shape", [["N", 4, 1, 1], [2, 4, 1, 1], [2, 1, 1, 1]])
def test_softmax_over_one_larger_axis_stays_one_node(shape):
    net = Net(opset=11)
    net.output(net.op("Softmax", net.input(shape), axis=1))
    assert [node.op_type for node in check(net).graph] == ["Softmax"]


@pytest.mark.parametrize("opset", since(7, 13))
def test_softmax_of_symbolic_sizes(opset):
    net = Net(opset=opset)
    net.output(net.op("Softmax", net.op("Relu", net.input(["N", 3, "h", "w"])), axis=1))
    check(net)


def reduced(net, kind, x, axes, first, **attributes):
    """A reduction over `axes`, which are an input from opset `first` on."""
    if axes is None:
        return net.op(kind, x, **attributes)
    if net.opset < first:
        return net.op(kind, x, axes=axes, **attributes)
    return net.op(kind, x, net.ints(*axes), **attributes)


def squeezed(net, x, axes):
    return reduced(net, "Squeeze", x, axes, 13)


KINDS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]


@pytest.mark.parametrize("opset", [7, 10, 11, 12, 13, 17, 18, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(opset, kind):
    net = Net(opset=opset)
    x = net.op("Exp", net.input(["N", 4, 3, 3]))
    for axes, keep in (([2, 3], 1), ([1], 0), (None, 1)):
        net.output(reduced(net, f"Reduce{kind}", x, axes, 13 if kind == "Sum" else 18, keepdims=keep))
    check(net)


@pytest.mark.parametrize("opset", since(7, 18))
def test_squeeze_and_unsqueeze(opset):
    net, x = image(opset, (2, 4, 1, 1))
    flat = squeezed(net, x, [2, 3])
    net.output(reduced(net, "Unsqueeze", flat, [0, 3], 13), net.op("Squeeze", x))
    check(net)


@pytest.mark.parametrize("opset", since(7, 19))
@pytest.mark.parametrize("sizes", [None, [1, 3], [2, 2]])
def test_split(opset, sizes):
    net, x = image(opset)
    attributes, inputs = {"axis": 1}, [x]
    if sizes and opset < 13:
        attributes["split"] = sizes
    elif sizes:
        inputs.append(net.ints(*sizes))
    elif opset >= 18:
        attributes["num_outputs"] = 2
    net.nodes.append(helper.make_node("Split", inputs, ["first", "second"], "split", **attributes))
    net.output("first", "second")
    check(net)


@pytest.mark.parametrize("opset", since(7, 11))
def test_top_k(opset):
    net, x = image(opset)
    inputs, attributes = ([x], {"k": 3}) if opset < 10 else ([x, net.ints(3)], {})
    net.nodes.append(helper.make_node("TopK", inputs, ["values", "places"], "top", axis=3, **attributes))
    net.output("values")
    check(net)


@pytest.mark.parametrize("opset", since(7, 14))
def test_dropout(opset):
    net, x = image(opset)
    x = net.op("Dropout", x, **({"ratio": 0.3} if opset < 12 else {}))
    net.nodes[-1].output.append("mask")
    net.output(net.relu(x))
    check(net)


def test_dropout_whose_mask_is_read_is_refused():
    net, x = image(9)
    x = net.op("Dropout", x, ratio=0.3)
    net.nodes[-1].output.append("mask")
    net.output(net.op("Mul", x, "mask"))
    with pytest.raises(ModelError, match="its mask is read"):
        normal(net.proto(infer=False))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 1.5, 1.25], [1, 1, 3, 1]])
@pytest.mark.parametrize("opset", [7, 8, 9, 10])
def test_upsample(opset, scales, mode):
    net, x = image(opset)
    if opset < 9:
        x = net.op("Upsample", x, mode=mode, scales=[float(scale) for scale in scales])
    else:
        kind = "Upsample" if opset == 9 else "Resize"
        x = net.op(kind, x, net.constant(np.float32(scales)), mode=mode)
    net.output(net.relu(x))
    check(net)


def test_upsample_with_computed_scales():
    net = Net(opset=9)
    x = net.conv(net.input(["N", 3, 4, 4]), 4)
    spatial = net.op("Cast", net.op("Slice", net.op("Shape", x), starts=[2], ends=[4]), to=TensorProto.FLOAT)
    factors = net.op("Div", net.constant(np.float32([8, 12])), spatial)
    x = net.op("Upsample", x, net.op("Concat", net.constant(np.float32([1, 1])), factors, axis=0), mode="nearest")
    net.output(net.relu(x))
    check(net)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[1, 1, 0.5, 0.5], [1, 1, 0.6, 0.7]])
def test_resize_10_that_shrinks(scales, mode):
    net, x = image(10)
    net.output(net.relu(net.op("Resize", x, net.constant(np.float32(scales)), mode=mode)))
    check(net)


def test_resize_10_that_enlarges_and_shrinks_is_refused():
    net, x = image(10)
    net.output(net.op("Resize", x, net.constant(np.float32([1, 1, 2, 0.5]))))
    with pytest.raises(ModelError, match=r"Resize 'Resize_v\d+' cannot be converted.*shrinks"):
        normal(net.proto())


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn"]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("opset", [11, 12, 13])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize_nearest(opset, coordinates, by):
    if coordinates == "tf_half_pixel_for_nn" and opset > 12:
        pytest.skip("opset 13 dropped it")
    net, x = image(opset)
    nothing = net.constant(np.float32([]))
    inputs = [nothing, net.constant(np.float32([1, 1, 1.5, 0.7]))] if by == "scales" else [nothing, nothing]
    inputs += [net.ints(2, 4, 9, 4)] if by == "sizes" else []
    attributes = {"coordinate_transformation_mode": coordinates, "mode": "nearest", "nearest_mode": "floor"}
    net.output(net.relu(net.op("Resize", x, *inputs, **attributes)))
    check(net)


def test_roi_align_keeps_its_coordinates():
    net, x = image(10)
    boxes = net.constant(np.float32([[0, 0, 4, 3], [1, 1, 5, 5]]))
    net.output(net.op("RoiAlign", x, boxes, net.ints(0, 1), output_height=2, output_width=2, sampling_ratio=2))
    check(net)


def test_scatter():
    net, x = image(9, (1, 2, 3, 3))
    places = net.constant(np.full((1, 2, 1, 3), 2, np.int64))
    net.output(net.op("Scatter", x, places, net.normal(1, 2, 1, 3), axis=2))
    assert "ScatterElements" in {node.op_type for node in check(net).graph}


@pytest.mark.parametrize("mode", [None, "bilinear", "nearest", "bicubic"])
def test_grid_sample(mode):
    net = Net(opset=16)
    x = net.relu(net.input([1, 2, 5, 5]))
    grid = net.uniform(1, 3, 3, 2, low=-1, high=1)
    net.output(net.op("GridSample", x, grid, **({"mode": mode} if mode else {})))
    proto = net.proto()
    model = raise_opset(normal(proto), 20)
    assert_same_outputs(proto, model, feeds_for(proto))


def test_group_normalisation_gets_a_scale_for_each_channel():
    net, x = image(18, (2, 6, 4, 4))
    net.output(net.op("GroupNormalization", x, net.uniform(3), net.normal(3), num_groups=3))
    proto = net.proto(infer=False)
    model = raise_opset(normal(proto), 21)
    assert_same_outputs(proto, model, feeds_for(proto))


def test_dft_gets_its_axis_as_input():
    net = Net(opset=17)
    net.output(net.op("DFT", net.input([2, 6, 4, 1]), axis=2), net.op("DFT", "x"))
    proto = net.proto()
    assert_same_outputs(proto, raise_opset(normal(proto), 20), feeds_for(proto))


def test_the_bodies_of_if_are_raised_too():
    def branch(name, axis):
        nodes = [
            helper.make_node("Unsqueeze", ["x"], [f"{name}1"], axes=[0]),
            helper.make_node("ReduceMax", [f"{name}1"], [f"{name}2"], axes=[axis], keepdims=0),
            helper.make_node("Clip", [f"{name}2"], [name], min=0.25),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    net = Net(opset=11)
    x = net.input([3, 3])
    for node in (bodies := [branch("a", 1), branch("b", 2)]):
        node.node[2].ClearField("attribute")
        node.node[2].input.append("low")
    net.constant(np.float32(0.25), "low")
    condition = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.constant(np.float32(4)))
    net.output(net.op("If", condition, then_branch=bodies[0], else_branch=bodies[1]))
    proto = net.proto(infer=False)
    model = normal(proto)
    onnx.checker.check_model(oir.to_proto(model))
    for scale in (0.1, 1.9):  # both branches
        feeds = {"x": scale * feeds_for(proto)["x"]}
        for key, array in execute(proto, feeds).items():
            np.testing.assert_array_equal(array, execute(model, feeds)[key])


def test_an_opset_that_nobody_knows_yet_is_refused():
    net, x = image(18)
    net.output(x)
    with pytest.raises(ModelError, match=f"{NEWEST} is the newest one known"):
        raise_opset(normal(net.proto()), NEWEST + 1)


def test_new_constants_take_no_name_that_is_there():
    net = Net(opset=9)
    for number in range(6):
        net.constant(np.float32(number), f"val_{number}")
    x = net.input([2, 4])
    for number in range(6):
        x = net.op("Add", net.op("Clip", x, min=0.1, max=0.9), f"val_{number}")
    net.output(x)
    check(net)
