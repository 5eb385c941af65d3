"""Arrays as they are stored: compared and copied in chunks, so that weights larger than memory stay on disk."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as oir

from onnxmerge.errors import ModelError

_CHUNK = 1 << 20


def is_external(model: oir.Model) -> bool:
    """Whether any weight lies in a file beside the model's."""
    return any(
        isinstance(value.const_value, oir.ExternalTensor)
        for graph in model.graphs()
        for value in graph.initializers.values()
    )


def digest(tensor: oir.TensorProtocol) -> bytes:
    """SHA-256 of the element type, the shape and the bytes.

    Raises:
        ModelError: the external data file is missing or too short.
    """
    found = hashlib.sha256(f"{tensor.dtype.name} {tuple(tensor.shape)}\n".encode())
    for chunk in _chunks(tensor):
        found.update(chunk)
    return found.digest()


def store_once(model: oir.Model) -> int:
    """Let all readers of initializers of equal type, shape and bytes read one of them, the first; in place.

    Initializers that are inputs or outputs of their graph stay. Only arrays whose type and shape occur twice are read.

    Returns:
        The bytes saved.
    """
    saved = 0
    for graph in model.graphs():
        groups: dict[tuple[object, ...], list[oir.Value]] = {}
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input() and not value.is_graph_output():
                groups.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
        for group in groups.values():
            saved += _unite(graph, group) if len(group) > 1 else 0
    return saved


def _unite(graph: oir.Graph, values: list[oir.Value]) -> int:
    first: dict[bytes, oir.Value] = {}
    saved = 0
    for value in values:
        assert value.const_value is not None
        kept = first.setdefault(digest(value.const_value), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[value.name or ""]
            saved += value.const_value.nbytes
    return saved


def renamed(tensor: oir.TensorProtocol, name: str | None) -> oir.TensorProtocol:
    """The same array under another name; `tensor` keeps its own, and nothing is read from disk."""
    if isinstance(tensor, oir.ExternalTensor):
        return oir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=oir.Shape(tensor.shape.numpy()),
            name=name or "",
            base_dir=tensor.base_dir,
        )
    if tensor.dtype == oir.DataType.STRING:
        return oir.StringTensor(tensor.numpy(), shape=oir.Shape(tensor.shape.numpy()), name=name)
    return oir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def _chunks(tensor: oir.TensorProtocol) -> Iterator[bytes]:
    if not isinstance(tensor, oir.ExternalTensor):
        if tensor.dtype == oir.DataType.STRING:
            for text in tensor.numpy().ravel():
                yield len(text).to_bytes(8, "little") + bytes(text)
        else:
            yield tensor.tobytes()
        return
    check_external(tensor)
    remaining = tensor.nbytes
    with open(tensor.path, "rb") as stream:
        stream.seek(tensor.offset or 0)
        while remaining and (chunk := stream.read(min(_CHUNK, remaining))):
            remaining -= len(chunk)
            yield chunk


def check_external(tensor: oir.ExternalTensor) -> None:
    """See that the file behind `tensor` is there and long enough.

    Raises:
        ModelError: it is not.
    """
    file = Path(tensor.path)
    if not file.is_file():
        raise ModelError(f"{file}: the external data file of the initializer {tensor.name!r} is missing")
    needed = (tensor.offset or 0) + tensor.nbytes
    if file.stat().st_size < needed:
        raise ModelError(f"{file}: is truncated: the initializer {tensor.name!r} needs {needed} bytes")
