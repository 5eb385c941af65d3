"""Edit a model as an onnx-graphsurgeon graph."""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as oir

from onnxmerge.errors import UsageError


def edited(model: oir.Model, edit: Callable[[Any], Any]) -> onnx.ModelProto:
    """What `edit` makes of `model`: metadata, texts and the IR version stay, which that library drops.

    Args:
        model: stays as it is.
        edit: takes an `onnx_graphsurgeon.Graph`, and returns it or another one, or None where it changes it in place.

    Raises:
        UsageError: the library is not installed.
        TypeError: what `edit` returns is no graph.
        Exception: what `edit` and the library raise.
    """
    try:
        import onnx_graphsurgeon as surgeon
    except ImportError as error:
        raise UsageError("onnx-graphsurgeon is not installed: pip install 'onnxmerge[graphsurgeon]'") from error
    whole = model.clone()
    oir.external_data.load_to_model(whole)
    proto = oir.to_proto(whole)
    graph = surgeon.import_onnx(proto)
    returned = edit(graph)
    graph = graph if returned is None else returned
    if not isinstance(graph, surgeon.Graph):
        raise TypeError(f"it returned {type(graph).__name__}, not an onnx_graphsurgeon.Graph")
    made = surgeon.export_onnx(graph)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if proto.HasField(field):
            setattr(made, field, getattr(proto, field))
    made.graph.name = proto.graph.name
    made.metadata_props.extend(proto.metadata_props)
    return made
