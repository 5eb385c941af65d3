"""Raise the opset of a model, node by node and in place, so that weights, metadata and names stay where they are.

Most operators only learned new element types or optional attributes from one opset to the next. `_ADAPTERS` holds the
others: what has to change in a node for the operator's new version to compute what the old one did. Nodes of If, Loop
and Scan bodies and of functions change with the rest.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as oir
from onnx_ir.passes import common

from onnxmerge.errors import ModelError
from onnxmerge.ir.labels import dims, rank
from onnxmerge.ir.lift_constants import lift_constants

OLDEST = 7
NEWEST = 28
"""The newest opset whose changes `_ADAPTERS` knows."""


def raise_opset(model: oir.Model, opset: int) -> oir.Model:
    """Bring `model` and its functions to `opset`, in place; newer models stay as they are.

    Raises:
        ModelError: the opset is too old or too new, or a node cannot be converted.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        version = graph.opset_imports.get("", opset)
        if version < OLDEST:
            raise ModelError(
                f"opset {version} is too old ({OLDEST} is the lowest); export it again with a current exporter"
            )
        if version < opset > NEWEST:
            raise ModelError(f"cannot be converted from opset {version} to {opset}: {NEWEST} is the newest one known")
        for node in list(oir.traversal.RecursiveGraphIterator(graph)):
            for adapt in _adapters(node, version, opset):
                try:
                    adapt(node)
                except _NotConvertibleError as error:
                    raise ModelError(
                        f"{node.op_type} {node.name!r} cannot be converted from opset {version} to {opset}: {error}"
                    ) from error
        graph.opset_imports[""] = max(version, opset)
    common.NameFixPass()(model)  # new constants have no names yet
    lift_constants(model.graph)
    return model


class _NotConvertibleError(Exception):
    """Why the node has no equal in the new opset."""


_Adapter = Callable[[oir.Node], None]


def _adapters(node: oir.Node, version: int, opset: int) -> Iterator[_Adapter]:
    """What to do to `node` between the two opsets. An adapter may make another operator of it."""
    for number in range(version + 1, opset + 1):
        if node.domain == "" and (adapter := _ADAPTERS.get((node.op_type, number))) is not None:
            yield adapter


# --- what adapters are made of ----------------------------------------------------------------------------------------


def _constant(node: oir.Node, array: np.ndarray) -> oir.Value:
    """A constant that `node` can read."""
    return _before(node, "Constant", [], {"value": oir.tensor(array)})


def _before(node: oir.Node, op_type: str, inputs: Sequence[oir.Value | None], attributes: dict) -> oir.Value:
    """The output of a new node in front of `node`."""
    made = oir.node(op_type, inputs, attributes)
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made.outputs[0]


