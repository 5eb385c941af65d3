"""Which value of one network does the job of which value of another: matching two graphs from their inputs on."""

from dataclasses import dataclass, field

import onnx_ir as oir

from onnxmerge.ir.labels import dims
from onnxmerge.ir.weights import get_array, is_float


@dataclass
class Correspondence:
    """Names in the first model -> names in the second, for computed values and for constants."""

    values: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    """One sentence for each node of the first model that reads matched values but has no partner."""


def correspond(first: oir.Model, second: oir.Model, *, same_sizes: bool = True) -> Correspondence:
    """Match nodes of two normalised models in topological order.

    Two nodes match when they have the same operator and attributes, read matched values at the same places, and their
    constants have equal shapes (`same_sizes`) and, where they are integers (pads, axes), equal content. Among several
    equal candidates the first in graph order is taken.
    """
    found = Correspondence()
    for left, right in zip(first.graph.inputs, second.graph.inputs, strict=True):
        found.values[left.name or ""] = right.name or ""
    by_name = {v.name: v for node in second.graph for v in node.outputs} | {v.name: v for v in second.graph.inputs}
    position = {node: number for number, node in enumerate(second.graph)}
    taken: set[oir.Node] = set()
    for node in first.graph:
        computed = [v for v in node.inputs if v is not None and v.const_value is None]
        if not computed or any(v.name not in found.values for v in computed):
            continue
        source = by_name[found.values[computed[0].name or ""]]
        candidates = [c for c in dict.fromkeys(n for n, _ in source.uses()) if c in position and c not in taken]
        reasons = []
        for candidate in sorted(candidates, key=position.__getitem__):
            reason = _difference(node, candidate, found, same_sizes)
            if reason is None:
                _pair(node, candidate, found)
                taken.add(candidate)
                break
            reasons.append(reason)
        else:
            found.stopped.append(f"{node.op_type} {node.name!r}: " + (reasons[0] if reasons else "nothing like it"))
    return found


def _difference(left: oir.Node, right: oir.Node, found: Correspondence, same_sizes: bool) -> str | None:
    """Why the two nodes do not match, or None."""
    if (left.domain, left.op_type, len(left.inputs)) != (right.domain, right.op_type, len(right.inputs)):
        return f"the other network has {right.op_type} {right.name!r} there"
    names = left.attributes.keys() | right.attributes.keys()
    for name in sorted(names):
        if name not in left.attributes or name not in right.attributes:
            return f"only one of the two sets the attribute {name!r}"
        if str(left.attributes[name].value) != str(right.attributes[name].value):
            return f"the attribute {name!r} differs"
    for a, b in zip(left.inputs, right.inputs, strict=True):
        if (a is None) != (b is None):
            return "one leaves out an optional input"
        if a is None or b is None:
            continue
        if (a.const_value is None) != (b.const_value is None):
            return f"{a.name!r} is constant in one network only"
        if a.const_value is None:
            if found.values.get(a.name or "") != b.name:
                return "it reads other values"
        elif same_sizes and dims(a) != dims(b):
            return f"{a.name!r} has shape {list(dims(a))} in one network and {list(dims(b))} in the other"
        elif not is_float(a) and not (
            get_array(a).shape == get_array(b).shape and (get_array(a) == get_array(b)).all()
        ):
            return f"the constant {a.name!r} differs"
    return None


def _pair(left: oir.Node, right: oir.Node, found: Correspondence) -> None:
    for a, b in zip(left.inputs, right.inputs, strict=True):
        if a is not None and b is not None and a.const_value is not None:
            found.constants[a.name or ""] = b.name or ""
    for a, b in zip(left.outputs, right.outputs, strict=True):
        found.values[a.name or ""] = b.name or ""
