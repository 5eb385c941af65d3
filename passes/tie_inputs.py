"""Tie inputs: what several tasks read under names of their own becomes one input (exact, once it is fed to all).

An axis that is symbolic in one and fixed in another becomes fixed. Symbols that meet on an axis become one symbol, in
all shapes of the model; so do a symbol and the number it meets.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as oir

from onnxmerge.errors import UsageError
from onnxmerge.ir.sizes import Equalities, rename_sizes, sizes_of


class TieInputs(oir.passes.InPlacePass):
    """Give every group of inputs one name; a group of one is renamed.

    Args:
        groups: new name -> the inputs that it stands for, in order; every input must be in one group.
    """

    preserves = "exact"

    def __init__(self, groups: Mapping[str, Sequence[str]]):
        self.groups = groups

    def call(self, model: oir.Model) -> oir.passes.PassResult:
        """Tie in place.

        Raises:
            UsageError: the types or shapes of a group contradict each other.
        """
        inputs = {value.name or "": value for value in model.graph.inputs}
        equal = Equalities()
        kept = []
        for members in self.groups.values():
            values = [inputs[member] for member in members]
            for value in values[1:]:
                if not fits(values[0], value, equal):
                    raise UsageError(
                        f"the inputs {_described(values[0])} and {_described(value)} cannot be one: "
                        "their types or shapes contradict each other"
                    )
                _adopt(values[0], value)
                value.replace_all_uses_with(values[0])
            kept.append(values[0])
        model.graph.inputs.clear()
        model.graph.inputs.extend(kept)
        for name, value in zip(self.groups, kept, strict=True):
            value.name = name
        rename_sizes(model, equal.find)
        return oir.passes.PassResult(model, modified=True)


def fits(first: oir.Value, second: oir.Value, equal: Equalities) -> bool:
    """Whether two inputs can be one, given what is `equal` already; `equal` learns what this makes equal."""
    if first.type != second.type:
        return False
    ours, theirs = sizes_of(first), sizes_of(second)
    return ours is None or theirs is None or equal.unite(ours, theirs)


def _adopt(kept: oir.Value, other: oir.Value) -> None:
    """Let `kept` know the sizes that only `other` knows."""
    ours, theirs = sizes_of(kept), sizes_of(other)
    if ours is None:
        kept.shape = other.shape
    elif theirs is not None:
        kept.shape = oir.Shape([b if a is None else a for a, b in zip(ours, theirs, strict=True)])


def _described(value: oir.Value) -> str:
    sizes = sizes_of(value)
    shape = "?" if sizes is None else "x".join("?" if size is None else str(size) for size in sizes)
    return f"{value.name} ({value.dtype.name.lower() if value.dtype is not None else value.type} {shape})"