def _known_array(value: oir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant node; None for anything else."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor().numpy()
    return None


def _string(node: oir.Node, name: str, default: str) -> str:
    """The string attribute `name`; one that is no text is like one that nobody knows."""
    value = node.attributes[name].value if name in node.attributes else default
    return value if isinstance(value, str) else ""


def _set_input(node: oir.Node, index: int, value: oir.Value | None) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _to_input(name: str, index: int, scalar: bool = False) -> _Adapter:
    """The integer attribute `name` becomes input `index`."""

    def adapt(node: oir.Node) -> None:
        if name in node.attributes:
            integers = np.array(node.attributes.pop(name).value, np.int64)
            _set_input(node, index, _constant(node, integers if scalar else integers.reshape(-1)))

    return adapt


def _set_default(name: str, value: str | int) -> _Adapter:
    """Write down a default that the new version has changed."""

    def adapt(node: oir.Node) -> None:
        if name not in node.attributes:
            node.attributes[name] = (
                oir.AttrString(name, value) if isinstance(value, str) else oir.AttrInt64(name, value)
            )

    return adapt


def _like(node: oir.Node, number: float) -> oir.Value:
    """`number` as a scalar of the element type of the node's first input; float32 where that is not known."""
    data = node.inputs[0]
    kind = oir.DataType.FLOAT if data is None or data.dtype is None else data.dtype
    return _constant(node, np.array(number, kind.numpy()))


# --- adapters ---------------------------------------------------------------------------------------------------------


def _drop_spatial(node: oir.Node) -> None:
    spatial = node.attributes.pop("spatial", None)
    if spatial is not None and spatial.as_int() != 1:
        raise _NotConvertibleError("it normalises each position on its own (spatial=0)")


def _refuse_training(node: oir.Node) -> None:
    if len(node.outputs) > 1:
        raise _NotConvertibleError("it was exported for training; export the model in evaluation mode")


def _refuse_old_scan(node: oir.Node) -> None:
    raise _NotConvertibleError("the first version of Scan has no equal; export it again with a current exporter")


def _scales_to_input(node: oir.Node) -> None:
    if "scales" in node.attributes:
        scales = np.array(node.attributes.pop("scales").as_floats(), np.float32)
        _set_input(node, 1, _constant(node, scales))


def _upsample_to_resize(node: oir.Node) -> None:
    node.op_type = "Resize"


def _resize_with_coordinates(node: oir.Node) -> None:
    """Before opset 11 coordinates were x / scale, rounded down where the axis grows and up where it shrinks."""
    scales = node.inputs[1]
    if _string(node, "mode", "nearest") == "nearest":
        factors = _known_array(scales)
        grows = factors is None or bool((factors >= 1).all())
        if factors is not None and not grows and (factors > 1).any():
            raise _NotConvertibleError("it enlarges one axis and shrinks another")
        node.attributes["nearest_mode"] = oir.AttrString("nearest_mode", "floor" if grows else "ceil")
    node.attributes["coordinate_transformation_mode"] = oir.AttrString("coordinate_transformation_mode", "asymmetric")
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)


def _resize_with_optional_inputs(node: oir.Node) -> None:
    """Empty arrays become absent inputs. The mode that opset 13 dropped has an equal: with a = (x + 0.5) / scale,
    floor(a) is (a - 0.5) rounded to the nearest, up at ties.
    """
    for index in (1, 2):
        array = _known_array(node.inputs[index])
        if array is not None and array.size == 0:
            node.replace_input_with(index, None)
    if _string(node, "coordinate_transformation_mode", "half_pixel") != "tf_half_pixel_for_nn":
        return
    modes = _string(node, "mode", "nearest"), _string(node, "nearest_mode", "round_prefer_floor")
    if modes != ("nearest", "floor"):
        raise _NotConvertibleError("tf_half_pixel_for_nn without nearest_mode=floor has no equal")
    for name, value in (("coordinate_transformation_mode", "half_pixel"), ("nearest_mode", "round_prefer_ceil")):
        node.attributes[name] = oir.AttrString(name, value)


def _clip_bounds_to_inputs(node: oir.Node) -> None:
    for index, name in ((1, "min"), (2, "max")):
        if name in node.attributes:
            _set_input(node, index, _like(node, node.attributes.pop(name).as_float()))


def _pad_amounts_to_inputs(node: oir.Node) -> None:
    _to_input("pads", 1)(node)
    value = node.attributes.pop("value", None)
    if value is not None and value.as_float() != 0:
        _set_input(node, 2, _like(node, value.as_float()))


def _slice_bounds_to_inputs(node: oir.Node) -> None:
    for index, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        _to_input(name, index)(node)


def _drop_unread_mask(node: oir.Node) -> None:
    """Dropout's mask had the data's type before opset 10, and what it held when nothing is dropped was not said."""
    if len(node.outputs) > 1:
        mask = node.outputs[1]
        if mask.uses() or mask.is_graph_output():
            raise _NotConvertibleError("its mask is read")
        node.resize_outputs(1)


def _drop_ratio(node: oir.Node) -> None:
    node.attributes.pop("ratio", None)  # nothing is dropped in a model that is not trained
    _drop_unread_mask(node)


