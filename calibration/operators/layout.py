"""Operators that move entries without choosing among them: reshape, transpose, join, split, repeat."""

import torch
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, integers, operator


@operator("Reshape")
def reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """-1 is inferred; 0 copies the input's size unless `allowzero` is set."""
    sizes = integers(shape)
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(attributes: Attributes, x: Tensor) -> Tensor:
    """To a matrix: axes before `axis` become rows, the others columns."""
    axis = attributes.get("axis", 1)
    rows = x.shape[:axis].numel()
    return x.reshape(rows, x.shape[axis:].numel())


@operator("Transpose")
def transpose(attributes: Attributes, x: Tensor) -> Tensor:
    """Permute the axes; reverse them when no order is given."""
    return x.permute(list(attributes.get("perm") or reversed(range(x.dim()))))


@operator("Squeeze")
def squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drop the given axes of size 1, or all of them."""
    return x.squeeze() if axes is None else x.squeeze(tuple(integers(axes)))


@operator("Unsqueeze")
def unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    """Insert axes of size 1; they count in the output."""
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in integers(axes)):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast `x` and `shape` against each other."""
    return x.expand(torch.broadcast_shapes(x.shape, integers(shape)))


@operator("Tile")
def tile(attributes: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    """Repeat each axis."""
    return x.repeat(integers(repeats))


@operator("Concat")
def concat(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Join along one axis."""
    return torch.cat(inputs, dim=attributes["axis"])


@operator("Split")
def split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Cut one axis into parts of the given sizes, or equal ones (the last may be smaller)."""
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, integers(sizes), dim=axis)
    return torch.split(x, -(-x.shape[axis] // attributes.get("num_outputs", attributes.outputs)), dim=axis)


@operator("DepthToSpace")
def depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    """[N, C b^2, H, W] to [N, C, H b, W b]; the block stands before the channel (DCR) or after it (CRD)."""
    n, c, h, w = x.shape
    b = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(attributes: Attributes, x: Tensor) -> Tensor:
    """[N, C, H b, W b] to [N, b^2 C, H, W], the block before the channel."""
    n, c, h, w = x.shape
    b = attributes["blocksize"]
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)
