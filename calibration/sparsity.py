"""Connections that a sparse network has not: they stay absent in training (He, Zhou and Thiele 2018, section 3.6)."""

import torch
from torch import Tensor

from onnxmerge.calibration.module import GraphModule
from onnxmerge.calibration.roles import Role


class Absent:
    """The zeros of a module's sparse weights, as they are now."""

    def __init__(self, module: GraphModule):
        weights = module.trainable((Role.WEIGHT,))
        self._zeros = [(weight, weight.detach() == 0) for weight in weights if is_sparse(weight.detach())]

    def restore(self) -> None:
        """Set them to zero again."""
        with torch.no_grad():
            for weight, zeros in self._zeros:
                weight.masked_fill_(zeros, 0)


def is_sparse(weight: Tensor) -> bool:
    """Whether the zeros of a weight [outputs, inputs, ...] or [inputs, outputs] are connections that were pruned.

    At least half of its entries are exactly zero, and it is no identity or selection that was put in and is to be
    trained: there every output, or every input, has at most one entry. Biases have no connections.
    """
    there = (weight != 0).squeeze()
    if there.dim() < 2 or 2 * int(there.sum()) > there.numel():
        return False
    return all(int(there.transpose(0, axis).flatten(1).sum(1).max()) > 1 for axis in (0, 1))
