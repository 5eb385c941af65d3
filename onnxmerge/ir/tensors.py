"""Are stored tensors whole, where may their data lie, and are their numbers numbers?"""

import math
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx
import onnx_ir as oir

from onnxmerge.errors import ModelError

_CHUNK = 1 << 20
"""Elements looked at together, so that no check needs a second copy of a weight."""

_Type = oir.DataType
_FIELDS = {
    "float_data": {_Type.FLOAT, _Type.COMPLEX64},
    "double_data": {_Type.DOUBLE, _Type.COMPLEX128},
    "int64_data": {_Type.INT64},
    "uint64_data": {_Type.UINT32, _Type.UINT64},
    "string_data": {_Type.STRING},
}
"""The field that holds the elements of these types when they are not raw bytes; `int32_data` holds all others."""


def check_tensor(tensor: onnx.TensorProto, name: str, folder: Path) -> None:
    """Check that the data of `tensor` fit its sizes, without reading any, and that they lie in `folder` or below.

    Args:
        tensor: an initializer, or the value of an attribute.
        name: what to call it.
        folder: the folder of the model's file.

    Raises:
        ModelError: a size is negative, data are missing, or their number or place is wrong.
    """
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"the {name} has the negative size {min(tensor.dims)}")
    count = math.prod(tensor.dims)
    try:
        kind = _Type(tensor.data_type)
    except ValueError:
        kind = _Type.UNDEFINED
    if kind == _Type.UNDEFINED:
        raise ModelError(f"the {name} has the unknown element type {tensor.data_type}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if kind == _Type.STRING:
            raise ModelError(f"the {name} holds strings, which cannot lie in an external file")
        _check_external(tensor, name, _stored_bytes(count, kind), folder)
    elif tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        if kind == _Type.STRING or held != _stored_bytes(count, kind):
            raise ModelError(f"the {name} holds {held} bytes, which do not fit {_shape(tensor)} {kind.name}")
    else:
        field = next((field for field, kinds in _FIELDS.items() if kind in kinds), "int32_data")
        wanted = _stored_items(count, kind)
        if len(getattr(tensor, field)) != wanted:
            held = len(getattr(tensor, field))
            raise ModelError(f"the {name} holds {held} numbers, which do not fit {_shape(tensor)} {kind.name}")


def _stored_bytes(count: int, kind: oir.DataType) -> int:
    return -(-count * kind.bitwidth // 8) if kind != _Type.STRING else 0


def _stored_items(count: int, kind: oir.DataType) -> int:
    """Entries of the typed field: complex numbers take two, elements below a byte are packed."""
    if kind in (_Type.COMPLEX64, _Type.COMPLEX128):
        return 2 * count
    return _stored_bytes(count, kind) if kind != _Type.STRING and kind.bitwidth in (2, 4) else count


def _shape(tensor: onnx.TensorProto) -> str:
    return "x".join(map(str, tensor.dims)) or "one"


def _check_external(tensor: onnx.TensorProto, name: str, needed: int, folder: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    windows = PureWindowsPath(location)
    if not location or "\0" in location:
        raise ModelError(f"the {name} lies in an external file that is not named")
    if location.startswith("/") or windows.drive or windows.root or ".." in windows.parts:
        raise ModelError(f"the {name} lies in {location!r}, outside the model's folder")
    data = folder / location
    if not data.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"the {name} lies in {location!r}, a link that leads outside the model's folder")
    if not data.is_file():
        raise ModelError(f"the external data file {data} of the {name} is missing")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise ModelError(f"the {name} lies at no valid place of {location!r}: its offset or length is no number >= 0")
    if length != needed:
        raise ModelError(f"the {name} has {length} bytes in {location!r}, which do not fit {_shape(tensor)}")
    if data.stat().st_size < offset + length:
        raise ModelError(
            f"the external data file {data} is truncated: the {name} needs bytes up to {offset + length}, "
            f"the file has {data.stat().st_size}"
        )


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_numbers(model: oir.Model) -> None:
    """Check that no floating-point tensor holds NaN, and none but masks and bounds holds an infinity.

    A mask is a tensor whose finite elements are all 0 (added to attention scores), a bound a tensor of one element.
    Inline initializers become arrays on the way, so that reading one again copies nothing.

    Raises:
        ModelError: a tensor holds such numbers, or cannot be read.
    """
    outermost = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in [inner for outer in outermost for inner in (outer, *outer.subgraphs())]:
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _checked(value.const_value, f"initializer {value.name!r}")
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == oir.AttributeType.TENSOR and not attribute.is_ref():
                    _checked(attribute.as_tensor(), f"attribute {attribute.name!r} of {node.op_type} {node.name!r}")


def _checked(tensor: oir.TensorProtocol, name: str) -> oir.TensorProtocol:
    """The tensor, as an array where it was inline."""
    is_inline = isinstance(tensor, oir.serde.TensorProtoTensor)
    if not is_inline and not tensor.dtype.is_floating_point():
        return tensor
    try:
        array = tensor.numpy()
    except Exception as error:  # onnx-ir and numpy raise many kinds
        raise ModelError(f"the {name} cannot be read: {error}") from error
    if tensor.dtype.is_floating_point() and not _acceptable(array):
        raise ModelError(f"the {name} holds NaN or infinite values")
    if is_inline:
        metadata = dict(tensor.metadata_props)
        return oir.Tensor(array, tensor.dtype, name=tensor.name, doc_string=tensor.doc_string, metadata_props=metadata)
    del array  # a view of the mapped file, which cannot be unmapped before
    if isinstance(tensor, oir.ExternalTensor):
        tensor.release()
    return tensor


def _acceptable(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    all_finite = all_finite_are_zero = True
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        finite = np.isfinite(chunk)
        if not finite.all():
            all_finite = False
            if np.isnan(chunk).any():
                return False
            chunk = chunk[finite]
        all_finite_are_zero = all_finite_are_zero and not chunk.any()
    return all_finite or all_finite_are_zero or flat.size == 1