def _softmax_of_matrix(node: oir.Node) -> None:
    """Before opset 13 the axes from `axis` on were one. It stays one operator where only one of them is larger than 1;
    else the data is made a matrix first.
    """
    data = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    node.attributes["axis"] = oir.AttrInt64("axis", axis)
    assert data is not None
    if axis == -1:
        return
    if data.shape is not None:
        if not -rank(data) <= axis < rank(data):
            raise _NotConvertibleError(f"its data have no axis {axis}")
        larger = [number for number, size in enumerate(dims(data)) if number >= axis % rank(data) and size != 1]
        if len(larger) < 2:
            node.attributes["axis"] = oir.AttrInt64("axis", larger[0] if larger else -1)
            return
    matrix = _before(node, "Flatten", [data], {"axis": axis})
    normalised = _before(node, node.op_type, [matrix], {"axis": -1})
    shape = _before(node, "Shape", [data], {})
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, normalised)
    node.replace_input_with(1, shape)


def _split_evenly(node: oir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = oir.AttrInt64("num_outputs", len(node.outputs))


def _scatter_elements(node: oir.Node) -> None:
    node.op_type = "ScatterElements"


def _grid_sample_names(node: oir.Node) -> None:
    if "mode" in node.attributes:
        mode = _string(node, "mode", "linear")
        node.attributes["mode"] = oir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _dft_axis_to_input(node: oir.Node) -> None:
    _set_default("axis", 1)(node)
    _to_input("axis", 2, scalar=True)(node)


def _scales_of_groups_to_channels(node: oir.Node) -> None:
    """Before opset 21 GroupNormalization had one scale and one bias for each group, now for each channel."""
    data = node.inputs[0]
    channels = dims(data)[1] if data is not None and rank(data) > 1 else None
    groups = node.attributes["num_groups"].as_int()
    if channels is None or groups < 1 or channels % groups:
        raise _NotConvertibleError("its number of channels is not known")
    for index in (1, 2):
        column = _before(node, "Unsqueeze", [node.inputs[index], _constant(node, np.array([1]))], {})
        rows = _before(node, "Expand", [column, _constant(node, np.array([groups, channels // groups]))], {})
        node.replace_input_with(index, _before(node, "Reshape", [rows, _constant(node, np.array([-1]))], {}))


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_ADAPTERS: dict[tuple[str, int], _Adapter] = {
    ("BatchNormalization", 9): _drop_spatial,
    ("Scan", 9): _refuse_old_scan,
    ("Upsample", 9): _scales_to_input,
    ("Dropout", 10): _drop_unread_mask,
    ("Slice", 10): _slice_bounds_to_inputs,
    ("TopK", 10): _to_input("k", 1),
    ("Upsample", 10): _upsample_to_resize,
    ("Clip", 11): _clip_bounds_to_inputs,
    ("Pad", 11): _pad_amounts_to_inputs,
    ("Resize", 11): _resize_with_coordinates,
    ("Scatter", 11): _scatter_elements,
    ("Dropout", 12): _drop_ratio,
    ("Hardmax", 13): _softmax_of_matrix,
    ("LogSoftmax", 13): _softmax_of_matrix,
    ("ReduceSum", 13): _to_input("axes", 1),
    ("Resize", 13): _resize_with_optional_inputs,
    ("Softmax", 13): _softmax_of_matrix,
    ("Split", 13): _to_input("split", 1),
    ("Squeeze", 13): _to_input("axes", 1),
    ("Unsqueeze", 13): _to_input("axes", 1),
    ("BatchNormalization", 14): _refuse_training,
    ("RoiAlign", 16): _set_default("coordinate_transformation_mode", "output_half_pixel"),
    **{(f"Reduce{kind}", 18): _to_input("axes", 1) for kind in _REDUCTIONS},
    ("Split", 18): _split_evenly,
    ("DFT", 20): _dft_axis_to_input,
    ("GridSample", 20): _grid_sample_names,
    ("GroupNormalization", 21): _scales_of_groups_to_channels,
}
"""By operator and the opset that changed it."""
