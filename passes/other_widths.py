"""A network with other widths: copies of it side by side, pruned. Every constant that holds a size follows."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from onnxmerge.errors import ModelError
from onnxmerge.ir.spaces import find_spaces
from onnxmerge.passes.prune import Prune
from onnxmerge.passes.widen import Widen


def with_widths(
    model: oir.Model, sizes: Mapping[str, int], widths: Mapping[str, int], copy: oir.Model, weights: Sequence[float]
) -> oir.Model:
    """`model`, beside it as many of `copy` as the widest space needs, and of each space the first channels.

    Args:
        model: the network.
        sizes: of its spaces, by their names.
        widths: wanted, by the names of spaces; the others keep their size.
        copy: a network of its architecture.
        weights: of the network and of each copy in the mean of outputs.

    Raises:
        ModelError: a space cannot get another width (see `Widen` and `Prune`).
    """
    copies = max(-(-width // sizes[name]) for name, width in widths.items()) - 1
    widened: oir.Model = Widen([copy] * copies, [weights[0]] + [weights[1]] * copies)(model).model if copies else model
    wide = {space.name: space for space in find_spaces(widened).spaces}
    missing = set(widths) - set(wide)
    apart = {name for name, size in sizes.items() if name in wide and wide[name].size != size * (copies + 1)}
    if missing | apart:
        raise ModelError(f"the channel space {min(missing | apart)!r} cannot get another width")
    keep = {name: np.arange(widths.get(name, size)) for name, size in sizes.items() if name in wide}
    pruned: oir.Model = Prune(keep, wide)(widened).model
    return pruned
