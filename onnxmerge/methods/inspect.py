"""inspect: what a model is made of, which channels can be permuted, and where the analysis stops."""

import os
from typing import Any

from onnxmerge.ir.coverage import permutable_share
from onnxmerge.ir.labels import dims
from onnxmerge.ir.layers import Layer, find_layers, parameter_count
from onnxmerge.ir.load import load
from onnxmerge.ir.spaces import Slots, Space, find_spaces
from onnxmerge.ir.units import find_units
from onnxmerge.methods.check import check_spaces
from onnxmerge.report.recipe import as_recipe, history


def inspect_model(
    path: str | os.PathLike[str], *, check: bool = False, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """The analysis of one model as plain data (docs/inspect.md tells the keys).

    Args:
        path: the ONNX file.
        check: also permute every space at random and compare the outputs in onnxruntime.
        seed: of the permutations and inputs.
        threads: for onnxruntime.

    Raises:
        UsageError: there is no such file.
        ModelError: the model cannot be read, or onnxruntime refuses it.
    """
    model = load(path)
    layers = find_layers(model)
    spaces = find_spaces(model)
    macs = [layer.macs for layer in layers]
    checked = check_spaces(model, spaces, seed=seed, threads=threads) if check else None
    steps = history(model.metadata_props)
    return {
        "made_by": [{"command": own.command, "files": own.files, "versions": own.versions} for own in steps],
        "recipe": as_recipe(steps, path) if steps else None,
        "layers": [_layer(layer) for layer in layers],
        "units": [{"name": u.name, "kind": u.kind, "cut": u.cut, "layers": list(u.layers)} for u in find_units(model)],
        "spaces": [_space(space) for space in spaces.spaces],
        "frozen": [{"node": f.node, "op": f.op, "reason": f.reason} for f in spaces.frozen],
        "parameters": parameter_count(model),
        "macs": None if any(m is None for m in macs) else sum(m or 0 for m in macs),
        "permutable_parameters_share": permutable_share(model, spaces),
        "check": None
        if checked is None
        else {
            "passed": checked.passed,
            "max_relative_error": checked.max_relative_error,
            "worst_space": checked.worst_space,
        },
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "op": layer.op,
        "weight_shape": list(layer.weight_shape),
        "groups": layer.groups,
        "norm": None if layer.norm is None else layer.norm.op_type,
        "activation": None if layer.activation is None else layer.activation.op_type,
        "pre_activation": layer.pre_activation.name,
        "output_shape": list(dims(layer.linear)),
        "parameters": layer.parameters,
        "macs": layer.macs,
    }


def _space(space: Space) -> dict[str, Any]:
    return {
        "name": space.name,
        "size": space.size,
        "blocks": space.blocks,
        "weights": [_slots(slots) for slots in space.weights],
        "values": [slots.name for slots in space.values],
    }


def _slots(slots: Slots) -> dict[str, Any]:
    return {"name": slots.name, "axes": list(slots.axes), "slots_per_channel": int(slots.index.shape[1])}
